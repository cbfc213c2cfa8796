//! A cursor over received octets: every read is checked and says where it failed.

use super::WireError;

/// What is left to read, and its offset in the message.
#[derive(Clone, Copy)]
pub(super) struct Reader<'a> {
    rest: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes, at: 0 }
    }

    /// Offset of the next octet in the message.
    pub(super) fn at(&self) -> usize {
        self.at
    }

    pub(super) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// How many octets are left.
    pub(super) fn len(&self) -> usize {
        self.rest.len()
    }

    /// All octets that are left.
    pub(super) fn rest(self) -> &'a [u8] {
        self.rest
    }

    /// The next `length` octets as a reader of their own.
    pub(super) fn split(&mut self, length: usize, what: &'static str) -> Result<Self, WireError> {
        let (head, rest) = self.rest.split_at_checked(length).ok_or(WireError::Truncated { what, at: self.at })?;
        let part = Self { rest: head, at: self.at };
        self.rest = rest;
        self.at = self.at.saturating_add(length);
        Ok(part)
    }

    pub(super) fn take(&mut self, length: usize, what: &'static str) -> Result<&'a [u8], WireError> {
        Ok(self.split(length, what)?.rest)
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], WireError> {
        let at = self.at;
        self.take(N, what)?.try_into().map_err(|_| WireError::Truncated { what, at })
    }

    pub(super) fn u8(&mut self, what: &'static str) -> Result<u8, WireError> {
        self.array(what).map(u8::from_be_bytes)
    }

    pub(super) fn u16(&mut self, what: &'static str) -> Result<u16, WireError> {
        self.array(what).map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self, what: &'static str) -> Result<u32, WireError> {
        self.array(what).map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self, what: &'static str) -> Result<u64, WireError> {
        self.array(what).map(u64::from_be_bytes)
    }

    pub(super) fn u128(&mut self, what: &'static str) -> Result<u128, WireError> {
        self.array(what).map(u128::from_be_bytes)
    }

    /// Reads a 16-bit length that counts `before` octets already read and itself, and gives what it
    /// covers after itself.
    pub(super) fn part(&mut self, before: usize, what: &'static str) -> Result<Self, WireError> {
        let at = self.at;
        let length = usize::from(self.u16(what)?);
        let Some(rest) = length.checked_sub(before.saturating_add(2)) else {
            return Err(WireError::Length { what, at, length });
        };
        if rest > self.len() {
            return Err(WireError::Length { what, at, length });
        }
        self.split(rest, what)
    }
}
