//! What holds of optional protection (RFC 5660 §3.1) whoever does ESP: the same is done with either plane, in namespaces or in a
//! guest whose kernel has ESP.

use std::thread;
use std::time::Duration;

use crate::capture::Capture;
use crate::daemon::{Daemon, Files, Kind, program};
use crate::host::{Host, wait_for};
use crate::scene::{Suite, configurations, hosts};
use crate::talker::Talker;
use crate::witness::Echo;

const PATIENCE: Duration = Duration::from_secs(60);

/// Has a UDP socket go in clear, sends on it now and then, and prints what comes.
const DATAGRAMS: &str = r#"
import json, socket, sys, time
service = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
service.connect(sys.argv[1])
def call(number, name, arguments, descriptors=[]):
    message = {"id": number, "request": name, "arguments": arguments}
    socket.send_fds(service, [json.dumps(message).encode()], descriptors)
    return json.loads(service.recv(65536))
call(1, "hello", {"version": 1})
held = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
held.bind(("10.1.0.1", 40200))
print(call(2, "bypass", {"remote": "10.2.0.1:9"}, [held.fileno()]), flush=True)
held.settimeout(0.2)
while True:
    try:
        held.send(b"sent in clear")
        print("got", held.recv(100), flush=True)
    except OSError as error:
        time.sleep(0.1)
"#;

/// Two hosts with a tunnel between their networks, and a way past it. B's policy lets pass what A has bypassed.
struct Scene {
    // Daemons stop before their hosts go: fields drop in order.
    a: Daemon,
    _b: Daemon,
    _echo: Echo,
    host_a: Host,
    host_b: Host,
    of_a: (String, Files),
    /// What A and B send on the link.
    wires: [Capture; 2],
}

impl Scene {
    fn start(kind: Kind) -> Self {
        let (host_a, host_b) = hosts();
        host_a.ip(&["route", "add", "10.2.0.0/24", "via", "192.0.2.2"]);
        host_b.ip(&["route", "add", "10.1.0.0/24", "via", "192.0.2.1"]);
        let [of_a, (of_b, files_b)] = configurations(&Suite::default());
        let aside = "children {\naside {\nmode = pass\nstart_action = trap\nlocal_ts = 10.2.0.1/32[tcp/7]\n\
                     remote_ts = 10.1.0.1/32[tcp/40100-40103]\n}\n";
        let b = Daemon::start(kind, &host_b, &of_b.replacen("children {\n", aside, 1), &files_b);
        let a = Daemon::start(kind, &host_a, &of_a.0, &of_a.1);
        a.initiate("net");
        let echo = Echo::start(&host_b, "10.2.0.1");
        let wires = [&host_a, &host_b].map(|host| {
            let links = host.check("ip", &["-o", "link", "show", "type", "veth"]);
            Capture::start(host, links.split_whitespace().nth(1).unwrap().split('@').next().unwrap())
        });
        Self { a, _b: b, _echo: echo, host_a, host_b, of_a, wires }
    }

    /// `latchkey nc` on A to the echo server.
    fn netcat(&self, port: u16, args: &[&str]) -> Talker {
        let (socket, source) = (self.a.latch_socket(), format!("10.1.0.1:{port}"));
        let mut all = vec!["nc", "--socket", socket.to_str().unwrap(), "-s", &source];
        all.extend_from_slice(args);
        all.extend_from_slice(&["10.2.0.1", "7"]);
        let command = self.host_a.command(program("latchkey").to_str().unwrap(), &all);
        Talker::start(command, self.a.path(&format!("nc-{port}")))
    }

    fn latchkey(&self, args: &[&str]) -> String {
        let socket = self.a.latch_socket();
        let mut all = args.to_vec();
        all.extend_from_slice(&["--socket", socket.to_str().unwrap()]);
        self.host_a.check(program("latchkey").to_str().unwrap(), &all)
    }

    fn load(&self, change: impl FnOnce(&str) -> String) {
        self.a.write(&change(&self.of_a.0), &self.of_a.1);
        self.a.control(&["--load-conns"]);
    }

    /// Rules of A that name a port.
    fn rules_of(&self, port: &str) -> usize {
        self.host_a.check("ip", &["rule"]).matches(port).count()
    }
}

fn echoes(talker: &mut Talker, text: &str) {
    talker.types(&format!("{text}\n"));
    talker.prints(text);
}

/// An application that may has its connection go in clear. All others between the same hosts are protected as before, and nothing
/// of it goes under an SA, in either direction, whatever is loaded or installed.
pub fn what_may_goes_in_clear_and_nothing_else_does(kind: Kind) {
    let scene = Scene::start(kind);
    let [wire_a, wire_b] = &scene.wires;
    let mut protected = scene.netcat(40010, &["--peer", "b.example"]);
    echoes(&mut protected, "under an SA");
    let mut clear = scene.netcat(40100, &["--bypass"]);
    clear.tells("10.1.0.1:40100 to 10.2.0.1:7, IN CLEAR");
    echoes(&mut clear, "past the tunnel");
    for wire in [wire_a, wire_b] {
        wait_for("the connection in clear", PATIENCE, || wire.contains("past the tunnel"));
    }
    echoes(&mut protected, "still under an SA");
    let listed = scene.latchkey(&["latches"]);
    let line = listed.lines().find(|line| line.contains("40100")).unwrap();
    assert!(line.contains("established") && line.ends_with("10.2.0.1:7  bypass"), "{line}");
    let number = line.split_whitespace().next().unwrap().to_owned();
    for args in [&["whois", "10.1.0.1:40100", "10.2.0.1:7"][..], &["latch", "show", &number]] {
        let said = scene.latchkey(args);
        assert!(said.contains("nobody knows who") && said.contains("protection: bypass"), "{said}");
        assert!(said.contains(&format!("latch: {number} established")), "{said}");
    }
    assert!(scene.latchkey(&["whois", "10.1.0.1:40010", "10.2.0.1:7"]).contains("b.example by shared key"));

    // What the peer sends of such a flow under an SA does not get in: B's policy has nothing for this one.
    let socket = scene.a.latch_socket();
    let datagrams = scene.host_a.command("python3", &["-c", DATAGRAMS, socket.to_str().unwrap()]);
    let datagrams = Talker::start(datagrams, scene.a.path("datagrams"));
    datagrams.prints("'type': 'reply'");
    wait_for("datagrams in clear", PATIENCE, || wire_a.count("udp and src 10.1.0.1 and port 40200") > 0);
    let esp = || wire_b.count("udp port 4500 or esp");
    let before = esp();
    let send =
        "for i in 1 2 3 4 5; do echo under the SA; sleep 0.1; done | socat -u - UDP4:10.1.0.1:40200,bind=10.2.0.1:9";
    scene.host_b.check("sh", &["-c", send]);
    wait_for("what B sends under its SA", PATIENCE, || esp() > before);
    assert_eq!(wire_b.list("udp and src 10.2.0.1 and port 40200"), "", "B protects it");
    thread::sleep(Duration::from_millis(300));
    assert!(!datagrams.output().contains("got"), "{}", datagrams.output());
    drop(datagrams);

    // SAs and the configuration come and go: it is in clear, and nothing else is.
    scene.a.control(&["--rekey", "--child", "net"]);
    echoes(&mut clear, "after a rekey");
    scene.load(|_| String::new());
    echoes(&mut clear, "without a connection");
    scene.a.control(&["--terminate", "--ike", "site"]);
    echoes(&mut clear, "without an SA");
    scene.load(str::to_owned);
    scene.a.initiate("net");
    echoes(&mut clear, "with another SA");
    wait_for("the connection in clear", PATIENCE, || wire_a.contains("with another SA"));
    for wire in [wire_a, wire_b] {
        assert_eq!(wire.list("tcp and port 7 and not portrange 40100-40103"), "", "in clear");
        assert!(!wire.contains("under an SA"), "in clear");
    }
    assert!(scene.rules_of("40100") > 0);

    // RFC 5660 §6.2: the administrator ends it; then the policy holds again.
    scene.latchkey(&["latch", "close", &number]);
    clear.tells("the latch is closed: closed by the administrator");
    clear.ends();
    wait_for("the end of the latch", PATIENCE, || !scene.latchkey(&["latches"]).contains("40100"));
    assert_eq!(scene.rules_of("40100"), 0);

    // What is to be dropped is not bypassed (RFC 5660 §2.2).
    let mut clear = scene.netcat(40101, &["--bypass"]);
    echoes(&mut clear, "until it is dropped");
    let drops =
        "children {\nnothing {\nmode = drop\nstart_action = trap\nlocal_ts = 10.1.0.0/24\nremote_ts = 10.2.0.0/24\n}\n";
    scene.load(|text| text.replacen("children {\n", drops, 1));
    clear.tells("the policy has changed: the shunt nothing drops it");
    clear.ends();
    let mut clear = scene.netcat(40102, &["--bypass"]);
    clear.tells("the shunt nothing drops it (policy)");
    clear.ends();
    assert_eq!(scene.rules_of("4010"), 0);
}

/// RFC 5660 §3.1: it MUST NOT survive a crash. The successor lets nothing in clear pass of what the daemon had bypassed, until the
/// system has no connection of it.
pub fn a_killed_daemon_s_successor_closes_what_went_in_clear(kind: Kind) {
    let mut scene = Scene::start(kind);
    let mut clear = scene.netcat(40100, &["--bypass"]);
    echoes(&mut clear, "before the crash");
    scene.a.signal("KILL");
    wait_for("the daemon's end", PATIENCE, || !scene.a.is_running());
    clear.tells("the latch is closed: the connection to the daemon has ended");
    scene.a.restart(&scene.host_a);
    assert_eq!(scene.rules_of("40100"), 0);
    // The application still has its socket.
    clear.types("after the crash\n");
    thread::sleep(Duration::from_millis(800));
    scene.a.initiate("net");
    thread::sleep(Duration::from_millis(800));
    // At most it is protected from now on; B answers as its own policy says, and is not heard.
    assert!(!scene.wires[0].contains("after the crash"), "in clear");
    assert!(!clear.output().contains("after the crash"));
    drop(clear);
    // Stopped in good order, it leaves nothing open either.
    let mut clear = scene.netcat(40101, &["--bypass"]);
    echoes(&mut clear, "before the stop");
    assert!(scene.a.stop());
    clear.tells("the latch is closed: the daemon ends");
    clear.ends();
    assert_eq!(scene.rules_of("4010"), 0);
}
