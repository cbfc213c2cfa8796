//! Listener latches where the system does ESP: nobody sees a connection's first packet, so the system's barrier lets each
//! come by the one class that covers it and no other way, and its latch is made afterwards: when it is accepted, now and
//! then, and at the latest before what covers it changes. Until then the barrier keeps it to that class as a latch would.
//!
//! A connection without a latch is thus always one of the class that covers it at the moment, or one that nobody may have.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipsec::guard::{Claim, ClassId, FlowBarrier, Passage, Port};
use ipsec::selector::{Flow, TrafficSelector};

use super::{
    Alert, Class, Condition, Control, Coverage, CoveringSa, Database, Holder, Latch, LatchError, Listener, Listening,
    MAX_WAITING, Newcomer, is_connection,
};
use crate::connections;

/// Tells the TCP and UDP connections of the system.
pub(super) struct Connections(pub(super) Box<dyn Fn() -> io::Result<Vec<Flow>> + Send + Sync>);

impl Default for Connections {
    fn default() -> Self {
        let open = |(flow, progress)| (progress == connections::Progress::Open).then_some(flow);
        Self(Box::new(move || Ok(connections::all()?.into_iter().filter_map(open).collect())))
    }
}

impl Database {
    /// Gives the connections that came to listener latches by way of the system their latches, and tells the holders.
    pub fn find_connections(&self) {
        let mut control = self.control();
        let found = self.find_all(&mut control);
        drop(control);
        self.tell(found);
    }

    /// Takes away the barriers of ports that an earlier process left, and which nobody `uses` any more.
    pub fn lift_abandoned_ports(&self, uses: impl Fn(&Port) -> bool) {
        let Some(barrier) = self.alone() else { return };
        // No listener latch is made meanwhile for one of them.
        let _control = self.control();
        for port in barrier.abandoned_ports().iter().filter(|port| !uses(port)) {
            barrier.lift_port(port);
        }
    }

    /// Ports that an earlier process left.
    pub fn abandoned_ports(&self) -> Vec<Port> {
        self.alone().map(|barrier| barrier.abandoned_ports()).unwrap_or_default()
    }

    /// The barrier, where packets pass that the packet check does not see.
    pub(super) fn alone(&self) -> Option<&dyn FlowBarrier> {
        self.barrier.get().filter(|barrier| barrier.stands_alone()).map(|barrier| &**barrier)
    }

    /// Before the listener latch is there: the port is closed, and so is each connection that it has already.
    pub(super) fn close_port(&self, control: &Control, listener: &Listener) -> Result<(), LatchError> {
        let Some(barrier) = self.alone() else { return Ok(()) };
        let unenforced = |reason| LatchError::Unenforced { flow: listener.to_string(), reason };
        let close = || {
            for port in ports(listener) {
                barrier.set_port(&port, &[])?;
            }
            let connections = (self.connections.0)().map_err(|error| unreadable(&error))?;
            let older = connections.iter().filter(|flow| is_connection(flow) && listener.takes(flow));
            for flow in older.filter(|flow| !control.by_flow.contains_key(flow)) {
                barrier.set(flow, Passage::None)?;
                barrier.abandon(flow);
            }
            Ok(())
        };
        close().map_err(unenforced).inspect_err(|_| self.lift_ports(listener))
    }

    pub(super) fn lift_ports(&self, listener: &Listener) {
        if let Some(barrier) = self.alone() {
            ports(listener).iter().for_each(|port| barrier.lift_port(port));
        }
    }

    /// Tells the barrier who may come to which port.
    pub(super) fn open_ports(&self, control: &Control) {
        let Some(barrier) = self.alone() else { return };
        for (id, listening) in &control.listeners {
            let claims = if listening.shut { Vec::new() } else { self.claims(control, listening) };
            for port in ports(&listening.listener) {
                if let Err(reason) = barrier.set_port(&port, &claims) {
                    tracing::error!(
                        latch = id.0,
                        reason,
                        "the port of a listener latch is not open to all that it could be"
                    );
                }
            }
        }
    }

    fn claims(&self, control: &Control, listening: &Listening) -> Vec<Claim> {
        let mut admitted = HashMap::new();
        let sas = control.sas.all().chain(&control.newcomer);
        let claims = sas.map(|sa| {
            let admits = *admitted.entry(sa.class).or_insert_with(|| self.admits(listening, sa.class));
            Claim {
                passage: if admits { Passage::Class(sa.class) } else { Passage::None },
                local_ts: sa.local_ts.clone(),
                remote_ts: sa.remote_ts.clone(),
            }
        });
        claims.collect()
    }

    fn admits(&self, listening: &Listening, number: ClassId) -> bool {
        let any = if listening.listener.ipv4 { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let Listener { protocol, local, port, .. } = listening.listener;
        let anyone = Flow { protocol, local: local.unwrap_or(any), local_port: port, remote: any, remote_port: 0 };
        self.class(number).is_some_and(|class| listening.request.admits(&anyone, &class).is_ok())
    }

    /// An SA is about to be installed. Connections that its selectors are about, if it is of another class than they came by,
    /// have their latches when this returns, and nobody can come any more by what is disputed.
    pub(super) fn before_newcomer(&self, control: &mut Control, newcomer: CoveringSa) -> Vec<(Holder, Alert)> {
        if self.alone().is_none() {
            return Vec::new();
        }
        let mut meeting = control.sas.meeting(&newcomer.local_ts, &newcomer.remote_ts);
        let disputed = meeting.any(|(_, sa)| sa.class != newcomer.class);
        drop(meeting);
        control.newcomer = Some(newcomer);
        if control.listeners.is_empty() {
            return Vec::new();
        }
        self.open_ports(control);
        if disputed { self.find_all(control) } else { Vec::new() }
    }

    /// An SA with these selectors is about to be negotiated, which `newcomer` would be to those that are there.
    pub(super) fn before_reservation(
        &self,
        control: &mut Control,
        local_ts: &[TrafficSelector],
        remote_ts: &[TrafficSelector],
        newcomer: impl Fn(&Class) -> Newcomer,
    ) -> Vec<(Holder, Alert)> {
        if self.alone().is_none() || control.listeners.is_empty() {
            return Vec::new();
        }
        let disputes =
            |class: ClassId| self.class(class).is_none_or(|class| !matches!(newcomer(&class), Newcomer::Congruent));
        let disputed = control.sas.meeting(local_ts, remote_ts).any(|(_, sa)| disputes(sa.class));
        if disputed { self.find_all(control) } else { Vec::new() }
    }

    /// An SA is about to be forgotten, which the system has no longer.
    pub(super) fn before_removal(&self, control: &mut Control, number: u64) -> Vec<(Holder, Alert)> {
        control.newcomer = None;
        if self.alone().is_none() || control.listeners.is_empty() {
            return Vec::new();
        }
        match control.sas.get(number) {
            Some(sa) if !control.is_covered_alike(number, sa) => self.find_all(control),
            _ => Vec::new(),
        }
    }

    /// Gives all connections their latches that have none; closes those that nobody may have.
    pub(super) fn find_all(&self, control: &mut Control) -> Vec<(Holder, Alert)> {
        let Some(barrier) = self.alone().filter(|_| !control.listeners.is_empty()) else { return Vec::new() };
        let connections = match (self.connections.0)() {
            Ok(connections) => connections,
            Err(error) => {
                self.shut(control, &unreadable(&error));
                return Vec::new();
            }
        };
        let closed: HashSet<Flow> = barrier.abandoned().into_iter().collect();
        let mut found = Vec::new();
        let new = |flow: &Flow| is_connection(flow) && !closed.contains(flow);
        for flow in connections.into_iter().filter(new) {
            if control.by_flow.contains_key(&flow) || !control.listeners.values().any(|it| it.listener.takes(&flow)) {
                continue;
            }
            if let Some(told) = self.adopt(control, &flow) {
                found.push(told);
            } else if let Err(reason) = barrier.set(&flow, Passage::None) {
                self.shut(control, &reason);
            } else {
                barrier.abandon(&flow);
            }
        }
        found
    }

    /// True when a connection was there before the listener latch, or is closed for another reason.
    pub(super) fn is_closed(&self, flow: &Flow) -> bool {
        self.alone().is_some_and(|barrier| barrier.abandoned().contains(flow))
    }

    /// Gives one connection its latch; `None` if it may not be.
    pub(super) fn adopt(&self, control: &mut Control, flow: &Flow) -> Option<(Holder, Alert)> {
        self.alone()?;
        let (parent, listening) = control.listeners.iter().find(|(_, listening)| listening.listener.takes(flow))?;
        let (parent, on_break, holder) = (*parent, listening.request.on_break, Arc::clone(&listening.holder));
        let owner = listening.request.owner;
        let Coverage::One(number) = control.coverage(flow) else { return None };
        let admitted = !listening.shut && self.admits(listening, number) && listening.waiting < MAX_WAITING;
        let class = self.class(number).filter(|_| admitted && is_connection(flow))?;
        let protector = match self.raise_barrier(flow, Passage::Class(number)) {
            Ok(protector) => protector,
            Err(error) => {
                tracing::warn!(%flow, %error, "a connection to a latched port cannot be latched, and is closed");
                return None;
            }
        };
        let latch = Latch {
            flow: *flow,
            number,
            class,
            condition: Condition::Established,
            on_break,
            listener: Some(parent),
            owner,
            protector,
            binding: control.binding(flow),
            holder: Arc::clone(&holder),
        };
        let (id, alert) = self.insert(control, latch).ok()?;
        self.count_child(control, parent, id);
        Some((holder, alert))
    }

    /// For good: whose connections there are is not known.
    fn shut(&self, control: &mut Control, reason: &str) {
        tracing::error!(reason, "nobody gets to the ports of listener latches any more, until they are latched anew");
        for listening in control.listeners.values_mut() {
            listening.shut = true;
        }
        self.open_ports(control);
    }
}

impl Control {
    /// Another SA of the same class covers the same.
    fn is_covered_alike(&self, number: u64, sa: &CoveringSa) -> bool {
        let mut others = self.sas.meeting(&sa.local_ts, &sa.remote_ts).filter(|(other, _)| *other != number);
        others.any(|(_, other)| other == sa)
    }
}

/// The parts of a listener of one family each.
fn ports(listener: &Listener) -> Vec<Port> {
    let Listener { protocol, local, ipv4, ipv6, port: number } = *listener;
    let any = [ipv4.then_some(Ipv4Addr::UNSPECIFIED.into()), ipv6.then_some(Ipv6Addr::UNSPECIFIED.into())];
    let locals = local.map_or_else(|| any.into_iter().flatten().collect(), |local| vec![local]);
    locals.into_iter().map(|local| Port { protocol, local, number }).collect()
}

fn unreadable(error: &io::Error) -> String {
    format!("the system's connections cannot be read: {error}")
}
