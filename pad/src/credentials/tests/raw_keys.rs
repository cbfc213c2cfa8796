//! Peers that are known by their keys (RFC 7670). Nothing that comes on the wire makes a key trusted.

use rcgen::PublicKeyData;

use super::*;

const PEER: &str = "moon.example.org";

fn raw(key: &KeyPair) -> PublicKey {
    PublicKey::parse(&key.subject_public_key_info()).unwrap()
}

/// An entry that knows the peer by these keys.
fn knowing(pattern: &str, keys: &[&KeyPair]) -> PadEntry {
    PadEntry { public_keys: keys.iter().map(|key| raw(key)).collect(), ..entry("conn", pattern, AuthClass::PublicKey) }
}

/// A peer's proof with this key; without any CERT payload.
fn proof(key: &KeyPair) -> SignedAuth {
    let (method, auth) = sign_with(key, Some(&[2, 3, 4, 5]));
    SignedAuth { method, auth, certificates: Vec::new(), public_key: None }
}

fn shown(key: &KeyPair) -> SignedAuth {
    SignedAuth { public_key: Some(raw(key)), ..proof(key) }
}

fn admits(
    credentials: &Credentials,
    peer_id: &Identity,
    signed: SignedAuth,
    entries: Vec<PadEntry>,
) -> Result<Proof, String> {
    let request = AuthenticateRequest { peer_id: peer_id.clone(), ..request(PEER, signed, entries) };
    credentials.authenticate(&request, NOW).map(|admission| admission.peer.proof).map_err(|error| error.to_string())
}

fn refusal(credentials: &Credentials, peer_id: &Identity, signed: SignedAuth, entries: Vec<PadEntry>) -> String {
    admits(credentials, peer_id, signed, entries).unwrap_err()
}

// RFC 7670 §4: a key is trusted because the configuration has it.
#[test]
fn a_stranger_s_key_is_no_proof_however_it_comes() {
    let (known, stranger) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let authority = Authority::new("ca");
    let credentials = trusting(&authority);
    let certificate = authority.issue(PEER, &stranger, |_| ());
    let entries = || vec![knowing(PEER, &[&known])];
    let certified = || SignedAuth { certificates: vec![certificate.clone()], ..proof(&stranger) };
    let wrong = "the AUTH value of moon.example.org is wrong";
    let unnamed = "the raw public key of moon.example.org is not acceptable: it is none that the configuration names";
    for (signed, reason) in [
        (proof(&stranger), wrong),
        (shown(&stranger), unnamed),
        // Even with a certificate of a trusted CA for this identity.
        (certified(), wrong),
        (SignedAuth { public_key: Some(raw(&stranger)), ..certified() }, unnamed),
        // It shows one key and signs with another.
        (SignedAuth { public_key: Some(raw(&known)), ..proof(&stranger) }, wrong),
        (SignedAuth { public_key: Some(raw(&stranger)), ..proof(&known) }, unnamed),
        (SignedAuth { auth: Vec::new(), ..proof(&known) }, "moon.example.org uses an authentication method"),
    ] {
        let refusal = refusal(&credentials, &id(PEER), signed, entries());
        assert!(refusal.starts_with(reason), "{reason}: {refusal}");
    }
    // Where certificates are asked for, a key that comes along changes nothing.
    assert!(admits(&credentials, &id(PEER), certified(), pubkey(PEER)).is_ok());
    let refusal = refusal(&credentials, &id(PEER), shown(&stranger), pubkey(PEER));
    assert!(refusal.contains("it sent none and we know none"), "{refusal}");
}

#[test]
fn a_known_key_is_no_proof_of_another_identity() {
    let (known, other) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let credentials = Credentials::new();
    let (key_id, other_id) = (raw(&known).identity(), raw(&other).identity());
    for (pattern, asserted) in [
        (PEER, &id("sun.example.org")),
        (PEER, &key_id),
        ("%any", &id(PEER)),
        ("*.example.org", &id(PEER)),
        ("%any", &other_id),
        ("%any", &Identity::KeyId(Vec::new())),
    ] {
        let refusal = refusal(&credentials, asserted, shown(&known), vec![knowing(pattern, &[&known])]);
        let named = ["no entry admits", "the configuration names none", "none that the configuration names"];
        assert!(named.iter().any(|reason| refusal.contains(reason)), "{pattern} {asserted}: {refusal}");
    }
    // Each of several keys has its own name only.
    let both = || vec![knowing("%any", &[&known, &other])];
    assert!(admits(&credentials, &key_id, proof(&known), both()).is_ok());
    assert!(admits(&credentials, &other_id, shown(&other), both()).is_ok());
    assert!(refusal(&credentials, &other_id, proof(&known), both()).contains("is wrong"));
    assert!(refusal(&credentials, &other_id, shown(&known), both()).contains("none that the configuration names"));
    // The most specific entry decides, also where it does not know the key (RFC 4301 §4.4.3).
    let entries = vec![knowing(PEER, &[&known]), PadEntry { name: "wide".to_owned(), ..knowing("%any", &[&other]) }];
    assert!(refusal(&credentials, &id(PEER), proof(&other), entries).contains("is wrong"));
}

// RFC 7670 §1: all kinds of keys, with RFC 7427's signatures or the key's own method.
#[test]
fn a_known_key_is_proof_whatever_certificate_comes_with_it() {
    let authority = Authority::new("ca");
    let algorithms = [
        &rcgen::PKCS_ECDSA_P256_SHA256,
        &rcgen::PKCS_ECDSA_P384_SHA384,
        &rcgen::PKCS_ECDSA_P521_SHA512,
        &rcgen::PKCS_ED25519,
        &rcgen::PKCS_RSA_SHA256,
    ];
    for algorithm in algorithms {
        let key = KeyPair::generate_for(algorithm).unwrap();
        let expected = |method| Ok(Proof::RawKey { key: key.subject_public_key_info(), method });
        let certificates = [Vec::new(), vec![authority.issue("sun.example.org", &key, |_| ())], vec![b"junk".to_vec()]];
        for certificates in certificates {
            for signed in [proof(&key), shown(&key)] {
                let signed = SignedAuth { certificates: certificates.clone(), ..signed };
                let entries = vec![knowing(PEER, &[&key])];
                let admitted = admits(&Credentials::new(), &id(PEER), signed, entries);
                assert_eq!(admitted, expected(AuthMethod::DIGITAL_SIGNATURE));
            }
        }
    }
    // RFC 4754.
    let key = KeyPair::generate().unwrap();
    let (method, auth) = sign_with(&key, None);
    let signed = SignedAuth { method, auth, certificates: Vec::new(), public_key: None };
    let admitted = admits(&Credentials::new(), &id(PEER), signed, vec![knowing(PEER, &[&key])]);
    assert_eq!(admitted, Ok(Proof::RawKey { key: key.subject_public_key_info(), method: AuthMethod::ECDSA_256 }));
}

#[test]
fn constraints_hold_for_raw_keys() {
    let key = KeyPair::generate().unwrap();
    for (constraints, admitted) in [
        ("pubkey", true),
        ("ecdsa-256-sha256", true),
        ("ecdsa-384", false),
        ("rsa", false),
        ("ecdsa-sha384", false),
        ("ike:pubkey-sha512", false),
        ("ike:ecdsa-sha256", true),
        ("ed25519", false),
    ] {
        let constraints = SignatureConstraints::parse(constraints).unwrap();
        let entry = PadEntry { constraints: constraints.clone(), ..knowing(PEER, &[&key]) };
        let result = admits(&Credentials::new(), &id(PEER), shown(&key), vec![entry]);
        assert_eq!(result.is_ok(), admitted, "{constraints:?}: {result:?}");
    }
    // Another kind of proof is another entry's.
    let psk = PadEntry { class: AuthClass::SharedKey, ..knowing(PEER, &[&key]) };
    assert!(refusal(&Credentials::new(), &id(PEER), proof(&key), vec![psk]).contains("no entry admits"));
}

#[test]
fn a_loaded_key_is_proof_only_where_the_entry_has_its_name() {
    let (key, authority) = (KeyPair::generate().unwrap(), Authority::new("ca"));
    let mut credentials = Credentials::new();
    credentials.add_public_key(&key.subject_public_key_info()).unwrap();
    credentials.add_public_key(key.public_key_pem().as_bytes()).unwrap();
    assert_eq!(credentials.public_keys().len(), 1);
    let name = raw(&key).identity();
    let named = || PadEntry { remote_id: IdentityPattern::exact(name.clone()), ..knowing(PEER, &[]) };
    assert!(admits(&credentials, &name, proof(&key), vec![named()]).is_ok());
    assert!(admits(&credentials, &name, shown(&key), vec![named()]).is_ok());
    let stranger = KeyPair::generate().unwrap();
    for (entry, signed) in [
        (knowing("%any", &[]), proof(&key)),
        (PadEntry { cacerts: vec![authority.der()], ..named() }, proof(&key)),
        (PadEntry { revocation: Revocation::Strict, ..named() }, proof(&key)),
        (PadEntry { certs: vec![authority.issue(PEER, &key, |_| ())], ..named() }, proof(&key)),
        (PadEntry { public_keys: vec![raw(&stranger)], ..named() }, proof(&key)),
        (named(), proof(&stranger)),
        (named(), shown(&stranger)),
    ] {
        let refused = admits(&credentials, &name, signed, vec![entry.clone()]);
        assert!(refused.is_err(), "{entry:?}: {refused:?}");
    }
    assert!(admits(&Credentials::new(), &name, proof(&key), vec![named()]).is_err());
}

#[test]
fn an_entry_may_know_a_peer_by_a_key_and_by_a_certificate() {
    let (key, other) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let authority = Authority::new("ca");
    let credentials = trusting(&authority);
    let [pinned, another] = [(); 2].map(|()| authority.issue(PEER, &other, |_| ()));
    let entries = || vec![PadEntry { certs: vec![pinned.clone()], ..knowing(PEER, &[&key]) }];
    let with = |certificate: &Vec<u8>| SignedAuth { certificates: vec![certificate.clone()], ..proof(&other) };
    assert!(matches!(admits(&credentials, &id(PEER), shown(&key), entries()), Ok(Proof::RawKey { .. })));
    assert!(matches!(admits(&credentials, &id(PEER), with(&pinned), entries()), Ok(Proof::Certificate { .. })));
    assert!(refusal(&credentials, &id(PEER), with(&another), entries()).contains("is wrong"));
}

#[test]
fn we_sign_with_the_raw_key_that_is_configured() {
    let (key, other) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let authority = Authority::new("ca");
    let certificate = authority.issue(PEER, &other, |_| ());
    let mut credentials = peer(&other, &[&certificate]);
    let sign = |credentials: &Credentials, change: &dyn Fn(&mut SignRequest)| {
        let mut request = sign_request(PEER);
        request.auth.public_keys = vec![raw(&key)];
        change(&mut request);
        credentials.sign(&request)
    };
    // Without its private key there is no falling back on a certificate.
    let refused = sign(&credentials, &|_| ()).unwrap_err().to_string();
    assert_eq!(refused, "there is no private key with a certificate or configured public key for moon.example.org");
    credentials.add_private_key(&key.serialize_der(), None).unwrap();
    let signed = sign(&credentials, &|_| ()).unwrap();
    assert_eq!((&signed.public_key, signed.certificates.len()), (&Some(raw(&key)), 0));
    assert!(admits(&Credentials::new(), &id(PEER), signed, vec![knowing(PEER, &[&key])]).is_ok());
    // With both, what the peer asks for decides, then the order.
    let both = |raw_key_requested: bool| {
        let signed = sign(&credentials, &|request: &mut SignRequest| {
            request.auth.certificates = vec![certificate.clone()];
            request.raw_key_requested = raw_key_requested;
        });
        signed.unwrap().public_key.is_some()
    };
    assert!(both(true) && !both(false));
    let constrained = sign(&credentials, &|request| {
        request.auth.constraints = SignatureConstraints::parse("rsa").unwrap();
    });
    assert!(constrained.is_err());
}

#[test]
fn a_changed_public_key_is_a_change_of_credentials() {
    let (mut one, other) = (Credentials::new(), Credentials::new());
    one.add_public_key(&KeyPair::generate().unwrap().subject_public_key_info()).unwrap();
    assert!(!one.is_same_as(&other) && one.is_same_as(&one.clone()));
}
