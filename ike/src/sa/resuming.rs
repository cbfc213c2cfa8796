//! IKE_SESSION_RESUME as initiator (RFC 5723 §4.3): comes back to a gateway with its ticket.
//!
//! Nothing in an answer is authentic here. What leads to no keys, a refusal, an error or silence, leads to IKE_SA_INIT.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipsec::plane::StreamId;

use super::auth::{InitMaterial, IntAuth};
use super::channel::{Channel, Spis};
use super::fault::{notify, notify_name};
use super::first_request::{Due, FirstRequest, Lost, Over, udp_path};
use super::init::{Again, CHILDLESS_IKEV2_SUPPORTED, initiators_core};
use super::nat::{self, Nat};
use super::parts::Parts;
use super::redirect::{Redirected, Redirects};
use super::{IkeSa, Initiating, InitiatorAuth, Want, fail_wants, local_identity};
use crate::config::{Connection, Fragmentation, Retransmission};
use crate::crypto::{self, KeySeed};
use crate::engine::context::Context;
use crate::engine::tickets::Held;
use crate::engine::{CloseReason, Event, IkeSaId, IkeSaStatus, IkeState, Path};
use crate::wire::{ExchangeType, Message, NotifyType, Payload};

/// The first wait for an answer, at most, and the repetitions: a gateway that knows tickets no more is silent.
const FIRST_WAIT: Duration = Duration::from_secs(2);
const REPETITIONS: u32 = 1;

/// An IKE SA whose IKE_SESSION_RESUME request is out, or about to be.
pub(crate) struct Resuming {
    id: IkeSaId,
    /// Connection's name.
    name: Arc<str>,
    /// What is begun from the start if this fails.
    from_start: Redirected,
    sequence: u32,
    held: Held,
    first: FirstRequest,
}

/// Begins an IKE SA: with a ticket if we have one from that gateway, from the start otherwise. `None` when it failed at
/// once (the reason is out as an event).
pub(crate) fn begin(
    ctx: &mut Context,
    now: Instant,
    connection: Arc<Connection>,
    want: Want,
    local: IpAddr,
    remote: IpAddr,
) -> Option<(IkeSaId, IkeSa)> {
    let Some(held) = take_ticket(ctx, now, &connection, (local, remote)) else {
        let sa = Initiating::begin(ctx, now, connection, want, local, remote)?;
        return Some((sa.id(), IkeSa::Initiating(sa)));
    };
    let (from, redirects) = (ctx.next_ike(), Redirects::of_initiator(ctx));
    let from_start = Redirected { from, connection, wants: vec![want], local, remote, redirects };
    let sa = Resuming::begin(ctx, now, from, Again { from_start, sequence: 1, needs_tcp: false }, held);
    Some((from, IkeSa::Resuming(sa)))
}

/// Begins the next sequence of tries, the one before being over.
pub(crate) fn again(ctx: &mut Context, now: Instant, again: Again) -> Option<(IkeSaId, IkeSa)> {
    let Redirected { connection, local, remote, .. } = &again.from_start;
    let ticket = if again.needs_tcp { None } else { take_ticket(ctx, now, connection, (*local, *remote)) };
    match ticket {
        Some(held) => {
            let id = ctx.next_ike();
            Some((id, IkeSa::Resuming(Resuming::begin(ctx, now, id, again, held))))
        }
        None => {
            let sa = Initiating::again(ctx, now, again)?;
            Some((sa.id(), IkeSa::Initiating(sa)))
        }
    }
}

/// The ticket for a gateway.
fn take_ticket(ctx: &mut Context, now: Instant, connection: &Connection, ends: (IpAddr, IpAddr)) -> Option<Held> {
    let path = udp_path(ctx, connection, ends.0, ends.1);
    ctx.shared.tickets.lock().take(now, connection, ends.1, &local_identity(connection, &path))
}

/// True when an IKE SA with this gateway would begin with a ticket.
pub(super) fn has_ticket(
    ctx: &Context,
    now: Instant,
    connection: &Connection,
    (local, remote): (IpAddr, IpAddr),
) -> bool {
    let local_id = local_identity(connection, &udp_path(ctx, connection, local, remote));
    ctx.shared.tickets.lock().has(now, connection, remote, &local_id)
}

impl Resuming {
    fn begin(ctx: &mut Context, now: Instant, id: IkeSaId, again: Again, held: Held) -> Box<Self> {
        let Again { from_start, sequence, .. } = again;
        let connection = &from_start.connection;
        let line = format!("resuming IKE_SA {}[{}] with {}", connection.name, id.0, from_start.remote);
        ctx.log("IKE", 0, Some((id, &connection.name)), line);
        // RFC 9329 §7.3: the transport is chosen as for an IKE SA from scratch.
        let ends = (from_start.local, from_start.remote);
        let over = Over::first(ctx, now, connection, ends);
        let name = ctx.connections.name(&connection.name);
        let first = FirstRequest::begin(ctx, now, id, connection, ends, over, policy(ctx));
        let mut sa = Box::new(Self { id, name, from_start, sequence, held, first });
        sa.send_over_udp(ctx, now);
        sa
    }

    /// Sends the request where there is no stream to wait for.
    fn send_over_udp(&mut self, ctx: &mut Context, now: Instant) {
        if self.first.is_preparing() {
            self.send(ctx, now);
        }
    }

    /// The same ticket over another transport: none has reached the gateway, or its answer has not reached us.
    fn restart(mut self: Box<Self>, ctx: &mut Context, now: Instant, over: Over) -> Option<IkeSa> {
        let ends = (self.from_start.local, self.from_start.remote);
        let connection = &self.from_start.connection;
        let first = FirstRequest::begin(ctx, now, self.id, connection, ends, over, policy(ctx));
        let old = std::mem::replace(&mut self.first, first);
        ctx.release_ike_spi(old.spi);
        self.send_over_udp(ctx, now);
        Some(IkeSa::Resuming(self))
    }

    pub(crate) fn name(&self) -> Arc<str> {
        Arc::clone(&self.name)
    }

    pub(crate) fn spi(&self) -> u64 {
        self.first.spi
    }

    pub(crate) fn remote(&self) -> SocketAddr {
        self.first.path.remote
    }

    pub(crate) fn stream(&self) -> Option<StreamId> {
        self.first.stream()
    }

    /// True when this will become the IKE SA that a request asks for.
    pub(crate) fn serves(&self, connection: &Connection, remote: IpAddr) -> bool {
        let Redirected { connection: ours, remote: to, redirects, .. } = &self.from_start;
        ours.authenticates_as(connection) && (*to == remote || redirects.came_from(remote))
    }

    /// The addresses that [`Self::serves`] may agree to.
    pub(crate) fn reached_at(&self) -> [Option<IpAddr>; 2] {
        [Some(self.from_start.remote), self.from_start.redirects.origin()]
    }

    pub(crate) fn add_want(&mut self, want: Want) {
        self.from_start.wants.push(want);
    }

    pub(crate) fn next_timeout(&self) -> Instant {
        self.first.next_timeout()
    }

    pub(crate) fn status(&self) -> IkeSaStatus {
        IkeSaStatus {
            id: self.id,
            connection: self.from_start.connection.name.clone(),
            state: IkeState::Connecting,
            path: self.first.path,
            local_id: Some(self.held.grant.peer.local_id.clone()),
            remote_id: Some(self.held.grant.peer.id.clone()),
            peer: None,
            initiator: true,
            initiator_spi: self.first.spi,
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
            tasks_active: vec!["IKE_RESUME", "IKE_NATD", "IKE_AUTH", "CHILD_CREATE"],
            children: Vec::new(),
        }
    }

    /// Builds and sends the request (§4.3.2).
    fn send(&mut self, ctx: &mut Context, now: Instant) {
        let Self { from_start, held, first, .. } = self;
        let connection = &from_start.connection;
        let mut payloads = vec![Payload::Nonce(first.nonce.clone())];
        payloads.push(notify(NotifyType::TICKET_OPAQUE, held.ticket.clone()));
        payloads.extend(nat::payloads(first.spi, 0, &first.path, connection.force_encapsulation));
        payloads.extend(from_start.redirects.payload());
        if connection.fragmentation != Fragmentation::No {
            payloads.push(notify(NotifyType::IKEV2_FRAGMENTATION_SUPPORTED, Vec::new()));
        }
        first.send(ctx, now, connection, ExchangeType::IKE_SESSION_RESUME, payloads);
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
        if !self.first.is_answered_by(&header, &path, ExchangeType::IKE_SESSION_RESUME) {
            return Some(IkeSa::Resuming(self));
        }
        let parts = match Parts::collect(message.payloads) {
            Ok(parts) => parts,
            Err(fault) => {
                ctx.log("ENC", 1, self.tag(), format!("IKE_SESSION_RESUME response ignored: {fault}"));
                return Some(IkeSa::Resuming(self));
            }
        };
        if let Some(nr) = parts.nonce.clone().filter(|_| header.responder_spi != 0) {
            return self.accept(ctx, now, header.responder_spi, &parts, nr, datagram);
        }
        if parts.has(NotifyType::COOKIE) {
            if self.first.takes_cookie(&parts) {
                self.send(ctx, now);
            }
            return Some(IkeSa::Resuming(self));
        }
        // Whoever says no, it costs us no more than this: a full authentication.
        let reason = match parts.error() {
            _ if parts.has(NotifyType::TICKET_NACK) => "the peer does not take the ticket".to_owned(),
            _ if parts.has(NotifyType::REDIRECT) => "the peer sends us elsewhere".to_owned(),
            Some(error) => format!("received {} notify error", notify_name(error.kind)),
            None => return Some(IkeSa::Resuming(self)),
        };
        // Where UDP was silent and this came over a stream, there is no need to try that again.
        let needs_tcp = self.first.over.is_tcp();
        self.from_start(ctx, now, &reason, needs_tcp)
    }

    /// Both nonces make new keys out of the old SK_d (§5.1).
    fn accept(
        self: Box<Self>,
        ctx: &mut Context,
        now: Instant,
        responder_spi: u64,
        parts: &Parts,
        nr: Vec<u8>,
        datagram: &[u8],
    ) -> Option<IkeSa> {
        let spis = Spis { initiator: self.first.spi, responder: responder_spi };
        let suite = self.held.suite;
        let seed = KeySeed { ni: &self.first.nonce, nr: &nr, spi_i: spis.initiator, spi_r: spis.responder };
        let keys = crypto::resumed_ike_keys(&suite, &self.held.d, seed).ok();
        let channel = keys.and_then(|keys| Channel::new(suite, keys, spis, true, false).ok());
        let Some(mut channel) = channel else { return self.from_start(ctx, now, "the PRF is not supported", false) };
        let Self { id, name, from_start, sequence, held, first } = *self;
        let (path, ni, falls_back) = (first.path, first.nonce.clone(), first.over == Over::UdpThenTcp);
        let request = first.into_octets()?;
        let Redirected { connection, wants, redirects, .. } = from_start;
        let nat = Nat::detect(parts, spis.initiator, spis.responder, &path, connection.force_encapsulation);
        channel.fragmentation =
            connection.fragmentation != Fragmentation::No && parts.has(NotifyType::IKEV2_FRAGMENTATION_SUPPORTED);
        let core = initiators_core(ctx, &connection, (id, name, sequence), (path, falls_back), nat, redirects);
        let material = InitMaterial {
            ours: request,
            theirs: datagram.to_vec(),
            ni,
            nr,
            peer_hashes: None,
            announced: None,
            settings: ctx.config.signatures,
            cert_requests: Vec::new(),
            cert_requested: false,
            raw_key_requested: false,
            intermediate: IntAuth::default(),
            use_ppk: false,
            own_key: None,
        };
        let childless = parts.has(CHILDLESS_IKEV2_SUPPORTED);
        Some(InitiatorAuth::resume(ctx, now, core, channel, connection, wants, material, childless, held.grant))
    }

    /// Goes on with IKE_SA_INIT.
    fn from_start(self: Box<Self>, ctx: &mut Context, now: Instant, reason: &str, needs_tcp: bool) -> Option<IkeSa> {
        ctx.log("IKE", 1, self.tag(), format!("{reason}, authenticating from the start"));
        let Self { id, from_start, sequence, first, .. } = *self;
        ctx.release_ike_spi(first.spi);
        Initiating::begin_as(ctx, now, id, from_start, sequence, needs_tcp).map(IkeSa::Initiating)
    }

    /// The same after silence: the ticket was not used, and is for the next attempt, should this one fail (§4.3.1).
    fn unanswered(mut self: Box<Self>, ctx: &mut Context, now: Instant) -> Option<IkeSa> {
        let (ticket, grant) = (std::mem::take(&mut self.held.ticket), self.held.grant.clone());
        let (ends, suite, d) = (self.held.ends, self.held.suite, self.held.d.duplicate());
        ctx.shared.tickets.lock().hold(now, self.from_start.remote, Held { ticket, ends, suite, d, grant });
        self.from_start(ctx, now, "no answer to the ticket", false)
    }

    pub(crate) fn handle_timeout(mut self: Box<Self>, ctx: &mut Context, now: Instant) -> Option<IkeSa> {
        match self.first.poll(ctx, now) {
            Due::Nothing => Some(IkeSa::Resuming(self)),
            Due::TurnToTcp => {
                let port = self.from_start.connection.tcp_remote_port;
                ctx.log("NET", 1, self.tag(), format!("no answer to the ticket over UDP, trying TCP port {port}"));
                self.restart(ctx, now, Over::Tcp)
            }
            Due::Repeat(_) => {
                self.first.repeat(ctx, &self.from_start.connection);
                Some(IkeSa::Resuming(self))
            }
            Due::NoStream | Due::Unprepared | Due::GiveUp(_) => self.unanswered(ctx, now),
        }
    }

    /// An ICMP error: no proof of anything, but a reason to try TCP now rather than later.
    pub(crate) fn handle_unreachable(
        self: Box<Self>,
        ctx: &mut Context,
        now: Instant,
        remote: SocketAddr,
    ) -> Option<IkeSa> {
        if !self.first.may_turn_to_tcp() || self.first.path.remote != remote {
            return Some(IkeSa::Resuming(self));
        }
        ctx.log("NET", 1, self.tag(), format!("{remote} is unreachable over UDP, trying TCP"));
        self.restart(ctx, now, Over::Tcp)
    }

    pub(crate) fn handle_stream_opened(
        mut self: Box<Self>,
        ctx: &mut Context,
        now: Instant,
        stream: StreamId,
        local: SocketAddr,
    ) -> Option<IkeSa> {
        if self.first.stream_opened(now, stream, local) {
            self.send(ctx, now);
        }
        Some(IkeSa::Resuming(self))
    }

    pub(crate) fn handle_stream_closed(
        mut self: Box<Self>,
        ctx: &mut Context,
        now: Instant,
        stream: StreamId,
        reason: &str,
    ) -> Option<IkeSa> {
        match self.first.stream_closed(ctx, now, &self.from_start.connection, stream, reason) {
            Lost::Other | Lost::Reopened => Some(IkeSa::Resuming(self)),
            Lost::Try(over) => self.restart(ctx, now, over),
            Lost::Nothing => {
                ctx.log("NET", 1, self.tag(), format!("the TCP connection failed: {reason}"));
                self.unanswered(ctx, now)
            }
        }
    }

    /// Ends before anything came up.
    pub(crate) fn abandon(self, ctx: &mut Context, reason: &str, close: CloseReason) {
        fail_wants(ctx, &self.from_start.connection.name, &self.from_start.wants, reason);
        let status = self.status();
        ctx.event(Event::IkeDown(Box::new(status), close));
    }

    fn tag(&self) -> Option<(IkeSaId, &str)> {
        Some((self.id, &self.from_start.connection.name))
    }
}

/// How the request is repeated.
fn policy(ctx: &Context) -> Retransmission {
    let configured = ctx.config.retransmission;
    let (timeout, tries) = (configured.timeout.min(FIRST_WAIT), configured.tries.min(REPETITIONS));
    Retransmission { timeout, tries, ..configured }
}
