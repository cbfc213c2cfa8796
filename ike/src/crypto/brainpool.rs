//! Diffie-Hellman on the Brainpool curves (RFC 6954). AWS-LC lacks them; RustCrypto's arithmetic is meant to take
//! constant time, and nobody has audited it.

use bp256::BrainpoolP256r1;
use bp384::BrainpoolP384r1;
use elliptic_curve::sec1::{FromSec1Point, ModulusSize, ToSec1Point};
use elliptic_curve::{AffinePoint, CurveArithmetic, FieldBytesSize, PublicKey, SecretKey, ecdh};
use ipsec::secret::Secret;
use ipsec::transform::Ke;
use zeroize::Zeroizing;

use super::KeyError;
use super::kex::{ATTEMPTS, SEC1_UNCOMPRESSED};
use crate::Rng;

/// A private value; used once.
pub(super) enum Private {
    P256(SecretKey<BrainpoolP256r1>),
    P384(SecretKey<BrainpoolP384r1>),
}

/// True for the methods of this module.
pub(super) fn supported(method: Ke) -> bool {
    matches!(method, Ke::BRAINPOOL_256 | Ke::BRAINPOOL_384)
}

/// Makes a private value and its public value, x | y (RFC 6954 §2.3).
pub(super) fn generate(method: Ke, rng: &mut dyn Rng) -> Result<(Private, Vec<u8>), KeyError> {
    match method {
        Ke::BRAINPOOL_256 => draw(32, rng).map(|(private, public)| (Private::P256(private), public)),
        Ke::BRAINPOOL_384 => draw(48, rng).map(|(private, public)| (Private::P384(private), public)),
        _ => Err(KeyError::Unsupported),
    }
}

/// Checks that the peer's value is as long as it must be and a point of the curve (RFC 6989 §2.3).
pub(super) fn check(method: Ke, peer: &[u8]) -> Result<(), KeyError> {
    match method {
        Ke::BRAINPOOL_256 => point::<BrainpoolP256r1>(peer).map(|_| ()),
        Ke::BRAINPOOL_384 => point::<BrainpoolP384r1>(peer).map(|_| ()),
        _ => Err(KeyError::Unsupported),
    }
}

impl Private {
    /// The shared secret, the x of the product (RFC 6954 §2.4), after the same checks.
    pub(super) fn agree(&self, peer: &[u8]) -> Result<Secret, KeyError> {
        match self {
            Self::P256(private) => product(private, peer),
            Self::P384(private) => product(private, peer),
        }
    }
}

fn draw<C>(length: usize, rng: &mut dyn Rng) -> Result<(SecretKey<C>, Vec<u8>), KeyError>
where
    C: CurveArithmetic,
    AffinePoint<C>: FromSec1Point<C> + ToSec1Point<C>,
    FieldBytesSize<C>: ModulusSize,
{
    let mut scalar = Zeroizing::new(vec![0; length]);
    for _ in 0..ATTEMPTS {
        rng.fill(&mut scalar);
        // Refused outside 1..order, so that accepted ones are uniform.
        if let Ok(private) = SecretKey::<C>::from_slice(&scalar) {
            let public = private.public_key().to_sec1_point(false);
            let point = public.as_bytes().strip_prefix(&[SEC1_UNCOMPRESSED]).ok_or(KeyError::Unsupported)?;
            return Ok((private, point.to_vec()));
        }
    }
    Err(KeyError::Unsupported)
}

fn point<C>(peer: &[u8]) -> Result<PublicKey<C>, KeyError>
where
    C: CurveArithmetic,
    AffinePoint<C>: FromSec1Point<C> + ToSec1Point<C>,
    FieldBytesSize<C>: ModulusSize,
{
    // With this first octet the library takes one length only.
    let encoded = [&[SEC1_UNCOMPRESSED], peer].concat();
    PublicKey::from_sec1_bytes(&encoded).map_err(|_| KeyError::PublicValue)
}

fn product<C>(private: &SecretKey<C>, peer: &[u8]) -> Result<Secret, KeyError>
where
    C: CurveArithmetic,
    AffinePoint<C>: FromSec1Point<C> + ToSec1Point<C>,
    FieldBytesSize<C>: ModulusSize,
{
    let peer = point::<C>(peer)?;
    let shared = ecdh::diffie_hellman(private.to_nonzero_scalar(), peer.as_affine());
    Ok(Secret::new(shared.raw_secret_bytes().to_vec()))
}
