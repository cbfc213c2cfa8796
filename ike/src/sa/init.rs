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
use super::first_request::{Due, FirstRequest, Lost, Over};
use super::intermediate_initiator::Agreed;
use super::nat::{self, Nat};
use super::parts::Parts;
use super::ppk;
use super::redirect::{Redirected, Redirects};
use super::resuming;
use super::{Core, IkeSa, InitiatorIntermediate, Want, fail_wants};
use crate::config::{Childless, Connection, Fragmentation};
use crate::counters::Counter;
use crate::crypto::{self, KeyDone, KeyExchange, KeyWork};
use crate::engine::context::Context;
use crate::engine::{CloseReason, Event, IkeSaId, IkeSaStatus, IkeState, Job, JobId, JobOutcome, Path, Transport};
use crate::wire::{ExchangeType, Header, Message, NotifyType, Payload};

/// Hash algorithms that we verify (RFC 7427 §4): SHA2-256, SHA2-384, SHA2-512, Identity.
const SIGNATURE_HASHES: [u16; 4] = [2, 3, 4, 5];
/// Repetitions of a request after a refusal, before that is believed.
const REFUSED_REPETITIONS: u32 = 1;
/// Why an attempt ended that was to bring an IKE SA back from a stream.
const NO_UDP: &str = "there is no answer over UDP";

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
    pub(super) first: FirstRequest,
    method: Ke,
    ke: OurKe,
    /// What we say about redirects.
    redirect: Option<Payload>,
    /// The puzzle over a cookie, which is being solved, and its solution.
    pub(super) solving: Option<JobId>,
    pub(super) solution: Option<Vec<u8>>,
    /// Another gateway's address is looked up.
    redirecting: Option<JobId>,
    /// What an answer said against us, which anyone may have sent (RFC 7296 §2.21.1); and the repetitions done then.
    refusal: Option<(String, u32)>,
}

/// Our key pair.
enum OurKe {
    Generating(JobId),
    Ready(KeyExchange),
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
    if ctx.reauthentications.is_return(core.id) {
        ctx.log("NET", 1, core.tag(), format!("no answer over UDP port {} still", core.path.remote.port()));
        ctx.reauthentications.answer_is_lost(core.id);
        return fail_wants(ctx, &connection.name, &wants, NO_UDP);
    }
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
        let over = Over::first(ctx, now, &connection, (local, remote));
        Self::begin_afresh(ctx, now, connection, want, (local, remote), over)
    }

    /// Begins what is to take the place of an IKE SA over TCP, if UDP gets through.
    pub(crate) fn back_to_udp(
        ctx: &mut Context,
        now: Instant,
        connection: Arc<Connection>,
        want: Want,
        local: IpAddr,
        remote: IpAddr,
    ) -> Option<Box<Self>> {
        Self::begin_afresh(ctx, now, connection, want, (local, remote), Over::UdpOrNothing)
    }

    fn begin_afresh(
        ctx: &mut Context,
        now: Instant,
        connection: Arc<Connection>,
        want: Want,
        (local, remote): (IpAddr, IpAddr),
        over: Over,
    ) -> Option<Box<Self>> {
        let id = ctx.next_ike();
        let line = format!("initiating IKE_SA {}[{}] to {remote}", connection.name, id.0);
        ctx.log("IKE", 0, Some((id, &connection.name)), line);
        let redirects = Redirects::of_initiator(ctx);
        let to = Redirected { from: id, connection, wants: vec![want], local, remote, redirects };
        Self::begin_over(ctx, now, id, to, 1, over)
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
        let first = |ctx: &Context| Over::first(ctx, now, &to.connection, (to.local, to.remote));
        let over = if needs_tcp { Over::Tcp } else { first(ctx) };
        Self::begin_over(ctx, now, id, to, sequence, over)
    }

    fn begin_over(
        ctx: &mut Context,
        now: Instant,
        id: IkeSaId,
        to: Redirected,
        sequence: u32,
        over: Over,
    ) -> Option<Box<Self>> {
        let Redirected { from: _, connection, wants, local, remote, redirects } = to;
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
        if self.attempt.redirecting != Some(job) {
            return Some(self);
        }
        match result {
            Ok((local, remote)) => {
                (self.local, self.remote) = (local, remote);
                let over = Over::first(ctx, now, &self.connection, (local, remote));
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
        let here = self.attempt.first.path.remote.ip();
        match self.redirects.follow(now, parts, &self.attempt.first.nonce, here) {
            Ok(gateway) => {
                ctx.log("IKE", 0, self.tag(), format!("redirected to {gateway}"));
                self.attempt.redirecting = Some(ctx.job(self.id, Job::Resolve(gateway)));
                self.attempt.first.stay_on_udp();
                self.attempt.first.prepare(now);
            }
            Err(reason) => ctx.log("IKE", 1, self.tag(), reason),
        }
        Some(self)
    }

    pub(crate) fn id(&self) -> IkeSaId {
        self.id
    }

    pub(crate) fn spi(&self) -> u64 {
        self.attempt.first.spi
    }

    pub(crate) fn remote(&self) -> SocketAddr {
        self.attempt.first.path.remote
    }

    pub(crate) fn stream(&self) -> Option<StreamId> {
        self.attempt.first.stream()
    }

    /// True when this will become the IKE SA that a request asks for.
    pub(crate) fn serves(&self, connection: &Connection, remote: IpAddr) -> bool {
        // One that may come to nothing while there is another is nobody else's.
        self.attempt.first.over != Over::UdpOrNothing
            && self.connection.authenticates_as(connection)
            && (self.remote == remote || self.redirects.came_from(remote))
    }

    /// The addresses that [`Self::serves`] may agree to.
    pub(crate) fn reached_at(&self) -> [Option<IpAddr>; 2] {
        [Some(self.remote), self.redirects.origin()]
    }

    pub(crate) fn add_want(&mut self, want: Want) {
        self.wants.push(want);
    }

    pub(crate) fn next_timeout(&self) -> Instant {
        self.attempt.first.next_timeout()
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
            path: self.attempt.first.path,
            local_id: self.connection.local_id.clone(),
            remote_id: self.connection.remote.remote_id.as_exact().cloned(),
            peer: None,
            initiator: true,
            initiator_spi: self.attempt.first.spi,
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
        match self.attempt.first.poll(ctx, now) {
            Due::Nothing => Some(self),
            Due::TurnToTcp if self.attempt.first.over == Over::UdpOrNothing => self.stay_on_tcp(ctx),
            Due::TurnToTcp => {
                let line = format!("no answer over UDP, trying TCP port {}", self.connection.tcp_remote_port);
                ctx.log("NET", 1, self.tag(), line);
                self.restart(ctx, now, Over::Tcp)
            }
            Due::NoStream => self.give_up(ctx, now, "the TCP connection timed out"),
            Due::Unprepared if self.attempt.redirecting.is_some() => {
                self.give_up(ctx, now, "the gateway that we were sent to is not found")
            }
            Due::Unprepared => self.give_up(ctx, now, "making a key pair took too long"),
            // The peer has answered, and waits for the solution.
            Due::Repeat(_) if self.attempt.solving.is_some() => Some(self),
            Due::Repeat(done) => {
                if let Some(reason) = self.believed_refusal(done) {
                    ctx.log("IKE", 1, self.tag(), format!("establishing IKE_SA failed, {reason}"));
                    self.abandon(ctx, &reason, CloseReason::Failed);
                    return None;
                }
                self.attempt.first.repeat(ctx, &self.connection);
                Some(self)
            }
            Due::GiveUp(done) => {
                ctx.log("IKE", 1, self.tag(), format!("giving up after {done} retransmits"));
                self.give_up(ctx, now, "the peer does not answer")
            }
        }
    }

    pub(crate) fn handle_stream_opened(
        mut self: Box<Self>,
        ctx: &mut Context,
        now: Instant,
        stream: StreamId,
        local: SocketAddr,
    ) -> Option<Box<Self>> {
        if self.attempt.first.stream_opened(now, stream, local) {
            self.attempt.prepared(ctx, now, &self.connection);
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
                if self.attempt.first.is_preparing() {
                    self.attempt.send(ctx, now, &self.connection);
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
        if self.attempt.redirecting.is_some() {
            return Some(self);
        }
        match self.attempt.first.stream_closed(ctx, now, &self.connection, stream, reason) {
            Lost::Other | Lost::Reopened => Some(self),
            Lost::Try(over) => self.restart(ctx, now, over),
            Lost::Nothing => self.give_up(ctx, now, &format!("the TCP connection failed: {reason}")),
        }
    }

    /// An ICMP error: no proof of anything, but a reason to try TCP now rather than later.
    pub(crate) fn handle_unreachable(
        self: Box<Self>,
        ctx: &mut Context,
        now: Instant,
        remote: SocketAddr,
    ) -> Option<Box<Self>> {
        if self.attempt.first.may_turn_to_tcp() && self.attempt.first.path.remote == remote {
            if self.attempt.first.over == Over::UdpOrNothing {
                return self.stay_on_tcp(ctx);
            }
            ctx.log("NET", 1, self.tag(), format!("{remote} is unreachable over UDP, trying TCP"));
            return self.restart(ctx, now, Over::Tcp);
        }
        Some(self)
    }

    fn stay_on_tcp(self: Box<Self>, ctx: &mut Context) -> Option<Box<Self>> {
        let line = format!("no answer over UDP from {} still", self.attempt.first.path.remote);
        ctx.log("NET", 1, self.tag(), line);
        self.abandon(ctx, NO_UDP, CloseReason::Timeout);
        None
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
        if !self.attempt.first.is_answered_by(&header, &path, ExchangeType::IKE_SA_INIT) {
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
        if parts.has(NotifyType::COOKIE) && parts.sa.is_none() {
            // One puzzle at a time.
            if self.attempt.solving.is_none() && self.attempt.first.takes_cookie(&parts) {
                self.attempt.demanded(ctx, now, self.id, &self.connection, &parts);
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
        let spis = Spis { initiator: self.attempt.first.spi, responder: header.responder_spi };
        let fake = self.connection.force_encapsulation;
        let nat = Nat::detect(&parts, spis.initiator, spis.responder, &self.attempt.first.path, fake);
        let Self { id, name, connection, wants, sequence, redirects, attempt, .. } = *self;
        let Attempt { first, ke, .. } = attempt;
        let (path, ni, falls_back) = (first.path, first.nonce.clone(), first.over.doubts_udp());
        let (Some(request), OurKe::Ready(ke)) = (first.into_octets(), ke) else { return None };
        let core = initiators_core(ctx, &connection, (id, name, sequence), (path, falls_back), nat, redirects);
        let fragmentation =
            connection.fragmentation != Fragmentation::No && parts.has(NotifyType::IKEV2_FRAGMENTATION_SUPPORTED);
        let material = InitMaterial {
            ours: request,
            theirs: datagram.to_vec(),
            ni,
            nr: nr.clone(),
            peer_hashes: parts.signature_hashes().filter(|_| ctx.config.signature_authentication),
            announced: parts.auth_announcements(),
            settings: ctx.config.signatures,
            cert_requests: parts.cert_requests,
            cert_requested: parts.cert_requested,
            raw_key_requested: parts.raw_key_requested,
            intermediate: IntAuth::default(),
            use_ppk,
            own_key: None,
        };
        let work = KeyWork::Agree { ours: ke, peer: public.clone() };
        let agreed = Agreed { suite, spis, fragmentation, childless };
        Some(InitiatorIntermediate::begin(ctx, now, core, agreed, connection, wants, material, work))
    }

    /// RFC 7296 §1.2: the responder wants another group, one that we offered.
    fn change_group(mut self: Box<Self>, ctx: &mut Context, now: Instant, data: &[u8]) -> Option<Box<Self>> {
        let group = <[u8; 2]>::try_from(data).ok().map(|two| Ke(u16::from_be_bytes(two)));
        let group = group.filter(|group| offers(&proposals(&self.connection), *group));
        let group = group.filter(|group| *group != self.attempt.method && crypto::supported(*group));
        let Some(group) = group.filter(|_| self.attempt.first.may_restart()) else {
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
        self.attempt.first.prepare(now);
        Some(self)
    }

    /// Somebody says no. It is believed at once over a stream, where nobody else can answer, and over UDP when so many
    /// repetitions have brought nothing better (RFC 7296 §2.21.1).
    fn refused(mut self: Box<Self>, ctx: &mut Context, reason: String) -> Option<Box<Self>> {
        ctx.log("IKE", 1, self.tag(), reason.clone());
        let Some(done) = self.attempt.first.repetitions().filter(|_| self.stream().is_none()) else {
            self.abandon(ctx, &reason, CloseReason::Failed);
            return None;
        };
        self.attempt.refusal.get_or_insert((reason, done));
        Some(self)
    }

    /// What was said against us, if the peer had its chance to say something else.
    fn believed_refusal(&self, done: u32) -> Option<String> {
        let (reason, at) = self.attempt.refusal.as_ref()?;
        (done > at.saturating_add(REFUSED_REPETITIONS)).then(|| reason.clone())
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
            let over = Over::first(ctx, now, &self.connection, (self.local, self.remote));
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
                ctx.release_ike_spi(old.first.spi);
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
        ends: (IpAddr, IpAddr),
        over: Over,
        redirects: &Redirects,
    ) -> Result<Self, String> {
        let method = methods(&proposals(connection)).into_iter().find(|method| crypto::supported(*method));
        let method = method.ok_or_else(|| "no proposal has a key exchange method that we support".to_owned())?;
        let ke = OurKe::Generating(ctx.key_work(id, KeyWork::Generate(method)));
        let first = FirstRequest::begin(ctx, now, id, connection, ends, over, ctx.config.retransmission);
        let redirect = redirects.payload();
        let mut attempt =
            Self { first, method, ke, redirect, solving: None, solution: None, redirecting: None, refusal: None };
        if !over.is_tcp() {
            attempt.prepared(ctx, now, connection);
        }
        Ok(attempt)
    }

    /// The path is there; the request goes as soon as the key pair, or a puzzle's solution, is there too.
    fn prepared(&mut self, ctx: &mut Context, now: Instant, connection: &Connection) {
        if self.solving.is_none() {
            self.send(ctx, now, connection);
        }
    }

    /// Builds and sends the request with what the answers so far asked for.
    pub(super) fn send(&mut self, ctx: &mut Context, now: Instant, connection: &Connection) {
        let OurKe::Ready(ke) = &self.ke else { return };
        let offered = proposals(connection);
        let intermediate = offers_additional(&offered);
        let mut payloads = Vec::new();
        // RFC 8019 §7.1.2
        payloads.extend(self.solution.clone().map(Payload::PuzzleSolution));
        payloads.push(Payload::Sa(offered));
        payloads.push(Payload::Ke { group: ke.method(), data: ke.public().to_vec() });
        payloads.push(Payload::Nonce(self.first.nonce.clone()));
        let fake = connection.force_encapsulation;
        payloads.extend(nat::payloads(self.first.spi, 0, &self.first.path, fake));
        payloads.extend(self.redirect.clone());
        payloads.extend(capabilities(ctx, connection.fragmentation != Fragmentation::No));
        if ppk::of_connection(ctx, connection).is_some() {
            payloads.push(ppk::offer());
        }
        if intermediate {
            payloads.push(notify(NotifyType::INTERMEDIATE_EXCHANGE_SUPPORTED, Vec::new()));
        }
        self.first.send(ctx, now, connection, ExchangeType::IKE_SA_INIT, payloads);
    }
}

/// What an IKE SA of ours is after its first exchange, made anew or resumed.
///
/// RFC 7296 §2.23: from IKE_AUTH on both sides use the port for encapsulation, if there is a NAT; with MOBIKE also without
/// one, since there may be one on another path (RFC 4555 §3.3). A network may drop that port alone; `may_fall_back` says
/// that TCP is untried.
pub(super) fn initiators_core(
    ctx: &Context,
    connection: &Connection,
    (id, name, sequence): (IkeSaId, Arc<str>, u32),
    (mut path, may_fall_back): (Path, bool),
    nat: Nat,
    redirects: Redirects,
) -> Core {
    let floats = (nat.any() || (connection.mobike && nat.traversal)) && path.transport == Transport::Udp;
    if floats {
        path.transport = Transport::UdpEncap;
        path.local.set_port(ctx.config.nat_port);
        path.remote.set_port(ctx.config.nat_port);
    }
    let falls_back = floats && may_fall_back;
    let dscp = connection.dscp;
    Core { id, name, path, nat, stream_originator: true, redirects, sequence, assigned: None, falls_back, dscp }
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
