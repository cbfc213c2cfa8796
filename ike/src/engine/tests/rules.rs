//! Rules of RFC 7296 that no scenario of the other files would miss; each test names its section.

use super::refusals::ask;
use super::selectors::{answer_by, answer_instead, flow, initiate_for};
use super::*;
use crate::sa::channel::Received;
use crate::sa::fault::notify;
use crate::sa::init::numbered;
use crate::sa::parts::Parts;
use crate::wire::{Header, NotifyType, Payload, WireSelector};

fn selector(text: &str) -> Vec<WireSelector> {
    let ConfiguredSelector::Fixed(selector) = network(text) else { panic!("a network") };
    vec![WireSelector::Address(selector)]
}

/// A yes to this request with other selectors and nonce.
fn yes(request: &Parts, local: &str, remote: &str, nonce: usize) -> Vec<Payload> {
    let mut proposal = request.sa.as_ref().unwrap()[0].clone();
    let mut seen = Vec::new();
    proposal.transforms.retain(|transform| {
        let fresh = !seen.contains(&transform.kind);
        seen.push(transform.kind);
        fresh
    });
    proposal.spi = vec![9, 9, 9, 9];
    vec![
        Payload::Sa(vec![proposal]),
        Payload::Nonce(vec![5; nonce]),
        Payload::TsInitiator(selector(local)),
        Payload::TsResponder(selector(remote)),
    ]
}

fn rekey_child(pair: &mut Pair, token: u64) {
    let (now, child) = (pair.now, pair.sides[A].only().children[0].id);
    pair.sides[A].engine.rekey(now, Target::Child(child), token).unwrap();
    pair.drain(A);
}

/// What A has said in the message of this number, opened by B.
fn opened(pair: &mut Pair, from: usize, number: usize) -> Vec<Payload> {
    let bytes = pair.sides[from].sent[number].bytes.clone();
    let slot = pair.sides[1 - from].engine.sas.values_mut().next().unwrap();
    let IkeSa::Established(sa) = &mut slot.sa else { panic!("established") };
    let Ok(Incoming::Protected(protected)) = wire::parse(&bytes) else { panic!("a protected message") };
    if protected.header.response {
        let slot = pair.sides[from].engine.sas.values_mut().next().unwrap();
        let IkeSa::Established(sa) = &mut slot.sa else { panic!("established") };
        return sa.channel.open_own(&bytes);
    }
    sa.channel.open_apart(&bytes).unwrap().1
}

fn kinds(payloads: &[Payload]) -> Vec<&'static str> {
    let kind = |payload: &Payload| match payload {
        Payload::Sa(_) => Some("SA"),
        Payload::Ke { .. } => Some("KE"),
        Payload::Nonce(_) => Some("N"),
        Payload::IdInitiator(_) => Some("IDi"),
        Payload::IdResponder(_) => Some("IDr"),
        Payload::Auth { .. } => Some("AUTH"),
        Payload::Configuration(_) => Some("CP"),
        Payload::TsInitiator(_) => Some("TSi"),
        Payload::TsResponder(_) => Some("TSr"),
        Payload::Notify(notify) if notify.kind == NotifyType::REKEY_SA => Some("REKEY_SA"),
        _ => None,
    };
    payloads.iter().filter_map(kind).collect()
}

// §1.4.1: the answer to a Delete names nothing: our half goes, and nothing is left of it here.
#[test]
fn an_answer_without_delete_still_ends_the_child_sa() {
    let mut pair = up(740);
    pair.cut = true;
    pair.delete_child(A);
    answer_instead(&mut pair, &[]);
    assert!(pair.sides[A].only().children.is_empty() && pair.sides[A].installed.is_empty());
    assert!(pair.sides[A].engine.ctx.child_spis.is_empty() && pair.sides[A].done(3));
}

// §2.2: message IDs do not wrap: the IKE SA ends.
#[test]
fn an_ike_sa_ends_with_its_message_ids() {
    let mut pair = up(741);
    let slot = pair.sides[A].engine.sas.values_mut().next().unwrap();
    let IkeSa::Established(sa) = &mut slot.sa else { panic!("established") };
    let (_, expected) = sa.channel.message_ids();
    sa.channel.take_over(u32::MAX, expected);
    let sent = pair.sides[A].sent.len();
    rekey_child(&mut pair, 2);
    assert!(pair.sides[A].down(CloseReason::Expired));
    assert_eq!(pair.sides[A].sent.len(), sent);
    assert!(pair.sides[A].installed.is_empty() && pair.sides[A].engine.sas.is_empty());
}

// §2.4: what ICMP says costs a request now and then.
#[test]
fn icmp_errors_make_us_ask_at_a_limited_rate() {
    let mut pair = up(742);
    let before = pair.sides[A].sent.len();
    for _ in 0..600 {
        let (now, remote) = (pair.now, pair.sides[A].only().path.remote);
        pair.sides[A].engine.handle_unreachable(now, remote);
        pair.drain(A);
        pair.run(Duration::from_millis(100));
    }
    let asked = pair.sides[A].sent.len() - before;
    assert!((1..=12).contains(&asked), "{asked} requests in a minute");
    pair.assert_same(1, 1);
}

// §2.4: the waits between repetitions grow by a factor.
#[test]
fn the_waits_between_repetitions_grow_exponentially() {
    let mut pair = up(743);
    pair.cut = true;
    rekey_child(&mut pair, 2);
    let (mut times, mut sent) = (vec![pair.now], pair.sides[A].sent.len());
    for _ in 0..2000 {
        pair.run(Duration::from_millis(100));
        if pair.sides[A].sent.len() > sent {
            sent = pair.sides[A].sent.len();
            times.push(pair.now);
        }
    }
    let waits: Vec<f64> = times.windows(2).map(|two| (two[1] - two[0]).as_secs_f64()).collect();
    assert_eq!(waits.len(), 5);
    assert!((waits[0] - 4.0).abs() < 0.2);
    for two in waits.windows(2) {
        assert!((two[1] / two[0] - 1.8).abs() < 0.1, "{waits:?}");
    }
}

// §2.5, §2.19: payloads are sent in the order of the figures, CP before SA.
#[test]
fn payloads_are_sent_in_the_order_of_the_figures() {
    let mut a = connection(A);
    a.vips = vec!["0.0.0.0".parse().unwrap()];
    let mut b = connection(B);
    b.pools = vec!["pool".to_owned()];
    let mut pair = Pair::with(744, EngineConfig::default(), a, b);
    let (start, end) = ("10.3.0.1".parse().unwrap(), "10.3.0.9".parse().unwrap());
    let range = AddressRange { start, end };
    let pool = crate::pool::PoolConfig { name: "pool".to_owned(), base: start, range, attributes: Vec::new() };
    pair.sides[B].engine.load_pool(pool).unwrap();
    pair.initiate(A, 1);
    pair.run(seconds(3));
    assert_eq!(kinds(&init::payloads(&pair.sides[A].sent[0].bytes)), ["SA", "KE", "N"]);
    assert_eq!(kinds(&init::payloads(&pair.sides[B].sent[0].bytes)), ["SA", "KE", "N"]);
    assert_eq!(kinds(&opened(&mut pair, A, 1)), ["IDi", "IDr", "AUTH", "CP", "SA", "TSi", "TSr"]);
    let answer = kinds(&opened(&mut pair, B, 1));
    assert_eq!(answer[..4], ["IDr", "AUTH", "CP", "SA"], "{answer:?}");
    let from = pair.sides[A].sent.len();
    let (now, ike) = (pair.now, pair.sides[A].only().id);
    let children = pair.sides[A].only().children;
    let child = children.first().expect("a Child SA").id;
    pair.sides[A].engine.rekey(now, Target::Child(child), 2).unwrap();
    pair.drain(A);
    assert_eq!(kinds(&opened(&mut pair, A, from)), ["REKEY_SA", "SA", "N", "TSi", "TSr"]);
    pair.run(seconds(10));
    let (now, from) = (pair.now, pair.sides[A].sent.len());
    pair.sides[A].engine.rekey(now, Target::Ike(ike), 3).unwrap();
    pair.drain(A);
    assert_eq!(kinds(&opened(&mut pair, A, from)), ["SA", "N", "KE"]);
}

// §2.6, §3.1 and RFC 4303 §2.1: no SPI is one that means something else, whatever the source of randomness says.
#[test]
fn no_spi_is_reserved_for_other_uses() {
    struct Counting(u8);
    impl Rng for Counting {
        fn fill(&mut self, buffer: &mut [u8]) {
            buffer.fill(0);
            *buffer.last_mut().unwrap() = self.0;
            if buffer.len() == 4 {
                buffer[2] = self.0 / 100;
            }
            self.0 = self.0.saturating_add(1);
        }
    }
    let mut engine = Engine::new(EngineConfig::default(), Box::new(TestRng(1)), Instant::now());
    engine.ctx.rng = Box::new(Counting(0));
    assert_eq!(engine.ctx.reserve_ike_spi(IkeSaId(1)), 1);
    engine.ctx.rng = Box::new(Counting(0));
    assert_eq!(engine.ctx.reserve_ike_spi(IkeSaId(1)), 2, "that one is taken");
    engine.ctx.rng = Box::new(Counting(0));
    assert!(engine.ctx.reserve_child_spi(IkeSaId(1)) > 255);
}

// §2.6: a cookie has 1 to 64 octets.
#[test]
fn a_cookie_of_another_length_is_none() {
    for (length, good) in [(0, false), (1, true), (64, true), (65, false)] {
        let mut pair = Pair::new(745);
        pair.cut = true;
        pair.initiate(A, 1);
        let request = pair.sides[A].sent[0].clone();
        let header = Header { from_initiator: false, response: true, ..init::header(&request.bytes) };
        let payloads = vec![notify(NotifyType::COOKIE, vec![7; length])];
        let path = Path { local: request.path.local, ..request.path };
        let now = pair.now;
        pair.sides[A].engine.handle_message(now, path, &wire::encode(&Message { header, payloads }));
        pair.drain(A);
        assert_eq!(pair.sides[A].sent.len(), if good { 2 } else { 1 }, "{length}");
    }
}

// §2.6.1: a cookie is good for the request with another group too: three requests, not four.
#[test]
fn a_cookie_and_another_group_take_three_requests() {
    let config = EngineConfig { cookie_threshold: 0, ..EngineConfig::default() };
    let mut a = connection(A);
    a.proposals = parse_proposals("aes128gcm16-prfsha256-ecp256-x25519", Protocol::IKE).unwrap();
    let pair = established(Pair::with(746, config, a, connection(B)));
    let asked =
        pair.sides[A].sent.iter().filter(|sent| init::header(&sent.bytes).exchange == ExchangeType::IKE_SA_INIT);
    assert_eq!(asked.count(), 3);
}

// §2.8: nothing is asked on a rekeyed IKE SA after its Delete.
#[test]
fn a_delete_is_the_last_request_on_a_rekeyed_ike_sa() {
    for seed in 0..20 {
        let mut pair = up(seed);
        pair.loss = seed;
        let (now, old) = (pair.now, pair.sides[A].only());
        pair.sides[A].engine.rekey(now, Target::Ike(old.id), 2).unwrap();
        rekey_child(&mut pair, 3);
        pair.initiate(A, 4);
        pair.run(seconds(200));
        let on_old = |side: &Side| -> Vec<Header> {
            let headers = side.sent.iter().map(|sent| init::header(&sent.bytes));
            headers.filter(|header| header.initiator_spi == old.initiator_spi && !header.response).collect()
        };
        let asked = on_old(&pair.sides[A]);
        let last = asked.last().unwrap();
        assert_eq!(last.exchange, ExchangeType::INFORMATIONAL);
        let from = asked.iter().position(|header| header.message_id == last.message_id).unwrap();
        assert!(asked[from..].iter().all(|header| header.message_id == last.message_id), "only repetitions");
        pair.loss = 0;
        pair.run(seconds(200));
        pair.assert_same(1, 2);
    }
}

// §2.8: a Child SA is not deleted because another one has the same selectors.
#[test]
fn child_sas_with_the_same_selectors_stay() {
    let mut pair = up(747);
    for (side, token) in [(A, 2), (B, 3), (A, 4)] {
        pair.initiate(side, token);
        pair.run(seconds(5));
    }
    pair.run(seconds(600));
    pair.assert_same(1, 4);
}

// §2.9: an answer beyond the offer is not taken, and the peer is told that the SA goes.
#[test]
fn an_answer_with_more_than_was_offered_is_refused() {
    for (local, remote) in [("10.1.0.0/16", "10.2.0.0/24"), ("10.1.0.0/24", "10.9.0.0/24")] {
        let mut pair = up(748);
        pair.cut = true;
        pair.initiate(A, 2);
        answer_by(&mut pair, |request| yes(request, local, remote, 32));
        assert!(pair.sides[A].failed(2).unwrap().contains("not within ours"));
        let last = pair.sides[A].sent.len() - 1;
        assert!(matches!(&opened(&mut pair, A, last)[..], [Payload::Delete { protocol: Protocol::ESP, .. }]));
        assert_eq!(pair.sides[A].installed.len(), 1);
    }
}

// §2.9.2: a successor that would carry less is none. The old one stays until its end, and then there is a new one.
#[test]
fn a_successor_with_less_is_refused() {
    let mut a = connection(A);
    let mut net = (*a.children[0]).clone();
    net.life_time = seconds(300);
    a.children = vec![Arc::new(net)];
    let mut pair = established(Pair::with(749, EngineConfig::default(), a, connection(B)));
    let old = pair.sides[A].only().children[0].clone();
    pair.cut = true;
    rekey_child(&mut pair, 2);
    answer_by(&mut pair, |request| yes(request, "10.1.0.0/24", "10.2.0.0/25", 32));
    assert!(pair.sides[A].failed(2).unwrap().contains("less than the CHILD_SA has"));
    pair.cut = false;
    pair.run(seconds(200));
    assert_eq!(pair.sides[A].only().children[0].spi_in, old.spi_in);
    assert_eq!(pair.children(A), [ChildState::Installed]);
    pair.run(seconds(150));
    pair.assert_same(1, 1);
    assert_ne!(pair.sides[A].only().children[0].spi_in, old.spi_in);
    // As responder: by the policy that made the old one, though there is another one now.
    let mut narrow = connection(B);
    narrow.children = vec![Arc::new(child("net", "10.2.0.0/25", "10.1.0.0/24"))];
    pair.sides[B].engine.set_connections(vec![Arc::new(narrow)]);
    rekey_child(&mut pair, 3);
    pair.run(seconds(20));
    assert!(pair.sides[A].done(3));
    assert_eq!(pair.sides[A].only().children[0].remote_ts, old.remote_ts);
}

// §2.9.2: the packet that wanted the SA is no part of a rekey.
#[test]
fn a_rekey_does_not_offer_the_packet() {
    let mut pair = Pair::new(750);
    initiate_for(&mut pair, flow("10.1.0.5", "10.2.0.9"), 1);
    pair.run(seconds(3));
    pair.cut = true;
    rekey_child(&mut pair, 2);
    let request = answer_instead(&mut pair, &[notify(NotifyType::TEMPORARY_FAILURE, Vec::new())]);
    assert_eq!(request.ts_initiator, Some(selector("10.1.0.0/24")));
    assert_eq!(request.ts_responder, Some(selector("10.2.0.0/24")));
}

// §2.10: nonces of half the PRF's key size at least, in both roles and all exchanges.
#[test]
fn a_nonce_is_half_as_long_as_the_key_of_the_prf() {
    let sha512 = |side: usize| {
        let proposals = parse_proposals("aes128gcm16-prfsha512-x25519", Protocol::IKE).unwrap();
        Connection { proposals, ..connection(side) }
    };
    let pair = |seed| Pair::with(seed, EngineConfig::default(), sha512(A), sha512(B));
    for (length, good) in [(31, false), (32, true)] {
        // IKE_SA_INIT as responder, and as initiator.
        let mut first = pair(751);
        first.cut = true;
        first.initiate(A, 1);
        let request = first.sides[A].sent[0].clone();
        let shortened = |bytes: &[u8]| {
            let Ok(Incoming::Plain(mut message)) = wire::parse(bytes) else { panic!("a plain message") };
            for payload in &mut message.payloads {
                if let Payload::Nonce(nonce) = payload {
                    nonce.truncate(length);
                }
            }
            wire::encode(&message)
        };
        let to_b = Path { local: request.path.remote, remote: request.path.local, transport: Transport::Udp };
        let now = first.now;
        first.sides[B].engine.handle_message(now, to_b, &shortened(&request.bytes));
        first.drain(B);
        assert_eq!(first.sides[B].engine.counts().0, usize::from(good));
        first.sides[B].engine.handle_message(now, to_b, &request.bytes);
        first.drain(B);
        let answer = first.sides[B].sent.last().unwrap().bytes.clone();
        first.sides[A].engine.handle_message(now, request.path, &shortened(&answer));
        first.drain(A);
        let goes_on = first.sides[A].engine.sas.values().any(|slot| !matches!(slot.sa, IkeSa::Initiating(_)));
        assert_eq!(goes_on, good, "{length}");

        // CREATE_CHILD_SA, as initiator.
        let mut pair = established(pair(752));
        pair.cut = true;
        pair.initiate(A, 2);
        answer_by(&mut pair, |request| yes(request, "10.1.0.0/24", "10.2.0.0/24", length));
        pair.run(seconds(1));
        assert_eq!(pair.sides[A].done(2), good);
    }
    // And as responder.
    let mut pair = established(pair(753));
    let answer = ask(&mut pair, ExchangeType::CREATE_CHILD_SA, &[Payload::Nonce(vec![7; 31])]);
    assert!(answer.has(NotifyType::INVALID_SYNTAX));
}

// §2.18: no successor of the IKE SA without a key exchange.
#[test]
fn a_rekey_of_the_ike_sa_without_key_exchange_is_refused() {
    let mut pair = up(754);
    let mut proposals = parse_proposals("aes128gcm16-prfsha256-x25519", Protocol::IKE).unwrap();
    for proposal in &mut proposals {
        proposal.transforms.retain(|transform| transform.kind != ipsec::transform::TransformType::KE);
    }
    let payloads = [
        Payload::Sa(numbered(&proposals, &7_u64.to_be_bytes())),
        Payload::Nonce(vec![7; 32]),
        Payload::Ke { group: Ke::X25519, data: vec![9; 32] },
    ];
    assert!(ask(&mut pair, ExchangeType::CREATE_CHILD_SA, &payloads).has(NotifyType::NO_PROPOSAL_CHOSEN));
    assert_eq!((pair.sides[B].up().len(), pair.sides[B].engine.ctx.own_spis()), (1, 1));
}

// §2.21.2: malformed or critical in IKE_AUTH: that error and nothing else, and no IKE SA.
#[test]
fn a_malformed_ike_auth_request_gets_its_error_alone() {
    let nonce = || Payload::Nonce(vec![7; 32]);
    let critical = || Payload::Unknown { kind: 200, critical: true, data: vec![1] };
    let cases = [
        (vec![nonce(), nonce()], NotifyType::INVALID_SYNTAX),
        (vec![critical()], NotifyType::UNSUPPORTED_CRITICAL_PAYLOAD),
    ];
    for (payloads, error) in cases {
        let mut pair = Pair::new(755);
        pair.job_delay = seconds(20);
        pair.initiate(A, 1);
        pair.run(seconds(1));
        let slot = pair.sides[A].engine.sas.values_mut().next().unwrap();
        let IkeSa::InitiatorAuth(sa) = &mut slot.sa else { panic!("its proof is being made") };
        let retry = retry::Retry::start(pair.now, &crate::config::Retransmission::default(), false, &mut TestRng(1));
        let sealed = sa.channel.request(ExchangeType::IKE_AUTH, &payloads, None, retry, &mut TestRng(2)).unwrap();
        let path = Path { local: sa.core.path.remote, remote: sa.core.path.local, transport: sa.core.path.transport };
        let (now, before) = (pair.now, pair.sides[B].sent.len());
        pair.sides[B].engine.handle_message(now, path, &sealed[0]);
        pair.drain(B);
        let answer = pair.sides[B].sent[before].bytes.clone();
        let Ok(Incoming::Protected(protected)) = wire::parse(&answer) else { panic!("a protected answer") };
        let slot = pair.sides[A].engine.sas.values_mut().next().unwrap();
        let IkeSa::InitiatorAuth(sa) = &mut slot.sa else { panic!("its proof is being made") };
        let Received::Response(opened) = sa.channel.receive(protected, &answer) else { panic!("a response") };
        let said = wire::parse_payloads(opened.first, &opened.body).unwrap();
        assert!(matches!(&said[..], [Payload::Notify(notify)] if notify.kind == error), "{said:?}");
        assert!(pair.sides[B].engine.sas.is_empty());
    }
}

// §2.21.3: a response that cannot be understood gets no error message: the IKE SA is deleted.
#[test]
fn a_malformed_response_ends_the_ike_sa_without_an_error_message() {
    let mut pair = up(756);
    pair.cut = true;
    rekey_child(&mut pair, 2);
    let nonce = || Payload::Nonce(vec![7; 32]);
    answer_instead(&mut pair, &[nonce(), nonce()]);
    assert!(pair.sides[A].down(CloseReason::Failed) && pair.sides[A].engine.sas.is_empty());
    let last = pair.sides[A].sent.len() - 1;
    assert!(matches!(&opened(&mut pair, A, last)[..], [Payload::Delete { protocol: Protocol::IKE, .. }]));
}

// §2.23: ESP is never encapsulated on port 500, whatever ports the NAT gives.
#[test]
fn no_esp_is_encapsulated_on_port_500() {
    for shift in [0, 1, 10_000] {
        let mut pair = Pair::new(757);
        pair.nat = Some(("192.0.2.1".parse().unwrap(), shift));
        pair.initiate(A, 1);
        pair.run(seconds(3));
        pair.assert_same(1, 1);
        for side in &pair.sides {
            let Some(Encapsulation::Udp { local, remote }) = side.installed.values().next().map(|sa| sa.encapsulation)
            else {
                panic!("in UDP")
            };
            assert_eq!(local.port(), 4500);
            assert!([4500, 4500 + shift].contains(&remote.port()));
        }
    }
}

// §2.23.1: behind a NAT the client offers transport mode for the addresses of the IKE SA and no others.
#[test]
fn transport_mode_behind_a_nat_is_for_one_address_on_each_side() {
    let wide = |side: usize| {
        let mut host = child("net", "10.0.0.0/8", "10.0.0.0/8");
        host.mode = Mode::Transport;
        if side == B {
            host.remote_ts = vec![network("192.0.2.0/24")];
        }
        Connection { children: vec![Arc::new(host)], ..connection(side) }
    };
    let mut pair = Pair::with(758, EngineConfig::default(), wide(A), wide(B));
    pair.nat = Some(("192.0.2.1".parse().unwrap(), 10_000));
    pair.initiate(A, 1);
    pair.run(seconds(3));
    assert!(pair.sides[A].done(1));
    let shown = |selectors: &[TrafficSelector]| selectors.iter().map(ToString::to_string).collect::<Vec<_>>();
    let (a, b) = (pair.sides[A].only().children.remove(0), pair.sides[B].only().children.remove(0));
    assert_eq!((shown(&a.local_ts), shown(&a.remote_ts)), (vec!["10.0.0.1/32".into()], vec!["10.0.0.2/32".into()]));
    assert_eq!((shown(&b.local_ts), shown(&b.remote_ts)), (vec!["10.0.0.2/32".into()], vec!["192.0.2.1/32".into()]));
    // The answer names both as the responder sees them.
    let answer = opened(&mut pair, B, 1);
    let named = answer.iter().find_map(|payload| match payload {
        Payload::TsInitiator(selectors) => Some(selectors.clone()),
        _ => None,
    });
    assert_eq!(named, Some(selector("192.0.2.1/32")));
}

// §2.23.1: where the responder has no such policy, one for a tunnel between the addresses that the client named is looked for.
#[test]
fn without_transport_mode_the_named_addresses_count() {
    let mut host = child("net", "10.0.0.1/32", "10.0.0.2/32");
    host.mode = Mode::Transport;
    let a = Connection { children: vec![Arc::new(host)], ..connection(A) };
    let b = Connection { children: vec![Arc::new(child("net", "10.0.0.2/32", "10.0.0.1/32"))], ..connection(B) };
    let mut pair = Pair::with(759, EngineConfig::default(), a, b);
    pair.nat = Some(("192.0.2.1".parse().unwrap(), 10_000));
    pair.initiate(A, 1);
    pair.run(seconds(3));
    // A tunnel is what B gives and A does not want.
    assert_eq!(pair.sides[A].failed(1).as_deref(), Some("the peer chose another mode"));
    pair.run(seconds(30));
    pair.assert_same(1, 0);
}

// §3.3.6: NONE is chosen: the offered KE payload is ignored, and none comes back.
#[test]
fn where_no_key_exchange_is_chosen_none_comes_back() {
    let of = |side: usize, esp: &str| {
        let mut net = (*connection(side).children[0]).clone();
        net.esp_proposals = parse_proposals(esp, Protocol::ESP).unwrap();
        Connection { children: vec![Arc::new(net)], ..connection(side) }
    };
    let (a, b) = (of(A, "aes128gcm16-x25519-none"), of(B, "aes128gcm16"));
    let mut pair = established(Pair::with(760, EngineConfig::default(), a, b));
    let (from, answered) = (pair.sides[A].sent.len(), pair.sides[B].sent.len());
    rekey_child(&mut pair, 2);
    pair.run(Duration::from_millis(200));
    assert!(kinds(&opened(&mut pair, A, from)).contains(&"KE"));
    assert!(!kinds(&opened(&mut pair, B, answered)).contains(&"KE"));
    pair.run(seconds(20));
    assert!(pair.sides[A].done(2));
    assert_eq!(pair.sides[A].only().children[0].ke, Ke::NONE);
    pair.assert_same(1, 1);
}

// §3.10: an unknown error in an answer fails the request; an unknown status anywhere, or an error in a request, does nothing.
#[test]
fn unknown_notifies_fail_requests_or_nothing() {
    let mut pair = up(761);
    pair.cut = true;
    pair.initiate(A, 2);
    answer_instead(&mut pair, &[notify(NotifyType(9000), vec![1, 2])]);
    assert!(pair.sides[A].failed(2).unwrap().contains("(9000)"));
    pair.initiate(A, 3);
    answer_by(&mut pair, |request| {
        let mut answer = yes(request, "10.1.0.0/24", "10.2.0.0/24", 32);
        answer.push(notify(NotifyType(50_000), vec![1, 2]));
        answer
    });
    pair.run(seconds(1));
    assert!(pair.sides[A].done(3));
    let mut pair = up(762);
    for kind in [9000, 50_000] {
        let answer = ask(&mut pair, ExchangeType::INFORMATIONAL, &[notify(NotifyType(kind), vec![1])]);
        assert!(answer.notifies.is_empty() && answer.deletes.is_empty());
    }
    pair.assert_same(1, 1);
}

// RFC 4555 §3.9: a responder that sees a NAT where we allow none is asked again from IKE_SA_INIT on: perhaps somebody has changed
// one packet.
#[test]
fn an_unexpected_nat_in_ike_auth_is_tried_again_from_the_start() {
    let mobile = |side: usize| Connection { mobike: true, ..connection(side) };
    let mut pair = Pair::with(763, EngineConfig::default(), mobile(A), mobile(B));
    pair.nat = Some(("192.0.2.1".parse().unwrap(), 1000));
    pair.give_stripped_answer(NotifyType::NAT_DETECTION_SOURCE_IP);
    assert!(pair.sides[A].logged("received UNEXPECTED_NAT_DETECTED notify error"));
    pair.let_go();
    pair.run(seconds(10));
    assert!(pair.sides[A].done(1));
    pair.assert_same(1, 1);
}

// §3.15.4: an answer that gives no address at all, where one was asked for, gives no Child SA either.
#[test]
fn an_answer_without_an_address_gives_no_child_sa() {
    let a = Connection { vips: vec!["0.0.0.0".parse().unwrap()], ..connection(A) };
    let b = Connection { pools: vec!["none".to_owned()], ..connection(B) };
    let mut pair = Pair::with(764, EngineConfig::default(), a, b);
    pair.initiate(A, 1);
    pair.run(seconds(3));
    assert!(pair.sides[A].failed(1).is_some());
    pair.assert_same(1, 0);
    pair.cut = true;
    pair.initiate(A, 2);
    let request = answer_by(&mut pair, |request| yes(request, "10.1.0.0/24", "10.2.0.0/24", 32));
    assert!(request.configuration.is_some());
    assert!(pair.sides[A].failed(2).is_some() && pair.sides[A].installed.is_empty());
    let last = pair.sides[A].sent.len() - 1;
    assert!(matches!(&opened(&mut pair, A, last)[..], [Payload::Delete { protocol: Protocol::ESP, .. }]));
}
