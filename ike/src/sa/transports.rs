//! UDP or a stream, for an IKE SA that is up (RFC 9329 §7.1): what is asked over UDP in vain goes along a stream too, as
//! the same message; and while a stream carries what UDP could not, UDP is tried again now and then.
//!
//! Only the initiator of the first IKE SA does this, with MOBIKE, and where `tcp` leaves it the choice. The responder
//! follows what it is asked for in UPDATE_SA_ADDRESSES. Without MOBIKE all goes along one transport for the life of an IKE SA
//! (§5), so the way back to UDP is another IKE SA, which takes the place of this one if UDP carries it.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use ipsec::plane::StreamId;

use super::established::{Active, Closed, Established, Task};
use super::first_request::udp_path;
use super::mobility::Errand;
use super::reauthentication::Replacement;
use super::retry::{Retry, after};
use crate::config::{Retransmission, TcpPolicy};
use crate::engine::context::Context;
use crate::engine::{Path, Transport};
use crate::wire::ExchangeType;

/// UDP is tried less and less often, down to once in so many intervals.
const LONGEST_PROBE_WAIT: u32 = 16;

/// What an IKE SA knows of the two.
#[derive(Clone, Debug, Default)]
pub(super) struct Transports {
    /// When UDP was tried last, from over a stream.
    probed_at: Option<Instant>,
    /// How often in vain.
    failures: u32,
    /// The outstanding request is tried along this path first; the stream in use comes next.
    probe: Option<Box<Path>>,
    /// When the outstanding request goes along a stream as well.
    stream_at: Option<Instant>,
    /// The stream for that.
    beside: Option<Beside>,
}

/// A stream beside UDP.
#[derive(Clone, Copy, Debug)]
struct Beside {
    path: Path,
    open: bool,
}

impl Transports {
    /// The stream beside UDP.
    pub(super) fn stream(&self) -> Option<StreamId> {
        match self.beside?.path.transport {
            Transport::Stream(stream) => Some(stream),
            Transport::Udp | Transport::UdpEncap => None,
        }
    }

    /// What an IKE SA keeps that is replaced: the stream, which its successor has as well.
    pub(super) fn for_the_end(&self) -> Self {
        Self { beside: self.beside, ..Self::default() }
    }

    /// What its successor begins with.
    pub(super) fn inherit(&self) -> Self {
        Self { probe: None, stream_at: None, ..self.clone() }
    }

    /// The request has an answer, or goes along what is in use now.
    pub(super) fn request_is_settled(&mut self) {
        (self.probe, self.stream_at) = (None, None);
    }
}

impl Established {
    /// True where we choose between UDP and a stream.
    pub(super) fn chooses_transport(&self) -> bool {
        self.connection.tcp == TcpPolicy::Fallback && self.moves_by_mobike()
    }

    /// True where another IKE SA over UDP may take the place of this one.
    fn may_return_anew(&self) -> bool {
        let connection = &self.connection;
        connection.tcp == TcpPolicy::Fallback
            && connection.tcp_reauth_udp
            && self.original_initiator
            && !self.moves_by_mobike()
    }

    fn is_over_stream(&self) -> bool {
        matches!(self.core.path.transport, Transport::Stream(_))
    }

    /// The path over UDP between these addresses.
    pub(super) fn udp_between(&self, ctx: &Context, (local, remote): (IpAddr, IpAddr)) -> Path {
        let mut path = udp_path(ctx, &self.connection, local, remote);
        if path.transport == Transport::Udp {
            path.transport = Transport::UdpEncap;
            path.local.set_port(ctx.config.nat_port);
            path.remote.set_port(ctx.config.nat_port);
        }
        path
    }

    pub(super) fn transports_timeout(&self) -> Option<Instant> {
        [self.transports.stream_at, self.probe_at()].into_iter().flatten().min()
    }

    /// When UDP is tried again.
    fn probe_at(&self) -> Option<Instant> {
        let interval = self.connection.tcp_probe_udp;
        let idle = self.is_over_stream() && self.is_current() && self.stream_is_usable() && !self.has_task_or_request();
        if interval.is_zero() || !idle || !(self.chooses_transport() || self.may_return_anew()) {
            return None;
        }
        let times = 1_u32.checked_shl(self.transports.failures).unwrap_or(LONGEST_PROBE_WAIT).min(LONGEST_PROBE_WAIT);
        Some(after(self.transports.probed_at.unwrap_or(self.since()), interval.saturating_mul(times)))
    }

    pub(super) fn handle_transports_timeout(&mut self, ctx: &mut Context, now: Instant) {
        if self.probe_at().is_some_and(|at| at <= now) {
            self.transports.probed_at = Some(now);
            if self.chooses_transport() {
                self.queue.push_back(Task::ProbeUdp);
            } else {
                self.return_anew(ctx);
            }
        }
        if self.transports.stream_at.is_some_and(|at| at <= now) {
            self.transports.stream_at = None;
            self.try_stream(ctx);
        }
    }

    // From a stream to UDP.

    /// Another IKE SA is tried over UDP, and takes the place of this one when it has its Child SAs.
    fn return_anew(&mut self, ctx: &mut Context) {
        let line = format!("trying UDP to {} again, with another IKE_SA", self.core.path.remote.ip());
        ctx.log("NET", 1, self.core.tag(), line);
        // Forgotten with this IKE SA if it comes to something.
        self.transports.failures = self.transports.failures.saturating_add(1);
        ctx.replacements.push(Replacement { old: self.core.id, requests: self.everything_again(), returns: true });
    }

    /// The peer ends this one, maybe for the other one, which may come to nothing all the same.
    pub(super) fn leave_to_return(&self, ctx: &mut Context) {
        if let Some(entry) = ctx.reauthentications.get_mut(self.core.id).filter(|entry| entry.returns) {
            entry.rest = self.everything_again();
        }
    }

    /// That came to nothing. If the peer thinks otherwise, it sends under the newest Child SAs, which only it has: so there
    /// are newer ones.
    pub(crate) fn return_failed(&mut self, ctx: &mut Context, now: Instant, answer_lost: bool) -> Result<(), Closed> {
        if answer_lost {
            let live = self.children.iter().filter(|child| child.is_live()).map(|child| child.id);
            let rekey = |id| Task::RekeyChild { id, token: None, group: None, tries: 0 };
            let rekeys: Vec<Task> = live.map(rekey).collect();
            self.queue.extend(rekeys);
        }
        self.pump(ctx, now)
    }

    /// An empty INFORMATIONAL request over UDP: it moves nothing, and if UDP does not answer it goes along the stream.
    pub(super) fn start_udp_probe(&mut self, ctx: &mut Context, now: Instant) -> Result<(), Closed> {
        if !self.is_over_stream() || !self.chooses_transport() {
            return Ok(());
        }
        let ends = (self.core.path.local.ip(), self.core.path.remote.ip());
        let probe = self.udp_between(ctx, ends);
        ctx.log("NET", 1, self.core.tag(), format!("trying UDP to {} again", probe.remote));
        let retry = Retry::start(now, &probing(self.connection.tcp_delay), false, ctx.rng.as_mut());
        let exchange = ExchangeType::INFORMATIONAL;
        let message_id = self.channel.next_request();
        let Some(datagrams) = self.channel.request(exchange, &[], None, retry, ctx.rng.as_mut()) else {
            return Err(self.close(ctx, now, crate::engine::CloseReason::Expired));
        };
        self.asked(Active::ProbeUdp, message_id);
        self.transports.probe = Some(Box::new(probe));
        self.core.send_along(ctx, probe, datagrams);
        Ok(())
    }

    /// True when the outstanding request is a probe, of which this took care.
    pub(super) fn repeat_udp_probe(&mut self, ctx: &mut Context, now: Instant) -> bool {
        let Some(probe) = self.transports.probe.as_deref().copied() else { return false };
        let policy = probing(self.connection.tcp_delay);
        match self.channel.poll_retry(now, &policy, ctx.rng.as_mut()).map(|overdue| overdue.resend) {
            None => {}
            Some(Some(datagrams)) => self.core.send_along(ctx, probe, datagrams),
            Some(None) => {
                self.transports.probe = None;
                self.resend(ctx, now);
            }
        }
        true
    }

    /// The answer to a probe.
    pub(super) fn udp_probed(&mut self, ctx: &mut Context) {
        let over_udp = self.answered_on().is_some_and(|path| !matches!(path.transport, Transport::Stream(_)));
        if !over_udp || !self.is_over_stream() || !self.chooses_transport() {
            self.transports.failures = self.transports.failures.saturating_add(1);
            return;
        }
        self.transports.failures = 0;
        // Child SAs stay on the stream until the peer has followed, and if it cannot be asked over UDP, it is asked there.
        self.transports.beside = Some(Beside { path: self.core.path, open: true });
        let ends = (self.core.path.local.ip(), self.core.path.remote.ip());
        let udp = self.udp_between(ctx, ends);
        self.go_to(ctx, udp);
    }

    /// Leaves a stream that is lost, or of an address that is gone: over UDP first, whatever was used before.
    pub(super) fn leave_stream_for_udp(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        ends: (IpAddr, IpAddr),
    ) -> Result<(), Closed> {
        let udp = self.udp_between(ctx, ends);
        self.transports = Transports { failures: self.transports.failures, ..Transports::default() };
        self.go_to(ctx, udp);
        self.ask_along_now(ctx, now);
        self.expect_answer_over_udp(ctx, now);
        self.pump(ctx, now)
    }

    fn go_to(&mut self, ctx: &mut Context, path: Path) {
        self.stream_is_up();
        self.point_at(ctx, path);
        self.want_update();
        self.queue_errand(Errand::Update);
    }

    // From UDP to a stream.

    /// A request went out over UDP: says when it goes along a stream as well, if it may not get through.
    pub(super) fn expect_answer_over_udp(&mut self, ctx: &Context, now: Instant) {
        let doubtful = self.is_hurried() || self.transports.beside.is_some();
        if self.is_over_stream() || !doubtful || !self.chooses_transport() || !self.channel.is_waiting() {
            return;
        }
        // §7.1: what is known of the network can shorten the wait.
        let known = ctx.shared.networks.lock().needs_stream(now, &self.core.path) && self.transports.beside.is_none();
        let wait = if known { Duration::ZERO } else { self.connection.tcp_delay };
        self.transports.stream_at.get_or_insert(after(now, wait));
    }

    /// A request was repeated over UDP for the `count`th time, on a path that has worked.
    pub(super) fn doubt_udp(&mut self, now: Instant) {
        if !self.is_over_stream() && self.chooses_transport() && self.transports.beside.is_none() {
            self.transports.stream_at.get_or_insert(now);
        }
    }

    fn try_stream(&mut self, ctx: &mut Context) {
        if self.is_over_stream() || !self.channel.is_waiting() || !self.chooses_transport() {
            return;
        }
        match self.transports.beside {
            Some(Beside { path, open: true }) => self.go_along(ctx, path),
            Some(Beside { open: false, .. }) => {}
            None => {
                let (local, remote) = (self.core.path.local.ip(), self.core.path.remote.ip());
                let remote = SocketAddr::new(remote, self.connection.tcp_remote_port);
                let line = format!("no answer over UDP, trying TCP port {}", remote.port());
                ctx.log("NET", 1, self.core.tag(), line);
                let transport = Transport::Stream(ctx.open_stream(&self.connection, local, remote));
                let path = Path { local: SocketAddr::new(local, 0), remote, transport };
                self.transports.beside = Some(Beside { path, open: false });
            }
        }
    }

    /// §7.1: no new exchange, but the same message.
    fn go_along(&mut self, ctx: &mut Context, path: Path) {
        let datagrams = self.channel.outstanding();
        self.core.send_along(ctx, path, datagrams);
        self.went_along(path);
    }

    /// False when the stream is none of these.
    pub(super) fn stream_beside_opened(&mut self, ctx: &mut Context, stream: StreamId, local: SocketAddr) -> bool {
        let Some(beside) = self.transports.beside.filter(|_| self.transports.stream() == Some(stream)) else {
            return false;
        };
        let path = Path { local, ..beside.path };
        self.transports.beside = Some(Beside { path, open: true });
        if self.channel.is_waiting() {
            self.go_along(ctx, path);
        } else {
            self.transports.beside = None;
        }
        true
    }

    /// False when the stream is none of these.
    pub(super) fn stream_beside_closed(&mut self, now: Instant, stream: StreamId) -> bool {
        if self.transports.stream() != Some(stream) {
            return false;
        }
        self.transports.beside = None;
        self.forget_path(Transport::Stream(stream));
        if self.channel.is_waiting() {
            self.transports.stream_at = Some(after(now, self.connection.tcp_delay));
        }
        true
    }

    /// What has carried an answer is in use: the stream beside UDP, or UDP alone.
    pub(super) fn transport_found(&mut self) {
        self.transports.request_is_settled();
        if self.is_over_stream() && self.transports.beside.take().is_some() {
            self.stream_is_up();
        }
    }

    /// The responder has followed: what the network lets through is known.
    pub(super) fn transport_agreed(&mut self, ctx: &mut Context, now: Instant) {
        if self.connection.tcp == TcpPolicy::Fallback {
            ctx.shared.networks.lock().note(now, &self.core.path);
        }
        self.transports.beside = None;
        if self.is_over_stream() {
            self.transports.probed_at = Some(now);
        }
    }
}

/// How a probe is repeated: once, and then the stream is used.
fn probing(delay: Duration) -> Retransmission {
    Retransmission { timeout: delay / 2, base: 1.0, tries: 1, limit: Duration::ZERO, jitter: 0 }
}
