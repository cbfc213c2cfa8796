//! Protection of octets by a negotiated cipher and integrity algorithm: one code path for ESP packets
//! (RFC 4303 §3.3.2) and IKE's Encrypted payload (RFC 7296 §3.14, RFC 5282).

mod portable;

use std::fmt;

use aws_lc_rs::aead::{self, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::cipher::{self, DecryptingKey, DecryptionContext, EncryptingKey, EncryptionContext, UnboundCipherKey};
use aws_lc_rs::{cmac, hmac};
use subtle::ConstantTimeEq;

use self::portable::{CCM_SALT_LEN, Portable};
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
    Aead { key: LessSafeKey, salt: [u8; SALT_LEN] },
    /// The same with an empty text: everything is associated data (RFC 4543 §3).
    Gmac { key: LessSafeKey, salt: [u8; SALT_LEN] },
    /// An AEAD that AWS-LC lacks.
    Portable(Portable),
    /// A cipher and a MAC.
    Separate(Box<Separate>),
}

/// Encrypt, then MAC over aad | IV | ciphertext | suffix (RFC 4303 §3.3.2.1).
struct Separate {
    cipher: Cipher,
    mac: Mac,
    icv_len: usize,
}

#[allow(clippy::large_enum_variant, reason = "lies in a box already; the large one is the usual one")]
enum Cipher {
    /// ENCR_NULL.
    Null,
    Cbc {
        encrypting: EncryptingKey,
        decrypting: DecryptingKey,
    },
    /// Encrypting and decrypting are one (RFC 3686 §2.1); the nonce is the salt of the keys (§5.1).
    Ctr {
        key: EncryptingKey,
        nonce: [u8; SALT_LEN],
    },
}

#[allow(clippy::large_enum_variant, reason = "lies in a box already; the large one is the usual one")]
enum Mac {
    Hmac(hmac::Key),
    Cmac(cmac::Key),
}

/// What a suite consists of, before keys.
enum Shape {
    Aead(&'static aead::Algorithm),
    Gmac(&'static aead::Algorithm),
    Portable { salt_len: usize, icv_len: usize },
    Separate { cipher: Option<CipherShape>, mac: MacShape },
}

#[derive(Clone, Copy)]
struct CipherShape {
    algorithm: &'static cipher::Algorithm,
    counter_mode: bool,
}

struct MacShape {
    algorithm: MacAlgorithm,
    key_len: usize,
    icv_len: usize,
}

enum MacAlgorithm {
    Hmac(hmac::Algorithm),
    Cmac(cmac::Algorithm),
}

const SALT_LEN: usize = 4;
const AEAD_IV_LEN: usize = 8;
const AEAD_ICV_LEN: usize = 16;
const AES_BLOCK_LEN: usize = 16;

fn shape(encr: Encr, key_bits: u16, integ: Integ) -> Option<Shape> {
    let aes = || match key_bits {
        128 => Some((&cipher::AES_128, &aead::AES_128_GCM)),
        192 => Some((&cipher::AES_192, &aead::AES_192_GCM)),
        256 => Some((&cipher::AES_256, &aead::AES_256_GCM)),
        _ => None,
    };
    let combined = match (encr, key_bits) {
        (Encr::AES_GCM_16, _) => Shape::Aead(aes()?.1),
        (Encr::NULL_AUTH_AES_GMAC, _) => Shape::Gmac(aes()?.1),
        (Encr::CHACHA20_POLY1305, 256) => Shape::Aead(&aead::CHACHA20_POLY1305),
        (Encr::AES_CCM_8, 128 | 192 | 256) => Shape::Portable { salt_len: CCM_SALT_LEN, icv_len: 8 },
        (Encr::AES_CCM_12, 128 | 192 | 256) => Shape::Portable { salt_len: CCM_SALT_LEN, icv_len: 12 },
        (Encr::AES_CCM_16, 128 | 192 | 256) => Shape::Portable { salt_len: CCM_SALT_LEN, icv_len: 16 },
        (Encr::AES_GCM_8, 128 | 192 | 256) => Shape::Portable { salt_len: SALT_LEN, icv_len: 8 },
        (Encr::AES_GCM_12, 128 | 192 | 256) => Shape::Portable { salt_len: SALT_LEN, icv_len: 12 },
        (Encr::AES_CBC, _) => {
            let cipher = CipherShape { algorithm: aes()?.0, counter_mode: false };
            return Some(Shape::Separate { cipher: Some(cipher), mac: mac(integ)? });
        }
        (Encr::AES_CTR, _) => {
            let cipher = CipherShape { algorithm: aes()?.0, counter_mode: true };
            return Some(Shape::Separate { cipher: Some(cipher), mac: mac(integ)? });
        }
        (Encr::NULL, 0) => return Some(Shape::Separate { cipher: None, mac: mac(integ)? }),
        _ => return None,
    };
    (integ == Integ::NONE).then_some(combined)
}

fn mac(integ: Integ) -> Option<MacShape> {
    // Key and ICV lengths: RFC 2404 §2, RFC 4868 §2.1.1 and §2.3, RFC 4494 §3.
    let hmac = |algorithm, key_len, icv_len| MacShape { algorithm: MacAlgorithm::Hmac(algorithm), key_len, icv_len };
    Some(match integ {
        Integ::HMAC_SHA1_96 => hmac(hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY, 20, 12),
        Integ::HMAC_SHA2_256_128 => hmac(hmac::HMAC_SHA256, 32, 16),
        Integ::HMAC_SHA2_384_192 => hmac(hmac::HMAC_SHA384, 48, 24),
        Integ::HMAC_SHA2_512_256 => hmac(hmac::HMAC_SHA512, 64, 32),
        Integ::AES_CMAC_96 => MacShape { algorithm: MacAlgorithm::Cmac(cmac::AES_128), key_len: 16, icv_len: 12 },
        _ => return None,
    })
}

impl Protection {
    /// Lengths of the keys for a suite; `None` where we lack it or the combination is nonsense
    /// (a combined-mode cipher with an integrity algorithm, a plain cipher without one).
    /// `key_bits` is 256 for ChaCha20-Poly1305 and 0 for ENCR_NULL.
    pub fn key_lengths(encr: Encr, key_bits: u16, integ: Integ) -> Option<KeyLengths> {
        let key_len = usize::from(key_bits / 8);
        Some(match shape(encr, key_bits, integ)? {
            Shape::Aead(_) | Shape::Gmac(_) => KeyLengths { encr: key_len + SALT_LEN, integ: 0 },
            Shape::Portable { salt_len, .. } => KeyLengths { encr: key_len + salt_len, integ: 0 },
            Shape::Separate { cipher, mac } => {
                let counter_mode = cipher.is_some_and(|cipher| cipher.counter_mode);
                KeyLengths { encr: key_len + if counter_mode { SALT_LEN } else { 0 }, integ: mac.key_len }
            }
        })
    }

    /// True for ciphers that need no integrity algorithm and take none (RFC 7296 §3.3.3).
    pub fn is_combined_mode_cipher(encr: Encr) -> bool {
        [128, 256].into_iter().any(|bits| shape(encr, bits, Integ::NONE).is_some())
    }

    /// Binds keys.
    pub fn new(encr: Encr, key_bits: u16, integ: Integ, keys: &EspKeys) -> Result<Self, CryptoError> {
        let lengths = Self::key_lengths(encr, key_bits, integ).ok_or(CryptoError::Unsupported)?;
        let (encr_key, integ_key) = (keys.encr.expose(), keys.integ.expose());
        if encr_key.len() != lengths.encr || integ_key.len() != lengths.integ {
            return Err(CryptoError::KeyLength);
        }
        let aead = |algorithm| {
            let (key, salt) = encr_key.split_last_chunk::<SALT_LEN>().ok_or(CryptoError::KeyLength)?;
            let key = UnboundKey::new(algorithm, key).map_err(|_| CryptoError::KeyLength)?;
            Ok::<_, CryptoError>((LessSafeKey::new(key), *salt))
        };
        let algorithm = match shape(encr, key_bits, integ).ok_or(CryptoError::Unsupported)? {
            Shape::Aead(algorithm) => {
                let (key, salt) = aead(algorithm)?;
                Algorithm::Aead { key, salt }
            }
            Shape::Gmac(algorithm) => {
                let (key, salt) = aead(algorithm)?;
                Algorithm::Gmac { key, salt }
            }
            Shape::Portable { icv_len, .. } => {
                let (key, salt) = encr_key.split_at_checked(usize::from(key_bits / 8)).ok_or(CryptoError::KeyLength)?;
                Algorithm::Portable(Portable::new(encr, key, salt, icv_len)?)
            }
            Shape::Separate { cipher, mac } => {
                let icv_len = mac.icv_len;
                let cipher = Cipher::new(cipher, encr_key)?;
                Algorithm::Separate(Box::new(Separate { cipher, mac: Mac::new(mac, integ_key)?, icv_len }))
            }
        };
        Ok(Self { algorithm })
    }

    /// Octets of explicit IV before the text (8 for AEADs and counter mode, 16 for CBC, 0 for ENCR_NULL).
    pub fn iv_len(&self) -> usize {
        match &self.algorithm {
            Algorithm::Aead { .. } | Algorithm::Gmac { .. } | Algorithm::Portable(_) => AEAD_IV_LEN,
            Algorithm::Separate(separate) => match separate.cipher {
                Cipher::Null => 0,
                Cipher::Cbc { .. } => AES_BLOCK_LEN,
                Cipher::Ctr { .. } => AEAD_IV_LEN,
            },
        }
    }

    /// Octets of integrity check value after the text.
    pub fn icv_len(&self) -> usize {
        match &self.algorithm {
            Algorithm::Aead { .. } | Algorithm::Gmac { .. } => AEAD_ICV_LEN,
            Algorithm::Portable(portable) => portable.icv_len,
            Algorithm::Separate(separate) => separate.icv_len,
        }
    }

    /// The text's length must be a multiple of this (16 for CBC, 1 for all others).
    pub fn block_len(&self) -> usize {
        if self.needs_random_iv() { AES_BLOCK_LEN } else { 1 }
    }

    /// True for ciphers whose IV must be unpredictable (CBC); false where a counter serves and must serve,
    /// because an IV that occurs twice is fatal (AEADs, counter mode).
    pub fn needs_random_iv(&self) -> bool {
        matches!(&self.algorithm, Algorithm::Separate(separate) if matches!(separate.cipher, Cipher::Cbc { .. }))
    }

    /// True for combined-mode ciphers: the high half of an extended sequence number then belongs into the
    /// AAD between SPI and low half (RFC 4106 §5, RFC 7634 §2.1), otherwise into the suffix.
    pub fn is_combined_mode(&self) -> bool {
        !matches!(&self.algorithm, Algorithm::Separate(_))
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
            Algorithm::Gmac { key, salt } => {
                let everything = [aad, iv, text].concat();
                let nonce = nonce(salt, iv)?;
                let tag = key
                    .seal_in_place_separate_tag(nonce, Aad::from(everything), &mut [])
                    .map_err(|_| CryptoError::Length)?;
                icv.copy_from_slice(tag.as_ref());
            }
            Algorithm::Portable(portable) => portable.seal(iv, aad, text, icv)?,
            Algorithm::Separate(separate) => {
                separate.cipher.encrypt(iv, text)?;
                separate.mac.sign(&[aad, iv, text, suffix], |tag| {
                    icv.copy_from_slice(tag.get(..separate.icv_len).ok_or(CryptoError::Length)?);
                    Ok(())
                })?;
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
            Algorithm::Gmac { key, salt } => {
                let everything = [aad, iv, text].concat();
                let nonce = nonce(salt, iv)?;
                key.open_in_place_separate_tag(nonce, Aad::from(everything), icv, &mut [])
                    .map_err(|_| CryptoError::Integrity)?;
            }
            Algorithm::Portable(portable) => portable.open(iv, aad, text, icv)?,
            Algorithm::Separate(separate) => {
                separate.mac.sign(&[aad, iv, text, suffix], |tag| {
                    let expected = tag.get(..separate.icv_len).ok_or(CryptoError::Length)?;
                    if bool::from(expected.ct_eq(icv)) { Ok(()) } else { Err(CryptoError::Integrity) }
                })?;
                separate.cipher.decrypt(iv, text)?;
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

impl Cipher {
    fn new(shape: Option<CipherShape>, encr_key: &[u8]) -> Result<Self, CryptoError> {
        let Some(CipherShape { algorithm, counter_mode }) = shape else { return Ok(Self::Null) };
        let unbound = |key| UnboundCipherKey::new(algorithm, key).map_err(|_| CryptoError::KeyLength);
        if counter_mode {
            let (key, nonce) = encr_key.split_last_chunk::<SALT_LEN>().ok_or(CryptoError::KeyLength)?;
            let key = EncryptingKey::ctr(unbound(key)?).map_err(|_| CryptoError::Unsupported)?;
            return Ok(Self::Ctr { key, nonce: *nonce });
        }
        Ok(Self::Cbc {
            encrypting: EncryptingKey::cbc(unbound(encr_key)?).map_err(|_| CryptoError::Unsupported)?,
            decrypting: DecryptingKey::cbc(unbound(encr_key)?).map_err(|_| CryptoError::Unsupported)?,
        })
    }

    fn encrypt(&self, iv: &[u8], text: &mut [u8]) -> Result<(), CryptoError> {
        match self {
            Self::Null => Ok(()),
            Self::Cbc { encrypting, .. } => encrypt(encrypting, iv, text),
            Self::Ctr { key, nonce } => encrypt(key, &counter_block(nonce, iv), text),
        }
    }

    fn decrypt(&self, iv: &[u8], text: &mut [u8]) -> Result<(), CryptoError> {
        match self {
            Self::Cbc { decrypting, .. } => {
                let context = DecryptionContext::Iv128(iv.try_into().map_err(|_| CryptoError::Length)?);
                decrypting.decrypt(text, context).map(|_| ()).map_err(|_| CryptoError::Length)
            }
            Self::Null | Self::Ctr { .. } => self.encrypt(iv, text),
        }
    }
}

fn encrypt(key: &EncryptingKey, iv: &[u8], text: &mut [u8]) -> Result<(), CryptoError> {
    let context = EncryptionContext::Iv128(iv.try_into().map_err(|_| CryptoError::Length)?);
    key.less_safe_encrypt(text, context).map(|_| ()).map_err(|_| CryptoError::Length)
}

/// The first counter block: nonce | IV | 1 (RFC 3686 §4).
fn counter_block(nonce: &[u8; SALT_LEN], iv: &[u8]) -> Vec<u8> {
    [nonce.as_slice(), iv, &[0, 0, 0, 1]].concat()
}

impl Mac {
    fn new(shape: MacShape, key: &[u8]) -> Result<Self, CryptoError> {
        Ok(match shape.algorithm {
            MacAlgorithm::Hmac(algorithm) => Self::Hmac(hmac::Key::new(algorithm, key)),
            MacAlgorithm::Cmac(algorithm) => {
                Self::Cmac(cmac::Key::new(algorithm, key).map_err(|_| CryptoError::KeyLength)?)
            }
        })
    }

    /// Gives the whole tag over the parts to `then`.
    fn sign(&self, parts: &[&[u8]], then: impl FnOnce(&[u8]) -> Result<(), CryptoError>) -> Result<(), CryptoError> {
        match self {
            Self::Hmac(key) => {
                let mut context = hmac::Context::with_key(key);
                for part in parts {
                    context.update(part);
                }
                then(context.sign().as_ref())
            }
            Self::Cmac(key) => {
                let mut context = cmac::Context::with_key(key);
                for part in parts {
                    context.update(part).map_err(|_| CryptoError::Unsupported)?;
                }
                then(context.sign().map_err(|_| CryptoError::Unsupported)?.as_ref())
            }
        }
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

#[cfg(test)]
pub(crate) mod tests;
