//! How many IKE SAs a peer may have (`unique`), and INITIAL_CONTACT (RFC 7296 §2.4).

use super::*;

/// A has an IKE SA with B, forgets it, and comes again; `says` is its policy, which decides about INITIAL_CONTACT.
fn comes_again(seed: u64, policy: Unique, says: Unique) -> Pair {
    let b = Connection { unique: policy, ..connection(B) };
    let mut pair = established(Pair::with(seed, EngineConfig::default(), connection(A), b));
    let mut engine = Engine::new(EngineConfig::default(), Box::new(TestRng(seed + 4000)), pair.now);
    engine.set_connections(vec![Arc::new(Connection { unique: says, ..connection(A) })]);
    pair.sides[A].engine = engine;
    pair.sides[A].installed.clear();
    pair.sides[A].events.clear();
    pair.initiate(A, 2);
    pair.run(seconds(30));
    pair
}

const SILENT: Unique = Unique::Never;
const CONTACT: Unique = Unique::No;

#[test]
fn never_keeps_all() {
    for says in [SILENT, CONTACT] {
        let pair = comes_again(1, Unique::Never, says);
        assert!(pair.sides[A].done(2));
        assert_eq!(pair.sides[B].up().len(), 2);
    }
}

#[test]
fn no_ends_old_ones_on_initial_contact_only() {
    let pair = comes_again(2, Unique::No, SILENT);
    assert!(pair.sides[A].done(2));
    assert_eq!(pair.sides[B].up().len(), 2);
    let pair = comes_again(3, Unique::No, CONTACT);
    assert!(pair.sides[A].done(2) && pair.sides[B].down(CloseReason::Restarted));
    pair.assert_same(1, 1);
}

#[test]
fn keep_refuses_the_new_one_unless_it_is_the_first_contact() {
    let pair = comes_again(4, Unique::Keep, SILENT);
    assert_eq!(pair.sides[A].failed(2).as_deref(), Some("received AUTHENTICATION_FAILED notify error"));
    assert_eq!((pair.sides[A].up().len(), pair.sides[B].up().len()), (0, 1));
    let pair = comes_again(5, Unique::Keep, CONTACT);
    assert!(pair.sides[A].done(2));
    pair.assert_same(1, 1);
}

#[test]
fn replace_ends_old_ones_always() {
    for says in [SILENT, CONTACT] {
        let pair = comes_again(6, Unique::Replace, says);
        assert!(pair.sides[A].done(2) && pair.sides[B].down(CloseReason::Replaced));
        pair.assert_same(1, 1);
    }
}

// Both say INITIAL_CONTACT without knowing that the other one's IKE SA comes up too: no side is left with one that the
// other side has ended.
#[test]
fn both_sides_come_first_at_once() {
    for policy in [Unique::No, Unique::Never, Unique::Replace] {
        for seed in 0..100 {
            let of = |side: usize| Connection { unique: policy, ..connection(side) };
            let mut pair = Pair::with(seed, EngineConfig::default(), of(A), of(B));
            pair.delay.0 = Duration::from_millis(pair.rng.below(300));
            pair.job_delay = Duration::from_millis(pair.rng.below(300));
            pair.initiate(A, 1);
            let wait = Duration::from_millis(pair.rng.below(200));
            pair.run(wait);
            pair.initiate(B, 1);
            pair.run(seconds(60));
            let left = pair.sides[A].up().len();
            assert!((1..=2).contains(&left), "seed {seed}");
            let children = pair.sides[A].installed.len();
            pair.assert_same(left, children);
            assert!(children >= 1, "seed {seed}");
        }
    }
}

// Two IKE SAs of one peer, neither of which is there when the other one's proof is looked at.
#[test]
fn of_two_that_come_at_once_one_is_kept_or_stays() {
    for (policy, left) in [(Unique::Keep, 1), (Unique::Replace, 1), (Unique::Never, 2)] {
        for seed in 0..20 {
            let silent = Connection { unique: SILENT, dpd_delay: seconds(30), ..connection(A) };
            let mut other = Connection { name: "other".to_owned(), ..silent.clone() };
            other.remote.name.clone_from(&other.name);
            let both = [silent, other].map(Arc::new);
            let b = Connection { unique: policy, ..connection(B) };
            let mut pair = Pair::with(seed, EngineConfig::default(), connection(A), b);
            pair.sides[A].engine.set_connections(both.to_vec());
            pair.job_delay = Duration::from_millis(300);
            for (connection, token) in both.into_iter().zip([1, 2]) {
                let child = connection.children.first().cloned();
                pair.initiate_child(A, connection, child, token);
            }
            pair.run(seconds(20));
            assert_eq!(pair.sides[B].up().len(), left, "{policy:?}, seed {seed}");
            // A Delete that overtakes the answer to IKE_AUTH is said once: A finds out by asking.
            pair.run(seconds(300));
            assert_eq!(pair.sides[A].up().len(), left, "{policy:?}, seed {seed}");
            let done = [1, 2].into_iter().filter(|token| pair.sides[A].done(*token)).count();
            // One that is replaced may never have heard that it was up.
            let least = if policy == Unique::Never { 2 } else { 1 };
            assert!((least..=if policy == Unique::Keep { 1 } else { 2 }).contains(&done), "{policy:?}, seed {seed}");
        }
    }
}
