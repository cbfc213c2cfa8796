//! A running daemon under bad input: neither its state nor its memory changes.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::fs;
use std::time::Duration;

use latchkey_tests::daemon::Daemon;
use latchkey_tests::daemon::Kind::Latchkey;
use latchkey_tests::host::wait_for;
use latchkey_tests::scene::{INNER_A, INNER_B, Scene, Suite, configurations, hosts};

/// Sends from inside a host's namespace by a program of the system, since a test's own thread is outside.
const SENDER: &str = r#"
import os, random, socket, sys
kind, target, count, seed = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
rng = random.Random(seed)
if kind == "udp":
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    header = lambda: rng.randbytes(16) + bytes([rng.choice([0, 33, 34, 35, 41, 46, 53, 255]), 0x20,
        rng.choice([34, 35, 36, 37, 43, 200]), rng.choice([0, 8, 0x20, 0x28])]) + rng.randbytes(4)
    for i in range(count):
        shape = rng.randrange(4)
        data = rng.randbytes(rng.randrange(0, 1400))
        if shape == 0:
            pass
        elif shape == 1:
            data = header() + (28 + len(data)).to_bytes(4, "big") + data
        elif shape == 2:
            data = b"\0\0\0\0" + header() + (28 + len(data)).to_bytes(4, "big") + data
        else:
            data = rng.randbytes(8) + bytes(8) + bytes([33, 0x20, 34, 8]) + bytes(4) + (28 + len(data)).to_bytes(4, "big") + data
        sock.sendto(data, (target, rng.choice([500, 4500])))
        if i % 500 == 0:
            import time; time.sleep(0.005)
else:
    for i in range(count):
        sock = socket.create_connection((target, 4500), timeout=5)
        shape = rng.randrange(6)
        data = [b"", rng.randbytes(6), b"IKE", b"IKETCP" + rng.randbytes(rng.randrange(0, 600)),
                b"IKETCP" + b"\xff\xff" + rng.randbytes(100), b"IKETCP" + b"\0\1"][shape]
        try:
            sock.sendall(data)
        except OSError:
            pass
        if rng.randrange(2):
            sock.close()
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            sock.close()
"#;

#[test]
fn random_datagrams_and_broken_streams_change_nothing() {
    let mut scene = Scene::works(Latchkey, Latchkey, &Suite::default());
    let script = scene.a.path("sender.py");
    fs::write(&script, SENDER).unwrap();
    let script = script.to_str().unwrap().to_owned();
    let send = |kind: &str, count: &str, seed: &str| {
        scene.host_a.check("python3", &[&script, kind, "192.0.2.2", count, seed]);
    };
    let facts = |sas: &str| {
        let mut facts: Vec<String> = Vec::new();
        for key in ["initiator-spi=", "responder-spi=", "spi-in=", "spi-out=", "state="] {
            facts.extend(sas.match_indices(key).map(|(at, _)| sas[at..].split(' ').next().unwrap().to_owned()));
        }
        facts
    };
    let before = facts(&scene.b.sas());
    // The first part fills caches and pools; what comes after must not add to it.
    send("udp", "20000", "1");
    send("tcp", "200", "1");
    let warm = scene.b.resident();
    send("udp", "80000", "2");
    send("tcp", "800", "2");
    assert!(scene.b.is_running(), "{}", scene.b.output());
    // Half-open IKE SAs of forged IKE_SA_INITs are gone after their time; the established one is untouched.
    wait_for("only the established SA is left", Duration::from_secs(60), || facts(&scene.b.sas()) == before);
    let after = scene.b.resident();
    assert!(after < warm + 8 * 1024, "memory grew from {warm} kB to {after} kB");
    scene.passes();
    assert!(scene.host_a.pings(INNER_A, INNER_B));
}

/// Sends well-formed IKE_SA_INIT requests in the name of others on the link, until it is ended.
const FORGER: &str = r#"
import random, socket, struct, sys, time
rng = random.Random(1)
target = socket.inet_aton("192.0.2.2")
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
def payload(following, body):
    return struct.pack(">BBH", following, 0, 4 + len(body)) + body
def transform(last, kind, number, attribute=b""):
    return struct.pack(">BBHBBH", last, 0, 8 + len(attribute), kind, 0, number) + attribute
transforms = transform(3, 1, 20, struct.pack(">HH", 0x800e, 256)) + transform(3, 2, 6) + transform(0, 4, 31)
proposal = struct.pack(">BBHBBBB", 0, 0, 8 + len(transforms), 1, 1, 0, 3) + transforms
while True:
    for _ in range(20):
        body = payload(34, proposal) + payload(40, struct.pack(">HH", 31, 0) + rng.randbytes(32)) + payload(0, rng.randbytes(32))
        message = rng.randbytes(8) + bytes(8) + bytes([33, 0x20, 34, 8]) + bytes(4) + struct.pack(">I", 28 + len(body)) + body
        datagram = struct.pack(">HHHH", 500, 500, 8 + len(message), 0) + message
        source = socket.inet_aton("192.0.2.%d" % rng.randrange(10, 250))
        header = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(datagram), 0, 0, 64, 17, 0) + source + target
        raw.sendto(header + datagram, ("192.0.2.2", 0))
    time.sleep(0.05)
"#;

// RFC 7296 §2.6, RFC 8019 §3: forged requests from many addresses do not keep a legitimate initiator out.
#[test]
fn a_flood_of_forged_requests_keeps_nobody_out() {
    let (host_a, host_b) = hosts();
    let [(of_a, files_a), (of_b, files_b)] = configurations(&Suite::default());
    // A gateway for whoever comes.
    let of_b = of_b.replace("remote_addrs = 192.0.2.1", "remote_addrs = %any");
    let b = Daemon::start(Latchkey, &host_b, &of_b, &files_b);
    let a = Daemon::start(Latchkey, &host_a, &of_a, &files_a);
    let scene = Scene { a, b, host_a, host_b };
    let script = scene.a.path("forger.py");
    fs::write(&script, FORGER).unwrap();
    let forger = scene.host_a.spawn("python3", &[script.to_str().unwrap()]);
    let half_open = || scene.b.sas().matches("CONNECTING").count();
    wait_for("cookies are demanded", Duration::from_secs(60), || half_open() >= 30);
    scene.a.initiate("net");
    scene.passes();
    // What has no cookie makes no state: a few more than the threshold come in over time, as others go.
    assert!(half_open() < 100, "{} half-open IKE SAs", half_open());
    assert!(scene.a.established() == 1 && scene.b.established() == 1);
    drop(forger);
    wait_for("the half-open IKE SAs are gone", Duration::from_secs(90), || half_open() == 0);
    scene.passes();
}
