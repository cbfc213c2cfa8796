//! Raw public keys (RFC 7670): asked for, shown, and never trusted because they were.

use pad::{Proof, PublicKey};
use rcgen::{KeyPair, PublicKeyData};

use super::*;
use crate::config::SendCert;
use crate::sa::parts::Parts;
use crate::wire::Payload;

fn raw(key: &KeyPair) -> PublicKey {
    PublicKey::parse(&key.subject_public_key_info()).unwrap()
}

/// Each side has a key and knows `known` of the other; `send` is side A's `send_cert`.
fn pair_of(seed: u64, keys: [&KeyPair; 2], known: [&KeyPair; 2], send: SendCert) -> Pair {
    let of = |side: usize| {
        let mut connection = connection(side);
        connection.local_auth.class = AuthClass::PublicKey;
        connection.local_auth.public_keys = vec![raw(keys[side])];
        connection.remote.class = AuthClass::PublicKey;
        connection.remote.public_keys = vec![raw(known[1 - side])];
        connection.send_cert = if side == A { send } else { SendCert::IfAsked };
        connection
    };
    let mut pair = Pair::with(seed, EngineConfig::default(), of(A), of(B));
    for side in [A, B] {
        pair.sides[side].credentials.add_private_key(&keys[side].serialize_der(), None).unwrap();
    }
    pair
}

fn keys(algorithm: &'static rcgen::SignatureAlgorithm) -> [KeyPair; 2] {
    [(); 2].map(|()| KeyPair::generate_for(algorithm).unwrap())
}

// RFC 7670 §3, §4.
#[test]
fn a_stranger_s_key_brings_nothing_up() {
    let ([a, b], [stranger, _]) = (keys(&rcgen::PKCS_ED25519), keys(&rcgen::PKCS_ED25519));
    for (seed, keys) in [(1400, [&stranger, &b]), (1401, [&a, &stranger])] {
        for send in [SendCert::IfAsked, SendCert::Never, SendCert::Always] {
            let mut pair = pair_of(seed, keys, [&a, &b], send);
            pair.initiate(A, 1);
            pair.run(seconds(3));
            assert!(pair.sides[A].failed(1).is_some());
            assert!(pair.sides.iter().all(|side| side.up().is_empty() && side.installed.is_empty()));
        }
    }
    // Nor does it where certificates are asked for.
    let mut pair = pair_of(1402, [&a, &b], [&a, &b], SendCert::Always);
    let mut certificates = (*pair.sides[B].engine.ctx.connections[0]).clone();
    certificates.remote.public_keys.clear();
    pair.sides[B].engine.set_connections(vec![Arc::new(certificates)]);
    pair.initiate(A, 1);
    pair.run(seconds(3));
    assert_eq!(pair.sides[B].shown, [(0, Some(a.subject_public_key_info()))]);
    assert!(pair.sides[A].failed(1).is_some() && pair.sides[B].up().is_empty());
}

// RFC 7670 §3: with a CERTREQ for it, a key goes in a CERT payload; `send_cert` says the last word. RFC 5056 §2.1: both ends
// know the same keys.
#[test]
fn keys_prove_both_sides_and_are_shown_when_they_are_asked_for() {
    for algorithm in [&rcgen::PKCS_ECDSA_P256_SHA256, &rcgen::PKCS_ED25519, &rcgen::PKCS_ECDSA_P521_SHA512] {
        let [a, b] = keys(algorithm);
        for (send, asks, shows) in [
            (SendCert::IfAsked, true, true),
            (SendCert::IfAsked, false, false),
            (SendCert::Never, true, false),
            (SendCert::Always, false, true),
        ] {
            let mut pair = pair_of(1403, [&a, &b], [&a, &b], send);
            let mut asking = (*pair.sides[B].engine.ctx.connections[0]).clone();
            asking.send_certreq = asks;
            pair.sides[B].engine.set_connections(vec![Arc::new(asking)]);
            let pair = established(pair);
            assert_eq!(pair.sides[B].shown, [(0, shows.then(|| a.subject_public_key_info()))]);
            assert_eq!(pair.sides[A].shown, [(0, Some(b.subject_public_key_info()))]);
            let hashes = [raw(&a).sha256(), raw(&b).sha256()];
            for (side, other, ours, theirs) in [(A, &b, hashes[0], hashes[1]), (B, &a, hashes[1], hashes[0])] {
                let peer = pair.sides[side].only().peer.unwrap();
                let Proof::RawKey { key, .. } = &peer.proof else { panic!("{:?}", peer.proof) };
                assert_eq!(*key, other.subject_public_key_info());
                assert_eq!(pair.sides[side].endpoint_keys, [Some([ours, theirs])]);
            }
        }
    }
}

// RFC 7670 §3: nothing is behind the encoding in a CERTREQ. RFC 7296 §3.6: the first key is the one that signed; Raw RSA
// Key (11) is deprecated.
#[test]
fn payloads_for_raw_keys_are_read_as_they_have_to_be() {
    let cert = |encoding, octet| Payload::Cert { encoding, data: vec![octet; 40] };
    let parts = Parts::collect(vec![cert(11, 1), cert(15, 2), cert(4, 3), cert(15, 4)]).unwrap();
    assert_eq!((parts.raw_key, parts.certificates), (Some(vec![2; 40]), vec![vec![3; 40]]));
    assert_eq!(Parts::collect(vec![cert(11, 1), cert(4, 3)]).unwrap().raw_key, None);
    let request = |encoding, length| Payload::CertReq { encoding, authorities: vec![7; length] };
    let requested = |payloads| Parts::collect(payloads).unwrap().raw_key_requested;
    assert!(requested(vec![request(4, 20), request(15, 0)]));
    assert!(!requested(vec![request(15, 20), request(11, 0), request(4, 0)]));
}
