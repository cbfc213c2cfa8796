//! The hook through which a latch sees every packet (RFC 5660 §2).

use crate::selector::Flow;

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

    /// Says whether an ICMP error about `flow`, ours, may pass that came under an SA of `class`. Unlike a packet of the
    /// flow it begins nothing.
    fn check_error(&self, flow: &Flow, class: Option<ClassId>) -> Verdict {
        self.check(Direction::Inbound, flow, class)
    }
}

/// The guard of a plane without latches.
#[derive(Debug, Default)]
pub struct NoLatches;

impl FlowGuard for NoLatches {
    fn check(&self, _: Direction, _: &Flow, _: Option<ClassId>) -> Verdict {
        Verdict::Pass
    }
}
