//! The daemon's side of the latch protocol: a Unix SOCK_SEQPACKET socket.
//!
//! # Who holds a latch
//!
//! The connection to this server does. The server keeps a duplicate of the latched socket for as long as the latch
//! lives, and a latch is released only after its TCP connection has come to an end, so no byte of it passes unlatched:
//!
//! * when the latch breaks, the alert is queued and then, unless another disposition was asked for, the TCP connection is
//!   reset through the duplicate (RFC 5660 §5.5, disposition b), all before [`Database::before_install`] returns. The reset
//!   itself is dropped by the packet check like every packet of a BROKEN latch. A UDP socket is shut down instead: were
//!   it disconnected, it would take datagrams from anybody;
//! * when the holder releases the latch, or its connection ends while the process lives on, the TCP connection is shut
//!   down in both directions. What the application wrote before still goes out, under the latch; after [`LINGER`] at
//!   the latest the rest is thrown away with a reset. Then the latch is released;
//! * when the connection has ended, and the holder keeps the socket, the latch is CLOSED, the holder told, and the latch
//!   released ([`SWEEP`]);
//! * a listener that is released is shut down, which resets what nobody has accepted. Latches that it made and nobody
//!   took go when the system has no connection for them any more ([`SWEEP`]);
//! * latches that a listener of UDP made are the listener's: they go with it, or when its holder has acknowledged their end
//!   (`database/datagrams.rs`);
//! * when the server is dropped, latches stay in the database and nobody can release them: fail closed. Those of what goes in
//!   clear are CLOSED;
//! * when the process ends, another one disconnects what it has held ([`crate::survivor`]).
//!
//! # Limits of the device binding
//!
//! A latched socket is bound to the tunnel's device (SO_BINDTODEVICE) before the latch is made, so that it cannot
//! leave in clear, not even after the daemon's death, which takes the device along. A process with CAP_NET_RAW can undo
//! the binding of its own socket. A refused `create` leaves the binding in place. A socket of another network
//! namespace is not recognised: its owner would deceive himself only.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fmt;
use std::fs;
use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::pin::{Pin, pin};
use std::sync::{Arc, Weak};
use std::time::Duration;

use ipsec::selector::Flow;
use pad::IdentityPattern;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SocketAddrUnix};
use serde::Serialize;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::UnixListener;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, broadcast, mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, MissedTickBehavior, interval, interval_at, sleep, timeout};

use crate::access::{Access, Credentials, Right};
use crate::connections::{self, Progress};
use crate::database::{
    Alert, AutomaticFlows, Class, Database, ENDED, LatchError, LatchId, LatchState, Listed, Listener, OnBreak, Request,
    Subject,
};
use crate::protocol::{
    Accept, Bind, Bypassed, Bypassing, Call, ChannelBinding, Code, Created, Creating, ENDPOINT_BINDING, Guard, Hello,
    Initiate, Inquire, Inquired, Larval, LatchEvent, LatchInfo, List, ListedLatch, Listening, Listing, Named, PROGRESS,
    Peer, Protection, REVISION, Refusal, Release, SETTLING, SaInfo, ServerMessage, State, UNIQUE_BINDING, VERSION,
    Wanted, Welcome, encode,
};
use crate::seqpacket::{self, Datagram, SeqPacket};
use crate::survivor::{Survivor, Watched};

/// How to serve.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Path of the socket; made with mode 0660, its directory exists.
    pub path: PathBuf,
    /// Device that latched sockets are bound to, so that they cannot use another way (SO_BINDTODEVICE).
    pub device: Option<String>,
    /// Makes SAs for latches (RFC 5660 §2.3).
    pub initiator: Option<Initiator>,
    /// Tells what protects a flow at a moment (RFC 5660 §2).
    pub surveyor: Option<Surveyor>,
    /// Sends a packet of ours into the tunnel that had to wait for its latch.
    pub forwarder: Option<Forwarder>,
    /// Disconnects what is latched when this process is gone.
    pub survivor: Option<Arc<Survivor>>,
    /// Tells whether data has ever come in on a TCP socket.
    pub has_received: fn(BorrowedFd<'_>) -> io::Result<bool>,
    /// Why no latch can be had, if so: nobody would enforce it.
    pub unenforced: Option<String>,
    /// Who may ask for what; a change holds for the next request.
    pub access: watch::Receiver<Access>,
    /// Tells who has connected.
    pub identifier: Identifier,
}

type Identifying = dyn Fn(BorrowedFd<'_>) -> Credentials + Send + Sync;

/// Tells who has connected to this server, by the socket of the connection.
#[derive(Clone)]
pub struct Identifier(Arc<Identifying>);

impl Identifier {
    /// Calls this.
    pub fn new(identify: impl Fn(BorrowedFd<'_>) -> Credentials + Send + Sync + 'static) -> Self {
        Self(Arc::new(identify))
    }

    /// Asks the system: SO_PEERCRED, and `groups_of` for the supplementary groups. Privileged are root and the user that this
    /// process runs as.
    pub fn of_system(groups_of: fn(BorrowedFd<'_>) -> io::Result<Vec<u32>>) -> Self {
        Self::new(move |socket| {
            let peer = match rustix::net::sockopt::socket_peercred(socket) {
                Ok(peer) => peer,
                Err(error) => {
                    tracing::debug!(%error, "a client of unknown credentials connected to the latch socket");
                    return Credentials::default();
                }
            };
            let groups = groups_of(socket).unwrap_or_else(|error| {
                tracing::debug!(%error, "the supplementary groups of a client of the latch socket are not known");
                Vec::new()
            });
            let (pid, uid, gid) = (peer.pid.as_raw_nonzero().get(), peer.uid.as_raw(), peer.gid.as_raw());
            tracing::debug!(pid, uid, gid, "a client connected to the latch socket");
            Credentials {
                user: Some(uid),
                groups: groups.into_iter().chain([gid]).collect(),
                privileged: peer.uid.is_root() || peer.uid == rustix::process::geteuid(),
            }
        })
    }
}

impl fmt::Debug for Identifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identifier").finish_non_exhaustive()
    }
}

type Initiating = Pin<Box<dyn Future<Output = Result<(), String>> + Send>>;

/// Makes an SA for a flow, narrow or not; ends when it is up, or with the reason why not.
#[derive(Clone)]
pub struct Initiator(Arc<dyn Fn(Flow, bool) -> Initiating + Send + Sync>);

impl Initiator {
    /// Calls this.
    pub fn new(initiate: impl Fn(Flow, bool) -> Initiating + Send + Sync + 'static) -> Self {
        Self(Arc::new(initiate))
    }
}

impl fmt::Debug for Initiator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Initiator").finish_non_exhaustive()
    }
}

type Surveying = Pin<Box<dyn Future<Output = Vec<SaInfo>> + Send>>;

/// Tells which SAs, of those with these numbers in the database, protect a flow.
#[derive(Clone)]
pub struct Surveyor(Arc<dyn Fn(Flow, Vec<u64>) -> Surveying + Send + Sync>);

impl Surveyor {
    /// Calls this.
    pub fn new(survey: impl Fn(Flow, Vec<u64>) -> Surveying + Send + Sync + 'static) -> Self {
        Self(Arc::new(survey))
    }
}

impl fmt::Debug for Surveyor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Surveyor").finish_non_exhaustive()
    }
}

/// Sends an IP packet into the tunnel, where it is checked as any other.
#[derive(Clone)]
pub struct Forwarder(Arc<Forwarding>);

type Forwarding = dyn Fn(&[u8]) + Send + Sync;

impl Forwarder {
    /// Calls this, which may block for a moment.
    pub fn new(forward: impl Fn(&[u8]) + Send + Sync + 'static) -> Self {
        Self(Arc::new(forward))
    }
}

impl fmt::Debug for Forwarder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Forwarder").finish_non_exhaustive()
    }
}

/// SAs that one answer tells of: it must fit into a message.
const MAX_SURVEYED: usize = 8;

/// How long an SA may take to come up for a latch.
const INITIATION: Duration = Duration::from_secs(60);

/// How long a released TCP connection may take to deliver what was written before and to close.
pub const LINGER: Duration = Duration::from_secs(60);

/// How often latches are compared with the system's connections.
pub const SWEEP: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 5 });

/// Serves until the returned guard is dropped, which removes the socket.
///
/// A socket file that nobody listens on is replaced; AddrInUse if somebody does, or if the path is something else.
pub async fn serve(config: ServerConfig, database: Arc<Database>) -> io::Result<Server> {
    serve_within(config, database, LIMITS).await
}

/// The running server.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    database: Arc<Database>,
    tasks: [JoinHandle<()>; 2],
}

impl Drop for Server {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
        self.database.close_bypasses();
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::debug!(path = %self.path.display(), %error, "removing the latch socket");
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Limits {
    connections: usize,
    latches_per_connection: usize,
    latches: usize,
}

/// Each latch and each connection costs the daemon a descriptor.
const LIMITS: Limits = Limits { connections: 4096, latches_per_connection: 1024, latches: 16_384 };

/// A client that does not read for so long is gone.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);

/// Lines in one answer to `list`; each has less than 500 octets.
const LIST_LENGTH: usize = 100;

/// First octet of the data of [`UNIQUE_BINDING`].
const UNIQUE_VERSION: u8 = 1;

/// First octets of the data of [`ENDPOINT_BINDING`]: its version, and SHA2-256 by its number as a hash algorithm of IKEv2.
const ENDPOINT_VERSION: [u8; 2] = [1, 2];

const TCP: u8 = 6;
const UDP: u8 = 17;

/// Datagrams that may wait in a UDP socket's queue, which the system bounds by their octets.
const MAX_QUEUED: usize = 100_000;

/// Events that a slow watcher may fall behind.
const EVENT_QUEUE: usize = 1024;

struct Shared {
    config: ServerConfig,
    database: Arc<Database>,
    limits: Limits,
    latches: Arc<Semaphore>,
    /// With the user whose latch it is.
    events: broadcast::Sender<(Option<u32>, LatchEvent)>,
}

async fn serve_within(config: ServerConfig, database: Arc<Database>, limits: Limits) -> io::Result<Server> {
    let listener = listen(&config.path)?;
    let latches = Arc::new(Semaphore::new(limits.latches));
    let (events, _) = broadcast::channel(EVENT_QUEUE);
    let observed = events.clone();
    database.observe_with(Box::new(move |alert| {
        // Nobody watches, mostly.
        let _ = observed.send((alert.owner, event(alert)));
    }));
    let path = config.path.clone();
    let shared = Arc::new(Shared { config, database, limits, latches, events });
    let database = Arc::clone(&shared.database);
    let sweep = tokio::spawn(sweep(Arc::clone(&database)));
    let tasks = [tokio::spawn(accept(listener, shared)), sweep];
    Ok(Server { path, database, tasks })
}

fn event(alert: &Alert) -> LatchEvent {
    LatchEvent {
        latch: alert.latch.0,
        state: alert.state.into(),
        flow: alert.flow.to_string(),
        reason: alert.reason.clone(),
        missed: 0,
    }
}

/// Compares latches with the system's connections: releases what listeners latched and nobody took, ends what holders keep
/// after their connection, and lifts the system's barriers that no latch needs any more, once there is no connection. Twice in
/// a row, since the system has a connection only after the packet passed that made the latch.
async fn sweep(database: Arc<Database>) {
    let (mut suspects, mut opened) = (HashSet::new(), HashSet::new());
    let mut passed = AutomaticFlows::default();
    let mut turns = interval(SWEEP);
    loop {
        turns.tick().await;
        database.tend_datagrams(SWEEP);
        database.tend_automatic(SWEEP);
        let now = database.automatic_flows().unwrap_or_default();
        let (without_room, in_conflict) =
            (now.without_room - passed.without_room, now.in_conflict - passed.in_conflict);
        if without_room > 0 || in_conflict > 0 {
            tracing::warn!(
                without_room,
                in_conflict,
                "packets of flows without an automatic latch: there are too many, or SAs of several peers for them"
            );
        }
        passed = now;
        let (abandoned, ports) = (database.abandoned(), database.abandoned_ports());
        let of_system = Arc::clone(&database);
        // What has come by way of the system is looked for before what has gone.
        if let Err(error) = tokio::task::spawn_blocking(move || of_system.find_connections()).await {
            tracing::error!(%error, "looking for connections of listener latches");
        }
        let listed = database.list().into_iter().map(|(latch, flow, ..)| (latch, flow));
        let latches: Vec<(LatchId, Flow)> = listed.chain(database.bypasses()).collect();
        if latches.is_empty() && abandoned.is_empty() && ports.is_empty() {
            suspects.clear();
            opened.clear();
            continue;
        }
        let of_barrier = Arc::clone(&database);
        let looked = tokio::task::spawn_blocking(move || {
            of_barrier.verify_barrier();
            connections::all()
        });
        let connections = match looked.await {
            Ok(Ok(connections)) => connections,
            Ok(Err(error)) => {
                tracing::warn!(%error, "the system's connections cannot be read: latches without one stay");
                continue;
            }
            Err(_) => continue,
        };
        let unaccepted = database.unaccepted();
        let waiting: HashSet<LatchId> = unaccepted.iter().map(|(latch, _)| *latch).collect();
        let held: Vec<(LatchId, Flow)> = latches.into_iter().filter(|(latch, _)| !waiting.contains(latch)).collect();
        let is_open = |flow: &Flow| connections.get(flow) == Some(&Progress::Open);
        // One that has no connection yet is about to have one.
        let before: HashSet<LatchId> = std::mem::take(&mut opened);
        opened.extend(
            held.iter().filter(|(latch, flow)| before.contains(latch) || is_open(flow)).map(|(latch, _)| *latch),
        );
        let of_latches = unaccepted.iter().chain(held.iter().filter(|(latch, _)| opened.contains(latch)));
        let flows = of_latches.map(|(_, flow)| flow).chain(&abandoned);
        let ended: HashSet<Flow> = flows.copied().filter(|flow| !connections.contains_key(flow)).collect();
        let is_over = |flow: &Flow| ended.contains(flow) && suspects.contains(flow);
        // Of UDP the system knows nothing but the socket that all share.
        for (latch, _) in unaccepted.iter().filter(|(_, flow)| flow.protocol == TCP && is_over(flow)) {
            database.release(*latch);
        }
        let over: Vec<LatchId> = held.iter().filter(|(_, flow)| is_over(flow)).map(|(latch, _)| *latch).collect();
        database.ended(&over);
        database.lift_abandoned(is_over);
        database.lift_abandoned_ports(|port| connections.keys().any(|flow| port.meets(flow)));
        suspects = ended;
    }
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    let address = SocketAddrUnix::new(path)?;
    if let Ok(metadata) = fs::symlink_metadata(path) {
        let connected = rustix::net::connect(seqpacket::socket()?, &address);
        if !metadata.file_type().is_socket() || connected != Err(rustix::io::Errno::CONNREFUSED) {
            let message = format!("{} is in use", path.display());
            return Err(io::Error::new(io::ErrorKind::AddrInUse, message));
        }
        fs::remove_file(path)?;
    }
    let listener = seqpacket::socket()?;
    rustix::net::bind(&listener, &address)?;
    // Until `listen` nobody can connect, so the mode is right before the first client.
    fs::set_permissions(path, fs::Permissions::from_mode(0o660))?;
    rustix::net::listen(&listener, 64)?;
    UnixListener::from_std(listener.into())
}

async fn accept(listener: UnixListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        match accepted.map(|(socket, _)| SeqPacket::from(socket)) {
            Ok(socket) if connections.len() >= shared.limits.connections => {
                let refusal = Refusal::new(Code::Limit, "there are too many connections");
                if let Ok(octets) = encode(&ServerMessage::Refusal { id: None, refusal }) {
                    // Best effort: the end of the connection says it too.
                    let _ = socket.try_send(&octets);
                }
            }
            Ok(socket) => {
                connections.spawn(serve_connection(socket, Arc::clone(&shared)));
            }
            Err(error) => {
                tracing::warn!(%error, "accepting a client of the latch socket");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn serve_connection(socket: SeqPacket, shared: Arc<Shared>) {
    let Identifier(identify) = &shared.config.identifier;
    let who = identify(socket.as_fd());
    let (sender, alerts) = mpsc::unbounded_channel();
    let mut connection = Connection {
        shared,
        alerts: sender,
        latches: HashMap::new(),
        larval: JoinSet::new(),
        requests: HashMap::new(),
        asked: JoinSet::new(),
        working: BTreeSet::new(),
        welcomed: false,
        who,
        watched: None,
        missed: 0,
    };
    if let Err(error) = connection.run(&socket, alerts).await {
        tracing::debug!(%error, "a client of the latch socket is gone");
    }
    drop(socket);
    for (latch, held) in std::mem::take(&mut connection.latches) {
        connection.wind_down(latch, held);
    }
}

struct Connection {
    shared: Arc<Shared>,
    /// Never holds more than one alert for each latch of this connection.
    alerts: mpsc::UnboundedSender<Alert>,
    latches: HashMap<LatchId, Held>,
    /// What makes SAs for LARVAL latches.
    larval: JoinSet<(LatchId, Result<(), Refusal>)>,
    /// What is asked of them.
    requests: HashMap<LatchId, Request>,
    /// What makes SAs for children of UDP listeners.
    asked: JoinSet<Asked>,
    /// Requests among these whose client wants to hear that there is progress.
    working: BTreeSet<u64>,
    welcomed: bool,
    /// Whose connection this is.
    who: Credentials,
    /// After `watch`.
    watched: Option<broadcast::Receiver<(Option<u32>, LatchEvent)>>,
    /// Events that were lost, and which no event has told of.
    missed: u64,
}

/// A child of a UDP listener for which an SA was made, or none came up.
struct Asked {
    id: u64,
    listener: LatchId,
    flow: Flow,
    request: Request,
    made: Result<(), Refusal>,
}

/// What stands for a latch here.
struct Held {
    socket: Arc<Socket>,
    permit: OwnedSemaphorePermit,
    protocol: u8,
    watched: Option<Watched>,
}

impl Connection {
    async fn run(&mut self, socket: &SeqPacket, mut alerts: mpsc::UnboundedReceiver<Alert>) -> io::Result<()> {
        let mut turns = interval(PROGRESS);
        turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let mut failed = None;
            let octets = tokio::select! {
                biased;
                Some(Ok((latch, outcome))) = self.larval.join_next() => match self.settle(latch, outcome) {
                    Some(message) => {
                        let over = matches!(message, ServerMessage::Alert { state: State::Closed, .. });
                        failed = over.then_some(latch);
                        encode(&message)
                    }
                    None => continue,
                },
                Some(Ok(asked)) = self.asked.join_next() => self.answer_asked(asked),
                Some(alert) = alerts.recv() => {
                    if is_over(&alert) {
                        self.let_go(alert.latch);
                    }
                    encode(&told(alert))
                }
                _ = turns.tick(), if !self.working.is_empty() => {
                    for id in &self.working {
                        send(socket, &encode(&ServerMessage::Working { id: *id }).map_err(io::Error::other)?).await?;
                    }
                    continue;
                }
                (owner, event) = next_event(&mut self.watched) => {
                    self.missed += event.missed;
                    if !self.may_see(owner) {
                        continue;
                    }
                    encode(&ServerMessage::Event(LatchEvent { missed: std::mem::take(&mut self.missed), ..event }))
                }
                received = socket.receive() => match received? {
                    Some(datagram) => self.answer_in_time(datagram, socket, &mut alerts).await?,
                    None => return Ok(()),
                },
            };
            let octets = octets.map_err(io::Error::other)?;
            // Nothing is an answer that comes later.
            if !octets.is_empty() {
                send(socket, &octets).await?;
            }
            // After the reason: whoever sees the socket's error can ask for it.
            if let Some(latch) = failed {
                self.let_go(latch);
            }
        }
    }

    /// What is to be told meanwhile is told: an answer may take as long as an SA.
    async fn answer_in_time(
        &mut self,
        datagram: Datagram,
        socket: &SeqPacket,
        alerts: &mut mpsc::UnboundedReceiver<Alert>,
    ) -> io::Result<Result<Vec<u8>, Refusal>> {
        let call = decode(&datagram);
        let working = match &call {
            Ok((id, Call::Create(Wanted { progress: true, .. }))) => Some(*id),
            _ => None,
        };
        let mut ended = Vec::new();
        let answer = {
            let mut answering = pin!(self.answer(call, datagram.descriptors));
            let mut turns = interval_at(Instant::now() + PROGRESS, PROGRESS);
            loop {
                let octets = tokio::select! {
                    biased;
                    answer = &mut answering => break answer,
                    Some(alert) = alerts.recv() => {
                        ended.extend(is_over(&alert).then_some(alert.latch));
                        encode(&told(alert))
                    }
                    _ = turns.tick() => match working {
                        Some(id) => encode(&ServerMessage::Working { id }),
                        None => continue,
                    },
                };
                send(socket, &octets.map_err(io::Error::other)?).await?;
            }
        };
        ended.into_iter().for_each(|latch| self.let_go(latch));
        Ok(answer)
    }

    async fn answer(
        &mut self,
        call: Result<(u64, Call), (Option<u64>, Refusal)>,
        descriptors: Vec<OwnedFd>,
    ) -> Result<Vec<u8>, Refusal> {
        let (id, outcome) = match call {
            Ok((id, call)) => (Some(id), self.reply(id, call, descriptors).await),
            Err((id, refusal)) => (id, Err(refusal)),
        };
        outcome.or_else(|refusal| {
            tracing::debug!(code = %refusal.code, message = refusal.message, "refused a client of the latch socket");
            encode(&ServerMessage::Refusal { id, refusal })
        })
    }

    async fn reply(&mut self, id: u64, call: Call, descriptors: Vec<OwnedFd>) -> Result<Vec<u8>, Refusal> {
        if self.welcomed == matches!(call, Call::Hello(_)) {
            let message = if self.welcomed { "hello has been said" } else { "say hello first" };
            return Err(Refusal::new(Code::Hello, message));
        }
        let mut descriptors = descriptors.into_iter();
        let (descriptor, more) = (descriptors.next(), descriptors.next());
        let takes_one =
            matches!(call, Call::Create(_) | Call::Listen(_) | Call::Accept(_) | Call::Bypass(_) | Call::Inquire(_));
        if more.is_some() || (descriptor.is_some() && !takes_one) {
            let message = format!("{} takes {} descriptor", call.name(), if takes_one { "one" } else { "no" });
            return Err(Refusal::new(Code::Descriptor, message));
        }
        match call {
            Call::Hello(hello) => reply(id, &self.hello(&hello)?),
            Call::Create(wanted) if wanted.listener.is_some() => self.create_child(id, &wanted, descriptor),
            Call::Create(wanted) => {
                let creating = self.create(&wanted, descriptor).await?;
                let latch = match &creating {
                    Creating::Established(created) => LatchId(created.latch),
                    Creating::Larval(larval) => LatchId(larval.latch),
                };
                reply(id, &creating).inspect_err(|_| self.let_go(latch))
            }
            Call::Listen(wanted) => reply(id, &self.listen(&wanted, descriptor).await?),
            Call::Accept(Accept { listener, remote: Some(remote) }) => {
                reply(id, &self.child(LatchId(listener), canonical(remote), descriptor)?)
            }
            Call::Accept(accept) => {
                let accepted = self.accept(&accept, descriptor)?;
                let latch = LatchId(accepted.latch);
                reply(id, &accepted).inspect_err(|_| self.let_go(latch))
            }
            Call::Bypass(bypassing) => reply(id, &self.bypass(&bypassing, descriptor)?),
            Call::Inquire(inquire) => reply(id, &self.inquire(&inquire, descriptor).await?),
            Call::Release(Release { latch }) => {
                let latch = LatchId(latch);
                if self.latches.contains_key(&latch) {
                    self.let_go(latch);
                } else if self.is_child_of_ours(latch) {
                    acknowledge(&self.shared.database, latch);
                } else {
                    return Err(no_such_latch(latch));
                }
                reply(id, &serde_json::Map::new())
            }
            Call::List(list) => reply(id, &self.list(&list)),
            Call::Show(Named { latch }) => reply(id, &self.show(LatchId(latch)).await?),
            Call::Break(Named { latch }) => {
                self.administer(LatchId(latch), Database::break_latch, "broken by the administrator")?;
                reply(id, &serde_json::Map::new())
            }
            Call::Close(Named { latch }) => {
                self.administer(LatchId(latch), Database::close, "closed by the administrator")?;
                reply(id, &serde_json::Map::new())
            }
            Call::ChannelBinding(bind) => reply(id, &self.channel_binding(&bind)?),
            Call::Watch(_) => {
                self.watched.get_or_insert_with(|| self.shared.events.subscribe());
                reply(id, &serde_json::Map::new())
            }
        }
    }

    fn hello(&mut self, hello: &Hello) -> Result<Welcome, Refusal> {
        if hello.version != VERSION {
            let message = format!("version {} is not spoken here, only {VERSION}", hello.version);
            return Err(Refusal::new(Code::Version, message));
        }
        self.welcomed = true;
        Ok(Welcome { version: VERSION, revision: REVISION, server: format!("latchkey {}", env!("CARGO_PKG_VERSION")) })
    }

    /// Whether this connection has a right at this moment; the refusal says what would give it.
    fn may(&self, right: Right) -> Result<(), Refusal> {
        if self.shared.config.access.borrow().allows(&self.who, right) {
            return Ok(());
        }
        let message =
            format!("this is for root, the daemon's user, and whom latch_access.{right} in strongswan.conf names");
        Err(Refusal::new(Code::Permission, message))
    }

    /// Whether this connection may know of a latch of this user.
    fn may_see(&self, owner: Option<u32>) -> bool {
        owner.is_some() && owner == self.who.user || self.may(Right::See).is_ok()
    }

    async fn create(&mut self, wanted: &Wanted, descriptor: Option<OwnedFd>) -> Result<Creating, Refusal> {
        self.may(Right::Latch)?;
        self.enforced()?;
        if wanted.quiet {
            return Err(Refusal::new(Code::Malformed, "only a listener is quiet"));
        }
        let (socket, protocol, local, remote) = connection_socket(needed(descriptor)?)?;
        let request = self.request(wanted, if protocol == UDP { OnBreak::Wait } else { OnBreak::Reset })?;
        let remote = other_end(remote, wanted.remote)?;
        let permit = self.permit()?;
        let must_be_new = protocol == TCP && !wanted.late;
        if must_be_new {
            // Once more under the latch; here a refusal leaves the connection as it is.
            self.has_received_nothing(&socket)?;
        }
        self.bind(&socket)?;
        let socket = Arc::new(socket);
        let holder = self.holder(&socket, protocol, request.on_break);
        let flow = flow(protocol, local, remote);
        let narrow = wanted.initiate == Initiate::Narrow;
        if narrow || self.lacks_sa(&flow, wanted.initiate) {
            self.may(Right::Initiate)?;
            let initiating = self.initiate(flow, narrow);
            if wanted.larval {
                let latch = self.shared.database.reserve(flow)?;
                self.begin(latch, &socket, flow, must_be_new)?;
                tracing::debug!(latch = latch.0, %local, %remote, "latch LARVAL");
                self.hold(latch, socket, permit, protocol);
                self.requests.insert(latch, request);
                self.larval.spawn(async move { (latch, initiating.await) });
                return Ok(Creating::Larval(Larval { latch: latch.0, local, remote }));
            }
            initiating.await?;
        }
        let (latch, class) = self.shared.database.create(flow, &request, holder)?;
        self.begin(latch, &socket, flow, must_be_new)?;
        tracing::debug!(latch = latch.0, %local, %remote, "latch ESTABLISHED");
        self.hold(latch, socket, permit, protocol);
        Ok(Creating::Established(Box::new(self.created(latch, &flow, &class))))
    }

    /// After the latch has shut the flow, and before its holder hears of it: what the holder reads from then on came under
    /// the latch (RFC 5660 §2: inbound packets before that are dropped, or the latch fails).
    fn begin(&self, latch: LatchId, socket: &Socket, flow: Flow, must_be_new: bool) -> Result<(), Refusal> {
        let begun = match flow.protocol {
            UDP => connect_and_empty(socket, &flow)
                .map_err(|error| Refusal::new(Code::System, format!("connecting the socket: {error}"))),
            _ if must_be_new => self.has_received_nothing(socket),
            _ => Ok(()),
        };
        begun.inspect_err(|_| self.shared.database.release(latch))
    }

    fn has_received_nothing(&self, socket: &Socket) -> Result<(), Refusal> {
        match (self.shared.config.has_received)(socket.as_fd()) {
            Ok(false) => Ok(()),
            Ok(true) => Err(refused_socket("connected, and data has come in under no latch: late says that it may")),
            Err(error) => Err(refused_socket(&format!(
                "connected, and whether data has come in is not known ({error}): late says that it may"
            ))),
        }
    }

    /// A LARVAL latch has its SA, or will get none; what to tell its holder, who may have let it go meanwhile.
    fn settle(&mut self, latch: LatchId, made: Result<(), Refusal>) -> Option<ServerMessage> {
        let (request, held) = (self.requests.remove(&latch)?, self.latches.get(&latch)?);
        let holder = self.holder(&held.socket, held.protocol, request.on_break);
        let settled = made.and_then(|()| Ok(self.shared.database.establish(latch, &request, holder)?));
        let (state, reason, code) = match settled {
            Ok((class, packet)) => {
                if let (Some(packet), Some(Forwarder(forward))) = (packet, self.shared.config.forwarder.clone()) {
                    tokio::task::spawn_blocking(move || forward(&packet));
                }
                (State::Established, format!("the peer is {}", class.peer.id), None)
            }
            Err(Refusal { code, message }) => (State::Closed, message, Some(code)),
        };
        tracing::debug!(latch = latch.0, reason, "LARVAL latch {state}");
        Some(ServerMessage::Alert { latch: latch.0, state, reason, listener: None, code })
    }

    fn hold(&mut self, latch: LatchId, socket: Arc<Socket>, permit: OwnedSemaphorePermit, protocol: u8) {
        let watched = self.shared.config.survivor.as_ref().and_then(|survivor| survivor.watch(latch, socket.as_fd()));
        self.latches.insert(latch, Held { socket, permit, protocol, watched });
    }

    fn lacks_sa(&self, flow: &Flow, initiate: Initiate) -> bool {
        initiate != Initiate::No && self.shared.database.is_uncovered(flow)
    }

    fn initiate(&self, flow: Flow, narrow: bool) -> impl Future<Output = Result<(), Refusal>> + Send + use<> {
        let initiating = self.shared.config.initiator.as_ref().map(|Initiator(initiate)| initiate(flow, narrow));
        async move {
            let Some(initiating) = initiating else { return Ok(()) };
            let failed =
                |reason| Refusal::new(Code::NoSa, format!("no SA protects {flow}, and none came up: {reason}"));
            match timeout(INITIATION, initiating).await {
                Ok(outcome) => outcome.map_err(failed),
                Err(_) => Err(failed("it took too long".to_owned())),
            }
        }
    }

    async fn listen(&mut self, wanted: &Wanted, descriptor: Option<OwnedFd>) -> Result<Listening, Refusal> {
        self.may(Right::Listen)?;
        self.enforced()?;
        if wanted.remote.is_some() || wanted.larval || wanted.late || wanted.progress || wanted.listener.is_some() {
            return Err(Refusal::new(Code::Malformed, "a listener has no remote, waits for nothing and is never late"));
        }
        let (socket, protocol, local) = listening_socket(needed(descriptor)?)?;
        let request = self.request(wanted, OnBreak::Reset)?;
        let permit = self.permit()?;
        self.bind(&socket)?;
        let both = local.is_ipv6() && local.ip().is_unspecified() && !socket.only_v6().unwrap_or(false);
        let listener = Listener {
            protocol,
            local: (!local.ip().is_unspecified()).then(|| local.ip()),
            ipv4: local.is_ipv4() || both,
            ipv6: local.is_ipv6(),
            port: local.port(),
        };
        let holder = self.listener_s_holder(protocol, wanted.quiet);
        let latch = self.shared.database.create_listener(listener, request, holder)?;
        tracing::debug!(latch = latch.0, %local, "latch LISTENER");
        let socket = Arc::new(socket);
        self.hold(latch, Arc::clone(&socket), permit, protocol);
        if protocol == UDP {
            // Nothing is left that came under no latch, nor on its way (RFC 5660 §2).
            sleep(SETTLING).await;
            if let Err(error) = empty(&socket) {
                self.let_go(latch);
                return Err(Refusal::new(Code::System, format!("emptying the socket: {error}")));
            }
        }
        Ok(Listening { latch: latch.0, local })
    }

    fn listener_s_holder(&self, protocol: u8, quiet: bool) -> Box<dyn Fn(Alert) + Send + Sync> {
        let alerts = (!quiet).then(|| self.alerts.clone());
        let (database, runtime) = (Arc::downgrade(&self.shared.database), Handle::current());
        Box::new(move |alert: Alert| {
            match &alerts {
                Some(alerts) => {
                    let _ = alerts.send(alert);
                }
                // A holder that wants no alerts need not read them either; nor does it acknowledge what it does not hear.
                None if protocol == UDP && alert.state != LatchState::Established => {
                    let (database, latch) = (Weak::clone(&database), alert.latch);
                    runtime.spawn(async move {
                        sleep(SETTLING).await;
                        if let Some(database) = database.upgrade().filter(|database| database.has_ended(latch)) {
                            database.release(latch);
                        }
                    });
                }
                None => {}
            }
        })
    }

    /// A latch of a listener's socket to an end that has not come.
    fn create_child(&mut self, id: u64, wanted: &Wanted, descriptor: Option<OwnedFd>) -> Result<Vec<u8>, Refusal> {
        self.may(Right::Latch)?;
        self.enforced()?;
        if descriptor.is_some() || wanted.quiet || wanted.larval || wanted.late || wanted.on_break.is_some() {
            let message =
                "with listener there is no descriptor, no quiet, larval or late, and on_break is the listener's";
            return Err(Refusal::new(Code::Malformed, message));
        }
        let listener = LatchId(wanted.listener.unwrap_or_default());
        let Some(remote) = wanted.remote.map(canonical) else {
            return Err(Refusal::new(Code::Malformed, "with listener remote is needed"));
        };
        let (flow, on_break) = self.child_flow(listener, remote)?;
        let request = self.request(wanted, on_break)?;
        let narrow = wanted.initiate == Initiate::Narrow;
        if !narrow && !self.lacks_sa(&flow, wanted.initiate) {
            return self.latch_child(id, listener, flow, &request);
        }
        self.may(Right::Initiate)?;
        if self.asked.len() >= self.shared.limits.latches_per_connection {
            return Err(Refusal::new(Code::Limit, "this connection waits for too many SAs"));
        }
        let initiating = self.initiate(flow, narrow);
        if wanted.progress {
            self.working.insert(id);
        }
        self.asked.spawn(async move { Asked { id, listener, flow, request, made: initiating.await } });
        // Who talks with many asks about others meanwhile.
        Ok(Vec::new())
    }

    fn answer_asked(&mut self, asked: Asked) -> Result<Vec<u8>, Refusal> {
        let Asked { id, listener, flow, request, made } = asked;
        self.working.remove(&id);
        made.and_then(|()| self.latch_child(id, listener, flow, &request))
            .or_else(|refusal| encode(&ServerMessage::Refusal { id: Some(id), refusal }))
    }

    fn latch_child(&self, id: u64, listener: LatchId, flow: Flow, request: &Request) -> Result<Vec<u8>, Refusal> {
        let (latch, class) = self.shared.database.create_child(listener, flow, request)?;
        reply(id, &self.created(latch, &flow, &class))
    }

    /// By whom datagrams of a remote end come.
    fn child(&self, listener: LatchId, remote: SocketAddr, descriptor: Option<OwnedFd>) -> Result<Created, Refusal> {
        self.may(Right::Listen)?;
        if descriptor.is_some() {
            return Err(Refusal::new(Code::Descriptor, "with remote there is no descriptor"));
        }
        let (flow, _) = self.child_flow(listener, remote)?;
        let (latch, class) = self.shared.database.child(listener, &flow)?;
        Ok(self.created(latch, &flow, &class))
    }

    /// The flow of a UDP listener of this connection to a remote end, and what becomes of it at a break.
    fn child_flow(&self, listener: LatchId, remote: SocketAddr) -> Result<(Flow, OnBreak), Refusal> {
        let none = || {
            Refusal::new(Code::NoSuchLatch, format!("this connection holds no listener latch {} of UDP", listener.0))
        };
        self.latches.get(&listener).filter(|held| held.protocol == UDP).ok_or_else(none)?;
        let database = &self.shared.database;
        let place = database.listener(listener).zip(database.listener_disposition(listener));
        let (place, on_break) = place.ok_or_else(none)?;
        let local = place.local.ok_or_else(none)?;
        Ok((flow(UDP, SocketAddr::new(local, place.port), remote), on_break))
    }

    fn is_child_of_ours(&self, latch: LatchId) -> bool {
        self.shared.database.parent(latch).is_some_and(|parent| self.latches.contains_key(&parent))
    }

    fn created(&self, latch: LatchId, flow: &Flow, class: &Class) -> Created {
        let (peer, protection) = describe(class);
        Created {
            latch: latch.0,
            local: SocketAddr::new(flow.local, flow.local_port),
            remote: SocketAddr::new(flow.remote, flow.remote_port),
            peer,
            protection,
            guard: self.guard(latch),
            class: self.number_of(class),
        }
    }

    fn accept(&mut self, accept: &Accept, descriptor: Option<OwnedFd>) -> Result<Created, Refusal> {
        self.may(Right::Listen)?;
        let listener = LatchId(accept.listener);
        // Whoever has the accepted socket may take its latch: a listener may be shared by processes.
        let Some(on_break) = self.shared.database.listener_disposition(listener) else {
            return Err(Refusal::new(Code::NoSuchLatch, format!("there is no listener latch {}", listener.0)));
        };
        let (socket, protocol, local, remote) = connection_socket(needed(descriptor)?)?;
        let Some(remote) = remote else { return Err(Refusal::new(Code::Socket, "the socket is not connected")) };
        let permit = self.permit()?;
        self.bind(&socket)?;
        let socket = Arc::new(socket);
        let holder = self.holder(&socket, protocol, on_break);
        let flow = flow(protocol, local, remote);
        let accepted = self.shared.database.accept(listener, &flow, self.who.user, holder);
        if matches!(accepted, Err(LatchError::Broken(_))) {
            reset(&socket);
        }
        let (latch, class) = accepted?;
        self.hold(latch, socket, permit, protocol);
        Ok(self.created(latch, &flow, &class))
    }

    /// Optional protection (RFC 5660 §3.1), of those who may override the policy.
    fn bypass(&mut self, bypassing: &Bypassing, descriptor: Option<OwnedFd>) -> Result<Bypassed, Refusal> {
        self.may(Right::Bypass)?;
        self.enforced()?;
        let (socket, protocol, local, remote) = connection_socket(needed(descriptor)?)?;
        let remote = other_end(remote, bypassing.remote)?;
        if let Some(device) = &self.shared.config.device
            && socket.device().map_err(not_a_socket)?.as_deref() == Some(device.as_bytes())
        {
            return Err(refused_socket(&format!("bound to {device}, which leads into the tunnel")));
        }
        let permit = self.permit()?;
        let socket = Arc::new(socket);
        let holder = self.holder(&socket, protocol, OnBreak::Reset);
        let flow = flow(protocol, local, remote);
        let latch = self.shared.database.bypass(flow, self.who.user, holder)?;
        self.begin(latch, &socket, flow, false)?;
        tracing::info!(latch = latch.0, %local, %remote, user = self.who.user, "bypass latch ESTABLISHED");
        self.hold(latch, socket, permit, protocol);
        Ok(Bypassed { latch: latch.0, local, remote, guard: self.guard(latch) })
    }

    fn request(&self, wanted: &Wanted, default: OnBreak) -> Result<Request, Refusal> {
        Ok(Request { owner: self.who.user, ..request(wanted, default)? })
    }

    fn enforced(&self) -> Result<(), Refusal> {
        match &self.shared.config.unenforced {
            Some(reason) => Err(Refusal::new(Code::Unenforced, reason.as_str())),
            None => Ok(()),
        }
    }

    fn permit(&self) -> Result<OwnedSemaphorePermit, Refusal> {
        if self.latches.len() >= self.shared.limits.latches_per_connection {
            return Err(Refusal::new(Code::Limit, "this connection holds too many latches"));
        }
        let permit = Arc::clone(&self.shared.latches).try_acquire_owned();
        permit.map_err(|_| Refusal::new(Code::Limit, "there are too many latches"))
    }

    /// Before the latch: from the moment the caller knows of it, the socket has no way around the tunnel.
    fn bind(&self, socket: &Socket) -> Result<(), Refusal> {
        let Some(device) = &self.shared.config.device else { return Ok(()) };
        bind_to(socket, device)
            .map_err(|error| Refusal::new(Code::System, format!("binding the socket to the device {device}: {error}")))
    }

    fn holder(&self, socket: &Arc<Socket>, protocol: u8, on_break: OnBreak) -> Box<dyn Fn(Alert) + Send + Sync> {
        let (alerts, socket, runtime) = (self.alerts.clone(), Arc::clone(socket), Handle::current());
        Box::new(move |alert: Alert| {
            let (state, latch) = (alert.state, alert.latch.0);
            tracing::info!(latch, reason = alert.reason, "latch {state}");
            // Nobody listens when the holder is gone already; the reset is due all the same.
            let _ = alerts.send(alert);
            if state != LatchState::Closed && (state != LatchState::Broken || on_break != OnBreak::Reset) {
                return;
            }
            // The application can hold the socket's lock for as long as it likes, by writing from memory that it
            // does not let come: that must not hold up the key manager. The guard drops all packets meanwhile.
            let socket = Arc::clone(&socket);
            runtime.spawn_blocking(move || if protocol == UDP { silence(&socket) } else { reset(&socket) });
        })
    }

    async fn inquire(&self, inquire: &Inquire, descriptor: Option<OwnedFd>) -> Result<Inquired, Refusal> {
        let given = (inquire.local.map(canonical), inquire.remote.map(canonical));
        let by_socket = descriptor.is_some();
        let (protocol, local, remote) = match descriptor {
            Some(_) if given.0.is_some() || inquire.protocol.is_some() => {
                return Err(Refusal::new(Code::Malformed, "local, protocol and a descriptor exclude each other"));
            }
            Some(descriptor) => {
                let (_, protocol, local, remote) = connection_socket(descriptor)?;
                (protocol, Some(local), remote.or(given.1))
            }
            None => (inquire.protocol.unwrap_or(TCP), given.0, given.1),
        };
        let (Some(local), Some(remote)) = (local, remote) else {
            return Err(Refusal::new(Code::Malformed, "inquire needs local and remote, or a connected socket"));
        };
        let flow = flow(protocol, local, remote);
        let found = self.shared.database.find(&flow);
        let bypass = self.shared.database.find_bypass(&flow);
        // Without a socket, nothing shows that the flow is the client's.
        let number = found.as_ref().map(|(latch, ..)| *latch).or(bypass.map(|(latch, _)| latch));
        let owned = number.and_then(|latch| self.shared.database.inquire(latch)?.owner);
        if !by_socket && !self.may_see(owned) {
            self.may(Right::See)?;
        }
        if let Some((latch, state)) = bypass {
            return Ok(self.bypassed(latch, state, &flow));
        }
        let guard = found.as_ref().and_then(|(latch, ..)| self.guard(*latch));
        let latch = found.as_ref().map(|(latch, state, _)| LatchInfo { number: latch.0, state: (*state).into() });
        let class = found.map(|(_, _, class)| class).or_else(|| self.shared.database.peer_of(&flow));
        let class = class.ok_or_else(|| {
            Refusal::new(Code::NoSa, format!("no SA protects {flow}, or SAs of more than one class do"))
        })?;
        let (peer, protection) = describe(&class);
        let (class, sas) = (self.number_of(&class), self.survey(flow).await);
        let (peer, protection) = (Some(peer), Some(protection));
        Ok(Inquired { local, remote, protocol, latch, bypass: false, peer, protection, guard, class, sas })
    }

    async fn show(&self, latch: LatchId) -> Result<Inquired, Refusal> {
        let found = self.shared.database.inquire(latch);
        if !self.may_see(found.as_ref().and_then(|listed| listed.owner)) {
            self.may(Right::See)?;
        }
        let (state, flow, class) = match found.map(|listed| (listed.state, listed.subject)) {
            Some((state, Subject::Connection(flow, class))) => (state, flow, class),
            Some((state, Subject::Bypass(flow))) => return Ok(self.bypassed(latch, state, &flow)),
            Some((_, Subject::Listener(..))) | None => {
                return Err(Refusal::new(Code::NoSuchLatch, format!("there is no connection latch {}", latch.0)));
            }
        };
        let (peer, protection) = describe(&class);
        Ok(Inquired {
            local: SocketAddr::new(flow.local, flow.local_port),
            remote: SocketAddr::new(flow.remote, flow.remote_port),
            protocol: flow.protocol,
            latch: Some(LatchInfo { number: latch.0, state: state.into() }),
            bypass: false,
            peer: Some(peer),
            protection: Some(protection),
            guard: self.guard(latch),
            class: self.number_of(&class),
            sas: self.survey(flow).await,
        })
    }

    fn bypassed(&self, latch: LatchId, state: LatchState, flow: &Flow) -> Inquired {
        Inquired {
            local: SocketAddr::new(flow.local, flow.local_port),
            remote: SocketAddr::new(flow.remote, flow.remote_port),
            protocol: flow.protocol,
            latch: Some(LatchInfo { number: latch.0, state: state.into() }),
            bypass: true,
            peer: None,
            protection: None,
            guard: self.guard(latch),
            class: None,
            sas: Vec::new(),
        }
    }

    fn number_of(&self, class: &Class) -> Option<u32> {
        self.shared.database.number_of(class).map(|number| number.0)
    }

    /// What protects a flow now; nothing if nobody can say.
    async fn survey(&self, flow: Flow) -> Vec<SaInfo> {
        let mut sas = self.shared.database.sas_of(&flow);
        sas.truncate(MAX_SURVEYED);
        match &self.shared.config.surveyor {
            Some(Surveyor(survey)) if !sas.is_empty() => survey(flow, sas).await,
            _ => Vec::new(),
        }
    }

    fn guard(&self, latch: LatchId) -> Option<Guard> {
        self.shared.database.protector(latch).map(Guard::from)
    }

    fn administer(
        &self,
        latch: LatchId,
        action: impl FnOnce(&Database, LatchId, &str) -> bool,
        reason: &str,
    ) -> Result<(), Refusal> {
        self.may(Right::Manage)?;
        if action(&self.shared.database, latch, reason) {
            return Ok(());
        }
        Err(Refusal::new(Code::NoSuchLatch, format!("there is no connection latch {}", latch.0)))
    }

    fn channel_binding(&self, bind: &Bind) -> Result<ChannelBinding, Refusal> {
        let latch = LatchId(bind.latch);
        if !self.latches.contains_key(&latch) && !self.is_child_of_ours(latch) {
            return Err(no_such_latch(latch));
        }
        let data = match bind.kind.as_str() {
            UNIQUE_BINDING => [&[UNIQUE_VERSION][..], &self.shared.database.channel_binding(latch)?].concat(),
            ENDPOINT_BINDING => endpoint_data(self.shared.database.endpoint_keys(latch)?),
            other => {
                let other: String = other.chars().take(40).collect();
                let message = format!("there is no type {other:?} here, only {UNIQUE_BINDING} and {ENDPOINT_BINDING}");
                return Err(Refusal::new(Code::NoBinding, message));
            }
        };
        Ok(ChannelBinding { kind: bind.kind.clone(), data })
    }

    fn list(&self, list: &List) -> Listing {
        let (all, mut after, mut latches) = (self.may(Right::See).is_ok(), LatchId(list.after), Vec::new());
        loop {
            let page = self.shared.database.list_after(after, LIST_LENGTH + 1);
            let Some(last) = page.last() else { break };
            after = last.latch;
            latches.extend(page.into_iter().filter(|latch| all || self.may_see(latch.owner)));
            if latches.len() > LIST_LENGTH {
                break;
            }
        }
        let more = latches.len() > LIST_LENGTH;
        latches.truncate(LIST_LENGTH);
        Listing { latches: latches.into_iter().map(listed).collect(), more }
    }

    fn let_go(&mut self, latch: LatchId) {
        self.requests.remove(&latch);
        if let Some(held) = self.latches.remove(&latch) {
            self.wind_down(latch, held);
        }
    }

    /// Ends what the socket does and then the latch, in the background.
    fn wind_down(&self, latch: LatchId, held: Held) {
        let shared = Arc::clone(&self.shared);
        // A socket that is not connected says so; it is reset below.
        let _ = held.socket.shutdown(std::net::Shutdown::Both);
        tokio::spawn(async move {
            let Held { socket, permit, protocol, watched } = held;
            let deadline = Instant::now() + LINGER;
            let mut pause = Duration::from_millis(5);
            // The kernel forgets the peer's address when the connection has come to its end.
            while protocol == TCP && socket.peer_addr().is_ok() && Instant::now() < deadline {
                sleep(pause).await;
                pause = (pause * 2).min(Duration::from_secs(1));
            }
            if protocol == TCP {
                reset(&socket);
            }
            // The application may still hold the socket and connect it anew, without a latch: lead it nowhere.
            if shared.config.device.is_some()
                && let Err(error) = socket.bind_device(Some(b"lo"))
            {
                tracing::debug!(latch = latch.0, %error, "binding a socket that lost its latch to the loopback device");
            }
            shared.database.release(latch);
            tracing::debug!(latch = latch.0, "latch released");
            drop((permit, watched));
        });
    }
}

fn decode(datagram: &Datagram) -> Result<(u64, Call), (Option<u64>, Refusal)> {
    if datagram.truncated {
        let limit = crate::protocol::MAX_MESSAGE;
        let message = format!("the message is longer than {limit} octets, or has too many descriptors");
        return Err((None, Refusal::new(Code::TooLong, message)));
    }
    Call::decode(&datagram.octets)
}

async fn send(socket: &SeqPacket, octets: &[u8]) -> io::Result<()> {
    timeout(SEND_TIMEOUT, socket.send(octets, None)).await?
}

/// The latch goes when its holder has been told.
fn is_over(alert: &Alert) -> bool {
    alert.state == LatchState::Closed && alert.reason == ENDED
}

fn told(alert: Alert) -> ServerMessage {
    let Alert { latch, state, reason, listener, .. } = alert;
    let listener = listener.map(|listener| listener.0);
    ServerMessage::Alert { latch: latch.0, state: state.into(), reason, listener, code: None }
}

/// The data of [`ENDPOINT_BINDING`]. Neither end need know which of them called: the hashes stand in the order of their octets.
fn endpoint_data(mut keys: [[u8; 32]; 2]) -> Vec<u8> {
    keys.sort_unstable();
    [&ENDPOINT_VERSION[..], keys.as_flattened()].concat()
}

/// Never, unless somebody watches.
async fn next_event(watched: &mut Option<broadcast::Receiver<(Option<u32>, LatchEvent)>>) -> (Option<u32>, LatchEvent) {
    let mut missed = 0;
    while let Some(events) = watched {
        match events.recv().await {
            Ok((owner, event)) => return (owner, LatchEvent { missed, ..event }),
            Err(broadcast::error::RecvError::Lagged(lost)) => missed += lost,
            Err(broadcast::error::RecvError::Closed) => *watched = None,
        }
    }
    std::future::pending().await
}

fn listed(Listed { latch, state, subject, automatic, listener, owner: _ }: Listed) -> ListedLatch {
    let bypass = matches!(subject, Subject::Bypass(_));
    let (protocol, local, remote, peer) = match subject {
        Subject::Bypass(flow) => {
            let remote = SocketAddr::new(flow.remote, flow.remote_port);
            (flow.protocol, SocketAddr::new(flow.local, flow.local_port), Some(remote), String::new())
        }
        Subject::Connection(flow, class) => {
            let remote = SocketAddr::new(flow.remote, flow.remote_port);
            (flow.protocol, SocketAddr::new(flow.local, flow.local_port), Some(remote), class.peer.id.to_string())
        }
        Subject::Listener(listener, peer) => {
            let any = if listener.ipv6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
            let local = SocketAddr::new(listener.local.unwrap_or(any), listener.port);
            (listener.protocol, local, None, peer.to_string())
        }
    };
    ListedLatch {
        latch: latch.0,
        state: state.into(),
        protocol,
        local,
        remote,
        peer: peer.chars().take(200).collect(),
        bypass,
        automatic,
        listener: listener.map(|listener| listener.0),
    }
}

/// The holder of a UDP listener has done with a child. One that has ended is forgotten, when what its peer may have sent to
/// us, or we to it, is no longer on its way; one that has not is to be acknowledged once more.
fn acknowledge(database: &Arc<Database>, child: LatchId) {
    if database.end_child(child) {
        let database = Arc::clone(database);
        tokio::spawn(async move {
            sleep(SETTLING).await;
            database.release(child);
        });
    }
}

fn request(wanted: &Wanted, default: OnBreak) -> Result<Request, Refusal> {
    let pattern = |name: &str, text: &str| {
        IdentityPattern::parse(text).map_err(|error| Refusal::new(Code::Identity, format!("{name}: {error}")))
    };
    Ok(Request {
        peer: pattern("peer", &wanted.peer)?,
        local: wanted.local_id.as_deref().map(|text| pattern("local_id", text)).transpose()?,
        mode: wanted.mode.map(Into::into),
        suites: wanted.suites.iter().copied().map(Into::into).collect(),
        replay_protection: wanted.replay_protection,
        on_break: wanted.on_break.map_or(default, Into::into),
        owner: None,
    })
}

/// Where a socket is connected to, or will be.
fn other_end(connected: Option<SocketAddr>, given: Option<SocketAddr>) -> Result<SocketAddr, Refusal> {
    match (connected, given.map(canonical)) {
        (Some(remote), Some(given)) if remote != given => {
            Err(Refusal::new(Code::Socket, format!("the socket is connected to {remote}, not {given}")))
        }
        (Some(remote), _) | (None, Some(remote)) => Ok(remote),
        (None, None) => Err(Refusal::new(Code::Socket, "the socket is not connected: remote is needed")),
    }
}

fn needed(descriptor: Option<OwnedFd>) -> Result<OwnedFd, Refusal> {
    descriptor.ok_or_else(|| Refusal::new(Code::Descriptor, "the socket is needed as a descriptor"))
}

fn no_such_latch(latch: LatchId) -> Refusal {
    Refusal::new(Code::NoSuchLatch, format!("this connection holds no latch {}", latch.0))
}

fn reply<T: Serialize>(id: u64, result: &T) -> Result<Vec<u8>, Refusal> {
    let result = serde_json::to_value(result).map_err(|error| Refusal::new(Code::System, error.to_string()))?;
    encode(&ServerMessage::Reply { id, result })
}

/// From now on a UDP socket takes nothing from others, and nothing is left that came before.
fn connect_and_empty(socket: &Socket, flow: &Flow) -> io::Result<()> {
    let remote = match (flow.remote, socket.domain()?) {
        (IpAddr::V4(address), Domain::IPV6) => address.to_ipv6_mapped().into(),
        (address, _) => address,
    };
    socket.connect(&SocketAddr::new(remote, flow.remote_port).into())?;
    empty(socket)
}

fn empty(socket: &Socket) -> io::Result<()> {
    for _ in 0..MAX_QUEUED {
        // Datagrams, and errors about those that were sent, go.
        if rustix::net::recv(socket, &mut [0; 1], RecvFlags::DONTWAIT) == Err(Errno::AGAIN) {
            return Ok(());
        }
    }
    Err(io::Error::other("datagrams come in without end"))
}

/// A reset as if the peer had sent it (RFC 5660 §5.5 b): throws away what is queued both ways. Unlike `shutdown`, which
/// readers take for an orderly end, it makes every call on the socket fail.
fn reset(socket: &Socket) {
    if let Err(error) = rustix::net::connect_unspec(socket.as_fd()) {
        tracing::debug!(%error, "resetting a latched socket; shutting it down instead");
        let _ = socket.shutdown(std::net::Shutdown::Both);
    }
}

/// Ends what a UDP socket does; it stays connected, so that it takes nothing from others.
fn silence(socket: &Socket) {
    if let Err(error) = socket.shutdown(std::net::Shutdown::Both) {
        tracing::debug!(%error, "shutting down a latched UDP socket");
    }
}

/// Checks that a descriptor is a TCP or UDP socket with an address and port of its own that does not listen; gives its
/// protocol and both ends.
fn connection_socket(descriptor: OwnedFd) -> Result<(Socket, u8, SocketAddr, Option<SocketAddr>), Refusal> {
    let (socket, protocol) = ip_socket(descriptor)?;
    if protocol == TCP && socket.is_listener().map_err(not_a_socket)? {
        return Err(refused_socket("a listening socket: listen latches it"));
    }
    let local = bound_address(&socket)?;
    if local.ip().is_unspecified() {
        return Err(refused_socket("not bound to an address and a port"));
    }
    let remote = match socket.peer_addr() {
        Ok(remote) => remote.as_socket().map(canonical),
        Err(error) if error.kind() == io::ErrorKind::NotConnected => None,
        Err(error) => return Err(not_a_socket(error)),
    };
    Ok((socket, protocol, local, remote))
}

/// Checks that a descriptor is a TCP socket that listens or is about to, or a UDP socket that is not connected; gives its protocol
/// and where it is bound.
fn listening_socket(descriptor: OwnedFd) -> Result<(Socket, u8, SocketAddr), Refusal> {
    let (socket, protocol) = ip_socket(descriptor)?;
    if socket.peer_addr().is_ok() {
        return Err(refused_socket("connected"));
    }
    let local = bound_address(&socket)?;
    if protocol == UDP && local.ip().is_unspecified() {
        let what =
            "bound to no address: a datagram does not say to which of ours it came, nor from which it is to leave";
        return Err(refused_socket(what));
    }
    Ok((socket, protocol, local))
}

fn ip_socket(descriptor: OwnedFd) -> Result<(Socket, u8), Refusal> {
    let socket = Socket::from(descriptor);
    let ip = matches!(socket.domain().map_err(not_a_socket)?, Domain::IPV4 | Domain::IPV6);
    let (kind, protocol) = (socket.r#type().map_err(not_a_socket)?, socket.protocol().map_err(not_a_socket)?);
    match protocol {
        Some(Protocol::TCP) if ip && kind == Type::STREAM => Ok((socket, TCP)),
        Some(Protocol::UDP) if ip && kind == Type::DGRAM => Ok((socket, UDP)),
        _ => Err(refused_socket("neither a TCP nor a UDP socket")),
    }
}

fn bound_address(socket: &Socket) -> Result<SocketAddr, Refusal> {
    let local = socket.local_addr().map_err(not_a_socket)?.as_socket().map(canonical);
    local.filter(|local| local.port() != 0).ok_or_else(|| refused_socket("not bound to an address and a port"))
}

fn refused_socket(what: &str) -> Refusal {
    Refusal::new(Code::Socket, format!("the descriptor is {what}"))
}

fn not_a_socket(error: io::Error) -> Refusal {
    Refusal::new(Code::Socket, format!("the descriptor is not a TCP or UDP socket: {error}"))
}

fn bind_to(socket: &Socket, device: &str) -> io::Result<()> {
    // To bind anew, even to the same device, takes a privilege.
    if socket.device()?.as_deref() == Some(device.as_bytes()) {
        return Ok(());
    }
    socket.bind_device(Some(device.as_bytes()))
}

/// An IPv6 socket that speaks IPv4 has mapped addresses; its packets have not.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn flow(protocol: u8, local: SocketAddr, remote: SocketAddr) -> Flow {
    Flow { protocol, local: local.ip(), local_port: local.port(), remote: remote.ip(), remote_port: remote.port() }
}

fn describe(class: &Class) -> (Peer, Protection) {
    (class.into(), class.into())
}

#[cfg(test)]
mod tests;
