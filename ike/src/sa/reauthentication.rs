//! Reauthentication (RFC 7296 §2.8.3): a new IKE SA from scratch in place of one whose proof is too old. The old one
//! goes first, or with `charon.make_before_break` when the new one has its Child SAs.

use std::sync::Arc;
use std::time::Instant;

use super::Established;
use super::established::{Closed, Task};
use super::retry::{after, back_off};
use crate::engine::context::{Context, PeerKey};
use crate::engine::{CloseReason, IkeSaId, IkeState, Initiate};

/// An IKE SA that another one is being made for.
#[derive(Clone, Debug)]
pub(crate) struct Reauthentication {
    pub(crate) old: IkeSaId,
    /// Connection's name.
    pub(crate) connection: String,
    pub(crate) peer: PeerKey,
}

impl Established {
    /// The time for it has come. The responder leaves it to the initiator, and to the hard limit.
    pub(super) fn reauthenticate(&mut self, ctx: &mut Context) {
        if !self.original_initiator || self.moving.is_some() {
            return;
        }
        self.reauthenticating = true;
        if !ctx.config.make_before_break {
            self.queue.push_front(Task::DeleteIke { token: None, reason: CloseReason::Local });
            return;
        }
        let line = format!("reauthenticating IKE_SA {}[{}]", self.core.name, self.core.id.0);
        ctx.log("IKE", 0, self.core.tag(), line);
        self.makes_first = true;
        ctx.reauthentications.push(Reauthentication {
            old: self.core.id,
            connection: self.core.name.clone(),
            peer: PeerKey::of(&self.peer),
        });
        let again = self.everything_again();
        ctx.reinitiate.extend(again);
    }

    /// Requests that make an IKE SA with the same Child SAs.
    pub(super) fn everything_again(&self) -> Vec<Initiate> {
        let mut names = std::collections::BTreeSet::new();
        let live = self.children.values().filter(|child| child.is_live() && names.insert(child.config.name.clone()));
        let mut wanted: Vec<_> = live.map(|child| Some(Arc::clone(&child.config))).collect();
        if wanted.is_empty() && self.makes_first {
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

    /// Its successor takes its place as the one that is being reauthenticated.
    pub(super) fn hand_reauthentication_on(&self, ctx: &mut Context, new: &mut Self) {
        new.original_initiator = self.original_initiator;
        (new.reauthenticating, new.makes_first) = (self.reauthenticating, self.makes_first);
        for entry in ctx.reauthentications.iter_mut().filter(|entry| entry.old == self.core.id) {
            entry.old = new.core.id;
        }
    }

    /// The new IKE SA has everything: this one goes.
    pub(crate) fn reauthenticated(&mut self, ctx: &mut Context, now: Instant) -> Result<(), Closed> {
        self.reauthenticating = false;
        self.queue.push_front(Task::DeleteIke { token: None, reason: CloseReason::Local });
        self.pump(ctx, now)
    }

    /// There will be no new IKE SA: this one goes on, and tries again.
    pub(crate) fn reauthentication_failed(&mut self, ctx: &mut Context, now: Instant) {
        let line =
            format!("reauthentication of IKE_SA {}[{}] failed, trying again later", self.core.name, self.core.id.0);
        ctx.log("IKE", 1, self.core.tag(), line);
        (self.reauthenticating, self.makes_first) = (false, false);
        self.reauth_at = Some(after(now, back_off(0, ctx.rng.as_mut())));
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
