//! Child SAs that nobody uses (`inactivity`).

use std::time::{Duration, Instant};

use ipsec::plane::Usage;

/// When a Child SA was last used, and how long it may be unused.
#[derive(Clone, Copy, Debug)]
pub(super) struct Idle {
    /// Zero is for ever.
    limit: Duration,
    last_used: Instant,
}

impl Idle {
    /// A Child SA that comes now; one that takes the place of another has been unused for as long as that.
    pub(super) fn new(now: Instant, limit: Duration, predecessor: Option<&mut Self>) -> Self {
        let last_used = predecessor.map_or(now, |old| {
            // What is replaced goes by itself.
            old.limit = Duration::ZERO;
            old.last_used
        });
        Self { limit, last_used }
    }

    /// When the time is over, unless it is used before; `None` when there is nothing to watch.
    pub(super) fn over_at(&self) -> Option<Instant> {
        (!self.limit.is_zero()).then(|| self.last_used.checked_add(self.limit)).flatten()
    }

    /// True when the time is over; asked again it is over again only after as much time.
    pub(super) fn is_over(&mut self, now: Instant, usage: &Usage) -> bool {
        let idle = usage.idle_in.into_iter().chain(usage.idle_out).min();
        let used = idle.and_then(|idle| now.checked_sub(idle)).unwrap_or(self.last_used);
        self.last_used = self.last_used.max(used);
        let over = self.over_at().is_some_and(|at| at <= now);
        if over {
            self.last_used = now;
        }
        over
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    fn used(idle_in: Option<u64>, idle_out: Option<u64>) -> Usage {
        let minutes = |n: u64| MINUTE * u32::try_from(n).unwrap_or(u32::MAX);
        Usage { idle_in: idle_in.map(minutes), idle_out: idle_out.map(minutes), ..Usage::default() }
    }

    #[test]
    fn a_child_is_over_after_its_time_without_traffic_either_way() {
        let start = Instant::now();
        let mut idle = Idle::new(start, 10 * MINUTE, None);
        assert_eq!(idle.over_at(), Some(start + 10 * MINUTE));
        assert!(!idle.is_over(start + 9 * MINUTE, &used(None, None)));
        assert!(idle.is_over(start + 10 * MINUTE, &used(None, None)), "never used");
        assert!(!idle.is_over(start + 11 * MINUTE, &used(None, None)), "said already");
        let mut idle = Idle::new(start, 10 * MINUTE, None);
        assert!(!idle.is_over(start + 15 * MINUTE, &used(Some(12), Some(9))));
        assert!(!idle.is_over(start + 15 * MINUTE, &used(Some(9), None)));
        assert!(idle.is_over(start + 16 * MINUTE, &used(Some(10), Some(11))));
        let mut unlimited = Idle::new(start, Duration::ZERO, None);
        assert!(unlimited.over_at().is_none() && !unlimited.is_over(start + 1000 * MINUTE, &used(None, None)));
    }

    #[test]
    fn a_rekey_is_no_use() {
        let start = Instant::now();
        let mut old = Idle::new(start, 10 * MINUTE, None);
        let mut new = Idle::new(start + 6 * MINUTE, 10 * MINUTE, Some(&mut old));
        assert_eq!(old.over_at(), None, "the old one goes by itself");
        assert!(new.is_over(start + 10 * MINUTE, &used(None, None)));
    }
}
