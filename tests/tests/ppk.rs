//! Post-quantum preshared keys (RFC 8784) with strongSwan, in both roles.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use latchkey_tests::daemon::Kind::{Latchkey, Strongswan};
use latchkey_tests::daemon::{Daemon, Kind};
use latchkey_tests::scene::{Scene, Suite, configurations, hosts};

/// Daemons whose configurations have these settings of the connection, and these PPKs.
fn start(kinds: [Kind; 2], connections: [&'static str; 2], ppks: [&str; 2]) -> Scene {
    let (host_a, host_b) = hosts();
    let mut configured = [0, 1].into_iter().map(|side| {
        let suite = Suite { connection: connections[side], ..Suite::default() };
        let [a, b] = configurations(&suite);
        let (text, files) = if side == 0 { a } else { b };
        (text.replace("secrets {\n", &format!("secrets {{\n{}\n", ppks[side])), files)
    });
    let ((of_a, files_a), (of_b, files_b)) = (configured.next().unwrap(), configured.next().unwrap());
    let b = Daemon::start(kinds[1], &host_b, &of_b, &files_b);
    let a = Daemon::start(kinds[0], &host_a, &of_a, &files_a);
    Scene { a, b, host_a, host_b }
}

const KEY: &str = "ppk-1 {\nid = key.example\nsecret = \"a long secret that both have\"\n}";
const WRONG: &str = "ppk-1 {\nid = key.example\nsecret = \"another secret\"\n}";
const OTHER: &str = "ppk-1 {\nid = other.example\nsecret = \"of somebody else\"\n}";
const REQUIRED: &str = "ppk_id = key.example\nppk_required = yes\n";
const OPTIONAL: &str = "ppk_id = key.example\n";

const ROLES: [[Kind; 2]; 3] = [[Latchkey, Strongswan], [Strongswan, Latchkey], [Latchkey, Latchkey]];

// §3: the Child SA's keys depend on it, so packets pass only where both mix it in alike.
#[test]
fn both_sides_mix_the_ppk_in() {
    for kinds in ROLES {
        let scene = start(kinds, [REQUIRED, REQUIRED], [KEY, KEY]);
        scene.a.initiate("net");
        scene.passes();
    }
}

// §3: an optional PPK that the responder does not have is left out.
#[test]
fn without_a_common_ppk_an_optional_one_is_left_out() {
    for kinds in ROLES {
        for of_b in ["", OTHER] {
            let scene = start(kinds, [OPTIONAL, ""], [KEY, of_b]);
            scene.a.initiate("net");
            scene.passes();
        }
    }
}

#[test]
fn a_wrong_or_missing_ppk_gets_nobody_in() {
    for kinds in ROLES {
        for (connections, of_b) in [([OPTIONAL, ""], WRONG), ([REQUIRED, ""], ""), ([REQUIRED, REQUIRED], OTHER)] {
            let scene = start(kinds, connections, [KEY, of_b]);
            assert!(!scene.a.swanctl(&["--initiate", "--child", "net", "--timeout", "20"]).status.success());
            assert_eq!((scene.a.established(), scene.b.established()), (0, 0));
        }
    }
}
