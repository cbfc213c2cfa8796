//! Protection of octets by a negotiated cipher and integrity algorithm: one code path for ESP packets
//! (RFC 4303 §3.3.2) and IKE's Encrypted payload (RFC 7296 §3.14, RFC 5282).

use std::fmt;

use aws_lc_rs::aead::{self, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::cipher::{self, DecryptingKey, DecryptionContext, EncryptingKey, EncryptionContext, UnboundCipherKey};
use aws_lc_rs::hmac;
use subtle::ConstantTimeEq;

use crate::plane::EspKeys;
use crate::transform::{Encr, Integ};

/// Lengths in octets of the keys of one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyLengths {
    /// Encryption key, with the salt of a combined-mode cipher.
    pub encr: usize,
    /// Integrity key.
    pub integ: usize,
}

/// Why octets could not be protected or unprotected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CryptoError {
    /// No such algorithm or combination.
    #[error("unsupported combination of algorithms")]
    Unsupported,
    /// A key has a wrong length.
    #[error("wrong key length")]
    KeyLength,
    /// The integrity check value does not match.
    #[error("integrity check failed")]
    Integrity,
    /// An IV, text or ICV buffer has an impossible length.
    #[error("wrong buffer length")]
    Length,
}

/// A cipher and integrity algorithm bound to the keys of one direction. Shared by threads.
pub struct Protection {
    algorithm: Algorithm,
}

enum Algorithm {
    /// The nonce is salt | explicit IV (RFC 4106 §4, RFC 7634 §2).
    Aead {
        key: LessSafeKey,
        salt: [u8; SALT_LEN],
    },
    Separate(Box<Separate>),
}

/// Encrypt, then MAC over aad | IV | ciphertext | suffix (RFC 4303 §3.3.2.1).
struct Separate {
    /// `None` is ENCR_NULL.
    cipher: Option<Cbc>,
    mac: hmac::Key,
    icv_len: usize,
}

struct Cbc {
    encrypting: EncryptingKey,
    decrypting: DecryptingKey,
}

/// What a suite consists of, before keys.
enum Shape {
    Aead(&'static aead::Algorithm),
    Separate { cipher: Option<&'static cipher::Algorithm>, cipher_key_len: usize, mac: MacShape },
}

struct MacShape {
    algorithm: hmac::Algorithm,
    key_len: usize,
    icv_len: usize,
}

const SALT_LEN: usize = 4;
const AEAD_IV_LEN: usize = 8;
const AEAD_ICV_LEN: usize = 16;
const AES_BLOCK_LEN: usize = 16;

fn shape(encr: Encr, key_bits: u16, integ: Integ) -> Option<Shape> {
    let aead = |algorithm| (integ == Integ::NONE).then_some(Shape::Aead(algorithm));
    match (encr, key_bits) {
        (Encr::AES_GCM_16, 128) => aead(&aead::AES_128_GCM),
        (Encr::AES_GCM_16, 192) => aead(&aead::AES_192_GCM),
        (Encr::AES_GCM_16, 256) => aead(&aead::AES_256_GCM),
        (Encr::CHACHA20_POLY1305, 256) => aead(&aead::CHACHA20_POLY1305),
        (Encr::AES_CBC, 128) => separate(Some(&cipher::AES_128), 16, integ),
        (Encr::AES_CBC, 192) => separate(Some(&cipher::AES_192), 24, integ),
        (Encr::AES_CBC, 256) => separate(Some(&cipher::AES_256), 32, integ),
        (Encr::NULL, 0) => separate(None, 0, integ),
        _ => None,
    }
}

fn separate(cipher: Option<&'static cipher::Algorithm>, cipher_key_len: usize, integ: Integ) -> Option<Shape> {
    // Key and ICV lengths: RFC 2404 §2, RFC 4868 §2.1.1 and §2.3.
    let mac = match integ {
        Integ::HMAC_SHA1_96 => MacShape { algorithm: hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY, key_len: 20, icv_len: 12 },
        Integ::HMAC_SHA2_256_128 => MacShape { algorithm: hmac::HMAC_SHA256, key_len: 32, icv_len: 16 },
        Integ::HMAC_SHA2_384_192 => MacShape { algorithm: hmac::HMAC_SHA384, key_len: 48, icv_len: 24 },
        Integ::HMAC_SHA2_512_256 => MacShape { algorithm: hmac::HMAC_SHA512, key_len: 64, icv_len: 32 },
        _ => return None,
    };
    Some(Shape::Separate { cipher, cipher_key_len, mac })
}

impl Protection {
    /// Lengths of the keys for a suite; `None` where we lack it or the combination is nonsense
    /// (a combined-mode cipher with an integrity algorithm, a plain cipher without one).
    /// `key_bits` is 256 for ChaCha20-Poly1305 and 0 for ENCR_NULL.
    pub fn key_lengths(encr: Encr, key_bits: u16, integ: Integ) -> Option<KeyLengths> {
        Some(match shape(encr, key_bits, integ)? {
            Shape::Aead(algorithm) => KeyLengths { encr: algorithm.key_len() + SALT_LEN, integ: 0 },
            Shape::Separate { cipher_key_len, mac, .. } => KeyLengths { encr: cipher_key_len, integ: mac.key_len },
        })
    }

    /// Binds keys.
    pub fn new(encr: Encr, key_bits: u16, integ: Integ, keys: &EspKeys) -> Result<Self, CryptoError> {
        let lengths = Self::key_lengths(encr, key_bits, integ).ok_or(CryptoError::Unsupported)?;
        let (encr_key, integ_key) = (keys.encr.expose(), keys.integ.expose());
        if encr_key.len() != lengths.encr || integ_key.len() != lengths.integ {
            return Err(CryptoError::KeyLength);
        }
        let algorithm = match shape(encr, key_bits, integ).ok_or(CryptoError::Unsupported)? {
            Shape::Aead(algorithm) => {
                let (key, salt) = encr_key.split_last_chunk::<SALT_LEN>().ok_or(CryptoError::KeyLength)?;
                let key = UnboundKey::new(algorithm, key).map_err(|_| CryptoError::KeyLength)?;
                Algorithm::Aead { key: LessSafeKey::new(key), salt: *salt }
            }
            Shape::Separate { cipher, mac, .. } => {
                let cipher = match cipher {
                    None => None,
                    Some(algorithm) => {
                        let key = || UnboundCipherKey::new(algorithm, encr_key).map_err(|_| CryptoError::KeyLength);
                        Some(Cbc {
                            encrypting: EncryptingKey::cbc(key()?).map_err(|_| CryptoError::Unsupported)?,
                            decrypting: DecryptingKey::cbc(key()?).map_err(|_| CryptoError::Unsupported)?,
                        })
                    }
                };
                let mac_key = hmac::Key::new(mac.algorithm, integ_key);
                Algorithm::Separate(Box::new(Separate { cipher, mac: mac_key, icv_len: mac.icv_len }))
            }
        };
        Ok(Self { algorithm })
    }

    /// Octets of explicit IV before the text (8 for AEADs, 16 for CBC, 0 for ENCR_NULL).
    pub fn iv_len(&self) -> usize {
        match &self.algorithm {
            Algorithm::Aead { .. } => AEAD_IV_LEN,
            Algorithm::Separate(separate) if separate.cipher.is_some() => AES_BLOCK_LEN,
            Algorithm::Separate(_) => 0,
        }
    }

    /// Octets of integrity check value after the text.
    pub fn icv_len(&self) -> usize {
        match &self.algorithm {
            Algorithm::Aead { .. } => AEAD_ICV_LEN,
            Algorithm::Separate(separate) => separate.icv_len,
        }
    }

    /// The text's length must be a multiple of this (16 for CBC, 1 for AEADs and ENCR_NULL).
    pub fn block_len(&self) -> usize {
        if self.needs_random_iv() { AES_BLOCK_LEN } else { 1 }
    }

    /// True for ciphers whose IV must be unpredictable (CBC); false where a counter serves (AEADs).
    pub fn needs_random_iv(&self) -> bool {
        matches!(&self.algorithm, Algorithm::Separate(separate) if separate.cipher.is_some())
    }

    /// True for combined-mode ciphers: the high half of an extended sequence number then belongs into the
    /// AAD between SPI and low half (RFC 4106 §5, RFC 7634 §2.1), otherwise into the suffix.
    pub fn is_combined_mode(&self) -> bool {
        matches!(&self.algorithm, Algorithm::Aead { .. })
    }

    /// Encrypts `text` in place and writes the integrity check value.
    ///
    /// `aad` is what comes before the IV (ESP: SPI and sequence number, with the high half inside for
    /// AEADs with ESN; IKE: from the IKE header to the Encrypted payload's generic header). `suffix` is
    /// authenticated after the ciphertext by non-AEADs only (the high sequence half, RFC 4303 §2.2.1).
    pub fn seal(
        &self,
        aad: &[u8],
        suffix: &[u8],
        iv: &[u8],
        text: &mut [u8],
        icv: &mut [u8],
    ) -> Result<(), CryptoError> {
        self.check_lengths(iv, text, icv)?;
        match &self.algorithm {
            Algorithm::Aead { key, salt } => {
                let nonce = nonce(salt, iv)?;
                let tag =
                    key.seal_in_place_separate_tag(nonce, Aad::from(aad), text).map_err(|_| CryptoError::Length)?;
                icv.copy_from_slice(tag.as_ref());
            }
            Algorithm::Separate(separate) => {
                if let Some(Cbc { encrypting, .. }) = &separate.cipher {
                    let context = EncryptionContext::Iv128(iv.try_into().map_err(|_| CryptoError::Length)?);
                    encrypting.less_safe_encrypt(text, context).map_err(|_| CryptoError::Length)?;
                }
                let tag = sign(&separate.mac, &[aad, iv, text, suffix]);
                icv.copy_from_slice(tag.as_ref().get(..separate.icv_len).ok_or(CryptoError::Length)?);
            }
        }
        Ok(())
    }

    /// Checks the integrity check value, then decrypts `text` in place. On error `text` holds no plaintext.
    pub fn open(&self, aad: &[u8], suffix: &[u8], iv: &[u8], text: &mut [u8], icv: &[u8]) -> Result<(), CryptoError> {
        self.check_lengths(iv, text, icv)?;
        match &self.algorithm {
            Algorithm::Aead { key, salt } => {
                let nonce = nonce(salt, iv)?;
                if key.open_in_place_separate_tag(nonce, Aad::from(aad), icv, text).is_err() {
                    // The library leaves the buffer unspecified on failure.
                    text.fill(0);
                    return Err(CryptoError::Integrity);
                }
            }
            Algorithm::Separate(separate) => {
                let tag = sign(&separate.mac, &[aad, iv, text, suffix]);
                let expected = tag.as_ref().get(..separate.icv_len).ok_or(CryptoError::Length)?;
                if !bool::from(expected.ct_eq(icv)) {
                    return Err(CryptoError::Integrity);
                }
                if let Some(Cbc { decrypting, .. }) = &separate.cipher {
                    let context = DecryptionContext::Iv128(iv.try_into().map_err(|_| CryptoError::Length)?);
                    decrypting.decrypt(text, context).map_err(|_| CryptoError::Length)?;
                }
            }
        }
        Ok(())
    }

    fn check_lengths(&self, iv: &[u8], text: &[u8], icv: &[u8]) -> Result<(), CryptoError> {
        let right =
            iv.len() == self.iv_len() && icv.len() == self.icv_len() && text.len().is_multiple_of(self.block_len());
        if right { Ok(()) } else { Err(CryptoError::Length) }
    }
}

impl fmt::Debug for Protection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Protection").field("iv_len", &self.iv_len()).field("icv_len", &self.icv_len()).finish()
    }
}

fn nonce(salt: &[u8; SALT_LEN], iv: &[u8]) -> Result<Nonce, CryptoError> {
    let mut nonce = [0; SALT_LEN + AEAD_IV_LEN];
    let (first, second) = nonce.split_at_mut(SALT_LEN);
    first.copy_from_slice(salt);
    second.copy_from_slice(iv.get(..AEAD_IV_LEN).ok_or(CryptoError::Length)?);
    Ok(Nonce::assume_unique_for_key(nonce))
}

fn sign(key: &hmac::Key, parts: &[&[u8]]) -> hmac::Tag {
    let mut context = hmac::Context::with_key(key);
    for part in parts {
        context.update(part);
    }
    context.sign()
}

#[cfg(test)]
pub(crate) mod tests;
