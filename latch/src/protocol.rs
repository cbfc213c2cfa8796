//! Messages between applications and the daemon; `docs/latch-protocol.md` describes them.
//!
//! One message is one datagram of a SOCK_SEQPACKET Unix socket: a JSON object of at most [`MAX_MESSAGE`] octets. A
//! client sends [`Request`]s, `hello` first; the server answers each with a reply or a refusal that carries the
//! request's number, and sends alerts when they happen.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use data_encoding::BASE64;
use ipsec::plane::{EspSuite, Mode};
use ipsec::transform::{Encr, Integ};
use pad::{Identity, Proof};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::database::{Algorithms, Class, LatchError, LatchState, OnBreak, Protector};

/// Version of the protocol that this crate speaks.
pub const VERSION: u32 = 1;

/// What this crate knows beyond the first form of [`VERSION`]: `docs/latch-protocol.md` says what came with which.
pub const REVISION: u32 = 13;

/// The first [`REVISION`] that has [`Wanted::larval`].
pub const LARVAL_REVISION: u32 = 5;

/// The first [`REVISION`] that has [`Wanted::progress`].
pub const PROGRESS_REVISION: u32 = 9;

/// How often a daemon says that it works on a request ([`ServerMessage::Working`]).
pub const PROGRESS: Duration = Duration::from_millis(if cfg!(test) { 100 } else { 2000 });

/// How long a packet that has passed the check may still be on its way to the socket, at most.
pub const SETTLING: Duration = Duration::from_millis(if cfg!(test) { 50 } else { 500 });

/// Longest message in octets, in both directions.
pub const MAX_MESSAGE: usize = 64 * 1024;

/// What a client sends, before its arguments are understood.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Chosen by the client; the answer carries it.
    pub id: u64,
    /// Which.
    pub request: String,
    /// Its arguments, an object.
    #[serde(default = "no_arguments")]
    pub arguments: Value,
}

/// A request that was understood.
#[derive(Clone, Debug, PartialEq)]
pub enum Call {
    /// `hello`.
    Hello(Hello),
    /// `create`; a socket comes with it.
    Create(Wanted),
    /// `listen`; a socket comes with it.
    Listen(Wanted),
    /// `accept`; a socket comes with it.
    Accept(Accept),
    /// `bypass`; a socket comes with it.
    Bypass(Bypassing),
    /// `inquire`; a socket may come with it.
    Inquire(Inquire),
    /// `release`.
    Release(Release),
    /// `list`.
    List(List),
    /// `show`.
    Show(Named),
    /// `break`.
    Break(Named),
    /// `close`.
    Close(Named),
    /// `watch`.
    Watch(Watch),
    /// `channel-binding`.
    ChannelBinding(Bind),
}

/// Opens a connection; must be the first request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hello {
    /// [`VERSION`].
    pub version: u32,
}

/// CREATE_CONNECTION_LATCH and CREATE_LISTENER_LATCH (RFC 5660 §2.3) for the socket that comes with the message: what
/// the latch, or those of the connections that the listener accepts, must be like.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wanted {
    /// Identity that the peer must have proved, in the notation of `swanctl.conf`; may have wildcards.
    pub peer: String,
    /// Identity that we must have asserted to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local_id: Option<String>,
    /// `tunnel` or `transport`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<WantedMode>,
    /// ESP algorithms, one of which the SA must have; empty is any.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub suites: Vec<WantedSuite>,
    /// The SA must have replay protection.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub replay_protection: bool,
    /// What to do when the latch breaks; left out: `reset` for TCP, `wait` for UDP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_break: Option<Disposition>,
    /// Whether SAs are made for the latch.
    #[serde(default)]
    pub initiate: Initiate,
    /// Of `listen` only: no alerts of the latches that the listener makes. Who accepts them hears of them all the same.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub quiet: bool,
    /// Of `create` only: do not wait for SAs that must be made first, but answer [`Larval`] (RFC 5660 §2.3).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub larval: bool,
    /// Of `create` only: as long as the answer takes, say [`ServerMessage::Working`] every now and then.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub progress: bool,
    /// Of `create` only: data may have come in on the TCP connection before, under no latch.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub late: bool,
    /// Of `create` only: number of a UDP listener latch of this connection, whose socket will send to `remote` without being
    /// connected. Instead of a socket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listener: Option<u64>,
    /// Where the socket will connect to; left out when it is connected, and by a listener.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remote: Option<SocketAddr>,
}

impl From<&str> for Wanted {
    /// A peer with this identity under any protection.
    fn from(peer: &str) -> Self {
        Self { peer: peer.to_owned(), ..Self::default() }
    }
}

/// A mode of IPsec.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WantedMode {
    /// Tunnel.
    Tunnel,
    /// Transport.
    Transport,
}

/// Whether the daemon makes SAs for a latch (RFC 5660 §2.3, §2.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Initiate {
    /// When there are none.
    #[default]
    Needed,
    /// One for this flow alone, in any case.
    Narrow,
    /// Never.
    No,
}

/// ESP algorithms by their numbers as IKEv2 transforms.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WantedSuite {
    /// The cipher.
    pub encr: u16,
    /// Its key length in bits; 0 if it is fixed.
    #[serde(default)]
    pub key_bits: u16,
    /// The integrity algorithm; 0 with a combined-mode cipher.
    #[serde(default)]
    pub integ: u16,
}

/// What becomes of a connection whose latch breaks (RFC 5660 §5.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Disposition {
    /// It ends as if the peer had reset it.
    Reset,
    /// Packets are lost until the conflict is over.
    Wait,
    /// As `wait`, and who sends hears that the destination is out of reach.
    Unreachable,
}

/// Takes the latch of a connection that a latched listener accepted; the connection's socket comes with the message. Of a
/// listener of UDP: asks for the latch of a remote end; then there is none.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Accept {
    /// Number of the listener latch.
    pub listener: u64,
    /// Where a datagram came from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remote: Option<SocketAddr>,
}

/// Has the connection of the socket that comes with the message go in clear, whatever policy would protect it (RFC 5660 §3.1).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bypassing {
    /// Where the socket will connect to; left out when it is connected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remote: Option<SocketAddr>,
}

/// Names a latch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Named {
    /// Number of the latch.
    pub latch: u64,
}

/// Asks for the channel binding (RFC 5056) of a latch of this connection.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bind {
    /// Number of the latch.
    pub latch: u64,
    /// [`UNIQUE_BINDING`] or [`ENDPOINT_BINDING`].
    #[serde(rename = "type")]
    pub kind: String,
}

/// The type of channel binding that is of one IKE SA: `docs/latch-protocol.md`.
pub const UNIQUE_BINDING: &str = "ipsec-ikev2-unique";

/// The type of channel binding that is of both ends' public keys: `docs/latch-protocol.md`.
pub const ENDPOINT_BINDING: &str = "ipsec-ikev2-endpoint";

/// Answer to `channel-binding`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelBinding {
    /// The type, which RFC 5056 calls the unique prefix.
    #[serde(rename = "type")]
    pub kind: String,
    /// The data, without the prefix; base64 in JSON.
    #[serde(with = "base64")]
    pub data: Vec<u8>,
}

/// Asks for an `event` message at each change of each latch.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Watch {}

/// Asks who is at the other end, and for the latch (FIND_LATCH, INQUIRE_LATCH): of a flow given by both addresses, or of
/// the TCP or UDP socket that comes with the message.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Inquire {
    /// Our end; left out when a socket comes along.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local: Option<SocketAddr>,
    /// The other end; left out when a connected socket comes along.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remote: Option<SocketAddr>,
    /// Upper-layer protocol of a flow that is given by addresses: 6, TCP, if left out, or 17, UDP.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub protocol: Option<u8>,
}

/// RELEASE_LATCH of a latch of this connection; ends what its socket does.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Release {
    /// Number of the latch.
    pub latch: u64,
}

/// Lists latches in the order of their numbers, some at a time.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct List {
    /// Only latches with greater numbers.
    #[serde(default)]
    pub after: u64,
}

/// What the server sends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum ServerMessage {
    /// The request succeeded.
    Reply {
        /// Number of the request.
        id: u64,
        /// [`Welcome`], [`Created`], [`Inquired`], [`Listing`], or an empty object for `release`.
        result: Value,
    },
    /// The request failed.
    Refusal {
        /// Number of the request, where it could be read.
        id: Option<u64>,
        /// Why.
        #[serde(flatten)]
        refusal: Refusal,
    },
    /// The answer is still to come ([`Wanted::progress`]).
    Working {
        /// Number of the request.
        id: u64,
    },
    /// A latch of this connection changed its state (ALERT, RFC 5660 §2.3).
    Alert {
        /// Number of the latch.
        latch: u64,
        /// Its new state.
        state: State,
        /// Why, for a human.
        reason: String,
        /// The listener latch that made it, until `accept` takes it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        listener: Option<u64>,
        /// Of a LARVAL latch that came to nothing: what a refusal would have said.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        code: Option<Code>,
    },
    /// Some latch changed its state; after `watch`.
    Event(LatchEvent),
}

/// A change of a latch's state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LatchEvent {
    /// Number of the latch; 0 when `missed` is not.
    pub latch: u64,
    /// Its new state.
    pub state: State,
    /// Its flow.
    pub flow: String,
    /// Why, for a human.
    pub reason: String,
    /// So many events were lost before this one.
    #[serde(default)]
    pub missed: u64,
}

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message} ({code})")]
pub struct Refusal {
    /// For programs.
    pub code: Code,
    /// For a human.
    pub message: String,
}

/// Kinds of refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Code {
    /// Not a JSON object of the right shape.
    Malformed,
    /// Longer than [`MAX_MESSAGE`].
    TooLong,
    /// No such request.
    UnknownRequest,
    /// The server does not speak this version.
    Version,
    /// `hello` has not been said, or is said twice.
    Hello,
    /// No descriptor came along, or more than one.
    Descriptor,
    /// The descriptor is not a socket that can be latched.
    Socket,
    /// The wanted peer is not an identity.
    Identity,
    /// No SA protects the flow.
    NoSa,
    /// The SA's peer is somebody else.
    WrongPeer,
    /// The SA protects otherwise than wanted.
    WrongProtection,
    /// The flow or port is latched already.
    Exists,
    /// The accepted connection's latch has broken, or it has none from this listener.
    NotAccepted,
    /// The latch has no channel binding of this type.
    NoBinding,
    /// The client has no right to ask for this: see [`crate::access`].
    Permission,
    /// SAs of different classes cover the flow.
    Conflict,
    /// This connection has no such latch.
    NoSuchLatch,
    /// Too many latches or connections.
    Limit,
    /// The daemon cannot enforce the latch, as it is configured.
    Unenforced,
    /// The configuration has it otherwise.
    Policy,
    /// The system refused something.
    System,
    /// A code that this crate does not know.
    #[serde(other)]
    Other,
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// Answer to `hello`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Welcome {
    /// Version of the protocol that will be spoken.
    pub version: u32,
    /// The daemon's [`REVISION`]; 1 if it does not say.
    #[serde(default = "first_revision")]
    pub revision: u32,
    /// Name and version of the daemon.
    pub server: String,
}

/// Answer to `create`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Created {
    /// Number of the latch.
    pub latch: u64,
    /// Our end.
    pub local: SocketAddr,
    /// The other end.
    pub remote: SocketAddr,
    /// Who is there.
    pub peer: Peer,
    /// How the packets are protected.
    pub protection: Protection,
    /// What enforces the latch; not told by older daemons.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guard: Option<Guard>,
    /// Stands for all that the latch pins: connections with the same number have the same peer, credential and protection
    /// (RFC 5660 §6.3). Not told by older daemons.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub class: Option<u32>,
}

/// Answer to `create` with [`Wanted::larval`] while an SA is being made: the socket may connect, and no packet of it passes
/// until an alert says that the latch is `established`. `closed` says that it came to nothing, and why; the connection is
/// then reset.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Larval {
    /// Number of the latch.
    pub latch: u64,
    /// Our end.
    pub local: SocketAddr,
    /// The other end.
    pub remote: SocketAddr,
}

/// Answer to `create`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Creating {
    /// It stands.
    Established(Box<Created>),
    /// It is still to be made.
    Larval(Larval),
}

/// Answer to `bypass`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bypassed {
    /// Number of the latch.
    pub latch: u64,
    /// Our end.
    pub local: SocketAddr,
    /// The other end.
    pub remote: SocketAddr,
    /// What keeps its packets from being protected.
    pub guard: Option<Guard>,
}

/// What keeps a latched connection's packets from going otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Guard {
    /// The daemon's check of each packet in the tunnel, and the socket's binding to it: the system has no policies.
    Engine,
    /// That, and policies of the system that drop what goes past the tunnel and outlive the daemon.
    EngineAndSystem,
    /// Policies of the system alone, since it does ESP.
    System,
    /// These, and a filter of the system that holds back ICMP errors about the flow.
    SystemAndFilter,
    /// One that this crate does not know.
    #[serde(other)]
    Other,
}

/// Answer to `inquire`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Inquired {
    /// Our end.
    pub local: SocketAddr,
    /// The other end.
    pub remote: SocketAddr,
    /// Upper-layer protocol.
    pub protocol: u8,
    /// The flow's latch; without one, the rest is what protects the flow at this moment and may change.
    pub latch: Option<LatchInfo>,
    /// Nothing protects the flow's packets, and nothing may: it has a bypass latch.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub bypass: bool,
    /// Who is there; nobody knows of a bypass.
    pub peer: Option<Peer>,
    /// How the packets are protected; not at all by a bypass.
    pub protection: Option<Protection>,
    /// What enforces the latch, where there is one; not told by older daemons.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guard: Option<Guard>,
    /// As [`Created::class`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub class: Option<u32>,
    /// The SAs that protect the flow at this moment; others may at the next. Not told by older daemons.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sas: Vec<SaInfo>,
}

/// A Child SA that protects a flow, and its IKE SA (RFC 5660 §2: outer addresses, NAT). No latch pins these.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaInfo {
    /// The connection of the configuration that admitted the peer (its PAD entry).
    pub connection: String,
    /// AUTH method by which the peer proved itself in this IKE SA, or the one that it was resumed from (IANA number).
    pub method: u8,
    /// Our outer address and port: behind a NAT the private one.
    pub outer_local: SocketAddr,
    /// The peer's outer address and port as we see it: behind a NAT the public one.
    pub outer_remote: SocketAddr,
    /// `udp`, `udp-encapsulated`, `tcp` or `tls`.
    pub transport: String,
    /// We are behind a NAT.
    pub nat_local: bool,
    /// The peer is behind a NAT.
    pub nat_remote: bool,
    /// How the flow's remote address is bound to the peer's identity.
    pub address: AddressBinding,
    /// The IKE SA was resumed with a ticket (RFC 5723).
    pub resumed: bool,
    /// SPIs of the IKE SA, the initiator's first, in hexadecimal digits.
    pub ike_spis: [String; 2],
    /// Algorithms of the IKE SA.
    pub ike_suite: Option<IkeSuiteInfo>,
    /// SPIs of the Child SA, the inbound first, in hexadecimal digits.
    pub spis: [String; 2],
    /// Our traffic selectors, in the notation of `swanctl.conf`.
    pub local_ts: Vec<String>,
    /// The peer's traffic selectors.
    pub remote_ts: Vec<String>,
}

/// How strongly an address and an identity are bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AddressBinding {
    /// The identity that the peer has proved is the address.
    Proved,
    /// We gave the address to this peer, and to no other while it has it.
    Assigned,
    /// The configuration lets the peer have it, and nobody else.
    Reserved,
    /// It is the outer address that the peer is reached at; behind a NAT others may have it too.
    Outer,
    /// The configuration lets the peer have it, and may let others.
    Configured,
    /// One that this crate does not know.
    #[serde(other)]
    Other,
}

/// Algorithms of an IKE SA by their IANA numbers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IkeSuiteInfo {
    /// The cipher.
    pub encr: u16,
    /// Its key length in bits; 0 if it is fixed.
    pub key_bits: u16,
    /// The integrity algorithm; 0 with a combined-mode cipher.
    pub integ: u16,
    /// The PRF.
    pub prf: u16,
    /// The key exchange.
    pub ke: u16,
    /// Additional key exchanges (RFC 9370).
    pub additional_ke: Vec<u16>,
}

/// Answer to `listen`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Listening {
    /// Number of the latch.
    pub latch: u64,
    /// Where.
    pub local: SocketAddr,
}

/// A latch's number and state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LatchInfo {
    /// Number of the latch.
    pub number: u64,
    /// Its state.
    pub state: State,
}

/// Answer to `list`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Listing {
    /// Latches by number.
    pub latches: Vec<ListedLatch>,
    /// There are more: ask again with `after` set to the last number.
    pub more: bool,
}

/// One line of a list.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ListedLatch {
    /// Number of the latch.
    pub latch: u64,
    /// Its state.
    pub state: State,
    /// Upper-layer protocol.
    pub protocol: u8,
    /// Our end.
    pub local: SocketAddr,
    /// The other end; none of a listener.
    pub remote: Option<SocketAddr>,
    /// The peer's identity, or whom the listener takes, as text, cut after 200 characters; empty of a bypass.
    pub peer: String,
    /// The connection is in clear, and stays so.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub bypass: bool,
    /// No application asked for it: the daemon latches all flows.
    #[serde(default)]
    pub automatic: bool,
    /// The listener latch that made it, until somebody takes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listener: Option<u64>,
}

/// States of a latch (RFC 5660 §2.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Of a listener: gives each new connection to its port a latch.
    Listener,
    /// Packets pass under congruent SAs only.
    Established,
    /// No packet passes.
    Broken,
    /// Closed by the administrator, or gone.
    Closed,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

impl From<Disposition> for OnBreak {
    fn from(disposition: Disposition) -> Self {
        match disposition {
            Disposition::Reset => Self::Reset,
            Disposition::Wait => Self::Wait,
            Disposition::Unreachable => Self::Unreachable,
        }
    }
}

impl From<WantedMode> for Mode {
    fn from(mode: WantedMode) -> Self {
        match mode {
            WantedMode::Tunnel => Self::Tunnel,
            WantedMode::Transport => Self::Transport,
        }
    }
}

impl From<WantedSuite> for Algorithms {
    fn from(WantedSuite { encr, key_bits, integ }: WantedSuite) -> Self {
        Self { encr: Encr(encr), key_bits, integ: Integ(integ) }
    }
}

impl From<LatchState> for State {
    fn from(state: LatchState) -> Self {
        match state {
            LatchState::Listener => Self::Listener,
            LatchState::Established => Self::Established,
            LatchState::Broken => Self::Broken,
            LatchState::Closed => Self::Closed,
        }
    }
}

/// Both identities and how the peer's was proved (RFC 5660 §2: certificate and trust anchor included).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// The identity that the peer proved.
    pub id: IdentityInfo,
    /// The identity that we asserted to it.
    pub local_id: IdentityInfo,
    /// How the peer proved it.
    pub proof: ProofInfo,
}

/// An IKE identity (RFC 7296 §3.5).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdentityInfo {
    /// The identity for a human.
    pub text: String,
    /// The ID type octet.
    pub kind: u8,
    /// The identification data; base64 in JSON.
    #[serde(with = "base64")]
    pub data: Vec<u8>,
}

/// How an identity was proved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "by", rename_all = "kebab-case")]
pub enum ProofInfo {
    /// Not at all: whoever was at the other end of the key exchange (RFC 7619).
    Unauthenticated,
    /// By a pre-shared key.
    SharedKey,
    /// By a certificate.
    Certificate {
        /// DER of the end-entity certificate; base64 in JSON.
        #[serde(with = "base64")]
        end_entity: Vec<u8>,
        /// DER of the trust anchor's certificate; base64 in JSON.
        #[serde(with = "base64")]
        trust_anchor: Vec<u8>,
    },
    /// By a key that the daemon's configuration has (RFC 7670).
    RawKey {
        /// Its SubjectPublicKeyInfo in DER; base64 in JSON.
        #[serde(with = "base64")]
        key: Vec<u8>,
    },
    /// By EAP (RFC 7296 §2.16): [`Peer::id`] is the EAP identity.
    Eap {
        /// The method, as `swanctl.conf` writes it after `eap-`.
        method: String,
    },
}

/// How packets are protected: ESP with these algorithms.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Protection {
    /// `tunnel` or `transport`.
    pub mode: String,
    /// The algorithms for a human.
    pub suite: String,
    /// IKEv2 number of the cipher.
    pub encr: u16,
    /// Key length in bits.
    pub key_bits: u16,
    /// IKEv2 number of the integrity algorithm; 0 with a combined-mode cipher.
    pub integ: u16,
    /// 64-bit sequence numbers.
    pub esn: bool,
    /// Replay protection is on.
    pub replay_protection: bool,
}

impl Refusal {
    /// Makes one.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

impl From<LatchError> for Refusal {
    fn from(error: LatchError) -> Self {
        let code = match &error {
            LatchError::NoSa(_) => Code::NoSa,
            LatchError::WrongPeer { .. } => Code::WrongPeer,
            LatchError::NoBinding(_) => Code::NoBinding,
            LatchError::WrongProtection { .. } => Code::WrongProtection,
            LatchError::Exists(_) => Code::Exists,
            LatchError::Broken(_) | LatchError::NotAccepted(_) => Code::NotAccepted,
            LatchError::Conflict(_) => Code::Conflict,
            LatchError::Full(_) => Code::Limit,
            LatchError::NotAConnection(_) => Code::Socket,
            LatchError::Unenforced { .. } => Code::Unenforced,
            LatchError::Policy { .. } => Code::Policy,
        };
        Self::new(code, error.to_string())
    }
}

impl From<Protector> for Guard {
    fn from(protector: Protector) -> Self {
        match protector {
            Protector::Engine => Self::Engine,
            Protector::EngineAndSystem => Self::EngineAndSystem,
            Protector::System => Self::System,
            Protector::SystemAndFilter => Self::SystemAndFilter,
        }
    }
}

impl From<&Class> for Peer {
    fn from(class: &Class) -> Self {
        let proof = match &class.peer.proof {
            Proof::Unauthenticated { .. } => ProofInfo::Unauthenticated,
            Proof::PreSharedKey => ProofInfo::SharedKey,
            Proof::Certificate { end_entity, trust_anchor, method: _ } => {
                ProofInfo::Certificate { end_entity: end_entity.clone(), trust_anchor: trust_anchor.clone() }
            }
            Proof::RawKey { key, method: _ } => ProofInfo::RawKey { key: key.clone() },
            Proof::Eap { method, ike_id: _ } => ProofInfo::Eap { method: method.name().to_owned() },
        };
        Self { id: (&class.peer.id).into(), local_id: (&class.peer.local_id).into(), proof }
    }
}

impl From<&Identity> for IdentityInfo {
    fn from(identity: &Identity) -> Self {
        Self { text: identity.to_string(), kind: identity.kind(), data: identity.wire_data() }
    }
}

impl From<&Class> for Protection {
    fn from(class: &Class) -> Self {
        let EspSuite { encr, key_bits, integ, esn } = class.suite;
        let mode = match class.mode {
            Mode::Tunnel => "tunnel",
            Mode::Transport => "transport",
        };
        Self {
            mode: mode.to_owned(),
            suite: suite_name(&class.suite),
            encr: encr.0,
            key_bits,
            integ: integ.0,
            esn,
            replay_protection: class.replay_protection,
        }
    }
}

impl Call {
    /// Name of the request on the wire.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Hello(_) => "hello",
            Self::Create(_) => "create",
            Self::Listen(_) => "listen",
            Self::Accept(_) => "accept",
            Self::Bypass(_) => "bypass",
            Self::Inquire(_) => "inquire",
            Self::Release(_) => "release",
            Self::List(_) => "list",
            Self::Show(_) => "show",
            Self::Break(_) => "break",
            Self::Close(_) => "close",
            Self::Watch(_) => "watch",
            Self::ChannelBinding(_) => "channel-binding",
        }
    }

    /// The datagram that asks this.
    pub fn encode(&self, id: u64) -> Result<Vec<u8>, Refusal> {
        let arguments = match self {
            Self::Hello(arguments) => serde_json::to_value(arguments),
            Self::Create(arguments) | Self::Listen(arguments) => serde_json::to_value(arguments),
            Self::Accept(arguments) => serde_json::to_value(arguments),
            Self::Bypass(arguments) => serde_json::to_value(arguments),
            Self::Inquire(arguments) => serde_json::to_value(arguments),
            Self::Release(arguments) => serde_json::to_value(arguments),
            Self::List(arguments) => serde_json::to_value(arguments),
            Self::Show(arguments) | Self::Break(arguments) | Self::Close(arguments) => serde_json::to_value(arguments),
            Self::Watch(arguments) => serde_json::to_value(arguments),
            Self::ChannelBinding(arguments) => serde_json::to_value(arguments),
        };
        let arguments = arguments.map_err(|error| Refusal::new(Code::Malformed, error.to_string()))?;
        encode(&Request { id, request: self.name().to_owned(), arguments })
    }

    /// Reads a request; the error carries its number where that could be read.
    pub fn decode(datagram: &[u8]) -> Result<(u64, Self), (Option<u64>, Refusal)> {
        let request: Request = serde_json::from_slice(datagram)
            .map_err(|error| (None, Refusal::new(Code::Malformed, format!("not a request: {error}"))))?;
        let id = request.id;
        let call = match request.request.as_str() {
            "hello" => arguments(request.arguments).map(Self::Hello),
            "create" => arguments(request.arguments).map(Self::Create),
            "listen" => arguments(request.arguments).map(Self::Listen),
            "accept" => arguments(request.arguments).map(Self::Accept),
            "bypass" => arguments(request.arguments).map(Self::Bypass),
            "inquire" => arguments(request.arguments).map(Self::Inquire),
            "release" => arguments(request.arguments).map(Self::Release),
            "list" => arguments(request.arguments).map(Self::List),
            "show" => arguments(request.arguments).map(Self::Show),
            "break" => arguments(request.arguments).map(Self::Break),
            "close" => arguments(request.arguments).map(Self::Close),
            "watch" => arguments(request.arguments).map(Self::Watch),
            "channel-binding" => arguments(request.arguments).map(Self::ChannelBinding),
            unknown => {
                let unknown: String = unknown.chars().take(40).collect();
                Err(Refusal::new(Code::UnknownRequest, format!("there is no request {unknown:?}")))
            }
        };
        call.map(|call| (id, call)).map_err(|refusal| (Some(id), refusal))
    }
}

/// The datagram of a message.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, Refusal> {
    let datagram =
        serde_json::to_vec(message).map_err(|error| Refusal::new(Code::Malformed, format!("encoding: {error}")))?;
    if datagram.len() > MAX_MESSAGE {
        return Err(Refusal::new(Code::TooLong, format!("the message would have {} octets", datagram.len())));
    }
    Ok(datagram)
}

fn arguments<T: DeserializeOwned>(value: Value) -> Result<T, Refusal> {
    serde_json::from_value(value).map_err(|error| Refusal::new(Code::Malformed, format!("arguments: {error}")))
}

fn first_revision() -> u32 {
    1
}

fn no_arguments() -> Value {
    Value::Object(serde_json::Map::new())
}

/// Names as in the IANA registry of IKEv2 transforms.
fn suite_name(suite: &EspSuite) -> String {
    let mut name = match suite.encr {
        Encr::NULL => "ENCR_NULL".to_owned(),
        Encr::AES_CBC => "ENCR_AES_CBC".to_owned(),
        Encr::AES_CTR => "ENCR_AES_CTR".to_owned(),
        Encr::AES_CCM_8 => "ENCR_AES_CCM_8".to_owned(),
        Encr::AES_CCM_12 => "ENCR_AES_CCM_12".to_owned(),
        Encr::AES_CCM_16 => "ENCR_AES_CCM_16".to_owned(),
        Encr::AES_GCM_8 => "ENCR_AES_GCM_8".to_owned(),
        Encr::AES_GCM_12 => "ENCR_AES_GCM_12".to_owned(),
        Encr::AES_GCM_16 => "ENCR_AES_GCM_16".to_owned(),
        Encr::NULL_AUTH_AES_GMAC => "ENCR_NULL_AUTH_AES_GMAC".to_owned(),
        Encr::CHACHA20_POLY1305 => "ENCR_CHACHA20_POLY1305".to_owned(),
        Encr(other) => format!("ENCR {other}"),
    };
    if suite.key_bits != 0 {
        name.push_str(&format!(" {} bits", suite.key_bits));
    }
    match suite.integ {
        Integ::NONE => {}
        Integ::HMAC_SHA1_96 => name.push_str(", AUTH_HMAC_SHA1_96"),
        Integ::AES_CMAC_96 => name.push_str(", AUTH_AES_CMAC_96"),
        Integ::HMAC_SHA2_256_128 => name.push_str(", AUTH_HMAC_SHA2_256_128"),
        Integ::HMAC_SHA2_384_192 => name.push_str(", AUTH_HMAC_SHA2_384_192"),
        Integ::HMAC_SHA2_512_256 => name.push_str(", AUTH_HMAC_SHA2_512_256"),
        Integ(other) => name.push_str(&format!(", INTEG {other}")),
    }
    name
}

mod base64 {
    use super::{BASE64, Deserialize};

    pub(super) fn serialize<S: serde::Serializer>(octets: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&BASE64.encode(octets))
    }

    pub(super) fn deserialize<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(deserializer)?;
        BASE64.decode(text.as_bytes()).map_err(serde::de::Error::custom)
    }
}
