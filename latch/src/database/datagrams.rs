//! Listener latches of UDP ports (RFC 5660 §5.3): one socket, many peers. Each remote address and port has a child latch, which
//! is the tag of its datagrams.
//!
//! A datagram may wait in the socket's queue for as long as its reader likes, and says only where it came from. So that nobody takes
//! it for another peer's, of a listener and a remote end there is **one child at a time, and the next one only after the holder has
//! acknowledged the end of the one before** ([`Database::end_child`], then [`Database::release`]). A child that has ended stays,
//! and no packet of its flow passes. The holder acknowledges when nothing is left in its queue that came under it.
//!
//! UDP flows have no end: a child is CLOSED when no packet has come or gone for as long as automatic latches wait.

use std::sync::Arc;
use std::time::Duration;

use ipsec::guard::ClassId;
use ipsec::selector::Flow;

use super::automatic::{ENDING_IDLE, UDP_IDLE};
use super::flow_table::SEEN;
use super::{
    Class, Condition, Control, Database, Latch, LatchError, LatchId, Listener, Listening, MAX_WAITING, OnBreak, Request,
};

const UDP: u8 = 17;

/// Children of one class that a listener may have: one peer does not take the others' places.
const MOST_OF_CLASS: usize = MAX_WAITING / 2;

impl Database {
    /// CREATE_CONNECTION_LATCH for a flow of a UDP listener's socket, which need not connect: its child from now on, as if
    /// the other end had come. The one that the flow has already, if that is as requested.
    pub fn create_child(
        &self,
        listener: LatchId,
        flow: Flow,
        request: &Request,
    ) -> Result<(LatchId, Arc<Class>), LatchError> {
        let mut control = self.control();
        let Some(listening) = control.listeners.get(&listener).filter(|listening| listening.listener.takes(&flow))
        else {
            return Err(LatchError::NotAccepted(flow.to_string()));
        };
        let holder = Arc::clone(&listening.holder);
        if !super::is_connection(&flow) {
            return Err(LatchError::NotAConnection(flow.to_string()));
        }
        if let Ok((id, class)) = control.child(listener, &flow) {
            return request.admits(&flow, &class).map(|()| (id, class));
        }
        if self.yields(&control, &flow).is_none() && control.by_flow.contains_key(&flow) {
            return Err(LatchError::Exists(flow.to_string()));
        }
        let (number, _) = self.offers(&control, &flow, request)?;
        if !control.listeners.get(&listener).is_some_and(|listening| listening.has_room(number)) {
            return Err(LatchError::Full(flow.to_string()));
        }
        self.give_way(&mut control, &flow);
        let latch = self.prepare(&control, flow, request, holder)?;
        let class = Arc::clone(&latch.class);
        let (id, told) = self.insert(&mut control, Latch { listener: Some(listener), ..latch })?;
        self.count_child(&mut control, listener, id);
        drop(control);
        self.observe(&told);
        Ok((id, class))
    }

    /// The child of a UDP listener for a flow: by whom its datagrams come. Fails when there is none, or when it is no longer
    /// ESTABLISHED.
    pub fn child(&self, listener: LatchId, flow: &Flow) -> Result<(LatchId, Arc<Class>), LatchError> {
        self.control().child(listener, flow)
    }

    /// The UDP listener whose child a latch is.
    pub fn parent(&self, child: LatchId) -> Option<LatchId> {
        let control = self.control();
        let is_child = control.datagrams.contains_key(&child);
        control.latches.get(&child).filter(|_| is_child)?.listener
    }

    /// Where a listener latch takes flows from.
    pub fn listener(&self, listener: LatchId) -> Option<Listener> {
        self.control().listeners.get(&listener).map(|listening| listening.listener)
    }

    /// True of a child that will not be ESTABLISHED again, and stays until its holder has acknowledged that.
    pub fn has_ended(&self, child: LatchId) -> bool {
        self.control().latches.get(&child).is_some_and(Latch::has_ended)
    }

    /// The holder has done with a child. True if it had ended: then it may be released. Else it ends now, which the holder is told
    /// like any other end, to be acknowledged.
    pub fn end_child(&self, child: LatchId) -> bool {
        if self.has_ended(child) {
            return true;
        }
        self.end(child, Condition::Closed, "its holder has done with it");
        false
    }

    /// Closes children whose flows have been silent for too long; to be called each time that `elapsed` has gone by.
    pub fn tend_datagrams(&self, elapsed: Duration) {
        let mut control = self.control();
        let Control { datagrams, latches, .. } = &mut *control;
        let mut silent = Vec::new();
        for (id, lasts) in datagrams {
            let Some(latch) = latches.get(id).filter(|latch| !latch.has_ended()) else { continue };
            let spoke = self.flows.take_marks(&latch.flow) & SEEN != 0;
            *lasts = if spoke { Duration::ZERO } else { lasts.saturating_add(elapsed) };
            let limit = if latch.condition == Condition::Established { UDP_IDLE } else { ENDING_IDLE };
            if *lasts >= limit {
                silent.push((*id, format!("silent for {} seconds", limit.as_secs())));
            }
        }
        let closed =
            silent.into_iter().filter_map(|(id, reason)| self.mark(&mut control, id, Condition::Closed, reason));
        let closed: Vec<_> = closed.collect();
        drop(control);
        self.tell(closed);
    }

    /// Before the listener latch is there.
    pub(super) fn prepare_datagrams(&self, control: &mut Control, listener: &Listener) -> Result<(), LatchError> {
        if listener.protocol != UDP {
            return Ok(());
        }
        if self.system_does_esp() {
            let reason = "the kernel does ESP, and nobody sees by which SA a datagram came".to_owned();
            return Err(LatchError::Unenforced { flow: listener.to_string(), reason });
        }
        // What would let datagrams by without a child.
        let automatic: Vec<Flow> = control.by_flow.keys().filter(|flow| listener.takes(flow)).copied().collect();
        automatic.iter().for_each(|flow| self.give_way(control, flow));
        Ok(())
    }

    /// A listener has made a latch.
    pub(super) fn count_child(&self, control: &mut Control, listener: LatchId, child: LatchId) {
        let Some(listening) = control.listeners.get_mut(&listener) else { return };
        listening.waiting += 1;
        if let Some(latch) = control.latches.get(&child).filter(|latch| latch.flow.protocol == UDP) {
            *listening.of_class.entry(latch.number).or_default() += 1;
            control.datagrams.insert(child, Duration::ZERO);
            self.flows.track(&latch.flow, 0);
        }
    }

    /// A UDP listener goes, and its socket with it: its children are nobody's.
    pub(super) fn take_children(&self, control: &mut Control, listener: LatchId) -> Vec<(LatchId, Latch)> {
        let is_its =
            |child: &&LatchId| control.latches.get(child).is_some_and(|latch| latch.listener == Some(listener));
        let children: Vec<LatchId> = control.datagrams.keys().filter(is_its).copied().collect();
        children.into_iter().filter_map(|child| Some((child, self.take_out(control, child)?))).collect()
    }
}

impl Control {
    fn child(&self, listener: LatchId, flow: &Flow) -> Result<(LatchId, Arc<Class>), LatchError> {
        let found = self.by_flow.get(flow).copied().and_then(|id| Some((id, self.latches.get(&id)?)));
        let found = found.filter(|(id, latch)| self.datagrams.contains_key(id) && latch.listener == Some(listener));
        match found {
            None => Err(LatchError::NotAccepted(flow.to_string())),
            Some((_, latch)) if latch.condition != Condition::Established => Err(LatchError::Broken(flow.to_string())),
            Some((id, latch)) => Ok((id, Arc::clone(&latch.class))),
        }
    }

    /// A latch that a listener made has gone, or was taken.
    pub(super) fn discount_child(&mut self, listener: LatchId, child: LatchId, class: ClassId) {
        self.taken(listener);
        if self.datagrams.remove(&child).is_none() {
            return;
        }
        let Some(listening) = self.listeners.get_mut(&listener) else { return };
        match listening.of_class.get_mut(&class) {
            Some(count) if *count > 1 => *count -= 1,
            _ => {
                listening.of_class.remove(&class);
            }
        }
    }
}

impl Listening {
    /// For one more of this class.
    pub(super) fn has_room(&self, class: ClassId) -> bool {
        self.waiting < MAX_WAITING && self.of_class.get(&class).is_none_or(|count| *count < MOST_OF_CLASS)
    }
}

impl Latch {
    /// It will not be ESTABLISHED again, and its holder knows.
    fn has_ended(&self) -> bool {
        match self.condition {
            Condition::Established => false,
            Condition::Conflict | Condition::Policy | Condition::Dead => self.on_break == OnBreak::Reset,
            Condition::Closed => true,
        }
    }
}
