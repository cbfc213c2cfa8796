//! NAT detection (RFC 7296 §2.23).

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use sha1::{Digest, Sha1};

use super::fault::notify;
use super::parts::Parts;
use crate::engine::Path;
use crate::wire::{NotifyType, Payload};

/// What is known about NATs on the path.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Nat {
    /// We are behind one.
    pub(crate) local: bool,
    /// The peer is.
    pub(crate) remote: bool,
    /// We pretend to be.
    pub(crate) fake: bool,
    /// Both sides speak NAT traversal.
    pub(crate) traversal: bool,
}

impl Nat {
    /// True when packets must be encapsulated in UDP.
    pub(crate) fn any(self) -> bool {
        self.local || self.remote || self.fake
    }

    /// Compares the peer's hashes with the addresses that its message came with. Without both notifies
    /// the peer does not speak NAT traversal.
    pub(crate) fn detect(parts: &Parts, spi_i: u64, spi_r: u64, path: &Path, fake: bool) -> Self {
        let matches = |kind, address| {
            let expected = hash(spi_i, spi_r, address);
            let mut hashes = parts.notifies.iter().filter(|notify| notify.kind == kind).peekable();
            hashes.peek().is_some().then(|| hashes.any(|notify| notify.data == expected))
        };
        let source = matches(NotifyType::NAT_DETECTION_SOURCE_IP, path.remote);
        let destination = matches(NotifyType::NAT_DETECTION_DESTINATION_IP, path.local);
        match (source, destination) {
            (Some(source), Some(destination)) => Self { local: !destination, remote: !source, fake, traversal: true },
            _ => Self::default(),
        }
    }
}

/// Both notifies for a message that goes along `path`. A pretended NAT is the hash of no address; it is the same each
/// time, since a request that is repeated with a cookie must not change (RFC 7296 §2.6).
pub(crate) fn payloads(spi_i: u64, spi_r: u64, path: &Path, fake: bool) -> [Payload; 2] {
    let source = if fake { SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0) } else { path.local };
    [
        notify(NotifyType::NAT_DETECTION_SOURCE_IP, hash(spi_i, spi_r, source).to_vec()),
        notify(NotifyType::NAT_DETECTION_DESTINATION_IP, hash(spi_i, spi_r, path.remote).to_vec()),
    ]
}

fn hash(spi_i: u64, spi_r: u64, address: SocketAddr) -> [u8; 20] {
    let mut sha = Sha1::new();
    sha.update(spi_i.to_be_bytes());
    sha.update(spi_r.to_be_bytes());
    match address.ip() {
        IpAddr::V4(ip) => sha.update(ip.octets()),
        IpAddr::V6(ip) => sha.update(ip.octets()),
    }
    sha.update(address.port().to_be_bytes());
    sha.finalize().into()
}

/// The data of NO_NATS_ALLOWED (RFC 4555 §4.2.6): both addresses, then both ports.
pub(crate) fn prohibition(source: SocketAddr, destination: SocketAddr) -> Vec<u8> {
    let octets = |address: IpAddr| match address {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    };
    let mut data = [octets(source.ip()), octets(destination.ip())].concat();
    data.extend(source.port().to_be_bytes());
    data.extend(destination.port().to_be_bytes());
    data
}
