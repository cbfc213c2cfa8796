use std::collections::HashSet;

use proptest::prelude::*;

use super::*;
use crate::crypto::Protection;
use crate::crypto::tests::SUITES;
use crate::guard::{ClassId, NoLatches};
use crate::ip::tests::{ip, udp};
use crate::plane::{EspKeys, EspSuite, Lifetime, StreamId, TfcPadding};
use crate::secret::Secret;
use crate::selector::TrafficSelector;
use crate::transform::{Encr, Integ};

const LEFT: &str = "192.0.2.1";
const RIGHT: &str = "198.51.100.2";
const GCM: (Encr, u16, Integ) = (Encr::AES_GCM_16, 128, Integ::NONE);

// ---- both directions

#[test]
fn every_suite_mode_and_encapsulation_carries_packets_both_ways() {
    for suite in SUITES {
        for esn in [false, true] {
            for mode in [Mode::Tunnel, Mode::Transport] {
                for kind in [Kind::Bare, Kind::Udp, Kind::Stream] {
                    let setup = Setup { suite, esn, mode, kind, ..Setup::default() };
                    let pair = Pair::new(&setup);
                    for length in [0, 1, 2, 3, 13, 64, 1000] {
                        let payload = vec![0x42; length];
                        let (there, back) = match mode {
                            Mode::Tunnel => (request(&payload), answer(&payload)),
                            Mode::Transport => (udp(LEFT, 9, RIGHT, 53, &payload), udp(RIGHT, 53, LEFT, 9, &payload)),
                        };
                        assert_eq!(pair.left_to_right(&there), Ok(there.clone()), "{setup:?} {length}");
                        assert_eq!(pair.right_to_left(&back), Ok(back.clone()), "{setup:?} {length}");
                    }
                    let usage = pair.left.usage(pair.now, LEFT_SPI).unwrap();
                    assert_eq!((usage.packets_in, usage.packets_out), (7, 7));
                    assert!(usage.bytes_out >= 1083);
                }
            }
        }
    }
}

#[test]
fn ipv6_goes_through_ipv4_and_back() {
    let setup = Setup { left_ts: vec![net("fd00:1::/64")], right_ts: vec![net("fd00:2::/64")], ..Setup::default() };
    let pair = Pair::new(&setup);
    let packet = udp("fd00:1::5", 1, "fd00:2::6", 2, b"six");
    assert_eq!(pair.left_to_right(&packet), Ok(packet));
}

// RFC 4303 §2.2.1, Appendix A
#[test]
fn extended_numbers_go_over_the_end_of_the_low_half() {
    for suite in SUITES {
        let pair = Pair::new(&Setup { suite, esn: true, ..Setup::default() });
        pair.sa_of_left().set_last_sequence(0xffff_fff0);
        pair.sa_of_right().receiver().window.accept(0xffff_fff0).unwrap();
        let mut sealed: Vec<_> = (0..32).map(|n| pair.seal_left(&request(&[n]))).collect();
        sealed.swap(10, 20);
        for (n, mut packet) in sealed.into_iter().enumerate() {
            let copy = packet.clone();
            assert!(pair.open_right(&mut packet).is_ok(), "{suite:?} {n}");
            assert_eq!(pair.open_right(&mut copy.clone()), Err(DropReason::Replay));
        }
    }
}

// RFC 4303 §3.3.3: numbers do not cycle
#[test]
fn the_sa_stops_when_sequence_numbers_are_used_up() {
    for (esn, last) in [(false, u64::from(u32::MAX)), (true, u64::MAX)] {
        let pair = Pair::new(&Setup { esn, ..Setup::default() });
        pair.sa_of_left().set_last_sequence(last - 1);
        pair.seal_left(&request(b"last"));
        pair.left.drain_events();
        assert_eq!(pair.left_to_right(&request(b"none")), Err(DropReason::Expired));
        assert_eq!(pair.left_to_right(&request(b"none")), Err(DropReason::Expired));
        assert_eq!(pair.left.drain_events(), [PlaneEvent::Expire { spi_in: LEFT_SPI, hard: true }]);
    }
}

#[test]
fn a_rekey_is_asked_for_before_32_bit_numbers_are_used_up() {
    let pair = Pair::new(&Setup::default());
    pair.sa_of_left().set_last_sequence(0xe000_0000 - 2);
    pair.seal_left(&request(b""));
    assert_eq!(pair.left.drain_events(), []);
    pair.seal_left(&request(b""));
    pair.seal_left(&request(b""));
    assert_eq!(pair.left.drain_events(), [PlaneEvent::Expire { spi_in: LEFT_SPI, hard: false }]);
}

// ---- what an attacker may try

#[test]
fn replayed_and_changed_packets_are_dropped_and_change_nothing() {
    for suite in SUITES {
        let pair = Pair::new(&Setup { suite, ..Setup::default() });
        let sealed = pair.seal_left(&request(b"secret"));
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 0x10;
            let expected = if at < 4 { DropReason::UnknownSpi } else { DropReason::Integrity };
            assert_eq!(pair.open_right(&mut changed), Err(expected), "{suite:?} octet {at}");
        }
        for length in 0..sealed.len() {
            assert!(pair.open_right(&mut sealed[..length].to_vec()).is_err());
        }
        assert_eq!(pair.right.usage(pair.now, RIGHT_SPI).unwrap(), Usage::default());
        assert!(pair.open_right(&mut sealed.clone()).is_ok());
        assert_eq!(pair.open_right(&mut sealed.clone()), Err(DropReason::Replay));
        assert_eq!(pair.right.usage(pair.now, RIGHT_SPI).unwrap().packets_in, 1);
    }
}

// RFC 4301 §5.2 step 4
#[test]
fn inner_packets_outside_the_selectors_are_dropped_although_authentic() {
    let tcp_only = TrafficSelector { protocol: 17, start_port: 53, end_port: 53, ..net("10.2.0.0/16") };
    let pair = Pair::new(&Setup { right_ts: vec![tcp_only], ..Setup::default() });
    for (from, from_port, to, to_port) in [
        ("10.1.0.5", 9, "10.2.0.6", 54), // other port
        ("10.9.0.5", 9, "10.2.0.6", 53), // somebody else's source
        ("10.1.0.5", 9, "10.3.0.6", 53), // not our network
        ("10.2.0.6", 53, "10.1.0.5", 9), // turned round
        ("fd00::1", 9, "fd00::2", 53),   // other family
    ] {
        let inner = udp(from, from_port, to, to_port, b"x");
        let next_header = if from.contains(':') { 41 } else { 4 };
        let mut sealed = pair.forge_left(next_header, &inner);
        assert_eq!(pair.open_right(&mut sealed), Err(DropReason::Selectors), "{from} {to}");
        assert!(matches!(pair.left.outbound(pair.now, &inner, &mut Vec::new()), Outbound::Drop(DropReason::NoPolicy)));
    }
    // The first of them is reported, and others not before a second is over.
    let first = PlaneEvent::InvalidSelectors { spi_in: RIGHT_SPI, start: udp("10.1.0.5", 9, "10.2.0.6", 54, b"x") };
    assert_eq!(pair.right.drain_events(), [first]);
    let allowed = udp("10.1.0.5", 9, "10.2.0.6", 53, b"x");
    assert_eq!(pair.left_to_right(&allowed), Ok(allowed.clone()));
    assert_eq!(pair.right.drain_events(), []);
    // RFC 4301 §7: a later fragment shows no port, so a selector with a port does not cover it.
    let mut later = allowed;
    later[7] = 8;
    assert_eq!(pair.open_right(&mut pair.forge_left(4, &later)), Err(DropReason::Selectors));
}

#[test]
fn next_header_and_inner_version_must_agree() {
    let pair = Pair::new(&Setup::default());
    for (next_header, inner) in [(41, request(b"x")), (17, request(b"x")), (4, vec![]), (4, vec![0x45; 19])] {
        assert_eq!(pair.open_right(&mut pair.forge_left(next_header, &inner)), Err(DropReason::Malformed));
    }
}

// RFC 4303 §2.6 and §2.7
#[test]
fn dummy_packets_vanish_and_flow_padding_is_cut_off() {
    let pair = Pair::new(&Setup::default());
    assert_eq!(pair.open_right(&mut pair.forge_left(59, b"noise")), Err(DropReason::Dummy));
    let padded = [request(b"real"), vec![0; 77]].concat();
    assert_eq!(pair.open_right(&mut pair.forge_left(4, &padded)), Ok(request(b"real")));
}

#[test]
fn unknown_spis_are_reported_at_a_bounded_rate() {
    let plane = plane();
    let now = Instant::now();
    let from = Kind::Udp.outer(LEFT, RIGHT);
    for second in 0..3 {
        for n in 0..1000u32 {
            let mut packet = [(n + 4096).to_be_bytes(), [0; 4]].concat();
            let dropped = plane.inbound(now + Duration::from_secs(second), from, 0, &mut packet, &mut Vec::new());
            assert_eq!(dropped, Inbound::Drop(DropReason::UnknownSpi));
        }
    }
    let events = plane.drain_events();
    assert_eq!(events.len(), 3 * UNKNOWN_SPI_PER_SECOND);
    assert_eq!(events[0], PlaneEvent::UnknownSpi { spi: 4096, remote: "198.51.100.2:4500".parse().unwrap() });
    assert_eq!(count(&plane, DropReason::UnknownSpi), 3000);
}

// RFC 9329 §5
#[test]
fn esp_is_sent_over_one_transport_and_received_over_all() {
    for kind in [Kind::Bare, Kind::Udp, Kind::Stream] {
        let pair = Pair::new(&Setup { kind, ..Setup::default() });
        for other in [Kind::Bare, Kind::Udp, Kind::Stream] {
            let from = other.outer(RIGHT, LEFT);
            let mut sealed = pair.seal_left(&request(b"x"));
            let mut forged = sealed.clone();
            *forged.last_mut().unwrap() ^= 1;
            let dropped = pair.right.inbound(pair.now, from, 0, &mut forged, &mut Vec::new());
            assert_eq!(dropped, Inbound::Drop(DropReason::Integrity));
            let mut replayed = sealed.clone();
            let delivered = pair.right.inbound(pair.now, from, 0, &mut sealed, &mut Vec::new());
            assert_eq!(delivered, Inbound::Deliver { event: None }, "no word of another path");
            let dropped = pair.right.inbound(pair.now, from, 0, &mut replayed, &mut Vec::new());
            assert_eq!(dropped, Inbound::Drop(DropReason::Replay));
            let sent = pair.right.outbound(pair.now, &answer(b"x"), &mut Vec::new());
            let to = kind.outer(RIGHT, LEFT);
            assert!(matches!(sent, Outbound::Send { to: sent, .. } if sent == to), "{sent:?}");
        }
        assert_eq!(pair.right.drain_events(), []);
    }
}

// RFC 7296 §2.23: with and without UDP must be received at any time.
#[test]
fn esp_is_received_with_and_without_udp() {
    for (kind, other) in [(Kind::Bare, Kind::Udp), (Kind::Udp, Kind::Bare)] {
        for mode in [Mode::Tunnel, Mode::Transport] {
            let pair = Pair::new(&Setup { kind, mode, ..Setup::default() });
            let packet = udp(LEFT, 9, RIGHT, 53, b"x");
            let mut sealed = pair.seal_left(&packet);
            let mut out = Vec::new();
            let delivered = pair.right.inbound(pair.now, other.outer(RIGHT, LEFT), 0, &mut sealed, &mut out);
            assert_eq!(delivered, Inbound::Deliver { event: None });
            assert_eq!(out, packet);
            assert_eq!(pair.right.drain_events(), []);
        }
    }
}

// RFC 9329 §6.1: valid, decrypted, no replay; and the newest, as an older one may come late from the old stream.
#[test]
fn another_stream_of_the_same_sa_is_accepted_and_reported_once() {
    let pair = Pair::new(&Setup { kind: Kind::Stream, ..Setup::default() });
    let (local, remote) = ("198.51.100.2:4500".parse().unwrap(), "192.0.2.1:55555".parse().unwrap());
    let other = Encapsulation::Stream { stream: StreamId(99), local, remote };
    let receive = |from, packet: &mut Vec<u8>| pair.right.inbound(pair.now, from, 3, packet, &mut Vec::new());
    let next = || pair.seal_left(&request(b"x"));
    let mut late = next();
    let mut forged = next();
    *forged.last_mut().unwrap() ^= 1;
    assert_eq!(receive(other, &mut forged), Inbound::Drop(DropReason::Integrity));
    let mut packet = next();
    let mut replayed = packet.clone();
    assert_eq!(receive(Kind::Stream.outer(RIGHT, LEFT), &mut packet), Inbound::Deliver { event: None });
    assert_eq!(receive(other, &mut replayed), Inbound::Drop(DropReason::Replay));
    assert_eq!(receive(other, &mut late), Inbound::Deliver { event: None });

    let changed = PlaneEvent::StreamChanged { spi_in: RIGHT_SPI, stream: StreamId(99), local, remote };
    assert_eq!(receive(other, &mut next()), Inbound::Deliver { event: Some(changed) });
    assert_eq!(receive(other, &mut next()), Inbound::Deliver { event: None });
    pair.right.migrate(RIGHT_SPI, other).unwrap();
    assert_eq!(receive(other, &mut next()), Inbound::Deliver { event: None });
    assert_eq!(pair.right.drain_events(), []);
}

// RFC 9329 §9.3: packets of all kinds share the connection, so none is marked.
#[test]
fn a_stream_has_one_marking_and_the_inner_one_stays() {
    let pair = Pair::new(&Setup { kind: Kind::Stream, ..Setup::default() });
    for dscp in [0, 46, 8, 63] {
        let mut packet = request(b"x");
        ip::set_tos(&mut packet, dscp << 2);
        let mut out = Vec::new();
        assert!(matches!(pair.left.outbound(pair.now, &packet, &mut out), Outbound::Send { tos: 0, .. }));
        let mut inner = Vec::new();
        pair.right.inbound(pair.now, Kind::Stream.outer(RIGHT, LEFT), 0, &mut out, &mut inner);
        assert_eq!(inner, packet);
    }
}

// ---- policies

#[test]
fn the_more_specific_policy_wins_whichever_is_newer() {
    let plane = plane();
    plane.install(half(10, 1, 1, &["10.2.0.0/16"])).unwrap();
    assert_eq!(spi_for(&plane, "10.2.0.6"), Some(10));
    plane.install(half(20, 2, 2, &["10.2.0.6/32"])).unwrap();
    assert_eq!((spi_for(&plane, "10.2.0.6"), spi_for(&plane, "10.2.0.7")), (Some(20), Some(10)));
    plane.install(half(30, 3, 3, &["10.0.0.0/8"])).unwrap();
    assert_eq!((spi_for(&plane, "10.2.0.6"), spi_for(&plane, "10.2.0.7")), (Some(20), Some(10)));
    assert_eq!(spi_for(&plane, "10.3.0.1"), Some(30));
    plane.delete(1020).unwrap();
    plane.delete(1010).unwrap();
    assert_eq!(spi_for(&plane, "10.2.0.6"), Some(30));
    plane.delete(1030).unwrap();
    assert_eq!(spi_for(&plane, "10.2.0.6"), None);
    assert!(matches!(plane.delete(1010), Err(PlaneError::NoSuchSa(1010))));
}

// RFC 4301 §4.4.1, §5.1: a PROTECT policy without an SA asks for one, and nothing goes out.
#[test]
fn a_trap_holds_back_what_no_sa_is_for_and_asks_at_a_bounded_rate() {
    let plane = plane();
    plane.install_trap(trap(7, "10.2.0.0/16")).unwrap();
    let now = Instant::now();
    assert_eq!(outcome(&plane, now, "10.3.0.1"), Outbound::Drop(DropReason::NoPolicy));
    let from_elsewhere = udp("10.9.0.5", 9, "10.2.0.6", 53, b"x");
    assert_eq!(seal(&plane, now, &from_elsewhere), Err(DropReason::NoPolicy));
    let Outbound::Acquire { reqid: 7, flow } = outcome(&plane, now, "10.2.0.6") else { panic!("no acquire") };
    assert_eq!((flow.remote, flow.remote_port), (ip("10.2.0.6"), 53));
    for milliseconds in [0, 1, 500, 999] {
        let soon = now + Duration::from_millis(milliseconds);
        assert_eq!(outcome(&plane, soon, "10.2.0.7"), Outbound::Drop(DropReason::NoSa));
    }
    let later = now + Duration::from_secs(1);
    assert!(matches!(outcome(&plane, later, "10.2.0.7"), Outbound::Acquire { reqid: 7, .. }));
    assert_eq!(outcome(&plane, later, "10.2.0.7"), Outbound::Drop(DropReason::NoSa));
    assert_eq!(count(&plane, DropReason::NoSa), 7);
    // Each trap has its own rate, and the more specific one is asked.
    plane.install_trap(trap(8, "10.2.9.0/24")).unwrap();
    assert!(matches!(outcome(&plane, later, "10.2.9.1"), Outbound::Acquire { reqid: 8, .. }));
}

#[test]
fn an_sa_takes_the_packets_of_a_trap_while_it_sends() {
    let plane = plane();
    let mut now = Instant::now();
    let acquires = |now: &mut Instant, destination: &str| {
        *now += Duration::from_secs(1);
        matches!(outcome(&plane, *now, destination), Outbound::Acquire { reqid: 1, .. })
    };
    // An SA may have the number of a trap: they are apart.
    plane.install_trap(trap(1, "10.2.0.0/16")).unwrap();
    plane.install(half(10, 1, 1, &["10.2.0.0/24"])).unwrap();
    assert_eq!(spi_for(&plane, "10.2.0.6"), Some(10));
    assert!(acquires(&mut now, "10.2.1.6"), "the peer narrowed the SA");
    plane.retire(1010).unwrap();
    assert!(acquires(&mut now, "10.2.0.6"), "the peer deleted the SA");
    plane.delete(1010).unwrap();
    assert!(acquires(&mut now, "10.2.0.6"));
    // A wider one is for somebody else's packets.
    plane.install(half(20, 2, 1, &["10.0.0.0/8"])).unwrap();
    assert_eq!(spi_for(&plane, "10.3.0.6"), Some(20));
    assert!(acquires(&mut now, "10.2.0.6"));
}

#[test]
fn a_removed_trap_asks_no_more_and_installed_twice_is_refused() {
    let plane = plane();
    let now = Instant::now();
    assert!(matches!(plane.remove_trap(7), Err(PlaneError::NoSuchTrap(7))));
    plane.install_trap(trap(7, "10.2.0.0/16")).unwrap();
    assert!(matches!(plane.install_trap(trap(7, "10.3.0.0/16")), Err(PlaneError::TrapInUse(7))));
    assert_eq!(outcome(&plane, now, "10.3.0.1"), Outbound::Drop(DropReason::NoPolicy));
    plane.remove_trap(7).unwrap();
    assert_eq!(outcome(&plane, now, "10.2.0.6"), Outbound::Drop(DropReason::NoPolicy));
}

#[test]
fn a_trap_changes_nothing_for_received_packets() {
    let pair = Pair::new(&Setup::default());
    let mut sealed = pair.seal_left(&request(b"x"));
    pair.right.install_trap(trap(7, "10.1.0.0/16")).unwrap();
    assert!(pair.open_right(&mut sealed).is_ok());
    let stranger = Encapsulation::None { local: ip(RIGHT), remote: ip(LEFT) };
    assert_eq!(open(&pair.right, pair.now, stranger, &mut [0x77; 64]), Err(DropReason::UnknownSpi));
}

// RFC 4303 §2.7
#[test]
fn padding_hides_the_length_of_packets_in_tunnel_mode_only() {
    for (tfc, mode, same) in [
        (TfcPadding::None, Mode::Tunnel, false),
        (TfcPadding::To(200), Mode::Tunnel, true),
        (TfcPadding::Mtu, Mode::Tunnel, true),
        (TfcPadding::Mtu, Mode::Transport, false),
    ] {
        for kind in [Kind::Udp, Kind::Stream] {
            let pair = Pair::new(&Setup { tfc, mode, kind, ..Setup::default() });
            let packet = |payload: &[u8]| match mode {
                Mode::Tunnel => request(payload),
                Mode::Transport => udp(LEFT, 9, RIGHT, 53, payload),
            };
            let lengths: HashSet<usize> = [0, 17, 100].map(|n| pair.seal_left(&packet(&vec![7; n])).len()).into();
            assert_eq!(lengths.len() == 1, same, "{tfc:?} {mode:?} {kind:?}: {lengths:?}");
            let one_piece = kind == Kind::Stream || lengths.iter().all(|length| *length <= 1472);
            assert!(one_piece, "{lengths:?}");
            // What is longer goes as it is, and the padding never reaches the inside.
            for n in [0, 17, 100, 300, 1300] {
                let packet = packet(&vec![7; n]);
                assert_eq!(pair.left_to_right(&packet), Ok(packet));
            }
        }
    }
}

/// A server, and two clients of different owners behind one NAT.
struct Natted {
    server: DataPath,
    clients: [DataPath; 2],
    now: Instant,
}

const NAT: &str = "203.0.113.9";
const SERVER: &str = "198.51.100.2";
const INSIDE: [&str; 2] = ["192.168.0.10", "192.168.0.11"];

impl Natted {
    fn new() -> Self {
        let server = plane();
        let clients = [0, 1].map(|n| {
            let offset = u32::from(n) * 10;
            let host = |text: &str| vec![net(&format!("{text}/32"))];
            let setup = Setup { mode: Mode::Transport, kind: Kind::Udp, spi_offset: offset, ..Setup::default() };
            let (mut left, mut right) = sa_pairs(&setup);
            left.encapsulation = Kind::Udp.outer(INSIDE[usize::from(n)], SERVER);
            (left.local_ts, left.remote_ts) = (host(INSIDE[usize::from(n)]), host(SERVER));
            right.encapsulation = Self::outer(n);
            (right.local_ts, right.remote_ts) = (host(SERVER), host(NAT));
            (right.class, right.reqid) = (ClassId(u32::from(n) + 1), u32::from(n) + 1);
            server.install(right).unwrap();
            let client = plane();
            client.install(left).unwrap();
            client
        });
        Self { server, clients, now: Instant::now() }
    }

    /// As the server sees it.
    fn outer(client: u8) -> Encapsulation {
        Encapsulation::Udp {
            local: SocketAddr::new(ip(SERVER), 4500),
            remote: SocketAddr::new(ip(NAT), 40_000 + u16::from(client)),
        }
    }

    fn to_server(&self, client: u8, packet: &[u8]) -> Result<(), DropReason> {
        let mut sealed = seal(&self.clients[usize::from(client)], self.now, packet)?;
        open(&self.server, self.now, Self::outer(client), &mut sealed).map(drop)
    }

    /// Which client gets a packet of the server.
    fn to_client(&self, packet: &[u8]) -> Result<u8, DropReason> {
        let mut out = Vec::new();
        match self.server.outbound(self.now, packet, &mut out) {
            Outbound::Send { to: Encapsulation::Udp { remote, .. }, .. } => Ok((remote.port() - 40_000) as u8),
            Outbound::Drop(reason) => Err(reason),
            other => panic!("{other:?}"),
        }
    }
}

// RFC 3948 §5.2
#[test]
fn clients_behind_one_nat_keep_their_connections_in_transport_mode() {
    let natted = Natted::new();
    let request = |client: u8, port| udp(INSIDE[usize::from(client)], port, SERVER, 53, b"?");
    let answer = |port| udp(SERVER, 53, NAT, port, b"!");
    assert_eq!(natted.to_client(&answer(1000)), Err(DropReason::NoSa), "nobody knows whose that is");
    assert_eq!(natted.to_server(0, &request(0, 1000)), Ok(()));
    assert_eq!(natted.to_server(1, &request(1, 2000)), Ok(()));
    assert_eq!((natted.to_client(&answer(1000)), natted.to_client(&answer(2000))), (Ok(0), Ok(1)));
    // The same ports: the second one neither gets into the connection of the first nor its answers.
    assert_eq!(natted.to_server(1, &request(1, 1000)), Err(DropReason::Selectors));
    assert_eq!(natted.to_client(&answer(1000)), Ok(0));
    // Echo is told apart by its identifier.
    let echo = |from: &str, to: &str, kind: u8, id: u8| {
        let mut packet = Vec::new();
        crate::ip::rebuild(ip(from), ip(to), 1, 0, &[kind, 0, 0, 0, 0, id, 0, 1], &mut packet).unwrap();
        packet
    };
    assert_eq!(natted.to_server(0, &echo(INSIDE[0], SERVER, 8, 7)), Ok(()));
    assert_eq!(natted.to_server(1, &echo(INSIDE[1], SERVER, 8, 8)), Ok(()));
    assert_eq!(natted.to_client(&echo(SERVER, NAT, 0, 7)), Ok(0));
    assert_eq!(natted.to_client(&echo(SERVER, NAT, 0, 8)), Ok(1));
}

#[test]
fn a_client_that_is_alone_or_left_behind_a_nat_gets_everything() {
    let natted = Natted::new();
    let answer = |port| udp(SERVER, 53, NAT, port, b"!");
    assert_eq!(natted.to_server(0, &udp(INSIDE[0], 1000, SERVER, 53, b"?")), Ok(()));
    natted.server.delete(RIGHT_SPI).unwrap();
    assert_eq!(natted.to_client(&answer(1000)), Ok(1), "the owner is gone");
    assert_eq!(natted.to_client(&answer(3000)), Ok(1));
    assert_eq!(natted.to_server(1, &udp(INSIDE[1], 1000, SERVER, 53, b"?")), Ok(()));
}

// RFC 7296 §2.8: the responder of a rekey has the new SA before its peer has.
#[test]
fn a_successor_that_awaits_its_peer_leaves_sending_to_its_predecessor() {
    let right = plane();
    let mut old = half(300, 1, 1, &["10.2.0.0/16"]);
    old.await_peer = true;
    right.install(old).unwrap();
    assert_eq!(spi_for(&right, "10.2.0.6"), Some(300), "without a predecessor there is nobody to leave it to");
    let mut new = half(301, 1, 1, &["10.2.0.0/16"]);
    new.await_peer = true;
    right.install(new).unwrap();
    assert_eq!(spi_for(&right, "10.2.0.6"), Some(300));
    right.retire(1300).unwrap();
    assert_eq!(spi_for(&right, "10.2.0.6"), Some(301), "the predecessor was retired");
    let mut newest = half(302, 1, 1, &["10.2.0.0/16"]);
    newest.await_peer = true;
    right.install(newest).unwrap();
    assert_eq!(spi_for(&right, "10.2.0.6"), Some(301));
    right.delete(1301).unwrap();
    assert_eq!(spi_for(&right, "10.2.0.6"), Some(302), "the predecessor was deleted");
    assert!(matches!(right.retire(1301), Err(PlaneError::NoSuchSa(1301))));
}

// RFC 7296 §2.8.1: both sides rekeyed; ours is redundant and goes before the peer has heard of the survivor.
#[test]
fn a_redundant_pair_leaves_sending_to_the_replaced_one() {
    let plane = plane();
    plane.install(half(300, 1, 1, &["10.2.0.0/16"])).unwrap();
    let mut survivor = half(301, 1, 1, &["10.2.0.0/16"]);
    survivor.await_peer = true;
    plane.install(survivor).unwrap();
    plane.install(half(302, 1, 1, &["10.2.0.0/16"])).unwrap();
    assert_eq!(spi_for(&plane, "10.2.0.6"), Some(302));
    plane.retire(1302).unwrap();
    assert_eq!(spi_for(&plane, "10.2.0.6"), Some(300));
    plane.delete(1302).unwrap();
    assert_eq!(spi_for(&plane, "10.2.0.6"), Some(300));
    plane.retire(1300).unwrap();
    assert_eq!(spi_for(&plane, "10.2.0.6"), Some(301));
}

#[test]
fn the_first_packet_of_the_peer_ends_the_wait() {
    let pair = Pair::new(&Setup::default());
    let (left, mut right) = sa_pairs(&Setup { spi_offset: 5, ..Setup::default() });
    right.await_peer = true;
    pair.right.install(right).unwrap();
    let spi = |sealed: &[u8]| esp::Header::read(sealed).unwrap().spi;
    let answer = udp("10.2.0.6", 53, "10.1.0.5", 9, b"answer");
    assert_eq!(spi(&seal(&pair.right, pair.now, &answer).unwrap()), LEFT_SPI);
    // A forged packet is no proof that the peer is ready.
    pair.left.install(left).unwrap();
    let mut forged = pair.seal_left(&request(b"x"));
    assert_eq!(spi(&forged), RIGHT_SPI + 5);
    *forged.last_mut().unwrap() ^= 1;
    assert_eq!(pair.open_right(&mut forged), Err(DropReason::Integrity));
    assert_eq!(spi(&seal(&pair.right, pair.now, &answer).unwrap()), LEFT_SPI);
    pair.left_to_right(&request(b"y")).unwrap();
    assert_eq!(spi(&seal(&pair.right, pair.now, &answer).unwrap()), LEFT_SPI + 5);
}

#[test]
fn a_retired_pair_receives_only() {
    let pair = Pair::new(&Setup::default());
    let mut late = pair.seal_left(&request(b"late"));
    pair.right.retire(RIGHT_SPI).unwrap();
    assert_eq!(seal(&pair.right, pair.now, &udp("10.2.0.6", 53, "10.1.0.5", 9, b"x")), Err(DropReason::NoPolicy));
    pair.open_right(&mut late).unwrap();
}

#[test]
fn a_rekey_of_a_wide_tunnel_does_not_divert_the_traffic_of_a_narrow_one() {
    let plane = plane();
    plane.install(half(10, 1, 1, &["0.0.0.0/0"])).unwrap();
    plane.install(half(20, 2, 2, &["10.2.0.0/16", "10.3.0.0/16"])).unwrap();
    plane.install(half(11, 1, 1, &["0.0.0.0/0"])).unwrap();
    plane.delete(1010).unwrap();
    assert_eq!((spi_for(&plane, "10.3.0.6"), spi_for(&plane, "10.4.0.6")), (Some(20), Some(11)));
    // The same for our side, and among equals the newest.
    let mut narrow = half(30, 3, 3, &["0.0.0.0/0"]);
    narrow.local_ts = vec![net("10.1.0.0/24")];
    plane.install(narrow).unwrap();
    plane.install(half(12, 1, 1, &["0.0.0.0/0"])).unwrap();
    assert_eq!(spi_for(&plane, "10.4.0.6"), Some(30));
    plane.delete(1030).unwrap();
    assert_eq!(spi_for(&plane, "10.4.0.6"), Some(12));
}

#[test]
fn a_rekeyed_pair_sends_with_the_new_sa_and_receives_with_both() {
    let pair = Pair::new(&Setup::default());
    let old = pair.seal_left(&request(b"old"));
    let successor = Setup { spi_offset: 5, ..Setup::default() };
    let (left, right) = sa_pairs(&successor);
    pair.left.install(left).unwrap();
    pair.right.install(right).unwrap();
    let new = pair.seal_left(&request(b"new"));
    assert_eq!(esp::Header::read(&old).unwrap().spi, RIGHT_SPI);
    assert_eq!(esp::Header::read(&new).unwrap(), esp::Header { spi: RIGHT_SPI + 5, sequence_low: 1 });
    assert_eq!(pair.open_right(&mut new.clone()), Ok(request(b"new")));
    assert_eq!(pair.open_right(&mut old.clone()), Ok(request(b"old")));

    pair.left.delete(LEFT_SPI + 5).unwrap();
    assert_eq!(esp::Header::read(&pair.seal_left(&request(b"x"))).unwrap().spi, RIGHT_SPI);
    pair.right.delete(RIGHT_SPI).unwrap();
    assert_eq!(pair.left_to_right(&request(b"x")), Err(DropReason::UnknownSpi));
}

#[test]
fn refused_installations_change_nothing() {
    let plane = plane();
    plane.install(half(10, 1, 1, &["10.2.0.0/16"])).unwrap();
    assert!(matches!(plane.install(half(10, 2, 1, &["10.3.0.0/16"])), Err(PlaneError::SpiInUse(1010))));
    let mut short = half(11, 2, 1, &["10.3.0.0/16"]);
    short.keys_out.encr = Secret::new(vec![0; 19]);
    assert!(matches!(plane.install(short), Err(PlaneError::KeyLength("the outbound SA"))));
    let mut unknown = half(11, 2, 1, &["10.3.0.0/16"]);
    unknown.suite.encr = Encr(3);
    assert!(matches!(plane.install(unknown), Err(PlaneError::Unsupported { .. })));
    let mut reserved = half(11, 2, 1, &["10.3.0.0/16"]);
    reserved.spi_in = 255;
    assert!(matches!(plane.install(reserved), Err(PlaneError::Unsupported { .. })));
    assert_eq!(spi_for(&plane, "10.3.0.6"), None);
    assert!(matches!(plane.migrate(1011, Kind::Udp.outer(LEFT, RIGHT)), Err(PlaneError::NoSuchSa(1011))));
    assert!(matches!(plane.usage(Instant::now(), 1011), Err(PlaneError::NoSuchSa(1011))));
}

// ---- latches

struct Latched {
    flow: Flow,
    class: Mutex<Option<ClassId>>,
}

impl FlowGuard for Latched {
    fn check(&self, _: Direction, flow: &Flow, class: Option<ClassId>) -> Verdict {
        if *flow == self.flow && class != *lock(&self.class) { Verdict::Drop } else { Verdict::Pass }
    }
}

// RFC 4301 §6.2: what an ICMP error quotes must be looked at as well.
#[test]
fn an_icmp_error_about_a_latched_flow_passes_under_its_class_only() {
    let flow = Packet::parse(&answer(b"x")).unwrap().outbound_flow();
    for (class, expected) in [(ClassId(7), Ok(())), (ClassId(8), Err(DropReason::Latch))] {
        let guard = Arc::new(Latched { flow, class: Mutex::new(Some(class)) });
        let pair = Pair::with(plane(), DataPath::new(guard), &Setup::default());
        let mut quoted = answer(&[0; 100]);
        quoted[20 + 4] = 0;
        let mut error = Vec::new();
        let payload: Vec<u8> = [3, 4, 0, 0, 0, 0, 2, 64].into_iter().chain(quoted[..28].iter().copied()).collect();
        ip::rebuild(ip("10.1.0.99"), ip("10.2.0.6"), 1, 0, &payload, &mut error).unwrap();
        assert_eq!(pair.left_to_right(&error).map(|_| ()), expected);
        // An echo request quotes nothing.
        error[20] = 8;
        assert!(pair.left_to_right(&error).is_ok());
    }
}

/// An ICMP error (host unreachable, or another type) from a router.
fn error(router: &str, to: &str, kind: u8, about: &[u8]) -> Vec<u8> {
    let mut error = Vec::new();
    let payload: Vec<u8> = [kind, 1, 0, 0, 0, 0, 0, 0].into_iter().chain(about.iter().copied()).collect();
    ip::rebuild(ip(router), ip(to), if router.contains(':') { 58 } else { 1 }, 0, &payload, &mut error).unwrap();
    error
}

// RFC 4301 §6.2: errors that no selectors allow go the way of the traffic that they are about, whoever sends them, and only
// to who sent what they are about.
#[test]
fn an_icmp_error_that_no_policy_selects_goes_with_the_traffic_that_it_is_about() {
    let dns = TrafficSelector { protocol: 17, start_port: 53, end_port: 53, ..net("10.2.0.0/16") };
    let (six_left, six_right) = (net("fd00:1::/64"), net("fd00:2::/64"));
    let setup =
        Setup { left_ts: vec![net("10.1.0.0/16"), six_left], right_ts: vec![dns, six_right], ..Setup::default() };
    let pair = Pair::new(&setup);
    let answer = answer(b"a longer answer");
    let start = &answer[..28];
    let six = udp("fd00:2::6", 53, "fd00:1::5", 9, b"six");
    let elsewhere = udp("10.2.0.6", 54, "10.1.0.5", 9, b"");
    let of_others = udp("10.2.0.6", 53, "10.9.0.5", 9, b"");
    for (error, reason) in [
        (error("172.16.0.1", "10.2.0.6", 3, &elsewhere), "another port"),
        (error("172.16.0.1", "10.2.0.6", 3, &of_others), "another peer's traffic"),
        (error("172.16.0.1", "10.2.0.7", 3, start), "to somebody else"),
        (error("172.16.0.1", "10.2.0.6", 3, &request(b"x")), "about what was sent to here"),
        (error("172.16.0.1", "10.2.0.6", 3, &start[..20]), "without ports"),
        (error("172.16.0.1", "10.2.0.6", 3, &start[..19]), "about nothing"),
        (error("172.16.0.1", "10.2.0.6", 8, start), "no error"),
    ] {
        let sent = pair.left.outbound(pair.now, &error, &mut Vec::new());
        assert_eq!(sent, Outbound::Drop(DropReason::NoPolicy), "{reason}");
        assert_eq!(pair.open_right(&mut pair.forge_left(4, &error)), Err(DropReason::Selectors), "{reason}");
    }
    for kind in [3, 4, 11, 12] {
        let error = error("172.16.0.1", "10.2.0.6", kind, start);
        assert_eq!(pair.left_to_right(&error), Ok(error.clone()), "{kind}");
    }
    let error = error("2001:db8::1", "fd00:2::6", 1, &six);
    assert_eq!(pair.left_to_right(&error), Ok(error.clone()));
    // A trap brings up no SA for it.
    let trapping = plane();
    trapping.install_trap(trap(1, "10.2.0.0/16")).unwrap();
    let error = self::error("172.16.0.1", "10.2.0.6", 3, start);
    assert_eq!(trapping.outbound(pair.now, &error, &mut Vec::new()), Outbound::Drop(DropReason::NoPolicy));
}

/// Lets pass what begins a connection.
struct Keeper(Mutex<Vec<(Flow, Vec<u8>)>>);

impl FlowGuard for Keeper {
    fn check(&self, _: Direction, flow: &Flow, _: Option<ClassId>) -> Verdict {
        if flow.remote_port == 80 { Verdict::Drop } else { Verdict::Pass }
    }

    fn keep(&self, flow: &Flow, packet: &[u8]) {
        lock(&self.0).push((*flow, packet.to_vec()));
    }
}

// RFC 5660 §2.3: what waits for an SA or a latch.
#[test]
fn outbound_packets_that_do_not_go_out_are_shown_to_the_guard() {
    let keeper = Arc::new(Keeper(Mutex::default()));
    let pair = Pair::with(DataPath::new(Arc::clone(&keeper) as _), plane(), &Setup::default());
    let kept = |packet: &[u8]| {
        let _ = pair.left.outbound(pair.now, packet, &mut Vec::new());
        std::mem::take(&mut *lock(&keeper.0))
    };
    let shown = |packet: &[u8]| vec![(Packet::parse(packet).unwrap().outbound_flow(), packet.to_vec())];
    let latched = udp("10.1.0.5", 1, "10.2.0.6", 80, b"x");
    let nobody_s = udp("10.1.0.5", 1, "10.9.0.6", 2, b"x");
    let trapped = udp("10.1.0.5", 1, "10.8.0.6", 2, b"x");
    pair.left.install_trap(trap(90, "10.8.0.0/16")).unwrap();
    for packet in [&latched, &nobody_s, &trapped, &trapped] {
        assert_eq!(kept(packet), shown(packet));
    }
    let mut fragment = latched.clone();
    fragment[7] = 1;
    for packet in [&request(b"x"), &fragment, &latched[..10].to_vec()] {
        assert_eq!(kept(packet), []);
    }
}

struct Beginnings;

impl FlowGuard for Beginnings {
    fn check(&self, _: Direction, _: &Flow, _: Option<ClassId>) -> Verdict {
        Verdict::Pass
    }

    fn check_later(&self, _: &Flow, _: Option<ClassId>) -> Verdict {
        Verdict::Drop
    }
}

// RFC 5660 §5.1: a SYN makes a latch, and no other segment does.
#[test]
fn only_a_syn_begins_a_tcp_connection() {
    let pair = Pair::with(plane(), DataPath::new(Arc::new(Beginnings)), &Setup::default());
    let segment = |flags: u8, length: usize| {
        let tcp = [0x9c, 0x40, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0];
        let mut packet = Vec::new();
        ip::rebuild(ip("10.1.0.5"), ip("10.2.0.6"), 6, 0, &tcp[..length], &mut packet).unwrap();
        pair.left_to_right(&packet).map(|_| ())
    };
    assert_eq!(segment(0x02, 20), Ok(()));
    assert_eq!(segment(0xc2, 20), Ok(()), "ECE and CWR (RFC 3168 §6.1.1)");
    for flags in [0x00, 0x10, 0x12, 0x14, 0x04, 0x06, 0x11, 0x01, 0x03, 0x18] {
        assert_eq!(segment(flags, 20), Err(DropReason::Latch), "{flags:02x}");
    }
    assert_eq!(segment(0x02, 12), Err(DropReason::Latch), "cut off before the flags");
    assert!(pair.left_to_right(&request(b"x")).is_ok(), "UDP");
}

struct Unreachable;

impl FlowGuard for Unreachable {
    fn check(&self, _: Direction, _: &Flow, _: Option<ClassId>) -> Verdict {
        Verdict::Unreachable
    }

    fn check_later(&self, _: &Flow, _: Option<ClassId>) -> Verdict {
        Verdict::Drop
    }
}

// RFC 5660 §5.5 (c)
#[test]
fn the_sender_of_a_packet_without_a_way_is_told() {
    let pair = Pair::with(DataPath::new(Arc::new(Unreachable)), plane(), &Setup::default());
    let mut told = Vec::new();
    assert_eq!(pair.left.outbound(pair.now, &request(b"x"), &mut told), Outbound::Prohibited);
    // Destination unreachable, communication administratively prohibited (RFC 1812 §5.2.7.1).
    assert_eq!(told.get(20..22), Some(&[3, 13][..]));
    assert_eq!(
        Packet::parse(&told).unwrap().quoted_flow(),
        Some(Packet::parse(&request(b"x")).unwrap().outbound_flow())
    );
    assert!(pair.left.drops().contains(&(DropReason::Latch, 1)));
}

#[test]
fn packets_that_are_led_on_to_another_destination_are_refused() {
    let pair = Pair::new(&Setup::default());
    let with_options = |options: [u8; 8]| {
        let mut packet = request(b"x");
        packet.splice(20..20, options);
        packet[0] = 0x47;
        let length = u16::try_from(packet.len()).unwrap();
        packet[2..4].copy_from_slice(&length.to_be_bytes());
        pair.open_right(&mut pair.forge_left(4, &packet)).map(|_| ())
    };
    // RFC 791 §3.1: no-operation, then loose and strict source route, behind another option too.
    assert_eq!(with_options([1, 131, 7, 4, 10, 9, 9, 9]), Err(DropReason::Selectors));
    assert_eq!(with_options([137, 7, 4, 10, 9, 9, 9, 0]), Err(DropReason::Selectors));
    assert_eq!(with_options([148, 4, 0, 0, 131, 3, 4, 0]), Err(DropReason::Selectors));
    assert_eq!(with_options([148, 4, 0, 0, 0, 131, 3, 4]), Ok(()), "behind the end");

    // RFC 8200 §4.4
    let net6 = |host: &str| vec![net(&format!("fd00:{host}::/64"))];
    let pair = Pair::new(&Setup { left_ts: net6("1"), right_ts: net6("2"), ..Setup::default() });
    for (left, expected) in [(1, Err(DropReason::Selectors)), (0, Ok(()))] {
        let mut packet = udp("fd00:1::5", 1, "fd00:2::6", 2, b"x");
        packet.splice(40..40, [17, 0, 0, left, 0, 0, 0, 0]);
        packet[5] += 8;
        packet[6] = 43;
        assert_eq!(pair.open_right(&mut pair.forge_left(41, &packet)).map(|_| ()), expected);
    }
}

// RFC 8200 §4.5: the first fragment alone says what follows.
#[test]
fn a_later_ipv6_fragment_cannot_hide_its_protocol_from_the_latches() {
    let flow = Flow { protocol: 44, local: ip("fd00:2::6"), local_port: 0, remote: ip("fd00:1::5"), remote_port: 0 };
    let guard = Arc::new(Latched { flow, class: Mutex::new(Some(ClassId(8))) });
    let net6 = |host: &str| vec![net(&format!("fd00:{host}::/64"))];
    let setup = Setup { left_ts: net6("1"), right_ts: net6("2"), ..Setup::default() };
    let pair = Pair::with(plane(), DataPath::new(guard), &setup);
    let mut packet = udp("fd00:1::5", 1, "fd00:2::6", 2, b"x");
    packet.splice(40..40, [60, 0, 0, 8, 0, 0, 0, 1]);
    packet[5] += 8;
    packet[6] = 44;
    assert_eq!(pair.left_to_right(&packet), Err(DropReason::Latch));
}

// RFC 5660 §2
#[test]
fn a_latched_flow_passes_under_its_class_only_and_a_broken_one_not_at_all() {
    let there = Packet::parse(&request(b"x")).unwrap().outbound_flow();
    for (class, expected) in [(Some(ClassId(7)), Ok(())), (Some(ClassId(8)), Err(DropReason::Latch))] {
        let guard = Arc::new(Latched { flow: there, class: Mutex::new(class) });
        let left = DataPath::new(guard.clone());
        let right = plane();
        let pair = Pair::with(left, right, &Setup::default());
        assert_eq!(pair.left_to_right(&request(b"x")).map(|_| ()), expected);
        assert_eq!(pair.right_to_left(&answer(b"x")).map(|_| ()), expected);
        let other = udp("10.1.0.5", 10, "10.2.0.6", 53, b"x");
        assert!(pair.left_to_right(&other).is_ok(), "other flows are not concerned");

        *lock(&guard.class) = None;
        assert_eq!(pair.left_to_right(&request(b"x")), Err(DropReason::Latch));
        assert_eq!(pair.right_to_left(&answer(b"x")), Err(DropReason::Latch));
    }
}

// ---- limits

#[test]
fn volume_limits_report_once_and_then_stop_both_directions() {
    let packet = request(b"0123456789");
    let length = u64::try_from(packet.len()).unwrap();
    for lifetime in [
        Lifetime { soft_packets: Some(2), hard_packets: Some(4), ..Lifetime::default() },
        Lifetime { soft_bytes: Some(2 * length), hard_bytes: Some(4 * length + 1), ..Lifetime::default() },
    ] {
        let pair = Pair::new(&Setup { lifetime, ..Setup::default() });
        pair.seal_left(&packet);
        assert_eq!(pair.left.drain_events(), []);
        pair.seal_left(&packet);
        pair.seal_left(&packet);
        assert_eq!(pair.left.drain_events(), [PlaneEvent::Expire { spi_in: LEFT_SPI, hard: false }]);
        let mut last = pair.seal_left(&packet);
        for _ in 0..3 {
            assert_eq!(pair.left_to_right(&packet), Err(DropReason::Expired));
        }
        assert_eq!(pair.left.drain_events(), [PlaneEvent::Expire { spi_in: LEFT_SPI, hard: true }]);
        assert_eq!(pair.left.usage(pair.now, LEFT_SPI).unwrap().packets_out, 4);
        assert_eq!(pair.right_to_left(&answer(b"x")), Err(DropReason::Expired));
        assert!(pair.open_right(&mut last).is_ok(), "the peer counts for itself");
    }
}

#[test]
fn idle_time_counts_from_the_last_packet_of_each_direction() {
    let pair = Pair::new(&Setup::default());
    let start = pair.now;
    let idle = |after| {
        let usage = pair.left.usage(start + Duration::from_secs(after), LEFT_SPI).unwrap();
        (usage.idle_in, usage.idle_out)
    };
    assert_eq!(idle(1), (None, None));
    let later = start + Duration::from_secs(5);
    assert!(matches!(pair.left.outbound(later, &request(b"x"), &mut Vec::new()), Outbound::Send { .. }));
    assert_eq!(idle(12), (None, Some(Duration::from_secs(7))));
}

// ---- path MTU (RFC 4301 §8.2)

#[test]
fn packets_with_df_that_are_too_big_get_an_answer_that_names_what_fits() {
    for suite in SUITES {
        for (kind, mtu) in [(Kind::Bare, 1500), (Kind::Udp, 1500), (Kind::Udp, 1433)] {
            let pair = Pair::new(&Setup { suite, kind, copy_df: true, ..Setup::default() });
            pair.left.set_path_mtu(pair.now, ip(RIGHT), mtu);
            let mut out = Vec::new();
            let sent = pair.left.outbound(pair.now, &request(&[0; 1472]), &mut out);
            assert_eq!(sent, Outbound::Reply);
            assert_eq!(out[20..22], [3, 4]);
            let told = usize::from(u16::from_be_bytes([out[26], out[27]]));
            let outer = if kind == Kind::Udp { 28 } else { 20 };

            let fits = pair.left.outbound(pair.now, &request(&vec![0; told - 28]), &mut out);
            assert!(matches!(fits, Outbound::Send { dont_fragment: true, .. }));
            assert!(out.len() + outer <= mtu);
            assert_eq!(pair.left.outbound(pair.now, &request(&vec![0; told - 27]), &mut out), Outbound::Reply);
            assert_eq!(count(&pair.left, DropReason::TooBig), 2);
        }
    }
}

#[test]
fn packets_without_df_and_minimal_ones_are_sent_in_outer_fragments() {
    let setup = Setup { copy_df: true, ..Setup::default() };
    let pair = Pair::new(&setup);
    let mut packet = request(&[0; 1472]);
    packet[6] = 0;
    let mut out = Vec::new();
    assert!(matches!(pair.left.outbound(pair.now, &packet, &mut out), Outbound::Send { dont_fragment: false, .. }));
    assert_eq!(pair.open_right(&mut out), Ok(packet));

    let six = Setup { left_ts: vec![net("fd00:1::/64")], right_ts: vec![net("fd00:2::/64")], ..setup };
    let pair = Pair::new(&six);
    pair.left.set_path_mtu(pair.now, ip(RIGHT), 1280);
    let packet = |length: usize| udp("fd00:1::5", 1, "fd00:2::6", 2, &vec![0; length - 48]);
    assert!(matches!(
        pair.left.outbound(pair.now, &packet(1280), &mut out),
        Outbound::Send { dont_fragment: false, .. }
    ));
    assert_eq!(pair.left.outbound(pair.now, &packet(1281), &mut out), Outbound::Reply);
    assert_eq!(out[44..48], 1280u32.to_be_bytes());
}

#[test]
fn a_forged_path_mtu_does_not_go_below_the_minimum() {
    let pair = Pair::new(&Setup { kind: Kind::Udp, copy_df: true, ..Setup::default() });
    pair.left.set_path_mtu(pair.now, ip(RIGHT), 1);
    let sent = pair.left.outbound(pair.now, &request(&[0; 400]), &mut Vec::new());
    assert!(matches!(sent, Outbound::Send { dont_fragment: true, .. }), "fits into 576 octets");
    assert!(pair.left_to_right(&request(&[0; 540])).is_ok());
}

// RFC 1191 §6.3
#[test]
fn a_path_gets_wider_only_by_forgetting_and_strangers_paths_are_not_kept() {
    let pair = Pair::new(&Setup { kind: Kind::Udp, copy_df: true, ..Setup::default() });
    let passes = |after| {
        let now = pair.now + Duration::from_secs(after);
        matches!(pair.left.outbound(now, &request(&[0; 1200]), &mut Vec::new()), Outbound::Send { .. })
    };
    assert!(passes(0));
    pair.left.set_path_mtu(pair.now, ip(RIGHT), 1000);
    pair.left.set_path_mtu(pair.now, ip(RIGHT), 1400);
    assert!(!passes(0));
    assert!(!passes(599));
    assert!(passes(600));
    pair.left.set_path_mtu(pair.now, ip(RIGHT), 9000);
    let long = request(&[0; 1472]);
    let later = pair.now + Duration::from_secs(600);
    assert_eq!(pair.left.outbound(later, &long, &mut Vec::new()), Outbound::Reply, "no path is wider than the default");

    pair.left.set_path_mtu(pair.now, ip("203.0.113.1"), 600);
    assert!(!pair.left.path_mtu.load().contains_key(&ip("203.0.113.1")));
}

// RFC 9329 §3
#[test]
fn in_a_stream_only_the_frame_size_limits() {
    let pair = Pair::new(&Setup { kind: Kind::Stream, ..Setup::default() });
    pair.left.set_path_mtu(pair.now, ip(RIGHT), 576);
    let fitting = request(&vec![0; 65_000]);
    assert_eq!(pair.left_to_right(&fitting), Ok(fitting));
    let mut out = Vec::new();
    assert_eq!(pair.left.outbound(pair.now, &request(&vec![0; 65_500]), &mut out), Outbound::Reply);
}

// ---- outer header

// RFC 6040 §4.1, §4.3: compatibility mode where the SA is configured so; the other direction's SA says nothing about it.
#[test]
fn without_copy_ecn_the_field_stays_inside() {
    let pair = Pair::new(&Setup { copy_ecn: false, ..Setup::default() });
    for ecn in [0b00, 0b01, 0b10, 0b11] {
        let mut packet = request(b"x");
        ip::set_tos(&mut packet, 0xb8 | ecn);
        let mut out = Vec::new();
        let sent = pair.left.outbound(pair.now, &packet, &mut out);
        assert!(matches!(sent, Outbound::Send { tos: 0xb8, .. }), "{sent:?}");
        let mut inner = Vec::new();
        let from = Kind::Bare.outer(RIGHT, LEFT);
        assert_eq!(pair.right.inbound(pair.now, from, 0b11, &mut out, &mut inner), Inbound::Deliver { event: None });
        assert_eq!(inner, packet);
    }
}

// RFC 6040 §4
#[test]
fn ecn_and_dscp_go_out_and_congestion_comes_in() {
    let pair = Pair::new(&Setup { copy_ecn: true, ..Setup::default() });
    let mut packet = request(b"x");
    ip::set_tos(&mut packet, 0xb8 | 0b10);
    let mut out = Vec::new();
    let sent = pair.left.outbound(pair.now, &packet, &mut out);
    assert!(matches!(sent, Outbound::Send { tos: 0xba, dont_fragment: false, .. }));
    let from = Kind::Bare.outer(RIGHT, LEFT);
    let mut inner = Vec::new();
    assert_eq!(pair.right.inbound(pair.now, from, 0b11, &mut out, &mut inner), Inbound::Deliver { event: None });
    ip::set_tos(&mut packet, 0xb8 | 0b11);
    assert_eq!(inner, packet);

    let mut out = pair.seal_left(&request(b"not ECN-capable"));
    let dropped = pair.right.inbound(pair.now, from, 0b11, &mut out, &mut inner);
    assert_eq!((dropped, inner.len()), (Inbound::Drop(DropReason::Ecn), 0));
}

// RFC 9329 §9.5: compatibility mode over TCP
#[test]
fn ecn_of_a_stream_means_nothing() {
    let pair = Pair::new(&Setup { copy_ecn: true, kind: Kind::Stream, ..Setup::default() });
    // RFC 9329 §9.5: what is congested inside stays so.
    for inside in [0b00, 0b10, 0b11] {
        let mut packet = request(b"x");
        ip::set_tos(&mut packet, inside);
        let mut out = Vec::new();
        assert!(matches!(pair.left.outbound(pair.now, &packet, &mut out), Outbound::Send { tos: 0, .. }));
        let mut inner = Vec::new();
        pair.right.inbound(pair.now, Kind::Stream.outer(RIGHT, LEFT), 0b11, &mut out, &mut inner);
        assert_eq!(inner, packet);
    }
}

// ---- mobility

// RFC 7296 §2.23
#[test]
fn a_new_udp_source_is_reported_once_and_not_followed() {
    let pair = Pair::new(&Setup { kind: Kind::Udp, ..Setup::default() });
    let from =
        |port| Encapsulation::Udp { local: SocketAddr::new(ip(RIGHT), 4500), remote: SocketAddr::new(ip(LEFT), port) };
    let receive =
        |port, packet: &mut Vec<u8>| match pair.right.inbound(pair.now, from(port), 0, packet, &mut Vec::new()) {
            Inbound::Deliver { event } => event,
            Inbound::Drop(reason) => panic!("{reason:?}"),
        };
    let changed =
        |port| Some(PlaneEvent::MappingChanged { spi_in: RIGHT_SPI, remote: SocketAddr::new(ip(LEFT), port) });
    let mut overtaken = pair.seal_left(&request(b""));
    let next = || pair.seal_left(&request(b""));

    let mut forged = next();
    *forged.last_mut().unwrap() ^= 1;
    let dropped = pair.right.inbound(pair.now, from(7000), 0, &mut forged, &mut Vec::new());
    assert_eq!(dropped, Inbound::Drop(DropReason::Integrity));
    assert_eq!(pair.right.drain_events(), [], "an unauthenticated packet reports nothing");

    assert_eq!(receive(4500, &mut next()), None);
    assert_eq!(receive(5000, &mut next()), changed(5000));
    assert_eq!(receive(5000, &mut next()), None);
    assert_eq!(receive(4500, &mut overtaken), None, "an older packet says nothing of now");
    assert_eq!(receive(5000, &mut next()), None);
    assert_eq!(receive(6000, &mut next()), changed(6000));
    assert_eq!(pair.right.remote(RIGHT_SPI), Some(SocketAddr::new(ip(LEFT), 6000)));
    let mut out = Vec::new();
    let sent = pair.right.outbound(pair.now, &answer(b""), &mut out);
    assert!(matches!(sent, Outbound::Send { to, .. } if to == from(4500)));

    pair.right.migrate(RIGHT_SPI, from(6000)).unwrap();
    assert_eq!(receive(6000, &mut next()), None);
    assert_eq!(receive(4500, &mut next()), changed(4500));
}

#[test]
fn a_peer_that_changes_its_port_with_each_packet_does_not_flood_us_with_events() {
    let pair = Pair::new(&Setup { kind: Kind::Udp, ..Setup::default() });
    let reported = |port: u16, after| {
        let from =
            Encapsulation::Udp { local: SocketAddr::new(ip(RIGHT), 4500), remote: SocketAddr::new(ip(LEFT), port) };
        let now = pair.now + Duration::from_millis(after);
        let mut packet = pair.seal_left(&request(b""));
        matches!(pair.right.inbound(now, from, 0, &mut packet, &mut Vec::new()), Inbound::Deliver { event: Some(_) })
    };
    assert_eq!((0..100).filter(|n| reported(5000 + n, 0)).count(), 8);
    assert!(!reported(6000, 500));
    assert!(reported(6000, 1000), "the last one is not lost");
    assert_eq!((0..100).filter(|n| reported(if n % 2 == 0 { 4500 } else { 7000 }, 1500)).count(), 7);
}

#[test]
fn migration_moves_both_directions_and_keeps_numbers_and_counters() {
    let pair = Pair::new(&Setup { kind: Kind::Udp, ..Setup::default() });
    pair.left_to_right(&request(b"x")).unwrap();
    let replayed = pair.seal_left(&request(b"y"));
    pair.open_right(&mut replayed.clone()).unwrap();
    let to = Kind::Stream.outer(LEFT, RIGHT);
    pair.left.migrate(LEFT_SPI, to).unwrap();
    pair.right.migrate(RIGHT_SPI, Kind::Stream.outer(RIGHT, LEFT)).unwrap();
    let mut out = Vec::new();
    let sent = pair.left.outbound(pair.now, &request(b"x"), &mut out);
    assert!(matches!(sent, Outbound::Send { to: found, .. } if found == to));
    assert_eq!(esp::Header::read(&out).unwrap().sequence_low, 3);
    let from = Kind::Stream.outer(RIGHT, LEFT);
    let again = pair.right.inbound(pair.now, from, 0, &mut replayed.clone(), &mut Vec::new());
    assert_eq!(again, Inbound::Drop(DropReason::Replay));
    assert_eq!(pair.left.usage(pair.now, LEFT_SPI).unwrap().packets_out, 3);
}

// ---- transport mode

// RFC 3948 §3.1.2, RFC 9329 §6.5
#[test]
fn transport_mode_behind_a_nat_gets_new_checksums() {
    for kind in [Kind::Udp, Kind::Stream] {
        let pair = Pair::new(&Setup { mode: Mode::Transport, kind, ..Setup::default() });
        // The sender summed over its own private address.
        let mut datagram = udp("10.9.9.9", 1000, RIGHT, 53, b"hello").split_off(20);
        let mut sealed = pair.forge_left(17, &datagram);
        assert_eq!(pair.open_right(&mut sealed), Ok(udp(LEFT, 1000, RIGHT, 53, b"hello")));
        datagram[6..8].fill(0);
        let delivered = pair.open_right(&mut pair.forge_left(17, &datagram)).unwrap();
        assert_eq!(delivered[26..28], [0, 0]);
    }
}

#[test]
fn transport_mode_takes_neither_fragments_nor_other_addresses() {
    let wide = Setup {
        mode: Mode::Transport,
        left_ts: vec![net("0.0.0.0/0")],
        right_ts: vec![net("0.0.0.0/0")],
        kind: Kind::Udp,
        ..Setup::default()
    };
    let pair = Pair::new(&wide);
    let mut fragment = udp(LEFT, 1, RIGHT, 2, b"x");
    fragment[6] = 0x20;
    assert_eq!(pair.left_to_right(&fragment), Err(DropReason::NoPolicy));
    assert_eq!(pair.left_to_right(&udp(LEFT, 1, "198.51.100.3", 2, b"x")), Err(DropReason::NoPolicy));
    assert_eq!(pair.left_to_right(&udp("192.0.2.9", 1, RIGHT, 2, b"x")), Err(DropReason::NoPolicy));

    // Who changes the outer source of an authentic packet does not choose the inner one with it.
    let mut sealed = pair.seal_left(&udp(LEFT, 1, RIGHT, 2, b"x"));
    let from =
        Encapsulation::Udp { local: SocketAddr::new(ip(RIGHT), 4500), remote: "203.0.113.66:4500".parse().unwrap() };
    let dropped = pair.right.inbound(pair.now, from, 0, &mut sealed, &mut Vec::new());
    assert_eq!(dropped, Inbound::Drop(DropReason::Selectors));
    assert_eq!(
        pair.right.drain_events(),
        [PlaneEvent::MappingChanged { spi_in: RIGHT_SPI, remote: "203.0.113.66:4500".parse().unwrap() }]
    );
}

// ---- threads

mod turns;

#[test]
fn threads_never_share_a_sequence_number_while_control_changes_tables() {
    let pair = Arc::new(Pair::new(&Setup { replay_window: 4096, ..Setup::default() }));
    let (sender, receiver) = std::sync::mpsc::channel();
    let threads: Vec<_> = (0..3)
        .map(|_| {
            let (pair, sender) = (Arc::clone(&pair), sender.clone());
            std::thread::spawn(move || {
                for _ in 0..500 {
                    sender.send(pair.seal_left(&request(b"x"))).unwrap();
                }
            })
        })
        .collect();
    drop(sender);
    for n in 0..50u16 {
        pair.left.install(half(3000 + n, 9, 9, &["10.7.0.0/16"])).unwrap();
        pair.left.migrate(LEFT_SPI, Kind::Bare.outer(LEFT, RIGHT)).unwrap();
        pair.left.delete(u32::from(4000 + n)).unwrap();
    }
    let mut numbers = HashSet::new();
    for mut packet in receiver {
        assert!(numbers.insert(esp::Header::read(&packet).unwrap().sequence_low));
        assert!(pair.open_right(&mut packet).is_ok());
    }
    assert_eq!(numbers.len(), 1500);
    for thread in threads {
        thread.join().unwrap();
    }
}

#[test]
fn a_reused_buffer_is_not_allocated_again() {
    let pair = Pair::new(&Setup::default());
    let (mut sealed, mut opened) = (Vec::with_capacity(2000), Vec::with_capacity(2000));
    let (before, before_opened) = (sealed.as_ptr(), opened.as_ptr());
    for length in 0..1400 {
        pair.left.outbound(pair.now, &request(&vec![0; length]), &mut sealed);
        let from = Kind::Bare.outer(RIGHT, LEFT);
        pair.right.inbound(pair.now, from, 0, &mut sealed, &mut opened);
    }
    assert_eq!((sealed.as_ptr(), opened.as_ptr()), (before, before_opened));
}

proptest! {
    #[test]
    fn noise_from_both_sides_never_panics_nor_passes(
        mut noise in proptest::collection::vec(any::<u8>(), 0..200),
        known_spi: bool,
        mode in proptest::sample::select(vec![Mode::Tunnel, Mode::Transport]),
        suite in proptest::sample::select(SUITES.to_vec()),
        tos: u8,
    ) {
        let pair = Pair::new(&Setup { suite, mode, ..Setup::default() });
        let mut out = Vec::new();
        pair.left.outbound(pair.now, &noise, &mut out);
        if known_spi && noise.len() >= 4 {
            noise[..4].copy_from_slice(&RIGHT_SPI.to_be_bytes());
        }
        let inbound = pair.right.inbound(pair.now, Kind::Bare.outer(RIGHT, LEFT), tos, &mut noise, &mut out);
        prop_assert!(matches!(inbound, Inbound::Drop(_)));
        prop_assert!(out.is_empty());
    }

    #[test]
    fn an_authentic_peer_that_sends_noise_is_contained(
        noise in proptest::collection::vec(any::<u8>(), 0..200),
        plausible: bool,
        next_header: u8,
        tos: u8,
        mode in proptest::sample::select(vec![Mode::Tunnel, Mode::Transport]),
        kind in proptest::sample::select(vec![Kind::Bare, Kind::Udp, Kind::Stream]),
    ) {
        let pair = Pair::new(&Setup { mode, kind, copy_ecn: true, ..Setup::default() });
        let next_header = if plausible { 4 } else { next_header };
        let mut sealed = pair.forge_left(next_header, &noise);
        let mut out = Vec::new();
        if let Inbound::Deliver { .. } = pair.right.inbound(pair.now, kind.outer(RIGHT, LEFT), tos, &mut sealed, &mut out) {
            let view = Packet::parse(&out).unwrap();
            let sa = pair.sa_of_right();
            prop_assert!(sa.selects(&view.inbound_flow(), view.shows_ports()));
        }
    }

    // The index by host gives what a search through all policies would.
    #[test]
    fn looking_a_policy_up_is_searching_for_the_most_specific_and_newest(
        installed in proptest::collection::vec((proptest::collection::vec((0u8..4, 30u8..=32), 1..3), any::<bool>()), 0..12),
        wanted in 0u8..4,
    ) {
        let plane = plane();
        let mut expected: Option<(u8, u32)> = None;
        for (n, (networks, removed)) in installed.into_iter().enumerate() {
            let spi = 300 + u16::try_from(n).unwrap();
            let covers = |bits| net(&format!("10.2.0.{wanted}/{bits}"));
            let covering = networks.iter().filter(|(host, bits)| covers(*bits) == net(&format!("10.2.0.{host}/{bits}")));
            let best = covering.map(|(_, bits)| *bits).max();
            let networks: Vec<String> = networks.iter().map(|(host, bits)| format!("10.2.0.{host}/{bits}")).collect();
            let networks: Vec<&str> = networks.iter().map(String::as_str).collect();
            plane.install(half(spi, 1, 1, &networks)).unwrap();
            if removed {
                plane.delete(u32::from(spi) + 1000).unwrap();
            } else if let Some(bits) = best {
                expected = expected.max(Some((bits, u32::from(spi))));
            }
        }
        prop_assert_eq!(spi_for(&plane, &format!("10.2.0.{wanted}")), expected.map(|(_, spi)| spi));
    }
}

// ---- helpers

const LEFT_SPI: u32 = 0x1000_0001;
const RIGHT_SPI: u32 = 0x2000_0001;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Bare,
    Udp,
    Stream,
}

impl Kind {
    fn outer(self, local: &str, remote: &str) -> Encapsulation {
        let (local, remote) = (SocketAddr::new(ip(local), 4500), SocketAddr::new(ip(remote), 4500));
        match self {
            Self::Bare => Encapsulation::None { local: local.ip(), remote: remote.ip() },
            Self::Udp => Encapsulation::Udp { local, remote },
            Self::Stream => Encapsulation::Stream { stream: StreamId(1), local, remote },
        }
    }
}

#[derive(Clone, Debug)]
struct Setup {
    suite: (Encr, u16, Integ),
    esn: bool,
    mode: Mode,
    kind: Kind,
    left_ts: Vec<TrafficSelector>,
    right_ts: Vec<TrafficSelector>,
    lifetime: Lifetime,
    replay_window: u32,
    copy_df: bool,
    copy_ecn: bool,
    tfc: TfcPadding,
    spi_offset: u32,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            suite: GCM,
            esn: false,
            mode: Mode::Tunnel,
            kind: Kind::Bare,
            left_ts: vec![net("10.1.0.0/16"), TrafficSelector::host(ip(LEFT))],
            right_ts: vec![net("10.2.0.0/16"), TrafficSelector::host(ip(RIGHT))],
            lifetime: Lifetime::default(),
            replay_window: 64,
            copy_df: false,
            copy_ecn: false,
            tfc: TfcPadding::None,
            spi_offset: 0,
        }
    }
}

/// Two planes with an SA pair between them.
struct Pair {
    left: DataPath,
    right: DataPath,
    setup: Setup,
    now: Instant,
}

impl Pair {
    fn new(setup: &Setup) -> Self {
        Self::with(plane(), plane(), setup)
    }

    fn with(left: DataPath, right: DataPath, setup: &Setup) -> Self {
        let (left_pair, right_pair) = sa_pairs(setup);
        left.install(left_pair).unwrap();
        right.install(right_pair).unwrap();
        Self { left, right, setup: setup.clone(), now: Instant::now() }
    }

    fn left_to_right(&self, packet: &[u8]) -> Result<Vec<u8>, DropReason> {
        let mut sealed = seal(&self.left, self.now, packet)?;
        self.open_right(&mut sealed)
    }

    fn right_to_left(&self, packet: &[u8]) -> Result<Vec<u8>, DropReason> {
        let mut sealed = seal(&self.right, self.now, packet)?;
        open(&self.left, self.now, self.setup.kind.outer(LEFT, RIGHT), &mut sealed)
    }

    fn seal_left(&self, packet: &[u8]) -> Vec<u8> {
        seal(&self.left, self.now, packet).unwrap()
    }

    fn open_right(&self, sealed: &mut [u8]) -> Result<Vec<u8>, DropReason> {
        open(&self.right, self.now, self.setup.kind.outer(RIGHT, LEFT), sealed)
    }

    /// What the left peer can send if it does not keep to its own policies.
    fn forge_left(&self, next_header: u8, payload: &[u8]) -> Vec<u8> {
        let sa = self.sa_of_left();
        let sequence = sa.next_sequence().unwrap();
        let mut out = Vec::new();
        let payload = esp::Payload { next_header, octets: payload, tfc: 0 };
        esp::seal(&sa.outbound, sa.spi_out, sequence, sa.esn, payload, &mut out).unwrap();
        out
    }

    fn sa_of_left(&self) -> Arc<Sa> {
        Arc::clone(&self.left.tables.load().by_spi[&LEFT_SPI].sa)
    }

    fn sa_of_right(&self) -> Arc<Sa> {
        Arc::clone(&self.right.tables.load().by_spi[&RIGHT_SPI].sa)
    }
}

fn seal(plane: &DataPath, now: Instant, packet: &[u8]) -> Result<Vec<u8>, DropReason> {
    let mut out = Vec::new();
    match plane.outbound(now, packet, &mut out) {
        Outbound::Send { .. } => Ok(out),
        Outbound::Drop(reason) => Err(reason),
        other => panic!("{other:?}"),
    }
}

fn open(plane: &DataPath, now: Instant, from: Encapsulation, sealed: &mut [u8]) -> Result<Vec<u8>, DropReason> {
    let mut out = Vec::new();
    match plane.inbound(now, from, 0, sealed, &mut out) {
        Inbound::Deliver { event } => {
            assert_eq!(event, None);
            Ok(out)
        }
        Inbound::Drop(reason) => {
            assert!(out.is_empty());
            Err(reason)
        }
    }
}

fn plane() -> DataPath {
    DataPath::new(Arc::new(NoLatches))
}

fn keys((encr, bits, integ): (Encr, u16, Integ), fill: u8) -> EspKeys {
    let lengths = Protection::key_lengths(encr, bits, integ).unwrap();
    EspKeys { encr: Secret::new(vec![fill; lengths.encr]), integ: Secret::new(vec![fill; lengths.integ]) }
}

fn sa_pairs(setup: &Setup) -> (SaPair, SaPair) {
    let (encr, key_bits, integ) = setup.suite;
    let pair = |spis: (u32, u32), fills: (u8, u8), outer: (&str, &str), ts: (&[_], &[_])| SaPair {
        spi_in: spis.0 + setup.spi_offset,
        spi_out: spis.1 + setup.spi_offset,
        reqid: 1,
        class: ClassId(7),
        mode: setup.mode,
        suite: EspSuite { encr, key_bits, integ, esn: setup.esn },
        keys_in: keys(setup.suite, fills.0),
        keys_out: keys(setup.suite, fills.1),
        encapsulation: setup.kind.outer(outer.0, outer.1),
        local_ts: ts.0.to_vec(),
        remote_ts: ts.1.to_vec(),
        replay_window: setup.replay_window,
        lifetime: setup.lifetime,
        copy_df: setup.copy_df,
        copy_ecn: setup.copy_ecn,
        await_peer: false,
        tfc: setup.tfc,
        options: crate::plane::KernelOptions::default(),
    };
    (
        pair((LEFT_SPI, RIGHT_SPI), (1, 2), (LEFT, RIGHT), (&setup.left_ts, &setup.right_ts)),
        pair((RIGHT_SPI, LEFT_SPI), (2, 1), (RIGHT, LEFT), (&setup.right_ts, &setup.left_ts)),
    )
}

/// One end of a pair that sends with `spi` (plus 256 below that) and receives with `spi` + 1000.
fn half(spi: u16, reqid: u32, class: u32, remote: &[&str]) -> SaPair {
    let (mut pair, _) = sa_pairs(&Setup::default());
    pair.spi_in = u32::from(spi) + 1000;
    pair.spi_out = u32::from(spi) + if spi < 256 { 256 } else { 0 };
    pair.reqid = reqid;
    pair.class = ClassId(class);
    pair.remote_ts = remote.iter().map(|network| net(network)).collect();
    pair
}

/// Which SPI (as given to `half`) a packet to this address goes out with.
fn spi_for(plane: &DataPath, destination: &str) -> Option<u32> {
    let packet = udp("10.1.0.5", 9, destination, 53, b"x");
    let sealed = seal(plane, Instant::now(), &packet).ok()?;
    let spi = esp::Header::read(&sealed).unwrap().spi;
    Some(if spi < 300 { spi - 256 } else { spi })
}

fn trap(reqid: u32, remote: &str) -> Trap {
    Trap { reqid, local_ts: vec![net("10.1.0.0/16")], remote_ts: vec![net(remote)], options: Default::default() }
}

/// What becomes of a packet to this address.
fn outcome(plane: &DataPath, now: Instant, destination: &str) -> Outbound {
    plane.outbound(now, &udp("10.1.0.5", 9, destination, 53, b"x"), &mut Vec::new())
}

fn count(plane: &DataPath, reason: DropReason) -> u64 {
    plane.drops().into_iter().find(|(one, _)| *one == reason).unwrap().1
}

fn request(payload: &[u8]) -> Vec<u8> {
    udp("10.1.0.5", 9, "10.2.0.6", 53, payload)
}

fn answer(payload: &[u8]) -> Vec<u8> {
    udp("10.2.0.6", 53, "10.1.0.5", 9, payload)
}

fn net(text: &str) -> TrafficSelector {
    let (address, prefix) = text.split_once('/').unwrap();
    TrafficSelector::network(ip(address), prefix.parse().unwrap()).unwrap()
}
