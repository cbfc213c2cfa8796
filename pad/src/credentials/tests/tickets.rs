//! What session resumption needs to know: how long a proof is good, and whether credentials are the same as before.

use std::time::Duration;

use super::*;

fn until(day: u8) -> impl FnOnce(&mut CertificateParams) {
    move |params| params.not_after = date_time_ymd(2026, 12, day)
}

/// The days that a peer's proof is good for, with chains of these ends.
fn days(root: u8, issuer: u8, leaf: u8) -> u64 {
    let root = Authority::with("root", until(root));
    let issuer = root.below("issuer", until(issuer));
    let mut request = request_of(&issuer, "moon.example.org", until(leaf), pubkey("%any"));
    request.certificates.push(issuer.der());
    let good_for = trusting(&root).authenticate(&request, NOW).unwrap().good_for.unwrap();
    good_for.as_secs() / 86_400
}

// RFC 5723 §6.2: no ticket outlives the certificates of its authentication, whichever of the chain ends first.
#[test]
fn a_proof_is_good_until_the_first_certificate_ends() {
    assert_eq!((days(11, 21, 31), days(21, 11, 31), days(31, 21, 11)), (20, 20, 20));
    let authority = Authority::new("root");
    let pinned = request_of(&authority, "moon.example.org", until(6), pubkey("%any"));
    let mut entries = pubkey("%any");
    entries[0].certs = vec![pinned.certificates[0].clone()];
    let pinned = AuthenticateRequest { entries, ..pinned };
    let good_for = Credentials::new().authenticate(&pinned, NOW).unwrap().good_for;
    assert_eq!(good_for, Some(Duration::from_secs(15 * 86_400)));
}

#[test]
fn a_shared_key_has_no_end() {
    let mut credentials = Credentials::new();
    credentials.add_shared_secret(None, Vec::new(), Secret::new(b"secret".to_vec())).unwrap();
    let auth = TestMac.mac(&Secret::new(b"secret".to_vec()));
    let signed = SignedAuth { method: AuthMethod::SHARED_KEY, auth, certificates: Vec::new(), public_key: None };
    let request = request("moon.example.org", signed, vec![entry("conn", "%any", AuthClass::SharedKey)]);
    assert_eq!(credentials.authenticate(&request, NOW).unwrap().good_for, None);
}

// RFC 5723 §6.2: tickets end with the credentials; loading the same again is no change.
#[test]
fn each_change_of_credentials_shows() {
    let key = KeyPair::generate().unwrap();
    let authority = Authority::new("root");
    let load = |credentials: &mut Credentials| {
        credentials.add_authority(&authority.der()).unwrap();
        credentials.add_private_key(&key.serialize_der(), None).unwrap();
        for (name, secret) in [("one", b"first"), ("two", b"other")] {
            let owner = IdentityPattern::exact(id("moon.example.org"));
            credentials.add_shared_secret(Some(name.into()), vec![owner], Secret::new(secret.to_vec())).unwrap();
        }
        credentials.add_ppk(Some("ppk".into()), Vec::new(), Secret::new(b"ppk".to_vec())).unwrap();
    };
    let mut credentials = Credentials::new();
    load(&mut credentials);
    let before = credentials.clone();
    load(&mut credentials);
    assert!(credentials.is_same_as(&before) && before.is_same_as(&credentials));
    let changes: [&dyn Fn(&mut Credentials); 9] = [
        &Credentials::clear,
        &|changed| assert!(changed.remove_shared_secret("one")),
        &|changed| assert!(changed.remove_shared_secret("ppk")),
        &|changed| assert!(changed.remove_private_key(&before.private_key_ids()[0])),
        &|changed| changed.add_authority(&Authority::new("another").der()).unwrap(),
        &|changed| changed.add_certificate(&authority.der()).unwrap(),
        &|changed| changed.add_shared_secret(Some("two".into()), Vec::new(), Secret::new(b"other".to_vec())).unwrap(),
        &|changed| {
            let owner = IdentityPattern::exact(id("moon.example.org"));
            changed.add_shared_secret(Some("two".into()), vec![owner], Secret::new(b"changed".to_vec())).unwrap();
        },
        &|changed| drop(changed.add_private_key(&KeyPair::generate().unwrap().serialize_der(), None).unwrap()),
    ];
    for (number, change) in changes.iter().enumerate() {
        let mut changed = before.clone();
        change(&mut changed);
        assert!(!changed.is_same_as(&before) && !before.is_same_as(&changed), "change {number}");
    }
}
