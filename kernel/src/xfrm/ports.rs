//! Policies for a port whose connections are latched (RFC 5660 §2.3): by what SA a connection may come, before anybody has
//! seen its first packet.
//!
//! One pair of policies drops all. Before it go those that demand the `reqid` of the SA that covers the other end, and
//! before these what drops where SAs of different classes cover it. A connection that is there has therefore come by the one
//! class that covers it, as long as nothing changes what is covered; who changes it looks first which connections there are.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipsec::guard::{Claim, ClassId, Passage, Port};
use ipsec::plane::Mark;
use ipsec::selector::TrafficSelector;

use super::codec::{self, Action, Direction, PolicyId, PolicyReport, Selector};
use super::latches::Path;
use super::selectors;

/// What is to be installed, or is: the priority and what it does, by name.
pub(super) type Policies = BTreeMap<PolicyId, (u32, Action)>;

/// Nothing passes but what goes into the tunnel's device, which has no switch for IPv6; nor does anything by SAs with these
/// `if_id`s, whose packets meet no other policies.
pub(super) fn closed(port: &Port, tun: u32, if_ids: &BTreeMap<u32, usize>) -> Policies {
    let all = all(port);
    let mut policies = Policies::new();
    if port.local.is_ipv6() {
        let through = id(Direction::Out, Selector { interface: tun, ..all });
        policies.insert(through, (super::latches::THROUGH_THE_TUNNEL, Action::Pass));
    }
    both(&mut policies, all, LAST, |_| Action::Drop);
    policies.extend(if_ids.keys().map(|if_id| (barring(port, *if_id), (LAST, Action::Drop))));
    policies
}

/// Names what drops all that would come to the port by an `if_id`.
pub(super) fn barring(port: &Port, if_id: u32) -> PolicyId {
    PolicyId { if_id, ..id(Direction::In, all(port).reversed()) }
}

/// What such claims come to, beside those of the closed port, with these SAs in the kernel.
pub(super) fn policies<'a>(
    port: &Port,
    closed: Policies,
    claims: &[Claim],
    paths: impl Iterator<Item = &'a Path>,
) -> Result<Policies, String> {
    let all = all(port);
    let admitted: BTreeSet<ClassId> = claims.iter().filter_map(|claim| class(claim.passage)).collect();
    let mut best: BTreeMap<Selector, &Path> = BTreeMap::new();
    for path in paths.filter(|path| admitted.contains(&path.class) && !path.special) {
        for selector in path.selectors.iter().filter_map(|selector| intersection(selector, &all)) {
            let there = best.entry(selector).or_insert(path);
            if there.order < path.order {
                *there = path;
            }
        }
    }
    let mut policies = closed;
    for (selector, path) in best {
        both(&mut policies, selector, rank(&selector), |inbound| Action::Protect(path.template(inbound)));
    }
    for selector in conflicts(claims, &all) {
        both(&mut policies, selector, CONFLICT, |_| Action::Drop);
    }
    if policies.len() > MOST {
        return Err(format!("the connections of port {} would take more than {MOST} policies", port.number));
    }
    Ok(policies)
}

/// The port that a policy closes, if that is what it does.
pub(super) fn closes(report: &PolicyReport) -> Option<Port> {
    let id = report.id;
    let outbound = if id.direction == Direction::Out { id.selector } else { id.selector.reversed() };
    let port = Port { protocol: outbound.protocol, local: outbound.source.0, number: outbound.source_port.port };
    (report.blocks && report.priority == LAST && id.if_id == 0 && outbound == all(&port)).then_some(port)
}

/// All that comes to the port, seen on its way out.
fn all(port: &Port) -> Selector {
    let any = if port.local.is_ipv4() { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { IpAddr::V6(Ipv6Addr::UNSPECIFIED) };
    let prefix = match port.local {
        local if local.is_unspecified() => 0,
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    };
    Selector {
        source: (port.local, prefix),
        destination: (any, 0),
        protocol: port.protocol,
        source_port: codec::Port { port: port.number, mask: u16::MAX },
        destination_port: codec::Port::default(),
        interface: 0,
    }
}

fn both(policies: &mut Policies, selector: Selector, priority: u32, action: impl Fn(bool) -> Action) {
    policies.insert(id(Direction::Out, selector), (priority, action(false)));
    policies.insert(id(Direction::In, selector.reversed()), (priority, action(true)));
}

fn id(direction: Direction, selector: Selector) -> PolicyId {
    PolicyId { direction, selector, mark: Mark::default(), if_id: 0 }
}

fn class(passage: Passage) -> Option<ClassId> {
    match passage {
        Passage::Class(class) => Some(class),
        // No SA brings what is to be clear.
        Passage::None | Passage::Larval | Passage::Clear => None,
    }
}

/// What claims of different passages are about.
fn conflicts(claims: &[Claim], all: &Selector) -> BTreeSet<Selector> {
    let mut claimed = BTreeSet::new();
    for claim in claims {
        let selectors = of_claim(claim, all);
        claimed.extend(selectors.iter().filter_map(|selector| {
            let selector = intersection(selector, all)?;
            // Networks in this order are next to those that they are in.
            Some((selector.destination, selector, class(claim.passage)))
        }));
    }
    let mut conflicts = BTreeSet::new();
    let mut around: Vec<(Selector, Option<ClassId>)> = Vec::new();
    for (destination, selector, class) in claimed {
        while around.pop_if(|(other, _)| narrower(other.destination, destination) != Some(destination)).is_some() {}
        let others = around.iter().filter(|(_, other)| *other != class);
        conflicts.extend(others.filter_map(|(other, _)| intersection(&selector, other)));
        around.push((selector, class));
    }
    conflicts
}

/// What cannot be said as policies is taken for more than it is.
fn of_claim(claim: &Claim, all: &Selector) -> Vec<Selector> {
    selectors::outbound(&claim.local_ts, &claim.remote_ts, 0).unwrap_or_else(|_| {
        let wide = |selectors: &[TrafficSelector]| {
            let any = |ts: &TrafficSelector| TrafficSelector { protocol: 0, start_port: 0, end_port: u16::MAX, ..*ts };
            selectors.iter().map(any).collect::<Vec<_>>()
        };
        selectors::outbound(&wide(&claim.local_ts), &wide(&claim.remote_ts), 0).unwrap_or_else(|_| vec![*all])
    })
}

/// What both select.
fn intersection(one: &Selector, other: &Selector) -> Option<Selector> {
    let port = |one: codec::Port, other: codec::Port| {
        let both = codec::Port { port: (one.port & one.mask) | (other.port & other.mask), mask: one.mask | other.mask };
        ((one.port ^ other.port) & one.mask & other.mask == 0).then_some(both)
    };
    let protocol = match (one.protocol, other.protocol) {
        (0, protocol) | (protocol, 0) => protocol,
        (protocol, same) if protocol == same => protocol,
        _ => return None,
    };
    Some(Selector {
        source: narrower(one.source, other.source)?,
        destination: narrower(one.destination, other.destination)?,
        protocol,
        source_port: port(one.source_port, other.source_port)?,
        destination_port: port(one.destination_port, other.destination_port)?,
        interface: 0,
    })
}

/// The one that is in the other.
fn narrower(one: (IpAddr, u8), other: (IpAddr, u8)) -> Option<(IpAddr, u8)> {
    let (wide, narrow) = if one.1 <= other.1 { (one, other) } else { (other, one) };
    super::latches::within(wide, narrow.0).then_some(narrow)
}

/// The narrower goes first, as among the policies of SAs.
fn rank(selector: &Selector) -> u32 {
    let addresses = u32::from(selector.source.1) + u32::from(selector.destination.1);
    let ports = selector.source_port.mask.count_ones() + selector.destination_port.mask.count_ones();
    PROTECT + (256 - addresses.min(256)) * 33 + (32 - ports.min(32))
}

/// After those of latches, before all others'.
const CONFLICT: u32 = 2;
const PROTECT: u32 = 3;
pub(super) const LAST: u32 = 10_000;
/// Of one port: the SAs of so many peers.
const MOST: usize = 32_768;
