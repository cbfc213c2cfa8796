//! Measures how fast SA pairs go into the kernel when so many are there already: `sas [STEP...]`, by default 0, 1000 and
//! 10000. Needs root and a kernel with ESP; `tests/bench/kernel` runs it in a guest. Each line is printed when it is known,
//! so that a limit of time (`timeout`) leaves those before it.
#![allow(clippy::unwrap_used, reason = "a tool for developers fails by panic")]

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Instant;

use ipsec::guard::{ClassId, NoLatches};
use ipsec::plane::{Encapsulation, EspKeys, EspSuite, KernelOptions, Lifetime, Mode, SaPair, TfcPadding};
use ipsec::secret::Secret;
use ipsec::selector::TrafficSelector;
use ipsec::transform::{Encr, Integ};
use latchkey_kernel::netns::Namespace;
use latchkey_kernel::network::{Network, NetworkConfig, PlaneChoice};

/// Pairs that are timed at each step.
const TIMED: u32 = 500;

fn main() {
    let mut steps: Vec<u32> = std::env::args().skip(1).map(|step| step.parse().unwrap()).collect();
    if steps.is_empty() {
        steps = vec![0, 1000, 10_000];
    }
    let host = Namespace::new().unwrap();
    host.add_address("lo", LOCAL, 32).unwrap();
    host.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let config = NetworkConfig { plane: PlaneChoice::Kernel, ..NetworkConfig::default() };
        let (network, _events) = runtime.block_on(Network::start(config, Arc::new(NoLatches))).unwrap();
        let mut plane = network.plane();
        let mut there = 0;
        for step in steps {
            while there < step {
                there += 1;
                plane.install(pair(there)).unwrap();
            }
            let start = Instant::now();
            (there + 1..=there + TIMED).for_each(|number| plane.install(pair(number)).unwrap());
            let installed = start.elapsed();
            let start = Instant::now();
            (there + 1..=there + TIMED).for_each(|number| assert!(plane.usage(SPI_IN + number).is_ok()));
            let read = start.elapsed();
            let start = Instant::now();
            (there + 1..=there + TIMED).for_each(|number| plane.delete(SPI_IN + number).unwrap());
            let each = |all: std::time::Duration| f64::from(TIMED) / all.as_secs_f64();
            println!(
                "{step:>6} there: {:.0} pairs installed, {:.0} read, {:.0} removed in a second",
                each(installed),
                each(read),
                each(start.elapsed())
            );
        }
        plane.shutdown().unwrap();
        drop(plane);
        runtime.block_on(network.shutdown()).unwrap();
    })
    .unwrap();
}

/// One peer with a network of its own for each number.
fn pair(number: u32) -> SaPair {
    let keys = || EspKeys { encr: Secret::new(vec![1; 20]), integ: Secret::new(Vec::new()) };
    let network = |first: u32| {
        let address = IpAddr::V4(Ipv4Addr::from_bits(first + (number << 3)));
        vec![TrafficSelector::network(address, 29).unwrap()]
    };
    SaPair {
        spi_in: SPI_IN + number,
        spi_out: SPI_OUT + number,
        reqid: number,
        class: ClassId(number),
        mode: Mode::Tunnel,
        suite: EspSuite { encr: Encr::AES_GCM_16, key_bits: 128, integ: Integ::NONE, esn: false },
        keys_in: keys(),
        keys_out: keys(),
        encapsulation: Encapsulation::None { local: LOCAL, remote: Ipv4Addr::from_bits(0xc612_0000 + number).into() },
        local_ts: network(0x0a00_0000),
        remote_ts: network(0x0b00_0000),
        replay_window: 32,
        lifetime: Lifetime::default(),
        copy_df: true,
        copy_ecn: true,
        await_peer: false,
        tfc: TfcPadding::None,
        options: KernelOptions::default(),
    }
}

const LOCAL: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
const SPI_IN: u32 = 0x1000_0000;
const SPI_OUT: u32 = 0x2000_0000;
