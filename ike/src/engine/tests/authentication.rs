//! IKE_AUTH: who gets in, and who does not.

use pad::{PeerIdentity, Proof};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, SanType, date_time_ymd};

use super::*;

// RFC 7296 §2.15, §2.21.2.
#[test]
fn a_wrong_shared_key_gets_nobody_in() {
    let mut pair = Pair::new(20);
    pair.sides[A].credentials = shared_key("wrong");
    pair.initiate(A, 1);
    pair.run(seconds(3));
    assert_eq!(pair.sides[A].failed(1).as_deref(), Some("received AUTHENTICATION_FAILED notify error"));
    assert!(pair.sides[B].logged("authentication of the peer failed"));
    nothing_came_up(&pair);
}

/// A responder that admits anybody, to test what the initiator does with its proof.
fn with_careless_responder(mut pair: Pair) -> Pair {
    pair.sides[B].credentials = shared_key("wrong");
    pair.initiate(A, 1);
    for _ in 0..300 {
        pair.run(Duration::from_millis(1));
        let jobs: Vec<_> = pair.deliveries.keys().copied().collect();
        for key in jobs {
            let careless = matches!(&pair.deliveries[&key], Delivery::Job { side: B, job: Job::Authenticate(_), .. });
            if careless
                && let Some(Delivery::Job { id, job: Job::Authenticate(request), .. }) = pair.deliveries.remove(&key)
            {
                let peer = PeerIdentity {
                    id: request.peer_id.clone(),
                    local_id: request.local_id.clone(),
                    proof: Proof::PreSharedKey,
                    entry: "site".to_owned(),
                };
                let now = pair.now;
                pair.sides[B].engine.handle_job(
                    now,
                    id,
                    JobOutcome::Authenticate(Ok(pad::Admission {
                        peer,
                        good_for: None,
                        intermediates: Vec::new(),
                        warnings: Vec::new(),
                    })),
                );
                pair.drain(B);
            }
        }
    }
    pair
}

// RFC 7296 §2.21.2: the initiator tells the responder, and installs nothing.
#[test]
fn a_responder_with_a_wrong_proof_is_rejected() {
    let mut pair = with_careless_responder(Pair::new(21));
    pair.run(seconds(3));
    assert!(pair.sides[A].failed(1).is_some_and(|reason| reason.contains("authentication of the peer failed")));
    assert!(pair.sides[A].installed.is_empty());
    assert!(pair.sides[A].engine.ike_sas(pair.now).is_empty());
    assert!(pair.sides[B].logged("received AUTHENTICATION_FAILED notify error"));
    pair.assert_same(0, 0);
}

#[test]
fn an_identity_that_the_connection_does_not_name_is_rejected() {
    let mut a = connection(A);
    a.local_id = Some(id("mallory"));
    let mut pair = Pair::with(22, EngineConfig::default(), a, connection(B));
    pair.initiate(A, 1);
    pair.run(seconds(3));
    assert!(pair.sides[A].failed(1).is_some());
    nothing_came_up(&pair);
}

#[test]
fn a_responder_identity_that_nobody_has_is_rejected() {
    let mut a = connection(A);
    a.remote.remote_id = IdentityPattern::exact(id("somebody"));
    let mut pair = Pair::with(23, EngineConfig::default(), a, connection(B));
    pair.initiate(A, 1);
    pair.run(seconds(3));
    assert!(pair.sides[A].failed(1).is_some());
    nothing_came_up(&pair);
}

// A peer that proved one identity must not get another connection's selectors.
#[test]
fn the_entry_that_admits_the_peer_decides_what_it_gets() {
    let mut secret = connection(B);
    secret.name = "secret".to_owned();
    secret.remote.name = "secret".to_owned();
    secret.remote.remote_id = IdentityPattern::exact(id("chief"));
    secret.children = vec![Arc::new(child("vault", "10.2.0.0/16", "10.1.0.0/24"))];
    let mut plain = connection(B);
    plain.children = vec![Arc::new(child("net", "10.2.0.0/24", "10.1.0.0/24"))];
    let mut a = connection(A);
    a.children = vec![Arc::new(child("net", "10.1.0.0/24", "10.2.0.0/16"))];
    let mut pair = Pair::with(24, EngineConfig::default(), a, plain.clone());
    pair.sides[B].engine.set_connections(vec![Arc::new(secret), Arc::new(plain)]);
    pair.initiate(A, 1);
    pair.run(seconds(3));
    let sa = pair.sides[B].only();
    assert_eq!(sa.connection, "site");
    assert_eq!(sa.children[0].local_ts, [TrafficSelector::network("10.2.0.0".parse().unwrap(), 24).unwrap()]);
    assert_eq!(pair.sides[A].only().children[0].remote_ts, sa.children[0].local_ts);
    pair.assert_same(1, 1);
}

// RFC 7296 §2.4: INITIAL_CONTACT ends the older IKE SA of the same pair of identities.
#[test]
fn a_peer_that_restarted_replaces_its_old_sa() {
    let mut pair = up(25);
    let rng = Box::new(TestRng(4711));
    let mut engine = Engine::new(EngineConfig::default(), rng, pair.now);
    engine.set_connections(vec![Arc::new(connection(A))]);
    pair.sides[A].engine = engine;
    pair.sides[A].installed.clear();
    pair.sides[A].events.clear();
    pair.initiate(A, 2);
    pair.run(seconds(3));
    assert!(pair.sides[A].done(2));
    assert!(pair.sides[B].down(CloseReason::Restarted));
    pair.assert_same(1, 1);
}

#[test]
fn another_peer_cannot_end_it() {
    let mut b = connection(B);
    b.remote.remote_id = IdentityPattern::any();
    let mut pair = established(Pair::with(26, EngineConfig::default(), connection(A), b));
    let mut mallory = connection(A);
    mallory.local_id = Some(id("mallory"));
    let mut engine = Engine::new(EngineConfig::default(), Box::new(TestRng(4712)), pair.now);
    engine.set_connections(vec![Arc::new(mallory)]);
    pair.sides[A].engine = engine;
    pair.initiate(A, 2);
    pair.run(seconds(3));
    assert_eq!(pair.sides[B].up().len(), 2);
    assert!(!pair.sides[B].down(CloseReason::Restarted));
}

// RFC 4301 §4.4.3: the entry that names the identity says how it is proved. The initiator chooses neither by its
// proposal nor by the identity that it asks for whether that entry counts.
#[test]
fn a_wider_entry_of_other_proposals_or_identities_is_no_way_around_the_named_one() {
    let ca = authority("CA");
    let mut named = connection(B);
    named.remote.class = AuthClass::PublicKey;
    named.remote.cacerts = vec![ca.der().to_vec()];
    let mut wide = connection(B);
    wide.name = "wide".to_owned();
    wide.remote.name = "wide".to_owned();
    wide.remote.remote_id = IdentityPattern::any();
    let mut other_proposal = named.clone();
    other_proposal.proposals = parse_proposals("aes256gcm16-prfsha384-x25519", Protocol::IKE).unwrap();
    let mut other_identity = named.clone();
    other_identity.local_id = Some(id("elsewhere"));
    let mut other_address = named.clone();
    other_address.remote_addrs = vec![AddressRange::host("192.0.2.1".parse().unwrap())];
    for named in [named, other_proposal, other_identity, other_address] {
        let mut pair = Pair::with(37, EngineConfig::default(), connection(A), wide.clone());
        pair.sides[B].engine.set_connections(vec![Arc::new(wide.clone()), Arc::new(named)]);
        pair.initiate(A, 1);
        pair.run(seconds(3));
        assert_eq!(pair.sides[A].failed(1).as_deref(), Some("received AUTHENTICATION_FAILED notify error"));
        nothing_came_up(&pair);
    }
}

// RFC 4301 §4.4.3: an entry that is gone admits nobody, nor one whose addresses the peer has left.
#[test]
fn a_half_open_sa_gets_in_by_connections_as_they_are_now_only() {
    let mut changed = connection(B);
    changed.remote.remote_id = IdentityPattern::exact(id("c"));
    for now in [Vec::new(), vec![Arc::new(changed)]] {
        let mut pair = Pair::new(41);
        pair.job_delay = Duration::ZERO;
        pair.delay = (Duration::ZERO, Duration::from_millis(10));
        pair.initiate(A, 1);
        pair.run(Duration::from_millis(25));
        assert_eq!(pair.sides[B].engine.counts(), (1, 1), "IKE_AUTH is under way");
        pair.sides[B].engine.set_connections(now);
        pair.run(seconds(3));
        assert_eq!(pair.sides[A].failed(1).as_deref(), Some("received AUTHENTICATION_FAILED notify error"));
        nothing_came_up(&pair);
    }
    let mut b = connection(B);
    b.remote_addrs = vec![AddressRange::host(address(A))];
    let mut pair = Pair::with(42, EngineConfig::default(), connection(A), b);
    pair.job_delay = Duration::ZERO;
    pair.delay = (Duration::ZERO, Duration::from_millis(10));
    pair.initiate(A, 1);
    pair.run(Duration::from_millis(25));
    for delivery in pair.deliveries.values_mut() {
        if let Delivery::Message { to: B, path, .. } = delivery {
            path.remote = "10.6.6.6:500".parse().unwrap();
        }
    }
    pair.run(seconds(3));
    assert!(pair.sides[B].logged("no connection fits"));
    assert!(pair.sides[B].up().is_empty() && pair.sides[B].installed.is_empty());
}

// RFC 7296 §2.8.3: reauthentication asks who the peer is, so by what the connection says now.
#[test]
fn reauthentication_goes_by_the_connection_as_it_is_now() {
    let mut a = connection(A);
    (a.reauth_time, a.over_time) = (seconds(100), seconds(50));
    let mut changed = a.clone();
    changed.remote.remote_id = IdentityPattern::exact(id("c"));
    for (now, ikes) in [(Vec::new(), 0), (vec![Arc::new(changed)], 0), (vec![Arc::new(a.clone())], 1)] {
        let mut pair = established(Pair::with(43, EngineConfig::default(), a.clone(), connection(B)));
        pair.sides[A].engine.set_connections(now);
        pair.run(seconds(110));
        pair.assert_same(ikes, ikes);
    }
}

// RFC 7296 §2.4: only "between the same authenticated identities", and two entries are not the same proof.
#[test]
fn a_peer_that_another_entry_admits_cannot_end_it() {
    let mut pair = up(38);
    let mut other = connection(B);
    other.name = "other".to_owned();
    other.remote.name = "other".to_owned();
    pair.sides[B].engine.set_connections(vec![Arc::new(other)]);
    let mut engine = Engine::new(EngineConfig::default(), Box::new(TestRng(4713)), pair.now);
    engine.set_connections(vec![Arc::new(connection(A))]);
    pair.sides[A].engine = engine;
    pair.initiate(A, 2);
    pair.run(seconds(3));
    assert!(pair.sides[A].done(2));
    assert_eq!(pair.sides[B].up().len(), 2);
    assert!(!pair.sides[B].down(CloseReason::Restarted));
}

// RFC 4301 §4.4.3: a Child SA of a connection is for the peer that this connection names now.
#[test]
fn an_ike_sa_made_before_the_connection_changed_gets_no_new_child() {
    let named = |change: fn(&mut Connection)| {
        let mut changed = connection(A);
        change(&mut changed);
        changed
    };
    let changes = [
        named(|connection| connection.remote.remote_id = IdentityPattern::exact(id("c"))),
        named(|connection| connection.remote.class = AuthClass::PublicKey),
        named(|connection| connection.local_id = Some(id("d"))),
    ];
    for changed in changes {
        let mut pair = up(39);
        pair.sides[A].engine.set_connections(vec![Arc::new(changed.clone())]);
        pair.initiate(A, 2);
        pair.run(seconds(3));
        assert!(pair.sides[A].failed(2).is_some(), "a peer was admitted by a definition that is gone");
        assert_eq!(pair.sides[A].installed.len(), 1);
        // The same while the old one is still coming up.
        for wait in [5, 45] {
            let mut pair = Pair::new(40);
            pair.initiate(A, 1);
            pair.run(Duration::from_millis(wait));
            pair.sides[A].engine.set_connections(vec![Arc::new(changed.clone())]);
            pair.initiate(A, 2);
            pair.run(seconds(3));
            assert!(!pair.sides[A].done(2) && pair.sides[A].failed(2).is_some(), "{wait} {:#?}", pair.sides[A].events);
            assert!(pair.sides[A].installed.len() <= 1);
        }
    }
    // A reload that changes nothing that matters keeps it.
    let mut pair = up(39);
    pair.sides[A].engine.set_connections(vec![Arc::new(connection(A))]);
    pair.initiate(A, 2);
    pair.run(seconds(3));
    pair.assert_same(1, 2);
}

// RFC 7296 §1.2: where only the Child SA fails the IKE SA stays.
#[test]
fn the_ike_sa_survives_a_refused_child() {
    for (seed, error) in [(27, InstallError::Refused("latched".into())), (28, InstallError::Failed("full".into()))] {
        let mut pair = Pair::new(seed);
        pair.sides[B].refuse_installs = Some(error);
        pair.initiate(A, 1);
        pair.run(seconds(3));
        assert!(pair.sides[A].failed(1).is_some());
        pair.assert_same(1, 0);
    }
}

#[test]
fn what_the_initiator_cannot_install_is_deleted_there_too() {
    let mut pair = Pair::new(29);
    pair.sides[A].refuse_installs = Some(InstallError::Failed("full".into()));
    pair.initiate(A, 1);
    pair.run(seconds(3));
    assert!(pair.sides[A].failed(1).is_some());
    pair.assert_same(1, 0);
}

// Nothing but IKE_AUTH is read before the peer is authenticated: not even opened.
#[test]
fn other_exchanges_before_authentication_change_nothing() {
    let mut pair = Pair::new(30);
    pair.job_delay = seconds(3);
    pair.initiate(A, 1);
    pair.run(Duration::from_millis(40));
    let retry = retry::Retry::start(pair.now, &pair.sides[A].engine.ctx.config.retransmission, false, &mut TestRng(1));
    let delete = [wire::Payload::Delete { protocol: Protocol::IKE, spis: Vec::new() }];
    for exchange in [ExchangeType::INFORMATIONAL, ExchangeType::CREATE_CHILD_SA] {
        let before = pair.snapshot(B);
        let slot = pair.sides[A].engine.sas.values_mut().next().unwrap();
        let IkeSa::InitiatorAuth(sa) = &mut slot.sa else { panic!("IKE_AUTH is to come") };
        let mut rng = TestRng(9);
        let Some(sealed) = sa.channel.request(exchange, &delete, None, retry, &mut rng) else { continue };
        let path = sa.core.path;
        let path = Path { local: path.remote, remote: path.local, transport: path.transport };
        let now = pair.now;
        pair.sides[B].engine.handle_message(now, path, &sealed[0]);
        assert!(pair.sides[B].engine.poll_output().is_none());
        assert_eq!(before, pair.snapshot(B));
    }
}

#[test]
fn jobs_that_answer_after_the_end_change_nothing() {
    let mut pair = Pair::new(31);
    pair.job_delay = Duration::ZERO;
    pair.initiate(A, 1);
    pair.run(Duration::from_millis(60));
    for (token, side) in [(7, A), (8, B)] {
        let ids: Vec<IkeSaId> = pair.sides[side].engine.sas.keys().copied().collect();
        for id in ids {
            let now = pair.now;
            pair.sides[side].engine.terminate(now, Target::Ike(id), true, token).unwrap();
            pair.drain(side);
        }
    }
    pair.run(seconds(400));
    nothing_came_up(&pair);
}

fn nothing_came_up(pair: &Pair) {
    for side in &pair.sides {
        let up = |event: &Event| matches!(event, Event::IkeUp(_) | Event::ChildUp(..));
        assert!(!side.events.iter().any(up) || side.events.iter().any(|event| matches!(event, Event::IkeDown(..))));
    }
    pair.assert_same(0, 0);
}

type Authority = CertifiedIssuer<'static, KeyPair>;

fn params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    (params.not_before, params.not_after) = (date_time_ymd(2026, 1, 1), date_time_ymd(2027, 1, 1));
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params
}

fn authority(name: &str) -> Authority {
    let mut params = params(name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// Credentials with a certificate for `name`, that trust `trusted`.
fn certified(name: &str, issuer: &Authority, trusted: &Authority) -> Credentials {
    let key = KeyPair::generate().unwrap();
    let mut params = params(name);
    params.subject_alt_names = vec![SanType::DnsName(name.try_into().unwrap())];
    params.use_authority_key_identifier_extension = true;
    let certificate = params.signed_by(&key, issuer).unwrap();
    let mut credentials = Credentials::new();
    credentials.add_certificate(certificate.der()).unwrap();
    credentials.add_private_key(key.serialize_der().as_slice(), None).unwrap();
    credentials.add_authority(trusted.der()).unwrap();
    credentials
}

fn with_certificates(seed: u64, credentials: [Credentials; 2]) -> Pair {
    let of = |side: usize| {
        let mut connection = connection(side);
        connection.local_auth.class = AuthClass::PublicKey;
        connection.remote.class = AuthClass::PublicKey;
        connection
    };
    let config = EngineConfig { fragment_size: 576, ..EngineConfig::default() };
    let mut pair = Pair::with(seed, config, of(A), of(B));
    for (side, credentials) in pair.sides.iter_mut().zip(credentials) {
        side.engine.set_authority_hashes(credentials.authority_hashes());
        side.credentials = credentials;
    }
    pair
}

// RFC 7296 §1.2, §3.7 and RFC 7427: certificates are asked for, sent, and prove who both are.
#[test]
fn certificates_prove_both_sides() {
    let ca = authority("CA");
    let credentials = [certified("a", &ca, &ca), certified("b", &ca, &ca)];
    let pair = established(with_certificates(32, credentials));
    for side in &pair.sides {
        let peer = side.only().peer.unwrap();
        let Proof::Certificate { trust_anchor, .. } = &peer.proof else { panic!("proved by a certificate") };
        assert_eq!(trust_anchor.as_slice(), ca.der().as_ref());
    }
}

// RFC 4945 §3.2: what is asked for are the CAs that may vouch for the peer on the connection.
#[test]
fn a_certificate_request_names_the_connections_own_authorities() {
    let (ca, other, third) = (authority("CA"), authority("Other"), authority("Third"));
    let hash = |authority: &Authority| pad::Certificate::parse(authority.der()).unwrap().public_key_info_hash();
    let asks = |pair: &Pair, side: usize, cacerts: &[&[&Authority]]| {
        let connection = |of: &&[&Authority]| {
            let mut connection = (*pair.sides[side].engine.ctx.connections[0]).clone();
            connection.remote.cacerts = of.iter().map(|authority| authority.der().to_vec()).collect();
            Arc::new(connection)
        };
        let connections: Vec<_> = cacerts.iter().map(connection).collect();
        let requests = crate::sa::auth::cert_requests(&connections, &pair.sides[side].engine.ctx.authorities);
        assert!(requests.len() <= 1, "{requests:?}");
        requests.into_iter().next().map(|request| match request {
            wire::Payload::CertReq { encoding: 4, authorities } => authorities,
            other => panic!("{other:?}"),
        })
    };
    let mut pair = with_certificates(37, [certified("a", &ca, &ca), certified("b", &ca, &ca)]);
    assert_eq!(asks(&pair, A, &[&[]]), Some(hash(&ca).to_vec()));
    assert_eq!(asks(&pair, A, &[&[&other]]), Some(hash(&other).to_vec()));
    let all = [hash(&other), hash(&third), hash(&ca)].concat();
    assert_eq!(asks(&pair, B, &[&[&other, &third], &[&third], &[]]), Some(all));
    pair.sides[B].engine.set_authority_hashes(Vec::new());
    assert_eq!(asks(&pair, B, &[&[]]), None);
    // The peer finds the certificate for it.
    pair.sides[B].engine.set_authority_hashes(vec![hash(&ca)]);
    let mut named = (*pair.sides[A].engine.ctx.connections[0]).clone();
    named.remote.cacerts = vec![ca.der().to_vec()];
    pair.sides[A].engine.set_connections(vec![Arc::new(named)]);
    pair.sides[A].engine.set_authority_hashes(vec![hash(&other)]);
    established(pair);
}

// RFC 5056 §2.1: an end-point binding is of the keys that proved the ends, for as long as that proof counts.
#[test]
fn the_keys_of_both_ends_are_told_and_outlive_rekeys() {
    let ca = authority("CA");
    let mut pair = established(with_certificates(37, [certified("a", &ca, &ca), certified("b", &ca, &ca)]));
    let [b, a] = [A, B].map(|side| {
        let peer = pair.sides[side].only().peer.unwrap();
        let Proof::Certificate { end_entity, .. } = &peer.proof else { panic!("proved by a certificate") };
        pad::Certificate::parse(end_entity).unwrap().public_key_info_sha256()
    });
    let (now, id) = (pair.now, pair.sides[A].only().id);
    pair.sides[A].engine.rekey(now, Target::Ike(id), 2).unwrap();
    pair.run(seconds(2));
    let (now, child) = (pair.now, pair.sides[B].only().children[0].id);
    pair.sides[B].engine.rekey(now, Target::Child(child), 3).unwrap();
    pair.run(seconds(10));
    assert_eq!(pair.sides[A].endpoint_keys, [Some([a, b]); 2]);
    assert_eq!(pair.sides[B].endpoint_keys, [Some([b, a]); 2]);
    // A shared key is nobody's alone.
    let pair = established(Pair::new(38));
    assert!(pair.sides.iter().all(|side| side.endpoint_keys == [None]));
}

// A peer may be found out while it is in, while its proof is being looked at, and while it rekeys.
#[test]
fn who_may_not_stay_goes_at_once_and_nobody_else() {
    let of_b: Judge = Arc::new(|peer, chain| {
        assert!(chain.is_empty());
        (peer.id == id("b")).then(|| "it was revoked".to_owned())
    });
    let gone = |pair: &Pair| {
        assert!(pair.sides[A].logged("closing IKE_SA of 'b': it was revoked"));
        assert!(pair.sides[A].down(CloseReason::Local) && pair.sides[A].installed.is_empty());
        pair.assert_same(0, 0);
    };
    let judge = |pair: &mut Pair, side: usize, judge: &Judge| {
        pair.sides[side].engine.set_judge(Arc::clone(judge));
        pair.sides[side].engine.forget_tickets();
    };
    let mut pair = up(39);
    let (now, id_of_a, id_of_b) = (pair.now, pair.sides[A].only().id, pair.sides[B].only().id);
    judge(&mut pair, B, &of_b);
    pair.sides[B].engine.review(now, id_of_b);
    pair.run(seconds(1));
    pair.assert_same(1, 1);
    judge(&mut pair, A, &of_b);
    // The peer cannot hold it up by silence.
    pair.cut = true;
    pair.sides[A].engine.review(now, id_of_a);
    pair.drain(A);
    assert!(pair.sides[A].installed.is_empty() && pair.sides[A].engine.ike_sas(now).is_empty());
    pair.cut = false;
    pair.run(seconds(10));
    gone(&pair);

    let mut pair = Pair::new(40);
    pair.job_delay = Duration::from_millis(300);
    pair.initiate(A, 1);
    while !pair.deliveries.values().any(|next| matches!(next, Delivery::Job { side: A, job: Job::Authenticate(_), .. }))
    {
        pair.run(Duration::from_millis(1));
    }
    judge(&mut pair, A, &of_b);
    pair.run(seconds(10));
    gone(&pair);

    // Of those that a page missed because they were rekeyed meanwhile, the successor is judged.
    let mut pair = up(41);
    judge(&mut pair, A, &of_b);
    let (now, ike) = (pair.now, pair.sides[B].only().id);
    pair.sides[B].engine.rekey(now, Target::Ike(ike), 2).unwrap();
    pair.run(seconds(10));
    gone(&pair);
}

#[test]
fn a_certificate_of_another_authority_gets_nobody_in() {
    let (ca, other) = (authority("CA"), authority("Other"));
    // Of the initiator, then of the responder.
    let wrong_initiator = [certified("a", &other, &ca), certified("b", &ca, &ca)];
    let wrong_responder = [certified("a", &ca, &ca), certified("b", &other, &ca)];
    for credentials in [wrong_initiator, wrong_responder] {
        let mut pair = with_certificates(33, credentials);
        pair.initiate(A, 1);
        pair.run(seconds(3));
        assert!(pair.sides[A].failed(1).is_some());
        assert!(pair.sides[A].installed.is_empty());
        pair.assert_same(0, 0);
    }
}

// A valid certificate of a trusted CA is no way in for a name that no connection admits.
#[test]
fn a_certificate_for_another_name_gets_nobody_in() {
    let ca = authority("CA");
    let mut pair = with_certificates(34, [certified("mallory", &ca, &ca), certified("b", &ca, &ca)]);
    let mut claims = (*pair.sides[A].engine.ctx.connections[0]).clone();
    claims.local_id = Some(id("mallory"));
    pair.sides[A].engine.set_connections(vec![Arc::new(claims)]);
    pair.initiate(A, 1);
    pair.run(seconds(3));
    assert_eq!(pair.sides[A].failed(1).as_deref(), Some("received AUTHENTICATION_FAILED notify error"));
    pair.assert_same(0, 0);
}

// RFC 6023: without a Child SA.
#[test]
fn an_ike_sa_comes_up_without_a_child() {
    let mut pair = Pair::new(35);
    let connection = Arc::clone(&pair.sides[A].engine.ctx.connections[0]);
    pair.initiate_child(A, connection, None, 1);
    pair.run(seconds(2));
    assert!(pair.sides[A].done(1));
    pair.assert_same(1, 0);
    // And what comes later uses it.
    pair.initiate(A, 2);
    pair.run(seconds(2));
    assert!(pair.sides[A].done(2));
    pair.assert_same(1, 1);
}

#[test]
fn what_is_asked_for_meanwhile_joins_the_ike_sa_that_comes_up() {
    let mut pair = Pair::new(36);
    for token in 1..=3 {
        pair.initiate(A, token);
        pair.run(Duration::from_millis(15));
    }
    pair.run(seconds(3));
    assert!((1..=3).all(|token| pair.sides[A].done(token)));
    pair.assert_same(1, 3);
}

#[test]
fn an_engine_can_move_to_another_thread() {
    fn is_send<T: Send>() {}
    is_send::<Engine>();
    is_send::<Output>();
}
