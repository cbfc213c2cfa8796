//! Make-before-break: what takes an IKE SA's place, and when the old one may go.

use std::time::Instant;

use super::{Engine, IkeSaId, Initiate};
use crate::sa::reauthentication::Reauthentication;
use crate::sa::{IkeSa, Initiating, Want};

/// What became of the new IKE SA.
enum Progress {
    Under,
    Done,
    /// The peer refuses it a Child SA that the old one has.
    Lacks,
    Failed,
}

impl Engine {
    /// Begins what is to take the place of an IKE SA: always an attempt of its own, as any other IKE SA with that peer would go
    /// on existing without this.
    pub(super) fn replace(&mut self, now: Instant, old: IkeSaId, requests: Vec<Initiate>) {
        let requests: Vec<Initiate> =
            requests.into_iter().filter_map(|request| self.as_configured_now(request)).collect();
        if let Some(entry) = self.ctx.reauthentications.iter_mut().find(|entry| entry.old == old) {
            entry.waits = false;
            let new = entry.new;
            self.complete(now, new, requests);
            return;
        }
        let mut wants = requests.iter().map(|request| Want { child: request.child.clone(), token: None });
        let attempt = requests.first().zip(wants.next()).and_then(|(request, want)| {
            let Initiate { connection, local, remote, .. } = request.clone();
            Initiating::begin(&mut self.ctx, now, connection, want, local, remote)
        });
        let Some(mut attempt) = attempt else {
            self.finish_reauthentication(now, old, &Progress::Failed);
            return;
        };
        wants.for_each(|want| attempt.add_want(want));
        let new = attempt.id();
        self.ctx.reauthentications.push(Reauthentication { old, new, waits: false, rest: Vec::new() });
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

    /// An attempt goes on under another number: from the start, or at another gateway.
    pub(super) fn goes_on_as(&mut self, from: IkeSaId, new: IkeSaId) {
        for entry in self.ctx.reauthentications.iter_mut().filter(|entry| entry.new == from) {
            entry.new = new;
        }
    }

    /// Ends what is over; true when there was something.
    pub(super) fn finish_reauthentications(&mut self, now: Instant) -> bool {
        let mut over = Vec::new();
        for entry in std::mem::take(&mut self.ctx.reauthentications) {
            let progress = self.progress_of(&entry);
            match progress {
                Progress::Under => self.ctx.reauthentications.push(entry),
                Progress::Lacks => {
                    over.push((entry.old, progress));
                    self.ctx.reauthentications.push(Reauthentication { waits: true, ..entry });
                }
                Progress::Failed if !self.sas.contains_key(&entry.old) => {
                    self.ctx.reinitiate.extend(entry.rest);
                    over.push((entry.old, progress));
                }
                Progress::Done | Progress::Failed => over.push((entry.old, progress)),
            }
        }
        for (old, progress) in &over {
            self.finish_reauthentication(now, *old, progress);
        }
        !over.is_empty()
    }

    fn progress_of(&self, entry: &Reauthentication) -> Progress {
        let new = match self.sas.get(&entry.new).map(|slot| &slot.sa) {
            None => return Progress::Failed,
            Some(IkeSa::Established(new)) if new.has_all() => new,
            Some(_) => return Progress::Under,
        };
        let Some(IkeSa::Established(old)) = self.sas.get(&entry.old).map(|slot| &slot.sa) else {
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
                Progress::Failed => sa.reauthentication_failed(ctx, now),
            }
            Ok(())
        });
    }
}
