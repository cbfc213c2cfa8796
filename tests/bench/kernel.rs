//! Figures of ESP in the kernel; see `tests/bench/kernel`.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a benchmark fails by panicking")]

use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use ike::config::{Child, ConfiguredSelector};
use ike::engine::EngineConfig;
use ipsec::selector::TrafficSelector;
use latchkey_tests::daemon::Daemon;
use latchkey_tests::daemon::Kind::{self, LatchkeyKernel, StrongswanKernel};
use latchkey_tests::peer::{Peer, Setting};
use latchkey_tests::scene::{A, B, INNER_A, INNER_B, Scene, Suite, configurations, hosts};
use latchkey_tests::uml;
use latchkey_tests::wire::Wire;

/// Child SAs of each measurement.
const MEASURED: usize = 200;
/// Child SAs in one IKE SA, of those that are only there.
const TOGETHER: usize = 100;
/// Seconds of the flow.
const SECONDS: &str = "20";
/// For a guest that hangs.
const LIMIT: u32 = 3600;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    if !uml::inside() {
        let program = std::env::current_exe().unwrap();
        let level = std::env::var("LATCHKEY_TEST_LOG").unwrap_or_default();
        let script = format!("LATCHKEY_TEST_LOG={level} exec '{}' '{}'", program.display(), args[1]);
        match uml::run(&script, LIMIT) {
            Ok(log) => print!("{log}"),
            Err(error) => panic!("{error}"),
        }
        return;
    }
    if args[1] == "load" {
        return load(Path::new(&args[2]), args[3].parse().unwrap(), args[4].parse().unwrap());
    }
    println!("rekeys of a Child SA each 2 s under a flow of datagrams for {SECONDS} s, and a flow without");
    println!("{:<20} {:>8} {:>10} {:>10} {:>20}", "both ends", "rekeys", "sent", "lost", "longest silence, ms");
    for kind in [StrongswanKernel, LatchkeyKernel] {
        gap(kind, "rekey_time = 0\n");
        gap(kind, "rekey_time = 2s\nrand_time = 0\nlife_time = 60s\n");
    }
    println!("\n{MEASURED} Child SAs one after the other in one IKE SA, without a key exchange: by the responder's");
    println!("{:<20} {:>12} {:>12} {:>22}", "daemon", "existing", "a second", "its processor time");
    for kind in [StrongswanKernel, LatchkeyKernel] {
        rates(kind, args[1].parse().unwrap());
    }
}

/// What rekeys do to traffic.
fn gap(kind: Kind, times: &'static str) {
    let scene = Scene::start(kind, kind, &Suite { child: "rekey_time = 0\n", ..Suite::default() });
    let [(of_a, _), _] = configurations(&Suite { child: times, ..Suite::default() });
    scene.a.write(&of_a, &vec![]);
    scene.a.control(&["--load-all"]);
    scene.a.initiate("net");
    scene.passes();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/bench/flow.py");
    let receiver = scene.host_b.command("python3", &[script, "receive", INNER_B]);
    let receiver = thread::spawn(move || {
        let mut receiver = receiver;
        String::from_utf8(receiver.output().unwrap().stdout).unwrap()
    });
    thread::sleep(Duration::from_secs(2));
    let unique_id = || {
        let sas = scene.a.sas();
        let ids = sas.split("child-sas {net-").skip(1).filter_map(|rest| rest.split(' ').next()?.parse::<u32>().ok());
        ids.max().unwrap()
    };
    let before = unique_id();
    let sent: usize =
        scene.host_a.check("python3", &[script, "send", INNER_A, INNER_B, SECONDS]).trim().parse().unwrap();
    let rekeys = unique_id() - before;
    let report = receiver.join().unwrap();
    let (received, silence) = report.trim().split_once(' ').unwrap();
    let lost = sent - received.parse::<usize>().unwrap();
    let silence: f64 = silence.parse().unwrap();
    println!("{:<20} {rekeys:>8} {sent:>10} {lost:>10} {silence:>20.1}", format!("{kind:?}"));
}

/// How fast Child SAs are made with so many there.
fn rates(kind: Kind, most: usize) {
    let suite = Suite { connection: "unique = never\n", child: "rekey_time = 0\n", ..Suite::default() };
    let [(of_a, _), (of_b, _)] = configurations(&suite);
    let wide = |text: &str| text.replace("10.1.0.0/24", "10.1.0.0/16");
    let (host_a, host_b) = hosts();
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("swanctl.conf"), wide(&of_a)).unwrap();
    let daemon = Daemon::start_empty(kind, &host_b, "filelog {\nlog {\ndefault = -1\nike = -1\n}\n}\n");
    daemon.write(&wide(&of_b), &vec![]);
    daemon.control(&["--load-all"]);
    let program = std::env::current_exe().unwrap();
    let run = |first: usize, count: usize| -> f64 {
        let args = ["load", folder.path().to_str().unwrap(), &first.to_string(), &count.to_string()];
        host_a.check(program.to_str().unwrap(), &args).trim().parse().unwrap()
    };
    let mut there = 0;
    for level in [0, 1000, 10_000].into_iter().filter(|level| *level <= most) {
        while there < level {
            let count = TOGETHER.min(level - there);
            run(there, count);
            there += count;
        }
        let cpu = daemon.cpu_seconds();
        let seconds = run(there, MEASURED);
        there += MEASURED;
        let cpu = (daemon.cpu_seconds() - cpu) * 1e3 / MEASURED as f64;
        println!(
            "{:<20} {level:>12} {:>12.0} {cpu:>14.2} ms each",
            format!("{kind:?}"),
            (MEASURED - 1) as f64 / seconds
        );
    }
    // What was measured is what was meant.
    let count = host_b.check("ip", &["xfrm", "state", "count"]);
    assert!(count.contains(&format!("SAD count {}", 2 * there)), "{count} instead of {}", 2 * there);
}

/// The initiator, inside the first host: makes Child SAs from the `first`th address on, in one IKE SA; prints how many seconds
/// all but the first took.
fn load(folder: &Path, first: usize, count: usize) {
    let setting = Setting::load(folder).unwrap();
    let wire = Wire::open(A);
    let template: &Child = &setting.connection.children[0];
    let child = |number: usize| {
        let address = [10, 1, u8::try_from(number / 250).unwrap(), u8::try_from(number % 250).unwrap()];
        let local_ts = vec![ConfiguredSelector::Fixed(TrafficSelector::host(address.into()))];
        Some(Arc::new(Child { name: format!("net{number}"), local_ts, ..template.clone() }))
    };
    let mut initiator = Peer::new(&setting, EngineConfig::default());
    let mut start = Instant::now();
    for number in first..first + count {
        let done = initiator.done + 1;
        wire.send(initiator.initiate_child(Instant::now(), A.parse().unwrap(), B.parse().unwrap(), child(number)));
        while initiator.done < done {
            if let Some((path, bytes)) = wire.receive(Duration::from_millis(500)) {
                wire.send(initiator.receive(Instant::now(), path, &bytes));
            }
            initiator.engine.handle_timeout(Instant::now());
            wire.send(initiator.outputs(Instant::now()));
            assert_eq!(initiator.failed, 0);
        }
        if number == first {
            start = Instant::now();
        }
    }
    println!("{}", start.elapsed().as_secs_f64());
}
