//! INFORMATIONAL exchanges: Delete, liveness, late errors (RFC 7296 §1.4, §1.4.1, §2.21).

use std::time::Instant;

use ipsec::transform::Protocol;

use super::Established;
use super::established::{Active, Closed, done};
use super::fault::notify_name;
use super::parts::Parts;
use super::retry::after;
use crate::engine::context::Context;
use crate::engine::{ChildSaId, ChildState, CloseReason, Event, IkeState};
use crate::wire::{ExchangeType, NotifyType, Payload};

/// Unknown SPIs of one CREATE_CHILD_SA exchange that are remembered.
const MAX_DELETED_EARLY: usize = 64;

impl Established {
    /// The peer says something, or nothing: an empty request asks whether we live.
    pub(super) fn informational_request(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        parts: &Parts,
    ) -> Result<(), Closed> {
        if let Some(error) = parts.error() {
            ctx.log("IKE", 1, self.core.tag(), format!("received {} notify error", notify_name(error.kind)));
        }
        let deletes_ike = parts.deletes.iter().any(|(protocol, _)| *protocol == Protocol::IKE);
        // §2.21.2: the peer did not accept our proof.
        let rejected = parts.has(NotifyType::AUTHENTICATION_FAILED) || parts.has(NotifyType::INVALID_SYNTAX);
        if deletes_ike || rejected {
            let line = format!("received DELETE for IKE_SA {}[{}]", self.core.name, self.core.id.0);
            ctx.log("IKE", 0, self.core.tag(), line);
            // §2.8.2: the peer has the successor that we are about to have; it is for us to delete that.
            if deletes_ike && self.peers_successor.is_some() && self.is_making_last_key() {
                self.delete_waits = true;
                return Ok(());
            }
            return Err(self.peer_closes(ctx, now, rejected && !deletes_ike));
        }
        self.redirect_request(ctx, now, parts);
        self.take_tokens(parts);
        self.note_auth_lifetime(ctx, now, parts);
        let spis = parts.deletes.iter().filter(|(protocol, _)| *protocol == Protocol::ESP);
        let spis: Vec<u32> = spis.flat_map(|(_, spis)| spis).copied().collect();
        let mut ours = Vec::new();
        for spi in spis {
            ours.extend(self.peer_deletes(ctx, now, spi));
        }
        let mut answer = self.mobility_request(ctx, now, parts);
        answer.extend(self.answer_configuration(ctx, parts));
        answer.extend(self.window_announcement());
        answer.extend(self.answer_ticket_request(ctx, now, parts));
        if !ours.is_empty() {
            answer.push(Payload::Delete { protocol: Protocol::ESP, spis: ours });
        }
        self.respond(ctx, now, &answer);
        Ok(())
    }

    /// The peer's Delete waited for our own rekey's last key, and that is decided now.
    pub(super) fn delete_waited(&mut self, ctx: &mut Context, now: Instant) -> Result<(), Closed> {
        if self.delete_waits && !self.is_making_last_key() {
            return Err(self.peer_closes(ctx, now, false));
        }
        Ok(())
    }

    /// Answers the peer that closes this IKE SA, or that did not accept our proof.
    fn peer_closes(&mut self, ctx: &mut Context, now: Instant, rejected: bool) -> Closed {
        self.respond(ctx, now, &[]);
        if !rejected {
            // §2.8.2: the peer is done with its own rekey, and ours is to be forgotten.
            self.adopt_peers_successor(ctx, now);
        }
        let reason = match self.state {
            IkeState::Rekeyed => CloseReason::Rekeyed,
            IkeState::Deleting => CloseReason::Local,
            _ if rejected => CloseReason::Failed,
            IkeState::Created | IkeState::Connecting | IkeState::Established | IkeState::Rekeying => CloseReason::Peer,
        };
        self.close(ctx, now, reason)
    }

    /// The peer closes the Child SA that we write with `spi`; gives our half of it for the answer (§1.4.1).
    fn peer_deletes(&mut self, ctx: &mut Context, now: Instant, spi: u32) -> Option<u32> {
        let Some(child) = self.children.iter().find(|child| child.spi_out == spi) else {
            if self.is_creating() && self.deleted_early.len() < MAX_DELETED_EARLY {
                self.deleted_early.push(spi);
            }
            return None;
        };
        let (id, spi_in, state) = (child.id, child.spi_in, child.state);
        let line = format!("received DELETE for ESP CHILD_SA with SPI {spi:08x}");
        ctx.log("IKE", 1, self.core.tag(), line);
        let redundant = self.collision.as_ref().is_some_and(|collision| collision.theirs == id);
        match state {
            // §1.4.1: both close it; the answer to our Delete is to come, so this one does not name it.
            ChildState::Deleting => {
                let why = self.going_on().find_map(|active| match active {
                    Active::DeleteChild { id: ours, reason, .. } if *ours == id => Some(*reason),
                    _ => None,
                });
                self.child_deleted(ctx, now, id, why.unwrap_or(CloseReason::Local));
                None
            }
            ChildState::Deleted => None,
            ChildState::Rekeyed => {
                self.linger(ctx, now, id);
                Some(spi_in)
            }
            // The loser of two rekeys at once.
            ChildState::Installed if redundant => {
                self.linger(ctx, now, id);
                Some(spi_in)
            }
            ChildState::Rekeying if self.collision.as_ref().is_some_and(|collision| collision.old == id) => {
                self.linger(ctx, now, id);
                Some(spi_in)
            }
            ChildState::Created | ChildState::Installing | ChildState::Installed | ChildState::Rekeying => {
                self.take_down(ctx, now, id, CloseReason::Peer);
                Some(spi_in)
            }
        }
    }

    pub(super) fn start_delete_child(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        id: ChildSaId,
        token: Option<u64>,
        reason: CloseReason,
    ) -> Result<(), Closed> {
        let child = self.children.get_mut(id);
        let child = child.filter(|child| !matches!(child.state, ChildState::Deleting | ChildState::Deleted));
        let Some(child) = child else {
            done(ctx, token);
            return Ok(());
        };
        let spi_in = child.spi_in;
        child.state = ChildState::Deleting;
        let line = format!("closing CHILD_SA {}{{{}}} with SPIs {}", child.config.name, id.0, child.spis());
        ctx.log("IKE", 1, self.core.tag(), line);
        if reason == CloseReason::Rekeyed {
            // Another one sends: this one ends at the peer a while after the Delete arrives there, whenever we hear of it.
            ctx.event(Event::ChildRetired { spi_in });
        }
        let active = Active::DeleteChild { id, token, reason };
        let payload = Payload::Delete { protocol: Protocol::ESP, spis: vec![spi_in] };
        self.go_on_with(ctx, now, (active, None), ExchangeType::INFORMATIONAL, vec![payload])
    }

    /// The peer answered our Delete.
    pub(super) fn child_deleted(&mut self, ctx: &mut Context, now: Instant, id: ChildSaId, reason: CloseReason) {
        if reason == CloseReason::Rekeyed {
            self.linger(ctx, now, id);
        } else {
            self.take_down(ctx, now, id, reason);
        }
    }

    /// A replaced Child SA still receives what is under way.
    fn linger(&mut self, ctx: &mut Context, now: Instant, id: ChildSaId) {
        let delay = ctx.config.delete_rekeyed_delay;
        if delay.is_zero() {
            self.take_down(ctx, now, id, CloseReason::Rekeyed);
        } else if let Some(child) = self.children.get_mut(id) {
            child.state = ChildState::Deleted;
            ctx.event(Event::ChildRetired { spi_in: child.spi_in });
            child.down_at = Some((after(now, delay), CloseReason::Rekeyed));
        }
    }
}
