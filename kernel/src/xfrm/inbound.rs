//! Policies of the kernel around the tunnel of user space: what comes for this host, or is forwarded, without having been
//! in the tunnel is dropped where an SA is for it (RFC 4301 §5.2) or a shunt says so. Their order is that of the kernel's
//! own plane ([`super::priority`]).
//!
//! # What passes them by
//!
//! * Our own sockets for IKE and ESP, by policies of their own.
//! * What comes out of the tunnel's device: IPv4 by a switch of the device, IPv6 by a mark ([`TunnelMark`]); without these there
//!   are no policies for the family, since they would drop what the tunnel carries.
//! * What this host sends to itself: the loopback device has the switch, and gets the mark.
//! * Without either of these nobody would reach the peer: ICMPv6 neighbour and router discovery, and for this host itself
//!   ICMP errors that say that a packet is too big.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex};

use ipsec::plane::{Mark, Mode, PlaneError, SaPair, Shunt, ShuntAction};

use super::codec::{Action, Direction, Policy, PolicyId, Port, Selector};
use super::priority::{self, Purpose};
use super::tables::Owner;
use super::tunnel_mark::TunnelMark;
use super::{Xfrm, selectors};
use crate::network::lock;

/// The policies around the tunnel.
pub(crate) struct InboundPolicies {
    xfrm: Arc<Xfrm>,
    /// The tunnel's device has the switch for IPv4.
    passes: bool,
    /// `None` where IPv6 packets out of the tunnel cannot be told from others.
    mark: Option<TunnelMark>,
    /// SAs have policies here, not shunts alone.
    drops_cleartext: bool,
    /// How many owners have policies for IPv6 (true) and for IPv4.
    owners: Mutex<BTreeMap<bool, usize>>,
}

impl InboundPolicies {
    /// Without policies so far.
    pub(crate) fn new(xfrm: Arc<Xfrm>, passes: bool, mark: Option<TunnelMark>, drops_cleartext: bool) -> Self {
        Self { xfrm, passes, mark, drops_cleartext, owners: Mutex::default() }
    }

    /// The kernel's databases, whose events are to be heard.
    pub(crate) fn databases(&self) -> &Arc<Xfrm> {
        &self.xfrm
    }

    /// Installs the policies of a shunt: all of them, or on error none.
    pub(crate) fn add_shunt(&self, shunt: &Shunt) -> Result<(), PlaneError> {
        let action = match shunt.action {
            ShuntAction::Pass => Action::Pass,
            ShuntAction::Drop => Action::Drop,
        };
        let purpose = Purpose::Shunt(shunt.action);
        let selectors = selectors::outbound(&shunt.local_ts, &shunt.remote_ts, 0)?;
        self.add(Owner::Shunt(shunt.number), &selectors, purpose, action, &BOTH)
    }

    /// Removes a shunt's policies.
    pub(crate) fn remove_shunt(&self, number: u32) {
        self.remove(Owner::Shunt(number));
    }

    /// Installs the policies that drop what an SA pair of user space is for: all of them, or on error none.
    pub(crate) fn add_pair(&self, pair: &SaPair) -> Result<(), PlaneError> {
        if !self.drops_cleartext {
            return Ok(());
        }
        let selectors = match selectors::outbound(&pair.local_ts, &pair.remote_ts, 0) {
            Ok(selectors) => selectors,
            Err(error) => {
                let spi_in = format_args!("{:08x}", pair.spi_in);
                tracing::warn!(spi_in, %error, "what this SA is for is not dropped when it comes in clear");
                return Ok(());
            }
        };
        let directions: &[Direction] = match pair.mode {
            Mode::Tunnel => &BOTH,
            Mode::Transport => &[Direction::In],
        };
        self.add(Owner::Around(pair.spi_in), &selectors, Purpose::Sa, Action::Drop, directions)
    }

    /// Removes a pair's policies.
    pub(crate) fn remove_pair(&self, spi_in: u32) {
        self.remove(Owner::Around(spi_in));
    }

    /// Removes all.
    pub(crate) fn clear(&self) -> io::Result<()> {
        lock(&self.owners).clear();
        self.xfrm.tables().clear()
    }

    fn add(
        &self,
        owner: Owner,
        outbound: &[Selector],
        purpose: Purpose,
        action: Action,
        directions: &[Direction],
    ) -> Result<(), PlaneError> {
        let usable = |selector: &&Selector| if selector.source.0.is_ipv4() { self.passes } else { self.mark.is_some() };
        let mut policies = Vec::new();
        for selector in outbound.iter().filter(usable) {
            let (priority, selector) = (priority::of(selector, purpose), selector.reversed());
            for direction in directions {
                let id = PolicyId { direction: *direction, selector, mark: Mark::default(), if_id: 0 };
                policies.push(Policy { id, priority, action });
            }
        }
        let families = families(policies.iter().map(|policy| &policy.id));
        let mut owners = lock(&self.owners);
        let mut tables = self.xfrm.tables();
        // First what has to pass, and last on the way back.
        let mut commons = families.iter().filter(|ipv6| !owners.contains_key(ipv6));
        let outcome = commons
            .try_for_each(|ipv6| tables.install_around(Owner::Common { ipv6: *ipv6 }, &self.common(*ipv6)))
            .and_then(|()| tables.install_around(owner, &policies));
        if outcome.is_ok() {
            for ipv6 in families {
                *owners.entry(ipv6).or_default() += 1;
            }
            return Ok(());
        }
        for ipv6 in families.iter().filter(|ipv6| !owners.contains_key(ipv6)) {
            tables.remove_around(Owner::Common { ipv6: *ipv6 });
        }
        outcome
    }

    fn remove(&self, owner: Owner) {
        let mut owners = lock(&self.owners);
        let mut tables = self.xfrm.tables();
        for ipv6 in families(&tables.remove_around(owner)) {
            let left = owners.get(&ipv6).map_or(0, |count| count.saturating_sub(1));
            if left > 0 {
                owners.insert(ipv6, left);
            } else {
                owners.remove(&ipv6);
                tables.remove_around(Owner::Common { ipv6 });
            }
        }
    }

    /// What passes all others of the family.
    fn common(&self, ipv6: bool) -> Vec<Policy> {
        let any: IpAddr = if ipv6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
        let none = Port::default();
        let all = Selector {
            source: (any, 0),
            destination: (any, 0),
            protocol: 0,
            source_port: none,
            destination_port: none,
            interface: 0,
        };
        let exactly = |value: u8| Port { port: value.into(), mask: u16::MAX };
        let icmp = |protocol, kind, code| {
            let selector = Selector { protocol, source_port: exactly(kind), destination_port: code, ..all };
            let id = PolicyId { direction: Direction::In, selector, mark: Mark::default(), if_id: 0 };
            Policy { id, priority: OF_NEED, action: Action::Pass }
        };
        if !ipv6 {
            // Destination unreachable: fragmentation needed.
            return vec![icmp(1, 3, exactly(4))];
        }
        let marked = self.mark.iter().flat_map(|mark| {
            BOTH.map(|direction| {
                let id = PolicyId { direction, selector: all, mark: mark.mark(), if_id: 0 };
                Policy { id, priority: OUT_OF_THE_TUNNEL, action: Action::Pass }
            })
        });
        // Packet too big; router solicitation and advertisement, neighbour solicitation and advertisement.
        marked.chain([2, 133, 134, 135, 136].map(|kind| icmp(58, kind, none))).collect()
    }
}

/// Which families they are of: true is IPv6.
fn families<'a>(ids: impl IntoIterator<Item = &'a PolicyId>) -> BTreeSet<bool> {
    ids.into_iter().map(|id| id.selector.source.0.is_ipv6()).collect()
}

const BOTH: [Direction; 2] = [Direction::In, Direction::Forward];
/// Before all others: the packet engine has compared each packet with its latch.
const OUT_OF_THE_TUNNEL: u32 = 0;
/// Behind latches, before all SAs and shunts.
const OF_NEED: u32 = 10;
