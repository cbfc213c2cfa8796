use data_encoding::HEXLOWER;
use ipsec::secret::Secret;
use ipsec::transform::Prf;

use super::*;
use crate::Rng;

mod additional_key_exchange;
mod key_derivation;
mod key_exchange;
mod ml_kem;
mod proposals;

fn hex(text: &str) -> Vec<u8> {
    let text: String = text.split_whitespace().collect();
    HEXLOWER.decode(text.to_ascii_lowercase().as_bytes()).unwrap()
}

/// Octets of SHA-256 over a counter: enough like random ones, and the same in every run.
struct Seeded(u64);
impl Seeded {
    fn new(seed: u64) -> Self {
        Self(seed << 32)
    }
}
impl Rng for Seeded {
    fn fill(&mut self, buffer: &mut [u8]) {
        for chunk in buffer.chunks_mut(32) {
            self.0 += 1;
            let block = <sha2::Sha256 as sha2::Digest>::digest(self.0.to_be_bytes());
            chunk.copy_from_slice(&block[..chunk.len()]);
        }
    }
}
