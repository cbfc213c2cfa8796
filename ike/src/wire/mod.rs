//! IKE messages on the wire (RFC 7296 §3): parsing and encoding, no state.
//!
//! Parsing keeps what it does not know (numbers survive as values) and refuses what is malformed with
//! where and why. A protected message and an opened one are different types.

mod configuration;
mod payload;
mod protected;
mod reader;
mod security_association;
#[cfg(test)]
mod tests;

use ipsec::selector::TrafficSelector;
use ipsec::transform::{Ke, Proposal, Protocol};

pub use self::configuration::{Attribute, CfgType, Configuration, MAX_ATTRIBUTES, SUPPORTED, TrustAnchor};
pub use self::payload::{parse_payloads, unknown_critical};
pub use self::protected::{MAX_FRAGMENTS, OpenError, OpenOutcome, Opened, Protected, Reassembly, plain_octets, seal};
use self::reader::Reader;

/// Longest IKE message that we read or reassemble, octets.
pub const MAX_MESSAGE: usize = 65_535;

/// Most payloads in one message; more are refused so that a small datagram cannot take much memory.
pub const MAX_PAYLOADS: usize = 64;

/// Octets of the IKE header.
const HEADER: usize = 28;
/// Octets of a payload's generic header.
const GENERIC_HEADER: usize = 4;

/// Flag: the sender is the original initiator.
const FLAG_INITIATOR: u8 = 0x08;
/// Flag: the message is a response.
const FLAG_RESPONSE: u8 = 0x20;

/// Payload type: none follows.
const NO_NEXT_PAYLOAD: u8 = 0;
/// Payload type of the Encrypted payload (RFC 7296 §3.14).
const SK: u8 = 46;
/// Payload type of the Encrypted Fragment payload (RFC 7383 §2.5).
const SKF: u8 = 53;

/// An exchange type (RFC 7296 §3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ExchangeType(pub u8);
impl ExchangeType {
    /// IKE_SA_INIT.
    pub const IKE_SA_INIT: Self = Self(34);
    /// IKE_AUTH.
    pub const IKE_AUTH: Self = Self(35);
    /// CREATE_CHILD_SA.
    pub const CREATE_CHILD_SA: Self = Self(36);
    /// INFORMATIONAL.
    pub const INFORMATIONAL: Self = Self(37);
    /// IKE_SESSION_RESUME (RFC 5723).
    pub const IKE_SESSION_RESUME: Self = Self(38);
    /// IKE_INTERMEDIATE (RFC 9242).
    pub const IKE_INTERMEDIATE: Self = Self(43);
    /// IKE_FOLLOWUP_KE (RFC 9370).
    pub const IKE_FOLLOWUP_KE: Self = Self(44);
}

/// The IKE header (RFC 7296 §3.1) without Next Payload and Length, which encoding computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// IKE SA initiator's SPI.
    pub initiator_spi: u64,
    /// IKE SA responder's SPI; 0 in the first message.
    pub responder_spi: u64,
    /// Major version, high nibble of the octet.
    pub major: u8,
    /// Minor version.
    pub minor: u8,
    /// Exchange type.
    pub exchange: ExchangeType,
    /// The sender is the original initiator of the IKE SA.
    pub from_initiator: bool,
    /// The message is a response.
    pub response: bool,
    /// Message ID.
    pub message_id: u32,
}

/// A Notify payload (RFC 7296 §3.10).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notify {
    /// Protocol of the SA that it concerns, or `NONE`.
    pub protocol: Protocol,
    /// SPI of that SA, or empty.
    pub spi: Vec<u8>,
    /// Notify message type.
    pub kind: NotifyType,
    /// Notification data.
    pub data: Vec<u8>,
}

/// A notify message type; below 16384 an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NotifyType(pub u16);
#[allow(missing_docs, reason = "the constants are IANA's names")]
impl NotifyType {
    pub const UNSUPPORTED_CRITICAL_PAYLOAD: Self = Self(1);
    pub const INVALID_IKE_SPI: Self = Self(4);
    pub const INVALID_MAJOR_VERSION: Self = Self(5);
    pub const INVALID_SYNTAX: Self = Self(7);
    pub const INVALID_MESSAGE_ID: Self = Self(9);
    pub const INVALID_SPI: Self = Self(11);
    pub const NO_PROPOSAL_CHOSEN: Self = Self(14);
    pub const INVALID_KE_PAYLOAD: Self = Self(17);
    pub const AUTHENTICATION_FAILED: Self = Self(24);
    pub const SINGLE_PAIR_REQUIRED: Self = Self(34);
    pub const NO_ADDITIONAL_SAS: Self = Self(35);
    pub const INTERNAL_ADDRESS_FAILURE: Self = Self(36);
    pub const FAILED_CP_REQUIRED: Self = Self(37);
    pub const TS_UNACCEPTABLE: Self = Self(38);
    pub const INVALID_SELECTORS: Self = Self(39);
    pub const UNACCEPTABLE_ADDRESSES: Self = Self(40);
    pub const UNEXPECTED_NAT_DETECTED: Self = Self(41);
    pub const TEMPORARY_FAILURE: Self = Self(43);
    pub const CHILD_SA_NOT_FOUND: Self = Self(44);
    pub const STATE_NOT_FOUND: Self = Self(47);
    pub const INITIAL_CONTACT: Self = Self(16384);
    pub const SET_WINDOW_SIZE: Self = Self(16385);
    pub const ADDITIONAL_TS_POSSIBLE: Self = Self(16386);
    pub const NAT_DETECTION_SOURCE_IP: Self = Self(16388);
    pub const NAT_DETECTION_DESTINATION_IP: Self = Self(16389);
    pub const COOKIE: Self = Self(16390);
    pub const USE_TRANSPORT_MODE: Self = Self(16391);
    pub const HTTP_CERT_LOOKUP_SUPPORTED: Self = Self(16392);
    pub const REKEY_SA: Self = Self(16393);
    pub const ESP_TFC_PADDING_NOT_SUPPORTED: Self = Self(16394);
    pub const NON_FIRST_FRAGMENTS_ALSO: Self = Self(16395);
    pub const MOBIKE_SUPPORTED: Self = Self(16396);
    pub const ADDITIONAL_IP4_ADDRESS: Self = Self(16397);
    pub const ADDITIONAL_IP6_ADDRESS: Self = Self(16398);
    pub const NO_ADDITIONAL_ADDRESSES: Self = Self(16399);
    pub const UPDATE_SA_ADDRESSES: Self = Self(16400);
    pub const COOKIE2: Self = Self(16401);
    pub const NO_NATS_ALLOWED: Self = Self(16402);
    pub const AUTH_LIFETIME: Self = Self(16403);
    pub const REDIRECT_SUPPORTED: Self = Self(16406);
    pub const REDIRECT: Self = Self(16407);
    pub const REDIRECTED_FROM: Self = Self(16408);
    pub const TICKET_LT_OPAQUE: Self = Self(16409);
    pub const TICKET_REQUEST: Self = Self(16410);
    pub const TICKET_ACK: Self = Self(16411);
    pub const TICKET_NACK: Self = Self(16412);
    pub const TICKET_OPAQUE: Self = Self(16413);
    pub const QUICK_CRASH_DETECTION: Self = Self(16419);
    pub const IKEV2_MESSAGE_ID_SYNC_SUPPORTED: Self = Self(16420);
    pub const IKEV2_MESSAGE_ID_SYNC: Self = Self(16422);
    pub const IPSEC_REPLAY_COUNTER_SYNC: Self = Self(16423);
    pub const IKEV2_FRAGMENTATION_SUPPORTED: Self = Self(16430);
    pub const SIGNATURE_HASH_ALGORITHMS: Self = Self(16431);
    pub const PUZZLE: Self = Self(16434);
    pub const USE_PPK: Self = Self(16435);
    pub const PPK_IDENTITY: Self = Self(16436);
    pub const NO_PPK_AUTH: Self = Self(16437);
    pub const INTERMEDIATE_EXCHANGE_SUPPORTED: Self = Self(16438);
    pub const ADDITIONAL_KEY_EXCHANGE: Self = Self(16441);
    pub const SUPPORTED_AUTH_METHODS: Self = Self(16443);
}

/// A traffic selector as received: unknown types are kept so that they can be skipped knowingly.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WireSelector {
    /// TS_IPV4_ADDR_RANGE or TS_IPV6_ADDR_RANGE.
    Address(TrafficSelector),
    /// Any other type.
    Unknown {
        /// TS type.
        kind: u8,
        /// The selector after its length field.
        data: Vec<u8>,
    },
}

/// One payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Payload {
    /// Security Association (33).
    Sa(Vec<Proposal>),
    /// Key Exchange (34).
    Ke {
        /// Method.
        group: Ke,
        /// Public value.
        data: Vec<u8>,
    },
    /// Identification - Initiator (35).
    IdInitiator(Identification),
    /// Identification - Responder (36).
    IdResponder(Identification),
    /// Certificate (37).
    Cert {
        /// Certificate encoding (4 is X.509 signature).
        encoding: u8,
        /// Data.
        data: Vec<u8>,
    },
    /// Certificate Request (38).
    CertReq {
        /// Certificate encoding.
        encoding: u8,
        /// For X.509: SHA-1 hashes of acceptable CAs' public keys, 20 octets each.
        authorities: Vec<u8>,
    },
    /// Authentication (39).
    Auth {
        /// AUTH method.
        method: u8,
        /// AUTH data.
        data: Vec<u8>,
    },
    /// Nonce (40).
    Nonce(Vec<u8>),
    /// Notify (41).
    Notify(Notify),
    /// Delete (42).
    Delete {
        /// Protocol of the SAs.
        protocol: Protocol,
        /// SPIs as their owner receives them; empty for the IKE SA.
        spis: Vec<u32>,
    },
    /// Vendor ID (43).
    Vendor(Vec<u8>),
    /// Traffic Selector - Initiator (44).
    TsInitiator(Vec<WireSelector>),
    /// Traffic Selector - Responder (45).
    TsResponder(Vec<WireSelector>),
    /// Configuration (47).
    Configuration(Configuration),
    /// EAP (48).
    Eap(Vec<u8>),
    /// Puzzle Solution (54): keys of one size, not checked here (RFC 8019 §8.2).
    PuzzleSolution(Vec<u8>),
    /// Anything else that was not critical, or was (RFC 7296 §2.5).
    Unknown {
        /// Payload type.
        kind: u8,
        /// The critical bit.
        critical: bool,
        /// Body.
        data: Vec<u8>,
    },
}

/// An Identification payload's body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identification {
    /// ID type.
    pub kind: u8,
    /// Identification data.
    pub data: Vec<u8>,
}

impl Identification {
    /// The body as it enters the signed octets: type, three reserved octets, data (RFC 7296 §2.15
    /// "RestOfIDPayload").
    pub fn body(&self) -> Vec<u8> {
        let mut body = vec![self.kind, 0, 0, 0];
        body.extend_from_slice(&self.data);
        body
    }
}

/// A message whose payloads are known: unprotected, or opened after its integrity check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Header.
    pub header: Header,
    /// Payloads in order.
    pub payloads: Vec<Payload>,
}

/// A message as it comes from the network.
#[derive(Debug)]
pub enum Incoming {
    /// Without an Encrypted payload.
    Plain(Message),
    /// With one, still closed.
    Protected(Protected),
}

/// Why octets are not an IKE message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Shorter than its fields say.
    #[error("{what} is truncated at octet {at}")]
    Truncated {
        /// Which part.
        what: &'static str,
        /// Offset in the message.
        at: usize,
    },
    /// A length field contradicts what surrounds it.
    #[error("length {length} of {what} at octet {at} is impossible")]
    Length {
        /// Which part.
        what: &'static str,
        /// Offset in the message.
        at: usize,
        /// The value.
        length: usize,
    },
    /// A field has a value that the RFC forbids.
    #[error("{what} at octet {at} is malformed: {reason}")]
    Malformed {
        /// Which part.
        what: &'static str,
        /// Offset in the message.
        at: usize,
        /// Why.
        reason: &'static str,
    },
    /// Major version above 2 (answered with INVALID_MAJOR_VERSION, RFC 7296 §2.5).
    #[error("major version {0} is not supported")]
    MajorVersion(u8),
    /// A critical payload that we do not know (RFC 7296 §2.5).
    #[error("critical payload of unknown type {0}")]
    UnsupportedCritical(u8),
}

/// Reads a datagram (without the non-ESP marker).
///
/// The length in the header must be the datagram's (§3.1). An Encrypted payload must be the only one
/// (§3.14 has it last; no exchange puts others before it). Critical payloads of unknown type are kept
/// as [`Payload::Unknown`]; see [`unknown_critical`]. A message of a lower major version than 2 is
/// `Malformed`.
pub fn parse(datagram: &[u8]) -> Result<Incoming, WireError> {
    let mut reader = Reader::new(datagram);
    let initiator_spi = reader.u64("IKE header")?;
    let responder_spi = reader.u64("IKE header")?;
    let first = reader.u8("IKE header")?;
    let version = reader.u8("IKE header")?;
    let exchange = ExchangeType(reader.u8("IKE header")?);
    let flags = reader.u8("IKE header")?;
    let message_id = reader.u32("IKE header")?;
    let length = reader.u32("IKE header")?;
    let (major, minor) = (version >> 4, version & 0x0f);
    // The version comes first: a later version may give the rest another meaning (§2.5).
    if major > 2 {
        return Err(WireError::MajorVersion(major));
    }
    if major < 2 {
        return Err(WireError::Malformed { what: "major version", at: 17, reason: "below 2" });
    }
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    if length != datagram.len() || length > MAX_MESSAGE {
        return Err(WireError::Length { what: "IKE header", at: 24, length });
    }
    let header = Header {
        initiator_spi,
        responder_spi,
        major,
        minor,
        exchange,
        from_initiator: flags & FLAG_INITIATOR != 0,
        response: flags & FLAG_RESPONSE != 0,
        message_id,
    };
    match first {
        SK | SKF => Protected::parse(header, first == SKF, datagram).map(Incoming::Protected),
        _ => {
            let payloads = payload::parse_chain(first, reader)?;
            Ok(Incoming::Plain(Message { header, payloads }))
        }
    }
}

/// Encodes an unprotected message.
///
/// Empty when the message cannot be expressed: a field longer than its length field can say, or more
/// than [`MAX_MESSAGE`] octets. Only the caller's own data can cause that.
pub fn encode(message: &Message) -> Vec<u8> {
    payload::encode_chain(&message.payloads)
        .and_then(|(first, body)| {
            let mut out = encode_header(&message.header, first, HEADER.checked_add(body.len())?)?;
            out.extend_from_slice(&body);
            Some(out)
        })
        .unwrap_or_default()
}

/// The IKE header of a message of `length` octets in all; `None` when that is too long.
fn encode_header(header: &Header, first: u8, length: usize) -> Option<Vec<u8>> {
    if length > MAX_MESSAGE {
        return None;
    }
    let mut flags = 0;
    if header.from_initiator {
        flags |= FLAG_INITIATOR;
    }
    if header.response {
        flags |= FLAG_RESPONSE;
    }
    let mut out = Vec::with_capacity(length);
    out.extend_from_slice(&header.initiator_spi.to_be_bytes());
    out.extend_from_slice(&header.responder_spi.to_be_bytes());
    out.extend_from_slice(&[first, header.major << 4 | header.minor & 0x0f, header.exchange.0, flags]);
    out.extend_from_slice(&header.message_id.to_be_bytes());
    out.extend_from_slice(&u32::try_from(length).ok()?.to_be_bytes());
    Some(out)
}
