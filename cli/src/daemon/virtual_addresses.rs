//! What Configuration payloads gave each IKE SA, put in force on this host: our virtual addresses on a device, the name
//! servers in a resolver's file.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::sync::Arc;

use ike::engine::{Assigned, IkeSaId};
use kernel::network::Network;

use super::resolver::Resolver;

/// Where virtual addresses are put.
#[derive(Clone, Debug)]
pub(super) struct Placement {
    /// At all.
    pub(super) install: bool,
    /// Another device than the tunnel's.
    pub(super) device: Option<String>,
}

/// The assignments in force.
pub(super) struct VirtualAddresses {
    placement: Placement,
    resolver: Option<Resolver>,
    of: BTreeMap<IkeSaId, Arc<Assigned>>,
    /// How many IKE SAs gave us each address.
    givers: BTreeMap<IpAddr, usize>,
    /// Addresses that we put on the device.
    installed: BTreeSet<IpAddr>,
}

impl VirtualAddresses {
    pub(super) fn new(placement: Placement, resolver: Option<Resolver>) -> Self {
        Self { placement, resolver, of: BTreeMap::new(), givers: BTreeMap::new(), installed: BTreeSet::new() }
    }

    /// What this IKE SA was given.
    pub(super) fn of(&self, ike_sa: IkeSaId) -> Option<&Assigned> {
        self.of.get(&ike_sa).map(AsRef::as_ref)
    }

    /// An IKE SA was given something; `peer` is who gave it, or had it given.
    pub(super) fn assigned(&mut self, network: &Network, ike_sa: IkeSaId, assigned: Arc<Assigned>, peer: &str) {
        for address in &assigned.local {
            *self.givers.entry(*address).or_default() += 1;
        }
        for address in assigned.local.iter().filter(|_| self.placement.install) {
            if self.installed.contains(address) {
                continue;
            }
            match network.add_virtual_address(*address, self.placement.device.as_deref()) {
                Ok(()) => {
                    self.installed.insert(*address);
                }
                // Somebody else's, who will remove it.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    tracing::info!(%address, "the virtual address is there already");
                }
                Err(error) => tracing::error!(%address, %error, "a virtual address could not be installed"),
            }
        }
        if let Some(resolver) = &mut self.resolver
            // Servers of some domains only are of no use in a file that knows no domains.
            && assigned.domains.is_empty()
        {
            resolver.add(ike_sa, &assigned.dns, peer);
        }
        if let Some(before) = self.of.insert(ike_sa, assigned) {
            self.given_back(network, &before);
        }
    }

    /// A successor has what its predecessor had.
    pub(super) fn rekeyed(&mut self, old: IkeSaId, new: IkeSaId) {
        if let Some(assigned) = self.of.remove(&old) {
            self.of.insert(new, assigned);
        }
        if let Some(resolver) = &mut self.resolver {
            resolver.rename(old, new);
        }
    }

    /// An IKE SA is gone, and its Child SAs before it: what no other one has is taken away.
    pub(super) fn ended(&mut self, network: &Network, ike_sa: IkeSaId) {
        let Some(assigned) = self.of.remove(&ike_sa) else { return };
        if let Some(resolver) = &mut self.resolver {
            resolver.remove(ike_sa);
        }
        self.given_back(network, &assigned);
    }

    /// An IKE SA does not give these any more.
    fn given_back(&mut self, network: &Network, assigned: &Assigned) {
        for address in &assigned.local {
            match self.givers.get_mut(address) {
                Some(givers) if *givers > 1 => *givers -= 1,
                _ => {
                    self.givers.remove(address);
                    if self.installed.remove(address)
                        && let Err(error) = network.remove_virtual_address(*address, self.placement.device.as_deref())
                    {
                        tracing::error!(%address, %error, "a virtual address could not be removed");
                    }
                }
            }
        }
    }

    /// The daemon stops.
    pub(super) fn clear(&mut self, network: &Network) {
        let all: Vec<IkeSaId> = self.of.keys().copied().collect();
        for ike_sa in all {
            self.ended(network, ike_sa);
        }
    }
}
