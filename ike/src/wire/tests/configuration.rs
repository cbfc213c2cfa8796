//! Configuration payloads.

use super::*;

/// One attribute of each type, with and without a value.
pub(super) fn every_attribute() -> Vec<Attribute> {
    let (four, six) = ("192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap());
    let mask = "255.255.255.0".parse().unwrap();
    let anchor = TrustAnchor { key_tag: 43_547, algorithm: 8, digest_type: 2, digest: vec![0xb6; 32] };
    vec![
        Attribute::Ip4Address(None),
        Attribute::Ip4Address(Some(four)),
        Attribute::Ip4Netmask(None),
        Attribute::Ip4Netmask(Some(mask)),
        Attribute::Ip4Dns(None),
        Attribute::Ip4Dns(Some(four)),
        Attribute::Ip4Nbns(Some(four)),
        Attribute::Ip4Dhcp(Some(four)),
        Attribute::ApplicationVersion(Vec::new()),
        Attribute::ApplicationVersion(b"foobar v1.3beta".to_vec()),
        Attribute::Ip6Address(None),
        Attribute::Ip6Address(Some((six, 64))),
        Attribute::Ip6Dns(Some(six)),
        Attribute::Ip6Dhcp(None),
        Attribute::Ip4Subnet(None),
        Attribute::Ip4Subnet(Some((four, mask))),
        Attribute::SupportedAttributes(Vec::new()),
        Attribute::SupportedAttributes(vec![1, 8, 0x7fff]),
        Attribute::Ip6Subnet(None),
        Attribute::Ip6Subnet(Some((six, 128))),
        Attribute::DnsDomain(Vec::new()),
        Attribute::DnsDomain(b"example.com".to_vec()),
        Attribute::DnssecTa(None),
        Attribute::DnssecTa(Some(anchor)),
        Attribute::Unknown { kind: 23_456, value: vec![1, 2, 3] },
        Attribute::Unknown { kind: 5, value: Vec::new() },
    ]
}

fn body(attributes: &[u8]) -> Result<Vec<Payload>, WireError> {
    let length = u16::try_from(8 + attributes.len()).unwrap();
    let payload = [&[0, 0][..], &length.to_be_bytes(), &[1, 0, 0, 0], attributes].concat();
    parse_payloads(47, &payload)
}

// RFC 7296 §3.15.1, RFC 8598 §4: lengths are exact, or 0.
#[test]
fn an_attribute_of_another_length_than_its_own_is_refused() {
    let lengths: [(u16, &[usize]); 14] = [
        (1, &[0, 4]),
        (2, &[0, 4]),
        (3, &[0, 4]),
        (4, &[0, 4]),
        (6, &[0, 4]),
        (8, &[0, 17]),
        (10, &[0, 16]),
        (12, &[0, 16]),
        (13, &[0, 8]),
        (14, &[0, 2, 4, 6, 8, 10, 12, 14, 16, 18]),
        (15, &[0, 17]),
        (26, &[0, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19]),
        (7, &[]),
        (25, &[]),
    ];
    for (kind, good) in lengths {
        for length in 0..20_usize {
            let mut attribute = kind.to_be_bytes().to_vec();
            attribute.extend_from_slice(&u16::try_from(length).unwrap().to_be_bytes());
            attribute.extend(std::iter::repeat_n(1, length));
            match body(&attribute) {
                Ok(_) => assert!(good.is_empty() || good.contains(&length), "{kind}: {length}"),
                Err(WireError::Length { at, length: said, .. }) => {
                    assert!(!good.is_empty() && !good.contains(&length), "{kind}: {length}");
                    assert_eq!((at, said), (10, length));
                }
                Err(other) => panic!("{kind}: {length}: {other}"),
            }
        }
    }
}

#[test]
fn a_truncated_attribute_is_refused() {
    for cut in [&[0][..], &[0, 1], &[0, 1, 0], &[0, 1, 0, 4, 1, 2, 3], &[0, 1, 0xff, 0xff], &[0x59, 0xd9, 0, 1]] {
        assert!(body(cut).is_err(), "{cut:?}");
    }
    // The payload's own header.
    for length in 4..8_u8 {
        let payload = [&[0, 0, 0, length][..], &[1, 0, 0][..usize::from(length) - 4]].concat();
        assert!(parse_payloads(47, &payload).is_err());
    }
    assert!(body(&[]).is_ok(), "no attributes at all");
}

#[test]
fn a_prefix_longer_than_an_address_is_refused() {
    for kind in [8, 15] {
        let mut attribute = vec![0, kind, 0, 17];
        attribute.extend_from_slice(&[0x20; 16]);
        attribute.push(129);
        assert!(matches!(body(&attribute), Err(WireError::Malformed { .. })));
    }
}

#[test]
fn attributes_are_bounded() {
    assert!(body(&[0, 1, 0, 0].repeat(MAX_ATTRIBUTES)).is_ok());
    assert!(matches!(body(&[0, 1, 0, 0].repeat(MAX_ATTRIBUTES + 1)), Err(WireError::Malformed { .. })));
}

// RFC 7296 §3.15, §3.15.1: reserved fields are ignored, unknown types are no error.
#[test]
fn reserved_bits_and_unknown_attributes_are_no_error() {
    let payload = [&[0, 0, 0, 16][..], &[2, 0xff, 0xff, 0xff], &[0x80, 1, 0, 4, 192, 0, 2, 7]].concat();
    let expected = Configuration {
        kind: CfgType::REPLY,
        attributes: vec![Attribute::Ip4Address(Some("192.0.2.7".parse().unwrap()))],
    };
    assert_eq!(parse_payloads(47, &payload), Ok(vec![Payload::Configuration(expected)]));
    let unknown = vec![Attribute::Unknown { kind: 21, value: vec![9; 5] }];
    let expected = Configuration { kind: CfgType::REQUEST, attributes: unknown };
    assert_eq!(body(&[0, 21, 0, 5, 9, 9, 9, 9, 9]), Ok(vec![Payload::Configuration(expected)]));
}

// RFC 7296 §3.15.1: what SUPPORTED_ATTRIBUTES says is what has a meaning here.
#[test]
fn supported_attributes_are_those_that_are_known() {
    for kind in 1..100 {
        let known = !matches!(Attribute::from_wire(kind, &[]), Ok(Attribute::Unknown { .. }));
        assert_eq!(known, SUPPORTED.contains(&kind), "{kind}");
    }
}
