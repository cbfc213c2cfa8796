//! Reauthentication (RFC 7296 §2.8.3): a new IKE SA from scratch in place of one whose proof is too old. The old one
//! goes first, or with `charon.make_before_break` when the new one has its Child SAs. The same, always with the new one
//! first, replaces what the peer refuses to rekey (§4).

use std::sync::Arc;
use std::time::Instant;

use super::Established;
use super::established::{Closed, Task, done};
use super::retry::{after, back_off};
use crate::engine::context::Context;
use crate::engine::{ChildState, CloseReason, IkeSaId, IkeState, Initiate, Transport};

/// An IKE SA that another one is being made for.
#[derive(Clone, Debug)]
pub(crate) struct Reauthentication {
    /// What takes its place: an attempt at first.
    pub(crate) new: IkeSaId,
    /// The new one lacks Child SAs that the peer refuses it; the old one asks again in a while.
    pub(crate) waits: bool,
    /// What is begun anew if the new one comes to nothing, the old one having ended meanwhile.
    pub(crate) rest: Vec<Initiate>,
    /// It is to bring an IKE SA back from a stream to UDP.
    pub(crate) returns: bool,
    /// Its proof went out, and no answer came: the peer may have it.
    pub(crate) answer_lost: bool,
}

/// An IKE SA that another one is to be made for.
#[derive(Debug)]
pub(crate) struct Replacement {
    pub(crate) old: IkeSaId,
    /// What the new one is asked for.
    pub(crate) requests: Vec<Initiate>,
    /// Only if UDP gets through.
    pub(crate) returns: bool,
}

impl Established {
    /// The time for it has come. The responder leaves it to the initiator, and to the hard limit.
    pub(super) fn reauthenticate(&mut self, ctx: &mut Context) {
        if !(self.original_initiator || self.rekeyless) || self.moving.is_some() {
            return;
        }
        self.reauthenticating = true;
        // RFC 5723 §6.2: a ticket would prove nothing anew.
        ctx.shared.tickets.lock().drop_all_held(&self.core.name);
        if !ctx.config.make_before_break && !self.rekeyless {
            self.queue.push_front(Task::DeleteIke { token: None, reason: CloseReason::Local });
            return;
        }
        let line = format!("reauthenticating IKE_SA {}[{}]", self.core.name, self.core.id.0);
        ctx.log("IKE", 0, self.core.tag(), line);
        self.makes_first = true;
        ctx.replacements.push(Replacement { old: self.core.id, requests: self.everything_again(), returns: false });
    }

    /// The peer refuses to rekey this IKE SA, or one of its Child SAs, with NO_ADDITIONAL_SAS: a new IKE SA with its Child
    /// SAs takes the place of both (§4). False where that is for the peer to do.
    pub(super) fn replace_unrekeyable(&mut self, ctx: &mut Context, token: Option<u64>) -> bool {
        if self.moving.is_some() || self.state != IkeState::Established || !self.can_initiate() {
            return false;
        }
        self.rekeyless = true;
        if !self.reauthenticating {
            ctx.log("IKE", 1, self.core.tag(), "the peer does not rekey, making a new IKE_SA instead".to_owned());
            self.reauthenticate(ctx);
        }
        done(ctx, token);
        true
    }

    /// True when we can make another IKE SA with this peer: we made this one, or nothing speaks against asking the peer
    /// where it is.
    fn can_initiate(&self) -> bool {
        let reachable = !self.core.nat.remote && !matches!(self.core.path.transport, Transport::Stream(_));
        self.original_initiator || (reachable && self.core.assigned.is_none())
    }

    /// The life of this IKE SA or of one of its Child SAs ends. Where the peer does not rekey and took no other IKE SA beside
    /// this one, there is another one afterwards.
    pub(super) fn expire(&mut self, ctx: &mut Context, now: Instant) -> Closed {
        if self.rekeyless && !self.makes_first {
            self.reauthenticating = true;
        } else if self.rekeyless
            && let Some(entry) = ctx.reauthentications.get_mut(self.core.id)
        {
            entry.rest = self.everything_again();
        }
        self.farewell(ctx, now, CloseReason::Expired)
    }

    /// Requests that make an IKE SA with the same Child SAs.
    pub(crate) fn everything_again(&self) -> Vec<Initiate> {
        let mut names = std::collections::BTreeSet::new();
        let live = self.children.iter().filter(|child| child.is_live() && names.insert(child.config.name.clone()));
        let mut wanted: Vec<_> = live.map(|child| Some(Arc::clone(&child.config))).collect();
        if wanted.is_empty() {
            wanted.push(None);
        }
        let again = |child| Initiate {
            connection: Arc::clone(&self.connection),
            child,
            local: self.core.path.local.ip(),
            remote: self.core.path.remote.ip(),
            token: u64::MAX,
        };
        wanted.into_iter().map(again).collect()
    }

    /// Its successor takes its place as the one that is being reauthenticated, and as the one that is made for that.
    pub(super) fn hand_reauthentication_on(&self, ctx: &mut Context, new: &mut Self) {
        new.original_initiator = self.original_initiator;
        (new.reauthenticating, new.makes_first) = (self.reauthenticating, self.makes_first);
        new.replacement_tries = self.replacement_tries;
        ctx.reauthentications.goes_on_as(self.core.id, new.core.id);
    }

    /// The new IKE SA has everything: this one goes.
    pub(crate) fn reauthenticated(&mut self, ctx: &mut Context, now: Instant) -> Result<(), Closed> {
        self.reauthenticating = false;
        self.queue.push_front(Task::DeleteIke { token: None, reason: CloseReason::Local });
        self.pump(ctx, now)
    }

    /// True while a new IKE SA is wanted for its own sake.
    pub(crate) fn is_reauthenticating(&self) -> bool {
        self.reauthenticating
    }

    /// There will be no new IKE SA: this one goes on, and tries again.
    pub(crate) fn reauthentication_failed(&mut self, ctx: &mut Context, now: Instant) {
        let line =
            format!("reauthentication of IKE_SA {}[{}] failed, trying again later", self.core.name, self.core.id.0);
        ctx.log("IKE", 1, self.core.tag(), line);
        (self.reauthenticating, self.makes_first) = (false, false);
        self.try_replacing_again(ctx, now);
    }

    /// The new IKE SA is up, and the peer refuses it a Child SA that works here: this one stays for that until its end, and
    /// the new one asks again.
    pub(crate) fn succeeded_in_part(&mut self, ctx: &mut Context, now: Instant) {
        let line = format!("IKE_SA {}[{}] stays, its successor lacks a CHILD_SA of it", self.core.name, self.core.id.0);
        ctx.log("IKE", 1, self.core.tag(), line);
        self.try_replacing_again(ctx, now);
    }

    fn try_replacing_again(&mut self, ctx: &mut Context, now: Instant) {
        self.reauth_at = Some(after(now, back_off(self.replacement_tries, ctx.rng.as_mut())));
        self.replacement_tries = self.replacement_tries.saturating_add(1);
    }

    /// Names of the Child SAs that carry traffic.
    pub(crate) fn working(&self) -> std::collections::BTreeSet<&str> {
        let works = |state| matches!(state, ChildState::Installed | ChildState::Rekeying);
        self.children.iter().filter(|child| works(child.state)).map(|child| child.config.name.as_str()).collect()
    }

    /// True when it makes no Child SAs that were asked for.
    pub(crate) fn has_all(&self) -> bool {
        let creates = |task: &Task| matches!(task, Task::CreateChild { .. });
        self.state == IkeState::Established
            && !self.is_creating()
            && !self.queue.iter().any(creates)
            && !self.delayed.iter().any(|(_, task)| creates(task))
    }
}
