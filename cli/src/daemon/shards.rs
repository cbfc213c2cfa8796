//! The engine's shards (`ike::engine`): each has a task of its own, its queue, and does by itself what its engine wants and nobody
//! else has to know: sending, computing, looking up. The rest goes to the core, in order.
//!
//! **Who waits for whom.** A shard's engine is behind a lock, which its task holds while it works off its queue, and the core for
//! one call of a command. Nobody waits for anything else while holding it: what goes to a shard or to the core goes into a queue
//! without an end, and whoever fills one looks at its length first. Messages of the network find at most [`MOST_WAITING`] before
//! them and are dropped otherwise, those of streams hold their readers back; a shard whose outputs the core has not carried out
//! pauses before its next message. So the shards wait for the core, and the core waits for no shard but for a call's time: there
//! is no circle. Whoever holds the locks of several shards, which only the core does, takes them in order.
//!
//! **Order.** What the engine wants is passed on while its lock is held, so it is seen in the engine's order by whoever it is for.
//! A datagram does not overtake what the core has to do with the data plane before it, such as removing a Child SA whose Delete it
//! answers.

use std::net::SocketAddr;
use std::num::NonZero;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use espintcp::streams::{Complaint, StreamEvent, Streams};
use ike::engine::{
    ChildReady, ChildSaId, ChildState, Dispatch, Engine, Event, Gateway, IkeSaId, IkeSaStatus, Initiate, Job, JobId,
    JobOutcome, Judgement, NoSuchSa, Note, Output, Path, Route, RouteQuery, Target, TlsPeer, Transmit, Transport,
};
use ipsec::plane::{PlaneEvent, StreamId};
use ipsec::selector::Flow;
use kernel::network::{Network, NetworkEvent};
use pad::Credentials;
use tokio::sync::{Notify, Semaphore, mpsc};
use tokio::task::JoinSet;

use super::redirect;
use super::run::SystemRng;

/// Octets of datagrams, and of what streams say, that may wait for one shard.
const MOST_WAITING: usize = 4 << 20;

/// The same of hints and changes of path, which may be lost.
const MOST_HINTS: usize = 256 << 10;

/// What each of them counts for beside its length.
const OVERHEAD: usize = 256;

/// Outputs of one shard that may wait for the core before the shard pauses.
const MOST_UNDONE: usize = 1024;

/// What a shard takes from its queue in one turn before timers get theirs.
const BUDGET: usize = 64;

/// Shards by default: as many as there are processors, up to so many.
const MOST_BY_DEFAULT: usize = 16;

/// So long between two lines about messages that were dropped.
const COMPLAINT_INTERVAL: Duration = Duration::from_secs(10);

/// Events for the core that the network may be ahead of it.
const EVENTS: usize = 64;

/// How many shards there are, and threads that do ESP, if nothing else is configured.
pub(super) fn by_default() -> usize {
    std::thread::available_parallelism().map_or(1, NonZero::get).min(MOST_BY_DEFAULT)
}

/// What a shard's engine wants of the core.
#[derive(Debug)]
pub(super) enum Wanted {
    /// Send this: something of the data plane goes before it.
    Transmit(Transmit),
    Install(JobId, Box<ChildReady>),
    SeenTraffic(JobId, Vec<u32>),
    Event(Event),
    OpenStream {
        stream: StreamId,
        local: SocketAddr,
        remote: SocketAddr,
        dscp: u8,
        tls: Option<TlsPeer>,
        /// A web proxy, host and port.
        proxy: Option<String>,
    },
    CloseStream(StreamId),
    Initiate(Box<Initiate>),
}

impl Wanted {
    /// True when no datagram may be sent before it is done.
    pub(super) fn comes_first(&self) -> bool {
        match self {
            Self::Transmit(_) | Self::CloseStream(_) => true,
            Self::Event(event) => match event {
                Event::ChildDown { .. } | Event::ChildRetired { .. } | Event::Migrate { .. } | Event::IkeDown(..) => {
                    true
                }
                Event::IkeUp(_)
                | Event::IkeRekeyed { .. }
                | Event::Assigned(..)
                | Event::ChildUp(..)
                | Event::ChildRekeyed { .. }
                | Event::Failed { .. }
                | Event::Done { .. }
                | Event::Log { .. } => false,
            },
            Self::Install(..) | Self::SeenTraffic(..) | Self::OpenStream { .. } | Self::Initiate(_) => false,
        }
    }
}

/// Something for the core, and which shard it is from.
#[derive(Debug)]
pub(super) struct FromShard {
    pub(super) shard: usize,
    pub(super) wanted: Wanted,
}

/// What a shard is told.
enum Input {
    Message { path: Path, bytes: Vec<u8> },
    Job(JobId, JobOutcome),
    Note(Note),
    Plane(PlaneEvent),
    Unreachable(SocketAddr),
    StreamOpened { stream: StreamId, local: SocketAddr },
    StreamClosed { stream: StreamId, reason: Arc<str> },
}

/// What may be dropped or has to wait.
#[derive(Clone, Copy)]
enum Bounded {
    Datagram,
    Stream,
    /// Another path of authentic ESP: a peer can show one with each packet.
    Change,
    /// What others say of the network, without proof.
    Hint,
}

impl Bounded {
    /// Octets that may wait.
    fn most(self) -> usize {
        match self {
            Self::Datagram | Self::Stream => MOST_WAITING,
            Self::Change | Self::Hint => MOST_HINTS,
        }
    }
}

/// Something in a shard's queue, and for how many octets it counts there.
struct Queued {
    counts: Option<(Bounded, usize)>,
    input: Input,
}

impl From<Input> for Queued {
    fn from(input: Input) -> Self {
        Self { counts: None, input }
    }
}

/// What the shards need of the world.
#[derive(Clone)]
pub(super) struct World {
    pub(super) network: Network,
    pub(super) streams: Streams,
    /// A permit for each key exchange or puzzle that may be computed at a time.
    processors: Arc<Semaphore>,
    to_core: mpsc::UnboundedSender<FromShard>,
}

/// What a shard's lock protects.
struct Inner {
    engine: Engine,
    credentials: Arc<Credentials>,
}

struct Shard {
    number: usize,
    inner: Mutex<Inner>,
    queue: mpsc::UnboundedSender<Queued>,
    /// Octets of each kind in the queue.
    datagrams: AtomicUsize,
    messages: AtomicUsize,
    changes: AtomicUsize,
    hints: AtomicUsize,
    /// Outputs that the core has not carried out, and those of them before which nothing may be sent.
    undone: AtomicUsize,
    first: AtomicUsize,
    dropped: AtomicU64,
    /// Calls of the core that wait for the lock: they go first.
    calls: AtomicUsize,
    /// Its task shall look again: at its timers, or whether the core has caught up.
    wake: Notify,
    /// There is room for messages of streams.
    room: Notify,
}

/// All shards.
#[derive(Clone)]
pub(super) struct Shards {
    all: Arc<[Arc<Shard>]>,
    dispatch: Dispatch,
    world: World,
    /// The next one without a reason to prefer another.
    turn: Arc<AtomicUsize>,
}

/// What comes to the core.
pub(super) struct ToCore {
    pub(super) wanted: mpsc::UnboundedReceiver<FromShard>,
    /// Of the network what is not the shards'.
    pub(super) network: mpsc::Receiver<NetworkEvent>,
    /// Ends if one of the tasks does, which is an error or the network's end.
    pub(super) tasks: JoinSet<()>,
}

impl Shards {
    /// Starts a task for each engine, and those that read the network and the streams. The engines are one
    /// ([`Engine::shards`]).
    pub(super) fn start(
        engines: Vec<Engine>,
        (network, from_network): (Network, mpsc::Receiver<NetworkEvent>),
        (streams, from_streams): (Streams, mpsc::Receiver<StreamEvent>),
    ) -> (Self, ToCore) {
        let (to_core, wanted) = mpsc::unbounded_channel();
        let processors = Arc::new(Semaphore::new(std::thread::available_parallelism().map_or(1, NonZero::get)));
        let world = World { network, streams, processors, to_core };
        let dispatch = Dispatch::new(engines.len(), &mut SystemRng);
        let (mut all, mut queues) = (Vec::new(), Vec::new());
        for (number, engine) in engines.into_iter().enumerate() {
            let (queue, receiver) = mpsc::unbounded_channel();
            queues.push(receiver);
            all.push(Arc::new(Shard::new(number, engine, queue)));
        }
        let shards = Self { all: all.into(), dispatch, world, turn: Arc::default() };
        let mut tasks = JoinSet::new();
        for (shard, queue) in shards.all.iter().zip(queues) {
            tasks.spawn(work(shards.clone(), Arc::clone(shard), queue));
        }
        let (others, network) = mpsc::channel(EVENTS);
        tasks.spawn(read_network(shards.clone(), from_network, others));
        tasks.spawn(read_streams(shards.clone(), from_streams));
        (shards, ToCore { wanted, network, tasks })
    }

    pub(super) fn world(&self) -> &World {
        &self.world
    }

    // Calls of the core.

    /// Calls a shard's engine, and passes on what it wants.
    fn with<T>(&self, shard: &Shard, call: impl FnOnce(&mut Engine) -> T) -> T {
        let mut inner = shard.call();
        let before = inner.engine.next_timeout();
        let result = call(&mut inner.engine);
        self.drain(shard, &mut inner);
        let after = inner.engine.next_timeout();
        drop(inner);
        if after.is_some_and(|after| before.is_none_or(|before| after < before)) {
            shard.wake.notify_one();
        }
        result
    }

    /// Changes all engines at once: nothing is judged by the new and by the old at the same time.
    pub(super) fn change(&self, mut change: impl FnMut(&mut Engine, Option<&Engine>, &mut Arc<Credentials>)) {
        let mut locked: Vec<MutexGuard<'_, Inner>> = self.all.iter().map(|shard| shard.call()).collect();
        let Some((first, others)) = locked.split_first_mut() else { return };
        let Inner { engine, credentials } = &mut **first;
        change(engine, None, credentials);
        for other in others {
            let Inner { engine, credentials } = &mut **other;
            change(engine, Some(&first.engine), credentials);
        }
        for (shard, inner) in self.all.iter().zip(&mut locked) {
            self.drain(shard, inner);
        }
    }

    /// Asks one of the engines what they all know alike.
    pub(super) fn ask<T>(&self, question: impl FnOnce(&mut Engine) -> T) -> Option<T> {
        self.all.first().map(|shard| self.with(shard, question))
    }

    fn of_ike_sa(&self, id: IkeSaId) -> Option<&Shard> {
        self.all.get(self.dispatch.of_ike_sa(id)).map(AsRef::as_ref)
    }

    fn of_child_sa(&self, id: ChildSaId) -> Option<&Shard> {
        self.all.get(self.dispatch.of_child_sa(id)).map(AsRef::as_ref)
    }

    fn of_target(&self, target: Target) -> Option<&Shard> {
        match target {
            Target::Ike(id) => self.of_ike_sa(id),
            Target::Child(id) => self.of_child_sa(id),
        }
    }

    /// True when there is no IKE SA left, and all that was wanted of the core is in its queue.
    pub(super) fn are_empty(&self) -> bool {
        self.counts().0 == 0 && self.all.iter().all(|shard| shard.call().engine.counts().0 == 0)
    }

    /// IKE SAs in all, and those half-open.
    pub(super) fn counts(&self) -> (usize, usize) {
        self.all.first().map(|shard| shard.call().engine.counts()).unwrap_or_default()
    }

    /// Attempts of ours that are under way.
    pub(super) fn initiating(&self) -> usize {
        self.all.iter().map(|shard| shard.call().engine.initiating()).sum()
    }

    pub(super) fn is_initiating(&self, connection: &str) -> bool {
        self.all.iter().any(|shard| shard.call().engine.is_initiating(connection))
    }

    pub(super) fn ike_sa(&self, id: IkeSaId) -> Option<IkeSaStatus> {
        self.of_ike_sa(id)?.call().engine.ike_sa(id, Instant::now())
    }

    /// The first IKE SAs of a connection, or of all, above this number; in order.
    pub(super) fn ike_sas_after(&self, connection: Option<&str>, after: IkeSaId, most: usize) -> Vec<IkeSaId> {
        let mut ids = Vec::new();
        for shard in self.all.iter() {
            ids.extend(shard.call().engine.ike_sas_after(connection, after).take(most));
        }
        ids.sort_unstable();
        ids.truncate(most);
        ids
    }

    pub(super) fn is_of(&self, id: IkeSaId, connection: &str) -> bool {
        self.of_ike_sa(id).is_some_and(|shard| shard.call().engine.is_of(id, connection))
    }

    pub(super) fn owner(&self, child: ChildSaId) -> Option<IkeSaId> {
        self.of_child_sa(child)?.call().engine.owner(child)
    }

    pub(super) fn child_state(&self, child: ChildSaId) -> Option<ChildState> {
        self.of_child_sa(child)?.call().engine.child_state(child)
    }

    pub(super) fn terminate(&self, target: Target, force: bool, token: u64) -> Result<(), NoSuchSa> {
        let shard = self.of_target(target).ok_or(NoSuchSa)?;
        self.with(shard, |engine| engine.terminate(Instant::now(), target, force, token))
    }

    pub(super) fn review(&self, id: IkeSaId) {
        if let Some(shard) = self.of_target(Target::Ike(id)) {
            self.with(shard, |engine| engine.review(Instant::now(), id));
        }
    }

    pub(super) fn rekey(&self, target: Target, token: u64) -> Result<(), NoSuchSa> {
        let shard = self.of_target(target).ok_or(NoSuchSa)?;
        self.with(shard, |engine| engine.rekey(Instant::now(), target, token))
    }

    pub(super) fn reauthenticate(&self, id: IkeSaId, token: u64) -> Result<(), NoSuchSa> {
        let shard = self.of_ike_sa(id).ok_or(NoSuchSa)?;
        self.with(shard, |engine| engine.reauthenticate(Instant::now(), id, token))
    }

    pub(super) fn redirect(&self, id: IkeSaId, gateway: Gateway, token: u64) -> Result<(), NoSuchSa> {
        let shard = self.of_ike_sa(id).ok_or(NoSuchSa)?;
        self.with(shard, |engine| engine.redirect(Instant::now(), id, gateway, token))
    }

    /// Initiates at the shard whose IKE SA serves, or at any. Only the core initiates, one after the other.
    pub(super) fn initiate(&self, request: Initiate, packet: Option<Flow>) {
        let Some(shard) = self.for_initiation(&request) else { return };
        self.with(shard, |engine| match packet {
            Some(packet) => engine.initiate_for_packet(Instant::now(), request, packet),
            None => engine.initiate(Instant::now(), request),
        });
    }

    /// The same of what a shard asks for.
    pub(super) fn initiate_again(&self, request: Initiate) {
        let Some(shard) = self.for_initiation(&request) else { return };
        self.with(shard, |engine| engine.handle_initiate(Instant::now(), request));
    }

    fn for_initiation(&self, request: &Initiate) -> Option<&Shard> {
        let serving = self.all.iter().find(|shard| shard.call().engine.serves(request));
        let any = || {
            let turn = self.turn.fetch_add(1, Ordering::Relaxed);
            self.all.get(turn.checked_rem(self.all.len())?)
        };
        serving.or_else(any).map(AsRef::as_ref)
    }

    /// Addresses or routes of this host have changed, or we begin.
    pub(super) fn roam(&self, addresses: &[std::net::IpAddr]) {
        for shard in self.all.iter() {
            self.with(shard, |engine| {
                let changed = engine.set_local_addresses(addresses.to_vec());
                engine.handle_roam(Instant::now(), changed);
            });
        }
    }

    // Answers of the core.

    /// The answer to a job.
    pub(super) fn answer(&self, shard: usize, job: JobId, outcome: JobOutcome) {
        if let Some(shard) = self.all.get(shard) {
            shard.tell(Input::Job(job, outcome));
        }
    }

    /// A stream could not even be tried.
    pub(super) fn stream_failed(&self, shard: usize, stream: StreamId, reason: &str) {
        if let Some(shard) = self.all.get(shard) {
            shard.tell(Input::StreamClosed { stream, reason: reason.into() });
        }
    }

    /// The core has done something that a shard wanted.
    pub(super) fn done(&self, shard: usize, came_first: bool) {
        let Some(shard) = self.all.get(shard) else { return };
        if came_first {
            shard.first.fetch_sub(1, Ordering::AcqRel);
        }
        if shard.undone.fetch_sub(1, Ordering::AcqRel) == MOST_UNDONE / 2 {
            shard.wake.notify_one();
        }
    }

    // What the shards do.

    /// Works off a part of a shard's queue, and what is due.
    fn turn(&self, shard: &Shard, first: Option<Queued>, queue: &mut mpsc::UnboundedReceiver<Queued>) {
        let mut inner = shard.lock();
        let (mut next, mut budget) = (first, BUDGET);
        while let Some(queued) = next {
            inner.handle(Instant::now(), shard.take(queued));
            self.drain(shard, &mut inner);
            budget -= 1;
            let goes_on = budget > 0 && shard.undone.load(Ordering::Acquire) <= MOST_UNDONE;
            next = if goes_on { queue.try_recv().ok() } else { None };
        }
        let now = Instant::now();
        if inner.engine.next_timeout().is_some_and(|due| due <= now) {
            inner.engine.handle_timeout(now);
        }
        self.drain(shard, &mut inner);
    }

    /// Passes on what an engine wants, while its lock is held.
    fn drain(&self, shard: &Shard, inner: &mut Inner) {
        while let Some(output) = inner.engine.poll_output() {
            match output {
                Output::Transmit(transmit) if shard.first.load(Ordering::Acquire) == 0 => {
                    self.world.transmit(&transmit)
                }
                Output::Transmit(transmit) => self.want(shard, Wanted::Transmit(transmit)),
                Output::Job(job, Job::Sign(request)) => {
                    let credentials = Arc::clone(&inner.credentials);
                    shard.spawn_job(job, move || JobOutcome::Sign(credentials.sign(&request)));
                }
                Output::Job(job, Job::Authenticate(request)) => {
                    let credentials = Arc::clone(&inner.credentials);
                    shard.spawn_job(job, move || {
                        JobOutcome::Authenticate(credentials.authenticate(&request, unix_time()))
                    });
                }
                Output::Job(job, Job::EapServer(server, packet)) => {
                    let credentials = Arc::clone(&inner.credentials);
                    shard.spawn_job(job, move || JobOutcome::EapServer(credentials.eap_server(*server, &packet)));
                }
                Output::Job(job, Job::EapPeer(peer, packet)) => {
                    let credentials = Arc::clone(&inner.credentials);
                    shard.spawn_job(job, move || JobOutcome::EapPeer(credentials.eap_peer(*peer, &packet)));
                }
                Output::Job(job, Job::KeyExchange(work)) => {
                    self.compute(shard, job, move || JobOutcome::KeyExchange(work.run(&mut SystemRng)));
                }
                Output::Job(job, Job::SolvePuzzle(puzzle)) => {
                    self.compute(shard, job, move || JobOutcome::SolvePuzzle(puzzle.solve()));
                }
                Output::Job(job, Job::FindRoutes(query)) => {
                    let routes = self.world.find_routes(&query);
                    inner.engine.handle_job(Instant::now(), job, JobOutcome::FindRoutes(routes));
                }
                Output::Job(job, Job::Resolve(gateway)) => {
                    let (network, queue) = (self.world.network.clone(), shard.queue.clone());
                    tokio::spawn(async move {
                        let outcome = JobOutcome::Resolve(redirect::resolve(gateway, &network).await);
                        let _ = queue.send(Input::Job(job, outcome).into());
                    });
                }
                Output::Job(job, Job::InstallChild(ready)) => self.want(shard, Wanted::Install(job, ready)),
                Output::Job(job, Job::SeenTraffic(spis)) => self.want(shard, Wanted::SeenTraffic(job, spis)),
                Output::Event(event) => self.want(shard, Wanted::Event(event)),
                Output::OpenStream { stream, local, remote, dscp, tls, proxy } => {
                    self.want(shard, Wanted::OpenStream { stream, local, remote, dscp, tls, proxy });
                }
                Output::CloseStream(stream) => self.want(shard, Wanted::CloseStream(stream)),
                Output::Judgement(stream, judgement) => self.world.judge(stream, judgement),
                Output::Note(note) => self.pass(shard, note),
                Output::Initiate(request) => self.want(shard, Wanted::Initiate(request)),
            }
        }
    }

    fn want(&self, shard: &Shard, wanted: Wanted) {
        shard.undone.fetch_add(1, Ordering::AcqRel);
        if wanted.comes_first() {
            shard.first.fetch_add(1, Ordering::AcqRel);
        }
        // The core outlives the shards but for the daemon's end.
        let _ = self.world.to_core.send(FromShard { shard: shard.number, wanted });
    }

    /// What one shard says to another, or to all others.
    fn pass(&self, from: &Shard, note: Note) {
        match note.ike_sa() {
            Some(id) => {
                if let Some(shard) = self.of_ike_sa(id) {
                    shard.tell(Input::Note(note));
                }
            }
            // A hint that anybody can give.
            None => self.tell_others(Some(from.number), || Input::Note(note)),
        }
    }

    /// Tells all shards but one what may be lost.
    fn tell_others(&self, but: Option<usize>, input: impl Fn() -> Input) {
        for shard in self.all.iter().filter(|shard| Some(shard.number) != but) {
            shard.offer(Bounded::Hint, input());
        }
    }

    /// As many at a time as there are processors: it is all computing, and the rest of the pool stays free.
    fn compute(&self, shard: &Shard, job: JobId, work: impl FnOnce() -> JobOutcome + Send + 'static) {
        let (queue, processors) = (shard.queue.clone(), Arc::clone(&self.world.processors));
        tokio::spawn(async move {
            // The semaphore is never closed.
            let Ok(permit) = processors.acquire_owned().await else { return };
            tokio::task::spawn_blocking(move || {
                let outcome = work();
                drop(permit);
                let _ = queue.send(Input::Job(job, outcome).into());
            });
        });
    }
}

impl Shard {
    fn new(number: usize, engine: Engine, queue: mpsc::UnboundedSender<Queued>) -> Self {
        Self {
            number,
            inner: Mutex::new(Inner { engine, credentials: Arc::new(Credentials::default()) }),
            queue,
            datagrams: AtomicUsize::new(0),
            messages: AtomicUsize::new(0),
            changes: AtomicUsize::new(0),
            hints: AtomicUsize::new(0),
            undone: AtomicUsize::new(0),
            first: AtomicUsize::new(0),
            dropped: AtomicU64::new(0),
            calls: AtomicUsize::new(0),
            wake: Notify::new(),
            room: Notify::new(),
        }
    }

    /// For a call of the core. The task, which may have a queue that is never empty, lets it go first.
    fn call(&self) -> MutexGuard<'_, Inner> {
        self.calls.fetch_add(1, Ordering::AcqRel);
        let inner = self.lock();
        self.calls.fetch_sub(1, Ordering::AcqRel);
        inner
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // A shard that panicked ends the daemon; until that is seen, its engine is as good as what it last did.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts into the queue what must not be lost. There are only so many: answers to jobs, and what is said of SAs and of the
    /// streams that we open.
    fn tell(&self, input: Input) {
        // Its task ends with the daemon.
        let _ = self.queue.send(input.into());
    }

    /// Puts into the queue what anybody can send, if there is room.
    fn offer(&self, kind: Bounded, input: Input) -> Option<Input> {
        let octets = OVERHEAD
            + match &input {
                Input::Message { bytes, .. } => bytes.len(),
                Input::StreamClosed { reason, .. } => reason.len(),
                _ => 0,
            };
        let (waiting, most) = (self.waiting(kind), kind.most());
        if waiting.fetch_add(octets, Ordering::AcqRel) >= most {
            waiting.fetch_sub(octets, Ordering::AcqRel);
            return Some(input);
        }
        let _ = self.queue.send(Queued { counts: Some((kind, octets)), input });
        None
    }

    /// Puts what a stream says into the queue, and waits until there is room. The peer can say as much as it likes, open and
    /// close as often as it likes, and none of it may be lost.
    async fn bring(&self, input: Input) {
        let mut next = self.offer(Bounded::Stream, input);
        while let Some(input) = next {
            self.room.notified().await;
            next = self.offer(Bounded::Stream, input);
        }
    }

    /// It is no longer in the queue.
    fn take(&self, queued: Queued) -> Input {
        if let Some((kind, octets)) = queued.counts {
            self.waiting(kind).fetch_sub(octets, Ordering::AcqRel);
        }
        queued.input
    }

    fn waiting(&self, kind: Bounded) -> &AtomicUsize {
        match kind {
            Bounded::Datagram => &self.datagrams,
            Bounded::Stream => &self.messages,
            Bounded::Change => &self.changes,
            Bounded::Hint => &self.hints,
        }
    }

    fn spawn_job(&self, job: JobId, work: impl FnOnce() -> JobOutcome + Send + 'static) {
        let queue = self.queue.clone();
        tokio::task::spawn_blocking(move || {
            // Its task outlives jobs except at shutdown, when nobody wants the answer.
            let _ = queue.send(Input::Job(job, work()).into());
        });
    }
}

impl Inner {
    fn handle(&mut self, now: Instant, input: Input) {
        let engine = &mut self.engine;
        match input {
            Input::Message { path, bytes } => engine.handle_message(now, path, &bytes),
            Input::Job(job, outcome) => engine.handle_job(now, job, outcome),
            Input::Note(note) => engine.handle_note(now, note),
            Input::Plane(PlaneEvent::Expire { spi_in, hard }) => engine.handle_expire(now, spi_in, hard),
            Input::Plane(PlaneEvent::MappingChanged { spi_in, remote }) => {
                engine.handle_mapping_changed(now, spi_in, remote);
            }
            Input::Plane(PlaneEvent::StreamChanged { spi_in, stream, local, remote }) => {
                let path = Path { local, remote, transport: Transport::Stream(stream) };
                engine.handle_stream_changed(now, spi_in, path);
            }
            Input::Plane(PlaneEvent::UnknownSpi { spi, remote }) => engine.handle_unknown_spi(now, remote, spi),
            Input::Plane(PlaneEvent::InvalidSelectors { spi_in, start }) => {
                engine.handle_invalid_selectors(now, spi_in, &start);
            }
            // The core's.
            Input::Plane(PlaneEvent::Acquire { .. }) => {}
            Input::Unreachable(remote) => engine.handle_unreachable(now, remote),
            Input::StreamOpened { stream, local } => engine.handle_stream_opened(now, stream, local),
            Input::StreamClosed { stream, reason } => engine.handle_stream_closed(now, stream, &reason),
        }
    }
}

impl World {
    pub(super) fn transmit(&self, Transmit { path, dscp, bytes }: &Transmit) {
        let sent = match path.transport {
            Transport::Udp => self.network.send_ike(path.local, path.remote, false, *dscp, bytes),
            Transport::UdpEncap => self.network.send_ike(path.local, path.remote, true, *dscp, bytes),
            Transport::Stream(stream) => {
                self.streams.mark(stream.0, *dscp);
                if !self.streams.send_ike(stream.0, bytes) {
                    tracing::debug!(stream = stream.0, "a message for a stream that is closed or full was dropped");
                }
                Ok(())
            }
        };
        if let Err(error) = sent {
            tracing::debug!(local = %path.local, remote = %path.remote, %error, "sending failed");
        }
    }

    fn judge(&self, stream: StreamId, judgement: Judgement) {
        match judgement {
            Judgement::Authentic => self.streams.vouch(stream.0),
            Judgement::Unparsable => self.streams.complain(stream.0, Complaint::Unparsable),
            Judgement::UnknownSpi => self.streams.complain(stream.0, Complaint::UnknownSpi),
            Judgement::Forged => self.streams.complain(stream.0, Complaint::Unauthentic),
        }
    }

    fn find_routes(&self, query: &RouteQuery) -> Vec<Route> {
        let found = self.network.address_pairs(query.local, &query.remotes);
        let pairs = found.unwrap_or_else(|error| {
            tracing::error!(%error, "the ways to a peer cannot be looked up");
            Vec::new()
        });
        pairs.into_iter().map(|pair| Route { local: pair.local, remote: pair.remote, direct: pair.direct }).collect()
    }
}

/// A shard's task.
async fn work(shards: Shards, shard: Arc<Shard>, mut queue: mpsc::UnboundedReceiver<Queued>) {
    loop {
        while shard.undone.load(Ordering::Acquire) > MOST_UNDONE {
            shard.wake.notified().await;
        }
        let idle = Instant::now() + Duration::from_secs(3600);
        let due = shard.lock().engine.next_timeout().unwrap_or(idle);
        let next = tokio::select! {
            queued = queue.recv() => match queued {
                Some(queued) => Some(queued),
                None => return,
            },
            () = shard.wake.notified() => None,
            () = tokio::time::sleep_until(due.into()) => None,
        };
        while shard.calls.load(Ordering::Acquire) > 0 {
            tokio::task::yield_now().await;
        }
        shards.turn(&shard, next, &mut queue);
        shard.room.notify_one();
        // Others have the processor, too.
        tokio::task::yield_now().await;
    }
}

/// Brings what the network says to the shards, and the rest to the core.
async fn read_network(
    shards: Shards,
    mut from_network: mpsc::Receiver<NetworkEvent>,
    others: mpsc::Sender<NetworkEvent>,
) {
    let mut complained: Option<Instant> = None;
    while let Some(event) = from_network.recv().await {
        match event {
            NetworkEvent::Ike { local, remote, encapsulated, bytes } => {
                let transport = if encapsulated { Transport::UdpEncap } else { Transport::Udp };
                let path = Path { local, remote, transport };
                let Some(shard) = shards.all.get(shards.dispatch.of_message(&path, &bytes)) else { continue };
                if shard.offer(Bounded::Datagram, Input::Message { path, bytes }).is_some() {
                    let dropped = shard.dropped.fetch_add(1, Ordering::Relaxed) + 1;
                    if complained.is_none_or(|at| at.elapsed() >= COMPLAINT_INTERVAL) {
                        complained = Some(Instant::now());
                        let shard = shard.number;
                        tracing::warn!(shard, dropped, "IKE messages come faster than they can be served: dropped");
                    }
                }
            }
            NetworkEvent::Plane(event @ PlaneEvent::UnknownSpi { spi, remote }) => {
                tracing::debug!(spi = format_args!("{spi:08x}"), %remote, "ESP with an unknown SPI");
                shards.tell_others(None, || Input::Plane(event.clone()));
            }
            NetworkEvent::Plane(event @ PlaneEvent::Expire { spi_in, .. }) => {
                if let Some(shard) = shards.all.get(shards.dispatch.of_child_spi(spi_in)) {
                    shard.tell(Input::Plane(event));
                }
            }
            NetworkEvent::Plane(
                event @ (PlaneEvent::MappingChanged { spi_in, .. }
                | PlaneEvent::StreamChanged { spi_in, .. }
                | PlaneEvent::InvalidSelectors { spi_in, .. }),
            ) => {
                if let Some(shard) = shards.all.get(shards.dispatch.of_child_spi(spi_in)) {
                    shard.offer(Bounded::Change, Input::Plane(event));
                }
            }
            NetworkEvent::Unreachable { remote } => shards.tell_others(None, || Input::Unreachable(remote)),
            event @ (NetworkEvent::Plane(PlaneEvent::Acquire { .. }) | NetworkEvent::Roamed) => {
                // The core waits for nobody who waits for this.
                if others.send(event).await.is_err() {
                    return;
                }
            }
        }
    }
}

/// Brings what streams say to the shards. A full one holds the streams' readers back: TCP repeats nothing for us.
async fn read_streams(shards: Shards, mut from_streams: mpsc::Receiver<StreamEvent>) {
    while let Some(event) = from_streams.recv().await {
        match event {
            StreamEvent::Opened { stream, local, accepted, esp, .. } => {
                shards
                    .world
                    .network
                    .attach_stream(StreamId(stream), Box::new(move |flow, packet| esp.send(flow, packet)));
                if !accepted && let Some(shard) = shards.all.get(shards.dispatch.of_stream(StreamId(stream))) {
                    shard.tell(Input::StreamOpened { stream: StreamId(stream), local });
                }
            }
            StreamEvent::Ike { stream, local, remote, bytes } => {
                let path = Path { local, remote, transport: Transport::Stream(StreamId(stream)) };
                let Some(shard) = shards.all.get(shards.dispatch.of_message(&path, &bytes)) else { continue };
                shard.bring(Input::Message { path, bytes }).await;
            }
            StreamEvent::Closed { stream, reason } => {
                shards.world.network.detach_stream(StreamId(stream));
                let reason: Arc<str> = reason.into();
                for shard in shards.all.iter() {
                    shard.bring(Input::StreamClosed { stream: StreamId(stream), reason: Arc::clone(&reason) }).await;
                }
            }
        }
    }
}

/// Seconds since the Unix epoch, for certificates' validity.
pub(super) fn unix_time() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs())
}

#[cfg(test)]
mod tests {
    use ike::engine::EngineConfig;

    use super::*;

    fn shard() -> (Shard, mpsc::UnboundedReceiver<Queued>) {
        let (queue, receiver) = mpsc::unbounded_channel();
        let engine = Engine::new(EngineConfig::default(), Box::new(SystemRng), Instant::now());
        (Shard::new(0, engine, queue), receiver)
    }

    fn message(octets: usize) -> Input {
        let end = "192.0.2.1:500".parse().unwrap();
        let path = Path { local: end, remote: end, transport: Transport::Udp };
        Input::Message { path, bytes: vec![0; octets] }
    }

    // Whatever anybody sends: a queue has an end, one kind does not take another's room, and what must not be lost finds its place.
    #[test]
    fn a_queue_has_an_end_for_each_kind() {
        let (shard, mut queue) = shard();
        let mut taken = 0;
        while shard.offer(Bounded::Datagram, message(60_000)).is_none() {
            taken += 1;
            assert!(taken < 1000, "no end");
        }
        assert_eq!(taken, MOST_WAITING.div_ceil(60_000 + OVERHEAD));
        assert!(shard.offer(Bounded::Stream, message(100)).is_none());
        let hint = || Input::Unreachable("192.0.2.1:500".parse().unwrap());
        let hints = (0..100_000).take_while(|_| shard.offer(Bounded::Hint, hint()).is_none()).count();
        assert_eq!(hints, MOST_HINTS / OVERHEAD);
        let remote = "192.0.2.1:4500".parse().unwrap();
        let change = || Input::Plane(PlaneEvent::MappingChanged { spi_in: 256, remote });
        let changes = (0..100_000).take_while(|_| shard.offer(Bounded::Change, change()).is_none()).count();
        assert_eq!(changes, hints);
        shard.tell(Input::Plane(PlaneEvent::Expire { spi_in: 256, hard: true }));
        // Short ones count as well.
        let (other, _queue) = self::shard();
        let short = (0..1_000_000).take_while(|_| other.offer(Bounded::Datagram, message(0)).is_none()).count();
        assert_eq!(short, MOST_WAITING / OVERHEAD);
        // What is taken makes room.
        let mut rest = 0;
        while let Ok(queued) = queue.try_recv() {
            shard.take(queued);
            rest += 1;
        }
        assert_eq!(rest, taken + 1 + hints + changes + 1);
        for kind in [Bounded::Datagram, Bounded::Stream, Bounded::Change, Bounded::Hint] {
            assert_eq!(shard.waiting(kind).load(Ordering::Relaxed), 0);
        }
        assert!(shard.offer(Bounded::Datagram, message(60_000)).is_none());
    }

    // RFC 9329 §10: a peer opens and closes streams as fast as it can, and its news wait in the streams, not here.
    #[tokio::test]
    async fn news_of_closed_streams_wait_for_room() {
        let (shard, mut queue) = shard();
        let shard = Arc::new(shard);
        let closed = |stream| Input::StreamClosed { stream: StreamId(stream), reason: "the peer closed it".into() };
        let fits = (0..1_000_000).take_while(|stream| shard.offer(Bounded::Stream, closed(*stream)).is_none()).count();
        assert!((1000..=MOST_WAITING / OVERHEAD).contains(&fits), "{fits}");
        let bringing = tokio::spawn({
            let (shard, last) = (Arc::clone(&shard), closed(u64::MAX));
            async move { shard.bring(last).await }
        });
        // A turn that makes no room changes nothing.
        for _ in 0..3 {
            shard.room.notify_one();
            tokio::task::yield_now().await;
        }
        assert!(!bringing.is_finished() && queue.len() == fits);
        // Others are not held up by it.
        assert!(shard.offer(Bounded::Datagram, message(100)).is_none());
        shard.take(queue.try_recv().unwrap());
        shard.room.notify_one();
        bringing.await.unwrap();
        let mut last = None;
        while let Ok(queued) = queue.try_recv() {
            last = Some(shard.take(queued));
        }
        assert!(matches!(last, Some(Input::StreamClosed { stream: StreamId(u64::MAX), .. })));
        assert_eq!(shard.waiting(Bounded::Stream).load(Ordering::Relaxed), 0);
    }

    #[test]
    fn what_concerns_the_data_plane_comes_before_datagrams() {
        let retired = Event::ChildRetired { spi_in: 256 };
        assert!(Wanted::Event(retired).comes_first() && Wanted::CloseStream(StreamId(1)).comes_first());
        assert!(!Wanted::Event(Event::IkeUp(IkeSaId(1))).comes_first());
        assert!(!Wanted::SeenTraffic(JobId(1), Vec::new()).comes_first());
    }
}
