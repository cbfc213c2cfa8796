//! Where latches are: which of them are to the addresses of an SA, without a look at the others.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipsec::guard::ClassId;
use ipsec::selector::TrafficSelector;

use super::LatchId;

/// Latches by class and remote address.
#[derive(Default)]
pub(super) struct Places {
    latches: BTreeSet<(ClassId, IpAddr, LatchId)>,
    /// How many latches of a class there are to an address.
    at: BTreeMap<(IpAddr, ClassId), usize>,
    /// How many there are of a class.
    classes: BTreeMap<ClassId, usize>,
}

impl Places {
    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.latches.is_empty() && self.at.is_empty() && self.classes.is_empty()
    }

    pub(super) fn insert(&mut self, class: ClassId, remote: IpAddr, latch: LatchId) {
        if self.latches.insert((class, remote, latch)) {
            *self.at.entry((remote, class)).or_default() += 1;
            *self.classes.entry(class).or_default() += 1;
        }
    }

    pub(super) fn remove(&mut self, class: ClassId, remote: IpAddr, latch: LatchId) {
        if self.latches.remove(&(class, remote, latch)) {
            take_one(&mut self.at, &(remote, class));
            take_one(&mut self.classes, &class);
        }
    }

    /// Those of one class.
    pub(super) fn of(&self, class: ClassId) -> impl Iterator<Item = LatchId> + use<'_> {
        self.between(class, (IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::from_bits(u128::MAX))))
    }

    /// Those to the addresses of the selectors, of the classes of which `concerned` is true, in the order of their numbers.
    ///
    /// Goes by the addresses or by the classes, whichever there are fewer of: one peer may have latches to very many addresses, and
    /// very many peers may have them to one network.
    pub(super) fn within(&self, remote_ts: &[TrafficSelector], concerned: impl Fn(ClassId) -> bool) -> Vec<LatchId> {
        let ranges: Vec<_> =
            remote_ts.iter().map(|ts| (ts.start, ts.end)).filter(|(start, end)| start <= end).collect();
        let there = |(start, end): (IpAddr, IpAddr)| {
            self.at.range((start, ClassId(0))..=(end, ClassId(u32::MAX))).map(|(place, _)| *place)
        };
        let few = self.classes.len();
        let places: Vec<_> = ranges.iter().copied().flat_map(there).take(few + 1).collect();
        let mut found: Vec<LatchId> = if places.len() <= few {
            let mut asked = HashMap::new();
            let places =
                places.into_iter().filter(|(_, class)| *asked.entry(*class).or_insert_with(|| concerned(*class)));
            places.flat_map(|(remote, class)| self.between(class, (remote, remote))).collect()
        } else {
            let classes = self.classes.keys().filter(|class| concerned(**class));
            classes.flat_map(|class| ranges.iter().flat_map(|range| self.between(*class, *range))).collect()
        };
        found.sort_unstable();
        // Selectors may overlap.
        found.dedup();
        found
    }

    fn between(&self, class: ClassId, (first, last): (IpAddr, IpAddr)) -> impl Iterator<Item = LatchId> + use<'_> {
        self.latches.range((class, first, LatchId(0))..=(class, last, LatchId(u64::MAX))).map(|(_, _, latch)| *latch)
    }
}

/// One fewer; none is no entry.
pub(super) fn take_one<K: Ord>(counts: &mut BTreeMap<K, usize>, key: &K) {
    match counts.get_mut(key) {
        Some(count) if *count > 1 => *count -= 1,
        _ => {
            counts.remove(key);
        }
    }
}
