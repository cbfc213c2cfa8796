//! Sending initiators to another gateway, and being sent there (RFC 5685).

use std::net::IpAddr;

use ike::engine::{Gateway, IkeSaStatus, IkeState};
use kernel::network::Network;

use crate::control::RedirectFilter;

/// True when a filter means an IKE SA, which must be up.
pub(super) fn means(filter: &RedirectFilter, sa: &IkeSaStatus) -> bool {
    sa.state == IkeState::Established
        && filter.ike.as_ref().is_none_or(|name| *name == sa.connection)
        && filter.ike_id.is_none_or(|id| id == sa.id)
        && filter.peer_ip.is_none_or(|range| range.contains(sa.path.remote.ip()))
        && filter.peer_id.as_ref().is_none_or(|id| sa.peer.as_ref().is_some_and(|peer| id.matches(&peer.id)))
}

/// Our address and the gateway's.
pub(super) async fn resolve(gateway: Gateway, network: &Network) -> Result<(IpAddr, IpAddr), String> {
    let remote = match gateway {
        Gateway::Address(address) => address,
        Gateway::Name(name) => {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await;
            let address = found.map_err(|error| format!("{name} cannot be resolved: {error}"))?.next();
            address.ok_or_else(|| format!("{name} has no address"))?.ip()
        }
    };
    let local = network.source_address(remote).map_err(|error| format!("there is no route to {remote}: {error}"))?;
    Ok((local, remote))
}
