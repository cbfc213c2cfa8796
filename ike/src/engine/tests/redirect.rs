//! Redirection (RFC 5685). Side B answers for two gateways, 10.0.0.2 and 10.0.0.3.

use super::*;
use crate::config::RedirectPhase;
use crate::wire::{NotifyType, Payload};

fn gateway(last: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(10, 0, 0, last))
}

/// B's connection at one gateway, which may send the peer elsewhere.
fn at(last: u8, to: Option<(&str, RedirectPhase)>) -> Arc<Connection> {
    let mut connection = connection(B);
    connection.name = format!("gw{last}");
    connection.remote.name.clone_from(&connection.name);
    connection.local_addrs = vec![AddressRange::host(gateway(last))];
    connection.redirect_to = to.map(|(to, phase)| (Gateway::parse(to).unwrap(), phase));
    Arc::new(connection)
}

fn gateways(seed: u64, config: EngineConfig, of_b: Vec<Arc<Connection>>) -> Pair {
    let mut pair = Pair::with(seed, config, connection(A), connection(B));
    pair.more[B].push(gateway(3));
    pair.sides[B].engine.set_connections(of_b);
    pair
}

fn redirecting(seed: u64, to: &str, phase: RedirectPhase) -> Pair {
    gateways(seed, EngineConfig::default(), vec![at(2, Some((to, phase))), at(3, None)])
}

/// Notifies of this type in a side's IKE_SA_INIT messages, with the address that the message went to.
fn said(side: &Side, kind: NotifyType) -> Vec<(IpAddr, Vec<u8>)> {
    let mut said = Vec::new();
    for sent in &side.sent {
        if let Ok(Incoming::Plain(message)) = wire::parse(&sent.bytes) {
            for payload in message.payloads {
                if let Payload::Notify(notify) = payload
                    && notify.kind == kind
                {
                    said.push((sent.path.remote.ip(), notify.data));
                }
            }
        }
    }
    said
}

// RFC 5685 §3, §9: without state at the old gateway, and the new one hears who sent us.
#[test]
fn an_initiator_is_sent_elsewhere_in_ike_sa_init() {
    let mut pair = redirecting(700, "10.0.0.3", RedirectPhase::Init);
    pair.initiate(A, 1);
    pair.run(seconds(3));
    assert!(pair.sides[A].done(1), "{:#?}", pair.sides[A].events);
    pair.assert_same(1, 1);
    assert_eq!(pair.sides[A].only().path.remote.ip(), gateway(3));
    assert_eq!(pair.sides[B].only().connection, "gw3");
    assert_eq!(said(&pair.sides[A], NotifyType::REDIRECT_SUPPORTED), [(gateway(2), Vec::new())]);
    assert_eq!(said(&pair.sides[A], NotifyType::REDIRECTED_FROM), [(gateway(3), vec![1, 4, 10, 0, 0, 2])]);
    // What is asked for at the old address is at the new one already.
    pair.initiate(A, 2);
    pair.run(seconds(3));
    assert!(pair.sides[A].done(2));
    assert_eq!(pair.sides[A].up().len(), 1);
}

// RFC 5685 §9.2: a name is looked up outside.
#[test]
fn a_gateway_may_be_named() {
    let mut pair = redirecting(701, "gw3.example", RedirectPhase::Init);
    pair.sides[A].names.insert("gw3.example".to_owned(), gateway(3));
    pair.initiate(A, 1);
    pair.run(seconds(3));
    assert!(pair.sides[A].done(1));
    pair.assert_same(1, 1);
    let mut pair = redirecting(702, "nowhere.example", RedirectPhase::Init);
    pair.initiate(A, 1);
    pair.run(seconds(3));
    assert!(pair.sides[A].failed(1).is_some_and(|reason| reason.contains("nowhere.example is unknown")));
    pair.assert_same(0, 0);
}

// RFC 5685 §3: the gateway does not send away whom it did not hear say that it follows.
#[test]
fn follow_redirects_no_is_neither_announced_nor_done() {
    let config = EngineConfig { follow_redirects: false, ..EngineConfig::default() };
    for phase in [RedirectPhase::Init, RedirectPhase::Auth] {
        let mut pair = gateways(703, config.clone(), vec![at(2, Some(("10.0.0.3", phase))), at(3, None)]);
        pair.initiate(A, 1);
        pair.run(seconds(3));
        assert!(pair.sides[A].done(1));
        assert_eq!(pair.sides[A].only().path.remote.ip(), gateway(2));
        assert!(said(&pair.sides[A], NotifyType::REDIRECT_SUPPORTED).is_empty());
        let id = pair.sides[B].only().id;
        let now = pair.now;
        pair.sides[B].engine.redirect(now, id, Gateway::parse("10.0.0.3").unwrap(), 9).unwrap();
        pair.run(seconds(3));
        let reason = pair.sides[B].failed(9);
        assert_eq!(reason.as_deref(), Some("client does not support IKE redirection"));
        pair.assert_same(1, 1);
    }
}

/// Answers A's outstanding IKE_SA_INIT request with this REDIRECT, as somebody who sees it could.
fn forge(pair: &mut Pair, data: impl FnOnce(&[u8]) -> Vec<u8>) {
    let request = pair.sides[A].sent.last().unwrap().clone();
    let Ok(Incoming::Plain(message)) = wire::parse(&request.bytes) else { panic!("IKE_SA_INIT") };
    let nonce = message.payloads.iter().find_map(|payload| match payload {
        Payload::Nonce(nonce) => Some(nonce.clone()),
        _ => None,
    });
    let notify = wire::Notify {
        protocol: Protocol::NONE,
        spi: Vec::new(),
        kind: NotifyType::REDIRECT,
        data: data(&nonce.unwrap()),
    };
    let header = wire::Header { response: true, from_initiator: false, ..message.header };
    let bytes = wire::encode(&Message { header, payloads: vec![Payload::Notify(notify)] });
    let now = pair.now;
    pair.sides[A].engine.handle_message(now, request.path, &bytes);
    pair.drain(A);
}

// RFC 5685 §3: only who saw the request can answer it with a redirect; and then as §9.2 says.
#[test]
fn a_redirect_without_our_nonce_is_ignored() {
    let to = |nonce: &[u8]| [&[1, 4, 10, 0, 0, 3], nonce].concat();
    type Forgery = fn(&[u8]) -> Vec<u8>;
    let forgeries: [Forgery; 6] = [
        |_| Vec::new(),
        |_| vec![1, 4, 10, 0, 0, 3],
        |nonce| [&[1, 4, 10, 0, 0, 3], &nonce[1..]].concat(),
        |nonce| [&[1, 4, 10, 0, 0, 3], nonce, &[0]].concat(),
        |nonce| [&[9, 4, 10, 0, 0, 3], nonce].concat(),
        |nonce| [&[3, 200], nonce].concat(),
    ];
    for (seed, forgery) in (710..).zip(forgeries) {
        let mut pair = Pair::new(seed);
        pair.initiate(A, 1);
        forge(&mut pair, forgery);
        pair.run(seconds(3));
        assert_eq!(pair.sides[A].only().path.remote.ip(), gateway(2));
        pair.assert_same(1, 1);
    }
    let config = EngineConfig { follow_redirects: false, ..EngineConfig::default() };
    let mut pair = Pair::with(720, config, connection(A), connection(B));
    pair.initiate(A, 1);
    forge(&mut pair, to);
    pair.run(seconds(3));
    assert!(pair.sides[A].logged("server sent REDIRECT even though we disabled it"));
    pair.assert_same(1, 1);
}

// RFC 5685 §3, §11: whoever redirects us decides where we go, not whom we believe.
#[test]
fn the_new_gateway_proves_the_configured_identity() {
    let mut pair = redirecting(721, "10.0.0.3", RedirectPhase::Init);
    let mut other = Connection::clone(&at(3, None));
    other.local_id = Some(id("mallory"));
    pair.sides[B].engine.set_connections(vec![at(2, Some(("10.0.0.3", RedirectPhase::Init))), Arc::new(other)]);
    pair.initiate(A, 1);
    pair.run(seconds(3));
    assert!(pair.sides[A].failed(1).is_some());
    assert!(pair.sides[A].up().is_empty() && pair.sides[A].installed.is_empty());
}

// RFC 5685 §7: MAX_REDIRECTS is 5 in 300 s.
#[test]
fn two_gateways_that_point_at_each_other_end_it() {
    let phase = RedirectPhase::Init;
    let of_b = vec![at(2, Some(("10.0.0.3", phase))), at(3, Some(("10.0.0.2", phase)))];
    let mut pair = gateways(722, EngineConfig::default(), of_b);
    pair.initiate(A, 1);
    pair.run(seconds(250));
    assert!(pair.sides[A].failed(1).is_some());
    assert!(pair.sides[A].logged("only 5 redirects are allowed within 300 seconds"));
    assert_eq!(said(&pair.sides[A], NotifyType::REDIRECTED_FROM).iter().filter(|(to, _)| *to == gateway(2)).count(), 2);
    pair.assert_same(0, 0);
}

// RFC 5685 §6: in IKE_AUTH, after both have proved who they are, and without a Child SA.
#[test]
fn an_initiator_is_sent_elsewhere_in_ike_auth() {
    let mut pair = redirecting(723, "10.0.0.3", RedirectPhase::Auth);
    pair.initiate(A, 1);
    pair.run(seconds(3));
    assert!(pair.sides[A].done(1), "{:#?}", pair.sides[A].events);
    pair.assert_same(1, 1);
    assert_eq!(pair.sides[A].only().path.remote.ip(), gateway(3));
    let ups = |side: &Side| side.events.iter().filter(|event| matches!(event, Event::ChildUp(..))).count();
    assert_eq!((ups(&pair.sides[A]), ups(&pair.sides[B])), (1, 1));
}

// RFC 5685 §6: the client MUST verify the gateway's AUTH before it acts on the redirect.
#[test]
fn a_gateway_without_proof_sends_nobody_elsewhere() {
    let mut pair = redirecting(724, "10.0.0.3", RedirectPhase::Auth);
    let mut mallory = Connection::clone(&at(2, Some(("10.0.0.3", RedirectPhase::Auth))));
    mallory.local_id = Some(id("mallory"));
    let mut a = connection(A);
    a.remote.remote_id = IdentityPattern::any();
    // B asserts an identity for which A knows no key of B's.
    pair.sides[A].engine.set_connections(vec![Arc::new(a)]);
    pair.sides[B].engine.set_connections(vec![Arc::new(mallory), at(3, None)]);
    let mut credentials = Credentials::new();
    let owner = |name: &str| IdentityPattern::exact(id(name));
    credentials.add_shared_secret(None, vec![owner("a"), owner("b")], Secret::new("correct horse".into())).unwrap();
    pair.sides[A].credentials = credentials;
    pair.initiate(A, 1);
    pair.run(seconds(3));
    assert!(pair.sides[A].failed(1).is_some());
    assert!(said(&pair.sides[A], NotifyType::REDIRECTED_FROM).is_empty());
    assert!(pair.sides[A].installed.is_empty());
}

// RFC 5685 §5: of an IKE SA that is up; its Child SAs are made at the new gateway, the old IKE SA is deleted.
#[test]
fn an_established_initiator_is_sent_elsewhere() {
    for to in ["10.0.0.3", "gw3.example"] {
        let mut pair = gateways(725, EngineConfig::default(), vec![at(2, None), at(3, None)]);
        pair.sides[A].names.insert("gw3.example".to_owned(), gateway(3));
        let mut pair = established(pair);
        // The role of the first initiator survives rekeying by the other side.
        let (now, id) = (pair.now, pair.sides[B].only().id);
        pair.sides[B].engine.rekey(now, Target::Ike(id), 8).unwrap();
        pair.run(seconds(3));
        let (now, id) = (pair.now, pair.sides[B].only().id);
        pair.sides[B].engine.redirect(now, id, Gateway::parse(to).unwrap(), 9).unwrap();
        pair.run(seconds(3));
        assert!(pair.sides[B].done(9));
        assert!(pair.sides[A].down(CloseReason::Replaced));
        assert_eq!(pair.sides[A].only().path.remote.ip(), gateway(3));
        pair.assert_same(1, 1);
    }
}

// RFC 5685 §5, §9.2, §10: malformed, with a nonce, to nowhere, or from the initiator: nothing changes.
#[test]
fn what_cannot_be_followed_leaves_the_sa_as_it_is() {
    let mut pair = established(gateways(726, EngineConfig::default(), vec![at(2, None), at(3, None)]));
    let (now, id) = (pair.now, pair.sides[B].only().id);
    pair.sides[B].engine.redirect(now, id, Gateway::parse("nowhere.example").unwrap(), 9).unwrap();
    pair.run(seconds(3));
    assert!(pair.sides[B].done(9) && pair.sides[A].logged("redirect failed"));
    pair.assert_same(1, 1);
    let (now, id) = (pair.now, pair.sides[A].only().id);
    pair.sides[A].engine.redirect(now, id, Gateway::parse("10.0.0.3").unwrap(), 10).unwrap();
    pair.run(seconds(3));
    assert_eq!(pair.sides[A].failed(10).as_deref(), Some("unable to redirect IKE_SA as initiator"));
    pair.assert_same(1, 1);
    assert_eq!(pair.sides[A].only().path.remote.ip(), gateway(2));
    assert!(pair.sides[A].engine.redirect(now, IkeSaId(999), Gateway::parse("10.0.0.3").unwrap(), 11).is_err());
}
