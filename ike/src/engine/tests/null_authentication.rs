//! NULL authentication (RFC 7619): nobody in particular, who is let in only where that is configured, and takes nothing from others.

use pad::Proof;

use super::*;

/// Proves nothing.
fn as_nobody(mut connection: Connection) -> Connection {
    connection.local_id = Some(Identity::Null);
    connection.local_auth.class = AuthClass::Null;
    connection
}

/// Wants no proof.
fn of_nobody(mut connection: Connection) -> Connection {
    connection.remote.remote_id = IdentityPattern::exact(Identity::Null);
    connection.remote.class = AuthClass::Null;
    connection
}

fn wants(pattern: IdentityPattern) -> Connection {
    let mut connection = connection(B);
    connection.remote.remote_id = pattern;
    connection
}

fn refused(seed: u64, a: Connection, b: Connection) -> String {
    let mut pair = Pair::with(seed, EngineConfig::default(), a, b);
    pair.initiate(A, 1);
    pair.run(seconds(3));
    assert!(pair.sides.iter().all(|side| side.up().is_empty() && side.installed.is_empty()));
    pair.sides[A].failed(1).unwrap()
}

fn lineage(side: &Side) -> [u8; 32] {
    match &side.only().peer.unwrap().proof {
        Proof::Unauthenticated { lineage } => *lineage,
        proof => panic!("{proof:?}"),
    }
}

// RFC 7619 §2: "it MUST return an AUTHENTICATION_FAILED notification".
#[test]
fn nobody_is_let_in_where_proof_is_wanted() {
    let failed = "received AUTHENTICATION_FAILED notify error";
    let patterns = [IdentityPattern::any(), IdentityPattern::exact(id("a")), IdentityPattern::exact(Identity::Null)];
    for (n, pattern) in (800..).zip(patterns) {
        assert_eq!(refused(n, as_nobody(connection(A)), wants(pattern)), failed);
    }
    let mut certified = wants(IdentityPattern::any());
    certified.remote.class = AuthClass::PublicKey;
    assert_eq!(refused(803, as_nobody(connection(A)), certified), failed);
}

// RFC 7619 §2: nor does an initiator that wants proof take none from the responder.
#[test]
fn a_responder_that_proves_nothing_is_rejected() {
    let reason = refused(804, connection(A), as_nobody(connection(B)));
    assert!(
        reason.contains("authentication of the peer failed") || reason.contains("AUTHENTICATION_FAILED"),
        "{reason}"
    );
}

// RFC 7619 §2.2: a name without proof, and a proof without a name.
#[test]
fn nobody_has_no_name() {
    let named = Connection { local_id: Some(id("a")), ..as_nobody(connection(A)) };
    for (seed, pattern) in [(805, IdentityPattern::any()), (806, IdentityPattern::exact(id("a")))] {
        let b =
            Connection { remote: PadEntry { remote_id: pattern, ..of_nobody(connection(B)).remote }, ..connection(B) };
        refused(seed, named.clone(), b);
    }
    let nameless = Connection { local_id: Some(Identity::Null), ..connection(A) };
    for (seed, pattern) in [(807, IdentityPattern::any()), (808, IdentityPattern::exact(Identity::Null))] {
        refused(seed, nameless.clone(), wants(pattern));
    }
    refused(809, nameless, of_nobody(connection(B)));
}

// RFC 7619 §2.1: AUTH ties IKE_AUTH to the IKE_SA_INIT of this key exchange.
#[test]
fn both_may_be_nobody() {
    let pair = established(Pair::with(
        810,
        EngineConfig::default(),
        of_nobody(as_nobody(connection(A))),
        of_nobody(as_nobody(connection(B))),
    ));
    for side in &pair.sides {
        let peer = side.only().peer.unwrap();
        assert_eq!((&peer.id, &peer.local_id), (&Identity::Null, &Identity::Null));
        lineage(side);
    }
}

// RFC 7619 §2: "each peer independently selects the method".
#[test]
fn one_side_may_be_nobody() {
    let a = as_nobody(connection(A));
    let pair = established(Pair::with(811, EngineConfig::default(), a, of_nobody(connection(B))));
    assert_eq!(pair.sides[A].only().peer.unwrap().proof, Proof::PreSharedKey);
    lineage(&pair.sides[B]);
}

// RFC 7619 §2.3: "INITIAL_CONTACT notifications MUST NOT be used to delete any other IKE SAs based on the same peer identity".
#[test]
fn nobody_ends_nobody_s_ike_sas() {
    for (seed, unique) in [(812, Unique::No), (813, Unique::Keep), (814, Unique::Replace)] {
        let a = Connection { unique, ..as_nobody(connection(A)) };
        let b = Connection { unique, ..of_nobody(connection(B)) };
        let mut pair = established(Pair::with(seed, EngineConfig::default(), a.clone(), b));
        let first = lineage(&pair.sides[B]);
        let mut engine = Engine::new(EngineConfig::default(), Box::new(TestRng(seed + 4000)), pair.now);
        engine.set_connections(vec![Arc::new(a)]);
        pair.sides[A].engine = engine;
        pair.sides[A].installed.clear();
        pair.initiate(A, 2);
        pair.run(seconds(30));
        assert!(pair.sides[A].done(2), "{unique:?}");
        let up = pair.sides[B].up();
        assert_eq!(up.len(), 2, "{unique:?}");
        assert!(up.iter().any(|sa| sa.peer.as_ref().unwrap().proof != Proof::Unauthenticated { lineage: first }));
    }
}

// RFC 5386 §2: continuity is that of one IKE SA and its successors.
#[test]
fn a_rekeyed_ike_sa_is_of_the_same_nobody() {
    let a = as_nobody(connection(A));
    let mut pair = established(Pair::with(815, EngineConfig::default(), a, of_nobody(connection(B))));
    let (before, old) = (lineage(&pair.sides[B]), pair.sides[B].only().id);
    let now = pair.now;
    pair.sides[B].engine.rekey(now, Target::Ike(old), 2).unwrap();
    pair.drain(B);
    pair.run(seconds(30));
    assert_ne!(pair.sides[B].only().id, old);
    assert_eq!(lineage(&pair.sides[B]), before);
}

// RFC 7619 §2.5, §3, RFC 5386 §2: addresses that connections with authentication are for are not nobody's.
#[test]
fn nobody_gets_no_traffic_that_is_somebody_s() {
    let claiming = |network: &str| {
        let mut site = wants(IdentityPattern::exact(id("c")));
        site.name = "with-proof".to_owned();
        site.remote.name = "with-proof".to_owned();
        site.children = vec![Arc::new(child("net", "10.2.0.0/24", network))];
        site
    };
    for (seed, network, left) in [
        (816, "10.1.0.0/25", Some("10.1.0.128/25")),
        (817, "10.0.0.0/8", None),
        (818, "10.9.0.0/24", Some("10.1.0.0/24")),
    ] {
        let mut pair = Pair::with(seed, EngineConfig::default(), as_nobody(connection(A)), of_nobody(connection(B)));
        let of_b = vec![Arc::new(of_nobody(connection(B))), Arc::new(claiming(network))];
        pair.sides[B].engine.set_connections(of_b);
        pair.initiate(A, 1);
        pair.run(seconds(3));
        let installed: Vec<String> = pair.sides[B].installed.values().map(|sa| sa.remote_ts[0].to_string()).collect();
        assert_eq!(installed.first().map(String::as_str), left, "{network}");
        assert_eq!(pair.sides[A].done(1), left.is_some());
    }
    // `dynamic` stands for addresses, where the connection names them.
    let mut site = claiming("10.9.0.0/24");
    let any = ConfiguredSelector::Dynamic { protocol: 0, start_port: 0, end_port: u16::MAX };
    site.children = vec![Arc::new(Child { remote_ts: vec![any], ..(*site.children[0]).clone() })];
    site.remote_addrs = vec![AddressRange { start: address(A), end: address(A) }];
    let dynamic = |connection: Connection| {
        let child = Child { remote_ts: vec![any], local_ts: vec![any], ..(*connection.children[0]).clone() };
        Connection { children: vec![Arc::new(child)], ..connection }
    };
    let b = dynamic(of_nobody(connection(B)));
    let mut pair = Pair::with(819, EngineConfig::default(), dynamic(as_nobody(connection(A))), b.clone());
    pair.sides[B].engine.set_connections(vec![Arc::new(b), Arc::new(site)]);
    pair.initiate(A, 1);
    pair.run(seconds(3));
    assert!(pair.sides[B].installed.is_empty() && !pair.sides[A].done(1));
}
