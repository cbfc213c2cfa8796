//! The pseudorandom function and prf+ (RFC 7296 §2.13).

use aws_lc_rs::cmac;
use hmac::digest::KeyInit;
use hmac::{EagerHash, Hmac, Mac};
use ipsec::secret::Secret;
use ipsec::transform::Prf;
use sha1::Sha1;
use sha2::{Sha256, Sha384, Sha512};

use super::KeyError;

/// Computes `prf(key, parts…)`, the parts concatenated. Keys may be of any length (RFC 2104 §2, RFC 4615 §3).
pub fn prf(algorithm: Prf, key: &[u8], parts: &[&[u8]]) -> Result<Secret, KeyError> {
    match algorithm {
        Prf::HMAC_SHA1 => hmac::<Sha1>(key, parts),
        Prf::HMAC_SHA2_256 => hmac::<Sha256>(key, parts),
        Prf::HMAC_SHA2_384 => hmac::<Sha384>(key, parts),
        Prf::HMAC_SHA2_512 => hmac::<Sha512>(key, parts),
        Prf::AES128_CMAC => cmac_prf(key, parts),
        _ => Err(KeyError::Unsupported),
    }
}

fn hmac<D: EagerHash>(key: &[u8], parts: &[&[u8]]) -> Result<Secret, KeyError>
where
    Hmac<D>: KeyInit + Mac,
{
    let mut mac = <Hmac<D> as KeyInit>::new_from_slice(key).map_err(|_| KeyError::Unsupported)?;
    for part in parts {
        mac.update(part);
    }
    Ok(Secret::new(mac.finalize().into_bytes().to_vec()))
}

/// AES-CMAC-PRF-128 (RFC 4615 §3): a key of another length than 128 bits is first made into one.
fn cmac_prf(key: &[u8], parts: &[&[u8]]) -> Result<Secret, KeyError> {
    if key.len() == CMAC_KEY_LEN {
        return cmac(key, parts);
    }
    let key = cmac(&[0; CMAC_KEY_LEN], &[key])?;
    cmac(key.expose(), parts)
}

const CMAC_KEY_LEN: usize = 16;

fn cmac(key: &[u8], parts: &[&[u8]]) -> Result<Secret, KeyError> {
    let key = cmac::Key::new(cmac::AES_128, key).map_err(|_| KeyError::Unsupported)?;
    let mut context = cmac::Context::with_key(&key);
    for part in parts {
        context.update(part).map_err(|_| KeyError::Unsupported)?;
    }
    let tag = context.sign().map_err(|_| KeyError::Unsupported)?;
    Ok(Secret::new(tag.as_ref().to_vec()))
}

/// What of a nonce is the key of SKEYSEED (RFC 7296 §2.14): all of it, but for the PRF with a fixed key only
/// the first 64 bits.
pub(super) fn nonce_as_key(algorithm: Prf, nonce: &[u8]) -> &[u8] {
    match algorithm {
        Prf::AES128_CMAC => nonce.get(..8).unwrap_or(nonce),
        _ => nonce,
    }
}

/// Length of a PRF's key and output in octets; `None` where we lack it.
pub fn prf_len(algorithm: Prf) -> Option<usize> {
    match algorithm {
        Prf::HMAC_SHA1 => Some(20),
        Prf::HMAC_SHA2_256 => Some(32),
        Prf::HMAC_SHA2_384 => Some(48),
        Prf::HMAC_SHA2_512 => Some(64),
        Prf::AES128_CMAC => Some(CMAC_KEY_LEN),
        _ => None,
    }
}

/// Computes `length` octets of `prf+(key, seed)`, the seed's parts concatenated: T1 = prf(K, S | 0x01),
/// Tn = prf(K, Tn-1 | S | n). More than 255 blocks are `Unsupported`, as the RFC defines none.
///
/// With the HMAC PRFs it is HKDF-Expand (RFC 5869 §2.3), but IKEv2 also has keys shorter than the hash.
pub fn prf_plus(algorithm: Prf, key: &[u8], seed: &[&[u8]], length: usize) -> Result<Secret, KeyError> {
    let mut out = zeroize::Zeroizing::new(Vec::with_capacity(length));
    let mut block: Option<Secret> = None;
    let mut counter: u8 = 0;
    while out.len() < length {
        counter = counter.checked_add(1).ok_or(KeyError::Unsupported)?;
        let count = [counter];
        let mut parts = Vec::with_capacity(seed.len().saturating_add(2));
        parts.extend(block.as_ref().map(Secret::expose));
        parts.extend_from_slice(seed);
        parts.push(&count);
        let next = prf(algorithm, key, &parts)?;
        // Never more than `length`: growing would leave a copy of the secret behind.
        let wanted = length.saturating_sub(out.len()).min(next.expose().len());
        out.extend_from_slice(next.expose().get(..wanted).unwrap_or_default());
        block = Some(next);
    }
    Ok(Secret::new(std::mem::take(&mut *out)))
}
