//! Several requests at once (RFC 7296 §2.3).

use super::by_hand::with_every_fault;
use super::*;
use crate::sa::fault::notify;
use crate::wire::{NotifyType, Payload};

fn channel(side: &mut Side) -> &mut crate::sa::channel::Channel {
    let id = side.only().id;
    match &mut side.engine.sas.get_mut(&id).unwrap().sa {
        IkeSa::Established(sa) => &mut sa.channel,
        _ => panic!("established"),
    }
}

/// A asks for this many more Child SAs.
fn ask_for(pair: &mut Pair, side: usize, count: u64) {
    for token in 0..count {
        pair.initiate(side, 100 + token);
    }
}

fn waiting(pair: &Pair) -> usize {
    pair.held.as_ref().unwrap().len()
}

/// The peer sends this request with a message ID so far ahead of the next one; gives what is answered at once.
fn ask_ahead(pair: &mut Pair, ahead: u8, payloads: &[Payload]) -> Vec<Transmit> {
    let mut rng = TestRng(pair.rng.next());
    let request =
        channel(&mut pair.sides[A]).forge(ExchangeType::INFORMATIONAL, false, ahead, payloads, None, &mut rng);
    let (path, now, before) = (pair.sides[A].only().path, pair.now, pair.sides[A].sent.len());
    pair.sides[A].engine.handle_message(now, path, &request[0]);
    pair.drain(A);
    pair.sides[A].sent[before..].to_vec()
}

// No more than the peer has said that it keeps, and as many as that.
#[test]
fn as_many_requests_are_out_as_the_peer_keeps() {
    for window in [1, 4] {
        let mut pair = Pair::by_hand(720);
        if window == 1 {
            channel(&mut pair.sides[A]).forget_window();
        }
        ask_for(&mut pair, A, 6);
        assert_eq!(waiting(&pair), window);
        // The newest first, and its answer: the oldest one is missing, so nothing follows.
        let newest = pair.held.as_mut().unwrap().pop().unwrap();
        pair.give(&newest, 0x80);
        pair.pass(B);
        assert_eq!(waiting(&pair), if window == 1 { 1 } else { 3 });
        pair.assert_comes_to_rest(1, 7);
        assert!((100..106).all(|token| pair.sides[A].done(token)));
    }
}

// Whatever happens to one of several exchanges that are under way together.
#[test]
fn exchanges_that_go_on_together_survive_any_single_fault() {
    let start = |seed, nonces: &[u8; 4]| {
        let mut pair = Pair::by_hand(seed);
        ask_for(&mut pair, A, 2);
        pair.rekey_child(A, nonces[0]);
        pair.rekey_child(B, nonces[1]);
        pair
    };
    with_every_fault(start, |pair, _| {
        pair.assert_same(1, 3);
        pair.assert_no_loss();
    });
    let start = |seed, _: &[u8; 4]| {
        let mut pair = Pair::by_hand(seed);
        ask_for(&mut pair, A, 2);
        pair.rekey_ike(B, 0x80);
        pair.rekey_ike(A, 0x80);
        pair
    };
    with_every_fault(start, |pair, _| {
        pair.assert_same(1, 3);
        pair.assert_no_loss();
    });
    let start = |seed, _: &[u8; 4]| {
        let mut pair = Pair::by_hand(seed);
        ask_for(&mut pair, A, 3);
        pair.delete_child(B);
        pair.delete_ike(A);
        pair
    };
    with_every_fault(start, |pair, _| pair.assert_same(0, 0));
}

// Requests pass one another all the time, are lost and come twice, over UDP, in fragments, and over a stream.
#[test]
fn any_order_of_many_exchanges_gives_the_same_sas() {
    for seed in 0..120 {
        let of = |side: usize| {
            let mut connection = connection(side);
            if seed % 3 == 1 {
                let mut net = (*connection.children[0]).clone();
                net.esp_proposals = parse_proposals("aes128gcm16-x25519", Protocol::ESP).unwrap();
                connection.children = vec![Arc::new(net)];
            }
            if seed % 5 == 2 && side == A {
                connection.tcp = TcpPolicy::Yes;
            }
            connection
        };
        let small = if seed % 4 == 3 { 250 } else { 1280 };
        let config = EngineConfig { fragment_size: small, ..EngineConfig::default() };
        let mut pair = established(Pair::with(seed, config, of(A), of(B)));
        pair.loss = seed % 20;
        pair.duplication = 20;
        pair.delay.0 = Duration::from_millis(900);
        pair.job_delay = Duration::from_millis(300);
        pair.key_delay = Duration::from_millis(seed % 2 * 100);
        for round in 0..30 {
            let side = if pair.rng.percent(50) { A } else { B };
            let sas = pair.sides[side].up();
            let now = pair.now;
            let Some(sa) = sas.last() else { continue };
            let child = sa.children.get(pair.rng.below(sa.children.len() as u64) as usize).map(|child| child.id);
            match (pair.rng.below(10), child) {
                (0..5, _) => pair.initiate(side, 200 + round),
                (5..7, Some(child)) => {
                    let _ = pair.sides[side].engine.rekey(now, Target::Child(child), 300 + round);
                }
                (7..9, Some(child)) => {
                    let _ = pair.sides[side].engine.terminate(now, Target::Child(child), false, 400 + round);
                }
                (9, _) if seed % 2 == 0 => {
                    let _ = pair.sides[side].engine.rekey(now, Target::Ike(sa.id), 500 + round);
                }
                _ => {}
            }
            pair.drain(side);
            let wait = pair.rng.below(400);
            pair.run(Duration::from_millis(wait));
        }
        (pair.loss, pair.duplication) = (0, 0);
        pair.run(seconds(900));
        let left = pair.sides[A].installed.len();
        pair.assert_same(1, left);
        for side in &pair.sides {
            assert!(!side.logged("giving up"), "seed {seed}");
        }
    }
}

// Answers that cannot be needed any more go.
#[test]
fn the_answers_that_are_kept_are_bounded_and_go_in_time() {
    let of = |side: usize| Connection { dpd_delay: seconds(60), ..connection(side) };
    let mut pair = established(Pair::with(721, EngineConfig::default(), of(A), of(B)));
    ask_for(&mut pair, A, 50);
    pair.run(seconds(30));
    let answers = |pair: &mut Pair| channel(&mut pair.sides[B]).answers_kept();
    assert_eq!(answers(&mut pair), 4);
    // ESP keeps it from asking whether the peer lives, but not from looking.
    pair.udp_blocked = true;
    pair.run(seconds(100));
    pair.udp_blocked = false;
    pair.run(seconds(5));
    assert!((1..=4).contains(&answers(&mut pair)));
}

// INVALID_MESSAGE_ID: in a request of our own, with the message ID, now and then; the request itself is not acknowledged.
#[test]
fn a_request_ahead_of_the_window_is_complained_about() {
    let mut pair = Pair::by_hand(722);
    let said = ask_ahead(&mut pair, 4, &[Payload::Delete { protocol: Protocol::IKE, spis: Vec::new() }]);
    assert_eq!(said.len(), 1);
    let header = init::header(&said[0].bytes);
    assert!(!header.response && header.exchange == ExchangeType::INFORMATIONAL);
    let (next, expected) = channel(&mut pair.sides[A]).message_ids();
    let (_, payloads) = channel(&mut pair.sides[B]).open_apart(&said[0].bytes).unwrap();
    assert_eq!(payloads, [notify(NotifyType::INVALID_MESSAGE_ID, (expected + 4).to_be_bytes().to_vec())]);
    pair.pass_all();
    assert_eq!(channel(&mut pair.sides[A]).message_ids(), (next, expected));
    // B takes note, and nothing changes.
    assert!(pair.sides[B].logged("received INVALID_MESSAGE_ID notify error"));
    assert_eq!(pair.states(A), [IkeState::Established]);
    for _ in 0..99 {
        assert!(ask_ahead(&mut pair, 7, &[]).is_empty());
        pair.run(Duration::from_millis(100));
    }
    pair.run(Duration::from_millis(100));
    assert_eq!(ask_ahead(&mut pair, 7, &[]).len(), 1);
    pair.pass_all();
    pair.assert_same(1, 1);
    // A forged one is not worth a word.
    pair.run(seconds(20));
    let mut rng = TestRng(1);
    let mut forged =
        channel(&mut pair.sides[A]).forge(ExchangeType::INFORMATIONAL, false, 4, &[], None, &mut rng).remove(0);
    *forged.last_mut().unwrap() ^= 1;
    let (path, now) = (pair.sides[A].only().path, pair.now);
    pair.sides[A].engine.handle_message(now, path, &forged);
    assert!(pair.sides[A].engine.poll_output().is_none());
}

// Four octets; less than before is no news, and nobody makes us send more than we would.
#[test]
fn a_window_only_grows() {
    let mut pair = up(723);
    channel(&mut pair.sides[A]).forget_window();
    let said = |size: &[u8]| notify(NotifyType::SET_WINDOW_SIZE, size.to_vec());
    let cases: [(&[u8], usize); 8] = [
        (&[0, 0, 0], 1),
        (&[0, 0, 0, 0, 5], 1),
        (&[0, 0, 0, 0], 1),
        (&[0, 0, 0, 3], 3),
        (&[0, 0, 0, 2], 3),
        (&[], 3),
        (&[0, 0, 1, 0], 8),
        (&[255, 255, 255, 255], 8),
    ];
    for (size, window) in cases {
        ask_ahead(&mut pair, 0, &[said(size)]);
        assert_eq!(channel(&mut pair.sides[A]).window(), window, "{size:?}");
    }
}

// A successor begins with a window of one, and both sides say theirs again with what they say anyway.
#[test]
fn a_rekeyed_ike_sa_begins_with_a_window_of_one() {
    let of = |side: usize| Connection { dpd_delay: seconds(20), ..connection(side) };
    let mut pair = established(Pair::with(724, EngineConfig::default(), of(A), of(B)));
    let windows = |pair: &mut Pair| [A, B].map(|side| channel(&mut pair.sides[side]).window());
    assert_eq!(windows(&mut pair), [4, 4]);
    let (ike, now) = (pair.sides[A].only().id, pair.now);
    pair.sides[A].engine.rekey(now, Target::Ike(ike), 2).unwrap();
    pair.drain(A);
    pair.run(seconds(5));
    assert_eq!(windows(&mut pair), [1, 1]);
    pair.run(seconds(60));
    assert_eq!(windows(&mut pair), [4, 4]);
    ask_for(&mut pair, A, 8);
    pair.run(seconds(10));
    pair.assert_same(1, 9);
}

// RFC 6311 §9: all that was asked is asked again, under new message IDs.
#[test]
fn several_outstanding_requests_are_asked_again_after_a_failover() {
    let mut pair = up(725);
    pair.cut = true;
    ask_for(&mut pair, A, 3);
    pair.run(Duration::from_millis(100));
    pair.cut = false;
    let (next, expected) = channel(&mut pair.sides[A]).message_ids();
    let data = [[7; 4], (expected + 9).to_be_bytes(), (next + 5).to_be_bytes()].concat();
    let mut rng = TestRng(3);
    let sync = notify(NotifyType::IKEV2_MESSAGE_ID_SYNC, data);
    let request = channel(&mut pair.sides[B]).ask_apart(0, &[sync], &mut rng);
    let (path, now) = (pair.sides[A].only().path, pair.now);
    pair.sides[A].engine.handle_message(now, path, &request);
    channel(&mut pair.sides[B]).take_over(expected + 9, next + 5);
    pair.drain(A);
    assert_eq!(channel(&mut pair.sides[A]).message_ids(), (next + 8, expected + 9));
    pair.run(seconds(20));
    assert!((100..103).all(|token| pair.sides[A].done(token)));
    pair.assert_same(1, 4);
}

// RFC 4555 §3.5: of two updates that pass one another the newer one counts; the other one gets its answer.
#[test]
fn an_older_update_that_comes_later_moves_nothing() {
    let mobile = |side: usize| Connection { mobike: true, ..connection(side) };
    let mut pair = established(Pair::with(726, EngineConfig::default(), mobile(A), mobile(B)));
    let mut rng = TestRng(4);
    let update = [notify(NotifyType::UPDATE_SA_ADDRESSES, Vec::new())];
    let exchange = ExchangeType::INFORMATIONAL;
    let [older, newer] = [0, 1]
        .map(|ahead| channel(&mut pair.sides[B]).forge(exchange, false, ahead, &update, None, &mut rng).remove(0));
    let known = pair.sides[B].only().path;
    let from = |address: &str| Path { remote: SocketAddr::new(address.parse().unwrap(), 4500), ..known };
    pair.cut = true;
    for (bytes, address) in [(newer, "10.0.1.1"), (older, "10.0.9.9")] {
        let now = pair.now;
        pair.sides[B].engine.handle_message(now, from(address), &bytes);
        pair.drain(B);
        let answers = pair.sides[B].sent.iter().filter(|sent| sent.path.remote == from(address).remote);
        assert!(answers.filter(|sent| init::header(&sent.bytes).response).count() == 1, "{address}");
        assert_eq!(pair.sides[B].only().path.remote, from("10.0.1.1").remote);
    }
}
