//! Post-quantum preshared keys (RFC 8784): a secret that both have is mixed into SK_d, SK_pi and SK_pr at the end of
//! the initial exchanges, and never again.

use ipsec::secret::Secret;
use pad::{Identity, Ppk};

use super::channel::Channel;
use super::fault::notify;
use super::parts::Parts;
use crate::config::Connection;
use crate::crypto::{self, KeyError};
use crate::engine::context::Context;
use crate::wire::{NotifyType, Payload};

/// PPK_ID_FIXED (§5.1): the rest is a configured value.
const FIXED: u8 = 2;

/// What the log says of a PPK that is configured and was not used (§6).
pub(super) const UNUSED: &str = "the peer does without the configured PPK";

/// SK_d, SK_pi and SK_pr without a PPK.
pub(crate) struct Unmixed {
    d: Secret,
    pi: Secret,
    pr: Secret,
}

/// The PPK that we use with a connection's peer, as initiator.
pub(crate) fn of_connection(ctx: &Context, connection: &Connection) -> Option<(Identity, Ppk)> {
    let id = connection.ppk_id.as_ref()?.as_exact()?;
    Some((id.clone(), by_id(ctx, id)?))
}

/// Says that we want to use a PPK, or have one for who does.
pub(crate) fn offer() -> Payload {
    notify(NotifyType::USE_PPK, Vec::new())
}

/// PPK_IDENTITY of a request.
pub(crate) fn identity(id: &Identity) -> Payload {
    let mut data = vec![FIXED];
    data.extend_from_slice(&id.wire_data());
    notify(NotifyType::PPK_IDENTITY, data)
}

/// The PPK_ID that an initiator names, and the PPK if we have it; `None` where the notify is missing.
pub(crate) fn named(ctx: &Context, parts: &Parts) -> Option<Option<(Identity, Ppk)>> {
    let notify = parts.notify(NotifyType::PPK_IDENTITY)?;
    let id = match notify.data.split_first() {
        Some((&FIXED, text)) => std::str::from_utf8(text).ok().and_then(|text| Identity::parse(text).ok()),
        _ => None,
    };
    Some(id.and_then(|id| {
        let ppk = by_id(ctx, &id)?;
        Some((id, ppk))
    }))
}

fn by_id(ctx: &Context, id: &Identity) -> Option<Ppk> {
    ctx.ppks.iter().find(|ppk| ppk.has_id(id)).cloned()
}

impl Channel {
    /// Mixes a PPK into SK_d, SK_pi and SK_pr; gives what they were.
    pub(crate) fn mix(&mut self, ppk: &Ppk) -> Result<Unmixed, KeyError> {
        let mixed = |key: &Secret| crypto::mix_ppk(self.suite.prf, ppk.secret(), key);
        let (d, pi, pr) = (mixed(&self.d)?, mixed(&self.pi)?, mixed(&self.pr)?);
        Ok(Unmixed {
            d: std::mem::replace(&mut self.d, d),
            pi: std::mem::replace(&mut self.pi, pi),
            pr: std::mem::replace(&mut self.pr, pr),
        })
    }

    /// The peer goes on without the PPK.
    pub(crate) fn unmix(&mut self, before: Unmixed) {
        (self.d, self.pi, self.pr) = (before.d, before.pi, before.pr);
    }
}
