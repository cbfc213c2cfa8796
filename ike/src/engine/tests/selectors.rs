//! Which selectors a Child SA gets: the packet that wants it, several policies, single pairs (RFC 7296 §2.9).

use ipsec::plane::TfcPadding;
use ipsec::selector::Flow;

use super::refusals::ask;
use super::*;
use crate::sa::channel::Received;
use crate::sa::fault::notify;
use crate::sa::parts::{Parts, address_selectors};
use crate::wire::{NotifyType, Payload, WireSelector};

const TCP: u8 = 6;

pub(super) fn flow(local: &str, remote: &str) -> Flow {
    let (local, remote) = (local.parse().unwrap(), remote.parse().unwrap());
    Flow { protocol: TCP, local, local_port: 40_000, remote, remote_port: 443 }
}

/// Connections with one child at A, and these remote networks' children at B.
fn one_to_many(networks: &[&str]) -> (Connection, Connection) {
    let (mut a, mut b) = (connection(A), connection(B));
    a.children = vec![Arc::new(child("all", "10.1.0.0/24", "10.0.0.0/8"))];
    b.children = networks.iter().map(|network| Arc::new(child(network, network, "10.1.0.0/24"))).collect();
    (a, b)
}

pub(super) fn initiate_for(pair: &mut Pair, packet: Flow, token: u64) {
    let connection = Arc::clone(&pair.sides[A].engine.ctx.connections[0]);
    let child = connection.children.first().cloned();
    let request = Initiate { connection, child, local: address(A), remote: address(B), token };
    let now = pair.now;
    pair.sides[A].engine.initiate_for_packet(now, request, packet);
    pair.drain(A);
}

fn remote_of_last(side: &Side) -> String {
    let child = side.only().children.last().cloned().unwrap();
    child.remote_ts.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
}

/// A's last request, which the network lost; B answers with these payloads, whatever it would have said.
pub(super) fn answer_instead(pair: &mut Pair, answer: &[Payload]) -> Parts {
    answer_by(pair, |_| answer.to_vec())
}

/// The same, with what the request says in mind.
pub(super) fn answer_by(pair: &mut Pair, answer: impl FnOnce(&Parts) -> Vec<Payload>) -> Parts {
    let request = pair.sides[A].sent.last().unwrap().clone();
    let Ok(Incoming::Protected(protected)) = wire::parse(&request.bytes) else { panic!("a protected request") };
    let slot = pair.sides[B].engine.sas.values_mut().next().unwrap();
    let IkeSa::Established(sa) = &mut slot.sa else { panic!("an established IKE SA") };
    let Received::Request(opened) = sa.channel.receive(protected, &request.bytes) else { panic!("a request") };
    let parts = Parts::of(&opened).unwrap();
    let sealed = sa.channel.respond(&answer(&parts), None, &mut TestRng(9)).unwrap();
    let path = Path { local: request.path.local, remote: request.path.remote, transport: request.path.transport };
    let now = pair.now;
    pair.sides[A].engine.handle_message(now, path, &sealed[0]);
    pair.drain(A);
    parts
}

fn selectors(payload: Option<&Vec<WireSelector>>) -> Vec<String> {
    address_selectors(payload.unwrap()).iter().map(ToString::to_string).collect()
}

// RFC 7296 §2.9: "the responder MUST narrow the Traffic Selectors to a subset that includes the initiator's first choices".
#[test]
fn the_packet_decides_which_policy_answers() {
    for (seed, to) in [(130, "10.2.0.9"), (131, "10.3.0.9"), (132, "10.4.0.9")] {
        let (a, b) = one_to_many(&["10.2.0.0/24", "10.3.0.0/24", "10.4.0.0/24"]);
        let mut pair = Pair::with(seed, EngineConfig::default(), a, b);
        // In IKE_AUTH…
        initiate_for(&mut pair, flow("10.1.0.5", to), 1);
        pair.run(seconds(3));
        assert!(pair.sides[A].done(1));
        assert_eq!(remote_of_last(&pair.sides[A]), format!("{}0/24", to.strip_suffix('9').unwrap()));
        // …and in CREATE_CHILD_SA.
        initiate_for(&mut pair, flow("10.1.0.5", "10.4.0.7"), 2);
        pair.run(seconds(3));
        assert!(pair.sides[A].done(2));
        assert_eq!(remote_of_last(&pair.sides[A]), "10.4.0.0/24");
        pair.assert_same(1, 2);
        assert!(pair.sides[A].engine.ctx.triggers.is_empty());
    }
}

#[test]
fn without_a_packet_the_first_policy_answers() {
    let (a, b) = one_to_many(&["10.3.0.0/24", "10.2.0.0/24"]);
    let pair = established(Pair::with(133, EngineConfig::default(), a, b));
    assert_eq!(remote_of_last(&pair.sides[A]), "10.3.0.0/24");
}

// RFC 7296 §2.9: TSi and TSr begin with the packet's very addresses, protocol and ports.
#[test]
fn an_offer_begins_with_the_packet() {
    let (a, b) = one_to_many(&["10.2.0.0/24"]);
    let mut pair = established(Pair::with(134, EngineConfig::default(), a, b));
    pair.cut = true;
    initiate_for(&mut pair, flow("10.1.0.5", "10.2.0.9"), 2);
    let request = answer_instead(&mut pair, &[notify(NotifyType::NO_ADDITIONAL_SAS, Vec::new())]);
    assert_eq!(selectors(request.ts_initiator.as_ref()), ["10.1.0.5/32[tcp/40000]", "10.1.0.0/24"]);
    assert_eq!(selectors(request.ts_responder.as_ref()), ["10.2.0.9/32[tcp/443]", "10.0.0.0/8"]);
    assert!(pair.sides[A].failed(2).unwrap().contains("NO_ADDITIONAL_SAS"));
    assert!(pair.sides[A].engine.ctx.triggers.is_empty());
}

// A packet that the policy no longer covers, as after a change of the configuration, is not offered.
#[test]
fn a_packet_outside_the_policy_is_not_offered() {
    let mut pair = up(135);
    pair.cut = true;
    initiate_for(&mut pair, flow("10.9.0.5", "10.2.0.9"), 2);
    let request = answer_instead(&mut pair, &[notify(NotifyType::TS_UNACCEPTABLE, Vec::new())]);
    assert_eq!(selectors(request.ts_initiator.as_ref()), ["10.1.0.0/24"]);
}

// RFC 7296 §2.9: SINGLE_PAIR_REQUIRED is answered with an offer for the packet's pair alone.
#[test]
fn a_single_pair_is_offered_where_the_peer_demands_it() {
    let (a, b) = one_to_many(&["10.2.0.0/24"]);
    let mut pair = established(Pair::with(136, EngineConfig::default(), a, b));
    pair.cut = true;
    initiate_for(&mut pair, flow("10.1.0.5", "10.2.0.9"), 2);
    let single = [notify(NotifyType::SINGLE_PAIR_REQUIRED, Vec::new())];
    answer_instead(&mut pair, &single);
    // Once is enough: who still wants a pair gets no third offer.
    let again = pair.sides[A].sent.last().unwrap().clone();
    pair.cut = false;
    pair.run(seconds(20));
    assert!(pair.sides[A].done(2));
    assert_eq!(remote_of_last(&pair.sides[A]), "10.2.0.9/32");
    let ours = pair.sides[A].only().children.last().cloned().unwrap();
    assert_eq!(ours.local_ts[0].to_string(), "10.1.0.5/32");
    assert!(pair.sides[A].sent.iter().filter(|sent| sent.bytes == again.bytes).count() >= 2, "repeated, not remade");

    // §2.9.2: its rekey asks for the same pair, not for what the peer would refuse.
    pair.cut = true;
    let now = pair.now;
    pair.sides[A].engine.rekey(now, Target::Child(ours.id), 3).unwrap();
    pair.drain(A);
    let request = answer_instead(&mut pair, &[notify(NotifyType::NO_PROPOSAL_CHOSEN, Vec::new())]);
    assert_eq!(selectors(request.ts_initiator.as_ref()), ["10.1.0.5/32"]);
    assert_eq!(selectors(request.ts_responder.as_ref()), ["10.2.0.9/32"]);
}

#[test]
fn a_single_pair_is_demanded_in_vain_without_a_packet_or_twice() {
    let single = [notify(NotifyType::SINGLE_PAIR_REQUIRED, Vec::new())];
    let (a, b) = one_to_many(&["10.2.0.0/24"]);
    let mut pair = established(Pair::with(137, EngineConfig::default(), a, b));
    pair.cut = true;
    pair.initiate(A, 2);
    answer_instead(&mut pair, &single);
    assert!(pair.sides[A].failed(2).unwrap().contains("SINGLE_PAIR_REQUIRED"));
    initiate_for(&mut pair, flow("10.1.0.5", "10.2.0.9"), 3);
    answer_instead(&mut pair, &single);
    assert_eq!(pair.sides[A].failed(3), None);
    answer_instead(&mut pair, &single);
    assert!(pair.sides[A].failed(3).unwrap().contains("SINGLE_PAIR_REQUIRED"));
}

fn create(pair: &mut Pair, tsi: &[&str], tsr: &[&str], more: &[NotifyType]) -> Parts {
    let list = |texts: &[&str]| {
        let fixed = |text: &&str| match network(text) {
            ConfiguredSelector::Fixed(selector) => WireSelector::Address(selector),
            ConfiguredSelector::Dynamic { .. } => panic!("a fixed selector"),
        };
        texts.iter().map(fixed).collect::<Vec<_>>()
    };
    let proposals = crate::sa::init::numbered(&parse_proposals("aes128gcm16", Protocol::ESP).unwrap(), &[1, 2, 3, 4]);
    let mut payloads: Vec<Payload> = more.iter().map(|kind| notify(*kind, Vec::new())).collect();
    payloads.extend([
        Payload::Sa(proposals),
        Payload::Nonce(vec![7; 32]),
        Payload::TsInitiator(list(tsi)),
        Payload::TsResponder(list(tsr)),
    ]);
    ask(pair, ExchangeType::CREATE_CHILD_SA, &payloads)
}

// RFC 7296 §2.9: what another Child SA could carry is announced, and only that.
#[test]
fn additional_selectors_are_announced_where_other_policies_have_them() {
    let (a, b) = one_to_many(&["10.2.0.0/24", "10.3.0.0/24"]);
    let mut pair = established(Pair::with(138, EngineConfig::default(), a, b));
    let answer = create(&mut pair, &["10.1.0.0/24"], &["10.0.0.0/8"], &[]);
    assert!(answer.has(NotifyType::ADDITIONAL_TS_POSSIBLE));
    assert_eq!(selectors(answer.ts_responder.as_ref()), ["10.2.0.0/24"]);
    let answer = create(&mut pair, &["10.1.0.0/24"], &["10.3.0.0/24", "10.9.0.0/24"], &[]);
    assert!(!answer.has(NotifyType::ADDITIONAL_TS_POSSIBLE), "10.9.0.0/24 is nobody's");
    assert_eq!(selectors(answer.ts_responder.as_ref()), ["10.3.0.0/24"]);
    assert!(create(&mut pair, &["10.9.0.0/24"], &["10.2.0.0/24"], &[]).has(NotifyType::TS_UNACCEPTABLE));
}

// RFC 7296 §1.3.1, §3.10.1: what concerns the Child SA and is not served is neither agreed to nor an obstacle.
#[test]
fn notifies_that_are_not_served_change_nothing() {
    let mut pair = up(139);
    let ignored = [
        NotifyType::NON_FIRST_FRAGMENTS_ALSO,
        NotifyType::ESP_TFC_PADDING_NOT_SUPPORTED,
        NotifyType(16387), // IPCOMP_SUPPORTED
        NotifyType(16392), // HTTP_CERT_LOOKUP_SUPPORTED
        NotifyType::ADDITIONAL_TS_POSSIBLE,
        NotifyType(40_000),
    ];
    let answer = create(&mut pair, &["10.1.0.0/24"], &["10.2.0.0/24"], &ignored);
    assert!(answer.error().is_none() && answer.sa.is_some());
    for kind in [NotifyType::NON_FIRST_FRAGMENTS_ALSO, NotifyType(16387), NotifyType(16392)] {
        assert!(!answer.has(kind), "{kind:?} is not agreed to");
    }
    assert_eq!(pair.sides[B].installed.len(), 2);
}

// RFC 7296 §1.3.1: transport mode is declined where the policy is a tunnel, and not given unasked.
#[test]
fn the_mode_follows_the_policy_and_the_request() {
    let mut pair = up(140);
    let answer = create(&mut pair, &["10.1.0.0/24"], &["10.2.0.0/24"], &[NotifyType::USE_TRANSPORT_MODE]);
    assert!(answer.error().is_none() && !answer.has(NotifyType::USE_TRANSPORT_MODE));
    let mut b = connection(B);
    let mut host = (*b.children[0]).clone();
    host.mode = Mode::Transport;
    b.children.push(Arc::new(host));
    let mut pair = established(Pair::with(141, EngineConfig::default(), connection(A), b));
    let answer = create(&mut pair, &["10.1.0.0/24"], &["10.2.0.0/24"], &[NotifyType::USE_TRANSPORT_MODE]);
    assert!(answer.has(NotifyType::USE_TRANSPORT_MODE), "that of transport mode comes first");
    let answer = create(&mut pair, &["10.1.0.0/24"], &["10.2.0.0/24"], &[]);
    assert!(answer.error().is_none() && !answer.has(NotifyType::USE_TRANSPORT_MODE));
}

// RFC 7296 §1.3.1: "the sending endpoint will not accept packets that contain … TFC padding".
#[test]
fn padding_is_for_peers_that_take_it() {
    let padding = |side| {
        let mut connection = connection(side);
        let mut child = (*connection.children[0]).clone();
        child.tfc_padding = TfcPadding::Mtu;
        connection.children = vec![Arc::new(child)];
        connection
    };
    let mut pair = established(Pair::with(142, EngineConfig::default(), padding(A), padding(B)));
    let tfc = |side: &Side| side.installed.values().map(|pair| pair.tfc).collect::<Vec<_>>();
    assert_eq!((tfc(&pair.sides[A]), tfc(&pair.sides[B])), (vec![TfcPadding::Mtu], vec![TfcPadding::Mtu]));
    // Nobody says in tunnel mode that it cannot, and who says so gets none.
    let answer = create(&mut pair, &["10.1.0.0/24"], &["10.2.0.0/24"], &[]);
    assert!(!answer.has(NotifyType::ESP_TFC_PADDING_NOT_SUPPORTED));
    create(&mut pair, &["10.1.0.0/24"], &["10.2.0.0/24"], &[NotifyType::ESP_TFC_PADDING_NOT_SUPPORTED]);
    let mut all = tfc(&pair.sides[B]);
    all.sort_by_key(|one| *one == TfcPadding::Mtu);
    assert_eq!(all, [TfcPadding::None, TfcPadding::Mtu, TfcPadding::Mtu]);
}
