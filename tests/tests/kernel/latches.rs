//! Latches where the kernel does ESP (RFC 5660): its policies for the flow are all that there is.

use std::time::Duration;

use latchkey_tests::daemon::Kind::LatchkeyKernel;
use latchkey_tests::exec;
use latchkey_tests::host::{Host, wait_for};
use latchkey_tests::latched::{self, loot};
use latchkey_tests::optional;
use latchkey_tests::uml::in_guest;
use latchkey_tests::witness::{Echo, Server, Talk, Talker, Three, Wires};

const PATIENCE: Duration = Duration::from_secs(30);

// RFC 5660 §2, §2.3: SAs come and go under a latch; another peer that claims the flow breaks it and gets nothing; whatever
// becomes of the daemon, and of the kernel's SAs after it, nothing leaves in clear.
#[test]
fn a_latched_connection_stays_with_its_peer_and_never_leaves_in_clear() {
    in_guest(|| {
        let mut three = Three::start(LatchkeyKernel, |text| text);
        three.open_a_way_in_clear();
        let wires = Wires::of(&[&three.host_a]);
        let loot = loot(LatchkeyKernel, &three.host_c, "198.51.100.3");
        let got_nothing = || assert_eq!(loot.list("(tcp or udp) and port 7 and host 10.1.0.1"), "");
        let _echo = Echo::start(&three.host_b, "10.2.0.1");
        let tcp = Talk { on_break: "wait", ..Talk::default() };
        let tcp = Talker::start(&three.a, &three.host_a, &tcp);
        tcp.says("guard system");
        let udp = Talk { udp: true, on_break: "wait", local: "10.1.0.1:40008", ..Talk::default() };
        // Where nobody listens: an echo is a process each.
        let ended = Talk { on_break: "reset", local: "10.1.0.1:40009", remote: "10.2.0.1:9", ..udp };
        let udp = Talker::start(&three.a, &three.host_a, &udp);
        let ended = Talker::start(&three.a, &three.host_a, &ended);
        let delivered = |address| latched::loot(LatchkeyKernel, &three.host_a, address);
        let (from_b, from_c) = (delivered("192.0.2.1"), delivered("198.51.100.1"));
        tcp.talks();
        udp.talks();
        ended.says("connected");
        three.a.control(&["--rekey", "--child", "net-b"]);
        tcp.talks();
        assert!(!tcp.report().contains("alert"), "{}", tcp.report());

        three.c.initiate("net-a");
        for talker in [&tcp, &udp, &ended] {
            talker.says("alert broken an SA of c.example claims");
        }
        // C continues the connection where B was, and sends to the other sockets; the kernel has it decrypted.
        three.host_c.check("python3", &["-c", CONTINUES, from_b.file()]);
        forge_datagram(&three.host_c, "10.2.0.1:7", "40008");
        forge_datagram(&three.host_c, "10.2.0.1:9", "40009");
        wait_for("what C forged, at A", PATIENCE, || {
            ["40007", "40008", "40009"].iter().all(|port| from_c.count(&format!("dst port {port}")) > 0)
        });
        // A UDP socket that has been disconnected would hear anybody.
        forge_datagram(&three.host_b, "192.0.2.2:9", "40009");
        for talker in [&tcp, &udp, &ended] {
            talker.is_silenced();
        }
        three.c.control(&["--terminate", "--ike", "to-a"]);
        tcp.says("alert established");
        tcp.talks();
        udp.talks();
        for talker in [&tcp, &udp, &ended] {
            assert!(!talker.report().contains("foreign"), "{}", talker.report());
        }

        // The kernel would go on under the same SAs: what is left of the daemon ends the connections, and the flows stay in
        // when the SAs go.
        three.a.signal("KILL");
        wait_for("A's end", PATIENCE, || !three.a.is_running());
        tcp.is_silenced();
        udp.is_silenced();
        three.host_a.ip(&["xfrm", "state", "flush"]);
        tcp.is_silenced();
        three.a.restart(&three.host_a);
        three.a.initiate("net-b");
        tcp.is_silenced();
        got_nothing();
        wires.saw_nothing();

        // RFC 5660 §2.3: that the holder hears of the break is the last that the daemon does. Its peer has an IPv4 address on an
        // IPv6 socket.
        let (local, remote) = ("[::ffff:10.1.0.1]:40010", "[::ffff:10.2.0.1]:7");
        let killing = Talk { kill_at: "alert broken", on_break: "wait", local, remote, ..Talk::default() };
        let killing = Talker::start(&three.a, &three.host_a, &killing);
        killing.talks();
        // Whether C's SA comes up is a matter of moments.
        let _ = three.c.swanctl(&["--initiate", "--child", "net-a", "--timeout", "2"]);
        killing.says("alert broken");
        wait_for("A's end", PATIENCE, || !three.a.is_running());
        killing.is_silenced();
        three.a.restart(&three.host_a);
        killing.is_silenced();
        got_nothing();
        wires.saw_nothing();
        // The witnesses are awake.
        let _ = three.host_a.run("socat", &["-u", "/dev/null", "TCP4:10.2.0.1:7,bind=10.1.0.1,connect-timeout=1"]);
        wires.saw("tcp port 7");
    });
}

/// A datagram from this address and port to this port of A's.
fn forge_datagram(host: &Host, from: &str, port: &str) {
    let to = format!("UDP4-DATAGRAM:10.1.0.1:{port},bind={from},reuseaddr");
    host.check("sh", &["-c", &format!("echo FORGED | socat -u - {to}")]);
}

/// Sends the segment that would be next in a connection of 10.1.0.1, port 40007, of which a capture is told.
const CONTINUES: &str = r#"
import socket, struct, sys
captured = open(sys.argv[1], "rb").read()
at, following = 24, None
while at + 16 <= len(captured):
    length = struct.unpack("=I", captured[at + 8:at + 12])[0]
    packet = captured[at + 30:at + 16 + length]
    at += 16 + length
    if len(packet) >= 40 and packet[0] == 0x45 and packet[9] == 6 and packet[20:24] == struct.pack("!HH", 7, 40007):
        sequence, acknowledged = struct.unpack("!II", packet[24:32])
        data = struct.unpack("!H", packet[2:4])[0] - 20 - (packet[32] >> 4) * 4
        following = (sequence + data) & 0xffffffff, acknowledged
sequence, acknowledged = following
ends = [socket.inet_aton(address) for address in ("10.2.0.1", "10.1.0.1")]
segment = struct.pack("!HHIIBBHHH", 7, 40007, sequence, acknowledged, 0x50, 0x18, 500, 0, 0) + b"FORGED\n\0"
pseudo = b"".join(ends) + struct.pack("!BBH", 0, 6, len(segment)) + segment
total = sum(struct.unpack("!%dH" % (len(pseudo) // 2), pseudo))
while total > 0xffff:
    total = (total & 0xffff) + (total >> 16)
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)
raw.bind(("10.2.0.1", 0))
raw.sendto(segment[:16] + struct.pack("!H", ~total & 0xffff) + segment[18:], ("10.1.0.1", 0))
"#;

// RFC 5660 §2.3: the kernel's policies go around the latched connections.
#[test]
fn an_impostor_gets_all_but_the_latched_connections() {
    in_guest(|| latched::an_impostor_gets_all_but_the_latched_connections(LatchkeyKernel));
}

/// Sends a line from this port to B's server, and gives what comes back.
fn call(host: &Host, port: u16, line: &str) -> String {
    let to = format!("TCP4:10.2.0.1:7,bind=10.1.0.1:{port},reuseaddr,connect-timeout=2");
    let script = format!("echo {line} | timeout 8 socat -t 5 - {to}");
    String::from_utf8_lossy(&host.run("sh", &["-c", &script]).stdout).into_owned()
}

// RFC 5660 §2, §2.3: the kernel drops what a LARVAL flow sends without telling the program, and lets it pass under the latch.
#[test]
fn a_program_that_does_not_block_goes_on_while_the_latch_is_made() {
    in_guest(|| exec::a_program_that_does_not_block_goes_on_while_the_latch_is_made(LatchkeyKernel));
}

// RFC 5660 §2.2, §2.3, §5.1: who comes to a latched listener comes by the SA of the class that covers him, and is latched to it
// before an SA of another class is in, accepted or not; nobody else is answered, whatever becomes of the daemon.
#[test]
fn a_latched_listener_takes_the_right_peer_only_and_answers_nobody_else() {
    in_guest(|| {
        let mut three = Three::start(LatchkeyKernel, |text| text);
        three.open_a_way_in_clear();
        three.host_c.add_inner("10.1.0.1/32");
        let (wires, from_a) = (Wires::of(&[&three.host_b]), Wires::of(&[&three.host_a]));
        let loot = loot(LatchkeyKernel, &three.host_c, "203.0.113.3");
        let server = Server::start(&three.b, &three.host_b, "10.2.0.1:7", "a.example");
        server.says("listening", 1);
        // A SYN in clear gets no answer, not even that nobody listens.
        assert_eq!(call(&three.host_a, 5000, "clear"), "");
        from_a.saw("tcp dst port 7");
        let no_answer = || wires.saw_nothing_of("src port 7", "no such text");
        no_answer();
        // A may come.
        three.a.initiate("net-b");
        assert_eq!(call(&three.host_a, 5001, "first"), "first\n");
        server.says("accepted a.example guard system", 1);
        let talk = Talk { local: "10.1.0.1:5002", on_break: "wait", ..Talk::default() };
        let talker = Talker::start(&three.a, &three.host_a, &talk);
        talker.talks();
        three.a.control(&["--rekey", "--child", "net-b"]);
        talker.talks();
        // One more that nobody accepts.
        server.pause(true);
        let waiting = Talk { local: "10.1.0.1:5003", ..talk };
        let waiting = Talker::start(&three.a, &three.host_a, &waiting);
        waiting.says("connected");
        server.says("alert established", 3);

        // C, who is of the same authority, claims A's address: who has come hears of it, and C gets nothing.
        three.c.initiate("net-b");
        server.says("alert broken an SA of c.example claims", 2);
        talker.is_silenced();
        server.pause(false);
        server.says("refused not-accepted", 1);
        assert_eq!(call(&three.host_c, 5004, "conflict"), "");
        // C alone: it is not whom the listener takes.
        three.a.control(&["--terminate", "--ike", "to-b"]);
        assert_eq!(call(&three.host_c, 5005, "impostor"), "");
        assert_eq!(loot.list("tcp and src port 7"), "", "C got an answer");
        three.c.control(&["--terminate", "--ike", "to-b"]);
        three.a.initiate("net-b");
        talker.talks();

        // The daemon dies, and what has come is disconnected, with its SAs and without.
        three.b.signal("KILL");
        wait_for("B's end", PATIENCE, || !three.b.is_running());
        server.says("daemon gone", 1);
        talker.is_silenced();
        three.host_b.ip(&["xfrm", "state", "flush"]);
        talker.is_silenced();
        three.b.restart(&three.host_b);
        three.c.initiate("net-b");
        assert_eq!(call(&three.host_c, 5006, "impostor"), "");
        three.c.control(&["--terminate", "--ike", "to-b"]);
        assert_eq!(call(&three.host_a, 5007, "clear"), "");
        assert_eq!(loot.list("tcp and src port 7"), "", "C got an answer");
        no_answer();
        wires.saw_nothing_of("src port 7", latchkey_tests::witness::MARK);
        // The port stays closed until what came to it has ended, or it is latched anew.
        drop((server, talker, waiting));
        // Of both families: who has an IPv4 address comes to an IPv6 socket.
        let server = Server::start(&three.b, &three.host_b, "[::]:7", "a.example");
        three.a.control(&["--terminate", "--ike", "to-b"]);
        assert_eq!(call(&three.host_a, 5010, "clear"), "");
        three.c.initiate("net-b");
        assert_eq!(call(&three.host_c, 5011, "impostor"), "");
        three.c.control(&["--terminate", "--ike", "to-b"]);
        assert_eq!(loot.list("tcp and src port 7"), "", "C got an answer");
        no_answer();
        three.a.initiate("net-b");
        assert_eq!(call(&three.host_a, 5008, "again"), "again\n");
        server.says("accepted a.example", 1);
        wires.saw("esp");
    });
}

// RFC 5660 §2 (13): the daemon is killed at each step of a latch's life.
#[test]
fn nothing_leaves_wherever_the_daemon_is_killed() {
    in_guest(|| latched::nothing_leaves_wherever_the_daemon_is_killed(LatchkeyKernel));
}

// RFC 5660 §2.3 (23), §2.1: the network has another owner or none, and a rekey brings another suite.
#[test]
fn nothing_leaves_when_the_policy_changes() {
    in_guest(|| latched::nothing_leaves_when_the_policy_changes(LatchkeyKernel));
}

// RFC 5660 §2, §2.2: the peer is dead, and its address has another owner.
#[test]
fn nothing_leaves_when_the_peer_is_dead() {
    in_guest(|| latched::nothing_leaves_when_the_peer_is_dead(LatchkeyKernel));
}

// RFC 5660 §2.3 (28).
#[test]
fn late_packets_are_not_answered_in_clear() {
    in_guest(|| latched::late_packets_are_not_answered_in_clear(LatchkeyKernel));
}

#[test]
fn two_clients_behind_one_nat_have_their_own_latches() {
    in_guest(|| latched::two_clients_behind_one_nat_have_their_own_latches(LatchkeyKernel));
}

// The kernel's news overrun while the SAs and policies of a latched flow go: what is lost is found by looking.
#[test]
fn what_goes_while_news_of_the_kernel_are_lost_is_put_right() {
    in_guest(|| {
        let three = Three::start(LatchkeyKernel, |text| text);
        let _echo = Echo::start(&three.host_b, "10.2.0.1");
        let talk = Talk { on_break: "wait", ..Talk::default() };
        let talker = Talker::start(&three.a, &three.host_a, &talk);
        talker.talks();
        three.a.signal("STOP");
        // More than its socket has room for, about others.
        let policies: String = (0..16_384)
            .map(|n| {
                format!("xfrm policy add src 10.77.{}.{}/32 dst 10.78.0.1/32 dir out priority 9\n", n / 256, n % 256)
            })
            .collect();
        let batch = three.a.path("batch");
        std::fs::write(&batch, policies).unwrap();
        three.host_a.ip(&["-batch", batch.to_str().unwrap()]);
        // Nobody hears of this.
        three.host_a.ip(&["xfrm", "policy", "flush"]);
        three.host_a.ip(&["xfrm", "state", "flush"]);
        three.open_a_way_in_clear();
        talker.is_silenced();
        three.a.signal("CONT");
        wait_for("the loss to be noticed", PATIENCE, || {
            three.a.output().contains("events of the kernel's IPsec were lost")
        });
        let of_latch = || three.host_a.check("ip", &["xfrm", "policy"]).matches("priority 1 ").count();
        wait_for("the latch's policies", PATIENCE, || of_latch() == 2);
        let wires = Wires::of(&[&three.host_a]);
        talker.talks();
        assert!(!talker.report().contains("alert"), "{}", talker.report());
        wires.saw_nothing();
    });
}

// RFC 5660 §3.1: of who may, the exact five-tuple goes in clear, and nothing of it under an SA.
#[test]
fn what_may_goes_in_clear_and_nothing_else_does() {
    in_guest(|| optional::what_may_goes_in_clear_and_nothing_else_does(LatchkeyKernel));
}

#[test]
fn a_killed_daemon_s_successor_closes_what_went_in_clear() {
    in_guest(|| optional::a_killed_daemon_s_successor_closes_what_went_in_clear(LatchkeyKernel));
}

/// Sends an ICMP error, that a datagram's port is unreachable, from `told[0]` to `told[1]` about datagrams of `told[1]`, port
/// `told[2]`, to 10.2.0.1, port `told[3]`.
const FORGE_ERROR: &str = r#"
import socket, struct, sys
source, victim, port, to = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
quoted = struct.pack("!BBHHHBBH4s4sHHHH", 0x45, 0, 36, 0, 0, 64, 17, 0, socket.inet_aton(victim),
                     socket.inet_aton("10.2.0.1"), port, to, 16, 0) + bytes(8)
error = struct.pack("!BBHI", 3, 3, 0, 0) + quoted
total = sum(struct.unpack("!%dH" % (len(error) // 2), error))
while total > 0xffff:
    total = (total & 0xffff) + (total >> 16)
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
raw.bind((source, 0))
raw.sendto(error[:2] + struct.pack("!H", ~total & 0xffff) + error[4:], (victim, 0))
"#;

/// A socket that is not latched, and says each time when it hears of such an error.
const HEARS_ERRORS: &str = r#"
import socket, sys, time
plain = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
plain.bind(("10.1.0.1", 40060))
plain.connect(("10.2.0.1", 9))
out = open(sys.argv[1], "a", buffering=1)
while True:
    if plain.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
        print("heard", file=out)
    time.sleep(0.01)
"#;

// RFC 4301 §6.1.1, RFC 5660 §2: an ICMP error about a latched flow that comes in clear, or by another peer's SA, does not reach
// its socket; one that comes by its own SA does.
#[test]
#[ignore = "needs a kernel with nftables of IP: tests/guest/build, then LATCHKEY_UML=$PWD/target/guest/linux"]
fn an_icmp_error_reaches_a_latched_socket_by_its_own_sa_only() {
    in_guest(|| {
        let three = Three::with(LatchkeyKernel, "", |text| text);
        three.open_a_way_in_clear();
        three.host_b.add_inner("10.2.0.2/32");
        let _echo = Echo::start(&three.host_b, "10.2.0.1");
        let talk = Talk { udp: true, on_break: "wait", local: "10.1.0.1:40008", ..Talk::default() };
        let talker = Talker::start(&three.a, &three.host_a, &talk);
        talker.says("guard system-and-filter");
        talker.talks();
        let heard = three.a.path("heard");
        let _plain = three.host_a.spawn("python3", &["-c", HEARS_ERRORS, heard.to_str().unwrap()]);
        let times = || std::fs::read_to_string(&heard).map_or(0, |heard| heard.lines().count());
        let forge = |host: &Host, from: &str, port: &str, to: &str| {
            host.check("python3", &["-c", FORGE_ERROR, from, "10.1.0.1", port, to]);
        };
        // Both get one; who is not latched hears of it.
        let both = |what: &str, host: &Host, from: &str| {
            let before = times();
            wait_for(what, PATIENCE, || {
                forge(host, from, "40008", "7");
                forge(host, from, "40060", "9");
                times() > before
            });
            talker.talks();
            assert!(!talker.report().contains("error"), "{what}: {}", talker.report());
        };
        both("an error in clear", &three.host_b, "192.0.2.2");
        three.c.initiate("net-a");
        both("an error by C's SA", &three.host_c, "10.2.0.1");
        forge(&three.host_b, "10.2.0.2", "40008", "7");
        talker.says("error [Errno 111]");
        assert!(!talker.report().contains("alert"), "{}", talker.report());
    });
}
