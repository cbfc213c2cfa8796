//! Optional protection (RFC 5660 §3.1): flows that are to be clear although SAs or traps would protect them.
//!
//! A bypass latch has neither peer nor class. Its logical entry of the SPD, for its five-tuple alone, is made of three parts, in
//! this order: the system's barrier lets clear packets pass, the packet check drops what is under an SA, and routing leads packets
//! past the tunnel. All go with the latch, so that what is left of the connection is dropped, and no SA stands in a bypass
//! latch's way, nor it in an SA's.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use ipsec::guard::{LogicalSpd, Passage};
use ipsec::plane::ShuntAction;
use ipsec::selector::{Flow, TrafficSelector};

use super::sas::covers;
use super::{
    Alert, Condition, Control, Database, Holder, LatchError, LatchId, LatchState, Pin, Protector, is_connection,
};

/// A flow that is to be clear.
pub(super) struct Bypass {
    pub(super) flow: Flow,
    pub(super) owner: Option<u32>,
    pub(super) protector: Protector,
    condition: Condition,
    holder: Holder,
}

/// Traffic that no SA is to protect (RFC 4301 §4.4.1: BYPASS and DISCARD).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShuntedTraffic {
    /// What the configuration calls it.
    pub name: String,
    /// What becomes of it.
    pub action: ShuntAction,
    /// Our ends.
    pub local_ts: Vec<TrafficSelector>,
    /// The other ends.
    pub remote_ts: Vec<TrafficSelector>,
}

/// By their numbers in the data plane.
pub(super) type Shunts = BTreeMap<u32, ShuntedTraffic>;

impl Bypass {
    pub(super) fn state(&self) -> LatchState {
        match self.condition {
            Condition::Established => LatchState::Established,
            Condition::Conflict | Condition::Policy | Condition::Dead => LatchState::Broken,
            Condition::Closed => LatchState::Closed,
        }
    }

    fn alert(&self, latch: LatchId, reason: String) -> Alert {
        Alert { latch, flow: self.flow, listener: None, owner: self.owner, state: self.state(), reason }
    }
}

impl Database {
    /// Sets what leads flows past the tunnel; once, before the first latch.
    pub fn set_logical_spd(&self, spd: Arc<dyn LogicalSpd>) {
        // A second one would be a second network of one database.
        let _ = self.spd.set(spd);
    }

    /// Has a flow go in clear whatever SAs and traps say (RFC 5660 §3.1): none of its packets passes under an SA, in either
    /// direction. For whom may override the policy: that is for the caller to know. The flow's latch ends as others do; nothing
    /// else breaks it but a shunt that drops.
    ///
    /// Fails without effect where the flow has a latch, an automatic one included, or its port has a listener latch; and where a
    /// shunt drops it: what is overridden is that it is to be protected.
    pub fn bypass(
        &self,
        flow: Flow,
        owner: Option<u32>,
        holder: Box<dyn Fn(Alert) + Send + Sync>,
    ) -> Result<LatchId, LatchError> {
        if !is_connection(&flow) {
            return Err(LatchError::NotAConnection(flow.to_string()));
        }
        let mut control = self.control();
        let latched = control.by_flow.contains_key(&flow);
        if self.abandoned().contains(&flow) {
            let what = "an earlier latch of it is being wound up".to_owned();
            return Err(LatchError::Policy { flow: flow.to_string(), what });
        }
        if latched || control.listeners.values().any(|listening| listening.listener.takes(&flow)) {
            return Err(LatchError::Exists(flow.to_string()));
        }
        if let Some(shunt) = control.dropping_shunt(&flow) {
            return Err(LatchError::Policy {
                flow: flow.to_string(),
                what: format!("the shunt {} drops it", shunt.name),
            });
        }
        let protector = self.raise_barrier(&flow, Passage::Clear)?;
        self.latched.fetch_add(1, Ordering::SeqCst);
        if self.flows.insert(&flow, Pin::Clear.number()).is_err() {
            self.leave_bypass(&flow);
            return Err(LatchError::Exists(flow.to_string()));
        }
        if let Some(Err(reason)) = self.spd.get().map(|spd| spd.bypass(&flow)) {
            self.flows.remove(&flow);
            self.leave_bypass(&flow);
            return Err(LatchError::Unenforced { flow: flow.to_string(), reason });
        }
        control.last_latch += 1;
        let id = LatchId(control.last_latch);
        let bypass = Bypass { flow, owner, protector, condition: Condition::Established, holder: Arc::from(holder) };
        let told = bypass.alert(id, "in clear".to_owned());
        control.by_flow.insert(flow, id);
        control.bypasses.insert(id, bypass);
        drop(control);
        self.observe(&told);
        Ok(id)
    }

    /// Closes all bypass latches: the daemon ends, and with it what lets these flows go in clear.
    pub fn close_bypasses(&self) {
        let mut control = self.control();
        let all: Vec<LatchId> = control.bypasses.keys().copied().collect();
        let reason = "the daemon ends";
        let closed = all.into_iter().filter_map(|id| self.mark(&mut control, id, Condition::Closed, reason.to_owned()));
        let closed: Vec<_> = closed.collect();
        drop(control);
        self.tell(closed);
    }

    /// Traffic is about to be shunted: breaks the bypass latches whose flows are to be dropped. `number` names it until it is
    /// [`Self::unshunted`].
    pub fn shunted(&self, number: u32, shunt: ShuntedTraffic) {
        let mut control = self.control();
        let mut meant = Vec::new();
        if shunt.action == ShuntAction::Drop {
            let dropped = control.bypasses.iter().filter(|(_, bypass)| shunt.selects(&bypass.flow));
            meant.extend(dropped.map(|(id, _)| *id));
        }
        let reason = format!("the policy has changed: the shunt {} drops it", shunt.name);
        control.shunts.insert(number, shunt);
        let broken: Vec<_> =
            meant.into_iter().filter_map(|id| self.mark(&mut control, id, Condition::Dead, reason.clone())).collect();
        drop(control);
        self.tell(broken);
    }

    /// It is not shunted any more.
    pub fn unshunted(&self, number: u32) {
        self.control().shunts.remove(&number);
    }

    /// Ends or breaks a bypass latch. No packet of it passes from here on, in clear or not.
    pub(super) fn mark_bypass(
        &self,
        bypass: &mut Bypass,
        id: LatchId,
        condition: Condition,
        reason: String,
    ) -> Option<(Holder, Alert)> {
        if bypass.condition >= condition {
            return None;
        }
        let before = bypass.state();
        bypass.condition = condition;
        self.flows.update(&bypass.flow, Pin::Broken.number());
        self.shut_bypass(&bypass.flow);
        (bypass.state() != before).then(|| (Arc::clone(&bypass.holder), bypass.alert(id, reason)))
    }

    /// RELEASE_LATCH of a bypass latch, if there is one of this number.
    pub(super) fn release_bypass(&self, control: &mut Control, id: LatchId) -> Option<Alert> {
        let mut gone = control.bypasses.remove(&id)?;
        control.by_flow.remove(&gone.flow);
        self.shut_bypass(&gone.flow);
        self.flows.remove(&gone.flow);
        self.leave_bypass(&gone.flow);
        gone.condition = Condition::Closed;
        Some(gone.alert(id, "released".to_owned()))
    }

    fn shut_bypass(&self, flow: &Flow) {
        if let Some(Err(reason)) = self.barrier.get().map(|barrier| barrier.set(flow, Passage::None)) {
            tracing::error!(%flow, reason, "closing the system's barrier around a flow that went in clear");
        }
        if let Some(spd) = self.spd.get() {
            spd.remove(flow);
        }
    }

    fn leave_bypass(&self, flow: &Flow) {
        self.latched.fetch_sub(1, Ordering::SeqCst);
        if let Some(barrier) = self.barrier.get() {
            barrier.abandon(flow);
        }
    }
}

impl ShuntedTraffic {
    fn selects(&self, flow: &Flow) -> bool {
        covers(&self.local_ts, &self.remote_ts, flow)
    }
}

impl Control {
    /// A shunt that drops a flow.
    fn dropping_shunt(&self, flow: &Flow) -> Option<&ShuntedTraffic> {
        self.shunts.values().find(|shunt| shunt.action == ShuntAction::Drop && shunt.selects(flow))
    }
}
