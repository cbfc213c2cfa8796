//! The key exchanges of CREATE_CHILD_SA in both roles: each step a job, and the additional ones of RFC 9370 §2.2.4
//! with IKE_FOLLOWUP_KE, tied together by links that the responder chooses.
//!
//! What is asked for is made when the last key exchange is done, and not before. A responder keeps one half-made SA
//! for an IKE SA, and only for a while: what the peer begins next takes its place.

use std::collections::VecDeque;
use std::time::Instant;

use ipsec::secret::Secret;
use ipsec::transform::Ke;

use super::Established;
use super::child::ChildPlan;
use super::established::{Active, Closed, Task, done, failed};
use super::exchanges::Exchange;
use super::fault::{Fault, notify};
use super::parts::Parts;
use super::rekey::IkePlan;
use super::retry::after;
use crate::crypto::{AdditionalKe, KeyDone, KeyError, KeyExchange, KeyWork};
use crate::engine::context::Context;
use crate::engine::{ChildSaId, ChildState, CloseReason, IkeState, JobId};
use crate::wire::{ExchangeType, NotifyType, Payload};

/// Octets of the links that we make.
const LINK_LENGTH: usize = 16;

/// The key exchanges of a CREATE_CHILD_SA of ours.
pub(crate) struct Keying {
    step: Step,
    /// The answer to CREATE_CHILD_SA, once it is there.
    answer: Option<Box<Parts>>,
    /// Of the exchanges that are done.
    secrets: Vec<Secret>,
    /// Additional key exchanges that are still to be begun.
    remaining: VecDeque<Ke>,
    /// What the peer wants to have back with the next one.
    link: Vec<u8>,
}

enum Step {
    /// Our key pair is being made.
    Generating(JobId),
    /// Our request is out.
    Asking(KeyExchange),
    /// The shared secret is being computed.
    Agreeing(JobId),
}

/// What the peer asks for with CREATE_CHILD_SA.
pub(crate) enum PeerWish {
    Child {
        plan: Box<ChildPlan>,
        replaces: Option<ChildSaId>,
        /// It lost against our rekey of the same Child SA: the peer will delete it.
        redundant: bool,
    },
    Ike(IkePlan),
}

/// What the peer asked for, and what is missing.
pub(crate) struct HalfMade {
    wish: PeerWish,
    secrets: Vec<Secret>,
    /// Additional key exchanges that the peer still has to begin.
    remaining: VecDeque<Ke>,
    step: PeerStep,
}

enum PeerStep {
    /// Our side of a key exchange is being computed, for the request that is being answered.
    Responding { job: JobId, method: Ke },
    /// The next IKE_FOLLOWUP_KE is due, with this link.
    Waiting { link: Vec<u8>, until: Instant },
}

impl HalfMade {
    /// When it is given up.
    pub(super) fn until(&self) -> Option<Instant> {
        match &self.step {
            PeerStep::Waiting { until, .. } => Some(*until),
            PeerStep::Responding { .. } => None,
        }
    }

    /// The Child SA that it is to replace.
    pub(super) fn replaces(&self) -> Option<ChildSaId> {
        match &self.wish {
            PeerWish::Child { replaces, .. } => *replaces,
            PeerWish::Ike(_) => None,
        }
    }

    /// It is one of two successors of a Child SA, and the other one stays (RFC 7296 §2.8.1).
    pub(super) fn lost_against(&mut self, theirs: ChildSaId) {
        if let PeerWish::Child { plan, redundant, .. } = &mut self.wish
            && plan.id() == theirs
        {
            *redundant = true;
        }
    }
}

impl Established {
    // Ours.

    /// Starts the first key exchange of `active`; its request follows.
    pub(super) fn begin_key_exchange(&mut self, ctx: &mut Context, active: Active, method: Ke) {
        let step = Step::Generating(ctx.key_work(self.core.id, KeyWork::Generate(method)));
        let (secrets, remaining, link) = (Vec::new(), VecDeque::new(), Vec::new());
        self.go_on(active, Some(Keying { step, answer: None, secrets, remaining, link }));
    }

    /// True while the shared secret of the last answer to our rekey of the IKE SA is computed: the peer is done.
    pub(super) fn is_making_last_key(&self) -> bool {
        let last = |keying: &Keying| matches!(keying.step, Step::Agreeing(_)) && keying.remaining.is_empty();
        self.exchanges.iter().any(|exchange| {
            matches!(exchange.active, Active::RekeyIke(_)) && exchange.keying.as_deref().is_some_and(last)
        })
    }

    /// A job is done; nothing happens where nobody waits for it any more.
    pub(super) fn key_work_done(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        job: JobId,
        result: Result<KeyDone, KeyError>,
    ) -> Result<(), Closed> {
        let waits = |keying: &Keying| match keying.step {
            Step::Generating(waiting) | Step::Agreeing(waiting) => waiting == job,
            Step::Asking(_) => false,
        };
        let ours = self.take_exchange(|exchange| exchange.keying.as_deref().is_some_and(waits));
        if let Some(Exchange { active, keying: Some(keying), .. }) = ours {
            let keying = *keying;
            return match (&keying.step, result) {
                (Step::Generating(_), Ok(KeyDone::Generated(ke))) => self.ask(ctx, now, active, keying, ke),
                (Step::Agreeing(_), Ok(KeyDone::Agreed(secret))) => self.agreed(ctx, now, active, keying, secret),
                (_, result) => {
                    let reason = result.err().map_or("the key exchange failed".to_owned(), |error| error.to_string());
                    // After the last one the peer has what we lack.
                    let exists_there = matches!(keying.step, Step::Agreeing(_)) && keying.remaining.is_empty();
                    self.key_exchange_failed(ctx, now, active, &reason, exists_there)
                }
            };
        }
        let theirs = self
            .half_made
            .take_if(|half| matches!(half.step, PeerStep::Responding { job: waiting, .. } if waiting == job));
        match theirs {
            Some(half) => self.responded(ctx, now, half, result),
            None => Ok(()),
        }
    }

    /// Our key pair is there: asks the peer for its part.
    fn ask(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        active: Active,
        keying: Keying,
        ke: KeyExchange,
    ) -> Result<(), Closed> {
        let (exchange, payloads) = if keying.answer.is_some() {
            let group = ke.method();
            let link = notify(NotifyType::ADDITIONAL_KEY_EXCHANGE, keying.link.clone());
            (ExchangeType::IKE_FOLLOWUP_KE, vec![Payload::Ke { group, data: ke.public().to_vec() }, link])
        } else {
            let Some(active) = self.unless_peer_was_quicker(ctx, now, active) else { return Ok(()) };
            let payloads = match &active {
                Active::Create { offer, .. } => offer.payloads(Some(&ke)),
                Active::RekeyIke(offer) => offer.payloads(&ke),
                _ => Vec::new(),
            };
            let keying = Keying { step: Step::Asking(ke), ..keying };
            return self.go_on_with(ctx, now, (active, Some(keying)), ExchangeType::CREATE_CHILD_SA, payloads);
        };
        let keying = Keying { step: Step::Asking(ke), ..keying };
        self.go_on_with(ctx, now, (active, Some(keying)), exchange, payloads)
    }

    /// While our key pair was made the peer may have done what we were about to ask for.
    fn unless_peer_was_quicker(&mut self, ctx: &mut Context, now: Instant, active: Active) -> Option<Active> {
        match active {
            Active::RekeyIke(_) if self.peers_successor.is_some() => {
                self.go_on(active, None);
                self.adopt_peers_successor(ctx, now);
                None
            }
            Active::Create { offer, token, tries } => {
                let moot = offer.replaces.is_some_and(|replaced| {
                    let rekeying = self.children.get(replaced.id).map(|child| child.state);
                    rekeying != Some(ChildState::Rekeying)
                        || self.collision.as_ref().is_some_and(|collision| collision.old == replaced.id)
                });
                if moot {
                    ctx.release_child_spi(offer.spi);
                    self.rekey_over(offer.replaces);
                    done(ctx, token);
                    return None;
                }
                Some(Active::Create { offer, token, tries })
            }
            other => Some(other),
        }
    }

    /// The answer to CREATE_CHILD_SA or IKE_FOLLOWUP_KE came.
    pub(super) fn key_exchange_answered(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        active: Active,
        keying: Keying,
        mut parts: Parts,
    ) -> Result<(), Closed> {
        let Keying { step, answer, secrets, mut remaining, link: _ } = keying;
        // Only one that asks has a request out.
        let Step::Asking(ours) = step else { return Ok(()) };
        if parts.error().is_some() {
            return self.keyed(ctx, now, active, &parts, &[]);
        }
        if answer.is_none() {
            match chosen(&active, &parts) {
                Some((method, additional)) if method == ours.method() => {
                    remaining = additional.iter().map(|(_, method)| method).collect();
                }
                // No key exchange, or nothing that we offered: whoever takes the answer sees that.
                _ => return self.keyed(ctx, now, active, &parts, &[]),
            }
        }
        let link = parts.notify(NotifyType::ADDITIONAL_KEY_EXCHANGE).map(|link| link.data.clone());
        if link.is_none() && !remaining.is_empty() {
            return self.key_exchange_failed(ctx, now, active, "the answer lacks ADDITIONAL_KEY_EXCHANGE", false);
        }
        let public = match &answer {
            None => parts.ke.clone(),
            Some(_) => parts.ke.take(),
        };
        let Some((_, peer)) = public.filter(|(group, _)| *group == ours.method()) else {
            let reason = "the answer lacks the key exchange that was asked for";
            return self.key_exchange_failed(ctx, now, active, reason, remaining.is_empty());
        };
        let job = ctx.key_work(self.core.id, KeyWork::Agree { ours, peer });
        let answer = Some(answer.unwrap_or_else(|| Box::new(parts)));
        let link = link.unwrap_or_default();
        self.go_on(active, Some(Keying { step: Step::Agreeing(job), answer, secrets, remaining, link }));
        Ok(())
    }

    fn agreed(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        active: Active,
        mut keying: Keying,
        secret: Secret,
    ) -> Result<(), Closed> {
        keying.secrets.push(secret);
        if let Some(method) = keying.remaining.pop_front() {
            let job = ctx.key_work(self.core.id, KeyWork::Generate(method));
            self.go_on(active, Some(Keying { step: Step::Generating(job), ..keying }));
            return Ok(());
        }
        match keying.answer {
            Some(parts) => self.keyed(ctx, now, active, &parts, &keying.secrets),
            None => self.key_exchange_failed(ctx, now, active, "the key exchange failed", false),
        }
    }

    /// All key exchanges are done, or an error came in place of one.
    fn keyed(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        active: Active,
        parts: &Parts,
        secrets: &[Secret],
    ) -> Result<(), Closed> {
        match active {
            Active::Create { offer, token, tries } => self.created(ctx, now, *offer, token, tries, parts, secrets),
            Active::RekeyIke(offer) => self.ike_rekeyed(ctx, now, *offer, parts, secrets),
            other => {
                self.go_on(other, None);
                Ok(())
            }
        }
    }

    fn key_exchange_failed(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        active: Active,
        reason: &str,
        exists_there: bool,
    ) -> Result<(), Closed> {
        match active {
            Active::Create { offer, token, .. } => {
                if exists_there {
                    self.queue.push_front(Task::DeleteSpi(offer.spi));
                } else {
                    ctx.release_child_spi(offer.spi);
                }
                self.rekey_over(offer.replaces);
                self.child_failed(ctx, token, &offer.config.name, reason);
                Ok(())
            }
            Active::RekeyIke(offer) => {
                self.state = IkeState::Established;
                ctx.log("IKE", 1, self.core.tag(), reason.to_owned());
                ctx.release_ike_spi(offer.spi);
                failed(ctx, offer.token, &self.core.name, None, reason);
                if exists_there {
                    // The peer has moved to a successor that we do not have.
                    return Err(self.farewell(ctx, now, CloseReason::Failed));
                }
                self.adopt_peers_successor(ctx, now);
                Ok(())
            }
            other => {
                self.go_on(other, None);
                Ok(())
            }
        }
    }

    // The peer's.

    /// Begins to answer a CREATE_CHILD_SA request that has a key exchange.
    pub(super) fn answer_key_exchange(&mut self, ctx: &mut Context, wish: PeerWish) {
        let (ke, additional) = match &wish {
            PeerWish::Child { plan, .. } => (plan.ke.clone().unwrap_or_default(), plan.additional()),
            PeerWish::Ike(plan) => (plan.ke.clone(), plan.additional()),
        };
        let (method, peer) = ke;
        let job = ctx.key_work(self.core.id, KeyWork::Respond { method, peer });
        let remaining = additional.iter().map(|(_, method)| method).collect();
        let step = PeerStep::Responding { job, method };
        self.half_made = Some(Box::new(HalfMade { wish, secrets: Vec::new(), remaining, step }));
    }

    /// Says no to a CREATE_CHILD_SA or IKE_FOLLOWUP_KE request.
    pub(super) fn refuse_key_exchange(&mut self, ctx: &mut Context, now: Instant, fault: &Fault) -> Result<(), Closed> {
        ctx.log("IKE", 1, self.core.tag(), format!("CREATE_CHILD_SA request refused: {fault}"));
        self.respond(ctx, now, &[fault.payload()]);
        if matches!(fault, Fault::InvalidSyntax(_)) {
            // §2.21.3: the two sides no longer agree on what is there.
            return Err(self.close(ctx, now, CloseReason::Failed));
        }
        Ok(())
    }

    /// IKE_FOLLOWUP_KE: the next key exchange of what is half made, or of nothing that we know.
    pub(super) fn followup_request(&mut self, ctx: &mut Context, now: Instant, parts: Parts) -> Result<(), Closed> {
        if !matches!(self.state, IkeState::Established | IkeState::Rekeying) {
            self.drop_half_made(ctx, now, false);
        }
        let link = parts.notify(NotifyType::ADDITIONAL_KEY_EXCHANGE).map(|link| link.data.as_slice());
        let half = self.half_made.take_if(
            |half| matches!(&half.step, PeerStep::Waiting { link: known, .. } if Some(known.as_slice()) == link),
        );
        let Some(mut half) = half else { return self.refuse_key_exchange(ctx, now, &Fault::StateNotFound) };
        let due = half.remaining.pop_front();
        let Some((method, peer)) = parts.ke.filter(|(group, _)| Some(*group) == due) else {
            self.release(ctx, &half.wish);
            let fault = Fault::InvalidSyntax("IKE_FOLLOWUP_KE without the key exchange that is due".to_owned());
            return self.refuse_key_exchange(ctx, now, &fault);
        };
        let job = ctx.key_work(self.core.id, KeyWork::Respond { method, peer });
        half.step = PeerStep::Responding { job, method };
        self.half_made = Some(half);
        Ok(())
    }

    /// Our side of one of the peer's key exchanges is computed.
    fn responded(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        mut half: Box<HalfMade>,
        result: Result<KeyDone, KeyError>,
    ) -> Result<(), Closed> {
        let (public, secret, method) = match (result, &half.step) {
            (Ok(KeyDone::Responded(public, secret)), PeerStep::Responding { method, .. }) => (public, secret, *method),
            (result, _) => {
                self.release(ctx, &half.wish);
                let fault = result.err().map_or(Fault::TemporaryFailure, Fault::from);
                return self.refuse_key_exchange(ctx, now, &fault);
            }
        };
        let first = half.secrets.is_empty();
        half.secrets.push(secret);
        let mut payloads = match &mut half.wish {
            PeerWish::Child { plan, .. } if first => std::mem::take(&mut plan.payloads),
            PeerWish::Ike(plan) if first => std::mem::take(&mut plan.payloads),
            _ => Vec::new(),
        };
        payloads.push(Payload::Ke { group: method, data: public });
        if !half.remaining.is_empty() {
            let link = ctx.random(LINK_LENGTH);
            payloads.push(notify(NotifyType::ADDITIONAL_KEY_EXCHANGE, link.clone()));
            let until = after(now, ctx.config.half_open_timeout);
            half.step = PeerStep::Waiting { link, until };
            self.respond(ctx, now, &payloads);
            self.half_made = Some(half);
            return Ok(());
        }
        let HalfMade { wish, secrets, .. } = *half;
        match wish {
            PeerWish::Child { plan, replaces, redundant } => {
                let spi = plan.spi_in();
                match plan.finish(&self.parent(now), &secrets, payloads) {
                    Ok(answer) => {
                        self.install_answer(ctx, now, answer, replaces, Vec::new());
                        if let Some(passive) = &mut self.passive {
                            passive.redundant = redundant;
                        }
                        Ok(())
                    }
                    Err(fault) => {
                        ctx.release_child_spi(spi);
                        self.refuse_key_exchange(ctx, now, &fault)
                    }
                }
            }
            PeerWish::Ike(plan) => {
                let spi = plan.spi();
                let open = matches!(self.state, IkeState::Established | IkeState::Rekeying);
                let successor = if open { plan.finish(&self.channel, &secrets) } else { Err(Fault::TemporaryFailure) };
                match successor {
                    Ok(successor) => {
                        self.respond(ctx, now, &payloads);
                        self.peer_rekeyed(ctx, now, successor);
                        Ok(())
                    }
                    Err(fault) => {
                        ctx.release_ike_spi(spi);
                        self.refuse_key_exchange(ctx, now, &fault)
                    }
                }
            }
        }
    }

    /// Forgets what is half made; `tell` answers a request that waits for it.
    pub(super) fn drop_half_made(&mut self, ctx: &mut Context, now: Instant, tell: bool) {
        let Some(half) = self.half_made.take() else { return };
        self.release(ctx, &half.wish);
        if tell && matches!(half.step, PeerStep::Responding { .. }) {
            self.respond(ctx, now, &[Fault::TemporaryFailure.payload()]);
        }
    }

    /// While the peer rekeys the IKE SA nothing new is begun on it but its end (RFC 7296 §2.25.2).
    pub(super) fn yields_to_rekey(&self) -> bool {
        let rekeys = self.half_made.as_ref().is_some_and(|half| matches!(half.wish, PeerWish::Ike(_)));
        rekeys && !matches!(self.queue.front(), Some(Task::DeleteIke { .. }))
    }

    fn release(&mut self, ctx: &mut Context, wish: &PeerWish) {
        match wish {
            PeerWish::Child { plan, .. } => {
                ctx.release_child_spi(plan.spi_in());
                self.collision.take_if(|collision| collision.theirs == plan.id());
            }
            PeerWish::Ike(plan) => ctx.release_ike_spi(plan.spi()),
        }
    }
}

/// The key exchanges that the answer to our CREATE_CHILD_SA chose.
fn chosen(active: &Active, parts: &Parts) -> Option<(Ke, AdditionalKe)> {
    match active {
        Active::Create { offer, .. } => offer.chosen(parts),
        Active::RekeyIke(offer) => offer.chosen(parts),
        _ => None,
    }
}
