//! Certificates, keys and secrets, and the two questions that IKE asks of them: *sign this as us*
//! and *is this peer who it says it is*.

use std::sync::Arc;
use std::time::Duration;

use ipsec::secret::Secret;

use crate::announcement::AuthAnnouncement;
use crate::certificate::Certificate;
use crate::constraints::{SignatureConstraints, SignatureSettings};
use crate::eap::EapMethod;
use crate::identity::{Identity, IdentityPattern};
use crate::peer::PeerIdentity;
use crate::public_key::PublicKey;
use crate::revocation::Revocation;

mod authenticate;
mod sign;
mod store;

pub use store::{CredentialError, Credentials, Ppk, StoredCertificate};

/// An IKEv2 authentication method (RFC 7296 §3.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AuthMethod(pub u8);
impl AuthMethod {
    /// RSA Digital Signature (PKCS#1 v1.5 with SHA-1 by tradition; RFC 7296 §2.15).
    pub const RSA: Self = Self(1);
    /// Shared Key Message Integrity Code.
    pub const SHARED_KEY: Self = Self(2);
    /// ECDSA with SHA-256 on P-256 (RFC 4754).
    pub const ECDSA_256: Self = Self(9);
    /// ECDSA with SHA-384 on P-384.
    pub const ECDSA_384: Self = Self(10);
    /// ECDSA with SHA-512 on P-521.
    pub const ECDSA_521: Self = Self(11);
    /// NULL Authentication (RFC 7619).
    pub const NULL: Self = Self(13);
    /// Digital Signature (RFC 7427).
    pub const DIGITAL_SIGNATURE: Self = Self(14);
}

/// A kind of authentication that configuration asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum AuthClass {
    /// `auth = psk`.
    SharedKey,
    /// `auth = pubkey`.
    PublicKey,
    /// `auth = null` (RFC 7619): nobody proves anything.
    Null,
    /// `auth = eap-…`: the initiator's, by this method (RFC 7296 §2.16).
    Eap(EapMethod),
}

/// Computes the shared-key MIC `prf(prf(secret, "Key Pad for IKEv2"), octets)` (RFC 7296 §2.15) for
/// a given secret; IKE knows the PRF and the octets, the PAD knows the secret.
pub trait SharedKeyMac: Send + Sync {
    /// The AUTH value for `secret`.
    fn mac(&self, secret: &Secret) -> Vec<u8>;

    /// The AUTH value of NULL authentication: the secret is SK_pi or SK_pr (RFC 7619 §2.1).
    fn mac_of_nobody(&self) -> Vec<u8>;
}

/// How we authenticate ourselves on a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalAuth {
    /// Which kind.
    pub class: AuthClass,
    /// Certificates that may be used, DER; empty lets [`Credentials::sign`] find one for the identity.
    pub certificates: Vec<Vec<u8>>,
    /// Raw keys that may be used (RFC 7670). Where there are some and no certificates, none is looked for.
    pub public_keys: Vec<PublicKey>,
    /// What our key and our signature have to be.
    pub constraints: SignatureConstraints,
    /// Who we are in EAP; `None` says the IKE identity there.
    pub eap_id: Option<Box<Identity>>,
}

/// One entry of the PAD: which peer is admitted, proved how (RFC 4301 §4.4.3.1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PadEntry {
    /// Name, for logs and for [`PeerIdentity::entry`](crate::PeerIdentity::entry).
    pub name: String,
    /// Identities that it admits.
    pub remote_id: IdentityPattern,
    /// The kind of proof that it accepts.
    pub class: AuthClass,
    /// Trust anchors or intermediate CAs that the chain must pass; DER; empty accepts each loaded CA.
    pub cacerts: Vec<Vec<u8>>,
    /// If not empty, the end-entity certificate must be one of these (DER).
    pub certs: Vec<Vec<u8>>,
    /// Raw keys of the peer (RFC 7670). If there are some, whatever certificate it has counts only if it is one of `certs`.
    /// They prove the `remote_id` if that is one identity, otherwise only the name that each has by itself.
    pub public_keys: Vec<PublicKey>,
    /// What the keys and signatures of the chain and of AUTH have to be.
    pub constraints: SignatureConstraints,
    /// What has to be known about whether certificates of the chain are revoked.
    pub revocation: Revocation,
    /// With EAP: the peer is asked who it is there, these may come, and what it says in IKE names nobody. `None` takes the IKE
    /// identity to be the one that is proved.
    pub eap_id: Option<IdentityPattern>,
}

impl PadEntry {
    /// Of what a peer says it is, that which it proves.
    pub fn proved_id(&self) -> &IdentityPattern {
        match (self.class, &self.eap_id) {
            (AuthClass::Eap(_), Some(eap_id)) => eap_id,
            _ => &self.remote_id,
        }
    }

    /// True when that is what it says in IKE, and not in EAP.
    pub fn proves_ike_id(&self) -> bool {
        !matches!(self.class, AuthClass::Eap(_)) || self.eap_id.is_none()
    }

    /// SHA-1 hashes of the SubjectPublicKeyInfo of its own CAs, for CERTREQ (RFC 7296 §3.7).
    pub fn authority_hashes(&self) -> Vec<[u8; 20]> {
        let parsed = self.cacerts.iter().filter_map(|der| Certificate::parse(der).ok());
        parsed.map(|authority| authority.public_key_info_hash()).collect()
    }

    /// Says whether it admits a peer by a certificate.
    pub fn takes_certificates(&self) -> bool {
        self.class == AuthClass::PublicKey && (self.public_keys.is_empty() || !self.certs.is_empty())
    }

    /// Says whether it admits a peer by a raw key: one of its own, or the loaded one that its `remote_id` is the name of.
    pub fn takes_raw_keys(&self) -> bool {
        self.class == AuthClass::PublicKey && (!self.public_keys.is_empty() || self.names_loaded_key())
    }

    /// The `remote_id` is a key's own name, and nothing else is asked for.
    fn names_loaded_key(&self) -> bool {
        let nothing_else = self.certs.is_empty() && self.cacerts.is_empty() && self.public_keys.is_empty();
        nothing_else
            && self.revocation != Revocation::Strict
            && matches!(self.remote_id.as_exact(), Some(Identity::KeyId(_)))
    }
}

/// What a peer sent to prove itself, and the entries that could admit it, in order.
pub struct AuthenticateRequest {
    /// The identity that it asserts.
    pub peer_id: Identity,
    /// The identity that we assert to it.
    pub local_id: Identity,
    /// AUTH method.
    pub method: AuthMethod,
    /// AUTH data.
    pub auth: Vec<u8>,
    /// The octets that the peer signed (RFC 7296 §2.15).
    pub signed_octets: Vec<u8>,
    /// MIC over the same octets.
    pub shared_key_mac: Arc<dyn SharedKeyMac>,
    /// X.509 certificates from its CERT payloads, DER, the end entity first.
    pub certificates: Vec<Vec<u8>>,
    /// The first CERT payload with a raw key (RFC 7670 §3). It says which of the keys that we know to take, no more.
    pub raw_key: Option<Vec<u8>>,
    /// Candidates in PAD order: the first that admits the peer wins.
    pub entries: Vec<PadEntry>,
    /// The daemon's settings.
    pub settings: SignatureSettings,
}

/// A peer that is who it says it is.
#[derive(Clone, Debug)]
pub struct Admission {
    /// Who it is.
    pub peer: PeerIdentity,
    /// How long all certificates of its chain are valid yet; `None` where it needed none.
    pub good_for: Option<Duration>,
    /// Certificates of its chain between the two in its proof, DER, the end entity's issuer first.
    pub intermediates: Vec<Vec<u8>>,
    /// What an operator should know about its certificates.
    pub warnings: Vec<String>,
}

/// What is needed to authenticate ourselves.
pub struct SignRequest {
    /// The identity that we assert.
    pub local_id: Identity,
    /// The peer's identity, where known: the responder knows it, an initiator from configuration.
    pub peer_id: Option<Identity>,
    /// How.
    pub auth: LocalAuth,
    /// The octets to sign.
    pub octets: Vec<u8>,
    /// MIC over the same octets.
    pub shared_key_mac: Arc<dyn SharedKeyMac>,
    /// Hash algorithm ids of the peer's SIGNATURE_HASH_ALGORITHMS (RFC 7427 §4); `None` if it sent none.
    pub peer_hashes: Option<Vec<u16>>,
    /// SHA-1 hashes of acceptable CAs' public keys from CERTREQ payloads.
    pub cert_requests: Vec<[u8; 20]>,
    /// It sent a CERTREQ for raw keys (RFC 7670 §3).
    pub raw_key_requested: bool,
    /// The peer's SUPPORTED_AUTH_METHODS (RFC 9593), in its order of preference; `None` if it sent none.
    pub announced: Option<Vec<AuthAnnouncement>>,
    /// The daemon's settings.
    pub settings: SignatureSettings,
}

/// Our proof.
#[derive(Debug)]
pub struct SignedAuth {
    /// AUTH method.
    pub method: AuthMethod,
    /// AUTH data.
    pub auth: Vec<u8>,
    /// Certificates for CERT payloads, DER, the end entity first, without the trust anchor.
    pub certificates: Vec<Vec<u8>>,
    /// The raw key that signed, where it was not a certificate's, for a CERT payload (RFC 7670 §3).
    pub public_key: Option<PublicKey>,
}

/// Why a peer was not admitted. All of these become AUTHENTICATION_FAILED on the wire.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    /// No PAD entry admits this identity with this kind of proof.
    #[error("no entry admits {0} with the authentication it used")]
    NoEntry(String),
    /// The MIC or signature does not verify.
    #[error("the AUTH value of {0} is wrong")]
    BadAuth(String),
    /// We hold no shared key for this pair of identities.
    #[error("there is no shared key for {0}")]
    NoSharedKey(String),
    /// The certificate is not acceptable.
    #[error("the certificate of {id} is not acceptable: {reason}")]
    Certificate {
        /// Who.
        id: String,
        /// Why.
        reason: String,
    },
    /// There is no raw key that counts, or it is not acceptable.
    #[error("the raw public key of {id} is not acceptable: {reason}")]
    RawKey {
        /// Who.
        id: String,
        /// Why.
        reason: String,
    },
    /// The AUTH method or signature algorithm is unknown or forbidden.
    #[error("{id} uses an authentication method that is not acceptable: {reason}")]
    Method {
        /// Who.
        id: String,
        /// Why.
        reason: String,
    },
}

/// Why we cannot authenticate ourselves.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// There is no private key with a certificate for this identity, nor one to a configured public key.
    #[error("there is no private key with a certificate or configured public key for {0}")]
    NoKey(String),
    /// There is no shared key.
    #[error("there is no shared key for {0}")]
    NoSharedKey(String),
    /// The key refused.
    #[error("signing as {id} failed: {reason}")]
    Failed {
        /// Who.
        id: String,
        /// Why.
        reason: String,
    },
}

#[cfg(test)]
mod tests;
