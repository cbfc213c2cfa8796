//! Transforms and proposals (RFC 7296 §3.3), as IANA numbers them.
//!
//! Numbers that we do not know survive as values: each id is a newtype with constants, so an
//! unknown transform in a peer's proposal is carried, not lost, and simply never chosen.

/// A security protocol identifier (RFC 7296 §3.3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Protocol(pub u8);
impl Protocol {
    /// No protocol: notifications that concern no SA.
    pub const NONE: Self = Self(0);
    /// The IKE SA itself.
    pub const IKE: Self = Self(1);
    /// Authentication Header.
    pub const AH: Self = Self(2);
    /// Encapsulating Security Payload.
    pub const ESP: Self = Self(3);
}

/// A transform type (RFC 7296 §3.3.2, RFC 9827).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TransformType(pub u8);
impl TransformType {
    /// Encryption Algorithm.
    pub const ENCR: Self = Self(1);
    /// Pseudorandom Function.
    pub const PRF: Self = Self(2);
    /// Integrity Algorithm.
    pub const INTEG: Self = Self(3);
    /// Key Exchange Method.
    pub const KE: Self = Self(4);
    /// Sequence Numbers (formerly "Extended Sequence Numbers").
    pub const SN: Self = Self(5);
    /// Additional Key Exchange 1 to 7 (RFC 9370 §2.2.1), whose ids are those of [`Ke`].
    pub const ADDITIONAL_KE: [Self; 7] = [Self(6), Self(7), Self(8), Self(9), Self(10), Self(11), Self(12)];

    /// True for the types of [`Self::ADDITIONAL_KE`].
    pub fn is_additional_ke(self) -> bool {
        Self::ADDITIONAL_KE.contains(&self)
    }
}

/// Encryption algorithm ids (transform type 1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Encr(pub u16);
impl Encr {
    /// ENCR_NULL.
    pub const NULL: Self = Self(11);
    /// ENCR_AES_CBC.
    pub const AES_CBC: Self = Self(12);
    /// ENCR_AES_CTR (RFC 3686, 5930).
    pub const AES_CTR: Self = Self(13);
    /// AES-CCM with an 8-octet ICV (RFC 4309, 5282).
    pub const AES_CCM_8: Self = Self(14);
    /// AES-CCM with a 12-octet ICV.
    pub const AES_CCM_12: Self = Self(15);
    /// AES-CCM with a 16-octet ICV.
    pub const AES_CCM_16: Self = Self(16);
    /// AES-GCM with an 8-octet ICV (RFC 4106, 5282).
    pub const AES_GCM_8: Self = Self(18);
    /// AES-GCM with a 12-octet ICV.
    pub const AES_GCM_12: Self = Self(19);
    /// AES-GCM with a 16-octet ICV.
    pub const AES_GCM_16: Self = Self(20);
    /// ENCR_NULL_AUTH_AES_GMAC: integrity alone (RFC 4543).
    pub const NULL_AUTH_AES_GMAC: Self = Self(21);
    /// ENCR_CHACHA20_POLY1305.
    pub const CHACHA20_POLY1305: Self = Self(28);
}

/// Pseudorandom function ids (transform type 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Prf(pub u16);
impl Prf {
    /// PRF_HMAC_SHA1.
    pub const HMAC_SHA1: Self = Self(2);
    /// PRF_HMAC_SHA2_256.
    pub const HMAC_SHA2_256: Self = Self(5);
    /// PRF_HMAC_SHA2_384.
    pub const HMAC_SHA2_384: Self = Self(6);
    /// PRF_HMAC_SHA2_512.
    pub const HMAC_SHA2_512: Self = Self(7);
    /// PRF_AES128_CMAC (RFC 4615).
    pub const AES128_CMAC: Self = Self(8);
}

/// Integrity algorithm ids (transform type 3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Integ(pub u16);
impl Integ {
    /// No integrity algorithm (with a combined-mode cipher).
    pub const NONE: Self = Self(0);
    /// AUTH_HMAC_SHA1_96.
    pub const HMAC_SHA1_96: Self = Self(2);
    /// AUTH_AES_CMAC_96 (RFC 4494).
    pub const AES_CMAC_96: Self = Self(8);
    /// AUTH_HMAC_SHA2_256_128.
    pub const HMAC_SHA2_256_128: Self = Self(12);
    /// AUTH_HMAC_SHA2_384_192.
    pub const HMAC_SHA2_384_192: Self = Self(13);
    /// AUTH_HMAC_SHA2_512_256.
    pub const HMAC_SHA2_512_256: Self = Self(14);
}

/// Key exchange method ids (transform type 4).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ke(pub u16);
impl Ke {
    /// No key exchange (a Child SA without perfect forward secrecy).
    pub const NONE: Self = Self(0);
    /// 2048-bit MODP group.
    pub const MODP_2048: Self = Self(14);
    /// 3072-bit MODP group.
    pub const MODP_3072: Self = Self(15);
    /// 4096-bit MODP group.
    pub const MODP_4096: Self = Self(16);
    /// 6144-bit MODP group.
    pub const MODP_6144: Self = Self(17);
    /// 8192-bit MODP group.
    pub const MODP_8192: Self = Self(18);
    /// NIST P-256.
    pub const ECP_256: Self = Self(19);
    /// NIST P-384.
    pub const ECP_384: Self = Self(20);
    /// NIST P-521.
    pub const ECP_521: Self = Self(21);
    /// brainpoolP256r1 (RFC 6954).
    pub const BRAINPOOL_256: Self = Self(28);
    /// brainpoolP384r1.
    pub const BRAINPOOL_384: Self = Self(29);
    /// Curve25519.
    pub const X25519: Self = Self(31);
    /// ML-KEM-512 (FIPS 203).
    pub const ML_KEM_512: Self = Self(35);
    /// ML-KEM-768.
    pub const ML_KEM_768: Self = Self(36);
    /// ML-KEM-1024.
    pub const ML_KEM_1024: Self = Self(37);
}

/// Sequence-number ids (transform type 5, RFC 9827).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceNumbers(pub u16);
impl SequenceNumbers {
    /// 32-bit Sequential.
    pub const SEQUENTIAL_32: Self = Self(0);
    /// Partially Transmitted 64-bit Sequential ("ESN").
    pub const PARTIAL_64: Self = Self(1);
}

/// One transform as proposed on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Transform {
    /// What kind of algorithm this is.
    pub kind: TransformType,
    /// Its number within the kind.
    pub id: u16,
    /// The Key Length attribute, in bits.
    pub key_bits: Option<u16>,
    /// True when the peer sent an attribute that we do not know; such a transform is never chosen
    /// (RFC 7296 §3.3.6).
    pub unknown_attribute: bool,
}

impl Transform {
    /// A transform without attributes.
    pub const fn new(kind: TransformType, id: u16) -> Self {
        Self { kind, id, key_bits: None, unknown_attribute: false }
    }

    /// A transform with a Key Length attribute in bits.
    pub const fn with_key_bits(kind: TransformType, id: u16, bits: u16) -> Self {
        Self { kind, id, key_bits: Some(bits), unknown_attribute: false }
    }
}

/// One proposal: a protocol, the proposer's SPI and the transforms that it offers or chose.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Proposal {
    /// Proposal number, from 1 (RFC 7296 §3.3.1).
    pub number: u8,
    /// The protocol.
    pub protocol: Protocol,
    /// The sender's SPI: empty, 4 (ESP, AH) or 8 (IKE) octets.
    pub spi: Vec<u8>,
    /// Offered transforms in order of preference within a kind.
    pub transforms: Vec<Transform>,
}
