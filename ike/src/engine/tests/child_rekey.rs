//! Rekeying Child SAs, message by message (RFC 7296 §1.3.3, §2.8, §2.8.1, §2.25.1).

use ChildState::{Deleted, Deleting, Installed, Rekeyed, Rekeying};

use super::by_hand::{NONCES, loser, with_every_fault};
use super::refusals::ask;
use super::*;
use crate::sa::channel::Received;
use crate::wire::Payload;

/// One Child SA is left, of the right maker, and no packet was lost.
fn assert_winner(mut pair: Pair, winner: usize) {
    pair.assert_comes_to_rest(1, 1);
    pair.assert_no_loss();
    assert!(pair.sides[winner].done(2));
    let child = pair.live(winner).id;
    let made = |event: &Event| matches!(event, Event::ChildRekeyed { new, .. } if *new == child);
    assert!(pair.sides[winner].events.iter().any(made), "the other side's successor is left");
    for side in &pair.sides {
        assert!(side.failed(2).is_none());
    }
}

fn by_hand(seed: u64) -> Pair {
    Pair::by_hand(seed).with_traffic()
}

fn both_rekey(seed: u64, nonces: &[u8; 4]) -> Pair {
    let mut pair = by_hand(seed);
    pair.rekey_child(A, nonces[0]);
    pair.rekey_child(B, nonces[1]);
    pair
}

#[test]
fn regular() {
    for side in [A, B] {
        let mut pair = by_hand(1);
        pair.rekey_child(side, 0x80);
        assert_eq!(pair.children(side), [Rekeying]);
        pair.pass(side);
        assert_eq!(pair.children(1 - side), [Rekeyed, Installed]);
        pair.pass(1 - side);
        assert_eq!(pair.children(side), [Deleting, Installed]);
        pair.pass(side);
        // It still receives what is under way.
        assert_eq!(pair.children(1 - side), [Deleted, Installed]);
        pair.pass(1 - side);
        assert_eq!(pair.children(side), [Deleted, Installed]);
        assert_winner(pair, side);
    }
}

/// Sides that each begin with a method that the other one does not take.
fn with_other_methods(seed: u64) -> Pair {
    let of = |side: usize, groups: &str| {
        let mut connection = connection(side);
        let mut child = (*connection.children[0]).clone();
        child.esp_proposals = parse_proposals(&format!("aes128gcm16-{groups}"), Protocol::ESP).unwrap();
        connection.children = vec![Arc::new(child)];
        connection
    };
    let (a, b) = (of(A, "ecp256-x25519"), of(B, "ecp384-x25519"));
    established(Pair::with(seed, EngineConfig::default(), a, b)).taken_by_hand().with_traffic()
}

// RFC 7296 §1.3: INVALID_KE_PAYLOAD names the method to use.
#[test]
fn regular_ke_invalid() {
    for side in [A, B] {
        let mut pair = with_other_methods(2);
        pair.rekey_child(side, 0x80);
        pair.pass(side);
        assert_eq!(pair.children(1 - side), [Installed], "refused");
        pair.pass(1 - side);
        pair.pass(side);
        assert_eq!(pair.children(1 - side), [Rekeyed, Installed]);
        assert_winner(pair, side);
    }
}

// The answerer's volume limit is reached before the old one is deleted: nothing to do, it is replaced.
#[test]
fn regular_responder_ignore_soft_expire() {
    for side in [A, B] {
        let mut pair = by_hand(3);
        pair.rekey_child(side, 0x80);
        let old = pair.sides[1 - side].only().children[0].spi_in;
        pair.pass(side);
        let (answer, now) = (pair.take(1 - side), pair.now);
        pair.sides[1 - side].engine.handle_expire(now, old, false);
        pair.drain(1 - side);
        assert!(!pair.has_sent(1 - side));
        pair.give(&answer, 0x80);
        assert_winner(pair, side);
    }
}

// At the hard limit the answerer deletes the old one, which crosses the asker's Delete.
#[test]
fn regular_responder_handle_hard_expire() {
    for side in [A, B] {
        let mut pair = by_hand(4);
        pair.rekey_child(side, 0x80);
        let old = pair.sides[1 - side].only().children[0].spi_in;
        pair.pass(side);
        pair.pass(1 - side);
        let now = pair.now;
        pair.without_traffic();
        pair.sides[1 - side].engine.handle_expire(now, old, true);
        pair.drain(1 - side);
        assert_eq!(pair.children(1 - side), [Deleting, Installed]);
        assert_eq!(pair.children(side), [Deleting, Installed]);
        pair.pass_all();
        assert_winner(pair, side);
    }
}

// The answerer is told to close the Child SA when it has answered and the answer is on its way: the successor goes, and
// the old one too.
#[test]
fn regular_responder_delete() {
    for side in [A, B] {
        let mut pair = Pair::by_hand(5);
        pair.rekey_child(side, 0x80);
        pair.pass(side);
        let answer = pair.take(1 - side);
        pair.delete_child(1 - side);
        assert_eq!(pair.children(1 - side), [Rekeyed, Deleting]);
        // The Delete of what the asker does not know yet.
        pair.pass(1 - side);
        pair.give(&answer, 0x80);
        pair.pass_all();
        pair.let_go();
        pair.run(seconds(100));
        pair.assert_same(1, 1);
        assert_eq!(pair.children(side), [Installed], "the old one, on both sides");
    }
}

// RFC 7296 §2.25: the peer has it no longer: a new one from scratch, the IKE SA stays.
#[test]
fn regular_lost_sa() {
    for side in [A, B] {
        let mut pair = Pair::by_hand(6);
        let (child, now) = (pair.live(1 - side).id, pair.now);
        pair.sides[1 - side].engine.terminate(now, Target::Child(child), true, 9).unwrap();
        pair.drain(1 - side);
        let late = pair.take(1 - side);
        pair.rekey_child(side, 0x80);
        pair.pass(side);
        pair.pass(1 - side);
        assert!(pair.children(side).is_empty());
        pair.give(&late, 0x80);
        pair.assert_comes_to_rest(1, 1);
        assert!(pair.sides[side].done(2));
    }
}

// The asker deletes the successor and not the old one: the old one is used again.
#[test]
fn regular_incorrect_delete() {
    let mut pair = Pair::by_hand(7);
    pair.rekey_child(A, 0x80);
    pair.pass(A);
    assert_eq!(pair.children(B), [Rekeyed, Installed]);
    let answer = pair.take(B);
    let Ok(Incoming::Protected(protected)) = wire::parse(&answer.bytes) else { panic!("a protected answer") };
    let slot = pair.sides[A].engine.sas.values_mut().next().unwrap();
    let IkeSa::Established(sa) = &mut slot.sa else { panic!("an established IKE SA") };
    assert!(matches!(sa.channel.receive(protected, &answer.bytes), Received::Response(_)));
    let successor = pair.live(B);
    let wrong = Payload::Delete { protocol: Protocol::ESP, spis: vec![successor.spi_out] };
    let said = ask(&mut pair, ExchangeType::INFORMATIONAL, &[wrong]);
    assert_eq!(said.deletes, [(Protocol::ESP, vec![successor.spi_in])]);
    assert_eq!(pair.children(B), [Installed]);
}

// The asker never deletes the old one: the answerer does in the end.
#[test]
fn regular_delete_timeout() {
    for side in [A, B] {
        let mut pair = by_hand(8);
        pair.rekey_child(side, 0x80);
        pair.pass(side);
        assert_eq!(pair.children(1 - side), [Rekeyed, Installed]);
        let patience =
            retry::total(&EngineConfig::default().retransmission) + EngineConfig::default().half_open_timeout;
        pair.without_traffic();
        pair.held = None;
        pair.cut = true;
        pair.run(patience);
        assert_eq!(pair.children(1 - side)[0], Deleting);
    }
}

// RFC 7296 §2.8.1.
#[test]
fn collision() {
    for (seed, nonces) in NONCES.iter().enumerate() {
        let mut pair = both_rekey(seed as u64, nonces);
        pair.pass_with(A, nonces[2]);
        pair.pass_with(B, nonces[3]);
        pair.pass(B);
        pair.pass(A);
        let loser = loser(nonces);
        for side in [A, B] {
            let states = pair.children(side);
            assert_eq!(states.iter().filter(|state| **state == Installed).count(), 1, "{states:?}");
            assert_eq!(states.iter().filter(|state| **state == Deleting).count(), 1, "{states:?}");
            assert_eq!(states.iter().filter(|state| **state == Rekeyed).count(), 1, "{states:?}");
        }
        assert_winner(pair, 1 - loser);
    }
}

// The answer to A comes late: B has decided, A has not.
#[test]
fn collision_delayed_response() {
    for (seed, nonces) in NONCES.iter().enumerate() {
        let mut pair = both_rekey(seed as u64, nonces);
        pair.pass_with(A, nonces[2]);
        pair.pass_with(B, nonces[3]);
        let late = pair.take(B);
        pair.pass(A);
        // B's Delete, of the old one or of its redundant one, and the answer to it.
        pair.pass(B);
        pair.pass(A);
        pair.give(&late, 0x80);
        assert_winner(pair, 1 - loser(nonces));
    }
}

// The same, with B's Delete late too.
#[test]
fn collision_delayed_response_delete() {
    for (seed, nonces) in NONCES.iter().enumerate() {
        let mut pair = both_rekey(seed as u64, nonces);
        pair.pass_with(A, nonces[2]);
        pair.pass_with(B, nonces[3]);
        let late = pair.take(B);
        pair.pass(A);
        let delete = pair.take(B);
        pair.give(&late, 0x80);
        pair.give(&delete, 0x80);
        assert_winner(pair, 1 - loser(nonces));
    }
}

// RFC 7296 §2.8.1, the second sequence: A's request comes when B has finished and deleted the old one. B answers
// CHILD_SA_NOT_FOUND, which A, knowing of the collision, ignores.
#[test]
fn collision_delayed_request() {
    for nonces in &NONCES {
        let mut pair = both_rekey(9, nonces);
        let late = pair.take(A);
        pair.pass_with(B, nonces[3]);
        pair.pass(A);
        pair.pass(B);
        pair.pass(A);
        pair.give(&late, nonces[2]);
        pair.pass(B);
        assert_winner(pair, B);
    }
}

// The same while B's Delete is on its way: TEMPORARY_FAILURE.
#[test]
fn collision_delayed_request_more() {
    for nonces in &NONCES {
        let mut pair = both_rekey(10, nonces);
        let late = pair.take(A);
        pair.pass_with(B, nonces[3]);
        pair.pass(A);
        let delete = pair.take(B);
        pair.give(&late, nonces[2]);
        pair.pass(B);
        pair.give(&delete, 0x80);
        assert_winner(pair, B);
    }
}

// The refusal is late too: the old one is gone when it comes.
#[test]
fn collision_delayed_request_more_delete() {
    for nonces in &NONCES {
        let mut pair = both_rekey(11, nonces);
        let late = pair.take(A);
        pair.pass_with(B, nonces[3]);
        pair.pass(A);
        let delete = pair.take(B);
        pair.give(&late, nonces[2]);
        let refusal = pair.take(B);
        pair.give(&delete, 0x80);
        pair.pass(A);
        pair.run(seconds(2));
        pair.give(&refusal, 0x80);
        assert_winner(pair, B);
    }
}

#[test]
fn collision_ke_invalid() {
    for (seed, nonces) in NONCES.iter().enumerate() {
        let mut pair = with_other_methods(seed as u64);
        pair.rekey_child(A, 0x80);
        pair.rekey_child(B, 0x80);
        pair.pass(A);
        pair.pass(B);
        pair.pass_with(B, nonces[0]);
        pair.pass_with(A, nonces[1]);
        pair.pass_with(A, nonces[2]);
        pair.pass_with(B, nonces[3]);
        assert_winner(pair, 1 - loser(nonces));
    }
}

#[test]
fn collision_ke_invalid_delayed_retry() {
    for (seed, nonces) in NONCES.iter().enumerate() {
        let mut pair = with_other_methods(seed as u64);
        pair.rekey_child(A, 0x80);
        pair.rekey_child(B, 0x80);
        pair.pass(A);
        pair.pass(B);
        pair.pass_with(B, nonces[0]);
        pair.pass_with(A, nonces[1]);
        let late = pair.held.as_mut().unwrap().pop().unwrap();
        pair.pass_with(A, nonces[2]);
        pair.pass(B);
        pair.give(&late, nonces[3]);
        assert_winner(pair, A);
    }
}

// The winner deletes the wrong one, the other's answer is lost: whatever it means, both sides agree in the end.
#[test]
fn collision_responder_incorrect_delete() {
    for (seed, nonces) in NONCES.iter().enumerate() {
        let mut pair = both_rekey(seed as u64, nonces);
        pair.without_traffic();
        pair.pass_with(A, nonces[2]);
        pair.pass_with(B, nonces[3]);
        pair.pass(B);
        pair.pass(A);
        // B is told to close what it takes for the survivor while the Deletes cross.
        pair.delete_child(B);
        pair.pass_all();
        pair.let_go();
        pair.run(seconds(400));
        let left = pair.sides[A].installed.len();
        pair.assert_same(1, left);
        assert!(left <= 1);
    }
}

// Each datagram of a collision lost, repeated, late: one pair is left, and no packet was lost meanwhile.
#[test]
fn a_collision_survives_any_single_fault() {
    let check = |pair: Pair, _: &[u8; 4]| {
        pair.assert_same(1, 1);
        pair.assert_no_loss();
    };
    with_every_fault(both_rekey, check);
    let start = |seed, nonces: &[u8; 4]| {
        let mut pair = with_other_methods(seed);
        pair.rekey_child(A, nonces[0]);
        pair.rekey_child(B, nonces[1]);
        pair
    };
    with_every_fault(start, check);
}
