//! IKE_SA_INIT in both roles.

use super::*;
use crate::wire::{Header, NotifyType, Payload};

#[test]
fn a_pair_comes_up() {
    let pair = up(1);
    assert!(pair.sides[A].logged("initiating IKE_SA site[1] to 10.0.0.2"));
    assert!(pair.sides[B].logged("IKE_SA site[1] established between 10.0.0.2[b]...10.0.0.1[a]"));
}

// RFC 7296 §2.6: with a threshold of 0 each request needs a cookie, and gets state with one only.
#[test]
fn a_cookie_is_demanded_and_answered() {
    let config = EngineConfig { cookie_threshold: 0, ..EngineConfig::default() };
    let mut pair = Pair::with(2, config, connection(A), connection(B));
    pair.initiate(A, 1);
    pair.run(Duration::from_millis(25));
    let cookie = notifies(&pair.sides[B].sent[0].bytes);
    assert_eq!(cookie, [NotifyType::COOKIE]);
    let pair = established_from(pair);
    let second = payloads(&pair.sides[A].sent[1].bytes);
    assert!(matches!(&second[0], Payload::Notify(notify) if notify.kind == NotifyType::COOKIE));
    // The rest is what it was before.
    let first = payloads(&pair.sides[A].sent[0].bytes);
    assert_eq!(first[..3], second[1..4]);
}

// RFC 7296 §2.6: but for the cookie, the repeated request is the same to the octet, a pretended NAT included.
#[test]
fn a_request_is_repeated_unchanged_behind_its_cookie() {
    let mut a = connection(A);
    a.force_encapsulation = true;
    let config = EngineConfig { cookie_threshold: 0, ..EngineConfig::default() };
    let pair = established(Pair::with(16, config, a, connection(B)));
    let payloads = |bytes: &[u8]| match crate::wire::parse(bytes) {
        Ok(crate::wire::Incoming::Plain(message)) => message.payloads,
        other => panic!("{other:?}"),
    };
    let first = payloads(&pair.sides[A].sent[0].bytes);
    let second = payloads(&pair.sides[A].sent[1].bytes);
    assert!(matches!(&second[0], Payload::Notify(notify) if notify.kind == NotifyType::COOKIE));
    assert_eq!(first[..], second[1..]);
}

// RFC 7296 §2.6: before the cookie there is no state, whoever asks and however often.
#[test]
fn requests_without_cookie_make_no_state() {
    let config = EngineConfig { cookie_threshold: 0, ..EngineConfig::default() };
    let mut pair = Pair::with(3, config, connection(A), connection(B));
    pair.initiate(A, 1);
    let request = pair.sides[A].sent[0].clone();
    let now = pair.now;
    for port in 1000..1200 {
        let path =
            Path { local: request.path.remote, remote: SocketAddr::new(address(A), port), transport: Transport::Udp };
        pair.sides[B].engine.handle_message(now, path, &request.bytes);
    }
    assert_eq!(pair.sides[B].engine.counts(), (0, 0));
    assert!(pair.sides[B].engine.ctx.own_spis() == 0);
}

// RFC 7296 §2.6: a cookie is good for its nonce, address and SPI only.
#[test]
fn a_cookie_of_another_address_is_not_good() {
    let config = EngineConfig { cookie_threshold: 0, ..EngineConfig::default() };
    let mut pair = Pair::with(4, config, connection(A), connection(B));
    pair.initiate(A, 1);
    pair.run(Duration::from_millis(40));
    let with_cookie = pair.sides[A].sent[1].clone();
    let mut other =
        Pair::with(4, EngineConfig { cookie_threshold: 0, ..EngineConfig::default() }, connection(A), connection(B));
    let path =
        Path { local: with_cookie.path.remote, remote: "10.0.0.77:500".parse().unwrap(), transport: Transport::Udp };
    let now = other.now;
    other.sides[B].engine.handle_message(now, path, &with_cookie.bytes);
    assert_eq!(other.sides[B].engine.counts(), (0, 0));
}

#[test]
fn too_many_half_open_sas_of_one_address_are_dropped() {
    let config = EngineConfig { cookie_threshold_ip: 1000, block_threshold: 5, ..EngineConfig::default() };
    let mut pair = Pair::with(5, config, connection(A), connection(B));
    pair.initiate(A, 1);
    let request = pair.sides[A].sent[0].clone();
    let now = pair.now;
    for port in 1000..1100 {
        let remote = SocketAddr::new(address(A), port);
        let path = Path { local: request.path.remote, remote, transport: Transport::Udp };
        pair.sides[B].engine.handle_message(now, path, &request.bytes);
    }
    assert_eq!(pair.sides[B].engine.counts(), (5, 5));
    // And they go after their time.
    pair.cut = true;
    pair.run(seconds(31));
    assert_eq!(pair.sides[B].engine.counts(), (0, 0));
}

// RFC 7296 §1.2: the responder names the group that it wants.
#[test]
fn another_group_is_taken_when_the_responder_asks_for_it() {
    let mut a = connection(A);
    a.proposals = parse_proposals("aes128gcm16-prfsha256-ecp256-x25519", Protocol::IKE).unwrap();
    let pair = established(Pair::with(6, EngineConfig::default(), a, connection(B)));
    assert!(pair.sides[A].logged("peer didn't accept key exchange method ECP_256, it requested CURVE_25519"));
}

#[test]
fn no_common_proposal_fails() {
    let mut a = connection(A);
    a.proposals = parse_proposals("aes256gcm16-prfsha512-x25519", Protocol::IKE).unwrap();
    let mut pair = Pair::with(7, EngineConfig::default(), a, connection(B));
    pair.initiate(A, 1);
    pair.run(seconds(1));
    assert!(pair.sides[A].logged("received NO_PROPOSAL_CHOSEN notify error"));
    pair.run(seconds(15));
    assert_eq!(pair.sides[A].failed(1).as_deref(), Some("received NO_PROPOSAL_CHOSEN notify error"));
    pair.assert_same(0, 0);
}

#[test]
fn an_address_without_connection_gets_no_proposal_chosen() {
    let mut b = connection(B);
    b.remote_addrs = vec![AddressRange::host("10.9.9.9".parse().unwrap())];
    let mut pair = Pair::with(8, EngineConfig::default(), connection(A), b);
    pair.initiate(A, 1);
    pair.run(seconds(15));
    assert!(pair.sides[A].failed(1).is_some());
    pair.assert_same(0, 0);
}

// RFC 7296 §2.1: a repeated request gets the same octets again, and no second IKE SA.
#[test]
fn a_repeated_request_gets_the_same_answer() {
    let mut pair = Pair::new(9);
    pair.initiate(A, 1);
    let request = pair.sides[A].sent[0].clone();
    pair.run(Duration::from_millis(12));
    let path = Path { local: request.path.remote, remote: request.path.local, transport: Transport::Udp };
    let now = pair.now;
    pair.sides[B].engine.handle_message(now, path, &request.bytes);
    pair.drain(B);
    assert_eq!(pair.sides[B].sent.len(), 2);
    assert_eq!(pair.sides[B].sent[0], pair.sides[B].sent[1]);
    assert_eq!(pair.sides[B].engine.counts(), (1, 1));
}

// RFC 7296 §2.5.
#[test]
fn a_later_major_version_is_told_ours() {
    let mut pair = Pair::new(10);
    pair.initiate(A, 1);
    let mut request = pair.sides[A].sent[0].clone();
    request.bytes[17] = 0x30;
    let path = Path { local: request.path.remote, remote: request.path.local, transport: Transport::Udp };
    let now = pair.now;
    pair.sides[B].engine.handle_message(now, path, &request.bytes);
    pair.drain(B);
    assert_eq!(notifies(&pair.sides[B].sent[0].bytes), [NotifyType::INVALID_MAJOR_VERSION]);
    assert_eq!(pair.sides[B].engine.counts(), (0, 0));
}

// RFC 7296 §2.5.
#[test]
fn an_unknown_critical_payload_is_refused() {
    let mut pair = Pair::new(11);
    pair.initiate(A, 1);
    let request = pair.sides[A].sent[0].clone();
    let Ok(Incoming::Plain(mut message)) = wire::parse(&request.bytes) else { panic!("a plain message") };
    message.payloads.push(Payload::Unknown { kind: 200, critical: true, data: vec![1] });
    let path = Path { local: request.path.remote, remote: request.path.local, transport: Transport::Udp };
    let now = pair.now;
    pair.sides[B].engine.handle_message(now, path, &wire::encode(&message));
    pair.drain(B);
    let answer = payloads(&pair.sides[B].sent[0].bytes);
    assert!(
        matches!(&answer[0], Payload::Notify(n) if n.kind == NotifyType::UNSUPPORTED_CRITICAL_PAYLOAD && n.data == [200])
    );
    assert_eq!(pair.sides[B].engine.counts(), (0, 0));
}

#[test]
fn silence_ends_after_all_repetitions_and_tries() {
    let mut a = connection(A);
    a.keyingtries = 2;
    let mut pair = Pair::with(12, EngineConfig::default(), a, connection(B));
    pair.cut = true;
    pair.initiate(A, 1);
    pair.run(seconds(400));
    assert!(pair.sides[A].failed(1).is_some());
    assert!(pair.sides[A].logged("peer not responding, trying again (2/2)"));
    // Two sequences of one request and five repetitions, each with an SPI of its own.
    assert_eq!(pair.sides[A].sent.len(), 12);
    let spi = |n: usize| header(&pair.sides[A].sent[n].bytes).initiator_spi;
    assert_eq!(spi(0), spi(5));
    assert_ne!(spi(5), spi(6));
    pair.assert_same(0, 0);
}

fn established_from(mut pair: Pair) -> Pair {
    pair.run(seconds(3));
    pair.assert_same(1, 1);
    pair
}

pub(super) fn header(bytes: &[u8]) -> Header {
    match wire::parse(bytes).unwrap() {
        Incoming::Plain(message) => message.header,
        Incoming::Protected(protected) => protected.header,
    }
}

pub(super) fn payloads(bytes: &[u8]) -> Vec<Payload> {
    match wire::parse(bytes).unwrap() {
        Incoming::Plain(message) => message.payloads,
        Incoming::Protected(_) => panic!("a plain message"),
    }
}

fn notifies(bytes: &[u8]) -> Vec<NotifyType> {
    let kinds = payloads(bytes).into_iter().filter_map(|payload| match payload {
        Payload::Notify(notify) => Some(notify.kind),
        _ => None,
    });
    kinds.collect()
}
