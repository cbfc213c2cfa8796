//! Anti-replay window (RFC 4303 §3.4.3), as a ring of words (RFC 6479), with extended sequence numbers (RFC 4303
//! Appendix A).
//!
//! Use: [`ReplayWindow::check`] before the integrity check, which also gives the full sequence number that the
//! check needs; [`ReplayWindow::accept`] after it, and only then does the window change. `accept` looks again,
//! since another thread may have accepted the same number meanwhile.

/// The number was seen already, lies left of the window, or cannot exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("replayed or too old")]
pub struct Replayed;

/// What [`ReplayWindow::accept`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Freshness {
    /// Higher than every number before it: the sender's latest word.
    Newest,
    /// New, but overtaken on the way.
    Late,
}

/// The window of one inbound SA.
#[derive(Clone, Debug)]
pub struct ReplayWindow {
    /// Bit `n % 64` of word `n / 64 % words` says that `n` was seen. The number of words is a power of two and one
    /// word more than the window needs, so that a word is cleared before it comes into use again.
    ring: Box<[u64]>,
    /// Window size in packets; 0 switches the check off.
    size: u64,
    /// Highest authenticated number; 0 before the first.
    highest: u64,
    extended: bool,
}

impl ReplayWindow {
    /// Largest window in packets; larger wishes are cut down to it, which bounds memory.
    pub const MAX: u32 = 1 << 16;

    /// A window of `size` packets; 0 accepts everything (RFC 4303 §3.4.3 leaves the check to the receiver).
    pub fn new(size: u32, extended: bool) -> Self {
        let size = size.min(Self::MAX);
        let words = if size == 0 { 0 } else { (size.div_ceil(WORD_BITS) + 1).next_power_of_two() };
        let ring = vec![0; usize::try_from(words).unwrap_or(0)].into_boxed_slice();
        Self { ring, size: u64::from(size), highest: 0, extended }
    }

    /// The highest authenticated sequence number so far; 0 before the first.
    pub fn highest(&self) -> u64 {
        self.highest
    }

    /// Says which 64-bit number a packet with these lower 32 bits must have, if it may be new.
    pub fn check(&self, low: u32) -> Result<u64, Replayed> {
        let sequence = if self.extended { self.reconstruct(low)? } else { u64::from(low) };
        self.look(sequence)?;
        Ok(sequence)
    }

    /// Marks an authenticated number as seen.
    pub fn accept(&mut self, sequence: u64) -> Result<Freshness, Replayed> {
        self.look(sequence)?;
        let freshness = if sequence > self.highest { Freshness::Newest } else { Freshness::Late };
        if freshness == Freshness::Newest {
            let (old, new) = (self.highest / BITS, sequence / BITS);
            // A leap over the whole ring clears each word once.
            for word in (old + 1..=new).take(self.ring.len()) {
                if let Some(word) = self.word(word) {
                    *word = 0;
                }
            }
            self.highest = sequence;
        }
        if let Some(word) = self.word(sequence / BITS) {
            *word |= 1 << (sequence % BITS);
        }
        Ok(freshness)
    }

    fn look(&self, sequence: u64) -> Result<(), Replayed> {
        if self.size == 0 {
            return Ok(());
        }
        // The first packet has number 1 (RFC 4303 §3.3.3).
        if sequence == 0 {
            return Err(Replayed);
        }
        if sequence > self.highest {
            return Ok(());
        }
        if self.highest - sequence >= self.size {
            return Err(Replayed);
        }
        let index = self.index(sequence / BITS);
        let seen = self.ring.get(index).is_none_or(|word| word & (1 << (sequence % BITS)) != 0);
        if seen { Err(Replayed) } else { Ok(()) }
    }

    /// RFC 4303 Appendix A2.1: the high half is what puts the number into the window or to the right of it.
    fn reconstruct(&self, low: u32) -> Result<u64, Replayed> {
        // Without a window the nearest number is the best guess.
        let size = if self.size == 0 { 1 << 31 } else { self.size };
        let top_high = self.highest >> 32;
        let top_low = self.highest & u64::from(u32::MAX);
        let low = u64::from(low);
        let high = if top_low >= size - 1 {
            // Case A: the window lies within one cycle of the low half.
            if low >= top_low + 1 - size { Some(top_high) } else { top_high.checked_add(1) }
        } else {
            // Case B: its left part lies in the cycle before.
            let bottom = top_low + (1 << 32) + 1 - size;
            if low >= bottom { top_high.checked_sub(1) } else { Some(top_high) }
        };
        high.filter(|high| *high <= u64::from(u32::MAX)).map(|high| high << 32 | low).ok_or(Replayed)
    }

    fn index(&self, word: u64) -> usize {
        let words = u64::try_from(self.ring.len()).unwrap_or(0);
        usize::try_from(word & words.wrapping_sub(1)).unwrap_or(0)
    }

    fn word(&mut self, word: u64) -> Option<&mut u64> {
        let index = self.index(word);
        self.ring.get_mut(index)
    }
}

const WORD_BITS: u32 = 64;
const BITS: u64 = WORD_BITS as u64;

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    // RFC 4303 §3.4.3
    #[test]
    fn a_number_is_accepted_once_and_not_left_of_the_window() {
        let mut window = ReplayWindow::new(64, false);
        assert_eq!(window.check(0), Err(Replayed));
        assert_eq!(window.accept(100), Ok(Freshness::Newest));
        assert_eq!(window.check(100), Err(Replayed));
        assert_eq!(window.accept(100), Err(Replayed));
        assert_eq!(window.check(36), Err(Replayed));
        assert_eq!(window.check(37), Ok(37));
        assert_eq!(window.accept(37), Ok(Freshness::Late));
        assert_eq!(window.check(37), Err(Replayed));
    }

    #[test]
    fn checking_changes_nothing() {
        let window = ReplayWindow::new(64, false);
        assert_eq!(window.check(u32::MAX), Ok(u64::from(u32::MAX)));
        assert_eq!(window.highest(), 0);
        assert_eq!(window.check(1), Ok(1));
    }

    #[test]
    fn a_window_of_zero_accepts_everything() {
        let mut window = ReplayWindow::new(0, false);
        for sequence in [5, 5, 1, 0, u64::from(u32::MAX), 7] {
            assert!(window.accept(sequence).is_ok());
        }
        assert_eq!(window.highest(), u64::from(u32::MAX));
    }

    #[test]
    fn a_wish_for_a_huge_window_is_cut_down() {
        let mut window = ReplayWindow::new(u32::MAX, false);
        window.accept(1 << 20).unwrap();
        assert_eq!(window.check((1 << 20) - ReplayWindow::MAX), Err(Replayed));
        assert_eq!(window.check((1 << 20) - ReplayWindow::MAX + 1), Ok((1 << 20) - u64::from(ReplayWindow::MAX) + 1));
    }

    // RFC 4303 Appendix A2.1
    #[test]
    fn the_high_half_follows_the_window_over_the_end_of_the_low_half() {
        let mut window = ReplayWindow::new(64, true);
        assert_eq!(window.check(u32::MAX), Err(Replayed), "there is no cycle before the first");
        window.accept(0xffff_fff0).unwrap();
        assert_eq!(window.check(0xffff_fff5), Ok(0xffff_fff5));
        assert_eq!(window.check(3), Ok(0x1_0000_0003));
        window.accept(0x1_0000_0003).unwrap();
        assert_eq!(window.check(0xffff_fff1), Ok(0xffff_fff1), "case B: left part in the cycle before");
        assert_eq!(window.check(0xffff_fff0), Err(Replayed));
        assert_eq!(window.check(0xffff_ff00), Ok(0x1_ffff_ff00), "too far left is taken for far right");
        assert_eq!(window.check(0), Ok(0x1_0000_0000));
    }

    #[test]
    fn the_last_cycle_has_no_successor() {
        let mut window = ReplayWindow::new(64, true);
        window.accept(u64::MAX - 5).unwrap();
        assert_eq!(window.check(3), Err(Replayed));
        assert_eq!(window.check(u32::MAX), Ok(u64::MAX));
    }

    proptest! {
        #[test]
        fn the_window_does_what_a_set_of_all_numbers_would(
            size in prop_oneof![1u32..200, Just(1024u32)],
            steps in proptest::collection::vec((any::<bool>(), 0u64..300, 0u32..40), 1..300),
            start in prop_oneof![Just(1u64), Just((1u64 << 32) - 100), Just((5u64 << 32) + 17)],
        ) {
            let mut window = ReplayWindow::new(size, true);
            window.accept(start).unwrap();
            let mut seen = HashSet::from([start]);
            let mut highest = start;
            for (forward, distance, stretch) in steps {
                // Sometimes leaps over the whole ring.
                let distance = if stretch == 0 { distance * 1000 } else { distance };
                let sequence = if forward { highest + distance } else { highest.saturating_sub(distance) };
                let fresh = sequence != 0
                    && !seen.contains(&sequence)
                    && (sequence > highest || highest - sequence < u64::from(size));
                let within = sequence > highest || highest - sequence < u64::from(size);
                if within && sequence != 0 {
                    let checked = window.check(u32::try_from(sequence & 0xffff_ffff).unwrap());
                    prop_assert_eq!(checked, if fresh { Ok(sequence) } else { Err(Replayed) });
                }
                let accepted = window.accept(sequence);
                prop_assert_eq!(accepted.is_ok(), fresh);
                if fresh {
                    prop_assert_eq!(accepted.unwrap() == Freshness::Newest, sequence > highest);
                    seen.insert(sequence);
                    highest = highest.max(sequence);
                }
                prop_assert_eq!(window.highest(), highest);
            }
        }
    }
}
