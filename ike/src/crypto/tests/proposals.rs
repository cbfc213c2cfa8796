use ipsec::crypto::Protection;
use ipsec::plane::EspSuite;
use ipsec::transform::{Proposal, Protocol, SequenceNumbers, Transform, TransformType};

use super::*;

fn ike(text: &str) -> Vec<Proposal> {
    let mut proposals: Vec<Proposal> =
        text.split(',').flat_map(|text| parse_proposals(text, Protocol::IKE).unwrap()).collect();
    renumber(&mut proposals);
    proposals
}

/// ESP proposals with an SPI, as they are offered.
fn esp(text: &str) -> Vec<Proposal> {
    let mut proposals: Vec<Proposal> =
        text.split(',').flat_map(|text| parse_proposals(text, Protocol::ESP).unwrap()).collect();
    renumber(&mut proposals);
    for proposal in &mut proposals {
        proposal.spi = vec![0xc0, 0, 0, 1];
    }
    proposals
}

fn reason(text: &str, protocol: Protocol) -> String {
    parse_proposals(text, protocol).unwrap_err().reason
}

fn ids(proposal: &Proposal, kind: TransformType) -> Vec<u16> {
    proposal.transforms.iter().filter(|transform| transform.kind == kind).map(|transform| transform.id).collect()
}

fn choose_ike(offered: &str, configured: &str) -> Option<IkeSuite> {
    select_ike(&ike(offered), &ike(configured), true, None).map(|choice| choice.suite)
}

const GCM: IkeSuite = IkeSuite {
    encr: Encr::AES_GCM_16,
    key_bits: 256,
    integ: Integ::NONE,
    prf: Prf::HMAC_SHA2_384,
    ke: Ke::ECP_384,
    additional: AdditionalKe::NONE,
};

#[test]
fn a_keyword_that_we_lack_is_told_from_one_that_nobody_has() {
    for word in ["3des", "aesxcbc", "x448", "modp1024", "camellia128", "modp768", "md5", "ecp512bp"] {
        let reason = reason(&format!("aes128-sha256-{word}-x25519"), Protocol::IKE);
        assert_eq!(reason, format!("{word:?} is not supported"));
    }
    for word in ["sha257", "aes512", "aes128gcm7", "aesctr", "aes128ccm10", "aes192gmac16", "aes1280"] {
        let reason = reason(&format!("aes128-{word}-x25519"), Protocol::IKE);
        assert_eq!(reason, format!("unknown keyword {word:?}"));
    }
    assert_eq!(reason("aes128--x25519", Protocol::IKE), "a keyword is empty");
    assert_eq!(reason("", Protocol::ESP), "a keyword is empty");
    assert_eq!(reason("default-x25519", Protocol::IKE), "default cannot be joined with other keywords");
    assert!(reason("aes128-sha256", Protocol::AH).contains("only IKE and ESP"));
}

#[test]
fn an_incomplete_or_mixed_proposal_is_refused() {
    for (text, protocol, expected) in [
        ("sha256-x25519", Protocol::IKE, "an encryption algorithm is missing"),
        ("x25519", Protocol::ESP, "an encryption algorithm is missing"),
        ("aes128-x25519", Protocol::IKE, "an integrity algorithm is missing"),
        ("aes128-prfsha256-x25519", Protocol::IKE, "an integrity algorithm is missing"),
        ("aes128-x25519", Protocol::ESP, "an integrity algorithm is missing"),
        ("aes128gcm16-x25519", Protocol::IKE, "a PRF is missing"),
        ("aes128gcm16-prfsha256", Protocol::IKE, "a key exchange method is missing"),
        ("aes128-sha256-modpnone", Protocol::IKE, "a key exchange method is missing"),
        ("aes128-sha256-x25519-esn", Protocol::IKE, "esn and noesn are for ESP only"),
        ("null-sha256-x25519", Protocol::IKE, "null and gmac leave the text readable: they are for ESP only"),
        ("aes256gmac-prfsha256-x25519", Protocol::IKE, "null and gmac leave the text readable: they are for ESP only"),
        ("null", Protocol::ESP, "an integrity algorithm is missing"),
        ("aes128ctr-prfsha256-x25519", Protocol::IKE, "an integrity algorithm is missing"),
        (
            "aes128-aes128gcm16-sha256-x25519",
            Protocol::IKE,
            "combined-mode and other encryption algorithms cannot be in one proposal",
        ),
        (
            "chacha20poly1305-aes256-sha256",
            Protocol::ESP,
            "combined-mode and other encryption algorithms cannot be in one proposal",
        ),
    ] {
        assert_eq!(reason(text, protocol), expected, "{text}");
    }
    assert_eq!(
        parse_proposals("aes128-x25519", Protocol::ESP).unwrap_err().to_string(),
        "proposal \"aes128-x25519\": an integrity algorithm is missing"
    );
}

#[test]
fn an_ike_proposal_takes_its_prf_from_the_integrity_algorithm() {
    let [proposal] = &ike("aes128-aes256-sha256-sha1-modp3072")[..] else { panic!() };
    assert_eq!(ids(proposal, TransformType::PRF), [Prf::HMAC_SHA2_256.0, Prf::HMAC_SHA1.0]);
    assert_eq!(ids(proposal, TransformType::INTEG), [12, 2]);
    let bits: Vec<Option<u16>> = proposal.transforms.iter().map(|t| t.key_bits).take(2).collect();
    assert_eq!(bits, [Some(128), Some(256)]);

    let [explicit] = &ike("aes128-sha256-prfsha384-modp3072")[..] else { panic!() };
    assert_eq!(ids(explicit, TransformType::PRF), [Prf::HMAC_SHA2_384.0]);

    // RFC 5282 §8: a combined-mode cipher has no integrity algorithm.
    let [combined] = &ike("aes128gcm16-sha512-x25519")[..] else { panic!() };
    assert_eq!(ids(combined, TransformType::PRF), [Prf::HMAC_SHA2_512.0]);
    assert_eq!(ids(combined, TransformType::INTEG), []);
}

#[test]
fn all_spellings_of_an_algorithm_are_one_transform() {
    for (one, other) in [
        ("aes-sha256-x25519", "AES128-sha2_256-curve25519"),
        ("aes256gcm16-prfsha256-ecp256", "aes256gcm128-prfsha256-ecp256"),
        ("aes192gcm16-prfsha1-ecp521", "aes192gcm - prfsha1 - ecp521"),
        ("aes128-sha1-modp2048", "aes128-sha-modp2048-modp2048"),
        ("aes128ccm8-prfaescmac-modp6144", "aes128ccm64-PRFAESCMAC-modp6144"),
        ("aes192ccm12-prfsha256-modp8192", "aes192ccm96-prfsha256-modp8192"),
        ("aes256ccm16-prfsha256-x25519", "aes256ccm-aes256ccm128-prfsha256-x25519"),
        ("aes256gcm8-aes256gcm12-prfsha256-x25519", "aes256gcm64-aes256gcm96-prfsha256-x25519"),
        ("aes128ctr-aescmac-x25519", "aes128ctr-aescmac-prfaescmac-x25519"),
    ] {
        assert_eq!(ike(one), ike(other));
    }
}

#[test]
fn esp_means_32_bit_sequence_numbers_unless_it_says_otherwise() {
    for (text, expected) in
        [("aes128gcm16", vec![0]), ("aes128gcm16-esn", vec![1]), ("aes128gcm16-esn-noesn", vec![1, 0])]
    {
        assert_eq!(ids(&esp(text)[0], TransformType::SN), expected);
    }
    let [chacha] = &esp("chacha20poly1305-prfsha256-x25519")[..] else { panic!() };
    // RFC 7634 §4: no Key Length attribute.
    assert!(chacha.transforms.iter().all(|transform| transform.key_bits.is_none()));
    assert_eq!(ids(chacha, TransformType::PRF), []);
}

#[test]
fn defaults_are_whole_proposals_of_what_we_have() {
    for protocol in [Protocol::IKE, Protocol::ESP] {
        let mut proposals = parse_proposals(" Default ", protocol).unwrap();
        assert_eq!(proposals.iter().map(|proposal| proposal.number).collect::<Vec<_>>(), [1, 2]);
        for proposal in &mut proposals {
            if protocol == Protocol::ESP {
                proposal.spi = vec![0, 0, 1, 0];
            }
            // Each transform can be chosen: alone with the others it still makes a suite.
            for transform in proposal.transforms.clone() {
                let mut narrowed = proposal.clone();
                narrowed.transforms.retain(|other| other.kind != transform.kind || *other == transform);
                let chosen = match protocol {
                    Protocol::IKE => {
                        select_ike(&[narrowed], std::slice::from_ref(proposal), true, None).map(|c| c.proposal)
                    }
                    _ => select_esp(&[narrowed], std::slice::from_ref(proposal), true, true, None).map(|c| c.proposal),
                };
                assert!(chosen.unwrap().transforms.contains(&transform));
            }
        }
        assert_eq!(ids(&proposals[0], TransformType::INTEG), []);
    }
}

#[test]
fn nothing_in_common_chooses_nothing() {
    let ours = "aes256gcm16-prfsha384-ecp384";
    for theirs in [
        "aes128gcm16-prfsha384-ecp384",
        "aes256-sha384-ecp384",
        "aes256gcm16-prfsha256-ecp384",
        "aes256gcm16-prfsha384-ecp256",
    ] {
        assert_eq!(choose_ike(theirs, ours), None, "{theirs}");
        assert_eq!(accept_ike(&ike(theirs), &ike(ours)), None, "{theirs}");
    }
    assert_eq!(select_ike(&[], &ike(ours), true, None), None);
    assert_eq!(select_ike(&ike(ours), &[], true, None), None);
    assert_eq!(choose_ike(ours, ours), Some(GCM));
}

// RFC 7296 §3.3.6
#[test]
fn a_transform_with_an_unknown_attribute_is_never_chosen() {
    for kind in [TransformType::ENCR, TransformType::PRF, TransformType::KE] {
        let mut offered = ike("aes256gcm16-prfsha384-ecp384");
        for transform in offered[0].transforms.iter_mut().filter(|transform| transform.kind == kind) {
            transform.unknown_attribute = true;
        }
        let configured = ike("aes256gcm16-prfsha384-ecp384");
        assert_eq!(select_ike(&offered, &configured, true, None), None);
        assert_eq!(select_ike(&offered, &offered, true, None), None);
        assert_eq!(accept_ike(&offered, &configured), None);
    }
}

// RFC 7296 §3.3.5
#[test]
fn a_key_length_that_is_missing_or_out_of_place_is_never_chosen() {
    let mut offered = ike("aes256gcm16-prfsha384-ecp384");
    offered[0].transforms[0].key_bits = None;
    assert_eq!(select_ike(&offered, &offered, true, None), None);
    for bits in [0, 1, 64, 255, 512] {
        offered[0].transforms[0].key_bits = Some(bits);
        assert_eq!(select_ike(&offered, &offered, true, None), None);
    }
    let mut offered = ike("chacha20poly1305-prfsha384-ecp384");
    offered[0].transforms[0].key_bits = Some(256);
    assert_eq!(select_ike(&offered, &offered, true, None), None);
    let mut offered = ike("aes256gcm16-prfsha384-ecp384");
    for transform in &mut offered[0].transforms[1..] {
        transform.key_bits = Some(256);
    }
    assert_eq!(select_ike(&offered, &offered, true, None), None);
}

// RFC 7296 §3.3.6: a kind of transform that we do not know spoils its proposal.
#[test]
fn a_proposal_with_an_unknown_kind_of_transform_is_skipped() {
    let mut offered = ike("aes256gcm16-prfsha384-ecp384");
    offered[0].transforms.push(Transform::new(TransformType(6), 36));
    assert_eq!(select_ike(&offered, &ike("aes256gcm16-prfsha384-ecp384"), true, None), None);
    offered.extend(ike("aes256gcm16-prfsha384-ecp384"));
    offered[1].number = 2;
    let choice = select_ike(&offered, &ike("aes256gcm16-prfsha384-ecp384"), true, None).unwrap();
    assert_eq!(choice.proposal.number, 2);
}

// RFC 7296 §3.3.1
#[test]
fn a_proposal_with_an_impossible_spi_is_skipped() {
    let configured = ike("aes256gcm16-prfsha384-ecp384");
    for (spi, possible) in
        [(vec![], true), (vec![1; 8], true), (vec![0; 8], false), (vec![1; 4], false), (vec![1; 9], false)]
    {
        let mut offered = configured.clone();
        offered[0].spi = spi;
        assert_eq!(select_ike(&offered, &configured, true, None).is_some(), possible);
        assert_eq!(accept_ike(&offered, &configured).is_some(), possible);
    }
    let configured = esp("aes128gcm16");
    for (spi, possible) in
        [(vec![1; 4], true), (vec![0; 4], false), (vec![], false), (vec![1; 8], false), (vec![1; 2], false)]
    {
        let mut offered = configured.clone();
        offered[0].spi = spi;
        assert_eq!(select_esp(&offered, &configured, true, false, None).is_some(), possible);
        assert_eq!(accept_esp(&offered, &configured, false).is_some(), possible);
    }
}

#[test]
fn a_proposal_of_another_protocol_is_skipped() {
    let ours = esp("aes128gcm16");
    let mut offered = ours.clone();
    offered[0].protocol = Protocol::AH;
    assert_eq!(select_esp(&offered, &ours, true, false, None), None);
    assert_eq!(accept_esp(&offered, &ours, false), None);
    offered[0].protocol = Protocol::IKE;
    offered[0].spi = vec![1; 8];
    assert_eq!(select_ike(&offered, &ours, true, None), None);
}

#[test]
fn the_configured_order_wins_if_it_shall() {
    let (theirs, ours) = (
        ike("aes128-aes256-sha256-sha512-modp2048-x25519,aes128gcm16-prfsha256-x25519"),
        ike("aes128gcm16-prfsha256-x25519,aes256-aes128-sha512-sha256-x25519-modp2048"),
    );
    let choice = select_ike(&theirs, &ours, true, None).unwrap();
    assert_eq!((choice.suite.encr, choice.proposal.number), (Encr::AES_GCM_16, 2));
    let choice = select_ike(&theirs, &ours, false, None).unwrap();
    let suite = IkeSuite {
        encr: Encr::AES_CBC,
        key_bits: 128,
        integ: Integ::HMAC_SHA2_256_128,
        prf: Prf::HMAC_SHA2_256,
        ke: Ke::MODP_2048,
        additional: AdditionalKe::NONE,
    };
    assert_eq!((choice.suite, choice.proposal.number), (suite, 1));
    // Within a proposal, too.
    let choice = select_ike(&theirs, &ours[1..], true, None).unwrap();
    assert_eq!((choice.suite.key_bits, choice.suite.integ), (256, Integ::HMAC_SHA2_512_256));
}

// RFC 7296 §2.7, §3.3.6
#[test]
fn an_answer_has_one_transform_of_each_kind() {
    let offered = ike("aes128-aes256-sha256-sha512-modp2048-x25519");
    let choice = select_ike(&offered, &ike("default"), true, None).unwrap();
    let kinds: Vec<u8> = choice.proposal.transforms.iter().map(|transform| transform.kind.0).collect();
    assert_eq!(kinds, [1, 2, 3, 4]);
    assert!(choice.proposal.spi.is_empty());
    assert_eq!(accept_ike(std::slice::from_ref(&choice.proposal), &offered), Some(choice.suite));
}

#[test]
fn the_method_of_the_peers_ke_payload_saves_a_round_trip() {
    let offered = ike("aes128-sha256-modp2048-x25519-ecp256");
    let configured = ike("aes128-sha256-x25519-ecp256");
    for (preferred, chosen) in [
        (None, Ke::X25519),
        (Some(Ke::ECP_256), Ke::ECP_256),
        (Some(Ke::MODP_2048), Ke::X25519),
        (Some(Ke::ECP_521), Ke::X25519),
    ] {
        assert_eq!(select_ike(&offered, &configured, true, preferred).unwrap().suite.ke, chosen);
    }
}

// RFC 7296 §3.3: NONE beside a combined-mode cipher is answered; any other algorithm cannot be.
#[test]
fn integrity_none_with_a_combined_mode_cipher() {
    let configured = esp("aes128gcm16");
    let with = |integ: Integ| {
        let mut offered = configured.clone();
        offered[0].transforms.push(Transform::new(TransformType::INTEG, integ.0));
        offered
    };
    let choice = select_esp(&with(Integ::NONE), &configured, true, false, None).unwrap();
    assert_eq!(ids(&choice.proposal, TransformType::INTEG), [Integ::NONE.0]);
    assert_eq!(choice.suite.integ, Integ::NONE);
    assert!(accept_esp(&with(Integ::NONE), &configured, false).is_some());
    assert_eq!(select_esp(&with(Integ::HMAC_SHA2_256_128), &configured, true, false, None), None);
    assert_eq!(accept_esp(&with(Integ::HMAC_SHA2_256_128), &configured, false), None);
    // And a plain cipher is never left without one.
    let mut bare = esp("aes128-sha256");
    bare[0].transforms.retain(|transform| transform.kind != TransformType::INTEG);
    assert_eq!(select_esp(&bare, &esp("aes128-sha256"), true, false, None), None);
    assert_eq!(accept_esp(&bare, &esp("aes128-sha256"), false), None);
    bare[0].transforms.push(Transform::new(TransformType::INTEG, Integ::NONE.0));
    assert_eq!(select_esp(&bare, &bare, true, false, None), None);
}

// RFC 7296 §1.2: the first Child SA has no key exchange of its own.
#[test]
fn key_exchange_is_left_out_in_ike_auth() {
    let configured = esp("aes128gcm16-x25519");
    for offered in [esp("aes128gcm16"), esp("aes128gcm16-x25519"), esp("aes128gcm16-modp2048")] {
        let choice = select_esp(&offered, &configured, true, false, Some(Ke::X25519)).unwrap();
        assert_eq!(choice.ke, Ke::NONE);
        assert_eq!(ids(&choice.proposal, TransformType::KE), []);
        assert!(accept_esp(&offered, &configured, false).is_some());
    }
    assert_eq!(without_ke(&configured), esp("aes128gcm16"));
}

#[test]
fn perfect_forward_secrecy_is_what_both_sides_say() {
    let choose = |offered: &str, configured: &str| {
        select_esp(&esp(offered), &esp(configured), true, true, None).map(|choice| choice.ke)
    };
    assert_eq!(choose("aes128gcm16", "aes128gcm16"), Some(Ke::NONE));
    assert_eq!(choose("aes128gcm16", "aes128gcm16-x25519"), None);
    assert_eq!(choose("aes128gcm16-x25519", "aes128gcm16"), None);
    assert_eq!(choose("aes128gcm16", "aes128gcm16-x25519-modpnone"), Some(Ke::NONE));
    assert_eq!(choose("aes128gcm16-x25519-modpnone", "aes128gcm16"), Some(Ke::NONE));
    assert_eq!(choose("aes128gcm16-x25519-modpnone", "aes128gcm16-x25519-modpnone"), Some(Ke::X25519));
    // A responder must not drop what we insisted on, nor add to it.
    assert_eq!(accept_esp(&esp("aes128gcm16"), &esp("aes128gcm16-x25519"), true), None);
    assert_eq!(accept_esp(&esp("aes128gcm16-x25519"), &esp("aes128gcm16"), true), None);
    let (_, ke, _) = accept_esp(&esp("aes128gcm16-x25519"), &esp("aes128gcm16-x25519"), true).unwrap();
    assert_eq!(ke, Ke::X25519);
}

// RFC 7296 §3.3.3, RFC 9827: no transform of the kind means 32 bits.
#[test]
fn extended_sequence_numbers_are_what_both_sides_say() {
    let choose = |offered: &[Proposal], configured: &str| {
        select_esp(offered, &esp(configured), true, false, None).map(|choice| choice.suite.esn)
    };
    assert_eq!(choose(&esp("aes128gcm16-esn"), "aes128gcm16"), None);
    assert_eq!(choose(&esp("aes128gcm16-esn"), "aes128gcm16-esn"), Some(true));
    assert_eq!(choose(&esp("aes128gcm16-noesn-esn"), "aes128gcm16-esn-noesn"), Some(true));
    let mut silent = esp("aes128gcm16");
    silent[0].transforms.retain(|transform| transform.kind != TransformType::SN);
    assert_eq!(choose(&silent, "aes128gcm16-noesn"), Some(false));
    assert_eq!(choose(&silent, "aes128gcm16-esn"), None);
    let choice = select_esp(&silent, &esp("aes128gcm16"), true, false, None).unwrap();
    assert_eq!(ids(&choice.proposal, TransformType::SN), []);
    let expected = EspSuite { encr: Encr::AES_GCM_16, key_bits: 128, integ: Integ::NONE, esn: false };
    assert_eq!(accept_esp(&silent, &esp("aes128gcm16"), false), Some((expected, Ke::NONE, AdditionalKe::NONE)));
    assert_eq!(accept_esp(&silent, &esp("aes128gcm16-esn"), false), None);
    // A number that we do not know (RFC 9827 §4) is no choice, though both have it.
    let mut newer = esp("aes128gcm16");
    newer[0].transforms.last_mut().unwrap().id = 2;
    assert_eq!(select_esp(&newer, &newer, true, false, None), None);
    assert_eq!(SequenceNumbers::SEQUENTIAL_32.0, 0);
}

// RFC 7296 §2.7: an initiator checks that the answer is one of its offers.
#[test]
fn an_answer_that_was_not_offered_is_refused() {
    let offered = ike("aes128-aes256-sha256-sha512-modp2048-x25519,aes256gcm16-prfsha384-ecp384");
    let answer = select_ike(&offered, &ike("aes256-sha256-x25519"), true, None).unwrap().proposal;
    assert!(accept_ike(std::slice::from_ref(&answer), &offered).is_some());

    assert_eq!(accept_ike(&[], &offered), None);
    assert_eq!(accept_ike(&[answer.clone(), answer.clone()], &offered), None);
    // All of an offer instead of a choice.
    assert_eq!(accept_ike(&offered[..1], &offered), None);
    // The second offer's algorithms under the first one's number.
    let mut renumbered = offered[1].clone();
    renumbered.number = 1;
    assert_eq!(accept_ike(&[renumbered], &offered), None);
    for number in [0, 2, 3, 255] {
        assert_eq!(accept_ike(&[Proposal { number, ..answer.clone() }], &offered), None);
    }
    for index in 0..answer.transforms.len() {
        let mut changed = answer.clone();
        changed.transforms.remove(index);
        assert_eq!(accept_ike(&[changed], &offered), None, "without {index}");
        let mut changed = answer.clone();
        changed.transforms[index].id = 1;
        assert_eq!(accept_ike(&[changed], &offered), None, "other {index}");
        let mut changed = answer.clone();
        changed.transforms.push(answer.transforms[index]);
        assert_eq!(accept_ike(&[changed], &offered), None, "twice {index}");
    }
    let mut longer = answer;
    longer.transforms[0].key_bits = Some(192);
    assert_eq!(accept_ike(&[longer], &offered), None);
}

#[test]
fn renumbering_counts_from_one_and_never_overflows() {
    let mut many = vec![ike("aes128-sha256-x25519").remove(0); 300];
    renumber(&mut many);
    assert_eq!(many.len(), 255);
    assert!(many.iter().zip(1..=255).all(|(proposal, number)| proposal.number == number));
}

#[test]
fn names_are_strongswans() {
    assert_eq!(names::encr(Encr::AES_GCM_16), "AES_GCM_16");
    assert_eq!(names::encr(Encr::CHACHA20_POLY1305), "CHACHA20_POLY1305");
    assert_eq!(names::integ(Integ::HMAC_SHA2_256_128), "HMAC_SHA2_256_128");
    assert_eq!(names::prf(Prf::HMAC_SHA2_256), "PRF_HMAC_SHA2_256");
    assert_eq!(names::ke(Ke::X25519), "CURVE_25519");
    assert_eq!(names::ke(Ke::ECP_384), "ECP_384");
    assert_eq!(names::ke(Ke::MODP_3072), "MODP_3072");
    assert_eq!(names::ke(Ke(1234)), "(1234)");
}

#[test]
fn proposals_are_printed_as_charon_prints_them() {
    let both = [
        ike("aes256-sha256-modp3072"),
        ike("aes128ccm12-chacha20poly1305-prfsha512-x25519-ke2_mlkem1024-ke1_mlkem768-ke1_none"),
    ];
    assert_eq!(
        names::proposals(&both.concat()),
        "IKE:AES_CBC_256/HMAC_SHA2_256_128/PRF_HMAC_SHA2_256/MODP_3072, \
         IKE:AES_CCM_12_128/CHACHA20_POLY1305/PRF_HMAC_SHA2_512/CURVE_25519/KE1_ML_KEM_768/KE1_NONE/KE2_ML_KEM_1024"
    );
    assert_eq!(names::proposals(&esp("null-aescmac-none-esn")), "ESP:NULL/AES_CMAC_96/NONE/EXT_SEQ");
    let strange = Proposal {
        number: 1,
        protocol: Protocol(9),
        spi: Vec::new(),
        transforms: vec![Transform::new(TransformType(77), 5), Transform::new(TransformType::SN, 2)],
    };
    assert_eq!(names::proposals(std::slice::from_ref(&strange)), "(?):(77:5)/SN(2)");
    // However much a stranger offers.
    let text = names::proposals(&vec![strange; 255]);
    assert!(text.len() <= 1_003 && text.ends_with("..."));
    assert_eq!(names::proposals(&[]), "");
}

// RFC 8247, RFC 8221: what a default offers, and only what they do not discourage.
#[test]
fn the_default_has_what_the_rfcs_require_and_nothing_that_needs_a_warning() {
    for protocol in [Protocol::IKE, Protocol::ESP] {
        let default = parse_proposals("default", protocol).unwrap();
        assert_eq!(warnings(&default), [""; 0]);
        let all = |kind| default.iter().flat_map(|proposal| ids(proposal, kind)).collect::<Vec<u16>>();
        for id in [Encr::AES_CBC.0, Encr::AES_GCM_16.0, Encr::CHACHA20_POLY1305.0] {
            assert!(all(TransformType::ENCR).contains(&id), "{id}");
        }
        for id in [Integ::HMAC_SHA2_256_128.0, Integ::HMAC_SHA2_512_256.0] {
            assert!(all(TransformType::INTEG).contains(&id), "{id}");
        }
        for id in [Ke::MODP_2048.0, Ke::ECP_256.0, Ke::X25519.0] {
            assert!(all(TransformType::KE).contains(&id), "{id}");
        }
        assert!(!all(TransformType::INTEG).contains(&Integ::HMAC_SHA1_96.0));
        assert!(!all(TransformType::PRF).contains(&Prf::HMAC_SHA1.0));
        // Combined modes before others, and a short key exchange before long ones.
        assert_eq!(all(TransformType::ENCR)[0], Encr::AES_GCM_16.0);
        assert_eq!(all(TransformType::KE)[0], Ke::X25519.0);
    }
    let prfs = ids(&ike("default")[0], TransformType::PRF);
    assert_eq!(prfs, [Prf::HMAC_SHA2_256.0, Prf::HMAC_SHA2_384.0, Prf::HMAC_SHA2_512.0]);
}

#[test]
fn weak_algorithms_are_served_when_named_and_warned_of() {
    for (text, protocol, reason) in [
        ("null-sha256", Protocol::ESP, "RFC 8221 §5"),
        ("aes128gmac", Protocol::ESP, "RFC 4543 §1"),
        ("aes128ccm8", Protocol::ESP, "RFC 8221 §5"),
        ("aes128gcm8-prfsha256-x25519", Protocol::IKE, "RFC 8221 §5"),
        ("aes128gcm12-prfsha256-x25519", Protocol::IKE, "RFC 8221 §5"),
        ("aes128gcm16-prfsha1-x25519", Protocol::IKE, "RFC 8247 §2.2"),
        ("aes128-sha1", Protocol::ESP, "RFC 8247 §2.3"),
        ("aes128gcm16-prfsha256-mlkem768", Protocol::IKE, "RFC 9370 §2"),
    ] {
        let warnings = warnings(&parse_proposals(text, protocol).unwrap());
        assert_eq!(warnings.len(), 1, "{text}: {warnings:?}");
        assert!(warnings[0].contains(reason), "{text}: {warnings:?}");
    }
    // Each reason once; IKE's integrity algorithm and the PRF that comes with it are two.
    let twice = [ike("aes128-aes256-sha1-modp2048"), ike("aes192-sha1-modp2048")].concat();
    assert_eq!(warnings(&twice).len(), 2);
    for text in ["aes256ccm16-prfaescmac-modp8192", "aes128ctr-sha256-ecp256", "aes128gcm16-prfsha256-mlkem512"] {
        assert_eq!(warnings(&ike(text)), [""; 0], "{text}");
    }
    assert_eq!(warnings(&esp("aes128gcm16-mlkem768")), [""; 0]);
}

// RFC 8784 §6
#[test]
fn keys_below_256_bits_are_short_for_a_ppk() {
    for text in ["aes256gcm16-prfsha384-ecp384", "aes256-sha512-modp4096", "chacha20poly1305-prfsha256-x25519"] {
        assert!(!has_short_keys(&ike(text)), "{text}");
    }
    for text in [
        "aes128gcm16-prfsha384-x25519",
        "aes256-aes192-sha256-x25519",
        "aes256-sha1-modp2048",
        "aes256gcm16-prfaescmac-x25519",
    ] {
        assert!(has_short_keys(&ike(text)), "{text}");
    }
    assert!(!has_short_keys(&esp("aes256gcm16-x25519")) && has_short_keys(&esp("aes256gcm16,aes128gcm16")));
    assert!(has_short_keys(&esp("null-sha256")) && has_short_keys(&esp("aes256-aescmac")));
}

// RFC 8247 §2.1, RFC 4543 §3: not even if both sides name them.
#[test]
fn an_ike_sa_is_never_without_encryption() {
    let mut null = ike("aes128-sha256-x25519");
    null[0].transforms[0] = Transform::new(TransformType::ENCR, Encr::NULL.0);
    assert_eq!(select_ike(&null, &null, true, None), None);
    let mut gmac = ike("aes128gcm16-prfsha256-x25519");
    gmac[0].transforms[0].id = Encr::NULL_AUTH_AES_GMAC.0;
    assert_eq!(select_ike(&gmac, &gmac, true, None), None);
}

#[test]
fn every_algorithm_that_has_a_name_makes_a_suite() {
    for cipher in ["aes128ctr-sha256", "aes192ccm8", "aes256ccm12", "aes128ccm16", "aes256gcm8", "aes192gcm12"] {
        for rest in ["prfaescmac-modp6144", "prfsha512-modp8192", "prfsha256-mlkem512", "prfsha256-ecp384bp"] {
            let offered = ike(&format!("{cipher}-{rest}"));
            let choice = select_ike(&offered, &offered, true, None).unwrap();
            assert_eq!(accept_ike(&[choice.proposal], &offered), Some(choice.suite));
        }
    }
    for text in ["null-sha256", "null-aescmac", "aes128gmac", "aes256gmac", "aes192ctr-aescmac-esn", "aes256ccm16"] {
        let offered = esp(text);
        let choice = select_esp(&offered, &offered, true, false, None).unwrap();
        let suite = choice.suite;
        assert!(Protection::key_lengths(suite.encr, suite.key_bits, suite.integ).is_some(), "{text}");
        // RFC 7296 §3.3.5: a Key Length only where the cipher has several.
        let attribute = choice.proposal.transforms[0].key_bits;
        assert_eq!(attribute.is_none(), suite.encr == Encr::NULL);
    }
}
