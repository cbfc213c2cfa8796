//! An authenticated IKE SA: its tasks, timers and end. Its exchanges are in `created`, `rekey` and
//! `informational`.
//!
//! Invariants: it exists only with a [`PeerIdentity`]; `exchanges` says which requests of ours are out, never more than the
//! peer's window has room for (RFC 7296 §2.3); at most one request of the peer is being answered, others wait in `inbox`.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipsec::plane::StreamId;
use ipsec::transform::{Ke, Protocol};
use pad::PeerIdentity;

use super::basis::Basis;
use super::channel::{Channel, Received};
use super::child::{ChildOffer, ChildSa, Parent, rekey_at};
use super::children::Children;
use super::configuration;
use super::crash::TokenTaker;
use super::exchanges::Exchange;
use super::fault::{Fault, notify};
use super::followup::HalfMade;
use super::message_id_sync::MessageIdSync;
use super::mobility::{Errand, Mission, Mobility};
use super::parts::Parts;
use super::redirect::Moving;
use super::rekey::IkeOffer;
use super::retry::{Retry, after, back_off, random_below, total};
use super::succession::Successor;
use super::tickets::SessionTicket;
use super::transports::Transports;
use super::{Core, Want};
use crate::config::{Child, Connection, Unique};
use crate::counters::Counter;
use crate::engine::context::{Context, PeerKey};
use crate::engine::{
    ChildSaId, ChildState, CloseReason, Event, Gateway, IkeSaId, IkeSaStatus, IkeState, Job, JobId, JobOutcome,
    Judgement, NoSuchSa, Path, Transport,
};
use crate::wire::{ExchangeType, Notify, NotifyType, Opened, Payload, Protected};

/// How often a task is tried again with another key exchange method, and a new Child SA after TEMPORARY_FAILURE.
pub(crate) const MAX_TRIES: u8 = 8;
/// First wait before a broken stream is opened again.
pub(super) const RECONNECT_FIRST: Duration = Duration::from_millis(500);
/// How long answers but the last one are kept for repetitions at least: longer than any peer repeats a request.
const ANSWERS_KEPT: Duration = Duration::from_secs(600);
/// The peer is told about message IDs ahead of the window, and unknown SPIs, no more often than this.
const COMPLAINT_INTERVAL: Duration = Duration::from_secs(10);
/// Longest wait.
pub(super) const RECONNECT_LONGEST: Duration = Duration::from_secs(16);
/// How often the TCP Originator asks a cluster whether it lives, where nothing else is configured.
const CLUSTER_LIVENESS: Duration = Duration::from_secs(30);

/// The IKE SA is gone: its events are out, the caller drops it.
#[derive(Debug)]
pub(crate) struct Closed;

/// How an IKE SA came to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Initiator,
    Responder { initial_contact: bool },
}

pub(crate) struct Established {
    pub(crate) core: Core,
    pub(crate) channel: Channel,
    pub(super) connection: Arc<Connection>,
    pub(super) peer: Arc<PeerIdentity>,
    /// Of the IKE SA whose IKE_AUTH proved who the peer is. Successors by rekeying have the same, resumed ones none.
    pub(super) channel_binding: Option<[u8; 32]>,
    /// Likewise ([`crate::engine::ChildReady::endpoint_keys`]).
    pub(super) endpoint_keys: Option<Box<[[u8; 32]; 2]>>,
    /// What the tables know the peer by.
    pub(crate) key: PeerKey,
    /// What the peer's proof rests on.
    pub(super) basis: Arc<Basis>,
    pub(super) state: IkeState,
    since: Instant,
    pub(super) children: Children,
    pub(super) queue: VecDeque<Task>,
    pub(super) delayed: Vec<(Instant, Task)>,
    pub(super) exchanges: Vec<Exchange>,
    pub(super) passive: Option<Box<Passive>>,
    /// Requests of the peer that wait for the answer to an earlier one, and the paths that they came along.
    inbox: Vec<(Path, Opened)>,
    /// When the peer was told last that something is wrong with what it sends.
    complained_at: Option<Instant>,
    /// Our window is to be said with the next INFORMATIONAL message.
    pub(super) announces_window: bool,
    /// What the peer's CREATE_CHILD_SA asks for, while key exchanges are missing.
    pub(super) half_made: Option<Box<HalfMade>>,
    /// The peer rekeys the Child SA that we are rekeying (RFC 7296 §2.8.1).
    pub(super) collision: Option<Collision>,
    /// The peer rekeyed this IKE SA while our own rekey of it is under way (RFC 7296 §2.8.2).
    pub(super) peers_successor: Option<Box<Successor>>,
    /// The peer's Delete of this IKE SA is answered when our own rekey's last key is there (RFC 7296 §2.8.2).
    pub(super) delete_waits: bool,
    /// SPIs that the peer deleted while our CREATE_CHILD_SA was out: it may have made that very Child SA.
    pub(super) deleted_early: Vec<u32>,
    pub(super) last_inbound: Instant,
    /// The question for ESP that is out, and how long ago is lately.
    traffic_asked: Option<(JobId, Duration)>,
    last_outbound: Instant,
    /// Where the request came from that is being answered.
    pub(super) reply_path: Path,
    pub(super) rekey_at: Option<Instant>,
    pub(super) reauth_at: Option<Instant>,
    pub(super) expire_at: Option<Instant>,
    /// When what the peer proved is too old, however often the IKE SA is rekeyed.
    proof_ends_at: Option<Instant>,
    pub(super) reauthenticating: bool,
    /// It goes when another one has taken its place.
    pub(super) makes_first: bool,
    /// The peer refused a rekey with NO_ADDITIONAL_SAS, and we can make another IKE SA (RFC 7296 §4).
    pub(super) rekeyless: bool,
    /// How often that was tried in vain, or reauthentication was.
    pub(super) replacement_tries: u8,
    /// We initiated the IKE SA that this one succeeds, in the end: we authenticated first.
    pub(super) original_initiator: bool,
    /// The peer sends us to another gateway (RFC 5685).
    pub(super) moving: Option<Moving>,
    pub(super) crash_tokens: TokenTaker,
    pub(super) message_id_sync: MessageIdSync,
    pub(super) ticket: SessionTicket,
    stream: StreamState,
    pub(super) transports: Transports,
    pub(super) mobility: Mobility,
}

/// Work that needs an exchange of ours.
#[derive(Clone, Debug)]
pub(crate) enum Task {
    CreateChild {
        config: Arc<Child>,
        token: Option<u64>,
        group: Option<Ke>,
        tries: u8,
    },
    RekeyChild {
        id: ChildSaId,
        token: Option<u64>,
        group: Option<Ke>,
        tries: u8,
    },
    RekeyIke {
        token: Option<u64>,
        group: Option<Ke>,
        tries: u8,
    },
    DeleteChild {
        id: ChildSaId,
        token: Option<u64>,
        reason: CloseReason,
    },
    /// A Child SA that the peer has and we do not.
    DeleteSpi(u32),
    DeleteIke {
        token: Option<u64>,
        reason: CloseReason,
    },
    /// Tell the peer something that its answer says nothing about.
    Inform(Vec<Payload>),
    /// Ask for a ticket (RFC 5723).
    RequestTicket,
    /// Send the peer to another gateway.
    Redirect {
        gateway: Gateway,
        token: u64,
    },
    Liveness,
    Mobility(Errand),
    /// Does UDP work again?
    ProbeUdp,
}

/// The exchange of ours that is going on.
pub(crate) enum Active {
    Create { offer: Box<ChildOffer>, token: Option<u64>, tries: u8 },
    Install { child: Box<ChildSa>, replaces: Option<ChildSaId>, job: JobId, token: Option<u64> },
    RekeyIke(Box<IkeOffer>),
    DeleteChild { id: ChildSaId, token: Option<u64>, reason: CloseReason },
    DeleteSpi(u32),
    DeleteIke { tokens: Vec<u64>, reason: CloseReason },
    Inform,
    RequestTicket,
    Redirect { token: u64 },
    Liveness,
    Mobility(Box<Mission>),
    ProbeUdp,
}

/// The peer's request for a Child SA, which is being installed before we answer.
pub(crate) struct Passive {
    pub(super) child: Box<ChildSa>,
    pub(super) replaces: Option<ChildSaId>,
    pub(super) job: JobId,
    /// It lost against our rekey of the same Child SA: the peer will delete it.
    pub(super) redundant: bool,
    /// Payloads of the answer whatever comes: our proof in IKE_AUTH.
    pub(super) head: Vec<Payload>,
    /// Payloads that say yes.
    pub(super) payloads: Vec<Payload>,
}

/// Both sides rekey one Child SA at once.
pub(crate) struct Collision {
    pub(super) old: ChildSaId,
    pub(super) theirs: ChildSaId,
    pub(super) lowest_nonce: Vec<u8>,
}

/// Of an IKE SA's stream, if it uses one.
enum StreamState {
    /// Up, or there is none.
    Up,
    /// Broken; the peer has to open another.
    Lost,
    /// Broken; we open another.
    Reopening { stream: Option<StreamId>, at: Instant, wait: Duration, deadline: Instant },
}

impl Established {
    /// The one way to an established IKE SA other than rekeying one: with the peer's proved identity.
    #[allow(clippy::too_many_arguments, reason = "what a half-open IKE SA becomes")]
    pub(crate) fn new(
        ctx: &mut Context,
        now: Instant,
        core: Core,
        mut channel: Channel,
        connection: Arc<Connection>,
        peer: Arc<PeerIdentity>,
        basis: Arc<Basis>,
        role: Role,
    ) -> Self {
        channel.open_window();
        let line = format!(
            "IKE_SA {}[{}] established between {}[{}]...{}[{}]",
            core.name,
            core.id.0,
            core.path.local.ip(),
            peer.local_id,
            core.path.remote.ip(),
            peer.ike_id()
        );
        ctx.log("IKE", 0, core.tag(), line);
        let mut sa = Self::make(ctx, now, core, channel, connection, peer, basis);
        sa.original_initiator = role == Role::Initiator;
        sa.supersede(ctx, role);
        // Whatever ticket was left of an earlier IKE SA, this one gets its own.
        ctx.shared.tickets.lock().drop_held(&sa.core.name, sa.core.path.remote.ip());
        ctx.event(Event::IkeUp(sa.core.id));
        sa
    }

    /// The successor of a rekeyed IKE SA: same peer, same connection, same path.
    pub(super) fn successor(&mut self, ctx: &mut Context, now: Instant, id: IkeSaId, channel: Channel) -> Self {
        self.drop_half_made(ctx, now, true);
        let core = Core { id, ..self.core.clone() };
        let mut new = self.twin(ctx, now, core, channel);
        new.mobility = self.mobility.inherit();
        new.transports = self.transports.inherit();
        self.transports = self.transports.for_the_end();
        new.message_id_sync = self.message_id_sync.inherit();
        new.ticket = self.ticket.inherit();
        // RFC 5723 §6.2: the ticket of an IKE SA goes with its keys.
        self.withdraw_ticket(ctx);
        self.ticket = SessionTicket::default();
        // Reauthentication is due when it was: rekeying proves nothing about the peer.
        new.reauth_at = self.reauth_at;
        new.proof_ends_at = self.proof_ends_at;
        self.hand_reauthentication_on(ctx, &mut new);
        new.expire_at = [new.expire_at, new.proof_ends_at].into_iter().flatten().min();
        new.children = std::mem::take(&mut self.children);
        new.queue = std::mem::take(&mut self.queue);
        new.delayed = std::mem::take(&mut self.delayed);
        new.rekeyed_already(ctx);
        if self.channel.window() > 1 {
            // §2.3: the window is one again until that is said anew. To other peers it makes no difference.
            new.announces_window = true;
        }
        if !matches!(self.stream, StreamState::Up) {
            new.stream = std::mem::replace(&mut self.stream, StreamState::Lost);
        }
        for child in new.children.iter() {
            ctx.child_owners.insert(child.id, id);
            ctx.child_spis.insert(child.spi_in, id);
        }
        // A peer whose IKE SA it was has it without interruption. One that has to go meanwhile is gone as this one.
        if self.peer_key().is_some() && !ctx.shared.peers.succeed(&self.key, self.core.id, id) {
            ctx.superseded.push(id);
        }
        ctx.shared.pools.lock().inherit(self.core.id, id);
        let by_us = new.channel.initiator;
        new.channel.count(if by_us { Counter::IkeRekeyInit } else { Counter::IkeRekeyResp });
        self.become_rekeyed();
        let line = format!("IKE_SA {}[{}] rekeyed, successor is [{}]", self.core.name, self.core.id.0, id.0);
        ctx.log("IKE", 0, self.core.tag(), line);
        ctx.event(Event::IkeRekeyed { old: self.core.id, new: id });
        new
    }

    /// Another IKE SA with the same peer, connection and path, and without Child SAs.
    pub(super) fn twin(&self, ctx: &mut Context, now: Instant, core: Core, channel: Channel) -> Self {
        let (connection, peer, basis) = (self.connection.clone(), self.peer.clone(), self.basis.clone());
        let mut twin = Self::make(ctx, now, core, channel, connection, peer, basis);
        twin.key = self.key.clone();
        twin.channel_binding = self.channel_binding;
        twin.endpoint_keys.clone_from(&self.endpoint_keys);
        twin.channel.fragmentation = self.channel.fragmentation;
        twin.mobility = self.mobility.for_the_end();
        twin
    }

    /// Its predecessor's wish to be rekeyed has come true.
    fn rekeyed_already(&mut self, ctx: &mut Context) {
        let mut wishes = Vec::new();
        let mut keep = |task: &Task| match task {
            Task::RekeyIke { token, .. } => {
                wishes.push(*token);
                false
            }
            _ => true,
        };
        self.queue.retain(&mut keep);
        self.delayed.retain(|(_, task)| keep(task));
        wishes.into_iter().for_each(|token| done(ctx, token));
    }

    fn make(
        ctx: &mut Context,
        now: Instant,
        core: Core,
        mut channel: Channel,
        connection: Arc<Connection>,
        peer: Arc<PeerIdentity>,
        basis: Arc<Basis>,
    ) -> Self {
        channel.forget_proof_keys();
        if ctx.judge.is_some() && basis.epoch != ctx.shared.tickets.lock().epoch() {
            ctx.unreviewed.push(core.id);
        }
        // Neither a ticket nor what follows makes a proof younger.
        let proved_at = if basis.resumed { basis.proved_at } else { now };
        let rekey = rekey_at(now, connection.rekey_time, connection.rand_time, ctx.rng.as_mut());
        let reauth = rekey_at(proved_at, connection.reauth_time, connection.rand_time, ctx.rng.as_mut());
        let longest = connection.rekey_time.max(connection.reauth_time);
        let hard = longest.saturating_add(connection.over_time);
        let proof_ends_at = (!connection.reauth_time.is_zero() && !connection.over_time.is_zero())
            .then(|| after(proved_at, connection.reauth_time.saturating_add(connection.over_time)));
        let expire_at = (!longest.is_zero() && !connection.over_time.is_zero()).then(|| after(now, hard));
        let proof = proof_ends_at.filter(|_| basis.resumed);
        let expire_at = [expire_at, proof].into_iter().flatten().min();
        Self {
            reply_path: core.path,
            core,
            channel,
            connection,
            key: PeerKey::of(&peer),
            peer,
            basis,
            channel_binding: None,
            endpoint_keys: None,
            state: IkeState::Established,
            since: now,
            children: Children::default(),
            queue: VecDeque::new(),
            delayed: Vec::new(),
            exchanges: Vec::new(),
            passive: None,
            inbox: Vec::new(),
            complained_at: None,
            announces_window: false,
            half_made: None,
            collision: None,
            peers_successor: None,
            delete_waits: false,
            deleted_early: Vec::new(),
            last_inbound: now,
            traffic_asked: None,
            last_outbound: now,
            rekey_at: rekey,
            reauth_at: reauth,
            expire_at,
            proof_ends_at,
            reauthenticating: false,
            makes_first: false,
            rekeyless: false,
            replacement_tries: 0,
            original_initiator: false,
            moving: None,
            crash_tokens: TokenTaker::default(),
            message_id_sync: MessageIdSync::default(),
            ticket: SessionTicket::default(),
            stream: StreamState::Up,
            transports: Transports::default(),
            mobility: Mobility::default(),
        }
    }

    /// Names the IKE SAs of the same peer that have to go (RFC 7296 §2.4, `unique`). Both identities are
    /// proved, and by what the same entry demands, so a peer can only end its own.
    fn supersede(&self, ctx: &mut Context, role: Role) {
        let contact = role == Role::Responder { initial_contact: true };
        let go = match self.connection.unique {
            Unique::Never => false,
            Unique::No | Unique::Keep => contact,
            // As charon: where both sides initiate at once, each as initiator would end the other one's.
            Unique::Replace => matches!(role, Role::Responder { .. }),
        };
        if !go {
            return;
        }
        // A peer that initiates while we do says INITIAL_CONTACT without knowing that ours came up: it is told, or it would
        // keep an IKE SA that nobody has. A peer that restarted takes no notice.
        ctx.take_over(&self.key, self.core.id);
    }

    // Getters.

    pub(crate) fn child_state(&self, child: ChildSaId) -> Option<ChildState> {
        self.children.get(child).map(|child| child.state)
    }

    pub(crate) fn peer_key(&self) -> Option<PeerKey> {
        match self.state {
            IkeState::Established | IkeState::Rekeying => Some(self.key.clone()),
            IkeState::Created | IkeState::Connecting | IkeState::Rekeyed | IkeState::Deleting => None,
        }
    }

    /// True when an IKE SA that a request asks for is this one. One that an earlier definition of the connection
    /// admitted is not: its peer need not be whom the connection names now.
    pub(crate) fn serves(&self, connection: &Connection, remote: std::net::IpAddr) -> bool {
        !self.makes_first
            && self.peer_key().is_some()
            && self.connection.authenticates_as(connection)
            && (self.core.path.remote.ip() == remote || self.core.redirects.came_from(remote))
    }

    /// The stream that it uses, or waits for.
    pub(crate) fn live_stream(&self) -> Option<(StreamId, bool)> {
        if let Some(beside) = self.transports.stream() {
            return Some((beside, true));
        }
        match (&self.stream, self.core.path.transport) {
            (StreamState::Reopening { stream, .. }, _) => stream.map(|stream| (stream, true)),
            (StreamState::Up, Transport::Stream(stream)) => Some((stream, self.core.stream_originator)),
            (StreamState::Up | StreamState::Lost, _) => None,
        }
    }

    pub(crate) fn next_timeout(&self, ctx: &Context) -> Option<Instant> {
        let reopening = match &self.stream {
            StreamState::Reopening { stream: None, at, deadline, .. } => Some((*at).min(*deadline)),
            StreamState::Reopening { deadline, .. } => Some(*deadline),
            StreamState::Up | StreamState::Lost => None,
        };
        let own = [
            self.channel.next_timeout().filter(|_| !self.mobility.is_stranded()),
            self.rekey_at,
            self.reauth_at,
            self.expire_at,
            self.liveness_at(ctx),
            self.keepalive_at(ctx),
            reopening,
            self.half_made.as_ref().and_then(|half| half.until()),
            self.transports_timeout(),
        ];
        let children = self.children.iter().flat_map(|child| {
            // A Child SA that is on its way out has one timer, its end.
            let live = child.is_live();
            [
                child.rekey_at.filter(|_| live),
                child.expire_at.filter(|_| child.down_at.is_none()),
                child.down_at.map(|(at, _)| at),
            ]
        });
        let delayed = self.delayed.iter().map(|(at, _)| Some(*at));
        own.into_iter().chain(children).chain(delayed).flatten().min()
    }

    pub(crate) fn status(&self, now: Instant) -> IkeSaStatus {
        let in_time = |at: Option<Instant>| at.map(|at| at.saturating_duration_since(now));
        IkeSaStatus {
            id: self.core.id,
            connection: self.core.name.to_string(),
            state: self.state,
            path: self.core.path,
            local_id: Some(self.peer.local_id.clone()),
            remote_id: Some(self.peer.ike_id().clone()),
            peer: Some(Arc::clone(&self.peer)),
            initiator: self.channel.initiator,
            initiator_spi: self.channel.spis.initiator,
            responder_spi: self.channel.spis.responder,
            nat_local: self.core.nat.local,
            nat_remote: self.core.nat.remote,
            nat_fake: self.core.nat.fake,
            suite: Some(self.channel.suite),
            established: Some(now.saturating_duration_since(self.since)),
            rekey_in: in_time(self.rekey_at),
            reauth_in: in_time(self.reauth_at),
            assigned: self.core.assigned.clone(),
            resumed: self.basis.resumed,
            tasks_active: self.going_on().map(Active::name).collect(),
            children: self.children.iter().map(|child| child.status(now)).collect(),
        }
    }

    pub(super) fn parent(&self, now: Instant) -> Parent<'_> {
        Parent {
            core: &self.core,
            prf: self.channel.suite.prf,
            d: &self.channel.d,
            peer: &self.peer,
            channel_binding: self.channel_binding,
            endpoint_keys: self.endpoint_keys.as_deref().copied(),
            now,
        }
    }

    /// Gives back the room that tasks and messages took, when there are none.
    pub(crate) fn rest(&mut self) {
        if !self.exchanges.is_empty() || !self.queue.is_empty() || self.passive.is_some() {
            return;
        }
        self.exchanges.shrink_to_fit();
        self.queue.shrink_to_fit();
        self.delayed.shrink_to_fit();
        self.inbox.shrink_to_fit();
        self.deleted_early.shrink_to_fit();
        self.channel.rest();
    }

    // What comes from outside.

    pub(crate) fn handle_protected(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        path: Path,
        protected: Protected,
        datagram: &[u8],
    ) -> Result<(), Closed> {
        let Some(protected) = self.synchronize(ctx, now, path, protected)? else { return Ok(()) };
        match self.channel.receive(protected, datagram) {
            Received::Ignored => return Ok(()),
            Received::Forged => {
                ctx.judge(&path, Judgement::Forged);
                return Ok(());
            }
            Received::Awaited => {
                self.reply_path = self.reply_path.follow_stream(path);
                return Ok(());
            }
            Received::Repeated(datagrams) => {
                // Perhaps a replay: it gets its answer back and changes nothing here.
                self.core.send_along(ctx, path, datagrams);
                return Ok(());
            }
            Received::Request(opened) => {
                self.note_fresh(ctx, now, path);
                self.inbox.push((path, opened));
            }
            Received::Beyond(message_id) => self.complain(now, message_id),
            Received::Response(opened) => {
                self.note_fresh(ctx, now, path);
                self.note_answer(ctx, path);
                self.handle_response(ctx, now, &opened)?;
            }
        }
        self.pump(ctx, now)
    }

    /// Gives the outcome back where nothing here waits for it.
    pub(crate) fn handle_job(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        job: JobId,
        outcome: JobOutcome,
    ) -> Result<Option<JobOutcome>, Closed> {
        let result = match outcome {
            JobOutcome::InstallChild(result) => result,
            JobOutcome::FindRoutes(routes) => return self.handle_routes(ctx, now, job, routes).map(|()| None),
            JobOutcome::SeenTraffic(idle) => return self.traffic_seen(ctx, now, job, idle).map(|()| None),
            JobOutcome::Resolve(result) => return self.redirect_resolved(ctx, now, job, result).map(|()| None),
            JobOutcome::KeyExchange(result) => {
                self.key_work_done(ctx, now, job, result)?;
                self.delete_waited(ctx, now)?;
                self.pump(ctx, now)?;
                return Ok(None);
            }
            other @ (JobOutcome::Sign(_)
            | JobOutcome::Authenticate(_)
            | JobOutcome::EapServer(_)
            | JobOutcome::EapPeer(_)
            | JobOutcome::SolvePuzzle(_)) => {
                return Ok(Some(other));
            }
        };
        let ours = self.take_exchange(
            |exchange| matches!(&exchange.active, Active::Install { job: waiting, .. } if *waiting == job),
        );
        if let Some(Exchange { active: Active::Install { child, replaces, token, .. }, .. }) = ours {
            self.installed(ctx, now, child, replaces, token, result)?;
        } else if let Some(passive) = self.passive.take_if(|passive| passive.job == job) {
            self.answer_installed(ctx, now, *passive, result)?;
        } else {
            return Ok(Some(JobOutcome::InstallChild(result)));
        }
        if self.mobility.is_settled() {
            // It may have been negotiated before the IKE SA moved.
            self.move_children(ctx);
        }
        self.pump(ctx, now)?;
        Ok(None)
    }

    pub(crate) fn handle_timeout(&mut self, ctx: &mut Context, now: Instant) -> Result<(), Closed> {
        self.retransmit(ctx, now)?;
        self.reopen_timeout(ctx, now)?;
        self.handle_transports_timeout(ctx, now);
        if self.exchanges.is_empty() && now.saturating_duration_since(self.last_inbound) >= ANSWERS_KEPT {
            self.channel.forget_old_answers();
        }
        let due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        if due(self.expire_at) {
            if self.state == IkeState::Rekeyed {
                // Its successor lives: a Delete could reach a peer that has not heard of that.
                return Err(self.close(ctx, now, CloseReason::Rekeyed));
            }
            return Err(self.expire(ctx, now));
        }
        if self.rekeyless && self.children.iter().any(|child| child.is_live() && due(child.expire_at)) {
            return Err(self.expire(ctx, now));
        }
        if due(self.reauth_at) {
            self.reauth_at = None;
            self.reauthenticate(ctx);
        }
        if due(self.rekey_at) {
            self.rekey_at = None;
            self.queue.push_back(Task::RekeyIke { token: None, group: None, tries: 0 });
        }
        if due(self.half_made.as_ref().and_then(|half| half.until())) {
            ctx.log("IKE", 1, self.core.tag(), "the peer does not go on with its key exchanges".to_owned());
            self.drop_half_made(ctx, now, false);
        }
        self.child_timeouts(ctx, now);
        let (ready, later) = std::mem::take(&mut self.delayed).into_iter().partition(|(at, _)| *at <= now);
        self.delayed = later;
        let ready: Vec<(Instant, Task)> = ready;
        self.queue.extend(ready.into_iter().map(|(_, task)| task));
        if due(self.liveness_at(ctx)) {
            if matches!(self.stream, StreamState::Lost) {
                return Err(self.close(ctx, now, CloseReason::Timeout));
            }
            if let Some(lately) = self.liveness_interval() {
                self.check_liveness(ctx, lately);
            }
        }
        if due(self.keepalive_at(ctx)) {
            // RFC 3948 §2.3.
            self.last_outbound = now;
            self.core.send(ctx, [vec![0xff]]);
        }
        self.pump(ctx, now)
    }

    fn child_timeouts(&mut self, ctx: &mut Context, now: Instant) {
        let due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        let mut down = Vec::new();
        for child in self.children.iter_mut() {
            if let Some((at, reason)) = child.down_at {
                if at <= now {
                    down.push((child.id, reason));
                }
                continue;
            }
            if due(child.expire_at) {
                child.expire_at = None;
                child.rekey_at = None;
                match child.state {
                    // The peer made the successor, and did not delete this one.
                    ChildState::Rekeyed => {
                        let task = Task::DeleteChild { id: child.id, token: None, reason: CloseReason::Rekeyed };
                        self.queue.push_front(task);
                    }
                    ChildState::Deleting | ChildState::Deleted => {}
                    ChildState::Created | ChildState::Installing | ChildState::Installed | ChildState::Rekeying => {
                        if child.is_last {
                            let config = Arc::clone(&child.config);
                            self.queue.push_front(Task::CreateChild { config, token: None, group: None, tries: 0 });
                        }
                        let task = Task::DeleteChild { id: child.id, token: None, reason: CloseReason::Expired };
                        self.queue.push_front(task);
                    }
                }
            }
            if child.is_live() && due(child.rekey_at) {
                child.rekey_at = None;
                self.queue.push_back(Task::RekeyChild { id: child.id, token: None, group: None, tries: 0 });
            }
        }
        for (id, reason) in down {
            self.take_down(ctx, now, id, reason);
        }
    }

    /// A volume limit of a Child SA was reached.
    pub(crate) fn handle_expire(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        spi_in: u32,
        hard: bool,
    ) -> Result<(), Closed> {
        if let Some(child) = self.children.iter_mut().find(|child| child.spi_in == spi_in) {
            let (id, token) = (child.id, None);
            let rekeyed = child.state == ChildState::Rekeyed;
            if child.is_live() && !hard {
                child.rekey_at = None;
                self.queue.push_back(Task::RekeyChild { id, token, group: None, tries: 0 });
            } else if hard && child.is_live() && self.rekeyless {
                return Err(self.expire(ctx, now));
            } else if hard && (child.is_live() || rekeyed) {
                child.rekey_at = None;
                if child.is_last {
                    let config = Arc::clone(&child.config);
                    self.queue.push_front(Task::CreateChild { config, token: None, group: None, tries: 0 });
                }
                let reason = if rekeyed { CloseReason::Rekeyed } else { CloseReason::Expired };
                self.queue.push_front(Task::DeleteChild { id, token, reason });
            }
        }
        self.pump(ctx, now)
    }

    /// Asks the peer whether it lives, unless ESP shows that it did so lately (RFC 7296 §2.4).
    pub(super) fn check_liveness(&mut self, ctx: &mut Context, lately: Duration) {
        if self.traffic_asked.is_some() {
            return;
        }
        if self.children.is_empty() {
            self.queue.push_back(Task::Liveness);
            return;
        }
        let spis = self.children.iter().map(|child| child.spi_in).collect();
        self.traffic_asked = Some((ctx.job(self.core.id, Job::SeenTraffic(spis)), lately));
    }

    /// The answer to [`Job::SeenTraffic`].
    fn traffic_seen(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        job: JobId,
        idle: Option<Duration>,
    ) -> Result<(), Closed> {
        let Some((_, lately)) = self.traffic_asked.take_if(|(asked, _)| *asked == job) else { return Ok(()) };
        if let Some(at) = idle.and_then(|idle| now.checked_sub(idle)).filter(|_| self.mobility.is_settled()) {
            self.last_inbound = self.last_inbound.max(at);
        }
        let quiet = now.saturating_duration_since(self.last_inbound) >= lately;
        if quiet && self.exchanges.is_empty() && self.queue.is_empty() && self.is_current() {
            self.queue.push_back(Task::Liveness);
        }
        self.pump(ctx, now)
    }

    /// Authenticated ESP came from another source (RFC 7296 §2.23).
    pub(crate) fn handle_mapping_changed(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        remote: SocketAddr,
    ) -> Result<(), Closed> {
        self.last_inbound = now;
        let old = self.core.path;
        if !self.follows_peer() || old.transport != Transport::UdpEncap || old.remote == remote {
            return Ok(());
        }
        self.move_to(ctx, Path { remote, ..old });
        self.check_after_mapping_change(ctx, now, old)
    }

    pub(crate) fn handle_stream_opened(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        stream: StreamId,
        local: SocketAddr,
    ) -> Result<(), Closed> {
        if self.stream_beside_opened(ctx, stream, local) {
            return self.pump(ctx, now);
        }
        match &self.stream {
            StreamState::Reopening { stream: Some(waiting), .. } if *waiting == stream => {}
            StreamState::Reopening { .. } | StreamState::Up | StreamState::Lost => return Ok(()),
        }
        self.stream = StreamState::Up;
        self.move_to(ctx, Path { local, transport: Transport::Stream(stream), ..self.core.path });
        // RFC 9329 §6.1: the outstanding request goes again; without one an empty INFORMATIONAL shows the
        // peer where we are now.
        self.transports.request_is_settled();
        let outstanding = self.resend(ctx, now);
        self.greet_on_stream(outstanding);
        self.pump(ctx, now)
    }

    pub(crate) fn handle_stream_closed(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        stream: StreamId,
        reason: &str,
    ) -> Result<(), Closed> {
        if self.stream_beside_closed(now, stream) {
            return Ok(());
        }
        let failed = matches!(&self.stream, StreamState::Reopening { stream: Some(waiting), .. } if *waiting == stream);
        if failed && self.chooses_transport() && self.is_current() {
            ctx.log("NET", 1, self.core.tag(), format!("the TCP connection failed: {reason}, trying UDP"));
            let ends = (self.core.path.local.ip(), self.core.path.remote.ip());
            return self.leave_stream_for_udp(ctx, now, ends);
        }
        if let StreamState::Reopening { stream: waiting, at, wait, .. } = &mut self.stream {
            if *waiting == Some(stream) {
                *waiting = None;
                *at = after(now, *wait);
                *wait = wait.saturating_mul(2).min(RECONNECT_LONGEST);
            }
            return Ok(());
        }
        if self.core.path.transport != Transport::Stream(stream) {
            return Ok(());
        }
        ctx.log("NET", 1, self.core.tag(), format!("TCP connection lost: {reason}"));
        if !self.core.stream_originator {
            self.stream = StreamState::Lost;
            return Ok(());
        }
        if self.state == IkeState::Rekeyed {
            // Its successor reopens; a stream for a last delete is not worth it.
            return Err(self.close(ctx, now, CloseReason::Rekeyed));
        }
        let deadline = after(now, total(&ctx.config.retransmission));
        self.stream = StreamState::Reopening { stream: None, at: now, wait: RECONNECT_FIRST, deadline };
        self.reopen_timeout(ctx, now)
    }

    // Commands.

    /// Takes what was asked for while the IKE SA was not up.
    pub(crate) fn adopt_wants(&mut self, ctx: &mut Context, now: Instant, wants: Vec<Want>) -> Result<(), Closed> {
        for Want { child, token } in wants {
            match child {
                Some(config) => self.queue.push_back(Task::CreateChild { config, token, group: None, tries: 0 }),
                None => done(ctx, token),
            }
        }
        // In IKE_AUTH the first child comes before the rest; pumping happens after it.
        let _ = now;
        Ok(())
    }

    pub(crate) fn want(&mut self, ctx: &mut Context, now: Instant, want: Want) -> Result<(), Closed> {
        self.adopt_wants(ctx, now, vec![want])?;
        self.pump(ctx, now)
    }

    pub(crate) fn terminate(&mut self, ctx: &mut Context, now: Instant, force: bool, token: u64) -> Result<(), Closed> {
        // Whatever it was about to be replaced for: nobody wants it again.
        self.reauthenticating = false;
        if force {
            done(ctx, Some(token));
            return Err(self.farewell(ctx, now, CloseReason::Local));
        }
        let deleting = self.exchanges.iter_mut().find_map(|exchange| match &mut exchange.active {
            Active::DeleteIke { tokens, .. } => Some(tokens),
            _ => None,
        });
        if let Some(tokens) = deleting {
            tokens.push(token);
            return Ok(());
        }
        if self.state == IkeState::Rekeyed {
            // The peer deletes it; from us a Delete could end what it has not yet moved to the successor.
            done(ctx, Some(token));
            return Ok(());
        }
        self.drop_tasks(ctx, "the IKE_SA is being deleted");
        self.queue.push_front(Task::DeleteIke { token: Some(token), reason: CloseReason::Local });
        self.pump(ctx, now)
    }

    pub(crate) fn terminate_child(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        id: ChildSaId,
        force: bool,
        token: u64,
    ) -> Result<Result<(), NoSuchSa>, Closed> {
        let Some(child) = self.children.get(id) else { return Ok(Err(NoSuchSa)) };
        if force {
            let spi_in = child.spi_in;
            let told = matches!(child.state, ChildState::Deleting | ChildState::Deleted);
            self.take_down(ctx, now, id, CloseReason::Local);
            if !told {
                self.queue.push_front(Task::DeleteSpi(spi_in));
            }
            done(ctx, Some(token));
        } else {
            self.queue.push_front(Task::DeleteChild { id, token: Some(token), reason: CloseReason::Local });
        }
        self.pump(ctx, now)?;
        Ok(Ok(()))
    }

    /// A successor takes up the tasks of the IKE SA that it replaces.
    pub(crate) fn start_inherited(&mut self, ctx: &mut Context, now: Instant) -> Result<(), Closed> {
        self.renew_token(ctx);
        self.renew_ticket();
        self.resume_roaming(ctx);
        self.pump(ctx, now)
    }

    pub(crate) fn rekey(&mut self, ctx: &mut Context, now: Instant, token: u64) -> Result<(), Closed> {
        self.queue.push_back(Task::RekeyIke { token: Some(token), group: None, tries: 0 });
        self.pump(ctx, now)
    }

    pub(crate) fn rekey_child(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        id: ChildSaId,
        token: u64,
    ) -> Result<(), Closed> {
        self.queue.push_back(Task::RekeyChild { id, token: Some(token), group: None, tries: 0 });
        self.pump(ctx, now)
    }

    /// Ends it where its peer may not stay.
    pub(crate) fn review(&mut self, ctx: &mut Context, now: Instant) -> Result<(), Closed> {
        let reason = ctx.judge.as_ref().and_then(|judge| judge(&self.peer, &self.basis.intermediates));
        let Some(reason) = reason else { return Ok(()) };
        ctx.log("IKE", 0, self.core.tag(), format!("closing IKE_SA of '{}': {reason}", self.peer.id));
        // Nobody is to make it again.
        self.reauthenticating = false;
        Err(self.farewell(ctx, now, CloseReason::Local))
    }

    /// Another one of the same peer takes its place.
    pub(crate) fn superseded(&mut self, ctx: &mut Context, now: Instant) -> Result<(), Closed> {
        if self.peer_key().is_none() {
            // It is on its way out, or its successor goes.
            return Ok(());
        }
        if ctx.reauthentications.contains(self.core.id) {
            // It goes when the one that we make for it has everything; another shard does not know of that.
            ctx.shared.peers.enter(&self.key, self.core.id);
            return Ok(());
        }
        // Without INITIAL_CONTACT only `unique = replace` ends it.
        let replaced = self.connection.unique == Unique::Replace;
        Err(self.farewell(ctx, now, if replaced { CloseReason::Replaced } else { CloseReason::Restarted }))
    }

    /// Its ticket has made another one, so the peer has left this one (RFC 5723 §4.3.4).
    pub(crate) fn outlived(&mut self, ctx: &mut Context, now: Instant) -> Closed {
        self.close(ctx, now, CloseReason::Replaced)
    }

    // Tasks.

    /// Answers the peer's next request if none is being answered, and starts tasks that may go on now.
    pub(super) fn pump(&mut self, ctx: &mut Context, now: Instant) -> Result<(), Closed> {
        while let Some((path, opened)) = self.next_request() {
            self.reply_path = path;
            self.handle_request(ctx, now, &opened)?;
        }
        if !matches!(self.stream, StreamState::Up) {
            return Ok(());
        }
        self.send_unsent(ctx, now)?;
        while !self.yields_to_rekey()
            && let Some(task) = self.queue.pop_front()
        {
            if !self.may_begin(&task) {
                self.queue.push_front(task);
                break;
            }
            self.start(ctx, now, task)?;
        }
        Ok(())
    }

    /// The request that is to be answered now, if it was not begun with.
    fn next_request(&mut self) -> Option<(Path, Opened)> {
        let (_, waiting) = self.inbox.first()?;
        (self.channel.answering() == Some(waiting.header.message_id)).then(|| self.inbox.remove(0))
    }

    /// A request was ahead of our window (§2.3). It gets no answer; the peer hears of it now and then.
    fn complain(&mut self, now: Instant, message_id: u32) {
        if self.may_complain(now) {
            self.inform(notify(NotifyType::INVALID_MESSAGE_ID, message_id.to_be_bytes().to_vec()));
        }
    }

    /// ESP with an SPI that nobody knows came from where the peer may be, or from anybody (§1.5). The peer hears of it now and
    /// then, which shows whether it lives.
    pub(crate) fn handle_unknown_spi(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        remote: SocketAddr,
        spi: u32,
    ) -> Result<(), Closed> {
        // Others may be behind the same NAT.
        let known = self.core.path.remote;
        let from_peer = remote.ip() == known.ip() && (remote.port() == 0 || remote.port() == known.port());
        if !from_peer || !self.may_complain(now) {
            return self.handle_hint(ctx, now);
        }
        self.inform(notify(NotifyType::INVALID_SPI, spi.to_be_bytes().to_vec()));
        self.pump(ctx, now)
    }

    /// The peer sent what its SA is not for: it is told which, if so configured, and otherwise nobody is (RFC 4301 §5.2).
    pub(crate) fn handle_invalid_selectors(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        spi_in: u32,
        start: &[u8],
    ) -> Result<(), Closed> {
        if !ctx.config.invalid_selectors || !self.may_complain(now) {
            return Ok(());
        }
        self.inform(Payload::Notify(Notify {
            protocol: Protocol::ESP,
            spi: spi_in.to_be_bytes().to_vec(),
            kind: NotifyType::INVALID_SELECTORS,
            data: start.to_vec(),
        }));
        self.pump(ctx, now)
    }

    /// True where the peer may be told of something that is wrong with what it sends: not too often.
    fn may_complain(&mut self, now: Instant) -> bool {
        let lately = |at: Instant| now.saturating_duration_since(at) < COMPLAINT_INTERVAL;
        let may = self.state == IkeState::Established && !self.complained_at.is_some_and(lately);
        if may {
            self.complained_at = Some(now);
        }
        may
    }

    /// Tells the peer something, with what else it is to be told.
    pub(super) fn inform(&mut self, payload: Payload) {
        match self.queue.back_mut() {
            Some(Task::Inform(payloads)) => payloads.push(payload),
            _ => self.queue.push_back(Task::Inform(vec![payload])),
        }
    }

    fn start(&mut self, ctx: &mut Context, now: Instant, task: Task) -> Result<(), Closed> {
        let open = matches!(self.state, IkeState::Established);
        match task {
            Task::CreateChild { config, token, .. } if !open => {
                self.child_failed(ctx, token, &config.name, "the IKE_SA is closing");
                Ok(())
            }
            Task::CreateChild { config, token, group, tries } => {
                self.start_create(ctx, now, config, None, token, group, tries)
            }
            Task::RekeyChild { id, token, group, tries } => self.start_rekey_child(ctx, now, id, token, group, tries),
            Task::RekeyIke { token, .. } if !open => {
                failed(ctx, token, &self.core.name, None, "the IKE_SA is closing");
                Ok(())
            }
            // §2.25.2: not while the peer waits for a Child SA.
            Task::RekeyIke { .. } if self.passive.is_some() || self.half_made.is_some() => {
                self.delay(ctx, now, task);
                Ok(())
            }
            Task::RekeyIke { token, group, tries } => {
                self.start_rekey_ike(ctx, token, group, tries);
                Ok(())
            }
            Task::DeleteChild { id, token, reason } => self.start_delete_child(ctx, now, id, token, reason),
            Task::DeleteSpi(spi) => {
                let payload = Payload::Delete { protocol: Protocol::ESP, spis: vec![spi] };
                self.go_on_with(ctx, now, (Active::DeleteSpi(spi), None), ExchangeType::INFORMATIONAL, vec![payload])
            }
            Task::DeleteIke { token, reason } => {
                self.state = IkeState::Deleting;
                let line = format!("deleting IKE_SA {}[{}]", self.core.name, self.core.id.0);
                ctx.log("IKE", 0, self.core.tag(), line);
                let active = Active::DeleteIke { tokens: token.into_iter().collect(), reason };
                let payload = Payload::Delete { protocol: Protocol::IKE, spis: Vec::new() };
                self.go_on_with(ctx, now, (active, None), ExchangeType::INFORMATIONAL, vec![payload])
            }
            Task::Inform(mut payloads) => {
                payloads.extend(self.window_announcement());
                self.go_on_with(ctx, now, (Active::Inform, None), ExchangeType::INFORMATIONAL, payloads)
            }
            Task::RequestTicket if open => self.request_ticket(ctx, now),
            Task::RequestTicket => Ok(()),
            Task::Redirect { gateway, token } if open => self.start_redirect(ctx, now, &gateway, token),
            Task::Redirect { token, .. } => {
                failed(ctx, Some(token), &self.core.name, None, "the IKE_SA is closing");
                Ok(())
            }
            Task::Liveness => {
                ctx.log("IKE", 1, self.core.tag(), "sending DPD request".to_owned());
                let mut payloads = self.liveness_payloads();
                payloads.extend(self.window_announcement());
                self.go_on_with(ctx, now, (Active::Liveness, None), ExchangeType::INFORMATIONAL, payloads)
            }
            Task::Mobility(errand) => self.start_errand(ctx, now, errand),
            Task::ProbeUdp => self.start_udp_probe(ctx, now),
        }
    }

    /// Puts a task off until something of ours is over.
    pub(super) fn delay(&mut self, ctx: &mut Context, now: Instant, task: Task) {
        let wait = Duration::from_secs(1) + random_below(Duration::from_secs(4), ctx.rng.as_mut());
        self.delayed.push((after(now, wait), task));
    }

    /// Tries a task again that the peer refused (RFC 7296 §2.25): never at once, and less and less often.
    /// It was tried `tries` times, from 1.
    pub(super) fn try_again(&mut self, ctx: &mut Context, now: Instant, task: Task, tries: u8) {
        let wait = back_off(tries.saturating_sub(1), ctx.rng.as_mut());
        self.delayed.push((after(now, wait), task));
    }

    fn handle_response(&mut self, ctx: &mut Context, now: Instant, opened: &Opened) -> Result<(), Closed> {
        let parts = match Parts::of(opened) {
            Ok(parts) => parts,
            Err(fault) => {
                // Authentic and not understood: the two sides no longer agree on what is there (§2.21.3).
                ctx.log("ENC", 1, self.core.tag(), format!("response refused: {fault}"));
                return Err(self.farewell(ctx, now, CloseReason::Failed));
            }
        };
        self.note_window(&parts);
        let message_id = Some(opened.header.message_id);
        let Some(Exchange { active, keying, .. }) = self.take_exchange(|exchange| exchange.message_id == message_id)
        else {
            return Ok(());
        };
        if let Some(keying) = keying {
            return self.key_exchange_answered(ctx, now, active, *keying, parts);
        }
        match active {
            Active::Create { offer, token, tries } => self.created(ctx, now, *offer, token, tries, &parts, &[]),
            Active::RekeyIke(offer) => self.ike_rekeyed(ctx, now, *offer, &parts, &[]),
            Active::DeleteChild { id, token, reason } => {
                self.child_deleted(ctx, now, id, reason);
                done(ctx, token);
                Ok(())
            }
            Active::DeleteSpi(spi) => {
                ctx.release_child_spi(spi);
                Ok(())
            }
            Active::DeleteIke { tokens, reason } => {
                ctx.log("IKE", 0, self.core.tag(), "IKE_SA deleted".to_owned());
                let closed = self.close(ctx, now, reason);
                for token in tokens {
                    done(ctx, Some(token));
                }
                Err(closed)
            }
            Active::Inform => Ok(()),
            Active::RequestTicket => {
                self.take_ticket(ctx, now, &parts);
                Ok(())
            }
            Active::Redirect { token } => {
                Self::redirect_heard(ctx, token);
                Ok(())
            }
            Active::Liveness => {
                self.liveness_answered(&parts);
                Ok(())
            }
            Active::Mobility(mission) => self.errand_answered(ctx, now, *mission, &parts),
            Active::ProbeUdp => {
                self.udp_probed(ctx);
                Ok(())
            }
            // Its answer came before; a response cannot be for it.
            install @ Active::Install { .. } => {
                self.go_on(install, None);
                Ok(())
            }
        }
    }

    fn handle_request(&mut self, ctx: &mut Context, now: Instant, opened: &Opened) -> Result<(), Closed> {
        let parts = match Parts::of(opened) {
            Ok(parts) => parts,
            Err(fault) => {
                ctx.log("ENC", 1, self.core.tag(), format!("request refused: {fault}"));
                self.respond(ctx, now, &[fault.payload()]);
                return match fault {
                    // §2.21.3: an authentic message with wrong syntax ends the IKE SA.
                    Fault::InvalidSyntax(_) => Err(self.close(ctx, now, CloseReason::Failed)),
                    _ => Ok(()),
                };
            }
        };
        self.note_window(&parts);
        match opened.header.exchange {
            ExchangeType::CREATE_CHILD_SA => self.create_request(ctx, now, &parts),
            ExchangeType::INFORMATIONAL => self.informational_request(ctx, now, &parts),
            ExchangeType::IKE_FOLLOWUP_KE => self.followup_request(ctx, now, parts),
            ExchangeType(other) => {
                let fault = Fault::InvalidSyntax(format!("exchange type {other} has no place here"));
                ctx.log("ENC", 1, self.core.tag(), fault.to_string());
                self.respond(ctx, now, &[fault.payload()]);
                Ok(())
            }
        }
    }

    // Sending.

    /// Sends a request for which there is room; gives its message ID.
    pub(super) fn send_request(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        exchange: ExchangeType,
        payloads: &[Payload],
    ) -> Result<u32, Closed> {
        let over_stream = matches!(self.core.path.transport, Transport::Stream(_));
        let policy = self.mobility.retransmission(&ctx.config.retransmission);
        let retry = Retry::start(now, &policy, over_stream, ctx.rng.as_mut());
        let max_length = ctx.max_length(&self.core.path, self.channel.fragmentation, self.connection.fragmentation);
        let message_id = self.channel.next_request();
        match self.channel.request(exchange, payloads, max_length, retry, ctx.rng.as_mut()) {
            Some(datagrams) => {
                self.last_outbound = now;
                self.core.send(ctx, datagrams);
                self.expect_answer_over_udp(ctx, now);
                Ok(message_id)
            }
            // §2.2: message ids are used up; nothing can be said any more.
            None => Err(self.close(ctx, now, CloseReason::Expired)),
        }
    }

    pub(super) fn respond(&mut self, ctx: &mut Context, now: Instant, payloads: &[Payload]) {
        let max_length = ctx.max_length(&self.reply_path, self.channel.fragmentation, self.connection.fragmentation);
        let datagrams = self.channel.respond(payloads, max_length, ctx.rng.as_mut());
        self.last_outbound = now;
        self.core.send_along(ctx, self.reply_path, datagrams.unwrap_or_default());
    }

    /// Sends what is outstanding again over the current path; false where nothing is.
    pub(super) fn resend(&mut self, ctx: &mut Context, now: Instant) -> bool {
        let datagrams = self.channel.outstanding();
        if datagrams.is_empty() {
            return false;
        }
        let over_stream = matches!(self.core.path.transport, Transport::Stream(_));
        let retry = Retry::start(now, &ctx.config.retransmission, over_stream, ctx.rng.as_mut());
        self.channel.restart_retry(retry);
        self.core.send(ctx, datagrams);
        true
    }

    fn retransmit(&mut self, ctx: &mut Context, now: Instant) -> Result<(), Closed> {
        if self.mobility.is_stranded() || self.repeat_udp_probe(ctx, now) {
            return Ok(());
        }
        let policy = self.mobility.retransmission(&ctx.config.retransmission);
        while let Some(overdue) = self.channel.poll_retry(now, &policy, ctx.rng.as_mut()) {
            ctx.log("IKE", 1, self.core.tag(), overdue.to_string());
            let Some(datagrams) = overdue.resend else { return Err(self.give_up(ctx, now)) };
            self.last_outbound = now;
            self.consider_other_paths(ctx, now, overdue.count);
            for path in self.request_paths() {
                self.core.send_along(ctx, path, datagrams.clone());
            }
        }
        Ok(())
    }

    /// The peer does not answer.
    fn give_up(&mut self, ctx: &mut Context, now: Instant) -> Closed {
        if self.adopt_peers_successor(ctx, now) {
            return self.close(ctx, now, CloseReason::Rekeyed);
        }
        let deleting = self.going_on().find_map(|active| match active {
            Active::DeleteIke { reason, .. } => Some(*reason),
            _ => None,
        });
        self.close(ctx, now, deleting.unwrap_or(CloseReason::Timeout))
    }

    // Paths.

    /// An authentic message that is no repetition came along `path`.
    fn note_fresh(&mut self, ctx: &mut Context, now: Instant, path: Path) {
        self.last_inbound = now;
        if path == self.core.path {
            ctx.judge(&path, Judgement::Authentic);
            return;
        }
        let follow = match (path.transport, self.core.path.transport) {
            // RFC 9329 §6.1: the TCP Responder answers where the last valid message came in.
            (Transport::Stream(_), Transport::Stream(_)) => !self.core.stream_originator,
            (Transport::Stream(_), _) | (_, Transport::Stream(_)) => false,
            // RFC 4555 §3.8: with MOBIKE nothing moves but by UPDATE_SA_ADDRESSES.
            (Transport::Udp | Transport::UdpEncap, Transport::Udp | Transport::UdpEncap) => {
                self.follows_peer() && !self.mobility.is_on()
            }
        };
        if follow {
            self.follow_to(ctx, now, path);
        }
    }

    fn follow_to(&mut self, ctx: &mut Context, now: Instant, path: Path) {
        self.stream = StreamState::Up;
        self.move_to(ctx, path);
        if matches!(path.transport, Transport::Stream(_)) {
            ctx.judge(&path, Judgement::Authentic);
            self.resend(ctx, now);
        }
    }

    /// Authentic ESP came over another stream (RFC 9329 §6.1): the TCP Responder answers there.
    pub(crate) fn handle_stream_changed(&mut self, ctx: &mut Context, now: Instant, path: Path) -> Result<(), Closed> {
        self.last_inbound = now;
        let over_stream = matches!(self.core.path.transport, Transport::Stream(_));
        if over_stream && !self.core.stream_originator && path != self.core.path {
            self.follow_to(ctx, now, path);
        }
        self.pump(ctx, now)
    }

    /// RFC 7296 §2.23: the host that is not behind a NAT follows the one that is.
    fn follows_peer(&self) -> bool {
        self.core.nat.remote && !self.core.nat.local
    }

    fn move_to(&mut self, ctx: &mut Context, path: Path) {
        let line = format!("peer moved from {} to {}", self.core.path.remote, path.remote);
        if self.core.path.remote != path.remote {
            ctx.log("NET", 1, self.core.tag(), line);
        }
        self.core.path = path;
        ctx.shared.pools.lock().moved(self.core.id, configuration::host(&path));
        self.move_children(ctx);
    }

    /// When it was authenticated, or rekeyed.
    pub(super) fn since(&self) -> Instant {
        self.since
    }

    pub(super) fn stream_is_usable(&self) -> bool {
        matches!(self.stream, StreamState::Up)
    }

    pub(super) fn has_task_or_request(&self) -> bool {
        !self.exchanges.is_empty() || !self.queue.is_empty() || self.channel.is_waiting()
    }

    /// The IKE SA is on a path that works.
    pub(super) fn stream_is_up(&mut self) {
        self.stream = StreamState::Up;
    }

    /// Leaves a stream whose local address is gone for another between these addresses.
    pub(super) fn reopen_along(&mut self, ctx: &mut Context, now: Instant, path: Path) -> Result<(), Closed> {
        if !self.core.stream_originator {
            return Ok(());
        }
        self.core.path.local.set_ip(path.local.ip());
        self.core.path.remote.set_ip(path.remote.ip());
        let deadline = after(now, total(&ctx.config.retransmission));
        self.stream = StreamState::Reopening { stream: None, at: now, wait: RECONNECT_FIRST, deadline };
        self.reopen_timeout(ctx, now)
    }

    fn reopen_timeout(&mut self, ctx: &mut Context, now: Instant) -> Result<(), Closed> {
        let StreamState::Reopening { stream, at, deadline, .. } = &mut self.stream else { return Ok(()) };
        if *deadline <= now {
            return Err(self.close(ctx, now, CloseReason::Timeout));
        }
        if stream.is_none() && *at <= now {
            *stream = Some(ctx.open_stream(&self.connection, self.core.path.local.ip(), self.core.path.remote));
        }
        Ok(())
    }

    fn liveness_at(&self, ctx: &Context) -> Option<Instant> {
        if self.state != IkeState::Established || self.mobility.is_stranded() {
            return None;
        }
        let due = after(self.last_inbound, self.liveness_interval()?);
        match self.stream {
            StreamState::Up => {
                let idle = self.exchanges.is_empty() && self.queue.is_empty() && self.traffic_asked.is_none();
                idle.then_some(due)
            }
            // We cannot ask: the peer has as long to come back as our request would have waited.
            StreamState::Lost => Some(after(due, total(&ctx.config.retransmission))),
            StreamState::Reopening { .. } => None,
        }
    }

    /// `dpd_delay`. Where the peer is a cluster, its TCP Originator asks in any case: the member that takes over has no
    /// stream, and cannot open one (RFC 9329 §7.4).
    fn liveness_interval(&self) -> Option<Duration> {
        let configured = self.connection.dpd_delay;
        let over_stream = matches!(self.core.path.transport, Transport::Stream(_));
        let cluster = over_stream && self.core.stream_originator && self.message_id_sync.is_agreed();
        if configured.is_zero() { cluster.then_some(CLUSTER_LIVENESS) } else { Some(configured) }
    }

    fn keepalive_at(&self, ctx: &Context) -> Option<Instant> {
        let wanted = self.core.nat.local && self.core.path.transport == Transport::UdpEncap;
        (wanted && !ctx.config.keep_alive.is_zero()).then(|| after(self.last_outbound, ctx.config.keep_alive))
    }

    // The end.

    /// Removes a Child SA from the data plane and from here.
    pub(super) fn take_down(&mut self, ctx: &mut Context, now: Instant, id: ChildSaId, reason: CloseReason) {
        if let Some(child) = self.children.remove(id) {
            let status = child.status(now);
            let line = format!("CHILD_SA {}{{{}}} closed with SPIs {}", child.config.name, id.0, child.spis());
            ctx.log("IKE", 1, self.core.tag(), line);
            ctx.child_down(self.core.id, status, reason);
            // A successor that goes before the old one was deleted leaves the old one in place, on both sides.
            let successor = matches!(child.state, ChildState::Installed | ChildState::Deleting);
            let old = child.replaces.and_then(|old| self.children.get_mut(old));
            if let Some(old) = old.filter(|old| successor && old.state == ChildState::Rekeyed) {
                old.state = ChildState::Installed;
            }
        }
    }

    /// Says Delete, and closes without waiting for the answer.
    pub(super) fn farewell(&mut self, ctx: &mut Context, now: Instant, reason: CloseReason) -> Closed {
        self.drop_peers_successor(ctx, now, true);
        let has_room = self.channel.has_room();
        let closed = self.close(ctx, now, reason);
        if has_room {
            ctx.say_farewell(now, self.channel.take(), &self.core, reason);
        }
        closed
    }

    /// Closes: everything that it held is released and reported.
    pub(super) fn close(&mut self, ctx: &mut Context, now: Instant, reason: CloseReason) -> Closed {
        let status = self.status(now);
        self.leave_ticket(ctx, now, reason);
        if self.reauthenticating && !self.makes_first {
            ctx.reinitiate.extend(self.everything_again());
        } else if reason == CloseReason::Peer {
            self.leave_to_return(ctx);
        }
        self.go_elsewhere(ctx);
        let ids: Vec<ChildSaId> = self.children.iter().map(|child| child.id).collect();
        for id in ids {
            self.take_down(ctx, now, id, reason);
        }
        self.drop_half_made(ctx, now, false);
        for exchange in std::mem::take(&mut self.exchanges) {
            self.drop_active(ctx, exchange.active);
        }
        self.drop_tasks(ctx, "the IKE_SA closed");
        self.drop_peers_successor(ctx, now, false);
        ctx.bury(now, self.channel.local_spi(), self.core.dscp, self.channel.last_words());
        ctx.shared.pools.lock().release(self.core.id);
        ctx.event(Event::IkeDown(Box::new(status), reason));
        Closed
    }

    /// The IKE SA closes while this goes on.
    fn drop_active(&self, ctx: &mut Context, active: Active) {
        let reason = "the IKE_SA closed";
        match active {
            Active::Create { offer, token, .. } => {
                ctx.release_child_spi(offer.spi);
                self.child_failed(ctx, token, &offer.config.name, reason);
            }
            // The answer to the job finds nobody and takes the Child SA down.
            Active::Install { child, token, .. } => self.child_failed(ctx, token, &child.config.name, reason),
            Active::RekeyIke(offer) => {
                ctx.release_ike_spi(offer.spi);
                failed(ctx, offer.token, &self.core.name, None, reason);
            }
            Active::DeleteChild { token, .. } => done(ctx, token),
            Active::DeleteIke { tokens, .. } => tokens.into_iter().for_each(|token| done(ctx, Some(token))),
            Active::DeleteSpi(spi) => ctx.release_child_spi(spi),
            Active::Redirect { token } => failed(ctx, Some(token), &self.core.name, None, reason),
            Active::Inform | Active::RequestTicket | Active::Liveness | Active::Mobility(_) | Active::ProbeUdp => {}
        }
    }

    fn drop_tasks(&mut self, ctx: &mut Context, reason: &str) {
        let delayed = std::mem::take(&mut self.delayed).into_iter().map(|(_, task)| task);
        for task in std::mem::take(&mut self.queue).into_iter().chain(delayed) {
            match task {
                Task::CreateChild { config, token, .. } => self.child_failed(ctx, token, &config.name, reason),
                Task::RekeyChild { token, .. } | Task::RekeyIke { token, .. } => {
                    if token.is_some() {
                        failed(ctx, token, &self.core.name, None, reason);
                    }
                }
                Task::DeleteChild { token, .. } | Task::DeleteIke { token, .. } => done(ctx, token),
                Task::DeleteSpi(spi) => ctx.release_child_spi(spi),
                Task::Redirect { token, .. } => failed(ctx, Some(token), &self.core.name, None, reason),
                Task::Inform(_) | Task::RequestTicket | Task::Liveness | Task::Mobility(_) | Task::ProbeUdp => {}
            }
        }
    }

    pub(super) fn child_failed(&self, ctx: &mut Context, token: Option<u64>, child: &str, reason: &str) {
        let line = format!("establishing CHILD_SA {child} failed: {reason}");
        ctx.log("IKE", 1, self.core.tag(), line);
        failed(ctx, token, &self.core.name, Some(child), reason);
    }
}

impl Active {
    fn name(&self) -> &'static str {
        match self {
            Self::Create { offer, .. } if offer.replaces.is_some() => "CHILD_REKEY",
            Self::Install { replaces: Some(_), .. } => "CHILD_REKEY",
            Self::Create { .. } | Self::Install { .. } => "CHILD_CREATE",
            Self::RekeyIke(_) => "IKE_REKEY",
            Self::DeleteChild { .. } | Self::DeleteSpi(_) => "CHILD_DELETE",
            Self::DeleteIke { .. } => "IKE_DELETE",
            Self::Redirect { .. } => "IKE_REDIRECT",
            Self::Inform => "IKE_INFORM",
            Self::RequestTicket => "IKE_TICKET",
            Self::Liveness => "IKE_DPD",
            Self::Mobility(_) | Self::ProbeUdp => "IKE_MOBIKE",
        }
    }
}

/// Reports that a request of ours is done.
pub(super) fn done(ctx: &mut Context, token: Option<u64>) {
    if let Some(token) = token {
        ctx.event(Event::Done { token });
    }
}

/// Reports that a request cannot be met.
pub(super) fn failed(ctx: &mut Context, token: Option<u64>, connection: &str, child: Option<&str>, reason: &str) {
    ctx.event(Event::Failed {
        token,
        connection: connection.to_owned(),
        child: child.map(str::to_owned),
        reason: reason.to_owned(),
    });
}
