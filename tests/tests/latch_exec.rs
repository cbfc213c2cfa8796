//! `latchkey exec`: curl, socat, bash and Python, unmodified, over real tunnels.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use latchkey_tests::daemon::Kind::Latchkey;
use latchkey_tests::daemon::{Daemon, program};
use latchkey_tests::exec::{self, command, echo_server};
use latchkey_tests::host::Host;
use latchkey_tests::scene::{Scene, Suite};
use latchkey_tests::talker::Talker;

fn run(daemon: &Daemon, host: &Host, rules: &[&str], program: &[&str]) -> Output {
    command(daemon, host, rules, program).stdin(Stdio::null()).output().unwrap()
}

fn text(octets: &[u8]) -> String {
    String::from_utf8_lossy(octets).into_owned()
}

fn python(daemon: &Daemon, host: &Host, rules: &[&str], script: &str) -> String {
    let output = run(daemon, host, rules, &["/usr/bin/python3", "-c", script]);
    let (out, errors) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{out}{errors}{}", daemon.output());
    out + &errors
}

/// Counts the packets to B's port 4000 that A's programs send, by whatever way.
fn count(host: &Host) {
    host.nft(
        "table inet witness {\ncounter sent { }\nchain o {\ntype filter hook output priority 0;\n\
         ip daddr 10.2.0.1 tcp dport 4000 counter name sent;\n}\n}\n",
    );
}

fn trapped() -> Scene {
    let scene = exec::trapped(Latchkey);
    count_in_clear(&scene.host_a);
    scene
}

// RFC 5660 §2.3: a LARVAL latch; §2: nothing is sent before it is ESTABLISHED.
#[test]
fn a_program_that_does_not_block_goes_on_while_the_latch_is_made() {
    exec::a_program_that_does_not_block_goes_on_while_the_latch_is_made(Latchkey);
}

fn counted(host: &Host) -> u64 {
    let counters = host.check("nft", &["list", "counter", "inet", "witness", "sent"]);
    counters.split("packets ").nth(1).and_then(|rest| rest.split(' ').next()?.parse().ok()).unwrap()
}

fn latches(daemon: &Daemon, host: &Host) -> String {
    let socket = daemon.latch_socket();
    host.check(program("latchkey").to_str().unwrap(), &["latches", "--socket", socket.to_str().unwrap()])
}

/// Connects without blocking, as event loops do, and again to see what has become of it; then twenty at once.
const EVENT_LOOP: &str = r#"
import asyncio, errno, select, socket, subprocess
s = socket.socket()
s.setblocking(False)
code = s.connect_ex(("10.2.0.1", 4000))
assert code in (0, errno.EINPROGRESS), code
poll = select.poll()
poll.register(s, select.POLLOUT)
assert poll.poll(20000)
assert s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
assert s.connect_ex(("10.2.0.1", 4000)) in (0, errno.EISCONN)
assert s.connect_ex(("10.2.0.1", 4001)) == errno.EISCONN
s.setblocking(True)
# A child that closes everything does not end the connection; nor does one that is forked and closes it.
subprocess.run(["true"], check=True)
import os
if os.fork() == 0:
    s.close()
    os._exit(0)
os.wait()
# A duplicate lives on when the first is closed.
d = s.dup()
s.close()
d.sendall(b"duplicate")
assert d.recv(100) == b"duplicate"
d.close()
async def one(n):
    reader, writer = await asyncio.open_connection("10.2.0.1", 4000)
    writer.write(b"%d\n" % n)
    line = await reader.readline()
    writer.close()
    return int(line)
async def many():
    return await asyncio.gather(*(one(n) for n in range(20)))
assert asyncio.run(many()) == list(range(20))
print("all went well")
"#;

const DATAGRAMS: &str = r#"
import errno, socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(10)
s.connect(("10.2.0.1", 4002))
s.send(b"datagram")
assert s.recv(100) == b"datagram"
s.sendto(b"again", ("10.2.0.1", 4002))
assert s.recv(100) == b"again"
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for send in (lambda: u.sendto(b"x", ("10.2.0.1", 4002)), lambda: u.sendmsg([b"x"], [], 0, ("10.2.0.1", 4002))):
    try:
        send()
        print("it was sent")
    except OSError as error:
        assert error.errno == errno.EOPNOTSUPP, error
t = socket.socket()
try:
    t.sendto(b"x", socket.MSG_FASTOPEN, ("10.2.0.1", 4000))
    print("it was sent")
except OSError as error:
    assert error.errno == errno.EOPNOTSUPP, error
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
assert libc.syscall(425, 4, ctypes.create_string_buffer(120)) == -1 and ctypes.get_errno() == errno.ENOSYS
print("all went well")
"#;

/// Counts the packets to B's inner address that leave A by the wire in clear.
fn count_in_clear(host: &Host) {
    host.nft(
        "table inet witness {\ncounter sent { }\nchain o {\ntype filter hook postrouting priority 300;\n\
         oifname \"va*\" ip daddr 10.2.0.1 counter name sent;\n}\n}\n",
    );
}

/// Sends a datagram once, and connects by a socket whose SYN goes out once.
const ONCE: &str = r#"
import errno, select, socket, time
begun = time.monotonic()
t = socket.socket()
t.setblocking(False)
assert t.connect_ex(("10.2.0.1", 4000)) == errno.EINPROGRESS
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
u.setblocking(False)
u.connect(("10.2.0.1", 4002))
u.send(b"first")
u.send(b"latest")
print("in progress", flush=True)
for s, event in ((t, select.POLLOUT), (u, select.POLLIN)):
    poll = select.poll()
    poll.register(s, event)
    assert poll.poll(60000), s
    print("after", round(time.monotonic() - begun, 3), "s", flush=True)
assert t.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
assert u.recv(100) == b"latest"
print("all went well", flush=True)
"#;

/// Reads, or writes and reads, until something fails; says the error.
const WAITS_FOR_WORD: &str = r#"
import errno, socket, sys
if sys.argv[1].startswith("datagrams"):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    s.connect(("10.2.0.1", 4002))
else:
    s = socket.create_connection(("10.2.0.1", 4000))
s.sendall(b"hello")
assert s.recv(100) == b"hello"
print("connected", flush=True)
try:
    if sys.argv[1].endswith("writer"):
        sys.stdin.readline()
        while True:
            s.sendall(b"what will never arrive")
            s.recv(100)
    octets = s.recv(100)
    print("it got", octets, flush=True)
except OSError as error:
    print("it is", errno.errorcode[error.errno], flush=True)
    if "datagrams" in sys.argv[1]:
        for again in (lambda: s.send(b"again"), lambda: s.recvfrom(100), lambda: s.recvmsg(100)):
            try:
                again()
                print("it was done")
            except OSError:
                pass
"#;

// RFC 5660 §2, §2.3: it waits for the latch, and not for its sender to send it again.
#[test]
fn what_a_program_sends_first_goes_out_when_the_latch_stands() {
    let scene = trapped();
    let (a, host_a, host_b) = (&scene.a, &scene.host_a, &scene.host_b);
    let _server = echo_server(host_b, 4000);
    let _datagrams = host_b.spawn("socat", &["UDP4-LISTEN:4002,bind=10.2.0.1,fork", "EXEC:cat"]);
    let start = |name: &str, peer: &str| {
        host_a.nft(
            "table inet once {\nchain o {\ntype filter hook output priority 0;\nudp dport { 500, 4500 } drop;\n\
             ip daddr 10.2.0.1 tcp flags & (syn | ack) == syn limit rate over 1/day burst 1 packets drop;\n}\n}\n",
        );
        let program = ["/usr/bin/python3", "-c", ONCE];
        let rules = [format!("tcp:4000={peer}"), format!("udp:4002={peer}")];
        let client = Talker::start(command(a, host_a, &[&rules[0], &rules[1]], &program), a.path(name));
        client.prints("in progress");
        let handles = host_a.check("nft", &["-a", "list", "chain", "inet", "once", "o"]);
        let drops_ike = handles.lines().find(|line| line.contains("4500")).unwrap();
        let handle = drops_ike.rsplit(' ').next().unwrap();
        host_a.check("nft", &["delete", "rule", "inet", "once", "o", "handle", handle]);
        client
    };
    let mut client = start("right", "b.example");
    client.prints("all went well");
    println!("{}", client.output());
    assert!(client.ends().success(), "{}", client.errors());
    // Both waited for the same SA.
    assert!(!a.output().contains("CHILD_SA net{2}"), "{}", a.output());

    // Nothing of it goes to somebody else.
    a.control(&["--terminate", "--ike", "site", "--force"]);
    host_a.check("nft", &["delete", "table", "inet", "once"]);
    host_b.nft(
        "table inet witness {\ncounter came { }\nchain i {\ntype filter hook input priority 0;\n\
         ip daddr 10.2.0.1 counter name came;\n}\n}\n",
    );
    let mut client = start("wrong", "c.example");
    client.tells("is b.example, not c.example (wrong-peer)");
    assert!(!client.ends().success());
    let came = host_b.check("nft", &["list", "counter", "inet", "witness", "came"]);
    assert!(came.contains("packets 0 "), "{came}");
    assert_eq!(counted(host_a), 0);
}

#[test]
fn curl_waits_for_its_latch_in_its_own_loop() {
    let scene = trapped();
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("file"), "what curl fetches\n").unwrap();
    let directory = folder.path().to_str().unwrap();
    let args = ["-m", "http.server", "--bind", "10.2.0.1", "--directory", directory, "8000"];
    let _web = scene.host_b.spawn("/usr/bin/python3", &args);
    scene.host_b.wait_for_listener(8000);
    // It gives up a connection that takes longer, by its own clock and not by `connect`.
    let fetch = |peer: &str, seconds: &str| {
        let curl = ["curl", "-s", "-S", "--connect-timeout", seconds, "http://10.2.0.1:8000/file"];
        run(&scene.a, &scene.host_a, &[&format!("tcp:8000={peer}")], &curl)
    };
    scene.host_a.block_udp();
    let output = fetch("b.example", "1");
    // Its code for what takes too long.
    assert_eq!(output.status.code(), Some(28), "{}", text(&output.stderr));
    scene.host_a.allow_udp();
    let output = fetch("b.example", "60");
    assert_eq!(text(&output.stdout), "what curl fetches\n", "{}", text(&output.stderr));
    scene.a.control(&["--terminate", "--ike", "site", "--force"]);
    let output = fetch("c.example", "60");
    assert!(
        text(&output.stderr).contains("(wrong-peer)") && output.status.code() == Some(7),
        "{}",
        text(&output.stderr)
    );
    assert_eq!(counted(&scene.host_a), 0);
}

/// Connects, by a socket that blocks or does not, and says how it goes.
const CONNECTS: &str = r#"
import errno, socket, sys
s = socket.socket()
s.setblocking(sys.argv[1] == "blocking")
print("it is", errno.errorcode.get(s.connect_ex(("10.2.0.1", 4000)), 0), flush=True)
"#;

#[test]
fn nobody_waits_for_a_daemon_that_is_stopped() {
    let scene = Scene::works(Latchkey, Latchkey, &Suite::default());
    let (a, host_a) = (&scene.a, &scene.host_a);
    let _server = echo_server(&scene.host_b, 4000);
    let start = |name: &str, way: &str| {
        let program = ["/usr/bin/python3", "-c", CONNECTS, way];
        Talker::start(command(a, host_a, &["tcp:4000=b.example"], &program), a.path(name))
    };
    a.signal("STOP");
    let mut clients = ["blocking", "not"].map(|way| start(way, way));
    for client in &mut clients {
        client.prints("it is ETIMEDOUT");
        client.tells("the daemon has not answered for 10 s");
        client.ends();
    }
    a.signal("CONT");
    let mut client = start("again", "blocking");
    client.prints("it is 0");
    client.ends();
    // What the first two would have got is given back.
    latchkey_tests::host::wait_for("the end of all latches", std::time::Duration::from_secs(30), || {
        latches(a, host_a).is_empty()
    });
}

fn waiting(scene: &Scene, name: &str, after: &str) -> Talker {
    let program = ["/usr/bin/python3", "-c", WAITS_FOR_WORD, name];
    let rules = ["tcp:4000=b.example", "udp:4002=b.example", &format!("--dead-after={after}")];
    let client = Talker::start(command(&scene.a, &scene.host_a, &rules, &program), scene.a.path(name));
    client.prints("connected");
    client
}

fn is_gone(scene: &Scene) {
    latchkey_tests::host::wait_for("the end of the daemon", std::time::Duration::from_secs(20), || {
        !scene.host_a.run("ip", &["link", "show", "latchkey0"]).status.success()
    });
}

// RFC 5660 §2 (13): broken and disconnected when the key manager dies; never in clear.
#[test]
fn the_death_of_the_daemon_ends_connections_and_datagrams_at_once() {
    let scene = Scene::works(Latchkey, Latchkey, &Suite::default());
    count_in_clear(&scene.host_a);
    let _server = echo_server(&scene.host_b, 4000);
    let _datagrams = scene.host_b.spawn("socat", &["UDP4-LISTEN:4002,bind=10.2.0.1,fork", "EXEC:cat"]);
    let names = ["reader", "writer", "datagrams", "datagrams-writer"];
    let mut clients = names.map(|name| waiting(&scene, name, "120"));
    scene.a.signal("KILL");
    is_gone(&scene);
    for (client, errors) in clients.iter_mut().zip([
        // EPIPE is what Linux gives who waits in the call, from 6.7 on.
        &["ECONNRESET", "EPIPE"][..],
        &["ECONNRESET", "EPIPE", "ENOTCONN"],
        &["ECONNRESET"],
        // The tunnel's device is gone, too.
        &["EPIPE", "ENODEV"],
    ]) {
        client.types("\n");
        client.prints("it is ");
        assert!(client.ends().success());
        let said = client.output();
        assert!(errors.iter().any(|error| said.contains(&format!("it is {error}"))), "{said}");
        assert!(!said.contains("it was done"), "{said}");
    }
    assert_eq!(counted(&scene.host_a), 0);
}

// The same when nobody is left to disconnect them.
#[test]
fn the_death_of_the_daemon_ends_connections_in_finite_time() {
    let scene = Scene::works(Latchkey, Latchkey, &Suite::default());
    count_in_clear(&scene.host_a);
    let _server = echo_server(&scene.host_b, 4000);
    let mut clients = ["reader", "writer"].map(|name| waiting(&scene, name, "4"));
    let survivor = scene.host_a.check("pgrep", &["-P", &scene.a.pid().to_string()]);
    // It ends with the daemon only, and not with what ends the daemon.
    scene.host_a.check("kill", &["-TERM", survivor.trim()]);
    scene.host_a.check("kill", &["-0", survivor.trim()]);
    scene.host_a.check("kill", &["-KILL", survivor.trim()]);
    scene.a.signal("KILL");
    // What is written after it, too.
    is_gone(&scene);
    clients[1].types("\n");
    for client in &mut clients {
        client.prints("it is ");
        assert!(client.ends().success());
        let said = client.output();
        // The last thing that the system met while it tried.
        let errors = ["ETIMEDOUT", "EHOSTUNREACH", "ENODEV", "ENETUNREACH"];
        assert!(errors.iter().any(|error| said.contains(&format!("it is {error}"))), "{said}");
    }
    assert_eq!(counted(&scene.host_a), 0);
}

// RFC 5660 §2: the right peer works, and nothing is sent to the wrong one.
#[test]
fn unmodified_programs_reach_the_right_peer_and_send_nothing_to_another() {
    let scene = Scene::works(Latchkey, Latchkey, &Suite::default());
    let (a, host_a, host_b) = (&scene.a, &scene.host_a, &scene.host_b);
    let _server = echo_server(host_b, 4000);
    let _datagrams = host_b.spawn("socat", &["UDP4-LISTEN:4002,bind=10.2.0.1,fork", "EXEC:cat"]);
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("file"), "what curl fetches\n").unwrap();
    let directory = folder.path().to_str().unwrap();
    let args = ["-m", "http.server", "--bind", "10.2.0.1", "--directory", directory, "8000"];
    let _web = host_b.spawn("/usr/bin/python3", &args);
    host_b.wait_for_listener(8000);
    count(host_a);

    // Somebody else: refused before the first packet, with the reason; the errno is EACCES.
    let rule = ["tcp:4000=c.example"];
    let output = run(a, host_a, &rule, &["socat", "-u", "/dev/null", "TCP4:10.2.0.1:4000"]);
    let errors = text(&output.stderr);
    assert!(!output.status.success() && errors.contains("latchkey: connect to 10.2.0.1:4000 (tcp): "), "{errors}");
    assert!(errors.contains("(wrong-peer)") && errors.contains("Permission denied"), "{errors}");
    // Nobody there to ask: ENETDOWN.
    let nowhere = ["--socket=/nonexistent/latch.sock", "tcp:4000=b.example"];
    let output = run(a, host_a, &nowhere, &["socat", "-u", "/dev/null", "TCP4:10.2.0.1:4000"]);
    let errors = text(&output.stderr);
    assert!(errors.contains("connecting to /nonexistent/latch.sock") && errors.contains("Network is down"), "{errors}");
    // A rule that refuses, and none where that is the default.
    for rules in [&["tcp:4000 refuse", "tcp:1=%any"][..], &["tcp:1=%any", "--default=refuse"]] {
        let output = run(a, host_a, rules, &["socat", "-u", "/dev/null", "TCP4:10.2.0.1:4000"]);
        assert!(text(&output.stderr).contains("a rule refuses it"), "{}", text(&output.stderr));
    }
    assert_eq!(counted(host_a), 0);

    let said = python(a, host_a, &["tcp:4000-4001=b.example", "--default=refuse"], EVENT_LOOP);
    assert!(said.contains("all went well"), "{said}");
    assert!(counted(host_a) > 0);
    let said = python(a, host_a, &["udp:10.2.0.0/24:*=b.example", "tcp:4000=b.example"], DATAGRAMS);
    assert!(said.contains("all went well") && !said.contains("it was sent"), "{said}");
    let output = run(a, host_a, &["tcp:8000=*.example"], &["curl", "-s", "http://10.2.0.1:8000/file"]);
    assert_eq!(text(&output.stdout), "what curl fetches\n", "{}", text(&output.stderr));
    // bash duplicates the socket to another number.
    let script = "exec 3<>/dev/tcp/10.2.0.1/4000; echo from bash >&3; read -r line <&3; echo \"got $line\"";
    let output = run(a, host_a, &["tcp:4000=b.example"], &["bash", "-c", script]);
    assert_eq!(text(&output.stdout), "got from bash\n", "{}", text(&output.stderr));
    // What no rule is for passes, without the daemon.
    let pass = ["--socket=/nonexistent/latch.sock", "tcp:1=b.example"];
    let output = run(a, host_a, &pass, &["curl", "-s", "http://10.2.0.1:8000/file"]);
    assert_eq!(text(&output.stdout), "what curl fetches\n", "{}", text(&output.stderr));
    latchkey_tests::host::wait_for("the end of all latches", std::time::Duration::from_secs(30), || {
        latches(a, host_a).is_empty()
    });
}

#[test]
fn a_server_accepts_latched_peers_alone_and_a_break_resets_what_it_serves() {
    let scene = Scene::works(Latchkey, Latchkey, &Suite::default());
    let (a, b, host_a, host_b) = (&scene.a, &scene.b, &scene.host_a, &scene.host_b);
    // It forks for each connection, and its parent closes its own descriptor.
    let listen = "TCP4-LISTEN:4000,bind=10.2.0.1,reuseaddr,fork";
    let server = command(b, host_b, &["listen:4000=a.example"], &["socat", listen, "EXEC:cat"]);
    let _server = Talker::start(server, b.path("server"));
    host_b.wait_for_listener(4000);
    assert!(latches(b, host_b).contains("listener     tcp  10.2.0.1:4000 - *  a.example"));
    let client = command(a, host_a, &["tcp:4000=b.example"], &["socat", "-d", "-", "TCP4:10.2.0.1:4000"]);
    let mut client = Talker::start(client, a.path("client"));
    for word in ["first\n", "second\n"] {
        client.types(word);
        client.prints(word);
    }
    assert!(latches(b, host_b).contains("established  tcp  10.2.0.1:4000 - "), "{}", latches(b, host_b));
    // One who does not come through the tunnel does not get in.
    let stranger = host_b.run("socat", &["-u", "/dev/null", "TCP4:10.2.0.1:4000,connect-timeout=2"]);
    assert!(!stranger.status.success());

    let number = latches(a, host_a).split_whitespace().next().unwrap().to_owned();
    let socket = a.latch_socket();
    let args = ["latch", "break", &number, "--socket", socket.to_str().unwrap()];
    host_a.check(program("latchkey").to_str().unwrap(), &args);
    client.tells("Connection reset by peer");
    client.ends();
    // A second listener on a latched port is refused with the errno of a port in use.
    let twice = command(b, host_b, &["listen:4000=a.example"], &["socat", &format!("{listen},reuseport"), "-"]);
    Talker::start(twice, b.path("twice")).tells("Address already in use");
}

#[test]
fn what_cannot_be_hooked_is_refused_before_it_starts() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    fs::write(path("main.c"), "int main(void) { return 0; }\n").unwrap();
    let compiled = Command::new("cc").args(["-static", "-o", &path("static"), &path("main.c")]).status();
    assert!(compiled.unwrap().success(), "apt-get install gcc libc6-dev");
    fs::copy("/bin/true", path("setuid")).unwrap();
    fs::set_permissions(path("setuid"), fs::Permissions::from_mode(0o4755)).unwrap();
    fs::write(path("script"), format!("#!{}\n", path("static"))).unwrap();
    fs::set_permissions(path("script"), fs::Permissions::from_mode(0o755)).unwrap();
    let latchkey = |args: &[&str]| {
        let output = Command::new(program("latchkey")).arg("exec").args(args).output().unwrap();
        (output.status.success(), text(&output.stderr))
    };
    for (name, reason) in [
        (path("static"), "linked statically"),
        (path("script"), "linked statically"),
        (path("setuid"), "setuid or setgid"),
        (path("main.c"), "not a program"),
        ("no-such-program-at-all".to_owned(), "no-such-program-at-all is not there"),
    ] {
        let (success, said) = latchkey(&["--rule", "tcp:1=%any", "--", &name]);
        assert!(!success && said.contains(reason), "{name}: {said}");
    }
    for (args, reason) in [
        (&["--", "true"][..], "there is no rule"),
        (&["--rule", "tcp:x=%any", "--", "true"], "\"tcp:x=%any\": \"x\" is not a port"),
        (&["--rules-file", "/nonexistent", "--", "true"], "reading /nonexistent"),
        (&["--rule", "tcp:1=%any", "--library", "/nonexistent", "--", "true"], "liblatchkey_preload.so is not there"),
    ] {
        let (success, said) = latchkey(args);
        assert!(!success && said.contains(reason), "{args:?}: {said}");
    }
    let (success, said) = latchkey(&["--rule", "tcp:1=%any", "--", "true"]);
    assert!(success, "{said}");
    assert!(Path::new(&path("static")).exists());
}
