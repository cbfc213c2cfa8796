//! Session resumption (RFC 5723) between two Latchkeys; strongSwan has none.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::time::Duration;

use latchkey_tests::daemon::Kind::Latchkey;
use latchkey_tests::daemon::{Daemon, Files};
use latchkey_tests::host::wait_for;
use latchkey_tests::pki::Authority;
use latchkey_tests::scene::{Auth, Scene, Suite, configurations, hosts};

/// The client gives a silent gateway up soon.
const IMPATIENT: &str = "retransmit_timeout = 0.5\nretransmit_tries = 2\n";

const SUITE: Suite = Suite {
    ike: "aes256gcm16-prfsha384-x25519",
    esp: "aes128gcm16",
    auth: Auth::Certificates(&rcgen::PKCS_ECDSA_P256_SHA256),
    connection: "session_resumption = yes\ndpd_delay = 1s\ntcp = no\n",
    child: "",
};

/// A tunnel of a client that has a ticket, and how to start its gateway again.
fn with_ticket() -> (Scene, impl Fn(&Scene) -> Daemon + use<>) {
    with_ticket_over(&SUITE, "", &Files::new())
}

/// The same with more settings of the gateway, and files of the client's.
fn with_ticket_over(suite: &Suite, settings: &str, files: &Files) -> (Scene, impl Fn(&Scene) -> Daemon + use<>) {
    let (host_a, host_b) = hosts();
    let [(text_a, mut files_a), (text_b, files_b)] = configurations(suite);
    files_a.extend_from_slice(files);
    let b = Daemon::start_empty(Latchkey, &host_b, settings);
    b.write(&text_b, &files_b);
    b.control(&["--load-all"]);
    let a = Daemon::start_empty(Latchkey, &host_a, IMPATIENT);
    a.write(&text_a, &files_a);
    a.control(&["--load-all"]);
    a.initiate("net");
    let scene = Scene { a, b, host_a, host_b };
    scene.passes();
    assert!(scene.a.log().contains("received a ticket"), "{}", scene.a.output());
    (scene, move |scene| Daemon::start(Latchkey, &scene.host_b, &text_b, &files_b))
}

/// The client loses its IKE SA, of which the gateway hears nothing.
fn lose(scene: &Scene) {
    scene.host_a.block_udp();
    wait_for("the client to give up", Duration::from_secs(60), || scene.a.established() == 0);
    assert_eq!(scene.b.established(), 1);
    scene.host_a.allow_udp();
}

fn is_resumed(daemon: &Daemon) -> bool {
    let sas = daemon.sas();
    assert_eq!(sas.matches("state=ESTABLISHED").count(), 1, "{sas}{}", daemon.output());
    sas.contains("resumed=yes")
}

// RFC 5723 §4.3: cut off and back again, twice, without certificates and key exchange; loading the same credentials again
// is no change, and loading them anew is one.
#[test]
fn a_client_that_was_cut_off_resumes() {
    let (scene, _) = with_ticket();
    for _ in 0..2 {
        lose(&scene);
        scene.b.control(&["--load-all", "--noprompt"]);
        scene.a.initiate("net");
        assert!(is_resumed(&scene.a) && is_resumed(&scene.b), "{}{}", scene.a.output(), scene.b.output());
        scene.passes();
    }
    for daemon in [&scene.a, &scene.b] {
        let log = daemon.log();
        assert_eq!(log.matches("by ticket successful, originally with a certificate").count(), 2, "{log}");
    }
    assert_eq!(scene.a.log().matches("initiating IKE_SA").count(), 1, "{}", scene.a.log());
    lose(&scene);
    scene.b.control(&["--load-creds", "--clear", "--noprompt"]);
    scene.a.initiate("net");
    assert!(!is_resumed(&scene.a) && !is_resumed(&scene.b), "{}{}", scene.a.output(), scene.b.output());
    assert!(scene.a.log().contains("the peer does not take the ticket"), "{}", scene.a.log());
    scene.passes();
}

// RFC 5723 §4.3.2: the gateway was restarted, and its key is gone: TICKET_NACK, then IKE_SA_INIT.
#[test]
fn a_client_of_a_restarted_gateway_authenticates() {
    let (mut scene, start) = with_ticket();
    scene.b.signal("KILL");
    wait_for("the end of the daemon", Duration::from_secs(10), || !scene.b.is_running());
    wait_for("the client to give up", Duration::from_secs(60), || scene.a.established() == 0);
    scene.b = start(&scene);
    scene.a.initiate("net");
    assert!(!is_resumed(&scene.a) && !is_resumed(&scene.b), "{}{}", scene.a.output(), scene.b.output());
    assert!(scene.a.log().contains("the peer does not take the ticket"), "{}", scene.a.log());
    assert!(scene.b.log().contains("the ticket is none of ours"), "{}", scene.b.log());
    scene.passes();
}

/// Streams with TLS or without: cut off on both sides, and back over another stream by the ticket.
fn resumes_over_streams(scene: &Scene) {
    assert!(scene.a.sas().contains("transport=TCP"), "{}", scene.a.sas());
    let both = "meta l4proto { tcp, udp } drop";
    let chains =
        ["input", "output"].map(|hook| format!("chain {hook} {{\ntype filter hook {hook} priority 0;\n{both};\n}}"));
    scene.host_a.nft(&format!("table inet cut {{\n{}\n}}\n", chains.join("\n")));
    wait_for("the client to give up", Duration::from_secs(60), || scene.a.established() == 0);
    scene.host_a.check("nft", &["delete", "table", "inet", "cut"]);
    scene.a.initiate("net");
    assert!(is_resumed(&scene.a), "{}{}", scene.a.output(), scene.b.output());
    assert!(scene.b.log().contains("by ticket successful, originally with a certificate"), "{}", scene.b.log());
    assert!(scene.a.sas().contains("transport=TCP"), "{}", scene.a.sas());
    scene.passes();
}

// RFC 9329 §7.3: resumption is not bound to a transport, and is the same over a stream.
#[test]
fn over_tcp() {
    let connection = "session_resumption = yes\ndpd_delay = 1s\ntcp = yes\n";
    let (scene, _) = with_ticket_over(&Suite { connection, ..SUITE }, "", &Files::new());
    resumes_over_streams(&scene);
}

// RFC 9329 §7.3, Appendix A
#[test]
fn over_tls() {
    let authority = Authority::new("TLS CA", &rcgen::PKCS_ECDSA_P256_SHA256);
    let site = authority.issue_for_tls("b.example");
    let folder = tempfile::tempdir().unwrap();
    let (cert, key) = (folder.path().join("site.pem"), folder.path().join("site.key"));
    std::fs::write(&cert, &site.certificate).unwrap();
    std::fs::write(&key, &site.key).unwrap();
    let settings =
        format!("tcp_ports = no\ntls_ports = 443\ntls_cert = {}\ntls_key = {}\n", cert.display(), key.display());
    let connection = "session_resumption = yes\ndpd_delay = 1s\ntcp = tls\n";
    let files = vec![("x509ca/tls.pem".to_owned(), authority.certificate())];
    let (scene, _) = with_ticket_over(&Suite { connection, ..SUITE }, &settings, &files);
    resumes_over_streams(&scene);
}
