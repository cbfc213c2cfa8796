use std::collections::HashSet;

use proptest::prelude::*;

use super::*;

fn identity(text: &str) -> Identity {
    Identity::parse(text).unwrap()
}

fn pattern(text: &str) -> IdentityPattern {
    IdentityPattern::parse(text).unwrap()
}

// RFC 7296 §3.5: "MUST NOT contain any terminators"; an empty identity is nobody.
#[test]
fn malformed_identities_from_the_wire_are_refused() {
    let cases: &[(u8, &[u8])] = &[
        (1, b""),
        (1, b"\xc0\0\x02"),
        (1, b"\xc0\0\x02\x01\x01"),
        (5, b"\xc0\0\x02\x01"),
        (2, b""),
        (2, b"moon.example.org\0"),
        (2, b"moon.example.org\0.attacker.example"),
        (2, b"moon.example.org\r\n"),
        (2, b"\xff\xfe"),
        (2, b"*.example.org"),
        (3, b"carol"),
        (3, b"@example.org"),
        (3, b"carol@"),
        (3, b"carol@example.org\0"),
        (3, b"*@example.org"),
        (9, b""),
        (9, b"\x30\x00"),
        (9, b"\x30\x02\x31\x00"),
        (9, b"CN=moon"),
        (11, b""),
        // RFC 7619 §2.2.
        (13, b"moon"),
    ];
    for (kind, data) in cases {
        assert!(Identity::from_wire(*kind, data).is_err(), "type {kind} {data:x?}");
    }
    assert!(Identity::from_wire(11, &vec![7; MAX_IDENTITY_LENGTH + 1]).is_err());
    let name = identity("C=CH, CN=moon").wire_data();
    assert!(Identity::from_wire(9, &[name.as_slice(), b"\0"].concat()).is_err(), "trailing garbage");
    assert!(Identity::from_wire(9, &name[..name.len() - 1]).is_err(), "truncated");
}

#[test]
fn texts_that_name_nobody_are_refused() {
    for text in [
        "",
        "@",
        "@@",
        "@#",
        "@#f",
        "@#xy",
        "dns:#",
        "keyid:",
        "keyid:#",
        "keyid:0x",
        "fqdn:",
        "email:",
        "email:carol",
        "asn1dn:#",
        "asn1dn:#3000",
        "asn1dn:",
        "C=CH, O",
        "=x",
        "bogus=x",
        "CN=\"open",
        "CN=a\\",
        "ipv4:::1",
        "ipv6:1.2.3.4",
        "1.2.3",
        "1.2.3.4.5",
        "fe80::zz",
        "10.0.0.0/33",
        "::1/129",
        "a*b.example.org",
        "carol@*",
        "%dynamic",
        "^moon$",
        "@moon\0",
    ] {
        assert!(Identity::parse(text).is_err(), "{text:?}");
    }
    for text in ["%any", "0.0.0.0", "::", "*.example.org", "*@example.org", "C=CH, CN=*", "10.0.0.0/8"] {
        assert!(Identity::parse(text).is_err(), "{text:?} is a pattern");
        assert!(IdentityPattern::parse(text).is_ok(), "{text:?}");
    }
}

#[test]
fn notation_gives_the_types_that_strongswan_gives() {
    let cases: &[(&str, u8, &[u8])] = &[
        ("192.0.2.1", 1, &[192, 0, 2, 1]),
        ("2001:db8::1", 5, &[0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]),
        ("moon.strongswan.org", 2, b"moon.strongswan.org"),
        ("moon", 2, b"moon"),
        ("@moon.strongswan.org", 2, b"moon.strongswan.org"),
        ("@192.0.2.1", 2, b"192.0.2.1"),
        ("carol@strongswan.org", 3, b"carol@strongswan.org"),
        ("@@carol@strongswan.org", 3, b"carol@strongswan.org"),
        ("@#6d6f6f6E", 11, b"moon"),
        ("keyid:moon", 11, b"moon"),
        ("keyid:0x00ff", 11, &[0, 0xff]),
        ("keyid:#00ff", 11, &[0, 0xff]),
        ("fqdn:a=b", 2, b"a=b"),
        ("dns:moon", 2, b"moon"),
        ("email:carol@x", 3, b"carol@x"),
        ("ipv4:192.0.2.1", 1, &[192, 0, 2, 1]),
        ("ipv6:::1", 5, &[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]),
    ];
    for (text, kind, data) in cases {
        let identity = identity(text);
        assert_eq!((identity.kind(), identity.wire_data().as_slice()), (*kind, *data), "{text}");
        assert_eq!(Identity::from_wire(*kind, data).unwrap(), identity, "{text}");
    }
}

#[test]
fn distinguished_name_is_encoded_as_openssl_encodes_it() {
    // Made with `openssl asn1parse -genconf`: PrintableString, UTF8String, IA5String.
    let expected =
        "3033310b30090603550406130243483110300e060355040a0c074772c3bcc39f653112301006092a864886f70d0109011603614062";
    assert_eq!(data_encoding::HEXLOWER.encode(&identity("C=CH, O=Grüße, E=a@b").wire_data()), expected);
}

#[test]
fn distinguished_name_separators_mean_the_same() {
    let name = identity("C=CH, O=strongSwan Project, CN=moon.strongswan.org");
    for text in [
        "/C=CH/O=strongSwan Project/CN=moon.strongswan.org",
        "C=CH/O=strongSwan Project/CN=moon.strongswan.org",
        "c=CH,o=strongSwan Project,cn=moon.strongswan.org",
        "C=CH, O=\"strongSwan Project\", 2.5.4.3=moon.strongswan.org",
        "asn1dn:C=CH, O=strongSwan Project , CN=moon.strongswan.org",
    ] {
        assert_eq!(identity(text), name, "{text}");
        assert_eq!(identity(text).wire_data(), name.wire_data(), "{text}");
    }
    assert_eq!(name.to_string(), "C=CH, O=strongSwan Project, CN=moon.strongswan.org");
    assert_eq!(identity("/CN=Smith, John/O=x").to_string(), "CN=Smith\\, John, O=x");
    assert_eq!(identity("CN=host/moon").to_string(), "CN=host/moon");
}

// The string type is the encoder's choice (RFC 5280 §4.1.2.4), so it must not matter for matching.
#[test]
fn distinguished_names_compare_without_string_types_and_case() {
    let printable = b"\x30\x0f\x31\x0d\x30\x0b\x06\x03\x55\x04\x03\x13\x04moon".to_vec();
    let utf8 = b"\x30\x0f\x31\x0d\x30\x0b\x06\x03\x55\x04\x03\x0c\x04Moon".to_vec();
    let organisation = b"\x30\x0f\x31\x0d\x30\x0b\x06\x03\x55\x04\x0a\x0c\x04moon".to_vec();
    let bmp = b"\x30\x13\x31\x11\x30\x0f\x06\x03\x55\x04\x03\x1e\x08\0m\0o\0o\0n".to_vec();
    let octets = b"\x30\x0f\x31\x0d\x30\x0b\x06\x03\x55\x04\x03\x04\x04moon".to_vec();
    let [printable, utf8, organisation, bmp, octets] =
        [printable, utf8, organisation, bmp, octets].map(|der| Identity::from_wire(9, &der).unwrap());
    assert_eq!(printable, utf8);
    assert_eq!(printable, bmp);
    assert_eq!(printable.canonical(), utf8.canonical());
    assert_eq!(printable.canonical(), bmp.canonical());
    assert_ne!(printable.canonical(), organisation.canonical());
    assert_ne!(printable, organisation);
    assert_ne!(printable, octets);
    assert_eq!(HashSet::from([printable.clone(), utf8, bmp]).len(), 1);
    assert_ne!(printable, identity("CN=moon, CN=moon"));
    assert_ne!(identity("C=CH, CN=moon"), identity("CN=moon, C=CH"));
    assert_ne!(identity("CN=ab, O=c"), identity("CN=a, O=bc"));
    assert_ne!(identity("CN=a, O=b"), identity("CN=a+O=b"));
    assert_eq!(identity("CN=a+O=b"), identity("O=b+CN=a"));
}

#[test]
fn types_never_compare_equal() {
    let identities = [identity("moon"), identity("keyid:moon"), Identity::Other { kind: 2, data: b"moon".to_vec() }];
    for (index, one) in identities.iter().enumerate() {
        for other in &identities[index + 1..] {
            assert_ne!(one, other);
            assert_ne!(one.canonical(), other.canonical());
            assert_ne!(one.cmp(other), std::cmp::Ordering::Equal);
            assert!(!IdentityPattern::exact(one.clone()).matches(other));
        }
    }
}

// A key id or a name that looks like another identity must not be printed as that identity.
#[test]
fn printed_identities_are_not_ambiguous() {
    let cases: &[(u8, &[u8], &str, &str)] = &[
        (11, b"moon.example.org", "keyid:moon.example.org", "moon.example.org"),
        (11, b"\x00\xff", "keyid:#00ff", "00:ff"),
        (11, b"0xff", "keyid:#30786666", "0xff"),
        (2, b"192.0.2.1", "fqdn:192.0.2.1", "192.0.2.1"),
        (2, b"CN=moon", "fqdn:CN=moon", "CN=moon"),
        (2, b"%any", "fqdn:%any", "%any"),
        (2, b"#aa", "fqdn:#236161", "#aa"),
        (3, b"CN=x@y", "email:CN=x@y", "CN=x@y"),
        (2, b"moon.example.org", "moon.example.org", "moon.example.org"),
        (3, b"carol@example.org", "carol@example.org", "carol@example.org"),
        (1, &[0, 0, 0, 0], "ipv4:0.0.0.0", "ipv4:0.0.0.0"),
        (13, b"", "%null", "%null"),
    ];
    for (kind, data, printed, strongswan) in cases {
        let identity = Identity::from_wire(*kind, data).unwrap();
        assert_eq!(identity.to_string(), *printed);
        assert_eq!(identity.strongswan_text(), *strongswan);
    }
    assert_eq!(identity("CN=\\*").to_string(), "CN=\\*");
    assert_eq!(identity("CN=a\\0Ab").to_string(), "CN=a\\0Ab");
}

#[test]
fn patterns_admit_what_they_say_and_nothing_else() {
    let cases: &[(&str, &[&str], &[&str])] = &[
        ("%any", &["moon", "192.0.2.1", "C=CH, CN=moon", "keyid:x"], &[]),
        (
            "*.example.org",
            &["moon.example.org", "a.MOON.Example.Org"],
            &[
                "example.org",
                "fqdn:.example.org",
                "evilexample.org",
                "moon.example.org.evil",
                "a@moon.example.org",
                "keyid:moon.example.org",
                "CN=moon.example.org",
            ],
        ),
        (
            "*@example.org",
            &["carol@example.org", "Dave@EXAMPLE.org"],
            &["carol@sub.example.org", "example.org", "fqdn:carol@example.org", "carol@example.org.evil"],
        ),
        (
            "C=CH, O=Org, CN=*",
            &["C=CH, O=Org, CN=moon", "C=ch, O=ORG, CN=\\*"],
            &[
                "C=CH, O=Org",
                "C=CH, O=Other, CN=moon",
                "C=CH, O=Org, OU=x, CN=moon",
                "C=CH, O=Org, CN=a+CN=b",
                "O=Org, C=CH, CN=moon",
                "C=CH, O=Org, OU=moon",
            ],
        ),
        ("192.0.2.0/24", &["192.0.2.7"], &["192.0.3.7", "2001:db8::1", "fqdn:192.0.2.7"]),
        ("2001:db8::/32", &["2001:db8:1::1"], &["2001:db9::1", "192.0.2.7"]),
        ("moon.example.org", &["MOON.example.org"], &["sun.example.org", "keyid:moon.example.org"]),
        ("carol@example.org", &["carol@EXAMPLE.org", "Carol@example.org"], &["carol@example.com", "karol@example.org"]),
    ];
    for (text, admitted, refused) in cases {
        let pattern = pattern(text);
        for text in *admitted {
            assert!(pattern.matches(&identity(text)), "{pattern} should admit {text}");
        }
        for text in *refused {
            assert!(!pattern.matches(&identity(text)), "{pattern} should not admit {text}");
        }
        assert!(!pattern.matches(&Identity::Null), "{pattern}");
        assert_eq!(IdentityPattern::parse(&pattern.to_string()).unwrap(), pattern);
        assert_eq!(pattern.as_exact().is_some(), !text.contains(['*', '/', '%']), "{text}");
    }
    // A wildcard that got into an identity (not from the wire) is not admitted by the wildcard.
    assert!(!pattern("*.example.org").matches(&Identity::Fqdn("*.example.org".into())));
}

#[test]
fn a_pattern_that_looks_like_another_notation_says_what_it_is() {
    for text in ["fqdn:*., O=", "email:*@a, O=b", "*.example.org", "*@example.org"] {
        let pattern = IdentityPattern::parse(text).unwrap();
        assert_eq!(IdentityPattern::parse(&pattern.to_string()).unwrap(), pattern, "{text}");
    }
    assert_eq!(IdentityPattern::parse("fqdn:*.example.org").unwrap().to_string(), "*.example.org");
}

proptest! {
    #[test]
    fn reading_the_wire_never_panics_and_keeps_the_octets(kind: u8, data in prop::collection::vec(any::<u8>(), 0..80)) {
        if let Ok(identity) = Identity::from_wire(kind, &data) {
            prop_assert_eq!(identity.kind(), kind);
            prop_assert_eq!(identity.wire_data(), data);
            let text = identity.to_string();
            if !matches!(identity, Identity::Other { .. }) {
                prop_assert_eq!(Identity::parse(&text).unwrap(), identity);
            }
        }
    }

    #[test]
    fn mutated_names_never_panic(position in 0usize..60, octet: u8, cut in 0usize..60) {
        let mut der = identity("C=CH, O=Grüß Gott, CN=moon+E=a@b").wire_data();
        if let Some(place) = der.get_mut(position) { *place = octet; }
        der.truncate(der.len().saturating_sub(cut / 20));
        if let Ok(identity) = Identity::from_wire(9, &der) {
            prop_assert_eq!(Identity::parse(&identity.to_string()).unwrap(), identity);
        }
    }

    #[test]
    fn printed_identities_parse_to_the_same(text in "(@|@#|@@|fqdn:|keyid:|email:|CN=|C=CH, CN=|O=)?[ -~äß*\\\\,/+=\"#]{0,24}(, O=[a-z/+=\\\\ ]{0,9})?") {
        if let Ok(parsed) = Identity::parse(&text) {
            prop_assert_eq!(&Identity::parse(&parsed.to_string()).unwrap(), &parsed);
            prop_assert_eq!(Identity::from_wire(parsed.kind(), &parsed.wire_data()).unwrap(), parsed);
        }
        if let Ok(parsed) = IdentityPattern::parse(&text) {
            prop_assert_eq!(IdentityPattern::parse(&parsed.to_string()).unwrap(), parsed);
        }
    }
}
