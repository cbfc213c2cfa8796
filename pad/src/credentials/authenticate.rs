//! Is the peer who it says it is? (RFC 7296 §2.15, RFC 4945 §3, RFC 4301 §4.4.3)

use std::sync::Arc;
use std::time::Duration;

use rustls_pki_types::CertificateDer;
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq;

use super::{Admission, AuthClass, AuthError, AuthMethod, AuthenticateRequest, Credentials, PadEntry};
use crate::certificate::{self, Certificate, Chain};
use crate::constraints::SignatureConstraints;
use crate::identity::Identity;
use crate::peer::{PeerIdentity, Proof};
use crate::public_key::PublicKey;
use crate::revocation::Revocation;
use crate::signature::{self, KeyType, Scheme, VerifyError};

/// Most certificates, and most raw keys, of a peer that are looked at.
const MAX_CERTIFICATES: usize = 16;

/// Chains of one certificate to the loaded authorities, by the demands that they were checked against: many
/// entries cost no more than a few.
type DefaultChains = Vec<((SignatureConstraints, Revocation), Result<Chain, String>)>;

impl AuthMethod {
    /// The kind of proof that the method is; `None` if we do not accept the method.
    pub fn class(self) -> Option<AuthClass> {
        match self {
            Self::SHARED_KEY => Some(AuthClass::SharedKey),
            Self::RSA | Self::ECDSA_256 | Self::ECDSA_384 | Self::ECDSA_521 | Self::DIGITAL_SIGNATURE => {
                Some(AuthClass::PublicKey)
            }
            Self::NULL => Some(AuthClass::Null),
            _ => None,
        }
    }
}

impl Credentials {
    /// Checks a peer's proof against the PAD entries, in order. `now` is seconds since the Unix epoch.
    ///
    /// Of the entries that match the identity only the most specific count: an identity that an entry names is
    /// proved as that entry demands, and a later `%any` with a weaker proof is no way around it. Among those
    /// the first that accepts the kind of proof, and the proof itself, wins.
    pub fn authenticate(&self, request: &AuthenticateRequest, now: u64) -> Result<Admission, AuthError> {
        let id = request.peer_id.to_string();
        let class = request
            .method
            .class()
            .ok_or_else(|| AuthError::Method { id: id.clone(), reason: format!("method {}", request.method.0) })?;
        // RFC 7619 §2.2: what somebody says who proves nothing counts for nothing, so it must not be said.
        if (class == AuthClass::Null) != (request.peer_id == Identity::Null) {
            let reason = "NULL authentication and ID_NULL go together".to_owned();
            return Err(AuthError::Method { id, reason });
        }
        let specificity = |entry: &PadEntry| entry.remote_id.match_specificity(&request.peer_id);
        let best = request.entries.iter().filter_map(specificity).max();
        let entries: Vec<&PadEntry> = request
            .entries
            .iter()
            .filter(|entry| best.is_some() && specificity(entry) == best && entry.class == class)
            .collect();
        let Some(first) = entries.first() else { return Err(AuthError::NoEntry(id)) };
        match class {
            AuthClass::SharedKey => {
                self.check_shared_key(request, &id)?;
                Ok(admitted(request, first, Proof::PreSharedKey, None, Vec::new()))
            }
            AuthClass::PublicKey => self.check_signature(request, &entries, now, &id),
            // No method of AUTH is of this class: what follows EAP is not asked here.
            AuthClass::Eap(_) => Err(AuthError::NoEntry(id)),
            AuthClass::Null => {
                check_mac(request, &request.shared_key_mac.mac_of_nobody(), &id)?;
                // Both nonces are in the octets.
                let lineage = Sha256::digest(&request.signed_octets).into();
                Ok(admitted(request, first, Proof::Unauthenticated { lineage }, None, Vec::new()))
            }
        }
    }

    fn check_shared_key(&self, request: &AuthenticateRequest, id: &str) -> Result<(), AuthError> {
        let secret = self
            .shared_secret(&request.local_id, Some(&request.peer_id))
            .ok_or_else(|| AuthError::NoSharedKey(id.to_owned()))?;
        check_mac(request, &request.shared_key_mac.mac(secret), id)
    }

    fn check_signature(
        &self,
        request: &AuthenticateRequest,
        entries: &[&PadEntry],
        now: u64,
        id: &str,
    ) -> Result<Admission, AuthError> {
        let certificate_error = |reason: String| AuthError::Certificate { id: id.to_owned(), reason };
        let raw_key_error = |reason: &str| AuthError::RawKey { id: id.to_owned(), reason: reason.to_owned() };
        // The signature comes before the chains: whoever does not hold the key costs one verification,
        // however many entries there are.
        let mut failure = None;
        let mut verified_keys = Vec::new();
        for key in self.raw_keys(request, entries).map_err(raw_key_error)? {
            match check_auth(request, Some((key.key_type(), key.subject_public_key())), id) {
                Ok(scheme) => verified_keys.push((key, scheme)),
                Err(error) => {
                    failure.get_or_insert(error);
                }
            }
        }
        let with_certificates: Vec<&PadEntry> =
            entries.iter().copied().filter(|entry| entry.takes_certificates()).collect();
        let signers = match with_certificates.is_empty() {
            true => Vec::new(),
            // Whoever is known by a raw key may have whatever certificate.
            false => self.signers(request, &with_certificates).or_else(|reason| match verified_keys.is_empty() {
                true => Err(certificate_error(reason)),
                false => Ok(Vec::new()),
            })?,
        };
        let mut verified = Vec::new();
        for signer in signers {
            match check_auth(request, signer.public_key(), id) {
                Ok(scheme) => verified.push((signer, scheme)),
                Err(error) => {
                    failure.get_or_insert(error);
                }
            }
        }
        let mut by_default: Vec<DefaultChains> = verified.iter().map(|_| Vec::new()).collect();
        for entry in entries {
            for (key, scheme) in &verified_keys {
                if !self.keys_for(entry, &request.peer_id).any(|named| named == key) {
                    continue;
                }
                if !entry.constraints.admits_auth(*scheme, request.settings) {
                    let reason = "its signature is none that the configuration asks for".to_owned();
                    failure.get_or_insert(AuthError::Method { id: id.to_owned(), reason });
                } else if !entry.constraints.admits_signer(key.key_type(), key.bits()) {
                    failure.get_or_insert(raw_key_error("it is none that the configuration asks for"));
                } else {
                    let proof = Proof::RawKey { key: key.der().to_vec(), method: request.method };
                    return Ok(admitted(request, entry, proof, None, Vec::new()));
                }
            }
            if !entry.takes_certificates() {
                continue;
            }
            for ((signer, scheme), by_default) in verified.iter().zip(&mut by_default) {
                if !entry.constraints.admits_auth(*scheme, request.settings) {
                    let reason = "its signature is none that the configuration asks for".to_owned();
                    failure.get_or_insert(AuthError::Method { id: id.to_owned(), reason });
                    continue;
                }
                match self.admit(request, entry, signer, by_default, now) {
                    Ok(chain) => {
                        let proof = Proof::Certificate {
                            end_entity: signer.der().to_vec(),
                            trust_anchor: chain.anchor.der().to_vec(),
                            method: request.method,
                        };
                        let left = u64::try_from(chain.not_after).unwrap_or(0).saturating_sub(now);
                        let good_for = Some(Duration::from_secs(left));
                        let Chain { intermediates, warnings, .. } = chain;
                        return Ok(Admission { intermediates, ..admitted(request, entry, proof, good_for, warnings) });
                    }
                    Err(reason) => {
                        failure.get_or_insert(certificate_error(reason));
                    }
                }
            }
        }
        Err(failure.unwrap_or_else(|| AuthError::BadAuth(id.to_owned())))
    }

    /// Raw keys that an entry takes for an identity: its own, or the loaded one that it has the name of. What a peer sends
    /// is never among them unless the configuration has it too.
    fn keys_for<'a>(&'a self, entry: &'a PadEntry, id: &'a Identity) -> impl Iterator<Item = &'a PublicKey> {
        let names_one = entry.remote_id.as_exact().is_some() && entry.remote_id.matches(id);
        let own = entry.public_keys.iter().filter(move |key| names_one || key.is_named_by(id));
        let loaded = self.public_keys().iter().map(Arc::as_ref);
        own.chain(loaded.filter(move |key| entry.names_loaded_key() && key.is_named_by(id)))
    }

    /// Raw keys that the peer may have signed with: those that the entries take, and of these the one that it shows, if it
    /// shows one.
    fn raw_keys(&self, request: &AuthenticateRequest, entries: &[&PadEntry]) -> Result<Vec<PublicKey>, &'static str> {
        let mut keys: Vec<PublicKey> = Vec::new();
        for key in entries.iter().flat_map(|entry| self.keys_for(entry, &request.peer_id)) {
            let is_shown = request.raw_key.as_ref().is_none_or(|shown| shown == key.der());
            if is_shown && keys.len() < MAX_CERTIFICATES && !keys.contains(key) {
                keys.push(key.clone());
            }
        }
        let wanted = !entries.iter().any(|entry| entry.takes_certificates());
        match keys.is_empty() && wanted {
            true if request.raw_key.is_some() => Err("it is none that the configuration names"),
            true => Err("the configuration names none for this identity"),
            false => Ok(keys),
        }
    }

    /// End-entity certificates that bind the asserted identity to a key: the peer's first (RFC 7296 §3.6), or
    /// where it sent none, those that we know already.
    fn signers(&self, request: &AuthenticateRequest, entries: &[&PadEntry]) -> Result<Vec<Arc<Certificate>>, String> {
        if request.certificates.len() > MAX_CERTIFICATES {
            return Err("there are too many certificates".to_owned());
        }
        if let Some(der) = request.certificates.first() {
            let certificate = Certificate::parse(der).map_err(|error| error.to_string())?;
            return if certificate.proves(&request.peer_id) {
                Ok(vec![Arc::new(certificate)])
            } else {
                Err("it does not contain the identity".to_owned())
            };
        }
        let pinned = entries.iter().flat_map(|entry| &entry.certs);
        let mut known: Vec<_> = pinned.filter_map(|der| Certificate::parse(der).ok()).map(Arc::new).collect();
        known.extend(self.certificates().iter().cloned());
        let mut signers: Vec<Arc<Certificate>> = Vec::new();
        for certificate in known {
            if certificate.proves(&request.peer_id)
                && !signers.contains(&certificate)
                && signers.len() < MAX_CERTIFICATES
            {
                signers.push(certificate);
            }
        }
        if signers.is_empty() { Err("it sent none and we know none".to_owned()) } else { Ok(signers) }
    }

    /// Says whether an entry accepts the certificate, and gives the chain.
    fn admit(
        &self,
        request: &AuthenticateRequest,
        entry: &PadEntry,
        signer: &Arc<Certificate>,
        by_default: &mut DefaultChains,
        now: u64,
    ) -> Result<Chain, String> {
        let bits = signer.key_bits();
        if !signer.key_type().is_some_and(|key| entry.constraints.admits_signer(key, bits)) {
            return Err("its key is none that the configuration asks for".to_owned());
        }
        if !signer.may_sign() {
            return Err("its key usage does not allow signatures".to_owned());
        }
        if !signer.is_valid_at(now) {
            return Err("it is not valid at this time".to_owned());
        }
        if !entry.certs.is_empty() {
            if !entry.certs.iter().any(|pinned| pinned == signer.der()) {
                return Err("it is not the configured one".to_owned());
            }
            // Configured by its octets, it needs nobody else to vouch for it.
            if entry.cacerts.is_empty() {
                let warnings = self.check_pinned(entry, signer, now)?;
                let (anchor, intermediates) = (Arc::clone(signer), Vec::new());
                return Ok(Chain { anchor, intermediates, not_after: signer.not_after(), warnings });
            }
        }
        let validate = |anchors: &[Arc<Certificate>]| {
            let sent = request.certificates.iter().skip(1).map(|der| CertificateDer::from(der.as_slice()));
            let loaded = self.intermediates().map(|certificate| CertificateDer::from(certificate.der()));
            let intermediates: Vec<_> =
                sent.filter(|der| der.len() <= certificate::MAX_CERTIFICATE_SIZE).chain(loaded).collect();
            let constraints = (&entry.constraints, request.settings);
            let revocation = (entry.revocation, self.crls());
            certificate::validate_chain(signer, anchors, &intermediates, now, constraints, revocation)
        };
        if entry.cacerts.is_empty() {
            let demands = (entry.constraints.clone(), entry.revocation);
            if let Some((_, known)) = by_default.iter().find(|(known, _)| *known == demands) {
                return known.clone();
            }
            let chain = validate(self.authorities());
            by_default.push((demands, chain.clone()));
            return chain;
        }
        let anchors: Vec<_> =
            entry.cacerts.iter().filter_map(|der| Certificate::parse(der).ok()).map(Arc::new).collect();
        validate(&anchors)
    }

    /// Why a peer that was admitted would not be now, as far as loaded CRLs go: one of them, signed by who issued it, has
    /// a certificate of its chain. `intermediates` are those of [`Admission::intermediates`].
    pub fn revoked(&self, peer: &PeerIdentity, intermediates: &[Vec<u8>], now: u64) -> Option<String> {
        let Proof::Certificate { end_entity, trust_anchor, .. } = &peer.proof else { return None };
        // A configured certificate is its own anchor, and whoever issued it is among the loaded ones, or unknown.
        let anchor = Some(trust_anchor).filter(|anchor| *anchor != end_entity);
        let ders = std::iter::once(end_entity).chain(intermediates).chain(anchor);
        let path: Vec<Certificate> = ders.filter_map(|der| Certificate::parse(der).ok()).collect();
        let loaded: Vec<&Certificate> = self.intermediates().map(Arc::as_ref).collect();
        path.iter().enumerate().find_map(|(at, certificate)| {
            // A CRL's signature is looked at only where it matters: this is asked of many peers at a time.
            if !self.crls().iter().any(|list| list.may_revoke(certificate)) {
                return None;
            }
            let issuers = match path.get(at.saturating_add(1)) {
                Some(issuer) => vec![issuer],
                None if anchor.is_none() => loaded.clone(),
                None => Vec::new(),
            };
            let mut issuers = issuers.into_iter().filter(|issuer| certificate.may_be_issued_by(issuer));
            issuers.find_map(|issuer| Revocation::Relaxed.check(self.crls(), certificate, issuer, now).err())
        })
    }

    /// A configured certificate needs nobody to vouch for it, but whoever issued it may have revoked it.
    fn check_pinned(&self, entry: &PadEntry, signer: &Certificate, now: u64) -> Result<Vec<String>, String> {
        if signer.is_self_issued() {
            return Ok(Vec::new());
        }
        let issuers = self.intermediates().filter(|issuer| signer.may_be_issued_by(issuer));
        let mut checked: Vec<_> =
            issuers.map(|issuer| entry.revocation.check(self.crls(), signer, issuer, now)).collect();
        if checked.is_empty() && entry.revocation == Revocation::Strict {
            let reason = "'revocation' asks for a CRL, and the CA that issued it is not loaded".to_owned();
            checked.push(Err(reason));
        }
        let warnings: Result<Vec<_>, _> = checked.into_iter().collect();
        Ok(warnings?.into_iter().flatten().collect())
    }
}

fn check_mac(request: &AuthenticateRequest, expected: &[u8], id: &str) -> Result<(), AuthError> {
    let equal: bool = expected.ct_eq(&request.auth).into();
    if equal && !expected.is_empty() { Ok(()) } else { Err(AuthError::BadAuth(id.to_owned())) }
}

fn check_auth(
    request: &AuthenticateRequest,
    key: Option<(KeyType, &[u8])>,
    id: &str,
) -> Result<Option<Scheme>, AuthError> {
    let method = |reason: &str| AuthError::Method { id: id.to_owned(), reason: reason.to_owned() };
    let (key_type, key) = key.ok_or_else(|| method("its public key is of an unknown kind"))?;
    signature::verify(request.method, key_type, key, &request.signed_octets, &request.auth).map_err(|error| match error
    {
        VerifyError::Method(reason) => method(reason),
        VerifyError::Signature => AuthError::BadAuth(id.to_owned()),
    })
}

fn admitted(
    request: &AuthenticateRequest,
    entry: &PadEntry,
    proof: Proof,
    good_for: Option<Duration>,
    warnings: Vec<String>,
) -> Admission {
    let (id, local_id, entry) = (request.peer_id.clone(), request.local_id.clone(), entry.name.clone());
    let peer = PeerIdentity { id, local_id, proof, entry };
    Admission { peer, good_for, intermediates: Vec::new(), warnings }
}
