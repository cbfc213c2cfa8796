//! A peer's proved identity: the value that SAD entries, latches, VICI and channel bindings share.

use crate::credentials::AuthMethod;
use crate::eap::EapMethod;
use crate::identity::Identity;

/// Who the peer proved to be, how, and which PAD entry admitted it. Shared as `Arc<PeerIdentity>`
/// by everything that the authentication gave rise to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PeerIdentity {
    /// The identity that the peer asserted and proved. What it said in IKE may be another one, see [`Self::ike_id`].
    pub id: Identity,
    /// The identity that we asserted to it.
    pub local_id: Identity,
    /// How the peer proved it.
    pub proof: Proof,
    /// Name of the PAD entry (connection) that admitted it.
    pub entry: String,
}

impl PeerIdentity {
    /// What the peer's Identification payload said. After EAP it may be anything that configuration lets peers say, and names
    /// nobody: decisions are by [`Self::id`] (RFC 7296 §2.16).
    pub fn ike_id(&self) -> &Identity {
        match &self.proof {
            Proof::Eap { ike_id, .. } => ike_id,
            Proof::Unauthenticated { .. } | Proof::PreSharedKey | Proof::Certificate { .. } | Proof::RawKey { .. } => {
                &self.id
            }
        }
    }
}

/// How an identity was proved.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Proof {
    /// Not at all (RFC 7619): whoever was at the other end of the key exchange.
    Unauthenticated {
        /// Stands for the IKE SA and those that it is rekeyed to: no two others have the same.
        lineage: [u8; 32],
    },
    /// By a pre-shared key (RFC 7296 §2.15).
    PreSharedKey,
    /// By a certificate.
    Certificate {
        /// DER of the end-entity certificate.
        end_entity: Vec<u8>,
        /// DER of the certificate of the trust anchor that the chain ended at.
        trust_anchor: Vec<u8>,
        /// The AUTH method used.
        method: AuthMethod,
    },
    /// By a key that the configuration names (RFC 7670).
    RawKey {
        /// Its SubjectPublicKeyInfo in DER.
        key: Vec<u8>,
        /// The AUTH method used.
        method: AuthMethod,
    },
    /// By EAP, and by the key that both ends have from it (RFC 7296 §2.16).
    Eap {
        /// The method.
        method: EapMethod,
        /// What the peer's Identification payload said, which it has not proved.
        ike_id: Identity,
    },
}
