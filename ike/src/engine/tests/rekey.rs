//! Rekeying: Child SAs and IKE SAs, from either side, from both at once, and on a bad network.

use super::*;

// RFC 7296 §1.3.3, §2.8.
#[test]
fn either_side_rekeys_a_child() {
    for side in [A, B] {
        let mut pair = up(60);
        let old = pair.sides[side].only().children[0].clone();
        let now = pair.now;
        pair.sides[side].engine.rekey(now, Target::Child(old.id), 2).unwrap();
        pair.run(seconds(2));
        assert!(pair.sides[side].done(2));
        // The old one still receives for its grace time.
        assert_eq!(pair.sides[A].installed.len(), 2);
        pair.run(seconds(10));
        pair.assert_same(1, 1);
        let new = pair.sides[side].only().children[0].clone();
        assert_ne!(new.spi_in, old.spi_in);
        assert_eq!(new.reqid, old.reqid);
        for side in &pair.sides {
            let rekeyed = |event: &Event| matches!(event, Event::ChildRekeyed { .. });
            assert_eq!(side.events.iter().filter(|event| rekeyed(event)).count(), 1);
            let down = side.events.iter().find_map(|event| match event {
                Event::ChildDown { reason, .. } => Some(*reason),
                _ => None,
            });
            assert_eq!(down, Some(CloseReason::Rekeyed));
        }
    }
}

// RFC 7296 §2.8.1: whoever loses, one pair is left.
#[test]
fn both_sides_rekey_a_child_at_once() {
    for seed in 0..100 {
        let mut pair = up(seed);
        pair.loss = seed % 20;
        for side in [A, B] {
            let child = pair.sides[side].only().children[0].id;
            let now = pair.now;
            pair.sides[side].engine.rekey(now, Target::Child(child), 2).unwrap();
        }
        pair.run(seconds(300));
        pair.assert_same(1, 1);
        for side in &pair.sides {
            assert!(side.done(2) || side.failed(2).is_some());
            let peer = |event: &Event| matches!(event, Event::ChildDown { reason: CloseReason::Peer, .. });
            assert!(!side.events.iter().any(peer), "seed {seed}: a rekey looks like a delete");
        }
    }
}

// RFC 7296 §1.3.2, §2.18: the children move to the successor.
#[test]
fn either_side_rekeys_the_ike_sa() {
    for side in [A, B] {
        let mut pair = up(61);
        let old = pair.sides[side].only();
        let now = pair.now;
        pair.sides[side].engine.rekey(now, Target::Ike(old.id), 2).unwrap();
        pair.run(seconds(2));
        assert!(pair.sides[side].done(2));
        pair.assert_same(1, 1);
        let new = pair.sides[side].only();
        assert_ne!(new.initiator_spi, old.initiator_spi);
        assert!(new.initiator);
        assert_eq!(new.children[0].spi_in, old.children[0].spi_in);
        // And the successor works, in both directions.
        for other in [A, B] {
            let child = pair.sides[other].only().children[0].id;
            let now = pair.now;
            pair.sides[other].engine.rekey(now, Target::Child(child), 3).unwrap();
            pair.run(seconds(10));
            assert!(pair.sides[other].done(3));
            pair.assert_same(1, 1);
        }
    }
}

// RFC 5056 §2.1: the binding is the same at both ends and for all of the channel's life, and that of no other channel.
#[test]
fn the_channel_binding_outlives_rekeys_and_is_of_one_authentication() {
    let mut seen = std::collections::HashSet::new();
    for (seed, side) in [(61, A), (62, B)] {
        let mut pair = up(seed);
        let ike = pair.sides[side].only().id;
        let now = pair.now;
        pair.sides[side].engine.rekey(now, Target::Ike(ike), 2).unwrap();
        pair.run(seconds(2));
        let child = pair.sides[side].only().children[0].id;
        let now = pair.now;
        pair.sides[side].engine.rekey(now, Target::Child(child), 3).unwrap();
        pair.run(seconds(10));
        let binding = pair.sides[A].bindings[0].unwrap();
        for side in &pair.sides {
            assert!(side.bindings.len() == 2 && side.bindings.iter().all(|other| *other == Some(binding)));
        }
        assert!(seen.insert(binding), "another IKE SA has another one");
    }
}

// RFC 7296 §2.25.2: both try again, and one succeeds.
#[test]
fn both_sides_rekey_the_ike_sa_at_once() {
    for seed in 0..100 {
        let mut pair = up(seed);
        pair.loss = seed % 15;
        for side in [A, B] {
            let ike = pair.sides[side].only().id;
            let now = pair.now;
            pair.sides[side].engine.rekey(now, Target::Ike(ike), 2).unwrap();
        }
        pair.run(seconds(400));
        pair.assert_same(1, 1);
    }
}

// RFC 7296 §2.25.2: a Child SA and the IKE SA at once.
#[test]
fn a_child_and_the_ike_sa_are_rekeyed_at_once() {
    for seed in 0..100 {
        let mut pair = up(seed);
        pair.job_delay = Duration::from_millis(100);
        let (ike, child) = (pair.sides[A].only().id, pair.sides[B].only().children[0].id);
        let now = pair.now;
        pair.sides[A].engine.rekey(now, Target::Ike(ike), 2).unwrap();
        pair.sides[B].engine.rekey(now, Target::Child(child), 2).unwrap();
        pair.run(seconds(60));
        assert!(pair.sides[A].done(2) && pair.sides[B].done(2), "seed {seed}");
        pair.assert_same(1, 1);
    }
}

#[test]
fn lifetimes_rekey_without_end_on_a_bad_network() {
    for seed in 0..30 {
        let of = |side: usize| {
            let mut connection = connection(side);
            connection.rekey_time = seconds(600);
            connection.rand_time = seconds(60);
            connection.over_time = seconds(300);
            let mut child = (*connection.children[0]).clone();
            child.rekey_time = seconds(200);
            child.rand_time = seconds(40);
            child.life_time = seconds(400);
            connection.children = vec![Arc::new(child)];
            connection
        };
        let mut pair = established(Pair::with(seed, EngineConfig::default(), of(A), of(B)));
        pair.loss = 5;
        pair.duplication = 10;
        pair.delay.0 = Duration::from_millis(500);
        pair.run(seconds(4 * 3600));
        pair.loss = 0;
        // To rest: no exchange is going on at the moment of the comparison.
        for _ in 0..200 {
            pair.run(seconds(1));
            let busy = |side: &Side| {
                let sas = side.engine.ike_sas(pair.now);
                let calm = |child: &ChildSaStatus| child.state == ChildState::Installed;
                sas.len() != 1 || sas.iter().any(|sa| !sa.tasks_active.is_empty() || !sa.children.iter().all(calm))
            };
            if !busy(&pair.sides[A]) && !busy(&pair.sides[B]) {
                break;
            }
        }
        let rekeyed = pair.sides[A].events.iter().filter(|event| matches!(event, Event::IkeRekeyed { .. })).count();
        assert!(rekeyed > 10, "seed {seed}: {rekeyed} rekeys");
        pair.assert_same(1, 1);
    }
}

// RFC 7296 §2.8.3: rekeying proves nothing about the peer; who never reauthenticates is cut off all the same.
#[test]
fn rekeying_does_not_put_off_the_end_of_an_authentication() {
    let mut b = connection(B);
    // Too short for the initiator, which hears of it in AUTH_LIFETIME.
    (b.reauth_time, b.over_time) = (seconds(5), seconds(2));
    let mut pair = established(Pair::with(70, EngineConfig::default(), connection(A), b));
    for token in 2..8 {
        let ids: Vec<IkeSaId> = pair.sides[A].up().iter().map(|sa| sa.id).collect();
        for id in ids {
            let now = pair.now;
            pair.sides[A].engine.rekey(now, Target::Ike(id), token).unwrap();
            pair.drain(A);
        }
        pair.run(seconds(1));
    }
    assert!(pair.sides[B].down(CloseReason::Expired));
    pair.assert_same(0, 0);
}
