//! Windows (RFC 7296 §2.3): which of the peer's requests are new and what they were answered, how many of ours may be out,
//! and SET_WINDOW_SIZE, with which either side says how many it keeps.
//!
//! The peer's requests are handled one at a time, in the order in which they arrive: what crosses in a window is no other
//! matter than what crosses between the two sides.

use super::Established;
use super::fault::notify;
use super::parts::Parts;
use crate::wire::{ExchangeType, NotifyType, Payload};

/// Requests of the peer that may be out at once, as we say in IKE_AUTH: so many answers are kept.
pub(crate) const OURS: u8 = 4;
/// Requests of ours that are out at once, whatever the peer says beyond that.
pub(crate) const MOST: u8 = 8;

/// What a message ID says of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    New,
    /// Received, and being answered or waiting for that.
    Unanswered,
    /// Answered, and the answer is kept.
    Answered,
    /// Older than what is kept.
    Old,
    /// Ahead of the window.
    Beyond,
}

/// An answer, for repetitions of its request.
#[derive(Debug)]
struct Answer {
    message_id: u32,
    /// Digest of the datagram that completed the request.
    request: [u8; 32],
    datagrams: Vec<Vec<u8>>,
}

/// A request that has no answer yet.
#[derive(Clone, Copy, Debug)]
struct Unanswered {
    message_id: u32,
    exchange: ExchangeType,
    request: [u8; 32],
}

/// The peer's requests.
#[derive(Debug)]
pub(crate) struct Inbound {
    /// The lowest message ID that was not received.
    expected: u32,
    /// Bit `n`: `expected + n` was received. Bit 0 is never set.
    ahead: u8,
    /// 1 until the peer knows of more.
    size: u8,
    /// In order of arrival: the first is being answered.
    unanswered: Vec<Unanswered>,
    /// In order of answering.
    answered: Vec<Answer>,
}

impl Inbound {
    /// A window of one. `expected` is the first request's message ID.
    pub(crate) fn new(expected: u32) -> Self {
        Self { expected, ahead: 0, size: 1, unanswered: Vec::new(), answered: Vec::new() }
    }

    /// The peer is told of ours: it can only become larger.
    pub(crate) fn widen(&mut self) {
        self.size = OURS;
    }

    /// The message ID behind all that were received.
    pub(crate) fn next(&self) -> u32 {
        self.expected.saturating_add(u8::BITS - self.ahead.leading_zeros())
    }

    pub(crate) fn standing(&self, message_id: u32) -> Standing {
        if self.unanswered.iter().any(|request| request.message_id == message_id) {
            return Standing::Unanswered;
        }
        if self.answered.iter().any(|answer| answer.message_id == message_id) {
            return Standing::Answered;
        }
        let Some(ahead) = message_id.checked_sub(self.expected) else { return Standing::Old };
        let bit = u8::try_from(ahead).ok().and_then(|ahead| 1u8.checked_shl(ahead.into()));
        if bit.is_some_and(|bit| self.ahead & bit != 0) {
            return Standing::Old;
        }
        // The last message ID has none behind it (§2.2).
        let oldest = self.unanswered.iter().map(|request| request.message_id).fold(self.expected, u32::min);
        let within = message_id - oldest < u32::from(self.size);
        if within && message_id < u32::MAX { Standing::New } else { Standing::Beyond }
    }

    /// A new request is whole. Answers that the peer has shown to have are forgotten.
    pub(crate) fn received(&mut self, message_id: u32, exchange: ExchangeType, request: [u8; 32]) {
        let ahead = message_id.saturating_sub(self.expected);
        self.ahead |= u8::try_from(ahead).ok().and_then(|ahead| 1u8.checked_shl(ahead.into())).unwrap_or(0);
        while self.ahead & 1 != 0 {
            self.ahead >>= 1;
            self.expected = self.expected.saturating_add(1);
        }
        self.unanswered.push(Unanswered { message_id, exchange, request });
        // It may only ask when it has the answers to all that is further back than the window (§2.3).
        let size = u32::from(self.size);
        self.answered.retain(|answer| answer.message_id.saturating_add(size) > message_id);
    }

    /// The request that is being answered.
    pub(crate) fn current(&self) -> Option<(u32, ExchangeType)> {
        self.unanswered.first().map(|request| (request.message_id, request.exchange))
    }

    /// The request that is being answered has this answer.
    pub(crate) fn answer(&mut self, datagrams: Vec<Vec<u8>>) {
        if self.unanswered.is_empty() {
            return;
        }
        let Unanswered { message_id, request, .. } = self.unanswered.remove(0);
        self.answered.reserve_exact(1);
        self.answered.push(Answer { message_id, request, datagrams });
        if self.answered.len() > usize::from(self.size) {
            self.answered.remove(0);
        }
    }

    pub(crate) fn answer_to(&self, message_id: u32) -> Option<&[Vec<u8>]> {
        let answer = self.answered.iter().find(|answer| answer.message_id == message_id)?;
        Some(&answer.datagrams)
    }

    /// The last request's digest and our answer to it.
    pub(crate) fn last_words(&mut self) -> Option<([u8; 32], Vec<Vec<u8>>)> {
        self.answered.pop().map(|answer| (answer.request, answer.datagrams))
    }

    /// Gives back the room that requests took.
    pub(crate) fn rest(&mut self) {
        self.unanswered.shrink_to_fit();
    }

    /// Keeps the last answer alone: the peer has long given up waiting for the others.
    pub(crate) fn forget_old_answers(&mut self) {
        let old = self.answered.len().saturating_sub(1);
        self.answered.drain(..old);
        self.answered.shrink_to_fit();
        self.unanswered.shrink_to_fit();
    }

    #[cfg(test)]
    pub(crate) fn answers_kept(&self) -> usize {
        self.answered.len()
    }

    /// Goes on with another message ID, which is no lower (RFC 6311): what was answered before is forgotten.
    pub(crate) fn go_on_with(&mut self, expected: u32) {
        (self.expected, self.ahead) = (self.next().max(expected), 0);
        self.answered.clear();
    }
}

/// What we say about it.
pub(crate) fn announcement() -> Payload {
    notify(NotifyType::SET_WINDOW_SIZE, u32::from(OURS).to_be_bytes().to_vec())
}

impl Established {
    /// Says it anew after a rekey of the IKE SA, beside what is said anyway.
    pub(super) fn window_announcement(&mut self) -> Option<Payload> {
        if !std::mem::take(&mut self.announces_window) {
            return None;
        }
        self.channel.open_window();
        Some(announcement())
    }

    /// The peer says how many requests of ours it keeps; fewer than before means nothing.
    pub(crate) fn note_window(&mut self, parts: &Parts) {
        let Some(notify) = parts.notify(NotifyType::SET_WINDOW_SIZE) else { return };
        if let Ok(octets) = <[u8; 4]>::try_from(notify.data.as_slice()) {
            let size = u8::try_from(u32::from_be_bytes(octets)).unwrap_or(u8::MAX).min(MOST);
            self.channel.may_ask(size);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(window: &mut Inbound, message_id: u32) {
        assert_eq!(window.standing(message_id), Standing::New, "{message_id}");
        window.received(message_id, ExchangeType::INFORMATIONAL, [0; 32]);
        assert_eq!(window.standing(message_id), Standing::Unanswered);
    }

    fn answer(window: &mut Inbound) {
        let (message_id, _) = window.current().unwrap();
        window.answer(vec![message_id.to_be_bytes().to_vec()]);
        assert_eq!(window.answer_to(message_id).unwrap(), [message_id.to_be_bytes().to_vec()]);
    }

    // RFC 7296 §2.3: until it is announced, the window is one.
    #[test]
    fn the_window_is_one_at_first() {
        let mut window = Inbound::new(1);
        assert_eq!((window.standing(0), window.standing(2)), (Standing::Old, Standing::Beyond));
        take(&mut window, 1);
        assert_eq!(window.standing(2), Standing::Beyond, "not before the answer");
        answer(&mut window);
        assert_eq!(window.standing(1), Standing::Answered);
        take(&mut window, 2);
        assert_eq!(window.standing(1), Standing::Old, "the peer has the answer");
    }

    // RFC 7296 §2.3: any order inside the window, and nothing ahead of it.
    #[test]
    fn requests_pass_one_another_inside_the_window() {
        let mut window = Inbound::new(5);
        window.widen();
        for message_id in [8, 6, 5, 7] {
            assert_eq!(window.standing(9), Standing::Beyond);
            take(&mut window, message_id);
        }
        assert_eq!((window.next(), window.current().unwrap().0), (9, 8));
        assert_eq!(window.standing(9), Standing::Beyond, "four wait for their answers");
        for _ in 0..4 {
            answer(&mut window);
        }
        for message_id in 5..9 {
            assert_eq!(window.standing(message_id), Standing::Answered);
        }
        // 9 is asked when 5 is answered, so the answer to 5 has arrived.
        take(&mut window, 9);
        assert_eq!((window.standing(5), window.standing(6)), (Standing::Old, Standing::Answered));
        // As long as 10 is missing, nothing goes further than 13.
        answer(&mut window);
        for message_id in [11, 12, 13] {
            take(&mut window, message_id);
            answer(&mut window);
        }
        assert_eq!(window.standing(14), Standing::Beyond);
        take(&mut window, 10);
        answer(&mut window);
        assert_eq!(window.standing(14), Standing::New);
    }

    // RFC 7296 §2.2: message IDs do not wrap.
    #[test]
    fn the_last_message_id_is_never_taken() {
        let mut window = Inbound::new(u32::MAX - 1);
        window.widen();
        take(&mut window, u32::MAX - 1);
        answer(&mut window);
        assert_eq!(window.standing(u32::MAX), Standing::Beyond);
        assert_eq!(window.standing(0), Standing::Old);
    }

    #[test]
    fn old_answers_are_forgotten_in_time() {
        let mut window = Inbound::new(0);
        window.widen();
        for message_id in 0..4 {
            take(&mut window, message_id);
            answer(&mut window);
        }
        window.forget_old_answers();
        assert_eq!((window.standing(2), window.standing(3)), (Standing::Old, Standing::Answered));
        window.go_on_with(9);
        assert_eq!(
            (window.standing(3), window.standing(8), window.standing(9)),
            (Standing::Old, Standing::Old, Standing::New)
        );
    }
}
