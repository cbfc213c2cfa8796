use proptest::prelude::*;

use super::*;

#[test]
fn disjoint_families_protocols_and_ports_do_not_intersect() {
    let web = ports(net("10.1.0.0", 24), 6, 80, 80);
    for other in [
        net("fd00::", 8),
        net("10.2.0.0", 24),
        ports(net("10.1.0.0", 24), 17, 80, 80),
        ports(net("10.1.0.0", 24), 6, 81, 90),
        ports(net("10.1.0.0", 24), 6, 0xffff, 0),
        ports(net("10.1.0.0", 24), 6, 90, 81),
        range("10.1.0.9", "10.1.0.3"),
    ] {
        assert_eq!(web.intersect(&other), None, "{other:?}");
        assert_eq!(other.intersect(&web), None, "{other:?}");
    }
}

// RFC 4301 §4.4.1.1: ANY encompasses OPAQUE, a port does not
#[test]
fn opaque_ports_are_part_of_any_port_and_of_nothing_else() {
    let opaque = ports(net("10.0.0.0", 8), 6, 0xffff, 0);
    let any = net("10.0.0.0", 8);
    assert_eq!(opaque.intersect(&any), Some(opaque));
    assert_eq!(opaque.intersect(&opaque), Some(opaque));
    assert!(any.contains(&opaque) && !opaque.contains(&any));
    assert!(!opaque.matches(6, ip("10.0.0.1"), 0xffff) && !opaque.matches(6, ip("10.0.0.1"), 0));
    assert!(opaque.matches_without_ports(6, ip("10.0.0.1")));
    assert!(any.matches_without_ports(6, ip("10.0.0.1")));
    assert!(!ports(any, 6, 0, 1023).matches_without_ports(6, ip("10.0.0.1")));
}

#[test]
fn networks_of_impossible_prefixes_are_refused() {
    assert_eq!(TrafficSelector::network(ip("10.0.0.0"), 33), None);
    assert_eq!(TrafficSelector::network(ip("::"), 129), None);
    assert_eq!(net("10.1.2.3", 8), range("10.0.0.0", "10.255.255.255"));
    assert_eq!(net("::", 0).end, ip("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"));
}

#[test]
fn prefix_is_given_for_exact_networks_only() {
    assert_eq!(net("10.1.0.0", 24).prefix(), Some(24));
    assert_eq!(net("0.0.0.0", 0).prefix(), Some(0));
    assert_eq!(net("::", 0).prefix(), Some(0));
    assert_eq!(TrafficSelector::host(ip("fd00::1")).prefix(), Some(128));
    assert_eq!(range("10.0.0.1", "10.0.0.2").prefix(), None);
    assert_eq!(range("10.0.0.3", "10.0.0.9").prefix(), None);
    assert_eq!(range("10.0.0.9", "10.0.0.3").prefix(), None);
}

#[test]
fn display_is_strongswans_notation() {
    for (selector, text) in [
        (ports(net("10.1.0.0", 24), 6, 80, 80), "10.1.0.0/24[tcp/80]"),
        (range("10.0.0.3", "10.0.0.9"), "10.0.0.3..10.0.0.9"),
        (TrafficSelector::host(ip("fd00::1")), "fd00::1/128"),
        (ports(net("10.1.0.0", 24), 17, 0, 65535), "10.1.0.0/24[udp]"),
        (ports(net("10.1.0.0", 24), 99, 5, 7), "10.1.0.0/24[99/5-7]"),
        (ports(net("10.1.0.0", 24), 0, 5, 7), "10.1.0.0/24[0/5-7]"),
        (ports(net("10.1.0.0", 24), 1, 0x0800, 0x0800), "10.1.0.0/24[icmp/8]"),
        (ports(net("10.1.0.0", 24), 1, 0x0301, 0x0303), "10.1.0.0/24[icmp/3(1)-3(3)]"),
        (ports(net("10.1.0.0", 24), 6, 0xffff, 0), "10.1.0.0/24[tcp/OPAQUE]"),
    ] {
        assert_eq!(selector.to_string(), text);
    }
}

#[test]
fn narrowing_keeps_policy_order_without_contained_ones() {
    let allowed = [net("10.2.0.0", 16), net("10.1.0.0", 24), net("10.1.0.0", 16)];
    assert_eq!(
        narrow(&[net("10.0.0.0", 8), net("10.2.3.0", 24), net("10.2.0.0", 16)], &allowed),
        [net("10.2.0.0", 16), net("10.1.0.0", 16)]
    );
    assert_eq!(narrow(&[net("192.0.2.0", 24)], &allowed), []);
    assert_eq!(narrow(&[], &allowed), []);
}

proptest! {
    // RFC 7296 §2.9: the result is a subset of what was proposed and of what is allowed…
    #[test]
    fn narrowed_selectors_lie_within_both_sides(proposed in selectors(), allowed in selectors()) {
        for narrowed in narrow(&proposed, &allowed) {
            prop_assert!(proposed.iter().any(|p| p.contains(&narrowed)));
            prop_assert!(allowed.iter().any(|a| a.contains(&narrowed)));
        }
    }

    // …and no packet that both match is lost.
    #[test]
    fn narrowing_is_maximal(
        proposed in selectors(),
        allowed in selectors(),
        protocol in protocol(),
        address in address(),
        port in port(),
        seen: bool,
    ) {
        let any = |list: &[TrafficSelector]| {
            list.iter().any(|ts| match seen {
                true => ts.matches(protocol, address, port),
                false => ts.matches_without_ports(protocol, address),
            })
        };
        prop_assert_eq!(any(&narrow(&proposed, &allowed)), any(&proposed) && any(&allowed));
    }

    #[test]
    fn narrowing_leaves_nothing_redundant(proposed in selectors(), allowed in selectors()) {
        let narrowed = narrow(&proposed, &allowed);
        for (i, first) in narrowed.iter().enumerate() {
            for (j, second) in narrowed.iter().enumerate() {
                prop_assert!(i == j || !first.contains(second));
            }
        }
    }

    #[test]
    fn networks_cover_the_range_exactly_and_in_order(a: u32, b: u32, c: u128, d: u128, v6: bool) {
        let selector = if v6 {
            TrafficSelector { start: Ipv6Addr::from_bits(c.min(d)).into(), end: Ipv6Addr::from_bits(c.max(d)).into(), ..net("::", 0) }
        } else {
            TrafficSelector { start: Ipv4Addr::from_bits(a.min(b)).into(), end: Ipv4Addr::from_bits(a.max(b)).into(), ..net("0.0.0.0", 0) }
        };
        let networks = selector.networks();
        prop_assert!(networks.len() <= 254);
        let (_, mut next, end) = selector.range().unwrap();
        let mut covered = false;
        for (address, prefix) in networks {
            prop_assert!(!covered);
            let network = TrafficSelector::network(address, prefix).unwrap();
            let (_, first, last) = network.range().unwrap();
            prop_assert_eq!(first, next);
            covered = last == end;
            next = last.wrapping_add(1);
        }
        prop_assert!(covered);
    }
}

fn selectors() -> impl Strategy<Value = Vec<TrafficSelector>> {
    proptest::collection::vec(selector(), 0..5)
}

/// Small ranges, so that overlaps of every kind are common; some are upside down.
fn selector() -> impl Strategy<Value = TrafficSelector> {
    (protocol(), port(), port(), address(), address(), 0u8..4).prop_map(|(protocol, p, q, start, end, kind)| {
        let (start_port, end_port) = match kind {
            0 => (0, u16::MAX),
            1 => (u16::MAX, 0),
            2 => (p.min(q), p.max(q)),
            _ => (p, q),
        };
        TrafficSelector { protocol, start_port, end_port, start, end }
    })
}

fn protocol() -> impl Strategy<Value = u8> {
    proptest::sample::select(vec![0u8, 6, 17])
}

fn port() -> impl Strategy<Value = u16> {
    prop_oneof![0u16..6, Just(u16::MAX)]
}

fn address() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        (0u32..8).prop_map(|n| IpAddr::V4(Ipv4Addr::from_bits(n))),
        (0u128..4).prop_map(|n| IpAddr::V6(Ipv6Addr::from_bits(n)))
    ]
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn net(address: &str, prefix: u8) -> TrafficSelector {
    TrafficSelector::network(ip(address), prefix).unwrap()
}

fn range(start: &str, end: &str) -> TrafficSelector {
    TrafficSelector { start: ip(start), end: ip(end), ..TrafficSelector::host(ip(start)) }
}

fn ports(selector: TrafficSelector, protocol: u8, start_port: u16, end_port: u16) -> TrafficSelector {
    TrafficSelector { protocol, start_port, end_port, ..selector }
}
