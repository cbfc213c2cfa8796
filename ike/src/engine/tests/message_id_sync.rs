//! Message ID synchronisation (RFC 6311): side B is a cluster, of which another member takes over.

use super::*;
use crate::sa::channel::Channel;
use crate::sa::fault::notify;
use crate::wire::{NotifyType, Payload};

fn channel(side: &mut Side) -> &mut Channel {
    let id = side.only().id;
    match &mut side.engine.sas.get_mut(&id).unwrap().sa {
        IkeSa::Established(sa) => &mut sa.channel,
        _ => panic!("established"),
    }
}

fn sync(nonce: u8, send: u32, receive: u32) -> Payload {
    let data = [[nonce; 4], send.to_be_bytes(), receive.to_be_bytes()].concat();
    notify(NotifyType::IKEV2_MESSAGE_ID_SYNC, data)
}

/// B sends this as a request with this message id; gives what A answers at once.
fn ask(pair: &mut Pair, message_id: u32, payloads: &[Payload]) -> Vec<Vec<u8>> {
    let mut rng = TestRng(pair.rng.next());
    let request = channel(&mut pair.sides[B]).ask_apart(message_id, payloads, &mut rng);
    send(pair, &request)
}

fn send(pair: &mut Pair, request: &[u8]) -> Vec<Vec<u8>> {
    let path = pair.sides[A].only().path;
    let before = pair.sides[A].sent.len();
    let now = pair.now;
    pair.sides[A].engine.handle_message(now, path, request);
    pair.drain(A);
    pair.sides[A].sent[before..].iter().map(|sent| sent.bytes.clone()).collect()
}

fn opened(pair: &mut Pair, answer: &[u8]) -> (u32, Vec<Payload>) {
    channel(&mut pair.sides[B]).open_apart(answer).expect("sealed for B")
}

fn ids(pair: &mut Pair, side: usize) -> (u32, u32) {
    channel(&mut pair.sides[side]).message_ids()
}

/// Both sides can still talk, in both directions.
fn talks(pair: &mut Pair) {
    for (side, token) in [(A, 801), (B, 802)] {
        let now = pair.now;
        let child = pair.sides[side].only().children[0].id;
        pair.sides[side].engine.rekey(now, Target::Child(child), token).unwrap();
        pair.drain(side);
        pair.run(seconds(20));
        assert!(pair.sides[side].done(token));
        pair.sides[side].events.clear();
        pair.assert_same(1, 1);
    }
}

// RFC 6311 §5.1: Message ID 0 both ways, the nonce comes back, and both go on with what was agreed.
#[test]
fn a_member_that_takes_over_goes_on_with_other_message_ids() {
    let mut pair = up(660);
    let (next, expected) = ids(&mut pair, A);
    let answers = ask(&mut pair, 0, &[sync(7, expected + 5, next)]);
    let answer = opened(&mut pair, &answers[0]);
    assert_eq!(answer, (0, vec![sync(7, next, expected + 5)]));
    assert_eq!(ids(&mut pair, A), (next, expected + 5));
    channel(&mut pair.sides[B]).take_over(expected + 5, next);
    talks(&mut pair);
}

// RFC 6311 §5.1: P2 is the higher of P1 and what we would use next.
#[test]
fn our_own_next_message_id_is_the_higher_one() {
    let mut pair = up(661);
    let (next, expected) = ids(&mut pair, A);
    let answers = ask(&mut pair, 0, &[sync(1, expected, next + 9)]);
    assert_eq!(opened(&mut pair, &answers[0]).1, [sync(1, next + 9, expected)]);
    assert_eq!(ids(&mut pair, A), (next + 9, expected));
    let answers = ask(&mut pair, 0, &[sync(2, expected + 1, 0)]);
    assert_eq!(opened(&mut pair, &answers[0]).1, [sync(2, next + 9, expected + 1)]);
    channel(&mut pair.sides[B]).take_over(expected + 1, next + 9);
    talks(&mut pair);
}

// RFC 7296 §2.1: the answer was lost; the same octets again, as long as nothing newer has come.
#[test]
fn a_repeated_synchronisation_gets_the_same_answer() {
    let mut pair = up(662);
    let (next, expected) = ids(&mut pair, A);
    let mut rng = TestRng(1);
    let request = channel(&mut pair.sides[B]).ask_apart(0, &[sync(3, expected + 2, next)], &mut rng);
    let first = send(&mut pair, &request);
    assert_eq!(first.len(), 1);
    assert_eq!(send(&mut pair, &request), first);
    channel(&mut pair.sides[B]).take_over(expected + 2, next);
    talks(&mut pair);
    // RFC 6311 §5.1: a replay is silently dropped.
    let before = pair.snapshot(A);
    assert!(send(&mut pair, &request).is_empty());
    assert_eq!(pair.snapshot(A), before);
    talks_again(&mut pair);
}

fn talks_again(pair: &mut Pair) {
    let (now, child) = (pair.now, pair.sides[B].only().children[0].id);
    pair.sides[B].engine.rekey(now, Target::Child(child), 803).unwrap();
    pair.drain(B);
    pair.run(seconds(20));
    assert!(pair.sides[B].done(803));
}

// RFC 6311 §5.1: M1 lower than or equal to what the cluster has used or said is silently dropped.
#[test]
fn a_sender_with_a_lower_message_id_is_ignored() {
    let mut pair = up(663);
    talks(&mut pair);
    let (next, expected) = ids(&mut pair, A);
    for send in [0, 1, expected - 1] {
        assert!(ask(&mut pair, 0, &[sync(4, send, next)]).is_empty());
        assert_eq!(ids(&mut pair, A), (next, expected));
    }
    assert_eq!(ask(&mut pair, 0, &[sync(5, expected + 3, next)]).len(), 1);
    assert!(ask(&mut pair, 0, &[sync(6, expected + 3, next)]).is_empty());
    assert_eq!(ids(&mut pair, A), (next, expected + 3));
    assert!(pair.sides[A].logged("ignore message ID sync with lower"));
}

// RFC 6311 §5: only where both have said so in IKE_AUTH.
#[test]
fn a_synchronisation_that_was_not_agreed_on_is_ignored() {
    let mut pair = up(664);
    // The peer's first request, which has Message ID 0 rightly, is further behind us than its window.
    talks(&mut pair);
    talks(&mut pair);
    talks(&mut pair);
    let id = pair.sides[A].only().id;
    let IkeSa::Established(sa) = &mut pair.sides[A].engine.sas.get_mut(&id).unwrap().sa else { panic!("established") };
    sa.negotiate_message_id_sync(&crate::sa::parts::Parts::default());
    let (next, expected) = ids(&mut pair, A);
    assert!(ask(&mut pair, 0, &[sync(8, expected + 5, next)]).is_empty());
    assert_eq!(ids(&mut pair, A), (next, expected));
    pair.assert_same(1, 1);
}

// RFC 6311 §5.1: no additional payloads, and no other exchange goes outside the window.
#[test]
fn nothing_else_may_have_message_id_zero() {
    let mut pair = up(665);
    talks(&mut pair);
    talks(&mut pair);
    talks(&mut pair);
    let (next, expected) = ids(&mut pair, A);
    let short = notify(NotifyType::IKEV2_MESSAGE_ID_SYNC, vec![0; 11]);
    let delete = Payload::Delete { protocol: Protocol::IKE, spis: Vec::new() };
    for payloads in [
        Vec::new(),
        vec![delete.clone()],
        vec![sync(9, expected + 5, next), delete],
        vec![sync(9, expected + 5, next), sync(9, expected + 6, next)],
        vec![sync(9, expected + 5, next), notify(NotifyType::INITIAL_CONTACT, Vec::new())],
        vec![short],
    ] {
        assert!(ask(&mut pair, 0, &payloads).is_empty(), "{payloads:?}");
        assert_eq!(ids(&mut pair, A), (next, expected));
    }
    // Nor is it a synchronisation with another message id, or a forged one.
    let mut rng = TestRng(5);
    let mut request = channel(&mut pair.sides[B]).ask_apart(0, &[sync(9, expected + 5, next)], &mut rng);
    *request.last_mut().unwrap() ^= 1;
    assert!(send(&mut pair, &request).is_empty());
    assert_eq!(ids(&mut pair, A), (next, expected));
    pair.assert_same(1, 1);
}

// RFC 6311 §9: what we asked the member that failed is asked again, under the new message id.
#[test]
fn our_outstanding_request_is_asked_again() {
    let mut pair = up(666);
    let (now, child) = (pair.now, pair.sides[A].only().children[0].id);
    pair.cut = true;
    pair.sides[A].engine.rekey(now, Target::Child(child), 810).unwrap();
    pair.drain(A);
    pair.cut = false;
    let (next, expected) = ids(&mut pair, A);
    let answers = ask(&mut pair, 0, &[sync(2, expected + 4, next + 2)]);
    assert_eq!(answers.len(), 2);
    channel(&mut pair.sides[B]).take_over(expected + 4, next + 2);
    assert_eq!(ids(&mut pair, A), (next + 3, expected + 4));
    pair.run(seconds(20));
    assert!(pair.sides[A].done(810));
    pair.assert_same(1, 1);
    talks(&mut pair);
}
