//! Watches addresses, links, routes and our rules (rtnetlink multicast groups) and says that something has changed.
//!
//! What exactly has changed is not told: whoever hears of it looks at everything, so a lost message loses nothing.

use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::route::RouteAttribute;
use netlink_packet_route::rule::RuleAttribute;
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use rustix::event::{PollFd, PollFlags, poll};

use crate::netlink::{OURS, context};
use crate::network::Shared;

/// RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE, RTMGRP_IPV4_RULE, RTMGRP_IPV6_IFADDR, RTMGRP_IPV6_ROUTE, and the bit
/// of RTNLGRP_IPV6_RULE (linux/rtnetlink.h).
const GROUPS: u32 = 0x1 | 0x10 | 0x40 | 0x80 | 0x100 | 0x400 | 1 << 18;

/// Whose changes are our own.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Own {
    /// The TUN device.
    pub(crate) link: u32,
    /// The table of routes into the tunnel.
    pub(crate) table: u32,
    /// Who sets rules: its news are none.
    pub(crate) ports: [u32; 2],
}

/// Subscribes in the network namespace of the calling thread, and starts the thread that watches. It ends when
/// `shared.stop` becomes readable.
pub(crate) fn start(shared: &Arc<Shared>, own: Own) -> io::Result<JoinHandle<()>> {
    let mut socket = Socket::new(NETLINK_ROUTE).map_err(|e| context(e, "open a routing netlink socket"))?;
    socket.bind(&SocketAddr::new(0, GROUPS)).map_err(|e| context(e, "subscribe to changes of addresses and routes"))?;
    socket.set_non_blocking(true)?;
    let shared = Arc::clone(shared);
    thread::Builder::new().name("latchkey-watch".into()).spawn(move || watch(&shared, &socket, own))
}

fn watch(shared: &Shared, socket: &Socket, own: Own) {
    loop {
        let mut descriptors = [PollFd::new(&shared.stop, PollFlags::IN), PollFd::new(socket, PollFlags::IN)];
        match poll(&mut descriptors, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => {
                tracing::error!("poll: {e}; changes of addresses are no longer noticed");
                return;
            }
        }
        if !descriptors[0].revents().is_empty() {
            return;
        }
        let mut changed = false;
        loop {
            match socket.recv_from_full() {
                Ok((datagram, from)) => changed |= from.port_number() == 0 && concerns(&datagram, own),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                // Messages were lost (ENOBUFS): something has changed.
                Err(_) => {
                    changed = true;
                    break;
                }
            }
        }
        if changed {
            shared.events.roamed();
        }
    }
}

/// True when one of the messages is about something else than the tunnel.
fn concerns(datagram: &[u8], own: Own) -> bool {
    let mut rest = datagram;
    while !rest.is_empty() {
        let Ok(message) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest) else { return true };
        let length = usize::try_from(message.header.length).unwrap_or(usize::MAX).max(1);
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        let ours = match message.payload {
            NetlinkPayload::InnerMessage(
                RouteNetlinkMessage::NewLink(message) | RouteNetlinkMessage::DelLink(message),
            ) => message.header.index == own.link,
            NetlinkPayload::InnerMessage(
                RouteNetlinkMessage::NewAddress(message) | RouteNetlinkMessage::DelAddress(message),
            ) => message.header.index == own.link,
            NetlinkPayload::InnerMessage(
                RouteNetlinkMessage::NewRoute(message) | RouteNetlinkMessage::DelRoute(message),
            ) => message.attributes.iter().any(|attribute| match attribute {
                RouteAttribute::Table(table) => *table == own.table,
                RouteAttribute::Oif(link) => *link == own.link,
                _ => false,
            }),
            // Others' rules lead nobody elsewhere whom routes do not, and are looked at with these.
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRule(_)) => true,
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelRule(rule)) => {
                own.ports.contains(&message.header.port_number)
                    || !rule.attributes.iter().any(|attribute| match attribute {
                        RuleAttribute::Table(table) => *table == own.table,
                        RuleAttribute::Protocol(protocol) => *protocol == OURS,
                        _ => false,
                    })
            }
            _ => true,
        };
        if !ours {
            return true;
        }
    }
    false
}
