//! By which SAs with an `if_id` packets may come to a flow. Where an XFRM interface has the number too, the kernel compares
//! what comes by them with inbound policies of that number only.
//!
//! A pair counts for all flows between its addresses, whatever their protocol and ports: in transport mode the kernel
//! has one selector for all of a pair's, and takes what fits that and no policy. In tunnel mode it drops what no policy
//! is for.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipsec::selector::Flow;

use super::codec::Selector;
use super::latches::within;

/// Such SAs of ours that the kernel has or is about to have.
#[derive(Default)]
pub(super) struct Arrivals {
    sas: HashMap<u32, (u32, Vec<Selector>)>,
    /// How many SAs have an `if_id`.
    if_ids: BTreeMap<u32, usize>,
    /// SAs by the networks of their other ends.
    networks: Networks,
}

impl Arrivals {
    /// Takes note of an SA; false when there is one with its SPI. Selectors are outbound.
    pub(super) fn insert(&mut self, spi_in: u32, if_id: u32, selectors: &[Selector]) -> bool {
        if self.sas.contains_key(&spi_in) {
            return false;
        }
        self.sas.insert(spi_in, (if_id, selectors.to_vec()));
        *self.if_ids.entry(if_id).or_default() += 1;
        self.networks.insert(spi_in, selectors);
        true
    }

    /// Forgets it; gives its `if_id` and selectors.
    pub(super) fn remove(&mut self, spi_in: u32) -> Option<(u32, Vec<Selector>)> {
        let (if_id, selectors) = self.sas.remove(&spi_in)?;
        self.networks.remove(spi_in, &selectors);
        if let Some(count) = self.if_ids.get_mut(&if_id) {
            *count -= 1;
            if *count == 0 {
                self.if_ids.remove(&if_id);
            }
        }
        Some((if_id, selectors))
    }

    /// All, by SPI.
    pub(super) fn spis(&self) -> Vec<u32> {
        self.sas.keys().copied().collect()
    }

    /// The `if_id`s that there are.
    pub(super) fn if_ids(&self) -> &BTreeMap<u32, usize> {
        &self.if_ids
    }

    /// Those by which a flow's packets may come.
    pub(super) fn towards(&self, flow: &Flow) -> BTreeSet<u32> {
        let sas = self.networks.around(flow.remote).filter_map(|spi_in| self.sas.get(&spi_in));
        let between =
            |selector: &Selector| within(selector.source, flow.local) && within(selector.destination, flow.remote);
        sas.filter(|(_, selectors)| selectors.iter().any(between)).map(|(if_id, _)| *if_id).collect()
    }
}

/// SAs by the networks that their outbound selectors have as destinations.
#[derive(Default)]
pub(super) struct Networks {
    /// The family is told by the address.
    sas: HashMap<(IpAddr, u8), BTreeSet<u32>>,
    /// How many networks have a length, of IPv6 (true) and of IPv4.
    lengths: BTreeMap<(bool, u8), usize>,
}

impl Networks {
    pub(super) fn insert(&mut self, spi_in: u32, selectors: &[Selector]) {
        for (address, length) in destinations(selectors) {
            let sas = self.sas.entry((address, length)).or_default();
            if sas.is_empty() {
                *self.lengths.entry((address.is_ipv6(), length)).or_default() += 1;
            }
            sas.insert(spi_in);
        }
    }

    pub(super) fn remove(&mut self, spi_in: u32, selectors: &[Selector]) {
        for (address, length) in destinations(selectors) {
            let Some(sas) = self.sas.get_mut(&(address, length)) else { continue };
            sas.remove(&spi_in);
            if !sas.is_empty() {
                continue;
            }
            self.sas.remove(&(address, length));
            if let Some(count) = self.lengths.get_mut(&(address.is_ipv6(), length)) {
                *count -= 1;
                if *count == 0 {
                    self.lengths.remove(&(address.is_ipv6(), length));
                }
            }
        }
    }

    /// SAs with a network that the address is in.
    pub(super) fn around(&self, address: IpAddr) -> impl Iterator<Item = u32> {
        let family = address.is_ipv6();
        let lengths = self.lengths.range((family, 0)..=(family, u8::MAX)).map(|((_, length), _)| *length);
        lengths.filter_map(move |length| self.sas.get(&(ends((address, length)).0, length))).flatten().copied()
    }
}

fn destinations(selectors: &[Selector]) -> BTreeSet<(IpAddr, u8)> {
    selectors.iter().map(|selector| (ends(selector.destination).0, selector.destination.1)).collect()
}

/// The first and the last address of a network.
pub(super) fn ends((address, length): (IpAddr, u8)) -> (IpAddr, IpAddr) {
    match address {
        IpAddr::V4(address) => {
            let hosts = u32::MAX.checked_shr(length.into()).unwrap_or(0);
            let first = address.to_bits() & !hosts;
            (Ipv4Addr::from_bits(first).into(), Ipv4Addr::from_bits(first | hosts).into())
        }
        IpAddr::V6(address) => {
            let hosts = u128::MAX.checked_shr(length.into()).unwrap_or(0);
            let first = address.to_bits() & !hosts;
            (Ipv6Addr::from_bits(first).into(), Ipv6Addr::from_bits(first | hosts).into())
        }
    }
}
