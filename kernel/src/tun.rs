//! The TUN device, with segmentation and receive offload where the system has them.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use tun_rs::{DeviceBuilder, GROTable, IDEAL_BATCH_SIZE, SyncDevice, VIRTIO_NET_HDR_LEN};

use crate::netlink::Netlink;

/// The device through which inner packets come and go.
pub(crate) struct Tun {
    device: SyncDevice,
    index: u32,
    name: String,
    mtu: u16,
}

impl Tun {
    /// Keeps the kernel's IPsec policies away from what goes through the device: user space does ESP for it. IPv6 has no
    /// such switch for what goes in; there [`crate::planes`] takes away the policies that would be in the way. Its switch for
    /// what comes out is for all that comes to an address of the device: it is left alone where packets are `marked`.
    pub(crate) fn pass_by_policies(&self, marked: bool) {
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
    }

    /// Makes the device in the calling thread's network namespace and brings it up.
    pub(crate) fn new(name: &str, mtu: u16, netlink: &mut Netlink) -> io::Result<Self> {
        let build = |offload| DeviceBuilder::new().name(name).mtu(mtu).offload(offload).build_sync();
        let device = build(true)
            .or_else(|e| match e.kind() {
                // No vnet headers in this kernel.
                io::ErrorKind::InvalidInput => build(false),
                _ => Err(e),
            })
            .map_err(|e| explain(&e, name))?;
        device.set_nonblocking(true)?;
        let index = device.if_index()?;
        // One read must not give more packets than a batch has room for.
        if device.tcp_gso()
            && let Err(e) = netlink.limit_segments(index, u32::try_from(IDEAL_BATCH_SIZE).unwrap_or(64))
        {
            tracing::debug!("{e}");
        }
        // The name may have been a pattern.
        let name = device.name()?;
        let tun = Self { device, index, name, mtu };
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
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }
}

/// Reads packets that the system sends into the tunnel.
pub(crate) struct TunReader {
    super_packet: Vec<u8>,
    packets: Vec<Vec<u8>>,
    sizes: Vec<usize>,
}

impl TunReader {
    pub(crate) fn new(tun: &Tun) -> Self {
        // The operator may raise the MTU later; memory that is never written costs nothing.
        let room = usize::from(tun.mtu).max(9216);
        Self {
            super_packet: vec![0; VIRTIO_NET_HDR_LEN + (1 << 16)],
            packets: vec![vec![0; room]; IDEAL_BATCH_SIZE],
            sizes: vec![0; IDEAL_BATCH_SIZE],
        }
    }

    /// Reads once and calls `each` for every packet; false when there is nothing to read.
    pub(crate) fn read(&mut self, tun: &Tun, mut each: impl FnMut(&[u8])) -> io::Result<bool> {
        match tun.device.recv_multiple(&mut self.super_packet, &mut self.packets, &mut self.sizes, 0) {
            Ok(count) => {
                for (packet, size) in self.packets.iter().zip(&self.sizes).take(count) {
                    if let Some(packet) = packet.get(..*size) {
                        each(packet);
                    }
                }
                Ok(true)
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(true),
            // A packet that cannot be split is lost alone; an error of the device has a number.
            Err(e) if e.raw_os_error().is_none() => {
                tracing::debug!("packet from {} dropped: {e}", tun.name);
                Ok(true)
            }
            Err(e) => Err(e),
        }
    }
}

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
            && let Err(e) = tun.device.send_multiple(&mut self.table, batch, VIRTIO_NET_HDR_LEN)
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
