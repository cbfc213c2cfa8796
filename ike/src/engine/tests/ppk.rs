//! Post-quantum preshared keys (RFC 8784).

use super::init::{header, payloads};
use super::*;
use crate::wire::{NotifyType, Payload};

/// A side's PPKs by PPK_ID.
fn load(pair: &mut Pair, side: usize, ppks: &[(&str, &str)]) {
    let mut credentials = shared_key("correct horse");
    for (id, secret) in ppks {
        let owners = vec![IdentityPattern::parse(id).unwrap()];
        credentials.add_ppk(Some((*id).to_owned()), owners, Secret::new((*secret).into())).unwrap();
    }
    pair.sides[side].engine.set_ppks(credentials.ppks());
    pair.sides[side].credentials = credentials;
}

fn with_ppk(side: usize, id: Option<&str>, required: bool) -> Connection {
    let ppk_id = id.map(|id| IdentityPattern::parse(id).unwrap());
    Connection { ppk_id, ppk_required: required, ..connection(side) }
}

/// A names `a`; B has what it has. Gives the pair after it came up, or did not.
fn attempt(seed: u64, a: Connection, b: Connection, of_a: &[(&str, &str)], of_b: &[(&str, &str)]) -> Pair {
    let mut pair = Pair::with(seed, EngineConfig::default(), a, b);
    load(&mut pair, A, of_a);
    load(&mut pair, B, of_b);
    pair.initiate(A, 1);
    pair.run(seconds(3));
    pair
}

const KEY: (&str, &str) = ("ppk1", "a long secret that both have");

fn announces(pair: &Pair, side: usize) -> bool {
    payloads(&pair.sides[side].sent[0].bytes)
        .iter()
        .any(|payload| matches!(payload, Payload::Notify(n) if n.kind == NotifyType::USE_PPK && n.data.is_empty()))
}

fn sk_d(pair: &Pair, side: usize) -> Vec<u8> {
    let IkeSa::Established(sa) = &pair.sides[side].engine.sas.values().next().unwrap().sa else { panic!("up") };
    sa.channel.d.expose().to_vec()
}

// §3: both use it, and the Child SA's keys depend on it.
#[test]
fn a_ppk_is_mixed_into_the_keys() {
    let with =
        |ppks: &[(&str, &str)]| attempt(700, with_ppk(A, Some("ppk1"), false), with_ppk(B, None, false), ppks, ppks);
    let mut pair = with(&[KEY]);
    assert!(pair.sides[A].done(1));
    pair.assert_same(1, 1);
    assert!(announces(&pair, A) && announces(&pair, B));
    assert_eq!(sk_d(&pair, A), sk_d(&pair, B));
    // The same exchange with another PPK gives other keys, without one others again.
    let other = with(&[("ppk1", "another secret")]);
    let none = with(&[]);
    assert!(!announces(&none, A));
    assert_ne!(sk_d(&pair, A), sk_d(&other, A));
    assert_ne!(sk_d(&pair, A), sk_d(&none, A));
    assert_ne!(sk_d(&other, A), sk_d(&none, A));
    // Rekeys mix nothing in again, and work.
    pair.rekey_ike(B, 0x80);
    pair.run(seconds(60));
    pair.assert_same(1, 1);
}

// §3: SK_d = prf+(PPK, SK_d'), for PRFs with keys as long as their output prf(PPK, SK_d' | 0x01).
#[test]
fn the_mixed_key_is_as_the_formula_says() {
    use crate::crypto::{mix_ppk, prf};
    let (ppk, key) = (Secret::new(vec![1; 40]), Secret::new(vec![2; 32]));
    let algorithm = ipsec::transform::Prf::HMAC_SHA2_256;
    let mixed = mix_ppk(algorithm, &ppk, &key).unwrap();
    assert_eq!(mixed.expose(), prf(algorithm, ppk.expose(), &[key.expose(), &[1]]).unwrap().expose());
}

// §3, table 1, on the side of the responder.
#[test]
fn the_table_of_the_responder_holds() {
    let plain = || with_ppk(B, None, false);
    let required = || with_ppk(B, None, true);
    let optional_a = || with_ppk(A, Some("ppk1"), false);
    let required_a = || with_ppk(A, Some("ppk1"), true);
    let other = ("ppk2", "of somebody else");
    let up = |pair: &Pair| pair.sides[A].done(1) && pair.sides[B].up().len() == 1;
    // No USE_PPK: standard, unless it is mandatory.
    assert!(up(&attempt(710, connection(A), plain(), &[], &[KEY])));
    assert!(!up(&attempt(711, connection(A), required(), &[], &[KEY])));
    // USE_PPK, and the responder lacks that PPK: NO_PPK_AUTH helps, if neither insists.
    assert!(up(&attempt(712, optional_a(), plain(), &[KEY], &[other])));
    assert!(!up(&attempt(713, optional_a(), required(), &[KEY], &[other])));
    assert!(!up(&attempt(714, required_a(), plain(), &[KEY], &[other])));
    // It has it, and uses it.
    for (a, b) in [(optional_a(), plain()), (optional_a(), required()), (required_a(), plain())] {
        let pair = attempt(715, a, b, &[KEY], &[other, KEY]);
        assert!(up(&pair));
        pair.assert_same(1, 1);
    }
    // A responder without any PPK does not answer USE_PPK: standard, unless the initiator insists.
    assert!(up(&attempt(716, optional_a(), plain(), &[KEY], &[])));
    let mut pair = attempt(717, required_a(), plain(), &[KEY], &[]);
    assert!(!up(&pair));
    // Anybody could have answered so; it is believed in the end.
    pair.run(seconds(60));
    assert!(pair.sides[A].failed(1).unwrap().contains("PPK"));
    assert!(pair.sides[A].sent.iter().all(|sent| header(&sent.bytes).exchange.0 == 34), "no IKE_AUTH");
}

// §3, RFC 7296 §2.21.1: whoever takes USE_PPK out of the answer neither gets an IKE SA without one nor ends the attempt.
#[test]
fn a_stripped_answer_does_not_end_the_attempt() {
    let a = with_ppk(A, Some("ppk1"), true);
    let mut pair = Pair::with(760, EngineConfig::default(), a, with_ppk(B, None, true));
    load(&mut pair, A, &[KEY]);
    load(&mut pair, B, &[KEY]);
    pair.give_stripped_answer(NotifyType::USE_PPK);
    assert!(pair.sides[A].failed(1).is_none());
    pair.let_go();
    pair.run(seconds(30));
    assert!(pair.sides[A].done(1));
    pair.assert_same(1, 1);
}

// §3: a PPK that is unloaded between IKE_SA_INIT and IKE_AUTH is still required.
#[test]
fn nothing_goes_without_a_required_ppk_that_was_unloaded() {
    let a = with_ppk(A, Some("ppk1"), true);
    let mut pair = Pair::with(761, EngineConfig::default(), a, with_ppk(B, None, false));
    load(&mut pair, A, &[KEY]);
    load(&mut pair, B, &[KEY]);
    // A has B's answer, and its job for the shared secret takes a while.
    pair.job_delay = Duration::ZERO;
    pair.held = Some(Vec::new());
    pair.initiate(A, 1);
    pair.run(Duration::ZERO);
    pair.pass(A);
    pair.key_delay = seconds(1);
    pair.pass(B);
    let sa = pair.sides[A].engine.sas.values().next().map(|slot| &slot.sa);
    assert!(matches!(sa, Some(IkeSa::InitiatorIntermediate(_))));
    pair.let_go();
    pair.sides[A].engine.set_ppks(Vec::new());
    pair.run(seconds(10));
    assert!(pair.sides[A].failed(1).unwrap().contains("PPK"));
    assert!(pair.sides[A].sent.iter().all(|sent| header(&sent.bytes).exchange.0 == 34), "no IKE_AUTH");
}

// §3, table 1: USE_PPK, and then no PPK_IDENTITY.
#[test]
fn a_request_without_ppk_identity_is_refused() {
    let mut pair = Pair::with(762, EngineConfig::default(), with_ppk(A, Some("ppk1"), false), with_ppk(B, None, false));
    load(&mut pair, A, &[KEY]);
    load(&mut pair, B, &[KEY]);
    pair.job_delay = Duration::ZERO;
    pair.held = Some(Vec::new());
    pair.initiate(A, 1);
    pair.run(Duration::ZERO);
    pair.pass(A);
    pair.key_delay = seconds(1);
    pair.pass(B);
    pair.let_go();
    // A has said USE_PPK, and has none any more.
    pair.sides[A].engine.set_ppks(Vec::new());
    pair.run(seconds(10));
    assert!(pair.sides[B].logged("the peer names no PPK after USE_PPK"));
    assert!(pair.sides[A].failed(1).unwrap().contains("AUTHENTICATION_FAILED"));
    assert!(pair.sides[B].up().is_empty());
}

// §3: an answer without PPK_IDENTITY is one without the PPK, and that is not enough where it is required.
#[test]
fn an_answer_without_the_required_ppk_is_refused() {
    for required in [true, false] {
        let mut pair =
            Pair::with(763, EngineConfig::default(), with_ppk(A, Some("ppk1"), required), with_ppk(B, None, false));
        load(&mut pair, A, &[KEY]);
        load(&mut pair, B, &[KEY]);
        let id = crate::wire::Identification { kind: 2, data: b"b".to_vec() };
        pair.answer_ike_auth(&[Payload::IdResponder(id), Payload::Auth { method: 2, data: vec![1; 32] }]);
        assert!(pair.sides[A].up().is_empty());
        assert_eq!(pair.sides[A].failed(1).unwrap().contains("does without the PPK, which is required"), required);
        let told = pair.sides[A].sent.last().unwrap();
        assert_eq!(
            header(&told.bytes).exchange,
            ExchangeType::INFORMATIONAL,
            "AUTHENTICATION_FAILED (RFC 7296 §2.21.2)"
        );
    }
}

// §6: where a PPK is configured and was not used, the log says so, on both sides.
#[test]
fn a_ppk_that_was_not_used_is_logged() {
    let unused = |pair: &Pair, side: usize| pair.sides[side].logged("without the configured PPK");
    let optional = |side| with_ppk(side, Some("ppk1"), false);
    let none: [(&str, &str); 0] = [];
    // B has none: neither announced nor used.
    let pair = attempt(764, optional(A), with_ppk(B, None, false), &[KEY], &none);
    assert!(pair.sides[A].done(1) && unused(&pair, A) && !unused(&pair, B));
    // B has another one.
    let pair = attempt(765, optional(A), with_ppk(B, None, false), &[KEY], &[("ppk2", "of somebody else")]);
    assert!(pair.sides[A].done(1) && unused(&pair, A));
    // A has none.
    let pair = attempt(766, connection(A), optional(B), &none, &[KEY]);
    assert!(pair.sides[A].done(1) && unused(&pair, B) && !unused(&pair, A));
    let pair = attempt(767, optional(A), optional(B), &[KEY], &[KEY]);
    assert!(pair.sides[A].done(1) && !unused(&pair, A) && !unused(&pair, B));
}

// §3: a PPK that is not for the peer's connection is not known.
#[test]
fn a_ppk_of_another_connection_is_not_used() {
    let up = |pair: &Pair| pair.sides[A].done(1);
    let of_b = |id: &str, required| with_ppk(B, Some(id), required);
    let a = |required| with_ppk(A, Some("ppk1"), required);
    assert!(up(&attempt(720, a(true), of_b("ppk1", true), &[KEY], &[KEY])));
    assert!(up(&attempt(721, a(true), of_b("*", true), &[KEY], &[KEY])) || IdentityPattern::parse("*").is_err());
    assert!(!up(&attempt(722, a(true), of_b("ppk2", false), &[KEY], &[KEY])));
    assert!(!up(&attempt(723, a(false), of_b("ppk2", true), &[KEY], &[KEY])));
    // Optional on both sides: without it.
    let pair = attempt(724, a(false), of_b("ppk2", false), &[KEY], &[KEY]);
    assert!(up(&pair));
    pair.assert_same(1, 1);
}

// §3: another secret under the same name proves nothing, with or without NO_PPK_AUTH.
#[test]
fn a_wrong_ppk_gets_nobody_in() {
    for required in [false, true] {
        let a = with_ppk(A, Some("ppk1"), required);
        let pair = attempt(730, a, with_ppk(B, None, false), &[KEY], &[("ppk1", "wrong")]);
        assert!(pair.sides[A].failed(1).is_some());
        assert!(pair.sides[A].engine.sas.is_empty() && pair.sides[B].engine.sas.is_empty());
        assert!(pair.sides[A].installed.is_empty() && pair.sides[B].installed.is_empty());
    }
}

// A PPK is no shared key, nor the other way round.
#[test]
fn a_ppk_does_not_authenticate() {
    let mut credentials = Credentials::new();
    credentials.add_ppk(None, Vec::new(), Secret::new("correct horse".into())).unwrap();
    let mut pair = Pair::new(740);
    pair.sides[A].credentials = credentials;
    pair.initiate(A, 1);
    pair.run(seconds(3));
    assert!(pair.sides[A].failed(1).is_some());
}

// RFC 9370 §2.2.2 with RFC 8784: both.
#[test]
fn a_ppk_goes_with_additional_key_exchanges() {
    let of = |side: usize| {
        let proposals = parse_proposals("aes128gcm16-prfsha256-x25519-ke1_mlkem768", Protocol::IKE).unwrap();
        Connection { proposals, ..with_ppk(side, Some("ppk1"), true) }
    };
    let pair = attempt(750, of(A), of(B), &[KEY], &[KEY]);
    assert!(pair.sides[A].done(1));
    pair.assert_same(1, 1);
    assert_eq!(sk_d(&pair, A), sk_d(&pair, B));
}

// §4, §6: the first IKE SA's own messages are not protected by the PPK, those of its successor are.
#[test]
fn an_ike_sa_with_a_ppk_is_rekeyed_at_once_if_asked_for() {
    let rekeys = |asked_for: bool, of_b: &[(&str, &str)]| {
        let a = Connection { ppk_rekey: asked_for, ..with_ppk(A, Some("ppk1"), false) };
        let mut pair = attempt(730, a, with_ppk(B, None, false), &[KEY], of_b);
        pair.run(seconds(30));
        assert!(pair.sides[A].done(1));
        pair.assert_same(1, 1);
        let of = |side: &Side| side.events.iter().filter(|event| matches!(event, Event::IkeRekeyed { .. })).count();
        assert_eq!(of(&pair.sides[A]), of(&pair.sides[B]));
        of(&pair.sides[A])
    };
    assert_eq!(rekeys(true, &[KEY]), 1);
    assert_eq!(rekeys(false, &[KEY]), 0);
    assert_eq!(rekeys(true, &[]), 0, "the PPK was not used");
}
