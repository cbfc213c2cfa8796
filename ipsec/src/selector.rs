//! Traffic selectors (RFC 7296 §3.13, RFC 4301 §4.4.1.1) and narrowing (RFC 7296 §2.9).

use std::collections::HashSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// One traffic selector: addresses, upper-layer protocol and ports, all ranges inclusive.
///
/// Both addresses are of one family. For ICMP the "port" is `type << 8 | code`.
/// OPAQUE (RFC 4301 §4.4.1.1) is `start_port = 0xffff, end_port = 0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrafficSelector {
    /// Upper-layer protocol; 0 is any.
    pub protocol: u8,
    /// First port.
    pub start_port: u16,
    /// Last port.
    pub end_port: u16,
    /// First address.
    pub start: IpAddr,
    /// Last address, same family as `start`.
    pub end: IpAddr,
}

/// What a packet looks like to a policy: its 5-tuple. Ports are 0 where the protocol has none,
/// and `type << 8 | code` in `local_port`/`remote_port` for ICMP as RFC 4301 §4.4.1.1 has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Flow {
    /// Upper-layer protocol.
    pub protocol: u8,
    /// Our side's address: the source of an outbound packet, the destination of an inbound one.
    pub local: IpAddr,
    /// Our side's port.
    pub local_port: u16,
    /// The peer side's address.
    pub remote: IpAddr,
    /// The peer side's port.
    pub remote_port: u16,
}

impl fmt::Display for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} port {} to {} port {} protocol {}",
            self.local, self.local_port, self.remote, self.remote_port, self.protocol
        )
    }
}

/// Whether addresses count in 32 or 128 bits; ranges never cross families.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
}

impl Family {
    fn bits(self) -> u32 {
        match self {
            Self::V4 => 32,
            Self::V6 => 128,
        }
    }

    /// The address with this number; the upper bits are ignored for IPv4.
    fn address(self, number: u128) -> IpAddr {
        match self {
            #[allow(clippy::cast_possible_truncation, reason = "numbers of this family fit in 32 bits")]
            Self::V4 => IpAddr::V4(Ipv4Addr::from_bits(number as u32)),
            Self::V6 => IpAddr::V6(Ipv6Addr::from_bits(number)),
        }
    }

    fn last(self) -> u128 {
        u128::MAX >> (128 - self.bits())
    }
}

pub(crate) fn number(address: IpAddr) -> (Family, u128) {
    match address {
        IpAddr::V4(address) => (Family::V4, u128::from(address.to_bits())),
        IpAddr::V6(address) => (Family::V6, address.to_bits()),
    }
}

impl TrafficSelector {
    /// All of a CIDR network, any protocol and port; host bits of `address` are ignored. `None` when `prefix` is
    /// longer than an address of that family.
    pub fn network(address: IpAddr, prefix: u8) -> Option<Self> {
        let (family, number) = number(address);
        let host_bits = family.bits().checked_sub(u32::from(prefix))?;
        let mask = if host_bits == 128 { u128::MAX } else { (1u128 << host_bits) - 1 };
        Some(Self {
            protocol: 0,
            start_port: 0,
            end_port: u16::MAX,
            start: family.address(number & !mask),
            end: family.address(number | mask),
        })
    }

    /// One address, any protocol and port.
    pub fn host(address: IpAddr) -> Self {
        Self { protocol: 0, start_port: 0, end_port: u16::MAX, start: address, end: address }
    }

    /// The selectors of one packet, ours and the peer's: what its sender puts first into TSi and TSr (RFC 7296 §2.9).
    /// A packet that shows no ports (a later fragment, a protocol without) has those for any port.
    pub fn of_flow(flow: &Flow) -> (Self, Self) {
        let shows_ports = (flow.local_port, flow.remote_port) != (0, 0);
        let one = |address, port| Self {
            protocol: flow.protocol,
            start_port: if shows_ports { port } else { 0 },
            end_port: if shows_ports { port } else { u16::MAX },
            start: address,
            end: address,
        };
        (one(flow.local, flow.local_port), one(flow.remote, flow.remote_port))
    }

    /// True for OPAQUE ports: packets whose ports cannot be seen (RFC 4301 §4.4.1.1).
    pub fn is_opaque(&self) -> bool {
        self.start_port == u16::MAX && self.end_port == 0
    }

    /// True when any port matches, visible or not.
    pub fn is_any_port(&self) -> bool {
        self.start_port == 0 && self.end_port == u16::MAX
    }

    /// The overlap of two selectors; `None` when they are disjoint, of different families, or when a range of
    /// either is upside down (and is not OPAQUE).
    pub fn intersect(&self, other: &Self) -> Option<Self> {
        let (first, second) = (self.range()?, other.range()?);
        if first.0 != second.0 {
            return None;
        }
        let start = self.start.max(other.start);
        let end = self.end.min(other.end);
        let protocol = match (self.protocol, other.protocol) {
            (0, protocol) | (protocol, 0) => protocol,
            (first, second) if first == second => first,
            _ => return None,
        };
        let (start_port, end_port) = match (self.is_opaque(), other.is_opaque()) {
            (true, true) => (u16::MAX, 0),
            (true, false) if other.is_any_port() => (u16::MAX, 0),
            (false, true) if self.is_any_port() => (u16::MAX, 0),
            (true, false) | (false, true) => return None,
            (false, false) => {
                if self.start_port > self.end_port || other.start_port > other.end_port {
                    return None;
                }
                let (start_port, end_port) = (self.start_port.max(other.start_port), self.end_port.min(other.end_port));
                // Ports 0 and 65535 have nothing in common: 65535 to 0 would be OPAQUE.
                if start_port > end_port {
                    return None;
                }
                (start_port, end_port)
            }
        };
        (start <= end).then_some(Self { protocol, start_port, end_port, start, end })
    }

    /// True when every packet of `other` matches `self`. A selector that matches nothing is contained nowhere.
    pub fn contains(&self, other: &Self) -> bool {
        self.intersect(other) == Some(*other)
    }

    /// True when the range is exactly one CIDR network; gives its prefix length.
    pub fn prefix(&self) -> Option<u8> {
        let (family, start, end) = self.range()?;
        let mask = start ^ end;
        // All host bits and only those differ: ones at the bottom, all of them 0 in `start`.
        let host_bits = 128 - mask.leading_zeros();
        if mask.count_ones() != host_bits || start & mask != 0 {
            return None;
        }
        u8::try_from(family.bits() - host_bits).ok()
    }

    /// The smallest set of CIDR networks that covers the address range, in order of address.
    pub fn networks(&self) -> Vec<(IpAddr, u8)> {
        let Some((family, mut start, end)) = self.range() else { return Vec::new() };
        let mut networks = Vec::new();
        loop {
            // The biggest network that begins at `start` and ends within the range. A range of n bits needs
            // at most 2n - 2 of them, so the loop is short.
            let aligned = start.trailing_zeros().min(family.bits());
            let mut host_bits = aligned;
            let last = loop {
                let mask = if host_bits == 128 { u128::MAX } else { (1u128 << host_bits) - 1 };
                match start | mask {
                    last if last <= end => break last,
                    _ => host_bits -= 1,
                }
            };
            if let Ok(prefix) = u8::try_from(family.bits() - host_bits) {
                networks.push((family.address(start), prefix));
            }
            if last >= end || last >= family.last() {
                return networks;
            }
            start = last + 1;
        }
    }

    /// True when the local (or remote) half of a flow matches. OPAQUE selectors never do: the port is known.
    pub fn matches(&self, protocol: u8, address: IpAddr, port: u16) -> bool {
        self.covers(protocol, address) && self.start_port <= port && port <= self.end_port
    }

    /// As [`TrafficSelector::matches`] for a packet whose ports cannot be seen (a later fragment, an inner ESP
    /// header…): only ANY and OPAQUE ports match (RFC 4301 §4.4.1.1, §7).
    pub fn matches_without_ports(&self, protocol: u8, address: IpAddr) -> bool {
        self.covers(protocol, address) && (self.is_any_port() || self.is_opaque())
    }

    /// [`Self::matches`] or [`Self::matches_without_ports`].
    pub(crate) fn selects(&self, protocol: u8, address: IpAddr, port: u16, shows_ports: bool) -> bool {
        if shows_ports { self.matches(protocol, address, port) } else { self.matches_without_ports(protocol, address) }
    }

    fn covers(&self, protocol: u8, address: IpAddr) -> bool {
        (self.protocol == 0 || self.protocol == protocol)
            // `IpAddr` orders all of IPv4 before all of IPv6, so both ends pin the family.
            && self.start <= address
            && address <= self.end
            && self.start.is_ipv4() == self.end.is_ipv4()
    }

    /// How much it covers, to be compared: addresses, then protocols, then ports. Less is more specific.
    pub(crate) fn width(&self) -> (u128, bool, u16) {
        let addresses = self.range().map_or(0, |(_, start, end)| end - start);
        (addresses, self.protocol == 0, self.end_port.saturating_sub(self.start_port))
    }

    /// The address range as numbers; `None` when it mixes families or is upside down.
    pub(crate) fn range(&self) -> Option<(Family, u128, u128)> {
        let (family, start) = number(self.start);
        let (end_family, end) = number(self.end);
        (family == end_family && start <= end).then_some((family, start, end))
    }
}

impl fmt::Display for TrafficSelector {
    /// strongSwan's notation: `10.1.0.0/24[tcp/80]`, `10.0.0.3..10.0.0.9`, `10.0.0.1/32[icmp/8]`; ports are
    /// always numbers.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.prefix() {
            Some(prefix) => write!(f, "{}/{prefix}", self.start)?,
            None => write!(f, "{}..{}", self.start, self.end)?,
        }
        if self.protocol == 0 && self.is_any_port() {
            return Ok(());
        }
        match protocol_name(self.protocol) {
            Some(name) => write!(f, "[{name}")?,
            None => write!(f, "[{}", self.protocol)?,
        }
        if self.is_opaque() {
            f.write_str("/OPAQUE")?;
        } else if !self.is_any_port() {
            f.write_str("/")?;
            self.write_port(f, self.start_port)?;
            if self.start_port != self.end_port {
                f.write_str("-")?;
                self.write_port(f, self.end_port)?;
            }
        }
        f.write_str("]")
    }
}

impl TrafficSelector {
    fn write_port(&self, f: &mut fmt::Formatter<'_>, port: u16) -> fmt::Result {
        if !matches!(self.protocol, ICMP | ICMPV6) {
            return write!(f, "{port}");
        }
        // RFC 7296 §3.13.1: the type is the upper octet, the code the lower one.
        let [kind, code] = port.to_be_bytes();
        match code {
            0 => write!(f, "{kind}"),
            code => write!(f, "{kind}({code})"),
        }
    }
}

const ICMP: u8 = 1;
const ICMPV6: u8 = 58;

fn protocol_name(protocol: u8) -> Option<&'static str> {
    Some(match protocol {
        ICMP => "icmp",
        2 => "igmp",
        4 => "ipencap",
        6 => "tcp",
        17 => "udp",
        41 => "ipv6",
        47 => "gre",
        50 => "esp",
        51 => "ah",
        ICMPV6 => "ipv6-icmp",
        89 => "ospf",
        103 => "pim",
        112 => "vrrp",
        115 => "l2tp",
        132 => "sctp",
        136 => "udplite",
        _ => return None,
    })
}

/// A TS payload counts its selectors in one octet (RFC 7296 §3.13).
pub const MAX_SELECTORS: usize = 255;

/// Comparisons that one narrowing may take. Honest peers need a few hundred; lists that were made to overlap in as many
/// ways as they can would need millions.
const MAX_COMPARISONS: usize = 1 << 18;

/// What came of narrowing (RFC 7296 §2.9).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Narrowed {
    /// What both sides allow, none of them within another, in policy order; at most [`MAX_SELECTORS`]. Empty means
    /// TS_UNACCEPTABLE.
    pub selectors: Vec<TrafficSelector>,
    /// False when there is more that both allow than these: the limits were reached.
    pub complete: bool,
}

/// Narrows what a peer proposed to what policy allows (RFC 7296 §2.9): the intersections of each pair, without
/// duplicates and contained ones. What the peer proposed first is narrowed first, so that no limit takes it away: it may
/// stand for the packet that wants the SA.
pub fn narrow(proposed: &[TrafficSelector], allowed: &[TrafficSelector]) -> Narrowed {
    let (proposed, allowed) = (distinct(proposed), distinct(allowed));
    let (first, rest) = proposed.split_at(proposed.len().min(1));
    let mut narrowing = Narrowing::default();
    let complete = [first, rest].into_iter().all(|proposed| {
        allowed.iter().enumerate().all(|(at, allowed)| {
            proposed.iter().filter_map(|one| allowed.intersect(one)).all(|overlap| narrowing.add(at, overlap))
        })
    });
    // Stable: within one selector of the policy in the order of the proposal.
    narrowing.kept.sort_by_key(|(at, _)| *at);
    Narrowed { selectors: narrowing.kept.into_iter().map(|(_, selector)| selector).collect(), complete }
}

/// A narrowing under way.
#[derive(Default)]
struct Narrowing {
    /// None within another, each with its place in the policy.
    kept: Vec<(usize, TrafficSelector)>,
    comparisons: usize,
}

impl Narrowing {
    /// Takes an overlap unless another one contains it. False when a limit is reached, and it is left out.
    fn add(&mut self, at: usize, overlap: TrafficSelector) -> bool {
        self.comparisons += self.kept.len();
        if self.comparisons > MAX_COMPARISONS {
            return false;
        }
        if self.kept.iter().any(|(_, other)| other.contains(&overlap)) {
            return true;
        }
        self.kept.retain(|(_, other)| !overlap.contains(other));
        let has_room = self.kept.len() < MAX_SELECTORS;
        if has_room {
            self.kept.push((at, overlap));
        }
        has_room
    }
}

/// Each once; what no payload could carry is not looked at.
fn distinct(selectors: &[TrafficSelector]) -> Vec<TrafficSelector> {
    let mut seen = HashSet::new();
    selectors.iter().take(MAX_SELECTORS).filter(|selector| seen.insert(**selector)).copied().collect()
}

#[cfg(test)]
mod tests;
