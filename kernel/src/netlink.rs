//! Routing netlink (RFC 3549), blocking: links, addresses, routes and rules of the network namespace in which the
//! socket was opened.
//!
//! Requests are few and the system answers at once, so a plain socket serves better than a task: the data
//! plane's methods are synchronous.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, BorrowedFd};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, InfoXfrm, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::rule::{self, RuleAttribute, RuleFlags, RuleMessage, RulePortRange};
use netlink_packet_route::{AddressFamily, IpProtocol, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

use crate::interfaces::Interface;

/// Who has set the rules of shunts: no protocol of routing has this number.
pub(crate) const OURS: RouteProtocol = RouteProtocol::Other(76);

/// A connection to the routing tables of one network namespace.
pub(crate) struct Netlink {
    socket: Socket,
    sequence: u32,
    port: u32,
}

/// A route to a network. Without gateway and link it leads on to the tables behind its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Route {
    pub(crate) network: (IpAddr, u8),
    pub(crate) gateway: Option<IpAddr>,
    pub(crate) link: Option<u32>,
    pub(crate) source: Option<IpAddr>,
    pub(crate) table: u32,
}

/// A rule for packets that are routed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rule {
    pub(crate) ipv6: bool,
    pub(crate) priority: u32,
    pub(crate) action: RuleAction,
    pub(crate) selector: RuleSelector,
}

/// What becomes of packets that a rule selects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RuleAction {
    /// This table routes them, if it has a route.
    Lookup(u32),
    /// The rule of this priority is next.
    GoTo(u32),
    /// The next rule is.
    Nothing,
    /// They are refused.
    Prohibit,
}

/// Which packets a rule selects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum RuleSelector {
    /// All.
    Any,
    /// Those with this mark.
    Mark(u32),
    /// Those that come from this device.
    From(String),
    /// Those of some flows.
    Flow(FlowSelector),
    /// All packets but those with this mark.
    NotMark(u32),
    /// UDP.
    Udp,
}

/// Flows, in one direction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FlowSelector {
    pub(crate) from: (IpAddr, u8),
    pub(crate) to: (IpAddr, u8),
    /// 0 for any.
    pub(crate) protocol: u8,
    /// From 1 to 65534; `None` for any.
    pub(crate) source_ports: Option<(u16, u16)>,
    pub(crate) destination_ports: Option<(u16, u16)>,
}

impl Netlink {
    /// Connects to the routing tables of the calling thread's network namespace.
    pub(crate) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE).map_err(|e| context(e, "open a routing netlink socket"))?;
        let port = socket.bind_auto().map_err(|e| context(e, "bind a routing netlink socket"))?.port_number();
        Ok(Self { socket, sequence: 0, port })
    }

    /// What the system's news name as asker when it was this connection.
    pub(crate) fn port(&self) -> u32 {
        self.port
    }

    /// The index of a link; `NotFound` when there is none of that name.
    pub(crate) fn link_index(&mut self, name: &str) -> io::Result<u32> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        let answers = match self.request(RouteNetlinkMessage::GetLink(message), NLM_F_ACK) {
            Ok(answers) => answers,
            Err(e) if e.raw_os_error() == Some(ENODEV) => Vec::new(),
            Err(e) => return Err(context(e, format!("look up link {name}"))),
        };
        answers
            .iter()
            .find_map(|answer| match answer {
                RouteNetlinkMessage::NewLink(link) => Some(link.header.index),
                _ => None,
            })
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("there is no link {name}")))
    }

    /// Brings a link up.
    pub(crate) fn link_up(&mut self, index: u32) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        self.request(RouteNetlinkMessage::SetLink(message), NLM_F_ACK)
            .map_err(|e| context(e, format!("bring link {index} up")))?;
        Ok(())
    }

    /// Limits how many segments one packet with segmentation offload may hold.
    pub(crate) fn limit_segments(&mut self, index: u32, segments: u32) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes.push(LinkAttribute::GsoMaxSegs(segments));
        self.request(RouteNetlinkMessage::NewLink(message), NLM_F_ACK)
            .map_err(|e| context(e, format!("limit segments on link {index}")))?;
        Ok(())
    }

    /// Sets the MTU of a link.
    pub(crate) fn link_mtu(&mut self, index: u32, mtu: u16) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes.push(LinkAttribute::Mtu(mtu.into()));
        self.request(RouteNetlinkMessage::NewLink(message), NLM_F_ACK)
            .map_err(|e| context(e, format!("set the MTU of link {index} to {mtu}")))?;
        Ok(())
    }

    /// Removes a link.
    pub(crate) fn link_delete(&mut self, index: u32) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        self.request(RouteNetlinkMessage::DelLink(message), NLM_F_ACK)
            .map_err(|e| context(e, format!("remove link {index}")))?;
        Ok(())
    }

    /// Makes an XFRM interface with this number, in a group of links.
    pub(crate) fn add_xfrm_link(&mut self, name: &str, if_id: u32, group: u32) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        message.attributes.push(LinkAttribute::Group(group));
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Xfrm),
            LinkInfo::Data(InfoData::Xfrm(vec![InfoXfrm::IfId(if_id)])),
        ]));
        match self.request(RouteNetlinkMessage::NewLink(message), NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL) {
            Ok(_) => Ok(()),
            Err(e) => {
                let reason = match e.kind() {
                    io::ErrorKind::AlreadyExists => " (there is an interface of this name, or one of this number)",
                    _ if e.raw_os_error() == Some(EOPNOTSUPP) => " (this kernel has no XFRM interfaces)",
                    _ => "",
                };
                Err(context(e, format!("make the XFRM interface {name} with if_id {if_id}{reason}")))
            }
        }
    }

    /// Indices and names of the XFRM interfaces in a group of links.
    pub(crate) fn xfrm_links(&mut self, group: u32) -> io::Result<Vec<(u32, String)>> {
        let links = self
            .request(RouteNetlinkMessage::GetLink(LinkMessage::default()), NLM_F_DUMP)
            .map_err(|e| context(e, "list network interfaces"))?;
        let of_us = links.iter().filter_map(|answer| {
            let RouteNetlinkMessage::NewLink(link) = answer else { return None };
            let is_xfrm = |info: &LinkInfo| matches!(info, LinkInfo::Kind(InfoKind::Xfrm));
            let (mut name, mut ours, mut xfrm) = (None, false, false);
            for attribute in &link.attributes {
                match attribute {
                    LinkAttribute::IfName(is) => name = Some(is.clone()),
                    LinkAttribute::Group(is) => ours = *is == group,
                    LinkAttribute::LinkInfo(infos) => xfrm = infos.iter().any(is_xfrm),
                    _ => {}
                }
            }
            name.filter(|_| ours && xfrm).map(|name| (link.header.index, name))
        });
        Ok(of_us.collect())
    }

    /// Makes a veth pair: `name` here, `peer_name` in the namespace behind `peer`.
    pub(crate) fn add_veth(&mut self, name: &str, peer: BorrowedFd<'_>, peer_name: &str) -> io::Result<()> {
        let mut other = LinkMessage::default();
        other.attributes.push(LinkAttribute::IfName(peer_name.to_owned()));
        other.attributes.push(LinkAttribute::NetNsFd(peer.as_raw_fd()));
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(other))),
        ]));
        self.request(RouteNetlinkMessage::NewLink(message), NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL)
            .map_err(|e| context(e, format!("make the veth pair {name} and {peer_name}")))?;
        Ok(())
    }

    /// Adds an address to a link. IPv6 addresses skip duplicate address detection and are usable at once.
    pub(crate) fn add_address(&mut self, index: u32, address: IpAddr, prefix: u8) -> io::Result<()> {
        let mut message = AddressMessage::default();
        message.header.family = family(address);
        message.header.prefix_len = prefix;
        message.header.index = index;
        if address.is_ipv6() {
            message.header.flags = AddressHeaderFlags::Nodad;
        }
        message.attributes.push(AddressAttribute::Local(address));
        message.attributes.push(AddressAttribute::Address(address));
        self.request(RouteNetlinkMessage::NewAddress(message), NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL)
            .map_err(|e| context(e, format!("add address {address}/{prefix} to link {index}")))?;
        Ok(())
    }

    /// All addresses of this host.
    pub(crate) fn addresses(&mut self) -> io::Result<Vec<IpAddr>> {
        let answers = self
            .request(RouteNetlinkMessage::GetAddress(AddressMessage::default()), NLM_F_DUMP)
            .map_err(|e| context(e, "list local addresses"))?;
        Ok(answers
            .iter()
            .filter_map(|answer| match answer {
                RouteNetlinkMessage::NewAddress(message) => {
                    // On point-to-point links IFA_ADDRESS is the peer's; IFA_LOCAL is ours where it is present.
                    let local = message.attributes.iter().find_map(|attribute| match attribute {
                        AddressAttribute::Local(address) => Some(*address),
                        _ => None,
                    });
                    local.or_else(|| {
                        message.attributes.iter().find_map(|attribute| match attribute {
                            AddressAttribute::Address(address) => Some(*address),
                            _ => None,
                        })
                    })
                }
                _ => None,
            })
            .collect())
    }

    /// All interfaces with the addresses that can be used.
    pub(crate) fn interfaces(&mut self) -> io::Result<Vec<Interface>> {
        let links = self
            .request(RouteNetlinkMessage::GetLink(LinkMessage::default()), NLM_F_DUMP)
            .map_err(|e| context(e, "list network interfaces"))?;
        let addresses = self
            .request(RouteNetlinkMessage::GetAddress(AddressMessage::default()), NLM_F_DUMP)
            .map_err(|e| context(e, "list local addresses"))?;
        let mut interfaces = Vec::new();
        for answer in &links {
            let RouteNetlinkMessage::NewLink(link) = answer else { continue };
            let name = link.attributes.iter().find_map(|attribute| match attribute {
                LinkAttribute::IfName(name) => Some(name.clone()),
                _ => None,
            });
            let index = link.header.index;
            interfaces.push(Interface {
                index,
                name: name.unwrap_or_default(),
                up: link.header.flags.contains(LinkFlags::Up | LinkFlags::Running),
                loopback: link.header.flags.contains(LinkFlags::Loopback),
                addresses: addresses.iter().filter_map(|answer| usable_address(answer, index)).collect(),
            });
        }
        Ok(interfaces)
    }

    /// Where packets with `mark` to `remote` would go: their source address and the interface. `None` where they cannot.
    pub(crate) fn route(&mut self, remote: IpAddr, source: Option<IpAddr>, mark: u32) -> Option<(IpAddr, u32)> {
        let mut message = RouteMessage::default();
        message.header.address_family = family(remote);
        message.header.destination_prefix_length = if remote.is_ipv4() { 32 } else { 128 };
        message.attributes.push(RouteAttribute::Destination(remote.into()));
        message.attributes.push(RouteAttribute::Mark(mark));
        if let Some(source) = source {
            message.header.source_prefix_length = message.header.destination_prefix_length;
            message.attributes.push(RouteAttribute::Source(source.into()));
        }
        // An error says that there is no route.
        let answers = self.request(RouteNetlinkMessage::GetRoute(message), NLM_F_ACK).ok()?;
        answers.iter().find_map(|answer| {
            let RouteNetlinkMessage::NewRoute(route) = answer else { return None };
            if !matches!(route.header.kind, RouteType::Unicast | RouteType::Local) {
                return None;
            }
            let preferred = route.attributes.iter().find_map(|attribute| match attribute {
                RouteAttribute::PrefSource(RouteAddress::Inet(address)) => Some(IpAddr::V4(*address)),
                RouteAttribute::PrefSource(RouteAddress::Inet6(address)) => Some(IpAddr::V6(*address)),
                _ => None,
            });
            let link = route.attributes.iter().find_map(|attribute| match attribute {
                RouteAttribute::Oif(link) => Some(*link),
                _ => None,
            });
            Some((source.or(preferred)?, link?))
        })
    }

    /// Over which gateway and interface packets with `mark` to `remote` would go. `None` where they cannot.
    pub(crate) fn way(&mut self, remote: IpAddr, mark: u32) -> Option<(Option<IpAddr>, u32)> {
        let mut message = RouteMessage::default();
        message.header.address_family = family(remote);
        message.header.destination_prefix_length = if remote.is_ipv4() { 32 } else { 128 };
        message.attributes.push(RouteAttribute::Destination(remote.into()));
        message.attributes.push(RouteAttribute::Mark(mark));
        // An error says that there is no route.
        let answers = self.request(RouteNetlinkMessage::GetRoute(message), NLM_F_ACK).ok()?;
        answers.iter().find_map(|answer| {
            let RouteNetlinkMessage::NewRoute(route) = answer else { return None };
            if route.header.kind != RouteType::Unicast {
                return None;
            }
            let gateway = route.attributes.iter().find_map(|attribute| match attribute {
                RouteAttribute::Gateway(RouteAddress::Inet(address)) => Some(IpAddr::V4(*address)),
                RouteAttribute::Gateway(RouteAddress::Inet6(address)) => Some(IpAddr::V6(*address)),
                _ => None,
            });
            let link = route.attributes.iter().find_map(|attribute| match attribute {
                RouteAttribute::Oif(link) => Some(*link),
                _ => None,
            });
            Some((gateway, link?))
        })
    }

    /// Adds a route, or replaces the one to the same network in the same table.
    pub(crate) fn set_route(&mut self, route: &Route) -> io::Result<()> {
        self.request(RouteNetlinkMessage::NewRoute(route.message()), NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE)
            .map_err(|e| context(e, format!("add the route {route}")))?;
        Ok(())
    }

    /// Removes a route; one that is gone already is fine.
    pub(crate) fn delete_route(&mut self, route: &Route) -> io::Result<()> {
        match self.request(RouteNetlinkMessage::DelRoute(route.message()), NLM_F_ACK) {
            Ok(_) => Ok(()),
            // ESRCH: no such route; ENODEV: its device is gone, and the route went with it.
            Err(e) if matches!(e.raw_os_error(), Some(ESRCH | ENODEV)) => Ok(()),
            Err(e) => Err(context(e, format!("remove the route {route}"))),
        }
    }

    /// The networks that a table has routes to, for tests and for finding leftovers.
    pub(crate) fn routes(&mut self, table: u32) -> io::Result<Vec<(IpAddr, u8)>> {
        let mut networks = Vec::new();
        for (family, unspecified) in [
            (AddressFamily::Inet, IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
            (AddressFamily::Inet6, IpAddr::V6(Ipv6Addr::UNSPECIFIED)),
        ] {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            let answers = self
                .request(RouteNetlinkMessage::GetRoute(message), NLM_F_DUMP)
                .map_err(|e| context(e, format!("list the routes of table {table}")))?;
            for answer in &answers {
                let RouteNetlinkMessage::NewRoute(route) = answer else { continue };
                let number = route.attributes.iter().find_map(|attribute| match attribute {
                    RouteAttribute::Table(table) => Some(*table),
                    _ => None,
                });
                if number.unwrap_or(u32::from(route.header.table)) != table {
                    continue;
                }
                let destination = route.attributes.iter().find_map(|attribute| match attribute {
                    RouteAttribute::Destination(RouteAddress::Inet(address)) => Some(IpAddr::V4(*address)),
                    RouteAttribute::Destination(RouteAddress::Inet6(address)) => Some(IpAddr::V6(*address)),
                    _ => None,
                });
                networks.push((destination.unwrap_or(unspecified), route.header.destination_prefix_length));
            }
        }
        Ok(networks)
    }

    /// The source address that the system takes for packets with `mark` to `remote`.
    pub(crate) fn source_towards(&mut self, remote: IpAddr, mark: u32) -> io::Result<IpAddr> {
        let mut message = RouteMessage::default();
        message.header.address_family = family(remote);
        message.header.destination_prefix_length = if remote.is_ipv4() { 32 } else { 128 };
        message.attributes.push(RouteAttribute::Destination(remote.into()));
        message.attributes.push(RouteAttribute::Mark(mark));
        let answers = self
            .request(RouteNetlinkMessage::GetRoute(message), NLM_F_ACK)
            .map_err(|e| context(e, format!("find a route to {remote}")))?;
        answers
            .iter()
            .find_map(|answer| match answer {
                RouteNetlinkMessage::NewRoute(route) => route.attributes.iter().find_map(|attribute| match attribute {
                    RouteAttribute::PrefSource(RouteAddress::Inet(address)) => Some(IpAddr::V4(*address)),
                    RouteAttribute::PrefSource(RouteAddress::Inet6(address)) => Some(IpAddr::V6(*address)),
                    _ => None,
                }),
                _ => None,
            })
            .ok_or_else(|| {
                io::Error::new(
                    io::ErrorKind::AddrNotAvailable,
                    format!("no local address can be used towards {remote}"),
                )
            })
    }

    /// Adds a rule; one that is there already, left by a predecessor that died, is taken over.
    pub(crate) fn add_rule(&mut self, rule: &Rule) -> io::Result<()> {
        self.ensure_rule(rule).map(|_| ())
    }

    /// The same; true when it was not there.
    pub(crate) fn ensure_rule(&mut self, rule: &Rule) -> io::Result<bool> {
        match self.request(RouteNetlinkMessage::NewRule(rule.message()), NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL) {
            Ok(_) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(false),
            Err(e) => Err(context(e, format!("add the rule {rule}"))),
        }
    }

    /// Removes a rule; one that is gone already is fine.
    pub(crate) fn delete_rule(&mut self, rule: &Rule) -> io::Result<()> {
        match self.request(RouteNetlinkMessage::DelRule(rule.message()), NLM_F_ACK) {
            Ok(_) => Ok(()),
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound) || e.raw_os_error() == Some(ESRCH) => Ok(()),
            Err(e) => Err(context(e, format!("remove the rule {rule}"))),
        }
    }

    /// Removes all rules that are marked as ours: what a daemon has left that died.
    pub(crate) fn delete_own_rules(&mut self) -> io::Result<()> {
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = RuleMessage::default();
            message.header.family = family;
            let Ok(answers) = self.request(RouteNetlinkMessage::GetRule(message), NLM_F_DUMP) else { continue };
            for answer in answers {
                let RouteNetlinkMessage::NewRule(rule) = answer else { continue };
                if rule.attributes.contains(&RuleAttribute::Protocol(OURS)) {
                    self.request(RouteNetlinkMessage::DelRule(rule), NLM_F_ACK)
                        .map_err(|e| context(e, "remove a rule of a daemon that died"))?;
                }
            }
        }
        Ok(())
    }

    /// Removes an address from a link; one that is gone already is fine.
    pub(crate) fn delete_address(&mut self, index: u32, address: IpAddr, prefix: u8) -> io::Result<()> {
        let mut message = AddressMessage::default();
        message.header.family = family(address);
        message.header.prefix_len = prefix;
        message.header.index = index;
        message.attributes.push(AddressAttribute::Local(address));
        message.attributes.push(AddressAttribute::Address(address));
        match self.request(RouteNetlinkMessage::DelAddress(message), NLM_F_ACK) {
            Ok(_) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::AddrNotAvailable => Ok(()),
            Err(e) => Err(context(e, format!("remove address {address}/{prefix} from link {index}"))),
        }
    }

    /// The priorities of all rules, IPv4 then IPv6.
    pub(crate) fn rule_priorities(&mut self) -> io::Result<Vec<u32>> {
        let mut priorities = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = RuleMessage::default();
            message.header.family = family;
            let answers = self
                .request(RouteNetlinkMessage::GetRule(message), NLM_F_DUMP)
                .map_err(|e| context(e, "list the rules"))?;
            priorities.extend(
                answers
                    .iter()
                    .filter_map(|answer| match answer {
                        RouteNetlinkMessage::NewRule(rule) => {
                            Some(rule.attributes.iter().find_map(|attribute| match attribute {
                                RuleAttribute::Priority(priority) => Some(*priority),
                                _ => None,
                            }))
                        }
                        _ => None,
                    })
                    // The rule of the local table has priority 0, and that is not sent as an attribute.
                    .map(Option::unwrap_or_default),
            );
        }
        Ok(priorities)
    }

    /// Sends one request and collects the answers up to its acknowledgement or the end of its dump.
    fn request(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | flags;
        request.header.sequence_number = self.sequence;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send_to(&bytes, &SocketAddr::new(0, 0), 0)?;

        let mut answers = Vec::new();
        loop {
            let (datagram, from) = self.socket.recv_from_full()?;
            // Only the kernel (port 0) may answer; other processes can send to this socket too.
            if from.port_number() != 0 {
                continue;
            }
            let mut rest = datagram.as_slice();
            while !rest.is_empty() {
                let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                    .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, format!("netlink answer: {e}")))?;
                let length = usize::try_from(answer.header.length).unwrap_or(usize::MAX).max(1);
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
                if answer.header.sequence_number != self.sequence {
                    continue;
                }
                match answer.payload {
                    NetlinkPayload::Done(_) => return Ok(answers),
                    NetlinkPayload::Error(error) if error.code.is_none() => return Ok(answers),
                    NetlinkPayload::Error(error) => return Err(error.to_io()),
                    NetlinkPayload::InnerMessage(message) => answers.push(message),
                    _ => {}
                }
            }
        }
    }
}

impl Route {
    fn message(&self) -> RouteMessage {
        let (address, prefix) = self.network;
        let mut message = RouteMessage::default();
        message.header.address_family = family(address);
        message.header.destination_prefix_length = prefix;
        message.header.protocol = RouteProtocol::Static;
        message.header.scope = if self.gateway.is_some() { RouteScope::Universe } else { RouteScope::Link };
        message.header.kind = match (self.gateway, self.link) {
            (None, None) => RouteType::Throw,
            _ => RouteType::Unicast,
        };
        message.header.table = u8::try_from(self.table).unwrap_or(RouteHeader::RT_TABLE_UNSPEC);
        message.attributes.push(RouteAttribute::Table(self.table));
        if prefix > 0 {
            message.attributes.push(RouteAttribute::Destination(address.into()));
        }
        if let Some(gateway) = self.gateway {
            message.attributes.push(RouteAttribute::Gateway(gateway.into()));
        }
        if let Some(link) = self.link {
            message.attributes.push(RouteAttribute::Oif(link));
        }
        if let Some(source) = self.source {
            message.attributes.push(RouteAttribute::PrefSource(source.into()));
        }
        message
    }
}

impl std::fmt::Display for Route {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "to {}/{} in table {}", self.network.0, self.network.1, self.table)?;
        if let Some(source) = self.source {
            write!(f, " from {source}")?;
        }
        Ok(())
    }
}

impl Rule {
    fn message(&self) -> RuleMessage {
        let mut message = RuleMessage::default();
        message.header.family = if self.ipv6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
        message.attributes.push(RuleAttribute::Priority(self.priority));
        message.header.action = match self.action {
            RuleAction::Lookup(table) => {
                message.header.table = u8::try_from(table).unwrap_or(RouteHeader::RT_TABLE_UNSPEC);
                message.attributes.push(RuleAttribute::Table(table));
                rule::RuleAction::ToTable
            }
            RuleAction::GoTo(priority) => {
                message.attributes.push(RuleAttribute::Goto(priority));
                rule::RuleAction::Goto
            }
            RuleAction::Nothing => rule::RuleAction::Nop,
            RuleAction::Prohibit => rule::RuleAction::Prohibit,
        };
        if !matches!(self.action, RuleAction::Lookup(_)) {
            message.attributes.push(RuleAttribute::Protocol(OURS));
        }
        match &self.selector {
            RuleSelector::Any => {}
            RuleSelector::Mark(mark) => {
                message.attributes.push(RuleAttribute::FwMark(*mark));
                message.attributes.push(RuleAttribute::FwMask(u32::MAX));
            }
            RuleSelector::NotMark(mark) => {
                message.header.flags = RuleFlags::Invert;
                message.attributes.push(RuleAttribute::FwMark(*mark));
                message.attributes.push(RuleAttribute::FwMask(u32::MAX));
            }
            RuleSelector::From(device) => message.attributes.push(RuleAttribute::Iifname(device.clone())),
            RuleSelector::Udp => message.attributes.push(RuleAttribute::IpProtocol(IpProtocol::Udp)),
            RuleSelector::Flow(flow) => flow.describe(&mut message),
        }
        message
    }
}

impl FlowSelector {
    fn describe(&self, message: &mut RuleMessage) {
        (message.header.src_len, message.header.dst_len) = (self.from.1, self.to.1);
        if self.from.1 > 0 {
            message.attributes.push(RuleAttribute::Source(self.from.0));
        }
        if self.to.1 > 0 {
            message.attributes.push(RuleAttribute::Destination(self.to.0));
        }
        if self.protocol != 0 {
            message.attributes.push(RuleAttribute::IpProtocol(IpProtocol::from(i32::from(self.protocol))));
        }
        let range = |(start, end)| RulePortRange { start, end };
        message.attributes.extend(self.source_ports.map(range).map(RuleAttribute::SourcePortRange));
        message.attributes.extend(self.destination_ports.map(range).map(RuleAttribute::DestinationPortRange));
    }
}

impl std::fmt::Display for Rule {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let family = if self.ipv6 { "IPv6" } else { "IPv4" };
        write!(f, "{family} priority {}: {:?}", self.priority, self.action)
    }
}

/// Puts what was tried before an error, and what right is missing behind it.
pub(crate) fn context(error: io::Error, action: impl std::fmt::Display) -> io::Error {
    match error.raw_os_error() {
        Some(EPERM | EACCES) => io::Error::new(
            error.kind(),
            format!("{action}: {error}; run as root or with CAP_NET_ADMIN and CAP_NET_RAW"),
        ),
        _ => io::Error::new(error.kind(), format!("{action}: {error}")),
    }
}

/// The address that a message of a dump is about, if it is of this link and a peer can be told it.
fn usable_address(message: &RouteNetlinkMessage, link: u32) -> Option<IpAddr> {
    let RouteNetlinkMessage::NewAddress(message) = message else { return None };
    let unusable = AddressHeaderFlags::Tentative | AddressHeaderFlags::Deprecated | AddressHeaderFlags::Dadfailed;
    let wide = matches!(message.header.scope, AddressScope::Universe | AddressScope::Site);
    if message.header.index != link || !wide || message.header.flags.intersects(unusable) {
        return None;
    }
    let of = |local: bool| {
        message.attributes.iter().find_map(move |attribute| match attribute {
            AddressAttribute::Local(address) if local => Some(*address),
            AddressAttribute::Address(address) if !local => Some(*address),
            _ => None,
        })
    };
    // On point-to-point links IFA_ADDRESS is the peer's; IFA_LOCAL is ours where it is present.
    of(true).or_else(|| of(false))
}

fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

const EPERM: i32 = rustix::io::Errno::PERM.raw_os_error();
const EACCES: i32 = rustix::io::Errno::ACCESS.raw_os_error();
const ESRCH: i32 = rustix::io::Errno::SRCH.raw_os_error();
const EOPNOTSUPP: i32 = rustix::io::Errno::OPNOTSUPP.raw_os_error();
const ENODEV: i32 = rustix::io::Errno::NODEV.raw_os_error();
