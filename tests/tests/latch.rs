//! Latched connections of a real application between two daemons: RFC 5660 with a program that speaks the documented
//! protocol (`docs/latch-protocol.md`) without our library.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use latchkey_tests::daemon::Daemon;
use latchkey_tests::daemon::Kind::Latchkey;
use latchkey_tests::host::{Host, Process, wait_for};
use latchkey_tests::scene::{INNER_A, INNER_B, Scene, Suite, configurations, hosts};
use latchkey_tests::witness::BREAKS;

/// Latches a connection from 10.1.0.1 to an echo server on 10.2.0.1 and talks for as long as it can. Says what
/// happens in a file, a line each.
const HOLDER: &str = r#"
import json, os, select, socket, sys, time
path, peer, report = sys.argv[1:4]
out = open(report, "a", buffering=1)
service = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
service.connect(path)
def call(number, name, arguments, descriptors=[]):
    message = json.dumps({"id": number, "request": name, "arguments": arguments}).encode()
    socket.send_fds(service, [message], descriptors)
    return json.loads(service.recv(65536))
print("hello", call(1, "hello", {"version": 1})["type"], file=out)
connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
connection.bind(("10.1.0.1", 0))
answer = call(2, "create", {"peer": peer, "remote": "10.2.0.1:7", "initiate": "no"}, [connection.fileno()])
if answer["type"] == "refusal":
    print("refused", answer["code"], file=out)
    sys.exit()
print("latched", answer["result"]["peer"]["id"]["text"], answer["result"]["peer"]["proof"]["by"], file=out)
connection.settimeout(3)
connection.connect(("10.2.0.1", 7))
rounds = 0
while not select.select([service], [], [], 0)[0]:
    try:
        connection.sendall(b"ping")
        if connection.recv(100) != b"ping":
            print("end of data", file=out)
            break
    except OSError as error:
        print("error", error, file=out)
        break
    rounds += 1
    if rounds % 20 == 0:
        print("talking", rounds, file=out)
    time.sleep(0.01)
# The connection may end between two looks at the service: what the service has said is read in any case.
if select.select([service], [], [], 5)[0]:
    alert = service.recv(65536)
    if not alert:
        print("daemon gone", file=out)
    else:
        alert = json.loads(alert)
        print("alert", alert["state"], alert["reason"], file=out)
# Not one more octet, however hard it tries.
for i in range(20):
    try:
        connection.sendall(b"ping")
    except OSError:
        pass
    time.sleep(0.05)
print("over", file=out)
"#;

struct Holder {
    report: PathBuf,
    _process: Process,
}

impl Holder {
    fn start(daemon: &Daemon, host: &Host, peer: &str) -> Self {
        let script = daemon.path("holder.py");
        fs::write(&script, HOLDER).unwrap();
        let report = daemon.path(&format!("report-{peer}"));
        fs::write(&report, "").unwrap();
        let socket = daemon.latch_socket();
        let args = [&script, &socket, &PathBuf::from(peer), &report].map(|path| path.to_str().unwrap().to_owned());
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        Self { report, _process: host.spawn("python3", &args) }
    }

    fn report(&self) -> String {
        fs::read_to_string(&self.report).unwrap()
    }

    fn says(&self, what: &str) {
        let text = || self.report();
        wait_for(&format!("the holder says {what:?}"), Duration::from_secs(30), || text().contains(what));
    }

    /// It goes on talking.
    fn talks(&self) {
        let lines = self.report().matches("talking").count();
        wait_for("the holder goes on talking", Duration::from_secs(30), || {
            self.report().matches("talking").count() > lines + 1
        });
    }
}

fn echo_server(host: &Host) -> Process {
    let server = host.spawn("socat", &["TCP4-LISTEN:7,bind=10.2.0.1,reuseaddr,fork", "EXEC:cat"]);
    host.wait_for_listener(7);
    server
}

/// Counts packets to the protected network that leave a host in clear.
fn count_clear(host: &Host) {
    host.nft(
        "table inet witness {\ncounter clear { }\nchain o {\ntype filter hook postrouting priority 200;\n\
         oifname \"va*\" ip daddr 10.2.0.0/24 counter name clear;\n}\n}\n",
    );
}

fn clear_packets(host: &Host) -> u64 {
    let counters = host.check("nft", &["list", "counter", "inet", "witness", "clear"]);
    counters.split("packets ").nth(1).and_then(|rest| rest.split(' ').next()?.parse().ok()).unwrap()
}

// RFC 5660 §2: SAs come and go under a latch as long as they are congruent.
#[test]
fn a_latch_outlives_rekeys_of_both_kinds() {
    let scene = Scene::works(Latchkey, Latchkey, &Suite::default());
    let _server = echo_server(&scene.host_b);
    let holder = Holder::start(&scene.a, &scene.host_a, "b.example");
    holder.says("latched b.example shared-key");
    holder.talks();
    for (daemon, what) in [(&scene.a, "--child"), (&scene.b, "--child")] {
        daemon.control(&["--rekey", what, "net"]);
        holder.talks();
    }
    for daemon in [&scene.a, &scene.b] {
        daemon.control(&["--rekey", "--ike", "site"]);
        holder.talks();
    }
    assert!(!holder.report().contains("alert"), "{}", holder.report());
}

// RFC 5660 §2: a latch is about who the peer is and how it is protected, not about where it is: the SAs move (RFC 4555),
// the latched connection goes on.
#[test]
fn a_latch_outlives_a_move() {
    let (host_a, host_b) = hosts();
    latchkey_tests::host::link(&host_a, "198.51.100.1/24", &host_b, "198.51.100.2/24");
    host_a.wait_for_links();
    host_b.wait_for_links();
    let [(of_a, files_a), (of_b, files_b)] = configurations(&Suite::default());
    let b = Daemon::start(Latchkey, &host_b, &of_b, &files_b);
    let a = Daemon::start(Latchkey, &host_a, &of_a, &files_a);
    a.initiate("net");
    let _server = echo_server(&host_b);
    let holder = Holder::start(&a, &host_a, "b.example");
    holder.talks();
    let device = host_a.check("ip", &["-o", "addr", "show", "to", "192.0.2.1"]);
    let device = device.split_whitespace().nth(1).unwrap();
    host_a.ip(&["addr", "del", "192.0.2.1/24", "dev", device]);
    wait_for("the move", Duration::from_secs(30), || b.sas().contains("remote-host=198.51.100.1 "));
    holder.talks();
    assert!(!holder.report().contains("alert"), "{}", holder.report());
    drop((a, b));
}

// RFC 5660 §2.3: another peer than wanted, or no SA, is an error and not a connection.
#[test]
fn a_latch_to_somebody_else_is_refused() {
    let scene = Scene::works(Latchkey, Latchkey, &Suite::default());
    let _server = echo_server(&scene.host_b);
    Holder::start(&scene.a, &scene.host_a, "c.example").says("refused wrong-peer");
    scene.a.control(&["--terminate", "--ike", "site"]);
    Holder::start(&scene.a, &scene.host_a, "b.example").says("refused no-sa");
}

// Fail closed: the daemon is killed, and not one packet of the latched flow leaves in clear, though the system has a
// route that would carry it.
#[test]
fn nothing_leaves_when_the_daemon_is_killed() {
    let mut scene = Scene::works(Latchkey, Latchkey, &Suite::default());
    let _server = echo_server(&scene.host_b);
    scene.host_a.ip(&["route", "add", "default", "via", "192.0.2.2"]);
    count_clear(&scene.host_a);
    let holder = Holder::start(&scene.a, &scene.host_a, "b.example");
    holder.talks();
    scene.a.signal("KILL");
    wait_for("its end", Duration::from_secs(30), || !scene.a.is_running());
    holder.says("over");
    assert_eq!(clear_packets(&scene.host_a), 0);
    // The witness sees what an ordinary socket does.
    let _ = scene.host_a.run("socat", &["-u", "/dev/null", "TCP4:10.2.0.1:7,bind=10.1.0.1,connect-timeout=1"]);
    assert!(clear_packets(&scene.host_a) > 0);
}

// RFC 5660 §2.3: an SA of another peer that claims the flow breaks the latch and tells its holder first.
#[test]
fn another_peer_that_claims_the_address_breaks_the_latch() {
    let (host_a, host_b) = hosts();
    let host_c = Host::new();
    latchkey_tests::host::link(&host_a, "198.51.100.1/24", &host_c, "198.51.100.3/24");
    let [(of_a, files_a), (of_b, files_b)] = configurations(&Suite::default());
    // A admits C, too, for the same network, with a key of its own.
    let of_a = of_a.replace(
        "connections {\n",
        "connections {\nother {\nlocal {\nauth = psk\nid = a.example\n}\nremote {\nauth = psk\n\
                 id = c.example\n}\nchildren {\nnet {\nlocal_ts = 10.1.0.0/24\nremote_ts = 10.2.0.0/24\n}\n}\n}\n",
    );
    let of_c = of_b
        .replace("local_addrs = 192.0.2.2", "local_addrs = 198.51.100.3")
        .replace("remote_addrs = 192.0.2.1", "remote_addrs = 198.51.100.1")
        .replace("id = b.example", "id = c.example")
        .replace("local_ts = 10.2.0.0/24", "local_ts = 10.2.0.1/32")
        .replace("proposals = aes256gcm16-prfsha384-x25519\n", "")
        .replace("esp_proposals = aes128gcm16\n", "");
    let b = Daemon::start(Latchkey, &host_b, &of_b, &files_b);
    let c = Daemon::start(Latchkey, &host_c, &of_c, &files_b);
    let a = Daemon::start_with(Latchkey, &host_a, BREAKS, &of_a, &files_a);
    a.control(&["--initiate", "--ike", "site", "--child", "net", "--timeout", "20"]);
    assert!(host_a.pings(INNER_A, INNER_B));
    let _server = echo_server(&host_b);
    let holder = Holder::start(&a, &host_a, "b.example");
    holder.talks();
    c.initiate("net");
    holder.says("alert broken an SA of c.example claims");
    holder.says("over");
    // The witness is the hijacker's own tunnel: nothing of the latched flow came out of it.
    let sas = c.sas();
    assert!(sas.contains("packets-in=0 "), "{sas}");
    drop((a, b, c));
}

/// Speaks the protocol itself; `argv[1]` is the daemon's socket.
const CONNECTED_BEFORE: &str = r#"
import json, socket, sys
daemon = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
daemon.connect(sys.argv[1])
number = 0
def ask(request, descriptor=None, **arguments):
    global number
    number += 1
    octets = json.dumps({"id": number, "request": request, "arguments": arguments}).encode()
    socket.send_fds(daemon, [octets], [descriptor.fileno()] if descriptor else [])
    answer = json.loads(daemon.recv(65536))
    assert answer["id"] == number, answer
    return answer
assert ask("hello", version=1)["result"]["revision"] >= 6
def talk(s):
    s.sendall(b"through")
    assert s.recv(100) == b"through"
def connected():
    s = socket.create_connection(("10.2.0.1", 4000), source_address=("10.1.0.1", 0))
    s.settimeout(20)
    return s

new = connected()
created = ask("create", new, peer="b.example")
assert created["result"]["peer"]["id"]["text"] == "b.example", created
talk(new)

for waiting in (False, True):
    old = connected()
    talk(old)
    if waiting:
        old.sendall(b"more")
        old.recv(1, socket.MSG_PEEK)
    answer = ask("create", old, peer="b.example")
    assert answer.get("code") == "socket" and "late" in answer["message"], answer
    # It is as it was.
    if waiting:
        assert old.recv(100) == b"more"
    talk(old)
    answer = ask("create", old, peer="c.example", late=True)
    assert answer.get("code") == "wrong-peer", answer
    answer = ask("create", old, peer="b.example", late=True)
    assert answer["type"] == "reply", answer
    talk(old)
print("all went well")
"#;

// RFC 5660 §2: what came in before there was a latch must not be taken for what came under it.
#[test]
fn a_connection_that_carried_data_is_latched_only_with_its_holder_s_consent() {
    let scene = Scene::works(Latchkey, Latchkey, &Suite::default());
    let _server = scene.host_b.spawn("socat", &["TCP4-LISTEN:4000,bind=10.2.0.1,reuseaddr,fork", "EXEC:cat"]);
    scene.host_b.wait_for_listener(4000);
    let socket = scene.a.latch_socket();
    let arguments = ["-c", CONNECTED_BEFORE, socket.to_str().unwrap()];
    assert!(scene.host_a.check("/usr/bin/python3", &arguments).contains("all went well"));
}
