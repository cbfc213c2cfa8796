//! Shunts: which are installed, and which were uninstalled by hand.

use std::collections::BTreeMap;

use super::traps::Key;
use crate::config::ConnectionDefinition;
use crate::config::shunt::ShuntPolicy;

/// The core's shunts.
#[derive(Default)]
pub(super) struct Shunts {
    /// With the number that the data plane knows each by.
    installed: BTreeMap<Key, (u32, ShuntPolicy)>,
    /// Configured ones that were uninstalled by hand; they stay so until they change.
    uninstalled: BTreeMap<Key, ShuntPolicy>,
    last: u32,
}

impl Shunts {
    /// What shall be installed under these connections: what is installed with the configuration, and what is there
    /// already.
    pub(super) fn wanted(&mut self, connections: &[ConnectionDefinition]) -> BTreeMap<Key, ShuntPolicy> {
        let mut wanted = BTreeMap::new();
        for definition in connections {
            for shunt in &definition.shunts {
                let key = (definition.connection.name.clone(), shunt.child.name.clone());
                if shunt.start || self.installed.contains_key(&key) {
                    wanted.insert(key, shunt.policy());
                }
            }
        }
        self.uninstalled.retain(|key, policy| wanted.get(key) == Some(policy));
        wanted.retain(|key, _| !self.uninstalled.contains_key(key));
        wanted
    }

    /// All that are installed.
    pub(super) fn all_installed(&self) -> impl Iterator<Item = (&Key, &ShuntPolicy)> {
        self.installed.iter().map(|(key, (_, policy))| (key, policy))
    }

    /// True when exactly this is installed.
    pub(super) fn is_installed(&self, key: &Key, policy: &ShuntPolicy) -> bool {
        self.installed.get(key).is_some_and(|(_, installed)| installed == policy)
    }

    /// A number for another one.
    pub(super) fn fresh(&mut self) -> u32 {
        self.last = self.last.wrapping_add(1);
        self.last
    }

    /// The shunt is there, whatever was done by hand before; gives the number of the one that it replaces.
    pub(super) fn insert(&mut self, key: Key, number: u32, policy: ShuntPolicy) -> Option<u32> {
        self.uninstalled.remove(&key);
        self.installed.insert(key, (number, policy)).map(|(old, _)| old)
    }

    /// Takes all others away; gives their numbers.
    pub(super) fn keep(&mut self, stays: impl Fn(&Key) -> bool) -> Vec<u32> {
        let mut gone = Vec::new();
        self.installed.retain(|key, (number, _)| {
            let stays = stays(key);
            gone.extend((!stays).then_some(*number));
            stays
        });
        gone
    }

    /// Takes a shunt away by hand: the first of this name; gives its number.
    pub(super) fn uninstall(&mut self, ike: Option<&str>, name: &str) -> Option<u32> {
        let key = self.installed.keys().find(|key| key.1 == name && ike.is_none_or(|ike| ike == key.0)).cloned()?;
        let (number, policy) = self.installed.remove(&key)?;
        self.uninstalled.insert(key, policy);
        Some(number)
    }
}

#[cfg(test)]
mod tests {
    use ipsec::plane::ShuntAction;

    use super::*;

    fn key() -> Key {
        ("site".to_owned(), "lan".to_owned())
    }

    fn policy(action: ShuntAction) -> ShuntPolicy {
        ShuntPolicy { action, local_ts: Vec::new(), remote_ts: Vec::new(), options: Default::default() }
    }

    #[test]
    fn what_was_uninstalled_by_hand_is_gone_and_can_be_installed_again() {
        let mut shunts = Shunts::default();
        let (passes, drops) = (policy(ShuntAction::Pass), policy(ShuntAction::Drop));
        let first = shunts.fresh();
        assert_eq!(shunts.insert(key(), first, passes.clone()), None);
        assert!(shunts.is_installed(&key(), &passes) && !shunts.is_installed(&key(), &drops));
        let second = shunts.fresh();
        assert_eq!(shunts.insert(key(), second, drops.clone()), Some(first), "another in its place");
        assert_eq!(shunts.uninstall(Some("other"), "lan"), None);
        assert_eq!(shunts.uninstall(None, "lan"), Some(second));
        assert_eq!(shunts.uninstall(None, "lan"), None);
        assert_eq!(shunts.uninstalled.get(&key()), Some(&drops));
        let third = shunts.fresh();
        shunts.insert(key(), third, drops);
        assert!(shunts.uninstalled.is_empty());
        assert!(shunts.keep(|_| true).is_empty());
        assert_eq!(shunts.keep(|_| false), [third]);
        assert_eq!(shunts.all_installed().count(), 0);
    }
}
