//! Latches of flows that nobody asked for (RFC 5660 §2, "SHOULD create IPsec channels automatically by default"; §2.5 for flows of
//! others that pass through): each TCP and UDP flow in the tunnel is pinned to the class of its first SA until it has ended.
//!
//! Nobody sees these flows end but the packet check: a flow has ended when it was silent for as long as its kind may be. There is no
//! socket that could be reset, and no barrier of the system. What passes is never less than without them.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ipsec::guard::{ClassId, Verdict};
use ipsec::selector::Flow;

use super::flow_table::{ENDING, SEEN};
use super::{Condition, Control, Coverage, Database, Latch, LatchId, OnBreak, Protector, is_connection};

/// What a TCP connection may be silent for (RFC 5382 §5, REQ-5).
const TCP_IDLE: Duration = Duration::from_secs(7440);
/// The same after FIN or RST, and of a flow whose latch is not ESTABLISHED any more.
pub(super) const ENDING_IDLE: Duration = Duration::from_secs(240);
/// The same of UDP (RFC 4787 §4.3, REQ-5).
pub(super) const UDP_IDLE: Duration = Duration::from_secs(300);

/// Flows in all.
const MOST: usize = if cfg!(test) { 40 } else { 65_536 };
/// Flows of one class: one peer does not take the others' places.
const MOST_OF_CLASS: usize = MOST / 2;

const TCP: u8 = 6;
const UDP: u8 = 17;

/// How they are made, and how many were not.
pub(super) struct Automatic {
    on_break: OnBreak,
    refused: AtomicU64,
}

/// Those that there are.
#[derive(Default)]
pub(super) struct Standing {
    latches: BTreeMap<LatchId, Silence>,
    of_class: HashMap<ClassId, usize>,
}

#[derive(Clone, Copy, Default)]
struct Silence {
    lasts: Duration,
    /// FIN or RST was seen.
    ends: bool,
}

impl Standing {
    pub(super) fn contains(&self, latch: LatchId) -> bool {
        self.latches.contains_key(&latch)
    }

    pub(super) fn remove(&mut self, latch: LatchId, class: ClassId) {
        if self.latches.remove(&latch).is_none() {
            return;
        }
        match self.of_class.get_mut(&class) {
            Some(count) if *count > 1 => *count -= 1,
            _ => {
                self.of_class.remove(&class);
            }
        }
    }

    fn insert(&mut self, latch: LatchId, class: ClassId) {
        self.latches.insert(latch, Silence::default());
        *self.of_class.entry(class).or_default() += 1;
    }

    fn has_room(&self, class: ClassId) -> bool {
        self.latches.len() < MOST && self.of_class.get(&class).copied().unwrap_or(0) < MOST_OF_CLASS
    }
}

impl Database {
    /// From now on each TCP and UDP flow in the tunnel gets a latch with its first packet, as far as there is room: 65,536 in all,
    /// half of them of one class. `on_break` says what becomes of packets when it breaks; nobody is there who could be reset. Once,
    /// before the first packet.
    pub fn latch_flows(&self, on_break: OnBreak) {
        let on_break = if on_break == OnBreak::Reset { OnBreak::Wait } else { on_break };
        if self.automatic.set(Automatic { on_break, refused: AtomicU64::new(0) }).is_ok() {
            // So that the packet check looks.
            self.latched.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// A packet of a flow without a latch, under an SA.
    pub(super) fn latch_automatically(&self, automatic: &Automatic, flow: &Flow, number: ClassId) -> Verdict {
        if !matches!(flow.protocol, TCP | UDP) || !is_connection(flow) {
            return Verdict::Pass;
        }
        let mut control = self.control();
        // Another thread may have been here.
        if let Some(pin) = self.pin(flow) {
            return pin.verdict(Some(number));
        }
        // RFC 5660 §2.3: none while conflicting SAs exist.
        let alone = matches!(control.coverage(flow), Coverage::One(only) if only == number);
        let class = self.class(number).filter(|_| alone && control.automatic.has_room(number));
        let Some(class) = class else {
            automatic.refused.fetch_add(1, Ordering::Relaxed);
            return Verdict::Pass;
        };
        let latch = Latch {
            flow: *flow,
            number,
            class,
            condition: Condition::Established,
            on_break: automatic.on_break,
            listener: None,
            owner: None,
            protector: Protector::Engine,
            binding: control.binding(flow),
            holder: Arc::new(|_| {}),
        };
        match self.insert(&mut control, latch) {
            Ok((id, _)) => control.automatic.insert(id, number),
            // Its number is another flow's: see `flow_table.rs`.
            Err(_) => return Verdict::Drop,
        }
        self.flows.track(flow);
        Verdict::Pass
    }

    /// A FIN or RST of a flow has passed.
    pub(super) fn note_end(&self, flow: &Flow) {
        if self.automatic.get().is_some() {
            self.flows.mark(flow, ENDING);
        }
    }

    /// Releases automatic latches whose flows have ended; to be called each time that `elapsed` has gone by. Gives the number of
    /// packets since the last time whose flow should have had a latch and got none, for want of room or because SAs of several
    /// classes cover it.
    pub fn tend_automatic(&self, elapsed: Duration) -> u64 {
        let Some(automatic) = self.automatic.get() else { return 0 };
        let mut control = self.control();
        let Control { automatic: standing, latches, .. } = &mut *control;
        let mut ended = Vec::new();
        for (id, silence) in &mut standing.latches {
            let Some(latch) = latches.get(id) else { continue };
            let marks = self.flows.take_marks(&latch.flow);
            silence.ends |= marks & ENDING != 0;
            silence.lasts = if marks & SEEN != 0 { Duration::ZERO } else { silence.lasts.saturating_add(elapsed) };
            let limit = match latch.flow.protocol {
                _ if silence.ends || latch.condition != Condition::Established => ENDING_IDLE,
                TCP => TCP_IDLE,
                _ => UDP_IDLE,
            };
            if silence.lasts >= limit {
                ended.push(*id);
            }
        }
        for id in ended {
            self.take_out(&mut control, id);
        }
        automatic.refused.swap(0, Ordering::Relaxed)
    }

    /// An application asks for a latch of its own. A BROKEN one stays: who it is has changed.
    pub(super) fn give_way(&self, control: &mut Control, flow: &Flow) {
        let Some(id) = control.by_flow.get(flow).copied().filter(|id| control.automatic.contains(*id)) else { return };
        if control.latches.get(&id).is_some_and(|latch| latch.condition == Condition::Established) {
            self.take_out(control, id);
        }
    }
}
