//! Certificate revocation lists (RFC 5280 §5, §6.3; RFC 4945 §4.1.2): what they say, who signed them, and what that means
//! for a chain. Lists are loaded; nothing that a certificate points to is fetched.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use pkcs8::der::Decode;
use pkcs8::der::Tag;
use pkcs8::der::asn1::AnyRef;
use rustls_pki_types::CertificateDer;
use webpki::EndEntityCert;
use x509_parser::prelude::{DistributionPointName, FromDer, GeneralName, ParsedExtension, X509Extension};
use x509_parser::revocation_list::CertificateRevocationList;

use crate::certificate::{Certificate, SIGNATURES};
use crate::distinguished_name::elements;
use crate::identity::Identity;

/// Largest list that is read, in octets.
pub const MAX_CRL_SIZE: usize = 16 * 1024 * 1024;

/// removeFromCRL, of delta CRLs (RFC 5280 §5.3.1).
const REMOVE_FROM_CRL: u8 = 8;

/// Why octets are not a revocation list that we can use.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("not an X.509 CRL: {0}")]
pub struct CrlError(pub String);

/// What has to be known about the certificates of a chain (`revocation` of swanctl.conf).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Revocation {
    /// None of them is known to be revoked.
    #[default]
    Relaxed,
    /// The same, and those that name a CRL are known to be good.
    IfUri,
    /// All of them are known to be good, but for the trust anchor.
    Strict,
}

/// A certificate revocation list, parsed; nothing is said about whether to trust it.
#[derive(Clone, PartialEq, Eq)]
pub struct Crl {
    der: Vec<u8>,
    tbs: Range<usize>,
    /// AlgorithmIdentifier without its SEQUENCE.
    algorithm: Vec<u8>,
    signature: Vec<u8>,
    issuer: Option<Identity>,
    issuer_der: Vec<u8>,
    authority_key_id: Option<Vec<u8>>,
    /// CRL number, big-endian.
    number: Vec<u8>,
    this_update: i64,
    next_update: Option<i64>,
    scope: Scope,
    /// By serial number, without leading zeros.
    revoked: BTreeMap<Vec<u8>, Revoked>,
}

/// Which certificates of its issuer a list is about (RFC 5280 §5.2.5).
#[derive(Clone, Debug, PartialEq, Eq)]
struct Scope {
    end_entities: bool,
    authorities: bool,
    /// Those alone that name one of these; `None` for all.
    points: Option<Vec<String>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Revoked {
    /// In seconds since the Unix epoch.
    at: i64,
    /// CRLReason (RFC 5280 §5.3.1).
    reason: u8,
}

/// What is known of a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    Good,
    Revoked(Revoked),
    /// The list that would say so should have been replaced by then.
    Stale(i64),
    Unknown,
}

impl std::fmt::Debug for Crl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Crl").field("issuer", &self.issuer).field("this_update", &self.this_update).finish()
    }
}

impl Crl {
    /// Parses one list in DER, without anything after it. Delta and indirect CRLs are refused, and all that is critical
    /// and not understood.
    pub fn parse(der: &[u8]) -> Result<Self, CrlError> {
        let malformed = |reason: &dyn std::fmt::Display| CrlError(reason.to_string());
        if der.len() > MAX_CRL_SIZE {
            return Err(malformed(&"it is too large"));
        }
        let (rest, list) = CertificateRevocationList::from_der(der).map_err(|error| malformed(&error))?;
        if !rest.is_empty() {
            return Err(malformed(&"something follows it"));
        }
        let algorithm = outer_algorithm(der).ok_or_else(|| malformed(&"its signature algorithm cannot be read"))?;
        // RFC 5280 §5.1.1.2
        if list.tbs_cert_list.signature != list.signature_algorithm {
            return Err(malformed(&"it names two signature algorithms"));
        }
        list.tbs_cert_list.extensions_map().map_err(|error| malformed(&error))?;
        let (mut scope, mut authority_key_id) = (Scope { end_entities: true, authorities: true, points: None }, None);
        for extension in list.extensions() {
            match extension.parsed_extension() {
                ParsedExtension::AuthorityKeyIdentifier(id) => {
                    authority_key_id = id.key_identifier.as_ref().map(|id| id.0.to_vec());
                }
                ParsedExtension::IssuingDistributionPoint(point) => {
                    if point.indirect_crl || point.only_contains_attribute_certs || point.only_some_reasons.is_some() {
                        return Err(malformed(&"it is indirect, for some reasons only or for attribute certificates"));
                    }
                    scope.end_entities = !point.only_contains_ca_certs;
                    scope.authorities = !point.only_contains_user_certs;
                    scope.points = point.distribution_point.as_ref().map(uris);
                }
                ParsedExtension::CRLNumber(_) | ParsedExtension::IssuerAlternativeName(_) => {}
                _ if extension.critical => {
                    return Err(malformed(&format!("extension {} is critical and not known", extension.oid)));
                }
                _ => {}
            }
        }
        let mut revoked = BTreeMap::new();
        for entry in list.iter_revoked_certificates() {
            if entry.extensions().iter().any(is_unknown) {
                return Err(malformed(&"an entry has a critical extension that is not known"));
            }
            let reason = entry.reason_code().map_or(0, |(_, reason)| reason.0);
            if reason == REMOVE_FROM_CRL {
                return Err(malformed(&"it is a delta CRL"));
            }
            let found = Revoked { at: entry.revocation_date.timestamp(), reason };
            revoked.insert(without_zeros(entry.raw_serial()).to_vec(), found);
        }
        let tbs = list.tbs_cert_list.as_ref();
        let start = tbs.as_ptr().addr().saturating_sub(der.as_ptr().addr());
        Ok(Self {
            tbs: start..start.saturating_add(tbs.len()),
            algorithm,
            signature: list.signature_value.data.to_vec(),
            issuer: Identity::from_wire(9, list.issuer().as_raw()).ok(),
            issuer_der: list.issuer().as_raw().to_vec(),
            authority_key_id,
            number: list.crl_number().map(|number| number.to_bytes_be()).unwrap_or_default(),
            this_update: list.last_update().timestamp(),
            next_update: list.next_update().map(|time| time.timestamp()),
            scope,
            revoked,
            der: der.to_vec(),
        })
    }

    /// The list in DER.
    pub fn der(&self) -> &[u8] {
        &self.der
    }

    /// Whose certificates it is about; `None` if that name is empty.
    pub fn issuer(&self) -> Option<&Identity> {
        self.issuer.as_ref()
    }

    /// True when it is about the same certificates as another list of its issuer, and not older.
    pub(crate) fn replaces(&self, other: &Self) -> bool {
        self.scope == other.scope && self.age() >= other.age()
    }

    /// What is greater for newer lists.
    fn age(&self) -> (i64, usize, &[u8]) {
        (self.this_update, self.number.len(), &self.number)
    }

    /// Says whether this authority has signed it and may do so.
    pub(crate) fn is_signed_by(&self, authority: &Certificate) -> bool {
        let named = self.issuer_der == authority.subject_der()
            && match (&self.authority_key_id, authority.subject_key_identifier()) {
                (Some(ours), Some(theirs)) => ours == theirs,
                _ => true,
            };
        if !named || !authority.may_sign_crls() {
            return false;
        }
        let der = CertificateDer::from(authority.der());
        let (Ok(key), Some(tbs)) = (EndEntityCert::try_from(&der), self.der.get(self.tbs.clone())) else {
            return false;
        };
        SIGNATURES
            .iter()
            .filter(|algorithm| algorithm.signature_alg_id().as_ref() == self.algorithm)
            .any(|algorithm| key.verify_signature(*algorithm, tbs, &self.signature).is_ok())
    }

    /// Says whether it has this certificate, if it is what it says; nothing is said of who has signed it.
    pub(crate) fn may_revoke(&self, certificate: &Certificate) -> bool {
        self.issuer_der == certificate.issuer_der() && self.revoked.contains_key(without_zeros(certificate.serial()))
    }

    /// What the list, whose signature is good, says of a certificate of its issuer.
    fn status_of(&self, certificate: &Certificate, now: i64) -> Status {
        if let Some(revoked) = self.revoked.get(without_zeros(certificate.serial())) {
            return Status::Revoked(*revoked);
        }
        let kind = if certificate.is_authority() { self.scope.authorities } else { self.scope.end_entities };
        let named = self
            .scope
            .points
            .as_ref()
            .is_none_or(|points| certificate.distribution_points().iter().any(|ours| points.contains(ours)));
        match self.next_update {
            _ if !kind || !named || self.this_update > now => Status::Unknown,
            Some(next) if next < now => Status::Stale(next),
            _ => Status::Good,
        }
    }
}

impl Revocation {
    /// Checks one certificate, which this authority has issued. Gives a warning, or the reason why it is not accepted.
    pub(crate) fn check(
        self,
        lists: &[Arc<Crl>],
        certificate: &Certificate,
        issuer: &Certificate,
        now: u64,
    ) -> Result<Option<String>, String> {
        let who = certificate.subject().map(ToString::to_string).unwrap_or_default();
        let by = issuer.subject().map(ToString::to_string).unwrap_or_default();
        let demanded = match self {
            Self::Relaxed => false,
            Self::IfUri => !certificate.distribution_points().is_empty(),
            Self::Strict => true,
        };
        match status(lists, certificate, issuer, i64::try_from(now).unwrap_or(i64::MAX)) {
            Status::Good => Ok(None),
            Status::Revoked(Revoked { at, reason }) => {
                Err(format!("'{who}' was revoked at {}, reason {}", time(at), reason_name(reason)))
            }
            Status::Stale(since) => {
                let text =
                    format!("the CRL of '{by}', which is about '{who}', has been out of date since {}", time(since));
                if demanded { Err(text) } else { Ok(Some(text)) }
            }
            Status::Unknown if demanded => {
                Err(format!("no CRL of '{by}' is loaded that is about '{who}', and 'revocation' asks for one"))
            }
            Status::Unknown => Ok(None),
        }
    }
}

/// Of lists about the same certificates the newest counts; what any other says against a certificate does, too.
fn status(lists: &[Arc<Crl>], certificate: &Certificate, issuer: &Certificate, now: i64) -> Status {
    let mut signed: Vec<&Arc<Crl>> = lists.iter().filter(|list| list.is_signed_by(issuer)).collect();
    signed.sort_by_key(|list| Reverse(list.age()));
    let mut best = Status::Unknown;
    let mut seen: Vec<&Scope> = Vec::new();
    for list in signed {
        if seen.contains(&&list.scope) {
            continue;
        }
        seen.push(&list.scope);
        best = match (best, list.status_of(certificate, now)) {
            (_, revoked @ Status::Revoked(_)) => return revoked,
            (Status::Good, _) | (_, Status::Good) => Status::Good,
            (known @ Status::Stale(_), Status::Unknown) => known,
            (_, other) => other,
        };
    }
    best
}

/// The AlgorithmIdentifier behind the signed part, without its SEQUENCE.
fn outer_algorithm(der: &[u8]) -> Option<Vec<u8>> {
    let parts = elements(AnyRef::from_der(der).ok()?, Tag::Sequence)?;
    Some(parts.get(1)?.value().to_vec())
}

fn is_unknown(extension: &X509Extension<'_>) -> bool {
    let known =
        matches!(extension.parsed_extension(), ParsedExtension::ReasonCode(_) | ParsedExtension::InvalidityDate(_));
    extension.critical && !known
}

/// The URIs of a distribution point; names of other kinds are none of ours.
pub(crate) fn uris(point: &DistributionPointName<'_>) -> Vec<String> {
    let DistributionPointName::FullName(names) = point else { return Vec::new() };
    let uri = |name: &GeneralName<'_>| match name {
        GeneralName::URI(uri) => Some((*uri).to_owned()),
        _ => None,
    };
    names.iter().filter_map(uri).collect()
}

fn without_zeros(serial: &[u8]) -> &[u8] {
    let zeros = serial.iter().take_while(|octet| **octet == 0).count();
    serial.get(zeros..).unwrap_or_default()
}

fn time(seconds: i64) -> String {
    let time = x509_parser::time::ASN1Time::from_timestamp(seconds);
    time.map_or_else(|_| seconds.to_string(), |time| time.to_string())
}

fn reason_name(reason: u8) -> String {
    const NAMES: [&str; 11] = [
        "unspecified",
        "key compromise",
        "CA compromise",
        "affiliation changed",
        "superseded",
        "cessation of operation",
        "certificate hold",
        "7",
        "remove from CRL",
        "privilege withdrawn",
        "AA compromise",
    ];
    NAMES.get(usize::from(reason)).map_or_else(|| reason.to_string(), |name| (*name).to_owned())
}
