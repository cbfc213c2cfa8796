//! Configuration payloads in both roles (RFC 7296 §2.19, §2.20, §3.15, RFC 8598). Only an authenticated IKE SA asks for
//! addresses, and only an authenticated peer gets some.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipsec::selector::TrafficSelector;

use super::child::ChildOffer;
use super::fault::Fault;
use super::parts::{Parts, address_selectors};
use super::{Core, Established};
use crate::config::{Connection, SplitDns, domain_name};
use crate::engine::assigned::{Assigned, Domain};
use crate::engine::context::Context;
use crate::engine::{Event, Path, Transport};
use crate::pool::{Holder, Shares, Wish};
use crate::wire::{Attribute, CfgType, Configuration, Payload, SUPPORTED};

/// Addresses of one family that one IKE SA may have; a peer that asks for more gets so many.
const MAX_ADDRESSES: usize = 4;
/// Servers, networks and domains of one kind that are kept out of a reply.
const MAX_VALUES: usize = 64;

/// What a CFG_REQUEST led to.
pub(super) struct Served {
    /// The CFG_REPLY, which goes before the SA payload.
    pub(super) reply: Option<Payload>,
    /// Why there is no Child SA.
    pub(super) fault: Option<Fault>,
}

/// The CFG_REQUEST of an initiator, if the connection wants addresses that the IKE SA does not have.
pub(super) fn request(ctx: &Context, connection: &Connection, core: &Core) -> Option<Configuration> {
    if connection.vips.is_empty() || !core.local_vips().is_empty() {
        return None;
    }
    // An address that we had shall be the same again, after a reauthentication above all.
    let mut before = ctx.shared.former_addresses.lock().get(&connection.name).cloned().unwrap_or_default();
    let mut wanted = |configured: IpAddr| {
        if !configured.is_unspecified() {
            return Some(configured);
        }
        let known = before.iter().position(|address| address.is_ipv4() == configured.is_ipv4())?;
        Some(before.remove(known))
    };
    let mut attributes = Vec::new();
    for vip in &connection.vips {
        attributes.push(match (vip, wanted(*vip)) {
            (IpAddr::V4(_), Some(IpAddr::V4(address))) => Attribute::Ip4Address(Some(address)),
            (IpAddr::V4(_), _) => Attribute::Ip4Address(None),
            (IpAddr::V6(_), Some(IpAddr::V6(address))) => Attribute::Ip6Address(Some((address, 128))),
            (IpAddr::V6(_), _) => Attribute::Ip6Address(None),
        });
    }
    if connection.vips.iter().any(IpAddr::is_ipv4) {
        attributes.extend([Attribute::Ip4Dns(None), Attribute::Ip4Nbns(None)]);
    }
    if connection.vips.iter().any(IpAddr::is_ipv6) {
        attributes.push(Attribute::Ip6Dns(None));
    }
    if connection.split_dns.wants_domains() {
        attributes.push(Attribute::DnsDomain(Vec::new()));
        if !connection.split_dns.anchors.is_empty() {
            attributes.push(Attribute::DnssecTa(None));
        }
    }
    Some(Configuration { kind: CfgType::REQUEST, attributes })
}

impl Established {
    /// Initiator: takes what a CFG_REPLY gives. Says what is missing for the Child SA, if we asked for it.
    pub(super) fn adopt_configuration(
        &mut self,
        ctx: &mut Context,
        offer: &mut ChildOffer,
        parts: &Parts,
    ) -> Option<&'static str> {
        offer.configuration.as_ref()?;
        let reply = parts.configuration.as_ref().filter(|reply| reply.kind == CfgType::REPLY);
        let Some(reply) = reply else { return Some("the peer assigned no virtual IP") };
        let assigned = self.read_reply(ctx, reply, parts);
        if assigned.local.is_empty() {
            return Some("the peer assigned no virtual IP");
        }
        for address in &assigned.local {
            ctx.log("IKE", 0, self.core.tag(), format!("installing new virtual IP {address}"));
        }
        ctx.shared.former_addresses.lock().insert(self.connection.name.clone(), assigned.local.clone());
        self.core.assigned = Some(Arc::new(assigned));
        self.announce(ctx);
        offer.fit_to(&self.core);
        None
    }

    pub(crate) fn read_reply(&self, ctx: &mut Context, reply: &Configuration, parts: &Parts) -> Assigned {
        let mut assigned = Assigned::default();
        // §3.15.1: not more than we asked for.
        let mut room = self.connection.vips.clone();
        for attribute in &reply.attributes {
            match attribute {
                Attribute::Ip4Address(Some(address)) => {
                    self.take_address(ctx, &mut assigned, &mut room, (*address).into())
                }
                Attribute::Ip6Address(Some((address, _))) => {
                    self.take_address(ctx, &mut assigned, &mut room, (*address).into());
                }
                Attribute::Ip4Dns(Some(address)) => push(&mut assigned.dns, IpAddr::V4(*address)),
                Attribute::Ip6Dns(Some(address)) => push(&mut assigned.dns, IpAddr::V6(*address)),
                Attribute::Ip4Nbns(Some(address)) => push(&mut assigned.nbns, IpAddr::V4(*address)),
                Attribute::Ip4Dhcp(Some(address)) => push(&mut assigned.dhcp, IpAddr::V4(*address)),
                Attribute::Ip6Dhcp(Some(address)) => push(&mut assigned.dhcp, IpAddr::V6(*address)),
                Attribute::Ip4Subnet(Some((address, mask))) => {
                    if let Some(prefix) = prefix_of(*mask) {
                        push(&mut assigned.subnets, (IpAddr::V4(*address), prefix));
                    }
                }
                Attribute::Ip6Subnet(Some((address, prefix))) => {
                    push(&mut assigned.subnets, (IpAddr::V6(*address), *prefix));
                }
                // §3.15.1: what is unknown or of no use here is ignored.
                _ => {}
            }
        }
        assigned.dns.retain(|address| is_host(*address));
        // RFC 8598 §2, §3.2, §8: only with name servers, and only where not all traffic goes to the peer.
        if !assigned.dns.is_empty() && is_split(parts) {
            assigned.domains = domains(&reply.attributes, &self.connection.split_dns);
        }
        assigned
    }

    fn take_address(&self, ctx: &mut Context, assigned: &mut Assigned, room: &mut Vec<IpAddr>, address: IpAddr) {
        let asked = room.iter().position(|vip| vip.is_ipv4() == address.is_ipv4());
        match asked.filter(|_| is_host(address) && !assigned.local.contains(&address)) {
            Some(at) => {
                room.remove(at);
                assigned.local.push(address);
            }
            None => ctx.log("IKE", 1, self.core.tag(), format!("ignoring the virtual IP {address} from the peer")),
        }
    }

    /// Responder: what the peer gets in a message that may ask for a Child SA.
    pub(super) fn serve_configuration(&mut self, ctx: &mut Context, parts: &Parts, shares: Shares) -> Served {
        let request = parts.configuration.as_ref().filter(|request| request.kind == CfgType::REQUEST);
        let (reply, refused) = match request {
            Some(request) => self.answer_request(ctx, &request.attributes, shares),
            None => (None, false),
        };
        let unserved = self.core.remote_vips().is_empty();
        // §2.19: `pools` demands that the peer asks.
        let fault = if refused {
            Some(Fault::InternalAddressFailure)
        } else if unserved && !self.connection.pools.is_empty() && parts.sa.is_some() {
            ctx.log("IKE", 1, self.core.tag(), "expected a virtual IP request, sending FAILED_CP_REQUIRED".to_owned());
            Some(Fault::FailedCpRequired)
        } else {
            None
        };
        Served { reply, fault }
    }

    /// INFORMATIONAL: the answer to the peer's Configuration payload (§2.20, §3.15.4).
    pub(super) fn answer_configuration(&mut self, ctx: &mut Context, parts: &Parts) -> Vec<Payload> {
        let Some(asked) = &parts.configuration else { return Vec::new() };
        match asked.kind {
            CfgType::REQUEST => {
                let (reply, refused) = self.answer_request(ctx, &asked.attributes, Shares::Wanted);
                reply.into_iter().chain(refused.then(|| Fault::InternalAddressFailure.payload())).collect()
            }
            // §3.15: nothing that a peer would set is accepted.
            CfgType::SET => vec![Payload::Configuration(Configuration { kind: CfgType::ACK, attributes: Vec::new() })],
            // A reply or an acknowledgement has no place in a request.
            _ => Vec::new(),
        }
    }

    /// The CFG_REPLY, and whether the peer asked for addresses and has none.
    fn answer_request(&mut self, ctx: &mut Context, asked: &[Attribute], shares: Shares) -> (Option<Payload>, bool) {
        let wishes: Vec<IpAddr> = asked.iter().filter_map(wish).collect();
        if !wishes.is_empty() {
            self.assign(ctx, &wishes, shares);
        }
        let given: Vec<IpAddr> =
            self.core.remote_vips().iter().copied().filter(|vip| asks_for(&wishes, *vip)).collect();
        if !wishes.is_empty() && given.is_empty() {
            let line = "no virtual IP found, sending INTERNAL_ADDRESS_FAILURE";
            ctx.log("IKE", 1, self.core.tag(), line.to_owned());
            return (None, true);
        }
        let mut attributes: Vec<Attribute> = given
            .iter()
            .map(|address| match address {
                IpAddr::V4(address) => Attribute::Ip4Address(Some(*address)),
                IpAddr::V6(address) => Attribute::Ip6Address(Some((*address, 128))),
            })
            .collect();
        if !given.is_empty() {
            attributes.extend(self.pool_attributes(ctx, asked));
        }
        for attribute in asked {
            match attribute {
                // §2.20: an empty string declines.
                Attribute::ApplicationVersion(_) => {
                    let version = ctx.config.application_version.clone().unwrap_or_default();
                    attributes.push(Attribute::ApplicationVersion(version.into_bytes()));
                }
                Attribute::SupportedAttributes(_) => {
                    attributes.push(Attribute::SupportedAttributes(SUPPORTED.to_vec()));
                }
                _ => {}
            }
        }
        // §3.15.1: these two are not multi-valued, however often they are asked for.
        let mut once = [false; 2];
        attributes.retain(|attribute| {
            let index = match attribute {
                Attribute::ApplicationVersion(_) => 0,
                Attribute::SupportedAttributes(_) => 1,
                _ => return true,
            };
            once.get_mut(index).is_some_and(|said| !std::mem::replace(said, true))
        });
        (Some(Payload::Configuration(Configuration { kind: CfgType::REPLY, attributes })), false)
    }

    /// Adds to the peer's addresses until each family has as many as it asks for, or there are no more.
    fn assign(&mut self, ctx: &mut Context, wishes: &[IpAddr], shares: Shares) {
        let identity = self.peer.id.clone();
        let holder = Holder { identity: identity.clone(), connection: self.peer.entry.clone() };
        let host = host(&self.core.path);
        let mut assigned = Assigned::clone(self.core.assigned.as_deref().unwrap_or(&Assigned::default()));
        let before = assigned.remote.len();
        for ipv4 in [true, false] {
            let held = assigned.remote.iter().filter(|address| address.is_ipv4() == ipv4).count();
            let of_family = wishes.iter().filter(|address| address.is_ipv4() == ipv4).take(MAX_ADDRESSES);
            for wanted in of_family.skip(held) {
                let shown = if wanted.is_unspecified() { "%any".to_owned() } else { wanted.to_string() };
                ctx.log("IKE", 1, self.core.tag(), format!("peer requested virtual IP {shown}"));
                let wish = Wish { address: *wanted, shares, host };
                let names = &self.connection.pools;
                let found = ctx.shared.pools.lock().acquire(names, &holder, self.core.id, wish);
                match found {
                    Some(address) => {
                        let line = format!("assigning virtual IP {address} to peer '{identity}'");
                        ctx.log("IKE", 0, self.core.tag(), line);
                        assigned.remote.push(address);
                    }
                    None => {
                        let line = format!("no virtual IP found for {shown} requested by '{identity}'");
                        ctx.log("IKE", 1, self.core.tag(), line);
                    }
                }
            }
        }
        if assigned.remote.len() > before {
            let all = ctx.shared.pools.lock();
            let pools = self.connection.pools.iter().filter_map(|name| all.config(name));
            assigned.pooled = pools.map(|pool| pool.range).collect();
            drop(all);
            self.core.assigned = Some(Arc::new(assigned));
            self.announce(ctx);
        }
    }

    /// What the pools have for the peer besides addresses; what only some peers understand, if it asked for that.
    fn pool_attributes(&self, ctx: &Context, asked: &[Attribute]) -> Vec<Attribute> {
        let wants_domains = asked.iter().any(|attribute| matches!(attribute, Attribute::DnsDomain(_)));
        let wants_anchors = asked.iter().any(|attribute| matches!(attribute, Attribute::DnssecTa(_)));
        let mut attributes: Vec<Attribute> = Vec::new();
        let all = ctx.shared.pools.lock();
        let pools = self.connection.pools.iter().filter_map(|name| all.config(name));
        for attribute in pools.flat_map(|pool| &pool.attributes) {
            let understood = match attribute {
                Attribute::DnsDomain(_) => wants_domains,
                Attribute::DnssecTa(_) => wants_anchors && wants_domains,
                _ => true,
            };
            // An anchor belongs to the domain before it, so what looks like a repetition is none.
            let repeated = !matches!(attribute, Attribute::DnssecTa(_)) && attributes.contains(attribute);
            if understood && !repeated {
                attributes.push(attribute.clone());
            }
        }
        drop(all);
        // RFC 8598 §3.2: domains come with name servers.
        let serves_names = attributes.iter().any(|one| matches!(one, Attribute::Ip4Dns(_) | Attribute::Ip6Dns(_)));
        attributes.retain(|one| serves_names || !matches!(one, Attribute::DnsDomain(_) | Attribute::DnssecTa(_)));
        attributes
    }

    fn announce(&self, ctx: &mut Context) {
        if let Some(assigned) = &self.core.assigned {
            ctx.event(Event::Assigned(self.core.id, Arc::clone(assigned)));
        }
    }
}

impl Core {
    /// Our virtual addresses.
    pub(crate) fn local_vips(&self) -> &[IpAddr] {
        self.assigned.as_ref().map_or(&[], |assigned| &assigned.local)
    }

    /// The peer's.
    pub(crate) fn remote_vips(&self) -> &[IpAddr] {
        self.assigned.as_ref().map_or(&[], |assigned| &assigned.remote)
    }

    /// What `dynamic` stands for in our selectors.
    pub(crate) fn local_addresses(&self) -> Vec<IpAddr> {
        if self.local_vips().is_empty() { vec![self.path.local.ip()] } else { self.local_vips().to_vec() }
    }

    /// What `dynamic` stands for in the peer's.
    pub(crate) fn remote_addresses(&self) -> Vec<IpAddr> {
        if self.remote_vips().is_empty() { vec![self.path.remote.ip()] } else { self.remote_vips().to_vec() }
    }
}

/// What `dynamic` offers for addresses that are yet to be assigned: all of their families (§2.19).
pub(super) fn any_address(request: &Configuration) -> Vec<TrafficSelector> {
    let all = |start: IpAddr, end: IpAddr| TrafficSelector { start, end, ..TrafficSelector::host(start) };
    let mut selectors = Vec::new();
    if request.attributes.iter().any(|attribute| matches!(attribute, Attribute::Ip4Address(_))) {
        selectors.push(all(Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::BROADCAST.into()));
    }
    if request.attributes.iter().any(|attribute| matches!(attribute, Attribute::Ip6Address(_))) {
        selectors.push(all(Ipv6Addr::UNSPECIFIED.into(), Ipv6Addr::from_bits(u128::MAX).into()));
    }
    selectors
}

/// Where a peer is, to tell whether two of its IKE SAs are of one host. Each stream has a port of its own.
pub(super) fn host(path: &Path) -> std::net::SocketAddr {
    match path.transport {
        Transport::Udp | Transport::UdpEncap => path.remote,
        Transport::Stream(_) => std::net::SocketAddr::new(path.remote.ip(), 0),
    }
}

fn wish(attribute: &Attribute) -> Option<IpAddr> {
    match attribute {
        Attribute::Ip4Address(address) => Some(address.unwrap_or(Ipv4Addr::UNSPECIFIED).into()),
        Attribute::Ip6Address(address) => Some(address.map_or(Ipv6Addr::UNSPECIFIED, |(address, _)| address).into()),
        _ => None,
    }
}

fn asks_for(wishes: &[IpAddr], address: IpAddr) -> bool {
    wishes.iter().any(|wish| wish.is_ipv4() == address.is_ipv4())
}

fn push<T: PartialEq>(values: &mut Vec<T>, value: T) {
    if values.len() < MAX_VALUES && !values.contains(&value) {
        values.push(value);
    }
}

/// An address that a host can have.
fn is_host(address: IpAddr) -> bool {
    let broadcast = matches!(address, IpAddr::V4(address) if address.is_broadcast());
    !address.is_unspecified() && !address.is_multicast() && !address.is_loopback() && !broadcast
}

/// The length of a netmask's prefix; `None` for one with holes.
fn prefix_of(mask: Ipv4Addr) -> Option<u8> {
    let ones = mask.to_bits().leading_ones();
    (ones == mask.to_bits().count_ones()).then(|| u8::try_from(ones).ok()).flatten()
}

/// True unless the peer wants all traffic of a family.
fn is_split(parts: &Parts) -> bool {
    let selectors = address_selectors(parts.ts_responder.as_deref().unwrap_or_default());
    !selectors.is_empty() && !selectors.iter().any(|selector| selector.prefix() == Some(0))
}

/// The domains of a reply that local policy accepts, with the trust anchors that it accepts (RFC 8598 §4.2, §5, §6).
fn domains(attributes: &[Attribute], policy: &SplitDns) -> Vec<Domain> {
    let mut domains: Vec<Domain> = Vec::new();
    // The domain that the anchors which follow belong to, if it is accepted.
    let mut current: Option<usize> = None;
    for attribute in attributes {
        match attribute {
            Attribute::DnsDomain(name) => {
                current = domain_name(name).filter(|name| policy.accepts(name)).and_then(|name| {
                    let known = domains.iter().position(|domain| domain.name == name);
                    known.or_else(|| {
                        (domains.len() < MAX_VALUES).then(|| {
                            domains.push(Domain { name, anchors: Vec::new() });
                            domains.len() - 1
                        })
                    })
                });
            }
            Attribute::DnssecTa(Some(anchor)) => {
                if let Some(domain) = current.and_then(|at| domains.get_mut(at))
                    && policy.trusts(&domain.name)
                {
                    push(&mut domain.anchors, anchor.clone());
                }
            }
            Attribute::DnssecTa(None) => {}
            _ => current = None,
        }
    }
    domains
}
