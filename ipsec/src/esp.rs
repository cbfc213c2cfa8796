//! One ESP packet: sealing and opening (RFC 4303 §2, §3.3.2, §3.4.4).
//!
//! A packet here begins with the SPI; what carries it (IP, UDP, a stream) is not this module's business.

use crate::crypto::{CryptoError, Protection};

/// Octets of SPI and sequence number.
pub const HEADER_LEN: usize = 8;

/// Octets of Pad Length and Next Header.
pub const TRAILER_LEN: usize = 2;

/// Next Header of a dummy packet (RFC 4303 §2.6).
pub const NO_NEXT_HEADER: u8 = 59;

/// What stands in clear at the front of an ESP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Security Parameters Index.
    pub spi: u32,
    /// Lower 32 bits of the sequence number.
    pub sequence_low: u32,
}

impl Header {
    /// Reads the header; `None` when the packet is too short for one.
    pub fn read(packet: &[u8]) -> Option<Self> {
        let (spi, rest) = packet.split_first_chunk()?;
        let sequence = rest.first_chunk()?;
        Some(Self { spi: u32::from_be_bytes(*spi), sequence_low: u32::from_be_bytes(*sequence) })
    }
}

/// Why a packet was not opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// Shorter than header, IV, trailer and ICV, or not whole blocks.
    #[error("not an ESP packet")]
    Malformed,
    /// The integrity check failed; nothing else was looked at.
    #[error("integrity check failed")]
    Integrity,
    /// Authentic, but the padding is not 1, 2, 3… or is longer than the packet (RFC 4303 §2.4).
    #[error("wrong padding")]
    Padding,
}

/// Octets that the ciphertext's length is a multiple of: whole blocks and 32-bit words (RFC 4303 §2.4).
fn alignment(protection: &Protection) -> usize {
    protection.block_len().max(4)
}

/// Octets of the ESP packet that carries a payload of `payload_len` octets.
pub fn sealed_len(protection: &Protection, payload_len: usize) -> usize {
    let text = (payload_len + TRAILER_LEN).next_multiple_of(alignment(protection));
    HEADER_LEN + protection.iv_len() + text + protection.icv_len()
}

/// Octets of the longest payload whose ESP packet has at most `packet_len` octets; `None` when none fits.
pub fn longest_payload(protection: &Protection, packet_len: usize) -> Option<usize> {
    let text = packet_len.checked_sub(HEADER_LEN + protection.iv_len() + protection.icv_len())?;
    (text - text % alignment(protection)).checked_sub(TRAILER_LEN)
}

/// The sequence number as the integrity check sees it.
struct Authenticated {
    aad: [u8; 12],
    aad_len: usize,
    suffix: [u8; 4],
    suffix_len: usize,
}

impl Authenticated {
    fn new(protection: &Protection, spi: u32, sequence: u64, extended: bool) -> Self {
        let spi = spi.to_be_bytes();
        let [h0, h1, h2, h3, l0, l1, l2, l3] = sequence.to_be_bytes();
        let (high, low) = ([h0, h1, h2, h3], [l0, l1, l2, l3]);
        let mut aad = [0; 12];
        // RFC 4106 §5, RFC 7634 §2.1: combined modes see the whole number; others append the high half to the
        // text that they authenticate (RFC 4303 §2.2.1).
        let inside = extended && protection.is_combined_mode();
        let parts: [&[u8]; 3] = [&spi, if inside { &high } else { &[] }, &low];
        for (to, from) in aad.iter_mut().zip(parts.into_iter().flatten()) {
            *to = *from;
        }
        let aad_len = if inside { 12 } else { 8 };
        let suffix_len = if extended && !inside { 4 } else { 0 };
        Self { aad, aad_len, suffix: high, suffix_len }
    }

    fn aad(&self) -> &[u8] {
        self.aad.get(..self.aad_len).unwrap_or(&self.aad)
    }

    fn suffix(&self) -> &[u8] {
        self.suffix.get(..self.suffix_len).unwrap_or(&self.suffix)
    }
}

/// What an ESP packet carries.
#[derive(Clone, Copy, Debug)]
pub struct Payload<'a> {
    /// Its protocol.
    pub next_header: u8,
    /// It.
    pub octets: &'a [u8],
    /// Octets of traffic flow confidentiality padding behind it (RFC 4303 §2.7).
    pub tfc: usize,
}

impl Payload<'_> {
    fn len(&self) -> usize {
        self.octets.len() + self.tfc
    }
}

/// Seals `payload` into `out`, which is cleared first and keeps its capacity. `sequence` must never be used twice
/// with one key: it is the IV of counter-based ciphers (RFC 4106 §3.1, RFC 7634 §2).
pub fn seal(
    protection: &Protection,
    spi: u32,
    sequence: u64,
    extended: bool,
    payload: Payload<'_>,
    out: &mut Vec<u8>,
) -> Result<(), CryptoError> {
    let mut iv = [0; MAX_IV_LEN];
    let iv = iv.get_mut(..protection.iv_len()).ok_or(CryptoError::Unsupported)?;
    if protection.needs_random_iv() {
        aws_lc_rs::rand::fill(iv).map_err(|_| CryptoError::Unsupported)?;
    } else {
        for (to, from) in iv.iter_mut().zip(sequence.to_be_bytes()) {
            *to = from;
        }
    }
    seal_with_iv(protection, spi, sequence, extended, iv, payload, out)
}

fn seal_with_iv(
    protection: &Protection,
    spi: u32,
    sequence: u64,
    extended: bool,
    iv: &[u8],
    payload: Payload<'_>,
    out: &mut Vec<u8>,
) -> Result<(), CryptoError> {
    let authenticated = Authenticated::new(protection, spi, sequence, extended);
    let [_, _, _, _, low @ ..] = sequence.to_be_bytes();
    let text_len = (payload.len() + TRAILER_LEN).next_multiple_of(alignment(protection));
    let padding = u8::try_from(text_len - payload.len() - TRAILER_LEN).map_err(|_| CryptoError::Length)?;

    out.clear();
    out.reserve(sealed_len(protection, payload.len()));
    out.extend_from_slice(&spi.to_be_bytes());
    out.extend_from_slice(&low);
    out.extend_from_slice(iv);
    out.extend_from_slice(payload.octets);
    out.resize(out.len() + payload.tfc, 0);
    out.extend(1..=padding);
    out.extend_from_slice(&[padding, payload.next_header]);
    out.resize(out.len() + protection.icv_len(), 0);

    let text = out.get_mut(HEADER_LEN + iv.len()..).ok_or(CryptoError::Length)?;
    let (text, icv) = text.split_at_mut_checked(text_len).ok_or(CryptoError::Length)?;
    protection.seal(authenticated.aad(), authenticated.suffix(), iv, text, icv)
}

/// Checks and opens a packet in place; gives its Next Header and its payload without padding. `sequence` is the
/// full number as the replay window reconstructed it.
pub fn open<'a>(
    protection: &Protection,
    sequence: u64,
    extended: bool,
    packet: &'a mut [u8],
) -> Result<(u8, &'a mut [u8]), OpenError> {
    let header = Header::read(packet).ok_or(OpenError::Malformed)?;
    let (_, body) = packet.split_at_mut_checked(HEADER_LEN).ok_or(OpenError::Malformed)?;
    let (iv, body) = body.split_at_mut_checked(protection.iv_len()).ok_or(OpenError::Malformed)?;
    let text_len = body.len().checked_sub(protection.icv_len()).ok_or(OpenError::Malformed)?;
    let (text, icv) = body.split_at_mut_checked(text_len).ok_or(OpenError::Malformed)?;
    if text_len < TRAILER_LEN || !text_len.is_multiple_of(alignment(protection)) {
        return Err(OpenError::Malformed);
    }

    let authenticated = Authenticated::new(protection, header.spi, sequence, extended);
    protection.open(authenticated.aad(), authenticated.suffix(), iv, text, icv).map_err(|error| match error {
        CryptoError::Integrity => OpenError::Integrity,
        CryptoError::Unsupported | CryptoError::KeyLength | CryptoError::Length => OpenError::Malformed,
    })?;

    let (rest, [padding, next_header]) = text.split_last_chunk_mut().ok_or(OpenError::Malformed)?;
    let (padding, next_header) = (usize::from(*padding), *next_header);
    let payload_len = rest.len().checked_sub(padding).ok_or(OpenError::Padding)?;
    let (payload, padding) = rest.split_at_mut_checked(payload_len).ok_or(OpenError::Padding)?;
    if !padding.iter().copied().eq((1..=u8::MAX).take(padding.len())) {
        return Err(OpenError::Padding);
    }
    Ok((next_header, payload))
}

const MAX_IV_LEN: usize = 16;

#[cfg(test)]
mod tests;
