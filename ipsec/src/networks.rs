//! Policies by remote network, found by longest prefix: what a packet costs grows with the number of different prefix
//! lengths, not with the number of policies.
//!
//! The maps are persistent: a copy costs nothing, and a change to it only the path to what changes. So the data path
//! publishes a new table for each SA that comes or goes, and packets read without a lock.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use rpds::{HashTrieMapSync, RedBlackTreeMapSync};

use crate::selector::{Family, Flow, TrafficSelector, number};

/// How much a selector covers: addresses, any protocol, ports. Less is more specific.
pub(crate) type Width = (u128, bool, u16);

/// Order of look-up: the more specific remote selector first, then the more specific local ones, then the newest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Rank {
    remote: Width,
    /// The widest local selector.
    local: Option<Width>,
    order: Reverse<u64>,
    /// Which of its owner's remote selectors it is.
    index: usize,
}

impl Rank {
    /// True when it is more specific, by more than being newer.
    pub(crate) fn is_narrower_than(&self, other: &Self) -> bool {
        (self.remote, self.local) < (other.remote, other.local)
    }
}

/// What has selectors: an SA pair, or a trap.
pub(crate) trait Selects: Clone {
    /// Grows with each installation.
    fn order(&self) -> u64;
    /// Our side's selectors.
    fn local_ts(&self) -> &[TrafficSelector];
    /// The peer side's selectors.
    fn remote_ts(&self) -> &[TrafficSelector];
    /// True when it takes a packet now, one of the remote selectors having been found to fit.
    fn takes(&self, flow: &Flow, shows_ports: bool) -> bool;
}

/// Policies of one family by network.
#[derive(Clone)]
struct OneFamily<T> {
    /// By prefix length, counted in host bits so that the most specific comes first: how many policies, and
    /// the least remote width among all that were there since the length came into use.
    lengths: BTreeMap<u32, (usize, Width)>,
    /// By host bits and network.
    networks: HashTrieMapSync<(u32, u128), RedBlackTreeMapSync<Rank, (TrafficSelector, T)>>,
}

impl<T> Default for OneFamily<T> {
    fn default() -> Self {
        Self { lengths: BTreeMap::new(), networks: HashTrieMapSync::new_sync() }
    }
}

/// Policies by remote network.
#[derive(Clone)]
pub(crate) struct Networks<T> {
    v4: OneFamily<T>,
    v6: OneFamily<T>,
}

impl<T> Default for Networks<T> {
    fn default() -> Self {
        Self { v4: OneFamily::default(), v6: OneFamily::default() }
    }
}

impl<T: Selects> Networks<T> {
    /// Adds a policy, or replaces the one of the same order and selectors.
    pub(crate) fn insert(&mut self, policy: &T) {
        for (rank, remote) in ranked(policy) {
            let Some((family, key)) = self.place_mut(&remote) else { continue };
            let mut node = family.networks.get(&key).cloned().unwrap_or_else(RedBlackTreeMapSync::new_sync);
            let new = !node.contains_key(&rank);
            node.insert_mut(rank, (remote, policy.clone()));
            family.networks.insert_mut(key, node);
            let (count, least) = family.lengths.entry(key.0).or_insert((0, rank.remote));
            *count += usize::from(new);
            *least = (*least).min(rank.remote);
        }
    }

    /// Removes a policy.
    pub(crate) fn remove(&mut self, policy: &T) {
        for (rank, remote) in ranked(policy) {
            let Some((family, key)) = self.place_mut(&remote) else { continue };
            let Some(mut node) = family.networks.get(&key).cloned() else { continue };
            if !node.remove_mut(&rank) {
                continue;
            }
            if node.is_empty() {
                family.networks.remove_mut(&key);
            } else {
                family.networks.insert_mut(key, node);
            }
            if let Some((count, _)) = family.lengths.get_mut(&key.0) {
                *count -= 1;
                if *count == 0 {
                    family.lengths.remove(&key.0);
                }
            }
        }
    }

    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        let empty = |family: &OneFamily<T>| family.lengths.is_empty() && family.networks.is_empty();
        empty(&self.v4) && empty(&self.v6)
    }

    /// The policy that an outbound packet falls under.
    pub(crate) fn select(&self, flow: &Flow, shows_ports: bool) -> Option<(&Rank, &T)> {
        self.select_where(flow, shows_ports, |_| true)
    }

    /// As [`Self::select`], among some of the policies.
    pub(crate) fn select_where(
        &self,
        flow: &Flow,
        shows_ports: bool,
        counts: impl Fn(&T) -> bool,
    ) -> Option<(&Rank, &T)> {
        let (family, address) = number(flow.remote);
        let family = match family {
            Family::V4 => &self.v4,
            Family::V6 => &self.v6,
        };
        let mut best: Option<(&Rank, &T)> = None;
        for (host_bits, (_, least)) in &family.lengths {
            if best.is_some_and(|(rank, _)| rank.remote < *least) {
                continue;
            }
            let Some(node) = family.networks.get(&(*host_bits, network(address, *host_bits))) else { continue };
            let found = node.iter().find(|(_, (remote, policy))| {
                remote.selects(flow.protocol, flow.remote, flow.remote_port, shows_ports)
                    && counts(policy)
                    && policy.takes(flow, shows_ports)
            });
            if let Some((rank, (_, policy))) = found
                && best.is_none_or(|(other, _)| rank < other)
            {
                best = Some((rank, policy));
            }
        }
        best
    }

    /// The family and the smallest network around a remote selector; `None` for one that selects nothing.
    fn place_mut(&mut self, remote: &TrafficSelector) -> Option<(&mut OneFamily<T>, (u32, u128))> {
        let (family, start, end) = remote.range()?;
        let host_bits = 128 - (start ^ end).leading_zeros();
        let family = match family {
            Family::V4 => &mut self.v4,
            Family::V6 => &mut self.v6,
        };
        Some((family, (host_bits, network(start, host_bits))))
    }
}

/// A policy's remote selectors with their ranks.
fn ranked<T: Selects>(policy: &T) -> impl Iterator<Item = (Rank, TrafficSelector)> {
    let local = policy.local_ts().iter().map(TrafficSelector::width).max();
    let order = Reverse(policy.order());
    policy
        .remote_ts()
        .iter()
        .enumerate()
        .map(move |(index, remote)| (Rank { remote: remote.width(), local, order, index }, *remote))
}

/// The network of so many host bits that an address is in.
fn network(address: u128, host_bits: u32) -> u128 {
    u128::MAX.checked_shl(host_bits).unwrap_or(0) & address
}
