//! The user-space data plane's packet engine, pure: inner packets become ESP packets and back (RFC 4301 §5).
//! Shared by threads; look-ups take no lock for long.
//!
//! Control calls change a copy of the tables, which share all but the changed paths with it, and swap it in; a packet sees
//! the tables of before or of after.

use std::collections::HashMap;
use std::mem;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;

use crate::esp::{self, OpenError};
use crate::guard::{Direction, FlowGuard, Verdict};
use crate::ip::{self, Fragment, Packet, ecn, protocol};
use crate::natted::Owners;
use crate::plane::{Encapsulation, Mode, PlaneError, PlaneEvent, SaPair, StreamId, TfcPadding, Trap, Usage};
use crate::replay::Freshness;
use crate::sad::{Counter, Entry, Expiry, Sa, Turn};
use crate::selector::Flow;
use crate::spd::{Selected, Tables, TrapState};

/// Takes what [`DataPath::outbound_batch`] makes of packets.
pub trait Outlet {
    /// What became of the next packet, and `out` as [`Outbound`] says. What is to be sent waits for [`Self::send`], or for
    /// the end of the batch where nothing before it is to be sent.
    fn take(&mut self, outbound: Outbound, out: &[u8]);

    /// Sends what was taken since the last call, in this order: it is of one SA, and the SA's later packets wait.
    fn send(&mut self);
}

/// What becomes of a packet that we want to send.
#[derive(Debug, PartialEq, Eq)]
pub enum Outbound {
    /// `out` holds an ESP packet (SPI first, no outer header) for this destination, with this TOS octet
    /// (ECN, DSCP) and DF bit for the outer header.
    Send {
        /// Where to.
        to: Encapsulation,
        /// Outer TOS or traffic class.
        tos: u8,
        /// Outer DF.
        dont_fragment: bool,
    },
    /// `out` holds an ICMP message for the sender of the packet: too big (RFC 4301 §8.2).
    Reply,
    /// `out` holds an ICMP message for the sender of the packet: a latch forbids it. Counted.
    Prohibited,
    /// A trap selects it but no SA; dropped and counted. At most one each second for a trap, then
    /// [`DropReason::NoSa`].
    Acquire {
        /// `reqid` of the trap.
        reqid: u32,
        /// The packet.
        flow: Flow,
    },
    /// Dropped and counted.
    Drop(DropReason),
}

/// What becomes of a packet that we received.
#[derive(Debug, PartialEq, Eq)]
pub enum Inbound {
    /// `out` holds the inner IP packet.
    Deliver {
        /// To be reported as well, at most once for each change.
        event: Option<PlaneEvent>,
    },
    /// Dropped and counted (also dummy packets, RFC 4303 §2.6).
    Drop(DropReason),
}

/// Why a packet was dropped; each has a counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DropReason {
    /// Not an IP packet, or lengths lie.
    Malformed,
    /// No policy selects it.
    NoPolicy,
    /// A trap selects it, but there is no SA yet.
    NoSa,
    /// No SA has this SPI.
    UnknownSpi,
    /// Sequence number seen or too old.
    Replay,
    /// Integrity check failed.
    Integrity,
    /// Selectors of the SA do not allow the inner packet (RFC 4301 §5.2).
    Selectors,
    /// A latch forbids it.
    Latch,
    /// Volume limit or sequence numbers used up.
    Expired,
    /// Too big for the path and DF set; an ICMP message says so.
    TooBig,
    /// A dummy packet.
    Dummy,
    /// Outer ECN CE on an inner packet that is not ECN-capable (RFC 6040 §4.2).
    Ecn,
}

impl DropReason {
    /// Its name, for people and programs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::NoPolicy => "no-policy",
            Self::NoSa => "no-sa",
            Self::UnknownSpi => "unknown-spi",
            Self::Replay => "replay",
            Self::Integrity => "integrity",
            Self::Selectors => "selectors",
            Self::Latch => "latch",
            Self::Expired => "expired",
            Self::TooBig => "too-big",
            Self::Dummy => "dummy",
            Self::Ecn => "ecn",
        }
    }

    /// All reasons, in order of their counters.
    pub const ALL: [Self; 12] = [
        Self::Malformed,
        Self::NoPolicy,
        Self::NoSa,
        Self::UnknownSpi,
        Self::Replay,
        Self::Integrity,
        Self::Selectors,
        Self::Latch,
        Self::Expired,
        Self::TooBig,
        Self::Dummy,
        Self::Ecn,
    ];
}

/// The packet engine. All methods take `&self`.
pub struct DataPath {
    guard: Arc<dyn FlowGuard>,
    tables: ArcSwap<Tables>,
    /// Apart from the tables: anybody can forge what changes it, so a change must be cheap.
    path_mtu: ArcSwap<PathMtus>,
    /// Held while tables are changed; the order of the next installation.
    control: Mutex<u64>,
    owners: Owners,
    drops: [AtomicU64; DropReason::ALL.len()],
    events: Mutex<Events>,
    /// Ticks count from the first time that we were told.
    first_now: OnceLock<Instant>,
}

/// Path MTUs by outer destination, with the tick at which each is forgotten.
type PathMtus = HashMap<IpAddr, (usize, u64)>;

#[derive(Default)]
struct Events {
    queue: Vec<PlaneEvent>,
    unknown_spi_since: Option<Instant>,
    unknown_spi_count: usize,
    selectors_at: Option<Instant>,
}

/// Unknown SPIs reported in one second at most; whoever wants can send us any number of them.
const UNKNOWN_SPI_PER_SECOND: usize = 8;

/// How often the packets of peers are reported that their SAs are not for.
const SELECTORS_EVERY: Duration = Duration::from_secs(1);

/// As much of such a packet as is reported: both headers, and some more.
const REPORTED_START: usize = 128;

/// Events that wait to be drained, apart from expiries, which each SA has two of at most.
const MAX_WAITING_EVENTS: usize = 256;

/// Destinations with a path MTU of their own.
const MAX_PATH_MTUS: usize = 4096;

/// After so many ticks a path may be tried anew (RFC 1191 §6.3, RFC 8201 §4: not before ten minutes).
const PATH_MTU_LIFETIME: u64 = 10 * 60 * 1000;

/// Mapping changes of one SA reported in one second at most: a hostile peer can change its port with each packet.
const MAPPING_CHANGES_PER_SECOND: u32 = 8;

/// Ticks between two reports of one trap.
const ACQUIRE_EVERY: u64 = 1000;

const DEFAULT_PATH_MTU: usize = 1500;

/// What every IPv4 host must take (RFC 791 §3.1), and the least IPv6 MTU (RFC 8200 §5). Senders are never told to
/// send less: smaller paths get outer fragments.
const IPV4_MIN_MTU: usize = 576;
const IPV6_MIN_MTU: usize = 1280;

const UDP_HEADER_LEN: usize = 8;

/// A frame's 16-bit length counts itself (RFC 9329 §3).
const MAX_FRAME_PAYLOAD: usize = 65_535 - 2;

const MAX_IP_PACKET: usize = 65_535;

/// SPIs 1 to 255 are reserved and 0 is never sent (RFC 4303 §2.1).
const FIRST_SPI: u32 = 256;

impl DataPath {
    /// An empty SAD and SPD, with the latches' hook.
    pub fn new(guard: Arc<dyn FlowGuard>) -> Self {
        Self {
            guard,
            tables: ArcSwap::default(),
            path_mtu: ArcSwap::default(),
            control: Mutex::new(1),
            owners: Owners::default(),
            drops: [const { AtomicU64::new(0) }; DropReason::ALL.len()],
            events: Mutex::default(),
            first_now: OnceLock::new(),
        }
    }

    /// As [`crate::plane::DataPlane::install`].
    pub fn install(&self, pair: SaPair) -> Result<(), PlaneError> {
        let spi_in = pair.spi_in;
        if spi_in < FIRST_SPI || pair.spi_out < FIRST_SPI {
            return Err(PlaneError::Unsupported { plane: "user-space", what: "reserved SPIs (0 to 255)".to_owned() });
        }
        let (encapsulation, sa) = Sa::new(pair)?;
        self.change(|order, tables| {
            if tables.by_spi.contains_key(&spi_in) {
                return Err(PlaneError::SpiInUse(spi_in));
            }
            if !tables.of_reqid(sa.reqid).any(|entry| entry.sa.sends()) {
                sa.waits.store(false, Ordering::Relaxed);
            }
            tables.insert(&Arc::new(Entry { order, encapsulation, sa: Arc::new(sa) }));
            Ok(())
        })
    }

    /// As [`crate::plane::DataPlane::migrate`].
    pub fn migrate(&self, spi_in: u32, to: Encapsulation) -> Result<(), PlaneError> {
        self.change(|_, tables| {
            let old = tables.by_spi.get(&spi_in).cloned().ok_or(PlaneError::NoSuchSa(spi_in))?;
            tables.remove(&old);
            tables.insert(&Arc::new(Entry { encapsulation: to, ..Entry::clone(&old) }));
            Ok(())
        })
    }

    /// As [`crate::plane::DataPlane::delete`].
    pub fn delete(&self, spi_in: u32) -> Result<(), PlaneError> {
        self.change(|_, tables| {
            let gone = tables.by_spi.get(&spi_in).cloned().ok_or(PlaneError::NoSuchSa(spi_in))?;
            tables.succeed(&gone);
            tables.remove(&gone);
            Ok(())
        })
    }

    /// As [`crate::plane::DataPlane::retire`].
    pub fn retire(&self, spi_in: u32) -> Result<(), PlaneError> {
        let _order = lock(&self.control);
        let tables = self.tables.load();
        let entry = tables.by_spi.get(&spi_in).ok_or(PlaneError::NoSuchSa(spi_in))?;
        // The successor first: at no moment is there nobody who sends.
        tables.succeed(entry);
        entry.sa.retired.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// As [`crate::plane::DataPlane::install_trap`].
    pub fn install_trap(&self, trap: Trap) -> Result<(), PlaneError> {
        self.change(|order, tables| {
            let reqid = trap.reqid;
            let installed = tables.insert_trap(&Arc::new(TrapState::new(trap, order)));
            if installed { Ok(()) } else { Err(PlaneError::TrapInUse(reqid)) }
        })
    }

    /// As [`crate::plane::DataPlane::remove_trap`].
    pub fn remove_trap(&self, reqid: u32) -> Result<(), PlaneError> {
        self.change(|_, tables| if tables.remove_trap(reqid) { Ok(()) } else { Err(PlaneError::NoSuchTrap(reqid)) })
    }

    /// As [`crate::plane::DataPlane::usage`].
    pub fn usage(&self, now: Instant, spi_in: u32) -> Result<Usage, PlaneError> {
        let tables = self.tables.load();
        let sa = &tables.by_spi.get(&spi_in).ok_or(PlaneError::NoSuchSa(spi_in))?.sa;
        let tick = self.tick(now);
        let read = |counter: &Counter| {
            let idle = match counter.last.load(Ordering::Relaxed) {
                0 => None,
                last => Some(Duration::from_millis(tick.saturating_sub(last))),
            };
            (counter.bytes.load(Ordering::Relaxed), counter.packets.load(Ordering::Relaxed), idle)
        };
        let (bytes_in, packets_in, idle_in) = read(&sa.received);
        let (bytes_out, packets_out, idle_out) = read(&sa.sent);
        Ok(Usage { bytes_in, packets_in, idle_in, bytes_out, packets_out, idle_out })
    }

    /// Tells the path MTU to an outer destination (octets of outer IP packet), from ICMP or the device. Anybody can
    /// forge ICMP, so only destinations of an SA are remembered, values below the family's minimum count as that, and a
    /// path gets wider only by forgetting, after ten minutes (RFC 1191 §6.3). Other paths have 1500.
    pub fn set_path_mtu(&self, now: Instant, remote: IpAddr, mtu: usize) {
        let floor = if remote.is_ipv4() { IPV4_MIN_MTU } else { IPV6_MIN_MTU };
        let (mtu, tick) = (mtu.max(floor), self.tick(now));
        let _order = lock(&self.control);
        let known = self.path_mtu.load();
        if mtu >= lookup(&known, remote, tick) {
            return;
        }
        if !self.tables.load().sends_to(remote) {
            return;
        }
        let mut path_mtu: PathMtus =
            known.iter().filter(|(_, (_, until))| tick < *until).map(|(remote, path)| (*remote, *path)).collect();
        if path_mtu.len() < MAX_PATH_MTUS || path_mtu.contains_key(&remote) {
            path_mtu.insert(remote, (mtu, tick.saturating_add(PATH_MTU_LIFETIME)));
            self.path_mtu.store(Arc::new(path_mtu));
        }
    }

    /// Protects one inner IP packet. `out` is cleared and filled; its capacity is reused. For callers that send in the order
    /// in which they call; where several threads send, [`Self::outbound_batch`] keeps the order.
    pub fn outbound(&self, now: Instant, packet: &[u8], out: &mut Vec<u8>) -> Outbound {
        out.clear();
        loop {
            let tables = self.tables.load();
            let outcome = match self.choose(now, &tables, packet) {
                Ok(Chosen::Pair(view, entry)) => self.protect(now, &view, entry, out),
                _ if !self.are_newest(&tables) => continue,
                Ok(Chosen::Trap(state, flow)) => self.acquire(now, state, flow),
                Err(reason) => Err(reason),
            };
            return self.conclude(packet, outcome, out);
        }
    }

    /// Protects inner IP packets, and has them sent in the order of their sequence numbers whatever other threads send under
    /// the same SAs: a peer's replay window may be no wider than 32 (RFC 4303 §3.4.3), and a thread can lose its processor at
    /// any time. `out` is room for one packet; its capacity is reused.
    ///
    /// Packets of one SA that follow each other are sealed together and sent together. While one thread sends, another one
    /// seals.
    pub fn outbound_batch<'p>(
        &self,
        now: Instant,
        packets: impl IntoIterator<Item = &'p [u8]>,
        out: &mut Vec<u8>,
        outlet: &mut impl Outlet,
    ) {
        let mut packets = packets.into_iter();
        let mut next = packets.next();
        while next.is_some() {
            // Once for each run of packets of one SA: what changes the tables need not wait for a batch to be sent.
            let tables = self.tables.load();
            let mut turn: Option<Turn<'_>> = None;
            while let Some(packet) = next {
                out.clear();
                let outcome = match self.choose(now, &tables, packet) {
                    Ok(Chosen::Pair(view, entry)) => {
                        if turn.as_ref().is_some_and(|turn| !turn.is_of(&entry.sa)) {
                            break;
                        }
                        // Before the latch is asked: its answer is for a packet that is about to go.
                        turn.get_or_insert_with(|| Turn::of(&entry.sa));
                        self.protect(now, &view, entry, out)
                    }
                    _ if !self.are_newest(&tables) => break,
                    Ok(Chosen::Trap(state, flow)) => self.acquire(now, state, flow),
                    Err(reason) => Err(reason),
                };
                outlet.take(self.conclude(packet, outcome, out), out);
                next = packets.next();
            }
            match turn {
                Some(turn) => turn.send(|| outlet.send()),
                None => outlet.send(),
            }
        }
    }

    /// False when there are others meanwhile: who finds no SA in old tables may have seen its pair retire, and a newer one has
    /// its successor.
    fn are_newest(&self, tables: &Arc<Tables>) -> bool {
        Arc::ptr_eq(tables, &self.tables.load())
    }

    fn conclude(&self, packet: &[u8], outcome: Result<Outbound, DropReason>, out: &mut Vec<u8>) -> Outbound {
        if let Ok(Outbound::Acquire { .. }) | Err(DropReason::NoPolicy | DropReason::NoSa | DropReason::Latch) = outcome
            && let Some(view) = Packet::parse(packet).filter(Packet::shows_ports)
        {
            self.guard.keep(&view.outbound_flow(), packet);
        }
        match outcome {
            Ok(outbound) => {
                match outbound {
                    Outbound::Reply => self.count(DropReason::TooBig),
                    Outbound::Acquire { .. } => self.count(DropReason::NoSa),
                    Outbound::Send { .. } | Outbound::Prohibited | Outbound::Drop(_) => {}
                }
                outbound
            }
            Err(reason) => {
                out.clear();
                self.count(reason);
                Outbound::Drop(reason)
            }
        }
    }

    /// Opens one ESP packet (SPI first). `from` is how it came, for mapping changes and the check that an SA
    /// is used over the transport that it belongs to. `tos` is the outer TOS octet. Works in place in `packet`
    /// and leaves the inner IP packet in `out`.
    pub fn inbound(&self, now: Instant, from: Encapsulation, tos: u8, packet: &mut [u8], out: &mut Vec<u8>) -> Inbound {
        out.clear();
        let mut event = None;
        match self.unprotect(now, from, tos, packet, out, &mut event) {
            Ok(()) => Inbound::Deliver { event },
            Err(reason) => {
                out.clear();
                self.count(reason);
                if let Some(event) = event {
                    self.report(event);
                }
                Inbound::Drop(reason)
            }
        }
    }

    /// The `reqid` of the pair that receives under this SPI; its successors have the same.
    pub fn reqid(&self, spi_in: u32) -> Option<u32> {
        self.tables.load().by_spi.get(&spi_in).map(|entry| entry.sa.reqid)
    }

    /// Events since the last call: expiries, unknown SPIs (rate-limited), mapping changes that came with a packet
    /// that was not delivered.
    pub fn drain_events(&self) -> Vec<PlaneEvent> {
        mem::take(&mut lock(&self.events).queue)
    }

    /// Packets dropped so far, by reason; reasons with no drops are there too.
    pub fn drops(&self) -> Vec<(DropReason, u64)> {
        DropReason::ALL.into_iter().zip(self.drops.iter().map(|count| count.load(Ordering::Relaxed))).collect()
    }

    /// Where an SPI's packets come from, for tests and status: the newest authenticated source, before the first the
    /// configured one. Port 0 without UDP and streams.
    pub fn remote(&self, spi_in: u32) -> Option<SocketAddr> {
        let tables = self.tables.load();
        let entry = tables.by_spi.get(&spi_in)?;
        let configured = match entry.encapsulation {
            Encapsulation::None { remote, .. } => SocketAddr::new(remote, 0),
            Encapsulation::Udp { remote, .. } | Encapsulation::Stream { remote, .. } => remote,
        };
        Some(entry.sa.receiver().seen_from.unwrap_or(configured))
    }

    /// The stream that a packet goes into, and its flow: where packets wait for each other they had better not have numbers yet,
    /// so [`Self::outbound`] can wait until it is this one's turn.
    pub fn stream_of(&self, now: Instant, packet: &[u8]) -> Option<(StreamId, Flow)> {
        let view = Packet::parse(packet)?;
        let flow = view.outbound_flow();
        let tables = self.tables.load();
        let Some(Selected::Pair(entry)) = tables.select(&flow, view.shows_ports()) else { return None };
        let entry = if entry.may_share_its_address() { self.owner(now, &tables, &view, entry).ok()? } else { entry };
        match entry.encapsulation {
            Encapsulation::Stream { stream, .. } => Some((stream, flow)),
            Encapsulation::None { .. } | Encapsulation::Udp { .. } => None,
        }
    }

    fn change(&self, change: impl FnOnce(u64, &mut Tables) -> Result<(), PlaneError>) -> Result<(), PlaneError> {
        let mut order = lock(&self.control);
        let mut tables = Tables::clone(&self.tables.load());
        change(*order, &mut tables)?;
        *order += 1;
        self.tables.store(Arc::new(tables));
        Ok(())
    }

    /// What becomes of a packet that no SA is for. It never goes out, so no latch needs to see it.
    fn acquire(&self, now: Instant, state: &TrapState, flow: Flow) -> Result<Outbound, DropReason> {
        let tick = self.tick(now);
        let due = |last: u64| (last == 0 || tick.saturating_sub(last) >= ACQUIRE_EVERY).then_some(tick);
        // Of threads that come at once, one reports.
        match state.reported.fetch_update(Ordering::Relaxed, Ordering::Relaxed, due) {
            Ok(_) => Ok(Outbound::Acquire { reqid: state.trap.reqid, flow }),
            Err(_) => Err(DropReason::NoSa),
        }
    }

    /// Whose packet it is. Asking again gives the same answer.
    fn choose<'a, 'p>(&self, now: Instant, tables: &'a Tables, packet: &'p [u8]) -> Result<Chosen<'a, 'p>, DropReason> {
        let view = Packet::parse(packet).ok_or(DropReason::Malformed)?;
        let flow = view.outbound_flow();
        let entry = match tables.select(&flow, view.shows_ports()) {
            Some(Selected::Pair(entry)) => entry,
            Some(Selected::Trap(state)) => return Ok(Chosen::Trap(state, flow)),
            None => of_return_traffic(tables, &view).ok_or(DropReason::NoPolicy)?,
        };
        let entry = if entry.may_share_its_address() { self.owner(now, tables, &view, entry)? } else { entry };
        Ok(Chosen::Pair(view, entry))
    }

    /// RFC 4301 §5.1.
    fn protect(
        &self,
        now: Instant,
        view: &Packet<'_>,
        entry: &Entry,
        out: &mut Vec<u8>,
    ) -> Result<Outbound, DropReason> {
        let flow = view.outbound_flow();
        let sa = &*entry.sa;
        let guarded = view.guarded(flow);
        match self.guard.check(Direction::Outbound, &guarded, Some(sa.class)) {
            Verdict::Pass if view.ends_connection() => self.guard.ends(&guarded),
            Verdict::Pass => {}
            Verdict::Unreachable if view.prohibited(out) => {
                self.count(DropReason::Latch);
                return Ok(Outbound::Prohibited);
            }
            Verdict::Unreachable | Verdict::Drop => return Err(DropReason::Latch),
        }
        if sa.is_dead() {
            return Err(DropReason::Expired);
        }

        let inner = view.bytes();
        let (next_header, payload) = match sa.mode {
            Mode::Tunnel if flow.local.is_ipv4() => (protocol::IPV4, inner),
            Mode::Tunnel => (protocol::IPV6, inner),
            Mode::Transport => transport_payload(view, &entry.encapsulation)?,
        };
        let limit = packet_limit(&entry.encapsulation, &self.path_mtu.load(), || self.tick(now));
        let mut dont_fragment = view.dont_fragment() && (sa.copy_df || sa.mode == Mode::Transport);
        if esp::sealed_len(&sa.outbound, payload.len()) > limit.path {
            let header = inner.len() - payload.len();
            let floor = if flow.local.is_ipv4() { IPV4_MIN_MTU } else { IPV6_MIN_MTU };
            let longest = esp::longest_payload(&sa.outbound, limit.path).unwrap_or(0) + header;
            if view.dont_fragment() && inner.len() > floor {
                // RFC 4301 §8.2.1
                let answered = view.too_big(longest.max(floor), out);
                return if answered { Ok(Outbound::Reply) } else { Err(DropReason::TooBig) };
            }
            if esp::sealed_len(&sa.outbound, payload.len()) > limit.hard {
                return Err(DropReason::TooBig);
            }
            dont_fragment = false;
        }

        let sequence = sa.next_sequence().map_err(|expiry| self.expire(sa, expiry))?;
        self.charge(sa, &sa.sent, inner.len(), now)?;
        // Sealing fails only without random octets for an IV; then nothing may go out.
        let tfc = tfc_padding(sa, payload.len(), limit.path);
        let payload = esp::Payload { next_header, octets: payload, tfc };
        esp::seal(&sa.outbound, sa.spi_out, sequence, sa.esn, payload, out).map_err(|_| DropReason::Expired)?;
        let (tos, dont_fragment) = match (&entry.encapsulation, sa.mode) {
            // One segment carries parts of many packets (RFC 9329 §9.3, §9.5).
            (Encapsulation::Stream { .. }, _) => (0, false),
            (_, Mode::Tunnel) => (ecn::encapsulate(view.tos(), sa.copy_ecn), dont_fragment),
            (_, Mode::Transport) => (view.tos(), dont_fragment),
        };
        Ok(Outbound::Send { to: entry.encapsulation, tos, dont_fragment })
    }

    /// Of several peers behind one NAT the one that a packet's connection is with (RFC 3948 §5.2). Where none is known,
    /// the packet goes to the only one there is, and to nobody where there are more: it could be anybody's.
    fn owner<'a>(
        &self,
        now: Instant,
        tables: &'a Tables,
        view: &Packet<'_>,
        selected: &'a Arc<Entry>,
    ) -> Result<&'a Arc<Entry>, DropReason> {
        let (flow, remote) = (view.outbound_flow(), selected.encapsulation.remote());
        let connection = view.connection(flow);
        let there = |class| tables.is_behind(remote, class);
        let entry = match self.owners.of(&connection).filter(|class| there(*class)) {
            Some(class) if class == selected.sa.class => selected,
            Some(class) => tables.select_of_class(&flow, view.shows_ports(), class).ok_or(DropReason::NoSa)?,
            None if tables.is_shared(remote) => return Err(DropReason::NoSa),
            None => selected,
        };
        let owned = self.owners.claim(connection, entry.sa.class, self.tick(now), there);
        if owned { Ok(entry) } else { Err(DropReason::NoSa) }
    }

    /// RFC 4301 §5.2, RFC 4303 §3.4.
    fn unprotect(
        &self,
        now: Instant,
        from: Encapsulation,
        tos: u8,
        packet: &mut [u8],
        out: &mut Vec<u8>,
        event: &mut Option<PlaneEvent>,
    ) -> Result<(), DropReason> {
        let header = esp::Header::read(packet).ok_or(DropReason::Malformed)?;
        let tables = self.tables.load();
        let Some(entry) = tables.by_spi.get(&header.spi) else {
            self.report_unknown_spi(now, header.spi, &from);
            return Err(DropReason::UnknownSpi);
        };
        // Over whatever it comes: RFC 7296 §2.23 has us receive with and without UDP at any time, and a peer that moves
        // between UDP and a stream sends over the one while we still use the other (RFC 9329 §5, §7.1).
        let sa = &*entry.sa;
        if sa.is_dead() {
            return Err(DropReason::Expired);
        }
        let sequence = sa.receiver().window.check(header.sequence_low).map_err(|_| DropReason::Replay)?;
        let (next_header, payload) = esp::open(&sa.inbound, sequence, sa.esn, packet).map_err(|error| match error {
            OpenError::Integrity => DropReason::Integrity,
            OpenError::Malformed | OpenError::Padding => DropReason::Malformed,
        })?;
        // The packet is authentic from here on, and only from here on does it change anything.
        {
            let mut receiver = sa.receiver();
            let freshness = receiver.window.accept(sequence).map_err(|_| DropReason::Replay)?;
            // An overtaken packet may show an older mapping, or come from a stream that another has replaced.
            if freshness == Freshness::Newest
                && let Some((seen, change)) = change_of_path(sa.spi_in, &entry.encapsulation, &from)
                // What is not reported now is not remembered either, so that a later packet reports it.
                && seen != receiver.seen_from
                && (seen.is_none() || receiver.may_report(self.tick(now), MAPPING_CHANGES_PER_SECOND))
            {
                receiver.seen_from = seen;
                *event = change;
            }
        }
        // The peer uses it, so it is ready to be sent to (RFC 7296 §2.8).
        if sa.waits.load(Ordering::Relaxed) {
            sa.waits.store(false, Ordering::Relaxed);
        }
        self.charge(sa, &sa.received, payload.len(), now)?;
        if next_header == esp::NO_NEXT_HEADER {
            return Err(DropReason::Dummy);
        }
        let (unwrapped, inner) = match sa.mode {
            Mode::Tunnel => (self.unwrap_tunnel(sa, &from, tos, next_header, payload, out), &*payload),
            Mode::Transport => {
                (self.unwrap_transport(sa, entry, &from, tos, next_header, payload, out), out.as_slice())
            }
        };
        if unwrapped == Err(DropReason::Selectors) {
            self.report_selectors(now, sa, inner);
        }
        unwrapped?;
        if sa.mode == Mode::Transport { self.claim(now, &tables, entry, out) } else { Ok(()) }
    }

    /// RFC 3948 §5.2: a peer behind a NAT gets no part of the connections of another one there.
    fn claim(&self, now: Instant, tables: &Tables, entry: &Entry, packet: &[u8]) -> Result<(), DropReason> {
        if !entry.may_share_its_address() {
            return Ok(());
        }
        let view = Packet::parse(packet).ok_or(DropReason::Malformed)?;
        let connection = view.connection(view.inbound_flow());
        let there = |class| tables.is_behind(entry.encapsulation.remote(), class);
        let owned = self.owners.claim(connection, entry.sa.class, self.tick(now), there);
        if owned { Ok(()) } else { Err(DropReason::Selectors) }
    }

    fn unwrap_tunnel(
        &self,
        sa: &Sa,
        from: &Encapsulation,
        tos: u8,
        next_header: u8,
        payload: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(), DropReason> {
        let view = Packet::parse(payload).ok_or(DropReason::Malformed)?;
        let expected = if view.source().is_ipv4() { protocol::IPV4 } else { protocol::IPV6 };
        if next_header != expected {
            return Err(DropReason::Malformed);
        }
        self.admit(sa, &view)?;
        let stream = matches!(from, Encapsulation::Stream { .. });
        let inner_tos =
            if sa.copy_ecn && !stream { ecn::decapsulate(view.tos(), tos).ok_or(DropReason::Ecn)? } else { view.tos() };
        // The view ends where the inner packet does: traffic flow confidentiality padding goes (RFC 4303 §2.7).
        out.extend_from_slice(view.bytes());
        if inner_tos != view.tos() {
            ip::set_tos(out, inner_tos);
        }
        Ok(())
    }

    #[allow(clippy::too_many_arguments, reason = "the pieces of one packet")]
    fn unwrap_transport(
        &self,
        sa: &Sa,
        entry: &Entry,
        from: &Encapsulation,
        tos: u8,
        next_header: u8,
        payload: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(), DropReason> {
        // The outer source is not authenticated, and here it would become the packet's: only the address that IKE
        // knows may stand there.
        if from.remote() != entry.encapsulation.remote() {
            return Err(DropReason::Selectors);
        }
        let stream = matches!(from, Encapsulation::Stream { .. });
        let tos = if stream { 0 } else { tos };
        ip::rebuild(from.remote(), from.local(), next_header, tos, payload, out).ok_or(DropReason::Malformed)?;
        let view = Packet::parse(out).ok_or(DropReason::Malformed)?;
        self.admit(sa, &view)?;
        if !matches!(from, Encapsulation::None { .. }) {
            // The sender summed over addresses that a NAT may have changed since (RFC 3948 §3.1.2).
            ip::fix_upper_layer_checksum(out);
        }
        Ok(())
    }

    /// The checks of an opened packet: the SA's selectors (RFC 4301 §5.2 step 4), then the latches. An ICMP error acts on
    /// the flow that it quotes, so that flow's latch decides as well.
    fn admit(&self, sa: &Sa, view: &Packet<'_>) -> Result<(), DropReason> {
        let flow = view.inbound_flow();
        // Of a packet that we sent under this SA; RFC 4301 §6.2.
        let is_about_us = |error: &Packet<'_>| {
            error.returned().is_some_and(|ours| sa.selects(&ours.outbound_flow(), ours.shows_ports()))
        };
        // Where a source route leads is not what the selectors were compared with.
        if view.is_source_routed() || !(sa.selects(&flow, view.shows_ports()) || is_about_us(view)) {
            return Err(DropReason::Selectors);
        }
        let (class, guarded) = (Some(sa.class), view.guarded(flow));
        let verdict = match view.begins_connection() {
            true => self.guard.check(Direction::Inbound, &guarded, class),
            false => self.guard.check_later(&guarded, class),
        };
        let admitted = verdict == Verdict::Pass
            && view.quoted_flow().is_none_or(|quoted| self.guard.check_later(&quoted, class) == Verdict::Pass);
        if admitted && view.ends_connection() {
            self.guard.ends(&guarded);
        }
        if admitted { Ok(()) } else { Err(DropReason::Latch) }
    }

    fn charge(&self, sa: &Sa, counter: &Counter, bytes: usize, now: Instant) -> Result<(), DropReason> {
        match sa.charge(counter, bytes, self.tick(now)) {
            Ok(()) => Ok(()),
            Err(Expiry::Soft) => {
                self.expire(sa, Expiry::Soft);
                Ok(())
            }
            Err(expiry @ (Expiry::Hard | Expiry::Dead)) => Err(self.expire(sa, expiry)),
        }
    }

    fn expire(&self, sa: &Sa, expiry: Expiry) -> DropReason {
        if expiry != Expiry::Dead {
            let event = PlaneEvent::Expire { spi_in: sa.spi_in, hard: expiry == Expiry::Hard };
            lock(&self.events).queue.push(event);
        }
        DropReason::Expired
    }

    fn report(&self, event: PlaneEvent) {
        let mut events = lock(&self.events);
        if events.queue.len() < MAX_WAITING_EVENTS {
            events.queue.push(event);
        }
    }

    fn report_unknown_spi(&self, now: Instant, spi: u32, from: &Encapsulation) {
        let remote = match *from {
            Encapsulation::None { remote, .. } => SocketAddr::new(remote, 0),
            Encapsulation::Udp { remote, .. } | Encapsulation::Stream { remote, .. } => remote,
        };
        let mut events = lock(&self.events);
        let in_this_second =
            events.unknown_spi_since.is_some_and(|since| now.saturating_duration_since(since) < Duration::from_secs(1));
        if !in_this_second {
            events.unknown_spi_since = Some(now);
            events.unknown_spi_count = 0;
        }
        if events.unknown_spi_count < UNKNOWN_SPI_PER_SECOND && events.queue.len() < MAX_WAITING_EVENTS {
            events.unknown_spi_count += 1;
            events.queue.push(PlaneEvent::UnknownSpi { spi, remote });
        }
    }

    fn report_selectors(&self, now: Instant, sa: &Sa, inner: &[u8]) {
        let mut events = lock(&self.events);
        let lately = |at: Instant| now.saturating_duration_since(at) < SELECTORS_EVERY;
        // In transport mode, what came from elsewhere than the peer has no inner packet.
        if !inner.is_empty() && !events.selectors_at.is_some_and(lately) && events.queue.len() < MAX_WAITING_EVENTS {
            events.selectors_at = Some(now);
            let start = inner.get(..REPORTED_START).unwrap_or(inner).to_vec();
            events.queue.push(PlaneEvent::InvalidSelectors { spi_in: sa.spi_in, start });
        }
    }

    fn count(&self, reason: DropReason) {
        let counter = DropReason::ALL.iter().position(|one| *one == reason).and_then(|at| self.drops.get(at));
        if let Some(counter) = counter {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Milliseconds, from 1.
    fn tick(&self, now: Instant) -> u64 {
        let first = self.first_now.get_or_init(|| now);
        u64::try_from(now.saturating_duration_since(*first).as_millis()).unwrap_or(u64::MAX).saturating_add(1)
    }
}

/// For an ICMP error that no policy selects, from a router on the way: the SA that carries what goes back to who sent the
/// packet that it is about (RFC 4301 §6.2).
fn of_return_traffic<'a>(tables: &'a Tables, error: &Packet<'_>) -> Option<&'a Arc<Entry>> {
    let about = error.returned()?;
    match tables.select(&about.inbound_flow(), about.shows_ports())? {
        Selected::Pair(entry) => Some(entry),
        Selected::Trap(_) => None,
    }
}

/// Where an outbound packet goes.
enum Chosen<'a, 'p> {
    Pair(Packet<'p>, &'a Entry),
    Trap(&'a TrapState, Flow),
}

/// The other source that an authentic packet shows, if it is one, and what is to be reported of it; `None` where the path
/// says nothing about the peer.
fn change_of_path(
    spi_in: u32,
    configured: &Encapsulation,
    from: &Encapsulation,
) -> Option<(Option<SocketAddr>, Option<PlaneEvent>)> {
    match (configured, from) {
        (Encapsulation::Udp { remote: configured, .. }, Encapsulation::Udp { remote, .. }) => {
            let seen = (configured != remote).then_some(*remote);
            Some((seen, seen.map(|remote| PlaneEvent::MappingChanged { spi_in, remote })))
        }
        (Encapsulation::Stream { stream: configured, .. }, &Encapsulation::Stream { stream, local, remote }) => {
            let seen = (*configured != stream).then_some(remote);
            Some((seen, seen.map(|remote| PlaneEvent::StreamChanged { spi_in, stream, local, remote })))
        }
        (Encapsulation::None { .. } | Encapsulation::Udp { .. } | Encapsulation::Stream { .. }, _) => None,
    }
}

/// What transport mode protects of a packet; the driver writes a new IP header before it, so what cannot be
/// expressed in that header cannot go: fragments (RFC 4303 §3.3.4), hop-by-hop options, other addresses.
fn transport_payload<'a>(view: &Packet<'a>, encapsulation: &Encapsulation) -> Result<(u8, &'a [u8]), DropReason> {
    let (next_header, payload) = view.transport_payload();
    let hop_by_hop = view.source().is_ipv6() && next_header == protocol::HOP_BY_HOP;
    let local = encapsulation.local();
    let ours = view.destination() == encapsulation.remote() && (view.source() == local || local.is_unspecified());
    if view.fragment() != Fragment::Whole || hop_by_hop || !ours {
        return Err(DropReason::NoPolicy);
    }
    Ok((next_header, payload))
}

/// Octets of traffic flow confidentiality padding behind a payload (RFC 4303 §2.7).
fn tfc_padding(sa: &Sa, payload_len: usize, path_limit: usize) -> usize {
    let wanted = match (sa.mode, sa.tfc) {
        (Mode::Transport, _) | (_, TfcPadding::None) => return 0,
        // A stream has no MTU; what a usual path takes hides as much.
        (Mode::Tunnel, TfcPadding::Mtu) => path_limit.min(DEFAULT_PATH_MTU),
        (Mode::Tunnel, TfcPadding::To(length)) => usize::from(length),
    };
    let room = esp::longest_payload(&sa.outbound, path_limit).unwrap_or(0);
    wanted.min(room).saturating_sub(payload_len)
}

/// Octets that an ESP packet may have.
struct Limit {
    /// To go in one piece.
    path: usize,
    /// To go at all.
    hard: usize,
}

fn packet_limit(encapsulation: &Encapsulation, path_mtu: &PathMtus, tick: impl FnOnce() -> u64) -> Limit {
    let remote = encapsulation.remote();
    let ip_header = if remote.is_ipv4() { ip::IPV4_HEADER_LEN } else { ip::IPV6_HEADER_LEN };
    let outer = match encapsulation {
        Encapsulation::None { .. } => ip_header,
        Encapsulation::Udp { .. } => ip_header + UDP_HEADER_LEN,
        Encapsulation::Stream { .. } => return Limit { path: MAX_FRAME_PAYLOAD, hard: MAX_FRAME_PAYLOAD },
    };
    // Most planes never learn a path MTU; then there is nothing to hash.
    let mtu = if path_mtu.is_empty() { DEFAULT_PATH_MTU } else { lookup(path_mtu, remote, tick()) };
    Limit { path: mtu.saturating_sub(outer), hard: MAX_IP_PACKET - outer }
}

fn lookup(path_mtu: &PathMtus, remote: IpAddr, tick: u64) -> usize {
    match path_mtu.get(&remote) {
        Some((mtu, until)) if tick < *until => *mtu,
        _ => DEFAULT_PATH_MTU,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What these locks guard is whole after every statement, so a panic elsewhere does not spoil it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
