//! Which signature proves whom: RFC 7427, constraints of the configuration, and announcements (RFC 9593).

use pad::{AuthMethod, KeyType, Proof};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, SanType, date_time_ymd};

use super::*;
use crate::wire::NotifyType;

fn params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    params.not_before = date_time_ymd(2026, 1, 1);
    params.not_after = date_time_ymd(2027, 1, 1);
    params
}

pub(super) fn authority() -> CertifiedIssuer<'static, KeyPair> {
    let mut params = params("ca");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// Credentials with a certificate of `name` for each kind of key, in this order.
pub(super) fn holder(
    name: &str,
    issuer: &CertifiedIssuer<'static, KeyPair>,
    kinds: &[&'static rcgen::SignatureAlgorithm],
) -> Credentials {
    let mut credentials = Credentials::new();
    credentials.add_authority(issuer.der()).unwrap();
    for kind in kinds {
        let key = KeyPair::generate_for(kind).unwrap();
        let mut params = params(name);
        params.subject_alt_names = match name.parse() {
            Ok(address) => vec![SanType::IpAddress(address)],
            Err(_) => vec![SanType::DnsName(name.try_into().unwrap())],
        };
        let certificate = params.signed_by(&key, issuer).unwrap();
        credentials.add_certificate(certificate.der()).unwrap();
        credentials.add_private_key(key.serialize_pem().as_bytes(), None).unwrap();
    }
    credentials
}

fn certified(seed: u64, config: EngineConfig, of_a: &str, of_b: &str) -> Pair {
    let of = |side, constraints: &str| {
        let mut connection = connection(side);
        connection.local_auth.class = AuthClass::PublicKey;
        connection.remote.class = AuthClass::PublicKey;
        connection.remote.constraints = SignatureConstraints::parse(constraints).unwrap();
        connection
    };
    let mut pair = Pair::with(seed, config, of(A, of_a), of(B, of_b));
    let issuer = authority();
    let kinds = [&rcgen::PKCS_ECDSA_P256_SHA256, &rcgen::PKCS_ED25519, &rcgen::PKCS_ECDSA_P384_SHA384];
    pair.sides[A].credentials = holder("a", &issuer, &kinds);
    pair.sides[B].credentials = holder("b", &issuer, &kinds);
    for side in [A, B] {
        let hashes = pair.sides[side].credentials.authority_hashes();
        pair.sides[side].engine.set_authority_hashes(hashes);
    }
    pair
}

/// How a side's peer proved itself: the method and the type of its key.
fn proof_of_peer(side: &Side) -> (AuthMethod, KeyType) {
    let peer = side.only().peer.unwrap();
    let Proof::Certificate { end_entity, method, .. } = &peer.proof else { panic!("proved by a certificate") };
    (*method, pad::Certificate::parse(end_entity).unwrap().key_type().unwrap())
}

// RFC 9593 §3.1: both sides announce, and each takes the credential that the other can verify.
#[test]
fn announcements_choose_the_credential_on_both_sides() {
    // Each side's first certificate would be P-256, which the other refuses.
    let pair = certified(901, EngineConfig::default(), "ike:ecdsa-sha384", "ike:ed25519-identity");
    let pair = established(pair);
    assert_eq!(proof_of_peer(&pair.sides[A]), (AuthMethod::DIGITAL_SIGNATURE, KeyType::EcdsaP384));
    assert_eq!(proof_of_peer(&pair.sides[B]), (AuthMethod::DIGITAL_SIGNATURE, KeyType::Ed25519));
}

// RFC 9593 §3.1: an initiator does not announce to a responder that has not.
#[test]
fn announcements_are_answers_only() {
    let mut pair = certified(902, EngineConfig::default(), "pubkey", "pubkey");
    pair.initiate(A, 1);
    let Ok(Incoming::Plain(request)) = wire::parse(&pair.sides[A].sent[0].bytes) else { panic!("IKE_SA_INIT") };
    let announces = |message: &Message| {
        let kind = NotifyType::SUPPORTED_AUTH_METHODS;
        message.payloads.iter().any(|payload| matches!(payload, wire::Payload::Notify(it) if it.kind == kind))
    };
    assert!(!announces(&request));
    pair.run(seconds(3));
    let Ok(Incoming::Plain(answer)) = wire::parse(&pair.sides[B].sent[0].bytes) else { panic!("IKE_SA_INIT") };
    assert!(announces(&answer));
    assert!(pair.sides[A].done(1));
}

// swanctl.conf(5), `remote.auth`: what the configuration asks for is refused to whoever does not have it.
#[test]
fn a_signature_that_the_configuration_does_not_admit_gets_nobody_in() {
    for (seed, of_a, of_b) in [(903, "pubkey", "ecdsa-521"), (904, "ike:rsa/pss-sha256", "pubkey")] {
        let mut pair = certified(seed, EngineConfig::default(), of_a, of_b);
        pair.initiate(A, 1);
        pair.run(seconds(3));
        assert!(pair.sides[A].failed(1).is_some());
        for side in [A, B] {
            assert!(pair.sides[side].up().is_empty() && pair.sides[side].installed.is_empty());
        }
    }
}

// strongswan.conf(5), `signature_authentication`: without RFC 7427 each key has its own method.
#[test]
fn signature_authentication_can_be_turned_off() {
    let config = EngineConfig { signature_authentication: false, ..EngineConfig::default() };
    let pair = established(certified(905, config, "pubkey", "pubkey"));
    assert_eq!(proof_of_peer(&pair.sides[A]), (AuthMethod::ECDSA_256, KeyType::EcdsaP256));
    assert_eq!(proof_of_peer(&pair.sides[B]), (AuthMethod::ECDSA_256, KeyType::EcdsaP256));
}

// RFC 4945 §3.1.1: "implementations MUST perform this verification by default", and it can be skipped.
#[test]
fn with_certificates_an_address_is_where_the_peer_is() {
    use crate::config::CheckAddressIdentities as Check;
    for (address, check, comes_in) in
        [("10.0.0.1", Check::default(), true), ("10.9.9.9", Check::default(), false), ("10.9.9.9", Check::Never, true)]
    {
        let config = EngineConfig { check_address_identities: check, ..EngineConfig::default() };
        let mut pair = certified(680, config, "pubkey", "pubkey");
        let issuer = authority();
        for (side, name) in [(A, address), (B, "b")] {
            pair.sides[side].credentials = holder(name, &issuer, &[&rcgen::PKCS_ED25519]);
            let mut connection = (*pair.sides[side].engine.ctx.connections[0]).clone();
            connection.local_id = Some(Identity::parse(name).unwrap());
            connection.remote.remote_id = IdentityPattern::any();
            pair.sides[side].engine.set_connections(vec![Arc::new(connection)]);
        }
        pair.initiate(A, 1);
        pair.run(seconds(5));
        assert_eq!(pair.sides[A].done(1), comes_in, "{address} {check:?}");
        assert_eq!(pair.sides[B].logged("is not where its messages come from"), !comes_in);
    }
}
