//! IKE SAs by where they are, so that what the network says of an address need not be told to all of them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use super::{Engine, IkeSaId};
use crate::sa::IkeSa;

/// Where an IKE SA is, as far as the tables know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Place {
    /// The peer's address and port.
    pub(crate) remote: Option<SocketAddr>,
    /// Routes matter to it: we choose its addresses.
    pub(crate) decides: bool,
    /// The peer wants to know our addresses (RFC 4555 §3.6).
    pub(crate) told: bool,
}

/// Hints about one address are followed up once in this time: anybody can forge them, and many peers may be behind a NAT.
const SUSPICION_INTERVAL: Duration = Duration::from_secs(1);

/// The tables.
#[derive(Default)]
pub(super) struct Places {
    by_remote: BTreeSet<(SocketAddr, IkeSaId)>,
    deciding: BTreeSet<IkeSaId>,
    told: BTreeSet<IkeSaId>,
    /// Addresses of peers that a hint was about lately.
    suspected: BTreeMap<IpAddr, Instant>,
    forgotten_at: Option<Instant>,
}

impl Places {
    /// An IKE SA is somewhere else now, or nowhere.
    pub(super) fn moved(&mut self, id: IkeSaId, old: Place, new: Place) {
        if old == new {
            return;
        }
        if let Some(remote) = old.remote.filter(|_| old.remote != new.remote) {
            self.by_remote.remove(&(remote, id));
        }
        if let Some(remote) = new.remote {
            self.by_remote.insert((remote, id));
        }
        for (ids, belongs) in [(&mut self.deciding, new.decides), (&mut self.told, new.told)] {
            if belongs {
                ids.insert(id);
            } else {
                ids.remove(&id);
            }
        }
    }

    /// IKE SAs that a hint is about: those with peers at this address, unless there was one just now.
    pub(super) fn suspects(&mut self, now: Instant, remote: IpAddr) -> Vec<IkeSaId> {
        let lately = |at: &Instant| now.saturating_duration_since(*at) < SUSPICION_INTERVAL;
        if self.suspected.get(&remote).is_some_and(lately) {
            return Vec::new();
        }
        let ids = self.at_address(remote);
        if !ids.is_empty() {
            if !self.forgotten_at.is_some_and(|at| lately(&at)) {
                self.forgotten_at = Some(now);
                self.suspected.retain(|_, at| lately(at));
            }
            self.suspected.insert(remote, now);
        }
        ids
    }

    /// IKE SAs with peers at this address, at any port.
    fn at_address(&self, remote: IpAddr) -> Vec<IkeSaId> {
        // In any scope, too: those come after the port.
        let first = (SocketAddr::new(remote, 0), IkeSaId(0));
        self.by_remote.range(first..).take_while(|(at, _)| at.ip() == remote).map(|(_, id)| *id).collect()
    }

    fn at(&self, remote: SocketAddr) -> Vec<IkeSaId> {
        self.by_remote.range((remote, IkeSaId(0))..=(remote, IkeSaId(u64::MAX))).map(|(_, id)| *id).collect()
    }

    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn is_empty(&self) -> bool {
        self.by_remote.is_empty() && self.deciding.is_empty() && self.told.is_empty()
    }
}

impl Engine {
    /// The network refused a datagram to this path (ICMP unreachable); a hint only, never proof (§2.4).
    pub fn handle_unreachable(&mut self, now: Instant, remote: SocketAddr) {
        self.now = now;
        for id in self.places.at(remote) {
            self.with(id, |sa, ctx| match sa {
                IkeSa::Initiating(sa) => sa.handle_unreachable(ctx, now, remote).map(IkeSa::Initiating),
                IkeSa::Resuming(sa) => sa.handle_unreachable(ctx, now, remote),
                IkeSa::Established(mut sa) => sa.handle_hint(ctx, now).is_ok().then_some(IkeSa::Established(sa)),
                other => Some(other),
            });
        }
        self.settle(now);
    }

    /// The addresses at which peers may reach us: those of interfaces that are up, without loopback and tunnels. Told
    /// to peers with MOBIKE (RFC 4555 §3.4). Call [`Self::handle_roam`] afterwards.
    ///
    /// True when they differ from those of before.
    pub fn set_local_addresses(&mut self, addresses: Vec<std::net::IpAddr>) -> bool {
        let changed = self.ctx.local_addresses != addresses;
        self.ctx.local_addresses = addresses;
        changed
    }

    /// Addresses or routes of this host have changed: IKE SAs whose path that may touch ask for routes
    /// ([`super::Job::FindRoutes`]) and move, or tell their peers.
    pub fn handle_roam(&mut self, now: Instant, addresses_changed: bool) {
        self.now = now;
        let mut ids = self.places.deciding.clone();
        if addresses_changed {
            ids.extend(&self.places.told);
        }
        for id in ids {
            self.with_established(id, |sa, ctx| sa.handle_roam(ctx, now, addresses_changed));
        }
        self.settle(now);
    }
}
