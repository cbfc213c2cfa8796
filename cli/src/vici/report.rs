//! What VICI shows: SAs, connections, certificates, statistics, as messages whose names and order are charon's;
//! swanctl and scripts that read its output depend on both.

use std::net::IpAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ike::config::{Child, ConfiguredSelector, DpdAction, StartAction, Unique};
use ike::crypto::names;
use ike::engine::{Assigned, ChildSaStatus, ChildState, IkeSaStatus, IkeState, Transport};
use ike::pool::PoolStatus;
use ipsec::plane::{Carrier, Encapsulation, Mark, Mode, ShuntAction, Tags, Usage};
use ipsec::selector::TrafficSelector;
use ipsec::transform::{Encr, Integ, Ke, Prf};
use latch::database::AutomaticFlows;
use pad::{AuthClass, Identity, IdentityPattern, PublicKey};

use crate::config::certificate::{is_authority, subject};
use crate::config::shunt::Shunt;
use crate::config::values::protocol_name;
use crate::config::{ConnectionDefinition, TrapActions};
use crate::control::{CounterReport, Packets, PolicyKind, PolicyReport, SaReport};
use crate::tree::{Origin, Section};

/// An empty message.
pub fn message() -> Section {
    Section::new(Origin::Vici("latchkeyd".into()))
}

/// A message with one section.
pub fn wrapped(name: &str, section: Section) -> Section {
    let mut outer = message();
    outer.push_section(name, section);
    outer
}

/// `list-sa`: the IKE SA's section with `child-sas`.
pub fn ike_sa(report: &SaReport) -> Section {
    let mut section = ike_sa_without_children(&report.status);
    push_if_ids(&mut section, report.if_ids);
    let mut children = message();
    for (at, child) in report.status.children.iter().enumerate() {
        let usage = report.usage.get(at).copied().flatten();
        children.push_section(child_name(child), child_sa(child, usage));
    }
    section.push_section("child-sas", children);
    section
}

/// `list-policy`: a trap or a shunt.
pub fn policy(report: &PolicyReport) -> Section {
    let mut section = message();
    section.push_value("child", report.child.as_str());
    section.push_value("ike", report.ike.as_str());
    let mode = match report.kind {
        PolicyKind::Trap(of_child) => mode(of_child),
        PolicyKind::Shunt(action) => shunt_mode(action),
    };
    section.push_value("mode", mode);
    section.push_list("local-ts", report.local_ts.iter().map(selector));
    section.push_list("remote-ts", report.remote_ts.iter().map(selector));
    section
}

/// The section name of a Child SA.
pub fn child_name(child: &ChildSaStatus) -> String {
    format!("{}-{}", child.name, child.id.0)
}

/// An IKE SA without its Child SAs, as `ike-updown` has it.
pub fn ike_sa_without_children(status: &IkeSaStatus) -> Section {
    let mut section = message();
    let identity = |id: &Option<Identity>| id.as_ref().map_or_else(|| "%any".to_owned(), Identity::to_string);
    section.push_value("uniqueid", status.id.0.to_string());
    section.push_value("version", "2");
    section.push_value("state", ike_state(status.state));
    section.push_value("local-host", status.path.local.ip().to_string());
    section.push_value("local-port", status.path.local.port().to_string());
    section.push_value("local-id", identity(&status.local_id));
    section.push_value("remote-host", status.path.remote.ip().to_string());
    section.push_value("remote-port", status.path.remote.port().to_string());
    section.push_value("remote-id", identity(&status.remote_id));
    if let Some(peer) = status.peer.as_ref().filter(|peer| peer.id != *peer.ike_id()) {
        section.push_value("remote-eap-id", peer.id.to_string());
    }
    if status.initiator {
        section.push_value("initiator", "yes");
    }
    section.push_value("initiator-spi", format!("{:016x}", status.initiator_spi));
    section.push_value("responder-spi", format!("{:016x}", status.responder_spi));
    let nat_any = status.nat_local || status.nat_remote || status.nat_fake;
    for (name, condition) in [
        ("nat-local", status.nat_local),
        ("nat-remote", status.nat_remote),
        ("nat-fake", status.nat_fake),
        ("nat-any", nat_any),
    ] {
        if condition {
            section.push_value(name, "yes");
        }
    }
    if let Some(suite) = &status.suite {
        push_cipher(&mut section, suite.encr, suite.key_bits, suite.integ);
        section.push_value("prf-alg", names::prf(suite.prf));
        section.push_value("dh-group", names::ke(suite.ke));
        for (number, method) in suite.additional.iter() {
            section.push_value(format!("ake{number}"), names::ke(method));
        }
    }
    if status.state == IkeState::Established {
        push_seconds(&mut section, "established", status.established);
        push_seconds(&mut section, "rekey-time", status.rekey_in);
        push_seconds(&mut section, "reauth-time", status.reauth_in);
    }
    // Not charon's: it has no session resumption.
    if status.resumed {
        section.push_value("resumed", "yes");
    }
    if let Some(assigned) = &status.assigned {
        push_assigned(&mut section, assigned);
    }
    if !status.tasks_active.is_empty() {
        section.push_list("tasks-active", status.tasks_active.iter().copied());
    }
    // Not charon's: it has no TCP.
    if matches!(status.path.transport, Transport::Stream(_)) {
        section.push_value("transport", "TCP");
    }
    section
}

fn push_assigned(section: &mut Section, assigned: &Assigned) {
    let addresses = |section: &mut Section, name: &str, addresses: &[IpAddr]| {
        if !addresses.is_empty() {
            section.push_list(name, addresses.iter().map(IpAddr::to_string));
        }
    };
    addresses(section, "local-vips", &assigned.local);
    addresses(section, "remote-vips", &assigned.remote);
    // From here on not charon's, which hands these to its plugins only.
    addresses(section, "dns-servers", &assigned.dns);
    if !assigned.domains.is_empty() {
        section.push_list("dns-domains", assigned.domains.iter().map(|domain| domain.name.as_str()));
    }
    if !assigned.subnets.is_empty() {
        let subnets = assigned.subnets.iter().map(|(address, prefix)| format!("{address}/{prefix}"));
        section.push_list("peer-subnets", subnets);
    }
}

/// `get-pools`. A message has 512 KiB; of a pool with more leases than that the last are left out.
pub fn pools(pools: &[PoolStatus], with_leases: bool) -> Section {
    const ROOM: usize = 400_000;
    /// Octets of a lease beside the identity, at most.
    const LEASE: usize = 120;
    let mut answer = message();
    let mut room = ROOM;
    for pool in pools {
        let mut section = message();
        section.push_value("base", pool.base.to_string());
        section.push_value("size", pool.size.to_string());
        section.push_value("online", pool.online.to_string());
        section.push_value("offline", pool.offline.to_string());
        if with_leases {
            let mut leases = message();
            for (number, lease) in pool.leases.iter().enumerate() {
                let identity = lease.identity.to_string();
                let Some(left) = room.checked_sub(LEASE + identity.len()) else {
                    tracing::warn!(pool = pool.name, "the list of leases is too long for one answer");
                    break;
                };
                room = left;
                let mut one = message();
                one.push_value("address", lease.address.to_string());
                one.push_value("identity", identity);
                one.push_value("status", if lease.online { "online" } else { "offline" });
                leases.push_section(number.to_string(), one);
            }
            section.push_section("leases", leases);
        }
        answer.push_section(pool.name.as_str(), section);
    }
    answer
}

/// A Child SA.
pub fn child_sa(status: &ChildSaStatus, usage: Option<(Usage, Carrier)>) -> Section {
    let mut section = message();
    section.push_value("name", status.name.as_str());
    section.push_value("uniqueid", status.id.0.to_string());
    section.push_value("reqid", status.reqid.to_string());
    section.push_value("state", child_state(status.state));
    section.push_value("mode", mode(status.mode));
    if !matches!(status.state, ChildState::Created | ChildState::Installing) {
        push_installed(&mut section, status, usage.map(|(usage, _)| usage).unwrap_or_default());
    }
    section.push_list("local-ts", status.local_ts.iter().map(selector));
    section.push_list("remote-ts", status.remote_ts.iter().map(selector));
    // Ours, behind all that is charon's.
    if let Some((_, Carrier { name, reason })) = usage {
        section.push_value("plane", name);
        section.push_value("plane-reason", reason);
    }
    section
}

fn push_installed(section: &mut Section, status: &ChildSaStatus, usage: Usage) {
    section.push_value("protocol", "ESP");
    if matches!(status.encapsulation, Some(Encapsulation::Udp { .. } | Encapsulation::Stream { .. })) {
        section.push_value("encap", "yes");
    }
    section.push_value("spi-in", format!("{:08x}", status.spi_in));
    section.push_value("spi-out", format!("{:08x}", status.spi_out));
    push_tags(section, &status.tags);
    if let Some(suite) = &status.suite {
        push_cipher(section, suite.encr, suite.key_bits, suite.integ);
        if status.ke != Ke::NONE {
            section.push_value("dh-group", names::ke(status.ke));
        }
        for (number, method) in status.additional.iter() {
            section.push_value(format!("ake{number}"), names::ke(method));
        }
        if suite.esn {
            section.push_value("esn", "1");
        }
    }
    section.push_value("bytes-in", usage.bytes_in.to_string());
    section.push_value("packets-in", usage.packets_in.to_string());
    push_seconds(section, "use-in", usage.idle_in);
    section.push_value("bytes-out", usage.bytes_out.to_string());
    section.push_value("packets-out", usage.packets_out.to_string());
    push_seconds(section, "use-out", usage.idle_out);
    push_seconds(section, "rekey-time", status.rekey_in);
    push_seconds(section, "life-time", status.expires_in);
    push_seconds(section, "install-time", status.installed);
}

fn push_tags(section: &mut Section, tags: &Tags) {
    let marks = [("mark-in", "mark-mask-in", tags.mark_in), ("mark-out", "mark-mask-out", tags.mark_out)];
    for (name, mask_name, Mark { value, mask }) in marks {
        if (value, mask) != (0, 0) {
            section.push_value(name, format!("{value:08x}"));
            if mask != u32::MAX {
                section.push_value(mask_name, format!("{mask:08x}"));
            }
        }
    }
    push_if_ids(section, (tags.if_id_in, tags.if_id_out));
}

fn push_if_ids(section: &mut Section, (inbound, outbound): (u32, u32)) {
    for (name, if_id) in [("if-id-in", inbound), ("if-id-out", outbound)] {
        if if_id != 0 {
            section.push_value(name, format!("{if_id:08x}"));
        }
    }
}

fn push_cipher(section: &mut Section, encr: Encr, key_bits: u16, integ: Integ) {
    section.push_value("encr-alg", names::encr(encr));
    // charon names a key length where the algorithm has several.
    if key_bits != 0 && encr != Encr::CHACHA20_POLY1305 && encr != Encr::NULL {
        section.push_value("encr-keysize", key_bits.to_string());
    }
    if integ != Integ::NONE {
        section.push_value("integ-alg", names::integ(integ));
    }
}

fn push_seconds(section: &mut Section, name: &str, time: Option<Duration>) {
    if let Some(time) = time {
        section.push_value(name, time.as_secs().to_string());
    }
}

fn ike_state(state: IkeState) -> &'static str {
    match state {
        IkeState::Created => "CREATED",
        IkeState::Connecting => "CONNECTING",
        IkeState::Established => "ESTABLISHED",
        IkeState::Rekeying => "REKEYING",
        IkeState::Rekeyed => "REKEYED",
        IkeState::Deleting => "DELETING",
    }
}

fn child_state(state: ChildState) -> &'static str {
    match state {
        ChildState::Created => "CREATED",
        ChildState::Installing => "INSTALLING",
        ChildState::Installed => "INSTALLED",
        ChildState::Rekeying => "REKEYING",
        ChildState::Rekeyed => "REKEYED",
        ChildState::Deleting => "DELETING",
        ChildState::Deleted => "DELETED",
    }
}

fn mode(mode: Mode) -> &'static str {
    match mode {
        Mode::Tunnel => "TUNNEL",
        Mode::Transport => "TRANSPORT",
    }
}

fn shunt_mode(action: ShuntAction) -> &'static str {
    match action {
        ShuntAction::Pass => "PASS",
        ShuntAction::Drop => "DROP",
    }
}

fn selector(selector: &TrafficSelector) -> String {
    selector.to_string()
}

fn configured_selector(configured: &ConfiguredSelector) -> String {
    match configured {
        ConfiguredSelector::Fixed(fixed) => selector(fixed),
        ConfiguredSelector::Dynamic { protocol: 0, start_port: 0, end_port: u16::MAX } => "dynamic".to_owned(),
        ConfiguredSelector::Dynamic { protocol, start_port, end_port } => {
            let protocol = protocol_name(*protocol);
            match (*start_port, *end_port) {
                (0, u16::MAX) => format!("dynamic[{protocol}]"),
                (u16::MAX, 0) => format!("dynamic[{protocol}/OPAQUE]"),
                (start, end) if start == end => format!("dynamic[{protocol}/{start}]"),
                (start, end) => format!("dynamic[{protocol}/{start}-{end}]"),
            }
        }
    }
}

/// `list-conn`: the connection's section.
pub fn connection(definition: &ConnectionDefinition) -> Section {
    let connection = &definition.connection;
    let mut section = message();
    let addresses = |written: &[String]| {
        if written.is_empty() { vec!["%any".to_owned()] } else { written.to_vec() }
    };
    section.push_list("local_addrs", addresses(&definition.local_addrs));
    section.push_list("remote_addrs", addresses(&definition.remote_addrs));
    if connection.local_port != 500 {
        section.push_value("local_port", connection.local_port.to_string());
    }
    if connection.remote_port != 500 {
        section.push_value("remote_port", connection.remote_port.to_string());
    }
    section.push_value("version", "IKEv2");
    section.push_value("reauth_time", connection.reauth_time.as_secs().to_string());
    section.push_value("rekey_time", connection.rekey_time.as_secs().to_string());
    let unique = match connection.unique {
        Unique::Never => "UNIQUE_NEVER",
        Unique::No => "UNIQUE_NO",
        Unique::Keep => "UNIQUE_KEEP",
        Unique::Replace => "UNIQUE_REPLACE",
    };
    section.push_value("unique", unique);
    if !connection.dpd_delay.is_zero() {
        section.push_value("dpd_delay", connection.dpd_delay.as_secs().to_string());
    }
    let local = &connection.local_auth;
    let local_id = connection.local_id.as_ref().map(Identity::to_string);
    let eap_id = local.eap_id.as_deref().map(Identity::to_string);
    let certs = (local.certificates.as_slice(), local.public_keys.as_slice());
    section.push_section("local-1", auth(local_id, (local.class, eap_id), certs, &[]));
    let remote = &connection.remote;
    let remote_id = Some(remote.remote_id.to_string()).filter(|id| id != "%any");
    let eap_id = remote.eap_id.as_ref().map(IdentityPattern::to_string);
    let certs = (remote.certs.as_slice(), remote.public_keys.as_slice());
    section.push_section("remote-1", auth(remote_id, (remote.class, eap_id), certs, &remote.cacerts));
    let mut children = message();
    for child in &connection.children {
        let section = configured_child(child, mode(child.mode), definition.traps(&child.name));
        children.push_section(child.name.as_str(), section);
    }
    for Shunt { child, action, .. } in &definition.shunts {
        let section = configured_child(child, shunt_mode(*action), TrapActions::default());
        children.push_section(child.name.as_str(), section);
    }
    section.push_section("children", children);
    section
}

fn auth(
    id: Option<String>,
    (class, eap_id): (AuthClass, Option<String>),
    (certs, public_keys): (&[Vec<u8>], &[PublicKey]),
    cacerts: &[Vec<u8>],
) -> Section {
    let mut section = message();
    if let Some(id) = &id {
        section.push_value("id", id.as_str());
    }
    let (class, method) = match class {
        AuthClass::Null => ("null", None),
        AuthClass::SharedKey => ("pre-shared key", None),
        AuthClass::PublicKey => ("public key", None),
        AuthClass::Eap(method) => ("EAP", Some(method)),
    };
    section.push_value("class", class);
    if let Some(method) = method {
        section.push_value("eap-type", method.name().to_ascii_uppercase());
    }
    if let Some(eap_id) = eap_id {
        section.push_value("eap_id", eap_id);
    }
    section.push_list::<String>("groups", []);
    section.push_list::<String>("cert_policy", []);
    // As in charon, a raw key is a certificate whose subject is the identity that it proves.
    let named = |key: &PublicKey| id.clone().unwrap_or_else(|| key.identity().to_string());
    let subjects = certs.iter().map(|certificate| subject_text(certificate)).chain(public_keys.iter().map(named));
    section.push_list("certs", subjects);
    section.push_list("cacerts", cacerts.iter().map(|certificate| subject_text(certificate)));
    section
}

fn configured_child(child: &Child, mode: &str, traps: TrapActions) -> Section {
    let mut section = message();
    section.push_value("mode", mode);
    section.push_value("rekey_time", child.rekey_time.as_secs().to_string());
    section.push_value("rekey_bytes", child.lifetime.soft_bytes.unwrap_or(0).to_string());
    section.push_value("rekey_packets", child.lifetime.soft_packets.unwrap_or(0).to_string());
    let dpd_action = match child.dpd_action {
        DpdAction::Clear => "none",
        DpdAction::Trap => "trap",
        DpdAction::Restart => "start",
    };
    section.push_value("dpd_action", dpd_action);
    let close_action = match child.close_action {
        StartAction::None => "none",
        StartAction::Trap => "trap",
        StartAction::Start if traps.close => "trap|start",
        StartAction::Start => "start",
    };
    section.push_value("close_action", close_action);
    section.push_list("local-ts", child.local_ts.iter().map(configured_selector));
    section.push_list("remote-ts", child.remote_ts.iter().map(configured_selector));
    section
}

/// A certificate's subject as text; empty if it has none.
pub fn subject_text(certificate: &[u8]) -> String {
    subject(certificate).map(|subject| subject.to_string()).unwrap_or_default()
}

/// `list-cert`.
pub fn certificate(der: &[u8], has_private_key: bool) -> Section {
    let mut section = message();
    section.push_value("type", "X509");
    section.push_value("flag", if is_authority(der) { "CA" } else { "NONE" });
    if has_private_key {
        section.push_value("has_privkey", "yes");
    }
    section.push_value("data", der);
    section
}

/// `list-cert` of a raw public key. As in charon it has no flag, and no subject where that is the name of a key.
pub fn public_key(key: &PublicKey, subject: &Identity, has_private_key: bool) -> Section {
    let mut section = message();
    section.push_value("type", "PUBKEY");
    if has_private_key {
        section.push_value("has_privkey", "yes");
    }
    section.push_value("data", key.der());
    if !matches!(subject, Identity::KeyId(_)) {
        section.push_value("subject", subject.to_string());
    }
    section
}

/// `list-cert` of a certificate revocation list.
pub fn revocation_list(der: &[u8]) -> Section {
    let mut section = message();
    section.push_value("type", "X509_CRL");
    section.push_value("flag", "NONE");
    section.push_value("data", der);
    section
}

/// `version`.
pub fn version() -> Section {
    let mut section = message();
    let kernel = |name: &str| {
        let text = std::fs::read_to_string(format!("/proc/sys/kernel/{name}")).unwrap_or_default();
        text.trim().to_owned()
    };
    section.push_value("daemon", "latchkeyd");
    section.push_value("version", env!("CARGO_PKG_VERSION"));
    section.push_value("sysname", kernel("ostype"));
    section.push_value("release", kernel("osrelease"));
    section.push_value("machine", std::env::consts::ARCH);
    section
}

/// `stats`. What we do not have, such as job queues, is 0: swanctl prints each of these.
pub fn stats(running: Duration, since: SystemTime, (ike_sas, half_open): (usize, usize), packets: &Packets) -> Section {
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    let counts = |counts: [&str; 4]| {
        let mut section = message();
        for (name, count) in ["critical", "high", "medium", "low"].into_iter().zip(counts) {
            section.push_value(name, count);
        }
        section
    };
    let mut uptime = message();
    uptime.push_value("running", elapsed(running));
    uptime.push_value("since", calendar(since));
    let mut threads = message();
    threads.push_value("total", workers.to_string());
    threads.push_value("idle", workers.to_string());
    threads.push_section("active", counts(["0"; 4]));
    let mut sas = message();
    sas.push_value("total", ike_sas.to_string());
    sas.push_value("half-open", half_open.to_string());
    let mut section = message();
    section.push_section("uptime", uptime);
    section.push_section("workers", threads);
    section.push_section("queues", counts(["0"; 4]));
    section.push_value("scheduled", "0");
    section.push_section("ikesas", sas);
    let mut by_reason = message();
    for (reason, count) in &packets.dropped {
        by_reason.push_value(reason.name(), count.to_string());
    }
    section.push_section("esp-dropped", by_reason);
    if let Some(AutomaticFlows { latches, without_room, in_conflict, dropped }) = packets.automatic {
        let mut automatic = message();
        automatic.push_value("latches", latches.to_string());
        automatic.push_value("without-room", without_room.to_string());
        automatic.push_value("in-conflict", in_conflict.to_string());
        automatic.push_value("dropped", dropped.to_string());
        section.push_section("latch-flows", automatic);
    }
    section.push_list("plugins", ["ike", "espintcp", "latch", "vici"]);
    section
}

/// A time span in the largest unit of which there are at least two, as charon has it.
fn elapsed(time: Duration) -> String {
    let seconds = time.as_secs();
    let (count, unit) = match seconds {
        172_800.. => (seconds / 86_400, "day"),
        7200.. => (seconds / 3600, "hour"),
        120.. => (seconds / 60, "minute"),
        _ => (seconds, "second"),
    };
    format!("{count} {unit}{}", if count == 1 { "" } else { "s" })
}

/// A point in time in UTC, as in `Nov 21 08:02:01 2026`.
fn calendar(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Days to civil date, counted in years that begin in March so that the leap day comes last.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let year = era * 400 + year_of_era + u64::from(shifted_month >= 10);
    let months = ["Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec", "Jan", "Feb"];
    let month = usize::try_from(shifted_month).ok().and_then(|month| months.get(month)).copied().unwrap_or("Mar");
    format!("{month} {day:02} {:02}:{:02}:{:02} {year}", second / 3600, second / 60 % 60, second % 60)
}

/// `get-algorithms`.
pub fn algorithms() -> Section {
    let implementation = "aws-lc";
    let section = |names: Vec<String>| {
        let mut section = message();
        for name in names {
            section.push_value(name, implementation);
        }
        section
    };
    let ciphers = |ids: &[Encr]| ids.iter().map(|id| names::encr(*id)).collect();
    let plain = [Encr::NULL, Encr::AES_CBC, Encr::AES_CTR];
    let combined = [
        Encr::AES_CCM_8,
        Encr::AES_CCM_12,
        Encr::AES_CCM_16,
        Encr::AES_GCM_8,
        Encr::AES_GCM_12,
        Encr::AES_GCM_16,
        Encr::NULL_AUTH_AES_GMAC,
        Encr::CHACHA20_POLY1305,
    ];
    let integrity = [
        Integ::HMAC_SHA1_96,
        Integ::AES_CMAC_96,
        Integ::HMAC_SHA2_256_128,
        Integ::HMAC_SHA2_384_192,
        Integ::HMAC_SHA2_512_256,
    ];
    let prfs = [Prf::HMAC_SHA1, Prf::AES128_CMAC, Prf::HMAC_SHA2_256, Prf::HMAC_SHA2_384, Prf::HMAC_SHA2_512];
    let methods = [
        Ke::ECP_256,
        Ke::ECP_384,
        Ke::ECP_521,
        Ke::X25519,
        Ke::MODP_2048,
        Ke::MODP_3072,
        Ke::MODP_4096,
        Ke::MODP_6144,
        Ke::MODP_8192,
        Ke::BRAINPOOL_256,
        Ke::BRAINPOOL_384,
        Ke::ML_KEM_512,
        Ke::ML_KEM_768,
        Ke::ML_KEM_1024,
    ];
    let hashes = ["HASH_SHA1", "HASH_SHA2_256", "HASH_SHA2_384", "HASH_SHA2_512"];
    let mut all = message();
    all.push_section("encryption", section(ciphers(&plain)));
    all.push_section("integrity", section(integrity.iter().map(|id| names::integ(*id)).collect()));
    all.push_section("aead", section(ciphers(&combined)));
    all.push_section("hasher", section(hashes.iter().map(|name| (*name).to_owned()).collect()));
    all.push_section("prf", section(prfs.iter().map(|id| names::prf(*id)).collect()));
    for empty in ["xof", "kdf", "drbg"] {
        all.push_section(empty, message());
    }
    all.push_section("ke", section(methods.iter().map(|id| names::ke(*id)).collect()));
    all.push_section("rng", section(vec!["RNG_STRONG".to_owned()]));
    all.push_section("nonce-gen", section(vec!["NONCE_GEN".to_owned()]));
    all
}

/// `get-counters`: a section for each connection, that of all together without a name.
pub fn counters(reports: &[CounterReport]) -> Section {
    let mut all = message();
    for report in reports {
        let mut section = message();
        for (counter, count) in &report.counts {
            section.push_value(counter.name(), count.to_string());
        }
        all.push_section(report.connection.as_deref().unwrap_or_default(), section);
    }
    let found = !reports.is_empty();
    let mut answer = wrapped("counters", all);
    answer.push_value("success", if found { "yes" } else { "no" });
    if !found {
        answer.push_value("errmsg", "no counters found for this connection");
    }
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn points_in_time_read_as_charon_writes_them() {
        let at = |seconds| calendar(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0), "Jan 01 00:00:00 1970");
        assert_eq!(at(951_782_399), "Feb 28 23:59:59 2000");
        assert_eq!(at(951_782_400), "Feb 29 00:00:00 2000");
        assert_eq!(at(1_795_248_121), "Nov 21 08:02:01 2026");
        assert_eq!(at(4_107_542_400), "Mar 01 00:00:00 2100");
    }

    #[test]
    fn time_spans_read_as_charon_writes_them() {
        assert_eq!(elapsed(Duration::from_secs(71)), "71 seconds");
        assert_eq!(elapsed(Duration::from_secs(300)), "5 minutes");
        assert_eq!(elapsed(Duration::from_secs(1)), "1 second");
        assert_eq!(elapsed(Duration::from_secs(400_000)), "4 days");
    }
}
