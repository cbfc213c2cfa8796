//! Messages of the kernel's IPsec interface (linux/xfrm.h), to and from octets.
//!
//! Only what this crate sends and reads. Keys go from their owner straight into a buffer that wipes itself, and are
//! skipped where the kernel sends them back: no value here holds one.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use ipsec::plane::{Lifetime, Mark, Mode};
use zeroize::Zeroizing;

/// `nlmsg_type`s.
pub(super) mod kind {
    pub(in crate::xfrm) const ERROR: u16 = 2;
    pub(in crate::xfrm) const DONE: u16 = 3;
    pub(in crate::xfrm) const NEW_SA: u16 = 0x10;
    pub(in crate::xfrm) const DELETE_SA: u16 = 0x11;
    pub(in crate::xfrm) const GET_SA: u16 = 0x12;
    pub(in crate::xfrm) const NEW_POLICY: u16 = 0x13;
    pub(in crate::xfrm) const DELETE_POLICY: u16 = 0x14;
    pub(in crate::xfrm) const GET_POLICY: u16 = 0x15;
    pub(in crate::xfrm) const ACQUIRE: u16 = 0x17;
    pub(in crate::xfrm) const EXPIRE: u16 = 0x18;
    pub(in crate::xfrm) const UPDATE_POLICY: u16 = 0x19;
    pub(in crate::xfrm) const UPDATE_SA: u16 = 0x1a;
    pub(in crate::xfrm) const FLUSH_SA: u16 = 0x1c;
    pub(in crate::xfrm) const FLUSH_POLICY: u16 = 0x1d;
    pub(in crate::xfrm) const MAPPING: u16 = 0x26;
    pub(in crate::xfrm) const GET_DEFAULT: u16 = 0x28;
}

/// Attributes (`XFRMA_…`).
mod attribute {
    pub(super) const ALG_AUTH: u16 = 1;
    pub(super) const ALG_CRYPT: u16 = 2;
    pub(super) const ENCAP: u16 = 4;
    pub(super) const TEMPLATE: u16 = 5;
    pub(super) const POLICY: u16 = 7;
    pub(super) const LIFETIME_CURRENT: u16 = 9;
    pub(super) const LAST_USED: u16 = 15;
    pub(super) const ALG_AEAD: u16 = 18;
    pub(super) const ALG_AUTH_TRUNCATED: u16 = 20;
    pub(super) const MARK: u16 = 21;
    pub(super) const TFC_PADDING: u16 = 22;
    pub(super) const REPLAY_ESN: u16 = 23;
    pub(super) const EXTRA_FLAGS: u16 = 24;
    pub(super) const PADDING: u16 = 27;
    pub(super) const OFFLOAD_DEVICE: u16 = 28;
    pub(super) const SET_MARK: u16 = 29;
    pub(super) const SET_MARK_MASK: u16 = 30;
    pub(super) const IF_ID: u16 = 31;
}

/// Flags of a state (`XFRM_STATE_…`).
pub(super) mod flag {
    pub(in crate::xfrm) const NO_ECN: u8 = 1;
    pub(in crate::xfrm) const DECAPSULATE_DSCP: u8 = 2;
    pub(in crate::xfrm) const NO_PMTU_DISCOVERY: u8 = 4;
    pub(in crate::xfrm) const ANY_FAMILY: u8 = 32;
    pub(in crate::xfrm) const ESN: u8 = 128;
}

/// More flags of a state (`XFRM_SA_XFLAG_…`).
pub(super) mod extra_flag {
    pub(in crate::xfrm) const NO_DSCP_OUTSIDE: u32 = 1;
}

/// What a device does for a state (`XFRM_OFFLOAD_…`).
pub(super) mod offload {
    pub(in crate::xfrm) const IPV6: u8 = 1;
    pub(in crate::xfrm) const INBOUND: u8 = 2;
    pub(in crate::xfrm) const PACKET: u8 = 4;
}

/// What a policy is about (`XFRM_POLICY_…`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Direction {
    In = 0,
    Out = 1,
    Forward = 2,
}

/// A port and which of its bits count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Port {
    pub(super) port: u16,
    pub(super) mask: u16,
}

/// Packets of one direction (`struct xfrm_selector`). Both addresses are of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Selector {
    pub(super) source: (IpAddr, u8),
    pub(super) destination: (IpAddr, u8),
    pub(super) protocol: u8,
    pub(super) source_port: Port,
    pub(super) destination_port: Port,
    /// Index of the interface that they go over; 0 is any.
    pub(super) interface: u32,
}

impl Selector {
    /// The same packets on their way back.
    pub(super) fn reversed(self) -> Self {
        Self {
            source: self.destination,
            destination: self.source,
            source_port: self.destination_port,
            destination_port: self.source_port,
            ..self
        }
    }
}

/// One half of an algorithm's description: its name in the kernel's crypto API, and what comes with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Algorithm {
    pub(super) kind: AlgorithmKind,
    pub(super) name: &'static str,
    /// Bits of the ICV; 0 for a cipher alone.
    pub(super) icv_bits: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AlgorithmKind {
    Cipher,
    Integrity,
    Aead,
}

/// What names a state: destination, SPI, and that it is ESP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct StateId {
    pub(super) destination: IpAddr,
    pub(super) spi: u32,
}

/// Ports of source and destination of the packets that ESP travels in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ports {
    /// In TCP segments of a stream (RFC 9329) rather than in UDP datagrams (RFC 3948).
    pub(super) in_tcp: bool,
    pub(super) source: u16,
    pub(super) destination: u16,
}

impl Ports {
    fn reversed(self) -> Self {
        Self { source: self.destination, destination: self.source, ..self }
    }
}

/// Between which addresses and ports a state's packets travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ends {
    pub(super) source: IpAddr,
    pub(super) destination: IpAddr,
    /// `None` on plain IP.
    pub(super) ports: Option<Ports>,
}

impl Ends {
    /// As the other side sees them.
    pub(super) fn reversed(self) -> Self {
        Self { source: self.destination, destination: self.source, ports: self.ports.map(Ports::reversed) }
    }
}

/// An ESP state to install, without its keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct State {
    pub(super) id: StateId,
    pub(super) source: IpAddr,
    pub(super) reqid: u32,
    pub(super) mode: Mode,
    /// Which packets may use it; `None` is any of either family.
    pub(super) selector: Option<Selector>,
    pub(super) lifetime: Lifetime,
    pub(super) replay_window: u32,
    pub(super) esn: bool,
    pub(super) encapsulation: Option<Ports>,
    pub(super) flags: u8,
    pub(super) extra_flags: u32,
    /// The device that does a part, and which.
    pub(super) offload: Option<(u32, u8)>,
    pub(super) tfc_padding: u32,
    /// Mark put on what comes out of it.
    pub(super) set_mark: Mark,
    pub(super) mark: Mark,
    pub(super) if_id: u32,
}

/// A state as the kernel describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct StateReport {
    pub(super) id: StateId,
    pub(super) source: IpAddr,
    pub(super) protocol: u8,
    pub(super) ours: bool,
    pub(super) selector: Option<Selector>,
    pub(super) reqid: u32,
    pub(super) mode: u8,
    pub(super) flags: u8,
    pub(super) replay_window: u32,
    pub(super) lifetime: Lifetime,
    pub(super) bytes: u64,
    pub(super) packets: u64,
    /// Seconds since 1970 of the last packet, where the kernel keeps them.
    pub(super) last_used: Option<u64>,
    pub(super) encapsulation: Option<Ports>,
    pub(super) mark: Mark,
    pub(super) set_mark: Mark,
    pub(super) if_id: u32,
}

/// What a policy demands of a packet: one ESP SA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Template {
    pub(super) reqid: u32,
    pub(super) mode: Mode,
    /// Of the outer header; unspecified in transport mode.
    pub(super) source: IpAddr,
    pub(super) destination: IpAddr,
}

/// What names a policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct PolicyId {
    pub(super) direction: Direction,
    pub(super) selector: Selector,
    pub(super) mark: Mark,
    pub(super) if_id: u32,
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::In => "in",
            Self::Out => "out",
            Self::Forward => "fwd",
        })
    }
}

impl fmt::Display for PolicyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let direction = self.direction;
        let Selector { source, destination, protocol, source_port, destination_port, .. } = self.selector;
        write!(f, "{direction} {}/{} to {}/{}", source.0, source.1, destination.0, destination.1)?;
        if protocol != 0 {
            write!(f, " protocol {protocol}")?;
        }
        for (name, port) in [("source", source_port), ("destination", destination_port)] {
            if port.mask != 0 {
                write!(f, " {name} port {}/{:#x}", port.port, port.mask)?;
            }
        }
        Ok(())
    }
}

/// What a policy does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Protect(Template),
    Pass,
    Drop,
}

/// A policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Policy {
    pub(super) id: PolicyId,
    /// Less goes first.
    pub(super) priority: u32,
    pub(super) action: Action,
}

/// A policy as the kernel describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PolicyReport {
    pub(super) id: PolicyId,
    pub(super) ours: bool,
    /// Of a latch, ours or a predecessor's.
    pub(super) of_latch: bool,
    pub(super) priority: u32,
    /// Drops what it selects.
    pub(super) blocks: bool,
    /// `reqid`s of its templates.
    pub(super) reqids: Vec<u32>,
}

/// What the kernel says by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// A packet matched a policy and no state.
    Acquire { reqid: u32, packet: Selector },
    /// A limit of a state was reached.
    Expire { id: StateId, hard: bool },
    /// The peer's packets come from another address or port.
    Mapping { id: StateId, remote: SocketAddr },
    /// A state was removed.
    StateRemoved(StateId),
    /// All states were removed.
    StatesFlushed,
    /// Policies of ours were removed or changed.
    PoliciesChanged,
    /// All policies were removed.
    PoliciesFlushed,
    /// Policies of latches were removed.
    LatchesChanged,
    /// Somebody installed or changed a policy.
    Policy(PolicyReport),
    /// Somebody removed one of theirs.
    PolicyRemoved(PolicyId),
}

/// Stands in the `user` field of the selectors of all states and policies that are ours ("LtKy"). The kernel keeps it and
/// does not look at it: it compares it only where it compares whole selectors, so a policy of ours is never one of another
/// key manager's.
pub(super) const OWNER: u32 = 0x4c74_4b79;
/// Stands there in policies of latches ("LtLa").
pub(super) const LATCH_OWNER: u32 = 0x4c74_4c61;

/// Length of `struct nlmsghdr`.
pub(super) const HEADER: usize = 16;
const ESP: u8 = 50;
const ENCAP_ESP_IN_UDP: u16 = 2;
const ENCAP_ESP_IN_TCP: u16 = 7;
const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;
const NAME: usize = 64;
const POLICY_BLOCK: u8 = 1;
/// `XFRM_USERPOLICY_BLOCK`.
const BLOCKED_BY_DEFAULT: u8 = 1;
/// No message that we build is longer; a buffer that grows would leave parts of keys behind.
const ROOM: usize = 4096;

/// A message being built. Wiped when it is dropped.
pub(super) struct Message {
    octets: Zeroizing<Vec<u8>>,
}

impl Message {
    pub(super) fn new(kind: u16, flags: u16) -> Self {
        let mut message = Self { octets: Zeroizing::new(Vec::with_capacity(ROOM)) };
        message.u32(0);
        message.u16(kind);
        message.u16(flags);
        message.zeros(8);
        message
    }

    /// Flags of the request.
    pub(super) fn flags(&self) -> u16 {
        Reader { rest: self.octets.get(6..).unwrap_or_default() }.u16().unwrap_or_default()
    }

    /// The finished message. The kernel names `port`, whose socket it is sent from, in the news of what it changes.
    pub(super) fn finish(mut self, sequence: u32, port: u32) -> Zeroizing<Vec<u8>> {
        let length = u32::try_from(self.octets.len()).unwrap_or(u32::MAX);
        self.overwrite(0, &length.to_ne_bytes());
        self.overwrite(8, &sequence.to_ne_bytes());
        self.overwrite(12, &port.to_ne_bytes());
        self.octets
    }

    fn overwrite(&mut self, at: usize, octets: &[u8]) {
        if let Some(place) = self.octets.get_mut(at..at + octets.len()) {
            place.copy_from_slice(octets);
        }
    }

    fn put(&mut self, octets: &[u8]) {
        debug_assert!(self.octets.len() + octets.len() <= ROOM, "the buffer must not move");
        self.octets.extend_from_slice(octets);
    }

    fn zeros(&mut self, count: usize) {
        let length = self.octets.len() + count;
        self.octets.resize(length, 0);
    }

    fn u8(&mut self, value: u8) {
        self.put(&[value]);
    }

    fn u16(&mut self, value: u16) {
        self.put(&value.to_ne_bytes());
    }

    fn u16_be(&mut self, value: u16) {
        self.put(&value.to_be_bytes());
    }

    fn u32(&mut self, value: u32) {
        self.put(&value.to_ne_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.put(&value.to_ne_bytes());
    }

    /// `xfrm_address_t`.
    fn address(&mut self, address: IpAddr) {
        match address {
            IpAddr::V4(address) => {
                self.put(&address.octets());
                self.zeros(12);
            }
            IpAddr::V6(address) => self.put(&address.octets()),
        }
    }

    fn attribute(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
        let start = self.octets.len();
        self.u16(0);
        self.u16(kind);
        fill(self);
        let length = u16::try_from(self.octets.len() - start).unwrap_or(u16::MAX);
        self.overwrite(start, &length.to_ne_bytes());
        self.zeros(self.octets.len().next_multiple_of(4) - self.octets.len());
    }

    /// `struct xfrm_selector`, ours.
    fn selector(&mut self, selector: Option<&Selector>) {
        self.selector_of(OWNER, selector);
    }

    fn selector_of(&mut self, user: u32, selector: Option<&Selector>) {
        match selector {
            None => self.zeros(52),
            Some(selector) => {
                self.address(selector.destination.0);
                self.address(selector.source.0);
                self.u16_be(selector.destination_port.port);
                self.u16_be(selector.destination_port.mask);
                self.u16_be(selector.source_port.port);
                self.u16_be(selector.source_port.mask);
                self.u16(family(selector.source.0));
                self.u8(selector.destination.1);
                self.u8(selector.source.1);
                self.u8(selector.protocol);
                self.zeros(3);
                self.u32(selector.interface);
            }
        }
        self.u32(user);
    }

    /// `struct xfrm_id`.
    fn id(&mut self, destination: IpAddr, spi: u32) {
        self.address(destination);
        self.put(&spi.to_be_bytes());
        self.u8(ESP);
        self.zeros(3);
    }

    /// `struct xfrm_lifetime_cfg`: seconds are the key manager's business.
    fn lifetime(&mut self, lifetime: &Lifetime) {
        let Lifetime { soft_bytes, hard_bytes, soft_packets, hard_packets } = *lifetime;
        for limit in [soft_bytes, hard_bytes, soft_packets, hard_packets] {
            self.u64(limit.unwrap_or(u64::MAX));
        }
        self.zeros(32);
    }

    fn mark(&mut self, mark: Mark) {
        if mark != Mark::default() {
            self.attribute(attribute::MARK, |message| {
                message.u32(mark.value);
                message.u32(mark.mask);
            });
        }
    }

    fn encapsulation(&mut self, ports: Option<Ports>) {
        if let Some(Ports { in_tcp, source, destination }) = ports {
            self.attribute(attribute::ENCAP, |message| {
                message.u16(if in_tcp { ENCAP_ESP_IN_TCP } else { ENCAP_ESP_IN_UDP });
                message.u16_be(source);
                message.u16_be(destination);
                message.zeros(2 + 16);
            });
        }
    }

    fn if_id(&mut self, if_id: u32) {
        if if_id != 0 {
            self.attribute(attribute::IF_ID, |message| message.u32(if_id));
        }
    }

    fn algorithm(&mut self, algorithm: &Algorithm, key: &[u8]) {
        let Algorithm { kind, name, icv_bits } = *algorithm;
        let number = match kind {
            AlgorithmKind::Cipher => attribute::ALG_CRYPT,
            AlgorithmKind::Integrity => attribute::ALG_AUTH_TRUNCATED,
            AlgorithmKind::Aead => attribute::ALG_AEAD,
        };
        self.attribute(number, |message| {
            message.put(name.as_bytes());
            message.zeros(NAME.saturating_sub(name.len()));
            message.u32(u32::try_from(key.len() * 8).unwrap_or(u32::MAX));
            if kind != AlgorithmKind::Cipher {
                message.u32(icv_bits);
            }
            message.put(key);
        });
    }
}

/// Installs a state.
pub(super) fn put_state(flags: u16, state: &State, algorithms: &[(Algorithm, &[u8])]) -> Message {
    let mut message = Message::new(kind::NEW_SA, flags);
    let legacy_window = if needs_wide_window(state) { 0 } else { state.replay_window };
    message.selector(state.selector.as_ref());
    message.id(state.id.destination, state.id.spi);
    message.address(state.source);
    message.lifetime(&state.lifetime);
    // `curlft` and `stats`, and `seq`, which is for answers to an acquire.
    message.zeros(32 + 12 + 4);
    message.u32(state.reqid);
    message.u16(family(state.id.destination));
    message.u8(mode_number(state.mode));
    message.u8(u8::try_from(legacy_window).unwrap_or(u8::MAX));
    message.u8(state.flags | if state.esn { flag::ESN } else { 0 });
    message.zeros(7);
    for (algorithm, key) in algorithms {
        message.algorithm(algorithm, key);
    }
    message.encapsulation(state.encapsulation);
    if needs_wide_window(state) {
        message.attribute(attribute::REPLAY_ESN, |message| {
            let words = state.replay_window.div_ceil(32);
            message.u32(words);
            message.zeros(16);
            message.u32(state.replay_window);
            message.zeros(usize::try_from(words).unwrap_or_default() * 4);
        });
    }
    if state.tfc_padding != 0 {
        message.attribute(attribute::TFC_PADDING, |message| message.u32(state.tfc_padding));
    }
    if state.extra_flags != 0 {
        message.attribute(attribute::EXTRA_FLAGS, |message| message.u32(state.extra_flags));
    }
    if let Some((device, what)) = state.offload {
        message.attribute(attribute::OFFLOAD_DEVICE, |message| {
            message.u32(device);
            message.u8(what);
            message.zeros(3);
        });
    }
    if state.set_mark != Mark::default() {
        message.attribute(attribute::SET_MARK, |message| message.u32(state.set_mark.value));
        message.attribute(attribute::SET_MARK_MASK, |message| message.u32(state.set_mark.mask));
    }
    message.mark(state.mark);
    message.if_id(state.if_id);
    message
}

/// A state that the kernel described (`NEW_SA`), with its keys, counters and window, between other ends: to be added, or
/// with `UPDATE_SA` to take the place of itself. `None` when it is no such description.
pub(super) fn moved_state(kind: u16, flags: u16, description: &[u8], to: &Ends) -> Option<Message> {
    let mut reader = Reader { rest: description };
    let selector = reader.take(56)?;
    // Its destination.
    reader.take(16)?;
    let id = reader.take(8)?;
    // Its source.
    reader.take(16)?;
    let (limits, counters, statistics) = (reader.take(64)?, reader.take(32)?, reader.take(12 + 4 + 4)?);
    // Its family.
    reader.take(2)?;
    let rest = reader.take(10)?;
    let mut message = Message::new(kind, flags);
    message.put(selector);
    message.address(to.destination);
    message.put(id);
    message.address(to.source);
    message.put(limits);
    message.put(counters);
    message.put(statistics);
    message.u16(family(to.destination));
    message.put(rest);
    while let Some((kind, value)) = reader.attribute() {
        // The truncated form says the same and more of integrity.
        if !matches!(kind, attribute::ALG_AUTH | attribute::ENCAP | attribute::LAST_USED | attribute::PADDING) {
            message.attribute(kind, |message| message.put(value.rest));
        }
    }
    message.attribute(attribute::LIFETIME_CURRENT, |message| message.put(counters));
    message.encapsulation(to.ports);
    Some(message)
}

/// More than the older of the two forms can say.
fn needs_wide_window(state: &State) -> bool {
    state.esn || state.replay_window > 32
}

/// `DELETE_SA` or `GET_SA` of one state.
pub(super) fn name_state(kind: u16, flags: u16, id: StateId, mark: Mark) -> Message {
    let mut message = Message::new(kind, flags);
    message.address(id.destination);
    message.put(&id.spi.to_be_bytes());
    message.u16(family(id.destination));
    message.u8(ESP);
    message.zeros(1);
    message.mark(mark);
    message
}

/// Installs a policy, or with `UPDATE_POLICY` puts it in the place of what has its name.
pub(super) fn put_policy(kind: u16, flags: u16, policy: &Policy, owner: u32) -> Message {
    let mut message = Message::new(kind, flags);
    policy_info(&mut message, policy, owner);
    if let Action::Protect(template) = policy.action {
        message.attribute(attribute::TEMPLATE, |message| put_template(message, policy, &template));
    }
    message.mark(policy.id.mark);
    message.if_id(policy.id.if_id);
    message
}

/// `struct xfrm_userpolicy_info`.
fn policy_info(message: &mut Message, policy: &Policy, owner: u32) {
    message.selector_of(owner, Some(&policy.id.selector));
    message.lifetime(&Lifetime::default());
    message.zeros(32);
    message.u32(policy.priority);
    // The kernel chooses the index.
    message.u32(0);
    message.u8(policy.id.direction as u8);
    // XFRM_POLICY_ALLOW is 0.
    message.u8(if policy.action == Action::Drop { POLICY_BLOCK } else { 0 });
    // No flags, and the rest of the structure.
    message.zeros(1 + 1 + 4);
}

/// `struct xfrm_user_tmpl`.
fn put_template(message: &mut Message, policy: &Policy, template: &Template) {
    message.id(template.destination, 0);
    message.u16(match template.mode {
        Mode::Tunnel => family(template.destination),
        Mode::Transport => family(policy.id.selector.source.0),
    });
    message.zeros(2);
    message.address(template.source);
    message.u32(template.reqid);
    message.u8(mode_number(template.mode));
    message.zeros(3);
    // Any algorithms: which ones is the state's business.
    for _ in 0..3 {
        message.u32(u32::MAX);
    }
}

/// `DELETE_POLICY` or `GET_POLICY` of one policy: ours ([`OWNER`], [`LATCH_OWNER`]) or what others have by the same name
/// (0).
pub(super) fn name_policy(kind: u16, flags: u16, id: &PolicyId, user: u32) -> Message {
    let mut message = Message::new(kind, flags);
    message.selector_of(user, Some(&id.selector));
    message.u32(0);
    message.u8(id.direction as u8);
    message.zeros(3);
    message.mark(id.mark);
    message.if_id(id.if_id);
    message
}

/// Asks what becomes of packets that no policy is for.
pub(super) fn ask_default() -> Message {
    let mut message = Message::new(kind::GET_DEFAULT, 1);
    message.zeros(4);
    message
}

/// Reads the answer (`struct xfrm_userpolicy_default`): which of the three directions are blocked.
pub(super) fn blocked_by_default(payload: &[u8]) -> Option<Vec<Direction>> {
    let mut reader = Reader { rest: payload };
    let mut blocked = Vec::new();
    for direction in [Direction::In, Direction::Forward, Direction::Out] {
        if reader.u8()? == BLOCKED_BY_DEFAULT {
            blocked.push(direction);
        }
    }
    Some(blocked)
}

/// What `setsockopt` takes so that a socket's packets pass in the clear whatever policies say: a policy of its own for
/// all packets of its family, which demands nothing.
pub(crate) fn bypass(ipv6: bool, inbound: bool) -> Vec<u8> {
    let any: IpAddr = if ipv6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    let nothing = Port::default();
    let selector = Selector {
        source: (any, 0),
        destination: (any, 0),
        protocol: 0,
        source_port: nothing,
        destination_port: nothing,
        interface: 0,
    };
    let direction = if inbound { Direction::In } else { Direction::Out };
    let id = PolicyId { direction, selector, mark: Mark::default(), if_id: 0 };
    let mut message = Message::new(0, 0);
    policy_info(&mut message, &Policy { id, priority: 0, action: Action::Pass }, OWNER);
    message.octets.get(HEADER..).unwrap_or_default().to_vec()
}

/// Octets being read. What is missing is `None`, never a panic.
struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(count)?;
        self.rest = rest;
        Some(taken)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    fn u8(&mut self) -> Option<u8> {
        self.array().map(u8::from_ne_bytes)
    }

    fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_ne_bytes)
    }

    fn u16_be(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_ne_bytes)
    }

    fn u32_be(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_ne_bytes)
    }

    fn address(&mut self) -> Option<[u8; 16]> {
        self.array()
    }

    /// `struct xfrm_selector`, and what its `user` field says.
    fn selector(&mut self) -> Option<(Option<Selector>, u32)> {
        let (destination, source) = (self.address()?, self.address()?);
        let destination_port = Port { port: self.u16_be()?, mask: self.u16_be()? };
        let source_port = Port { port: self.u16_be()?, mask: self.u16_be()? };
        let family = self.u16()?;
        let (destination_length, source_length, protocol) = (self.u8()?, self.u8()?, self.u8()?);
        self.take(3)?;
        let interface = self.u32()?;
        let user = self.u32()?;
        let selector = ip(destination, family).zip(ip(source, family)).map(|(destination, source)| Selector {
            source: (source, source_length),
            destination: (destination, destination_length),
            protocol,
            source_port,
            destination_port,
            interface,
        });
        Some((selector, user))
    }

    fn lifetime(&mut self) -> Option<Lifetime> {
        let mut limit = || Some(Some(self.u64()?).filter(|limit| *limit != u64::MAX));
        let lifetime =
            Lifetime { soft_bytes: limit()?, hard_bytes: limit()?, soft_packets: limit()?, hard_packets: limit()? };
        self.take(32)?;
        Some(lifetime)
    }

    /// The next attribute.
    fn attribute(&mut self) -> Option<(u16, Reader<'a>)> {
        let (length, kind) = (usize::from(self.u16()?), self.u16()?);
        let value = self.take(length.checked_sub(4)?)?;
        let padding = length.next_multiple_of(4) - length;
        self.rest = self.rest.get(padding..).unwrap_or_default();
        Some((kind, Reader { rest: value }))
    }
}

fn ip(octets: [u8; 16], family: u16) -> Option<IpAddr> {
    match family {
        AF_INET => {
            let [a, b, c, d, ..] = octets;
            Some(Ipv4Addr::new(a, b, c, d).into())
        }
        AF_INET6 => Some(Ipv6Addr::from(octets).into()),
        _ => None,
    }
}

fn family(address: IpAddr) -> u16 {
    if address.is_ipv4() { AF_INET } else { AF_INET6 }
}

fn mode_number(mode: Mode) -> u8 {
    match mode {
        Mode::Transport => 0,
        Mode::Tunnel => 1,
    }
}

/// One message of a datagram.
pub(super) struct Received<'a> {
    pub(super) kind: u16,
    pub(super) sequence: u32,
    pub(super) payload: &'a [u8],
}

/// The messages of a datagram.
pub(super) fn messages(datagram: &[u8]) -> impl Iterator<Item = Received<'_>> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        let mut reader = Reader { rest };
        let length = usize::try_from(reader.u32()?).ok()?;
        let (kind, _flags, sequence, _port) = (reader.u16()?, reader.u16()?, reader.u32()?, reader.u32()?);
        let payload = reader.take(length.checked_sub(HEADER)?)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Received { kind, sequence, payload })
    })
}

/// What an `ERROR` message says: the system's error number, 0 for success, and the kernel's own words, if any.
pub(super) fn error(payload: &[u8]) -> Option<(i32, Option<String>)> {
    const TEXT: u16 = 1;
    let mut reader = Reader { rest: payload };
    let code = reader.array().map(i32::from_ne_bytes)?;
    // The header of our request; with NETLINK_CAP_ACK nothing of the rest comes back.
    reader.take(HEADER)?;
    while let Some((kind, value)) = reader.attribute() {
        if kind == TEXT {
            let text = value.rest.strip_suffix(&[0]).unwrap_or(value.rest);
            return Some((code, Some(String::from_utf8_lossy(text).into_owned())));
        }
    }
    Some((code, None))
}

/// Reads a `NEW_SA` message: of a dump, an answer or an event.
pub(super) fn state(payload: &[u8]) -> Option<StateReport> {
    let mut reader = Reader { rest: payload };
    let mut report = state_info(&mut reader)?;
    while let Some((kind, mut value)) = reader.attribute() {
        match kind {
            attribute::ENCAP => {
                let in_tcp = value.u16()? == ENCAP_ESP_IN_TCP;
                report.encapsulation = Some(Ports { in_tcp, source: value.u16_be()?, destination: value.u16_be()? });
            }
            attribute::REPLAY_ESN => {
                value.take(20)?;
                report.replay_window = value.u32()?;
            }
            attribute::LAST_USED => report.last_used = Some(value.u64()?),
            attribute::MARK => report.mark = Mark { value: value.u32()?, mask: value.u32()? },
            attribute::SET_MARK => report.set_mark = Mark { value: value.u32()?, mask: u32::MAX },
            attribute::SET_MARK_MASK => report.set_mark.mask = value.u32()?,
            attribute::IF_ID => report.if_id = value.u32()?,
            _ => {}
        }
    }
    Some(report)
}

/// `struct xfrm_usersa_info`.
fn state_info(reader: &mut Reader<'_>) -> Option<StateReport> {
    let (selector, user) = reader.selector()?;
    let destination = reader.address()?;
    let (spi, protocol) = (reader.u32_be()?, reader.u8()?);
    reader.take(3)?;
    let source = reader.address()?;
    let lifetime = reader.lifetime()?;
    let (bytes, packets) = (reader.u64()?, reader.u64()?);
    // When it was made and first used; statistics; the sequence number of an acquire.
    reader.take(16 + 12 + 4)?;
    let reqid = reader.u32()?;
    let family = reader.u16()?;
    let (mode, window, flags) = (reader.u8()?, reader.u8()?, reader.u8()?);
    reader.take(7)?;
    Some(StateReport {
        id: StateId { destination: ip(destination, family)?, spi },
        source: ip(source, family)?,
        protocol,
        ours: user == OWNER,
        selector,
        reqid,
        mode,
        flags,
        replay_window: window.into(),
        lifetime,
        bytes,
        packets,
        last_used: None,
        encapsulation: None,
        mark: Mark::default(),
        set_mark: Mark::default(),
        if_id: 0,
    })
}

/// Reads a `NEW_POLICY` message. `None` also for those of sockets.
pub(super) fn policy(payload: &[u8]) -> Option<PolicyReport> {
    let mut reader = Reader { rest: payload };
    let mut report = policy_report(&mut reader)?;
    while let Some((kind, mut value)) = reader.attribute() {
        match kind {
            attribute::TEMPLATE => report.reqids = template_reqids(value),
            attribute::MARK => report.id.mark = Mark { value: value.u32()?, mask: value.u32()? },
            attribute::IF_ID => report.id.if_id = value.u32()?,
            _ => {}
        }
    }
    Some(report)
}

/// `struct xfrm_userpolicy_info`.
fn policy_report(reader: &mut Reader<'_>) -> Option<PolicyReport> {
    let (selector, user) = reader.selector()?;
    reader.take(64 + 32)?;
    let priority = reader.u32()?;
    // The index.
    reader.take(4)?;
    let (direction, action) = (reader.u8()?, reader.u8()?);
    reader.take(1 + 1 + 4)?;
    let direction = match direction {
        0 => Direction::In,
        1 => Direction::Out,
        2 => Direction::Forward,
        _ => return None,
    };
    // A policy for either family at once has none: it is not ours, and nothing is compared with it.
    let selector = selector?;
    let id = PolicyId { direction, selector, mark: Mark::default(), if_id: 0 };
    let (ours, of_latch) = (user == OWNER, user == LATCH_OWNER);
    Some(PolicyReport { id, ours, of_latch, priority, blocks: action == POLICY_BLOCK, reqids: Vec::new() })
}

fn template_reqids(mut templates: Reader<'_>) -> Vec<u32> {
    let mut reqids = Vec::new();
    while let Some(template) = templates.take(64) {
        let mut reader = Reader { rest: template };
        reqids.extend(reader.take(24 + 4 + 16).and_then(|_| reader.u32()));
    }
    reqids
}

/// Reads a message that nobody asked for.
pub(super) fn event(kind: u16, payload: &[u8]) -> Option<Event> {
    let mut reader = Reader { rest: payload };
    match kind {
        kind::ACQUIRE => {
            // `struct xfrm_user_acquire`: id, source address, the packet, the policy, algorithms and a number.
            reader.take(24 + 16)?;
            let (packet, _) = reader.selector()?;
            reader.take(168 + 16)?;
            let mut reqid = None;
            while let Some((kind, value)) = reader.attribute() {
                if kind == attribute::TEMPLATE {
                    reqid = template_reqids(value).first().copied();
                }
            }
            Some(Event::Acquire { reqid: reqid?, packet: packet? })
        }
        kind::EXPIRE => {
            let report = state_info(&mut reader)?;
            Some(Event::Expire { id: report.id, hard: reader.u8()? != 0 })
        }
        kind::MAPPING => {
            // `struct xfrm_user_mapping`.
            let id = state_id(&mut reader)?;
            reader.take(4 + 16)?;
            let address = reader.address()?;
            reader.take(2)?;
            let port = reader.u16_be()?;
            let family = family(id.destination);
            Some(Event::Mapping { id, remote: SocketAddr::new(ip(address, family)?, port) })
        }
        kind::DELETE_SA => state_id(&mut reader).map(Event::StateRemoved),
        kind::FLUSH_SA => Some(Event::StatesFlushed),
        kind::FLUSH_POLICY => Some(Event::PoliciesFlushed),
        kind::DELETE_POLICY => {
            // `struct xfrm_userpolicy_id` says which by its index or by its selector; an attribute says all.
            reader.take(64)?;
            let (mut removed, mut mark, mut if_id) = (None, Mark::default(), 0);
            while let Some((kind, mut value)) = reader.attribute() {
                match kind {
                    attribute::POLICY => removed = policy_report(&mut value),
                    attribute::MARK => mark = Mark { value: value.u32()?, mask: value.u32()? },
                    attribute::IF_ID => if_id = value.u32()?,
                    _ => {}
                }
            }
            Some(match removed? {
                removed if removed.of_latch => Event::LatchesChanged,
                removed if removed.ours => Event::PoliciesChanged,
                removed => Event::PolicyRemoved(PolicyId { mark, if_id, ..removed.id }),
            })
        }
        kind::NEW_POLICY | kind::UPDATE_POLICY => match policy(payload)? {
            report if report.ours => Some(Event::PoliciesChanged),
            report if report.of_latch => Some(Event::LatchesChanged),
            report => Some(Event::Policy(report)),
        },
        _ => None,
    }
}

/// `struct xfrm_usersa_id`.
fn state_id(reader: &mut Reader<'_>) -> Option<StateId> {
    let destination = reader.address()?;
    let spi = reader.u32_be()?;
    let family = reader.u16()?;
    reader.take(2)?;
    Some(StateId { destination: ip(destination, family)?, spi })
}
