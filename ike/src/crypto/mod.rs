//! Cryptography of IKE: PRF and prf+ (RFC 7296 §2.13), key exchange (§2.8 and RFC 7748, 5903, 3526),
//! keys of IKE and Child SAs (§2.14, §2.17), proposals in strongSwan's notation and their selection.
//!
//! No primitive is implemented here: HMAC and hashes are RustCrypto's, curves AWS-LC's, MODP arithmetic
//! crypto-bigint's.

mod kex;
mod keys;
mod modp;
pub mod names;
mod notation;
mod prf;
mod selection;
#[cfg(test)]
mod tests;

use ipsec::transform::{Encr, Integ, Ke, Prf};

pub use self::kex::KeyExchange;
pub use self::keys::{IkeKeys, KeySeed, child_keys, ike_keys, rekeyed_ike_keys};
pub use self::notation::{ProposalError, parse_proposals, renumber, without_ke};
pub use self::prf::{prf, prf_len, prf_plus};
pub use self::selection::{EspChoice, IkeChoice, accept_esp, accept_ike, select_esp, select_ike};

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
