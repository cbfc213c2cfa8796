//! AUTH_LIFETIME (RFC 4478) and reauthentication on demand.

use super::*;
use crate::sa::fault::notify;
use crate::wire::NotifyType;

/// A pair of which the responder wants to see the initiator again after `reauth`.
fn with_reauth(seed: u64, of_a: u64, of_b: u64) -> Pair {
    let of = |side, time| Connection { reauth_time: seconds(time), ..connection(side) };
    established(Pair::with(seed, EngineConfig::default(), of(A, of_a), of(B, of_b)))
}

// RFC 4478 §3: the initiator authenticates again before the time that the responder gives is over.
#[test]
fn the_initiator_reauthenticates_in_the_time_that_the_responder_gives() {
    let mut pair = with_reauth(640, 0, 1000);
    assert!(pair.sides[A].logged("received AUTH_LIFETIME of"));
    let first = pair.sides[A].only().initiator_spi;
    pair.run(seconds(880));
    assert_eq!(pair.sides[A].only().initiator_spi, first);
    pair.run(seconds(100));
    assert_ne!(pair.sides[A].only().initiator_spi, first);
    pair.assert_same(1, 1);
}

// An earlier time of our own stays, and a responder without reauth_time says nothing.
#[test]
fn the_earlier_time_counts() {
    let pair = with_reauth(641, 300, 1000);
    assert!(pair.sides[A].logged("reauthentication already scheduled"));
    assert!(pair.sides[A].only().reauth_in.is_some_and(|left| left <= seconds(310)));
    let pair = with_reauth(642, 300, 0);
    assert!(!pair.sides[A].logged("AUTH_LIFETIME"));
}

// The time survives rekeying, which proves nothing, and so does who has to reauthenticate.
#[test]
fn rekeying_by_the_responder_does_not_turn_the_roles() {
    let mut pair = with_reauth(643, 0, 1000);
    let (now, id) = (pair.now, pair.sides[B].only().id);
    pair.sides[B].engine.rekey(now, Target::Ike(id), 5).unwrap();
    pair.run(seconds(5));
    let first = pair.sides[A].only().responder_spi;
    pair.run(seconds(980));
    assert_ne!(pair.sides[A].only().responder_spi, first);
    assert!(pair.sides[A].only().initiator);
    pair.assert_same(1, 1);
}

// A responder that gives no time at all does not keep us busy without end.
#[test]
fn a_lifetime_of_nothing_is_bounded() {
    let mut pair = with_reauth(644, 0, 1);
    pair.run(seconds(300));
    let ups = pair.sides[A].events.iter().filter(|event| matches!(event, Event::IkeUp(_))).count();
    assert!((5..=40).contains(&ups), "{ups}");
}

// RFC 4478 §3: the time may change later, which comes in INFORMATIONAL; an initiator's word counts for nothing.
#[test]
fn a_lifetime_in_informational_counts_for_the_initiator_only() {
    for (side, data, counts) in [(A, &[0, 0, 0, 100][..], true), (A, &[0, 0, 100], false), (B, &[0, 0, 0, 100], false)]
    {
        let mut pair = with_reauth(646, 0, 1000);
        let before = pair.sides[side].only().reauth_in;
        let IkeSa::Established(sa) = &pair.sides[side].engine.sas.values().next().unwrap().sa else { panic!("up") };
        let payloads = [notify(NotifyType::AUTH_LIFETIME, data.to_vec())];
        let sealed = sa.channel.forge(ExchangeType::INFORMATIONAL, false, 0, &payloads, None, &mut TestRng(9));
        let (path, now) = (sa.core.path, pair.now);
        pair.sides[side].engine.handle_message(now, path, &sealed[0]);
        pair.drain(side);
        assert_eq!(pair.sides[side].logged("received invalid AUTH_LIFETIME"), !counts);
        let after = pair.sides[side].only().reauth_in;
        let close = |a: Option<Duration>, b: Option<Duration>| a.unwrap().abs_diff(b.unwrap()) < seconds(5);
        assert_eq!(close(after, Some(seconds(90))), counts, "{after:?}");
        assert_eq!(close(after, before), !counts, "{before:?} {after:?}");
    }
}

// swanctl --rekey --reauth.
#[test]
fn who_initiated_reauthenticates_on_demand() {
    let mut pair = up(645);
    let first = pair.sides[A].only();
    let now = pair.now;
    pair.sides[A].engine.reauthenticate(now, first.id, 5).unwrap();
    pair.run(seconds(5));
    assert!(pair.sides[A].done(5));
    assert_ne!(pair.sides[A].only().initiator_spi, first.initiator_spi);
    pair.assert_same(1, 1);
    let (now, id) = (pair.now, pair.sides[B].only().id);
    pair.sides[B].engine.reauthenticate(now, id, 6).unwrap();
    pair.run(seconds(5));
    assert!(pair.sides[B].failed(6).is_some());
    pair.assert_same(1, 1);
    assert!(pair.sides[A].engine.reauthenticate(now, IkeSaId(99), 7).is_err());
}
