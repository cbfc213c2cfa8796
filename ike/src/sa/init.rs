//! IKE_SA_INIT as initiator (RFC 7296 §1.2, §2.6, §2.7, RFC 9329 §5.1).
//!
//! Nothing in an answer is authentic here; what it does to us at most is a failed attempt.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use ipsec::plane::StreamId;
use ipsec::transform::{Ke, Proposal, TransformType};

use super::auth::{InitMaterial, IntAuth};
use super::channel::Spis;
use super::fault::{notify, notify_name};
use super::intermediate_initiator::Agreed;
use super::nat::{self, Nat};
use super::parts::Parts;
use super::ppk;
use super::redirect::{Redirected, Redirects};
use super::resuming;
use super::retry::{Due, Retry, after};
use super::{Core, IkeSa, InitiatorIntermediate, Want, fail_wants};
use crate::config::{Childless, Connection, Fragmentation, Retransmission, TcpPolicy};
use crate::counters::Counter;
use crate::crypto::{self, KeyDone, KeyExchange, KeyWork};
use crate::engine::context::Context;
use crate::engine::{CloseReason, Event, IkeSaId, IkeSaStatus, IkeState, Job, JobId, JobOutcome, Path, Transport};
use crate::wire::{self, ExchangeType, Header, Message, NotifyType, Payload};

/// Hash algorithms that we verify (RFC 7427 §4): SHA2-256, SHA2-384, SHA2-512, Identity.
const SIGNATURE_HASHES: [u16; 4] = [2, 3, 4, 5];
/// Answers that make us send the request again, for one attempt: cookies and other groups.
const MAX_RESTARTS: u8 = 4;
/// Repetitions of a request after a refusal, before that is believed.
const REFUSED_REPETITIONS: u32 = 1;
/// Length of our nonces: at least half the key size of any PRF (RFC 7296 §2.10).
pub(crate) const NONCE_LENGTH: usize = 32;

/// An IKE SA whose IKE_SA_INIT request is out, or about to be.
pub(crate) struct Initiating {
    id: IkeSaId,
    name: Arc<str>,
    connection: Arc<Connection>,
    wants: Vec<Want>,
    local: IpAddr,
    remote: IpAddr,
    /// Sequences of repetitions begun, from 1 (`keyingtries`).
    sequence: u32,
    redirects: Redirects,
    attempt: Attempt,
}

/// One SPI's attempt.
pub(super) struct Attempt {
    spi: u64,
    over: Over,
    path: Path,
    nonce: Vec<u8>,
    method: Ke,
    ke: OurKe,
    /// What we say about redirects.
    redirect: Option<Payload>,
    pub(super) cookie: Option<Vec<u8>>,
    /// The puzzle over that cookie, which is being solved, and its solution.
    pub(super) solving: Option<JobId>,
    pub(super) solution: Option<Vec<u8>>,
    restarts: u8,
    /// What an answer said against us, which anyone may have sent (RFC 7296 §2.21.1); and the repetitions done then.
    refusal: Option<(String, u32)>,
    progress: Progress,
    /// When to turn to TCP.
    pub(super) tcp_at: Option<Instant>,
}

/// Our key pair.
enum OurKe {
    Generating(JobId),
    Ready(KeyExchange),
}

enum Progress {
    /// Waiting for the stream.
    Opening { deadline: Instant },
    /// Waiting for nothing but the key pair.
    Generating { deadline: Instant },
    /// Another gateway's address is looked up.
    Redirecting { job: JobId, deadline: Instant },
    /// The request, as sent.
    Sent { request: Vec<u8>, retry: Retry },
}

/// Another sequence of tries (`keyingtries`).
pub(crate) struct Again {
    pub(crate) from_start: Redirected,
    /// Its number, from 1.
    pub(super) sequence: u32,
    /// UDP gets through but for the port for encapsulation.
    pub(super) needs_tcp: bool,
}

/// Begins an attempt again over TCP that came to nothing on the port for encapsulation.
pub(super) fn begin_over_tcp(ctx: &mut Context, core: &Core, connection: &Arc<Connection>, wants: Vec<Want>) {
    let line = format!("no answer over UDP port {}, trying TCP", core.path.remote.port());
    ctx.log("NET", 1, core.tag(), line);
    let from_start = Redirected {
        from: core.id,
        connection: Arc::clone(connection),
        wants,
        local: core.path.local.ip(),
        remote: core.path.remote.ip(),
        redirects: core.redirects.clone(),
    };
    ctx.again.push(Again { from_start, sequence: core.sequence, needs_tcp: true });
}

/// What an attempt is made over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Over {
    Udp,
    /// UDP, and TCP where that stays silent (RFC 9329 §5.1).
    UdpThenTcp,
    Tcp,
    /// TCP because it was needed here before; UDP where that fails (RFC 9329 §5.1: prior knowledge).
    TcpAsBefore,
}

impl Over {
    pub(super) fn first(ctx: &Context, now: Instant, connection: &Connection, local: IpAddr, remote: IpAddr) -> Self {
        match connection.tcp {
            TcpPolicy::No => Self::Udp,
            TcpPolicy::Fallback
                if ctx.shared.networks.lock().needs_stream(now, &udp_path(ctx, connection, local, remote)) =>
            {
                Self::TcpAsBefore
            }
            TcpPolicy::Fallback => Self::UdpThenTcp,
            TcpPolicy::Yes => Self::Tcp,
        }
    }

    pub(super) fn is_tcp(self) -> bool {
        matches!(self, Self::Tcp | Self::TcpAsBefore)
    }
}

impl Initiating {
    /// Begins; `None` when it failed at once (the reason is out as an event).
    pub(crate) fn begin(
        ctx: &mut Context,
        now: Instant,
        connection: Arc<Connection>,
        want: Want,
        local: IpAddr,
        remote: IpAddr,
    ) -> Option<Box<Self>> {
        let id = ctx.next_ike();
        let line = format!("initiating IKE_SA {}[{}] to {remote}", connection.name, id.0);
        ctx.log("IKE", 0, Some((id, &connection.name)), line);
        let redirects = Redirects::of_initiator(ctx);
        let to = Redirected { from: id, connection, wants: vec![want], local, remote, redirects };
        Self::begin_as(ctx, now, id, to, 1, false)
    }

    /// Begins again at another gateway, for what is configured now.
    pub(crate) fn elsewhere(ctx: &mut Context, now: Instant, redirected: Redirected) -> Option<Box<Self>> {
        let name = redirected.connection.name.clone();
        let Some(connection) = ctx.connections.named(&name).next().map(Arc::clone) else {
            fail_wants(ctx, &name, &redirected.wants, "the connection is gone");
            return None;
        };
        let id = ctx.next_ike();
        let line = format!("initiating IKE_SA {name}[{}] to {}", id.0, redirected.remote);
        ctx.log("IKE", 0, Some((id, &name)), line);
        Self::begin_as(ctx, now, id, Redirected { connection, ..redirected }, 1, false)
    }

    /// Begins the next sequence of tries, the one before having ended in IKE_AUTH.
    pub(crate) fn again(ctx: &mut Context, now: Instant, again: Again) -> Option<Box<Self>> {
        let id = ctx.next_ike();
        let Again { from_start, sequence, needs_tcp } = again;
        Self::begin_as(ctx, now, id, from_start, sequence, needs_tcp)
    }

    pub(super) fn begin_as(
        ctx: &mut Context,
        now: Instant,
        id: IkeSaId,
        to: Redirected,
        sequence: u32,
        needs_tcp: bool,
    ) -> Option<Box<Self>> {
        let Redirected { from: _, connection, wants, local, remote, redirects } = to;
        let over = if needs_tcp { Over::Tcp } else { Over::first(ctx, now, &connection, local, remote) };
        match Attempt::begin(ctx, now, id, &connection, (local, remote), over, &redirects) {
            Ok(attempt) => {
                let name = ctx.connections.name(&connection.name);
                Some(Box::new(Self { id, name, connection, wants, local, remote, sequence, redirects, attempt }))
            }
            Err(reason) => {
                fail_wants(ctx, &connection.name, &wants, &reason);
                None
            }
        }
    }

    /// The address of the gateway that we were sent to.
    fn gateway_found(
        mut self: Box<Self>,
        ctx: &mut Context,
        now: Instant,
        job: JobId,
        result: Result<(IpAddr, IpAddr), String>,
    ) -> Option<Box<Self>> {
        if !matches!(self.attempt.progress, Progress::Redirecting { job: waiting, .. } if waiting == job) {
            return Some(self);
        }
        match result {
            Ok((local, remote)) => {
                (self.local, self.remote) = (local, remote);
                let over = Over::first(ctx, now, &self.connection, local, remote);
                self.restart(ctx, now, over)
            }
            Err(reason) => {
                let reason = format!("redirect failed: {reason}");
                ctx.log("IKE", 1, self.tag(), reason.clone());
                self.abandon(ctx, &reason, CloseReason::Failed);
                None
            }
        }
    }

    /// RFC 5685 §3: the gateway sends us elsewhere. Forged by somebody on the path it costs us this attempt, as would
    /// any other answer of theirs.
    fn redirected(mut self: Box<Self>, ctx: &mut Context, now: Instant, parts: &Parts) -> Option<Box<Self>> {
        let here = self.attempt.path.remote.ip();
        match self.redirects.follow(now, parts, &self.attempt.nonce, here) {
            Ok(gateway) => {
                ctx.log("IKE", 0, self.tag(), format!("redirected to {gateway}"));
                let job = ctx.job(self.id, Job::Resolve(gateway));
                let deadline = after(now, super::retry::total(&ctx.config.retransmission));
                self.attempt.tcp_at = None;
                self.attempt.progress = Progress::Redirecting { job, deadline };
            }
            Err(reason) => ctx.log("IKE", 1, self.tag(), reason),
        }
        Some(self)
    }

    pub(crate) fn id(&self) -> IkeSaId {
        self.id
    }

    pub(crate) fn spi(&self) -> u64 {
        self.attempt.spi
    }

    pub(crate) fn remote(&self) -> SocketAddr {
        self.attempt.path.remote
    }

    pub(crate) fn stream(&self) -> Option<StreamId> {
        match self.attempt.path.transport {
            Transport::Stream(stream) => Some(stream),
            Transport::Udp | Transport::UdpEncap => None,
        }
    }

    /// True when this will become the IKE SA that a request asks for.
    pub(crate) fn serves(&self, connection: &Connection, remote: IpAddr) -> bool {
        self.connection.authenticates_as(connection) && (self.remote == remote || self.redirects.came_from(remote))
    }

    /// The addresses that [`Self::serves`] may agree to.
    pub(crate) fn reached_at(&self) -> [Option<IpAddr>; 2] {
        [Some(self.remote), self.redirects.origin()]
    }

    pub(crate) fn add_want(&mut self, want: Want) {
        self.wants.push(want);
    }

    pub(crate) fn next_timeout(&self) -> Option<Instant> {
        let at = match &self.attempt.progress {
            Progress::Opening { deadline }
            | Progress::Generating { deadline }
            | Progress::Redirecting { deadline, .. } => *deadline,
            Progress::Sent { retry, .. } => retry.at,
        };
        Some(self.attempt.tcp_at.map_or(at, |tcp| tcp.min(at)))
    }

    /// The connection's name.
    pub(crate) fn name(&self) -> Arc<str> {
        Arc::clone(&self.name)
    }

    pub(crate) fn status(&self) -> IkeSaStatus {
        IkeSaStatus {
            id: self.id,
            connection: self.name.to_string(),
            state: IkeState::Connecting,
            path: self.attempt.path,
            local_id: self.connection.local_id.clone(),
            remote_id: self.connection.remote.remote_id.as_exact().cloned(),
            peer: None,
            initiator: true,
            initiator_spi: self.attempt.spi,
            responder_spi: 0,
            nat_local: false,
            nat_remote: false,
            nat_fake: false,
            suite: None,
            established: None,
            rekey_in: None,
            reauth_in: None,
            assigned: None,
            resumed: false,
            tasks_active: vec!["IKE_INIT", "IKE_NATD", "IKE_CERT_PRE", "IKE_AUTH", "CHILD_CREATE"],
            children: Vec::new(),
        }
    }

    pub(crate) fn handle_timeout(mut self: Box<Self>, ctx: &mut Context, now: Instant) -> Option<Box<Self>> {
        if self.attempt.tcp_at.is_some_and(|at| at <= now) {
            let line = format!("no answer over UDP, trying TCP port {}", self.connection.tcp_remote_port);
            ctx.log("NET", 1, self.tag(), line);
            return self.restart(ctx, now, Over::Tcp);
        }
        let tag = Some((self.id, self.connection.name.as_str()));
        match &mut self.attempt.progress {
            Progress::Opening { deadline } if *deadline <= now => {
                self.give_up(ctx, now, "the TCP connection timed out")
            }
            Progress::Generating { deadline } if *deadline <= now => {
                self.give_up(ctx, now, "making a key pair took too long")
            }
            Progress::Redirecting { deadline, .. } if *deadline <= now => {
                self.give_up(ctx, now, "the gateway that we were sent to is not found")
            }
            Progress::Opening { .. } | Progress::Generating { .. } | Progress::Redirecting { .. } => Some(self),
            Progress::Sent { request, retry } => match retry.poll(now, &ctx.config.retransmission, ctx.rng.as_mut()) {
                Due::Nothing => Some(self),
                // The peer has answered, and waits for the solution.
                Due::Resend if self.attempt.solving.is_some() => Some(self),
                Due::Resend => {
                    let (count, request) = (retry.done, request.clone());
                    if let Some(reason) = self.believed_refusal() {
                        ctx.log("IKE", 1, tag, format!("establishing IKE_SA failed, {reason}"));
                        self.abandon(ctx, &reason, CloseReason::Failed);
                        return None;
                    }
                    ctx.log("IKE", 1, tag, format!("retransmit {count} of request with message ID 0"));
                    ctx.transmit(self.attempt.path, [request]);
                    Some(self)
                }
                Due::GiveUp => {
                    let line = format!("giving up after {} retransmits", retry.done);
                    ctx.log("IKE", 1, tag, line);
                    self.give_up(ctx, now, "the peer does not answer")
                }
            },
        }
    }

    pub(crate) fn handle_stream_opened(
        mut self: Box<Self>,
        ctx: &mut Context,
        now: Instant,
        stream: StreamId,
        local: SocketAddr,
    ) -> Option<Box<Self>> {
        if self.stream() == Some(stream) && self.attempt.is_opening() {
            self.attempt.path.local = local;
            self.attempt.prepared(ctx, now, self.id, &self.connection);
        }
        Some(self)
    }

    /// The key pair is made, or a puzzle is solved.
    pub(crate) fn handle_job(
        mut self: Box<Self>,
        ctx: &mut Context,
        now: Instant,
        job: JobId,
        outcome: JobOutcome,
    ) -> Option<Box<Self>> {
        let waits = matches!(self.attempt.ke, OurKe::Generating(waiting) if waiting == job);
        match outcome {
            JobOutcome::KeyExchange(Ok(KeyDone::Generated(ke))) if waits => {
                self.attempt.ke = OurKe::Ready(ke);
                if matches!(self.attempt.progress, Progress::Generating { .. }) {
                    self.attempt.send(ctx, now, self.id, &self.connection);
                }
                Some(self)
            }
            JobOutcome::KeyExchange(_) if waits => {
                let reason = "making a key pair failed";
                ctx.log("IKE", 1, self.tag(), reason.to_owned());
                self.abandon(ctx, reason, CloseReason::Failed);
                None
            }
            JobOutcome::Resolve(result) => self.gateway_found(ctx, now, job, result),
            JobOutcome::SolvePuzzle(solution) if self.attempt.solving == Some(job) => {
                self.attempt.solved(ctx, now, self.id, &self.connection, solution);
                Some(self)
            }
            // Of an attempt that is over.
            _ => Some(self),
        }
    }

    pub(crate) fn handle_stream_closed(
        mut self: Box<Self>,
        ctx: &mut Context,
        now: Instant,
        stream: StreamId,
        reason: &str,
    ) -> Option<Box<Self>> {
        if self.stream() != Some(stream) {
            return Some(self);
        }
        if !self.attempt.is_opening() && self.attempt.restarts > 0 && self.attempt.may_restart() {
            // The peer has told us what it wants to hear, and some close after that.
            ctx.log("NET", 1, self.tag(), format!("the TCP connection was closed: {reason}, opening another"));
            self.attempt.reopen(ctx, now, &self.connection);
            return Some(self);
        }
        let reason = format!("the TCP connection failed: {reason}");
        if self.connection.tcp == TcpPolicy::Fallback {
            ctx.log("NET", 1, self.tag(), format!("{reason}, going on over UDP"));
            ctx.shared.networks.lock().forget(&self.attempt.path);
            // The peer may be slow or down rather than behind a filter: UDP gets all of its time.
            let over = if self.attempt.over == Over::TcpAsBefore { Over::UdpThenTcp } else { Over::Udp };
            return self.restart(ctx, now, over);
        }
        self.give_up(ctx, now, &reason)
    }

    /// An ICMP error: no proof of anything, but a reason to try TCP now rather than later.
    pub(crate) fn handle_unreachable(
        self: Box<Self>,
        ctx: &mut Context,
        now: Instant,
        remote: SocketAddr,
    ) -> Option<Box<Self>> {
        if self.attempt.tcp_at.is_some() && self.attempt.path.remote == remote {
            ctx.log("NET", 1, self.tag(), format!("{remote} is unreachable over UDP, trying TCP"));
            return self.restart(ctx, now, Over::Tcp);
        }
        Some(self)
    }

    /// Ends before anything came up.
    pub(crate) fn abandon(self, ctx: &mut Context, reason: &str, close: CloseReason) {
        fail_wants(ctx, &self.connection.name, &self.wants, reason);
        let status = self.status();
        ctx.event(Event::IkeDown(Box::new(status), close));
    }

    /// Handles an unprotected message with our SPI.
    pub(crate) fn handle_response(
        mut self: Box<Self>,
        ctx: &mut Context,
        now: Instant,
        path: Path,
        message: Message,
        datagram: &[u8],
    ) -> Option<IkeSa> {
        let header = message.header;
        let expected = header.response
            && header.exchange == ExchangeType::IKE_SA_INIT
            && header.message_id == 0
            && !header.from_initiator;
        let sent = matches!(self.attempt.progress, Progress::Sent { .. });
        // An answer comes from where the request went (§2.11).
        if !expected
            || !sent
            || path.remote != self.attempt.path.remote
            || path.transport != self.attempt.path.transport
        {
            return Some(IkeSa::Initiating(self));
        }
        let parts = match Parts::collect(message.payloads) {
            Ok(parts) => parts,
            Err(fault) => {
                ctx.log("ENC", 1, self.tag(), format!("IKE_SA_INIT response ignored: {fault}"));
                ctx.shared.counters.of(&self.connection.name).count(Counter::Invalid);
                return Some(IkeSa::Initiating(self));
            }
        };
        ctx.shared.counters.of(&self.connection.name).message(ExchangeType::IKE_SA_INIT, true, true);
        if let Some(cookie) = parts.notify(NotifyType::COOKIE).filter(|_| parts.sa.is_none()) {
            // RFC 7296 §2.6: 1 to 64 octets. One puzzle at a time.
            let idle = self.attempt.solving.is_none();
            if idle && (1..=64).contains(&cookie.data.len()) && self.attempt.may_restart() {
                self.attempt.demanded(ctx, now, self.id, &self.connection, &cookie.data, &parts);
            }
            return Some(IkeSa::Initiating(self));
        }
        if parts.has(NotifyType::REDIRECT) && parts.sa.is_none() {
            return self.redirected(ctx, now, &parts).map(IkeSa::Initiating);
        }
        // RFC 8019 §7.1.2: there is nothing to solve it over.
        if parts.has(NotifyType::PUZZLE) && parts.sa.is_none() {
            return Some(IkeSa::Initiating(self));
        }
        if let Some(error) = parts.error() {
            if error.kind == NotifyType::INVALID_KE_PAYLOAD {
                return self.change_group(ctx, now, &error.data).map(IkeSa::Initiating);
            }
            let line = format!("received {} notify error", notify_name(error.kind));
            return self.refused(ctx, line).map(IkeSa::Initiating);
        }
        self.accept(ctx, now, header, parts, datagram)
    }

    fn accept(
        self: Box<Self>,
        ctx: &mut Context,
        now: Instant,
        header: Header,
        parts: Parts,
        datagram: &[u8],
    ) -> Option<IkeSa> {
        let offered = proposals(&self.connection);
        let childless = parts.has(CHILDLESS_IKEV2_SUPPORTED);
        if self.connection.childless == Childless::Force && !childless {
            let reason = "the peer does not support childless IKE_SA initiation";
            return self.refused(ctx, reason.to_owned()).map(IkeSa::Initiating);
        }
        let (Some(answer), Some((group, public)), Some(nr)) = (&parts.sa, &parts.ke, &parts.nonce) else {
            ctx.log("ENC", 1, self.tag(), "IKE_SA_INIT response without SA, KE or nonce ignored".to_owned());
            return Some(IkeSa::Initiating(self));
        };
        let suite = crypto::accept_ike(answer, &offered)
            .filter(|suite| suite.ke == *group && *group == self.attempt.method && header.responder_spi != 0)
            // RFC 9370 §2.2.2: additional key exchanges need the exchange that carries them.
            .filter(|suite| suite.additional.is_none() || parts.has(NotifyType::INTERMEDIATE_EXCHANGE_SUPPORTED));
        let Some(suite) = suite else {
            return self.refused(ctx, "the peer chose what we did not offer".to_owned()).map(IkeSa::Initiating);
        };
        if let Err(fault) = parts.nonce_for(suite.prf) {
            return self.refused(ctx, fault.to_string()).map(IkeSa::Initiating);
        }
        let use_ppk = parts.has(NotifyType::USE_PPK) && ppk::of_connection(ctx, &self.connection).is_some();
        if self.connection.ppk_required && !use_ppk {
            // RFC 8784 §3.
            let reason = "the peer does not use a PPK, which is required";
            return self.refused(ctx, reason.to_owned()).map(IkeSa::Initiating);
        }
        if !use_ppk && self.connection.ppk_id.is_some() {
            ctx.log("IKE", 1, self.tag(), ppk::UNUSED.to_owned());
        }
        ctx.log("CFG", 1, self.tag(), format!("selected proposal: {}", crypto::names::proposals(answer)));
        let spis = Spis { initiator: self.attempt.spi, responder: header.responder_spi };
        let fake = self.connection.force_encapsulation;
        let nat = Nat::detect(&parts, spis.initiator, spis.responder, &self.attempt.path, fake);
        let Self { id, name, connection, wants, local, remote, sequence, redirects, attempt } = *self;
        let (Progress::Sent { request, .. }, OurKe::Ready(ke)) = (attempt.progress, attempt.ke) else { return None };
        let mut core = Core {
            id,
            name,
            path: attempt.path,
            nat,
            stream_originator: true,
            redirects,
            sequence,
            assigned: None,
            falls_back: false,
        };
        let falls_back = attempt.over == Over::UdpThenTcp;
        float(ctx, &connection, &mut core, falls_back);
        let fragmentation =
            connection.fragmentation != Fragmentation::No && parts.has(NotifyType::IKEV2_FRAGMENTATION_SUPPORTED);
        let material = InitMaterial {
            ours: request,
            theirs: datagram.to_vec(),
            ni: attempt.nonce,
            nr: nr.clone(),
            peer_hashes: parts.signature_hashes().filter(|_| ctx.config.signature_authentication),
            announced: parts.auth_announcements(),
            settings: ctx.config.signatures,
            cert_requests: parts.cert_requests,
            cert_requested: parts.cert_requested,
            intermediate: IntAuth::default(),
            use_ppk,
        };
        let _ = (local, remote);
        let work = KeyWork::Agree { ours: ke, peer: public.clone() };
        let agreed = Agreed { suite, spis, fragmentation, childless };
        Some(InitiatorIntermediate::begin(ctx, now, core, agreed, connection, wants, material, work))
    }

    /// RFC 7296 §1.2: the responder wants another group, one that we offered.
    fn change_group(mut self: Box<Self>, ctx: &mut Context, now: Instant, data: &[u8]) -> Option<Box<Self>> {
        let group = <[u8; 2]>::try_from(data).ok().map(|two| Ke(u16::from_be_bytes(two)));
        let group = group.filter(|group| offers(&proposals(&self.connection), *group));
        let group = group.filter(|group| *group != self.attempt.method && crypto::supported(*group));
        let Some(group) = group.filter(|_| self.attempt.may_restart()) else {
            return self.refused(ctx, "the peer asks for a key exchange method that we do not offer".to_owned());
        };
        let line = format!(
            "peer didn't accept key exchange method {}, it requested {}",
            crypto::names::ke(self.attempt.method),
            crypto::names::ke(group)
        );
        ctx.log("IKE", 1, self.tag(), line);
        self.attempt.method = group;
        self.attempt.ke = OurKe::Generating(ctx.key_work(self.id, KeyWork::Generate(group)));
        let total = super::retry::total(&ctx.config.retransmission);
        self.attempt.progress = Progress::Generating { deadline: after(now, total) };
        Some(self)
    }

    /// Somebody says no. It is believed at once over a stream, where nobody else can answer, and over UDP when so many
    /// repetitions have brought nothing better (RFC 7296 §2.21.1).
    fn refused(mut self: Box<Self>, ctx: &mut Context, reason: String) -> Option<Box<Self>> {
        ctx.log("IKE", 1, self.tag(), reason.clone());
        let done = match &self.attempt.progress {
            Progress::Sent { retry, .. } if self.stream().is_none() => retry.done,
            _ => {
                self.abandon(ctx, &reason, CloseReason::Failed);
                return None;
            }
        };
        self.attempt.refusal.get_or_insert((reason, done));
        Some(self)
    }

    /// What was said against us, if the peer had its chance to say something else.
    fn believed_refusal(&self) -> Option<String> {
        let (reason, at) = self.attempt.refusal.as_ref()?;
        let Progress::Sent { retry, .. } = &self.attempt.progress else { return None };
        (retry.done > at.saturating_add(REFUSED_REPETITIONS)).then(|| reason.clone())
    }

    /// A sequence of repetitions is over: another one, or the end.
    fn give_up(mut self: Box<Self>, ctx: &mut Context, now: Instant, reason: &str) -> Option<Box<Self>> {
        let tries = self.connection.keyingtries;
        if tries == 0 || self.sequence < tries {
            self.sequence = self.sequence.saturating_add(1);
            let line = format!("peer not responding, trying again ({}/{tries})", self.sequence);
            ctx.log("IKE", 1, self.tag(), line);
            if resuming::has_ticket(ctx, now, &self.connection, (self.local, self.remote)) {
                let Self { id, connection, wants, local, remote, redirects, .. } = &mut *self;
                let (from, connection, wants) = (*id, Arc::clone(connection), std::mem::take(wants));
                let from_start = Redirected {
                    from,
                    connection,
                    wants,
                    local: *local,
                    remote: *remote,
                    redirects: redirects.clone(),
                };
                ctx.again.push(Again { from_start, sequence: self.sequence, needs_tcp: false });
                self.abandon(ctx, reason, CloseReason::Timeout);
                return None;
            }
            let over = Over::first(ctx, now, &self.connection, self.local, self.remote);
            return self.restart(ctx, now, over);
        }
        ctx.log("IKE", 1, self.tag(), format!("establishing IKE_SA failed, {reason}"));
        self.abandon(ctx, reason, CloseReason::Timeout);
        None
    }

    /// RFC 9329 §5.1: another transport means another SPI, another nonce and another key.
    fn restart(mut self: Box<Self>, ctx: &mut Context, now: Instant, over: Over) -> Option<Box<Self>> {
        let ends = (self.local, self.remote);
        match Attempt::begin(ctx, now, self.id, &self.connection, ends, over, &self.redirects) {
            Ok(attempt) => {
                let old = std::mem::replace(&mut self.attempt, attempt);
                ctx.release_ike_spi(old.spi);
                Some(self)
            }
            Err(reason) => {
                self.abandon(ctx, &reason, CloseReason::Failed);
                None
            }
        }
    }

    fn tag(&self) -> Option<(IkeSaId, &str)> {
        Some((self.id, &self.connection.name))
    }
}

impl Attempt {
    fn begin(
        ctx: &mut Context,
        now: Instant,
        id: IkeSaId,
        connection: &Connection,
        (local, remote): (IpAddr, IpAddr),
        over: Over,
        redirects: &Redirects,
    ) -> Result<Self, String> {
        let method = methods(&proposals(connection)).into_iter().find(|method| crypto::supported(*method));
        let method = method.ok_or_else(|| "no proposal has a key exchange method that we support".to_owned())?;
        let ke = OurKe::Generating(ctx.key_work(id, KeyWork::Generate(method)));
        let nonce = ctx.random(NONCE_LENGTH);
        let spi = ctx.reserve_ike_spi(id);
        let path = match over {
            Over::Tcp | Over::TcpAsBefore => {
                let remote = SocketAddr::new(remote, connection.tcp_remote_port);
                let transport = Transport::Stream(ctx.open_stream(connection, local, remote));
                Path { local: SocketAddr::new(local, 0), remote, transport }
            }
            Over::Udp | Over::UdpThenTcp => udp_path(ctx, connection, local, remote),
        };
        let total = super::retry::total(&ctx.config.retransmission);
        let mut attempt = Self {
            spi,
            over,
            path,
            nonce,
            method,
            ke,
            cookie: None,
            redirect: redirects.payload(),
            solving: None,
            solution: None,
            restarts: 0,
            refusal: None,
            progress: Progress::Opening { deadline: after(now, total) },
            tcp_at: None,
        };
        if over == Over::UdpThenTcp {
            attempt.tcp_at = Some(after(now, connection.tcp_delay));
        }
        if !over.is_tcp() {
            attempt.prepared(ctx, now, id, connection);
        }
        Ok(attempt)
    }

    /// Goes on with the same attempt over another stream, to say there what the peer has asked for (RFC 9329 §6.3).
    fn reopen(&mut self, ctx: &mut Context, now: Instant, connection: &Connection) {
        let total = super::retry::total(&ctx.config.retransmission);
        self.path.transport = Transport::Stream(ctx.open_stream(connection, self.path.local.ip(), self.path.remote));
        self.progress = Progress::Opening { deadline: after(now, total) };
    }

    pub(super) fn is_opening(&self) -> bool {
        matches!(self.progress, Progress::Opening { .. })
    }

    /// The path is there; the request goes as soon as the key pair, or a puzzle's solution, is there too.
    fn prepared(&mut self, ctx: &mut Context, now: Instant, id: IkeSaId, connection: &Connection) {
        match self.ke {
            OurKe::Ready(_) if self.solving.is_none() => self.send(ctx, now, id, connection),
            OurKe::Ready(_) | OurKe::Generating(_) => {
                let total = super::retry::total(&ctx.config.retransmission);
                self.progress = Progress::Generating { deadline: after(now, total) };
            }
        }
    }

    /// Builds and sends the request with what the answers so far asked for.
    pub(super) fn send(&mut self, ctx: &mut Context, now: Instant, id: IkeSaId, connection: &Connection) {
        let OurKe::Ready(ke) = &self.ke else { return };
        let offered = proposals(connection);
        let intermediate = offers_additional(&offered);
        let mut payloads = Vec::new();
        // RFC 7296 §2.6: the cookie comes first, the rest is the same as before.
        if let Some(cookie) = &self.cookie {
            payloads.push(notify(NotifyType::COOKIE, cookie.clone()));
        }
        // RFC 8019 §7.1.2
        payloads.extend(self.solution.clone().map(Payload::PuzzleSolution));
        payloads.push(Payload::Sa(offered));
        payloads.push(Payload::Ke { group: ke.method(), data: ke.public().to_vec() });
        payloads.push(Payload::Nonce(self.nonce.clone()));
        let fake = connection.force_encapsulation;
        payloads.extend(nat::payloads(self.spi, 0, &self.path, fake));
        payloads.extend(self.redirect.clone());
        payloads.extend(capabilities(ctx, connection.fragmentation != Fragmentation::No));
        if ppk::of_connection(ctx, connection).is_some() {
            payloads.push(ppk::offer());
        }
        if intermediate {
            payloads.push(notify(NotifyType::INTERMEDIATE_EXCHANGE_SUPPORTED, Vec::new()));
        }
        let header = Header {
            initiator_spi: self.spi,
            responder_spi: 0,
            major: 2,
            minor: 0,
            exchange: ExchangeType::IKE_SA_INIT,
            from_initiator: true,
            response: false,
            message_id: 0,
        };
        let request = wire::encode(&Message { header, payloads });
        let over_stream = matches!(self.path.transport, Transport::Stream(_));
        let mut policy: Retransmission = ctx.config.retransmission;
        if self.tcp_at.is_some() {
            // RFC 9329 §5.1: at least one repetition over UDP before TCP.
            policy.timeout = policy.timeout.min(connection.tcp_delay / 2);
        }
        let retry = Retry::start(now, &policy, over_stream, ctx.rng.as_mut());
        let line = format!("sending IKE_SA_INIT request to {}", self.path.remote);
        ctx.log("NET", 2, Some((id, &connection.name)), line);
        ctx.shared.counters.of(&connection.name).message(ExchangeType::IKE_SA_INIT, false, false);
        ctx.transmit(self.path, [request.clone()]);
        self.progress = Progress::Sent { request, retry };
    }

    fn may_restart(&mut self) -> bool {
        self.restarts = self.restarts.saturating_add(1);
        self.restarts <= MAX_RESTARTS
    }
}

/// RFC 7296 §2.23: from IKE_AUTH on both sides use the port for encapsulation, if there is a NAT; with MOBIKE also without
/// one, since there may be one on another path (RFC 4555 §3.3). A network may drop that port alone; `falls_back` says that
/// TCP is untried.
pub(super) fn float(ctx: &Context, connection: &Connection, core: &mut Core, falls_back: bool) {
    let floats = core.nat.any() || (connection.mobike && core.nat.traversal);
    if floats && core.path.transport == Transport::Udp {
        core.falls_back = falls_back;
        core.path.transport = Transport::UdpEncap;
        core.path.local.set_port(ctx.config.nat_port);
        core.path.remote.set_port(ctx.config.nat_port);
    }
}

/// CHILDLESS_IKEV2_SUPPORTED (RFC 6023 §3).
pub(crate) const CHILDLESS_IKEV2_SUPPORTED: NotifyType = NotifyType(16418);

/// Notifies that say what we speak.
pub(crate) fn capabilities(ctx: &Context, fragmentation: bool) -> Vec<Payload> {
    let mut payloads = Vec::new();
    if fragmentation {
        payloads.push(notify(NotifyType::IKEV2_FRAGMENTATION_SUPPORTED, Vec::new()));
    }
    if ctx.config.signature_authentication {
        let hashes = SIGNATURE_HASHES.iter().flat_map(|hash| hash.to_be_bytes()).collect();
        payloads.push(notify(NotifyType::SIGNATURE_HASH_ALGORITHMS, hashes));
    }
    payloads
}

/// The connection's proposals, numbered, without SPI.
pub(crate) fn proposals(connection: &Connection) -> Vec<Proposal> {
    numbered(&connection.proposals, &[])
}

/// Proposals numbered from 1, each with this SPI (RFC 7296 §3.3.1).
pub(crate) fn numbered(proposals: &[Proposal], spi: &[u8]) -> Vec<Proposal> {
    proposals
        .iter()
        .zip(1..=u8::MAX)
        .map(|(proposal, number)| Proposal { number, spi: spi.to_vec(), ..proposal.clone() })
        .collect()
}

/// Key exchange methods in order of preference.
pub(crate) fn methods(proposals: &[Proposal]) -> Vec<Ke> {
    let transforms = proposals.iter().flat_map(|proposal| &proposal.transforms);
    transforms.filter(|transform| transform.kind == TransformType::KE).map(|transform| Ke(transform.id)).collect()
}

/// True when one of the proposals has additional key exchanges, for which IKE_INTERMEDIATE is needed (RFC 9370
/// §2.2.1).
fn offers_additional(proposals: &[Proposal]) -> bool {
    let mut transforms = proposals.iter().flat_map(|proposal| &proposal.transforms);
    transforms.any(|transform| transform.kind.is_additional_ke() && transform.id != Ke::NONE.0)
}

/// True when one of the proposals has this key exchange method.
pub(crate) fn offers(proposals: &[Proposal], method: Ke) -> bool {
    method != Ke::NONE && methods(proposals).contains(&method)
}

/// The path over UDP, by the configured ports.
pub(super) fn udp_path(ctx: &Context, connection: &Connection, local: IpAddr, remote: IpAddr) -> Path {
    let port = |port: u16| if port == 0 { ctx.config.port } else { port };
    let (local_port, remote_port) = (port(connection.local_port), port(connection.remote_port));
    // Messages to and from the encapsulation port carry the non-ESP marker from the beginning (RFC 3948 §2.2).
    if local_port == ctx.config.nat_port || remote_port == ctx.config.nat_port {
        let local_port = if local_port == ctx.config.port { ctx.config.nat_port } else { local_port };
        return Path {
            local: SocketAddr::new(local, local_port),
            remote: SocketAddr::new(remote, remote_port),
            transport: Transport::UdpEncap,
        };
    }
    Path {
        local: SocketAddr::new(local, local_port),
        remote: SocketAddr::new(remote, remote_port),
        transport: Transport::Udp,
    }
}
