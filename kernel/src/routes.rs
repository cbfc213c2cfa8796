//! Routes into the tunnel: one table, one rule for each family that leads all packets but our own to it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::net::IpAddr;

use ipsec::selector::TrafficSelector;

use crate::netlink::{Netlink, Route, Rule, RuleSelector};

/// The routes of the installed SA pairs and traps, counted by user.
pub(crate) struct Routes {
    netlink: Netlink,
    table: u32,
    link: u32,
    rules: Vec<Rule>,
    enabled: bool,
    /// Who needs a route to each network, with the source address that it would give the route: traps, then pairs, oldest
    /// first. The last one decides.
    users: BTreeMap<(Subnet, Rank, u64), Option<IpAddr>>,
    /// Each user's number in that order, and its networks.
    by_owner: HashMap<Owner, (u64, Vec<Subnet>)>,
    last: u64,
}

/// An address and a prefix length.
type Subnet = (IpAddr, u8);

/// Traps come before pairs: a trap does not take the source address from a pair that carries traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    Trap,
    Pair,
}

/// Who needs a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Owner {
    /// The SA pair with this inbound SPI.
    Pair(u32),
    /// The trap with this `reqid`.
    Trap(u32),
}

impl Owner {
    fn rank(self) -> Rank {
        match self {
            Self::Pair(_) => Rank::Pair,
            Self::Trap(_) => Rank::Trap,
        }
    }
}

impl Routes {
    /// Adds the rules, unless routes are not wanted. A family that the system lacks is left out.
    pub(crate) fn new(
        mut netlink: Netlink,
        link: u32,
        (table, priority, mark): (u32, u32, u32),
        enabled: bool,
    ) -> io::Result<Self> {
        let mut rules = Vec::new();
        if enabled {
            for ipv6 in [false, true] {
                let rule = Rule { ipv6, priority, table, selector: RuleSelector::NotMark(mark) };
                match netlink.add_rule(&rule) {
                    Ok(()) => rules.push(rule),
                    Err(e) if ipv6 => tracing::info!("no IPv6 routes into the tunnel: {e}"),
                    Err(e) => return Err(e),
                }
            }
        }
        Ok(Self { netlink, table, link, rules, enabled, users: BTreeMap::new(), by_owner: HashMap::new(), last: 0 })
    }

    /// Adds the routes that a pair or trap needs. All of them, or on error none.
    pub(crate) fn add(
        &mut self,
        owner: Owner,
        outer: IpAddr,
        local_ts: &[TrafficSelector],
        remote_ts: &[TrafficSelector],
    ) -> io::Result<()> {
        if !self.enabled {
            return Ok(());
        }
        let networks = networks(remote_ts)?;
        let addresses = self.netlink.addresses()?;
        self.last += 1;
        let order = self.last;
        self.by_owner.insert(owner, (order, networks.iter().copied().collect()));
        for network in networks {
            let source = preferred_source(network.0.is_ipv4(), outer, local_ts, &addresses);
            let before = self.source(network);
            self.users.insert((network, owner.rank(), order), source);
            let now = self.source(network);
            if now != before
                && let Err(e) = self.netlink.set_route(&self.route(network, now.flatten()))
            {
                self.remove(owner);
                return Err(e);
            }
        }
        Ok(())
    }

    /// The source address of the route to a network; `None` where there is no route.
    fn source(&self, network: Subnet) -> Option<Option<IpAddr>> {
        let all = (network, Rank::Trap, 0)..=(network, Rank::Pair, u64::MAX);
        self.users.range(all).next_back().map(|(_, source)| *source)
    }

    fn route(&self, network: Subnet, source: Option<IpAddr>) -> Route {
        Route { network, gateway: None, link: Some(self.link), source, table: self.table }
    }

    /// All networks with the source addresses of their routes.
    fn routes(&self) -> BTreeMap<Subnet, Option<IpAddr>> {
        self.users.iter().map(|((network, ..), source)| (*network, *source)).collect()
    }

    /// Sets all routes again: the system removes those with a preferred source address together with the address.
    pub(crate) fn restore(&mut self) -> io::Result<()> {
        if !self.enabled || self.users.is_empty() {
            return Ok(());
        }
        let addresses = self.netlink.addresses()?;
        let mut outcome = Ok(());
        for (network, source) in self.routes() {
            let route = self.route(network, source.filter(|source| addresses.contains(source)));
            outcome = outcome.and(self.netlink.set_route(&route));
        }
        outcome
    }

    /// Removes the routes that only this one needed.
    pub(crate) fn remove(&mut self, owner: Owner) {
        let Some((order, networks)) = self.by_owner.remove(&owner) else { return };
        for network in networks {
            let Some(before) = self.source(network) else { continue };
            if self.users.remove(&(network, owner.rank(), order)).is_none() {
                continue;
            }
            let changed = match self.source(network) {
                None => self.netlink.delete_route(&self.route(network, before)),
                Some(now) if now != before => self.netlink.set_route(&self.route(network, now)),
                Some(_) => Ok(()),
            };
            if let Err(e) = changed {
                tracing::warn!("{e}");
            }
        }
    }

    /// Gives the device an address that the peer assigned.
    pub(crate) fn add_address(&mut self, address: IpAddr) -> io::Result<()> {
        self.netlink.add_address(self.link, address, host_prefix(address))
    }

    /// Takes it away.
    pub(crate) fn delete_address(&mut self, address: IpAddr) -> io::Result<()> {
        self.netlink.delete_address(self.link, address, host_prefix(address))
    }

    /// Removes all routes and the rules. Does all that it can, and gives the first error.
    pub(crate) fn clear(&mut self) -> io::Result<()> {
        let mut result = Ok(());
        for (network, source) in self.routes() {
            let route = self.route(network, source);
            result = result.and(self.netlink.delete_route(&route));
        }
        self.users.clear();
        self.by_owner.clear();
        for rule in std::mem::take(&mut self.rules) {
            result = result.and(self.netlink.delete_rule(&rule));
        }
        self.enabled = false;
        result
    }
}

/// The networks of some selectors. The peer chooses within what policy allows, and one crooked range of addresses takes
/// hundreds of routes.
fn networks(remote_ts: &[TrafficSelector]) -> io::Result<BTreeSet<Subnet>> {
    let mut networks = BTreeSet::new();
    for selector in remote_ts {
        networks.extend(selector.networks());
        if networks.len() > MOST_NETWORKS {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("the peer's selectors take more than {MOST_NETWORKS} routes"),
            ));
        }
    }
    Ok(networks)
}

/// The local address that host traffic should come from so that it matches the policy: our outer address when
/// `local_ts` covers it, else the first one in order of the selectors.
fn preferred_source(ipv4: bool, outer: IpAddr, local_ts: &[TrafficSelector], addresses: &[IpAddr]) -> Option<IpAddr> {
    let covers = |selector: &TrafficSelector, address: IpAddr| {
        address.is_ipv4() == selector.start.is_ipv4() && selector.start <= address && address <= selector.end
    };
    let usable = |address: IpAddr| {
        let link_local = match address {
            IpAddr::V4(address) => address.is_link_local(),
            IpAddr::V6(address) => address.is_unicast_link_local(),
        };
        address.is_ipv4() == ipv4 && !address.is_loopback() && !address.is_unspecified() && !link_local
    };
    if usable(outer) && addresses.contains(&outer) && local_ts.iter().any(|selector| covers(selector, outer)) {
        return Some(outer);
    }
    local_ts
        .iter()
        .find_map(|selector| addresses.iter().copied().find(|address| usable(*address) && covers(selector, *address)))
}

/// The prefix length of one address.
pub(crate) fn host_prefix(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// Routes for one SA pair or trap.
const MOST_NETWORKS: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    fn selector(start: &str, end: &str) -> TrafficSelector {
        TrafficSelector {
            protocol: 0,
            start_port: 0,
            end_port: u16::MAX,
            start: start.parse().unwrap(),
            end: end.parse().unwrap(),
        }
    }

    #[test]
    fn selectors_that_take_too_many_routes_are_refused() {
        let crooked =
            |n: u16| selector(&format!("2001:db8:{n:x}::1"), &format!("2001:db8:{n:x}:ffff:ffff:ffff:ffff:fffe"));
        let some: Vec<_> = (0..5).map(crooked).collect();
        assert_eq!(networks(&some).unwrap().len(), 5 * 158);
        let many: Vec<_> = (0..255).map(crooked).collect();
        assert_eq!(networks(&many).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    fn addresses(all: &[&str]) -> Vec<IpAddr> {
        all.iter().map(|address| address.parse().unwrap()).collect()
    }

    #[test]
    fn no_source_is_preferred_when_no_local_address_is_within_the_selectors() {
        let outer = "192.0.2.1".parse().unwrap();
        let local = addresses(&["127.0.0.1", "192.0.2.1", "fe80::1"]);
        assert_eq!(preferred_source(true, outer, &[selector("10.1.0.0", "10.1.255.255")], &local), None);
        assert_eq!(preferred_source(false, outer, &[selector("::", "ffff::")], &local), None, "link-local only");
        let everything = [selector("0.0.0.0", "255.255.255.255")];
        assert_eq!(preferred_source(true, outer, &everything, &addresses(&["127.0.0.1"])), None, "loopback only");
    }

    #[test]
    fn the_outer_address_is_preferred_when_the_selectors_cover_it() {
        let outer = "192.0.2.1".parse().unwrap();
        let local = addresses(&["10.1.0.1", "192.0.2.1"]);
        let everything = [selector("0.0.0.0", "255.255.255.255")];
        assert_eq!(preferred_source(true, outer, &everything, &local), Some(outer));
    }

    #[test]
    fn an_inner_address_is_preferred_within_the_local_network() {
        let outer = "192.0.2.1".parse().unwrap();
        let local = addresses(&["192.0.2.1", "10.1.0.1", "2001:db8::1"]);
        let selectors = [selector("10.1.0.0", "10.1.255.255"), selector("2001:db8::", "2001:db8::ffff")];
        assert_eq!(preferred_source(true, outer, &selectors, &local), Some("10.1.0.1".parse().unwrap()));
        assert_eq!(preferred_source(false, outer, &selectors, &local), Some("2001:db8::1".parse().unwrap()));
    }
}
