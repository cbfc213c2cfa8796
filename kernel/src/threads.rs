//! The threads that move packets: one reads the outer sockets, one reads the TUN device.
//!
//! Both work in batches. Nothing that a packet does ends a batch or a thread.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use ipsec::datapath::Outbound;
use ipsec::plane::{Encapsulation, PlaneEvent};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::network::{NON_ESP_MARKER, NetworkEvent, Pair, Shared};
use crate::socket::{Complaint, Header, Kind, OuterSocket, ReceiveBuffers, Received};
use crate::tun::{Tun, TunReader, TunWriter};

/// Starts the threads. They end when `shared.stop` becomes readable.
pub(crate) fn start(shared: &Arc<Shared>, tun: &Arc<Tun>) -> io::Result<Vec<JoinHandle<()>>> {
    let mut threads = Vec::new();
    let (state, device) = (Arc::clone(shared), Arc::clone(tun));
    threads.push(thread::Builder::new().name("latchkey-net".into()).spawn(move || from_network(&state, &device))?);
    let (state, device) = (Arc::clone(shared), Arc::clone(tun));
    match thread::Builder::new().name("latchkey-tun".into()).spawn(move || from_tun(&state, &device)) {
        Ok(thread) => threads.push(thread),
        Err(e) => {
            let _ = rustix::io::write(&shared.stop, &1_u64.to_ne_bytes());
            return Err(e);
        }
    }
    Ok(threads)
}

/// What a socket's packets are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Plain,
    Nat,
    Esp,
}

fn from_network(shared: &Shared, tun: &Tun) {
    let sockets: Vec<(Role, &OuterSocket)> = (shared.plain.sockets().map(|socket| (Role::Plain, socket)))
        .chain(shared.nat.sockets().map(|socket| (Role::Nat, socket)))
        .chain(shared.esp.iter().flat_map(Pair::sockets).map(|socket| (Role::Esp, socket)))
        .collect();
    let mut buffers = ReceiveBuffers::new();
    let mut inner = Vec::new();
    let mut writer = TunWriter::new();
    let mut complaints = RecentComplaints::default();
    let mut next_tick = Instant::now();
    loop {
        let mut descriptors = vec![PollFd::new(&shared.stop, PollFlags::IN)];
        descriptors.extend(sockets.iter().map(|(_, socket)| PollFd::new(*socket, PollFlags::IN)));
        match poll(&mut descriptors, Some(&TICK)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => {
                tracing::error!("poll: {e}; no packets are received any more");
                return;
            }
        }
        if descriptors.first().is_some_and(|descriptor| !descriptor.revents().is_empty()) {
            return;
        }
        let now = Instant::now();
        for ((role, socket), descriptor) in sockets.iter().zip(descriptors.iter().skip(1)) {
            if descriptor.revents().contains(PollFlags::ERR) {
                drain_complaints(shared, socket, *role, now, &mut complaints);
            }
            if descriptor.revents().contains(PollFlags::IN) {
                let received = socket.receive(&mut buffers, |how, packet| {
                    from_socket(shared, *role, now, how, packet, &mut inner, |packet| writer.push(tun, packet));
                });
                writer.flush(tun);
                if let Err(e) = received {
                    tracing::debug!("receive on port {}: {e}", socket.port());
                }
            }
        }
        if now >= next_tick {
            next_tick = now + TICK_EVERY;
            for event in shared.datapath.drain_events() {
                shared.events.plane(event);
            }
            shared.events.retry();
        }
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

fn from_tun(shared: &Shared, tun: &Tun) {
    let mut reader = TunReader::new(tun);
    let mut writer = TunWriter::new();
    let mut out = Vec::new();
    let mut batch = Batch::default();
    loop {
        let mut descriptors = [PollFd::new(&shared.stop, PollFlags::IN), PollFd::new(tun, PollFlags::IN)];
        match poll(&mut descriptors, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => {
                tracing::error!("poll: {e}; no packets go into the tunnel any more");
                return;
            }
        }
        if !descriptors[0].revents().is_empty() {
            return;
        }
        for _ in 0..READS_BETWEEN_POLLS {
            let now = Instant::now();
            let read = reader.read(tun, |packet| {
                if shared.goes_into_stream(now, packet) {
                    return;
                }
                match shared.datapath.outbound(now, packet, &mut out) {
                    Outbound::Send { to, tos, dont_fragment } => batch.push(shared, to, tos, dont_fragment, &out),
                    Outbound::Reply | Outbound::Prohibited => writer.push(tun, &out),
                    Outbound::Acquire { reqid, flow } => shared.events.plane(PlaneEvent::Acquire { reqid, flow }),
                    Outbound::Drop(reason) => tracing::trace!(?reason, "outbound packet dropped"),
                }
            });
            match read {
                Ok(true) => {}
                Ok(false) => break,
                Err(e) => {
                    tracing::error!("read from {}: {e}; no packets go into the tunnel any more", tun.name());
                    return;
                }
            }
        }
        batch.flush(shared);
        writer.flush(tun);
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

/// Datagrams of one size to one destination, to be sent by one system call.
#[derive(Default)]
struct Batch {
    header: Option<Header>,
    kind: Option<Kind>,
    size: usize,
    count: usize,
    bytes: Vec<u8>,
}

impl Batch {
    fn push(&mut self, shared: &Shared, to: Encapsulation, tos: u8, dont_fragment: bool, packet: &[u8]) {
        let (kind, local, remote) = match to {
            Encapsulation::Udp { local, remote } => (Kind::Udp, local, remote),
            Encapsulation::None { local, remote } => (Kind::Esp, SocketAddr::new(local, 0), SocketAddr::new(remote, 0)),
            // Its SA has come to a stream since, and what goes there gets its number later.
            Encapsulation::Stream { .. } => return,
        };
        let header = Some(Header { local, remote, tos, dont_fragment });
        let fits = self.header == header
            && self.kind == Some(kind)
            && packet.len() <= self.size
            && self.bytes.len() + packet.len() <= MOST_OCTETS
            && self.count < self.socket(shared).map_or(1, OuterSocket::segments);
        if !fits {
            self.flush(shared);
            self.header = header;
            self.kind = Some(kind);
            self.size = packet.len();
        }
        self.bytes.extend_from_slice(packet);
        self.count += 1;
        // Only the last datagram may be shorter.
        if packet.len() < self.size {
            self.flush(shared);
        }
    }

    fn flush(&mut self, shared: &Shared) {
        if let (Some(header), Some(socket)) = (self.header, self.socket(shared))
            && !self.bytes.is_empty()
        {
            let segment = if self.count > 1 { u16::try_from(self.size).ok() } else { None };
            if let Err(e) = socket.send(&header, &[IoSlice::new(&self.bytes)], segment, PATIENCE) {
                tracing::debug!("send ESP: {e}");
            }
        }
        self.header = None;
        self.kind = None;
        self.count = 0;
        self.bytes.clear();
    }

    fn socket<'a>(&self, shared: &'a Shared) -> Option<&'a OuterSocket> {
        let pair = match self.kind? {
            Kind::Udp => &shared.nat,
            Kind::Esp => shared.esp.as_ref()?,
        };
        pair.family(self.header?.remote.is_ipv4())
    }
}

/// How often the packet engine is asked for events.
const TICK_EVERY: Duration = Duration::from_millis(100);
const TICK: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
const COMPLAINT_EVERY: Duration = Duration::from_secs(1);
const MOST_COMPLAINTS: usize = 64;
const COMPLAINTS_AT_ONCE: usize = 64;
const READS_BETWEEN_POLLS: usize = 16;
/// The largest UDP payload over IPv4.
const MOST_OCTETS: usize = 65_507;
/// How long a full socket may hold up the tunnel, in milliseconds.
const PATIENCE: i64 = 100;
