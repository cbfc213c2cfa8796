//! Which addresses this host has for its peers, and by which of them packets would go: what a move is decided on.

use std::collections::BTreeSet;
use std::net::IpAddr;

/// A network interface as the system describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Interface {
    pub(crate) index: u32,
    pub(crate) name: String,
    /// Administratively up, and with carrier.
    pub(crate) up: bool,
    pub(crate) loopback: bool,
    /// Addresses that can be used: of more than link scope, neither tentative nor deprecated.
    pub(crate) addresses: Vec<IpAddr>,
}

/// Whose addresses are ours to use (`charon.interfaces_use`, `charon.interfaces_ignore`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InterfaceFilter {
    /// Names of the only interfaces to use; empty is all.
    pub only: Vec<String>,
    /// Names of interfaces not to use; without effect where `only` has names.
    pub ignored: Vec<String>,
}

impl InterfaceFilter {
    fn admits(&self, name: &str) -> bool {
        let named = |names: &[String]| names.iter().any(|one| one == name);
        if self.only.is_empty() { !named(&self.ignored) } else { named(&self.only) }
    }
}

/// A pair of addresses between which packets can go now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressPair {
    /// Ours.
    pub local: IpAddr,
    /// The peer's.
    pub remote: IpAddr,
    /// They leave through the interface that has `local`, or `local` is the loopback interface's.
    pub direct: bool,
}

/// The addresses by which peers can reach us, in the system's order.
pub(crate) fn reachable_at(interfaces: &[Interface], filter: &InterfaceFilter, tunnel: u32) -> Vec<IpAddr> {
    let usable = usable(interfaces, filter, tunnel);
    let mut seen = BTreeSet::new();
    usable.flat_map(|interface| &interface.addresses).copied().filter(|address| seen.insert(*address)).collect()
}

fn usable<'a>(
    interfaces: &'a [Interface],
    filter: &'a InterfaceFilter,
    tunnel: u32,
) -> impl Iterator<Item = &'a Interface> {
    interfaces.iter().filter(move |interface| {
        interface.up && !interface.loopback && interface.index != tunnel && filter.admits(&interface.name)
    })
}

/// All pairs with `remotes` that packets can take, best first: what the system would choose, then other addresses on
/// the interface that the packets leave through, then the rest. `in_use` may be an address of the loopback interface.
/// `route` gives source address and interface for a destination and, if given, a source.
pub(crate) fn pairs(
    interfaces: &[Interface],
    filter: &InterfaceFilter,
    tunnel: u32,
    in_use: IpAddr,
    remotes: &[IpAddr],
    mut route: impl FnMut(IpAddr, Option<IpAddr>) -> Option<(IpAddr, u32)>,
) -> Vec<AddressPair> {
    let usable: Vec<&Interface> = usable(interfaces, filter, tunnel).collect();
    let of_loopback = interfaces.iter().filter(|one| one.loopback).any(|one| one.addresses.contains(&in_use));
    let is_up = |index: u32| interfaces.iter().any(|one| one.index == index && one.up && index != tunnel);
    let owns =
        |index: u32, local: IpAddr| usable.iter().any(|one| one.index == index && one.addresses.contains(&local));
    let known = |local: IpAddr| usable.iter().any(|one| one.addresses.contains(&local));
    let mut pairs: Vec<AddressPair> = Vec::new();
    for &remote in remotes {
        let Some((local, through)) = route(remote, None) else { continue };
        if known(local) && is_up(through) {
            pairs.push(AddressPair { local, remote, direct: owns(through, local) });
        }
    }
    for &remote in remotes {
        let locals = usable.iter().flat_map(|one| &one.addresses).copied();
        for local in locals.chain(of_loopback.then_some(in_use)) {
            let listed = pairs.iter().any(|pair| (pair.local, pair.remote) == (local, remote));
            if listed || local.is_ipv4() != remote.is_ipv4() {
                continue;
            }
            if let Some((_, through)) = route(remote, Some(local)).filter(|(_, through)| is_up(*through)) {
                let direct = owns(through, local) || (of_loopback && local == in_use);
                pairs.push(AddressPair { local, remote, direct });
            }
        }
    }
    pairs.sort_by_key(|pair| !pair.direct);
    pairs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn interface(index: u32, name: &str, up: bool, addresses: &[&str]) -> Interface {
        let addresses = addresses.iter().map(|address| ip(address)).collect();
        Interface { index, name: name.to_owned(), up, loopback: name == "lo", addresses }
    }

    const TUNNEL: u32 = 9;

    fn host() -> Vec<Interface> {
        vec![
            interface(1, "lo", true, &["10.9.9.9"]),
            interface(2, "wlan0", true, &["192.0.2.1", "2001:db8::1"]),
            interface(3, "wwan0", true, &["198.51.100.1"]),
            interface(TUNNEL, "lk0", true, &["10.1.0.1"]),
        ]
    }

    /// wlan0 is the default route for what is not of wwan0's network.
    fn routes(remote: IpAddr, from: Option<IpAddr>) -> Option<(IpAddr, u32)> {
        let through = if remote.to_string().starts_with("198.51.100.") { 3 } else { 2 };
        let own = if remote.is_ipv6() {
            "2001:db8::1"
        } else if through == 3 {
            "198.51.100.1"
        } else {
            "192.0.2.1"
        };
        Some((from.unwrap_or(ip(own)), through))
    }

    fn find(interfaces: &[Interface], in_use: &str, remotes: &[&str]) -> Vec<(String, bool)> {
        let remotes: Vec<IpAddr> = remotes.iter().map(|remote| ip(remote)).collect();
        let pairs = pairs(interfaces, &InterfaceFilter::default(), TUNNEL, ip(in_use), &remotes, routes);
        pairs.iter().map(|pair| (format!("{}-{}", pair.local, pair.remote), pair.direct)).collect()
    }

    #[test]
    fn an_interface_that_is_down_or_not_for_us_has_no_addresses_for_peers() {
        let mut host = host();
        let all = InterfaceFilter::default();
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        assert_eq!(reachable_at(&host, &all, TUNNEL), [ip("192.0.2.1"), ip("2001:db8::1"), ip("198.51.100.1")]);
        let only = InterfaceFilter { only: names(&["wwan0"]), ignored: names(&["wwan0"]) };
        assert_eq!(reachable_at(&host, &only, TUNNEL), [ip("198.51.100.1")]);
        let without = InterfaceFilter { only: Vec::new(), ignored: names(&["wlan0"]) };
        assert_eq!(reachable_at(&host, &without, TUNNEL), [ip("198.51.100.1")]);
        host[1].up = false;
        assert_eq!(reachable_at(&host, &all, TUNNEL), [ip("198.51.100.1")]);
        assert!(find(&host, "192.0.2.1", &["203.0.113.1"]).is_empty(), "the route leads to an interface that is down");
        assert!(find(&[], "192.0.2.1", &["203.0.113.1"]).is_empty());
    }

    #[test]
    fn what_the_system_would_choose_comes_first() {
        let found = find(&host(), "192.0.2.1", &["203.0.113.1", "198.51.100.2", "2001:db8::2"]);
        let expected = [
            ("192.0.2.1-203.0.113.1", true),
            ("198.51.100.1-198.51.100.2", true),
            ("2001:db8::1-2001:db8::2", true),
            ("198.51.100.1-203.0.113.1", false),
            ("192.0.2.1-198.51.100.2", false),
        ];
        assert_eq!(found, expected.map(|(pair, direct)| (pair.to_owned(), direct)));
    }

    #[test]
    fn an_address_of_the_loopback_interface_that_is_in_use_stays() {
        let found = find(&host(), "10.9.9.9", &["203.0.113.1"]);
        assert!(found.contains(&("10.9.9.9-203.0.113.1".to_owned(), true)));
        assert!(!find(&host(), "192.0.2.1", &["203.0.113.1"]).iter().any(|(pair, _)| pair.starts_with("10.9")));
    }
}
