//! What SAs cost the tables by their number: installing, retiring and deleting one, and finding the one that a packet goes
//! into: `cargo bench -p latchkey-ipsec`.

use std::hint::black_box;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Instant;

use latchkey_ipsec::datapath::{DataPath, Outbound};
use latchkey_ipsec::guard::{ClassId, NoLatches};
use latchkey_ipsec::plane::{Encapsulation, EspKeys, EspSuite, Lifetime, Mode, SaPair, TfcPadding};
use latchkey_ipsec::secret::Secret;
use latchkey_ipsec::selector::TrafficSelector;
use latchkey_ipsec::transform::{Encr, Integ};

/// Changes and packets that are timed at each size.
const CHANGES: u32 = 1000;
const PACKETS: u32 = 200_000;

fn main() {
    println!("one change of the tables, and one packet of 92 octets sealed, by the number of SAs");
    println!(
        "{:>8} {:>10} {:>10} {:>10} {:>14} {:>14}",
        "SAs", "install", "retire", "delete", "out, host", "out, network"
    );
    for count in [1, 1000, 10_000, 100_000] {
        let plane = DataPath::new(Arc::new(NoLatches));
        for n in 0..count {
            plane.install(pair(n)).unwrap_or_else(|error| panic!("{error}"));
        }
        let each = |change: &dyn Fn(u32)| {
            let start = Instant::now();
            (count..count + CHANGES).for_each(change);
            start.elapsed() / CHANGES
        };
        let install = each(&|n| plane.install(pair(n)).unwrap_or_else(|error| panic!("{error}")));
        let retire = each(&|n| plane.retire(256 + n).unwrap_or_else(|error| panic!("{error}")));
        let delete = each(&|n| plane.delete(256 + n).unwrap_or_else(|error| panic!("{error}")));
        let host = packets(&plane, count, 0);
        let network = packets(&plane, count, 1);
        println!("{count:>8} {install:>10.1?} {retire:>10.1?} {delete:>10.1?} {host:>11.0} ns {network:>11.0} ns");
    }
}

/// Nanoseconds for a packet to the host (even numbers) or into the network (odd ones) of an SA.
fn packets(plane: &DataPath, count: u32, parity: u32) -> f64 {
    let mut out = Vec::new();
    let now = Instant::now();
    let start = Instant::now();
    for n in 0..PACKETS {
        let which = (n.wrapping_mul(2_654_435_761) % count) & !1 | parity.min(count - 1);
        let outbound = plane.outbound(now, &packet(remote(which)), &mut out);
        assert!(matches!(black_box(outbound), Outbound::Send { .. }), "SA {which}");
    }
    start.elapsed().as_secs_f64() * 1e9 / f64::from(PACKETS)
}

/// Every second SA is for a host, the others for networks of two lengths.
fn remote(n: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(0x0a00_0000 + (n << 6))
}

fn pair(n: u32) -> SaPair {
    let outer = IpAddr::V4(Ipv4Addr::from_bits(0xc612_0000 + n % 60_000));
    let prefix = match n % 4 {
        1 => 28,
        3 => 27,
        _ => 32,
    };
    let keys = || EspKeys { encr: Secret::new(vec![7; 20]), integ: Secret::new(Vec::new()) };
    SaPair {
        spi_in: 256 + n,
        spi_out: 256 + n,
        reqid: n + 1,
        class: ClassId(1),
        mode: Mode::Tunnel,
        suite: EspSuite { encr: Encr::AES_GCM_16, key_bits: 128, integ: Integ::NONE, esn: true },
        keys_in: keys(),
        keys_out: keys(),
        encapsulation: Encapsulation::None { local: IpAddr::V4(Ipv4Addr::LOCALHOST), remote: outer },
        local_ts: TrafficSelector::network(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0).into_iter().collect(),
        remote_ts: TrafficSelector::network(IpAddr::V4(remote(n)), prefix).into_iter().collect(),
        replay_window: 32,
        lifetime: Lifetime::default(),
        copy_df: true,
        copy_ecn: true,
        await_peer: false,
        tfc: TfcPadding::None,
        options: latchkey_ipsec::plane::KernelOptions::default(),
    }
}

/// A UDP packet of 64 octets of payload.
fn packet(to: Ipv4Addr) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 92, 0, 0, 0, 0, 64, 17, 0, 0, 192, 168, 0, 1];
    packet.extend_from_slice(&to.octets());
    packet.extend_from_slice(&[0, 9, 0, 53, 0, 72, 0, 0]);
    packet.resize(92, 0);
    packet
}
