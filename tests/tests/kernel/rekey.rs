//! Successors of SAs, while packets flow.

use std::fs;
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use latchkey_tests::daemon::Daemon;
use latchkey_tests::daemon::Kind::LatchkeyKernel;
use latchkey_tests::host::{Host, wait_for};
use latchkey_tests::scene::{INNER_A, INNER_B, Scene, Suite};
use latchkey_tests::uml::in_guest;

use crate::{ROLES, start, states, works};

/// Pings in both directions while something happens, each packet and each answer of which arrives.
fn without_loss(scene: &Scene, what: impl FnOnce()) {
    let reports = pinged(scene, what);
    let all_arrived = reports.iter().all(|(_, lost)| *lost == 0);
    assert!(all_arrived, "{reports:?}\n{}{}", scene.a.output(), scene.b.output());
}

/// Pings in both directions while something happens: how many were sent, and lost.
pub(crate) fn pinged(scene: &Scene, what: impl FnOnce()) -> [(u32, u32); 2] {
    let pings = [(&scene.host_a, INNER_A, INNER_B), (&scene.host_b, INNER_B, INNER_A)].map(|(host, from, to)| {
        let mut ping = host.command("ping", &["-q", "-i", "0.01", "-W", "2", "-I", from, to]);
        ping.stdout(Stdio::piped()).spawn().unwrap()
    });
    thread::sleep(Duration::from_millis(300));
    what();
    thread::sleep(Duration::from_millis(300));
    pings.map(|ping| {
        // It then waits for what is under way, and reports.
        let stopped = scene.host_a.run("kill", &["-INT", &ping.id().to_string()]);
        assert!(stopped.status.success());
        let report = String::from_utf8(ping.wait_with_output().unwrap().stdout).unwrap();
        let before = |words: &str| {
            let number = report.split(words).next().and_then(|text| text.rsplit(['\n', ' ']).next());
            number.and_then(|number| number.parse::<u32>().ok()).unwrap_or_else(|| panic!("{report}"))
        };
        let (sent, received) = (before(" packets transmitted, "), before(" received, "));
        assert!(sent > 30, "{report}");
        (sent, sent - received)
    })
}

fn has_a_successor(daemon: &Daemon, before: &[String]) {
    wait_for("a new SPI, alone", Duration::from_secs(40), || {
        let now = daemon.child_spis("INSTALLED");
        now.len() == 1 && now != before && !daemon.sas().contains("state=DELET")
    });
}

// RFC 7296 §2.8: the responder's new outbound SA waits for proof that the initiator has the inbound one; nothing is lost.
#[test]
fn rekeys_lose_no_packet() {
    in_guest(|| {
        for (initiator, responder) in [ROLES[0], ROLES[1], (LatchkeyKernel, LatchkeyKernel)] {
            let scene = works(initiator, responder, &Suite::default());
            for daemon in [&scene.a, &scene.b] {
                without_loss(&scene, || {
                    for _ in 0..2 {
                        let before = daemon.child_spis("INSTALLED");
                        daemon.control(&["--rekey", "--child", "net"]);
                        has_a_successor(daemon, &before);
                    }
                    daemon.control(&["--rekey", "--ike", "site"]);
                    wait_for("a new IKE SA", Duration::from_secs(20), || daemon.established() == 1);
                });
            }
            // strongSwan keeps an old inbound SA for five seconds.
            wait_for("old SAs go", Duration::from_secs(20), || {
                (states(&scene.host_a), states(&scene.host_b)) == (2, 2)
            });
        }
    });
}

// RFC 4301 §4.4.2.1: lifetimes in octets and packets, counted by the kernel, which says when they are over.
#[test]
fn octets_and_packets_bring_a_successor() {
    in_guest(|| {
        for ((initiator, responder), limit) in [
            (ROLES[0], "rekey_bytes = 30000\nlife_bytes = 8000000\nrand_bytes = 0\n"),
            (ROLES[1], "rekey_packets = 300\nlife_packets = 80000\nrand_packets = 0\n"),
        ] {
            let scene = start(initiator, responder, &Suite::default());
            let ours = if initiator == LatchkeyKernel { &scene.a } else { &scene.b };
            let configuration = fs::read_to_string(ours.path("swanctl/swanctl.conf")).unwrap();
            let limited = configuration.replace("esp_proposals", &format!("{limit}esp_proposals"));
            ours.write(&limited, &vec![]);
            ours.control(&["--load-all"]);
            scene.a.initiate("net");
            let before = ours.child_spis("INSTALLED");
            without_loss(&scene, || {
                for _ in 0..2 {
                    let before = ours.child_spis("INSTALLED");
                    wait_for("a successor", Duration::from_secs(40), || {
                        ours.child_spis("INSTALLED").iter().any(|spi| !before.contains(spi))
                    });
                }
            });
            assert!(!ours.child_spis("INSTALLED").contains(&before[0]));
        }
    });
}

/// Octets of a transfer that lasts some seconds in the guest.
const BULK: u64 = 48 << 20;

/// Moves [`BULK`] octets from A to B while something happens, and counts those that arrive.
fn in_bulk(scene: &Scene, what: impl FnOnce()) {
    let listen = format!("TCP4-LISTEN:5001,bind={INNER_B}");
    let mut sink = scene.host_b.command("sh", &["-c", &format!("socat -u {listen} - | wc -c")]);
    let sink = sink.stdout(Stdio::piped()).spawn().unwrap();
    scene.host_b.wait_for_listener(5001);
    let send = format!("head -c {BULK} /dev/zero | socat -u - TCP4:{INNER_B}:5001,bind={INNER_A},connect-timeout=5");
    let mut source = scene.host_a.spawn("sh", &["-c", &send]);
    what();
    source.wait_at_most(Duration::from_secs(180));
    let arrived = String::from_utf8(sink.wait_with_output().unwrap().stdout).unwrap();
    assert_eq!(arrived.trim().parse::<u64>().unwrap(), BULK, "{}{}", scene.a.output(), scene.b.output());
}

/// What the kernel's IPsec has dropped, by its own count.
fn dropped(host: &Host) -> Vec<String> {
    let counters = host.check("cat", &["/proc/net/xfrm_stat"]);
    counters.lines().filter(|line| line.split_whitespace().nth(1) != Some("0")).map(str::to_owned).collect()
}

// RFC 7296 §2.8, RFC 4303 §3.3.3: SAs are replaced by hand, by volume and with their IKE SA, under load; each packet of
// the pings and each drop of either kernel is counted.
#[test]
fn bulk_goes_on_through_rekeys_without_a_drop() {
    in_guest(|| {
        for ((initiator, responder), esp) in [(ROLES[0], "aes128gcm16-esn"), (ROLES[1], "aes128gcm16-noesn")] {
            let scene = works(initiator, responder, &Suite { esp, ..Suite::default() });
            let (ours, host) =
                if initiator == LatchkeyKernel { (&scene.a, &scene.host_a) } else { (&scene.b, &scene.host_b) };
            // 32-bit sequence numbers do not come round: a successor is due before, and the end is at the last.
            let limits = host.check("ip", &["-s", "xfrm", "state"]);
            let limited = limits.matches("limit: soft 4026531840(packets), hard 4294967295(packets)").count();
            assert_eq!(limited, if esp.ends_with("-noesn") { 2 } else { 0 }, "{limits}");
            let first = ours.child_spis("INSTALLED");
            without_loss(&scene, || {
                in_bulk(&scene, || {
                    for daemon in [&scene.a, &scene.b] {
                        let before = ours.child_spis("INSTALLED");
                        daemon.control(&["--rekey", "--child", "net"]);
                        has_a_successor(ours, &before);
                        daemon.control(&["--rekey", "--ike", "site"]);
                        wait_for("a new IKE SA", Duration::from_secs(20), || daemon.established() == 1);
                    }
                });
            });
            assert_ne!(ours.child_spis("INSTALLED"), first);
            assert_eq!((dropped(&scene.host_a), dropped(&scene.host_b)), (vec![], vec![]));
        }
    });
}
