//! Which networks need a stream to a peer (RFC 9329 §5.1: prior knowledge): bounded, and forgotten after a while, as
//! networks change.

use std::collections::{BTreeMap, VecDeque};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::{Path, Transport};
use crate::sa::retry::after;

/// How long it is believed that UDP does not get through.
const LIFE: Duration = Duration::from_secs(3600);
/// Networks and peers that are remembered.
const MOST: usize = 256;

/// A network is known by our address in it.
type Key = (IpAddr, IpAddr);

/// Where UDP stayed silent and TCP did not.
#[derive(Debug, Default)]
pub(crate) struct Networks {
    until: BTreeMap<Key, Instant>,
    order: VecDeque<Key>,
}

impl Networks {
    /// True when only a stream has reached this peer from this address.
    pub(crate) fn needs_stream(&self, now: Instant, path: &Path) -> bool {
        self.until.get(&key(path)).is_some_and(|until| *until > now)
    }

    /// The peer has authenticated itself along this path, or followed us there; `tcp` left the choice.
    pub(crate) fn note(&mut self, now: Instant, path: &Path) {
        let key = key(path);
        self.forget(path);
        if matches!(path.transport, Transport::Stream(_)) {
            self.until.insert(key, after(now, LIFE));
            self.order.push_back(key);
            if self.order.len() > MOST
                && let Some(oldest) = self.order.pop_front()
            {
                self.until.remove(&oldest);
            }
        }
    }

    /// It is not so any more.
    pub(crate) fn forget(&mut self, path: &Path) {
        let key = key(path);
        if self.until.remove(&key).is_some() {
            self.order.retain(|known| *known != key);
        }
    }
}

fn key(path: &Path) -> Key {
    (path.local.ip(), path.remote.ip())
}

#[cfg(test)]
mod tests {
    use ipsec::plane::StreamId;

    use super::*;

    fn path(last: u32, transport: Transport) -> Path {
        let remote = std::net::SocketAddr::new(std::net::Ipv4Addr::from_bits(0x0a00_0000 + last).into(), 4500);
        Path { local: "192.0.2.1:4500".parse().unwrap(), remote, transport }
    }

    // RFC 9329 §5.1
    #[test]
    fn what_is_known_of_networks_is_bounded_and_ends() {
        let (now, stream) = (Instant::now(), Transport::Stream(StreamId(1)));
        let mut networks = Networks::default();
        assert!(!networks.needs_stream(now, &path(1, Transport::Udp)));
        networks.note(now, &path(1, stream));
        assert!(networks.needs_stream(now, &path(1, Transport::Udp)));
        assert!(!networks.needs_stream(now, &path(2, Transport::Udp)));
        assert!(!networks.needs_stream(now + LIFE, &path(1, Transport::Udp)));
        networks.note(now, &path(1, Transport::UdpEncap));
        assert!(!networks.needs_stream(now, &path(1, Transport::Udp)));
        for last in 0..1000 {
            networks.note(now, &path(last, stream));
            networks.note(now, &path(last, stream));
        }
        assert_eq!((networks.until.len(), networks.order.len()), (MOST, MOST));
        assert!(networks.needs_stream(now, &path(999, stream)) && !networks.needs_stream(now, &path(743, stream)));
    }
}
