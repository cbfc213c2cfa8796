//! The Child SAs that are in the data plane: by number, by name, and by when they are to be asked for use.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use ike::engine::ChildSaId;
use ipsec::guard::ClassId;
use ipsec::plane::Tags;
use ipsec::selector::TrafficSelector;

use super::idle::Idle;
use super::updown::Updown;

/// A Child SA that is in the data plane.
pub(super) struct InstalledChild {
    pub(super) spi_in: u32,
    pub(super) class: ClassId,
    pub(super) reqid: u32,
    pub(super) tags: Tags,
    /// The configuration's name.
    pub(super) name: Arc<str>,
    pub(super) connection: Arc<str>,
    pub(super) local_ts: Vec<TrafficSelector>,
    pub(super) remote_ts: Vec<TrafficSelector>,
    /// The peer would make others for what it left out of the selectors.
    pub(super) additional_ts: bool,
    pub(super) idle: Idle,
    pub(super) updown: Option<Updown>,
    /// Its script was told that it, or the Child SA that it replaces, is up.
    pub(super) told_up: bool,
}

/// Child SAs of one name, by connection.
type OfName = BTreeMap<Arc<str>, BTreeSet<ChildSaId>>;

/// All of them.
#[derive(Default)]
pub(super) struct Children {
    all: BTreeMap<ChildSaId, InstalledChild>,
    by_name: BTreeMap<Arc<str>, OfName>,
    /// Those with a limit of `inactivity`. What is here need not be true any more: one may have gone, or been used.
    idle: BTreeSet<(Instant, ChildSaId)>,
}

impl Children {
    pub(super) fn get(&self, id: ChildSaId) -> Option<&InstalledChild> {
        self.all.get(&id)
    }

    pub(super) fn get_mut(&mut self, id: ChildSaId) -> Option<&mut InstalledChild> {
        self.all.get_mut(&id)
    }

    pub(super) fn insert(&mut self, id: ChildSaId, mut child: InstalledChild) {
        let of_name = self.by_name.entry(Arc::clone(&child.name)).or_default();
        of_name.entry(Arc::clone(&child.connection)).or_default().insert(id);
        // All share the tables' names.
        if let Some((name, of_name)) = self.by_name.get_key_value(&child.name)
            && let Some((connection, _)) = of_name.get_key_value(&child.connection)
        {
            (child.name, child.connection) = (Arc::clone(name), Arc::clone(connection));
        }
        self.idle.extend(child.idle.over_at().map(|at| (at, id)));
        self.all.insert(id, child);
    }

    pub(super) fn remove(&mut self, id: ChildSaId) -> Option<InstalledChild> {
        let child = self.all.remove(&id)?;
        if let Some(of_name) = self.by_name.get_mut(&child.name) {
            if let Some(ids) = of_name.get_mut(&child.connection) {
                ids.remove(&id);
                if ids.is_empty() {
                    of_name.remove(&child.connection);
                }
            }
            if of_name.is_empty() {
                self.by_name.remove(&child.name);
            }
        }
        Some(child)
    }

    /// Those of a connection's child, by number.
    pub(super) fn of(
        &self,
        connection: &str,
        name: &str,
    ) -> impl DoubleEndedIterator<Item = (ChildSaId, &InstalledChild)> {
        let ids = self.by_name.get(name).and_then(|of_name| of_name.get(connection));
        ids.into_iter().flatten().filter_map(|id| Some((*id, self.all.get(id)?)))
    }

    /// Those of this name, whichever connection's, by number within each.
    pub(super) fn named(&self, name: &str) -> impl Iterator<Item = ChildSaId> {
        self.by_name.get(name).into_iter().flat_map(BTreeMap::values).flatten().copied()
    }

    /// When [`Self::next_idle`] may have one.
    pub(super) fn idle_at(&self) -> Option<Instant> {
        self.idle.first().map(|(at, _)| *at)
    }

    /// One that was not used for as long as it may be, as far as is known: to be asked, and told of with
    /// [`Self::watch`] again.
    pub(super) fn next_idle(&mut self, now: Instant) -> Option<ChildSaId> {
        loop {
            let (at, id) = self.idle.first().copied().filter(|(at, _)| *at <= now)?;
            self.idle.remove(&(at, id));
            if self.all.get(&id).is_some_and(|child| child.idle.over_at() == Some(at)) {
                return Some(id);
            }
        }
    }

    /// Puts one among those that are looked after.
    pub(super) fn watch(&mut self, id: ChildSaId) {
        let at = self.all.get(&id).and_then(|child| child.idle.over_at());
        self.idle.extend(at.map(|at| (at, id)));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);

    fn child(connection: &str, name: &str, now: Instant, inactivity: Duration) -> InstalledChild {
        InstalledChild {
            spi_in: 1,
            class: ClassId(1),
            reqid: 1,
            tags: Tags::default(),
            name: name.into(),
            connection: connection.into(),
            local_ts: Vec::new(),
            remote_ts: Vec::new(),
            additional_ts: false,
            idle: Idle::new(now, inactivity, None),
            updown: None,
            told_up: false,
        }
    }

    #[test]
    fn they_are_found_by_name_as_long_as_they_are_there() {
        let (mut children, now) = (Children::default(), Instant::now());
        for (id, connection, name) in [(1, "a", "net"), (2, "a", "net"), (3, "b", "net"), (4, "b", "host")] {
            children.insert(ChildSaId(id), child(connection, name, now, Duration::ZERO));
        }
        let of = |children: &Children, connection, name| -> Vec<u64> {
            children.of(connection, name).map(|(id, _)| id.0).collect()
        };
        assert_eq!(of(&children, "a", "net"), [1, 2]);
        assert_eq!(of(&children, "b", "host"), [4]);
        assert!(of(&children, "a", "host").is_empty() && of(&children, "c", "net").is_empty());
        assert_eq!(children.named("net").map(|id| id.0).collect::<Vec<_>>(), [1, 2, 3]);
        for id in 1..=4 {
            assert!(children.remove(ChildSaId(id)).is_some() && children.remove(ChildSaId(id)).is_none());
        }
        assert!(children.all.is_empty() && children.by_name.is_empty());
    }

    #[test]
    fn those_that_may_be_idle_come_when_it_is_time_and_only_they() {
        let (mut children, now) = (Children::default(), Instant::now());
        children.insert(ChildSaId(1), child("a", "net", now, Duration::ZERO));
        children.insert(ChildSaId(2), child("a", "net", now, 10 * MINUTE));
        children.insert(ChildSaId(3), child("a", "net", now, 5 * MINUTE));
        assert_eq!(children.idle_at(), Some(now + 5 * MINUTE));
        assert_eq!(children.next_idle(now + 4 * MINUTE), None);
        let later = now + 5 * MINUTE;
        assert_eq!(children.next_idle(later), Some(ChildSaId(3)));
        // It was used a minute ago.
        let used = ipsec::plane::Usage { idle_out: Some(MINUTE), ..ipsec::plane::Usage::default() };
        assert!(!children.get_mut(ChildSaId(3)).unwrap().idle.is_over(later, &used));
        children.watch(ChildSaId(3));
        assert_eq!(children.idle_at(), Some(now + 9 * MINUTE));
        children.remove(ChildSaId(3));
        assert_eq!(children.next_idle(now + 9 * MINUTE), None, "gone");
        assert_eq!(children.next_idle(now + 10 * MINUTE), Some(ChildSaId(2)));
        assert_eq!(children.idle_at(), None);
    }
}
