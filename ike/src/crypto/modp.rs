//! Diffie-Hellman in the MODP groups (RFC 3526) with short exponents.

use std::sync::OnceLock;

use crypto_bigint::modular::{BoxedMontyForm, BoxedMontyParams};
use crypto_bigint::{BoxedUint, Odd};
use ipsec::secret::Secret;
use ipsec::transform::Ke;
use zeroize::Zeroizing;

use super::KeyError;
use crate::Rng;

/// One group; all have the generator 2.
pub(super) struct Group {
    bits: u32,
    /// Bits of a private exponent: twice the strength of the group, generously; RFC 3526 §8, RFC 7919 §5.2.
    exponent_bits: u32,
    prime: &'static str,
    params: OnceLock<Option<BoxedMontyParams>>,
}

/// The group of a method; `None` where it is not MODP, or not ours.
pub(super) fn group(method: Ke) -> Option<&'static Group> {
    match method {
        Ke::MODP_2048 => Some(&MODP_2048),
        Ke::MODP_3072 => Some(&MODP_3072),
        Ke::MODP_4096 => Some(&MODP_4096),
        _ => None,
    }
}

impl Group {
    /// Makes a private exponent and its public value.
    pub(super) fn generate(&self, rng: &mut dyn Rng) -> Result<(Secret, Vec<u8>), KeyError> {
        let mut exponent = Zeroizing::new(vec![0; bytes(self.exponent_bits)]);
        rng.fill(&mut exponent);
        // The top bit fixes the length, so that a source of zeros makes no exponent of 0.
        if let Some(top) = exponent.first_mut() {
            *top |= 0x80;
        }
        let exponent = Secret::new(std::mem::take(&mut *exponent));
        let public = self.power(&BoxedUint::from_be_slice_truncated(&[2], self.bits), &exponent)?;
        Ok((exponent, public))
    }

    /// The shared secret, as long as the modulus. The peer's value must be as long too, and
    /// 1 < y < p - 1 (RFC 6989 §2.1).
    pub(super) fn agree(&self, exponent: &Secret, peer: &[u8]) -> Result<Secret, KeyError> {
        if peer.len() != bytes(self.bits) {
            return Err(KeyError::PublicValue);
        }
        let peer = BoxedUint::from_be_slice(peer, self.bits).map_err(|_| KeyError::PublicValue)?;
        let one = BoxedUint::one_with_precision(self.bits);
        let prime: &BoxedUint = self.params()?.modulus().as_ref();
        if peer <= one || peer >= prime.wrapping_sub(&one) {
            return Err(KeyError::PublicValue);
        }
        self.power(&peer, exponent).map(Secret::new)
    }

    #[cfg(test)]
    pub(super) fn prime_octets(&self) -> Vec<u8> {
        BoxedUint::from_be_hex(self.prime, self.bits).unwrap().to_be_bytes().to_vec()
    }

    fn params(&self) -> Result<&BoxedMontyParams, KeyError> {
        self.params
            .get_or_init(|| {
                let prime = BoxedUint::from_be_hex(self.prime, self.bits).into_option()?;
                Some(BoxedMontyParams::new_vartime(Odd::new(prime).into_option()?))
            })
            .as_ref()
            .ok_or(KeyError::Unsupported)
    }

    /// `base ^ exponent mod p`, padded to the length of the modulus (RFC 7296 §2.14, §3.4). Constant time
    /// in the exponent.
    fn power(&self, base: &BoxedUint, exponent: &Secret) -> Result<Vec<u8>, KeyError> {
        let params = self.params()?;
        let exponent = Zeroizing::new(
            BoxedUint::from_be_slice(exponent.expose(), self.exponent_bits).map_err(|_| KeyError::Unsupported)?,
        );
        let power = Zeroizing::new(BoxedMontyForm::new(base.clone(), params).pow(&exponent));
        let power = Zeroizing::new(power.retrieve());
        Ok(Zeroizing::new(power.to_be_bytes()).to_vec())
    }
}

fn bytes(bits: u32) -> usize {
    bits.div_ceil(8).try_into().unwrap_or(usize::MAX)
}

static MODP_2048: Group = Group { bits: 2048, exponent_bits: 256, prime: P2048, params: OnceLock::new() };
static MODP_3072: Group = Group { bits: 3072, exponent_bits: 320, prime: P3072, params: OnceLock::new() };
static MODP_4096: Group = Group { bits: 4096, exponent_bits: 384, prime: P4096, params: OnceLock::new() };

const P2048: &str = "\
    FFFFFFFFFFFFFFFFC90FDAA22168C234C4C6628B80DC1CD129024E088A67CC74020BBEA63B139B22514A08798E3404DD\
    EF9519B3CD3A431B302B0A6DF25F14374FE1356D6D51C245E485B576625E7EC6F44C42E9A637ED6B0BFF5CB6F406B7ED\
    EE386BFB5A899FA5AE9F24117C4B1FE649286651ECE45B3DC2007CB8A163BF0598DA48361C55D39A69163FA8FD24CF5F\
    83655D23DCA3AD961C62F356208552BB9ED529077096966D670C354E4ABC9804F1746C08CA18217C32905E462E36CE3B\
    E39E772C180E86039B2783A2EC07A28FB5C55DF06F4C52C9DE2BCBF6955817183995497CEA956AE515D2261898FA0510\
    15728E5A8AACAA68FFFFFFFFFFFFFFFF\
";

const P3072: &str = "\
    FFFFFFFFFFFFFFFFC90FDAA22168C234C4C6628B80DC1CD129024E088A67CC74020BBEA63B139B22514A08798E3404DD\
    EF9519B3CD3A431B302B0A6DF25F14374FE1356D6D51C245E485B576625E7EC6F44C42E9A637ED6B0BFF5CB6F406B7ED\
    EE386BFB5A899FA5AE9F24117C4B1FE649286651ECE45B3DC2007CB8A163BF0598DA48361C55D39A69163FA8FD24CF5F\
    83655D23DCA3AD961C62F356208552BB9ED529077096966D670C354E4ABC9804F1746C08CA18217C32905E462E36CE3B\
    E39E772C180E86039B2783A2EC07A28FB5C55DF06F4C52C9DE2BCBF6955817183995497CEA956AE515D2261898FA0510\
    15728E5A8AAAC42DAD33170D04507A33A85521ABDF1CBA64ECFB850458DBEF0A8AEA71575D060C7DB3970F85A6E1E4C7\
    ABF5AE8CDB0933D71E8C94E04A25619DCEE3D2261AD2EE6BF12FFA06D98A0864D87602733EC86A64521F2B18177B200C\
    BBE117577A615D6C770988C0BAD946E208E24FA074E5AB3143DB5BFCE0FD108E4B82D120A93AD2CAFFFFFFFFFFFFFFFF\
";

const P4096: &str = "\
    FFFFFFFFFFFFFFFFC90FDAA22168C234C4C6628B80DC1CD129024E088A67CC74020BBEA63B139B22514A08798E3404DD\
    EF9519B3CD3A431B302B0A6DF25F14374FE1356D6D51C245E485B576625E7EC6F44C42E9A637ED6B0BFF5CB6F406B7ED\
    EE386BFB5A899FA5AE9F24117C4B1FE649286651ECE45B3DC2007CB8A163BF0598DA48361C55D39A69163FA8FD24CF5F\
    83655D23DCA3AD961C62F356208552BB9ED529077096966D670C354E4ABC9804F1746C08CA18217C32905E462E36CE3B\
    E39E772C180E86039B2783A2EC07A28FB5C55DF06F4C52C9DE2BCBF6955817183995497CEA956AE515D2261898FA0510\
    15728E5A8AAAC42DAD33170D04507A33A85521ABDF1CBA64ECFB850458DBEF0A8AEA71575D060C7DB3970F85A6E1E4C7\
    ABF5AE8CDB0933D71E8C94E04A25619DCEE3D2261AD2EE6BF12FFA06D98A0864D87602733EC86A64521F2B18177B200C\
    BBE117577A615D6C770988C0BAD946E208E24FA074E5AB3143DB5BFCE0FD108E4B82D120A92108011A723C12A787E6D7\
    88719A10BDBA5B2699C327186AF4E23C1A946834B6150BDA2583E9CA2AD44CE8DBBBC2DB04DE8EF92E8EFC141FBECAA6\
    287C59474E6BC05D99B2964FA090C3A2233BA186515BE7ED1F612970CEE2D7AFB81BDD762170481CD0069127D5B05AA9\
    93B4EA988D8FDDC186FFB7DC90A6C08F4DF435C934063199FFFFFFFFFFFFFFFF\
";
