//! IKE SAs without a Child SA in IKE_AUTH (RFC 6023), for each pair of policies.

use super::*;
use crate::config::Childless::{self, Allow, Force, Never, Prefer};
use crate::sa::init::CHILDLESS_IKEV2_SUPPORTED;
use crate::wire::Payload;

fn pair_of(seed: u64, a: Childless, b: Childless) -> Pair {
    let with = |side, childless| Connection { childless, ..connection(side) };
    Pair::with(seed, EngineConfig::default(), with(A, a), with(B, b))
}

fn announced(pair: &Pair) -> bool {
    let answer = init::payloads(&pair.sides[B].sent[0].bytes);
    answer.iter().any(|payload| matches!(payload, Payload::Notify(notify) if notify.kind == CHILDLESS_IKEV2_SUPPORTED))
}

// RFC 6023 §4.
#[test]
fn the_announcement_names_the_ike_sa() {
    let mut pair = pair_of(199, Allow, Allow);
    pair.initiate(A, 1);
    pair.run(seconds(3));
    let answer = init::payloads(&pair.sides[B].sent[0].bytes);
    let said = answer.iter().find_map(|payload| match payload {
        Payload::Notify(notify) if notify.kind == CHILDLESS_IKEV2_SUPPORTED => Some(notify.clone()),
        _ => None,
    });
    let said = said.unwrap();
    assert_eq!((said.protocol, said.spi, said.data), (Protocol::IKE, Vec::new(), Vec::new()));
}

/// CREATE_CHILD_SA requests that a side sent.
fn creates(pair: &Pair, side: usize) -> usize {
    let is = |sent: &&Transmit| sent.bytes[18] == ExchangeType::CREATE_CHILD_SA.0 && sent.bytes[19] & 0x20 == 0;
    pair.sides[side].sent.iter().filter(is).count()
}

// RFC 6023 §3: both agree, and the Child SA follows in an exchange of its own, with a key exchange of its own.
#[test]
fn the_child_comes_in_its_own_exchange_where_both_agree() {
    for (seed, a, b) in
        [(200, Prefer, Allow), (201, Prefer, Force), (202, Force, Allow), (203, Force, Prefer), (204, Force, Force)]
    {
        let mut pair = pair_of(seed, a, b);
        pair.initiate(A, 1);
        pair.run(seconds(3));
        assert!(pair.sides[A].done(1), "{a:?} {b:?}");
        assert!(announced(&pair));
        assert_eq!(creates(&pair, A), 1, "{a:?} {b:?}");
        pair.assert_same(1, 1);
    }
}

// RFC 6023 §3: with a key exchange for the Child SA alone.
#[test]
fn a_deferred_child_has_its_own_key_exchange() {
    let (mut a, mut b) = (connection(A), connection(B));
    for connection in [&mut a, &mut b] {
        let mut child = (*connection.children[0]).clone();
        child.esp_proposals = parse_proposals("aes128gcm16-x25519", Protocol::ESP).unwrap();
        connection.children = vec![Arc::new(child)];
    }
    a.childless = Prefer;
    let pair = established(Pair::with(205, EngineConfig::default(), a, b));
    assert_eq!(pair.sides[A].only().children[0].ke, Ke::X25519);
}

#[test]
fn the_child_comes_with_ike_auth_where_one_side_does_not_care_or_the_other_cannot() {
    for (seed, a, b) in
        [(210, Allow, Allow), (211, Allow, Prefer), (212, Prefer, Never), (213, Never, Prefer), (214, Never, Never)]
    {
        let mut pair = pair_of(seed, a, b);
        pair.initiate(A, 1);
        pair.run(seconds(3));
        assert!(pair.sides[A].done(1), "{a:?} {b:?}");
        assert_eq!(announced(&pair), b != Never, "{a:?} {b:?}");
        assert_eq!(creates(&pair, A), 0, "{a:?} {b:?}");
        pair.assert_same(1, 1);
    }
}

// RFC 6023 §3: "the initiator MUST NOT send the modified IKE_AUTH request if the notification was not present".
#[test]
fn an_initiator_that_must_be_childless_stops_before_ike_auth() {
    let mut pair = pair_of(220, Force, Never);
    pair.initiate(A, 1);
    // Anybody could have answered so; it is believed in the end.
    pair.run(seconds(60));
    assert_eq!(pair.sides[A].failed(1).as_deref(), Some("the peer does not support childless IKE_SA initiation"));
    assert!(pair.sides[A].sent.iter().all(|sent| sent.bytes[18] == ExchangeType::IKE_SA_INIT.0));
    pair.run(seconds(60));
    pair.assert_same(0, 0);
}

// RFC 7296 §2.21.1: an answer without the notification is no proof of anything.
#[test]
fn a_stripped_answer_does_not_end_the_attempt() {
    let mut pair = pair_of(224, Force, Allow);
    pair.give_stripped_answer(crate::sa::init::CHILDLESS_IKEV2_SUPPORTED);
    assert!(pair.sides[A].failed(1).is_none());
    pair.let_go();
    pair.run(seconds(30));
    assert!(pair.sides[A].done(1));
}

#[test]
fn a_responder_that_must_be_childless_refuses_a_child_in_ike_auth() {
    for (seed, a) in [(221, Allow), (222, Never)] {
        let mut pair = pair_of(seed, a, Force);
        pair.initiate(A, 1);
        pair.run(seconds(3));
        assert_eq!(pair.sides[A].failed(1).as_deref(), Some("received INVALID_SYNTAX notify error"));
        assert!(pair.sides[B].logged("the peer did not initiate a childless IKE_SA"));
        pair.assert_same(0, 0);
    }
}

// RFC 6023 §3: who is configured not to support it "SHOULD reply with an INVALID_SYNTAX Notify".
#[test]
fn a_childless_request_is_refused_where_it_was_not_announced() {
    let mut pair = pair_of(223, Allow, Never);
    // Its connection has no child that it could offer instead.
    let connection = Arc::clone(&pair.sides[A].engine.ctx.connections[0]);
    let childless = Arc::new(Connection { children: Vec::new(), ..(*connection).clone() });
    pair.sides[A].engine.set_connections(vec![Arc::clone(&childless)]);
    pair.initiate_child(A, childless, None, 1);
    pair.run(seconds(3));
    assert_eq!(pair.sides[A].failed(1).as_deref(), Some("received INVALID_SYNTAX notify error"));
    assert!(pair.sides[B].logged("the peer wants an IKE_SA without a CHILD_SA"));
    pair.assert_same(0, 0);
}

#[test]
fn without_a_child_an_ike_sa_is_childless_unless_never() {
    for (seed, a, b, children) in [(230, Allow, Allow, 0), (231, Never, Allow, 1), (232, Prefer, Never, 1)] {
        let mut pair = pair_of(seed, a, b);
        let connection = Arc::clone(&pair.sides[A].engine.ctx.connections[0]);
        pair.initiate_child(A, connection, None, 1);
        pair.run(seconds(3));
        assert!(pair.sides[A].done(1), "{a:?} {b:?}");
        pair.assert_same(1, children);
    }
}

// A refused child does not take the IKE SA with it, and a bad network loses nothing.
#[test]
fn a_deferred_child_survives_a_bad_network_and_its_refusal_spares_the_ike_sa() {
    for seed in 240..250 {
        let mut pair = pair_of(seed, Force, Force);
        (pair.loss, pair.duplication) = (20, 20);
        pair.initiate(A, 1);
        pair.run(seconds(200));
        assert!(pair.sides[A].done(1), "seed {seed}");
        pair.assert_same(1, 1);
    }
    let mut a = Connection { childless: Prefer, ..connection(A) };
    a.children = vec![Arc::new(child("net", "10.9.0.0/24", "10.2.0.0/24"))];
    let mut pair = Pair::with(251, EngineConfig::default(), a, connection(B));
    pair.initiate(A, 1);
    pair.run(seconds(3));
    assert!(pair.sides[A].failed(1).unwrap().contains("TS_UNACCEPTABLE"));
    pair.assert_same(1, 0);
}
