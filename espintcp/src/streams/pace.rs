//! How fast a stream takes octets, and how much may wait for it accordingly: what lies unsent in the system's buffer holds up
//! what comes behind it, an IKE message too, and at 2 Mbit/s a buffer that is right for a gigabit is half a second long.

use std::time::{Duration, Instant};

/// Bounds of what TCP holds unsent. The upper one is what a gigabit needs while the writer is being woken.
const UNSENT: (u32, u32) = (4 * 1024, 128 * 1024);
/// How long the rate is measured.
const WINDOW: Duration = Duration::from_millis(100);
/// What is unsent is worth about so many of these in a second.
const PER_SECOND: u64 = 200;
/// The queue holds so many times as much.
const QUEUE: usize = 16;

/// The rate of one stream.
#[derive(Debug)]
pub(super) struct Pace {
    unsent: u32,
    window: Option<Window>,
}

/// What was taken in a while.
#[derive(Clone, Copy, Debug)]
struct Window {
    since: Instant,
    octets: u64,
    /// There has always been more to write than was taken.
    busy: bool,
}

impl Default for Pace {
    fn default() -> Self {
        Self { unsent: UNSENT.1, window: None }
    }
}

impl Pace {
    /// Octets that TCP may hold unsent before the writer waits (TCP_NOTSENT_LOWAT): of about 5 ms.
    pub(super) fn unsent(&self) -> u32 {
        self.unsent
    }

    /// Octets for one write.
    pub(super) fn batch(&self) -> usize {
        usize::try_from(self.unsent / 2).unwrap_or(usize::MAX)
    }

    /// Octets of ESP that may wait for the writer: of about 80 ms.
    pub(super) fn queue(&self) -> usize {
        usize::try_from(self.unsent).unwrap_or(usize::MAX).saturating_mul(QUEUE)
    }

    /// So many octets were taken, and there are more, or not. True when the others have changed.
    ///
    /// A stream that keeps up may be faster than it shows, but no slower: that raises what may wait, and never lowers it. And one
    /// that stalls for a moment is not slow for that: what may wait falls step by step. It rises at once.
    pub(super) fn wrote(&mut self, now: Instant, octets: usize, more: bool) -> bool {
        let fresh = Window { since: now, octets: 0, busy: more };
        let Some(window) = &mut self.window else {
            self.window = Some(fresh);
            return false;
        };
        window.octets = window.octets.saturating_add(u64::try_from(octets).unwrap_or(u64::MAX));
        window.busy &= more;
        let Window { since, octets, busy } = *window;
        let time = now.saturating_duration_since(since);
        if time < WINDOW {
            return false;
        }
        self.window = Some(fresh);
        let rate = octets.saturating_mul(1000) / u64::try_from(time.as_millis()).unwrap_or(u64::MAX).max(1);
        let wanted = u32::try_from(rate / PER_SECOND).unwrap_or(u32::MAX).clamp(UNSENT.0, UNSENT.1);
        let wanted = wanted.checked_next_power_of_two().unwrap_or(UNSENT.1).min(UNSENT.1);
        let lowest = if busy { self.unsent / 2 } else { self.unsent };
        let unsent = wanted.max(lowest);
        unsent != std::mem::replace(&mut self.unsent, unsent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stream that takes so many octets in each 5 ms, for a second.
    fn run(pace: &mut Pace, start: Instant, octets: usize) -> u32 {
        for turn in 0..200 {
            pace.wrote(start + Duration::from_millis(5 * turn), octets, true);
        }
        pace.unsent()
    }

    #[test]
    fn what_may_wait_follows_the_rate() {
        let (mut pace, mut now) = (Pace::default(), Instant::now());
        assert_eq!(pace.unsent(), 128 * 1024);
        // 1, 10, 50 Mbit/s and a gigabit, and back.
        for (octets, unsent) in [(625, 4), (6250, 8), (31_250, 32), (625_000, 128), (625, 4)] {
            assert_eq!(run(&mut pace, now, octets), unsent * 1024, "{octets}");
            now += Duration::from_secs(1);
            assert_eq!((pace.batch(), pace.queue()), (unsent as usize * 512, unsent as usize * 16_384));
        }
    }

    // After a stall there is little to write for a while, since senders inside the tunnel have slowed down too. If what may wait
    // stayed what the stall made of it, they could never become faster again.
    #[test]
    fn a_stall_is_no_rate_and_what_it_did_is_undone() {
        let (mut pace, start) = (Pace::default(), Instant::now());
        run(&mut pace, start, 625_000);
        pace.wrote(start + Duration::from_millis(1100), 625_000, true);
        let stalled = start + Duration::from_millis(1400);
        assert!(pace.wrote(stalled, 1000, true));
        assert_eq!(pace.unsent(), 64 * 1024, "half of it");
        // Slow for long.
        let later = stalled + Duration::from_secs(1);
        assert_eq!(run(&mut pace, later, 625), 4 * 1024);
        // 200 Mbit/s, and the stream keeps up.
        for turn in 1..40 {
            pace.wrote(later + Duration::from_millis(1000 + 5 * turn), 125_000, false);
        }
        assert_eq!(pace.unsent(), 128 * 1024);
    }

    #[test]
    fn a_stream_that_is_given_little_says_nothing_of_its_rate() {
        let (mut pace, start) = (Pace::default(), Instant::now());
        for turn in 0..1000 {
            assert!(!pace.wrote(start + Duration::from_millis(5 * turn), 100, turn % 10 == 0));
        }
        assert_eq!(pace.unsent(), 128 * 1024);
    }
}
