//! Child SAs of an established IKE SA: the first one of IKE_AUTH, and CREATE_CHILD_SA for new and rekeyed
//! ones, in both roles (RFC 7296 §1.2, §1.3.1, §1.3.3, §2.8, §2.25.1).

use std::sync::Arc;
use std::time::Instant;

use ipsec::secret::Secret;
use ipsec::transform::{Ke, Protocol};

use super::Established;
use super::child::{self, ChildOffer, ChildSa, Replaced};
use super::configuration::{self, Served};
use super::established::{Active, Closed, Collision, MAX_TRIES, Passive, Task, done};
use super::fault::{Fault, notify_name};
use super::first_request::NONCE_LENGTH;
use super::followup::PeerWish;
use super::parts::Parts;
use super::retry::{after, total};
use crate::config::Child;
use crate::counters::Counter;
use crate::engine::context::Context;
use crate::engine::{ChildSaId, ChildState, CloseReason, Event, IkeState, InstallError, Installed, Party};
use crate::pool::Shares;
use crate::wire::{ExchangeType, NotifyType, Payload};

/// Child SAs of one IKE SA; new ones beyond that get NO_ADDITIONAL_SAS.
const MAX_CHILDREN: usize = 1024;
/// The same with those that are replaced and not deleted yet: who may have a Child SA may rekey it.
const MAX_WITH_REPLACED: usize = 2 * MAX_CHILDREN;

impl Established {
    /// Initiator of IKE_AUTH: makes the Child SA of the authenticated answer.
    pub(super) fn finish_first_child(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        mut offer: ChildOffer,
        token: Option<u64>,
        parts: &Parts,
        nr: &[u8],
    ) -> Result<(), Closed> {
        let lacking = self.adopt_configuration(ctx, &mut offer, parts);
        if let Some(error) = parts.error() {
            if error.kind == NotifyType::SINGLE_PAIR_REQUIRED && ctx.triggers.restrict_to_pair(token) {
                ctx.release_child_spi(offer.spi);
                self.queue.push_front(Task::CreateChild { config: offer.config, token, group: None, tries: 0 });
                return self.pump(ctx, now);
            }
            let reason = format!("received {} notify error", notify_name(error.kind));
            ctx.release_child_spi(offer.spi);
            self.child_failed(ctx, token, &offer.config.name, &reason);
            // §2.21.2: these in IKE_AUTH mean that there is no IKE SA. With all others it stays (§1.2).
            if let NotifyType::INVALID_SYNTAX
            | NotifyType::UNSUPPORTED_CRITICAL_PAYLOAD
            | NotifyType::AUTHENTICATION_FAILED = error.kind
            {
                return Err(self.close(ctx, now, CloseReason::Failed));
            }
        } else if let Some(reason) = lacking {
            self.refuse_child(ctx, &offer, token, reason);
        } else {
            self.accept(ctx, now, offer, token, parts, nr, &[]);
        }
        self.pump(ctx, now)
    }

    /// Responder of IKE_AUTH: `head` is our proof, which goes out with or without a Child SA.
    pub(super) fn answer_first_child(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        mut head: Vec<Payload>,
        parts: &Parts,
        ni: &[u8],
        nr: &[u8],
    ) -> Result<(), Closed> {
        // The peer's IKE SAs that this one replaces have their addresses until the end of this step.
        let shares = if ctx.superseded.is_empty() && ctx.outlived.is_empty() { Shares::Wanted } else { Shares::Any };
        let Served { reply, fault } = self.serve_configuration(ctx, parts, shares);
        head.extend(reply);
        if parts.sa.is_none() {
            // RFC 6023: an IKE SA without a Child SA.
            head.extend(fault.map(|fault| fault.payload()));
            self.respond(ctx, now, &head);
            return self.pump(ctx, now);
        }
        if let Some(fault) = fault {
            // §3.15.4: the IKE SA is there, for another try.
            ctx.log("IKE", 1, self.core.tag(), format!("no CHILD_SA built, keeping IKE_SA: {fault}"));
            head.push(fault.payload());
            self.respond(ctx, now, &head);
            return self.pump(ctx, now);
        }
        let connection = Arc::clone(&self.connection);
        let plan = child::answer(ctx, &self.parent(now), &connection.children, None, parts, (ni, nr), false);
        match plan.and_then(|plan| self.finish_plan(ctx, now, plan, &[])) {
            Ok(answer) => self.install_answer(ctx, now, answer, None, head),
            Err(fault) => {
                ctx.log("IKE", 1, self.core.tag(), format!("failed to establish CHILD_SA, keeping IKE_SA: {fault}"));
                head.push(fault.payload());
                self.respond(ctx, now, &head);
            }
        }
        self.pump(ctx, now)
    }

    /// Initiator: sends CREATE_CHILD_SA.
    #[allow(clippy::too_many_arguments, reason = "a task's fields")]
    pub(super) fn start_create(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        config: Arc<Child>,
        replaces: Option<Replaced>,
        token: Option<u64>,
        group: Option<Ke>,
        tries: u8,
    ) -> Result<(), Closed> {
        let name = config.name.clone();
        let offer = match ChildOffer::create(ctx, &self.core, config, replaces, group) {
            Ok(offer) => {
                let old = replaces.and_then(|replaced| self.children.get(replaced.id));
                let wanted = configuration::request(ctx, &self.connection, &self.core).filter(|_| replaces.is_none());
                let offer = offer.wanted_by(ctx.triggers.of(token)).succeeding(old).asking(wanted);
                offer.around_reserved(ctx, Party::Proved(&self.peer))
            }
            Err(reason) => {
                self.child_failed(ctx, token, &name, &reason);
                return Ok(());
            }
        };
        if let Some(child) = replaces.and_then(|replaced| self.children.get_mut(replaced.id)) {
            child.state = ChildState::Rekeying;
        }
        let line = match replaces {
            Some(replaced) => format!("rekeying CHILD_SA {name}{{{}}}", replaced.id.0),
            None => format!("establishing CHILD_SA {name}{{{}}}", offer.id.0),
        };
        ctx.log("IKE", 0, self.core.tag(), line);
        if !self.is_creating() {
            self.deleted_early.clear();
        }
        let (method, payloads) = (offer.method, offer.payloads(None));
        let active = Active::Create { offer: Box::new(offer), token, tries };
        match method {
            Some(method) => {
                self.begin_key_exchange(ctx, active, method);
                Ok(())
            }
            None => self.go_on_with(ctx, now, (active, None), ExchangeType::CREATE_CHILD_SA, payloads),
        }
    }

    pub(super) fn start_rekey_child(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        id: ChildSaId,
        token: Option<u64>,
        group: Option<Ke>,
        tries: u8,
    ) -> Result<(), Closed> {
        let half_made = self.half_made.as_ref().is_some_and(|half| half.replaces() == Some(id));
        if half_made || self.passive.as_ref().is_some_and(|passive| passive.replaces == Some(id)) {
            // The peer replaces it already; only if that fails there is something left to do.
            self.delay(ctx, now, Task::RekeyChild { id, token, group, tries });
            return Ok(());
        }
        let child = self.children.get(id).filter(|child| child.is_live() && self.state == IkeState::Established);
        let Some(child) = child else {
            // Whoever asked has what it wanted, or never will.
            self.rekey_overtaken(ctx, id, token);
            return Ok(());
        };
        let replaced = Replaced { id, reqid: child.reqid, spi_in: child.spi_in };
        let config = Arc::clone(&child.config);
        self.start_create(ctx, now, config, Some(replaced), token, group, tries)
    }

    /// Initiator: the answer to CREATE_CHILD_SA came, and all key exchanges are done, or an error came.
    #[allow(clippy::too_many_arguments, reason = "an exchange's state and its outcome")]
    pub(super) fn created(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        mut offer: ChildOffer,
        token: Option<u64>,
        tries: u8,
        parts: &Parts,
        secrets: &[Secret],
    ) -> Result<(), Closed> {
        let Some(error) = parts.error() else {
            if let Some(reason) = self.adopt_configuration(ctx, &mut offer, parts) {
                self.refuse_child(ctx, &offer, token, reason);
                return Ok(());
            }
            match parts.nonce_for(self.channel.suite.prf) {
                Ok(nr) => self.accept(ctx, now, offer, token, parts, nr, secrets),
                Err(fault) => {
                    self.queue.push_front(Task::DeleteSpi(offer.spi));
                    self.rekey_over(offer.replaces);
                    self.child_failed(ctx, token, &offer.config.name, &fault.to_string());
                }
            }
            return Ok(());
        };
        ctx.release_child_spi(offer.spi);
        let reason = format!("received {} notify error", notify_name(error.kind));
        ctx.log("IKE", 1, self.core.tag(), reason.clone());
        let replaced = offer.replaces;
        self.rekey_over(replaced);
        let again = |group, tries| match replaced {
            Some(replaced) => Task::RekeyChild { id: replaced.id, token, group, tries },
            None => Task::CreateChild { config: Arc::clone(&offer.config), token, group, tries },
        };
        let next = tries.saturating_add(1);
        if let Some(replaced) = replaced.filter(|_| error.kind != NotifyType::INVALID_SYNTAX)
            && !self.children.get(replaced.id).is_some_and(|child| child.is_live())
        {
            // §2.8.1: the peer replaced or closed it meanwhile, so its refusal is no news.
            self.rekey_overtaken(ctx, replaced.id, token);
            return Ok(());
        }
        match error.kind {
            NotifyType::INVALID_KE_PAYLOAD if tries < MAX_TRIES => {
                let group = <[u8; 2]>::try_from(error.data.as_slice()).ok().map(|two| Ke(u16::from_be_bytes(two)));
                if let Some(group) = group.filter(|group| offer.accepts_group(*group)) {
                    self.queue.push_front(again(Some(group), next));
                    return Ok(());
                }
            }
            // §2.25: a rekey until the hard lifetime ends what it would replace.
            NotifyType::TEMPORARY_FAILURE if replaced.is_some() || tries < MAX_TRIES => {
                self.try_again(ctx, now, again(None, next), next);
                return Ok(());
            }
            NotifyType::NO_ADDITIONAL_SAS if replaced.is_some() && self.replace_unrekeyable(ctx, token) => {
                return Ok(());
            }
            // RFC 9370 §2.2.4: the whole series may be tried again.
            NotifyType::STATE_NOT_FOUND if tries < MAX_TRIES => {
                self.delay(ctx, now, again(None, next));
                return Ok(());
            }
            NotifyType::CHILD_SA_NOT_FOUND => {
                // §2.25.1: the peer has it no longer; a new one takes its place.
                if let Some(replaced) = replaced {
                    self.take_down(ctx, now, replaced.id, CloseReason::Peer);
                    let config = Arc::clone(&offer.config);
                    self.queue.push_front(Task::CreateChild { config, token, group: None, tries: next });
                    return Ok(());
                }
            }
            NotifyType::SINGLE_PAIR_REQUIRED if replaced.is_none() && ctx.triggers.restrict_to_pair(token) => {
                self.queue.push_front(again(None, next));
                return Ok(());
            }
            // RFC 9370 §2.2.4: again and again, it is fatal.
            NotifyType::STATE_NOT_FOUND => {
                self.child_failed(ctx, token, &offer.config.name, &reason);
                return Err(self.farewell(ctx, now, CloseReason::Failed));
            }
            // §2.21.3: the peer found our request malformed and closes.
            NotifyType::INVALID_SYNTAX => {
                self.child_failed(ctx, token, &offer.config.name, &reason);
                return Err(self.close(ctx, now, CloseReason::Failed));
            }
            _ => {}
        }
        self.child_failed(ctx, token, &offer.config.name, &reason);
        if replaced.is_some() && token.is_none() {
            // Nobody asked for it but our own lifetime, which goes on.
            self.try_again(ctx, now, again(None, next), next);
        }
        Ok(())
    }

    /// What was to be rekeyed is replaced by the peer, or gone.
    fn rekey_overtaken(&mut self, ctx: &mut Context, id: ChildSaId, token: Option<u64>) {
        if token.is_none() || self.children.iter().any(|child| child.replaces == Some(id)) {
            done(ctx, token);
        } else {
            super::established::failed(ctx, token, &self.core.name, None, "the CHILD_SA is gone");
        }
    }

    /// Initiator: the peer made a Child SA that is of no use without a virtual address.
    fn refuse_child(&mut self, ctx: &mut Context, offer: &ChildOffer, token: Option<u64>, reason: &str) {
        self.queue.push_front(Task::DeleteSpi(offer.spi));
        self.child_failed(ctx, token, &offer.config.name, reason);
    }

    /// Initiator: makes the Child SA of an answer and has it installed.
    #[allow(clippy::too_many_arguments, reason = "an exchange's state and its outcome")]
    fn accept(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        offer: ChildOffer,
        token: Option<u64>,
        parts: &Parts,
        nr: &[u8],
        secrets: &[Secret],
    ) {
        let (spi, replaces) = (offer.spi, offer.replaces);
        let name = offer.config.name.clone();
        match offer.accept(&self.parent(now), parts, nr, secrets) {
            Ok((child, ready)) => {
                let job = ctx.install(ready, child.status(now));
                let replaces = replaces.map(|replaced| replaced.id);
                self.go_on(Active::Install { child: Box::new(child), replaces, job, token }, None);
            }
            Err(unusable) => {
                if unusable.exists_there {
                    self.queue.push_front(Task::DeleteSpi(spi));
                } else {
                    ctx.release_child_spi(spi);
                }
                self.rekey_over(replaces);
                if let Some(old) = replaces.and_then(|replaced| self.children.get_mut(replaced.id)) {
                    old.is_last = unusable.narrower;
                }
                self.child_failed(ctx, token, &name, &unusable.reason);
            }
        }
    }

    /// True while a Child SA of ours may exist at the peer and not here.
    pub(super) fn is_creating(&self) -> bool {
        self.going_on().any(|active| matches!(active, Active::Create { .. } | Active::Install { .. }))
    }

    /// Our rekey of a Child SA is over without a successor of ours.
    pub(super) fn rekey_over(&mut self, replaced: Option<Replaced>) {
        let Some(replaced) = replaced else { return };
        let theirs = self.collision.take_if(|collision| collision.old == replaced.id);
        // The peer's successor counts when it is there, or as good as.
        let by_peer = theirs.is_some_and(|Collision { theirs, .. }| {
            self.children.contains(theirs) || self.passive.as_ref().is_some_and(|passive| passive.child.id == theirs)
        });
        if let Some(child) = self.children.get_mut(replaced.id)
            && child.state == ChildState::Rekeying
        {
            child.state = if by_peer { ChildState::Rekeyed } else { ChildState::Installed };
        }
    }

    /// Initiator: the data plane answered.
    pub(super) fn installed(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        mut child: Box<ChildSa>,
        replaces: Option<ChildSaId>,
        token: Option<u64>,
        result: Result<Installed, InstallError>,
    ) -> Result<(), Closed> {
        let id = child.id;
        let installed = match result {
            Ok(installed) => installed,
            Err(error) => {
                // The peer believes that it is up.
                self.queue.push_front(Task::DeleteSpi(child.spi_in));
                let replaced = replaces.map(|id| Replaced { id, reqid: child.reqid, spi_in: child.spi_in });
                self.rekey_over(replaced);
                self.child_failed(ctx, token, &child.config.name, &error.to_string());
                return Ok(());
            }
        };
        let lowest = std::mem::take(&mut child.lowest_nonce);
        child.start(now, installed, ctx.rng.as_mut());
        let (spi_out, name) = (child.spi_out, child.config.name.clone());
        self.log_up(ctx, &child);
        self.children.insert(*child);
        ctx.child_owners.insert(id, self.core.id);
        if self.deleted_early.contains(&spi_out) {
            // The peer made it and closed it before its answer reached us.
            self.take_down(ctx, now, id, CloseReason::Peer);
            let replaced = replaces.map(|id| Replaced { id, reqid: installed.reqid, spi_in: 0 });
            self.rekey_over(replaced);
            self.child_failed(ctx, token, &name, "the peer closed it");
            return Ok(());
        }
        // §2.8.1: the SA of the lowest of the four nonces goes, by the hand of who made it. The old one may be gone: our
        // answer was late, and the peer, which won, did not wait.
        let collision = self.collision.take_if(|collision| replaces == Some(collision.old));
        if let Some(Collision { old, .. }) = collision.as_ref().filter(|theirs| lowest < theirs.lowest_nonce) {
            self.set_rekeyed(ctx, now, *old);
            let task = Task::DeleteChild { id, token: None, reason: CloseReason::Rekeyed };
            self.queue.push_front(task);
            done(ctx, token);
            return Ok(());
        }
        if let Some(Collision { theirs, .. }) = collision {
            self.set_rekeyed(ctx, now, theirs);
            if let Some(passive) = self.passive.as_mut().filter(|passive| passive.child.id == theirs) {
                passive.redundant = true;
            }
            if let Some(half) = &mut self.half_made {
                half.lost_against(theirs);
            }
        }
        match replaces.filter(|old| self.children.contains(*old)) {
            Some(old) => {
                self.set_rekeyed(ctx, now, old);
                self.channel.count(Counter::ChildRekey);
                ctx.event(Event::ChildRekeyed { ike_sa: self.core.id, old, new: id });
                let task = Task::DeleteChild { id: old, token: None, reason: CloseReason::Rekeyed };
                self.queue.push_front(task);
            }
            None => ctx.event(Event::ChildUp(self.core.id, id)),
        }
        done(ctx, token);
        Ok(())
    }

    /// Responder: the peer wants a Child SA, a successor of one, or a successor of the IKE SA.
    pub(super) fn create_request(&mut self, ctx: &mut Context, now: Instant, parts: &Parts) -> Result<(), Closed> {
        // One at a time: what the peer begins now takes the place of what it did not go on with.
        self.drop_half_made(ctx, now, false);
        let for_ike = parts.sa.iter().flatten().next().is_some_and(|proposal| proposal.protocol == Protocol::IKE);
        if for_ike {
            return self.rekey_ike_request(ctx, now, parts);
        }
        let nr = ctx.random(NONCE_LENGTH);
        match self.child_request(ctx, now, parts, &nr) {
            Ok((plan, replaces)) if plan.ke.is_some() => {
                self.answer_key_exchange(ctx, PeerWish::Child { plan: Box::new(plan), replaces, redundant: false });
            }
            Ok((plan, replaces)) => match self.finish_plan(ctx, now, plan, &[]) {
                Ok(answer) => self.install_answer(ctx, now, answer, replaces, Vec::new()),
                Err(fault) => return self.refuse_key_exchange(ctx, now, &fault),
            },
            Err(fault) => return self.refuse_key_exchange(ctx, now, &fault),
        }
        Ok(())
    }

    /// Makes the Child SA of a plan, with the secrets of its key exchanges.
    fn finish_plan(
        &self,
        ctx: &mut Context,
        now: Instant,
        mut plan: child::ChildPlan,
        secrets: &[Secret],
    ) -> Result<child::ChildAnswer, Fault> {
        let (spi, payloads) = (plan.spi_in(), std::mem::take(&mut plan.payloads));
        plan.finish(&self.parent(now), secrets, payloads).inspect_err(|_| ctx.release_child_spi(spi))
    }

    fn child_request(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        parts: &Parts,
        nr: &[u8],
    ) -> Result<(child::ChildPlan, Option<ChildSaId>), Fault> {
        // §2.25.2: not while the IKE SA is rekeyed or closed.
        let rekeying = self.going_on().any(|active| matches!(active, Active::RekeyIke(_) | Active::DeleteIke { .. }));
        if self.state != IkeState::Established || rekeying {
            return Err(Fault::TemporaryFailure);
        }
        let ni = parts.nonce_for(self.channel.suite.prf)?;
        let limit = if parts.has(NotifyType::REKEY_SA) { MAX_WITH_REPLACED } else { MAX_CHILDREN };
        if self.children.len() >= limit {
            return Err(Fault::NoAdditionalSas);
        }
        let connection = Arc::clone(&self.connection);
        let Some(rekey) = parts.notify(NotifyType::REKEY_SA) else {
            let Served { reply, fault } = self.serve_configuration(ctx, parts, Shares::Wanted);
            if let Some(fault) = fault {
                return Err(fault);
            }
            let mut answer = child::answer(ctx, &self.parent(now), &connection.children, None, parts, (ni, nr), true)?;
            answer.payloads.splice(0..0, reply);
            return Ok((answer, None));
        };
        // §1.3.3: the SPI that the sender receives with, so the one that we write.
        let spi = <[u8; 4]>::try_from(rekey.spi.as_slice()).map(u32::from_be_bytes);
        let spi = spi.map_err(|_| Fault::InvalidSyntax("REKEY_SA without an SPI".to_owned()))?;
        let old = self.children.iter().find(|child| child.spi_out == spi && rekey.protocol == Protocol::ESP);
        // §2.25: it may be the one whose answer is still on its way to us.
        let unknown = if self.is_creating() { Fault::TemporaryFailure } else { Fault::ChildSaNotFound(spi) };
        let old = old.ok_or(unknown)?;
        match old.state {
            ChildState::Installed | ChildState::Rekeying => {}
            // §2.25.1: we are closing it.
            ChildState::Created | ChildState::Installing | ChildState::Rekeyed | ChildState::Deleting => {
                return Err(Fault::TemporaryFailure);
            }
            // It is closed, and stays for packets on their way to us alone.
            ChildState::Deleted => return Err(Fault::ChildSaNotFound(spi)),
        }
        let configs = [Arc::clone(&old.config)];
        let answer = child::answer(ctx, &self.parent(now), &configs, Some(old), parts, (ni, nr), true)?;
        let old = old.id;
        if self.going_on().any(|active| active.replaces() == Some(old)) {
            let lowest_nonce = answer.lowest_nonce().to_vec();
            self.collision = Some(Collision { old, theirs: answer.id(), lowest_nonce });
        }
        Ok((answer, Some(old)))
    }

    pub(super) fn install_answer(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        answer: child::ChildAnswer,
        replaces: Option<ChildSaId>,
        head: Vec<Payload>,
    ) {
        let job = ctx.install(answer.ready, answer.child.status(now));
        let child = Box::new(answer.child);
        let passive = Passive { child, replaces, job, redundant: false, head, payloads: answer.payloads };
        self.passive = Some(Box::new(passive));
    }

    /// Responder: the data plane answered, so the peer gets its answer.
    pub(super) fn answer_installed(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        passive: Passive,
        result: Result<Installed, InstallError>,
    ) -> Result<(), Closed> {
        let Passive { mut child, replaces, redundant, head, payloads, .. } = passive;
        let mut reply = head;
        let id = child.id;
        match result {
            Ok(installed) => {
                child.start(now, installed, ctx.rng.as_mut());
                reply.extend(payloads);
                self.respond(ctx, now, &reply);
                self.log_up(ctx, &child);
                self.children.insert(*child);
                ctx.child_owners.insert(id, self.core.id);
                if redundant {
                    self.set_rekeyed(ctx, now, id);
                    return Ok(());
                }
                match replaces.filter(|old| self.children.contains(*old)) {
                    Some(old) => {
                        // While our own rekey of it runs, that decides what becomes of it.
                        let collides = self.collision.as_ref().is_some_and(|collision| collision.theirs == id);
                        if !collides {
                            self.set_rekeyed(ctx, now, old);
                        }
                        self.channel.count(Counter::ChildRekey);
                        ctx.event(Event::ChildRekeyed { ike_sa: self.core.id, old, new: id });
                    }
                    None => ctx.event(Event::ChildUp(self.core.id, id)),
                }
            }
            Err(error) => {
                ctx.release_child_spi(child.spi_in);
                if self.collision.as_ref().is_some_and(|collision| collision.theirs == id) {
                    self.collision = None;
                }
                let fault = match &error {
                    InstallError::Refused(_) => Fault::TsUnacceptable,
                    InstallError::Failed(_) => Fault::NoProposalChosen,
                };
                reply.push(fault.payload());
                self.respond(ctx, now, &reply);
                self.child_failed(ctx, None, &child.config.name, &error.to_string());
            }
        }
        Ok(())
    }

    /// A successor is there: who made it deletes this one.
    fn set_rekeyed(&mut self, ctx: &Context, now: Instant, id: ChildSaId) {
        let patience = total(&ctx.config.retransmission) + ctx.config.half_open_timeout;
        if let Some(child) = self.children.get_mut(id)
            && !matches!(child.state, ChildState::Deleting | ChildState::Deleted)
        {
            child.state = ChildState::Rekeyed;
            child.rekey_at = None;
            // If the peer never deletes it, we do.
            child.expire_at = child.expire_at.into_iter().chain([after(now, patience)]).min();
        }
    }

    fn log_up(&self, ctx: &mut Context, child: &ChildSa) {
        let line = format!(
            "CHILD_SA {}{{{}}} established with SPIs {} and TS {}",
            child.config.name,
            child.id.0,
            child.spis(),
            child.selectors()
        );
        ctx.log("IKE", 0, self.core.tag(), line);
    }
}
