//! Rekeying the IKE SA with CREATE_CHILD_SA, both roles (RFC 7296 §1.3.2, §2.8, §2.18, §2.25.2). What becomes
//! of a finished successor is decided in `succession`.

use std::time::Instant;

use ipsec::transform::{Ke, Proposal};

use super::Established;
use super::channel::{Channel, Spis};
use super::established::{Active, Closed, MAX_TRIES, Task, done, failed};
use super::fault::{Fault, notify_name};
use super::init::{NONCE_LENGTH, methods, numbered, offers, proposals};
use super::parts::Parts;
use super::succession::Successor;
use crate::crypto::{self, KeyExchange, KeySeed};
use crate::engine::context::Context;
use crate::engine::{CloseReason, IkeState};
use crate::wire::{ExchangeType, NotifyType, Payload};

/// Our offer of a successor.
pub(crate) struct IkeOffer {
    pub(super) spi: u64,
    pub(super) token: Option<u64>,
    nonce: Vec<u8>,
    ke: KeyExchange,
    proposals: Vec<Proposal>,
    tries: u8,
}

impl Established {
    pub(super) fn start_rekey_ike(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        token: Option<u64>,
        group: Option<Ke>,
        tries: u8,
    ) -> Result<(), Closed> {
        // The method in use comes first: the peer is known to accept it.
        let wanted = group.unwrap_or(self.channel.suite.ke);
        let configured = proposals(&self.connection);
        let candidates = offers(&configured, wanted).then_some(wanted).into_iter().chain(methods(&configured));
        let mut candidates = candidates.filter(|method| *method != Ke::NONE);
        let ke = candidates.find_map(|method| KeyExchange::generate(method, ctx.rng.as_mut()).ok());
        let Some(ke) = ke else {
            failed(ctx, token, &self.core.name, None, "no key exchange method that we support");
            return Ok(());
        };
        let spi = ctx.reserve_ike_spi(self.core.id);
        let offer = IkeOffer {
            spi,
            token,
            nonce: ctx.random(NONCE_LENGTH),
            ke,
            proposals: numbered(&configured, &spi.to_be_bytes()),
            tries,
        };
        let line = format!("initiating rekeying of IKE_SA {}[{}]", self.core.name, self.core.id.0);
        ctx.log("IKE", 0, self.core.tag(), line);
        let payloads = [
            Payload::Sa(offer.proposals.clone()),
            Payload::Nonce(offer.nonce.clone()),
            Payload::Ke { group: offer.ke.method(), data: offer.ke.public().to_vec() },
        ];
        self.state = IkeState::Rekeying;
        self.active = Some(Active::RekeyIke(Box::new(offer)));
        self.send_request(ctx, now, ExchangeType::CREATE_CHILD_SA, &payloads)
    }

    /// Initiator: the answer came.
    pub(super) fn ike_rekeyed(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        offer: IkeOffer,
        parts: &Parts,
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
                    let usable = |group: &Ke| offers(&offer.proposals, *group) && *group != offer.ke.method();
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
                NotifyType::INVALID_SYNTAX => {
                    failed(ctx, token, &self.core.name, None, &reason);
                    return Err(self.close(ctx, now, CloseReason::Failed));
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
        match self.complete(ctx, offer, parts) {
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
    fn complete(&self, ctx: &mut Context, offer: IkeOffer, parts: &Parts) -> Result<Successor, String> {
        let (Some(answer), Some((group, public)), Some(nr)) = (&parts.sa, &parts.ke, &parts.nonce) else {
            return Err("the answer lacks SA, KE or nonce".to_owned());
        };
        let suite = crypto::accept_ike(answer, &offer.proposals)
            .filter(|suite| suite.ke == *group && *group == offer.ke.method())
            .ok_or_else(|| "the peer chose what we did not offer".to_owned())?;
        let spi_r = answer.first().and_then(|proposal| ike_spi(&proposal.spi));
        let spi_r = spi_r.ok_or_else(|| "the peer's SPI is not one".to_owned())?;
        let spis = Spis { initiator: offer.spi, responder: spi_r };
        let seed = KeySeed { ni: &offer.nonce, nr, spi_i: spis.initiator, spi_r: spis.responder };
        let secret = offer.ke.agree(public).map_err(|error| error.to_string())?;
        let keys = crypto::rekeyed_ike_keys(self.channel.suite.prf, &self.channel.d, &suite, &secret, seed);
        let keys = keys.map_err(|error| error.to_string())?;
        let channel = Channel::new(suite, keys, spis, true, true).map_err(|error| error.to_string())?;
        let id = ctx.next_ike();
        ctx.ike_spis.insert(offer.spi, id);
        Ok(Successor { id, channel, lowest_nonce: offer.nonce.min(nr.clone()) })
    }

    /// Responder: the peer rekeys the IKE SA.
    pub(super) fn rekey_ike_request(&mut self, ctx: &mut Context, now: Instant, parts: &Parts) -> Result<(), Closed> {
        match self.answer_rekey(ctx, now, parts) {
            Ok(()) => Ok(()),
            Err(fault) => {
                ctx.log("IKE", 1, self.core.tag(), format!("rekeying of the IKE_SA refused: {fault}"));
                self.respond(ctx, now, &[fault.payload()]);
                if matches!(fault, Fault::InvalidSyntax(_)) {
                    return Err(self.close(ctx, now, CloseReason::Failed));
                }
                Ok(())
            }
        }
    }

    fn answer_rekey(&mut self, ctx: &mut Context, now: Instant, parts: &Parts) -> Result<(), Fault> {
        // §2.25.2: not while Child SAs are made, rekeyed or closed, nor while we close this one.
        let busy = match &self.active {
            None | Some(Active::Liveness | Active::Redirect { .. } | Active::RekeyIke(_)) => false,
            Some(
                Active::Create { .. }
                | Active::Install { .. }
                | Active::DeleteChild { .. }
                | Active::DeleteSpi(_)
                | Active::Mobility(_)
                | Active::DeleteIke { .. },
            ) => true,
        };
        let open = matches!(self.state, IkeState::Established | IkeState::Rekeying);
        if busy || self.passive.is_some() || !open || self.peers_successor.is_some() {
            return Err(Fault::TemporaryFailure);
        }
        let (Some(offered), Some((group, public)), Some(ni)) = (&parts.sa, &parts.ke, &parts.nonce) else {
            return Err(Fault::InvalidSyntax("SA, KE or nonce is missing".to_owned()));
        };
        let ours_first = ctx.config.prefer_configured_proposals;
        let choice = crypto::select_ike(offered, &proposals(&self.connection), ours_first, Some(*group));
        let choice = choice.ok_or(Fault::NoProposalChosen)?;
        if choice.suite.ke != *group {
            return Err(Fault::InvalidKe(choice.suite.ke));
        }
        let offer = offered.iter().find(|offer| offer.number == choice.proposal.number);
        let spi_i = offer.and_then(|offer| ike_spi(&offer.spi)).ok_or(Fault::NoProposalChosen)?;
        let (ours, secret) = crypto::respond(*group, public, ctx.rng.as_mut())?;
        let nr = ctx.random(NONCE_LENGTH);
        let id = ctx.next_ike();
        let spi_r = ctx.reserve_ike_spi(id);
        let spis = Spis { initiator: spi_i, responder: spi_r };
        let seed = KeySeed { ni, nr: &nr, spi_i, spi_r };
        let (prf, d) = (self.channel.suite.prf, &self.channel.d);
        let channel = crypto::rekeyed_ike_keys(prf, d, &choice.suite, &secret, seed)
            .ok()
            .and_then(|keys| Channel::new(choice.suite, keys, spis, false, true).ok());
        let Some(channel) = channel else {
            ctx.release_ike_spi(spi_r);
            return Err(Fault::NoProposalChosen);
        };
        let mut proposal = choice.proposal;
        proposal.spi = spi_r.to_be_bytes().to_vec();
        let lowest_nonce = ni.clone().min(nr.clone());
        let reply = [Payload::Sa(vec![proposal]), Payload::Nonce(nr), Payload::Ke { group: *group, data: ours }];
        self.respond(ctx, now, &reply);
        self.peer_rekeyed(ctx, now, Successor { id, channel, lowest_nonce });
        Ok(())
    }
}

/// An IKE SPI; 0 is none (RFC 7296 §3.1).
fn ike_spi(octets: &[u8]) -> Option<u64> {
    let spi = u64::from_be_bytes(octets.try_into().ok()?);
    (spi != 0).then_some(spi)
}
