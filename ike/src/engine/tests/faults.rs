//! Faults that other IKE daemons had: each with the number under which it was published, and what we do instead.

use super::intermediate::{Script, script};
use super::*;
use crate::sa::fault::notify;
use crate::sa::parts::Parts;
use crate::wire::{Header, Identification, NotifyType, Payload};
use ipsec::transform::{Proposal, Transform, TransformType};

/// Messages that claim to be of A's IKE SA at B, of any exchange, with and without protection, while A has not
/// authenticated: none changes anything.
fn nothing_before_authentication(payloads: Vec<Payload>) {
    let mut pair = Pair::new(600);
    pair.initiate(A, 1);
    for _ in 0..2000 {
        pair.run(Duration::from_millis(1));
        if pair.sides[B].engine.counts().1 == 1 && !pair.sides[B].sent.is_empty() {
            break;
        }
    }
    pair.cut = true;
    pair.deliveries.clear();
    let half = pair.sides[B].only();
    for exchange in 35..=45 {
        for message_id in 0..3 {
            let header = Header {
                initiator_spi: half.initiator_spi,
                responder_spi: half.responder_spi,
                major: 2,
                minor: 0,
                exchange: ExchangeType(exchange),
                from_initiator: true,
                response: false,
                message_id,
            };
            let bytes = wire::encode(&Message { header, payloads: payloads.clone() });
            let before = pair.snapshot(B);
            let now = pair.now;
            let path = Path { local: half.path.local, remote: half.path.remote, transport: half.path.transport };
            pair.sides[B].engine.handle_message(now, path, &bytes);
            pair.drain(B);
            assert_eq!(before, pair.snapshot(B));
        }
    }
    assert!(pair.sides[B].installed.is_empty());
}

// CVE-2026-78135: a CREATE_CHILD_SA before IKE_AUTH gave a Child SA to nobody in particular.
#[test]
fn create_child_sa_before_authentication_gives_nothing() {
    let esp = parse_proposals("aes128gcm16", Protocol::ESP).unwrap();
    let selector = || vec![wire::WireSelector::Unknown { kind: 9, data: Vec::new() }];
    nothing_before_authentication(vec![
        Payload::Sa(crate::sa::init::numbered(&esp, &[1, 2, 3, 4])),
        Payload::Nonce(vec![1; 32]),
        Payload::TsInitiator(selector()),
        Payload::TsResponder(selector()),
    ]);
}

// RFC 7296 §1.4: the same of Deletes and rekeys, and of IKE_FOLLOWUP_KE (CVE-2026-78133).
#[test]
fn deletes_and_rekeys_before_authentication_give_nothing() {
    nothing_before_authentication(vec![Payload::Delete { protocol: Protocol::IKE, spis: Vec::new() }]);
    nothing_before_authentication(vec![Payload::Delete { protocol: Protocol::ESP, spis: vec![1, 2] }]);
    nothing_before_authentication(vec![notify(NotifyType::REKEY_SA, Vec::new()), Payload::Nonce(vec![1; 32])]);
    nothing_before_authentication(vec![Payload::Ke { group: Ke::X25519, data: vec![9; 32] }]);
    nothing_before_authentication(Vec::new());
}

/// What B makes of an initiator with this identity.
fn asserted(data: Vec<u8>, kind: u8) {
    let mut pair = Pair::new(601);
    let mut a = connection(A);
    if let Ok(identity) = Identity::from_wire(kind, &data) {
        a.local_id = Some(identity);
        pair.sides[A].engine.set_connections(vec![Arc::new(a)]);
        pair.initiate(A, 1);
        pair.run(seconds(10));
        assert!(!pair.sides[A].done(1) && pair.sides[B].installed.is_empty());
        assert_eq!(pair.sides[B].engine.counts(), (0, 0));
    }
}

// CVE-2026-47895: "@#" and "dns:#", an identity of no octets, was freed twice. And all else that names can hide.
#[test]
fn odd_identities_get_nobody_in() {
    for text in ["@#", "dns:#", "@#00", "keyid:#", "@", "", "%any", "%", "a\0", "a.example.org\0.evil", "*"] {
        let Ok(identity) = Identity::parse(text) else { continue };
        asserted(identity.wire_data(), identity.kind());
        assert!(!IdentityPattern::exact(id("a")).matches(&identity), "{text:?}");
    }
    for kind in 0..=16 {
        for data in
            [vec![], vec![0], vec![0; 3], vec![0; 5], vec![0x30], vec![0x30, 0x80], vec![b'a', 0], vec![0xff; 400]]
        {
            asserted(data.clone(), kind);
            let body = Identification { kind, data };
            assert_eq!(body.body().len(), body.data.len() + 4);
        }
    }
}

// CVE-2021-45079: the peer said that it was authenticated before it was. An answer to IKE_AUTH without proof, or with
// errors beside the proof's place, brings nothing up.
#[test]
fn an_answer_without_proof_authenticates_nobody() {
    let mut pair = Pair::new(602);
    // A responder that refuses us, and says so under the keys that anybody can have.
    pair.sides[B].credentials = shared_key("another");
    pair.initiate(A, 1);
    pair.run(seconds(10));
    assert!(pair.sides[A].failed(1).is_some());
    assert!(pair.sides[A].up().is_empty() && pair.sides[A].installed.is_empty());
}

// strongSwan #2778: two Child SAs with one inbound SPI. Ours are never given twice, whatever the peer chooses for its.
#[test]
fn child_sas_never_share_a_spi() {
    let mut pair = up(603);
    for token in 10..40 {
        let now = pair.now;
        let children: Vec<ChildSaId> = pair.sides[A].only().children.iter().map(|child| child.id).collect();
        let side = usize::from(token % 2 == 0);
        if let Some(child) = children.first().filter(|_| side == A) {
            pair.sides[A].engine.rekey(now, Target::Child(*child), token).unwrap();
        } else {
            let child = pair.sides[B].only().children[0].id;
            pair.sides[B].engine.rekey(now, Target::Child(child), token).unwrap();
        }
        // `Side::install` panics when an SPI is there already.
        pair.run(seconds(7));
    }
    pair.assert_same(1, 1);
}

// strongSwan #2945: two rekeys of one Child SA. The second finds the first on its way, or its successor.
#[test]
fn two_rekeys_of_one_child_leave_one() {
    for between in [0, 1, 15, 40, 200] {
        let mut pair = up(604);
        let child = pair.sides[A].only().children[0].id;
        let now = pair.now;
        pair.sides[A].engine.rekey(now, Target::Child(child), 2).unwrap();
        pair.run(Duration::from_millis(between));
        let now = pair.now;
        let _gone_already = pair.sides[A].engine.rekey(now, Target::Child(child), 3);
        pair.run(seconds(20));
        pair.assert_same(1, 1);
    }
}

// strongSwan #1458: a Delete right behind the answer to a rekey, before the new Child SA is known to all. Also #1896: with
// a loss in between, and #3042: the IKE SA goes at that moment.
#[test]
fn a_delete_right_after_a_rekey_leaves_nothing_half() {
    for seed in 0..40 {
        let mut pair = up(6050 + seed);
        pair.loss = (seed % 4) * 10;
        let [a, b] = [A, B].map(|side| pair.sides[side].only());
        let now = pair.now;
        pair.sides[A].engine.rekey(now, Target::Child(a.children[0].id), 2).unwrap();
        pair.run(Duration::from_millis(seed));
        let now = pair.now;
        if seed % 2 == 0 {
            let newest = pair.sides[B].only().children.last().map(|child| child.id);
            let _gone = newest.map(|child| pair.sides[B].engine.terminate(now, Target::Child(child), false, 3));
        } else {
            let _gone = pair.sides[B].engine.terminate(now, Target::Ike(b.id), false, 3);
        }
        pair.run(seconds(400));
        let (ikes, children) = (pair.sides[A].up().len(), pair.sides[A].installed.len());
        pair.assert_same(ikes, children);
    }
}

// CVE-2023-41913 and RFC 6989 §2: public values of the wrong length, zero, one or the modulus less one.
#[test]
fn public_values_that_are_none_are_refused() {
    use crate::crypto::KeyWork;
    let methods = [Ke::MODP_2048, Ke::MODP_3072, Ke::ECP_256, Ke::ECP_384, Ke::ECP_521, Ke::X25519];
    for method in methods {
        for length in [0, 1, 31, 32, 33, 63, 64, 65, 96, 97, 132, 133, 255, 256, 257, 384, 512, 1024, 10_000] {
            for octet in [0, 0xff] {
                let peer = vec![octet; length];
                // X25519 takes any 32 octets but those of low order (RFC 7748 §6.1).
                if (method, length, octet) != (Ke::X25519, 32, 0xff) {
                    let agreed = KeyWork::Respond { method, peer }.run(&mut TestRng(1));
                    assert!(agreed.is_err(), "{method:?}: {length} octets of {octet}");
                }
            }
        }
    }
}

// CVE-2026-78127: memory lost with each message; CVE-2022-40617 and others: with each attempt. After a thousand attempts
// that fail, each table is as empty as before.
#[test]
fn failed_attempts_leave_nothing_behind() {
    let config = EngineConfig { address_budget: 0, ..EngineConfig::default() };
    let mut pair = Pair::with(607, config, connection(A), connection(B));
    pair.sides[B].credentials = shared_key("another");
    for token in 0..300 {
        pair.initiate(A, token);
        pair.run(seconds(1));
    }
    pair.run(seconds(400));
    for side in [A, B] {
        let engine = &pair.sides[side].engine;
        assert_eq!(engine.counts(), (0, 0));
        let ctx = &engine.ctx;
        assert!(
            ctx.own_spis() == 0
                && ctx.child_spis.is_empty()
                && ctx.jobs.is_empty()
                && ctx.shared.peers.all().is_empty()
        );
        assert!(engine.inits.is_empty() && engine.timers.is_empty() && engine.upkeep.is_empty());
        assert!(ctx.tombstones.len() <= 1024);
    }
}

const PLAIN: &str = "aes128gcm16-prfsha256-x25519";

impl Pair {
    /// A asks in IKE_AUTH, and somebody who has B's keys answers with these payloads.
    pub(super) fn answer_ike_auth(&mut self, payloads: &[Payload]) {
        self.initiate(A, 1);
        self.answer_next_ike_auth(payloads);
        self.run(seconds(10));
    }

    /// The same for what A has initiated already.
    pub(super) fn answer_next_ike_auth(&mut self, payloads: &[Payload]) {
        self.cut = false;
        // A first request may be lost still.
        for _ in 0..8000 {
            let sealed = self.sides[A].engine.sas.values().next().and_then(|slot| match &slot.sa {
                IkeSa::InitiatorAuth(sa) if sa.channel.is_waiting() => {
                    let exchange = ExchangeType::IKE_AUTH;
                    Some((sa.core.path, sa.channel.forge(exchange, true, 0, payloads, None, &mut TestRng(9))))
                }
                _ => None,
            });
            if let Some((path, sealed)) = sealed {
                self.cut = true;
                self.deliveries.clear();
                let now = self.now;
                self.sides[A].engine.handle_message(now, path, &sealed[0]);
                self.drain(A);
                return;
            }
            self.run(Duration::from_millis(1));
        }
        panic!("A does not come to IKE_AUTH");
    }
}

fn id_b() -> Payload {
    Payload::IdResponder(Identification { kind: 2, data: b"b".to_vec() })
}

// CVE-2021-45079: EAP-Success out of turn took the place of a proof. Where no EAP is configured, whoever speaks it, or says
// something else in place of a proof, is nobody; where it is, see `eap`.
#[test]
fn eap_in_place_of_a_proof_authenticates_nobody() {
    let eap = |octets: &[u8]| Payload::Eap(octets.to_vec());
    let (success, request) = (eap(&[3, 1, 0, 4]), eap(&[1, 1, 0, 5, 1]));
    let auth = |method, length| Payload::Auth { method, data: vec![0; length] };
    for said in [
        vec![success.clone()],
        vec![request],
        vec![eap(&[])],
        vec![eap(&[3, 1, 0, 0])],
        vec![success.clone(), success.clone()],
        vec![auth(2, 0)],
        vec![auth(2, 32)],
        vec![auth(13, 32), success.clone()],
        vec![auth(0, 0)],
        vec![],
    ] {
        let mut pair = Pair::new(608);
        pair.answer_ike_auth(&[vec![id_b()], said.clone()].concat());
        assert!(pair.sides[A].failed(1).is_some(), "{said:?}");
        assert!(pair.sides[A].up().is_empty() && pair.sides[A].installed.is_empty());
        assert_eq!(pair.sides[A].engine.counts(), (0, 0));

        let (mut pair, mut script) = script(609, PLAIN);
        let id = Payload::IdInitiator(Identification { kind: 2, data: b"a".to_vec() });
        let request = [vec![id], said.clone()].concat();
        let answer = script.ask(&mut pair, ExchangeType::IKE_AUTH, &request).expect("an answer");
        let twice = said == [success.clone(), success.clone()];
        let refusal = if twice { NotifyType::INVALID_SYNTAX } else { NotifyType::AUTHENTICATION_FAILED };
        assert!(answer.has(refusal), "{said:?}");
        assert!(pair.sides[B].up().is_empty() && pair.sides[B].installed.is_empty());
        assert_eq!(pair.sides[B].engine.counts(), (0, 0));
    }
}

// CVE-2026-78123, CVE-2026-78130 to 78132, CVE-2022-40617: PKCS#7, attribute certificates, CRLs, raw keys, and places to
// fetch things from (RFC 7296 §3.6: "hash and URL") are not even kept; nor are more certificates than a chain has.
#[test]
fn certificates_of_other_encodings_or_beyond_a_chain_are_not_kept() {
    let certificate = |encoding, octet| Payload::Cert { encoding, data: vec![octet; 20] };
    let others: Vec<Payload> =
        (0..=255).filter(|encoding| *encoding != 4).map(|encoding| certificate(encoding, 0x30)).collect();
    assert!(Parts::collect(others).unwrap().certificates.is_empty());
    let many = Parts::collect((0..60).map(|octet| certificate(4, octet)).collect()).unwrap();
    assert_eq!(many.certificates, (0..16).map(|octet| vec![octet; 20]).collect::<Vec<_>>());
    let request = |encoding, count: usize| Payload::CertReq { encoding, authorities: vec![7; count * 20] };
    let none = Parts::collect((0..=255).filter(|encoding| *encoding != 4).map(|n| request(n, 3)).collect()).unwrap();
    assert!(!none.cert_requested && none.cert_requests.is_empty());
    assert_eq!(Parts::collect(vec![request(4, 400), request(4, 400)]).unwrap().cert_requests.len(), 512);
}

// RFC 7296 §3.6: HTTP_CERT_LOOKUP_SUPPORTED asks for nothing, and what is named by hash and URL is not missed.
#[test]
fn hash_and_url_is_ignored_safely() {
    let (mut pair, mut script) = script(610, PLAIN);
    let url = [&[7; 20][..], b"http://10.0.0.1:1/certificate"].concat();
    let says = vec![
        notify(NotifyType::HTTP_CERT_LOOKUP_SUPPORTED, Vec::new()),
        Payload::Cert { encoding: 12, data: url.clone() },
        Payload::Cert { encoding: 13, data: url },
    ];
    let answer = script.authenticate_and_say(&mut pair, says);
    assert!(answer.error().is_none() && answer.auth.is_some());
    assert!(!answer.has(NotifyType::HTTP_CERT_LOOKUP_SUPPORTED));
    assert_eq!(pair.sides[B].up().len(), 1);
}

/// B is given A's IKE_SA_INIT request with another offer; what it chose, and how long that took.
fn offer(proposals: Vec<Proposal>) -> (Proposal, Duration) {
    let mut pair = Pair::new(611);
    pair.initiate(A, 1);
    pair.run(Duration::ZERO);
    let request = pair.sides[A].sent[0].clone();
    let Ok(Incoming::Plain(mut message)) = wire::parse(&request.bytes) else { panic!("IKE_SA_INIT") };
    let sa = message.payloads.iter_mut().find(|payload| matches!(payload, Payload::Sa(_))).unwrap();
    *sa = Payload::Sa(proposals);
    let bytes = wire::encode(&message);
    assert!(bytes.len() > 60_000);
    let path = Path { local: request.path.remote, remote: request.path.local, transport: Transport::Udp };
    let (now, started) = (pair.now, Instant::now());
    pair.sides[B].engine.handle_message(now, path, &bytes);
    let took = started.elapsed();
    pair.drain(B);
    pair.run(Duration::ZERO);
    let Ok(Incoming::Plain(answer)) = wire::parse(&pair.sides[B].sent[0].bytes) else { panic!("an answer") };
    let chosen = Parts::collect(answer.payloads).unwrap().sa.expect("a choice");
    (chosen[0].clone(), took)
}

// Numbers of proposals and transforms: the largest offers that fit into a message cost little.
#[test]
fn the_largest_offer_costs_little() {
    let right = parse_proposals(PLAIN, Protocol::IKE).unwrap().remove(0);
    for (proposals, transforms) in [(255, 29), (31, 255)] {
        // Nearly right, as often as it goes.
        let nearly = |number: u8| {
            let mut proposal = Proposal { number, ..right.clone() };
            proposal.transforms.retain(|transform| transform.kind != TransformType::PRF);
            let more = (0..).map(|id| Transform::new(TransformType::PRF, 0x400 + id));
            let missing = transforms - proposal.transforms.len();
            proposal.transforms.extend(more.take(missing));
            proposal
        };
        let mut all: Vec<Proposal> = (1..proposals).map(nearly).collect();
        all.push(Proposal { number: proposals, ..right.clone() });
        let (chosen, took) = offer(all);
        assert_eq!(chosen.number, proposals);
        assert!(took < seconds(2), "{took:?}");
    }
}

// Numbers of Delete payloads and of SPIs in them: an authentic peer that deletes what there is not.
#[test]
fn deletes_without_end_cost_little() {
    let mut pair = up(612);
    let IkeSa::Established(sa) = &pair.sides[B].engine.sas.values().next().unwrap().sa else { panic!("up") };
    let payloads: Vec<Payload> = (0..60)
        .map(|n| Payload::Delete { protocol: Protocol::ESP, spis: (n * 250..(n + 1) * 250).collect() })
        .collect();
    let sealed = sa.channel.forge(ExchangeType::INFORMATIONAL, false, 0, &payloads, None, &mut TestRng(9));
    let (path, now, before) = (sa.core.path, pair.now, pair.sides[B].sent.len());
    assert!(sealed[0].len() > 60_000);
    let started = Instant::now();
    pair.sides[B].engine.handle_message(now, path, &sealed[0]);
    pair.drain(B);
    assert!(started.elapsed() < seconds(2));
    let answers: Vec<usize> = pair.sides[B].sent[before..].iter().map(|sent| sent.bytes.len()).collect();
    assert!(matches!(answers[..], [length] if length < 100), "{answers:?}");
    assert_eq!(pair.sides[B].installed.len(), 1);
}

// RFC 4555 §4.2.1: data in MOBIKE_SUPPORTED are ignored.
#[test]
fn data_in_mobike_supported_are_ignored() {
    let b = Connection { mobike: true, ..connection(B) };
    let mut pair = Pair::with(613, EngineConfig::default(), connection(A), b);
    let mut script = Script::new(&pair.sides[A].engine.ctx.connections[0].proposals, false);
    script.init(&mut pair);
    let says = vec![notify(NotifyType::MOBIKE_SUPPORTED, vec![9; 300])];
    let answer = script.authenticate_and_say(&mut pair, says);
    assert!(answer.notify(NotifyType::MOBIKE_SUPPORTED).is_some_and(|notify| notify.data.is_empty()));
    assert_eq!(pair.sides[B].up().len(), 1);
}

// strongSwan #2477 and #3024: a rekey that is refused, alone or while the other side rekeys too, leaves one Child SA.
#[test]
fn a_refused_rekey_leaves_one_child() {
    for (seed, both) in [(614, false), (615, true)] {
        for error in [InstallError::Refused("policy".to_owned()), InstallError::Failed("no room".to_owned())] {
            let mut pair = Pair::by_hand(seed).with_traffic();
            pair.rekey_child(A, 0x40);
            if both {
                pair.rekey_child(B, 0x80);
            }
            pair.sides[B].refuse_installs = Some(error.clone());
            pair.pass(A);
            pair.sides[B].refuse_installs = None;
            // What is under way is lost, and sent again.
            pair.let_go();
            pair.run(seconds(300));
            pair.assert_same(1, 1);
        }
    }
}
