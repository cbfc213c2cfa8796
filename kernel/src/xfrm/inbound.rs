//! Policies of the kernel for shunts where user space does ESP: what comes for this host, or is forwarded, without having
//! been in the tunnel (RFC 4301 §5.2). What comes out of the tunnel's device passes them by, and so do our own sockets.

use std::collections::BTreeMap;
use std::io;

use ipsec::plane::{Mark, PlaneError, Shunt, ShuntAction};

use super::codec::{Action, Direction, Policy, PolicyId};
use super::priority::{self, Purpose};
use super::selectors;
use super::socket::{Databases as _, XfrmSocket};

/// The shunts' policies.
pub(crate) struct InboundPolicies {
    socket: XfrmSocket,
    by_number: BTreeMap<u32, Vec<Policy>>,
}

impl InboundPolicies {
    /// Connects to the policies of the calling thread's network namespace, and removes what a predecessor left that died.
    pub(crate) fn open() -> io::Result<Self> {
        let mut socket = XfrmSocket::open()?;
        for report in socket.policies()?.iter().filter(|report| report.ours && !report.of_latch) {
            socket.delete_policy(&report.id)?;
        }
        Ok(Self { socket, by_number: BTreeMap::new() })
    }

    /// Installs the policies of a shunt: all of them, or on error none.
    pub(crate) fn add(&mut self, shunt: &Shunt) -> Result<(), PlaneError> {
        let purpose = Purpose::Shunt(shunt.action);
        let action = match shunt.action {
            ShuntAction::Pass => Action::Pass,
            ShuntAction::Drop => Action::Drop,
        };
        let mut policies = Vec::new();
        for selector in selectors::outbound(&shunt.local_ts, &shunt.remote_ts, 0)? {
            let (priority, selector) = (priority::of(&selector, purpose), selector.reversed());
            for direction in [Direction::In, Direction::Forward] {
                let id = PolicyId { direction, selector, mark: Mark::default(), if_id: 0 };
                policies.push(Policy { id, priority, action });
            }
        }
        for (index, policy) in policies.iter().enumerate() {
            if let Err(source) = self.socket.set_policy(policy) {
                for done in policies.iter().take(index) {
                    let _ = self.settle(&done.id);
                }
                return Err(PlaneError::System { action: format!("install the policy {}", policy.id), source });
            }
        }
        self.by_number.insert(shunt.number, policies);
        Ok(())
    }

    /// Removes a shunt's policies. Does all that it can, and gives the first error.
    pub(crate) fn remove(&mut self, number: u32) -> io::Result<()> {
        let policies = self.by_number.remove(&number).unwrap_or_default();
        policies.iter().map(|policy| self.settle(&policy.id)).fold(Ok(()), io::Result::and)
    }

    /// Removes all.
    pub(crate) fn clear(&mut self) -> io::Result<()> {
        let numbers: Vec<u32> = self.by_number.keys().copied().collect();
        numbers.into_iter().map(|number| self.remove(number)).fold(Ok(()), io::Result::and)
    }

    /// Another shunt's policy of this name, the newest's, or none.
    fn settle(&mut self, id: &PolicyId) -> io::Result<()> {
        let others = self.by_number.values().rev().flatten();
        match others.into_iter().find(|policy| policy.id == *id).copied() {
            Some(policy) => self.socket.set_policy(&policy),
            None => self.socket.delete_policy(id).map(|_| ()),
        }
    }
}
