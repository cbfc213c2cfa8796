//! ESP in a real kernel: Latchkey with `plane = kernel`, and strongSwan with its kernel-netlink plugin as the peer. All of
//! it runs in a guest (see `latchkey_tests::uml`), in one boot.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

mod interfaces;
mod latches;
mod life;
mod model;
mod paths;
mod refusals;
mod rekey;
mod selectors;
mod shunts;
mod streams;

use latchkey_tests::daemon::Kind::{self, Latchkey, LatchkeyKernel, StrongswanKernel};
use latchkey_tests::host::Host;
use latchkey_tests::scene::{A, B, INNER_A, INNER_B, Scene, Suite};
use latchkey_tests::uml::in_guest;

/// Initiator and responder.
const ROLES: [(Kind, Kind); 2] = [(LatchkeyKernel, StrongswanKernel), (StrongswanKernel, LatchkeyKernel)];

/// Two hosts with daemons and a tunnel between them. Without it, their networks' packets would pass in clear.
fn works(initiator: Kind, responder: Kind, suite: &Suite) -> Scene {
    let scene = start(initiator, responder, suite);
    scene.a.initiate("net");
    scene.passes();
    scene
}

/// The same without the tunnel.
fn start(initiator: Kind, responder: Kind, suite: &Suite) -> Scene {
    let scene = Scene::start(initiator, responder, suite);
    scene.host_a.ip(&["route", "add", "10.2.0.0/24", "via", B]);
    scene.host_b.ip(&["route", "add", "10.1.0.0/24", "via", A]);
    scene
}

/// How many states with keys (AES-GCM) a host's kernel has: those without are SPIs in reserve and acquires.
fn states(host: &Host) -> usize {
    host.check("ip", &["xfrm", "state"]).matches("\taead ").count()
}

/// The kernel has nothing of IPsec, and no routes or rules for it.
fn is_clean(host: &Host) {
    assert_eq!(host.check("ip", &["xfrm", "state"]), "");
    let policies = host.check("ip", &["xfrm", "policy"]);
    // strongSwan's and ours have priorities; what sockets pass by has none.
    assert!(!policies.contains("tmpl"), "{policies}");
    for family in ["-4", "-6"] {
        assert_eq!(host.run("ip", &[family, "route", "show", "table", "220"]).stdout, b"");
        let rules = host.check("ip", &[family, "rule"]);
        assert!(!rules.contains("220"), "{rules}");
    }
}

// When this fails, the scene is at fault, not Latchkey.
#[test]
fn the_scene_works_with_strongswan_alone() {
    in_guest(|| {
        let scene = Scene::works(StrongswanKernel, StrongswanKernel, &Suite::default());
        assert_eq!((states(&scene.host_a), states(&scene.host_b)), (2, 2));
        scene.host_a.transfers_whole(INNER_A, &scene.host_b, INNER_B, 1 << 20);
    });
}

#[test]
fn the_user_space_plane_speaks_with_a_kernel() {
    in_guest(|| {
        for (initiator, responder) in [(Latchkey, StrongswanKernel), (StrongswanKernel, Latchkey)] {
            for connection in ["", "encap = yes\n"] {
                let scene = Scene::works(initiator, responder, &Suite { connection, ..Suite::default() });
                scene.host_a.transfers_whole(INNER_A, &scene.host_b, INNER_B, 1 << 20);
                scene.host_b.transfers_whole(INNER_B, &scene.host_a, INNER_A, 1 << 20);
            }
        }
    });
}
