//! The Encrypted payload (RFC 7296 §3.14, RFC 5282) and its fragments (RFC 7383).
//!
//! Nothing of a closed message is believed, and nothing of it takes memory, before its integrity check.

use ipsec::crypto::Protection;

use super::payload::{self, length_prefixed};
use super::reader::Reader;
use super::{GENERIC_HEADER, HEADER, Header, MAX_MESSAGE, NO_NEXT_PAYLOAD, Payload, SK, SKF, WireError, encode_header};
use crate::Rng;

/// Most fragments of one message, ours and the peer's.
pub const MAX_FRAGMENTS: u16 = 255;

/// Octets of Fragment Number and Total Fragments.
const FRAGMENT_FIELDS: usize = 4;
/// Offset of the flags in the IKE header.
const FLAGS: usize = 19;
/// Octets of the Pad Length field.
const PAD_LENGTH: usize = 1;

/// A closed message: SK or SKF. Knows nothing of what is inside until it is opened.
#[derive(Clone, Debug)]
pub struct Protected {
    /// Header (not yet authenticated).
    pub header: Header,
    /// The whole message; shows to be long enough for everything up to the IV.
    datagram: Vec<u8>,
    /// Next Payload of the Encrypted payload: the first payload inside.
    first: u8,
    fragment: Option<Fragment>,
}

/// Which part of a message a fragment is: `1 <= number <= total <= MAX_FRAGMENTS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Fragment {
    number: u16,
    total: u16,
}

/// An opened body: authenticated, not yet parsed. Parsing is a second step because a message that is
/// authentic but malformed is answered with INVALID_SYNTAX, a forged one not at all (RFC 7296 §2.21).
#[derive(Debug)]
pub struct Opened {
    /// Header, now authenticated.
    pub header: Header,
    /// Type of the first payload inside.
    pub first: u8,
    /// The payload chain.
    pub body: Vec<u8>,
    /// What the header's flags and the Encrypted payload's reserved bits were, as received.
    outside: Outside,
}

/// Octets outside the encryption that parsing forgets, and that [`Opened::plain_octets`] needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Outside {
    flags: u8,
    reserved: u8,
}

impl Opened {
    /// The message as RFC 9242 §3.3.2 authenticates it, IntAuth_*A and IntAuth_*P: unfragmented, without IV,
    /// padding and ICV, the lengths as if there were none. The reserved bits are those of the (first) message
    /// as received.
    pub fn plain_octets(&self) -> Option<Vec<u8>> {
        plain(&self.header, Some(self.outside), self.first, &self.body)
    }
}

/// The same of a message of ours before it is sealed.
pub fn plain_octets(header: &Header, payloads: &[Payload]) -> Option<Vec<u8>> {
    let (first, body) = payload::encode_chain(payloads)?;
    plain(header, None, first, &body)
}

fn plain(header: &Header, outside: Option<Outside>, first: u8, body: &[u8]) -> Option<Vec<u8>> {
    let mut out = encode_header(header, SK, (HEADER + GENERIC_HEADER).checked_add(body.len())?)?;
    if let (Some(outside), Some(flags)) = (outside, out.get_mut(FLAGS)) {
        *flags = outside.flags;
    }
    out.extend_from_slice(&[first, outside.map_or(0, |outside| outside.reserved)]);
    length_prefixed(&mut out, 2, |out| {
        out.extend_from_slice(body);
        Some(())
    })?;
    Some(out)
}

/// What opening a closed message gave.
#[derive(Debug)]
pub enum OpenOutcome {
    /// The message is whole.
    Whole(Opened),
    /// A fragment was stored, or was there already; others are missing.
    Pending,
}

/// Why a closed message was not opened. Such a datagram changes no state and is not answered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// The integrity check failed.
    #[error("integrity check failed")]
    Integrity,
    /// Padding, fragment numbers or sizes are impossible, or limits are exceeded.
    #[error(transparent)]
    Wire(#[from] WireError),
}

/// Fragments of one message that is being received (RFC 7383 §2.6); each fragment is authenticated
/// before it takes memory. One for each message of a window; starting another message ID drops it.
#[derive(Debug, Default)]
pub struct Reassembly {
    pub(super) pending: Option<Box<Pending>>,
}

#[derive(Debug)]
pub(super) struct Pending {
    pub(super) header: Header,
    /// First payload's type, from fragment 1.
    first: u8,
    /// From fragment 1 too (RFC 9242 §3.3.2).
    outside: Outside,
    /// One for each fragment of the total.
    parts: Vec<Option<Vec<u8>>>,
    /// Octets in all parts, at most `MAX_MESSAGE`.
    octets: usize,
}

impl Reassembly {
    /// Of which message fragments are there.
    pub fn message_id(&self) -> Option<u32> {
        self.pending.as_ref().map(|pending| pending.header.message_id)
    }

    /// Octets that it takes while fragments are missing, places of those included; 0 when none is there.
    pub fn octets(&self) -> usize {
        let place = size_of::<Option<Vec<u8>>>();
        self.pending.as_ref().map_or(0, |pending| pending.octets.saturating_add(pending.parts.len() * place))
    }

    /// Forgets what was gathered.
    pub fn clear(&mut self) {
        self.pending = None;
    }

    /// Says before the integrity check what an unauthenticated fragment can be worth (RFC 7383 §2.6).
    fn admits(&self, header: &Header, fragment: Fragment) -> Result<Admission, WireError> {
        let Some(pending) = &self.pending else { return Ok(Admission::New) };
        if header.message_id > pending.header.message_id {
            return Ok(Admission::New);
        }
        if *header != pending.header {
            return Err(fragment_error("of another message than the one in progress"));
        }
        let total = usize::from(fragment.total);
        if total > pending.parts.len() {
            return Ok(Admission::New);
        }
        if total < pending.parts.len() {
            return Err(fragment_error("of an older, smaller set"));
        }
        match pending.parts.get(usize::from(fragment.number).saturating_sub(1)) {
            Some(Some(_)) => Ok(Admission::Duplicate),
            _ => Ok(Admission::Continues),
        }
    }

    /// Takes an authenticated fragment that was admitted.
    fn store(
        &mut self,
        admission: Admission,
        header: Header,
        first: u8,
        outside: Outside,
        fragment: Fragment,
        content: Vec<u8>,
    ) -> Result<OpenOutcome, WireError> {
        let mut pending = match (admission, self.pending.take()) {
            (Admission::Continues, Some(pending)) => pending,
            _ => {
                let parts = vec![None; usize::from(fragment.total)];
                Box::new(Pending { header, first: NO_NEXT_PAYLOAD, outside, parts, octets: 0 })
            }
        };
        // A peer that sends more than a message can hold has lost what it sent so far.
        pending.octets = pending.octets.saturating_add(content.len());
        if pending.octets > MAX_MESSAGE {
            return Err(WireError::Length { what: "reassembled message", at: HEADER, length: pending.octets });
        }
        if fragment.number == 1 {
            pending.first = first;
            pending.outside = outside;
        }
        if let Some(part) = pending.parts.get_mut(usize::from(fragment.number).saturating_sub(1)) {
            *part = Some(content);
        }
        if pending.parts.iter().any(Option::is_none) {
            self.pending = Some(pending);
            return Ok(OpenOutcome::Pending);
        }
        let body = pending.parts.into_iter().flatten().flatten().collect();
        Ok(OpenOutcome::Whole(Opened { header, first: pending.first, body, outside: pending.outside }))
    }
}

/// How a fragment relates to what is in progress.
#[derive(Clone, Copy)]
enum Admission {
    /// It starts a reassembly, in place of any before it.
    New,
    /// It belongs to the one in progress.
    Continues,
    /// It is there already.
    Duplicate,
}

fn fragment_error(reason: &'static str) -> WireError {
    WireError::Malformed { what: "fragment", at: HEADER + GENERIC_HEADER, reason }
}

impl Protected {
    /// Reads the outside of an Encrypted payload that follows the header at once.
    pub(super) fn parse(header: Header, fragmented: bool, datagram: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(datagram);
        reader.take(HEADER, "IKE header")?;
        let first = reader.u8("Encrypted payload")?;
        reader.u8("Encrypted payload")?;
        let mut body = reader.part(2, "Encrypted payload")?;
        if !reader.is_empty() {
            return Err(WireError::Length {
                what: "octets after the Encrypted payload",
                at: reader.at(),
                length: reader.len(),
            });
        }
        let fragment = if fragmented {
            let number = body.u16("Encrypted Fragment payload")?;
            let total = body.u16("Encrypted Fragment payload")?;
            // RFC 7383 §2.6
            if number == 0 || number > total {
                return Err(fragment_error("number is 0 or above the total"));
            }
            if total > MAX_FRAGMENTS {
                return Err(fragment_error("too many fragments"));
            }
            Some(Fragment { number, total })
        } else {
            None
        };
        Ok(Self { header, datagram: datagram.to_vec(), first, fragment })
    }

    /// Checks and decrypts. Fragments gather in `reassembly`, which changes only after the check.
    ///
    /// A fragment of an earlier message ID than the one in progress is an error, of a later one starts
    /// over; so does one of a larger total (RFC 7383 §2.6).
    pub fn open(self, protection: &Protection, reassembly: &mut Reassembly) -> Result<OpenOutcome, OpenError> {
        let admission = match self.fragment {
            Some(fragment) => reassembly.admits(&self.header, fragment)?,
            None => Admission::New,
        };
        if let Admission::Duplicate = admission {
            return Ok(OpenOutcome::Pending);
        }
        let content = self.decrypt(protection)?;
        match self.fragment {
            Some(fragment) => {
                let outside = self.outside();
                Ok(reassembly.store(admission, self.header, self.first, outside, fragment, content)?)
            }
            None => {
                if reassembly.pending.as_ref().is_some_and(|p| p.header.message_id <= self.header.message_id) {
                    reassembly.clear();
                }
                let outside = self.outside();
                Ok(OpenOutcome::Whole(Opened { header: self.header, first: self.first, body: content, outside }))
            }
        }
    }

    fn outside(&self) -> Outside {
        let octet = |at| self.datagram.get(at).copied().unwrap_or(0);
        Outside { flags: octet(FLAGS), reserved: octet(HEADER + 1) }
    }

    fn decrypt(&self, protection: &Protection) -> Result<Vec<u8>, OpenError> {
        let fields = if self.fragment.is_some() { FRAGMENT_FIELDS } else { 0 };
        let mut reader = Reader::new(&self.datagram);
        // The associated data end with the payload's header (RFC 5282 §5.1), its fragment fields included.
        let aad = reader.take(HEADER + GENERIC_HEADER + fields, "Encrypted payload")?;
        let iv = reader.take(protection.iv_len(), "IV")?;
        let (at, length) = (reader.at(), reader.len());
        let impossible = WireError::Length { what: "encrypted content", at, length };
        let text_len = length.checked_sub(protection.icv_len()).ok_or(impossible.clone())?;
        if text_len < PAD_LENGTH || text_len.checked_rem(protection.block_len()) != Some(0) {
            return Err(impossible.into());
        }
        let mut text = reader.take(text_len, "encrypted content")?.to_vec();
        protection.open(aad, &[], iv, &mut text, reader.rest()).map_err(|_| OpenError::Integrity)?;
        let pad = usize::from(text.pop().ok_or(impossible)?);
        let content_len = text.len().checked_sub(pad).ok_or(WireError::Length { what: "padding", at, length: pad })?;
        text.truncate(content_len);
        Ok(text)
    }

    /// True for a fragment (SKF) other than number 1: a retransmitted request is answered again only on
    /// its first fragment (RFC 7383 §2.6.1).
    pub fn is_later_fragment(&self) -> bool {
        self.fragment.is_some_and(|fragment| fragment.number > 1)
    }

    /// True for SKF: the peer fragments, so its path may need our answer fragmented too (RFC 7383 §2.5.1).
    pub fn is_fragment(&self) -> bool {
        self.fragment.is_some()
    }
}

/// Encodes and protects a message with an SK payload (RFC 7296 §3.14), or, where the result would be
/// longer than `max_length` octets, as SKF fragments (RFC 7383 §2.5) each within it (larger only where
/// more than [`MAX_FRAGMENTS`] would be needed). `max_length` of `None` never fragments.
///
/// The IV comes from `rng` for ciphers that need it unpredictable. For AEADs and counter mode it is made of
/// message ID, response flag, fragment number and total, so it is unique under the key (RFC 5282 §3.1) as long
/// as each message is sealed once: **never seal a header and message ID again with other payloads**; keep
/// the octets for retransmission. Another `max_length` gives other totals, so the same message may be
/// fragmented anew.
///
/// Empty when the message cannot be expressed (see [`super::encode`]) or the cipher fails.
pub fn seal(
    header: &Header,
    payloads: &[Payload],
    protection: &Protection,
    max_length: Option<usize>,
    rng: &mut dyn Rng,
) -> Vec<Vec<u8>> {
    payload::encode_chain(payloads)
        .and_then(|(first, body)| seal_body(header, first, &body, protection, max_length, rng))
        .unwrap_or_default()
}

fn seal_body(
    header: &Header,
    first: u8,
    body: &[u8],
    protection: &Protection,
    max_length: Option<usize>,
    rng: &mut dyn Rng,
) -> Option<Vec<Vec<u8>>> {
    let fixed = HEADER + GENERIC_HEADER + protection.iv_len() + protection.icv_len();
    let whole = fixed.checked_add(padded(body.len(), protection)?)?;
    let chunk = match max_length {
        Some(max_length) if whole > max_length => {
            chunk_len(max_length, fixed, protection).max(body.len().div_ceil(usize::from(MAX_FRAGMENTS)))
        }
        _ => body.len(),
    };
    if chunk >= body.len() {
        return Some(vec![seal_one(header, first, None, body, protection, rng)?]);
    }
    let chunks: Vec<&[u8]> = body.chunks(chunk).collect();
    let total = u16::try_from(chunks.len()).ok()?;
    (1..=total)
        .zip(chunks)
        .map(|(number, chunk)| {
            let first = if number == 1 { first } else { NO_NEXT_PAYLOAD };
            seal_one(header, first, Some(Fragment { number, total }), chunk, protection, rng)
        })
        .collect()
}

/// Octets of payload chain that a fragment of at most `max_length` octets carries; at least 1.
fn chunk_len(max_length: usize, fixed: usize, protection: &Protection) -> usize {
    let block = protection.block_len().max(1);
    let room = max_length.saturating_sub(fixed.saturating_add(FRAGMENT_FIELDS));
    (room / block * block).saturating_sub(PAD_LENGTH).max(1)
}

/// Octets of text for a content: with Pad Length, and no more padding than the block needs.
fn padded(content: usize, protection: &Protection) -> Option<usize> {
    content.checked_add(PAD_LENGTH)?.checked_next_multiple_of(protection.block_len())
}

fn seal_one(
    header: &Header,
    first: u8,
    fragment: Option<Fragment>,
    content: &[u8],
    protection: &Protection,
    rng: &mut dyn Rng,
) -> Option<Vec<u8>> {
    let fields = if fragment.is_some() { FRAGMENT_FIELDS } else { 0 };
    let text_len = padded(content.len(), protection)?;
    let pad = text_len.checked_sub(content.len())?.checked_sub(PAD_LENGTH)?;
    let length = (HEADER + GENERIC_HEADER + fields)
        .checked_add(protection.iv_len())?
        .checked_add(text_len)?
        .checked_add(protection.icv_len())?;
    let mut out = encode_header(header, if fragment.is_some() { SKF } else { SK }, length)?;

    out.extend_from_slice(&[first, 0]);
    length_prefixed(&mut out, 2, |out| {
        if let Some(fragment) = fragment {
            out.extend_from_slice(&fragment.number.to_be_bytes());
            out.extend_from_slice(&fragment.total.to_be_bytes());
        }
        out.extend_from_slice(&initialization_vector(header, fragment, protection, rng));
        out.extend_from_slice(content);
        out.resize(out.len().checked_add(pad)?, 0);
        out.push(u8::try_from(pad).ok()?);
        out.resize(length, 0);
        Some(())
    })?;

    let (aad, rest) = out.split_at_mut_checked(HEADER + GENERIC_HEADER + fields)?;
    let (iv, rest) = rest.split_at_mut_checked(protection.iv_len())?;
    let (text, icv) = rest.split_at_mut_checked(text_len)?;
    protection.seal(aad, &[], iv, text, icv).ok()?;
    Some(out)
}

/// See [`seal`] for why this never repeats. The 15 bits that the parts leave over are random: should a
/// caller seal twice what it may seal once, the nonce most likely still differs.
fn initialization_vector(
    header: &Header,
    fragment: Option<Fragment>,
    protection: &Protection,
    rng: &mut dyn Rng,
) -> Vec<u8> {
    let mut iv = vec![0; protection.iv_len()];
    rng.fill(&mut iv);
    if protection.needs_random_iv() {
        return iv;
    }
    let (number, total) = fragment.map_or((0, 0), |fragment| (fragment.number, fragment.total));
    let mut noise = [0; 2];
    rng.fill(&mut noise);
    let parts = u64::from(header.message_id) << 32
        | u64::from(u16::from_be_bytes(noise) >> 1) << 17
        | u64::from(header.response) << 16
        | u64::from(number) << 8
        | u64::from(total);
    // All ciphers here that count have an IV of 8 octets; in a longer one the rest stays random.
    for (octet, part) in iv.iter_mut().zip(parts.to_be_bytes()) {
        *octet = part;
    }
    iv
}
