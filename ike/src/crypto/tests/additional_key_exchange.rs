//! Negotiation of additional key exchanges (RFC 9370 §2.2.1).

use ipsec::transform::{Proposal, Protocol, Transform, TransformType};

use super::*;

const ADDKE1: TransformType = TransformType(6);
const ADDKE2: TransformType = TransformType(7);
const PREFIX: &str = "aes256gcm16-prfsha384";

fn ike(methods: &str) -> Vec<Proposal> {
    let texts = methods.split(',').map(|methods| format!("{PREFIX}-{methods}"));
    let mut proposals: Vec<Proposal> = texts.flat_map(|text| parse_proposals(&text, Protocol::IKE).unwrap()).collect();
    renumber(&mut proposals);
    proposals
}

fn esp(methods: &str) -> Vec<Proposal> {
    let mut proposals = parse_proposals(&format!("aes256gcm16-{methods}"), Protocol::ESP).unwrap();
    for proposal in &mut proposals {
        proposal.spi = vec![1, 2, 3, 4];
    }
    proposals
}

fn refused(methods: &str, protocol: Protocol) -> String {
    parse_proposals(&format!("{PREFIX}-{methods}"), protocol).unwrap_err().reason
}

/// First and additional key exchanges that a responder chooses.
fn chosen(offered: &str, configured: &str, ours_first: bool) -> Option<(Ke, Vec<(u8, Ke)>)> {
    let suite = select_ike(&ike(offered), &ike(configured), ours_first, None)?.suite;
    Some((suite.ke, suite.additional.iter().collect()))
}

#[test]
fn what_is_no_additional_key_exchange_is_refused() {
    for (word, reason) in [
        ("ke0_x25519", "unknown keyword \"ke0_x25519\""),
        ("ke8_x25519", "unknown keyword \"ke8_x25519\""),
        ("ke01_x25519", "unknown keyword \"ke01_x25519\""),
        ("ke1x25519", "unknown keyword \"ke1x25519\""),
        ("ke1_", "\"ke1_\" does not name a key exchange method that we have"),
        ("ke1_x448", "\"ke1_x448\" does not name a key exchange method that we have"),
        ("ke1_aes128", "\"ke1_aes128\" does not name a key exchange method that we have"),
        ("ke1_ke2_x25519", "\"ke1_ke2_x25519\" does not name a key exchange method that we have"),
    ] {
        assert_eq!(refused(&format!("ecp256-{word}"), Protocol::IKE), reason);
    }
}

#[test]
fn key_exchanges_that_could_not_differ_are_refused() {
    let reason = "the key exchanges must each have a method of their own";
    for methods in [
        "x25519-ke1_x25519",
        "x25519-ke1_mlkem768-ke2_mlkem768",
        "x25519-mlkem768-ke1_x25519-ke2_mlkem768",
        "x25519-ecp256-ke1_mlkem512-ke1_mlkem768-ke2_mlkem512-ke2_mlkem768-ke3_mlkem768",
    ] {
        assert_eq!(refused(methods, Protocol::IKE), reason, "{methods}");
    }
    for methods in ["ke1_mlkem768", "none-ke1_mlkem768"] {
        assert_eq!(refused(methods, Protocol::ESP), "an additional key exchange needs a first one", "{methods}");
        assert_eq!(refused(methods, Protocol::IKE), "a key exchange method is missing", "{methods}");
    }
}

#[test]
fn keywords_give_the_transform_types_of_the_number() {
    let [proposal] = &ike("ecp384-ke7_mlkem1024-ke1_mlkem768-ke1_none-ke2_none")[..] else { panic!() };
    let additional: Vec<&Transform> = proposal.transforms.iter().filter(|t| t.kind.is_additional_ke()).collect();
    assert_eq!(
        additional,
        [
            &Transform::new(ADDKE1, 36),
            &Transform::new(ADDKE1, 0),
            // An additional key exchange that is never done is not worth a peer that does not know the type.
            &Transform::new(TransformType(12), 37),
        ]
    );
}

// §2.2.1: who does not know the transform type, or does not want it, refuses the proposal.
#[test]
fn a_required_additional_key_exchange_is_never_left_out() {
    assert_eq!(chosen("x25519-ke1_mlkem768", "x25519", true), None);
    assert_eq!(chosen("x25519", "x25519-ke1_mlkem768", true), None);
    assert_eq!(chosen("x25519-ke1_mlkem768", "x25519-ke1_mlkem1024", true), None);
    assert_eq!(chosen("x25519-ke1_mlkem768", "x25519-ke2_mlkem768", true), None);
    // The next proposal can do without.
    assert_eq!(chosen("x25519-ke1_mlkem768,ecp256", "x25519,ecp256", true), Some((Ke::ECP_256, vec![])));
}

// §2.2.1: NONE makes it optional.
#[test]
fn an_optional_additional_key_exchange_is_chosen_by_preference() {
    let both = Some((Ke::X25519, vec![(1, Ke::ML_KEM_768)]));
    let first = Some((Ke::X25519, vec![]));
    assert_eq!(chosen("x25519-ke1_mlkem768-ke1_none", "x25519", true), first);
    assert_eq!(chosen("x25519", "x25519-ke1_mlkem768-ke1_none", true), first);
    assert_eq!(chosen("x25519-ke1_mlkem768-ke1_none", "x25519-ke1_mlkem768", true), both);
    assert_eq!(chosen("x25519-ke1_none-ke1_mlkem768", "x25519-ke1_mlkem768-ke1_none", true), both);
    assert_eq!(chosen("x25519-ke1_none-ke1_mlkem768", "x25519-ke1_mlkem768-ke1_none", false), first);
}

// §2.2.1: the same method is not chosen twice; what was offered may have it twice.
#[test]
fn the_same_method_is_never_chosen_twice() {
    let twice = "x25519-mlkem768-ke1_mlkem768-ke1_x25519-ke2_mlkem768-ke2_x25519-ke2_none";
    assert_eq!(chosen(twice, twice, true), Some((Ke::X25519, vec![(1, Ke::ML_KEM_768)])));

    // An earlier one gives way where a later one would have nothing left.
    let crossed = "ecp256-ke1_mlkem512-ke1_mlkem768-ke2_mlkem512-ke2_mlkem768-ke3_mlkem512-ke3_x25519";
    let only_512 = "ecp256-ke1_mlkem512-ke1_mlkem768-ke2_mlkem512-ke3_x25519";
    assert_eq!(
        chosen(crossed, only_512, true),
        Some((Ke::ECP_256, vec![(1, Ke::ML_KEM_768), (2, Ke::ML_KEM_512), (3, Ke::X25519)]))
    );
    // The first one too.
    assert_eq!(
        chosen("mlkem768-x25519-ke1_mlkem768", "mlkem768-x25519-ke1_mlkem768", true),
        Some((Ke::X25519, vec![(1, Ke::ML_KEM_768)]))
    );
}

#[test]
fn an_offer_where_the_methods_could_not_differ_is_refused() {
    let configured = ike("x25519-ke1_mlkem768-ke1_mlkem512-ke2_mlkem768-ke2_mlkem512");
    let mut offered = configured.clone();
    offered[0].transforms.retain(|t| !t.kind.is_additional_ke() || t.id == 36);
    assert_eq!(select_ike(&offered, &configured, true, None), None);

    // All seven with the same few methods, from both sides: an answer, and at once.
    let many: Vec<Transform> = TransformType::ADDITIONAL_KE
        .iter()
        .flat_map(|kind| [14, 15, 16, 19, 20, 21].map(|id| Transform::new(*kind, id)))
        .collect();
    let mut crowded = ike("x25519");
    crowded[0].transforms.extend(many);
    assert_eq!(select_ike(&crowded, &crowded, true, None), None);
}

// RFC 7296 §3.3.6, for the new types as well: a Key Length is no attribute of a key exchange.
#[test]
fn a_method_with_an_attribute_that_it_does_not_have_is_not_chosen() {
    let configured = ike("x25519-ke1_mlkem768");
    for spoil in [|t: &mut Transform| t.key_bits = Some(128), |t: &mut Transform| t.unknown_attribute = true] {
        let mut offered = configured.clone();
        offered[0].transforms.iter_mut().filter(|t| t.kind == ADDKE1).for_each(spoil);
        assert_eq!(select_ike(&offered, &configured, true, None), None);
    }
}

#[test]
fn the_answer_has_one_transform_of_each_type_and_the_initiator_accepts_it() {
    let offered = ike("x25519-ecp256-ke1_mlkem768-ke1_mlkem1024-ke3_mlkem512-ke3_none");
    let configured = ike("ecp256-ke1_mlkem1024-ke3_none");
    let choice = select_ike(&offered, &configured, true, None).unwrap();
    let kinds: Vec<u8> = choice.proposal.transforms.iter().map(|t| t.kind.0).collect();
    assert_eq!(kinds, [1, 2, 4, 6, 8]);
    assert_eq!(accept_ike(&[choice.proposal], &offered), Some(choice.suite));
    assert_eq!(choice.suite.additional.iter().collect::<Vec<_>>(), [(1, Ke::ML_KEM_1024)]);
    assert_eq!(choice.suite.additional.of(ADDKE1), Some(Ke::ML_KEM_1024));
    assert_eq!(choice.suite.additional.of(ADDKE2), Some(Ke::NONE));
    assert_eq!(choice.suite.additional.of(TransformType::KE), None);
    assert!(!choice.suite.additional.is_none());
    assert_eq!(names::additional_ke(1, Ke::ML_KEM_1024), "KE1_ML_KEM_1024");
}

// §2.2.1: an initiator that is answered with the same method twice, or with less than it asked for, refuses.
#[test]
fn an_answer_that_breaks_the_rules_is_refused() {
    let offered = ike("x25519-mlkem768-ke1_mlkem768-ke1_mlkem512-ke2_mlkem768-ke2_mlkem512");
    let right = select_ike(&offered, &offered, true, None).unwrap().proposal;
    assert!(accept_ike(std::slice::from_ref(&right), &offered).is_some());
    let changed = |change: &dyn Fn(&mut Vec<Transform>)| {
        let mut answer = right.clone();
        change(&mut answer.transforms);
        accept_ike(&[answer], &offered)
    };
    let set =
        |kind, id| move |ts: &mut Vec<Transform>| ts.iter_mut().filter(|t| t.kind == kind).for_each(|t| t.id = id);
    // Twice the same.
    assert_eq!(changed(&set(ADDKE2, 36)), None);
    assert_eq!(changed(&set(TransformType::KE, 36)), None);
    // Not offered: NONE, another method, another number.
    assert_eq!(changed(&set(ADDKE1, 0)), None);
    assert_eq!(changed(&set(ADDKE1, 37)), None);
    assert_eq!(changed(&|ts| ts.retain(|t| t.kind != ADDKE2)), None);
    assert_eq!(changed(&|ts| ts.push(Transform::new(TransformType(8), 35))), None);
    // Two of one type.
    assert_eq!(changed(&|ts| ts.push(Transform::new(ADDKE1, 35))), None);
}

#[test]
fn a_child_sa_has_additional_key_exchanges_only_with_a_first_one() {
    let choose = |offered: &str, configured: &str| {
        let choice = select_esp(&esp(offered), &esp(configured), true, true, None)?;
        Some((choice.ke, choice.additional.iter().collect::<Vec<_>>()))
    };
    let full = Some((Ke::X25519, vec![(1, Ke::ML_KEM_768)]));
    assert_eq!(choose("none-x25519-ke1_mlkem768", "none-x25519-ke1_mlkem768"), full);
    let optional = "none-x25519-ke1_mlkem768-ke1_none";
    assert_eq!(choose(optional, optional), Some((Ke::NONE, vec![])));
    let choice = select_esp(&esp("x25519-ke1_mlkem768"), &esp("x25519-ke1_mlkem768"), true, true, None).unwrap();
    let accepted =
        accept_esp(&[Proposal { spi: vec![4, 3, 2, 1], ..choice.proposal }], &esp("x25519-ke1_mlkem768"), true);
    assert_eq!(accepted, Some((choice.suite, choice.ke, choice.additional)));
}

// RFC 7296 §1.2: the Child SA of IKE_AUTH has no key exchange of its own, additional ones neither.
#[test]
fn a_child_sa_of_ike_auth_has_none() {
    let configured = esp("x25519-ke1_mlkem768");
    let stripped = without_ke(&configured);
    assert!(
        stripped.iter().flat_map(|p| &p.transforms).all(|t| t.kind < TransformType::KE || t.kind == TransformType::SN)
    );
    let choice = select_esp(&stripped, &configured, true, false, None).unwrap();
    assert_eq!((choice.ke, choice.additional), (Ke::NONE, AdditionalKe::NONE));
    assert_eq!(choice.proposal.transforms, stripped[0].transforms);
}

// §2.2.1: with a peer that has not announced IKE_INTERMEDIATE.
#[test]
fn proposals_can_be_had_without_additional_key_exchanges() {
    let configured = ike("x25519-ke1_mlkem768,ecp256-ke1_mlkem768-ke1_none,ecp384");
    let without = without_additional_ke(&configured);
    assert_eq!(without.iter().map(|p| p.number).collect::<Vec<_>>(), [2, 3]);
    assert_eq!(without[0].transforms, ike("ecp256")[0].transforms);
    assert_eq!(without[1], Proposal { number: 3, ..ike("ecp384")[0].clone() });
}
