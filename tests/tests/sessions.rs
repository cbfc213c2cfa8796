//! Proofs and what follows from them, with real daemons: signatures, constraints, redirection.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::time::Duration;

use latchkey_tests::daemon::Daemon;
use latchkey_tests::daemon::Kind::{self, Latchkey, Strongswan};
use latchkey_tests::host::wait_for;
use latchkey_tests::pki::{Authority, Credential};
use latchkey_tests::scene::{Auth, INNER_A, INNER_B, Scene, Suite, configurations, hosts};

const ROLES: [(Kind, Kind); 2] = [(Latchkey, Strongswan), (Strongswan, Latchkey)];

const RSA: Suite = Suite {
    ike: "aes256gcm16-prfsha384-x25519",
    esp: "aes128gcm16",
    auth: Auth::Certificates(&rcgen::PKCS_RSA_SHA256),
    connection: "",
    child: "",
};

/// Both daemons with `auth` of the local and the remote section as given, for each end.
fn scene((initiator, responder): (Kind, Kind), suite: &Suite, of_a: [&str; 2], of_b: [&str; 2]) -> Scene {
    let (host_a, host_b) = hosts();
    let [(text_a, files_a), (text_b, files_b)] = configurations(suite);
    let with = |text: String, [local, remote]: [&str; 2]| {
        let text = text.replacen("auth = pubkey", &format!("auth = {local}"), 1);
        text.replacen("auth = pubkey", &format!("auth = {remote}"), 1)
    };
    // The first replacement must not be what the second one finds.
    assert!(!of_a.contains(&"pubkey") && !of_b.contains(&"pubkey"));
    let b = Daemon::start(responder, &host_b, &with(text_b, of_b), &files_b);
    let a = Daemon::start(initiator, &host_a, &with(text_a, of_a), &files_a);
    Scene { a, b, host_a, host_b }
}

// swanctl.conf(5), `auth`: RSASSA-PSS (RFC 7427, appendix A.4) both ways, with the hash that is asked for.
#[test]
fn rsa_pss_is_made_and_demanded() {
    for roles in ROLES {
        let auth = "ike:rsa/pss-sha512";
        let scene = scene(roles, &RSA, [auth, auth], [auth, auth]);
        scene.a.initiate("net");
        scene.passes();
        let strongswan = if roles.0 == Strongswan { &scene.a } else { &scene.b };
        let log = strongswan.log();
        assert!(log.matches("RSA_EMSA_PSS").count() >= 2, "{log}");
    }
}

// swanctl.conf(5), `remote.auth`: a peer with a weaker key or another signature is refused, by us and to us alike.
#[test]
fn constraints_refuse_what_they_do_not_admit() {
    for roles in ROLES {
        for demanded in ["rsa-3072", "ike:rsa-sha512", "pubkey-sha384"] {
            let offered = "ike:rsa-sha256";
            let scene = scene(roles, &RSA, [offered, "rsa-2048"], ["rsa-2048", demanded]);
            let tried = scene.a.swanctl(&["--initiate", "--child", "net", "--timeout", "20"]);
            assert!(!tried.status.success(), "{demanded}\n{}{}", scene.a.output(), scene.b.output());
            assert_eq!((scene.a.established(), scene.b.established()), (0, 0), "{demanded}");
        }
    }
}

// swanctl.conf(5), `revocation`; RFC 4945 §4.1.2: lists come from the folder or over VICI, and what they say counts from
// then on, in both roles.
#[test]
fn a_revoked_certificate_gets_nobody_in() {
    for (initiator, responder) in ROLES {
        let algorithm = &rcgen::PKCS_ECDSA_P256_SHA256;
        let authority = Authority::new("CA", algorithm);
        let credentials = ["a.example", "b.example"].map(|name| authority.issue(name, algorithm));
        let (host_a, host_b) = hosts();
        let [mut of_a, mut of_b] = configurations(&Suite { auth: Auth::Certificates(algorithm), ..RSA });
        for ((text, files), credential) in [&mut of_a, &mut of_b].into_iter().zip(&credentials) {
            *files = vec![
                ("x509/cert.pem".into(), credential.certificate.clone()),
                ("x509ca/ca.pem".into(), authority.certificate()),
                ("private/key.pem".into(), credential.key.clone()),
            ];
            *text = text.replace("remote {\nauth = pubkey\n", "remote {\nauth = pubkey\nrevocation = strict\n");
        }
        let good = authority.revoke(1, &[]);
        [&mut of_a, &mut of_b].into_iter().for_each(|(_, files)| files.push(("x509crl/ca.crl".into(), good.clone())));
        let b = Daemon::start(responder, &host_b, &of_b.0, &of_b.1);
        let a = Daemon::start(initiator, &host_a, &of_a.0, &of_a.1);
        let scene = Scene { a, b, host_a, host_b };
        scene.a.initiate("net");
        scene.passes();
        scene.a.control(&["--terminate", "--ike", "site"]);

        let (checks, peer) =
            if initiator == Latchkey { (&scene.a, &credentials[1]) } else { (&scene.b, &credentials[0]) };
        std::fs::write(checks.path("swanctl/x509crl/ca.crl"), authority.revoke(2, &[peer])).unwrap();
        checks.control(&["--load-creds"]);
        let listed = checks.control(&["--list-certs", "--type", "x509_crl"]);
        assert!(listed.contains("serial:    02") && !listed.contains("serial:    01"), "{listed}");
        let tried = scene.a.swanctl(&["--initiate", "--child", "net", "--timeout", "20"]);
        assert!(!tried.status.success(), "{}{}", scene.a.output(), scene.b.output());
        assert_eq!((scene.a.established(), scene.b.established()), (0, 0));
        let log = checks.log();
        assert!(log.contains("was revoked at") && log.contains("key compromise"), "{log}");

        std::fs::remove_file(checks.path("swanctl/x509crl/ca.crl")).unwrap();
        checks.control(&["--load-creds", "--clear"]);
        assert!(!scene.a.swanctl(&["--initiate", "--child", "net", "--timeout", "20"]).status.success());
        assert!(checks.log().contains("no CRL of"), "{}", checks.log());
    }
}

// A list that has the certificate of a peer that is in ends its IKE SA, and nobody else's; strongSwan's peer hears of it.
#[test]
fn a_revoked_peer_that_is_in_is_put_out() {
    for (initiator, responder) in [(Latchkey, Strongswan), (Strongswan, Latchkey), (Latchkey, Latchkey)] {
        let authority = Authority::new("test CA", &rcgen::PKCS_ECDSA_P256_SHA256);
        let credentials = ["a.example", "b.example"].map(|name| authority.issue(name, &rcgen::PKCS_ECDSA_P256_SHA256));
        let mut of = configurations(&Suite { auth: Auth::Certificates(&rcgen::PKCS_ECDSA_P256_SHA256), ..RSA });
        for ((_, files), Credential { certificate, key }) in of.iter_mut().zip(&credentials) {
            *files = vec![
                ("x509/cert.pem".into(), certificate.clone()),
                ("x509ca/ca.pem".into(), authority.certificate()),
                ("private/key.pem".into(), key.clone()),
            ];
        }
        let [(of_a, files_a), (of_b, files_b)] = of;
        let (host_a, host_b) = hosts();
        let b = Daemon::start(responder, &host_b, &of_b, &files_b);
        let a = Daemon::start(initiator, &host_a, &of_a, &files_a);
        let scene = Scene { a, b, host_a, host_b };
        scene.a.initiate("net");
        scene.passes();
        let (checks, own, peer) = match initiator {
            Latchkey => (&scene.a, &credentials[0], &credentials[1]),
            _ => (&scene.b, &credentials[1], &credentials[0]),
        };
        let other = authority.issue("c.example", &rcgen::PKCS_ECDSA_P256_SHA256);
        std::fs::write(checks.path("swanctl/x509crl/ca.crl"), authority.revoke(1, &[&other, own])).unwrap();
        checks.control(&["--load-creds"]);
        scene.passes();
        std::fs::write(checks.path("swanctl/x509crl/ca.crl"), authority.revoke(2, &[&other, peer])).unwrap();
        checks.control(&["--load-creds"]);
        assert_eq!(checks.established(), 0, "{}", checks.log());
        wait_for("the peer to hear of it", Duration::from_secs(10), || {
            (scene.a.established(), scene.b.established()) == (0, 0)
        });
        assert!(checks.log().contains("example': 'O=Latchkey tests, CN="), "{}", checks.log());
        assert!(!scene.host_a.pings(INNER_A, INNER_B));
    }
}

/// Both daemons; the responder has a second address, and its configuration is changed by `change`.
fn with_two_gateways((initiator, responder): (Kind, Kind), change: impl FnOnce(String) -> String) -> Scene {
    let (host_a, host_b) = hosts();
    let device = host_b.check("sh", &["-c", "ip -o addr show to 192.0.2.2 | cut -d' ' -f2"]);
    host_b.ip(&["addr", "add", "192.0.2.3/24", "dev", device.trim()]);
    let [(text_a, files_a), (text_b, files_b)] = configurations(&Suite::default());
    let b = Daemon::start(responder, &host_b, &change(text_b), &files_b);
    let a = Daemon::start(initiator, &host_a, &text_a, &files_a);
    Scene { a, b, host_a, host_b }
}

fn is_at_the_other_gateway(scene: &Scene) {
    wait_for("an IKE SA with the other gateway", Duration::from_secs(20), || {
        let at = |daemon: &Daemon, key: &str| daemon.sas().contains(&format!("{key}=192.0.2.3"));
        scene.a.established() == 1
            && scene.b.established() == 1
            && at(&scene.a, "remote-host")
            && at(&scene.b, "local-host")
            && scene.a.child_spis("INSTALLED").len() == 1
    });
    scene.passes();
}

// RFC 5685 §5.
#[test]
fn an_established_client_is_redirected() {
    for roles in ROLES {
        let both = |text: String| text.replacen("local_addrs = 192.0.2.2", "local_addrs = 192.0.2.2, 192.0.2.3", 1);
        let scene = with_two_gateways(roles, both);
        scene.a.initiate("net");
        scene.b.control(&["--redirect", "--peer-id", "a.example", "--gateway", "192.0.2.3"]);
        is_at_the_other_gateway(&scene);
    }
}

// RFC 5685 §3, §6. strongSwan has no setting that would make it redirect here; as client it follows in IKE_SA_INIT, and
// ends with a crash of its own (5.9.8) in IKE_AUTH.
#[test]
fn a_client_is_redirected_while_it_connects() {
    for (client, phase) in [(Latchkey, "init"), (Latchkey, "auth"), (Strongswan, "init")] {
        let scene = with_two_gateways((client, Latchkey), |text| {
            let text = text.replacen("local_addrs = 192.0.2.2", "local_addrs = 192.0.2.3", 1);
            let old = format!(
                "connections {{\nold {{\nlocal_addrs = 192.0.2.2\nredirect_to = 192.0.2.3\nredirect_phase = {phase}\n\
                     proposals = {}\nlocal {{\nauth = psk\nid = b.example\n}}\nremote {{\nauth = psk\nid = a.example\n}}\n}}\n",
                Suite::default().ike
            );
            text.replacen("connections {\n", &old, 1)
        });
        // strongSwan reports the initiation as failed when the first IKE SA goes.
        scene.a.swanctl(&["--initiate", "--child", "net", "--timeout", "20"]);
        is_at_the_other_gateway(&scene);
    }
}

// RFC 4478: strongSwan sends AUTH_LIFETIME where it has reauth_time, and honours ours.
#[test]
fn auth_lifetime_makes_the_initiator_reauthenticate() {
    for roles in ROLES {
        let (host_a, host_b) = hosts();
        let [(text_a, files_a), (text_b, files_b)] = configurations(&Suite::default());
        let text_b =
            text_b.replacen("version = 2", "version = 2\nreauth_time = 14s\nover_time = 60s\nrand_time = 0s", 1);
        // strongSwan begins so long before the time: by default that is at once, again and again.
        let text_a = text_a.replacen("version = 2", "version = 2\nover_time = 4s", 1);
        let b = Daemon::start(roles.1, &host_b, &text_b, &files_b);
        let a = Daemon::start(roles.0, &host_a, &text_a, &files_a);
        let scene = Scene { a, b, host_a, host_b };
        scene.a.initiate("net");
        let spi = |sas: &str| sas.split("initiator-spi=").nth(1).map(|rest| rest[..16].to_owned());
        let before = spi(&scene.a.sas());
        assert!(before.is_some());
        wait_for("another IKE SA", Duration::from_secs(60), || {
            let sas = scene.a.sas();
            sas.contains("state=ESTABLISHED") && spi(&sas) != before
        });
    }
}

// swanctl --rekey --reauth.
#[test]
fn an_ike_sa_is_reauthenticated_on_demand() {
    let scene = Scene::works(Latchkey, Strongswan, &Suite::default());
    let spi = |sas: &str| sas.split("responder-spi=").nth(1).map(|rest| rest[..16].to_owned());
    let before = spi(&scene.a.sas());
    scene.a.control(&["--rekey", "--ike", "site", "--reauth"]);
    wait_for("another IKE SA", Duration::from_secs(30), || {
        let sas = scene.a.sas();
        scene.a.established() == 1 && spi(&sas) != before && scene.a.child_spis("INSTALLED").len() == 1
    });
    scene.passes();
}

// RFC 6290: after kill -9 the gateway says so, long before the liveness checks would have given it up.
#[test]
fn a_gateway_that_crashed_is_noticed() {
    let (host_a, host_b) = hosts();
    let state = tempfile::tempdir().unwrap();
    let settings = format!("quick_crash_detection = yes\nstate_dir = {}\n", state.path().display());
    let suite = Suite { connection: "dpd_delay = 2s", ..Suite::default() };
    let [(text_a, files_a), (text_b, files_b)] = configurations(&suite);
    let start = |host, text: &str, files| {
        let daemon = Daemon::start_empty(Latchkey, host, &settings);
        daemon.write(text, files);
        daemon.control(&["--load-all"]);
        daemon
    };
    let mut b = start(&host_b, &text_b, &files_b);
    let a = Daemon::start(Latchkey, &host_a, &text_a, &files_a);
    a.initiate("net");
    b.signal("KILL");
    wait_for("the end of the daemon", Duration::from_secs(10), || !b.is_running());
    let b = start(&host_b, &text_b, &files_b);
    let scene = Scene { a, b, host_a, host_b };
    // Repetitions of a liveness check alone go on for 165 s.
    wait_for("a new IKE SA", Duration::from_secs(60), || scene.b.established() == 1 && scene.a.established() == 1);
    wait_for("its Child SA", Duration::from_secs(10), || scene.a.child_spis("INSTALLED").len() == 1);
    scene.passes();
    assert!(scene.a.log().contains("the peer has lost the IKE_SA"), "{}", scene.a.log());
}
