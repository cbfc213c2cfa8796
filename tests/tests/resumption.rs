//! Session resumption (RFC 5723) between two Latchkeys; strongSwan has none.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::time::Duration;

use latchkey_tests::daemon::Daemon;
use latchkey_tests::daemon::Kind::Latchkey;
use latchkey_tests::host::wait_for;
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
fn with_ticket() -> (Scene, impl Fn(&Scene) -> Daemon) {
    let (host_a, host_b) = hosts();
    let [(text_a, files_a), (text_b, files_b)] = configurations(&SUITE);
    let b = Daemon::start(Latchkey, &host_b, &text_b, &files_b);
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
