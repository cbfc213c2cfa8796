//! What is to be installed for a pair, in the kernel's words: states, policies, and the numbers of links.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use ipsec::plane::{CopyDscp, Encapsulation, KernelOptions, Mark, Mode, Offload, PlaneError, SaPair, TfcPadding};

use super::codec::{
    Action, Direction, Ends, Policy, PolicyId, Ports, Selector, State, StateId, Template, extra_flag, flag, offload,
};
use super::priority::{self, Purpose};

/// Between which ends the packets travel that we send.
pub(super) fn ends(encapsulation: &Encapsulation) -> Ends {
    match *encapsulation {
        Encapsulation::None { local, remote } => Ends { source: local, destination: remote, ports: None },
        Encapsulation::Udp { local, remote } => in_ports(false, local, remote),
        Encapsulation::Stream { local, remote, .. } => in_ports(true, local, remote),
    }
}

fn in_ports(in_tcp: bool, local: SocketAddr, remote: SocketAddr) -> Ends {
    let ports = Ports { in_tcp, source: local.port(), destination: remote.port() };
    Ends { source: local.ip(), destination: remote.ip(), ports: Some(ports) }
}

/// Indices of the links that options name.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Links {
    /// That policies are for; 0 is any.
    pub(super) interface: u32,
    /// That does a part of ESP.
    pub(super) device: Option<u32>,
}

pub(super) fn inbound(pair: &SaPair, ends: &Ends, selector: Option<Selector>, links: &Links) -> State {
    let options = &pair.options;
    let outbound = outbound(pair, ends, selector, links, 0);
    let mut flags = outbound.flags;
    if matches!(options.copy_dscp, CopyDscp::In | CopyDscp::Both) {
        flags |= flag::DECAPSULATE_DSCP;
    }
    State {
        id: StateId { destination: ends.source, spi: pair.spi_in },
        source: ends.destination,
        selector: selector.map(Selector::reversed),
        replay_window: pair.replay_window,
        encapsulation: ends.reversed().ports,
        tfc_padding: 0,
        flags,
        extra_flags: 0,
        offload: outbound.offload.map(|(device, what)| (device, what | offload::INBOUND)),
        set_mark: options.set_mark_in,
        mark: if options.mark_in_sa { options.mark_in } else { Mark::default() },
        if_id: options.if_id_in,
        ..outbound
    }
}

pub(super) fn outbound(pair: &SaPair, ends: &Ends, selector: Option<Selector>, links: &Links, mark: u32) -> State {
    let options = &pair.options;
    let mut flags = if selector.is_none() { flag::ANY_FAMILY } else { 0 };
    if !pair.copy_df {
        flags |= flag::NO_PMTU_DISCOVERY;
    }
    if !pair.copy_ecn {
        flags |= flag::NO_ECN;
    }
    let mut lifetime = pair.lifetime;
    if !pair.suite.esn {
        // Sequence numbers must not come round (RFC 4303 §3.3.3).
        let least = |limit: Option<u64>, most| Some(limit.map_or(most, |limit: u64| limit.min(most)));
        lifetime.soft_packets = least(lifetime.soft_packets, LAST_SEQUENCE_NUMBERS);
        lifetime.hard_packets = least(lifetime.hard_packets, u32::MAX.into());
    }
    State {
        id: StateId { destination: ends.destination, spi: pair.spi_out },
        source: ends.source,
        reqid: pair.reqid,
        mode: pair.mode,
        selector,
        lifetime,
        // With 64-bit sequence numbers the kernel wants a window even for what it sends.
        replay_window: u32::from(pair.suite.esn),
        esn: pair.suite.esn,
        encapsulation: ends.ports,
        flags,
        extra_flags: match options.copy_dscp {
            CopyDscp::Out | CopyDscp::Both => 0,
            CopyDscp::In | CopyDscp::No => extra_flag::NO_DSCP_OUTSIDE,
        },
        offload: links.device.map(|device| {
            let family = if ends.destination.is_ipv6() { offload::IPV6 } else { 0 };
            (device, if options.offload == Offload::Packet { family | offload::PACKET } else { family })
        }),
        tfc_padding: match pair.tfc {
            TfcPadding::None => 0,
            TfcPadding::Mtu => u32::MAX,
            TfcPadding::To(length) => length.into(),
        },
        // Ours has its packets pass by the table of our routes.
        set_mark: match options.set_mark_out {
            configured if configured != Mark::default() => configured,
            _ => Mark { value: mark, mask: u32::MAX },
        },
        mark: options.mark_out,
        if_id: options.if_id_out,
    }
}

/// What an SA in transport mode may carry, whichever policy leads to it: nobody else's packets by way of a peer's SA.
/// In tunnel mode the policies see to that.
pub(super) fn hull(mode: Mode, selectors: &[Selector]) -> Result<Option<Selector>, PlaneError> {
    if mode == Mode::Tunnel {
        return Ok(None);
    }
    let mut all = selectors.iter().copied();
    let Some(mut hull) = all.next() else { return Ok(None) };
    for selector in all {
        if (selector.source, selector.destination) != (hull.source, hull.destination) {
            let what = "transport mode between several addresses with one Child SA".to_owned();
            return Err(PlaneError::Unsupported { plane: super::NAME, what });
        }
        if selector.protocol != hull.protocol {
            hull.protocol = 0;
        }
        hull.source_port = Default::default();
        hull.destination_port = Default::default();
    }
    Ok(Some(hull))
}

pub(super) fn policies(pair: &SaPair, ends: &Ends, selectors: &[Selector]) -> Vec<Policy> {
    let options = &pair.options;
    let [to_peer, to_us] = [*ends, ends.reversed()].map(|ends| Action::Protect(template(pair, &ends)));
    let mut policies = Vec::new();
    for selector in selectors {
        // Inbound first: nothing that the peer may send already is dropped.
        policies.push(policy(Direction::In, selector.reversed(), Purpose::Sa, to_us, options));
        if pair.mode == Mode::Tunnel {
            policies.push(policy(Direction::Forward, selector.reversed(), Purpose::Sa, to_us, options));
        }
        policies.push(policy(Direction::Out, *selector, Purpose::Sa, to_peer, options));
    }
    if options.policies_fwd_out && pair.mode == Mode::Tunnel {
        // As strongSwan has it: behind those of SAs, which another tunnel may have the other way round.
        for selector in selectors {
            let mut out = policy(Direction::Out, *selector, Purpose::Trap, Action::Pass, options);
            out.id.direction = Direction::Forward;
            if policies.iter().all(|policy| policy.id != out.id) {
                policies.push(out);
            }
        }
    }
    policies
}

fn template(pair: &SaPair, ends: &Ends) -> Template {
    let nowhere = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    let (source, destination) = match pair.mode {
        Mode::Tunnel => (ends.source, ends.destination),
        // The kernel takes the packet's own.
        Mode::Transport => (nowhere, nowhere),
    };
    Template { reqid: pair.reqid, mode: pair.mode, source, destination }
}

pub(super) fn policy(
    direction: Direction,
    selector: Selector,
    purpose: Purpose,
    action: Action,
    options: &KernelOptions,
) -> Policy {
    let (mark, if_id) = match direction {
        Direction::Out => (options.mark_out, options.if_id_out),
        Direction::In | Direction::Forward => (options.mark_in, options.if_id_in),
    };
    let priority = match options.priority {
        0 => priority::of(&selector, purpose),
        configured => configured.max(priority::BEHIND_LATCHES),
    };
    Policy { id: PolicyId { direction, selector, mark, if_id }, priority, action }
}

/// From here on a successor is due.
const LAST_SEQUENCE_NUMBERS: u64 = 0xf000_0000;
