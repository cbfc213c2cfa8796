//! Stateless cookies (RFC 7296 §2.6, RFC 8019 §7.1.1.3): the version of the secret, what was asked for and when, and
//! a MAC over these with the request's nonce, address and SPI.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use hmac::{Hmac, KeyInit, Mac};
use ipsec::secret::Secret;
use sha2::Sha256;

use crate::Rng;

/// How long a secret makes new cookies; its cookies are good for twice as long at most.
const ROTATION: Duration = Duration::from_secs(60);
/// How long a cookie is good: time for a round trip, or to solve a puzzle.
const LIFE: Duration = Duration::from_secs(60);

/// What of a request its cookie is bound to. The port stays out: a NAT may change it between two requests.
#[derive(Clone, Copy)]
pub(crate) struct Binding<'a> {
    pub(crate) ni: &'a [u8],
    pub(crate) from: SocketAddr,
    pub(crate) spi_i: u64,
}

/// What was demanded with a cookie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Demanded {
    /// Difficulty of the puzzle, in bits; 0: no puzzle, the cookie alone.
    pub(crate) difficulty: u8,
    /// Puzzles that this initiator solved before this one.
    pub(crate) solved: u8,
}

impl Demanded {
    /// The cookie alone.
    pub(crate) const COOKIE: Self = Self { difficulty: 0, solved: 0 };
}

/// Makes and checks cookies.
pub(crate) struct Cookies {
    current: Secret,
    previous: Secret,
    version: u8,
    since: Instant,
    /// Times in cookies count from here.
    epoch: Instant,
}

impl Cookies {
    pub(crate) fn new(now: Instant, rng: &mut dyn Rng) -> Self {
        Self { current: fresh(rng), previous: fresh(rng), version: 0, since: now, epoch: now }
    }

    /// The cookie for this request.
    pub(crate) fn make(
        &mut self,
        now: Instant,
        rng: &mut dyn Rng,
        binding: Binding<'_>,
        demanded: Demanded,
    ) -> Vec<u8> {
        self.rotate(now, rng);
        let mut cookie = vec![self.version, demanded.difficulty, demanded.solved];
        cookie.extend_from_slice(&self.seconds(now).to_be_bytes());
        let mac = mac(&self.current, &cookie, binding);
        cookie.extend_from_slice(&mac);
        cookie
    }

    /// What was demanded with a cookie, if it is one of ours for this request, and still fresh.
    pub(crate) fn check(
        &mut self,
        now: Instant,
        rng: &mut dyn Rng,
        cookie: &[u8],
        binding: Binding<'_>,
    ) -> Option<Demanded> {
        self.rotate(now, rng);
        let (info, value) = cookie.split_first_chunk::<7>()?;
        let [version, difficulty, solved, made @ ..] = *info;
        let secret = if version == self.version {
            &self.current
        } else if version == self.version.wrapping_sub(1) {
            &self.previous
        } else {
            return None;
        };
        let genuine = Secret::new(mac(secret, info, binding)).matches(value);
        let age = self.seconds(now).checked_sub(u32::from_be_bytes(made))?;
        (genuine && u64::from(age) <= LIFE.as_secs()).then_some(Demanded { difficulty, solved })
    }

    fn seconds(&self, now: Instant) -> u32 {
        u32::try_from(now.saturating_duration_since(self.epoch).as_secs()).unwrap_or(u32::MAX)
    }

    fn rotate(&mut self, now: Instant, rng: &mut dyn Rng) {
        let age = now.saturating_duration_since(self.since);
        if age >= ROTATION {
            let old = std::mem::replace(&mut self.current, fresh(rng));
            // After two periods without a request both secrets are too old.
            self.previous = if age >= ROTATION * 2 { fresh(rng) } else { old };
            self.version = self.version.wrapping_add(1);
            self.since = now;
        }
    }
}

fn fresh(rng: &mut dyn Rng) -> Secret {
    let mut octets = vec![0; 32];
    rng.fill(&mut octets);
    Secret::new(octets)
}

fn mac(secret: &Secret, info: &[u8], Binding { ni, from, spi_i }: Binding<'_>) -> Vec<u8> {
    // HMAC takes keys of any length; an empty answer is never equal to a cookie's 32 octets.
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(secret.expose()) else { return Vec::new() };
    mac.update(info);
    mac.update(&spi_i.to_be_bytes());
    match from.ip() {
        IpAddr::V4(ip) => mac.update(&ip.octets()),
        IpAddr::V6(ip) => mac.update(&ip.octets()),
    }
    // The only part whose length varies within a family comes last.
    mac.update(ni);
    mac.finalize().into_bytes().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Counting(u8);
    impl Rng for Counting {
        fn fill(&mut self, buffer: &mut [u8]) {
            self.0 = self.0.wrapping_add(1);
            buffer.fill(self.0);
        }
    }

    const NONCE: [u8; 32] = [7; 32];

    fn binding(from: &str, spi_i: u64) -> Binding<'static> {
        Binding { ni: &NONCE, from: from.parse().unwrap(), spi_i }
    }

    // RFC 7296 §2.6: nonce, address, SPI and time; RFC 8019 §7.1.1.3: what was asked is protected too.
    #[test]
    fn a_cookie_is_good_for_one_request_and_some_time() {
        let now = Instant::now();
        let rng = &mut Counting(0);
        let mut cookies = Cookies::new(now, rng);
        let ours = binding("192.0.2.1:500", 5);
        let demanded = Demanded { difficulty: 18, solved: 1 };
        let cookie = cookies.make(now, rng, ours, demanded);
        assert!((1..=64).contains(&cookie.len()));
        assert_eq!(cookies.check(now, rng, &cookie, ours), Some(demanded));
        // A NAT may change the port.
        assert_eq!(cookies.check(now, rng, &cookie, binding("192.0.2.1:4500", 5)), Some(demanded));
        for other in [
            binding("192.0.2.2:500", 5),
            binding("[::ffff:192.0.2.1]:500", 5),
            binding("192.0.2.1:500", 6),
            Binding { ni: &NONCE[1..], ..ours },
            Binding { ni: &[8; 32], ..ours },
        ] {
            assert_eq!(cookies.check(now, rng, &cookie, other), None);
        }
        for at in 0..cookie.len() {
            let mut changed = cookie.clone();
            changed[at] ^= 1;
            assert_eq!(cookies.check(now, rng, &changed, ours), None, "octet {at}");
            assert_eq!(cookies.check(now, rng, &cookie[..at], ours), None, "{at} octets");
        }
        let longer = [cookie.as_slice(), &[0]].concat();
        assert_eq!(cookies.check(now, rng, &longer, ours), None);
        // The secret has been changed meanwhile, and its predecessor still counts.
        let later = now + Duration::from_secs(60);
        assert_eq!(cookies.check(later, rng, &cookie, ours), Some(demanded));
        assert_ne!(cookies.make(later, rng, ours, demanded)[7..], cookie[7..]);
        assert_eq!(cookies.check(now + Duration::from_secs(61), rng, &cookie, ours), None);
    }

    #[test]
    fn a_secret_is_forgotten() {
        let now = Instant::now();
        let rng = &mut Counting(0);
        let mut cookies = Cookies::new(now, rng);
        let ours = binding("[2001:db8::1]:500", 5);
        let cookie = cookies.make(now + Duration::from_secs(59), rng, ours, Demanded::COOKIE);
        assert!(cookies.check(now + Duration::from_secs(61), rng, &cookie, ours).is_some());
        assert_eq!(cookies.check(now + Duration::from_secs(200), rng, &cookie, ours), None);
        // The version's octet comes round again, its secret does not.
        for round in 0..256_u64 {
            cookies.rotate(now + Duration::from_secs(260 + round * 61), rng);
        }
        assert_eq!(cookies.check(now + Duration::from_secs(260 + 255 * 61), rng, &cookie, ours), None);
    }
}
