//! The hook through which a latch sees every packet (RFC 5660 §2).

use std::net::IpAddr;

use crate::selector::{Flow, TrafficSelector};

/// A congruence class: the interned number of all that a latch pins (both identities with their
/// credentials, mode, protection, suites, replay protection). Two SAs of one class are
/// interchangeable to every latch; SAs of different classes never are. 0 is no class.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClassId(pub u32);

/// Which way a packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// From the network to us, after decapsulation.
    Inbound,
    /// From us to the network, before encapsulation.
    Outbound,
}

/// What a guard says of one packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// The packet may go on.
    Pass,
    /// The packet must be dropped and counted: its flow is latched to another class, or broken.
    Drop,
    /// As `Drop`; the sender of an outbound packet is told that it cannot get through (RFC 5660 §5.5, disposition c).
    Unreachable,
}

/// Decides on each packet of the data plane. Called on every packet from several threads: an
/// implementation takes no lock for long and never blocks.
pub trait FlowGuard: Send + Sync {
    /// Says whether a packet of `flow` may pass under an SA of `class`; `None` is a packet that
    /// no SA protects (bypass). A non-first fragment has both ports 0, and in IPv6 protocol 44: which protocol it
    /// belongs to is not its own to say (RFC 8200 §4.5).
    ///
    /// A verdict holds for the packet it was asked for, which is then under way: a thread that has it may deliver or send
    /// that one packet up to some tenths of a second after a latch broke, still under the SA and class that it named.
    fn check(&self, direction: Direction, flow: &Flow, class: Option<ClassId>) -> Verdict;

    /// An outbound packet of `flow`, which shows its ports, did not go out: no SA is there for it, or it may not pass. A guard
    /// that will let it pass soon may keep a copy.
    fn keep(&self, _flow: &Flow, _packet: &[u8]) {}

    /// A TCP segment of `flow` that ends its connection, a FIN or RST, has passed.
    fn ends(&self, _flow: &Flow) {}

    /// Says whether a packet about `flow`, ours, may pass that came under an SA of `class` and begins nothing: an ICMP error,
    /// or a TCP segment that is not a connection's first.
    fn check_later(&self, flow: &Flow, class: Option<ClassId>) -> Verdict {
        self.check(Direction::Inbound, flow, class)
    }
}

/// What the operating system lets pass of a latched flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Passage {
    /// Nothing.
    None,
    /// Nothing yet: an SA is being made. Where the system can, it drops what is sent without telling the sender.
    Larval,
    /// What SAs of this class carry.
    Class(ClassId),
    /// What no SA carries (RFC 5660 §3.1).
    Clear,
}

/// Logical entries at the head of the SPD, each for one flow (RFC 5660 §2.3, §3.1). They are the routing's part: what the
/// packet check and the system's barrier do with a packet is theirs. They end with the process, or with its successor's start.
///
/// Calls return when the system has done what they ask. They are short, and may come from any thread.
pub trait LogicalSpd: Send + Sync {
    /// From now on the flow has a BYPASS entry (RFC 4301 §4.4.1): its packets go past the tunnel, whatever SAs and traps say.
    /// When it fails, it has none.
    fn bypass(&self, flow: &Flow) -> Result<(), String>;
    /// It has none any more.
    fn remove(&self, flow: &Flow);
}

/// A port of ours, with one address or all of one family, whose connections are latched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Port {
    /// Upper-layer protocol.
    pub protocol: u8,
    /// Our address; the unspecified one is any of its family.
    pub local: IpAddr,
    /// The port's number.
    pub number: u16,
}

impl Port {
    /// True when a flow's local end is this, or one that takes in more, as that of a socket which listens.
    pub fn meets(&self, flow: &Flow) -> bool {
        let any = self.local.is_unspecified() && self.local.is_ipv4() == flow.local.is_ipv4();
        (self.protocol, self.number) == (flow.protocol, flow.local_port)
            && (any || self.local == flow.local || flow.local.is_unspecified())
    }
}

/// What an SA covers, and what may come to a port by it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Packets of the SA's class, or none.
    pub passage: Passage,
    /// Our ends.
    pub local_ts: Vec<TrafficSelector>,
    /// The other ends.
    pub remote_ts: Vec<TrafficSelector>,
}

/// The operating system's own barrier around latched flows, beside the packet check: it keeps them from all ways past the
/// tunnel, is there where the system does ESP and nobody checks packets, and outlives the process.
///
/// Calls return when the system has done what they ask. They are short, and may come from any thread.
pub trait FlowBarrier: Send + Sync {
    /// From now on, packets of the flow pass as said and not otherwise, but for those of the tunnel's device, which the
    /// packet check sees. Replaces what was said of the flow before. When it fails, what was said before still holds.
    fn set(&self, flow: &Flow, passage: Passage) -> Result<(), String>;
    /// The flow's latch is gone, but what is left of its connection may still send: all stays until [`Self::lift`].
    fn abandon(&self, flow: &Flow);
    /// Flows without a latch whose barrier still stands: abandoned ones, and those of an earlier process.
    fn abandoned(&self) -> Vec<Flow>;
    /// Takes the barrier of an abandoned flow away: no connection is left that it could be about.
    fn lift(&self, flow: &Flow);
    /// Puts right what others have taken away from it; to be called now and then. Gives the flows that pass by it, since
    /// something of others goes before.
    fn verify(&self) -> Vec<Flow>;
    /// From now on, a flow of the port that is not latched passes where one claim is about it, or several with the same
    /// passage, by that passage; and else not at all. Replaces what was said of the port before. When it fails, no such flow
    /// passes, or only by what was and is said.
    fn set_port(&self, port: &Port, claims: &[Claim]) -> Result<(), String>;
    /// Nothing is said of the port any more.
    fn lift_port(&self, port: &Port);
    /// Ports that an earlier process left, and through which no flow passes until they are lifted.
    fn abandoned_ports(&self) -> Vec<Port>;
    /// True where the system does ESP, so that the packet check does not see all packets.
    fn stands_alone(&self) -> bool;
    /// True where it also keeps ICMP errors about a flow from its socket that did not come by its passage.
    fn holds_back_errors(&self) -> bool;
}

/// The guard of a plane without latches.
#[derive(Debug, Default)]
pub struct NoLatches;

impl FlowGuard for NoLatches {
    fn check(&self, _: Direction, _: &Flow, _: Option<ClassId>) -> Verdict {
        Verdict::Pass
    }
}
