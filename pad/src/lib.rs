//! Who may be whom: identities, credentials, and the ordered Peer Authorization Database
//! (RFC 4301 §4.4.3). Its product is a [`PeerIdentity`]: a peer that has proved who it is.
//!
//! Pure: no sockets, no clocks; the time for certificate checks is an argument.

#![forbid(unsafe_code)]

mod announcement;
pub mod certificate;
mod constraints;
pub mod credentials;
mod distinguished_name;
pub mod eap;
pub mod identity;
pub mod peer;
mod public_key;
pub mod revocation;
mod signature;

pub use announcement::AuthAnnouncement;
pub use certificate::{Certificate, CertificateError};
pub use constraints::{ConstraintError, SignatureConstraints, SignatureSettings};
pub use credentials::{
    Admission, AuthClass, AuthError, AuthMethod, AuthenticateRequest, CredentialError, Credentials, LocalAuth,
    PadEntry, Ppk, SharedKeyMac, SignError, SignRequest, SignedAuth, StoredCertificate,
};
pub use eap::{EapMethod, EapPeer, EapPeerStep, EapServer, EapServerStep};
pub use identity::{Identity, IdentityPattern, Specificity};
pub use peer::{PeerIdentity, Proof};
pub use public_key::{PublicKey, PublicKeyError};
pub use revocation::{Crl, CrlError, Revocation};
pub use signature::KeyType;
