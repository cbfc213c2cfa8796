//! Session resumption (RFC 5723): who may come back with a ticket, as whom, and what becomes of everybody else.

use super::configuration::{client, gateway, pool, vips};
use super::refusals::ask;
use super::*;
use crate::engine::tickets::Held as HeldTicket;
use crate::sa::channel::Channel;
use crate::wire::{Header, Notify, NotifyType, Payload};

fn resuming(side: usize) -> Connection {
    // A notices that B is silent.
    let dpd_delay = if side == A { seconds(10) } else { Duration::ZERO };
    Connection { session_resumption: true, dpd_delay, ..connection(side) }
}

/// Established; A has a ticket of B's.
fn with_ticket(seed: u64) -> Pair {
    with_ticket_of(Pair::with(seed, EngineConfig::default(), resuming(A), resuming(B)))
}

fn with_ticket_of(pair: Pair) -> Pair {
    let pair = established(pair);
    assert_eq!(pair.sides[B].engine.ctx.shared.tickets.lock().counts(), (1, 0));
    assert!(pair.sides[A].logged("received a ticket"));
    pair
}

/// A gives B up, whom nothing reaches for a while; B notices nothing.
fn lose(pair: &mut Pair) {
    pair.cut = true;
    pair.run(seconds(240));
    pair.cut = false;
    assert!(pair.sides[A].engine.sas.is_empty() && pair.sides[A].installed.is_empty());
    assert_eq!(pair.sides[A].engine.ctx.shared.tickets.lock().counts().1, 1);
}

/// Nobody can prove anything by credentials any more, though the engines do not know.
fn take_credentials(pair: &mut Pair) {
    for side in &mut pair.sides {
        side.credentials = Credentials::new();
        side.events.clear();
        side.sent.clear();
    }
}

/// A comes again.
fn come_back(pair: &mut Pair, token: u64) {
    for side in &mut pair.sides {
        side.events.clear();
        side.sent.clear();
    }
    pair.initiate(A, token);
    pair.run(seconds(12));
}

fn resumed(pair: &Pair) -> [bool; 2] {
    [A, B].map(|side| pair.sides[side].only().resumed)
}

/// A is there again by credentials, as the gateway or it itself does not take the ticket.
fn assert_from_start(pair: &Pair, token: u64, why: &str) {
    assert!(pair.sides[A].done(token), "{why}: {:#?}", lines(&pair.sides[A]));
    assert!(pair.sides[A].up().iter().chain(&pair.sides[B].up()).all(|sa| !sa.resumed), "{why}");
    let used = pair.sides[B]
        .events
        .iter()
        .any(|event| matches!(event, Event::Log { message, .. } if message.contains("by ticket")));
    assert!(!used, "{why}");
}

fn lines(side: &Side) -> Vec<&str> {
    side.events
        .iter()
        .filter_map(|event| match event {
            Event::Log { message, .. } => Some(message.as_str()),
            _ => None,
        })
        .collect()
}

fn plain(side: &Side) -> Vec<Message> {
    let of = |sent: &Transmit| match wire::parse(&sent.bytes) {
        Ok(Incoming::Plain(message)) => Some(message),
        _ => None,
    };
    side.sent.iter().filter_map(of).collect()
}

fn exchanges(side: &Side) -> Vec<ExchangeType> {
    plain(side).iter().map(|message| message.header.exchange).collect()
}

fn says(message: &Message, kind: NotifyType) -> Option<&Notify> {
    message.payloads.iter().find_map(|payload| match payload {
        Payload::Notify(notify) if notify.kind == kind => Some(notify),
        _ => None,
    })
}

// RFC 5723 §4.3, §5: without credentials and without a key exchange, to the same identities and new keys.
#[test]
fn a_lost_ike_sa_is_resumed_by_its_ticket_alone() {
    let mut pair = with_ticket(700);
    let before = [A, B].map(|side| pair.sides[side].only());
    let keys = pair.sides[B].installed.values().next().unwrap().keys_in.clone();
    take_credentials(&mut pair);
    for round in 0..3 {
        lose(&mut pair);
        come_back(&mut pair, 10 + round);
        assert!(pair.sides[A].done(10 + round), "{:#?} {:#?}", lines(&pair.sides[A]), lines(&pair.sides[B]));
        pair.assert_same(1, 1);
        assert_eq!(resumed(&pair), [true, true]);
        assert_eq!(exchanges(&pair.sides[A]), [ExchangeType::IKE_SESSION_RESUME]);
        assert_eq!(exchanges(&pair.sides[B]), [ExchangeType::IKE_SESSION_RESUME]);
        for (side, before) in [A, B].into_iter().zip(&before) {
            let now = pair.sides[side].only();
            assert_eq!(now.peer, before.peer);
            assert_eq!(now.suite, before.suite);
            assert_ne!(now.initiator_spi, before.initiator_spi);
            assert!(pair.sides[side].logged("by ticket successful, originally with a pre-shared key"));
        }
        assert_ne!(pair.sides[B].installed.values().next().unwrap().keys_in, keys);
        // §4.3.4: the old one goes, and nobody is told.
        assert!(pair.sides[B].down(CloseReason::Replaced));
        assert!(!pair.sides[A].logged("received DELETE"));
        // A ticket for the next time, and the one before is used up.
        assert_eq!(pair.sides[B].engine.ctx.shared.tickets.lock().counts(), (1, 0));
    }
}

// RFC 5723 §4.3.2, §4.3.3: no SA, KE, CERT or CERTREQ; the request is as large as the ticket, and goes in one datagram.
#[test]
fn the_exchange_has_the_payloads_that_it_should_have() {
    let mut pair = with_ticket(701);
    lose(&mut pair);
    come_back(&mut pair, 2);
    let (request, answer) = (plain(&pair.sides[A]).remove(0), plain(&pair.sides[B]).remove(0));
    for message in [&request, &answer] {
        let odd = |payload: &Payload| !matches!(payload, Payload::Nonce(_) | Payload::Notify(_));
        assert!(!message.payloads.iter().any(odd), "{message:?}");
        assert!(says(message, NotifyType::NAT_DETECTION_SOURCE_IP).is_some());
        assert_eq!(message.header.message_id, 0);
    }
    let ticket = says(&request, NotifyType::TICKET_OPAQUE).unwrap();
    assert_eq!((ticket.protocol, ticket.spi.len()), (Protocol::NONE, 0));
    assert!(pair.sides[A].sent[0].bytes.len() < 576, "{}", pair.sides[A].sent[0].bytes.len());
    assert_eq!(request.header.responder_spi, 0);
    assert_ne!(answer.header.responder_spi, 0);
}

// RFC 5723 §4.3.2, §9.5: a gateway that restarted has another key: TICKET_NACK, and a full authentication at once.
#[test]
fn a_gateway_that_restarted_refuses_and_the_client_authenticates() {
    let mut pair = with_ticket(702);
    lose(&mut pair);
    let connections = vec![Arc::clone(&pair.sides[B].engine.ctx.connections[0])];
    let mut engine = Engine::new(EngineConfig::default(), Box::new(TestRng(703)), pair.now);
    engine.set_connections(connections);
    pair.sides[B].engine = engine;
    pair.sides[B].installed.clear();
    for side in &mut pair.sides {
        side.sent.clear();
    }
    pair.initiate(A, 2);
    pair.run(seconds(1));
    assert_from_start(&pair, 2, "restart");
    pair.assert_same(1, 1);
    assert!(says(&plain(&pair.sides[B])[0], NotifyType::TICKET_NACK).is_some());
    assert_eq!(plain(&pair.sides[B])[0].header.responder_spi, 0);
    // It has given another one.
    lose(&mut pair);
    come_back(&mut pair, 3);
    assert_eq!(resumed(&pair), [true, true]);
}

/// What B answers to A's request with this change, from elsewhere and with other SPIs.
fn answer_to(pair: &mut Pair, request: &[u8], spi: u64, change: impl FnOnce(&mut Message)) -> Option<Message> {
    let Ok(Incoming::Plain(mut message)) = wire::parse(request) else { panic!("a plain request") };
    message.header.initiator_spi = spi;
    change(&mut message);
    let path = Path {
        local: SocketAddr::new(address(B), 500),
        remote: SocketAddr::new("10.0.0.77".parse().unwrap(), 500),
        transport: Transport::Udp,
    };
    pair.sides[B].sent.clear();
    let now = pair.now;
    pair.sides[B].engine.handle_message(now, path, &wire::encode(&message));
    pair.drain(B);
    plain(&pair.sides[B]).pop()
}

fn set_ticket(message: &mut Message, change: impl FnOnce(&mut Vec<u8>)) {
    for payload in &mut message.payloads {
        if let Payload::Notify(notify) = payload
            && notify.kind == NotifyType::TICKET_OPAQUE
        {
            return change(&mut notify.data);
        }
    }
}

/// A request of A's with a good ticket, which B has not seen.
fn unseen_request(pair: &mut Pair) -> Vec<u8> {
    lose(pair);
    pair.cut = true;
    come_back(pair, 2);
    // Nobody has answered, so the ticket waits for the next attempt.
    let (now, id) = (pair.now, pair.sides[A].only().id);
    pair.sides[A].engine.terminate(now, Target::Ike(id), true, 99).unwrap();
    pair.drain(A);
    pair.cut = false;
    let request = pair.sides[A].sent.iter().find(|sent| sent.bytes[18] == 38).expect("IKE_SESSION_RESUME");
    request.bytes.clone()
}

// RFC 5723 §4.3.1, §9.2, §9.3: truncated, forged, oversized and foreign tickets cost nothing but an answer.
#[test]
fn bad_tickets_get_a_refusal_and_no_state() {
    let mut pair = with_ticket(704);
    let request = unseen_request(&mut pair);
    let before = pair.sides[B].engine.counts();
    let mut spi = 1000;
    let mut refused = |pair: &mut Pair, change: &dyn Fn(&mut Vec<u8>)| {
        spi += 1;
        let answer = answer_to(pair, &request, spi, |message| set_ticket(message, change)).expect("an answer");
        assert_eq!(answer.header.exchange, ExchangeType::IKE_SESSION_RESUME);
        assert!(says(&answer, NotifyType::TICKET_NACK).is_some(), "{answer:?}");
        assert_eq!(answer.header.responder_spi, 0);
    };
    refused(&mut pair, &Vec::clear);
    for at in [0, 1, 8, 9, 20, 21, 60, 100] {
        refused(&mut pair, &|ticket| ticket.truncate(at));
        refused(&mut pair, &|ticket| ticket[at] ^= 1);
    }
    refused(&mut pair, &|ticket| ticket.push(0));
    refused(&mut pair, &|ticket| ticket.resize(60_000, 0));
    assert_eq!(pair.sides[B].engine.counts(), before);
    assert_eq!(pair.sides[B].engine.ctx.shared.tickets.lock().counts(), (1, 0));
    // The good one is good yet.
    come_back(&mut pair, 3);
    assert_eq!(resumed(&pair), [true, true]);
}

// RFC 5723 §4.3.1, §9.1: who saw a ticket gets half-open IKE SAs out of it and no more, and does not use it up.
#[test]
fn a_stolen_ticket_is_of_no_use() {
    let mut pair = with_ticket(705);
    let request = unseen_request(&mut pair);
    let answer = answer_to(&mut pair, &request, 2000, |_| ()).expect("an answer");
    assert!(answer.header.responder_spi != 0 && says(&answer, NotifyType::TICKET_NACK).is_none());
    assert_eq!(pair.sides[B].engine.counts(), (2, 1));
    come_back(&mut pair, 3);
    assert!(pair.sides[A].done(3));
    assert_eq!(pair.sides[A].up().iter().filter(|sa| sa.resumed).count(), 1);
    // It is used up now, and another one is in its place.
    let answer = answer_to(&mut pair, &request, 2001, |_| ()).expect("an answer");
    assert!(says(&answer, NotifyType::TICKET_NACK).is_some());
    pair.run(seconds(40));
    pair.assert_same(1, 1);
}

// RFC 5723 §4.3.1: of two half-open IKE SAs with one ticket one comes up.
#[test]
fn two_cannot_use_one_ticket() {
    let mut pair = with_ticket(706);
    lose(&mut pair);
    let now = pair.now;
    let connection = Arc::clone(&pair.sides[A].engine.ctx.connections[0]);
    let held = pair.sides[A].engine.ctx.shared.tickets.lock().take(now, &connection, address(B), &id("a")).unwrap();
    let copy = |held: &HeldTicket| HeldTicket {
        ticket: held.ticket.clone(),
        d: held.d.duplicate(),
        grant: held.grant.clone(),
        ..*held
    };
    pair.sides[A].engine.ctx.shared.tickets.lock().hold(now, address(B), copy(&held));
    pair.delay = (Duration::ZERO, Duration::from_millis(10));
    pair.initiate(A, 2);
    pair.run(Duration::from_millis(21));
    // IKE_AUTH of the first is under way; the second begins, as a client that reuses a ticket would.
    pair.sides[A].engine.ctx.shared.tickets.lock().hold(now, address(B), held);
    let (want, local) = (Want { child: None, token: Some(3) }, address(A));
    let (id, sa) = resuming::begin(&mut pair.sides[A].engine.ctx, now, connection, want, local, address(B)).unwrap();
    assert!(matches!(sa, IkeSa::Resuming(_)));
    pair.sides[A].engine.insert(id, sa, None);
    pair.drain(A);
    pair.run(seconds(5));
    assert!(pair.sides[A].done(2) && pair.sides[A].done(3));
    assert_eq!(pair.sides[B].up().iter().filter(|sa| sa.resumed).count(), 1, "{:#?}", lines(&pair.sides[B]));
}

/// A, with another idea of what its ticket is for.
fn with_held(pair: &mut Pair, local_id: &str, change: Tamper) {
    let (now, connection) = (pair.now, Arc::clone(&pair.sides[A].engine.ctx.connections[0]));
    let mut held = pair.sides[A].engine.ctx.shared.tickets.lock().take(now, &connection, address(B), &id("a")).unwrap();
    let connection = Arc::new(Connection { local_id: Some(id(local_id)), ..resuming(A) });
    pair.sides[A].engine.set_connections(vec![Arc::clone(&connection)]);
    held.grant.connection = connection;
    change(&mut held);
    pair.sides[A].engine.ctx.shared.tickets.lock().hold(now, address(B), held);
}

type Tamper = fn(&mut HeldTicket);

fn peer_of(held: &HeldTicket) -> PeerIdentity {
    PeerIdentity::clone(&held.grant.peer)
}

// RFC 5723 §4.3.3: IDi and IDr are those of the ticket, and only who has its SK_d is heard at all.
#[test]
fn a_ticket_is_for_its_identities_and_its_keys_only() {
    let another_client: Tamper =
        |held| held.grant.peer = Arc::new(PeerIdentity { local_id: id("mallory"), ..peer_of(held) });
    let another_gateway: Tamper =
        |held| held.grant.peer = Arc::new(PeerIdentity { id: id("another"), ..peer_of(held) });
    let another_key: Tamper = |held| held.d = Secret::new(vec![0; 32]);
    for (seed, local_id, change, reason) in [
        (710, "mallory", another_client, "it says to be somebody else"),
        (711, "a", another_gateway, "it asks for another identity than its ticket has"),
        (712, "a", another_key, ""),
    ] {
        let mut pair = with_ticket(seed);
        lose(&mut pair);
        with_held(&mut pair, local_id, change);
        pair.sides[B].events.clear();
        pair.initiate(A, 2);
        pair.run(seconds(3));
        assert_eq!(pair.sides[A].sent.iter().filter(|sent| sent.bytes[18] == 38).count(), 1, "{seed}");
        assert!(pair.sides[B].logged(reason), "{seed}: {:#?}", lines(&pair.sides[B]));
        // Where nothing that it says can be opened it takes a while until it gives up; then it authenticates.
        pair.run(seconds(250));
        assert_eq!(pair.sides[A].done(2), local_id == "a", "{seed}: {:#?}", lines(&pair.sides[A]));
        assert!(!pair.sides[B].logged("by ticket"), "{seed}");
        assert!(pair.sides[B].up().iter().all(|sa| !sa.resumed), "{seed}");
    }
}

/// What has changed at B since the ticket was given.
type Change = fn(&mut Pair);

// RFC 5723 §4.3.2, §6.2: never weaker than a fresh IKE_AUTH. Where the fresh one succeeds, it is what follows.
#[test]
fn what_has_changed_since_asks_for_a_full_authentication() {
    fn set(pair: &mut Pair, change: impl FnOnce(&mut Connection)) {
        let mut connection = Connection::clone(&pair.sides[B].engine.ctx.connections[0]);
        change(&mut connection);
        pair.sides[B].engine.set_connections(vec![Arc::new(connection)]);
    }
    fn add(pair: &mut Pair, first: bool, other: Connection) {
        let mut connections = vec![Arc::clone(&pair.sides[B].engine.ctx.connections[0])];
        connections.insert(if first { 0 } else { 1 }, Arc::new(other));
        pair.sides[B].engine.set_connections(connections);
    }
    let changes: [(&str, Change, bool); 11] = [
        ("credentials", |pair| pair.sides[B].engine.forget_tickets(), true),
        (
            "settings of signatures",
            |pair| {
                let signatures = SignatureSettings { rsa_pss: true, ..SignatureSettings::default() };
                pair.sides[B].engine.set_config(EngineConfig { signatures, ..EngineConfig::default() });
            },
            true,
        ),
        ("not wanted any more", |pair| set(pair, |connection| connection.session_resumption = false), true),
        (
            "algorithms",
            |pair| {
                let stronger = parse_proposals("aes256gcm16-prfsha256-x25519", Protocol::IKE).unwrap();
                set(pair, |connection| connection.proposals.splice(..0, stronger).for_each(drop));
            },
            true,
        ),
        ("whom it admits", |pair| set(pair, |connection| connection.remote.remote_id = IdentityPattern::any()), true),
        ("the time since authentication", |pair| set(pair, |connection| connection.reauth_time = seconds(100)), true),
        (
            "another connection comes first",
            |pair| add(pair, true, Connection { name: "x".into(), ..resuming(B) }),
            true,
        ),
        ("one of the same is there", |pair| add(pair, false, Connection { name: "x".into(), ..resuming(B) }), true),
        ("a PPK is needed", |pair| set(pair, |connection| connection.ppk_required = true), false),
        ("the proof", |pair| set(pair, |connection| connection.remote.class = AuthClass::PublicKey), false),
        ("gone", |pair| pair.sides[B].engine.set_connections(Vec::new()), false),
    ];
    for (number, (why, change, admits)) in changes.into_iter().enumerate() {
        let mut pair = with_ticket(720 + number as u64);
        lose(&mut pair);
        change(&mut pair);
        come_back(&mut pair, 2);
        assert_eq!(exchanges(&pair.sides[A])[0], ExchangeType::IKE_SESSION_RESUME, "{why}");
        assert!(says(&plain(&pair.sides[B])[0], NotifyType::TICKET_NACK).is_some(), "{why}");
        if admits {
            assert_from_start(&pair, 2, why);
        } else {
            assert!(!pair.sides[A].done(2), "{why}");
            assert!(pair.sides[A].up().is_empty(), "{why}");
        }
    }
}

// The same between IKE_SESSION_RESUME and IKE_AUTH.
#[test]
fn what_changes_meanwhile_asks_for_a_full_authentication_too() {
    let changes: [Change; 3] = [
        |pair| pair.sides[B].engine.forget_tickets(),
        |pair| {
            let connection = Connection { session_resumption: false, ..resuming(B) };
            pair.sides[B].engine.set_connections(vec![Arc::new(connection)]);
        },
        |pair| {
            let other = Connection { name: "x".into(), ..resuming(B) };
            pair.sides[B].engine.set_connections(vec![Arc::new(other), Arc::new(resuming(B))]);
        },
    ];
    for (number, change) in changes.into_iter().enumerate() {
        let mut pair = with_ticket(740 + number as u64);
        lose(&mut pair);
        pair.delay = (Duration::ZERO, Duration::from_millis(10));
        pair.initiate(A, 2);
        pair.run(Duration::from_millis(15));
        assert_eq!(pair.sides[B].engine.counts(), (2, 1), "half-open");
        change(&mut pair);
        pair.run(seconds(3));
        assert_from_start(&pair, 2, &number.to_string());
        pair.assert_same(1, 1);
    }
}

// RFC 5723 §6.2, §9.8: deleted by either side, replaced by another one: its ticket goes with it.
#[test]
fn a_ticket_ends_with_a_deleted_ike_sa() {
    for (seed, by) in [(750, A), (751, B)] {
        for force in [false, true] {
            let mut pair = with_ticket(seed);
            let (now, id) = (pair.now, pair.sides[by].only().id);
            pair.sides[by].engine.terminate(now, Target::Ike(id), force, 5).unwrap();
            pair.drain(by);
            pair.run(seconds(3));
            for side in &pair.sides {
                assert_eq!(side.engine.ctx.shared.tickets.lock().counts(), (0, 0));
            }
            come_back(&mut pair, 2);
            assert_from_start(&pair, 2, "deleted");
            assert_eq!(exchanges(&pair.sides[A])[0], ExchangeType::IKE_SA_INIT);
        }
    }
}

// RFC 5723 §9.8: a client that kept the ticket of an IKE SA that was deleted.
#[test]
fn a_ticket_of_a_deleted_ike_sa_is_refused() {
    let mut pair = with_ticket(752);
    pair.cut = true;
    let (now, id) = (pair.now, pair.sides[B].only().id);
    pair.sides[B].engine.terminate(now, Target::Ike(id), true, 5).unwrap();
    pair.drain(B);
    lose(&mut pair);
    come_back(&mut pair, 2);
    assert_eq!(exchanges(&pair.sides[A])[0], ExchangeType::IKE_SESSION_RESUME);
    assert_from_start(&pair, 2, "deleted");
    pair.assert_same(1, 1);
}

// RFC 5723 §4.1, §6.2: rekeyed by either side, the IKE SA has another ticket, and that of before is refused.
#[test]
fn a_rekeyed_ike_sa_gets_another_ticket() {
    for (seed, by) in [(753, A), (754, B)] {
        let mut pair = with_ticket(seed);
        let request = {
            let mut other = with_ticket(seed);
            unseen_request(&mut other)
        };
        let (now, id) = (pair.now, pair.sides[by].only().id);
        pair.sides[by].engine.rekey(now, Target::Ike(id), 7).unwrap();
        pair.drain(by);
        pair.run(seconds(9));
        assert_eq!(pair.sides[B].engine.ctx.shared.tickets.lock().counts(), (1, 0), "{by}");
        // The runs are the same up to there, keys and all: it is a ticket that B gave, and has withdrawn.
        let answer = answer_to(&mut pair, &request, 2000, |_| ()).expect("an answer");
        assert!(says(&answer, NotifyType::TICKET_NACK).is_some(), "{by}");
        assert!(pair.sides[B].logged("the ticket was used or withdrawn"), "{by}: {:#?}", lines(&pair.sides[B]));
        take_credentials(&mut pair);
        lose(&mut pair);
        come_back(&mut pair, 2);
        assert_eq!(resumed(&pair), [true, true], "{by}");
        pair.assert_same(1, 1);
    }
}

// RFC 4478, RFC 5723 §5, §6.2: a ticket makes no proof younger.
#[test]
fn reauthentication_is_due_when_it_was() {
    let of = |side| Connection { reauth_time: seconds(1000), over_time: seconds(100), ..resuming(side) };
    let mut pair = with_ticket_of(Pair::with(755, EngineConfig::default(), of(A), of(B)));
    for round in 0..3 {
        lose(&mut pair);
        come_back(&mut pair, 10 + round);
        assert_eq!(resumed(&pair), [true, true]);
        let due = |pair: &Pair, side: usize| {
            let now = pair.now;
            pair.sides[side].engine.ike_sas(now)[0].reauth_in.unwrap().as_secs()
        };
        let most = 1000 - 252 * (round + 1);
        assert!(due(&pair, A) <= most && due(&pair, B) <= most, "{} {}", due(&pair, A), due(&pair, B));
    }
    // The next one is from the start: the ticket is over when the proof is.
    pair.cut = true;
    pair.run(seconds(245));
    pair.cut = false;
    come_back(&mut pair, 20);
    assert_from_start(&pair, 20, "too old");
    assert_eq!(exchanges(&pair.sides[A])[0], ExchangeType::IKE_SA_INIT);
}

// RFC 5723 §6.2: reauthentication is a full one, whatever tickets there are.
#[test]
fn reauthentication_uses_no_ticket() {
    for (seed, make_before_break) in [(756, false), (757, true)] {
        let config = EngineConfig { make_before_break, ..EngineConfig::default() };
        let mut pair = with_ticket_of(Pair::with(seed, config, resuming(A), resuming(B)));
        let (now, id) = (pair.now, pair.sides[A].only().id);
        pair.sides[A].engine.reauthenticate(now, id, 5).unwrap();
        pair.drain(A);
        pair.run(seconds(9));
        pair.assert_same(1, 1);
        assert_eq!(resumed(&pair), [false, false]);
    }
}

// RFC 5056 §2.1: without a key exchange of its own a resumed IKE SA has nothing to bind to, nor have its successors; the
// next authentication makes something, which is not that of before.
#[test]
fn a_resumed_ike_sa_has_no_channel_binding() {
    let mut pair = with_ticket(860);
    lose(&mut pair);
    come_back(&mut pair, 2);
    assert_eq!(resumed(&pair), [true, true]);
    let (now, id) = (pair.now, pair.sides[A].only().id);
    pair.sides[A].engine.rekey(now, Target::Ike(id), 3).unwrap();
    pair.drain(A);
    pair.run(seconds(9));
    let (now, child) = (pair.now, pair.sides[A].only().children[0].id);
    pair.sides[A].engine.rekey(now, Target::Child(child), 4).unwrap();
    pair.drain(A);
    pair.run(seconds(9));
    let (now, id) = (pair.now, pair.sides[A].only().id);
    pair.sides[A].engine.reauthenticate(now, id, 5).unwrap();
    pair.drain(A);
    pair.run(seconds(9));
    pair.assert_same(1, 1);
    assert_eq!(resumed(&pair), [false, false]);
    let [first, none, still_none, last] = pair.sides[A].bindings[..] else {
        panic!("{:?}", pair.sides[A].bindings);
    };
    assert_eq!([none, still_none], [None, None]);
    assert!(first.is_some() && last.is_some() && first != last);
    assert_eq!(pair.sides[B].bindings, pair.sides[A].bindings);
}

// RFC 5723 §4.3.2: whoever says no, the client authenticates; who cannot see the request cannot say it.
#[test]
fn a_forged_refusal_costs_a_full_authentication_at_most() {
    for (seed, good) in [(758, true), (759, false)] {
        let mut pair = with_ticket(seed);
        lose(&mut pair);
        pair.delay = (Duration::ZERO, Duration::from_millis(50));
        pair.initiate(A, 2);
        let request = pair.sides[A].sent.last().unwrap().clone();
        let Ok(Incoming::Plain(message)) = wire::parse(&request.bytes) else { panic!("plain") };
        let spi = message.header.initiator_spi;
        let header = Header { response: true, from_initiator: false, ..message.header };
        let header = Header { initiator_spi: if good { spi } else { spi ^ 1 }, ..header };
        let nack = crate::sa::fault::notify(NotifyType::TICKET_NACK, Vec::new());
        let bytes = wire::encode(&Message { header, payloads: vec![nack] });
        let now = pair.now;
        pair.sides[A].engine.handle_message(now, request.path, &bytes);
        // From another address it is nobody's.
        let elsewhere = Path { remote: "10.0.0.9:500".parse().unwrap(), ..request.path };
        pair.sides[A].engine.handle_message(now, elsewhere, &bytes);
        pair.drain(A);
        pair.run(seconds(40));
        assert!(pair.sides[A].done(2));
        assert_eq!(pair.sides[A].only().resumed, !good);
        pair.assert_same(1, 1);
    }
}

// RFC 5723 §4.3.1: silence leads to IKE_SA_INIT soon, and the ticket was not used.
#[test]
fn silence_leads_to_a_full_authentication() {
    let mut pair = with_ticket(760);
    lose(&mut pair);
    // As from a gateway that does not know the exchange.
    pair.cut = true;
    pair.initiate(A, 2);
    pair.run(seconds(7));
    pair.cut = false;
    assert!(exchanges(&pair.sides[A]).ends_with(&[ExchangeType::IKE_SA_INIT]));
    pair.run(seconds(10));
    assert_from_start(&pair, 2, "silence");
    pair.assert_same(1, 1);
    // The IKE SA that is up has its own, and the other one is gone.
    assert_eq!(pair.sides[A].engine.ctx.shared.tickets.lock().counts(), (0, 0));
    assert_eq!(pair.sides[B].engine.ctx.shared.tickets.lock().counts(), (1, 0));
}

#[test]
fn a_ticket_that_nobody_answered_to_is_used_with_the_next_attempt() {
    let mut pair = with_ticket(761);
    lose(&mut pair);
    pair.cut = true;
    come_back(&mut pair, 2);
    pair.run(seconds(400));
    pair.cut = false;
    assert!(pair.sides[A].failed(2).is_some());
    take_credentials(&mut pair);
    come_back(&mut pair, 3);
    assert_eq!(resumed(&pair), [true, true]);
    pair.assert_same(1, 1);
}

// With `keyingtries` each sequence begins with the ticket.
#[test]
fn each_sequence_of_tries_begins_with_the_ticket() {
    let a = Connection { keyingtries: 0, ..resuming(A) };
    let mut pair = with_ticket_of(Pair::with(762, EngineConfig::default(), a, resuming(B)));
    lose(&mut pair);
    pair.cut = true;
    pair.initiate(A, 2);
    // 5.6 s with the ticket, 165 s without.
    pair.run(seconds(170));
    take_credentials(&mut pair);
    pair.cut = false;
    pair.run(seconds(10));
    assert!(pair.sides[A].done(2), "{:#?}", lines(&pair.sides[A]));
    assert_eq!(resumed(&pair), [true, true]);
    pair.assert_same(1, 1);
}

// RFC 5723 §4.3.2, RFC 8019 §4.5: cookies, and no puzzles, for who presents a ticket.
#[test]
fn under_load_a_cookie_is_demanded() {
    for (seed, puzzles) in [(763, 0), (764, 1)] {
        let mut pair = with_ticket(seed);
        lose(&mut pair);
        // Somebody else's half-open IKE SA.
        let request = {
            let mut other = Pair::new(seed);
            other.initiate(A, 1);
            other.sides[A].sent[0].bytes.clone()
        };
        let now = pair.now;
        let path = Path {
            local: SocketAddr::new(address(B), 500),
            remote: "10.0.0.7:500".parse().unwrap(),
            transport: Transport::Udp,
        };
        pair.sides[B].engine.handle_message(now, path, &request);
        pair.drain(B);
        let puzzles = PuzzlePolicy { threshold: puzzles, ..PuzzlePolicy::default() };
        pair.sides[B].engine.set_config(EngineConfig { cookie_threshold: 0, puzzles, ..EngineConfig::default() });
        take_credentials(&mut pair);
        pair.initiate(A, 2);
        pair.run(seconds(3));
        assert!(pair.sides[A].done(2), "{:#?} {:#?}", lines(&pair.sides[A]), lines(&pair.sides[B]));
        let answers = plain(&pair.sides[B]);
        let answer = answers.iter().find(|answer| answer.header.exchange == ExchangeType::IKE_SESSION_RESUME).unwrap();
        assert!(says(answer, NotifyType::COOKIE).is_some() && says(answer, NotifyType::PUZZLE).is_none());
        let again = &plain(&pair.sides[A])[1];
        assert!(matches!(&again.payloads[0], Payload::Notify(notify) if notify.kind == NotifyType::COOKIE));
    }
}

type Mangle = fn(&mut Message);

// RFC 5723 §4.3.2: the rest is as in IKE_SA_INIT.
#[test]
fn malformed_requests_make_no_state() {
    let mut pair = with_ticket(765);
    let request = unseen_request(&mut pair);
    let before = pair.snapshot(B);
    let silent: [Mangle; 5] = [
        |message| message.header.message_id = 1,
        |message| message.header.responder_spi = 5,
        |message| message.header.initiator_spi = 0,
        |message| message.header.response = true,
        |message| message.header.from_initiator = false,
    ];
    for (number, change) in silent.into_iter().enumerate() {
        assert!(answer_to(&mut pair, &request, 3000 + number as u64, change).is_none(), "{number}");
    }
    let refused: [(Mangle, NotifyType); 4] = [
        (
            |message| message.payloads.retain(|payload| !matches!(payload, Payload::Nonce(_))),
            NotifyType::INVALID_SYNTAX,
        ),
        (|message| message.payloads.truncate(1), NotifyType::INVALID_SYNTAX),
        (|message| message.payloads.push(Payload::Nonce(vec![1; 32])), NotifyType::INVALID_SYNTAX),
        (
            |message| message.payloads.push(Payload::Unknown { kind: 200, critical: true, data: Vec::new() }),
            NotifyType::UNSUPPORTED_CRITICAL_PAYLOAD,
        ),
    ];
    for (number, (change, kind)) in refused.into_iter().enumerate() {
        let answer = answer_to(&mut pair, &request, 4000 + number as u64, change).expect("an answer");
        assert!(says(&answer, kind).is_some(), "{number}: {answer:?}");
    }
    assert_eq!(pair.snapshot(B), before);
}

// RFC 7296 §1.2, RFC 5723 §4.3.3: until IKE_AUTH nothing else is heard, and it proves by the ticket or not at all.
#[test]
fn a_half_open_resumption_hears_its_proof_only() {
    for (seed, kind) in [(766, 0), (767, 1), (768, 2), (769, 3)] {
        let mut pair = with_ticket(seed);
        lose(&mut pair);
        pair.delay = (Duration::ZERO, Duration::from_millis(10));
        pair.initiate(A, 2);
        pair.run(Duration::from_millis(15));
        let now = pair.now;
        let slot = pair.sides[B].engine.sas.values().find(|slot| matches!(slot.sa, IkeSa::ResponderAuth(_))).unwrap();
        let channel: &Channel = slot.sa.channel().unwrap();
        let ids = [Payload::IdInitiator(crate::sa::auth::identification(&id("a")))];
        let with = |more: Vec<Payload>| [ids.to_vec(), more].concat();
        let auth = |method: u8, data: Vec<u8>| Payload::Auth { method, data };
        let psk = {
            let mac = crate::crypto::prf(channel.suite.prf, b"correct horse", &[b"Key Pad for IKEv2"]).unwrap();
            auth(2, mac.expose().to_vec())
        };
        let (exchange, payloads) = match kind {
            0 => (ExchangeType::INFORMATIONAL, vec![Payload::Delete { protocol: Protocol::IKE, spis: Vec::new() }]),
            1 => (ExchangeType::IKE_AUTH, with(vec![psk])),
            2 => (ExchangeType::IKE_AUTH, with(vec![auth(2, Vec::new())])),
            _ => (ExchangeType::IKE_AUTH, ids.to_vec()),
        };
        let bytes = channel.forge(exchange, false, 0, &payloads, None, &mut TestRng(1));
        let path = pair.sides[B].sent.last().unwrap().path;
        pair.sides[B].events.clear();
        for datagram in bytes {
            pair.sides[B].engine.handle_message(now, path, &datagram);
        }
        pair.drain(B);
        assert!(!pair.sides[B].logged("by ticket"), "{kind}");
        assert_eq!(pair.sides[B].logged("authentication of the peer failed"), kind > 0, "{kind}");
        // Nobody has used the ticket up.
        assert_eq!(pair.sides[B].engine.ctx.shared.tickets.lock().counts(), (1, 0), "{kind}");
    }
}

// RFC 5723 §5, note 5: the address of before, also while the old IKE SA has it.
#[test]
fn the_virtual_address_is_the_one_of_before() {
    let a = Connection { session_resumption: true, dpd_delay: seconds(10), ..client(&["0.0.0.0"]) };
    let b = Connection { session_resumption: true, ..gateway(&["four"]) };
    let mut pair = Pair::with(770, EngineConfig::default(), a, b);
    pair.sides[B].engine.load_pool(pool("four", "10.3.0.1", "10.3.0.3", Vec::new())).unwrap();
    let mut pair = with_ticket_of(pair);
    let before = vips(&pair, A);
    assert_eq!(before.0.len(), 1);
    for round in 0..3 {
        lose(&mut pair);
        come_back(&mut pair, 10 + round);
        assert_eq!((resumed(&pair), vips(&pair, A)), ([true, true], before.clone()));
        pair.assert_same(1, 1);
    }
}

// `unique`: the ticket's own IKE SA is none that is in the way; others are what they are for IKE_AUTH.
#[test]
fn uniqueness_holds_for_those_that_come_back() {
    for (seed, unique) in [(771, Unique::Keep), (772, Unique::Replace), (773, Unique::Never), (774, Unique::No)] {
        let of = |side| Connection { unique, ..resuming(side) };
        let mut pair = with_ticket_of(Pair::with(seed, EngineConfig::default(), of(A), of(B)));
        take_credentials(&mut pair);
        lose(&mut pair);
        come_back(&mut pair, 2);
        assert_eq!(resumed(&pair), [true, true], "{unique:?}");
        pair.assert_same(1, 1);
    }
}

// RFC 9329 §7.3: over a stream as well, where the connection says so.
#[test]
fn over_tcp() {
    let of = |side| Connection { tcp: TcpPolicy::Yes, ..resuming(side) };
    let mut pair = with_ticket_of(Pair::with(775, EngineConfig::default(), of(A), of(B)));
    take_credentials(&mut pair);
    pair.tcp_blocked = true;
    pair.break_streams();
    lose(&mut pair);
    pair.tcp_blocked = false;
    come_back(&mut pair, 2);
    assert_eq!(resumed(&pair), [true, true]);
    assert!(matches!(pair.sides[A].only().path.transport, Transport::Stream(_)));
    pair.assert_same(1, 1);
}

/// With a ticket, after the loss of the IKE SA, where the transport is ours to choose.
fn falling_back(seed: u64) -> Pair {
    let tcp_delay = Duration::from_millis(1500);
    let of = |side| Connection { tcp: TcpPolicy::Fallback, tcp_delay, ..resuming(side) };
    let mut pair = with_ticket_of(Pair::with(seed, EngineConfig::default(), of(A), of(B)));
    lose(&mut pair);
    pair.sides[A].sent.clear();
    pair
}

/// What A has sent over UDP and over streams.
fn transports(pair: &Pair) -> (usize, usize) {
    let streams = pair.sides[A].sent.iter().filter(|sent| matches!(sent.path.transport, Transport::Stream(_))).count();
    (pair.sides[A].sent.len() - streams, streams)
}

// RFC 9329 §5.1, §7.3: UDP that stays silent leads to TCP, with the same ticket but another SPI and nonce.
#[test]
fn a_ticket_falls_back_to_tcp() {
    let mut pair = falling_back(790);
    take_credentials(&mut pair);
    pair.udp_blocked = true;
    come_back(&mut pair, 2);
    assert_eq!(resumed(&pair), [true, true], "{:#?}", lines(&pair.sides[A]));
    assert!(matches!(pair.sides[A].only().path.transport, Transport::Stream(_)));
    let requests = plain(&pair.sides[A]);
    assert!(requests.iter().all(|request| request.header.exchange == ExchangeType::IKE_SESSION_RESUME));
    let [first, repeated, over_tcp] = &requests[..] else { panic!("{requests:#?}") };
    assert_eq!(first, repeated);
    assert_ne!(first.header.initiator_spi, over_tcp.header.initiator_spi);
    assert_ne!(first.payloads[0], over_tcp.payloads[0], "the nonce");
    assert_eq!(says(first, NotifyType::TICKET_OPAQUE), says(over_tcp, NotifyType::TICKET_OPAQUE));
    pair.assert_same(1, 1);
    // That is remembered: the next one begins with TCP.
    pair.tcp_blocked = true;
    pair.break_streams();
    lose(&mut pair);
    pair.tcp_blocked = false;
    pair.sides[A].sent.clear();
    come_back(&mut pair, 3);
    assert_eq!((resumed(&pair), transports(&pair).0), ([true, true], 0));
    pair.assert_same(1, 1);
}

// An ICMP error hastens that.
#[test]
fn an_unreachable_port_hastens_a_tickets_fallback() {
    let mut pair = falling_back(791);
    pair.udp_blocked = true;
    pair.initiate(A, 2);
    let now = pair.now;
    pair.sides[A].engine.handle_unreachable(now, "10.0.0.9:500".parse().unwrap());
    assert!(pair.sides[A].streams.is_empty());
    pair.sides[A].engine.handle_unreachable(now, "10.0.0.2:500".parse().unwrap());
    pair.drain(A);
    pair.run(seconds(1));
    assert!(pair.sides[A].done(2));
    assert_eq!(resumed(&pair), [true, true]);
}

// A port that is closed is no end: UDP gets its time, and then an authentication from the start.
#[test]
fn a_ticket_survives_a_closed_port() {
    let mut pair = falling_back(792);
    (pair.udp_blocked, pair.tcp_blocked) = (true, true);
    pair.initiate(A, 2);
    pair.run(seconds(3));
    pair.udp_blocked = false;
    pair.run(seconds(10));
    assert!(pair.sides[A].done(2), "{:#?}", lines(&pair.sides[A]));
    assert_eq!(resumed(&pair), [true, true]);
    assert_eq!(pair.sides[A].only().path.transport, Transport::Udp);
    pair.assert_same(1, 1);
    let mut pair = falling_back(793);
    (pair.udp_blocked, pair.tcp_blocked) = (true, true);
    pair.initiate(A, 2);
    pair.run(seconds(400));
    assert!(pair.sides[A].failed(2).is_some());
    (pair.udp_blocked, pair.tcp_blocked) = (false, false);
    // Nobody has answered, so the ticket is good yet; and nothing else is left.
    assert_eq!(pair.sides[A].engine.ctx.shared.tickets.lock().counts(), (0, 1));
    assert!(pair.sides[A].engine.ctx.own_spis() == 0 && pair.sides[A].engine.ctx.shared.streams.is_empty());
    come_back(&mut pair, 3);
    assert_eq!(resumed(&pair), [true, true]);
}

// A refusal over a stream: IKE_SA_INIT goes over a stream too, where UDP was silent.
#[test]
fn a_refusal_over_tcp_leads_to_ike_sa_init_over_tcp() {
    let mut pair = falling_back(794);
    pair.sides[B].engine.forget_tickets();
    pair.udp_blocked = true;
    come_back(&mut pair, 2);
    assert_from_start(&pair, 2, "the peer does not take the ticket");
    assert!(matches!(pair.sides[A].only().path.transport, Transport::Stream(_)));
    let over_udp = transports(&pair).0;
    assert_eq!(over_udp, 2, "IKE_SESSION_RESUME, twice");
    pair.assert_same(1, 1);
}

// A stream that breaks in the middle of it, at any moment.
#[test]
fn a_stream_that_breaks_costs_the_ticket_at_most() {
    for seed in 0..30 {
        let of = |side| Connection { tcp: TcpPolicy::Yes, keyingtries: 3, ..resuming(side) };
        let mut pair = with_ticket_of(Pair::with(2000 + seed, EngineConfig::default(), of(A), of(B)));
        pair.tcp_blocked = true;
        pair.break_streams();
        lose(&mut pair);
        pair.tcp_blocked = false;
        pair.initiate(A, 2);
        let wait = pair.rng.below(100);
        pair.run(Duration::from_millis(wait));
        pair.break_streams();
        pair.run(seconds(60));
        assert!(pair.sides[A].done(2), "seed {seed}: {:#?}", lines(&pair.sides[A]));
        pair.run(seconds(400));
        pair.assert_same(1, 1);
    }
}

// RFC 5723 §4.3.2: from any address, with the NAT that is there now.
#[test]
fn behind_a_nat_that_was_not_there() {
    let mut pair = with_ticket(776);
    take_credentials(&mut pair);
    lose(&mut pair);
    pair.nat = Some(("192.0.2.1".parse().unwrap(), 10_000));
    come_back(&mut pair, 2);
    assert_eq!(resumed(&pair), [true, true]);
    assert!(pair.sides[A].only().nat_local && pair.sides[B].only().nat_remote);
    assert_eq!(pair.sides[A].only().path.transport, Transport::UdpEncap);
    pair.assert_same(1, 1);
}

// Without MOBIKE a client that has moved comes back with its ticket.
#[test]
fn a_client_that_moved_resumes() {
    let mut pair = with_ticket(777);
    pair.roam(A);
    pair.roam(B);
    take_credentials(&mut pair);
    pair.gone = vec![address(A)];
    pair.more[A] = vec!["10.0.1.1".parse().unwrap()];
    pair.roam(A);
    pair.run(seconds(5));
    assert!(pair.sides[A].logged("reestablishing IKE_SA due to address change"));
    assert_eq!(resumed(&pair), [true, true]);
    pair.assert_same(1, 1);
}

// RFC 8784 §3: the PPK is in SK_d already, and goes into nothing a second time.
#[test]
fn with_a_ppk() {
    let ppk_id = || Some(IdentityPattern::exact(id("ppk")));
    let of = |side| Connection { ppk_id: ppk_id(), ppk_required: true, ..resuming(side) };
    let mut pair = Pair::with(778, EngineConfig::default(), of(A), of(B));
    let mut credentials = Credentials::new();
    credentials.add_ppk(None, Vec::new(), Secret::new(b"post quantum".to_vec())).unwrap();
    for side in [A, B] {
        pair.sides[side].engine.set_ppks(credentials.ppks());
    }
    let mut pair = with_ticket_of(pair);
    take_credentials(&mut pair);
    lose(&mut pair);
    come_back(&mut pair, 2);
    assert_eq!(resumed(&pair), [true, true]);
    pair.assert_same(1, 1);
    assert!(says(&plain(&pair.sides[A])[0], NotifyType::USE_PPK).is_none());
}

// RFC 5723 §4.1: in INFORMATIONAL at any time, by the client only; who does not give tickets says so.
#[test]
fn tickets_are_given_to_clients_on_request() {
    let request = [crate::sa::tickets::request()];
    let mut pair = with_ticket(779);
    let answer = ask(&mut pair, ExchangeType::INFORMATIONAL, &request);
    let ticket = answer.notify(NotifyType::TICKET_LT_OPAQUE).expect("a ticket");
    assert_eq!((ticket.protocol, ticket.spi.len()), (Protocol::NONE, 0));
    assert_eq!(pair.sides[B].engine.ctx.shared.tickets.lock().counts(), (1, 0), "in place of the one before");
    let mut pair = Pair::with(784, EngineConfig::default(), resuming(A), resuming(B));
    pair.initiate(B, 1);
    pair.run(seconds(3));
    let answer = ask(&mut pair, ExchangeType::INFORMATIONAL, &request);
    assert!(answer.has(NotifyType::TICKET_NACK), "A is the gateway");
    let b = Connection { session_resumption: false, ..resuming(B) };
    let mut pair = established(Pair::with(780, EngineConfig::default(), resuming(A), b));
    assert!(pair.sides[A].logged("the peer gives no ticket"));
    let answer = ask(&mut pair, ExchangeType::INFORMATIONAL, &request);
    assert!(answer.has(NotifyType::TICKET_NACK));
    assert_eq!(pair.sides[B].engine.ctx.shared.tickets.lock().counts(), (0, 0));
}

// RFC 5723 §4.1: with a rekey of the IKE SA the client has to ask again, under the successor.
#[test]
fn a_request_with_a_rekey_is_put_off() {
    for (seed, gives) in [(785, true), (786, false)] {
        let b = Connection { session_resumption: gives, ..resuming(B) };
        let mut pair = established(Pair::with(seed, EngineConfig::default(), resuming(A), b));
        let proposals = parse_proposals("aes128gcm16-prfsha256-x25519", Protocol::IKE).unwrap();
        let mut public = vec![0; 32];
        public[0] = 9;
        let payloads = [
            Payload::Sa(crate::sa::init::numbered(&proposals, &[5; 8])),
            Payload::Nonce(vec![6; 32]),
            Payload::Ke { group: Ke::X25519, data: public },
            crate::sa::tickets::request(),
        ];
        let answer = ask(&mut pair, ExchangeType::CREATE_CHILD_SA, &payloads);
        assert!(answer.sa.is_some() && answer.ke.is_some());
        assert_eq!(answer.has(NotifyType::TICKET_ACK), gives);
        assert_eq!(answer.has(NotifyType::TICKET_NACK), !gives);
        assert!(!answer.has(NotifyType::TICKET_LT_OPAQUE));
    }
}

// RFC 5723 §5, note 3; RFC 4945 §3.1.1.
#[test]
fn an_address_as_identity_is_checked_again() {
    let ours = crate::sa::address_identity(address(A));
    let a = Connection { local_id: Some(ours.clone()), ..resuming(A) };
    let mut b = resuming(B);
    b.remote.remote_id = IdentityPattern::exact(ours);
    let config = EngineConfig {
        check_address_identities: crate::config::CheckAddressIdentities::Always,
        ..EngineConfig::default()
    };
    let mut pair = with_ticket_of(Pair::with(787, config, a, b));
    lose(&mut pair);
    pair.nat = Some(("192.0.2.1".parse().unwrap(), 10_000));
    come_back(&mut pair, 2);
    assert!(pair.sides[B].logged("its identity is not where its messages come from"), "{:#?}", lines(&pair.sides[B]));
    assert!(!pair.sides[A].done(2) && pair.sides[A].engine.sas.is_empty());
    // From where it was it is good yet.
    pair.nat = None;
    assert_eq!(pair.sides[B].engine.ctx.shared.tickets.lock().counts(), (1, 0));
}

// RFC 5723 §6.2: what was proved with credentials of before gives no ticket afterwards.
#[test]
fn no_ticket_for_a_proof_of_before() {
    let mut pair = with_ticket(781);
    pair.sides[B].engine.forget_tickets();
    let answer = ask(&mut pair, ExchangeType::INFORMATIONAL, &[crate::sa::tickets::request()]);
    assert!(answer.has(NotifyType::TICKET_NACK));
    // Also of one that was being checked meanwhile.
    let mut pair = Pair::with(782, EngineConfig::default(), resuming(A), resuming(B));
    pair.job_delay = seconds(2);
    pair.initiate(A, 1);
    while !pair.deliveries.values().any(|next| matches!(next, Delivery::Job { side: B, job: Job::Authenticate(_), .. }))
    {
        pair.run(Duration::from_millis(1));
    }
    pair.sides[B].engine.forget_tickets();
    pair.run(seconds(20));
    assert!(pair.sides[A].done(1));
    assert_eq!(pair.sides[B].engine.ctx.shared.tickets.lock().counts(), (0, 0));
}

// RFC 5723 §7.1: a gateway's ticket of no use is ignored; one that is put off is asked for again.
#[test]
fn odd_answers_to_a_request_for_a_ticket() {
    let mut pair = with_ticket(783);
    let now = pair.now;
    let id = pair.sides[A].only().id;
    let data = |octets: &[u8]| octets.to_vec();
    let long = [&[0, 0, 1, 0][..], &[7; 8193]].concat();
    for odd in [data(&[]), data(&[0, 0, 0]), data(&[0, 0, 1, 0]), data(&[0, 0, 0, 0, 1]), long] {
        let notify = crate::sa::fault::notify(NotifyType::TICKET_LT_OPAQUE, odd);
        let parts = crate::sa::parts::Parts::collect(vec![notify]).unwrap();
        pair.sides[A].engine.with_established(id, |sa, ctx| {
            sa.take_ticket(ctx, now, &parts);
            Ok(())
        });
    }
    // The one of before is still there, and good.
    lose(&mut pair);
    come_back(&mut pair, 2);
    assert_eq!(resumed(&pair), [true, true]);
    let id = pair.sides[A].only().id;
    let ack = crate::sa::fault::notify(NotifyType::TICKET_ACK, Vec::new());
    let parts = crate::sa::parts::Parts::collect(vec![ack]).unwrap();
    let now = pair.now;
    pair.sides[A].events.clear();
    pair.sides[A].engine.with_established(id, |sa, ctx| {
        sa.take_ticket(ctx, now, &parts);
        Ok(())
    });
    pair.drain(A);
    pair.run(seconds(11));
    assert!(pair.sides[A].logged("received a ticket"));
}

// RFC 7296 §2.1, §2.4: any loss, repetition and delay leads to one IKE SA on both sides, by the ticket or without.
#[test]
fn any_order_of_loss_and_delay_leads_back() {
    let mut by_ticket = 0;
    for seed in 0..60 {
        let mut pair = with_ticket(800 + seed);
        lose(&mut pair);
        pair.loss = 30;
        pair.duplication = 20;
        pair.delay.0 = Duration::from_millis(pair.rng.below(3000));
        pair.initiate(A, 2);
        pair.run(seconds(60));
        (pair.loss, pair.duplication, pair.delay.0) = (0, 0, Duration::from_millis(10));
        if !pair.sides[A].done(2) {
            // Given up, as it may be with that much loss; B forgets its half.
            pair.initiate(A, 3);
        }
        pair.run(seconds(400));
        let up = pair.sides[A].up();
        assert_eq!(up.len(), 1, "seed {seed}: {:#?}", lines(&pair.sides[A]));
        let spi = up[0].responder_spi;
        assert!(pair.sides[B].up().iter().any(|sa| sa.responder_spi == spi), "seed {seed}");
        by_ticket += usize::from(up[0].resumed);
    }
    assert!((20..60).contains(&by_ticket), "{by_ticket} of 60 by ticket");
}
