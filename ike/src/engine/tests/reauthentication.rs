//! Reauthentication (RFC 7296 §2.8.3), before the old IKE SA ends and after it.

use super::*;

/// A reauthenticates each hour, at one moment.
fn pair(seed: u64, make_before_break: bool, change: impl Fn(&mut Connection)) -> Pair {
    let mut pair = unconnected(seed, make_before_break, change);
    connect(&mut pair);
    pair.assert_same(1, 2);
    pair
}

fn unconnected(seed: u64, make_before_break: bool, change: impl Fn(&mut Connection)) -> Pair {
    let of = |side: usize| {
        let mut connection = connection(side);
        let names = if side == A { ("10.1.0.0/24", "10.3.0.0/24") } else { ("10.3.0.0/24", "10.1.0.0/24") };
        connection.children.push(Arc::new(child("more", names.0, names.1)));
        connection.dpd_delay = seconds(30);
        change(&mut connection);
        connection
    };
    let config = EngineConfig { make_before_break, ..EngineConfig::default() };
    let a = Connection { reauth_time: seconds(3600), over_time: seconds(600), ..of(A) };
    Pair::with(seed, config, a, of(B))
}

fn connect(pair: &mut Pair) {
    for (child, token) in [(0, 1), (1, 2)] {
        let connection = Arc::clone(&pair.sides[A].engine.ctx.connections[0]);
        let child = Some(Arc::clone(&connection.children[child]));
        pair.initiate_child(A, connection, child, token);
    }
    pair.run(seconds(5));
}

fn authenticated(pair: &Pair) -> usize {
    pair.sides[A].events.iter().filter(|event| matches!(event, Event::IkeUp(_))).count()
}

/// At each moment the Child SA of either network is there on both sides.
fn run_without_a_gap(pair: &mut Pair, time: Duration) {
    let end = pair.now + time;
    while pair.now < end {
        pair.run(Duration::from_millis(500));
        for side in &pair.sides {
            let sas = side.engine.ike_sas(pair.now);
            for name in ["net", "more"] {
                let up = sas.iter().flat_map(|sa| &sa.children).any(|child| child.name == name);
                assert!(up, "{name} is down");
            }
        }
    }
}

#[test]
fn make_before_break() {
    for unique in [Unique::No, Unique::Never] {
        let mut pair = pair(1, true, |connection| connection.unique = unique);
        run_without_a_gap(&mut pair, seconds(3700));
        assert_eq!(authenticated(&pair), 2, "{unique:?}");
        pair.assert_same(1, 2);
    }
}

// RFC 7296 §2.8.3: rekeying in between changes nothing of who reauthenticates, and when.
#[test]
fn the_one_who_authenticated_first_reauthenticates_after_rekeys() {
    for make_before_break in [false, true] {
        let mut pair = pair(2, make_before_break, |_| {});
        let (ike, now) = (pair.sides[B].only().id, pair.now);
        pair.sides[B].engine.rekey(now, Target::Ike(ike), 3).unwrap();
        pair.run(seconds(10));
        assert!(pair.sides[B].only().initiator);
        pair.run(seconds(3700));
        assert_eq!(authenticated(&pair), 2);
        pair.assert_same(1, 2);
    }
}

#[test]
fn break_before_make() {
    let mut pair = pair(3, false, |_| {});
    pair.run(seconds(3700));
    assert_eq!(authenticated(&pair), 2);
    pair.assert_same(1, 2);
}

// The new one fails: the old one stays, and it is tried again until the hard limit.
#[test]
fn a_failed_attempt_leaves_the_old_one() {
    let mut pair = pair(4, true, |_| {});
    pair.run(seconds(3500));
    let good = std::mem::replace(&mut pair.sides[B].credentials, shared_key("another"));
    run_without_a_gap(&mut pair, seconds(200));
    assert!(pair.sides[A].logged("reauthentication of IKE_SA site[1] failed"));
    assert_eq!(authenticated(&pair), 1);
    pair.sides[B].credentials = good;
    run_without_a_gap(&mut pair, seconds(200));
    assert_eq!(authenticated(&pair), 2);
    pair.assert_same(1, 2);
}

// Whatever the network does: one IKE SA with both Child SAs.
#[test]
fn make_before_break_on_a_bad_network() {
    for seed in 0..60 {
        let mut pair = pair(seed, true, |_| {});
        pair.run(seconds(3590));
        pair.loss = seed % 20;
        pair.duplication = 20;
        pair.delay.0 = Duration::from_millis(800);
        pair.run(seconds(60));
        pair.loss = 0;
        pair.run(seconds(500));
        assert!(authenticated(&pair) >= 2, "seed {seed}");
        pair.assert_same(1, 2);
    }
}

// Our address goes while the new IKE SA is being made from it: both are begun anew from the address that is there.
#[test]
fn an_address_that_goes_during_make_before_break() {
    let mut pair = pair(5, true, |_| {});
    pair.roam(A);
    pair.roam(B);
    pair.run(seconds(3590));
    pair.cut = true;
    pair.run(seconds(10));
    assert_eq!(pair.sides[A].engine.ike_sas(pair.now).len(), 2, "the new one is on its way");
    let new: IpAddr = "10.0.1.1".parse().unwrap();
    pair.gone = vec![address(A)];
    pair.more[A] = vec![new];
    pair.roam(A);
    pair.cut = false;
    pair.run(seconds(20));
    let sas = pair.sides[A].engine.ike_sas(pair.now);
    assert_eq!(sas.len(), 1);
    assert_eq!((sas[0].path.local.ip(), sas[0].children.len()), (new, 2));
}

// A second IKE SA of the same peer is none that takes the first one's place: that has to come first.
#[test]
fn a_duplicate_is_no_successor() {
    let mut pair = unconnected(6, true, |connection| connection.unique = Unique::Never);
    // B makes one at the same time.
    pair.initiate(B, 9);
    connect(&mut pair);
    pair.assert_same(2, 3);
    let old = pair.sides[A].up().into_iter().find(|sa| sa.initiator).unwrap();
    pair.run(seconds(3580));
    // The successor does not come up.
    let good = std::mem::replace(&mut pair.sides[B].credentials, shared_key("another"));
    run_without_a_gap(&mut pair, seconds(200));
    assert!(pair.sides[A].logged(&format!("reauthentication of IKE_SA site[{}] failed", old.id.0)));
    assert!(pair.sides[A].up().iter().any(|sa| sa.id == old.id), "given up for one that is no successor");
    pair.sides[B].credentials = good;
    run_without_a_gap(&mut pair, seconds(200));
    assert!(pair.sides[A].up().iter().all(|sa| sa.id != old.id));
    pair.assert_same(2, 3);
}

// The peer refuses the new IKE SA the Child SAs that work in the old one, which stays for them, until its end. When the peer
// thinks better of it, the old one goes.
#[test]
fn child_sas_that_the_successor_is_refused_keep_the_old_one() {
    for better in [false, true] {
        let mut pair = pair(7, true, |_| {});
        pair.run(seconds(3500));
        pair.sides[B].refuse_installs = Some(InstallError::Refused("by a latch".to_owned()));
        run_without_a_gap(&mut pair, seconds(400));
        assert_eq!((pair.sides[A].up().len(), authenticated(&pair)), (2, 2));
        assert!(pair.sides[A].logged("site[1] stays, its successor lacks a CHILD_SA of it"));
        let asked = pair.sides[A].events.iter().filter(|event| matches!(event, Event::Failed { .. })).count();
        assert!((6..=20).contains(&asked), "both, again and again: {asked}");
        if better {
            pair.sides[B].refuse_installs = None;
            run_without_a_gap(&mut pair, seconds(200));
            pair.assert_same(1, 2);
        } else {
            // The proof of the old one is too old.
            pair.run(seconds(400));
            assert!(pair.sides[A].down(CloseReason::Expired));
            pair.assert_same(1, 0);
        }
        assert_eq!(authenticated(&pair), 2);
    }
}

#[test]
fn an_ike_sa_without_child_sas_is_begun_anew() {
    for make_before_break in [false, true] {
        let mut pair = pair(8, make_before_break, |_| {});
        for _ in 0..2 {
            pair.delete_child(A);
            pair.run(seconds(10));
        }
        pair.assert_same(1, 0);
        pair.run(seconds(3700));
        assert_eq!(authenticated(&pair), 2);
        pair.assert_same(1, 0);
    }
}

// Who ends it by hand while it is reauthenticated does not want it again.
#[test]
fn an_end_by_hand_is_the_end() {
    let mut pair = pair(9, false, |_| {});
    pair.run(seconds(3594));
    pair.cut = true;
    pair.run(seconds(4));
    assert_eq!(pair.states(A), [IkeState::Deleting]);
    pair.delete_ike(A);
    pair.cut = false;
    pair.run(seconds(100));
    pair.assert_same(0, 0);
}
