//! Negotiated algorithms in the words of the kernel's crypto API.

use ipsec::plane::{EspKeys, EspSuite, PlaneError};
use ipsec::transform::{Encr, Integ};

use super::codec::{Algorithm, AlgorithmKind};

/// The kernel's algorithms for a suite with their keys.
pub(super) fn algorithms<'a>(suite: &EspSuite, keys: &'a EspKeys) -> Result<Vec<(Algorithm, &'a [u8])>, PlaneError> {
    let unsupported = || PlaneError::Unsupported {
        plane: super::NAME,
        what: format!("encryption {} ({} bits) with integrity {}", suite.encr.0, suite.key_bits, suite.integ.0),
    };
    let cipher = cipher(suite.encr).ok_or_else(unsupported)?;
    let salt = match (suite.encr, cipher.kind) {
        (Encr::AES_CCM_8 | Encr::AES_CCM_12 | Encr::AES_CCM_16, _) => 3,
        (Encr::AES_CTR, _) | (_, AlgorithmKind::Aead) => 4,
        _ => 0,
    };
    let key = keys.encr.expose();
    if key.len() != usize::from(suite.key_bits / 8) + salt {
        return Err(PlaneError::KeyLength("encryption"));
    }
    let mut algorithms = vec![(cipher, key)];
    match (cipher.kind, integrity(suite.integ)) {
        (AlgorithmKind::Aead, None) if suite.integ == Integ::NONE => {}
        (AlgorithmKind::Cipher, Some((algorithm, length))) => {
            let key = keys.integ.expose();
            if key.len() != length {
                return Err(PlaneError::KeyLength("integrity"));
            }
            algorithms.push((algorithm, key));
        }
        _ => return Err(unsupported()),
    }
    Ok(algorithms)
}

fn cipher(encr: Encr) -> Option<Algorithm> {
    let aead = |name, icv_bits| Algorithm { kind: AlgorithmKind::Aead, name, icv_bits };
    let plain = |name| Algorithm { kind: AlgorithmKind::Cipher, name, icv_bits: 0 };
    Some(match encr {
        Encr::NULL => plain("ecb(cipher_null)"),
        Encr::AES_CBC => plain("cbc(aes)"),
        Encr::AES_CTR => plain("rfc3686(ctr(aes))"),
        Encr::AES_CCM_8 => aead("rfc4309(ccm(aes))", 64),
        Encr::AES_CCM_12 => aead("rfc4309(ccm(aes))", 96),
        Encr::AES_CCM_16 => aead("rfc4309(ccm(aes))", 128),
        Encr::AES_GCM_8 => aead("rfc4106(gcm(aes))", 64),
        Encr::AES_GCM_12 => aead("rfc4106(gcm(aes))", 96),
        Encr::AES_GCM_16 => aead("rfc4106(gcm(aes))", 128),
        Encr::NULL_AUTH_AES_GMAC => aead("rfc4543(gcm(aes))", 128),
        Encr::CHACHA20_POLY1305 => aead("rfc7539esp(chacha20,poly1305)", 128),
        _ => return None,
    })
}

/// With the length of its key in octets.
fn integrity(integ: Integ) -> Option<(Algorithm, usize)> {
    let hash = |name, icv_bits| Algorithm { kind: AlgorithmKind::Integrity, name, icv_bits };
    Some(match integ {
        Integ::HMAC_SHA1_96 => (hash("hmac(sha1)", 96), 20),
        Integ::HMAC_SHA2_256_128 => (hash("hmac(sha256)", 128), 32),
        Integ::HMAC_SHA2_384_192 => (hash("hmac(sha384)", 192), 48),
        Integ::HMAC_SHA2_512_256 => (hash("hmac(sha512)", 256), 64),
        Integ::AES_CMAC_96 => (hash("cmac(aes)", 96), 16),
        _ => return None,
    })
}
