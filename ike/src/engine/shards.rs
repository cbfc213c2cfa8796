//! Several engines that are one: which shard a message, an SA or a number belongs to.
//!
//! The shard puts its number into the top bits of each SPI that is ours, and into each number of an IKE SA or a Child SA, so that
//! what concerns an SA leads to its shard without a table. Requests that are to make an IKE SA go by a keyed hash.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::IpAddr;

use ipsec::plane::StreamId;

use super::{ChildSaId, IkeSaId, Path, Transport};
use crate::Rng;

/// The most shards that there can be.
pub const MAX_SHARDS: usize = 64;

/// Which of the shards one is, and what follows for its numbers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Numbering {
    pub(crate) shard: usize,
    pub(crate) shards: usize,
}

impl Numbering {
    /// Bits of an SPI that say the shard.
    fn bits(shards: usize) -> u32 {
        shards.max(1).next_power_of_two().trailing_zeros()
    }

    /// A shard's own SPI of an IKE SA, of random bits.
    pub(crate) fn spi(self, random: u64) -> u64 {
        let bits = Self::bits(self.shards);
        let shard = u64::try_from(self.shard).unwrap_or(0);
        if bits == 0 { random } else { (shard << (64 - bits)) | (random >> bits) }
    }

    /// The same of a Child SA.
    pub(crate) fn child_spi(self, random: u32) -> u32 {
        let bits = Self::bits(self.shards);
        let shard = u32::try_from(self.shard).unwrap_or(0);
        if bits == 0 { random } else { (shard << (32 - bits)) | (random >> bits) }
    }

    /// The shard's numbers in their order: with one shard 1, 2, 3.
    pub(crate) fn number(self, nth: u64) -> u64 {
        let (shard, shards) = (u64::try_from(self.shard).unwrap_or(0), u64::try_from(self.shards).unwrap_or(1));
        nth.saturating_sub(1).saturating_mul(shards).saturating_add(shard).saturating_add(1)
    }

    /// True for numbers of its own.
    pub(crate) fn has(self, id: IkeSaId) -> bool {
        shard_of_number(self.shards, id.0) == self.shard
    }

    /// Whose SPI this is. Some shard's, whatever it is.
    pub(crate) fn shard_of_spi(shards: usize, spi: u64) -> usize {
        let bits = Self::bits(shards);
        let top = if bits == 0 { 0 } else { spi >> (64 - bits) };
        usize::try_from(top).unwrap_or(0).checked_rem(shards).unwrap_or(0)
    }
}

fn shard_of_number(shards: usize, number: u64) -> usize {
    let shards = u64::try_from(shards).unwrap_or(1);
    number.saturating_sub(1).checked_rem(shards).and_then(|shard| usize::try_from(shard).ok()).unwrap_or(0)
}

/// The way to the shard that something is for.
#[derive(Clone, Debug)]
pub struct Dispatch {
    shards: usize,
    /// Nobody outside can choose where a hash leads to.
    key: [u8; 16],
}

impl Dispatch {
    /// To one of so many shards.
    pub fn new(shards: usize, rng: &mut dyn Rng) -> Self {
        let mut key = [0; 16];
        rng.fill(&mut key);
        Self { shards: shards.clamp(1, MAX_SHARDS), key }
    }

    /// The shard for an IKE message (marker and framing removed): that whose SPI it bears. A first request bears none of ours.
    /// It goes by its sender's address and SPI, which are the same when it is repeated, when it comes back with a cookie or a
    /// puzzle's solution, and when another key exchange method was asked for; the port stays out, as a NAT may change it. What
    /// comes along a stream goes by the stream, which one IKE SA may have (RFC 9329 §6.1).
    pub fn of_message(&self, path: &Path, bytes: &[u8]) -> usize {
        const INITIATOR: u8 = 0x08;
        if self.shards == 1 {
            return 0;
        }
        let Some((initiator_spi, rest)) = bytes.split_first_chunk::<8>() else { return 0 };
        let Some((responder_spi, rest)) = rest.split_first_chunk::<8>() else { return 0 };
        let Some([_next, _version, _exchange, flags]) = rest.first_chunk::<4>() else { return 0 };
        let (initiator_spi, responder_spi) = (u64::from_be_bytes(*initiator_spi), u64::from_be_bytes(*responder_spi));
        if flags & INITIATOR == 0 {
            return Numbering::shard_of_spi(self.shards, initiator_spi);
        }
        if responder_spi != 0 {
            return Numbering::shard_of_spi(self.shards, responder_spi);
        }
        match path.transport {
            Transport::Stream(stream) => self.hashed(stream),
            Transport::Udp | Transport::UdpEncap => self.hashed((canonical(path.remote.ip()), initiator_spi)),
        }
    }

    /// The shard that has an IKE SA.
    pub fn of_ike_sa(&self, id: IkeSaId) -> usize {
        shard_of_number(self.shards, id.0)
    }

    /// The shard that has a Child SA.
    pub fn of_child_sa(&self, id: ChildSaId) -> usize {
        shard_of_number(self.shards, id.0)
    }

    /// The shard of a Child SA's inbound SPI.
    pub fn of_child_spi(&self, spi: u32) -> usize {
        Numbering::shard_of_spi(self.shards, u64::from(spi) << 32)
    }

    /// The shard that asked for a stream which we opened.
    pub fn of_stream(&self, stream: StreamId) -> usize {
        shard_of_number(self.shards, stream.0)
    }

    fn hashed(&self, what: impl Hash) -> usize {
        let mut hasher = DefaultHasher::new();
        self.key.hash(&mut hasher);
        what.hash(&mut hasher);
        let shards = u64::try_from(self.shards).unwrap_or(1);
        hasher.finish().checked_rem(shards).and_then(|shard| usize::try_from(shard).ok()).unwrap_or(0)
    }
}

fn canonical(address: IpAddr) -> IpAddr {
    address.to_canonical()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::tests::TestRng;

    #[test]
    fn numbers_and_spis_say_whose_they_are() {
        for shards in [1, 2, 3, 4, 7, 64] {
            let dispatch = Dispatch::new(shards, &mut TestRng::new(1));
            let mut seen = std::collections::BTreeSet::new();
            for shard in 0..shards {
                let numbering = Numbering { shard, shards };
                for random in [0, 1, u64::MAX, 0x0123_4567_89ab_cdef] {
                    let spi = numbering.spi(random);
                    assert_eq!(Numbering::shard_of_spi(shards, spi), shard);
                    let child = numbering.child_spi((random >> 32) as u32);
                    assert_eq!(dispatch.of_child_spi(child), shard);
                }
                for nth in 1..=5 {
                    let number = numbering.number(nth);
                    assert!(number > 0 && seen.insert(number));
                    assert_eq!(dispatch.of_ike_sa(IkeSaId(number)), shard);
                    assert_eq!(dispatch.of_child_sa(ChildSaId(number)), shard);
                    assert!(numbering.has(IkeSaId(number)));
                }
            }
        }
        let alone = Numbering { shard: 0, shards: 1 };
        assert_eq!((alone.number(1), alone.number(2), alone.spi(7), alone.child_spi(7)), (1, 2, 7, 7));
    }

    // RFC 7296 §2.1, §2.6: what a peer repeats meets the shard that knows it, also if a NAT gives it another port.
    #[test]
    fn a_first_request_comes_back_to_its_shard() {
        let dispatch = Dispatch::new(4, &mut TestRng::new(3));
        let path = |port: u16, host: u8| Path {
            local: "192.0.2.1:500".parse().unwrap(),
            remote: std::net::SocketAddr::new([198, 51, 100, host].into(), port),
            transport: Transport::Udp,
        };
        let request = |spi: u64| {
            let mut bytes = vec![0; 28];
            bytes[..8].copy_from_slice(&spi.to_be_bytes());
            bytes[19] = 0x08;
            bytes
        };
        let mut hits = [0; 4];
        for spi in 1..400_u64 {
            let shard = dispatch.of_message(&path(500, 1), &request(spi));
            assert_eq!(dispatch.of_message(&path(4500, 1), &request(spi)), shard);
            hits[shard] += 1;
        }
        assert!(hits.iter().all(|hits| *hits > 50), "{hits:?}");
        // Another key, another way: nobody outside can aim at a shard.
        let other = Dispatch::new(4, &mut TestRng::new(4));
        let same = (1..400).filter(|spi| {
            let (path, bytes) = (path(500, 1), request(*spi));
            dispatch.of_message(&path, &bytes) == other.of_message(&path, &bytes)
        });
        assert!(same.count() < 200);
        // Too short for a header is some shard's to count.
        assert_eq!(dispatch.of_message(&path(500, 1), &[1, 2, 3]), 0);
    }
}
