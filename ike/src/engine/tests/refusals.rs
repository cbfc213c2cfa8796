//! What an authenticated peer may not say, and what it is told; what may look unusual and is fine.

use super::*;
use crate::sa::channel::Received;
use crate::sa::parts::Parts;
use crate::wire::{Notify, NotifyType, Payload};

/// A, which is authenticated, sends this request; gives what B answers.
pub(super) fn ask(pair: &mut Pair, exchange: ExchangeType, payloads: &[Payload]) -> Parts {
    let retry = retry::Retry::start(pair.now, &pair.sides[A].engine.ctx.config.retransmission, false, &mut TestRng(1));
    let slot = pair.sides[A].engine.sas.values_mut().next().unwrap();
    let IkeSa::Established(sa) = &mut slot.sa else { panic!("an established IKE SA") };
    let sealed = sa.channel.request(exchange, payloads, None, retry, &mut TestRng(9)).unwrap();
    let path = Path { local: sa.core.path.remote, remote: sa.core.path.local, transport: sa.core.path.transport };
    let (now, before) = (pair.now, pair.sides[B].sent.len());
    pair.sides[B].engine.handle_message(now, path, &sealed[0]);
    pair.drain(B);
    if pair.sides[B].sent.len() == before {
        // A Child SA is installed before the answer is sent, which A's engine shall not take.
        let cut = std::mem::replace(&mut pair.cut, true);
        pair.run(Duration::from_millis(100));
        pair.cut = cut;
    }
    assert_eq!(pair.sides[B].sent.len(), before + 1, "one answer");
    let answer = pair.sides[B].sent[before].bytes.clone();
    let Ok(Incoming::Protected(protected)) = wire::parse(&answer) else { panic!("a protected answer") };
    let slot = pair.sides[A].engine.sas.values_mut().next().unwrap();
    let IkeSa::Established(sa) = &mut slot.sa else { panic!("an established IKE SA") };
    let Received::Response(opened) = sa.channel.receive(protected, &answer) else { panic!("a response") };
    Parts::of(&opened).unwrap()
}

// RFC 7296 §2.21.3: authentic, but with two payloads where one may be.
#[test]
fn a_malformed_request_gets_invalid_syntax_and_ends_the_ike_sa() {
    let mut pair = up(120);
    let nonce = || Payload::Nonce(vec![7; 32]);
    let answer = ask(&mut pair, ExchangeType::CREATE_CHILD_SA, &[nonce(), nonce()]);
    assert!(answer.has(NotifyType::INVALID_SYNTAX));
    assert!(pair.sides[B].down(CloseReason::Failed));
    assert!(pair.sides[B].installed.is_empty());
}

// RFC 7296 §2.5: the request is rejected as a whole, the IKE SA stays.
#[test]
fn an_unknown_critical_payload_refuses_the_request_only() {
    let mut pair = up(121);
    let child = pair.sides[B].only().children[0].spi_out;
    let payloads = [
        Payload::Delete { protocol: Protocol::ESP, spis: vec![child] },
        Payload::Unknown { kind: 200, critical: true, data: vec![1] },
    ];
    let answer = ask(&mut pair, ExchangeType::INFORMATIONAL, &payloads);
    assert_eq!(answer.notify(NotifyType::UNSUPPORTED_CRITICAL_PAYLOAD).unwrap().data, [200]);
    assert_eq!(pair.sides[B].only().children.len(), 1);
    // The same payload without the bit is skipped.
    let payloads = [Payload::Unknown { kind: 200, critical: false, data: vec![1] }];
    assert!(ask(&mut pair, ExchangeType::INFORMATIONAL, &payloads).notifies.is_empty());
}

// RFC 7296 §2.25.1.
#[test]
fn the_rekey_of_an_unknown_child_sa_gets_child_sa_not_found() {
    let mut pair = up(122);
    let spi = 0xdead_beef_u32.to_be_bytes().to_vec();
    let rekey = Notify { protocol: Protocol::ESP, spi: spi.clone(), kind: NotifyType::REKEY_SA, data: Vec::new() };
    let payloads = [Payload::Notify(rekey), Payload::Nonce(vec![7; 32])];
    let answer = ask(&mut pair, ExchangeType::CREATE_CHILD_SA, &payloads);
    let notify = answer.notify(NotifyType::CHILD_SA_NOT_FOUND).unwrap();
    assert_eq!((notify.protocol, &notify.spi), (Protocol::ESP, &spi));
    assert_eq!(pair.sides[B].only().children.len(), 1);
}

// RFC 7296 §2.25.1: nothing to delete, so nothing named in the answer.
#[test]
fn the_delete_of_an_unknown_child_sa_is_answered_without_a_delete() {
    let mut pair = up(123);
    let payloads = [Payload::Delete { protocol: Protocol::ESP, spis: vec![0xdead_beef] }];
    let answer = ask(&mut pair, ExchangeType::INFORMATIONAL, &payloads);
    assert!(answer.deletes.is_empty() && answer.notifies.is_empty());
    assert_eq!(pair.sides[B].only().children.len(), 1);
}

// RFC 7296 §2.5: payloads in any order.
#[test]
fn payloads_in_another_order_are_accepted() {
    let mut pair = Pair::new(124);
    pair.initiate(A, 1);
    let request = pair.sides[A].sent[0].clone();
    let Ok(Incoming::Plain(mut message)) = wire::parse(&request.bytes) else { panic!("a plain message") };
    message.payloads.reverse();
    let path = Path { local: request.path.remote, remote: request.path.local, transport: Transport::Udp };
    let now = pair.now;
    pair.sides[B].engine.handle_message(now, path, &wire::encode(&message));
    pair.drain(B);
    let answer = init::payloads(&pair.sides[B].sent[0].bytes);
    assert!(answer.iter().any(|payload| matches!(payload, Payload::Sa(_))));
    assert_eq!(pair.sides[B].engine.counts(), (1, 1));
}

// RFC 9329 §6.3: the stream has shown where its originator is.
#[test]
fn no_cookie_is_demanded_over_a_stream() {
    let mut a = connection(A);
    a.tcp = TcpPolicy::Yes;
    let config = EngineConfig { cookie_threshold: 0, ..EngineConfig::default() };
    let pair = established(Pair::with(125, config, a, connection(B)));
    let requests = pair.sides[A].sent.iter().filter(|sent| init::header(&sent.bytes).exchange.0 == 34);
    assert_eq!(requests.count(), 1);
}
