//! Measures the tunnel between two namespaces of this machine with iperf3: `throughput [SECONDS]`. Needs root, or
//! user namespaces.
//!
//! Both ends, and both iperf3, share the machine; compare only figures of one run.
#![allow(clippy::unwrap_used, reason = "a tool for developers fails by panic")]

use std::net::{IpAddr, SocketAddr};
use std::process::Stdio;
use std::sync::Arc;

use ipsec::guard::{ClassId, NoLatches};
use ipsec::plane::{DataPlane, Encapsulation, EspKeys, EspSuite, Lifetime, Mode, SaPair, TfcPadding};
use ipsec::secret::Secret;
use ipsec::selector::TrafficSelector;
use ipsec::transform::{Encr, Integ};
use latchkey_kernel::netns::{Namespace, become_root_inside, veth};
use latchkey_kernel::network::{Network, NetworkConfig};

fn main() {
    let seconds = std::env::args().nth(1).unwrap_or_else(|| "5".to_owned());
    if !rustix::process::geteuid().is_root() {
        become_root_inside().unwrap();
    }
    let (a, b) = (Namespace::new().unwrap(), Namespace::new().unwrap());
    veth(&a, "eth0", &b, "eth0").unwrap();
    for (namespace, number) in [(&a, 1), (&b, 2)] {
        namespace.add_address("eth0", outer(number), 24).unwrap();
        namespace.add_address("lo", inner(number), 32).unwrap();
    }
    println!("veth             {}", iperf(&a, &b, outer(2), &seconds));

    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let start = |namespace: &Namespace| {
        namespace
            .run(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
                runtime.block_on(Network::start(NetworkConfig::default(), Arc::new(NoLatches))).unwrap()
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
        plane_a.install(pair(1, 2, over(1, 2))).unwrap();
        plane_b.install(pair(2, 1, over(2, 1))).unwrap();
        let before = cpu();
        let figures = iperf(&a, &b, inner(2), &seconds);
        println!("{name:<16} {figures}; CPU of both daemons {:.1} s", cpu() - before);
        print_usage(name, plane_a.as_ref());
        println!("{name:<16} dropped: {:?} {:?}", network_a.drops(), network_b.drops());
        plane_a.delete(0x1001).unwrap();
        plane_b.delete(0x1002).unwrap();
    }
    drop((plane_a, plane_b));
    runtime.block_on(network_a.shutdown()).unwrap();
    runtime.block_on(network_b.shutdown()).unwrap();
}

fn print_usage(name: &str, plane: &dyn DataPlane) {
    let usage = plane.usage(0x1001).unwrap();
    println!("{name:<16} {} packets sent, {} received", usage.packets_out, usage.packets_in);
}

fn iperf(a: &Namespace, b: &Namespace, to: IpAddr, seconds: &str) -> String {
    let mut server =
        b.command("iperf3").args(["-s", "-1", "-i", "0"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(300));
    let to = to.to_string();
    let output = a.command("iperf3").args(["-c", &to, "-t", seconds, "-f", "g", "-i", "0"]).output().unwrap();
    server.wait().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let words = |end: &str| -> Vec<String> {
        let line = text.lines().find(|line| line.ends_with(end)).unwrap_or_default();
        line.split_whitespace().skip(4).map(str::to_owned).collect()
    };
    let received = words("receiver");
    let sent = words("sender");
    let resent = sent.get(4).map_or("?", String::as_str);
    format!("{}; {resent} segments sent again", received.get(..4).map_or("iperf3 failed".to_owned(), |w| w.join(" ")))
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

fn inner(number: u8) -> IpAddr {
    [10, 80, 0, number].into()
}

fn pair(here: u8, there: u8, encapsulation: Encapsulation) -> SaPair {
    let key = |from| EspKeys { encr: Secret::new(vec![from; 20]), integ: Secret::new(Vec::new()) };
    SaPair {
        spi_in: 0x1000 + u32::from(here),
        spi_out: 0x1000 + u32::from(there),
        reqid: 1,
        class: ClassId(1),
        mode: Mode::Tunnel,
        suite: EspSuite { encr: Encr::AES_GCM_16, key_bits: 128, integ: Integ::NONE, esn: true },
        keys_in: key(there),
        keys_out: key(here),
        encapsulation,
        local_ts: vec![TrafficSelector::host(inner(here))],
        remote_ts: vec![TrafficSelector::host(inner(there))],
        replay_window: 1024,
        lifetime: Lifetime::default(),
        copy_df: true,
        copy_ecn: true,
        await_peer: false,
        tfc: TfcPadding::None,
        options: ipsec::plane::KernelOptions::default(),
    }
}
