//! The Security Association payload: proposals, transforms, attributes (RFC 7296 §3.3).

use ipsec::transform::{Proposal, Protocol, Transform, TransformType};

use super::WireError;
use super::payload::length_prefixed;
use super::reader::Reader;

/// Most transforms in one proposal: what its count can say.
const MAX_TRANSFORMS: usize = 255;
/// Attribute format bit: the value is the second half of the attribute itself (§3.3.5).
const ATTRIBUTE_FORMAT: u16 = 0x8000;
/// The Key Length attribute.
const KEY_LENGTH: u16 = 14;

/// Reads the proposals. The Last Substruc octets are not believed: lengths delimit.
pub(super) fn parse(mut reader: Reader<'_>) -> Result<Vec<Proposal>, WireError> {
    if reader.is_empty() {
        return Err(WireError::Length { what: "Security Association payload", at: reader.at(), length: 0 });
    }
    let mut proposals: Vec<Proposal> = Vec::new();
    while !reader.is_empty() {
        reader.take(2, "proposal")?;
        let at = reader.at();
        let proposal = parse_proposal(reader.part(2, "proposal")?)?;
        // The first is 1 in an offer and the chosen number in an answer; later ones count up (§3.3.1).
        let in_order = match proposals.last() {
            None => proposal.number != 0,
            Some(previous) => previous.number.checked_add(1) == Some(proposal.number),
        };
        if !in_order {
            return Err(WireError::Malformed { what: "proposal number", at, reason: "out of order" });
        }
        proposals.push(proposal);
    }
    Ok(proposals)
}

fn parse_proposal(mut reader: Reader<'_>) -> Result<Proposal, WireError> {
    let number = reader.u8("proposal")?;
    let protocol = Protocol(reader.u8("proposal")?);
    let spi_size = usize::from(reader.u8("proposal")?);
    let count = usize::from(reader.u8("proposal")?);
    let spi = reader.take(spi_size, "SPI of a proposal")?.to_vec();
    let mut transforms = Vec::new();
    while !reader.is_empty() {
        reader.take(2, "transform")?;
        let at = reader.at();
        transforms.push(parse_transform(reader.part(2, "transform")?)?);
        if transforms.len() > count {
            return Err(WireError::Malformed { what: "proposal", at, reason: "more transforms than it counts" });
        }
    }
    if transforms.len() != count {
        let at = reader.at();
        return Err(WireError::Malformed { what: "proposal", at, reason: "fewer transforms than it counts" });
    }
    Ok(Proposal { number, protocol, spi, transforms })
}

fn parse_transform(mut reader: Reader<'_>) -> Result<Transform, WireError> {
    let kind = TransformType(reader.u8("transform")?);
    reader.u8("transform")?;
    let mut transform = Transform::new(kind, reader.u16("transform")?);
    while !reader.is_empty() {
        let kind = reader.u16("transform attribute")?;
        let value = reader.u16("transform attribute")?;
        if kind == ATTRIBUTE_FORMAT | KEY_LENGTH && transform.key_bits.is_none() {
            transform.key_bits = Some(value);
            continue;
        }
        // Also a Key Length that is repeated, or of the long form, which it never has (§3.3.5).
        transform.unknown_attribute = true;
        if kind & ATTRIBUTE_FORMAT == 0 {
            reader.take(usize::from(value), "transform attribute")?;
        }
    }
    Ok(transform)
}

/// Writes the proposals; `None` when one is longer than its length fields can say. Attributes that we
/// do not know are not written: such a transform is never ours.
pub(super) fn encode(proposals: &[Proposal], out: &mut Vec<u8>) -> Option<()> {
    for (index, proposal) in proposals.iter().enumerate() {
        let more = index.saturating_add(1) < proposals.len();
        if proposal.transforms.len() > MAX_TRANSFORMS {
            return None;
        }
        out.extend_from_slice(&[if more { 2 } else { 0 }, 0]);
        length_prefixed(out, 2, |out| {
            out.extend_from_slice(&[
                proposal.number,
                proposal.protocol.0,
                u8::try_from(proposal.spi.len()).ok()?,
                u8::try_from(proposal.transforms.len()).ok()?,
            ]);
            out.extend_from_slice(&proposal.spi);
            for (index, transform) in proposal.transforms.iter().enumerate() {
                let more = index.saturating_add(1) < proposal.transforms.len();
                out.extend_from_slice(&[if more { 3 } else { 0 }, 0]);
                length_prefixed(out, 2, |out| encode_transform(transform, out))?;
            }
            Some(())
        })?;
    }
    Some(())
}

fn encode_transform(transform: &Transform, out: &mut Vec<u8>) -> Option<()> {
    out.extend_from_slice(&[transform.kind.0, 0]);
    out.extend_from_slice(&transform.id.to_be_bytes());
    if let Some(bits) = transform.key_bits {
        out.extend_from_slice(&(ATTRIBUTE_FORMAT | KEY_LENGTH).to_be_bytes());
        out.extend_from_slice(&bits.to_be_bytes());
    }
    Some(())
}
