//! MOBIKE (RFC 4555) on real systems: addresses go and come, links break, NATs change their minds, and the tunnel with
//! what runs in it goes on.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use latchkey_tests::daemon::Daemon;
use latchkey_tests::daemon::Kind::{self, Latchkey, Strongswan};
use latchkey_tests::host::{Host, Process, link, wait_for};
use latchkey_tests::scene::{INNER_A, INNER_B, Suite, configurations};

/// How long a move may take until a running connection goes on: the protocol needs tenths of a second, TCP's own
/// repetition after the gap the rest, and a loaded machine its time.
const SOON: Duration = Duration::from_secs(20);

/// Talks over one TCP connection and compares what the echo server gives back. A line for each 20 rounds.
const TALKER: &str = r#"
import os, socket, sys, time
out = open(sys.argv[1], "a", buffering=1)
connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
connection.bind(("10.1.0.1", 0))
connection.settimeout(120)
connection.connect(("10.2.0.1", 7))
rounds = 0
while True:
    data = os.urandom(3000)
    connection.sendall(data)
    echo = b""
    while len(echo) < len(data):
        part = connection.recv(len(data) - len(echo))
        if not part:
            print("closed", file=out)
            sys.exit()
        echo += part
    if echo != data:
        print("differs", file=out)
        sys.exit()
    rounds += 1
    if rounds % 20 == 0:
        print("talking", rounds, file=out)
    time.sleep(0.005)
"#;

/// A TCP connection through the tunnel that never stops.
struct Talk {
    report: PathBuf,
    _talker: Process,
    _server: Process,
}

impl Talk {
    fn start(scene: &Multihomed) -> Self {
        let server = scene.host_b.spawn("socat", &["TCP4-LISTEN:7,bind=10.2.0.1,reuseaddr,fork", "EXEC:cat"]);
        scene.host_b.wait_for_listener(7);
        let script = scene.a.path("talker.py");
        fs::write(&script, TALKER).unwrap();
        let report = scene.a.path("report");
        fs::write(&report, "").unwrap();
        let talker = scene.host_a.spawn("python3", &[script.to_str().unwrap(), report.to_str().unwrap()]);
        let talk = Self { report, _talker: talker, _server: server };
        talk.goes_on(scene);
        talk
    }

    fn goes_on(&self, scene: &Multihomed) {
        let report = || fs::read_to_string(&self.report).unwrap();
        let before = report().matches("talking").count();
        let start = Instant::now();
        while report().matches("talking").count() < before + 2 {
            let text = report();
            assert!(
                start.elapsed() < SOON && !text.contains("closed") && !text.contains("differs"),
                "the connection does not go on: {text}\n{}{}",
                scene.a.output(),
                scene.b.output()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Two hosts, each with an address on each of two links.
struct Multihomed {
    a: Daemon,
    b: Daemon,
    host_a: Host,
    host_b: Host,
    /// A's and B's devices on the first link.
    first: (String, String),
}

const FIRST: &str = "192.0.2.1";
const SECOND: &str = "198.51.100.1";

impl Multihomed {
    fn start(initiator: Kind, responder: Kind, suite: &Suite) -> Self {
        Self::with(initiator, responder, suite, ["198.51.100.1/24", "198.51.100.2/24"])
    }

    fn with(initiator: Kind, responder: Kind, suite: &Suite, second: [&str; 2]) -> Self {
        let (host_a, host_b) = (Host::new(), Host::new());
        let first = link(&host_a, "192.0.2.1/24", &host_b, "192.0.2.2/24");
        link(&host_a, second[0], &host_b, second[1]);
        host_a.wait_for_links();
        host_b.wait_for_links();
        host_a.add_inner("10.1.0.1/24");
        host_b.add_inner("10.2.0.1/24");
        let [(of_a, files_a), (of_b, files_b)] = configurations(suite);
        // A roaming client and a gateway do not know their addresses beforehand.
        let of_a = of_a.replace("local_addrs = 192.0.2.1\n", "");
        let of_b = of_b.replace("local_addrs = 192.0.2.2\n", "").replace("remote_addrs = 192.0.2.1\n", "");
        let b = Daemon::start(responder, &host_b, &of_b, &files_b);
        let a = Daemon::start(initiator, &host_a, &of_a, &files_a);
        a.initiate("net");
        let scene = Self { a, b, host_a, host_b, first };
        scene.passes();
        scene
    }

    fn passes(&self) {
        assert!(self.host_a.pings(INNER_A, INNER_B), "{}{}", self.a.output(), self.b.output());
        assert!(self.host_b.pings(INNER_B, INNER_A), "{}{}", self.a.output(), self.b.output());
    }

    fn moves_to(&self, local: &str) {
        for (daemon, what) in [(&self.a, format!("local-host={local} ")), (&self.b, format!("remote-host={local} "))] {
            let start = Instant::now();
            while !daemon.sas().contains(&what) {
                assert!(start.elapsed() < SOON, "{what}\n{}{}", self.a.output(), self.b.output());
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    }

    fn spis(&self) -> (Vec<String>, Vec<String>) {
        (self.a.child_spis("INSTALLED"), self.b.child_spis("INSTALLED"))
    }
}

fn packets_out(daemon: &Daemon) -> u64 {
    let sas = daemon.sas();
    sas.split("packets-out=").nth(1).and_then(|rest| rest.split(' ').next()?.parse().ok()).unwrap_or(0)
}

// RFC 4555 §3.5: whatever takes the address away, the same SAs go on from the other one, with their counters.
#[test]
fn a_connection_survives_the_loss_of_an_address_or_a_link() {
    let scene = Multihomed::start(Latchkey, Latchkey, &Suite::default());
    let talk = Talk::start(&scene);
    let spis = scene.spis();
    let ((of_a, of_b), packets) = (&scene.first, packets_out(&scene.a));
    let lose: [&dyn Fn(); 3] = [
        &|| scene.host_a.ip(&["addr", "del", "192.0.2.1/24", "dev", of_a]),
        &|| scene.host_a.ip(&["link", "set", of_a, "down"]),
        // The other end goes down: no carrier.
        &|| scene.host_b.ip(&["link", "set", of_b, "down"]),
    ];
    let regain: [&dyn Fn(); 3] = [
        &|| scene.host_a.ip(&["addr", "add", "192.0.2.1/24", "dev", of_a]),
        &|| scene.host_a.ip(&["link", "set", of_a, "up"]),
        &|| scene.host_b.ip(&["link", "set", of_b, "up"]),
    ];
    let second = scene.host_a.check("ip", &["-o", "addr", "show", "to", "198.51.100.1"]);
    let second = second.split_whitespace().nth(1).unwrap().to_owned();
    for (lose, regain) in lose.iter().zip(regain) {
        lose();
        scene.moves_to(SECOND);
        talk.goes_on(&scene);
        // And back, by the loss of the other.
        regain();
        wait_for("the route is back", SOON, || {
            !scene.host_a.check("ip", &["route", "show", "192.0.2.0/24"]).contains("linkdown")
                && scene.host_a.check("ip", &["route"]).contains("192.0.2.0/24")
        });
        scene.host_a.wait_for_links();
        scene.host_b.wait_for_links();
        scene.host_a.ip(&["addr", "del", "198.51.100.1/24", "dev", &second]);
        scene.moves_to(FIRST);
        talk.goes_on(&scene);
        scene.host_a.ip(&["addr", "add", "198.51.100.1/24", "dev", &second]);
    }
    scene.passes();
    assert_eq!(scene.spis(), spis, "the SAs are the same");
    assert!(packets_out(&scene.a) > packets + 100, "their counters went on");
}

// RFC 4555 §2.2: the one address becomes another.
#[test]
fn a_connection_survives_another_address_on_the_same_link() {
    let scene = Multihomed::start(Latchkey, Latchkey, &Suite { connection: "encap = yes\n", ..Suite::default() });
    let talk = Talk::start(&scene);
    let spis = scene.spis();
    let device = &scene.first.0;
    for (old, new) in [("192.0.2.1", "192.0.2.77"), ("192.0.2.77", "192.0.2.78")] {
        scene.host_a.ip(&["addr", "add", &format!("{new}/24"), "dev", device]);
        scene.host_a.ip(&["addr", "del", &format!("{old}/24"), "dev", device]);
        // Some systems remove what they call secondary addresses together with the primary one.
        scene.host_a.ip(&["addr", "replace", &format!("{new}/24"), "dev", device]);
        scene.moves_to(new);
        talk.goes_on(&scene);
    }
    assert_eq!(scene.spis(), spis);
}

#[test]
fn a_connection_survives_a_move_from_ipv4_to_ipv6() {
    let six = ["2001:db8::1/64", "2001:db8::2/64"];
    let scene = Multihomed::with(Latchkey, Latchkey, &Suite::default(), six);
    let talk = Talk::start(&scene);
    scene.host_a.ip(&["addr", "del", "192.0.2.1/24", "dev", &scene.first.0]);
    scene.moves_to("2001:db8::1");
    talk.goes_on(&scene);
    scene.passes();
}

// RFC 4555 §3.6: the gateway's address goes, and it says so from its other one.
#[test]
fn a_connection_survives_the_loss_of_the_responders_address() {
    let scene = Multihomed::start(Latchkey, Latchkey, &Suite::default());
    let talk = Talk::start(&scene);
    scene.host_b.ip(&["addr", "del", "192.0.2.2/24", "dev", &scene.first.1]);
    wait_for("the initiator follows", SOON, || scene.a.sas().contains("remote-host=198.51.100.2 "));
    talk.goes_on(&scene);
    scene.passes();
}

// RFC 4555 §3.10: nothing that this host can see has happened, but nothing arrives: liveness checks find it out.
#[test]
fn a_silent_path_is_left_for_one_that_works() {
    let suite = Suite { connection: "dpd_delay = 1s\n", ..Suite::default() };
    let (host_a, host_b) = (Host::new(), Host::new());
    let first = link(&host_a, "192.0.2.1/24", &host_b, "192.0.2.2/24");
    link(&host_a, "198.51.100.1/24", &host_b, "198.51.100.2/24");
    host_a.wait_for_links();
    host_b.wait_for_links();
    host_a.add_inner("10.1.0.1/24");
    host_b.add_inner("10.2.0.1/24");
    let [(of_a, files_a), (of_b, files_b)] = configurations(&suite);
    let b = Daemon::start(Latchkey, &host_b, &of_b.replace("remote_addrs = 192.0.2.1\n", ""), &files_b);
    let a = Daemon::start_empty(Latchkey, &host_a, "retransmit_timeout = 0.5\n");
    a.write(&of_a, &files_a);
    a.control(&["--load-all"]);
    a.initiate("net");
    assert!(host_a.pings(INNER_A, INNER_B));
    host_b.nft(&format!(
        "table inet silent {{\nchain i {{\ntype filter hook input priority 0;\niifname \"{}\" drop;\n}}\n}}\n",
        first.1
    ));
    wait_for("another path", Duration::from_secs(30), || b.sas().contains("remote-host=198.51.100.1 "));
    wait_for("traffic on it", SOON, || host_a.pings(INNER_A, INNER_B));
}

// Over a stream the TCP Originator opens another one from its new address (RFC 9329 §7.1).
#[test]
fn a_stream_survives_the_loss_of_an_address() {
    let scene = Multihomed::start(Latchkey, Latchkey, &Suite { connection: "tcp = yes\n", ..Suite::default() });
    let talk = Talk::start(&scene);
    let spis = scene.spis();
    scene.host_a.ip(&["addr", "add", "192.0.2.77/24", "dev", &scene.first.0]);
    scene.host_a.ip(&["addr", "del", "192.0.2.1/24", "dev", &scene.first.0]);
    scene.host_a.ip(&["addr", "replace", "192.0.2.77/24", "dev", &scene.first.0]);
    scene.moves_to("192.0.2.77");
    talk.goes_on(&scene);
    assert_eq!(scene.spis(), spis);
}

// Without MOBIKE the initiator makes the tunnel again.
#[test]
fn without_mobike_the_tunnel_is_made_again() {
    let scene = Multihomed::start(Latchkey, Latchkey, &Suite { connection: "mobike = no\n", ..Suite::default() });
    let spis = scene.spis();
    scene.host_a.ip(&["addr", "add", "192.0.2.77/24", "dev", &scene.first.0]);
    scene.host_a.ip(&["addr", "del", "192.0.2.1/24", "dev", &scene.first.0]);
    scene.host_a.ip(&["addr", "replace", "192.0.2.77/24", "dev", &scene.first.0]);
    scene.moves_to("192.0.2.77");
    wait_for("traffic", SOON, || scene.host_a.pings(INNER_A, INNER_B));
    assert_ne!(scene.spis(), spis);
}

struct Natted {
    a: Daemon,
    b: Daemon,
    host_a: Host,
    host_b: Host,
    router: Host,
    outside: String,
}

fn behind_nat(connection: &'static str) -> Natted {
    let (host_a, router, host_b) = (Host::new(), Host::new(), Host::new());
    link(&host_a, "198.51.100.1/24", &router, "198.51.100.254/24");
    let (outside, _) = link(&router, "192.0.2.254/24", &host_b, "192.0.2.2/24");
    host_a.ip(&["route", "add", "default", "via", "198.51.100.254"]);
    router.masquerade(&outside);
    host_a.add_inner("10.1.0.1/24");
    host_b.add_inner("10.2.0.1/24");
    let [(of_a, files_a), (of_b, files_b)] = configurations(&Suite { connection, ..Suite::default() });
    let of_a = of_a.replace("local_addrs = 192.0.2.1\n", "");
    let of_b = of_b.replace("remote_addrs = 192.0.2.1\n", "").replace(connection, "");
    let b = Daemon::start(Latchkey, &host_b, &of_b, &files_b);
    let a = Daemon::start(Latchkey, &host_a, &of_a, &files_a);
    a.initiate("net");
    assert!(host_a.pings(INNER_A, INNER_B), "{}{}", a.output(), b.output());
    Natted { a, b, host_a, host_b, router, outside }
}

impl Natted {
    /// The router gets another address, and with it all mappings are others.
    fn change_mapping(&self) {
        self.router.ip(&["addr", "add", "192.0.2.253/24", "dev", &self.outside]);
        self.router.ip(&["addr", "del", "192.0.2.254/24", "dev", &self.outside]);
        self.router.ip(&["addr", "replace", "192.0.2.253/24", "dev", &self.outside]);
    }

    fn is_followed(&self) {
        let start = Instant::now();
        while !self.b.sas().contains("remote-host=192.0.2.253 ") {
            assert!(start.elapsed() < SOON, "{}{}", self.a.output(), self.b.output());
            std::thread::sleep(Duration::from_millis(50));
        }
        wait_for("traffic from inside", SOON, || self.host_a.pings(INNER_A, INNER_B));
        wait_for("traffic from outside", SOON, || self.host_b.pings(INNER_B, INNER_A));
    }
}

// RFC 4555 §3.8: no traffic at all: a liveness check sees the new mapping, an update says it.
#[test]
fn another_nat_mapping_is_noticed_without_traffic() {
    let scene = behind_nat("dpd_delay = 1s\n");
    scene.change_mapping();
    scene.is_followed();
    assert!(scene.b.log().contains("peer moved from 192.0.2.254"), "{}", scene.b.log());
}

// RFC 7296 §2.23, RFC 4555 §3.8: ESP from another mapping is followed at once and checked.
#[test]
fn another_nat_mapping_is_noticed_by_esp() {
    let scene = behind_nat("dpd_delay = 0\n");
    scene.change_mapping();
    scene.host_a.run("ping", &["-c", "3", "-i", "0.2", "-W", "1", "-I", INNER_A, INNER_B]);
    scene.is_followed();
    assert!(scene.b.log().contains("checking return routability"), "{}", scene.b.log());
}

// RFC 4555 with strongSwan as responder.
#[test]
fn strongswan_follows_us() {
    let scene = Multihomed::start(Latchkey, Strongswan, &Suite::default());
    scene.host_a.ip(&["addr", "del", "192.0.2.1/24", "dev", &scene.first.0]);
    scene.moves_to(SECOND);
    scene.passes();
}

#[test]
fn we_follow_strongswan() {
    let scene = Multihomed::start(Strongswan, Latchkey, &Suite::default());
    scene.host_a.ip(&["addr", "del", "192.0.2.1/24", "dev", &scene.first.0]);
    scene.moves_to(SECOND);
    scene.passes();
}
