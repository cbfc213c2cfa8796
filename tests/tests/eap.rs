//! Road warriors that prove themselves by EAP to a gateway with a certificate (RFC 7296 §2.16), with a real strongSwan in both
//! roles: virtual addresses by the EAP identity, reauthentication, and who does not get in.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::time::Duration;

use latchkey_tests::daemon::Kind::{self, Latchkey, Strongswan};
use latchkey_tests::daemon::{Daemon, Files};
use latchkey_tests::host::{Host, link, wait_for};
use latchkey_tests::pki::Authority;

const GATEWAY: &str = "192.0.2.2";
const SUITE: &str = "version = 2\nproposals = aes256gcm16-prfsha384-x25519\n";
const POOL: &str = "pools {\nfour {\naddrs = 10.3.0.0/24\n}\n}\n";
const PASSWORDS: &str = "secrets {\neap-carol {\nid = carol\nsecret = \"pass word, Tür\"\n}\n\
    eap-dave {\nid = dave@example.org\nsecret = other\n}\n}\n";

/// A CA, the gateway's certificate, and one of the same name by another CA.
struct Pki {
    ca: Vec<u8>,
    gateway: Files,
    impostor: Files,
}

fn pki() -> Pki {
    let files = |authority: &Authority| {
        let credential = authority.issue("gateway.example", &rcgen::PKCS_RSA_SHA256);
        vec![
            ("x509/cert.pem".to_owned(), credential.certificate),
            ("x509ca/ca.pem".to_owned(), authority.certificate()),
            ("private/key.pem".to_owned(), credential.key),
        ]
    };
    let [right, wrong] = ["right CA", "wrong CA"].map(|name| Authority::new(name, &rcgen::PKCS_RSA_SHA256));
    Pki { ca: right.certificate(), gateway: files(&right), impostor: files(&wrong) }
}

fn gateway(remote: &str, connection: &str) -> String {
    format!(
        "connections {{\nrw {{\nlocal_addrs = {GATEWAY}\n{SUITE}pools = four\n{connection}\n\
         local {{\nauth = pubkey\ncerts = cert.pem\nid = gateway.example\n}}\nremote {{\nauth = eap-mschapv2\n{remote}\n}}\n\
         children {{\nnet {{\nlocal_ts = 10.2.0.0/24\nesp_proposals = aes128gcm16\n}}\n}}\n}}\n}}\n{POOL}{PASSWORDS}"
    )
}

/// A client that says `ike` in IKE, and `eap` in EAP with this password.
fn client(ike: &str, eap: &str, password: &str, connection: &str) -> String {
    format!(
        "connections {{\nhome {{\nremote_addrs = {GATEWAY}\n{SUITE}vips = 0.0.0.0\n{connection}\n\
         local {{\nauth = eap-mschapv2\nid = {ike}\neap_id = {eap}\n}}\nremote {{\nauth = pubkey\nid = gateway.example\n}}\n\
         children {{\nnet {{\nremote_ts = 10.2.0.0/24\nesp_proposals = aes128gcm16\n}}\n}}\n}}\n}}\n\
         secrets {{\neap-me {{\nid = {eap}\nsecret = \"{password}\"\n}}\n}}\n"
    )
}

fn hosts() -> (Host, Host) {
    let (carol, moon) = (Host::new(), Host::new());
    link(&carol, "192.0.2.1/24", &moon, "192.0.2.2/24");
    moon.add_inner("10.2.0.1/24");
    (carol, moon)
}

fn start(kind: Kind, host: &Host, configuration: &str, files: &Files) -> Daemon {
    let daemon = Daemon::start_empty(kind, host, "");
    daemon.write(configuration, files);
    daemon.control(&["--load-all"]);
    daemon
}

fn trusting(pki: &Pki) -> Files {
    vec![("x509ca/ca.pem".to_owned(), pki.ca.clone())]
}

const ROLES: [(Kind, Kind); 3] = [(Strongswan, Latchkey), (Latchkey, Strongswan), (Latchkey, Latchkey)];

// RFC 7296 §2.16, §2.19: the tunnel comes up, the gateway knows who is there, and what goes by a name goes by that one.
#[test]
fn a_road_warrior_proves_itself_by_a_password() {
    let pki = pki();
    for (of_client, of_gateway) in ROLES {
        let (carol, moon) = hosts();
        let gateway = start(of_gateway, &moon, &gateway("eap_id = %any", ""), &pki.gateway);
        let theirs = start(of_client, &carol, &client("10.9.9.9", "carol", "pass word, Tür", ""), &trusting(&pki));
        theirs.initiate("net");
        let sas = gateway.sas();
        assert!(sas.contains("remote-id=10.9.9.9 remote-eap-id=carol "), "{sas}");
        assert!(theirs.sas().contains("local-vips=[10.3.0.1]"), "{}", theirs.sas());
        assert!(carol.pings("10.3.0.1", "10.2.0.1") && moon.pings("10.2.0.1", "10.3.0.1"));
        assert!(gateway.control(&["--list-pools", "--leases"]).contains("online   'carol'"));
        for daemon in [&gateway, &theirs] {
            let listed = daemon.control(&["--list-conns", "--raw"]);
            assert!(listed.contains("class=EAP"), "{listed}");
        }
        // RFC 7296 §2.8.3: a new IKE SA proves it all again, and has the same address.
        let before = sas;
        theirs.control(&["--rekey", "--ike", "home", "--reauth"]);
        wait_for("a new IKE SA with the old address", Duration::from_secs(20), || {
            let id = |sas: &str| sas.split("uniqueid=").nth(1).map(|rest| rest.split(' ').next().unwrap().to_owned());
            let sas = gateway.sas();
            sas.matches("uniqueid=").count() == 2
                && id(&sas) != id(&before)
                && sas.contains("remote-eap-id=carol ")
                && sas.contains("remote-vips=[10.3.0.1]")
        });
        wait_for("packets pass", Duration::from_secs(20), || carol.pings("10.3.0.1", "10.2.0.1"));
    }
}

// RFC 7296 §2.16: a wrong password, somebody whom the gateway does not know, and a gateway with another CA's certificate, to whom
// nothing of EAP is said.
#[test]
fn nobody_gets_in_without_the_password_or_the_certificate() {
    let pki = pki();
    for (of_client, of_gateway) in ROLES {
        let (carol, moon) = hosts();
        let gateway_of = |files: &Files| start(of_gateway, &moon, &gateway("eap_id = %any", ""), files);
        let fails = |gateway: &Daemon, eap: &str, password: &str| {
            let theirs = start(of_client, &carol, &client("carol.example", eap, password, ""), &trusting(&pki));
            let initiated = theirs.swanctl(&["--initiate", "--child", "net", "--timeout", "10"]);
            assert!(!initiated.status.success(), "{initiated:?}");
            assert!(theirs.child_spis("INSTALLED").is_empty() && gateway.child_spis("INSTALLED").is_empty());
            assert_eq!(gateway.established(), 0);
            theirs.log()
        };
        let right = gateway_of(&pki.gateway);
        for (eap, password) in [("carol", "wrong"), ("erin", "pass word, Tür"), ("carol", "other")] {
            let log = fails(&right, eap, password);
            let refused = ["EAP-MSCHAPv2 error 691", "EAP-MS-CHAPv2 failed with error ERROR_AUTHENTICATION_FAILURE"];
            assert!(refused.iter().any(|line| log.contains(line)), "{log}");
        }
        drop(right);
        let impostor = gateway_of(&pki.impostor);
        fails(&impostor, "carol", "pass word, Tür");
        assert!(!impostor.log().contains("received EAP identity"), "{}", impostor.log());
    }
}

// RFC 7296 §2.16: what is said in IKE is what has to be proved where the gateway asks for nothing else; a mail address, over TCP.
#[test]
fn the_ike_identity_is_the_one_that_eap_proves() {
    let pki = pki();
    for (of_client, of_gateway, tcp) in
        [(Strongswan, Latchkey, ""), (Latchkey, Strongswan, ""), (Latchkey, Latchkey, "tcp = yes\n")]
    {
        let (carol, moon) = hosts();
        let gateway = start(of_gateway, &moon, &gateway("id = *@example.org", ""), &pki.gateway);
        let of_dave = client("dave@example.org", "dave@example.org", "other", tcp);
        let theirs = start(of_client, &carol, &of_dave, &trusting(&pki));
        theirs.initiate("net");
        let sas = gateway.sas();
        assert!(sas.contains("remote-id=dave@example.org ") && !sas.contains("remote-eap-id"), "{sas}");
        assert!(carol.pings("10.3.0.1", "10.2.0.1"));
        assert_eq!(theirs.sas().contains("transport=TCP"), !tcp.is_empty());
    }
}
