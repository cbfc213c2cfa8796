//! What the packet path reads: a number for each latched flow.
//!
//! One look-up reads one cache line in most cases and writes nothing, so that threads do not take lines from each other. There
//! is one writer at a time (the database's control mutex), and any number of readers, who begin anew if something was written
//! meanwhile (`epoch` is odd during a change).
//!
//! A flow is known by a keyed number of 64 bits. Two flows with the same number would be mistaken for each other, so the second
//! of them is not taken ([`FlowTable::insert`]). What is not in the table and has the number of what is (one packet in 2^64 by the
//! number of latches) is checked as if it were latched: it may be dropped, never passed.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::net::IpAddr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering, fence};

use ipsec::selector::Flow;

/// The table.
pub(super) struct FlowTable {
    epoch: AtomicU64,
    /// Which of `levels` is read.
    level: AtomicUsize,
    len: AtomicUsize,
    keys: [u64; 4],
    /// Each four times as large as the one before; once made, it stays.
    levels: [OnceLock<Box<[Bucket]>>; LEVELS],
}

/// The table has another flow of the same number.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Taken;

/// A cache line.
#[derive(Default)]
#[repr(align(64))]
struct Bucket([Entry; WIDTH]);

/// Number of a flow (0 is none) and what it is pinned to.
#[derive(Default)]
struct Entry {
    flow: AtomicU64,
    pin: AtomicU64,
}

/// Marks beside what a flow is pinned to; the highest bit and those below bit 40 are the caller's.
pub(super) const MARKS: u64 = TRACKED | SEEN | ENDING | AUTOMATIC;
/// A packet came, whatever became of it. Of tracked flows only.
pub(super) const SEEN: u64 = 1 << 41;
/// The caller's.
pub(super) const ENDING: u64 = 1 << 42;
/// The caller's, of [`FlowTable::track`].
pub(super) const AUTOMATIC: u64 = 1 << 43;
const TRACKED: u64 = 1 << 40;

const WIDTH: usize = 4;
const FIRST: usize = 16;
/// The last has room for 167 million flows.
const LEVELS: usize = 12;
/// A level is too full when this many flows come to a bucket.
const FULL: usize = 2;
/// A reader that has begun anew so often lets the writer have the processor.
const PATIENCE: u32 = 64;

impl Default for FlowTable {
    fn default() -> Self {
        // The standard library's keys are random for each.
        let keys = std::array::from_fn(|n| RandomState::new().hash_one(n));
        Self::keyed(keys)
    }
}

impl FlowTable {
    fn keyed(keys: [u64; 4]) -> Self {
        let (epoch, level, len) = (AtomicU64::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
        Self { epoch, level, len, keys, levels: std::array::from_fn(|_| OnceLock::new()) }
    }

    /// How many flows it has.
    pub(super) fn len(&self) -> usize {
        self.len.load(Ordering::Relaxed)
    }

    /// What a flow is pinned to.
    pub(super) fn get(&self, flow: &Flow) -> Option<u64> {
        let number = self.number(flow);
        let mut tries = 0_u32;
        loop {
            let epoch = self.epoch.load(Ordering::Acquire);
            if epoch & 1 == 0 {
                let found = self.buckets().and_then(|buckets| find(buckets, number));
                fence(Ordering::Acquire);
                if self.epoch.load(Ordering::Relaxed) == epoch {
                    let (entry, pin) = found?;
                    // Once between two looks. Should the entry have become another flow's, that one is tended a little longer.
                    if pin & (TRACKED | SEEN) == TRACKED {
                        entry.pin.fetch_or(SEEN, Ordering::Relaxed);
                    }
                    return Some(pin);
                }
            }
            tries = tries.wrapping_add(1);
            if tries.is_multiple_of(PATIENCE) {
                std::thread::yield_now();
            }
            std::hint::spin_loop();
        }
    }

    /// Adds a flow that it does not have. For the writer.
    pub(super) fn insert(&self, flow: &Flow, pin: u64) -> Result<(), Taken> {
        let number = self.number(flow);
        if self.buckets().is_some_and(|buckets| find(buckets, number).is_some()) {
            return Err(Taken);
        }
        let len = self.len();
        self.make_room(len + 1);
        let Some(buckets) = self.buckets() else { return Err(Taken) };
        self.change(|| put(buckets, number, pin)).then_some(()).ok_or(Taken)?;
        self.len.store(len + 1, Ordering::Relaxed);
        Ok(())
    }

    /// From now on packets of a flow that it has leave a mark; it has these already. For the writer.
    pub(super) fn track(&self, flow: &Flow, marks: u64) {
        if let Some((entry, _)) = self.entry(flow) {
            entry.pin.fetch_or(TRACKED | SEEN | marks, Ordering::Relaxed);
        }
    }

    /// Marks a flow if it has it and it is tracked. Anybody may; a mark may get lost when something is written meanwhile.
    pub(super) fn mark(&self, flow: &Flow, mark: u64) {
        if let Some((entry, pin)) = self.entry(flow)
            && pin & (TRACKED | mark) == TRACKED
        {
            entry.pin.fetch_or(mark, Ordering::Relaxed);
        }
    }

    /// The marks of a flow, which it has no more. For the writer.
    pub(super) fn take_marks(&self, flow: &Flow) -> u64 {
        self.entry(flow).map_or(0, |(entry, _)| entry.pin.fetch_and(!(SEEN | ENDING), Ordering::Relaxed) & MARKS)
    }

    fn entry(&self, flow: &Flow) -> Option<(&Entry, u64)> {
        find(self.buckets()?, self.number(flow))
    }

    /// Pins a flow that it has to something else; its marks stay. For the writer.
    pub(super) fn update(&self, flow: &Flow, pin: u64) {
        if let Some((entry, before)) = self.entry(flow) {
            self.change(|| entry.pin.store(pin | before & MARKS, Ordering::Relaxed));
        }
    }

    /// For the writer.
    pub(super) fn remove(&self, flow: &Flow) {
        let number = self.number(flow);
        if self.buckets().is_some_and(|buckets| self.change(|| take(buckets, number))) {
            self.len.store(self.len().saturating_sub(1), Ordering::Relaxed);
        }
    }

    /// Moves all to a larger level, before one more comes than this one has room for. Readers look at the old one until the new
    /// one is whole.
    fn make_room(&self, len: usize) {
        let level = self.level.load(Ordering::Relaxed);
        let old = self.buckets();
        if old.is_some_and(|old| len <= old.len() * FULL) {
            return;
        }
        let next = if old.is_some() { level + 1 } else { level };
        let Some(slot) = self.levels.get(next) else { return };
        let buckets: &[Bucket] = slot.get_or_init(|| (0..FIRST << (2 * next)).map(|_| Bucket::default()).collect());
        for entry in old.into_iter().flatten().flat_map(|bucket| &bucket.0) {
            let number = entry.flow.load(Ordering::Relaxed);
            if number != 0 {
                put(buckets, number, entry.pin.load(Ordering::Relaxed));
            }
        }
        self.change(|| self.level.store(next, Ordering::Relaxed));
    }

    /// Readers who are at it begin anew.
    fn change<T>(&self, change: impl FnOnce() -> T) -> T {
        let epoch = self.epoch.load(Ordering::Relaxed);
        self.epoch.store(epoch.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        let changed = change();
        self.epoch.store(epoch.wrapping_add(2), Ordering::Release);
        changed
    }

    fn buckets(&self) -> Option<&[Bucket]> {
        self.levels.get(self.level.load(Ordering::Relaxed))?.get().map(AsRef::as_ref)
    }

    /// Never 0.
    fn number(&self, flow: &Flow) -> u64 {
        let [one, two, three, four] = self.keys;
        let (local, remote) = (halves(flow.local), halves(flow.remote));
        let rest = u64::from(flow.local_port)
            | u64::from(flow.remote_port) << 16
            | u64::from(flow.protocol) << 32
            | u64::from(flow.local.is_ipv6()) << 40;
        let first = fold(local.0 ^ one, local.1 ^ two);
        let second = fold(remote.0 ^ three, remote.1 ^ four);
        fold(fold(first ^ three, second ^ one) ^ rest ^ two, four).max(1)
    }
}

fn find(buckets: &[Bucket], number: u64) -> Option<(&Entry, u64)> {
    for bucket in from(buckets, number) {
        let mut is_full = true;
        for entry in &bucket.0 {
            match entry.flow.load(Ordering::Relaxed) {
                0 => is_full = false,
                flow if flow == number => return Some((entry, entry.pin.load(Ordering::Relaxed))),
                _ => {}
            }
        }
        // What found its own full went on to the next one.
        if !is_full {
            return None;
        }
    }
    None
}

fn put(buckets: &[Bucket], number: u64, pin: u64) -> bool {
    let mut entries = from(buckets, number).flat_map(|bucket| &bucket.0);
    let Some(free) = entries.find(|entry| entry.flow.load(Ordering::Relaxed) == 0) else { return false };
    free.pin.store(pin, Ordering::Relaxed);
    free.flow.store(number, Ordering::Relaxed);
    true
}

/// Takes an entry out, and brings nearer what had to go past it.
fn take(buckets: &[Bucket], number: u64) -> bool {
    let Some((mut gap, _)) = find(buckets, number) else { return false };
    let home_of = home(buckets, number);
    let has_gap = |bucket: &Bucket| bucket.0.iter().any(|entry| std::ptr::eq(entry, gap));
    let Some(beyond) = from(buckets, number).position(has_gap) else { return false };
    let mut at = (home_of + beyond) % buckets.len();
    let mut behind = at;
    gap.flow.store(0, Ordering::Relaxed);
    let is_full = |place: usize, gap: &Entry| {
        buckets.get(place).is_some_and(|bucket| {
            bucket.0.iter().all(|entry| std::ptr::eq(entry, gap) || entry.flow.load(Ordering::Relaxed) != 0)
        })
    };
    while is_full(behind, gap) {
        behind = (behind + 1) % buckets.len();
        if behind == at {
            break;
        }
        let distance = |from: usize, to: usize| (to + buckets.len() - from) % buckets.len();
        let moved = buckets.get(behind).and_then(|bucket| {
            bucket.0.iter().find(|entry| {
                let number = entry.flow.load(Ordering::Relaxed);
                let home = home(buckets, number);
                number != 0 && distance(home, behind) >= distance(at, behind)
            })
        });
        if let Some(entry) = moved {
            gap.pin.store(entry.pin.load(Ordering::Relaxed), Ordering::Relaxed);
            gap.flow.store(entry.flow.load(Ordering::Relaxed), Ordering::Relaxed);
            entry.flow.store(0, Ordering::Relaxed);
            (gap, at) = (entry, behind);
        }
    }
    true
}

/// All buckets, from where a flow belongs.
fn from(buckets: &[Bucket], number: u64) -> impl Iterator<Item = &Bucket> {
    let (before, after) = buckets.split_at(home(buckets, number));
    after.iter().chain(before)
}

/// There are as many buckets as a power of two.
fn home(buckets: &[Bucket], number: u64) -> usize {
    let mask = buckets.len().saturating_sub(1);
    usize::try_from(number >> 20).unwrap_or_default() & mask
}

fn halves(address: IpAddr) -> (u64, u64) {
    let bits = match address {
        IpAddr::V4(address) => u128::from(address.to_bits()),
        IpAddr::V6(address) => address.to_bits(),
    };
    (upper(bits), lower(bits))
}

fn upper(bits: u128) -> u64 {
    lower(bits >> 64)
}

#[allow(clippy::cast_possible_truncation, reason = "the lower half is what is wanted")]
fn lower(bits: u128) -> u64 {
    bits as u64
}

/// Both halves of the product: each bit of the result depends on all of both.
fn fold(one: u64, other: u64) -> u64 {
    let product = u128::from(one) * u128::from(other);
    upper(product) ^ lower(product)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::collections::HashMap;
    use std::net::Ipv4Addr;
    use std::sync::atomic::AtomicBool;

    use proptest::prelude::*;

    use super::*;

    fn flow(n: u32) -> Flow {
        let port = u16::try_from(n % 50_000).unwrap();
        Flow {
            protocol: 6,
            local: IpAddr::V4(Ipv4Addr::LOCALHOST),
            local_port: port,
            remote: IpAddr::V4(Ipv4Addr::from(n / 50_000)),
            remote_port: 443,
        }
    }

    #[test]
    fn one_flow_is_not_another() {
        let table = FlowTable::default();
        table.insert(&flow(1), 7).unwrap();
        assert_eq!(table.insert(&flow(1), 8), Err(Taken));
        let same = flow(1);
        let others = [
            Flow { protocol: 17, ..same },
            Flow { local_port: 443, remote_port: same.local_port, ..same },
            Flow { local: same.remote, remote: same.local, ..same },
            Flow { remote: "::".parse().unwrap(), local: "::7f00:1".parse().unwrap(), ..same },
            Flow { remote_port: 444, ..same },
        ];
        for other in others {
            assert_eq!(table.get(&other), None, "{other}");
        }
        assert_eq!((table.get(&same), table.len()), (Some(7), 1));
    }

    #[test]
    fn it_grows_and_keeps_all() {
        let table = FlowTable::default();
        for n in 0..20_000 {
            table.insert(&flow(n), u64::from(n)).unwrap();
        }
        assert!((0..20_000).all(|n| table.get(&flow(n)) == Some(u64::from(n))));
        assert!((20_000..40_000).all(|n| table.get(&flow(n)).is_none()));
        (0..20_000).filter(|n| n % 3 != 0).for_each(|n| table.remove(&flow(n)));
        assert!((0..20_000).all(|n| table.get(&flow(n)).is_some() == (n % 3 == 0)));
        assert_eq!(table.len(), 6667);
    }

    // What a look-up costs with many flows is the cache lines that it reads.
    #[test]
    fn a_look_up_reads_little_more_than_one_line_however_full() {
        let table = FlowTable::keyed([
            0x9e37_79b9_7f4a_7c15,
            0xbf58_476d_1ce4_e5b9,
            0x94d0_49bb_1331_11eb,
            0x2545_f491_4f6c_dd1d,
        ]);
        let fullest = u32::try_from((FIRST << 10) * FULL).unwrap();
        (0..fullest).for_each(|n| table.insert(&flow(n), 0).unwrap());
        let buckets = table.buckets().unwrap();
        assert_eq!(buckets.len() * FULL, table.len());
        let read = |n: u32| {
            let number = table.number(&flow(n));
            let entry = find(buckets, number);
            let ends = |bucket: &Bucket| {
                let entries = || bucket.0.iter();
                entries().any(|one| one.flow.load(Ordering::Relaxed) == 0)
                    || entry.is_some_and(|(found, _)| entries().any(|one| std::ptr::eq(one, found)))
            };
            from(buckets, number).position(ends).unwrap() + 1
        };
        let lines =
            |flows: std::ops::Range<u32>| flows.map(read).sum::<usize>() * 100 / usize::try_from(fullest).unwrap();
        let (latched, unlatched) = (lines(0..fullest), lines(fullest..2 * fullest));
        assert!(latched <= 120 && unlatched <= 140, "of 100 look-ups: {latched}, {unlatched}");
    }

    proptest! {
        // Buckets run over here: many flows come to few.
        #[test]
        fn it_agrees_with_a_map(steps in proptest::collection::vec((0_u8..4, 0_u32..60, 0_u64..9), 1..400)) {
            let table = FlowTable::default();
            let mut map: HashMap<Flow, u64> = HashMap::new();
            let buckets: Box<[Bucket]> = (0..FIRST).map(|_| Bucket::default()).collect();
            table.levels[0].set(buckets).ok();
            for (what, n, pin) in steps {
                let flow = flow(n);
                match what {
                    0 | 1 if !map.contains_key(&flow) => {
                        // Past what would make it grow.
                        let put = table.change(|| put(table.buckets().unwrap(), table.number(&flow), pin));
                        prop_assert!(put);
                        map.insert(flow, pin);
                    }
                    2 => {
                        table.update(&flow, pin);
                        map.entry(flow).and_modify(|there| *there = pin);
                    }
                    3 => {
                        table.remove(&flow);
                        map.remove(&flow);
                    }
                    _ => {}
                }
                for n in 0..60 {
                    prop_assert_eq!(table.get(&super::tests::flow(n)), map.get(&super::tests::flow(n)).copied());
                }
            }
        }
    }

    #[test]
    fn readers_never_miss_what_stays_while_others_come_and_go() {
        let table = FlowTable::default();
        (0..64).for_each(|n| table.insert(&flow(n), u64::from(n)).unwrap());
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let mut rounds = 0_u32;
                    while !done.load(Ordering::Relaxed) || rounds == 0 {
                        (0..64).for_each(|n| assert_eq!(table.get(&flow(n)), Some(u64::from(n))));
                        rounds += 1;
                    }
                });
            }
            for _ in 0..20 {
                (64..2000).for_each(|n| table.insert(&flow(n), 0).unwrap());
                (64..2000).for_each(|n| table.remove(&flow(n)));
            }
            done.store(true, Ordering::Relaxed);
        });
    }
}
