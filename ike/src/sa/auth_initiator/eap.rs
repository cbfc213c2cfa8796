//! EAP as initiator (RFC 7296 §2.16): the gateway proves itself by a public key, then we by an EAP method, then both by its key.
//!
//! Nothing of an EAP method is answered before the gateway's certificate and signature are found good, and EAP-Success is none
//! but at the end of our method.

use std::sync::Arc;
use std::time::Instant;

use pad::{AuthClass, AuthMethod, EapPeer, EapPeerStep, Identity, PeerIdentity};

use ipsec::secret::Secret;

use super::{InitiatorAuth, Phase};
use crate::config::Connection;
use crate::engine::context::Context;
use crate::engine::{CloseReason, Job, JobId, JobOutcome};
use crate::sa::auth::{InitMaterial, identification};
use crate::sa::basis::Basis;
use crate::sa::channel::Channel;
use crate::sa::fault::notify_name;
use crate::sa::parts::Parts;
use crate::sa::retry::after;
use crate::sa::{Core, IkeSa, Want, fail_wants};
use crate::wire::{Identification, Payload};

/// Most EAP requests that we answer; the gateway may ask who we are, say texts, and try other methods (§2.16: ten at least).
const MAX_ROUNDS: u8 = 50;

/// A gateway that has proved who it is, while we have not.
pub(super) struct Gateway {
    peer: Arc<PeerIdentity>,
    /// Its Identification payload as received.
    id: Identification,
    basis: Arc<Basis>,
    /// The first answer.
    parts: Box<Parts>,
    rounds: u8,
}

/// How far we have come.
pub(super) enum State {
    /// The first request is out.
    Asked,
    /// The gateway's proof is being checked; its first EAP request waits.
    Verifying {
        job: JobId,
        asserted: Identity,
        basis: Box<Basis>,
        id: Identification,
        parts: Box<Parts>,
        packet: Vec<u8>,
    },
    /// Our answer is being made.
    Answering { job: JobId, gateway: Box<Gateway> },
    /// It is out.
    Answered { peer: Box<EapPeer>, gateway: Box<Gateway> },
    /// AUTH by the method's key is out.
    Proving { msk: Secret, gateway: Box<Gateway> },
}

impl InitiatorAuth {
    /// The first request, without AUTH.
    #[allow(clippy::too_many_arguments, reason = "the parts of a consumed Initiating")]
    pub(super) fn begin_eap(
        ctx: &mut Context,
        now: Instant,
        core: Core,
        channel: Channel,
        connection: Arc<Connection>,
        wants: Vec<Want>,
        material: InitMaterial,
        childless: bool,
        local_id: Identity,
    ) -> Option<IkeSa> {
        if connection.remote.class != AuthClass::PublicKey || connection.ppk_required {
            // §2.16: MUST. The configuration has no other, so this is a mistake of ours.
            fail_wants(ctx, &core.name, &wants, "EAP needs a gateway with a public key, and has no PPK");
            return None;
        }
        let deadline = after(now, crate::sa::retry::total(&ctx.config.retransmission) + ctx.config.half_open_timeout);
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
            resumed: None,
            phase: Phase::Waiting,
            reopening: None,
        });
        let mut payloads = vec![Payload::IdInitiator(identification(&sa.local_id))];
        payloads.extend(sa.expectations(ctx));
        match sa.ask(ctx, now, payloads) {
            IkeSa::InitiatorAuth(mut sa) => {
                sa.phase = Phase::Eap(State::Asked);
                Some(IkeSa::InitiatorAuth(sa))
            }
            other => Some(other),
        }
    }

    pub(super) fn handle_eap_job(
        mut self: Box<Self>,
        ctx: &mut Context,
        now: Instant,
        state: State,
        job: JobId,
        outcome: JobOutcome,
    ) -> Option<IkeSa> {
        match (state, outcome) {
            (
                State::Verifying { job: waiting, asserted, basis, id, parts, packet },
                JobOutcome::Authenticate(result),
            ) if waiting == job => {
                let (peer, basis) = match self.admit(ctx, now, &asserted, *basis, result) {
                    Ok(admitted) => admitted,
                    Err(reason) => return self.reject(ctx, now, &reason),
                };
                let AuthClass::Eap(method) = self.connection.local_auth.class else {
                    return self.reject(ctx, now, "the connection has no EAP");
                };
                let ours = self.connection.local_auth.eap_id.as_deref().unwrap_or(&self.local_id).clone();
                let mut challenge = [0; pad::eap::CHALLENGE_LENGTH];
                ctx.rng.fill(&mut challenge);
                let eap = Box::new(EapPeer::new(method, ours, peer.id.clone(), challenge));
                Some(self.answer_eap(ctx, eap, packet, Box::new(Gateway { peer, id, basis, parts, rounds: 0 })))
            }
            (State::Answering { job: waiting, gateway }, JobOutcome::EapPeer(step)) if waiting == job => match step {
                EapPeerStep::Answer(peer, packet) => {
                    self.send(ctx, now, &[Payload::Eap(packet)]);
                    self.phase = Phase::Eap(State::Answered { peer: Box::new(peer), gateway });
                    Some(IkeSa::InitiatorAuth(self))
                }
                EapPeerStep::Succeeded(msk) => {
                    ctx.log("IKE", 1, self.core.tag(), "EAP method succeeded, MSK established".to_owned());
                    let Ok(proof) = self.material.proof_by_key(&self.channel, &self.local_id, &msk) else {
                        return self.reject(ctx, now, "the PRF is not supported");
                    };
                    let line = format!("authentication of '{}' (myself) with EAP", self.local_id);
                    ctx.log("IKE", 1, self.core.tag(), line);
                    self.send(ctx, now, &[proof]);
                    self.phase = Phase::Eap(State::Proving { msk, gateway });
                    Some(IkeSa::InitiatorAuth(self))
                }
                EapPeerStep::Failed(reason) => {
                    let reason = format!("EAP failed: {reason}");
                    ctx.log("IKE", 1, self.core.tag(), reason.clone());
                    self.abandon(ctx, &reason, CloseReason::Failed);
                    None
                }
            },
            (state, _) => {
                self.phase = Phase::Eap(state);
                Some(IkeSa::InitiatorAuth(self))
            }
        }
    }

    pub(super) fn handle_eap_response(
        mut self: Box<Self>,
        ctx: &mut Context,
        now: Instant,
        state: State,
        mut parts: Parts,
    ) -> Option<IkeSa> {
        self.core.falls_back = false;
        match state {
            State::Asked => {
                let (Some(id), Some(auth)) = (parts.id_responder.clone(), parts.auth.clone()) else {
                    self.unproved(ctx, &parts);
                    return None;
                };
                if AuthMethod(auth.0).class() != Some(AuthClass::PublicKey) {
                    return self.reject(ctx, now, "EAP of a gateway that does not prove itself by a public key");
                }
                let Some(packet) = parts.eap.take() else {
                    return self.reject(ctx, now, "it does not ask for EAP");
                };
                let asserted = match Identity::from_wire(id.kind, &id.data) {
                    Ok(asserted) => asserted,
                    Err(error) => return self.reject(ctx, now, &error.to_string()),
                };
                let job = match self.verify(ctx, &id, &asserted, auth, &parts) {
                    Ok(job) => job,
                    Err(reason) => return self.reject(ctx, now, &reason),
                };
                let basis = Box::new(Basis::new(ctx, now, Vec::new(), false));
                let parts = Box::new(parts);
                self.phase = Phase::Eap(State::Verifying { job, asserted, basis, id, parts, packet });
                Some(IkeSa::InitiatorAuth(self))
            }
            State::Answered { peer, mut gateway } => {
                let Some(packet) = parts.eap else {
                    let line = match parts.error() {
                        Some(error) => format!("received {} notify error", notify_name(error.kind)),
                        None => "no EAP where it was its turn".to_owned(),
                    };
                    return self.reject(ctx, now, &line);
                };
                gateway.rounds = gateway.rounds.saturating_add(1);
                if gateway.rounds > MAX_ROUNDS {
                    return self.reject(ctx, now, "EAP without end");
                }
                Some(self.answer_eap(ctx, peer, packet, gateway))
            }
            State::Proving { msk, gateway } => {
                let Some(auth) = parts.auth.take() else {
                    self.unproved(ctx, &parts);
                    return None;
                };
                let Gateway { peer, id, basis, parts: first, .. } = *gateway;
                if !self.material.is_proved_by_key(&self.channel, &id, &auth, &msk) {
                    return self.reject(ctx, now, "it does not prove that it has the key of the EAP method");
                }
                let mut notifies = first.notifies;
                notifies.append(&mut parts.notifies);
                parts.notifies = notifies;
                self.authenticated(ctx, now, peer, basis, parts)
            }
            // Nothing of ours is out.
            State::Verifying { .. } | State::Answering { .. } => self.reject(ctx, now, "an answer to nothing"),
        }
    }

    fn answer_eap(
        mut self: Box<Self>,
        ctx: &mut Context,
        peer: Box<EapPeer>,
        packet: Vec<u8>,
        gateway: Box<Gateway>,
    ) -> IkeSa {
        let job = ctx.job(self.core.id, Job::EapPeer(peer, packet));
        self.phase = Phase::Eap(State::Answering { job, gateway });
        IkeSa::InitiatorAuth(self)
    }
}
