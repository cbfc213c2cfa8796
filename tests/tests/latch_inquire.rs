//! What an application is told of the SAs under its connections (RFC 5660 §2), at both ends: addresses inside, outside and
//! before a NAT, transport, mode, suite, and what the peer's address rests on.

#![allow(clippy::unwrap_used, reason = "tests")]

use latchkey_tests::daemon::Kind::Latchkey;
use latchkey_tests::daemon::{Daemon, program};
use latchkey_tests::host::Host;
use latchkey_tests::middlebox::{A, B, ROUTER, Road};
use latchkey_tests::pki::Authority;
use latchkey_tests::scene::{Auth, INNER_A, INNER_B, Scene, Suite, configurations};

/// The router's address on the responder's side.
const NATTED: &str = "192.0.2.254";

/// `latchkey whois --json` of a flow between two addresses, without blanks and quotes.
fn whois(daemon: &Daemon, host: &Host, local: &str, remote: &str) -> String {
    let socket = daemon.latch_socket();
    let (local, remote) = (format!("{local}:4000"), format!("{remote}:5000"));
    let args = ["whois", "--json", &local, &remote, "--socket", socket.to_str().unwrap()];
    host.check(program("latchkey").to_str().unwrap(), &args).replace([' ', '\n', '"'], "")
}

fn holds(told: &str, all: &[&str]) {
    for one in all {
        assert!(told.contains(one), "{one} is not in {told}");
    }
}

/// The address of an end without its port.
fn outer(told: &str, end: &str) -> String {
    let rest = told.split(&format!("outer_{end}:")).nth(1).unwrap();
    rest.split(',').next().unwrap().rsplit_once(':').unwrap().0.to_owned()
}

/// Both ends of a road with a NAT in front of the initiator, and what each says of the flow between these addresses.
fn behind_a_nat(road: &Road, transport: &str, mode: &str, [of_a, of_b]: [[&str; 2]; 2]) {
    let at_a = whois(&road.a, &road.host_a, of_a[0], of_a[1]);
    let at_b = whois(&road.b, &road.host_b, of_b[0], of_b[1]);
    holds(
        &at_a,
        &["nat_local:true,nat_remote:false", "peer:{id:{text:b.example,kind:2,data:Yi5leGFtcGxl}", "key_bits:128"],
    );
    holds(
        &at_b,
        &["nat_local:false,nat_remote:true", "peer:{id:{text:a.example,kind:2,data:YS5leGFtcGxl}", "key_bits:128"],
    );
    for told in [&at_a, &at_b] {
        holds(told, &[&format!("transport:{transport},"), &format!("mode:{mode},"), "suite:ENCR_AES_GCM_16128bits"]);
    }
    // RFC 5660 §2: of who is behind the NAT our private address, and the peer's public one.
    assert_eq!((outer(&at_a, "local"), outer(&at_a, "remote")), (A.to_owned(), B.to_owned()), "{at_a}");
    assert_eq!((outer(&at_b, "local"), outer(&at_b, "remote")), (B.to_owned(), NATTED.to_owned()), "{at_b}");
}

#[test]
fn behind_a_nat_each_end_tells_what_it_sees_over_udp_and_tcp() {
    for (connection, transport) in [("tcp = no\n", "udp-encapsulated"), ("tcp = yes\n", "tcp")] {
        let road = Road::start(&Suite { connection, ..Suite::DEFAULT }, B);
        road.router.masquerade(&road.outside);
        road.a.initiate("net");
        assert!(road.host_a.pings(INNER_A, INNER_B));
        behind_a_nat(&road, transport, "tunnel", [[INNER_A, INNER_B], [INNER_B, INNER_A]]);
        // The configuration names both networks, each for one peer.
        holds(&whois(&road.a, &road.host_a, INNER_A, INNER_B), &["address:reserved", "remote_ts:[10.2.0.0/24]"]);
        holds(&whois(&road.b, &road.host_b, INNER_B, INNER_A), &["address:reserved", "remote_ts:[10.1.0.0/24]"]);
    }
}

#[test]
fn in_tls_the_transport_is_told_at_both_ends() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new("TLS CA", &rcgen::PKCS_ECDSA_P256_SHA256);
    let site = authority.issue_for_tls("b.example");
    let (cert, key) = (folder.path().join("site.pem"), folder.path().join("site.key"));
    std::fs::write(&cert, &site.certificate).unwrap();
    std::fs::write(&key, &site.key).unwrap();
    let settings = format!("tls_ports = 443\ntls_cert = {}\ntls_key = {}\n", cert.display(), key.display());
    let suite = Suite { connection: "tcp = tls\n", ..Suite::DEFAULT };
    let road = Road::with(&suite, B, &settings);
    std::fs::write(road.a.path("swanctl/x509ca/ca.pem"), authority.certificate()).unwrap();
    road.a.control(&["--load-creds"]);
    road.router.masquerade(&road.outside);
    road.a.initiate("net");
    assert!(road.host_a.pings(INNER_A, INNER_B));
    behind_a_nat(&road, "tls", "tunnel", [[INNER_A, INNER_B], [INNER_B, INNER_A]]);
}

// RFC 7296 §2.23.1: in transport mode the inner addresses are those that each end sees.
#[test]
fn in_transport_mode_behind_a_nat_the_peer_s_address_is_its_outer_one() {
    let suite = Suite { child: "mode = transport\n", connection: "tcp = no\n", ..Suite::DEFAULT };
    let ends = configurations(&suite).map(|(configuration, files)| {
        (configuration.replace("10.1.0.0/24", "dynamic").replace("10.2.0.0/24", "dynamic"), files)
    });
    let road = Road::between(Latchkey, B, "", ends);
    road.router.masquerade(&road.outside);
    road.a.initiate("net");
    assert!(road.host_a.pings(A, B), "{}", road.a.output());
    behind_a_nat(&road, "udp-encapsulated", "transport", [[A, B], [B, NATTED]]);
    holds(&whois(&road.a, &road.host_a, A, B), &["address:outer"]);
    holds(&whois(&road.b, &road.host_b, B, NATTED), &["address:outer"]);
    assert_ne!(ROUTER, NATTED);
}

#[test]
fn a_virtual_address_is_bound_to_whom_it_was_assigned() {
    let [(of_a, files_a), (of_b, files_b)] = configurations(&Suite::DEFAULT);
    let of_a = of_a
        .replace("version = 2\n", "version = 2\nvips = 0.0.0.0\n")
        .replace("local_ts = 10.1.0.0/24", "local_ts = dynamic");
    let of_b = of_b
        .replace("version = 2\n", "version = 2\npools = four\n")
        .replace("remote_ts = 10.1.0.0/24", "remote_ts = dynamic");
    let of_b = format!("{of_b}pools {{\nfour {{\naddrs = 10.3.0.0/24\n}}\n}}\n");
    let road = Road::between(Latchkey, B, "", [(of_a, files_a), (of_b, files_b)]);
    road.router.masquerade(&road.outside);
    road.a.initiate("net");
    assert!(road.host_a.pings("10.3.0.1", INNER_B));
    behind_a_nat(&road, "udp-encapsulated", "tunnel", [["10.3.0.1", INNER_B], [INNER_B, "10.3.0.1"]]);
    holds(&whois(&road.a, &road.host_a, "10.3.0.1", INNER_B), &["address:reserved", "local_ts:[10.3.0.1/32]"]);
    holds(&whois(&road.b, &road.host_b, INNER_B, "10.3.0.1"), &["address:assigned", "remote_ts:[10.3.0.1/32]"]);
}

#[test]
fn an_identity_that_is_the_address_and_one_that_others_may_have_are_told_apart() {
    let [(of_a, files_a), (of_b, files_b)] = configurations(&Suite::DEFAULT);
    let id = |text: String| text.replace("id = b.example", &format!("id = {INNER_B}"));
    // Whoever ends in .example may have A's network.
    let of_b = id(of_b).replace("remote {\nauth = psk\nid = a.example", "remote {\nauth = psk\nid = *.example");
    let (host_a, host_b) = latchkey_tests::scene::hosts();
    let b = Daemon::start(Latchkey, &host_b, &of_b, &files_b);
    let a = Daemon::start(Latchkey, &host_a, &id(of_a), &files_a);
    let scene = Scene { a, b, host_a, host_b };
    scene.a.initiate("net");
    scene.passes();
    let at_a = whois(&scene.a, &scene.host_a, INNER_A, INNER_B);
    holds(&at_a, &["address:proved", "text:10.2.0.1,kind:1", "nat_local:false,nat_remote:false"]);
    holds(&at_a, &["outer_local:192.0.2.1:", "outer_remote:192.0.2.2:"]);
    holds(&whois(&scene.b, &scene.host_b, INNER_B, INNER_A), &["address:configured"]);
}

/// The base64 of a PEM file, as JSON has it.
fn der(pem: &[u8]) -> String {
    String::from_utf8_lossy(pem).lines().filter(|line| !line.starts_with('-')).collect()
}

// RFC 5660 §2: "the peer certificate, when one is used, and the trust anchor to which it was validated"; RFC 7296 §3.8:
// the AUTH method.
#[test]
fn the_certificate_and_the_trust_anchor_of_the_peer_are_told_and_how_it_signed() {
    for (algorithm, methods) in [(&rcgen::PKCS_ECDSA_P256_SHA256, "method:14"), (&rcgen::PKCS_RSA_SHA256, "method:14")]
    {
        let suite = Suite { auth: Auth::Certificates(algorithm), ..Suite::DEFAULT };
        let [(of_a, files_a), (of_b, files_b)] = configurations(&suite);
        let file = |files: &latchkey_tests::daemon::Files, name: &str| {
            der(&files.iter().find(|(known, _)| known == name).unwrap().1)
        };
        let (host_a, host_b) = latchkey_tests::scene::hosts();
        let b = Daemon::start(Latchkey, &host_b, &of_b, &files_b);
        let a = Daemon::start(Latchkey, &host_a, &of_a, &files_a);
        let scene = Scene { a, b, host_a, host_b };
        scene.a.initiate("net");
        scene.passes();
        let told = [
            (whois(&scene.a, &scene.host_a, INNER_A, INNER_B), &files_b, "b.example", "a.example"),
            (whois(&scene.b, &scene.host_b, INNER_B, INNER_A), &files_a, "a.example", "b.example"),
        ];
        for (told, of_peer, peer, own) in told {
            let certificate = file(of_peer, "x509/cert.pem");
            let anchor = file(of_peer, "x509ca/ca.pem");
            holds(&told, &[&format!("peer:{{id:{{text:{peer},kind:2")]);
            holds(&told, &[&format!("local_id:{{text:{own},kind:2"), methods, "resumed:false"]);
            holds(&told, &[&format!("proof:{{by:certificate,end_entity:{certificate},trust_anchor:{anchor}}}")]);
        }
        // For humans, too; and with the certificate a peer has another class than with a shared key.
        let socket = scene.a.latch_socket();
        let args = ["whois", &format!("{INNER_A}:1"), &format!("{INNER_B}:2"), "--socket", socket.to_str().unwrap()];
        let said = scene.host_a.check(program("latchkey").to_str().unwrap(), &args);
        assert!(said.contains("b.example by certificate, to us as a.example"), "{said}");
    }
    let scene = Scene::works(Latchkey, Latchkey, &Suite::DEFAULT);
    let told = whois(&scene.a, &scene.host_a, INNER_A, INNER_B);
    holds(&told, &["proof:{by:shared-key}", "method:2,"]);
}
