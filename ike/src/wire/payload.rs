//! Payload chains and the bodies of payloads (RFC 7296 §3.2 to §3.16).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipsec::selector::TrafficSelector;
use ipsec::transform::{Ke, Protocol};

use super::reader::Reader;
use super::{
    Identification, MAX_PAYLOADS, NO_NEXT_PAYLOAD, Notify, NotifyType, Payload, SK, SKF, WireError, WireSelector,
};
use super::{configuration, security_association};

const SECURITY_ASSOCIATION: u8 = 33;
const KEY_EXCHANGE: u8 = 34;
const ID_INITIATOR: u8 = 35;
const ID_RESPONDER: u8 = 36;
const CERTIFICATE: u8 = 37;
const CERTIFICATE_REQUEST: u8 = 38;
const AUTHENTICATION: u8 = 39;
const NONCE: u8 = 40;
const NOTIFY: u8 = 41;
const DELETE: u8 = 42;
const VENDOR_ID: u8 = 43;
const TS_INITIATOR: u8 = 44;
const TS_RESPONDER: u8 = 45;
const CONFIGURATION: u8 = 47;
const EAP: u8 = 48;
/// RFC 8019 §8.2.
const PUZZLE_SOLUTION: u8 = 54;

const TS_IPV4_ADDR_RANGE: u8 = 7;
const TS_IPV6_ADDR_RANGE: u8 = 8;

const CRITICAL: u8 = 0x80;

/// Parses a payload chain from inside an Encrypted payload. Offsets in errors count from its start.
pub fn parse_payloads(first: u8, body: &[u8]) -> Result<Vec<Payload>, WireError> {
    parse_chain(first, Reader::new(body))
}

/// The type of the first payload that is critical and unknown, if any (RFC 7296 §2.5).
pub fn unknown_critical(payloads: &[Payload]) -> Option<u8> {
    payloads.iter().find_map(|payload| match payload {
        Payload::Unknown { kind, critical: true, .. } => Some(*kind),
        _ => None,
    })
}

/// Reads payloads until the chain ends, which must be where the octets end.
pub(super) fn parse_chain(first: u8, mut reader: Reader<'_>) -> Result<Vec<Payload>, WireError> {
    let mut payloads = Vec::new();
    let mut kind = first;
    while kind != NO_NEXT_PAYLOAD {
        let at = reader.at();
        if payloads.len() >= MAX_PAYLOADS {
            return Err(WireError::Malformed { what: "message", at, reason: "too many payloads" });
        }
        if kind == SK || kind == SKF {
            // §3.14: it must be the last; we know no exchange with payloads before it, nor one inside another.
            return Err(WireError::Malformed { what: "Encrypted payload", at, reason: "not the only payload" });
        }
        let next = reader.u8("payload header")?;
        let critical = reader.u8("payload header")? & CRITICAL != 0;
        let body = reader.part(2, "payload")?;
        payloads.push(parse_payload(kind, critical, body)?);
        kind = next;
    }
    if !reader.is_empty() {
        return Err(WireError::Length { what: "octets after the last payload", at: reader.at(), length: reader.len() });
    }
    Ok(payloads)
}

fn parse_payload(kind: u8, critical: bool, mut reader: Reader<'_>) -> Result<Payload, WireError> {
    Ok(match kind {
        SECURITY_ASSOCIATION => Payload::Sa(security_association::parse(reader)?),
        KEY_EXCHANGE => {
            let group = Ke(reader.u16("Key Exchange payload")?);
            reader.u16("Key Exchange payload")?;
            Payload::Ke { group, data: non_empty(reader, "Key Exchange data")? }
        }
        ID_INITIATOR => Payload::IdInitiator(parse_identification(reader)?),
        ID_RESPONDER => Payload::IdResponder(parse_identification(reader)?),
        CERTIFICATE => Payload::Cert { encoding: reader.u8("Certificate payload")?, data: reader.rest().to_vec() },
        CERTIFICATE_REQUEST => Payload::CertReq {
            encoding: reader.u8("Certificate Request payload")?,
            authorities: reader.rest().to_vec(),
        },
        AUTHENTICATION => {
            let method = reader.u8("Authentication payload")?;
            reader.take(3, "Authentication payload")?;
            Payload::Auth { method, data: reader.rest().to_vec() }
        }
        NONCE => {
            // §3.9: between 16 and 256 octets.
            if !(16..=256).contains(&reader.len()) {
                return Err(WireError::Length { what: "Nonce payload", at: reader.at(), length: reader.len() });
            }
            Payload::Nonce(reader.rest().to_vec())
        }
        NOTIFY => Payload::Notify(parse_notify(reader)?),
        DELETE => parse_delete(reader)?,
        VENDOR_ID => Payload::Vendor(reader.rest().to_vec()),
        TS_INITIATOR => Payload::TsInitiator(parse_selectors(reader)?),
        TS_RESPONDER => Payload::TsResponder(parse_selectors(reader)?),
        CONFIGURATION => Payload::Configuration(configuration::parse(reader)?),
        EAP => Payload::Eap(reader.rest().to_vec()),
        PUZZLE_SOLUTION => Payload::PuzzleSolution(non_empty(reader, "Puzzle Solution data")?),
        _ => Payload::Unknown { kind, critical, data: reader.rest().to_vec() },
    })
}

fn non_empty(reader: Reader<'_>, what: &'static str) -> Result<Vec<u8>, WireError> {
    if reader.is_empty() {
        return Err(WireError::Length { what, at: reader.at(), length: 0 });
    }
    Ok(reader.rest().to_vec())
}

fn parse_identification(mut reader: Reader<'_>) -> Result<Identification, WireError> {
    let kind = reader.u8("Identification payload")?;
    reader.take(3, "Identification payload")?;
    Ok(Identification { kind, data: reader.rest().to_vec() })
}

fn parse_notify(mut reader: Reader<'_>) -> Result<Notify, WireError> {
    let protocol = Protocol(reader.u8("Notify payload")?);
    let at = reader.at();
    let length = usize::from(reader.u8("Notify payload")?);
    let kind = NotifyType(reader.u16("Notify payload")?);
    // §3.10: the protocol defines the size of its SPI; 0 where none is given.
    let possible = match protocol {
        Protocol::AH | Protocol::ESP => matches!(length, 0 | 4),
        Protocol::IKE => matches!(length, 0 | 8),
        _ => true,
    };
    if !possible {
        return Err(WireError::Length { what: "SPI of a Notify payload", at, length });
    }
    let spi = reader.take(length, "SPI of a Notify payload")?.to_vec();
    Ok(Notify { protocol, spi, kind, data: reader.rest().to_vec() })
}

fn parse_delete(mut reader: Reader<'_>) -> Result<Payload, WireError> {
    let protocol = Protocol(reader.u8("Delete payload")?);
    let at = reader.at();
    let size = usize::from(reader.u8("Delete payload")?);
    let count = usize::from(reader.u16("Delete payload")?);
    // §3.11: 0 for IKE, whose SPI is in the header; 4 for AH and ESP.
    let expected = if protocol == Protocol::IKE { 0 } else { 4 };
    if size != expected {
        return Err(WireError::Length { what: "SPI of a Delete payload", at, length: size });
    }
    if Some(reader.len()) != size.checked_mul(count) {
        return Err(WireError::Length { what: "SPIs of a Delete payload", at, length: count });
    }
    let mut spis = Vec::with_capacity(reader.len() / 4);
    while !reader.is_empty() {
        spis.push(reader.u32("Delete payload")?);
    }
    Ok(Payload::Delete { protocol, spis })
}

fn parse_selectors(mut reader: Reader<'_>) -> Result<Vec<WireSelector>, WireError> {
    let at = reader.at();
    let count = usize::from(reader.u8("Traffic Selector payload")?);
    reader.take(3, "Traffic Selector payload")?;
    if count == 0 {
        return Err(WireError::Malformed { what: "Traffic Selector payload", at, reason: "no selectors" });
    }
    let mut selectors = Vec::new();
    for _ in 0..count {
        selectors.push(parse_selector(&mut reader)?);
    }
    if !reader.is_empty() {
        return Err(WireError::Length {
            what: "octets after the last traffic selector",
            at: reader.at(),
            length: reader.len(),
        });
    }
    Ok(selectors)
}

fn parse_selector(reader: &mut Reader<'_>) -> Result<WireSelector, WireError> {
    let at = reader.at();
    let kind = reader.u8("traffic selector")?;
    let protocol = reader.u8("traffic selector")?;
    let mut body = reader.part(2, "traffic selector")?;
    let address_length = match kind {
        TS_IPV4_ADDR_RANGE => 4,
        TS_IPV6_ADDR_RANGE => 16,
        _ => return Ok(WireSelector::Unknown { kind, data: body.rest().to_vec() }),
    };
    if body.len() != 4 + 2 * address_length {
        return Err(WireError::Length { what: "traffic selector", at, length: body.len() });
    }
    let start_port = body.u16("traffic selector")?;
    let end_port = body.u16("traffic selector")?;
    let mut address = || -> Result<IpAddr, WireError> {
        Ok(if kind == TS_IPV4_ADDR_RANGE {
            IpAddr::V4(Ipv4Addr::from_bits(body.u32("traffic selector")?))
        } else {
            IpAddr::V6(Ipv6Addr::from_bits(body.u128("traffic selector")?))
        })
    };
    let (start, end) = (address()?, address()?);
    if start > end {
        return Err(WireError::Malformed { what: "traffic selector", at, reason: "addresses end before they start" });
    }
    // OPAQUE is 65535 to 0 (§3.13.1).
    if start_port > end_port && (start_port, end_port) != (u16::MAX, 0) {
        return Err(WireError::Malformed { what: "traffic selector", at, reason: "ports end before they start" });
    }
    Ok(WireSelector::Address(TrafficSelector { protocol, start_port, end_port, start, end }))
}

/// Encodes a payload chain; gives the first payload's type with it. `None` when a length does not fit.
pub(super) fn encode_chain(payloads: &[Payload]) -> Option<(u8, Vec<u8>)> {
    let mut out = Vec::new();
    let mut following = payloads.iter().skip(1);
    for payload in payloads {
        let next = following.next().map_or(NO_NEXT_PAYLOAD, kind_of);
        let critical = matches!(payload, Payload::Unknown { critical: true, .. });
        out.extend_from_slice(&[next, if critical { CRITICAL } else { 0 }]);
        length_prefixed(&mut out, 2, |out| encode_body(payload, out))?;
    }
    Some((payloads.first().map_or(NO_NEXT_PAYLOAD, kind_of), out))
}

/// Writes a 16-bit length over `before` octets already written, itself, and what `body` writes.
pub(super) fn length_prefixed(
    out: &mut Vec<u8>,
    before: usize,
    body: impl FnOnce(&mut Vec<u8>) -> Option<()>,
) -> Option<()> {
    let at = out.len();
    out.extend_from_slice(&[0, 0]);
    body(out)?;
    let length = out.len().checked_sub(at)?.checked_add(before)?;
    out.get_mut(at..)?.first_chunk_mut::<2>()?.copy_from_slice(&u16::try_from(length).ok()?.to_be_bytes());
    Some(())
}

fn kind_of(payload: &Payload) -> u8 {
    match payload {
        Payload::Sa(_) => SECURITY_ASSOCIATION,
        Payload::Ke { .. } => KEY_EXCHANGE,
        Payload::IdInitiator(_) => ID_INITIATOR,
        Payload::IdResponder(_) => ID_RESPONDER,
        Payload::Cert { .. } => CERTIFICATE,
        Payload::CertReq { .. } => CERTIFICATE_REQUEST,
        Payload::Auth { .. } => AUTHENTICATION,
        Payload::Nonce(_) => NONCE,
        Payload::Notify(_) => NOTIFY,
        Payload::Delete { .. } => DELETE,
        Payload::Vendor(_) => VENDOR_ID,
        Payload::TsInitiator(_) => TS_INITIATOR,
        Payload::TsResponder(_) => TS_RESPONDER,
        Payload::Configuration(_) => CONFIGURATION,
        Payload::Eap(_) => EAP,
        Payload::PuzzleSolution(_) => PUZZLE_SOLUTION,
        Payload::Unknown { kind, .. } => *kind,
    }
}

fn encode_body(payload: &Payload, out: &mut Vec<u8>) -> Option<()> {
    match payload {
        Payload::Sa(proposals) => security_association::encode(proposals, out)?,
        Payload::Ke { group, data } => {
            out.extend_from_slice(&group.0.to_be_bytes());
            out.extend_from_slice(&[0, 0]);
            out.extend_from_slice(data);
        }
        Payload::IdInitiator(id) | Payload::IdResponder(id) => out.extend_from_slice(&id.body()),
        Payload::Cert { encoding, data } | Payload::CertReq { encoding, authorities: data } => {
            out.push(*encoding);
            out.extend_from_slice(data);
        }
        Payload::Auth { method, data } => {
            out.extend_from_slice(&[*method, 0, 0, 0]);
            out.extend_from_slice(data);
        }
        Payload::Notify(notify) => {
            out.extend_from_slice(&[notify.protocol.0, u8::try_from(notify.spi.len()).ok()?]);
            out.extend_from_slice(&notify.kind.0.to_be_bytes());
            out.extend_from_slice(&notify.spi);
            out.extend_from_slice(&notify.data);
        }
        Payload::Delete { protocol, spis } => {
            let size = if *protocol == Protocol::IKE { 0 } else { 4 };
            if size == 0 && !spis.is_empty() {
                return None;
            }
            out.extend_from_slice(&[protocol.0, size]);
            out.extend_from_slice(&u16::try_from(spis.len()).ok()?.to_be_bytes());
            out.extend(spis.iter().flat_map(|spi| spi.to_be_bytes()));
        }
        Payload::TsInitiator(selectors) | Payload::TsResponder(selectors) => {
            out.extend_from_slice(&[u8::try_from(selectors.len()).ok()?, 0, 0, 0]);
            for selector in selectors {
                encode_selector(selector, out)?;
            }
        }
        Payload::Configuration(body) => configuration::encode(body, out)?,
        Payload::Nonce(data)
        | Payload::Vendor(data)
        | Payload::Eap(data)
        | Payload::PuzzleSolution(data)
        | Payload::Unknown { data, .. } => out.extend_from_slice(data),
    }
    Some(())
}

fn encode_selector(selector: &WireSelector, out: &mut Vec<u8>) -> Option<()> {
    match selector {
        WireSelector::Address(selector) => {
            let kind = match (selector.start, selector.end) {
                (IpAddr::V4(_), IpAddr::V4(_)) => TS_IPV4_ADDR_RANGE,
                (IpAddr::V6(_), IpAddr::V6(_)) => TS_IPV6_ADDR_RANGE,
                _ => return None,
            };
            out.extend_from_slice(&[kind, selector.protocol]);
            length_prefixed(out, 2, |out| {
                out.extend_from_slice(&selector.start_port.to_be_bytes());
                out.extend_from_slice(&selector.end_port.to_be_bytes());
                for address in [selector.start, selector.end] {
                    match address {
                        IpAddr::V4(address) => out.extend_from_slice(&address.octets()),
                        IpAddr::V6(address) => out.extend_from_slice(&address.octets()),
                    }
                }
                Some(())
            })
        }
        WireSelector::Unknown { kind, data } => {
            out.extend_from_slice(&[*kind, 0]);
            length_prefixed(out, 2, |out| {
                out.extend_from_slice(data);
                Some(())
            })
        }
    }
}
