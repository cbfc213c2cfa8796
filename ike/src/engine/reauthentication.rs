//! Make-before-break: when the old IKE SA may go.

use std::time::Instant;

use super::{Engine, IkeSaId};
use crate::sa::IkeSa;
use crate::sa::reauthentication::Reauthentication;

/// What became of the new IKE SA.
enum Progress {
    Under,
    Done,
    Failed,
}

impl Engine {
    /// Old IKE SAs whose reauthentication is over, and whether it succeeded.
    pub(super) fn reauthenticated(&mut self) -> Vec<(IkeSaId, bool)> {
        let entries = std::mem::take(&mut self.ctx.reauthentications);
        let mut over = Vec::new();
        for entry in entries {
            match self.progress_of(&entry) {
                Progress::Under => self.ctx.reauthentications.push(entry),
                Progress::Done => over.push((entry.old, true)),
                Progress::Failed => over.push((entry.old, false)),
            }
        }
        over
    }

    fn progress_of(&self, entry: &Reauthentication) -> Progress {
        let mut progress = Progress::Failed;
        for (id, slot) in &self.sas {
            if *id == entry.old {
                continue;
            }
            match &slot.sa {
                IkeSa::Established(sa) => {
                    let same = sa.core.name == entry.connection && sa.peer_key().as_ref() == Some(&entry.peer);
                    let newer = *id > entry.old;
                    match same && newer {
                        true if sa.has_all() => return Progress::Done,
                        true => progress = Progress::Under,
                        false => {}
                    }
                }
                other if other.initiates(&entry.connection) => progress = Progress::Under,
                _ => {}
            }
        }
        progress
    }

    pub(super) fn finish_reauthentications(&mut self, now: Instant, over: Vec<(IkeSaId, bool)>) {
        for (old, succeeded) in over {
            self.with_established(old, |sa, ctx| {
                if succeeded {
                    return sa.reauthenticated(ctx, now);
                }
                sa.reauthentication_failed(ctx, now);
                Ok(())
            });
        }
    }
}
