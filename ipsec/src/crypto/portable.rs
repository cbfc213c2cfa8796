//! AEADs that AWS-LC does not have: AES-CCM (RFC 4309), and AES-GCM with a short ICV (RFC 4106 §6), whose tag
//! AWS-LC gives but does not check. From RustCrypto, on AES instructions where the processor has them.

use aead::inout::InOutBuf;
use aead::{AeadInOut, KeyInit, Nonce, Tag};
use aes::{Aes128, Aes192, Aes256};
use aes_gcm::AesGcm;
use ccm::Ccm;
use ccm::consts::{U8, U11, U12, U16};

use super::CryptoError;
use crate::secret::Secret;
use crate::transform::Encr;

/// CCM's nonce is salt | IV of 11 octets: its counter has four (RFC 4309 §4).
pub(super) const CCM_SALT_LEN: usize = 3;

/// One of them with its key and salt.
pub(super) struct Portable {
    aead: Box<dyn Detached>,
    salt: Secret,
    pub(super) icv_len: usize,
}

/// An AEAD without its lengths in the type.
trait Detached: Send + Sync {
    fn seal(&self, nonce: &[u8], aad: &[u8], text: &mut [u8], icv: &mut [u8]) -> Result<(), CryptoError>;
    fn open(&self, nonce: &[u8], aad: &[u8], text: &mut [u8], icv: &[u8]) -> Result<(), CryptoError>;
}

impl<A: AeadInOut + Send + Sync> Detached for A {
    fn seal(&self, nonce: &[u8], aad: &[u8], text: &mut [u8], icv: &mut [u8]) -> Result<(), CryptoError> {
        let nonce = <&Nonce<A>>::try_from(nonce).map_err(|_| CryptoError::Length)?;
        let tag = self.encrypt_inout_detached(nonce, aad, InOutBuf::from(text)).map_err(|_| CryptoError::Length)?;
        icv.copy_from_slice(&tag);
        Ok(())
    }

    fn open(&self, nonce: &[u8], aad: &[u8], text: &mut [u8], icv: &[u8]) -> Result<(), CryptoError> {
        let nonce = <&Nonce<A>>::try_from(nonce).map_err(|_| CryptoError::Length)?;
        let tag = <&Tag<A>>::try_from(icv).map_err(|_| CryptoError::Length)?;
        if self.decrypt_inout_detached(nonce, aad, InOutBuf::from(&mut *text), tag).is_err() {
            // The crates do not say what they leave in the buffer.
            text.fill(0);
            return Err(CryptoError::Integrity);
        }
        Ok(())
    }
}

impl Portable {
    pub(super) fn new(encr: Encr, key: &[u8], salt: &[u8], icv_len: usize) -> Result<Self, CryptoError> {
        let aead = match (encr, key.len()) {
            (Encr::AES_CCM_8, 16) => bind::<Ccm<Aes128, U8, U11>>(key),
            (Encr::AES_CCM_8, 24) => bind::<Ccm<Aes192, U8, U11>>(key),
            (Encr::AES_CCM_8, 32) => bind::<Ccm<Aes256, U8, U11>>(key),
            (Encr::AES_CCM_12, 16) => bind::<Ccm<Aes128, U12, U11>>(key),
            (Encr::AES_CCM_12, 24) => bind::<Ccm<Aes192, U12, U11>>(key),
            (Encr::AES_CCM_12, 32) => bind::<Ccm<Aes256, U12, U11>>(key),
            (Encr::AES_CCM_16, 16) => bind::<Ccm<Aes128, U16, U11>>(key),
            (Encr::AES_CCM_16, 24) => bind::<Ccm<Aes192, U16, U11>>(key),
            (Encr::AES_CCM_16, 32) => bind::<Ccm<Aes256, U16, U11>>(key),
            (Encr::AES_GCM_8, 16) => bind::<AesGcm<Aes128, U12, U8>>(key),
            (Encr::AES_GCM_8, 24) => bind::<AesGcm<Aes192, U12, U8>>(key),
            (Encr::AES_GCM_8, 32) => bind::<AesGcm<Aes256, U12, U8>>(key),
            (Encr::AES_GCM_12, 16) => bind::<AesGcm<Aes128, U12, U12>>(key),
            (Encr::AES_GCM_12, 24) => bind::<AesGcm<Aes192, U12, U12>>(key),
            (Encr::AES_GCM_12, 32) => bind::<AesGcm<Aes256, U12, U12>>(key),
            _ => Err(CryptoError::Unsupported),
        }?;
        Ok(Self { aead, salt: Secret::new(salt.to_vec()), icv_len })
    }

    pub(super) fn seal(&self, iv: &[u8], aad: &[u8], text: &mut [u8], icv: &mut [u8]) -> Result<(), CryptoError> {
        self.aead.seal(&[self.salt.expose(), iv].concat(), aad, text, icv)
    }

    pub(super) fn open(&self, iv: &[u8], aad: &[u8], text: &mut [u8], icv: &[u8]) -> Result<(), CryptoError> {
        self.aead.open(&[self.salt.expose(), iv].concat(), aad, text, icv)
    }
}

fn bind<A: AeadInOut + KeyInit + Send + Sync + 'static>(key: &[u8]) -> Result<Box<dyn Detached>, CryptoError> {
    A::new_from_slice(key).map(|aead| Box::new(aead) as Box<dyn Detached>).map_err(|_| CryptoError::KeyLength)
}
