//! Measures the tunnel between two namespaces of this machine with iperf3: `throughput [SECONDS [THREADS]]`: one TCP flow,
//! and four over one SA and over two. Needs root, or user namespaces.
//!
//! Both ends, and both iperf3, share the machine; compare only figures of one run.
#![allow(clippy::unwrap_used, reason = "a tool for developers fails by panic")]

use std::net::{IpAddr, SocketAddr};
use std::process::{Child, Stdio};
use std::sync::Arc;

use ipsec::guard::{ClassId, NoLatches};
use ipsec::plane::{Encapsulation, EspKeys, EspSuite, Lifetime, Mode, SaPair, TfcPadding};
use ipsec::secret::Secret;
use ipsec::selector::TrafficSelector;
use ipsec::transform::{Encr, Integ};
use latchkey_kernel::netns::{Namespace, become_root_inside, veth};
use latchkey_kernel::network::{Network, NetworkConfig};

fn main() {
    let mut arguments = std::env::args().skip(1);
    let seconds = arguments.next().unwrap_or_else(|| "5".to_owned());
    let threads: usize = arguments.next().map_or(1, |text| text.parse().unwrap());
    if !rustix::process::geteuid().is_root() {
        become_root_inside().unwrap();
    }
    let (a, b) = (Namespace::new().unwrap(), Namespace::new().unwrap());
    veth(&a, "eth0", &b, "eth0").unwrap();
    for (namespace, number) in [(&a, 1), (&b, 2)] {
        namespace.add_address("eth0", outer(number), 24).unwrap();
        for sa in 0..2 {
            namespace.add_address("lo", inner(sa, number), 32).unwrap();
        }
    }
    println!("veth                            {}", iperf(&a, &b, &[(outer(2), 1)], &seconds));

    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let start = |namespace: &Namespace| {
        let config = NetworkConfig { threads, ..NetworkConfig::default() };
        namespace
            .run(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
                runtime.block_on(Network::start(config, Arc::new(NoLatches))).unwrap()
            })
            .unwrap()
    };
    let ((network_a, _events_a), (network_b, _events_b)) = (start(&a), start(&b));
    let (mut plane_a, mut plane_b) = (network_a.plane(), network_b.plane());
    let udp = |here, there| Encapsulation::Udp {
        local: SocketAddr::new(outer(here), network_a.nat_port()),
        remote: SocketAddr::new(outer(there), network_b.nat_port()),
    };
    let esp = |here, there| Encapsulation::None { local: outer(here), remote: outer(there) };
    for (name, over) in [("ESP in UDP", &udp as &dyn Fn(u8, u8) -> Encapsulation), ("ESP", &esp)] {
        for sa in 0..2 {
            plane_a.install(pair(sa, 1, 2, over(1, 2))).unwrap();
            plane_b.install(pair(sa, 2, 1, over(2, 1))).unwrap();
        }
        for (flows, to) in [
            ("1 flow", &[(inner(0, 2), 1)][..]),
            ("4 flows, 1 SA", &[(inner(0, 2), 4)]),
            ("4 flows, 2 SAs", &[(inner(0, 2), 2), (inner(1, 2), 2)]),
        ] {
            let (before, drops) = (cpu(), (network_a.drops(), network_b.drops()));
            let figures = iperf(&a, &b, to, &seconds);
            println!("{name:<16} {flows:<15} {figures}; CPU of both daemons {:.1} s", cpu() - before);
            for (side, before, after) in [("A", drops.0, network_a.drops()), ("B", drops.1, network_b.drops())] {
                for ((reason, before), (_, after)) in before.into_iter().zip(after) {
                    if after != before {
                        println!("{name:<16} {flows:<15} {side} dropped {}: {reason:?}", after - before);
                    }
                }
            }
        }
        for sa in 0..2 {
            plane_a.delete(spi(sa, 1)).unwrap();
            plane_b.delete(spi(sa, 2)).unwrap();
        }
    }
    drop((plane_a, plane_b));
    runtime.block_on(network_a.shutdown()).unwrap();
    runtime.block_on(network_b.shutdown()).unwrap();
}

/// Flows to these addresses, so many to each, at once.
fn iperf(a: &Namespace, b: &Namespace, to: &[(IpAddr, usize)], seconds: &str) -> String {
    let servers: Vec<Child> = to
        .iter()
        .map(|(address, _)| {
            let address = address.to_string();
            let mut server = b.command("iperf3");
            server.args(["-s", "-1", "-i", "0", "-B", &address]).stdout(Stdio::null()).stderr(Stdio::null());
            server.spawn().unwrap()
        })
        .collect();
    std::thread::sleep(std::time::Duration::from_millis(300));
    let clients: Vec<Child> = to
        .iter()
        .map(|(address, flows)| {
            let (address, flows) = (address.to_string(), flows.to_string());
            let mut client = a.command("iperf3");
            client.args(["-c", &address, "-t", seconds, "-f", "g", "-i", "0", "-P", &flows]);
            client.stdout(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    let (mut received, mut resent) = (0.0, 0);
    for client in clients {
        let output = client.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        // The last such line is the only flow's, or the sum of all.
        let fields = |end: &str| -> Vec<String> {
            let line = text.lines().rfind(|line| line.ends_with(end)).unwrap_or_default();
            line.rsplit("Bytes").next().unwrap_or_default().split_whitespace().map(str::to_owned).collect()
        };
        received += fields("receiver").first().and_then(|rate| rate.parse::<f64>().ok()).unwrap_or(f64::NAN);
        resent += fields("sender").get(2).and_then(|count| count.parse::<u64>().ok()).unwrap_or_default();
    }
    for mut server in servers {
        server.wait().unwrap();
    }
    format!("{received:.2} Gbit/s; {resent} segments sent again")
}

/// Seconds of processor time that this process has used.
fn cpu() -> f64 {
    let text = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<_> = text.rsplit(") ").next().unwrap_or_default().split(' ').collect();
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<f64>().ok()).unwrap_or_default();
    (ticks(11) + ticks(12)) / 100.0
}

fn outer(number: u8) -> IpAddr {
    [10, 8, 0, number].into()
}

fn inner(sa: u8, number: u8) -> IpAddr {
    [10, 80 + sa, 0, number].into()
}

fn spi(sa: u8, number: u8) -> u32 {
    0x1000 + 16 * u32::from(sa) + u32::from(number)
}

fn pair(sa: u8, here: u8, there: u8, encapsulation: Encapsulation) -> SaPair {
    let key = |from| EspKeys { encr: Secret::new(vec![from; 20]), integ: Secret::new(Vec::new()) };
    SaPair {
        spi_in: spi(sa, here),
        spi_out: spi(sa, there),
        reqid: 1 + u32::from(sa),
        class: ClassId(1),
        mode: Mode::Tunnel,
        suite: EspSuite { encr: Encr::AES_GCM_16, key_bits: 128, integ: Integ::NONE, esn: true },
        keys_in: key(there),
        keys_out: key(here),
        encapsulation,
        local_ts: vec![TrafficSelector::host(inner(sa, here))],
        remote_ts: vec![TrafficSelector::host(inner(sa, there))],
        replay_window: 32,
        lifetime: Lifetime::default(),
        copy_df: true,
        copy_ecn: true,
        await_peer: false,
        tfc: TfcPadding::None,
        options: ipsec::plane::KernelOptions::default(),
    }
}
