//! Key exchanges of CREATE_CHILD_SA and IKE_FOLLOWUP_KE (RFC 9370 §2.2.4): rekeys of both kinds, collisions of several
//! round trips, and what is not a step of any of them.

use ipsec::secret::Secret;

use super::by_hand::{NONCES, with_every_fault};
use super::init::header;
use super::intermediate::{Script, expand, prf, script, tell, with_proposals};
use super::*;
use crate::crypto::KeyExchange;
use crate::sa::fault::notify;
use crate::sa::parts::Parts;
use crate::wire::{Notify, NotifyType, Payload, WireSelector};

const HYBRID: &str = "aes128gcm16-prfsha256-x25519-ke1_mlkem768";
const HYBRID_ESP: &str = "aes128gcm16-x25519-ke1_mlkem768-ke2_ecp256";

fn hybrid(side: usize) -> Connection {
    let mut connection = with_proposals(side, HYBRID);
    let mut child = (*connection.children[0]).clone();
    child.esp_proposals = parse_proposals(HYBRID_ESP, Protocol::ESP).unwrap();
    connection.children = vec![Arc::new(child)];
    connection
}

/// Established, without IKE fragments.
fn hybrid_up(seed: u64) -> Pair {
    let config = EngineConfig { fragment_size: 60_000, ..EngineConfig::default() };
    established(Pair::with(seed, config, hybrid(A), hybrid(B)))
}

fn exchanges(pair: &Pair, side: usize, from: usize) -> Vec<u8> {
    pair.sides[side].sent[from..].iter().map(|sent| header(&sent.bytes).exchange.0).collect()
}

fn rekey_child(pair: &mut Pair, side: usize, nonce: u8) {
    pair.sides[side].nonce.set(nonce);
    let now = pair.now;
    let child = pair.sides[side].only().children[0].id;
    pair.sides[side].engine.rekey(now, Target::Child(child), 2).unwrap();
    pair.drain(side);
}

#[test]
fn either_side_rekeys_the_ike_sa_with_several_key_exchanges() {
    for side in [A, B] {
        let mut pair = hybrid_up(500);
        let before = pair.sides[side].sent.len();
        pair.rekey_ike(side, 0x80);
        pair.run(seconds(60));
        pair.assert_same(1, 1);
        pair.assert_no_loss();
        assert!(pair.sides[side].done(2));
        assert_eq!(exchanges(&pair, side, before), [36, 44, 37]);
        for side in [A, B] {
            let suite = pair.sides[side].only().suite.unwrap();
            assert_eq!(suite.additional.iter().collect::<Vec<_>>(), [(1, Ke::ML_KEM_768)]);
        }
        // The new keys work, in both directions.
        rekey_child(&mut pair, A, 0x80);
        pair.run(seconds(60));
        rekey_child(&mut pair, B, 0x80);
        pair.run(seconds(60));
        pair.assert_same(1, 1);
    }
}

#[test]
fn either_side_makes_and_rekeys_child_sas_with_several_key_exchanges() {
    for side in [A, B] {
        let mut pair = hybrid_up(501);
        let before = pair.sides[side].sent.len();
        rekey_child(&mut pair, side, 0x80);
        pair.run(seconds(60));
        pair.assert_same(1, 1);
        pair.assert_no_loss();
        assert_eq!(exchanges(&pair, side, before), [36, 44, 44, 37]);
        pair.initiate(side, 3);
        pair.run(seconds(60));
        pair.assert_same(1, 2);
        for side in [A, B] {
            for child in pair.sides[side].only().children {
                let additional: Vec<_> = child.additional.iter().collect();
                assert_eq!((child.ke, additional), (Ke::X25519, vec![(1, Ke::ML_KEM_768), (2, Ke::ECP_256)]));
            }
        }
    }
}

// RFC 7296 §2.8: lifetimes, a bad network, slow key exchanges.
#[test]
fn lifetimes_rekey_with_several_key_exchanges_on_a_bad_network() {
    for seed in 0..10 {
        let of = |side: usize| {
            let mut connection = hybrid(side);
            (connection.rekey_time, connection.rand_time) = (seconds(300), seconds(100));
            let mut child = (*connection.children[0]).clone();
            (child.rekey_time, child.rand_time) = (seconds(200), seconds(100));
            connection.children = vec![Arc::new(child)];
            connection
        };
        let mut pair = established(Pair::with(510 + seed, EngineConfig::default(), of(A), of(B)));
        pair.loss = seed;
        pair.duplication = 10;
        pair.delay.0 = Duration::from_millis(200);
        pair.key_delay = Duration::from_millis(300);
        pair.run(seconds(3000));
        pair.loss = 0;
        pair.run(seconds(190));
        assert_eq!(pair.sides[A].up().len(), 1, "seed {seed}");
        pair.assert_no_loss();
    }
}

// RFC 7296 §2.8.1, RFC 9370 §2.2.4: each datagram lost, repeated or late, each order of nonces.
#[test]
fn a_collision_of_child_rekeys_survives_any_single_fault() {
    let both = |seed: u64, nonces: &[u8; 4]| {
        let mut pair = hybrid_up(seed).taken_by_hand();
        rekey_child(&mut pair, A, nonces[0]);
        rekey_child(&mut pair, B, nonces[1]);
        pair
    };
    let check = |pair: Pair, _: &[u8; 4]| {
        pair.assert_same(1, 1);
        pair.assert_no_loss();
    };
    with_every_fault(both, check);
}

// RFC 7296 §2.8.2, RFC 9370 §2.2.4.
#[test]
fn a_collision_of_ike_rekeys_survives_any_single_fault() {
    let both = |seed: u64, nonces: &[u8; 4]| {
        let mut pair = hybrid_up(seed).taken_by_hand();
        pair.rekey_ike(A, nonces[0]);
        pair.rekey_ike(B, nonces[1]);
        pair
    };
    let check = |pair: Pair, _: &[u8; 4]| {
        pair.assert_same(1, 1);
        pair.assert_no_loss();
    };
    with_every_fault(both, check);
}

// RFC 7296 §2.25.2: one side rekeys the IKE SA, the other the Child SA.
#[test]
fn a_collision_of_both_kinds_survives_any_single_fault() {
    let both = |seed: u64, nonces: &[u8; 4]| {
        let mut pair = hybrid_up(seed).taken_by_hand();
        pair.rekey_ike(A, nonces[0]);
        rekey_child(&mut pair, B, nonces[1]);
        pair
    };
    with_every_fault(both, |pair, _| pair.assert_same(1, 1));
}

// One side has additional key exchanges to offer, the other has none: the series are of different lengths.
#[test]
fn mixed_collisions_come_to_rest() {
    let plain = "aes128gcm16-x25519,aes128gcm16-x25519-ke1_mlkem512";
    for (seed, nonces) in NONCES.iter().enumerate() {
        let of = |side: usize, esp: &str| {
            let mut connection = hybrid(side);
            let mut child = (*connection.children[0]).clone();
            let proposals = esp.split(',').flat_map(|one| parse_proposals(one, Protocol::ESP).unwrap());
            child.esp_proposals = proposals.collect();
            connection.children = vec![Arc::new(child)];
            connection
        };
        let config =
            EngineConfig { fragment_size: 60_000, prefer_configured_proposals: false, ..EngineConfig::default() };
        let both = "aes128gcm16-x25519-ke1_mlkem512,aes128gcm16-x25519";
        let mut pair = established(Pair::with(seed as u64, config, of(A, plain), of(B, both))).taken_by_hand();
        rekey_child(&mut pair, A, nonces[0]);
        rekey_child(&mut pair, B, nonces[1]);
        pair.pass_with(A, nonces[2]);
        pair.pass_with(B, nonces[3]);
        pair.assert_comes_to_rest(1, 1);
        pair.assert_no_loss();
    }
}

// Whatever the order of commands, delays and losses: both sides have the same in the end, and nothing leaks.
#[test]
fn any_order_of_commands_with_several_key_exchanges_gives_the_same_sas() {
    for seed in 0..80 {
        let of = |side: usize| Connection { dpd_delay: seconds(30), ..hybrid(side) };
        let mut pair = established(Pair::with(600 + seed, EngineConfig::default(), of(A), of(B)));
        pair.loss = pair.rng.below(10);
        pair.duplication = pair.rng.below(30);
        pair.delay.0 = Duration::from_millis(pair.rng.below(800));
        pair.job_delay = Duration::from_millis(pair.rng.below(800));
        pair.key_delay = Duration::from_millis(pair.rng.below(800));
        for token in 10..30 {
            let side = pair.rng.below(2) as usize;
            seeds::command(&mut pair, side, token);
            let wait = Duration::from_millis(pair.rng.below(3000));
            pair.run(wait);
        }
        pair.loss = 0;
        pair.run(seconds(600));
        let ikes = pair.sides[A].up().len();
        let children = pair.sides[A].installed.len();
        pair.assert_same(ikes, children);
        for side in &pair.sides {
            let states = side.up().into_iter().flat_map(|sa| sa.children).map(|child| child.state);
            assert!(states.into_iter().all(|state| state == ChildState::Installed), "seed {seed}");
        }
    }
}

/// An established IKE SA whose initiator is played by hand.
fn by_script(seed: u64, esp: &str) -> (Pair, Script) {
    let (mut pair, mut script) = script(seed, "aes128gcm16-prfsha256-x25519-ke1_mlkem512");
    let mut connection = (*pair.sides[B].engine.ctx.connections[0]).clone();
    let mut child = (*connection.children[0]).clone();
    child.esp_proposals = parse_proposals(esp, Protocol::ESP).unwrap();
    connection.children = vec![Arc::new(child)];
    pair.sides[B].engine.set_connections(vec![Arc::new(connection)]);
    script.intermediate(&mut pair, Ke::ML_KEM_512);
    script.authenticate(&mut pair).unwrap();
    (pair, script)
}

const NONCE: [u8; 32] = [9; 32];

/// CREATE_CHILD_SA with X25519 for a Child SA.
fn create(script: &mut Script, pair: &mut Pair, esp: &str) -> (KeyExchange, Parts) {
    let ke = KeyExchange::generate(Ke::X25519, &mut TestRng(11)).unwrap();
    let mut proposals = parse_proposals(esp, Protocol::ESP).unwrap();
    for (number, proposal) in (1..).zip(&mut proposals) {
        (proposal.number, proposal.spi) = (number, vec![0, 0, 4, number]);
    }
    let selector = |net: &str| match network(net) {
        ConfiguredSelector::Fixed(selector) => vec![WireSelector::Address(selector)],
        ConfiguredSelector::Dynamic { .. } => panic!("a network"),
    };
    let payloads = [
        Payload::Sa(proposals),
        Payload::Nonce(NONCE.to_vec()),
        Payload::Ke { group: Ke::X25519, data: ke.public().to_vec() },
        Payload::TsInitiator(selector("10.1.0.0/24")),
        Payload::TsResponder(selector("10.2.0.0/24")),
    ];
    let answer = script.ask(pair, ExchangeType::CREATE_CHILD_SA, &payloads).expect("an answer");
    assert!(answer.error().is_none(), "{:?}", answer.error());
    (ke, answer)
}

fn link_of(answer: &Parts) -> Option<Vec<u8>> {
    answer.notify(NotifyType::ADDITIONAL_KEY_EXCHANGE).map(|link| link.data.clone())
}

fn followup(script: &mut Script, pair: &mut Pair, method: Ke, link: &[u8]) -> (KeyExchange, Parts) {
    let ke = KeyExchange::generate(method, &mut TestRng(12)).unwrap();
    let payloads = [
        Payload::Ke { group: method, data: ke.public().to_vec() },
        notify(NotifyType::ADDITIONAL_KEY_EXCHANGE, link.to_vec()),
    ];
    let answer = script.ask(pair, ExchangeType::IKE_FOLLOWUP_KE, &payloads).expect("an answer");
    (ke, answer)
}

fn agree((ke, answer): (KeyExchange, &Parts)) -> Secret {
    ke.agree(&answer.ke.as_ref().expect("KEr").1).unwrap()
}

// RFC 9370 §2.2.4: KEYMAT = prf+(SK_d, SK(0) | Ni | Nr | SK(1) | SK(2)), by hand.
#[test]
fn child_keys_are_as_the_formula_says() {
    let (mut pair, mut script) = by_script(520, HYBRID_ESP);
    let (ke, created) = create(&mut script, &mut pair, HYBRID_ESP);
    let first = agree((ke, &created));
    assert!(pair.sides[B].installed.is_empty(), "nothing before the last key exchange");
    let link = link_of(&created).expect("a link");
    let (ke, second) = followup(&mut script, &mut pair, Ke::ML_KEM_768, &link);
    let next = link_of(&second).expect("a link");
    assert_ne!(link, next);
    let second = agree((ke, &second));
    assert!(pair.sides[B].installed.is_empty());
    let (ke, third) = followup(&mut script, &mut pair, Ke::ECP_256, &next);
    assert_eq!(link_of(&third), None, "the last one");
    let third = agree((ke, &third));
    let sk_d = script.channel.as_ref().unwrap().d.expose().to_vec();
    let seed = [first.expose(), &NONCE, &created.nonce.unwrap(), second.expose(), third.expose()].concat();
    let keymat = expand(&sk_d, &seed, 40);
    let installed: Vec<&Installed> = pair.sides[B].installed.values().collect();
    assert_eq!(installed.len(), 1);
    assert_eq!(installed[0].keys_in, keymat[..20]);
    assert_eq!(installed[0].keys_out, keymat[20..]);
}

// RFC 9370 §2.2.4: SKEYSEED = prf(SK_d, SK(0) | Ni | Nr | SK(1)), by hand; the new IKE SA answers.
#[test]
fn rekeyed_ike_keys_are_as_the_formula_says() {
    let (mut pair, mut script) = by_script(521, "aes128gcm16");
    let ke = KeyExchange::generate(Ke::X25519, &mut TestRng(11)).unwrap();
    let mut proposals = parse_proposals("aes128gcm16-prfsha256-x25519-ke1_mlkem512", Protocol::IKE).unwrap();
    for proposal in &mut proposals {
        (proposal.number, proposal.spi) = (1, 0x77_u64.to_be_bytes().to_vec());
    }
    let payloads = [
        Payload::Sa(proposals),
        Payload::Nonce(NONCE.to_vec()),
        Payload::Ke { group: Ke::X25519, data: ke.public().to_vec() },
    ];
    let answer = script.ask(&mut pair, ExchangeType::CREATE_CHILD_SA, &payloads).expect("an answer");
    let first = agree((ke, &answer));
    let (ke, last) = followup(&mut script, &mut pair, Ke::ML_KEM_512, &link_of(&answer).expect("a link"));
    let second = agree((ke, &last));
    let nr = answer.nonce.unwrap();
    let sk_d = script.channel.as_ref().unwrap().d.expose().to_vec();
    let skeyseed = prf(&sk_d, &[first.expose(), &NONCE, &nr, second.expose()]);
    let spi_r = u64::from_be_bytes(answer.sa.unwrap()[0].spi.clone().try_into().unwrap());
    script.moves_to(&skeyseed, (0x77, spi_r), (&NONCE, &nr));
    assert!(script.ask(&mut pair, ExchangeType::INFORMATIONAL, &[]).is_some());
}

fn left(pair: &Pair) -> (usize, usize) {
    (pair.sides[B].up().len(), pair.sides[B].engine.ctx.child_spis.len())
}

// RFC 9370 §2.2.4: STATE_NOT_FOUND for what we do not know; it is not fatal, and nothing changes.
#[test]
fn a_followup_without_its_state_gets_state_not_found() {
    let (mut pair, mut script) = by_script(522, HYBRID_ESP);
    let not_found = |answer: Parts| {
        let notify: Vec<&Notify> = answer.notifies.iter().collect();
        assert!(matches!(&notify[..], [n] if n.kind == NotifyType::STATE_NOT_FOUND && n.data.is_empty()));
        assert!(answer.ke.is_none());
    };
    // Of nothing at all.
    not_found(followup(&mut script, &mut pair, Ke::ML_KEM_768, b"link").1);
    assert_eq!(left(&pair), (1, 0));
    // With another link than ours, or none.
    let (_, created) = create(&mut script, &mut pair, HYBRID_ESP);
    let link = link_of(&created).unwrap();
    not_found(followup(&mut script, &mut pair, Ke::ML_KEM_768, b"").1);
    let data = KeyExchange::generate(Ke::ML_KEM_768, &mut TestRng(12)).unwrap().public().to_vec();
    let without = [Payload::Ke { group: Ke::ML_KEM_768, data }];
    not_found(script.ask(&mut pair, ExchangeType::IKE_FOLLOWUP_KE, &without).unwrap());
    // The right one still goes; the same again does not, nor after the end.
    let (_, second) = followup(&mut script, &mut pair, Ke::ML_KEM_768, &link);
    let next = link_of(&second).unwrap();
    not_found(followup(&mut script, &mut pair, Ke::ML_KEM_768, &link).1);
    let (_, third) = followup(&mut script, &mut pair, Ke::ECP_256, &next);
    assert!(third.error().is_none());
    not_found(followup(&mut script, &mut pair, Ke::ECP_256, &next).1);
    assert_eq!((left(&pair), pair.sides[B].installed.len()), ((1, 1), 1));
}

// RFC 9370 §2.2.4: what the initiator does not go on with is forgotten after a while.
#[test]
fn a_half_made_sa_is_forgotten() {
    let (mut pair, mut script) = by_script(523, HYBRID_ESP);
    let (_, created) = create(&mut script, &mut pair, HYBRID_ESP);
    assert_eq!(left(&pair), (1, 1));
    pair.run(seconds(31));
    assert_eq!(left(&pair), (1, 0));
    let (_, late) = followup(&mut script, &mut pair, Ke::ML_KEM_768, &link_of(&created).unwrap());
    assert!(late.has(NotifyType::STATE_NOT_FOUND));
    // One at a time: what is begun next takes its place.
    let (_, first) = create(&mut script, &mut pair, HYBRID_ESP);
    let (_, second) = create(&mut script, &mut pair, HYBRID_ESP);
    assert_eq!(left(&pair), (1, 1));
    let (_, old) = followup(&mut script, &mut pair, Ke::ML_KEM_768, &link_of(&first).unwrap());
    assert!(old.has(NotifyType::STATE_NOT_FOUND));
    let (_, new) = followup(&mut script, &mut pair, Ke::ML_KEM_768, &link_of(&second).unwrap());
    assert!(new.error().is_none());
}

// CVE-2026-78133, RFC 9370 §2.2.4: IKE_FOLLOWUP_KE without KE, with another method or with junk.
#[test]
fn a_followup_without_its_key_exchange_is_refused() {
    let ecp = KeyExchange::generate(Ke::ECP_256, &mut TestRng(7)).unwrap().public().to_vec();
    let wrong: [Vec<Payload>; 4] = [
        Vec::new(),
        vec![Payload::Ke { group: Ke::ECP_256, data: ecp }],
        vec![Payload::Ke { group: Ke::ML_KEM_768, data: vec![0xff; 1184] }],
        vec![Payload::Ke { group: Ke::ML_KEM_768, data: Vec::new() }],
    ];
    for mut payloads in wrong {
        let (mut pair, mut script) = by_script(524, HYBRID_ESP);
        let (_, created) = create(&mut script, &mut pair, HYBRID_ESP);
        payloads.push(notify(NotifyType::ADDITIONAL_KEY_EXCHANGE, link_of(&created).unwrap()));
        let answer = script.ask(&mut pair, ExchangeType::IKE_FOLLOWUP_KE, &payloads).expect("an answer");
        assert!(answer.has(NotifyType::INVALID_SYNTAX));
        assert!(pair.sides[B].engine.sas.is_empty() && pair.sides[B].installed.is_empty());
        assert!(pair.sides[B].engine.ctx.child_spis.is_empty() && pair.sides[B].engine.ctx.jobs.is_empty());
    }
}

// RFC 7296 §2.1: a repeated request gets the same octets, and no second step.
#[test]
fn a_repeated_followup_gets_the_same_answer() {
    let (mut pair, mut script) = by_script(525, HYBRID_ESP);
    let (_, created) = create(&mut script, &mut pair, HYBRID_ESP);
    let before = pair.sides[B].sent.len();
    let (_, second) = followup(&mut script, &mut pair, Ke::ML_KEM_768, &link_of(&created).unwrap());
    let answers: Vec<Vec<u8>> = pair.sides[B].sent[before..].iter().map(|sent| sent.bytes.clone()).collect();
    assert_eq!(tell(&mut pair, &script.last[0].clone()), answers);
    let (_, third) = followup(&mut script, &mut pair, Ke::ECP_256, &link_of(&second).unwrap());
    assert!(third.error().is_none());
    assert_eq!(pair.sides[B].installed.len(), 1);
}

// RFC 9370 §2.2.4: an initiator that gets STATE_NOT_FOUND tries the whole series again; in the end it is fatal.
#[test]
fn a_responder_that_forgets_too_early_ends_the_ike_sa() {
    for ike in [false, true] {
        let mut pair = hybrid_up(526);
        pair.sides[B].engine.ctx.config.half_open_timeout = Duration::from_millis(1);
        if ike {
            pair.rekey_ike(A, 0x80);
        } else {
            rekey_child(&mut pair, A, 0x80);
        }
        pair.run(seconds(2));
        assert!(pair.sides[A].logged("received STATE_NOT_FOUND notify error"));
        assert_eq!(pair.sides[A].up().len(), 1, "not fatal at once");
        pair.run(seconds(600));
        pair.assert_same(0, 0);
        assert!(pair.sides[A].failed(2).is_some());
        // In time again, it works.
        let mut pair = hybrid_up(527);
        pair.sides[B].engine.ctx.config.half_open_timeout = Duration::from_millis(1);
        pair.rekey_ike(A, 0x80);
        pair.run(seconds(2));
        pair.sides[B].engine.ctx.config.half_open_timeout = seconds(30);
        pair.run(seconds(600));
        pair.assert_same(1, 1);
        assert!(pair.sides[A].done(2));
    }
}

/// A rekeys; B's answer to the request of this exchange type is ours, under B's keys.
fn answered_with(ike: bool, exchange: u8, payloads: &[Payload]) -> Pair {
    let mut pair = hybrid_up(530);
    if ike {
        pair.rekey_ike(A, 0x80);
    } else {
        rekey_child(&mut pair, A, 0x80);
    }
    pair.key_delay = Duration::from_millis(200);
    let mut answer = None;
    for _ in 0..3000 {
        pair.run(Duration::from_millis(1));
        let asked = pair.sides[A].sent.last().is_some_and(|sent| sent.bytes[18] == exchange);
        let slot = pair.sides[B].engine.sas.values_mut().next();
        if let (true, Some(IkeSa::Established(sa))) = (asked, slot.map(|slot| &mut slot.sa)) {
            answer = sa.channel.respond(payloads, None, &mut TestRng(3));
        }
        if answer.is_some() {
            break;
        }
    }
    let path = pair.sides[A].only().path;
    let now = pair.now;
    pair.sides[A].engine.handle_message(now, path, &answer.expect("B was asked")[0]);
    pair.drain(A);
    pair.run(seconds(2));
    pair
}

// RFC 9370 §2.2.4: answers that are no step of the series fail it, and leave nothing behind.
#[test]
fn an_initiator_takes_no_other_answer_than_the_next_key_exchange() {
    let link = || notify(NotifyType::ADDITIONAL_KEY_EXCHANGE, vec![1; 8]);
    let wrong: [Vec<Payload>; 5] = [
        Vec::new(),
        vec![link()],
        vec![Payload::Ke { group: Ke::ML_KEM_768, data: vec![0; 1088] }],
        vec![Payload::Ke { group: Ke::ML_KEM_768, data: vec![0; 1087] }, link()],
        vec![Payload::Ke { group: Ke::X25519, data: vec![9; 32] }, link()],
    ];
    for payloads in wrong {
        let pair = answered_with(false, 44, &payloads);
        assert!(pair.sides[A].failed(2).is_some(), "{payloads:?}");
        let children = pair.sides[A].only().children;
        assert!(matches!(&children[..], [child] if child.state == ChildState::Installed));
        assert_eq!(pair.sides[A].engine.ctx.child_spis.len(), 1);
    }
    // The IKE SA's has one additional key exchange: without a successor that both have, the end.
    for payloads in [Vec::new(), vec![Payload::Ke { group: Ke::ML_KEM_768, data: vec![0; 1087] }]] {
        let pair = answered_with(true, 44, &payloads);
        assert!(pair.sides[A].failed(2).is_some());
        assert!(pair.sides[A].engine.sas.is_empty() && pair.sides[A].engine.ctx.own_spis() == 0);
    }
    let pair = answered_with(true, 44, &[notify(NotifyType::NO_PROPOSAL_CHOSEN, Vec::new())]);
    assert!(pair.sides[A].failed(2).is_some());
    assert_eq!((pair.sides[A].up().len(), pair.sides[A].engine.ctx.own_spis()), (1, 1));
}

// Jobs of an IKE SA that ends while they run are dropped, and what was reserved is free again.
#[test]
fn what_ends_in_the_middle_leaves_nothing_behind() {
    for side in [A, B] {
        for ike in [false, true] {
            for step in 0..25 {
                let mut pair = hybrid_up(540);
                pair.key_delay = Duration::from_millis(40);
                if ike {
                    pair.rekey_ike(A, 0x80);
                } else {
                    rekey_child(&mut pair, A, 0x80);
                }
                pair.run(Duration::from_millis(12 * step));
                let now = pair.now;
                for status in pair.sides[side].engine.ike_sas(now) {
                    pair.sides[side].engine.terminate(now, Target::Ike(status.id), true, 7).unwrap();
                }
                pair.drain(side);
                pair.run(seconds(600));
                for here in &pair.sides {
                    assert!(here.engine.ctx.jobs.is_empty());
                    assert_eq!(here.engine.ctx.child_spis.len(), here.installed.len());
                    assert_eq!(here.engine.ctx.own_spis(), here.engine.sas.len());
                }
                assert!(pair.sides[side].engine.sas.is_empty());
            }
        }
    }
}
