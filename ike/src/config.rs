//! What a connection is, as the engine sees it: parsed, validated, immutable. Its sources are
//! `swanctl.conf` and VICI's `load-conn`.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipsec::plane::{KernelOptions, Lifetime, Mode, TfcPadding};
use ipsec::selector::TrafficSelector;
use ipsec::transform::Proposal;
use pad::{Identity, IdentityPattern, LocalAuth, PadEntry};

use crate::engine::{Gateway, Path};

/// `connections.<name>`.
#[derive(Clone, Debug)]
pub struct Connection {
    /// Name.
    pub name: String,
    /// `local_addrs`, resolved to ranges; empty is any.
    pub local_addrs: Vec<AddressRange>,
    /// `remote_addrs`, resolved to ranges; empty is any.
    pub remote_addrs: Vec<AddressRange>,
    /// `local_port`: 500 moves to 4500 by NAT traversal.
    pub local_port: u16,
    /// `remote_port`.
    pub remote_port: u16,
    /// `proposals`, in order.
    pub proposals: Vec<Proposal>,
    /// The identity that we assert; `None` asserts the local address.
    pub local_id: Option<Identity>,
    /// How we authenticate.
    pub local_auth: LocalAuth,
    /// Whom we admit; `remote.name` is the connection's name.
    pub remote: PadEntry,
    /// `children`, in order.
    pub children: Vec<Arc<Child>>,
    /// `fragmentation`.
    pub fragmentation: Fragmentation,
    /// `encap`: pretend a NAT, so that ESP is always encapsulated in UDP.
    pub force_encapsulation: bool,
    /// `mobike`: announce and serve MOBIKE (RFC 4555).
    pub mobike: bool,
    /// `send_cert`.
    pub send_cert: SendCert,
    /// `send_certreq`.
    pub send_certreq: bool,
    /// `dpd_delay`: liveness check after this long without proof of life; zero is off.
    pub dpd_delay: Duration,
    /// `rekey_time`; zero is off.
    pub rekey_time: Duration,
    /// `reauth_time`; zero is off.
    pub reauth_time: Duration,
    /// `over_time`: hard limit after rekey or reauth time.
    pub over_time: Duration,
    /// `rand_time`: taken off the rekey time at random.
    pub rand_time: Duration,
    /// `keyingtries`: retransmission sequences of IKE_SA_INIT; 0 is for ever.
    pub keyingtries: u32,
    /// `dscp`: the code point of IKE messages, and of streams; below 64.
    pub dscp: u8,
    /// `unique`.
    pub unique: Unique,
    /// `ppk_id`: as initiator the PPK_ID that we name, as responder those that the peer may name (RFC 8784).
    pub ppk_id: Option<IdentityPattern>,
    /// `ppk_required`: nothing without a PPK.
    pub ppk_required: bool,
    /// `ppk_rekey`: as initiator we rekey an IKE SA that has used a PPK at once.
    pub ppk_rekey: bool,
    /// `childless`: RFC 6023.
    pub childless: Childless,
    /// `redirect_to` and `redirect_phase`: where an initiator is sent to, and when (RFC 5685).
    pub redirect_to: Option<(Gateway, RedirectPhase)>,
    /// `session_resumption`: as initiator ask for tickets and come back with them, as responder give and take them (RFC
    /// 5723).
    pub session_resumption: bool,
    /// `tcp`: RFC 9329.
    pub tcp: TcpPolicy,
    /// `tcp_delay`: UDP silence after which `fallback` starts over TCP.
    pub tcp_delay: Duration,
    /// `tcp_remote_port`.
    pub tcp_remote_port: u16,
    /// `tcp` with TLS (RFC 9329 Appendix A): the name that the peer's TLS certificate must have.
    pub tls: Option<String>,
    /// `tcp_proxy`: host and port of a web proxy that our streams go through.
    pub tcp_proxy: Option<String>,
    /// `tcp_probe_udp`: how often an IKE SA that `fallback` took to TCP tries UDP again; zero never.
    pub tcp_probe_udp: Duration,
    /// `tcp_reauth_udp`: it does so also where it cannot move by MOBIKE, with another IKE SA that takes its place.
    pub tcp_reauth_udp: bool,
    /// `vips`: virtual addresses to ask for; an unspecified one is any of its family.
    pub vips: Vec<IpAddr>,
    /// `pools`: where the peer's virtual address comes from; with one, the peer must ask for an address.
    pub pools: Vec<String>,
    /// `split_dns` and `dnssec_domains`.
    pub split_dns: SplitDns,
}

impl Connection {
    /// True when both ends of a path are among the connection's addresses.
    pub(crate) fn admits_addresses(&self, path: &Path) -> bool {
        let within = |ranges: &[AddressRange], address: IpAddr| {
            ranges.is_empty() || ranges.iter().any(|range| range.contains(address))
        };
        within(&self.local_addrs, path.local.ip()) && within(&self.remote_addrs, path.remote.ip())
    }

    /// True when an IKE SA that was made for `self` is good for `other` too: the same name, and nothing changed
    /// in who the two sides are, how they prove it, and what protects the IKE SA.
    pub(crate) fn authenticates_as(&self, other: &Self) -> bool {
        self.name == other.name
            && self.local_id == other.local_id
            && self.local_auth == other.local_auth
            && self.remote == other.remote
            && self.proposals == other.proposals
            && self.ppk_id == other.ppk_id
            && self.ppk_required == other.ppk_required
    }
}

/// Which domains of a peer's split DNS configuration are accepted (RFC 8598 §5, §6). Names are in lower case.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SplitDns {
    /// All domains are accepted.
    pub any: bool,
    /// These domains and what is below them are accepted.
    pub domains: Vec<String>,
    /// Trust anchors are accepted for these domains and what is below them.
    pub anchors: Vec<String>,
}

impl SplitDns {
    /// True when a split DNS configuration is asked for.
    pub(crate) fn wants_domains(&self) -> bool {
        self.any || !self.domains.is_empty()
    }

    /// True when the domain is accepted.
    pub(crate) fn accepts(&self, domain: &str) -> bool {
        self.any || is_below(domain, &self.domains)
    }

    /// True when trust anchors for the domain are accepted. Neither the root nor a top-level domain is ever trusted
    /// (RFC 8598 §6): who is its operator does not need us.
    pub(crate) fn trusts(&self, domain: &str) -> bool {
        self.anchors.iter().any(|anchor| anchor.contains('.') && is_below(domain, std::slice::from_ref(anchor)))
    }
}

/// A domain name in presentation format, in lower case and without the final dot. Others are of no use, and of danger
/// where a name goes into a script or another program's configuration: `None`.
pub fn domain_name(octets: &[u8]) -> Option<String> {
    let name = std::str::from_utf8(octets).ok()?.to_ascii_lowercase();
    let name = name.strip_suffix('.').unwrap_or(&name);
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|octet| octet.is_ascii_alphanumeric() || matches!(octet, b'-' | b'_'))
    };
    (name.len() <= 253 && name.split('.').all(label)).then(|| name.to_owned())
}

fn is_below(domain: &str, tops: &[String]) -> bool {
    tops.iter().any(|top| {
        domain == top || domain.strip_suffix(top.as_str()).is_some_and(|rest| !top.is_empty() && rest.ends_with('.'))
    })
}

/// An inclusive range of addresses of one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AddressRange {
    /// First.
    pub start: IpAddr,
    /// Last.
    pub end: IpAddr,
}

impl AddressRange {
    /// One address.
    pub fn host(address: IpAddr) -> Self {
        Self { start: address, end: address }
    }

    /// True when the address is inside.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.start.is_ipv4() == address.is_ipv4() && self.start <= address && address <= self.end
    }
}

/// `children.<name>`.
#[derive(Clone, Debug)]
pub struct Child {
    /// Name.
    pub name: String,
    /// `local_ts`.
    pub local_ts: Vec<ConfiguredSelector>,
    /// `remote_ts`.
    pub remote_ts: Vec<ConfiguredSelector>,
    /// `esp_proposals`, in order.
    pub esp_proposals: Vec<Proposal>,
    /// `mode`.
    pub mode: Mode,
    /// `rekey_time`; zero is off.
    pub rekey_time: Duration,
    /// `life_time`; zero is off.
    pub life_time: Duration,
    /// `rand_time`.
    pub rand_time: Duration,
    /// `rekey_bytes`, `life_bytes`, `rekey_packets`, `life_packets`.
    pub lifetime: Lifetime,
    /// `rand_bytes`: up to so many are taken off `rekey_bytes` at random.
    pub rand_bytes: u64,
    /// `rand_packets`.
    pub rand_packets: u64,
    /// `replay_window`.
    pub replay_window: u32,
    /// `start_action`.
    pub start_action: StartAction,
    /// `close_action`.
    pub close_action: StartAction,
    /// `dpd_action`.
    pub dpd_action: DpdAction,
    /// `reqid`; 0 lets the daemon number it.
    pub reqid: u32,
    /// `copy_df`.
    pub copy_df: bool,
    /// `copy_ecn`.
    pub copy_ecn: bool,
    /// `tfc_padding`.
    pub tfc_padding: TfcPadding,
    /// `inactivity`: closed after this long without traffic; zero is never.
    pub inactivity: Duration,
    /// Marks, interfaces and what else only the kernel's plane knows.
    pub options: KernelOptions,
    /// Which numbers among them each Child SA has of its own.
    pub numbering: Numbering,
    /// `updown` script.
    pub updown: Option<String>,
}

/// Which of [`Child::options`] are not as configured, but numbered by the daemon, and which repeat others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Numbering {
    /// The value of `mark_in`.
    pub mark_in: Number,
    /// The value of `mark_out`.
    pub mark_out: Number,
    /// `if_id_in`.
    pub if_id_in: Number,
    /// `if_id_out`.
    pub if_id_out: Number,
    /// `set_mark_in = %same`: the value is `mark_in`'s.
    pub set_mark_in_same: bool,
    /// `set_mark_out = %same`: the value is `mark_out`'s.
    pub set_mark_out_same: bool,
}

impl Numbering {
    /// True when the daemon gives some number.
    pub fn gives_any(&self) -> bool {
        let Self { mark_in, mark_out, if_id_in, if_id_out, .. } = self;
        [mark_in, mark_out, if_id_in, if_id_out].into_iter().any(|number| *number != Number::Configured)
    }
}

/// Where a number comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Number {
    /// Configuration.
    #[default]
    Configured,
    /// `%unique`: each Child SA has one, which its successors keep.
    Own,
    /// `%unique-dir`: each has one for either direction.
    OwnInDirection,
    /// `%unique` of the connection: each IKE SA has one, which its Child SAs share.
    OfIkeSa,
    /// `%unique-dir` of the connection: each IKE SA has one for either direction.
    OfIkeSaInDirection,
}

/// A selector in configuration: fixed, or `dynamic`, which stands for the IKE SA's own address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ConfiguredSelector {
    /// A fixed range.
    Fixed(TrafficSelector),
    /// The local or remote IKE address, with this protocol and these ports.
    Dynamic {
        /// Upper-layer protocol; 0 is any.
        protocol: u8,
        /// First port.
        start_port: u16,
        /// Last port.
        end_port: u16,
    },
}

impl ConfiguredSelector {
    /// The selector for an IKE SA whose address on this side is `address`.
    pub fn resolve(&self, address: IpAddr) -> TrafficSelector {
        match *self {
            Self::Fixed(selector) => selector,
            Self::Dynamic { protocol, start_port, end_port } => {
                TrafficSelector { protocol, start_port, end_port, start: address, end: address }
            }
        }
    }
}

/// `fragmentation` (RFC 7383).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fragmentation {
    /// Announce, accept, and fragment long messages.
    Yes,
    /// Announce and accept only.
    Accept,
    /// For IKEv2 the same as `Yes` (it concerns IKEv1's first message).
    Force,
    /// Neither.
    No,
}

/// `send_cert`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SendCert {
    /// Always.
    Always,
    /// If the peer sent a CERTREQ.
    IfAsked,
    /// Never.
    Never,
}

/// `unique`: what a new IKE SA of a known peer does to the old.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unique {
    /// Nothing, INITIAL_CONTACT ignored.
    Never,
    /// Old ones go on INITIAL_CONTACT only.
    No,
    /// The new one is refused.
    Keep,
    /// Old ones are deleted.
    Replace,
}

/// `start_action` and `close_action`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StartAction {
    /// Nothing.
    None,
    /// Install a trap policy.
    Trap,
    /// Initiate.
    Start,
}

/// `dpd_action`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DpdAction {
    /// Close.
    Clear,
    /// Close and trap.
    Trap,
    /// Initiate again.
    Restart,
}

/// `childless` (RFC 6023): whether an IKE SA comes up without a Child SA in IKE_AUTH.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Childless {
    /// Where the initiator wants it.
    Allow,
    /// As initiator with peers that support it; each Child SA then has a key exchange of its own.
    Prefer,
    /// Always; other peers are refused.
    Force,
    /// Never.
    Never,
}

/// `redirect_phase`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RedirectPhase {
    /// In IKE_SA_INIT: whoever comes, before anything is proved.
    Init,
    /// In IKE_AUTH: whom the connection admits.
    Auth,
}

/// `tcp` (RFC 9329 §5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TcpPolicy {
    /// Never.
    No,
    /// Over UDP first, over TCP where UDP stays silent.
    Fallback,
    /// Always.
    Yes,
}

/// Whose address as identity must be the one that its messages come from (RFC 4945 §3.1.1, `check_address_identities`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CheckAddressIdentities {
    /// Nobody's.
    Never,
    /// That of who proves it with a certificate, as the RFC has it.
    #[default]
    WithCertificates,
    /// That of who has a shared key too.
    Always,
}

/// Puzzles of RFC 8019: when we set them, and which we solve. All options are ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PuzzlePolicy {
    /// Half-open IKE SAs in all from which on initiators must solve a puzzle; 0 never (`charon.puzzle_threshold`).
    pub threshold: usize,
    /// Difficulty of the puzzles that we set, in zero bits; more when load is higher (`charon.puzzle_difficulty`).
    pub difficulty: u8,
    /// Most difficult puzzle that we solve as initiator; 0 solves none (`charon.puzzle_limit`).
    pub limit: u8,
}

impl Default for PuzzlePolicy {
    /// Under heavy attack only; 16 bits cost an initiator some tenths of a second, 20 some seconds.
    fn default() -> Self {
        Self { threshold: 1024, difficulty: 16, limit: 20 }
    }
}

/// How requests are repeated (`charon.retransmit_*`).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Retransmission {
    /// First wait.
    pub timeout: Duration,
    /// Factor from one wait to the next.
    pub base: f64,
    /// Repetitions before giving up.
    pub tries: u32,
    /// Longest wait; zero is no limit.
    pub limit: Duration,
    /// Up to so many percent are taken off each wait at random.
    pub jitter: u32,
}

impl Default for Retransmission {
    /// strongSwan's defaults: 4 s, 1.8, 5 repetitions.
    fn default() -> Self {
        Self { timeout: Duration::from_secs(4), base: 1.8, tries: 5, limit: Duration::ZERO, jitter: 0 }
    }
}
