//! What is loaded: certificates, authorities, private keys and shared secrets.

use std::borrow::Cow;
use std::sync::Arc;

use ipsec::secret::Secret;
use pkcs8::SecretDocument;
use pkcs8::der::Decode;
use pkcs8::pkcs5::EncryptionScheme;
use pkcs8::pkcs5::pbes2::Kdf;
use rustls_pki_types::pem::{PemObject, SectionKind};
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer};
use zeroize::Zeroizing;

use crate::certificate::{Certificate, CertificateError};
use crate::identity::{Identity, IdentityPattern, Specificity};
use crate::public_key::{PublicKey, PublicKeyError};
use crate::revocation::{Crl, CrlError};
use crate::signature::{self, KeyType, PrivateKey};

/// All credentials of the daemon; cheap to clone and swap as a snapshot (`Arc` inside).
#[derive(Clone, Debug, Default)]
pub struct Credentials {
    inner: Arc<Inner>,
}

#[derive(Clone, Debug, Default)]
struct Inner {
    certificates: Vec<Arc<Certificate>>,
    authorities: Vec<Arc<Certificate>>,
    crls: Vec<Arc<Crl>>,
    public_keys: Vec<Arc<PublicKey>>,
    private_keys: Vec<Arc<PrivateKey>>,
    shared_secrets: Vec<Arc<SharedSecret>>,
}

#[derive(Debug)]
struct SharedSecret {
    kind: SharedKind,
    name: Option<String>,
    owners: Vec<IdentityPattern>,
    secret: Secret,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SharedKind {
    /// It authenticates.
    Ike,
    /// It is mixed into the keys.
    Ppk,
    /// It authenticates by EAP: a password.
    Eap,
}

/// A post-quantum preshared key (RFC 8784): mixed into keys, proves nothing by itself.
#[derive(Clone, Debug)]
pub struct Ppk(Arc<SharedSecret>);

impl Ppk {
    /// True when it has this PPK_ID; one without identities has any.
    pub fn has_id(&self, id: &Identity) -> bool {
        self.0.owners.is_empty() || self.0.owners.iter().any(|owner| owner.matches(id))
    }

    /// The key.
    pub fn secret(&self) -> &Secret {
        &self.0.secret
    }
}

/// Why a credential was not loaded.
#[derive(Debug, thiserror::Error)]
pub enum CredentialError {
    /// It is not a certificate.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    /// It is not a revocation list.
    #[error(transparent)]
    Crl(#[from] CrlError),
    /// It is not a public key.
    #[error(transparent)]
    PublicKey(#[from] PublicKeyError),
    /// It is not a CA certificate (the text is strongSwan's).
    #[error("certificate without CA flag, rejected")]
    NotAnAuthority,
    /// It is not a private key that we can use.
    #[error("not an RSA (2048 bits at least), ECDSA (P-256, P-384, P-521) or Ed25519 private key")]
    PrivateKey,
    /// The private key is encrypted, and the passphrase is missing or wrong, or the scheme unknown.
    #[error("the private key cannot be decrypted: {0}")]
    Encrypted(&'static str),
    /// The secret has no octets.
    #[error("the shared secret is empty")]
    EmptySecret,
}

/// A loaded certificate.
#[derive(Clone, Debug)]
pub struct StoredCertificate {
    /// The certificate.
    pub certificate: Arc<Certificate>,
    /// It was loaded as a trust anchor.
    pub is_trust_anchor: bool,
    /// The private key to it is loaded.
    pub has_private_key: bool,
}

impl Credentials {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds certificates, DER or PEM: our own, peers', intermediate CAs'. None of them becomes a trust anchor.
    pub fn add_certificate(&mut self, data: &[u8]) -> Result<(), CredentialError> {
        let certificates = parse_certificates(data)?;
        let inner = Arc::make_mut(&mut self.inner);
        certificates.into_iter().for_each(|certificate| insert(&mut inner.certificates, certificate));
        Ok(())
    }

    /// Adds trust anchors, DER or PEM; certificates without CA:TRUE are refused, and then none is added.
    pub fn add_authority(&mut self, data: &[u8]) -> Result<(), CredentialError> {
        let certificates = parse_certificates(data)?;
        if !certificates.iter().all(Certificate::is_authority) {
            return Err(CredentialError::NotAnAuthority);
        }
        let inner = Arc::make_mut(&mut self.inner);
        certificates.into_iter().for_each(|certificate| insert(&mut inner.authorities, certificate));
        Ok(())
    }

    /// Adds certificate revocation lists, DER or PEM. Of lists about the same certificates the newest counts that their
    /// issuer signed; where it is known already, it takes the place of older ones of that issuer.
    pub fn add_crl(&mut self, data: &[u8]) -> Result<(), CredentialError> {
        let lists = parse_crls(data)?;
        let inner = Arc::make_mut(&mut self.inner);
        for list in lists {
            if inner.crls.iter().any(|known| **known == list) {
                continue;
            }
            let loaded = inner.certificates.iter().chain(&inner.authorities);
            let signer = loaded.into_iter().find(|authority| list.is_signed_by(authority));
            if let Some(signer) = signer {
                let is_known = |known: &Arc<Crl>| known.is_signed_by(signer);
                if inner.crls.iter().any(|known| known.replaces(&list) && !list.replaces(known) && is_known(known)) {
                    continue;
                }
                inner.crls.retain(|known| !(list.replaces(known) && is_known(known)));
            }
            inner.crls.push(Arc::new(list));
        }
        Ok(())
    }

    /// Adds a raw public key, DER or PEM. By itself it proves nobody but who is named by it (see
    /// [`PublicKey::is_named_by`]), and that only where an entry of the PAD has this name.
    pub fn add_public_key(&mut self, data: &[u8]) -> Result<(), CredentialError> {
        let key = PublicKey::parse(data)?;
        if !self.inner.public_keys.iter().any(|known| **known == key) {
            Arc::make_mut(&mut self.inner).public_keys.push(Arc::new(key));
        }
        Ok(())
    }

    /// The raw public keys, in the order of loading.
    pub fn public_keys(&self) -> &[Arc<PublicKey>] {
        &self.inner.public_keys
    }

    /// Says whether the private key to a public key is loaded.
    pub fn has_private_key_to(&self, key: &PublicKey) -> bool {
        self.private_key(key.key_type(), key.subject_public_key()).is_some()
    }

    /// The certificate revocation lists, in the order of loading.
    pub fn crls(&self) -> &[Arc<Crl>] {
        &self.inner.crls
    }

    /// Adds a private key: PKCS#8 (plain or encrypted), PKCS#1 or SEC1, in DER or PEM. Returns its key id, the
    /// SHA-1 of the subjectPublicKey in hexadecimal.
    pub fn add_private_key(&mut self, data: &[u8], passphrase: Option<&[u8]>) -> Result<String, CredentialError> {
        let der = private_key_der(data)?;
        let key = match decrypt(&der, passphrase)? {
            Some(plain) => PrivateKey::from_der(plain.as_bytes()),
            None => PrivateKey::from_der(&der),
        };
        let key = key.ok_or(CredentialError::PrivateKey)?;
        let id = key_id(&key);
        if !self.inner.private_keys.iter().any(|known| key_id(known) == id) {
            Arc::make_mut(&mut self.inner).private_keys.push(Arc::new(key));
        }
        Ok(id)
    }

    /// Adds a shared secret. It replaces one of the same name. `owners` are the identities that share it;
    /// without owners it is for every pair.
    pub fn add_shared_secret(
        &mut self,
        name: Option<String>,
        owners: Vec<IdentityPattern>,
        secret: Secret,
    ) -> Result<(), CredentialError> {
        self.add_shared(SharedKind::Ike, name, owners, secret)
    }

    /// Adds a post-quantum preshared key with its PPK_IDs, of which it may have none: then it is for all. It replaces
    /// a shared secret of the same name.
    pub fn add_ppk(
        &mut self,
        name: Option<String>,
        ids: Vec<IdentityPattern>,
        secret: Secret,
    ) -> Result<(), CredentialError> {
        self.add_shared(SharedKind::Ppk, name, ids, secret)
    }

    /// Adds a password for EAP with the identities that it belongs to. It replaces a shared secret of the same name.
    pub fn add_eap_secret(
        &mut self,
        name: Option<String>,
        owners: Vec<IdentityPattern>,
        secret: Secret,
    ) -> Result<(), CredentialError> {
        self.add_shared(SharedKind::Eap, name, owners, secret)
    }

    fn add_shared(
        &mut self,
        kind: SharedKind,
        name: Option<String>,
        owners: Vec<IdentityPattern>,
        secret: Secret,
    ) -> Result<(), CredentialError> {
        if secret.expose().is_empty() {
            return Err(CredentialError::EmptySecret);
        }
        let new = SharedSecret { kind, name, owners, secret };
        // Loading the same again changes nothing, its place neither.
        if self.inner.shared_secrets.iter().any(|known| known.is_same_as(&new)) {
            return Ok(());
        }
        let inner = Arc::make_mut(&mut self.inner);
        inner.shared_secrets.retain(|known| new.name.is_none() || known.name != new.name);
        inner.shared_secrets.push(Arc::new(new));
        Ok(())
    }

    /// The post-quantum preshared keys, in the order of loading.
    pub fn ppks(&self) -> Vec<Ppk> {
        let all = self.inner.shared_secrets.iter();
        all.filter(|shared| shared.kind == SharedKind::Ppk).map(|shared| Ppk(Arc::clone(shared))).collect()
    }

    /// Removes the private key with this id; says whether there was one.
    pub fn remove_private_key(&mut self, id: &str) -> bool {
        let keys = &mut Arc::make_mut(&mut self.inner).private_keys;
        let before = keys.len();
        keys.retain(|key| !key_id(key).eq_ignore_ascii_case(id));
        keys.len() < before
    }

    /// Removes the shared secret with this name; says whether there was one.
    pub fn remove_shared_secret(&mut self, name: &str) -> bool {
        let secrets = &mut Arc::make_mut(&mut self.inner).shared_secrets;
        let before = secrets.len();
        secrets.retain(|secret| secret.name.as_deref() != Some(name));
        secrets.len() < before
    }

    /// True when another store has the same credentials in the same order: both admit and sign alike.
    pub fn is_same_as(&self, other: &Self) -> bool {
        let (ours, theirs) = (&self.inner, &other.inner);
        let same_secrets = || {
            let mut pairs = ours.shared_secrets.iter().zip(&theirs.shared_secrets);
            ours.shared_secrets.len() == theirs.shared_secrets.len()
                && pairs.all(|(one, another)| one.is_same_as(another))
        };
        Arc::ptr_eq(ours, theirs)
            || (ours.certificates == theirs.certificates
                && ours.authorities == theirs.authorities
                && ours.crls == theirs.crls
                && ours.public_keys == theirs.public_keys
                && self.private_key_ids() == other.private_key_ids()
                && same_secrets())
    }

    /// Removes everything.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// Ids of the private keys, in the order of loading.
    pub fn private_key_ids(&self) -> Vec<String> {
        self.inner.private_keys.iter().map(|key| key_id(key)).collect()
    }

    /// Names of the shared secrets that have one, in the order of loading.
    pub fn shared_secret_names(&self) -> Vec<String> {
        self.inner.shared_secrets.iter().filter_map(|secret| secret.name.clone()).collect()
    }

    /// All certificates, the trust anchors first, each in the order of loading.
    pub fn stored_certificates(&self) -> Vec<StoredCertificate> {
        let stored = |is_trust_anchor| {
            move |certificate: &Arc<Certificate>| StoredCertificate {
                certificate: Arc::clone(certificate),
                is_trust_anchor,
                has_private_key: self.private_key_of(certificate).is_some(),
            }
        };
        let authorities = self.authorities().iter().map(stored(true));
        authorities.chain(self.certificates().iter().map(stored(false))).collect()
    }

    /// SHA-1 hashes of the loaded CAs' SubjectPublicKeyInfo, for CERTREQ (RFC 7296 §3.7).
    pub fn authority_hashes(&self) -> Vec<[u8; 20]> {
        let mut hashes = Vec::new();
        for authority in self.authorities() {
            let hash = authority.public_key_info_hash();
            if !hashes.contains(&hash) {
                hashes.push(hash);
            }
        }
        hashes
    }

    pub(super) fn certificates(&self) -> &[Arc<Certificate>] {
        &self.inner.certificates
    }

    pub(super) fn authorities(&self) -> &[Arc<Certificate>] {
        &self.inner.authorities
    }

    pub(super) fn private_key_of(&self, certificate: &Certificate) -> Option<&PrivateKey> {
        let (key_type, public_key) = certificate.public_key()?;
        self.private_key(key_type, public_key)
    }

    /// The private key to a subjectPublicKey.
    pub(super) fn private_key(&self, key_type: KeyType, public_key: &[u8]) -> Option<&PrivateKey> {
        let fits = |key: &&Arc<PrivateKey>| key.key_type() == key_type && key.public_key() == public_key;
        self.inner.private_keys.iter().find(fits).map(Arc::as_ref)
    }

    /// CA certificates that may complete a chain, DER.
    pub(super) fn intermediates(&self) -> impl Iterator<Item = &Arc<Certificate>> {
        self.certificates().iter().chain(self.authorities()).filter(|certificate| certificate.is_authority())
    }

    /// The secret that fits the pair best: the peer's identity counts more than ours, a narrow owner more than
    /// a wide one; of equals the one loaded first.
    pub(crate) fn shared_secret(&self, local: &Identity, remote: Option<&Identity>) -> Option<&Secret> {
        let mut best: Option<(Fit, &Secret)> = None;
        for shared in self.inner.shared_secrets.iter().filter(|shared| shared.kind == SharedKind::Ike) {
            if let Some(fit) = shared.fit(local, remote)
                && best.is_none_or(|(known, _)| known < fit)
            {
                best = Some((fit, &shared.secret));
            }
        }
        best.map(|(_, secret)| secret)
    }

    /// A peer's password for EAP: that of the narrowest owner, of equals the one loaded first. One without owners is nobody's,
    /// and we are no peer of ours, even where both ends are named as owners.
    pub(crate) fn eap_secret_of(&self, peer: &Identity, ours: &Identity) -> Option<&Secret> {
        if peer == ours { None } else { self.eap_secret(|shared| shared.owned_by(peer)) }
    }

    /// Our password for EAP towards a gateway, which may be an owner too. One without owners is good everywhere.
    pub(crate) fn eap_secret_for(&self, ours: &Identity, gateway: &Identity) -> Option<&Secret> {
        self.eap_secret(|shared| match shared.owned_by(ours) {
            Some(specificity) => Some((Some(specificity), shared.owned_by(gateway))),
            None => shared.owners.is_empty().then_some((None, None)),
        })
    }

    fn eap_secret<Fit: Ord>(&self, fit: impl Fn(&SharedSecret) -> Option<Fit>) -> Option<&Secret> {
        let mut best: Option<(Fit, &Secret)> = None;
        for shared in self.inner.shared_secrets.iter().filter(|shared| shared.kind == SharedKind::Eap) {
            if let Some(fit) = fit(shared)
                && best.as_ref().is_none_or(|(known, _)| *known < fit)
            {
                best = Some((fit, &shared.secret));
            }
        }
        best.map(|(_, secret)| secret)
    }
}

/// How well a secret fits: owner for the peer, owner for us.
type Fit = (Option<Specificity>, Option<Specificity>);

impl SharedSecret {
    fn owned_by(&self, identity: &Identity) -> Option<Specificity> {
        self.owners.iter().filter_map(|owner| owner.match_specificity(identity)).max()
    }

    fn is_same_as(&self, other: &Self) -> bool {
        self.kind == other.kind
            && self.name == other.name
            && self.owners == other.owners
            && self.secret.matches(other.secret.expose())
    }

    /// A secret that names owners fits a peer that is one of them, other than the one that we are. If all
    /// of them are just us, it is our secret towards everybody. It is never enough that one owner is us, nor
    /// that a pattern admits us: then the other owners could pretend to be anybody.
    fn fit(&self, local: &Identity, remote: Option<&Identity>) -> Option<Fit> {
        let specificity = |identity: &Identity| self.owned_by(identity);
        let ours = specificity(local);
        if self.owners.iter().all(|owner| owner.match_specificity(local) == Some(Specificity::Exact)) {
            return Some((remote.and_then(specificity), ours));
        }
        let Some(remote) = remote else { return ours.map(|ours| (None, Some(ours))) };
        // We may be named too, but then by another owner than the peer, or by a pattern for many.
        let theirs = self
            .owners
            .iter()
            .enumerate()
            .filter(|(index, owner)| {
                let names_both = owner.matches(local) && owner.as_exact().is_none() && remote != local;
                let others = self.owners.iter().enumerate().filter(|(other, _)| other != index);
                ours.is_none() || names_both || others.into_iter().any(|(_, other)| other.matches(local))
            })
            .filter_map(|(_, owner)| owner.match_specificity(remote))
            .max()?;
        Some((Some(theirs), ours))
    }
}

fn insert(list: &mut Vec<Arc<Certificate>>, certificate: Certificate) {
    if !list.iter().any(|known| **known == certificate) {
        list.push(Arc::new(certificate));
    }
}

fn key_id(key: &PrivateKey) -> String {
    data_encoding::HEXLOWER.encode(&signature::key_id(key.public_key()))
}

/// Certificates in one DER or in a PEM file.
fn parse_certificates(data: &[u8]) -> Result<Vec<Certificate>, CertificateError> {
    let malformed = |_| CertificateError("broken PEM".to_owned());
    let ders: Vec<Cow<'_, [u8]>> = if is_pem(data) {
        let sections = CertificateDer::pem_slice_iter(data).collect::<Result<Vec<_>, _>>().map_err(malformed)?;
        sections.into_iter().map(|der| Cow::Owned(der.to_vec())).collect()
    } else {
        vec![Cow::Borrowed(data)]
    };
    if ders.is_empty() {
        return Err(CertificateError("no certificate in the PEM".to_owned()));
    }
    ders.iter().map(|der| Certificate::parse(der)).collect()
}

/// Revocation lists in one DER or in a PEM file.
fn parse_crls(data: &[u8]) -> Result<Vec<Crl>, CrlError> {
    if !is_pem(data) {
        return Ok(vec![Crl::parse(data)?]);
    }
    let sections = CertificateRevocationListDer::pem_slice_iter(data).collect::<Result<Vec<_>, _>>();
    let sections = sections.map_err(|_| CrlError("broken PEM".to_owned()))?;
    if sections.is_empty() {
        return Err(CrlError("no CRL in the PEM".to_owned()));
    }
    sections.iter().map(|der| Crl::parse(der)).collect()
}

fn is_pem(data: &[u8]) -> bool {
    data.windows(11).any(|window| window == b"-----BEGIN ")
}

pub(super) fn private_key_der(data: &[u8]) -> Result<Zeroizing<Vec<u8>>, CredentialError> {
    if !is_pem(data) {
        return Ok(Zeroizing::new(data.to_vec()));
    }
    let text = std::str::from_utf8(data).map_err(|_| CredentialError::PrivateKey)?;
    if text.contains("Proc-Type:") {
        return Err(CredentialError::Encrypted("it is in OpenSSL's old format; convert it to PKCS#8"));
    }
    // `rustls-pki-types` does not know the label of encrypted keys.
    if let Some(start) = text.find("-----BEGIN ENCRYPTED PRIVATE KEY-----") {
        let section = text.get(start..).unwrap_or_default();
        let (_, document) = SecretDocument::from_pem(section).map_err(|_| CredentialError::PrivateKey)?;
        return Ok(Zeroizing::new(document.as_bytes().to_vec()));
    }
    for section in <(SectionKind, Vec<u8>)>::pem_slice_iter(data) {
        let (kind, der) = section.map_err(|_| CredentialError::PrivateKey)?;
        let der = Zeroizing::new(der);
        if matches!(kind, SectionKind::PrivateKey | SectionKind::RsaPrivateKey | SectionKind::EcPrivateKey) {
            return Ok(der);
        }
    }
    Err(CredentialError::PrivateKey)
}

/// Decrypts an EncryptedPrivateKeyInfo; `None` if it is something else.
fn decrypt(der: &[u8], passphrase: Option<&[u8]>) -> Result<Option<SecretDocument>, CredentialError> {
    // A file that asks for hours of key derivation must not hang the daemon.
    const MAX_ITERATIONS: u32 = 10_000_000;
    const MAX_SCRYPT_COST: u64 = 1 << 20;
    let Ok(info) = pkcs8::EncryptedPrivateKeyInfoRef::from_der(der) else { return Ok(None) };
    let passphrase = passphrase.ok_or(CredentialError::Encrypted("there is no passphrase"))?;
    let EncryptionScheme::Pbes2(parameters) = &info.encryption_algorithm else {
        return Err(CredentialError::Encrypted("only PBES2 is supported"));
    };
    let bounded = match &parameters.kdf {
        Kdf::Pbkdf2(parameters) => (1..=MAX_ITERATIONS).contains(&parameters.iteration_count),
        Kdf::Scrypt(parameters) => {
            // RFC 7914 §2: a power of 2 larger than 1.
            parameters.cost_parameter.is_power_of_two()
                && (2..=MAX_SCRYPT_COST).contains(&parameters.cost_parameter)
                && (1..=32).contains(&parameters.block_size)
                && (1..=16).contains(&parameters.parallelization)
        }
        _ => false,
    };
    if !bounded {
        return Err(CredentialError::Encrypted("its key derivation is too expensive or unknown"));
    }
    info.decrypt(passphrase).map(Some).map_err(|_| CredentialError::Encrypted("wrong passphrase or scheme"))
}
