//! Address pools: which peer has which internal address (RFC 7296 §2.19, §3.15.3).
//!
//! A pool is a range and the leases that were given out of it; an address that nobody ever had costs nothing, however
//! large the range is. A lease is *online* while an IKE SA uses it. Afterwards it is *offline*: kept for the peer that had
//! it, until no other address is left.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use pad::Identity;

use crate::config::AddressRange;
use crate::engine::IkeSaId;
use crate::wire::Attribute;

/// Offline leases that a pool remembers; the oldest are forgotten first.
const MAX_OFFLINE: usize = 65_536;

/// A pool as configured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolConfig {
    /// Name, as a connection's `pools` has it.
    pub name: String,
    /// The address that `addrs` begins with, as written; what VICI shows.
    pub base: IpAddr,
    /// The addresses that are given out.
    pub range: AddressRange,
    /// What else the peer is told: `dns`, `subnet` and so on.
    pub attributes: Vec<Attribute>,
}

/// Whose a lease is: the peer's identity, and the connection that admitted it. What a connection with a weaker demand
/// admits has no claim on the addresses of another one's peers.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Holder {
    pub(crate) identity: Identity,
    pub(crate) connection: String,
}

/// A peer's wish for one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Wish {
    /// The family, and the wanted address unless it is unspecified.
    pub(crate) address: IpAddr,
    /// What the holder's other IKE SAs have may be given to it too.
    pub(crate) shares: Shares,
    /// Where the IKE SA leads to; with port 0 where it is over a stream.
    pub(crate) host: SocketAddr,
}

/// Which online leases of its own a peer may have once more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shares {
    /// The one that it asks for, if an IKE SA to the same host has it: two hosts may have one identity.
    Wanted,
    /// Any: the IKE SAs that have them are about to go.
    Any,
}

/// A lease, as VICI shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseStatus {
    /// The address.
    pub address: IpAddr,
    /// Who has it or had it last.
    pub identity: Identity,
    /// An IKE SA uses it.
    pub online: bool,
}

/// A pool, as VICI shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolStatus {
    /// Name.
    pub name: String,
    /// First address, as configured.
    pub base: IpAddr,
    /// Number of addresses; at most `u64::MAX`.
    pub size: u64,
    /// Leases in use.
    pub online: usize,
    /// Leases that are kept.
    pub offline: usize,
    /// All leases by address.
    pub leases: Vec<LeaseStatus>,
}

/// Why a pool stays as it is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PoolError {
    /// Another range is wanted while addresses of this one are in use.
    #[error("vici pool {0} has online leases, unable to replace")]
    Replace(String),
    /// It is to go while addresses are in use.
    #[error("{0} has online leases, unable to unload")]
    Unload(String),
    /// There is none of this name.
    #[error("failed to find pool, nothing unloaded")]
    Unknown,
}

/// All pools, by name.
#[derive(Debug, Default)]
pub(crate) struct Pools {
    pools: BTreeMap<String, Pool>,
    /// What each IKE SA has: pool and number of the address.
    holdings: BTreeMap<IkeSaId, Vec<(String, u128)>>,
}

#[derive(Debug)]
struct Pool {
    config: PoolConfig,
    leases: BTreeMap<u128, Lease>,
    /// What each holder has, and what it had.
    of_holder: BTreeMap<Holder, Owned>,
    /// Offline leases, in the order in which they became so.
    offline: BTreeMap<u64, u128>,
    last_departure: u64,
    /// Where the search for a fresh address goes on.
    next: u128,
}

/// The leases of one holder. Many hosts may have one identity, so these may be many.
#[derive(Debug, Default)]
struct Owned {
    online: BTreeSet<u128>,
    offline: BTreeSet<u128>,
}

#[derive(Debug)]
struct Lease {
    holder: Holder,
    /// The IKE SAs that use it, and where they lead to.
    users: BTreeMap<IkeSaId, SocketAddr>,
    /// Key in `offline`, while it is.
    departed: Option<u64>,
}

/// A host has another port for each of its streams, and another one for UDP.
fn is_same_host(one: SocketAddr, other: SocketAddr) -> bool {
    one.ip() == other.ip() && (one.port() == other.port() || one.port() == 0 || other.port() == 0)
}

impl Pools {
    /// Adds a pool. One of the same name and range keeps its leases; another range is refused while leases are online.
    pub(crate) fn load(&mut self, config: PoolConfig) -> Result<(), PoolError> {
        match self.pools.get_mut(&config.name) {
            Some(pool) if pool.config.range == config.range => pool.config = config,
            Some(pool) if pool.online() > 0 => return Err(PoolError::Replace(config.name)),
            _ => {
                self.pools.insert(config.name.clone(), Pool::new(config));
            }
        }
        Ok(())
    }

    /// Removes a pool that has no online leases.
    pub(crate) fn unload(&mut self, name: &str) -> Result<(), PoolError> {
        let pool = self.pools.get(name).ok_or(PoolError::Unknown)?;
        if pool.online() > 0 {
            return Err(PoolError::Unload(name.to_owned()));
        }
        self.pools.remove(name);
        Ok(())
    }

    /// What VICI shows.
    pub(crate) fn status(&self) -> Vec<PoolStatus> {
        self.pools.values().map(Pool::status).collect()
    }

    /// The pool of this name.
    pub(crate) fn config(&self, name: &str) -> Option<&PoolConfig> {
        self.pools.get(name).map(|pool| &pool.config)
    }

    /// Gives an IKE SA an address out of the first of these pools that has one of the family.
    pub(crate) fn acquire(&mut self, names: &[String], holder: &Holder, user: IkeSaId, wish: Wish) -> Option<IpAddr> {
        for name in names {
            let Some(pool) = self.pools.get_mut(name) else { continue };
            let held = self.holdings.entry(user).or_default();
            let number = pool.acquire(holder, user, wish, |number| held.contains(&(name.clone(), number)));
            if let Some(number) = number {
                held.push((name.clone(), number));
                return pool.address(number);
            }
            if held.is_empty() {
                self.holdings.remove(&user);
            }
        }
        None
    }

    /// An IKE SA ended, or gives its addresses back.
    pub(crate) fn release(&mut self, user: IkeSaId) {
        for (name, number) in self.holdings.remove(&user).unwrap_or_default() {
            if let Some(pool) = self.pools.get_mut(&name) {
                pool.release(number, user);
            }
        }
    }

    /// A rekeyed IKE SA's successor has what it had.
    pub(crate) fn inherit(&mut self, old: IkeSaId, new: IkeSaId) {
        let Some(held) = self.holdings.remove(&old) else { return };
        for (name, number) in &held {
            if let Some(lease) = self.pools.get_mut(name).and_then(|pool| pool.leases.get_mut(number)) {
                let host = lease.users.remove(&old);
                lease.users.extend(host.map(|host| (new, host)));
            }
        }
        self.holdings.insert(new, held);
    }

    /// An IKE SA leads to another address of its peer now.
    pub(crate) fn moved(&mut self, user: IkeSaId, host: SocketAddr) {
        for (name, number) in self.holdings.get(&user).into_iter().flatten() {
            let lease = self.pools.get_mut(name).and_then(|pool| pool.leases.get_mut(number));
            if let Some(at) = lease.and_then(|lease| lease.users.get_mut(&user)) {
                *at = host;
            }
        }
    }
}

impl Pool {
    fn new(config: PoolConfig) -> Self {
        Self {
            config,
            leases: BTreeMap::new(),
            of_holder: BTreeMap::new(),
            offline: BTreeMap::new(),
            last_departure: 0,
            next: 0,
        }
    }

    /// The number of the last address; the first is 0.
    fn last(&self) -> u128 {
        number(self.config.range.end).saturating_sub(number(self.config.range.start))
    }

    fn address(&self, offset: u128) -> Option<IpAddr> {
        let address = number(self.config.range.start).checked_add(offset)?;
        match self.config.range.start {
            IpAddr::V4(_) => u32::try_from(address).ok().map(|bits| Ipv4Addr::from_bits(bits).into()),
            IpAddr::V6(_) => Some(Ipv6Addr::from_bits(address).into()),
        }
    }

    fn offset(&self, address: IpAddr) -> Option<u128> {
        let inside = self.config.range.contains(address);
        inside.then(|| number(address).checked_sub(number(self.config.range.start))).flatten()
    }

    fn online(&self) -> usize {
        self.leases.len().saturating_sub(self.offline.len())
    }

    fn status(&self) -> PoolStatus {
        let lease = |(offset, lease): (&u128, &Lease)| {
            let identity = lease.holder.identity.clone();
            Some(LeaseStatus { address: self.address(*offset)?, identity, online: !lease.users.is_empty() })
        };
        PoolStatus {
            name: self.config.name.clone(),
            base: self.config.base,
            size: u64::try_from(self.last().saturating_add(1)).unwrap_or(u64::MAX),
            online: self.online(),
            offline: self.offline.len(),
            leases: self.leases.iter().filter_map(lease).collect(),
        }
    }

    /// `holds` says which addresses this very IKE SA has already.
    fn acquire(&mut self, holder: &Holder, user: IkeSaId, wish: Wish, holds: impl Fn(u128) -> bool) -> Option<u128> {
        if wish.address.is_ipv4() != self.config.range.start.is_ipv4() {
            return None;
        }
        let offset = self.choose(holder, wish, holds)?;
        self.give(offset, holder, user, wish.host);
        Some(offset)
    }

    fn choose(&mut self, holder: &Holder, wish: Wish, holds: impl Fn(u128) -> bool) -> Option<u128> {
        let owned = self.of_holder.get(holder);
        let wanted = self.offset(wish.address).filter(|_| !wish.address.is_unspecified());
        // What it asks for, if it is free, or its own.
        if let Some(wanted) = wanted {
            let shared = |lease: &Lease| match wish.shares {
                _ if lease.users.is_empty() => true,
                Shares::Wanted => lease.users.values().any(|host| is_same_host(*host, wish.host)),
                Shares::Any => true,
            };
            let good = match self.leases.get(&wanted) {
                None => true,
                Some(lease) => lease.holder == *holder && !holds(wanted) && shared(lease),
            };
            if good {
                return Some(wanted);
            }
        }
        if wish.shares == Shares::Any
            && let Some(replaced) = owned.and_then(|owned| owned.online.iter().find(|offset| !holds(**offset)))
        {
            return Some(*replaced);
        }
        // What it had.
        let former = owned.and_then(|owned| owned.offline.first().copied());
        former.or_else(|| self.with_identifier(wish.address)).or_else(|| self.fresh())
    }

    /// §3.15.3: the wanted interface identifier with our prefix, where the pool has the whole of a /64.
    fn with_identifier(&self, wanted: IpAddr) -> Option<u128> {
        let IpAddr::V6(wanted) = wanted else { return None };
        let IpAddr::V6(first) = self.config.range.start else { return None };
        let identifier = wanted.to_bits() & u128::from(u64::MAX);
        let address = Ipv6Addr::from_bits(first.to_bits() & !u128::from(u64::MAX) | identifier);
        let offset = self.offset(address.into()).filter(|_| identifier != 0)?;
        (!self.leases.contains_key(&offset)).then_some(offset)
    }

    /// An address that nobody has or had, else the one that has been offline for longest.
    fn fresh(&mut self) -> Option<u128> {
        let taken = u128::try_from(self.leases.len()).ok()?;
        if taken <= self.last() {
            // Among one more addresses than there are leases, one is free.
            let mut offset = self.next;
            for _ in 0..=taken {
                if !self.leases.contains_key(&offset) {
                    // The next search does not pass those between again.
                    self.next = offset;
                    return Some(offset);
                }
                offset = if offset >= self.last() { 0 } else { offset.saturating_add(1) };
            }
        }
        self.offline.values().next().copied()
    }

    fn give(&mut self, offset: u128, holder: &Holder, user: IkeSaId, host: SocketAddr) {
        if let Some(lease) = self.leases.get_mut(&offset) {
            if let Some(departed) = lease.departed.take() {
                self.offline.remove(&departed);
            }
            if lease.holder == *holder {
                lease.users.insert(user, host);
                let owned = self.of_holder.entry(holder.clone()).or_default();
                owned.offline.remove(&offset);
                owned.online.insert(offset);
                return;
            }
            self.forget(offset);
        }
        if offset == self.next {
            self.next = if offset >= self.last() { 0 } else { offset.saturating_add(1) };
        }
        let users = BTreeMap::from([(user, host)]);
        self.leases.insert(offset, Lease { holder: holder.clone(), users, departed: None });
        self.of_holder.entry(holder.clone()).or_default().online.insert(offset);
    }

    fn forget(&mut self, offset: u128) {
        let Some(lease) = self.leases.remove(&offset) else { return };
        if let Some(owned) = self.of_holder.get_mut(&lease.holder) {
            owned.online.remove(&offset);
            owned.offline.remove(&offset);
            if owned.online.is_empty() && owned.offline.is_empty() {
                self.of_holder.remove(&lease.holder);
            }
        }
    }

    fn release(&mut self, offset: u128, user: IkeSaId) {
        let Some(lease) = self.leases.get_mut(&offset) else { return };
        lease.users.remove(&user);
        if lease.users.is_empty() && lease.departed.is_none() {
            self.last_departure = self.last_departure.saturating_add(1);
            lease.departed = Some(self.last_departure);
            self.offline.insert(self.last_departure, offset);
            let owned = self.of_holder.entry(lease.holder.clone()).or_default();
            owned.online.remove(&offset);
            owned.offline.insert(offset);
        }
        if self.offline.len() > MAX_OFFLINE
            && let Some((_, oldest)) = self.offline.pop_first()
        {
            self.forget(oldest);
        }
    }
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => address.to_bits().into(),
        IpAddr::V6(address) => address.to_bits(),
    }
}

#[cfg(test)]
mod tests;
