//! What `latchkey exec` does with programs, in either plane.

use std::process::Command;

use crate::daemon::{Daemon, Kind};
use crate::host::{Host, Process};
use crate::scene::{Scene, Suite};
use crate::talker::Talker;
use crate::witness::Wires;

/// A program under these rules; what begins with `--` is an option of `latchkey exec`.
pub fn command(daemon: &Daemon, host: &Host, rules: &[&str], program: &[&str]) -> Command {
    let socket = daemon.latch_socket();
    let mut all = vec!["exec"];
    if !rules.iter().any(|rule| rule.starts_with("--socket")) {
        all.extend_from_slice(&["--socket", socket.to_str().unwrap()]);
    }
    for rule in rules {
        if !rule.starts_with("--") {
            all.push("--rule");
        }
        all.push(rule);
    }
    all.push("--");
    all.extend_from_slice(program);
    host.command(crate::daemon::program("latchkey").to_str().unwrap(), &all)
}

/// Answers all that comes to this port of B with what came.
pub fn echo_server(host: &Host, port: u16) -> Process {
    let server = host.spawn("socat", &[&format!("TCP4-LISTEN:{port},bind=10.2.0.1,reuseaddr,fork"), "EXEC:cat"]);
    host.wait_for_listener(port);
    server
}

/// Connects without blocking and says how it goes on; `argv[1]` is how it asks in the end.
const NOT_WAITING: &str = r#"
import errno, os, select, socket, sys
s = socket.socket()
s.setblocking(False)
code = s.connect_ex(("10.2.0.1", 4000))
assert code == errno.EINPROGRESS, errno.errorcode[code]
poll = select.epoll()
poll.register(s, select.EPOLLOUT)
assert poll.poll(0) == [] and s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
assert s.connect_ex(("10.2.0.1", 4000)) == errno.EALREADY
print("in progress", flush=True)
assert poll.poll()
if sys.argv[1] == "option":
    code = s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
else:
    code = s.connect_ex(("10.2.0.1", 4000))
print("it is", errno.errorcode.get(code, code), flush=True)
if code == 0:
    s.setblocking(True)
    s.sendall(b"through the latch")
    assert s.recv(100) == b"through the latch"
    print("all went well", flush=True)
"#;

/// A loop that goes on while a connection is made.
const TICKING: &str = r#"
import asyncio
async def tick():
    while True:
        await asyncio.sleep(0.01)
        print("tick", flush=True)
async def talk():
    reader, writer = await asyncio.open_connection("10.2.0.1", 4000)
    writer.write(b"line\n")
    assert await reader.readline() == b"line\n"
    writer.close()
async def main():
    ticking = asyncio.create_task(tick())
    await talk()
    ticking.cancel()
    print("all went well")
asyncio.run(main())
"#;

/// A trap that makes A's first packet to B's network bring the tunnel up, and a way for it in clear.
pub fn trapped(kind: Kind) -> Scene {
    let scene = Scene::start(kind, kind, &Suite { child: "start_action = trap", ..Suite::DEFAULT });
    scene.host_a.ip(&["route", "add", "10.2.0.0/24", "via", "192.0.2.2", "src", "10.1.0.1"]);
    scene
}

/// RFC 5660 §2.3: a LARVAL latch; §2: nothing is sent before it is ESTABLISHED.
pub fn a_program_that_does_not_block_goes_on_while_the_latch_is_made(kind: Kind) {
    let scene = trapped(kind);
    let wires = Wires::of(&[&scene.host_a]);
    let (a, host_a, host_b) = (&scene.a, &scene.host_a, &scene.host_b);
    let _server = echo_server(host_b, 4000);
    let start = |name: &str, peer: &str, script: &str, argument: &str| {
        // Nobody answers until the program has said that it goes on. A late packet of the connection before may have brought the
        // tunnel up once more.
        let is_up = || a.sas().contains("list-sa event");
        loop {
            while is_up() {
                // It may go by itself.
                let _ = a.swanctl(&["--terminate", "--ike", "site", "--force"]);
            }
            host_a.block_udp();
            if !is_up() {
                break;
            }
            host_a.allow_udp();
        }
        let program = ["/usr/bin/python3", "-c", script, argument];
        Talker::start(command(a, host_a, &[&format!("tcp:4000={peer}")], &program), a.path(name))
    };
    for way in ["option", "again"] {
        let mut client = start(way, "b.example", NOT_WAITING, way);
        client.prints("in progress");
        host_a.allow_udp();
        client.prints("it is 0");
        client.prints("all went well");
        assert!(client.ends().success(), "{}", client.errors());

        // Somebody else answers: the program hears it as it hears of any connection that fails.
        let mut client = start("refused", "c.example", NOT_WAITING, way);
        client.prints("in progress");
        host_a.allow_udp();
        client.prints("it is EACCES");
        client.tells("is b.example, not c.example (wrong-peer)");
        client.ends();
    }
    let mut client = start("ticking", "b.example", TICKING, "");
    client.prints("tick\ntick\ntick\n");
    host_a.allow_udp();
    client.prints("all went well");
    assert!(client.ends().success(), "{}", client.errors());
    wires.saw_nothing_of("port 4000", "through the latch");
}
