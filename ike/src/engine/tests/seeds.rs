//! The same SAs on both sides whatever the network does.

use super::*;

#[test]
fn any_order_of_loss_and_delay_gives_the_same_sas() {
    for seed in 0..1000 {
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
    }
}

/// Commands from both sides in any order: at rest both sides have the same.
#[test]
fn any_order_of_commands_gives_the_same_sas() {
    for seed in 0..300 {
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
    }
}

fn command(pair: &mut Pair, side: usize, token: u64) {
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
