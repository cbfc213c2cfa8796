//! Latches of flows that nobody asked for (RFC 5660 §2, "SHOULD create IPsec channels automatically by default"; §2.5 for flows of
//! others that pass through): each TCP and UDP flow in the tunnel is pinned to the class of its first SA until it has ended.
//!
//! Nobody sees these flows end but the packet check: a flow has ended when it was silent for as long as its kind may be. There is no
//! socket that could be reset, and no barrier of the system. What passes is never less than without them.

use std::collections::hash_map::RandomState;
use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasher, Hash};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use ipsec::guard::{ClassId, Verdict};
use ipsec::selector::Flow;

use super::flow_table::{AUTOMATIC, ENDING, SEEN};
use super::{Condition, Control, Coverage, Database, Latch, LatchId, OnBreak, Pin, Protector, is_connection};

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

/// What became of packets, since [`Database::latch_flows`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AutomaticFlows {
    /// Flows that have an automatic latch.
    pub latches: usize,
    /// Packets that passed without, since there was no room for more latches.
    pub without_room: u64,
    /// Packets that passed without, since SAs of several classes cover their flow.
    pub in_conflict: u64,
    /// Packets that such a latch did not let pass.
    pub dropped: u64,
}

/// How they are made, and how many were not.
pub(super) struct Automatic {
    on_break: OnBreak,
    refusals: Refusals,
    counts: Counts,
}

/// Alone in their cache lines: all threads read what is beside them.
#[derive(Default)]
#[repr(align(128))]
struct Counts {
    without_room: AtomicU64,
    in_conflict: AtomicU64,
    dropped: AtomicU64,
}

/// Classes without room and flows in conflict, so that only the first of their packets asks under the lock. They are forgotten when
/// something changes that might let them have a latch: then another turn begins.
struct Refusals {
    slots: Box<[AtomicU64]>,
    turn: AtomicU64,
    hasher: RandomState,
}

impl Refusals {
    fn new() -> Self {
        let slots = (0..REFUSALS).map(|_| AtomicU64::new(0)).collect();
        Self { slots, turn: AtomicU64::new(0), hasher: RandomState::new() }
    }

    fn has(&self, what: impl Hash) -> bool {
        self.slot(what).is_some_and(|(slot, number)| slot.load(Ordering::Relaxed) == number)
    }

    /// To be called under the lock, under which turns begin too.
    fn insert(&self, what: impl Hash) {
        if let Some((slot, number)) = self.slot(what) {
            slot.store(number, Ordering::Relaxed);
        }
    }

    /// Where something would be, and its number in this turn.
    fn slot(&self, what: impl Hash) -> Option<(&AtomicU64, u64)> {
        let number = self.hasher.hash_one((what, self.turn.load(Ordering::Relaxed)));
        let place = usize::try_from(number).unwrap_or_default() % REFUSALS;
        Some((self.slots.get(place)?, number))
    }

    fn begin_anew(&self) {
        self.turn.fetch_add(1, Ordering::Relaxed);
    }
}

/// Places for refusals: flows beyond take each other's.
const REFUSALS: usize = if cfg!(test) { 8 } else { 16_384 };

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

    /// True if it was one of them.
    pub(super) fn remove(&mut self, latch: LatchId, class: ClassId) -> bool {
        if self.latches.remove(&latch).is_none() {
            return false;
        }
        match self.of_class.get_mut(&class) {
            Some(count) if *count > 1 => *count -= 1,
            _ => {
                self.of_class.remove(&class);
            }
        }
        true
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
        if self.automatic.set(Automatic { on_break, refusals: Refusals::new(), counts: Counts::default() }).is_ok() {
            // So that the packet check looks.
            self.latched.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// A packet of a flow without a latch, under an SA.
    pub(super) fn latch_automatically(&self, automatic: &Automatic, flow: &Flow, number: ClassId) -> Verdict {
        if !matches!(flow.protocol, TCP | UDP) || !is_connection(flow) {
            return Verdict::Pass;
        }
        let Automatic { refusals, counts, .. } = automatic;
        let pass_without = |count: &AtomicU64| {
            count.fetch_add(1, Ordering::Relaxed);
            Verdict::Pass
        };
        if refusals.has(number) {
            return pass_without(&counts.without_room);
        }
        if refusals.has((flow, number)) {
            return pass_without(&counts.in_conflict);
        }
        let mut control = self.control();
        // Another thread may have been here.
        if let Some(pinned) = self.flows.get(flow) {
            return self.verdict(pinned, Some(number));
        }
        // RFC 5660 §2.3: none while conflicting SAs exist.
        let alone = matches!(control.coverage(flow), Coverage::One(only) if only == number);
        let Some(class) = self.class(number).filter(|_| alone) else {
            refusals.insert((flow, number));
            return pass_without(&counts.in_conflict);
        };
        if !control.automatic.has_room(number) {
            refusals.insert(number);
            return pass_without(&counts.without_room);
        }
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
        self.flows.track(flow, AUTOMATIC);
        Verdict::Pass
    }

    /// A FIN or RST of a flow has passed.
    pub(super) fn note_end(&self, flow: &Flow) {
        if self.automatic.get().is_some() {
            self.flows.mark(flow, ENDING);
        }
    }

    /// What a packet may do whose flow is pinned to this.
    pub(super) fn verdict(&self, pinned: u64, class: Option<ClassId>) -> Verdict {
        let verdict = Pin::of_number(pinned).verdict(class);
        if verdict != Verdict::Pass
            && pinned & AUTOMATIC != 0
            && let Some(automatic) = self.automatic.get()
        {
            automatic.counts.dropped.fetch_add(1, Ordering::Relaxed);
        }
        verdict
    }

    /// SAs have come or gone, or places have become free.
    pub(super) fn forget_refusals(&self) {
        if let Some(automatic) = self.automatic.get() {
            automatic.refusals.begin_anew();
        }
    }

    /// How many automatic latches there are, and what became of packets; `None` without [`Self::latch_flows`].
    pub fn automatic_flows(&self) -> Option<AutomaticFlows> {
        let Counts { without_room, in_conflict, dropped } = &self.automatic.get()?.counts;
        let count = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Some(AutomaticFlows {
            latches: self.control().automatic.latches.len(),
            without_room: count(without_room),
            in_conflict: count(in_conflict),
            dropped: count(dropped),
        })
    }

    /// Releases automatic latches whose flows have ended; to be called each time that `elapsed` has gone by.
    pub fn tend_automatic(&self, elapsed: Duration) {
        if self.automatic.get().is_none() {
            return;
        }
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
    }

    /// The flow's latch, if an application can have one of its own instead. A BROKEN one stays: who it is has changed.
    pub(super) fn yields(&self, control: &Control, flow: &Flow) -> Option<LatchId> {
        let id = control.by_flow.get(flow).copied().filter(|id| control.automatic.contains(*id))?;
        control.latches.get(&id).filter(|latch| latch.condition == Condition::Established).map(|_| id)
    }

    /// An application asks for a latch of its own.
    pub(super) fn give_way(&self, control: &mut Control, flow: &Flow) {
        if let Some(id) = self.yields(control, flow) {
            self.take_out(control, id);
        }
    }
}
