//! Fragments that wait for others (RFC 7383 §2.6), of all IKE SAs together, and which IKE SAs a peer's address leads to.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::shared::Short;
use super::{Engine, IkeSaId};
use crate::sa::retry::after;

/// How long fragments wait for the rest of their message. A repetition comes sooner than that, at first.
const FRAGMENTS_WAIT: Duration = Duration::from_secs(30);
/// Octets of waiting fragments in all, of peers that have not authenticated and of those that have.
const STRANGERS_FRAGMENTS: usize = 8 << 20;
const PEERS_FRAGMENTS: usize = 64 << 20;

/// What the tables know of an IKE SA.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Held {
    /// Addresses that an initiation to which it serves may name.
    pub(crate) reached_at: [Option<IpAddr>; 2],
    /// Octets of fragments that wait.
    pub(crate) fragments: usize,
    /// The peer has not authenticated.
    pub(crate) stranger: bool,
    /// When its fragments are dropped.
    until: Option<Instant>,
}

impl Held {
    pub(crate) fn new(reached_at: [Option<IpAddr>; 2], fragments: usize, stranger: bool) -> Self {
        Self { reached_at, fragments, stranger, until: None }
    }
}

/// The tables.
#[derive(Debug, Default)]
pub(super) struct Upkeep {
    by_address: BTreeSet<(IpAddr, IkeSaId)>,
    deadlines: BTreeSet<(Instant, IkeSaId)>,
}

/// Octets of fragments that wait at all shards.
#[derive(Debug, Default)]
pub(crate) struct Fragments(Short<Sums>);

#[derive(Debug, Default)]
struct Sums {
    strangers: usize,
    peers: usize,
}

impl Fragments {
    /// An IKE SA has other fragments than before. False, and all as it was, when it may not keep so many of all that there are.
    pub(super) fn exchange(&self, old: Held, new: Held) -> bool {
        if (old.fragments, new.fragments) == (0, 0) {
            return true;
        }
        let mut sums = self.0.lock();
        let old_sum = if old.stranger { &mut sums.strangers } else { &mut sums.peers };
        *old_sum = old_sum.saturating_sub(old.fragments);
        let (sum, limit) =
            if new.stranger { (&mut sums.strangers, STRANGERS_FRAGMENTS) } else { (&mut sums.peers, PEERS_FRAGMENTS) };
        let after = sum.saturating_add(new.fragments);
        if new.fragments <= old.fragments || after <= limit {
            *sum = after;
            return true;
        }
        let old_sum = if old.stranger { &mut sums.strangers } else { &mut sums.peers };
        *old_sum = old_sum.saturating_add(old.fragments);
        false
    }

    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn total(&self) -> usize {
        let sums = self.0.lock();
        sums.strangers + sums.peers
    }
}

impl Upkeep {
    /// Brings the tables in line; gives back what is to be remembered of the IKE SA.
    pub(super) fn changed(&mut self, now: Instant, id: IkeSaId, old: Held, mut new: Held) -> Held {
        if old.reached_at != new.reached_at {
            for address in old.reached_at.into_iter().flatten() {
                self.by_address.remove(&(address, id));
            }
            for address in new.reached_at.into_iter().flatten() {
                self.by_address.insert((address, id));
            }
        }
        // The time runs from the first one; when there are fewer than before, it is another message.
        new.until = match (old.until, new.fragments) {
            (_, 0) => None,
            (Some(until), now_held) if now_held >= old.fragments => Some(until),
            _ => Some(after(now, FRAGMENTS_WAIT)),
        };
        if new.until != old.until {
            old.until.map(|at| self.deadlines.remove(&(at, id)));
            new.until.map(|at| self.deadlines.insert((at, id)));
        }
        new
    }

    pub(super) fn next_timeout(&self) -> Option<Instant> {
        self.deadlines.first().map(|(at, _)| *at)
    }

    /// IKE SAs that lead to this address.
    pub(super) fn at(&self, address: IpAddr) -> impl Iterator<Item = IkeSaId> + '_ {
        self.by_address.range((address, IkeSaId(0))..=(address, IkeSaId(u64::MAX))).map(|(_, id)| *id)
    }

    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn is_empty(&self) -> bool {
        self.by_address.is_empty() && self.deadlines.is_empty()
    }
}

impl Engine {
    /// Drops fragments that have waited for too long.
    pub(super) fn drop_old_fragments(&mut self, now: Instant) {
        let due: Vec<IkeSaId> =
            self.upkeep.deadlines.iter().take_while(|(at, _)| *at <= now).map(|(_, id)| *id).collect();
        for id in due {
            self.with(id, |mut sa, _| {
                sa.drop_fragments();
                Some(sa)
            });
        }
    }
}
