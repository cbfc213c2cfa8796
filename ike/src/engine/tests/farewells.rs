//! Deletes of IKE SAs that have ended here are repeated until they are answered (RFC 7296 §1.4.1, §2.1).

use super::*;

/// Whose end waits to be heard.
fn waiting(pair: &Pair) -> [usize; 2] {
    [A, B].map(|side| pair.sides[side].engine.ctx.farewells.len())
}

/// Ends a side's IKE SA without waiting for an answer.
fn end(pair: &mut Pair, side: usize, token: u64) {
    let (now, id) = (pair.now, pair.sides[side].only().id);
    pair.sides[side].engine.terminate(now, Target::Ike(id), true, token).unwrap();
    pair.drain(side);
}

// RFC 7296 §2.4: a peer that missed it would keep its SAs until its own liveness check.
#[test]
fn a_lost_delete_is_said_again_and_nobody_is_shown_what_has_ended() {
    for side in [A, B] {
        let mut pair = up(1500 + side as u64);
        pair.cut = true;
        end(&mut pair, side, 9);
        assert!(pair.sides[side].engine.ike_sas(pair.now).is_empty() && pair.sides[side].down(CloseReason::Local));
        pair.cut = false;
        assert_eq!((waiting(&pair)[side], pair.sides[1 - side].up().len()), (1, 1));
        pair.run(seconds(6));
        assert!(pair.sides[1 - side].down(CloseReason::Peer));
        assert_eq!(waiting(&pair), [0, 0]);
        pair.assert_same(0, 0);
        // The same octets (§2.1).
        let sent = &pair.sides[side].sent;
        assert_eq!(sent[sent.len() - 1].bytes, sent[sent.len() - 2].bytes);
    }
}

#[test]
fn nobody_s_answer_is_waited_for_for_ever() {
    let mut pair = up(1502);
    pair.cut = true;
    let before = pair.sides[A].sent.len();
    end(&mut pair, A, 9);
    pair.run(seconds(200));
    let policy = EngineConfig::default().retransmission;
    assert_eq!(pair.sides[A].sent.len() - before, 1 + policy.tries as usize);
    assert_eq!(waiting(&pair), [0, 0]);
    assert!(pair.sides[A].logged("giving up after 5 retransmits"));
    assert!(pair.sides[A].engine.next_timeout().is_none_or(|at| at > pair.now));
}

// RFC 7296 §2.25.2: "SHOULD reply as usual, and forget about its own close request".
#[test]
fn both_end_it_at_once() {
    let mut pair = up(1503);
    pair.cut = true;
    end(&mut pair, A, 9);
    end(&mut pair, B, 9);
    pair.cut = false;
    assert_eq!(waiting(&pair), [1, 1]);
    pair.run(seconds(30));
    assert_eq!(waiting(&pair), [0, 0]);
    pair.assert_same(0, 0);
}

// RFC 7296 §2.4: only what is authentic counts, and not every message of the peer is an answer.
#[test]
fn neither_forged_messages_nor_other_requests_are_an_answer() {
    let mut pair = up(1504);
    let other = pair.sides[B].only();
    pair.cut = true;
    let (now, id) = (pair.now, other.id);
    pair.sides[B].engine.rekey(now, Target::Ike(id), 3).unwrap();
    pair.drain(B);
    pair.run(Duration::from_millis(50));
    let request = pair.sides[B].sent.last().unwrap().clone();
    end(&mut pair, A, 9);
    let mut forged = request.bytes.clone();
    // A response, by its flags.
    forged[19] |= 0x20;
    for bytes in [request.bytes, forged, pair.sides[A].sent.last().unwrap().bytes.clone(), vec![0; 40]] {
        let path = Path { local: request.path.remote, remote: request.path.local, transport: request.path.transport };
        let now = pair.now;
        pair.sides[A].engine.handle_message(now, path, &bytes);
        pair.drain(A);
        assert_eq!(waiting(&pair), [1, 0]);
    }
    pair.cut = false;
    pair.run(seconds(60));
    assert_eq!(waiting(&pair), [0, 0]);
    pair.assert_same(0, 0);
}

// RFC 7296 §2.8: the new one has everything, and the old one goes, on a network that loses every third datagram.
#[test]
fn on_a_bad_network_both_sides_agree_before_any_liveness_check() {
    for seed in 0..20 {
        let mut pair = up(1510 + seed);
        pair.loss = 33;
        end(&mut pair, A, 9);
        pair.run(seconds(200));
        assert_eq!(waiting(&pair), [0, 0], "seed {seed}");
        pair.assert_same(0, 0);
    }
}
