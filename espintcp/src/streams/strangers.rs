//! How many streams nobody vouched for yet, in total and per address.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex};

use super::lock;

pub(super) struct Strangers {
    max_total: usize,
    max_per_address: usize,
    total: usize,
    by_address: HashMap<IpAddr, usize>,
}

impl Strangers {
    pub(super) fn new(max_total: usize, max_per_address: usize) -> Self {
        Self { max_total, max_per_address, total: 0, by_address: HashMap::new() }
    }

    pub(super) fn total(&self) -> usize {
        self.total
    }
}

/// One stranger's place; dropping it gives the place back.
pub(super) struct StrangerSlot {
    strangers: Arc<Mutex<Strangers>>,
    source: IpAddr,
}

impl StrangerSlot {
    /// `None` when there are too many strangers.
    pub(super) fn take(strangers: &Arc<Mutex<Strangers>>, address: IpAddr) -> Option<Self> {
        let source = source(address);
        let mut counts = lock(strangers);
        let of_source = counts.by_address.get(&source).copied().unwrap_or(0);
        if counts.total >= counts.max_total || of_source >= counts.max_per_address {
            return None;
        }
        counts.total += 1;
        counts.by_address.insert(source, of_source + 1);
        Some(Self { strangers: strangers.clone(), source })
    }
}

impl Drop for StrangerSlot {
    fn drop(&mut self) {
        let mut counts = lock(&self.strangers);
        counts.total = counts.total.saturating_sub(1);
        if let Some(count) = counts.by_address.get_mut(&self.source) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                counts.by_address.remove(&self.source);
            }
        }
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
        assert!(take("192.0.2.1").is_none(), "total");

        drop(first);
        let mapped = take("::ffff:192.0.2.1").unwrap();
        assert_eq!(mapped.source, "192.0.2.1".parse::<IpAddr>().unwrap());
        assert_eq!(lock(&strangers).total(), 3);
        drop((mapped, _second, _other));
        assert_eq!(lock(&strangers).total(), 0);
        assert!(lock(&strangers).by_address.is_empty(), "nothing is kept for those who left");
    }
}
