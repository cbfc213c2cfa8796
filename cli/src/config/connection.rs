//! `connections.<name>`, from a file or from VICI's `load-conn`, to a [`ConnectionDefinition`].
//!
//! Each option of swanctl.conf(5) is known here. One that we serve is typed and checked; one that we do not serve
//! is an error where its neglect would weaken the protection or break the setup, and a warning elsewhere; one
//! that nobody knows is an error. An error refuses the whole connection, as charon does.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ike::config::{
    AddressRange, Child, Childless, ConfiguredSelector, Connection, DpdAction, Fragmentation, Number, Numbering,
    RedirectPhase, SendCert, SplitDns, StartAction, TcpPolicy, Unique, domain_name,
};
use ike::crypto::{has_short_keys, parse_proposals};
use ike::engine::Gateway;
use ipsec::plane::{CopyDscp, KernelOptions, Lifetime, Mode, Offload, RESERVED_REQID, ShuntAction, TfcPadding};
use ipsec::transform::{Proposal, Protocol};
use pad::identity::IdentityError;
use pad::{
    AuthClass, EapMethod, Identity, IdentityPattern, LocalAuth, PadEntry, PublicKey, Revocation, SignatureConstraints,
};

use crate::config::certificate::{certificate_der, is_authority, read_certificate, subject};
use crate::config::shunt::Shunt;
use crate::config::trap::Selectors;
use crate::config::values::{self, Address};
use crate::config::{ConnectionDefinition, Report, Severity, TrapActions};
use crate::tree::{Node, Origin, Section, Value};

/// Default of `tcp_delay`: with the TCP and IKE round trips after it, a tunnel is up about half a second later.
pub const DEFAULT_TCP_DELAY: Duration = Duration::from_millis(1500);
/// Default of `tcp_probe_udp`.
pub const DEFAULT_TCP_PROBE_UDP: Duration = Duration::from_secs(60);

const DEFAULT_IKE_REKEY: Duration = Duration::from_secs(4 * 3600);
const DEFAULT_CHILD_REKEY: Duration = Duration::from_secs(3600);
/// Virtual addresses of one connection.
const MAX_VIPS: usize = 16;
/// Raw keys of one peer: each costs a verification.
const MAX_PUBLIC_KEYS: usize = 16;
/// The kernel's limit (XFRMA_REPLAY_ESN_MAX).
const MAX_REPLAY_WINDOW: u64 = 4096;

/// Which folder a certificate's name is relative to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CertificateKind {
    /// `x509`.
    EndEntity,
    /// `x509ca`.
    Authority,
}

/// Turns what `certs`, `cacerts` and `pubkeys` say into a certificate or key.
pub trait CertificateSource {
    /// The certificate's DER.
    ///
    /// # Errors
    /// A text for humans.
    fn certificate(&self, kind: CertificateKind, value: &Value) -> Result<Vec<u8>, String>;

    /// The public key, whose name is relative to `pubkey`.
    ///
    /// # Errors
    /// A text for humans.
    fn public_key(&self, value: &Value) -> Result<PublicKey, String>;
}

/// Certificates as VICI carries them: the value is the certificate.
#[derive(Clone, Copy, Debug)]
pub struct InlineCertificates;

impl CertificateSource for InlineCertificates {
    fn certificate(&self, _: CertificateKind, value: &Value) -> Result<Vec<u8>, String> {
        certificate_der(&value.bytes)
    }

    fn public_key(&self, value: &Value) -> Result<PublicKey, String> {
        PublicKey::parse(&value.bytes).map_err(|error| error.to_string())
    }
}

/// What became of a connection.
#[derive(Debug)]
pub struct Outcome {
    /// The connection; `None` if one of the reports is an error.
    pub definition: Option<ConnectionDefinition>,
    /// Findings, in order.
    pub reports: Vec<Report>,
}

/// Reads one connection.
pub fn connection(name: &str, section: &Section, certificates: &dyn CertificateSource) -> Outcome {
    let mut reports = Vec::new();
    let definition = {
        let options = Options::new(format!("connections.{name}"), section, &mut reports);
        read_connection(name, options, certificates)
    };
    let refused = reports.iter().any(|report| report.severity == Severity::Error);
    Outcome { definition: definition.filter(|_| !refused), reports }
}

fn read_connection(
    name: &str,
    mut options: Options<'_, '_>,
    certificates: &dyn CertificateSource,
) -> Option<ConnectionDefinition> {
    if name.is_empty() || name.len() > 255 {
        options.error(options.section.origin.clone(), "a connection's name has 1 to 255 octets");
    }
    match options.number("version", 2) {
        Some(0 | 2) | None => {}
        Some(_) => options.refuse("version", "IKEv1 is not served; write 2"),
    }
    let (local_addrs, local_ranges) = options.addresses("local_addrs");
    let (remote_addrs, remote_ranges) = options.addresses("remote_addrs");
    let local_port = options.port("local_port", 500);
    let remote_port = options.port("remote_port", 500);
    let proposals = options.proposals("proposals", Protocol::IKE);
    let force_encapsulation = options.boolean("encap", false);
    let fragmentation = options.choice(
        "fragmentation",
        Fragmentation::Yes,
        &[
            (&["yes", "true", "enabled", "1"], Fragmentation::Yes),
            (&["accept"], Fragmentation::Accept),
            (&["no", "false", "disabled", "0"], Fragmentation::No),
            (&["force"], Fragmentation::Force),
        ],
    );
    let mobike = options.boolean("mobike", true);
    let send_certreq = options.boolean("send_certreq", true);
    let send_cert = options.choice(
        "send_cert",
        SendCert::IfAsked,
        &[
            (&["ifasked"], SendCert::IfAsked),
            (&["always", "yes", "true", "enabled", "1"], SendCert::Always),
            (&["never", "no", "false", "disabled", "0"], SendCert::Never),
        ],
    );
    let dpd_delay = options.time("dpd_delay").unwrap_or_default();
    let keyingtries = options.number("keyingtries", u32::MAX.into()).map_or(1, narrow_u32);
    let unique = options.choice(
        "unique",
        Unique::No,
        &[
            (&["never"], Unique::Never),
            (&["no", "false", "disabled", "0"], Unique::No),
            (&["keep"], Unique::Keep),
            (&["replace", "yes", "true", "enabled", "1"], Unique::Replace),
        ],
    );
    let childless = options.choice(
        "childless",
        Childless::Allow,
        &[
            (&["allow"], Childless::Allow),
            (&["prefer"], Childless::Prefer),
            (&["force"], Childless::Force),
            (&["never"], Childless::Never),
        ],
    );
    let times = ike_times(&mut options);
    let (tcp, in_tls) = options.choice(
        "tcp",
        (TcpPolicy::Fallback, false),
        &[
            (&["fallback"], (TcpPolicy::Fallback, false)),
            (&["no", "false", "disabled", "0"], (TcpPolicy::No, false)),
            (&["yes", "true", "enabled", "1"], (TcpPolicy::Yes, false)),
            (&["tls"], (TcpPolicy::Yes, true)),
            (&["fallback-tls"], (TcpPolicy::Fallback, true)),
        ],
    );
    let tcp_delay = options.parsed("tcp_delay", values::short_time, "a time such as 2s or 1500ms");
    let tcp_delay = tcp_delay.unwrap_or(DEFAULT_TCP_DELAY);
    let tcp_remote_port = options.port("tcp_remote_port", if in_tls { 443 } else { 4500 });
    let tls_name = options.text("tls_server_name").map(str::to_owned);
    let tcp_proxy = options.parsed("tcp_proxy", proxy, "a host and a port such as proxy.example:3128");
    let tcp_probe_udp = options.time("tcp_probe_udp").unwrap_or(DEFAULT_TCP_PROBE_UDP);
    let tcp_reauth_udp = options.boolean("tcp_reauth_udp", false);
    let redirect_to = options.parsed("redirect_to", Gateway::parse, "an address or a host name");
    let phases: &[(&[&str], RedirectPhase)] = &[(&["auth"], RedirectPhase::Auth), (&["init"], RedirectPhase::Init)];
    let redirect_phase = options.choice("redirect_phase", RedirectPhase::Auth, phases);
    let session_resumption = options.boolean("session_resumption", false);

    let dscp = options.parsed("dscp", code_point, "up to six binary digits such as 101110").unwrap_or(0);

    let vips = virtual_addresses(&mut options);
    let pools = options.texts("pools");
    let split_dns = split_dns(&mut options);
    let ppk_id = options.parsed("ppk_id", |text| IdentityPattern::parse(text).ok(), "an identity");
    let ppk_required = options.boolean("ppk_required", false);
    let ppk_rekey = options.boolean("ppk_rekey", false);
    let [if_id_in, if_id_out] = ["if_id_in", "if_id_out"].map(|option| options.if_id(option));
    let of_connection = [if_id_in, if_id_out].map(|(number, numbering)| match numbering {
        Number::Own => (number, Number::OfIkeSa),
        Number::OwnInDirection => (number, Number::OfIkeSaInDirection),
        Number::Configured | Number::OfIkeSa | Number::OfIkeSaInDirection => (number, numbering),
    });
    options.refuse_unless("mediation", NO, "mediation is not served");
    options.refuse_unless("mediated_by", &[], "mediation is not served");
    options.refuse_unless("mediation_peer", &[], "mediation is not served");
    options.warn_unless("aggressive", NO);
    options.warn_unless("pull", YES);
    options.warn_unless("dpd_timeout", &["0", "0s"]);
    options.warn_unless("ocsp", &["reply", "never"]);

    let name_of_interface = options
        .parsed("xfrm_interface", interface, "the name of an interface (up to 15 octets)")
        .filter(|name| !name.is_empty());
    let xfrm_interface = name_of_interface.and_then(|name| {
        let alike = if_id_in == if_id_out && if_id_in.1 == Number::Configured && if_id_in.0 != 0;
        if !alike {
            options
                .invalid("xfrm_interface", "it needs the same number as the connection's 'if_id_in' and 'if_id_out'");
        }
        alike.then_some((name, if_id_in.0))
    });
    let Children { children, shunts } = children(&mut options, of_connection, xfrm_interface.as_ref());
    let for_shunts_alone = children.is_empty() && !shunts.is_empty();
    let local = local_auth(&mut options, certificates);
    let remote = remote_auth(name, for_shunts_alone, &mut options, certificates);
    for (child, traps) in &children {
        let trapped = traps.start || traps.close || child.dpd_action == DpdAction::Trap;
        if trapped && let Err(reason) = Selectors::of(child, &local_addrs, &remote_addrs) {
            let message = format!("the trap of '{}' cannot be installed: {reason}", child.name);
            options.warning("children", &message);
        }
    }
    let of_children = || children.iter().map(|(child, _)| &child.esp_proposals);
    if ppk_id.is_some() && (has_short_keys(&proposals) || of_children().any(|proposals| has_short_keys(proposals))) {
        options
            .warning("ppk_id", "proposals with keys below 256 bits are no match for a quantum computer (RFC 8784 §6)");
    }
    let of_nobody = remote.as_ref().is_some_and(|entry| entry.class == AuthClass::Null);
    if of_nobody && session_resumption {
        options.invalid("session_resumption", "a ticket would bring back who has proved nothing");
    }
    let as_nobody = local.as_ref().is_some_and(|(_, auth)| auth.class == AuthClass::Null);
    if (of_nobody || as_nobody) && (ppk_id.is_some() || ppk_required) {
        options.invalid("ppk_id", "not with auth = null (RFC 8784 §4)");
    }
    let eap = [local.as_ref().map(|(_, auth)| auth.class), remote.as_ref().map(|entry| entry.class)];
    if let [Some(local), Some(remote)] = eap {
        options.check_eap(local, remote, ppk_id.is_some() || ppk_required, session_resumption);
    }
    let traps = children.iter().map(|(child, traps)| (child.name.clone(), *traps)).collect();
    let children = children.into_iter().map(|(child, _)| child).collect();
    options.finish(&["local", "remote"]);

    let (local_id, local_auth) = local?;
    let remote = remote?;
    let tls = in_tls.then(|| tls_name.unwrap_or_else(|| tls_server_name(&remote_addrs, &remote)));
    let connection = Connection {
        name: name.to_owned(),
        local_addrs: local_ranges,
        remote_addrs: remote_ranges,
        local_port,
        remote_port,
        proposals,
        local_id,
        local_auth,
        remote,
        children,
        fragmentation,
        force_encapsulation,
        mobike,
        send_cert,
        send_certreq,
        dpd_delay,
        rekey_time: times.rekey,
        reauth_time: times.reauth,
        over_time: times.over,
        rand_time: times.rand,
        keyingtries,
        dscp,
        unique,
        ppk_id,
        ppk_required,
        ppk_rekey,
        childless,
        redirect_to: redirect_to.map(|gateway| (gateway, redirect_phase)),
        session_resumption,
        tcp,
        tcp_delay,
        tcp_remote_port,
        tls,
        tcp_proxy,
        tcp_probe_udp,
        tcp_reauth_udp,
        vips,
        pools,
        split_dns,
    };
    Some(ConnectionDefinition {
        connection: Arc::new(connection),
        local_addrs,
        remote_addrs,
        traps,
        shunts,
        if_ids: (if_id_in.0, if_id_out.0),
        xfrm_interface,
    })
}

/// A code point (RFC 2474) as charon reads it: binary, six digits at most.
fn code_point(text: &str) -> Option<u8> {
    let digits = (1..=6).contains(&text.len()) && text.bytes().all(|octet| matches!(octet, b'0' | b'1'));
    digits.then(|| u8::from_str_radix(text, 2).ok()).flatten()
}

fn proxy(text: &str) -> Option<String> {
    let (host, port) = text.rsplit_once(':')?;
    let plain = |host: &str| host.bytes().all(|octet| octet.is_ascii_alphanumeric() || b".-_".contains(&octet));
    let is_host = !host.is_empty() && plain(host) || text.parse::<std::net::SocketAddrV6>().is_ok();
    (is_host && port.parse::<u16>().is_ok_and(|port| port != 0)).then(|| text.to_owned())
}

/// The name that a TLS server must prove, where none is configured: the host name that we go to, what IKE expects it to be,
/// or its address.
fn tls_server_name(remote_addrs: &[String], remote: &PadEntry) -> String {
    let named =
        |text: &&String| text.parse::<IpAddr>().is_err() && !text.starts_with('%') && !text.contains(['/', '-']);
    let of_host = remote_addrs.iter().find(named).cloned();
    let of_identity = || match remote.remote_id.as_exact() {
        Some(Identity::Fqdn(name)) => Some(name.clone()),
        _ => None,
    };
    of_host.or_else(of_identity).or_else(|| remote_addrs.first().cloned()).unwrap_or_default()
}

/// `vips`: addresses to ask for.
fn virtual_addresses(options: &mut Options<'_, '_>) -> Vec<IpAddr> {
    let mut vips = Vec::new();
    for text in options.texts("vips") {
        match text.as_str() {
            "%config" | "%config4" | "%any" | "%any4" => vips.push(Ipv4Addr::UNSPECIFIED.into()),
            "%config6" | "%any6" => vips.push(Ipv6Addr::UNSPECIFIED.into()),
            text => match text.parse::<IpAddr>() {
                Ok(address) if !address.is_multicast() && !address.is_loopback() => vips.push(address),
                _ => options.invalid("vips", &format!("'{text}' is not an address that a host can have")),
            },
        }
    }
    if vips.len() > MAX_VIPS {
        options.invalid("vips", &format!("more than {MAX_VIPS} addresses"));
    }
    vips
}

/// `split_dns` and `dnssec_domains` (RFC 8598 §5, §6).
fn split_dns(options: &mut Options<'_, '_>) -> SplitDns {
    let mut split_dns = SplitDns::default();
    for text in options.texts("split_dns") {
        match domain_name(text.as_bytes()) {
            _ if text == "%any" => split_dns.any = true,
            Some(name) => split_dns.domains.push(name),
            None => options.invalid("split_dns", &format!("'{text}' is not a domain name or %any")),
        }
    }
    for text in options.texts("dnssec_domains") {
        match domain_name(text.as_bytes()) {
            Some(name) if name.contains('.') => split_dns.anchors.push(name),
            // A peer that may replace the keys of a top-level domain, or of the root, may replace everybody's.
            _ => options.invalid("dnssec_domains", &format!("'{text}' is not a domain below a top-level domain")),
        }
    }
    if !split_dns.anchors.is_empty() && !split_dns.any && split_dns.domains.is_empty() {
        options.invalid("dnssec_domains", "it needs 'split_dns'");
    }
    split_dns
}

struct IkeTimes {
    rekey: Duration,
    reauth: Duration,
    over: Duration,
    rand: Duration,
}

fn ike_times(options: &mut Options<'_, '_>) -> IkeTimes {
    let (rekey, reauth) = (options.time("rekey_time"), options.time("reauth_time"));
    let default_rekey = if reauth.is_none() { DEFAULT_IKE_REKEY } else { Duration::ZERO };
    let (rekey, reauth) = (rekey.unwrap_or(default_rekey), reauth.unwrap_or_default());
    let longest = rekey.max(reauth);
    let over = options.time("over_time").unwrap_or(longest / 10);
    // Taking more than half would let SAs be rekeyed twice as often as asked for.
    let rand = options.time("rand_time").unwrap_or(over.min(longest / 2));
    IkeTimes { rekey, reauth, over, rand }
}

/// The one section whose name begins with `kind`; several rounds of authentication (RFC 4739) are refused.
fn auth_section<'s, 'r>(options: &'r mut Options<'s, '_>, kind: &str) -> Option<Options<'s, 'r>> {
    let section = options.section;
    let mut rounds = section.sections().filter(|(name, _)| name.starts_with(kind));
    let first = rounds.next();
    if let Some((name, more)) = rounds.next() {
        let message = format!(
            "invalid section: {name}, config discarded: several rounds of authentication (RFC 4739) are not served"
        );
        options.error(more.origin.clone(), &message);
    }
    let (name, section) = first?;
    Some(Options::new(format!("{}.{name}", options.path), section, options.reports))
}

fn local_auth(
    options: &mut Options<'_, '_>,
    certificates: &dyn CertificateSource,
) -> Option<(Option<Identity>, LocalAuth)> {
    let Some(mut auth) = auth_section(options, "local") else {
        let constraints = SignatureConstraints::default();
        let class = AuthClass::PublicKey;
        let auth = LocalAuth { class, certificates: Vec::new(), public_keys: Vec::new(), constraints, eap_id: None };
        return Some((None, auth));
    };
    auth.known("round");
    for option in ["aaa_id", "xauth_id"] {
        auth.warn_unless(option, &[]);
    }
    let class = auth.auth_class();
    let eap_id = auth.eap_id(class.as_ref().map(|(class, _)| *class), Identity::parse);
    let certs = auth.certificates("certs", "cert", CertificateKind::EndEntity, certificates);
    let public_keys = auth.public_keys(certificates);
    let id = match auth.text("id") {
        None | Some("%any") => None,
        Some(text) => match Identity::parse(text) {
            Ok(id) => Some(id),
            Err(error) => {
                auth.invalid("id", &error.to_string());
                None
            }
        },
    };
    auth.finish(&["cert"]);
    let id = id
        .or_else(|| certs.first().and_then(|certificate| subject(certificate)))
        .or_else(|| public_keys.first().map(PublicKey::identity));
    let (class, constraints) = class?;
    if class != AuthClass::PublicKey && !public_keys.is_empty() {
        auth.invalid("pubkeys", "they are for auth = pubkey");
    }
    let id = if class == AuthClass::Null {
        auth.refuse_with_null(&["id", "certs"], id.is_some_and(|id| id != Identity::Null) || !certs.is_empty());
        Some(Identity::Null)
    } else {
        id
    };
    let eap_id = eap_id.filter(|eap_id| Some(eap_id) != id.as_ref()).map(Box::new);
    Some((id, LocalAuth { class, certificates: certs, public_keys, constraints, eap_id }))
}

fn remote_auth(
    name: &str,
    admits_nobody: bool,
    options: &mut Options<'_, '_>,
    certificates: &dyn CertificateSource,
) -> Option<PadEntry> {
    let mut entry = PadEntry {
        name: name.to_owned(),
        remote_id: IdentityPattern::any(),
        class: AuthClass::PublicKey,
        cacerts: Vec::new(),
        certs: Vec::new(),
        public_keys: Vec::new(),
        constraints: SignatureConstraints::default(),
        revocation: Default::default(),
        eap_id: None,
    };
    let Some(mut auth) = auth_section(options, "remote") else {
        if admits_nobody {
            return Some(entry);
        }
        let message = "no 'remote' section: each peer with a certificate of a loaded CA is admitted";
        options.report(Severity::Warning, options.section.origin.clone(), message);
        return Some(entry);
    };
    auth.known("round");
    auth.refuse_unless("groups", &[], "group membership cannot be checked yet, so this would admit too many");
    auth.refuse_unless("cert_policy", &[], "certificate policies cannot be checked yet, so this would admit too many");
    auth.refuse_unless(
        "ca_id",
        &[],
        "the CA's identity cannot be checked yet, so this would admit too many; use 'cacerts'",
    );
    entry.revocation = auth.choice(
        "revocation",
        Revocation::Relaxed,
        &[(&["relaxed"], Revocation::Relaxed), (&["ifuri"], Revocation::IfUri), (&["strict"], Revocation::Strict)],
    );
    auth.warn_unless("xauth_id", &["%any"]);
    let class = auth.auth_class();
    entry.eap_id = auth.eap_id(class.as_ref().map(|(class, _)| *class), IdentityPattern::parse);
    entry.certs = auth.certificates("certs", "cert", CertificateKind::EndEntity, certificates);
    entry.cacerts = auth.certificates("cacerts", "cacert", CertificateKind::Authority, certificates);
    entry.public_keys = auth.public_keys(certificates);
    if let Some(text) = auth.text("id") {
        match IdentityPattern::parse(text) {
            Ok(pattern) => entry.remote_id = pattern,
            Err(error) => auth.invalid("id", &error.to_string()),
        }
    }
    auth.finish(&["cert", "cacert"]);
    (entry.class, entry.constraints) = class?;
    if let Some(reason) = without_effect(&entry) {
        auth.invalid("pubkeys", reason);
    }
    if entry.class == AuthClass::Null {
        let nobody = IdentityPattern::exact(Identity::Null);
        let named = entry.remote_id != IdentityPattern::any() && entry.remote_id != nobody;
        auth.refuse_with_null(
            &["id", "certs", "cacerts"],
            named || !entry.certs.is_empty() || !entry.cacerts.is_empty(),
        );
        entry.remote_id = nobody;
    }
    Some(entry)
}

/// Why the raw keys of an entry would not do what is written beside them.
fn without_effect(entry: &PadEntry) -> Option<&'static str> {
    if entry.public_keys.is_empty() {
        return None;
    }
    if entry.class != AuthClass::PublicKey {
        return Some("they are for auth = pubkey");
    }
    if entry.remote_id.as_exact().is_none() && entry.remote_id != IdentityPattern::any() {
        return Some(
            "'id' is a pattern: a key proves the one identity that is written here or, without 'id', its own name",
        );
    }
    if entry.certs.is_empty() && !entry.cacerts.is_empty() {
        return Some("no CA vouches for them: write 'cacerts' without them, or in another connection");
    }
    if entry.revocation != Revocation::Relaxed {
        return Some("no CRL is about them, and 'revocation' asks for one");
    }
    None
}

/// What `children` has.
#[derive(Default)]
struct Children {
    /// What is negotiated.
    children: Vec<(Arc<Child>, TrapActions)>,
    /// What is not.
    shunts: Vec<Shunt>,
}

fn children(
    options: &mut Options<'_, '_>,
    if_ids: [(u32, Number); 2],
    xfrm_interface: Option<&(String, u32)>,
) -> Children {
    options.known("children");
    let section = options.section;
    let Some(children) = section.section("children") else {
        if let Some(node) = section.node("children") {
            options.error(node.origin().clone(), "invalid value for: children, config discarded: it is a section");
        }
        return Children::default();
    };
    let mut read = Children::default();
    for (name, node) in &children.entries {
        let path = format!("{}.children.{name}", options.path);
        match node {
            Node::Section(section) => {
                let (mut child, traps, shunt) = child(name, if_ids, Options::new(path, section, options.reports));
                if let Some((name, if_id)) = xfrm_interface
                    && child.options.if_id_out == *if_id
                {
                    child.options.xfrm_interface = Some(name.clone());
                }
                let child = Arc::new(child);
                match shunt {
                    None => read.children.push((child, traps)),
                    Some(action) => {
                        let start = child.start_action != StartAction::None;
                        read.shunts.push(Shunt { child, action, start });
                    }
                }
            }
            other => {
                let message = format!("unknown option: {name}, config discarded: 'children' has sections only");
                options.error(other.origin().clone(), &message);
            }
        }
    }
    read
}

fn child(
    name: &str,
    if_ids: [(u32, Number); 2],
    mut options: Options<'_, '_>,
) -> (Child, TrapActions, Option<ShuntAction>) {
    if name.is_empty() || name.len() > 200 {
        options.error(options.section.origin.clone(), "a child's name has 1 to 200 octets");
    }
    let rekey_time = options.time("rekey_time").unwrap_or(DEFAULT_CHILD_REKEY);
    let life_time = options.time("life_time").unwrap_or(rekey_time + rekey_time / 10);
    let rand_time = options.time("rand_time").unwrap_or(life_time.saturating_sub(rekey_time));
    if !life_time.is_zero() && !rekey_time.is_zero() && life_time <= rekey_time {
        options.warning("life_time", "life_time is not longer than rekey_time: the SA ends before it is rekeyed");
    }
    let (soft_bytes, hard_bytes) = options.volumes("rekey_bytes", "life_bytes", values::size);
    let (soft_packets, hard_packets) = options.volumes("rekey_packets", "life_packets", values::number);
    let between = |soft: Option<u64>, hard: Option<u64>| hard.unwrap_or(0).saturating_sub(soft.unwrap_or(0));
    let rand_bytes = options.parsed("rand_bytes", values::size, "a size").unwrap_or(between(soft_bytes, hard_bytes));
    let rand_packets =
        options.parsed("rand_packets", values::number, "a number").unwrap_or(between(soft_packets, hard_packets));
    let (mode, shunt) = options.choice(
        "mode",
        (Mode::Tunnel, None),
        &[
            (&["tunnel"], (Mode::Tunnel, None)),
            (&["transport"], (Mode::Transport, None)),
            (&["pass"], (Mode::Tunnel, Some(ShuntAction::Pass))),
            (&["drop"], (Mode::Tunnel, Some(ShuntAction::Drop))),
        ],
    );
    let actions: &[(&[&str], (StartAction, bool))] = &[
        (&["none", "clear"], (StartAction::None, false)),
        (&["trap", "route"], (StartAction::Trap, true)),
        (&["start", "restart"], (StartAction::Start, false)),
        (&["trap|start", "start|trap"], (StartAction::Start, true)),
    ];
    let (start_action, trap_at_start) = options.choice("start_action", (StartAction::None, false), actions);
    let (close_action, trap_at_close) = options.choice("close_action", (StartAction::None, false), actions);
    let (kernel_options, numbering) = kernel_options(&mut options, if_ids);
    if shunt.is_some() && numbering.gives_any() {
        options.invalid("mode", "%unique is for SAs, and a shunt has none");
    }
    let read = Child {
        name: name.to_owned(),
        local_ts: options.selectors("local_ts"),
        remote_ts: options.selectors("remote_ts"),
        esp_proposals: options.proposals("esp_proposals", Protocol::ESP),
        mode,
        rekey_time,
        life_time,
        rand_time,
        lifetime: Lifetime { soft_bytes, hard_bytes, soft_packets, hard_packets },
        rand_bytes,
        rand_packets,
        replay_window: options.number("replay_window", MAX_REPLAY_WINDOW).map_or(32, narrow_u32),
        start_action,
        close_action,
        dpd_action: options.choice(
            "dpd_action",
            DpdAction::Clear,
            &[
                (&["clear", "none"], DpdAction::Clear),
                (&["trap", "route"], DpdAction::Trap),
                (&["restart", "start"], DpdAction::Restart),
            ],
        ),
        reqid: options.number("reqid", (RESERVED_REQID - 1).into()).map_or(0, narrow_u32),
        copy_df: options.boolean("copy_df", true),
        copy_ecn: options.boolean("copy_ecn", true),
        tfc_padding: options.parsed("tfc_padding", tfc_padding, "mtu or a number of octets").unwrap_or_default(),
        inactivity: options.time("inactivity").unwrap_or_default(),
        options: kernel_options,
        numbering,
        updown: options.text("updown").filter(|text| !text.is_empty()).map(str::to_owned),
    };

    options.refuse_unless("ah_proposals", &[], "AH is not served; use 'esp_proposals'");
    options.refuse_unless("sha256_96", NO, "the truncation to 96 bits is not served");
    options.refuse_unless("policies", YES, "SAs without policies are not served yet");
    options.refuse_unless("label", &[], "security labels are not served yet");
    options.warn_unless("hostaccess", NO);
    options.warn_unless("ipcomp", NO);
    options.warn_unless("label_mode", &["system"]);
    options.warn_unless("per_cpu_sas", NO);
    options.warn_unless("icmp", NO);
    options.finish(&[]);
    (read, TrapActions { start: trap_at_start, close: trap_at_close }, shunt)
}

/// What is for the kernel's plane alone. Which plane there will be is not known here: the other one refuses what it lacks.
fn kernel_options(options: &mut Options<'_, '_>, if_ids: [(u32, Number); 2]) -> (KernelOptions, Numbering) {
    let mut mark = |option| options.parsed(option, values::numbered_mark, MARK).unwrap_or_default();
    let [(mark_in, number_in), (mark_out, number_out)] = ["mark_in", "mark_out"].map(&mut mark);
    let mut set_mark = |option| options.parsed(option, values::set_mark, SET_MARK).unwrap_or_default();
    let [(set_mark_in, same_in), (set_mark_out, same_out)] = ["set_mark_in", "set_mark_out"].map(&mut set_mark);
    // 0 is the connection's.
    let mut if_id = |option, of_connection| {
        Some(options.if_id(option)).filter(|own| *own != Default::default()).unwrap_or(of_connection)
    };
    let [of_connection_in, of_connection_out] = if_ids;
    let (if_id_in, if_number_in) = if_id("if_id_in", of_connection_in);
    let (if_id_out, if_number_out) = if_id("if_id_out", of_connection_out);
    let numbering = Numbering {
        mark_in: number_in,
        mark_out: number_out,
        if_id_in: if_number_in,
        if_id_out: if_number_out,
        set_mark_in_same: same_in,
        set_mark_out_same: same_out,
    };
    let read = KernelOptions {
        mark_in,
        mark_out,
        set_mark_in,
        set_mark_out,
        if_id_in,
        if_id_out,
        priority: options.number("priority", u32::MAX.into()).map_or(0, narrow_u32),
        mark_in_sa: options.boolean("mark_in_sa", false),
        policies_fwd_out: options.boolean("policies_fwd_out", false),
        interface: options.parsed("interface", interface, "a name").filter(|name| !name.is_empty()),
        // The connection's.
        xfrm_interface: None,
        offload: options.choice(
            "hw_offload",
            Offload::No,
            &[
                (&["no", "0", "false"], Offload::No),
                (&["crypto", "yes", "1", "true"], Offload::Crypto),
                (&["packet"], Offload::Packet),
                (&["auto"], Offload::Auto),
            ],
        ),
        copy_dscp: options.choice(
            "copy_dscp",
            CopyDscp::Out,
            &[
                (&["out"], CopyDscp::Out),
                (&["in"], CopyDscp::In),
                (&["yes", "1", "true"], CopyDscp::Both),
                (&["no", "0", "false"], CopyDscp::No),
            ],
        ),
    };
    (read, numbering)
}

/// A name of a network interface: IFNAMSIZ is 16 with the final NUL.
fn interface(name: &str) -> Option<String> {
    let forbidden = |character: char| character.is_whitespace() || matches!(character, '/' | ':');
    (name.len() < 16 && !name.contains(forbidden) && !matches!(name, "." | "..")).then(|| name.to_owned())
}

const MARK: &str = "a mark (value or value/mask; the value may be %unique or %unique-dir)";
const SET_MARK: &str = "a mark (value or value/mask; the value may be %same)";

/// `tfc_padding`.
fn tfc_padding(text: &str) -> Option<TfcPadding> {
    match text {
        "mtu" => Some(TfcPadding::Mtu),
        _ => match u16::try_from(values::number(text)?).ok()? {
            0 => Some(TfcPadding::None),
            length => Some(TfcPadding::To(length)),
        },
    }
}

const NO: &[&str] = &["no", "false", "disabled", "0"];
const YES: &[&str] = &["yes", "true", "enabled", "1"];

/// For numbers whose limit has been checked.
fn narrow_u32(number: u64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// A section being read: knows which of its names have been asked for, and collects reports.
struct Options<'s, 'r> {
    path: String,
    section: &'s Section,
    asked: HashSet<String>,
    reports: &'r mut Vec<Report>,
}

impl<'s, 'r> Options<'s, 'r> {
    fn new(path: String, section: &'s Section, reports: &'r mut Vec<Report>) -> Self {
        Self { path, section, asked: HashSet::new(), reports }
    }

    fn report(&mut self, severity: Severity, origin: Origin, message: &str) {
        let report = Report { severity, origin: Some(origin), subject: self.path.clone(), message: message.to_owned() };
        self.reports.push(report);
    }

    fn error(&mut self, origin: Origin, message: &str) {
        self.report(Severity::Error, origin, message);
    }

    fn origin_of(&self, option: &str) -> Origin {
        self.section.node(option).map_or(&self.section.origin, Node::origin).clone()
    }

    fn warning(&mut self, option: &str, message: &str) {
        self.report(Severity::Warning, self.origin_of(option), message);
    }

    /// Refuses a value in charon's words, with a reason.
    fn invalid(&mut self, option: &str, reason: &str) {
        let message = format!("invalid value for: {option}, config discarded: {reason}");
        self.error(self.origin_of(option), &message);
    }

    fn refuse(&mut self, option: &str, reason: &str) {
        self.invalid(option, reason);
    }

    fn known(&mut self, option: &str) {
        self.asked.insert(option.to_owned());
    }

    fn text(&mut self, option: &str) -> Option<&'s str> {
        self.known(option);
        match self.section.node(option)? {
            Node::Value(value) => {
                let text = value.text();
                if text.is_none() {
                    self.invalid(option, "it is not text");
                }
                text
            }
            Node::List(..) | Node::Section(_) => {
                self.invalid(option, "one value is expected");
                None
            }
        }
    }

    /// The items of a list as text: of a VICI list, or of a value with commas.
    fn texts(&mut self, option: &str) -> Vec<String> {
        self.known(option);
        if self.section.section(option).is_some() {
            self.invalid(option, "a list is expected");
            return Vec::new();
        }
        let mut texts = Vec::new();
        for item in self.section.list(option) {
            match item.text().map(str::trim) {
                Some("") => {}
                Some(text) => texts.push(text.to_owned()),
                None => self.invalid(option, "it is not text"),
            }
        }
        texts
    }

    fn parsed<T>(&mut self, option: &str, parse: impl Fn(&str) -> Option<T>, expected: &str) -> Option<T> {
        let text = self.text(option)?;
        let parsed = parse(text);
        if parsed.is_none() {
            self.invalid(option, &format!("'{text}' is not {expected}"));
        }
        parsed
    }

    fn boolean(&mut self, option: &str, default: bool) -> bool {
        self.parsed(option, values::boolean, "yes or no").unwrap_or(default)
    }

    fn number(&mut self, option: &str, largest: u64) -> Option<u64> {
        let parse = |text: &str| values::number(text).filter(|number| *number <= largest);
        self.parsed(option, parse, &format!("a number from 0 to {largest}"))
    }

    fn if_id(&mut self, option: &str) -> (u32, Number) {
        self.parsed(option, values::if_id, "a number, %unique or %unique-dir").unwrap_or_default()
    }

    fn port(&mut self, option: &str, default: u16) -> u16 {
        let parse =
            |text: &str| values::number(text).and_then(|port| u16::try_from(port).ok()).filter(|port| *port > 0);
        self.parsed(option, parse, "a port from 1 to 65535").unwrap_or(default)
    }

    fn time(&mut self, option: &str) -> Option<Duration> {
        self.parsed(option, values::time, "a time such as 30s, 5m, 4h or 1d, up to 136 years")
    }

    fn choice<T: Copy>(&mut self, option: &str, default: T, choices: &[(&[&str], T)]) -> T {
        let parse = |text: &str| {
            let text = text.to_ascii_lowercase();
            choices.iter().find(|(names, _)| names.contains(&text.as_str())).map(|(_, choice)| *choice)
        };
        let names: Vec<&str> = choices.iter().filter_map(|(names, _)| names.first().copied()).collect();
        self.parsed(option, parse, &format!("served; one of: {}", names.join(", "))).unwrap_or(default)
    }

    /// A soft and a hard limit by volume; the hard one is 10 % above the soft one by default.
    fn volumes(&mut self, soft: &str, hard: &str, parse: impl Fn(&str) -> Option<u64>) -> (Option<u64>, Option<u64>) {
        let soft = self.parsed(soft, &parse, "a size").filter(|limit| *limit > 0);
        let given = self.parsed(hard, &parse, "a size");
        let hard = given.or_else(|| soft.map(|limit| limit.saturating_add(limit / 10)));
        (soft, hard.filter(|limit| *limit > 0))
    }

    /// Addresses as written and as ranges; `%any` among them, or nothing, gives no ranges.
    fn addresses(&mut self, option: &str) -> (Vec<String>, Vec<AddressRange>) {
        let texts = self.texts(option);
        let mut ranges = Vec::new();
        let mut any = false;
        for text in &texts {
            match values::address(text) {
                Some(Address::Any) => any = true,
                Some(Address::Range(range)) => ranges.push(range),
                Some(Address::Name(_)) => {}
                None => self.invalid(option, &format!("'{text}' is not an address, network, range or host name")),
            }
        }
        if any {
            ranges.clear();
        } else if ranges.is_empty() && !texts.is_empty() {
            let message = "host names are looked up to initiate only: as to them, peers may come from any address";
            self.warning(option, message);
        }
        (texts, ranges)
    }

    fn selectors(&mut self, option: &str) -> Vec<ConfiguredSelector> {
        let texts = self.texts(option);
        let mut selectors = Vec::with_capacity(texts.len());
        for text in &texts {
            match values::selector(text) {
                Some(selector) => selectors.push(selector),
                None => {
                    let reason = format!("'{text}' is not a traffic selector such as 10.0.0.0/8[tcp/80] or dynamic");
                    self.invalid(option, &reason);
                }
            }
        }
        if texts.is_empty() {
            selectors.push(ConfiguredSelector::Dynamic { protocol: 0, start_port: 0, end_port: u16::MAX });
        }
        // RFC 7296 §3.13: the number of selectors is one octet.
        if selectors.len() > 255 {
            self.invalid(option, "more than 255 selectors");
        }
        selectors
    }

    fn proposals(&mut self, option: &str, protocol: Protocol) -> Vec<Proposal> {
        let mut texts = self.texts(option);
        if texts.is_empty() {
            texts.push("default".to_owned());
        }
        let mut proposals = Vec::new();
        for text in &texts {
            match parse_proposals(text, protocol) {
                Ok(parsed) => proposals.extend(parsed),
                Err(error) => self.invalid(option, &error.to_string()),
            }
        }
        for warning in ike::crypto::warnings(&proposals) {
            self.warning(option, warning);
        }
        for (at, proposal) in proposals.iter_mut().enumerate() {
            match u8::try_from(at + 1) {
                Ok(number) => proposal.number = number,
                Err(_) => {
                    self.invalid(option, "more than 255 proposals");
                    break;
                }
            }
        }
        proposals
    }

    /// Who proves nothing says nothing either (RFC 7619 §2.2).
    fn refuse_with_null(&mut self, options: &[&str], given: bool) {
        if given {
            let options = options.join("', '");
            self.invalid("auth", &format!("with null there is no '{options}': nobody is named or vouched for"));
        }
    }

    /// `auth`: the kind of proof, and for signatures what is asked of them.
    fn auth_class(&mut self) -> Option<(AuthClass, SignatureConstraints)> {
        match self.text("auth") {
            None => Some((AuthClass::PublicKey, SignatureConstraints::default())),
            Some("psk") => Some((AuthClass::SharedKey, SignatureConstraints::default())),
            Some("null") => Some((AuthClass::Null, SignatureConstraints::default())),
            Some("eap" | "eap-mschapv2" | "eap-dynamic") => {
                Some((AuthClass::Eap(EapMethod::MsChapV2), SignatureConstraints::default()))
            }
            Some(text) if text.starts_with("eap") => {
                self.invalid("auth", "of EAP only eap-mschapv2 is served");
                None
            }
            Some(text) if text.starts_with("xauth") => {
                self.invalid("auth", "XAuth is of IKEv1, which is not served");
                None
            }
            Some(text) => match SignatureConstraints::parse(text) {
                Ok(constraints) => Some((AuthClass::PublicKey, constraints)),
                Err(error) => {
                    self.invalid("auth", &error.to_string());
                    None
                }
            },
        }
    }

    /// `eap_id`, which says nothing without EAP.
    fn eap_id<T>(&mut self, class: Option<AuthClass>, parse: fn(&str) -> Result<T, IdentityError>) -> Option<T> {
        if !matches!(class, Some(AuthClass::Eap(_))) {
            self.warn_unless("eap_id", &["%any"]);
            return None;
        }
        match parse(self.text("eap_id")?) {
            Ok(id) => Some(id),
            Err(error) => {
                self.invalid("eap_id", &error.to_string());
                None
            }
        }
    }

    /// What goes together with EAP.
    fn check_eap(&mut self, local: AuthClass, remote: AuthClass, has_ppk: bool, resumes: bool) {
        let by_eap = |class| matches!(class, AuthClass::Eap(_));
        if by_eap(local) && remote != AuthClass::PublicKey {
            self.invalid("remote", "EAP is for a gateway that proves itself by a certificate (RFC 7296 §2.16)");
        }
        if by_eap(remote) && local != AuthClass::PublicKey {
            self.invalid("local", "EAP is for peers to whom we prove ourselves by a certificate (RFC 7296 §2.16)");
        }
        if (by_eap(local) || by_eap(remote)) && has_ppk {
            self.invalid("ppk_id", "a PPK together with EAP is not served");
        }
        if by_eap(remote) && resumes {
            self.invalid("session_resumption", "what EAP proved is not resumed");
        }
    }

    /// Certificates of a list such as `certs`, and of sections such as `cert1 { file = … }`.
    fn certificates(
        &mut self,
        list: &str,
        section_prefix: &str,
        kind: CertificateKind,
        source: &dyn CertificateSource,
    ) -> Vec<Vec<u8>> {
        let mut certificates = Vec::new();
        for item in &self.blobs(list) {
            match source.certificate(kind, item) {
                Ok(certificate) if kind == CertificateKind::Authority && !is_authority(&certificate) => {
                    self.invalid(list, "certificate without CA flag, rejected");
                }
                Ok(certificate) => certificates.push(certificate),
                Err(reason) => self.invalid(list, &reason),
            }
        }
        let section = self.section;
        for (name, inner) in section.sections().filter(|(name, _)| name.starts_with(section_prefix)) {
            let mut inner = Options::new(format!("{}.{name}", self.path), inner, self.reports);
            for option in ["handle", "slot", "module"] {
                inner.refuse_unless(option, &[], "certificates on tokens are not served yet");
            }
            match inner.text("file").map(|file| read_certificate(Path::new(file))) {
                Some(Ok(certificate)) if kind == CertificateKind::Authority && !is_authority(&certificate) => {
                    inner.invalid("file", "certificate without CA flag, rejected");
                }
                Some(Ok(certificate)) => certificates.push(certificate),
                Some(Err(reason)) => inner.invalid("file", &reason),
                None => inner.error(inner.section.origin.clone(), "a certificate without 'file', config discarded"),
            }
            inner.finish(&[]);
        }
        certificates
    }

    /// `pubkeys`.
    fn public_keys(&mut self, source: &dyn CertificateSource) -> Vec<PublicKey> {
        let mut keys = Vec::new();
        for item in self.blobs("pubkeys") {
            match source.public_key(&item) {
                Ok(key) if keys.contains(&key) => {}
                Ok(key) => keys.push(key),
                Err(reason) => self.invalid("pubkeys", &reason),
            }
        }
        if keys.len() > MAX_PUBLIC_KEYS {
            self.invalid("pubkeys", &format!("more than {MAX_PUBLIC_KEYS} keys of one peer"));
        }
        keys
    }

    /// The items of a list of certificates or keys: names in a file, octets by VICI.
    fn blobs(&mut self, list: &str) -> Vec<Value> {
        self.known(list);
        match self.section.node(list) {
            Some(Node::List(items, _)) => items.clone(),
            // DER has commas: only a file's value is split.
            Some(Node::Value(value)) if matches!(value.origin, Origin::File { .. }) => value.parts(),
            Some(Node::Value(value)) => vec![value.clone()],
            Some(Node::Section(section)) => {
                self.error(section.origin.clone(), &format!("invalid section: {list}, config discarded"));
                Vec::new()
            }
            None => Vec::new(),
        }
    }

    /// For what we know and do not serve, where ignoring it would weaken the protection or break the setup.
    fn refuse_unless(&mut self, option: &str, harmless: &[&str], reason: &str) {
        if !self.is_harmless(option, harmless) {
            self.invalid(option, reason);
        }
    }

    /// For what we know and do not serve, where ignoring it is bearable.
    fn warn_unless(&mut self, option: &str, harmless: &[&str]) {
        if !self.is_harmless(option, harmless) {
            self.warning(option, &format!("{option} is known but not served yet, ignored"));
        }
    }

    fn is_harmless(&mut self, option: &str, harmless: &[&str]) -> bool {
        self.known(option);
        match self.section.node(option) {
            None => true,
            Some(Node::List(items, _)) => items.iter().all(|item| item.bytes.is_empty()),
            Some(Node::Section(_)) => false,
            Some(Node::Value(value)) => {
                let text = value.text().map(|text| text.trim().to_ascii_lowercase());
                text.is_some_and(|text| text.is_empty() || harmless.contains(&text.as_str()))
            }
        }
    }

    /// Refuses what nobody asked for; sections may begin with one of `prefixes`.
    fn finish(&mut self, prefixes: &[&str]) {
        let section = self.section;
        for (name, node) in &section.entries {
            if self.asked.contains(name) {
                continue;
            }
            match node {
                Node::Section(_) if prefixes.iter().any(|prefix| name.starts_with(prefix)) => {}
                Node::Section(inner) => {
                    self.error(inner.origin.clone(), &format!("invalid section: {name}, config discarded"));
                }
                other => {
                    self.error(other.origin().clone(), &format!("unknown option: {name}, config discarded"));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use ipsec::plane::Mark;

    use super::*;
    use crate::config::settings;

    struct NoFiles;

    impl CertificateSource for NoFiles {
        fn certificate(&self, _: CertificateKind, value: &Value) -> Result<Vec<u8>, String> {
            Err(format!("{}: there is no such file", value.text().unwrap_or_default()))
        }

        fn public_key(&self, value: &Value) -> Result<PublicKey, String> {
            Err(format!("{}: there is no such file", value.text().unwrap_or_default()))
        }
    }

    fn read(text: &str) -> Outcome {
        let section = settings::parse(Path::new("swanctl.conf"), text.as_bytes()).unwrap().root;
        connection("gw", &section, &NoFiles)
    }

    fn read_good(text: &str) -> Arc<Connection> {
        read_definition(text).connection
    }

    fn read_definition(text: &str) -> ConnectionDefinition {
        let outcome = read(text);
        assert!(outcome.reports.is_empty(), "{text}: {:?}", outcome.reports);
        outcome.definition.unwrap()
    }

    fn refusal(text: &str) -> String {
        let outcome = read(text);
        assert!(outcome.definition.is_none(), "{text}");
        outcome.reports.iter().find(|report| report.severity == Severity::Error).unwrap().to_string()
    }

    // RFC 8784 §6
    #[test]
    fn a_ppk_beside_short_keys_is_warned_of() {
        let warned = |text: &str| read(text).reports.iter().any(|report| report.message.contains("RFC 8784 §6"));
        let children = "children { a { esp_proposals = aes256gcm16 } }";
        let strong = "remote { }\n proposals = aes256gcm16-prfsha384-ecp384\n";
        assert!(!warned(&format!("{strong} {children}\n ppk_id = moon")));
        assert!(warned(&format!("{strong} children {{ a {{ esp_proposals = aes128gcm16 }} }}\n ppk_id = moon")));
        assert!(warned(&format!(
            "remote {{ }}\n proposals = aes128gcm16-prfsha256-x25519\n {children}\n ppk_id = moon"
        )));
        assert!(!warned("remote { }"));
    }

    #[test]
    fn unknown_options_are_refused_with_their_place() {
        assert_eq!(
            refusal("remote { }\n remot_addrs = 1"),
            "swanctl.conf:2:2: connections.gw: unknown option: remot_addrs, config discarded"
        );
        assert!(refusal("remote {\n idd = x }").contains("2:2: connections.gw.remote: unknown option: idd"));
        assert!(refusal("remote { }\n children { a { startaction = x } }").contains("children.a: unknown option"));
        assert!(refusal("remote { }\n children { a = b }").contains("unknown option: a"));
        assert!(refusal("remote { }\n other { }").contains("invalid section: other, config discarded"));
        assert!(refusal("remote { x { } }").contains("invalid section: x, config discarded"));
    }

    #[test]
    fn invalid_values_are_refused() {
        for option in [
            "rekey_time = soon",
            "rekey_time = 1w",
            "dpd_delay = -3",
            "encap = maybe",
            "unique = once",
            "dscp = 46",
            "dscp = 1011100",
            "dscp = \"\"",
            "version = 3",
            "local_port = 0",
            "remote_port = 65536",
            "keyingtries = %x",
            "proposals = aes128-nosuch",
            "remote_addrs = 192.0.2.300",
            "remote_addrs = a b",
            "send_cert = perhaps",
            "vips = nonsense",
            "vips = 127.0.0.1",
            "vips = 224.0.0.1",
            "split_dns = a..b",
            "dnssec_domains = com",
            "dnssec_domains = a.test",
            "fragmentation = sometimes",
            "tcp = maybe",
            "redirect_to = a gateway",
            "redirect_phase = later",
            "local { id = \"C=,,=\" }",
            "local { certs = me.pem }",
        ] {
            let name = option.split([' ', '{']).next().unwrap();
            let message = refusal(&format!("remote {{ }}\n{option}"));
            let inner = if name == "local" { "" } else { name };
            assert!(message.contains(&format!("invalid value for: {inner}")), "{option}: {message}");
        }
        for option in [
            "local_ts = 10.0.0.0/99",
            "rekey_bytes = lots",
            "mode = sideways",
            "start_action = now",
            "esp_proposals = aes",
            "replay_window = 99999",
            "copy_df = 2",
            "reqid = x",
            "reqid = 4294967295",
            "tfc_padding = most",
            "tfc_padding = 65536",
            "inactivity = soon",
        ] {
            let message = refusal(&format!("remote {{ }}\nchildren {{ c {{ {option} }} }}"));
            assert!(message.contains("invalid value for: "), "{option}: {message}");
        }
    }

    /// Keys instead of files: `k0`, `k1` and so on.
    struct Keys(Vec<PublicKey>);

    impl CertificateSource for Keys {
        fn certificate(&self, _: CertificateKind, value: &Value) -> Result<Vec<u8>, String> {
            Ok(value.bytes.clone())
        }

        fn public_key(&self, value: &Value) -> Result<PublicKey, String> {
            let number = value.text().and_then(|text| text.strip_prefix('k')?.parse::<usize>().ok());
            number.and_then(|number| self.0.get(number).cloned()).ok_or_else(|| "there is no such file".to_owned())
        }
    }

    // RFC 7670 §4.
    #[test]
    fn raw_keys_are_for_one_identity_or_their_own_names() {
        let key = |number: u8| {
            let der = [&[0x30, 42, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 3, 33, 0, number][..], &[1; 31]].concat();
            PublicKey::parse(&der)
        };
        // Of arbitrary octets not all are points.
        let keys = Keys((0..=255).filter_map(|number| key(number).ok()).take(17).collect());
        assert_eq!(keys.0.len(), 17);
        let read = |text: &str| {
            let section = settings::parse(Path::new("swanctl.conf"), text.as_bytes()).unwrap().root;
            connection("gw", &section, &keys)
        };
        let all: Vec<String> = (0..17).map(|number| format!("k{number}")).collect();
        for (text, reason) in [
            ("local { pubkeys = x }\nremote { }", "pubkeys, config discarded: there is no such file"),
            ("local { auth = psk\npubkeys = k0 }\nremote { }", "they are for auth = pubkey"),
            ("local { auth = null\npubkeys = k0 }\nremote { }", "they are for auth = pubkey"),
            ("remote { auth = psk\npubkeys = k0 }", "they are for auth = pubkey"),
            ("remote { id = *.example.org\npubkeys = k0 }", "'id' is a pattern"),
            ("remote { revocation = strict\npubkeys = k0 }", "no CRL is about them"),
            ("remote { revocation = ifuri\npubkeys = k0 }", "no CRL is about them"),
            (&format!("remote {{ pubkeys = {} }}", all.join(", ")), "more than 16 keys"),
            ("remote { pubkeys { } }", "invalid section: pubkeys"),
        ] {
            let outcome = read(text);
            let error = outcome.reports.iter().find(|report| report.severity == Severity::Error).unwrap().to_string();
            assert!(outcome.definition.is_none() && error.contains(reason), "{text}: {error}");
        }
        let good = read("local { pubkeys = k0 }\nremote { id = b.example\npubkeys = k1, k2, k1 }").definition.unwrap();
        let connection = good.connection;
        assert_eq!(connection.local_id, Some(keys.0[0].identity()));
        assert_eq!(connection.local_auth.public_keys, keys.0[..1]);
        assert_eq!(connection.remote.public_keys, keys.0[1..3]);
        assert!(connection.remote.takes_raw_keys() && !connection.remote.takes_certificates());
        let named = read("local { id = a.example\npubkeys = k0 }\nremote { pubkeys = k1 }").definition.unwrap();
        assert_eq!(named.connection.local_id, Identity::parse("a.example").ok());
        assert_eq!(named.connection.remote.remote_id, IdentityPattern::any());
    }

    #[test]
    fn what_would_weaken_the_protection_if_ignored_is_refused() {
        for option in [
            "version = 1",
            "if_id_in = %same",
            "xfrm_interface = ipsec0",
            "if_id_in = 3\n if_id_out = 4\n xfrm_interface = ipsec0",
            "if_id_in = %unique\n if_id_out = %unique\n xfrm_interface = ipsec0",
            "if_id_in = 3\n if_id_out = 3\n xfrm_interface = a/b",
            "mediation = yes",
            "local { auth = eap-md5 }",
            "local { pubkeys = x }",
            "local { cert1 { handle = 12 } }",
            "local { auth = eap-gtc }",
            "local-2 { auth = psk }\n local-3 { auth = eap }",
        ] {
            let message = refusal(&format!("remote {{ }}\n{option}"));
            assert!(message.contains("config discarded"), "{option}: {message}");
        }
        for option in [
            "revocation = never",
            "groups = admins",
            "cert_policy = 1.2.3",
            "ca_id = x",
            "pubkeys = k",
            "auth = eap-tls",
            "auth = xauth",
            "auth = pubkey-sha1",
            "auth = rsa-4096-sha265",
            "auth = bliss-128",
            "auth = any",
        ] {
            let message = refusal(&format!("remote {{ {option} }}"));
            let name = option.split(' ').next().unwrap();
            assert!(message.contains(&format!("invalid value for: {name}, config discarded")), "{option}: {message}");
        }
        for option in [
            "mode = beet",
            "ah_proposals = sha256",
            "sha256_96 = yes",
            "policies = no",
            "interface = more-than-15-octets",
            "label = x",
            "hw_offload = some",
            "mark_in = %same",
            "mark_in = %unique/0",
            "mark_out = 3/1",
            "set_mark_out = %unique",
            "mark_in_sa = perhaps",
            "if_id_out = %unique/1",
            "copy_dscp = up",
            "start_action = trap|none",
        ] {
            let message = refusal(&format!("remote {{ }}\nchildren {{ c {{ {option} }} }}"));
            let name = option.split(' ').next().unwrap();
            assert!(message.contains(&format!("invalid value for: {name}, config discarded")), "{option}: {message}");
        }
    }

    // strongSwan's swanctl.conf: mark_in, set_mark_in, if_id_in.
    #[test]
    fn numbers_of_one_s_own_are_read_at_either_level() {
        let connection = read_good(
            "remote { }\nif_id_in = 7\nif_id_out = %unique\nchildren {
             a { mark_in = %unique/0xff\n mark_out = %unique-dir\n set_mark_in = %same/0xf\n set_mark_out = %same }
             b { if_id_in = %unique-dir\n if_id_out = 9 } }",
        );
        let [a, b] = &connection.children[..] else { panic!("two children") };
        let of_mask = |mask| Mark { value: 0, mask };
        assert_eq!((a.options.mark_in, a.options.mark_out), (of_mask(0xff), of_mask(u32::MAX)));
        assert_eq!((a.options.set_mark_in, a.options.set_mark_out), (of_mask(0xf), of_mask(u32::MAX)));
        assert_eq!((a.options.if_id_in, a.options.if_id_out), (7, 0));
        let numbering = Numbering {
            mark_in: Number::Own,
            mark_out: Number::OwnInDirection,
            if_id_in: Number::Configured,
            if_id_out: Number::OfIkeSa,
            set_mark_in_same: true,
            set_mark_out_same: true,
        };
        assert_eq!(a.numbering, numbering);
        assert_eq!((b.options.if_id_in, b.options.if_id_out), (0, 9));
        assert_eq!(b.numbering, Numbering { if_id_in: Number::OwnInDirection, ..Numbering::default() });
        // Which packet would a trap or a shunt wait for, when nobody knows the number?
        let message = refusal("remote { }\nchildren { c { mode = drop\n mark_out = %unique } }");
        assert!(message.contains("a shunt has none"), "{message}");
        assert!(Selectors::of(a, &[], &[]).unwrap_err().contains("%unique"));
    }

    #[test]
    fn an_interface_is_for_the_children_with_the_connection_s_number() {
        let definition = read_definition(
            "remote { }\nif_id_in = 3\nif_id_out = 0x3\nxfrm_interface = ipsec0\nchildren { a { }\n b { if_id_out = 4 } }",
        );
        assert_eq!(definition.xfrm_interface, Some(("ipsec0".to_owned(), 3)));
        let [a, b] = &definition.connection.children[..] else { panic!("two children") };
        assert_eq!((a.options.if_id_in, a.options.xfrm_interface.as_deref()), (3, Some("ipsec0")));
        assert_eq!((b.options.if_id_in, b.options.xfrm_interface.as_deref()), (3, None));
    }

    #[test]
    fn what_is_for_the_kernel_s_plane_is_read() {
        let connection = read_good(
            "remote { }\nchildren { c { mark_in = 42\n mark_out = 0x10/0xf0\n mark_in_sa = yes\n set_mark_in = 1/3
             set_mark_out = 0\n if_id_in = 5\n if_id_out = 0x6\n priority = 7\n interface = eth0\n hw_offload = yes
             copy_dscp = yes\n policies_fwd_out = yes } }",
        );
        let mark = |value, mask| Mark { value, mask };
        let expected = KernelOptions {
            mark_in: mark(42, u32::MAX),
            mark_out: mark(0x10, 0xf0),
            mark_in_sa: true,
            set_mark_in: mark(1, 3),
            set_mark_out: Mark::default(),
            if_id_in: 5,
            if_id_out: 6,
            priority: 7,
            policies_fwd_out: true,
            interface: Some("eth0".to_owned()),
            xfrm_interface: None,
            offload: Offload::Crypto,
            copy_dscp: CopyDscp::Both,
        };
        assert_eq!(connection.children[0].options, expected);
        assert_eq!(expected.demanded(), Some("mark_in"));
        let only = |options: &str| read_good(&format!("remote {{ }}\nchildren {{ c {{ {options} }} }}"));
        let bearable = only("priority = 7\n copy_dscp = no\n hw_offload = auto");
        assert_eq!(bearable.children[0].options.demanded(), None);
        assert_eq!(only("interface = eth0").children[0].options.demanded(), Some("interface"));
    }

    // RFC 4301 §4.4.1: BYPASS and DISCARD are nothing that a peer could negotiate.
    #[test]
    fn shunts_are_no_children_of_the_engine() {
        let definition = read_definition(
            "children { lan { mode = pass\n start_action = trap }\n rest { mode = drop\n start_action = start }\n \
             later { mode = pass } }",
        );
        assert!(definition.connection.children.is_empty() && definition.is_for_shunts_alone());
        let shunts: Vec<_> = definition.shunts.iter().map(|shunt| (shunt.action, shunt.start)).collect();
        assert_eq!(shunts, [(ShuntAction::Pass, true), (ShuntAction::Drop, true), (ShuntAction::Pass, false)]);
        let definition = read_definition("remote { }\n children { lan { mode = pass }\n net { } }");
        assert_eq!((definition.connection.children.len(), definition.shunts.len()), (1, 1));
        assert!(!definition.is_for_shunts_alone());
    }

    // RFC 4301 §4.4.1: a policy without an SA has selectors of its own.
    #[test]
    fn a_trap_that_cannot_be_installed_is_a_warning() {
        for action in ["start_action = trap", "start_action = trap|start", "close_action = trap", "dpd_action = trap"] {
            let child = format!("remote {{ }}\n children {{ c {{ remote_ts = 10.2.0.0/24\n {action} }} }}");
            let outcome = read(&child);
            let messages: Vec<String> = outcome.reports.iter().map(Report::to_string).collect();
            assert!(outcome.definition.is_some() && messages.len() == 1, "{messages:?}");
            assert!(messages[0].contains("the trap of 'c' cannot be installed: local_ts is dynamic"), "{messages:?}");
            let outcome = read(&format!("local_addrs = 192.0.2.1\n {child}"));
            assert!(outcome.reports.is_empty(), "{:?}", outcome.reports);
        }
    }

    #[test]
    fn trap_and_start_are_taken_together() {
        let outcome = read(
            "local_addrs = 192.0.2.1\n remote_addrs = 192.0.2.2\n remote { }
             children { both { start_action = trap|start\n close_action = start|trap }
                        trap { start_action = trap }\n start { start_action = start } }",
        );
        assert!(outcome.reports.is_empty(), "{:?}", outcome.reports);
        let definition = outcome.definition.unwrap();
        assert_eq!(definition.traps("both"), TrapActions { start: true, close: true });
        assert_eq!(definition.traps("trap"), TrapActions { start: true, close: false });
        assert_eq!(definition.traps("start"), TrapActions::default());
        let starts = |child: &Arc<Child>| (child.start_action, child.close_action);
        let all: Vec<_> = definition.connection.children.iter().map(starts).collect();
        assert_eq!(
            all,
            [
                (StartAction::Start, StartAction::Start),
                (StartAction::Trap, StartAction::None),
                (StartAction::Start, StartAction::None)
            ]
        );
    }

    #[test]
    fn constraints_on_keys_and_signatures_are_read() {
        let connection = read_good(
            "local { auth = ike:rsa/pss-sha512\n id = a.example }\n remote { auth = ecdsa-384-sha384\n id = b.example }",
        );
        let parse = |text| SignatureConstraints::parse(text).unwrap();
        assert_eq!(connection.local_auth.constraints, parse("ike:rsa/pss-sha512"));
        assert_eq!(connection.remote.constraints, parse("ecdsa-384-sha384"));
        assert_eq!(
            (connection.local_auth.class, connection.remote.class),
            (AuthClass::PublicKey, AuthClass::PublicKey)
        );
    }

    // RFC 5685.
    #[test]
    fn redirects_are_read() {
        let name = || Gateway::Name("gw2.example".to_owned());
        let connection = read_good("remote { }\n redirect_to = gw2.example");
        assert_eq!(connection.redirect_to, Some((name(), RedirectPhase::Auth)));
        let connection = read_good("remote { }\n redirect_to = gw2.example\n redirect_phase = init");
        assert_eq!(connection.redirect_to, Some((name(), RedirectPhase::Init)));
        assert_eq!(read_good("remote { }").redirect_to, None);
    }

    // RFC 7296 §2.16.
    #[test]
    fn eap_is_read_and_goes_with_a_certificate_of_the_gateway() {
        let eap = AuthClass::Eap(EapMethod::MsChapV2);
        let server = read_good("remote { auth = eap-mschapv2\n eap_id = %any }");
        assert_eq!((server.local_auth.class, server.remote.class), (AuthClass::PublicKey, eap));
        assert_eq!(server.remote.eap_id, Some(IdentityPattern::any()));
        assert_eq!(*server.remote.proved_id(), IdentityPattern::any());
        let server = read_good("remote { auth = eap-dynamic\n id = carol }");
        assert_eq!((server.remote.class, &server.remote.eap_id), (eap, &None));
        assert!(server.remote.proves_ike_id() && server.remote.proved_id().matches(&Identity::parse("carol").unwrap()));
        for auth in ["eap", "eap-mschapv2"] {
            let client =
                read_good(&format!("local {{ auth = {auth}\n id = a\n eap_id = carol }}\n remote {{ id = b }}"));
            assert_eq!((client.local_auth.class, client.remote.class), (eap, AuthClass::PublicKey));
            assert_eq!(client.local_auth.eap_id.as_deref(), Some(&Identity::parse("carol").unwrap()));
        }
        // The same name in both says nothing more.
        let client = read_good("local { auth = eap\n id = carol\n eap_id = carol }\n remote { }");
        assert_eq!(client.local_auth.eap_id, None);
        // Without EAP it means nothing.
        assert_eq!(read_good("remote { auth = psk\n eap_id = %any }").remote.eap_id, None);
        for bad in [
            "local { auth = psk }\n remote { auth = eap-mschapv2 }",
            "local { auth = null }\n remote { auth = eap-mschapv2 }",
            "local { auth = eap }\n remote { auth = psk }",
            "local { auth = eap }\n remote { auth = null }",
            "local { auth = eap }\n remote { auth = eap }",
            "remote { auth = eap-mschapv2\n eap_id = \"^regular$\" }",
            "local { auth = eap\n eap_id = *.example.org }\n remote { }",
            "remote { auth = eap-mschapv2 }\n session_resumption = yes",
            "remote { auth = eap-mschapv2 }\n ppk_id = moon",
            "local { auth = eap }\n remote { }\n ppk_id = moon",
        ] {
            let message = refusal(bad);
            assert!(message.contains("config discarded"), "{bad}: {message}");
        }
    }

    // RFC 7619 §2.2, §2.4.
    #[test]
    fn auth_null_is_read_and_goes_with_no_name() {
        let connection = read_good("local { auth = null }\n remote { auth = null }");
        assert_eq!((connection.local_auth.class, connection.remote.class), (AuthClass::Null, AuthClass::Null));
        assert_eq!(connection.local_id, Some(Identity::Null));
        assert_eq!(connection.remote.remote_id, IdentityPattern::exact(Identity::Null));
        let connection = read_good("local { auth = psk\n id = a.example }\n remote { auth = null\n id = %any }");
        assert!(connection.remote.remote_id.matches(&Identity::Null));
        assert!(!read_good("remote { auth = psk }").remote.remote_id.matches(&Identity::Null));
        for bad in [
            "local { auth = null\n id = a.example }\n remote { }",
            "remote { auth = null\n id = b.example }",
            "remote { auth = null }\n session_resumption = yes",
            "remote { auth = null }\n ppk_id = moon",
            "local { auth = null }\n remote { }\n ppk_id = moon",
        ] {
            let message = refusal(bad);
            assert!(message.contains("null") || message.contains("proved nothing"), "{message}");
        }
    }

    #[test]
    fn several_rounds_of_authentication_are_refused() {
        let message = refusal("remote-1 { auth = psk }\nremote-2 { auth = psk }");
        assert!(message.contains("several rounds of authentication (RFC 4739) are not served"), "{message}");
    }

    #[test]
    fn what_is_bearable_is_a_warning_and_harmless_values_are_silent() {
        let outcome = read("remote { }\n children { c { ipcomp = yes\n icmp = yes } }");
        assert!(outcome.definition.is_some());
        let messages: Vec<String> = outcome.reports.iter().map(Report::to_string).collect();
        assert_eq!(
            messages,
            [
                "swanctl.conf:2:17: connections.gw.children.c: ipcomp is known but not served yet, ignored",
                "swanctl.conf:3:2: connections.gw.children.c: icmp is known but not served yet, ignored",
            ]
        );
        read_good(
            "version = 0\n mobike = no\n pull = yes\n aggressive = no\n dscp = 000000\n ppk_required = no\n if_id_in = 0
             childless = allow\n dpd_timeout = 0s\n pools =\n ocsp = reply
             local { round = 1 }\n remote { revocation = relaxed\n eap_id = %any }
             children { c { policies = yes\n mark_in = 0/0x00000000\n hw_offload = auto\n tfc_padding = 0\n ipcomp = no
                label_mode = system\n copy_dscp = out\n interface = \"\" } }",
        );
    }

    // RFC 8247, RFC 8221: served where somebody names them.
    #[test]
    fn weak_algorithms_are_a_warning_and_the_default_is_not() {
        let outcome = read(
            "remote { }\n proposals = aes128-sha1-modp2048\n children { c { esp_proposals = null-sha256, aes128gcm16 } }",
        );
        assert!(outcome.definition.is_some());
        let messages: Vec<String> = outcome.reports.iter().map(Report::to_string).collect();
        assert_eq!(
            messages,
            [
                "swanctl.conf:2:2: connections.gw: prfsha1: SHA-1 is on its way out (RFC 8247 §2.2)",
                "swanctl.conf:2:2: connections.gw: sha1: SHA-1 is on its way out (RFC 8247 §2.3)",
                "swanctl.conf:3:17: connections.gw.children.c: null: everybody on the way reads what is sent (RFC 8221 §5)",
            ]
        );
        read_good("proposals = default\n remote { }\n children { c { esp_proposals = default } }");
    }

    // RFC 9370.
    #[test]
    fn additional_key_exchanges_are_taken() {
        let connection = read_good("remote { }\n proposals = aes128gcm16-prfsha256-x25519-ke1_mlkem768");
        assert!(connection.proposals[0].transforms.iter().any(|transform| transform.kind.is_additional_ke()));
    }

    #[test]
    fn addresses_that_are_host_names_only_are_a_warning() {
        let outcome = read("remote_addrs = gw.example.com\n remote { }");
        assert!(outcome.definition.is_some_and(|definition| definition.connection.remote_addrs.is_empty()));
        assert_eq!(outcome.reports.len(), 1);
        assert!(outcome.reports[0].message.contains("peers may come from any address"));
    }

    #[test]
    fn a_connection_without_remote_section_is_a_warning() {
        let outcome = read("version = 2");
        assert_eq!(outcome.reports.len(), 1);
        assert!(outcome.reports[0].message.contains("each peer with a certificate of a loaded CA is admitted"));
    }

    #[test]
    fn defaults_are_charon_s() {
        let connection = read_good("remote { }\n children { c { } }");
        assert_eq!((connection.local_port, connection.remote_port, connection.tcp_remote_port), (500, 500, 4500));
        assert_eq!(connection.rekey_time, Duration::from_secs(14_400));
        assert_eq!(
            (connection.over_time, connection.rand_time),
            (Duration::from_secs(1440), Duration::from_secs(1440))
        );
        assert_eq!((connection.reauth_time, connection.dpd_delay), (Duration::ZERO, Duration::ZERO));
        assert_eq!(
            (connection.keyingtries, connection.unique, connection.fragmentation),
            (1, Unique::No, Fragmentation::Yes)
        );
        assert_eq!((connection.send_cert, connection.send_certreq), (SendCert::IfAsked, true));
        assert_eq!((connection.tcp, connection.tcp_delay), (TcpPolicy::Fallback, DEFAULT_TCP_DELAY));
        assert_eq!(connection.tls, None);
        for (text, policy, name) in [
            ("tcp = tls\n remote { }\n remote_addrs = 192.0.2.1, gw.example", TcpPolicy::Yes, "gw.example"),
            (
                "tcp = fallback-tls\n remote { id = id.example }\n remote_addrs = 192.0.2.1",
                TcpPolicy::Fallback,
                "id.example",
            ),
            ("tcp = tls\n remote { id = a@b.example }\n remote_addrs = 192.0.2.1", TcpPolicy::Yes, "192.0.2.1"),
            (
                "tcp = tls\n remote { }\n tls_server_name = web.example\n remote_addrs = gw.example",
                TcpPolicy::Yes,
                "web.example",
            ),
        ] {
            // Host names give a warning.
            let connection = read(text).definition.unwrap().connection;
            assert_eq!((connection.tcp, connection.tcp_remote_port), (policy, 443), "{text}");
            assert_eq!(connection.tls.as_deref(), Some(name), "{text}");
        }
        assert_eq!(connection.remote.remote_id, IdentityPattern::any());
        assert_eq!(connection.remote.class, AuthClass::PublicKey);
        assert!(connection.local_id.is_none() && connection.local_addrs.is_empty());
        assert!(connection.proposals.iter().enumerate().all(|(at, proposal)| usize::from(proposal.number) == at + 1));
        let child = &connection.children[0];
        let seconds = Duration::from_secs;
        assert_eq!((child.rekey_time, child.life_time, child.rand_time), (seconds(3600), seconds(3960), seconds(360)));
        assert_eq!((child.mode, child.replay_window, child.reqid), (Mode::Tunnel, 32, 0));
        assert_eq!((child.start_action, child.dpd_action), (StartAction::None, DpdAction::Clear));
        assert_eq!(child.lifetime, Lifetime::default());
        assert_eq!(child.local_ts, [ConfiguredSelector::Dynamic { protocol: 0, start_port: 0, end_port: 65_535 }]);
    }

    #[test]
    fn times_depend_on_each_other_as_in_charon() {
        let seconds = Duration::from_secs;
        let connection = read_good("remote { }\n reauth_time = 100m");
        assert_eq!(
            (connection.rekey_time, connection.reauth_time, connection.over_time),
            (seconds(0), seconds(6000), seconds(600))
        );
        let connection = read_good("remote { }\n rekey_time = 100s\n over_time = 90s");
        assert_eq!(connection.rand_time, seconds(50));
        let connection = read_good(
            "remote { }\n children { c { rekey_time = 30m\n life_time = 45m\n rekey_bytes = 100k\n life_packets = 10 } }",
        );
        let child = &connection.children[0];
        assert_eq!(
            (child.rand_time, child.lifetime.soft_bytes, child.lifetime.hard_bytes),
            (seconds(900), Some(102_400), Some(112_640))
        );
        assert_eq!((child.lifetime.soft_packets, child.lifetime.hard_packets), (None, Some(10)));
        let outcome = read("remote { }\n children { c { life_time = 30m } }");
        assert!(outcome.definition.is_some() && outcome.reports[0].message.contains("ends before it is rekeyed"));
    }

    #[test]
    fn a_whole_connection_is_typed() {
        let outcome = read(
            "local_addrs = 192.0.2.1\n remote_addrs = gw.example.com, 198.51.100.0/24
             proposals = aes256gcm16-prfsha384-ecp384, aes128-sha256-x25519
             tcp = yes\n tcp_delay = 700ms\n tcp_probe_udp = 5m\n tcp_reauth_udp = yes\n tcp_proxy = proxy.example:3128\n tcp_remote_port = 443\n fragmentation = force\n unique = replace\n keyingtries = 0\n dscp = 101110
             local { auth = psk\n id = a.example }
             remote { auth = psk\n id = *.example }
             children { net { local_ts = 10.1.0.0/16[tcp/80], dynamic[udp]\n remote_ts = 10.2.0.1-10.2.0.9
                mode = transport\n start_action = start\n close_action = trap\n dpd_action = restart
                updown = \"/usr/lib/ipsec/_updown iptables\" } }",
        );
        assert!(outcome.reports.is_empty(), "{:?}", outcome.reports);
        let definition = outcome.definition.unwrap();
        assert_eq!(definition.remote_addrs, ["gw.example.com", "198.51.100.0/24"]);
        let connection = definition.connection;
        assert_eq!(connection.remote_addrs.len(), 1);
        assert_eq!(connection.proposals.iter().map(|proposal| proposal.number).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(connection.local_id, Some(Identity::Fqdn("a.example".to_owned())));
        assert_eq!(
            (connection.local_auth.class, connection.remote.class),
            (AuthClass::SharedKey, AuthClass::SharedKey)
        );
        assert_eq!(
            (connection.remote.name.as_str(), connection.remote.remote_id.to_string().as_str()),
            ("gw", "*.example")
        );
        assert_eq!((connection.tcp, connection.tcp_remote_port, connection.keyingtries), (TcpPolicy::Yes, 443, 0));
        assert_eq!(connection.dscp, 46);
        let times = (connection.tcp_delay, connection.tcp_probe_udp);
        assert_eq!(times, (Duration::from_millis(700), Duration::from_secs(300)));
        assert!(connection.tcp_reauth_udp);
        assert_eq!(connection.tcp_proxy.as_deref(), Some("proxy.example:3128"));
        for (text, good) in [("192.0.2.1:80", true), ("[2001:db8::1]:80", true), ("proxy", false), ("a b:80", false)] {
            assert_eq!(proxy(text).is_some(), good, "{text}");
        }
        assert!(["proxy:0", "proxy:x", ":80", "2001:db8::1:80"].into_iter().all(|text| proxy(text).is_none()));
        let child = &connection.children[0];
        assert_eq!((child.local_ts.len(), child.remote_ts.len(), child.mode), (2, 1, Mode::Transport));
        assert_eq!((child.close_action, child.dpd_action), (StartAction::Trap, DpdAction::Restart));
        assert_eq!(child.updown.as_deref(), Some("/usr/lib/ipsec/_updown iptables"));
    }

    const OPTIONS: &[&str] = &[
        "version",
        "local_addrs",
        "remote_addrs",
        "local_port",
        "proposals",
        "encap",
        "rekey_time",
        "reauth_time",
        "over_time",
        "rand_time",
        "unique",
        "keyingtries",
        "tcp_delay",
        "auth",
        "id",
        "certs",
        "cacerts",
        "file",
        "esp_proposals",
        "local_ts",
        "remote_ts",
        "life_time",
        "rekey_bytes",
        "life_bytes",
        "mode",
        "reqid",
        "updown",
        "replay_window",
        "start_action",
        "vips",
        "mark_in",
        "nosuch",
        "local",
        "remote",
        "remote-2",
        "children",
        "cert1",
    ];

    fn sections() -> impl Strategy<Value = Section> {
        let origin = Origin::Vici("load-conn".into());
        let text =
            prop_oneof!["[0-9a-z.:/,%-]{0,12}".prop_map(String::into_bytes), prop::collection::vec(any::<u8>(), 0..6)];
        let value = (text, Just(origin.clone())).prop_map(|(bytes, origin)| Value { bytes, origin });
        let list = (prop::collection::vec(value.clone(), 0..3), Just(origin.clone()));
        let leaf = prop_oneof![value.prop_map(Node::Value), list.prop_map(|(items, origin)| Node::List(items, origin))];
        let names = prop::sample::select(OPTIONS).prop_map(str::to_owned);
        let entries = move |node: BoxedStrategy<Node>| prop::collection::btree_map(names.clone(), node, 0..6);
        let section_origin = origin.clone();
        let node = leaf.prop_recursive(3, 24, 6, move |inner| {
            let origin = section_origin.clone();
            entries(inner.boxed()).prop_map(move |entries| {
                Node::Section(Section { origin: origin.clone(), entries: entries.into_iter().collect() })
            })
        });
        let names = prop::sample::select(OPTIONS).prop_map(str::to_owned);
        prop::collection::btree_map(names, node, 0..8)
            .prop_map(move |entries| Section { origin: origin.clone(), entries: entries.into_iter().collect() })
    }

    proptest! {
        #[test]
        fn arbitrary_sections_never_panic_and_are_typed_or_refused(section in sections()) {
            let outcome = connection("gw", &section, &InlineCertificates);
            let refused = outcome.reports.iter().any(|report| report.severity == Severity::Error);
            prop_assert_eq!(outcome.definition.is_none(), refused);
        }
    }
}
