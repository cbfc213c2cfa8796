//! The outbound half of the Security Policy Database (RFC 4301 §4.4.1): which SA a packet goes into.
//!
//! Of the policies that cover a packet the one with the more specific remote selector wins, among equal ones the one
//! with the more specific local selectors, then the newest: a wide tunnel must not take the traffic of a narrow one to
//! another peer whenever it is rekeyed. Single addresses (road warriors) are found by a hash, so that a gateway with
//! thousands of them does not compare a packet with each.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use crate::plane::Trap;
use crate::sad::Entry;
use crate::selector::{Flow, TrafficSelector};

/// Installed pairs in order of look-up; every list has the most specific first, and of equal ones the newest.
#[derive(Default)]
pub(crate) struct Policies {
    /// Remote selectors of a single address.
    by_host: HashMap<IpAddr, Vec<Policy>>,
    /// All others.
    wide: Vec<Policy>,
}

/// One remote selector of a pair.
struct Policy {
    remote: TrafficSelector,
    entry: Arc<Entry>,
}

impl Policies {
    /// Sorts entries.
    pub(crate) fn new(entries: &[Arc<Entry>]) -> Self {
        let mut sorted: Vec<_> = entries
            .iter()
            .flat_map(|entry| {
                let local = entry.sa.local_ts.iter().map(TrafficSelector::width).max();
                let policy = |remote: &TrafficSelector| Policy { remote: *remote, entry: Arc::clone(entry) };
                entry
                    .sa
                    .remote_ts
                    .iter()
                    .map(move |remote| ((remote.width(), local, Reverse(entry.order)), policy(remote)))
            })
            .collect();
        sorted.sort_by_key(|(rank, _)| *rank);
        let mut policies = Self::default();
        for (_, policy) in sorted {
            if policy.remote.start == policy.remote.end {
                policies.by_host.entry(policy.remote.start).or_default().push(policy);
            } else {
                policies.wide.push(policy);
            }
        }
        policies
    }

    /// The entry that an outbound packet goes into; pairs that do not send are passed over.
    pub(crate) fn select(&self, flow: &Flow, shows_ports: bool) -> Option<&Arc<Entry>> {
        let hosts = self.by_host.get(&flow.remote).into_iter().flatten();
        let found = hosts.chain(&self.wide).find(|policy| {
            policy.remote.selects(flow.protocol, flow.remote, flow.remote_port, shows_ports)
                && policy.entry.sa.sends()
                && policy.entry.sa.selects(flow, shows_ports)
        });
        found.map(|policy| &policy.entry)
    }
}

/// Policies without SAs, for packets that no SA is for.
#[derive(Default)]
pub(crate) struct Traps {
    /// In order of installation.
    pub(crate) all: Vec<Arc<TrapState>>,
    /// One entry for each remote selector, in the order of [`Policies`].
    sorted: Vec<(TrafficSelector, Arc<TrapState>)>,
}

/// A trap, and when it was last reported.
pub(crate) struct TrapState {
    pub(crate) trap: Trap,
    /// The data path's tick; 0 before the first.
    pub(crate) reported: AtomicU64,
}

impl TrapState {
    pub(crate) fn new(trap: Trap) -> Self {
        Self { trap, reported: AtomicU64::new(0) }
    }
}

impl Traps {
    /// Sorts traps.
    pub(crate) fn new(all: Vec<Arc<TrapState>>) -> Self {
        let mut sorted: Vec<_> = all
            .iter()
            .rev()
            .flat_map(|state| state.trap.remote_ts.iter().map(move |remote| (*remote, Arc::clone(state))))
            .collect();
        // Stable: of equals the newest stays first.
        sorted.sort_by_key(|(remote, state)| {
            (remote.width(), state.trap.local_ts.iter().map(TrafficSelector::width).max())
        });
        Self { all, sorted }
    }

    /// The trap that an outbound packet falls into.
    pub(crate) fn select(&self, flow: &Flow, shows_ports: bool) -> Option<&TrapState> {
        let found = self.sorted.iter().find(|(remote, state)| {
            remote.selects(flow.protocol, flow.remote, flow.remote_port, shows_ports)
                && state
                    .trap
                    .local_ts
                    .iter()
                    .any(|local| local.selects(flow.protocol, flow.local, flow.local_port, shows_ports))
        });
        found.map(|(_, state)| &**state)
    }
}
