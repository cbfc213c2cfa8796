//! RFC 9329 with real daemons, real sockets and what networks do to them: filters, translators, relays, hostile clients.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::thread::sleep;
use std::time::{Duration, Instant};

use latchkey_tests::capture::Capture;
use latchkey_tests::daemon::Kind::{Latchkey, Strongswan};
use latchkey_tests::daemon::{Daemon, program};
use latchkey_tests::host::{Host, link, wait_for};
use latchkey_tests::middlebox::{A, B, ROUTER, Relay, Road};
use latchkey_tests::pki::Authority;
use latchkey_tests::scene::{INNER_A, INNER_B, Suite, configurations};

/// The router's outer address, which is the initiator's behind a translator.
const NATTED: &str = "192.0.2.254";

const OVER_TCP: Suite = Suite { connection: "tcp = yes\ndpd_delay = 5s\n", ..Suite::DEFAULT };

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// A connection over TLS, the settings of its responder, with the files in this folder, and the authority that it needs.
fn tls_site(folder: &std::path::Path, connection: &'static str) -> (Suite, String, Authority) {
    let authority = Authority::new("TLS CA", &rcgen::PKCS_ECDSA_P256_SHA256);
    let site = authority.issue_for_tls("b.example");
    let (cert, key) = (folder.join("site.pem"), folder.join("site.key"));
    std::fs::write(&cert, &site.certificate).unwrap();
    std::fs::write(&key, &site.key).unwrap();
    let settings = format!("tls_ports = 443\ntls_cert = {}\ntls_key = {}\n", cert.display(), key.display());
    (Suite { connection, ..Suite::DEFAULT }, settings, authority)
}

/// A road with such a connection and all that it needs.
fn over_tls(folder: &std::path::Path, connection: &'static str, remote: &str) -> Road {
    let (suite, settings, authority) = tls_site(folder, connection);
    let road = Road::with(&suite, remote, &settings);
    std::fs::write(road.a.path("swanctl/x509ca/ca.pem"), authority.certificate()).unwrap();
    road.a.control(&["--load-creds"]);
    road
}

/// The best time of three, as the machine may be busy: each on a road of its own, with nothing known of the network.
fn set_up_time(filter: &str, enough: Duration) -> Duration {
    let mut best = Duration::MAX;
    for _ in 0..3 {
        let road = Road::start(&Suite::DEFAULT, B);
        road.drop_forwarded(filter);
        let start = Instant::now();
        road.a.initiate("net");
        best = best.min(start.elapsed());
        assert!(road.is_over_tcp(), "{}", road.a.sas());
        road.passes();
        if best < enough {
            road.transfer(1 << 20).arrives_whole();
            break;
        }
    }
    eprintln!("the tunnel was up after {best:?}");
    best
}

// RFC 9329 §5.1: what a user feels of it, by default.
#[test]
fn with_udp_dropped_the_tunnel_is_up_within_two_and_a_half_seconds() {
    let enough = Duration::from_millis(2500);
    assert!(set_up_time("meta l4proto udp drop;", enough) < enough);
}

#[test]
fn with_udp_rejected_it_is_up_sooner() {
    let enough = Duration::from_millis(1400);
    assert!(set_up_time("meta l4proto udp reject with icmp type admin-prohibited;", enough) < enough);
}

// RFC 7296 §2.23, RFC 4555 §3.3: IKE_SA_INIT passes on port 500, and all else would be on 4500.
#[test]
fn where_only_port_4500_is_dropped_tcp_is_used() {
    let enough = Duration::from_millis(2500);
    assert!(set_up_time("udp dport 4500 drop; udp sport 4500 drop;", enough) < enough);
}

/// A road whose ends have code points of their own, 46 and 10, and what leaves each of them.
fn marked(connection: &'static str) -> (Road, [Capture; 2]) {
    let mut configurations = configurations(&Suite { connection, ..Suite::DEFAULT });
    for ((text, _), dscp) in configurations.iter_mut().zip(["101110", "001010"]) {
        *text = text.replace("version = 2\n", &format!("version = 2\ndscp = {dscp}\n"));
    }
    let road = Road::between(Latchkey, B, "", configurations);
    let captures = [Capture::start(&road.host_a, &road.device_a), Capture::start(&road.host_b, &road.device_b)];
    road.a.initiate("net");
    (road, captures)
}

const WITH_46: &str = "ip[1] & 0xfc = 0xb8";
const WITH_10: &str = "ip[1] & 0xfc = 0x28";

// RFC 2474, swanctl.conf(5): IKE has the connection's code point, from the first message on; ESP in the
// same sockets has the inner packet's.
#[test]
fn ike_has_the_connections_code_point_and_esp_the_packets() {
    let (road, captures) = marked("encap = yes\n");
    let class = |host: &Host, from, to| host.check("ping", &["-c", "2", "-i", "0.2", "-Q", "0x20", "-I", from, to]);
    class(&road.host_a, INNER_A, INNER_B);
    class(&road.host_b, INNER_B, INNER_A);
    road.a.control(&["--rekey", "--ike", "site"]);
    wait_for("a new IKE SA", seconds(20), || road.a.log().contains("rekeyed, successor is"));
    let of_ike = "udp and (port 500 or (port 4500 and udp[8:4] = 0))";
    let of_esp = "udp port 4500 and udp[4:2] > 40 and udp[8:4] != 0";
    for (capture, of_connection) in captures.iter().zip([WITH_46, WITH_10]) {
        wait_for("all packets", seconds(10), || capture.count(of_ike) >= 4 && capture.count(of_esp) >= 4);
        assert_eq!(capture.list(&format!("{of_ike} and not {of_connection}")), "");
        assert_eq!(capture.list(&format!("{of_esp} and not ip[1] & 0xfc = 0x20")), "");
    }
}

// RFC 9329 §6.8, §9.3: a stream has one code point, from the SYN on; the responder's side has it once the connection is known.
#[test]
fn a_stream_has_the_connections_code_point() {
    let (road, [of_a, of_b]) = marked("tcp = yes\n");
    road.passes();
    assert!(of_a.count(&format!("tcp port 4500 and {WITH_46}")) > 5);
    assert_eq!(of_a.list(&format!("tcp port 4500 and not {WITH_46}")), "");
    let unmarked = of_b.count(&format!("tcp port 4500 and not {WITH_10}"));
    road.passes();
    assert_eq!(of_b.count(&format!("tcp port 4500 and not {WITH_10}")), unmarked);
    assert!(of_b.count(&format!("tcp port 4500 and {WITH_10}")) > 5);
}

// RFC 9329 §7.1: UDP goes and comes back; one TCP connection in the tunnel sees nothing but a pause.
#[test]
fn a_file_survives_a_filter_that_comes_and_goes() {
    let suite = Suite { connection: "dpd_delay = 1s\ntcp_probe_udp = 2s\n", ..Suite::DEFAULT };
    survives_a_filter(&Road::start(&suite, B), "meta l4proto udp drop; ip protocol esp drop;");
}

// The same where IKE's own port 500 stays open, and a NAT keeps the two sides' mappings apart.
#[test]
fn a_file_survives_a_filter_of_port_4500_alone() {
    let suite = Suite { connection: "dpd_delay = 1s\ntcp_probe_udp = 2s\n", ..Suite::DEFAULT };
    let road = Road::start(&suite, B);
    road.router.masquerade(&road.outside);
    survives_a_filter(&road, "udp dport 4500 drop; udp sport 4500 drop; ip protocol esp drop;");
}

// The same with a network that says so, and with TLS.
#[test]
fn in_tls_a_file_survives_a_filter_that_rejects() {
    let folder = tempfile::tempdir().unwrap();
    let connection = "tcp = fallback-tls\ndpd_delay = 1s\ntcp_probe_udp = 2s\n";
    let road = over_tls(folder.path(), connection, B);
    survives_a_filter(&road, "meta l4proto { udp, esp } reject with icmp type admin-prohibited;");
}

fn survives_a_filter(road: &Road, filter: &str) {
    road.a.initiate("net");
    assert!(!road.is_over_tcp());
    road.slow_down(10_000);
    let spis = road.a.child_spis("INSTALLED");
    let mut transfer = road.transfer(8 << 20);
    sleep(seconds(1));
    road.drop_forwarded(filter);
    road.wait_for_transport(true);
    let before = transfer.arrived();
    wait_for("octets over TCP", seconds(30), || transfer.arrived() > before);
    assert!(transfer.goes_on());
    road.allow();
    road.wait_for_transport(false);
    transfer.arrives_whole();
    assert_eq!(road.a.child_spis("INSTALLED"), spis, "the Child SA is the same");
    // The stream is closed when it is over.
    wait_for("no TCP connection", seconds(10), || {
        road.host_a.check("ss", &["-Htn", "( dport = :4500 or dport = :443 )"]).is_empty()
    });
    road.passes();
}

// RFC 9329 §5, §9: without MOBIKE another IKE SA takes the place of the one over TCP, before that goes.
#[test]
fn without_mobike_a_file_survives_the_way_back_to_udp() {
    let connection = "mobike = no\ntcp_probe_udp = 1s\ntcp_reauth_udp = yes\n";
    let road = Road::start(&Suite { connection, ..Suite::DEFAULT }, B);
    road.drop_forwarded("meta l4proto udp drop; ip protocol esp drop;");
    road.a.initiate("net");
    assert!(road.is_over_tcp());
    road.slow_down(10_000);
    let mut transfer = road.transfer(8 << 20);
    wait_for("an attempt in vain", seconds(20), || road.a.log().contains("still"));
    assert!(transfer.goes_on() && road.is_over_tcp());
    road.allow();
    road.wait_for_transport(false);
    assert!(transfer.goes_on());
    transfer.arrives_whole();
    wait_for("no TCP connection", seconds(10), || road.host_a.check("ss", &["-Htn", "dport", "=", ":4500"]).is_empty());
    road.passes();
}

// RFC 9329 §6.1: resets, again and again; the originator opens another stream, and what the inner TCP lost it repeats.
#[test]
fn a_file_survives_resets() {
    let road = Road::start(&OVER_TCP, B);
    road.a.initiate("net");
    road.slow_down(10_000);
    let spis = road.a.child_spis("INSTALLED");
    let transfer = road.transfer(6 << 20);
    for host in [&road.host_a, &road.host_b, &road.host_a, &road.host_b] {
        sleep(Duration::from_millis(800));
        let port = if std::ptr::eq(host, &road.host_a) { "dport" } else { "sport" };
        host.check("ss", &["-K", port, "=", ":4500"]);
    }
    transfer.arrives_whole();
    assert_eq!(road.a.child_spis("INSTALLED"), spis, "the Child SA is the same");
}

// RFC 9329 §10: a middlebox resets connections at random, and tells one end only each time: the other sees an octet out of
// place, or nothing.
#[test]
fn a_file_survives_a_middlebox_that_resets_at_random() {
    let road = Road::start(&OVER_TCP, B);
    road.a.initiate("net");
    road.slow_down(10_000);
    let spis = road.a.child_spis("INSTALLED");
    let transfer = road.transfer(6 << 20);
    let ports = || {
        let streams = road.host_a.check("ss", &["-Htn", "state", "established", "dport", "=", ":4500"]);
        streams.split_whitespace().nth(2).map(str::to_owned)
    };
    let first = ports();
    road.drop_forwarded(
        "tcp dport 4500 numgen random mod 400 < 1 reject with tcp reset;
         tcp sport 4500 numgen random mod 400 < 1 reject with tcp reset;",
    );
    wait_for("another stream", seconds(60), || ports().is_some_and(|now| Some(now) != first));
    transfer.arrives_whole();
    assert_eq!(road.a.child_spis("INSTALLED"), spis, "the Child SA is the same");
}

// RFC 9329 §6.1: the translator forgets its mappings and takes another outside address.
#[test]
fn a_file_survives_another_nat_mapping() {
    for (connection, tcp) in [("tcp = yes\ndpd_delay = 1s\n", true), ("tcp = no\ndpd_delay = 1s\n", false)] {
        let road = Road::start(&Suite { connection, ..Suite::DEFAULT }, B);
        road.router.masquerade(&road.outside);
        road.a.initiate("net");
        assert_eq!(road.is_over_tcp(), tcp);
        road.slow_down(10_000);
        let transfer = road.transfer(4 << 20);
        sleep(seconds(1));
        road.router.ip(&["addr", "del", "192.0.2.254/24", "dev", &road.outside]);
        road.router.ip(&["addr", "add", "192.0.2.77/24", "dev", &road.outside]);
        road.host_b.ip(&["route", "replace", "default", "via", "192.0.2.77"]);
        transfer.arrives_whole();
        assert!(road.b.sas().contains("remote-host=192.0.2.77"), "{}", road.b.sas());
    }
}

// RFC 9329 §6.5, RFC 3948 §3.1.2: in transport mode the sender sums over addresses that a translator changes, and TCP's and
// UDP's checksums are made right again, whatever carries ESP.
#[test]
fn transport_mode_passes_a_nat() {
    for (connection, tcp) in [("tcp = yes\n", true), ("tcp = no\n", false)] {
        let suite = Suite { connection, child: "mode = transport\n", ..Suite::DEFAULT };
        let ends = configurations(&suite).map(|(configuration, files)| {
            let dynamic = configuration.replace("10.1.0.0/24", "dynamic").replace("10.2.0.0/24", "dynamic");
            (dynamic, files)
        });
        let road = Road::between(Latchkey, B, "", ends);
        road.router.masquerade(&road.outside);
        // Nothing gets through that is not in the tunnel, both ways.
        let ike = "udp dport { 500, 4500 } accept; udp sport { 500, 4500 } accept; tcp dport 4500 accept; tcp sport 4500 accept;";
        road.drop_forwarded(&format!("{ike} meta l4proto {{ tcp, udp, icmp, esp }} drop;"));
        road.a.initiate("net");
        assert_eq!(road.is_over_tcp(), tcp);
        assert!(road.a.sas().contains("mode=TRANSPORT"), "{}", road.a.sas());
        road.host_a.transfers_whole(A, &road.host_b, B, 2 << 20);
        assert!(road.host_a.pings(A, B) && road.host_b.pings(B, NATTED), "{}{}", road.a.output(), road.b.output());
    }
}

/// Several Child SAs and a virtual address, of one IKE SA.
fn with_a_virtual_address(connection: &'static str) -> Road {
    let [(of_a, files_a), (of_b, files_b)] = configurations(&Suite { connection, ..Suite::DEFAULT });
    let second = "}\nother {\nlocal_ts = dynamic\nremote_ts = 10.4.0.0/24\nesp_proposals = aes128gcm16\n}\n}\n}\n}\n";
    let of_a = of_a
        .replace("version = 2\n", "version = 2\nvips = 0.0.0.0\n")
        .replace("local_ts = 10.1.0.0/24", "local_ts = dynamic")
        .replacen("}\n}\n}\n}\n", second, 1);
    let second = second.replace("10.4.0.0/24", "REMOTE").replace("dynamic", "10.4.0.0/24").replace("REMOTE", "dynamic");
    let of_b = of_b
        .replace("version = 2\n", "version = 2\npools = four\n")
        .replace("remote_ts = 10.1.0.0/24", "remote_ts = dynamic")
        .replacen("}\n}\n}\n}\n", &second, 1);
    let road = Road::between(
        Latchkey,
        B,
        "",
        [(of_a, files_a), (format!("{of_b}pools {{\nfour {{\naddrs = 10.3.0.0/24\n}}\n}}\n"), files_b)],
    );
    road.host_b.add_inner("10.4.0.1/24");
    road
}

/// Both Child SAs of [`with_a_virtual_address`] carry packets both ways.
fn both_pass(road: &Road) {
    for inner in [INNER_B, "10.4.0.1"] {
        let passes = road.host_a.pings(VIRTUAL, inner) && road.host_b.pings(inner, VIRTUAL);
        assert!(passes, "{inner}: {}{}", road.a.output(), road.b.output());
    }
}

const VIRTUAL: &str = "10.3.0.1";

// RFC 9329 §7.1: all Child SAs of an IKE SA move with it, what is being rekeyed too, and a virtual address stays.
#[test]
fn several_child_sas_and_a_virtual_address_move_together() {
    let road = with_a_virtual_address("dpd_delay = 1s\ntcp_probe_udp = 1s\n");
    road.a.initiate("net");
    road.a.initiate("other");
    both_pass(&road);
    for round in 0..2 {
        road.drop_forwarded("meta l4proto udp drop; ip protocol esp drop;");
        // A rekey of either kind, or by either side, is under way when the path breaks, and when it comes back.
        let before = road.a.child_spis("INSTALLED");
        if round == 0 {
            road.a.control(&["--rekey", "--child", "net"]);
        } else {
            road.b.control(&["--rekey", "--child", "other"]);
        }
        road.wait_for_transport(true);
        wait_for("new SPIs", seconds(30), || {
            let now = road.a.child_spis("INSTALLED");
            now.len() == 2 && now != before
        });
        both_pass(&road);
        road.allow();
        let daemon = if round == 0 { &road.b } else { &road.a };
        daemon.control(&["--rekey", "--ike", "site"]);
        road.wait_for_transport(false);
        both_pass(&road);
        assert!(road.a.sas().contains(&format!("local-vips=[{VIRTUAL}]")), "{}", road.a.sas());
        wait_for("no TCP connection", seconds(20), || {
            road.host_a.check("ss", &["-Htn", "dport", "=", ":4500"]).is_empty()
        });
    }
    assert_eq!((road.a.established(), road.b.established()), (1, 1));
    assert_eq!((road.a.child_spis("INSTALLED").len(), road.b.child_spis("INSTALLED").len()), (2, 2));
}

// RFC 9329 §5, §9: without MOBIKE another IKE SA leads back to UDP: it has the same Child SAs and the same virtual address.
#[test]
fn without_mobike_a_virtual_address_survives_the_way_back_to_udp() {
    let road = with_a_virtual_address("mobike = no\ntcp_probe_udp = 1s\ntcp_reauth_udp = yes\n");
    road.drop_forwarded("meta l4proto udp drop; ip protocol esp drop;");
    road.a.initiate("net");
    road.a.initiate("other");
    assert!(road.is_over_tcp());
    both_pass(&road);
    wait_for("an attempt in vain", seconds(20), || road.a.log().contains("still"));
    road.allow();
    road.wait_for_transport(false);
    wait_for("both Child SAs", seconds(20), || road.a.child_spis("INSTALLED").len() == 2);
    assert!(road.a.sas().contains(&format!("local-vips=[{VIRTUAL}]")), "{}", road.a.sas());
    both_pass(&road);
    wait_for("one IKE SA at the gateway", seconds(20), || road.b.established() == 1);
}

// RFC 9329 §5.1: a peer that has no TCP encapsulation is asked for it in vain, and costs nothing but the attempt: UDP goes on
// where it was when it works again.
#[test]
fn with_a_peer_that_has_no_tcp_there_is_udp() {
    let ends = configurations(&Suite { connection: "dpd_delay = 1s\n", ..Suite::DEFAULT });
    let road = Road::between(Strongswan, B, "", ends);
    let filter = "meta l4proto udp drop; ip protocol esp drop;";
    road.drop_forwarded(filter);
    assert!(!road.a.swanctl(&["--initiate", "--child", "net", "--timeout", "4"]).status.success());
    assert!(road.a.log().contains("refused"), "TCP was tried: {}", road.a.output());
    road.allow();
    // The attempt goes on by itself.
    wait_for("a tunnel", seconds(40), || road.a.child_spis("INSTALLED").len() == 1);
    assert!(!road.is_over_tcp());
    road.passes();

    road.slow_down(10_000);
    let spis = road.a.child_spis("INSTALLED");
    let transfer = road.transfer(4 << 20);
    sleep(seconds(1));
    road.drop_forwarded(filter);
    let attempts = |log: String| log.matches("trying TCP port 4500").count();
    let before = attempts(road.a.log());
    wait_for("attempts over TCP", seconds(20), || attempts(road.a.log()) > before + 1);
    road.allow();
    transfer.arrives_whole();
    assert_eq!(road.a.child_spis("INSTALLED"), spis, "the Child SA is the same");
    assert!(!road.is_over_tcp());
}

// Segments of one octet, all of 50 ms in one, a delay, a damaged octet, and a hole.
#[test]
fn a_file_survives_a_relay_that_does_its_worst() {
    let road = Road::start(&OVER_TCP, ROUTER);
    let mut relay = Relay::start(&road.router, &format!("{ROUTER}:4500"), &format!("{B}:4500"));
    relay.tell("octets");
    road.a.initiate("net");
    road.passes();
    relay.tell("pass");
    road.slow_down(10_000);
    let spis = road.a.child_spis("INSTALLED");
    let mut transfer = road.transfer(6 << 20);
    for what in ["octets", "merge", "delay 40", "corrupt", "pass", "corrupt", "hold", "pass"] {
        assert!(transfer.goes_on(), "not before {what}");
        relay.tell(what);
        sleep(Duration::from_millis(500));
    }
    transfer.arrives_whole();
    assert_eq!(road.a.child_spis("INSTALLED"), spis, "the Child SA is the same");
}

// RFC 9329 Appendix A: what befalls a stream befalls one in TLS: pieces, delays, damage, holes, resets, loss, another
// mapping. Each new stream resumes the session.
#[test]
fn in_tls_a_file_survives_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let connection = "tcp = tls\ndpd_delay = 5s\n";
    let road = over_tls(folder.path(), connection, ROUTER);
    let mut relay = Relay::start(&road.router, &format!("{ROUTER}:443"), &format!("{B}:443"));
    relay.tell("octets");
    road.a.initiate("net");
    road.passes();
    relay.tell("pass");
    road.slow_down(10_000);
    let spis = road.a.child_spis("INSTALLED");
    let mut transfer = road.transfer(6 << 20);
    for what in ["octets", "merge", "delay 40", "corrupt", "pass", "corrupt", "hold", "pass"] {
        assert!(transfer.goes_on(), "not before {what}");
        relay.tell(what);
        sleep(Duration::from_millis(500));
    }
    road.host_a.check("ss", &["-K", "dport", "=", ":443"]);
    transfer.arrives_whole();
    assert_eq!(road.a.child_spis("INSTALLED"), spis, "the Child SA is the same");

    let road = over_tls(folder.path(), connection, B);
    road.router.masquerade(&road.outside);
    road.a.initiate("net");
    road.drop_forwarded("numgen random mod 100 < 1 drop;");
    road.slow_down(10_000);
    let transfer = road.transfer(4 << 20);
    sleep(seconds(1));
    road.router.ip(&["addr", "del", "192.0.2.254/24", "dev", &road.outside]);
    road.router.ip(&["addr", "add", "192.0.2.77/24", "dev", &road.outside]);
    road.host_b.ip(&["route", "replace", "default", "via", "192.0.2.77"]);
    transfer.arrives_whole();
    assert!(road.b.sas().contains("remote-host=192.0.2.77"), "{}", road.b.sas());
}

// RFC 9329 §6.1: what is damaged is noticed by its check, or by what no longer parses after it.
#[test]
fn a_corrupted_stream_is_closed_and_opened_again() {
    let road = Road::start(&OVER_TCP, ROUTER);
    let mut relay = Relay::start(&road.router, &format!("{ROUTER}:4500"), &format!("{B}:4500"));
    road.a.initiate("net");
    road.passes();
    relay.tell("corrupt");
    wait_for("a stream that is closed for what it said", seconds(20), || {
        let _ = road.host_a.run("ping", &["-c", "3", "-i", "0.05", "-W", "1", "-I", INNER_A, INNER_B]);
        road.b.output().contains("failed its integrity check") || road.b.output().contains("mean nothing here")
    });
    wait_for("another stream", seconds(20), || road.host_a.pings(INNER_A, INNER_B));
    assert_eq!(road.a.established(), 1);
}

// One packet of a hundred is lost, over UDP and over TCP.
#[test]
fn a_file_survives_loss() {
    for connection in ["tcp = no\n", "tcp = yes\n"] {
        let road = Road::start(&Suite { connection, ..Suite::DEFAULT }, B);
        road.a.initiate("net");
        road.drop_forwarded("numgen random mod 100 < 1 drop;");
        road.transfer(4 << 20).arrives_whole();
    }
}

/// The median of some pings through the tunnel, in milliseconds.
fn median_ping(road: &Road) -> f64 {
    let pings = road.host_a.check("ping", &["-i", "0.1", "-c", "15", "-W", "5", "-I", INNER_A, INNER_B]);
    let times = pings.split("time=").skip(1).filter_map(|rest| rest.split(' ').next()?.parse().ok());
    let mut times: Vec<f64> = times.collect();
    times.sort_by(f64::total_cmp);
    *times.get(times.len() / 2).unwrap()
}

// RFC 9329 §9.1, RFC 8289: on a narrow path what is in the tunnel does not wait for seconds behind a transfer.
#[test]
fn a_transfer_over_a_narrow_path_leaves_room_for_others() {
    let folder = tempfile::tempdir().unwrap();
    for road in [Road::start(&OVER_TCP, B), over_tls(folder.path(), "tcp = tls\ndpd_delay = 5s\n", B)] {
        road.a.initiate("net");
        road.slow_down(2000);
        let mut transfer = road.transfer(2 << 20);
        sleep(seconds(1));
        let median = median_ping(&road);
        eprintln!("{median} ms");
        assert!(transfer.goes_on());
        // A queue of 256 packets and what TCP holds unsent by default would be two seconds.
        assert!(median < 400.0, "{median} ms");
    }
}

// RFC 9329 §2, §5: several ports, also one that gets through where 4500 does not.
#[test]
fn port_443_is_served_as_well() {
    let suite = Suite { connection: "tcp = fallback\ntcp_remote_port = 443\n", ..Suite::DEFAULT };
    let road = Road::with(&suite, B, "tcp_ports = 4500, 443\n");
    road.drop_forwarded("meta l4proto udp drop; tcp dport 4500 drop;");
    road.a.initiate("net");
    assert!(road.is_over_tcp());
    road.passes();
    let streams = road.host_b.check("ss", &["-Htn", "sport", "=", ":443"]);
    assert_eq!(streams.lines().count(), 1, "{streams}");
    // RFC 9329 §6.1: closed after the Delete.
    road.a.control(&["--terminate", "--ike", "site"]);
    wait_for("no TCP connection", seconds(10), || {
        road.host_b.check("ss", &["-Htn", "state", "established", "sport", "=", ":443"]).is_empty()
    });
}

// RFC 9329 §3, §9.4: what the tunnel takes fits the segments that the stream negotiates, so few packets span two.
#[test]
fn messages_are_no_longer_than_over_udp() {
    let road = Road::start(&OVER_TCP, B);
    road.a.initiate("net");
    assert!(road.host_a.check("ip", &["link", "show", "lk0"]).contains("mtu 1400"));
    road.transfer(1 << 20).arrives_whole();
    let streams = road.host_a.check("ss", &["-Htni", "dport", "=", ":4500"]);
    let mss: usize = streams.split("mss:").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!((1400..=1460).contains(&mss), "{streams}");
}

// RFC 9329 Appendix A: on port 443, where a probe finds a web site; the certificate is checked before a word is said.
#[test]
fn over_tls_beside_a_web_server() {
    let folder = tempfile::tempdir().unwrap();
    let (suite, settings, authority) =
        tls_site(folder.path(), "tcp = fallback-tls\ndpd_delay = 5s\ntcp_probe_udp = 1h\n");
    let road = Road::with(&suite, B, &format!("{settings}tcp_ports = no\ntls_web = 127.0.0.1:8080\n"));
    road.drop_forwarded(
        "meta l4proto udp drop; tcp dport 443 accept; tcp sport 443 accept; meta l4proto { tcp, esp } drop;",
    );
    let answer = r#"TCP-LISTEN:8080,bind=127.0.0.1,fork,reuseaddr SYSTEM:"read x; echo HTTP/1.0 200 OK; echo; echo the web site""#;
    let (listen, system) = answer.split_once(' ').unwrap();
    let _web = road.host_b.spawn("socat", &[listen, &system.replace('"', "")]);
    road.host_b.wait_for_listener(8080);
    let probe = || {
        let get = format!("printf 'GET / HTTP/1.0\\r\\n\\r\\n' | socat -t5 - OPENSSL:{B}:443,verify=0");
        road.host_a.check("sh", &["-c", &get])
    };
    assert!(probe().contains("the web site"));

    // Without the CA there is no stream.
    assert!(!road.a.swanctl(&["--initiate", "--child", "net", "--timeout", "4"]).status.success());
    assert!(road.a.log().contains("there is no CA certificate"), "{}", road.a.output());
    road.a.control(&["--terminate", "--ike", "site", "--force"]);
    let other = Authority::new("another CA", &rcgen::PKCS_ECDSA_P256_SHA256);
    std::fs::write(road.a.path("swanctl/x509ca/ca.pem"), other.certificate()).unwrap();
    road.a.control(&["--load-creds"]);
    assert!(!road.a.swanctl(&["--initiate", "--child", "net", "--timeout", "4"]).status.success());
    assert!(road.a.log().contains("invalid peer certificate"), "{}", road.a.output());
    let _ = road.a.swanctl(&["--terminate", "--ike", "site", "--force"]);

    std::fs::write(road.a.path("swanctl/x509ca/ca.pem"), authority.certificate()).unwrap();
    road.a.control(&["--load-creds"]);
    road.a.initiate("net");
    assert!(road.is_over_tcp());
    road.passes();
    let spis = road.a.child_spis("INSTALLED");
    road.host_a.check("ss", &["-K", "dport", "=", ":443"]);
    road.transfer(4 << 20).arrives_whole();
    assert_eq!(road.a.child_spis("INSTALLED"), spis, "the Child SA is the same");
    assert!(probe().contains("the web site"));
}

/// A web proxy that knows CONNECT alone, and only for port 443.
const PROXY: &str = r#"
import socket, sys, threading
def pump(a, b):
    try:
        while data := a.recv(65536):
            b.sendall(data)
        b.shutdown(socket.SHUT_WR)
    except OSError:
        pass
def serve(client):
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        head += client.recv(1)
    method, target, _ = head.split(b"\r\n")[0].decode().split()
    host, port = target.rsplit(":", 1)
    if method != "CONNECT" or port != "443":
        client.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")
        return client.close()
    server = socket.create_connection((host, int(port)))
    client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
    threading.Thread(target=pump, args=(client, server), daemon=True).start()
    pump(server, client)
listener = socket.create_server((sys.argv[1], 3128))
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"#;

// RFC 9329 Appendix A: where nothing gets through but what a web proxy connects.
#[test]
fn through_a_web_proxy() {
    let folder = tempfile::tempdir().unwrap();
    let connection = "tcp = fallback-tls\ntcp_proxy = 198.51.100.254:3128\ndpd_delay = 5s\n";
    let road = over_tls(folder.path(), connection, B);
    road.drop_forwarded("drop;");
    let _proxy = road.router.spawn("python3", &["-c", PROXY, ROUTER]);
    road.router.wait_for_listener(3128);
    road.a.initiate("net");
    assert!(road.is_over_tcp());
    road.passes();
    let spis = road.a.child_spis("INSTALLED");
    road.host_a.check("ss", &["-K", "dport", "=", ":3128"]);
    road.transfer(1 << 20).arrives_whole();
    assert_eq!(road.a.child_spis("INSTALLED"), spis, "the Child SA is the same");

    // One that refuses is not gone around.
    let connection = "tcp = yes\ntcp_proxy = 198.51.100.254:3128\n";
    let road = Road::start(&Suite { connection, ..Suite::DEFAULT }, B);
    let _proxy = road.router.spawn("python3", &["-c", PROXY, ROUTER]);
    road.router.wait_for_listener(3128);
    assert!(!road.a.swanctl(&["--initiate", "--child", "net", "--timeout", "3"]).status.success());
    assert!(road.a.log().contains("the proxy refuses: HTTP/1.1 403 Forbidden"), "{}", road.a.output());
}

/// One direction of a stream, cut into messages by nothing but the lengths (RFC 9329 §3).
fn messages(mut octets: &[u8]) -> Vec<&[u8]> {
    let mut messages = Vec::new();
    while let Some((length, rest)) = octets.split_first_chunk::<2>() {
        let (message, rest) = rest.split_at(usize::from(u16::from_be_bytes(*length)) - 2);
        messages.push(message);
        octets = rest;
    }
    messages
}

/// A capture (pcap, raw IPv4) of these messages as they would be over UDP port 4500, where they look the same.
fn over_udp(messages: &[(bool, &[u8])]) -> Vec<u8> {
    let mut capture = Vec::new();
    for word in [0xa1b2_c3d4_u32, 0x0002_0004, 0, 0, 65_535, 101] {
        capture.extend(word.to_be_bytes());
    }
    for (number, (from_a, message)) in messages.iter().enumerate() {
        let (source, destination) = if *from_a { (1, 2) } else { (2, 1) };
        let length = u16::try_from(message.len() + 28).unwrap();
        let mut packet = vec![0x45, 0];
        packet.extend(length.to_be_bytes());
        packet.extend([0, 0, 0, 0, 64, 17, 0, 0, 192, 0, 2, source, 192, 0, 2, destination]);
        packet.extend([4500_u16, 4500, length - 20, 0].iter().flat_map(|field| field.to_be_bytes()));
        packet.extend_from_slice(message);
        let length = u32::from(length);
        for word in [1, u32::try_from(number).unwrap(), length, length] {
            capture.extend(word.to_be_bytes());
        }
        capture.extend(packet);
    }
    capture
}

// A capture of our own stream has nothing that tshark complains of: neither TCP, nor the messages in it. tshark 4 does not
// know RFC 9329's framing, so it gets the messages as over UDP.
#[test]
fn tshark_reads_our_stream() {
    let road = Road::start(&OVER_TCP, B);
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (wire, udp) = (path("wire.pcap"), path("udp.pcap"));
    let mut capture = road.host_a.spawn("tshark", &["-q", "-i", &road.device_a, "-f", "tcp port 4500", "-w", &wire]);
    // It says so on standard error, and has the file then.
    wait_for("a capture", seconds(20), || std::fs::metadata(&wire).is_ok_and(|file| file.len() > 0));
    road.a.initiate("net");
    road.passes();
    road.a.control(&["--rekey", "--child", "net"]);
    road.b.control(&["--rekey", "--ike", "site"]);
    sleep(seconds(1));
    road.passes();
    road.a.control(&["--terminate", "--ike", "site"]);
    sleep(seconds(2));
    std::process::Command::new("kill").args(["-s", "INT", &capture.0.id().to_string()]).status().unwrap();
    capture.wait_at_most(seconds(20));

    // RFC 9329 §9.5: by default we do not ask for ECN.
    let asking = road.host_a.check("tshark", &["-r", &wire, "-Y", "tcp.flags.syn == 1 && tcp.flags.ece == 1"]);
    assert_eq!(asking, "");
    let complaints = road.host_a.check("tshark", &["-r", &wire, "-Y", "_ws.malformed || tcp.analysis.out_of_order"]);
    assert_eq!(complaints, "");
    // RFC 9329 §6.8: no outer packet is to be fragmented, whatever the inner ones say.
    assert_eq!(road.host_a.check("tshark", &["-r", &wire, "-Y", "ip.flags.df == 0"]), "");
    let follow = road.host_a.check("tshark", &["-r", &wire, "-q", "-z", "follow,tcp,raw,0"]);
    let mut ends: [Vec<u8>; 2] = Default::default();
    for line in follow.lines() {
        let hex = line.trim();
        if hex.is_empty() || !hex.bytes().all(|octet| octet.is_ascii_hexdigit()) {
            continue;
        }
        let octets =
            hex.as_bytes().chunks(2).map(|two| u8::from_str_radix(std::str::from_utf8(two).unwrap(), 16).unwrap());
        ends[usize::from(line.starts_with('\t'))].extend(octets);
    }
    // RFC 9329 §4: the prefix once, from the originator alone.
    let from_a = ends[0].strip_prefix(b"IKETCP").expect("the stream prefix");
    let (of_a, of_b) = (messages(from_a), messages(&ends[1]));
    let all: Vec<(bool, &[u8])> =
        of_a.iter().map(|message| (true, *message)).chain(of_b.iter().map(|message| (false, *message))).collect();
    std::fs::write(&udp, over_udp(&all)).unwrap();
    let complaints = road.host_a.check("tshark", &["-r", &udp, "-Y", "_ws.malformed || _ws.expert.severity == error"]);
    assert_eq!(complaints, "");
    let count = |what: &str| road.host_a.check("tshark", &["-r", &udp, "-Y", what]).lines().count();
    let (ike, esp) = (count("isakmp"), count("esp"));
    assert_eq!(ike + esp, all.len(), "all are IKE or ESP");
    // IKE_SA_INIT, IKE_AUTH, both rekeys with their Deletes, and the end; pings both ways.
    assert!(ike >= 12 && esp >= 12, "{ike} {esp}");
}

// RFC 9329 §6.1: a connection that replaces another has the same IPv6 flow label, for routers that spread flows by it.
#[test]
fn the_flow_label_stays_when_a_stream_is_opened_again() {
    let (host_a, host_b) = (Host::new(), Host::new());
    let (device, _) = link(&host_a, "2001:db8::1/64", &host_b, "2001:db8::2/64");
    host_a.add_inner("10.1.0.1/24");
    host_b.add_inner("10.2.0.1/24");
    let [(of_a, files_a), (of_b, files_b)] = configurations(&OVER_TCP);
    let six = |text: String| text.replace("192.0.2.", "2001:db8::");
    let _b = Daemon::start(Latchkey, &host_b, &six(of_b), &files_b);
    let a = Daemon::start(Latchkey, &host_a, &six(of_a), &files_a);
    let folder = tempfile::tempdir().unwrap();
    let wire = folder.path().join("wire.pcap").to_str().unwrap().to_owned();
    let mut capture = host_a.spawn("tshark", &["-q", "-i", &device, "-f", "tcp port 4500", "-w", &wire]);
    wait_for("a capture", seconds(20), || std::fs::metadata(&wire).is_ok_and(|file| file.len() > 0));
    a.initiate("net");
    for _ in 0..2 {
        host_a.check("ss", &["-K", "dport", "=", ":4500"]);
        wait_for("another stream", seconds(20), || host_a.pings(INNER_A, INNER_B));
    }
    sleep(seconds(1));
    std::process::Command::new("kill").args(["-s", "INT", &capture.0.id().to_string()]).status().unwrap();
    capture.wait_at_most(seconds(20));
    let show = |filter: &str, field: &str| {
        let shown = host_a.check("tshark", &["-r", &wire, "-Y", filter, "-T", "fields", "-e", field]);
        let mut shown: Vec<String> = shown.lines().map(str::to_owned).collect();
        shown.sort();
        shown.dedup();
        shown
    };
    assert!(show("tcp.dstport == 4500", "tcp.stream").len() >= 3);
    for end in ["tcp.dstport == 4500", "tcp.srcport == 4500 && tcp.len > 0"] {
        let labels = show(end, "ipv6.flow");
        assert_eq!(labels.len(), 1, "{end}: {labels:?}");
    }
}

/// A host full of hostile clients on the responder's side of the router, with many addresses.
fn enemy(road: &Road) -> Host {
    let enemy = Host::new();
    link(&enemy, "203.0.113.1/24", &road.host_b, "203.0.113.2/24");
    enemy.ip(&["route", "add", "local", "198.18.0.0/16", "dev", "lo"]);
    road.host_b.ip(&["route", "add", "198.18.0.0/16", "via", "203.0.113.1"]);
    enemy
}

// RFC 9329 §10: a responder under hundreds of hostile connections, from one address and from many; the tunnel beside
// loses nothing, newcomers get in, and nothing is left.
#[test]
fn hostile_clients_cost_the_others_nothing() {
    let road = Road::start(&OVER_TCP, B);
    road.a.initiate("net");
    let enemy = enemy(&road);
    let memory = road.b.resident();
    for sources in ["0", "200"] {
        let mut hostile =
            enemy.command(program("hostile").to_str().unwrap(), &["203.0.113.2:4500", "1500", "6", sources]);
        let hostile = hostile.stdout(std::process::Stdio::piped()).spawn().unwrap();
        sleep(seconds(1));
        let pings = road.host_a.check("ping", &["-q", "-i", "0.01", "-c", "300", "-I", INNER_A, INNER_B]);
        assert!(pings.contains(" 0% packet loss"), "{pings}");
        let streams = road.host_b.check("ss", &["-Htn", "state", "established", "sport", "=", ":4500"]).lines().count();
        // Bounded by address and in total, but for what waits to be accepted.
        assert!(streams <= if sources == "0" { 32 + 1 } else { 1024 + 1 } + 200, "{streams} streams");
        // Somebody new comes over TCP meanwhile.
        road.a.control(&["--terminate", "--ike", "site"]);
        road.a.initiate("net");
        road.passes();
        let output = hostile.wait_with_output().unwrap();
        eprintln!("{} clients: {}", sources, String::from_utf8_lossy(&output.stdout));
        assert!(output.status.success());
    }
    wait_for("nothing but the tunnel's stream", seconds(30), || {
        road.host_b.check("ss", &["-Htn", "state", "established", "sport", "=", ":4500"]).lines().count() == 1
    });
    let grown = road.b.resident().saturating_sub(memory);
    assert!(grown < 64 * 1024, "{grown} kB more than before");
    road.passes();
}
