//! What both roles of IKE_AUTH share: the signed octets (RFC 7296 §2.15) and the payloads of a proof.

use std::net::IpAddr;
use std::sync::Arc;

use ipsec::secret::Secret;
use ipsec::transform::Prf;
use pad::{
    AuthAnnouncement, AuthClass, AuthMethod, Certificate, Identity, LocalAuth, PadEntry, PeerIdentity, Proof,
    PublicKey, SharedKeyMac, SignRequest, SignatureSettings, SignedAuth,
};

use super::basis::Basis;
use super::channel::Channel;
use super::fault::notify;
use super::parts::{Parts, RAW_PUBLIC_KEY, X509_SIGNATURE};
use crate::config::{CheckAddressIdentities, Connection, SendCert};
use crate::crypto::{self, KeyError};
use crate::engine::Path;
use crate::engine::context::Context;
use crate::wire::{Identification, NotifyType, Payload};

/// Connections whose CAs are named in one CERTREQ: the answer to IKE_SA_INIT cannot be fragmented.
const MAX_ASKING: usize = 16;
/// RFC 7296 §2.15.
const KEY_PAD: &[u8] = b"Key Pad for IKEv2";

/// What IKE_AUTH needs from the IKE_SA_INIT exchange.
#[derive(Debug)]
pub(crate) struct InitMaterial {
    /// Our last IKE_SA_INIT message, the octets as sent.
    pub(crate) ours: Vec<u8>,
    /// The peer's, as received.
    pub(crate) theirs: Vec<u8>,
    /// The initiator's nonce.
    pub(crate) ni: Vec<u8>,
    /// The responder's.
    pub(crate) nr: Vec<u8>,
    /// The peer's SIGNATURE_HASH_ALGORITHMS.
    pub(crate) peer_hashes: Option<Vec<u16>>,
    /// Hashes from its CERTREQ payloads.
    pub(crate) cert_requests: Vec<[u8; 20]>,
    /// It sent a CERTREQ for certificates at all.
    pub(crate) cert_requested: bool,
    /// It sent a CERTREQ for raw keys (RFC 7670 §3).
    pub(crate) raw_key_requested: bool,
    /// Its SUPPORTED_AUTH_METHODS (RFC 9593).
    pub(crate) announced: Option<Vec<AuthAnnouncement>>,
    /// The daemon's settings of signatures.
    pub(crate) settings: SignatureSettings,
    /// What the IKE_INTERMEDIATE exchanges add.
    pub(crate) intermediate: IntAuth,
    /// Both said USE_PPK (RFC 8784 §3).
    pub(crate) use_ppk: bool,
    /// SHA-256 of the SubjectPublicKeyInfo by which we proved ourselves, once we have, if it was with a public key.
    pub(crate) own_key: Option<[u8; 32]>,
}

/// IntAuth_i and IntAuth_r of the IKE_INTERMEDIATE exchanges so far (RFC 9242 §3.3.2).
#[derive(Debug, Default)]
pub(crate) struct IntAuth {
    initiator: Vec<u8>,
    responder: Vec<u8>,
    exchanges: u32,
}

impl IntAuth {
    /// Takes in a request, under the keys of its exchange.
    pub(crate) fn request(&mut self, channel: &Channel, octets: &[u8]) -> Result<(), KeyError> {
        let mac = crypto::prf(channel.suite.prf, channel.pi.expose(), &[&self.initiator, octets])?;
        self.initiator = mac.expose().to_vec();
        Ok(())
    }

    /// Takes in the response, which ends the exchange; before the keys change.
    pub(crate) fn response(&mut self, channel: &Channel, octets: &[u8]) -> Result<(), KeyError> {
        let mac = crypto::prf(channel.suite.prf, channel.pr.expose(), &[&self.responder, octets])?;
        self.responder = mac.expose().to_vec();
        self.exchanges = self.exchanges.saturating_add(1);
        Ok(())
    }

    /// IntAuth: both values and the message ID of the first IKE_AUTH request; nothing without exchanges.
    fn octets(&self) -> Vec<u8> {
        match self.exchanges {
            0 => Vec::new(),
            exchanges => {
                let message_id = exchanges.saturating_add(1).to_be_bytes();
                [self.initiator.as_slice(), self.responder.as_slice(), &message_id].concat()
            }
        }
    }
}

impl InitMaterial {
    /// What we sign: our message, the peer's nonce, the MAC of our identity.
    pub(crate) fn our_octets(&self, channel: &Channel, id: &Identification) -> Result<Vec<u8>, KeyError> {
        let (nonce, key) = if channel.initiator { (&self.nr, &channel.pi) } else { (&self.ni, &channel.pr) };
        signed_octets(channel.suite.prf, &self.ours, nonce, key, id, &self.intermediate)
    }

    /// What the peer signed.
    pub(crate) fn their_octets(&self, channel: &Channel, id: &Identification) -> Result<Vec<u8>, KeyError> {
        let (nonce, key) = if channel.initiator { (&self.ni, &channel.pr) } else { (&self.nr, &channel.pi) };
        signed_octets(channel.suite.prf, &self.theirs, nonce, key, id, &self.intermediate)
    }

    /// What an application can bind to this IKE SA; both ends have the same. None after IKE_SESSION_RESUME: the keys come
    /// from those of the ticket, without a key exchange that would tell two channels of a relay apart.
    pub(crate) fn channel_binding(&self, channel: &Channel, peer: &PeerIdentity, basis: &Basis) -> Option<[u8; 32]> {
        if basis.resumed {
            return None;
        }
        let ours = self.our_octets(channel, &identification(&peer.local_id)).ok()?;
        let theirs = self.their_octets(channel, &identification(peer.ike_id())).ok()?;
        let (initiator, responder) = if channel.initiator { (&ours, &theirs) } else { (&theirs, &ours) };
        crypto::channel_binding(channel.suite.prf, &channel.d, initiator, responder).ok()
    }

    /// Notes by which key we have proved ourselves.
    pub(crate) fn note_own_key(&mut self, signed: &SignedAuth) {
        let certificate = signed.certificates.first().and_then(|der| Certificate::parse(der).ok());
        let raw_key = signed.public_key.as_ref().map(PublicKey::sha256);
        self.own_key = raw_key.or_else(|| certificate.map(|certificate| certificate.public_key_info_sha256()));
    }

    /// The keys by which both ends proved themselves, ours first. None after IKE_SESSION_RESUME, which proves nothing anew.
    pub(crate) fn endpoint_keys(&self, peer: &PeerIdentity, basis: &Basis) -> Option<[[u8; 32]; 2]> {
        if basis.resumed {
            return None;
        }
        let theirs = match &peer.proof {
            Proof::Certificate { end_entity, .. } => Certificate::parse(end_entity).ok()?.public_key_info_sha256(),
            Proof::RawKey { key, .. } => PublicKey::from_der(key).ok()?.sha256(),
            Proof::PreSharedKey | Proof::Unauthenticated { .. } | Proof::Eap { .. } => return None,
        };
        Some([self.own_key?, theirs])
    }

    /// Adds what an IKE_AUTH request says about how the peer can verify us.
    pub(crate) fn note_wishes(&mut self, parts: &Parts) {
        self.announced = parts.auth_announcements();
        self.cert_requested |= parts.cert_requested;
        self.raw_key_requested |= parts.raw_key_requested;
        self.cert_requests.extend_from_slice(&parts.cert_requests);
    }

    /// The request to prove ourselves.
    pub(crate) fn sign_request(
        &self,
        channel: &Channel,
        local_id: Identity,
        peer_id: Option<Identity>,
        auth: LocalAuth,
    ) -> Result<SignRequest, KeyError> {
        let octets = self.our_octets(channel, &identification(&local_id))?;
        Ok(SignRequest {
            local_id,
            peer_id,
            auth,
            shared_key_mac: Arc::new(Mac::new(channel, channel.initiator, octets.clone())),
            octets,
            peer_hashes: self.peer_hashes.clone(),
            cert_requests: self.cert_requests.clone(),
            raw_key_requested: self.raw_key_requested,
            announced: self.announced.clone(),
            settings: self.settings,
        })
    }

    /// The question whether the peer is who it says it is. `id` is its Identification payload as received.
    #[allow(clippy::too_many_arguments, reason = "the fields of the request")]
    pub(crate) fn authenticate_request(
        &self,
        channel: &Channel,
        id: &Identification,
        peer_id: Identity,
        local_id: Identity,
        (method, auth): (u8, Vec<u8>),
        (certificates, raw_key): (Vec<Vec<u8>>, Option<Vec<u8>>),
        entries: Vec<PadEntry>,
    ) -> Result<pad::AuthenticateRequest, KeyError> {
        let signed_octets = self.their_octets(channel, id)?;
        Ok(pad::AuthenticateRequest {
            peer_id,
            local_id,
            method: AuthMethod(method),
            auth,
            shared_key_mac: Arc::new(Mac::new(channel, !channel.initiator, signed_octets.clone())),
            signed_octets,
            certificates,
            raw_key,
            entries,
            settings: self.settings,
        })
    }

    /// CERT and AUTH payloads of our proof, AUTH last.
    pub(crate) fn proof_payloads(&self, signed: SignedAuth, send: SendCert) -> Vec<Payload> {
        let sends = |requested: bool| match send {
            SendCert::Always => true,
            SendCert::IfAsked => requested,
            SendCert::Never => false,
        };
        let certificates = signed.certificates.into_iter().filter(|_| sends(self.cert_requested));
        let raw_key = signed.public_key.filter(|_| sends(self.raw_key_requested));
        let mut payloads: Vec<Payload> =
            certificates.map(|data| Payload::Cert { encoding: X509_SIGNATURE, data }).collect();
        payloads.extend(raw_key.map(|key| Payload::Cert { encoding: RAW_PUBLIC_KEY, data: key.der().to_vec() }));
        payloads.push(Payload::Auth { method: signed.method.0, data: signed.auth });
        payloads
    }

    /// Our AUTH by a key that EAP gave both ends (RFC 7296 §2.16).
    pub(crate) fn proof_by_key(&self, channel: &Channel, id: &Identity, msk: &Secret) -> Result<Payload, KeyError> {
        let octets = self.our_octets(channel, &identification(id))?;
        let data = Mac::new(channel, channel.initiator, octets).mac(msk);
        Ok(Payload::Auth { method: AuthMethod::SHARED_KEY.0, data })
    }

    /// The peer's, which has to be by the same key. `id` is its Identification payload as received.
    pub(crate) fn is_proved_by_key(
        &self,
        channel: &Channel,
        id: &Identification,
        (method, auth): &(u8, Vec<u8>),
        msk: &Secret,
    ) -> bool {
        let Ok(octets) = self.their_octets(channel, id) else { return false };
        let expected = Secret::new(Mac::new(channel, !channel.initiator, octets).mac(msk));
        *method == AuthMethod::SHARED_KEY.0 && !expected.expose().is_empty() && expected.matches(auth)
    }
}

/// An identity as a payload body.
pub(crate) fn identification(id: &Identity) -> Identification {
    Identification { kind: id.kind(), data: id.wire_data() }
}

/// CERTREQs for what may vouch for the peer on one of these connections, where it wants that: its own CAs or all that are
/// loaded (RFC 4945 §3.2), and raw keys (RFC 7670 §3).
pub(crate) fn cert_requests<'a>(
    connections: impl IntoIterator<Item = &'a Arc<Connection>>,
    loaded: &[[u8; 20]],
) -> Vec<Payload> {
    let (mut authorities, mut raw_keys): (Vec<[u8; 20]>, bool) = (Vec::new(), false);
    let asking = connections.into_iter().filter(|connection| {
        let remote = &connection.remote;
        connection.send_certreq && (remote.takes_certificates() || remote.takes_raw_keys())
    });
    for connection in asking.take(MAX_ASKING) {
        let remote = &connection.remote;
        raw_keys |= remote.takes_raw_keys();
        if !remote.takes_certificates() {
            continue;
        }
        let own = remote.authority_hashes();
        let named = if remote.cacerts.is_empty() { loaded } else { &own };
        for hash in named {
            if !authorities.contains(hash) {
                authorities.push(*hash);
            }
        }
    }
    let of_authorities = (!authorities.is_empty()).then(|| authorities.concat());
    let of_authorities = of_authorities.map(|authorities| Payload::CertReq { encoding: X509_SIGNATURE, authorities });
    let of_keys = raw_keys.then(|| Payload::CertReq { encoding: RAW_PUBLIC_KEY, authorities: Vec::new() });
    of_authorities.into_iter().chain(of_keys).collect()
}

/// RFC 4945 §3.1.1: says whether an address as identity is that of the peer, where this counts.
pub(crate) fn is_where_it_says(ctx: &Context, path: &Path, asserted: &Identity, method: AuthMethod) -> bool {
    let address = match asserted {
        Identity::Ipv4(address) => IpAddr::V4(*address),
        Identity::Ipv6(address) => IpAddr::V6(*address),
        _ => return true,
    };
    let counts = match ctx.config.check_address_identities {
        CheckAddressIdentities::Never => false,
        CheckAddressIdentities::WithCertificates => method.class() == Some(AuthClass::PublicKey),
        CheckAddressIdentities::Always => true,
    };
    !counts || address == path.remote.ip()
}

/// SUPPORTED_AUTH_METHODS for what these connections accept of a peer (RFC 9593 §3.1).
pub(crate) fn auth_announcement(connections: &[Arc<Connection>], settings: SignatureSettings) -> Payload {
    let entries: Vec<&PadEntry> = connections.iter().map(|connection| &connection.remote).collect();
    notify(NotifyType::SUPPORTED_AUTH_METHODS, AuthAnnouncement::of_entries(&entries, settings))
}

fn signed_octets(
    algorithm: Prf,
    message: &[u8],
    nonce: &[u8],
    key: &Secret,
    id: &Identification,
    intermediate: &IntAuth,
) -> Result<Vec<u8>, KeyError> {
    let maced = crypto::prf(algorithm, key.expose(), &[&id.body()])?;
    Ok([message, nonce, maced.expose(), &intermediate.octets()].concat())
}

/// `prf(prf(secret, "Key Pad for IKEv2"), octets)`.
struct Mac {
    prf: Prf,
    octets: Vec<u8>,
    /// SK_pi or SK_pr, the key of whose MAC it is (RFC 7619 §2.1).
    own: Secret,
}

impl Mac {
    fn new(channel: &Channel, of_initiator: bool, octets: Vec<u8>) -> Self {
        let own = if of_initiator { &channel.pi } else { &channel.pr };
        Self { prf: channel.suite.prf, octets, own: own.duplicate() }
    }
}

impl SharedKeyMac for Mac {
    fn mac(&self, secret: &Secret) -> Vec<u8> {
        // The PRF was chosen from those that we have, so this cannot fail; an empty MAC equals none.
        let padded = crypto::prf(self.prf, secret.expose(), &[KEY_PAD]);
        let mac = padded.and_then(|key| crypto::prf(self.prf, key.expose(), &[&self.octets]));
        mac.map(|mac| mac.expose().to_vec()).unwrap_or_default()
    }

    fn mac_of_nobody(&self) -> Vec<u8> {
        self.mac(&self.own)
    }
}
