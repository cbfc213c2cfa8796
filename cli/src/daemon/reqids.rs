//! Which `reqid` a Child SA has: one class, one pair of selectors (see `docs/architecture.md`).

use std::collections::{HashMap, HashSet};

use ipsec::guard::ClassId;
use ipsec::plane::{RESERVED_REQID, Tags};
use ipsec::selector::TrafficSelector;

/// What a `reqid` that was not configured stands for.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) class: ClassId,
    pub(super) child: String,
    pub(super) tags: Tags,
    pub(super) local_ts: Vec<TrafficSelector>,
    pub(super) remote_ts: Vec<TrafficSelector>,
}

struct Users {
    class: ClassId,
    count: usize,
    key: Option<Key>,
}

/// All that are in use.
#[derive(Default)]
pub(super) struct Reqids {
    by_key: HashMap<Key, u32>,
    users: HashMap<u32, Users>,
    traps: HashSet<u32>,
    configured: HashSet<u32>,
    last: u32,
}

impl Reqids {
    /// Numbers after this one, so that they differ from another key manager's on the same kernel.
    pub(super) fn after(last: u32) -> Self {
        Self { last, ..Self::default() }
    }

    /// The class of the Child SAs that have it.
    pub(super) fn class_of(&self, reqid: u32) -> Option<ClassId> {
        self.users.get(&reqid).map(|users| users.class)
    }

    /// What Child SAs with these properties have.
    pub(super) fn of(&self, key: &Key) -> Option<u32> {
        self.by_key.get(key).copied()
    }

    /// One that nobody has or is configured to have.
    pub(super) fn fresh(&mut self) -> u32 {
        loop {
            self.last = if self.last >= RESERVED_REQID - 1 { 1 } else { self.last + 1 };
            let reqid = self.last;
            if !self.users.contains_key(&reqid) && !self.traps.contains(&reqid) && !self.configured.contains(&reqid) {
                return reqid;
            }
        }
    }

    /// A Child SA has it; `key` where it is not a configured or inherited one.
    pub(super) fn installed(&mut self, reqid: u32, class: ClassId, key: Option<Key>) {
        let users = self.users.entry(reqid).or_insert(Users { class, count: 0, key: None });
        users.count += 1;
        if let Some(key) = key {
            self.by_key.insert(key.clone(), reqid);
            users.key = Some(key);
        }
    }

    /// A Child SA that had it is gone.
    pub(super) fn removed(&mut self, reqid: u32) {
        let Some(users) = self.users.get_mut(&reqid) else { return };
        users.count -= 1;
        if users.count > 0 {
            return;
        }
        if let Some(key) = self.users.remove(&reqid).and_then(|users| users.key) {
            self.by_key.remove(&key);
        }
    }

    /// A trap has it, or no longer.
    pub(super) fn trap(&mut self, reqid: u32, has: bool) {
        if has {
            self.traps.insert(reqid);
        } else {
            self.traps.remove(&reqid);
        }
    }

    /// Those that the configuration names.
    pub(super) fn configure(&mut self, configured: HashSet<u32>) {
        self.configured = configured;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(child: &str) -> Key {
        Key {
            class: ClassId(1),
            child: child.to_owned(),
            tags: Tags::default(),
            local_ts: Vec::new(),
            remote_ts: Vec::new(),
        }
    }

    #[test]
    fn a_reqid_is_there_as_long_as_a_child_sa_has_it() {
        let mut reqids = Reqids::default();
        reqids.configure(HashSet::from([1, 3]));
        let reqid = reqids.fresh();
        assert_eq!(reqid, 2, "1 is configured");
        assert_eq!(reqids.of(&key("net")), None, "an installation that fails leaves nothing");
        reqids.installed(reqid, ClassId(1), Some(key("net")));
        // Its successor.
        reqids.installed(reqid, ClassId(1), None);
        reqids.removed(reqid);
        assert_eq!((reqids.of(&key("net")), reqids.class_of(reqid)), (Some(reqid), Some(ClassId(1))));
        reqids.removed(reqid);
        assert_eq!((reqids.of(&key("net")), reqids.class_of(reqid)), (None, None));
        reqids.trap(4, true);
        assert_eq!(reqids.fresh(), 5, "3 is configured, 4 a trap's");
        reqids.trap(4, false);
        reqids.last = 3;
        assert_eq!(reqids.fresh(), 4);
        reqids.last = RESERVED_REQID - 1;
        assert_eq!(reqids.fresh(), 2, "0 is none, and the last one is reserved");
        assert!(reqids.by_key.is_empty() && reqids.users.is_empty());
    }
}
