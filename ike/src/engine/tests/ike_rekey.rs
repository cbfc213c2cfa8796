//! Rekeying the IKE SA, message by message (RFC 7296 §2.8.2, §2.25.2).

use super::by_hand::{NONCES, loser, with_every_fault};
use super::*;

/// Both sides have asked for a successor, and nothing has arrived.
fn both_rekey(seed: u64, nonces: &[u8; 4]) -> Pair {
    let mut pair = Pair::by_hand(seed);
    pair.rekey_ike(A, nonces[0]);
    pair.rekey_ike(B, nonces[1]);
    pair
}

/// One IKE SA is left, it is the right one, and nothing was lost.
fn assert_winner(mut pair: Pair, winner: usize) {
    pair.assert_comes_to_rest(1, 1);
    pair.assert_no_loss();
    assert!(pair.sides[winner].only().initiator, "the other side's successor is left");
    assert!(pair.sides[winner].done(2));
    for side in &pair.sides {
        assert!(side.failed(2).is_none());
        let rekeyed = side.events.iter().filter(|event| matches!(event, Event::IkeRekeyed { .. }));
        assert_eq!(rekeyed.count(), 1);
    }
}

// RFC 7296 §2.8.2: both answer, the lowest of four nonces decides.
#[test]
fn collision() {
    for (seed, nonces) in NONCES.iter().enumerate() {
        let mut pair = both_rekey(seed as u64, nonces);
        pair.pass_with(A, nonces[2]);
        pair.pass_with(B, nonces[3]);
        for side in [A, B] {
            // Both have answered; nobody has moved.
            assert_eq!(pair.states(side), [IkeState::Rekeying]);
        }
        // B's answer, then A's.
        pair.pass(B);
        pair.pass(A);
        let loser = loser(nonces);
        for side in [A, B] {
            assert_eq!(pair.states(side).len(), 3, "the old one and two new ones");
            assert_eq!(pair.holder(side).initiator, side != loser);
        }
        assert_winner(pair, 1 - loser);
    }
}

// RFC 7296 §2.8.2: the peer has decided, and deletes the old IKE SA while we compute the key of our own successor. That
// one is at the peer, so we have to delete it all the same.
#[test]
fn a_delete_before_the_last_key_leaves_no_redundant_successor() {
    // A's successor has the lowest nonce.
    for (seed, nonces) in NONCES.iter().enumerate().filter(|(_, nonces)| loser(nonces) == A) {
        let mut pair = both_rekey(seed as u64, nonces);
        pair.pass_with(A, nonces[2]);
        pair.pass_with(B, nonces[3]);
        pair.key_delay = Duration::from_millis(500);
        pair.pass(B);
        pair.key_delay = Duration::ZERO;
        pair.pass(A);
        // The Delete, and a repetition of it, are here before the key.
        let delete = pair.take(B);
        pair.give(&delete, 0x80);
        pair.give(&delete, 0x80);
        assert!(!pair.has_sent(A), "no answer before it is decided");
        pair.run(seconds(1));
        pair.pass_all();
        for side in [A, B] {
            assert_eq!(pair.states(side), [IkeState::Established], "side {side}");
        }
        assert_winner(pair, B);
    }
}

/// A pair whose sides each begin a rekey with a method that the other does not take.
fn with_other_methods(seed: u64, a_too: bool, b_too: bool) -> Pair {
    let of = |side: usize, other: &str, too: bool| {
        let text = format!("aes128gcm16-prfsha256-x25519{}", if too { other } else { "" });
        Connection { proposals: parse_proposals(&text, Protocol::IKE).unwrap(), ..connection(side) }
    };
    let (a, b) = (of(A, "-ecp256", a_too), of(B, "-ecp384", b_too));
    let mut pair = established(Pair::with(seed, EngineConfig::default(), a, b));
    for (side, method, too) in [(A, 19, a_too), (B, 20, b_too)] {
        let slot = pair.sides[side].engine.sas.values_mut().next().unwrap();
        if let (IkeSa::Established(sa), true) = (&mut slot.sa, too) {
            sa.channel.suite.ke = Ke(method);
        }
    }
    pair.taken_by_hand()
}

// RFC 7296 §1.3.2, §2.8: the Child SAs move, who rekeyed deletes.
#[test]
fn regular() {
    for side in [A, B] {
        let mut pair = Pair::by_hand(1);
        pair.rekey_ike(side, 0x80);
        assert_eq!(pair.states(side), [IkeState::Rekeying]);
        pair.pass(side);
        assert_eq!(pair.states(1 - side), [IkeState::Rekeyed, IkeState::Established]);
        assert!(!pair.holder(1 - side).initiator);
        pair.pass(1 - side);
        assert_eq!(pair.states(side), [IkeState::Deleting, IkeState::Established]);
        pair.pass(side);
        assert_eq!(pair.states(1 - side), [IkeState::Established]);
        assert_winner(pair, side);
    }
}

// RFC 7296 §1.3: the method that the peer asks for.
#[test]
fn regular_ke_invalid() {
    for side in [A, B] {
        let mut pair = with_other_methods(2, side == A, side == B);
        pair.rekey_ike(side, 0x80);
        pair.pass(side);
        assert_eq!(pair.states(1 - side), [IkeState::Established], "refused");
        pair.pass(1 - side);
        pair.pass(side);
        assert_eq!(pair.states(1 - side), [IkeState::Rekeyed, IkeState::Established]);
        assert_winner(pair, side);
    }
}

#[test]
fn collision_ke_invalid() {
    for (seed, nonces) in NONCES.iter().enumerate() {
        let mut pair = with_other_methods(seed as u64, true, true);
        pair.rekey_ike(A, 0x80);
        pair.rekey_ike(B, 0x80);
        pair.pass(A);
        pair.pass(B);
        // Both refusals; both ask again.
        pair.pass_with(B, nonces[0]);
        pair.pass_with(A, nonces[1]);
        pair.pass_with(A, nonces[2]);
        pair.pass_with(B, nonces[3]);
        for side in [A, B] {
            assert_eq!(pair.states(side), [IkeState::Rekeying]);
        }
        pair.pass_all();
        assert_winner(pair, 1 - loser(nonces));
    }
}

// B asks again when A has already finished.
#[test]
fn collision_ke_invalid_delayed_retry() {
    for nonces in &NONCES {
        let mut pair = with_other_methods(3, true, true);
        pair.rekey_ike(A, 0x80);
        pair.rekey_ike(B, 0x80);
        pair.pass(A);
        pair.pass(B);
        pair.pass_with(B, nonces[0]);
        pair.pass_with(A, nonces[1]);
        let late = pair.held.as_mut().unwrap().pop().unwrap();
        assert_eq!(late.to, A);
        // A's new request, B's answer: A has not noticed, so its successor stands whatever the nonces.
        pair.pass_with(A, nonces[2]);
        pair.pass(B);
        pair.give(&late, nonces[3]);
        assert_eq!(pair.states(A)[0], IkeState::Deleting);
        assert_winner(pair, A);
    }
}

// B's answer comes after everything else of the exchange.
#[test]
fn collision_delayed_response() {
    for (seed, nonces) in NONCES.iter().enumerate() {
        let mut pair = both_rekey(seed as u64, nonces);
        pair.pass_with(A, nonces[2]);
        pair.pass_with(B, nonces[3]);
        let late = pair.take(B);
        // A's answer: B decides.
        pair.pass(A);
        let winner = 1 - loser(nonces);
        assert_eq!(pair.holder(B).initiator, winner == B);
        assert_eq!(pair.states(A), [IkeState::Rekeying]);
        if winner == A {
            // A hears nothing of B's redundant successor before it has decided.
            pair.pass(B);
            assert!(!pair.has_sent(A));
            pair.give(&late, 0x80);
        } else {
            // The old IKE SA goes: that decides for A.
            pair.pass(B);
            assert_eq!(pair.states(A), [IkeState::Established]);
            assert!(!pair.holder(A).initiator);
            pair.give(&late, 0x80);
        }
        assert_winner(pair, winner);
    }
}

// A's request never arrives: B finishes and deletes, and A forgets its own.
#[test]
fn collision_dropped_request() {
    for nonces in &NONCES {
        let mut pair = both_rekey(4, nonces);
        pair.take(A);
        pair.pass_with(B, nonces[3]);
        assert_eq!(pair.states(A), [IkeState::Rekeying]);
        pair.pass(A);
        assert_eq!(pair.states(B), [IkeState::Deleting, IkeState::Established]);
        pair.pass(B);
        assert_eq!(pair.states(A), [IkeState::Established]);
        assert_winner(pair, B);
    }
}

// A's request arrives when B has finished: TEMPORARY_FAILURE, and A takes B's successor.
#[test]
fn collision_delayed_request() {
    for nonces in &NONCES {
        let mut pair = both_rekey(5, nonces);
        let late = pair.take(A);
        pair.pass_with(B, nonces[3]);
        pair.pass(A);
        pair.give(&late, nonces[2]);
        let delete = pair.take(B);
        pair.pass(B);
        assert_eq!(pair.states(A), [IkeState::Rekeyed, IkeState::Established]);
        pair.give(&delete, 0x80);
        assert_eq!(pair.states(A), [IkeState::Established]);
        assert_winner(pair, B);
    }
}

// The same, with the Delete first: the refusal comes to nobody.
#[test]
fn collision_delayed_request_and_delete() {
    for nonces in &NONCES {
        let mut pair = both_rekey(6, nonces);
        let late = pair.take(A);
        pair.pass_with(B, nonces[3]);
        pair.pass(A);
        pair.pass(B);
        assert_eq!(pair.states(A), [IkeState::Established]);
        pair.give(&late, nonces[2]);
        assert_winner(pair, B);
    }
}

/// A rekeys and B deletes at once.
fn rekey_and_delete(seed: u64) -> Pair {
    let mut pair = Pair::by_hand(seed);
    pair.rekey_ike(A, 0x80);
    let (ike, now) = (pair.sides[B].only().id, pair.now);
    pair.sides[B].engine.terminate(now, Target::Ike(ike), false, 3).unwrap();
    pair.drain(B);
    pair
}

// RFC 7296 §2.25.2: a rekey of what is being closed fails, a delete of what is being rekeyed does not.
#[test]
fn collision_delete() {
    let mut pair = rekey_and_delete(7);
    pair.pass(A);
    assert_eq!(pair.states(B), [IkeState::Deleting]);
    pair.pass(B);
    assert!(pair.states(A).is_empty());
    pair.assert_comes_to_rest(0, 0);
    assert!(pair.sides[A].down(CloseReason::Peer) && pair.sides[B].down(CloseReason::Local));
    assert!(pair.sides[A].failed(2).is_some() && pair.sides[B].done(3));
}

#[test]
fn collision_delete_drop_delete() {
    let mut pair = rekey_and_delete(8);
    pair.take(B);
    pair.pass(A);
    // B's refusal: A would ask again later.
    pair.pass(B);
    assert_eq!(pair.states(A), [IkeState::Established]);
    pair.assert_comes_to_rest(0, 0);
    assert!(pair.sides[B].done(3));
}

// The one that loses its Delete on the way for good is forgotten by the other side.
#[test]
fn a_redundant_successor_that_nobody_deletes_is_forgotten() {
    for (seed, nonces) in NONCES.iter().enumerate() {
        let mut pair = both_rekey(seed as u64, nonces);
        pair.pass_with(A, nonces[2]);
        pair.pass_with(B, nonces[3]);
        pair.pass(B);
        pair.pass(A);
        pair.cut = true;
        pair.let_go();
        let patience =
            retry::total(&EngineConfig::default().retransmission) + EngineConfig::default().half_open_timeout;
        pair.run(patience + seconds(1));
        for side in [A, B] {
            assert_eq!(pair.states(side), [IkeState::Established]);
        }
        pair.assert_same(1, 1);
    }
}

// Each datagram of a collision lost, repeated, late.
#[test]
fn a_collision_survives_any_single_fault() {
    let check = |pair: Pair, _: &[u8; 4]| {
        pair.assert_same(1, 1);
        pair.assert_no_loss();
    };
    with_every_fault(both_rekey, check);
}

#[test]
fn a_rekey_and_a_delete_survive_any_single_fault() {
    with_every_fault(|seed, _| rekey_and_delete(seed), |pair, _| pair.assert_same(0, 0));
}

// RFC 7296 §2.8.2: over a stream nothing is lost, repeated or overtaken.
#[test]
fn collision_over_a_stream() {
    for seed in 0..20 {
        let mut a = connection(A);
        a.tcp = TcpPolicy::Yes;
        let mut pair = established(Pair::with(seed, EngineConfig::default(), a, connection(B)));
        pair.delay.0 = Duration::from_millis(400);
        for side in [A, B] {
            pair.rekey_ike(side, (seed * 13) as u8);
        }
        pair.run(seconds(100));
        pair.assert_same(1, 1);
        pair.assert_no_loss();
    }
}

// An IKE SA that is forced down while both sides rekey it leaves nothing behind; a peer that cannot be told (the window
// is taken, and the successor not known yet) finds out by itself.
#[test]
fn forced_down_in_a_collision() {
    for (seed, nonces) in NONCES.iter().enumerate() {
        let of = |side: usize| Connection { dpd_delay: seconds(30), ..connection(side) };
        let pair = Pair::with(seed as u64, EngineConfig::default(), of(A), of(B));
        let mut pair = established(pair).taken_by_hand();
        pair.rekey_ike(A, nonces[0]);
        pair.rekey_ike(B, nonces[1]);
        pair.pass_with(A, nonces[2]);
        pair.pass_with(B, nonces[3]);
        // B has decided, A has not.
        pair.take(B);
        pair.pass(A);
        let (ike, now) = (pair.sides[A].only().id, pair.now);
        pair.sides[A].engine.terminate(now, Target::Ike(ike), true, 3).unwrap();
        pair.drain(A);
        assert!(pair.states(A).is_empty());
        pair.pass_all();
        pair.let_go();
        pair.run(seconds(400));
        assert!(pair.sides[A].engine.ctx.own_spis() == 0);
        pair.assert_same(0, 0);
    }
}
