//! Both sides rekey at once, and reauthentication: against strongSwan's daemon, in both roles.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::time::Duration;

use latchkey_tests::daemon::Daemon;
use latchkey_tests::daemon::Kind::{self, Latchkey, Strongswan};
use latchkey_tests::host::wait_for;
use latchkey_tests::scene::{Scene, Suite, configurations, hosts};

const ROLES: [(Kind, Kind); 2] = [(Latchkey, Strongswan), (Strongswan, Latchkey)];
const LIMIT: Duration = Duration::from_secs(60);

/// Both have sent their request before either has heard of the other's.
fn both_at_once(scene: &Scene, command: &[&str]) {
    scene.host_a.block_udp();
    std::thread::scope(|scope| {
        for daemon in [&scene.a, &scene.b] {
            scope.spawn(|| daemon.swanctl(command));
        }
        for daemon in [&scene.a, &scene.b] {
            wait_for("the request is out", LIMIT, || daemon.sas().contains("REKEY"));
        }
        scene.host_a.allow_udp();
    });
}

/// Of the IKE SAs that are up. A redundant one may wait for a Delete that its maker, who forgot it, never sends.
fn ike_spis(daemon: &Daemon) -> Vec<String> {
    let sas = daemon.sas();
    let is_up =
        |at: usize| sas[..at].rfind(" state=").is_some_and(|state| sas[state..].starts_with(" state=ESTABLISHED"));
    let found = sas.match_indices("initiator-spi=").filter(|(at, _)| is_up(*at));
    found.map(|(at, key)| sas[at + key.len()..][..16].to_owned()).collect()
}

// RFC 7296 §2.8.2: one of two successors is left, and both daemons have the same.
#[test]
fn both_sides_rekey_the_ike_sa() {
    for (initiator, responder) in ROLES {
        let scene = Scene::works(initiator, responder, &Suite::default());
        for _ in 0..3 {
            let before = ike_spis(&scene.a);
            both_at_once(&scene, &["--rekey", "--ike", "site"]);
            wait_for("one new IKE SA", LIMIT, || {
                let (a, b) = (ike_spis(&scene.a), ike_spis(&scene.b));
                let up = scene.a.established() == 1 && scene.b.established() == 1;
                up && a.len() == 1 && a == b && a != before
            });
            scene.passes();
        }
    }
}

// RFC 7296 §2.8.1.
#[test]
fn both_sides_rekey_a_child_sa() {
    for (initiator, responder) in ROLES {
        let scene = Scene::works(initiator, responder, &Suite::default());
        for _ in 0..3 {
            let before = scene.a.child_spis("INSTALLED");
            both_at_once(&scene, &["--rekey", "--child", "net"]);
            wait_for("one new Child SA", LIMIT, || {
                let spis = [&scene.a, &scene.b].map(|daemon| daemon.child_spis("INSTALLED"));
                let rest = [&scene.a, &scene.b].map(|daemon| daemon.sas().matches("spi-in=").count());
                rest == [1, 1] && spis[0].len() == 1 && spis[1].len() == 1 && spis[0] != before
            });
            scene.passes();
        }
    }
}

// RFC 7296 §2.8.3: Latchkey makes the new IKE SA first; strongSwan is the responder.
#[test]
fn reauthentication_makes_before_it_breaks() {
    let (host_a, host_b) = hosts();
    let suite = Suite { connection: "reauth_time = 8s\nover_time = 60s\nrand_time = 0s", ..Suite::default() };
    let [(of_a, files_a), _] = configurations(&suite);
    let [_, (of_b, files_b)] = configurations(&Suite::default());
    let b = Daemon::start(Strongswan, &host_b, &of_b, &files_b);
    let a = Daemon::start_empty(Latchkey, &host_a, "make_before_break = yes");
    a.write(&of_a, &files_a);
    a.control(&["--load-all"]);
    a.initiate("net");
    let scene = Scene { a, b, host_a, host_b };
    let first = ike_spis(&scene.a);
    wait_for("another IKE SA alone", LIMIT, || {
        let spis = ike_spis(&scene.a);
        assert!(!scene.a.child_spis("INSTALLED").is_empty(), "the tunnel was down");
        spis.len() == 1 && spis != first
    });
    scene.passes();
}
