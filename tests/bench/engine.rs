//! What the engine itself can do, on one core and without a network; see `tests/bench/ike`.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a benchmark fails by panicking")]

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, Instant};

use ike::config::PuzzlePolicy;
use ike::engine::{EngineConfig, Path, Transmit, Transport};
use latchkey_tests::scene::{A, Auth, B, Suite, configurations};

use latchkey_tests::peer::{Noise, Peer, Setting};

/// Handshakes before anything is measured.
const WARM_UP: usize = 20;

/// Initiators that are made before they are measured.
const BATCH: usize = 200;

fn main() {
    let most: usize = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(100_000);
    // First, before freed memory hides the growth.
    memory(most);
    handshakes();
    flood();
}

fn handshakes() {
    const PLAIN: &str = "aes256gcm16-prfsha256-x25519";
    const HYBRID: &str = "aes256gcm16-prfsha256-x25519-ke1_mlkem768";
    let ecdsa = Auth::Certificates(&rcgen::PKCS_ECDSA_P256_SHA256);
    println!("\nOne handshake with one Child SA, both ends in one thread; processor time of the thread");
    println!(
        "{:<38} {:>12} {:>12} {:>20} {:>18}",
        "", "initiator", "responder", "responder, per core", "without its jobs"
    );
    for (name, ike, auth) in [
        ("PSK, X25519", PLAIN, Auth::Psk),
        ("PSK, X25519 and ML-KEM-768", HYBRID, Auth::Psk),
        ("ECDSA P-256, X25519", PLAIN, ecdsa),
        ("ECDSA P-256, X25519 and ML-KEM-768", HYBRID, ecdsa),
        ("PSK, ML-KEM-768 alone", "aes256gcm16-prfsha256-mlkem768", Auth::Psk),
        ("PSK, MODP-3072", "aes256gcm16-prfsha256-modp3072", Auth::Psk),
    ] {
        let Some([a, b]) = settings(ike, auth) else {
            println!("{name:<38} refused by the configuration");
            continue;
        };
        let initiators = |count| -> Vec<Peer> { (0..count).map(|_| Peer::new(&a, EngineConfig::default())).collect() };
        let mut responder = Peer::new(&b, EngineConfig::default());
        for mut initiator in initiators(WARM_UP) {
            handshake(&mut initiator, &mut responder);
        }
        let (mut count, mut cpu) = (0, Duration::ZERO);
        responder.jobs = Duration::ZERO;
        let mut wall = [Duration::ZERO; 2];
        while cpu < Duration::from_secs(3) {
            let batch = initiators(BATCH);
            let start = thread_cpu();
            for mut initiator in batch {
                let of_one = handshake(&mut initiator, &mut responder);
                wall = [wall[0] + of_one[0], wall[1] + of_one[1]];
                count += 1;
            }
            cpu += thread_cpu() - start;
        }
        // The processor time, which other programs do not disturb, in the proportion of the times by the clock.
        let each = cpu.as_secs_f64() / f64::from(count);
        let share = wall[1].as_secs_f64() / (wall[0] + wall[1]).as_secs_f64();
        let engine = each * share * (1.0 - responder.jobs.as_secs_f64() / wall[1].as_secs_f64());
        let (initiator, responder) = (each * (1.0 - share) * 1e6, each * share * 1e6);
        let rate = 1e6 / responder;
        println!("{name:<38} {initiator:>9.0} us {responder:>9.0} us {rate:>18.0}/s {:>15.0} us", engine * 1e6);
    }
}

/// One handshake; the time that each end took.
fn handshake(initiator: &mut Peer, responder: &mut Peer) -> [Duration; 2] {
    let mut wall = [Duration::ZERO; 2];
    let start = Instant::now();
    let mut sent = initiator.initiate(start, A.parse().unwrap(), B.parse().unwrap(), true);
    wall[0] += start.elapsed();
    let mut to = 1;
    while !sent.is_empty() {
        let start = Instant::now();
        let receiver = if to == 0 { &mut *initiator } else { &mut *responder };
        sent = sent.iter().flat_map(|message| receiver.receive(start, arrival(message), &message.bytes)).collect();
        wall[to] += start.elapsed();
        to = 1 - to;
    }
    assert_eq!(initiator.done, 1, "the handshake did not end");
    wall
}

/// The path of a message as its receiver sees it.
fn arrival(message: &Transmit) -> Path {
    Path { local: message.path.remote, remote: message.path.local, transport: message.path.transport }
}

fn settings(ike: &'static str, auth: Auth) -> Option<[Setting; 2]> {
    // Else each new IKE SA of the peer replaces the one before (INITIAL_CONTACT).
    let [a, b] = configurations(&Suite { ike, auth, connection: "unique = never\n", ..Suite::default() });
    Some([Setting::written(&a.0, &a.1)?, Setting::written(&b.0, &b.1)?])
}

fn flood() {
    println!("\nForged IKE_SA_INIT requests, each from another address with another SPI (X25519); no puzzles");
    let [(of_a, files_a), (of_b, files_b)] =
        configurations(&Suite { ike: "aes256gcm16-prfsha256-x25519", ..Suite::default() });
    let a = Setting::written(&of_a, &files_a).unwrap();
    let b = Setting::written(&of_b.replace(&format!("remote_addrs = {A}"), ""), &files_b).unwrap();
    let now = Instant::now();
    let request = Peer::new(&a, EngineConfig::default()).initiate(now, A.parse().unwrap(), B.parse().unwrap(), true);
    let request = &request.first().unwrap().bytes;
    for (name, cookie_threshold, block_threshold, batch) in
        [("without cookies, up to the half-open limit", usize::MAX, 0, 4_000), ("with cookies", 0, 5, 200_000)]
    {
        let config = EngineConfig {
            cookie_threshold,
            cookie_threshold_ip: cookie_threshold,
            block_threshold,
            address_budget: 0,
            puzzles: PuzzlePolicy { threshold: usize::MAX, ..PuzzlePolicy::default() },
            ..EngineConfig::default()
        };
        let mut noise = Noise::default();
        let (mut count, mut answers) = (0, 0);
        let mut time = Duration::ZERO;
        while time < Duration::from_secs(3) {
            // A new engine for each batch: there is a limit of half-open IKE SAs.
            let mut responder = Peer::new(&b, config.clone());
            let forged: Vec<(Path, Vec<u8>)> = (0..batch).map(|_| forge(request, &mut noise)).collect();
            let start = thread_cpu();
            for (path, bytes) in &forged {
                answers += responder.receive(now, *path, bytes).len();
            }
            time += thread_cpu() - start;
            count += batch;
        }
        let each = time.as_secs_f64() / f64::from(count);
        println!("{name:<43} {:>9.2} us {:>9.0}/s per core, {answers} of {count} answered", each * 1e6, 1.0 / each);
    }
}

fn forge(request: &[u8], noise: &mut Noise) -> (Path, Vec<u8>) {
    let mut bytes = request.to_vec();
    bytes[..8].copy_from_slice(&(noise.number() | 1).to_be_bytes());
    let [_, a, b, c, ..] = noise.number().to_be_bytes();
    let remote = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, a, b, c)), 500);
    (Path { local: SocketAddr::new(B.parse().unwrap(), 500), remote, transport: Transport::Udp }, bytes)
}

/// Growth of a responder with the number of its established IKE SAs, each with a Child SA; PSK.
fn memory(most: usize) {
    println!(
        "\nMemory of a responder's engine for each established IKE SA with one Child SA (growth of the resident set)"
    );
    let [a, b] = settings("aes256gcm16-prfsha256-x25519", Auth::Psk).unwrap();
    let mut responder = Peer::new(&b, EngineConfig::default());
    let mut made = 0;
    let (to_initiators, from_responder) = mpsc::channel();
    let (to_responder, from_initiators) = mpsc::channel();
    // A thread of their own, and so memory of their own: the holes that they leave are none of the responder's.
    std::thread::spawn(move || initiators(&a, &from_responder, &to_responder));
    let connect = |responder: &mut Peer| {
        loop {
            let sent: Vec<Transmit> = from_initiators.recv().unwrap();
            if sent.is_empty() {
                return;
            }
            let now = Instant::now();
            let answers = sent.iter().flat_map(|message| responder.receive(now, arrival(message), &message.bytes));
            to_initiators.send(answers.collect::<Vec<Transmit>>()).unwrap();
        }
    };
    for _ in 0..WARM_UP {
        connect(&mut responder);
    }
    let before = resident();
    for target in [1_000, 10_000, 100_000].into_iter().filter(|target| *target <= most) {
        while made < target {
            connect(&mut responder);
            made += 1;
        }
        let (each, all) = ((resident() - before) / made, resident() >> 20);
        let start = Instant::now();
        let up = responder.engine.ike_sas(start).iter().filter(|sa| !sa.children.is_empty()).count();
        let listed = start.elapsed().as_secs_f64() * 1e6 / up as f64;
        assert_eq!(up, made + WARM_UP, "not all of them stayed");
        println!("{made:>8} IKE SAs {each:>9} octets each, {all} MB in all; a snapshot takes {listed:.1} us each");
    }
}

/// One initiator after the other, until nobody listens; says nothing when it is up.
fn initiators(setting: &Setting, from_responder: &Receiver<Vec<Transmit>>, to_responder: &Sender<Vec<Transmit>>) {
    loop {
        let mut initiator = Peer::new(setting, EngineConfig::default());
        let mut sent = initiator.initiate(Instant::now(), A.parse().unwrap(), B.parse().unwrap(), true);
        loop {
            let over = sent.is_empty();
            if to_responder.send(sent).is_err() {
                return;
            }
            if over {
                break;
            }
            let Ok(answers) = from_responder.recv() else { return };
            let now = Instant::now();
            sent = answers.iter().flat_map(|one| initiator.receive(now, arrival(one), &one.bytes)).collect();
        }
        assert_eq!(initiator.done, 1, "the handshake did not end");
    }
}

/// Octets of the resident set.
fn resident() -> usize {
    const PAGE: usize = 4096;
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * PAGE
}

/// Processor time of this thread.
fn thread_cpu() -> Duration {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(stat.split(' ').next().unwrap().parse().unwrap())
}
