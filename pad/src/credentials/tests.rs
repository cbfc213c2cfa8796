mod faults;
mod raw_keys;
mod revocation;
mod tickets;

use std::sync::{Arc, OnceLock};

use ipsec::secret::Secret;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, SanType, date_time_ymd,
};

use super::*;
use crate::certificate::Certificate;
use crate::peer::Proof;

/// 2026-11-21.
const NOW: u64 = 1_795_219_200;
const OCTETS: &[u8] = b"what the peer signs";
const RSA_PKCS1: &[u8] = include_bytes!("testdata/rsa.pkcs1.pem");
const RSA_PKCS8: &str = include_str!("testdata/rsa.pkcs8.pem");
const RSA_ENCRYPTED: &[u8] = include_bytes!("testdata/rsa.encrypted.pem");

/// A MAC that is good enough to tell secrets apart.
struct TestMac;

impl SharedKeyMac for TestMac {
    fn mac(&self, secret: &Secret) -> Vec<u8> {
        [b"mac over ", secret.expose()].concat()
    }

    fn mac_of_nobody(&self) -> Vec<u8> {
        b"mac of nobody".to_vec()
    }
}

fn id(text: &str) -> Identity {
    Identity::parse(text).unwrap()
}

struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    fn new(name: &str) -> Self {
        Self::with(name, |_| ())
    }

    fn with(name: &str, change: impl FnOnce(&mut CertificateParams)) -> Self {
        let params = authority_params(name, change);
        Self { issuer: CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap() }
    }

    fn below(&self, name: &str, change: impl FnOnce(&mut CertificateParams)) -> Self {
        let params = authority_params(name, change);
        let key = KeyPair::generate().unwrap();
        Self { issuer: CertifiedIssuer::signed_by(params, key, &self.issuer).unwrap() }
    }

    fn der(&self) -> Vec<u8> {
        self.issuer.der().to_vec()
    }

    /// An end entity with the common name and the subjectAltName `name`.
    fn issue(&self, name: &str, key: &KeyPair, change: impl FnOnce(&mut CertificateParams)) -> Vec<u8> {
        let mut params = end_entity_params(name);
        change(&mut params);
        params.signed_by(key, &self.issuer).unwrap().der().to_vec()
    }
}

fn authority_params(name: &str, change: impl FnOnce(&mut CertificateParams)) -> CertificateParams {
    let mut params = end_entity_params(name);
    params.subject_alt_names.clear();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    change(&mut params);
    params
}

fn end_entity_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.not_before = date_time_ymd(2026, 1, 1);
    params.not_after = date_time_ymd(2027, 1, 1);
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "Latchkey Test");
    params.distinguished_name.push(DnType::CommonName, name);
    params.subject_alt_names = match name.parse() {
        Ok(address) => vec![SanType::IpAddress(address)],
        Err(_) if name.contains('@') => vec![SanType::Rfc822Name(name.try_into().unwrap())],
        Err(_) => vec![SanType::DnsName(name.try_into().unwrap())],
    };
    params.use_authority_key_identifier_extension = true;
    params
}

/// What a peer holds: its key, its certificate, and the chain it sends.
fn peer(key: &KeyPair, certificates: &[&[u8]]) -> Credentials {
    let mut credentials = Credentials::new();
    credentials.add_private_key(&key.serialize_der(), None).unwrap();
    certificates.iter().for_each(|der| credentials.add_certificate(der).unwrap());
    credentials
}

fn trusting(authority: &Authority) -> Credentials {
    let mut credentials = Credentials::new();
    credentials.add_authority(&authority.der()).unwrap();
    credentials
}

fn entry(name: &str, pattern: &str, class: AuthClass) -> PadEntry {
    PadEntry {
        name: name.to_owned(),
        remote_id: IdentityPattern::parse(pattern).unwrap(),
        class,
        cacerts: Vec::new(),
        certs: Vec::new(),
        public_keys: Vec::new(),
        constraints: SignatureConstraints::default(),
        revocation: Default::default(),
        eap_id: None,
    }
}

fn pubkey(pattern: &str) -> Vec<PadEntry> {
    vec![entry("conn", pattern, AuthClass::PublicKey)]
}

fn sign_request(local: &str) -> SignRequest {
    SignRequest {
        local_id: id(local),
        peer_id: None,
        auth: LocalAuth {
            class: AuthClass::PublicKey,
            certificates: Vec::new(),
            public_keys: Vec::new(),
            constraints: SignatureConstraints::default(),
            eap_id: None,
        },
        octets: OCTETS.to_vec(),
        shared_key_mac: Arc::new(TestMac),
        peer_hashes: Some(vec![2, 3, 4, 5]),
        cert_requests: Vec::new(),
        raw_key_requested: false,
        announced: None,
        settings: SignatureSettings::default(),
    }
}

fn request(peer_id: &str, signed: SignedAuth, entries: Vec<PadEntry>) -> AuthenticateRequest {
    AuthenticateRequest {
        peer_id: id(peer_id),
        local_id: id("gateway.example.org"),
        method: signed.method,
        auth: signed.auth,
        signed_octets: OCTETS.to_vec(),
        shared_key_mac: Arc::new(TestMac),
        certificates: signed.certificates,
        raw_key: signed.public_key.map(|key| key.der().to_vec()),
        entries,
        settings: SignatureSettings::default(),
    }
}

/// A peer with a P-256 key under `authority` proves `name`; the certificate is changed by `change`.
fn request_of(
    authority: &Authority,
    name: &str,
    change: impl FnOnce(&mut CertificateParams),
    entries: Vec<PadEntry>,
) -> AuthenticateRequest {
    let key = KeyPair::generate().unwrap();
    let certificate = authority.issue(name, &key, change);
    let (method, auth) = sign_with(&key, Some(&[2]));
    request(name, SignedAuth { method, auth, certificates: vec![certificate], public_key: None }, entries)
}

fn sign_with(key: &KeyPair, hashes: Option<&[u16]>) -> (AuthMethod, Vec<u8>) {
    let key = private_key(key);
    let ways = key.ways(hashes, &SignatureConstraints::default(), SignatureSettings::default());
    key.sign(OCTETS, ways[0]).unwrap()
}

fn private_key(key: &KeyPair) -> crate::signature::PrivateKey {
    crate::signature::PrivateKey::from_der(&key.serialize_der()).unwrap()
}

fn rsa_key() -> &'static KeyPair {
    static KEY: OnceLock<KeyPair> = OnceLock::new();
    KEY.get_or_init(|| KeyPair::from_pem(RSA_PKCS8).unwrap())
}

fn refused_certificate(result: Result<Admission, AuthError>) -> String {
    match result {
        Err(AuthError::Certificate { reason, .. }) => reason,
        other => panic!("expected a refused certificate, got {other:?}"),
    }
}

#[test]
fn chain_to_another_authority_is_refused() {
    let (ours, theirs) = (Authority::new("CA"), Authority::new("CA"));
    let request = request_of(&theirs, "moon.example.org", |_| (), pubkey("%any"));
    refused_certificate(trusting(&ours).authenticate(&request, NOW));
    refused_certificate(Credentials::new().authenticate(&request, NOW));
    assert!(trusting(&theirs).authenticate(&request, NOW).is_ok());
    // The peer cannot bring its own anchor along.
    let mut request = request;
    request.certificates.push(theirs.der());
    refused_certificate(trusting(&ours).authenticate(&request, NOW));
    refused_certificate(Credentials::new().authenticate(&request, NOW));
    // A certificate that is loaded, but not as an authority, vouches for nobody.
    let mut loaded = Credentials::new();
    loaded.add_certificate(&theirs.der()).unwrap();
    loaded.add_certificate(&request.certificates[0]).unwrap();
    refused_certificate(loaded.authenticate(&request, NOW));
}

#[test]
fn validity_is_checked_of_leaf_intermediate_and_anchor() {
    let authority = Authority::new("CA");
    let expired = |params: &mut CertificateParams| params.not_after = date_time_ymd(2026, 11, 1);
    let future = |params: &mut CertificateParams| params.not_before = date_time_ymd(2026, 12, 1);
    let credentials = trusting(&authority);
    for request in [
        request_of(&authority, "moon.example.org", expired, pubkey("%any")),
        request_of(&authority, "moon.example.org", future, pubkey("%any")),
    ] {
        refused_certificate(credentials.authenticate(&request, NOW));
    }
    for change in [expired, future] {
        let old = Authority::with("old CA", change);
        let request = request_of(&old, "moon.example.org", |_| (), pubkey("%any"));
        refused_certificate(trusting(&old).authenticate(&request, NOW));
        let intermediate = authority.below("intermediate", change);
        let mut request = request_of(&intermediate, "moon.example.org", |_| (), pubkey("%any"));
        request.certificates.push(intermediate.der());
        refused_certificate(credentials.authenticate(&request, NOW));
    }
}

#[test]
fn end_entity_does_not_issue_and_authority_does_not_authenticate() {
    let authority = Authority::new("CA");
    let credentials = trusting(&authority);
    let not_a_ca = authority.below("leaf", |params| params.is_ca = IsCa::NoCa);
    let mut request = request_of(&not_a_ca, "moon.example.org", |_| (), pubkey("%any"));
    request.certificates.push(not_a_ca.der());
    refused_certificate(credentials.authenticate(&request, NOW));
    // RFC 5280 §6.1.4 (n): CA:TRUE, but no keyCertSign.
    let no_cert_sign = authority.below("no keyCertSign", |p| p.key_usages = vec![KeyUsagePurpose::DigitalSignature]);
    let mut request = request_of(&no_cert_sign, "moon.example.org", |_| (), pubkey("%any"));
    request.certificates.push(no_cert_sign.der());
    refused_certificate(credentials.authenticate(&request, NOW));
    let is_ca = |params: &mut CertificateParams| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let request = request_of(&authority, "moon.example.org", is_ca, pubkey("%any"));
    refused_certificate(credentials.authenticate(&request, NOW));
}

// RFC 4945 §5.1.3.2 and §5.1.3.12
#[test]
fn key_usage_and_extended_key_usage_are_enforced() {
    let authority = Authority::new("CA");
    let credentials = trusting(&authority);
    let usages: [(&[KeyUsagePurpose], bool); 4] = [
        (&[], true),
        (&[KeyUsagePurpose::DigitalSignature], true),
        (&[KeyUsagePurpose::ContentCommitment], true),
        (&[KeyUsagePurpose::KeyEncipherment], false),
    ];
    for (usage, accepted) in usages {
        let change = |params: &mut CertificateParams| params.key_usages = usage.to_vec();
        let request = request_of(&authority, "moon.example.org", change, pubkey("%any"));
        assert_eq!(credentials.authenticate(&request, NOW).is_ok(), accepted, "{usage:?}");
    }
    let other = |oid: &[u64]| ExtendedKeyUsagePurpose::Other(oid.to_vec());
    let purposes: [(Vec<ExtendedKeyUsagePurpose>, bool); 9] = [
        (vec![], true),
        (vec![ExtendedKeyUsagePurpose::Any], true),
        (vec![other(&[1, 3, 6, 1, 5, 5, 7, 3, 17])], true),
        (vec![other(&[1, 3, 6, 1, 5, 5, 8, 2, 2])], true),
        (vec![ExtendedKeyUsagePurpose::ServerAuth], true),
        (vec![ExtendedKeyUsagePurpose::ClientAuth], true),
        (vec![ExtendedKeyUsagePurpose::CodeSigning, ExtendedKeyUsagePurpose::ClientAuth], true),
        (vec![ExtendedKeyUsagePurpose::CodeSigning], false),
        (vec![ExtendedKeyUsagePurpose::OcspSigning, ExtendedKeyUsagePurpose::TimeStamping], false),
    ];
    for (purposes, accepted) in purposes {
        let change = |params: &mut CertificateParams| params.extended_key_usages = purposes.clone();
        let request = request_of(&authority, "moon.example.org", change, pubkey("%any"));
        assert_eq!(credentials.authenticate(&request, NOW).is_ok(), accepted, "{purposes:?}");
    }
}

// RFC 4945 §3.1: the identity must be in the certificate.
#[test]
fn identity_that_is_not_in_the_certificate_is_refused() {
    let authority = Authority::new("CA");
    let credentials = trusting(&authority);
    let no_names = |params: &mut CertificateParams| params.subject_alt_names.clear();
    let wildcard = |params: &mut CertificateParams| {
        params.subject_alt_names = vec![SanType::DnsName("*.example.org".try_into().unwrap())];
    };
    let mut requests = vec![
        // The common name is not an identity.
        request_of(&authority, "moon.example.org", no_names, pubkey("%any")),
        request_of(&authority, "moon.example.org", wildcard, pubkey("%any")),
    ];
    for other in [
        "sun.example.org",
        "example.org",
        "a.moon.example.org",
        "moon@example.org",
        "192.0.2.1",
        "keyid:moon.example.org",
        "CN=moon.example.org",
        "O=Latchkey Test, CN=sun.example.org",
        "CN=moon.example.org, O=Latchkey Test",
        "O=Latchkey Test, CN=moon.example.org, OU=x",
        "keyid:x",
    ] {
        let mut request = request_of(&authority, "moon.example.org", |_| (), pubkey("%any"));
        request.peer_id = id(other);
        requests.push(request);
    }
    for request in requests {
        refused_certificate(credentials.authenticate(&request, NOW));
    }
    let mut request = request_of(&authority, "moon.example.org", |_| (), pubkey("%any"));
    request.peer_id = Identity::Other { kind: 13, data: Vec::new() };
    assert!(matches!(credentials.authenticate(&request, NOW), Err(AuthError::NoEntry(_))));
}

#[test]
fn identities_in_the_certificate_are_accepted() {
    let authority = Authority::new("CA");
    let credentials = trusting(&authority);
    for (name, asserted) in [
        ("moon.example.org", "MOON.example.org"),
        ("carol@example.org", "carol@example.org"),
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8::1", "2001:db8::1"),
        // The certificate has UTF8Strings, our encoding PrintableStrings.
        ("moon.example.org", "O=Latchkey Test, CN=moon.example.org"),
    ] {
        let mut request = request_of(&authority, name, |_| (), pubkey("%any"));
        request.peer_id = id(asserted);
        let peer = credentials.authenticate(&request, NOW).unwrap().peer;
        assert_eq!(peer.id, id(asserted));
        let expected = Proof::Certificate {
            end_entity: request.certificates[0].clone(),
            trust_anchor: authority.der(),
            method: AuthMethod::DIGITAL_SIGNATURE,
        };
        assert_eq!(peer.proof, expected);
    }
    let mut request = request_of(&authority, "moon.example.org", |p| p.is_ca = IsCa::ExplicitNoCa, pubkey("%any"));
    let key_id = Certificate::parse(&request.certificates[0]).unwrap().subject_key_identifier().unwrap().to_vec();
    request.peer_id = Identity::KeyId(key_id);
    assert!(credentials.authenticate(&request, NOW).is_ok());
}

#[test]
fn certificate_of_another_identity_of_the_same_authority_does_not_help() {
    let authority = Authority::new("CA");
    let credentials = trusting(&authority);
    let request = request_of(&authority, "sun.example.org", |_| (), pubkey("moon.example.org"));
    assert!(matches!(credentials.authenticate(&request, NOW), Err(AuthError::NoEntry(_))));
    // Sun shows moon's certificate, but has only its own key; or appends it to its own.
    let moon = request_of(&authority, "moon.example.org", |_| (), pubkey("moon.example.org"));
    let mut stolen = request_of(&authority, "sun.example.org", |_| (), pubkey("moon.example.org"));
    stolen.peer_id = id("moon.example.org");
    let own = std::mem::replace(&mut stolen.certificates, moon.certificates.clone());
    assert!(matches!(credentials.authenticate(&stolen, NOW), Err(AuthError::BadAuth(_))));
    stolen.certificates = [own.clone(), moon.certificates.clone()].concat();
    refused_certificate(credentials.authenticate(&stolen, NOW));
    stolen.certificates = [moon.certificates, own].concat();
    assert!(matches!(credentials.authenticate(&stolen, NOW), Err(AuthError::BadAuth(_))));
}

#[test]
fn wrong_signatures_are_refused() {
    let authority = Authority::new("CA");
    let credentials = trusting(&authority);
    let fresh = || request_of(&authority, "moon.example.org", |_| (), pubkey("%any"));
    let mut requests = [fresh(), fresh(), fresh(), fresh()];
    requests[0].signed_octets.push(0);
    requests[1].auth.pop();
    requests[2].auth.push(0);
    let last = requests[3].auth.len() - 1;
    requests[3].auth[last] ^= 1;
    for request in &requests {
        assert!(matches!(credentials.authenticate(request, NOW), Err(AuthError::BadAuth(_))));
    }
    let mut empty = fresh();
    empty.auth.clear();
    assert!(matches!(credentials.authenticate(&empty, NOW), Err(AuthError::Method { .. })));
}

#[test]
fn every_method_authenticates() {
    let authority = Authority::new("CA");
    let credentials = trusting(&authority);
    let (p256, p384, p521, ed25519) = (
        KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap(),
        KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap(),
        KeyPair::generate_for(&rcgen::PKCS_ECDSA_P521_SHA512).unwrap(),
        KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap(),
    );
    let all: Option<&[u16]> = Some(&[2, 3, 4, 5]);
    type Case<'a> = (&'a KeyPair, Option<&'a [u16]>, bool, Result<AuthMethod, ()>);
    let cases: [Case<'_>; 16] = [
        (rsa_key(), all, false, Ok(AuthMethod::DIGITAL_SIGNATURE)),
        (rsa_key(), all, true, Ok(AuthMethod::DIGITAL_SIGNATURE)),
        (rsa_key(), Some(&[3]), true, Ok(AuthMethod::DIGITAL_SIGNATURE)),
        (rsa_key(), Some(&[4]), true, Ok(AuthMethod::DIGITAL_SIGNATURE)),
        (rsa_key(), Some(&[4]), false, Ok(AuthMethod::DIGITAL_SIGNATURE)),
        // Method 1 would be SHA-1.
        (rsa_key(), None, false, Err(())),
        (rsa_key(), Some(&[1]), false, Err(())),
        (&p256, all, false, Ok(AuthMethod::DIGITAL_SIGNATURE)),
        (&p256, None, false, Ok(AuthMethod::ECDSA_256)),
        (&p384, all, false, Ok(AuthMethod::DIGITAL_SIGNATURE)),
        (&p384, Some(&[2]), false, Ok(AuthMethod::ECDSA_384)),
        (&p521, all, false, Ok(AuthMethod::DIGITAL_SIGNATURE)),
        (&p521, None, false, Ok(AuthMethod::ECDSA_521)),
        (&ed25519, all, false, Ok(AuthMethod::DIGITAL_SIGNATURE)),
        (&ed25519, Some(&[2, 3, 4]), false, Err(())),
        (&ed25519, None, false, Err(())),
    ];
    for (key, hashes, rsa_pss, expected) in cases {
        let certificate = authority.issue("moon.example.org", key, |_| ());
        let mut sign = sign_request("moon.example.org");
        sign.peer_hashes = hashes.map(<[u16]>::to_vec);
        sign.settings.rsa_pss = rsa_pss;
        let signed = peer(key, &[&certificate]).sign(&sign);
        match (signed, expected) {
            (Ok(signed), Ok(method)) => {
                assert_eq!(signed.method, method, "{hashes:?}");
                assert_eq!(signed.certificates, std::slice::from_ref(&certificate));
                let mut request = request("moon.example.org", signed, pubkey("*.example.org"));
                assert_eq!(credentials.authenticate(&request, NOW).unwrap().peer.id, id("moon.example.org"));
                request.signed_octets.push(1);
                assert!(matches!(credentials.authenticate(&request, NOW), Err(AuthError::BadAuth(_))));
            }
            (Err(SignError::Failed { .. }), Err(())) => {}
            (signed, expected) => panic!("{hashes:?} {signed:?} {expected:?}"),
        }
    }
}

// RFC 7296 §3.8: method 1 with SHA-1, as peers without RFC 7427 make it. Made with `openssl dgst -sha1 -sign`.
#[test]
fn method_1_with_sha1_is_accepted_and_method_14_with_sha1_is_not() {
    let authority = Authority::new("CA");
    let certificate = authority.issue("moon.example.org", rsa_key(), |_| ());
    let auth = include_bytes!("testdata/rsa-sha1.signature").to_vec();
    let signed =
        SignedAuth { method: AuthMethod::RSA, auth: auth.clone(), certificates: vec![certificate], public_key: None };
    let mut request = request("moon.example.org", signed, pubkey("%any"));
    request.signed_octets = b"octets".to_vec();
    let credentials = trusting(&authority);
    assert!(credentials.authenticate(&request, NOW).is_ok());
    request.method = AuthMethod::DIGITAL_SIGNATURE;
    let sha1_with_rsa = b"\x0f\x30\x0d\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x05\x05\x00";
    request.auth = [&sha1_with_rsa[..], &auth].concat();
    assert!(matches!(credentials.authenticate(&request, NOW), Err(AuthError::Method { .. })));
}

#[test]
fn chain_goes_over_intermediates_that_are_sent_or_loaded() {
    let root = Authority::new("root");
    let intermediate = root.below("intermediate", |_| ());
    let key = KeyPair::generate().unwrap();
    let certificate = intermediate.issue("moon.example.org", &key, |_| ());
    let mut moon = peer(&key, &[&certificate, &intermediate.der()]);
    moon.add_authority(&root.der()).unwrap();
    let signed = moon.sign(&sign_request("moon.example.org")).unwrap();
    assert_eq!(signed.certificates, [certificate.clone(), intermediate.der()], "without the anchor");
    let mut request = request("moon.example.org", signed, pubkey("%any"));
    assert!(trusting(&root).authenticate(&request, NOW).is_ok());
    request.certificates.truncate(1);
    refused_certificate(trusting(&root).authenticate(&request, NOW));
    let mut loaded = trusting(&root);
    loaded.add_certificate(&intermediate.der()).unwrap();
    assert!(loaded.authenticate(&request, NOW).is_ok());
    // Without CERT payloads a loaded certificate of that identity is used.
    request.certificates.clear();
    refused_certificate(loaded.authenticate(&request, NOW));
    loaded.add_certificate(&certificate).unwrap();
    assert!(loaded.authenticate(&request, NOW).is_ok());
}

#[test]
fn cacerts_of_the_entry_bind_the_chain() {
    let (one, other) = (Authority::new("one"), Authority::new("other"));
    let intermediate = one.below("intermediate", |_| ());
    let mut credentials = trusting(&one);
    credentials.add_authority(&other.der()).unwrap();
    let with_cacerts = |ders: &[Vec<u8>]| {
        let mut entries = pubkey("%any");
        entries[0].cacerts = ders.to_vec();
        entries
    };
    let mut request = request_of(&intermediate, "moon.example.org", |_| (), pubkey("%any"));
    request.certificates.push(intermediate.der());
    let leaf = request.certificates[0].clone();
    for (cacerts, accepted) in [
        (vec![], true),
        (vec![one.der()], true),
        (vec![intermediate.der()], true),
        (vec![other.der(), one.der()], true),
        (vec![other.der()], false),
        (vec![leaf], false),
        (vec![b"garbage".to_vec()], false),
    ] {
        request.entries = with_cacerts(&cacerts);
        assert_eq!(credentials.authenticate(&request, NOW).is_ok(), accepted);
    }
}

#[test]
fn pinned_certificate_is_its_own_anchor_but_still_expires() {
    let key = KeyPair::generate().unwrap();
    let self_signed = |change: fn(&mut CertificateParams)| {
        let mut params = end_entity_params("moon.example.org");
        change(&mut params);
        params.self_signed(&key).unwrap().der().to_vec()
    };
    let authority = Authority::new("CA");
    let pinned = |ders: &[&[u8]]| {
        let mut entries = pubkey("moon.example.org");
        entries[0].certs = ders.iter().map(|der| der.to_vec()).collect();
        entries
    };
    let plain = self_signed(|_| ());
    let ca = self_signed(|params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained));
    let expired = self_signed(|params| params.not_after = date_time_ymd(2026, 2, 1));
    let issued = authority.issue("moon.example.org", &key, |_| ());
    let (method, auth) = sign_with(&key, None);
    let sent = |certificate: &[u8], entries| {
        let signed =
            SignedAuth { method, auth: auth.clone(), certificates: vec![certificate.to_vec()], public_key: None };
        request("moon.example.org", signed, entries)
    };
    let nothing = Credentials::new();
    let accepts = |request| nothing.authenticate(&request, NOW).is_ok();
    assert!(accepts(sent(&plain, pinned(&[&plain]))));
    assert!(accepts(sent(&ca, pinned(&[&issued, &ca]))));
    assert!(!accepts(sent(&expired, pinned(&[&expired]))));
    assert!(!accepts(sent(&plain, pinned(&[&issued]))), "same key and name, another certificate");
    assert!(!accepts(sent(&plain, pubkey("moon.example.org"))), "not pinned");
    let mut other_identity = sent(&plain, pinned(&[&plain]));
    other_identity.peer_id = id("sun.example.org");
    other_identity.entries[0].remote_id = IdentityPattern::any();
    assert!(!accepts(other_identity));
    let mut not_sent = sent(&plain, pinned(&[&plain]));
    not_sent.certificates.clear();
    assert!(accepts(not_sent));
    // A pin does not lift the entry's cacerts, and a trusted CA does not lift the pin.
    let mut both = sent(&plain, pinned(&[&plain]));
    both.entries[0].cacerts = vec![authority.der()];
    assert!(!accepts(both));
    assert!(trusting(&authority).authenticate(&sent(&issued, pinned(&[&plain])), NOW).is_err());
}

#[test]
fn proof_of_another_class_is_refused() {
    let authority = Authority::new("CA");
    let mut credentials = trusting(&authority);
    credentials.add_shared_secret(None, Vec::new(), Secret::new(b"secret".to_vec())).unwrap();
    let by_secret = |entries| {
        let auth = TestMac.mac(&Secret::new(b"secret".to_vec()));
        let signed = SignedAuth { method: AuthMethod::SHARED_KEY, auth, certificates: Vec::new(), public_key: None };
        request("moon.example.org", signed, entries)
    };
    let psk = |pattern: &str| vec![entry("psk", pattern, AuthClass::SharedKey)];
    assert!(credentials.authenticate(&by_secret(psk("%any")), NOW).is_ok());
    assert!(matches!(credentials.authenticate(&by_secret(pubkey("%any")), NOW), Err(AuthError::NoEntry(_))));
    let by_certificate = request_of(&authority, "moon.example.org", |_| (), psk("%any"));
    assert!(matches!(credentials.authenticate(&by_certificate, NOW), Err(AuthError::NoEntry(_))));
    for method in [0, 3, 12, 13, 255] {
        let mut unknown = by_secret([psk("%any"), pubkey("%any")].concat());
        unknown.method = AuthMethod(method);
        assert!(matches!(credentials.authenticate(&unknown, NOW), Err(AuthError::Method { .. })));
    }
    assert!(matches!(credentials.authenticate(&by_secret(Vec::new()), NOW), Err(AuthError::NoEntry(_))));
}

// RFC 4301 §4.4.3: the entry that names the identity says how it is proved.
#[test]
fn later_entry_with_weaker_proof_is_out_of_reach() {
    let authority = Authority::new("CA");
    let mut credentials = trusting(&authority);
    credentials.add_shared_secret(None, Vec::new(), Secret::new(b"everybody's".to_vec())).unwrap();
    let exact = entry("exact", "db.example.org", AuthClass::PublicKey);
    let wildcard = entry("wildcard", "*.example.org", AuthClass::SharedKey);
    let any = entry("any", "%any", AuthClass::SharedKey);
    let by_secret = |peer: &str, entries: &[&PadEntry]| {
        let auth = TestMac.mac(&Secret::new(b"everybody's".to_vec()));
        let signed = SignedAuth { method: AuthMethod::SHARED_KEY, auth, certificates: Vec::new(), public_key: None };
        let entries = entries.iter().map(|entry| (*entry).clone()).collect();
        credentials.authenticate(&request(peer, signed, entries), NOW).map(|admission| admission.peer.entry)
    };
    assert!(matches!(by_secret("db.example.org", &[&exact, &wildcard, &any]), Err(AuthError::NoEntry(_))));
    assert!(matches!(by_secret("db.example.org", &[&any, &exact]), Err(AuthError::NoEntry(_))));
    assert_eq!(by_secret("pc.example.org", &[&exact, &any, &wildcard]).unwrap(), "wildcard");
    assert_eq!(by_secret("pc.example.net", &[&exact, &wildcard, &any]).unwrap(), "any");
    let second = entry("second", "%any", AuthClass::SharedKey);
    assert_eq!(by_secret("pc.example.net", &[&any, &second]).unwrap(), "any");
    // A peer with a pinned certificate does not come in by another one through a wider entry.
    let mut pinned = exact.clone();
    pinned.certs = vec![authority.der()];
    let wide = entry("wide", "%any", AuthClass::PublicKey);
    let request = request_of(&authority, "db.example.org", |_| (), vec![pinned, wide]);
    refused_certificate(credentials.authenticate(&request, NOW));
}

#[test]
fn first_entry_that_admits_wins() {
    let (one, other) = (Authority::new("one"), Authority::new("other"));
    let mut credentials = trusting(&one);
    credentials.add_authority(&other.der()).unwrap();
    let named = |name: &str, cacert: &Authority| {
        let mut entry = entry(name, "%any", AuthClass::PublicKey);
        entry.cacerts = vec![cacert.der()];
        entry
    };
    let entries = vec![named("first", &other), named("second", &one), named("third", &one)];
    let request = request_of(&one, "moon.example.org", |_| (), entries);
    assert_eq!(credentials.authenticate(&request, NOW).unwrap().peer.entry, "second");
}

#[test]
fn shared_secret_is_the_best_match_and_never_another_peers() {
    let mut credentials = Credentials::new();
    let mut add = |name: &str, owners: &[&str]| {
        let owners = owners.iter().map(|owner| IdentityPattern::parse(owner).unwrap()).collect();
        let secret = Secret::new(name.as_bytes().to_vec());
        credentials.add_shared_secret(Some(name.to_owned()), owners, secret).unwrap();
    };
    add("carol", &["gateway.example.org", "carol@example.org"]);
    add("guests", &["*@example.org"]);
    add("dave", &["dave@example.org"]);
    let chosen = |local: &str, remote: &str| {
        let secret = credentials.shared_secret(&id(local), Some(&id(remote)));
        secret.map(|secret| String::from_utf8(secret.expose().to_vec()).unwrap())
    };
    let gateway = "gateway.example.org";
    assert_eq!(chosen(gateway, "carol@example.org").as_deref(), Some("carol"));
    assert_eq!(chosen(gateway, "dave@example.org").as_deref(), Some("dave"));
    assert_eq!(chosen(gateway, "guest@example.org").as_deref(), Some("guests"));
    // Carol shares a secret with us; that does not make her somebody else, nor us.
    assert_eq!(chosen(gateway, "mallory@example.net"), None);
    assert_eq!(chosen(gateway, gateway), None);
    let mut credentials = Credentials::new();
    credentials.add_shared_secret(None, vec![IdentityPattern::exact(id(gateway))], Secret::new(vec![1])).unwrap();
    assert!(credentials.shared_secret(&id(gateway), Some(&id("anybody"))).is_some());
    assert!(credentials.shared_secret(&id("sun"), Some(&id("anybody"))).is_none());
    assert!(credentials.shared_secret(&id("sun"), Some(&id(gateway))).is_some());
    let empty = credentials.add_shared_secret(None, Vec::new(), Secret::new(Vec::new()));
    assert!(matches!(empty, Err(CredentialError::EmptySecret)));
}

// RFC 7296 §2.15: who shares a secret with us can pretend to be anybody whom that secret is good for.
#[test]
fn secret_of_a_pattern_is_for_those_whom_the_pattern_names() {
    let chosen = |owners: &[&str], remote: &str| {
        let mut credentials = Credentials::new();
        let owners = owners.iter().map(|owner| IdentityPattern::parse(owner).unwrap()).collect();
        credentials.add_shared_secret(None, owners, Secret::new(vec![1])).unwrap();
        credentials.shared_secret(&id("gateway.example.org"), Some(&id(remote))).is_some()
    };
    // The pattern names us too; that does not make it a secret towards everybody.
    assert!(!chosen(&["*.example.org"], "mallory.example.net"));
    assert!(!chosen(&["gateway.example.org", "*.example.org"], "mallory.example.net"));
    assert!(!chosen(&["*.example.org"], "gateway.example.org"), "we are nobody's peer");
    assert!(chosen(&["*.example.org"], "pc.example.org"));
    assert!(chosen(&["gateway.example.org", "*.example.org"], "pc.example.org"));
    assert!(chosen(&["%any"], "mallory.example.net"));
    assert!(chosen(&["gateway.example.org", "%any"], "mallory.example.net"));
}

#[test]
fn wrong_or_missing_shared_secret_is_refused() {
    let mut credentials = Credentials::new();
    let by_secret = |auth: &[u8]| {
        let signed = SignedAuth {
            method: AuthMethod::SHARED_KEY,
            auth: auth.to_vec(),
            certificates: Vec::new(),
            public_key: None,
        };
        request("carol@example.org", signed, vec![entry("rw", "%any", AuthClass::SharedKey)])
    };
    let good = TestMac.mac(&Secret::new(b"secret".to_vec()));
    assert!(matches!(credentials.authenticate(&by_secret(&good), NOW), Err(AuthError::NoSharedKey(_))));
    credentials.add_shared_secret(Some("x".into()), Vec::new(), Secret::new(b"secret".to_vec())).unwrap();
    assert_eq!(credentials.authenticate(&by_secret(&good), NOW).unwrap().peer.proof, Proof::PreSharedKey);
    for bad in [&b""[..], b"mac over ", b"mac over secret2", b"mac over Secret"] {
        assert!(matches!(credentials.authenticate(&by_secret(bad), NOW), Err(AuthError::BadAuth(_))));
    }
    assert!(credentials.remove_shared_secret("x") && !credentials.remove_shared_secret("x"));
    assert!(matches!(credentials.authenticate(&by_secret(&good), NOW), Err(AuthError::NoSharedKey(_))));
}

#[test]
fn signing_needs_identity_certificate_and_key_to_belong_together() {
    let authority = Authority::new("CA");
    let (one, other) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let certificate = authority.issue("moon.example.org", &one, |_| ());
    let no_key = |credentials: &Credentials, request: &SignRequest| {
        assert!(matches!(credentials.sign(request), Err(SignError::NoKey(_))));
    };
    no_key(&peer(&other, &[&certificate]), &sign_request("moon.example.org"));
    no_key(&peer(&one, &[]), &sign_request("moon.example.org"));
    let credentials = peer(&one, &[&certificate]);
    no_key(&credentials, &sign_request("sun.example.org"));
    let mut restricted = sign_request("moon.example.org");
    restricted.auth.certificates = vec![authority.issue("moon.example.org", &other, |_| ())];
    no_key(&credentials, &restricted);
    restricted.auth.certificates = vec![certificate.clone()];
    assert_eq!(peer(&one, &[]).sign(&restricted).unwrap().certificates, [certificate]);
    let mut psk = sign_request("moon.example.org");
    psk.auth.class = AuthClass::SharedKey;
    assert!(matches!(credentials.sign(&psk), Err(SignError::NoSharedKey(_))));
}

// RFC 7296 §3.7
#[test]
fn certificate_request_chooses_among_our_certificates() {
    let (one, two) = (Authority::new("one"), Authority::new("two"));
    let key = KeyPair::generate().unwrap();
    let (first, second) = (one.issue("moon.example.org", &key, |_| ()), two.issue("moon.example.org", &key, |_| ()));
    let mut credentials = peer(&key, &[&first, &second]);
    credentials.add_authority(&one.der()).unwrap();
    credentials.add_authority(&two.der()).unwrap();
    let mut request = sign_request("moon.example.org");
    assert_eq!(credentials.sign(&request).unwrap().certificates, std::slice::from_ref(&first));
    request.cert_requests = trusting(&two).authority_hashes();
    assert_eq!(credentials.sign(&request).unwrap().certificates, [second]);
    request.cert_requests = vec![[0; 20]];
    assert_eq!(credentials.sign(&request).unwrap().certificates, [first]);
}

#[test]
fn hostile_certificates_do_not_panic_and_are_bounded() {
    let authority = Authority::new("CA");
    let credentials = trusting(&authority);
    let good = request_of(&authority, "moon.example.org", |_| (), pubkey("%any"));
    let with = |certificates: Vec<Vec<u8>>| {
        let signed = SignedAuth { method: good.method, auth: good.auth.clone(), certificates, public_key: None };
        request("moon.example.org", signed, pubkey("%any"))
    };
    let leaf = good.certificates[0].clone();
    refused_certificate(credentials.authenticate(&with(vec![leaf.clone(); 17]), NOW));
    refused_certificate(credentials.authenticate(&with(vec![vec![0x30; 65 * 1024]]), NOW));
    refused_certificate(credentials.authenticate(&with(vec![[&leaf[..], b"\0"].concat()]), NOW));
    refused_certificate(credentials.authenticate(&with(vec![Vec::new()]), NOW));
    let garbage = vec![leaf.clone(), b"garbage".to_vec(), Vec::new(), vec![0x30; 70_000]];
    assert!(credentials.authenticate(&with(garbage), NOW).is_ok(), "a broken extra certificate is not needed");
    for position in 0..leaf.len() {
        let mut changed = leaf.clone();
        changed[position] ^= 0x11;
        assert!(credentials.authenticate(&with(vec![changed]), NOW).is_err(), "octet {position}");
        assert!(credentials.authenticate(&with(vec![leaf[..position].to_vec()]), NOW).is_err());
    }
}

#[test]
fn private_keys_load_in_every_format() {
    let rsa = "e156dac18510f2e9207b7cb4b73aaced2ac57455";
    type Case<'a> = (&'a [u8], Option<&'a [u8]>, &'a str);
    let keys: [Case<'_>; 6] = [
        (RSA_PKCS1, None, rsa),
        (RSA_PKCS8.as_bytes(), None, rsa),
        (RSA_ENCRYPTED, Some(b"mountain"), rsa),
        (include_bytes!("testdata/p256.sec1.pem"), None, "335035888c4451a2e8bcac3a4bda79d8536eff78"),
        (include_bytes!("testdata/p521.sec1.pem"), None, "c05ca52a6c77808e4c0bea53897469e3d3d74f86"),
        (include_bytes!("testdata/ed25519.pkcs8.pem"), None, "c264af3ede37dcd1994fe5ea646a9abdcce897e1"),
    ];
    let mut credentials = Credentials::new();
    for (data, passphrase, id) in keys {
        // The ids are `sha1sum` of the subjectPublicKey that openssl shows.
        assert_eq!(credentials.add_private_key(data, passphrase).unwrap(), id);
        let der = store::private_key_der(data).unwrap();
        assert_eq!(credentials.add_private_key(&der, passphrase).unwrap(), id, "in DER");
    }
    assert_eq!(credentials.private_key_ids().len(), 4);
    let encrypted = |passphrase| Credentials::new().add_private_key(RSA_ENCRYPTED, passphrase);
    assert!(matches!(encrypted(None), Err(CredentialError::Encrypted(_))));
    assert!(matches!(encrypted(Some(b"wrong")), Err(CredentialError::Encrypted(_))));
    for data in [&b""[..], b"garbage", include_bytes!("testdata/rsa1024.pkcs1.pem"), b"-----BEGIN PRIVATE KEY-----"] {
        assert!(matches!(Credentials::new().add_private_key(data, None), Err(CredentialError::PrivateKey)));
    }
    assert!(credentials.remove_private_key(rsa) && !credentials.remove_private_key(rsa));
    assert!(!format!("{credentials:?}").contains("BEGIN"));
}

#[test]
fn only_authorities_become_trust_anchors() {
    let authority = Authority::new("CA");
    let key = KeyPair::generate().unwrap();
    let leaf = authority.issue("moon.example.org", &key, |_| ());
    let mut credentials = Credentials::new();
    let error = credentials.add_authority(&leaf).unwrap_err();
    assert_eq!(error.to_string(), "certificate without CA flag, rejected");
    assert!(credentials.add_authority(b"garbage").is_err() && credentials.authority_hashes().is_empty());
    credentials.add_authority(authority.issuer.pem().as_bytes()).unwrap();
    credentials.add_authority(&authority.der()).unwrap();
    credentials.add_certificate(&leaf).unwrap();
    credentials.add_private_key(&key.serialize_der(), None).unwrap();
    let snapshot = credentials.clone();
    credentials.clear();
    assert!(credentials.stored_certificates().is_empty());
    let stored = snapshot.stored_certificates();
    let seen: Vec<_> = stored.iter().map(|stored| (stored.is_trust_anchor, stored.has_private_key)).collect();
    assert_eq!(seen, [(true, false), (false, true)]);
    assert_eq!(snapshot.authority_hashes(), [stored[0].certificate.public_key_info_hash()]);
    let leaf = &stored[1].certificate;
    assert_eq!(leaf.subject().unwrap().to_string(), "O=Latchkey Test, CN=moon.example.org");
    assert_eq!(leaf.issuer().unwrap().to_string(), "O=Latchkey Test, CN=CA");
    assert_eq!(leaf.alternative_names(), [id("moon.example.org")]);
    assert_eq!((leaf.key_bits(), leaf.key_type()), (256, Some(crate::KeyType::EcdsaP256)));
    assert_eq!([leaf.key_id()], snapshot.private_key_ids().as_slice());
}

fn constrained(text: &str) -> Vec<PadEntry> {
    let mut entries = pubkey("*.example.org");
    entries[0].constraints = SignatureConstraints::parse(text).unwrap();
    entries
}

// swanctl.conf(5), `remote.auth`: key strength and hashes of the whole chain and of the signature in AUTH.
#[test]
fn constraints_hold_for_the_chain_and_for_auth_of_the_peer() {
    // P-256 with SHA-256 throughout.
    let authority = Authority::new("CA");
    let credentials = trusting(&authority);
    let certificate_only =
        ["ecdsa-384", "rsa-2048", "rsa-2048-ecdsa-384", "ed25519", "pubkey-sha384", "pubkey-identity"];
    for text in certificate_only {
        let request = request_of(&authority, "moon.example.org", |_| (), constrained(text));
        let refused = credentials.authenticate(&request, NOW);
        assert!(
            matches!(refused, Err(AuthError::Certificate { .. } | AuthError::Method { .. })),
            "{text}: {refused:?}"
        );
    }
    for text in ["ike:ecdsa-sha384", "ike:rsa-sha256", "ike:rsa/pss-sha256", "ike:ed25519-identity"] {
        let request = request_of(&authority, "moon.example.org", |_| (), constrained(text));
        let refused = credentials.authenticate(&request, NOW);
        assert!(refused.is_err(), "{text}");
    }
    for text in ["pubkey", "ecdsa", "ecdsa-256", "rsa-2048-ecdsa-256", "pubkey-sha384-sha256", "ike:pubkey-sha256"] {
        let request = request_of(&authority, "moon.example.org", |_| (), constrained(text));
        assert!(credentials.authenticate(&request, NOW).is_ok(), "{text}");
    }
    // Nor is an intermediate or the authority weaker than asked for.
    let below = authority.below("intermediate", |_| ());
    let p384 = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
    let certificate = below.issue("moon.example.org", &p384, |_| ());
    let (method, auth) = sign_with(&p384, Some(&[3]));
    let signed = SignedAuth { method, auth, certificates: vec![certificate, below.der()], public_key: None };
    let mut request = request("moon.example.org", signed, constrained("ecdsa-384"));
    assert!(matches!(credentials.authenticate(&request, NOW), Err(AuthError::Certificate { .. })));
    request.entries = constrained("ecdsa-256-sha384");
    assert!(credentials.authenticate(&request, NOW).is_err(), "the chain is signed with SHA-256");
    request.entries = constrained("ecdsa-256-sha256-ike:ecdsa-sha384");
    assert!(credentials.authenticate(&request, NOW).is_ok());
    // A pinned certificate has no chain, but it has a key.
    let pinned = request.certificates[0].clone();
    request.entries = constrained("ecdsa-521");
    request.entries[0].certs = vec![pinned.clone()];
    assert!(credentials.authenticate(&request, NOW).is_err());
    request.entries = constrained("ecdsa-384");
    request.entries[0].certs = vec![pinned];
    assert!(credentials.authenticate(&request, NOW).is_ok());
}

// The first entry that the whole proof fits admits the peer: one with constraints is not skipped half-checked.
#[test]
fn constraints_are_those_of_the_entry_that_admits() {
    let authority = Authority::new("CA");
    let mut entries = constrained("ecdsa-384");
    entries.extend(constrained("ecdsa-256"));
    entries[0].name = "strong".to_owned();
    let request = request_of(&authority, "moon.example.org", |_| (), entries);
    assert_eq!(trusting(&authority).authenticate(&request, NOW).unwrap().peer.entry, "conn");
}

// swanctl.conf(5), `remote.auth`: method 1 with SHA-1 is not what a constraint on hashes can mean.
#[test]
fn constraints_on_hashes_refuse_sha1() {
    let authority = Authority::new("CA");
    let certificate = authority.issue("moon.example.org", rsa_key(), |_| ());
    let auth = include_bytes!("testdata/rsa-sha1.signature").to_vec();
    let signed = SignedAuth { method: AuthMethod::RSA, auth, certificates: vec![certificate], public_key: None };
    let mut request = request("moon.example.org", signed, constrained("ike:rsa-sha256-sha384-sha512"));
    request.signed_octets = b"octets".to_vec();
    assert!(matches!(trusting(&authority).authenticate(&request, NOW), Err(AuthError::Method { .. })));
}

/// OID and hash of a method 14 AUTH value.
fn algorithm_of(signed: &SignedAuth) -> &[u8] {
    assert_eq!(signed.method, AuthMethod::DIGITAL_SIGNATURE);
    &signed.auth[1..1 + usize::from(signed.auth[0])]
}

// swanctl.conf(5), `local.auth`: the order is that of the configuration, as far as the peer knows the hash.
#[test]
fn constraints_choose_our_signature() {
    let authority = Authority::new("CA");
    let certificate = authority.issue("moon.example.org", rsa_key(), |_| ());
    let moon = peer(rsa_key(), &[&certificate]);
    let sign = |text: &str, hashes: &[u16], rsa_pss| {
        let mut sign = sign_request("moon.example.org");
        sign.auth.constraints = SignatureConstraints::parse(text).unwrap();
        sign.peer_hashes = Some(hashes.to_vec());
        sign.settings.rsa_pss = rsa_pss;
        moon.sign(&sign).map(|signed| algorithm_of(&signed).to_vec())
    };
    let scheme = |text: &str, hashes: &[u16], rsa_pss| {
        let algorithm = sign(text, hashes, rsa_pss).unwrap();
        format!("{:?}", crate::signature::Scheme::of_certificate(&algorithm).unwrap())
    };
    assert_eq!(scheme("pubkey", &[4, 3, 2], false), "Pkcs1(Sha256)");
    assert_eq!(scheme("pubkey", &[4, 3, 2], true), "Pss(Sha256)");
    assert_eq!(scheme("pubkey-sha512-sha256", &[2, 3, 4], false), "Pkcs1(Sha512)");
    assert_eq!(scheme("pubkey-sha512-sha256", &[2, 3], false), "Pkcs1(Sha256)");
    assert_eq!(scheme("pubkey-sha256-ike:rsa/pss-sha384", &[2, 3, 4], false), "Pss(Sha384)");
    assert_eq!(scheme("rsa-sha384", &[2, 3, 4], true), "Pss(Sha384)");
    assert!(matches!(sign("rsa-sha512", &[2, 3], false), Err(SignError::Failed { .. })));
    assert!(matches!(sign("ecdsa", &[2, 3], false), Err(SignError::NoKey(_))));
    assert!(matches!(sign("rsa-8192", &[2, 3], false), Err(SignError::NoKey(_))));
}

// RFC 9593 §3: of several certificates that which the peer says it can verify.
#[test]
fn announcements_choose_the_credential() {
    let authority = Authority::new("CA");
    let other = Authority::new("other CA");
    let p256 = KeyPair::generate().unwrap();
    let of_rsa = authority.issue("moon.example.org", rsa_key(), |_| ());
    let of_p256 = other.issue("moon.example.org", &p256, |_| ());
    let mut moon = peer(rsa_key(), &[&of_rsa, &of_p256]);
    moon.add_private_key(p256.serialize_pem().as_bytes(), None).unwrap();
    moon.add_authority(&authority.der()).unwrap();
    moon.add_authority(&other.der()).unwrap();
    let chosen = |announced: Option<Vec<AuthAnnouncement>>, requests: Vec<[u8; 20]>| {
        let mut sign = sign_request("moon.example.org");
        sign.announced = announced;
        sign.cert_requests = requests;
        let signed = moon.sign(&sign).unwrap();
        (signed.method, signed.certificates[0] == of_p256)
    };
    let of_entry = |text: &str| {
        let entry = constrained(text).remove(0);
        AuthAnnouncement::parse_all(&AuthAnnouncement::of_entries(&[&entry], SignatureSettings::default()))
    };
    let digital = AuthMethod::DIGITAL_SIGNATURE;
    assert_eq!(chosen(None, Vec::new()), (digital, false));
    assert_eq!(chosen(of_entry("ecdsa"), Vec::new()), (digital, true));
    assert_eq!(chosen(of_entry("rsa/pss-sha512"), Vec::new()), (digital, false));
    let own =
        |cert_link| Some(vec![AuthAnnouncement { method: AuthMethod::ECDSA_256, cert_link, algorithm: Vec::new() }]);
    assert_eq!(chosen(own(0), Vec::new()), (AuthMethod::ECDSA_256, true));
    // The link names an authority that did not issue it, then the one that did, then none.
    let hashes = [&authority, &other].map(|ca| Certificate::parse(&ca.der()).unwrap().public_key_info_hash());
    assert_eq!(chosen(own(1), hashes.to_vec()), (digital, false));
    assert_eq!(chosen(own(2), hashes.to_vec()), (AuthMethod::ECDSA_256, true));
    assert_eq!(chosen(own(9), hashes.to_vec()), (digital, false));
    // What fits nothing of ours leaves the choice as it was: the peer may know more than it says.
    assert_eq!(chosen(Some(Vec::new()), Vec::new()), (digital, false));
    assert_eq!(chosen(of_entry("ed25519"), Vec::new()), (digital, false));
}

// RFC 7619 §2, §2.2: NULL authentication is for entries that say so, and has no name; no other method comes with ID_NULL.
#[test]
fn nobody_gets_in_only_where_an_entry_says_so() {
    let nobody = |class| PadEntry {
        remote_id: IdentityPattern::exact(Identity::Null),
        class,
        ..entry("conn", "%any", AuthClass::SharedKey)
    };
    let from = |peer_id: Identity, method, auth: &[u8], entries: Vec<PadEntry>| AuthenticateRequest {
        peer_id,
        ..request(
            "moon.example.org",
            SignedAuth { method, auth: auth.to_vec(), certificates: Vec::new(), public_key: None },
            entries,
        )
    };
    let credentials = Credentials::new();
    let good = b"mac of nobody";
    let admitted = credentials
        .authenticate(&from(Identity::Null, AuthMethod::NULL, good, vec![nobody(AuthClass::Null)]), NOW)
        .unwrap();
    assert_eq!(admitted.peer.id, Identity::Null);
    assert!(matches!(admitted.peer.proof, Proof::Unauthenticated { .. }));
    let refused = |request| credentials.authenticate(&request, NOW).unwrap_err().to_string();
    for entries in [
        vec![nobody(AuthClass::SharedKey)],
        vec![nobody(AuthClass::PublicKey)],
        vec![entry("conn", "%any", AuthClass::SharedKey)],
        Vec::new(),
    ] {
        assert!(refused(from(Identity::Null, AuthMethod::NULL, good, entries)).contains("no entry admits"));
    }
    for auth in [&b"mac of nobodx"[..], b""] {
        let wrong = from(Identity::Null, AuthMethod::NULL, auth, vec![nobody(AuthClass::Null)]);
        assert!(refused(wrong).contains("is wrong"));
    }
    let named = PadEntry { class: AuthClass::Null, ..entry("conn", "moon.example.org", AuthClass::Null) };
    assert!(refused(from(id("moon.example.org"), AuthMethod::NULL, good, vec![named])).contains("go together"));
    for method in [AuthMethod::SHARED_KEY, AuthMethod::DIGITAL_SIGNATURE, AuthMethod::RSA] {
        assert!(refused(from(Identity::Null, method, good, vec![nobody(AuthClass::Null)])).contains("go together"));
    }
}
