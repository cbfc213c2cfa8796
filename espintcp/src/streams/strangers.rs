//! The streams that nobody vouched for yet: so many of one address, so many in all. Where all are too many, the newest
//! takes the place of the oldest of whoever has the most, so that a flood does not keep others out.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex};

use tokio::sync::Notify;

use super::lock;

pub(super) struct Strangers {
    max_total: usize,
    max_per_address: usize,
    total: usize,
    next: u64,
    /// Of each source, from the oldest.
    by_address: HashMap<IpAddr, BTreeMap<u64, Arc<Notify>>>,
}

impl Strangers {
    pub(super) fn new(max_total: usize, max_per_address: usize) -> Self {
        Self { max_total, max_per_address, total: 0, next: 0, by_address: HashMap::new() }
    }

    pub(super) fn total(&self) -> usize {
        self.total
    }

    /// Ends the oldest of the source that has the most; among equals, of that whose oldest is oldest.
    fn evict(&mut self) {
        let most = self.by_address.iter().max_by_key(|(_, slots)| {
            let oldest = slots.first_key_value().map_or(u64::MAX, |(number, _)| *number);
            (slots.len(), std::cmp::Reverse(oldest))
        });
        let Some(source) = most.map(|(source, _)| *source) else { return };
        let oldest = self.by_address.get(&source).and_then(|slots| slots.first_key_value());
        if let Some((number, evicted)) = oldest.map(|(number, evicted)| (*number, evicted.clone())) {
            evicted.notify_one();
            self.leave(source, number);
        }
    }

    /// Does nothing for one that has been evicted.
    fn leave(&mut self, source: IpAddr, number: u64) {
        let Some(slots) = self.by_address.get_mut(&source) else { return };
        if slots.remove(&number).is_some() {
            self.total = self.total.saturating_sub(1);
        }
        if slots.is_empty() {
            self.by_address.remove(&source);
        }
    }
}

/// One stranger's place; dropping it gives the place back.
pub(super) struct StrangerSlot {
    strangers: Arc<Mutex<Strangers>>,
    source: IpAddr,
    number: u64,
    evicted: Arc<Notify>,
}

impl StrangerSlot {
    /// `None` when there are too many of this address, or no strangers may come at all.
    pub(super) fn take(strangers: &Arc<Mutex<Strangers>>, address: IpAddr) -> Option<Self> {
        let source = source(address);
        let mut counts = lock(strangers);
        let of_source = counts.by_address.get(&source).map_or(0, BTreeMap::len);
        if of_source >= counts.max_per_address || counts.max_total == 0 {
            return None;
        }
        if counts.total >= counts.max_total {
            counts.evict();
        }
        let (number, evicted) = (counts.next, Arc::new(Notify::new()));
        counts.next += 1;
        counts.total += 1;
        counts.by_address.entry(source).or_default().insert(number, evicted.clone());
        Some(Self { strangers: strangers.clone(), source, number, evicted })
    }

    /// Told once when another takes its place.
    pub(super) fn evicted(&self) -> Arc<Notify> {
        self.evicted.clone()
    }
}

impl Drop for StrangerSlot {
    fn drop(&mut self) {
        lock(&self.strangers).leave(self.source, self.number);
    }
}

/// What counts as one address: any host can have a whole IPv6 /64.
fn source(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => IpAddr::V4(address),
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_ipv6_network_is_one_source_and_places_come_back() {
        let strangers = Arc::new(Mutex::new(Strangers::new(3, 2)));
        let take = |address: &str| StrangerSlot::take(&strangers, address.parse().unwrap());

        let first = take("2001:db8::1").unwrap();
        let _second = take("2001:db8::2").unwrap();
        assert!(take("2001:db8::3").is_none(), "same /64");
        let _other = take("2001:db8:0:1::1").unwrap();

        drop(first);
        let mapped = take("::ffff:192.0.2.1").unwrap();
        assert_eq!(mapped.source, "192.0.2.1".parse::<IpAddr>().unwrap());
        assert_eq!(lock(&strangers).total(), 3);
        drop((mapped, _second, _other));
        assert_eq!(lock(&strangers).total(), 0);
        assert!(lock(&strangers).by_address.is_empty(), "nothing is kept for those who left");
    }

    #[tokio::test]
    async fn a_newcomer_takes_the_place_of_the_oldest_of_whoever_has_the_most() {
        let strangers = Arc::new(Mutex::new(Strangers::new(4, 3)));
        let take = |address: &str| StrangerSlot::take(&strangers, address.parse().unwrap()).unwrap();
        let alone = take("192.0.2.1");
        let greedy: Vec<StrangerSlot> = (0..3).map(|_| take("192.0.2.2")).collect();

        let newcomer = take("192.0.2.3");
        greedy[0].evicted().notified().await;
        assert_eq!(lock(&strangers).total(), 4);
        let another = take("192.0.2.4");
        greedy[1].evicted().notified().await;
        // Now all have one, and the oldest goes.
        let last = take("192.0.2.5");
        alone.evicted().notified().await;
        assert_eq!(lock(&strangers).total(), 4);
        drop((alone, greedy, newcomer, another, last));
        assert_eq!(lock(&strangers).total(), 0);
        assert!(lock(&strangers).by_address.is_empty());
    }
}
