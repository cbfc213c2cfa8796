use super::*;

fn hex(text: &str) -> Vec<u8> {
    let text: String = text.chars().filter(|character| !character.is_whitespace()).collect();
    data_encoding::HEXLOWER_PERMISSIVE.decode(text.as_bytes()).unwrap()
}

/// RFC 4754 §8: public key (gwx, gwy) and AUTH value (r, s) for the message "abc".
fn rfc4754() -> [(AuthMethod, KeyType, Vec<u8>, Vec<u8>); 3] {
    let case = |method, key_type, x: &str, y: &str, r: &str, s: &str| {
        (method, key_type, [vec![4], hex(x), hex(y)].concat(), [hex(r), hex(s)].concat())
    };
    [
        case(
            AuthMethod::ECDSA_256,
            KeyType::EcdsaP256,
            "2442A5CC 0ECD015F A3CA31DC 8E2BBC70 BF42D60C BCA20085 E0822CB0 4235E970",
            "6FC98BD7 E50211A4 A27102FA 3549DF79 EBCB4BF2 46B80945 CDDFE7D5 09BBFD7D",
            "CB28E099 9B9C7715 FD0A80D8 E47A7707 9716CBBF 917DD72E 97566EA1 C066957C",
            "86FA3BB4 E26CAD5B F90B7F81 899256CE 7594BB1E A0C89212 748BFF3B 3D5B0315",
        ),
        case(
            AuthMethod::ECDSA_384,
            KeyType::EcdsaP384,
            "96281BF8 DD5E0525 CA049C04 8D345D30 82968D10 FEDF5C5A CA0C64E6 465A97EA
             5CE10C9D FEC21797 41571072 1F437922",
            "447688BA 94708EB6 E2E4D59F 6AB6D7ED FF9301D2 49FE49C3 3096655F 5D502FAD
             3D383B91 C5E7EDAA 2B714CC9 9D5743CA",
            "FB017B91 4E291494 32D8BAC2 9A514640 B46F53DD AB2C6994 8084E293 0F1C8F7E
             08E07C9C 63F2D21A 07DCB56A 6AF56EB3",
            "B263A130 5E057F98 4D38726A 1B468741 09F417BC A112674C 528262A4 0A629AF1
             CBB9F516 CE0FA7D2 FF630863 A00E8B9F",
        ),
        case(
            AuthMethod::ECDSA_521,
            KeyType::EcdsaP521,
            "0151518F 1AF0F563 517EDD54 85190DF9 5A4BF57B 5CBA4CF2 A9A3F647 4725A35F
             7AFE0A6D DEB8BEDB CD6A197E 592D4018 8901CECD 650699C9 B5E456AE A5ADD190 52A8",
            "006F3B14 2EA1BFFF 7E2837AD 44C9E4FF 6D2D34C7 3184BBAD 90026DD5 E6E85317
             D9DF45CA D7803C6C 20035B2F 3FF63AFF 4E1BA64D 1C077577 DA3F4286 C58F0AEA E643",
            "0154FD38 36AF92D0 DCA57DD5 341D3053 988534FD E8318FC6 AAAAB68E 2E6F4339
             B19F2F28 1A7E0B22 C269D93C F8794A92 78880ED7 DBB8D936 2CAEACEE 54432055 2251",
            "017705A7 030290D1 CEB605A9 A1BB03FF 9CDD521E 87A696EC 926C8C10 C8362DF4
             97536710 1F67D1CF 9BCCBF2F 3D239534 FA509E70 AAC851AE 01AAC68D 62F86647 2660",
        ),
    ]
}

// RFC 4754 §8
#[test]
fn ecdsa_vectors_of_rfc_4754_verify_and_nothing_near_them_does() {
    for (method, key_type, key, auth) in rfc4754() {
        assert!(verify(method, key_type, &key, b"abc", &auth).is_ok());
        assert_eq!(verify(method, key_type, &key, b"abd", &auth), Err(VerifyError::Signature));
        assert_eq!(verify(method, key_type, &key, b"abc", &auth[1..]), Err(VerifyError::Signature));
        assert_eq!(verify(method, key_type, &key, b"abc", &[&auth[..], b"\0"].concat()), Err(VerifyError::Signature));
        assert_eq!(verify(method, key_type, &key, b"abc", &vec![0; auth.len()]), Err(VerifyError::Signature));
        for (other, ..) in rfc4754() {
            if other != method {
                assert!(matches!(verify(other, key_type, &key, b"abc", &auth), Err(VerifyError::Method(_))));
            }
        }
    }
}

#[test]
fn methods_of_another_class_are_never_a_signature() {
    let (_, key_type, key, auth) = &rfc4754()[0];
    for method in (0..=255).map(AuthMethod) {
        let verified = verify(method, *key_type, key, b"abc", auth);
        assert_eq!(verified.is_ok(), method == AuthMethod::ECDSA_256, "{method:?}");
    }
}

// RFC 7427 appendix A
#[test]
fn algorithm_identifiers_are_those_of_the_rfcs() {
    let auth = |algorithm: &[u8]| [&[u8::try_from(algorithm.len()).unwrap()], algorithm, b"signature"].concat();
    for (text, scheme) in [
        ("300d06092a864886f70d01010b0500", Scheme::Pkcs1(Hash::Sha256)),
        ("300d06092a864886f70d01010c0500", Scheme::Pkcs1(Hash::Sha384)),
        ("300d06092a864886f70d01010d0500", Scheme::Pkcs1(Hash::Sha512)),
        ("300a06082a8648ce3d040302", Scheme::Ecdsa(Hash::Sha256)),
        ("300a06082a8648ce3d040303", Scheme::Ecdsa(Hash::Sha384)),
        ("300a06082a8648ce3d040304", Scheme::Ecdsa(Hash::Sha512)),
        ("300506032b6570", Scheme::Ed25519),
        // A.4.3: with the trailer field
        (
            "304606092a864886f70d01010a3039a00f300d06096086480165030402010500a11c301a06092a864886f70d010108300d060960\
             86480165030402010500a203020120a303020101",
            Scheme::Pss(Hash::Sha256),
        ),
        // without NULL in the hashes, as some peers send it
        (
            "303d06092a864886f70d01010a3030a00d300b0609608648016503040201a11a301806092a864886f70d010108300b0609608648\
             016503040201a203020120",
            Scheme::Pss(Hash::Sha256),
        ),
    ] {
        assert_eq!(digital_signature(&auth(&hex(text))), Ok((scheme, &b"signature"[..])), "{text}");
    }
    for hash in [Hash::Sha256, Hash::Sha384, Hash::Sha512] {
        let identifier = Scheme::Pss(hash).algorithm_identifier();
        assert_eq!(digital_signature(&auth(identifier)), Ok((Scheme::Pss(hash), &b"signature"[..])));
    }
}

#[test]
fn weak_and_malformed_algorithm_identifiers_are_refused() {
    let sha256 = "300d06096086480165030402010500";
    let sha384 = "300d06096086480165030402020500";
    let sha1 = "300906052b0e03021a0500";
    let length = |text: &str| format!("{:02x}", text.len() / 2);
    let tlv = |tag: &str, content: &str| format!("{tag}{}{content}", length(content));
    let pss = |hash: &str, mask: &str, salt: &str, rest: &str| {
        let mask = tlv("30", &format!("06092a864886f70d010108{mask}"));
        let parameters = format!("{}{}{}{rest}", tlv("a0", hash), tlv("a1", &mask), tlv("a2", salt));
        tlv("30", &format!("06092a864886f70d01010a{}", tlv("30", &parameters)))
    };
    let auth = |algorithm: &str| hex(&format!("{}{algorithm}00", length(algorithm)));
    assert!(digital_signature(&auth(&pss(sha256, sha256, "020120", ""))).is_ok());
    for (why, algorithm) in [
        ("sha1WithRSAEncryption", "300d06092a864886f70d0101050500".to_owned()),
        ("ecdsa-with-SHA1", "300906072a8648ce3d0401".to_owned()),
        ("sha256WithRSA without NULL", "300b06092a864886f70d01010b".to_owned()),
        ("PSS with empty parameters", "300d06092a864886f70d01010a3000".to_owned()),
        ("PSS without parameters", "300b06092a864886f70d01010a".to_owned()),
        (
            "PSS with default parameters, A.4.2",
            "303e06092a864886f70d01010a3031a00b300906052b0e03021a0500a118301606092a864886f70d010108300906052b0e03021a\
             0500a203020114a303020101"
                .to_owned(),
        ),
        ("PSS SHA-1", pss(sha1, sha1, "020114", "")),
        ("MGF1 with another hash", pss(sha256, sha384, "020120", "")),
        ("MGF1 with SHA-1", pss(sha256, sha1, "020120", "")),
        ("short salt", pss(sha256, sha256, "020114", "")),
        ("no salt", pss(sha256, sha256, "020100", "")),
        ("huge salt", pss(sha256, sha256, "02047fffffff", "")),
        ("huger salt", pss(sha256, sha256, "0209010000000000000020", "")),
        ("negative salt", pss(sha256, sha256, "0201a0", "")),
        ("another trailer", pss(sha256, sha256, "020120", "a303020102")),
        ("something after the trailer", pss(sha256, sha256, "020120", "a303020101a403020101")),
        ("trailing octet", format!("{}00", pss(sha256, sha256, "020120", ""))),
        ("no hash in MGF1", pss(sha256, "", "020120", "")),
        ("nothing", String::new()),
    ] {
        assert!(digital_signature(&auth(&algorithm)).is_err(), "{why}");
    }
    assert!(digital_signature(b"").is_err());
    assert!(digital_signature(b"\x0f\x30\x0d").is_err(), "truncated");
}

proptest::proptest! {
    #[test]
    fn hostile_algorithm_identifiers_never_panic(auth in proptest::collection::vec(proptest::num::u8::ANY, 0..90)) {
        let _ = digital_signature(&auth);
    }

    #[test]
    fn a_changed_pss_identifier_never_means_a_weaker_one(position in 0usize..67, octet: u8) {
        let mut algorithm = PSS_SHA256.to_vec();
        algorithm[position] = octet;
        if pss_hash(&algorithm) == Some(Hash::Sha256) {
            proptest::prop_assert_eq!(algorithm, PSS_SHA256);
        } else {
            proptest::prop_assert_eq!(pss_hash(&algorithm), None);
        }
    }
}
