//! A kernel that does not take what it is given: the peer hears of it, the log says why, and nothing is left.

use std::time::Duration;

use latchkey_tests::daemon::Daemon;
use latchkey_tests::daemon::Kind::{Latchkey, LatchkeyKernel};
use latchkey_tests::host::wait_for;
use latchkey_tests::scene::{A, B, Scene, Suite, configurations, hosts};
use latchkey_tests::uml::in_guest;

use crate::{ROLES, states};

/// The peer's SPIs: as many as one Child SA takes, and a rekey.
const PEER_SPIS: &str = "spi_min = 0xc0000001\nspi_max = 0xc0000002\n";

/// Asks for the Child SA, which one of them cannot have.
fn fails(scene: &Scene, ours: &Daemon, reason: &str) {
    let context = || format!("{}{}", scene.a.output(), scene.b.output());
    assert!(!scene.a.swanctl(&["--initiate", "--child", "net"]).status.success(), "{reason}\n{}", context());
    assert!(ours.log().contains(reason), "{reason}\n{}", context());
    wait_for("nothing is left at either end", Duration::from_secs(20), || {
        let left = [&scene.host_a, &scene.host_b].map(|host| {
            let dump = host.check("ip", &["xfrm", "state"]);
            let foreign = dump.matches("reqid 999").count();
            (states(host) - foreign, host.check("ip", &["xfrm", "policy"]).matches("tmpl").count())
        });
        left == [(0, 0), (0, 0)]
    });
}

// RFC 7296 §1.3.1, §2.21: an error for the request of a Child SA alone; who initiated deletes what the peer has.
#[test]
fn what_cannot_be_installed_leaves_nothing_at_either_end() {
    in_guest(|| {
        for (initiator, responder) in ROLES {
            let (host_a, host_b) = hosts();
            let [(of_a, _), (of_b, _)] = configurations(&Suite::default());
            let start = |kind, host, configuration: &str| {
                let daemon = Daemon::start_empty(kind, host, if kind == LatchkeyKernel { "" } else { PEER_SPIS });
                daemon.write(configuration, &vec![]);
                daemon.control(&["--load-all"]);
                daemon
            };
            let b = start(responder, &host_b, &of_b);
            let a = start(initiator, &host_a, &of_a);
            let scene = Scene { a, b, host_a, host_b };
            let (ours, host, [local, remote], nets) = match initiator {
                LatchkeyKernel => (&scene.a, &scene.host_a, [A, B], ["10.2.0.0/24", "10.1.0.0/24"]),
                _ => (&scene.b, &scene.host_b, [B, A], ["10.1.0.0/24", "10.2.0.0/24"]),
            };

            // The last of our policies is in the way of somebody else's: states and other policies are there by then.
            let foreign = ["src", nets[0], "dst", nets[1], "dir", "fwd"];
            host.ip(&[&["xfrm", "policy", "add"][..], &foreign, &["priority", "9", "action", "block"]].concat());
            fails(&scene, ours, "another key manager has one for the same packets (priority 9)");
            host.ip(&[&["xfrm", "policy", "delete"][..], &foreign].concat());

            // Somebody else's states have the names of those that the peer asks for.
            for spi in ["0xc0000001", "0xc0000002"] {
                let name = ["src", local, "dst", remote, "proto", "esp", "spi", spi, "reqid", "999", "mode", "tunnel"];
                let key = "0x0102030405060708090a0b0c0d0e0f1011121314";
                host.ip(&[&["xfrm", "state", "add"][..], &name, &["aead", "rfc4106(gcm(aes))", key, "128"]].concat());
            }
            fails(&scene, ours, "is already in use");
            assert_eq!(host.check("ip", &["xfrm", "state"]).matches("reqid 999").count(), 2, "they are not ours");
            host.ip(&["xfrm", "state", "deleteall", "reqid", "999"]);

            // With nothing in the way it goes in the same IKE SA.
            scene.a.initiate("net");
            scene.passes();
            assert_eq!((scene.a.established(), states(&scene.host_a), states(&scene.host_b)), (1, 2, 2));
        }
    });
}

// An algorithm that is configured, and that this kernel lacks.
#[test]
fn an_algorithm_that_the_kernel_lacks_is_refused_with_its_name() {
    in_guest(|| {
        for (initiator, responder) in [(Latchkey, LatchkeyKernel), (LatchkeyKernel, Latchkey)] {
            let suite = Suite { esp: "aes128-aescmac,aes128gcm16", ..Suite::default() };
            let scene = Scene::start(initiator, responder, &suite);
            let ours = if initiator == LatchkeyKernel { &scene.a } else { &scene.b };
            fails(&scene, ours, "cmac(aes)");
        }
    });
}
