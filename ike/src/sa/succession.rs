//! Which successor an IKE SA has, and what becomes of the other one when both sides rekeyed it at once
//! (RFC 7296 §2.8.2, §2.25.2).
//!
//! How many exchanges a successor takes is not decided here: it comes finished, ours to [`Established::own_successor`]
//! and the peer's to [`Established::peer_rekeyed`]. While our own rekey runs, the peer's successor waits: no message
//! to it is heard before it is decided, so it has no state that a later decision would have to undo; the peer repeats
//! what it sent.

use std::time::Instant;

use super::Core;
use super::Established;
use super::channel::Channel;
use super::established::{Active, Task, done};
use super::exchanges::Exchange;
use super::retry::{after, total};
use crate::engine::context::Context;
use crate::engine::{CloseReason, IkeSaId, IkeState};

/// A finished successor of an IKE SA. Its SPI is reserved for `id`.
pub(crate) struct Successor {
    pub(super) id: IkeSaId,
    pub(super) channel: Channel,
    /// The lower nonce of the exchange that made it.
    pub(super) lowest_nonce: Vec<u8>,
}

impl Established {
    /// Our rekey is finished. Of two successors the one with the lowest of the four nonces goes, by the hand of who
    /// made it; who made the other one deletes the old IKE SA (§2.8.2).
    pub(super) fn own_successor(&mut self, ctx: &mut Context, now: Instant, ours: Successor) {
        match self.peers_successor.take() {
            Some(theirs) if ours.lowest_nonce < theirs.lowest_nonce => {
                self.succeed(ctx, now, *theirs);
                self.await_delete(ctx, now);
                let mut redundant = self.redundant(ctx, now, ours);
                redundant.queue.push_back(Task::DeleteIke { token: None, reason: CloseReason::Rekeyed });
                ctx.spawned.push(redundant);
            }
            theirs => {
                self.succeed(ctx, now, ours);
                // §2.8: who rekeyed deletes the old one.
                self.queue.push_front(Task::DeleteIke { token: None, reason: CloseReason::Rekeyed });
                if let Some(theirs) = theirs {
                    let mut redundant = self.redundant(ctx, now, *theirs);
                    // The peer deletes it; if it never does, or never had it, we forget it.
                    redundant.await_delete(ctx, now);
                    ctx.spawned.push(redundant);
                }
            }
        }
    }

    /// The peer's rekey is finished, and it knows. With one of ours under way the two are compared later.
    pub(super) fn peer_rekeyed(&mut self, ctx: &mut Context, now: Instant, theirs: Successor) {
        if self.rekeys_ike() {
            let line = "detected simultaneous rekeying of the IKE_SA".to_owned();
            ctx.log("IKE", 1, self.core.tag(), line);
            self.peers_successor = Some(Box::new(theirs));
        } else {
            self.succeed(ctx, now, theirs);
            self.await_delete(ctx, now);
        }
    }

    /// Our own rekey came to nothing: the peer's successor takes over, if there is one.
    pub(super) fn adopt_peers_successor(&mut self, ctx: &mut Context, now: Instant) -> bool {
        let Some(theirs) = self.peers_successor.take() else { return false };
        let ours = self.take_exchange(|exchange| matches!(exchange.active, Active::RekeyIke(_)));
        if let Some(Exchange { active: Active::RekeyIke(offer), .. }) = ours {
            ctx.release_ike_spi(offer.spi);
            done(ctx, offer.token);
        }
        self.succeed(ctx, now, *theirs);
        self.await_delete(ctx, now);
        true
    }

    /// Nobody will have the peer's successor: the IKE SA ends while both sides rekey it.
    pub(super) fn drop_peers_successor(&mut self, ctx: &mut Context, now: Instant, tell: bool) {
        let Some(theirs) = self.peers_successor.take() else { return };
        ctx.release_ike_spi(theirs.channel.local_spi());
        if tell {
            let core = Core { id: theirs.id, ..self.core.clone() };
            ctx.say_farewell(now, theirs.channel, &core, CloseReason::Rekeyed);
        }
    }

    /// Hands the Child SAs and the tasks over.
    fn succeed(&mut self, ctx: &mut Context, now: Instant, successor: Successor) {
        let new = self.successor(ctx, now, successor.id, successor.channel);
        ctx.spawned.push(new);
    }

    /// A successor that lost: an IKE SA without Child SAs, for its Delete alone.
    fn redundant(&self, ctx: &mut Context, now: Instant, loser: Successor) -> Established {
        let core = Core { id: loser.id, ..self.core.clone() };
        let mut sa = self.twin(ctx, now, core, loser.channel);
        sa.become_rekeyed();
        let line = format!("IKE_SA {}[{}] is redundant", sa.core.name, sa.core.id.0);
        ctx.log("IKE", 1, sa.core.tag(), line);
        sa
    }

    /// The peer deletes this IKE SA; if it does not, we forget it.
    fn await_delete(&mut self, ctx: &Context, now: Instant) {
        let patience = total(&ctx.config.retransmission) + ctx.config.half_open_timeout;
        self.expire_at = Some(after(now, patience));
    }

    /// From here on it is only to be deleted.
    pub(super) fn become_rekeyed(&mut self) {
        self.state = IkeState::Rekeyed;
        (self.rekey_at, self.reauth_at, self.expire_at) = (None, None, None);
    }
}
