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
use super::init::{Again, CHILDLESS_IKEV2_SUPPORTED, NONCE_LENGTH, Over, float, udp_path};
use super::nat::{self, Nat};
use super::parts::Parts;
use super::redirect::{Redirected, Redirects};
use super::retry::{Due, Retry, after};
use super::{Core, IkeSa, Initiating, InitiatorAuth, Want, fail_wants, local_identity};
use crate::config::{Connection, Fragmentation, Retransmission, TcpPolicy};
use crate::crypto::{self, KeySeed};
use crate::engine::context::Context;
use crate::engine::tickets::Held;
use crate::engine::{CloseReason, Event, IkeSaId, IkeSaStatus, IkeState, Path, Transport};
use crate::wire::{self, ExchangeType, Header, Message, NotifyType, Payload};

/// The first wait for an answer, at most, and the repetitions: a gateway that knows tickets no more is silent.
const FIRST_WAIT: Duration = Duration::from_secs(2);
const REPETITIONS: u32 = 1;
/// Cookies for one attempt.
const MAX_RESTARTS: u8 = 4;

/// An IKE SA whose IKE_SESSION_RESUME request is out, or about to be.
pub(crate) struct Resuming {
    id: IkeSaId,
    /// Connection's name.
    name: Arc<str>,
    /// What is begun from the start if this fails.
    from_start: Redirected,
    sequence: u32,
    held: Held,
    spi: u64,
    path: Path,
    nonce: Vec<u8>,
    cookie: Option<Vec<u8>>,
    restarts: u8,
    progress: Progress,
}

enum Progress {
    /// Waiting for the stream.
    Opening { deadline: Instant },
    /// The request, as sent.
    Sent { request: Vec<u8>, retry: Retry },
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
    let Some((held, path)) = take_ticket(ctx, now, &connection, (local, remote)) else {
        let sa = Initiating::begin(ctx, now, connection, want, local, remote)?;
        return Some((sa.id(), IkeSa::Initiating(sa)));
    };
    let (from, redirects) = (ctx.next_ike(), Redirects::of_initiator(ctx));
    let from_start = Redirected { from, connection, wants: vec![want], local, remote, redirects };
    let sa = Resuming::begin(ctx, now, from, Again { from_start, sequence: 1, needs_tcp: false }, held, path);
    Some((from, IkeSa::Resuming(sa)))
}

/// Begins the next sequence of tries, the one before being over.
pub(crate) fn again(ctx: &mut Context, now: Instant, again: Again) -> Option<(IkeSaId, IkeSa)> {
    let Redirected { connection, local, remote, .. } = &again.from_start;
    let ticket = if again.needs_tcp { None } else { take_ticket(ctx, now, connection, (*local, *remote)) };
    match ticket {
        Some((held, path)) => {
            let id = ctx.next_ike();
            Some((id, IkeSa::Resuming(Resuming::begin(ctx, now, id, again, held, path))))
        }
        None => {
            let sa = Initiating::again(ctx, now, again)?;
            Some((sa.id(), IkeSa::Initiating(sa)))
        }
    }
}

/// The ticket for a gateway, and the path to it over UDP.
fn take_ticket(
    ctx: &mut Context,
    now: Instant,
    connection: &Connection,
    (local, remote): (IpAddr, IpAddr),
) -> Option<(Held, Path)> {
    let path = udp_path(ctx, connection, local, remote);
    let held = ctx.shared.tickets.lock().take(now, connection, remote, &local_identity(connection, &path))?;
    Some((held, path))
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
    fn begin(ctx: &mut Context, now: Instant, id: IkeSaId, again: Again, held: Held, udp: Path) -> Box<Self> {
        let Again { from_start, sequence, .. } = again;
        let connection = &from_start.connection;
        let line = format!("resuming IKE_SA {}[{}] with {}", connection.name, id.0, from_start.remote);
        ctx.log("IKE", 0, Some((id, &connection.name)), line);
        let deadline = after(now, super::retry::total(&policy(ctx)));
        // RFC 9329 §7.3: the transport is chosen as for an IKE SA from scratch.
        let opens = Over::first(ctx, now, connection, from_start.local, from_start.remote).is_tcp();
        let path = if opens {
            let local = SocketAddr::new(from_start.local, 0);
            let remote = SocketAddr::new(from_start.remote, connection.tcp_remote_port);
            Path { local, remote, transport: Transport::Stream(ctx.open_stream(connection, local.ip(), remote)) }
        } else {
            udp
        };
        let name = ctx.connections.name(&connection.name);
        let mut sa = Box::new(Self {
            id,
            name,
            from_start,
            sequence,
            held,
            spi: ctx.reserve_ike_spi(id),
            path,
            nonce: ctx.random(NONCE_LENGTH),
            cookie: None,
            restarts: 0,
            progress: Progress::Opening { deadline },
        });
        if !opens {
            sa.send(ctx, now);
        }
        sa
    }

    pub(crate) fn name(&self) -> Arc<str> {
        Arc::clone(&self.name)
    }

    pub(crate) fn spi(&self) -> u64 {
        self.spi
    }

    pub(crate) fn remote(&self) -> SocketAddr {
        self.path.remote
    }

    pub(crate) fn stream(&self) -> Option<StreamId> {
        match self.path.transport {
            Transport::Stream(stream) => Some(stream),
            Transport::Udp | Transport::UdpEncap => None,
        }
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
        match &self.progress {
            Progress::Opening { deadline } => *deadline,
            Progress::Sent { retry, .. } => retry.at,
        }
    }

    pub(crate) fn status(&self) -> IkeSaStatus {
        IkeSaStatus {
            id: self.id,
            connection: self.from_start.connection.name.clone(),
            state: IkeState::Connecting,
            path: self.path,
            local_id: Some(self.held.grant.peer.local_id.clone()),
            remote_id: Some(self.held.grant.peer.id.clone()),
            peer: None,
            initiator: true,
            initiator_spi: self.spi,
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

    /// Builds and sends the request (§4.3.2): the cookie, if one was asked for, comes first.
    fn send(&mut self, ctx: &mut Context, now: Instant) {
        let connection = &self.from_start.connection;
        let mut payloads = Vec::new();
        payloads.extend(self.cookie.clone().map(|cookie| notify(NotifyType::COOKIE, cookie)));
        payloads.push(Payload::Nonce(self.nonce.clone()));
        payloads.push(notify(NotifyType::TICKET_OPAQUE, self.held.ticket.clone()));
        payloads.extend(nat::payloads(self.spi, 0, &self.path, connection.force_encapsulation));
        payloads.extend(self.from_start.redirects.payload());
        if connection.fragmentation != Fragmentation::No {
            payloads.push(notify(NotifyType::IKEV2_FRAGMENTATION_SUPPORTED, Vec::new()));
        }
        let header = Header {
            initiator_spi: self.spi,
            responder_spi: 0,
            major: 2,
            minor: 0,
            exchange: ExchangeType::IKE_SESSION_RESUME,
            from_initiator: true,
            response: false,
            message_id: 0,
        };
        let request = wire::encode(&Message { header, payloads });
        let retry = Retry::start(now, &policy(ctx), self.stream().is_some(), ctx.rng.as_mut());
        let line = format!("sending IKE_SESSION_RESUME request to {}", self.path.remote);
        ctx.log("NET", 2, self.tag(), line);
        ctx.transmit(self.path, [request.clone()]);
        self.progress = Progress::Sent { request, retry };
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
            && header.exchange == ExchangeType::IKE_SESSION_RESUME
            && header.message_id == 0
            && !header.from_initiator;
        let sent = matches!(self.progress, Progress::Sent { .. });
        // An answer comes from where the request went (RFC 7296 §2.11).
        if !expected || !sent || path.remote != self.path.remote || path.transport != self.path.transport {
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
        if let Some(cookie) = parts.notify(NotifyType::COOKIE) {
            // RFC 7296 §2.6: 1 to 64 octets.
            if (1..=64).contains(&cookie.data.len()) && self.restarts < MAX_RESTARTS {
                self.restarts = self.restarts.saturating_add(1);
                self.cookie = Some(cookie.data.clone());
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
        self.from_start(ctx, now, &reason)
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
        let spis = Spis { initiator: self.spi, responder: responder_spi };
        let suite = self.held.suite;
        let seed = KeySeed { ni: &self.nonce, nr: &nr, spi_i: spis.initiator, spi_r: spis.responder };
        let keys = crypto::resumed_ike_keys(&suite, &self.held.d, seed).ok();
        let channel = keys.and_then(|keys| Channel::new(suite, keys, spis, true, false).ok());
        let Some(mut channel) = channel else { return self.from_start(ctx, now, "the PRF is not supported") };
        let Self { id, name, from_start, sequence, held, path, nonce, progress, .. } = *self;
        let Progress::Sent { request, .. } = progress else { return None };
        let Redirected { connection, wants, redirects, .. } = from_start;
        let nat = Nat::detect(parts, spis.initiator, spis.responder, &path, connection.force_encapsulation);
        channel.fragmentation =
            connection.fragmentation != Fragmentation::No && parts.has(NotifyType::IKEV2_FRAGMENTATION_SUPPORTED);
        let stream_originator = matches!(path.transport, Transport::Stream(_));
        let mut core =
            Core { id, name, path, nat, stream_originator, redirects, sequence, assigned: None, falls_back: false };
        let falls_back = connection.tcp == TcpPolicy::Fallback;
        float(ctx, &connection, &mut core, falls_back);
        let material = InitMaterial {
            ours: request,
            theirs: datagram.to_vec(),
            ni: nonce,
            nr,
            peer_hashes: None,
            announced: None,
            settings: ctx.config.signatures,
            cert_requests: Vec::new(),
            cert_requested: false,
            intermediate: IntAuth::default(),
            use_ppk: false,
        };
        let childless = parts.has(CHILDLESS_IKEV2_SUPPORTED);
        Some(InitiatorAuth::resume(ctx, now, core, channel, connection, wants, material, childless, held.grant))
    }

    /// Goes on with IKE_SA_INIT.
    fn from_start(self: Box<Self>, ctx: &mut Context, now: Instant, reason: &str) -> Option<IkeSa> {
        ctx.log("IKE", 1, self.tag(), format!("{reason}, authenticating from the start"));
        let Self { id, from_start, sequence, spi, .. } = *self;
        ctx.release_ike_spi(spi);
        Initiating::begin_as(ctx, now, id, from_start, sequence, false).map(IkeSa::Initiating)
    }

    /// The same after silence: the ticket was not used, and is for the next attempt, should this one fail (§4.3.1).
    fn unanswered(mut self: Box<Self>, ctx: &mut Context, now: Instant) -> Option<IkeSa> {
        let (ticket, grant) = (std::mem::take(&mut self.held.ticket), self.held.grant.clone());
        let (ends, suite, d) = (self.held.ends, self.held.suite, self.held.d.duplicate());
        ctx.shared.tickets.lock().hold(now, self.from_start.remote, Held { ticket, ends, suite, d, grant });
        self.from_start(ctx, now, "no answer to the ticket")
    }

    pub(crate) fn handle_timeout(mut self: Box<Self>, ctx: &mut Context, now: Instant) -> Option<IkeSa> {
        let policy = policy(ctx);
        match &mut self.progress {
            Progress::Opening { deadline } if *deadline <= now => self.unanswered(ctx, now),
            Progress::Opening { .. } => Some(IkeSa::Resuming(self)),
            Progress::Sent { request, retry } => match retry.poll(now, &policy, ctx.rng.as_mut()) {
                Due::Nothing => Some(IkeSa::Resuming(self)),
                Due::Resend => {
                    let (count, request) = (retry.done, request.clone());
                    ctx.log("IKE", 1, self.tag(), format!("retransmit {count} of request with message ID 0"));
                    ctx.transmit(self.path, [request]);
                    Some(IkeSa::Resuming(self))
                }
                Due::GiveUp => self.unanswered(ctx, now),
            },
        }
    }

    pub(crate) fn handle_stream_opened(
        mut self: Box<Self>,
        ctx: &mut Context,
        now: Instant,
        stream: StreamId,
        local: SocketAddr,
    ) -> Option<IkeSa> {
        if self.stream() == Some(stream) && matches!(self.progress, Progress::Opening { .. }) {
            self.path.local = local;
            self.send(ctx, now);
        }
        Some(IkeSa::Resuming(self))
    }

    pub(crate) fn handle_stream_closed(
        self: Box<Self>,
        ctx: &mut Context,
        now: Instant,
        stream: StreamId,
        reason: &str,
    ) -> Option<IkeSa> {
        if self.stream() != Some(stream) {
            return Some(IkeSa::Resuming(self));
        }
        ctx.log("NET", 1, self.tag(), format!("the TCP connection failed: {reason}"));
        self.unanswered(ctx, now)
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
