//! Two Latchkeys: over UDP, through a NAT, over TCP where UDP is blocked; restart and clean-up.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use latchkey_tests::capture::Capture;
use latchkey_tests::daemon::Daemon;
use latchkey_tests::daemon::Kind::Latchkey;
use latchkey_tests::host::{Host, link, wait_for};
use latchkey_tests::scene::{Auth, INNER_A, INNER_B, Scene, Suite, configurations};

#[test]
fn over_udp_with_a_bulk_transfer() {
    let scene = Scene::works(Latchkey, Latchkey, &Suite::default());
    scene.host_a.transfers_whole(INNER_A, &scene.host_b, INNER_B, 16 << 20);
    scene.host_b.transfers_whole(INNER_B, &scene.host_a, INNER_A, 16 << 20);
    // No NAT: ESP travels as IP protocol 50 (RFC 7296 §2.23).
    assert!(!scene.a.sas().contains("encap=yes"), "{}", scene.a.sas());
}

#[test]
fn over_udp_with_forced_encapsulation() {
    let scene = Scene::works(Latchkey, Latchkey, &Suite { connection: "encap = yes\n", ..Suite::default() });
    assert!(scene.a.sas().contains("encap=yes"), "{}", scene.a.sas());
    scene.host_a.transfers_whole(INNER_A, &scene.host_b, INNER_B, 4 << 20);
}

// RFC 4303 §2.2.1. strongSwan's kernel-libipsec has no extended sequence numbers.
#[test]
fn extended_sequence_numbers() {
    let scene = Scene::works(Latchkey, Latchkey, &Suite { esp: "aes256gcm16-esn", ..Suite::default() });
    assert!(scene.a.sas().contains("esn=1"), "{}", scene.a.sas());
    scene.host_a.transfers_whole(INNER_A, &scene.host_b, INNER_B, 1 << 20);
}

#[test]
fn transport_mode_between_the_hosts() {
    let mut suite = Suite { child: "mode = transport\n", ..Suite::default() };
    for connection in ["", "encap = yes\n"] {
        suite.connection = connection;
        let (host_a, host_b) = latchkey_tests::scene::hosts();
        let [(of_a, files_a), (of_b, files_b)] = configurations(&suite);
        let dynamic = |text: String| text.replace("10.1.0.0/24", "dynamic").replace("10.2.0.0/24", "dynamic");
        let b = Daemon::start(Latchkey, &host_b, &dynamic(of_b), &files_b);
        let a = Daemon::start(Latchkey, &host_a, &dynamic(of_a), &files_a);
        a.initiate("net");
        assert!(a.sas().contains("mode=TRANSPORT"), "{}", a.sas());
        assert!(host_a.pings("192.0.2.1", "192.0.2.2"), "{}{}", a.output(), b.output());
        let packets = |sas: &str| {
            sas.split("packets-in=").nth(1).and_then(|rest| rest.split(' ').next()?.parse::<u64>().ok()).unwrap_or(0)
        };
        assert!(packets(&b.sas()) > 0, "the pings were protected: {}", b.sas());
        host_a.transfers_whole("192.0.2.1", &host_b, "192.0.2.2", 2 << 20);
    }
}

#[test]
fn ipv6_in_ipv4() {
    let (host_a, host_b) = latchkey_tests::scene::hosts();
    host_a.add_inner("fd01::1/64");
    host_b.add_inner("fd02::1/64");
    let [(of_a, files_a), (of_b, files_b)] = configurations(&Suite::default());
    let six = |text: String| text.replace("10.1.0.0/24", "fd01::/64").replace("10.2.0.0/24", "fd02::/64");
    let b = Daemon::start(Latchkey, &host_b, &six(of_b), &files_b);
    let a = Daemon::start(Latchkey, &host_a, &six(of_a), &files_a);
    a.initiate("net");
    assert!(host_a.pings("fd01::1", "fd02::1"), "{}{}", a.output(), b.output());
    host_a.transfers_whole("[fd01::1]", &host_b, "[fd02::1]", 1 << 20);
}

#[test]
fn ipv4_in_ipv6() {
    let (host_a, host_b) = (Host::new(), Host::new());
    link(&host_a, "2001:db8::1/64", &host_b, "2001:db8::2/64");
    host_a.add_inner("10.1.0.1/24");
    host_b.add_inner("10.2.0.1/24");
    for connection in ["", "encap = yes\n"] {
        let [(of_a, files_a), (of_b, files_b)] = configurations(&Suite { connection, ..Suite::default() });
        let six = |text: String| text.replace("192.0.2.", "2001:db8::");
        let b = Daemon::start(Latchkey, &host_b, &six(of_b), &files_b);
        let a = Daemon::start(Latchkey, &host_a, &six(of_a), &files_a);
        a.initiate("net");
        assert!(host_a.pings(INNER_A, INNER_B), "{}{}", a.output(), b.output());
        host_a.transfers_whole(INNER_A, &host_b, INNER_B, 1 << 20);
    }
}

struct Natted {
    a: Daemon,
    b: Daemon,
    host_a: Host,
    host_b: Host,
    router: Host,
}

/// A behind a masquerading router, B on the other side.
fn behind_nat(suite: &Suite) -> Natted {
    let (host_a, router, host_b) = (Host::new(), Host::new(), Host::new());
    link(&host_a, "198.51.100.1/24", &router, "198.51.100.254/24");
    let (outside, _) = link(&router, "192.0.2.254/24", &host_b, "192.0.2.2/24");
    host_a.ip(&["route", "add", "default", "via", "198.51.100.254"]);
    router.masquerade(&outside);
    host_a.add_inner("10.1.0.1/24");
    host_b.add_inner("10.2.0.1/24");
    let [(of_a, files_a), (of_b, files_b)] = configurations(suite);
    let of_a = of_a.replace("local_addrs = 192.0.2.1\n", "");
    let of_b = of_b.replace("remote_addrs = 192.0.2.1\n", "");
    let b = Daemon::start(Latchkey, &host_b, &of_b, &files_b);
    let a = Daemon::start(Latchkey, &host_a, &of_a, &files_a);
    Natted { a, b, host_a, host_b, router }
}

// RFC 7296 §2.23: NAT detected, moved to port 4500, ESP in UDP.
#[test]
fn through_a_nat() {
    let scene = behind_nat(&Suite::default());
    scene.a.initiate("net");
    assert!(scene.host_a.pings(INNER_A, INNER_B), "{}{}", scene.a.output(), scene.b.output());
    assert!(scene.host_b.pings(INNER_B, INNER_A), "{}{}", scene.a.output(), scene.b.output());
    let (of_a, of_b) = (scene.a.sas(), scene.b.sas());
    assert!(of_a.contains("nat-local=yes") && of_a.contains("encap=yes"), "{of_a}");
    assert!(of_b.contains("nat-remote=yes") && of_b.contains("remote-host=192.0.2.254"), "{of_b}");
    scene.host_a.transfers_whole(INNER_A, &scene.host_b, INNER_B, 4 << 20);
}

// RFC 9329 §5.1, through a NAT as well.
#[test]
fn through_a_nat_over_tcp() {
    let scene = behind_nat(&Suite { connection: "tcp = fallback\n", ..Suite::default() });
    scene.router.block_udp();
    scene.a.initiate("net");
    assert!(scene.host_a.pings(INNER_A, INNER_B), "{}{}", scene.a.output(), scene.b.output());
    scene.host_a.transfers_whole(INNER_A, &scene.host_b, INNER_B, 2 << 20);
}

// RFC 9329 §5.1: UDP stays silent, the initiator starts anew over TCP.
#[test]
fn over_tcp_when_udp_is_dropped() {
    for auth in [Auth::Psk, Auth::Certificates(&rcgen::PKCS_RSA_SHA256)] {
        let scene =
            Scene::start(Latchkey, Latchkey, &Suite { auth, connection: "tcp = fallback\n", ..Suite::default() });
        scene.host_b.block_udp();
        let start = Instant::now();
        scene.a.initiate("net");
        let took = start.elapsed();
        // A bound on user-visible behaviour (the configured delay and a little), not a benchmark.
        assert!(took < Duration::from_secs(8), "the fall-back took {took:?}");
        scene.passes();
        scene.host_a.transfers_whole(INNER_A, &scene.host_b, INNER_B, 8 << 20);
        scene.host_b.transfers_whole(INNER_B, &scene.host_a, INNER_A, 8 << 20);
        // Both kinds of rekey stay on the stream (RFC 9329 §6.1).
        let before = scene.a.child_spis("INSTALLED");
        scene.a.control(&["--rekey", "--child", "net"]);
        wait_for("a new SPI", Duration::from_secs(30), || {
            let now = scene.a.child_spis("INSTALLED");
            now.len() == 1 && now != before
        });
        scene.b.control(&["--rekey", "--ike", "site"]);
        std::thread::sleep(Duration::from_secs(1));
        scene.passes();
    }
}

// RFC 9329 §5.1: nothing is configured for TCP, so nothing but UDP is tried.
#[test]
fn no_tcp_where_configuration_says_no() {
    let scene = Scene::start(Latchkey, Latchkey, &Suite { connection: "tcp = no\n", ..Suite::default() });
    scene.host_b.block_udp();
    assert!(!scene.a.swanctl(&["--initiate", "--child", "net", "--timeout", "5"]).status.success());
    assert_eq!(scene.a.established(), 0);
}

// RFC 9329 §6.1: the stream is lost, the TCP Originator opens another, the SAs go on.
#[test]
fn a_reset_stream_is_replaced() {
    let scene = Scene::start(Latchkey, Latchkey, &Suite { connection: "tcp = yes\n", ..Suite::default() });
    scene.a.initiate("net");
    scene.passes();
    let spis = scene.a.child_spis("INSTALLED");
    scene.host_a.check("ss", &["-K", "dport", "=", "4500"]);
    wait_for("traffic over a new stream", Duration::from_secs(30), || scene.host_a.pings(INNER_A, INNER_B));
    assert_eq!(scene.a.child_spis("INSTALLED"), spis, "the Child SA is the same");
    scene.passes();
}

#[test]
fn rekeys_lose_no_packet() {
    let scene = Scene::works(Latchkey, Latchkey, &Suite::default());
    let mut ping = scene.host_a.command("ping", &["-q", "-i", "0.005", "-c", "600", "-I", INNER_A, INNER_B]);
    let ping = ping.stdout(std::process::Stdio::piped()).spawn().unwrap();
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(300));
        scene.a.control(&["--rekey", "--child", "net"]);
        std::thread::sleep(Duration::from_millis(300));
        scene.b.control(&["--rekey", "--child", "net"]);
    }
    let output = String::from_utf8(ping.wait_with_output().unwrap().stdout).unwrap();
    assert!(output.contains(" 0% packet loss"), "{output}");
}

#[test]
fn a_stopped_daemon_leaves_nothing_and_tells_its_peer() {
    let mut scene = Scene::works(Latchkey, Latchkey, &Suite::default());
    assert!(scene.a.stop(), "{}", scene.a.output());
    wait_for("the peer's SA is gone", Duration::from_secs(30), || scene.b.established() == 0);
    let rules = scene.host_a.check("ip", &["rule"]);
    assert!(!rules.contains("220"), "{rules}");
    assert_eq!(scene.host_a.check("ip", &["-o", "link", "show", "type", "tun"]), "");
    assert!(!scene.a.path("vici").exists(), "the socket is gone");
}

#[test]
fn the_updown_script_is_told_what_comes_and_goes() {
    let told = tempfile::NamedTempFile::new().unwrap();
    let script = format!(
        "echo $PLUTO_VERB $PLUTO_CONNECTION $PLUTO_ME $PLUTO_MY_ID $PLUTO_MY_CLIENT $PLUTO_PEER $PLUTO_PEER_ID \
         $PLUTO_PEER_CLIENT >> {}",
        told.path().display()
    );
    let (host_a, host_b) = latchkey_tests::scene::hosts();
    let [(of_a, files_a), (of_b, files_b)] = configurations(&Suite::default());
    let of_a = of_a.replace("esp_proposals =", &format!("updown = \"{script}\"\nesp_proposals ="));
    let b = Daemon::start(Latchkey, &host_b, &of_b, &files_b);
    let a = Daemon::start(Latchkey, &host_a, &of_a, &files_a);
    a.initiate("net");
    // A rekey is neither up nor down.
    a.control(&["--rekey", "--child", "net"]);
    std::thread::sleep(Duration::from_millis(500));
    a.control(&["--terminate", "--ike", "site"]);
    let facts = "net 192.0.2.1 a.example 10.1.0.0/24 192.0.2.2 b.example 10.2.0.0/24";
    let expected = format!("up-client {facts}\ndown-client {facts}\n");
    wait_for("the script's report", Duration::from_secs(30), || {
        std::fs::read_to_string(told.path()).unwrap() == expected
    });
    drop((a, b));
}

#[test]
fn configuration_is_read_without_swanctl() {
    let (host_a, host_b) = latchkey_tests::scene::hosts();
    let suite = Suite {
        auth: Auth::Certificates(&rcgen::PKCS_ECDSA_P256_SHA256),
        child: "start_action = start\n",
        ..Suite::default()
    };
    let [(of_a, files_a), (of_b, files_b)] = configurations(&suite);
    let b = Daemon::start(Latchkey, &host_b, &of_b.replace("start_action = start\n", ""), &files_b);
    let mut a = Daemon::start_empty(Latchkey, &host_a, "");
    a.write(&of_a, &files_a);
    a.signal("HUP");
    wait_for("the tunnel starts by itself", Duration::from_secs(30), || {
        a.is_running() && host_a.pings(INNER_A, INNER_B)
    });
    assert_eq!(b.established(), 1);
}

#[test]
fn settings_are_read_again() {
    let (host_a, _host_b) = latchkey_tests::scene::hosts();
    let a = Daemon::start_empty(Latchkey, &host_a, "retransmit_timeout = 0.1\nretransmit_tries = 0\n");
    let [(of_a, files_a), _] = configurations(&Suite { connection: "tcp = no\n", ..Suite::default() });
    a.write(&of_a, &files_a);
    a.control(&["--load-all"]);
    let conf = a.path("strongswan.conf");
    let text = std::fs::read_to_string(&conf).unwrap();
    std::fs::write(&conf, text.replace("retransmit_tries = 0", "retransmit_tries = many")).unwrap();
    assert!(!a.swanctl(&["--reload-settings"]).status.success(), "a setting with an error");
    assert!(!a.swanctl(&["--initiate", "--child", "net", "--timeout", "20"]).status.success());
    assert!(a.log().contains("giving up after 0 retransmits"), "{}", a.log());
    std::fs::write(&conf, text.replace("retransmit_tries = 0", "retransmit_tries = 2")).unwrap();
    a.control(&["--reload-settings"]);
    assert!(!a.swanctl(&["--initiate", "--child", "net", "--timeout", "20"]).status.success());
    assert!(a.log().contains("giving up after 2 retransmits"), "{}", a.log());
}

// RFC 4301 §4.4.1, §5.1: a packet that a PROTECT policy selects waits for its SA, it does not go out in clear.
#[test]
fn a_trap_keeps_cleartext_in_and_brings_the_tunnel_up() {
    let (host_a, host_b) = latchkey_tests::scene::hosts();
    // Without the trap a packet for the other network would go out over the link.
    host_a.ip(&["route", "add", "10.2.0.0/24", "via", "192.0.2.2"]);
    host_a.nft(
        "table ip clear {\nchain o {\ntype filter hook output priority 0;\n\
         oifname \"va*\" ip daddr 10.2.0.0/24 counter\n}\n}\n",
    );
    let in_clear = || {
        let rules = host_a.check("nft", &["list", "table", "ip", "clear"]);
        let packets = rules.split("counter packets ").nth(1).and_then(|rest| rest.split(' ').next());
        packets.and_then(|packets| packets.parse::<u64>().ok()).unwrap()
    };
    host_a.run("ping", &["-c", "1", "-W", "1", "-I", INNER_A, INNER_B]);
    assert_eq!(in_clear(), 1, "what the trap shall prevent");

    let [(of_a, files_a), (of_b, files_b)] = configurations(&Suite::default());
    let trapping = of_a.replace("children {\nnet {\n", "children {\nnet {\nstart_action = trap\n");
    assert_ne!(trapping, of_a);
    // The peer is not there yet: nothing can come up, and nothing goes out in clear.
    let mut a = Daemon::start(Latchkey, &host_a, &trapping, &files_a);
    assert!(a.control(&["--list-pols"]).contains("site/net, TUNNEL"), "{}", a.control(&["--list-pols"]));
    assert_eq!(a.established(), 0);
    assert!(!host_a.pings(INNER_A, INNER_B));
    assert_eq!(in_clear(), 1);
    assert!(a.log().matches("initiating IKE_SA").count() <= 1, "one initiation at a time: {}", a.log());

    let b = Daemon::start(Latchkey, &host_b, &of_b, &files_b);
    wait_for("the tunnel comes up by itself", Duration::from_secs(20), || host_a.pings(INNER_A, INNER_B));
    assert_eq!((a.established(), b.established(), a.child_spis("INSTALLED").len()), (1, 1, 1));
    assert!(host_a.pings(INNER_A, INNER_B) && host_b.pings(INNER_B, INNER_A));

    a.control(&["--terminate", "--ike", "site"]);
    assert_eq!(a.established(), 0);
    wait_for("the tunnel comes up again", Duration::from_secs(30), || host_a.pings(INNER_A, INNER_B));
    assert_eq!((a.established(), a.child_spis("INSTALLED").len()), (1, 1));

    // The SA stays without its trap, and when it goes the packets are the main table's again.
    a.control(&["--uninstall", "--child", "net"]);
    assert_eq!(a.control(&["--list-pols"]), "");
    assert!(host_a.pings(INNER_A, INNER_B));
    assert_eq!(in_clear(), 1);
    a.control(&["--load-all"]);
    assert_eq!(a.control(&["--list-pols"]), "", "the same configuration does not undo it");
    a.control(&["--terminate", "--ike", "site"]);
    host_a.run("ping", &["-c", "1", "-W", "1", "-I", INNER_A, INNER_B]);
    assert_eq!((in_clear(), a.established()), (2, 0));

    a.control(&["--install", "--child", "net"]);
    wait_for("the tunnel comes up", Duration::from_secs(30), || host_a.pings(INNER_A, INNER_B));
    assert_eq!(in_clear(), 2);
    assert!(a.stop(), "{}", a.output());
    assert_eq!(host_a.check("ip", &["route", "show", "table", "all", "10.2.0.0/24"]).lines().count(), 1);
}

#[test]
fn a_trap_of_dynamic_selectors_protects_the_hosts_themselves() {
    let (host_a, host_b) = latchkey_tests::scene::hosts();
    let [(of_a, files_a), (of_b, files_b)] = configurations(&Suite { child: "mode = transport\n", ..Suite::default() });
    let dynamic = |text: String| text.replace("10.1.0.0/24", "dynamic").replace("10.2.0.0/24", "dynamic");
    let trapping = dynamic(of_a).replace("mode = transport\n", "mode = transport\nstart_action = trap\n");
    let b = Daemon::start(Latchkey, &host_b, &dynamic(of_b), &files_b);
    let a = Daemon::start(Latchkey, &host_a, &trapping, &files_a);
    assert!(a.control(&["--list-pols"]).contains("local:  192.0.2.1/32"), "{}", a.control(&["--list-pols"]));
    wait_for("the SA comes up by itself", Duration::from_secs(30), || {
        host_a.pings("192.0.2.1", "192.0.2.2") && a.sas().contains("mode=TRANSPORT")
    });
    assert_eq!(b.established(), 1);
}

// The peer is lost without a word: what was in the tunnel must not go out in clear (`dpd_action = trap`).
#[test]
fn a_lost_peer_leaves_a_trap_where_configured() {
    let suite = Suite { connection: "dpd_delay = 1s\n", child: "dpd_action = trap\n", ..Suite::default() };
    let (host_a, host_b) = latchkey_tests::scene::hosts();
    let [(of_a, files_a), (of_b, files_b)] = configurations(&suite);
    let b = Daemon::start(Latchkey, &host_b, &of_b, &files_b);
    let settings = "retransmit_tries = 1\nretransmit_timeout = 0.5\n";
    let a = Daemon::start_empty(Latchkey, &host_a, settings);
    a.write(&of_a, &files_a);
    a.control(&["--load-all"]);
    a.initiate("net");
    assert_eq!(a.control(&["--list-pols"]), "");
    b.signal("KILL");
    wait_for("the trap", Duration::from_secs(30), || a.control(&["--list-pols"]).contains("site/net, TUNNEL"));
    assert!(host_a.check("ip", &["route", "get", INNER_B]).contains("lk0"));
}

/// Rules of policy routing but the system's own and the tunnel's.
fn shunt_rules(host: &Host) -> Vec<String> {
    let rules = host.check("ip", &["rule"]);
    let ours = |rule: &&str| ["219:", "221:", "222:"].iter().any(|priority| rule.starts_with(priority));
    rules.lines().filter(ours).map(|rule| rule.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
}

// RFC 4301 §4.4.1: BYPASS and DISCARD where ESP is done in user space; §5.1: what is discarded is refused with a word.
#[test]
fn what_passes_goes_in_clear_and_what_drops_goes_nowhere() {
    const PORT: u16 = 5001;
    let shunted = |text: &str, local: &str, remote: &str| {
        let shunts = format!(
            "children {{\nport {{\nmode = pass\nlocal_ts = {local}\nremote_ts = {remote}\nstart_action = trap\n}}\n\
             rest {{\nmode = drop\nlocal_ts = 10.0.0.0/8\nremote_ts = 10.0.0.0/8\nstart_action = trap\n}}\n"
        );
        text.replace("children {\n", &shunts)
    };
    let [(of_a, _), (of_b, _)] = configurations(&Suite::default());
    let (wide, port) = ("10.1.0.0/24", format!("10.2.0.0/24[tcp/{PORT}]"));
    let (of_a, of_b) = (shunted(&of_a, wide, &port), shunted(&of_b, &port, wide));
    let (a, b, behind) = (Host::new(), Host::new(), Host::new());
    let (device, _) = link(&a, "192.0.2.1/24", &b, "192.0.2.2/24");
    link(&behind, "10.8.0.2/24", &a, "10.8.0.1/24");
    a.add_inner(&format!("{INNER_A}/24"));
    b.add_inner(&format!("{INNER_B}/24"));
    for network in ["10.2.0.0/24", "10.9.0.0/24"] {
        a.ip(&["route", "add", network, "via", "192.0.2.2"]);
    }
    b.ip(&["route", "add", "10.1.0.0/24", "via", "192.0.2.1"]);
    behind.ip(&["route", "add", "default", "via", "10.8.0.1"]);
    a.check("sysctl", &["-qw", "net.ipv4.ip_forward=1"]);

    let mut ours = Daemon::start(Latchkey, &a, &of_a, &vec![]);
    assert_eq!(
        shunt_rules(&a).iter().filter(|rule| rule.contains("10.")).count(),
        3,
        "{:?}{}",
        shunt_rules(&a),
        ours.output()
    );
    // Neither end has an SA yet.
    let capture = Capture::start(&a, &device);
    assert!(!a.pings(INNER_A, INNER_B) && !a.pings(INNER_A, "10.9.0.1"));
    let refused = behind.run("ping", &["-c", "1", "-W", "3", "10.9.0.1"]);
    let refused = String::from_utf8_lossy(&refused.stdout).into_owned();
    assert!(refused.contains("filtered") || refused.contains("rohibited"), "{refused}");
    assert_eq!(capture.count("icmp"), 0);
    a.transfers_whole(INNER_A, &b, INNER_B, 1000);

    // §5.2: what comes in clear for this host is not taken either.
    let arrives = || {
        let heard = tempfile::NamedTempFile::new().unwrap();
        let path = format!("CREATE:{}", heard.path().display());
        let _listener = a.spawn("socat", &["-u", "UDP4-RECV:5002,bind=10.1.0.1", &path]);
        wait_for("the listener", Duration::from_secs(20), || {
            a.check("ss", &["-Hlun", "sport", "=", ":5002"]).contains("5002")
        });
        for _ in 0..5 {
            b.check("sh", &["-c", "echo hello | socat -u - UDP4:10.1.0.1:5002,bind=10.2.0.1"]);
            std::thread::sleep(Duration::from_millis(50));
        }
        std::fs::metadata(heard.path()).unwrap().len() > 0
    };
    assert!(!arrives());
    ours.control(&["--uninstall", "--child", "rest"]);
    assert!(arrives());
    ours.control(&["--install", "--child", "rest"]);
    assert!(!arrives());

    // Somebody removes rules and policies: they come back.
    let in_any_order = || BTreeSet::from_iter(shunt_rules(&a));
    let whole = in_any_order();
    for rule in [&["priority", "221", "iif", "lk0"][..], &["priority", "219"], &["priority", "220"]] {
        a.ip(&[&["rule", "delete"], rule].concat());
    }
    a.ip(&["xfrm", "policy", "flush"]);
    wait_for("the rules", Duration::from_secs(20), || in_any_order() == whole);
    // What skips those that drop comes before them.
    let rules = shunt_rules(&a);
    let skips = rules.iter().rposition(|rule| rule.starts_with("221:") && rule.contains("goto"));
    assert!(skips < rules.iter().position(|rule| rule.contains("prohibit")), "{rules:?}");
    wait_for("the rule of the tunnel", Duration::from_secs(20), || a.check("ip", &["rule"]).contains("lookup 220"));
    wait_for("the policies", Duration::from_secs(20), || {
        a.check("ip", &["xfrm", "policy"]).contains("action block priority 59")
    });
    assert!(!arrives());

    // With one, it goes before what drops, and what passes goes before it.
    let there = Daemon::start(Latchkey, &b, &of_b, &vec![]);
    ours.initiate("net");
    assert!(a.pings(INNER_A, INNER_B), "{}{}", ours.output(), there.output());
    a.transfers_whole(INNER_A, &b, INNER_B, 1000);
    assert!(capture.count(&format!("tcp port {PORT}")) >= 8);
    assert_eq!(capture.count("icmp"), 0);

    // By hand, and what a daemon leaves that dies is gone with the next one.
    ours.control(&["--uninstall", "--child", "rest"]);
    assert_eq!(shunt_rules(&a).iter().filter(|rule| rule.contains("10.")).count(), 2);
    ours.control(&["--install", "--child", "rest"]);
    ours.signal("KILL");
    wait_for("its end", Duration::from_secs(20), || !ours.is_running());
    assert_eq!(shunt_rules(&a).iter().filter(|rule| rule.contains("10.")).count(), 3);
    let mut again = Daemon::start_empty(Latchkey, &a, "");
    assert_eq!(shunt_rules(&a), Vec::<String>::new());
    again.write(&of_a, &vec![]);
    again.control(&["--load-all"]);
    assert!(!shunt_rules(&a).is_empty());
    assert!(again.stop());
    assert_eq!(shunt_rules(&a), Vec::<String>::new());
}
