//! Flows that a Child SA must not get, since they are pinned to somebody else or to other protection (RFC 5660 §2.3): its selectors
//! go around them where selectors can say it.

use std::fmt;
use std::sync::Arc;

use ipsec::exclusion::around;
use ipsec::plane::{EspSuite, Mode};
use ipsec::selector::{Flow, TrafficSelector};
use ipsec::transform::Proposal;
use pad::{Identity, IdentityPattern, PeerIdentity};

use super::context::Context;
use crate::sa::selectors::Selectors;

/// Whom a Child SA will be with.
#[derive(Clone, Copy, Debug)]
pub enum Party<'a> {
    /// Who has proved who it is.
    Proved(&'a Arc<PeerIdentity>),
    /// Who will have to.
    Expected {
        /// Whom the connection admits.
        remote: &'a IdentityPattern,
        /// Who we say that we are.
        local: &'a Identity,
    },
}

/// Which protection it will have.
#[derive(Clone, Copy, Debug)]
pub enum Protection<'a> {
    /// This.
    Chosen(EspSuite),
    /// What the peer chooses of these.
    Offered(&'a [Proposal]),
}

/// A Child SA that is about to be negotiated.
#[derive(Clone, Copy, Debug)]
pub struct Prospect<'a> {
    /// With whom.
    pub party: Party<'a>,
    /// Tunnel or transport.
    pub mode: Mode,
    /// Protected how.
    pub protection: Protection<'a>,
    /// With replay protection.
    pub replay_protection: bool,
    /// Our selectors.
    pub local_ts: &'a [TrafficSelector],
    /// The peer's.
    pub remote_ts: &'a [TrafficSelector],
}

/// Knows the flows that are pinned. Asked by the engine's shards, each from a thread of its own: it must not block.
pub trait Reservations: Send + Sync {
    /// Flows within the selectors that a Child SA of this kind would betray, and that it is better made without.
    fn reserved(&self, prospect: &Prospect<'_>) -> Vec<Flow>;
}

/// Somebody who reserves flows, or nobody.
pub(crate) struct Reserved(pub(crate) Arc<dyn Reservations>);

impl fmt::Debug for Reserved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reserved").finish_non_exhaustive()
    }
}

impl Context {
    /// The prospect's selectors around what is reserved; as they are where that cannot be. What a predecessor had, its successor
    /// gets as well (RFC 7296 §2.9.2).
    pub(crate) fn around_reserved(
        &self,
        prospect: &Prospect<'_>,
        predecessor: Option<&Selectors>,
    ) -> Option<Selectors> {
        let Reserved(reservations) = self.shared.reservations.get()?;
        let mut flows = reservations.reserved(prospect);
        flows.retain(|flow| predecessor.is_none_or(|old| !old.selects(flow)));
        if flows.is_empty() {
            return None;
        }
        let (local, remote) = around(prospect.local_ts, prospect.remote_ts, &flows)?;
        tracing::debug!(flows = flows.len(), "traffic selectors go around latched flows");
        Some(Selectors { local, remote })
    }
}
