//! What the authentication of an IKE SA rests on. It stays with all that follows from the IKE SA by rekeying and by
//! tickets, so that neither makes a proof younger or wider than it was (RFC 5723 §6.2).

use std::sync::Arc;
use std::time::{Duration, Instant};

use pad::{Identity, PeerIdentity, Proof};

use super::local_identity;
use super::retry::after;
use crate::config::Connection;
use crate::engine::Path;
use crate::engine::context::Context;

#[derive(Clone, Debug)]
pub(crate) struct Basis {
    /// When the peer proved who it is.
    pub(crate) proved_at: Instant,
    /// When the first certificate of the peer's chain ends.
    pub(crate) good_until: Option<Instant>,
    /// Certificates of that chain between the two that the peer's proof has (DER).
    pub(crate) intermediates: Vec<Vec<u8>>,
    /// The tickets' epoch when the peer's proof was handed out to be checked.
    pub(crate) epoch: u64,
    /// Connections that named the peer most narrowly and fitted the addresses then, in order: the PAD as it decided.
    pub(crate) rivals: Vec<Arc<Connection>>,
    /// A PPK is in the keys (RFC 8784).
    pub(crate) uses_ppk: bool,
    /// This IKE SA was resumed with a ticket, it or one that it was rekeyed from.
    pub(crate) resumed: bool,
}

impl Basis {
    /// Before the peer's proof is checked.
    pub(crate) fn new(ctx: &Context, now: Instant, rivals: Vec<Arc<Connection>>, uses_ppk: bool) -> Self {
        let epoch = ctx.shared.tickets.lock().epoch();
        Self { proved_at: now, good_until: None, intermediates: Vec::new(), epoch, rivals, uses_ppk, resumed: false }
    }

    /// The proof is good, for so long.
    pub(crate) fn proved(self, now: Instant, good_for: Option<Duration>, intermediates: Vec<Vec<u8>>) -> Arc<Self> {
        let good_until = good_for.map(|time| after(now, time));
        Arc::new(Self { proved_at: now, good_until, intermediates, ..self })
    }

    /// Of an IKE SA that this one's ticket brought back.
    pub(crate) fn resumed(&self) -> Arc<Self> {
        Arc::new(Self { resumed: true, ..self.clone() })
    }

    /// True while what was proved then would do for this connection now, as far as time and keys go.
    pub(crate) fn is_good_at(&self, now: Instant, connection: &Connection) -> bool {
        let reauthentication = connection.reauth_time;
        let too_old = !reauthentication.is_zero() && after(self.proved_at, reauthentication) <= now;
        let over = self.good_until.is_some_and(|until| until <= now);
        !too_old && !over && (self.uses_ppk || !connection.ppk_required)
    }
}

/// Connections that name this peer most narrowly and fit the addresses: among these IKE_AUTH decides. Of all connections,
/// those that name the peer most narrowly say how it is proved (RFC 4301 §4.4.3).
pub(crate) fn rivals(ctx: &Context, path: &Path, peer: &Identity) -> Vec<Arc<Connection>> {
    let narrowest = ctx.connections.narrowest(peer);
    let names = |connection: &Arc<Connection>| connection.remote.proved_id().match_specificity(peer);
    let admitting = ctx.connections.admitting(path).into_iter().map(|admitting| admitting.connection);
    admitting.filter(|connection| narrowest.is_some() && names(connection) == narrowest).collect()
}

/// The connection that admits a peer by what it proved earlier: the one of then, where IKE_AUTH along this path would
/// have the same choice now, and nothing that it depends on has changed.
pub(crate) fn readmits(
    ctx: &Context,
    now: Instant,
    path: &Path,
    admitted_by: &Connection,
    peer: &PeerIdentity,
    basis: &Basis,
) -> Result<Arc<Connection>, &'static str> {
    // Which connections there were to choose from, by the identity that EAP proved, is not kept.
    if matches!(peer.proof, Proof::Eap { .. }) {
        return Err("EAP has to be done anew");
    }
    if basis.epoch != ctx.shared.tickets.lock().epoch() {
        return Err("credentials have changed");
    }
    let rivals = rivals(ctx, path, &peer.id);
    let same = rivals.len() == basis.rivals.len()
        && rivals.iter().zip(&basis.rivals).all(|(now, then)| then.authenticates_as(now));
    let connection = rivals.iter().find(|connection| admitted_by.authenticates_as(connection));
    let Some(connection) = connection.filter(|_| same) else { return Err("the configuration has changed") };
    if !connection.session_resumption {
        return Err("the connection does not resume sessions");
    }
    if local_identity(connection, path) != peer.local_id {
        return Err("our identity is another one there");
    }
    if !basis.is_good_at(now, connection) {
        return Err("what was proved is too old");
    }
    Ok(Arc::clone(connection))
}
