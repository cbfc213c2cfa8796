//! What a data plane must do: the trait that the kernel (XFRM) and the user-space plane serve.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use crate::guard::ClassId;
use crate::secret::Secret;
use crate::selector::TrafficSelector;
use crate::transform::{Encr, Integ};

/// Tunnel or transport (RFC 4301 §3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Mode {
    /// The whole inner packet is protected.
    Tunnel,
    /// The upper-layer payload is protected; the IP header stays.
    Transport,
}

/// A TCP (or TLS) stream that carries IKE and ESP (RFC 9329). Numbers are never reused in a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StreamId(pub u64);

/// How ESP packets travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Encapsulation {
    /// IP protocol 50.
    None {
        /// Our outer address.
        local: IpAddr,
        /// The peer's outer address.
        remote: IpAddr,
    },
    /// UDP (RFC 3948).
    Udp {
        /// Our outer address and port.
        local: SocketAddr,
        /// The peer's outer address and port.
        remote: SocketAddr,
    },
    /// In a stream (RFC 9329 §3.2).
    Stream {
        /// The stream.
        stream: StreamId,
        /// Our end of it.
        local: SocketAddr,
        /// The peer's end of it.
        remote: SocketAddr,
    },
}

impl Encapsulation {
    /// Our outer address.
    pub fn local(&self) -> IpAddr {
        match self {
            Self::None { local, .. } => *local,
            Self::Udp { local, .. } | Self::Stream { local, .. } => local.ip(),
        }
    }

    /// The peer's outer address.
    pub fn remote(&self) -> IpAddr {
        match self {
            Self::None { remote, .. } => *remote,
            Self::Udp { remote, .. } | Self::Stream { remote, .. } => remote.ip(),
        }
    }
}

/// The negotiated ESP algorithms of a Child SA, both directions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EspSuite {
    /// Cipher.
    pub encr: Encr,
    /// Its key length in bits, without the salt (256 for ChaCha20).
    pub key_bits: u16,
    /// Integrity algorithm; `Integ::NONE` with a combined-mode cipher.
    pub integ: Integ,
    /// 64-bit sequence numbers (RFC 4303 §2.2.1).
    pub esn: bool,
}

/// Keys of one direction, cut from KEYMAT (RFC 7296 §2.17).
#[derive(Debug)]
pub struct EspKeys {
    /// Encryption key; with a combined-mode cipher followed by its salt, as RFC 4106 §8.1 and
    /// RFC 7634 §2 lay it out.
    pub encr: Secret,
    /// Integrity key; empty with a combined-mode cipher.
    pub integ: Secret,
}

/// A pair of SAs, one for each direction, with the policies that select traffic for it.
#[derive(Debug)]
pub struct SaPair {
    /// SPI that the peer writes to us; unique among our inbound SAs.
    pub spi_in: u32,
    /// SPI that we write to the peer.
    pub spi_out: u32,
    /// Same for all successors of a Child SA through its rekeys; one class for each `reqid`.
    pub reqid: u32,
    /// What latches compare.
    pub class: ClassId,
    /// Tunnel or transport.
    pub mode: Mode,
    /// Algorithms.
    pub suite: EspSuite,
    /// Keys for packets from the peer.
    pub keys_in: EspKeys,
    /// Keys for packets to the peer.
    pub keys_out: EspKeys,
    /// Outer addresses and encapsulation.
    pub encapsulation: Encapsulation,
    /// Our side's selectors.
    pub local_ts: Vec<TrafficSelector>,
    /// The peer side's selectors.
    pub remote_ts: Vec<TrafficSelector>,
    /// Anti-replay window in packets; 0 switches the check off.
    pub replay_window: u32,
    /// After how many octets or packets the plane asks for a rekey, and when it must stop.
    pub lifetime: Lifetime,
    /// Copy the inner DF bit to the outer header (RFC 4301 §8.1).
    pub copy_df: bool,
    /// Copy ECN by RFC 6040.
    pub copy_ecn: bool,
    /// Leave outbound traffic with the predecessor (same `reqid`) until the peer's first packet under this pair, or
    /// until the predecessor is retired or deleted: the responder of a rekey is ready before its peer (RFC 7296 §2.8).
    pub await_peer: bool,
    /// Padding of what is sent.
    pub tfc: TfcPadding,
    /// What only the kernel's plane knows.
    pub options: KernelOptions,
}

/// A mark on packets inside one host, and which of its bits count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Mark {
    /// The bits' values.
    pub value: u32,
    /// Which bits count; none is no mark at all.
    pub mask: u32,
}

/// Which way the DSCP goes between inner and outer header (RFC 4301 §5.1.2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum CopyDscp {
    /// From the inner to the outer one.
    #[default]
    Out,
    /// From the outer to the inner one.
    In,
    /// Both.
    Both,
    /// Neither.
    No,
}

/// What network devices do of ESP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Offload {
    /// Nothing.
    #[default]
    No,
    /// Encryption.
    Crypto,
    /// All of it, policies included.
    Packet,
    /// As much as the device can.
    Auto,
}

/// What only the kernel's plane can do with a pair or a trap. The options are `swanctl.conf`'s.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct KernelOptions {
    /// `mark_in`: of the packets that inbound policies are about.
    pub mark_in: Mark,
    /// `mark_out`: of the packets that the outbound policy and SA are about.
    pub mark_out: Mark,
    /// `mark_in_sa`: ESP needs `mark_in` as well.
    pub mark_in_sa: bool,
    /// `set_mark_in`: put on what comes out of the inbound SA.
    pub set_mark_in: Mark,
    /// `set_mark_out`: put on the ESP packets of the outbound SA.
    pub set_mark_out: Mark,
    /// `if_id_in`: XFRM interface of the inbound SA and policies.
    pub if_id_in: u32,
    /// `if_id_out`: XFRM interface of the outbound SA and policy.
    pub if_id_out: u32,
    /// `xfrm_interface`: the interface with that number, which leads to the tunnel.
    pub xfrm_interface: Option<String>,
    /// `priority` of the policies; 0 is by their selectors.
    pub priority: u32,
    /// `policies_fwd_out`: what is forwarded into the tunnel passes a shunt that drops it otherwise.
    pub policies_fwd_out: bool,
    /// `interface`: the policies are about packets on this one only.
    pub interface: Option<String>,
    /// `hw_offload`.
    pub offload: Offload,
    /// `copy_dscp`.
    pub copy_dscp: CopyDscp,
}

/// What marks a Child SA's policies and states among others of the same selectors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Tags {
    /// [`KernelOptions::mark_in`].
    pub mark_in: Mark,
    /// [`KernelOptions::mark_out`].
    pub mark_out: Mark,
    /// [`KernelOptions::if_id_in`].
    pub if_id_in: u32,
    /// [`KernelOptions::if_id_out`].
    pub if_id_out: u32,
}

impl KernelOptions {
    /// Marks and interfaces.
    pub fn tags(&self) -> Tags {
        let Self { mark_in, mark_out, if_id_in, if_id_out, .. } = *self;
        Tags { mark_in, mark_out, if_id_in, if_id_out }
    }

    /// The first option that another plane cannot leave out without changing what is protected.
    pub fn demanded(&self) -> Option<&'static str> {
        let none = Mark::default();
        let demands = [
            ("mark_in", self.mark_in != none),
            ("mark_out", self.mark_out != none),
            ("set_mark_in", self.set_mark_in != none),
            ("set_mark_out", self.set_mark_out != none),
            ("if_id_in", self.if_id_in != 0),
            ("if_id_out", self.if_id_out != 0),
            ("interface", self.interface.is_some()),
            ("hw_offload", matches!(self.offload, Offload::Crypto | Offload::Packet)),
        ];
        demands.into_iter().find(|(_, demanded)| *demanded).map(|(name, _)| name)
    }
}

/// Traffic flow confidentiality (RFC 4303 §2.7): up to which length packets are padded, so that theirs tells less. In tunnel
/// mode only, where the inner header says where the packet ends; never beyond what the path takes in one piece.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TfcPadding {
    /// Not at all.
    #[default]
    None,
    /// To what the path takes.
    Mtu,
    /// To so many octets of inner packet.
    To(u16),
}

/// The `reqid` that no SA pair ever has: what a policy demands that is to wait.
pub const RESERVED_REQID: u32 = u32::MAX;

/// A trap: a PROTECT policy without an SA (RFC 4301 §4.4.1). What it selects, and no SA as specific does, is dropped and
/// reported as [`PlaneEvent::Acquire`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trap {
    /// Names it in events and for its removal; unique among traps, whatever `reqid`s SAs have.
    pub reqid: u32,
    /// Our side's selectors.
    pub local_ts: Vec<TrafficSelector>,
    /// The peer side's selectors.
    pub remote_ts: Vec<TrafficSelector>,
    /// What only the kernel's plane knows.
    pub options: KernelOptions,
}

/// What a shunt does with what it selects: RFC 4301 §4.4.1's BYPASS and DISCARD.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ShuntAction {
    /// BYPASS: it goes in clear, before all policies of SAs and traps.
    Pass,
    /// DISCARD: it is dropped, unless an SA, a trap or a shunt that passes is for it.
    Drop,
}

/// A policy that needs no SA, for both directions and for what is forwarded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shunt {
    /// Names it for its removal; unique among shunts.
    pub number: u32,
    /// What it does.
    pub action: ShuntAction,
    /// Our side's selectors.
    pub local_ts: Vec<TrafficSelector>,
    /// The other side's selectors.
    pub remote_ts: Vec<TrafficSelector>,
    /// What only the kernel's plane knows.
    pub options: KernelOptions,
}

/// Limits by volume; time limits are the key manager's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lifetime {
    /// Octets after which the plane reports a soft expiry.
    pub soft_bytes: Option<u64>,
    /// Octets after which the SA is unusable.
    pub hard_bytes: Option<u64>,
    /// Packets after which the plane reports a soft expiry.
    pub soft_packets: Option<u64>,
    /// Packets after which the SA is unusable.
    pub hard_packets: Option<u64>,
}

/// Counters of one SA pair.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Inner octets received.
    pub bytes_in: u64,
    /// Packets received.
    pub packets_in: u64,
    /// Time since the last packet received.
    pub idle_in: Option<Duration>,
    /// Inner octets sent.
    pub bytes_out: u64,
    /// Packets sent.
    pub packets_out: u64,
    /// Time since the last packet sent.
    pub idle_out: Option<Duration>,
}

/// Which plane carries a pair, and why that one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Carrier {
    /// `user-space` or `kernel`.
    pub name: &'static str,
    /// A few words.
    pub reason: &'static str,
}

/// What a plane reports by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PlaneEvent {
    /// A packet matched a trap and no SA; at most one each second for a trap.
    Acquire {
        /// `reqid` of the trap.
        reqid: u32,
        /// The packet.
        flow: crate::selector::Flow,
    },
    /// A volume limit was reached.
    Expire {
        /// Inbound SPI of the pair.
        spi_in: u32,
        /// True when the SA may no longer be used.
        hard: bool,
    },
    /// The peer's UDP source changed on an authenticated packet (RFC 7296 §2.23).
    MappingChanged {
        /// Inbound SPI of the pair.
        spi_in: u32,
        /// Where packets now come from.
        remote: SocketAddr,
    },
    /// The newest authenticated packet of a pair came over another stream than the one that it is sent over (RFC 9329
    /// §6.1).
    StreamChanged {
        /// Inbound SPI of the pair.
        spi_in: u32,
        /// The stream.
        stream: StreamId,
        /// Our end of it.
        local: SocketAddr,
        /// The peer's end of it.
        remote: SocketAddr,
    },
    /// ESP with an SPI that we do not know (RFC 4301 §4.4.2, RFC 7296 §1.5); rate-limited.
    UnknownSpi {
        /// The SPI.
        spi: u32,
        /// Where it came from.
        remote: SocketAddr,
    },
    /// The peer sent under an SA what that is not for (RFC 4301 §5.2); rate-limited.
    InvalidSelectors {
        /// Inbound SPI of the pair.
        spi_in: u32,
        /// The first octets of the inner packet.
        start: Vec<u8>,
    },
}

/// Why a plane could not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum PlaneError {
    /// The inbound SPI is in use.
    #[error("inbound SPI {0:08x} is already in use")]
    SpiInUse(u32),
    /// There is no such SA.
    #[error("there is no SA with inbound SPI {0:08x}")]
    NoSuchSa(u32),
    /// A trap with this `reqid` is installed.
    #[error("a trap with reqid {0} is already installed")]
    TrapInUse(u32),
    /// There is no such trap.
    #[error("there is no trap with reqid {0}")]
    NoSuchTrap(u32),
    /// A shunt with this number is installed.
    #[error("a shunt with number {0} is already installed")]
    ShuntInUse(u32),
    /// There is no such shunt.
    #[error("there is no shunt with number {0}")]
    NoSuchShunt(u32),
    /// The plane lacks this algorithm or mode.
    #[error("the {plane} plane does not support {what}")]
    Unsupported {
        /// Which plane.
        plane: &'static str,
        /// What it lacks.
        what: String,
    },
    /// Keys are not as long as the suite needs.
    #[error("the key for {0} has a wrong length")]
    KeyLength(&'static str),
    /// The operating system refused.
    #[error("{action}: {source}")]
    System {
        /// What we tried to do, with names.
        action: String,
        /// The system's error.
        #[source]
        source: std::io::Error,
    },
}

/// A data plane. All calls are made by one task; a plane that has threads of its own hands work
/// to them. A call either takes effect as a whole or changes nothing.
pub trait DataPlane: Send {
    /// Which plane carries this pair, for logs and status.
    fn carrier(&self, spi_in: u32) -> Carrier;
    /// Installs both SAs and the policies, and makes the pair the one that traffic uses.
    ///
    /// A pair with the `reqid` of an installed one is its successor (rekey): outbound traffic
    /// moves over, the older inbound SA keeps receiving until it is deleted. A pair whose selectors
    /// overlap those of another `reqid`: the more specific remote selector wins, among equal ones the newest pair.
    fn install(&mut self, pair: SaPair) -> Result<(), PlaneError>;
    /// Points an installed pair at other outer addresses or another encapsulation.
    fn migrate(&mut self, spi_in: u32, to: Encapsulation) -> Result<(), PlaneError>;
    /// Never sends under this pair again, since its peer deleted it; what is under way to us is still received until
    /// [`Self::delete`] (RFC 7296 §1.4.1, §2.8).
    fn retire(&mut self, spi_in: u32) -> Result<(), PlaneError>;
    /// Removes the pair; its policies and routes go with the last pair of the `reqid`.
    fn delete(&mut self, spi_in: u32) -> Result<(), PlaneError>;
    /// Installs a trap with its routes. SAs that select the same packets and are as specific take precedence, installed
    /// before or after; wider ones do not.
    /// Received packets are not compared with it.
    fn install_trap(&mut self, trap: Trap) -> Result<(), PlaneError>;
    /// Removes a trap; routes that an SA or another trap needs stay.
    fn remove_trap(&mut self, reqid: u32) -> Result<(), PlaneError>;
    /// Installs a shunt, with the routes that keep what passes out of the tunnel.
    fn install_shunt(&mut self, shunt: Shunt) -> Result<(), PlaneError>;
    /// Removes a shunt.
    fn remove_shunt(&mut self, number: u32) -> Result<(), PlaneError>;
    /// Counters of one pair.
    fn usage(&self, spi_in: u32) -> Result<Usage, PlaneError>;
    /// Removes everything that this plane installed, system state included.
    fn shutdown(&mut self) -> Result<(), PlaneError>;
}
