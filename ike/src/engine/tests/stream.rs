//! RFC 9329: IKE over streams.

use super::*;

fn with_policy(seed: u64, policy: TcpPolicy) -> Pair {
    let mut a = connection(A);
    a.tcp = policy;
    Pair::with(seed, EngineConfig::default(), a, connection(B))
}

#[test]
fn tcp_from_the_beginning() {
    let pair = established(with_policy(90, TcpPolicy::Yes));
    for side in &pair.sides {
        assert!(matches!(side.only().path.transport, Transport::Stream(_)));
        assert!(side.installed.values().all(|pair| matches!(pair.encapsulation, Encapsulation::Stream { .. })));
    }
}

// RFC 9329 §5.1: after at least one repetition, with a new SPI.
#[test]
fn silence_over_udp_falls_back_to_tcp() {
    let mut pair = with_policy(91, TcpPolicy::Fallback);
    pair.udp_blocked = true;
    pair.initiate(A, 1);
    pair.run(seconds(8));
    assert!(pair.sides[A].done(1));
    pair.assert_same(1, 1);
    let over_udp: Vec<u64> = pair.sides[A]
        .sent
        .iter()
        .filter(|sent| sent.path.transport == Transport::Udp)
        .map(|sent| init::header(&sent.bytes).initiator_spi)
        .collect();
    assert!(over_udp.len() >= 2);
    assert!(!over_udp.contains(&pair.sides[A].only().initiator_spi));
}

#[test]
fn an_answer_over_udp_needs_no_tcp() {
    let pair = established(with_policy(92, TcpPolicy::Fallback));
    assert_eq!(pair.sides[A].only().path.transport, Transport::Udp);
    assert!(pair.sides[A].streams.is_empty());
}

// RFC 9329 §5.1: the answer to the abandoned SPI comes too late.
#[test]
fn a_late_udp_answer_is_ignored() {
    let mut pair = with_policy(93, TcpPolicy::Fallback);
    pair.delay.1 = seconds(7);
    pair.initiate(A, 1);
    pair.run(seconds(60));
    assert!(pair.sides[A].done(1));
    assert!(matches!(pair.sides[A].only().path.transport, Transport::Stream(_)));
    pair.assert_same(1, 1);
}

#[test]
fn an_unreachable_port_hastens_the_fallback() {
    let mut pair = with_policy(94, TcpPolicy::Fallback);
    pair.udp_blocked = true;
    pair.initiate(A, 1);
    let now = pair.now;
    pair.sides[A].engine.handle_unreachable(now, "10.0.0.2:500".parse().unwrap());
    pair.run(seconds(1));
    assert!(pair.sides[A].done(1));
}

// Where nobody listens on TCP the peer may just be slow: UDP goes on.
#[test]
fn tcp_that_is_refused_leads_back_to_udp() {
    let mut pair = with_policy(97, TcpPolicy::Fallback);
    pair.udp_blocked = true;
    pair.tcp_blocked = true;
    pair.initiate(A, 1);
    pair.run(seconds(30));
    assert_eq!(pair.sides[A].failed(1), None);
    pair.udp_blocked = false;
    pair.run(seconds(60));
    assert!(pair.sides[A].done(1));
    assert_eq!(pair.sides[A].only().path.transport, Transport::Udp);
    pair.assert_same(1, 1);
}

#[test]
fn no_way_at_all_fails() {
    let mut pair = with_policy(95, TcpPolicy::Fallback);
    pair.cut = true;
    pair.initiate(A, 1);
    pair.run(seconds(400));
    assert!(pair.sides[A].failed(1).is_some());
    pair.assert_same(0, 0);
}

// RFC 9329 §6.1: the originator opens another stream and shows itself; the SA and its children move.
#[test]
fn a_broken_stream_is_reopened() {
    let mut pair = established(with_policy(96, TcpPolicy::Yes));
    let old = pair.sides[B].only().path;
    pair.break_streams();
    pair.run(seconds(3));
    let new = pair.sides[B].only().path;
    assert_ne!(old, new);
    pair.assert_same(1, 1);
    for side in &pair.sides {
        let Transport::Stream(stream) = side.only().path.transport else { panic!("over a stream") };
        let moved =
            |pair: &Installed| matches!(pair.encapsulation, Encapsulation::Stream { stream: to, .. } if to == stream);
        assert!(side.installed.values().all(moved));
    }
}

// RFC 9329 §6.1: an outstanding request goes again over the new stream, from either side.
#[test]
fn a_request_survives_a_broken_stream() {
    for side in [A, B] {
        let mut pair = established(with_policy(97, TcpPolicy::Yes));
        let child = pair.sides[side].only().children[0].id;
        pair.break_streams();
        let now = pair.now;
        pair.sides[side].engine.rekey(now, Target::Child(child), 2).unwrap();
        // The request is lost with the stream.
        pair.sides[side].streams.clear();
        pair.run(seconds(20));
        assert!(pair.sides[side].done(2), "side {side}");
        pair.assert_same(1, 1);
    }
}

#[test]
fn a_stream_that_cannot_be_reopened_ends_the_sa() {
    let mut pair = established(with_policy(98, TcpPolicy::Yes));
    pair.tcp_blocked = true;
    pair.break_streams();
    pair.run(seconds(400));
    assert!(pair.sides[A].down(CloseReason::Timeout));
    assert!(pair.sides[A].installed.is_empty());
}

// RFC 9329 §6.1: the stream stays through rekeys of the IKE SA, and goes with the last user.
#[test]
fn the_stream_lives_as_long_as_its_users() {
    let mut pair = established(with_policy(99, TcpPolicy::Yes));
    let stream = pair.sides[A].only().path.transport;
    let ike = pair.sides[A].only().id;
    let now = pair.now;
    pair.sides[A].engine.rekey(now, Target::Ike(ike), 2).unwrap();
    pair.run(seconds(2));
    pair.assert_same(1, 1);
    assert_eq!(pair.sides[A].only().path.transport, stream);
    assert_eq!(pair.sides[A].streams.len(), 1);
    let ike = pair.sides[A].only().id;
    let now = pair.now;
    pair.sides[A].engine.terminate(now, Target::Ike(ike), false, 3).unwrap();
    pair.run(seconds(10));
    pair.assert_same(0, 0);
    assert!(pair.sides[A].streams.is_empty() && pair.sides[B].streams.is_empty());
}

// RFC 9329 §6.2: no repetitions, but an end.
#[test]
fn silence_on_a_stream_ends_without_repetitions() {
    let mut pair = established(with_policy(100, TcpPolicy::Yes));
    let child = pair.sides[A].only().children[0].id;
    pair.cut = true;
    let sent = pair.sides[A].sent.len();
    let now = pair.now;
    pair.sides[A].engine.rekey(now, Target::Child(child), 2).unwrap();
    pair.run(seconds(300));
    assert_eq!(pair.sides[A].sent.len(), sent + 1);
    assert!(pair.sides[A].down(CloseReason::Timeout));
}

// RFC 9329 §7.5: no fragments over a stream.
#[test]
fn long_messages_stay_whole_on_a_stream() {
    let mut a = connection(A);
    a.tcp = TcpPolicy::Yes;
    let config = EngineConfig { fragment_size: 250, ..EngineConfig::default() };
    let pair = established(Pair::with(101, config, a, connection(B)));
    assert_eq!(pair.sides[A].sent.len(), 2);
    // §7.5: it is negotiated all the same, for MOBIKE may lead to UDP.
    for side in [A, B] {
        assert_eq!(
            super::stream_rules::said(&pair.sides[side], crate::wire::NotifyType::IKEV2_FRAGMENTATION_SUPPORTED),
            1
        );
    }
}
