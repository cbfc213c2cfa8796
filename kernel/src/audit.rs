//! What ESP packets are dropped for, in the log (RFC 4303 §4): for each reason one packet now and then with what names it,
//! and how many there were besides. Anybody can send us any number of them.

use std::net::IpAddr;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use ipsec::datapath::DropReason;
use ipsec::plane::Encapsulation;

use crate::network::lock;

/// The log's memory.
#[derive(Default)]
pub(crate) struct Audit {
    /// By reason, in the order of [`DropReason::ALL`].
    reasons: Mutex<[Entry; DropReason::ALL.len()]>,
}

#[derive(Clone, Copy, Default)]
struct Entry {
    logged_at: Option<Instant>,
    /// Since then.
    others: u64,
}

impl Audit {
    /// An ESP packet (SPI first) that came `from` there was dropped.
    pub(crate) fn inbound(&self, now: Instant, from: &Encapsulation, packet: &[u8], reason: DropReason) {
        let event = match reason {
            DropReason::UnknownSpi => "no SA",
            DropReason::Replay => "seen before or too old",
            DropReason::Integrity => "integrity check failed",
            DropReason::Selectors => "not what its SA is for",
            DropReason::Malformed => "malformed",
            DropReason::Expired => "its SA has come to its end",
            DropReason::Ecn => "congestion marked where that cannot be told",
            // The latch's holder is told; a dummy is none; others do not come in.
            DropReason::Latch | DropReason::Dummy | DropReason::NoPolicy | DropReason::NoSa | DropReason::TooBig => {
                return;
            }
        };
        let Some(others) = self.due(now, reason) else { return };
        let (local, remote): (IpAddr, IpAddr) = (from.local(), from.remote());
        let number = |at: usize| packet.get(at..)?.first_chunk().map(|octets| u32::from_be_bytes(*octets));
        let (spi, sequence) = (number(0).unwrap_or_default(), number(4).unwrap_or_default());
        tracing::info!(spi = format_args!("{spi:08x}"), sequence, %remote, %local, others, "ESP packet dropped: {event}");
    }

    /// Whether a packet is to be logged, and how many were not since the last.
    fn due(&self, now: Instant, reason: DropReason) -> Option<u64> {
        let mut reasons = lock(&self.reasons);
        let at = DropReason::ALL.iter().position(|one| *one == reason)?;
        let entry = reasons.get_mut(at)?;
        if entry.logged_at.is_some_and(|at| now.saturating_duration_since(at) < EVERY) {
            entry.others += 1;
            return None;
        }
        let others = std::mem::take(&mut entry.others);
        entry.logged_at = Some(now);
        Some(others)
    }
}

/// For each reason.
const EVERY: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    // RFC 4303 §4
    #[test]
    fn each_reason_is_logged_once_in_a_while_with_how_many_there_were() {
        let audit = Audit::default();
        let now = Instant::now();
        assert_eq!(audit.due(now, DropReason::Replay), Some(0));
        for _ in 0..1000 {
            assert_eq!(audit.due(now + EVERY / 2, DropReason::Replay), None);
        }
        assert_eq!(audit.due(now + EVERY / 2, DropReason::Integrity), Some(0), "another reason");
        assert_eq!(audit.due(now + EVERY, DropReason::Replay), Some(1000));
        assert_eq!(audit.due(now + 2 * EVERY, DropReason::Replay), Some(0));
    }
}
