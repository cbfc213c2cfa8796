//! Between IKE_SA_INIT and IKE_AUTH as responder: our answer, the keys, and the additional key exchanges of RFC
//! 9370, each in an IKE_INTERMEDIATE exchange (RFC 9242) under the keys of the one before.
//!
//! A stranger gets one job at a time: the answer to its public value, which is sent; then, when a protected message
//! shows that the answer arrived, the shared secret. How many IKE_INTERMEDIATE exchanges follow is known then, and
//! one more or less ends it (RFC 9242 §5).

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use ipsec::secret::Secret;
use ipsec::transform::Ke;

use super::auth::InitMaterial;
use super::channel::{Channel, Received, Spis};
use super::fault::Fault;
use super::parts::Parts;
use super::retry::after;
use super::{Core, IkeSa, ResponderAuth};
use crate::config::Connection;
use crate::crypto::{self, IkeSuite, KeyDone, KeyError, KeySeed, KeyWork, Pending};
use crate::engine::context::Context;
use crate::engine::{CloseReason, Event, IkeSaStatus, IkeState, JobId, JobOutcome, Judgement, Path};
use crate::wire::{self, ExchangeType, Message, Opened, Payload, Protected};

/// Datagrams that are kept while the first keys are computed; the peer sends what is lost again.
const MAX_EARLY: usize = 32;
/// Octets of them.
const MAX_EARLY_OCTETS: usize = 65_535;

/// What an initiator asked for, and what we are going to answer.
pub(crate) struct Request {
    pub(crate) suite: IkeSuite,
    pub(crate) spis: Spis,
    pub(crate) fragmentation: bool,
    /// The answer, but for the KE payload.
    pub(crate) answer: Message,
    /// `ours` is empty until the answer is out.
    pub(crate) material: InitMaterial,
    /// Connections that fit the addresses and the proposal, in configuration order.
    pub(crate) candidates: Vec<Arc<Connection>>,
}

/// An IKE SA that a peer initiated, and that proved nothing.
pub(crate) struct ResponderIntermediate {
    pub(crate) core: Core,
    suite: IkeSuite,
    spis: Spis,
    fragmentation: bool,
    material: InitMaterial,
    candidates: Vec<Arc<Connection>>,
    init_remote: SocketAddr,
    /// `None` until the first shared secret is there.
    pub(super) channel: Option<Channel>,
    /// Additional key exchanges that the initiator still has to begin.
    remaining: VecDeque<Ke>,
    deadline: Instant,
    phase: Phase,
}

enum Phase {
    /// Our public value is being made, and the answer waits for it.
    Answering { job: JobId, answer: Message },
    /// The answer is out.
    Answered(Pending),
    /// The first shared secret is being computed; what the initiator sent waits.
    Agreeing { job: JobId, early: Vec<(Path, Protected, Vec<u8>)> },
    /// An IKE_INTERMEDIATE request is due.
    Waiting,
    /// Its answer is being made.
    Responding(JobId),
    /// Between two of the others.
    Moving,
}

impl ResponderIntermediate {
    /// Begins with a job for our public value; `method` and `public` are those of the initiator's KE payload.
    pub(crate) fn begin(
        ctx: &mut Context,
        now: Instant,
        core: Core,
        request: Request,
        method: Ke,
        public: Vec<u8>,
    ) -> Self {
        let Request { suite, spis, fragmentation, answer, material, candidates } = request;
        let job = ctx.key_work(core.id, KeyWork::Answer { method, peer: public });
        Self {
            suite,
            spis,
            fragmentation,
            material,
            candidates,
            init_remote: core.path.remote,
            channel: None,
            remaining: suite.additional.iter().map(|(_, method)| method).collect(),
            deadline: after(now, ctx.config.half_open_timeout),
            phase: Phase::Answering { job, answer },
            core,
        }
    }

    pub(crate) fn local_spi(&self) -> u64 {
        self.spis.responder
    }

    /// Where its IKE_SA_INIT came from.
    pub(crate) fn init_remote(&self) -> SocketAddr {
        self.init_remote
    }

    /// The IKE_SA_INIT request and our answer, for repetitions; `None` while there is no answer.
    pub(crate) fn init_exchange(&self) -> Option<(&[u8], &[u8])> {
        let answered = !self.material.ours.is_empty();
        answered.then_some((self.material.theirs.as_slice(), self.material.ours.as_slice()))
    }

    #[cfg(test)]
    pub(crate) fn channel_mut(&mut self) -> Option<&mut Channel> {
        self.channel.as_mut()
    }

    pub(crate) fn next_timeout(&self) -> Instant {
        self.deadline
    }

    pub(crate) fn status(&self) -> IkeSaStatus {
        IkeSaStatus {
            id: self.core.id,
            connection: self.core.name.to_string(),
            state: IkeState::Connecting,
            path: self.core.path,
            local_id: None,
            remote_id: None,
            peer: None,
            initiator: false,
            initiator_spi: self.spis.initiator,
            responder_spi: self.spis.responder,
            nat_local: self.core.nat.local,
            nat_remote: self.core.nat.remote,
            nat_fake: self.core.nat.fake,
            suite: Some(self.suite),
            established: None,
            rekey_in: None,
            reauth_in: None,
            assigned: None,
            resumed: false,
            tasks_active: vec!["IKE_INIT", "IKE_CERT_PRE", "IKE_AUTH", "IKE_CERT_POST", "CHILD_CREATE"],
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
        match (std::mem::replace(&mut self.phase, Phase::Moving), outcome) {
            (Phase::Answering { job: waiting, answer }, JobOutcome::KeyExchange(result)) if waiting == job => {
                self.answer(ctx, answer, result)
            }
            (Phase::Agreeing { job: waiting, early }, JobOutcome::KeyExchange(result)) if waiting == job => {
                match self.first_keys(ctx, result) {
                    Ok(()) => self.replay(ctx, now, early),
                    Err(reason) => self.fail(ctx, &reason),
                }
            }
            (Phase::Responding(waiting), JobOutcome::KeyExchange(result)) if waiting == job => {
                self.respond(ctx, now, result)
            }
            (phase, _) => {
                self.phase = phase;
                Some(IkeSa::ResponderIntermediate(self))
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
        let header = protected.header;
        let exchange = header.exchange;
        let known = matches!(exchange, ExchangeType::IKE_INTERMEDIATE | ExchangeType::IKE_AUTH);
        if header.response || !known || !header.from_initiator || header.initiator_spi != self.spis.initiator {
            return Some(IkeSa::ResponderIntermediate(self));
        }
        let received = match &mut self.channel {
            Some(channel) => channel.receive(protected, datagram),
            None => {
                self.wait_for_keys(ctx, path, protected, datagram);
                return Some(IkeSa::ResponderIntermediate(self));
            }
        };
        match received {
            Received::Request(opened) => {
                // RFC 7296 §2.23: the initiator may have moved to the other port.
                self.core.path = path;
                self.request(ctx, now, &opened)
            }
            Received::Repeated(datagrams) => {
                self.core.send_along(ctx, path, datagrams);
                Some(IkeSa::ResponderIntermediate(self))
            }
            Received::Forged => {
                ctx.judge(&path, Judgement::Forged);
                Some(IkeSa::ResponderIntermediate(self))
            }
            Received::Awaited | Received::Response(_) | Received::Beyond(_) | Received::Ignored => {
                Some(IkeSa::ResponderIntermediate(self))
            }
        }
    }

    pub(crate) fn handle_timeout(self: Box<Self>, ctx: &mut Context, now: Instant) -> Option<IkeSa> {
        if now < self.deadline {
            return Some(IkeSa::ResponderIntermediate(self));
        }
        ctx.log("JOB", 1, self.core.tag(), "deleting half open IKE_SA after timeout".to_owned());
        self.abandon(ctx, CloseReason::Timeout);
        None
    }

    /// Ends before anything came up.
    pub(crate) fn abandon(self, ctx: &mut Context, close: CloseReason) {
        let status = self.status();
        ctx.event(Event::IkeDown(Box::new(status), close));
    }

    fn fail(self: Box<Self>, ctx: &mut Context, reason: &str) -> Option<IkeSa> {
        ctx.log("IKE", 1, self.core.tag(), reason.to_owned());
        self.abandon(ctx, CloseReason::Failed);
        None
    }

    /// Our public value is there: answers IKE_SA_INIT.
    fn answer(
        mut self: Box<Self>,
        ctx: &mut Context,
        mut answer: Message,
        result: Result<KeyDone, KeyError>,
    ) -> Option<IkeSa> {
        let (public, pending) = match result {
            Ok(KeyDone::Answered(public, pending)) => (public, pending),
            Ok(_) => return self.fail(ctx, "the key exchange failed"),
            Err(error) => {
                let fault = Fault::from(error);
                let header = wire::Header { responder_spi: 0, ..answer.header };
                let refusal = Message { header, payloads: vec![fault.payload()] };
                self.core.send(ctx, [wire::encode(&refusal)]);
                return self.fail(ctx, &format!("IKE_SA_INIT refused: {fault}"));
            }
        };
        // The customary place, behind the SA payload.
        answer.payloads.insert(1.min(answer.payloads.len()), Payload::Ke { group: self.suite.ke, data: public });
        self.material.ours = wire::encode(&answer);
        ctx.shared.counters.unnamed().message(ExchangeType::IKE_SA_INIT, false, true);
        self.core.send(ctx, [self.material.ours.clone()]);
        self.phase = Phase::Answered(pending);
        Some(IkeSa::ResponderIntermediate(self))
    }

    /// The first protected message starts the computation of the keys; that one and others wait for it.
    fn wait_for_keys(&mut self, ctx: &mut Context, path: Path, protected: Protected, datagram: &[u8]) {
        // §2.2: the first request after IKE_SA_INIT.
        if protected.header.message_id != 1 {
            return;
        }
        let message = (path, protected, datagram.to_vec());
        self.phase = match std::mem::replace(&mut self.phase, Phase::Moving) {
            Phase::Answered(pending) => {
                let job = ctx.key_work(self.core.id, KeyWork::Finish(pending));
                Phase::Agreeing { job, early: vec![message] }
            }
            Phase::Agreeing { job, mut early } => {
                let octets =
                    early.iter().map(|(_, _, datagram)| datagram.len()).fold(datagram.len(), usize::saturating_add);
                if early.len() < MAX_EARLY && octets <= MAX_EARLY_OCTETS {
                    early.push(message);
                }
                Phase::Agreeing { job, early }
            }
            other => other,
        };
    }

    fn first_keys(&mut self, ctx: &mut Context, result: Result<KeyDone, KeyError>) -> Result<(), String> {
        let Ok(KeyDone::Agreed(secret)) = result else {
            return Err(result.err().map_or("the key exchange failed".to_owned(), |error| error.to_string()));
        };
        let keys = crypto::ike_keys(&self.suite, &secret, self.seed()).map_err(|error| error.to_string())?;
        let channel = Channel::new(self.suite, keys, self.spis, false, false);
        let channel = channel.map_err(|error| error.to_string())?;
        let mut channel = channel.counted(Some(ctx.shared.counters.unnamed()));
        channel.fragmentation = self.fragmentation;
        self.channel = Some(channel);
        Ok(())
    }

    fn seed(&self) -> KeySeed<'_> {
        let (ni, nr) = (self.material.ni.as_slice(), self.material.nr.as_slice());
        KeySeed { ni, nr, spi_i: self.spis.initiator, spi_r: self.spis.responder }
    }

    /// There are keys now: reads what waited for them.
    fn replay(
        self: Box<Self>,
        ctx: &mut Context,
        now: Instant,
        early: Vec<(Path, Protected, Vec<u8>)>,
    ) -> Option<IkeSa> {
        let mut sa = self.go_on(ctx)?;
        for (path, protected, datagram) in early {
            sa = sa.handle_protected(ctx, now, path, protected, &datagram)?;
        }
        Some(sa)
    }

    /// Waits for the next key exchange, or for IKE_AUTH.
    fn go_on(mut self: Box<Self>, ctx: &Context) -> Option<IkeSa> {
        if !self.remaining.is_empty() {
            self.phase = Phase::Waiting;
            return Some(IkeSa::ResponderIntermediate(self));
        }
        let Self { core, material, candidates, init_remote, channel, deadline, .. } = *self;
        let _ = ctx;
        Some(IkeSa::ResponderAuth(Box::new(ResponderAuth::new(
            core,
            channel?,
            candidates,
            material,
            init_remote,
            deadline,
        ))))
    }

    /// An IKE_INTERMEDIATE request, or something else in its place.
    fn request(mut self: Box<Self>, ctx: &mut Context, now: Instant, opened: &Opened) -> Option<IkeSa> {
        let wrong = |what: &str| Fault::InvalidSyntax(what.to_owned());
        if opened.header.exchange != ExchangeType::IKE_INTERMEDIATE {
            // RFC 9370 §2.2.2: all of them before IKE_AUTH.
            return self.refuse(ctx, now, &wrong("IKE_AUTH before all additional key exchanges"));
        }
        let parts = match Parts::of(opened) {
            Ok(parts) => parts,
            Err(fault) => return self.refuse(ctx, now, &fault),
        };
        let method = self.remaining.front().copied();
        let Some((method, public)) = parts.ke.filter(|(group, _)| Some(*group) == method) else {
            return self.refuse(ctx, now, &wrong("IKE_INTERMEDIATE without the key exchange that is due"));
        };
        let octets = opened.plain_octets().unwrap_or_default();
        let Some(channel) = &self.channel else { return self.fail(ctx, "there are no keys") };
        if let Err(error) = self.material.intermediate.request(channel, &octets) {
            return self.fail(ctx, &error.to_string());
        }
        self.phase = Phase::Responding(ctx.key_work(self.core.id, KeyWork::Respond { method, peer: public }));
        Some(IkeSa::ResponderIntermediate(self))
    }

    /// Our side of an additional key exchange is done: answers, and goes over to the new keys.
    fn respond(
        mut self: Box<Self>,
        ctx: &mut Context,
        now: Instant,
        result: Result<KeyDone, KeyError>,
    ) -> Option<IkeSa> {
        let (public, secret) = match result {
            Ok(KeyDone::Responded(public, secret)) => (public, secret),
            Ok(_) => return self.fail(ctx, "the key exchange failed"),
            Err(error) => return self.refuse(ctx, now, &Fault::from(error)),
        };
        let Some(group) = self.remaining.pop_front() else { return self.fail(ctx, "no key exchange is due") };
        let payloads = [Payload::Ke { group, data: public }];
        let fragmentation =
            self.candidates.first().map_or(crate::config::Fragmentation::No, |first| first.fragmentation);
        let max_length = ctx.max_length(&self.core.path, self.fragmentation, fragmentation);
        match self.close_exchange(ctx, &payloads, max_length, &secret) {
            Some(answer) => {
                self.core.send(ctx, answer);
                self.go_on(ctx)
            }
            None => self.fail(ctx, "the IKE_INTERMEDIATE response cannot be made"),
        }
    }

    fn close_exchange(
        &mut self,
        ctx: &mut Context,
        payloads: &[Payload],
        max_length: Option<usize>,
        secret: &Secret,
    ) -> Option<Vec<Vec<u8>>> {
        let seed = KeySeed {
            ni: &self.material.ni,
            nr: &self.material.nr,
            spi_i: self.spis.initiator,
            spi_r: self.spis.responder,
        };
        let channel = self.channel.as_mut()?;
        let keys = crypto::intermediate_ike_keys(&self.suite, &channel.d, secret, seed).ok()?;
        let octets = channel.response_octets(payloads)?;
        self.material.intermediate.response(channel, &octets).ok()?;
        let answer = channel.respond(payloads, max_length, ctx.rng.as_mut())?;
        channel.renew(keys).ok()?;
        Some(answer)
    }

    /// Says no, protected, and ends. A repetition of the request gets the same answer.
    fn refuse(mut self: Box<Self>, ctx: &mut Context, now: Instant, fault: &Fault) -> Option<IkeSa> {
        if let Some(channel) = &mut self.channel {
            let answer = channel.respond(&[fault.payload()], None, ctx.rng.as_mut());
            self.core.send(ctx, answer.unwrap_or_default());
            ctx.bury(now, channel.local_spi(), self.core.dscp, channel.last_words());
        }
        self.fail(ctx, &fault.to_string())
    }
}
