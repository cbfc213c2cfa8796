//! ICMP errors about latched flows (RFC 4301 §6, RFC 5660 §2): those that did not come by an SA of the latched class do not
//! get to the socket.
//!
//! No policy of the kernel can say this. It compares an inbound ICMP error as a packet of its own, from whatever router,
//! and a policy's flag for ICMP only lets more of them pass. So nftables compares what they quote, in a table that belongs
//! to this process and ends with it; its flows stay closed by policies then.
//!
//! What is quoted has protocol and ports where the kernel looks for them: behind options of IPv4 too, whatever version
//! it claims to be. What quotes IPv6 extension headers is dropped where anything between these two hosts is latched, and no
//! error that is in fragments passes, as none has to be (RFC 4443 §2.4 (c)).

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io;
use std::net::IpAddr;

use ipsec::selector::Flow;

use super::nftables::{self, FAMILY, Nftables, PROTOCOL, REGISTER, Verdict};

/// The table; it goes when this is dropped.
pub(super) struct ErrorFilter {
    table: Nftables,
    /// By the `reqid` by which errors about a flow pass.
    flows: HashMap<Flow, Option<u32>>,
    /// How many flows of IPv6 there are between two addresses.
    pairs: HashMap<(IpAddr, IpAddr), usize>,
}

impl ErrorFilter {
    /// Without flows so far. Fails where the system has no nftables that know by which SA a packet came.
    pub(super) fn open() -> io::Result<Self> {
        let purpose = "hold back ICMP errors about latched flows (nftables)";
        let table = Nftables::open(nftables::BOTH, "latchkey-errors".to_owned(), purpose)?;
        let mut all = table.transaction();
        all.table();
        for set in [LATCHED, PERMITTED, LATCHED6, PERMITTED6, PAIRS6] {
            all.set(set.name, set.length, set.id);
        }
        all.chain("input", Some((nftables::INPUT, BEFORE_OTHERS)));
        for (chain, family, protocol) in [("icmp", IPV4, 1_u8), ("icmp6", nftables::IPV6, 58)] {
            all.chain(chain, None);
            all.rule(
                "input",
                &[
                    nftables::load_meta(FAMILY, REGISTER),
                    nftables::is(REGISTER, &[family]),
                    nftables::load_meta(PROTOCOL, REGISTER),
                    nftables::is(REGISTER, &[protocol]),
                    nftables::verdict(Verdict::Jump(chain)),
                ],
            );
        }
        for words in 5..=15_u8 {
            let header = u32::from(words) * 4;
            let mut quoted = vec![
                nftables::load_transport(QUOTED, 1, REGISTER),
                nftables::bitwise(REGISTER, [0x0f, 0, 0, 0], [0; 4]),
                nftables::is(REGISTER, &[words]),
                nftables::load_transport(QUOTED + 9, 1, KEY),
                nftables::load_transport(QUOTED + 12, 8, KEY + 1),
                nftables::load_transport(QUOTED + header, 4, KEY + 3),
            ];
            rules(&mut all, "icmp", &mut quoted, LATCHED, PERMITTED);
        }
        let fragmented = [
            nftables::load_has_header(FRAGMENT, REGISTER),
            nftables::is(REGISTER, &[1]),
            nftables::load_transport(0, 1, REGISTER),
            nftables::is_less(REGISTER, &[FIRST_THAT_IS_NO_ERROR]),
            nftables::verdict(Verdict::Drop),
        ];
        all.rule("icmp6", &fragmented);
        for extension in [0, 43, FRAGMENT, 51, 60] {
            let extended = [
                nftables::load_transport(QUOTED + 6, 1, REGISTER),
                nftables::is(REGISTER, &[extension]),
                nftables::load_transport(QUOTED + 8, 32, KEY),
                nftables::is_in(PAIRS6.name, PAIRS6.id, KEY),
                nftables::verdict(Verdict::Drop),
            ];
            all.rule("icmp6", &extended);
        }
        let mut quoted = vec![
            nftables::load_transport(QUOTED + 6, 1, KEY),
            nftables::load_transport(QUOTED + 8, 32, KEY + 1),
            nftables::load_transport(QUOTED + 40, 4, KEY + 9),
        ];
        rules(&mut all, "icmp6", &mut quoted, LATCHED6, PERMITTED6);
        all.commit()?;
        Ok(Self { table, flows: HashMap::new(), pairs: HashMap::new() })
    }

    /// From now on no error about this flow passes.
    pub(super) fn enter(&mut self, flow: &Flow) -> io::Result<()> {
        let Entry::Vacant(place) = self.flows.entry(*flow) else { return Ok(()) };
        let ends = (flow.local, flow.remote);
        let mut change = self.table.transaction();
        change.add(sets(flow).0.name, &key(flow));
        if flow.local.is_ipv6() {
            change.add(PAIRS6.name, &addresses(flow));
        }
        change.commit()?;
        if flow.local.is_ipv6() {
            *self.pairs.entry(ends).or_default() += 1;
        }
        place.insert(None);
        Ok(())
    }

    /// Errors about it pass by SAs with this `reqid`, or not at all.
    pub(super) fn permit(&mut self, flow: &Flow, reqid: Option<u32>) -> io::Result<()> {
        let Some(there) = self.flows.get_mut(flow) else { return Ok(()) };
        if *there == reqid {
            return Ok(());
        }
        let set = sets(flow).1.name;
        let mut change = self.table.transaction();
        if let Some(gone) = *there {
            change.remove(set, &permitted(gone, flow));
        }
        if let Some(new) = reqid {
            change.add(set, &permitted(new, flow));
        }
        change.commit()?;
        *there = reqid;
        Ok(())
    }

    /// The flow is of no interest any more.
    pub(super) fn leave(&mut self, flow: &Flow) -> io::Result<()> {
        self.permit(flow, None)?;
        if self.flows.remove(flow).is_none() {
            return Ok(());
        }
        let mut change = self.table.transaction();
        change.remove(sets(flow).0.name, &key(flow));
        if let Entry::Occupied(mut count) = self.pairs.entry((flow.local, flow.remote)) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
                change.remove(PAIRS6.name, &addresses(flow));
            }
        }
        change.commit()
    }
}

/// What quotes a flow passes by a permitted SA, and else is dropped if the flow is latched.
fn rules(all: &mut nftables::Transaction<'_>, chain: &str, quoted: &mut Vec<Vec<u8>>, latched: Set, permitted: Set) {
    let start = quoted.len();
    quoted.extend([
        nftables::load_reqid(REGISTER),
        nftables::is_in(permitted.name, permitted.id, REGISTER),
        nftables::verdict(Verdict::Accept),
    ]);
    all.rule(chain, quoted);
    quoted.truncate(start);
    quoted.extend([nftables::is_in(latched.name, latched.id, KEY), nftables::verdict(Verdict::Drop)]);
    all.rule(chain, quoted);
}

/// As the packets that we send have it: protocol, in four octets, addresses and ports.
fn key(flow: &Flow) -> Vec<u8> {
    let mut key = vec![flow.protocol, 0, 0, 0];
    key.extend(addresses(flow));
    key.extend(flow.local_port.to_be_bytes());
    key.extend(flow.remote_port.to_be_bytes());
    key
}

fn permitted(reqid: u32, flow: &Flow) -> Vec<u8> {
    [&reqid.to_ne_bytes(), &key(flow)[..]].concat()
}

fn addresses(flow: &Flow) -> Vec<u8> {
    let octets = |address| match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    };
    [octets(flow.local), octets(flow.remote)].concat()
}

fn sets(flow: &Flow) -> (Set, Set) {
    if flow.local.is_ipv4() { (LATCHED, PERMITTED) } else { (LATCHED6, PERMITTED6) }
}

#[derive(Clone, Copy)]
struct Set {
    name: &'static str,
    /// Octets of a key.
    length: u32,
    id: u32,
}

const LATCHED: Set = Set { name: "latched", length: 16, id: 1 };
const PERMITTED: Set = Set { name: "permitted", length: 20, id: 2 };
const LATCHED6: Set = Set { name: "latched6", length: 40, id: 3 };
const PERMITTED6: Set = Set { name: "permitted6", length: 44, id: 4 };
const PAIRS6: Set = Set { name: "pairs6", length: 32, id: 5 };
/// A flow's key begins behind the `reqid`.
const KEY: u32 = REGISTER + 1;
/// The packet that an error is about begins behind this much of it, in either family.
const QUOTED: u32 = 8;
const FRAGMENT: u8 = 44;
/// Of ICMPv6 (RFC 4443 §2.1).
const FIRST_THAT_IS_NO_ERROR: u8 = 128;
/// Before connection tracking.
const BEFORE_OTHERS: i32 = -300;
const IPV4: u8 = 2;

#[cfg(test)]
mod tests {
    //! On this machine's own kernel, in namespaces; with SAs in a guest (`tests/tests/kernel/interfaces.rs`).
    #![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

    use std::net::{SocketAddr, UdpSocket};
    use std::thread;
    use std::time::Duration;

    use socket2::{Domain, Protocol, Socket, Type};

    use super::*;
    use crate::netns::{Namespace, veth};

    /// What quotes a datagram of the flow's: that nobody has its port.
    fn unreachable(flow: &Flow, change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let ports = [flow.local_port.to_be_bytes(), flow.remote_port.to_be_bytes()].concat();
        let mut quoted = match flow.local {
            IpAddr::V4(_) => [&[0x45, 0, 0, 36, 0, 0, 0, 0, 64, 17, 0, 0][..], &addresses(flow)].concat(),
            IpAddr::V6(_) => [&[0x60, 0, 0, 0, 0, 8, 17, 64][..], &addresses(flow)].concat(),
        };
        change(&mut quoted);
        quoted.extend(ports);
        quoted.extend([0, 8, 0, 0]);
        let kind = if flow.local.is_ipv4() { [3, 3] } else { [1, 4] };
        let mut error = [&kind[..], &[0; 6]].concat();
        error.extend(quoted);
        if flow.local.is_ipv4() {
            // RFC 1071; of ICMPv6 the system makes it.
            error.resize(error.len().next_multiple_of(2), 0);
            let mut sum: u32 = error.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
            while sum > 0xffff {
                sum = (sum & 0xffff) + (sum >> 16);
            }
            error[2..4].copy_from_slice(&(!(sum as u16)).to_be_bytes());
        }
        error
    }

    // RFC 4301 §6.1.1: an unprotected error about a protected flow.
    #[test]
    fn a_forged_error_about_a_latched_flow_does_not_reach_its_socket() {
        let (host, far) = (Namespace::new().unwrap(), Namespace::new().unwrap());
        veth(&host, "eth0", &far, "eth0").unwrap();
        for (namespace, end) in [(&host, 1), (&far, 2)] {
            namespace.add_address("eth0", format!("10.1.0.{end}").parse().unwrap(), 24).unwrap();
            namespace.add_address("eth0", format!("fd01::{end}").parse().unwrap(), 64).unwrap();
        }
        let flow = |ipv6: bool, local_port| {
            let (local, remote) = if ipv6 { ("fd01::1", "fd01::2") } else { ("10.1.0.1", "10.1.0.2") };
            let (local, remote) = (local.parse().unwrap(), remote.parse().unwrap());
            Flow { protocol: 17, local, local_port, remote, remote_port: 7001 }
        };
        let send = |flow: &Flow, error: Vec<u8>| {
            let (ipv6, to) = (flow.local.is_ipv6(), SocketAddr::new(flow.local, 0));
            far.run(move || {
                let (domain, protocol) =
                    if ipv6 { (Domain::IPV6, Protocol::ICMPV6) } else { (Domain::IPV4, Protocol::ICMPV4) };
                let socket = Socket::new(domain, Type::RAW, Some(protocol)).unwrap();
                // Neighbours may have to be found first.
                for _ in 0..50 {
                    if socket.send_to(&error, &to.into()).is_ok() {
                        break;
                    }
                    thread::sleep(Duration::from_millis(100));
                }
            })
            .unwrap();
        };
        let socket = |flow: &Flow| {
            let (local, remote) =
                (SocketAddr::new(flow.local, flow.local_port), SocketAddr::new(flow.remote, flow.remote_port));
            host.run(move || {
                let socket = (0..50).find_map(|_| {
                    thread::sleep(Duration::from_millis(50));
                    UdpSocket::bind(local).ok()
                });
                let socket = socket.unwrap();
                socket.connect(remote).unwrap();
                socket
            })
            .unwrap()
        };
        let mut filter = host.run(|| ErrorFilter::open().unwrap()).unwrap();
        for ipv6 in [false, true] {
            let (latched, other) = (flow(ipv6, 7000), flow(ipv6, 7002));
            let (of_latched, of_other) = (socket(&latched), socket(&other));
            let hears = |flow: &Flow, of: &UdpSocket, error: Vec<u8>| {
                send(flow, error);
                (0..20).any(|_| {
                    thread::sleep(Duration::from_millis(10));
                    of.take_error().unwrap().is_some()
                })
            };
            let mut variants: Vec<fn(&mut Vec<u8>)> = vec![|_| {}];
            if ipv6 {
                // Destination options.
                variants.push(|quoted| {
                    quoted[6] = 60;
                    quoted.extend([17, 0, 1, 4, 0, 0, 0, 0]);
                });
            } else {
                variants.push(|quoted| quoted[0] = 0x05);
                variants.push(|quoted| {
                    quoted[0] = 0x46;
                    quoted.extend([1, 1, 1, 0]);
                });
            }
            for change in &variants {
                assert!(hears(&latched, &of_latched, unreachable(&latched, change)), "before");
            }
            filter.enter(&latched).unwrap();
            filter.enter(&latched).unwrap();
            filter.permit(&latched, Some(7)).unwrap();
            for change in &variants {
                assert!(!hears(&latched, &of_latched, unreachable(&latched, change)));
            }
            assert!(hears(&other, &of_other, unreachable(&other, |_| {})), "of another flow");
            filter.permit(&latched, Some(8)).unwrap();
            filter.permit(&latched, None).unwrap();
            assert!(!hears(&latched, &of_latched, unreachable(&latched, |_| {})));
            filter.permit(&latched, Some(8)).unwrap();
            filter.leave(&latched).unwrap();
            filter.leave(&latched).unwrap();
            for change in &variants {
                assert!(hears(&latched, &of_latched, unreachable(&latched, change)), "afterwards");
            }
        }
        // A second one of the same namespace, until the first has gone.
        assert!(host.run(|| ErrorFilter::open().is_err()).unwrap());
        drop(filter);
        let mut opened = false;
        for _ in 0..50 {
            opened = host.run(|| ErrorFilter::open().is_ok()).unwrap();
            if opened {
                break;
            }
            thread::sleep(Duration::from_millis(100));
        }
        assert!(opened);
    }
}
