//! TCP encapsulation in figures; see `tests/bench/tcp`.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a benchmark fails by panicking")]

use std::process::Stdio;
use std::thread::sleep;
use std::time::{Duration, Instant};

use latchkey_tests::daemon::program;
use latchkey_tests::host::{Host, link, wait_for};
use latchkey_tests::middlebox::{B, Road};
use latchkey_tests::pki::Authority;
use latchkey_tests::scene::{INNER_A, INNER_B, Suite};

/// Seconds of each iperf3 run.
const SECONDS: &str = "4";

fn main() {
    let hostile = std::env::args().nth(1).unwrap_or_else(|| "10000".to_owned());
    let only = std::env::args().nth(2);
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new("TLS CA", &rcgen::PKCS_ECDSA_P256_SHA256);
    let site = authority.issue_for_tls("b.example");
    let (cert, key) = (folder.path().join("site.pem"), folder.path().join("site.key"));
    std::fs::write(&cert, &site.certificate).unwrap();
    std::fs::write(&key, &site.key).unwrap();
    let settings = format!("tls_ports = 443\ntls_cert = {}\ntls_key = {}\n", cert.display(), key.display());

    println!("AES-128-GCM, {SECONDS} s of iperf3 TCP through a router; pings of 64 octets every 10 ms meanwhile");
    println!("{:<28} {:>16} {:>10} {:>14} {:>14}", "", "path", "Mbit/s", "ping ms, med.", "ping ms, max.");
    // Of single packets, as on a wire, or of what Linux passes on between namespaces as one: up to 64 KiB of one connection.
    for (label, one_by_one, loss, kbit) in [
        ("free", false, "", 0),
        ("10 Mbit/s", false, "", 10_000),
        ("2 Mbit/s", false, "", 2000),
        ("one by one", true, "", 0),
        ("0.1 % loss", true, "numgen random mod 1000 < 1 drop;", 0),
        ("1 % loss", true, "numgen random mod 100 < 1 drop;", 0),
        ("1 % of bursts", false, "numgen random mod 100 < 1 drop;", 0),
    ] {
        if only.as_ref().is_some_and(|only| only != label) {
            continue;
        }
        for (name, connection) in [
            ("plain TCP, no tunnel", ""),
            ("Latchkey over UDP", "tcp = no\nencap = yes\n"),
            ("Latchkey over TCP", "tcp = yes\n"),
            ("Latchkey over TLS", "tcp = tls\n"),
        ] {
            let road = Road::with(&Suite { connection, ..Suite::DEFAULT }, B, &settings);
            std::fs::write(road.a.path("swanctl/x509ca/ca.pem"), authority.certificate()).unwrap();
            road.a.control(&["--load-creds"]);
            let ends = if connection.is_empty() {
                (latchkey_tests::middlebox::A, B)
            } else {
                road.a.initiate("net");
                (INNER_A, INNER_B)
            };
            if one_by_one {
                road.one_by_one();
            }
            if !loss.is_empty() {
                road.drop_forwarded(loss);
            }
            if kbit > 0 {
                road.slow_down(kbit);
            }
            let (rate, median, longest) = throughput(&road, ends);
            println!("{name:<28} {label:>16} {rate:>10.1} {median:>14.2} {longest:>14.1}");
        }
    }
    if only.is_none() {
        set_up();
        torture(&hostile);
    }
}

fn throughput(road: &Road, (from, to): (&str, &str)) -> (f64, f64, f64) {
    let _server = road.host_b.spawn("iperf3", &["-s", "-B", to]);
    sleep(Duration::from_millis(500));
    let ping = road.host_a.command("ping", &["-i", "0.01", "-c", "400", "-W", "2", "-I", from, to]);
    let ping = { ping }.stdout(Stdio::piped()).spawn().unwrap();
    let report = road.host_a.check("iperf3", &["-c", to, "-B", from, "-t", SECONDS, "-f", "m"]);
    let line = report.lines().find(|line| line.contains("receiver")).unwrap();
    let words: Vec<&str> = line.split_whitespace().collect();
    let rate = words[words.iter().position(|word| *word == "Mbits/sec").unwrap() - 1].parse().unwrap();
    let output = ping.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let mut times: Vec<f64> = text
        .split("time=")
        .skip(1)
        .filter_map(|rest| rest.split(' ').next().and_then(|time| time.parse().ok()))
        .collect();
    times.sort_by(f64::total_cmp);
    (rate, times.get(times.len() / 2).copied().unwrap_or(f64::NAN), times.last().copied().unwrap_or(f64::NAN))
}

fn set_up() {
    for (name, filter) in [
        ("UDP works", ""),
        ("UDP dropped", "meta l4proto udp drop;"),
        ("UDP rejected", "meta l4proto udp reject with icmp type admin-prohibited;"),
        ("UDP 4500 dropped", "udp dport 4500 drop; udp sport 4500 drop;"),
    ] {
        let mut times: Vec<f64> = (0..5)
            .map(|_| {
                let road = Road::start(&Suite::DEFAULT, B);
                if !filter.is_empty() {
                    road.drop_forwarded(filter);
                }
                let start = Instant::now();
                road.a.initiate("net");
                start.elapsed().as_secs_f64()
            })
            .collect();
        times.sort_by(f64::total_cmp);
        println!("set-up, {name}: {:.2} s (median of 5, {:.2} to {:.2})", times[2], times[0], times[4]);
    }
}

/// Hostile connections, as many as there may be, for 30 s, beside a tunnel.
fn torture(count: &str) {
    let road = Road::start(&Suite { connection: "tcp = yes\ndpd_delay = 5s\n", ..Suite::DEFAULT }, B);
    road.a.initiate("net");
    let enemy = Host::new();
    link(&enemy, "203.0.113.1/24", &road.host_b, "203.0.113.2/24");
    enemy.ip(&["route", "add", "local", "198.18.0.0/15", "dev", "lo"]);
    road.host_b.ip(&["route", "add", "198.18.0.0/15", "via", "203.0.113.1"]);
    let (before, cpu) = (road.b.resident(), road.b.cpu_seconds());
    let mut hostile = enemy.command(program("hostile").to_str().unwrap(), &["203.0.113.2:4500", count, "30", "2000"]);
    let hostile = hostile.stdout(Stdio::piped()).spawn().unwrap();
    sleep(Duration::from_secs(8));
    let pings = road.host_a.check("ping", &["-q", "-i", "0.01", "-c", "1500", "-I", INNER_A, INNER_B]);
    let most = road.b.resident();
    let spent = road.b.cpu_seconds() - cpu;
    let output = hostile.wait_with_output().unwrap();
    println!("{count} hostile clients of 2000 addresses for 30 s: {}", String::from_utf8_lossy(&output.stdout).trim());
    println!(
        "the tunnel beside: {}",
        pings.lines().filter(|line| line.contains("loss") || line.contains("rtt")).collect::<Vec<_>>().join("; ")
    );
    println!("the responder: {before} kB before, {most} kB meanwhile, {spent:.1} s of processor in about 25 s");
    wait_for("nothing but the tunnel's stream", Duration::from_secs(60), || {
        road.host_b.check("ss", &["-Htn", "state", "established", "sport", "=", ":4500"]).lines().count() == 1
    });
    println!("afterwards: {} kB", road.b.resident());
}
