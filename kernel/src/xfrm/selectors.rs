//! Traffic selectors as the kernel's policies can say them: networks and ports under a mask, one policy for each pair.

use std::collections::BTreeSet;

use ipsec::plane::PlaneError;
use ipsec::selector::TrafficSelector;

use super::codec::{Port, Selector};

/// For each pair of selectors the outbound packets that it is about, in as many parts as it takes. Nothing is widened.
pub(super) fn outbound(
    local_ts: &[TrafficSelector],
    remote_ts: &[TrafficSelector],
    interface: u32,
) -> Result<Vec<Selector>, PlaneError> {
    let mut selectors = BTreeSet::new();
    for local in local_ts {
        for remote in remote_ts {
            let protocol = match (local.protocol, remote.protocol) {
                (0, protocol) | (protocol, 0) => protocol,
                (one, other) if one == other => one,
                _ => continue,
            };
            for (source_port, destination_port) in ports(protocol, local, remote)? {
                for source in local.networks() {
                    for destination in remote.networks() {
                        if source.0.is_ipv4() != destination.0.is_ipv4() {
                            continue;
                        }
                        selectors.insert(Selector {
                            source,
                            destination,
                            protocol,
                            source_port,
                            destination_port,
                            interface,
                        });
                        if selectors.len() > MOST {
                            return Err(unsupported(format!("selectors that take more than {MOST} policies")));
                        }
                    }
                }
            }
        }
    }
    if selectors.is_empty() {
        return Err(unsupported("selectors that no packet fits".to_owned()));
    }
    Ok(selectors.into_iter().collect())
}

fn ports(protocol: u8, local: &TrafficSelector, remote: &TrafficSelector) -> Result<Vec<(Port, Port)>, PlaneError> {
    if matches!(protocol, ICMP | ICMPV6) {
        return icmp(local, remote).map(|pair| vec![pair]);
    }
    let (sources, destinations) = (masked(local)?, masked(remote)?);
    Ok(sources.iter().flat_map(|source| destinations.iter().map(|destination| (*source, *destination))).collect())
}

/// The kernel has the type where other protocols have the source port, and the code where they have the destination port;
/// RFC 4301 §4.4.1.1 has both in either selector.
fn icmp(local: &TrafficSelector, remote: &TrafficSelector) -> Result<(Port, Port), PlaneError> {
    let selector = match (local.is_any_port(), remote.is_any_port()) {
        (true, _) => remote,
        (false, true) => local,
        (false, false) if (local.start_port, local.end_port) == (remote.start_port, remote.end_port) => local,
        (false, false) => return Err(unsupported("two sets of ICMP types and codes for one Child SA".to_owned())),
    };
    let ([first, first_code], [last, last_code]) = (selector.start_port.to_be_bytes(), selector.end_port.to_be_bytes());
    let exactly = |value: u8| Port { port: value.into(), mask: u16::MAX };
    match (first == last, first_code, last_code) {
        _ if selector.is_any_port() => Ok((Port::default(), Port::default())),
        (true, 0, 0xff) => Ok((exactly(first), Port::default())),
        (true, code, other) if code == other => Ok((exactly(first), exactly(code))),
        _ => Err(unsupported(format!("a range of ICMP types or codes ({selector})"))),
    }
}

/// The fewest ports under a mask that make up a range.
fn masked(selector: &TrafficSelector) -> Result<Vec<Port>, PlaneError> {
    if selector.is_any_port() {
        return Ok(vec![Port::default()]);
    }
    if selector.start_port > selector.end_port {
        return Err(unsupported(format!("OPAQUE ports ({selector})")));
    }
    let (mut start, end) = (u32::from(selector.start_port), u32::from(selector.end_port));
    let mut ports = Vec::new();
    while start <= end {
        // The biggest block that begins at `start` and ends within the range.
        let mut bits = start.trailing_zeros().min(16);
        while start + (1 << bits) - 1 > end {
            bits -= 1;
        }
        let port = u16::try_from(start).unwrap_or(u16::MAX);
        ports.push(Port { port, mask: u16::MAX << bits.min(15) });
        start += 1 << bits;
    }
    Ok(ports)
}

fn unsupported(what: String) -> PlaneError {
    PlaneError::Unsupported { plane: super::NAME, what }
}

const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
/// Policies of one direction for one SA pair. The peer chooses within what policy allows.
const MOST: usize = 256;
