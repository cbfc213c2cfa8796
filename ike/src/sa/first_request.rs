//! The request that begins an IKE SA, IKE_SA_INIT or IKE_SESSION_RESUME: what it goes over, UDP or a stream, and how it is
//! repeated there (RFC 7296 §2.1, RFC 9329 §5.1, §6.3).

use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use ipsec::plane::StreamId;

use super::fault::notify;
use super::parts::Parts;
use super::retry::{self, Retry, after};
use crate::config::{Connection, Retransmission, TcpPolicy};
use crate::engine::context::Context;
use crate::engine::{IkeSaId, Path, Transport};
use crate::wire::{self, ExchangeType, Header, Message, NotifyType, Payload};

/// Answers that make us send the request again, for one attempt: cookies and other groups.
const MAX_RESTARTS: u8 = 4;
/// Length of our nonces: at least half the key size of any PRF (RFC 7296 §2.10).
pub(crate) const NONCE_LENGTH: usize = 32;

/// What a request goes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Over {
    Udp,
    /// UDP, and TCP where that stays silent (RFC 9329 §5.1).
    UdpThenTcp,
    /// UDP, and nothing where that stays as silent: there is an IKE SA over TCP.
    UdpOrNothing,
    Tcp,
    /// TCP because it was needed here before; UDP where that fails (RFC 9329 §5.1: prior knowledge).
    TcpAsBefore,
}

impl Over {
    pub(super) fn first(
        ctx: &Context,
        now: Instant,
        connection: &Connection,
        (local, remote): (IpAddr, IpAddr),
    ) -> Self {
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

    /// True where something else is next if UDP stays silent for `tcp_delay`.
    pub(super) fn doubts_udp(self) -> bool {
        matches!(self, Self::UdpThenTcp | Self::UdpOrNothing)
    }
}

/// One SPI's request. Another transport means another SPI and another nonce (RFC 9329 §5.1), so another of these.
pub(super) struct FirstRequest {
    id: IkeSaId,
    pub(super) spi: u64,
    pub(super) over: Over,
    pub(super) path: Path,
    pub(super) nonce: Vec<u8>,
    pub(super) cookie: Option<Vec<u8>>,
    restarts: u8,
    policy: Retransmission,
    stage: Stage,
    /// When to turn to TCP, or to give up.
    tcp_at: Option<Instant>,
}

enum Stage {
    /// Waiting for the stream.
    Opening { deadline: Instant },
    /// The path is there, but not all that the request says.
    Preparing { deadline: Instant },
    /// As it was sent.
    Sent { octets: Vec<u8>, retry: Retry },
}

/// What is due.
pub(super) enum Due {
    Nothing,
    /// UDP has been silent.
    TurnToTcp,
    /// The stream did not open.
    NoStream,
    /// What the request is to say did not come.
    Unprepared,
    /// A repetition, of this number.
    Repeat(u32),
    /// The end, after so many.
    GiveUp(u32),
}

/// What the end of a stream means.
pub(super) enum Lost {
    /// It was another one.
    Other,
    /// The same is said over another stream, which is being opened.
    Reopened,
    /// UDP is left.
    Try(Over),
    Nothing,
}

impl FirstRequest {
    /// Takes an SPI, and the path or the first step to it. A request over UDP can be sent at once.
    pub(super) fn begin(
        ctx: &mut Context,
        now: Instant,
        id: IkeSaId,
        connection: &Connection,
        (local, remote): (IpAddr, IpAddr),
        over: Over,
        mut policy: Retransmission,
    ) -> Self {
        let deadline = after(now, retry::total(&policy));
        let (path, stage) = if over.is_tcp() {
            let remote = SocketAddr::new(remote, connection.tcp_remote_port);
            let transport = Transport::Stream(ctx.open_stream(connection, local, remote));
            (Path { local: SocketAddr::new(local, 0), remote, transport }, Stage::Opening { deadline })
        } else {
            (udp_path(ctx, connection, local, remote), Stage::Preparing { deadline })
        };
        let tcp_at = over.doubts_udp().then(|| after(now, connection.tcp_delay));
        if tcp_at.is_some() {
            // RFC 9329 §5.1: at least one repetition over UDP before TCP.
            policy.timeout = policy.timeout.min(connection.tcp_delay / 2);
        }
        let (nonce, spi) = (ctx.random(NONCE_LENGTH), ctx.reserve_ike_spi(id));
        Self { id, spi, over, path, nonce, cookie: None, restarts: 0, policy, stage, tcp_at }
    }

    pub(super) fn stream(&self) -> Option<StreamId> {
        match self.path.transport {
            Transport::Stream(stream) => Some(stream),
            Transport::Udp | Transport::UdpEncap => None,
        }
    }

    pub(super) fn is_opening(&self) -> bool {
        matches!(self.stage, Stage::Opening { .. })
    }

    pub(super) fn is_preparing(&self) -> bool {
        matches!(self.stage, Stage::Preparing { .. })
    }

    /// True while UDP is tried and TCP, or nothing, may come next.
    pub(super) fn may_turn_to_tcp(&self) -> bool {
        self.tcp_at.is_some()
    }

    /// Repetitions done, once it is sent.
    pub(super) fn repetitions(&self) -> Option<u32> {
        match &self.stage {
            Stage::Sent { retry, .. } => Some(retry.done),
            Stage::Opening { .. } | Stage::Preparing { .. } => None,
        }
    }

    /// As it was sent.
    pub(super) fn into_octets(self) -> Option<Vec<u8>> {
        match self.stage {
            Stage::Sent { octets, .. } => Some(octets),
            Stage::Opening { .. } | Stage::Preparing { .. } => None,
        }
    }

    pub(super) fn next_timeout(&self) -> Instant {
        let at = match &self.stage {
            Stage::Opening { deadline } | Stage::Preparing { deadline } => *deadline,
            Stage::Sent { retry, .. } => retry.at,
        };
        self.tcp_at.map_or(at, |tcp| tcp.min(at))
    }

    /// The peer is there: what is next takes time, of which TCP saves nothing.
    pub(super) fn stay_on_udp(&mut self) {
        self.tcp_at = None;
    }

    /// Waits for what the request is to say next.
    pub(super) fn prepare(&mut self, now: Instant) {
        self.stage = Stage::Preparing { deadline: after(now, retry::total(&self.policy)) };
    }

    /// True when this is our stream, which is open now: the request can be sent.
    pub(super) fn stream_opened(&mut self, now: Instant, stream: StreamId, local: SocketAddr) -> bool {
        let ours = self.stream() == Some(stream) && self.is_opening();
        if ours {
            self.path.local = local;
            self.prepare(now);
        }
        ours
    }

    pub(super) fn stream_closed(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        connection: &Connection,
        stream: StreamId,
        reason: &str,
    ) -> Lost {
        if self.stream() != Some(stream) {
            return Lost::Other;
        }
        let tag = Some((self.id, connection.name.as_str()));
        if !self.is_opening() && self.restarts > 0 && self.may_restart() {
            // RFC 9329 §6.3: the peer has told us what it wants to hear, and some close after that.
            ctx.log("NET", 1, tag, format!("the TCP connection was closed: {reason}, opening another"));
            let transport = Transport::Stream(ctx.open_stream(connection, self.path.local.ip(), self.path.remote));
            self.path.transport = transport;
            self.stage = Stage::Opening { deadline: after(now, retry::total(&self.policy)) };
            return Lost::Reopened;
        }
        if connection.tcp != TcpPolicy::Fallback {
            return Lost::Nothing;
        }
        ctx.log("NET", 1, tag, format!("the TCP connection failed: {reason}, going on over UDP"));
        ctx.shared.networks.lock().forget(&self.path);
        // The peer may be slow or down rather than behind a filter: UDP gets all of its time.
        Lost::Try(if self.over == Over::TcpAsBefore { Over::UdpThenTcp } else { Over::Udp })
    }

    /// Builds and sends the request; the cookie, if one was asked for, comes first (RFC 7296 §2.6).
    pub(super) fn send(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        connection: &Connection,
        exchange: ExchangeType,
        mut payloads: Vec<Payload>,
    ) {
        if let Some(cookie) = &self.cookie {
            payloads.insert(0, notify(NotifyType::COOKIE, cookie.clone()));
        }
        let header = Header {
            initiator_spi: self.spi,
            responder_spi: 0,
            major: 2,
            minor: 0,
            exchange,
            from_initiator: true,
            response: false,
            message_id: 0,
        };
        let octets = wire::encode(&Message { header, payloads });
        let retry = Retry::start(now, &self.policy, self.stream().is_some(), ctx.rng.as_mut());
        let name = if exchange == ExchangeType::IKE_SESSION_RESUME { "IKE_SESSION_RESUME" } else { "IKE_SA_INIT" };
        let line = format!("sending {name} request to {}", self.path.remote);
        ctx.log("NET", 2, Some((self.id, &connection.name)), line);
        ctx.shared.counters.of(&connection.name).message(exchange, false, false);
        ctx.transmit(self.path, connection.dscp, [octets.clone()]);
        self.stage = Stage::Sent { octets, retry };
    }

    /// Sends the same once more.
    pub(super) fn repeat(&self, ctx: &mut Context, connection: &Connection) {
        if let Stage::Sent { octets, retry } = &self.stage {
            let line = format!("retransmit {} of request with message ID 0", retry.done);
            ctx.log("IKE", 1, Some((self.id, &connection.name)), line);
            ctx.transmit(self.path, connection.dscp, [octets.clone()]);
        }
    }

    pub(super) fn poll(&mut self, ctx: &mut Context, now: Instant) -> Due {
        if self.tcp_at.is_some_and(|at| at <= now) {
            return Due::TurnToTcp;
        }
        match &mut self.stage {
            Stage::Opening { deadline } if *deadline <= now => Due::NoStream,
            Stage::Preparing { deadline } if *deadline <= now => Due::Unprepared,
            Stage::Opening { .. } | Stage::Preparing { .. } => Due::Nothing,
            Stage::Sent { retry, .. } => match retry.poll(now, &self.policy, ctx.rng.as_mut()) {
                retry::Due::Nothing => Due::Nothing,
                retry::Due::Resend => Due::Repeat(retry.done),
                retry::Due::GiveUp if self.tcp_at.is_some() => Due::TurnToTcp,
                retry::Due::GiveUp => Due::GiveUp(retry.done),
            },
        }
    }

    /// True for an answer to what is out, from where it went (RFC 7296 §2.11).
    pub(super) fn is_answered_by(&self, header: &Header, path: &Path, exchange: ExchangeType) -> bool {
        header.response
            && header.exchange == exchange
            && header.message_id == 0
            && !header.from_initiator
            && matches!(self.stage, Stage::Sent { .. })
            && (path.remote, path.transport) == (self.path.remote, self.path.transport)
    }

    /// Takes a cookie of 1 to 64 octets (RFC 7296 §2.6) to send the request again with.
    pub(super) fn takes_cookie(&mut self, parts: &Parts) -> bool {
        let cookie = parts.notify(NotifyType::COOKIE).filter(|cookie| (1..=64).contains(&cookie.data.len()));
        let Some(cookie) = cookie.filter(|_| self.may_restart()) else { return false };
        self.cookie = Some(cookie.data.clone());
        true
    }

    pub(super) fn may_restart(&mut self) -> bool {
        self.restarts = self.restarts.saturating_add(1);
        self.restarts <= MAX_RESTARTS
    }
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
