//! The packets that SAs are initiated for (RFC 7296 §2.9), by the token of the initiation: known until it is done or
//! has failed.

use std::collections::BTreeMap;

use ipsec::selector::Flow;

/// The packet that wants a Child SA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Trigger {
    /// The packet.
    pub(crate) packet: Flow,
    /// The peer takes selectors of one pair of addresses only (SINGLE_PAIR_REQUIRED).
    pub(crate) single_pair: bool,
}

/// All of them.
#[derive(Debug, Default)]
pub(crate) struct Triggers(BTreeMap<u64, Trigger>);

impl Triggers {
    /// An initiation for a packet begins.
    pub(crate) fn insert(&mut self, token: u64, packet: Flow) {
        self.0.insert(token, Trigger { packet, single_pair: false });
    }

    /// The packet of an initiation.
    pub(crate) fn of(&self, token: Option<u64>) -> Option<Trigger> {
        self.0.get(&token?).copied()
    }

    /// The peer wants a single pair: true where another offer can name one.
    pub(crate) fn restrict_to_pair(&mut self, token: Option<u64>) -> bool {
        let Some(trigger) = token.and_then(|token| self.0.get_mut(&token)) else { return false };
        !std::mem::replace(&mut trigger.single_pair, true)
    }

    /// The initiation is over.
    pub(crate) fn remove(&mut self, token: u64) {
        self.0.remove(&token);
    }

    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
