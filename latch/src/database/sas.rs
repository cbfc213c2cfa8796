//! The SAs that cover flows: which are for an address, or for some of the same addresses as another, without a look at all.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipsec::guard::ClassId;
use ipsec::selector::{Flow, TrafficSelector};

use super::places::take_one;

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct CoveringSa {
    pub(super) class: ClassId,
    pub(super) local_ts: Vec<TrafficSelector>,
    pub(super) remote_ts: Vec<TrafficSelector>,
}

/// All of them, by number.
#[derive(Default)]
pub(super) struct Sas {
    sas: BTreeMap<u64, CoveringSa>,
    /// By the smallest network around each of their remote selectors.
    by_subnet: BTreeMap<Subnet, BTreeSet<u64>>,
    /// The sizes of these networks, and how many there are of each.
    sizes: BTreeMap<(Family, u32), usize>,
    /// How many there are of a class.
    classes: BTreeMap<ClassId, usize>,
}

impl CoveringSa {
    pub(super) fn covers(&self, flow: &Flow) -> bool {
        covers(&self.local_ts, &self.remote_ts, flow)
    }
}

impl Sas {
    pub(super) fn insert(&mut self, number: u64, sa: CoveringSa) {
        self.remove(number);
        for subnet in sa.remote_ts.iter().filter_map(Subnet::around) {
            let there = self.by_subnet.entry(subnet).or_default();
            if there.is_empty() {
                *self.sizes.entry((subnet.family, subnet.host_bits)).or_default() += 1;
            }
            there.insert(number);
        }
        *self.classes.entry(sa.class).or_default() += 1;
        self.sas.insert(number, sa);
    }

    pub(super) fn remove(&mut self, number: u64) {
        let Some(sa) = self.sas.remove(&number) else { return };
        take_one(&mut self.classes, &sa.class);
        for subnet in sa.remote_ts.iter().filter_map(Subnet::around) {
            let Some(there) = self.by_subnet.get_mut(&subnet) else { continue };
            there.remove(&number);
            if there.is_empty() {
                self.by_subnet.remove(&subnet);
                take_one(&mut self.sizes, &(subnet.family, subnet.host_bits));
            }
        }
    }

    pub(super) fn get(&self, number: u64) -> Option<&CoveringSa> {
        self.sas.get(&number)
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &CoveringSa> {
        self.sas.values()
    }

    /// There is one of this class.
    pub(super) fn has(&self, class: ClassId) -> bool {
        self.classes.contains_key(&class)
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.sas.is_empty() && self.by_subnet.is_empty() && self.sizes.is_empty() && self.classes.is_empty()
    }

    /// Those that cover a flow; one with several subnets may come several times.
    pub(super) fn covering(&self, flow: &Flow) -> impl Iterator<Item = (u64, &CoveringSa)> {
        let (flow, (family, address)) = (*flow, number(flow.remote));
        let subnets =
            self.sizes_of(family).filter_map(move |bits| self.by_subnet.get(&Subnet::new(family, bits, address)));
        let sas = subnets.flatten().filter_map(|number| Some((*number, self.sas.get(number)?)));
        sas.filter(move |(_, sa)| sa.covers(&flow))
    }

    /// Those that could have an address of some of the selectors at each end; one may come several times.
    pub(super) fn meeting(
        &self,
        local_ts: &[TrafficSelector],
        remote_ts: &[TrafficSelector],
    ) -> impl Iterator<Item = (u64, &CoveringSa)> {
        let subnets = remote_ts.iter().filter_map(Subnet::range).flat_map(move |(family, first, last)| {
            let of_size = move |bits| Subnet::new(family, bits, first)..=Subnet::new(family, bits, last);
            self.sizes_of(family).flat_map(move |bits| self.by_subnet.range(of_size(bits)))
        });
        let sas = subnets.flat_map(|(_, there)| there).filter_map(|number| Some((*number, self.sas.get(number)?)));
        sas.filter(|(_, sa)| meet(&sa.remote_ts, remote_ts) && meet(&sa.local_ts, local_ts))
    }

    /// Those that select some of the same packets as one that is not there; one may come several times.
    pub(super) fn overlapping(&self, newcomer: &CoveringSa) -> impl Iterator<Item = (u64, &CoveringSa)> {
        let overlap = |some: &[TrafficSelector], others: &[TrafficSelector]| {
            some.iter().any(|one| others.iter().any(|other| one.intersect(other).is_some()))
        };
        let meeting = self.meeting(&newcomer.local_ts, &newcomer.remote_ts);
        meeting.filter(move |(_, sa)| {
            overlap(&sa.local_ts, &newcomer.local_ts) && overlap(&sa.remote_ts, &newcomer.remote_ts)
        })
    }

    fn sizes_of(&self, family: Family) -> impl Iterator<Item = u32> + use<'_> {
        self.sizes.range((family, 0)..=(family, u32::MAX)).map(|((_, host_bits), _)| *host_bits)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Family {
    V4,
    V6,
}

fn number(address: IpAddr) -> (Family, u128) {
    match address {
        IpAddr::V4(address) => (Family::V4, u128::from(address.to_bits())),
        IpAddr::V6(address) => (Family::V6, address.to_bits()),
    }
}

/// The addresses that have all but the last bits in common. In order, those of one size follow each other by their addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Subnet {
    family: Family,
    host_bits: u32,
    first: u128,
}

impl Subnet {
    fn new(family: Family, host_bits: u32, address: u128) -> Self {
        Self { family, host_bits, first: u128::MAX.checked_shl(host_bits).unwrap_or(0) & address }
    }

    /// The smallest one around a selector's addresses; `None` where it selects none.
    fn around(selector: &TrafficSelector) -> Option<Self> {
        let (family, start, end) = Self::range(selector)?;
        let host_bits = u128::BITS - (start ^ end).leading_zeros();
        Some(Self::new(family, host_bits, start))
    }

    fn range(selector: &TrafficSelector) -> Option<(Family, u128, u128)> {
        let ((family, start), (other, end)) = (number(selector.start), number(selector.end));
        (family == other && start <= end).then_some((family, start, end))
    }
}

pub(super) fn covers(local_ts: &[TrafficSelector], remote_ts: &[TrafficSelector], flow: &Flow) -> bool {
    local_ts.iter().any(|ts| ts.matches(flow.protocol, flow.local, flow.local_port))
        && remote_ts.iter().any(|ts| ts.matches(flow.protocol, flow.remote, flow.remote_port))
}

/// Some address is selected by both.
fn meet(one: &[TrafficSelector], other: &[TrafficSelector]) -> bool {
    one.iter().any(|one| other.iter().any(|other| one.start <= other.end && other.start <= one.end))
}
