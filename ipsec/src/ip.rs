//! Bounded views of IPv4 and IPv6 packets, as far as policies need them, and the few packets that we write
//! ourselves.
//!
//! A view exists only where all lengths agree with each other and with the buffer, so code behind it needs no
//! further checks.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::selector::Flow;

/// Next header values that are looked at here.
pub mod protocol {
    /// IPv6 hop-by-hop options.
    pub const HOP_BY_HOP: u8 = 0;
    /// ICMP.
    pub const ICMP: u8 = 1;
    /// IPv4 in IP.
    pub const IPV4: u8 = 4;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// DCCP.
    pub const DCCP: u8 = 33;
    /// IPv6 in IP.
    pub const IPV6: u8 = 41;
    /// IPv6 routing header.
    pub const ROUTING: u8 = 43;
    /// IPv6 fragment header.
    pub const FRAGMENT: u8 = 44;
    /// ESP.
    pub const ESP: u8 = 50;
    /// ICMPv6.
    pub const ICMPV6: u8 = 58;
    /// IPv6 destination options.
    pub const DESTINATION_OPTIONS: u8 = 60;
    /// SCTP.
    pub const SCTP: u8 = 132;
    /// IPv6 mobility header.
    pub const MOBILITY: u8 = 135;
    /// UDP-Lite.
    pub const UDP_LITE: u8 = 136;
}

/// Octets of an IPv4 header without options.
pub const IPV4_HEADER_LEN: usize = 20;
/// Octets of the fixed IPv6 header.
pub const IPV6_HEADER_LEN: usize = 40;

/// More extension headers than this are nothing that a host sends.
const MAX_EXTENSION_HEADERS: usize = 8;

/// Which part of a datagram a packet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fragment {
    /// The whole datagram.
    Whole,
    /// The first part, with the upper-layer header.
    First,
    /// A part without the upper-layer header.
    Later,
}

/// A checked view of one IP packet.
#[derive(Clone, Copy, Debug)]
pub struct Packet<'a> {
    bytes: &'a [u8],
    source: IpAddr,
    destination: IpAddr,
    tos: u8,
    dont_fragment: bool,
    fragment: Fragment,
    /// Upper-layer protocol; of a later IPv6 fragment what its fragment header names.
    protocol: u8,
    /// Source and destination port as selectors count them; `None` where the packet shows none.
    ports: Option<(u16, u16)>,
    /// Octets before the upper-layer header.
    upper_at: usize,
    /// A source route: this destination need not be the last.
    source_routed: bool,
    /// Octets before what transport mode protects, and that part's protocol.
    header_len: usize,
    next_header: u8,
}

impl<'a> Packet<'a> {
    /// Checks a packet; octets after its end are ignored. `None` when it is no IP packet, when lengths lie, when the
    /// IPv6 headers are too many, or when the upper-layer header is not in the first fragment as a whole
    /// (RFC 7112 §5, RFC 3128 §2: such packets are there to fool filters).
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        match bytes.first()? >> 4 {
            4 => Self::parse_ipv4(bytes, false),
            6 => Self::parse_ipv6(bytes, false),
            _ => None,
        }
    }

    /// As [`Self::parse`], for the beginning of a packet.
    fn parse_quoted(bytes: &'a [u8]) -> Option<Self> {
        match bytes.first()? >> 4 {
            4 => Self::parse_ipv4(bytes, true),
            6 => Self::parse_ipv6(bytes, true),
            _ => None,
        }
    }

    fn parse_ipv4(bytes: &'a [u8], quoted: bool) -> Option<Self> {
        let fixed: [u8; IPV4_HEADER_LEN] = array(bytes, 0)?;
        let [version_ihl, tos, l0, l1, _, _, f0, f1, _, protocol, _, _, rest @ ..] = fixed;
        let [s0, s1, s2, s3, d0, d1, d2, d3] = rest;
        let header_len = usize::from(version_ihl & 0x0f) * 4;
        let total_len = usize::from(u16::from_be_bytes([l0, l1]));
        if header_len < IPV4_HEADER_LEN || total_len < header_len {
            return None;
        }
        let bytes = cut(bytes, total_len, quoted)?;
        let flags_offset = u16::from_be_bytes([f0, f1]);
        let fragment = fragment_of(flags_offset & 0x1fff, flags_offset & 0x2000 != 0);
        let upper = bytes.get(header_len..)?;
        Some(Self {
            bytes,
            source: IpAddr::V4(Ipv4Addr::new(s0, s1, s2, s3)),
            destination: IpAddr::V4(Ipv4Addr::new(d0, d1, d2, d3)),
            tos,
            dont_fragment: flags_offset & 0x4000 != 0,
            fragment,
            protocol,
            ports: ports(protocol, fragment, upper)?,
            upper_at: header_len,
            source_routed: has_source_route(bytes.get(IPV4_HEADER_LEN..header_len)?),
            header_len,
            next_header: protocol,
        })
    }

    fn parse_ipv6(bytes: &'a [u8], quoted: bool) -> Option<Self> {
        let [v0, v1, _, _, l0, l1, first_next_header, _]: [u8; 8] = array(bytes, 0)?;
        let source = Ipv6Addr::from(array::<16>(bytes, 8)?);
        let destination = Ipv6Addr::from(array::<16>(bytes, 24)?);
        let total_len = IPV6_HEADER_LEN + usize::from(u16::from_be_bytes([l0, l1]));
        let bytes = cut(bytes, total_len, quoted)?;

        let mut next_header = first_next_header;
        let mut at = IPV6_HEADER_LEN;
        let mut fragment = Fragment::Whole;
        let mut fragment_header_seen = false;
        let mut source_routed = false;
        for seen in 0.. {
            let [following, length, o0, o1] = match next_header {
                protocol::HOP_BY_HOP | protocol::ROUTING | protocol::FRAGMENT | protocol::DESTINATION_OPTIONS => {
                    array(bytes, at)?
                }
                _ => break,
            };
            if seen == MAX_EXTENSION_HEADERS {
                return None;
            }
            if next_header == protocol::FRAGMENT {
                if fragment_header_seen {
                    return None;
                }
                fragment_header_seen = true;
                let offset_flags = u16::from_be_bytes([o0, o1]);
                fragment = fragment_of(offset_flags >> 3, offset_flags & 1 != 0);
                at += 8;
            } else {
                // The second octet behind the length says how many addresses are still to be visited (RFC 8200 §4.4).
                source_routed |= next_header == protocol::ROUTING && o1 != 0;
                at += (usize::from(length) + 1) * 8;
            }
            next_header = following;
            if fragment == Fragment::Later {
                break;
            }
        }
        let upper = bytes.get(at..)?;
        Some(Self {
            bytes,
            source: IpAddr::V6(source),
            destination: IpAddr::V6(destination),
            tos: v0 << 4 | v1 >> 4,
            // Routers never fragment IPv6.
            dont_fragment: true,
            fragment,
            protocol: next_header,
            ports: ports(next_header, fragment, upper)?,
            upper_at: at,
            source_routed,
            header_len: IPV6_HEADER_LEN,
            next_header: first_next_header,
        })
    }

    /// The packet, cut to the length that its header names.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Source address.
    pub fn source(&self) -> IpAddr {
        self.source
    }

    /// Destination address.
    pub fn destination(&self) -> IpAddr {
        self.destination
    }

    /// TOS octet or traffic class: DSCP and ECN.
    pub fn tos(&self) -> u8 {
        self.tos
    }

    /// The DF bit; true for IPv6.
    pub fn dont_fragment(&self) -> bool {
        self.dont_fragment
    }

    /// Which part of a datagram this is.
    pub fn fragment(&self) -> Fragment {
        self.fragment
    }

    /// Upper-layer protocol.
    pub fn protocol(&self) -> u8 {
        self.protocol
    }

    /// True when ports (or ICMP type and code) are there to be compared; selectors with particular ports never
    /// match a packet without (RFC 4301 §4.4.1.1 OPAQUE, §7).
    pub fn shows_ports(&self) -> bool {
        self.ports.is_some()
    }

    /// True when the packet may go on from its destination to another one: an IPv4 source route, or an IPv6 routing
    /// header with segments left. What is compared with selectors is then not where it ends.
    pub fn is_source_routed(&self) -> bool {
        self.source_routed
    }

    /// Octets of the IP header that transport mode takes off.
    pub fn header_len(&self) -> usize {
        self.header_len
    }

    /// Protocol of what transport mode protects, and its octets. For IPv6 that is all behind the fixed header.
    pub fn transport_payload(&self) -> (u8, &'a [u8]) {
        (self.next_header, self.bytes.get(self.header_len..).unwrap_or(&[]))
    }

    /// The flow of a packet that we send: the source is local.
    pub fn outbound_flow(&self) -> Flow {
        let (source, destination) = self.ports.unwrap_or((0, 0));
        Flow {
            protocol: self.protocol,
            local: self.source,
            local_port: source,
            remote: self.destination,
            remote_port: destination,
        }
    }

    /// The flow of a packet that we received: the destination is local.
    pub fn inbound_flow(&self) -> Flow {
        let (source, destination) = self.ports.unwrap_or((0, 0));
        Flow {
            protocol: self.protocol,
            local: self.destination,
            local_port: destination,
            remote: self.source,
            remote_port: source,
        }
    }

    /// What tells a packet's connection from others, for both directions of it: `flow`, with the identifier in place of the
    /// ports for ICMP echo.
    pub fn connection(&self, flow: Flow) -> Flow {
        let kind = self.ports.map(|(kind_code, _)| kind_code >> 8);
        let is_echo = match self.protocol {
            protocol::ICMP => matches!(kind, Some(0 | 8)),
            protocol::ICMPV6 => matches!(kind, Some(128 | 129)),
            _ => false,
        };
        let identifier = self.bytes.get(self.upper_at..).and_then(|upper| array(upper, 4)).map(u16::from_be_bytes);
        match identifier.filter(|_| is_echo) {
            Some(identifier) => Flow { local_port: identifier, remote_port: identifier, ..flow },
            None => flow,
        }
    }

    /// What a [`FlowGuard`](crate::guard::FlowGuard) is asked about for a packet of `flow`: the protocol of a later
    /// IPv6 fragment is replaced by that of the fragment header, since nobody who reassembles looks at what the fragment
    /// itself claims (RFC 8200 §4.5).
    pub fn guarded(&self, flow: Flow) -> Flow {
        match (self.fragment, self.source) {
            (Fragment::Later, IpAddr::V6(_)) => Flow { protocol: protocol::FRAGMENT, ..flow },
            _ => flow,
        }
    }

    /// False for TCP segments other than the first of a connection: a SYN alone (RFC 9293 §3.5). Of fragments that show no
    /// header nobody can say.
    pub fn begins_connection(&self) -> bool {
        if self.protocol != protocol::TCP || self.ports.is_none() {
            return true;
        }
        self.tcp_flags().is_some_and(|flags| flags & (TCP_FIN | TCP_SYN | TCP_RST | TCP_ACK) == TCP_SYN)
    }

    /// True for TCP segments with FIN or RST.
    pub fn ends_connection(&self) -> bool {
        let is_tcp = self.protocol == protocol::TCP && self.ports.is_some();
        is_tcp && self.tcp_flags().is_some_and(|flags| flags & (TCP_FIN | TCP_RST) != 0)
    }

    fn tcp_flags(&self) -> Option<&u8> {
        self.upper_at.checked_add(TCP_FLAGS_AT).and_then(|at| self.bytes.get(at))
    }

    /// For a received ICMP error: the flow of our packet that it quotes, and acts upon. `None` for all other packets, and
    /// where the quotation is too short to tell.
    pub fn quoted_flow(&self) -> Option<Flow> {
        let quoted = self.quoted()?;
        Some(quoted.guarded(quoted.outbound_flow()))
    }

    /// The packet that an ICMP error is about, if this is one and goes to who sent that packet. `None` for all other packets,
    /// and where the quotation is too short to tell.
    pub fn returned(&self) -> Option<Self> {
        self.quoted().filter(|quoted| quoted.source == self.destination)
    }

    fn quoted(&self) -> Option<Self> {
        if self.fragment == Fragment::Later || !self.is_icmp_error() {
            return None;
        }
        Packet::parse_quoted(self.bytes.get(self.upper_at..)?.get(ICMP_HEADER_LEN..)?)
    }

    fn is_icmp_error(&self) -> bool {
        let kind = self.ports.map_or(0, |(kind_code, _)| kind_code >> 8);
        match self.source {
            IpAddr::V4(_) => self.protocol == protocol::ICMP && matches!(kind, 3 | 4 | 5 | 11 | 12),
            IpAddr::V6(_) => self.protocol == protocol::ICMPV6 && kind < 128,
        }
    }

    /// Whether an ICMP error may answer this packet (RFC 1122 §3.2.2, RFC 4443 §2.4).
    fn may_be_answered(&self) -> bool {
        if self.fragment == Fragment::Later || self.is_icmp_error() {
            return false;
        }
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let strange = source.is_unspecified() || source.is_multicast() || source.is_broadcast();
                !strange && !destination.is_multicast() && !destination.is_broadcast()
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                !source.is_unspecified() && !source.is_multicast() && !destination.is_multicast()
            }
            _ => false,
        }
    }

    /// Writes the ICMP "fragmentation needed" (RFC 1191 §4) or ICMPv6 "packet too big" (RFC 4443 §3.2) that tells
    /// this packet's sender to send at most `mtu` octets. It comes from the packet's destination, since the
    /// gateway between has no address of its own here. False, and nothing written, when no error may answer it.
    pub fn too_big(&self, mtu: usize, out: &mut Vec<u8>) -> bool {
        let [m0, m1] = u16::try_from(mtu).unwrap_or(u16::MAX).to_be_bytes();
        let [n0, n1, n2, n3] = u32::try_from(mtu).unwrap_or(u32::MAX).to_be_bytes();
        self.answer([3, 4, 0, 0, 0, 0, m0, m1], [2, 0, 0, 0, n0, n1, n2, n3], out)
    }

    /// As [`Packet::too_big`], that the destination is administratively out of reach (RFC 1812 §5.2.7.1, RFC 4443 §3.1).
    pub fn prohibited(&self, out: &mut Vec<u8>) -> bool {
        self.answer([3, 13, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0], out)
    }

    /// Writes the ICMP error with this header, according to the family, its checksum still 0.
    fn answer(&self, icmp: [u8; 8], icmpv6: [u8; 8], out: &mut Vec<u8>) -> bool {
        out.clear();
        if !self.may_be_answered() {
            return false;
        }
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let quoted = self.quote(576 - IPV4_HEADER_LEN - 8);
                write_ipv4_header(out, destination, source, protocol::ICMP, 0, 8 + quoted.len());
                out.extend_from_slice(&icmp);
                out.extend_from_slice(quoted);
                let sum = checksum(&[out.get(IPV4_HEADER_LEN..).unwrap_or(&[])]);
                put(out, IPV4_HEADER_LEN + 2, sum);
                true
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let quoted = self.quote(1280 - IPV6_HEADER_LEN - 8);
                write_ipv6_header(out, destination, source, protocol::ICMPV6, 0, 8 + quoted.len());
                out.extend_from_slice(&icmpv6);
                out.extend_from_slice(quoted);
                let sum = upper_layer_checksum(out, IPV6_HEADER_LEN, protocol::ICMPV6);
                put(out, IPV6_HEADER_LEN + 2, sum);
                true
            }
            _ => false,
        }
    }

    fn quote(&self, limit: usize) -> &'a [u8] {
        self.bytes.get(..limit).unwrap_or(self.bytes)
    }
}

/// A packet without what follows it; a quoted one may be shorter than it says.
fn cut(bytes: &[u8], total_len: usize, quoted: bool) -> Option<&[u8]> {
    bytes.get(..if quoted { total_len.min(bytes.len()) } else { total_len })
}

/// Whether IPv4 options have a loose or strict source route (RFC 791 §3.1).
fn has_source_route(mut options: &[u8]) -> bool {
    loop {
        let rest = match options {
            [LOOSE_SOURCE_ROUTE | STRICT_SOURCE_ROUTE, ..] => return true,
            [0, ..] => return false,
            [1, rest @ ..] => rest,
            [_, length, ..] if *length >= 2 => options.get(usize::from(*length)..).unwrap_or(&[]),
            // Nothing that a host would read on.
            _ => return false,
        };
        options = rest;
    }
}

fn fragment_of(offset: u16, more: bool) -> Fragment {
    match (offset, more) {
        (0, false) => Fragment::Whole,
        (0, true) => Fragment::First,
        _ => Fragment::Later,
    }
}

/// Ports of an upper-layer header; the outer `None` when the header is cut off.
#[allow(clippy::option_option, reason = "no ports and no header are different things")]
fn ports(protocol: u8, fragment: Fragment, upper: &[u8]) -> Option<Option<(u16, u16)>> {
    if fragment == Fragment::Later {
        return Some(None);
    }
    match protocol {
        protocol::TCP | protocol::UDP | protocol::DCCP | protocol::SCTP | protocol::UDP_LITE => {
            let [s0, s1, d0, d1] = array(upper, 0)?;
            Some(Some((u16::from_be_bytes([s0, s1]), u16::from_be_bytes([d0, d1]))))
        }
        // RFC 4301 §4.4.1.1: type and code stand for both ports.
        protocol::ICMP | protocol::ICMPV6 => {
            let kind_code = u16::from_be_bytes(array(upper, 0)?);
            Some(Some((kind_code, kind_code)))
        }
        protocol::MOBILITY => {
            let [_, _, kind] = array(upper, 0)?;
            let kind = u16::from(kind) << 8;
            Some(Some((kind, kind)))
        }
        _ => Some(None),
    }
}

/// ECN in tunnels, normal mode (RFC 6040), and the TOS octet that carries it.
pub mod ecn {
    const MASK: u8 = 0b11;
    const NOT_ECT: u8 = 0b00;
    const ECT_1: u8 = 0b01;
    const CE: u8 = 0b11;

    /// The outer TOS octet for an inner one: DSCP is copied, ECN only when `copy` (RFC 6040 §4.1).
    pub fn encapsulate(inner_tos: u8, copy: bool) -> u8 {
        if copy { inner_tos } else { inner_tos & !MASK }
    }

    /// The inner TOS octet after decapsulation; `None` when the packet must be dropped (RFC 6040 §4.2).
    pub fn decapsulate(inner_tos: u8, outer_tos: u8) -> Option<u8> {
        let (inner, outer) = (inner_tos & MASK, outer_tos & MASK);
        let ecn = match (inner, outer) {
            (NOT_ECT, CE) => return None,
            (NOT_ECT, _) => NOT_ECT,
            (_, CE) => CE,
            (CE, _) => CE,
            (_, ECT_1) => ECT_1,
            (inner, _) => inner,
        };
        Some(inner_tos & !MASK | ecn)
    }
}

/// Changes the TOS octet or traffic class of a packet, and IPv4's header checksum with it (RFC 1624 §3), so that a
/// checksum that was wrong before stays wrong.
pub fn set_tos(packet: &mut [u8], tos: u8) {
    match packet.first().map(|octet| octet >> 4) {
        Some(4) => {
            let (Some(old), Some(sum)) = (array::<2>(packet, 0), array::<2>(packet, 10)) else { return };
            let [version, _] = old;
            let new = [version, tos];
            let sum = u32::from(!u16::from_be_bytes(sum))
                + u32::from(!u16::from_be_bytes(old))
                + u32::from(u16::from_be_bytes(new));
            put(packet, 10, !fold(u64::from(sum)));
            if let Some(octet) = packet.get_mut(1) {
                *octet = tos;
            }
        }
        Some(6) => {
            if let [first, second, ..] = packet {
                *first = *first & 0xf0 | tos >> 4;
                *second = *second & 0x0f | tos << 4;
            }
        }
        _ => {}
    }
}

/// Puts an IP header before an upper-layer payload (transport mode, received). `None` when the addresses are of two
/// families or the payload is too long for an IP packet.
pub fn rebuild(
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    tos: u8,
    payload: &[u8],
    out: &mut Vec<u8>,
) -> Option<()> {
    out.clear();
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            u16::try_from(IPV4_HEADER_LEN + payload.len()).ok()?;
            write_ipv4_header(out, source, destination, protocol, tos, payload.len());
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            u16::try_from(payload.len()).ok()?;
            write_ipv6_header(out, source, destination, protocol, tos, payload.len());
        }
        _ => return None,
    }
    out.extend_from_slice(payload);
    Some(())
}

/// Computes the TCP or UDP checksum of a packet anew, for its present addresses (RFC 3948 §3.1.2). A UDP packet
/// without a checksum stays without; other protocols are left alone.
pub fn fix_upper_layer_checksum(packet: &mut [u8]) {
    let Some(view) = Packet::parse(packet) else { return };
    let (protocol, start) = (view.protocol, view.bytes.len() - view.transport_payload().1.len());
    if view.fragment != Fragment::Whole || protocol != view.next_header {
        return;
    }
    let at = match protocol {
        protocol::TCP => start + 16,
        protocol::UDP => start + 6,
        _ => return,
    };
    let Some(present) = array::<2>(packet, at) else { return };
    if protocol == protocol::UDP && present == [0, 0] {
        return;
    }
    put(packet, at, 0);
    let sum = match (protocol, upper_layer_checksum(packet, start, protocol)) {
        // 0 would say that there is none (RFC 768).
        (protocol::UDP, 0) => 0xffff,
        (_, sum) => sum,
    };
    put(packet, at, sum);
}

/// The Internet checksum (RFC 1071) of parts; each part but the last has an even length.
pub fn checksum(parts: &[&[u8]]) -> u16 {
    !fold(parts.iter().map(|part| sum(part)).sum())
}

/// The checksum of an upper-layer header and its payload with the pseudo header (RFC 9293 §3.1, RFC 8200 §8.1).
fn upper_layer_checksum(packet: &[u8], start: usize, protocol: u8) -> u16 {
    let upper = packet.get(start..).unwrap_or(&[]);
    let addresses = match packet.first().map(|octet| octet >> 4) {
        Some(4) => packet.get(12..20),
        _ => packet.get(8..40),
    };
    let length = u64::try_from(upper.len()).unwrap_or(0);
    !fold(sum(addresses.unwrap_or(&[])) + u64::from(protocol) + length + sum(upper))
}

fn sum(bytes: &[u8]) -> u64 {
    let (words, rest) = bytes.as_chunks::<2>();
    let last = rest.first().map_or(0, |octet| u64::from(*octet) << 8);
    words.iter().map(|word| u64::from(u16::from_be_bytes(*word))).sum::<u64>() + last
}

fn fold(mut sum: u64) -> u16 {
    loop {
        match u16::try_from(sum) {
            Ok(sum) => return sum,
            Err(_) => sum = (sum & 0xffff) + (sum >> 16),
        }
    }
}

fn write_ipv4_header(
    out: &mut Vec<u8>,
    source: Ipv4Addr,
    destination: Ipv4Addr,
    protocol: u8,
    tos: u8,
    payload_len: usize,
) {
    let [l0, l1] = u16::try_from(IPV4_HEADER_LEN + payload_len).unwrap_or(u16::MAX).to_be_bytes();
    // Never fragmented, so the identification means nothing (RFC 6864 §4.1).
    let mut header = [0x45, tos, l0, l1, 0, 0, 0x40, 0, HOP_LIMIT, protocol, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    for (to, from) in header.iter_mut().skip(12).zip(source.octets().into_iter().chain(destination.octets())) {
        *to = from;
    }
    let sum = checksum(&[&header]);
    put(&mut header, 10, sum);
    out.extend_from_slice(&header);
}

fn write_ipv6_header(
    out: &mut Vec<u8>,
    source: Ipv6Addr,
    destination: Ipv6Addr,
    protocol: u8,
    tos: u8,
    payload_len: usize,
) {
    let [l0, l1] = u16::try_from(payload_len).unwrap_or(u16::MAX).to_be_bytes();
    out.extend_from_slice(&[0x60 | tos >> 4, tos << 4, 0, 0, l0, l1, protocol, HOP_LIMIT]);
    out.extend_from_slice(&source.octets());
    out.extend_from_slice(&destination.octets());
}

const HOP_LIMIT: u8 = 64;
const LOOSE_SOURCE_ROUTE: u8 = 131;
const STRICT_SOURCE_ROUTE: u8 = 137;
/// Octets of an ICMP error before the packet that it quotes (RFC 792, RFC 4443 §3).
const ICMP_HEADER_LEN: usize = 8;
const TCP_FLAGS_AT: usize = 13;
const TCP_FIN: u8 = 0x01;
const TCP_SYN: u8 = 0x02;
const TCP_RST: u8 = 0x04;
const TCP_ACK: u8 = 0x10;

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

fn put(bytes: &mut [u8], at: usize, value: u16) {
    if let Some(place) = bytes.get_mut(at..).and_then(|rest| rest.first_chunk_mut()) {
        *place = value.to_be_bytes();
    }
}

#[cfg(test)]
pub(crate) mod tests;
