//! What the shards of one engine share (`docs/architecture.md`, *Shards*): which IKE SAs a peer has, which SPIs are ours, who uses
//! a stream, what strangers may cost, tickets, pools and counts.
//!
//! Each table has a lock of its own, which is held for one step on that table and never while another one is taken; what must not
//! come apart, looking and entering above all, is one step. With one shard nobody ever waits.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use ipsec::plane::StreamId;
use pad::Identity;

use super::IkeSaId;
use super::context::PeerKey;
use super::defence::Defence;
use super::networks::Networks;
use super::shards::Numbering;
use super::tickets::Tickets;
use super::upkeep::Fragments;
use crate::counters::Counters;
use crate::pool::Pools;
use crate::sa::crash::Throttle;

/// A lock that is held for one step.
#[derive(Debug, Default)]
pub(crate) struct Short<T>(Mutex<T>);

impl<T> Short<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(Mutex::new(value))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        // No step can be interrupted half way, so what a shard that panicked leaves is whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All of it.
pub(crate) struct Shared {
    pub(crate) spis: Spis,
    pub(crate) peers: Directory,
    pub(crate) streams: Streams,
    pub(crate) defence: Short<Defence>,
    pub(crate) fragments: Fragments,
    /// Of session resumption (RFC 5723).
    pub(crate) tickets: Short<Tickets>,
    pub(crate) pools: Short<Pools>,
    /// Where only streams get through.
    pub(crate) networks: Short<Networks>,
    /// The virtual addresses that we last had, by connection.
    pub(crate) former_addresses: Short<BTreeMap<String, Vec<IpAddr>>>,
    pub(crate) counters: Counters,
    /// Tokens of quick crash detection that we show.
    pub(crate) tokens_shown: Short<Throttle>,
    /// IKE SAs that there are, and jobs that are out.
    pub(crate) ike_sas: AtomicUsize,
    pub(crate) jobs: AtomicUsize,
}

impl Shared {
    pub(crate) fn new(shards: usize, defence: Defence) -> Self {
        Self {
            spis: Spis::new(shards),
            peers: Directory::default(),
            streams: Streams::default(),
            defence: Short::new(defence),
            fragments: Fragments::default(),
            tickets: Short::default(),
            pools: Short::default(),
            networks: Short::default(),
            former_addresses: Short::default(),
            counters: Counters::default(),
            tokens_shown: Short::default(),
            ike_sas: AtomicUsize::new(0),
            jobs: AtomicUsize::new(0),
        }
    }

    /// IKE SAs, and jobs that are out.
    pub(crate) fn load(&self) -> (usize, usize) {
        (self.ike_sas.load(Ordering::Relaxed), self.jobs.load(Ordering::Relaxed))
    }
}

/// Our SPIs of IKE SAs, each with its IKE SA: a table for each shard, which that shard alone changes. The others look whether an
/// SPI is one of ours, where something may be said only if it is not.
pub(crate) struct Spis(Vec<Short<BTreeMap<u64, IkeSaId>>>);

impl Spis {
    fn new(shards: usize) -> Self {
        Self((0..shards).map(|_| Short::default()).collect())
    }

    fn table(&self, spi: u64) -> Option<&Short<BTreeMap<u64, IkeSaId>>> {
        self.0.get(Numbering::shard_of_spi(self.0.len(), spi))
    }

    /// The IKE SA that has this SPI.
    pub(crate) fn get(&self, spi: u64) -> Option<IkeSaId> {
        self.table(spi)?.lock().get(&spi).copied()
    }

    pub(crate) fn contains(&self, spi: u64) -> bool {
        self.get(spi).is_some()
    }

    /// The SPI is this IKE SA's from now on.
    pub(crate) fn set(&self, spi: u64, owner: IkeSaId) {
        if let Some(table) = self.table(spi) {
            table.lock().insert(spi, owner);
        }
    }

    pub(crate) fn release(&self, spi: u64) {
        if let Some(table) = self.table(spi) {
            table.lock().remove(&spi);
        }
    }

    /// How many a shard has.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn len_of(&self, shard: usize) -> usize {
        self.0.get(shard).map_or(0, |table| table.lock().len())
    }
}

/// Which established IKE SAs each peer has.
#[derive(Default)]
pub(crate) struct Directory(Short<BTreeSet<(PeerKey, IkeSaId)>>);

/// The IKE SAs of a peer.
fn of<'a>(all: &'a BTreeSet<(PeerKey, IkeSaId)>, peer: &PeerKey) -> impl Iterator<Item = IkeSaId> + use<'a> {
    let (from, to) = ((peer.clone(), IkeSaId(0)), (peer.clone(), IkeSaId(u64::MAX)));
    all.range(from..=to).map(|(_, id)| *id)
}

impl Directory {
    /// An IKE SA with this peer is up.
    pub(crate) fn enter(&self, peer: &PeerKey, id: IkeSaId) {
        self.0.lock().insert((peer.clone(), id));
    }

    /// It is no longer.
    pub(crate) fn leave(&self, peer: PeerKey, id: IkeSaId) {
        self.0.lock().remove(&(peer, id));
    }

    /// True when there is an IKE SA between these identities, whichever entry admitted the peer.
    pub(crate) fn knows(&self, local: &Identity, remote: &Identity) -> bool {
        let prefix = PeerKey::of_identities(local, remote);
        let from = (prefix.clone(), IkeSaId(0));
        self.0.lock().range(from..).next().is_some_and(|(key, _)| key.starts_with(&prefix))
    }

    /// True when the peer has an IKE SA other than this one.
    pub(crate) fn has_other(&self, peer: &PeerKey, but: Option<IkeSaId>) -> bool {
        of(&self.0.lock(), peer).any(|other| Some(other) != but)
    }

    /// Enters unless the peer has an IKE SA other than this one: of two that come at once, one is entered.
    pub(crate) fn enter_alone(&self, peer: &PeerKey, id: IkeSaId, but: Option<IkeSaId>) -> bool {
        let mut all = self.0.lock();
        let alone = !of(&all, peer).any(|other| other != id && Some(other) != but);
        if alone {
            all.insert((peer.clone(), id));
        }
        alone
    }

    /// Enters, and takes out all others of the peer but those that stay. These have to go: each is named once.
    pub(crate) fn take_over(&self, peer: &PeerKey, id: IkeSaId, stays: impl Fn(IkeSaId) -> bool) -> Vec<IkeSaId> {
        let mut all = self.0.lock();
        let others: Vec<IkeSaId> = of(&all, peer).filter(|other| *other != id && !stays(*other)).collect();
        for other in &others {
            all.remove(&(peer.clone(), *other));
        }
        all.insert((peer.clone(), id));
        others
    }

    /// A successor by rekeying takes its predecessor's place; there is no moment at which the peer has neither. False where the
    /// predecessor was taken out meanwhile: then the successor has to go.
    pub(crate) fn succeed(&self, peer: &PeerKey, old: IkeSaId, new: IkeSaId) -> bool {
        let mut all = self.0.lock();
        let there = all.remove(&(peer.clone(), old));
        if there {
            all.insert((peer.clone(), new));
        }
        there
    }

    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn all(&self) -> BTreeSet<(PeerKey, IkeSaId)> {
        self.0.lock().clone()
    }
}

/// Who uses the streams.
#[derive(Default)]
pub(crate) struct Streams(Short<BTreeMap<StreamId, StreamUse>>);

#[derive(Default)]
struct StreamUse {
    users: BTreeSet<IkeSaId>,
    /// We opened it.
    originator: bool,
    /// The peer's, and nothing uses it any more: we close it then.
    closes_at: Option<Instant>,
}

/// What becomes of a stream that an IKE SA leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Left {
    /// Others use it.
    Used,
    /// It is ours to close, now.
    Closes,
    /// The peer closes it, or we after a while.
    Lingers,
}

impl Streams {
    /// An IKE SA uses a stream. Gives the time at which it would have been closed.
    pub(crate) fn join(&self, stream: StreamId, id: IkeSaId, originator: bool) -> Option<Instant> {
        let mut streams = self.0.lock();
        let entry = streams.entry(stream).or_default();
        entry.users.insert(id);
        entry.originator = originator;
        entry.closes_at.take()
    }

    /// An IKE SA does not use it any more.
    pub(crate) fn leave(&self, stream: StreamId, id: IkeSaId, until: Instant) -> Left {
        let mut streams = self.0.lock();
        let Some(entry) = streams.get_mut(&stream).filter(|entry| !entry.users.is_empty()) else { return Left::Used };
        entry.users.remove(&id);
        if !entry.users.is_empty() {
            return Left::Used;
        }
        if entry.originator {
            streams.remove(&stream);
            return Left::Closes;
        }
        entry.closes_at = Some(until);
        Left::Lingers
    }

    /// True when the time to close it has come, and nobody has used it since that was decided.
    pub(crate) fn is_over(&self, stream: StreamId, at: Instant) -> bool {
        let mut streams = self.0.lock();
        let over = streams.get(&stream).is_some_and(|entry| entry.closes_at == Some(at));
        if over {
            streams.remove(&stream);
        }
        over
    }

    pub(crate) fn is_used(&self, stream: StreamId) -> bool {
        self.0.lock().get(&stream).is_some_and(|entry| !entry.users.is_empty())
    }

    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.0.lock().is_empty()
    }

    /// Those of its users that a shard has.
    pub(crate) fn users(&self, stream: StreamId, ours: impl Fn(IkeSaId) -> bool) -> Vec<IkeSaId> {
        let streams = self.0.lock();
        streams.get(&stream).into_iter().flat_map(|entry| &entry.users).copied().filter(|id| ours(*id)).collect()
    }

    /// The stream has ended; gives those of its users that a shard has, which use it no longer, and the time at which it would
    /// have been closed.
    pub(crate) fn ended(&self, stream: StreamId, ours: impl Fn(IkeSaId) -> bool) -> (Vec<IkeSaId>, Option<Instant>) {
        let mut streams = self.0.lock();
        let Some(entry) = streams.get_mut(&stream) else { return (Vec::new(), None) };
        let users: Vec<IkeSaId> = entry.users.iter().copied().filter(|id| ours(*id)).collect();
        entry.users.retain(|id| !ours(*id));
        let closes_at = entry.closes_at;
        if entry.users.is_empty() {
            streams.remove(&stream);
        }
        (users, closes_at)
    }
}
