//! Revoked certificates (RFC 5280 §6.3, RFC 4945 §4.1.2).

use rcgen::{
    CertificateRevocationListParams, CrlDistributionPoint, CrlIssuingDistributionPoint, CrlScope, KeyIdMethod,
    RevocationReason, RevokedCertParams, SerialNumber,
};

use super::*;
use crate::revocation::{Crl, Revocation};

const URI: &str = "http://ca.example.org/crl";

/// A list of 1 November, good for a year, of these certificates.
fn list(
    authority: &Authority,
    revoked: &[&[u8]],
    change: impl FnOnce(&mut CertificateRevocationListParams),
) -> Vec<u8> {
    let entry = |der: &&[u8]| RevokedCertParams {
        serial_number: SerialNumber::from_slice(Certificate::parse(der).unwrap().serial()),
        revocation_time: date_time_ymd(2026, 10, 1),
        reason_code: Some(RevocationReason::KeyCompromise),
        invalidity_date: None,
    };
    let mut params = CertificateRevocationListParams {
        this_update: date_time_ymd(2026, 11, 1),
        next_update: date_time_ymd(2027, 11, 1),
        crl_number: SerialNumber::from(1000_u64),
        issuing_distribution_point: None,
        revoked_certs: revoked.iter().map(entry).collect(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    change(&mut params);
    params.signed_by(&authority.issuer).unwrap().der().to_vec()
}

fn out_of_date(params: &mut CertificateRevocationListParams) {
    params.next_update = date_time_ymd(2026, 11, 2);
}

/// A peer below an intermediate CA, and who is asked to admit it.
struct Scene {
    root: Authority,
    intermediate: Authority,
    request: AuthenticateRequest,
}

impl Scene {
    fn new() -> Self {
        Self::with(|_| ())
    }

    fn with(change: impl FnOnce(&mut CertificateParams)) -> Self {
        let root = Authority::new("root");
        let intermediate = root.below("intermediate", |_| ());
        let mut request = request_of(&intermediate, "moon.example.org", change, pubkey("%any"));
        request.certificates.push(intermediate.der());
        Self { root, intermediate, request }
    }

    fn leaf(&self) -> &[u8] {
        &self.request.certificates[0]
    }

    fn admits(&mut self, revocation: Revocation, lists: &[&[u8]]) -> Result<Vec<String>, String> {
        let mut credentials = trusting(&self.root);
        lists.iter().for_each(|der| credentials.add_crl(der).unwrap());
        self.request.entries[0].revocation = revocation;
        match credentials.authenticate(&self.request, NOW) {
            Ok(admission) => Ok(admission.warnings),
            Err(AuthError::Certificate { reason, .. }) => Err(reason),
            Err(other) => panic!("{other}"),
        }
    }
}

const ALL: [Revocation; 3] = [Revocation::Relaxed, Revocation::IfUri, Revocation::Strict];

#[test]
fn a_revoked_certificate_is_refused() {
    let mut scene = Scene::new();
    let of_root = list(&scene.root, &[], |_| ());
    let of_intermediate = list(&scene.intermediate, &[scene.leaf()], |_| ());
    for revocation in ALL {
        let reason = scene.admits(revocation, &[&of_root, &of_intermediate]).unwrap_err();
        assert!(
            reason.contains("CN=moon.example.org' was revoked at") && reason.contains("key compromise"),
            "{reason}"
        );
    }
    // Also by a list that should have been replaced by now.
    let old = list(&scene.intermediate, &[scene.leaf()], out_of_date);
    assert!(scene.admits(Revocation::Relaxed, &[&old]).is_err());
    // And in PEM, beside others.
    let mut credentials = trusting(&scene.root);
    let pem = |der: &[u8]| {
        format!("-----BEGIN X509 CRL-----\n{}\n-----END X509 CRL-----\n", data_encoding::BASE64.encode(der))
    };
    credentials.add_crl((pem(&of_root) + &pem(&of_intermediate)).as_bytes()).unwrap();
    assert_eq!(credentials.crls().len(), 2);
    refused_certificate(credentials.authenticate(&scene.request, NOW));
}

#[test]
fn a_revoked_intermediate_is_refused() {
    let mut scene = Scene::new();
    let of_root = list(&scene.root, &[&scene.intermediate.der()], |_| ());
    let of_intermediate = list(&scene.intermediate, &[], |_| ());
    for revocation in ALL {
        let reason = scene.admits(revocation, &[&of_root, &of_intermediate]).unwrap_err();
        assert!(reason.contains("CN=intermediate' was revoked"), "{reason}");
    }
}

#[test]
fn what_has_to_be_known_depends_on_the_entry() {
    let mut scene = Scene::new();
    let (of_root, of_intermediate) = (list(&scene.root, &[], |_| ()), list(&scene.intermediate, &[], |_| ()));
    let nobody = Vec::<String>::new();
    for revocation in ALL {
        assert_eq!(scene.admits(revocation, &[&of_root, &of_intermediate]), Ok(nobody.clone()));
    }
    assert_eq!(scene.admits(Revocation::Relaxed, &[]), Ok(nobody.clone()));
    assert_eq!(scene.admits(Revocation::IfUri, &[]), Ok(nobody.clone()), "no certificate names a CRL");
    for lists in [&[][..], &[&of_root[..]], &[&of_intermediate[..]]] {
        let reason = scene.admits(Revocation::Strict, lists).unwrap_err();
        assert!(reason.contains("no CRL of"), "{reason}");
    }
    let point = || vec![CrlDistributionPoint { uris: vec![URI.to_owned()] }];
    let mut scene = Scene::with(|params| params.crl_distribution_points = point());
    assert!(scene.admits(Revocation::IfUri, &[]).unwrap_err().contains("no CRL of"));
    assert!(scene.admits(Revocation::Relaxed, &[]).is_ok());
    let of_intermediate = list(&scene.intermediate, &[], |_| ());
    assert_eq!(scene.admits(Revocation::IfUri, &[&of_intermediate]), Ok(nobody));
}

#[test]
fn a_list_that_is_out_of_date_is_a_warning_or_a_refusal() {
    let mut scene = Scene::new();
    let (of_root, old) = (list(&scene.root, &[], |_| ()), list(&scene.intermediate, &[], out_of_date));
    let warnings = scene.admits(Revocation::Relaxed, &[&of_root, &old]).unwrap();
    assert!(warnings.len() == 1 && warnings[0].contains("has been out of date since"), "{warnings:?}");
    let reason = scene.admits(Revocation::Strict, &[&of_root, &old]).unwrap_err();
    assert!(reason.contains("has been out of date since"), "{reason}");
    // One of tomorrow says nothing yet.
    let early = list(&scene.intermediate, &[], |params| params.this_update = date_time_ymd(2026, 12, 1));
    assert!(scene.admits(Revocation::Strict, &[&of_root, &early]).unwrap_err().contains("no CRL of"));
    // The newest counts: what it lists no more is good again (a hold), what it lists is not.
    let newer = list(&scene.intermediate, &[], |params| params.this_update = date_time_ymd(2026, 11, 10));
    let hold = list(&scene.intermediate, &[scene.leaf()], |_| ());
    for lists in [[&of_root[..], &hold, &newer], [&of_root, &newer, &hold]] {
        assert_eq!(scene.admits(Revocation::Strict, &lists), Ok(Vec::new()));
    }
}

#[test]
fn a_list_of_somebody_else_is_ignored() {
    let mut scene = Scene::new();
    // Of another CA, and of one with the same name, whose key is another.
    let stranger = Authority::new("stranger");
    let impostor = Authority::new("intermediate");
    let of_root = list(&scene.root, &[], |_| ());
    let lists = [
        list(&stranger, &[scene.leaf()], |_| ()),
        list(&impostor, &[scene.leaf()], |_| ()),
        // Indirect in effect: the root says it about a certificate that is none of its own.
        list(&scene.root, &[scene.leaf()], |_| ()),
        // Changed by one bit.
        {
            let mut forged = list(&scene.intermediate, &[scene.leaf()], |_| ());
            let last = forged.len() - 1;
            forged[last] ^= 1;
            forged
        },
    ];
    for forged in &lists {
        assert_eq!(scene.admits(Revocation::Relaxed, &[forged]), Ok(Vec::new()));
        assert!(scene.admits(Revocation::Strict, &[&of_root, forged]).unwrap_err().contains("no CRL of"));
    }
    // A forged list that is newer does not take the place of a genuine one.
    let genuine = list(&scene.intermediate, &[scene.leaf()], |_| ());
    let forged = list(&impostor, &[], |params| params.this_update = date_time_ymd(2026, 11, 20));
    for lists in [[&genuine[..], &forged], [&forged, &genuine]] {
        assert!(scene.admits(Revocation::Relaxed, &lists).unwrap_err().contains("was revoked"));
    }
}

#[test]
fn an_authority_that_may_not_sign_lists_signs_none() {
    let root = Authority::with("root", |params| params.key_usages = vec![KeyUsagePurpose::KeyCertSign]);
    let request = request_of(&root, "moon.example.org", |_| (), pubkey("%any"));
    // rcgen refuses to sign for it, so the same key does under another certificate.
    let key = KeyPair::from_pem(&root.issuer.key().serialize_pem()).unwrap();
    let signer = Authority { issuer: CertifiedIssuer::self_signed(authority_params("root", |_| ()), key).unwrap() };
    let mut credentials = trusting(&root);
    credentials.add_crl(&list(&signer, &[&request.certificates[0]], |_| ())).unwrap();
    assert!(credentials.authenticate(&request, NOW).is_ok());
}

#[test]
fn a_list_is_about_what_its_scope_says() {
    let of = |scene: &Scene, revoked: &[&[u8]], scope, uri: &str| {
        list(&scene.intermediate, revoked, |params| {
            let distribution_point = CrlDistributionPoint { uris: vec![uri.to_owned()] };
            params.issuing_distribution_point = Some(CrlIssuingDistributionPoint { distribution_point, scope });
        })
    };
    let mut scene = Scene::with(|params| {
        params.crl_distribution_points = vec![CrlDistributionPoint { uris: vec![URI.to_owned()] }];
    });
    let of_root = list(&scene.root, &[], |_| ());
    for (scope, uri, known) in [
        (Some(CrlScope::UserCertsOnly), URI, true),
        (None, URI, true),
        (Some(CrlScope::CaCertsOnly), URI, false),
        (None, "http://ca.example.org/another", false),
    ] {
        let good = of(&scene, &[], scope, uri);
        assert_eq!(scene.admits(Revocation::Strict, &[&of_root, &good]).is_ok(), known, "{uri}");
    }
    // What stands on a list is revoked, whatever its scope.
    let partial = of(&scene, &[scene.leaf()], None, "http://ca.example.org/another");
    assert!(scene.admits(Revocation::Relaxed, &[&partial]).is_err());
}

#[test]
fn lists_that_are_none_are_refused() {
    let scene = Scene::new();
    let good = list(&scene.intermediate, &[scene.leaf()], |_| ());
    assert!(Crl::parse(&good).is_ok());
    for end in 0..good.len() {
        assert!(Crl::parse(&good[..end]).is_err());
    }
    for at in 0..good.len() {
        let mut changed = good.clone();
        changed[at] ^= 0x41;
        // Whatever it says then: nobody has signed it.
        if let Ok(changed) = Crl::parse(&changed) {
            let issuer = Certificate::parse(&scene.intermediate.der()).unwrap();
            assert!(!changed.is_signed_by(&issuer), "octet {at}");
        }
    }
    assert!(Crl::parse(&[good.as_slice(), &[0]].concat()).is_err());
    assert!(Crl::parse(scene.leaf()).is_err());
    let mut credentials = Credentials::new();
    assert!(credentials.add_crl(b"-----BEGIN CERTIFICATE-----\n").is_err());
    assert!(credentials.add_crl(&[]).is_err() && credentials.crls().is_empty());
    let reason = |reason_code| {
        let params =
            |params: &mut CertificateRevocationListParams| params.revoked_certs[0].reason_code = Some(reason_code);
        Crl::parse(&list(&scene.intermediate, &[scene.leaf()], params))
    };
    assert!(reason(RevocationReason::CertificateHold).is_ok());
    assert!(reason(RevocationReason::RemoveFromCrl).unwrap_err().to_string().contains("delta"));
}

#[test]
fn a_pinned_certificate_may_be_revoked_too() {
    let mut scene = Scene::new();
    scene.request.entries[0].certs = vec![scene.leaf().to_vec()];
    let admits = |scene: &mut Scene, revocation, lists: &[&[u8]], knows_issuer: bool| {
        let mut credentials = Credentials::new();
        if knows_issuer {
            credentials.add_certificate(&scene.intermediate.der()).unwrap();
        }
        lists.iter().for_each(|der| credentials.add_crl(der).unwrap());
        scene.request.entries[0].revocation = revocation;
        credentials.authenticate(&scene.request, NOW).is_ok()
    };
    let (good, bad) = (list(&scene.intermediate, &[], |_| ()), list(&scene.intermediate, &[scene.leaf()], |_| ()));
    for revocation in ALL {
        assert!(!admits(&mut scene, revocation, &[&bad], true));
        assert!(admits(&mut scene, revocation, &[&good], true));
        assert_eq!(admits(&mut scene, revocation, &[], true), revocation != Revocation::Strict);
    }
    assert!(!admits(&mut scene, Revocation::Strict, &[&good], false), "nobody to believe it of");
}

#[test]
fn newer_lists_take_the_place_of_older_ones() {
    let authority = Authority::new("CA");
    let mut credentials = trusting(&authority);
    let of_day = |day| list(&authority, &[], |params| params.this_update = date_time_ymd(2026, 11, day));
    for day in 1..=20 {
        credentials.add_crl(&of_day(day)).unwrap();
        credentials.add_crl(&of_day(day)).unwrap();
    }
    credentials.add_crl(&of_day(3)).unwrap();
    assert_eq!(credentials.crls().len(), 1);
    let stranger = Authority::new("stranger");
    credentials.add_crl(&list(&stranger, &[], |_| ())).unwrap();
    let before = credentials.clone();
    credentials.add_crl(&of_day(21)).unwrap();
    assert_eq!(credentials.crls().len(), 2);
    assert!(!credentials.is_same_as(&before), "what is revoked is part of the credentials");
}

// RFC 5280 §6.3: asked again of a peer that is in, when a new list comes.
#[test]
fn a_peer_that_is_in_is_found_out_by_a_new_list() {
    let scene = Scene::new();
    let end_entity = scene.request.certificates[0].clone();
    let mut credentials = trusting(&scene.root);
    let admission = credentials.authenticate(&scene.request, NOW).unwrap();
    assert_eq!(admission.intermediates, [scene.intermediate.der()]);
    let revoked = |credentials: &Credentials| credentials.revoked(&admission.peer, &admission.intermediates, NOW);
    // Of others: somebody else of the same name, another serial number, another issuer.
    let impostor = scene.root.below("intermediate", |_| ());
    let other = request_of(&scene.intermediate, "moon.example.org", |_| (), Vec::new()).certificates.swap_remove(0);
    for list in [
        list(&impostor, &[&end_entity], |_| ()),
        list(&scene.intermediate, &[&other], |_| ()),
        list(&scene.root, &[&end_entity], |_| ()),
        list(&scene.intermediate, &[], out_of_date),
    ] {
        credentials.add_crl(&list).unwrap();
        assert_eq!(revoked(&credentials), None);
    }
    for (authority, certificate) in [(&scene.intermediate, &end_entity), (&scene.root, &scene.intermediate.der())] {
        let mut credentials = credentials.clone();
        credentials.add_crl(&list(authority, &[certificate], |params| params.crl_number = 1001_u64.into())).unwrap();
        assert!(revoked(&credentials).unwrap().contains("was revoked at"));
        assert!(credentials.authenticate(&scene.request, NOW).is_err());
    }
    // A pinned certificate, by whoever issued it; nobody has issued a key.
    let entries = vec![PadEntry { certs: vec![end_entity.clone()], ..entry("conn", "%any", AuthClass::PublicKey) }];
    let pinned = credentials.authenticate(&AuthenticateRequest { entries, ..scene.request }, NOW).unwrap();
    credentials
        .add_crl(&list(&scene.intermediate, &[&end_entity], |params| params.crl_number = 1001_u64.into()))
        .unwrap();
    assert_eq!(credentials.revoked(&pinned.peer, &[], NOW), None);
    credentials.add_certificate(&scene.intermediate.der()).unwrap();
    assert!(credentials.revoked(&pinned.peer, &[], NOW).is_some());
    let key = pad_peer(Proof::PreSharedKey, &admission.peer);
    assert_eq!(credentials.revoked(&key, &[], NOW), None);
}

fn pad_peer(proof: Proof, like: &PeerIdentity) -> PeerIdentity {
    PeerIdentity { proof, ..like.clone() }
}
