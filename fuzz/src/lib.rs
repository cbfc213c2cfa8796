//! Properties of parsers whose crates have no `fuzzing` entry of their own.

use latchkey_ike::wire::{Payload, WireSelector, parse_payloads};
use latchkey_ipsec::ip::{Packet, checksum, fix_upper_layer_checksum, set_tos};
use latchkey_ipsec::selector::{TrafficSelector, narrow};
use latchkey_pad::{Certificate, Identity};

/// An IP packet of any octets: read, answered, marked and its checksum mended without a panic; what was read as
/// a packet stays one.
pub fn ip_packet(octets: &[u8]) {
    let mut answer = Vec::new();
    if let Some(packet) = Packet::parse(octets) {
        let _ = (packet.outbound_flow(), packet.inbound_flow(), packet.transport_payload());
        assert!(packet.bytes().len() <= octets.len());
        assert!(packet.header_len() <= packet.bytes().len());
        if packet.too_big(1280, &mut answer) {
            let error = Packet::parse(&answer).expect("an error message is an IP packet");
            assert_eq!(error.destination(), packet.source());
        }
    }
    checksum(&[octets, &answer]);
    let mut changed = octets.to_vec();
    set_tos(&mut changed, 0x28);
    fix_upper_layer_checksum(&mut changed);
    assert_eq!(Packet::parse(&changed).is_some(), Packet::parse(octets).is_some());
}

/// The first octet is an identification payload's type (RFC 7296 §3.5), the rest its data. What was read gives the
/// same octets back, and what is shown of it can be shown.
pub fn identity(octets: &[u8]) {
    let Some((&kind, data)) = octets.split_first() else { return };
    if let Ok(identity) = Identity::from_wire(kind, data) {
        assert_eq!((identity.kind(), identity.wire_data().as_slice()), (kind, data));
        let _ = (identity.to_string(), identity.strongswan_text());
        assert_eq!(Identity::from_wire(kind, data).ok().as_ref(), Some(&identity));
    }
    if let Ok(text) = std::str::from_utf8(octets) {
        let _ = Identity::parse(text);
    }
}

/// The first octet divides what follows into the bodies of two Traffic Selector payloads (RFC 7296 §3.13). What is
/// narrowed from them is in both.
pub fn traffic_selectors(octets: &[u8]) {
    const TS_INITIATOR: u8 = 44;
    let Some((&at, rest)) = octets.split_first() else { return };
    let (ours, theirs) = rest.split_at(usize::from(at).min(rest.len()));
    let read = |body: &[u8]| -> Vec<TrafficSelector> {
        let Ok(length) = u16::try_from(body.len() + 4) else { return Vec::new() };
        let chain = [&[0, 0], length.to_be_bytes().as_slice(), body].concat();
        let payloads = parse_payloads(TS_INITIATOR, &chain).unwrap_or_default();
        let selectors = payloads.into_iter().flat_map(|payload| match payload {
            Payload::TsInitiator(selectors) => selectors,
            _ => Vec::new(),
        });
        selectors
            .filter_map(|selector| match selector {
                WireSelector::Address(selector) => Some(selector),
                WireSelector::Unknown { .. } => None,
            })
            .collect()
    };
    let (ours, theirs) = (read(ours), read(theirs));
    let narrowed = narrow(&theirs, &ours);
    for selector in &narrowed.selectors {
        for side in [&ours, &theirs] {
            assert!(side.iter().any(|wide| wide.contains(selector)), "{selector:?} is more than {side:?}");
        }
        assert_eq!(selector.intersect(selector), Some(*selector));
        let _ = (selector.networks(), selector.prefix(), selector.is_opaque(), selector.is_any_port());
        let _ = selector.to_string();
    }
}

/// A certificate of any octets: what was read can be shown, and compared with identities.
pub fn certificate(octets: &[u8]) {
    let Ok(certificate) = Certificate::parse(octets) else { return };
    let _ = (certificate.key_type(), certificate.key_bits(), certificate.key_id(), certificate.serial());
    let _ = (certificate.is_valid_at(1_795_219_200), certificate.is_authority(), certificate.is_self_issued());
    let names = certificate.subject().into_iter().chain(certificate.issuer()).chain(certificate.alternative_names());
    for name in names {
        let _ = (name.to_string(), name.strongswan_text());
        // A distinguished name is read with the certificate; whether it is proved is another question.
        let _ = certificate.proves(name);
    }
    assert_eq!(certificate.der(), octets);
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    #[test]
    fn all_seeds_hold_the_properties_of_their_target() {
        let targets: [(&str, fn(&[u8])); 10] = [
            ("certificate", super::certificate),
            ("deframer", latchkey_espintcp::fuzzing::deframer),
            ("fragments", latchkey_ike::fuzzing::fragments),
            ("identity", super::identity),
            ("ike_message", latchkey_ike::fuzzing::message),
            ("ike_payloads", latchkey_ike::fuzzing::payloads),
            ("ip_packet", super::ip_packet),
            ("proposal_notation", latchkey_ike::fuzzing::proposal_notation),
            ("state_machine", latchkey_ike::fuzzing::state_machine),
            ("traffic_selectors", super::traffic_selectors),
        ];
        for (target, property) in targets {
            let seeds = std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds").join(target)).unwrap();
            let count = seeds.map(|seed| property(&std::fs::read(seed.unwrap().path()).unwrap())).count();
            assert!(count > 4, "{target}: {count} seeds");
        }
    }

    // A seed that is refused at its first octet is none: the well-formed ones must get through.
    #[test]
    fn seeds_reach_behind_the_first_checks() {
        let seed = |path: &str| std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds").join(path)).unwrap();
        for name in ["init", "init-2", "cookie", "invalid-ke", "encrypted", "fragment", "empty"] {
            assert!(latchkey_ike::wire::parse(&seed(&format!("ike_message/{name}"))).is_ok(), "{name}");
        }
        for name in ["init", "auth", "delete", "delete-ike", "rekey", "cfg", "eap", "vendor", "certreq", "unknown"] {
            let octets = seed(&format!("ike_payloads/{name}"));
            assert!(latchkey_ike::wire::parse_payloads(octets[0], &octets[1..]).is_ok(), "{name}");
        }
        for name in ["ipv4", "ipv6", "fqdn", "rfc822", "dn", "key-id", "null"] {
            let octets = seed(&format!("identity/{name}"));
            assert!(latchkey_pad::Identity::from_wire(octets[0], &octets[1..]).is_ok(), "{name}");
        }
        for name in
            ["v4-udp", "v4-tcp", "v4-options", "v4-fragment", "v4-icmp", "v6-udp", "v6-hop-by-hop", "v6-fragment"]
        {
            assert!(latchkey_ipsec::ip::Packet::parse(&seed(&format!("ip_packet/{name}"))).is_some(), "{name}");
        }
    }
}
