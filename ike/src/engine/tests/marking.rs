//! The code point of IKE messages (`dscp`), and of streams (RFC 9329 §6.8).

use super::*;

fn marked(side: usize, dscp: u8) -> Connection {
    Connection { dscp, ..connection(side) }
}

fn code_points(pair: &Pair, side: usize) -> Vec<u8> {
    pair.sides[side].sent.iter().map(|transmit| transmit.dscp).collect()
}

// The first request and its repetitions, answers and theirs, an IKE SA's successor, liveness checks, a Delete that was lost: each
// side has its own connection's.
#[test]
fn every_message_has_the_code_point_of_its_connection() {
    for over_tcp in [false, true] {
        let of = |side, dscp| Connection {
            tcp: if over_tcp { TcpPolicy::Yes } else { TcpPolicy::No },
            dpd_delay: seconds(5),
            rekey_time: seconds(if side == A { 20 } else { 0 }),
            over_time: seconds(60),
            ..marked(side, dscp)
        };
        let mut pair = Pair::with(1, EngineConfig::default(), of(A, 46), of(B, 10));
        // A stream repeats by itself.
        pair.cut = !over_tcp;
        pair.initiate(A, 1);
        pair.run(seconds(5));
        pair.cut = false;
        pair.loss = if over_tcp { 0 } else { 10 };
        pair.run(seconds(100));
        pair.loss = 0;
        pair.run(seconds(20));
        let now = pair.now;
        let id = pair.sides[B].up()[0].id;
        pair.sides[B].engine.terminate(now, Target::Ike(id), false, 2).unwrap();
        pair.run(seconds(60));
        pair.assert_same(0, 0);
        for (side, dscp) in [(A, 46), (B, 10)] {
            let sent = code_points(&pair, side);
            assert!(sent.len() > 10 && sent.iter().all(|sent| *sent == dscp), "{side} {sent:?}");
        }
    }
}

// As in strongSwan: before the initiator has said who it is, the first connection for its address decides.
#[test]
fn a_responder_takes_the_code_point_of_the_connection_that_admits_the_peer() {
    let mut pair = Pair::new(2);
    let other = |name: &str| IdentityPattern::exact(id(name));
    let mut first = marked(B, 1);
    (first.name, first.remote.name, first.remote.remote_id) = ("other".to_owned(), "other".to_owned(), other("c"));
    pair.sides[B].engine.set_connections(vec![Arc::new(first), Arc::new(marked(B, 2))]);
    let pair = established(pair);
    assert_eq!(code_points(&pair, B), [1, 2]);
    assert_eq!(code_points(&pair, A), [0, 0]);
}

#[test]
fn what_no_connection_speaks_for_is_unmarked() {
    let proposals = parse_proposals("aes256gcm16-prfsha384-ecp384", Protocol::IKE).unwrap();
    let mut pair = Pair::with(3, EngineConfig::default(), connection(A), Connection { proposals, ..marked(B, 2) });
    pair.initiate(A, 1);
    pair.run(seconds(5));
    let sent = code_points(&pair, B);
    assert!(!sent.is_empty() && sent.iter().all(|sent| *sent == 0), "{sent:?}");
}
