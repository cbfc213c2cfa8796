//! Cryptography of IKE: PRF and prf+ (RFC 7296 §2.13), key exchange (§2.8 and RFC 7748, 5903, 6954, 3526; FIPS 203),
//! keys of IKE and Child SAs (§2.14, §2.17), proposals in strongSwan's notation and their selection.
//!
//! No primitive is implemented here: HMAC and hashes are RustCrypto's, curves, CMAC and ML-KEM AWS-LC's (Brainpool
//! RustCrypto's), MODP arithmetic crypto-bigint's.

mod advice;
mod brainpool;
mod kex;
mod keys;
mod modp;
pub mod names;
mod notation;
mod prf;
pub mod puzzle;
mod selection;
#[cfg(test)]
mod tests;
mod work;

use ipsec::transform::{Encr, Integ, Ke, Prf, TransformType};

pub use self::advice::{has_short_keys, warnings};
pub use self::kex::{KeyExchange, Pending, answer, respond, supported};
pub use self::keys::{
    IkeKeys, KeySeed, channel_binding, child_keys, ike_keys, intermediate_ike_keys, mix_ppk, rekeyed_ike_keys,
    resumed_ike_keys,
};
pub use self::notation::{ProposalError, parse_proposals, renumber, without_additional_ke, without_ke};
pub use self::prf::{prf, prf_len, prf_plus};
pub use self::selection::{EspChoice, IkeChoice, accept_esp, accept_ike, select_esp, select_ike};
pub use self::work::{KeyDone, KeyWork};

/// The chosen algorithms of an IKE SA.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct IkeSuite {
    /// Cipher.
    pub encr: Encr,
    /// Its key length in bits.
    pub key_bits: u16,
    /// Integrity algorithm, `NONE` with a combined-mode cipher.
    pub integ: Integ,
    /// PRF.
    pub prf: Prf,
    /// Key exchange method.
    pub ke: Ke,
    /// Additional key exchanges, done with IKE_INTERMEDIATE or IKE_FOLLOWUP_KE before the SA is complete.
    pub additional: AdditionalKe,
}

/// The additional key exchanges of an SA (RFC 9370): a method, or `NONE`, for each of the seven transform
/// types of [`TransformType::ADDITIONAL_KE`]. No method but
/// `NONE` occurs twice, nor is it the SA's first key exchange.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct AdditionalKe(pub(crate) [Ke; 7]);

impl AdditionalKe {
    /// No additional key exchange.
    pub const NONE: Self = Self([Ke::NONE; 7]);

    /// The number from 1 to 7 and the method of each that is to be done, in the order in which they are done
    /// (RFC 9370 §2.2.2).
    pub fn iter(&self) -> impl Iterator<Item = (u8, Ke)> + use<> {
        (1..=7).zip(self.0).filter(|(_, method)| *method != Ke::NONE)
    }

    /// The method of a transform type; `None` for a type that is not one of an additional key exchange.
    pub fn of(&self, kind: TransformType) -> Option<Ke> {
        let types = TransformType::ADDITIONAL_KE.iter().zip(self.0);
        types.filter(|(known, _)| **known == kind).map(|(_, method)| method).next()
    }

    /// True when there is none to do.
    pub fn is_none(&self) -> bool {
        *self == Self::NONE
    }
}

/// Why a cryptographic step failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// We lack the method.
    #[error("unsupported key exchange method or PRF")]
    Unsupported,
    /// The peer's public value fails its checks (RFC 6989 §2, RFC 7748 §6.1, RFC 8031 §4).
    #[error("the peer's public value is not acceptable")]
    PublicValue,
}
