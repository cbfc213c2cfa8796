//! A message's payloads sorted by kind, each at most as often as RFC 7296 allows.

use ipsec::selector::TrafficSelector;
use ipsec::transform::{Ke, Prf, Proposal, Protocol};

use pad::AuthAnnouncement;

use super::fault::{Fault, is_error};
use crate::crypto;
use crate::wire::{self, Configuration, Identification, Notify, NotifyType, Opened, Payload, WireSelector};

/// X.509 Certificate - Signature (RFC 7296 §3.6).
pub(crate) const X509_SIGNATURE: u8 = 4;
/// Raw Public Key (RFC 7670 §3). Raw RSA Key, 11, is deprecated and as unknown as all others.
pub(crate) const RAW_PUBLIC_KEY: u8 = 15;
/// More certificates than any sane chain has are not kept.
const MAX_CERTIFICATES: usize = 16;
/// More CA hashes than this are not kept.
const MAX_AUTHORITIES: usize = 512;

/// Payloads by kind.
#[derive(Debug, Default)]
pub(crate) struct Parts {
    pub(crate) sa: Option<Vec<Proposal>>,
    pub(crate) ke: Option<(Ke, Vec<u8>)>,
    pub(crate) nonce: Option<Vec<u8>>,
    pub(crate) id_initiator: Option<Identification>,
    pub(crate) id_responder: Option<Identification>,
    pub(crate) certificates: Vec<Vec<u8>>,
    /// The first of those that were sent.
    pub(crate) raw_key: Option<Vec<u8>>,
    pub(crate) cert_requests: Vec<[u8; 20]>,
    pub(crate) cert_requested: bool,
    pub(crate) raw_key_requested: bool,
    pub(crate) auth: Option<(u8, Vec<u8>)>,
    pub(crate) eap: Option<Vec<u8>>,
    pub(crate) ts_initiator: Option<Vec<WireSelector>>,
    pub(crate) ts_responder: Option<Vec<WireSelector>>,
    pub(crate) notifies: Vec<Notify>,
    pub(crate) deletes: Vec<(Protocol, Vec<u32>)>,
    pub(crate) puzzle_solution: Option<Vec<u8>>,
    pub(crate) configuration: Option<Configuration>,
}

impl Parts {
    /// Parses what an authenticated message holds.
    pub(crate) fn of(opened: &Opened) -> Result<Self, Fault> {
        let payloads = wire::parse_payloads(opened.first, &opened.body)
            .map_err(|error| Fault::InvalidSyntax(error.to_string()))?;
        Self::collect(payloads)
    }

    /// Sorts payloads; a second one of a kind that may come once is a syntax error.
    pub(crate) fn collect(payloads: Vec<Payload>) -> Result<Self, Fault> {
        if let Some(kind) = wire::unknown_critical(&payloads) {
            return Err(Fault::UnsupportedCritical(kind));
        }
        let mut parts = Self::default();
        for payload in payloads {
            match payload {
                Payload::Sa(proposals) => once(&mut parts.sa, proposals, "SA")?,
                Payload::Ke { group, data } => once(&mut parts.ke, (group, data), "KE")?,
                Payload::Nonce(nonce) => {
                    // RFC 7296 §3.9: 16 to 256 octets.
                    if !(16..=256).contains(&nonce.len()) {
                        return Err(Fault::InvalidSyntax(format!("a nonce of {} octets", nonce.len())));
                    }
                    once(&mut parts.nonce, nonce, "Nonce")?;
                }
                Payload::IdInitiator(id) => once(&mut parts.id_initiator, id, "IDi")?,
                Payload::IdResponder(id) => once(&mut parts.id_responder, id, "IDr")?,
                Payload::Cert { encoding: X509_SIGNATURE, data } if parts.certificates.len() < MAX_CERTIFICATES => {
                    parts.certificates.push(data);
                }
                Payload::Cert { encoding: RAW_PUBLIC_KEY, data } => {
                    parts.raw_key.get_or_insert(data);
                }
                Payload::Cert { .. } => {}
                Payload::CertReq { encoding, authorities } => {
                    // RFC 7670 §3: there is nothing behind the encoding.
                    parts.raw_key_requested |= encoding == RAW_PUBLIC_KEY && authorities.is_empty();
                    if encoding == X509_SIGNATURE {
                        parts.cert_requested = true;
                        let room = MAX_AUTHORITIES.saturating_sub(parts.cert_requests.len());
                        let hashes = authorities.chunks_exact(20).filter_map(|hash| <[u8; 20]>::try_from(hash).ok());
                        parts.cert_requests.extend(hashes.take(room));
                    }
                }
                Payload::Auth { method, data } => once(&mut parts.auth, (method, data), "AUTH")?,
                Payload::Notify(notify) => parts.notifies.push(notify),
                Payload::Delete { protocol, spis } => parts.deletes.push((protocol, spis)),
                Payload::PuzzleSolution(solution) => once(&mut parts.puzzle_solution, solution, "PS")?,
                Payload::TsInitiator(selectors) => once(&mut parts.ts_initiator, selectors, "TSi")?,
                Payload::TsResponder(selectors) => once(&mut parts.ts_responder, selectors, "TSr")?,
                Payload::Configuration(body) => once(&mut parts.configuration, body, "Configuration")?,
                Payload::Eap(packet) => once(&mut parts.eap, packet, "EAP")?,
                Payload::Vendor(_) | Payload::Unknown { .. } => {}
            }
        }
        Ok(parts)
    }

    /// The nonce, if it is long enough for this PRF: half its preferred key size (RFC 7296 §2.10).
    pub(crate) fn nonce_for(&self, prf: Prf) -> Result<&Vec<u8>, Fault> {
        let nonce = self.nonce.as_ref().ok_or_else(|| Fault::InvalidSyntax("a nonce is missing".to_owned()))?;
        let least = crypto::prf_len(prf).unwrap_or(0).div_ceil(2);
        if nonce.len() < least {
            let line = format!("a nonce of {} octets, where the PRF needs {least}", nonce.len());
            return Err(Fault::InvalidSyntax(line));
        }
        Ok(nonce)
    }

    /// The first Notify of this type.
    pub(crate) fn notify(&self, kind: NotifyType) -> Option<&Notify> {
        self.notifies.iter().find(|notify| notify.kind == kind)
    }

    /// True when a Notify of this type is there.
    pub(crate) fn has(&self, kind: NotifyType) -> bool {
        self.notify(kind).is_some()
    }

    /// The first error Notify.
    pub(crate) fn error(&self) -> Option<&Notify> {
        self.notifies.iter().find(|notify| is_error(notify.kind))
    }

    /// The peer's SUPPORTED_AUTH_METHODS (RFC 9593 §3.2). An empty one says that they come in IKE_INTERMEDIATE, a
    /// broken one says nothing: both are as none.
    pub(crate) fn auth_announcements(&self) -> Option<Vec<AuthAnnouncement>> {
        let notify = self.notify(NotifyType::SUPPORTED_AUTH_METHODS)?;
        AuthAnnouncement::parse_all(&notify.data).filter(|announcements| !announcements.is_empty())
    }

    /// The peer's SIGNATURE_HASH_ALGORITHMS (RFC 7427 §4).
    pub(crate) fn signature_hashes(&self) -> Option<Vec<u16>> {
        let notify = self.notify(NotifyType::SIGNATURE_HASH_ALGORITHMS)?;
        Some(
            notify
                .data
                .chunks_exact(2)
                .filter_map(|two| Some(u16::from_be_bytes(<[u8; 2]>::try_from(two).ok()?)))
                .collect(),
        )
    }
}

/// The address selectors of a TS payload; unknown kinds match nothing of ours.
pub(crate) fn address_selectors(selectors: &[WireSelector]) -> Vec<TrafficSelector> {
    selectors
        .iter()
        .filter_map(|selector| match selector {
            WireSelector::Address(selector) => Some(*selector),
            WireSelector::Unknown { .. } => None,
        })
        .collect()
}

fn once<T>(slot: &mut Option<T>, value: T, what: &str) -> Result<(), Fault> {
    if slot.replace(value).is_some() {
        return Err(Fault::InvalidSyntax(format!("more than one {what} payload")));
    }
    Ok(())
}
