//! EAP (RFC 7296 §2.16, §3.16): who comes up by it, and what must never take the place of its proof.

use pad::{EapMethod, EapPeer, EapPeerStep, Proof};
use rcgen::{CertifiedIssuer, KeyPair};

use super::intermediate::Script;
use super::signatures::{authority, holder};
use super::*;
use crate::sa::fault::notify;
use crate::sa::parts::Parts;
use crate::wire::{Identification, NotifyType, Payload};

const EAP: AuthClass = AuthClass::Eap(EapMethod::MsChapV2);

/// Adds this user's password.
fn with_password(mut credentials: Credentials, user: &str, password: &str) -> Credentials {
    let owners = vec![IdentityPattern::exact(id(user))];
    credentials.add_eap_secret(Some(user.to_owned()), owners, Secret::new(password.into())).unwrap();
    credentials
}

/// A says that it is `a` in IKE and `carol` in EAP; B asks everybody who they are there.
fn client() -> Connection {
    let mut connection = connection(A);
    connection.local_auth.class = EAP;
    connection.local_auth.eap_id = Some(Box::new(id("carol")));
    connection.remote.class = AuthClass::PublicKey;
    connection
}

fn gateway() -> Connection {
    let mut connection = connection(B);
    connection.local_auth.class = AuthClass::PublicKey;
    connection.remote.class = EAP;
    connection.remote.remote_id = IdentityPattern::any();
    connection.remote.eap_id = Some(IdentityPattern::any());
    connection
}

fn issued(issuer: &CertifiedIssuer<'static, KeyPair>) -> Credentials {
    with_password(holder("b", issuer, &[&rcgen::PKCS_ECDSA_P256_SHA256]), "carol", "right")
}

fn pair_of(seed: u64, client: Connection, gateway: Connection) -> Pair {
    let mut pair = Pair::with(seed, EngineConfig::default(), client, gateway);
    let issuer = authority();
    pair.sides[A].credentials = with_password(holder("a", &issuer, &[]), "carol", "right");
    pair.sides[B].credentials = issued(&issuer);
    for side in [A, B] {
        let hashes = pair.sides[side].credentials.authority_hashes();
        pair.sides[side].engine.set_authority_hashes(hashes);
    }
    pair
}

fn pair(seed: u64) -> Pair {
    pair_of(seed, client(), gateway())
}

fn assert_nothing(pair: &mut Pair) {
    pair.run(seconds(200));
    for side in [A, B] {
        assert!(pair.sides[side].up().is_empty() && pair.sides[side].installed.is_empty());
        assert_eq!(pair.sides[side].engine.counts(), (0, 0));
        assert!(
            pair.sides[side].engine.ctx.jobs.is_empty() && pair.sides[side].engine.ctx.shared.peers.all().is_empty()
        );
    }
}

// §2.16: the whole exchange, and whom each side has found the other to be: the gateway by its certificate, the client by what it
// proved, which is not what it said in IKE.
#[test]
fn a_client_proves_itself_by_a_password_to_a_gateway_with_a_certificate() {
    let pair = established(pair(1201));
    let [at_a, at_b] = [A, B].map(|side| pair.sides[side].only());
    let (of_b, of_a) = (at_a.peer.unwrap(), at_b.peer.unwrap());
    assert!(matches!(&of_b.proof, Proof::Certificate { .. }) && of_b.id == id("b") && of_b.local_id == id("a"));
    assert_eq!((&of_a.id, &of_a.local_id, of_a.entry.as_str()), (&id("carol"), &id("b"), "site"));
    assert_eq!(of_a.proof, Proof::Eap { method: EapMethod::MsChapV2, ike_id: id("a") });
    assert_eq!(at_b.remote_id, Some(id("a")));
    // RFC 5929: both have the same binding, over what both said.
    let bindings = [A, B].map(|side| pair.sides[side].bindings.clone());
    assert!(bindings[A][0].is_some() && bindings[A] == bindings[B]);
    assert_eq!(pair.sides[B].endpoint_keys, [None]);
}

// §2.16, §3.16: without `eap_id` nobody is asked, and what is said in IKE is what has to be proved.
#[test]
fn the_ike_identity_is_proved_where_no_other_is_asked_for() {
    let mut client = client();
    client.local_id = Some(id("carol"));
    client.local_auth.eap_id = None;
    let mut gateway = gateway();
    gateway.remote.eap_id = None;
    let pair = established(pair_of(1202, client.clone(), gateway.clone()));
    assert_eq!(pair.sides[B].only().peer.unwrap().id, id("carol"));
    assert!(!pair.sides[B].logged("received EAP identity"));
    // Carol's password does not make her dave.
    client.local_id = Some(id("dave"));
    client.local_auth.eap_id = Some(Box::new(id("carol")));
    let mut pair = pair_of(1203, client, gateway);
    pair.initiate(A, 1);
    pair.run(seconds(5));
    assert!(pair.sides[A].failed(1).is_some());
    assert_nothing(&mut pair);
}

// RFC 2759 §6: a wrong password, a user that there is not.
#[test]
fn a_wrong_password_and_an_unknown_user_get_nobody_in() {
    for (user, password, why) in [("carol", "wrong", "password is wrong"), ("dave", "right", "no EAP secret")] {
        let mut client = client();
        client.local_auth.eap_id = Some(Box::new(id(user)));
        let mut pair = pair_of(1204, client, gateway());
        pair.sides[A].credentials = with_password(pair.sides[A].credentials.clone(), user, password);
        pair.initiate(A, 1);
        pair.run(seconds(5));
        let reason = pair.sides[A].failed(1).expect("a failure");
        assert!(reason.contains("user name or password is wrong"), "{reason}");
        assert!(pair.sides[B].logged(why));
        assert_nothing(&mut pair);
    }
}

/// A scripted client with the keys of its IKE SA, which does what it likes.
struct Client {
    pair: Pair,
    script: Script,
    id: Identification,
    credentials: Credentials,
    eap: Option<EapPeer>,
    /// The gateway's last EAP packet.
    packet: Vec<u8>,
    msk: Vec<u8>,
}

impl Client {
    /// After IKE_SA_INIT.
    fn new(seed: u64, gateway: Connection, ike: &str) -> Self {
        let mut pair = pair_of(seed, client(), gateway);
        pair.job_delay = Duration::ZERO;
        let mut script = Script::new(&pair.sides[A].engine.ctx.connections[0].proposals, true);
        script.init(&mut pair);
        let credentials = pair.sides[A].credentials.clone();
        let id = Identification { kind: 2, data: ike.as_bytes().to_vec() };
        let eap = Some(EapPeer::new(EapMethod::MsChapV2, super::id("carol"), super::id("b"), [5; 16]));
        Self { pair, script, id, credentials, eap, packet: Vec::new(), msk: Vec::new() }
    }

    fn say(&mut self, payloads: &[Payload]) -> Option<Parts> {
        let answer = self.script.ask(&mut self.pair, ExchangeType::IKE_AUTH, payloads)?;
        self.packet = answer.eap.clone().unwrap_or_default();
        Some(answer)
    }

    /// The first request, with all but AUTH.
    fn hello(&mut self) -> Parts {
        let more = [notify(NotifyType::INITIAL_CONTACT, Vec::new())];
        let payloads = [vec![Payload::IdInitiator(self.id.clone())], more.to_vec()].concat();
        self.say(&payloads).expect("an answer")
    }

    /// The right answer to the gateway's last packet.
    fn right(&mut self) -> Vec<Payload> {
        match self.credentials.eap_peer(self.eap.take().unwrap(), &self.packet) {
            EapPeerStep::Answer(eap, packet) => {
                self.eap = Some(eap);
                vec![Payload::Eap(packet)]
            }
            EapPeerStep::Succeeded(msk) => {
                self.msk = msk.expose().to_vec();
                vec![self.script.proof(&self.id, &self.msk)]
            }
            EapPeerStep::Failed(reason) => panic!("{reason}"),
        }
    }

    /// Comes to a stage: 1 was asked for its identity, 2 has the challenge, 3 the gateway's proof of the password, 4
    /// EAP-Success, 5 is up.
    fn at(seed: u64, stage: usize) -> Self {
        let mut client = Self::new(seed, gateway(), "a");
        client.hello();
        for _ in 1..stage {
            let right = client.right();
            client.say(&right).expect("an answer");
        }
        client
    }

    /// True when the answer says no, and nothing is left.
    fn is_out(&mut self, answer: Option<Parts>) -> bool {
        let refused = answer.is_some_and(|parts| {
            let failure = parts.eap.as_ref().is_some_and(|packet| packet.len() == 4 && packet[0] == 4);
            failure || parts.has(NotifyType::AUTHENTICATION_FAILED) || parts.has(NotifyType::INVALID_SYNTAX)
        });
        let side = &self.pair.sides[B];
        refused && side.engine.counts() == (0, 0) && side.installed.is_empty() && side.engine.ctx.jobs.is_empty()
    }
}

fn eap(octets: &[u8]) -> Payload {
    Payload::Eap(octets.to_vec())
}

// §2.16: who does it right is up after the fifth stage, and not before.
#[test]
fn nobody_is_up_before_the_proof_by_the_key() {
    for stage in 1..=5 {
        let client = Client::at(1210, stage);
        assert_eq!(client.pair.sides[B].up().len(), usize::from(stage == 5), "{stage}");
        assert_eq!(client.pair.sides[B].engine.ctx.shared.peers.all().len(), usize::from(stage == 5));
    }
}

// §2.16, §3.16, CVE-2021-45079: at each stage each packet that is not the one of its turn ends the attempt.
#[test]
fn whatever_comes_out_of_turn_at_any_stage_authenticates_nobody() {
    let code = |code| eap(&[code, 0, 0, 4]);
    let id = || Payload::IdInitiator(Identification { kind: 2, data: b"carol".to_vec() });
    let zeros = |method| Payload::Auth { method, data: vec![0; 32] };
    let wrong: Vec<Vec<Payload>> = vec![
        vec![],
        vec![code(3)],
        vec![code(4)],
        vec![code(1)],
        vec![code(2)],
        vec![eap(&[])],
        vec![eap(&[2, 0, 0])],
        vec![eap(&[2, 0, 0xff, 0xff, 26])],
        vec![eap(&[2, 0, 0, 6, 26, 3])],
        vec![eap(&[2, 0, 0, 6, 3, 13])],
        vec![eap(&[2, 0, 0, 5, 1])],
        vec![Payload::Eap([&[2, 0, 0x20, 0, 26][..], &[0; 8187]].concat())],
        vec![code(3), code(3)],
        vec![zeros(2)],
        vec![zeros(13)],
        vec![zeros(14)],
        vec![code(3), zeros(2)],
        vec![id(), zeros(2)],
        vec![id()],
        vec![notify(NotifyType::INITIAL_CONTACT, Vec::new())],
    ];
    for stage in 1..=4 {
        for payloads in &wrong {
            let mut client = Client::at(1220, stage);
            let answer = client.say(payloads);
            assert!(client.is_out(answer), "{stage}: {payloads:?}");
        }
    }
}

// §2.15, §2.16: AUTH is by the key of the method: not by SK_pi, which everybody has, not by a shared key of IKE, not by nothing;
// and over what was said in this IKE SA. With the right packet and AUTH in one message it is too early.
#[test]
fn a_proof_by_another_key_or_of_another_ike_sa_is_none() {
    let sk_pi = |client: &Client| client.script.channel.as_ref().unwrap().pi.expose().to_vec();
    let keys: [fn(&Client) -> Vec<u8>; 5] = [
        |_| Vec::new(),
        |_| vec![0; 64],
        |_| b"correct horse".to_vec(),
        // HMAC does not see the zeros at the end.
        |client| client.msk[..31].to_vec(),
        |client| client.script.channel.as_ref().unwrap().pr.expose().to_vec(),
    ];
    for key in keys {
        let mut client = Client::at(1230, 4);
        let _right = client.right();
        let key = key(&client);
        let proof = client.script.proof(&client.id, &key);
        let answer = client.say(&[proof]);
        assert!(client.is_out(answer));
    }
    let mut client = Client::at(1231, 4);
    client.right();
    let own = sk_pi(&client);
    let proof = client.script.proof(&client.id, &own);
    let answer = client.say(&[proof]);
    assert!(client.is_out(answer));
    // Another identity, the right octets under another method, and the right ones cut short.
    let changes: [fn(Payload) -> Payload; 3] = [
        |_| Payload::Auth { method: 2, data: Vec::new() },
        |auth| match auth {
            Payload::Auth { data, .. } => Payload::Auth { method: 13, data },
            other => other,
        },
        |auth| match auth {
            Payload::Auth { method, data } => Payload::Auth { method, data: data[..31].to_vec() },
            other => other,
        },
    ];
    for change in changes {
        let mut client = Client::at(1232, 4);
        let right = change(client.right().remove(0));
        let answer = client.say(&[right]);
        assert!(client.is_out(answer));
    }
    let mut client = Client::at(1233, 4);
    client.right();
    let msk = client.msk.clone();
    let proof = client.script.proof(&Identification { kind: 2, data: b"carol".to_vec() }, &msk);
    let answer = client.say(&[proof]);
    assert!(client.is_out(answer));
    for stage in 1..4 {
        let mut client = Client::at(1234, stage);
        let mut both = client.right();
        both.push(client.script.proof(&client.id, &[0; 64]));
        let answer = client.say(&both);
        assert!(client.is_out(answer), "{stage}");
    }
}

// [EAPMITM], RFC 7296 §2.16, §5: somebody in the middle takes a client's answers to a gateway of its own choice through another
// IKE SA. It has no MSK, and the client's AUTH is over the client's IKE SA.
#[test]
fn answers_of_another_ike_sa_do_not_help_who_passes_them_on() {
    let mut middle = Client::at(1240, 4);
    middle.right();
    // The client's own proof, made of its IKE SA with the one in the middle: the same key, another exchange.
    let mut other = Client::at(1241, 4);
    other.right();
    let of_the_client = other.script.proof(&other.id, &middle.msk);
    let answer = middle.say(&[of_the_client]);
    assert!(middle.is_out(answer));
}

// §2.1, §2.2: requests are repeated by IKE, each with the next message ID, and a repetition gets the same octets.
#[test]
fn a_repeated_request_gets_the_same_answer_and_moves_nothing() {
    for stage in 1..=4 {
        let mut client = Client::at(1250, stage);
        let last = client.script.last.clone();
        let before = client.pair.sides[B].sent.len();
        let first: Vec<Vec<u8>> =
            client.pair.sides[B].sent[before - 1..].iter().map(|sent| sent.bytes.clone()).collect();
        for datagram in &last {
            let again = super::intermediate::tell(&mut client.pair, datagram);
            assert!(again.last() == first.last(), "{stage}");
        }
        // And goes on as if nothing had been.
        for _ in stage..5 {
            let right = client.right();
            client.say(&right).expect("an answer");
        }
        assert_eq!(client.pair.sides[B].up().len(), 1);
    }
}

// §1.4, §2.21.2: nothing but IKE_AUTH is read before the proof, and who stops midway is forgotten.
#[test]
fn other_exchanges_and_silence_in_the_middle_give_nothing() {
    for stage in 1..=4 {
        for exchange in [ExchangeType::CREATE_CHILD_SA, ExchangeType::INFORMATIONAL, ExchangeType::IKE_INTERMEDIATE] {
            let mut client = Client::at(1260, stage);
            let payloads = [Payload::Delete { protocol: Protocol::IKE, spis: Vec::new() }];
            assert!(client.script.ask(&mut client.pair, exchange, &payloads).is_none());
            assert_eq!(client.pair.sides[B].engine.counts().1, 1, "it is half-open");
            assert!(client.pair.sides[B].up().is_empty());
        }
        let mut client = Client::at(1261, stage);
        client.pair.run(seconds(31));
        assert_eq!(client.pair.sides[B].engine.counts(), (0, 0));
        assert!(client.pair.sides[B].down(CloseReason::Timeout));
    }
}

/// Another connection of the gateway's, beside the one that takes everybody.
fn named(name: &str, change: impl FnOnce(&mut Connection)) -> Arc<Connection> {
    let mut connection = gateway();
    connection.name = name.to_owned();
    connection.remote.name = name.to_owned();
    change(&mut connection);
    Arc::new(connection)
}

fn comes_up_as(client: Connection, gateways: Vec<Arc<Connection>>) -> Option<String> {
    let mut pair = pair_of(1270, client, gateway());
    pair.sides[B].engine.set_connections(gateways);
    pair.initiate(A, 1);
    pair.run(seconds(5));
    let up = pair.sides[B].up();
    assert_eq!(up.is_empty(), pair.sides[A].failed(1).is_some());
    up.first().map(|sa| sa.peer.as_ref().unwrap().entry.clone())
}

// RFC 4301 §4.4.3: the connection that names the EAP identity most narrowly is the one; where it wants another proof, EAP of a wider
// one is no way around it. What is said in IKE beside it must not be somebody else's name.
#[test]
fn the_narrowest_connection_says_how_an_eap_identity_is_proved() {
    let everybody = || named("everybody", |_| ());
    let of_carol = |connection: &mut Connection| {
        connection.remote.eap_id = Some(IdentityPattern::exact(id("carol")));
    };
    assert_eq!(comes_up_as(client(), vec![everybody(), named("carol", of_carol)]).as_deref(), Some("carol"));
    let of_dave = |connection: &mut Connection| connection.remote.eap_id = Some(IdentityPattern::exact(id("dave")));
    assert_eq!(comes_up_as(client(), vec![named("dave", of_dave), everybody()]).as_deref(), Some("everybody"));
    assert_eq!(comes_up_as(client(), vec![named("dave", of_dave)]), None);
    // At other addresses, where the peer cannot come from: carol is proved by a certificate.
    let certified = |connection: &mut Connection| {
        connection.remote.class = AuthClass::PublicKey;
        connection.remote.eap_id = None;
        connection.remote.remote_id = IdentityPattern::exact(id("carol"));
        connection.remote_addrs = vec![AddressRange::host("192.0.2.99".parse().unwrap())];
    };
    assert_eq!(comes_up_as(client(), vec![everybody(), named("certified", certified)]), None);
    // `a`, which carol says she is in IKE, is somebody with a certificate.
    let of_a = |connection: &mut Connection| {
        certified(connection);
        connection.remote.remote_id = IdentityPattern::exact(id("a"));
    };
    assert_eq!(comes_up_as(client(), vec![everybody(), named("a", of_a)]), None);
    // Who says in IKE the name that it proves in EAP, and has a connection of its own.
    let same = || {
        let mut client = client();
        client.local_id = Some(id("carol"));
        client
    };
    assert_eq!(comes_up_as(same(), vec![everybody(), named("carol", of_carol)]).as_deref(), Some("carol"));
    let by_both = |connection: &mut Connection| connection.remote.remote_id = IdentityPattern::exact(id("carol"));
    assert_eq!(comes_up_as(same(), vec![everybody(), named("both", by_both)]).as_deref(), Some("both"));
    // A certificate is no way around a connection that has carol prove herself by EAP, or the other way round.
    let mut by_certificate = same();
    by_certificate.local_auth = connection(A).local_auth;
    by_certificate.remote.class = AuthClass::SharedKey;
    let any = named("any", |connection| {
        connection.local_auth.class = AuthClass::SharedKey;
        connection.remote.class = AuthClass::SharedKey;
    });
    assert_eq!(comes_up_as(by_certificate, vec![any, named("carol", of_carol)]), None);
}

// RFC 4301 §4.4.3: a gateway may take some by EAP and others by another proof, each by its own.
#[test]
fn a_gateway_takes_users_by_eap_and_others_by_another_proof() {
    let shared = || {
        named("shared", |connection| {
            connection.local_auth.class = AuthClass::SharedKey;
            connection.remote.class = AuthClass::SharedKey;
            connection.remote.eap_id = None;
        })
    };
    let mut by_shared_key = connection(A);
    by_shared_key.remote.remote_id = IdentityPattern::any();
    for order in [vec![named("eap", |_| ()), shared()], vec![shared(), named("eap", |_| ())]] {
        assert_eq!(comes_up_as(client(), order.clone()).as_deref(), Some("eap"));
        let mut pair = pair_of(1275, by_shared_key.clone(), gateway());
        for side in [A, B] {
            let secret = Secret::new(b"correct horse".to_vec());
            pair.sides[side].credentials.add_shared_secret(None, Vec::new(), secret).unwrap();
        }
        pair.sides[B].engine.set_connections(order);
        let pair = established(pair);
        assert_eq!(pair.sides[B].only().peer.unwrap().entry, "shared");
    }
}

// §2.16: EAP goes with a public key of the responder's, whatever is configured; and where EAP is configured, nothing else does.
#[test]
fn eap_goes_with_a_public_key_of_the_responder_only() {
    for class in [AuthClass::SharedKey, AuthClass::Null, EAP] {
        let mut shared = gateway();
        shared.local_auth.class = class;
        let mut client = Client::new(1280, shared, "a");
        let answer = client.hello();
        assert!(client.is_out(Some(answer)));
        let mut of_client = super::eap::client();
        of_client.remote.class = class;
        let mut pair = pair_of(1281, of_client, gateway());
        pair.initiate(A, 1);
        pair.run(seconds(5));
        assert!(pair.sides[A].failed(1).unwrap().contains("EAP needs a gateway with a public key"));
    }
    // A shared key of IKE for everybody does not stand in for EAP.
    let mut client = Client::new(1282, gateway(), "a");
    client.pair.sides[B]
        .credentials
        .add_shared_secret(None, Vec::new(), Secret::new(b"correct horse".to_vec()))
        .unwrap();
    let answer = client.script.authenticate_and_say(&mut client.pair, Vec::new());
    assert!(client.is_out(Some(answer)));
}

// What was removed or changed while EAP went on admits nobody.
#[test]
fn a_connection_that_has_changed_meanwhile_admits_nobody() {
    let changed: [fn() -> Vec<Arc<Connection>>; 3] = [
        Vec::new,
        || {
            let mut connection = gateway();
            connection.remote.eap_id = Some(IdentityPattern::exact(id("dave")));
            vec![Arc::new(connection)]
        },
        || {
            let more = |connection: &mut Connection| {
                connection.remote.class = AuthClass::PublicKey;
                connection.remote.eap_id = None;
                connection.remote.remote_id = IdentityPattern::exact(id("carol"));
            };
            vec![Arc::new(gateway()), named("more", more)]
        },
    ];
    for connections in changed {
        let mut client = Client::at(1290, 4);
        client.pair.sides[B].engine.set_connections(connections());
        let right = client.right();
        let answer = client.say(&right);
        assert!(client.is_out(answer));
    }
}

// §2.4: `unique` and INITIAL_CONTACT go by what was proved: dave does not end carol's IKE SA by saying the same in IKE.
#[test]
fn uniqueness_goes_by_the_eap_identity() {
    for (user, left) in [("carol", 1), ("dave", 2)] {
        let mut gateway = gateway();
        gateway.unique = Unique::Replace;
        let mut pair = established(pair_of(1300, client(), gateway));
        for side in [A, B] {
            pair.sides[side].credentials = with_password(pair.sides[side].credentials.clone(), "dave", "other");
        }
        let mut again = client();
        again.name = "again".to_owned();
        again.remote.name = "again".to_owned();
        again.local_auth.eap_id = Some(Box::new(id(user)));
        let again = Arc::new(again);
        let child = again.children.first().cloned();
        pair.sides[A].engine.set_connections(vec![Arc::new(client()), Arc::clone(&again)]);
        pair.initiate_child(A, again, child, 2);
        pair.run(seconds(10));
        assert!(pair.sides[A].done(2), "{user}");
        assert_eq!(pair.sides[B].up().len(), left, "{user}");
    }
}

/// A pair whose messages go by hand, after the gateway's first answer with its proof, and so many more of its answers.
fn by_hand(seed: u64, answers: usize) -> Pair {
    let mut pair = pair(seed);
    pair.job_delay = Duration::ZERO;
    pair = {
        let mut pair = pair.taken_by_hand();
        pair.initiate(A, 1);
        pair.run(Duration::ZERO);
        pair
    };
    for _ in 0..answers {
        pair.pass(A);
        pair.pass(B);
    }
    pair
}

impl Pair {
    /// Somebody with the keys of A's IKE SA answers its request.
    fn answer_a(&mut self, payloads: &[Payload]) {
        let (path, sealed) = match self.sides[A].engine.sas.values().next().map(|slot| &slot.sa) {
            Some(IkeSa::InitiatorAuth(sa)) => {
                let exchange = ExchangeType::IKE_AUTH;
                (sa.core.path, sa.channel.forge(exchange, true, 0, payloads, None, &mut TestRng(9)))
            }
            _ => panic!("A is not in IKE_AUTH"),
        };
        self.let_go();
        self.cut = true;
        let now = self.now;
        self.sides[A].engine.handle_message(now, path, &sealed[0]);
        self.drain(A);
        self.run(Duration::from_millis(1));
    }
}

// §2.16, CVE-2021-45079, as initiator: a gateway that has proved itself still has to know the password, and AUTH has to be by it.
#[test]
fn a_gateway_that_skips_a_step_has_no_ike_sa_with_us() {
    let auth = |method, length| Payload::Auth { method, data: vec![0; length] };
    let success = || eap(&[3, 0, 0, 4]);
    let wrong: Vec<Vec<Payload>> = vec![
        vec![],
        vec![success()],
        vec![success(), auth(2, 32)],
        vec![auth(2, 32)],
        vec![auth(13, 32)],
        vec![eap(&[4, 0, 0, 4])],
        vec![eap(&[1, 0, 0, 4])],
        vec![eap(&[2, 0, 0, 5, 26])],
        vec![eap(&[1, 9, 0, 10, 26, 3, 0, 0, 4, b'S'])],
        vec![notify(NotifyType::AUTHENTICATION_FAILED, Vec::new())],
        vec![id_b(), auth(14, 64)],
    ];
    // With the answers to IKE_SA_INIT and: our identity; our response; our belief in its proof; our AUTH.
    for answers in 2..=5 {
        for payloads in &wrong {
            let mut pair = by_hand(1310, answers);
            assert!(pair.sides[A].up().is_empty());
            pair.answer_a(payloads);
            // EAP-Success is right in its turn, and then nothing is up yet.
            let goes_on = answers == 4 && payloads.first() == Some(&success());
            assert_eq!(pair.sides[A].failed(1).is_none(), goes_on, "{answers}: {payloads:?}");
            assert!(pair.sides[A].up().is_empty() && pair.sides[A].installed.is_empty());
        }
    }
    // The genuine answers do it.
    let mut pair = by_hand(1311, 5);
    pair.pass_all();
    pair.run(Duration::ZERO);
    pair.pass_all();
    assert_eq!(pair.sides[A].up().len(), 1);
}

fn id_b() -> Payload {
    Payload::IdResponder(Identification { kind: 2, data: b"b".to_vec() })
}

// §2.16: nothing is answered to who has not proved to be the gateway: another CA's certificate, none, a shared key, no EAP.
#[test]
fn a_gateway_that_has_not_proved_itself_hears_nothing_of_eap() {
    let mut pair = pair(1320);
    pair.sides[B].credentials = issued(&authority());
    pair.initiate(A, 1);
    pair.run(seconds(5));
    assert!(pair.sides[A].failed(1).unwrap().contains("not acceptable"));
    // IKE_SA_INIT, IKE_AUTH, and AUTHENTICATION_FAILED.
    assert_eq!(pair.sides[A].sent.len(), 3);
    assert!(!pair.sides[B].logged("received EAP identity"));
    assert_nothing(&mut pair);
    let request = || eap(&[1, 1, 0, 5, 1]);
    let auth = |method, length| Payload::Auth { method, data: vec![0; length] };
    for said in [
        vec![request()],
        vec![id_b(), request()],
        vec![id_b(), auth(2, 32), request()],
        vec![id_b(), auth(13, 32), request()],
        vec![id_b(), auth(14, 64), request()],
        vec![id_b(), auth(14, 64)],
        vec![id_b(), auth(0, 0), eap(&[3, 1, 0, 4])],
        // RFC 5998 is not asked for.
        vec![id_b(), request(), notify(NotifyType(16417), Vec::new())],
    ] {
        let mut pair = by_hand(1321, 1);
        pair.answer_a(&said);
        assert!(pair.sides[A].failed(1).is_some(), "{said:?}");
        let more = pair.sides[A].sent.iter().skip(2).count();
        assert!(more <= 1, "{said:?}: {more} more messages");
        assert!(pair.sides[A].up().is_empty());
    }
}

// §2.16: ten requests at least are answered, but not requests without end.
#[test]
fn a_gateway_that_asks_without_end_is_left() {
    let mut pair = by_hand(1330, 2);
    let mut asked = 0;
    while pair.sides[A].failed(1).is_none() {
        assert!(asked < 60);
        pair.cut = true;
        pair.answer_a(&[eap(&[1, asked, 0, 5, if asked % 2 == 0 { 1 } else { 2 }])]);
        asked += 1;
    }
    assert!(asked > 10);
    assert!(pair.sides[A].failed(1).unwrap().contains("EAP without end"));
}

// §2.1, RFC 7383: over a network that loses, repeats and delays, with a certificate in fragments.
#[test]
fn eap_comes_through_a_bad_network() {
    let mut up = 0;
    for seed in 0..20 {
        let mut pair = pair(1400 + seed);
        (pair.loss, pair.duplication) = (15, 15);
        pair.initiate(A, 1);
        pair.run(seconds(25));
        up += usize::from(pair.sides[A].done(1));
        (pair.loss, pair.duplication) = (0, 0);
        pair.run(seconds(400));
        let both = pair.sides[A].up().len();
        pair.assert_same(both, both);
    }
    assert!(up > 10, "{up} of 20");
}

// RFC 5723 §6.2: which connections there were to choose from is not kept, so there is no ticket.
#[test]
fn what_eap_proved_is_not_resumed() {
    let (mut client, mut gateway) = (client(), gateway());
    (client.session_resumption, gateway.session_resumption) = (true, true);
    let pair = established(pair_of(1410, client, gateway));
    assert!(pair.sides[B].logged("no ticket for the peer: EAP has to be done anew"));
}
