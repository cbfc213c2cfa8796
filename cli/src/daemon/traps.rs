//! Trap policies (`start_action = trap` and what comes to the same): which are wanted, which are installed, and what a
//! packet that falls into one may start.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use ipsec::selector::Flow;

use crate::config::ConnectionDefinition;
use crate::config::trap::Selectors;

/// After a failed initiation packets start none for so long.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_secs(5);

/// An initiation without an answer for so long does not keep packets from starting another.
const INITIATION_LIMIT: Duration = Duration::from_secs(300);

/// What a trap is for: names of connection and child.
pub(super) type Key = (String, String);

/// A trap in the data plane.
pub(super) struct Installed {
    pub(super) reqid: u32,
    pub(super) selectors: Selectors,
    /// No attempt before this, after one failed.
    pub(super) not_before: Option<Instant>,
}

/// An initiation that has not been answered.
struct Initiation {
    connection: String,
    child: Option<String>,
    /// The packet that it is for.
    packet: Option<Flow>,
    since: Instant,
}

/// The core's traps and initiations.
#[derive(Default)]
pub(super) struct Traps {
    installed: BTreeMap<Key, Installed>,
    by_reqid: BTreeMap<u32, Key>,
    /// Configured ones that were uninstalled by hand; they stay so until their selectors change.
    uninstalled: BTreeMap<Key, Selectors>,
    initiations: BTreeMap<u64, Initiation>,
    /// Initiations of children.
    by_child: BTreeMap<Key, BTreeSet<u64>>,
}

impl Traps {
    /// What shall be installed under these connections: children whose `start_action` traps, and those whose trap is
    /// there for another reason.
    pub(super) fn wanted(&mut self, connections: &[ConnectionDefinition]) -> BTreeMap<Key, Selectors> {
        let mut wanted = BTreeMap::new();
        for definition in connections {
            for child in &definition.connection.children {
                let key = (definition.connection.name.clone(), child.name.clone());
                if !definition.traps(&child.name).start && !self.installed.contains_key(&key) {
                    continue;
                }
                // What cannot be has been said of the configuration.
                if let Ok(selectors) = Selectors::of(child, &definition.local_addrs, &definition.remote_addrs) {
                    wanted.insert(key, selectors);
                }
            }
        }
        self.uninstalled.retain(|key, selectors| wanted.get(key) == Some(selectors));
        wanted.retain(|key, _| !self.uninstalled.contains_key(key));
        wanted
    }

    /// A trap that is installed.
    pub(super) fn installed(&self, key: &Key) -> Option<&Installed> {
        self.installed.get(key)
    }

    /// All that are installed.
    pub(super) fn all_installed(&self) -> impl Iterator<Item = (&Key, &Installed)> {
        self.installed.iter()
    }

    /// The trap is there again, whatever was done by hand before.
    pub(super) fn insert(&mut self, key: Key, reqid: u32, selectors: Selectors) -> Option<Installed> {
        self.uninstalled.remove(&key);
        self.by_reqid.insert(reqid, key.clone());
        let old = self.installed.insert(key, Installed { reqid, selectors, not_before: None });
        if let Some(old) = &old {
            self.by_reqid.remove(&old.reqid);
        }
        old
    }

    /// Takes all others away; gives their `reqid`s.
    pub(super) fn keep(&mut self, stays: impl Fn(&Key) -> bool) -> Vec<u32> {
        let mut gone = Vec::new();
        self.installed.retain(|key, trap| {
            let stays = stays(key);
            gone.extend((!stays).then_some(trap.reqid));
            stays
        });
        for reqid in &gone {
            self.by_reqid.remove(reqid);
        }
        gone
    }

    /// Takes a trap away by hand: the first for this child; gives its `reqid`.
    pub(super) fn uninstall(&mut self, ike: Option<&str>, child: &str) -> Option<u32> {
        let key = self.installed.keys().find(|key| key.1 == child && ike.is_none_or(|ike| ike == key.0)).cloned()?;
        let gone = self.installed.remove(&key)?;
        self.by_reqid.remove(&gone.reqid);
        self.uninstalled.insert(key, gone.selectors);
        Some(gone.reqid)
    }

    /// Whose trap a packet fell into, unless an attempt is under way or failed just now.
    pub(super) fn due(&self, now: Instant, reqid: u32) -> Option<Key> {
        let key = self.by_reqid.get(&reqid)?;
        let waits = self.installed.get(key)?.not_before.is_some_and(|not_before| now < not_before);
        let lately = |one: &Initiation| now.saturating_duration_since(one.since) < INITIATION_LIMIT;
        let mut initiations = self.by_child.get(key).into_iter().flatten();
        let under_way = initiations.any(|token| self.initiations.get(token).is_some_and(lately));
        (!waits && !under_way).then(|| key.clone())
    }

    /// An initiation begins.
    pub(super) fn begun(
        &mut self,
        now: Instant,
        token: u64,
        connection: &str,
        child: Option<&str>,
        packet: Option<Flow>,
    ) {
        let (connection, child) = (connection.to_owned(), child.map(str::to_owned));
        if let Some(child) = &child {
            self.by_child.entry((connection.clone(), child.clone())).or_default().insert(token);
        }
        self.initiations.insert(token, Initiation { connection, child, packet, since: now });
    }

    /// The packet that an initiation is for.
    pub(super) fn packet_of(&self, token: u64) -> Option<Flow> {
        self.initiations.get(&token)?.packet
    }

    /// The connection, the child and the packet of an initiation that is for a packet.
    pub(super) fn trap_of(&self, token: u64) -> Option<(&str, &str, Flow)> {
        let one = self.initiations.get(&token)?;
        Some((&one.connection, one.child.as_deref()?, one.packet?))
    }

    /// An initiation is over; it ended well if the packet that it was for has an SA now.
    pub(super) fn ended(&mut self, now: Instant, token: u64, well: bool) {
        let Some(Initiation { connection, child: Some(child), .. }) = self.initiations.remove(&token) else { return };
        let key = (connection, child);
        if let Some(tokens) = self.by_child.get_mut(&key) {
            tokens.remove(&token);
            if tokens.is_empty() {
                self.by_child.remove(&key);
            }
        }
        if let Some(trap) = self.installed.get_mut(&key) {
            trap.not_before = (!well).then(|| now + PAUSE_AFTER_FAILURE);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use ipsec::selector::TrafficSelector;

    use super::*;

    fn key() -> Key {
        ("site".to_owned(), "net".to_owned())
    }

    fn selectors(remote: &str) -> Selectors {
        let network = |text: &str| TrafficSelector::network(text.parse().unwrap(), 24).unwrap();
        let options = Default::default();
        Selectors { local_ts: vec![network("10.1.0.0")], remote_ts: vec![network(remote)], options }
    }

    #[test]
    fn packets_start_one_initiation_and_the_next_only_some_time_after_a_failure() {
        let (mut traps, now) = (Traps::default(), Instant::now());
        assert_eq!(traps.due(now, 7), None, "no such trap");
        traps.insert(key(), 7, selectors("10.2.0.0"));
        assert_eq!(traps.due(now, 7), Some(key()));
        traps.begun(now, 1, "site", Some("other"), None);
        traps.begun(now, 2, "site", None, None);
        assert_eq!(traps.due(now, 7), Some(key()), "other initiations");
        traps.begun(now, 3, "site", Some("net"), None);
        assert_eq!(traps.due(now, 7), None, "under way");
        traps.ended(now, 3, false);
        assert_eq!(traps.due(now + Duration::from_millis(4900), 7), None, "failed just now");
        let later = now + Duration::from_secs(5);
        assert_eq!(traps.due(later, 7), Some(key()));
        traps.begun(later, 4, "site", Some("net"), None);
        assert_eq!(traps.trap_of(4), None, "it is for no packet");
        traps.ended(later, 4, true);
        assert_eq!(traps.due(later, 7), Some(key()), "no pause after success");
        assert_eq!(traps.by_child.len(), 1, "the other child's");
    }

    #[test]
    fn what_was_uninstalled_by_hand_is_gone_and_can_be_installed_again() {
        let (mut traps, now) = (Traps::default(), Instant::now());
        traps.insert(key(), 7, selectors("10.2.0.0"));
        assert_eq!(traps.uninstall(None, "other"), None);
        assert_eq!(traps.uninstall(Some("other"), "net"), None);
        assert_eq!(traps.uninstall(Some("site"), "net"), Some(7));
        assert_eq!(traps.uninstall(Some("site"), "net"), None);
        assert_eq!(traps.due(now, 7), None);
        assert!(traps.insert(key(), 8, selectors("10.2.0.0")).is_none());
        assert!(traps.uninstalled.is_empty());
        assert_eq!(traps.due(now, 8), Some(key()));
        assert_eq!(traps.insert(key(), 9, selectors("10.3.0.0")).map(|old| old.reqid), Some(8));
        assert_eq!((traps.due(now, 8), traps.due(now, 9)), (None, Some(key())));
        assert!(traps.keep(|_| true).is_empty());
        assert_eq!(traps.keep(|_| false), [9]);
        assert!(traps.by_reqid.is_empty() && traps.installed(&key()).is_none());
    }
}
