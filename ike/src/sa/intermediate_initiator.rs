//! Between IKE_SA_INIT and IKE_AUTH as initiator: the keys, and the additional key exchanges of RFC 9370, each in
//! an IKE_INTERMEDIATE exchange (RFC 9242) under the keys of the one before.
//!
//! What the peer says here is protected, but by whom only IKE_AUTH will show.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use ipsec::plane::StreamId;
use ipsec::secret::Secret;
use ipsec::transform::Ke;

use super::auth::InitMaterial;
use super::channel::{Channel, Received, Spis};
use super::fault::notify_name;
use super::init::begin_over_tcp;
use super::parts::Parts;
use super::ppk;
use super::retry::{Retry, after};
use super::{Core, IkeSa, InitiatorAuth, Want, fail_wants, local_identity};
use crate::config::Connection;
use crate::crypto::{self, IkeSuite, KeyDone, KeyExchange, KeySeed, KeyWork};
use crate::engine::context::Context;
use crate::engine::{CloseReason, Event, IkeSaStatus, IkeState, JobId, JobOutcome, Judgement, Transport};
use crate::wire::{ExchangeType, Opened, Payload, Protected};

/// What IKE_SA_INIT agreed on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Agreed {
    pub(crate) suite: IkeSuite,
    pub(crate) spis: Spis,
    pub(crate) fragmentation: bool,
    /// The peer can do without a first Child SA (RFC 6023).
    pub(crate) childless: bool,
}

/// An IKE SA that we initiated, and that has an answer to IKE_SA_INIT.
pub(crate) struct InitiatorIntermediate {
    pub(crate) core: Core,
    agreed: Agreed,
    connection: Arc<Connection>,
    wants: Vec<Want>,
    material: InitMaterial,
    /// `None` until the first shared secret is there.
    pub(super) channel: Option<Channel>,
    /// Additional key exchanges that are still to be begun.
    remaining: VecDeque<Ke>,
    deadline: Instant,
    phase: Phase,
}

enum Phase {
    /// A shared secret is being computed.
    Agreeing(JobId),
    /// The key pair of the next exchange is being made.
    Generating(JobId),
    /// The request is out.
    Waiting(KeyExchange),
    /// Between two of the others.
    Moving,
}

impl InitiatorIntermediate {
    #[allow(clippy::too_many_arguments, reason = "the parts of a consumed Initiating")]
    pub(crate) fn begin(
        ctx: &mut Context,
        now: Instant,
        core: Core,
        agreed: Agreed,
        connection: Arc<Connection>,
        wants: Vec<Want>,
        material: InitMaterial,
        work: KeyWork,
    ) -> IkeSa {
        let job = ctx.key_work(core.id, work);
        let deadline = after(now, super::retry::total(&ctx.config.retransmission) + ctx.config.half_open_timeout);
        let remaining = agreed.suite.additional.iter().map(|(_, method)| method).collect();
        let phase = Phase::Agreeing(job);
        let channel = None;
        IkeSa::InitiatorIntermediate(Box::new(Self {
            core,
            agreed,
            connection,
            wants,
            material,
            channel,
            remaining,
            deadline,
            phase,
        }))
    }

    pub(crate) fn local_spi(&self) -> u64 {
        self.agreed.spis.initiator
    }

    pub(crate) fn serves(&self, connection: &Connection, remote: std::net::IpAddr) -> bool {
        self.connection.authenticates_as(connection)
            && (self.core.path.remote.ip() == remote || self.core.redirects.came_from(remote))
    }

    pub(crate) fn add_want(&mut self, want: Want) {
        self.wants.push(want);
    }

    pub(crate) fn next_timeout(&self) -> Instant {
        let retry = self.channel.as_ref().and_then(Channel::next_timeout);
        retry.map_or(self.deadline, |at| at.min(self.deadline))
    }

    pub(crate) fn status(&self) -> IkeSaStatus {
        IkeSaStatus {
            id: self.core.id,
            connection: self.core.name.to_string(),
            state: IkeState::Connecting,
            path: self.core.path,
            local_id: Some(local_identity(&self.connection, &self.core.path)),
            remote_id: self.connection.remote.remote_id.as_exact().cloned(),
            peer: None,
            initiator: true,
            initiator_spi: self.agreed.spis.initiator,
            responder_spi: self.agreed.spis.responder,
            nat_local: self.core.nat.local,
            nat_remote: self.core.nat.remote,
            nat_fake: self.core.nat.fake,
            suite: Some(self.agreed.suite),
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
            (Phase::Agreeing(waiting), JobOutcome::KeyExchange(result)) if waiting == job => match result {
                Ok(KeyDone::Agreed(secret)) => match self.take_secret(ctx, &secret) {
                    Ok(()) => self.go_on(ctx, now),
                    Err(reason) => self.fail(ctx, &reason),
                },
                Ok(_) => self.fail(ctx, "the key exchange failed"),
                Err(error) => self.fail(ctx, &error.to_string()),
            },
            (Phase::Generating(waiting), JobOutcome::KeyExchange(result)) if waiting == job => match result {
                Ok(KeyDone::Generated(ke)) => self.request(ctx, now, ke),
                Ok(_) => self.fail(ctx, "the key exchange failed"),
                Err(error) => self.fail(ctx, &error.to_string()),
            },
            (phase, _) => {
                self.phase = phase;
                Some(IkeSa::InitiatorIntermediate(self))
            }
        }
    }

    pub(crate) fn handle_protected(
        mut self: Box<Self>,
        ctx: &mut Context,
        protected: Protected,
        datagram: &[u8],
    ) -> Option<IkeSa> {
        let expected = protected.header.response && protected.header.exchange == ExchangeType::IKE_INTERMEDIATE;
        let received = match &mut self.channel {
            Some(channel) if expected => channel.receive(protected, datagram),
            _ => Received::Ignored,
        };
        match (received, std::mem::replace(&mut self.phase, Phase::Moving)) {
            (Received::Response(opened), Phase::Waiting(ke)) => self.response(ctx, ke, &opened),
            (received, phase) => {
                if matches!(received, Received::Forged) {
                    ctx.judge(&self.core.path, Judgement::Forged);
                }
                self.phase = phase;
                Some(IkeSa::InitiatorIntermediate(self))
            }
        }
    }

    pub(crate) fn handle_timeout(mut self: Box<Self>, ctx: &mut Context, now: Instant) -> Option<IkeSa> {
        if now >= self.deadline {
            self.abandon(ctx, "the key exchange took too long", CloseReason::Timeout);
            return None;
        }
        let policy = self.core.retransmission(ctx, &self.connection);
        let Some(channel) = &mut self.channel else { return Some(IkeSa::InitiatorIntermediate(self)) };
        if let Some(overdue) = channel.poll_retry(now, &policy, ctx.rng.as_mut()) {
            if overdue.resend.is_some() && self.core.is_blocked(overdue.count) {
                begin_over_tcp(ctx, &self.core, &self.connection, std::mem::take(&mut self.wants));
                self.abandon(ctx, "", CloseReason::Timeout);
                return None;
            }
            ctx.log("IKE", 1, self.core.tag(), overdue.to_string());
            let Some(datagrams) = overdue.resend else {
                self.abandon(ctx, "the peer does not answer", CloseReason::Timeout);
                return None;
            };
            self.core.send(ctx, datagrams);
        }
        Some(IkeSa::InitiatorIntermediate(self))
    }

    pub(crate) fn handle_stream_closed(
        self: Box<Self>,
        ctx: &mut Context,
        stream: StreamId,
        reason: &str,
    ) -> Option<IkeSa> {
        if self.core.path.transport == Transport::Stream(stream) {
            self.abandon(ctx, &format!("the TCP connection failed: {reason}"), CloseReason::Failed);
            return None;
        }
        Some(IkeSa::InitiatorIntermediate(self))
    }

    /// Ends before anything came up.
    pub(crate) fn abandon(self, ctx: &mut Context, reason: &str, close: CloseReason) {
        fail_wants(ctx, &self.core.name, &self.wants, reason);
        let status = self.status();
        ctx.event(Event::IkeDown(Box::new(status), close));
    }

    fn fail(self: Box<Self>, ctx: &mut Context, reason: &str) -> Option<IkeSa> {
        ctx.log("IKE", 1, self.core.tag(), reason.to_owned());
        self.abandon(ctx, reason, CloseReason::Failed);
        None
    }

    /// Makes the first keys of the secret, or the next ones.
    fn take_secret(&mut self, ctx: &mut Context, secret: &Secret) -> Result<(), String> {
        let Agreed { suite, spis, fragmentation, .. } = self.agreed;
        let (ni, nr) = (self.material.ni.as_slice(), self.material.nr.as_slice());
        let seed = KeySeed { ni, nr, spi_i: spis.initiator, spi_r: spis.responder };
        match &mut self.channel {
            Some(channel) => {
                let keys = crypto::intermediate_ike_keys(&suite, &channel.d, secret, seed);
                channel.renew(keys.map_err(|error| error.to_string())?).map_err(|error| error.to_string())
            }
            None => {
                let keys = crypto::ike_keys(&suite, secret, seed).map_err(|error| error.to_string())?;
                let channel = Channel::new(suite, keys, spis, true, false).map_err(|error| error.to_string())?;
                let mut channel = channel.counted(Some(ctx.shared.counters.of(&self.core.name)));
                channel.fragmentation = fragmentation;
                self.channel = Some(channel);
                Ok(())
            }
        }
    }

    /// The next key exchange, or IKE_AUTH.
    fn go_on(mut self: Box<Self>, ctx: &mut Context, now: Instant) -> Option<IkeSa> {
        if let Some(method) = self.remaining.pop_front() {
            self.phase = Phase::Generating(ctx.key_work(self.core.id, KeyWork::Generate(method)));
            return Some(IkeSa::InitiatorIntermediate(self));
        }
        if self.connection.ppk_required && ppk::of_connection(ctx, &self.connection).is_none() {
            // It was there for IKE_SA_INIT, and was unloaded since.
            return self.fail(ctx, "the PPK, which is required, is not there any more");
        }
        let Self { core, agreed, connection, wants, material, channel, .. } = *self;
        let channel = channel?;
        InitiatorAuth::begin(ctx, now, core, channel, connection, wants, material, agreed.childless)
    }

    fn request(mut self: Box<Self>, ctx: &mut Context, now: Instant, ke: KeyExchange) -> Option<IkeSa> {
        let payloads = [Payload::Ke { group: ke.method(), data: ke.public().to_vec() }];
        let exchange = ExchangeType::IKE_INTERMEDIATE;
        let over_stream = matches!(self.core.path.transport, Transport::Stream(_));
        let policy = self.core.retransmission(ctx, &self.connection);
        let retry = Retry::start(now, &policy, over_stream, ctx.rng.as_mut());
        let max_length = ctx.max_length(&self.core.path, self.agreed.fragmentation, self.connection.fragmentation);
        let Some(channel) = &mut self.channel else { return self.fail(ctx, "there are no keys") };
        let octets = channel.request_octets(exchange, &payloads).unwrap_or_default();
        let noted = self.material.intermediate.request(channel, &octets);
        let datagrams = channel.request(exchange, &payloads, max_length, retry, ctx.rng.as_mut());
        let (Ok(()), Some(datagrams)) = (noted, datagrams) else {
            return self.fail(ctx, "the IKE_INTERMEDIATE request cannot be made");
        };
        self.core.send(ctx, datagrams);
        self.phase = Phase::Waiting(ke);
        Some(IkeSa::InitiatorIntermediate(self))
    }

    fn response(mut self: Box<Self>, ctx: &mut Context, ke: KeyExchange, opened: &Opened) -> Option<IkeSa> {
        let parts = match Parts::of(opened) {
            Ok(parts) => parts,
            Err(fault) => return self.fail(ctx, &fault.to_string()),
        };
        self.core.falls_back = false;
        if let Some(error) = parts.error() {
            let line = format!("received {} notify error", notify_name(error.kind));
            return self.fail(ctx, &line);
        }
        // RFC 9593 §3.1: what did not fit into the answer to IKE_SA_INIT.
        if let Some(announced) = parts.auth_announcements() {
            self.material.announced = Some(announced);
        }
        let Some((_, public)) = parts.ke.filter(|(group, _)| *group == ke.method()) else {
            return self.fail(ctx, "the IKE_INTERMEDIATE response lacks the key exchange that was asked for");
        };
        let Some(channel) = &self.channel else { return self.fail(ctx, "there are no keys") };
        let octets = opened.plain_octets().unwrap_or_default();
        if let Err(error) = self.material.intermediate.response(channel, &octets) {
            return self.fail(ctx, &error.to_string());
        }
        let work = KeyWork::Agree { ours: ke, peer: public };
        self.phase = Phase::Agreeing(ctx.key_work(self.core.id, work));
        Some(IkeSa::InitiatorIntermediate(self))
    }
}
