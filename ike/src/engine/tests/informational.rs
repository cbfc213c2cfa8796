//! INFORMATIONAL: Delete of the IKE SA, liveness, the window and the response cache.

use super::*;

// RFC 7296 §1.4.1.
#[test]
fn either_side_deletes_the_ike_sa() {
    for side in [A, B] {
        for force in [false, true] {
            let mut pair = up(70);
            let ike = pair.sides[side].only().id;
            let now = pair.now;
            pair.sides[side].engine.terminate(now, Target::Ike(ike), force, 2).unwrap();
            pair.run(seconds(2));
            assert!(pair.sides[side].done(2));
            assert!(pair.sides[side].down(CloseReason::Local));
            assert!(pair.sides[1 - side].down(CloseReason::Peer));
            pair.assert_same(0, 0);
        }
    }
}

// RFC 7296 §2.1: who deletes may lose the answer and ask again, though the SA is gone.
#[test]
fn a_repeated_delete_is_answered_after_the_end() {
    let mut pair = up(71);
    let ike = pair.sides[A].only().id;
    pair.loss = 50;
    let now = pair.now;
    pair.sides[A].engine.terminate(now, Target::Ike(ike), false, 2).unwrap();
    pair.run(seconds(15));
    pair.loss = 0;
    pair.run(seconds(15));
    assert!(pair.sides[A].done(2));
    assert!(!pair.sides[A].logged("giving up"));
    pair.assert_same(0, 0);
}

fn with_liveness() -> Pair {
    let of = |side: usize| Connection { dpd_delay: seconds(10), ..connection(side) };
    established(Pair::with(72, EngineConfig::default(), of(A), of(B)))
}

// RFC 7296 §2.4.
#[test]
fn liveness_keeps_a_living_peer() {
    let mut pair = with_liveness();
    pair.run(seconds(300));
    assert!(pair.sides[A].logged("sending DPD request") || pair.sides[B].logged("sending DPD request"));
    pair.assert_same(1, 1);
}

#[test]
fn a_dead_peer_is_noticed() {
    let mut pair = with_liveness();
    pair.cut = true;
    pair.run(seconds(300));
    assert!(pair.sides[A].down(CloseReason::Timeout) && pair.sides[B].down(CloseReason::Timeout));
    pair.assert_same(0, 0);
}

// RFC 7296 §2.4: ESP from the peer proves that it lives.
#[test]
fn traffic_spares_the_liveness_check() {
    let mut pair = with_liveness();
    let sent = pair.sides[A].sent.len();
    for _ in 0..30 {
        for side in [A, B] {
            pair.sides[side].last_packet = Some(pair.now);
        }
        pair.run(seconds(9));
    }
    assert_eq!(pair.sides[A].sent.len(), sent);
    // The last packet is the last sign of life.
    pair.run(seconds(12));
    assert!(pair.sides[A].sent.len() > sent);
}

// §2.4: a hint, which anybody can forge, costs no request while ESP comes.
#[test]
fn traffic_outweighs_hints() {
    let mut pair = up(77);
    pair.run(seconds(60));
    let sent = pair.sides[A].sent.len();
    for _ in 0..20 {
        pair.sides[A].last_packet = Some(pair.now);
        pair.run(seconds(3));
        let (now, remote) = (pair.now, pair.sides[A].only().path.remote);
        pair.sides[A].engine.handle_unreachable(now, remote);
        pair.drain(A);
    }
    assert_eq!(pair.sides[A].sent.len(), sent);
    pair.run(seconds(3));
    let (now, remote) = (pair.now, pair.sides[A].only().path.remote);
    pair.sides[A].engine.handle_unreachable(now, remote);
    pair.drain(A);
    assert_eq!(pair.sides[A].sent.len(), sent + 1, "the last packet was six seconds ago");
}

// RFC 7296 §2.1, §2.3: requests inside the window again give the same octets; older ones nothing.
#[test]
fn repetitions_inside_the_window_get_the_same_octets() {
    let mut pair = up(73);
    let (mut requests, mut answers) = (Vec::new(), Vec::new());
    for token in [2, 3, 4] {
        let child = pair.sides[A].only().children.iter().find(|child| child.state == ChildState::Installed).unwrap().id;
        let (from, answered) = (pair.sides[A].sent.len(), pair.sides[B].sent.len());
        let now = pair.now;
        pair.sides[A].engine.rekey(now, Target::Child(child), token).unwrap();
        pair.run(seconds(10));
        requests.extend_from_slice(&pair.sides[A].sent[from..]);
        answers.extend_from_slice(&pair.sides[B].sent[answered..]);
    }
    // A rekey and a Delete each.
    assert_eq!((requests.len(), answers.len()), (6, 6));
    let before = pair.snapshot(B);
    let now = pair.now;
    for (number, request) in requests.iter().enumerate() {
        let path = Path { local: request.path.remote, remote: request.path.local, transport: Transport::Udp };
        pair.sides[B].engine.handle_message(now, path, &request.bytes);
        let again = pair.sides[B].engine.poll_output();
        if number < 2 {
            assert!(again.is_none(), "A has the answer to that");
        } else {
            assert!(matches!(again, Some(Output::Transmit(again)) if again == answers[number]));
        }
        assert!(pair.sides[B].engine.poll_output().is_none());
    }
    assert_eq!(before, pair.snapshot(B));
}

#[test]
fn the_hard_limit_ends_an_ike_sa_that_cannot_rekey() {
    let mut a = connection(A);
    a.rekey_time = seconds(100);
    a.over_time = seconds(50);
    a.proposals = parse_proposals("aes128gcm16-prfsha256-x25519", Protocol::IKE).unwrap();
    let mut pair = established(Pair::with(74, EngineConfig::default(), a, connection(B)));
    pair.cut = true;
    pair.run(seconds(400));
    assert!(pair.sides[A].down(CloseReason::Expired) || pair.sides[A].down(CloseReason::Timeout));
    assert!(pair.sides[A].installed.is_empty());
}

// RFC 7296 §2.8.3: reauthentication makes a new IKE SA with its children.
#[test]
fn reauthentication_starts_again() {
    let mut a = connection(A);
    a.reauth_time = seconds(100);
    let mut pair = established(Pair::with(75, EngineConfig::default(), a, connection(B)));
    let old = pair.sides[A].only().initiator_spi;
    pair.run(seconds(110));
    pair.assert_same(1, 1);
    assert_ne!(pair.sides[A].only().initiator_spi, old);
}
