//! Latchkey and strongSwan side by side; see `tests/bench/run`.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a benchmark fails by panicking")]

use std::time::{Duration, Instant};

use latchkey_tests::daemon::Kind::{self, Latchkey, Strongswan};
use latchkey_tests::scene::{INNER_A, INNER_B, Scene, Suite};

/// Tunnels set up for each figure.
const SETUPS: usize = 10;

/// Seconds of each iperf3 run.
const SECONDS: &str = "5";

struct Case {
    name: &'static str,
    kind: Kind,
    connection: &'static str,
    setup: Vec<f64>,
    forward: Vec<f64>,
    reverse: Vec<f64>,
    cpu: Vec<f64>,
}

fn main() {
    let rounds: usize = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(3);
    let case = |name, kind, connection| Case {
        name,
        kind,
        connection,
        setup: Vec::new(),
        forward: Vec::new(),
        reverse: Vec::new(),
        cpu: Vec::new(),
    };
    // kernel-libipsec always encapsulates in UDP, so the comparison is with `encap = yes`.
    let mut cases = [
        case("strongSwan kernel-libipsec, UDP", Strongswan, ""),
        case("Latchkey, UDP", Latchkey, "encap = yes\n"),
        case("Latchkey, raw ESP", Latchkey, ""),
        case("Latchkey, TCP (RFC 9329)", Latchkey, "tcp = yes\n"),
    ];
    for round in 0..rounds {
        for case in &mut cases {
            eprintln!("round {} of {rounds}: {}", round + 1, case.name);
            measure(case);
        }
    }
    println!(
        "PSK, X25519, AES-128-GCM; {SETUPS} set-ups and {SECONDS} s of iperf3 TCP each way in each of {rounds} rounds; medians"
    );
    println!("{:<34} {:>12} {:>14} {:>14} {:>14}", "", "set-up ms", "A>B Gbit/s", "B>A Gbit/s", "CPU s per GB");
    for case in &mut cases {
        println!(
            "{:<34} {:>12.1} {:>14.2} {:>14.2} {:>14.1}",
            case.name,
            median(&mut case.setup),
            median(&mut case.forward),
            median(&mut case.reverse),
            median(&mut case.cpu)
        );
    }
}

fn measure(case: &mut Case) {
    let suite = Suite { connection: case.connection, ..Suite::default() };
    let scene = Scene::works(case.kind, case.kind, &suite);
    for _ in 0..SETUPS {
        scene.a.control(&["--terminate", "--ike", "site"]);
        std::thread::sleep(Duration::from_millis(100));
        let start = Instant::now();
        scene.a.initiate("net");
        case.setup.push(start.elapsed().as_secs_f64() * 1e3);
    }
    let _server = scene.host_b.spawn("iperf3", &["-s", "-B", INNER_B]);
    std::thread::sleep(Duration::from_millis(500));
    let cpu = scene.a.cpu_seconds() + scene.b.cpu_seconds();
    let (forward, octets_forward) = iperf(&scene, &[]);
    let (reverse, octets_reverse) = iperf(&scene, &["-R"]);
    let cpu = scene.a.cpu_seconds() + scene.b.cpu_seconds() - cpu;
    case.forward.push(forward);
    case.reverse.push(reverse);
    case.cpu.push(cpu / ((octets_forward + octets_reverse) / 1e9));
}

/// Gbit/s and octets received.
fn iperf(scene: &Scene, more: &[&str]) -> (f64, f64) {
    let mut args = vec!["-c", INNER_B, "-B", INNER_A, "-t", SECONDS, "-J"];
    args.extend_from_slice(more);
    let report = scene.host_a.check("iperf3", &args);
    let received = &report[report.find("\"sum_received\"").unwrap()..];
    let field = |name: &str| -> f64 {
        let rest = &received[received.find(name).unwrap() + name.len()..];
        rest.trim_start_matches(['"', ':', ' ', '\t']).split([',', '\n']).next().unwrap().trim().parse().unwrap()
    };
    (field("bits_per_second") / 1e9, field("bytes"))
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
