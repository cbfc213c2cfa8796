//! IKE SAs by connection.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::Arc;

use super::IkeSaId;

/// Which connection an IKE SA belongs to, as far as the table knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Member {
    /// The connection's name.
    pub(crate) connection: Arc<str>,
    /// It may become an IKE SA that we initiated.
    pub(crate) initiating: bool,
}

/// The table.
#[derive(Default)]
pub(super) struct Members {
    by_connection: BTreeMap<Arc<str>, OfConnection>,
    initiating: usize,
}

#[derive(Default)]
struct OfConnection {
    all: BTreeSet<IkeSaId>,
    initiating: usize,
}

impl Members {
    /// An IKE SA is another connection's now, or nobody's.
    pub(super) fn changed(&mut self, id: IkeSaId, old: Option<&Member>, new: Option<&Member>) {
        if old == new {
            return;
        }
        if let Some(new) = new {
            let of = self.by_connection.entry(Arc::clone(&new.connection)).or_default();
            of.all.insert(id);
            of.initiating += usize::from(new.initiating);
            self.initiating += usize::from(new.initiating);
        }
        let Some(old) = old else { return };
        let Some(of) = self.by_connection.get_mut(&old.connection) else { return };
        of.initiating -= usize::from(old.initiating);
        self.initiating -= usize::from(old.initiating);
        if new.is_none_or(|new| new.connection != old.connection) {
            of.all.remove(&id);
        }
        if of.all.is_empty() {
            self.by_connection.remove(&old.connection);
        }
    }

    /// The IKE SAs of a connection, by number, from above this one on.
    pub(super) fn after<'a>(&'a self, connection: &str, after: IkeSaId) -> impl Iterator<Item = IkeSaId> + use<'a> {
        let above = (Bound::Excluded(after), Bound::Unbounded);
        self.by_connection.get(connection).into_iter().flat_map(move |of| of.all.range(above)).copied()
    }

    /// True when an attempt of ours is under way.
    pub(super) fn is_initiating(&self, connection: &str) -> bool {
        self.by_connection.get(connection).is_some_and(|of| of.initiating > 0)
    }

    /// Attempts of ours, of all connections.
    pub(super) fn initiating(&self) -> usize {
        self.initiating
    }

    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn is_empty(&self) -> bool {
        self.by_connection.is_empty() && self.initiating == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ike_sa_is_found_by_the_connection_that_it_has_now() {
        let mut members = Members::default();
        let member = |name: &str, initiating| Some(Member { connection: name.into(), initiating });
        let (first, second) = (IkeSaId(1), IkeSaId(2));
        members.changed(first, None, member("a", true).as_ref());
        members.changed(second, None, member("a", false).as_ref());
        assert!(members.is_initiating("a") && !members.is_initiating("b") && members.initiating() == 1);
        assert_eq!(members.after("a", IkeSaId(0)).collect::<Vec<_>>(), [first, second]);
        assert_eq!(members.after("a", first).collect::<Vec<_>>(), [second]);
        members.changed(first, member("a", true).as_ref(), member("a", false).as_ref());
        assert!(!members.is_initiating("a"));
        // The identity chose another of the candidates.
        members.changed(second, member("a", false).as_ref(), member("b", false).as_ref());
        assert_eq!(members.after("a", IkeSaId(0)).collect::<Vec<_>>(), [first]);
        assert_eq!(members.after("b", IkeSaId(0)).collect::<Vec<_>>(), [second]);
        members.changed(first, member("a", false).as_ref(), None);
        members.changed(second, member("b", false).as_ref(), None);
        assert!(members.is_empty());
    }
}
