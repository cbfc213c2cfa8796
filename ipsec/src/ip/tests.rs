use proptest::prelude::*;

use super::*;
use crate::crypto::tests::hex;

#[test]
fn lengths_that_lie_are_refused() {
    let good = udp("10.0.0.1", 1000, "10.0.0.2", 53, b"hello");
    assert!(Packet::parse(&good).is_some());
    assert!(Packet::parse(&good[..good.len() - 1]).is_none(), "shorter than the header says");
    assert!(Packet::parse(&[]).is_none());
    assert!(Packet::parse(&[0x45]).is_none());
    for (at, octet, why) in [(0, 0x44, "IHL below 5"), (0, 0x55, "version 5"), (3, 19, "total below header")] {
        let mut bad = good.clone();
        bad[at] = octet;
        assert!(Packet::parse(&bad).is_none(), "{why}");
    }
    let mut options_past_end = good.clone();
    options_past_end[0] = 0x4f;
    assert!(Packet::parse(&options_past_end).is_none());
}

#[test]
fn octets_after_the_end_are_cut_off() {
    let mut packet = udp("10.0.0.1", 1000, "10.0.0.2", 53, b"hello");
    let length = packet.len();
    packet.extend_from_slice(&[0; 30]);
    assert_eq!(Packet::parse(&packet).unwrap().bytes().len(), length);
}

// RFC 3128 §2, RFC 7112 §5
#[test]
fn first_fragments_without_the_whole_port_fields_are_refused() {
    let mut packet = Vec::new();
    rebuild(ip("10.0.0.1"), ip("10.0.0.2"), protocol::TCP, 0, &[0, 80, 0], &mut packet).unwrap();
    assert!(Packet::parse(&packet).is_none());
    packet[6] = 0x20;
    assert!(Packet::parse(&packet).is_none());
}

#[test]
fn flows_are_seen_from_both_sides() {
    let packet = udp("10.0.0.1", 1000, "10.0.0.2", 53, b"x");
    let view = Packet::parse(&packet).unwrap();
    assert_eq!(
        view.outbound_flow(),
        Flow { protocol: 17, local: ip("10.0.0.1"), local_port: 1000, remote: ip("10.0.0.2"), remote_port: 53 }
    );
    assert_eq!(
        view.inbound_flow(),
        Flow { protocol: 17, local: ip("10.0.0.2"), local_port: 53, remote: ip("10.0.0.1"), remote_port: 1000 }
    );
}

// RFC 4301 §4.4.1.1
#[test]
fn icmp_type_and_code_stand_for_ports() {
    let mut packet = Vec::new();
    rebuild(ip("fd00::1"), ip("fd00::2"), protocol::ICMPV6, 0, &[128, 1, 0, 0], &mut packet).unwrap();
    let flow = Packet::parse(&packet).unwrap().outbound_flow();
    assert_eq!((flow.local_port, flow.remote_port), (0x8001, 0x8001));
}

// RFC 4301 §7
#[test]
fn later_fragments_show_no_ports() {
    let mut packet = udp("10.0.0.1", 1000, "10.0.0.2", 53, b"hello");
    packet[7] = 3;
    let view = Packet::parse(&packet).unwrap();
    assert_eq!((view.fragment(), view.shows_ports(), view.outbound_flow().local_port), (Fragment::Later, false, 0));
    packet[6..8].copy_from_slice(&[0x20, 0]);
    let view = Packet::parse(&packet).unwrap();
    assert_eq!((view.fragment(), view.shows_ports(), view.outbound_flow().local_port), (Fragment::First, true, 1000));
}

#[test]
fn ipv6_extension_headers_are_walked_to_the_upper_layer() {
    let mut payload = vec![protocol::DESTINATION_OPTIONS, 0, 0, 0, 0, 0, 0, 0]; // hop-by-hop
    payload.extend_from_slice(&[protocol::FRAGMENT, 1]);
    payload.extend_from_slice(&[0; 14]); // destination options of 16 octets
    let fragment_at = IPV6_HEADER_LEN + payload.len();
    payload.extend_from_slice(&[protocol::TCP, 0, 0, 1, 0, 0, 0, 9]);
    payload.extend_from_slice(&[0x1f, 0x90, 0, 80, 0, 0, 0, 0]);
    let mut packet = Vec::new();
    rebuild(ip("fd00::1"), ip("fd00::2"), protocol::HOP_BY_HOP, 0xb8, &payload, &mut packet).unwrap();
    let view = Packet::parse(&packet).unwrap();
    assert_eq!((view.protocol(), view.fragment(), view.tos()), (protocol::TCP, Fragment::First, 0xb8));
    assert_eq!((view.outbound_flow().local_port, view.outbound_flow().remote_port), (8080, 80));
    assert_eq!(view.transport_payload(), (protocol::HOP_BY_HOP, payload.as_slice()));

    packet[fragment_at + 3] = 8;
    let view = Packet::parse(&packet).unwrap();
    assert_eq!((view.protocol(), view.fragment(), view.shows_ports()), (protocol::TCP, Fragment::Later, false));
}

#[test]
fn endless_or_doubled_ipv6_headers_are_refused() {
    let mut packet = Vec::new();
    for (count, accepted) in [(MAX_EXTENSION_HEADERS, true), (MAX_EXTENSION_HEADERS + 1, false)] {
        let mut options = [protocol::DESTINATION_OPTIONS, 0, 0, 0, 0, 0, 0, 0].repeat(count);
        options[(count - 1) * 8] = protocol::ESP;
        rebuild(ip("fd00::1"), ip("fd00::2"), protocol::DESTINATION_OPTIONS, 0, &options, &mut packet).unwrap();
        assert_eq!(Packet::parse(&packet).is_some(), accepted);
    }

    let mut fragments = [protocol::FRAGMENT, 0, 0, 1, 0, 0, 0, 1].repeat(2);
    fragments.extend_from_slice(&[protocol::TCP, 0, 0, 0, 0, 0, 0, 1, 0, 80, 0, 80]);
    rebuild(ip("fd00::1"), ip("fd00::2"), protocol::FRAGMENT, 0, &fragments, &mut packet).unwrap();
    assert!(Packet::parse(&packet).is_none());
}

// RFC 6040 §4.2, figure 4 (normal and compatibility decapsulation)
#[test]
fn ecn_is_decapsulated_by_the_table() {
    const NOT: u8 = 0;
    const ECT1: u8 = 1;
    const ECT0: u8 = 2;
    const CE: u8 = 3;
    for (inner, row) in [
        (NOT, [Some(NOT), Some(NOT), Some(NOT), None]),
        (ECT0, [Some(ECT0), Some(ECT0), Some(ECT1), Some(CE)]),
        (ECT1, [Some(ECT1), Some(ECT1), Some(ECT1), Some(CE)]),
        (CE, [Some(CE), Some(CE), Some(CE), Some(CE)]),
    ] {
        for (outer, expected) in [NOT, ECT0, ECT1, CE].into_iter().zip(row) {
            let dscp = 0xb8;
            assert_eq!(ecn::decapsulate(dscp | inner, outer), expected.map(|ecn| dscp | ecn), "{inner} {outer}");
        }
    }
    assert_eq!((ecn::encapsulate(0xbb, true), ecn::encapsulate(0xbb, false)), (0xbb, 0xb8));
}

#[test]
fn setting_tos_keeps_a_right_checksum_right_and_a_wrong_one_wrong() {
    let mut packet = udp("10.0.0.1", 1, "10.0.0.2", 2, b"");
    for tos in 0..=255 {
        set_tos(&mut packet, tos);
        assert_eq!(Packet::parse(&packet).unwrap().tos(), tos);
        assert_eq!(checksum(&[&packet[..20]]), 0);
    }
    packet[10] ^= 0x40;
    set_tos(&mut packet, 3);
    assert_ne!(checksum(&[&packet[..20]]), 0);

    let mut packet = udp("fd00::1", 1, "fd00::2", 2, b"");
    set_tos(&mut packet, 0xa7);
    assert_eq!((packet[0], packet[1] & 0xf0, Packet::parse(&packet).unwrap().tos()), (0x6a, 0x70, 0xa7));
}

// RFC 1191 §4
#[test]
fn fragmentation_needed_names_the_mtu_and_quotes_the_packet() {
    let packet = udp("10.0.0.1", 1000, "10.0.0.2", 53, &[7; 1400]);
    let mut out = Vec::new();
    assert!(Packet::parse(&packet).unwrap().too_big(1234, &mut out));
    let reply = Packet::parse(&out).unwrap();
    assert_eq!((reply.source(), reply.destination()), (ip("10.0.0.2"), ip("10.0.0.1")));
    assert_eq!(out.len(), 576);
    assert_eq!(out[20..22], [3, 4]);
    assert_eq!(out[26..28], 1234u16.to_be_bytes());
    assert_eq!(out[28..], packet[..548]);
    assert_eq!((checksum(&[&out[..20]]), checksum(&[&out[20..]])), (0, 0));
}

// RFC 4443 §3.2
#[test]
fn packet_too_big_names_the_mtu_and_quotes_the_packet() {
    let packet = udp("fd00::1", 1000, "fd00::2", 53, &[7; 1400]);
    let mut out = Vec::new();
    assert!(Packet::parse(&packet).unwrap().too_big(1334, &mut out));
    assert_eq!(out.len(), 1280);
    assert_eq!(out[40..42], [2, 0]);
    assert_eq!(out[44..48], 1334u32.to_be_bytes());
    assert_eq!(out[48..], packet[..1232]);
    assert_eq!(upper_layer_checksum(&out, 40, protocol::ICMPV6), 0);
}

// RFC 1122 §3.2.2, RFC 4443 §2.4
#[test]
fn errors_fragments_and_multicasts_get_no_error() {
    let mut out = Vec::new();
    let mut error = Vec::new();
    rebuild(ip("10.0.0.1"), ip("10.0.0.2"), protocol::ICMP, 0, &[3, 4, 0, 0, 0, 0, 0, 0], &mut error).unwrap();
    assert!(!Packet::parse(&error).unwrap().too_big(1000, &mut out));
    rebuild(ip("fd00::1"), ip("fd00::2"), protocol::ICMPV6, 0, &[2, 0, 0, 0], &mut error).unwrap();
    assert!(!Packet::parse(&error).unwrap().too_big(1300, &mut out));
    for (from, to) in [("10.0.0.1", "224.0.0.5"), ("0.0.0.0", "10.0.0.1"), ("fd00::1", "ff02::1")] {
        let packet = udp(from, 1, to, 2, b"");
        assert!(!Packet::parse(&packet).unwrap().too_big(1300, &mut out), "{from} {to}");
    }
    let mut later = udp("10.0.0.1", 1, "10.0.0.2", 2, b"");
    later[7] = 1;
    assert!(!Packet::parse(&later).unwrap().too_big(1000, &mut out));
    assert!(out.is_empty());
}

#[test]
fn upper_layer_checksums_are_computed_for_the_present_addresses() {
    for (a, b) in [("192.0.2.1", "192.0.2.2"), ("fd00::1", "fd00::2")] {
        let mut packet = udp(a, 1, b, 2, b"odd");
        let start = packet.len() - 11;
        assert_eq!(upper_layer_checksum(&packet, start, protocol::UDP), 0);
        packet[start + 6] ^= 0x55;
        fix_upper_layer_checksum(&mut packet);
        assert_eq!(upper_layer_checksum(&packet, start, protocol::UDP), 0);
        packet[start + 6..start + 8].fill(0);
        fix_upper_layer_checksum(&mut packet);
        assert_eq!(packet[start + 6..start + 8], [0, 0], "none stays none");
    }
    let mut tcp = Vec::new();
    rebuild(ip("192.0.2.1"), ip("192.0.2.2"), protocol::TCP, 0, &[9; 23], &mut tcp).unwrap();
    fix_upper_layer_checksum(&mut tcp);
    assert_eq!(upper_layer_checksum(&tcp, 20, protocol::TCP), 0);
}

// RFC 768: 0 says that there is no checksum, so a sum of 0 is sent as all ones
#[test]
fn a_udp_checksum_never_becomes_none() {
    let mut packet = udp("192.0.2.1", 1, "192.0.2.2", 2, &[0, 0]);
    for word in 0..=u16::MAX {
        put(&mut packet, 28, word);
        put(&mut packet, 26, 1);
        fix_upper_layer_checksum(&mut packet);
        assert_ne!(packet[26..28], [0, 0]);
    }
}

// RFC 1071 §3
#[test]
fn rfc1071_section_3_example() {
    assert_eq!(!checksum(&[&hex("0001f203f4f5f6f7")]), 0xddf2);
}

proptest! {
    #[test]
    fn parsing_never_panics_and_views_stay_inside(mut bytes in proptest::collection::vec(any::<u8>(), 0..200), v6: bool, plausible: bool) {
        if plausible && bytes.len() >= 40 {
            bytes[0] = if v6 { 0x60 } else { 0x45 };
            let length = u16::try_from(bytes.len()).unwrap();
            if v6 { put(&mut bytes, 4, length - 40) } else { put(&mut bytes, 2, length) }
        }
        if let Some(view) = Packet::parse(&bytes) {
            prop_assert!(view.bytes().len() <= bytes.len());
            let mut out = Vec::new();
            if view.too_big(1300, &mut out) {
                let reply = Packet::parse(&out).unwrap();
                prop_assert_eq!(reply.destination(), view.source());
                prop_assert!(!reply.too_big(1300, &mut Vec::new()));
            }
            let _ = (view.inbound_flow(), view.outbound_flow(), view.transport_payload());
        }
        let mut copy = bytes.clone();
        set_tos(&mut copy, 0xff);
        fix_upper_layer_checksum(&mut copy);
        prop_assert_eq!(copy.len(), bytes.len());
    }
}

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(crate) fn udp(from: &str, from_port: u16, to: &str, to_port: u16, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len() + 8).unwrap();
    let mut datagram = Vec::new();
    for word in [from_port, to_port, length, 1] {
        datagram.extend_from_slice(&word.to_be_bytes());
    }
    datagram.extend_from_slice(payload);
    let mut packet = Vec::new();
    rebuild(ip(from), ip(to), protocol::UDP, 0, &datagram, &mut packet).unwrap();
    fix_upper_layer_checksum(&mut packet);
    packet
}
