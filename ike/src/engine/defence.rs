//! What strangers may cost us: half-open IKE SAs and work are counted for each network that they come from, and what
//! we answer or write to the log on their behalf has a rate (RFC 7296 §2.4, §2.6, RFC 8019 §4.2).
//!
//! All of it takes constant memory, whoever sends from wherever: counts are of half-open IKE SAs that exist, and
//! rates are kept in tables of fixed size.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use crate::Rng;
use crate::sa::retry::after;

/// Half-open IKE SAs in all, whatever the thresholds: each takes memory for `half_open_timeout`.
pub(crate) const MAX_HALF_OPEN: usize = 4096;
/// How many times a /64's share a whole IPv6 /48 has.
const NETWORKS_IN_BLOCK: usize = 16;
/// Cookies stay in force for so long after they were last needed, so that a repetition of a request is not answered
/// in another way than the request was.
const CALM_DOWN: Duration = Duration::from_secs(10);
/// Answers to one network that no IKE SA pays for: as many at once, and as many in a minute.
const ANSWERS: u32 = 20;
const ANSWERS_PER_MINUTE: u32 = 60;
/// Lines about strangers in the log: as many at once, and as many in a minute.
const LINES: u32 = 100;
const LINES_PER_MINUTE: u32 = 600;
/// Entries of a table of rates.
const BUCKETS: usize = 4096;

/// Who is counted as one: an IPv4 address, or an IPv6 network of a length that one site has (RFC 8019 §4.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Network {
    V4(Ipv4Addr),
    /// The first 64 bits.
    V6Net(u64),
    /// The first 48 bits.
    V6Block(u64),
}

impl Network {
    /// The smallest unit that an address belongs to, and the larger one around it.
    pub(crate) fn of(address: IpAddr) -> (Self, Option<Self>) {
        match address {
            IpAddr::V4(ip) => (Self::V4(ip), None),
            IpAddr::V6(ip) => match ip.to_ipv4_mapped() {
                Some(ip) => (Self::V4(ip), None),
                None => {
                    let net = u64::try_from(ip.to_bits() >> 64).unwrap_or_default();
                    (Self::V6Net(net), Some(Self::V6Block(net >> 16)))
                }
            },
        }
    }
}

/// How many half-open IKE SAs there are, and where they come from.
#[derive(Debug, Default)]
pub(crate) struct HalfOpen {
    total: usize,
    networks: BTreeMap<Network, usize>,
}

impl HalfOpen {
    pub(crate) fn total(&self) -> usize {
        self.total
    }

    /// Those of this address's network; a larger network around it counts by its share.
    pub(crate) fn of(&self, address: IpAddr) -> usize {
        let (net, block) = Network::of(address);
        let count = |network| self.networks.get(&network).copied().unwrap_or(0);
        count(net).max(block.map_or(0, |block| count(block) / NETWORKS_IN_BLOCK))
    }

    pub(crate) fn add(&mut self, address: IpAddr) {
        self.total += 1;
        let (net, block) = Network::of(address);
        for network in [Some(net), block].into_iter().flatten() {
            *self.networks.entry(network).or_default() += 1;
        }
    }

    pub(crate) fn remove(&mut self, address: IpAddr) {
        self.total = self.total.saturating_sub(1);
        let (net, block) = Network::of(address);
        for network in [Some(net), block].into_iter().flatten() {
            if let Some(count) = self.networks.get_mut(&network) {
                *count = count.saturating_sub(1);
                if *count == 0 {
                    self.networks.remove(&network);
                }
            }
        }
    }
}

/// So many at once, and so many in a minute.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    tokens: f64,
    at: Instant,
}

#[derive(Clone, Copy, Debug)]
struct Rate {
    at_once: u32,
    per_minute: u32,
}

impl Bucket {
    fn new(rate: Rate, now: Instant) -> Self {
        Self { tokens: f64::from(rate.at_once), at: now }
    }

    fn refill(&mut self, rate: Rate, now: Instant) {
        let minutes = now.saturating_duration_since(self.at).as_secs_f64() / 60.0;
        self.tokens = (self.tokens + minutes * f64::from(rate.per_minute)).min(f64::from(rate.at_once));
        self.at = self.at.max(now);
    }

    fn take(&mut self, rate: Rate, now: Instant) -> bool {
        self.refill(rate, now);
        let there = self.tokens >= 1.0;
        if there {
            self.tokens -= 1.0;
        }
        there
    }
}

/// A rate for each network, in constant memory: networks whose keyed hashes meet share one.
#[derive(Debug)]
struct Rates {
    rate: Rate,
    key: [u8; 16],
    buckets: Vec<Bucket>,
}

impl Rates {
    fn new(rate: Rate, now: Instant, rng: &mut dyn Rng) -> Self {
        let mut key = [0; 16];
        rng.fill(&mut key);
        Self { rate, key, buckets: vec![Bucket::new(rate, now); BUCKETS] }
    }

    fn bucket(&mut self, address: IpAddr) -> Option<&mut Bucket> {
        // The key is random, so nobody can choose an address that shares another's bucket.
        let mut hasher = DefaultHasher::new();
        self.key.hash(&mut hasher);
        Network::of(address).0.hash(&mut hasher);
        let index = usize::try_from(hasher.finish() % BUCKETS as u64).unwrap_or_default();
        self.buckets.get_mut(index)
    }

    fn left(&mut self, now: Instant, address: IpAddr) -> f64 {
        let rate = self.rate;
        self.bucket(address).map_or(0.0, |bucket| {
            bucket.refill(rate, now);
            bucket.tokens
        })
    }

    fn take(&mut self, now: Instant, address: IpAddr) -> bool {
        let rate = self.rate;
        self.bucket(address).is_some_and(|bucket| bucket.take(rate, now))
    }

    fn give_back(&mut self, address: IpAddr) {
        let most = f64::from(self.rate.at_once);
        if let Some(bucket) = self.bucket(address) {
            bucket.tokens = (bucket.tokens + 1.0).min(most);
        }
    }
}

/// What a network may still ask of us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Budget {
    /// Plenty.
    Enough,
    /// Less than half: only who is where it says it is may use the rest, or others could use up somebody's budget in
    /// its name.
    Scarce,
    /// None.
    Spent,
}

/// Counts and rates of what strangers ask for.
#[derive(Debug)]
pub(crate) struct Defence {
    pub(crate) half_open: HalfOpen,
    /// Key agreements for peers that did not authenticate. `None`: not limited.
    work: Option<Rates>,
    answers: Rates,
    lines: Bucket,
    /// Lines that were left out since the last one.
    left_out: u64,
    cookies_until: Option<Instant>,
    /// Requests that are being served and have made no IKE SA yet: each counts as a half-open one.
    serving: usize,
}

/// Why nobody, or nobody from there, is served.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Half-open IKE SAs in all.
    pub(crate) half_open: usize,
    /// Half-open IKE SAs of one network; 0 is no limit.
    pub(crate) block: usize,
    /// IKE SAs in all; 0 is no limit.
    pub(crate) ike_sas: usize,
    /// Jobs that are out.
    pub(crate) jobs: usize,
}

impl Defence {
    /// `budget` is the number of IKE_SA_INITs in a minute that a network may have served without authenticating; 0
    /// does not limit it.
    pub(crate) fn new(now: Instant, budget: u32, rng: &mut dyn Rng) -> Self {
        let rate = Rate { at_once: budget, per_minute: budget };
        let answers = Rate { at_once: ANSWERS, per_minute: ANSWERS_PER_MINUTE };
        Self {
            half_open: HalfOpen::default(),
            work: (budget > 0).then(|| Rates::new(rate, now, rng)),
            answers: Rates::new(answers, now, rng),
            lines: Bucket::new(LINE_RATE, now),
            left_out: 0,
            cookies_until: None,
            serving: 0,
        }
    }

    /// Why nobody, or nobody from there, is served now. `load` is of IKE SAs and jobs.
    pub(crate) fn refusal(
        &mut self,
        now: Instant,
        from: IpAddr,
        limits: Limits,
        load: (usize, usize),
    ) -> Option<&'static str> {
        let (ike_sas, jobs) = (load.0.saturating_add(self.serving), load.1.saturating_add(self.serving));
        if self.half_open.total() >= limits.half_open {
            return Some("half open IKE_SA count too high");
        }
        // Whoever comes later would wait for all of them; it asks again when there is room.
        if jobs >= limits.jobs {
            return Some("job load too high");
        }
        if limits.ike_sas > 0 && ike_sas >= limits.ike_sas {
            return Some("hitting IKE_SA limit");
        }
        let blocked = limits.block > 0 && self.half_open.of(from) >= limits.block;
        (blocked || self.budget(now, from) == Budget::Spent).then_some("peer too aggressive")
    }

    /// A request is to be served, unless the limits are reached meanwhile: looking and counting are one step, or two shards would
    /// both take the last place. [`Self::end_serving`] follows.
    pub(crate) fn begin_serving(
        &mut self,
        now: Instant,
        from: IpAddr,
        limits: Limits,
        load: (usize, usize),
    ) -> Result<(), &'static str> {
        if let Some(reason) = self.refusal(now, from, limits, load) {
            return Err(reason);
        }
        self.serving += 1;
        self.half_open.add(from);
        self.charge(now, from);
        Ok(())
    }

    /// The request has made an IKE SA, which counts for itself from now on, or come to nothing.
    pub(crate) fn end_serving(&mut self, from: IpAddr, served: bool) {
        self.serving = self.serving.saturating_sub(1);
        self.half_open.remove(from);
        if !served {
            self.refund(from);
        }
    }

    /// What is left of a network's budget for work.
    pub(crate) fn budget(&mut self, now: Instant, address: IpAddr) -> Budget {
        let Some(work) = &mut self.work else { return Budget::Enough };
        let half = f64::from(work.rate.at_once) / 2.0;
        match work.left(now, address) {
            left if left < 1.0 => Budget::Spent,
            left if left < half => Budget::Scarce,
            _ => Budget::Enough,
        }
    }

    /// A network's IKE_SA_INIT is served.
    fn charge(&mut self, now: Instant, address: IpAddr) {
        if let Some(work) = &mut self.work {
            work.take(now, address);
        }
    }

    /// The peer has authenticated: its IKE_SA_INIT was worth the work.
    pub(crate) fn refund(&mut self, address: IpAddr) {
        if let Some(work) = &mut self.work {
            work.give_back(address);
        }
    }

    /// True when a network may have another answer that is not asked for by a request of its own IKE SA, or that may be
    /// longer than what it answers.
    pub(crate) fn may_answer(&mut self, now: Instant, address: IpAddr) -> bool {
        self.answers.take(now, address)
    }

    /// True while cookies are demanded: now, or a moment ago.
    pub(crate) fn cookies_in_force(&mut self, now: Instant, crowded: bool) -> bool {
        if crowded {
            self.cookies_until = Some(after(now, CALM_DOWN));
        }
        self.cookies_until.is_some_and(|until| now < until)
    }

    /// The line for the log, unless there were too many; what was left out is said with the next one.
    pub(crate) fn line(&mut self, now: Instant, line: String) -> Option<String> {
        if !self.lines.take(LINE_RATE, now) {
            self.left_out = self.left_out.saturating_add(1);
            return None;
        }
        match std::mem::take(&mut self.left_out) {
            0 => Some(line),
            more => Some(format!("{line} ({more} lines like this one were left out)")),
        }
    }
}

const LINE_RATE: Rate = Rate { at_once: LINES, per_minute: LINES_PER_MINUTE };

#[cfg(test)]
mod tests {
    use super::*;

    struct Zero;
    impl Rng for Zero {
        fn fill(&mut self, buffer: &mut [u8]) {
            buffer.fill(0);
        }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    // RFC 8019 §4.2: limits for IPv6 are by /64 or /48, or an attacker with one network has 2^64 addresses.
    #[test]
    fn half_open_sas_are_counted_by_network() {
        let mut half_open = HalfOpen::default();
        for n in 0..5 {
            half_open.add(ip(&format!("2001:db8:0:7::{n}")));
        }
        half_open.add(ip("192.0.2.1"));
        half_open.add(ip("::ffff:192.0.2.1"));
        assert_eq!(half_open.total(), 7);
        assert_eq!(half_open.of(ip("2001:db8:0:7:ffff::1")), 5);
        assert_eq!(half_open.of(ip("2001:db8:0:8::1")), 0);
        assert_eq!(half_open.of(ip("192.0.2.1")), 2);
        assert_eq!(half_open.of(ip("192.0.2.2")), 0);
        // Many networks of one /48 count for one another.
        for n in 0x100..0x150 {
            half_open.add(ip(&format!("2001:db8:0:{n:x}::1")));
        }
        assert_eq!(half_open.of(ip("2001:db8:0:9::1")), 85 / NETWORKS_IN_BLOCK);
        assert_eq!(half_open.of(ip("2001:db8:1:9::1")), 0);
        for n in 0x100..0x150 {
            half_open.remove(ip(&format!("2001:db8:0:{n:x}::1")));
        }
        for n in 0..5 {
            half_open.remove(ip(&format!("2001:db8:0:7::{n}")));
        }
        half_open.remove(ip("192.0.2.1"));
        half_open.remove(ip("192.0.2.1"));
        assert_eq!(half_open.total(), 0);
        assert!(half_open.networks.is_empty());
    }

    // RFC 8019 §6: work that leads to nothing has a limit for each network, which comes back with time or success.
    #[test]
    fn a_network_has_a_budget() {
        let now = Instant::now();
        let mut defence = Defence::new(now, 10, &mut Zero);
        let (one, other) = (ip("192.0.2.1"), ip("2001:db8::1"));
        for _ in 0..6 {
            defence.charge(now, one);
        }
        assert_eq!(defence.budget(now, one), Budget::Scarce);
        for _ in 0..4 {
            defence.charge(now, one);
        }
        assert_eq!(defence.budget(now, one), Budget::Spent);
        assert_eq!(defence.budget(now, other), Budget::Enough);
        defence.refund(one);
        assert_eq!(defence.budget(now, one), Budget::Scarce);
        assert_eq!(defence.budget(now + Duration::from_secs(60), one), Budget::Enough);
        let mut unlimited = Defence::new(now, 0, &mut Zero);
        for _ in 0..100 {
            unlimited.charge(now, one);
        }
        assert_eq!(unlimited.budget(now, one), Budget::Enough);
    }

    #[test]
    fn answers_and_lines_have_a_rate() {
        let now = Instant::now();
        let mut defence = Defence::new(now, 10, &mut Zero);
        let answered = (0..1000).filter(|_| defence.may_answer(now, ip("192.0.2.1"))).count();
        assert_eq!(answered, ANSWERS as usize);
        let said = (0..1000).filter_map(|_| defence.line(now, "x".to_owned())).count();
        assert_eq!(said, LINES as usize);
        let later = defence.line(now + Duration::from_secs(1), "y".to_owned());
        assert_eq!(later.as_deref(), Some("y (900 lines like this one were left out)"));
    }

    #[test]
    fn cookies_stay_in_force_for_a_moment() {
        let now = Instant::now();
        let mut defence = Defence::new(now, 10, &mut Zero);
        assert!(!defence.cookies_in_force(now, false));
        assert!(defence.cookies_in_force(now, true));
        assert!(defence.cookies_in_force(now + Duration::from_secs(9), false));
        assert!(!defence.cookies_in_force(now + Duration::from_secs(11), false));
    }
}
