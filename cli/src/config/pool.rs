//! `pools.<name>`, from a file or from VICI's `load-pool`. Refusals are in charon's words.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ike::config::{AddressRange, domain_name};
use ike::pool::PoolConfig;
use ike::wire::{Attribute, TrustAnchor};

use crate::config::values;
use crate::tree::{Node, Section};

/// Cisco's, which some clients read: networks to go through the tunnel, and networks that do not.
const UNITY_SPLIT_INCLUDE: u16 = 28_676;
const UNITY_LOCAL_LAN: u16 = 28_678;
/// Microsoft's.
const INTERNAL_IP4_SERVER: u16 = 23_456;
const INTERNAL_IP6_SERVER: u16 = 23_457;
/// Once standardised, and removed again.
const INTERNAL_IP6_NETMASK: u16 = 9;
const INTERNAL_IP6_NBNS: u16 = 11;
/// RFC 7651.
const P_CSCF_IP4_ADDRESS: u16 = 20;
const P_CSCF_IP6_ADDRESS: u16 = 21;

/// Most octets of a pool's attributes: they go out in one message.
const MAX_OCTETS: usize = 8192;

/// Reads a pool.
///
/// # Errors
/// What is wrong, in charon's words.
pub fn pool(name: &str, section: &Section) -> Result<PoolConfig, String> {
    let mut addresses = None;
    let mut attributes = Vec::new();
    let mut anchors = Vec::new();
    for (option, node) in &section.entries {
        if matches!(node, Node::Section(_)) {
            return Err(format!("invalid attribute: {option}"));
        }
        let invalid = || format!("invalid attribute value for {option}");
        if option == "addrs" {
            let text = section.text(option).unwrap_or_default();
            addresses = Some(range(text).ok_or_else(|| format!("invalid addrs value: {text}"))?);
            continue;
        }
        for value in section.list(option) {
            let text = value.text().map(str::trim).ok_or_else(invalid)?;
            if option == "internal_dnssec_ta" {
                anchors.push(anchor(text).ok_or_else(invalid)?);
            } else {
                attributes.push(attribute(option, text)?);
            }
        }
    }
    let (base, range) = addresses.ok_or_else(|| format!("missing addrs for pool '{name}'"))?;
    for (domain, anchor) in anchors {
        place(&mut attributes, &domain, anchor)
            .ok_or_else(|| "invalid attribute value for internal_dnssec_ta".to_owned())?;
    }
    let serves_names = attributes.iter().any(|one| matches!(one, Attribute::Ip4Dns(_) | Attribute::Ip6Dns(_)));
    if !serves_names && attributes.iter().any(|one| matches!(one, Attribute::DnsDomain(_))) {
        // RFC 8598 §3.2.
        return Err("internal_dns_domain needs a name server: set dns".to_owned());
    }
    let octets: usize = attributes.iter().map(Attribute::wire_length).sum();
    if octets > MAX_OCTETS {
        return Err(format!("the attributes of pool '{name}' take more than {MAX_OCTETS} octets"));
    }
    Ok(PoolConfig { name: name.to_owned(), base, range, attributes })
}

/// First address as written, and what is given out: of a network all but its first and last address, from the written one
/// on.
fn range(text: &str) -> Option<(IpAddr, AddressRange)> {
    let all = values::range(text)?;
    let written = text.split(['/', '-']).next()?.trim().parse::<IpAddr>().ok()?;
    if !text.contains('/') {
        return Some((written, all));
    }
    let usable = match (all.start, all.end) {
        (IpAddr::V4(start), IpAddr::V4(end)) if end.to_bits() - start.to_bits() > 1 => AddressRange {
            start: Ipv4Addr::from_bits(start.to_bits() + 1).into(),
            end: Ipv4Addr::from_bits(end.to_bits() - 1).into(),
        },
        (IpAddr::V6(start), IpAddr::V6(end)) if end.to_bits() - start.to_bits() > 1 => AddressRange {
            start: Ipv6Addr::from_bits(start.to_bits() + 1).into(),
            end: Ipv6Addr::from_bits(end.to_bits() - 1).into(),
        },
        _ => all,
    };
    let start = written.max(usable.start);
    (start <= usable.end).then_some((written, AddressRange { start, ..usable }))
}

fn attribute(option: &str, text: &str) -> Result<Attribute, String> {
    let invalid = || format!("invalid attribute value for {option}");
    if let Some(kind) = values::number(option) {
        let kind = u16::try_from(kind).ok().filter(|kind| (1..0x8000).contains(kind));
        let kind = kind.ok_or_else(|| format!("invalid attribute: {option}"))?;
        return Attribute::from_wire(kind, &octets(text).ok_or_else(invalid)?).map_err(|_| invalid());
    }
    let found = match option {
        "dns" => address(text, |four| Attribute::Ip4Dns(Some(four)), |six| Attribute::Ip6Dns(Some(six))),
        "dhcp" => address(text, |four| Attribute::Ip4Dhcp(Some(four)), |six| Attribute::Ip6Dhcp(Some(six))),
        "nbns" => address(text, |four| Attribute::Ip4Nbns(Some(four)), |six| other(INTERNAL_IP6_NBNS, &six.octets())),
        "netmask" => {
            address(text, |four| Attribute::Ip4Netmask(Some(four)), |six| other(INTERNAL_IP6_NETMASK, &six.octets()))
        }
        "server" => address(
            text,
            |four| other(INTERNAL_IP4_SERVER, &four.octets()),
            |six| other(INTERNAL_IP6_SERVER, &six.octets()),
        ),
        "p_cscf" => address(
            text,
            |four| other(P_CSCF_IP4_ADDRESS, &four.octets()),
            |six| other(P_CSCF_IP6_ADDRESS, &six.octets()),
        ),
        "subnet" => subnet(text),
        "split_include" => unity(UNITY_SPLIT_INCLUDE, text),
        "split_exclude" => unity(UNITY_LOCAL_LAN, text),
        "internal_dns_domain" => domain_name(text.as_bytes()).map(|name| Attribute::DnsDomain(name.into_bytes())),
        _ => return Err(format!("invalid attribute: {option}")),
    };
    found.ok_or_else(invalid)
}

fn other(kind: u16, value: &[u8]) -> Attribute {
    Attribute::Unknown { kind, value: value.to_vec() }
}

fn address(text: &str, four: impl Fn(Ipv4Addr) -> Attribute, six: impl Fn(Ipv6Addr) -> Attribute) -> Option<Attribute> {
    Some(match text.parse().ok()? {
        IpAddr::V4(address) => four(address),
        IpAddr::V6(address) => six(address),
    })
}

/// A network, or one address.
fn network(text: &str) -> Option<(IpAddr, u8)> {
    let range = values::range(text).filter(|_| !text.contains('-'))?;
    let selector = ipsec::selector::TrafficSelector {
        start: range.start,
        end: range.end,
        ..ipsec::selector::TrafficSelector::host(range.start)
    };
    Some((range.start, selector.prefix()?))
}

fn mask(prefix: u8) -> Ipv4Addr {
    Ipv4Addr::from_bits(!u32::MAX.checked_shr(prefix.into()).unwrap_or(0))
}

fn subnet(text: &str) -> Option<Attribute> {
    Some(match network(text)? {
        (IpAddr::V4(address), prefix) => Attribute::Ip4Subnet(Some((address, mask(prefix)))),
        (IpAddr::V6(address), prefix) => Attribute::Ip6Subnet(Some((address, prefix))),
    })
}

/// Address, mask, and six octets for protocol and ports, which are 0.
fn unity(kind: u16, text: &str) -> Option<Attribute> {
    match network(text)? {
        (IpAddr::V4(address), prefix) => {
            Some(other(kind, &[&address.octets()[..], &mask(prefix).octets(), &[0; 6]].concat()))
        }
        (IpAddr::V6(_), _) => None,
    }
}

/// What a numeric option stands for: an address, `0x…`, or the text itself.
fn octets(text: &str) -> Option<Vec<u8>> {
    if let Ok(address) = text.parse() {
        return Some(match address {
            IpAddr::V4(address) => address.octets().to_vec(),
            IpAddr::V6(address) => address.octets().to_vec(),
        });
    }
    match text.strip_prefix("0x") {
        Some(digits) => hexadecimal(digits),
        None => Some(text.as_bytes().to_vec()),
    }
}

fn hexadecimal(digits: &str) -> Option<Vec<u8>> {
    data_encoding::HEXLOWER_PERMISSIVE.decode(digits.as_bytes()).ok()
}

/// `domain key-tag algorithm digest-type digest`, as in a DS record.
fn anchor(text: &str) -> Option<(String, TrustAnchor)> {
    let mut fields = text.split_ascii_whitespace();
    let domain = domain_name(fields.next()?.as_bytes())?;
    let key_tag = fields.next()?.parse().ok()?;
    let (algorithm, digest_type) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    // A digest may be written in groups.
    let digest = hexadecimal(&fields.collect::<String>()).filter(|digest| !digest.is_empty())?;
    Some((domain, TrustAnchor { key_tag, algorithm, digest_type, digest }))
}

/// Puts an anchor behind its domain and the anchors that are there (RFC 8598 §3.2).
fn place(attributes: &mut Vec<Attribute>, domain: &str, anchor: TrustAnchor) -> Option<()> {
    let at = attributes.iter().position(|one| *one == Attribute::DnsDomain(domain.as_bytes().to_vec()))?;
    let behind = attributes.iter().skip(at + 1).take_while(|one| matches!(one, Attribute::DnssecTa(_))).count();
    attributes.insert(at + 1 + behind, Attribute::DnssecTa(Some(anchor)));
    Some(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::settings;

    fn read(text: &str) -> Result<PoolConfig, String> {
        pool("p", &settings::parse(Path::new("swanctl.conf"), text.as_bytes()).unwrap().root)
    }

    #[test]
    fn what_is_not_a_pool_is_refused_in_charon_s_words() {
        for (text, expected) in [
            ("dns = 10.0.0.1", "missing addrs for pool 'p'"),
            ("addrs = nonsense", "invalid addrs value: nonsense"),
            ("addrs = 10.3.0.9-10.3.0.4", "invalid addrs value: 10.3.0.9-10.3.0.4"),
            ("addrs = 10.3.0.255/24", "invalid addrs value: 10.3.0.255/24"),
            ("addrs = 10.3.0.1-fd00::1", "invalid addrs value: 10.3.0.1-fd00::1"),
            ("addrs = 10.3.0.0/33", "invalid addrs value: 10.3.0.0/33"),
            ("addrs = 10.3.0.0/24\ndns = x", "invalid attribute value for dns"),
            ("addrs = 10.3.0.0/24\nsubnet = 10.0.0.0/40", "invalid attribute value for subnet"),
            ("addrs = 10.3.0.0/24\nsplit_include = fd00::/8", "invalid attribute value for split_include"),
            ("addrs = 10.3.0.0/24\nfoo = 1.2.3.4", "invalid attribute: foo"),
            ("addrs = 10.3.0.0/24\n40000 = x", "invalid attribute: 40000"),
            ("addrs = 10.3.0.0/24\n1 = 0x0102", "invalid attribute value for 1"),
            ("addrs = 10.3.0.0/24\n77 = 0x012", "invalid attribute value for 77"),
            ("addrs = 10.3.0.0/24\ndns { x = y }", "invalid attribute: dns"),
            ("addrs = 10.3.0.0/24\ninternal_dns_domain = \"a;b\"", "invalid attribute value for internal_dns_domain"),
            ("addrs = 10.3.0.0/24\ninternal_dns_domain = a.test", "internal_dns_domain needs a name server: set dns"),
            (
                "addrs = 10.3.0.0/24\ndns = 10.0.0.1\ninternal_dnssec_ta = a.test 1 8 2 aabb",
                "invalid attribute value for internal_dnssec_ta",
            ),
        ] {
            assert_eq!(read(text).unwrap_err(), expected, "{text}");
        }
        let long = format!("addrs = 10.3.0.0/24\n77 = 0x{}", "00".repeat(9000));
        assert!(read(&long).unwrap_err().contains("more than 8192 octets"));
    }

    // Sizes are charon's.
    #[test]
    fn the_first_and_last_address_of_a_network_are_not_given_out() {
        for (text, base, start, end) in [
            ("10.3.0.0/24", "10.3.0.0", "10.3.0.1", "10.3.0.254"),
            ("10.3.0.7/24", "10.3.0.7", "10.3.0.7", "10.3.0.254"),
            ("10.3.0.0/31", "10.3.0.0", "10.3.0.0", "10.3.0.1"),
            ("10.3.0.4/32", "10.3.0.4", "10.3.0.4", "10.3.0.4"),
            ("10.3.0.4", "10.3.0.4", "10.3.0.4", "10.3.0.4"),
            ("10.3.0.4 - 10.3.0.9", "10.3.0.4", "10.3.0.4", "10.3.0.9"),
            ("fd00::/64", "fd00::", "fd00::1", "fd00::ffff:ffff:ffff:fffe"),
            ("::/0", "::", "::1", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffe"),
        ] {
            let pool = read(&format!("addrs = {text}")).unwrap();
            let shown = [pool.base, pool.range.start, pool.range.end].map(|address| address.to_string());
            assert_eq!(shown, [base, start, end], "{text}");
        }
    }

    #[test]
    fn attributes_are_typed() {
        let pool = read(
            "addrs = 10.3.0.0/24\n dns = 10.0.0.1, fd00::1\n subnet = 10.1.0.0/16, fd01::/64, 10.2.0.1\n nbns = 1.2.3.4
             split_include = 10.0.0.0/8\n 77 = hello\n internal_dns_domain = Example.com, b.test
             internal_dnssec_ta = \"example.com 43547 8 2 B622 5AB2\", example.com 7 8 1 00",
        )
        .unwrap();
        let anchor = |key_tag, digest_type, digest: &[u8]| {
            Attribute::DnssecTa(Some(TrustAnchor { key_tag, algorithm: 8, digest_type, digest: digest.to_vec() }))
        };
        let mask = |text: &str| text.parse().unwrap();
        assert_eq!(
            pool.attributes,
            [
                Attribute::Ip4Dns(Some(mask("10.0.0.1"))),
                Attribute::Ip6Dns(Some("fd00::1".parse().unwrap())),
                Attribute::Ip4Subnet(Some((mask("10.1.0.0"), mask("255.255.0.0")))),
                Attribute::Ip6Subnet(Some(("fd01::".parse().unwrap(), 64))),
                Attribute::Ip4Subnet(Some((mask("10.2.0.1"), mask("255.255.255.255")))),
                Attribute::Ip4Nbns(Some(mask("1.2.3.4"))),
                Attribute::Unknown { kind: 28_676, value: vec![10, 0, 0, 0, 255, 0, 0, 0, 0, 0, 0, 0, 0, 0] },
                Attribute::Unknown { kind: 77, value: b"hello".to_vec() },
                Attribute::DnsDomain(b"example.com".to_vec()),
                anchor(43_547, 2, &[0xb6, 0x22, 0x5a, 0xb2]),
                anchor(7, 1, &[0]),
                Attribute::DnsDomain(b"b.test".to_vec()),
            ]
        );
    }
}
