use std::net::IpAddr;

use ipsec::selector::TrafficSelector;
use ipsec::transform::{Ke, Proposal, Protocol, Transform, TransformType};
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::fuzzing;

fn message(payloads: Vec<Payload>) -> Message {
    Message { header: Header { exchange: ExchangeType::IKE_SA_INIT, ..header() }, payloads }
}

fn plain(datagram: &[u8]) -> Result<Message, WireError> {
    parse(datagram).map(|incoming| match incoming {
        Incoming::Plain(message) => message,
        Incoming::Protected(protected) => panic!("{protected:?}"),
    })
}

/// One payload of `kind` with a raw body, in a message.
fn raw(kind: u8, body: &[u8]) -> Vec<u8> {
    encode(&message(vec![Payload::Unknown { kind, critical: false, data: body.to_vec() }]))
}

/// Makes the header's length that of the datagram.
fn with_length(mut datagram: Vec<u8>) -> Vec<u8> {
    let length = u32::try_from(datagram.len()).unwrap();
    datagram[24..28].copy_from_slice(&length.to_be_bytes());
    datagram
}

fn selector(start: &str, end: &str) -> WireSelector {
    let (start, end): (IpAddr, IpAddr) = (start.parse().unwrap(), end.parse().unwrap());
    WireSelector::Address(TrafficSelector { protocol: 6, start_port: 80, end_port: 443, start, end })
}

fn every_payload() -> Vec<Payload> {
    let transforms = vec![
        Transform::with_key_bits(TransformType::ENCR, 12, 256),
        Transform::new(TransformType::PRF, 5),
        Transform::new(TransformType::INTEG, 12),
        Transform::new(TransformType(77), 4000),
    ];
    let id = Identification { kind: 2, data: b"peer.example".to_vec() };
    vec![
        Payload::Sa(vec![
            Proposal { number: 1, protocol: Protocol::ESP, spi: vec![1, 2, 3, 4], transforms: transforms.clone() },
            Proposal { number: 2, protocol: Protocol::IKE, spi: vec![9; 8], transforms },
            Proposal { number: 3, protocol: Protocol::IKE, spi: Vec::new(), transforms: Vec::new() },
        ]),
        Payload::Ke { group: Ke::X25519, data: vec![1; 32] },
        Payload::IdInitiator(id.clone()),
        Payload::IdResponder(id),
        Payload::Cert { encoding: 4, data: vec![0x30, 0x82] },
        Payload::CertReq { encoding: 4, authorities: vec![5; 40] },
        Payload::Auth { method: 14, data: vec![6; 64] },
        Payload::Nonce(vec![7; 32]),
        Payload::Notify(Notify {
            protocol: Protocol::ESP,
            spi: vec![1, 2, 3, 4],
            kind: NotifyType::REKEY_SA,
            data: Vec::new(),
        }),
        Payload::Notify(Notify {
            protocol: Protocol::NONE,
            spi: Vec::new(),
            kind: NotifyType(60_000),
            data: vec![1; 20],
        }),
        Payload::Delete { protocol: Protocol::ESP, spis: vec![1, u32::MAX] },
        Payload::Delete { protocol: Protocol::IKE, spis: Vec::new() },
        Payload::Vendor(b"vendor".to_vec()),
        Payload::TsInitiator(vec![
            selector("10.0.0.0", "10.0.0.255"),
            WireSelector::Unknown { kind: 10, data: vec![1, 2, 3] },
        ]),
        Payload::TsResponder(vec![selector("2001:db8::", "2001:db8::ffff")]),
        Payload::Configuration(Configuration {
            kind: CfgType::REPLY,
            attributes: super::configuration::every_attribute(),
        }),
        Payload::Eap(vec![1, 1, 0, 5, 1]),
        Payload::PuzzleSolution(vec![1; 16]),
        Payload::Unknown { kind: 200, critical: true, data: vec![1] },
        Payload::Unknown { kind: 49, critical: false, data: Vec::new() },
    ]
}

#[test]
fn a_message_that_ends_early_is_refused() {
    let datagram = encode(&message(every_payload()));
    for length in 0..datagram.len() {
        assert!(parse(&datagram[..length]).is_err());
        // Also when the header's length agrees with what is there.
        if length >= HEADER {
            assert!(plain(&with_length(datagram[..length].to_vec())).is_err(), "{length}");
        }
    }
    assert!(plain(&datagram).is_ok());
}

// RFC 7296 §3.1
#[test]
fn the_length_of_the_header_is_the_datagrams() {
    let datagram = encode(&message(every_payload()));
    let right = u32::try_from(datagram.len()).unwrap();
    for length in [0, 1, 27, 28, right - 1, right + 1, 0xffff, 0x1_0000, u32::MAX] {
        let mut wrong = datagram.clone();
        wrong[24..28].copy_from_slice(&length.to_be_bytes());
        assert!(matches!(parse(&wrong), Err(WireError::Length { .. })), "{length}");
    }
    let mut longer = datagram.clone();
    longer.push(0);
    assert!(parse(&longer).is_err());
    assert!(parse(&with_length(longer)).is_err());
    let huge = with_length([&datagram[..], &vec![0; 70_000]].concat());
    assert!(matches!(parse(&huge), Err(WireError::Length { .. })));
}

// RFC 7296 §2.5
#[test]
fn other_major_versions_are_told_apart() {
    let mut datagram = encode(&message(Vec::new()));
    for (version, expected) in [(0x30, Some(3)), (0xf1, Some(15)), (0x10, None), (0x00, None)] {
        datagram[17] = version;
        match (parse(&datagram), expected) {
            (Err(WireError::MajorVersion(major)), Some(expected)) => assert_eq!(major, expected),
            (Err(WireError::Malformed { .. }), None) => {}
            other => panic!("{other:?}"),
        }
    }
    // A higher minor version is no error, nor are flags that we do not know.
    datagram[17] = 0x2f;
    datagram[19] = 0xd7;
    let message = plain(&datagram).unwrap();
    assert_eq!((message.header.minor, message.header.from_initiator, message.header.response), (15, false, false));
}

#[test]
fn every_length_field_is_checked() {
    for payload in every_payload() {
        let datagram = encode(&message(vec![payload.clone()]));
        for at in HEADER..datagram.len() - 1 {
            let right = u16::from_be_bytes([datagram[at], datagram[at + 1]]);
            for length in [0, 1, 3, right.wrapping_sub(1), right.wrapping_add(1), 0xffff] {
                let mut wrong = datagram.clone();
                wrong[at..at + 2].copy_from_slice(&length.to_be_bytes());
                fuzzing::message(&wrong);
                // The payload's own length, always at the same place (§3.2).
                if at == HEADER + 2 {
                    assert!(plain(&wrong).is_err(), "{payload:?} {length}");
                }
            }
        }
    }
}

// RFC 7296 §3.3.1, §3.3.2
#[test]
fn lengths_and_counts_in_a_security_association_are_exact() {
    let transforms =
        vec![Transform::with_key_bits(TransformType::ENCR, 20, 128), Transform::new(TransformType::PRF, 5)];
    let proposal = Proposal { number: 1, protocol: Protocol::ESP, spi: vec![1, 2, 3, 4], transforms };
    let datagram = encode(&message(vec![Payload::Sa(vec![proposal])]));
    let body = HEADER + GENERIC_HEADER;
    // (offset of the field, its size): proposal length, SPI size, transform count, both transforms' lengths.
    for (at, size) in [(body + 2, 2), (body + 6, 1), (body + 7, 1), (body + 14, 2), (body + 26, 2)] {
        for value in (0..=300_u16).chain([0xfffe, 0xffff]) {
            let octets = value.to_be_bytes();
            let mut changed = datagram.clone();
            if size == 2 {
                changed[at..at + 2].copy_from_slice(&octets);
            } else if octets[0] == 0 {
                changed[at] = octets[1];
            }
            if changed != datagram {
                assert!(plain(&changed).is_err(), "{value} at {at}");
            }
        }
    }
    assert!(plain(&raw(33, &[])).is_err());
    // Last Substruc is not believed, and not needed.
    for at in [body, body + 12, body + 24] {
        let mut changed = datagram.clone();
        changed[at] = 0x55;
        assert_eq!(plain(&changed), plain(&datagram));
    }
}

// RFC 7296 §3.3.1
#[test]
fn proposal_numbers_count_up() {
    let proposals = |numbers: &[u8]| {
        let proposal = |number: &u8| Proposal {
            number: *number,
            protocol: Protocol::IKE,
            spi: Vec::new(),
            transforms: Vec::new(),
        };
        plain(&encode(&message(vec![Payload::Sa(numbers.iter().map(proposal).collect())])))
    };
    for refused in [&[0][..], &[0, 1], &[1, 1], &[1, 3], &[2, 1], &[255, 0]] {
        assert!(matches!(proposals(refused), Err(WireError::Malformed { .. })), "{refused:?}");
    }
    for accepted in [&[1][..], &[7], &[1, 2, 3], &[254, 255]] {
        assert!(proposals(accepted).is_ok());
    }
}

// RFC 7296 §3.3.5, §3.3.6
#[test]
fn unknown_attributes_mark_their_transform() {
    let transform = |attributes: &[u8]| {
        let length = u8::try_from(8 + attributes.len()).unwrap();
        let body = [&[0, 0, 0, 8 + length, 1, 1, 0, 1, 0, 0, 0, length, 1, 0, 0, 12][..], attributes].concat();
        plain(&raw(33, &body)).map(|message| match &message.payloads[..] {
            [Payload::Sa(proposals)] => {
                (proposals[0].transforms[0].key_bits, proposals[0].transforms[0].unknown_attribute)
            }
            other => panic!("{other:?}"),
        })
    };
    assert_eq!(transform(&[]), Ok((None, false)));
    assert_eq!(transform(&[0x80, 14, 1, 0]), Ok((Some(256), false)));
    assert_eq!(transform(&[0x80, 15, 1, 0]), Ok((None, true)));
    assert_eq!(transform(&[0x80, 14, 1, 0, 0x80, 15, 0, 0]), Ok((Some(256), true)));
    assert_eq!(transform(&[0x80, 14, 1, 0, 0x80, 14, 0, 128]), Ok((Some(256), true)));
    // Key Length in the long form, which it never has.
    assert_eq!(transform(&[0, 14, 0, 2, 1, 0]), Ok((None, true)));
    assert_eq!(transform(&[0, 99, 0, 0]), Ok((None, true)));
    for truncated in [&[0x80][..], &[0x80, 14], &[0x80, 14, 1], &[0, 14, 0, 3, 1, 0], &[0, 14, 0xff, 0xff]] {
        assert!(transform(truncated).is_err(), "{truncated:?}");
    }
}

// RFC 7296 §3.9
#[test]
fn a_nonce_has_16_to_256_octets() {
    for (length, possible) in [(0, false), (15, false), (16, true), (256, true), (257, false)] {
        assert_eq!(plain(&raw(40, &vec![1; length])).is_ok(), possible, "{length}");
    }
}

// RFC 7296 §3.11
#[test]
fn a_delete_payload_has_the_spis_that_it_counts() {
    for (body, possible) in [
        (&[1, 0, 0, 0][..], true),
        (&[1, 0, 0, 1], true),
        (&[1, 8, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8], false),
        (&[1, 0, 0, 0, 1], false),
        (&[3, 4, 0, 0], true),
        (&[3, 4, 0, 1, 1, 2, 3, 4], true),
        (&[3, 4, 0, 1, 1, 2, 3], false),
        (&[3, 4, 0, 1, 1, 2, 3, 4, 5], false),
        (&[3, 4, 0, 2, 1, 2, 3, 4], false),
        (&[3, 4, 0xff, 0xff, 1, 2, 3, 4], false),
        (&[3, 0, 0, 1], false),
        (&[2, 8, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8], false),
    ] {
        assert_eq!(plain(&raw(42, body)).is_ok(), possible, "{body:?}");
    }
}

// RFC 7296 §3.10
#[test]
fn a_notify_payload_has_an_spi_of_its_protocols_size() {
    for (protocol, size, possible) in [
        (3, 0, true),
        (3, 4, true),
        (3, 8, false),
        (2, 1, false),
        (1, 0, true),
        (1, 8, true),
        (1, 4, false),
        (0, 0, true),
    ] {
        let body = [&[protocol, size, 0x40, 0][..], &vec![1; usize::from(size)]].concat();
        assert_eq!(plain(&raw(41, &body)).is_ok(), possible, "{protocol} {size}");
    }
    assert!(plain(&raw(41, &[3, 4, 0x40, 0, 1, 2, 3])).is_err());
}

// RFC 7296 §3.13
#[test]
fn malformed_traffic_selectors_are_refused() {
    let (low, high) = ([10, 0, 0, 1], [10, 0, 0, 9]);
    let v4 = |ports: [u8; 4], start: [u8; 4], end: [u8; 4]| [&[7, 0, 0, 16][..], &ports, &start, &end].concat();
    let count = |count: u8, selectors: &[u8]| [&[count, 0, 0, 0][..], selectors].concat();
    let any = [0, 0, 0xff, 0xff];
    for (body, possible) in [
        (count(1, &v4(any, low, high)), true),
        (count(1, &v4(any, low, low)), true),
        (count(1, &v4(any, high, low)), false),
        (count(1, &v4([0, 2, 0, 1], low, high)), false),
        // OPAQUE (§3.13.1)
        (count(1, &v4([0xff, 0xff, 0, 0], low, high)), true),
        (count(0, &[]), false),
        (count(0, &v4(any, low, high)), false),
        (count(2, &v4(any, low, high)), false),
        (count(1, &[v4(any, low, high), v4(any, low, high)].concat()), false),
        // The length of the other family.
        (count(1, &[&[8, 0, 0, 16][..], &any, &low, &high].concat()), false),
        (count(1, &[&[7, 0, 0, 40][..], &any, &[0; 32]].concat()), false),
        (count(1, &[200, 0, 0, 4]), true),
        (count(1, &[200, 0, 0, 3]), false),
        (vec![], false),
        (vec![1, 0, 0], false),
    ] {
        for kind in [44, 45] {
            assert_eq!(plain(&raw(kind, &body)).is_ok(), possible, "{body:?}");
        }
    }
}

#[test]
fn bodies_too_short_for_their_fields_are_refused() {
    for (kind, shortest) in [(34, 5), (35, 4), (36, 4), (37, 1), (38, 1), (39, 4), (41, 4), (42, 4), (44, 20), (45, 20)]
    {
        for length in 0..shortest {
            assert!(plain(&raw(kind, &vec![0; length])).is_err(), "{kind} {length}");
        }
    }
}

#[test]
fn too_many_payloads_are_refused() {
    let vendors = |count| plain(&encode(&message(vec![Payload::Vendor(Vec::new()); count])));
    assert!(vendors(MAX_PAYLOADS).is_ok());
    assert!(matches!(vendors(MAX_PAYLOADS + 1), Err(WireError::Malformed { .. })));
}

// Notifies, Deletes, certificates, Vendor IDs and all others: none without end.
#[test]
fn no_kind_of_payload_comes_without_end() {
    for payload in every_payload() {
        let many = |count| plain(&encode(&message(vec![payload.clone(); count])));
        assert!(many(MAX_PAYLOADS).is_ok(), "{payload:?}");
        assert!(matches!(many(MAX_PAYLOADS + 1), Err(WireError::Malformed { .. })), "{payload:?}");
    }
    let proposal = |number| Proposal { number, protocol: Protocol::IKE, spi: Vec::new(), transforms: Vec::new() };
    let proposals =
        |numbers: Vec<u8>| plain(&encode(&message(vec![Payload::Sa(numbers.into_iter().map(proposal).collect())])));
    assert!(proposals((1..=255).collect()).is_ok());
    assert!(proposals((1..=255).chain([0]).collect()).is_err());
    assert!(proposals((1..=255).chain([255]).collect()).is_err());
}

// RFC 7296 §3.14, RFC 7383 §2.5
#[test]
fn an_encrypted_payload_is_the_only_one() {
    for kind in [SK, SKF] {
        let encrypted = Payload::Unknown { kind, critical: false, data: vec![0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0] };
        assert!(matches!(parse(&encode(&message(vec![encrypted.clone()]))), Ok(Incoming::Protected(_))));
        let after = message(vec![Payload::Vendor(vec![1]), encrypted.clone()]);
        assert!(matches!(parse(&encode(&after)), Err(WireError::Malformed { .. })));
        let before = message(vec![encrypted, Payload::Vendor(vec![1])]);
        assert!(matches!(parse(&encode(&before)), Err(WireError::Length { .. })));
        assert!(matches!(parse_payloads(kind, &[0, 0, 0, 8, 0, 1, 0, 1]), Err(WireError::Malformed { .. })));
    }
}

// RFC 7296 §2.5
#[test]
fn the_critical_bit_counts_for_unknown_payloads_only() {
    let mut datagram = encode(&message(vec![Payload::Vendor(vec![1])]));
    datagram[HEADER + 1] = 0x80;
    assert_eq!(plain(&datagram).unwrap().payloads, [Payload::Vendor(vec![1])]);
    let unknown = |kind, critical| Payload::Unknown { kind, critical, data: Vec::new() };
    let payloads = [unknown(200, false), unknown(201, true), unknown(202, true)];
    assert_eq!(unknown_critical(&payloads), Some(201));
    assert_eq!(unknown_critical(&payloads[..1]), None);
    assert_eq!(unknown_critical(&plain(&datagram).unwrap().payloads), None);
}

#[test]
fn every_payload_survives_encoding() {
    let all = message(every_payload());
    assert_eq!(plain(&encode(&all)).unwrap(), all);
    for payload in every_payload() {
        let one = message(vec![payload]);
        assert_eq!(plain(&encode(&one)).unwrap(), one);
    }
    assert_eq!(plain(&encode(&message(Vec::new()))).unwrap(), message(Vec::new()));
}

#[test]
fn what_does_not_fit_is_not_encoded() {
    let transform = Transform::new(TransformType::ENCR, 1);
    let proposal = |spi: usize, transforms: usize| {
        Payload::Sa(vec![Proposal {
            number: 1,
            protocol: Protocol::ESP,
            spi: vec![1; spi],
            transforms: vec![transform; transforms],
        }])
    };
    for payload in [
        Payload::Vendor(vec![0; 65_532]),
        Payload::Vendor(vec![0; 65_531]),
        proposal(256, 1),
        proposal(4, 256),
        Payload::Delete { protocol: Protocol::IKE, spis: vec![1] },
        Payload::Delete { protocol: Protocol::ESP, spis: vec![1; 65_536] },
        Payload::TsInitiator(vec![selector("10.0.0.1", "10.0.0.2"); 256]),
        Payload::TsInitiator(vec![selector("10.0.0.1", "::1")]),
    ] {
        assert!(encode(&message(vec![payload])).is_empty());
    }
    assert!(!encode(&message(vec![Payload::Vendor(vec![0; 65_503])])).is_empty());
    assert!(!encode(&message(vec![proposal(255, 255)])).is_empty());
}

fn any_octets() -> impl Strategy<Value = Vec<u8>> {
    vec(any::<u8>(), 0..40)
}

fn any_transform() -> impl Strategy<Value = Transform> {
    (any::<u8>(), any::<u16>(), any::<Option<u16>>())
        .prop_map(|(kind, id, key_bits)| Transform { key_bits, ..Transform::new(TransformType(kind), id) })
}

fn any_proposals() -> impl Strategy<Value = Vec<Proposal>> {
    let proposal = (0_u8..4, vec(any::<u8>(), 0..9), vec(any_transform(), 0..5));
    (1_u8..200, vec(proposal, 1..5)).prop_map(|(first, proposals)| {
        let numbered = (first..).zip(proposals);
        numbered
            .map(|(number, (protocol, spi, transforms))| Proposal {
                number,
                protocol: Protocol(protocol),
                spi,
                transforms,
            })
            .collect()
    })
}

fn any_selector() -> impl Strategy<Value = WireSelector> {
    let address = (any::<u8>(), any::<[u16; 2]>(), any::<[IpAddr; 2]>()).prop_filter_map(
        "one family",
        |(protocol, mut ports, mut addresses)| {
            ports.sort_unstable();
            addresses.sort_unstable();
            let ([start_port, end_port], [start, end]) = (ports, addresses);
            (start.is_ipv4() == end.is_ipv4()).then_some(WireSelector::Address(TrafficSelector {
                protocol,
                start_port,
                end_port,
                start,
                end,
            }))
        },
    );
    let unknown = (9_u8.., any_octets()).prop_map(|(kind, data)| WireSelector::Unknown { kind, data });
    prop_oneof![4 => address, 1 => unknown]
}

fn any_payload() -> impl Strategy<Value = Payload> {
    let id = || (any::<u8>(), any_octets()).prop_map(|(kind, data)| Identification { kind, data });
    prop_oneof![
        any_proposals().prop_map(Payload::Sa),
        (any::<u16>(), vec(any::<u8>(), 1..40)).prop_map(|(group, data)| Payload::Ke { group: Ke(group), data }),
        id().prop_map(Payload::IdInitiator),
        id().prop_map(Payload::IdResponder),
        (any::<u8>(), any_octets()).prop_map(|(encoding, data)| Payload::Cert { encoding, data }),
        (any::<u8>(), any_octets()).prop_map(|(encoding, authorities)| Payload::CertReq { encoding, authorities }),
        (any::<u8>(), any_octets()).prop_map(|(method, data)| Payload::Auth { method, data }),
        vec(any::<u8>(), 16..=256).prop_map(Payload::Nonce),
        (prop_oneof![Just((0, 0)), Just((1, 0)), Just((1, 8)), Just((3, 4)), Just((2, 0))], any::<u16>(), any_octets())
            .prop_map(|((protocol, spi), kind, data)| Payload::Notify(Notify {
                protocol: Protocol(protocol),
                spi: vec![1; spi],
                kind: NotifyType(kind),
                data,
            })),
        vec(any::<u32>(), 0..5).prop_map(|spis| Payload::Delete { protocol: Protocol::ESP, spis }),
        any_octets().prop_map(Payload::Vendor),
        vec(any_selector(), 1..5).prop_map(Payload::TsInitiator),
        vec(any_selector(), 1..5).prop_map(Payload::TsResponder),
        (any::<u8>(), vec(any_attribute(), 0..6))
            .prop_map(|(kind, attributes)| Payload::Configuration(Configuration { kind: CfgType(kind), attributes })),
        any_octets().prop_map(Payload::Eap),
        vec(any::<u8>(), 1..300).prop_map(Payload::PuzzleSolution),
        (55_u8.., any::<bool>(), any_octets()).prop_map(|(kind, critical, data)| Payload::Unknown {
            kind,
            critical,
            data
        }),
    ]
}

fn any_header() -> impl Strategy<Value = Header> {
    (any::<[u64; 2]>(), 0_u8..16, any::<u8>(), any::<[bool; 2]>(), any::<u32>()).prop_map(
        |([initiator_spi, responder_spi], minor, exchange, [from_initiator, response], message_id)| Header {
            initiator_spi,
            responder_spi,
            major: 2,
            minor,
            exchange: ExchangeType(exchange),
            from_initiator,
            response,
            message_id,
        },
    )
}

proptest! {
    #[test]
    fn any_octets_are_read_without_panic(octets in vec(any::<u8>(), 0..300)) {
        fuzzing::message(&octets);
        fuzzing::payloads(&octets);
        fuzzing::proposal_notation(&octets);
    }

    #[test]
    fn any_chain_behind_a_good_header_is_read_without_panic(first in 30_u8..56, chain in vec(any::<u8>(), 0..300)) {
        let mut datagram = encode(&message(Vec::new()));
        datagram[16] = first;
        datagram.extend_from_slice(&chain);
        fuzzing::message(&with_length(datagram));
    }

    #[test]
    fn any_message_survives_encoding(header in any_header(), payloads in vec(any_payload(), 0..8)) {
        let message = Message { header, payloads };
        prop_assert_eq!(plain(&encode(&message)).unwrap(), message);
    }

    #[test]
    fn damaged_messages_are_read_without_panic(
        payloads in vec(any_payload(), 1..5),
        damage in vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut datagram = encode(&message(payloads));
        for (index, octet) in damage {
            let at = index.index(datagram.len());
            datagram[at] = octet;
        }
        fuzzing::message(&datagram);
    }

    #[test]
    fn any_message_survives_protection(
        header in any_header(),
        payloads in vec(any_payload(), 0..8),
        suite in 0..SUITES.len(),
        max_length in proptest::option::of(0_usize..1500),
        order in any::<u64>(),
    ) {
        let protection = keyed(SUITES[suite], 3);
        let mut sealed = seal(&header, &payloads, &protection, max_length, &mut Counting(1));
        let count = sealed.len();
        prop_assert!(count > 0);
        let by = usize::try_from(order % u64::try_from(count).unwrap()).unwrap();
        sealed.rotate_left(by);
        let mut reassembly = Reassembly::default();
        for (index, datagram) in sealed.iter().enumerate() {
            match closed(datagram).open(&protection, &mut reassembly).unwrap() {
                OpenOutcome::Pending => prop_assert!(index + 1 < count),
                OpenOutcome::Whole(opened) => {
                    prop_assert_eq!(index + 1, count);
                    prop_assert_eq!(opened.header, header);
                    prop_assert_eq!(&parse_payloads(opened.first, &opened.body).unwrap(), &payloads);
                }
            }
        }
    }
}

fn any_attribute() -> impl Strategy<Value = Attribute> {
    (0..0x8000_u16, vec(any::<u8>(), 0..20))
        .prop_filter_map("an attribute of this length", |(kind, value)| Attribute::from_wire(kind, &value).ok())
}
