//! Key exchange (RFC 7296 §2.8): X25519 (RFC 7748, 8031), ECP (RFC 5903), MODP (RFC 3526).
//!
//! Private values come from the caller's [`Rng`], never from a library's, so that simulations repeat.

use std::fmt;

use aws_lc_rs::agreement::{self, Algorithm, ECDH_P256, ECDH_P384, ECDH_P521, PrivateKey, UnparsedPublicKey};
use ipsec::secret::Secret;
use ipsec::transform::Ke;
use zeroize::Zeroizing;

use super::{KeyError, modp};
use crate::Rng;

/// One side's private value of a key exchange; used once.
pub struct KeyExchange {
    method: Ke,
    public: Vec<u8>,
    private: Private,
}

impl fmt::Debug for KeyExchange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyExchange").field("method", &self.method).finish_non_exhaustive()
    }
}

enum Private {
    Curve(PrivateKey),
    Modp(&'static modp::Group, Secret),
}

/// A curve and how its keys look.
struct Curve {
    algorithm: &'static Algorithm,
    private_len: usize,
    public_len: usize,
    /// Mask for the first octet of a scalar: the order of P-521 has 521 bits, not 528.
    top: u8,
    /// Public values go on the wire without SEC 1's first octet, 4 for "uncompressed" (RFC 5903 §7).
    sec1: bool,
}

const SEC1_UNCOMPRESSED: u8 = 4;

/// A scalar misses the order of its curve at most every second time, of these curves far more rarely;
/// a source of randomness that misses so often is broken.
const ATTEMPTS: usize = 128;

fn curve(method: Ke) -> Option<Curve> {
    let (algorithm, private_len, public_len, top, sec1) = match method {
        Ke::X25519 => (&agreement::X25519, 32, 32, 0xff, false),
        Ke::ECP_256 => (&ECDH_P256, 32, 64, 0xff, true),
        Ke::ECP_384 => (&ECDH_P384, 48, 96, 0xff, true),
        Ke::ECP_521 => (&ECDH_P521, 66, 132, 0x01, true),
        _ => return None,
    };
    Some(Curve { algorithm, private_len, public_len, top, sec1 })
}

/// True for the methods that [`KeyExchange`] has.
pub(super) fn supported(method: Ke) -> bool {
    curve(method).is_some() || modp::group(method).is_some()
}

impl KeyExchange {
    /// Makes a key pair from `rng`.
    pub fn generate(method: Ke, rng: &mut dyn Rng) -> Result<Self, KeyError> {
        if let Some(group) = modp::group(method) {
            let (exponent, public) = group.generate(rng)?;
            return Ok(Self { method, public, private: Private::Modp(group, exponent) });
        }
        let curve = curve(method).ok_or(KeyError::Unsupported)?;
        let mut scalar = Zeroizing::new(vec![0; curve.private_len]);
        for _ in 0..ATTEMPTS {
            rng.fill(&mut scalar);
            if let Some(top) = scalar.first_mut() {
                *top &= curve.top;
            }
            // Refused outside 1..order, so that accepted ones are uniform.
            if let Ok(exchange) = Self::from_scalar(method, &curve, &scalar) {
                return Ok(exchange);
            }
        }
        Err(KeyError::Unsupported)
    }

    fn from_scalar(method: Ke, curve: &Curve, scalar: &[u8]) -> Result<Self, KeyError> {
        let private = PrivateKey::from_private_key(curve.algorithm, scalar).map_err(|_| KeyError::Unsupported)?;
        let public = private.compute_public_key().map_err(|_| KeyError::Unsupported)?;
        let public = match public.as_ref() {
            [SEC1_UNCOMPRESSED, point @ ..] if curve.sec1 => point,
            point => point,
        };
        if public.len() != curve.public_len {
            return Err(KeyError::Unsupported);
        }
        Ok(Self { method, public: public.to_vec(), private: Private::Curve(private) })
    }

    /// The method.
    pub fn method(&self) -> Ke {
        self.method
    }

    /// Our public value as the KE payload carries it.
    pub fn public(&self) -> &[u8] {
        &self.public
    }

    /// The shared secret g^ir, after the peer's value has passed its checks: its length; MODP:
    /// 1 < y < p - 1 (RFC 6989 §2.1); ECP: a point of the curve (§2.3), of whose product x is the secret
    /// (RFC 5903 §7); X25519: a result other than 0 (RFC 7748 §6.1).
    pub fn agree(self, peer: &[u8]) -> Result<Secret, KeyError> {
        let private = match self.private {
            Private::Modp(group, exponent) => return group.agree(&exponent, peer),
            Private::Curve(private) => private,
        };
        let curve = curve(self.method).ok_or(KeyError::Unsupported)?;
        if peer.len() != curve.public_len {
            return Err(KeyError::PublicValue);
        }
        let mut point = Vec::with_capacity(peer.len().saturating_add(1));
        if curve.sec1 {
            point.push(SEC1_UNCOMPRESSED);
        }
        point.extend_from_slice(peer);
        let peer = UnparsedPublicKey::new(curve.algorithm, point);
        agreement::agree(&private, peer, KeyError::PublicValue, |shared| {
            // The library refuses 0 already; an all-zero secret must not depend on its version.
            if !curve.sec1 && shared.iter().fold(0, |all, octet| all | octet) == 0 {
                return Err(KeyError::PublicValue);
            }
            Ok(Secret::new(shared.to_vec()))
        })
    }
}
