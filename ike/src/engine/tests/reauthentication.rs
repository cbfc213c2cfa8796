//! Reauthentication (RFC 7296 §2.8.3), before the old IKE SA ends and after it.

use super::*;

/// A reauthenticates each hour, at one moment.
fn pair(seed: u64, make_before_break: bool, change: impl Fn(&mut Connection)) -> Pair {
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
    let mut pair = Pair::with(seed, config, a, of(B));
    for (child, token) in [(0, 1), (1, 2)] {
        let connection = Arc::clone(&pair.sides[A].engine.ctx.connections[0]);
        let child = Some(Arc::clone(&connection.children[child]));
        pair.initiate_child(A, connection, child, token);
    }
    pair.run(seconds(5));
    pair.assert_same(1, 2);
    pair
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
