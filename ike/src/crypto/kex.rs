//! Key exchange (RFC 7296 §2.8): X25519 (RFC 7748, 8031), ECP (RFC 5903, 6954), MODP (RFC 3526), and ML-KEM
//! (FIPS 203), first or additional (RFC 9370).
//!
//! The two sides differ with a KEM, so they have an API each, for all methods alike:
//!
//! * the initiator of the exchange calls [`KeyExchange::generate`], sends [`KeyExchange::public`] and gives
//!   the answer to [`KeyExchange::agree`];
//! * the responder gives what came to [`respond`], which returns what to send back and the secret; or to
//!   [`answer`], which leaves the secret for later ([`Pending::finish`]).
//!
//! All of them consume or make the private value, so that none serves twice (RFC 7296 §2.12).
//!
//! Private values come from the caller's [`Rng`], so that simulations repeat; those of ML-KEM come from
//! AWS-LC's own generator, because its interface takes no randomness.

use std::fmt;

use aws_lc_rs::agreement::{
    self, Algorithm, ECDH_P256, ECDH_P384, ECDH_P521, ParsedPublicKey, PrivateKey, UnparsedPublicKey,
};
use aws_lc_rs::kem::{self, DecapsulationKey, EncapsulationKey, ML_KEM_512, ML_KEM_768, ML_KEM_1024};
use ipsec::secret::Secret;
use ipsec::transform::Ke;
use zeroize::Zeroizing;

use super::{KeyError, brainpool, modp};
use crate::Rng;

/// The private value of a key exchange's initiator; used once.
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
    Brainpool(brainpool::Private),
    Kem(DecapsulationKey),
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

pub(super) const SEC1_UNCOMPRESSED: u8 = 4;

/// A scalar misses the order of its curve at most every second time, of these curves far more rarely;
/// a source of randomness that misses so often is broken.
pub(super) const ATTEMPTS: usize = 128;

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

/// A KEM and the length of its ciphertexts in octets.
fn kem(method: Ke) -> Option<(&'static kem::Algorithm, usize)> {
    match method {
        Ke::ML_KEM_512 => Some((&ML_KEM_512, 768)),
        Ke::ML_KEM_768 => Some((&ML_KEM_768, 1088)),
        Ke::ML_KEM_1024 => Some((&ML_KEM_1024, 1568)),
        _ => None,
    }
}

/// True for the methods that [`KeyExchange`] has.
pub fn supported(method: Ke) -> bool {
    let elliptic = curve(method).is_some() || brainpool::supported(method);
    elliptic || modp::group(method).is_some() || kem(method).is_some()
}

/// The responder's side: checks the initiator's public value, and gives our answer for the KE payload (a
/// public value, or a KEM's ciphertext) with the shared secret.
///
/// [`KeyError::PublicValue`] where the initiator's value fails the checks of [`KeyExchange::agree`] or, with
/// ML-KEM, those of FIPS 203 §7.2: the length and the modulus. The peer is then told INVALID_SYNTAX.
pub fn respond(method: Ke, peer: &[u8], rng: &mut dyn Rng) -> Result<(Vec<u8>, Secret), KeyError> {
    let (public, pending) = answer(method, peer, rng)?;
    Ok((public, pending.finish()?))
}

/// The first half of [`respond`]: checks the initiator's public value as far as that costs little, and gives
/// our answer. A stranger gets no more than that; the other half waits until it shows that it got the answer.
pub fn answer(method: Ke, peer: &[u8], rng: &mut dyn Rng) -> Result<(Vec<u8>, Pending), KeyError> {
    if let Some((algorithm, ciphertext_len)) = kem(method) {
        // Both steps check: the first the length, the second that each coefficient is below the modulus.
        let peer = EncapsulationKey::new(algorithm, peer).map_err(|_| KeyError::PublicValue)?;
        let (ciphertext, secret) = peer.encapsulate().map_err(|_| KeyError::PublicValue)?;
        let ciphertext = ciphertext.as_ref().to_vec();
        if ciphertext.len() != ciphertext_len {
            return Err(KeyError::Unsupported);
        }
        return Ok((ciphertext, Pending(Half::Done(Secret::new(secret.as_ref().to_vec())))));
    }
    check(method, peer)?;
    let ours = KeyExchange::generate(method, rng)?;
    Ok((ours.public.clone(), Pending(Half::Agree { ours, peer: peer.to_vec() })))
}

/// Checks a public value without a private one; what remains for [`KeyExchange::agree`] is X25519's zero.
fn check(method: Ke, peer: &[u8]) -> Result<(), KeyError> {
    if let Some(group) = modp::group(method) {
        return group.check(peer).map(|_| ());
    }
    if brainpool::supported(method) {
        return brainpool::check(method, peer);
    }
    let curve = curve(method).ok_or(KeyError::Unsupported)?;
    if peer.len() != curve.public_len {
        return Err(KeyError::PublicValue);
    }
    let point = UnparsedPublicKey::new(curve.algorithm, encoded(&curve, peer));
    ParsedPublicKey::try_from(point).map(|_| ()).map_err(|_| KeyError::PublicValue)
}

/// A public value as the library reads it.
fn encoded(curve: &Curve, public: &[u8]) -> Vec<u8> {
    let mut point = Vec::with_capacity(public.len().saturating_add(1));
    if curve.sec1 {
        point.push(SEC1_UNCOMPRESSED);
    }
    point.extend_from_slice(public);
    point
}

/// What a responder needs to compute the shared secret of an exchange that it has answered.
pub struct Pending(Half);

enum Half {
    /// A KEM's is there with the ciphertext.
    Done(Secret),
    Agree {
        ours: KeyExchange,
        peer: Vec<u8>,
    },
}

impl fmt::Debug for Pending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pending")
    }
}

impl Pending {
    /// The shared secret; [`KeyError::PublicValue`] as with [`respond`].
    pub fn finish(self) -> Result<Secret, KeyError> {
        match self.0 {
            Half::Done(secret) => Ok(secret),
            Half::Agree { ours, peer } => ours.agree(&peer),
        }
    }
}

impl KeyExchange {
    /// Makes a key pair, from `rng` but for ML-KEM.
    pub fn generate(method: Ke, rng: &mut dyn Rng) -> Result<Self, KeyError> {
        if let Some((algorithm, _)) = kem(method) {
            let private = DecapsulationKey::generate(algorithm).map_err(|_| KeyError::Unsupported)?;
            let public = private.encapsulation_key().and_then(|key| key.key_bytes());
            let public = public.map_err(|_| KeyError::Unsupported)?.as_ref().to_vec();
            return Ok(Self { method, public, private: Private::Kem(private) });
        }
        if let Some(group) = modp::group(method) {
            let (exponent, public) = group.generate(rng)?;
            return Ok(Self { method, public, private: Private::Modp(group, exponent) });
        }
        if brainpool::supported(method) {
            let (private, public) = brainpool::generate(method, rng)?;
            return Ok(Self { method, public, private: Private::Brainpool(private) });
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
    /// (RFC 5903 §7); X25519: a result other than 0 (RFC 7748 §6.1); ML-KEM: the length alone (FIPS 203
    /// §7.3), since a ciphertext that was not made for our key gives a secret that nobody else has.
    pub fn agree(self, peer: &[u8]) -> Result<Secret, KeyError> {
        let private = match self.private {
            Private::Modp(group, exponent) => return group.agree(&exponent, peer),
            Private::Brainpool(private) => return private.agree(peer),
            Private::Kem(private) => return decapsulate(self.method, &private, peer),
            Private::Curve(private) => private,
        };
        let curve = curve(self.method).ok_or(KeyError::Unsupported)?;
        if peer.len() != curve.public_len {
            return Err(KeyError::PublicValue);
        }
        let peer = UnparsedPublicKey::new(curve.algorithm, encoded(&curve, peer));
        agreement::agree(&private, peer, KeyError::PublicValue, |shared| {
            // The library refuses 0 already; an all-zero secret must not depend on its version.
            if !curve.sec1 && shared.iter().fold(0, |all, octet| all | octet) == 0 {
                return Err(KeyError::PublicValue);
            }
            Ok(Secret::new(shared.to_vec()))
        })
    }
}

fn decapsulate(method: Ke, private: &DecapsulationKey, ciphertext: &[u8]) -> Result<Secret, KeyError> {
    let (_, length) = kem(method).ok_or(KeyError::Unsupported)?;
    if ciphertext.len() != length {
        return Err(KeyError::PublicValue);
    }
    let secret = private.decapsulate(ciphertext.into()).map_err(|_| KeyError::PublicValue)?;
    Ok(Secret::new(secret.as_ref().to_vec()))
}
