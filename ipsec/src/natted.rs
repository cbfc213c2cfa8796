//! Whose packet it is where several peers in transport mode are behind one NAT (RFC 3948 §5.2).
//!
//! To us they have one address, and so one policy: only the connections tell them apart. A connection belongs to the peer
//! that it was first seen with, and to nobody else while that peer has an SA and uses it.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::guard::ClassId;
use crate::selector::Flow;

/// Connections that one peer can own. A peer that has more gets no answers to the rest while others share its address.
const MOST_FOR_A_PEER: usize = 4096;

/// Connections that all peers together can own: each has its class's share for as long as nobody searches for idle ones,
/// and classes come and go.
const MOST_IN_ALL: usize = 1 << 18;

/// After so many ticks without a packet another peer may take a connection over, as NATs do (RFC 4787 §4.3).
const IDLE: u64 = 5 * 60 * 1000;

/// Ticks between two searches for idle ones.
const PRUNE_EVERY: u64 = 1000;

/// Owners of connections.
#[derive(Default)]
pub(crate) struct Owners(Mutex<Table>);

#[derive(Default)]
struct Table {
    by_flow: HashMap<Flow, (ClassId, u64)>,
    held: HashMap<ClassId, usize>,
    pruned_at: u64,
}

impl Owners {
    /// Who owns a connection.
    pub(crate) fn of(&self, flow: &Flow) -> Option<ClassId> {
        self.table().by_flow.get(flow).map(|(class, _)| *class)
    }

    /// A packet of a connection came from, or goes to, a peer of this class: false when the connection is another's, one
    /// for which `is_there` says true.
    pub(crate) fn claim(&self, flow: Flow, class: ClassId, tick: u64, is_there: impl Fn(ClassId) -> bool) -> bool {
        let mut table = self.table();
        match table.by_flow.get_mut(&flow) {
            Some((owner, last)) if *owner == class => {
                *last = tick;
                return true;
            }
            Some((owner, last)) if tick.saturating_sub(*last) < IDLE && is_there(*owner) => return false,
            _ => {}
        }
        table.give(flow, class, tick);
        true
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn give(&mut self, flow: Flow, class: ClassId, tick: u64) {
        if self.is_full(class) {
            if tick.saturating_sub(self.pruned_at) < PRUNE_EVERY {
                return;
            }
            self.prune(tick);
            if self.is_full(class) {
                return;
            }
        }
        if let Some((before, _)) = self.by_flow.insert(flow, (class, tick)) {
            self.release(before);
        }
        *self.held.entry(class).or_default() += 1;
    }

    fn is_full(&self, class: ClassId) -> bool {
        let of_peer = self.held.get(&class).is_some_and(|held| *held >= MOST_FOR_A_PEER);
        of_peer || self.by_flow.len() >= MOST_IN_ALL
    }

    fn release(&mut self, class: ClassId) {
        if let Some(held) = self.held.get_mut(&class) {
            *held -= 1;
            if *held == 0 {
                self.held.remove(&class);
            }
        }
    }

    /// Forgets what is idle.
    fn prune(&mut self, tick: u64) {
        self.pruned_at = tick;
        self.by_flow.retain(|_, (_, last)| tick.saturating_sub(*last) < IDLE);
        self.held.clear();
        for (class, _) in self.by_flow.values() {
            *self.held.entry(*class).or_default() += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAROL: ClassId = ClassId(1);
    const DAVE: ClassId = ClassId(2);

    fn flow(port: u16) -> Flow {
        let (local, remote) = ([192, 0, 2, 2].into(), [192, 0, 2, 254].into());
        Flow { protocol: 6, local, local_port: 80, remote, remote_port: port }
    }

    #[test]
    fn a_connection_is_its_first_owners_while_that_is_there_and_uses_it() {
        let owners = Owners::default();
        assert_eq!(owners.of(&flow(1)), None);
        assert!(owners.claim(flow(1), CAROL, 1, |_| true));
        assert!(!owners.claim(flow(1), DAVE, 2, |_| true));
        assert!(owners.claim(flow(2), DAVE, 2, |_| true));
        assert!(owners.claim(flow(1), CAROL, IDLE, |_| true));
        assert!(!owners.claim(flow(1), DAVE, 2 * IDLE - 1, |_| true), "used since");
        assert!(owners.claim(flow(1), DAVE, 2 * IDLE, |_| true), "idle");
        assert_eq!(owners.of(&flow(1)), Some(DAVE));
        assert!(owners.claim(flow(1), CAROL, 2 * IDLE + 1, |_| false), "its SAs are gone");
    }

    #[test]
    fn a_peer_cannot_fill_the_table_and_idle_ones_make_room() {
        let owners = Owners::default();
        for port in 0..=u16::MAX {
            assert!(owners.claim(flow(port), CAROL, 1, |_| true), "what is not remembered passes");
        }
        assert_eq!(owners.table().by_flow.len(), MOST_FOR_A_PEER);
        assert!(owners.claim(flow(60_000), DAVE, 2, |_| true), "others have room");
        assert_eq!(owners.of(&flow(60_000)), Some(DAVE));
        assert!(owners.claim(flow(60_001), CAROL, IDLE + 1, |_| true));
        assert_eq!(owners.of(&flow(60_001)), Some(CAROL));
        assert_eq!(owners.table().by_flow.len(), 2, "only Dave's is left, and the new one");
    }
    #[test]
    fn peers_that_came_and_went_do_not_fill_memory() {
        let owners = Owners::default();
        let many = u32::try_from(MOST_IN_ALL).unwrap_or(u32::MAX);
        for peer in 0..=many {
            let remote = std::net::Ipv4Addr::from_bits(peer).into();
            let flow = Flow { remote, ..flow(1) };
            assert!(owners.claim(flow, ClassId(peer + 10), 1, |_| false));
        }
        assert_eq!(owners.table().by_flow.len(), MOST_IN_ALL);
        assert!(owners.claim(flow(2), CAROL, IDLE + 1, |_| true));
        assert_eq!(owners.of(&flow(2)), Some(CAROL));
        // One guard: a second one in the same statement would wait for the first.
        let table = owners.table();
        assert_eq!((table.by_flow.len(), table.held.len()), (1, 1));
    }
}
