//! What the messages of a stream so far say of it (RFC 9329 §6.1).

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use tokio::time::Instant;

use super::StreamLimits;

/// Shared by the table and the stream's reader.
#[derive(Debug, Default)]
pub(super) struct Standing {
    vouched: AtomicBool,
    /// Bad messages since the last good one.
    complaints: AtomicU32,
    /// When the first of them came.
    since: Mutex<Option<Instant>>,
}

impl Standing {
    pub(super) fn is_vouched(&self) -> bool {
        self.vouched.load(Ordering::Relaxed)
    }

    pub(super) fn vouch(&self) {
        self.vouched.store(true, Ordering::Relaxed);
        self.forgive();
    }

    /// A good message came.
    pub(super) fn forgive(&self) {
        // Most have none, and then nothing is written.
        if self.complaints.load(Ordering::Relaxed) > 0 {
            self.complaints.store(0, Ordering::Relaxed);
        }
    }

    /// So many more bad messages in a row; true when the stream is to be closed. Where the daemon has vouched for it, the
    /// two sides' SPIs may be out of step for a moment, in which a burst of ESP comes: there only what goes on is fatal.
    pub(super) fn complain(&self, count: u32, limits: &StreamLimits) -> bool {
        let before = self.complaints.fetch_add(count, Ordering::Relaxed);
        let now = Instant::now();
        let mut since = self.since.lock().unwrap_or_else(PoisonError::into_inner);
        let first = since.filter(|_| before > 0).unwrap_or(now);
        *since = Some(first);
        let lasting = now.saturating_duration_since(first) >= limits.complaint_grace;
        before.saturating_add(count) >= limits.max_complaints && (lasting || !self.is_vouched())
    }
}
