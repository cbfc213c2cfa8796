//! MOBIKE (RFC 4555): who decides where an IKE SA and its Child SAs are, and how they move.
//!
//! The initiator of the first IKE SA decides (§2.1). When its addresses or routes change it points the IKE SA at the
//! best pair of addresses, sends what is outstanding there, and asks the responder to follow with
//! UPDATE_SA_ADDRESSES. Where that stays unanswered, the same octets go along all pairs, and the pair that brings the
//! answer is asked for anew. Child SAs move only when an answer has shown that the other end receives there (§3.7):
//! on the initiator that is the answer to the update, on the responder the answer to a COOKIE2 of its own.
//!
//! Nothing here happens before authentication: all of it are methods of [`Established`], and a replayed message does
//! not reach them (the window gives it its old answer).

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use ipsec::plane::Mode;

use super::Core;
use super::established::{Active, Closed, Established, Task};
use super::fault::notify;
use super::nat::{self, Nat};
use super::parts::Parts;
use super::retry::Retry;
use crate::config::{Connection, Retransmission};
use crate::engine::context::Context;
use crate::engine::places::Place;
use crate::engine::{CloseReason, Event, IkeState, Job, JobId, Judgement, Path, Route, RouteQuery, Transport};
use crate::wire::{ExchangeType, NotifyType, Payload};

/// Addresses of either side that are told or kept, beyond the one in use (charon's limit).
const MAX_ADDRESSES: usize = 8;
/// Pairs of addresses that one request goes along at most.
const MAX_PATHS: usize = 16;
/// Length of our COOKIE2 (§4.2.5: 8 to 64).
const COOKIE2_LENGTH: usize = 16;
/// Repetitions of a request after which other paths are tried too (§3.5).
const SUSPICIOUS: u32 = 2;
/// First wait while a path is looked for: a lost path is not a slow one.
const PROBE_TIMEOUT: Duration = Duration::from_secs(1);
/// A hint at trouble is followed up when the peer has been silent for so long.
const HINT_INTERVAL: Duration = Duration::from_secs(5);
/// How often the responder says its addresses or checks the peer's again after an answer over another path.
const MAX_RETOLD: u8 = 3;
/// Repetitions more than configured while a path is looked for, so that the waits are as long together.
const PROBE_EXTRA_TRIES: u32 = 3;

/// What an IKE SA knows of its mobility.
#[derive(Debug, Default)]
pub(crate) struct Mobility {
    /// Both sides said MOBIKE_SUPPORTED.
    on: bool,
    /// We began the first IKE SA of the series: we decide on addresses, whoever rekeyed since.
    initiator: bool,
    /// All addresses that the peer has said it has.
    peer: Vec<IpAddr>,
    /// What the peer was told of ours, beyond the one in use.
    told: Vec<IpAddr>,
    /// Addresses at which the peer has shown that it receives.
    verified: Vec<IpAddr>,
    /// The peer has to be asked to follow (`pending_update` of §3.5).
    pending: bool,
    /// Message ID of the newest request that said where the peer is: with a window of more than one, older ones may come
    /// later (§3.5).
    newest: Option<u32>,
    /// Counts changes of the IKE SA's addresses: an answer to what was asked before one says nothing.
    changes: u64,
    /// A path is being looked for: waits are short.
    hurried: bool,
    /// The path in use works by its addresses, but nothing answers.
    suspected: bool,
    /// No path at all: nothing is sent until there is one.
    stranded: bool,
    /// Paths to try beside the one in use.
    candidates: Vec<Path>,
    /// Paths that the outstanding request has gone along, if more than one.
    paths: Vec<Path>,
    /// Pairs that the responder refused.
    refused: Vec<(IpAddr, IpAddr)>,
    /// Where the last answer came in.
    answered_on: Option<Box<Path>>,
    /// The last NAT_DETECTION_DESTINATION_IP: how the responder sees us (§3.8).
    seen_as: Option<Vec<u8>>,
    nat_retries: u32,
    /// The path before ESP came from elsewhere, until that is checked.
    returns_to: Option<Box<Path>>,
    /// How often something was said again because it had gone along several paths.
    retold: u8,
    /// The question for routes that is out.
    asked: Option<JobId>,
    ask_again: bool,
}

/// A MOBIKE exchange of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Errand {
    /// UPDATE_SA_ADDRESSES.
    Update,
    /// Our addresses have changed (§3.6).
    Tell,
    /// Does the peer receive where it says it is (§3.7)?
    Check,
}

/// One that is going on.
#[derive(Debug)]
pub(crate) struct Mission {
    errand: Errand,
    cookie: Option<Vec<u8>>,
    /// [`Mobility::changes`] when it began.
    change: u64,
    told: Vec<IpAddr>,
}

impl Mobility {
    /// What a successor takes over when the IKE SA is rekeyed.
    pub(super) fn inherit(&mut self) -> Self {
        // The old one still has an exchange or two to finish, perhaps from elsewhere.
        let stays = self.for_the_end();
        let old = std::mem::replace(self, stays);
        Self {
            ask_again: old.ask_again || old.asked.is_some(),
            asked: None,
            paths: Vec::new(),
            seen_as: None,
            newest: None,
            ..old
        }
    }

    /// What an IKE SA needs that is only to be deleted.
    pub(super) fn for_the_end(&self) -> Self {
        Self {
            on: self.on,
            initiator: self.initiator,
            peer: self.peer.clone(),
            verified: self.verified.clone(),
            ..Self::default()
        }
    }

    pub(super) fn is_on(&self) -> bool {
        self.on
    }

    /// No path: requests wait.
    pub(super) fn is_stranded(&self) -> bool {
        self.stranded
    }

    /// Between our request to move and the answer, ESP from the peer does not show that it knows (§3.12).
    pub(super) fn is_settled(&self) -> bool {
        !self.pending && !self.hurried
    }

    /// How requests are repeated now.
    pub(super) fn retransmission(&self, configured: &Retransmission) -> Retransmission {
        if !self.hurried {
            return *configured;
        }
        Retransmission {
            timeout: configured.timeout.min(PROBE_TIMEOUT),
            tries: configured.tries.saturating_add(PROBE_EXTRA_TRIES),
            ..*configured
        }
    }

    fn verify(&mut self, address: IpAddr) {
        self.verified.retain(|known| *known != address);
        self.verified.push(address);
        if self.verified.len() > MAX_ADDRESSES {
            self.verified.remove(0);
        }
    }
}

/// What we say in IKE_AUTH (§3.2, §3.4): nothing where the connection does without, or the initiator did.
pub(crate) fn announcement(
    ctx: &Context,
    connection: &Connection,
    core: &Core,
    initiators: Option<&Parts>,
) -> Vec<Payload> {
    let asked = initiators.is_none_or(|parts| parts.has(NotifyType::MOBIKE_SUPPORTED));
    if !connection.mobike || !asked {
        return Vec::new();
    }
    let mut payloads = vec![notify(NotifyType::MOBIKE_SUPPORTED, Vec::new())];
    payloads.extend(additional(ctx, core.path.local.ip()).into_iter().map(address_payload));
    if initiators.is_none() && !core.nat.traversal {
        payloads.push(prohibition(&core.path));
    }
    payloads
}

/// §3.9: true when IKE_AUTH came by way of a NAT that its sender does not allow.
pub(crate) fn is_translated(connection: &Connection, path: &Path, parts: &Parts) -> bool {
    connection.mobike && parts.has(NotifyType::MOBIKE_SUPPORTED) && contradicts(path, parts)
}

impl Established {
    /// IKE_AUTH has said what both sides can.
    pub(crate) fn negotiate_mobility(&mut self, ctx: &mut Context, initiator: bool, parts: &Parts) {
        let remote = self.core.path.remote.ip();
        self.mobility = Mobility {
            on: self.connection.mobike && parts.has(NotifyType::MOBIKE_SUPPORTED),
            initiator,
            ..Mobility::default()
        };
        if self.mobility.on {
            ctx.log("IKE", 1, self.core.tag(), "peer supports MOBIKE".to_owned());
            self.mobility.peer = addresses(remote, parts);
            self.mobility.told = additional(ctx, self.core.path.local.ip());
            self.mobility.verified = vec![remote];
        }
    }

    #[cfg(test)]
    pub(crate) fn peer_addresses(&self) -> &[IpAddr] {
        &self.mobility.peer
    }

    // What happens around us.

    pub(crate) fn place(&self) -> Place {
        // Also one that is rekeyed: the peer may have missed our answer, and wait for it where we were.
        let decides = self.mobility.initiator;
        Place { remote: Some(self.core.path.remote), decides, told: self.mobility.on }
    }

    /// An ICMP error: anybody can forge one, so the peer is asked whether it lives, and not too often (§3.5).
    pub(crate) fn handle_hint(&mut self, ctx: &mut Context, now: Instant) -> Result<(), Closed> {
        let quiet = now.saturating_duration_since(self.last_inbound) >= HINT_INTERVAL;
        let free = self.exchanges.is_empty() && self.queue.is_empty();
        if quiet && free && self.is_current() {
            self.check_liveness(ctx, HINT_INTERVAL);
        }
        self.pump(ctx, now)
    }

    /// Our addresses or routes have changed.
    pub(crate) fn handle_roam(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        addresses_changed: bool,
    ) -> Result<(), Closed> {
        let local = self.core.path.local.ip();
        if self.mobility.initiator || (self.mobility.on && !ctx.local_addresses.contains(&local)) {
            self.ask_for_routes(ctx);
        } else if self.mobility.on && addresses_changed {
            self.tell_if_changed(ctx);
        }
        self.pump(ctx, now)
    }

    /// Neither replaced nor on its way out.
    pub(super) fn is_current(&self) -> bool {
        matches!(self.state, IkeState::Established | IkeState::Rekeying)
    }

    fn ask_for_routes(&mut self, ctx: &mut Context) {
        if self.mobility.asked.is_some() {
            self.mobility.ask_again = true;
            return;
        }
        let Path { local, remote, .. } = self.core.path;
        let mut remotes: Vec<IpAddr> = self.is_peer_there().then_some(remote.ip()).into_iter().collect();
        let others = self.mobility.peer.iter().filter(|address| **address != remote.ip());
        remotes.extend(others);
        // Last comes where it once was: it may have come back there while we did not hear each other.
        let once = self.mobility.verified.iter().rev();
        let once: Vec<IpAddr> = once.filter(|address| !remotes.contains(address)).copied().collect();
        remotes.extend(once);
        let query = RouteQuery { local: local.ip(), remotes };
        self.mobility.asked = Some(ctx.job(self.core.id, Job::FindRoutes(query)));
    }

    /// False when a responder has said that it is no longer where we send to.
    fn is_peer_there(&self) -> bool {
        let remote = self.core.path.remote.ip();
        !self.mobility.on || !self.mobility.initiator || self.mobility.peer.contains(&remote)
    }

    /// A successor asks what its predecessor wanted to know.
    pub(super) fn resume_roaming(&mut self, ctx: &mut Context) {
        if std::mem::take(&mut self.mobility.ask_again) {
            self.ask_for_routes(ctx);
        }
        if self.mobility.pending {
            self.queue_errand(Errand::Update);
        }
    }

    /// The answer to [`Job::FindRoutes`], best first.
    pub(super) fn handle_routes(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        job: JobId,
        mut routes: Vec<Route>,
    ) -> Result<(), Closed> {
        if self.mobility.asked != Some(job) {
            return Ok(());
        }
        self.mobility.asked = None;
        if std::mem::take(&mut self.mobility.ask_again) {
            self.ask_for_routes(ctx);
            return Ok(());
        }
        routes.retain(|route| !self.mobility.refused.contains(&(route.local, route.remote)));
        let (local, remote) = (self.core.path.local.ip(), self.core.path.remote.ip());
        let some_direct = routes.iter().any(|route| route.direct);
        // A pair in use stays in use while packets can still take it, even if another would be chosen today.
        let usable = self.is_peer_there()
            && routes
                .iter()
                .any(|route| (route.local, route.remote) == (local, remote) && (route.direct || !some_direct));
        let pairs = routes.iter().map(|route| (route.local, route.remote));
        let others = pairs.filter(|pair| *pair != (local, remote)).take(MAX_PATHS);
        let mut others: Vec<Path> = others.map(|pair| self.along(pair)).collect();
        if usable {
            self.path_stays(ctx, now, others);
            return self.pump(ctx, now);
        }
        let Some(best) = others.first().copied() else {
            let line = format!("no route found to reach {remote}, nothing is sent until there is one");
            ctx.log("IKE", 1, self.core.tag(), line);
            // One that is on its way out is not kept for that.
            self.mobility.stranded = self.is_current();
            return Ok(());
        };
        self.mobility.stranded = false;
        others.remove(0);
        self.leave_path(ctx, now, best, others)?;
        self.pump(ctx, now)
    }

    /// The path in use is still one.
    fn path_stays(&mut self, ctx: &mut Context, now: Instant, others: Vec<Path>) {
        if std::mem::take(&mut self.mobility.suspected) && !others.is_empty() {
            self.mobility.candidates = others;
            self.widen();
            let known = self.core.path;
            let datagrams = self.channel.outstanding();
            for path in self.mobility.paths.iter().filter(|path| **path != known) {
                self.core.send_along(ctx, *path, datagrams.clone());
            }
        }
        if std::mem::take(&mut self.mobility.stranded) {
            self.mobility.hurried = true;
            if !self.probe(ctx, now) {
                self.queue.push_front(Task::Liveness);
            }
        }
        self.tell_if_changed(ctx);
    }

    /// Packets can no longer take the path in use.
    fn leave_path(&mut self, ctx: &mut Context, now: Instant, best: Path, others: Vec<Path>) -> Result<(), Closed> {
        if let Transport::Stream(_) = self.core.path.transport {
            if self.chooses_transport() && self.is_current() {
                // RFC 9329 §7.1: over UDP first, whatever was used before.
                self.mobility.hurried = true;
                return self.leave_stream_for_udp(ctx, now, (best.local.ip(), best.remote.ip()));
            }
            return self.reopen_along(ctx, now, best);
        }
        if !self.mobility.on || self.has_transport_mode() {
            return self.begin_anew(ctx, now, best);
        }
        self.mobility.candidates = others;
        self.mobility.hurried = true;
        (self.mobility.nat_retries, self.mobility.retold) = (0, 0);
        self.point_at(ctx, best);
        if self.mobility.initiator {
            ctx.log("IKE", 1, self.core.tag(), "requesting address change using MOBIKE".to_owned());
            self.mobility.pending = true;
            self.queue_errand(Errand::Update);
        } else {
            // §3.5, the one exception: what we send from is gone, so the Child SAs move without being told.
            ctx.log("IKE", 1, self.core.tag(), "sending address list update using MOBIKE".to_owned());
            self.move_children(ctx);
            self.queue_errand(Errand::Tell);
        }
        // §3.5: what is outstanding goes on along the new path, the same octets.
        self.probe(ctx, now);
        self.expect_answer_over_udp(ctx, now);
        Ok(())
    }

    /// Transport mode belongs to its addresses (§1.3: MOBIKE is for tunnel mode).
    fn has_transport_mode(&self) -> bool {
        self.children.iter().any(|child| child.mode == Mode::Transport)
    }

    /// Without MOBIKE the initiator makes the IKE SA again from where it is now; the responder waits for that.
    fn begin_anew(&mut self, ctx: &mut Context, now: Instant, path: Path) -> Result<(), Closed> {
        if !self.mobility.initiator || !self.is_current() {
            return Ok(());
        }
        ctx.log("IKE", 1, self.core.tag(), "reestablishing IKE_SA due to address change".to_owned());
        self.core.path = path;
        self.reauthenticating = true;
        // An attempt to replace it that is under way may be from the address that is gone.
        self.makes_first = false;
        if self.keep_ticket(ctx, now) {
            // RFC 5723 §4.3.4: coming back with the ticket ends this one at the peer.
            return Err(self.close(ctx, now, CloseReason::Local));
        }
        Err(self.farewell(ctx, now, CloseReason::Local))
    }

    pub(super) fn point_at(&mut self, ctx: &mut Context, path: Path) {
        let old = self.core.path;
        let line = format!("path changes from {}...{} to {}...{}", old.local, old.remote, path.local, path.remote);
        ctx.log("NET", 1, self.core.tag(), line);
        self.core.path = path;
        self.mobility.changes = self.mobility.changes.wrapping_add(1);
        self.mobility.paths.clear();
    }

    /// The path between these addresses, with ports and transport as now.
    fn along(&self, (local, remote): (IpAddr, IpAddr)) -> Path {
        Path {
            local: SocketAddr::new(local, self.core.path.local.port()),
            remote: SocketAddr::new(remote, self.core.path.remote.port()),
            transport: self.core.path.transport,
        }
    }

    pub(super) fn queue_errand(&mut self, errand: Errand) {
        self.queue.retain(|task| !matches!(task, Task::Mobility(queued) if *queued == errand));
        self.queue.push_front(Task::Mobility(errand));
    }

    /// §3.6: a peer that does not know our addresses is told.
    fn tell_if_changed(&mut self, ctx: &Context) {
        let local = self.core.path.local.ip();
        if self.mobility.on && self.is_current() && self.mobility.told != additional(ctx, local) {
            self.queue_errand(Errand::Tell);
        }
    }

    // Sending.

    /// The paths that the outstanding request is repeated along; a stream repeats by itself.
    pub(super) fn request_paths(&self) -> Vec<Path> {
        if self.mobility.paths.is_empty() {
            return vec![self.core.path];
        }
        self.mobility.paths.iter().filter(|path| !matches!(path.transport, Transport::Stream(_))).copied().collect()
    }

    /// The outstanding request went along this path as well.
    pub(super) fn went_along(&mut self, path: Path) {
        if self.mobility.paths.is_empty() {
            self.mobility.paths.push(self.core.path);
        }
        self.mobility.paths.push(path);
    }

    /// The stream is gone.
    pub(super) fn forget_path(&mut self, transport: Transport) {
        self.mobility.paths.retain(|path| path.transport != transport);
    }

    /// True for the initiator of the first IKE SA with MOBIKE, where addresses may change.
    pub(super) fn moves_by_mobike(&self) -> bool {
        self.mobility.on && self.mobility.initiator && !self.has_transport_mode()
    }

    pub(super) fn is_hurried(&self) -> bool {
        self.mobility.hurried
    }

    /// The peer is to be asked to follow.
    pub(super) fn want_update(&mut self) {
        self.mobility.pending = true;
        (self.mobility.nat_retries, self.mobility.retold) = (0, 0);
    }

    /// What is outstanding goes along the path of now.
    pub(super) fn ask_along_now(&mut self, ctx: &mut Context, now: Instant) {
        self.probe(ctx, now);
    }

    pub(super) fn answered_on(&self) -> Option<Path> {
        self.mobility.answered_on.as_deref().copied()
    }

    /// A request is to be repeated for the `count`th time: perhaps other paths work.
    pub(super) fn consider_other_paths(&mut self, ctx: &mut Context, now: Instant, count: u32) {
        let over_udp = !matches!(self.core.path.transport, Transport::Stream(_));
        if !self.mobility.on || !over_udp {
            return;
        }
        if self.mobility.hurried || !self.mobility.candidates.is_empty() {
            self.widen();
        } else if count == SUSPICIOUS && !self.has_transport_mode() {
            self.mobility.suspected = true;
            self.ask_for_routes(ctx);
        }
        if count >= SUSPICIOUS {
            self.doubt_udp(now);
        }
    }

    fn widen(&mut self) {
        if !self.mobility.candidates.is_empty() {
            let streams = self.mobility.paths.iter().filter(|path| matches!(path.transport, Transport::Stream(_)));
            let others: Vec<Path> = self.mobility.candidates.iter().chain(streams).copied().collect();
            self.mobility.paths = std::iter::once(self.core.path).chain(others).collect();
        }
    }

    /// Sends what is outstanding along the path of now, with short waits; false where nothing is.
    fn probe(&mut self, ctx: &mut Context, now: Instant) -> bool {
        let datagrams = self.channel.outstanding();
        if datagrams.is_empty() {
            return false;
        }
        let policy = self.mobility.retransmission(&ctx.config.retransmission);
        let over_stream = matches!(self.core.path.transport, Transport::Stream(_));
        self.channel.restart_retry(Retry::start(now, &policy, over_stream, ctx.rng.as_mut()));
        self.core.send(ctx, datagrams);
        true
    }

    pub(super) fn start_errand(&mut self, ctx: &mut Context, now: Instant, errand: Errand) -> Result<(), Closed> {
        let local = self.core.path.local.ip();
        let told = additional(ctx, local);
        let mut payloads = Vec::new();
        match errand {
            Errand::Update => {
                self.mobility.pending = false;
                payloads.push(notify(NotifyType::UPDATE_SA_ADDRESSES, Vec::new()));
                payloads.extend(self.nat_payloads(self.core.path));
                payloads.extend(address_list(&told));
            }
            Errand::Tell => payloads.extend(address_list(&told)),
            Errand::Check => ctx.log("IKE", 1, self.core.tag(), "checking return routability".to_owned()),
        }
        let over_stream = matches!(self.core.path.transport, Transport::Stream(_));
        if errand != Errand::Check && !self.core.nat.traversal && !over_stream {
            payloads.push(prohibition(&self.core.path));
        }
        let cookie = (errand != Errand::Tell).then(|| ctx.random(COOKIE2_LENGTH));
        payloads.extend(cookie.clone().map(|cookie| notify(NotifyType::COOKIE2, cookie)));
        let mission = Mission { errand, cookie, change: self.mobility.changes, told };
        let active = Active::Mobility(Box::new(mission));
        self.go_on_with(ctx, now, (active, None), ExchangeType::INFORMATIONAL, payloads)
    }

    fn nat_payloads(&self, path: Path) -> Vec<Payload> {
        let spis = self.channel.spis;
        let payloads = || nat::payloads(spis.initiator, spis.responder, &path, self.core.nat.fake).to_vec();
        if self.core.nat.traversal { payloads() } else { Vec::new() }
    }

    /// What the TCP Originator says over a new stream (RFC 9329 §6.1, §7.1): with MOBIKE that it has moved, else
    /// anything, which is what is `outstanding`.
    pub(super) fn greet_on_stream(&mut self, outstanding: bool) {
        if self.mobility.on && self.mobility.initiator {
            self.queue_errand(Errand::Update);
        } else if !outstanding {
            self.queue.push_front(Task::Liveness);
        }
    }

    /// §3.8: who is behind a NAT asks how it is seen together with whether the peer lives.
    pub(super) fn liveness_payloads(&self) -> Vec<Payload> {
        let watched = self.mobility.on && self.mobility.initiator && self.core.nat.local;
        if watched && self.core.path.transport == Transport::UdpEncap {
            self.nat_payloads(self.core.path)
        } else {
            Vec::new()
        }
    }

    // Receiving.

    /// An authentic answer to the outstanding request came along `path`. Where the request had gone along several, this
    /// says which of them works, and not that the peer knows: it is asked anew along that one alone (§3.7).
    pub(super) fn note_answer(&mut self, ctx: &mut Context, path: Path) {
        self.mobility.answered_on = Some(Box::new(path));
        let tried = std::mem::take(&mut self.mobility.paths);
        if tried.len() > 1 {
            self.mobility.changes = self.mobility.changes.wrapping_add(1);
            let stream = |path: &Path| match path.transport {
                Transport::Stream(stream) => Some(stream),
                Transport::Udp | Transport::UdpEncap => None,
            };
            let ends = |path: &Path| (path.local.ip(), path.remote.ip(), stream(path));
            let found = tried.into_iter().find(|one| ends(one) == ends(&path)).unwrap_or(self.core.path);
            if self.mobility.initiator {
                if found != self.core.path {
                    self.point_at(ctx, found);
                }
                self.mobility.pending = true;
                self.queue_errand(Errand::Update);
            } else {
                self.note_responders_answer(ctx, found);
            }
        }
        self.mobility.hurried = self.mobility.hurried && self.mobility.pending;
        if !self.mobility.hurried {
            self.mobility.candidates.clear();
        }
        self.transport_found();
    }

    /// The same on the responder, who does not choose: it goes back from a mapping that ESP seemed to show, and says
    /// its addresses again, whose list is good for one source address (§3.6: MUST).
    fn note_responders_answer(&mut self, ctx: &mut Context, found: Path) {
        if self.mobility.returns_to.take().as_deref() == Some(&found) {
            self.point_at(ctx, found);
            self.move_children(ctx);
        } else if self.mobility.retold < MAX_RETOLD {
            self.mobility.retold += 1;
            if self.mobility.hurried {
                self.queue_errand(Errand::Tell);
            }
            if !self.mobility.verified.contains(&self.core.path.remote.ip()) {
                self.queue_errand(Errand::Check);
            }
        }
    }

    /// The answer to a MOBIKE exchange of ours.
    pub(super) fn errand_answered(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        mission: Mission,
        parts: &Parts,
    ) -> Result<(), Closed> {
        let echoed = parts.notify(NotifyType::COOKIE2).map(|notify| &notify.data);
        let refused = parts.error().is_some() && echoed.is_none();
        if mission.cookie.is_some() && !refused && echoed != mission.cookie.as_ref() {
            // §3.7: MUST be closed.
            ctx.log("IKE", 1, self.core.tag(), "COOKIE2 mismatch, closing IKE_SA".to_owned());
            return Err(self.farewell(ctx, now, CloseReason::Failed));
        }
        if mission.change != self.mobility.changes {
            // §3.5: the addresses have changed since; what has to be said about the new ones waits or is out.
            return Ok(());
        }
        if parts.has(NotifyType::UNEXPECTED_NAT_DETECTED) {
            return self.translated(ctx, mission.errand);
        }
        match mission.errand {
            Errand::Update if parts.has(NotifyType::UNACCEPTABLE_ADDRESSES) => self.addresses_refused(ctx, now),
            Errand::Update => {
                self.mobility.told = mission.told;
                self.updated(ctx, now, parts);
                Ok(())
            }
            Errand::Tell => {
                self.mobility.told = mission.told;
                self.mobility.hurried = false;
                self.tell_if_changed(ctx);
                Ok(())
            }
            Errand::Check => {
                self.mobility.verify(self.core.path.remote.ip());
                self.mobility.returns_to = None;
                self.move_children(ctx);
                Ok(())
            }
        }
    }

    /// The responder has followed us.
    fn updated(&mut self, ctx: &mut Context, now: Instant, parts: &Parts) {
        let path = self.answered_on().unwrap_or(self.core.path);
        if self.core.nat.traversal && has_nat_detection(parts) {
            let spis = self.channel.spis;
            self.core.nat = Nat::detect(parts, spis.initiator, spis.responder, &path, self.core.nat.fake);
            self.mobility.seen_as = parts.notify(NotifyType::NAT_DETECTION_DESTINATION_IP).map(|n| n.data.clone());
        }
        let line = format!("IKE_SA and CHILD_SAs moved to {}...{}", self.core.path.local, self.core.path.remote);
        ctx.log("IKE", 1, self.core.tag(), line);
        self.mobility.verify(self.core.path.remote.ip());
        self.mobility.hurried = false;
        self.mobility.candidates.clear();
        self.mobility.refused.clear();
        self.move_children(ctx);
        self.transport_agreed(ctx, now);
        self.tell_if_changed(ctx);
    }

    /// §3.9: perhaps one packet was tampered with, so it is tried again, as often as a request is repeated.
    fn translated(&mut self, ctx: &mut Context, errand: Errand) -> Result<(), Closed> {
        self.mobility.nat_retries = self.mobility.nat_retries.saturating_add(1);
        if self.mobility.nat_retries <= ctx.config.retransmission.tries {
            self.queue_errand(errand);
        } else {
            let line = "there is a NAT on the path, which without NAT traversal cannot be used".to_owned();
            ctx.log("IKE", 1, self.core.tag(), line);
        }
        Ok(())
    }

    fn addresses_refused(&mut self, ctx: &mut Context, now: Instant) -> Result<(), Closed> {
        let path = self.core.path;
        let line = format!("the peer does not accept {}...{}", path.local, path.remote);
        ctx.log("IKE", 1, self.core.tag(), line);
        if self.mobility.refused.len() >= MAX_PATHS {
            return self.begin_anew(ctx, now, path);
        }
        self.mobility.refused.push((path.local.ip(), path.remote.ip()));
        self.ask_for_routes(ctx);
        Ok(())
    }

    /// The answer to a liveness check: perhaps the NAT has given us another mapping (§3.8).
    pub(super) fn liveness_answered(&mut self, parts: &Parts) {
        let Some(seen) = parts.notify(NotifyType::NAT_DETECTION_DESTINATION_IP).map(|notify| notify.data.clone())
        else {
            return;
        };
        if !self.mobility.on || !self.mobility.initiator || !self.core.nat.local {
            return;
        }
        if self.mobility.seen_as.replace(seen.clone()).is_none_or(|known| known != seen) {
            self.mobility.pending = true;
            self.queue_errand(Errand::Update);
        }
    }

    /// What MOBIKE has to say to an INFORMATIONAL request, and what it changes here.
    pub(super) fn mobility_request(&mut self, ctx: &mut Context, now: Instant, parts: &Parts) -> Vec<Payload> {
        if !self.mobility.on {
            return Vec::new();
        }
        let mut answer = Vec::new();
        if let Err(refusal) = self.take_addresses(ctx, now, parts) {
            answer.push(notify(refusal, Vec::new()));
        }
        if has_nat_detection(parts) {
            answer.extend(self.nat_payloads(self.reply_path));
        }
        // §4.2.5: 8 to 64 octets.
        let cookie = parts.notify(NotifyType::COOKIE2).filter(|cookie| (8..=64).contains(&cookie.data.len()));
        answer.extend(cookie.map(|cookie| notify(NotifyType::COOKIE2, cookie.data.clone())));
        answer
    }

    fn take_addresses(&mut self, ctx: &mut Context, now: Instant, parts: &Parts) -> Result<(), NotifyType> {
        let update = parts.has(NotifyType::UPDATE_SA_ADDRESSES);
        let list = parts.notifies.iter().any(|notify| is_address_list(notify.kind));
        if !update && !list {
            return Ok(());
        }
        let this = self.channel.answering();
        if this < self.mobility.newest {
            return Ok(());
        }
        self.mobility.newest = this;
        let path = self.reply_path;
        if contradicts(&path, parts) {
            let line = format!("unexpected NAT detected between {} and {}", path.local, path.remote);
            ctx.log("IKE", 1, self.core.tag(), line);
            return Err(NotifyType::UNEXPECTED_NAT_DETECTED);
        }
        if update {
            self.follow(ctx, now, path, parts)?;
        }
        if list {
            self.mobility.peer = addresses(path.remote.ip(), parts);
            if !self.is_peer_there() {
                self.ask_for_routes(ctx);
            }
        }
        Ok(())
    }

    /// Responder: the initiator has moved to where its request came from (§3.5).
    fn follow(&mut self, ctx: &mut Context, now: Instant, path: Path, parts: &Parts) -> Result<(), NotifyType> {
        if self.mobility.initiator || self.has_transport_mode() || !is_possible(path.remote.ip()) {
            let line = format!("{} is not acceptable", path.remote);
            ctx.log("IKE", 1, self.core.tag(), line);
            return Err(NotifyType::UNACCEPTABLE_ADDRESSES);
        }
        let moved = path != self.core.path;
        if moved {
            let line = format!("peer moved from {} to {}", self.core.path.remote, path.remote);
            ctx.log("IKE", 1, self.core.tag(), line);
            self.core.path = path;
            self.stream_is_up();
            ctx.judge(&path, Judgement::Authentic);
            self.mobility.changes = self.mobility.changes.wrapping_add(1);
            self.mobility.paths.clear();
            self.mobility.stranded = false;
            self.mobility.retold = 0;
        }
        if self.core.nat.traversal && has_nat_detection(parts) {
            let spis = self.channel.spis;
            self.core.nat = Nat::detect(parts, spis.initiator, spis.responder, &path, self.core.nat.fake);
        }
        let over_stream = matches!(path.transport, Transport::Stream(_));
        // RFC 9329 §7.1: a stream has shown that its originator receives.
        if over_stream || self.mobility.verified.contains(&path.remote.ip()) {
            self.move_children(ctx);
        } else {
            self.queue_errand(Errand::Check);
        }
        if moved {
            self.probe(ctx, now);
        }
        Ok(())
    }

    /// Authentic ESP came from elsewhere (§3.8: that may be followed, IKE messages must not be). An address that the
    /// peer has not shown itself at is checked, along the old path as well: nobody shall end the IKE SA by one packet
    /// with a false source.
    pub(super) fn check_after_mapping_change(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        old: Path,
    ) -> Result<(), Closed> {
        let unknown = !self.mobility.verified.contains(&self.core.path.remote.ip());
        if !self.mobility.on || !unknown {
            return Ok(());
        }
        self.mobility.changes = self.mobility.changes.wrapping_add(1);
        self.mobility.candidates = vec![old];
        self.mobility.returns_to = Some(Box::new(old));
        self.queue_errand(Errand::Check);
        self.pump(ctx, now)
    }

    /// Points the Child SAs to where the IKE SA is.
    pub(super) fn move_children(&mut self, ctx: &mut Context) {
        let to = self.core.encapsulation();
        for child in self.children.iter_mut().filter(|child| child.encapsulation != to) {
            child.encapsulation = to;
            ctx.event(Event::Migrate { spi_in: child.spi_in, to });
        }
    }
}

/// Our addresses beyond the one in use.
fn additional(ctx: &Context, local: IpAddr) -> Vec<IpAddr> {
    ctx.local_addresses.iter().copied().filter(|address| *address != local).take(MAX_ADDRESSES).collect()
}

fn address_payload(address: IpAddr) -> Payload {
    match address {
        IpAddr::V4(ip) => notify(NotifyType::ADDITIONAL_IP4_ADDRESS, ip.octets().to_vec()),
        IpAddr::V6(ip) => notify(NotifyType::ADDITIONAL_IP6_ADDRESS, ip.octets().to_vec()),
    }
}

/// §3.6: the whole list each time.
fn address_list(told: &[IpAddr]) -> Vec<Payload> {
    if told.is_empty() {
        return vec![notify(NotifyType::NO_ADDITIONAL_ADDRESSES, Vec::new())];
    }
    told.iter().copied().map(address_payload).collect()
}

fn is_address_list(kind: NotifyType) -> bool {
    matches!(
        kind,
        NotifyType::ADDITIONAL_IP4_ADDRESS | NotifyType::ADDITIONAL_IP6_ADDRESS | NotifyType::NO_ADDITIONAL_ADDRESSES
    )
}

/// The peer's addresses by a message that came from `header`.
fn addresses(header: IpAddr, parts: &Parts) -> Vec<IpAddr> {
    let mut addresses = vec![header];
    for notify in &parts.notifies {
        let address = match notify.kind {
            NotifyType::ADDITIONAL_IP4_ADDRESS => <[u8; 4]>::try_from(notify.data.as_slice()).ok().map(IpAddr::from),
            NotifyType::ADDITIONAL_IP6_ADDRESS => <[u8; 16]>::try_from(notify.data.as_slice()).ok().map(IpAddr::from),
            _ => None,
        };
        let fits = |address: &IpAddr| is_possible(*address) && !addresses.contains(address);
        if let Some(address) = address.filter(fits)
            && addresses.len() <= MAX_ADDRESSES
        {
            addresses.push(address);
        }
    }
    addresses
}

/// True for an address at which a single peer can be.
fn is_possible(address: IpAddr) -> bool {
    let broadcast = matches!(address, IpAddr::V4(ip) if ip.is_broadcast());
    !address.is_unspecified() && !address.is_multicast() && !broadcast
}

fn has_nat_detection(parts: &Parts) -> bool {
    parts.has(NotifyType::NAT_DETECTION_SOURCE_IP) && parts.has(NotifyType::NAT_DETECTION_DESTINATION_IP)
}

/// NO_NATS_ALLOWED for a message that goes along `path`.
fn prohibition(path: &Path) -> Payload {
    notify(NotifyType::NO_NATS_ALLOWED, nat::prohibition(path.local, path.remote))
}

/// True when a message that came along `path` has a NO_NATS_ALLOWED that says otherwise. Over a stream NATs do no harm
/// (RFC 9329 §7.1).
fn contradicts(path: &Path, parts: &Parts) -> bool {
    let over_stream = matches!(path.transport, Transport::Stream(_));
    let said = parts.notify(NotifyType::NO_NATS_ALLOWED).filter(|_| !over_stream);
    said.is_some_and(|said| said.data != nat::prohibition(path.remote, path.local))
}
