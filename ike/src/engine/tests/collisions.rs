//! Exchanges of different kinds that cross, message by message (RFC 7296 §2.25).

use ChildState::{Deleting, Installed, Rekeying};

use super::by_hand::with_every_fault;
use super::*;

fn assert_left(mut pair: Pair, ikes: usize, children: usize) {
    pair.assert_comes_to_rest(ikes, children);
}

/// B wants another Child SA.
fn create_child(pair: &mut Pair, side: usize) {
    let connection = Arc::clone(&pair.sides[side].engine.ctx.connections[0]);
    let child = connection.children.first().cloned();
    pair.initiate_child(side, connection, child, 4);
}

fn rekey_and_delete(seed: u64) -> Pair {
    let mut pair = Pair::by_hand(seed);
    pair.rekey_child(A, 0x80);
    pair.delete_child(B);
    pair
}

mod child_rekey {
    use super::*;

    // RFC 7296 §2.25.1: a rekey of what is being closed gets TEMPORARY_FAILURE; a delete of what is being rekeyed is
    // answered as usual.
    #[test]
    fn collision_delete() {
        let mut pair = rekey_and_delete(1);
        assert_eq!((pair.children(A), pair.children(B)), (vec![Rekeying], vec![Deleting]));
        pair.pass(A);
        pair.pass(B);
        assert!(pair.children(A).is_empty());
        pair.pass(B);
        pair.pass(A);
        assert_left(pair, 1, 0);
    }

    #[test]
    fn collision_delete_drop_delete() {
        let mut pair = rekey_and_delete(2);
        pair.take(B);
        pair.pass(A);
        pair.pass(B);
        // Refused; later it would be tried again, but the Delete is repeated first.
        assert_eq!(pair.children(A), [Installed]);
        assert_left(pair, 1, 0);
    }

    // RFC 4718 §5.11.5: the rekey comes when the Child SA is gone.
    #[test]
    fn collision_delete_drop_rekey() {
        let mut pair = rekey_and_delete(3);
        pair.take(A);
        pair.pass(B);
        pair.pass(A);
        assert!(pair.children(A).is_empty() && pair.children(B).is_empty());
        // The request again: CHILD_SA_NOT_FOUND, and nobody makes a new one for what was deleted.
        pair.let_go();
        pair.run(seconds(60));
        assert!(!pair.sides[B].events.iter().any(|event| matches!(event, Event::ChildRekeyed { .. })));
        assert_left(pair, 1, 0);
    }

    #[test]
    fn collision_delete_delayed_response() {
        let mut pair = rekey_and_delete(4);
        pair.pass(A);
        pair.pass(B);
        let refusal = pair.take(B);
        pair.pass(A);
        pair.give(&refusal, 0x80);
        assert_left(pair, 1, 0);
    }

    // RFC 7296 §2.25.1, §2.25.2: both are refused, and both come to pass later.
    #[test]
    fn collision_ike_rekey() {
        for first in [A, B] {
            let mut pair = Pair::by_hand(5).with_traffic();
            pair.rekey_child(A, 0x80);
            pair.rekey_ike(B, 0x80);
            pair.pass(first);
            pair.pass(1 - first);
            pair.pass(first);
            pair.pass(1 - first);
            assert_eq!((pair.children(A), pair.states(B)), (vec![Installed], vec![IkeState::Established]));
            pair.assert_comes_to_rest(1, 1);
            pair.assert_no_loss();
            assert!(pair.sides[A].done(2) && pair.sides[B].done(2));
        }
    }

    #[test]
    fn collision_ike_delete() {
        for first in [A, B] {
            let mut pair = Pair::by_hand(6);
            pair.rekey_child(A, 0x80);
            pair.delete_ike(B);
            pair.pass(first);
            pair.pass_all();
            assert_left(pair, 0, 0);
        }
    }

    #[test]
    fn crossing_exchanges_survive_any_single_fault() {
        with_every_fault(|seed, _| rekey_and_delete(seed), |pair, _| pair.assert_same(1, 0));
        let start = |seed, _: &[u8; 4]| {
            let mut pair = Pair::by_hand(seed).with_traffic();
            pair.rekey_child(A, 0x80);
            pair.rekey_ike(B, 0x80);
            pair
        };
        with_every_fault(start, |pair, _| {
            pair.assert_same(1, 1);
            pair.assert_no_loss();
        });
        let start = |seed, _: &[u8; 4]| {
            let mut pair = Pair::by_hand(seed);
            pair.rekey_child(A, 0x80);
            pair.delete_ike(B);
            pair
        };
        with_every_fault(start, |pair, _| pair.assert_same(0, 0));
    }
}

mod child_delete {
    use super::*;

    #[test]
    fn regular() {
        for side in [A, B] {
            let mut pair = Pair::by_hand(11);
            pair.delete_child(side);
            assert_eq!(pair.children(side), [Deleting]);
            pair.pass(side);
            assert!(pair.children(1 - side).is_empty());
            pair.pass(1 - side);
            assert!(pair.children(side).is_empty());
            assert_left(pair, 1, 0);
        }
    }

    fn both_delete(seed: u64) -> Pair {
        let mut pair = Pair::by_hand(seed);
        pair.delete_child(A);
        pair.delete_child(B);
        pair
    }

    // RFC 7296 §1.4.1: the answers name nothing.
    #[test]
    fn collision() {
        let mut pair = both_delete(12);
        pair.pass(A);
        pair.pass(B);
        pair.pass_all();
        assert!(pair.sides[A].done(3) && pair.sides[B].done(3));
        assert_left(pair, 1, 0);
    }

    #[test]
    fn collision_drop() {
        let mut pair = both_delete(13);
        pair.take(A);
        pair.pass(B);
        pair.pass(A);
        assert!(pair.children(A).is_empty() && pair.children(B).is_empty());
        assert_left(pair, 1, 0);
    }

    fn delete_and_rekey_ike(seed: u64) -> Pair {
        let mut pair = Pair::by_hand(seed);
        pair.delete_child(A);
        pair.rekey_ike(B, 0x80);
        pair
    }

    // RFC 7296 §2.25.2: the delete is done, the rekey comes later.
    #[test]
    fn collision_ike_rekey() {
        for first in [A, B] {
            let mut pair = delete_and_rekey_ike(14);
            pair.pass(first);
            pair.pass_all();
            assert!(pair.children(A).is_empty() && pair.children(B).is_empty());
            pair.assert_comes_to_rest(1, 0);
            assert!(pair.sides[B].done(2));
        }
    }

    fn delete_and_delete_ike(seed: u64) -> Pair {
        let mut pair = Pair::by_hand(seed);
        pair.delete_child(A);
        pair.delete_ike(B);
        pair
    }

    #[test]
    fn collision_ike_delete() {
        for first in [A, B] {
            let mut pair = delete_and_delete_ike(15);
            pair.pass(first);
            pair.pass_all();
            assert_left(pair, 0, 0);
        }
    }

    #[test]
    fn crossing_deletes_survive_any_single_fault() {
        with_every_fault(|seed, _| both_delete(seed), |pair, _| pair.assert_same(1, 0));
        with_every_fault(|seed, _| delete_and_rekey_ike(seed), |pair, _| pair.assert_same(1, 0));
        with_every_fault(|seed, _| delete_and_delete_ike(seed), |pair, _| pair.assert_same(0, 0));
    }
}

mod ike_delete {
    use super::*;

    #[test]
    fn regular() {
        for side in [A, B] {
            let mut pair = Pair::by_hand(21);
            pair.delete_ike(side);
            pair.pass(side);
            assert!(pair.states(1 - side).is_empty());
            pair.pass(1 - side);
            assert!(pair.sides[side].down(CloseReason::Local) && pair.sides[1 - side].down(CloseReason::Peer));
            assert_left(pair, 0, 0);
        }
    }

    fn both_delete(seed: u64) -> Pair {
        let mut pair = Pair::by_hand(seed);
        pair.delete_ike(A);
        pair.delete_ike(B);
        pair
    }

    // RFC 4718 §5.11.2.
    #[test]
    fn collision() {
        let mut pair = both_delete(22);
        pair.pass(A);
        pair.pass(B);
        for side in [A, B] {
            assert!(pair.states(side).is_empty());
            assert!(pair.sides[side].down(CloseReason::Local) && pair.sides[side].done(3));
        }
        assert_left(pair, 0, 0);
        with_every_fault(|seed, _| both_delete(seed), |pair, _| pair.assert_same(0, 0));
    }
}

mod child_create {
    use super::*;

    // RFC 7296 §2.8: SAs with the same selectors are allowed side by side.
    #[test]
    fn duplicate() {
        let mut pair = Pair::by_hand(31);
        create_child(&mut pair, A);
        create_child(&mut pair, B);
        pair.pass_all();
        assert_left(pair, 1, 3);
    }

    fn create_and_rekey_ike(seed: u64) -> Pair {
        let mut pair = Pair::by_hand(seed);
        create_child(&mut pair, A);
        pair.rekey_ike(B, 0x80);
        pair
    }

    // RFC 7296 §2.25.1, §2.25.2: both are refused, and both come to pass later.
    #[test]
    fn collision_ike_rekey() {
        for first in [A, B] {
            let mut pair = create_and_rekey_ike(32);
            pair.pass(first);
            pair.pass_all();
            assert_eq!(pair.children(A).len(), 1);
            pair.assert_comes_to_rest(1, 2);
            assert!(pair.sides[A].done(4) && pair.sides[B].done(2));
        }
        with_every_fault(|seed, _| create_and_rekey_ike(seed), |pair, _| pair.assert_same(1, 2));
    }

    // An IKE SA that is being closed takes no more.
    #[test]
    fn collision_ike_delete() {
        let start = |seed, _: &[u8; 4]| {
            let mut pair = Pair::by_hand(seed);
            create_child(&mut pair, A);
            pair.delete_ike(B);
            pair
        };
        with_every_fault(start, |pair, _| pair.assert_same(0, 0));
    }
}
