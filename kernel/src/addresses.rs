//! The addresses of this host, read again only when one of them has changed.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;

use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

use crate::netlink::{Netlink, context};

/// What was last read, and a socket that the kernel tells of changes before whoever made them goes on.
pub(crate) struct Addresses {
    news: Socket,
    known: Option<Arc<[IpAddr]>>,
}

impl Addresses {
    /// Subscribes in the network namespace of the calling thread.
    pub(crate) fn subscribe() -> io::Result<Self> {
        let mut news = Socket::new(NETLINK_ROUTE).map_err(|e| context(e, "open a routing netlink socket"))?;
        news.bind(&SocketAddr::new(0, GROUPS)).map_err(|e| context(e, "subscribe to changes of addresses"))?;
        news.set_non_blocking(true)?;
        Ok(Self { news, known: None })
    }

    /// All addresses of this host; `netlink` is of the same namespace.
    pub(crate) fn all(&mut self, netlink: &mut Netlink) -> io::Result<Arc<[IpAddr]>> {
        let mut nothing = Vec::new();
        loop {
            match self.news.recv_from(&mut nothing, 0) {
                Ok(_) => self.known = None,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // Some were lost.
                Err(_) => self.known = None,
            }
        }
        match &self.known {
            Some(known) => Ok(Arc::clone(known)),
            None => Ok(Arc::clone(self.known.insert(netlink.addresses()?.into()))),
        }
    }
}

/// RTMGRP_IPV4_IFADDR and RTMGRP_IPV6_IFADDR (linux/rtnetlink.h).
const GROUPS: u32 = 0x10 | 0x100;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::netns::Namespace;

    // A child that comes up at once after an address has come must find it.
    #[test]
    fn a_change_is_seen_at_once_and_without_one_nothing_is_read_again() {
        let host = Namespace::new().expect("these tests make network namespaces: run them as root");
        let (mut addresses, mut netlink) =
            host.run(|| (Addresses::subscribe().unwrap(), Netlink::open().unwrap())).unwrap();
        let address: IpAddr = "192.0.2.1".parse().unwrap();
        let before = addresses.all(&mut netlink).unwrap();
        assert!(!before.contains(&address));
        host.add_address("lo", address, 32).unwrap();
        let there = addresses.all(&mut netlink).unwrap();
        assert!(there.contains(&address));
        assert!(Arc::ptr_eq(&there, &addresses.all(&mut netlink).unwrap()));
        let link = netlink.link_index("lo").unwrap();
        netlink.delete_address(link, address, 32).unwrap();
        assert_eq!(*addresses.all(&mut netlink).unwrap(), *before);
    }
}
