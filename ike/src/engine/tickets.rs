//! Tickets of session resumption (RFC 5723): as gateway those that we gave, as client those that we were given.
//!
//! A ticket is the state by value, sealed under a key that only this process has, and that changes. It is good while its
//! number is in the list of those that we gave: a ticket leaves the list when it is used or replaced, when its IKE SA is
//! rekeyed or deleted, when its time is over, and when the list is full; all leave it with a change of credentials. So
//! whatever is forgotten costs a client a full authentication, and nothing can be presented twice. What is large or
//! shared anyway, certificates and configuration, stays in the list: an IKE_SESSION_RESUME request cannot be fragmented
//! (RFC 7383 §3), so tickets have to be small.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use ipsec::secret::Secret;
use ipsec::transform::{Encr, Integ, Ke, Prf};
use pad::{AuthMethod, Identity, PeerIdentity, Proof};
use zeroize::Zeroizing;

use super::IkeSaId;
use crate::Rng;
use crate::config::Connection;
use crate::crypto::{AdditionalKe, IkeSuite};
use crate::sa::auth::identification;
use crate::sa::basis::Basis;
use crate::sa::channel::Spis;
use crate::sa::retry::after;

/// The format of our tickets.
const VERSION: u8 = 1;
/// How long a key makes tickets.
const ROTATION: Duration = Duration::from_secs(24 * 3600);
/// The longest that a ticket is good; a key opens tickets for so long after it has made its last.
pub(crate) const LONGEST: Duration = Duration::from_secs(12 * 3600);
/// Tickets that are good at a time; beyond, those go that would end first.
const MAX_LIVE: usize = 32_768;
/// Octets of a ticket of ours. Longer ones are not made, and not opened.
const MAX_LENGTH: usize = 1024;
/// Octets of a gateway's ticket that we keep: the request has to fit into a datagram.
const MAX_FOREIGN: usize = 8192;
/// Gateways' tickets that we keep, one for each connection and gateway.
const MAX_HELD: usize = 1024;
/// Version, key and nonce.
const HEAD: usize = 1 + 8 + 12;

/// What a ticket stands for.
#[derive(Clone)]
pub(crate) struct Grant {
    /// The IKE SA that it was given in.
    pub(crate) ike_sa: IkeSaId,
    /// The connection as it was at the time.
    pub(crate) connection: Arc<Connection>,
    pub(crate) peer: Arc<PeerIdentity>,
    pub(crate) basis: Arc<Basis>,
}

/// The keys of an IKE SA that live on in its ticket.
pub(crate) struct Keys<'a> {
    pub(crate) suite: IkeSuite,
    pub(crate) spis: Spis,
    pub(crate) d: &'a Secret,
}

/// A ticket that came back and is good.
pub(crate) struct Presented {
    /// Its number, with which it is redeemed.
    pub(crate) serial: u64,
    pub(crate) suite: IkeSuite,
    pub(crate) d: Secret,
    pub(crate) grant: Grant,
}

/// A gateway's ticket, with what it is of no use without (§4.2).
pub(crate) struct Held {
    pub(crate) ticket: Vec<u8>,
    pub(crate) ends: Instant,
    pub(crate) suite: IkeSuite,
    pub(crate) d: Secret,
    pub(crate) grant: Grant,
}

struct TicketKey {
    id: [u8; 8],
    key: LessSafeKey,
    since: Instant,
    /// Tickets made: the next one's nonce.
    made: u64,
}

struct Live {
    ends: Instant,
    grant: Grant,
}

/// The sealed part of a ticket.
struct Contents {
    serial: u64,
    /// Seconds since `Tickets::origin`.
    ends: u64,
    proved_at: u64,
    spis: Spis,
    suite: IkeSuite,
    method: u8,
    uses_ppk: bool,
    /// Of initiator and responder, as the payloads had them.
    ids: [Vec<u8>; 2],
    entry: Vec<u8>,
    d: Secret,
}

/// All tickets.
#[derive(Default)]
pub(crate) struct Tickets {
    epoch: u64,
    /// Times in tickets count from here.
    origin: Option<Instant>,
    /// The newest first.
    keys: VecDeque<TicketKey>,
    last_serial: u64,
    live: BTreeMap<u64, Live>,
    by_end: BTreeSet<(Instant, u64)>,
    held: BTreeMap<(String, IpAddr), Held>,
}

impl Tickets {
    /// How often everything was forgotten: what was proved in another epoch gives no ticket.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Credentials have changed: no ticket of before is good any more, in either direction.
    pub(crate) fn forget_all(&mut self) {
        let (epoch, last_serial) = (self.epoch.wrapping_add(1), self.last_serial);
        *self = Self { epoch, last_serial, ..Self::default() };
    }

    // As gateway.

    /// Makes a ticket that is good for `lifetime`; `None` where it would be too long.
    pub(crate) fn issue(
        &mut self,
        now: Instant,
        rng: &mut dyn Rng,
        grant: Grant,
        keys: &Keys<'_>,
        lifetime: Duration,
    ) -> Option<(u64, Vec<u8>)> {
        self.expire(now);
        let ends = after(now, lifetime.min(LONGEST));
        let serial = self.last_serial.checked_add(1)?;
        let origin = *self.origin.get_or_insert(now);
        let contents = Contents {
            serial,
            ends: seconds(origin, ends),
            proved_at: seconds(origin, grant.basis.proved_at),
            spis: keys.spis,
            suite: keys.suite,
            method: method(&grant.peer).0,
            uses_ppk: grant.basis.uses_ppk,
            ids: [id_octets(&grant.peer.id), id_octets(&grant.peer.local_id)],
            entry: grant.peer.entry.clone().into_bytes(),
            d: keys.d.duplicate(),
        };
        let ticket = self.sealing_key(now, rng)?.seal(contents.encode()?)?;
        if ticket.len() > MAX_LENGTH {
            return None;
        }
        if self.live.len() >= MAX_LIVE
            && let Some((_, first)) = self.by_end.first().copied()
        {
            self.revoke(first);
        }
        self.last_serial = serial;
        self.by_end.insert((ends, serial));
        self.live.insert(serial, Live { ends, grant });
        Some((serial, ticket))
    }

    /// Opens a ticket that somebody presents; the error says why it is refused. Nothing changes.
    pub(crate) fn open(&self, now: Instant, ticket: &[u8]) -> Result<Presented, &'static str> {
        const FOREIGN: &str = "the ticket is none of ours";
        if ticket.len() > MAX_LENGTH {
            return Err("the ticket is too long");
        }
        let (origin, (head, sealed)) = self.origin.zip(ticket.split_at_checked(HEAD)).ok_or(FOREIGN)?;
        let (version, id) = head.split_first_chunk::<1>().ok_or(FOREIGN)?;
        let known = |key: &&TicketKey| *version == [VERSION] && id.starts_with(&key.id) && key.opens_at(now);
        let key = self.keys.iter().find(known).ok_or(FOREIGN)?;
        let contents = key.open(head, sealed).and_then(|octets| Contents::decode(&octets)).ok_or(FOREIGN)?;
        if seconds(origin, now) >= contents.ends {
            return Err("the ticket has expired");
        }
        let live = self.live.get(&contents.serial).filter(|live| live.ends > now);
        let grant = live.ok_or("the ticket was used or withdrawn")?.grant.clone();
        // Both come from one moment, so they agree.
        let agrees = contents.ids == [id_octets(&grant.peer.id), id_octets(&grant.peer.local_id)]
            && contents.entry == grant.peer.entry.as_bytes()
            && contents.method == method(&grant.peer).0
            && contents.proved_at == seconds(origin, grant.basis.proved_at)
            && contents.uses_ppk == grant.basis.uses_ppk;
        if !agrees {
            return Err(FOREIGN);
        }
        Ok(Presented { serial: contents.serial, suite: contents.suite, d: contents.d, grant })
    }

    /// Uses a ticket up: true once at most (§4.3.1).
    pub(crate) fn redeem(&mut self, now: Instant, serial: u64) -> bool {
        self.expire(now);
        self.revoke(serial)
    }

    /// Withdraws a ticket; says whether it was good.
    pub(crate) fn revoke(&mut self, serial: u64) -> bool {
        let Some(live) = self.live.remove(&serial) else { return false };
        self.by_end.remove(&(live.ends, serial));
        true
    }

    fn expire(&mut self, now: Instant) {
        while let Some((_, serial)) = self.by_end.first().copied().filter(|(ends, _)| *ends <= now) {
            self.revoke(serial);
        }
        self.keys.retain(|key| key.opens_at(now));
        self.held.retain(|_, held| held.ends > now);
    }

    fn sealing_key(&mut self, now: Instant, rng: &mut dyn Rng) -> Option<&mut TicketKey> {
        if self.keys.front().is_none_or(|key| now >= after(key.since, ROTATION)) {
            self.keys.push_front(TicketKey::new(now, rng)?);
        }
        self.keys.front_mut()
    }

    // As client.

    /// Keeps a ticket for when its gateway is to be reached again.
    pub(crate) fn hold(&mut self, now: Instant, gateway: IpAddr, held: Held) {
        self.expire(now);
        let usable = held.ends > now && held.grant.basis.epoch == self.epoch;
        let key = (held.grant.connection.name.clone(), gateway);
        if usable && (self.held.len() < MAX_HELD || self.held.contains_key(&key)) {
            self.held.insert(key, held);
        }
    }

    /// True when [`Self::take`] would give a ticket.
    pub(crate) fn has(&self, now: Instant, connection: &Connection, gateway: IpAddr, local_id: &Identity) -> bool {
        let held = self.held.get(&(connection.name.clone(), gateway));
        held.is_some_and(|held| held.is_good_for(now, connection, local_id))
    }

    /// The ticket for this gateway, if it is good for this connection. Whatever there is, is not there afterwards: a
    /// ticket is presented once.
    pub(crate) fn take(
        &mut self,
        now: Instant,
        connection: &Connection,
        gateway: IpAddr,
        local_id: &Identity,
    ) -> Option<Held> {
        let held = self.held.remove(&(connection.name.clone(), gateway))?;
        held.is_good_for(now, connection, local_id).then_some(held)
    }

    /// Drops the ticket for this gateway.
    pub(crate) fn drop_held(&mut self, connection: &str, gateway: IpAddr) {
        self.held.remove(&(connection.to_owned(), gateway));
    }

    /// Drops all tickets of a connection.
    pub(crate) fn drop_all_held(&mut self, connection: &str) {
        self.held.retain(|(name, _), _| name != connection);
    }

    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn counts(&self) -> (usize, usize) {
        assert_eq!(self.live.len(), self.by_end.len(), "a ticket without an end, or the other way round");
        (self.live.len(), self.held.len())
    }
}

/// A gateway's ticket of a length that we keep.
pub(crate) fn is_possible(ticket: &[u8]) -> bool {
    (1..=MAX_FOREIGN).contains(&ticket.len())
}

impl Held {
    fn is_good_for(&self, now: Instant, connection: &Connection, local_id: &Identity) -> bool {
        let basis = &self.grant.basis;
        self.ends > now
            && connection.session_resumption
            && self.grant.connection.authenticates_as(connection)
            && self.grant.peer.local_id == *local_id
            && basis.is_good_at(now, connection)
    }
}

impl TicketKey {
    fn new(now: Instant, rng: &mut dyn Rng) -> Option<Self> {
        let (mut id, mut key) = ([0; 8], Zeroizing::new([0; 32]));
        rng.fill(&mut id);
        rng.fill(key.as_mut_slice());
        let key = UnboundKey::new(&AES_256_GCM, key.as_slice()).ok()?;
        Some(Self { id, key: LessSafeKey::new(key), since: now, made: 0 })
    }

    fn opens_at(&self, now: Instant) -> bool {
        now < after(self.since, ROTATION + LONGEST)
    }

    fn seal(&mut self, mut octets: Zeroizing<Vec<u8>>) -> Option<Vec<u8>> {
        // No two tickets have the same number under one key.
        self.made = self.made.checked_add(1)?;
        let nonce = *u128::from(self.made).to_be_bytes().last_chunk::<12>()?;
        let mut ticket = vec![VERSION];
        ticket.extend_from_slice(&self.id);
        ticket.extend_from_slice(&nonce);
        let (nonce, aad) = (Nonce::assume_unique_for_key(nonce), Aad::from(ticket.as_slice()));
        self.key.seal_in_place_append_tag(nonce, aad, &mut *octets).ok()?;
        ticket.extend_from_slice(&octets);
        Some(ticket)
    }

    fn open(&self, head: &[u8], sealed: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
        let nonce = Nonce::try_assume_unique_for_key(head.last_chunk::<12>()?).ok()?;
        let mut octets = Zeroizing::new(sealed.to_vec());
        let length = self.key.open_in_place(nonce, Aad::from(head), &mut octets).ok()?.len();
        octets.truncate(length);
        Some(octets)
    }
}

impl Contents {
    fn encode(&self) -> Option<Zeroizing<Vec<u8>>> {
        // Enough that it never grows: growing would leave a copy of the key behind.
        let mut octets = Zeroizing::new(Vec::with_capacity(2 * MAX_LENGTH));
        for number in [self.serial, self.ends, self.proved_at, self.spis.initiator, self.spis.responder] {
            octets.extend_from_slice(&number.to_be_bytes());
        }
        let IkeSuite { encr, key_bits, integ, prf, ke, additional } = self.suite;
        let methods = additional.0.map(|method| method.0);
        for number in [encr.0, key_bits, integ.0, prf.0, ke.0].iter().chain(&methods) {
            octets.extend_from_slice(&number.to_be_bytes());
        }
        octets.extend_from_slice(&[self.method, u8::from(self.uses_ppk)]);
        let [id_i, id_r] = &self.ids;
        for part in [id_i, id_r, &self.entry, self.d.expose()] {
            let length = u16::try_from(part.len()).ok()?;
            if octets.len().saturating_add(part.len()) > MAX_LENGTH {
                return None;
            }
            octets.extend_from_slice(&length.to_be_bytes());
            octets.extend_from_slice(part);
        }
        Some(octets)
    }

    fn decode(octets: &[u8]) -> Option<Self> {
        let mut rest = octets;
        let rest = &mut rest;
        let [serial, ends, proved_at] = [long(rest)?, long(rest)?, long(rest)?];
        let spis = Spis { initiator: long(rest)?, responder: long(rest)? };
        let (encr, key_bits) = (Encr(short(rest)?), short(rest)?);
        let (integ, prf, ke) = (Integ(short(rest)?), Prf(short(rest)?), Ke(short(rest)?));
        let mut additional = AdditionalKe::NONE;
        for method in &mut additional.0 {
            *method = Ke(short(rest)?);
        }
        let suite = IkeSuite { encr, key_bits, integ, prf, ke, additional };
        let [method, uses_ppk] = cut(rest)?;
        let ids = [part(rest)?.to_vec(), part(rest)?.to_vec()];
        let (entry, d) = (part(rest)?.to_vec(), Secret::new(part(rest)?.to_vec()));
        let uses_ppk = uses_ppk == 1;
        rest.is_empty().then_some(Self { serial, ends, proved_at, spis, suite, method, uses_ppk, ids, entry, d })
    }
}

fn cut<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (head, after) = rest.split_first_chunk::<N>()?;
    *rest = after;
    Some(*head)
}

fn long(rest: &mut &[u8]) -> Option<u64> {
    cut(rest).map(u64::from_be_bytes)
}

fn short(rest: &mut &[u8]) -> Option<u16> {
    cut(rest).map(u16::from_be_bytes)
}

fn part<'a>(rest: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = usize::from(short(rest)?);
    let (part, after) = rest.split_at_checked(length)?;
    *rest = after;
    Some(part)
}

fn seconds(origin: Instant, at: Instant) -> u64 {
    at.saturating_duration_since(origin).as_secs()
}

fn id_octets(id: &Identity) -> Vec<u8> {
    identification(id).body()
}

/// How the peer proved itself in the beginning.
pub(crate) fn method(peer: &PeerIdentity) -> AuthMethod {
    match peer.proof {
        Proof::Unauthenticated { .. } => AuthMethod::NULL,
        Proof::PreSharedKey => AuthMethod::SHARED_KEY,
        Proof::Certificate { method, .. } | Proof::RawKey { method, .. } => method,
        // What comes after it.
        Proof::Eap { .. } => AuthMethod::SHARED_KEY,
    }
}

#[cfg(test)]
mod tests;
