//! What holds of a latched connection whoever does ESP (RFC 5660 §2): the same is done with either plane, in namespaces or in a
//! guest whose kernel has ESP.

use std::time::Duration;

use crate::capture::Capture;
use crate::daemon::{Daemon, Kind};
use crate::host::{Host, link, wait_for};
use crate::pki::Authority;
use crate::scene::{Scene, Suite};
use crate::witness::{BREAKS, Echo, MARK, Talk, Talker, Three, Wires, certified};

const PATIENCE: Duration = Duration::from_secs(30);

/// What C's tunnel delivers of A's connections.
const OF_A: &str = "(tcp or udp) and port 7 and host 10.1.0.1";

/// What comes to a host by its tunnels: where its kernel does ESP, it shows on the link what it has decrypted.
pub fn loot(kind: Kind, host: &Host, address: &str) -> Capture {
    if kind != Kind::LatchkeyKernel {
        return Capture::delivered(host, "lk0");
    }
    let link = host.check("ip", &["-o", "addr", "show", "to", address]);
    Capture::delivered(host, link.split_whitespace().nth(1).unwrap())
}

/// RFC 5660 §2.3: what another peer asks for is narrowed around latched connections, also when it rekeys; it gets the rest.
pub fn an_impostor_gets_all_but_the_latched_connections(kind: Kind) {
    // Over TCP C's SA would be user space's, whose routes keep the kernel's traffic to the same addresses back.
    let settings = if kind == Kind::LatchkeyKernel { "tcp_ports = no\n" } else { "" };
    let three = Three::with(kind, settings, |text| text);
    let Three { a, c, host_a, host_b, host_c, .. } = &three;
    let (wires, loot) = (three.wires(), loot(kind, host_c, "198.51.100.3"));
    let _echo = Echo::start(host_b, "10.2.0.1");
    let tcp = Talker::start(a, host_a, &Talk::default());
    let udp = Talk { udp: true, local: "10.1.0.1:40008", ..Talk::default() };
    let udp = Talker::start(a, host_a, &udp);
    tcp.talks();
    udp.talks();
    c.initiate("net-a");
    for _ in 0..5 {
        let _ = host_c
            .run("sh", &["-c", "echo FORGED | socat -u - UDP4-DATAGRAM:10.1.0.1:40008,bind=10.2.0.1:7,reuseaddr"]);
    }
    tcp.talks();
    udp.talks();
    let before = c.child_spis("INSTALLED");
    c.control(&["--rekey", "--child", "net-a"]);
    wait_for("the successor", PATIENCE, || c.child_spis("INSTALLED").iter().any(|spi| !before.contains(spi)));
    tcp.talks();
    udp.talks();
    assert!(!tcp.report().contains("alert"), "{}", tcp.report());
    assert!(!udp.report().contains("alert") && !udp.report().contains("foreign"), "{}", udp.report());
    assert!(c.sas().contains("10.1.0.1/32[tcp/0-40006]"), "{}", c.sas());
    assert_eq!(loot.list(OF_A), "", "C has got something of the latched connections");
    let _ = host_a.run("ping", &["-c", "2", "-i", "0.2", "-W", "1", "-I", "10.1.0.1", "10.2.0.1"]);
    wait_for("what is not latched, at C", PATIENCE, || loot.count("icmp and host 10.1.0.1") > 0);
    // A kernel sends in clear what no policy is for: C's own forgeries, which A did not take.
    let connections = if kind == Kind::LatchkeyKernel { "port 7 and not udp dst port 40008" } else { "port 7" };
    wires.saw_nothing_of(connections, MARK);
}

/// RFC 5660 §2 (13), fail closed: the daemon is killed at each step of a latch's life, and afterwards started again. The host
/// has a route that would carry everything in clear.
pub fn nothing_leaves_wherever_the_daemon_is_killed(kind: Kind) {
    let mut three = Three::start(kind, |text| text);
    three.open_a_way_in_clear();
    let wires = three.wires();
    let _echo = Echo::start(&three.host_b, "10.2.0.1");
    for (kill_at, local, udp) in [
        ("latched", "10.1.0.1:40010", false),
        ("connected", "10.1.0.1:40011", false),
        ("transfer", "10.1.0.1:40012", false),
        ("transfer", "10.1.0.1:40013", true),
        ("before", "10.1.0.1:40014", false),
    ] {
        let talk = Talk { kill_at, local, udp, ..Talk::default() };
        let talker = Talker::start(&three.a, &three.host_a, &talk);
        talker.says(kill_at);
        wait_for("the daemon's end", PATIENCE, || !three.a.is_running());
        if kind == Kind::LatchkeyKernel {
            // The kernel's SAs outlive the daemon: without them, too, nothing may leave.
            three.host_a.ip(&["xfrm", "state", "flush"]);
        }
        talker.is_silenced();
        three.a.restart(&three.host_a);
        // The service knows nothing of it any more, and the application's socket leads nowhere.
        three.a.initiate("net-b");
        talker.is_silenced();
        wires.saw_nothing();
    }
    // The witnesses would have seen it.
    three.a.control(&["--terminate", "--ike", "to-b"]);
    let _ = three.host_a.run("socat", &["-u", "/dev/null", "TCP4:10.2.0.1:7,bind=10.1.0.1,connect-timeout=1"]);
    wires.saw("tcp port 7");
}

/// RFC 5660 §2.3 (SPD changes): the configuration gives the network to another peer, or to nobody; and a rekey to another
/// suite (§2.1) is another protection.
pub fn nothing_leaves_when_the_policy_changes(kind: Kind) {
    let three = Three::start(kind, |text| text.replace("aes128gcm16", "aes128gcm16,aes256gcm16"));
    three.open_a_way_in_clear();
    let Three { a, b, c, host_a, host_b, host_c, of_a, of_b } = &three;
    // B's end is not latched, and answers in clear when its SA has gone (RFC 5660 §6.3).
    let (wires, loot) = (Wires::of(&[host_a, host_c]), loot(kind, host_c, "198.51.100.3"));
    let _echo = Echo::start(host_b, "10.2.0.1");
    let talk = |local, on_break| Talker::start(a, host_a, &Talk { local, on_break, ..Talk::default() });
    let first = talk("10.1.0.1:40020", "wait");
    first.talks();

    // B may have the network no longer, and the tunnel ends: without a latch, all would leave in clear.
    let without_b = of_a.0.replace("remote_ts = 10.2.0.0/24", "remote_ts = 10.9.0.0/24");
    a.write(&without_b, &of_a.1);
    a.control(&["--load-conns"]);
    first.says("alert broken the policy has changed");
    a.control(&["--terminate", "--ike", "to-b"]);
    first.is_silenced();
    // C has it.
    let of_c = of_a.0.replacen("remote_ts = 10.2.0.0/24", "remote_ts = 10.9.0.0/24", 1);
    a.write(&of_c, &of_a.1);
    a.control(&["--load-conns"]);
    a.initiate("net-c");
    first.is_silenced();
    wires.saw_nothing();
    assert_eq!(loot.list(OF_A), "");
    a.control(&["--terminate", "--ike", "to-c"]);

    // B has it again, and renews the SA with another suite.
    a.write(&of_a.0, &of_a.1);
    a.control(&["--load-conns"]);
    a.initiate("net-b");
    let second = talk("10.1.0.1:40021", "reset");
    second.talks();
    b.write(&of_b.0.replace("aes128gcm16", "aes256gcm16"), &of_b.1);
    b.control(&["--load-conns"]);
    b.initiate("net-a");
    second.says("alert broken an SA of b.example claims");
    second.says("other ESP suite");
    second.is_silenced();
    wires.saw_nothing();
    let _ = c;
}

/// RFC 5660 §2, §2.2: the peer is dead, and its address has another owner.
pub fn nothing_leaves_when_the_peer_is_dead(kind: Kind) {
    let hasty = |text: String| text.replace("version = 2\n", "version = 2\ndpd_delay = 1s\n");
    let mut three = Three::with(kind, "retransmit_tries = 1\nretransmit_timeout = 0.5\n", hasty);
    three.open_a_way_in_clear();
    let (wires, loot) = (three.wires(), loot(kind, &three.host_c, "198.51.100.3"));
    let echo = Echo::start(&three.host_b, "10.2.0.1");
    let talk = Talk { on_break: "wait", ..Talk::default() };
    let talker = Talker::start(&three.a, &three.host_a, &talk);
    talker.talks();
    three.b.signal("KILL");
    wait_for("B's end", PATIENCE, || !three.b.is_running());
    if kind == Kind::LatchkeyKernel {
        // Its kernel would go on, and A take that for life.
        three.host_b.ip(&["xfrm", "state", "flush"]);
    }
    talker.says("alert broken b.example is dead");
    three.c.initiate("net-a");
    talker.is_silenced();
    // What the dead peer's host itself says in clear is not its daemon's doing, and comes from no latched socket.
    drop(echo);
    assert_eq!(loot.list(OF_A), "");
    let from_a = Wires::of(&[&three.host_a]);
    talker.is_silenced();
    from_a.saw_nothing();
    drop(wires);
}

/// RFC 5660 §2.3 (28): what comes late, after the connection has been closed and its latch released, is answered under the
/// SA or not at all.
pub fn late_packets_are_not_answered_in_clear(kind: Kind) {
    let mut scene = Scene::works(kind, kind, &Suite::default());
    for (host, network, via) in
        [(&scene.host_a, "10.2.0.0/24", "192.0.2.2"), (&scene.host_b, "10.1.0.0/24", "192.0.2.1")]
    {
        host.ip(&["route", "add", network, "via", via]);
    }
    let wires = Wires::of(&[&scene.host_a]);
    // It goes on talking, whether anybody listens or not, for a minute.
    let server = "for i in $(seq 1200); do sleep 0.05; echo late || exit; done";
    let _server =
        scene.host_b.spawn("socat", &["-U", "TCP4-LISTEN:7,bind=10.2.0.1,reuseaddr,fork", &format!("SYSTEM:{server}")]);
    scene.host_b.wait_for_listener(7);
    let talker = Talker::start(&scene.a, &scene.host_a, &Talk::default());
    talker.says("foreign");
    // The application ends, and with it everything that holds the socket but the daemon.
    drop(talker);
    std::thread::sleep(Duration::from_millis(500));
    wires.saw_nothing();
    // The daemon ends in the middle of the same.
    let local = "10.1.0.1:40009";
    let talker = Talker::start(&scene.a, &scene.host_a, &Talk { local, ..Talk::default() });
    talker.says("foreign");
    drop(talker);
    scene.a.signal("KILL");
    wait_for("its end", PATIENCE, || !scene.a.is_running());
    std::thread::sleep(Duration::from_millis(500));
    wires.saw_nothing();
}

/// Two clients behind one NAT: each has its own latch, and neither's SAs disturb the other's, until one claims what is the
/// other's.
pub fn two_clients_behind_one_nat_have_their_own_latches(kind: Kind) {
    let (one, two, router, host_b) = (Host::new(), Host::new(), Host::new(), Host::new());
    link(&one, "198.51.100.1/24", &router, "198.51.100.254/24");
    link(&two, "203.0.113.1/24", &router, "203.0.113.254/24");
    let (outside, _) = link(&router, "192.0.2.254/24", &host_b, "192.0.2.2/24");
    router.masquerade(&outside);
    one.ip(&["route", "add", "default", "via", "198.51.100.254"]);
    two.ip(&["route", "add", "default", "via", "203.0.113.254"]);
    host_b.ip(&["route", "add", "default", "via", "192.0.2.254"]);
    for (host, address) in
        [(&one, "10.1.0.1/32"), (&two, "10.3.0.1/32"), (&two, "10.1.0.1/32"), (&host_b, "10.2.0.1/24")]
    {
        host.add_inner(address);
    }
    let authority = Authority::new("test CA", &rcgen::PKCS_ECDSA_P256_SHA256);
    let to_b = |name, address, network| {
        let (text, files) = certified(&authority, (name, address), network, &[("b", "", "192.0.2.2", "10.2.0.0/24")]);
        // The second one may ask for the first one's address.
        let more =
            "children {\nhijack {\nlocal_ts = 10.1.0.1/32\nremote_ts = 10.2.0.0/24\nesp_proposals = aes128gcm16\n}\n";
        (text.replace("children {\n", more), files)
    };
    let peers = [("a", "", "%any", "10.1.0.0/24"), ("c", "", "%any", "10.1.0.0/24,10.3.0.0/24")];
    let (of_b, files_b) = certified(&authority, ("b", "192.0.2.2"), "10.2.0.0/24", &peers);
    let wires = Wires::of(&[&one, &two, &router, &host_b]);
    let b = Daemon::start_with(kind, &host_b, BREAKS, &of_b, &files_b);
    let (of_one, files_one) = to_b("a", "198.51.100.1", "10.1.0.1/32");
    let (of_two, files_two) = to_b("c", "203.0.113.1", "10.3.0.1/32");
    let a = Daemon::start(kind, &one, &of_one, &files_one);
    let c = Daemon::start(kind, &two, &of_two, &files_two);
    a.initiate("net-b");
    c.initiate("net-b");
    let (first, second) = (Echo::start(&one, "10.1.0.1"), Echo::start(&two, "10.3.0.1"));
    // The server is latched to each.
    let to_first = Talk { peer: "a.example", local: "10.2.0.1:40031", remote: "10.1.0.1:7", ..Talk::default() };
    let to_second = Talk { peer: "c.example", local: "10.2.0.1:40032", remote: "10.3.0.1:7", ..Talk::default() };
    let (to_first, to_second) = (Talker::start(&b, &host_b, &to_first), Talker::start(&b, &host_b, &to_second));
    to_first.talks();
    to_second.talks();
    // So are the clients.
    let from_first = Talker::start(&a, &one, &Talk { remote: "10.2.0.1:7", ..Talk::default() });
    from_first.says("latched");
    a.control(&["--rekey", "--child", "net-b"]);
    c.control(&["--rekey", "--ike", "to-b"]);
    to_first.talks();
    to_second.talks();
    let loot = loot(kind, &two, "203.0.113.1");
    c.initiate("hijack");
    to_first.says("alert broken an SA of c.example claims");
    to_first.is_silenced();
    to_second.talks();
    assert_eq!(loot.list("port 40031"), "");
    wires.saw_nothing();
    drop((first, second, a, b, c));
}
