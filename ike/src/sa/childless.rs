//! IKE SAs without a Child SA in IKE_AUTH (RFC 6023): who may ask for one, and who must.

use ipsec::transform::Protocol;

use super::init::CHILDLESS_IKEV2_SUPPORTED;
use crate::config::{Childless, Connection};
use crate::wire::{Notify, Payload};

/// The responder's announcement in IKE_SA_INIT, where some connection that the peer may turn out to use admits it (§3).
pub(crate) fn announcement<'a>(mut candidates: impl Iterator<Item = &'a Connection>) -> Option<Payload> {
    let admitted = candidates.any(|connection| connection.childless != Childless::Never);
    // §4 wants protocol 1, unlike other notifications about an IKE SA.
    let notify = Notify { protocol: Protocol::IKE, spi: Vec::new(), kind: CHILDLESS_IKEV2_SUPPORTED, data: Vec::new() };
    admitted.then_some(Payload::Notify(notify))
}

/// Why a responder refuses an IKE_AUTH with, or without, a Child SA.
pub(crate) fn refusal(policy: Childless, with_child: bool) -> Option<&'static str> {
    match (policy, with_child) {
        (Childless::Never, false) => Some("the peer wants an IKE_SA without a CHILD_SA"),
        (Childless::Force, true) => Some("the peer did not initiate a childless IKE_SA"),
        (Childless::Allow | Childless::Prefer, _) | (Childless::Never, true) | (Childless::Force, false) => None,
    }
}

/// True when an initiator leaves the Child SA that it wants to CREATE_CHILD_SA, with a key exchange of its own.
pub(crate) fn defers_child(policy: Childless, peer_supports: bool) -> bool {
    match policy {
        Childless::Prefer | Childless::Force => peer_supports,
        Childless::Allow | Childless::Never => false,
    }
}

/// True when an initiator that wants no Child SA may leave it out; "MUST NOT … if the notification was not present" (§3).
pub(crate) fn may_leave_out(policy: Childless, peer_supports: bool) -> bool {
    peer_supports && policy != Childless::Never
}
