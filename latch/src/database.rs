//! The latch database (RFC 5660 §2.3): which flows are pinned to which congruence class, and the check of each
//! packet against it. No IO.
//!
//! # Invariants
//!
//! * A packet of a latched flow passes only while the latch is ESTABLISHED and only under the latch's class, in
//!   both directions. Without an SA (`None`) it never passes.
//! * A latch never changes its class (RFC 5660 §2, "MUST remain unchanged").
//! * A latch whose SAs have all gone stays ESTABLISHED: its packets are lost until a congruent SA comes
//!   (RFC 5660 §2). This database does not ask for one.
//! * A BROKEN latch stays BROKEN until it is released. RFC 5660 §2.2 lets it return to ESTABLISHED once the conflict
//!   is cleared; here the connection under it has been reset, so there is nothing to return to.
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
//!
//! # Locks
//!
//! One mutex orders all control operations, so that nothing happens between looking at the SAs and pinning a flow.
//! The packet path never takes it: it reads one counter, and, if there are latches, one entry of a sharded map.
//! Holders are told with no lock held; they may call back.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::hash::{Hash, Hasher};
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use dashmap::DashMap;
use dashmap::mapref::entry::Entry;
use ipsec::guard::{ClassId, Direction, FlowGuard, Verdict};
use ipsec::plane::{EspSuite, Mode};
use ipsec::selector::{Flow, TrafficSelector};
use pad::{Identity, IdentityPattern, PeerIdentity, Proof};

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

/// States of a connection latch (RFC 5660 §2.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LatchState {
    /// Packets pass under congruent SAs only.
    Established,
    /// A conflict: no packet passes.
    Broken,
    /// Released or closed.
    Closed,
}

/// What is told to a latch's holder (ALERT, RFC 5660 §2.3).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Alert {
    /// Which.
    pub latch: LatchId,
    /// Its new state.
    pub state: LatchState,
    /// Why, for a human: which identity claimed the flow.
    pub reason: String,
}

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
    /// There is a latch for the flow already.
    #[error("{0} is latched already")]
    Exists(String),
    /// SAs of other classes cover the flow too (RFC 5660 §2.3, "MUST NOT create").
    #[error("SAs of different peers cover {0}")]
    Conflict(String),
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
    /// What the packet path reads. The default hasher is keyed: peers choose addresses and ports.
    flows: DashMap<Flow, Pin>,
    /// What non-first fragments, which have no ports, are checked against.
    pairs: DashMap<Pair, PairPins>,
}

impl Database {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
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
    /// Looks at the latches to the addresses that the selectors cover, and at no others.
    pub fn before_install(
        &self,
        class: ClassId,
        local_ts: &[TrafficSelector],
        remote_ts: &[TrafficSelector],
    ) -> Vec<Alert> {
        let broken = self.break_conflicting(&mut self.control(), class, local_ts, remote_ts);
        tell(broken)
    }

    /// The SA is in; `sa` is any number that names it until `removed`. A number that is in use is replaced.
    ///
    /// Breaks and tells as [`Database::before_install`] does: a latch may have been created in between, when the
    /// SA was not yet known here.
    pub fn installed(&self, sa: u64, class: ClassId, local_ts: Vec<TrafficSelector>, remote_ts: Vec<TrafficSelector>) {
        let mut control = self.control();
        let broken = self.break_conflicting(&mut control, class, &local_ts, &remote_ts);
        control.insert_sa(sa, CoveringSa { class, local_ts, remote_ts });
        drop(control);
        tell(broken);
    }

    /// The SA is gone. Latches stay: their packets are lost until a congruent SA comes (RFC 5660 §2).
    pub fn removed(&self, sa: u64) {
        self.control().remove_sa(sa);
    }

    /// CREATE_CONNECTION_LATCH (RFC 5660 §2.3): pins `flow` to the class of the SA that covers it, if its peer
    /// matches `wanted`. Alerts go to `holder`, from inside `before_install` or `installed`, at most one for each
    /// latch; it must not block, and runs on the key manager's thread. An alert may still arrive while another
    /// thread is inside `release`.
    ///
    /// Fails without effect when no SA covers the flow, when SAs of several classes do, when the peer is another
    /// one, or when the flow has a latch already, BROKEN ones included.
    pub fn create(
        &self,
        flow: Flow,
        wanted: &IdentityPattern,
        holder: Box<dyn Fn(Alert) + Send + Sync>,
    ) -> Result<(LatchId, Arc<Class>), LatchError> {
        if !is_connection(&flow) {
            return Err(LatchError::NotAConnection(flow.to_string()));
        }
        let mut control = self.control();
        if control.by_flow.contains_key(&flow) {
            return Err(LatchError::Exists(flow.to_string()));
        }
        let number = match control.coverage(&flow) {
            Coverage::One(number) => number,
            Coverage::None => return Err(LatchError::NoSa(flow.to_string())),
            Coverage::Several => return Err(LatchError::Conflict(flow.to_string())),
        };
        let class = self.class(number).ok_or_else(|| LatchError::NoSa(flow.to_string()))?;
        if !wanted.matches(&class.peer.id) {
            return Err(LatchError::WrongPeer {
                flow: flow.to_string(),
                found: class.peer.id.to_string(),
                wanted: wanted.to_string(),
            });
        }
        control.last_latch += 1;
        let id = LatchId(control.last_latch);
        control.by_flow.insert(flow, id);
        control.by_remote.insert((flow.remote, id));
        control
            .latches
            .insert(id, Latch { flow, number, class: Arc::clone(&class), broken: false, holder: Arc::from(holder) });
        // The counter first: a packet thread that sees the entry must also see that there are entries.
        self.latched.fetch_add(1, Ordering::SeqCst);
        for pair in Pair::all_of(&flow) {
            self.pairs.entry(pair).or_default().add(Pin::Class(number));
        }
        self.flows.insert(flow, Pin::Class(number));
        Ok((id, class))
    }

    /// RELEASE_LATCH (RFC 5660 §2.3). From here on the flow's packets pass as those of any unlatched flow: the caller
    /// makes sure first that no connection is left that could send or take them. Unknown numbers are ignored.
    pub fn release(&self, latch: LatchId) {
        let mut control = self.control();
        let Some(gone) = control.latches.remove(&latch) else { return };
        control.by_flow.remove(&gone.flow);
        control.by_remote.remove(&(gone.flow.remote, latch));
        self.flows.remove(&gone.flow);
        let pin = if gone.broken { Pin::Broken } else { Pin::Class(gone.number) };
        for pair in Pair::all_of(&gone.flow) {
            if let Entry::Occupied(mut entry) = self.pairs.entry(pair) {
                entry.get_mut().subtract(pin);
                if entry.get().is_empty() {
                    entry.remove();
                }
            }
        }
        self.latched.fetch_sub(1, Ordering::SeqCst);
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

    /// FIND_LATCH and INQUIRE_LATCH (RFC 5660 §2.3): the latch of a flow.
    pub fn find(&self, flow: &Flow) -> Option<(LatchId, LatchState, Arc<Class>)> {
        let control = self.control();
        let id = *control.by_flow.get(flow)?;
        let latch = control.latches.get(&id)?;
        Some((id, latch.state(), Arc::clone(&latch.class)))
    }

    /// All latches by number.
    pub fn list(&self) -> Vec<(LatchId, Flow, LatchState, Arc<Class>)> {
        self.list_after(LatchId(0), usize::MAX)
    }

    /// At most `limit` latches with numbers above `after`, by number.
    pub fn list_after(&self, after: LatchId, limit: usize) -> Vec<(LatchId, Flow, LatchState, Arc<Class>)> {
        let control = self.control();
        let above = (std::ops::Bound::Excluded(after), std::ops::Bound::Unbounded);
        let latches = control.latches.range(above).take(limit);
        latches.map(|(id, latch)| (*id, latch.flow, latch.state(), Arc::clone(&latch.class))).collect()
    }

    fn control(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Marks first, so that packets are dropped already when the holders hear of it.
    fn break_conflicting(
        &self,
        control: &mut Control,
        class: ClassId,
        local_ts: &[TrafficSelector],
        remote_ts: &[TrafficSelector],
    ) -> Vec<(Holder, Alert)> {
        let newcomer = self.class(class);
        let mut broken = Vec::new();
        let within = |ts: &TrafficSelector| (ts.start, LatchId(0))..=(ts.end, LatchId(u64::MAX));
        let ranges = remote_ts.iter().filter(|ts| ts.start <= ts.end);
        let ids: BTreeSet<LatchId> =
            ranges.flat_map(|ts| control.by_remote.range(within(ts))).map(|(_, id)| *id).collect();
        for id in ids {
            let Some(latch) = control.latches.get_mut(&id) else { continue };
            if latch.broken || latch.number == class || !covers(local_ts, remote_ts, &latch.flow) {
                continue;
            }
            latch.broken = true;
            self.flows.insert(latch.flow, Pin::Broken);
            for pair in Pair::all_of(&latch.flow) {
                let mut pins = self.pairs.entry(pair).or_default();
                pins.subtract(Pin::Class(latch.number));
                pins.add(Pin::Broken);
            }
            let reason = reason(&latch.flow, &latch.class, newcomer.as_deref());
            broken.push((Arc::clone(&latch.holder), Alert { latch: id, state: LatchState::Broken, reason }));
        }
        broken
    }
}

impl FlowGuard for Database {
    /// A flow with both ports 0 is a non-first fragment (RFC 4301 §7) or a packet without ports. If there are latches
    /// between its addresses with its protocol, it may belong to any of them: it passes only if all of them are
    /// ESTABLISHED and of its class. One BROKEN latch therefore stops all non-first fragments between two hosts.
    fn check(&self, _: Direction, flow: &Flow, class: Option<ClassId>) -> Verdict {
        if self.latched.load(Ordering::Acquire) == 0 {
            return Verdict::Pass;
        }
        let congruent = if flow.local_port == 0 && flow.remote_port == 0 {
            self.pairs.get(&Pair::of(flow)).is_none_or(|pins| pins.admit(class))
        } else {
            self.flows.get(flow).is_none_or(|pin| pin.admits(class))
        };
        if congruent { Verdict::Pass } else { Verdict::Drop }
    }
}

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Database").field("latches", &self.flows.len()).finish_non_exhaustive()
    }
}

impl Class {
    fn pinned(&self) -> (&Identity, &Identity, Credential<'_>, Mode, EspSuite, bool) {
        let credential = match &self.peer.proof {
            Proof::PreSharedKey => Credential::SharedKey,
            Proof::Certificate { end_entity, trust_anchor, method: _ } => {
                Credential::Certificate { end_entity, trust_anchor }
            }
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
            Self::Established => "ESTABLISHED",
            Self::Broken => "BROKEN",
            Self::Closed => "CLOSED",
        })
    }
}

type Holder = Arc<dyn Fn(Alert) + Send + Sync>;

const NO_CLASS: ClassId = ClassId(0);

const IPV6_FRAGMENT: u8 = 44;

#[derive(PartialEq, Eq, Hash)]
enum Credential<'a> {
    SharedKey,
    Certificate { end_entity: &'a [u8], trust_anchor: &'a [u8] },
}

#[derive(Default)]
struct Classes {
    numbers: HashMap<Arc<Class>, ClassId>,
    /// Class `n` is at `n - 1`.
    by_number: Vec<Arc<Class>>,
}

#[derive(Default)]
struct Control {
    sas: BTreeMap<u64, CoveringSa>,
    /// SAs by the smallest network around each of their remote selectors.
    by_subnet: HashMap<Subnet, BTreeSet<u64>>,
    /// The sizes of these networks, and how many there are of each.
    sizes: BTreeMap<(Family, u32), usize>,
    latches: BTreeMap<LatchId, Latch>,
    by_flow: HashMap<Flow, LatchId>,
    by_remote: BTreeSet<(IpAddr, LatchId)>,
    last_latch: u64,
}

impl Control {
    fn coverage(&self, flow: &Flow) -> Coverage {
        let mut found = Coverage::None;
        let (family, address) = number(flow.remote);
        let sizes = self.sizes.range((family, 0)..=(family, u32::MAX)).map(|((_, host_bits), _)| *host_bits);
        let subnets = sizes.filter_map(|host_bits| self.by_subnet.get(&Subnet::new(family, host_bits, address)));
        let sas = subnets.flatten().filter_map(|sa| self.sas.get(sa));
        for sa in sas.filter(|sa| covers(&sa.local_ts, &sa.remote_ts, flow)) {
            match found {
                Coverage::None => found = Coverage::One(sa.class),
                Coverage::One(class) if class == sa.class => {}
                Coverage::One(_) | Coverage::Several => return Coverage::Several,
            }
        }
        found
    }

    fn insert_sa(&mut self, number: u64, sa: CoveringSa) {
        self.remove_sa(number);
        for subnet in sa.remote_ts.iter().filter_map(Subnet::around) {
            let there = self.by_subnet.entry(subnet).or_default();
            if there.is_empty() {
                *self.sizes.entry((subnet.family, subnet.host_bits)).or_default() += 1;
            }
            there.insert(number);
        }
        self.sas.insert(number, sa);
    }

    fn remove_sa(&mut self, number: u64) {
        let Some(sa) = self.sas.remove(&number) else { return };
        for subnet in sa.remote_ts.iter().filter_map(Subnet::around) {
            let Some(there) = self.by_subnet.get_mut(&subnet) else { continue };
            there.remove(&number);
            if !there.is_empty() {
                continue;
            }
            self.by_subnet.remove(&subnet);
            let size = (subnet.family, subnet.host_bits);
            match self.sizes.get_mut(&size) {
                Some(count) if *count > 1 => *count -= 1,
                _ => {
                    self.sizes.remove(&size);
                }
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Family {
    V4,
    V6,
}

fn number(address: IpAddr) -> (Family, u128) {
    match address {
        IpAddr::V4(address) => (Family::V4, u128::from(address.to_bits())),
        IpAddr::V6(address) => (Family::V6, address.to_bits()),
    }
}

/// The addresses that have all but the last bits in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Subnet {
    family: Family,
    host_bits: u32,
    first: u128,
}

impl Subnet {
    fn new(family: Family, host_bits: u32, address: u128) -> Self {
        Self { family, host_bits, first: u128::MAX.checked_shl(host_bits).unwrap_or(0) & address }
    }

    /// The smallest one around a selector's addresses; `None` where it selects none.
    fn around(selector: &TrafficSelector) -> Option<Self> {
        let ((family, start), (other, end)) = (number(selector.start), number(selector.end));
        let host_bits = u128::BITS - (start ^ end).leading_zeros();
        (family == other && start <= end).then(|| Self::new(family, host_bits, start))
    }
}

/// Classes of the SAs that cover a flow.
enum Coverage {
    None,
    One(ClassId),
    Several,
}

struct CoveringSa {
    class: ClassId,
    local_ts: Vec<TrafficSelector>,
    remote_ts: Vec<TrafficSelector>,
}

struct Latch {
    flow: Flow,
    number: ClassId,
    class: Arc<Class>,
    broken: bool,
    holder: Holder,
}

impl Latch {
    fn state(&self) -> LatchState {
        if self.broken { LatchState::Broken } else { LatchState::Established }
    }
}

/// What the packet path knows of a latch.
#[derive(Clone, Copy)]
enum Pin {
    Class(ClassId),
    Broken,
}

impl Pin {
    fn admits(self, class: Option<ClassId>) -> bool {
        match self {
            Self::Class(pinned) => class == Some(pinned),
            Self::Broken => false,
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
            Pin::Broken => self.broken += 1,
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
            Pin::Broken => self.broken = self.broken.saturating_sub(1),
        }
    }
}

fn read<T>(lock: &RwLock<T>) -> std::sync::RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn covers(local_ts: &[TrafficSelector], remote_ts: &[TrafficSelector], flow: &Flow) -> bool {
    local_ts.iter().any(|ts| ts.matches(flow.protocol, flow.local, flow.local_port))
        && remote_ts.iter().any(|ts| ts.matches(flow.protocol, flow.remote, flow.remote_port))
}

/// Ports of 0 would be taken for fragments by the packet check, so they must not be latched.
fn is_connection(flow: &Flow) -> bool {
    flow.local_port != 0
        && flow.remote_port != 0
        && flow.local.is_ipv4() == flow.remote.is_ipv4()
        && [flow.local, flow.remote].iter().all(|address| !address.is_unspecified() && !address.is_multicast())
}

fn tell(broken: Vec<(Holder, Alert)>) -> Vec<Alert> {
    for (holder, alert) in &broken {
        holder(alert.clone());
    }
    broken.into_iter().map(|(_, alert)| alert).collect()
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
