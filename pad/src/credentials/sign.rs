//! Our own proof (RFC 7296 §2.15, RFC 7427 §4).

use std::sync::Arc;

use super::{AuthClass, AuthMethod, Credentials, SignError, SignRequest, SignedAuth};
use crate::certificate::Certificate;
use crate::signature::PrivateKey;

/// Longest chain of intermediate certificates that is sent.
const MAX_INTERMEDIATES: usize = 8;

impl Credentials {
    /// Signs as us.
    ///
    /// With a public key the certificate must contain the identity, and its private key must be loaded. Of
    /// several the first under an authority that the peer asked for is taken, else the first. RSA needs a peer
    /// that announced a SHA-2 hash: method 1 would mean SHA-1, which the library does not sign with.
    pub fn sign(&self, request: &SignRequest) -> Result<SignedAuth, SignError> {
        let id = request.local_id.to_string();
        match request.auth.class {
            AuthClass::SharedKey => {
                let secret = self
                    .shared_secret(&request.local_id, request.peer_id.as_ref())
                    .ok_or(SignError::NoSharedKey(id))?;
                let auth = request.shared_key_mac.mac(secret);
                Ok(SignedAuth { method: AuthMethod::SHARED_KEY, auth, certificates: Vec::new() })
            }
            AuthClass::PublicKey => {
                let (certificate, key) = self.signer(request).ok_or_else(|| SignError::NoKey(id.clone()))?;
                let (method, auth) = key
                    .sign(&request.octets, request.peer_hashes.as_deref(), request.auth.rsa_pss)
                    .map_err(|reason| SignError::Failed { id, reason: reason.to_owned() })?;
                let chain = self.chain(&certificate);
                let intermediates = chain.iter().filter(|issuer| !issuer.is_self_issued());
                let certificates = std::iter::once(&certificate).chain(intermediates);
                let certificates = certificates.map(|certificate| certificate.der().to_vec()).collect();
                Ok(SignedAuth { method, auth, certificates })
            }
        }
    }

    fn signer(&self, request: &SignRequest) -> Option<(Arc<Certificate>, &PrivateKey)> {
        let certificates: Vec<Arc<Certificate>> = if request.auth.certificates.is_empty() {
            self.certificates().to_vec()
        } else {
            let configured = request.auth.certificates.iter();
            configured.filter_map(|der| Certificate::parse(der).ok()).map(Arc::new).collect()
        };
        let mut usable: Vec<_> = certificates
            .into_iter()
            .filter(|certificate| certificate.proves(&request.local_id))
            .filter_map(|certificate| self.private_key_of(&certificate).map(|key| (certificate, key)))
            .collect();
        let asked_for = |certificate: &Certificate| {
            let chain = self.chain(certificate);
            chain.iter().any(|issuer| request.cert_requests.contains(&issuer.public_key_info_hash()))
        };
        let position = usable.iter().position(|(certificate, _)| asked_for(certificate)).unwrap_or(0);
        (position < usable.len()).then(|| usable.swap_remove(position))
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
