//! Traffic selectors of a negotiation (RFC 7296 §2.9): what an initiator offers for a packet, and which of its policies a
//! responder answers with.

use std::net::IpAddr;
use std::sync::Arc;

use ipsec::plane::Mode;
use ipsec::selector::{Flow, MAX_SELECTORS, TrafficSelector, narrow};

use crate::config::Child;
use crate::engine::triggers::Trigger;

/// Selectors of both sides, in our terms.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Selectors {
    pub(crate) local: Vec<TrafficSelector>,
    pub(crate) remote: Vec<TrafficSelector>,
}

impl Selectors {
    /// What is offered for a packet: its own selectors first, or the part of the policy for its pair of addresses. A
    /// packet that the policy does not cover (it changed meanwhile) changes nothing.
    pub(crate) fn wanted_by(self, trigger: Option<Trigger>) -> Self {
        let Some(Trigger { packet, single_pair }) = trigger else { return self };
        let (local, remote) = TrafficSelector::of_flow(&packet);
        let covers = |policy: &[TrafficSelector], packet: &TrafficSelector| policy.iter().any(|ts| ts.contains(packet));
        if !covers(&self.local, &local) || !covers(&self.remote, &remote) {
            return self;
        }
        if single_pair {
            return self.of_hosts(local.start, remote.start);
        }
        let first = |packet, mut policy: Vec<TrafficSelector>| {
            // A full payload has no room for it.
            if policy.len() < MAX_SELECTORS && policy.first() != Some(&packet) {
                policy.insert(0, packet);
            }
            policy
        };
        Self { local: first(local, self.local), remote: first(remote, self.remote) }
    }

    /// The part of a policy for two hosts; all of it where it has none.
    pub(crate) fn of_hosts(self, local: IpAddr, remote: IpAddr) -> Self {
        let part = |policy: &[TrafficSelector], host| narrow(&[TrafficSelector::host(host)], policy).selectors;
        let part = Self { local: part(&self.local, local), remote: part(&self.remote, remote) };
        if part.local.is_empty() || part.remote.is_empty() { self } else { part }
    }

    /// What both sides allow, and whether that is all of it; `None` when a side has nothing.
    fn narrowed_to(&self, policy: &Self) -> Option<(Self, bool)> {
        let local = narrow(&self.local, &policy.local);
        let remote = narrow(&self.remote, &policy.remote);
        let complete = local.complete && remote.complete;
        let narrowed = Self { local: local.selectors, remote: remote.selectors };
        (!narrowed.local.is_empty() && !narrowed.remote.is_empty()).then_some((narrowed, complete))
    }

    /// True when a packet is within.
    pub(crate) fn selects(&self, flow: &Flow) -> bool {
        self.local.iter().any(|ts| ts.matches(flow.protocol, flow.local, flow.local_port))
            && self.remote.iter().any(|ts| ts.matches(flow.protocol, flow.remote, flow.remote_port))
    }

    /// True when all traffic of `other` is traffic of `self`, each selector within one of ours.
    pub(crate) fn contains(&self, other: &Self) -> bool {
        let within = |outer: &[TrafficSelector], inner: &[TrafficSelector]| {
            inner.iter().all(|one| outer.iter().any(|other| other.contains(one)))
        };
        within(&self.local, &other.local) && within(&self.remote, &other.remote)
    }

    /// True when what the peer put first lies within, on both sides.
    fn contains_first(&self, proposed: &Self) -> bool {
        let first = |list: &[TrafficSelector]| list.first().copied().into_iter().collect();
        self.contains(&Self { local: first(&proposed.local), remote: first(&proposed.remote) })
    }
}

/// A policy that can answer a proposal.
pub(crate) struct Candidate<'a> {
    pub(crate) config: &'a Arc<Child>,
    pub(crate) narrowed: Selectors,
    complete: bool,
}

impl Candidate<'_> {
    /// True when another Child SA could carry more of what the peer proposed: ADDITIONAL_TS_POSSIBLE.
    pub(crate) fn leaves_out<'a>(&self, mut others: impl Iterator<Item = Candidate<'a>>) -> bool {
        !self.complete || others.any(|other| !self.narrowed.contains(&other.narrowed))
    }
}

/// The policies that can answer a proposal, best first. Transport mode is a wish that may be declined (§1.3.1), so tunnel
/// policies come after those of transport mode; the reverse is not possible. Among those of one mode the ones that have
/// all of the initiator's first choice come first (§2.9: the packet that wants the SA), each in configuration order.
pub(crate) fn candidates<'a>(
    configs: &'a [Arc<Child>],
    proposed: &Selectors,
    transport: bool,
    resolve: impl Fn(&Child) -> Selectors,
) -> Vec<Candidate<'a>> {
    let fits = |config: &&Arc<Child>| transport || config.mode == Mode::Tunnel;
    let mut candidates: Vec<Candidate<'a>> = configs
        .iter()
        .filter(fits)
        .filter_map(|config| {
            let (narrowed, complete) = proposed.narrowed_to(&resolve(config))?;
            Some(Candidate { config, narrowed, complete })
        })
        .collect();
    candidates.sort_by_key(|candidate| {
        let declines = transport && candidate.config.mode == Mode::Tunnel;
        (declines, !candidate.narrowed.contains_first(proposed))
    });
    candidates
}
