//! Witnesses of latched connections (RFC 5660): an application whose octets can be told from all others, and captures on
//! every wire that say whether they went out in clear or to somebody else.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use crate::capture::Capture;
use crate::daemon::{Daemon, Files, Kind};
use crate::host::{Host, Process, link, wait_for};
use crate::pki::Authority;
use crate::scene::hosts;

/// In each message of a [`Talker`]'s.
pub const MARK: &str = "LATCHED-7f3a91";

const PATIENCE: Duration = Duration::from_secs(30);

/// Latches a connection to an echo server and talks, and goes on trying whatever happens. Speaks the documented protocol
/// (`docs/latch-protocol.md`) without our library. Says in a file what happens, a line each.
const TALKER: &str = r#"
import json, os, select, signal, socket, sys, time
told = json.loads(sys.argv[1])
out = open(told["report"], "a", buffering=1)
mark = told["mark"].encode()
def step(name):
    print(name, file=out)
    if told["kill_at"] == name:
        os.kill(told["kill"], signal.SIGKILL)
        # It is dead when its sockets are closed.
        select.select([service], [], [], 10)
service = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
service.connect(told["service"])
def call(number, name, arguments, descriptors=[]):
    message = json.dumps({"id": number, "request": name, "arguments": arguments}).encode()
    try:
        socket.send_fds(service, [message], descriptors)
        answer = service.recv(65536)
    except OSError:
        answer = b""
    if not answer:
        print("no service", file=out)
        sys.exit()
    return json.loads(answer)
call(1, "hello", {"version": 1})
step("before")
kind = socket.SOCK_DGRAM if told["udp"] else socket.SOCK_STREAM
def end(text):
    host, port = text.rsplit(":", 1)
    return host.strip("[]"), int(port)
connection = socket.socket(socket.AF_INET6 if "[" in told["local"] else socket.AF_INET, kind)
connection.bind(end(told["local"]))
wanted = {"peer": told["peer"], "remote": told["remote"], "on_break": told["on_break"]}
answer = call(2, "create", wanted, [connection.fileno()])
if answer["type"] == "refusal":
    print("refused", answer["code"], answer["message"], file=out)
    sys.exit()
print("guard", answer["result"].get("guard"), file=out)
step("latched")
# Long enough for a packet that is lost; short enough to see that nothing passes.
connection.settimeout(2)
for attempt in range(5):
    try:
        connection.connect(end(told["remote"]))
        break
    except OSError as error:
        print("not connected:", error, file=out)
        time.sleep(0.2)
step("connected")
watched, number, echoes, ended = [service], 0, 0, False
connection.settimeout(0.3)
while True:
    if watched and select.select(watched, [], [], 0)[0]:
        alert = service.recv(65536)
        if alert:
            alert = json.loads(alert)
            print("alert", alert["state"], alert["reason"], file=out)
            step("alert " + alert["state"])
        else:
            watched = []
            print("daemon gone", file=out)
    number += 1
    try:
        try:
            connection.send(mark + b" %08d\n" % number)
            if number == 30:
                step("transfer")
        except OSError as error:
            # A datagram may come to who may not send any.
            if not told["udp"]:
                raise
            if not ended:
                print("error", error, file=out)
            ended = True
        heard = connection.recv(4096)
        if not heard:
            raise OSError("end of data")
        for line in heard.splitlines():
            if not line.startswith(mark[:1]) or b"FORGED" in line:
                print("foreign", line, file=out)
        echoes += 1
        if echoes % 20 == 0:
            print("talking", echoes, file=out)
    except TimeoutError:
        print("silence", file=out)
    except OSError as error:
        if not ended:
            print("error", error, file=out)
        ended = True
        time.sleep(0.05)
    time.sleep(0.005)
"#;

/// Latches a listener and echoes what comes to it; accepts nothing while a file is there. Says in a file what happens.
const SERVER: &str = r#"
import json, os, select, socket, sys
told = json.loads(sys.argv[1])
out = open(told["report"], "a", buffering=1)
service = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
service.connect(told["service"])
def alert(message):
    print("alert", message["state"], message["reason"], file=out)
def call(name, arguments, descriptors=[]):
    message = json.dumps({"id": 7, "request": name, "arguments": arguments}).encode()
    try:
        socket.send_fds(service, [message], descriptors)
        while True:
            answer = json.loads(service.recv(65536) or '{"type": "refusal", "code": "gone", "message": ""}')
            if answer["type"] != "alert":
                return answer
            alert(answer)
    except OSError:
        return {"type": "refusal", "code": "gone", "message": ""}
call("hello", {"version": 1})
host, port = told["local"].rsplit(":", 1)
host = host.strip("[]")
listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind((host, int(port)))
answer = call("listen", {"peer": told["peer"], "on_break": told["on_break"]}, [listener.fileno()])
if answer["type"] == "refusal":
    print("refused", answer["code"], answer["message"], file=out)
    sys.exit()
number = answer["result"]["latch"]
listener.listen(16)
print("listening", file=out)
connections, watched = [], [service]
while True:
    paused = os.path.exists(told["pause"])
    readable, _, _ = select.select(watched + connections + ([] if paused else [listener]), [], [], 0.1)
    for one in readable:
        if one is service:
            message = service.recv(65536)
            if message:
                alert(json.loads(message))
            else:
                watched = []
                print("daemon gone", file=out)
        elif one is listener:
            connection, _ = listener.accept()
            answer = call("accept", {"listener": number}, [connection.fileno()])
            if answer["type"] == "refusal":
                print("refused", answer["code"], answer["message"], file=out)
                connection.close()
            else:
                result = answer["result"]
                print("accepted", result["peer"]["id"]["text"], "guard", result["guard"], file=out)
                connections.append(connection)
        else:
            try:
                heard = one.recv(4096)
                if heard:
                    print("heard", heard, file=out)
                    one.send(heard)
                else:
                    raise OSError("end of data")
            except OSError as error:
                print("error", error, file=out)
                connections.remove(one)
"#;

/// A running echo server whose listener is latched, on port 7 of the address; killed on drop.
pub struct Server {
    report: PathBuf,
    pause: PathBuf,
    _process: Process,
}

impl Server {
    /// Starts it on the daemon's host; connections wait when their latches break.
    pub fn start(daemon: &Daemon, host: &Host, local: &str, peer: &str) -> Self {
        let report = daemon.path(&format!("server-{local}"));
        let pause = daemon.path(&format!("pause-{local}"));
        fs::write(&report, "").unwrap();
        let told = format!(
            r#"{{"service": "{}", "report": "{}", "pause": "{}", "local": "{local}", "peer": "{peer}", "on_break": "wait"}}"#,
            daemon.latch_socket().display(),
            report.display(),
            pause.display(),
        );
        let server = Self { report, pause, _process: host.spawn("python3", &["-c", SERVER, &told]) };
        wait_for("the server's answer", PATIENCE, || !server.report().is_empty());
        server
    }

    /// All that it has said.
    pub fn report(&self) -> String {
        fs::read_to_string(&self.report).unwrap()
    }

    /// Waits until it has said this so many times.
    pub fn says(&self, what: &str, times: usize) {
        let said = || self.report().matches(what).count() >= times;
        let start = std::time::Instant::now();
        let limit = if crate::uml::inside() { 3 * PATIENCE } else { PATIENCE };
        while !said() {
            assert!(start.elapsed() < limit, "the server does not say {what:?} {times} times but:\n{}", self.report());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// From now on it accepts nothing, or goes on.
    pub fn pause(&self, paused: bool) {
        if paused {
            fs::write(&self.pause, "").unwrap();
            // A turn may have begun before.
            std::thread::sleep(Duration::from_millis(300));
        } else {
            fs::remove_file(&self.pause).unwrap();
        }
    }
}

/// What a [`Talker`] does.
#[derive(Clone, Copy)]
pub struct Talk<'a> {
    /// The identity that the peer must have.
    pub peer: &'a str,
    /// Our address and port; port 0 is any.
    pub local: &'a str,
    /// The server's.
    pub remote: &'a str,
    /// What becomes of the connection when the latch breaks.
    pub on_break: &'a str,
    /// UDP instead of TCP.
    pub udp: bool,
    /// Kill the daemon when this has happened: `before` the latch, `latched`, `connected`, `transfer`, `alert broken`.
    pub kill_at: &'a str,
}

impl Default for Talk<'_> {
    fn default() -> Self {
        Self {
            peer: "b.example",
            local: "10.1.0.1:40007",
            remote: "10.2.0.1:7",
            on_break: "reset",
            udp: false,
            kill_at: "",
        }
    }
}

/// A running application with a latched connection; killed on drop.
pub struct Talker {
    report: PathBuf,
    _process: Process,
}

impl Talker {
    /// Starts it on the daemon's host.
    pub fn start(daemon: &Daemon, host: &Host, talk: &Talk<'_>) -> Self {
        let report = daemon.path(&format!("report-{}-{}", talk.local, talk.kill_at));
        fs::write(&report, "").unwrap();
        let Talk { peer, local, remote, on_break, udp, kill_at } = talk;
        let told = format!(
            r#"{{"service": "{}", "report": "{}", "mark": "{MARK}", "peer": "{peer}", "local": "{local}",
                "remote": "{remote}", "on_break": "{on_break}", "udp": {udp}, "kill": {}, "kill_at": "{kill_at}"}}"#,
            daemon.latch_socket().display(),
            report.display(),
            daemon.pid(),
        );
        Self { report, _process: host.spawn("python3", &["-c", TALKER, &told]) }
    }

    /// All that it has said.
    pub fn report(&self) -> String {
        fs::read_to_string(&self.report).unwrap()
    }

    /// Waits until it says this.
    pub fn says(&self, what: &str) {
        let start = std::time::Instant::now();
        let limit = if crate::uml::inside() { 3 * PATIENCE } else { PATIENCE };
        while !self.report().contains(what) {
            assert!(start.elapsed() < limit, "the talker does not say {what:?} but:\n{}", self.report());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits until it has got some more echoes.
    pub fn talks(&self) {
        let before = self.report().matches("talking").count();
        let report = || self.report();
        wait_for("the talker goes on talking", PATIENCE, || report().matches("talking").count() > before + 1);
    }

    /// From here on it gets no echo, however hard it tries.
    pub fn is_silenced(&self) {
        let before = self.report().matches("talking").count();
        std::thread::sleep(Duration::from_millis(600));
        // One line may have been due for what came before.
        assert!(self.report().matches("talking").count() <= before + 1, "it still talks:\n{}", self.report());
    }
}

/// An echo server on port 7, TCP and UDP.
pub struct Echo {
    _tcp: Process,
    _udp: Process,
}

impl Echo {
    /// Starts it.
    pub fn start(host: &Host, address: &str) -> Self {
        let (family, address) =
            if address.contains(':') { (6, format!("[{address}]")) } else { (4, address.to_owned()) };
        let server = |kind| format!("{kind}:7,bind={address},reuseaddr,fork");
        let tcp = host.spawn("socat", &[&server(format!("TCP{family}-LISTEN")), "EXEC:cat"]);
        let udp = host.spawn("socat", &[&server(format!("UDP{family}-RECVFROM")), "EXEC:cat"]);
        host.wait_for_listener(7);
        Self { _tcp: tcp, _udp: udp }
    }
}

/// Captures on all links of some hosts.
pub struct Wires(Vec<Capture>);

impl Wires {
    /// Starts to listen; the hosts' links must be there.
    pub fn of(hosts: &[&Host]) -> Self {
        let captures = hosts.iter().flat_map(|host| {
            let links = host.check("ip", &["-o", "link", "show", "type", "veth"]);
            let names = links.lines().map(|line| line.split_whitespace().nth(1).unwrap().split('@').next().unwrap());
            names.map(|name| Capture::start(host, name)).collect::<Vec<_>>()
        });
        Self(captures.collect())
    }

    /// Nothing of what talkers say is on any wire, nor anything else that looks like their connections.
    pub fn saw_nothing(&self) {
        self.saw_nothing_of("port 7", MARK);
    }

    /// The same of other connections and texts.
    pub fn saw_nothing_of(&self, connections: &str, text: &str) {
        for capture in &self.0 {
            let seen = capture.list(&format!("(tcp or udp) and {connections}"));
            assert_eq!(seen, "", "of the latched connection, in clear");
            assert!(!capture.contains(text), "{text:?} in clear");
        }
    }

    /// That the witnesses are awake: this is on some wire.
    pub fn saw(&self, expression: &str) {
        wait_for(&format!("{expression} on a wire"), PATIENCE, || {
            self.0.iter().any(|capture| capture.count(expression) > 0)
        });
    }
}

/// RFC 5660 §2.3.2: hosts A, B and C, each with links to both others. A and B admit C, whose certificate is of the same
/// authority, for each other's networks.
pub struct Three {
    // Daemons stop before their hosts go: fields drop in order.
    /// A's daemon: connection `to-b`, child `net-b`, and the same for C.
    pub a: Daemon,
    /// B's daemon.
    pub b: Daemon,
    /// C's daemon: its child `net-a` claims B's address to A, `net-b` claims A's address to B.
    pub c: Daemon,
    /// 192.0.2.1, before 10.1.0.0/24.
    pub host_a: Host,
    /// 192.0.2.2, before 10.2.0.0/24.
    pub host_b: Host,
    /// 198.51.100.3 to A, 203.0.113.3 to B; it has B's inner address.
    pub host_c: Host,
    /// A's configuration and files.
    pub of_a: (String, Files),
    /// B's.
    pub of_b: (String, Files),
}

/// Settings of a daemon whose latches break where another Child SA could be narrowed around them.
pub const BREAKS: &str = "latch_narrowing = no\n";

impl Three {
    /// Starts all; nothing is up yet. `of_a` may change A's configuration. Latches of A and B break ([`BREAKS`]).
    pub fn start(kind: Kind, change_a: impl FnOnce(String) -> String) -> Self {
        Self::with(kind, BREAKS, change_a)
    }

    /// The same with these settings in A's `charon` section and no others.
    pub fn with(kind: Kind, settings_a: &str, change_a: impl FnOnce(String) -> String) -> Self {
        Self::with_stranger(kind, kind, settings_a, change_a)
    }

    /// The same with another daemon for C.
    pub fn with_stranger(
        kind: Kind,
        of_c_kind: Kind,
        settings_a: &str,
        change_a: impl FnOnce(String) -> String,
    ) -> Self {
        let (host_a, host_b) = hosts();
        let host_c = Host::new();
        link(&host_a, "198.51.100.1/24", &host_c, "198.51.100.3/24");
        link(&host_b, "203.0.113.2/24", &host_c, "203.0.113.3/24");
        host_c.add_inner("10.2.0.1/24");
        let authority = Authority::new("test CA", &rcgen::PKCS_ECDSA_P256_SHA256);
        let (net_a, net_b) = ("10.1.0.0/24", "10.2.0.0/24");
        let peers_a = [("b", "", "192.0.2.2", net_b), ("c", "198.51.100.1", "198.51.100.3", net_b)];
        let (text, files) = certified(&authority, ("a", "192.0.2.1"), net_a, &peers_a);
        let of_a = (change_a(text), files);
        let peers_b = [("a", "", "192.0.2.1", net_a), ("c", "203.0.113.2", "203.0.113.3", net_a)];
        let of_b = certified(&authority, ("b", "192.0.2.2"), net_b, &peers_b);
        let to_a = [("a", "", "198.51.100.1", net_a)];
        let (as_b, files_c) = certified(&authority, ("c", "198.51.100.3"), "10.2.0.1/32", &to_a);
        let to_b = [("b", "", "203.0.113.2", net_b)];
        let (as_a, _) = certified(&authority, ("c", "203.0.113.3"), "10.1.0.1/32", &to_b);
        let of_c = as_b.trim_end().trim_end_matches('}').to_owned() + as_a.trim_start_matches("connections {\n");
        let b = Daemon::start_with(kind, &host_b, BREAKS, &of_b.0, &of_b.1);
        let c = Daemon::start(of_c_kind, &host_c, &of_c, &files_c);
        let a = Daemon::start_empty(kind, &host_a, settings_a);
        a.write(&of_a.0, &of_a.1);
        a.control(&["--load-all"]);
        Self { a, b, c, host_a, host_b, host_c, of_a, of_b }
    }

    /// Captures on all their wires.
    pub fn wires(&self) -> Wires {
        Wires::of(&[&self.host_a, &self.host_b, &self.host_c])
    }

    /// Gives A a way to B's network that no tunnel is on, which it would take if nothing kept it back.
    pub fn open_a_way_in_clear(&self) {
        self.host_a.ip(&["route", "add", "10.2.0.0/24", "via", "192.0.2.2"]);
        self.host_b.ip(&["route", "add", "10.1.0.0/24", "via", "192.0.2.1"]);
    }
}

/// One end of a world of certificates: connections to some peers, each for the same networks. A peer is its name, our
/// address (or that of `own`), its address and its network.
pub fn certified(
    authority: &Authority,
    own: (&str, &str),
    local_ts: &str,
    peers: &[(&str, &str, &str, &str)],
) -> (String, Files) {
    let (id, address) = own;
    let mut text = "connections {\n".to_owned();
    for (peer, local, remote, remote_ts) in peers {
        let local = if local.is_empty() { address } else { local };
        text += &format!(
            "to-{peer} {{\nlocal_addrs = {local}\nremote_addrs = {remote}\nversion = 2\nlocal {{\nauth = pubkey\n\
             id = {id}.example\ncerts = cert.pem\n}}\nremote {{\nauth = pubkey\nid = {peer}.example\n}}\nchildren {{\n\
             net-{peer} {{\nlocal_ts = {local_ts}\nremote_ts = {remote_ts}\nesp_proposals = aes128gcm16\n}}\n}}\n}}\n"
        );
    }
    let credential = authority.issue(&format!("{id}.example"), &rcgen::PKCS_ECDSA_P256_SHA256);
    let files = vec![
        ("x509/cert.pem".to_owned(), credential.certificate),
        ("x509ca/ca.pem".to_owned(), authority.certificate()),
        ("private/key.pem".to_owned(), credential.key),
    ];
    (text + "}\n", files)
}
