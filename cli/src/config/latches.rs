//! What a configuration says of latched flows: which it would break (RFC 5660 §2.2, SPD conflicts), and which child is for
//! a flow that has no SA yet.

use std::net::IpAddr;
use std::sync::Arc;

use ike::config::{Child, ConfiguredSelector};
use ipsec::plane::Mode;
use ipsec::selector::{Flow, TrafficSelector};
use ipsec::transform::{Encr, Integ, Proposal, TransformType};
use pad::Identity;

use super::ConnectionDefinition;

/// What a latch has pinned, as far as a configuration speaks of it.
#[derive(Clone, Copy, Debug)]
pub struct Pinned<'a> {
    /// The flow.
    pub flow: &'a Flow,
    /// The identity that the peer proved.
    pub peer: &'a Identity,
    /// The identity that we asserted.
    pub local: &'a Identity,
    /// The mode.
    pub mode: Mode,
    /// Cipher, its key length in bits, integrity algorithm.
    pub suite: (Encr, u16, Integ),
}

/// Why connections would not protect a latched flow as it is latched; `None` when one of their children would.
///
/// A shunt goes before all children: what it selects is not protected, whatever else would.
pub fn conflict(connections: &[ConnectionDefinition], pinned: &Pinned<'_>) -> Option<String> {
    let mut shunts = connections.iter().flat_map(|definition| &definition.shunts).filter(|shunt| shunt.start);
    if let Some(shunt) = shunts.find(|shunt| covers(&shunt.child, pinned.flow)) {
        return Some(format!("the policy has changed: the shunt {} selects it", shunt.child.name));
    }
    let mut nearest = "no connection admits its peer";
    for definition in connections {
        let connection = &definition.connection;
        let ours = connection.local_id.as_ref().is_none_or(|local| local == pinned.local);
        if !ours || !connection.remote.remote_id.matches(pinned.peer) {
            continue;
        }
        for child in &connection.children {
            if !covers(child, pinned.flow) {
                nearest = "no child of its peer's connections selects it";
            } else if child.mode != pinned.mode || !offers(&child.esp_proposals, pinned.suite) {
                nearest = "the child that selects it has another mode or other algorithms";
            } else {
                return None;
            }
        }
    }
    Some(format!("the policy has changed: {nearest}"))
}

/// The first connection and child whose selectors cover a flow.
pub fn child_for<'a>(
    connections: &'a [ConnectionDefinition],
    flow: &Flow,
) -> Option<(&'a ConnectionDefinition, &'a Arc<Child>)> {
    connections.iter().find_map(|definition| {
        let child = definition.connection.children.iter().find(|child| covers(child, flow))?;
        Some((definition, child))
    })
}

/// True when connections let a peer have an address behind it, and nobody else: no other identity, and none that is found
/// out only when it comes, by a pattern or an address that the IKE SA brings.
pub fn is_reserved(connections: &[ConnectionDefinition], peer: &Identity, address: IpAddr) -> bool {
    let within = |fixed: &TrafficSelector| {
        fixed.start.is_ipv4() == address.is_ipv4() && (fixed.start..=fixed.end).contains(&address)
    };
    let has = |definition: &ConnectionDefinition, is: &dyn Fn(&ConfiguredSelector) -> bool| {
        definition.connection.children.iter().flat_map(|child| &child.remote_ts).any(is)
    };
    let is_named = |selector: &_| matches!(selector, ConfiguredSelector::Fixed(fixed) if within(fixed));
    let may_be = |selector: &_| !matches!(selector, ConfiguredSelector::Fixed(fixed) if !within(fixed));
    connections.iter().any(|definition| has(definition, &is_named))
        && connections
            .iter()
            .filter(|definition| has(definition, &may_be))
            .all(|definition| definition.connection.remote.remote_id.as_exact() == Some(peer))
}

fn covers(child: &Child, flow: &Flow) -> bool {
    let covered = |selectors: &[ConfiguredSelector], address, port| {
        selectors.iter().any(|selector| match selector {
            ConfiguredSelector::Fixed(fixed) => fixed.matches(flow.protocol, address, port),
            // Stands for an address that only the IKE SA knows.
            dynamic => dynamic.resolve(address).matches(flow.protocol, address, port),
        })
    };
    covered(&child.local_ts, flow.local, flow.local_port) && covered(&child.remote_ts, flow.remote, flow.remote_port)
}

/// True when one of the proposals has these algorithms.
pub fn offers(proposals: &[Proposal], (encr, key_bits, integ): (Encr, u16, Integ)) -> bool {
    proposals.iter().any(|proposal| {
        let has = |kind, id| {
            proposal.transforms.iter().any(|transform| {
                let length = transform.key_bits.is_none_or(|bits| kind != TransformType::ENCR || bits == key_bits);
                transform.kind == kind && transform.id == id && length
            })
        };
        has(TransformType::ENCR, encr.0) && (integ == Integ::NONE || has(TransformType::INTEG, integ.0))
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

    use super::*;
    use crate::config::load;

    fn connections(child: &str, remote_id: &str) -> Vec<ConnectionDefinition> {
        let directory = tempfile::tempdir().unwrap();
        let text = format!(
            "connections {{\nsite {{\nlocal_addrs = 192.0.2.1\nremote_addrs = 192.0.2.2\nlocal {{\nauth = psk\nid = a.example\n}}\n\
             remote {{\nauth = psk\nid = {remote_id}\n}}\nchildren {{\nnet {{\n{child}\n}}\n}}\n}}\n}}\n"
        );
        std::fs::write(directory.path().join("swanctl.conf"), text).unwrap();
        let loaded = load::load(directory.path());
        assert!(!loaded.has_errors(), "{:?}", loaded.reports);
        loaded.configured.connections
    }

    // RFC 5660 §1: addresses that are bound to identities by the configuration.
    #[test]
    fn an_address_is_reserved_when_nobody_else_may_have_it() {
        let good = "local_ts = 10.1.0.0/24\nremote_ts = 10.2.0.0/24,fd02::/64";
        let peer = Identity::Fqdn("b.example".into());
        let reserved = |connections: &[ConnectionDefinition], address: &str| {
            is_reserved(connections, &peer, address.parse().unwrap())
        };
        let one = connections(good, "b.example");
        assert!(reserved(&one, "10.2.0.1") && reserved(&one, "fd02::1"));
        assert!(!reserved(&one, "10.3.0.1") && !reserved(&one, "fd03::1") && !reserved(&[], "10.2.0.1"));
        assert!(!reserved(&connections(good, "*.example"), "10.2.0.1"), "a pattern");
        assert!(!reserved(&connections(good, "c.example"), "10.2.0.1"), "somebody else");
        assert!(!reserved(&connections("remote_ts = dynamic", "b.example"), "10.2.0.1"), "nobody names it");
        for (other, id, left) in [
            ("remote_ts = 10.2.0.0/25", "c.example", false),
            ("remote_ts = 10.3.0.0/24", "c.example", true),
            ("remote_ts = dynamic", "c.example", false),
            ("remote_ts = 10.2.0.0/25", "b.example", true),
        ] {
            let both: Vec<_> = one.iter().cloned().chain(connections(other, id)).collect();
            assert_eq!(reserved(&both, "10.2.0.1"), left, "{other} {id}");
        }
    }

    // RFC 5660 §2.2: whatever alters how the flow is protected is a conflict.
    #[test]
    fn a_configuration_conflicts_with_what_it_would_protect_otherwise() {
        let flow = Flow {
            protocol: 6,
            local: "10.1.0.1".parse().unwrap(),
            local_port: 40_000,
            remote: "10.2.0.1".parse().unwrap(),
            remote_port: 7,
        };
        let (peer, local) = (Identity::Fqdn("b.example".into()), Identity::Fqdn("a.example".into()));
        let suite = (Encr::AES_GCM_16, 128, Integ::NONE);
        let pinned = Pinned { flow: &flow, peer: &peer, local: &local, mode: Mode::Tunnel, suite };
        let good = "local_ts = 10.1.0.0/24\nremote_ts = 10.2.0.0/24\nesp_proposals = aes128gcm16";
        assert_eq!(conflict(&connections(good, "b.example"), &pinned), None);
        assert_eq!(conflict(&connections(good, "*.example"), &pinned), None);
        let other_port = good.replace("10.2.0.0/24", "10.2.0.0/24[tcp/8]");
        let dynamic = good.replace("10.2.0.0/24", "dynamic[tcp/7]");
        assert_eq!(conflict(&connections(&dynamic, "b.example"), &pinned), None);
        for (connections, why) in [
            (Vec::new(), "no connection"),
            (connections(good, "c.example"), "no connection"),
            (connections(&other_port, "b.example"), "no child"),
            (connections(&good.replace("aes128gcm16", "aes256gcm16"), "b.example"), "other algorithms"),
            (connections(&good.replace("aes128gcm16", "aes128-sha256"), "b.example"), "other algorithms"),
            (connections(&format!("{good}\nmode = transport"), "b.example"), "another mode"),
        ] {
            let reason = conflict(&connections, &pinned).unwrap();
            assert!(reason.contains(why), "{reason}");
        }
        // RFC 5660 §2.3: "bypass".
        for (mode, remote, start, broken) in [
            ("pass", "10.2.0.1/32", "trap", true),
            ("drop", "10.2.0.1/32[tcp/7]", "trap", true),
            ("pass", "10.2.0.1/32[tcp/8]", "trap", false),
            ("pass", "10.2.0.1/32", "none", false),
        ] {
            let shunt = format!(
                "{good}\n}}\naside {{\nmode = {mode}\nstart_action = {start}\nlocal_ts = 10.1.0.0/24\nremote_ts = {remote}"
            );
            let found = conflict(&connections(&shunt, "b.example"), &pinned);
            assert_eq!(
                found.is_some_and(|reason| reason.contains("the shunt aside")),
                broken,
                "{mode} {remote} {start}"
            );
        }
        let cbc = Pinned { suite: (Encr::AES_CBC, 128, Integ::HMAC_SHA2_256_128), ..pinned };
        assert_eq!(conflict(&connections(&good.replace("aes128gcm16", "aes128-sha256"), "b.example"), &cbc), None);
        let found = connections(good, "b.example");
        assert_eq!(child_for(&found, &flow).unwrap().1.name, "net");
        assert!(child_for(&found, &Flow { remote: "10.3.0.1".parse().unwrap(), ..flow }).is_none());
    }
}
