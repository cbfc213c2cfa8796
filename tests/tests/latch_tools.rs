//! Latches as the tools and a configuration's changes see them, between real daemons: `latchkey nc` on both ends, reloads,
//! dead peers, an impostor with a certificate of the same authority.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use latchkey_tests::daemon::Kind::Latchkey;
use latchkey_tests::daemon::{Daemon, program};
use latchkey_tests::host::{Host, wait_for};
use latchkey_tests::scene::{A, B, INNER_B, Scene, Suite, configurations, hosts};
use latchkey_tests::witness::Three;

const PATIENCE: Duration = Duration::from_secs(30);

/// `latchkey nc`; what it says goes to files.
struct Netcat {
    process: Child,
    output: PathBuf,
    errors: PathBuf,
}

impl Netcat {
    fn start(daemon: &Daemon, host: &Host, name: &str, args: &[&str]) -> Self {
        let (output, errors) = (daemon.path(&format!("{name}.out")), daemon.path(&format!("{name}.err")));
        let socket = daemon.latch_socket();
        let mut all = vec!["nc", "--socket", socket.to_str().unwrap()];
        all.extend_from_slice(args);
        let process = host
            .command(program("latchkey").to_str().unwrap(), &all)
            .stdin(Stdio::piped())
            .stdout(fs::File::create(&output).unwrap())
            .stderr(fs::File::create(&errors).unwrap())
            .spawn()
            .unwrap();
        Self { process, output, errors }
    }

    fn types(&mut self, text: &str) {
        let input = self.process.stdin.as_mut().unwrap();
        // One that has ended takes nothing more.
        let _ = input.write_all(text.as_bytes()).and_then(|()| input.flush());
    }

    fn prints(&self, what: &str) {
        self.waits(&self.output, what);
    }

    fn tells(&self, what: &str) {
        self.waits(&self.errors, what);
    }

    fn waits(&self, path: &Path, what: &str) {
        let read = |path: &Path| fs::read_to_string(path).unwrap();
        let started = std::time::Instant::now();
        while !read(path).contains(what) {
            let said = format!("{}{}", read(&self.output), read(&self.errors));
            assert!(started.elapsed() < PATIENCE, "nc does not say {what:?} but: {said}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn ends(&mut self) {
        let process = &mut self.process;
        wait_for("the end of nc", PATIENCE, || process.try_wait().unwrap().is_some());
    }
}

impl Drop for Netcat {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Both say a line, and hear the other's.
fn talk(one: &mut Netcat, other: &mut Netcat, word: &str) {
    one.types(&format!("{word} from here\n"));
    other.prints(&format!("{word} from here\n"));
    other.types(&format!("{word} from there\n"));
    one.prints(&format!("{word} from there\n"));
}

fn latchkey(daemon: &Daemon, host: &Host, args: &[&str]) -> String {
    let socket = daemon.latch_socket();
    let mut all = args.to_vec();
    all.extend_from_slice(&["--socket", socket.to_str().unwrap()]);
    host.check(program("latchkey").to_str().unwrap(), &all)
}

// RFC 5660 §2.3.2, its hosts A, B and C: A connects to a service of B, both ends latched; C, whom both admit and whose
// certificate is of the same authority, first claims B's address to A, then A's address to B.
#[test]
fn the_example_of_rfc_5660_with_hosts_a_b_and_c() {
    let three = Three::start(Latchkey, |text| text);
    let Three { a, b, c, host_a, host_b, .. } = &three;
    let wires = three.wires();

    let mut server = Netcat::start(b, host_b, "nc", &["-l", "--peer", "a.example", "10.2.0.1", "4000"]);
    server.tells("listening on 10.2.0.1:4000 for a.example");
    assert!(latchkey(b, host_b, &["latches"]).contains("listener     tcp  10.2.0.1:4000 - *  a.example"));
    // There is no SA yet: the latch has one made.
    let connect = ["--peer", "b.example", "-s", "10.1.0.1", "10.2.0.1", "4000"];
    let mut client = Netcat::start(a, host_a, "nc", &connect);
    client.tells("b.example by certificate, to us as a.example; tunnel mode, ENCR_AES_GCM_16 128 bits");
    server.tells("a.example by certificate, to us as b.example");
    talk(&mut client, &mut server, "first");
    // RFC 5056: both ends of the channel have the same to bind to.
    let binding = |nc: &Netcat| {
        let said = fs::read_to_string(&nc.errors).unwrap();
        said.lines()
            .find_map(|line| Some(line.strip_prefix("channel binding ipsec-ikev2-unique: 01")?.to_owned()))
            .unwrap()
    };
    assert_eq!((binding(&client), binding(&client).len()), (binding(&server), 64));
    // And the keys by which both proved themselves: those of their certificates, whoever called.
    let endpoints = |nc: &Netcat| {
        let said = fs::read_to_string(&nc.errors).unwrap();
        said.lines()
            .find_map(|line| Some(line.strip_prefix("channel binding ipsec-ikev2-endpoint: ")?.to_owned()))
            .unwrap()
    };
    assert_eq!(endpoints(&client), endpoints(&server));
    let mut keys = [a, b].map(|daemon| {
        let pem = fs::read(daemon.path("swanctl/x509/cert.pem")).unwrap();
        let der = latchkey::config::certificate::certificate_der(&pem).unwrap();
        pad::Certificate::parse(&der).unwrap().public_key_info_sha256()
    });
    keys.sort_unstable();
    let hex: String = keys.as_flattened().iter().map(|octet| format!("{octet:02x}")).collect();
    assert_eq!(endpoints(&client), format!("0102{hex}"));

    c.initiate("net-a");
    client.tells("the latch is broken: an SA of c.example claims");
    client.ends();
    // B has not been attacked yet: it waits for the peer, and its latch stands.
    assert!(latchkey(b, host_b, &["latches"]).contains("established  tcp  10.2.0.1:4000 - 10.1.0.1:"));
    c.initiate("net-b");
    server.tells("the latch is broken: an SA of c.example claims");
    server.ends();
    // The witness is C's own tunnels: nothing of the latched connection came out of them.
    let sas = c.sas();
    assert_eq!(sas.matches("packets-in=0 ").count(), 2, "{sas}");
    wires.saw_nothing_of("port 4000", "from here");
    wires.saw("esp or udp port 4500");
    drop((client, server));
}

// RFC 5660 §2.1, §2.3, §6.2: a narrow SA for one connection, what the tools say of it, and the administrator's close.
#[test]
fn the_tools_make_show_and_close_a_latch_with_a_narrow_sa() {
    let scene = Scene::start(Latchkey, Latchkey, &Suite::default());
    let (a, host_a) = (&scene.a, &scene.host_a);
    let mut server = Netcat::start(&scene.b, &scene.host_b, "nc", &["-l", "10.2.0.1", "4000"]);
    server.tells("listening");
    let refused = Netcat::start(a, host_a, "refused", &["--peer", "c.example", "-s", "10.1.0.1", "10.2.0.1", "4000"]);
    refused.tells("wrong-peer");
    let refused = Netcat::start(a, host_a, "weak", &["--suite", "aes256gcm16", "-s", "10.1.0.1", "10.2.0.1", "4000"]);
    refused.tells("wrong-protection");
    let connect =
        ["--narrow", "--peer", "b.example", "--suite", "aes128gcm16", "-s", "10.1.0.1:40000", "10.2.0.1", "4000"];
    let mut client = Netcat::start(a, host_a, "nc", &connect);
    client.tells("b.example by shared key");
    talk(&mut client, &mut server, "narrow");
    let sas = a.control(&["--list-sas"]);
    assert!(sas.contains("10.1.0.1/32[tcp/40000]") && sas.contains("10.2.0.1/32[tcp/4000]"), "{sas}");

    let listed = latchkey(a, host_a, &["latches"]);
    let number = listed.split_whitespace().next().unwrap().to_owned();
    assert!(listed.contains("established  tcp  10.1.0.1:40000 - 10.2.0.1:4000  b.example"), "{listed}");
    let json = latchkey(a, host_a, &["latches", "--json"]);
    assert!(json.contains("\"remote\":\"10.2.0.1:4000\""), "{json}");
    for shown in [
        latchkey(a, host_a, &["latch", "show", &number]),
        latchkey(a, host_a, &["whois", "10.1.0.1:40000", "10.2.0.1:4000"]),
    ] {
        assert!(shown.contains(&format!("latch: {number} established")), "{shown}");
    }
    latchkey(a, host_a, &["latch", "close", &number]);
    client.tells("the latch is closed: closed by the administrator");
    client.ends();
}

// RFC 7619, RFC 5386 §2: two hosts that prove nothing to each other, and a connection that is pinned to one IKE SA.
#[test]
fn nobody_in_particular_is_latched_only_where_that_is_asked_for() {
    let [(of_a, files_a), (of_b, files_b)] = configurations(&Suite::default());
    let nameless = |text: String| {
        let text = text.replace("auth = psk\nid = a.example\n", "auth = null\n");
        text.replace("auth = psk\nid = b.example\n", "auth = null\n")
    };
    let (host_a, host_b) = hosts();
    let b = Daemon::start(Latchkey, &host_b, &nameless(of_b), &files_b);
    let a = Daemon::start(Latchkey, &host_a, &nameless(of_a), &files_a);
    let scene = Scene { a, b, host_a, host_b };
    scene.a.initiate("net");
    scene.passes();
    let Scene { a, b, host_a, host_b } = &scene;
    let whois = latchkey(a, host_a, &["whois", "10.1.0.1:40000", "10.2.0.1:4000"]);
    assert!(whois.contains("NOBODY IN PARTICULAR (unauthenticated), to us as %null"), "{whois}");
    let mut server = Netcat::start(b, host_b, "nc", &["-l", "--peer", "%null", "10.2.0.1", "4000"]);
    server.tells("listening");
    for (n, peer) in ["b.example", "%any"].iter().enumerate() {
        let refused = ["--peer", peer, "-s", "10.1.0.1", "10.2.0.1", "4000"];
        Netcat::start(a, host_a, &format!("refused{n}"), &refused).tells("wrong-peer");
    }
    let connect = ["--peer", "%null", "-s", "10.1.0.1:40000", "10.2.0.1", "4000"];
    let mut client = Netcat::start(a, host_a, "nc", &connect);
    client.tells("NOBODY IN PARTICULAR");
    talk(&mut client, &mut server, "first");
    a.control(&["--rekey", "--ike", "site"]);
    wait_for("the successor", PATIENCE, || a.sas().contains("state=ESTABLISHED") && !a.sas().contains("state=REKEY"));
    talk(&mut client, &mut server, "second");
    // Another IKE SA is another peer, who gets all but the connection.
    a.control(&["--terminate", "--ike", "site"]);
    a.initiate("net");
    let sas = a.control(&["--list-sas"]);
    assert!(sas.contains("10.1.0.1/32[tcp/0-39999]"), "{sas}");
    client.types("is it still you?\n");
    scene.passes();
    assert!(!fs::read_to_string(&server.output).unwrap().contains("still you"));
}

// RFC 7619 §3.3: a peer that has proved who it is comes later, for addresses that no connection names.
#[test]
fn what_nobody_has_ends_when_its_traffic_is_somebody_s() {
    let (host_a, host_b) = hosts();
    let connection = |name: &str, remote: &str, ends: [&str; 2], selectors: &str| {
        let [local_auth, remote_auth] = ends;
        format!(
            "{name} {{\nremote_addrs = {remote}\nlocal {{\n{local_auth}\n}}\nremote {{\n{remote_auth}\n}}\n\
             children {{\n{name} {{\n{selectors}\n}}\n}}\n}}\n"
        )
    };
    let (nobody, of_a, of_b) = ("auth = null", "auth = psk\nid = a.example", "auth = psk\nid = b.example");
    let configuration = |connections: &str| {
        format!("connections {{\n{connections}}}\nsecrets {{\nike-1 {{\nsecret = \"a shared key for tests\"\n}}\n}}\n")
    };
    let open_a = configuration(&connection("open", B, [nobody; 2], "remote_ts = 10.2.0.0/24"));
    let staff_a = configuration(&connection("staff", B, [of_a, of_b], "remote_ts = 10.2.0.0/24"));
    let both = connection("open", "%any", [nobody; 2], "local_ts = 10.2.0.0/24")
        + &connection("staff", "%any", [of_b, of_a], "local_ts = 10.2.0.0/24");
    let b = Daemon::start(Latchkey, &host_b, &configuration(&both), &Vec::new());
    let a = Daemon::start(Latchkey, &host_a, &open_a, &Vec::new());
    let children = |daemon: &Daemon| {
        let sas = daemon.control(&["--list-sas"]);
        ["open", "staff"].map(|name| sas.contains(&format!("  {name}: #")))
    };
    a.initiate("open");
    assert!(host_a.pings(A, INNER_B));
    assert_eq!(children(&b), [true, false]);
    a.write(&staff_a, &Vec::new());
    a.control(&["--load-conns"]);
    a.initiate("staff");
    wait_for("the end of what nobody had", PATIENCE, || children(&b) == [false, true] && children(&a) == [false, true]);
    assert!(host_a.pings(A, INNER_B));
    // And it is not to be had again.
    a.write(&open_a, &Vec::new());
    a.control(&["--load-conns"]);
    assert!(!a.swanctl(&["--initiate", "--child", "open"]).status.success());
    assert_eq!(children(&b), [false, true]);
    assert!(host_a.pings(A, INNER_B));
}

// RFC 5660 §2.3: "changes to the SPD" that conflict; §2.1: an SA with another suite conflicts as well. What would break can
// be asked before.
#[test]
fn a_reload_and_another_suite_break_latches_and_can_be_foreseen() {
    let suite = Suite { esp: "aes128gcm16,aes256gcm16", ..Suite::default() };
    let [(of_a, files_a), (of_b, files_b)] = configurations(&suite);
    let (host_a, host_b) = hosts();
    let b = Daemon::start(Latchkey, &host_b, &of_b, &files_b);
    let a = Daemon::start(Latchkey, &host_a, &of_a, &files_a);
    a.initiate("net");
    let mut server = Netcat::start(&b, &host_b, "nc", &["-l", "10.2.0.1", "4000"]);
    server.tells("listening");
    let connect = ["--on-break", "wait", "--peer", "b.example", "-s", "10.1.0.1", "10.2.0.1", "4000"];
    let mut client = Netcat::start(&a, &host_a, "nc", &connect);
    talk(&mut client, &mut server, "first");

    let foreseen = |daemon: &Daemon, host: &Host| {
        let (folder, socket) = (daemon.path("swanctl"), daemon.latch_socket());
        let args = ["check", "--swanctl-dir", folder.to_str().unwrap(), "--latches", socket.to_str().unwrap()];
        host.check(program("latchkey").to_str().unwrap(), &args)
    };
    assert!(foreseen(&a, &host_a).contains("0 latches would break"));
    a.write(&of_a.replace("10.2.0.0/24", "10.9.0.0/24"), &files_a);
    let said = foreseen(&a, &host_a);
    assert!(said.contains("would break: ") && said.contains("\n1 latches would break"), "{said}");
    client.types("before the reload\n");
    server.prints("before the reload");
    a.control(&["--load-conns"]);
    client.tells("the latch is broken: the policy has changed: no child");
    client.types("while it is broken\n");
    std::thread::sleep(Duration::from_millis(500));
    assert!(!fs::read_to_string(&server.output).unwrap().contains("while it is broken"));
    a.write(&of_a, &files_a);
    a.control(&["--load-conns"]);
    client.tells("the latch is established: nothing conflicts");
    // What was written meanwhile was not lost: TCP sends it again.
    server.prints("while it is broken");

    let second = "net2 {\nlocal_ts = 10.2.0.0/24\nremote_ts = 10.1.0.0/24\nesp_proposals = aes256gcm16\n}\nnet {";
    b.write(&of_b.replace("net {", second), &files_b);
    b.control(&["--load-conns"]);
    b.initiate("net2");
    client.tells("claims 10.1.0.1 port");
    client.tells("other ESP suite");
    server.ends();
    drop((client, server, a, b));
}

// RFC 5660 §2, §2.2: a peer that liveness checks find dead breaks its latches.
#[test]
fn a_dead_peer_breaks_the_latch() {
    let suite = Suite { connection: "dpd_delay = 1s\n", ..Suite::default() };
    let (host_a, host_b) = hosts();
    let [(of_a, files_a), (of_b, files_b)] = configurations(&suite);
    let b = Daemon::start(Latchkey, &host_b, &of_b, &files_b);
    let a = Daemon::start_empty(Latchkey, &host_a, "retransmit_tries = 1\nretransmit_timeout = 0.5\n");
    a.write(&of_a, &files_a);
    a.control(&["--load-all"]);
    let mut server = Netcat::start(&b, &host_b, "nc", &["-l", "10.2.0.1", "4000"]);
    server.tells("listening");
    let connect = ["--peer", "b.example", "-s", "10.1.0.1", "10.2.0.1", "4000"];
    let mut client = Netcat::start(&a, &host_a, "nc", &connect);
    talk(&mut client, &mut server, "first");
    b.signal("KILL");
    // Fail closed on the side of the dead daemon, too: its holder is told.
    server.ends();
    client.tells("the latch is broken: b.example is dead");
    client.ends();
}
