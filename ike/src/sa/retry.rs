//! When a request is repeated (RFC 7296 §2.4) and when its sender gives up.

use std::time::{Duration, Instant};

use crate::Rng;
use crate::config::Retransmission;

/// The timer of one outstanding request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Retry {
    /// When to act next.
    pub(crate) at: Instant,
    /// Repetitions done.
    pub(crate) done: u32,
    /// True over a stream: no repetitions, `at` is the end (RFC 9329 §6.2).
    once: bool,
}

/// What is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Due {
    Nothing,
    Resend,
    GiveUp,
}

impl Retry {
    /// Starts the timer of a request that was sent now.
    pub(crate) fn start(now: Instant, policy: &Retransmission, stream: bool, rng: &mut dyn Rng) -> Self {
        let wait = if stream { total(policy) } else { wait(policy, 0, rng) };
        Self { at: after(now, wait), done: 0, once: stream }
    }

    /// Says what is due and, for a repetition, starts the next wait.
    pub(crate) fn poll(&mut self, now: Instant, policy: &Retransmission, rng: &mut dyn Rng) -> Due {
        if now < self.at {
            return Due::Nothing;
        }
        if self.once || self.done >= policy.tries {
            return Due::GiveUp;
        }
        self.done = self.done.saturating_add(1);
        self.at = after(now, wait(policy, self.done, rng));
        Due::Resend
    }
}

/// How long all repetitions of a request take together.
pub(crate) fn total(policy: &Retransmission) -> Duration {
    (0..=policy.tries).map(|n| nominal(policy, n)).fold(Duration::ZERO, Duration::saturating_add)
}

/// How long to wait before something that failed is tried again for the `n`th time, from 0: charon's 15 s less up to
/// 10 s, then longer each time.
pub(crate) fn back_off(n: u8, rng: &mut dyn Rng) -> Duration {
    const FIRST: Duration = Duration::from_secs(15);
    const RANDOM: Duration = Duration::from_secs(10);
    const LONGEST: Duration = Duration::from_secs(120);
    FIRST.saturating_mul(1 << n.min(8)).min(LONGEST).saturating_sub(random_below(RANDOM, rng))
}

/// A uniformly random duration below `range`; zero for zero.
pub(crate) fn random_below(range: Duration, rng: &mut dyn Rng) -> Duration {
    let mut octets = [0; 8];
    rng.fill(&mut octets);
    let nanos = u64::try_from(range.as_nanos()).unwrap_or(u64::MAX);
    Duration::from_nanos(u64::from_be_bytes(octets).checked_rem(nanos).unwrap_or(0))
}

/// `now + wait`, or a day later where that overflows.
pub(crate) fn after(now: Instant, wait: Duration) -> Instant {
    const DAY: Duration = Duration::from_secs(86_400);
    now.checked_add(wait).or_else(|| now.checked_add(DAY)).unwrap_or(now)
}

fn nominal(policy: &Retransmission, n: u32) -> Duration {
    const LONGEST: f64 = 86_400.0;
    let exponent = i32::try_from(n).unwrap_or(i32::MAX);
    let seconds = policy.timeout.as_secs_f64() * policy.base.powi(exponent);
    let wait = Duration::from_secs_f64(if seconds.is_finite() { seconds.clamp(0.0, LONGEST) } else { LONGEST });
    if policy.limit.is_zero() { wait } else { wait.min(policy.limit) }
}

fn wait(policy: &Retransmission, n: u32, rng: &mut dyn Rng) -> Duration {
    let wait = nominal(policy, n);
    let span = wait.mul_f64(f64::from(policy.jitter.min(100)) / 100.0);
    wait.saturating_sub(random_below(span, rng))
}
