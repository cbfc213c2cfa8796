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
        narrow(&[net("10.0.0.0", 8), net("10.2.3.0", 24), net("10.2.0.0", 16)], &allowed).selectors,
        [net("10.2.0.0", 16), net("10.1.0.0", 16)]
    );
    assert_eq!(narrow(&[net("192.0.2.0", 24)], &allowed).selectors, []);
    assert_eq!(narrow(&[], &allowed), Narrowed { selectors: Vec::new(), complete: true });
}

/// Hosts side by side, each of them another way to cut up what `stripes` of the other dimension cover.
fn grid(hosts: u32) -> (Vec<TrafficSelector>, Vec<TrafficSelector>) {
    let host = |n: u32| TrafficSelector::host(Ipv4Addr::from_bits(0x0a00_0000 + n).into());
    let by_address = (0..hosts).map(host).collect();
    let by_port = (0..255u16).map(|n| ports(net("10.0.0.0", 8), 6, n * 2, n * 2)).collect();
    (by_address, by_port)
}

// RFC 7296 §3.13: no more than a payload can carry, and no more work than that is worth
#[test]
fn lists_that_overlap_in_many_ways_are_cut_and_said_to_be() {
    let (by_address, by_port) = grid(255);
    let narrowed = narrow(&by_address, &by_port);
    assert_eq!((narrowed.selectors.len(), narrowed.complete), (MAX_SELECTORS, false));
    // Staircases: each step overlaps with all the others and is within none.
    let stairs: Vec<_> = (0..255u16).map(|n| ports(range("10.0.0.1", "10.0.0.9"), 6, n, n + 255)).collect();
    let narrowed = narrow(&stairs, &stairs);
    assert!(narrowed.selectors.len() <= MAX_SELECTORS);
}

// RFC 7296 §2.9: "the responder MUST narrow … to a subset that includes the initiator's first choices"
#[test]
fn the_first_selector_outlives_the_limit() {
    let (by_address, mut by_port) = grid(255);
    let packet = ports(net("10.9.9.9", 32), 6, 8080, 8080);
    by_port.pop();
    by_port.push(ports(net("10.0.0.0", 8), 6, 8080, 8080));
    let proposed: Vec<_> = [packet].into_iter().chain(by_address.into_iter().take(254)).collect();
    let narrowed = narrow(&proposed, &by_port);
    assert!(!narrowed.complete);
    assert!(narrowed.selectors.iter().any(|selector| selector.contains(&packet)));
}

#[test]
fn what_is_proposed_beyond_a_payload_is_not_looked_at() {
    let one = net("10.0.0.0", 8);
    let proposed: Vec<_> = std::iter::repeat_n(net("fd00::", 8), 255).chain([one]).collect();
    assert_eq!(narrow(&proposed, &[one]).selectors, []);
}

// RFC 7296 §2.9: the packet's own address, protocol and ports
#[test]
fn a_packet_has_selectors_of_its_own() {
    let flow = Flow { protocol: 6, local: ip("10.1.0.5"), local_port: 999, remote: ip("10.2.0.6"), remote_port: 80 };
    let (local, remote) = TrafficSelector::of_flow(&flow);
    assert_eq!((local.to_string(), remote.to_string()), ("10.1.0.5/32[tcp/999]".into(), "10.2.0.6/32[tcp/80]".into()));
    let ping = Flow { protocol: 1, local_port: 0x0800, remote_port: 0x0800, ..flow };
    assert_eq!(TrafficSelector::of_flow(&ping).0.to_string(), "10.1.0.5/32[icmp/8]");
    let gre = Flow { protocol: 47, local_port: 0, remote_port: 0, ..flow };
    assert_eq!(TrafficSelector::of_flow(&gre).1.to_string(), "10.2.0.6/32[gre]");
}

// RFC 4301 §4.4.1.1: OPAQUE is written as 65535 to 0, which is no overlap of ports.
#[test]
fn the_first_and_the_last_port_have_no_overlap() {
    let any = net("10.0.0.0", 8);
    let (first, last) = (ports(any, 17, 0, 0), ports(any, 17, u16::MAX, u16::MAX));
    assert_eq!((first.intersect(&last), last.intersect(&first)), (None, None));
    assert_eq!(ports(any, 17, 0, 7).intersect(&last), None);
}

// RFC 4301 §4.4.1.1: type and code of ICMP, types of the mobility header, are ranges as ports are
#[test]
fn icmp_and_mobility_types_are_narrowed_as_ranges() {
    let any = net("10.0.0.0", 8);
    let cases = [
        (ports(any, 1, 0x0300, 0x03ff), ports(any, 1, 0x0303, 0x0b00), Some((0x0303, 0x03ff))),
        (ports(any, 1, 0x0800, 0x08ff), ports(any, 0, 0, 0xffff), Some((0x0800, 0x08ff))),
        (ports(any, 1, 0x0800, 0x08ff), ports(any, 1, 0x0000, 0x00ff), None),
        (ports(any, 135, 0x0500, 0x0500), ports(any, 135, 0x0100, 0x0700), Some((0x0500, 0x0500))),
        (ports(any, 135, 0x0500, 0x0500), ports(any, 135, 0xffff, 0), None),
    ];
    for (first, second, expected) in cases {
        let overlap = first.intersect(&second).map(|overlap| (overlap.start_port, overlap.end_port));
        assert_eq!(overlap, expected, "{first} {second}");
    }
}

proptest! {
    // RFC 7296 §2.9: it does not matter which side calls it proposal and which policy…
    #[test]
    fn narrowing_is_symmetrical(proposed in selectors(), allowed in selectors()) {
        let sorted = |narrowed: Narrowed| {
            let mut selectors = narrowed.selectors;
            selectors.sort();
            (selectors, narrowed.complete)
        };
        prop_assert_eq!(sorted(narrow(&proposed, &allowed)), sorted(narrow(&allowed, &proposed)));
    }

    // …and doing it again, as the initiator may with the answer, changes nothing.
    #[test]
    fn narrowing_again_changes_nothing(proposed in selectors(), allowed in selectors()) {
        let once = narrow(&proposed, &allowed).selectors;
        let mut again = narrow(&once, &proposed).selectors;
        let mut expected = once.clone();
        again.sort();
        expected.sort();
        prop_assert_eq!(again, expected);
        prop_assert_eq!(&narrow(&once, &once).selectors, &once);
    }

    // The packet that wants the SA is in it wherever both policies have room for it.
    #[test]
    fn the_packet_is_inside_if_both_policies_allow_it(
        policy in selectors(),
        allowed in selectors(),
        protocol in proptest::sample::select(vec![6u8, 17]),
        address in address(),
        port in 1u16..6,
    ) {
        let packet = TrafficSelector { protocol, start_port: port, end_port: port, start: address, end: address };
        let proposed: Vec<_> = [packet].into_iter().chain(policy).collect();
        let inside = narrow(&proposed, &allowed).selectors.iter().any(|one| one.matches(protocol, address, port));
        prop_assert_eq!(inside, allowed.iter().any(|one| one.matches(protocol, address, port)));
    }
}

proptest! {
    // RFC 7296 §2.9: the result is a subset of what was proposed and of what is allowed…
    #[test]
    fn narrowed_selectors_lie_within_both_sides(proposed in selectors(), allowed in selectors()) {
        for narrowed in narrow(&proposed, &allowed).selectors {
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
        prop_assert_eq!(any(&narrow(&proposed, &allowed).selectors), any(&proposed) && any(&allowed));
    }

    #[test]
    fn narrowing_leaves_nothing_redundant(proposed in selectors(), allowed in selectors()) {
        let narrowed = narrow(&proposed, &allowed).selectors;
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
