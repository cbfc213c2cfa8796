//! The outer sockets: UDP for IKE and encapsulated ESP (RFC 3948), raw IP for plain ESP (RFC 4303).
//!
//! All are bound to any address, say to which address a packet came, and send from the address that they are told.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nix::libc;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg, sockopt};
use quinn_udp::{BATCH_SIZE, RecvMeta, UdpSockRef, UdpSocketState};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt as option;
use rustix::net::sockopt::{Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use crate::netlink::context;
use crate::xfrm::codec::bypass;

/// One outer socket.
pub(crate) struct OuterSocket {
    socket: Socket,
    receiver: UdpSocketState,
    /// How many datagrams one system call may send; 1 where the system or a device cannot segment.
    segments: AtomicUsize,
    /// What the socket is set to, and the lock under which a sender that needs it otherwise sets and sends.
    dont_fragment: Mutex<bool>,
    local: SocketAddr,
    kind: Kind,
}

/// What a socket carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// UDP.
    Udp,
    /// IP protocol 50.
    Esp,
}

/// How an outer packet goes out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// From which address; an unspecified one leaves it to the system. Its port is that of the socket.
    pub(crate) local: SocketAddr,
    /// Where to.
    pub(crate) remote: SocketAddr,
    /// TOS octet or traffic class.
    pub(crate) tos: u8,
    /// Whether routers may fragment it (IPv4).
    pub(crate) dont_fragment: bool,
}

/// How a packet came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Received {
    pub(crate) local: SocketAddr,
    pub(crate) remote: SocketAddr,
    pub(crate) tos: u8,
}

/// What ICMP said about a packet of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Complaint {
    /// Nobody there.
    Unreachable(SocketAddr),
    /// The outer packet was longer than this allows.
    TooBig(IpAddr, usize),
}

/// Room for one system call's worth of packets, shared by all sockets of a thread.
pub(crate) struct ReceiveBuffers {
    room: Vec<u8>,
    meta: [RecvMeta; BATCH_SIZE],
    filled: usize,
}

impl ReceiveBuffers {
    pub(crate) fn new() -> Self {
        Self { room: vec![0; BATCH_SIZE * ROOM], meta: [RecvMeta::default(); BATCH_SIZE], filled: 0 }
    }

    /// Octets received.
    pub(crate) fn octets(&self) -> usize {
        self.meta.iter().take(self.filled).map(|meta| meta.len).sum()
    }
}

impl OuterSocket {
    /// Opens a UDP socket on any address of a family. Port 0 lets the system choose.
    pub(crate) fn udp(ipv6: bool, port: u16, mark: u32) -> io::Result<Self> {
        let any = any(ipv6, port);
        let name = format!("UDP port {port} ({})", if ipv6 { "IPv6" } else { "IPv4" });
        let socket = Socket::new(Domain::for_address(any), Type::DGRAM, Some(Protocol::UDP))
            .map_err(|e| context(e, format!("open a socket for {name}")))?;
        if ipv6 {
            socket.set_only_v6(true)?;
        }
        socket.bind(&any.into()).map_err(|e| match e.kind() {
            io::ErrorKind::AddrInUse => io::Error::new(
                e.kind(),
                format!(
                    "bind {name}: {e}; another IKE daemon (charon, pluto, iked) may hold it: `ss -lunp sport = :{port}` \
                     names it; stop it or configure other ports"
                ),
            ),
            io::ErrorKind::PermissionDenied => io::Error::new(
                e.kind(),
                format!("bind {name}: {e}; ports below 1024 need root or CAP_NET_BIND_SERVICE"),
            ),
            _ => io::Error::new(e.kind(), format!("bind {name}: {e}")),
        })?;
        Self::finish(socket, ipv6, mark, Kind::Udp).map_err(|e| context(e, format!("set up {name}")))
    }

    /// Opens a raw socket for ESP of a family.
    pub(crate) fn esp(ipv6: bool, mark: u32) -> io::Result<Self> {
        let name = if ipv6 { "raw ESP (IPv6)" } else { "raw ESP (IPv4)" };
        let domain = if ipv6 { Domain::IPV6 } else { Domain::IPV4 };
        let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(ESP)))
            .map_err(|e| context(e, format!("open a socket for {name}")))?;
        Self::finish(socket, ipv6, mark, Kind::Esp).map_err(|e| context(e, format!("set up a socket for {name}")))
    }

    fn finish(socket: Socket, ipv6: bool, mark: u32, kind: Kind) -> io::Result<Self> {
        socket.set_cloexec(true)?;
        socket.set_mark(mark)?;
        // The forced variants pass by the system-wide limit and need CAP_NET_ADMIN.
        if option::set_socket_recv_buffer_size_force(&socket, BUFFER).is_err() {
            option::set_socket_recv_buffer_size(&socket, BUFFER)?;
        }
        if option::set_socket_send_buffer_size_force(&socket, BUFFER).is_err() {
            option::set_socket_send_buffer_size(&socket, BUFFER)?;
        }
        let receiver = UdpSocketState::new(UdpSockRef::from(&socket))?;
        // The line above forbids fragments; IKE messages with certificates may need them.
        if ipv6 {
            option::set_ipv6_mtu_discover(&socket, Ipv6PathMtuDiscovery::WANT)?;
            nix::sys::socket::setsockopt(&socket, sockopt::Ipv6DontFrag, &false)?;
            nix::sys::socket::setsockopt(&socket, sockopt::Ipv6RecvErr, &true)?;
        } else {
            option::set_ip_mtu_discover(&socket, Ipv4PathMtuDiscovery::DONT)?;
            nix::sys::socket::setsockopt(&socket, sockopt::Ipv4RecvErr, &true)?;
        }
        let local = match kind {
            Kind::Udp => socket
                .local_addr()?
                .as_socket()
                .ok_or_else(|| io::Error::other("a bound UDP socket has no IP address"))?,
            Kind::Esp => any(ipv6, 0),
        };
        let segments = AtomicUsize::new(match kind {
            Kind::Udp => receiver.max_gso_segments(),
            Kind::Esp => 1,
        });
        Ok(Self { socket, receiver, segments, dont_fragment: Mutex::new(false), local, kind })
    }

    /// Keeps the kernel's IPsec policies away from this socket's packets: IKE is to get through whatever they say.
    pub(crate) fn pass_by_policies(&self) -> io::Result<()> {
        pass_by_policies(&self.socket, self.local.is_ipv6())
            .map_err(|e| context(e, format!("keep IPsec policies away from port {}", self.port())))
    }

    /// Has the kernel take what is ESP out of this socket's packets (RFC 3948); IKE still comes.
    pub(crate) fn leave_esp_to_the_kernel(&self) -> io::Result<()> {
        // It takes packets one by one: aggregated ones would go to it as one.
        let off = 0_i32.to_ne_bytes();
        let esp_in_udp = UDP_ENCAP_ESPINUDP.to_ne_bytes();
        for (option, value) in [(libc::UDP_GRO, off), (UDP_ENCAP, esp_in_udp)] {
            set_option(&self.socket, libc::SOL_UDP, option, &value).map_err(|e| {
                context(e, format!("have the kernel take ESP from UDP port {} (modules esp4, esp6)", self.port()))
            })?;
        }
        Ok(())
    }

    /// The port that it is bound to.
    pub(crate) fn port(&self) -> u16 {
        self.local.port()
    }

    /// How many datagrams of one size a call of [`Self::send`] may carry.
    pub(crate) fn segments(&self) -> usize {
        self.segments.load(Ordering::Relaxed)
    }

    /// Sends `parts` as one datagram, or as several of `segment` octets each (the last may be shorter).
    /// `patience` is how long to wait for room in the socket.
    pub(crate) fn send(
        &self,
        header: &Header,
        parts: &[IoSlice<'_>],
        segment: Option<u16>,
        patience: Duration,
    ) -> io::Result<()> {
        match self.send_once(header, parts, segment, patience) {
            Err(e) if segment.is_some() && matches!(errno(&e), Some(Errno::IO | Errno::INVAL | Errno::MSGSIZE)) => {
                if errno(&e) == Some(Errno::IO) {
                    tracing::info!("the system cannot segment UDP ({e}); datagrams are sent one by one from now on");
                    self.segments.store(1, Ordering::Relaxed);
                }
                let size = usize::from(segment.unwrap_or(u16::MAX)).max(1);
                let mut result = Ok(());
                for datagram in parts.iter().flat_map(|part| part.chunks(size)) {
                    let sent = self.send_once(header, &[IoSlice::new(datagram)], None, patience);
                    result = result.and(sent);
                }
                result
            }
            result => result,
        }
    }

    fn send_once(
        &self,
        header: &Header,
        parts: &[IoSlice<'_>],
        segment: Option<u16>,
        patience: Duration,
    ) -> io::Result<()> {
        let mut retried = false;
        let mut waited = false;
        loop {
            let sent = self.send_message(header, parts, segment);
            match &sent {
                Err(e) if errno(e) == Some(Errno::INTR) => {}
                // An ICMP error for an earlier packet is reported on the next call, whatever that one sends.
                Err(e) if !retried && is_reported_late(e) => retried = true,
                Err(e) if !waited && !patience.is_zero() && e.kind() == io::ErrorKind::WouldBlock => {
                    waited = true;
                    let timeout = Timespec::try_from(patience).map_err(io::Error::other)?;
                    poll(&mut [PollFd::new(&self.socket, PollFlags::OUT)], Some(&timeout))?;
                }
                _ => return sent,
            }
        }
    }

    fn send_message(&self, header: &Header, parts: &[IoSlice<'_>], segment: Option<u16>) -> io::Result<()> {
        let ipv4_source;
        let ipv6_source;
        let traffic_class = i32::from(header.tos);
        let mut control = Vec::with_capacity(3);
        match header.local {
            SocketAddr::V4(local) => {
                control.push(ControlMessage::Ipv4Tos(&header.tos));
                if !local.ip().is_unspecified() {
                    ipv4_source = libc::in_pktinfo {
                        ipi_ifindex: 0,
                        ipi_spec_dst: libc::in_addr { s_addr: u32::from_ne_bytes(local.ip().octets()) },
                        ipi_addr: libc::in_addr { s_addr: 0 },
                    };
                    control.push(ControlMessage::Ipv4PacketInfo(&ipv4_source));
                }
            }
            SocketAddr::V6(local) => {
                control.push(ControlMessage::Ipv6TClass(&traffic_class));
                if !local.ip().is_unspecified() {
                    ipv6_source = libc::in6_pktinfo {
                        ipi6_addr: libc::in6_addr { s6_addr: local.ip().octets() },
                        ipi6_ifindex: local.scope_id(),
                    };
                    control.push(ControlMessage::Ipv6PacketInfo(&ipv6_source));
                }
            }
        }
        if let Some(segment) = &segment {
            control.push(ControlMessage::UdpGsoSegments(segment));
        }
        let mut remote = header.remote;
        if self.kind == Kind::Esp {
            // raw(7), ipv6(7): the port of a raw destination is a protocol number, and must be absent.
            remote.set_port(0);
        }
        let remote = SockaddrStorage::from(remote);

        let mut dont_fragment = self.dont_fragment.lock().unwrap_or_else(PoisonError::into_inner);
        if header.local.is_ipv4() && *dont_fragment != header.dont_fragment {
            let discovery = if header.dont_fragment { Ipv4PathMtuDiscovery::DO } else { Ipv4PathMtuDiscovery::DONT };
            option::set_ip_mtu_discover(&self.socket, discovery)?;
            *dont_fragment = header.dont_fragment;
        }
        sendmsg(self.socket.as_raw_fd(), parts, &control, MsgFlags::empty(), Some(&remote))?;
        Ok(())
    }

    /// Receives what is there, up to one batch.
    pub(crate) fn receive(&self, buffers: &mut ReceiveBuffers) -> io::Result<()> {
        buffers.filled = 0;
        let mut rooms = buffers.room.chunks_exact_mut(ROOM);
        let mut slices: [IoSliceMut<'_>; BATCH_SIZE] =
            std::array::from_fn(|_| IoSliceMut::new(rooms.next().unwrap_or_default()));
        match self.receiver.recv(UdpSockRef::from(&self.socket), &mut slices, &mut buffers.meta) {
            Ok(received) => buffers.filled = received,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock || e.kind() == io::ErrorKind::Interrupted => {}
            // Reported by the error queue as well, which says more.
            Err(e) if is_reported_late(&e) => {}
            Err(e) => return Err(e),
        }
        Ok(())
    }

    /// Calls `each` for every packet that [`Self::receive`] has put into the buffers: a datagram, or an ESP packet without
    /// its IP header.
    pub(crate) fn packets(&self, buffers: &mut ReceiveBuffers, mut each: impl FnMut(Received, &mut [u8])) {
        let rooms = buffers.room.chunks_exact_mut(ROOM);
        for (meta, room) in buffers.meta.iter().zip(rooms).take(buffers.filled) {
            let Some(filled) = room.get_mut(..meta.len) else { continue };
            if self.kind == Kind::Esp && meta.addr.is_ipv4() {
                if let Some((how, payload)) = strip_ipv4(filled) {
                    each(how, payload);
                }
                continue;
            }
            let how =
                Received { local: self.destination(meta), remote: meta.addr, tos: meta.ecn.map_or(0, |ecn| ecn as u8) };
            for datagram in filled.chunks_mut(meta.stride.max(1)) {
                each(how, datagram);
            }
        }
    }

    fn destination(&self, meta: &RecvMeta) -> SocketAddr {
        let address = meta.dst_ip.unwrap_or(self.local.ip());
        match address {
            IpAddr::V6(address) if address.is_unicast_link_local() => {
                SocketAddr::V6(SocketAddrV6::new(address, self.port(), 0, meta.interface_index.unwrap_or_default()))
            }
            address => SocketAddr::new(address, self.port()),
        }
    }

    /// Takes one entry from the socket's error queue; `None` when it is empty.
    pub(crate) fn complaint(&self) -> io::Result<Option<Option<Complaint>>> {
        let mut room = [0; 1];
        let mut slices = [IoSliceMut::new(&mut room)];
        let mut control = [0; 512];
        let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
        let message = match recvmsg::<SockaddrStorage>(self.socket.as_raw_fd(), &mut slices, Some(&mut control), flags)
        {
            Ok(message) => message,
            Err(nix::errno::Errno::EAGAIN) => {
                // Clears the error that the queue's entries left pending.
                let _ = self.socket.take_error();
                return Ok(None);
            }
            Err(e) => return Err(e.into()),
        };
        // The name is the destination of our packet; who complained is in the control message.
        let remote = message.address.as_ref().and_then(|address| {
            let ipv4 = address.as_sockaddr_in().map(|a| SocketAddr::new(a.ip().into(), a.port()));
            let ipv6 = || {
                let a = address.as_sockaddr_in6()?;
                Some(SocketAddr::V6(SocketAddrV6::new(a.ip(), a.port(), 0, a.scope_id())))
            };
            ipv4.or_else(ipv6)
        });
        let Some(remote) = remote else { return Ok(Some(None)) };
        let error = message.cmsgs()?.find_map(|control| match control {
            ControlMessageOwned::Ipv4RecvErr(error, _) | ControlMessageOwned::Ipv6RecvErr(error, _) => Some(error),
            _ => None,
        });
        let Some(error) = error else { return Ok(Some(None)) };
        let code = i32::try_from(error.ee_errno).map(Errno::from_raw_os_error);
        Ok(Some(match code {
            Ok(Errno::MSGSIZE) => usize::try_from(error.ee_info).ok().map(|mtu| Complaint::TooBig(remote.ip(), mtu)),
            Ok(Errno::CONNREFUSED | Errno::HOSTUNREACH | Errno::NETUNREACH | Errno::ACCESS | Errno::NOPROTOOPT) => {
                Some(Complaint::Unreachable(remote))
            }
            _ => None,
        }))
    }
}

impl AsFd for OuterSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Splits a packet of a raw IPv4 socket, which comes with its IP header, already reassembled.
fn strip_ipv4(packet: &mut [u8]) -> Option<(Received, &mut [u8])> {
    let first = *packet.first()?;
    if first >> 4 != 4 {
        return None;
    }
    let header_length = usize::from(first & 0x0f) * 4;
    let total_length = usize::from(u16::from_be_bytes([*packet.get(2)?, *packet.get(3)?]));
    if header_length < 20 || total_length < header_length || *packet.get(9)? != 50 {
        return None;
    }
    let tos = *packet.get(1)?;
    let address = |at: usize| {
        let octets: [u8; 4] = packet.get(at..at + 4)?.try_into().ok()?;
        Some(SocketAddr::new(Ipv4Addr::from(octets).into(), 0))
    };
    let how = Received { remote: address(12)?, local: address(16)?, tos };
    Some((how, packet.get_mut(header_length..total_length)?))
}

/// Errors that the system reports on a call that they have nothing to do with.
fn is_reported_late(error: &io::Error) -> bool {
    matches!(
        errno(error),
        Some(
            Errno::CONNREFUSED
                | Errno::HOSTUNREACH
                | Errno::NETUNREACH
                | Errno::MSGSIZE
                | Errno::NOPROTOOPT
                | Errno::PROTO
                | Errno::OPNOTSUPP
        )
    )
}

fn errno(error: &io::Error) -> Option<Errno> {
    error.raw_os_error().map(Errno::from_raw_os_error)
}

fn any(ipv6: bool, port: u16) -> SocketAddr {
    if ipv6 { (Ipv6Addr::UNSPECIFIED, port).into() } else { (Ipv4Addr::UNSPECIFIED, port).into() }
}

/// Gives a socket policies of its own that let everything pass in clear.
pub(crate) fn pass_by_policies(socket: &Socket, ipv6: bool) -> io::Result<()> {
    let (level, option) = if ipv6 { (libc::SOL_IPV6, IPV6_XFRM_POLICY) } else { (libc::SOL_IP, IP_XFRM_POLICY) };
    [true, false].into_iter().try_for_each(|inbound| set_option(socket, level, option, &bypass(ipv6, inbound)))
}

/// Gives all connections of a TCP socket over IPv6 one flow label, 0: one that replaces another stays on its way (RFC 9329
/// §6.1), where the system would label each anew.
pub(crate) fn keep_flow_label(socket: &Socket) -> io::Result<()> {
    set_option(socket, libc::SOL_IPV6, IPV6_AUTOFLOWLABEL, &0_i32.to_ne_bytes())
}

/// Has the kernel take ESP out of what comes over a TCP socket and put it in between what goes out (RFC 9329 §3): it frames
/// from now on, and `recv` and `send` are about whole IKE messages with their non-ESP marker. There is no way back.
pub(crate) fn leave_stream_to_the_kernel(socket: BorrowedFd<'_>) -> io::Result<()> {
    let socket = SockRef::from(&socket);
    // How long a message may take to become whole: the daemon sees none that is not.
    socket.set_read_timeout(Some(PARTIAL))?;
    set_option(&socket, libc::IPPROTO_TCP, libc::TCP_ULP, b"espintcp")
        .map_err(|e| context(e, "have the kernel take ESP from a stream"))
}

/// Sets a socket option that no crate has a safe call for.
fn set_option(socket: &Socket, level: i32, option: i32, value: &[u8]) -> io::Result<()> {
    let length = libc::socklen_t::try_from(value.len()).map_err(io::Error::other)?;
    // SAFETY: the descriptor is open as long as `socket` lives, and the system reads `length` octets at the pointer, which
    // are `value`.
    #[allow(unsafe_code, reason = "a system call with a pointer")]
    let outcome = unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, value.as_ptr().cast(), length) };
    if outcome == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

const ESP: i32 = 50;
const PARTIAL: Duration = Duration::from_secs(10);
/// linux/in.h, linux/in6.h, linux/udp.h.
const IP_XFRM_POLICY: i32 = 17;
const IPV6_XFRM_POLICY: i32 = 35;
const IPV6_AUTOFLOWLABEL: i32 = 70;
const UDP_ENCAP: i32 = 100;
const UDP_ENCAP_ESPINUDP: i32 = 2;
/// A receive offload gives up to 64 KiB at once.
const ROOM: usize = 1 << 16;
const BUFFER: usize = 8 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(protocol: u8, header_length: u8, total_length: u16) -> Vec<u8> {
        let mut packet = vec![0; 40];
        packet[0] = 0x40 | (header_length / 4);
        packet[1] = 0xb9;
        packet[2..4].copy_from_slice(&total_length.to_be_bytes());
        packet[9] = protocol;
        packet[12..16].copy_from_slice(&[192, 0, 2, 1]);
        packet[16..20].copy_from_slice(&[192, 0, 2, 2]);
        packet
    }

    #[test]
    fn raw_packets_with_lying_headers_are_dropped() {
        assert!(strip_ipv4(&mut []).is_none());
        assert!(strip_ipv4(&mut [0x45]).is_none());
        assert!(strip_ipv4(&mut packet(50, 16, 40)).is_none(), "header shorter than 20 octets");
        assert!(strip_ipv4(&mut packet(50, 60, 40)).is_none(), "header longer than the packet");
        assert!(strip_ipv4(&mut packet(50, 20, 19)).is_none(), "total length shorter than the header");
        assert!(strip_ipv4(&mut packet(50, 20, 41)).is_none(), "total length longer than the packet");
        assert!(strip_ipv4(&mut packet(17, 20, 40)).is_none(), "not ESP");
    }

    #[test]
    fn raw_packets_lose_header_and_padding() {
        let mut packet = packet(50, 24, 38);
        let (how, payload) = strip_ipv4(&mut packet).unwrap();
        assert_eq!(payload.len(), 14);
        assert_eq!(how.remote, "192.0.2.1:0".parse().unwrap());
        assert_eq!(how.local, "192.0.2.2:0".parse().unwrap());
        assert_eq!(how.tos, 0xb9);
    }
}
