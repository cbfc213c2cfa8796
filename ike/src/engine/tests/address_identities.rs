//! Addresses as identities (RFC 4945 §3.1.1).

use super::*;
use crate::config::CheckAddressIdentities as Check;

fn pair(seed: u64, check: Check, of_a: Option<Identity>, of_b: Option<Identity>) -> Pair {
    let config = EngineConfig { check_address_identities: check, ..EngineConfig::default() };
    let of = |side, local_id| {
        let mut connection = connection(side);
        connection.local_id = local_id;
        connection.remote.remote_id = IdentityPattern::any();
        connection
    };
    let mut pair = Pair::with(seed, config, of(A, of_a), of(B, of_b));
    pair.initiate(A, 1);
    pair.run(seconds(3));
    pair
}

// RFC 4945 §3.1.1: in both roles, if asked for; other kinds of identity say nothing about addresses.
#[test]
fn an_address_as_identity_is_where_the_peer_is_if_asked_for() {
    let elsewhere = || Some(Identity::Ipv4(Ipv4Addr::new(10, 9, 9, 9)));
    for (seed, of_a, of_b) in [(670, elsewhere(), None), (671, None, elsewhere())] {
        let pair = pair(seed, Check::Always, of_a, of_b);
        assert!(pair.sides[A].failed(1).is_some());
        assert!(pair.sides[A].up().is_empty() && pair.sides[A].installed.is_empty());
        assert!(pair.sides.iter().any(|side| side.logged("is not where its messages come from")));
    }
    // Without an identity of its own each side is its address.
    for (seed, check, of_a) in [
        (672, Check::Always, None),
        (673, Check::Always, Some(id("a"))),
        (674, Check::WithCertificates, elsewhere()),
        (675, Check::Never, elsewhere()),
    ] {
        let pair = pair(seed, check, of_a, None);
        assert!(pair.sides[A].done(1));
        pair.assert_same(1, 1);
    }
}
