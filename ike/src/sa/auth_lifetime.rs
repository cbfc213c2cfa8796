//! When a peer has to authenticate again: AUTH_LIFETIME (RFC 4478), and reauthentication on demand.

use std::time::{Duration, Instant};

use super::Established;
use super::established::{Closed, done, failed};
use super::fault::notify;
use super::parts::Parts;
use super::retry::after;
use crate::engine::IkeState;
use crate::engine::context::Context;
use crate::wire::{NotifyType, Payload};

/// A peer that gives less than this makes us reauthenticate no more often.
const SHORTEST: Duration = Duration::from_secs(10);

impl Established {
    /// What a responder says in IKE_AUTH that has to leave reauthentication to the initiator (RFC 4478 §3).
    pub(super) fn auth_lifetime(&self, now: Instant) -> Option<Payload> {
        let left = self.reauth_at.filter(|_| !self.original_initiator)?.saturating_duration_since(now);
        let seconds = u32::try_from(left.as_secs()).unwrap_or(u32::MAX);
        Some(notify(NotifyType::AUTH_LIFETIME, seconds.to_be_bytes().to_vec()))
    }

    /// The responder says how long our authentication is good: we authenticate again before that, with a tenth of it
    /// to spare. What was planned for an earlier time stays.
    pub(super) fn note_auth_lifetime(&mut self, ctx: &mut Context, now: Instant, parts: &Parts) {
        let Some(notify) = parts.notify(NotifyType::AUTH_LIFETIME) else { return };
        let seconds = <[u8; 4]>::try_from(notify.data.as_slice()).map(u32::from_be_bytes);
        let (Ok(seconds), true) = (seconds, self.original_initiator) else {
            ctx.log("IKE", 1, self.core.tag(), "received invalid AUTH_LIFETIME, ignored".to_owned());
            return;
        };
        let lifetime = Duration::from_secs(seconds.into());
        let wait = lifetime.saturating_sub(lifetime / 10).max(SHORTEST);
        let at = after(now, wait);
        let line = match self.reauth_at.filter(|planned| *planned <= at) {
            Some(planned) => {
                let left = planned.saturating_duration_since(now).as_secs();
                format!("received AUTH_LIFETIME of {seconds}s, reauthentication already scheduled in {left}s")
            }
            None => {
                self.reauth_at = Some(at);
                let left = wait.as_secs();
                format!("received AUTH_LIFETIME of {seconds}s, scheduling reauthentication in {left}s")
            }
        };
        ctx.log("IKE", 1, self.core.tag(), line);
    }

    /// Reauthenticates now; only who initiated can. It is done when it has begun.
    pub(crate) fn reauthenticate_on_demand(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        token: u64,
    ) -> Result<(), Closed> {
        let refused = match self.state {
            IkeState::Established if self.original_initiator => None,
            IkeState::Established => Some("the peer initiated, so it is the one to reauthenticate"),
            _ => Some("the IKE_SA is busy or closing"),
        };
        if let Some(reason) = refused {
            ctx.log("IKE", 1, self.core.tag(), reason.to_owned());
            failed(ctx, Some(token), &self.core.name, None, reason);
            return Ok(());
        }
        if !self.reauthenticating {
            self.reauthenticate(ctx);
        }
        done(ctx, Some(token));
        self.pump(ctx, now)
    }
}
