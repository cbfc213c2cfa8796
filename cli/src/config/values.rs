//! The types of values in connections: booleans, times, sizes, numbers, addresses, traffic selectors.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use ike::config::{AddressRange, ConfiguredSelector, Number};
use ipsec::plane::Mark;
use ipsec::selector::TrafficSelector;

/// Times beyond this are refused, so that adding them to a clock never overflows.
const MAX_SECONDS: u64 = u32::MAX as u64;

/// `yes`, `no` and their synonyms.
pub fn boolean(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "1" | "yes" | "true" | "enabled" => Some(true),
        "0" | "no" | "false" | "disabled" => Some(false),
        _ => None,
    }
}

/// A number: decimal, `0x…` or octal with a leading zero, as strongSwan reads it.
pub fn number(text: &str) -> Option<u64> {
    let text = text.trim();
    let (digits, radix) = if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        (digits, 16)
    } else if text.len() > 1 && text.starts_with('0') {
        (text, 8)
    } else {
        (text, 10)
    };
    // `from_str_radix` takes a sign.
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    u64::from_str_radix(digits, radix).ok()
}

/// A time: a number and `s`, `m`, `h` or `d`.
pub fn time(text: &str) -> Option<Duration> {
    let text = text.trim();
    let (digits, factor) = match text.bytes().last()?.to_ascii_lowercase() {
        b's' => (text.get(..text.len() - 1)?, 1),
        b'm' => (text.get(..text.len() - 1)?, 60),
        b'h' => (text.get(..text.len() - 1)?, 3600),
        // "0xd" is a number, not days.
        b'd' if !text.starts_with("0x") => (text.get(..text.len() - 1)?, 86_400),
        _ => (text, 1),
    };
    let seconds = number(digits)?.checked_mul(factor)?;
    (seconds <= MAX_SECONDS).then(|| Duration::from_secs(seconds))
}

/// A time as [`time`] reads it, or milliseconds: a number and `ms`.
pub fn short_time(text: &str) -> Option<Duration> {
    match text.trim().strip_suffix("ms") {
        Some(digits) => number(digits).filter(|number| *number <= MAX_SECONDS).map(Duration::from_millis),
        None => time(text),
    }
}

/// A size in octets: a number and `k`, `m` or `g` (of 1024).
pub fn size(text: &str) -> Option<u64> {
    let text = text.trim();
    let (digits, shift) = match text.bytes().last()?.to_ascii_lowercase() {
        b'k' => (text.get(..text.len() - 1)?, 10),
        b'm' => (text.get(..text.len() - 1)?, 20),
        b'g' => (text.get(..text.len() - 1)?, 30),
        _ => (text, 0),
    };
    Some(number(digits)?.saturating_mul(1 << shift))
}

/// One item of `local_addrs` or `remote_addrs`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// `%any`.
    Any,
    /// An address, a network or a range.
    Range(AddressRange),
    /// A host name.
    Name(String),
}

/// Parses an address, a CIDR network, a range, `%any`, `%any4`, `%any6` or a host name.
pub fn address(text: &str) -> Option<Address> {
    match text {
        "%any" => return Some(Address::Any),
        "%any4" | "0.0.0.0" => {
            return Some(Address::Range(AddressRange {
                start: Ipv4Addr::UNSPECIFIED.into(),
                end: Ipv4Addr::BROADCAST.into(),
            }));
        }
        "%any6" | "::" => {
            let end = Ipv6Addr::from_bits(u128::MAX).into();
            return Some(Address::Range(AddressRange { start: Ipv6Addr::UNSPECIFIED.into(), end }));
        }
        _ => {}
    }
    if let Some(range) = range(text) {
        return Some(Address::Range(range));
    }
    let is_name = text.len() <= 253
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte))
        // What has digits and dots only was meant as an address and is a wrong one.
        && !text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.')
        && text.split('.').all(|label| !label.is_empty() && label.len() <= 63 && !label.starts_with('-'));
    is_name.then(|| Address::Name(text.to_owned()))
}

/// An address, a CIDR network or `from-to`.
pub fn range(text: &str) -> Option<AddressRange> {
    if let Some((network, prefix)) = text.split_once('/') {
        if prefix.is_empty() || prefix.len() > 3 || !prefix.bytes().all(|byte| byte.is_ascii_digit()) {
            return None;
        }
        return network_range(network.trim().parse().ok()?, prefix.parse().ok()?);
    }
    if let Some((start, end)) = text.split_once('-') {
        let (start, end): (IpAddr, IpAddr) = (start.trim().parse().ok()?, end.trim().parse().ok()?);
        return (start.is_ipv4() == end.is_ipv4() && start <= end).then_some(AddressRange { start, end });
    }
    text.parse().ok().map(AddressRange::host)
}

fn network_range(address: IpAddr, prefix: u32) -> Option<AddressRange> {
    match address {
        IpAddr::V4(address) => {
            let host = u32::MAX.checked_shr(prefix).unwrap_or(0);
            let start = address.to_bits() & !host;
            (prefix <= 32).then(|| AddressRange {
                start: Ipv4Addr::from_bits(start).into(),
                end: Ipv4Addr::from_bits(start | host).into(),
            })
        }
        IpAddr::V6(address) => {
            let host = u128::MAX.checked_shr(prefix).unwrap_or(0);
            let start = address.to_bits() & !host;
            (prefix <= 128).then(|| AddressRange {
                start: Ipv6Addr::from_bits(start).into(),
                end: Ipv6Addr::from_bits(start | host).into(),
            })
        }
    }
}

/// Parses a traffic selector: `network`, `from-to` or `dynamic`, then optionally `[protocol]`,
/// `[protocol/port]`, `[protocol/from-to]`, `[protocol/opaque]`.
pub fn selector(text: &str) -> Option<ConfiguredSelector> {
    let text = text.trim();
    let (addresses, restriction) = match text.split_once('[') {
        None => (text, None),
        Some((addresses, rest)) => (addresses.trim(), Some(rest.strip_suffix(']')?)),
    };
    let (protocol, start_port, end_port) = match restriction {
        None => (0, 0, u16::MAX),
        Some(restriction) => {
            let (protocol, ports) = match restriction.split_once('/') {
                Some((protocol, ports)) => (protocol_number(protocol.trim())?, ports.trim()),
                None => (protocol_number(restriction.trim())?, ""),
            };
            let (start, end) = port_range(protocol, ports)?;
            (protocol, start, end)
        }
    };
    if matches!(addresses, "dynamic" | "%dynamic") {
        return Some(ConfiguredSelector::Dynamic { protocol, start_port, end_port });
    }
    let AddressRange { start, end } = range(addresses)?;
    Some(ConfiguredSelector::Fixed(TrafficSelector { protocol, start_port, end_port, start, end }))
}

fn port_range(protocol: u8, text: &str) -> Option<(u16, u16)> {
    match text {
        "" | "any" | "%any" => return Some((0, u16::MAX)),
        // RFC 4301 §4.4.1.1: OPAQUE.
        "opaque" => return Some((u16::MAX, 0)),
        _ => {}
    }
    // Ports mean something for these protocols only; elsewhere a restriction would silently never match.
    if !matches!(protocol, 0 | ICMP | TCP | UDP | DCCP | ICMPV6 | SCTP | UDPLITE | MOBILITY) {
        return None;
    }
    if let Some(port) = service(text) {
        return Some((port, port));
    }
    let (start, end) = match text.split_once('-') {
        Some((start, end)) => (port(start)?, port(end)?),
        None => (port(text)?, port(text)?),
    };
    if start > end {
        return None;
    }
    if matches!(protocol, ICMP | ICMPV6) {
        // A number below 256 is a type with each code; others are type and code (RFC 7296 §3.13.1).
        let start = if start < 256 { start << 8 } else { start };
        let end = if end < 256 { end << 8 | 0xff } else { end };
        return (start <= end).then_some((start, end));
    }
    Some((start, end))
}

fn port(text: &str) -> Option<u16> {
    number(text).and_then(|port| u16::try_from(port).ok())
}

const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const DCCP: u8 = 33;
const ICMPV6: u8 = 58;
const SCTP: u8 = 132;
const MOBILITY: u8 = 135;
const UDPLITE: u8 = 136;

/// Protocols by name (IANA protocol-numbers), as `getprotobyname` knows them on most systems.
const PROTOCOLS: &[(&str, u8)] = &[
    ("any", 0),
    ("%any", 0),
    ("icmp", ICMP),
    ("igmp", 2),
    ("ipencap", 4),
    ("ipip", 4),
    ("tcp", TCP),
    ("egp", 8),
    ("igp", 9),
    ("udp", UDP),
    ("dccp", DCCP),
    ("ipv6", 41),
    ("rsvp", 46),
    ("gre", 47),
    ("esp", 50),
    ("ah", 51),
    ("ipv6-icmp", ICMPV6),
    ("icmpv6", ICMPV6),
    ("icmp6", ICMPV6),
    ("eigrp", 88),
    ("ospf", 89),
    ("etherip", 97),
    ("pim", 103),
    ("ipcomp", 108),
    ("vrrp", 112),
    ("l2tp", 115),
    ("sctp", SCTP),
    ("mobility-header", MOBILITY),
    ("udplite", UDPLITE),
];

fn protocol_number(text: &str) -> Option<u8> {
    let text = text.to_ascii_lowercase();
    let named = PROTOCOLS.iter().find(|(name, _)| *name == text).map(|(_, number)| *number);
    named.or_else(|| number(&text).and_then(|number| u8::try_from(number).ok()))
}

/// Services by name (IANA service-names-port-numbers): those that selectors name in practice.
const SERVICES: &[(&str, u16)] = &[
    ("ftp-data", 20),
    ("ftp", 21),
    ("ssh", 22),
    ("telnet", 23),
    ("smtp", 25),
    ("domain", 53),
    ("bootps", 67),
    ("bootpc", 68),
    ("tftp", 69),
    ("http", 80),
    ("kerberos", 88),
    ("pop3", 110),
    ("sunrpc", 111),
    ("ntp", 123),
    ("imap2", 143),
    ("imap", 143),
    ("snmp", 161),
    ("snmp-trap", 162),
    ("bgp", 179),
    ("ldap", 389),
    ("https", 443),
    ("microsoft-ds", 445),
    ("isakmp", 500),
    ("syslog", 514),
    ("ldaps", 636),
    ("imaps", 993),
    ("pop3s", 995),
    ("l2f", 1701),
    ("l2tp", 1701),
    ("radius", 1812),
    ("radius-acct", 1813),
    ("nfs", 2049),
    ("mysql", 3306),
    ("ms-wbt-server", 3389),
    ("ipsec-nat-t", 4500),
    ("sip", 5060),
    ("postgresql", 5432),
];

fn service(text: &str) -> Option<u16> {
    SERVICES.iter().find(|(name, _)| *name == text).map(|(_, port)| *port)
}

/// The name of a protocol that [`selector`] would read again, or its number.
pub fn protocol_name(protocol: u8) -> String {
    PROTOCOLS
        .iter()
        .skip(2)
        .find(|(_, number)| *number == protocol)
        .map_or_else(|| protocol.to_string(), |(name, _)| (*name).to_owned())
}

/// A mark, or what stands for its value: `%unique`, `%unique-dir/0xff`. Given so, the mark has the mask alone.
pub fn numbered_mark(text: &str) -> Option<(Mark, Number)> {
    let (value, mask) = text.split_once('/').unwrap_or((text, "0xffffffff"));
    match own_number(value) {
        None => mark(text).map(|mark| (mark, Number::Configured)),
        Some(own) => {
            let mask = number(mask.trim()).and_then(|mask| u32::try_from(mask).ok()).filter(|mask| *mask != 0)?;
            Some((Mark { value: 0, mask }, own))
        }
    }
}

/// A mark to set, or `%same`, given as which it has the mask alone.
pub fn set_mark(text: &str) -> Option<(Mark, bool)> {
    let (value, mask) = text.split_once('/').unwrap_or((text, "0xffffffff"));
    if value.trim() != "%same" {
        return mark(text).map(|mark| (mark, false));
    }
    let mask = number(mask.trim()).and_then(|mask| u32::try_from(mask).ok())?;
    Some((Mark { value: 0, mask }, true))
}

/// `if_id_in`, `if_id_out`.
pub fn if_id(text: &str) -> Option<(u32, Number)> {
    match own_number(text) {
        None => number(text).and_then(|number| u32::try_from(number).ok()).map(|number| (number, Number::Configured)),
        Some(own) => Some((0, own)),
    }
}

fn own_number(text: &str) -> Option<Number> {
    match text.trim() {
        "%unique" => Some(Number::Own),
        "%unique-dir" => Some(Number::OwnInDirection),
        _ => None,
    }
}

/// A mark: `42`, `0x2a/0xff`. Bits outside of the mask would never fit a packet.
pub fn mark(text: &str) -> Option<Mark> {
    let number = |text: &str| number(text.trim()).and_then(|number| u32::try_from(number).ok());
    let mark = match text.split_once('/') {
        None => Mark { value: number(text)?, mask: u32::MAX },
        Some((value, mask)) => Mark { value: number(value)?, mask: number(mask)? },
    };
    // 0 alone is none, as with charon.
    if mark.value == 0 && !text.contains('/') {
        return Some(Mark::default());
    }
    (mark.value & !mark.mask == 0).then_some(mark)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn fixed(text: &str) -> TrafficSelector {
        match selector(text) {
            Some(ConfiguredSelector::Fixed(selector)) => selector,
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn malformed_selectors_are_refused() {
        for text in [
            "",
            "10.0.0.0/33",
            "10.0.0.0/",
            "10.0.0/8",
            "::/129",
            "10.0.0.9-10.0.0.3",
            "10.0.0.1-::2",
            "10.0.0.0/8[",
            "10.0.0.0/8[tcp/80",
            "10.0.0.0/8[tcp/80]x",
            "10.0.0.0/8[tcp/65536]",
            "10.0.0.0/8[tcp/9-3]",
            "10.0.0.0/8[nosuch/80]",
            "10.0.0.0/8[256]",
            "10.0.0.0/8[gre/80]",
            "dynamics",
            "10.0.0.0/8[tcp/nosuch]",
            "10.0.0.0/+8",
        ] {
            assert_eq!(selector(text), None, "{text}");
        }
    }

    #[test]
    fn selectors_in_strongswan_notation() {
        let one = fixed("10.1.2.3/16[tcp/http]");
        assert_eq!((one.start.to_string(), one.end.to_string()), ("10.1.0.0".into(), "10.1.255.255".into()));
        assert_eq!((one.protocol, one.start_port, one.end_port), (6, 80, 80));
        let one = fixed("10.0.0.3-10.0.0.9[17/1024-2047]");
        assert_eq!((one.start.to_string(), one.end.to_string()), ("10.0.0.3".into(), "10.0.0.9".into()));
        assert_eq!((one.protocol, one.start_port, one.end_port), (17, 1024, 2047));
        assert_eq!(fixed("0.0.0.0/0").end.to_string(), "255.255.255.255");
        assert_eq!(fixed("::/0").end.to_string(), "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff");
        let one = fixed("fd00::1[icmpv6/128]");
        assert_eq!((one.protocol, one.start_port, one.end_port), (58, 0x8000, 0x80ff));
        let one = fixed("10.0.0.1[udp/opaque]");
        assert_eq!((one.start_port, one.end_port), (0xffff, 0));
        assert_eq!(
            selector("dynamic[gre]"),
            Some(ConfiguredSelector::Dynamic { protocol: 47, start_port: 0, end_port: 0xffff })
        );
        assert_eq!(selector("dynamic[/53]"), None, "an empty protocol is not one; any is written out");
    }

    #[test]
    fn times_sizes_and_numbers() {
        assert_eq!(time("4h"), Some(Duration::from_secs(14_400)));
        assert_eq!(short_time("1500ms"), Some(Duration::from_millis(1500)));
        assert_eq!((short_time("2s"), short_time("ms"), short_time("1.5ms")), (time("2s"), None, None));
        assert_eq!(time("2 D"), Some(Duration::from_secs(172_800)));
        assert_eq!(time("30"), Some(Duration::from_secs(30)));
        assert_eq!(
            (time(""), time("h"), time("-1s"), time("+1"), time("1x"), time("99999999999d")),
            (None, None, None, None, None, None)
        );
        assert_eq!(
            (size("1k"), size("2M"), size("18446744073709551615g")),
            (Some(1024), Some(2 << 20), Some(u64::MAX))
        );
        assert_eq!(
            (number("0x10"), number("010"), number("0"), number("09"), number("0x")),
            (Some(16), Some(8), Some(0), None, None)
        );
        assert_eq!((boolean("Enabled"), boolean("no"), boolean("maybe")), (Some(true), Some(false), None));
    }

    #[test]
    fn addresses_networks_ranges_and_names() {
        let range = |start: &str, end: &str| {
            Some(Address::Range(AddressRange { start: start.parse().unwrap(), end: end.parse().unwrap() }))
        };
        assert_eq!(address("192.0.2.1"), range("192.0.2.1", "192.0.2.1"));
        assert_eq!(address("192.0.2.0/24"), range("192.0.2.0", "192.0.2.255"));
        assert_eq!(address("192.0.2.3-192.0.2.9"), range("192.0.2.3", "192.0.2.9"));
        assert_eq!(address("%any"), Some(Address::Any));
        assert_eq!(address("%any4"), range("0.0.0.0", "255.255.255.255"));
        assert_eq!(address("gw-1.example.com"), Some(Address::Name("gw-1.example.com".into())));
        assert_eq!(
            (address("192.0.2.256"), address("a b"), address(""), address("192.0.2.0/40")),
            (None, None, None, None)
        );
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in "\\PC{0,40}") {
            let _ = (selector(&text), time(&text), size(&text), number(&text), address(&text));
        }

        #[test]
        fn almost_selectors_never_panic(text in "[0-9a-f.:/\\[\\]tcp-]{0,40}") {
            let _ = (selector(&text), address(&text));
        }
    }
}
