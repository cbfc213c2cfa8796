//! Nothing of a latched connection leaves in clear or reaches another peer, whatever happens (RFC 5660 §2): captures on
//! every wire, and in the wrong peer's tunnel, are the witness.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::time::Duration;

use latchkey_tests::capture::Capture;
use latchkey_tests::daemon::Daemon;
use latchkey_tests::daemon::Kind::{Latchkey, Strongswan};
use latchkey_tests::host::{Host, link, wait_for};
use latchkey_tests::latched;
use latchkey_tests::scene::{Suite, configurations};
use latchkey_tests::witness::{BREAKS, Echo, MARK, Talk, Talker, Three, Wires};

const PATIENCE: Duration = Duration::from_secs(30);

/// What C's tunnel delivers of A's connections.
const OF_A: &str = "(tcp or udp) and port 7 and host 10.1.0.1";

// RFC 5660 §2.3, §2.3.2: a peer with a valid certificate of the same authority claims the server's address while the
// connection is in use, and gets nothing of it, nor gets anything into it.
#[test]
fn an_impostor_gets_nothing_and_is_not_heard() {
    let three = Three::start(Latchkey, |text| text);
    let Three { a, c, host_a, host_b, host_c, .. } = &three;
    let (wires, loot) = (three.wires(), Capture::delivered(host_c, "lk0"));
    let _echo = Echo::start(host_b, "10.2.0.1");
    let tcp = Talker::start(a, host_a, &Talk::default());
    let udp = Talk { udp: true, on_break: "wait", local: "10.1.0.1:40008", ..Talk::default() };
    let udp = Talker::start(a, host_a, &udp);
    tcp.talks();
    udp.talks();
    c.initiate("net-a");
    tcp.says("alert broken an SA of c.example claims");
    udp.says("alert broken an SA of c.example claims");
    // RFC 5660 §2.3: the same addresses and ports, under a valid SA of the wrong peer.
    for _ in 0..5 {
        let _ = host_c
            .run("sh", &["-c", "echo FORGED | socat -u - UDP4-DATAGRAM:10.1.0.1:40008,bind=10.2.0.1:7,reuseaddr"]);
    }
    tcp.is_silenced();
    udp.is_silenced();
    assert_eq!(loot.list(OF_A), "", "C has got something of the latched connections");
    assert!(!loot.contains(MARK));
    wires.saw_nothing();
    // The witnesses are awake: what is not latched, C gets.
    let _ = host_a.run("ping", &["-c", "2", "-i", "0.2", "-W", "1", "-I", "10.1.0.1", "10.2.0.1"]);
    wait_for("what is not latched, at C", PATIENCE, || loot.count("icmp and host 10.1.0.1") > 0);
    // RFC 5660 §2.2: when C has gone, B is there again, and what waited goes on.
    c.control(&["--terminate", "--ike", "to-a"]);
    udp.says("alert established");
    udp.talks();
    assert!(!udp.report().contains("foreign"), "{}", udp.report());
    wires.saw_nothing();
    wires.saw("esp or udp port 4500");
}

// RFC 5660 §2.3: what another peer asks for is narrowed around latched connections, also when it rekeys; it gets the rest.
#[test]
fn an_impostor_gets_all_but_the_latched_connections() {
    latched::an_impostor_gets_all_but_the_latched_connections(Latchkey);
}

// RFC 5660 §2.3, RFC 7296 §2.9: the same with another implementation, which is answered with several selectors when it asks, and
// offered several when it is asked; and what is left of the network works.
#[test]
fn strongswan_gets_all_but_the_latched_connections() {
    let three = Three::with_stranger(Latchkey, Strongswan, "", |text| text);
    let Three { a, c, host_a, host_b, host_c, .. } = &three;
    let wires = three.wires();
    let _echo = Echo::start(host_b, "10.2.0.1");
    let tcp = Talker::start(a, host_a, &Talk::default());
    let udp = Talk { udp: true, local: "10.1.0.1:40008", ..Talk::default() };
    let udp = Talker::start(a, host_a, &udp);
    tcp.talks();
    udp.talks();
    let stay = || {
        tcp.talks();
        udp.talks();
        assert!(!tcp.report().contains("alert"), "{}", tcp.report());
        assert!(!udp.report().contains("alert") && !udp.report().contains("foreign"), "{}", udp.report());
    };
    let loot = Capture::delivered(host_c, "ipsec0");
    for (asks, child, ike) in [(c, "net-a", "to-a"), (a, "net-c", "to-c")] {
        asks.initiate(child);
        let sas = c.sas();
        for expected in ["10.1.0.1/32[tcp/0-40006]", "10.1.0.1/32[tcp/40008-65535]", "10.1.0.1/32[icmp]", "10.1.0.2"] {
            assert!(sas.contains(expected), "{expected}: {sas}");
        }
        // What is not latched works both ways, with several selectors on one side.
        assert!(host_c.pings("10.2.0.1", "10.1.0.1"), "{}{}", a.output(), c.output());
        let _ = host_c
            .run("sh", &["-c", "echo FORGED | socat -u - UDP4-DATAGRAM:10.1.0.1:40008,bind=10.2.0.1:7,reuseaddr"]);
        stay();
        let before = c.child_spis("INSTALLED");
        asks.control(&["--rekey", "--child", child]);
        wait_for("the successor", PATIENCE, || c.child_spis("INSTALLED").iter().any(|spi| !before.contains(spi)));
        assert!(host_c.pings("10.2.0.1", "10.1.0.1"), "{}{}", a.output(), c.output());
        stay();
        assert_eq!(loot.list(OF_A), "", "C has got something of the latched connections");
        asks.control(&["--terminate", "--ike", ike]);
        wait_for("its end", PATIENCE, || c.child_spis("INSTALLED").is_empty());
    }
    wires.saw_nothing();
}

// RFC 5660 §2, §2.5: with `latch_flows` a connection of a program that knows nothing of latches does not move to another peer.
#[test]
fn flows_that_nobody_latches_stay_with_their_peer() {
    let three = Three::with(Latchkey, &format!("{BREAKS}latch_flows = wait\n"), |text| text);
    let Three { a, c, host_a, host_b, host_c, .. } = &three;
    let loot = Capture::delivered(host_c, "lk0");
    let _echo = Echo::start(host_b, "10.2.0.1");
    a.initiate("net-b");
    let heard = a.path("heard");
    let talk = |port: u16| {
        let talk = format!(
            "while sleep 0.1; do echo plain; done | socat - TCP4:10.2.0.1:7,bind=10.1.0.1:{port} > {}",
            heard.display()
        );
        host_a.spawn("sh", &["-c", &talk])
    };
    let _running = talk(40_050);
    let length = || std::fs::metadata(&heard).map_or(0, |file| file.len());
    wait_for("the connection", PATIENCE, || length() > 0);
    let latches = || {
        let socket = a.latch_socket();
        host_a.check(
            latchkey_tests::daemon::program("latchkey").to_str().unwrap(),
            &["latches", "--socket", socket.to_str().unwrap()],
        )
    };
    let listed = latches();
    let line = listed.lines().find(|line| line.contains("10.1.0.1:40050 - 10.2.0.1:7")).unwrap();
    assert!(line.contains("established") && line.ends_with("b.example  automatic"), "{listed}");
    c.initiate("net-a");
    wait_for("the break", PATIENCE, || latches().contains("broken       tcp  10.1.0.1:40050"));
    // What begins now is C's, and shows that its tunnel would have delivered the other one.
    let _ = host_a.run("socat", &["-u", "/dev/null", "TCP4:10.2.0.1:7,bind=10.1.0.1:40051,connect-timeout=2"]);
    wait_for("a new connection, at C", PATIENCE, || loot.count("tcp port 40051") > 0);
    assert_eq!(loot.list("port 40050"), "", "C has got something of the running connection");
    let before = length();
    // And when C has gone, it goes on with B.
    c.control(&["--terminate", "--ike", "to-a"]);
    wait_for("more of the connection", PATIENCE, || length() > before);
    assert_eq!(loot.list("port 40050"), "");
}

// RFC 5660 §2 (13), fail closed: the daemon is killed at each step of a latch's life, and afterwards started again. The host
// has a route that would carry everything in clear.
#[test]
fn nothing_leaves_wherever_the_daemon_is_killed() {
    latched::nothing_leaves_wherever_the_daemon_is_killed(Latchkey);
}

// RFC 5660 §2.3: the holder hears of the break before the SA is in; here it is the last that the daemon does.
#[test]
fn nothing_reaches_the_impostor_when_the_daemon_is_killed_at_the_break() {
    let mut three = Three::start(Latchkey, |text| text);
    three.open_a_way_in_clear();
    let (wires, loot) = (three.wires(), Capture::delivered(&three.host_c, "lk0"));
    let _echo = Echo::start(&three.host_b, "10.2.0.1");
    let talk = Talk { kill_at: "alert broken", on_break: "wait", ..Talk::default() };
    let talker = Talker::start(&three.a, &three.host_a, &talk);
    talker.talks();
    // Whether C's SA comes up is a matter of moments.
    let _ = three.c.swanctl(&["--initiate", "--child", "net-a", "--timeout", "2"]);
    talker.says("alert broken");
    wait_for("the daemon's end", PATIENCE, || !three.a.is_running());
    talker.is_silenced();
    three.a.restart(&three.host_a);
    talker.is_silenced();
    wires.saw_nothing();
    assert_eq!(loot.list(OF_A), "");
}

// RFC 5660 §2.3 (SPD changes): the configuration gives the network to another peer, or to nobody; and a rekey to another
// suite (§2.1) is another protection.
#[test]
fn nothing_leaves_when_the_policy_changes() {
    latched::nothing_leaves_when_the_policy_changes(Latchkey);
}

// RFC 5660 §2, §2.2: the peer is dead, and its address has another owner.
#[test]
fn nothing_leaves_when_the_peer_is_dead() {
    latched::nothing_leaves_when_the_peer_is_dead(Latchkey);
}

// RFC 5660 §2.3 (28): what comes late, after the connection has been closed and its latch released, is answered under the
// SA or not at all.
#[test]
fn late_packets_are_not_answered_in_clear() {
    latched::late_packets_are_not_answered_in_clear(Latchkey);
}

// Two clients behind one NAT: each has its own latch, and neither's SAs disturb the other's, until one claims what is the
// other's.
#[test]
fn two_clients_behind_one_nat_have_their_own_latches() {
    latched::two_clients_behind_one_nat_have_their_own_latches(Latchkey);
}

// RFC 5660 §2: a peer that says in IKE that it knows nothing of us any more (INITIAL_CONTACT) has restarted, and so has what
// held its end.
#[test]
fn a_peer_that_restarted_breaks_the_latch() {
    let mut three = Three::start(Latchkey, |text| text);
    let _echo = Echo::start(&three.host_b, "10.2.0.1");
    let talk = Talk { on_break: "wait", ..Talk::default() };
    let talker = Talker::start(&three.a, &three.host_a, &talk);
    talker.talks();
    three.b.signal("KILL");
    three.b.restart(&three.host_b);
    three.b.initiate("net-a");
    talker.says("alert broken b.example has restarted");
    talker.is_silenced();
}

// RFC 5660 §4: both ends connect to each other at once, each from the port that the other connects to (RFC 9293 §3.5): one
// connection, with a latch of the same SAs at each end.
#[test]
fn a_simultaneous_open_is_latched_at_each_end() {
    let three = Three::start(Latchkey, |text| text);
    let Three { a, b, host_a, host_b, .. } = &three;
    a.initiate("net-b");
    let wires = three.wires();
    // Neither hears the other before both have sent their SYN.
    let deaf = "table inet deaf {\nchain i {\ntype filter hook input priority 0;\niifname \"lk0\" drop;\n}\n}\n";
    host_a.nft(deaf);
    host_b.nft(deaf);
    let one = Talker::start(a, host_a, &Talk::default());
    let talk = Talk { peer: "a.example", local: "10.2.0.1:7", remote: "10.1.0.1:40007", ..Talk::default() };
    let other = Talker::start(b, host_b, &talk);
    for host in [host_a, host_b] {
        wait_for("a SYN", PATIENCE, || !host.check("ss", &["-Htn", "state", "syn-sent"]).is_empty());
    }
    for host in [host_a, host_b] {
        host.check("nft", &["delete", "table", "inet", "deaf"]);
    }
    one.talks();
    other.talks();
    wires.saw_nothing();
}

// IPv6 in IPv4: what the system has no switch for on the tunnel's device, a policy of its own lets through.
#[test]
fn an_ipv6_connection_passes_and_is_kept_in() {
    let (host_a, host_b) = (Host::new(), Host::new());
    link(&host_a, "192.0.2.1/24,2001:db8::1/64", &host_b, "192.0.2.2/24,2001:db8::2/64");
    for (host, inner, network, via) in
        [(&host_a, "fd01::1/64", "fd02::/64", "2001:db8::2"), (&host_b, "fd02::1/64", "fd01::/64", "2001:db8::1")]
    {
        host.add_inner(inner);
        host.ip(&["-6", "route", "add", network, "via", via]);
    }
    let [(of_a, files_a), (of_b, files_b)] = configurations(&Suite::default());
    let inner = |text: &str| text.replace("10.1.0.0/24", "fd01::/64").replace("10.2.0.0/24", "fd02::/64");
    let b = Daemon::start(Latchkey, &host_b, &inner(&of_b), &files_b);
    let mut a = Daemon::start(Latchkey, &host_a, &inner(&of_a), &files_a);
    a.initiate("net");
    let wires = Wires::of(&[&host_a, &host_b]);
    let _echo = Echo::start(&host_b, "fd02::1");
    let talk = Talk { local: "[fd01::1]:40007", remote: "[fd02::1]:7", ..Talk::default() };
    let talker = Talker::start(&a, &host_a, &talk);
    talker.says("guard engine-and-system");
    let udp = Talk { udp: true, local: "[fd01::1]:40008", ..talk };
    let udp = Talker::start(&a, &host_a, &udp);
    talker.talks();
    udp.talks();
    a.signal("KILL");
    wait_for("its end", PATIENCE, || !a.is_running());
    talker.is_silenced();
    udp.is_silenced();
    wires.saw_nothing();
    drop((a, b));
}
