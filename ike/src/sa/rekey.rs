//! Rekeying the IKE SA with CREATE_CHILD_SA, both roles (RFC 7296 §1.3.2, §2.8, §2.18, §2.25.2). What becomes
//! of a finished successor is decided in `succession`.

use std::time::Instant;

use ipsec::secret::Secret;
use ipsec::transform::{Ke, Proposal};

use super::Established;
use super::channel::{Channel, Spis};
use super::established::{Active, Closed, MAX_TRIES, Task, done, failed};
use super::fault::{Fault, notify_name};
use super::first_request::NONCE_LENGTH;
use super::followup::PeerWish;
use super::init::{methods, numbered, offers, proposals};
use super::parts::Parts;
use super::succession::Successor;
use crate::crypto::{self, AdditionalKe, IkeSuite, KeyExchange, KeySeed};
use crate::engine::context::Context;
use crate::engine::{CloseReason, IkeSaId, IkeState};
use crate::wire::{NotifyType, Payload};

/// Our offer of a successor.
pub(crate) struct IkeOffer {
    pub(super) spi: u64,
    pub(super) token: Option<u64>,
    nonce: Vec<u8>,
    method: Ke,
    proposals: Vec<Proposal>,
    tries: u8,
}

impl IkeOffer {
    /// The key exchanges that an answer chose; `None` where that is not among what we offered.
    pub(super) fn chosen(&self, parts: &Parts) -> Option<(Ke, AdditionalKe)> {
        let suite = crypto::accept_ike(parts.sa.as_ref()?, &self.proposals)?;
        Some((suite.ke, suite.additional))
    }

    /// The payloads of the request.
    pub(super) fn payloads(&self, ke: &KeyExchange) -> Vec<Payload> {
        vec![
            Payload::Sa(self.proposals.clone()),
            Payload::Nonce(self.nonce.clone()),
            Payload::Ke { group: ke.method(), data: ke.public().to_vec() },
        ]
    }
}

/// The peer's successor of an IKE SA before the key exchanges. Its SPI is reserved for `id`.
pub(crate) struct IkePlan {
    id: IkeSaId,
    suite: IkeSuite,
    spis: Spis,
    ni: Vec<u8>,
    nr: Vec<u8>,
    /// The initiator's KE payload.
    pub(super) ke: (Ke, Vec<u8>),
    /// Of the answer, without the KE payload.
    pub(super) payloads: Vec<Payload>,
}

impl IkePlan {
    pub(super) fn spi(&self) -> u64 {
        self.spis.responder
    }

    pub(super) fn additional(&self) -> AdditionalKe {
        self.suite.additional
    }

    /// With the secrets of all key exchanges.
    pub(super) fn finish(self, old: &Channel, secrets: &[Secret]) -> Result<Successor, Fault> {
        let Self { id, suite, spis, ni, nr, .. } = self;
        let (secret, additional) = secrets.split_first().ok_or(Fault::NoProposalChosen)?;
        let seed = KeySeed { ni: &ni, nr: &nr, spi_i: spis.initiator, spi_r: spis.responder };
        let keys = crypto::rekeyed_ike_keys(old.suite.prf, &old.d, &suite, secret, additional, seed)?;
        let channel = Channel::new(suite, keys, spis, false, true).map_err(|_| Fault::NoProposalChosen)?;
        let channel = channel.counted(old.tally.clone());
        Ok(Successor { id, channel, lowest_nonce: ni.min(nr) })
    }
}

impl Established {
    pub(super) fn start_rekey_ike(&mut self, ctx: &mut Context, token: Option<u64>, group: Option<Ke>, tries: u8) {
        // The method in use comes first: the peer is known to accept it.
        let wanted = group.unwrap_or(self.channel.suite.ke);
        let configured = proposals(&self.connection);
        let candidates = offers(&configured, wanted).then_some(wanted).into_iter().chain(methods(&configured));
        let mut candidates = candidates.filter(|method| *method != Ke::NONE);
        let Some(method) = candidates.find(|method| crypto::supported(*method)) else {
            failed(ctx, token, &self.core.name, None, "no key exchange method that we support");
            return;
        };
        let spi = ctx.reserve_ike_spi(self.core.id);
        let offer = IkeOffer {
            spi,
            token,
            nonce: ctx.random(NONCE_LENGTH),
            method,
            proposals: numbered(&configured, &spi.to_be_bytes()),
            tries,
        };
        let line = format!("initiating rekeying of IKE_SA {}[{}]", self.core.name, self.core.id.0);
        ctx.log("IKE", 0, self.core.tag(), line);
        self.state = IkeState::Rekeying;
        self.begin_key_exchange(ctx, Active::RekeyIke(Box::new(offer)), method);
    }

    /// Initiator: the answer came.
    pub(super) fn ike_rekeyed(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        offer: IkeOffer,
        parts: &Parts,
        secrets: &[Secret],
    ) -> Result<(), Closed> {
        self.state = IkeState::Established;
        let (token, tries) = (offer.token, offer.tries);
        if let Some(error) = parts.error() {
            ctx.release_ike_spi(offer.spi);
            let reason = format!("received {} notify error", notify_name(error.kind));
            ctx.log("IKE", 1, self.core.tag(), reason.clone());
            if error.kind != NotifyType::INVALID_SYNTAX && self.adopt_peers_successor(ctx, now) {
                // §2.8.2: the peer's own rekey stands, whether it noticed ours or not.
                done(ctx, token);
                return Ok(());
            }
            let next = tries.saturating_add(1);
            match error.kind {
                NotifyType::INVALID_KE_PAYLOAD if tries < MAX_TRIES => {
                    let group = <[u8; 2]>::try_from(error.data.as_slice()).ok().map(|two| Ke(u16::from_be_bytes(two)));
                    let usable = |group: &Ke| offers(&offer.proposals, *group) && *group != offer.method;
                    if let Some(group) = group.filter(usable) {
                        self.queue.push_front(Task::RekeyIke { token, group: Some(group), tries: next });
                        return Ok(());
                    }
                }
                // §2.25: until the hard lifetime ends the IKE SA.
                NotifyType::TEMPORARY_FAILURE => {
                    self.try_again(ctx, now, Task::RekeyIke { token, group: None, tries: next }, next);
                    return Ok(());
                }
                NotifyType::NO_ADDITIONAL_SAS if self.replace_unrekeyable(ctx, token) => return Ok(()),
                // RFC 9370 §2.2.4: the whole series may be tried again.
                NotifyType::STATE_NOT_FOUND if tries < MAX_TRIES => {
                    self.delay(ctx, now, Task::RekeyIke { token, group: None, tries: next });
                    return Ok(());
                }
                NotifyType::INVALID_SYNTAX => {
                    failed(ctx, token, &self.core.name, None, &reason);
                    return Err(self.close(ctx, now, CloseReason::Failed));
                }
                // RFC 9370 §2.2.4: again and again, it is fatal.
                NotifyType::STATE_NOT_FOUND => {
                    failed(ctx, token, &self.core.name, None, &reason);
                    return Err(self.farewell(ctx, now, CloseReason::Failed));
                }
                _ => {}
            }
            failed(ctx, token, &self.core.name, None, &reason);
            if token.is_none() {
                // Nobody asked for it but our own lifetime, which goes on.
                self.try_again(ctx, now, Task::RekeyIke { token: None, group: None, tries: next }, next);
            }
            return Ok(());
        }
        let spi = offer.spi;
        match self.complete(ctx, offer, parts, secrets) {
            Ok(ours) => {
                done(ctx, token);
                self.own_successor(ctx, now, ours);
                Ok(())
            }
            Err(reason) => {
                // The peer has moved to a successor that we do not have.
                ctx.release_ike_spi(spi);
                failed(ctx, token, &self.core.name, None, &reason);
                Err(self.farewell(ctx, now, CloseReason::Failed))
            }
        }
    }

    /// The successor that the answer to our offer makes.
    fn complete(
        &self,
        ctx: &mut Context,
        offer: IkeOffer,
        parts: &Parts,
        secrets: &[Secret],
    ) -> Result<Successor, String> {
        let (Some(answer), Some((group, _))) = (&parts.sa, &parts.ke) else {
            return Err("the answer lacks SA or KE".to_owned());
        };
        let nr = parts.nonce_for(self.channel.suite.prf).map_err(|fault| fault.to_string())?;
        let suite = crypto::accept_ike(answer, &offer.proposals)
            .filter(|suite| suite.ke == *group && *group == offer.method)
            .ok_or_else(|| "the peer chose what we did not offer".to_owned())?;
        let spi_r = answer.first().and_then(|proposal| ike_spi(&proposal.spi));
        let spi_r = spi_r.ok_or_else(|| "the peer's SPI is not one".to_owned())?;
        let spis = Spis { initiator: offer.spi, responder: spi_r };
        let seed = KeySeed { ni: &offer.nonce, nr, spi_i: spis.initiator, spi_r: spis.responder };
        let (secret, additional) = secrets.split_first().ok_or("the key exchange was left out")?;
        let (prf, d) = (self.channel.suite.prf, &self.channel.d);
        let keys = crypto::rekeyed_ike_keys(prf, d, &suite, secret, additional, seed);
        let keys = keys.map_err(|error| error.to_string())?;
        let channel = Channel::new(suite, keys, spis, true, true).map_err(|error| error.to_string())?;
        let channel = channel.counted(self.channel.tally.clone());
        let id = ctx.next_ike();
        ctx.shared.spis.set(offer.spi, id);
        Ok(Successor { id, channel, lowest_nonce: offer.nonce.min(nr.clone()) })
    }

    /// Responder: the peer rekeys the IKE SA.
    pub(super) fn rekey_ike_request(&mut self, ctx: &mut Context, now: Instant, parts: &Parts) -> Result<(), Closed> {
        match self.answer_rekey(ctx, parts) {
            Ok(plan) => {
                self.answer_key_exchange(ctx, PeerWish::Ike(plan));
                Ok(())
            }
            Err(fault) => self.refuse_key_exchange(ctx, now, &fault),
        }
    }

    fn answer_rekey(&mut self, ctx: &mut Context, parts: &Parts) -> Result<IkePlan, Fault> {
        // §2.25.2: not while Child SAs are made, rekeyed or closed, nor while we close this one.
        let busy = self.going_on().any(|active| match active {
            Active::Liveness
            | Active::Inform
            | Active::RequestTicket
            | Active::ProbeUdp
            | Active::Redirect { .. }
            | Active::RekeyIke(_) => false,
            Active::Create { .. }
            | Active::Install { .. }
            | Active::DeleteChild { .. }
            | Active::DeleteSpi(_)
            | Active::Mobility(_)
            | Active::DeleteIke { .. } => true,
        });
        let open = matches!(self.state, IkeState::Established | IkeState::Rekeying);
        if busy || self.passive.is_some() || !open || self.peers_successor.is_some() {
            return Err(Fault::TemporaryFailure);
        }
        let (Some(offered), Some((group, public))) = (&parts.sa, &parts.ke) else {
            return Err(Fault::InvalidSyntax("SA or KE is missing".to_owned()));
        };
        let ni = parts.nonce_for(self.channel.suite.prf)?;
        let ours_first = ctx.config.prefer_configured_proposals;
        let choice = crypto::select_ike(offered, &proposals(&self.connection), ours_first, Some(*group));
        let choice = choice.ok_or(Fault::NoProposalChosen)?;
        if choice.suite.ke != *group {
            return Err(Fault::InvalidKe(choice.suite.ke));
        }
        let offer = offered.iter().find(|offer| offer.number == choice.proposal.number);
        let spi_i = offer.and_then(|offer| ike_spi(&offer.spi)).ok_or(Fault::NoProposalChosen)?;
        let nr = ctx.random(NONCE_LENGTH);
        let id = ctx.next_ike();
        let spi_r = ctx.reserve_ike_spi(id);
        let spis = Spis { initiator: spi_i, responder: spi_r };
        let mut proposal = choice.proposal;
        proposal.spi = spi_r.to_be_bytes().to_vec();
        let mut payloads = vec![Payload::Sa(vec![proposal]), Payload::Nonce(nr.clone())];
        payloads.extend(self.defer_ticket(parts));
        Ok(IkePlan { id, suite: choice.suite, spis, ni: ni.clone(), nr, ke: (*group, public.clone()), payloads })
    }
}

/// An IKE SPI; 0 is none (RFC 7296 §3.1).
fn ike_spi(octets: &[u8]) -> Option<u64> {
    let spi = u64::from_be_bytes(octets.try_into().ok()?);
    (spi != 0).then_some(spi)
}
