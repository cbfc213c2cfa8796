//! X.509 certificates (RFC 5280) as IKE uses them (RFC 4945): what they say, whose identity they
//! prove, and validation of a chain at a given time.

use std::cell::RefCell;
use std::sync::Arc;

use pkcs8::der::asn1::AnyRef;
use pkcs8::der::{Decode, Encode, Tag};
use rustls_pki_types::{CertificateDer, SignatureVerificationAlgorithm, TrustAnchor, UnixTime};
use sha1::{Digest, Sha1};
use sha2::Sha256;
use webpki::aws_lc_rs as algorithms;
use webpki::{
    EndEntityCert, ExtendedKeyUsageValidator, KeyPurposeIdIter, KeyUsage, RequiredEkuNotFoundContext, VerifiedPath,
};
use x509_parser::prelude::{FromDer, GeneralName, ParsedExtension, X509Certificate};

use crate::constraints::{SignatureConstraints, SignatureSettings};
use crate::distinguished_name::elements;
use crate::identity::Identity;
use crate::revocation::{self, Crl, Revocation};
use crate::signature::{self, KeyType, Scheme};

/// Largest certificate that is read, in octets.
pub const MAX_CERTIFICATE_SIZE: usize = 64 * 1024;

/// Why octets are not a certificate that we can use.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("not an X.509 certificate: {0}")]
pub struct CertificateError(pub String);

/// A certificate, parsed; nothing is said about whether to trust it.
#[derive(Clone, PartialEq, Eq)]
pub struct Certificate {
    der: Vec<u8>,
    subject: Option<Identity>,
    subject_der: Vec<u8>,
    issuer: Option<Identity>,
    issuer_der: Vec<u8>,
    serial: Vec<u8>,
    not_before: i64,
    not_after: i64,
    alternative_names: Vec<Identity>,
    public_key: Option<(KeyType, Vec<u8>)>,
    key_bits: usize,
    public_key_info: Vec<u8>,
    subject_public_key: Vec<u8>,
    subject_key_id: Option<Vec<u8>>,
    authority_key_id: Option<Vec<u8>>,
    is_authority: bool,
    may_sign: bool,
    may_certify: bool,
    may_sign_crls: bool,
    /// URIs of its CRLs.
    distribution_points: Vec<String>,
    signature_scheme: Option<Scheme>,
}

impl std::fmt::Debug for Certificate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Certificate").field("subject", &self.subject).field("serial", &self.serial).finish()
    }
}

impl Certificate {
    /// Parses one certificate in DER, without anything after it.
    pub fn parse(der: &[u8]) -> Result<Self, CertificateError> {
        let malformed = |reason: &dyn std::fmt::Display| CertificateError(reason.to_string());
        if der.len() > MAX_CERTIFICATE_SIZE {
            return Err(malformed(&"it is too large"));
        }
        let (rest, certificate) = X509Certificate::from_der(der).map_err(|error| malformed(&error))?;
        if !rest.is_empty() {
            return Err(malformed(&"something follows it"));
        }
        // RFC 5280 §4.2: no extension twice. Two readers of the same certificate must not see two different ones.
        certificate.extensions_map().map_err(|error| malformed(&error))?;
        let alternative_names = certificate
            .subject_alternative_name()
            .map_err(|error| malformed(&error))?
            .map(|extension| extension.value.general_names.iter().filter_map(alternative_name).collect())
            .unwrap_or_default();
        let is_authority = certificate
            .basic_constraints()
            .map_err(|error| malformed(&error))?
            .is_some_and(|constraints| constraints.value.ca);
        let usage = certificate.key_usage().map_err(|error| malformed(&error))?.map(|extension| extension.value);
        let (mut subject_key_id, mut authority_key_id, mut distribution_points) = (None, None, Vec::new());
        for extension in certificate.extensions() {
            match extension.parsed_extension() {
                ParsedExtension::SubjectKeyIdentifier(id) => subject_key_id = Some(id.0.to_vec()),
                ParsedExtension::AuthorityKeyIdentifier(id) => {
                    authority_key_id = id.key_identifier.as_ref().map(|id| id.0.to_vec());
                }
                ParsedExtension::CRLDistributionPoints(points) => {
                    let named = points.iter().filter_map(|point| point.distribution_point.as_ref());
                    distribution_points = named.flat_map(revocation::uris).collect();
                }
                _ => {}
            }
        }
        let name = |der: &[u8]| Identity::from_wire(9, der).ok();
        let key = certificate.public_key();
        Ok(Self {
            der: der.to_vec(),
            subject: name(certificate.subject().as_raw()),
            subject_der: certificate.subject().as_raw().to_vec(),
            issuer: name(certificate.issuer().as_raw()),
            issuer_der: certificate.issuer().as_raw().to_vec(),
            serial: certificate.raw_serial().to_vec(),
            not_before: certificate.validity().not_before.timestamp(),
            not_after: certificate.validity().not_after.timestamp(),
            alternative_names,
            public_key: KeyType::of_public_key_info(key.raw),
            key_bits: key.parsed().map(|key| key.key_size()).unwrap_or_default(),
            public_key_info: key.raw.to_vec(),
            subject_public_key: key.subject_public_key.data.to_vec(),
            subject_key_id,
            authority_key_id,
            is_authority,
            // RFC 4945 §5.1.3.2: if the extension is there, one of these bits must be.
            may_sign: usage.is_none_or(|usage| usage.digital_signature() || usage.non_repudiation()),
            // RFC 5280 §6.1.4 (n).
            may_certify: is_authority && usage.is_none_or(|usage| usage.key_cert_sign()),
            // RFC 5280 §6.3.3 (f).
            may_sign_crls: is_authority && usage.is_none_or(|usage| usage.crl_sign()),
            distribution_points,
            signature_scheme: signature_scheme(der),
        })
    }

    /// The certificate in DER.
    pub fn der(&self) -> &[u8] {
        &self.der
    }

    /// The subject, as an identity; `None` if it is empty.
    pub fn subject(&self) -> Option<&Identity> {
        self.subject.as_ref()
    }

    /// The issuer's name; `None` if it is empty.
    pub fn issuer(&self) -> Option<&Identity> {
        self.issuer.as_ref()
    }

    /// Identities in the subjectAltName: FQDNs without wildcards, mail and IP addresses.
    pub fn alternative_names(&self) -> &[Identity] {
        &self.alternative_names
    }

    /// The serial number, big-endian.
    pub fn serial(&self) -> &[u8] {
        &self.serial
    }

    /// Start of validity, in seconds since the Unix epoch.
    pub fn not_before(&self) -> i64 {
        self.not_before
    }

    /// End of validity, in seconds since the Unix epoch.
    pub fn not_after(&self) -> i64 {
        self.not_after
    }

    /// Says whether `now`, in seconds since the Unix epoch, lies in the validity period.
    pub fn is_valid_at(&self, now: u64) -> bool {
        i64::try_from(now).is_ok_and(|now| self.not_before <= now && now <= self.not_after)
    }

    /// The kind of public key; `None` if we cannot use it.
    pub fn key_type(&self) -> Option<KeyType> {
        self.public_key.as_ref().map(|(kind, _)| *kind)
    }

    /// Size of the public key in bits; 0 if unknown.
    pub fn key_bits(&self) -> usize {
        self.key_bits
    }

    /// SHA-1 of the subjectPublicKey in hexadecimal: the key id of strongSwan and of
    /// [`Credentials::add_private_key`](crate::Credentials::add_private_key).
    pub fn key_id(&self) -> String {
        data_encoding::HEXLOWER.encode(&signature::key_id(&self.subject_public_key))
    }

    /// SHA-1 of the SubjectPublicKeyInfo, as CERTREQ names an authority (RFC 7296 §3.7).
    pub fn public_key_info_hash(&self) -> [u8; 20] {
        Sha1::digest(&self.public_key_info).into()
    }

    /// SHA-256 of the SubjectPublicKeyInfo.
    pub fn public_key_info_sha256(&self) -> [u8; 32] {
        Sha256::digest(&self.public_key_info).into()
    }

    /// The subjectKeyIdentifier extension.
    pub fn subject_key_identifier(&self) -> Option<&[u8]> {
        self.subject_key_id.as_deref()
    }

    /// URIs at which its CRLs are said to be (RFC 5280 §4.2.1.13).
    pub fn distribution_points(&self) -> &[String] {
        &self.distribution_points
    }

    /// Says whether it is a CA certificate (basicConstraints with CA:TRUE).
    pub fn is_authority(&self) -> bool {
        self.is_authority
    }

    /// Says whether subject and issuer are the same name.
    pub fn is_self_issued(&self) -> bool {
        self.subject_der == self.issuer_der
    }

    /// SHA-1 of the certificate.
    pub fn sha1_fingerprint(&self) -> [u8; 20] {
        Sha1::digest(&self.der).into()
    }

    /// SHA-256 of the certificate.
    pub fn sha256_fingerprint(&self) -> [u8; 32] {
        Sha256::digest(&self.der).into()
    }

    /// Says whether the certificate binds its key to this identity (RFC 4945 §3.1): a distinguished name as
    /// the subject, an FQDN, mail or IP address in the subjectAltName, a key id as subjectKeyIdentifier. The
    /// common name never counts, and neither does a wildcard in the certificate.
    pub fn proves(&self, identity: &Identity) -> bool {
        match identity {
            Identity::Dn(_) => self.subject.as_ref() == Some(identity),
            Identity::Fqdn(_) | Identity::Rfc822(_) | Identity::Ipv4(_) | Identity::Ipv6(_) => {
                self.alternative_names.contains(identity)
            }
            Identity::KeyId(id) => !id.is_empty() && self.subject_key_id.as_ref() == Some(id),
            Identity::Null | Identity::Other { .. } => false,
        }
    }

    pub(crate) fn public_key(&self) -> Option<(KeyType, &[u8])> {
        self.public_key.as_ref().map(|(kind, key)| (*kind, key.as_slice()))
    }

    /// Says whether its key usage lets it sign AUTH values.
    pub(crate) fn may_sign(&self) -> bool {
        self.may_sign
    }

    pub(crate) fn may_sign_crls(&self) -> bool {
        self.may_sign_crls
    }

    pub(crate) fn issuer_der(&self) -> &[u8] {
        &self.issuer_der
    }

    pub(crate) fn subject_der(&self) -> &[u8] {
        &self.subject_der
    }

    /// Says whether `issuer` could have issued it, by names and key identifiers; no signature is checked.
    pub(crate) fn may_be_issued_by(&self, issuer: &Self) -> bool {
        issuer.is_authority
            && self.issuer_der == issuer.subject_der
            && match (&self.authority_key_id, &issuer.subject_key_id) {
                (Some(ours), Some(theirs)) => ours == theirs,
                _ => true,
            }
    }
}

/// What its issuer signed it with.
fn signature_scheme(der: &[u8]) -> Option<Scheme> {
    let parts = elements(AnyRef::from_der(der).ok()?, Tag::Sequence)?;
    Scheme::of_certificate(&parts.get(1)?.to_der().ok()?)
}

fn alternative_name(name: &GeneralName<'_>) -> Option<Identity> {
    match name {
        GeneralName::DNSName(name) => Identity::from_wire(2, name.as_bytes()).ok(),
        GeneralName::RFC822Name(address) => Identity::from_wire(3, address.as_bytes()).ok(),
        GeneralName::IPAddress(octets) if octets.len() == 4 => Identity::from_wire(1, octets).ok(),
        GeneralName::IPAddress(octets) => Identity::from_wire(5, octets).ok(),
        _ => None,
    }
}

/// A chain that is valid.
#[derive(Clone, Debug)]
pub(crate) struct Chain {
    /// What it ends at.
    pub(crate) anchor: Arc<Certificate>,
    /// Those between, DER, the end entity's issuer first.
    pub(crate) intermediates: Vec<Vec<u8>>,
    /// When the first of its certificates ends, in seconds since the Unix epoch.
    pub(crate) not_after: i64,
    /// What an operator should know.
    pub(crate) warnings: Vec<String>,
}

/// Validates the chain from `leaf` to one of `anchors` at `now`.
///
/// Signatures with SHA-1 and RSA keys below 2048 bits are refused. The anchor's validity and key usage are
/// checked too: an expired CA vouches for nobody. The constraints hold for the keys of all certificates, the
/// anchor's included, and for the signatures of all but the anchor. Of several paths one is taken on which nothing is
/// revoked.
pub(crate) fn validate_chain(
    leaf: &Certificate,
    anchors: &[Arc<Certificate>],
    intermediates: &[CertificateDer<'_>],
    now: u64,
    (constraints, settings): (&SignatureConstraints, SignatureSettings),
    (revocation, lists): (Revocation, &[Arc<Crl>]),
) -> Result<Chain, String> {
    let (own_end, end_entity) = (leaf.not_after, leaf);
    let (warnings, revoked) = (RefCell::new(Vec::new()), RefCell::new(None));
    if !constraints.admits_certificate(leaf.signature_scheme, settings) {
        return Err("its issuer's signature is none that the configuration asks for".to_owned());
    }
    let key_fits = |certificate: &Certificate| {
        let admits = |key| constraints.admits_key(key, certificate.key_bits());
        certificate.key_type().map_or(constraints.admits_every_key(), admits)
    };
    let usable: Vec<_> =
        anchors.iter().filter(|anchor| anchor.may_certify && anchor.is_valid_at(now) && key_fits(anchor)).collect();
    let ders: Vec<_> = usable.iter().map(|anchor| CertificateDer::from(anchor.der())).collect();
    let mut anchors = Vec::new();
    for (certificate, der) in usable.iter().zip(&ders) {
        if let Ok(anchor) = webpki::anchor_from_trusted_cert(der) {
            anchors.push((anchor, Arc::clone(certificate)));
        }
    }
    let trusted: Vec<TrustAnchor<'_>> = anchors.iter().map(|(anchor, _)| anchor.clone()).collect();
    let der = CertificateDer::from(leaf.der());
    let leaf = EndEntityCert::try_from(&der).map_err(|error| error.to_string())?;
    let time = UnixTime::since_unix_epoch(std::time::Duration::from_secs(now));
    let issuers_are_good = |path: &VerifiedPath<'_>| {
        let mut issuers = Vec::new();
        for issuer in path.intermediate_certificates() {
            let issuer = Certificate::parse(&issuer.der()).ok().filter(|issuer| issuer.may_certify);
            let issuer = issuer.ok_or(webpki::Error::EndEntityUsedAsCa)?;
            if !key_fits(&issuer) || !constraints.admits_certificate(issuer.signature_scheme, settings) {
                return Err(webpki::Error::UnknownIssuer);
            }
            issuers.push(issuer);
        }
        let anchor = anchors.iter().find(|(anchor, _)| anchor == path.anchor());
        let (_, anchor) = anchor.ok_or(webpki::Error::UnknownIssuer)?;
        let path = std::iter::once(end_entity).chain(&issuers);
        let mut found = Vec::new();
        for (certificate, issuer) in path.zip(issuers.iter().chain([&**anchor])) {
            match revocation.check(lists, certificate, issuer, now) {
                Ok(warning) => found.extend(warning),
                Err(reason) => {
                    *revoked.borrow_mut() = Some(reason);
                    return Err(webpki::Error::CertRevoked);
                }
            }
        }
        *warnings.borrow_mut() = found;
        Ok(())
    };
    let path = leaf
        .verify_for_usage(SIGNATURES, &trusted, intermediates, time, IkeUsage, None, Some(&issuers_are_good))
        .map_err(|error| revoked.borrow_mut().take().unwrap_or_else(|| error.to_string()))?;
    let anchor = anchors.iter().find(|(anchor, _)| anchor == path.anchor()).map(|(_, certificate)| certificate);
    let anchor = anchor.ok_or_else(|| "the trust anchor is not known".to_owned())?;
    let mut not_after = own_end.min(anchor.not_after);
    let mut between = Vec::new();
    for issuer in path.intermediate_certificates() {
        between.push(issuer.der().to_vec());
        // All of them were parsed above.
        not_after = Certificate::parse(&issuer.der()).map_or(i64::MIN, |issuer| issuer.not_after).min(not_after);
    }
    Ok(Chain { anchor: Arc::clone(anchor), intermediates: between, not_after, warnings: warnings.take() })
}

/// RFC 4945 §5.1.3.12 takes certificates without extendedKeyUsage, with anyExtendedKeyUsage or with
/// id-kp-ipsecIKE. Deployed CAs also issue with iKEIntermediate, the older IPsec purposes, and most
/// of all with serverAuth and clientAuth, which other implementations accept; so do we. A certificate for
/// anything else only (code or time signing, OCSP) is refused.
struct IkeUsage;

/// id-kp-ipsecIKE, the content of its OBJECT IDENTIFIER.
const IPSEC_IKE: &[u8] = &[43, 6, 1, 5, 5, 7, 3, 17];

impl ExtendedKeyUsageValidator for IkeUsage {
    fn validate(&self, purposes: KeyPurposeIdIter<'_, '_>) -> Result<(), webpki::Error> {
        const ACCEPTED: [&[usize]; 8] = [
            &[2, 5, 29, 37, 0],
            &[1, 3, 6, 1, 5, 5, 7, 3, 17],
            &[1, 3, 6, 1, 5, 5, 8, 2, 2],
            &[1, 3, 6, 1, 5, 5, 7, 3, 5],
            &[1, 3, 6, 1, 5, 5, 7, 3, 6],
            &[1, 3, 6, 1, 5, 5, 7, 3, 7],
            &[1, 3, 6, 1, 5, 5, 7, 3, 1],
            &[1, 3, 6, 1, 5, 5, 7, 3, 2],
        ];
        let mut present = Vec::new();
        for purpose in purposes {
            let purpose = purpose?.to_decoded_oid();
            if ACCEPTED.contains(&purpose.as_slice()) {
                return Ok(());
            }
            present.push(purpose);
        }
        if present.is_empty() {
            return Ok(());
        }
        let required = KeyUsage::required_if_present(IPSEC_IKE);
        Err(webpki::Error::RequiredEkuNotFoundContext(RequiredEkuNotFoundContext { required, present }))
    }
}

/// What certificates and revocation lists may be signed with.
pub(crate) static SIGNATURES: &[&dyn SignatureVerificationAlgorithm] = &[
    algorithms::ECDSA_P256_SHA256,
    algorithms::ECDSA_P256_SHA384,
    algorithms::ECDSA_P256_SHA512,
    algorithms::ECDSA_P384_SHA256,
    algorithms::ECDSA_P384_SHA384,
    algorithms::ECDSA_P384_SHA512,
    algorithms::ECDSA_P521_SHA256,
    algorithms::ECDSA_P521_SHA384,
    algorithms::ECDSA_P521_SHA512,
    algorithms::ED25519,
    algorithms::RSA_PKCS1_2048_8192_SHA256,
    algorithms::RSA_PKCS1_2048_8192_SHA384,
    algorithms::RSA_PKCS1_2048_8192_SHA512,
    algorithms::RSA_PKCS1_2048_8192_SHA256_ABSENT_PARAMS,
    algorithms::RSA_PKCS1_2048_8192_SHA384_ABSENT_PARAMS,
    algorithms::RSA_PKCS1_2048_8192_SHA512_ABSENT_PARAMS,
    algorithms::RSA_PSS_2048_8192_SHA256_LEGACY_KEY,
    algorithms::RSA_PSS_2048_8192_SHA384_LEGACY_KEY,
    algorithms::RSA_PSS_2048_8192_SHA512_LEGACY_KEY,
];
