//! Routes for what SAs and traps protect: one table, one rule for each family that leads all packets but our own to it.
//!
//! Where ESP is done in user space they lead into the tunnel's device. Where the kernel does it, its policies select
//! packets wherever they go, and a route is only there to give them the source address that the policies want: it leads
//! where the peer's packets go anyway.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::net::IpAddr;

use ipsec::selector::TrafficSelector;

use crate::addresses::Addresses;
use crate::netlink::{Netlink, Route, Rule, RuleAction, RuleSelector};

/// The routes of the installed SA pairs, traps and shunts, counted by user.
pub(crate) struct Routes {
    netlink: Netlink,
    addresses: Addresses,
    table: u32,
    mark: u32,
    link: u32,
    rules: Vec<Rule>,
    enabled: bool,
    /// Who needs which route to each network: traps, then pairs, then shunts, oldest first. The last one decides.
    users: BTreeMap<(Subnet, Rank, u64), Need>,
    /// What is in the table.
    set: BTreeMap<Subnet, Route>,
    /// Each user's number in that order, and its networks.
    by_owner: HashMap<Owner, (u64, Vec<Subnet>)>,
    last: u64,
}

/// An address and a prefix length.
type Subnet = (IpAddr, u8);

/// Where a route leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Via {
    /// Into the tunnel's device.
    Tunnel,
    /// Where packets to this address go.
    Towards(IpAddr),
    /// Where packets to the network itself go.
    Itself,
    /// Where they would go if this table were not there.
    OtherTables,
    /// Into this link.
    Link(u32),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Need {
    source: Option<IpAddr>,
    via: Via,
}

/// Traps come before pairs: a trap does not take the source address from a pair that carries traffic. Shunts come last, as
/// their policies go before all others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    Trap,
    Pair,
    Shunt,
}

/// Who needs a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Owner {
    /// The SA pair with this inbound SPI.
    Pair(u32),
    /// The trap with this `reqid`.
    Trap(u32),
    /// The shunt with this number, which passes.
    Shunt(u32),
}

impl Owner {
    fn rank(self) -> Rank {
        match self {
            Self::Pair(_) => Rank::Pair,
            Self::Trap(_) => Rank::Trap,
            Self::Shunt(_) => Rank::Shunt,
        }
    }
}

impl Routes {
    /// Adds the rules, unless routes are not wanted. A family that the system lacks is left out. For the network namespace of
    /// the calling thread, which is that of `netlink`.
    pub(crate) fn new(
        mut netlink: Netlink,
        link: u32,
        (table, priority, mark): (u32, u32, u32),
        enabled: bool,
    ) -> io::Result<Self> {
        let mut rules = Vec::new();
        if enabled {
            for ipv6 in [false, true] {
                let rule =
                    Rule { ipv6, priority, action: RuleAction::Lookup(table), selector: RuleSelector::NotMark(mark) };
                match netlink.add_rule(&rule) {
                    Ok(()) => rules.push(rule),
                    Err(e) if ipv6 => tracing::info!("no IPv6 routes into the tunnel: {e}"),
                    Err(e) => return Err(e),
                }
            }
        }
        Ok(Self {
            netlink,
            addresses: Addresses::subscribe()?,
            table,
            mark,
            link,
            rules,
            enabled,
            users: BTreeMap::new(),
            set: BTreeMap::new(),
            by_owner: HashMap::new(),
            last: 0,
        })
    }

    /// Adds the routes that a pair or trap needs. All of them, or on error none.
    pub(crate) fn add(
        &mut self,
        owner: Owner,
        via: Via,
        outer: IpAddr,
        local_ts: &[TrafficSelector],
        remote_ts: &[TrafficSelector],
    ) -> io::Result<()> {
        if !self.enabled {
            return Ok(());
        }
        let networks = networks(remote_ts)?;
        let addresses = self.addresses.all(&mut self.netlink)?;
        self.last += 1;
        let order = self.last;
        self.by_owner.insert(owner, (order, networks.iter().copied().collect()));
        for network in networks {
            let source = preferred_source(network.0.is_ipv4(), outer, local_ts, &addresses);
            self.users.insert((network, owner.rank(), order), Need { source, via });
            if let Err(e) = self.settle(network, None) {
                self.remove(owner);
                return Err(e);
            }
        }
        Ok(())
    }

    /// The routes of a pair lead elsewhere from now on, unless they lead into a link.
    pub(crate) fn redirect(&mut self, owner: Owner, via: Via) {
        let Some((order, networks)) = self.by_owner.get(&owner).cloned() else { return };
        for network in networks {
            if let Some(need) = self.users.get_mut(&(network, owner.rank(), order))
                && !matches!(need.via, Via::Link(_))
            {
                need.via = via;
            }
            self.settle_or_warn(network);
        }
    }

    /// As whom the system's news name the changes of rules.
    pub(crate) fn port(&self) -> u32 {
        self.netlink.port()
    }

    /// Sets all routes and rules again: the system removes those with a preferred source address together with the address, and
    /// the way to a peer may be another.
    pub(crate) fn restore(&mut self) -> io::Result<()> {
        if !self.enabled {
            return Ok(());
        }
        let ruled = self.rules.iter().map(|rule| self.netlink.add_rule(rule)).fold(Ok(()), io::Result::and);
        if self.users.is_empty() {
            return ruled;
        }
        let addresses = self.addresses.all(&mut self.netlink)?;
        let networks: BTreeSet<Subnet> = self.users.keys().map(|(network, ..)| *network).collect();
        let mut outcome = ruled;
        for network in networks {
            outcome = outcome.and(self.settle(network, Some(&addresses)));
        }
        outcome
    }

    /// Removes the routes that only this one needed.
    pub(crate) fn remove(&mut self, owner: Owner) {
        let Some((order, networks)) = self.by_owner.remove(&owner) else { return };
        for network in networks {
            if self.users.remove(&(network, owner.rank(), order)).is_some() {
                self.settle_or_warn(network);
            }
        }
    }

    fn settle_or_warn(&mut self, network: Subnet) {
        if let Err(e) = self.settle(network, None) {
            tracing::warn!("{e}");
        }
    }

    /// Makes the table's route to a network what the last of those who need one needs; given all addresses of this host,
    /// also if it seems to be that already.
    fn settle(&mut self, network: Subnet, addresses: Option<&[IpAddr]>) -> io::Result<()> {
        let all = (network, Rank::Trap, 0)..=(network, Rank::Shunt, u64::MAX);
        let wanted = self.users.range(all).next_back().map(|(_, need)| *need).and_then(|mut need| {
            need.source = need.source.filter(|source| addresses.is_none_or(|all| all.contains(source)));
            self.route(network, need)
        });
        let outcome = match (&wanted, self.set.get(&network)) {
            (Some(wanted), set) if addresses.is_some() || set != Some(wanted) => self.netlink.set_route(wanted),
            (None, Some(set)) => self.netlink.delete_route(set),
            _ => Ok(()),
        };
        if outcome.is_ok() {
            match wanted {
                Some(route) => self.set.insert(network, route),
                None => self.set.remove(&network),
            };
        }
        outcome
    }

    /// The route that somebody needs; `None` where the system's own do.
    fn route(&mut self, network: Subnet, need: Need) -> Option<Route> {
        let (gateway, link) = match need.via {
            Via::Tunnel => (None, self.link),
            Via::Link(link) => (None, link),
            Via::Towards(_) | Via::Itself if need.source.is_none() => return None,
            Via::Towards(remote) => {
                let (gateway, link) = self.netlink.way(remote, self.mark)?;
                // A gateway of the other family is none for these packets, which never get there as they are.
                (gateway.filter(|gateway| gateway.is_ipv4() == network.0.is_ipv4()), link)
            }
            Via::Itself => self.netlink.way(network.0, self.mark)?,
            Via::OtherTables => {
                return Some(Route { network, gateway: None, link: None, source: None, table: self.table });
            }
        };
        Some(Route { network, gateway, link: Some(link), source: need.source, table: self.table })
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
        for route in std::mem::take(&mut self.set).values() {
            result = result.and(self.netlink.delete_route(route));
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
