//! Fragments that wait for others: for how long, and how many (RFC 7383 §2.6).

use super::*;

/// Both sides fragment what is longer than 200 octets.
fn small() -> EngineConfig {
    EngineConfig { fragment_size: 200, half_open_timeout: seconds(300), ..EngineConfig::default() }
}

/// A pair in IKE_AUTH whose initiator's fragments are on no way; they are given.
fn in_ike_auth(seed: u64) -> (Pair, Vec<Transmit>) {
    let mut pair = Pair::with(seed, small(), connection(A), connection(B));
    pair.initiate(A, 1);
    for _ in 0..1000 {
        let fragments: Vec<Transmit> =
            pair.sides[A].sent.iter().filter(|sent| sent.bytes.get(16) == Some(&53)).cloned().collect();
        if fragments.len() > 1 {
            pair.deliveries.retain(|_, delivery| !matches!(delivery, Delivery::Message { .. }));
            return (pair, fragments);
        }
        pair.run(Duration::from_millis(1));
    }
    panic!("no fragments");
}

fn give(pair: &mut Pair, fragment: &Transmit) {
    let path = Path { local: fragment.path.remote, remote: fragment.path.local, transport: fragment.path.transport };
    let now = pair.now;
    pair.sides[B].engine.handle_message(now, path, &fragment.bytes);
    pair.drain(B);
}

// RFC 7383 §2.6: what does not get whole in time is discarded, and the message may still come whole later.
#[test]
fn fragments_that_wait_too_long_are_dropped() {
    let (mut pair, fragments) = in_ike_auth(500);
    give(&mut pair, &fragments[0]);
    assert!(!pair.sides[B].engine.upkeep.is_empty());
    let octets = |pair: &Pair| pair.sides[B].engine.sas.values().map(|slot| slot.held.fragments).sum::<usize>();
    assert!(octets(&pair) > 0);
    pair.udp_blocked = true;
    pair.run(seconds(29));
    assert!(octets(&pair) > 0);
    pair.run(seconds(2));
    assert_eq!(octets(&pair), 0);
    assert!(pair.sides[B].engine.upkeep.is_empty());
}

// RFC 7383 §2.6: a forged fragment neither takes memory nor the place of a true one; repetitions do not add up.
#[test]
fn forged_and_repeated_fragments_take_nothing() {
    let (mut pair, fragments) = in_ike_auth(501);
    give(&mut pair, &fragments[0]);
    let held = pair.sides[B].engine.sas.values().map(|slot| slot.held).next().unwrap();
    for fragment in &fragments[1..] {
        let mut forged = fragment.clone();
        *forged.bytes.last_mut().unwrap() ^= 1;
        give(&mut pair, &forged);
        // With another total too.
        forged.bytes[35] ^= 4;
        give(&mut pair, &forged);
    }
    for _ in 0..100 {
        give(&mut pair, &fragments[0]);
    }
    assert_eq!(pair.sides[B].engine.sas.values().map(|slot| slot.held).next().unwrap(), held);
    for fragment in &fragments[1..] {
        give(&mut pair, fragment);
    }
    pair.run(seconds(3));
    assert!(pair.sides[A].done(1), "{:#?}", pair.sides[A].events);
    pair.assert_same(1, 1);
    // Once whole, its fragments are repetitions: nothing waits.
    for fragment in &fragments {
        give(&mut pair, fragment);
    }
    assert_eq!(pair.sides[B].engine.sas.values().map(|slot| slot.held.fragments).sum::<usize>(), 0);
    pair.assert_same(1, 1);
}

// Fragments of all IKE SAs together have a limit, a lower one for peers that have not authenticated.
#[test]
fn waiting_fragments_of_all_have_a_limit() {
    use crate::engine::upkeep::{Fragments, Held};
    let fragments = Fragments::default();
    let of = |fragments, stranger| Held::new([None, None], fragments, stranger);
    let none = Held::default();
    let one = of(60_000, true);
    let count = (1..1000).take_while(|_| fragments.exchange(none, one)).count();
    assert_eq!(count, (8 << 20) / 60_000);
    // Those who authenticated have room still; who holds some may hold less, and not more.
    assert!(fragments.exchange(none, of(60_000, false)) && fragments.exchange(of(60_000, false), none));
    assert!(fragments.exchange(one, of(50_000, true)) && fragments.exchange(of(50_000, true), one));
    let before = fragments.total();
    assert!(!fragments.exchange(one, of(160_000, true)));
    assert_eq!(fragments.total(), before, "what is refused changes nothing");
    // One of them authenticates.
    assert!(fragments.exchange(one, of(60_000, false)));
    assert!(fragments.exchange(none, one));
    assert!(fragments.exchange(of(60_000, false), none));
    for _ in 0..count {
        assert!(fragments.exchange(one, none));
    }
    assert_eq!(fragments.total(), 0);
}

// RFC 7383 §2.3: "MUST NOT … unless both peers have announced".
#[test]
fn who_does_not_announce_fragmentation_gets_none() {
    for without in [A, B] {
        let of = |side| {
            let fragmentation = if side == without { Fragmentation::No } else { Fragmentation::Yes };
            Connection { fragmentation, ..connection(side) }
        };
        let mut pair = Pair::with(504, small(), of(A), of(B));
        pair.initiate(A, 1);
        pair.run(seconds(3));
        assert!(pair.sides[A].done(1));
        let sent = pair.sides.iter().flat_map(|side| &side.sent);
        assert!(sent.clone().all(|sent| sent.bytes[16] != 53));
        assert!(sent.clone().any(|sent| sent.bytes[18] == 35 && sent.bytes.len() > 200));
    }
}
