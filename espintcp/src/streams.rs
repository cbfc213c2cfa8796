//! Streams on tokio: listener, connector, reader and writer of each, limits (RFC 9329 §6.1, §10).
//!
//! Each stream has three tasks: a supervisor, which owns its life and tells its end, a reader and a writer.
//! An error closes only the stream that it happened on. Nothing here decides what a message is worth: the
//! daemon says so by [`Streams::vouch`] and [`Streams::complain`].

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_rustls::TlsStream;
use tracing::{debug, trace, warn};

use crate::codec::{Deframer, frame_ike};
use crate::tls::{TlsClient, TlsServer};
use duplex::Duplex;
use handed::Gate;
use pace::Pace;
use queue::Queue;
use reader::Reader;
use standing::Standing;
use strangers::{StrangerSlot, Strangers};
use writer::Writer;

mod duplex;
mod handed;
mod pace;
mod proxy;
mod queue;
mod reader;
mod socket;
mod standing;
mod strangers;
mod writer;

/// Limits on what a stranger can make us hold or wait for (RFC 9329 §10).
#[derive(Clone, Debug)]
pub struct StreamLimits {
    /// Time to the whole prefix and first message.
    pub first_message: Duration,
    /// Time to a message that the daemon vouches for ([`Streams::vouch`]).
    pub unauthenticated: Duration,
    /// Longest time that a begun frame may stay incomplete.
    pub partial_frame: Duration,
    /// Streams that nobody vouched for, in total; beyond, one of them goes for each that comes.
    pub max_unauthenticated: usize,
    /// Streams that nobody vouched for, of one IPv4 address or one IPv6 /64.
    pub max_unauthenticated_per_address: usize,
    /// Outgoing IKE messages queued on one stream.
    pub queue: usize,
    /// Time to connect as originator.
    pub connect: Duration,
    /// Longest time without progress in writing, and for sent octets to be acknowledged (TCP_USER_TIMEOUT).
    pub write: Duration,
    /// [`Complaint`]s in a row that close a stream, those apart that close it at once.
    pub max_complaints: u32,
    /// For how long they must have been coming, on a stream that the daemon vouched for.
    pub complaint_grace: Duration,
}

impl Default for StreamLimits {
    fn default() -> Self {
        Self {
            first_message: Duration::from_secs(5),
            unauthenticated: Duration::from_secs(30),
            partial_frame: Duration::from_secs(10),
            max_unauthenticated: 1024,
            max_unauthenticated_per_address: 32,
            queue: 256,
            connect: Duration::from_secs(10),
            write: Duration::from_secs(30),
            max_complaints: 16,
            complaint_grace: Duration::from_secs(2),
        }
    }
}

pub use queue::EspSender;

/// What is done to each socket before it is used.
pub type Prepare = Arc<dyn Fn(BorrowedFd<'_>) -> io::Result<()> + Send + Sync>;

/// What happens on streams. Numbers are the caller's for streams that we open, ours (from `1 << 63`) for
/// accepted ones.
#[derive(Debug)]
pub enum StreamEvent {
    /// A stream that we opened is connected and the prefix is on its way, or one was accepted and its
    /// prefix read.
    Opened {
        /// Number.
        stream: u64,
        /// Our end.
        local: SocketAddr,
        /// The peer's end.
        remote: SocketAddr,
        /// The peer opened it.
        accepted: bool,
        /// Where ESP packets for it go in.
        esp: EspSender,
    },
    /// An IKE message.
    Ike {
        /// Number.
        stream: u64,
        /// Our end.
        local: SocketAddr,
        /// The peer's end.
        remote: SocketAddr,
        /// The message.
        bytes: Vec<u8>,
    },
    /// The stream is gone, or could not be opened. Nothing of it follows.
    Closed {
        /// Number.
        stream: u64,
        /// Why, for a human.
        reason: String,
    },
}

/// Called on the reader's task for the ESP packets of one read, in order: (stream, local, remote, packets). Never
/// before the stream's `Opened` was queued nor after its `Closed`; what takes long in it holds up that stream.
pub type EspHandler = Arc<dyn Fn(u64, SocketAddr, SocketAddr, &mut [BytesMut]) -> EspWorth + Send + Sync>;

/// Makes an ESP packet of what [`EspSender::send`] was given, when it leaves: called with the stream's number and the packet on
/// the writer's task. Whatever is an ESP packet for this very stream, SPI first, goes to the last argument.
pub type Seal = Arc<dyn Fn(u64, &[u8], &mut dyn FnMut(&[u8])) + Send + Sync>;

/// What the ESP packets of one read were worth (RFC 9329 §6.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EspWorth {
    /// One at least was authentic.
    pub authentic: bool,
    /// So many at the end were no ESP packets, or of SAs that are not known.
    pub unknown: u32,
    /// The check of one of a known SA failed: closes the stream.
    pub forged: bool,
}

/// Where a stream that we open goes along.
#[derive(Clone)]
pub struct Way {
    /// Our end; an unspecified address or port 0 leaves that to the system.
    pub local: SocketAddr,
    /// The peer's end.
    pub remote: SocketAddr,
    /// The code point (RFC 2474) of all its packets, the first included; below 64.
    pub dscp: u8,
    /// In TLS.
    pub tls: Option<TlsClient>,
    /// Through a web proxy, its host and port.
    pub proxy: Option<String>,
}

/// What the daemon found wrong with a message from a stream (RFC 9329 §6.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Complaint {
    /// It does not parse as an IKE message header or ESP packet. (A syntax error inside an authentic IKE
    /// message is INVALID_SYNTAX and no matter of the stream.)
    Unparsable,
    /// Its SPI is not known; a few may come while the two sides' SPIs are out of step.
    UnknownSpi,
    /// Its SPI is known and its integrity check fails: closes the stream at once.
    Unauthentic,
}

/// All streams of the daemon. Cloning the handle is cheap. Dropping the last one closes nothing: call
/// [`Self::shutdown`].
#[derive(Clone)]
pub struct Streams {
    inner: Arc<Inner>,
}

impl Streams {
    /// Starts with no listener. Events go to the returned bounded channel; a full channel holds readers back.
    /// `prepare` is called for each new socket, so that streams do not go through the tunnel they carry.
    pub fn new(limits: StreamLimits, prepare: Option<Prepare>, esp: EspHandler) -> (Self, mpsc::Receiver<StreamEvent>) {
        let (events, receiver) = mpsc::channel(EVENTS);
        let strangers = Strangers::new(limits.max_unauthenticated, limits.max_unauthenticated_per_address);
        let inner = Inner {
            limits,
            prepare,
            esp,
            seal: OnceLock::new(),
            events,
            strangers: Arc::new(Mutex::new(strangers)),
            visitors: Arc::new(Mutex::new(Strangers::new(VISITORS.0, VISITORS.1))),
            table: Mutex::new(Table { shut: false, streams: BTreeMap::new(), listeners: Vec::new() }),
            next_accepted: AtomicU64::new(FIRST_ACCEPTED),
            live: watch::Sender::new(0),
            stop: watch::Sender::new(false),
        };
        (Self { inner: Arc::new(inner) }, receiver)
    }

    /// Has packets sealed as they leave. To be said once, before there are streams.
    pub fn seal_by(&self, seal: Seal) {
        // A second one is a mistake of the caller, and the first stays.
        let _ = self.inner.seal.set(seal);
    }

    /// Listens on an address; gives the real one (port 0 lets the system choose). Must be called on a tokio runtime.
    pub async fn listen(&self, address: SocketAddr) -> io::Result<SocketAddr> {
        self.listen_as(address, None)
    }

    /// The same for streams in TLS.
    pub async fn listen_tls(&self, address: SocketAddr, tls: TlsServer) -> io::Result<SocketAddr> {
        self.listen_as(address, Some(Arc::new(tls)))
    }

    fn listen_as(&self, address: SocketAddr, tls: Option<Arc<TlsServer>>) -> io::Result<SocketAddr> {
        let listener = socket::listener(address, self.inner.prepare.as_ref())?;
        let address = listener.local_addr()?;
        let mut table = self.inner.table();
        if table.shut {
            return Err(io::Error::other("shut down"));
        }
        table.listeners.push(tokio::spawn(accept_loop(self.inner.clone(), listener, tls)));
        Ok(address)
    }

    /// Opens a stream as TCP Originator; `Opened` or `Closed` follows. `local` with an unspecified address or
    /// port 0 leaves that to the system. A number in use or not below `1 << 63` is a mistake of the caller:
    /// logged, nothing done. Must be called on a tokio runtime. IKE messages may be queued at once.
    pub fn open(&self, stream: u64, local: SocketAddr, remote: SocketAddr) {
        self.open_along(stream, Way { local, remote, dscp: 0, tls: None, proxy: None });
    }

    /// The same in TLS.
    pub fn open_tls(&self, stream: u64, local: SocketAddr, remote: SocketAddr, tls: TlsClient) {
        self.open_along(stream, Way { local, remote, dscp: 0, tls: Some(tls), proxy: None });
    }

    /// The same as the way says.
    pub fn open_along(&self, stream: u64, way: Way) {
        let live = self.inner.live();
        let Some(ends) =
            (stream < FIRST_ACCEPTED).then(|| self.inner.register(stream, None, way.tls.is_some())).flatten()
        else {
            warn!(stream, "stream number is in use or not the caller's to choose, or streams are shut down");
            return;
        };
        ends.queue.mark(way.dscp);
        let inner = self.inner.clone();
        tokio::spawn(async move {
            let started = inner.clone().originate(stream, way, ends).await;
            inner.supervise(started, stream, live);
        });
    }

    /// Queues an IKE message; IKE goes before queued ESP. False when there is no such stream or its queue is full.
    pub fn send_ike(&self, stream: u64, message: &[u8]) -> bool {
        let Some(framed) = frame_ike(message) else { return false };
        let table = self.inner.table();
        table.streams.get(&stream).is_some_and(|entry| entry.queue.push_ike(framed, self.inner.limits.queue))
    }

    /// Gives all packets of a stream this code point from now on (RFC 9329 §6.8): IKE's and ESP's, since a stream has one. Where
    /// there is no stream of this number nothing happens.
    pub fn mark(&self, stream: u64, dscp: u8) {
        if let Some(entry) = self.inner.table().streams.get(&stream) {
            entry.queue.mark(dscp);
        }
    }

    /// Whether a stream is in TLS; false if there is none of this number.
    pub fn is_tls(&self, stream: u64) -> bool {
        self.inner.table().streams.get(&stream).is_some_and(|entry| entry.tls)
    }

    /// The daemon authenticated a message on it: the limits for strangers no longer apply, and complaints so
    /// far are forgotten.
    pub fn vouch(&self, stream: u64) {
        let mut table = self.inner.table();
        if let Some(entry) = table.streams.get_mut(&stream) {
            entry.standing.vouch();
            entry.stranger = None;
        }
    }

    /// Has `how` hand the socket over to the kernel (`espintcp`), which does ESP and framing from then on; IKE still comes
    /// and goes here. That happens as soon as no message is half on its way, in either direction; when `how` fails, the
    /// stream ends. Once is enough for all SAs in it.
    ///
    /// # Errors
    /// Why this stream is not handed over: in TLS octets are no messages, and nobody has authenticated on a stranger's.
    pub fn hand_over(&self, stream: u64, how: Prepare) -> Result<(), &'static str> {
        let table = self.inner.table();
        let entry = table.streams.get(&stream).ok_or("the stream is gone")?;
        if !entry.standing.is_vouched() {
            return Err("nobody has authenticated on the stream");
        }
        entry.gate.as_ref().ok_or("ESP in TLS is not the kernel's")?.hand_over(how);
        Ok(())
    }

    /// A message from it was bad. Too many in a row close the stream, or one that is not authentic (RFC 9329 §6.1).
    pub fn complain(&self, stream: u64, complaint: Complaint) {
        let table = self.inner.table();
        let Some(entry) = table.streams.get(&stream) else { return };
        let reason = match complaint {
            Complaint::Unauthentic => UNAUTHENTIC,
            Complaint::Unparsable | Complaint::UnknownSpi => {
                if !entry.standing.complain(1, &self.inner.limits) {
                    return;
                }
                MEANINGLESS
            }
        };
        entry.leave_open(Phase::Killed(reason));
    }

    /// Closes a stream after what is queued was written; `Closed` follows. What the peer still sends is dropped.
    pub fn close(&self, stream: u64) {
        if let Some(entry) = self.inner.table().streams.get(&stream) {
            entry.leave_open(Phase::Draining);
        }
    }

    /// Streams that hold a socket now, those still connecting or without a prefix included.
    pub fn open_streams(&self) -> usize {
        *self.inner.live.borrow()
    }

    /// Accepted streams that nobody vouched for yet.
    pub fn unvouched_streams(&self) -> usize {
        lock(&self.inner.strangers).total()
    }

    /// Closes all streams and listeners. What is queued has two seconds to leave. `Closed` events that find no
    /// room in the channel are dropped.
    pub async fn shutdown(&self) {
        self.inner.stop.send_replace(true);
        let listeners = {
            let mut table = self.inner.table();
            table.shut = true;
            table.streams.values().for_each(|entry| entry.leave_open(Phase::Draining));
            std::mem::take(&mut table.listeners)
        };
        for listener in listeners {
            listener.abort();
            let _ = listener.await;
        }
        let mut live = self.inner.live.subscribe();
        if timeout(LINGER, live.wait_for(|count| *count == 0)).await.is_err() {
            for entry in self.inner.table().streams.values() {
                entry.phase.send_replace(Phase::Killed("shut down"));
            }
            let _ = live.wait_for(|count| *count == 0).await;
        }
    }
}

/// How long a stream that we close waits for the peer's FIN, so that a reset does not overtake what was sent.
const LINGER: Duration = Duration::from_secs(2);
/// Events that wait for the daemon.
const EVENTS: usize = 1024;
/// Numbers from here are ours (RFC 9329 knows none).
const FIRST_ACCEPTED: u64 = 1 << 63;
/// Shortest and longest pause after the system refused to accept, as when descriptors run out.
const ACCEPT_PAUSE: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(1));
/// Connections to the web server behind TLS: in all, and of one address.
const VISITORS: (usize, usize) = (1024, 64);
/// How long that server may take to accept one.
const WEB: Duration = Duration::from_secs(5);
/// Reasons to close for what came in.
const UNAUTHENTIC: &str = "a message failed its integrity check";
const EVICTED: &str = "others take the place of a stream that nobody vouched for";
const MEANINGLESS: &str = "too many messages that mean nothing here";
/// Time that a stream keeps for its first message when the daemon was slow to take its `Opened`.
const GRACE: Duration = Duration::from_secs(1);

struct Inner {
    limits: StreamLimits,
    prepare: Option<Prepare>,
    esp: EspHandler,
    seal: OnceLock<Seal>,
    events: mpsc::Sender<StreamEvent>,
    strangers: Arc<Mutex<Strangers>>,
    /// Of the web server behind TLS.
    visitors: Arc<Mutex<Strangers>>,
    table: Mutex<Table>,
    next_accepted: AtomicU64,
    /// Number of streams that hold a socket.
    live: watch::Sender<usize>,
    stop: watch::Sender<bool>,
}

struct Table {
    shut: bool,
    streams: BTreeMap<u64, Entry>,
    listeners: Vec<JoinHandle<()>>,
}

struct Entry {
    queue: Arc<Queue>,
    phase: watch::Sender<Phase>,
    standing: Arc<Standing>,
    stranger: Option<StrangerSlot>,
    /// It is in TLS.
    tls: bool,
    /// Of a plain stream that is open.
    gate: Option<Arc<Gate>>,
}

impl Entry {
    /// One that is closing already stays as it is.
    fn leave_open(&self, next: Phase) {
        self.phase.send_if_modified(|phase| {
            let open = *phase == Phase::Open;
            if open {
                *phase = next;
            }
            open
        });
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Open,
    /// Write what is queued, then close.
    Draining,
    /// Close now.
    Killed(&'static str),
}

/// The tasks' ends of what an [`Entry`] holds.
struct Ends {
    queue: Arc<Queue>,
    phase: watch::Receiver<Phase>,
    standing: Arc<Standing>,
}

/// A stream that is ready to carry messages.
struct Established {
    number: u64,
    socket: Duplex,
    local: SocketAddr,
    remote: SocketAddr,
    deframer: Deframer,
    /// When it was accepted and until when it must bring a message; `None` for those that we opened.
    accepted: Option<(Instant, Instant)>,
    /// Told when another takes its place.
    evicted: Option<Arc<Notify>>,
}

/// A stream whose tasks run.
struct Running {
    halves: JoinSet<Half>,
    phase: watch::Receiver<Phase>,
    evicted: Option<Arc<Notify>>,
}

impl Running {
    /// The reason of its end.
    async fn end(mut self, patience: Duration) -> String {
        let (mut killed, draining) = (self.phase.clone(), self.phase);
        let halves = &mut self.halves;
        let over = async {
            match halves.join_next().await {
                Some(Ok(Half::Read(reason))) => {
                    if *draining.borrow() == Phase::Draining {
                        let _ = timeout(patience, halves.join_next()).await;
                    }
                    reason
                }
                Some(Ok(Half::Written(Ok(())))) => {
                    let _ = timeout(LINGER, halves.join_next()).await;
                    "closed by this side".to_owned()
                }
                Some(Ok(Half::Written(Err(reason)))) => reason,
                Some(Err(error)) => format!("internal error: {error}"),
                None => "internal error: no tasks".to_owned(),
            }
        };
        let reason = tokio::select! {
            biased;
            reason = kill_reason(&mut killed) => reason.to_owned(),
            () = told(self.evicted) => EVICTED.to_owned(),
            reason = over => reason,
        };
        // Waits for both, so that nothing of the stream follows its `Closed`.
        self.halves.shutdown().await;
        reason
    }
}

enum Half {
    Read(String),
    Written(Result<(), String>),
}

impl Inner {
    fn table(&self) -> MutexGuard<'_, Table> {
        lock(&self.table)
    }

    fn live(self: &Arc<Self>) -> Live {
        self.live.send_modify(|count| *count = count.saturating_add(1));
        Live(self.clone())
    }

    /// `None` when the number is in use or after shutdown.
    fn register(&self, number: u64, stranger: Option<StrangerSlot>, tls: bool) -> Option<Ends> {
        let queue = Arc::new(Queue::default());
        let (phase_sender, phase) = watch::channel(Phase::Open);
        let standing = Arc::new(Standing::default());
        let mut table = self.table();
        if table.shut || table.streams.contains_key(&number) {
            return None;
        }

        let entry =
            Entry { queue: queue.clone(), phase: phase_sender, standing: standing.clone(), stranger, tls, gate: None };
        table.streams.insert(number, entry);
        Some(Ends { queue, phase, standing })
    }

    /// Takes a new connection in, or drops it when there are too many strangers.
    fn admit(self: Arc<Self>, socket: TcpStream, remote: SocketAddr, tls: Option<Arc<TlsServer>>) {
        let Some(slot) = StrangerSlot::take(&self.strangers, remote.ip()) else {
            debug!(%remote, "too many streams that nobody vouched for: refused");
            return;
        };
        let evicted = slot.evicted();
        let live = self.live();
        tokio::spawn(async move {
            let mut stop = self.stop.subscribe();
            tokio::select! {
                biased;
                _ = async { stop.wait_for(|stop| *stop).await.is_ok() } => {}
                () = evicted.notified() => debug!(%remote, EVICTED),
                () = self.clone().respond(socket, remote, slot, tls) => {}
            }
            drop(live);
        });
    }

    /// An accepted stream from first to last octet. Until the prefix is whole nobody hears of it.
    async fn respond(
        self: Arc<Self>,
        socket: TcpStream,
        remote: SocketAddr,
        slot: StrangerSlot,
        tls: Option<Arc<TlsServer>>,
    ) {
        let accepted = Instant::now();
        let deadline = accepted + self.limits.first_message;
        let opening = async {
            socket::prepare(&socket, &self.limits)?;
            let local = socket.local_addr()?;
            let socket = match &tls {
                None => Duplex::Plain(socket),
                Some(tls) => Duplex::Tls(Box::new(TlsStream::from(tls.acceptor.accept(socket).await?))),
            };
            Ok::<_, io::Error>((socket, local))
        };
        let (mut socket, local) = match timeout_at(deadline, opening).await {
            Ok(Ok(opened)) => opened,
            Ok(Err(error)) => return debug!(%remote, %error, "no stream"),
            Err(_) => return debug!(%remote, "no TLS in time"),
        };
        let mut deframer = Deframer::expecting_prefix();
        let wrong = match timeout_at(deadline, reader::read_prefix(socket.whole(), &mut deframer)).await {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some("nothing in time".to_owned()),
        };
        if let Some(reason) = wrong {
            debug!(%remote, reason, "no stream prefix");
            if let Some(web) = tls.and_then(|tls| tls.web) {
                drop(slot);
                self.visit(socket, remote, std::mem::take(deframer.buffer()), web).await;
            }
            return;
        }
        let number = self.next_accepted.fetch_add(1, Ordering::Relaxed);
        let evicted = slot.evicted();
        let Some(ends) = self.register(number, Some(slot), tls.is_some()) else { return };
        // From here on the table ends it, by its phase, and not the future that we run in.
        let established = Established {
            number,
            socket,
            local,
            remote,
            deframer,
            accepted: Some((accepted, deadline)),
            evicted: Some(evicted),
        };
        let live = self.live();
        tokio::spawn(async move {
            let started = self.clone().start(established, ends).await;
            self.supervise(started, number, live);
        });
    }

    /// Whoever speaks no IKE in TLS came for the web server.
    async fn visit(&self, mut socket: Duplex, remote: SocketAddr, said: BytesMut, web: SocketAddr) {
        let Some(slot) = StrangerSlot::take(&self.visitors, remote.ip()) else {
            return debug!(%remote, "too many visitors of the web server");
        };
        let evicted = slot.evicted();
        let passing = async {
            let mut server = timeout(WEB, TcpStream::connect(web)).await??;
            server.write_all(&said).await?;
            drop(said);
            tokio::io::copy_bidirectional(socket.whole(), &mut server).await
        };
        tokio::select! {
            () = evicted.notified() => debug!(%remote, "others take a visitor's place"),
            passed = passing => if let Err(error) = passed { debug!(%remote, %web, %error, "web server") },
        }
    }

    /// Connects a stream that we open and starts its tasks.
    async fn originate(
        self: Arc<Self>,
        number: u64,
        Way { local, remote, dscp, tls, proxy }: Way,
        mut ends: Ends,
    ) -> Result<Running, String> {
        let connect = async {
            let first = match &proxy {
                None => remote,
                Some(proxy) => proxy::resolve(proxy, local).await?,
            };
            let mut socket = socket::connect(local, first, dscp, self.prepare.as_ref()).await?;
            socket::prepare(&socket, &self.limits)?;
            let local = socket.local_addr()?;
            if proxy.is_some() {
                proxy::connect(&mut socket, remote).await?;
            }
            let socket = match tls {
                None => Duplex::Plain(socket),
                Some(TlsClient { connector, name }) => {
                    Duplex::Tls(Box::new(TlsStream::from(connector.connect(name, socket).await?)))
                }
            };
            Ok::<_, io::Error>((socket, local))
        };
        let connect = async {
            timeout(self.limits.connect, connect).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
        };
        let connected = tokio::select! {
            biased;
            () = closing(&mut ends.phase) => return Err("closed while connecting".into()),
            connected = connect => connected,
        };
        match connected {
            Ok((socket, local)) => {
                let deframer = Deframer::without_prefix();
                self.start(Established { number, socket, local, remote, deframer, accepted: None, evicted: None }, ends)
                    .await
            }
            Err(error) => Err(format!("connect: {error}")),
        }
    }

    /// Tells of a stream and starts its tasks; whoever runs them to the end gets the reason of that.
    async fn start(self: Arc<Self>, established: Established, mut ends: Ends) -> Result<Running, String> {
        let Established { number, socket, local, remote, mut deframer, accepted, evicted } = established;
        let (read_half, write_half, gate) = socket.split(deframer.buffer(), accepted.is_none());
        if let Some(entry) = self.table().streams.get_mut(&number) {
            entry.gate = gate;
        }
        let opened = StreamEvent::Opened {
            stream: number,
            local,
            remote,
            accepted: accepted.is_some(),
            esp: ends.queue.sender(),
        };
        tokio::select! {
            biased;
            sent = self.events.send(opened) => if sent.is_err() { return Err("nobody listens to events".into()) },
            () = closing(&mut ends.phase) => return Err("closed by this side".into()),
        }
        let accepted = accepted.map(|(at, deadline)| (at, deadline.max(Instant::now() + GRACE)));

        let phase = ends.phase.clone();
        let mut halves = JoinSet::new();
        let reader = Reader {
            number,
            local,
            remote,
            socket: read_half,
            deframer,
            inner: self.clone(),
            phase: ends.phase.clone(),
            standing: ends.standing,
            accepted,
        };
        let writer = Writer {
            number,
            socket: write_half,
            prefix: accepted.is_none(),
            marked: 0,
            queue: ends.queue,
            seal: self.seal.get().cloned(),
            phase: ends.phase,
            patience: self.limits.write,
        };
        halves.spawn(async move { Half::Read(reader.run().await) });
        halves.spawn(async move { Half::Written(writer.run().await) });
        Ok(Running { halves, phase, evicted })
    }

    /// Waits for a stream's end, in a task of its own: what led to its beginning was larger, and is over.
    fn supervise(self: Arc<Self>, started: Result<Running, String>, number: u64, live: Live) {
        tokio::spawn(async move {
            let reason = match started {
                Ok(running) => running.end(self.limits.write).await,
                Err(reason) => reason,
            };
            self.ended(number, reason).await;
            drop(live);
        });
    }

    /// Forgets a stream and says so.
    async fn ended(&self, number: u64, reason: String) {
        self.table().streams.remove(&number);
        debug!(stream = number, reason, "stream closed");
        let mut stop = self.stop.subscribe();
        tokio::select! {
            biased;
            _ = self.events.send(StreamEvent::Closed { stream: number, reason }) => {}
            _ = async { stop.wait_for(|stop| *stop).await.is_ok() } => {}
        }
    }
}

/// Counts a stream while it lives.
struct Live(Arc<Inner>);

impl Drop for Live {
    fn drop(&mut self) {
        self.0.live.send_modify(|count| *count = count.saturating_sub(1));
    }
}

async fn accept_loop(inner: Arc<Inner>, listener: TcpListener, tls: Option<Arc<TlsServer>>) {
    let mut pause = ACCEPT_PAUSE.0;
    loop {
        match listener.accept().await {
            Ok((socket, remote)) => {
                pause = ACCEPT_PAUSE.0;
                trace!(%remote, "stream accepted");
                inner.clone().admit(socket, remote, tls.clone());
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            // Descriptors or memory ran out: the connection stays in the backlog until some are free.
            Err(error) => {
                warn!(%error, ?pause, "cannot accept streams");
                sleep(pause).await;
                pause = (pause * 2).min(ACCEPT_PAUSE.1);
            }
        }
    }
}

/// Resolves when the stream is to be closed in whatever way.
async fn closing(phase: &mut watch::Receiver<Phase>) {
    let _ = phase.wait_for(|phase| *phase != Phase::Open).await;
}

async fn told(evicted: Option<Arc<Notify>>) {
    match evicted {
        Some(evicted) => evicted.notified().await,
        None => std::future::pending().await,
    }
}

async fn kill_reason(phase: &mut watch::Receiver<Phase>) -> &'static str {
    match phase.wait_for(|phase| matches!(phase, Phase::Killed(_))).await.as_deref() {
        Ok(Phase::Killed(reason)) => reason,
        Ok(Phase::Open | Phase::Draining) | Err(_) => "closed by this side",
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod tls_tests;
