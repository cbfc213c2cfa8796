//! Ways between the peers: NATs, other addresses, none.

use std::time::Duration;

use latchkey_tests::capture::Capture;
use latchkey_tests::daemon::Daemon;
use latchkey_tests::daemon::Kind::{LatchkeyKernel, StrongswanKernel};
use latchkey_tests::host::{Host, link, wait_for};
use latchkey_tests::scene::{INNER_A, INNER_B, Scene, Suite, configurations};
use latchkey_tests::uml::in_guest;

use crate::{ROLES, states};

/// The initiator behind a router that masquerades.
fn behind_nat(roles: (latchkey_tests::daemon::Kind, latchkey_tests::daemon::Kind), transport: bool) -> (Scene, Host) {
    let (host_a, router, host_b) = (Host::new(), Host::new(), Host::new());
    link(&host_a, "198.51.100.1/24", &router, "198.51.100.254/24");
    let (outside, _) = link(&router, "192.0.2.254/24", &host_b, "192.0.2.2/24");
    host_a.ip(&["route", "add", "default", "via", "198.51.100.254"]);
    router.masquerade(&outside);
    host_b.ip(&["route", "add", "default", "via", "192.0.2.254"]);
    host_a.add_inner("10.1.0.1/24");
    host_b.add_inner("10.2.0.1/24");
    let [of_a, of_b] = configurations(&Suite::default()).map(|(text, _)| {
        let text = text.replace("local_addrs = 192.0.2.1\n", "").replace("remote_addrs = 192.0.2.1\n", "");
        match transport {
            true => text
                .replace("local_ts = 10.1.0.0/24\n", "mode = transport\n")
                .replace("local_ts = 10.2.0.0/24\n", "mode = transport\n")
                .replace("remote_ts = 10.1.0.0/24\n", "")
                .replace("remote_ts = 10.2.0.0/24\n", ""),
            false => text,
        }
    });
    let b = Daemon::start(roles.1, &host_b, &of_b, &vec![]);
    let a = Daemon::start(roles.0, &host_a, &of_a, &vec![]);
    a.initiate("net");
    (Scene { a, b, host_a, host_b }, router)
}

// RFC 3948, RFC 7296 §2.23: tunnel mode, and transport mode with its checksums (§2.23.1).
#[test]
fn through_a_nat() {
    in_guest(|| {
        for roles in ROLES {
            let (scene, _router) = behind_nat(roles, false);
            scene.passes();
            scene.host_a.transfers_whole(INNER_A, &scene.host_b, INNER_B, 1 << 19);
            let (scene, _router) = behind_nat(roles, true);
            let context = || format!("{}{}", scene.a.output(), scene.b.output());
            assert!(scene.host_a.pings("198.51.100.1", "192.0.2.2"), "{}", context());
            // TCP's checksum covers the addresses, which the router has changed.
            scene.host_a.transfers_whole("198.51.100.1", &scene.host_b, "192.0.2.2", 1 << 19);
            for host in [&scene.host_a, &scene.host_b] {
                let dump = host.check("ip", &["xfrm", "state"]);
                assert_eq!(dump.matches("encap type espinudp").count(), 2, "{dump}");
            }
        }
    });
}

// RFC 3948 §5.2: the kernel's policies do not tell two peers behind one NAT apart. The second is refused with a reason, and
// the first keeps what it has; when that is gone, the second has its turn.
#[test]
fn a_second_client_behind_a_nat_is_refused_in_transport_mode() {
    in_guest(|| {
        let (scene, router) = behind_nat((LatchkeyKernel, LatchkeyKernel), true);
        let other = Host::new();
        link(&other, "198.51.101.1/24", &router, "198.51.101.254/24");
        other.ip(&["route", "add", "default", "via", "198.51.101.254"]);
        let configuration = std::fs::read_to_string(scene.a.path("swanctl/swanctl.conf")).unwrap();
        // The server names no peer.
        let server = std::fs::read_to_string(scene.b.path("swanctl/swanctl.conf")).unwrap();
        scene.b.write(&server.replace("id = a.example", "id = *.example"), &vec![]);
        scene.b.control(&["--load-conns"]);
        scene.a.control(&["--terminate", "--ike", "site"]);
        scene.a.initiate("net");
        let client =
            Daemon::start(LatchkeyKernel, &other, &configuration.replace("id = a.example", "id = c.example"), &vec![]);
        let context = || format!("{}{}{}", scene.a.output(), client.output(), scene.b.output());
        assert!(!client.swanctl(&["--initiate", "--child", "net", "--timeout", "30"]).status.success());
        assert!(scene.b.log().contains("second peer behind the NAT 192.0.2.254"), "{}", context());
        assert_eq!(states(&scene.host_b), 2, "{}", context());
        assert!(scene.host_a.pings("198.51.100.1", "192.0.2.2"), "{}", context());
        scene.a.control(&["--terminate", "--ike", "site"]);
        wait_for("the first one's states are gone", Duration::from_secs(20), || states(&scene.host_b) == 0);
        client.initiate("net");
        assert!(other.pings("198.51.101.1", "192.0.2.2"), "{}", context());
    });
}

// RFC 4555 §3.5: the SAs go on with their counters from another address; nothing goes out in clear meanwhile.
#[test]
fn sas_move_with_mobike() {
    in_guest(|| {
        for (initiator, responder) in ROLES {
            let (host_a, host_b) = (Host::new(), Host::new());
            let (first, _) = link(&host_a, "192.0.2.1/24", &host_b, "192.0.2.2/24");
            let (second, _) = link(&host_a, "198.51.100.1/24", &host_b, "198.51.100.2/24");
            host_a.wait_for_links();
            host_b.wait_for_links();
            host_a.add_inner("10.1.0.1/24");
            host_b.add_inner("10.2.0.1/24");
            // In clear, there is a way too.
            host_a.ip(&["route", "add", "10.2.0.0/24", "via", "198.51.100.2"]);
            host_b.ip(&["route", "add", "10.1.0.0/24", "via", "198.51.100.1"]);
            let [of_a, of_b] = configurations(&Suite::default()).map(|(text, _)| {
                text.replace("local_addrs = 192.0.2.1\n", "")
                    .replace("local_addrs = 192.0.2.2\n", "")
                    .replace("remote_addrs = 192.0.2.1\n", "")
            });
            let b = Daemon::start(responder, &host_b, &of_b, &vec![]);
            let a = Daemon::start(initiator, &host_a, &of_a, &vec![]);
            a.initiate("net");
            let scene = Scene { a, b, host_a, host_b };
            scene.passes();
            let mut captures = [Capture::start(&scene.host_a, &first), Capture::start(&scene.host_a, &second)];
            let spis = (scene.a.child_spis("INSTALLED"), scene.b.child_spis("INSTALLED"));
            scene.host_a.ip(&["addr", "del", "192.0.2.1/24", "dev", &first]);
            for (daemon, what) in [(&scene.a, "local-host=198.51.100.1 "), (&scene.b, "remote-host=198.51.100.1 ")] {
                wait_for(what, Duration::from_secs(30), || {
                    scene.host_a.run("ping", &["-c", "1", "-W", "1", "-I", INNER_A, INNER_B]);
                    daemon.sas().contains(what)
                });
            }
            scene.passes();
            assert_eq!((scene.a.child_spis("INSTALLED"), scene.b.child_spis("INSTALLED")), spis);
            for host in [&scene.host_a, &scene.host_b] {
                let dump = host.check("ip", &["xfrm", "state"]);
                assert_eq!(dump.matches("198.51.100.1").count(), 2, "{dump}");
                assert_eq!(states(host), 2, "{dump}");
                let policies = host.check("ip", &["xfrm", "policy"]);
                assert!(!policies.contains("192.0.2.1"), "{policies}");
            }
            for capture in &mut captures {
                capture.nothing_in_clear();
            }
        }
    });
}

// RFC 7296 §2.4: a peer that is gone, or that closes, leaves no SA, and a trap where configured; whoever initiated.
#[test]
fn a_dead_peer_leaves_a_trap() {
    in_guest(|| {
        for initiates in [true, false] {
            let (host_a, host_b) = latchkey_tests::scene::hosts();
            host_a.ip(&["route", "add", "10.2.0.0/24", "via", "192.0.2.2"]);
            let child = "dpd_action = trap\nclose_action = trap\n";
            let [(of_a, _), (of_b, _)] =
                configurations(&Suite { connection: "dpd_delay = 1s\n", child, ..Suite::default() });
            // The peer must not trap as well.
            let b = Daemon::start(StrongswanKernel, &host_b, &of_b.replace(child, ""), &vec![]);
            let a = Daemon::start_empty(LatchkeyKernel, &host_a, "retransmit_tries = 1\nretransmit_timeout = 0.5\n");
            a.write(&of_a, &vec![]);
            a.control(&["--load-all"]);
            let initiator = if initiates { &a } else { &b };
            initiator.initiate("net");
            assert!(host_a.pings(INNER_A, INNER_B));
            let device = host_a.check("ip", &["-o", "route", "get", "192.0.2.2"]);
            let device = device.split(" dev ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
            let mut capture = Capture::start(&host_a, device);
            let trapped = || a.control(&["--list-pols"]).contains("site/net, TUNNEL");
            if !initiates {
                b.control(&["--terminate", "--ike", "site"]);
                wait_for("the trap", Duration::from_secs(30), trapped);
                a.control(&["--uninstall", "--child", "net"]);
                b.initiate("net");
                assert!(host_a.pings(INNER_A, INNER_B));
            }
            assert!(!trapped());
            b.signal("KILL");
            wait_for("the trap", Duration::from_secs(30), trapped);
            assert_eq!(states(&host_a), 0);
            assert!(!host_a.pings(INNER_A, INNER_B));
            capture.nothing_in_clear();
        }
    });
}
