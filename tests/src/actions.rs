//! What becomes of a Child SA that the peer closes, or whose peer is lost (`close_action`, `dpd_action`), in either plane.

use std::time::Duration;

use crate::daemon::{Daemon, Kind};
use crate::host::wait_for;
use crate::scene::{A, B, INNER_A, INNER_B, Scene, Suite, configurations, hosts};

const PATIENCE: Duration = Duration::from_secs(40);

/// Two daemons of which the first has these settings of its child. It notices in twelve seconds that the other is lost: a
/// guest on a loaded machine may stand still for some.
fn with(ours: Kind, theirs: Kind, child: &'static str) -> Scene {
    let (host_a, host_b) = hosts();
    if ours == Kind::LatchkeyKernel {
        // The kernel's policies select what is sent somewhere.
        host_a.ip(&["route", "add", "10.2.0.0/24", "via", B]);
        host_b.ip(&["route", "add", "10.1.0.0/24", "via", A]);
    }
    let [(of_a, files_a), _] = configurations(&Suite { connection: "dpd_delay = 1s\n", child, ..Suite::default() });
    let [_, (of_b, files_b)] = configurations(&Suite::default());
    let b = Daemon::start(theirs, &host_b, &of_b, &files_b);
    let a = Daemon::start_empty(ours, &host_a, "retransmit_tries = 3\nretransmit_timeout = 1\n");
    a.write(&of_a, &files_a);
    a.control(&["--load-all"]);
    let scene = Scene { a, b, host_a, host_b };
    scene.a.initiate("net");
    scene.passes();
    scene
}

fn trapped(daemon: &Daemon) -> bool {
    daemon.control(&["--list-pols"]).contains("site/net, TUNNEL")
}

/// The peer closes the Child SA.
pub fn close_actions(ours: Kind, theirs: Kind) {
    for (action, comes_back, leaves_a_trap) in [("none", false, false), ("start", true, false), ("trap", false, true)] {
        let child = match action {
            "none" => "close_action = none\n",
            "start" => "close_action = start\n",
            _ => "close_action = trap\n",
        };
        let scene = with(ours, theirs, child);
        let before = scene.a.child_spis("INSTALLED");
        scene.b.control(&["--terminate", "--child", "net"]);
        let context = || format!("{action}: {}{}", scene.a.output(), scene.b.output());
        wait_for("the old Child SA is gone", PATIENCE, || scene.a.child_spis("INSTALLED") != before);
        if comes_back {
            wait_for("another one", PATIENCE, || scene.a.child_spis("INSTALLED").len() == 1);
            scene.passes();
        } else {
            wait_for("no Child SA", PATIENCE, || scene.a.child_spis("INSTALLED").is_empty());
        }
        assert_eq!(scene.a.established(), 1, "the IKE SA stays; {}", context());
        assert_eq!(trapped(&scene.a), leaves_a_trap, "{}", context());
        if leaves_a_trap {
            wait_for("a packet brings it back", PATIENCE, || scene.host_a.pings(INNER_A, INNER_B));
        }
    }
}

/// The peer is lost without a word, and is there again later.
pub fn dpd_actions(ours: Kind, theirs: Kind) {
    for (child, leaves_a_trap) in
        [("dpd_action = trap\n", true), ("dpd_action = restart\n", false), ("dpd_action = start\n", false)]
    {
        let Scene { a, mut b, host_a, host_b } = with(ours, theirs, child);
        let before = a.child_spis("INSTALLED");
        b.signal("KILL");
        wait_for("the peer's end", PATIENCE, || !b.is_running());
        // It leaves nothing that would answer.
        host_b.ip(&["xfrm", "state", "flush"]);
        host_b.ip(&["xfrm", "policy", "flush"]);
        if leaves_a_trap {
            wait_for("the trap", PATIENCE, || trapped(&a));
        } else {
            wait_for("another attempt", PATIENCE, || a.log().matches("initiating IKE_SA").count() > 1);
        }
        let [_, (of_b, files_b)] = configurations(&Suite::default());
        let b = Daemon::start(theirs, &host_b, &of_b, &files_b);
        let back = || {
            // Without a packet a trap brings up nothing.
            (!leaves_a_trap || host_a.pings(INNER_A, INNER_B))
                && a.child_spis("INSTALLED").len() == 1
                && a.child_spis("INSTALLED") != before
        };
        wait_for(&format!("the tunnel with {child}"), 2 * PATIENCE, back);
        Scene { a, b, host_a, host_b }.passes();
    }
}
