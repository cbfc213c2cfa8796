//! Two networks in two namespaces. Needs root (CAP_SYS_ADMIN, CAP_NET_ADMIN, CAP_NET_RAW) and /dev/net/tun.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "helpers of tests fail by panic")]

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use ipsec::datapath::DropReason;
use ipsec::guard::{ClassId, NoLatches};
use ipsec::plane::{
    Encapsulation, EspKeys, EspSuite, Lifetime, Mode, PlaneError, PlaneEvent, SaPair, StreamId, TfcPadding, Trap,
};
use ipsec::secret::Secret;
use ipsec::selector::TrafficSelector;
use ipsec::transform::{Encr, Integ};
use latchkey_kernel::netns::{Namespace, veth};
use latchkey_kernel::network::{Network, NetworkConfig, NetworkEvent};
use tokio::sync::mpsc;

/// A host with a running network: outer address 10.8.0.N and fd08::N, inner address 10.8N.0.1 and fd8N::1.
struct Host {
    namespace: Namespace,
    network: Network,
    events: mpsc::Receiver<NetworkEvent>,
    number: u8,
}

impl Host {
    fn outer(&self) -> IpAddr {
        format!("10.8.0.{}", self.number).parse().unwrap()
    }

    fn outer6(&self) -> IpAddr {
        format!("fd08::{}", self.number).parse().unwrap()
    }

    fn inner(&self) -> IpAddr {
        format!("10.8{}.0.1", self.number).parse().unwrap()
    }

    fn inner6(&self) -> IpAddr {
        format!("fd8{}::1", self.number).parse().unwrap()
    }

    fn plain(&self) -> SocketAddr {
        SocketAddr::new(self.outer(), self.network.port())
    }

    fn nat(&self) -> SocketAddr {
        SocketAddr::new(self.outer(), self.network.nat_port())
    }

    fn socket(&self, local: IpAddr) -> UdpSocket {
        let socket = self.namespace.run(|| UdpSocket::bind((local, 0))).unwrap().unwrap();
        // Long enough for a loaded machine; who waits for nothing says so with `is_silent`.
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        socket
    }

    /// The next event that `wanted` accepts, within ten seconds.
    fn event<T>(&mut self, wanted: impl Fn(&NetworkEvent) -> Option<T>) -> T {
        let until = Instant::now() + Duration::from_secs(10);
        while Instant::now() < until {
            match self.events.try_recv() {
                Ok(event) => {
                    if let Some(found) = wanted(&event) {
                        return found;
                    }
                }
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        }
        panic!("the event did not come");
    }

    fn ike(&mut self) -> (SocketAddr, SocketAddr, bool, Vec<u8>) {
        self.event(|event| match event {
            NetworkEvent::Ike { local, remote, encapsulated, bytes } => {
                Some((*local, *remote, *encapsulated, bytes.clone()))
            }
            _ => None,
        })
    }
}

fn start(namespace: &Namespace) -> io::Result<(Network, mpsc::Receiver<NetworkEvent>)> {
    start_with(namespace, NetworkConfig::default())
}

fn start_with(namespace: &Namespace, config: NetworkConfig) -> io::Result<(Network, mpsc::Receiver<NetworkEvent>)> {
    namespace
        .run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(Network::start(config, Arc::new(NoLatches)))
        })
        .unwrap()
}

fn shutdown(network: Network) {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(network.shutdown()).unwrap();
}

fn host(number: u8, namespace: Namespace) -> Host {
    let (network, events) = start(&namespace).expect("these tests need root, raw sockets and /dev/net/tun");
    Host { namespace, network, events, number }
}

fn namespaces() -> (Namespace, Namespace) {
    let make = || Namespace::new().expect("these tests make network namespaces: run them as root");
    let (a, b) = (make(), make());
    veth(&a, "eth0", &b, "eth0").unwrap();
    for (namespace, number) in [(&a, 1), (&b, 2)] {
        namespace.add_address("eth0", format!("10.8.0.{number}").parse().unwrap(), 24).unwrap();
        namespace.add_address("eth0", format!("fd08::{number}").parse().unwrap(), 64).unwrap();
        namespace.add_address("lo", format!("10.8{number}.0.1").parse().unwrap(), 32).unwrap();
        namespace.add_address("lo", format!("fd8{number}::1").parse().unwrap(), 128).unwrap();
        wait_for_addresses(namespace);
    }
    (a, b)
}

/// Linux makes the routes to a host's own IPv6 addresses some time after the addresses, on a loaded machine: until
/// then what is sent to them is dropped.
fn wait_for_addresses(namespace: &Namespace) {
    const RTF_LOCAL: u32 = 0x8000_0000;
    let read = |file: &str| {
        let output = namespace.command("/bin/cat").arg(file).output().unwrap().stdout;
        String::from_utf8(output).unwrap()
    };
    let is_ready = || {
        let routes = read("/proc/net/ipv6_route");
        let local: Vec<&str> = routes
            .lines()
            .filter_map(|line| {
                let columns: Vec<&str> = line.split_whitespace().collect();
                let flags = u32::from_str_radix(columns[8], 16).unwrap();
                (flags & RTF_LOCAL != 0).then_some(columns[0])
            })
            .collect();
        let addresses = read("/proc/net/if_inet6");
        let mut ours = addresses.lines().filter_map(|line| line.split(' ').next()).filter(|hex| hex.starts_with("fd"));
        ours.all(|address| local.contains(&address))
    };
    let until = Instant::now() + Duration::from_secs(10);
    while !is_ready() {
        assert!(Instant::now() < until, "an IPv6 address has no local route");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn is_silent(socket: &UdpSocket) -> bool {
    socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    let silent = socket.recv(&mut [0; 8]).is_err();
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    silent
}

/// Hosts with four threads in each direction.
fn pair_with_threads() -> (Host, Host) {
    let (a, b) = namespaces();
    let host = |number, namespace| {
        let config = NetworkConfig { threads: 4, ..NetworkConfig::default() };
        let (network, events) = start_with(&namespace, config).expect("these tests need root and /dev/net/tun");
        Host { namespace, network, events, number }
    };
    (host(1, a), host(2, b))
}

/// Two SAs between the hosts, one for each family, or their `generation`th successors, as IKE installs them: `b` answers.
fn install_both_families(a: &Host, b: &Host, generation: u32, encapsulation: impl Fn(&Host, &Host) -> Encapsulation) {
    for ipv6 in [false, true] {
        for (here, there) in [(b, a), (a, b)] {
            let base = base(ipv6);
            let mut pair = sa_pair(here, there, base + 16 * generation, encapsulation(here, there));
            pair.reqid = base;
            pair.await_peer = here.number == b.number;
            for selectors in [&mut pair.local_ts, &mut pair.remote_ts] {
                selectors.retain(|selector| selector.start.is_ipv6() == ipv6);
            }
            here.network.plane().install(pair).unwrap();
        }
        if let Some(before) = generation.checked_sub(1) {
            for host in [a, b] {
                host.network.plane().retire(base(ipv6) + 16 * before + u32::from(host.number)).unwrap();
            }
        }
    }
}

fn base(ipv6: bool) -> u32 {
    if ipv6 { 0x10_0000 } else { 0x20_0000 }
}

fn dropped(host: &Host, reason: DropReason) -> u64 {
    host.network.drops().into_iter().find(|(one, _)| *one == reason).unwrap().1
}

fn pair() -> (Host, Host) {
    let (a, b) = namespaces();
    (host(1, a), host(2, b))
}

/// The SA pair of `here` towards `there`.
fn sa_pair(here: &Host, there: &Host, spi: u32, encapsulation: Encapsulation) -> SaPair {
    let key = |from: &Host| EspKeys { encr: Secret::new(vec![from.number; 20]), integ: Secret::new(Vec::new()) };
    let selectors = |host: &Host| vec![TrafficSelector::host(host.inner()), TrafficSelector::host(host.inner6())];
    SaPair {
        spi_in: spi + u32::from(here.number),
        spi_out: spi + u32::from(there.number),
        reqid: spi,
        class: ClassId(1),
        mode: Mode::Tunnel,
        suite: EspSuite { encr: Encr::AES_GCM_16, key_bits: 128, integ: Integ::NONE, esn: false },
        keys_in: key(there),
        keys_out: key(here),
        encapsulation,
        local_ts: selectors(here),
        remote_ts: selectors(there),
        replay_window: 64,
        lifetime: Lifetime::default(),
        copy_df: true,
        copy_ecn: true,
        await_peer: false,
        tfc: TfcPadding::None,
        options: ipsec::plane::KernelOptions::default(),
    }
}

fn udp(here: &Host, there: &Host) -> Encapsulation {
    Encapsulation::Udp { local: here.nat(), remote: there.nat() }
}

/// Sends datagrams of several sizes both ways between the inner addresses. The sockets of one side are not bound
/// to an inner address, so that the route must choose it.
fn assert_tunnel_carries(a: &Host, b: &Host) {
    for (here, there) in [(a.inner(), b.inner()), (a.inner6(), b.inner6())] {
        let any: IpAddr = if here.is_ipv4() { "0.0.0.0".parse().unwrap() } else { "::".parse().unwrap() };
        let (client, server) = (a.socket(any), b.socket(there));
        for size in [1, 100, 1200, 3000] {
            let message = vec![0x5a; size];
            client.send_to(&message, server.local_addr().unwrap()).unwrap();
            let mut room = [0; 4096];
            let (length, from) = server
                .recv_from(&mut room)
                .unwrap_or_else(|e| panic!("a datagram of {size} octets to {there} through the tunnel: {e}"));
            assert_eq!(&room[..length], message);
            assert_eq!(from.ip(), here, "the route prefers the address that the selectors allow");
            server.send_to(&message, from).unwrap();
            let (length, from) = client.recv_from(&mut room).expect("the answer through the tunnel");
            assert_eq!((length, from), (size, server.local_addr().unwrap()));
        }
    }
}

/// Another test that starts a program holds copies of our sockets and the device from its fork to its exec.
fn assert_no_device(namespace: &Namespace) {
    let until = Instant::now() + Duration::from_secs(10);
    while namespace.has_link("lk0").unwrap() {
        assert!(Instant::now() < until, "the device is there");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn assert_nothing_left(namespace: &Namespace) {
    assert_eq!(namespace.routes(220).unwrap(), []);
    assert!(!namespace.rule_priorities().unwrap().contains(&220));
    assert_no_device(namespace);
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        let sockets = namespace.command("/bin/cat").args(["/proc/net/udp", "/proc/net/raw"]).output().unwrap();
        let text = String::from_utf8(sockets.stdout).unwrap();
        if text.lines().all(|line| line.contains("local_address")) {
            return;
        }
        assert!(Instant::now() < until, "{text}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_port_in_use_is_named() {
    let (a, _b) = namespaces();
    let _other = a.run(|| UdpSocket::bind("0.0.0.0:4500")).unwrap().unwrap();
    let error = start(&a).err().expect("the port is taken");
    assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
    assert!(error.to_string().contains("4500"), "{error}");
    assert_nothing_left_but_test_socket(&a);
}

fn assert_nothing_left_but_test_socket(namespace: &Namespace) {
    assert!(!namespace.rule_priorities().unwrap().contains(&220));
    assert_no_device(namespace);
}

#[test]
fn a_device_name_in_use_is_named() {
    let (a, _b) = namespaces();
    let (network, _events) = start(&a).unwrap();
    let second = a
        .run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let config = NetworkConfig { port: 0, nat_port: 0, ..NetworkConfig::default() };
            runtime.block_on(Network::start(config, Arc::new(NoLatches)))
        })
        .unwrap();
    let error = second.err().expect("lk0 is taken");
    assert!(error.to_string().contains("lk0"), "{error}");
    shutdown(network);
}

#[test]
fn the_device_says_its_real_name_and_takes_no_orders_from_peers() {
    let (a, _b) = namespaces();
    let (network, _events) = a
        .run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let config = NetworkConfig { tun_name: "lkr%d".to_owned(), ..NetworkConfig::default() };
            runtime.block_on(Network::start(config, Arc::new(NoLatches)))
        })
        .unwrap()
        .unwrap();
    assert_eq!(network.tun_name(), "lkr0");
    for setting in ["ipv4/conf/lkr0/accept_redirects", "ipv4/conf/lkr0/accept_source_route", "ipv6/conf/lkr0/accept_ra"]
    {
        let value = a.run(|| std::fs::read_to_string(format!("/proc/sys/net/{setting}"))).unwrap().unwrap();
        assert_eq!(value.trim(), "0", "{setting}");
    }
    shutdown(network);
}

#[test]
fn keepalives_and_scraps_are_not_events() {
    let (mut a, b) = pair();
    let sender = b.socket(b.outer());
    for scrap in [&[][..], &[0xff], &[0], &[0, 0, 0], &[1, 2, 3]] {
        sender.send_to(scrap, a.nat()).unwrap();
    }
    b.network.send_ike(b.nat(), a.nat(), true, 0, &[0xff]).unwrap();
    b.network.send_ike(b.nat(), a.nat(), true, 0, b"message").unwrap();
    assert_eq!(a.ike(), (a.nat(), b.nat(), true, b"message".to_vec()));
}

#[test]
fn ike_passes_with_and_without_marker() {
    let (mut a, mut b) = pair();
    a.network.send_ike(a.plain(), b.plain(), false, 0, b"plain").unwrap();
    assert_eq!(b.ike(), (b.plain(), a.plain(), false, b"plain".to_vec()));
    b.network.send_ike(b.nat(), a.nat(), true, 0, b"marked").unwrap();
    assert_eq!(a.ike(), (a.nat(), b.nat(), true, b"marked".to_vec()));
    // RFC 3948 §2.2: the marker is on the wire.
    let raw = b.socket(b.outer());
    a.network.send_ike(a.nat(), raw.local_addr().unwrap(), true, 0, b"marked").unwrap();
    let mut room = [0; 32];
    let (length, from) = raw.recv_from(&mut room).unwrap();
    assert_eq!((&room[..length], from), (&b"\0\0\0\0marked"[..], a.nat()));
    // RFC 3948 §2.3: and not before a keepalive.
    a.network.send_ike(a.nat(), raw.local_addr().unwrap(), true, 0, &[0xff]).unwrap();
    assert_eq!(raw.recv(&mut room).unwrap(), 1);
}

#[test]
fn ike_passes_over_ipv6() {
    let (a, mut b) = pair();
    let local = SocketAddr::new(a.outer6(), a.network.port());
    let remote = SocketAddr::new(b.outer6(), b.network.port());
    a.network.send_ike(local, remote, false, 0, b"plain").unwrap();
    assert_eq!(b.ike(), (remote, local, false, b"plain".to_vec()));
}

#[test]
fn ike_longer_than_the_mtu_is_fragmented() {
    let (a, mut b) = pair();
    let long = vec![7; 6000];
    a.network.send_ike(a.plain(), b.plain(), false, 0, &long).unwrap();
    assert_eq!(b.ike().3, long);
    let local = SocketAddr::new(a.outer6(), a.network.port());
    let remote = SocketAddr::new(b.outer6(), b.network.port());
    a.network.send_ike(local, remote, false, 0, &long).unwrap();
    assert_eq!(b.ike().3, long);
}

#[test]
fn answers_leave_from_the_address_that_was_asked() {
    let (mut a, mut b) = pair();
    b.namespace.add_address("eth0", "10.8.0.22".parse().unwrap(), 24).unwrap();
    let asked = SocketAddr::new("10.8.0.22".parse().unwrap(), b.network.port());
    a.network.send_ike(a.plain(), asked, false, 0, b"request").unwrap();
    let (local, remote, ..) = b.ike();
    assert_eq!(local, asked);
    b.network.send_ike(local, remote, false, 0, b"response").unwrap();
    assert_eq!(a.ike().1, asked);
}

#[test]
fn an_unreachable_peer_is_reported() {
    let (a, b) = namespaces();
    let mut a = host(1, a);
    let nobody: SocketAddr = "10.8.0.2:500".parse().unwrap();
    a.network.send_ike("0.0.0.0:0".parse().unwrap(), nobody, false, 0, b"request").unwrap();
    let remote = a.event(|event| match event {
        NetworkEvent::Unreachable { remote } => Some(*remote),
        _ => None,
    });
    assert_eq!(remote, nobody);
    drop(b);
}

#[test]
fn the_source_address_is_that_of_the_route() {
    let (a, b) = pair();
    assert_eq!(a.network.source_address(b.outer()).unwrap(), a.outer());
    assert_eq!(a.network.source_address(b.outer6()).unwrap(), a.outer6());
    assert!(a.network.source_address("198.51.100.1".parse().unwrap()).is_err(), "no route");
}

#[test]
fn traffic_passes_in_udp() {
    let (a, b) = pair();
    let (mut plane_a, mut plane_b) = (a.network.plane(), b.network.plane());
    plane_a.install(sa_pair(&a, &b, 0x1000, udp(&a, &b))).unwrap();
    plane_b.install(sa_pair(&b, &a, 0x1000, udp(&b, &a))).unwrap();
    assert_tunnel_carries(&a, &b);
    let usage = plane_a.usage(0x1001).unwrap();
    assert!(usage.packets_in >= 8 && usage.packets_out >= 8, "{usage:?}");
}

#[test]
fn traffic_passes_as_plain_esp() {
    let (a, b) = pair();
    let (mut plane_a, mut plane_b) = (a.network.plane(), b.network.plane());
    let esp = |here: &Host, there: &Host| Encapsulation::None { local: here.outer(), remote: there.outer() };
    plane_a.install(sa_pair(&a, &b, 0x1000, esp(&a, &b))).unwrap();
    plane_b.install(sa_pair(&b, &a, 0x1000, esp(&b, &a))).unwrap();
    assert_tunnel_carries(&a, &b);
}

#[test]
fn traffic_passes_as_plain_esp_over_ipv6() {
    let (a, b) = pair();
    let (mut plane_a, mut plane_b) = (a.network.plane(), b.network.plane());
    let esp = |here: &Host, there: &Host| Encapsulation::None { local: here.outer6(), remote: there.outer6() };
    plane_a.install(sa_pair(&a, &b, 0x1000, esp(&a, &b))).unwrap();
    plane_b.install(sa_pair(&b, &a, 0x1000, esp(&b, &a))).unwrap();
    assert_tunnel_carries(&a, &b);
}

#[test]
fn traffic_passes_in_a_stream() {
    let (a, b) = pair();
    let (mut plane_a, mut plane_b) = (a.network.plane(), b.network.plane());
    let stream = StreamId(7);
    let over = |here: &Host, there: &Host| Encapsulation::Stream { stream, local: here.nat(), remote: there.nat() };
    plane_a.install(sa_pair(&a, &b, 0x1000, over(&a, &b))).unwrap();
    plane_b.install(sa_pair(&b, &a, 0x1000, over(&b, &a))).unwrap();
    for (from, to) in [(&a, &b), (&b, &a)] {
        let (sink, packets) = std::sync::mpsc::sync_channel::<Vec<u8>>(64);
        from.network.attach_stream(stream, Box::new(move |_, packet| sink.try_send(packet.to_vec()).is_ok()));
        let (sender, network, local, remote) = (from.network.clone(), to.network.clone(), to.nat(), from.nat());
        std::thread::spawn(move || {
            while let Ok(packet) = packets.recv() {
                sender.seal_for_stream(stream, &packet, &mut |packet| {
                    network.esp_from_stream(stream, local, remote, &mut packet.to_vec());
                });
            }
        });
    }
    assert_tunnel_carries(&a, &b);
    a.network.detach_stream(stream);
    let (client, server) = (a.socket(a.inner()), b.socket(b.inner()));
    client.send_to(b"lost", server.local_addr().unwrap()).unwrap();
    assert!(is_silent(&server), "no stream, no traffic");
    b.network.detach_stream(stream);
}

// RFC 9329 §7.1: what waited for a stream is not lost when its SA goes back to UDP; packets of one flow have one number.
#[test]
fn a_packet_whose_sa_has_left_the_stream_goes_the_sa_s_way() {
    let (a, b) = pair();
    let (mut plane_a, mut plane_b) = (a.network.plane(), b.network.plane());
    let stream = StreamId(7);
    let over = |here: &Host, there: &Host| Encapsulation::Stream { stream, local: here.nat(), remote: there.nat() };
    plane_a.install(sa_pair(&a, &b, 0x1000, over(&a, &b))).unwrap();
    plane_b.install(sa_pair(&b, &a, 0x1000, udp(&b, &a))).unwrap();
    let (sink, packets) = std::sync::mpsc::sync_channel::<(u64, Vec<u8>)>(64);
    a.network.attach_stream(stream, Box::new(move |flow, packet| sink.try_send((flow, packet.to_vec())).is_ok()));
    let (client, other) = (a.socket(a.inner()), a.socket(a.inner()));
    let server = b.socket(b.inner());
    let mut waiting = Vec::new();
    for socket in [&client, &client, &other] {
        socket.send_to(b"late", server.local_addr().unwrap()).unwrap();
        waiting.push(packets.recv_timeout(Duration::from_secs(20)).unwrap());
    }
    assert_eq!(waiting[0].0, waiting[1].0);
    assert_ne!(waiting[0].0, waiting[2].0);
    let mut taken = 0;
    a.network.seal_for_stream(stream, &waiting[0].1, &mut |_| taken += 1);
    plane_a.migrate(sa_pair(&a, &b, 0x1000, udp(&a, &b)).spi_in, udp(&a, &b)).unwrap();
    a.network.seal_for_stream(stream, &waiting[1].1, &mut |_| taken += 1);
    assert_eq!(taken, 1, "the first one alone goes into the stream");
    let mut buffer = [0; 16];
    server.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let (octets, from) = server.recv_from(&mut buffer).unwrap();
    assert_eq!((&buffer[..octets], from), (&b"late"[..], client.local_addr().unwrap()));
    // A stream that is gone, too.
    a.network.detach_stream(stream);
    a.network.seal_for_stream(stream, &waiting[2].1, &mut |_| taken += 1);
    assert_eq!(server.recv_from(&mut buffer).unwrap().1, other.local_addr().unwrap());
}

#[test]
fn an_sa_that_covers_the_peers_own_address_does_not_swallow_its_packets() {
    let (a, b) = pair();
    let (mut plane_a, mut plane_b) = (a.network.plane(), b.network.plane());
    for (plane, here, there) in [(&mut plane_a, &a, &b), (&mut plane_b, &b, &a)] {
        let mut pair = sa_pair(here, there, 0x1000, udp(here, there));
        pair.local_ts = vec![TrafficSelector::host(here.outer())];
        pair.remote_ts = vec![TrafficSelector::host(there.outer())];
        plane.install(pair).unwrap();
    }
    let (client, server) = (a.socket(a.outer()), b.socket(b.outer()));
    client.send_to(b"hello", server.local_addr().unwrap()).unwrap();
    assert_eq!(server.recv(&mut [0; 8]).expect("through the tunnel"), 5);
    assert_eq!(plane_b.usage(0x1002).unwrap().packets_in, 1);
    assert_eq!(a.network.source_address(b.outer()).unwrap(), a.outer());
}

/// Sends half a megabyte by TCP between the inner addresses.
fn assert_tunnel_carries_tcp(a: &Host, b: &Host) {
    let listener = b.namespace.run(|| TcpListener::bind((b.inner(), 0))).unwrap().unwrap();
    let to = listener.local_addr().unwrap();
    let mut client = a.namespace.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(5))).unwrap().unwrap();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut received = Vec::new();
        stream.read_to_end(&mut received).expect("all of the data");
        received
    });
    let sent: Vec<u8> = (0..500_000_u32).map(|n| u8::try_from(n % 251).unwrap()).collect();
    client.write_all(&sent).unwrap();
    drop(client);
    assert!(server.join().unwrap() == sent);
}

#[test]
fn tcp_passes_with_offloads() {
    let (a, b) = pair();
    let (mut plane_a, mut plane_b) = (a.network.plane(), b.network.plane());
    plane_a.install(sa_pair(&a, &b, 0x1000, udp(&a, &b))).unwrap();
    plane_b.install(sa_pair(&b, &a, 0x1000, udp(&b, &a))).unwrap();
    assert_tunnel_carries_tcp(&a, &b);
}

#[test]
fn tcp_learns_that_the_path_is_narrow() {
    // RFC 4301 §8.2: what ICMP or the system says of the outer path reaches the sender of the inner packet.
    for encapsulated in [true, false] {
        let (a, b) = pair();
        for host in [&a, &b] {
            host.namespace.set_mtu("eth0", 1300).unwrap();
        }
        let (mut plane_a, mut plane_b) = (a.network.plane(), b.network.plane());
        for (plane, here, there) in [(&mut plane_a, &a, &b), (&mut plane_b, &b, &a)] {
            let over = match encapsulated {
                true => udp(here, there),
                false => Encapsulation::None { local: here.outer(), remote: there.outer() },
            };
            plane.install(sa_pair(here, there, 0x1000, over)).unwrap();
        }
        assert_tunnel_carries_tcp(&a, &b);
        let too_big = a.network.drops().into_iter().find(|(reason, _)| *reason == DropReason::TooBig);
        assert!(too_big.is_some_and(|(_, count)| count > 0), "the engine answered: {too_big:?}");
    }
}

#[test]
fn marked_sockets_stay_out_of_the_tunnel() {
    let (a, b) = pair();
    let mut plane = a.network.plane();
    let mut pair = sa_pair(&a, &b, 0x1000, udp(&a, &b));
    pair.remote_ts = vec![TrafficSelector::host(b.outer())];
    plane.install(pair).unwrap();
    let (client, server) = (a.socket(a.outer()), b.socket(b.outer()));
    client.send_to(b"x", server.local_addr().unwrap()).unwrap();
    assert!(is_silent(&server), "into the tunnel, which does not carry it");
    a.network.prepare(&client).unwrap();
    client.send_to(b"x", server.local_addr().unwrap()).unwrap();
    assert_eq!(server.recv(&mut [0; 8]).unwrap(), 1);
}

// RFC 4303 §3.4.3: 64 is the window that a receiver should have.
#[test]
fn with_several_threads_flows_keep_their_order_and_nothing_is_lost_through_rekeys() {
    const DATAGRAMS: u32 = 400;
    // Of the three flows of an SA fewer are under way than its window is wide.
    const UNDER_WAY: usize = 16;
    let (a, b) = pair_with_threads();
    install_both_families(&a, &b, 0, udp);
    std::thread::scope(|scope| {
        let mut receivers = Vec::new();
        for flow in 0..12 {
            let (from, to) = if flow % 2 == 0 { (&a, &b) } else { (&b, &a) };
            let inner = |host: &Host| if flow % 4 < 2 { host.inner() } else { host.inner6() };
            let (sender, receiver) = (from.socket(inner(from)), to.socket(inner(to)));
            let destination = receiver.local_addr().unwrap();
            let (credit, credits) = channel();
            (0..UNDER_WAY).for_each(|_| credit.send(()).unwrap());
            scope.spawn(move || {
                for number in 0..DATAGRAMS {
                    // Gone when the receiver has failed, which says why.
                    if credits.recv().is_err() {
                        return;
                    }
                    let datagram = number.to_be_bytes().repeat(250);
                    assert_eq!(sender.send_to(&datagram, destination).unwrap(), 1000);
                }
            });
            receivers.push(scope.spawn(move || {
                let mut room = [0; 2000];
                for number in 0..DATAGRAMS {
                    let length = receiver.recv(&mut room).unwrap_or_else(|e| panic!("datagram {number}: {e}"));
                    assert_eq!((length, &room[..4]), (1000, &number.to_be_bytes()[..]), "flow {flow}");
                    let _ = credit.send(());
                }
            }));
        }
        let mut generation = 0;
        while receivers.iter().any(|receiver| !receiver.is_finished()) {
            generation += 1;
            install_both_families(&a, &b, generation, udp);
            std::thread::sleep(Duration::from_millis(2));
        }
        assert!(generation > 1);
    });
    for host in [&a, &b] {
        for reason in [DropReason::Replay, DropReason::Integrity, DropReason::UnknownSpi] {
            assert_eq!(dropped(host, reason), 0, "{reason:?}");
        }
    }
}

#[test]
fn with_several_threads_bulk_goes_both_ways_through_rekeys_and_moves() {
    const BULK: usize = 2 << 20;
    let (a, b) = pair_with_threads();
    install_both_families(&a, &b, 0, udp);
    let plain = |here: &Host, there: &Host| Encapsulation::None { local: here.outer(), remote: there.outer() };
    std::thread::scope(|scope| {
        let mut transfers = Vec::new();
        for flow in 0..8_usize {
            let (from, to) = if flow % 2 == 0 { (&a, &b) } else { (&b, &a) };
            let inner = if flow % 4 < 2 { to.inner() } else { to.inner6() };
            let listener = to.namespace.run(|| TcpListener::bind((inner, 0))).unwrap().unwrap();
            let address = listener.local_addr().unwrap();
            let octet = move |at: usize| u8::try_from((at * (flow + 1)) % 251).unwrap();
            transfers.push(scope.spawn(move || {
                let mut stream = from.namespace.run(|| TcpStream::connect(address)).unwrap().unwrap();
                let bulk: Vec<u8> = (0..BULK).map(octet).collect();
                stream.write_all(&bulk).unwrap();
            }));
            transfers.push(scope.spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
                let mut bulk = Vec::new();
                stream.read_to_end(&mut bulk).unwrap();
                assert_eq!(bulk.len(), BULK);
                assert!(bulk.iter().enumerate().all(|(at, found)| *found == octet(at)), "flow {flow}");
            }));
        }
        let mut generation = 0;
        while transfers.iter().any(|transfer| !transfer.is_finished()) {
            generation += 1;
            install_both_families(&a, &b, generation, udp);
            let spi = base(generation % 2 == 0) + 16 * generation + u32::from(a.number);
            a.network.plane().migrate(spi, plain(&a, &b)).unwrap();
            std::thread::sleep(Duration::from_millis(10));
        }
    });
    for host in [&a, &b] {
        for reason in [DropReason::Integrity, DropReason::UnknownSpi] {
            assert_eq!(dropped(host, reason), 0, "{reason:?}");
        }
    }
}

#[test]
fn several_threads_stop_and_leave_nothing() {
    let (a, b) = pair_with_threads();
    install_both_families(&a, &b, 0, udp);
    assert_tunnel_carries(&a, &b);
    let Host { namespace, network, .. } = a;
    shutdown(network);
    assert_nothing_left(&namespace);
}

#[test]
fn unknown_spis_are_reported() {
    let (a, mut b) = pair();
    let sender = a.socket(a.outer());
    let mut packet = 0xdead_beef_u32.to_be_bytes().to_vec();
    packet.extend([0; 60]);
    sender.send_to(&packet, b.nat()).unwrap();
    let (spi, remote) = b.event(|event| match event {
        NetworkEvent::Plane(PlaneEvent::UnknownSpi { spi, remote }) => Some((*spi, *remote)),
        _ => None,
    });
    assert_eq!((spi, remote), (0xdead_beef, sender.local_addr().unwrap()));
}

#[test]
fn routes_come_and_go_with_their_last_pair() {
    let (a, b) = pair();
    let mut plane = a.network.plane();
    assert_eq!(a.namespace.routes(220).unwrap(), []);
    plane.install(sa_pair(&a, &b, 0x1000, udp(&a, &b))).unwrap();
    let both = [(b.inner(), 32), (b.inner6(), 128)];
    assert_eq!(a.namespace.routes(220).unwrap(), both);
    assert!(matches!(plane.install(sa_pair(&a, &b, 0x1000, udp(&a, &b))), Err(PlaneError::SpiInUse(0x1001))));
    assert_eq!(a.namespace.routes(220).unwrap(), both);
    // A successor of the same reqid, then a pair of another one for the same networks.
    let mut successor = sa_pair(&a, &b, 0x2000, udp(&a, &b));
    successor.reqid = 0x1000;
    plane.install(successor).unwrap();
    plane.install(sa_pair(&a, &b, 0x3000, udp(&a, &b))).unwrap();
    plane.delete(0x1001).unwrap();
    plane.delete(0x2001).unwrap();
    assert_eq!(a.namespace.routes(220).unwrap(), both);
    plane.delete(0x3001).unwrap();
    assert_eq!(a.namespace.routes(220).unwrap(), []);
    assert!(matches!(plane.delete(0x3001), Err(PlaneError::NoSuchSa(0x3001))));
}

// RFC 4301 §4.4.1: a policy without an SA.
#[test]
fn a_trap_keeps_its_routes_and_asks_for_an_sa_once_a_second() {
    let (mut a, b) = pair();
    let mut plane = a.network.plane();
    let SaPair { local_ts, remote_ts, .. } = sa_pair(&a, &b, 0x1000, udp(&a, &b));
    let trap = Trap { reqid: 9, local_ts, remote_ts, options: Default::default() };
    let both = [(b.inner(), 32), (b.inner6(), 128)];
    plane.install(sa_pair(&a, &b, 0x1000, udp(&a, &b))).unwrap();
    plane.install_trap(trap.clone()).unwrap();
    assert!(matches!(plane.install_trap(trap), Err(PlaneError::TrapInUse(9))));
    assert_eq!(a.namespace.routes(220).unwrap(), both);
    plane.delete(0x1001).unwrap();
    assert_eq!(a.namespace.routes(220).unwrap(), both, "the trap's");
    let socket = a.socket(a.inner());
    let start = Instant::now();
    for _ in 0..20 {
        socket.send_to(b"x", SocketAddr::new(b.inner(), 9)).unwrap();
    }
    let acquire = |event: &NetworkEvent| match event {
        NetworkEvent::Plane(PlaneEvent::Acquire { reqid, flow }) => Some((*reqid, flow.remote)),
        _ => None,
    };
    assert_eq!(a.event(acquire), (9, b.inner()));
    if start.elapsed() < Duration::from_millis(900) {
        assert!(a.events.try_recv().is_err(), "one event for all packets");
    }
    plane.install(sa_pair(&a, &b, 0x2000, udp(&a, &b))).unwrap();
    plane.remove_trap(9).unwrap();
    assert!(matches!(plane.remove_trap(9), Err(PlaneError::NoSuchTrap(9))));
    assert_eq!(a.namespace.routes(220).unwrap(), both, "the pair's");
    plane.delete(0x2001).unwrap();
    assert_eq!(a.namespace.routes(220).unwrap(), []);
}

#[test]
fn a_pair_whose_keys_are_wrong_leaves_no_routes() {
    let (a, b) = pair();
    let mut plane = a.network.plane();
    let mut wrong = sa_pair(&a, &b, 0x1000, udp(&a, &b));
    wrong.keys_out.encr = Secret::new(vec![0; 3]);
    assert!(plane.install(wrong).is_err());
    assert_eq!(a.namespace.routes(220).unwrap(), []);
    plane.install(sa_pair(&a, &b, 0x1000, udp(&a, &b))).unwrap();
}

#[test]
fn shutdown_leaves_nothing() {
    let (a, b) = pair();
    let mut plane = a.network.plane();
    plane.install(sa_pair(&a, &b, 0x1000, udp(&a, &b))).unwrap();
    a.network.add_virtual_address("10.99.0.1".parse().unwrap(), None).unwrap();
    let clone = a.network.clone();
    shutdown(a.network);
    // Clones and planes do not keep the device.
    assert_no_device(&a.namespace);
    drop((clone, plane));
    assert_nothing_left(&a.namespace);
}

#[test]
fn dropping_the_last_handle_leaves_nothing() {
    let (a, b) = pair();
    let mut plane = a.network.plane();
    plane.install(sa_pair(&a, &b, 0x1000, udp(&a, &b))).unwrap();
    drop(a.network);
    assert!(a.namespace.has_link("lk0").unwrap(), "the plane keeps the network running");
    drop(plane);
    assert_nothing_left(&a.namespace);
}

#[test]
fn rules_of_a_predecessor_that_died_are_taken_over() {
    let (a, _b) = namespaces();
    let rules =
        a.command("ip").args(["rule", "add", "not", "fwmark", "0x1c4b", "lookup", "220", "prio", "220"]).status();
    assert!(rules.expect("the ip tool").success());
    let (network, _events) = start(&a).unwrap();
    assert_eq!(a.rule_priorities().unwrap().iter().filter(|priority| **priority == 220).count(), 2, "IPv4 and IPv6");
    shutdown(network);
    assert!(!a.rule_priorities().unwrap().contains(&220));
}

#[test]
fn without_routes_wanted_none_is_made() {
    let (a, _b) = namespaces();
    let config = NetworkConfig { install_routes: false, ..NetworkConfig::default() };
    let (_network, _events) = a
        .run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(Network::start(config, Arc::new(NoLatches)))
        })
        .unwrap()
        .unwrap();
    assert!(!a.rule_priorities().unwrap().contains(&220));
}
