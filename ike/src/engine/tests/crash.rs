//! Quick crash detection (RFC 6290).

use super::*;
use crate::wire::{Header, Notify, NotifyType, Payload};

fn secret(octet: u8) -> Option<Secret> {
    Some(Secret::new(vec![octet; 32]))
}

/// An established pair with liveness checks each 10 s, both of which make tokens.
fn makers(seed: u64) -> Pair {
    let of = |side| Connection { dpd_delay: seconds(10), ..connection(side) };
    let mut pair = Pair::with(seed, EngineConfig::default(), of(A), of(B));
    pair.sides[A].engine.set_crash_secret(secret(1));
    pair.sides[B].engine.set_crash_secret(secret(2));
    established(pair)
}

/// A side loses everything but its secret and its configuration.
fn restart(pair: &mut Pair, side: usize, secret: Option<Secret>) {
    let connections = vec![Arc::clone(&pair.sides[side].engine.ctx.connections[0])];
    let mut engine = Engine::new(EngineConfig::default(), Box::new(TestRng(815)), pair.now);
    engine.set_connections(connections);
    engine.set_crash_secret(secret);
    pair.sides[side].engine = engine;
    pair.sides[side].installed.clear();
}

/// Tokens that a side has sent in unprotected messages.
fn shown(side: &Side) -> Vec<Vec<u8>> {
    let of_plain = |bytes: &[u8]| match wire::parse(bytes) {
        Ok(Incoming::Plain(message)) => message.payloads,
        _ => Vec::new(),
    };
    let token = |payload| match payload {
        Payload::Notify(notify) if notify.kind == NotifyType::QUICK_CRASH_DETECTION => Some(notify.data),
        _ => None,
    };
    side.sent.iter().flat_map(|sent| of_plain(&sent.bytes)).filter_map(token).collect()
}

// RFC 6290 §3, §4.5: the token comes with the answer to the next request, long before the peer would be given up.
#[test]
fn a_peer_that_restarted_shows_its_token_and_is_connected_anew() {
    let mut pair = makers(600);
    restart(&mut pair, B, secret(2));
    pair.run(seconds(13));
    assert_eq!(shown(&pair.sides[B]).len(), 1);
    assert!(pair.sides[A].down(CloseReason::Restarted) && !pair.sides[A].down(CloseReason::Timeout));
    pair.assert_same(1, 1);
}

// RFC 6290 §3: a responder that took the token closes, as configured for a dead peer; the initiator comes back.
#[test]
fn an_initiator_that_restarted_is_noticed_too() {
    let mut pair = makers(601);
    restart(&mut pair, A, secret(1));
    pair.run(seconds(13));
    assert!(pair.sides[B].down(CloseReason::Timeout));
    pair.assert_same(0, 0);
    pair.initiate(A, 2);
    pair.run(seconds(3));
    pair.assert_same(1, 1);
}

// RFC 6290 §4.3: a rekeyed IKE SA has new SPIs, so the peer gets a new token.
#[test]
fn tokens_are_renewed_when_the_ike_sa_is_rekeyed() {
    for (seed, rekeyer, lost) in [(602, A, A), (603, A, B), (604, B, A), (605, B, B)] {
        let mut pair = makers(seed);
        let (now, id) = (pair.now, pair.sides[rekeyer].only().id);
        pair.sides[rekeyer].engine.rekey(now, Target::Ike(id), 7).unwrap();
        // The token may overtake the answer that makes the successor, and comes again then.
        pair.run(seconds(9));
        pair.assert_same(1, 1);
        restart(&mut pair, lost, secret(if lost == A { 1 } else { 2 }));
        pair.run(seconds(13));
        let gone = if lost == A { CloseReason::Timeout } else { CloseReason::Restarted };
        assert!(pair.sides[1 - lost].down(gone), "rekeyed by {rekeyer}, lost by {lost}");
        assert!(pair.sides[1 - lost].logged("the peer has lost the IKE_SA"));
    }
}

// RFC 6290 §3, §9.1: another token, or none, ends nothing.
#[test]
fn a_wrong_token_ends_nothing() {
    for other in [secret(3), None] {
        let mut pair = makers(606);
        let told = usize::from(other.is_some());
        restart(&mut pair, B, other);
        pair.run(seconds(13));
        assert!(shown(&pair.sides[B]).len() >= told);
        assert_eq!(pair.sides[A].up().len(), 1);
        assert_eq!(pair.sides[A].installed.len(), 1);
    }
}

fn token_message(sa: &IkeSaStatus, token: Vec<u8>) -> Vec<u8> {
    let header = Header {
        initiator_spi: sa.initiator_spi,
        responder_spi: sa.responder_spi,
        major: 2,
        minor: 0,
        exchange: ExchangeType::INFORMATIONAL,
        from_initiator: false,
        response: true,
        message_id: 2,
    };
    let (protocol, spi, kind) = (Protocol::IKE, Vec::new(), NotifyType::QUICK_CRASH_DETECTION);
    wire::encode(&Message { header, payloads: vec![Payload::Notify(Notify { protocol, spi, kind, data: token })] })
}

/// The token that a side would show for its IKE SA.
fn token_of(side: &Side) -> Vec<u8> {
    let sa = side.only();
    let spis = crate::sa::channel::Spis { initiator: sa.initiator_spi, responder: sa.responder_spi };
    match side.engine.ctx.tokens.payload(spis) {
        Some(Payload::Notify(notify)) => notify.data,
        other => panic!("no token: {other:?}"),
    }
}

// RFC 6290 §5, §8.1: lengths, replays on another IKE SA, requests, and guesses without end.
#[test]
fn guessed_and_malformed_tokens_end_nothing() {
    let mut pair = makers(607);
    let sa = pair.sides[A].only();
    let good = token_of(&pair.sides[B]);
    let path = sa.path;
    let before = pair.snapshot(A);
    let mut tokens = vec![Vec::new(), vec![0; 15], vec![0; 16], vec![0; 129], good[1..].to_vec(), good[..31].to_vec()];
    tokens.push([&good[..], &[0]].concat());
    tokens.extend((0..100).map(|guess| vec![guess; 32]));
    let now = pair.now;
    for token in tokens {
        pair.sides[A].engine.handle_message(now, path, &token_message(&sa, token));
    }
    // The right token as a request, and for other SPIs.
    let mut request = token_message(&sa, good.clone());
    request[19] &= !0x20;
    pair.sides[A].engine.handle_message(now, path, &request);
    let other = IkeSaStatus { responder_spi: sa.responder_spi ^ 1, ..sa.clone() };
    pair.sides[A].engine.handle_message(now, path, &token_message(&other, good.clone()));
    // So many guesses have been made that even the right one has to wait.
    pair.sides[A].engine.handle_message(now, path, &token_message(&sa, good.clone()));
    pair.drain(A);
    assert_eq!(pair.snapshot(A), before);
    let later = now + seconds(10);
    pair.sides[A].engine.handle_message(later, path, &token_message(&sa, good));
    pair.drain(A);
    assert!(pair.sides[A].down(CloseReason::Restarted));
}

// RFC 6290 §9.2: MUST NOT send a valid token in the clear for an IKE SA that lives, whatever it is asked with.
#[test]
fn no_token_is_shown_for_a_living_ike_sa() {
    let mut pair = makers(608);
    pair.run(seconds(13));
    let request = pair.sides[A].sent.last().unwrap().clone();
    assert!(matches!(wire::parse(&request.bytes), Ok(Incoming::Protected(_))));
    let path = Path { local: request.path.remote, remote: request.path.local, transport: request.path.transport };
    for flags in 0..=u8::MAX {
        for spi in [None, Some(0..8), Some(8..16)] {
            let mut bytes = request.bytes.clone();
            bytes[19] = flags;
            if let Some(range) = spi {
                bytes[range.start] ^= 0x40;
            }
            for side in [A, B] {
                let now = pair.now;
                pair.sides[side].engine.handle_message(now, path, &bytes);
                pair.drain(side);
            }
        }
    }
    pair.run(seconds(3));
    // Those that were shown are of IKE SAs that are not there.
    for side in &pair.sides {
        assert!(!shown(side).contains(&token_of(side)));
    }
    pair.assert_same(1, 1);
}

// RFC 6290 §8.1, §9.3: strangers get a bounded number of tokens, and a token each is what they asked for.
#[test]
fn strangers_are_shown_a_bounded_number_of_tokens() {
    let mut pair = makers(609);
    pair.run(seconds(13));
    let request = pair.sides[A].sent.last().unwrap().clone();
    let path = Path { local: request.path.remote, remote: request.path.local, transport: request.path.transport };
    for spi in 0..200_u64 {
        let mut bytes = request.bytes.clone();
        bytes[19] = 0x08;
        bytes[..8].copy_from_slice(&(spi + 1).to_be_bytes());
        bytes[8..16].copy_from_slice(&(spi + 1000).to_be_bytes());
        let now = pair.now;
        pair.sides[B].engine.handle_message(now, path, &bytes);
        pair.drain(B);
    }
    assert_eq!(shown(&pair.sides[B]).len(), 20);
    pair.assert_same(1, 1);
}
