//! What applications are told of the SAs that protect a flow (RFC 5660 §2).

use std::net::IpAddr;

use ike::engine::{ChildSaId, IkeSaStatus, Transport};
use latch::protocol::{AddressBinding, IkeSuiteInfo, SaInfo};
use pad::{AuthMethod, Identity, Proof};

/// One Child SA of an IKE SA, and how the peer came to an address behind it. `reserved` says whether the configuration lets
/// a peer alone have an address, `is_tls` whether a stream is in TLS.
pub(super) fn tell(
    status: &IkeSaStatus,
    child: ChildSaId,
    remote: IpAddr,
    reserved: impl FnOnce(&Identity) -> bool,
    is_tls: impl FnOnce(u64) -> bool,
) -> Option<SaInfo> {
    let child = status.children.iter().find(|known| known.id == child)?;
    let peer = status.peer.as_ref()?;
    let method = match &peer.proof {
        Proof::Unauthenticated { .. } => AuthMethod::NULL,
        Proof::PreSharedKey => AuthMethod::SHARED_KEY,
        Proof::Certificate { method, .. } | Proof::RawKey { method, .. } => *method,
        // By the key of its method.
        Proof::Eap { .. } => AuthMethod::SHARED_KEY,
    };
    let transport = match status.path.transport {
        Transport::Udp => "udp",
        Transport::UdpEncap => "udp-encapsulated",
        Transport::Stream(stream) if is_tls(stream.0) => "tls",
        Transport::Stream(_) => "tcp",
    };
    let assigned = status.assigned.as_ref().is_some_and(|assigned| assigned.remote.contains(&remote));
    let address = match () {
        () if peer.id == Identity::from_address(remote) => AddressBinding::Proved,
        () if assigned => AddressBinding::Assigned,
        () if reserved(&peer.id) => AddressBinding::Reserved,
        () if status.path.remote.ip().to_canonical() == remote => AddressBinding::Outer,
        () => AddressBinding::Configured,
    };
    Some(SaInfo {
        connection: status.connection.clone(),
        method: method.0,
        outer_local: status.path.local,
        outer_remote: status.path.remote,
        transport: transport.to_owned(),
        nat_local: status.nat_local,
        nat_remote: status.nat_remote,
        address,
        resumed: status.resumed,
        ike_spis: [status.initiator_spi, status.responder_spi].map(|spi| format!("{spi:016x}")),
        ike_suite: status.suite.as_ref().map(|suite| IkeSuiteInfo {
            encr: suite.encr.0,
            key_bits: suite.key_bits,
            integ: suite.integ.0,
            prf: suite.prf.0,
            ke: suite.ke.0,
            additional_ke: suite.additional.iter().map(|(_, method)| method.0).collect(),
        }),
        spis: [child.spi_in, child.spi_out].map(|spi| format!("{spi:08x}")),
        local_ts: child.local_ts.iter().map(ToString::to_string).collect(),
        remote_ts: child.remote_ts.iter().map(ToString::to_string).collect(),
    })
}
