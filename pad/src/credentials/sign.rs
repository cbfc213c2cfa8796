//! Our own proof (RFC 7296 §2.15, RFC 7427 §4).

use std::sync::Arc;

use super::{AuthClass, AuthMethod, Credentials, SignError, SignRequest, SignedAuth};
use crate::certificate::Certificate;
use crate::public_key::PublicKey;
use crate::signature::{PrivateKey, Way};

/// Why a key does not sign.
const NO_WAY: &str = "the peer takes none of the signatures that the key can make and the configuration allows";

/// A key, what says that it is ours, and how it will sign; `None` if it cannot sign for this peer.
struct Signer<'a> {
    shown: Shown<'a>,
    key: &'a PrivateKey,
    way: Option<Way>,
}

/// What a peer is shown, or knows, of a key.
enum Shown<'a> {
    Certificate(Arc<Certificate>),
    /// The key itself (RFC 7670).
    RawKey(&'a PublicKey),
}

/// Longest chain of intermediate certificates that is sent.
const MAX_INTERMEDIATES: usize = 8;

impl Credentials {
    /// Signs as us.
    ///
    /// With a public key the certificate must contain the identity, and its private key must be loaded. Of
    /// several the first under an authority that the peer asked for is taken, else the first. A raw key is one that the
    /// configuration names; it stands for whatever identity is configured with it. RSA needs a peer
    /// that announced a SHA-2 hash: method 1 would mean SHA-1, which the library does not sign with.
    pub fn sign(&self, request: &SignRequest) -> Result<SignedAuth, SignError> {
        let id = request.local_id.to_string();
        match request.auth.class {
            AuthClass::SharedKey => {
                let secret = self
                    .shared_secret(&request.local_id, request.peer_id.as_ref())
                    .ok_or(SignError::NoSharedKey(id))?;
                let auth = request.shared_key_mac.mac(secret);
                Ok(SignedAuth { method: AuthMethod::SHARED_KEY, auth, certificates: Vec::new(), public_key: None })
            }
            AuthClass::Null => {
                let auth = request.shared_key_mac.mac_of_nobody();
                Ok(SignedAuth { method: AuthMethod::NULL, auth, certificates: Vec::new(), public_key: None })
            }
            AuthClass::Eap(_) => {
                let reason = "EAP comes before the proof".to_owned();
                Err(SignError::Failed { id, reason })
            }
            AuthClass::PublicKey => {
                let signer = self.signer(request).ok_or_else(|| SignError::NoKey(id.clone()))?;
                let failed = |reason: &str| SignError::Failed { id: id.clone(), reason: reason.to_owned() };
                let way = signer.way.ok_or_else(|| failed(NO_WAY))?;
                let (method, auth) = signer.key.sign(&request.octets, way).map_err(failed)?;
                let certificate = match signer.shown {
                    Shown::Certificate(certificate) => certificate,
                    Shown::RawKey(key) => {
                        let public_key = Some(key.clone());
                        return Ok(SignedAuth { method, auth, certificates: Vec::new(), public_key });
                    }
                };
                let chain = self.chain(&certificate);
                let intermediates = chain.iter().filter(|issuer| !issuer.is_self_issued());
                let certificates = std::iter::once(&certificate).chain(intermediates);
                let certificates = certificates.map(|certificate| certificate.der().to_vec()).collect();
                Ok(SignedAuth { method, auth, certificates, public_key: None })
            }
        }
    }

    /// The key to sign with, and its certificate if it has one: one that the peer says it can verify (RFC 9593) before others, then one
    /// under an authority that it asked for; of equals the first.
    fn signer<'a>(&'a self, request: &'a SignRequest) -> Option<Signer<'a>> {
        let raw_only = request.auth.certificates.is_empty() && !request.auth.public_keys.is_empty();
        let certificates: Vec<Arc<Certificate>> = if raw_only {
            Vec::new()
        } else if request.auth.certificates.is_empty() {
            self.certificates().to_vec()
        } else {
            let configured = request.auth.certificates.iter();
            configured.filter_map(|der| Certificate::parse(der).ok()).map(Arc::new).collect()
        };
        let constraints = &request.auth.constraints;
        let with_certificate = certificates
            .into_iter()
            .filter(|certificate| certificate.proves(&request.local_id))
            .filter_map(|certificate| self.private_key_of(&certificate).map(|key| (certificate, key)))
            .filter(|(certificate, key)| constraints.admits_signer(key.key_type(), certificate.key_bits()))
            .map(|(certificate, key)| (Shown::Certificate(certificate), key));
        let raw = request
            .auth
            .public_keys
            .iter()
            .filter(|known| constraints.admits_signer(known.key_type(), known.bits()))
            .filter_map(|known| Some((known, self.private_key(known.key_type(), known.subject_public_key())?)))
            .map(|(known, key)| (Shown::RawKey(known), key));
        let signers = with_certificate.chain(raw).map(|(shown, key)| {
            let issuers: Vec<[u8; 20]> = match &shown {
                Shown::Certificate(certificate) => {
                    self.chain(certificate).iter().map(|issuer| issuer.public_key_info_hash()).collect()
                }
                Shown::RawKey(_) => Vec::new(),
            };
            let ways = key.ways(request.peer_hashes.as_deref(), constraints, request.settings);
            // Both orders are preferences; the peer's decides, since it is the one that has to verify.
            let announced = request.announced.iter().flatten().find_map(|announcement| {
                let authority = usize::from(announcement.cert_link).checked_sub(1);
                let linked = authority.and_then(|index| request.cert_requests.get(index));
                let fits = announcement.cert_link == 0 || linked.is_some_and(|hash| issuers.contains(hash));
                ways.iter().copied().find(|way| fits && way.is_announced_by(announcement))
            });
            let asked_for = match &shown {
                Shown::Certificate(_) => issuers.iter().any(|issuer| request.cert_requests.contains(issuer)),
                Shown::RawKey(_) => request.raw_key_requested,
            };
            let rank = (announced.is_some(), !ways.is_empty(), asked_for);
            (rank, Signer { way: announced.or(ways.first().copied()), shown, key })
        });
        // The first of those with the highest rank.
        signers
            .fold(None, |best: Option<(_, Signer<'_>)>, next| match best {
                Some(best) if best.0 >= next.0 => Some(best),
                _ => Some(next),
            })
            .map(|(_, signer)| signer)
    }

    /// Issuers of a certificate that are loaded, from the nearest to the root.
    fn chain(&self, certificate: &Certificate) -> Vec<Arc<Certificate>> {
        let mut chain: Vec<Arc<Certificate>> = Vec::new();
        while chain.len() < MAX_INTERMEDIATES {
            let last = chain.last().map_or(certificate, |issuer| issuer);
            if last.is_self_issued() {
                break;
            }
            let issuer =
                self.intermediates().find(|issuer| last.may_be_issued_by(issuer) && !chain.contains(issuer)).cloned();
            match issuer {
                Some(issuer) => chain.push(issuer),
                None => break,
            }
        }
        chain
    }
}
