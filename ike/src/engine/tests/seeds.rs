//! The same SAs on both sides whatever the network does.
//!
//! `LATCHKEY_SEEDS=0..10000 cargo test -p latchkey-ike seeds` runs these seeds instead of the first few hundred; a
//! failure prints how to run its seed alone.

use super::*;

/// Runs a scenario with each seed of the environment's range, or with so many from 0.
fn with_seeds(count: u64, scenario: impl Fn(u64)) {
    struct Replay(u64);
    impl Drop for Replay {
        fn drop(&mut self) {
            if std::thread::panicking() {
                let seed = self.0;
                eprintln!("again: LATCHKEY_SEEDS={seed}..{} cargo test -p latchkey-ike seeds", seed + 1);
            }
        }
    }
    let range = match std::env::var("LATCHKEY_SEEDS") {
        Ok(text) => {
            let (from, to) = text.split_once("..").expect("LATCHKEY_SEEDS is a range as 0..10000");
            from.parse().unwrap()..to.parse().unwrap()
        }
        Err(_) => 0..count,
    };
    for seed in range {
        let replay = Replay(seed);
        scenario(seed);
        drop(replay);
    }
}

#[test]
fn any_order_of_loss_and_delay_gives_the_same_sas() {
    with_seeds(1000, |seed| {
        let mut pair = Pair::new(seed);
        pair.loss = pair.rng.below(30);
        pair.duplication = pair.rng.below(40);
        pair.delay.0 = Duration::from_millis(pair.rng.below(3000));
        pair.job_delay = Duration::from_millis(pair.rng.below(2000));
        pair.initiate(A, 1);
        pair.run(seconds(400));
        if pair.sides[A].done(1) {
            pair.assert_same(1, 1);
        } else {
            // Six messages lost in a row: then there is nothing, or a responder that learns it later.
            assert!(pair.sides[A].failed(1).is_some(), "seed {seed}: neither done nor failed");
            assert!(pair.sides[A].installed.is_empty());
        }
    });
}

/// Commands from both sides in any order: at rest both sides have the same.
#[test]
fn any_order_of_commands_gives_the_same_sas() {
    with_seeds(300, |seed| {
        // Both sides initiate, each says INITIAL_CONTACT to the other's half-made IKE SA: an orphan that one
        // side is left with is found by its liveness check.
        let of = |side: usize| Connection { dpd_delay: seconds(30), ..connection(side) };
        let mut pair = established(Pair::with(seed, EngineConfig::default(), of(A), of(B)));
        pair.loss = pair.rng.below(10);
        pair.duplication = pair.rng.below(30);
        pair.delay.0 = Duration::from_millis(pair.rng.below(800));
        pair.job_delay = Duration::from_millis(pair.rng.below(800));
        for token in 10..40 {
            let side = pair.rng.below(2) as usize;
            command(&mut pair, side, token);
            let wait = Duration::from_millis(pair.rng.below(3000));
            pair.run(wait);
        }
        pair.loss = 0;
        pair.run(seconds(400));
        let ikes = pair.sides[A].up().len();
        let children = pair.sides[A].installed.len();
        pair.assert_same(ikes, children);
        for side in &pair.sides {
            let states = side.up().into_iter().flat_map(|sa| sa.children).map(|child| child.state);
            assert!(states.into_iter().all(|state| state == ChildState::Installed), "seed {seed}");
        }
        close_all(&mut pair);
    });
}

/// One side ends everything: nothing is left on either, not an SPI.
fn close_all(pair: &mut Pair) {
    let (ids, now) = (pair.sides[A].up().iter().map(|sa| sa.id).collect::<Vec<_>>(), pair.now);
    for (id, token) in ids.into_iter().zip(100..) {
        pair.sides[A].engine.terminate(now, Target::Ike(id), false, token).unwrap();
    }
    pair.run(seconds(400));
    pair.assert_same(0, 0);
    for side in &pair.sides {
        assert!(side.engine.ctx.child_spis.is_empty() && side.engine.ctx.own_spis() == 0);
        assert!(side.engine.ctx.shared.peers.all().is_empty() && side.engine.timers.is_empty());
    }
}

/// Both sides rekey whenever they like, and packets flow all the time.
#[test]
fn no_order_of_rekeys_loses_a_packet() {
    with_seeds(300, |seed| {
        let mut pair = up(seed);
        pair.loss = pair.rng.below(15);
        pair.duplication = pair.rng.below(30);
        pair.delay.0 = Duration::from_millis(pair.rng.below(2000));
        pair.job_delay = Duration::from_millis(pair.rng.below(1000));
        pair.traffic = true;
        for token in 10..40 {
            let side = pair.rng.below(2) as usize;
            let (now, sas) = (pair.now, pair.sides[side].engine.ike_sas(pair.now));
            let ike = &sas[pair.rng.below(sas.len() as u64) as usize];
            let children: Vec<ChildSaId> = sas.iter().flat_map(|sa| &sa.children).map(|child| child.id).collect();
            let child = children[pair.rng.below(children.len() as u64) as usize];
            let target = if pair.rng.below(2) == 0 { Target::Ike(ike.id) } else { Target::Child(child) };
            pair.sides[side].engine.rekey(now, target, token).unwrap();
            pair.drain(side);
            let wait = Duration::from_millis(pair.rng.below(4000));
            pair.run(wait);
        }
        pair.loss = 0;
        pair.run(seconds(600));
        pair.assert_same(1, 1);
        pair.assert_no_loss();
        pair.traffic = false;
        close_all(&mut pair);
    });
}

pub(super) fn command(pair: &mut Pair, side: usize, token: u64) {
    let now = pair.now;
    let sas = pair.sides[side].engine.ike_sas(now);
    let children: Vec<ChildSaId> = sas.iter().flat_map(|sa| &sa.children).map(|child| child.id).collect();
    let child = children.get(pair.rng.below(children.len() as u64) as usize).copied();
    let ike = sas.get(pair.rng.below(sas.len() as u64) as usize).map(|sa| sa.id);
    let choice = pair.rng.below(20);
    let engine = &mut pair.sides[side].engine;
    let _gone_meanwhile = match (choice, child, ike) {
        (0..6, Some(child), _) => engine.rekey(now, Target::Child(child), token),
        (6..10, _, Some(ike)) => engine.rekey(now, Target::Ike(ike), token),
        (10..13, Some(child), _) => engine.terminate(now, Target::Child(child), choice == 12, token),
        (13, _, Some(ike)) => engine.terminate(now, Target::Ike(ike), false, token),
        _ => {
            pair.initiate(side, token);
            Ok(())
        }
    };
    pair.drain(side);
}
