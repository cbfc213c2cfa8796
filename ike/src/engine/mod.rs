//! The engine: many IKE SAs behind one poll interface.
//!
//! Four kinds of method: getters; `handle_*` for what comes from outside (datagrams, streams, time,
//! answers to jobs, other shards); commands (`initiate`, `terminate`, `rekey`); and `poll_output`. After any call that
//! takes `&mut self`, drain [`Engine::poll_output`] until it yields `None`, then arm a timer for
//! [`Engine::next_timeout`].

pub(crate) mod assigned;
pub(crate) mod connections;
pub(crate) mod context;
mod cookie;
mod defence;
pub(crate) mod farewells;
pub(crate) mod members;
pub(crate) mod networks;
pub(crate) mod places;
mod pools;
mod puzzles;
pub(crate) mod reauthentication;
pub(crate) mod reservations;
mod responder;
mod resumption;
mod shards;
pub(crate) mod shared;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod storm;
pub(crate) mod tickets;
mod tombstones;
pub(crate) mod triggers;
pub(crate) mod upkeep;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::ops::Bound;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use ipsec::plane::{Encapsulation, EspSuite, Mode, SaPair, StreamId, Tags};
use ipsec::secret::Secret;
use ipsec::selector::{Flow, TrafficSelector};
use ipsec::transform::Ke;
use pad::{
    Admission, AuthError, AuthenticateRequest, EapPeer, EapPeerStep, EapServer, EapServerStep, Identity, PeerIdentity,
    Ppk, SignError, SignRequest, SignatureSettings, SignedAuth,
};

pub use self::assigned::{Assigned, Domain};
pub use self::reservations::{Party, Prospect, Protection, Reservations};
pub use self::shards::{Dispatch, MAX_SHARDS};
use crate::Rng;
use crate::config::{CheckAddressIdentities, Child, Connection, PuzzlePolicy, Retransmission};
use crate::counters::{Counter, Counters};
use crate::crypto::puzzle::Puzzle;
use crate::crypto::{AdditionalKe, IkeSuite, KeyDone, KeyError, KeyWork};
use crate::sa::crash::TokenMaker;
use crate::sa::established::Closed;
pub use crate::sa::redirect::Gateway;
use crate::sa::{Established, IkeSa, Initiating, Want, resuming, retry};
use crate::wire::{self, ExchangeType, Incoming, Message, NotifyType, Payload, Protected, WireError};
use connections::Connections;
use context::{Context, PeerKey, UNMARKED};
use cookie::Cookies;
use defence::Defence;
use members::{Member, Members};
use places::{Place, Places};
use puzzles::Spent;
use reservations::Reserved;
use sha2::{Digest, Sha256};
use shards::Numbering;
use shared::{Left, Shared};
use upkeep::{Held, Upkeep};

/// How an IKE message travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Transport {
    /// Plain UDP, port 500 by tradition.
    Udp,
    /// UDP with the non-ESP marker (RFC 3948), port 4500 by tradition. The marker itself is the IO's.
    UdpEncap,
    /// A TCP stream (RFC 9329).
    Stream(StreamId),
}

/// Where a message goes to or came from; a value that the engine chooses and the IO obeys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Path {
    /// Our address and port.
    pub local: SocketAddr,
    /// The peer's address and port.
    pub remote: SocketAddr,
    /// Over what.
    pub transport: Transport,
}

impl Path {
    /// Where to answer a request that came again: over the peer's new stream, if the one before broke (RFC 9329 §6.1).
    /// Over UDP a repetition moves nothing: it may be a replay.
    pub(crate) fn follow_stream(self, again: Self) -> Self {
        match (self.transport, again.transport) {
            (Transport::Stream(_), Transport::Stream(_)) if self.remote.ip() == again.remote.ip() => again,
            _ => self,
        }
    }
}

/// Number of an IKE SA, unique in the daemon's life (VICI's `uniqueid`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct IkeSaId(pub u64);

/// Number of a Child SA, unique in the daemon's life (VICI's child `uniqueid`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChildSaId(pub u64);

/// Number of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobId(pub u64);

/// Settings of all connections.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Port of plain IKE; a path with it floats to `nat_port`.
    pub port: u16,
    /// Port of UDP encapsulation.
    pub nat_port: u16,
    /// Default retransmission.
    pub retransmission: Retransmission,
    /// Largest IKE datagram (IP packet size) before fragmentation, for IPv4 and IPv6 (`charon.fragment_size`).
    pub fragment_size: usize,
    /// How long a half-open IKE SA lives (`charon.half_open_timeout`).
    pub half_open_timeout: Duration,
    /// Half-open IKE SAs in total from which on cookies are demanded; 0 always (`charon.cookie_threshold`).
    pub cookie_threshold: usize,
    /// The same for one address (`charon.cookie_threshold_ip`).
    pub cookie_threshold_ip: usize,
    /// Half-open IKE SAs of one address beyond which IKE_SA_INIT is dropped (`charon.block_threshold`).
    pub block_threshold: usize,
    /// IKE_SA_INIT requests in a minute that one address (IPv6: one /64) may have served without authenticating
    /// afterwards; 0 is no limit (`charon.address_budget`, ours).
    pub address_budget: u32,
    /// IKE SAs in all beyond which IKE_SA_INIT is dropped; 0 is no limit (`charon.ikesa_limit`).
    pub ikesa_limit: usize,
    /// Half-open IKE SAs in all from which on IKE_SA_INIT is dropped; 0 is no limit of its own
    /// (`charon.init_limit_half_open`).
    pub init_limit_half_open: usize,
    /// Jobs that are out from which on IKE_SA_INIT is dropped; 0 is no limit of its own
    /// (`charon.init_limit_job_load`).
    pub init_limit_job_load: usize,
    /// Puzzles (RFC 8019).
    pub puzzles: PuzzlePolicy,
    /// Reauthentication makes the new IKE SA before it breaks the old one (`charon.make_before_break`).
    pub make_before_break: bool,
    /// How long the inbound half of a rekeyed Child SA stays (`charon.delete_rekeyed_delay`).
    pub delete_rekeyed_delay: Duration,
    /// Order of ours wins in proposals (`prefer_configured_proposals`).
    pub prefer_configured_proposals: bool,
    /// NAT keepalive interval (`charon.keep_alive`); zero is off.
    pub keep_alive: Duration,
    /// `check_address_identities`: an address as identity is the one that the peer's messages come from (RFC 4945
    /// §3.1.1).
    pub check_address_identities: CheckAddressIdentities,
    /// `invalid_selectors`, ours: tell a peer that it sent under a Child SA what that is not for (RFC 4301 §5.2).
    pub invalid_selectors: bool,
    /// `charon.follow_redirects` (RFC 5685).
    pub follow_redirects: bool,
    /// `charon.signature_authentication`: announce and use RFC 7427's method.
    pub signature_authentication: bool,
    /// `charon.rsa_pss` and `charon.signature_authentication_constraints`.
    pub signatures: SignatureSettings,
    /// What an authenticated peer that asks for our APPLICATION_VERSION is told; nothing by default
    /// (`application_version`).
    pub application_version: Option<String>,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            port: 500,
            nat_port: 4500,
            retransmission: Retransmission::default(),
            fragment_size: 1280,
            half_open_timeout: Duration::from_secs(30),
            cookie_threshold: 30,
            cookie_threshold_ip: 3,
            block_threshold: 5,
            address_budget: 60,
            ikesa_limit: 0,
            init_limit_half_open: 0,
            init_limit_job_load: 0,
            puzzles: PuzzlePolicy::default(),
            make_before_break: false,
            delete_rekeyed_delay: Duration::from_secs(5),
            prefer_configured_proposals: true,
            keep_alive: Duration::from_secs(20),
            check_address_identities: CheckAddressIdentities::default(),
            invalid_selectors: true,
            follow_redirects: true,
            signature_authentication: true,
            signatures: SignatureSettings::default(),
            application_version: None,
        }
    }
}

/// What the engine wants from its driver, in order.
#[derive(Debug)]
pub enum Output {
    /// Send these octets.
    Transmit(Transmit),
    /// Do this and answer with [`Engine::handle_job`].
    Job(JobId, Job),
    /// Something happened.
    Event(Event),
    /// Open a TCP stream as TCP Originator; answer with `handle_stream_opened` or `handle_stream_closed`.
    OpenStream {
        /// Its number, chosen by the engine (below `1 << 63`; accepted streams get numbers above).
        stream: StreamId,
        /// Our address, port 0 leaves it to the system.
        local: SocketAddr,
        /// The peer's address and port.
        remote: SocketAddr,
        /// The code point of all its packets (RFC 9329 §6.8).
        dscp: u8,
        /// In TLS, and how its server proves itself.
        tls: Option<TlsPeer>,
        /// Through a web proxy, host and port.
        proxy: Option<String>,
    },
    /// Close a stream: nothing uses it any more.
    CloseStream(StreamId),
    /// What a message from a stream was worth (RFC 9329 §6.1). Not said of each message.
    Judgement(StreamId, Judgement),
    /// Tell the shard that it is for, or all others; with [`Engine::handle_note`]. One engine alone has none.
    Note(Note),
    /// Begin this at the shard that has an IKE SA for it ([`Engine::serves`]), or at any; with [`Engine::handle_initiate`]. One engine
    /// alone has none.
    Initiate(Box<Initiate>),
}

/// What one shard has to tell others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Note {
    /// Another IKE SA of the same peer takes this one's place (`unique`, INITIAL_CONTACT).
    Superseded(IkeSaId),
    /// A ticket of this IKE SA has made another one.
    Outlived(IkeSaId),
    /// Somebody at this address says, unprotected, that it does not know us: a hint, for all shards.
    Suspected(IpAddr),
}

impl Note {
    /// The IKE SA that it is about.
    pub fn ike_sa(self) -> Option<IkeSaId> {
        match self {
            Self::Superseded(id) | Self::Outlived(id) => Some(id),
            Self::Suspected(_) => None,
        }
    }
}

/// The TLS server that a stream goes to (RFC 9329 Appendix A).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TlsPeer {
    /// The name that its certificate must have.
    pub name: String,
    /// Its trust anchors, DER; empty: each loaded CA.
    pub cacerts: Vec<Vec<u8>>,
}

/// What a message from a stream was worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Judgement {
    /// Authentic and new, of an IKE SA that uses the stream.
    Authentic,
    /// No IKE message.
    Unparsable,
    /// Of an IKE SA that we do not have.
    UnknownSpi,
    /// Of an IKE SA that we have, and its integrity check fails.
    Forged,
}

/// One IKE message to send; without non-ESP marker or stream framing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transmit {
    /// Where.
    pub path: Path,
    /// The code point (RFC 2474) of the packet, or of the stream from now on; below 64.
    pub dscp: u8,
    /// What. A single 0xff octet is a NAT keepalive (sent without a marker).
    pub bytes: Vec<u8>,
}

/// Work that may take long or needs what the engine does not own.
pub enum Job {
    /// Authenticate ourselves: [`pad::Credentials::sign`].
    Sign(SignRequest),
    /// Authenticate the peer: [`pad::Credentials::authenticate`].
    Authenticate(AuthenticateRequest),
    /// Answer the peer, which proves itself by EAP: [`pad::Credentials::eap_server`].
    EapServer(Box<EapServer>, Vec<u8>),
    /// Answer the gateway, to which we prove ourselves by EAP: [`pad::Credentials::eap_peer`].
    EapPeer(Box<EapPeer>, Vec<u8>),
    /// A step of a key exchange: [`KeyWork::run`].
    KeyExchange(KeyWork),
    /// Solve a responder's puzzle: [`Puzzle::solve`].
    SolvePuzzle(Puzzle),
    /// Ask the latches, then install: a Child SA is ready. The exchange goes on after the answer, so a
    /// responder's answer never promises an SA that is not there, and a latch breaks before the SA goes in.
    InstallChild(Box<ChildReady>),
    /// Look up which pairs of addresses packets can take now.
    FindRoutes(RouteQuery),
    /// Find the address of a gateway, and ours towards it.
    Resolve(Gateway),
    /// Say how long ago ESP last arrived on one of the Child SAs with these inbound SPIs: proof of life (RFC 7296 §2.4),
    /// which saves a request. Asked when a liveness check is due only.
    SeenTraffic(Vec<u32>),
}

impl std::fmt::Debug for Job {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Sign(_) => "Sign",
            Self::Authenticate(_) => "Authenticate",
            Self::EapServer(..) => "EapServer",
            Self::EapPeer(..) => "EapPeer",
            Self::KeyExchange(_) => "KeyExchange",
            Self::SolvePuzzle(_) => "SolvePuzzle",
            Self::InstallChild(_) => "InstallChild",
            Self::FindRoutes(_) => "FindRoutes",
            Self::Resolve(_) => "Resolve",
            Self::SeenTraffic(_) => "SeenTraffic",
        })
    }
}

/// A question for the ways to a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteQuery {
    /// The local address in use; of the answers, those with it say whether it may stay so.
    pub local: IpAddr,
    /// Addresses of the peer, the one in use first.
    pub remotes: Vec<IpAddr>,
}

/// A pair of addresses between which the system would send packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// Ours; of an interface that is up.
    pub local: IpAddr,
    /// The peer's.
    pub remote: IpAddr,
    /// The packets leave through the interface that has the local address, or that address is of no interface in
    /// particular.
    pub direct: bool,
}

/// A negotiated Child SA, not yet installed.
#[derive(Debug)]
pub struct ChildReady {
    /// The IKE SA.
    pub ike_sa: IkeSaId,
    /// The new Child SA.
    pub child_sa: ChildSaId,
    /// The Child SA that it replaces, if it is a rekey.
    pub replaces: Option<ChildSaId>,
    /// Connection's name.
    pub connection: String,
    /// Its configuration.
    pub config: Arc<Child>,
    /// Who the peer proved to be.
    pub peer: Arc<PeerIdentity>,
    /// What applications can bind to the IKE SA that proved it ([`crate::crypto::channel_binding`]); the same at both
    /// ends and after rekeys. None if the IKE SA was resumed.
    pub channel_binding: Option<[u8; 32]>,
    /// SHA-256 of the SubjectPublicKeyInfo by which we, and the peer, proved ourselves in that IKE SA. None unless both did so
    /// with a certificate's key, or if it was resumed.
    pub endpoint_keys: Option<[[u8; 32]; 2]>,
    /// The peer would make another Child SA for what it left out of this one's selectors (ADDITIONAL_TS_POSSIBLE,
    /// SINGLE_PAIR_REQUIRED).
    pub additional_ts: bool,
    /// What to install, except `reqid` and `class`, which are 0 unless `replaces` or configuration fixes
    /// the `reqid`; the driver fills them in.
    pub pair: SaPair,
}

/// Answer to a job.
#[derive(Debug)]
pub enum JobOutcome {
    /// To `Sign`.
    Sign(Result<SignedAuth, SignError>),
    /// To `Authenticate`.
    Authenticate(Result<Admission, AuthError>),
    /// To `EapServer`.
    EapServer(EapServerStep),
    /// To `EapPeer`.
    EapPeer(EapPeerStep),
    /// To `KeyExchange`.
    KeyExchange(Result<KeyDone, KeyError>),
    /// To `SolvePuzzle`: the solution, or `None` when none was found in time.
    SolvePuzzle(Option<Vec<u8>>),
    /// To `InstallChild`: as what it is there, or why it is not.
    InstallChild(Result<Installed, InstallError>),
    /// To `FindRoutes`: the usable pairs, best first.
    FindRoutes(Vec<Route>),
    /// To `Resolve`: our address and the gateway's, or why there is none.
    Resolve(Result<(IpAddr, IpAddr), String>),
    /// To `SeenTraffic`: so long ago; `None` for never.
    SeenTraffic(Option<Duration>),
}

/// As what a Child SA is in the data plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Installed {
    /// `reqid`.
    pub reqid: u32,
    /// Marks and interfaces.
    pub tags: Tags,
}

/// Why a Child SA was not installed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InstallError {
    /// A latch or policy forbids it: TS_UNACCEPTABLE on the wire.
    #[error("refused by policy: {0}")]
    Refused(String),
    /// The data plane could not: the Child SA fails with NO_PROPOSAL_CHOSEN… or TEMPORARY_FAILURE.
    #[error("installing failed: {0}")]
    Failed(String),
}

/// Facts for the log, VICI's events, the data plane and the latches.
#[derive(Clone, Debug)]
pub enum Event {
    /// An IKE SA is authenticated.
    IkeUp(IkeSaId),
    /// An IKE SA is gone, with its status at the end.
    IkeDown(Box<IkeSaStatus>, CloseReason),
    /// An IKE SA was rekeyed; `new` has the children now.
    IkeRekeyed {
        /// The old one.
        old: IkeSaId,
        /// Its successor.
        new: IkeSaId,
    },
    /// Virtual addresses were assigned, to us or to the peer; comes before the Child SA that needs them. They last until
    /// `IkeDown` of this IKE SA or, after `IkeRekeyed`, of its successor.
    Assigned(IkeSaId, Arc<Assigned>),
    /// A Child SA is installed and agreed.
    ChildUp(IkeSaId, ChildSaId),
    /// A Child SA was replaced; the old one follows with `ChildDown` after its grace time.
    ChildRekeyed {
        /// The IKE SA.
        ike_sa: IkeSaId,
        /// The old one.
        old: ChildSaId,
        /// Its successor.
        new: ChildSaId,
    },
    /// Remove this Child SA from the data plane: it was installed and is no longer.
    ChildDown {
        /// The IKE SA.
        ike_sa: IkeSaId,
        /// Its status at the end.
        child: Box<ChildSaStatus>,
        /// Why.
        reason: CloseReason,
    },
    /// Never send under this pair again: it is deleted, and stays for what is under way to us until `ChildDown`.
    ChildRetired {
        /// Inbound SPI.
        spi_in: u32,
    },
    /// Point the data plane's pair at other addresses.
    Migrate {
        /// Inbound SPI.
        spi_in: u32,
        /// Where to.
        to: Encapsulation,
    },
    /// An IKE SA or Child SA that was asked for could not be made. `token` is that of `initiate`.
    Failed {
        /// Which request, if one of ours.
        token: Option<u64>,
        /// Connection.
        connection: String,
        /// Child, if it was the Child SA only.
        child: Option<String>,
        /// Why, for a human.
        reason: String,
    },
    /// What was asked for with `initiate`, `rekey` or `terminate` is done. `token` is that of the call.
    Done {
        /// Which request.
        token: u64,
    },
    /// A decision worth a line: what charon would log, for VICI's `control-log` and `log`.
    Log {
        /// charon's log group: "IKE", "CFG", "NET", "CHD", "ENC".
        group: &'static str,
        /// charon's level, 0 to 4.
        level: i8,
        /// The IKE SA, with its connection's name.
        ike_sa: Option<(IkeSaId, String)>,
        /// One line.
        message: String,
    },
}

/// Why an SA ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseReason {
    /// Ours: `terminate`.
    Local,
    /// The peer's delete.
    Peer,
    /// Replaced by a rekey.
    Rekeyed,
    /// No answer.
    Timeout,
    /// It never came up.
    Failed,
    /// Its lifetime ended.
    Expired,
    /// Another IKE SA of the same peer replaced it.
    Replaced,
    /// The peer says, authenticated, that it has lost it: INITIAL_CONTACT (RFC 7296 §2.4), or the token of RFC 6290.
    Restarted,
}

/// Why a peer that is in may not stay; `None` if it may. Also given are the certificates of its chain between the two in its
/// proof ([`pad::Admission::intermediates`]).
pub type Judge = Arc<dyn Fn(&PeerIdentity, &[Vec<u8>]) -> Option<String> + Send + Sync>;

/// What to initiate.
#[derive(Clone, Debug)]
pub struct Initiate {
    /// Connection.
    pub connection: Arc<Connection>,
    /// Child; `None` brings up the IKE SA only.
    pub child: Option<Arc<Child>>,
    /// Our address (resolved; the source of a route to `remote`).
    pub local: IpAddr,
    /// The peer's address (resolved).
    pub remote: IpAddr,
    /// Comes back in `Event::Done` or `Event::Failed`.
    pub token: u64,
}

/// Which SAs a command means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// An IKE SA with all its children.
    Ike(IkeSaId),
    /// One Child SA.
    Child(ChildSaId),
}

/// There is no such SA.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no such SA")]
pub struct NoSuchSa;

/// The engine. See the module documentation for the order of calls.
pub struct Engine {
    ctx: Context,
    sas: BTreeMap<IkeSaId, Box<Slot>>,
    members: Members,
    timers: BTreeSet<(Instant, IkeSaId)>,
    cookies: Cookies,
    places: Places,
    upkeep: Upkeep,
    /// IKE_SA_INIT requests that made an IKE SA, by initiator's SPI and source.
    inits: BTreeMap<(u64, SocketAddr), IkeSaId>,
    /// Solved puzzles that were accepted.
    spent: Spent,
    /// Streams of the peer that nothing used any more, and when we close them.
    lingering_until: BTreeSet<(Instant, StreamId)>,
    now: Instant,
}

/// How long a TCP Responder leaves a stream to its originator to close (RFC 9329 §6.1).
const STREAM_LINGER: Duration = Duration::from_secs(5);

/// An IKE SA with what the tables know of it.
struct Slot {
    sa: IkeSa,
    timer: Option<Instant>,
    spi: u64,
    stream: Option<StreamId>,
    half_open: Option<IpAddr>,
    peer: Option<PeerKey>,
    init: Option<(u64, SocketAddr)>,
    place: Place,
    held: Held,
    member: Option<Member>,
}

impl Engine {
    /// A new engine. `now` starts its cookie secret's life.
    pub fn new(config: EngineConfig, mut rng: Box<dyn Rng>, now: Instant) -> Self {
        let cookies = Cookies::new(now, rng.as_mut());
        let defence = Defence::new(now, config.address_budget, rng.as_mut());
        let shared = Arc::new(Shared::new(1, defence));
        Self::shard(config, rng, now, cookies, shared, Numbering { shard: 0, shards: 1 })
    }

    /// Engines that are one together, one for each source of randomness; at least one, at most [`MAX_SHARDS`]. [`Dispatch`] says
    /// which of them something is for. Each is given the same settings, connections and so on; [`Output::Note`] and
    /// [`Output::Initiate`] go from one to others.
    pub fn shards(config: &EngineConfig, rngs: impl IntoIterator<Item = Box<dyn Rng>>, now: Instant) -> Vec<Self> {
        let rngs: Vec<Box<dyn Rng>> = rngs.into_iter().take(MAX_SHARDS).collect();
        let shards = rngs.len();
        let mut shared = None;
        let shard = |(shard, mut rng): (usize, Box<dyn Rng>)| {
            let cookies = Cookies::new(now, rng.as_mut());
            let shared = shared.get_or_insert_with(|| {
                Arc::new(Shared::new(shards, Defence::new(now, config.address_budget, rng.as_mut())))
            });
            let numbering = Numbering { shard, shards };
            Self::shard(config.clone(), rng, now, cookies, Arc::clone(shared), numbering)
        };
        rngs.into_iter().enumerate().map(shard).collect()
    }

    fn shard(
        config: EngineConfig,
        rng: Box<dyn Rng>,
        now: Instant,
        cookies: Cookies,
        shared: Arc<Shared>,
        numbering: Numbering,
    ) -> Self {
        Self {
            ctx: Context::new(config, rng, shared, numbering),
            sas: BTreeMap::new(),
            members: Members::default(),
            timers: BTreeSet::new(),
            cookies,
            places: Places::default(),
            upkeep: Upkeep::default(),
            inits: BTreeMap::new(),
            spent: Spent::default(),
            lingering_until: BTreeSet::new(),
            now,
        }
    }

    /// Replaces the settings, from now on. Ports and `address_budget` stay as they are: sockets and tables were made
    /// by them.
    pub fn set_config(&mut self, config: EngineConfig) {
        let EngineConfig { port, nat_port, address_budget, signatures, .. } = self.ctx.config;
        if signatures != config.signatures {
            // What was proved might not do any more.
            self.ctx.shared.tickets.lock().forget_all();
        }
        self.ctx.config = EngineConfig { port, nat_port, address_budget, ..config };
    }

    /// Replaces all connections, in configuration order; a responder tries them in this order. SAs that
    /// are up keep the configuration that they were made with.
    pub fn set_connections(&mut self, connections: Vec<Arc<Connection>>) {
        self.set_table(Arc::new(Connections::new(connections)));
    }

    /// The same as another shard has, without making its tables again.
    pub fn set_connections_of(&mut self, other: &Self) {
        self.set_table(Arc::clone(&other.ctx.connections));
    }

    fn set_table(&mut self, connections: Arc<Connections>) {
        self.ctx.connections = connections;
        self.ctx.reauthentications.note_all();
        let Context { connections, shared, .. } = &self.ctx;
        let is_configured = |name: &str| connections.named(name).next().is_some();
        shared.former_addresses.lock().retain(|name, _| is_configured(name));
        shared.counters.retain(is_configured);
    }

    /// Whose flows Child SAs must not get; once, for all shards together.
    pub fn set_reservations(&mut self, reservations: Arc<dyn Reservations>) {
        // A second one would be a second latch database of one engine.
        let _ = self.ctx.shared.reservations.set(Reserved(reservations));
    }

    /// Hashes of acceptable CAs for CERTREQ payloads; set with the credentials.
    pub fn set_authority_hashes(&mut self, hashes: Vec<[u8; 20]>) {
        self.ctx.authorities = hashes;
    }

    /// Post-quantum preshared keys (RFC 8784); set with the credentials.
    pub fn set_ppks(&mut self, ppks: Vec<Ppk>) {
        self.ctx.ppks = ppks;
    }

    /// Says who may stay of those that are in, from now on; set with the credentials. Whoever comes up by a proof of before, or
    /// rekeys, is judged then. Those that are up are when [`Self::review`] says so.
    pub fn set_judge(&mut self, judge: Judge) {
        self.ctx.judge = Some(judge);
    }

    /// Ends an IKE SA whose peer may not stay. Nothing waits for the peer: its Child SAs are taken down at once.
    pub fn review(&mut self, now: Instant, id: IkeSaId) {
        self.now = now;
        self.with_established(id, |sa, ctx| sa.review(ctx, now));
        self.settle(now);
    }

    /// Credentials have changed: no ticket that was given or received before is good any more (RFC 5723 §6.2), and what was
    /// proved before gives none.
    pub fn forget_tickets(&mut self) {
        self.ctx.shared.tickets.lock().forget_all();
    }

    /// A datagram or a stream's IKE message arrived (marker and framing removed).
    pub fn handle_message(&mut self, now: Instant, path: Path, bytes: &[u8]) {
        self.now = now;
        match wire::parse(bytes) {
            Ok(Incoming::Plain(message)) => self.handle_plain(now, path, message, bytes),
            Ok(Incoming::Protected(protected)) => self.handle_protected(now, path, protected, bytes),
            Err(WireError::MajorVersion(version)) => self.answer_version(now, path, bytes, version),
            Err(error) => {
                tracing::trace!(%error, "not an IKE message");
                self.ctx.shared.counters.count(Counter::Invalid);
                self.ctx.judge(&path, Judgement::Unparsable);
            }
        }
        self.settle(now);
    }

    /// A stream that we asked for is open; `local` is its real local address.
    pub fn handle_stream_opened(&mut self, now: Instant, stream: StreamId, local: SocketAddr) {
        self.now = now;
        for id in self.stream_users(stream) {
            self.with(id, |sa, ctx| sa.handle_stream_opened(ctx, now, stream, local));
        }
        self.settle(now);
    }

    /// A stream ended or could not be opened.
    pub fn handle_stream_closed(&mut self, now: Instant, stream: StreamId, reason: &str) {
        self.now = now;
        let (users, closes_at) = self.ctx.shared.streams.ended(stream, |id| self.sas.contains_key(&id));
        self.stop_lingering(stream, closes_at);
        for id in users {
            if let Some(slot) = self.sas.get_mut(&id) {
                slot.stream = None;
            }
            self.with(id, |sa, ctx| sa.handle_stream_closed(ctx, now, stream, reason));
        }
        self.settle(now);
    }

    /// The answer to a job. Unknown numbers (the SA is gone meanwhile) are ignored, except that a child
    /// that was installed for nobody gives `ChildDown`.
    pub fn handle_job(&mut self, now: Instant, job: JobId, outcome: JobOutcome) {
        self.now = now;
        let Some(entry) = self.ctx.take_job(job) else { return };
        let mut unclaimed = Some(outcome);
        if self.sas.contains_key(&entry.ike_sa) {
            let mut outcome = unclaimed.take();
            self.with(entry.ike_sa, |sa, ctx| match outcome.take() {
                Some(given) => {
                    let (sa, left) = sa.handle_job(ctx, now, job, given);
                    unclaimed = left;
                    sa
                }
                None => Some(sa),
            });
        }
        if let (Some(JobOutcome::InstallChild(result)), Some(mut status)) = (unclaimed, entry.installs) {
            match result {
                Ok(installed) => {
                    (status.reqid, status.tags) = (installed.reqid, installed.tags);
                    self.ctx.child_down(entry.ike_sa, *status, CloseReason::Failed);
                }
                Err(_) => self.ctx.release_child_spi(status.spi_in),
            }
        }
        self.settle(now);
    }

    /// A volume limit of a Child SA was reached: rekey (soft) or delete (hard).
    pub fn handle_expire(&mut self, now: Instant, spi_in: u32, hard: bool) {
        self.now = now;
        self.with_child_spi(spi_in, |sa, ctx| sa.handle_expire(ctx, now, spi_in, hard));
        self.settle(now);
    }

    /// An authenticated ESP packet came from another UDP source (§2.23): proof of life and a new path.
    pub fn handle_mapping_changed(&mut self, now: Instant, spi_in: u32, remote: SocketAddr) {
        self.now = now;
        self.with_child_spi(spi_in, |sa, ctx| sa.handle_mapping_changed(ctx, now, remote));
        self.settle(now);
    }

    /// The peer sent a packet, of which this is the start, under a Child SA that is not for it.
    pub fn handle_invalid_selectors(&mut self, now: Instant, spi_in: u32, start: &[u8]) {
        self.now = now;
        self.with_child_spi(spi_in, |sa, ctx| sa.handle_invalid_selectors(ctx, now, spi_in, start));
        self.settle(now);
    }

    /// An authenticated ESP packet came over another stream, the newest so far (RFC 9329 §6.1).
    pub fn handle_stream_changed(&mut self, now: Instant, spi_in: u32, path: Path) {
        self.now = now;
        self.with_child_spi(spi_in, |sa, ctx| sa.handle_stream_changed(ctx, now, path));
        self.settle(now);
    }

    /// Timers.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.now = now;
        let due: Vec<(Instant, IkeSaId)> = self.timers.iter().take_while(|(at, _)| *at <= now).copied().collect();
        for (_, id) in due {
            self.with(id, |sa, ctx| sa.handle_timeout(ctx, now));
        }
        self.ctx.repeat_farewells(now);
        self.drop_old_fragments(now);
        while let Some((at, stream)) = self.lingering_until.first().copied().filter(|(at, _)| *at <= now) {
            self.lingering_until.remove(&(at, stream));
            if self.ctx.shared.streams.is_over(stream, at) {
                self.ctx.outputs.push_back(Output::CloseStream(stream));
            }
        }
        self.settle(now);
    }

    /// When to call [`Self::handle_timeout`].
    pub fn next_timeout(&self) -> Option<Instant> {
        let sa = self.timers.first().map(|(at, _)| *at);
        let stream = self.lingering_until.first().map(|(at, _)| *at);
        let upkeep = self.upkeep.next_timeout().into_iter().chain(self.ctx.farewells.next_timeout());
        sa.into_iter().chain(upkeep).chain(stream).min()
    }

    /// Next output, in order; `None` when drained.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.ctx.outputs.pop_front()
    }

    /// Brings up an IKE SA and, if named, a Child SA; an IKE SA of the same connection to the same peer is
    /// reused for the child.
    pub fn initiate(&mut self, now: Instant, request: Initiate) {
        self.now = now;
        let token = Some(request.token);
        self.initiate_for(now, request, token);
        self.settle(now);
    }

    /// As [`Self::initiate`], for a packet that fell into a trap: its selectors come first in the offer, so that the
    /// responder's answer has room for it (§2.9).
    pub fn initiate_for_packet(&mut self, now: Instant, request: Initiate, packet: Flow) {
        self.ctx.triggers.insert(request.token, packet);
        self.initiate(now, request);
    }

    /// Deletes SAs with the peer's knowledge; `force` does not wait for its answer.
    pub fn terminate(&mut self, now: Instant, target: Target, force: bool, token: u64) -> Result<(), NoSuchSa> {
        self.now = now;
        let mut result = Ok(());
        match target {
            Target::Ike(id) if self.sas.contains_key(&id) => self.with(id, |sa, ctx| match sa {
                IkeSa::Established(mut sa) => {
                    sa.terminate(ctx, now, force, token).is_ok().then_some(IkeSa::Established(sa))
                }
                attempt => {
                    let left = attempt.abandon(ctx, "terminated");
                    ctx.event(Event::Done { token });
                    left
                }
            }),
            Target::Ike(_) => result = Err(NoSuchSa),
            Target::Child(child) => {
                let owner = self.ctx.child_owners.get(&child).copied().ok_or(NoSuchSa)?;
                result = Err(NoSuchSa);
                self.with_established(owner, |sa, ctx| {
                    result = sa.terminate_child(ctx, now, child, force, token)?;
                    Ok(())
                });
            }
        }
        self.settle(now);
        result
    }

    /// Rekeys an IKE SA or a Child SA.
    pub fn rekey(&mut self, now: Instant, target: Target, token: u64) -> Result<(), NoSuchSa> {
        self.now = now;
        let owner = match target {
            Target::Ike(id) => Some(id),
            Target::Child(child) => self.ctx.child_owners.get(&child).copied(),
        };
        let owner = owner.filter(|id| self.sas.get(id).is_some_and(|slot| matches!(slot.sa, IkeSa::Established(_))));
        let owner = owner.ok_or(NoSuchSa)?;
        self.with_established(owner, |sa, ctx| match target {
            Target::Ike(_) => sa.rekey(ctx, now, token),
            Target::Child(child) => sa.rekey_child(ctx, now, child, token),
        });
        self.settle(now);
        Ok(())
    }

    /// Makes tokens for quick crash detection (RFC 6290) from this secret: 32 octets that survive a restart, and that
    /// no other gateway has. `None` makes none.
    pub fn set_crash_secret(&mut self, secret: Option<Secret>) {
        self.ctx.tokens = TokenMaker::new(secret);
    }

    /// Starts an IKE SA again from IKE_SA_INIT, with its Child SAs.
    pub fn reauthenticate(&mut self, now: Instant, id: IkeSaId, token: u64) -> Result<(), NoSuchSa> {
        self.now = now;
        if !self.sas.get(&id).is_some_and(|slot| matches!(slot.sa, IkeSa::Established(_))) {
            return Err(NoSuchSa);
        }
        self.with_established(id, |sa, ctx| sa.reauthenticate_on_demand(ctx, now, token));
        self.settle(now);
        Ok(())
    }

    /// Sends the initiator of an IKE SA to another gateway (RFC 5685 §5).
    pub fn redirect(&mut self, now: Instant, id: IkeSaId, gateway: Gateway, token: u64) -> Result<(), NoSuchSa> {
        self.now = now;
        if !self.sas.get(&id).is_some_and(|slot| matches!(slot.sa, IkeSa::Established(_))) {
            return Err(NoSuchSa);
        }
        self.with_established(id, |sa, ctx| sa.redirect(ctx, now, gateway, token));
        self.settle(now);
        Ok(())
    }

    /// All IKE SAs by number.
    pub fn ike_sas(&self, now: Instant) -> Vec<IkeSaStatus> {
        self.sas.values().map(|slot| slot.sa.status(now)).collect()
    }

    /// One IKE SA.
    pub fn ike_sa(&self, id: IkeSaId, now: Instant) -> Option<IkeSaStatus> {
        self.sas.get(&id).map(|slot| slot.sa.status(now))
    }

    /// Numbers of the IKE SAs of a connection, or of all, from above this one on.
    pub fn ike_sas_after<'a>(
        &'a self,
        connection: Option<&'a str>,
        after: IkeSaId,
    ) -> impl Iterator<Item = IkeSaId> + 'a {
        let all = self.sas.range((Bound::Excluded(after), Bound::Unbounded)).filter(move |_| connection.is_none());
        let some = connection.into_iter().flat_map(move |name| self.members.after(name, after));
        all.map(|(id, _)| *id).chain(some)
    }

    /// True when there is this IKE SA, and it belongs to that connection.
    pub fn is_of(&self, id: IkeSaId, connection: &str) -> bool {
        let member = self.sas.get(&id).and_then(|slot| slot.member.as_ref());
        member.is_some_and(|member| *member.connection == *connection)
    }

    /// True while an IKE SA of this connection that we initiate is on its way.
    pub fn is_initiating(&self, connection: &str) -> bool {
        self.members.is_initiating(connection)
    }

    /// The IKE SA that a Child SA, once it has been up, belongs to.
    pub fn owner(&self, child: ChildSaId) -> Option<IkeSaId> {
        self.ctx.child_owners.get(&child).copied()
    }

    /// The state of a Child SA that has been up.
    pub fn child_state(&self, child: ChildSaId) -> Option<ChildState> {
        match &self.sas.get(&self.owner(child)?)?.sa {
            IkeSa::Established(sa) => sa.child_state(child),
            _ => None,
        }
    }

    /// IKE SAs in total, and those half-open; of all shards together.
    pub fn counts(&self) -> (usize, usize) {
        (self.ctx.shared.load().0, self.ctx.shared.defence.lock().half_open.total())
    }

    /// Attempts of ours that are under way.
    pub fn initiating(&self) -> usize {
        self.members.initiating()
    }

    /// Messages and rekeys since the start or the last reset; of all shards together.
    pub fn counters(&self) -> &Counters {
        &self.ctx.shared.counters
    }

    // Routing.

    fn handle_plain(&mut self, now: Instant, path: Path, message: Message, bytes: &[u8]) {
        let header = message.header;
        if header.exchange == ExchangeType::IKE_SESSION_RESUME {
            return self.handle_resume(now, path, message, bytes);
        }
        if header.exchange != ExchangeType::IKE_SA_INIT {
            // Nothing unprotected means anything for an IKE SA that has keys (§2.21), but the peer's own token, which
            // comes as answer to a request of ours (RFC 6290); and a peer which says that it does not know us may have
            // been restarted: §2.21.4.
            let ours = if header.from_initiator { header.responder_spi } else { header.initiator_spi };
            if let Some(id) = self.ctx.shared.spis.get(ours).filter(|_| header.response) {
                self.with_established(id, |sa, ctx| sa.handle_crash(ctx, now, &message));
            }
            let complains = |payload: &Payload| match payload {
                Payload::Notify(notify) => matches!(notify.kind, NotifyType::INVALID_IKE_SPI | NotifyType::INVALID_SPI),
                _ => false,
            };
            if message.payloads.iter().any(complains) {
                self.suspect(now, path.remote.ip());
                if self.ctx.numbering.shards > 1 {
                    self.ctx.outputs.push_back(Output::Note(Note::Suspected(path.remote.ip())));
                }
            }
            return;
        }
        if !header.response {
            self.handle_init_request(now, path, message, bytes);
            return;
        }
        let Some(id) = self.ctx.shared.spis.get(header.initiator_spi) else {
            return self.ctx.judge(&path, Judgement::UnknownSpi);
        };
        self.with(id, |sa, ctx| match sa {
            IkeSa::Initiating(sa) if sa.spi() == header.initiator_spi => {
                sa.handle_response(ctx, now, path, message, bytes)
            }
            other => Some(other),
        });
    }

    fn handle_protected(&mut self, now: Instant, path: Path, protected: Protected, bytes: &[u8]) {
        let header = protected.header;
        let ours = if header.from_initiator { header.responder_spi } else { header.initiator_spi };
        if let Some(id) = self.ctx.shared.spis.get(ours) {
            return self.with(id, |sa, ctx| sa.handle_protected(ctx, now, path, protected, bytes));
        }
        if self.ctx.hear_farewell(now, path, ours, protected, bytes) {
            return;
        }
        if let Some(tombstone) = self.ctx.tombstones.get(now, ours) {
            // The same octets as an authenticated request had, so the same answer.
            if tombstone.request == <[u8; 32]>::from(Sha256::digest(bytes)) {
                let (dscp, answer) = (tombstone.dscp, tombstone.answer.clone());
                self.ctx.transmit(path, dscp, answer);
            }
        } else {
            self.ctx.shared.counters.count(Counter::InvalidSpi);
            // RFC 6290 §9.2: whichever of the two SPIs is ours, an IKE SA with it lives.
            let is_left = |spi| self.ctx.farewells.contains(spi) || self.ctx.tombstones.get(now, spi).is_some();
            let known = |spi| self.ctx.shared.spis.contains(spi) || is_left(spi);
            if known(header.initiator_spi) || known(header.responder_spi) {
                return;
            }
            self.ctx.judge(&path, Judgement::UnknownSpi);
            if let Some(message) = self.ctx.tokens.lost(now, &header, &self.ctx.shared.tokens_shown) {
                let line = format!("{} uses an IKE_SA that we do not have, showing its token", path.remote.ip());
                self.ctx.log("IKE", 1, None, line);
                self.ctx.transmit(path, UNMARKED, [wire::encode(&message)]);
            }
        }
    }

    /// ESP came from here with an SPI that nobody knows: its sender may have been restarted, or we. A hint, and no more: who
    /// has an IKE SA with us is told there (§1.5, §2.21.4). `remote` has port 0 without encapsulation.
    pub fn handle_unknown_spi(&mut self, now: Instant, remote: SocketAddr, spi: u32) {
        self.now = now;
        for id in self.places.suspects(now, remote.ip()) {
            self.with_established(id, |sa, ctx| sa.handle_unknown_spi(ctx, now, remote, spi));
        }
        self.settle(now);
    }

    /// What another shard says ([`Output::Note`]).
    pub fn handle_note(&mut self, now: Instant, note: Note) {
        self.now = now;
        match note {
            Note::Superseded(_) | Note::Outlived(_) => self.note(now, note),
            Note::Suspected(remote) => self.suspect(now, remote),
        }
        self.settle(now);
    }

    /// Ends an IKE SA of this shard, or tells the shard that has it.
    fn note(&mut self, now: Instant, note: Note) {
        let Some(id) = note.ike_sa() else { return };
        if !self.ctx.numbering.has(id) {
            return self.ctx.outputs.push_back(Output::Note(note));
        }
        self.with_established(id, |sa, ctx| match note {
            Note::Outlived(_) => Err(sa.outlived(ctx, now)),
            Note::Superseded(_) => sa.superseded(ctx, now),
            Note::Suspected(_) => Ok(()),
        });
    }

    /// Asks the peers at this address whether they live, unless they have shown it lately.
    fn suspect(&mut self, now: Instant, remote: IpAddr) {
        for id in self.places.suspects(now, remote) {
            self.with_established(id, |sa, ctx| sa.handle_hint(ctx, now));
        }
    }

    fn initiate_for(&mut self, now: Instant, request: Initiate, token: Option<u64>) {
        let Initiate { connection, child, local, remote, .. } = request;
        let want = Want { child, token };
        let mut reusable = self.serving(&connection, remote);
        if let Some(lost) = reusable.filter(|id| self.is_lost(*id, local)) {
            self.with(lost, |sa, ctx| sa.abandon(ctx, "its local address is gone"));
            reusable = None;
        }
        match reusable {
            Some(id) => self.with(id, |sa, ctx| match sa {
                IkeSa::Initiating(mut sa) => {
                    sa.add_want(want);
                    Some(IkeSa::Initiating(sa))
                }
                IkeSa::Resuming(mut sa) => {
                    sa.add_want(want);
                    Some(IkeSa::Resuming(sa))
                }
                IkeSa::InitiatorIntermediate(mut sa) => {
                    sa.add_want(want);
                    Some(IkeSa::InitiatorIntermediate(sa))
                }
                IkeSa::InitiatorAuth(mut sa) => {
                    sa.add_want(want);
                    Some(IkeSa::InitiatorAuth(sa))
                }
                IkeSa::Established(mut sa) => sa.want(ctx, now, want).is_ok().then_some(IkeSa::Established(sa)),
                other => Some(other),
            }),
            None => {
                if let Some((id, sa)) = resuming::begin(&mut self.ctx, now, connection, want, local, remote) {
                    self.insert(id, sa, None);
                }
            }
        }
    }

    /// The IKE SA that an initiation would use.
    fn serving(&self, connection: &Connection, remote: IpAddr) -> Option<IkeSaId> {
        let serves = |id: &IkeSaId| match self.sas.get(id).map(|slot| &slot.sa) {
            Some(IkeSa::Initiating(sa)) => sa.serves(connection, remote),
            Some(IkeSa::Resuming(sa)) => sa.serves(connection, remote),
            Some(IkeSa::InitiatorIntermediate(sa)) => sa.serves(connection, remote),
            Some(IkeSa::InitiatorAuth(sa)) => sa.serves(connection, remote),
            Some(IkeSa::Established(sa)) => sa.serves(connection, remote),
            Some(IkeSa::ResponderIntermediate(_) | IkeSa::ResponderAuth(_)) | None => false,
        };
        self.upkeep.at(remote).find(serves)
    }

    /// True when an initiation would use an IKE SA of this shard.
    pub fn serves(&self, request: &Initiate) -> bool {
        self.serving(&request.connection, request.remote).is_some()
    }

    /// Initiates what nobody waits for ([`Output::Initiate`]).
    pub fn handle_initiate(&mut self, now: Instant, request: Initiate) {
        self.now = now;
        self.initiate_for(now, request, None);
        self.settle(now);
    }

    /// An IKE SA that ended is to be replaced: an IKE SA of any shard may serve.
    fn begin_again(&mut self, now: Instant, request: Initiate) {
        if self.ctx.numbering.shards == 1 || self.serves(&request) {
            self.initiate_for(now, request, None);
        } else {
            self.ctx.outputs.push_back(Output::Initiate(Box::new(request)));
        }
    }

    /// True for an attempt from an address that we no longer have, when another one would be used now.
    fn is_lost(&self, id: IkeSaId, local: IpAddr) -> bool {
        let attempt = self.sas.get(&id).filter(|slot| !matches!(slot.sa, IkeSa::Established(_)));
        attempt.is_some_and(|slot| {
            let from = slot.sa.status(self.now).path.local.ip();
            from != local && !self.ctx.local_addresses.is_empty() && !self.ctx.local_addresses.contains(&from)
        })
    }

    /// What reauthentication starts again, by the connection as it is now; `None` where it or its child is gone.
    fn as_configured_now(&self, request: Initiate) -> Option<Initiate> {
        let name = &request.connection.name;
        let connection = Arc::clone(self.ctx.connections.named(name).next()?);
        let child = match &request.child {
            Some(old) => Some(Arc::clone(connection.children.iter().find(|child| child.name == old.name)?)),
            None => None,
        };
        Some(Initiate { connection, child, ..request })
    }

    // The table.

    /// Hands an IKE SA out for a step and takes back what it became.
    fn with(&mut self, id: IkeSaId, step: impl FnOnce(IkeSa, &mut Context) -> Option<IkeSa>) {
        let Some(slot) = self.sas.remove(&id) else { return };
        let Slot { sa, timer, spi, stream, half_open, peer, init, place, held, member } = *slot;
        let facts = Facts { timer, spi, stream, half_open, peer, init, place, held, member };
        match step(sa, &mut self.ctx) {
            Some(sa) => self.put(id, sa, facts),
            None => self.forget(id, facts),
        }
    }

    fn with_established(
        &mut self,
        id: IkeSaId,
        step: impl FnOnce(&mut Established, &mut Context) -> Result<(), Closed>,
    ) {
        self.with(id, |sa, ctx| match sa {
            IkeSa::Established(mut sa) => step(&mut sa, ctx).is_ok().then_some(IkeSa::Established(sa)),
            other => Some(other),
        });
    }

    fn with_child_spi(&mut self, spi: u32, step: impl FnOnce(&mut Established, &mut Context) -> Result<(), Closed>) {
        if let Some(id) = self.ctx.child_spis.get(&spi).copied() {
            self.with_established(id, step);
        }
    }

    fn insert(&mut self, id: IkeSaId, sa: IkeSa, init: Option<(u64, SocketAddr)>) {
        if let Some(key) = init {
            self.inits.insert(key, id);
        }
        let (spi, place, held) = (sa.local_spi(), Place::default(), Held::default());
        let (timer, stream, half_open, peer, member) = (None, None, None, None, None);
        self.ctx.shared.ike_sas.fetch_add(1, Ordering::Relaxed);
        let facts = Facts { timer, spi, stream, half_open, peer, init, place, held, member };
        self.put(id, sa, facts);
    }

    /// Brings the tables in line with an IKE SA and puts it back.
    fn put(&mut self, id: IkeSaId, mut sa: IkeSa, old: Facts) {
        if let IkeSa::Established(sa) = &mut sa {
            sa.rest();
        }
        let mut held = sa.held();
        if !self.ctx.shared.fragments.exchange(old.held, held) {
            sa.drop_fragments();
            held = sa.held();
            // Fewer than before may always be.
            self.ctx.shared.fragments.exchange(old.held, held);
        }
        let held = self.upkeep.changed(self.now, id, old.held, held);
        let timer = sa.next_timeout(&self.ctx);
        if timer != old.timer {
            if let Some(at) = old.timer {
                self.timers.remove(&(at, id));
            }
            if let Some(at) = timer {
                self.timers.insert((at, id));
            }
        }
        let stream = sa.stream();
        if stream.map(|(stream, _)| stream) != old.stream {
            if let Some((stream, originator)) = stream {
                let closes_at = self.ctx.shared.streams.join(stream, id, originator);
                self.stop_lingering(stream, closes_at);
            }
            self.leave_stream(id, old.stream);
        }
        let half_open = sa.half_open_from().map(|from| from.ip());
        if half_open != old.half_open {
            self.count_half_open(old.half_open, half_open);
            if let (Some(address), None) = (old.half_open, half_open) {
                self.ctx.shared.defence.lock().refund(address);
            }
        }
        let peer = sa.peer_key();
        let stays = match (&peer, &old.peer) {
            (Some(peer), Some(old)) => peer.is(old),
            (None, None) => true,
            _ => false,
        };
        if !stays {
            self.leave_peer(id, old.peer);
            if let Some(key) = &peer {
                self.ctx.shared.peers.enter(key, id);
            }
        }
        if let Some((key, entered)) = self.ctx.entered.take()
            && peer.is_none()
        {
            self.ctx.shared.peers.leave(key, entered);
        }
        self.ctx.reauthentications.note(id);
        let member = Some(sa.member());
        self.members.changed(id, old.member.as_ref(), member.as_ref());
        let place = sa.place();
        self.places.moved(id, old.place, place);
        let spi = sa.local_spi();
        let stream = stream.map(|(stream, _)| stream);
        let slot = Slot { sa, timer, spi, stream, half_open, peer, init: old.init, place, held, member };
        self.sas.insert(id, Box::new(slot));
    }

    fn forget(&mut self, id: IkeSaId, old: Facts) {
        if let Some(at) = old.timer {
            self.timers.remove(&(at, id));
        }
        self.places.moved(id, old.place, Place::default());
        self.upkeep.changed(self.now, id, old.held, Held::default());
        self.ctx.shared.fragments.exchange(old.held, Held::default());
        self.ctx.shared.ike_sas.fetch_sub(1, Ordering::Relaxed);
        self.leave_stream(id, old.stream);
        self.count_half_open(old.half_open, None);
        self.leave_peer(id, old.peer);
        if let Some((key, entered)) = self.ctx.entered.take() {
            self.ctx.shared.peers.leave(key, entered);
        }
        self.ctx.reauthentications.note(id);
        self.members.changed(id, old.member.as_ref(), None);
        if let Some(key) = old.init {
            self.inits.remove(&key);
        }
        // A restart may have reserved another SPI before it failed.
        self.ctx.release_ike_spi(old.spi);
    }

    fn leave_stream(&mut self, id: IkeSaId, stream: Option<StreamId>) {
        let Some(stream) = stream else { return };
        // The TCP Originator closes; if it does not, we do after a while (RFC 9329 §6.1).
        let until = retry::after(self.now, STREAM_LINGER);
        match self.ctx.shared.streams.leave(stream, id, until) {
            Left::Used => {}
            Left::Closes => self.ctx.outputs.push_back(Output::CloseStream(stream)),
            Left::Lingers => {
                self.lingering_until.insert((until, stream));
            }
        }
    }

    /// Where another shard would have closed it, that finds out when it is to.
    fn stop_lingering(&mut self, stream: StreamId, closes_at: Option<Instant>) {
        if let Some(until) = closes_at {
            self.lingering_until.remove(&(until, stream));
        }
    }

    fn leave_peer(&mut self, id: IkeSaId, peer: Option<PeerKey>) {
        if let Some(key) = peer {
            self.ctx.shared.peers.leave(key, id);
        }
    }

    fn count_half_open(&mut self, old: Option<IpAddr>, new: Option<IpAddr>) {
        if (old, new) == (None, None) {
            return;
        }
        let mut defence = self.ctx.shared.defence.lock();
        if let Some(address) = old {
            defence.half_open.remove(address);
        }
        if let Some(address) = new {
            defence.half_open.add(address);
        }
    }

    fn stream_users(&self, stream: StreamId) -> Vec<IkeSaId> {
        self.ctx.shared.streams.users(stream, |id| self.sas.contains_key(&id))
    }

    /// Takes in successors, ends what they replace, and begins what takes the place of other IKE SAs.
    fn settle(&mut self, now: Instant) {
        loop {
            let spawned = std::mem::take(&mut self.ctx.spawned);
            let superseded = std::mem::take(&mut self.ctx.superseded);
            let outlived = std::mem::take(&mut self.ctx.outlived);
            let reinitiate = std::mem::take(&mut self.ctx.reinitiate);
            let redirected = std::mem::take(&mut self.ctx.redirected);
            let again = std::mem::take(&mut self.ctx.again);
            let replacements = std::mem::take(&mut self.ctx.replacements);
            let unreviewed = std::mem::take(&mut self.ctx.unreviewed);
            let nothing_new = spawned.is_empty()
                && superseded.is_empty()
                && outlived.is_empty()
                && reinitiate.is_empty()
                && unreviewed.is_empty();
            let no_attempts = redirected.is_empty() && again.is_empty() && replacements.is_empty();
            if nothing_new && no_attempts && !self.finish_reauthentications(now) {
                return;
            }
            for again in again {
                let from = again.from_start.from;
                if let Some((id, sa)) = resuming::again(&mut self.ctx, now, again) {
                    self.ctx.reauthentications.goes_on_as(from, id);
                    self.insert(id, sa, None);
                }
            }
            for redirected in redirected {
                let from = redirected.from;
                if let Some(sa) = Initiating::elsewhere(&mut self.ctx, now, redirected) {
                    self.ctx.reauthentications.goes_on_as(from, sa.id());
                    self.insert(sa.id(), IkeSa::Initiating(sa), None);
                }
            }
            for mut sa in spawned {
                let (id, key) = (sa.core.id, sa.key.clone());
                // Tasks that it inherited may start now: its end, too.
                if sa.start_inherited(&mut self.ctx, now).is_ok() {
                    self.ctx.entered = Some((key, id));
                    self.insert(id, IkeSa::Established(Box::new(sa)), None);
                } else {
                    self.ctx.shared.peers.leave(key, id);
                    self.ctx.release_ike_spi(sa.channel.local_spi());
                }
            }
            for id in unreviewed {
                self.with_established(id, |sa, ctx| sa.review(ctx, now));
            }
            for id in outlived {
                self.note(now, Note::Outlived(id));
            }
            for id in superseded {
                self.note(now, Note::Superseded(id));
            }
            for request in reinitiate {
                if let Some(request) = self.as_configured_now(request) {
                    self.begin_again(now, request);
                }
            }
            for replacement in replacements {
                self.replace(now, replacement);
            }
        }
    }
}

/// A [`Slot`] without its IKE SA.
struct Facts {
    timer: Option<Instant>,
    spi: u64,
    stream: Option<StreamId>,
    half_open: Option<IpAddr>,
    peer: Option<PeerKey>,
    init: Option<(u64, SocketAddr)>,
    place: Place,
    held: Held,
    member: Option<Member>,
}

/// State of an IKE SA, in charon's words (CREATED, CONNECTING, …).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "charon's names")]
pub enum IkeState {
    Created,
    Connecting,
    Established,
    Rekeying,
    Rekeyed,
    Deleting,
}

/// State of a Child SA, in charon's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "charon's names")]
pub enum ChildState {
    Created,
    Installing,
    Installed,
    Rekeying,
    Rekeyed,
    Deleting,
    Deleted,
}

/// A snapshot of an IKE SA.
#[derive(Clone, Debug)]
pub struct IkeSaStatus {
    /// Number.
    pub id: IkeSaId,
    /// Connection.
    pub connection: String,
    /// State.
    pub state: IkeState,
    /// Path.
    pub path: Path,
    /// Our identity, once known.
    pub local_id: Option<Identity>,
    /// The peer's identity: asserted until `peer` is there.
    pub remote_id: Option<Identity>,
    /// The peer's proved identity.
    pub peer: Option<Arc<PeerIdentity>>,
    /// We are the original initiator.
    pub initiator: bool,
    /// Initiator's SPI.
    pub initiator_spi: u64,
    /// Responder's SPI.
    pub responder_spi: u64,
    /// We are behind a NAT.
    pub nat_local: bool,
    /// The peer is behind a NAT.
    pub nat_remote: bool,
    /// NAT pretended by `encap`.
    pub nat_fake: bool,
    /// Algorithms, once chosen.
    pub suite: Option<IkeSuite>,
    /// Time since it was established.
    pub established: Option<Duration>,
    /// Time to rekey, if any.
    pub rekey_in: Option<Duration>,
    /// Time to reauthentication, if any.
    pub reauth_in: Option<Duration>,
    /// What Configuration payloads gave.
    pub assigned: Option<Arc<Assigned>>,
    /// It was resumed with a ticket: the peer proved itself with credentials in an IKE SA before (RFC 5723).
    pub resumed: bool,
    /// charon's names of tasks: queued, active (ours), passive (the peer's).
    pub tasks_active: Vec<&'static str>,
    /// Child SAs.
    pub children: Vec<ChildSaStatus>,
}

/// A snapshot of a Child SA.
#[derive(Clone, Debug)]
pub struct ChildSaStatus {
    /// Number.
    pub id: ChildSaId,
    /// Configuration's name.
    pub name: String,
    /// `reqid`.
    pub reqid: u32,
    /// Marks and interfaces.
    pub tags: Tags,
    /// State.
    pub state: ChildState,
    /// Mode.
    pub mode: Mode,
    /// SPI that the peer writes to us.
    pub spi_in: u32,
    /// SPI that we write to the peer.
    pub spi_out: u32,
    /// Encapsulation.
    pub encapsulation: Option<Encapsulation>,
    /// Algorithms.
    pub suite: Option<EspSuite>,
    /// Key exchange of its own, `Ke::NONE` without.
    pub ke: Ke,
    /// Additional key exchanges of its own.
    pub additional: AdditionalKe,
    /// Time since installation.
    pub installed: Option<Duration>,
    /// Time to rekey, if any.
    pub rekey_in: Option<Duration>,
    /// Time to the end of its life, if any.
    pub expires_in: Option<Duration>,
    /// Our selectors.
    pub local_ts: Vec<TrafficSelector>,
    /// The peer's selectors.
    pub remote_ts: Vec<TrafficSelector>,
}

#[cfg(test)]
mod tests;
