//! Stream prefix and framing (RFC 9329 §3, §4, §6.6), sans-IO.
//!
//! Invariant: a [`Deframer`] that gave `None` holds less than one frame, so what a peer can make it keep is
//! bounded by [`MAX_MESSAGE`] and by how much the caller reads at once.

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// The stream prefix, "IKETCP" (RFC 9329 §4).
pub const PREFIX: [u8; 6] = *b"IKETCP";

/// Longest message in a frame, octets (RFC 9329 §3).
pub const MAX_MESSAGE: usize = 65_533;

/// Four zero octets before an IKE message, where an ESP packet has its SPI (RFC 9329 §3.1).
pub const NON_ESP_MARKER: [u8; 4] = [0; 4];

/// Runts tolerated between two messages (our choice; RFC 9329 §6.1 speaks of "too many").
pub const MAX_RUNTS: u8 = 4;

/// One message from a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// An IKE message, non-ESP marker removed (§3.1).
    Ike(BytesMut),
    /// An ESP packet, SPI first (§3.2).
    Esp(BytesMut),
}

/// Why a stream is unusable and must be closed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The stream does not begin with the prefix (§4, §6.1).
    #[error("the stream does not begin with \"IKETCP\"")]
    Prefix,
    /// Length 0 or 1 (§3.1, §3.2).
    #[error("frame length {0} is impossible")]
    Length(u16),
    /// Too many messages that are too short to be IKE or ESP (§6.1).
    #[error("too many messages that are too short to be IKE or ESP")]
    Runts,
}

/// Splits a stream into messages. Bounded: holds at most one partial frame.
///
/// Read into [`Self::buffer`], then call [`Self::next_frame`] until it gives `None`, then read again.
#[derive(Debug)]
pub struct Deframer {
    buffer: BytesMut,
    state: State,
    runts: u8,
    completed: u64,
}

#[derive(Clone, Debug)]
enum State {
    Prefix,
    Messages,
    Dead(FrameError),
}

impl Deframer {
    /// For a TCP Responder: the prefix comes first.
    pub fn expecting_prefix() -> Self {
        Self::new(State::Prefix)
    }

    /// For a TCP Originator: the peer sends no prefix.
    pub fn without_prefix() -> Self {
        Self::new(State::Messages)
    }

    fn new(state: State) -> Self {
        Self { buffer: BytesMut::new(), state, runts: 0, completed: 0 }
    }

    /// Where to read into.
    pub fn buffer(&mut self) -> &mut BytesMut {
        &mut self.buffer
    }

    /// Consumes the prefix; true once it was whole and right. A wrong prefix is told by its first wrong octet; what came
    /// stays in the buffer, for whom it may be meant for.
    pub fn accept_prefix(&mut self) -> Result<bool, FrameError> {
        match &self.state {
            State::Messages => return Ok(true),
            State::Dead(error) => return Err(error.clone()),
            State::Prefix => {}
        }
        if self.buffer.iter().zip(&PREFIX).any(|(got, expected)| got != expected) {
            self.state = State::Dead(FrameError::Prefix);
            return Err(FrameError::Prefix);
        }
        if self.buffer.len() < PREFIX.len() {
            return Ok(false);
        }
        self.buffer.advance(PREFIX.len());
        self.state = State::Messages;
        Ok(true)
    }

    /// The next whole message; `None` when more octets are needed. Empty messages and keepalives are
    /// swallowed (§3, §6.6), and so are up to [`MAX_RUNTS`] runts: messages too short for an SPI, and a
    /// non-ESP marker with nothing behind it. After an error the stream is dead.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        if !self.accept_prefix()? {
            return Ok(None);
        }
        loop {
            let Some(&length) = self.buffer.first_chunk::<2>() else { return Ok(None) };
            let length = u16::from_be_bytes(length);
            if length < 2 {
                return Err(self.die(FrameError::Length(length)));
            }
            if self.buffer.len() < usize::from(length) {
                return Ok(None);
            }
            let mut message = self.buffer.split_to(usize::from(length));
            message.advance(2);
            self.completed = self.completed.wrapping_add(1);

            match message.as_ref() {
                // RFC 9329 §3: an empty message is ignored. §6.6: so is a NAT-keepalive.
                [] | [0xff] => {}
                [0, 0, 0, 0] | [_] | [_, _] | [_, _, _] => {
                    self.runts = self.runts.saturating_add(1);
                    if self.runts > MAX_RUNTS {
                        return Err(self.die(FrameError::Runts));
                    }
                }
                [0, 0, 0, 0, ..] => {
                    self.runts = 0;
                    message.advance(NON_ESP_MARKER.len());
                    return Ok(Some(Frame::Ike(message)));
                }
                [..] => {
                    self.runts = 0;
                    return Ok(Some(Frame::Esp(message)));
                }
            }
        }
    }

    /// Whether a frame has begun and is not complete. Meaningful after [`Self::next_frame`] gave `None`.
    pub fn is_partial(&self) -> bool {
        !self.buffer.is_empty()
    }

    /// Frames completed so far, swallowed ones included: tells progress from octets that only trickle in.
    pub fn completed(&self) -> u64 {
        self.completed
    }

    fn die(&mut self, error: FrameError) -> FrameError {
        self.state = State::Dead(error.clone());
        self.buffer = BytesMut::new();
        error
    }
}

/// Frames an IKE message: length, non-ESP marker, message. `None` when it is empty or too long.
pub fn frame_ike(message: &[u8]) -> Option<Bytes> {
    let mut out = BytesMut::new();
    append_ike(&mut out, message).then(|| out.freeze())
}

/// Frames an ESP packet, SPI first: length, packet. `None` when it is too short or too long for a frame, or
/// when its SPI is 0, which the peer would take for an IKE message (RFC 9329 §3.2).
pub fn frame_esp(packet: &[u8]) -> Option<Bytes> {
    let mut out = BytesMut::new();
    append_esp(&mut out, packet).then(|| out.freeze())
}

/// Appends what [`frame_ike`] makes; false and nothing appended where that gives `None`.
pub fn append_ike(out: &mut BytesMut, message: &[u8]) -> bool {
    let Some(length) = frame_length(message.len() + NON_ESP_MARKER.len()) else { return false };
    if message.is_empty() {
        return false;
    }
    out.reserve(usize::from(length));
    out.put_u16(length);
    out.put_slice(&NON_ESP_MARKER);
    out.put_slice(message);
    true
}

/// Appends what [`frame_esp`] makes; false and nothing appended where that gives `None`.
pub fn append_esp(out: &mut BytesMut, packet: &[u8]) -> bool {
    let Some(length) = esp_length(packet) else { return false };
    out.reserve(usize::from(length));
    out.put_u16(length);
    out.put_slice(packet);
    true
}

/// The Length field before an ESP packet; `None` where [`frame_esp`] gives that.
fn esp_length(packet: &[u8]) -> Option<u16> {
    frame_length(packet.len()).filter(|_| packet.first_chunk::<4>().is_some_and(|spi| *spi != NON_ESP_MARKER))
}

/// The Length field for a message, which counts itself (RFC 9329 §3).
fn frame_length(message: usize) -> Option<u16> {
    u16::try_from(message.checked_add(2)?).ok()
}

#[cfg(test)]
mod tests;
