//! What Configuration payloads gave the two ends of an IKE SA (RFC 7296 §2.19).

use std::net::IpAddr;

use ipsec::selector::TrafficSelector;

use crate::config::{AddressRange, ConfiguredSelector};
use crate::wire::TrustAnchor;

/// Virtual addresses and what came with them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Assigned {
    /// Ours, given by the peer.
    pub local: Vec<IpAddr>,
    /// The peer's, out of our pools.
    pub remote: Vec<IpAddr>,
    /// Name servers that the peer told us.
    pub dns: Vec<IpAddr>,
    /// NetBIOS name servers that the peer told us.
    pub nbns: Vec<IpAddr>,
    /// DHCP servers that the peer told us.
    pub dhcp: Vec<IpAddr>,
    /// Networks that the peer protects, as it says; which of them go through a Child SA say the selectors.
    pub subnets: Vec<(IpAddr, u8)>,
    /// Domains that `dns` serves and no other name server may (RFC 8598); where there are none, `dns` is for all names.
    pub domains: Vec<Domain>,
    /// The ranges of the pools that `remote` is from.
    pub pooled: Vec<AddressRange>,
}

/// A domain of a split DNS configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Domain {
    /// Its name in lower case: letters, digits, hyphens, underscores and dots only.
    pub name: String,
    /// Trust anchors for it that local policy accepts.
    pub anchors: Vec<TrustAnchor>,
}

impl Assigned {
    /// What one of the peer's configured selectors stands for. One that reaches into the pools means of them the assigned
    /// addresses only: a peer does not speak for another one's.
    pub(crate) fn restrict(&self, selector: TrafficSelector) -> Vec<TrafficSelector> {
        let pooled = |range: &AddressRange| {
            let pool = TrafficSelector { start: range.start, end: range.end, ..selector };
            selector.intersect(&pool).is_some()
        };
        if !self.pooled.iter().any(pooled) {
            return vec![selector];
        }
        let own = self.remote.iter().map(|address| TrafficSelector { start: *address, end: *address, ..selector });
        own.filter_map(|own| own.intersect(&selector)).collect()
    }
}

impl ConfiguredSelector {
    /// The selectors of one side: `dynamic` stands for each of the virtual addresses, else for the IKE address.
    pub(crate) fn resolve_all(&self, addresses: &[IpAddr]) -> Vec<TrafficSelector> {
        match self {
            Self::Fixed(selector) => vec![*selector],
            Self::Dynamic { .. } => addresses.iter().map(|address| self.resolve(*address)).collect(),
        }
    }
}
