//! The TUN device, with segmentation and receive offload where the system has them.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::libc;
use tun_rs::{DeviceBuilder, GROTable, IDEAL_BATCH_SIZE, SyncDevice, VIRTIO_NET_HDR_LEN};

use crate::netlink::Netlink;

/// The device through which inner packets come and go.
///
/// With several queues the system gives packets out by a hash of their flow, so that those of one flow stay together. Left to
/// itself it would move a flow to the queue that its answers are written to, some packets of it already being in the old
/// one. So they are written to a queue that takes no part.
pub(crate) struct Tun {
    queues: Vec<SyncDevice>,
    /// Where packets for the system are written, with several queues.
    aside: Option<SyncDevice>,
    index: u32,
    name: String,
    mtu: u16,
}

impl Tun {
    /// Keeps the kernel's IPsec policies away from what goes through the device: user space does ESP for it. IPv6 has no
    /// such switch for what goes in; there [`crate::planes`] takes away the policies that would be in the way. Its switch for
    /// what comes out is for all that comes to an address of the device: it is left alone where packets are `marked`.
    /// True when what comes out of it passes policies for IPv4 by.
    pub(crate) fn pass_by_policies(&self, marked: bool) -> bool {
        let of_addresses = if marked { "0" } else { "1" };
        for (switch, value) in [
            ("ipv4/conf/{}/disable_policy", "1"),
            ("ipv4/conf/{}/disable_xfrm", "1"),
            ("ipv6/conf/{}/disable_policy", of_addresses),
        ] {
            let path = format!("/proc/sys/net/{}", switch.replace("{}", self.name()));
            match std::fs::write(&path, value) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => tracing::warn!("write {value} to {path}: {e}"),
                _ => {}
            }
        }
        // In a container /proc/sys may be read-only.
        let switch = format!("/proc/sys/net/ipv4/conf/{}/disable_policy", self.name());
        std::fs::read_to_string(switch).is_ok_and(|value| value.trim() == "1")
    }

    /// Makes the device in the calling thread's network namespace, with so many queues if the system has them, and brings
    /// it up.
    pub(crate) fn new(name: &str, mtu: u16, queues: usize, netlink: &mut Netlink) -> io::Result<Self> {
        let build = |offload, several| {
            DeviceBuilder::new().name(name).mtu(mtu).offload(offload).multi_queue(several).build_sync()
        };
        let several = queues > 1;
        // Without vnet headers or queues in this kernel.
        let device = [(true, several), (true, false), (false, several), (false, false)]
            .into_iter()
            .find_map(|(offload, several)| match build(offload, several) {
                Err(e) if e.kind() == io::ErrorKind::InvalidInput && (offload || several) => None,
                built => Some(built.map(|device| (device, several))),
            })
            .unwrap_or_else(|| Err(io::ErrorKind::Unsupported.into()));
        let (device, several) = device.map_err(|e| explain(&e, name))?;
        device.set_nonblocking(true)?;
        let index = device.if_index()?;
        // One read must not give more packets than a batch has room for.
        if device.tcp_gso()
            && let Err(e) = netlink.limit_segments(index, u32::try_from(IDEAL_BATCH_SIZE).unwrap_or(64))
        {
            tracing::debug!("{e}");
        }
        let another = || -> io::Result<SyncDevice> {
            let queue = device.try_clone()?;
            queue.set_nonblocking(true)?;
            Ok(queue)
        };
        let mut aside = None;
        let mut more = Vec::new();
        if several {
            let queue = another()?;
            take_no_part(&queue)?;
            aside = Some(queue);
            more = (1..queues).map(|_| another()).collect::<io::Result<_>>()?;
        } else if queues > 1 {
            tracing::info!("the system's TUN devices have one queue: one thread reads it");
        }
        let queues = std::iter::once(device).chain(more).collect::<Vec<_>>();
        // The name may have been a pattern.
        let name = queues.first().ok_or(io::ErrorKind::NotFound)?.name()?;
        let tun = Self { queues, aside, index, name, mtu };
        tun.refuse_orders();
        Ok(tun)
    }

    /// A peer may send packets, but not tell this host where to send its own: no redirects, router advertisements or
    /// source routes from the tunnel. Nor are redirects sent to it, which a hub would do for packets between its spokes.
    fn refuse_orders(&self) {
        for (family, setting) in [
            ("ipv4", "accept_redirects"),
            ("ipv4", "accept_source_route"),
            ("ipv4", "send_redirects"),
            ("ipv6", "accept_redirects"),
            ("ipv6", "accept_ra"),
        ] {
            let path = format!("/proc/sys/net/{family}/conf/{}/{setting}", self.name);
            // In a container /proc/sys may be read-only, and a system may lack IPv6.
            if let Err(e) = std::fs::write(&path, "0") {
                tracing::debug!("set {path} to 0: {e}");
            }
        }
    }

    /// Index of the link.
    pub(crate) fn index(&self) -> u32 {
        self.index
    }

    /// Name of the link.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Reads the queue of this number, from 0.
    pub(crate) fn reader(&self, queue: usize) -> Option<TunReader<'_>> {
        Some(TunReader::new(self.queues.get(queue)?, self))
    }

    /// How many queues it has.
    pub(crate) fn queues(&self) -> usize {
        self.queues.len()
    }

    fn writing(&self) -> Option<&SyncDevice> {
        self.aside.as_ref().or(self.queues.first())
    }
}

/// The system puts no packets into this queue; packets for the system can still be written to it.
fn take_no_part(queue: &SyncDevice) -> io::Result<()> {
    let flags = libc::c_short::try_from(libc::IFF_DETACH_QUEUE).map_err(io::Error::other)?;
    let request =
        libc::ifreq { ifr_name: [0; libc::IFNAMSIZ], ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags } };
    // SAFETY: the descriptor is open as long as `queue` lives, and the system reads an `ifreq` at the pointer, which lives
    // until the call is over.
    #[allow(unsafe_code, reason = "a system call with a pointer")]
    let outcome = unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETQUEUE, &raw const request) };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Reads packets that the system sends into the tunnel, from one queue.
pub(crate) struct TunReader<'a> {
    queue: &'a SyncDevice,
    name: &'a str,
    super_packet: Vec<u8>,
    packets: Vec<Vec<u8>>,
    sizes: Vec<usize>,
    filled: usize,
}

impl<'a> TunReader<'a> {
    fn new(queue: &'a SyncDevice, tun: &'a Tun) -> Self {
        // The operator may raise the MTU later; memory that is never written costs nothing.
        let room = usize::from(tun.mtu).max(9216);
        let most = BURST + IDEAL_BATCH_SIZE;
        Self {
            queue,
            name: &tun.name,
            super_packet: vec![0; VIRTIO_NET_HDR_LEN + (1 << 16)],
            packets: (0..most).map(|_| vec![0; room]).collect(),
            sizes: vec![0; most],
            filled: 0,
        }
    }

    /// Forgets the packets of before and reads what is there, up to a burst; false when there is nothing left to read.
    pub(crate) fn read(&mut self) -> io::Result<bool> {
        self.filled = 0;
        while self.filled < BURST {
            let (packets, sizes) = (self.packets.get_mut(self.filled..), self.sizes.get_mut(self.filled..));
            let (packets, sizes) = (packets.unwrap_or_default(), sizes.unwrap_or_default());
            match self.queue.recv_multiple(&mut self.super_packet, packets, sizes, 0) {
                Ok(count) => self.filled += count,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // A packet that cannot be split is lost alone; an error of the device has a number.
                Err(e) if e.raw_os_error().is_none() => tracing::debug!("packet from {} dropped: {e}", self.name),
                Err(e) => return Err(e),
            }
        }
        Ok(true)
    }

    /// What the last call of [`Self::read`] has read.
    pub(crate) fn packets(&self) -> impl Iterator<Item = &[u8]> {
        let read = self.packets.iter().zip(&self.sizes).take(self.filled);
        read.filter_map(|(packet, size)| packet.get(..*size))
    }
}

impl AsFd for TunReader<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.queue.as_fd()
    }
}

/// Packets that are sealed together if they are there.
const BURST: usize = 64;

/// Collects packets for the system and writes them together, so that those of one flow become one.
pub(crate) struct TunWriter {
    table: GROTable,
    packets: Vec<Vec<u8>>,
    filled: usize,
}

impl TunWriter {
    pub(crate) fn new() -> Self {
        // A packet takes those up that follow it in its flow, as far as its room reaches. Room that is never
        // written costs no memory.
        let packets = (0..IDEAL_BATCH_SIZE).map(|_| Vec::with_capacity(VIRTIO_NET_HDR_LEN + (1 << 16))).collect();
        Self { table: GROTable::default(), packets, filled: 0 }
    }

    /// Adds an IP packet; writes the batch when it is full.
    pub(crate) fn push(&mut self, tun: &Tun, packet: &[u8]) {
        // Shorter than an IPv4 header: not a packet.
        if packet.len() < 20 {
            return;
        }
        if let Some(room) = self.packets.get_mut(self.filled) {
            room.clear();
            room.resize(VIRTIO_NET_HDR_LEN, 0);
            room.extend_from_slice(packet);
            self.filled += 1;
        }
        if self.filled == self.packets.len() {
            self.flush(tun);
        }
    }

    /// Writes what was collected.
    pub(crate) fn flush(&mut self, tun: &Tun) {
        let batch = self.packets.get_mut(..self.filled).unwrap_or_default();
        if !batch.is_empty()
            && let Some(device) = tun.writing()
            && let Err(e) = device.send_multiple(&mut self.table, batch, VIRTIO_NET_HDR_LEN)
        {
            tracing::debug!("packets for {} dropped: {e}", tun.name);
        }
        self.filled = 0;
    }
}

fn explain(error: &io::Error, name: &str) -> io::Error {
    let hint = match error.raw_os_error().map(rustix::io::Errno::from_raw_os_error) {
        Some(rustix::io::Errno::NOENT | rustix::io::Errno::NXIO | rustix::io::Errno::NODEV) => {
            "load the module (modprobe tun); in a container pass --device /dev/net/tun"
        }
        Some(rustix::io::Errno::PERM | rustix::io::Errno::ACCESS) => {
            "run as root or with CAP_NET_ADMIN; in a container pass --cap-add NET_ADMIN --device /dev/net/tun"
        }
        Some(rustix::io::Errno::BUSY) => {
            "a device of this name is in use: another daemon runs, or configure another name"
        }
        _ => "is the name a valid and free device name?",
    };
    io::Error::new(error.kind(), format!("make the TUN device {name} (/dev/net/tun): {error}; {hint}"))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::net::UdpSocket;
    use std::time::Duration;

    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::*;
    use crate::netns::Namespace;

    const FLOWS: u16 = 64;

    /// Source port (of UDP over IPv4) and queue of each packet that is there, once there are `count`.
    fn read(readers: &mut [TunReader<'_>], count: usize) -> BTreeMap<u16, usize> {
        let mut queues = BTreeMap::new();
        while queues.len() < count {
            let mut descriptors: Vec<_> = readers.iter().map(|reader| PollFd::new(reader, PollFlags::IN)).collect();
            let ready = poll(&mut descriptors, Some(&Timespec { tv_sec: 10, tv_nsec: 0 })).unwrap();
            assert_ne!(ready, 0, "of {count} flows {} came", queues.len());
            for (queue, reader) in readers.iter_mut().enumerate() {
                reader.read().unwrap();
                for packet in reader.packets().filter(|packet| packet[0] == 0x45 && packet[9] == 17) {
                    queues.insert(u16::from_be_bytes([packet[20], packet[21]]), queue);
                }
            }
        }
        queues
    }

    /// UDP over IPv4 to a flow of ours, without its checksum.
    fn answer(port: u16) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 29, 0, 1, 0, 0, 64, 17, 0, 0, 10, 99, 0, 2, 10, 99, 0, 1];
        let sum: u32 = packet.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1])).sum();
        let sum = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
        packet[10..12].copy_from_slice(&sum.to_be_bytes());
        packet.extend_from_slice(&9_u16.to_be_bytes());
        packet.extend_from_slice(&port.to_be_bytes());
        packet.extend_from_slice(&[0, 9, 0, 0, b'y']);
        packet
    }

    #[test]
    fn each_flow_has_one_queue_that_its_answers_do_not_change() {
        let host = Namespace::new().expect("this test makes a network namespace: run it as root");
        let (tun, sockets) = host
            .run(|| {
                let tun = Tun::new("lkq0", 1400, 4, &mut Netlink::open().unwrap()).unwrap();
                (tun, (1..=FLOWS).map(|_| UdpSocket::bind("0.0.0.0:0").unwrap()).collect::<Vec<_>>())
            })
            .unwrap();
        host.add_address("lkq0", "10.99.0.1".parse().unwrap(), 24).unwrap();
        let mut readers: Vec<_> = (0..tun.queues()).map(|queue| tun.reader(queue).unwrap()).collect();
        assert_eq!(readers.len(), 4);
        let ports: Vec<u16> = sockets.iter().map(|socket| socket.local_addr().unwrap().port()).collect();
        let send = || sockets.iter().for_each(|socket| assert_eq!(socket.send_to(b"x", "10.99.0.2:9").unwrap(), 1));
        send();
        let first = read(&mut readers, sockets.len());
        assert!(first.keys().eq(ports.iter().collect::<std::collections::BTreeSet<_>>()));
        assert!(first.values().any(|queue| Some(queue) != first.values().next()), "more than one queue has flows");
        let mut writer = TunWriter::new();
        for port in &ports {
            writer.push(&tun, &answer(*port));
        }
        writer.flush(&tun);
        for socket in &sockets {
            socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            assert_eq!(socket.recv(&mut [0; 8]).expect("what is written to no queue arrives"), 1);
        }
        send();
        assert_eq!(read(&mut readers, sockets.len()), first);
    }
}
