//! What an attempt to initiate survives: forged refusals, silence in IKE_AUTH, broken streams (RFC 7296 §2.21.1,
//! RFC 9329 §6.1).

use super::*;
use crate::sa::fault::notify;
use crate::wire::{Header, Message, NotifyType};

/// A's IKE_SA_INIT request is on its way, and messages go by hand.
fn asked(seed: u64, a: Connection) -> Pair {
    let mut pair = Pair::with(seed, EngineConfig::default(), a, connection(B));
    pair.job_delay = Duration::ZERO;
    pair.held = Some(Vec::new());
    pair.initiate(A, 1);
    pair.run(Duration::ZERO);
    assert!(pair.has_sent(A));
    pair
}

/// What anybody could answer who sees A's request.
fn forge(pair: &mut Pair, kind: NotifyType, data: Vec<u8>) {
    let request = pair.sides[A].sent[0].clone();
    let Ok(Incoming::Plain(Message { header, .. })) = wire::parse(&request.bytes) else { panic!("a plain message") };
    let header = Header { from_initiator: false, response: true, ..header };
    let bytes = wire::encode(&Message { header, payloads: vec![notify(kind, data)] });
    let now = pair.now;
    pair.sides[A].engine.handle_message(now, request.path, &bytes);
    pair.drain(A);
    pair.run(Duration::ZERO);
}

// RFC 7296 §2.21.1: all error notifications are unauthenticated, so the genuine answer has its chance.
#[test]
fn a_forged_refusal_does_not_end_an_attempt() {
    let kinds = [
        (NotifyType::NO_PROPOSAL_CHOSEN, Vec::new()),
        (NotifyType::INVALID_SYNTAX, Vec::new()),
        (NotifyType::AUTHENTICATION_FAILED, Vec::new()),
        // A method that we never offered.
        (NotifyType::INVALID_KE_PAYLOAD, vec![0, 99]),
    ];
    for (seed, (kind, data)) in kinds.into_iter().enumerate() {
        let mut pair = asked(seed as u64, connection(A));
        forge(&mut pair, kind, data);
        pair.pass_all();
        pair.let_go();
        pair.run(seconds(5));
        assert!(pair.sides[A].done(1), "{kind:?}");
        pair.assert_same(1, 1);
    }
}

// The same when the genuine request was lost and is repeated.
#[test]
fn the_request_is_repeated_after_a_refusal() {
    let mut pair = asked(10, connection(A));
    pair.take(A);
    forge(&mut pair, NotifyType::NO_PROPOSAL_CHOSEN, Vec::new());
    pair.let_go();
    pair.run(seconds(6));
    assert!(pair.sides[A].done(1));
}

#[test]
fn a_refusal_is_believed_in_the_end() {
    let mut pair = asked(11, connection(A));
    pair.take(A);
    forge(&mut pair, NotifyType::NO_PROPOSAL_CHOSEN, Vec::new());
    pair.let_go();
    pair.cut = true;
    pair.run(seconds(10));
    assert!(pair.sides[A].failed(1).is_none());
    pair.run(seconds(10));
    assert_eq!(pair.sides[A].failed(1).as_deref(), Some("received NO_PROPOSAL_CHOSEN notify error"));
    assert!(pair.sides[A].engine.ctx.own_spis() == 0);
}

// `keyingtries`: silence in IKE_AUTH begins another sequence, as silence in IKE_SA_INIT does.
#[test]
fn another_try_follows_silence_in_ike_auth() {
    let a = Connection { keyingtries: 2, ..connection(A) };
    let mut pair = asked(12, a);
    pair.pass(A);
    pair.pass(B);
    pair.take(A);
    pair.let_go();
    pair.cut = true;
    pair.run(seconds(170));
    assert!(pair.sides[A].logged("trying again (2/2)"));
    assert!(pair.sides[A].failed(1).is_none());
    pair.cut = false;
    pair.run(seconds(30));
    assert!(pair.sides[A].done(1));
    pair.run(seconds(60));
    pair.assert_same(1, 1);
}

#[test]
fn tries_in_ike_auth_end() {
    let mut pair = asked(13, connection(A));
    pair.pass(A);
    pair.pass(B);
    pair.let_go();
    pair.cut = true;
    pair.run(seconds(400));
    assert_eq!(pair.sides[A].failed(1).as_deref(), Some("the peer does not answer"));
    pair.assert_same(0, 0);
}

// RFC 9329 §6.1: the TCP Originator opens another stream and sends what is outstanding.
#[test]
fn a_stream_that_breaks_in_ike_auth_is_opened_again() {
    for seed in 0..20 {
        let a = Connection { tcp: TcpPolicy::Yes, ..connection(A) };
        let mut pair = Pair::with(seed, EngineConfig::default(), a, connection(B));
        pair.initiate(A, 1);
        // Somewhere between the answer to IKE_SA_INIT and the end.
        for _ in 0..2000 {
            pair.run(Duration::from_millis(1));
            let sent = pair.sides[A].sent.len();
            if sent == 2 {
                break;
            }
        }
        pair.break_streams();
        pair.run(seconds(60));
        assert!(pair.sides[A].done(1), "seed {seed}: {:?}", pair.sides[A].failed(1));
        pair.assert_same(1, 1);
    }
}

#[test]
fn a_stream_that_cannot_be_opened_again_ends_the_attempt() {
    let a = Connection { tcp: TcpPolicy::Yes, ..connection(A) };
    let mut pair = Pair::with(30, EngineConfig::default(), a, connection(B));
    pair.initiate(A, 1);
    for _ in 0..2000 {
        pair.run(Duration::from_millis(1));
        if pair.sides[A].sent.len() == 2 {
            break;
        }
    }
    pair.tcp_blocked = true;
    pair.break_streams();
    pair.run(seconds(400));
    assert!(pair.sides[A].failed(1).is_some());
    assert!(pair.sides[A].engine.ctx.own_spis() == 0 && pair.sides[A].engine.ctx.shared.streams.is_empty());
}

// RFC 9329 §5.1: what is remembered of a network is what an authentic answer has shown. Anybody on the path can answer to
// IKE_SA_INIT, and to IKE_AUTH without a proof.
#[test]
fn an_answer_that_nobody_has_proved_teaches_nothing_about_the_network() {
    let udp = Path {
        local: SocketAddr::new(address(A), 500),
        remote: SocketAddr::new(address(B), 500),
        transport: Transport::Udp,
    };
    let needs_stream = |pair: &Pair| pair.sides[A].engine.ctx.shared.networks.lock().needs_stream(pair.now, &udp);
    let with_memory = |seed: u64, udp_blocked: bool| {
        let a = Connection { tcp: TcpPolicy::Fallback, ..connection(A) };
        let mut pair = Pair::with(seed, EngineConfig::default(), a, connection(B));
        pair.udp_blocked = udp_blocked;
        pair
    };
    // Over a stream, by somebody who is not B.
    let mut pair = with_memory(40, true);
    pair.sides[B].credentials = shared_key("guessed");
    pair.initiate(A, 1);
    pair.run(seconds(30));
    assert!(pair.sides[A].failed(1).is_some() && pair.sides[A].sent.len() > 2);
    assert!(!needs_stream(&pair));
    // B itself.
    let mut pair = with_memory(41, true);
    pair.initiate(A, 1);
    while pair.sides[B].sent.is_empty() {
        pair.run(Duration::from_millis(1));
    }
    pair.run(Duration::from_millis(10));
    assert!(!needs_stream(&pair), "IKE_AUTH is on its way");
    pair.run(seconds(30));
    assert!(pair.sides[A].done(1) && needs_stream(&pair));
    // The other way round: an answer over UDP does not take away what is known by then.
    let mut pair = with_memory(42, false);
    pair.sides[B].credentials = shared_key("guessed");
    pair.initiate(A, 1);
    let stream = Path { transport: Transport::Stream(StreamId(99)), ..udp };
    pair.sides[A].engine.ctx.shared.networks.lock().note(pair.now, &stream);
    pair.run(seconds(30));
    assert!(pair.sides[A].failed(1).is_some() && pair.sides[A].streams.is_empty());
    assert!(needs_stream(&pair));
}
