//! The threads that move packets: some read the outer sockets, and one each queue of the TUN device.
//!
//! All work in batches. Nothing that a packet does ends a batch or a thread.
//!
//! **Out.** The system gives the packets of a flow to one queue, and so to one thread, which seals and sends them. Threads that
//! send under one SA take turns, so that its packets leave in the order of their sequence numbers
//! ([`ipsec::datapath::DataPath::outbound_batch`]).
//!
//! **In.** One thread at a time, the leader, waits for the sockets and takes a batch off one of them. A batch that is worth it
//! it opens after another thread has become the leader. Before that it takes the lane of each `reqid` in the batch, and gives it
//! up when the inner packets have been delivered: so packets of one SA and of its successors are opened and delivered as they
//! came, while those of others go on beside them. A small batch the leader opens itself, so that without much to do there is
//! one thread that works.
//! Who waits for a lane is a leader, and who has lanes waits for nobody: there is no circle.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use ipsec::datapath::{Outbound, Outlet};
use ipsec::plane::{Encapsulation, PlaneEvent};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::network::{NON_ESP_MARKER, NetworkEvent, Pair, Shared, lock};
use crate::socket::{Complaint, Header, Kind, OuterSocket, ReceiveBuffers, Received};
use crate::tun::{Tun, TunWriter};

/// Starts the threads: `receivers` for the sockets, and one for each queue of the device. They end when `shared.stop` becomes
/// readable.
pub(crate) fn start(shared: &Arc<Shared>, tun: &Arc<Tun>, receivers: usize) -> io::Result<Vec<JoinHandle<()>>> {
    let mut threads = Vec::new();
    let mut start = |name: String, work: Box<dyn FnOnce() + Send>| match thread::Builder::new().name(name).spawn(work) {
        Ok(thread) => {
            threads.push(thread);
            Ok(())
        }
        Err(e) => {
            let _ = rustix::io::write(&shared.stop, &1_u64.to_ne_bytes());
            Err(e)
        }
    };
    let receiving = Arc::new(Receiving::default());
    for number in 0..receivers.max(1) {
        let (state, device, receiving) = (Arc::clone(shared), Arc::clone(tun), Arc::clone(&receiving));
        start(format!("latchkey-net{number}"), Box::new(move || from_network(&state, &device, &receiving)))?;
    }
    for queue in 0..tun.queues() {
        let (state, device) = (Arc::clone(shared), Arc::clone(tun));
        start(format!("latchkey-tun{queue}"), Box::new(move || from_tun(&state, &device, queue)))?;
    }
    Ok(threads)
}

/// What the threads that read the sockets share.
struct Receiving {
    leader: Mutex<Leader>,
    /// An SA's is that of its `reqid`; the first one is also that of IKE and of what no SA is for.
    lanes: [Mutex<()>; LANES],
}

/// What the leader has.
struct Leader {
    /// Numbers of sockets that packets wait in.
    ready: VecDeque<usize>,
    complaints: RecentComplaints,
    next_tick: Instant,
}

impl Default for Receiving {
    fn default() -> Self {
        let leader =
            Leader { ready: VecDeque::new(), complaints: RecentComplaints::default(), next_tick: Instant::now() };
        Self { leader: Mutex::new(leader), lanes: [const { Mutex::new(()) }; LANES] }
    }
}

/// What a socket's packets are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Plain,
    Nat,
    Esp,
}

fn from_network(shared: &Shared, tun: &Tun, receiving: &Receiving) {
    let sockets: Vec<(Role, &OuterSocket)> = (shared.plain.sockets().map(|socket| (Role::Plain, socket)))
        .chain(shared.nat.sockets().map(|socket| (Role::Nat, socket)))
        .chain(shared.esp.iter().flat_map(Pair::sockets).map(|socket| (Role::Esp, socket)))
        .collect();
    let mut buffers = ReceiveBuffers::new();
    let mut inner = Vec::new();
    let mut writer = TunWriter::new();
    let mut lanes: Vec<MutexGuard<'_, ()>> = Vec::with_capacity(LANES);
    loop {
        let mut leader = Some(lock(&receiving.leader));
        let socket = match leader.as_mut().map(|leader| leader.next(shared, &sockets)) {
            Some(Next::Socket(socket)) => socket,
            Some(Next::Nothing) => continue,
            Some(Next::Stop) | None => return,
        };
        let Some((role, socket)) = sockets.get(socket).copied() else { continue };
        let received = socket.receive(&mut buffers);
        if let Err(e) = received {
            tracing::debug!("receive on port {}: {e}", socket.port());
            continue;
        }
        let mut wanted = [false; LANES];
        let mut last = None;
        socket.packets(&mut buffers, |_, packet| {
            let spi = spi(role, packet);
            if last != Some(spi) {
                last = Some(spi);
                let lane = usize::try_from(shared.datapath.reqid(spi).unwrap_or(0)).unwrap_or(0) % LANES;
                if let Some(wanted) = wanted.get_mut(lane) {
                    *wanted = true;
                }
            }
        });
        let wanted = receiving.lanes.iter().zip(wanted).filter(|(_, wanted)| *wanted);
        lanes.extend(wanted.map(|(lane, _)| lock(lane)));
        if buffers.octets() >= WORTH_ANOTHER_THREAD {
            leader = None;
        }
        let now = Instant::now();
        socket.packets(&mut buffers, |how, packet| {
            from_socket(shared, role, now, how, packet, &mut inner, |packet| writer.push(tun, packet));
        });
        writer.flush(tun);
        lanes.clear();
        drop(leader);
    }
}

/// The SPI of an ESP packet, and 0, which none has, of other packets.
fn spi(role: Role, packet: &[u8]) -> u32 {
    match (role, packet.first_chunk()) {
        (Role::Nat | Role::Esp, Some(spi)) => u32::from_be_bytes(*spi),
        (Role::Plain, _) | (_, None) => 0,
    }
}

/// What a leader has to do.
enum Next {
    /// Receive from the socket of this number.
    Socket(usize),
    /// Nothing came.
    Nothing,
    Stop,
}

impl Leader {
    /// Waits until there is something to receive, and does what else is to be done meanwhile.
    fn next(&mut self, shared: &Shared, sockets: &[(Role, &OuterSocket)]) -> Next {
        if let Some(socket) = self.ready.pop_front() {
            return Next::Socket(socket);
        }
        let mut descriptors = vec![PollFd::new(&shared.stop, PollFlags::IN)];
        descriptors.extend(sockets.iter().map(|(_, socket)| PollFd::new(*socket, PollFlags::IN)));
        match poll(&mut descriptors, Some(&TICK)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => {
                tracing::error!("poll: {e}; no packets are received any more");
                return Next::Stop;
            }
        }
        if descriptors.first().is_some_and(|descriptor| !descriptor.revents().is_empty()) {
            return Next::Stop;
        }
        let now = Instant::now();
        for (number, ((role, socket), descriptor)) in sockets.iter().zip(descriptors.iter().skip(1)).enumerate() {
            if descriptor.revents().contains(PollFlags::ERR) {
                drain_complaints(shared, socket, *role, now, &mut self.complaints);
            }
            if descriptor.revents().contains(PollFlags::IN) {
                self.ready.push_back(number);
            }
        }
        if now >= self.next_tick {
            self.next_tick = now + TICK_EVERY;
            for event in shared.datapath.drain_events() {
                shared.events.plane(event);
            }
            shared.events.retry();
        }
        self.ready.pop_front().map_or(Next::Nothing, Next::Socket)
    }
}

fn from_socket(
    shared: &Shared,
    role: Role,
    now: Instant,
    how: Received,
    packet: &mut [u8],
    inner: &mut Vec<u8>,
    deliver: impl FnOnce(&[u8]),
) {
    let ike = |encapsulated, message: &[u8]| {
        shared.events.offer(NetworkEvent::Ike {
            local: how.local,
            remote: how.remote,
            encapsulated,
            bytes: message.to_vec(),
        });
    };
    match role {
        Role::Plain => ike(false, packet),
        Role::Esp => {
            let from = Encapsulation::None { local: how.local.ip(), remote: how.remote.ip() };
            let _ = shared.inbound(now, from, how.tos, packet, inner, deliver);
        }
        Role::Nat => match packet.split_first_chunk::<4>() {
            // RFC 3948 §2.3: keepalives are one octet; anything else that is shorter than an SPI is noise.
            None => {}
            // RFC 3948 §2.2.
            Some((&NON_ESP_MARKER, message)) => ike(true, message),
            Some(_) => {
                let from = Encapsulation::Udp { local: how.local, remote: how.remote };
                let _ = shared.inbound(now, from, how.tos, packet, inner, deliver);
            }
        },
    }
}

/// ICMP errors passed up lately: one for each destination a second is enough, and anybody can forge them.
#[derive(Default)]
struct RecentComplaints {
    recent: VecDeque<(Instant, SocketAddr)>,
}

impl RecentComplaints {
    fn is_new(&mut self, now: Instant, remote: SocketAddr) -> bool {
        self.recent.retain(|(at, _)| now.saturating_duration_since(*at) < COMPLAINT_EVERY);
        if self.recent.len() >= MOST_COMPLAINTS || self.recent.iter().any(|(_, known)| *known == remote) {
            return false;
        }
        self.recent.push_back((now, remote));
        true
    }
}

fn drain_complaints(shared: &Shared, socket: &OuterSocket, role: Role, now: Instant, recent: &mut RecentComplaints) {
    // The rest waits for the next turn: whoever floods us with ICMP must not stop the packets.
    for _ in 0..COMPLAINTS_AT_ONCE {
        match socket.complaint() {
            Ok(None) => return,
            Ok(Some(None)) => {}
            Ok(Some(Some(Complaint::TooBig(remote, mtu)))) => {
                shared.datapath.set_path_mtu(now, remote, mtu);
            }
            Ok(Some(Some(Complaint::Unreachable(remote)))) => {
                if role != Role::Esp && recent.is_new(now, remote) {
                    shared.events.offer(NetworkEvent::Unreachable { remote });
                }
            }
            Err(e) => {
                tracing::debug!("error queue of port {}: {e}", socket.port());
                return;
            }
        }
    }
}

fn from_tun(shared: &Shared, tun: &Tun, queue: usize) {
    let Some(mut reader) = tun.reader(queue) else { return };
    let mut outlet = TunnelOutlet { shared, tun, writer: TunWriter::new(), batch: Batch::default() };
    let mut out = Vec::new();
    loop {
        let mut descriptors = [PollFd::new(&shared.stop, PollFlags::IN), PollFd::new(&reader, PollFlags::IN)];
        match poll(&mut descriptors, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => {
                tracing::error!("poll: {e}; packets of a queue do not go into the tunnel any more");
                return;
            }
        }
        if !descriptors[0].revents().is_empty() {
            return;
        }
        for _ in 0..BURSTS_BETWEEN_POLLS {
            let more = match reader.read() {
                Ok(more) => more,
                Err(e) => {
                    let name = tun.name();
                    tracing::error!("read from {name}: {e}; packets of a queue do not go into the tunnel any more");
                    return;
                }
            };
            let now = Instant::now();
            let packets = reader.packets().filter(|packet| !shared.goes_into_stream(now, packet));
            shared.datapath.outbound_batch(now, packets, &mut out, &mut outlet);
            outlet.writer.flush(tun);
            if !more {
                break;
            }
        }
    }
}

/// Sends a packet into the tunnel as if it had just come from the TUN device.
pub(crate) fn send(shared: &Shared, packet: &[u8]) {
    let now = Instant::now();
    let Some(tun) = shared.tun() else { return };
    if shared.goes_into_stream(now, packet) {
        return;
    }
    let mut outlet = TunnelOutlet { shared, tun: &tun, writer: TunWriter::new(), batch: Batch::default() };
    shared.datapath.outbound_batch(now, [packet], &mut Vec::new(), &mut outlet);
    outlet.writer.flush(&tun);
}

/// Where packets from the TUN device go.
struct TunnelOutlet<'a> {
    shared: &'a Shared,
    tun: &'a Tun,
    writer: TunWriter,
    batch: Batch,
}

impl Outlet for TunnelOutlet<'_> {
    fn take(&mut self, outbound: Outbound, out: &[u8]) {
        match outbound {
            Outbound::Send { to, tos, dont_fragment } => self.batch.push(self.shared, to, tos, dont_fragment, out),
            Outbound::Reply | Outbound::Prohibited => self.writer.push(self.tun, out),
            Outbound::Acquire { reqid, flow } => self.shared.events.plane(PlaneEvent::Acquire { reqid, flow }),
            Outbound::Drop(reason) => tracing::trace!(?reason, "outbound packet dropped"),
        }
    }

    fn send(&mut self) {
        self.batch.flush(self.shared);
    }
}

/// Does with one packet what the data path said, which left `out`.
pub(crate) fn follow(shared: &Shared, outbound: Outbound, packet: &[u8], out: &[u8]) {
    match outbound {
        Outbound::Send { to: Encapsulation::Stream { .. }, .. } => {
            shared.goes_into_stream(Instant::now(), packet);
        }
        Outbound::Send { to, tos, dont_fragment } => {
            let mut batch = Batch::default();
            batch.push(shared, to, tos, dont_fragment, out);
            batch.flush(shared);
        }
        Outbound::Reply | Outbound::Prohibited => {
            if let Some(tun) = shared.tun() {
                let mut writer = TunWriter::new();
                writer.push(&tun, out);
                writer.flush(&tun);
            }
        }
        Outbound::Acquire { reqid, flow } => shared.events.plane(PlaneEvent::Acquire { reqid, flow }),
        Outbound::Drop(reason) => tracing::trace!(?reason, "outbound packet dropped"),
    }
}

/// Datagrams to be sent together.
#[derive(Default)]
struct Batch {
    messages: Vec<Message>,
    bytes: Vec<u8>,
}

/// Datagrams of one size to one destination, to be sent by one system call. Only the last may be shorter.
struct Message {
    header: Header,
    kind: Kind,
    size: usize,
    count: usize,
    octets: usize,
    /// The last datagram was shorter.
    closed: bool,
}

impl Batch {
    fn push(&mut self, shared: &Shared, to: Encapsulation, tos: u8, dont_fragment: bool, packet: &[u8]) {
        let (kind, local, remote) = match to {
            Encapsulation::Udp { local, remote } => (Kind::Udp, local, remote),
            Encapsulation::None { local, remote } => (Kind::Esp, SocketAddr::new(local, 0), SocketAddr::new(remote, 0)),
            // Its SA has come to a stream since, and what goes there gets its number later.
            Encapsulation::Stream { .. } => return,
        };
        let header = Header { local, remote, tos, dont_fragment };
        let segments = socket(shared, kind, remote).map_or(1, OuterSocket::segments);
        self.bytes.extend_from_slice(packet);
        match self.messages.last_mut() {
            Some(last)
                if last.header == header
                    && last.kind == kind
                    && !last.closed
                    && packet.len() <= last.size
                    && last.octets + packet.len() <= MOST_OCTETS
                    && last.count < segments =>
            {
                last.octets += packet.len();
                last.count += 1;
                last.closed = packet.len() < last.size;
            }
            _ => self.messages.push(Message {
                header,
                kind,
                size: packet.len(),
                count: 1,
                octets: packet.len(),
                closed: false,
            }),
        }
    }

    fn flush(&mut self, shared: &Shared) {
        let mut rest = &*self.bytes;
        // For all together: what is sealed is not to lie here for long, and other threads wait.
        let until = Instant::now() + PATIENCE;
        for message in self.messages.drain(..) {
            let Some((octets, behind)) = rest.split_at_checked(message.octets) else { break };
            rest = behind;
            let Some(socket) = socket(shared, message.kind, message.header.remote) else { continue };
            let segment = if message.count > 1 { u16::try_from(message.size).ok() } else { None };
            let patience = until.saturating_duration_since(Instant::now());
            if let Err(e) = socket.send(&message.header, &[IoSlice::new(octets)], segment, patience) {
                tracing::debug!("send ESP: {e}");
            }
        }
        self.bytes.clear();
    }
}

fn socket(shared: &Shared, kind: Kind, remote: SocketAddr) -> Option<&OuterSocket> {
    let pair = match kind {
        Kind::Udp => &shared.nat,
        Kind::Esp => shared.esp.as_ref()?,
    };
    pair.family(remote.is_ipv4())
}

/// How often the packet engine is asked for events.
const TICK_EVERY: Duration = Duration::from_millis(100);
const TICK: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
const COMPLAINT_EVERY: Duration = Duration::from_secs(1);
const MOST_COMPLAINTS: usize = 64;
const COMPLAINTS_AT_ONCE: usize = 64;
const BURSTS_BETWEEN_POLLS: usize = 16;
/// Octets from which on a batch takes longer to open than another thread takes to wake up.
const WORTH_ANOTHER_THREAD: usize = 32 * 1024;
/// More than threads, so that SAs seldom share one without need.
const LANES: usize = 64;
/// The largest UDP payload over IPv4.
const MOST_OCTETS: usize = 65_507;
/// How long a full socket may hold up the tunnel.
const PATIENCE: Duration = Duration::from_millis(100);
