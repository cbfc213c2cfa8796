//! Policies, traps and events on this machine's own kernel, in namespaces; what needs ESP is tested in a guest
//! (`tests/tests/kernel`). Needs root (CAP_SYS_ADMIN and CAP_NET_ADMIN).
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::collections::HashMap;
use std::net::{IpAddr, UdpSocket};
use std::process::Command;
use std::time::{Duration, Instant};

use ipsec::guard::ClassId;
use ipsec::plane::{
    CopyDscp, Encapsulation, EspKeys, EspSuite, KernelOptions, Lifetime, Mark, Mode, PlaneError, PlaneEvent, SaPair,
    TfcPadding, Trap,
};
use ipsec::secret::Secret;
use ipsec::selector::TrafficSelector;
use ipsec::transform::{Encr, Integ};

use super::codec::{self, Action, Direction, Event, Policy, PolicyId, Port, Selector, Template, kind};
use super::descriptions::{self, Links};
use super::selectors;
use super::socket::{Databases as _, XfrmSocket, subscribe};
use super::tables::Tables;
use super::{InboundPolicies, TunnelMark, Xfrm};
use crate::netns::Namespace;

fn network(text: &str) -> TrafficSelector {
    let (address, prefix) = text.split_once('/').unwrap();
    TrafficSelector::network(address.parse().unwrap(), prefix.parse().unwrap()).unwrap()
}

fn with(selector: TrafficSelector, protocol: u8, start_port: u16, end_port: u16) -> TrafficSelector {
    TrafficSelector { protocol, start_port, end_port, ..selector }
}

fn trap(reqid: u32, local: &str, remote: &str) -> Trap {
    let (local_ts, remote_ts) = (vec![network(local)], vec![network(remote)]);
    Trap { reqid, local_ts, remote_ts, options: KernelOptions::default() }
}

fn tables() -> Tables {
    Tables::new(XfrmSocket::open().unwrap().hearing_others().unwrap(), 7)
}

/// A namespace with the address 10.1.0.1 and a route to everywhere.
pub(super) fn host() -> Namespace {
    let host = Namespace::new().expect("these tests make network namespaces: run them as root");
    let far = Namespace::new().unwrap();
    crate::netns::veth(&host, "eth0", &far, "eth0").unwrap();
    host.add_address("eth0", "10.1.0.1".parse().unwrap(), 24).unwrap();
    far.add_address("eth0", "10.1.0.2".parse().unwrap(), 24).unwrap();
    host.add_route("0.0.0.0".parse().unwrap(), 0, "10.1.0.2".parse().unwrap()).unwrap();
    // The other end of the cable lives as long as this does.
    std::mem::forget(far);
    host
}

pub(super) fn ip(arguments: &str) -> String {
    let output = Command::new("ip").args(arguments.split(' ')).output().expect("apt-get install iproute2");
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn no_links() -> Links {
    Links::default()
}

#[test]
fn a_packet_that_falls_into_a_trap_is_reported_and_dropped() {
    host()
        .run(|| {
            let events = subscribe(&[]).unwrap();
            let mut tables = tables();
            tables.install_trap(&trap(9, "10.1.0.0/24", "10.2.0.0/24"), &no_links()).unwrap();
            let again = tables.install_trap(&trap(9, "10.1.0.0/24", "10.3.0.0/24"), &no_links());
            assert!(matches!(again, Err(PlaneError::TrapInUse(9))), "{again:?}");
            let socket = UdpSocket::bind("10.1.0.1:7000").unwrap();
            // The kernel drops it without a word, or says that it is about to get an SA.
            let _ = socket.send_to(b"x", "10.2.0.1:7001");
            let flow = acquired(&events, &mut tables, 9);
            assert_eq!((flow.protocol, flow.local_port, flow.remote_port), (17, 7000, 7001));
            assert_eq!((flow.local.to_string(), flow.remote.to_string()), ("10.1.0.1".into(), "10.2.0.1".into()));
            tables.remove_trap(9).unwrap();
            assert!(matches!(tables.remove_trap(9), Err(PlaneError::NoSuchTrap(9))));
            assert_eq!(ip("xfrm policy"), "");
        })
        .unwrap();
}

/// Waits for an acquire.
fn acquired(events: &netlink_sys::Socket, tables: &mut Tables, trap: u32) -> ipsec::selector::Flow {
    let deadline = Instant::now() + Duration::from_secs(10);
    while Instant::now() < deadline {
        let Ok((datagram, _)) = events.recv_from_full() else {
            std::thread::sleep(Duration::from_millis(10));
            continue;
        };
        for received in codec::messages(&datagram) {
            let event = codec::event(received.kind, received.payload);
            if let Some(PlaneEvent::Acquire { reqid, flow }) = event.and_then(|event| tables.translate(&event))
                && reqid == trap
            {
                return flow;
            }
        }
    }
    panic!("no acquire");
}

// RFC 4301 §4.4.1.1: the port of ICMP is type and code; a socket that has no port yet is for any.
#[test]
fn the_packet_of_an_acquire_is_read_as_selectors_have_it() {
    host()
        .run(|| {
            let events = subscribe(&[]).unwrap();
            let mut tables = tables();
            tables.install_trap(&trap(9, "10.1.0.0/24", "10.2.0.0/24"), &no_links()).unwrap();
            Command::new("ping")
                .args(["-I", "10.1.0.1", "-c", "1", "-W", "1", "10.2.0.1"])
                .output()
                .expect("apt-get install iputils-ping");
            let flow = acquired(&events, &mut tables, 9);
            assert_eq!((flow.protocol, flow.local_port, flow.remote_port), (1, 0x0800, 0x0800));
            tables.remove_trap(9).unwrap();

            tables.install_trap(&trap(10, "10.1.0.0/24", "10.2.1.0/24"), &no_links()).unwrap();
            let address: std::net::SocketAddr = "10.2.1.1:80".parse().unwrap();
            std::thread::spawn(move || std::net::TcpStream::connect_timeout(&address, Duration::from_secs(1)));
            let flow = acquired(&events, &mut tables, 10);
            assert_eq!((flow.protocol, flow.local_port), (6, 0));
            assert_eq!(flow.remote_port, 0, "with the port of one side alone it would be for local port 0");
        })
        .unwrap();
}

#[test]
fn only_what_is_ours_is_removed_as_a_leftover() {
    host()
        .run(|| {
            let foreign =
                "xfrm policy add src 10.1.0.0/24 dst 10.9.0.0/16 dir out tmpl proto esp reqid 9 mode transport";
            ip(foreign);
            ip("xfrm policy add src 10.1.0.0/24 dst 10.8.0.0/16 dir out action block");
            let mut dead = tables();
            dead.install_trap(&trap(9, "10.1.0.0/24", "10.2.0.0/24"), &no_links()).unwrap();
            dead.install_trap(&trap(10, "10.1.0.0/24", "10.3.0.0/24"), &no_links()).unwrap();
            drop(dead);
            let mut successor = tables();
            assert_eq!(successor.remove_leftovers().unwrap(), (0, 2));
            assert_eq!(successor.remove_leftovers().unwrap(), (0, 0));
            let left = ip("xfrm policy");
            assert_eq!((left.matches("dir out").count(), left.matches("10.9.0.0/16").count()), (2, 1), "{left}");
        })
        .unwrap();
}

#[test]
fn a_policy_of_somebody_else_for_the_same_packets_is_noticed() {
    host().run(|| {
        let mut tables = tables();
        ip("xfrm policy add src 10.1.0.0/24 dst 10.2.0.0/24 dir out priority 375000 action block");
        let refused = tables.install_trap(&trap(9, "10.1.0.0/24", "10.2.0.0/24"), &no_links()).unwrap_err();
        let expected = "install the policy out 10.1.0.0/24 to 10.2.0.0/24: another key manager has one for the same \
                        packets (priority 375000)";
        assert_eq!(refused.to_string(), expected);
        assert_eq!(ip("xfrm policy").matches("dir out").count(), 1, "what failed leaves nothing");
        // One that is no more, or goes behind ours, is no harm.
        ip("xfrm policy flush");
        tables.install_trap(&trap(9, "10.1.0.0/24", "10.2.0.0/24"), &no_links()).unwrap();
        tables.remove_trap(9).unwrap();
        ip("xfrm policy add src 10.1.0.0/24 dst 10.2.0.0/24 dir out priority 375000 action block");
        tables.install_trap(&trap(9, "10.1.0.0/24", "10.2.0.0/24"), &no_links()).unwrap_err();
        ip("xfrm policy update src 10.1.0.0/24 dst 10.2.0.0/24 dir out priority 500000 action block");
        tables.install_trap(&trap(9, "10.1.0.0/24", "10.2.0.0/24"), &no_links()).unwrap();
    })
    .unwrap();
}

#[test]
fn policies_that_somebody_removed_are_put_back() {
    host()
        .run(|| {
            let mut tables = tables();
            tables.install_trap(&trap(9, "10.1.0.0/24", "10.2.0.0/24"), &no_links()).unwrap();
            assert_eq!(tables.put_right().unwrap(), [], "nothing is suspect");
            ip("xfrm policy flush");
            tables.suspect();
            assert_eq!(tables.put_right().unwrap(), []);
            assert!(!tables.is_suspect());
            assert_eq!(ip("xfrm policy").matches("dir out priority 375424").count(), 1);
        })
        .unwrap();
}

// RFC 5660 §2.3: no configured SA, trap or shunt goes before a latch.
#[test]
fn a_configured_priority_is_behind_those_of_latches() {
    host()
        .run(|| {
            let mut tables = tables();
            for (reqid, priority, installed) in [(9, 1, 10_001), (10, 10_000, 10_001), (11, 10_002, 10_002)] {
                let trap = trap(reqid, "10.1.0.0/24", "10.2.0.0/24");
                let trap = Trap { options: KernelOptions { priority, ..KernelOptions::default() }, ..trap };
                tables.install_trap(&trap, &no_links()).unwrap();
                assert!(ip("xfrm policy").contains(&format!("dir out priority {installed} ")), "{priority}");
                tables.remove_trap(reqid).unwrap();
            }
        })
        .unwrap();
}

// Else each change of our own would wake a thread, and have all states and policies read and compared.
#[test]
fn our_own_changes_are_no_news_and_those_of_others_are() {
    host()
        .run(|| {
            let mut socket = XfrmSocket::open().unwrap();
            let mut of_latches = XfrmSocket::open_for_latches().unwrap();
            let news = subscribe(&[socket.port(), of_latches.port()]).unwrap();
            let id = PolicyId {
                direction: Direction::Out,
                selector: selectors::outbound(&[network("10.1.0.0/24")], &[network("10.2.0.0/24")], 0).unwrap()[0],
                mark: Default::default(),
                if_id: 0,
            };
            let policy = Policy { id, priority: 1000, action: Action::Drop };
            for socket in [&mut socket, &mut of_latches] {
                socket.add_policy(&policy).unwrap();
                socket.set_policy(&Policy { priority: 2000, ..policy }).unwrap();
                assert!(socket.delete_policy(&id).unwrap());
            }
            ip("xfrm policy add src 10.1.0.0/24 dst 10.2.0.0/24 dir out action block mark 5 if_id 6");
            ip("xfrm policy delete src 10.1.0.0/24 dst 10.2.0.0/24 dir out mark 5 if_id 6");
            let mut heard = Vec::new();
            let mut buffer = Vec::with_capacity(1 << 16);
            while news.recv_from(&mut buffer, 0).is_ok() {
                heard.extend(codec::messages(&buffer).filter_map(|news| codec::event(news.kind, news.payload)));
                buffer.clear();
            }
            let id = PolicyId { mark: Mark { value: 5, mask: u32::MAX }, if_id: 6, ..id };
            let [Event::Policy(added), Event::PolicyRemoved(removed)] = &heard[..] else { panic!("{heard:?}") };
            assert_eq!((added.id, *removed), (id, id));
        })
        .unwrap();
}

#[test]
fn what_the_kernel_drops_by_default_is_read() {
    host()
        .run(|| {
            let mut socket = XfrmSocket::open().unwrap();
            assert_eq!(socket.blocked_by_default().unwrap(), []);
            ip("xfrm policy setdefault in accept fwd block out block");
            assert_eq!(socket.blocked_by_default().unwrap(), [Direction::Forward, Direction::Out]);
        })
        .unwrap();
}

#[test]
fn a_trap_s_silence_is_short_while_the_plane_is_there() {
    host()
        .run(|| {
            let path = "/proc/sys/net/core/xfrm_acq_expires";
            let read = || std::fs::read_to_string(path).unwrap().trim().to_owned();
            let before = read();
            let (mut file, kept) = super::shorten_acquires().unwrap();
            assert_eq!((kept.as_str(), read().as_str()), (before.as_str(), super::ACQUIRE_EXPIRES));
            // A daemon that dies leaves it so, and the next one's stop sets the kernel's own again.
            let (_, kept_by_successor) = super::shorten_acquires().unwrap();
            assert_eq!((kept_by_successor.as_str(), before.as_str()), ("30", "30"));
            super::write_anew(&mut file, &kept).unwrap();
            assert_eq!(read(), before);
        })
        .unwrap();
}

#[test]
fn options_reach_the_policies() {
    host()
        .run(|| {
            let mut tables = tables();
            let mark = ipsec::plane::Mark { value: 0x2a, mask: 0xff };
            let options = KernelOptions { mark_out: mark, if_id_out: 5, priority: 12345, ..KernelOptions::default() };
            let trap = Trap { options, ..trap(9, "10.1.0.0/24", "10.2.0.0/24") };
            tables.install_trap(&trap, &Links { interface: 1, device: None }).unwrap();
            let shown = ip("xfrm policy");
            for part in ["priority 12345", "mark 0x2a/0xff", "if_id 0x5", "dev lo"] {
                assert!(shown.contains(part), "{part}: {shown}");
            }
            tables.remove_trap(9).unwrap();
            assert_eq!(ip("xfrm policy"), "");
        })
        .unwrap();
}

/// The kernel has for each name the best wish, and nothing else, after any sequence of wishes and their ends.
#[test]
fn the_kernel_s_policies_are_the_best_wishes_after_any_operations() {
    use proptest::prelude::*;
    let operation = (0_u32..6, 0_usize..4, any::<bool>());
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(32));
    let selectors = ["10.2.0.0/24", "10.2.0.0/16", "10.3.0.0/24", "10.2.0.128/25"];
    let host = host();
    runner
        .run(&proptest::collection::vec(operation, 1..40), |operations| {
            host.run(|| {
                let mut tables = tables();
                let mut model: HashMap<u32, usize> = HashMap::new();
                for (reqid, selector, install) in operations {
                    if install {
                        let trap = trap(reqid, "10.1.0.0/24", selectors[selector]);
                        let installed = tables.install_trap(&trap, &no_links());
                        assert_eq!(installed.is_ok(), !model.contains_key(&reqid), "{installed:?}");
                        model.entry(reqid).or_insert(selector);
                    } else {
                        assert_eq!(tables.remove_trap(reqid).is_ok(), model.remove(&reqid).is_some());
                    }
                    let mut wanted: Vec<usize> = model.values().copied().collect();
                    wanted.sort_unstable();
                    wanted.dedup();
                    let there = ip("xfrm policy");
                    assert_eq!(there.matches("dir out").count(), wanted.len(), "{there}");
                    for selector in wanted {
                        assert!(there.contains(&format!("dst {} ", selectors[selector])), "{there}");
                    }
                }
                tables.clear().unwrap();
                assert_eq!(ip("xfrm policy"), "");
            })
            .unwrap();
            Ok(())
        })
        .unwrap();
}

/// Whatever is cut off: nothing is read, and nothing fails.
#[test]
fn truncated_messages_are_no_messages() {
    host()
        .run(|| {
            let mut tables = tables();
            tables.install_trap(&trap(9, "10.1.0.0/24", "10.2.0.0/24"), &no_links()).unwrap();
        })
        .unwrap();
    let address: IpAddr = "10.1.0.1".parse().unwrap();
    let selector = Selector {
        source: (address, 32),
        destination: (address, 32),
        protocol: 17,
        source_port: Port { port: 1, mask: u16::MAX },
        destination_port: Port::default(),
        interface: 3,
    };
    let id = PolicyId { direction: Direction::Forward, selector, mark: Default::default(), if_id: 4 };
    let template = Template { reqid: 9, mode: Mode::Tunnel, source: address, destination: address };
    let policy = Policy { id, priority: 5, action: Action::Protect(template) };
    let octets = codec::put_policy(kind::NEW_POLICY, 0, &policy, codec::OWNER).finish(1, 0);
    let received = codec::messages(&octets).next().unwrap();
    let report = codec::policy(received.payload).unwrap();
    assert_eq!((report.id, report.priority, report.ours, report.reqids), (id, 5, true, vec![9]));
    for length in 0..octets.len() {
        assert_eq!(codec::messages(&octets[..length]).count(), 0, "{length}");
    }
    for length in 0..168 {
        assert!(codec::policy(&received.payload[..length]).is_none(), "{length}");
        for kind in 0..0x30 {
            let _ = codec::event(kind, &received.payload[..length]);
        }
        assert!(codec::state(&received.payload[..length]).is_none(), "{length}");
        let ends = codec::Ends { source: address, destination: address, ports: None };
        assert!(codec::moved_state(kind::NEW_SA, 0, &received.payload[..length], &ends).is_none());
    }
    assert!(codec::error(&[0; 3]).is_none());
}

#[test]
fn ranges_become_networks_and_ports_under_a_mask_and_nothing_is_widened() {
    let local = network("10.1.0.0/24");
    let web = with(network("10.2.0.0/24"), 6, 80, 83);
    let one = selectors::outbound(&[local], &[web], 0).unwrap();
    assert_eq!(one.len(), 1);
    assert_eq!(one[0].destination_port, Port { port: 80, mask: 0xfffc });
    assert_eq!(one[0].source_port, Port::default());
    // 1-6 is 1, 2-3, 4-5, 6.
    assert_eq!(selectors::outbound(&[local], &[with(web, 6, 1, 6)], 0).unwrap().len(), 4);
    let ports = selectors::outbound(&[local], &[with(web, 6, 32768, 65535)], 0).unwrap();
    assert_eq!(ports[0].destination_port, Port { port: 32768, mask: 0x8000 });
    let odd = TrafficSelector {
        start: "10.2.0.1".parse().unwrap(),
        end: "10.2.0.6".parse().unwrap(),
        ..network("10.2.0.0/24")
    };
    assert_eq!(selectors::outbound(&[local], &[odd], 0).unwrap().len(), 4);
    // Families do not mix, and protocols that differ have nothing in common.
    let six = network("2001:db8::/64");
    assert_eq!(selectors::outbound(&[local, six], &[network("10.2.0.0/24"), six], 0).unwrap().len(), 2);
    assert!(selectors::outbound(&[local], &[six], 0).is_err());
    assert!(selectors::outbound(&[with(local, 17, 0, u16::MAX)], &[web], 0).is_err());
    // Type 8, any code; type 3, code 1.
    let icmp = |start, end| selectors::outbound(&[local], &[with(network("10.2.0.0/24"), 1, start, end)], 0);
    let echo = icmp(0x0800, 0x08ff).unwrap()[0];
    assert_eq!((echo.source_port, echo.destination_port), (Port { port: 8, mask: u16::MAX }, Port::default()));
    let exact = icmp(0x0301, 0x0301).unwrap()[0];
    assert_eq!(exact.destination_port, Port { port: 1, mask: u16::MAX });
    for (start, end) in [(0x0300, 0x0301), (0x0300, 0x0400), (u16::MAX, 0)] {
        assert!(matches!(icmp(start, end), Err(PlaneError::Unsupported { .. })), "{start:x} to {end:x}");
    }
    // RFC 4301 §4.4.1.1: OPAQUE is what the kernel has no word for.
    assert!(selectors::outbound(&[local], &[with(web, 17, u16::MAX, 0)], 0).is_err());
    let crooked =
        TrafficSelector { start: "1.0.0.1".parse().unwrap(), end: "254.255.255.254".parse().unwrap(), ..local };
    let error = selectors::outbound(&[crooked], &[crooked], 0).unwrap_err();
    assert_eq!(error.to_string(), "the kernel plane does not support selectors that take more than 256 policies");
}

fn pair(spi_in: u32, mode: Mode, local: &[&str], remote: &[&str]) -> SaPair {
    let network = |text: &&str| self::network(text);
    let keys = || EspKeys { encr: Secret::new(vec![1; 20]), integ: Secret::new(Vec::new()) };
    SaPair {
        reqid: 1,
        class: ClassId(1),
        spi_in,
        spi_out: spi_in,
        mode,
        suite: EspSuite { encr: Encr::AES_GCM_16, key_bits: 128, integ: Integ::NONE, esn: false },
        keys_in: keys(),
        keys_out: keys(),
        local_ts: local.iter().map(network).collect(),
        remote_ts: remote.iter().map(network).collect(),
        encapsulation: Encapsulation::None {
            local: "192.0.2.1".parse().unwrap(),
            remote: "192.0.2.2".parse().unwrap(),
        },
        replay_window: 32,
        lifetime: Lifetime::default(),
        tfc: TfcPadding::None,
        copy_df: true,
        copy_ecn: true,
        await_peer: false,
        options: KernelOptions::default(),
    }
}

// RFC 4301 §5.1.2, §8.1, RFC 6040 §4: what is copied between inner and outer header, in the kernel's flags (linux/xfrm.h) as
// strongSwan sets them.
#[test]
fn what_headers_copy_is_said_to_the_kernel() {
    const NO_ECN: u8 = 1;
    const DECAP_DSCP: u8 = 2;
    const NO_PMTU_DISCOVERY: u8 = 4;
    const ANY_FAMILY: u8 = 32;
    const DONT_ENCAP_DSCP: u32 = 1;
    let ends = descriptions::ends(&pair(256, Mode::Tunnel, &[], &[]).encapsulation);
    for (copy_dscp, to_inside, not_outside) in [
        (CopyDscp::Out, 0, 0),
        (CopyDscp::In, DECAP_DSCP, DONT_ENCAP_DSCP),
        (CopyDscp::Both, DECAP_DSCP, 0),
        (CopyDscp::No, 0, DONT_ENCAP_DSCP),
    ] {
        for (copy_df, copy_ecn, both) in
            [(true, true, 0), (false, true, NO_PMTU_DISCOVERY), (true, false, NO_ECN), (false, false, 5)]
        {
            let options = KernelOptions { copy_dscp, ..KernelOptions::default() };
            let pair = SaPair { copy_df, copy_ecn, options, ..pair(256, Mode::Tunnel, &[], &[]) };
            let outbound = descriptions::outbound(&pair, &ends, None, &Links::default(), 0);
            assert_eq!((outbound.flags, outbound.extra_flags), (ANY_FAMILY | both, not_outside), "{copy_dscp:?}");
            let inbound = descriptions::inbound(&pair, &ends, None, &Links::default());
            assert_eq!((inbound.flags, inbound.extra_flags), (ANY_FAMILY | both | to_inside, 0), "{copy_dscp:?}");
            // Flags of the state, and XFRMA_SA_EXTRA_FLAGS if there are any.
            let message = codec::put_state(0, &outbound, &[]).finish(1, 2);
            assert_eq!(message[16 + 216], ANY_FAMILY | both);
            let extra = [&8_u16.to_ne_bytes()[..], &24_u16.to_ne_bytes(), &1_u32.to_ne_bytes()].concat();
            let is_said = message[16 + 224..].windows(extra.len()).any(|octets| octets == extra);
            assert_eq!(is_said, not_outside != 0);
        }
    }
    assert_eq!(KernelOptions::default().copy_dscp, CopyDscp::Out);
}

/// First lines of the policies that drop, and how many others there are.
fn around() -> (Vec<String>, usize) {
    let dump = ip("xfrm policy").replace("\n\t", " ");
    let (drops, others): (Vec<&str>, Vec<&str>) = dump.lines().partition(|line| line.contains("action block"));
    (drops.iter().map(|line| line.split_whitespace().take(6).collect::<Vec<_>>().join(" ")).collect(), others.len())
}

// RFC 4301 §5.2: what an SA of user space is for has a policy as long as there is one.
#[test]
fn policies_around_the_tunnel_come_with_the_first_and_go_with_the_last() {
    host()
        .run(|| {
            let inbound = InboundPolicies::new(Xfrm::open_policies().unwrap(), true, None, true);
            let (local, remote) = (&["10.1.0.0/24", "fd01::/64"], &["10.2.0.0/24", "fd02::/64"]);
            for spi_in in [256, 257] {
                inbound.add_pair(&pair(spi_in, Mode::Tunnel, local, remote)).unwrap();
            }
            // IPv6 out of the tunnel cannot be told from other: it would be dropped, too.
            let policies = ["fwd", "in"].map(|direction| format!("src 10.2.0.0/24 dst 10.1.0.0/24 dir {direction}"));
            let mut there = around();
            there.0.sort();
            assert_eq!(there, (policies.to_vec(), 1));
            inbound.remove_pair(256);
            assert_eq!(around().0.len(), 2);
            inbound.add_pair(&pair(258, Mode::Transport, &["192.0.2.1/32"], &["192.0.2.2/32"])).unwrap();
            assert_eq!(around().0.len(), 3, "nothing is forwarded in transport mode");
            inbound.remove_pair(257);
            inbound.remove_pair(258);
            assert_eq!(ip("xfrm policy"), "");

            // Nor may IPv4 out of the tunnel be dropped, where its device has no switch.
            let without = InboundPolicies::new(Xfrm::open_policies().unwrap(), false, None, true);
            without.add_pair(&pair(261, Mode::Tunnel, local, remote)).unwrap();
            assert_eq!(ip("xfrm policy"), "");

            // What policies cannot say leaves the SA as it is.
            let mut opaque = pair(259, Mode::Tunnel, &["10.1.0.0/24"], &["10.2.0.0/24"]);
            opaque.remote_ts = vec![with(network("10.2.0.0/24"), 17, u16::MAX, 0)];
            inbound.add_pair(&opaque).unwrap();
            assert_eq!(ip("xfrm policy"), "");
            // One of somebody else for the same packets would go first.
            ip("xfrm policy add dir in src 10.2.0.0/24 dst 10.1.0.0/24 action allow priority 9");
            let refused = inbound.add_pair(&pair(260, Mode::Tunnel, &["10.1.0.0/24"], &["10.2.0.0/24"]));
            assert!(refused.unwrap_err().to_string().contains("another key manager"));
            assert_eq!(around(), (vec![], 1));
        })
        .unwrap();
}

#[test]
fn the_mark_of_the_tunnel_is_a_bit_that_others_keep_and_cannot_remove() {
    host()
        .run(|| {
            let mark = TunnelMark::set(0x4000_0000, (7, "lk0")).unwrap();
            let nft =
                |arguments: &[&str]| Command::new("nft").args(arguments).output().expect("apt-get install nftables");
            nft(&["flush", "ruleset"]);
            nft(&["delete", "table", "ip6", "latchkey-lk0"]);
            let rules = String::from_utf8(nft(&["list", "ruleset"]).stdout).unwrap();
            assert!(rules.contains("iif 7 meta mark set meta mark | 0x40000000"), "{rules}");
            assert!(rules.contains("iif \"lo\" meta mark set meta mark | 0x40000000"), "{rules}");
            drop(mark);
            assert_eq!(nft(&["list", "ruleset"]).stdout, b"");
        })
        .unwrap();
}
