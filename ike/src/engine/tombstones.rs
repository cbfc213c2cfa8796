//! The last answers of IKE SAs that have ended, for a peer to which they were lost: bounded, and forgotten in time.

use std::collections::{BTreeMap, VecDeque};
use std::time::Instant;

/// IKE SAs of which that is kept.
const MOST: usize = 1024;

/// What an IKE SA has left.
pub(crate) struct Tombstone {
    /// Digest of the request that ended it.
    pub(crate) request: [u8; 32],
    /// Its answer.
    pub(crate) answer: Vec<Vec<u8>>,
    /// The code point of its messages.
    pub(crate) dscp: u8,
    /// When it is forgotten.
    pub(crate) until: Instant,
}

/// All of them, by our SPI.
#[derive(Default)]
pub(crate) struct Tombstones {
    by_spi: BTreeMap<u64, Tombstone>,
    /// In the order in which they came.
    order: VecDeque<u64>,
}

impl Tombstones {
    /// Takes a fresh one, with a look at those only that go for it: which are over, or the oldest where there are too many.
    pub(crate) fn insert(&mut self, now: Instant, spi: u64, tombstone: Tombstone) {
        self.expire(now);
        if self.by_spi.insert(spi, tombstone).is_none() {
            self.order.push_back(spi);
        }
        if self.order.len() > MOST {
            self.forget_oldest();
        }
    }

    /// What the IKE SA with this SPI has left.
    pub(crate) fn get(&self, now: Instant, spi: u64) -> Option<&Tombstone> {
        self.by_spi.get(&spi).filter(|tombstone| tombstone.until > now)
    }

    /// True while the SPI is not to be used again.
    pub(crate) fn contains(&self, spi: u64) -> bool {
        self.by_spi.contains_key(&spi)
    }

    /// Forgets those whose time is over.
    pub(crate) fn expire(&mut self, now: Instant) {
        let is_over = |tombstone: Option<&Tombstone>| tombstone.is_none_or(|tombstone| tombstone.until <= now);
        while self.order.front().is_some_and(|spi| is_over(self.by_spi.get(spi))) {
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        if let Some(oldest) = self.order.pop_front() {
            self.by_spi.remove(&oldest);
        }
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        assert_eq!(self.by_spi.len(), self.order.len());
        self.order.len()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn tombstone(until: Instant) -> Tombstone {
        Tombstone { request: [1; 32], answer: vec![vec![2]], dscp: 0, until }
    }

    #[test]
    fn the_oldest_go_where_there_are_too_many_and_all_in_time() {
        let now = Instant::now();
        let at = |seconds| now + Duration::from_secs(seconds);
        let mut tombstones = Tombstones::default();
        for spi in 1..=2 * MOST as u64 {
            tombstones.insert(now, spi, tombstone(at(30)));
            tombstones.insert(now, spi, tombstone(at(30)));
        }
        assert_eq!(tombstones.len(), MOST);
        assert!(!tombstones.contains(MOST as u64) && tombstones.contains(MOST as u64 + 1));
        assert!(tombstones.get(at(29), 2 * MOST as u64).is_some() && tombstones.get(at(30), 2 * MOST as u64).is_none());
        tombstones.insert(at(30), 1, tombstone(at(60)));
        assert_eq!(tombstones.len(), 1);
        tombstones.expire(at(60));
        assert_eq!(tombstones.len(), 0);
    }
}
