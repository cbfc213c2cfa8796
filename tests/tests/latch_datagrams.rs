//! UDP sockets that are not connected, under latches (RFC 5660 §5.3), between real daemons: `latch/examples/udp_echo.rs` on the
//! latched side, unlatched sockets on the other.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeSet;
use std::time::Duration;

use latchkey_tests::daemon::Kind::Latchkey;
use latchkey_tests::daemon::{Daemon, program};
use latchkey_tests::host::{Host, link, wait_for};
use latchkey_tests::pki::Authority;
use latchkey_tests::scene::{Scene, Suite, configurations, hosts};
use latchkey_tests::talker::Talker;
use latchkey_tests::witness::{MARK, Three, Wires, certified};

const PATIENCE: Duration = Duration::from_secs(30);

fn echo(daemon: &Daemon, host: &Host, name: &str, arguments: &[&str]) -> Talker {
    let socket = daemon.latch_socket();
    let mut all = arguments.to_vec();
    all.insert(1, socket.to_str().unwrap());
    Talker::start(host.command(program("examples/udp_echo").to_str().unwrap(), &all), daemon.path(name))
}

fn serve(daemon: &Daemon, host: &Host, address: &str, peer: &str) -> Talker {
    let name = format!("echo-{}", address.rsplit(':').next().unwrap());
    let server = echo(daemon, host, &name, &["serve", address, peer]);
    server.prints("listening");
    server
}

/// Says something from a socket that is not latched, and gives what comes back within half a second.
fn says(host: &Host, local: &str, remote: &str, text: &str) -> String {
    let script = "import socket, sys\n\
                  end = lambda text: (text.rsplit(':', 1)[0], int(text.rsplit(':', 1)[1]))\n\
                  s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n\
                  s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\n\
                  s.bind(end(sys.argv[1]))\ns.settimeout(0.5)\n\
                  try:\n\x20   s.sendto(sys.argv[3].encode(), end(sys.argv[2]))\n\x20   print(s.recv(65535).decode(), end='')\n\
                  except OSError:\n\x20   pass\n";
    host.check("python3", &["-c", script, local, remote, text])
}

/// The same until it is answered.
fn is_heard(host: &Host, local: &str, remote: &str, text: &str) {
    wait_for(&format!("an answer to {text:?}"), PATIENCE, || says(host, local, remote, text) == text);
}

const FROM_A: &str = "10.1.0.1:40000";
const FROM_B: &str = "10.2.0.1:4000";

// RFC 5660 §2.2, §2.3, §5.3: only whom the listener takes gets in, at each moment; a peer behind the same address and port is
// another one, with a latch of its own, and gets nothing of what is the first one's.
#[test]
fn each_datagram_is_known_by_who_sent_it() {
    let three = Three::start(Latchkey, |text| text);
    let Three { a, b, c, host_a, host_b, host_c, .. } = &three;
    // C has A's address, and not B's.
    host_c.ip(&["addr", "del", "10.2.0.1/24", "dev", "lo"]);
    host_c.add_inner("10.1.0.1/32");
    let wires = three.wires();
    let (of_a, of_all) = (serve(b, host_b, FROM_B, "a.example"), serve(b, host_b, "10.2.0.1:4001", "*.example"));
    let said = |text: &str| format!("{MARK} {text}");

    // Before there is an SA of A, C claims A's address.
    c.initiate("net-b");
    assert_eq!(says(host_c, FROM_A, FROM_B, &said("forged")), "");
    c.control(&["--terminate", "--ike", "to-b"]);
    a.initiate("net-b");
    is_heard(host_a, FROM_A, FROM_B, &said("first"));
    is_heard(host_a, FROM_A, "10.2.0.1:4001", &said("first"));
    is_heard(host_a, "10.1.0.1:40001", FROM_B, &said("second"));
    is_heard(host_a, FROM_A, FROM_B, &format!("{} {}", said("in fragments"), "x".repeat(4000)));
    of_a.prints("10.1.0.1:40001 a.example");
    of_a.prints(&format!("{} octets", said("in fragments").len() + 4001));
    let output = of_all.output();
    let first =
        output.lines().find(|line| line.contains(" a.example: ")).and_then(|line| line.split(' ').next()).unwrap();

    // C claims it again: broken and told first (RFC 5660 §2.3), and neither of both gets in.
    c.initiate("net-b");
    of_all.prints(&format!("{first} is broken: an SA of c.example claims"));
    for (host, text) in [(host_c, "forged"), (host_a, "in conflict")] {
        for remote in [FROM_B, "10.2.0.1:4001"] {
            assert_eq!(says(host, FROM_A, remote, &said(text)), "");
        }
    }
    // A has gone: C is who has the address.
    a.control(&["--terminate", "--ike", "to-b"]);
    is_heard(host_c, FROM_A, "10.2.0.1:4001", &said("from C"));
    of_all.prints(&format!("{FROM_A} c.example: "));
    assert_eq!(says(host_c, FROM_A, FROM_B, &said("forged")), "", "not whom that listener takes");
    // And back.
    c.control(&["--terminate", "--ike", "to-b"]);
    a.initiate("net-b");
    is_heard(host_a, FROM_A, FROM_B, &said("back"));
    is_heard(host_a, FROM_A, "10.2.0.1:4001", &said("back"));
    for output in [of_a.output(), of_all.output()] {
        assert!(!output.contains("forged") && !output.contains("in conflict"), "{output}");
        let by_c: Vec<&str> = output.lines().filter(|line| line.contains(" c.example: \"")).collect();
        assert!(by_c.iter().all(|line| line.contains("from C")), "{output}");
    }
    assert!(!of_a.output().contains(" c.example: \""));
    let listed = latches(b, host_b);
    assert!(listed.contains("listener     udp  10.2.0.1:4001 - *  *.example"), "{listed}");
    assert!(listed.contains("established  udp  10.2.0.1:4001 - 10.1.0.1:40000  a.example  of "), "{listed}");
    wires.saw_nothing_of("(port 4000 or port 4001)", MARK);
    wires.saw("esp or udp port 4500");
}

fn latches(daemon: &Daemon, host: &Host) -> String {
    let socket = daemon.latch_socket();
    host.check(program("latchkey").to_str().unwrap(), &["latches", "--socket", socket.to_str().unwrap()])
}

// RFC 5660 §5.3: who speaks first, with a socket that is not connected; an SA is made for it.
#[test]
fn who_speaks_first_is_latched_at_both_ends() {
    let scene = Scene::start(Latchkey, Latchkey, &Suite::default());
    let server = serve(&scene.b, &scene.host_b, FROM_B, "a.example");
    let refused = echo(&scene.a, &scene.host_a, "refused", &["ask", FROM_A, "c.example", FROM_B, "to C"]);
    refused.tells("is b.example, not c.example");
    let client = echo(&scene.a, &scene.host_a, "ask", &["ask", FROM_A, "b.example", FROM_B, "hello"]);
    client.prints("10.2.0.1:4000 is b.example");
    client.prints("b.example answers \"hello\"");
    server.prints(&format!("{FROM_A} a.example: \"hello\""));
    assert!(!server.output().contains("to C"));
}

// A netcat at both ends; the one that listens is not connected.
#[test]
fn a_netcat_takes_datagrams_of_all_who_come_and_says_who_they_are() {
    let scene = Scene::start(Latchkey, Latchkey, &Suite::default());
    let nc = |daemon: &Daemon, host: &Host, name: &str, arguments: &[&str]| {
        let socket = daemon.latch_socket();
        let mut all = vec!["nc", "-u", "--socket", socket.to_str().unwrap()];
        all.extend_from_slice(arguments);
        Talker::start(host.command(program("latchkey").to_str().unwrap(), &all), daemon.path(name))
    };
    let mut server = nc(&scene.b, &scene.host_b, "server", &["-l", "--peer", "a.example", "10.2.0.1", "4000"]);
    server.tells("listening on 10.2.0.1:4000 for a.example");
    server.types("hello?\n");
    server.tells("nobody has come yet");
    let client =
        |name, local| nc(&scene.a, &scene.host_a, name, &["--peer", "b.example", "-s", local, "10.2.0.1", "4000"]);
    let (mut first, mut second) = (client("first", FROM_A), client("second", "10.1.0.1:40001"));
    for (client, from) in [(&mut first, FROM_A), (&mut second, "10.1.0.1:40001")] {
        client.tells("10.2.0.1:4000, b.example by shared key");
        client.types(&format!("from {from}\n"));
        server.tells(&format!("10.2.0.1:4000 to {from}, a.example by shared key"));
        server.prints(&format!("from {from}\n"));
        server.types(&format!("to {from}\n"));
        client.prints(&format!("to {from}\n"));
    }
    // RFC 5660 §6.2
    let listed = latches(&scene.b, &scene.host_b);
    let number =
        listed.lines().find(|line| line.contains("10.1.0.1:40001")).unwrap().split_whitespace().next().unwrap();
    let socket = scene.b.latch_socket();
    let arguments = ["latch", "close", number, "--socket", socket.to_str().unwrap()];
    scene.host_b.check(program("latchkey").to_str().unwrap(), &arguments);
    server.tells(&format!("latch {number} is closed: closed by the administrator"));
    server.types("too late\n");
    server.tells("10.1.0.1:40001 gets nothing: ");
    assert!(!second.output().contains("too late"));
}

// RFC 5660 §2.1: another suite is another protection, and so another latch.
#[test]
fn another_suite_is_another_latch() {
    let [(of_a, files_a), (of_b, files_b)] =
        configurations(&Suite { esp: "aes128gcm16,aes256gcm16", ..Suite::default() });
    let (host_a, host_b) = hosts();
    let b = Daemon::start(Latchkey, &host_b, &of_b, &files_b);
    let a = Daemon::start(Latchkey, &host_a, &of_a.replace("aes128gcm16,", ""), &files_a);
    a.initiate("net");
    let server = serve(&b, &host_b, FROM_B, "a.example");
    is_heard(&host_a, FROM_A, FROM_B, "first");
    // A rekey to the same is none.
    a.control(&["--rekey", "--child", "net"]);
    is_heard(&host_a, FROM_A, FROM_B, "second");
    assert!(!server.output().contains("broken"));
    a.write(&of_a.replace(",aes256gcm16", ""), &files_a);
    a.control(&["--load-conns"]);
    a.control(&["--terminate", "--ike", "site"]);
    a.initiate("net");
    server.prints("other ESP suite");
    is_heard(&host_a, FROM_A, FROM_B, "third");
    let output = server.output();
    let of_a = output.lines().filter_map(|line| line.split_once(' ')).filter(|(_, rest)| rest.starts_with(FROM_A));
    let numbers: BTreeSet<&str> = of_a.map(|(number, _)| number).collect();
    assert_eq!(numbers.len(), 2, "{output}");
    drop((a, b));
}

// RFC 5660 §2 (13): the daemon is killed, and started again. Both hosts have routes that carry everything in clear.
#[test]
fn nothing_comes_or_goes_in_clear_when_the_daemon_is_killed() {
    let mut three = Three::start(Latchkey, |text| text);
    three.open_a_way_in_clear();
    let (mark, other) = (format!("{MARK} first"), "10.1.0.1:40001");
    three.a.initiate("net-b");
    // The latched side is A here: it has the way in clear, and a client besides.
    let server = serve(&three.a, &three.host_a, FROM_A, "b.example");
    is_heard(&three.host_b, FROM_B, FROM_A, &mark);
    let wires = three.wires();
    // B says what it says in clear from now on, and A's socket neither hears it nor answers.
    three.b.control(&["--terminate", "--ike", "to-a"]);
    three.b.signal("KILL");
    wait_for("B's end", PATIENCE, || !three.b.is_running());
    assert_eq!(says(&three.host_b, FROM_B, FROM_A, "in clear"), "");
    assert_eq!(says(&three.host_b, "10.2.0.1:4002", FROM_A, "in clear"), "");
    three.a.signal("KILL");
    wait_for("A's end", PATIENCE, || !three.a.is_running());
    assert_eq!(says(&three.host_b, FROM_B, FROM_A, "in clear"), "");
    server.tells("ConnectionReset");
    three.a.restart(&three.host_a);
    assert_eq!(says(&three.host_b, FROM_B, FROM_A, "in clear"), "");
    assert!(!server.output().contains("in clear"), "{}", server.output());
    // The witness: not one datagram of A's port, though B's were seen.
    wires.saw("udp and dst port 40000");
    wires.saw_nothing_of("src port 40000", MARK);
    let _ = says(&three.host_a, other, FROM_B, "an ordinary one");
    wires.saw("udp and src port 40001");
}

// Two clients behind one NAT, each known by who it is.
#[test]
fn clients_behind_one_nat_are_told_apart() {
    let (one, two, router, host_b) = (Host::new(), Host::new(), Host::new(), Host::new());
    link(&one, "198.51.100.1/24", &router, "198.51.100.254/24");
    link(&two, "203.0.113.1/24", &router, "203.0.113.254/24");
    let (outside, _) = link(&router, "192.0.2.254/24", &host_b, "192.0.2.2/24");
    router.masquerade(&outside);
    one.ip(&["route", "add", "default", "via", "198.51.100.254"]);
    two.ip(&["route", "add", "default", "via", "203.0.113.254"]);
    for (host, address) in [(&one, "10.1.0.1/32"), (&two, "10.3.0.1/32"), (&host_b, "10.2.0.1/24")] {
        host.add_inner(address);
    }
    let authority = Authority::new("test CA", &rcgen::PKCS_ECDSA_P256_SHA256);
    let to_b = |name, address, network| {
        certified(&authority, (name, address), network, &[("b", "", "192.0.2.2", "10.2.0.0/24")])
    };
    let peers = [("a", "", "%any", "10.1.0.0/24"), ("c", "", "%any", "10.3.0.0/24")];
    let (of_b, files_b) = certified(&authority, ("b", "192.0.2.2"), "10.2.0.0/24", &peers);
    let b = Daemon::start(Latchkey, &host_b, &of_b, &files_b);
    let (of_one, files_one) = to_b("a", "198.51.100.1", "10.1.0.1/32");
    let (of_two, files_two) = to_b("c", "203.0.113.1", "10.3.0.1/32");
    let a = Daemon::start(Latchkey, &one, &of_one, &files_one);
    let c = Daemon::start(Latchkey, &two, &of_two, &files_two);
    let wires = Wires::of(&[&one, &two, &router, &host_b]);
    a.initiate("net-b");
    c.initiate("net-b");
    let server = serve(&b, &host_b, FROM_B, "%any");
    let said = format!("{MARK} hello");
    is_heard(&one, FROM_A, FROM_B, &said);
    is_heard(&two, "10.3.0.1:40000", FROM_B, &said);
    is_heard(&one, FROM_A, FROM_B, &said);
    server.prints("10.1.0.1:40000 a.example");
    server.prints("10.3.0.1:40000 c.example");
    assert!(!server.output().contains("broken"), "{}", server.output());
    wires.saw_nothing_of("port 4000", MARK);
    drop((a, b, c));
}
