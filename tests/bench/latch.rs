//! What latches cost apart from the check of each packet (`cargo bench -p latchkey-latch`): making one, its memory, and how
//! long a break takes, with and without the system's policies. `tests/bench/latch` runs both.
//!
//! Arguments: most latches in the database, most with policies of the system.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a tool for developers")]

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ipsec::guard::{ClassId, Direction, FlowBarrier, FlowGuard, Verdict};
use ipsec::plane::{EspSuite, Mode};
use ipsec::selector::{Flow, TrafficSelector};
use ipsec::transform::{Encr, Integ};
use kernel::netns::Namespace;
use kernel::network::{Network, NetworkConfig};
use latch::database::{Class, Database, Request};
use pad::{Identity, IdentityPattern, PeerIdentity, Proof};

const PAGE: usize = 4096;

fn main() {
    let mut arguments = std::env::args().skip(1).map(|text| text.parse::<u32>().expect("a number of latches"));
    let (most, most_barred) = (arguments.next().unwrap_or(1_000_000), arguments.next().unwrap_or(4000));
    println!(
        "{:<10} {:<8} {:>12} {:>12} {:>16} {:>16} {:>20}",
        "latches", "policies", "made in", "memory", "break of one", "break of all", "last packet passed"
    );
    for latches in sizes(most) {
        figures(latches, None);
    }
    let host = Namespace::new().expect("this makes a network namespace: run it as root");
    host.run(|| {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let guard = Arc::new(Database::new());
            let (network, _events) = Network::start(NetworkConfig::default(), guard).await.unwrap();
            let barrier = network.barrier().expect("this kernel has no IPsec policies (module xfrm_user)");
            for latches in sizes(most_barred) {
                figures(latches, Some(&barrier));
            }
        });
    })
    .unwrap();
}

fn sizes(most: u32) -> impl Iterator<Item = u32> {
    [10, 1000, 10_000, 1_000_000].into_iter().filter(move |size| *size < most).chain([most])
}

fn figures(latches: u32, barrier: Option<&Arc<dyn FlowBarrier>>) {
    let database = Arc::new(Database::new());
    if let Some(barrier) = barrier {
        database.set_barrier(Arc::clone(barrier));
    }
    let (ours, theirs) = (class(&database, "peer.example"), class(&database, "other.example"));
    let everything: Vec<_> = TrafficSelector::network(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0).into_iter().collect();
    database.installed(1, ours, everything.clone(), everything.clone()).unwrap();

    let before = resident();
    let start = Instant::now();
    let made: Vec<_> = (0..latches)
        .map(|n| database.create(flow(n), &Request::peer(IdentityPattern::any()), Box::new(|_| {})).unwrap().0)
        .collect();
    let making = start.elapsed() / latches;
    let memory = resident().saturating_sub(before) / usize::try_from(latches).unwrap();

    // A thread of the data plane that never rests: when the last packet of a broken flow passed.
    let (of_one, last) = watched(&database, ours, || {
        let (local, remote) = TrafficSelector::of_flow(&flow(0));
        assert_eq!(database.before_install(theirs, &[local], &[remote]).unwrap().len(), 1);
    });
    let start = Instant::now();
    let broken = database.before_install(theirs, &everything, &everything).unwrap().len();
    let of_all = start.elapsed();
    assert_eq!(broken + 1, made.len());
    println!(
        "{latches:<10} {:<8} {making:>12.1?} {memory:>10} B {of_one:>16.1?} {of_all:>16.1?} {:>20}",
        if barrier.is_some() { "yes" } else { "no" },
        last.map_or("before the call".to_owned(), |last| format!("{last:.1?} after it"))
    );
    for latch in made {
        database.release(latch);
    }
    database.lift_abandoned(|_| true);
}

/// How long `decide` takes, and how long after its beginning the last packet of the first flow passed.
fn watched(database: &Arc<Database>, class: ClassId, decide: impl FnOnce()) -> (Duration, Option<Duration>) {
    let (stop, ready) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let packets = std::thread::spawn({
        let (database, stop, ready) = (Arc::clone(database), Arc::clone(&stop), Arc::clone(&ready));
        move || {
            let mut last = None;
            while !stop.load(Ordering::Relaxed) {
                if database.check(Direction::Outbound, &flow(0), Some(class)) == Verdict::Pass {
                    last = Some(Instant::now());
                }
                ready.store(true, Ordering::Relaxed);
            }
            last
        }
    });
    while !ready.load(Ordering::Relaxed) {
        std::thread::yield_now();
    }
    let start = Instant::now();
    decide();
    let took = start.elapsed();
    std::thread::sleep(Duration::from_millis(10));
    stop.store(true, Ordering::Relaxed);
    (took, packets.join().unwrap().and_then(|last| last.checked_duration_since(start)))
}

fn class(database: &Database, peer: &str) -> ClassId {
    let peer = PeerIdentity {
        id: Identity::Fqdn(peer.into()),
        local_id: Identity::Fqdn("us.example".into()),
        proof: Proof::PreSharedKey,
        entry: "net".into(),
    };
    let suite = EspSuite { encr: Encr::AES_GCM_16, key_bits: 128, integ: Integ::NONE, esn: true };
    database.intern(Class { peer: Arc::new(peer), mode: Mode::Tunnel, suite, replay_protection: true })
}

/// 1000 ports on each of many remote hosts.
fn flow(n: u32) -> Flow {
    Flow {
        protocol: 6,
        local: IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
        local_port: u16::try_from(n % 1000).unwrap() + 1000,
        remote: IpAddr::V4(Ipv4Addr::from(0x0a00_0000 + n / 1000)),
        remote_port: 443,
    }
}

fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * PAGE
}
