//! EAP as IKEv2 carries it (RFC 7296 §2.16, §3.16; RFC 3748): packets, and the two ends of a method.
//!
//! Both ends are values that a packet consumes: what comes out is the next state with what to send, or the end. There is no
//! way from one to the end but through its method, so an EAP-Success out of turn is a failure like any other packet out of turn.

use std::fmt;

use ipsec::secret::Secret;

use crate::credentials::Credentials;
use crate::identity::Identity;

pub(crate) mod mschapv2;

/// Most octets of an EAP packet that is looked at.
pub const MAX_PACKET: usize = 4096;
/// Octets of the random value that each end of a method begins with.
pub const CHALLENGE_LENGTH: usize = 16;
/// Most octets of a name that a peer says (RFC 2759 §4).
const MAX_NAME: usize = 256;

const REQUEST: u8 = 1;
const RESPONSE: u8 = 2;
const SUCCESS: u8 = 3;
const FAILURE: u8 = 4;

const IDENTITY: u8 = 1;
const NOTIFICATION: u8 = 2;
const NAK: u8 = 3;
const MS_CHAPV2: u8 = 26;

/// An EAP method that we have. Only such as give a key: the others do not stand up to a relay (RFC 7296 §2.16).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum EapMethod {
    /// EAP-MSCHAPv2: a password, by MS-CHAP-V2 (RFC 2759) with keys by RFC 3079.
    MsChapV2,
}

impl EapMethod {
    /// As configuration writes it, after `eap-`.
    pub fn name(self) -> &'static str {
        match self {
            Self::MsChapV2 => "mschapv2",
        }
    }

    /// Its number among EAP's types.
    pub fn number(self) -> u8 {
        match self {
            Self::MsChapV2 => MS_CHAPV2,
        }
    }
}

/// As strongSwan prints it.
impl fmt::Display for EapMethod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::MsChapV2 => "EAP_MSCHAPV2",
        })
    }
}

/// Why an EAP exchange leads nowhere.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct EapError(String);

impl EapError {
    fn new(reason: impl Into<String>) -> Self {
        Self(reason.into())
    }
}

/// An EAP packet (RFC 3748 §4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Packet<'a> {
    Request { identifier: u8, kind: u8, data: &'a [u8] },
    Response { identifier: u8, kind: u8, data: &'a [u8] },
    Success,
    Failure,
}

impl<'a> Packet<'a> {
    /// Reads one that fills an EAP payload: IKE has nothing behind it (RFC 7296 §3.16).
    fn parse(octets: &'a [u8]) -> Result<Self, EapError> {
        let malformed = || EapError::new("malformed EAP packet");
        let ([code, identifier, high, low], rest) = octets.split_first_chunk().ok_or_else(malformed)?;
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        if length != octets.len() || length > MAX_PACKET {
            return Err(malformed());
        }
        let identifier = *identifier;
        match (*code, rest.split_first()) {
            (REQUEST, Some((kind, data))) => Ok(Self::Request { identifier, kind: *kind, data }),
            (RESPONSE, Some((kind, data))) => Ok(Self::Response { identifier, kind: *kind, data }),
            (SUCCESS, None) => Ok(Self::Success),
            (FAILURE, None) => Ok(Self::Failure),
            _ => Err(malformed()),
        }
    }
}

fn typed(code: u8, identifier: u8, kind: u8, data: &[u8]) -> Vec<u8> {
    // What we make is far shorter than a length can say; what were not would be refused as malformed.
    let length = u16::try_from(data.len().saturating_add(5)).unwrap_or(u16::MAX).to_be_bytes();
    [&[code, identifier], length.as_slice(), &[kind], data].concat()
}

fn untyped(code: u8, identifier: u8) -> Vec<u8> {
    vec![code, identifier, 0, 4]
}

/// The identity that a peer says in EAP: a mail address, or a name. `None` if it is neither.
pub fn identity(octets: &[u8]) -> Option<Identity> {
    const FQDN: u8 = 2;
    const RFC822: u8 = 3;
    if octets.len() > MAX_NAME {
        return None;
    }
    Identity::from_wire(RFC822, octets).or_else(|_| Identity::from_wire(FQDN, octets)).ok()
}

/// What stands for an identity in EAP.
pub fn name(identity: &Identity) -> Vec<u8> {
    match identity {
        Identity::Fqdn(_) | Identity::Rfc822(_) | Identity::KeyId(_) => identity.wire_data(),
        other => other.to_string().into_bytes(),
    }
}

/// The authenticator: asks for the identity first. A state that takes one packet.
#[derive(Debug)]
pub struct AskedIdentity {
    identifier: u8,
}

impl AskedIdentity {
    /// The state and the request.
    pub fn begin(identifier: u8) -> (Self, Vec<u8>) {
        (Self { identifier }, typed(REQUEST, identifier, IDENTITY, &[]))
    }

    /// Who the peer says it is; nothing of it is proved.
    ///
    /// # Errors
    /// It is something else than the answer, or no identity.
    pub fn answered(self, packet: &[u8]) -> Result<Identity, EapError> {
        match Packet::parse(packet)? {
            Packet::Response { identifier, kind: IDENTITY, data } if identifier == self.identifier => {
                identity(data).ok_or_else(|| EapError::new("the EAP identity is not a name"))
            }
            _ => Err(EapError::new("no answer to the request for the EAP identity")),
        }
    }

    /// The identifier for the method's first request.
    pub fn next_identifier(&self) -> u8 {
        self.identifier.wrapping_add(1)
    }
}

/// An EAP-Failure in answer to this packet.
pub fn failure(packet: &[u8]) -> Vec<u8> {
    untyped(FAILURE, packet.get(1).copied().unwrap_or(0))
}

/// The authenticator's side of a method.
#[derive(Debug)]
pub struct EapServer {
    method: EapMethod,
    /// Whose password it takes, and nobody else's.
    identity: Identity,
    ours: Identity,
    identifier: u8,
    state: mschapv2::Server,
}

/// What the authenticator says next.
#[derive(Debug)]
pub enum EapServerStep {
    /// A request.
    Ask(EapServer, Vec<u8>),
    /// EAP-Success: the peer is who it says it is, and both have this key (MSK).
    Succeeded {
        /// What to send.
        packet: Vec<u8>,
        /// The key.
        msk: Secret,
    },
    /// EAP-Failure.
    Failed {
        /// What to send.
        packet: Vec<u8>,
        /// For the log.
        reason: String,
    },
}

impl EapServer {
    /// Begins a method with a peer that says it is `identity`; `ours` names us to it, `challenge` is random.
    pub fn begin(
        method: EapMethod,
        identity: Identity,
        ours: Identity,
        identifier: u8,
        challenge: [u8; CHALLENGE_LENGTH],
    ) -> (Self, Vec<u8>) {
        let (state, data) = mschapv2::Server::begin(identifier, challenge, &name(&ours));
        let packet = typed(REQUEST, identifier, method.number(), &data);
        (Self { method, identity, ours, identifier, state }, packet)
    }

    /// Whom it authenticates.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// How.
    pub fn method(&self) -> EapMethod {
        self.method
    }
}

/// The peer's side: of the one who proves itself by EAP.
#[derive(Debug)]
pub struct EapPeer {
    method: EapMethod,
    identity: Identity,
    authenticator: Identity,
    challenge: [u8; CHALLENGE_LENGTH],
    state: mschapv2::Peer,
}

/// What the peer says next.
#[derive(Debug)]
pub enum EapPeerStep {
    /// A response.
    Answer(EapPeer, Vec<u8>),
    /// It has come to EAP-Success by its method, and both have this key (MSK).
    Succeeded(Secret),
    /// It is over; the text is for the log.
    Failed(String),
}

impl EapPeer {
    /// Before the first request. `challenge` is random.
    pub fn new(
        method: EapMethod,
        identity: Identity,
        authenticator: Identity,
        challenge: [u8; CHALLENGE_LENGTH],
    ) -> Self {
        Self { method, identity, authenticator, challenge, state: mschapv2::Peer::Fresh }
    }
}

impl Credentials {
    /// The authenticator's next step, on a packet of the peer's.
    pub fn eap_server(&self, server: EapServer, packet: &[u8]) -> EapServerStep {
        let failed = |reason: String| EapServerStep::Failed { packet: failure(packet), reason };
        let data = match Packet::parse(packet) {
            Ok(Packet::Response { identifier, .. }) if identifier != server.identifier => {
                return failed("an EAP response to another request".to_owned());
            }
            Ok(Packet::Response { kind, data, .. }) if kind == server.method.number() => data,
            Ok(Packet::Response { kind: NAK, .. }) => return failed(format!("the peer refuses {}", server.method)),
            Ok(_) => return failed("the peer's EAP packet is out of turn".to_owned()),
            Err(error) => return failed(error.to_string()),
        };
        let EapServer { method, identity, ours, identifier, state } = server;
        let password = self.eap_secret_of(&identity, &ours);
        match state.answered(data, &name(&identity), password) {
            mschapv2::ServerStep::Ask(state, data) => {
                let identifier = identifier.wrapping_add(1);
                let packet = typed(REQUEST, identifier, method.number(), &data);
                EapServerStep::Ask(EapServer { method, identity, ours, identifier, state }, packet)
            }
            mschapv2::ServerStep::Succeeded(msk) => {
                EapServerStep::Succeeded { packet: untyped(SUCCESS, identifier), msk }
            }
            mschapv2::ServerStep::Failed(reason) => failed(reason),
        }
    }

    /// The peer's next step, on a packet of the authenticator's.
    pub fn eap_peer(&self, mut peer: EapPeer, packet: &[u8]) -> EapPeerStep {
        let (identifier, kind, data) = match Packet::parse(packet) {
            Ok(Packet::Request { identifier, kind, data }) => (identifier, kind, data),
            Ok(Packet::Success) => {
                return match peer.state {
                    mschapv2::Peer::Succeeded(msk) => EapPeerStep::Succeeded(msk),
                    _ => EapPeerStep::Failed("EAP-Success before the method was through".to_owned()),
                };
            }
            Ok(Packet::Failure) => {
                return EapPeerStep::Failed(match peer.state {
                    mschapv2::Peer::Refused(reason) => reason,
                    _ => "the gateway says EAP-Failure".to_owned(),
                });
            }
            Ok(Packet::Response { .. }) => return EapPeerStep::Failed("an EAP response to us".to_owned()),
            Err(error) => return EapPeerStep::Failed(error.to_string()),
        };
        let fresh = matches!(peer.state, mschapv2::Peer::Fresh);
        let answer = match kind {
            IDENTITY if fresh => name(&peer.identity),
            // RFC 3748 §5.2: a text for somebody to read. There is nobody.
            NOTIFICATION => Vec::new(),
            kind if kind == peer.method.number() => {
                let Some(password) = self.eap_secret_for(&peer.identity, &peer.authenticator) else {
                    return EapPeerStep::Failed(format!("there is no EAP secret for '{}'", peer.identity));
                };
                match peer.state.asked(data, &name(&peer.identity), password, peer.challenge) {
                    Ok((state, answer)) => {
                        peer.state = state;
                        answer
                    }
                    Err(reason) => return EapPeerStep::Failed(reason),
                }
            }
            // §5.3.1: we have another method.
            _ if fresh && kind > NAK => {
                let number = [peer.method.number()];
                return EapPeerStep::Answer(peer, typed(RESPONSE, identifier, NAK, &number));
            }
            _ => return EapPeerStep::Failed(format!("an EAP request of type {kind} out of turn")),
        };
        EapPeerStep::Answer(peer, typed(RESPONSE, identifier, kind, &answer))
    }
}

#[cfg(test)]
mod tests;
