//! The same handshakes against Latchkey's and strongSwan's responder, and against ours with one shard and with several, side by
//! side; see `tests/bench/ike`.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a benchmark fails by panicking")]

use std::collections::BTreeMap;
use std::path::Path as FilePath;
use std::time::{Duration, Instant};

use ike::engine::EngineConfig;
use latchkey_tests::daemon::Kind::{self, Latchkey, Strongswan};
use latchkey_tests::daemon::{Daemon, Files};
use latchkey_tests::scene::{A, Auth, B, Suite, configurations, hosts};

use latchkey_tests::peer::{Peer, Setting};
use latchkey_tests::wire::Wire;

/// Handshakes of each measurement.
const HANDSHAKES: usize = 500;

/// At once under way: below what makes either daemon ask for cookies from one address.
const PARALLEL: usize = 2;

/// The same where shards are compared, without cookies: enough for all of them.
const PARALLEL_OF_SHARDS: usize = 32;

/// Initiators at once where shards are compared, each with an address of its own: one thread must not be the limit.
const INITIATORS: usize = 4;

/// Neither daemon writes a log file: what it costs is not what is compared.
const SILENT: &str = "filelog {\nlog {\ndefault = -1\nike = -1\n}\n}\n";

fn main() {
    let args: Vec<String> = std::env::args().collect();
    match args.get(1).map(String::as_str) {
        Some("load") => load(FilePath::new(&args[2]), args[3].parse().unwrap(), &args[4], args[5].parse().unwrap()),
        Some("shards") => compare_shards(args.get(2).and_then(|text| text.parse().ok()).unwrap_or(3)),
        rounds => {
            let rounds = rounds.and_then(|text| text.parse().ok()).unwrap_or(3);
            compare(rounds);
            println!();
            compare_shards(rounds);
        }
    }
}

/// One shard and as many as there are processors, in turns.
fn compare_shards(rounds: usize) {
    let processors = std::thread::available_parallelism().unwrap().get();
    let mut rates: Vec<(usize, Vec<f64>, Vec<f64>)> =
        [1, processors.max(2)].into_iter().map(|shards| (shards, Vec::new(), Vec::new())).collect();
    for round in 1..=rounds {
        for (shards, rate, cpu) in &mut rates {
            eprintln!("round {round} of {rounds}: {shards} shards");
            let (of_round, cpu_of_round) = measure_shards(*shards);
            rate.push(of_round);
            cpu.push(cpu_of_round);
        }
    }
    let all = INITIATORS * HANDSHAKES;
    println!(
        "Latchkey by shards, {processors} processors for both ends: IKE_SA_INIT and IKE_AUTH without a Child SA (PSK, X25519), \
         {all} in each of {rounds} rounds by {INITIATORS} initiators, {PARALLEL_OF_SHARDS} at once each; medians"
    );
    println!("{:<50} {:>14} {:>22}", "shards", "handshakes/s", "its processor time");
    for (shards, rate, cpu) in &mut rates {
        println!("{shards:<50} {:>14.0} {:>14.2} ms each", median(rate), median(cpu));
    }
}

/// Handshakes in a second, and the daemon's processor time in milliseconds for each.
fn measure_shards(shards: usize) -> (f64, f64) {
    let suite = Suite { ike: "aes256gcm16-prfsha256-x25519", connection: "unique = never\n", ..Suite::default() };
    let [(of_a, files_a), (of_b, files_b)] = configurations(&suite);
    let (host_a, host_b) = hosts();
    let device = host_a.check("sh", &["-c", &format!("ip -o addr show to {A} | cut -d' ' -f2")]);
    let addresses: Vec<String> = (0..INITIATORS).map(|n| format!("192.0.2.{}", 101 + n)).collect();
    for address in &addresses {
        host_a.ip(&["addr", "add", &format!("{address}/24"), "dev", device.trim()]);
    }
    let folder = write(&of_a, &files_a);
    let settings = format!(
        "{SILENT}shards = {shards}\ncookie_threshold = 0\ncookie_threshold_ip = 0\nblock_threshold = 0\naddress_budget = 0\n"
    );
    let daemon = Daemon::start_empty(Latchkey, &host_b, &settings);
    daemon.write(&of_b.replace(&format!("remote_addrs = {A}"), ""), &files_b);
    daemon.control(&["--load-all"]);
    let program = std::env::current_exe().unwrap();
    let run = |count: usize| -> f64 {
        let (count, parallel) = (count.to_string(), PARALLEL_OF_SHARDS.to_string());
        let of_one = |address: &String| -> f64 {
            let args = ["load", folder.path().to_str().unwrap(), &count, address, &parallel];
            host_a.check(program.to_str().unwrap(), &args).trim().parse().unwrap()
        };
        std::thread::scope(|scope| {
            let all: Vec<_> = addresses.iter().map(|address| scope.spawn(|| of_one(address))).collect();
            all.into_iter().map(|one| one.join().unwrap()).fold(0.0, f64::max)
        })
    };
    run(20);
    let cpu = daemon.cpu_seconds();
    let seconds = run(HANDSHAKES);
    let handshakes = (INITIATORS * HANDSHAKES) as f64;
    assert_eq!(daemon.established(), INITIATORS * (HANDSHAKES + 20));
    (handshakes / seconds, (daemon.cpu_seconds() - cpu) * 1e3 / handshakes)
}

/// A `swanctl` folder.
fn write(configuration: &str, files: &Files) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in ["x509", "x509ca", "private"] {
        std::fs::create_dir(folder.path().join(name)).unwrap();
    }
    std::fs::write(folder.path().join("swanctl.conf"), configuration).unwrap();
    for (name, contents) in files {
        std::fs::write(folder.path().join(name), contents).unwrap();
    }
    folder
}

struct Case {
    name: String,
    kind: Kind,
    ike: &'static str,
    auth: Auth,
    rate: Vec<f64>,
    cpu: Vec<f64>,
    memory: Vec<f64>,
}

fn compare(rounds: usize) {
    const PLAIN: &str = "aes256gcm16-prfsha256-x25519";
    const HYBRID: &str = "aes256gcm16-prfsha256-x25519-ke1_mlkem768";
    let ecdsa = Auth::Certificates(&rcgen::PKCS_ECDSA_P256_SHA256);
    let mut cases: Vec<Case> = Vec::new();
    for (what, ike, auth, kinds) in [
        ("PSK, X25519", PLAIN, Auth::Psk, [Strongswan, Latchkey].as_slice()),
        ("ECDSA P-256, X25519", PLAIN, ecdsa, &[Strongswan, Latchkey]),
        // strongSwan has it from 6.0 on.
        ("ECDSA P-256, X25519 and ML-KEM-768", HYBRID, ecdsa, &[Latchkey]),
    ] {
        for kind in kinds {
            let name = format!("{kind:?}: {what}");
            cases.push(Case { name, kind: *kind, ike, auth, rate: vec![], cpu: vec![], memory: vec![] });
        }
    }
    for round in 1..=rounds {
        for case in &mut cases {
            eprintln!("round {round} of {rounds}: {}", case.name);
            measure(case);
        }
    }
    println!(
        "IKE_SA_INIT and IKE_AUTH without a Child SA, {HANDSHAKES} in each of {rounds} rounds, {PARALLEL} at once; medians"
    );
    println!("{:<50} {:>14} {:>22} {:>18}", "responder", "handshakes/s", "its processor time", "its memory");
    for case in cases.iter_mut().filter(|case| !case.rate.is_empty()) {
        println!(
            "{:<50} {:>14.0} {:>14.2} ms each {:>12.1} kB each",
            case.name,
            median(&mut case.rate),
            median(&mut case.cpu),
            median(&mut case.memory)
        );
    }
}

fn measure(case: &mut Case) {
    let suite = Suite { ike: case.ike, auth: case.auth, connection: "unique = never\n", ..Suite::default() };
    let [(of_a, files_a), (of_b, files_b)] = configurations(&suite);
    if Setting::written(&of_a, &files_a).is_none() {
        eprintln!("refused by the configuration");
        return;
    }
    let (host_a, host_b) = hosts();
    let folder = write(&of_a, &files_a);
    let daemon = Daemon::start_empty(case.kind, &host_b, SILENT);
    daemon.write(&of_b, &files_b);
    daemon.control(&["--load-all"]);
    let program = std::env::current_exe().unwrap();
    let run = |count: usize| -> f64 {
        let args = ["load", folder.path().to_str().unwrap(), &count.to_string(), A, &PARALLEL.to_string()];
        host_a.check(program.to_str().unwrap(), &args).trim().parse().unwrap()
    };
    run(20);
    let (cpu, memory) = (daemon.cpu_seconds(), daemon.resident());
    let seconds = run(HANDSHAKES);
    let handshakes = HANDSHAKES as f64;
    case.rate.push(handshakes / seconds);
    case.cpu.push((daemon.cpu_seconds() - cpu) * 1e3 / handshakes);
    case.memory.push((daemon.resident() as f64 - memory as f64) / handshakes);
    // What was measured is what was meant.
    assert_eq!(daemon.established(), HANDSHAKES + 20);
}

/// An initiator, inside the first host: prints how many seconds so many handshakes took.
fn load(folder: &FilePath, count: usize, address: &str, parallel: usize) {
    let setting = Setting::load(folder).unwrap();
    let wire = Wire::open(address);
    // Each handshake has an engine, found by the initiator's SPI, the first octets of every message.
    let mut initiators: BTreeMap<Vec<u8>, Peer> = BTreeMap::new();
    let (mut started, mut done) = (0, 0);
    let start = Instant::now();
    while done < count {
        assert!(start.elapsed() < Duration::from_secs(120), "{done} of {count} handshakes in two minutes");
        while started < count && initiators.len() < parallel {
            let mut initiator = Peer::new(&setting, EngineConfig::default());
            let sent = initiator.initiate(Instant::now(), address.parse().unwrap(), B.parse().unwrap(), false);
            initiators.insert(spi(&sent[0].bytes), initiator);
            wire.send(sent);
            started += 1;
        }
        if let Some((path, bytes)) = wire.receive(Duration::from_millis(500)) {
            let spi = spi(&bytes);
            if let Some(initiator) = initiators.get_mut(&spi) {
                wire.send(initiator.receive(Instant::now(), path, &bytes));
                assert_eq!(initiator.failed, 0);
                if initiator.done == 1 {
                    initiators.remove(&spi);
                    done += 1;
                }
            }
        }
        for initiator in initiators.values_mut() {
            initiator.engine.handle_timeout(Instant::now());
            wire.send(initiator.outputs(Instant::now()));
        }
    }
    println!("{}", start.elapsed().as_secs_f64());
}

fn spi(message: &[u8]) -> Vec<u8> {
    message[..8].to_vec()
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
