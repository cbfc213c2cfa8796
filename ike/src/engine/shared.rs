//! What the shards of one engine share (`docs/architecture.md`, *Shards*): which IKE SAs a peer has, which SPIs are ours, who uses
//! a stream, what strangers may cost, tickets, pools and counts.
//!
//! Each table has a lock of its own, which is held for one step on that table and never while another one is taken; what must not
//! come apart, looking and entering above all, is one step. With one shard nobody ever waits.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use ipsec::plane::StreamId;
use pad::Identity;

use super::IkeSaId;
use super::context::PeerKey;
use super::defence::Defence;
use super::networks::Networks;
use super::reservations::Reserved;
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
    /// Flows that Child SAs must not get.
    pub(crate) reservations: OnceLock<Reserved>,
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
            reservations: OnceLock::new(),
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

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;
    use std::thread;

    use super::*;
    use crate::engine::defence::Limits;
    use crate::engine::tests::TestRng;

    const THREADS: u64 = 4;

    /// Runs this in several threads at once.
    fn at_once(work: impl Fn(u64) + Sync) {
        let barrier = std::sync::Barrier::new(usize::try_from(THREADS).unwrap());
        thread::scope(|scope| {
            for n in 0..THREADS {
                let (barrier, work) = (&barrier, &work);
                scope.spawn(move || {
                    barrier.wait();
                    work(n);
                });
            }
        });
    }

    fn peer(name: &str) -> PeerKey {
        let id = |name: &str| Identity::Fqdn(name.to_owned());
        PeerKey::of_identities(&id("gateway"), &id(name))
    }

    // RFC 7296 §2.4, `unique`: of those that come at the same time in different threads one is entered, and one is left.
    #[test]
    fn threads_do_not_enter_a_peer_twice() {
        for round in 0..200 {
            let directory = Directory::default();
            let (key, entered) = (peer("a"), AtomicU64::new(0));
            at_once(|n| {
                if directory.enter_alone(&key, IkeSaId(n + 1), None) {
                    entered.fetch_add(1, Ordering::Relaxed);
                }
            });
            assert_eq!(entered.load(Ordering::Relaxed), 1, "round {round}");
            let named = AtomicU64::new(0);
            at_once(|n| {
                let others = directory.take_over(&key, IkeSaId(n + 10), |_| false);
                named.fetch_add(u64::try_from(others.len()).unwrap(), Ordering::Relaxed);
            });
            // One of them is left, and all others were named once.
            assert_eq!((directory.all().len(), named.load(Ordering::Relaxed)), (1, THREADS), "round {round}");
        }
    }

    // A successor and one that takes the peer over: nobody stays whom nobody has named.
    #[test]
    fn a_successor_stays_in_place_or_goes_with_its_predecessor() {
        let key = peer("a");
        for _ in 0..200 {
            let directory = Directory::default();
            directory.enter(&key, IkeSaId(1));
            let (followed, named) = (AtomicU64::new(0), Short::new(Vec::new()));
            at_once(|n| match n {
                0 => followed.store(directory.succeed(&key, IkeSaId(1), IkeSaId(2)).into(), Ordering::Relaxed),
                1 => *named.lock() = directory.take_over(&key, IkeSaId(3), |_| false),
                _ => assert!(!directory.enter_alone(&key, IkeSaId(n + 10), None), "there is a moment with nobody"),
            });
            let expected = if followed.load(Ordering::Relaxed) == 1 { IkeSaId(2) } else { IkeSaId(1) };
            assert_eq!(*named.lock(), [expected]);
            assert_eq!(directory.all().into_iter().collect::<Vec<_>>(), [(key.clone(), IkeSaId(3))]);
        }
    }

    #[test]
    fn identities_are_found_under_any_entry_and_no_others() {
        let directory = Directory::default();
        let id = |name: &str| Identity::Fqdn(name.to_owned());
        directory.enter(&peer("ab"), IkeSaId(1));
        assert!(directory.knows(&id("gateway"), &id("ab")));
        assert!(!directory.knows(&id("gateway"), &id("a")) && !directory.knows(&id("gateway"), &id("abc")));
        assert!(!directory.has_other(&peer("ab"), Some(IkeSaId(1))) && directory.has_other(&peer("ab"), None));
        directory.leave(peer("ab"), IkeSaId(1));
        assert!(!directory.knows(&id("gateway"), &id("ab")));
    }

    // RFC 7296 §2.6: the last place is given away once.
    #[test]
    fn threads_do_not_take_the_last_place_twice() {
        let now = Instant::now();
        let limits = Limits { half_open: 10, block: 0, ike_sas: 0, jobs: usize::MAX };
        for seed in 0..100 {
            let defence = Short::new(Defence::new(now, 0, &mut TestRng::new(seed)));
            let served = AtomicU64::new(0);
            at_once(|n| {
                for host in 0..8 {
                    let from = IpAddr::from([192, 0, 2, u8::try_from(n * 8 + host).unwrap()]);
                    let begun = defence.lock().begin_serving(now, from, limits, (0, 0)).is_ok();
                    served.fetch_add(begun.into(), Ordering::Relaxed);
                }
            });
            assert_eq!(served.load(Ordering::Relaxed), 10);
        }
    }

    #[test]
    fn a_stream_is_closed_by_the_last_that_leaves_it() {
        let (streams, stream, now) = (Streams::default(), StreamId(7), Instant::now());
        let (one, other) = (IkeSaId(1), IkeSaId(2));
        assert!(!streams.is_used(stream));
        assert_eq!(streams.join(stream, one, false), None);
        streams.join(stream, other, false);
        assert_eq!(streams.leave(stream, one, now), Left::Used);
        assert_eq!(streams.leave(stream, one, now), Left::Used, "it has left already");
        assert_eq!(streams.leave(stream, other, now), Left::Lingers);
        assert!(!streams.is_used(stream));
        // Another shard's IKE SA comes in time: it is not closed.
        assert_eq!(streams.join(stream, other, false), Some(now));
        assert!(!streams.is_over(stream, now));
        assert_eq!(streams.leave(stream, other, now), Left::Lingers);
        assert!(streams.is_over(stream, now) && !streams.is_over(stream, now) && streams.is_empty());
        // Ours is closed at once.
        streams.join(stream, one, true);
        assert_eq!(streams.leave(stream, one, now), Left::Closes);
        assert!(streams.is_empty());
        // One that ended: each shard hears of its own.
        streams.join(stream, one, false);
        streams.join(stream, other, false);
        assert_eq!(streams.users(stream, |id| id == other), [other]);
        assert_eq!(streams.ended(stream, |id| id == one), (vec![one], None));
        assert_eq!(streams.ended(stream, |id| id == other), (vec![other], None));
        assert!(streams.is_empty());
    }
}
