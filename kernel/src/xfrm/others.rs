//! Which policies other key managers have: heard from the kernel, so that not each policy of ours has to ask.

use std::collections::HashSet;
use std::io;

use netlink_sys::Socket;

use super::codec::{self, Event, PolicyId, PolicyReport};
use super::socket::subscribe_to;

/// The names of others' policies, and a socket that the kernel tells of changes before whoever made them goes on.
pub(super) struct OthersPolicies {
    news: Socket,
    /// `None` until they are read. A name may stay of a policy that is gone.
    names: Option<HashSet<PolicyId>>,
}

impl OthersPolicies {
    /// Subscribes in the network namespace of the calling thread. `own` is the port of our own requests.
    pub(super) fn subscribe(own: u32) -> io::Result<Self> {
        Ok(Self { news: subscribe_to(POLICIES, &[own])?, names: None })
    }

    /// Hears what there is to hear; false when all policies have to be read ([`Self::learn`]).
    pub(super) fn is_known(&mut self) -> bool {
        let mut buffer = Vec::with_capacity(NEWS);
        loop {
            buffer.clear();
            match self.news.recv_from(&mut buffer, 0) {
                Ok((_, from)) if from.port_number() == 0 => {
                    codec::messages(&buffer)
                        .filter_map(|received| codec::event(received.kind, received.payload))
                        .for_each(|event| self.note(event));
                }
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return self.names.is_some(),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // Some were lost.
                Err(_) => self.names = None,
            }
        }
    }

    fn note(&mut self, event: Event) {
        let Some(names) = &mut self.names else { return };
        match event {
            Event::Policy(report) => {
                names.insert(report.id);
            }
            Event::PolicyRemoved(id) => {
                names.remove(&id);
            }
            Event::PoliciesFlushed => names.clear(),
            Event::Acquire { .. }
            | Event::Expire { .. }
            | Event::Mapping { .. }
            | Event::StateRemoved(_)
            | Event::StatesFlushed
            | Event::PoliciesChanged
            | Event::LatchesChanged => {}
        }
    }

    /// Takes note of all policies that there are.
    pub(super) fn learn(&mut self, all: Vec<PolicyReport>) {
        let theirs = all.into_iter().filter(|report| !report.ours && !report.of_latch);
        self.names = Some(theirs.map(|report| report.id).collect());
    }

    /// False when nobody else has a policy of this name.
    pub(super) fn may_have(&self, id: &PolicyId) -> bool {
        self.names.as_ref().is_none_or(|names| names.contains(id))
    }
}

/// Bit of XFRMNLGRP_POLICY.
const POLICIES: u32 = 1 << 3;
/// No message about a policy is longer: six templates of 64 octets are the most.
const NEWS: usize = 4096;
