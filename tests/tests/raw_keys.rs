//! Raw public keys (RFC 7670) with strongSwan, which knows them from its configuration alone, and between two Latchkeys, which
//! also show them on the wire.

#![allow(clippy::unwrap_used, reason = "tests")]

use latchkey_tests::daemon::Kind::{self, Latchkey, Strongswan};
use latchkey_tests::daemon::{Daemon, Files, program};
use latchkey_tests::pki::Authority;
use latchkey_tests::scene::{Auth, INNER_A, INNER_B, Scene, Suite, configurations, hosts};

const ROLES: [(Kind, Kind); 2] = [(Latchkey, Strongswan), (Strongswan, Latchkey)];
const ECDSA: Suite = Suite { auth: Auth::RawKeys(&rcgen::PKCS_ECDSA_P256_SHA256), ..Suite::DEFAULT };

/// The base64 of a PEM file.
fn base64(files: &Files, name: &str) -> String {
    let (_, pem) = files.iter().find(|(known, _)| known == name).unwrap();
    String::from_utf8_lossy(pem).lines().filter(|line| !line.starts_with('-')).collect()
}

// The scenario net2net-pubkey of strongSwan's tests. RFC 7427: each kind of key signs as the peer can verify.
#[test]
fn tunnels_by_raw_keys_with_strongswan() {
    for algorithm in
        [&rcgen::PKCS_ECDSA_P256_SHA256, &rcgen::PKCS_RSA_SHA256, &rcgen::PKCS_ED25519, &rcgen::PKCS_ECDSA_P384_SHA384]
    {
        for (initiator, responder) in ROLES {
            let suite = Suite { auth: Auth::RawKeys(algorithm), connection: "send_cert = always\n", ..Suite::DEFAULT };
            Scene::works(initiator, responder, &suite);
        }
    }
}

// Without `id` a key's own name is its holder's, in strongSwan as here.
#[test]
fn without_identities_keys_go_by_their_own_names() {
    for (initiator, responder) in ROLES {
        let (host_a, host_b) = hosts();
        let [(of_a, files_a), (of_b, files_b)] = configurations(&ECDSA)
            .map(|(text, files)| (text.replace("id = a.example", "").replace("id = b.example", ""), files));
        let b = Daemon::start(responder, &host_b, &of_b, &files_b);
        let a = Daemon::start(initiator, &host_a, &of_a, &files_a);
        a.initiate("net");
        Scene { a, b, host_a, host_b }.passes();
    }
}

// Who has another key of the same type, or a certificate for the right name with another key, is a stranger; so is who has
// the right key under another name. In both roles, to strongSwan and to us.
#[test]
fn strangers_get_in_with_neither_another_key_nor_a_certificate_nor_another_name() {
    let authority = Authority::new("test CA", &rcgen::PKCS_ECDSA_P256_SHA256);
    let issued = authority.issue("a.example", &rcgen::PKCS_ECDSA_P256_SHA256);
    let other = rcgen::KeyPair::generate().unwrap();
    let other_key = vec![
        ("pubkey/own.pem".to_owned(), other.public_key_pem().into_bytes()),
        ("private/key.pem".to_owned(), other.serialize_pem().into_bytes()),
    ];
    let certificate =
        vec![("x509/cert.pem".to_owned(), issued.certificate), ("private/key.pem".to_owned(), issued.key)];
    for (initiator, responder) in [ROLES[0], ROLES[1], (Latchkey, Latchkey)] {
        let (host_a, host_b) = hosts();
        let [(of_a, files_a), (of_b, mut files_b)] = configurations(&ECDSA);
        files_b.push(("x509ca/ca.pem".into(), authority.certificate()));
        let b = Daemon::start(responder, &host_b, &of_b, &files_b);
        let a = Daemon::start(initiator, &host_a, &of_a, &files_a);
        let with_certificate = of_a.replace("pubkeys = own.pem", "certs = cert.pem");
        let another_name = of_a.replace("id = a.example", "id = c.example");
        // As responder the stranger is found out by B.
        for (configuration, files) in
            [(&of_a, &other_key), (&with_certificate, &certificate), (&another_name, &files_a)]
        {
            a.write(configuration, files);
            a.control(&["--load-all", "--clear"]);
            for (daemon, at) in [(&a, "a"), (&b, "b")] {
                let refused = daemon.swanctl(&["--initiate", "--child", "net", "--timeout", "10"]);
                assert!(!refused.status.success(), "{at}: {configuration}");
                assert_eq!((a.established(), b.established()), (0, 0));
            }
            assert!(!host_a.pings(INNER_A, INNER_B));
        }
        a.write(&of_a, &files_a);
        a.control(&["--load-all", "--clear"]);
        a.initiate("net");
    }
}

// What is no key that signatures know is refused with its file and the reason, by swanctl's way and by our own.
#[test]
fn bad_key_files_are_named() {
    let (host, _) = hosts();
    let [(of_a, files), _] = configurations(&ECDSA);
    let daemon = Daemon::start_empty(Latchkey, &host, "");
    let x25519 = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VuAyEACQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQk=\n-----END PUBLIC KEY-----\n";
    let whole = files.iter().find(|(name, _)| name == "pubkey/peer.pem").unwrap().1.clone();
    let truncated = String::from_utf8(whole).unwrap().replace("MFkw", "MFgw");
    let private =
        String::from_utf8(files.iter().find(|(name, _)| name == "private/key.pem").unwrap().1.clone()).unwrap();
    for (contents, reason) in [
        (x25519.to_owned(), "a public key of a kind that is not served: algorithm 1.3.101.110"),
        (truncated, "not a SubjectPublicKeyInfo"),
        (private, "it is a private key, which belongs into 'private' alone"),
    ] {
        daemon.write(&of_a, &files);
        daemon.write(&of_a, &vec![("pubkey/peer.pem".into(), contents.into_bytes())]);
        let loaded = daemon.swanctl(&["--load-all"]);
        let said = String::from_utf8_lossy(&loaded.stderr).into_owned();
        assert!(!loaded.status.success() && said.contains(reason), "{said}");
        let folder = daemon.path("swanctl");
        let args = ["check", "--swanctl-dir", folder.to_str().unwrap()];
        let mut check = host.command(program("latchkey").to_str().unwrap(), &args);
        let checked = check.output().unwrap();
        let said = String::from_utf8_lossy(&checked.stdout).into_owned() + &String::from_utf8_lossy(&checked.stderr);
        assert!(!checked.status.success() && said.contains("pubkey/peer.pem: ") && said.contains(reason), "{said}");
    }
}

// RFC 5660 §2: an application is told "certificate and trust anchor or raw key"; RFC 5056: both ends have the same binding.
#[test]
fn applications_are_told_the_raw_key() {
    let suite = Suite { auth: Auth::RawKeys(&rcgen::PKCS_ED25519), ..Suite::DEFAULT };
    let (host_a, host_b) = hosts();
    let [(of_a, files_a), (of_b, files_b)] = configurations(&suite);
    let b = Daemon::start(Latchkey, &host_b, &of_b, &files_b);
    let a = Daemon::start(Latchkey, &host_a, &of_a, &files_a);
    a.initiate("net");
    for (daemon, host, files, local, remote) in
        [(&a, &host_a, &files_b, INNER_A, INNER_B), (&b, &host_b, &files_a, INNER_B, INNER_A)]
    {
        let (socket, local, remote) = (daemon.latch_socket(), format!("{local}:4000"), format!("{remote}:5000"));
        let whois = |more: &[&str]| {
            let args = [&["whois", &local, &remote, "--socket", socket.to_str().unwrap()], more].concat();
            host.check(program("latchkey").to_str().unwrap(), &args)
        };
        let told = whois(&["--json"]).replace([' ', '\n', '"'], "");
        let key = base64(files, "pubkey/own.pem");
        assert!(told.contains(&format!("proof:{{by:raw-key,key:{key}}}")), "{key} {told}");
        assert!(told.contains("method:14,"), "{told}");
        assert!(whois(&[]).contains(".example by raw public key, to us as "));
    }
}

// What real swanctl loads and lists is the same of both daemons.
#[test]
fn swanctl_loads_and_lists_raw_keys() {
    let (host_a, host_b) = hosts();
    let [(of_a, files), _] = configurations(&ECDSA);
    let daemons = [(Latchkey, host_a), (Strongswan, host_b)].map(|(kind, host)| {
        let daemon = Daemon::start_empty(kind, &host, "");
        daemon.write(&of_a, &files);
        (daemon, host)
    });
    let both = |args: &[&str]| {
        daemons.each_ref().map(|(daemon, _)| {
            let said = daemon.control(args);
            let mut blocks: Vec<String> = said.split("\n\n").map(|block| block.trim().to_owned()).collect();
            blocks.sort();
            blocks
        })
    };
    both(&["--load-creds"]);
    let [ours, theirs] = both(&["--list-certs"]);
    assert_eq!(ours, theirs);
    assert!(ours.len() == 3 && ours[1].contains("ECDSA 256 bits"), "{ours:?}");
    both(&["--load-conns"]);
    for args in [&["--list-certs", "--type", "pubkey"][..], &["--list-certs", "--type", "x509"], &["--list-conns"]] {
        let [ours, theirs] = both(args);
        assert_eq!(ours, theirs);
    }
    both(&["--load-creds", "--clear"]);
}
