//! The sockets of IKE and ESP, and the user-space plane behind them.
//!
//! UDP 4500 carries IKE and ESP alike (RFC 3948), so one owner reads it: ESP goes through the packet engine
//! on the reading thread, IKE goes up to the daemon.
//!
//! What it needs from the system: CAP_NET_ADMIN (TUN device, routes, marks), CAP_NET_RAW (plain ESP),
//! CAP_NET_BIND_SERVICE (ports below 1024) and /dev/net/tun. What it leaves to the operator: `ip_forward` on a
//! gateway, and `rp_filter` not 1 (strict) where a tunnel covers its peer's own address.
//!
//! Routes into the tunnel stand in a table of their own, before the main one. A rule keeps packets with our mark out
//! of it, so that the tunnel never carries its own outer packets; every socket that carries IKE or ESP needs that
//! mark ([`Network::prepare`]).

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::{BuildHasher as _, RandomState};
use std::io::{self, IoSlice};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ipsec::datapath::{DataPath, DropReason, Inbound, Outbound};
use ipsec::guard::{FlowBarrier, FlowGuard, LogicalSpd};
use ipsec::plane::{DataPlane, Encapsulation, PlaneEvent, StreamId};
use tokio::sync::mpsc;

use crate::audit::Audit;
use crate::interfaces::{self, AddressPair, InterfaceFilter};
use crate::netlink::{Netlink, context};
use crate::planes::Planes;
use crate::routes::{Routes, host_prefix};
use crate::shunt_rules::{FlowRules, ShuntRules};
use crate::socket::{Header, OuterSocket, keep_flow_label, leave_stream_to_the_kernel, pass_by_policies};
use crate::threads;
use crate::tun::{Tun, TunWriter};
use crate::watch::{self, Own};
use crate::xfrm::{self, InboundPolicies, Latches, TunnelMark, Xfrm};
use crate::xfrm_interfaces::XfrmInterfaces;

/// How to set the network up.
#[derive(Clone, Debug)]
pub struct NetworkConfig {
    /// UDP port of plain IKE.
    pub port: u16,
    /// UDP port of encapsulated IKE and ESP.
    pub nat_port: u16,
    /// Mark on all of our own packets, so that the rule for the tunnel's route table passes them by.
    pub mark: u32,
    /// Name of the TUN device, made at start; `%d` in it is a number that the system chooses.
    pub tun_name: String,
    /// MTU of the TUN device.
    pub tun_mtu: u16,
    /// Route table for routes into the tunnel.
    pub route_table: u32,
    /// Priority of the rule that leads to it.
    pub route_priority: u32,
    /// Install routes at all.
    pub install_routes: bool,
    /// Interfaces whose addresses peers may be told and moved to.
    pub interfaces: InterfaceFilter,
    /// Who does ESP.
    pub plane: PlaneChoice,
    /// Where user space does ESP: drop what comes in clear from where an SA protects it (RFC 4301 §5.2).
    pub drop_cleartext: bool,
    /// The bit of the mark that IPv6 packets bear that come out of the tunnel, for policies of the kernel; 0 is none, and
    /// no policies for them.
    pub tunnel_mark: u32,
    /// How many threads seal packets, and how many open them, where user space does ESP; 0 counts as 1.
    pub threads: usize,
}

/// Who does ESP. What comes in TCP streams is user space's where the kernel has no `espintcp`, and in TLS always.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PlaneChoice {
    /// The kernel where it has ESP, else user space.
    Auto,
    /// The kernel; without ESP in it the network does not start.
    Kernel,
    /// User space, whose packet check enforces latches of every kind.
    #[default]
    UserSpace,
}

/// More than this many [`NetworkConfig::threads`] there need not be.
pub const MAX_THREADS: usize = 64;

impl Default for NetworkConfig {
    fn default() -> Self {
        Self {
            port: 500,
            nat_port: 4500,
            mark: 0x1c4b,
            tun_name: "lk0".to_owned(),
            tun_mtu: 1400,
            route_table: 220,
            route_priority: 220,
            install_routes: true,
            interfaces: InterfaceFilter::default(),
            plane: PlaneChoice::default(),
            drop_cleartext: true,
            tunnel_mark: 0x4000_0000,
            threads: 1,
        }
    }
}

/// What comes up from the network.
#[derive(Debug)]
pub enum NetworkEvent {
    /// An IKE message, without the non-ESP marker.
    Ike {
        /// The address and port that it was sent to.
        local: SocketAddr,
        /// Where it came from.
        remote: SocketAddr,
        /// It came with a non-ESP marker, on the NAT port.
        encapsulated: bool,
        /// The message.
        bytes: Vec<u8>,
    },
    /// From the data plane.
    Plane(PlaneEvent),
    /// ICMP says that this destination is unreachable.
    Unreachable {
        /// The destination.
        remote: SocketAddr,
    },
    /// Addresses, links or routes have changed; several changes may be one event.
    Roamed,
}

/// What a batch of ESP packets from a stream says of the stream (RFC 9329 §6.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StreamWorth {
    /// One at least was authentic.
    pub authentic: bool,
    /// So many at the end were no ESP packets, or of SAs that are not known.
    pub unknown: u32,
    /// The check of one of a known SA failed.
    pub forged: bool,
}

impl StreamWorth {
    fn note(&mut self, opened: Result<(), DropReason>) {
        match opened {
            // Dropped for what is inside, which nobody sees who has not opened it.
            Ok(()) | Err(DropReason::Selectors | DropReason::Latch | DropReason::Dummy | DropReason::Ecn) => {
                (self.authentic, self.unknown) = (true, 0);
            }
            Err(DropReason::UnknownSpi | DropReason::Malformed) => self.unknown = self.unknown.saturating_add(1),
            Err(DropReason::Integrity) => self.forged = true,
            // Of a known SA, but not opened.
            Err(
                DropReason::Replay | DropReason::Expired | DropReason::NoPolicy | DropReason::NoSa | DropReason::TooBig,
            ) => {}
        }
    }
}

/// Takes an inner IP packet for a stream, without waiting; false when it was dropped, as a network does. Before it is a number
/// for its flow. When it is its turn, it is given to [`Network::seal_for_stream`].
pub type StreamSink = Box<dyn Fn(u64, &[u8]) -> bool + Send + Sync>;

/// Begins to hand a stream over to the kernel, or says why that cannot be.
pub type HandOver = Box<dyn Fn(StreamId) -> Result<(), &'static str> + Send + Sync>;

/// Handle of the running network. Cloning it is cheap; the threads stop with the last clone, or earlier by
/// [`Self::shutdown`].
#[derive(Clone)]
pub struct Network {
    inner: Arc<Inner>,
}

/// Why ESP in a stream is not the kernel's.
const NO_ESPINTCP: &str = "the kernel takes no ESP from TCP streams";

const GONE: &str = "the stream is gone";

/// What owns the threads and the system's state.
pub(crate) struct Inner {
    pub(crate) shared: Arc<Shared>,
    pub(crate) routes: Mutex<Routes>,
    pub(crate) shunts: Arc<Mutex<ShuntRules>>,
    /// Policies around the tunnel of user space; `None` where the kernel has none.
    pub(crate) inbound: Option<InboundPolicies>,
    /// Where the kernel does ESP.
    xfrm_interfaces: Option<Mutex<XfrmInterfaces>>,
    netlink: Mutex<Netlink>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    mark: u32,
    tun_name: String,
    tun_index: u32,
    filter: InterfaceFilter,
    /// The kernel's databases, where it does ESP.
    pub(crate) xfrm: Option<Arc<Xfrm>>,
    /// Its policies for latched flows, where it has any policies.
    pub(crate) latches: Option<Arc<Latches>>,
    /// Why who does ESP does it.
    pub(crate) plane_reason: &'static str,
}

/// What the threads work on.
pub(crate) struct Shared {
    pub(crate) datapath: DataPath,
    /// What it dropped, in the log.
    audit: Audit,
    pub(crate) plain: Pair,
    pub(crate) nat: Pair,
    /// Absent where the kernel does ESP.
    pub(crate) esp: Option<Pair>,
    /// Absent once the network is shut down.
    pub(crate) tun: RwLock<Option<Arc<Tun>>>,
    pub(crate) events: Events,
    /// Readable when the threads shall stop.
    pub(crate) stop: OwnedFd,
    /// Whose business ESP in each stream is, once it is decided: why not the kernel's.
    carriers: Mutex<HashMap<StreamId, Result<(), &'static str>>>,
    hand_over: OnceLock<HandOver>,
    streams: RwLock<HashMap<StreamId, StreamSink>>,
    /// Gives flows their numbers.
    flows: RandomState,
}

/// The sockets of both families.
pub(crate) struct Pair {
    pub(crate) ipv4: OuterSocket,
    pub(crate) ipv6: Option<OuterSocket>,
}

/// Buffers for packets that come from streams.
struct FromStreams {
    inner: Vec<u8>,
    writer: TunWriter,
}

thread_local! {
    /// Room for an ESP packet, of each thread that writes streams.
    static SEALED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    /// One for each thread that reads streams, so that they do not wait for each other.
    static FROM_STREAMS: RefCell<FromStreams> =
        RefCell::new(FromStreams { inner: Vec::new(), writer: TunWriter::new() });
}

/// The system's barrier around what an earlier daemon latched in the calling thread's network namespace, where none runs.
pub fn left_barrier() -> io::Result<Arc<dyn FlowBarrier>> {
    Ok(Arc::new(xfrm::left_barrier()?))
}

impl Network {
    /// Opens sockets and the TUN device and starts the threads. Errors say what could not be had and which
    /// right or setting would give it. The channel is bounded; when it is full, IKE messages are dropped.
    ///
    /// All is opened in the network namespace of the thread that polls the future.
    pub async fn start(
        config: NetworkConfig,
        guard: Arc<dyn FlowGuard>,
    ) -> io::Result<(Self, mpsc::Receiver<NetworkEvent>)> {
        let mark = config.mark;
        let plain = Pair::udp(config.port, mark)?;
        let nat = Pair::udp(config.nat_port, mark)?;
        let (xfrm, plane_reason) = choose_plane(config.plane, mark)?;
        let passed = plain.sockets().chain(nat.sockets()).try_for_each(OuterSocket::pass_by_policies);
        let (esp, policies) = match &xfrm {
            None => {
                let esp = Pair::open(|ipv6| OuterSocket::esp(ipv6, mark))?;
                let passed = passed.and_then(|()| esp.sockets().try_for_each(OuterSocket::pass_by_policies));
                let policies = passed.and_then(|()| Xfrm::open_policies());
                let without = "the kernel has no policies of IPsec: nothing is dropped that should have been protected";
                (Some(esp), policies.inspect_err(|error| tracing::warn!(%error, "{without}")).ok())
            }
            Some(xfrm) => {
                passed?;
                nat.sockets().try_for_each(OuterSocket::leave_esp_to_the_kernel)?;
                (None, Some(Arc::clone(xfrm)))
            }
        };
        let mut netlink = Netlink::open()?;
        let tun = Arc::new(Tun::new(&config.tun_name, config.tun_mtu, config.threads.max(1), &mut netlink)?);
        let tun_name = tun.name().to_owned();
        let tunnel_mark = policies.as_ref().and_then(|_| mark_tunnel(config.tunnel_mark, &tun));
        let passes = tun.pass_by_policies(tunnel_mark.is_some());
        if policies.is_some() && !passes {
            tracing::warn!("IPv4 that should have been protected is not dropped, as the tunnel would be cut off");
        }
        let inbound =
            policies.map(|policies| InboundPolicies::new(policies, passes, tunnel_mark, config.drop_cleartext));
        let latches = match Latches::open(tun.index(), xfrm.is_some()) {
            Ok(latches) => Some(Arc::new(latches)),
            Err(error) => {
                tracing::info!(%error, "the kernel cannot help with latches");
                None
            }
        };
        let route_numbers = (config.route_table, config.route_priority, mark);
        let routes = Routes::new(Netlink::open()?, tun.index(), route_numbers, config.install_routes)?;
        let shunts = ShuntRules::new(Netlink::open()?, (config.route_priority, mark), tun_name.clone())?;
        let xfrm_interfaces = match &xfrm {
            Some(_) => Some(Mutex::new(XfrmInterfaces::new(Netlink::open()?)?)),
            None => None,
        };
        warn_of_strict_reverse_paths();
        xfrm::warn_of_default_policies();
        tell_of_ecn();

        let (sender, receiver) = mpsc::channel(EVENTS);
        let shared = Arc::new(Shared {
            datapath: DataPath::new(guard),
            audit: Audit::default(),
            plain,
            nat,
            esp,
            tun: RwLock::new(Some(Arc::clone(&tun))),
            events: Events { sender, waiting: Mutex::default() },
            stop: rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC)
                .map_err(|e| context(e.into(), "make an eventfd"))?,
            carriers: Mutex::default(),
            hand_over: OnceLock::new(),
            streams: RwLock::default(),
            flows: RandomState::new(),
        });
        let inner = Arc::new(Inner {
            shared: Arc::clone(&shared),
            routes: Mutex::new(routes),
            shunts: Arc::new(Mutex::new(shunts)),
            inbound,
            xfrm_interfaces,
            netlink: Mutex::new(netlink),
            threads: Mutex::default(),
            mark,
            tun_name,
            tun_index: tun.index(),
            filter: config.interfaces,
            xfrm,
            latches,
            plane_reason,
        });
        // From here on, dropping `inner` cleans up.
        // Where the kernel does ESP there is only IKE to receive.
        let receivers = if inner.xfrm.is_some() { 1 } else { config.threads };
        let started = threads::start(&shared, &tun, receivers)?;
        lock(&inner.threads).extend(started);
        let ports = [lock(&inner.routes).port(), lock(&inner.shunts).port()];
        let own = Own { link: tun.index(), table: config.route_table, ports };
        lock(&inner.threads).push(watch::start(&shared, own)?);
        if let Some(inbound) = &inner.inbound {
            lock(&inner.threads).push(xfrm::start(&shared, inbound.databases(), inner.latches.as_ref())?);
        }
        Ok((Self { inner }, receiver))
    }

    /// The data plane over this network. It keeps the network running.
    pub fn plane(&self) -> Box<dyn DataPlane> {
        Box::new(Planes::new(&self.inner))
    }

    /// True where the kernel does ESP, so that nobody but its own policies compares packets with latches.
    pub fn leaves_esp_to_the_kernel(&self) -> bool {
        self.inner.xfrm.is_some()
    }

    /// The kernel's barrier around latched flows; `None` where it has no policies.
    pub fn barrier(&self) -> Option<Arc<dyn FlowBarrier>> {
        self.inner.latches.as_ref().map(|latches| Arc::clone(latches) as _)
    }

    /// Rules by which single flows go past the tunnel.
    pub fn logical_spd(&self) -> Arc<dyn LogicalSpd> {
        Arc::new(FlowRules(Arc::clone(&self.inner.shunts)))
    }

    /// Port of plain IKE, as bound.
    pub fn port(&self) -> u16 {
        self.inner.shared.plain.ipv4.port()
    }

    /// Port of encapsulated IKE and ESP, as bound.
    pub fn nat_port(&self) -> u16 {
        self.inner.shared.nat.ipv4.port()
    }

    /// Sends an IKE message from `local`; adds the non-ESP marker when `encapsulated`, except before a NAT
    /// keepalive (one 0xff octet).
    ///
    /// It leaves from the NAT port when `encapsulated`, else from the plain one, whatever port `local` has; an
    /// unspecified address leaves the choice to the system. `dscp` is its code point (RFC 2474), below 64. Does not wait: when
    /// the socket is full, the error is `WouldBlock`, and a retransmission will do.
    pub fn send_ike(
        &self,
        local: SocketAddr,
        remote: SocketAddr,
        encapsulated: bool,
        dscp: u8,
        bytes: &[u8],
    ) -> io::Result<()> {
        let shared = &self.inner.shared;
        let pair = if encapsulated { &shared.nat } else { &shared.plain };
        let header = Header { local, remote, tos: dscp << 2, dont_fragment: false };
        let socket = pair.family(remote.is_ipv4()).ok_or_else(|| {
            io::Error::new(io::ErrorKind::AddrNotAvailable, format!("send to {remote}: this system has no IPv6"))
        })?;
        let sent = if encapsulated && bytes != [0xff] {
            socket.send(&header, &[IoSlice::new(&NON_ESP_MARKER), IoSlice::new(bytes)], None, Duration::ZERO)
        } else {
            socket.send(&header, &[IoSlice::new(bytes)], None, Duration::ZERO)
        };
        sent.map_err(|e| io::Error::new(e.kind(), format!("send from {local} to {remote}: {e}")))
    }

    /// The source address that the system would use towards `remote`, outside the tunnel.
    pub fn source_address(&self, remote: IpAddr) -> io::Result<IpAddr> {
        lock(&self.inner.netlink).source_towards(remote, self.inner.mark)
    }

    /// The addresses by which peers can reach us, those of the loopback interface and the tunnel left out.
    pub fn local_addresses(&self) -> io::Result<Vec<IpAddr>> {
        let interfaces = lock(&self.inner.netlink).interfaces()?;
        Ok(interfaces::reachable_at(&interfaces, &self.inner.filter, self.inner.tun_index))
    }

    /// All pairs of our addresses with `remotes` that packets can take outside the tunnel, best first. `in_use` is the
    /// local address that would rather stay.
    pub fn address_pairs(&self, in_use: IpAddr, remotes: &[IpAddr]) -> io::Result<Vec<AddressPair>> {
        let Inner { netlink, filter, tun_index, mark, .. } = &*self.inner;
        let mut netlink = lock(netlink);
        let all = netlink.interfaces()?;
        let route = |remote, source| netlink.route(remote, source, *mark);
        Ok(interfaces::pairs(&all, filter, *tun_index, in_use, remotes, route))
    }

    /// Puts back the routes into the tunnel that the system removed together with an address of ours, and rules that
    /// somebody else removed.
    pub fn restore_routes(&self) {
        for outcome in [lock(&self.inner.routes).restore(), lock(&self.inner.shunts).restore()] {
            if let Err(e) = outcome {
                tracing::warn!("{e}");
            }
        }
    }

    /// Makes a socket ours: its packets stay out of the tunnel even where a tunnel covers their destination. For
    /// TCP sockets that carry IKE and ESP; those that a prepared listener accepts are ours as well.
    pub fn prepare(&self, socket: &impl AsFd) -> io::Result<()> {
        let socket = socket2::SockRef::from(socket);
        socket.set_mark(self.inner.mark).map_err(|e| context(e, "mark a socket"))?;
        let ipv6 = socket.domain()? == socket2::Domain::IPV6;
        if ipv6 {
            keep_flow_label(&socket).map_err(|e| context(e, "keep the flow label of a socket"))?;
        }
        match pass_by_policies(&socket, ipv6) {
            Err(e) if self.inner.inbound.is_some() => {
                return Err(context(e, "keep IPsec policies away from a socket"));
            }
            _ => {}
        }
        Ok(())
    }

    /// Gives the TUN device, or the device of this name, an address that the peer assigned (a virtual IP). One that is
    /// there already is an error of kind `AlreadyExists`.
    pub fn add_virtual_address(&self, address: IpAddr, device: Option<&str>) -> io::Result<()> {
        match device {
            None => lock(&self.inner.routes).add_address(address),
            Some(name) => {
                let mut netlink = lock(&self.inner.netlink);
                let index = netlink.link_index(name)?;
                netlink.add_address(index, address, host_prefix(address))
            }
        }
    }

    /// Takes a virtual IP from where [`Self::add_virtual_address`] put it; one that is gone already is fine.
    pub fn remove_virtual_address(&self, address: IpAddr, device: Option<&str>) -> io::Result<()> {
        match device {
            None => lock(&self.inner.routes).delete_address(address),
            Some(name) => {
                let mut netlink = lock(&self.inner.netlink);
                let index = netlink.link_index(name)?;
                netlink.delete_address(index, address, host_prefix(address))
            }
        }
    }

    /// Makes the XFRM interfaces that are wanted, by name with their numbers (`if_id`), and removes others of ours. Gives what
    /// could not be done, and why; it is tried again with the next call.
    pub fn set_xfrm_interfaces(&self, wanted: &BTreeMap<String, u32>) -> Vec<(String, io::Error)> {
        match &self.inner.xfrm_interfaces {
            Some(interfaces) => lock(interfaces).set(wanted),
            None => {
                let unsupported =
                    || io::Error::new(io::ErrorKind::Unsupported, "XFRM interfaces are for the kernel's plane");
                wanted.keys().map(|name| (name.clone(), unsupported())).collect()
            }
        }
    }

    /// What goes into this stream is given to `sink` from now on.
    pub fn attach_stream(&self, stream: StreamId, sink: StreamSink) {
        self.inner.shared.streams.write().unwrap_or_else(PoisonError::into_inner).insert(stream, sink);
    }

    /// How the daemon gives a stream to the kernel, for SAs in it: with [`Self::leave_stream_to_the_kernel`], once nothing
    /// of a message is on its way. Said once; where the kernel does no ESP in streams it is never asked for.
    pub fn hand_streams_over(&self, hand_over: HandOver) {
        // A second one is a mistake of the caller, and the first stays.
        let _ = self.inner.shared.hand_over.set(hand_over);
    }

    /// Has the kernel do ESP and framing of a TCP socket.
    pub fn leave_stream_to_the_kernel(socket: BorrowedFd<'_>) -> io::Result<()> {
        leave_stream_to_the_kernel(socket)
    }

    /// The stream is gone.
    pub fn detach_stream(&self, stream: StreamId) {
        let mut streams = self.inner.shared.streams.write().unwrap_or_else(PoisonError::into_inner);
        streams.remove(&stream);
        lock(&self.inner.shared.carriers).remove(&stream);
    }

    /// An ESP packet (SPI first) came from a stream.
    pub fn esp_from_stream(&self, stream: StreamId, local: SocketAddr, remote: SocketAddr, packet: &mut [u8]) {
        self.esp_batch_from_stream(stream, local, remote, [packet]);
    }

    /// Several ESP packets came from a stream, in this order. Packets of one inner flow reach the system as one,
    /// which is several times faster than one by one.
    pub fn esp_batch_from_stream<'a>(
        &self,
        stream: StreamId,
        local: SocketAddr,
        remote: SocketAddr,
        packets: impl IntoIterator<Item = &'a mut [u8]>,
    ) -> StreamWorth {
        let shared = &self.inner.shared;
        let mut worth = StreamWorth::default();
        let Some(tun) = shared.tun() else { return worth };
        let from = Encapsulation::Stream { stream, local, remote };
        let now = Instant::now();
        FROM_STREAMS.with_borrow_mut(|FromStreams { inner, writer }| {
            for packet in packets {
                // The peer sends it along a stream of which IKE has not spoken yet: the kernel's SAs follow in a moment.
                if let (Some(xfrm), Some(spi)) = (&self.inner.xfrm, packet.first_chunk())
                    && xfrm.receives(u32::from_be_bytes(*spi))
                {
                    continue;
                }
                // A stream has no outer IP header whose ECN field would belong to this packet (RFC 9329 §9.5).
                worth.note(shared.inbound(now, from, 0, packet, inner, |packet| writer.push(&tun, packet)));
            }
            writer.flush(&tun);
        });
        worth
    }

    /// It is the turn of a packet that a [`StreamSink`] took. `take` gets an ESP packet, SPI first, if one goes into this stream
    /// still; where its SA has left the stream since, it goes the SA's way.
    pub fn seal_for_stream(&self, stream: StreamId, packet: &[u8], take: &mut dyn FnMut(&[u8])) {
        let shared = &self.inner.shared;
        SEALED.with_borrow_mut(|out| match shared.datapath.outbound(Instant::now(), packet, out) {
            Outbound::Send { to: Encapsulation::Stream { stream: to, .. }, .. } if to == stream => take(out),
            outbound => threads::follow(shared, outbound, packet, out),
        });
    }

    /// Sends an inner IP packet into the tunnel, as if the system had sent it there now.
    pub fn send_inner(&self, packet: &[u8]) {
        threads::send(&self.inner.shared, packet);
    }

    /// Packets that the data plane dropped so far, by reason.
    pub fn drops(&self) -> Vec<(DropReason, u64)> {
        self.inner.shared.datapath.drops()
    }

    /// Name of the TUN device.
    pub fn tun_name(&self) -> &str {
        &self.inner.tun_name
    }

    /// Stops the threads and removes device, routes and rule, whatever clones and planes remain.
    pub async fn shutdown(self) -> io::Result<()> {
        self.inner.stop()
    }
}

impl Inner {
    /// Whether the kernel does ESP in this stream; with the first SA in it that is decided for all. The reason is why not.
    pub(crate) fn carrier_of(&self, stream: StreamId, local: IpAddr) -> Result<(), &'static str> {
        let decide = || {
            self.xfrm.as_ref().filter(|xfrm| xfrm.has_espintcp(local.is_ipv6())).ok_or(NO_ESPINTCP)?;
            self.shared.hand_over.get().ok_or(NO_ESPINTCP)?(stream)
        };
        let streams = self.shared.streams.read().unwrap_or_else(PoisonError::into_inner);
        if !streams.contains_key(&stream) {
            return Err(GONE);
        }
        *lock(&self.shared.carriers).entry(stream).or_insert_with(decide)
    }

    /// The index of a link.
    pub(crate) fn link_index(&self, name: &str) -> io::Result<u32> {
        lock(&self.netlink).link_index(name)
    }

    /// The index of the link that has an address.
    pub(crate) fn link_of(&self, address: IpAddr) -> io::Result<Option<u32>> {
        let interfaces = lock(&self.netlink).interfaces()?;
        Ok(interfaces.iter().find(|interface| interface.addresses.contains(&address)).map(|interface| interface.index))
    }

    /// Stops the threads and removes device, routes and rules; a second call does nothing.
    pub(crate) fn stop(&self) -> io::Result<()> {
        rustix::io::write(&self.shared.stop, &1_u64.to_ne_bytes())?;
        for thread in std::mem::take(&mut *lock(&self.threads)) {
            if thread.join().is_err() {
                tracing::error!("a network thread panicked");
            }
        }
        let cleared = lock(&self.routes).clear();
        let interfaces = self.xfrm_interfaces.as_ref().map_or(Ok(()), |interfaces| lock(interfaces).clear());
        // The last reference closes the device, and the system removes it.
        *self.shared.tun.write().unwrap_or_else(PoisonError::into_inner) = None;
        cleared.and(interfaces)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Err(e) = self.stop() {
            tracing::warn!("{e}");
        }
    }
}

impl Shared {
    pub(crate) fn tun(&self) -> Option<Arc<Tun>> {
        self.tun.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Opens one ESP packet and hands the inner packet to `deliver`.
    pub(crate) fn inbound(
        &self,
        now: Instant,
        from: Encapsulation,
        tos: u8,
        packet: &mut [u8],
        inner: &mut Vec<u8>,
        deliver: impl FnOnce(&[u8]),
    ) -> Result<(), DropReason> {
        match self.datapath.inbound(now, from, tos, packet, inner) {
            Inbound::Deliver { event } => {
                deliver(inner);
                if let Some(event) = event {
                    self.events.plane(event);
                }
                Ok(())
            }
            Inbound::Drop(reason) => {
                tracing::trace!(?from, ?reason, "inbound packet dropped");
                self.audit.inbound(now, &from, packet, reason);
                Err(reason)
            }
        }
    }

    /// Queues a packet if it goes into a stream.
    pub(crate) fn goes_into_stream(&self, now: Instant, packet: &[u8]) -> bool {
        let streams = self.streams.read().unwrap_or_else(PoisonError::into_inner);
        // Most have none, and need no second look at each packet.
        if streams.is_empty() {
            return false;
        }
        let Some((stream, flow)) = self.datapath.stream_of(now, packet) else { return false };
        if !streams.get(&stream).is_some_and(|sink| sink(self.flows.hash_one(flow), packet)) {
            tracing::trace!(stream = stream.0, "packet for a stream dropped");
        }
        true
    }
}

impl Pair {
    fn open(open: impl Fn(bool) -> io::Result<OuterSocket>) -> io::Result<Self> {
        let ipv4 = open(false)?;
        let ipv6 = match open(true) {
            Ok(socket) => Some(socket),
            Err(e) if is_without_ipv6(&e) => {
                tracing::info!("no IPv6: {e}");
                None
            }
            Err(e) => return Err(e),
        };
        Ok(Self { ipv4, ipv6 })
    }

    fn udp(port: u16, mark: u32) -> io::Result<Self> {
        if port != 0 {
            return Self::open(|ipv6| OuterSocket::udp(ipv6, port, mark));
        }
        // The port that the system chooses for IPv4 may be taken for IPv6.
        let mut tries = 0;
        loop {
            let ipv4 = OuterSocket::udp(false, 0, mark)?;
            match OuterSocket::udp(true, ipv4.port(), mark) {
                Ok(ipv6) => return Ok(Self { ipv4, ipv6: Some(ipv6) }),
                Err(e) if e.kind() == io::ErrorKind::AddrInUse && tries < 8 => tries += 1,
                Err(e) if is_without_ipv6(&e) => return Ok(Self { ipv4, ipv6: None }),
                Err(e) => return Err(e),
            }
        }
    }

    /// The socket of a family.
    pub(crate) fn family(&self, ipv4: bool) -> Option<&OuterSocket> {
        if ipv4 { Some(&self.ipv4) } else { self.ipv6.as_ref() }
    }

    /// Both sockets.
    pub(crate) fn sockets(&self) -> impl Iterator<Item = &OuterSocket> {
        std::iter::once(&self.ipv4).chain(&self.ipv6)
    }
}

/// The way up to the daemon. Nothing here blocks.
pub(crate) struct Events {
    sender: mpsc::Sender<NetworkEvent>,
    /// Events that must not be lost only because IKE filled the channel.
    waiting: Mutex<VecDeque<NetworkEvent>>,
}

impl Events {
    /// Sends an event up, or drops it when the channel is full. Anybody can send us any number of these, so the last
    /// places are not theirs: a flood of IKE must not keep the expiry of an SA waiting.
    pub(crate) fn offer(&self, event: NetworkEvent) {
        if self.sender.capacity() <= RESERVED_EVENTS || self.sender.try_send(event).is_err() {
            tracing::trace!("event dropped: the channel is full");
        }
    }

    /// Sends an event of the data plane up, later when the channel is full.
    pub(crate) fn plane(&self, event: PlaneEvent) {
        let mut waiting = lock(&self.waiting);
        if waiting.len() < EVENTS {
            waiting.push_back(NetworkEvent::Plane(event));
        }
        self.send_waiting(&mut waiting);
    }

    /// Says that addresses or routes have changed, once however often.
    pub(crate) fn roamed(&self) {
        let mut waiting = lock(&self.waiting);
        if !waiting.iter().any(|event| matches!(event, NetworkEvent::Roamed)) {
            waiting.push_back(NetworkEvent::Roamed);
        }
        self.send_waiting(&mut waiting);
    }

    /// Tries again what is waiting.
    pub(crate) fn retry(&self) {
        self.send_waiting(&mut lock(&self.waiting));
    }

    fn send_waiting(&self, waiting: &mut VecDeque<NetworkEvent>) {
        while let Ok(permit) = self.sender.try_reserve() {
            let Some(event) = waiting.pop_front() else { return };
            permit.send(event);
        }
    }
}

/// Connects to the kernel's databases if it shall do ESP and can.
fn choose_plane(choice: PlaneChoice, mark: u32) -> io::Result<(Option<Arc<Xfrm>>, &'static str)> {
    match choice {
        PlaneChoice::UserSpace => Ok((None, "configured")),
        PlaneChoice::Kernel => Ok((Some(Xfrm::open(mark)?), "configured")),
        PlaneChoice::Auto => match Xfrm::open(mark) {
            Ok(xfrm) => {
                tracing::info!("the kernel does ESP");
                Ok((Some(xfrm), "the kernel has ESP"))
            }
            Err(error) => {
                tracing::info!(%error, "ESP is done in user space, since the kernel cannot");
                Ok((None, "the kernel has no ESP"))
            }
        },
    }
}

/// Has what comes out of the tunnel marked, so that policies for IPv6 can let it pass.
fn mark_tunnel(bit: u32, tun: &Tun) -> Option<TunnelMark> {
    if bit == 0 {
        return None;
    }
    let marked = TunnelMark::set(bit, (tun.index(), tun.name()));
    let without = "IPv6 that should have been protected is not dropped";
    marked.inspect_err(|error| tracing::warn!(%error, "{without}")).ok()
}

/// Strict reverse path filtering judges a peer's outer packets by the route into the tunnel.
fn warn_of_strict_reverse_paths() {
    let strict = |name: &str| {
        std::fs::read_to_string(format!("/proc/sys/net/ipv4/conf/{name}/rp_filter")).is_ok_and(|v| v.trim() == "1")
    };
    if strict("all") || strict("default") {
        tracing::warn!(
            "net.ipv4.conf.*.rp_filter is 1 (strict): where a tunnel covers its peer's own address, the system will \
             drop the peer's packets; set it to 2"
        );
    }
}

/// RFC 9329 §9.5: the TCP connection that carries a tunnel should not be ECN-capable, and there is no switch for one socket.
fn tell_of_ecn() {
    if std::fs::read_to_string("/proc/sys/net/ipv4/tcp_ecn").is_ok_and(|value| value.trim() == "1") {
        tracing::info!(
            "net.ipv4.tcp_ecn is 1: TCP streams with IKE and ESP ask for ECN; 2 does not, 0 refuses it as well"
        );
    }
}

fn is_without_ipv6(error: &io::Error) -> bool {
    // EAFNOSUPPORT has no kind of its own.
    error.kind() == io::ErrorKind::AddrNotAvailable || error.to_string().contains("Address family not supported")
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// RFC 3948 §2.2.
pub(crate) const NON_ESP_MARKER: [u8; 4] = [0; 4];
const EVENTS: usize = 1024;
/// Places in the channel for events of the data plane only.
const RESERVED_EVENTS: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_of_ike_leaves_room_for_the_data_plane() {
        let (sender, mut receiver) = mpsc::channel(EVENTS);
        let events = Events { sender, waiting: Mutex::default() };
        let remote = "192.0.2.1:500".parse().unwrap();
        for _ in 0..2 * EVENTS {
            events.offer(NetworkEvent::Unreachable { remote });
        }
        events.plane(PlaneEvent::Expire { spi_in: 256, hard: true });
        let mut received = 0;
        while let Ok(event) = receiver.try_recv() {
            received += 1;
            if matches!(event, NetworkEvent::Plane(_)) {
                assert_eq!(received, EVENTS - RESERVED_EVENTS + 1);
                return;
            }
        }
        panic!("the expiry waits behind the flood");
    }
}
