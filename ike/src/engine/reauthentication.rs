//! Make-before-break: what takes an IKE SA's place, and when the old one may go.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use super::{Engine, IkeSaId, Initiate};
use crate::sa::reauthentication::{Reauthentication, Replacement};
use crate::sa::{IkeSa, Initiating, Want};

/// IKE SAs that others are being made for, and those of them for which something may have changed.
#[derive(Default)]
pub(crate) struct Reauthentications {
    by_old: BTreeMap<IkeSaId, Reauthentication>,
    /// The old one of each new one.
    by_new: BTreeMap<IkeSaId, IkeSaId>,
    changed: BTreeSet<IkeSaId>,
}

impl Reauthentications {
    fn begin(&mut self, old: IkeSaId, entry: Reauthentication) {
        self.by_new.insert(entry.new, old);
        self.by_old.insert(old, entry);
        self.changed.insert(old);
    }

    fn end(&mut self, old: IkeSaId) -> Option<Reauthentication> {
        let entry = self.by_old.remove(&old)?;
        self.by_new.remove(&entry.new);
        self.changed.remove(&old);
        Some(entry)
    }

    /// True while another IKE SA is being made for this one.
    pub(crate) fn contains(&self, old: IkeSaId) -> bool {
        self.by_old.contains_key(&old)
    }

    pub(crate) fn get_mut(&mut self, old: IkeSaId) -> Option<&mut Reauthentication> {
        self.by_old.get_mut(&old)
    }

    /// True for an attempt that is to bring an IKE SA back from a stream to UDP.
    pub(crate) fn is_return(&self, new: IkeSaId) -> bool {
        let entry = self.by_new.get(&new).and_then(|old| self.by_old.get(old));
        entry.is_some_and(|entry| entry.returns)
    }

    /// The peer may have the new IKE SA, and we have not.
    pub(crate) fn answer_is_lost(&mut self, new: IkeSaId) {
        if let Some(entry) = self.by_new.get(&new).and_then(|old| self.by_old.get_mut(old)) {
            entry.answer_lost = true;
        }
    }

    /// What was one IKE SA goes on as another one, whichever end it is.
    pub(crate) fn goes_on_as(&mut self, from: IkeSaId, to: IkeSaId) {
        if let Some(old) = self.by_new.get(&from).copied()
            && let Some(entry) = self.end(old)
        {
            self.begin(old, Reauthentication { new: to, ..entry });
        }
        if let Some(entry) = self.end(from) {
            self.begin(to, entry);
        }
    }

    /// An IKE SA did something, or is gone.
    pub(super) fn note(&mut self, id: IkeSaId) {
        if self.by_old.contains_key(&id) {
            self.changed.insert(id);
        }
        self.changed.extend(self.by_new.get(&id));
    }

    /// Something that concerns all of them has changed.
    pub(super) fn note_all(&mut self) {
        self.changed.extend(self.by_old.keys());
    }

    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn is_consistent(&self) -> bool {
        let known = |old: &IkeSaId| self.by_old.contains_key(old);
        self.by_old.len() == self.by_new.len() && self.by_new.values().all(known) && self.changed.is_empty()
    }
}

/// What became of the new IKE SA.
enum Progress {
    Under,
    Done,
    /// The peer refuses it a Child SA that the old one has.
    Lacks,
    Failed {
        /// The peer may have it.
        answer_lost: bool,
    },
}

impl Engine {
    /// Begins what is to take the place of an IKE SA: always an attempt of its own, as any other IKE SA with that peer would go
    /// on existing without this.
    pub(super) fn replace(&mut self, now: Instant, replacement: Replacement) {
        let Replacement { old, requests, returns } = replacement;
        let requests: Vec<Initiate> =
            requests.into_iter().filter_map(|request| self.as_configured_now(request)).collect();
        if let Some(entry) = self.ctx.reauthentications.get_mut(old) {
            entry.waits = false;
            let new = entry.new;
            self.complete(now, new, requests);
            return;
        }
        let mut wants = requests.iter().map(|request| Want { child: request.child.clone(), token: None });
        let attempt = requests.first().zip(wants.next()).and_then(|(request, want)| {
            let Initiate { connection, local, remote, .. } = request.clone();
            let begin = if returns { Initiating::back_to_udp } else { Initiating::begin };
            begin(&mut self.ctx, now, connection, want, local, remote)
        });
        let Some(mut attempt) = attempt else {
            self.finish_reauthentication(now, old, &Progress::Failed { answer_lost: false });
            return;
        };
        wants.for_each(|want| attempt.add_want(want));
        let new = attempt.id();
        self.ctx
            .reauthentications
            .begin(old, Reauthentication { new, waits: false, rest: Vec::new(), returns, answer_lost: false });
        self.insert(new, IkeSa::Initiating(attempt), None);
    }

    /// Has a new IKE SA ask again for what it lacks of these.
    fn complete(&mut self, now: Instant, new: IkeSaId, requests: Vec<Initiate>) {
        self.with_established(new, |sa, ctx| {
            let lacks =
                |request: &Initiate| request.child.as_ref().is_some_and(|child| !sa.working().contains(&*child.name));
            let lacking: Vec<Initiate> = requests.into_iter().filter(lacks).collect();
            lacking.into_iter().try_for_each(|request| sa.want(ctx, now, Want { child: request.child, token: None }))
        });
    }

    /// Ends what is over; true when there was something.
    pub(super) fn finish_reauthentications(&mut self, now: Instant) -> bool {
        let mut over = Vec::new();
        for old in std::mem::take(&mut self.ctx.reauthentications.changed) {
            let Some(entry) = self.ctx.reauthentications.by_old.get(&old) else { continue };
            let progress = self.progress_of(old, entry);
            match progress {
                Progress::Under => continue,
                Progress::Lacks => {
                    if let Some(entry) = self.ctx.reauthentications.get_mut(old) {
                        entry.waits = true;
                    }
                }
                Progress::Done | Progress::Failed { .. } => {
                    let ended = self.ctx.reauthentications.end(old);
                    if matches!(progress, Progress::Failed { .. }) && !self.sas.contains_key(&old) {
                        self.ctx.reinitiate.extend(ended.into_iter().flat_map(|entry| entry.rest));
                    }
                }
            }
            over.push((old, progress));
        }
        for (old, progress) in &over {
            self.finish_reauthentication(now, *old, progress);
        }
        !over.is_empty()
    }

    fn progress_of(&self, old: IkeSaId, entry: &Reauthentication) -> Progress {
        let new = match self.sas.get(&entry.new).map(|slot| &slot.sa) {
            None => return Progress::Failed { answer_lost: entry.answer_lost },
            Some(IkeSa::Established(new)) if new.has_all() => new,
            Some(_) => return Progress::Under,
        };
        let Some(IkeSa::Established(old)) = self.sas.get(&old).map(|slot| &slot.sa) else {
            return Progress::Done;
        };
        let (has, wanted) = (new.working(), old.everything_again());
        let lacks = |request: &Initiate| request.child.as_ref().is_some_and(|child| !has.contains(&*child.name));
        let mut wanted = wanted.into_iter().filter_map(|request| self.as_configured_now(request));
        match wanted.any(|request| lacks(&request)) {
            false => Progress::Done,
            true if entry.waits => Progress::Under,
            true => Progress::Lacks,
        }
    }

    fn finish_reauthentication(&mut self, now: Instant, old: IkeSaId, progress: &Progress) {
        self.with_established(old, |sa, ctx| {
            match progress {
                Progress::Under => {}
                Progress::Done => return sa.reauthenticated(ctx, now),
                Progress::Lacks => sa.succeeded_in_part(ctx, now),
                Progress::Failed { answer_lost } if !sa.is_reauthenticating() => {
                    return sa.return_failed(ctx, now, *answer_lost);
                }
                Progress::Failed { .. } => sa.reauthentication_failed(ctx, now),
            }
            Ok(())
        });
    }
}
