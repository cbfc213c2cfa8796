//! Stateless cookies (RFC 7296 §2.6).

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use hmac::{Hmac, KeyInit, Mac};
use ipsec::secret::Secret;
use sha2::Sha256;

use crate::Rng;

/// How long a secret makes new cookies; its cookies are good for twice as long at most.
const ROTATION: Duration = Duration::from_secs(60);

/// Makes and checks cookies.
pub(crate) struct Cookies {
    current: Secret,
    previous: Secret,
    version: u8,
    since: Instant,
}

impl Cookies {
    pub(crate) fn new(now: Instant, rng: &mut dyn Rng) -> Self {
        Self { current: fresh(rng), previous: fresh(rng), version: 0, since: now }
    }

    /// The cookie for this request. The port stays out: a NAT may change it between two requests.
    pub(crate) fn make(&mut self, now: Instant, rng: &mut dyn Rng, ni: &[u8], from: SocketAddr, spi_i: u64) -> Vec<u8> {
        self.rotate(now, rng);
        let mut cookie = vec![self.version];
        cookie.extend_from_slice(&mac(&self.current, ni, from.ip(), spi_i));
        cookie
    }

    /// Says whether a cookie is one of ours for this request.
    pub(crate) fn check(
        &mut self,
        now: Instant,
        rng: &mut dyn Rng,
        cookie: &[u8],
        ni: &[u8],
        from: SocketAddr,
        spi_i: u64,
    ) -> bool {
        self.rotate(now, rng);
        let Some((version, value)) = cookie.split_first() else { return false };
        let secret = if *version == self.version {
            &self.current
        } else if *version == self.version.wrapping_sub(1) {
            &self.previous
        } else {
            return false;
        };
        Secret::new(mac(secret, ni, from.ip(), spi_i)).matches(value)
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

fn mac(secret: &Secret, ni: &[u8], from: IpAddr, spi_i: u64) -> Vec<u8> {
    // HMAC takes keys of any length; an empty answer is never equal to a cookie's 32 octets.
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(secret.expose()) else { return Vec::new() };
    mac.update(ni);
    match from {
        IpAddr::V4(ip) => mac.update(&ip.octets()),
        IpAddr::V6(ip) => mac.update(&ip.octets()),
    }
    mac.update(&spi_i.to_be_bytes());
    mac.finalize().into_bytes().to_vec()
}
