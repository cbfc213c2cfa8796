//! IKE_AUTH as initiator (RFC 7296 §1.2, §2.15, §2.21.2).

mod eap;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pad::{Admission, AuthError, AuthMethod, Identity, PeerIdentity, Ppk, SignError, SignedAuth};

use ipsec::plane::StreamId;

use super::auth::{InitMaterial, auth_announcement, cert_requests, identification, is_where_it_says};
use super::basis::Basis;
use super::channel::{Channel, Received};
use super::child::ChildOffer;
use super::childless;
use super::configuration;
use super::established::{RECONNECT_FIRST, RECONNECT_LONGEST, Task};
use super::fault::{Fault, notify, notify_name};
use super::init::{Again, begin_over_tcp};
use super::message_id_sync;
use super::mobility::announcement;
use super::parts::Parts;
use super::ppk::{self, Unmixed};
use super::redirect::{Redirected, Redirects};
use super::resumption;
use super::retry::{Retry, after};
use super::tickets;
use super::{Core, Established, IkeSa, Want, fail_wants, is_first_contact, local_identity, window};
use crate::config::{Connection, TcpPolicy};
use crate::engine::context::Context;
use crate::engine::tickets::{Grant, method};
use crate::engine::{
    CloseReason, Event, IkeSaStatus, IkeState, Job, JobId, JobOutcome, Judgement, Party, Path, Transport,
};
use crate::wire::{ExchangeType, Identification, NotifyType, Opened, Payload, Protected};

/// An IKE SA that we initiated, with keys, and a peer that has not proved anything.
pub(crate) struct InitiatorAuth {
    pub(crate) core: Core,
    pub(crate) channel: Channel,
    connection: Arc<Connection>,
    wants: Vec<Want>,
    material: InitMaterial,
    local_id: Identity,
    childless: bool,
    deadline: Instant,
    offer: Option<Box<ChildOffer>>,
    ppk: Option<OurPpk>,
    /// What a ticket brings back. Then neither side signs or verifies anything by credentials.
    resumed: Option<Box<Grant>>,
    phase: Phase,
    /// The stream broke, and another one is to be opened, or being opened.
    reopening: Option<Reopening>,
}

/// A new stream for one that broke.
struct Reopening {
    /// When; it is on its way where this is over.
    at: Option<Instant>,
    /// The wait before the next one.
    wait: Duration,
}

/// The PPK that we name in IKE_AUTH (RFC 8784 §3).
struct OurPpk {
    id: Identity,
    ppk: Ppk,
    /// Our proof without it, where the peer may do without it.
    without: Option<SignedAuth>,
    /// The keys without it, once it is mixed in.
    unmixed: Option<Unmixed>,
}

enum Phase {
    /// Our proof is being made.
    Signing(JobId),
    /// The request is out.
    Waiting,
    /// The peer has proved itself and sends us elsewhere, to where is being looked up.
    Redirecting { job: JobId, redirects: Redirects },
    /// The peer's proof is being checked; what else it said waits.
    Verifying { job: JobId, asserted: Identity, basis: Box<Basis>, parts: Box<Parts> },
    /// We prove ourselves by EAP (§2.16).
    Eap(eap::State),
}

impl InitiatorAuth {
    #[allow(clippy::too_many_arguments, reason = "the parts of a consumed Initiating")]
    pub(crate) fn begin(
        ctx: &mut Context,
        now: Instant,
        core: Core,
        channel: Channel,
        connection: Arc<Connection>,
        wants: Vec<Want>,
        material: InitMaterial,
        childless: bool,
    ) -> Option<IkeSa> {
        let local_id = local_identity(&connection, &core.path);
        if let pad::AuthClass::Eap(_) = connection.local_auth.class {
            return Self::begin_eap(ctx, now, core, channel, connection, wants, material, childless, local_id);
        }
        let peer_id = connection.remote.remote_id.as_exact().cloned();
        let ppk = ppk::of_connection(ctx, &connection).filter(|_| material.use_ppk);
        let mut ppk = ppk.map(|(id, ppk)| OurPpk { id, ppk, without: None, unmixed: None });
        let mut channel = channel;
        let mixed = match &mut ppk {
            // A proof without it comes first where the peer may do without it.
            Some(ours) if connection.ppk_required => channel.mix(&ours.ppk).map(|unmixed| ours.unmixed = Some(unmixed)),
            _ => Ok(()),
        };
        let request = mixed
            .and_then(|()| material.sign_request(&channel, local_id.clone(), peer_id, connection.local_auth.clone()));
        let Ok(request) = request else {
            fail_wants(ctx, &core.name, &wants, "the PRF is not supported");
            return None;
        };
        let job = ctx.job(core.id, Job::Sign(request));
        // Jobs may be slow, but they do not hold an SA for ever.
        let deadline = after(now, super::retry::total(&ctx.config.retransmission) + ctx.config.half_open_timeout);
        let phase = Phase::Signing(job);
        Some(IkeSa::InitiatorAuth(Box::new(Self {
            core,
            channel,
            connection,
            wants,
            material,
            local_id,
            childless,
            deadline,
            offer: None,
            ppk,
            resumed: None,
            phase,
            reopening: None,
        })))
    }

    /// After IKE_SESSION_RESUME: both sides prove that they have the keys, and are who they were (RFC 5723 §4.3.3).
    #[allow(clippy::too_many_arguments, reason = "the parts of a consumed Resuming")]
    pub(crate) fn resume(
        ctx: &mut Context,
        now: Instant,
        core: Core,
        channel: Channel,
        connection: Arc<Connection>,
        wants: Vec<Want>,
        material: InitMaterial,
        childless: bool,
        grant: Grant,
    ) -> IkeSa {
        let local_id = grant.peer.local_id.clone();
        let deadline = after(now, super::retry::total(&ctx.config.retransmission) + ctx.config.half_open_timeout);
        let auth = resumption::proof(&channel, &material, &identification(&local_id));
        let remote = identification(&grant.peer.id);
        let sa = Box::new(Self {
            core,
            channel,
            connection,
            wants,
            material,
            local_id,
            childless,
            deadline,
            offer: None,
            ppk: None,
            resumed: Some(Box::new(grant)),
            phase: Phase::Waiting,
            reopening: None,
        });
        let mut payloads = vec![Payload::IdInitiator(identification(&sa.local_id))];
        if is_first_contact(ctx, &sa.connection, &sa.local_id) {
            payloads.push(notify(NotifyType::INITIAL_CONTACT, Vec::new()));
        }
        payloads.push(Payload::IdResponder(remote));
        payloads.push(auth);
        sa.ask(ctx, now, payloads)
    }

    /// What the responder has announced (RFC 9593).
    #[cfg(test)]
    pub(crate) fn announced(&self) -> Option<&[pad::AuthAnnouncement]> {
        self.material.announced.as_deref()
    }

    pub(crate) fn serves(&self, connection: &Connection, remote: std::net::IpAddr) -> bool {
        self.connection.authenticates_as(connection)
            && (self.core.path.remote.ip() == remote || self.core.redirects.came_from(remote))
    }

    pub(crate) fn add_want(&mut self, want: Want) {
        self.wants.push(want);
    }

    pub(crate) fn next_timeout(&self) -> Instant {
        let reopening = self.reopening.as_ref().and_then(|reopening| reopening.at);
        [self.channel.next_timeout(), reopening].into_iter().flatten().fold(self.deadline, Instant::min)
    }

    pub(crate) fn status(&self) -> IkeSaStatus {
        IkeSaStatus {
            id: self.core.id,
            connection: self.core.name.to_string(),
            state: IkeState::Connecting,
            path: self.core.path,
            local_id: Some(self.local_id.clone()),
            remote_id: self.connection.remote.remote_id.as_exact().cloned(),
            peer: None,
            initiator: true,
            initiator_spi: self.channel.spis.initiator,
            responder_spi: self.channel.spis.responder,
            nat_local: self.core.nat.local,
            nat_remote: self.core.nat.remote,
            nat_fake: self.core.nat.fake,
            suite: Some(self.channel.suite),
            established: None,
            rekey_in: None,
            reauth_in: None,
            assigned: None,
            resumed: false,
            tasks_active: vec!["IKE_CERT_PRE", "IKE_AUTH", "IKE_CERT_POST", "CHILD_CREATE"],
            children: Vec::new(),
        }
    }

    pub(crate) fn handle_job(
        mut self: Box<Self>,
        ctx: &mut Context,
        now: Instant,
        job: JobId,
        outcome: JobOutcome,
    ) -> Option<IkeSa> {
        match (std::mem::replace(&mut self.phase, Phase::Waiting), outcome) {
            (Phase::Signing(waiting), JobOutcome::Sign(result)) if waiting == job => self.signed(ctx, now, result),
            (Phase::Verifying { job: waiting, asserted, basis, parts }, JobOutcome::Authenticate(result))
                if waiting == job =>
            {
                match self.admit(ctx, now, &asserted, *basis, result) {
                    Ok((peer, basis)) => self.authenticated(ctx, now, peer, basis, *parts),
                    Err(reason) => self.reject(ctx, now, &reason),
                }
            }
            (Phase::Eap(state), outcome) => self.handle_eap_job(ctx, now, state, job, outcome),
            (Phase::Redirecting { job: waiting, redirects }, JobOutcome::Resolve(result)) if waiting == job => {
                self.redirected(ctx, now, redirects, result);
                None
            }
            (phase, _) => {
                self.phase = phase;
                Some(IkeSa::InitiatorAuth(self))
            }
        }
    }

    /// The peer as its proof was found to be, if it is the one that it said and that the connection names.
    fn admit(
        &self,
        ctx: &mut Context,
        now: Instant,
        asserted: &Identity,
        basis: Basis,
        result: Result<Admission, AuthError>,
    ) -> Result<(Arc<PeerIdentity>, Arc<Basis>), String> {
        let Admission { peer, good_for, intermediates, warnings } = result.map_err(|error| error.to_string())?;
        if peer.id != *asserted || !self.connection.remote.remote_id.matches(&peer.id) {
            return Err("the identity is not the one that the connection names".to_owned());
        }
        ctx.log("IKE", 1, self.core.tag(), format!("authentication of '{}' successful", peer.id));
        warnings.into_iter().for_each(|line| ctx.log("CFG", 1, self.core.tag(), line));
        Ok((Arc::new(peer), basis.proved(now, good_for, intermediates)))
    }

    /// RFC 5685 §6: the IKE SA that was not needed is deleted, and what was asked for is made elsewhere.
    fn redirected(
        mut self: Box<Self>,
        ctx: &mut Context,
        now: Instant,
        redirects: Redirects,
        result: Result<(IpAddr, IpAddr), String>,
    ) {
        ctx.say_farewell(now, self.channel.take(), &self.core, CloseReason::Replaced);
        match result {
            Ok((local, remote)) => {
                let (connection, wants) = (Arc::clone(&self.connection), std::mem::take(&mut self.wants));
                let from = self.core.id;
                ctx.redirected.push(Redirected { from, connection, wants, local, remote, redirects });
                self.abandon(ctx, "redirected", CloseReason::Replaced);
            }
            Err(reason) => {
                let reason = format!("redirect failed: {reason}");
                ctx.log("IKE", 1, self.core.tag(), reason.clone());
                self.abandon(ctx, &reason, CloseReason::Failed);
            }
        }
    }

    pub(crate) fn handle_protected(
        mut self: Box<Self>,
        ctx: &mut Context,
        now: Instant,
        path: Path,
        protected: Protected,
        datagram: &[u8],
    ) -> Option<IkeSa> {
        // Requests of a peer that has proved nothing are not even opened.
        if !protected.header.response || protected.header.exchange != ExchangeType::IKE_AUTH {
            return Some(IkeSa::InitiatorAuth(self));
        }
        match self.channel.receive(protected, datagram) {
            Received::Response(opened) => self.response(ctx, now, &opened),
            Received::Forged => {
                ctx.judge(&path, Judgement::Forged);
                Some(IkeSa::InitiatorAuth(self))
            }
            Received::Request(_)
            | Received::Repeated(_)
            | Received::Awaited
            | Received::Beyond(_)
            | Received::Ignored => Some(IkeSa::InitiatorAuth(self)),
        }
    }

    pub(crate) fn handle_timeout(mut self: Box<Self>, ctx: &mut Context, now: Instant) -> Option<IkeSa> {
        if now >= self.deadline {
            self.abandon(ctx, "authentication took too long", CloseReason::Timeout);
            return None;
        }
        let policy = self.core.retransmission(ctx, &self.connection);
        if let Some(overdue) = self.channel.poll_retry(now, &policy, ctx.rng.as_mut()) {
            if overdue.resend.is_some() && self.core.is_blocked(overdue.count) {
                begin_over_tcp(ctx, &self.core, &self.connection, std::mem::take(&mut self.wants));
                self.abandon(ctx, "", CloseReason::Timeout);
                return None;
            }
            ctx.log("IKE", 1, self.core.tag(), overdue.to_string());
            let Some(datagrams) = overdue.resend else {
                self.give_up(ctx, "the peer does not answer");
                return None;
            };
            self.core.send(ctx, datagrams);
        }
        if let Some(reopening) = self.reopening.as_mut().filter(|reopening| reopening.at.is_some_and(|at| at <= now)) {
            reopening.at = None;
            self.open_stream(ctx);
        }
        Some(IkeSa::InitiatorAuth(self))
    }

    /// A sequence of tries is over: another one from the start, or the end.
    fn give_up(mut self: Box<Self>, ctx: &mut Context, reason: &str) {
        if self.resumed.is_some() {
            return self.authenticate_from_start(ctx, reason);
        }
        let (tries, sequence) = (self.connection.keyingtries, self.core.sequence);
        if tries == 0 || sequence < tries {
            let line = format!("peer not responding, trying again ({}/{tries})", sequence.saturating_add(1));
            ctx.log("IKE", 1, self.core.tag(), line);
            self.begin_again(ctx, sequence.saturating_add(1));
        }
        self.abandon(ctx, reason, CloseReason::Timeout);
    }

    /// What was asked for is made by another IKE SA, from the start.
    fn begin_again(&mut self, ctx: &mut Context, sequence: u32) {
        let from_start = Redirected {
            from: self.core.id,
            connection: Arc::clone(&self.connection),
            wants: std::mem::take(&mut self.wants),
            local: self.core.path.local.ip(),
            remote: self.core.path.remote.ip(),
            redirects: self.core.redirects.clone(),
        };
        ctx.again.push(Again { from_start, sequence, needs_tcp: false });
    }

    /// The ticket led nowhere, and is gone: a full authentication instead.
    fn authenticate_from_start(mut self: Box<Self>, ctx: &mut Context, reason: &str) {
        ctx.log("IKE", 1, self.core.tag(), format!("{reason}, authenticating from the start"));
        let sequence = self.core.sequence;
        self.begin_again(ctx, sequence);
        self.abandon(ctx, reason, CloseReason::Failed);
    }

    fn open_stream(&mut self, ctx: &mut Context) {
        let Path { local, remote, .. } = self.core.path;
        self.core.path.transport = Transport::Stream(ctx.open_stream(&self.connection, local.ip(), remote));
    }

    /// RFC 9329 §6.1: what is outstanding goes again over the new stream.
    pub(crate) fn handle_stream_opened(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        stream: StreamId,
        local: SocketAddr,
    ) {
        if self.core.path.transport != Transport::Stream(stream) || self.reopening.take().is_none() {
            return;
        }
        self.core.path.local = local;
        let retry = Retry::start(now, &ctx.config.retransmission, true, ctx.rng.as_mut());
        self.channel.restart_retry(retry);
        let datagrams = self.channel.outstanding();
        self.core.send(ctx, datagrams);
    }

    pub(crate) fn handle_stream_closed(
        mut self: Box<Self>,
        ctx: &mut Context,
        now: Instant,
        stream: StreamId,
        reason: &str,
    ) -> Option<IkeSa> {
        if self.core.path.transport != Transport::Stream(stream) {
            return Some(IkeSa::InitiatorAuth(self));
        }
        ctx.log("NET", 1, self.core.tag(), format!("TCP connection lost: {reason}"));
        // RFC 9329 §6.1: we opened it and we open another, until the time is up.
        let wait = self.reopening.as_ref().map_or(Duration::ZERO, |reopening| reopening.wait);
        let next = wait.saturating_mul(2).clamp(RECONNECT_FIRST, RECONNECT_LONGEST);
        let at = (!wait.is_zero()).then(|| after(now, wait));
        self.reopening = Some(Reopening { at, wait: next });
        if at.is_none() {
            self.open_stream(ctx);
        }
        Some(IkeSa::InitiatorAuth(self))
    }

    /// Ends before anything came up.
    pub(crate) fn abandon(self, ctx: &mut Context, reason: &str, close: CloseReason) {
        if let Some(offer) = &self.offer {
            ctx.release_child_spi(offer.spi);
        }
        fail_wants(ctx, &self.core.name, &self.wants, reason);
        let status = self.status();
        ctx.event(Event::IkeDown(Box::new(status), close));
    }

    fn signed(
        mut self: Box<Self>,
        ctx: &mut Context,
        now: Instant,
        result: Result<SignedAuth, SignError>,
    ) -> Option<IkeSa> {
        let signed = match result {
            Ok(signed) => signed,
            Err(error) => {
                ctx.log("IKE", 1, self.core.tag(), error.to_string());
                self.abandon(ctx, &error.to_string(), CloseReason::Failed);
                return None;
            }
        };
        if let Some(ours) = self.ppk.as_mut().filter(|ours| ours.unmixed.is_none()) {
            // RFC 8784 §3: that was the proof without the PPK, now the one with it.
            let peer_id = self.connection.remote.remote_id.as_exact().cloned();
            let auth = self.connection.local_auth.clone();
            let request = self.channel.mix(&ours.ppk).and_then(|unmixed| {
                (ours.without, ours.unmixed) = (Some(signed), Some(unmixed));
                self.material.sign_request(&self.channel, self.local_id.clone(), peer_id, auth)
            });
            let Ok(request) = request else {
                self.abandon(ctx, "the PRF is not supported", CloseReason::Failed);
                return None;
            };
            self.phase = Phase::Signing(ctx.job(self.core.id, Job::Sign(request)));
            return Some(IkeSa::InitiatorAuth(self));
        }
        self.material.note_own_key(&signed);
        let method = signed.method;
        let id = identification(&self.local_id);
        let line = format!("authentication of '{}' (myself)", self.local_id);
        ctx.log("IKE", 1, self.core.tag(), line);
        let mut payloads = vec![Payload::IdInitiator(id)];
        let mut proof = self.material.proof_payloads(signed, self.connection.send_cert);
        let auth = proof.pop();
        payloads.append(&mut proof);
        payloads.extend(self.expectations(ctx));
        payloads.extend(auth);
        if let Some(ours) = &mut self.ppk {
            payloads.push(ppk::identity(&ours.id));
            // The method is that of the AUTH payload.
            let without = ours.without.take().filter(|without| without.method == method);
            payloads.extend(without.map(|without| notify(NotifyType::NO_PPK_AUTH, without.auth)));
        }
        Some(self.ask(ctx, now, payloads))
    }

    /// Whom we expect, how it can prove itself, and whether we know of an IKE SA with it.
    fn expectations(&self, ctx: &Context) -> Vec<Payload> {
        let mut payloads = Vec::new();
        if is_first_contact(ctx, &self.connection, &self.local_id) {
            payloads.push(notify(NotifyType::INITIAL_CONTACT, Vec::new()));
        }
        payloads.extend(cert_requests([&self.connection], &ctx.authorities));
        if self.material.announced.is_some() {
            // RFC 9593 §3.1: to a responder that knows what it is.
            payloads.push(auth_announcement(std::slice::from_ref(&self.connection), ctx.config.signatures));
        }
        if let Some(remote) = self.connection.remote.remote_id.as_exact() {
            payloads.push(Payload::IdResponder(identification(remote)));
        }
        payloads
    }

    /// Sends IKE_AUTH: our proof, and all that does not depend on what it is made with.
    fn ask(mut self: Box<Self>, ctx: &mut Context, now: Instant, mut payloads: Vec<Payload>) -> IkeSa {
        payloads.extend(ctx.tokens.payload(self.channel.spis));
        payloads.push(message_id_sync::supported());
        payloads.push(window::announcement());
        if let Some(child) = self.first_child() {
            let nonce = self.material.ni.clone();
            let trigger =
                self.wants.iter().find(|want| want.child.is_some()).and_then(|want| ctx.triggers.of(want.token));
            let wanted = configuration::request(ctx, &self.connection, &self.core);
            let offer = ChildOffer::first(ctx, &self.core, child, nonce).wanted_by(trigger).asking(wanted);
            let party = Party::Expected { remote: &self.connection.remote.remote_id, local: &self.local_id };
            let offer = offer.around_reserved(ctx, party);
            payloads.extend(offer.payloads(None));
            self.offer = Some(Box::new(offer));
        }
        payloads.extend(announcement(ctx, &self.connection, &self.core, None));
        if self.connection.session_resumption {
            payloads.push(tickets::request());
        }
        self.send(ctx, now, &payloads);
        self.phase = Phase::Waiting;
        IkeSa::InitiatorAuth(self)
    }

    fn send(&mut self, ctx: &mut Context, now: Instant, payloads: &[Payload]) {
        let over_stream = matches!(self.core.path.transport, Transport::Stream(_));
        let policy = self.core.retransmission(ctx, &self.connection);
        let retry = Retry::start(now, &policy, over_stream, ctx.rng.as_mut());
        let max_length = ctx.max_length(&self.core.path, self.channel.fragmentation, self.connection.fragmentation);
        let datagrams = self.channel.request(ExchangeType::IKE_AUTH, payloads, max_length, retry, ctx.rng.as_mut());
        self.core.send(ctx, datagrams.unwrap_or_default());
    }

    /// The Child SA for IKE_AUTH: the first that was asked for; the connection's first where the peer needs one.
    fn first_child(&self) -> Option<Arc<crate::config::Child>> {
        let policy = self.connection.childless;
        if childless::defers_child(policy, self.childless) {
            return None;
        }
        let wanted = self.wants.iter().find_map(|want| want.child.clone());
        let needed = wanted.is_none() && !childless::may_leave_out(policy, self.childless);
        if needed { self.connection.children.first().cloned() } else { wanted }
    }

    fn response(mut self: Box<Self>, ctx: &mut Context, now: Instant, opened: &Opened) -> Option<IkeSa> {
        let parts = match Parts::of(opened) {
            Ok(parts) => parts,
            Err(fault) => return self.reject(ctx, now, &fault.to_string()),
        };
        if let Phase::Eap(state) = std::mem::replace(&mut self.phase, Phase::Waiting) {
            return self.handle_eap_response(ctx, now, state, parts);
        }
        let (Some(id), Some(auth)) = (parts.id_responder.clone(), parts.auth.clone()) else {
            self.unproved(ctx, &parts);
            return None;
        };
        if let Some(grant) = self.resumed.take() {
            return self.resumed_response(ctx, now, *grant, parts);
        }
        let asserted = match Identity::from_wire(id.kind, &id.data) {
            Ok(asserted) => asserted,
            Err(error) => return self.reject(ctx, now, &error.to_string()),
        };
        if let Some(ours) = &mut self.ppk
            && !parts.has(NotifyType::PPK_IDENTITY)
        {
            if self.connection.ppk_required {
                return self.reject(ctx, now, "it does without the PPK, which is required");
            }
            if let Some(unmixed) = ours.unmixed.take() {
                self.channel.unmix(unmixed);
            }
            ctx.log("IKE", 1, self.core.tag(), ppk::UNUSED.to_owned());
        }
        let job = match self.verify(ctx, &id, &asserted, auth, &parts) {
            Ok(job) => job,
            Err(reason) => return self.reject(ctx, now, &reason),
        };
        let uses_ppk = self.ppk.as_ref().is_some_and(|ours| ours.unmixed.is_some());
        let basis = Box::new(Basis::new(ctx, now, Vec::new(), uses_ppk));
        self.phase = Phase::Verifying { job, asserted, basis, parts: Box::new(parts) };
        Some(IkeSa::InitiatorAuth(self))
    }

    /// Asks whether the peer is who it says it is.
    fn verify(
        &self,
        ctx: &mut Context,
        id: &Identification,
        asserted: &Identity,
        auth: (u8, Vec<u8>),
        parts: &Parts,
    ) -> Result<JobId, String> {
        if !is_where_it_says(ctx, &self.core.path, asserted, AuthMethod(auth.0)) {
            return Err(format!("'{asserted}' is not where its messages come from"));
        }
        let request = self.material.authenticate_request(
            &self.channel,
            id,
            asserted.clone(),
            self.local_id.clone(),
            auth,
            (parts.certificates.clone(), parts.raw_key.clone()),
            vec![self.connection.remote.clone()],
        );
        let request = request.map_err(|_| "the PRF is not supported")?;
        Ok(ctx.job(self.core.id, Job::Authenticate(request)))
    }

    /// Without a proof there are only errors; they are protected, but by nobody that we know.
    fn unproved(mut self: Box<Self>, ctx: &mut Context, parts: &Parts) {
        let line = match parts.error() {
            Some(error) => format!("received {} notify error", notify_name(error.kind)),
            None => "the peer did not authenticate".to_owned(),
        };
        if self.resumed.is_some() {
            return self.authenticate_from_start(ctx, &line);
        }
        ctx.log("IKE", 1, self.core.tag(), line.clone());
        let translated = parts.has(NotifyType::UNEXPECTED_NAT_DETECTED);
        if translated && self.core.sequence <= ctx.config.retransmission.tries {
            // RFC 4555 §3.9: perhaps one packet was tampered with.
            let sequence = self.core.sequence.saturating_add(1);
            self.begin_again(ctx, sequence);
        }
        self.abandon(ctx, &line, CloseReason::Failed);
    }

    /// The answer to IKE_AUTH after IKE_SESSION_RESUME: the gateway shows that it has the keys, and is who it was.
    fn resumed_response(self: Box<Self>, ctx: &mut Context, now: Instant, grant: Grant, parts: Parts) -> Option<IkeSa> {
        let proved = resumption::check(&self.channel, &self.material, &grant.peer.id, &parts);
        let reason = match proved {
            Err(reason) => Some(reason),
            Ok(()) if !is_where_it_says(ctx, &self.core.path, &grant.peer.id, method(&grant.peer)) => {
                Some("it is not where it says")
            }
            Ok(()) if grant.basis.epoch != ctx.shared.tickets.lock().epoch() => Some("credentials have changed"),
            Ok(()) => None,
        };
        if let Some(reason) = reason {
            let mut sa = self;
            sa.say_authentication_failed(ctx, now);
            sa.authenticate_from_start(ctx, &format!("resumption failed: {reason}"));
            return None;
        }
        ctx.log("IKE", 1, self.core.tag(), resumption::line(now, &grant.peer, &grant.basis));
        let basis = grant.basis.resumed();
        self.authenticated(ctx, now, grant.peer, basis, parts)
    }

    /// The peer believes that the IKE SA is up, and must learn that it is not.
    fn say_authentication_failed(&mut self, ctx: &mut Context, now: Instant) {
        let retry = Retry::start(now, &ctx.config.retransmission, true, ctx.rng.as_mut());
        let payloads = [Fault::AuthenticationFailed.payload()];
        let datagrams = self.channel.request(ExchangeType::INFORMATIONAL, &payloads, None, retry, ctx.rng.as_mut());
        self.core.send(ctx, datagrams.unwrap_or_default());
    }

    fn authenticated(
        mut self: Box<Self>,
        ctx: &mut Context,
        now: Instant,
        peer: Arc<PeerIdentity>,
        basis: Arc<Basis>,
        parts: Parts,
    ) -> Option<IkeSa> {
        if parts.has(NotifyType::REDIRECT) && parts.sa.is_none() {
            let mut redirects = self.core.redirects.clone();
            match redirects.follow(now, &parts, &[], self.core.path.remote.ip()) {
                Ok(gateway) => {
                    ctx.log("IKE", 0, self.core.tag(), format!("redirected to {gateway}"));
                    let job = ctx.job(self.core.id, Job::Resolve(gateway));
                    self.phase = Phase::Redirecting { job, redirects };
                    return Some(IkeSa::InitiatorAuth(self));
                }
                Err(reason) => ctx.log("IKE", 1, self.core.tag(), reason),
            }
        }
        let Self { core, channel, connection, mut wants, material, offer, .. } = *self;
        if connection.tcp == TcpPolicy::Fallback {
            ctx.shared.networks.lock().note(now, &core.path);
        }
        let uses_ppk = basis.uses_ppk && !basis.resumed;
        let binding = material.channel_binding(&channel, &peer, &basis);
        let keys = material.endpoint_keys(&peer, &basis);
        let mut established = Box::new(Established::new(
            ctx,
            now,
            core,
            channel,
            connection,
            peer,
            basis,
            super::established::Role::Initiator,
        ));
        (established.channel_binding, established.endpoint_keys) = (binding, keys.map(Box::new));
        if uses_ppk && established.connection.ppk_rekey {
            // RFC 8784 §4: the keys of this IKE SA's own messages have no PPK in them, its successor's have.
            established.queue.push_back(Task::RekeyIke { token: None, group: None, tries: 0 });
        }
        established.negotiate_mobility(ctx, true, &parts);
        established.take_tokens(&parts);
        established.negotiate_message_id_sync(&parts);
        established.note_auth_lifetime(ctx, now, &parts);
        established.note_window(&parts);
        established.take_ticket(ctx, now, &parts);
        // The first wanted child went with IKE_AUTH, what else was asked for follows.
        let with_child = offer.as_ref().and_then(|_| wants.iter().position(|want| want.child.is_some()));
        let first = with_child.map(|index| wants.remove(index));
        let result = established.adopt_wants(ctx, now, wants).and_then(|()| match offer {
            Some(offer) => {
                let token = first.and_then(|want| want.token);
                established.finish_first_child(ctx, now, *offer, token, &parts, &material.nr)
            }
            None => established.pump(ctx, now),
        });
        result.is_ok().then_some(IkeSa::Established(established))
    }

    /// RFC 7296 §2.21.2: we authenticated to the peer, which must learn that it did not to us.
    fn reject(mut self: Box<Self>, ctx: &mut Context, now: Instant, reason: &str) -> Option<IkeSa> {
        ctx.log("IKE", 1, self.core.tag(), format!("authentication of the peer failed: {reason}"));
        self.say_authentication_failed(ctx, now);
        if self.resumed.is_some() {
            self.authenticate_from_start(ctx, reason);
            return None;
        }
        self.abandon(ctx, &format!("authentication of the peer failed: {reason}"), CloseReason::Failed);
        None
    }
}
