//! ESP in TCP streams by the kernel (RFC 9329, Linux `espintcp`). Debian's UML kernel is built without it, so these tests are
//! ignored there. `tests/guest/build` makes one that has it, from Debian's source:
//! `LATCHKEY_UML=$PWD/target/guest/linux cargo test -p latchkey-tests --test kernel streams:: -- --ignored`.
//!
//! Without it ESP in streams is user space's, and what moves there is rekeyed: that is tested with Debian's.

use std::time::Duration;

use latchkey_tests::capture::Capture;
use latchkey_tests::daemon::Daemon;
use latchkey_tests::daemon::Kind::{Latchkey, LatchkeyKernel};
use latchkey_tests::host::{Host, wait_for};
use latchkey_tests::middlebox::HASTY;
use latchkey_tests::scene::{INNER_A, INNER_B, Scene, Suite, configurations, hosts};
use latchkey_tests::uml::in_guest;

use crate::rekey::pinged;
use crate::{start, states};

fn in_streams(host: &Host) -> usize {
    host.check("ip", &["xfrm", "state"]).matches("encap type espintcp").count()
}

fn rekeyed(scene: &Scene) {
    for daemon in [&scene.a, &scene.b] {
        daemon.control(&["--rekey", "--ike", "site"]);
        wait_for("a new IKE SA", Duration::from_secs(20), || daemon.established() == 1);
        let before = daemon.child_spis("INSTALLED");
        daemon.control(&["--rekey", "--child", "net"]);
        wait_for("a new SPI", Duration::from_secs(20), || {
            let now = daemon.child_spis("INSTALLED");
            now.len() == 1 && now != before
        });
    }
}

// RFC 9329 §3, §6.1: each of the ends in the kernel, and against our own user space; SAs are rekeyed, the stream is lost and
// opened again.
#[test]
#[ignore = "needs a kernel with espintcp: tests/guest/build, then LATCHKEY_UML=$PWD/target/guest/linux"]
fn the_kernel_takes_esp_from_streams() {
    in_guest(|| {
        for (initiator, responder) in
            [(LatchkeyKernel, LatchkeyKernel), (LatchkeyKernel, Latchkey), (Latchkey, LatchkeyKernel)]
        {
            let scene = start(initiator, responder, &Suite { connection: "tcp = yes\n", ..Suite::default() });
            let mut capture = Capture::start(&scene.host_a, &device(&scene.host_a));
            let ends = [(initiator, &scene.a, &scene.host_a), (responder, &scene.b, &scene.host_b)];
            let in_place = || {
                for (kind, daemon, host) in ends {
                    let (plane, states) = match kind {
                        LatchkeyKernel => ("plane=kernel plane-reason=the kernel takes ESP from TCP streams", 2),
                        _ => ("plane=user-space", 0),
                    };
                    let context = || format!("{}{}{}", daemon.sas(), scene.a.output(), scene.b.output());
                    assert!(daemon.sas().contains(plane), "{}", context());
                    wait_for(&context(), Duration::from_secs(20), || in_streams(host) == states);
                }
            };
            scene.a.initiate("net");
            scene.passes();
            in_place();
            scene.host_a.transfers_whole(INNER_A, &scene.host_b, INNER_B, 1 << 20);
            scene.host_b.transfers_whole(INNER_B, &scene.host_a, INNER_A, 1 << 20);
            rekeyed(&scene);
            scene.passes();
            in_place();
            for _ in 0..2 {
                scene.host_a.check("ss", &["-K", "dport", "=", ":4500"]);
                wait_for("the tunnel works again", Duration::from_secs(40), || scene.host_a.pings(INNER_A, INNER_B));
            }
            scene.passes();
            in_place();
            assert_eq!(scene.a.established(), 1);
            capture.nothing_in_clear();
            assert!(capture.count("tcp port 4500") > 100 && capture.count("udp or esp") == 0);
        }
    });
}

/// Two hosts with a tunnel by the kernel outside of streams, which goes into one when nothing else is let through.
fn movable(connection: &'static str) -> Scene {
    let (host_a, host_b) = hosts();
    host_a.ip(&["route", "add", "10.2.0.0/24", "via", "192.0.2.2"]);
    host_b.ip(&["route", "add", "10.1.0.0/24", "via", "192.0.2.1"]);
    let [of_a, of_b] = configurations(&Suite { connection, ..Suite::default() });
    let [b, a] = [(&host_b, of_b), (&host_a, of_a)].map(|(host, (text, files))| {
        let daemon = Daemon::start_empty(LatchkeyKernel, host, HASTY);
        daemon.write(&text, &files);
        daemon.control(&["--load-all"]);
        daemon
    });
    a.initiate("net");
    let scene = Scene { a, b, host_a, host_b };
    scene.passes();
    scene
}

/// Has both hosts ignore all that comes in UDP and as plain ESP, or no more.
fn filter(scene: &Scene, change: &str) {
    for (host, protocol) in
        [(&scene.host_a, "udp"), (&scene.host_a, "esp"), (&scene.host_b, "udp"), (&scene.host_b, "esp")]
    {
        host.check("iptables-legacy", &[change, "INPUT", "-p", protocol, "-j", "DROP"]);
    }
}

/// Waits until the tunnel is in a stream, or in none, and the Child SAs of both sides where they shall be, alone.
fn settled(scene: &Scene, over_tcp: bool, plane: &str) {
    wait_for("the other transport, and one Child SA", Duration::from_secs(60), || {
        [&scene.a, &scene.b].into_iter().all(|daemon| {
            let sas = daemon.sas();
            sas.contains("transport=TCP") == over_tcp
                && sas.matches("state=ESTABLISHED").count() == 1
                && sas.matches("plane=").count() == 1
                && sas.contains(&format!("plane={plane} "))
        })
    });
}

/// Pings, one in 10 ms, for which the guest's one processor may take from the responder's move to ours.
const MOST_LOST: u32 = 50;

/// What the kernel has of a tunnel: states with keys, of those in streams, and policies that protect.
fn in_kernel(host: &Host) -> (usize, usize, usize) {
    (states(host), in_streams(host), host.check("ip", &["xfrm", "policy"]).matches("tmpl").count())
}

fn device(host: &Host) -> String {
    let links = host.check("ip", &["-o", "link", "show", "type", "veth"]);
    links.split_whitespace().nth(1).unwrap().split('@').next().unwrap().to_owned()
}

// RFC 9329 §7.1, RFC 4555 §3.5: out of UDP, or off plain IP, into a stream and back, in the kernel with the same keys. What the
// filter swallows is lost. On the way back both transports carry, but a state takes ESP from one of them only: what travels
// between the responder's move and ours is lost, and no more.
#[test]
#[ignore = "needs a kernel with espintcp: tests/guest/build, then LATCHKEY_UML=$PWD/target/guest/linux"]
fn sas_move_between_udp_and_a_stream_in_the_kernel() {
    in_guest(|| {
        for connection in ["dpd_delay = 1s\ntcp_probe_udp = 3s\n", "encap = yes\ndpd_delay = 1s\ntcp_probe_udp = 3s\n"]
        {
            let scene = movable(connection);
            let mut capture = Capture::start(&scene.host_a, &device(&scene.host_a));
            let spis = (scene.a.child_spis("INSTALLED"), scene.b.child_spis("INSTALLED"));
            let context = || {
                let kernel = [&scene.host_a, &scene.host_b].map(|host| host.check("ip", &["-s", "xfrm", "state"]));
                format!("{}{}{}{}", kernel[0], kernel[1], scene.a.output(), scene.b.output())
            };
            for _ in 0..2 {
                filter(&scene, "-A");
                settled(&scene, true, "kernel");
                assert!(scene.host_a.pings(INNER_A, INNER_B) && scene.host_b.pings(INNER_B, INNER_A), "{}", context());
                for host in [&scene.host_a, &scene.host_b] {
                    assert_eq!(in_kernel(host), (2, 2, 3), "{}", context());
                }
                scene.host_a.transfers_whole(INNER_A, &scene.host_b, INNER_B, 1 << 20);
                let pings = pinged(&scene, || {
                    filter(&scene, "-D");
                    settled(&scene, false, "kernel");
                });
                assert!(pings.iter().all(|(_, lost)| *lost <= MOST_LOST), "{pings:?}{}", context());
                for host in [&scene.host_a, &scene.host_b] {
                    assert_eq!(in_kernel(host), (2, 0, 3), "{}", context());
                }
                scene.host_b.transfers_whole(INNER_B, &scene.host_a, INNER_A, 1 << 20);
                assert_eq!((scene.a.child_spis("INSTALLED"), scene.b.child_spis("INSTALLED")), spis);
            }
            // The stream is closed when it is over.
            wait_for("no TCP connection", Duration::from_secs(10), || {
                scene.host_a.check("ss", &["-Htn", "dport", "=", ":4500"]).is_empty()
            });
            capture.nothing_in_clear();
        }
    });
}

// The same where the kernel has no ESP in streams: a successor with keys of its own takes over in the other plane.
#[test]
fn sas_that_move_where_the_other_plane_carries_esp_are_rekeyed() {
    in_guest(|| {
        let scene = movable("encap = yes\ndpd_delay = 1s\ntcp_probe_udp = 3s\n");
        let mut capture = Capture::start(&scene.host_a, &device(&scene.host_a));
        let spis = || (scene.a.child_spis("INSTALLED"), scene.b.child_spis("INSTALLED"));
        let first = spis();
        filter(&scene, "-A");
        settled(&scene, true, "user-space");
        scene.passes();
        let second = spis();
        filter(&scene, "-D");
        settled(&scene, false, "kernel");
        scene.passes();
        let third = spis();
        assert!(first != second && second != third, "{first:?} {second:?} {third:?}");
        for host in [&scene.host_a, &scene.host_b] {
            wait_for("the predecessor's states are gone", Duration::from_secs(20), || in_kernel(host) == (2, 0, 3));
        }
        capture.nothing_in_clear();
    });
}
