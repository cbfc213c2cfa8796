//! Beginnings and ends of daemons, and others that use the same kernel.

use std::time::Duration;

use latchkey_tests::actions;
use latchkey_tests::capture::Capture;
use latchkey_tests::daemon::Daemon;
use latchkey_tests::daemon::Kind::{LatchkeyKernel, StrongswanKernel};
use latchkey_tests::host::{Host, link, wait_for};
use latchkey_tests::scene::{INNER_A, INNER_B, Scene, Suite, configurations};
use latchkey_tests::uml::in_guest;

use crate::{ROLES, is_clean, start, states, works};

/// Latchkey and strongSwan on one host, each with a peer of its own.
struct Neighbours {
    ours: Daemon,
    theirs: Daemon,
    _peers: [Daemon; 2],
    host: Host,
    _others: [Host; 2],
    configuration: String,
}

const BEHIND_OURS: &str = "10.2.0.1";
const BEHIND_THEIRS: &str = "10.3.0.1";

impl Neighbours {
    fn start() -> Self {
        let (host, one, other) = (Host::new(), Host::new(), Host::new());
        link(&host, "192.0.2.1/24", &one, "192.0.2.2/24");
        link(&host, "203.0.113.1/24", &other, "203.0.113.2/24");
        host.add_inner("10.1.0.1/24");
        host.ip(&["route", "add", "10.2.0.0/24", "via", "192.0.2.2"]);
        one.add_inner("10.2.0.1/24");
        other.add_inner("10.3.0.1/24");
        let [(of_ours, _), (of_one, _)] = configurations(&Suite::default());
        let elsewhere = |text: &str| text.replace("192.0.2.", "203.0.113.").replace("10.2.0.", "10.3.0.");
        // strongSwan leaves the usual ports to us.
        let of_theirs = elsewhere(&of_ours).replace("version = 2\n", "version = 2\nmobike = no\n");
        let of_other = elsewhere(&of_one).replace("version = 2\n", "version = 2\nmobike = no\n");
        let peers = [
            Daemon::start(StrongswanKernel, &one, &of_one, &vec![]),
            Daemon::start(StrongswanKernel, &other, &of_other, &vec![]),
        ];
        let theirs = Daemon::start_empty(StrongswanKernel, &host, "port = 1500\nport_nat_t = 14500\n");
        theirs.write(&of_theirs, &vec![]);
        theirs.control(&["--load-all"]);
        let ours = Daemon::start(LatchkeyKernel, &host, &of_ours, &vec![]);
        let neighbours =
            Self { ours, theirs, _peers: peers, host, _others: [one, other], configuration: of_ours.clone() };
        neighbours.theirs.initiate("net");
        neighbours.ours.initiate("net");
        neighbours.passes(BEHIND_OURS);
        neighbours.passes(BEHIND_THEIRS);
        assert_eq!(states(&neighbours.host), 4);
        neighbours
    }

    fn passes(&self, to: &str) {
        assert!(self.host.pings(INNER_A, to), "{to}\n{}{}", self.ours.output(), self.theirs.output());
    }
}

#[test]
fn two_daemons_side_by_side() {
    in_guest(|| {
        let mut neighbours = Neighbours::start();
        // Each rekeys beside the other.
        for daemon in [&neighbours.ours, &neighbours.theirs] {
            let before = daemon.child_spis("INSTALLED");
            daemon.control(&["--rekey", "--child", "net"]);
            wait_for("a new SPI", Duration::from_secs(20), || {
                let now = daemon.child_spis("INSTALLED");
                now.len() == 1 && now != before
            });
            neighbours.passes(BEHIND_OURS);
            neighbours.passes(BEHIND_THEIRS);
        }
        // We go, and take nothing of theirs along.
        assert!(neighbours.ours.stop());
        neighbours.passes(BEHIND_THEIRS);
        assert!(neighbours.host.check("ip", &["xfrm", "policy"]).contains("10.3.0.0/24"));
        assert!(!neighbours.host.check("ip", &["xfrm", "policy"]).contains("10.2.0.0/24"));
        assert!(neighbours.theirs.stop());
        is_clean(&neighbours.host);
    });
}

#[test]
fn a_successor_removes_what_a_killed_daemon_left() {
    in_guest(|| {
        let mut neighbours = Neighbours::start();
        neighbours.ours.signal("KILL");
        wait_for("its end", Duration::from_secs(20), || !neighbours.ours.is_running());
        // What a killed daemon leaves keeps the traffic in.
        assert_eq!(states(&neighbours.host), 4);
        let again = Daemon::start(LatchkeyKernel, &neighbours.host, &neighbours.configuration, &vec![]);
        assert_eq!(states(&neighbours.host), 2, "{}", again.output());
        assert!(!neighbours.host.check("ip", &["xfrm", "policy"]).contains("10.2.0.0/24"));
        neighbours.passes(BEHIND_THEIRS);
        again.initiate("net");
        neighbours.passes(BEHIND_OURS);
        neighbours.passes(BEHIND_THEIRS);
    });
}

#[test]
fn a_stopped_daemon_leaves_nothing() {
    in_guest(|| {
        for child in ["", "start_action = trap\n"] {
            let suite = Suite { child, ..Suite::default() };
            let mut scene = start(LatchkeyKernel, StrongswanKernel, &suite);
            scene.a.initiate("net");
            scene.passes();
            assert!(scene.a.stop(), "{}", scene.a.output());
            is_clean(&scene.host_a);
            wait_for("the peer's SA is gone", Duration::from_secs(20), || scene.b.established() == 0);
        }
    });
}

// Somebody empties the kernel's databases: policies come back, and lost states, whose keys nobody has, are replaced.
#[test]
fn what_others_flush_is_put_right() {
    in_guest(|| {
        for (initiator, responder) in ROLES {
            let scene = works(initiator, responder, &Suite::default());
            let (ours, host) = match initiator {
                LatchkeyKernel => (&scene.a, &scene.host_a),
                _ => (&scene.b, &scene.host_b),
            };
            host.ip(&["xfrm", "policy", "flush"]);
            wait_for("the policies", Duration::from_secs(20), || {
                host.check("ip", &["xfrm", "policy"]).matches("reqid").count() == 3
            });
            scene.passes();
            let spis = ours.child_spis("INSTALLED");
            let device = host.check("ip", &["-o", "link", "show", "type", "veth"]);
            let device = device.split_whitespace().nth(1).unwrap().split('@').next().unwrap().to_owned();
            let mut capture = Capture::start(host, &device);
            host.ip(&["xfrm", "state", "flush"]);
            wait_for("traffic", Duration::from_secs(40), || scene.host_a.pings(INNER_A, INNER_B));
            capture.nothing_in_clear();
            assert_ne!(ours.child_spis("INSTALLED"), spis);
            assert_eq!(states(host), 2, "{}", host.check("ip", &["xfrm", "state"]));
        }
    });
}

#[test]
fn routes_give_the_source_address_and_go_with_the_sa() {
    in_guest(|| {
        let scene = Scene::works(LatchkeyKernel, StrongswanKernel, &Suite::default());
        let table = |host: &Host| {
            let routes = host.run("ip", &["route", "show", "table", "220"]);
            String::from_utf8(routes.stdout).unwrap()
        };
        // As strongSwan has it on the other side.
        assert!(
            table(&scene.host_b).contains("10.1.0.0/24 via 192.0.2.1 ")
                && table(&scene.host_b).contains("src 10.2.0.1")
        );
        assert!(table(&scene.host_a).contains("10.2.0.0/24"), "{}", table(&scene.host_a));
        assert!(table(&scene.host_a).contains("src 10.1.0.1"), "{}", table(&scene.host_a));
        assert!(
            scene.host_a.run("ping", &["-c", "1", "-W", "2", INNER_B]).status.success(),
            "{}",
            table(&scene.host_a)
        );
        assert!(scene.a.sas().contains("plane=kernel"), "{}", scene.a.sas());
        scene.a.control(&["--terminate", "--ike", "site"]);
        assert_eq!(table(&scene.host_a), "");
    });
}

// RFC 9329: the kernel of these tests takes no ESP from streams; the same daemon does it in user space.
#[test]
fn streams_are_served_in_user_space() {
    in_guest(|| {
        let suite = Suite { connection: "tcp = yes\n", ..Suite::default() };
        let scene = Scene::works(LatchkeyKernel, LatchkeyKernel, &suite);
        assert_eq!(states(&scene.host_a), 0);
        for daemon in [&scene.a, &scene.b] {
            assert!(daemon.sas().contains("plane=user-space"), "{}", daemon.sas());
        }
        scene.host_a.transfers_whole(INNER_A, &scene.host_b, INNER_B, 1 << 20);
    });
}

#[test]
fn what_the_peer_closes_comes_back_as_configured() {
    in_guest(|| actions::close_actions(LatchkeyKernel, StrongswanKernel));
}

#[test]
fn a_lost_peer_is_handled_as_configured() {
    in_guest(|| actions::dpd_actions(LatchkeyKernel, StrongswanKernel));
}
