//! Properties of parsers whose crates have no `fuzzing` entry of their own.

use latchkey_ipsec::ip::{Packet, checksum, fix_upper_layer_checksum, set_tos};
use latchkey_pad::Identity;

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

#[cfg(test)]
mod tests {
    use std::path::Path;

    #[test]
    fn all_seeds_hold_the_properties_of_their_target() {
        let targets: [(&str, fn(&[u8])); 6] = [
            ("deframer", latchkey_espintcp::fuzzing::deframer),
            ("identity", super::identity),
            ("ike_message", latchkey_ike::fuzzing::message),
            ("ike_payloads", latchkey_ike::fuzzing::payloads),
            ("ip_packet", super::ip_packet),
            ("proposal_notation", latchkey_ike::fuzzing::proposal_notation),
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
