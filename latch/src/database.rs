//! The latch database (RFC 5660 §2.3): which flows are pinned to which congruence class, and the check of each
//! packet against it. Its only IO is to ask the system for its connections (`ports`).
//!
//! # Invariants
//!
//! * A packet of a latched flow passes only while the latch is ESTABLISHED and only under the latch's class, in
//!   both directions. Without an SA (`None`) it never passes.
//! * A latch never changes its class (RFC 5660 §2, "MUST remain unchanged").
//! * A latch whose SAs have all gone stays ESTABLISHED: its packets are lost until a congruent SA comes
//!   (RFC 5660 §2). This database does not ask for one.
//! * A BROKEN latch returns to ESTABLISHED when nothing conflicts with it any more (RFC 5660 §2.2), unless its
//!   connection was reset ([`OnBreak::Reset`]), its peer is dead or the administrator broke it: then it stays BROKEN
//!   until it is released.
//! * A listener latch gives each new inbound flow to its port a latch before its first packet passes, or drops that
//!   packet. What has no latch does not leave from that port.
//!
//! * A LARVAL latch ([`Database::reserve`]) lets no packet of its flow pass, and belongs to no class yet. One packet of the flow
//!   may be kept, to be checked as any other once the latch is ESTABLISHED (`kept.rs`).
//!
//! * Where the operating system has a barrier ([`FlowBarrier`]), a flow's is up before its latch is there, changes before
//!   its holder hears of the change, and stays after the latch until [`Database::lift_abandoned`].
//!
//! # What a class pins
//!
//! Two [`Class`]es are equal when these are: the peer's identity, our identity, the kind of proof (shared key or
//! certificate), the end-entity certificate and the trust anchor, the mode, the ESP suite with key length and ESN,
//! and whether replay protection is on. RFC 5660 §1 counts the certificate as part of the peer's ID, so a peer that
//! comes back with a renewed certificate is another class. *Not* pinned are the name of the PAD entry and the AUTH
//! method number: the first is a label that an operator may change or double, the second is how the same credential
//! signed this time. Neither is reported to applications, since a later SA of the class may differ in them.
//! A shared key does not enter because nobody outside `pad` knows it: with shared keys the pair of identities is the pin.
//! A peer that has proved nothing (RFC 7619) is the same only within one IKE SA and those that it is rekeyed to.
//!
//! # Locks
//!
//! One mutex orders all control operations, so that nothing happens between looking at the SAs and pinning a flow. An SA
//! that breaks many latches gives it up now and then, and is done only when none is left; SAs are told of one after the other.
//! A packet takes it only to make a latch, of a listener or of itself ([`Database::latch_flows`]). Else it reads one counter, and, if there
//! are latches, one entry of a table without locks (`flow_table.rs`); of a flow without a latch, if there are listener latches, one entry of
//! a sharded map as well.
//! Holders are told with no lock held; they may call back.

mod automatic;
mod datagrams;
mod flow_table;
mod kept;
mod optional;
mod places;
mod ports;
mod sas;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::hash::{Hash, Hasher};
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::Duration;

pub use automatic::AutomaticFlows;
use automatic::{Automatic, Standing};
use dashmap::DashMap;
use dashmap::mapref::entry::Entry;
use flow_table::FlowTable;
use ipsec::guard::{ClassId, Direction, FlowBarrier, FlowGuard, LogicalSpd, Passage, Verdict};
use ipsec::plane::{EspSuite, Mode};
use ipsec::selector::{Flow, TrafficSelector};
use ipsec::transform::{Encr, Integ};
use kept::Kept;
pub use optional::ShuntedTraffic;
use optional::{Bypass, Shunts};
use pad::{EapMethod, Identity, IdentityPattern, PeerIdentity, Proof};
use places::Places;
use sas::{CoveringSa, Sas, covers};

use self::ports::Connections;

/// All that a latch pins (RFC 5660 §2); interned as a [`ClassId`]. The IKE SA does not enter: rekeys and new
/// IKE SAs of the same peer are congruent. What equality compares is in the module's documentation.
#[derive(Clone, Debug)]
pub struct Class {
    /// Both identities and how the peer's was proved.
    pub peer: Arc<PeerIdentity>,
    /// Tunnel or transport.
    pub mode: Mode,
    /// Algorithms.
    pub suite: EspSuite,
    /// Replay protection is on.
    pub replay_protection: bool,
}

/// Number of a latch; never reused in the daemon's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LatchId(pub u64);

/// States of a latch (RFC 5660 §2.2). LARVAL is not among them: such a latch is one that is still to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LatchState {
    /// Of a listener: gives each new flow to its port a latch.
    Listener,
    /// Packets pass under congruent SAs only.
    Established,
    /// A conflict: no packet passes.
    Broken,
    /// Closed by the administrator, no packet passes; or released.
    Closed,
}

/// What keeps a latched flow's packets from going otherwise than the latch says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protector {
    /// The check of each packet in the tunnel. What goes past the tunnel is beyond it.
    Engine,
    /// That, and the system's barrier for what goes past the tunnel, which outlives the daemon.
    EngineAndSystem,
    /// The system's barrier, where the system does ESP.
    System,
    /// That, and it keeps ICMP errors about the flow from its socket that did not come by an SA of the latched class.
    SystemAndFilter,
}

/// What becomes of a connection when its latch breaks (RFC 5660 §5.5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnBreak {
    /// It ends as if the peer had reset it (b).
    #[default]
    Reset,
    /// Packets are lost until the conflict is over (a).
    Wait,
    /// As `Wait`, and the sender hears that the destination is out of reach (c).
    Unreachable,
}

/// What is asked of a latch. The default is any peer under any protection.
#[derive(Clone, Debug)]
pub struct Request {
    /// Whom the peer must have proved to be.
    pub peer: IdentityPattern,
    /// Whom we must have proved to be.
    pub local: Option<IdentityPattern>,
    /// Mode that the SA must have.
    pub mode: Option<Mode>,
    /// Algorithms, one of which the SA must have; empty is any.
    pub suites: Vec<Algorithms>,
    /// The SA must have replay protection.
    pub replay_protection: bool,
    /// What to do when the latch breaks.
    pub on_break: OnBreak,
    /// The user, by number, whose latch it is.
    pub owner: Option<u32>,
}

/// ESP algorithms without the sequence numbers' length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Algorithms {
    /// Cipher.
    pub encr: Encr,
    /// Its key length in bits; 0 if it is fixed.
    pub key_bits: u16,
    /// Integrity algorithm; NONE with a combined-mode cipher.
    pub integ: Integ,
}

/// Where a listener latch takes flows from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listener {
    /// Upper-layer protocol.
    pub protocol: u8,
    /// Our address; `None` is any of the families below.
    pub local: Option<IpAddr>,
    /// IPv4 flows count.
    pub ipv4: bool,
    /// IPv6 flows count.
    pub ipv6: bool,
    /// Our port.
    pub port: u16,
}

/// A latch as it is listed.
#[derive(Clone, Debug)]
pub struct Listed {
    /// Which.
    pub latch: LatchId,
    /// Its state.
    pub state: LatchState,
    /// What it is for.
    pub subject: Subject,
    /// Nobody asked for it ([`Database::latch_flows`]).
    pub automatic: bool,
    /// The user, by number, whose latch it is.
    pub owner: Option<u32>,
    /// The listener latch that made it, until somebody takes it.
    pub listener: Option<LatchId>,
}

/// What a latch is for.
#[derive(Clone, Debug)]
pub enum Subject {
    /// One flow, pinned to a class.
    Connection(Flow, Arc<Class>),
    /// All flows to a port whose peers match.
    Listener(Listener, IdentityPattern),
    /// One flow, which is to be clear.
    Bypass(Flow),
}

/// What an SA that is about to be negotiated would be to a latch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Newcomer {
    /// Of its class, or perhaps.
    Congruent,
    /// Of the same two identities, otherwise protected or proved. If the flow has a narrower SA of its own class, both can live
    /// side by side. Else the newcomer is that SA's successor: without the flow, the latch would soon have no SA at all and its
    /// holder would never know why.
    SamePeer,
    /// Somebody else's.
    Stranger,
}

/// What is told to a latch's holder (ALERT, RFC 5660 §2.3).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Alert {
    /// Which.
    pub latch: LatchId,
    /// Its flow.
    pub flow: Flow,
    /// The listener latch that it came from, until somebody takes it.
    pub listener: Option<LatchId>,
    /// The user, by number, whose latch it is.
    pub owner: Option<u32>,
    /// Its new state.
    pub state: LatchState,
    /// Why, for a human: which identity claimed the flow.
    pub reason: String,
}

/// What applications can bind to an IKE SA (RFC 5056).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bindings {
    /// What is unique to its keys and authentication; none if it was resumed.
    pub unique: Option<[u8; 32]>,
    /// SHA-256 of the keys (SubjectPublicKeyInfo) by which both ends proved themselves; none unless both did by a key pair.
    pub keys: Option<[[u8; 32]; 2]>,
}

/// An SA of somebody who has proved nothing would take what belongs to who has proved something.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the peer has proved nothing, and {0}")]
pub struct Outranked(String);

/// An IP packet as it would go into the tunnel.
pub type InnerPacket = Box<[u8]>;

/// Why a latch was not made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LatchError {
    /// No SA protects the flow.
    #[error("no SA protects {0}")]
    NoSa(String),
    /// The SA's peer is somebody else.
    #[error("the peer of {flow} is {found}, not {wanted}")]
    WrongPeer {
        /// The flow.
        flow: String,
        /// Who it is.
        found: String,
        /// Who was wanted.
        wanted: String,
    },
    /// The SA's protection is not what was asked for.
    #[error("the SA for {flow} has another {what} than wanted")]
    WrongProtection {
        /// The flow.
        flow: String,
        /// What differs.
        what: &'static str,
    },
    /// There is a latch for the flow, or a listener latch for the port, already.
    #[error("{0} is latched already")]
    Exists(String),
    /// The latch that the listener gave the flow is no longer ESTABLISHED.
    #[error("the latch of {0} is broken")]
    Broken(String),
    /// The listener has as many latches as it may, of this peer or of all.
    #[error("there is no room for a latch of {0}")]
    Full(String),
    /// There is no channel binding.
    #[error("no channel binding: {0}")]
    NoBinding(&'static str),
    /// The listener latch has given the flow none.
    #[error("{0} has no latch from this listener")]
    NotAccepted(String),
    /// SAs of other classes cover the flow too (RFC 5660 §2.3, "MUST NOT create").
    #[error("SAs of different peers cover {0}")]
    Conflict(String),
    /// The system does ESP and has no barrier for the flow.
    #[error("the system cannot enforce a latch of {flow}: {reason}")]
    Unenforced {
        /// The flow.
        flow: String,
        /// What is missing.
        reason: String,
    },
    /// The policy is against it.
    #[error("the policy is against it: of {flow}, {what}")]
    Policy {
        /// The flow.
        flow: String,
        /// What it says.
        what: String,
    },
    /// The flow is not one connection: an address is unspecified or multicast, a port is 0, or the families differ.
    #[error("{0} is not one connection")]
    NotAConnection(String),
}

/// The database. All methods take `&self`; packets are checked without a lock held for long.
#[derive(Default)]
pub struct Database {
    /// Numbers of classes. A class stays for the daemon's life: numbers must never be reused (RFC 5660 §2.6), and
    /// only authenticated peers make new ones.
    classes: RwLock<Classes>,
    control: Mutex<Control>,
    /// Length of `flows`, so that a plane without latches pays one load for each packet.
    latched: AtomicUsize,
    /// What the packet path reads: see [`Pin::number`].
    flows: FlowTable,
    /// Flows get latches without being asked for.
    automatic: OnceLock<Automatic>,
    /// How many listener latches there are.
    listening: AtomicUsize,
    /// What the packet path reads of them, by protocol and port. The default hasher is keyed: peers choose ports.
    ports: DashMap<(u8, u16), Vec<Listener>>,
    /// Told of each change of each latch.
    observer: OnceLock<Observer>,
    /// What non-first fragments, which have no ports, are checked against.
    pairs: DashMap<Pair, PairPins>,
    barrier: OnceLock<Arc<dyn FlowBarrier>>,
    spd: OnceLock<Arc<dyn LogicalSpd>>,
    connections: Connections,
    /// What LARVAL flows would have sent.
    kept: Kept,
}

impl Database {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the operating system's barrier around latched flows; once, before the first latch.
    pub fn set_barrier(&self, barrier: Arc<dyn FlowBarrier>) {
        // A second one would be a second network of one database.
        let _ = self.barrier.set(barrier);
    }

    /// True where packets pass that the packet check does not see, and latches stand on the system's barrier alone.
    pub fn system_does_esp(&self) -> bool {
        self.alone().is_some()
    }

    /// Takes away the barriers of flows that are no longer latched, and whose connection `has_ended`.
    pub fn lift_abandoned(&self, has_ended: impl Fn(&Flow) -> bool) {
        let Some(barrier) = self.barrier.get() else { return };
        let ended: Vec<Flow> = barrier.abandoned().into_iter().filter(has_ended).collect();
        // No latch is made meanwhile for one of them.
        let control = self.control();
        for flow in ended.iter().filter(|flow| !control.by_flow.contains_key(flow)) {
            barrier.lift(flow);
        }
    }

    /// Has the system's barrier looked through: others may have taken something away. Breaks for good what passes by it.
    pub fn verify_barrier(&self) {
        let passing = self.barrier.get().map(|barrier| barrier.verify()).unwrap_or_default();
        // The packet check stands where it sees all packets.
        if passing.is_empty() || !self.system_does_esp() {
            return;
        }
        let mut control = self.control();
        let latches: Vec<LatchId> = passing.iter().filter_map(|flow| control.by_flow.get(flow).copied()).collect();
        let reason = "something of the system that is not ours has packets pass by the policies of the latch";
        let broken =
            latches.into_iter().filter_map(|id| self.mark(&mut control, id, Condition::Dead, reason.to_owned()));
        let broken: Vec<_> = broken.collect();
        drop(control);
        self.tell(broken);
    }

    /// Flows that are no longer latched and whose barrier still stands.
    pub fn abandoned(&self) -> Vec<Flow> {
        self.barrier.get().map(|barrier| barrier.abandoned()).unwrap_or_default()
    }

    /// What enforces a connection latch; `None` if there is none of this number.
    pub fn protector(&self, latch: LatchId) -> Option<Protector> {
        let control = self.control();
        let of_bypass = || control.bypasses.get(&latch).map(|bypass| bypass.protector);
        control.latches.get(&latch).map(|latch| latch.protector).or_else(of_bypass)
    }

    /// The number of a class; equal classes have equal numbers, numbers are never reused.
    pub fn intern(&self, class: Class) -> ClassId {
        if let Some(id) = read(&self.classes).numbers.get(&class) {
            return *id;
        }
        let mut classes = self.classes.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(id) = classes.numbers.get(&class) {
            return *id;
        }
        // Number 0 is no class: it is never congruent to a latch, so running out of numbers fails closed.
        let Some(id) = u32::try_from(classes.by_number.len()).ok().and_then(|n| n.checked_add(1)).map(ClassId) else {
            return NO_CLASS;
        };
        let class = Arc::new(class);
        classes.by_number.push(Arc::clone(&class));
        classes.by_ends.entry(class.ends().into()).or_default().push(id);
        classes.numbers.insert(class, id);
        id
    }

    /// What a number stands for.
    pub fn class(&self, id: ClassId) -> Option<Arc<Class>> {
        let index = usize::try_from(id.0.checked_sub(1)?).ok()?;
        read(&self.classes).by_number.get(index).cloned()
    }

    /// Before an SA goes in: breaks each ESTABLISHED latch whose flow the selectors cover and whose class
    /// differs, tells its holder, and returns what it told. When it returns, no packet of those flows passes
    /// (RFC 5660 §2.3: break and inform *prior to accepting* the SA).
    ///
    /// A packet that passed the check before may still be on its way, for some tenths of a second at most, to or from the
    /// SA of the latch's own class: never one of the newcomer, whose packets are all checked after this.
    ///
    /// Looks at the ESTABLISHED latches of other classes to the addresses that the selectors cover, and at no others. Where many break,
    /// they do so some at a time, so that others may use the database meanwhile: a latch that is made then, and which the SA would
    /// betray, breaks too.
    ///
    /// What nobody in particular (RFC 7619) asks for breaks no latch, and takes no traffic, of a peer that has proved who it is: that
    /// is refused without effect, and the SA must not go in.
    pub fn before_install(
        &self,
        class: ClassId,
        local_ts: &[TrafficSelector],
        remote_ts: &[TrafficSelector],
    ) -> Result<Vec<Alert>, Outranked> {
        let mut control = self.control();
        let newcomer = CoveringSa { class, local_ts: local_ts.to_vec(), remote_ts: remote_ts.to_vec() };
        self.rank(&control, &newcomer)?;
        let found = self.before_newcomer(&mut control, newcomer.clone());
        let (mut control, broken) = self.break_conflicting(control, &newcomer, found);
        if !broken.is_empty() {
            control.stale.push(newcomer.remote_ts);
        }
        Ok(broken)
    }

    /// The SAs of nobody in particular that select packets of an SA which is about to go in: if its peer has proved who it is, they have
    /// to go before (RFC 7619 §3.3), since what is selected more narrowly would be theirs still.
    pub fn outranked(
        &self,
        class: ClassId,
        local_ts: &[TrafficSelector],
        remote_ts: &[TrafficSelector],
    ) -> BTreeSet<u64> {
        if !self.is_authenticated(class) {
            return BTreeSet::new();
        }
        let newcomer = CoveringSa { class, local_ts: local_ts.to_vec(), remote_ts: remote_ts.to_vec() };
        let control = self.control();
        let overlapping = control.sas.overlapping(&newcomer);
        let is_nobody_s = |class| self.class(class).is_some_and(|class| !class.is_authenticated());
        overlapping.filter(|(_, sa)| is_nobody_s(sa.class)).map(|(sa, _)| sa).collect()
    }

    fn is_authenticated(&self, class: ClassId) -> bool {
        self.class(class).is_some_and(|class| class.is_authenticated())
    }

    fn rank(&self, control: &Control, newcomer: &CoveringSa) -> Result<(), Outranked> {
        if self.class(newcomer.class).is_none_or(|class| class.is_authenticated()) {
            return Ok(());
        }
        let ranks = |class| self.is_authenticated(class);
        if let Some(latch) = control.within(&newcomer.remote_ts, ranks).find(|latch| newcomer.covers(&latch.flow)) {
            return Err(Outranked(format!("{} is latched to {}", latch.flow, latch.class.peer.id)));
        }
        let overlapping = control.sas.overlapping(newcomer);
        match overlapping.filter_map(|(_, sa)| self.class(sa.class)).find(|class| class.is_authenticated()) {
            Some(owner) => Err(Outranked(format!("an SA of {} is for its traffic", owner.peer.id))),
            None => Ok(()),
        }
    }

    /// Before an SA is negotiated: the flows within its selectors that it would betray and that it need not have, to be left
    /// out by narrowing (RFC 5660 §2.3, RFC 7296 §2.9). `newcomer` says what it would be to a latch of a class.
    ///
    /// Not those that the latch's own peer takes back, see [`Newcomer::SamePeer`]; and none whose latch will not stand again.
    pub fn reserved(
        &self,
        local_ts: &[TrafficSelector],
        remote_ts: &[TrafficSelector],
        newcomer: impl Fn(&Class) -> Newcomer,
    ) -> Vec<Flow> {
        let mut control = self.control();
        let found = self.before_reservation(&mut control, local_ts, remote_ts, &newcomer);
        let concerned = |class| self.class(class).is_none_or(|class| newcomer(&class) != Newcomer::Congruent);
        let latches = control.within(remote_ts, concerned).filter(|latch| {
            (latch.condition == Condition::Established || latch.recovers())
                && covers(local_ts, remote_ts, &latch.flow)
                && match newcomer(&latch.class) {
                    Newcomer::Congruent => false,
                    Newcomer::SamePeer => control.has_its_own(latch, local_ts, remote_ts),
                    Newcomer::Stranger => true,
                }
        });
        let reserved = latches.map(|latch| latch.flow).collect();
        drop(control);
        self.tell(found);
        reserved
    }

    /// What applications can bind to the IKE SA of an SA that is about to be installed; forgotten when it is `removed`.
    pub fn bound(&self, sa: u64, bindings: Bindings) {
        self.control().bindings.insert(sa, bindings);
    }

    /// The unique channel binding of a connection latch (RFC 5056): that of the IKE SA which protected the flow when the
    /// latch was made. It stays the same for as long as the latch stands, whatever SAs come after.
    pub fn channel_binding(&self, latch: LatchId) -> Result<[u8; 32], LatchError> {
        self.established(latch)?.unique.map_err(LatchError::NoBinding)
    }

    /// Likewise the keys for its end-point channel binding.
    pub fn endpoint_keys(&self, latch: LatchId) -> Result<[[u8; 32]; 2], LatchError> {
        self.established(latch)?.keys.map_err(LatchError::NoBinding)
    }

    fn established(&self, latch: LatchId) -> Result<Bound, LatchError> {
        match self.control().latches.get(&latch) {
            None => Err(LatchError::NoBinding("there is no such latch")),
            Some(latch) if latch.condition != Condition::Established => {
                Err(LatchError::NoBinding("the latch is not established"))
            }
            Some(latch) => Ok(latch.binding),
        }
    }

    /// The SA is in; `sa` is any number that names it until `removed`. A number that is in use is replaced.
    ///
    /// Breaks and tells as [`Database::before_install`] does: a latch may have been created in between, when the
    /// SA was not yet known here. Or says that the SA has to go: then it is not known here still.
    pub fn installed(
        &self,
        sa: u64,
        class: ClassId,
        local_ts: Vec<TrafficSelector>,
        remote_ts: Vec<TrafficSelector>,
    ) -> Result<(), Outranked> {
        let newcomer = CoveringSa { class, local_ts, remote_ts };
        let mut control = self.control();
        if let Err(outranked) = self.rank(&control, &newcomer) {
            control.newcomer = None;
            return Err(outranked);
        }
        let found = self.before_newcomer(&mut control, newcomer.clone());
        let (mut control, _) = self.break_conflicting(control, &newcomer, found);
        control.newcomer = None;
        control.stale.retain(|remote_ts| *remote_ts != newcomer.remote_ts);
        let replaced = control.sas.get(sa).map(|sa| sa.remote_ts.clone());
        control.stale.extend(replaced);
        control.sas.insert(sa, newcomer);
        self.forget_refusals();
        Ok(())
    }

    /// The SA is gone, or was not installed after all. Latches stay: their packets are lost until a congruent SA comes
    /// (RFC 5660 §2). Those that wait for this SA to go are ESTABLISHED again; latches to other addresses are not looked at.
    pub fn removed(&self, sa: u64) {
        let mut control = self.control();
        let found = self.before_removal(&mut control, sa);
        let mut stale = std::mem::take(&mut control.stale);
        stale.extend(control.sas.get(sa).map(|sa| sa.remote_ts.clone()));
        control.sas.remove(sa);
        self.forget_refusals();
        control.bindings.remove(&sa);
        self.open_ports(&control);
        let waiting = control.fallen.within(&stale.concat(), |_| true);
        let restored = self.restore(&mut control, waiting);
        drop(control);
        self.tell(found);
        self.tell(restored);
    }

    /// The peer of this class does not answer any more (RFC 5660 §2.2, DPD): breaks its latches for good, unless it has
    /// SAs that live. To be called after `removed`.
    pub fn peer_is_dead(&self, class: ClassId) {
        let Some(dead) = self.class(class) else { return };
        let (control, classes) = (self.control(), self.between_the_ends_of(&dead));
        if !classes.iter().any(|class| control.sas.has(*class)) {
            self.lose(control, &classes, &format!("{} is dead", dead.peer.id));
        }
    }

    /// The peer of this class has lost all that it knew of us (RFC 5660 §2, "has rebooted"): breaks its latches for good,
    /// since its ends of their connections are no more.
    pub fn peer_restarted(&self, class: ClassId) {
        if let Some(restarted) = self.class(class) {
            let classes = self.between_the_ends_of(&restarted);
            self.lose(self.control(), &classes, &format!("{} has restarted", restarted.peer.id));
        }
    }

    /// All classes of the same two ends.
    fn between_the_ends_of(&self, class: &Class) -> Vec<ClassId> {
        read(&self.classes).by_ends.get(&Ends::from(class.ends())).cloned().unwrap_or_default()
    }

    fn lose(&self, mut control: MutexGuard<'_, Control>, classes: &[ClassId], reason: &str) {
        let found = self.find_all(&mut control);
        let mut ids: Vec<LatchId> =
            classes.iter().flat_map(|class| control.standing.of(*class).chain(control.fallen.of(*class))).collect();
        ids.sort_unstable();
        let broken: Vec<_> =
            ids.into_iter().filter_map(|id| self.mark(&mut control, id, Condition::Dead, reason.to_owned())).collect();
        drop(control);
        self.tell(found);
        self.tell(broken);
    }

    /// The policy has changed (RFC 5660 §2.2, SPD conflict): `conflict` says why a flow may no longer be protected as
    /// it is latched, or `None`. Breaks what conflicts, restores what does not any more.
    pub fn policy_changed(&self, conflict: impl Fn(&Flow, &Class) -> Option<String>) {
        let mut control = self.control();
        let found = self.find_all(&mut control);
        let conflicts: Vec<_> = control
            .latches
            .iter()
            .filter_map(|(id, latch)| Some((*id, conflict(&latch.flow, &latch.class)?)))
            .collect();
        let kept: BTreeSet<LatchId> = conflicts.iter().map(|(id, _)| *id).collect();
        let mut changed: Vec<_> = conflicts
            .into_iter()
            .filter_map(|(id, reason)| self.mark(&mut control, id, Condition::Policy, reason))
            .collect();
        for id in control.recoverable.clone() {
            match control.latches.get_mut(&id) {
                // Pins are those of before: another reason to be BROKEN may be left.
                Some(latch) if latch.condition == Condition::Policy && !kept.contains(&id) => {
                    latch.condition = Condition::Conflict;
                }
                _ => {}
            }
        }
        let waiting = control.recoverable.iter().copied().collect();
        changed.extend(self.restore(&mut control, waiting));
        drop(control);
        self.tell(found);
        self.tell(changed);
    }

    /// The administrator breaks a latch for good (RFC 5660 §6.2); false if there is no such connection latch.
    pub fn break_latch(&self, latch: LatchId, reason: &str) -> bool {
        self.end(latch, Condition::Dead, reason)
    }

    /// The administrator closes a latch: CLOSED until its holder releases it; false if there is no such connection latch.
    pub fn close(&self, latch: LatchId, reason: &str) -> bool {
        self.end(latch, Condition::Closed, reason)
    }

    /// The connections of these latches have ended while their holders kept the sockets (RFC 5660 §2.3): CLOSED until they
    /// release them.
    pub fn ended(&self, latches: &[LatchId]) {
        for latch in latches {
            self.end(*latch, Condition::Closed, ENDED);
        }
    }

    fn end(&self, latch: LatchId, condition: Condition, reason: &str) -> bool {
        let mut control = self.control();
        let exists = control.latches.contains_key(&latch) || control.bypasses.contains_key(&latch);
        let ended = self.mark(&mut control, latch, condition, reason.to_owned());
        drop(control);
        self.tell(ended.into_iter().collect());
        exists
    }

    /// CREATE_CONNECTION_LATCH (RFC 5660 §2.3): pins `flow` to the class of the SA that covers it, if it is as
    /// requested. Alerts go to `holder`, from inside the calls that change the latch; it must not block, and runs on the key
    /// manager's thread. An alert may still arrive while another thread is inside `release`.
    ///
    /// Fails without effect when no SA covers the flow, when SAs of several classes do, when the peer is another
    /// one, or when the flow has a latch already, BROKEN ones included.
    pub fn create(
        &self,
        flow: Flow,
        request: &Request,
        holder: Box<dyn Fn(Alert) + Send + Sync>,
    ) -> Result<(LatchId, Arc<Class>), LatchError> {
        if !is_connection(&flow) {
            return Err(LatchError::NotAConnection(flow.to_string()));
        }
        let mut control = self.control();
        self.give_way_to(&mut control, &flow, request)?;
        if control.by_flow.contains_key(&flow) {
            return Err(LatchError::Exists(flow.to_string()));
        }
        let latch = self.prepare(&control, flow, request, Arc::from(holder))?;
        let class = Arc::clone(&latch.class);
        let (id, told) = self.insert(&mut control, latch)?;
        drop(control);
        self.observe(&told);
        Ok((id, class))
    }

    /// Makes a LARVAL latch (RFC 5660 §2.3): no packet of `flow` passes until [`Self::establish`], for which there is no SA
    /// yet, or [`Self::release`]. It is neither listed nor found, and no SA conflicts with it.
    ///
    /// Fails when the flow has a latch already, and where the system does ESP and has no barrier for it.
    pub fn reserve(&self, flow: Flow) -> Result<LatchId, LatchError> {
        if !is_connection(&flow) {
            return Err(LatchError::NotAConnection(flow.to_string()));
        }
        let mut control = self.control();
        self.give_way(&mut control, &flow);
        if control.by_flow.contains_key(&flow) {
            return Err(LatchError::Exists(flow.to_string()));
        }
        self.raise_barrier(&flow, Passage::Larval)?;
        self.pin_new(&flow, Pin::Broken)?;
        control.last_latch += 1;
        let id = LatchId(control.last_latch);
        control.by_flow.insert(flow, id);
        control.larval.insert(id, flow);
        self.kept.expect(flow);
        Ok(id)
    }

    /// Makes a LARVAL latch ESTABLISHED as [`Self::create`] does, or fails without effect: it is LARVAL still. Gives the
    /// packet that its flow would have sent last, to be sent now.
    pub fn establish(
        &self,
        latch: LatchId,
        request: &Request,
        holder: Box<dyn Fn(Alert) + Send + Sync>,
    ) -> Result<(Arc<Class>, Option<InnerPacket>), LatchError> {
        let mut control = self.control();
        let Some(flow) = control.larval.get(&latch).copied() else {
            return Err(LatchError::NotAccepted(format!("the flow of latch {}", latch.0)));
        };
        let made = self.prepare(&control, flow, request, Arc::from(holder))?;
        control.larval.remove(&latch);
        let (pin, class) = (made.pin(), Arc::clone(&made.class));
        let told = made.alert(latch, LatchState::Established, format!("the peer is {}", class.peer.id));
        control.standing.insert(made.number, flow.remote, latch);
        control.latches.insert(latch, made);
        self.repin(&flow, Pin::Broken, pin);
        // After that: what comes now passes by itself.
        let packet = self.kept.take(&flow);
        drop(control);
        self.observe(&told);
        Ok((class, packet))
    }

    /// CREATE_LISTENER_LATCH (RFC 5660 §2.3): from now on each new inbound flow to the port is latched to the class that
    /// its first packet came under, if that is as requested and no SA conflicts, and else does not get in. `holder` is
    /// told of each, from inside the packet check: it must not block.
    ///
    /// Fails when another listener latch is for the same port of the same address.
    pub fn create_listener(
        &self,
        listener: Listener,
        request: Request,
        holder: Box<dyn Fn(Alert) + Send + Sync>,
    ) -> Result<LatchId, LatchError> {
        let mut control = self.control();
        if control.listeners.values().any(|other| other.listener.meets(&listener)) {
            return Err(LatchError::Exists(listener.to_string()));
        }
        self.prepare_datagrams(&mut control, &listener)?;
        self.close_port(&control, &listener)?;
        control.last_latch += 1;
        let id = LatchId(control.last_latch);
        let listening = Listening {
            listener,
            request,
            holder: Arc::from(holder),
            waiting: 0,
            of_class: HashMap::new(),
            shut: false,
        };
        control.listeners.insert(id, listening);
        // The counter first, as in `insert`.
        self.latched.fetch_add(1, Ordering::SeqCst);
        self.listening.fetch_add(1, Ordering::SeqCst);
        self.ports.entry((listener.protocol, listener.port)).or_default().push(listener);
        self.open_ports(&control);
        Ok(id)
    }

    /// Takes the latch that a listener latch gave a flow; from now on it is `holder`'s. Fails without effect when there is
    /// none that nobody has taken, or when it is no longer ESTABLISHED.
    pub fn accept(
        &self,
        listener: LatchId,
        flow: &Flow,
        owner: Option<u32>,
        holder: Box<dyn Fn(Alert) + Send + Sync>,
    ) -> Result<(LatchId, Arc<Class>), LatchError> {
        let mut control = self.control();
        let is_new = !control.by_flow.contains_key(flow) && !self.is_closed(flow);
        let adopted = is_new.then(|| self.adopt(&mut control, flow)).flatten();
        let accepted = self.take(&mut control, listener, flow, owner, holder);
        drop(control);
        self.tell(adopted.into_iter().collect());
        accepted
    }

    fn take(
        &self,
        control: &mut Control,
        listener: LatchId,
        flow: &Flow,
        owner: Option<u32>,
        holder: Box<dyn Fn(Alert) + Send + Sync>,
    ) -> Result<(LatchId, Arc<Class>), LatchError> {
        let id = control.by_flow.get(flow).copied().filter(|id| !control.datagrams.contains_key(id));
        let found = id.and_then(|id| Some((id, control.latches.get_mut(&id)?)));
        let Some((id, latch)) = found.filter(|(_, latch)| latch.listener == Some(listener)) else {
            return Err(LatchError::NotAccepted(flow.to_string()));
        };
        if latch.condition != Condition::Established {
            return Err(LatchError::Broken(flow.to_string()));
        }
        latch.listener = None;
        latch.owner = owner;
        latch.holder = Arc::from(holder);
        let class = Arc::clone(&latch.class);
        control.taken(listener);
        Ok((id, class))
    }

    /// What becomes of the connections of a listener latch when theirs break.
    pub fn listener_disposition(&self, listener: LatchId) -> Option<OnBreak> {
        self.control().listeners.get(&listener).map(|listening| listening.request.on_break)
    }

    /// Latches that listener latches made and nobody has taken. Who serves listeners releases those whose flow has no
    /// connection any more.
    pub fn unaccepted(&self) -> Vec<(LatchId, Flow)> {
        let control = self.control();
        let waiting = control.latches.iter().filter(|(_, latch)| latch.listener.is_some());
        waiting.map(|(id, latch)| (*id, latch.flow)).collect()
    }

    /// RELEASE_LATCH (RFC 5660 §2.3). From here on the flow's packets pass as those of any unlatched flow: the caller
    /// makes sure first that no connection is left that could send or take them. Of a listener latch: no new flows; latches
    /// that it made stay, but for those of UDP, which have no other socket. Unknown numbers are ignored.
    pub fn release(&self, latch: LatchId) {
        let mut control = self.control();
        let found = if control.listeners.contains_key(&latch) { self.find_all(&mut control) } else { Vec::new() };
        let children = self.take_children(&mut control, latch);
        if let Some(gone) = control.listeners.remove(&latch) {
            self.lift_ports(&gone.listener);
            let port = (gone.listener.protocol, gone.listener.port);
            if let Entry::Occupied(mut entry) = self.ports.entry(port) {
                entry.get_mut().retain(|listener| *listener != gone.listener);
                if entry.get().is_empty() {
                    entry.remove();
                }
            }
            self.listening.fetch_sub(1, Ordering::SeqCst);
            self.latched.fetch_sub(1, Ordering::SeqCst);
            drop(control);
            self.tell(found);
            for (id, child) in children {
                self.observe(&child.alert(id, LatchState::Closed, "released with its listener".to_owned()));
            }
            return;
        }
        if let Some(flow) = control.larval.remove(&latch) {
            control.by_flow.remove(&flow);
            self.kept.take(&flow);
            self.unpin(&flow, Pin::Broken);
            return;
        }
        if let Some(told) = self.release_bypass(&mut control, latch) {
            drop(control);
            self.observe(&told);
            return;
        }
        let Some(gone) = self.take_out(&mut control, latch) else { return };
        drop(control);
        self.observe(&gone.alert(latch, LatchState::Closed, "released".to_owned()));
    }

    fn take_out(&self, control: &mut Control, latch: LatchId) -> Option<Latch> {
        let gone = control.latches.remove(&latch)?;
        control.by_flow.remove(&gone.flow);
        control.standing.remove(gone.number, gone.flow.remote, latch);
        control.fallen.remove(gone.number, gone.flow.remote, latch);
        control.recoverable.remove(&latch);
        if control.automatic.remove(latch, gone.number) {
            self.forget_refusals();
        }
        if let Some(listener) = gone.listener {
            control.discount_child(listener, latch, gone.number);
        }
        self.unpin(&gone.flow, gone.pin());
        Some(gone)
    }

    /// The class of the SAs that cover a flow, whether latched or not (INQUIRE): who is at the other end. `None`
    /// when no SA covers it, and also when SAs of several classes do: then nobody can say.
    pub fn peer_of(&self, flow: &Flow) -> Option<Arc<Class>> {
        let coverage = self.control().coverage(flow);
        match coverage {
            Coverage::One(number) => self.class(number),
            Coverage::None | Coverage::Several => None,
        }
    }

    /// Numbers of the SAs that cover a flow, as `installed` was given them.
    pub fn sas_of(&self, flow: &Flow) -> Vec<u64> {
        let mut sas: Vec<u64> = self.control().sas.covering(flow).map(|(number, _)| number).collect();
        // One with several subnets is found several times.
        sas.sort_unstable();
        sas.dedup();
        sas
    }

    /// The number of a class that has one.
    pub fn number_of(&self, class: &Class) -> Option<ClassId> {
        read(&self.classes).numbers.get(class).copied()
    }

    /// True when no SA covers a flow.
    pub fn is_uncovered(&self, flow: &Flow) -> bool {
        matches!(self.control().coverage(flow), Coverage::None)
    }

    /// FIND_LATCH and INQUIRE_LATCH (RFC 5660 §2.3): the latch of a flow.
    pub fn find(&self, flow: &Flow) -> Option<(LatchId, LatchState, Arc<Class>)> {
        let control = self.control();
        let id = *control.by_flow.get(flow)?;
        let latch = control.latches.get(&id)?;
        Some((id, latch.state(), Arc::clone(&latch.class)))
    }

    /// A latch by its number.
    pub fn inquire(&self, latch: LatchId) -> Option<Listed> {
        self.list_after(LatchId(latch.0.checked_sub(1)?), 1).pop().filter(|listed| listed.latch == latch)
    }

    /// The latch of a flow that is to be clear.
    pub fn find_bypass(&self, flow: &Flow) -> Option<(LatchId, LatchState)> {
        let control = self.control();
        let id = *control.by_flow.get(flow)?;
        Some((id, control.bypasses.get(&id)?.state()))
    }

    /// All connection latches by number, but for automatic ones and bypasses.
    pub fn list(&self) -> Vec<(LatchId, Flow, LatchState, Arc<Class>)> {
        let control = self.control();
        let latches = control.latches.iter().filter(|(id, _)| !control.automatic.contains(**id));
        latches.map(|(id, latch)| (*id, latch.flow, latch.state(), Arc::clone(&latch.class))).collect()
    }

    /// All bypass latches by number.
    pub fn bypasses(&self) -> Vec<(LatchId, Flow)> {
        self.control().bypasses.iter().map(|(id, bypass)| (*id, bypass.flow)).collect()
    }

    /// At most `limit` latches, listener latches included, with numbers above `after`, by number.
    pub fn list_after(&self, after: LatchId, limit: usize) -> Vec<Listed> {
        let control = self.control();
        let above = (std::ops::Bound::Excluded(after), std::ops::Bound::Unbounded);
        let connections = control.latches.range(above).take(limit).map(|(id, latch)| Listed {
            latch: *id,
            state: latch.state(),
            subject: Subject::Connection(latch.flow, Arc::clone(&latch.class)),
            automatic: control.automatic.contains(*id),
            owner: latch.owner,
            listener: latch.listener,
        });
        let listeners = control.listeners.range(above).take(limit).map(|(id, listening)| Listed {
            latch: *id,
            state: LatchState::Listener,
            subject: Subject::Listener(listening.listener, listening.request.peer.clone()),
            automatic: false,
            owner: listening.request.owner,
            listener: None,
        });
        let bypasses = control.bypasses.range(above).take(limit).map(|(id, bypass)| Listed {
            latch: *id,
            state: bypass.state(),
            subject: Subject::Bypass(bypass.flow),
            listener: None,
            automatic: false,
            owner: bypass.owner,
        });
        let mut listed: Vec<Listed> = connections.chain(listeners).chain(bypasses).collect();
        drop(control);
        listed.sort_by_key(|listed| listed.latch);
        listed.truncate(limit);
        listed
    }

    /// Sets who is told of each change of each latch, after its holder; once. It must not block.
    pub fn observe_with(&self, observer: Box<dyn Fn(&Alert) + Send + Sync>) {
        // A second observer would be a second server of one database.
        let _ = self.observer.set(Observer(observer));
    }

    fn control(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Breaks what an SA conflicts with, some at a time: marks them, so that their packets are dropped, then tells the holders with
    /// no lock held. When it returns, nothing that conflicts is ESTABLISHED, and will not be for as long as the lock is held. What was
    /// `found` is told before all.
    fn break_conflicting<'a>(
        &'a self,
        mut control: MutexGuard<'a, Control>,
        newcomer: &CoveringSa,
        mut found: Vec<(Holder, Alert)>,
    ) -> (MutexGuard<'a, Control>, Vec<Alert>) {
        let class = self.class(newcomer.class);
        let mut told = Vec::new();
        loop {
            let standing = control.standing.within(&newcomer.remote_ts, |class| class != newcomer.class);
            let covered = |id: &LatchId| control.latches.get(id).is_some_and(|latch| newcomer.covers(&latch.flow));
            let conflicting: Vec<LatchId> = standing.into_iter().filter(covered).collect();
            if conflicting.is_empty() && found.is_empty() {
                return (control, told);
            }
            for step in conflicting.chunks(STEP) {
                let mut broken = Vec::new();
                for id in step {
                    let Some(latch) = control.latches.get(id) else { continue };
                    let reason = reason(&latch.flow, &latch.class, class.as_deref());
                    broken.extend(self.mark(&mut control, *id, Condition::Conflict, reason));
                }
                drop(control);
                self.tell(std::mem::take(&mut found));
                told.extend(self.tell(broken));
                control = self.control();
            }
            if !found.is_empty() {
                drop(control);
                self.tell(std::mem::take(&mut found));
                control = self.control();
            }
        }
    }

    /// Ends or breaks a latch, packets first; what is to be told, if its state is another one now. What is worse stays.
    fn mark(
        &self,
        control: &mut Control,
        id: LatchId,
        condition: Condition,
        reason: String,
    ) -> Option<(Holder, Alert)> {
        if let Some(bypass) = control.bypasses.get_mut(&id) {
            return self.mark_bypass(bypass, id, condition, reason);
        }
        let latch = control.latches.get_mut(&id)?;
        if latch.condition >= condition {
            return None;
        }
        let before = latch.state();
        self.set(latch, condition);
        if latch.recovers() {
            control.recoverable.insert(id);
        } else {
            control.recoverable.remove(&id);
        }
        control.standing.remove(latch.number, latch.flow.remote, id);
        control.fallen.insert(latch.number, latch.flow.remote, id);
        let state = latch.state();
        (state != before).then(|| (Arc::clone(&latch.holder), latch.alert(id, state, reason)))
    }

    /// Of these latches, restores those that no SA conflicts with any more, except those that the policy broke.
    fn restore(&self, control: &mut Control, waiting: Vec<LatchId>) -> Vec<(Holder, Alert)> {
        let mut restored = Vec::new();
        for id in waiting {
            let Some(latch) = control.latches.get(&id).filter(|_| control.recoverable.contains(&id)) else { continue };
            let clear = match control.coverage(&latch.flow) {
                Coverage::None => true,
                Coverage::One(number) => number == latch.number,
                Coverage::Several => false,
            };
            let allowed = latch.condition == Condition::Conflict;
            if let Some(latch) = control.latches.get_mut(&id).filter(|_| clear && allowed) {
                self.set(latch, Condition::Established);
                control.recoverable.remove(&id);
                control.fallen.remove(latch.number, latch.flow.remote, id);
                control.standing.insert(latch.number, latch.flow.remote, id);
                let reason = "nothing conflicts with it any more".to_owned();
                restored.push((Arc::clone(&latch.holder), latch.alert(id, LatchState::Established, reason)));
            }
        }
        restored
    }

    fn set(&self, latch: &mut Latch, condition: Condition) {
        let before = latch.pin();
        latch.condition = condition;
        self.repin(&latch.flow, before, latch.pin());
        if let Some(barrier) = self.barrier.get().filter(|_| latch.protector != Protector::Engine) {
            let passage = match condition {
                Condition::Established => Passage::Class(latch.number),
                _ => Passage::None,
            };
            if let Err(reason) = barrier.set(&latch.flow, passage) {
                // The one before holds: at most, packets of the latched class pass.
                tracing::error!(flow = %latch.flow, reason, "changing the system's barrier around a latched flow");
            }
        }
    }

    /// Before a flow's latch is there. Where the packet check sees all packets, it is enough without.
    fn raise_barrier(&self, flow: &Flow, passage: Passage) -> Result<Protector, LatchError> {
        let Some(barrier) = self.barrier.get() else { return Ok(Protector::Engine) };
        match barrier.set(flow, passage) {
            Ok(()) if barrier.stands_alone() && barrier.holds_back_errors() => Ok(Protector::SystemAndFilter),
            Ok(()) if barrier.stands_alone() => Ok(Protector::System),
            Ok(()) => Ok(Protector::EngineAndSystem),
            Err(reason) if barrier.stands_alone() => Err(LatchError::Unenforced { flow: flow.to_string(), reason }),
            Err(reason) => {
                tracing::warn!(%flow, reason, "a latched flow has no barrier of the system");
                Ok(Protector::Engine)
            }
        }
    }

    fn insert(&self, control: &mut Control, latch: Latch) -> Result<(LatchId, Alert), LatchError> {
        let flow = latch.flow;
        self.pin_new(&flow, latch.pin())?;
        control.last_latch += 1;
        let id = LatchId(control.last_latch);
        let told = latch.alert(id, LatchState::Established, format!("the peer is {}", latch.class.peer.id));
        control.by_flow.insert(flow, id);
        control.standing.insert(latch.number, flow.remote, id);
        control.latches.insert(id, latch);
        Ok((id, told))
    }

    /// The latch that a flow can have at this moment; its barrier is up.
    fn prepare(&self, control: &Control, flow: Flow, request: &Request, holder: Holder) -> Result<Latch, LatchError> {
        let (number, class) = self.offers(control, &flow, request)?;
        let protector = self.raise_barrier(&flow, Passage::Class(number))?;
        Ok(Latch {
            flow,
            number,
            class,
            condition: Condition::Established,
            on_break: request.on_break,
            listener: None,
            owner: request.owner,
            protector,
            binding: control.binding(&flow),
            holder,
        })
    }

    /// The class that a flow can be latched to at this moment.
    fn offers(&self, control: &Control, flow: &Flow, request: &Request) -> Result<(ClassId, Arc<Class>), LatchError> {
        let number = match control.coverage(flow) {
            Coverage::One(number) => number,
            Coverage::None => return Err(LatchError::NoSa(flow.to_string())),
            Coverage::Several => return Err(LatchError::Conflict(flow.to_string())),
        };
        let class = self.class(number).ok_or_else(|| LatchError::NoSa(flow.to_string()))?;
        request.admits(flow, &class)?;
        Ok((number, class))
    }

    /// An automatic latch gives way to one that there can be: who asks for another gets none, and the flow stays with its class.
    fn give_way_to(&self, control: &mut Control, flow: &Flow, request: &Request) -> Result<(), LatchError> {
        if let Some(id) = self.yields(control, flow) {
            self.offers(control, flow, request)?;
            self.take_out(control, id);
        }
        Ok(())
    }

    /// What the packet path knows from now on of a flow that had no latch, whose barrier is up. Fails where the packet check could
    /// not tell the flow from another latched one, or has no room for more: then it must not be latched.
    fn pin_new(&self, flow: &Flow, pin: Pin) -> Result<(), LatchError> {
        // The counter first: a packet thread that sees the entry must also see that there are entries.
        self.latched.fetch_add(1, Ordering::SeqCst);
        if self.flows.insert(flow, pin.number()).is_err() {
            self.latched.fetch_sub(1, Ordering::SeqCst);
            if let Some(barrier) = self.barrier.get() {
                barrier.abandon(flow);
            }
            return Err(LatchError::Exists(flow.to_string()));
        }
        for pair in Pair::all_of(flow) {
            self.pairs.entry(pair).or_default().add(pin);
        }
        Ok(())
    }

    fn repin(&self, flow: &Flow, before: Pin, pin: Pin) {
        self.flows.update(flow, pin.number());
        for pair in Pair::all_of(flow) {
            let mut pins = self.pairs.entry(pair).or_default();
            pins.add(pin);
            pins.subtract(before);
        }
    }

    fn unpin(&self, flow: &Flow, pin: Pin) {
        self.flows.remove(flow);
        for pair in Pair::all_of(flow) {
            if let Entry::Occupied(mut entry) = self.pairs.entry(pair) {
                entry.get_mut().subtract(pin);
                if entry.get().is_empty() {
                    entry.remove();
                }
            }
        }
        self.latched.fetch_sub(1, Ordering::SeqCst);
        if let Some(barrier) = self.barrier.get() {
            barrier.abandon(flow);
        }
    }

    /// A packet to or from a port with a listener latch whose flow has no latch.
    fn spawn(&self, direction: Direction, flow: &Flow, number: Option<ClassId>) -> Verdict {
        let (Direction::Inbound, Some(number)) = (direction, number) else { return Verdict::Drop };
        let mut control = self.control();
        // Another thread may have been here.
        if let Some(pin) = self.pin(flow) {
            return pin.verdict(Some(number));
        }
        let found = control.listeners.iter().find(|(_, listening)| listening.listener.takes(flow));
        let Some((&parent, listening)) = found else { return Verdict::Pass };
        let Some(class) = self.class(number) else { return Verdict::Drop };
        let alone = matches!(control.coverage(flow), Coverage::One(only) if only == number);
        let admitted = is_connection(flow) && alone && listening.request.admits(flow, &class).is_ok();
        if !admitted || !listening.has_room(number) {
            return Verdict::Drop;
        }
        let (on_break, holder) = (listening.request.on_break, Arc::clone(&listening.holder));
        let owner = listening.request.owner;
        let condition = Condition::Established;
        let Ok(protector) = self.raise_barrier(flow, Passage::Class(number)) else { return Verdict::Drop };
        let latch = Latch {
            flow: *flow,
            number,
            class,
            condition,
            on_break,
            listener: Some(parent),
            owner,
            protector,
            binding: control.binding(flow),
            holder: Arc::clone(&holder),
        };
        let Ok((id, alert)) = self.insert(&mut control, latch) else { return Verdict::Drop };
        self.count_child(&mut control, parent, id);
        drop(control);
        self.tell(vec![(holder, alert)]);
        Verdict::Pass
    }

    fn pin(&self, flow: &Flow) -> Option<Pin> {
        self.flows.get(flow).map(Pin::of_number)
    }

    /// There is a listener latch that a fragment's packet could be for.
    fn is_listened_for_somewhere(&self, fragment: &Flow) -> bool {
        if self.listening.load(Ordering::Acquire) == 0 {
            return false;
        }
        let there = |protocol: &u8| fragment.protocol == IPV6_FRAGMENT || fragment.protocol == *protocol;
        // Few listeners, and few fragments.
        self.ports
            .iter()
            .filter(|entry| there(&entry.key().0))
            .any(|entry| entry.value().iter().any(|listener| listener.has(fragment.local)))
    }

    fn is_listened_for(&self, flow: &Flow) -> bool {
        if self.listening.load(Ordering::Acquire) == 0 {
            return false;
        }
        let there = self.ports.get(&(flow.protocol, flow.local_port));
        there.is_some_and(|listeners| listeners.iter().any(|listener| listener.takes(flow)))
    }

    fn tell(&self, changes: Vec<(Holder, Alert)>) -> Vec<Alert> {
        for (holder, alert) in &changes {
            holder(alert.clone());
            self.observe(alert);
        }
        changes.into_iter().map(|(_, alert)| alert).collect()
    }

    fn observe(&self, alert: &Alert) {
        if let Some(Observer(observer)) = self.observer.get() {
            observer(alert);
        }
    }
}

impl FlowGuard for Database {
    /// A flow with both ports 0 is a non-first fragment (RFC 4301 §7) or a packet without ports. If there are latches
    /// between its addresses with its protocol, it may belong to any of them: it passes only if all of them are
    /// ESTABLISHED and of its class. One BROKEN latch therefore stops all non-first fragments between two hosts. Before the
    /// first latch between them, none gets to an address with a listener latch.
    fn check(&self, direction: Direction, flow: &Flow, class: Option<ClassId>) -> Verdict {
        if self.latched.load(Ordering::Acquire) == 0 {
            return Verdict::Pass;
        }
        if flow.local_port == 0 && flow.remote_port == 0 {
            let admitted = match self.pairs.get(&Pair::of(flow)) {
                Some(pins) => pins.admit(class),
                // It would wait for the first fragment, which may come under another class and make a latch.
                None => direction == Direction::Outbound || !self.is_listened_for_somewhere(flow),
            };
            return if admitted { Verdict::Pass } else { Verdict::Drop };
        }
        match self.flows.get(flow) {
            Some(pinned) => self.verdict(pinned, class),
            None if self.is_listened_for(flow) => self.spawn(direction, flow, class),
            None => match (self.automatic.get(), class) {
                (Some(automatic), Some(class)) => self.latch_automatically(automatic, flow, class),
                _ => Verdict::Pass,
            },
        }
    }

    fn keep(&self, flow: &Flow, packet: &[u8]) {
        self.kept.keep(flow, packet);
    }

    fn ends(&self, flow: &Flow) {
        self.note_end(flow);
    }

    fn check_later(&self, flow: &Flow, class: Option<ClassId>) -> Verdict {
        if self.latched.load(Ordering::Acquire) > 0 && self.pin(flow).is_none() && self.is_listened_for(flow) {
            return Verdict::Drop;
        }
        self.check(Direction::Inbound, flow, class)
    }
}

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Database").field("latches", &self.flows.len()).finish_non_exhaustive()
    }
}

impl Class {
    /// Of the same two identities. Of two peers that have proved nothing, only the same IKE SA's and its successors' are.
    pub fn is_between_the_ends_of(&self, other: &Self) -> bool {
        self.ends() == other.ends()
    }

    fn ends(&self) -> (&Identity, &Identity, Option<&[u8; 32]>) {
        let lineage = match &self.peer.proof {
            Proof::Unauthenticated { lineage } => Some(lineage),
            Proof::PreSharedKey | Proof::Certificate { .. } | Proof::RawKey { .. } | Proof::Eap { .. } => None,
        };
        (&self.peer.id, &self.peer.local_id, lineage)
    }

    /// The peer has proved who it is.
    pub fn is_authenticated(&self) -> bool {
        is_proof(&self.peer.proof)
    }

    fn pinned(&self) -> (&Identity, &Identity, Credential<'_>, Mode, EspSuite, bool) {
        let credential = match &self.peer.proof {
            Proof::Unauthenticated { lineage } => Credential::None { lineage },
            Proof::PreSharedKey => Credential::SharedKey,
            Proof::Certificate { end_entity, trust_anchor, method: _ } => {
                Credential::Certificate { end_entity, trust_anchor }
            }
            Proof::RawKey { key, method: _ } => Credential::RawKey { key },
            // What it said beside the identity that it proved is no part of it.
            Proof::Eap { method, ike_id: _ } => Credential::Eap(*method),
        };
        (&self.peer.id, &self.peer.local_id, credential, self.mode, self.suite, self.replay_protection)
    }
}

impl PartialEq for Class {
    fn eq(&self, other: &Self) -> bool {
        self.pinned() == other.pinned()
    }
}

impl Eq for Class {}

impl Hash for Class {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.pinned().hash(state);
    }
}

impl fmt::Display for LatchState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Listener => "LISTENER",
            Self::Established => "ESTABLISHED",
            Self::Broken => "BROKEN",
            Self::Closed => "CLOSED",
        })
    }
}

impl Request {
    /// Any protection, the default disposition.
    pub fn peer(peer: IdentityPattern) -> Self {
        Self {
            peer,
            local: None,
            mode: None,
            suites: Vec::new(),
            replay_protection: false,
            on_break: OnBreak::default(),
            owner: None,
        }
    }

    fn admits(&self, flow: &Flow, class: &Class) -> Result<(), LatchError> {
        let identities = [(Some(&self.peer), &class.peer.id), (self.local.as_ref(), &class.peer.local_id)];
        for (wanted, found) in identities {
            if let Some(wanted) = wanted.filter(|wanted| !wanted.matches(found)) {
                return Err(LatchError::WrongPeer {
                    flow: flow.to_string(),
                    found: found.to_string(),
                    wanted: wanted.to_string(),
                });
            }
        }
        let EspSuite { encr, key_bits, integ, esn: _ } = class.suite;
        let suite = Algorithms { encr, key_bits, integ };
        let what = if self.mode.is_some_and(|mode| mode != class.mode) {
            "mode"
        } else if !self.suites.is_empty() && !self.suites.contains(&suite) {
            "suite"
        } else if self.replay_protection && !class.replay_protection {
            "replay protection"
        } else {
            return Ok(());
        };
        Err(LatchError::WrongProtection { flow: flow.to_string(), what })
    }
}

impl Listener {
    fn takes(&self, flow: &Flow) -> bool {
        self.protocol == flow.protocol && self.port == flow.local_port && self.has(flow.local)
    }

    fn has(&self, address: IpAddr) -> bool {
        match self.local {
            Some(local) => local == address,
            None => (self.ipv4 && address.is_ipv4()) || (self.ipv6 && address.is_ipv6()),
        }
    }

    /// Some flow could be for both.
    fn meets(&self, other: &Self) -> bool {
        let addresses = match (self.local, other.local) {
            (_, Some(local)) => self.has(local),
            (Some(local), None) => other.has(local),
            (None, None) => (self.ipv4 && other.ipv4) || (self.ipv6 && other.ipv6),
        };
        self.protocol == other.protocol && self.port == other.port && addresses
    }
}

impl fmt::Display for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.local {
            Some(local) => write!(f, "{local} ")?,
            None => f.write_str("any address, ")?,
        }
        write!(f, "port {} protocol {}", self.port, self.protocol)
    }
}

type Holder = Arc<dyn Fn(Alert) + Send + Sync>;

struct Observer(Box<dyn Fn(&Alert) + Send + Sync>);

/// Reason of [`Database::ended`].
pub const ENDED: &str = "its connection has ended";

/// Latches that break before others get their turn at the database.
const STEP: usize = if cfg!(test) { 2 } else { 512 };

/// Latches of one listener that nobody has taken, as of UDP nobody does: a peer that opens connections without end gets no more.
const MAX_WAITING: usize = 4096;

const NO_CLASS: ClassId = ClassId(0);

const IPV6_FRAGMENT: u8 = 44;

#[derive(PartialEq, Eq, Hash)]
enum Credential<'a> {
    None { lineage: &'a [u8; 32] },
    SharedKey,
    Eap(EapMethod),
    Certificate { end_entity: &'a [u8], trust_anchor: &'a [u8] },
    RawKey { key: &'a [u8] },
}

#[derive(Default)]
struct Classes {
    numbers: HashMap<Arc<Class>, ClassId>,
    /// Class `n` is at `n - 1`.
    by_number: Vec<Arc<Class>>,
    by_ends: HashMap<Ends, Vec<ClassId>>,
}

/// Of [`Class::ends`].
#[derive(PartialEq, Eq, Hash)]
struct Ends(Identity, Identity, Option<[u8; 32]>);

impl From<(&Identity, &Identity, Option<&[u8; 32]>)> for Ends {
    fn from((peer, local, lineage): (&Identity, &Identity, Option<&[u8; 32]>)) -> Self {
        Self(peer.clone(), local.clone(), lineage.copied())
    }
}

#[derive(Default)]
struct Control {
    sas: Sas,
    /// Asked for and not yet installed.
    newcomer: Option<CoveringSa>,
    /// Remote selectors of SAs that broke latches and did not go in, or that another took the number of: what waits for their going
    /// is looked at with the next one that goes.
    stale: Vec<Vec<TrafficSelector>>,
    bindings: HashMap<u64, Bindings>,
    latches: BTreeMap<LatchId, Latch>,
    /// LARVAL latches, which are in `by_flow` too.
    larval: BTreeMap<LatchId, Flow>,
    /// Bypass latches, which are in `by_flow` too.
    bypasses: BTreeMap<LatchId, Bypass>,
    shunts: Shunts,
    automatic: Standing,
    /// Latches that UDP listeners made, and for how long their flows have been silent.
    datagrams: BTreeMap<LatchId, Duration>,
    by_flow: HashMap<Flow, LatchId>,
    /// Those that are ESTABLISHED.
    standing: Places,
    /// Those that are not.
    fallen: Places,
    /// BROKEN ones that may be ESTABLISHED again.
    recoverable: BTreeSet<LatchId>,
    listeners: BTreeMap<LatchId, Listening>,
    last_latch: u64,
}

impl Control {
    /// Somebody took, or released, a latch that a listener latch made.
    fn taken(&mut self, listener: LatchId) {
        if let Some(listening) = self.listeners.get_mut(&listener) {
            listening.waiting = listening.waiting.saturating_sub(1);
        }
    }

    /// Latches to the addresses of these selectors, of the classes of which `concerned` is true.
    fn within(
        &self,
        remote_ts: &[TrafficSelector],
        concerned: impl Fn(ClassId) -> bool,
    ) -> impl Iterator<Item = &Latch> {
        let mut ids = self.standing.within(remote_ts, &concerned);
        ids.append(&mut self.fallen.within(remote_ts, &concerned));
        ids.sort_unstable();
        ids.into_iter().filter_map(|id| self.latches.get(&id))
    }

    /// True when an SA of the latch's class carries its flow, and less than these selectors say.
    fn has_its_own(&self, latch: &Latch, local_ts: &[TrafficSelector], remote_ts: &[TrafficSelector]) -> bool {
        let within = |inner: &[TrafficSelector], outer: &[TrafficSelector]| {
            outer.iter().all(|ts| inner.iter().any(|own| own.contains(ts)))
        };
        self.sas.covering(&latch.flow).any(|(_, sa)| {
            sa.class == latch.number && !(within(&sa.local_ts, local_ts) && within(&sa.remote_ts, remote_ts))
        })
    }

    /// The one channel binding of each type of all SAs that cover a flow.
    fn binding(&self, flow: &Flow) -> Bound {
        let resumed = "an IKE SA that protects the flow has none, since it was resumed";
        let no_keys =
            "an IKE SA that protects the flow was resumed, or an end of it proved itself without a key pair of its own";
        Bound {
            unique: self.one(flow, |bindings| bindings.unique, resumed),
            keys: self.one(flow, |bindings| bindings.keys, no_keys),
        }
    }

    /// With several the two ends might choose different ones.
    fn one<T: Copy + PartialEq>(
        &self,
        flow: &Flow,
        of: impl Fn(&Bindings) -> Option<T>,
        missing: &'static str,
    ) -> Result<T, &'static str> {
        let mut found = None;
        for (sa, _) in self.sas.covering(flow) {
            let binding = self.bindings.get(&sa).and_then(&of).ok_or(missing)?;
            if *found.get_or_insert(binding) != binding {
                return Err("several IKE SAs protect the flow");
            }
        }
        found.ok_or("no IKE SA protects the flow")
    }

    fn coverage(&self, flow: &Flow) -> Coverage {
        let mut found = Coverage::None;
        for (_, sa) in self.sas.covering(flow) {
            match found {
                Coverage::None => found = Coverage::One(sa.class),
                Coverage::One(class) if class == sa.class => {}
                Coverage::One(_) | Coverage::Several => return Coverage::Several,
            }
        }
        found
    }
}

/// Classes of the SAs that cover a flow.
enum Coverage {
    None,
    One(ClassId),
    Several,
}

/// What a latch was made under, or why there is none.
#[derive(Clone, Copy)]
struct Bound {
    unique: Result<[u8; 32], &'static str>,
    keys: Result<[[u8; 32]; 2], &'static str>,
}

struct Latch {
    flow: Flow,
    number: ClassId,
    class: Arc<Class>,
    condition: Condition,
    on_break: OnBreak,
    /// The listener latch that it came from, until somebody takes it.
    listener: Option<LatchId>,
    owner: Option<u32>,
    protector: Protector,
    /// Or why there is none.
    binding: Bound,
    holder: Holder,
}

/// How a latch is, from best to worst: only the administrator and the end of a conflict make it better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Condition {
    Established,
    /// BROKEN by an SA.
    Conflict,
    /// BROKEN by a change of policy.
    Policy,
    /// BROKEN for good.
    Dead,
    Closed,
}

struct Listening {
    listener: Listener,
    request: Request,
    holder: Holder,
    /// Its latches that nobody has taken.
    waiting: usize,
    /// Those of UDP by class.
    of_class: HashMap<ClassId, usize>,
    /// Nobody gets in any more.
    shut: bool,
}

impl Latch {
    fn state(&self) -> LatchState {
        match self.condition {
            Condition::Established => LatchState::Established,
            Condition::Conflict | Condition::Policy | Condition::Dead => LatchState::Broken,
            Condition::Closed => LatchState::Closed,
        }
    }

    /// RFC 5660 §2.2: when all conflicts are cleared; of a connection that was reset nothing is left to return to.
    fn recovers(&self) -> bool {
        matches!(self.condition, Condition::Conflict | Condition::Policy) && self.on_break != OnBreak::Reset
    }

    fn pin(&self) -> Pin {
        match (self.condition, self.on_break) {
            (Condition::Established, _) => Pin::Class(self.number),
            (Condition::Conflict | Condition::Policy | Condition::Dead, OnBreak::Unreachable) => Pin::Unreachable,
            _ => Pin::Broken,
        }
    }

    fn alert(&self, latch: LatchId, state: LatchState, reason: String) -> Alert {
        Alert { latch, flow: self.flow, listener: self.listener, owner: self.owner, state, reason }
    }
}

/// What the packet path knows of a latch.
#[derive(Clone, Copy)]
enum Pin {
    Class(ClassId),
    Broken,
    /// As `Broken`; senders are told.
    Unreachable,
    /// What no SA carries passes.
    Clear,
}

impl Pin {
    fn number(self) -> u64 {
        match self {
            Self::Broken => 0,
            Self::Unreachable => 1,
            Self::Clear => 2,
            Self::Class(ClassId(class)) => u64::from(class) << 1 | 1 << 63,
        }
    }

    fn of_number(number: u64) -> Self {
        match number & !flow_table::MARKS {
            0 => Self::Broken,
            1 => Self::Unreachable,
            2 => Self::Clear,
            // There are no others than ours; if there were, nothing would pass.
            class => u32::try_from((class & !(1 << 63)) >> 1).map_or(Self::Broken, |class| Self::Class(ClassId(class))),
        }
    }

    fn verdict(self, class: Option<ClassId>) -> Verdict {
        match self {
            Self::Class(pinned) if class == Some(pinned) => Verdict::Pass,
            Self::Clear if class.is_none() => Verdict::Pass,
            Self::Class(_) | Self::Broken | Self::Clear => Verdict::Drop,
            Self::Unreachable => Verdict::Unreachable,
        }
    }
}

/// All flows of one protocol between two addresses.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Pair {
    protocol: u8,
    local: IpAddr,
    remote: IpAddr,
}

impl Pair {
    fn of(flow: &Flow) -> Self {
        Self { protocol: flow.protocol, local: flow.local, remote: flow.remote }
    }

    /// All that a latch of `flow` has a say in: a non-first IPv6 fragment, which comes as protocol 44, may belong to
    /// any protocol.
    fn all_of(flow: &Flow) -> impl Iterator<Item = Self> {
        let fragments = flow.local.is_ipv6().then(|| Self { protocol: IPV6_FRAGMENT, ..Self::of(flow) });
        std::iter::once(Self::of(flow)).chain(fragments)
    }
}

/// How many latches of which class a [`Pair`] has.
#[derive(Default)]
struct PairPins {
    classes: BTreeMap<ClassId, usize>,
    broken: usize,
}

impl PairPins {
    fn admit(&self, class: Option<ClassId>) -> bool {
        self.broken == 0 && self.classes.keys().all(|pinned| class == Some(*pinned))
    }

    fn is_empty(&self) -> bool {
        self.broken == 0 && self.classes.is_empty()
    }

    fn add(&mut self, pin: Pin) {
        match pin {
            Pin::Class(class) => *self.classes.entry(class).or_default() += 1,
            Pin::Broken | Pin::Unreachable => self.broken += 1,
            // A later fragment that came under an SA has no first one that passes: it ends nowhere.
            Pin::Clear => {}
        }
    }

    fn subtract(&mut self, pin: Pin) {
        match pin {
            Pin::Class(class) => {
                let left = self.classes.get(&class).map_or(0, |count| count.saturating_sub(1));
                if left == 0 {
                    self.classes.remove(&class);
                } else {
                    self.classes.insert(class, left);
                }
            }
            Pin::Broken | Pin::Unreachable => self.broken = self.broken.saturating_sub(1),
            Pin::Clear => {}
        }
    }
}

fn read<T>(lock: &RwLock<T>) -> std::sync::RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn is_proof(proof: &Proof) -> bool {
    match proof {
        Proof::PreSharedKey | Proof::Certificate { .. } | Proof::RawKey { .. } | Proof::Eap { .. } => true,
        Proof::Unauthenticated { .. } => false,
    }
}

/// Ports of 0 would be taken for fragments by the packet check, so they must not be latched.
fn is_connection(flow: &Flow) -> bool {
    flow.local_port != 0
        && flow.remote_port != 0
        && flow.local.is_ipv4() == flow.remote.is_ipv4()
        && [flow.local, flow.remote].iter().all(|address| !address.is_unspecified() && !address.is_multicast())
}

fn reason(flow: &Flow, latched: &Class, newcomer: Option<&Class>) -> String {
    let Some(newcomer) = newcomer else { return format!("an SA of no known class claims {flow}") };
    let (peer, local, credential, mode, suite, replay) = latched.pinned();
    let (new_peer, new_local, new_credential, new_mode, new_suite, new_replay) = newcomer.pinned();
    let differences: Vec<&str> = [
        (peer != new_peer, "peer identity"),
        (local != new_local, "local identity"),
        (credential != new_credential, "credential"),
        (mode != new_mode, "mode"),
        (suite != new_suite, "ESP suite"),
        (replay != new_replay, "replay protection"),
    ]
    .into_iter()
    .filter_map(|(differs, what)| differs.then_some(what))
    .collect();
    format!("an SA of {new_peer} claims {flow}, which is latched to {peer}: other {}", differences.join(", "))
}

#[cfg(test)]
mod tests;
