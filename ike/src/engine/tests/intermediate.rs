//! Between IKE_SA_INIT and IKE_AUTH: jobs for key exchanges, IKE_INTERMEDIATE (RFC 9242) and what it carries,
//! additional key exchanges (RFC 9370).

use ipsec::plane::EspKeys;
use ipsec::transform::{Prf, Proposal};

use super::init::{header, payloads};
use super::*;
use crate::crypto::{self, IkeKeys, IkeSuite, KeyExchange};
use crate::sa::channel::{Channel, Received, Spis};
use crate::sa::fault::notify;
use crate::sa::parts::Parts;
use crate::wire::{Header, Identification, NotifyType, Payload};

pub(super) fn with_proposals(side: usize, proposals: &str) -> Connection {
    let mut connection = connection(side);
    connection.proposals = parse_proposals(proposals, Protocol::IKE).unwrap();
    connection
}

fn pair_with(seed: u64, proposals: &str) -> Pair {
    Pair::with(seed, EngineConfig::default(), with_proposals(A, proposals), with_proposals(B, proposals))
}

const HYBRID: &str = "aes128gcm16-prfsha256-x25519-ke1_mlkem768";
const SEVEN: &str =
    "aes256-sha256-x25519-ke1_mlkem768-ke2_ecp256-ke3_mlkem512-ke4_ecp384-ke5_mlkem1024-ke6_ecp521-ke7_modp2048";

fn exchanges(pair: &Pair, side: usize) -> Vec<(u8, u32)> {
    let of = |sent: &Transmit| (header(&sent.bytes).exchange.0, header(&sent.bytes).message_id);
    pair.sides[side].sent.iter().map(of).collect()
}

// RFC 9242 §3.2: message IDs 1 and on; IKE_AUTH has the next. RFC 9370 §2.2.2: one exchange for each method.
#[test]
fn an_additional_key_exchange_goes_before_ike_auth() {
    let config = EngineConfig { fragment_size: 60_000, ..EngineConfig::default() };
    let pair = established(Pair::with(300, config, with_proposals(A, HYBRID), with_proposals(B, HYBRID)));
    assert_eq!(exchanges(&pair, A), [(34, 0), (43, 1), (35, 2)]);
    assert_eq!(exchanges(&pair, B), [(34, 0), (43, 1), (35, 2)]);
    for side in [A, B] {
        let suite = pair.sides[side].only().suite.unwrap();
        assert_eq!(suite.additional.iter().collect::<Vec<_>>(), [(1, Ke::ML_KEM_768)]);
        assert!(payloads(&pair.sides[side].sent[0].bytes).iter().any(|payload| {
            matches!(payload, Payload::Notify(notify) if notify.kind == NotifyType::INTERMEDIATE_EXCHANGE_SUPPORTED)
        }));
    }
}

// RFC 9242 §3.1: nothing is announced that is not wanted.
#[test]
fn without_additional_key_exchanges_there_is_no_intermediate_exchange() {
    let pair = up(301);
    assert_eq!(exchanges(&pair, A), [(34, 0), (35, 1)]);
    for side in [A, B] {
        assert!(!payloads(&pair.sides[side].sent[0].bytes).iter().any(|payload| {
            matches!(payload, Payload::Notify(notify) if notify.kind == NotifyType::INTERMEDIATE_EXCHANGE_SUPPORTED)
        }));
    }
}

// RFC 9370 §2.2.2, RFC 7383, RFC 9242 §3.3.2: all seven, in small fragments, on a network that loses, doubles and
// reorders them; what IKE_AUTH authenticates does not depend on that.
#[test]
fn seven_additional_key_exchanges_on_a_bad_network() {
    for seed in 0..12 {
        let config = EngineConfig { fragment_size: 700, ..EngineConfig::default() };
        let mut pair = Pair::with(310 + seed, config, with_proposals(A, SEVEN), with_proposals(B, SEVEN));
        pair.loss = seed;
        pair.duplication = 20;
        pair.delay.0 = Duration::from_millis(300);
        pair.key_delay = Duration::from_millis(100 * (seed % 3));
        pair.sides[B].engine.ctx.config.half_open_timeout = seconds(3000);
        pair.initiate(A, 1);
        pair.run(seconds(1500));
        assert!(pair.sides[A].done(1), "seed {seed}: {:?}", pair.sides[A].failed(1));
        pair.assert_same(1, 1);
        let fragments = pair.sides[A].sent.iter().filter(|sent| sent.bytes[18] == 43 && sent.bytes[16] == 53);
        assert!(fragments.count() > 7);
    }
}

// RFC 9329 §7.5: over TCP without fragments.
#[test]
fn additional_key_exchanges_over_a_stream() {
    let mut a = with_proposals(A, HYBRID);
    a.tcp = TcpPolicy::Yes;
    let pair = established(Pair::with(302, EngineConfig::default(), a, with_proposals(B, HYBRID)));
    assert_eq!(exchanges(&pair, A), [(34, 0), (43, 1), (35, 2)]);
}

// RFC 9242 §3.2: with a NAT, from the first IKE_INTERMEDIATE on over the port for encapsulation.
#[test]
fn additional_key_exchanges_float_to_the_encapsulation_port() {
    let mut pair = pair_with(303, HYBRID);
    pair.nat = Some(("192.0.2.1".parse().unwrap(), 10_000));
    let pair = established(pair);
    assert_eq!(pair.sides[A].sent[0].path.local.port(), 500);
    assert!(pair.sides[A].sent.iter().skip(1).all(|sent| sent.path.local.port() == 4500));
}

// RFC 9370 §2.2.1: without the announcement no additional key exchange is chosen.
#[test]
fn a_peer_without_intermediate_exchanges_gets_no_additional_key_exchange() {
    for (proposals, ours) in [(HYBRID, None), ("aes128gcm16-prfsha256-x25519-ke1_mlkem768-ke1_none", Some(Ke::NONE))] {
        let mut pair = pair_with(304, proposals);
        let mut script = Script::new(&pair.sides[A].engine.ctx.connections[0].proposals, false);
        script.init(&mut pair);
        match ours {
            None => assert_eq!(script.refused, Some(NotifyType::NO_PROPOSAL_CHOSEN)),
            Some(_) => {
                assert_eq!(script.refused, None);
                assert!(script.suite.unwrap().additional.is_none());
                script.authenticate(&mut pair).unwrap();
                assert_eq!(pair.sides[B].up().len(), 1);
            }
        }
    }
}

/// An initiator by hand. It derives keys and authentication from the RFCs' formulas, with the PRF as its only tool.
pub(super) struct Script {
    pub(super) spi: u64,
    offered: Vec<Proposal>,
    announces: bool,
    ni: Vec<u8>,
    nr: Vec<u8>,
    request: Vec<u8>,
    pub(super) suite: Option<IkeSuite>,
    pub(super) channel: Option<Channel>,
    pub(super) refused: Option<NotifyType>,
    int_i: Vec<u8>,
    int_r: Vec<u8>,
    exchanges: u32,
    /// Leaves IntAuth out of its proof.
    pub(super) forgets_intermediate: bool,
    pub(super) last: Vec<Vec<u8>>,
}

pub(super) fn prf(key: &[u8], parts: &[&[u8]]) -> Vec<u8> {
    crypto::prf(Prf::HMAC_SHA2_256, key, parts).unwrap().expose().to_vec()
}

/// T1 | T2 | … with Tn = prf(K, Tn-1 | S | n) (RFC 7296 §2.13).
pub(super) fn expand(key: &[u8], seed: &[u8], length: usize) -> Vec<u8> {
    let (mut all, mut last) = (Vec::new(), Vec::new());
    for n in 1.. {
        last = prf(key, &[&last, seed, &[n]]);
        all.extend_from_slice(&last);
        if all.len() >= length {
            break;
        }
    }
    all.truncate(length);
    all
}

fn path_to_b() -> Path {
    Path {
        local: SocketAddr::new(address(B), 500),
        remote: SocketAddr::new(address(A), 500),
        transport: Transport::Udp,
    }
}

/// Gives B a datagram, runs its jobs, and gives what it sent.
pub(super) fn tell(pair: &mut Pair, bytes: &[u8]) -> Vec<Vec<u8>> {
    let before = pair.sides[B].sent.len();
    let now = pair.now;
    pair.sides[B].engine.handle_message(now, path_to_b(), bytes);
    pair.drain(B);
    pair.cut = true;
    pair.run(seconds(1));
    pair.sides[B].sent[before..].iter().map(|sent| sent.bytes.clone()).collect()
}

impl Script {
    pub(super) fn new(offered: &[Proposal], announces: bool) -> Self {
        let offered = offered.iter().zip(1..).map(|(one, number)| Proposal { number, ..one.clone() }).collect();
        Self {
            spi: 0x1234,
            offered,
            announces,
            ni: vec![3; 32],
            nr: Vec::new(),
            request: Vec::new(),
            suite: None,
            channel: None,
            refused: None,
            int_i: Vec::new(),
            int_r: Vec::new(),
            exchanges: 0,
            forgets_intermediate: false,
            last: Vec::new(),
        }
    }

    /// IKE_SA_INIT with X25519.
    pub(super) fn init(&mut self, pair: &mut Pair) {
        let ke = KeyExchange::generate(Ke::X25519, &mut TestRng(5)).unwrap();
        let mut payloads = vec![
            Payload::Sa(self.offered.clone()),
            Payload::Ke { group: Ke::X25519, data: ke.public().to_vec() },
            Payload::Nonce(self.ni.clone()),
            notify(NotifyType::IKEV2_FRAGMENTATION_SUPPORTED, Vec::new()),
        ];
        if self.announces {
            payloads.push(notify(NotifyType::INTERMEDIATE_EXCHANGE_SUPPORTED, vec![1, 2, 3]));
        }
        let header = Header {
            initiator_spi: self.spi,
            responder_spi: 0,
            major: 2,
            minor: 0,
            exchange: ExchangeType::IKE_SA_INIT,
            from_initiator: true,
            response: false,
            message_id: 0,
        };
        self.request = wire::encode(&Message { header, payloads });
        let answers = tell(pair, &self.request);
        let Ok(Incoming::Plain(answer)) = wire::parse(&answers[0]) else { panic!("a plain answer") };
        let parts = Parts::collect(answer.payloads).unwrap();
        if let Some(error) = parts.error() {
            self.refused = Some(error.kind);
            return;
        }
        let suite = crypto::accept_ike(&parts.sa.unwrap(), &self.offered).unwrap();
        self.suite = Some(suite);
        self.nr = parts.nonce.unwrap();
        let secret = ke.agree(&parts.ke.unwrap().1).unwrap();
        // RFC 7296 §2.14.
        let skeyseed = prf(&[self.ni.clone(), self.nr.clone()].concat(), &[secret.expose()]);
        let spis = Spis { initiator: self.spi, responder: answer.header.responder_spi };
        self.channel = Some(Channel::new(suite, self.keys(&skeyseed, spis), spis, true, false).unwrap());
    }

    fn keys(&self, skeyseed: &[u8], spis: Spis) -> IkeKeys {
        let spis = [spis.initiator.to_be_bytes(), spis.responder.to_be_bytes()].concat();
        let seed = [self.ni.clone(), self.nr.clone(), spis].concat();
        // AES-128-GCM: 16 octets and 4 of salt, no integrity keys.
        let keymat = expand(skeyseed, &seed, 3 * 32 + 2 * 20);
        let cut = |from: usize, length: usize| Secret::new(keymat[from..from + length].to_vec());
        let esp = |encr| EspKeys { encr, integ: Secret::new(Vec::new()) };
        IkeKeys {
            d: cut(0, 32),
            initiator: esp(cut(32, 20)),
            responder: esp(cut(52, 20)),
            pi: cut(72, 32),
            pr: cut(104, 32),
        }
    }

    /// Goes over to a rekeyed IKE SA.
    pub(super) fn moves_to(&mut self, skeyseed: &[u8], spis: (u64, u64), nonces: (&[u8], &[u8])) {
        (self.ni, self.nr) = (nonces.0.to_vec(), nonces.1.to_vec());
        let spis = Spis { initiator: spis.0, responder: spis.1 };
        let keys = self.keys(skeyseed, spis);
        self.channel = Some(Channel::new(self.suite.unwrap(), keys, spis, true, true).unwrap());
    }

    /// Sends a request, and gives what came back.
    pub(super) fn ask(&mut self, pair: &mut Pair, exchange: ExchangeType, payloads: &[Payload]) -> Option<Parts> {
        let retry = retry::Retry::start(pair.now, &Retransmission::default(), true, &mut TestRng(1));
        let channel = self.channel.as_mut().unwrap();
        self.last = channel.request(exchange, payloads, Some(1000), retry, &mut TestRng(9)).unwrap();
        let mut answers = Vec::new();
        for datagram in self.last.clone() {
            answers.extend(tell(pair, &datagram));
        }
        let channel = self.channel.as_mut().unwrap();
        let mut parts = None;
        for answer in answers {
            let Ok(Incoming::Protected(protected)) = wire::parse(&answer) else { panic!("a protected answer") };
            if let Received::Response(opened) = channel.receive(protected, &answer) {
                let mut plain = header_octets(&opened.header, 28 + 4 + opened.body.len());
                plain.extend_from_slice(&[opened.first, 0]);
                plain.extend_from_slice(&u16::try_from(4 + opened.body.len()).unwrap().to_be_bytes());
                plain.extend_from_slice(&opened.body);
                self.int_r = prf(channel.pr.expose(), &[&self.int_r, &plain]);
                parts = Some(Parts::of(&opened).unwrap());
            }
        }
        parts
    }

    /// An additional key exchange in IKE_INTERMEDIATE.
    pub(super) fn intermediate(&mut self, pair: &mut Pair, method: Ke) {
        let ke = KeyExchange::generate(method, &mut TestRng(6)).unwrap();
        let data = ke.public().to_vec();
        // RFC 9242 §3.3.2, by hand: the header with the adjusted length, the Encrypted payload's header likewise,
        // and a KE payload.
        let length = 8 + data.len();
        let channel = self.channel.as_ref().unwrap();
        let header = Header {
            initiator_spi: channel.spis.initiator,
            responder_spi: channel.spis.responder,
            major: 2,
            minor: 0,
            exchange: ExchangeType::IKE_INTERMEDIATE,
            from_initiator: true,
            response: false,
            message_id: self.exchanges + 1,
        };
        let mut plain = header_octets(&header, 28 + 4 + length);
        plain.extend_from_slice(&[34, 0]);
        plain.extend_from_slice(&u16::try_from(4 + length).unwrap().to_be_bytes());
        plain.extend_from_slice(&[0, 0]);
        plain.extend_from_slice(&u16::try_from(length).unwrap().to_be_bytes());
        plain.extend_from_slice(&method.0.to_be_bytes());
        plain.extend_from_slice(&[0, 0]);
        plain.extend_from_slice(&data);
        self.int_i = prf(channel.pi.expose(), &[&self.int_i, &plain]);
        let request = [Payload::Ke { group: method, data }];
        let answer = self.ask(pair, ExchangeType::IKE_INTERMEDIATE, &request).expect("an answer");
        self.exchanges += 1;
        let (group, public) = answer.ke.expect("KEr");
        assert_eq!(group, method);
        let secret = ke.agree(&public).unwrap();
        // RFC 9370 §2.2.2: SKEYSEED(n) = prf(SK_d(n-1), SK(n) | Ni | Nr).
        let channel = self.channel.as_mut().unwrap();
        let skeyseed = prf(channel.d.expose(), &[secret.expose(), &self.ni, &self.nr]);
        let spis = channel.spis;
        let keys = self.keys(&skeyseed, spis);
        self.channel.as_mut().unwrap().renew(keys).unwrap();
    }

    /// IKE_AUTH with the shared key, without a Child SA.
    pub(super) fn authenticate(&mut self, pair: &mut Pair) -> Result<(), NotifyType> {
        let answer = self.authenticate_and_say(pair, Vec::new());
        answer.error().map_or(Ok(()), |error| Err(error.kind))
    }

    /// AUTH by a shared key (RFC 7296 §2.15).
    pub(super) fn proof(&self, id: &Identification, key: &[u8]) -> Payload {
        let channel = self.channel.as_ref().unwrap();
        let maced = prf(channel.pi.expose(), &[&id.body()]);
        let int = match self.exchanges {
            _ if self.forgets_intermediate => Vec::new(),
            0 => Vec::new(),
            n => [self.int_i.clone(), self.int_r.clone(), (n + 1).to_be_bytes().to_vec()].concat(),
        };
        let octets = [self.request.clone(), self.nr.clone(), maced, int].concat();
        Payload::Auth { method: 2, data: prf(&prf(key, &[b"Key Pad for IKEv2"]), &[&octets]) }
    }

    /// The same with more payloads, and what came back.
    pub(super) fn authenticate_and_say(&mut self, pair: &mut Pair, more: Vec<Payload>) -> Parts {
        let id = Identification { kind: 2, data: b"a".to_vec() };
        let auth = self.proof(&id, b"correct horse");
        let payloads = [vec![Payload::IdInitiator(id), auth], more].concat();
        self.ask(pair, ExchangeType::IKE_AUTH, &payloads).expect("an answer")
    }
}

/// The IKE header in front of an Encrypted payload.
fn header_octets(header: &Header, length: usize) -> Vec<u8> {
    let mut out = [header.initiator_spi.to_be_bytes(), header.responder_spi.to_be_bytes()].concat();
    let flags = if header.from_initiator { 0x08 } else { 0 } | if header.response { 0x20 } else { 0 };
    out.extend_from_slice(&[46, 0x20, header.exchange.0, flags]);
    out.extend_from_slice(&header.message_id.to_be_bytes());
    out.extend_from_slice(&u32::try_from(length).unwrap().to_be_bytes());
    out
}

pub(super) fn script(seed: u64, proposals: &str) -> (Pair, Script) {
    let mut pair = pair_with(seed, proposals);
    let mut script = Script::new(&pair.sides[A].engine.ctx.connections[0].proposals, true);
    script.init(&mut pair);
    assert_eq!(script.refused, None);
    (pair, script)
}

fn gone(pair: &Pair) -> bool {
    pair.sides[B].engine.counts() == (0, 0) && pair.sides[B].engine.ctx.jobs.is_empty()
}

// RFC 9242 §3.3.2, RFC 9370 §2.2.2: keys and authentication data by another derivation are the same.
#[test]
fn keys_and_proof_are_as_the_formulas_say() {
    let (mut pair, mut script) = script(320, "aes128gcm16-prfsha256-x25519-ke1_mlkem768-ke3_ecp256");
    assert_eq!(script.suite.unwrap().additional.iter().map(|(n, _)| n).collect::<Vec<_>>(), [1, 3]);
    script.intermediate(&mut pair, Ke::ML_KEM_768);
    script.intermediate(&mut pair, Ke::ECP_256);
    script.authenticate(&mut pair).unwrap();
    assert_eq!(pair.sides[B].up().len(), 1);
}

// RFC 9242 §3.3.2: a proof without the exchanges is none.
#[test]
fn a_proof_that_leaves_the_intermediate_exchanges_out_is_refused() {
    let (mut pair, mut script) = script(321, HYBRID);
    script.forgets_intermediate = true;
    script.intermediate(&mut pair, Ke::ML_KEM_768);
    assert_eq!(script.authenticate(&mut pair), Err(NotifyType::AUTHENTICATION_FAILED));
    assert!(gone(&pair));
}

// RFC 9370 §2.2.2: additional key exchanges may not be skipped.
#[test]
fn ike_auth_before_an_additional_key_exchange_is_refused() {
    let (mut pair, mut script) = script(322, HYBRID);
    assert_eq!(script.authenticate(&mut pair), Err(NotifyType::INVALID_SYNTAX));
    assert!(gone(&pair));
    let (mut pair, mut script) = self::script(323, "aes128gcm16-prfsha256-x25519-ke1_mlkem768-ke2_ecp256");
    script.intermediate(&mut pair, Ke::ML_KEM_768);
    assert_eq!(script.authenticate(&mut pair), Err(NotifyType::INVALID_SYNTAX));
    assert!(gone(&pair));
}

// RFC 9370 §2.2.2 with what must not come in place of the key exchange that is due.
#[test]
fn an_intermediate_exchange_without_its_key_exchange_is_refused() {
    let ecp = || KeyExchange::generate(Ke::ECP_256, &mut TestRng(7)).unwrap().public().to_vec();
    let wrong: [Vec<Payload>; 6] = [
        Vec::new(),
        vec![notify(NotifyType::INITIAL_CONTACT, Vec::new())],
        vec![Payload::Ke { group: Ke::ECP_256, data: ecp() }],
        vec![Payload::Ke { group: Ke::ML_KEM_768, data: Vec::new() }],
        vec![Payload::Ke { group: Ke::ML_KEM_768, data: vec![0xff; 1184] }],
        vec![Payload::Ke { group: Ke::ML_KEM_768, data: vec![0; 1183] }],
    ];
    for payloads in wrong {
        let (mut pair, mut script) = script(324, HYBRID);
        let answer = script.ask(&mut pair, ExchangeType::IKE_INTERMEDIATE, &payloads).expect("an answer");
        assert!(answer.has(NotifyType::INVALID_SYNTAX), "{payloads:?}");
        assert!(gone(&pair));
    }
}

// RFC 9242 §5: as many as were agreed on, and no more.
#[test]
fn an_intermediate_exchange_too_many_is_ignored() {
    let (mut pair, mut script) = script(325, HYBRID);
    script.intermediate(&mut pair, Ke::ML_KEM_768);
    let before = pair.snapshot(B);
    let data = KeyExchange::generate(Ke::ML_KEM_768, &mut TestRng(7)).unwrap().public().to_vec();
    let again = [Payload::Ke { group: Ke::ML_KEM_768, data }];
    assert!(script.ask(&mut pair, ExchangeType::IKE_INTERMEDIATE, &again).is_none());
    assert_eq!(before, pair.snapshot(B));
    // Without negotiation the first is one too many.
    let (mut pair, mut script) = self::script(326, "aes128gcm16-prfsha256-x25519");
    assert!(script.ask(&mut pair, ExchangeType::IKE_INTERMEDIATE, &[]).is_none());
    assert_eq!(pair.sides[B].engine.counts(), (1, 1));
}

// RFC 7296 §1.2, CVE-2026-78135: before authentication there are no other exchanges.
#[test]
fn other_exchanges_between_key_exchanges_change_nothing() {
    for exchange in [ExchangeType::CREATE_CHILD_SA, ExchangeType::INFORMATIONAL, ExchangeType::IKE_FOLLOWUP_KE] {
        let (mut pair, mut script) = script(327, HYBRID);
        let before = pair.snapshot(B);
        let delete = [Payload::Delete { protocol: Protocol::IKE, spis: Vec::new() }];
        assert!(script.ask(&mut pair, exchange, &delete).is_none());
        assert_eq!(before, pair.snapshot(B));
        assert_eq!(pair.sides[B].engine.counts(), (1, 1));
    }
}

// RFC 7296 §2.1, RFC 9242 §3.3.1: a repetition under the old keys gets the same octets after the keys changed.
#[test]
fn a_repeated_intermediate_request_gets_the_same_answer() {
    let (mut pair, mut script) = script(328, HYBRID);
    let before = pair.sides[B].sent.len();
    script.intermediate(&mut pair, Ke::ML_KEM_768);
    let answers: Vec<Vec<u8>> = pair.sides[B].sent[before..].iter().map(|sent| sent.bytes.clone()).collect();
    assert!(script.last.len() > 1, "in fragments");
    // RFC 7383 §2.6.1: on the first fragment only.
    assert_eq!(tell(&mut pair, &script.last[0].clone()), answers);
    assert!(tell(&mut pair, &script.last[1].clone()).is_empty());
    script.authenticate(&mut pair).unwrap();
}

// RFC 7296 §2.6: a stranger makes us answer, and compute no secret before it shows that it has the answer.
#[test]
fn the_shared_secret_is_computed_on_the_first_protected_message() {
    let mut pair = Pair::new(330);
    pair.key_delay = Duration::from_millis(50);
    pair.initiate(A, 1);
    pair.run(Duration::from_millis(500));
    let done = |pair: &Pair| pair.sides[A].done(1);
    assert!(done(&pair));
    // Only the responder's side, with an initiator that does not go on.
    let mut pair = Pair::new(331);
    pair.key_delay = Duration::from_millis(50);
    let mut script = Script::new(&pair.sides[A].engine.ctx.connections[0].proposals, false);
    script.init(&mut pair);
    assert!(pair.sides[B].engine.ctx.jobs.is_empty(), "nothing to do until it speaks again");
    // Junk starts the computation once, and changes nothing else; the real message is then read.
    let spis = script.channel.as_ref().unwrap().spis;
    let header = Header {
        initiator_spi: spis.initiator,
        responder_spi: spis.responder,
        major: 2,
        minor: 0,
        exchange: ExchangeType::IKE_AUTH,
        from_initiator: true,
        response: false,
        message_id: 1,
    };
    let mut junk = header_octets(&header, 28 + 4 + 60);
    junk.extend_from_slice(&[35, 0, 0, 64]);
    junk.extend_from_slice(&[7; 60]);
    let now = pair.now;
    for _ in 0..100 {
        pair.sides[B].engine.handle_message(now, path_to_b(), &junk);
    }
    assert_eq!(pair.sides[B].engine.ctx.jobs.len(), 1);
    pair.drain(B);
    pair.run(seconds(1));
    script.authenticate(&mut pair).unwrap();
    assert_eq!(pair.sides[B].up().len(), 1);
}

// A job's answer for an IKE SA that is gone is dropped, on either side.
#[test]
fn key_exchanges_of_ike_sas_that_are_gone_are_dropped() {
    for side in [A, B] {
        for step in 0..30 {
            let mut pair = pair_with(340, HYBRID);
            pair.key_delay = Duration::from_millis(40);
            pair.initiate(A, 1);
            pair.run(Duration::from_millis(10 * step));
            let now = pair.now;
            for status in pair.sides[side].engine.ike_sas(now) {
                pair.sides[side].engine.terminate(now, Target::Ike(status.id), true, 7).unwrap();
            }
            pair.cut = true;
            pair.deliveries.retain(|_, delivery| !matches!(delivery, Delivery::Message { .. }));
            pair.run(seconds(400));
            assert!(pair.sides[side].engine.sas.is_empty());
            let here = &pair.sides[side];
            assert!(here.engine.ctx.jobs.is_empty() && here.engine.ctx.child_spis.is_empty());
            assert!(here.engine.ctx.own_spis() == 0 && here.installed.is_empty());
        }
    }
}

// FIPS 203 §7.2, RFC 6989 §2: an initiator's public value that fails its checks gets INVALID_SYNTAX and no state.
#[test]
fn a_public_value_that_is_none_gets_invalid_syntax_in_ike_sa_init() {
    let proposals = "aes128gcm16-prfsha256-mlkem512-ecp256-modp2048";
    for (group, data) in [
        (Ke::ML_KEM_512, vec![0xff; 800]),
        (Ke::ML_KEM_512, vec![0; 799]),
        (Ke::ECP_256, vec![1; 64]),
        (Ke::ECP_256, vec![1; 63]),
        (Ke::MODP_2048, vec![0xff; 256]),
        (Ke::MODP_2048, vec![0; 256]),
    ] {
        let mut pair = pair_with(350, proposals);
        pair.initiate(A, 1);
        let Ok(Incoming::Plain(mut message)) = wire::parse(&pair.sides[A].sent[0].bytes) else { panic!("plain") };
        for payload in &mut message.payloads {
            if let Payload::Ke { group: method, data: public } = payload {
                (*method, *public) = (group, data.clone());
            }
        }
        pair.deliveries.clear();
        let answers = tell(&mut pair, &wire::encode(&message));
        let answer = payloads(&answers[0]);
        assert!(matches!(&answer[..], [Payload::Notify(n)] if n.kind == NotifyType::INVALID_SYNTAX), "{group:?}");
        assert!(gone(&pair));
    }
}

/// What a responder answers to an initiator, changed on the way: the initiator fails, and nothing is left.
fn initiator_fails(seed: u64, change: impl Fn(&mut Message) -> bool) -> String {
    let mut pair = pair_with(seed, HYBRID);
    pair.initiate(A, 1);
    // As long as the initiator waits for a better answer.
    for _ in 0..15_000 {
        pair.run(Duration::from_millis(1));
        for delivery in pair.deliveries.values_mut() {
            if let Delivery::Message { to: A, bytes, .. } = delivery
                && let Ok(Incoming::Plain(mut message)) = wire::parse(bytes)
                && change(&mut message)
            {
                *bytes = wire::encode(&message);
            }
        }
    }
    pair.run(seconds(200));
    assert!(pair.sides[A].engine.sas.is_empty() && pair.sides[A].installed.is_empty());
    pair.sides[A].failed(1).unwrap()
}

// RFC 9370 §2.2.1: a responder that chose additional key exchanges has to have the exchange for them.
#[test]
fn additional_key_exchanges_without_the_exchange_for_them_fail() {
    let reason = initiator_fails(360, |message| {
        let before = message.payloads.len();
        message.payloads.retain(
            |payload| !matches!(payload, Payload::Notify(n) if n.kind == NotifyType::INTERMEDIATE_EXCHANGE_SUPPORTED),
        );
        message.payloads.len() != before
    });
    assert_eq!(reason, "the peer chose what we did not offer");
}

/// An initiator whose peer gave this IKE_INTERMEDIATE answer, by hand.
fn answered(payloads: &[Payload]) -> Pair {
    let mut pair = pair_with(361, HYBRID);
    pair.key_delay = Duration::from_millis(200);
    pair.initiate(A, 1);
    let mut answer = None;
    for _ in 0..2000 {
        pair.run(Duration::from_millis(1));
        // While B makes its answer, we give another one for it, with B's keys.
        let slot = pair.sides[B].engine.sas.values_mut().next();
        if let Some(IkeSa::ResponderIntermediate(sa)) = slot.map(|slot| &mut slot.sa) {
            answer = sa.channel_mut().and_then(|channel| channel.respond(payloads, None, &mut TestRng(3)));
        }
        if answer.is_some() {
            break;
        }
    }
    let path = Path {
        local: SocketAddr::new(address(A), 500),
        remote: SocketAddr::new(address(B), 500),
        transport: Transport::Udp,
    };
    pair.cut = true;
    pair.deliveries.clear();
    let now = pair.now;
    pair.sides[A].engine.handle_message(now, path, &answer.unwrap()[0]);
    pair.drain(A);
    pair.run(seconds(1));
    pair
}

/// Why the initiator does not take such an answer.
fn wrong_answer(payloads: &[Payload]) -> String {
    let pair = answered(payloads);
    assert!(pair.sides[A].engine.sas.is_empty());
    pair.sides[A].failed(1).unwrap()
}

// RFC 9593 §3.1: a list that did not fit into the answer to IKE_SA_INIT.
#[test]
fn announcements_in_ike_intermediate_are_read() {
    let announced = |data: Vec<u8>| {
        let ke = Payload::Ke { group: Ke::ML_KEM_768, data: vec![7; 1088] };
        let pair = answered(&[ke, notify(NotifyType::SUPPORTED_AUTH_METHODS, data)]);
        let slot = pair.sides[A].engine.sas.values().next().map(|slot| &slot.sa);
        let Some(IkeSa::InitiatorAuth(sa)) = slot else { panic!("IKE_AUTH comes next") };
        sa.announced().map(<[_]>::to_vec)
    };
    let (ecdsa, psk) = (vec![3, 9, 0], vec![2, 2]);
    let of = |data: &[u8]| pad::AuthAnnouncement::parse_all(data);
    assert_eq!(announced([ecdsa.clone(), psk.clone()].concat()), of(&[ecdsa, psk].concat()));
    // What is none, or says nothing, leaves what IKE_SA_INIT said.
    let before = announced(Vec::new());
    assert!(before.is_some());
    assert_eq!(announced(vec![9, 9]), before);
}

// RFC 9242 §3.4: errors in the exchange end it, before anything came up.
#[test]
fn an_initiator_takes_no_other_answer_than_the_key_exchange_that_is_due() {
    let lacks = "the IKE_INTERMEDIATE response lacks the key exchange that was asked for";
    assert_eq!(wrong_answer(&[]), lacks);
    assert_eq!(wrong_answer(&[Payload::Ke { group: Ke::X25519, data: vec![9; 32] }]), lacks);
    let short = wrong_answer(&[Payload::Ke { group: Ke::ML_KEM_768, data: vec![0; 1087] }]);
    assert_eq!(short, "the peer's public value is not acceptable");
    let error = wrong_answer(&[notify(NotifyType::NO_PROPOSAL_CHOSEN, Vec::new())]);
    assert_eq!(error, "received NO_PROPOSAL_CHOSEN notify error");
    let twice = Payload::Ke { group: Ke::ML_KEM_768, data: vec![0; 1088] };
    assert!(wrong_answer(&[twice.clone(), twice]).contains("more than one KE payload"));
}

// Whatever an attacker without keys changes or replays, the IKE SA comes up or it does not; never half.
#[test]
fn mutation_under_way_never_gives_half_an_sa_of_several_key_exchanges() {
    for seed in 0..40 {
        let mut pair = pair_with(400 + seed, HYBRID);
        pair.key_delay = Duration::from_millis(seed % 4 * 20);
        pair.initiate(A, 1);
        for _ in 0..300 {
            pair.run(Duration::from_millis(500));
            let keys: Vec<_> = pair.deliveries.keys().copied().collect();
            for key in keys {
                if pair.rng.percent(20)
                    && let Some(Delivery::Message { bytes, .. }) = pair.deliveries.get_mut(&key)
                {
                    let at = pair.rng.below(bytes.len() as u64) as usize;
                    bytes[at] ^= 1 << pair.rng.below(8);
                }
            }
        }
        if pair.sides[A].done(1) {
            pair.assert_same(1, 1);
        } else {
            assert!(pair.sides[A].installed.is_empty() && pair.sides[B].installed.is_empty());
        }
    }
}
