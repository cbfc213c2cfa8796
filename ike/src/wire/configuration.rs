//! Configuration payloads (RFC 7296 §3.15, RFC 8598 §4).

use std::net::{Ipv4Addr, Ipv6Addr};

use super::WireError;
use super::reader::Reader;

/// Attributes that one payload may have; a message of 65,535 octets could have some 16,000.
pub const MAX_ATTRIBUTES: usize = 512;

const IP4_ADDRESS: u16 = 1;
const IP4_NETMASK: u16 = 2;
const IP4_DNS: u16 = 3;
const IP4_NBNS: u16 = 4;
const IP4_DHCP: u16 = 6;
const APPLICATION_VERSION: u16 = 7;
const IP6_ADDRESS: u16 = 8;
const IP6_DNS: u16 = 10;
const IP6_DHCP: u16 = 12;
const IP4_SUBNET: u16 = 13;
const SUPPORTED_ATTRIBUTES: u16 = 14;
const IP6_SUBNET: u16 = 15;
const DNS_DOMAIN: u16 = 25;
const DNSSEC_TA: u16 = 26;

/// The types that [`Attribute`] gives a meaning to: what SUPPORTED_ATTRIBUTES answers.
pub const SUPPORTED: [u16; 14] = [
    IP4_ADDRESS,
    IP4_NETMASK,
    IP4_DNS,
    IP4_NBNS,
    IP4_DHCP,
    APPLICATION_VERSION,
    IP6_ADDRESS,
    IP6_DNS,
    IP6_DHCP,
    IP4_SUBNET,
    SUPPORTED_ATTRIBUTES,
    IP6_SUBNET,
    DNS_DOMAIN,
    DNSSEC_TA,
];

/// CFG Type; unknown values are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CfgType(pub u8);

#[allow(missing_docs, reason = "the RFC's names")]
impl CfgType {
    pub const REQUEST: Self = Self(1);
    pub const REPLY: Self = Self(2);
    pub const SET: Self = Self(3);
    pub const ACK: Self = Self(4);
}

/// A Configuration payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Configuration {
    /// What it is.
    pub kind: CfgType,
    /// Attributes, in order.
    pub attributes: Vec<Attribute>,
}

/// One attribute. `None` is one of length 0, which asks for a value or has none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attribute {
    /// INTERNAL_IP4_ADDRESS.
    Ip4Address(Option<Ipv4Addr>),
    /// INTERNAL_IP4_NETMASK.
    Ip4Netmask(Option<Ipv4Addr>),
    /// INTERNAL_IP4_DNS.
    Ip4Dns(Option<Ipv4Addr>),
    /// INTERNAL_IP4_NBNS.
    Ip4Nbns(Option<Ipv4Addr>),
    /// INTERNAL_IP4_DHCP.
    Ip4Dhcp(Option<Ipv4Addr>),
    /// APPLICATION_VERSION: printable ASCII by the standard, any octets in fact.
    ApplicationVersion(Vec<u8>),
    /// INTERNAL_IP6_ADDRESS: address and prefix length (at most 128).
    Ip6Address(Option<(Ipv6Addr, u8)>),
    /// INTERNAL_IP6_DNS.
    Ip6Dns(Option<Ipv6Addr>),
    /// INTERNAL_IP6_DHCP.
    Ip6Dhcp(Option<Ipv6Addr>),
    /// INTERNAL_IP4_SUBNET: address and netmask.
    Ip4Subnet(Option<(Ipv4Addr, Ipv4Addr)>),
    /// SUPPORTED_ATTRIBUTES: attribute types.
    SupportedAttributes(Vec<u16>),
    /// INTERNAL_IP6_SUBNET: address and prefix length (at most 128).
    Ip6Subnet(Option<(Ipv6Addr, u8)>),
    /// INTERNAL_DNS_DOMAIN (RFC 8598 §4.1), in presentation format, as received.
    DnsDomain(Vec<u8>),
    /// INTERNAL_DNSSEC_TA (RFC 8598 §4.2): of the domain before it.
    DnssecTa(Option<TrustAnchor>),
    /// Any other type: to be ignored.
    Unknown {
        /// Attribute type, 15 bits.
        kind: u16,
        /// Value.
        value: Vec<u8>,
    },
}

/// What a DS record says (RFC 4034 §5.1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TrustAnchor {
    /// Key tag.
    pub key_tag: u16,
    /// DNSKEY algorithm.
    pub algorithm: u8,
    /// Digest type.
    pub digest_type: u8,
    /// Digest.
    pub digest: Vec<u8>,
}

/// Parses a payload's body.
pub(super) fn parse(mut reader: Reader<'_>) -> Result<Configuration, WireError> {
    const WHAT: &str = "Configuration payload";
    let kind = CfgType(reader.u8(WHAT)?);
    reader.take(3, WHAT)?;
    let mut attributes = Vec::new();
    while !reader.is_empty() {
        let at = reader.at();
        if attributes.len() >= MAX_ATTRIBUTES {
            return Err(WireError::Malformed { what: WHAT, at, reason: "too many attributes" });
        }
        let attribute = reader.u16("configuration attribute")? & 0x7fff;
        let length_at = reader.at();
        let length = usize::from(reader.u16("configuration attribute")?);
        if length > reader.len() {
            return Err(WireError::Length { what: "configuration attribute", at: length_at, length });
        }
        let value = reader.take(length, "configuration attribute")?;
        attributes.push(attribute_of(attribute, value, length_at)?);
    }
    Ok(Configuration { kind, attributes })
}

impl Attribute {
    /// The attribute of this type with this value, as it would be received.
    ///
    /// # Errors
    /// A length that this type cannot have, or a prefix length beyond 128.
    pub fn from_wire(kind: u16, value: &[u8]) -> Result<Self, WireError> {
        attribute_of(kind & 0x7fff, value, 0)
    }

    /// Octets on the wire, with type and length.
    pub fn wire_length(&self) -> usize {
        self.to_wire().1.len().saturating_add(4)
    }

    /// Attribute type and value on the wire.
    fn to_wire(&self) -> (u16, Vec<u8>) {
        fn four(address: &Option<Ipv4Addr>) -> Vec<u8> {
            address.map(|address| address.octets().to_vec()).unwrap_or_default()
        }
        fn sixteen(address: &Option<Ipv6Addr>) -> Vec<u8> {
            address.map(|address| address.octets().to_vec()).unwrap_or_default()
        }
        fn prefixed(network: &Option<(Ipv6Addr, u8)>) -> Vec<u8> {
            network.map(|(address, prefix)| [&address.octets()[..], &[prefix]].concat()).unwrap_or_default()
        }
        match self {
            Self::Ip4Address(address) => (IP4_ADDRESS, four(address)),
            Self::Ip4Netmask(address) => (IP4_NETMASK, four(address)),
            Self::Ip4Dns(address) => (IP4_DNS, four(address)),
            Self::Ip4Nbns(address) => (IP4_NBNS, four(address)),
            Self::Ip4Dhcp(address) => (IP4_DHCP, four(address)),
            Self::ApplicationVersion(text) => (APPLICATION_VERSION, text.clone()),
            Self::Ip6Address(address) => (IP6_ADDRESS, prefixed(address)),
            Self::Ip6Dns(address) => (IP6_DNS, sixteen(address)),
            Self::Ip6Dhcp(address) => (IP6_DHCP, sixteen(address)),
            Self::Ip4Subnet(subnet) => {
                let octets = subnet.map(|(address, mask)| [address.octets(), mask.octets()].concat());
                (IP4_SUBNET, octets.unwrap_or_default())
            }
            Self::SupportedAttributes(kinds) => {
                (SUPPORTED_ATTRIBUTES, kinds.iter().flat_map(|kind| kind.to_be_bytes()).collect())
            }
            Self::Ip6Subnet(subnet) => (IP6_SUBNET, prefixed(subnet)),
            Self::DnsDomain(name) => (DNS_DOMAIN, name.clone()),
            Self::DnssecTa(anchor) => {
                let octets = anchor.as_ref().map(|anchor| {
                    let mut octets = anchor.key_tag.to_be_bytes().to_vec();
                    octets.extend_from_slice(&[anchor.algorithm, anchor.digest_type]);
                    octets.extend_from_slice(&anchor.digest);
                    octets
                });
                (DNSSEC_TA, octets.unwrap_or_default())
            }
            Self::Unknown { kind, value } => (*kind & 0x7fff, value.clone()),
        }
    }
}

fn attribute_of(kind: u16, value: &[u8], at: usize) -> Result<Attribute, WireError> {
    let refused = |what| WireError::Length { what, at, length: value.len() };
    let four = |what| optional(value, <Ipv4Addr as From<[u8; 4]>>::from).ok_or(refused(what));
    let sixteen = |what| optional(value, <Ipv6Addr as From<[u8; 16]>>::from).ok_or(refused(what));
    let prefixed = |what| {
        let network = optional(value, |octets: [u8; 17]| {
            let [address @ .., prefix] = octets;
            (Ipv6Addr::from(address), prefix)
        });
        match network.ok_or(refused(what))? {
            Some((_, prefix)) if prefix > 128 => {
                Err(WireError::Malformed { what, at, reason: "a prefix of more than 128 bits" })
            }
            network => Ok(network),
        }
    };
    Ok(match kind {
        IP4_ADDRESS => Attribute::Ip4Address(four("INTERNAL_IP4_ADDRESS")?),
        IP4_NETMASK => Attribute::Ip4Netmask(four("INTERNAL_IP4_NETMASK")?),
        IP4_DNS => Attribute::Ip4Dns(four("INTERNAL_IP4_DNS")?),
        IP4_NBNS => Attribute::Ip4Nbns(four("INTERNAL_IP4_NBNS")?),
        IP4_DHCP => Attribute::Ip4Dhcp(four("INTERNAL_IP4_DHCP")?),
        APPLICATION_VERSION => Attribute::ApplicationVersion(value.to_vec()),
        IP6_ADDRESS => Attribute::Ip6Address(prefixed("INTERNAL_IP6_ADDRESS")?),
        IP6_DNS => Attribute::Ip6Dns(sixteen("INTERNAL_IP6_DNS")?),
        IP6_DHCP => Attribute::Ip6Dhcp(sixteen("INTERNAL_IP6_DHCP")?),
        IP4_SUBNET => Attribute::Ip4Subnet(
            optional(value, |[a, b, c, d, e, f, g, h]: [u8; 8]| (Ipv4Addr::new(a, b, c, d), Ipv4Addr::new(e, f, g, h)))
                .ok_or(refused("INTERNAL_IP4_SUBNET"))?,
        ),
        SUPPORTED_ATTRIBUTES => {
            let (pairs, []) = value.as_chunks::<2>() else { return Err(refused("SUPPORTED_ATTRIBUTES")) };
            Attribute::SupportedAttributes(pairs.iter().map(|pair| u16::from_be_bytes(*pair)).collect())
        }
        // The table of §3.15.1 has 17 octets only, but requests are empty in practice, as for the others.
        IP6_SUBNET => Attribute::Ip6Subnet(prefixed("INTERNAL_IP6_SUBNET")?),
        DNS_DOMAIN => Attribute::DnsDomain(value.to_vec()),
        DNSSEC_TA => Attribute::DnssecTa(match value {
            [] => None,
            [tag_high, tag_low, algorithm, digest_type, digest @ ..] if !digest.is_empty() => Some(TrustAnchor {
                key_tag: u16::from_be_bytes([*tag_high, *tag_low]),
                algorithm: *algorithm,
                digest_type: *digest_type,
                digest: digest.to_vec(),
            }),
            _ => return Err(refused("INTERNAL_DNSSEC_TA")),
        }),
        _ => Attribute::Unknown { kind, value: value.to_vec() },
    })
}

/// A value of exactly `N` octets, or of none; `None` for another length.
fn optional<const N: usize, T>(value: &[u8], make: impl FnOnce([u8; N]) -> T) -> Option<Option<T>> {
    if value.is_empty() {
        return Some(None);
    }
    <[u8; N]>::try_from(value).ok().map(|octets| Some(make(octets)))
}

/// Writes a payload's body. `None` when a length does not fit.
pub(super) fn encode(configuration: &Configuration, out: &mut Vec<u8>) -> Option<()> {
    out.extend_from_slice(&[configuration.kind.0, 0, 0, 0]);
    for attribute in &configuration.attributes {
        let (kind, value) = attribute.to_wire();
        out.extend_from_slice(&kind.to_be_bytes());
        out.extend_from_slice(&u16::try_from(value.len()).ok()?.to_be_bytes());
        out.extend_from_slice(&value);
    }
    Some(())
}
