//! The Security Policy Database (RFC 4301 §4.4.1) as packets need it: which SA an outbound packet goes into, or which
//! trap it falls into.
//!
//! Of the policies that cover a packet the one with the more specific remote selector wins, among equal ones the one
//! with the more specific local selectors, then the newest: a wide tunnel must not take the traffic of a narrow one to
//! another peer whenever it is rekeyed. A trap is a policy like any other, but for an SA that is as specific, which is
//! what the trap is there for.

use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rpds::{HashTrieMapSync, RedBlackTreeMapSync};

use crate::guard::ClassId;
use crate::networks::{Networks, Selects};
use crate::plane::Trap;
use crate::sad::Entry;
use crate::selector::{Flow, TrafficSelector, narrow};

/// Installed pairs and traps. A copy is cheap, and so is a change to it.
#[derive(Clone)]
pub(crate) struct Tables {
    pub(crate) by_spi: HashTrieMapSync<u32, Arc<Entry>>,
    by_reqid: RedBlackTreeMapSync<(u32, u64), Arc<Entry>>,
    /// How many pairs send to an outer address.
    outer: HashTrieMapSync<IpAddr, usize>,
    /// By outer address: the classes of pairs in transport mode that go there in UDP, and how many pairs each has.
    natted: HashTrieMapSync<IpAddr, RedBlackTreeMapSync<ClassId, usize>>,
    policies: Networks<Arc<Entry>>,
    traps: HashTrieMapSync<u32, Arc<TrapState>>,
    trap_policies: Networks<Arc<TrapState>>,
}

impl Default for Tables {
    fn default() -> Self {
        Self {
            by_spi: HashTrieMapSync::new_sync(),
            by_reqid: RedBlackTreeMapSync::new_sync(),
            outer: HashTrieMapSync::new_sync(),
            natted: HashTrieMapSync::new_sync(),
            policies: Networks::default(),
            traps: HashTrieMapSync::new_sync(),
            trap_policies: Networks::default(),
        }
    }
}

/// Where an outbound packet goes.
pub(crate) enum Selected<'a> {
    Pair(&'a Arc<Entry>),
    Trap(&'a TrapState),
}

impl Tables {
    /// Adds a pair.
    pub(crate) fn insert(&mut self, entry: &Arc<Entry>) {
        self.by_spi.insert_mut(entry.sa.spi_in, Arc::clone(entry));
        self.by_reqid.insert_mut((entry.sa.reqid, entry.order), Arc::clone(entry));
        let remote = entry.encapsulation.remote();
        let others = self.outer.get(&remote).copied().unwrap_or(0);
        self.outer.insert_mut(remote, others + 1);
        if entry.may_share_its_address() {
            let mut classes = self.natted.get(&remote).cloned().unwrap_or_else(RedBlackTreeMapSync::new_sync);
            let others = classes.get(&entry.sa.class).copied().unwrap_or(0);
            classes.insert_mut(entry.sa.class, others + 1);
            self.natted.insert_mut(remote, classes);
        }
        self.policies.insert(entry);
    }

    /// Removes a pair.
    pub(crate) fn remove(&mut self, entry: &Arc<Entry>) {
        self.by_spi.remove_mut(&entry.sa.spi_in);
        self.by_reqid.remove_mut(&(entry.sa.reqid, entry.order));
        let remote = entry.encapsulation.remote();
        match self.outer.get(&remote).copied() {
            Some(count) if count > 1 => self.outer.insert_mut(remote, count - 1),
            _ => {
                self.outer.remove_mut(&remote);
            }
        }
        if entry.may_share_its_address()
            && let Some(mut classes) = self.natted.get(&remote).cloned()
        {
            match classes.get(&entry.sa.class).copied() {
                Some(count) if count > 1 => classes.insert_mut(entry.sa.class, count - 1),
                _ => {
                    classes.remove_mut(&entry.sa.class);
                }
            }
            if classes.is_empty() {
                self.natted.remove_mut(&remote);
            } else {
                self.natted.insert_mut(remote, classes);
            }
        }
        self.policies.remove(entry);
    }

    /// True when a class has pairs in transport mode and UDP to an outer address.
    pub(crate) fn is_behind(&self, remote: IpAddr, class: ClassId) -> bool {
        self.natted.get(&remote).is_some_and(|classes| classes.contains_key(&class))
    }

    /// True when several classes have such pairs: several peers behind one NAT.
    pub(crate) fn is_shared(&self, remote: IpAddr) -> bool {
        self.natted.get(&remote).is_some_and(|classes| classes.size() > 1)
    }

    /// As [`Self::select`], for the pairs of one class.
    pub(crate) fn select_of_class(&self, flow: &Flow, shows_ports: bool, class: ClassId) -> Option<&Arc<Entry>> {
        let of_class = |entry: &Arc<Entry>| entry.sa.class == class;
        self.policies.select_where(flow, shows_ports, of_class).map(|(_, entry)| entry)
    }

    /// Adds a trap; false when its `reqid` is taken.
    pub(crate) fn insert_trap(&mut self, state: &Arc<TrapState>) -> bool {
        let reqid = state.trap.reqid;
        if self.traps.contains_key(&reqid) {
            return false;
        }
        self.traps.insert_mut(reqid, Arc::clone(state));
        self.trap_policies.insert(state);
        true
    }

    /// Removes a trap; false when there is none.
    pub(crate) fn remove_trap(&mut self, reqid: u32) -> bool {
        let Some(state) = self.traps.get(&reqid).cloned() else { return false };
        self.trap_policies.remove(&state);
        self.traps.remove_mut(&reqid)
    }

    /// The pairs of a `reqid`, oldest first.
    pub(crate) fn of_reqid(&self, reqid: u32) -> impl Iterator<Item = &Arc<Entry>> {
        let all: RangeInclusive<(u32, u64)> = (reqid, 0)..=(reqid, u64::MAX);
        self.by_reqid.range(all).map(|(_, entry)| entry)
    }

    /// `gone` stops sending: its successors need not wait any longer, unless another pair with the same selectors
    /// still sends. After a rekey by both sides (RFC 7296 §2.8.1) the redundant pair goes while the replaced one is
    /// there, and the survivor's peer may not know the survivor yet.
    pub(crate) fn succeed(&self, gone: &Entry) {
        let same = |entry: &Entry| entry.sa.local_ts == gone.sa.local_ts && entry.sa.remote_ts == gone.sa.remote_ts;
        let sends = |entry: &Entry| entry.sa.sends() && !entry.sa.is_dead();
        let others = || self.of_reqid(gone.sa.reqid).filter(|entry| entry.sa.spi_in != gone.sa.spi_in);
        if others().any(|entry| same(entry) && sends(entry)) {
            return;
        }
        for entry in others() {
            entry.sa.waits.store(false, Ordering::Relaxed);
        }
    }

    /// True when packets of some pair go to this outer address.
    pub(crate) fn sends_to(&self, remote: IpAddr) -> bool {
        self.outer.contains_key(&remote)
    }

    /// The pair that an outbound packet goes into, those that do not send passed over; or the trap that it falls into.
    pub(crate) fn select(&self, flow: &Flow, shows_ports: bool) -> Option<Selected<'_>> {
        let pair = self.policies.select(flow, shows_ports);
        let trap = self.trap_policies.select(flow, shows_ports);
        match (pair, trap) {
            (Some((rank, _)), Some((narrower, state))) if narrower.is_narrower_than(rank) => {
                Some(Selected::Trap(state))
            }
            (Some((_, entry)), _) => Some(Selected::Pair(entry)),
            (None, trap) => trap.map(|(_, state)| Selected::Trap(state)),
        }
    }
}

impl Selects for Arc<Entry> {
    fn order(&self) -> u64 {
        self.order
    }

    fn local_ts(&self) -> &[TrafficSelector] {
        &self.sa.local_ts
    }

    fn remote_ts(&self) -> &[TrafficSelector] {
        &self.sa.remote_ts
    }

    fn takes(&self, flow: &Flow, shows_ports: bool) -> bool {
        self.sa.sends() && self.sa.selects(flow, shows_ports)
    }
}

/// A trap, and when it was last reported.
pub(crate) struct TrapState {
    pub(crate) trap: Trap,
    /// The data path's tick; 0 before the first.
    pub(crate) reported: AtomicU64,
    order: u64,
}

impl TrapState {
    /// Selectors within others go, as they do from an SA's in its negotiation: they would make the trap look more specific
    /// than its SA.
    pub(crate) fn new(mut trap: Trap, order: u64) -> Self {
        trap.local_ts = narrow(&trap.local_ts, &trap.local_ts).selectors;
        trap.remote_ts = narrow(&trap.remote_ts, &trap.remote_ts).selectors;
        Self { trap, reported: AtomicU64::new(0), order }
    }
}

impl Selects for Arc<TrapState> {
    fn order(&self) -> u64 {
        self.order
    }

    fn local_ts(&self) -> &[TrafficSelector] {
        &self.trap.local_ts
    }

    fn remote_ts(&self) -> &[TrafficSelector] {
        &self.trap.remote_ts
    }

    fn takes(&self, flow: &Flow, shows_ports: bool) -> bool {
        let selects = |local: &TrafficSelector| local.selects(flow.protocol, flow.local, flow.local_port, shows_ports);
        self.trap.local_ts.iter().any(selects)
    }
}

#[cfg(test)]
mod tests;
