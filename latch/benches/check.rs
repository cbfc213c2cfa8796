//! Nanoseconds of a processor that the latch check costs a packet, by the number of latches: `cargo bench -p latchkey-latch`. What
//! others do on the machine does not count, but for the caches that they empty.

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipsec::guard::{ClassId, Direction, FlowGuard, Verdict};
use ipsec::plane::{EspSuite, Mode};
use ipsec::selector::{Flow, TrafficSelector};
use ipsec::transform::{Encr, Integ};
use latchkey_latch::database::{Class, Database, Request};
use pad::{Identity, IdentityPattern, PeerIdentity, Proof};

const CHECKS: u32 = 4_000_000;

fn main() {
    println!("nanoseconds; latched: each packet of another flow, and 16 packets of each");
    println!("{:>9} latches  {:>8}  {:>8}  {:>12}  {:>9}", "", "latched", "of 16", "not latched", "fragment");
    for latches in [0, 10, 10_000, 1_000_000] {
        let database = Database::new();
        let peer = PeerIdentity {
            id: Identity::Fqdn("peer.example".into()),
            local_id: Identity::Fqdn("us.example".into()),
            proof: Proof::PreSharedKey,
            entry: "net".into(),
        };
        let suite = EspSuite { encr: Encr::AES_GCM_16, key_bits: 128, integ: Integ::NONE, esn: true };
        let class = database.intern(Class { peer: Arc::new(peer), mode: Mode::Tunnel, suite, replay_protection: true });
        let everything: Vec<_> = TrafficSelector::network(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0).into_iter().collect();
        assert!(database.installed(1, class, everything.clone(), everything.clone()).is_ok(), "an SA of somebody");
        for n in 0..latches {
            assert!(
                database.create(flow(n), &Request::peer(IdentityPattern::any()), Box::new(|_| {})).is_ok(),
                "latch {n}"
            );
        }
        let nth = |n| flow(order(n) % latches.max(1));
        let latched = measure(&database, nth, class);
        let of_16 = measure(&database, |n| nth(n / 16), class);
        let unlatched = measure(&database, |n| Flow { protocol: 17, ..flow(order(n)) }, class);
        let fragment = measure(&database, |n| Flow { local_port: 0, remote_port: 0, ..flow(order(n)) }, class);
        println!("{latches:>9} latches  {latched:>8.1}  {of_16:>8.1}  {unlatched:>12.1}  {fragment:>9.1}");
        let asked = Instant::now();
        assert!(
            database.before_install(class, &everything, &everything).is_ok_and(|broken| broken.is_empty()),
            "a congruent SA breaks nothing"
        );
        println!("{:>9}          before_install took {:?}", "", asked.elapsed());
    }
}

/// An order that caches cannot guess.
fn order(n: u32) -> u32 {
    n.wrapping_mul(2_654_435_761) >> 8
}

/// Mean time of one check, less that of making the flow.
fn measure(database: &Database, flow: impl Fn(u32) -> Flow, class: ClassId) -> f64 {
    let start = processor_time();
    for n in 0..CHECKS {
        black_box(flow(black_box(n)));
    }
    let making = processor_time().saturating_sub(start);
    let start = processor_time();
    for n in 0..CHECKS {
        let verdict = database.check(Direction::Inbound, &flow(black_box(n)), Some(class));
        assert!(verdict == Verdict::Pass, "a congruent packet passes");
    }
    processor_time().saturating_sub(start).saturating_sub(making).as_secs_f64() * 1e9 / f64::from(CHECKS)
}

/// What this thread has used.
fn processor_time() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanoseconds = text.split_whitespace().next().and_then(|number| number.parse().ok());
    Duration::from_nanos(nanoseconds.unwrap_or_default())
}

/// 1000 ports on each of many remote hosts.
fn flow(n: u32) -> Flow {
    let port = u16::try_from(n % 1000).unwrap_or_default() + 1000;
    Flow {
        protocol: 6,
        local: IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
        local_port: port,
        remote: IpAddr::V4(Ipv4Addr::from(0x0a00_0000 + n / 1000)),
        remote_port: 443,
    }
}
