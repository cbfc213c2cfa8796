//! ESP in a real kernel: strongSwan with its kernel-netlink plugin and Latchkey, in a guest (see `latchkey_tests::uml`).

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use latchkey_tests::daemon::Kind::{Latchkey, StrongswanKernel};
use latchkey_tests::scene::{INNER_A, INNER_B, Scene, Suite};
use latchkey_tests::uml::in_guest;

// When this fails, the scene is at fault, not Latchkey.
#[test]
fn the_scene_works_with_strongswan_alone() {
    in_guest(|| {
        let scene = Scene::works(StrongswanKernel, StrongswanKernel, &Suite::default());
        for host in [&scene.host_a, &scene.host_b] {
            assert_eq!(host.check("ip", &["xfrm", "state"]).matches("proto esp spi").count(), 2);
        }
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
