//! Figures of ESP in the kernel; see `tests/bench/kernel`.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a benchmark fails by panicking")]

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use ike::config::{Child, ConfiguredSelector};
use ike::engine::EngineConfig;
use ipsec::selector::TrafficSelector;
use latchkey_tests::daemon::Daemon;
use latchkey_tests::daemon::Kind::{self, LatchkeyKernel, StrongswanKernel};
use latchkey_tests::host::wait_for;
use latchkey_tests::peer::{Peer, Setting};
use latchkey_tests::scene::{A, B, INNER_A, INNER_B, Scene, Suite, configurations, hosts};
use latchkey_tests::uml;
use latchkey_tests::wire::Wire;

/// Child SAs of each measurement, and the most seconds that it may take.
const MEASURED: usize = 200;
const MEASURING: Duration = Duration::from_secs(15);
/// Seconds for all Child SAs of one daemon that are only there: beyond, what is there by then is measured.
const FILLING: Duration = Duration::from_secs(140);
/// Child SAs in one IKE SA, of those that are only there.
const TOGETHER: usize = 100;
/// Seconds of the flow.
const SECONDS: &str = "10";
/// For one answer of a daemon.
const PATIENCE: Duration = Duration::from_secs(30);
/// Seconds for a guest that hangs, and for pairs without IKE.
const LIMIT: u32 = 900;
const PAIRS: &str = "90";

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
        let [first, count, seconds] = [3, 4, 5].map(|at: usize| args[at].parse().unwrap());
        return load(Path::new(&args[2]), first, count, Duration::from_secs(seconds as u64));
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
    println!("\nSA pairs that our plane alone puts into the kernel, without IKE");
    pairs(args[1].parse().unwrap());
}

/// The levels of Child SAs that are there already, up to the most that are wanted.
fn levels(most: usize) -> impl Iterator<Item = usize> {
    [0, 1000, 10_000].into_iter().filter(move |level| *level <= most)
}

/// What `kernel/examples/sas.rs` says, where it was built.
fn pairs(most: usize) {
    let program = std::env::current_exe().unwrap().with_file_name("examples").join("sas");
    let levels: Vec<String> = levels(most).map(|level| level.to_string()).collect();
    let output = Command::new("timeout").arg(PAIRS).arg(&program).args(levels).output().unwrap();
    print!("{}", String::from_utf8_lossy(&output.stdout));
    if !output.status.success() {
        println!("{}: {} {}", program.display(), output.status, String::from_utf8_lossy(&output.stderr));
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
    wait_for("the receiver", Duration::from_secs(60), || {
        !scene.host_b.check("ss", &["-Hlun", "sport = :9000"]).is_empty()
    });
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
    // How many were made, and how many seconds all but the first took.
    let run = |first: usize, count: usize, limit: Duration| -> (usize, f64) {
        let args = [
            "load",
            folder.path().to_str().unwrap(),
            &first.to_string(),
            &count.to_string(),
            &limit.as_secs().to_string(),
        ];
        let report = host_a.check(program.to_str().unwrap(), &args);
        let (made, seconds) = report.trim().split_once(' ').unwrap();
        (made.parse().unwrap(), seconds.parse().unwrap())
    };
    let (mut there, mut left) = (0, FILLING);
    for level in levels(most) {
        while there < level && !left.is_zero() {
            let start = Instant::now();
            there += run(there, TOGETHER.min(level - there), left.max(Duration::from_secs(1))).0;
            left = left.saturating_sub(start.elapsed());
        }
        let (existing, cpu) = (there, daemon.cpu_seconds());
        let (made, seconds) = run(there, MEASURED, MEASURING);
        there += made;
        let cpu = (daemon.cpu_seconds() - cpu) * 1e3 / made as f64;
        let cut = if existing < level {
            format!("  ({level} not reached in {} s)", FILLING.as_secs())
        } else {
            String::new()
        };
        println!(
            "{:<20} {existing:>12} {:>12.0} {cpu:>14.2} ms each{cut}",
            format!("{kind:?}"),
            (made - 1) as f64 / seconds
        );
    }
    // What was measured is what was meant.
    let count = host_b.check("ip", &["xfrm", "state", "count"]);
    assert!(count.contains(&format!("SAD count {}", 2 * there)), "{count} instead of {}", 2 * there);
}

/// The initiator, inside the first host: makes Child SAs from the `first`th address on, in one IKE SA; prints how many, and how many seconds
/// all but the first took. Those that do not fit into the time are not made.
fn load(folder: &Path, first: usize, count: usize, limit: Duration) {
    let setting = Setting::load(folder).unwrap();
    let wire = Wire::open(A);
    let template: &Child = &setting.connection.children[0];
    let child = |number: usize| {
        let address = [10, 1, u8::try_from(number / 250).unwrap(), u8::try_from(number % 250).unwrap()];
        let local_ts = vec![ConfiguredSelector::Fixed(TrafficSelector::host(address.into()))];
        Some(Arc::new(Child { name: format!("net{number}"), local_ts, ..template.clone() }))
    };
    let mut initiator = Peer::new(&setting, EngineConfig::default());
    let (begin, mut start) = (Instant::now(), Instant::now());
    for number in first..first + count {
        // Two at least, or there would be no rate.
        if number > first + 1 && begin.elapsed() > limit {
            break;
        }
        let done = initiator.done + 1;
        wire.send(initiator.initiate_child(Instant::now(), A.parse().unwrap(), B.parse().unwrap(), child(number)));
        while initiator.done < done {
            if let Some((path, bytes)) = wire.receive(Duration::from_millis(500)) {
                wire.send(initiator.receive(Instant::now(), path, &bytes));
            }
            initiator.engine.handle_timeout(Instant::now());
            wire.send(initiator.outputs(Instant::now()));
            assert_eq!(initiator.failed, 0);
            assert!(begin.elapsed() < limit + PATIENCE, "no answer for Child SA {number}");
        }
        if number == first {
            start = Instant::now();
        }
    }
    println!("{} {}", initiator.done, start.elapsed().as_secs_f64());
}
