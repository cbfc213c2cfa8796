//! Whose datagram it is (RFC 5660 §5.3), for both clients: the peers of one UDP socket, which is under a listener latch.
//!
//! # Invariant
//!
//! **A datagram is given out with the latch that it came under, or not at all.** The daemon makes no second latch for a remote end
//! before we have acknowledged the end of the first. We do so when no datagram of the first is left: none is in our hands (`held`),
//! [`SETTLING`] has passed since we heard of the end, so that none is on its way, and since then the socket's queue was
//! empty, or as many datagrams were read as it can hold. So whoever is known for a remote end is the one that it came from; and whom
//! the daemon names for a datagram in our hands is too.
//!
//! Reading, knowing and acknowledging are steps under one lock. Datagrams of a latch that has ended are thrown away.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::watch;

use crate::protocol::{Created, Disposition, Guard, Peer, Protection, SETTLING, State};
use crate::session::Change;

/// The other end of datagrams: an address and port, and the latch that they came under. Another latch of the same address is
/// another peer: compare [`Self::class`] to know whether it is the same one. Clones are the same peer.
#[derive(Clone)]
pub struct UdpPeer(Arc<Known>);

struct Known {
    created: Created,
    on_break: Disposition,
    changes: watch::Receiver<Option<Change>>,
}

impl UdpPeer {
    pub(crate) fn new(created: Created, on_break: Disposition, changes: watch::Receiver<Option<Change>>) -> Self {
        Self(Arc::new(Known { created, on_break, changes }))
    }

    /// Its address and port.
    pub fn addr(&self) -> SocketAddr {
        self.0.created.remote
    }

    /// Number of the latch in the daemon; no two are the same.
    pub fn latch(&self) -> u64 {
        self.0.created.latch
    }

    /// Who it is, and how it proved that.
    pub fn identity(&self) -> &Peer {
        &self.0.created.peer
    }

    /// How the datagrams are protected, for as long as the latch stands.
    pub fn protection(&self) -> &Protection {
        &self.0.created.protection
    }

    /// The same for latches to the same peer with the same credential under the same protection (RFC 5660 §6.3).
    pub fn class(&self) -> Option<u32> {
        self.0.created.class
    }

    /// What enforces the latch.
    pub fn guard(&self) -> Option<Guard> {
        self.0.created.guard
    }

    /// What ended the latch, as far as the daemon has said: nothing more comes from this peer, nor goes to it.
    pub fn ended(&self) -> Option<Change> {
        self.0.changes.borrow().clone().filter(|change| change.is_end(self.0.on_break))
    }

    /// The latch's state, as far as the daemon has said.
    pub fn state(&self) -> State {
        self.0.changes.borrow().as_ref().map_or(State::Established, |change| change.state)
    }

    pub(crate) fn changes(&self) -> watch::Receiver<Option<Change>> {
        self.0.changes.clone()
    }

    pub(crate) fn is_end(&self, change: &Change) -> bool {
        change.is_end(self.0.on_break)
    }
}

/// The same latch.
impl PartialEq for UdpPeer {
    fn eq(&self, other: &Self) -> bool {
        self.latch() == other.latch()
    }
}

impl Eq for UdpPeer {}

impl std::hash::Hash for UdpPeer {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.latch().hash(state);
    }
}

impl fmt::Debug for UdpPeer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (latch, addr) = (self.latch(), self.addr());
        f.debug_struct("UdpPeer").field("latch", &latch).field("addr", &addr).finish_non_exhaustive()
    }
}

/// The peers of one socket.
#[derive(Debug)]
pub(crate) struct Roster {
    on_break: Disposition,
    peers: HashMap<SocketAddr, UdpPeer>,
    /// Where the peers of latches are.
    places: HashMap<u64, SocketAddr>,
    /// Latches that have ended and are not acknowledged, whether their peers are known or not.
    ended: BTreeMap<u64, Ended>,
    /// To be released in the daemon.
    acknowledged: VecDeque<u64>,
    /// Those since somebody began to ask for a latch.
    recent: BTreeSet<u64>,
    asking: usize,
    /// A datagram that was read, of somebody who is not known yet.
    held: Option<Held>,
    numbers: u64,
    /// Datagrams that fit into the socket's queue.
    queue: usize,
}

#[derive(Debug)]
struct Ended {
    /// From when on no datagram of it is on its way.
    settled: Instant,
    /// How many were read after that.
    read: usize,
}

#[derive(Debug)]
struct Held {
    number: u64,
    from: SocketAddr,
    octets: Vec<u8>,
}

/// What to do next.
#[derive(Debug)]
pub(crate) enum Step {
    /// A datagram of this length, and whose it is.
    Datagram(usize, UdpPeer),
    /// Ask the daemon who is there, and [`Roster::answered`].
    Ask(Question),
    /// Others may want the processor.
    Again,
    /// Nothing is there. The time is when there is something to do all the same.
    Wait(Option<Instant>),
}

/// Who sent the datagram with this number from there?
#[derive(Clone, Copy, Debug)]
pub(crate) struct Question {
    number: u64,
    pub(crate) from: SocketAddr,
}

/// Fewer octets of a socket's buffer than the system counts for any datagram.
const LEAST: usize = 256;

/// Datagrams of ended latches that are thrown away at a time.
const PATIENCE: usize = 64;

impl Roster {
    /// `buffer` is the size of the socket's receive buffer (SO_RCVBUF).
    pub(crate) fn new(on_break: Disposition, buffer: usize) -> Self {
        Self {
            on_break,
            peers: HashMap::new(),
            places: HashMap::new(),
            ended: BTreeMap::new(),
            acknowledged: VecDeque::new(),
            recent: BTreeSet::new(),
            asking: 0,
            held: None,
            numbers: 0,
            queue: queue(buffer),
        }
    }

    /// The daemon says that a latch has changed.
    pub(crate) fn heard(&mut self, latch: u64, change: &Change, now: Instant, buffer: usize) {
        if !change.is_end(self.on_break) {
            return;
        }
        // The buffer may have grown since; what was let into a larger one stays when it shrinks.
        self.queue = self.queue.max(queue(buffer));
        self.ended.entry(latch).or_insert(Ended { settled: now + SETTLING, read: 0 });
    }

    /// Takes the next datagram by `take`, whose own wait is an error.
    pub(crate) fn receive(
        &mut self,
        now: Instant,
        buffer: &mut [u8],
        mut take: impl FnMut(&mut [u8]) -> io::Result<(usize, SocketAddr)>,
    ) -> io::Result<Step> {
        for _ in 0..PATIENCE {
            if let Some(held) = &self.held {
                let known = self.peers.get(&held.from).cloned();
                let Some(peer) = known else {
                    return Ok(Step::Ask(Question { number: held.number, from: held.from }));
                };
                let Some(held) = self.held.take().filter(|_| !self.ended.contains_key(&peer.latch())) else { continue };
                let length = held.octets.len().min(buffer.len());
                for (to, from) in buffer.iter_mut().zip(&held.octets) {
                    *to = *from;
                }
                return Ok(Step::Datagram(length, peer));
            }
            self.acknowledge(|ended, queue| ended.read > queue);
            let (length, from) = match take(buffer) {
                Ok((length, from)) => (length, canonical(from)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.acknowledge(|ended, _| ended.settled <= now);
                    return Ok(Step::Wait(self.ended.values().map(|ended| ended.settled).min()));
                }
                Err(error) => return Err(error),
            };
            self.ended.values_mut().filter(|ended| ended.settled <= now).for_each(|ended| ended.read += 1);
            match self.peers.get(&from) {
                Some(peer) if self.ended.contains_key(&peer.latch()) => {}
                Some(peer) => return Ok(Step::Datagram(length, peer.clone())),
                None => {
                    self.numbers += 1;
                    let octets = buffer.get(..length).unwrap_or_default().to_vec();
                    self.held = Some(Held { number: self.numbers, from, octets });
                }
            }
        }
        Ok(Step::Again)
    }

    /// As [`Self::receive`], without taking anything: what is next in our own hands.
    pub(crate) fn look(&self) -> Step {
        match &self.held {
            Some(held) if self.peers.contains_key(&held.from) => Step::Again,
            Some(held) => Step::Ask(Question { number: held.number, from: held.from }),
            None => Step::Wait(self.ended.values().map(|ended| ended.settled).min()),
        }
    }

    /// The daemon's answer to a question: who it is, or that nobody is there, and the datagram is nobody's.
    pub(crate) fn answered(&mut self, question: Question, peer: Option<UdpPeer>) {
        // The answer may be late: another one was first, the datagram went its way, and the latch perhaps, too.
        if self.held.as_ref().is_none_or(|held| held.number != question.number) {
            return;
        }
        match peer {
            Some(peer) => self.insert(question.from, peer),
            None => self.held = None,
        }
    }

    /// Somebody asks for a latch; to be followed by [`Self::latched`] or [`Self::given_up`].
    pub(crate) fn begin(&mut self) {
        self.asking += 1;
    }

    /// Nobody waits for the answer any more.
    pub(crate) fn given_up(&mut self) {
        self.asking = self.asking.saturating_sub(1);
        if self.asking == 0 {
            self.recent.clear();
        }
    }

    /// The latch that was asked for is there; false if it has ended since, and that has been acknowledged.
    pub(crate) fn latched(&mut self, peer: UdpPeer) -> bool {
        let stands = !self.recent.contains(&peer.latch());
        if stands {
            self.insert(peer.addr(), peer);
        }
        stands
    }

    /// Sends to a peer; nothing if its latch has ended.
    pub(crate) fn send<T>(&self, peer: &UdpPeer, send: impl FnOnce(SocketAddr) -> io::Result<T>) -> io::Result<T> {
        let is_there = self.peers.get(&peer.addr()).is_some_and(|there| there == peer);
        if !is_there || self.ended.contains_key(&peer.latch()) {
            let gone = || Change { state: State::Closed, reason: "the peer is not there any more".to_owned() };
            return Err(peer.ended().unwrap_or_else(gone).failure());
        }
        send(peer.addr())
    }

    pub(crate) fn on_break(&self) -> Disposition {
        self.on_break
    }

    /// Who is known to be there.
    pub(crate) fn peer(&self, addr: SocketAddr) -> Option<UdpPeer> {
        self.peers.get(&canonical(addr)).filter(|peer| !self.ended.contains_key(&peer.latch())).cloned()
    }

    /// Who is known to have this latch.
    pub(crate) fn peer_of_latch(&self, latch: u64) -> Option<UdpPeer> {
        self.peer(*self.places.get(&latch)?)
    }

    /// All who are known.
    pub(crate) fn peers(&self) -> Vec<UdpPeer> {
        self.peers.values().filter(|peer| !self.ended.contains_key(&peer.latch())).cloned().collect()
    }

    /// The next latch to be released in the daemon.
    pub(crate) fn acknowledged(&mut self) -> Option<u64> {
        self.acknowledged.pop_front()
    }

    /// It could not be told now.
    pub(crate) fn postpone(&mut self, latch: u64) {
        self.acknowledged.push_front(latch);
    }

    fn insert(&mut self, place: SocketAddr, peer: UdpPeer) {
        self.places.insert(peer.latch(), place);
        self.peers.insert(place, peer);
    }

    /// No datagram is in our hands. Forgets the latches that have ended and of which none is left anywhere.
    fn acknowledge(&mut self, is_over: impl Fn(&Ended, usize) -> bool) {
        let over: Vec<u64> =
            self.ended.iter().filter(|(_, ended)| is_over(ended, self.queue)).map(|(latch, _)| *latch).collect();
        for latch in over {
            self.ended.remove(&latch);
            if let Some(place) = self.places.remove(&latch) {
                self.peers.remove(&place);
            }
            if self.asking > 0 {
                self.recent.insert(latch);
            }
            self.acknowledged.push_back(latch);
        }
    }
}

/// An IPv6 socket that speaks IPv4 has mapped addresses; its peers have not.
pub(crate) fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn queue(buffer: usize) -> usize {
    buffer / LEAST + 1
}

#[cfg(test)]
mod tests;
