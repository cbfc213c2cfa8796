//! Traffic selectors around flows that are somebody else's (RFC 5660 §2.3, RFC 7296 §2.9): as much as selectors can say of what
//! was proposed, without the flows.

use std::net::IpAddr;

use crate::selector::{Flow, TrafficSelector};

/// Selectors that the gaps may add to one side. Each pair of selectors of the two sides may become a policy of the system.
const MAX_MORE: usize = 32;

/// Both sides' selectors without these flows: `None` where they cannot be left out, since nothing else is left or selectors would
/// become too many.
///
/// A flow is left out on one side. First choice is the side of its higher port: that is most likely one connection's alone, and
/// little else is lost with it. Where that takes too many selectors, it is the other side.
///
/// Selectors know one protocol or all. Where all protocols of an address were proposed, what is left of it is TCP, UDP, SCTP and
/// ICMP, each without the flow.
pub fn around(
    local: &[TrafficSelector],
    remote: &[TrafficSelector],
    flows: &[Flow],
) -> Option<(Vec<TrafficSelector>, Vec<TrafficSelector>)> {
    [Choice::HigherPort, Choice::LowerPort].into_iter().find_map(|choice| leave_out(local, remote, flows, choice))
}

/// Selectors without some addresses: ranges in order, none of which meets another.
pub fn without_addresses(selectors: &[TrafficSelector], ranges: &[(IpAddr, IpAddr)]) -> Vec<TrafficSelector> {
    let mut left = Vec::new();
    for selector in selectors {
        let mut rest = Some(*selector);
        let first = ranges.partition_point(|(_, end)| *end < selector.start);
        let meeting = ranges.iter().skip(first).take_while(|(start, _)| *start <= selector.end);
        for (start, end) in meeting {
            let Some(of) = rest else { break };
            left.extend(before(*start).map(|end| TrafficSelector { end, ..of }).filter(has_addresses));
            rest = after(*end).map(|start| TrafficSelector { start, ..of }).filter(has_addresses);
        }
        left.extend(rest);
    }
    left
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Choice {
    HigherPort,
    LowerPort,
}

fn leave_out(
    local: &[TrafficSelector],
    remote: &[TrafficSelector],
    flows: &[Flow],
    choice: Choice,
) -> Option<(Vec<TrafficSelector>, Vec<TrafficSelector>)> {
    let (most_local, most_remote) = (local.len() + MAX_MORE, remote.len() + MAX_MORE);
    let (mut local, mut remote) = (local.to_vec(), remote.to_vec());
    for flow in flows {
        let ours = End { protocol: flow.protocol, address: flow.local, port: flow.local_port };
        let theirs = End { protocol: flow.protocol, address: flow.remote, port: flow.remote_port };
        if !ours.is_in(&local) || !theirs.is_in(&remote) {
            continue;
        }
        let (without_ours, without_theirs) = (ours.left_out_of(&local), theirs.left_out_of(&remote));
        let ours_first = (flow.local_port > flow.remote_port) == (choice == Choice::HigherPort);
        if !without_ours.is_empty() && (ours_first || without_theirs.is_empty()) {
            local = without_ours;
        } else if !without_theirs.is_empty() {
            remote = without_theirs;
        } else {
            return None;
        }
        if local.len() > most_local || remote.len() > most_remote {
            return None;
        }
    }
    Some((local, remote))
}

/// One end of a flow.
#[derive(Clone, Copy)]
struct End {
    protocol: u8,
    address: IpAddr,
    port: u16,
}

impl End {
    fn is_in(&self, selectors: &[TrafficSelector]) -> bool {
        selectors.iter().any(|selector| self.is_selected_by(selector))
    }

    fn is_selected_by(&self, selector: &TrafficSelector) -> bool {
        selector.matches(self.protocol, self.address, self.port)
    }

    fn left_out_of(&self, selectors: &[TrafficSelector]) -> Vec<TrafficSelector> {
        let mut left = Vec::new();
        for selector in selectors {
            if !self.is_selected_by(selector) {
                left.push(*selector);
                continue;
            }
            let at = TrafficSelector { start: self.address, end: self.address, ..*selector };
            left.extend(before(self.address).map(|end| TrafficSelector { end, ..*selector }).filter(has_addresses));
            let ported = TrafficSelector { protocol: self.protocol, ..at };
            left.extend(
                self.port.checked_sub(1).map(|end_port| TrafficSelector { end_port, ..ported }).filter(has_ports),
            );
            left.extend(
                self.port.checked_add(1).map(|start_port| TrafficSelector { start_port, ..ported }).filter(has_ports),
            );
            if selector.protocol == 0 {
                let icmp = if self.address.is_ipv4() { ICMP } else { ICMPV6 };
                let others = [TCP, UDP, SCTP, icmp].into_iter().filter(|other| *other != self.protocol);
                left.extend(others.map(|protocol| TrafficSelector { protocol, ..at }));
            }
            left.extend(after(self.address).map(|start| TrafficSelector { start, ..*selector }).filter(has_addresses));
        }
        left
    }
}

fn has_addresses(selector: &TrafficSelector) -> bool {
    selector.start <= selector.end && selector.start.is_ipv4() == selector.end.is_ipv4()
}

fn has_ports(selector: &TrafficSelector) -> bool {
    selector.start_port <= selector.end_port
}

fn before(address: IpAddr) -> Option<IpAddr> {
    Some(match address {
        IpAddr::V4(address) => IpAddr::V4(address.to_bits().checked_sub(1)?.into()),
        IpAddr::V6(address) => IpAddr::V6(address.to_bits().checked_sub(1)?.into()),
    })
}

fn after(address: IpAddr) -> Option<IpAddr> {
    Some(match address {
        IpAddr::V4(address) => IpAddr::V4(address.to_bits().checked_add(1)?.into()),
        IpAddr::V6(address) => IpAddr::V6(address.to_bits().checked_add(1)?.into()),
    })
}

const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;
const SCTP: u8 = 132;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

    use proptest::prelude::*;

    use super::*;

    fn flow(local_port: u16, remote_port: u16) -> Flow {
        Flow {
            protocol: TCP,
            local: "10.1.0.1".parse().unwrap(),
            local_port,
            remote: "10.2.0.1".parse().unwrap(),
            remote_port,
        }
    }

    fn network(address: &str, prefix: u8) -> TrafficSelector {
        TrafficSelector::network(address.parse().unwrap(), prefix).unwrap()
    }

    fn text(selectors: &[TrafficSelector]) -> String {
        selectors.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn nothing_is_left_of_the_flow_alone() {
        let (local, remote) = TrafficSelector::of_flow(&flow(40_000, 7));
        assert_eq!(around(&[local], &[remote], &[flow(40_000, 7)]), None);
    }

    #[test]
    fn too_many_gaps_are_left_out_on_the_other_side_or_not_at_all() {
        let hosts = ([network("10.1.0.1", 32)], [network("10.2.0.1", 32)]);
        // All of one service: one gap on its side is enough.
        let service: Vec<Flow> = (0..100).map(|n| flow(40_000 + 2 * n, 7)).collect();
        let (local, remote) = around(&hosts.0, &hosts.1, &service).unwrap();
        assert_eq!(text(&local), "10.1.0.1/32");
        assert!(text(&remote).starts_with("10.2.0.1/32[tcp/0-6] 10.2.0.1/32[tcp/8-65535] 10.2.0.1/32[udp]"));
        let scattered: Vec<Flow> = (0..100).map(|n| flow(40_000 + 2 * n, 50_000 + 2 * n)).collect();
        assert_eq!(around(&hosts.0, &hosts.1, &scattered), None);
    }

    #[test]
    fn a_flow_is_left_out_where_least_is_lost_with_it() {
        let (ours, theirs) = ([network("10.1.0.0", 24)], [network("10.2.0.1", 32)]);
        let (local, remote) = around(&ours, &theirs, &[flow(40_000, 7)]).unwrap();
        assert_eq!(text(&remote), "10.2.0.1/32");
        assert_eq!(
            text(&local),
            "10.1.0.0/32 10.1.0.1/32[tcp/0-39999] 10.1.0.1/32[tcp/40001-65535] 10.1.0.1/32[udp] 10.1.0.1/32[sctp] \
             10.1.0.1/32[icmp] 10.1.0.2..10.1.0.255"
        );
        // We serve: the client's port is the higher one.
        let (local, remote) = around(&ours, &theirs, &[flow(7, 40_000)]).unwrap();
        assert_eq!(text(&local), "10.1.0.0/24");
        assert!(text(&remote).starts_with("10.2.0.1/32[tcp/0-39999] 10.2.0.1/32[tcp/40001-65535]"));
        // Of the side that has nothing else, the other one has.
        let narrow = TrafficSelector::of_flow(&flow(40_000, 7)).0;
        let (local, remote) = around(&[narrow], &theirs, &[flow(40_000, 7)]).unwrap();
        assert_eq!(local, [narrow]);
        assert!(text(&remote).starts_with("10.2.0.1/32[tcp/0-6]"));
        // The ends of what there is.
        let all = [network("0.0.0.0", 0)];
        let edge = Flow { local: "255.255.255.255".parse().unwrap(), remote: "0.0.0.0".parse().unwrap(), ..flow(0, 0) };
        assert_eq!(text(&around(&all, &all, &[edge]).unwrap().1).split(' ').next(), Some("0.0.0.0/32[tcp/1-65535]"));
        // What does not select it stays as it is.
        let udp = [TrafficSelector { protocol: UDP, ..ours[0] }];
        assert_eq!(around(&udp, &theirs, &[flow(40_000, 7)]).unwrap(), (udp.to_vec(), theirs.to_vec()));
    }

    #[test]
    fn addresses_are_left_out_of_selectors() {
        let range = |start: &str, end: &str| (start.parse().unwrap(), end.parse().unwrap());
        let claimed = [range("0.0.0.0", "0.0.0.7"), range("10.2.0.0", "10.2.0.255"), range("10.2.1.5", "10.2.1.5")];
        let left = |selector| text(&without_addresses(&[selector], &claimed));
        assert_eq!(left(network("10.2.0.7", 32)), "");
        assert_eq!(left(network("10.2.0.0", 24)), "");
        assert_eq!(left(network("10.2.0.0", 23)), "10.2.1.0..10.2.1.4 10.2.1.6..10.2.1.255");
        assert_eq!(left(network("10.3.0.0", 24)), "10.3.0.0/24");
        assert_eq!(left(network("0.0.0.0", 29)), "");
        assert_eq!(left(network("2001:db8::", 32)), "2001:db8::/32");
        let all = left(network("0.0.0.0", 0));
        assert!(
            all.starts_with("0.0.0.8..10.1.255.255 10.2.1.0..10.2.1.4 ") && all.ends_with("..255.255.255.255"),
            "{all}"
        );
        let end = [range("255.255.255.0", "255.255.255.255")];
        assert_eq!(text(&without_addresses(&[network("255.255.255.255", 32)], &end)), "");
    }

    fn selector() -> impl Strategy<Value = TrafficSelector> {
        let ports = prop_oneof![Just((0, u16::MAX)), (0u16..6, 0u16..6).prop_map(|(a, b)| (a.min(b), a.max(b)))];
        let protocol = prop_oneof![Just(0), Just(TCP), Just(UDP)];
        (0u8..4, 0u8..4, protocol, ports).prop_map(|(a, b, protocol, (start_port, end_port))| TrafficSelector {
            protocol,
            start_port,
            end_port,
            start: IpAddr::from([10, 0, 0, a.min(b)]),
            end: IpAddr::from([10, 0, 0, a.max(b)]),
        })
    }

    fn any_flow() -> impl Strategy<Value = Flow> {
        (prop_oneof![Just(TCP), Just(UDP)], 0u8..4, 0u16..6, 0u8..4, 0u16..6).prop_map(
            |(protocol, local, local_port, remote, remote_port)| Flow {
                protocol,
                local: IpAddr::from([10, 0, 0, local]),
                local_port,
                remote: IpAddr::from([10, 0, 0, remote]),
                remote_port,
            },
        )
    }

    proptest! {
        // RFC 7296 §2.9: narrowing gives a subset; RFC 5660 §2.3: without the flow; and no more is lost than one end of it.
        #[test]
        fn what_is_left_is_within_what_was_without_the_flows_and_no_less(
            local in proptest::collection::vec(selector(), 1..4),
            remote in proptest::collection::vec(selector(), 1..4),
            flows in proptest::collection::vec(any_flow(), 1..4),
            probes in proptest::collection::vec(any_flow(), 64),
        ) {
            let selects = |local: &[TrafficSelector], remote: &[TrafficSelector], flow: &Flow| {
                local.iter().any(|ts| ts.matches(flow.protocol, flow.local, flow.local_port))
                    && remote.iter().any(|ts| ts.matches(flow.protocol, flow.remote, flow.remote_port))
            };
            let Some((left, right)) = around(&local, &remote, &flows) else { return Ok(()) };
            prop_assert!(!left.is_empty() && !right.is_empty());
            for flow in &flows {
                prop_assert!(!selects(&left, &right, flow));
            }
            for probe in &probes {
                let (before, after) = (selects(&local, &remote, probe), selects(&left, &right, probe));
                prop_assert!(before || !after);
                let shares_an_end = |flow: &Flow| {
                    flow.protocol == probe.protocol
                        && ((flow.local, flow.local_port) == (probe.local, probe.local_port)
                            || (flow.remote, flow.remote_port) == (probe.remote, probe.remote_port))
                };
                prop_assert!(!before || after || flows.iter().any(shares_an_end));
            }
        }
    }
}
