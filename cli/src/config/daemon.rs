//! `strongswan.conf`: what the daemon itself is told, in typed form.
//!
//! Each setting is looked for in the sections `latchkeyd`, `charon-systemd` and `charon`, in this order.

use std::collections::BTreeSet;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ike::config::CheckAddressIdentities;
use ike::crypto::puzzle::{MAX_DIFFICULTY, MIN_DIFFICULTY};
use ike::engine::{EngineConfig, MAX_SHARDS};
use kernel::interfaces::InterfaceFilter;
use kernel::network::{MAX_THREADS, NetworkConfig, PlaneChoice};
use latch::access::{Access, Grant, Right};
use latch::database::OnBreak;

use crate::config::settings::{self, SettingsError};
use crate::config::values;
use crate::config::{Report, Severity};
use crate::tree::{Node, Section, Value};
use crate::vici::{DEFAULT_URI, Uri};

/// Sections, the first that has a setting wins.
const SECTIONS: [&str; 3] = ["latchkeyd", "charon-systemd", "charon"];

/// Where applications ask for latches, unless `latch_socket` says otherwise.
pub const DEFAULT_LATCH_SOCKET: &str = "/run/latchkey/latch.sock";

/// Who may ask for what on the latch socket.
const LATCH_ACCESS: &str = "latch_access";

/// charon's log groups, as `filelog` names them.
const LOG_GROUPS: [&str; 18] = [
    "dmn", "mgr", "ike", "chd", "job", "wch", "cfg", "knl", "net", "asn", "enc", "tnc", "imc", "imv", "pts", "tls",
    "esp", "lib",
];

/// A log file (`charon.filelog.<name>`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileLog {
    /// Where; `stdout` and `stderr` are those of the daemon.
    pub path: PathBuf,
    /// Level of groups that are not in `groups`, -1 (silent) to 4.
    pub default: i8,
    /// Levels of groups, in charon's words in lower case (`ike`, `net`).
    pub groups: Vec<(&'static str, i8)>,
    /// Append to the file rather than begin it anew.
    pub append: bool,
    /// Write each line at once.
    pub flush_line: bool,
    /// strftime(3) format of a time before each line.
    pub time_format: Option<String>,
    /// Put the connection's name and the IKE SA's number before each line.
    pub ike_name: bool,
}

impl FileLog {
    /// The level for a group such as `IKE`.
    pub fn level(&self, group: &str) -> i8 {
        let found = self.groups.iter().find(|(name, _)| name.eq_ignore_ascii_case(group));
        found.map_or(self.default, |(_, level)| *level)
    }
}

/// The daemon's settings.
#[derive(Clone, Debug)]
pub struct DaemonConfig {
    /// The engine's.
    pub engine: EngineConfig,
    /// `plugins.vici.socket`.
    pub vici_socket: String,
    /// `tcp_ports`: where TCP-encapsulated IKE is accepted (RFC 9329); `no` or an empty list is nowhere.
    pub tcp_ports: Vec<u16>,
    /// `tls_ports`: where that is accepted in TLS (RFC 9329 Appendix A).
    pub tls_ports: Vec<u16>,
    /// `tls_cert`: PEM of our TLS certificate and its chain.
    pub tls_cert: Option<PathBuf>,
    /// `tls_key`: PEM of its key.
    pub tls_key: Option<PathBuf>,
    /// `tls_web`: the web server that gets in clear what comes there in TLS and is not ours.
    pub tls_web: Option<SocketAddr>,
    /// `latch_socket`: where applications ask for latches.
    pub latch_socket: PathBuf,
    /// `latch_narrowing`: selectors of Child SAs go around latched flows where they can.
    pub latch_narrowing: bool,
    /// `latch_flows`: flows in the tunnel get latches of themselves, with this disposition.
    pub latch_flows: Option<OnBreak>,
    /// `latch_access`, ours: who may ask for what on the latch socket.
    pub latch_access: Access,
    /// `install_routes`.
    pub install_routes: bool,
    /// `routing_table`.
    pub routing_table: u32,
    /// `routing_table_prio`.
    pub routing_table_prio: u32,
    /// `plugins.socket-default.fwmark`: mark of our own packets.
    pub fwmark: Option<u32>,
    /// `interfaces_use` and `interfaces_ignore`: whose addresses peers may be told and moved to.
    pub interfaces: InterfaceFilter,
    /// `install_virtual_ip`: put virtual addresses on a device at all.
    pub install_virtual_ip: bool,
    /// `install_virtual_ip_on`: on which one; `None` is the tunnel's own.
    pub install_virtual_ip_on: Option<String>,
    /// `plugins.resolve.file`: where name servers that a peer gives are written to; `None` is nowhere.
    pub resolve_file: Option<PathBuf>,
    /// `filelog`.
    pub file_logs: Vec<FileLog>,
    /// `quick_crash_detection`, ours: tell peers how we would say that we lost an IKE SA (RFC 6290).
    pub quick_crash_detection: bool,
    /// `state_dir`, ours: what survives a restart.
    pub state_dir: PathBuf,
    /// `plane`, ours: who does ESP.
    pub plane: PlaneChoice,
    /// `drop_cleartext`, ours: where user space does ESP, drop what comes in clear from where an SA protects it.
    pub drop_cleartext: bool,
    /// `tunnel_mark`, ours: the bit of the mark of IPv6 packets that come out of the tunnel.
    pub tunnel_mark: u32,
    /// `shards`, ours: tasks that share the IKE SAs; `None` is as many as there are processors.
    pub shards: Option<usize>,
    /// `esp_threads`, ours: how many threads seal, and how many open, in user space; `None` is as many as there are
    /// processors.
    pub esp_threads: Option<usize>,
}

impl Default for DaemonConfig {
    fn default() -> Self {
        Self {
            engine: EngineConfig::default(),
            vici_socket: DEFAULT_URI.to_owned(),
            tcp_ports: vec![4500],
            tls_ports: Vec::new(),
            tls_cert: None,
            tls_key: None,
            tls_web: None,
            latch_socket: PathBuf::from(DEFAULT_LATCH_SOCKET),
            latch_narrowing: true,
            latch_flows: None,
            latch_access: Access::default(),
            install_routes: true,
            routing_table: 220,
            routing_table_prio: 220,
            fwmark: None,
            interfaces: InterfaceFilter::default(),
            install_virtual_ip: true,
            install_virtual_ip_on: None,
            resolve_file: None,
            file_logs: Vec::new(),
            quick_crash_detection: false,
            state_dir: PathBuf::from("/var/lib/latchkey"),
            plane: PlaneChoice::default(),
            drop_cleartext: true,
            tunnel_mark: NetworkConfig::default().tunnel_mark,
            shards: None,
            esp_threads: None,
        }
    }
}

/// Settings as read, with findings. An error among them means that a setting has its default.
#[derive(Debug)]
pub struct Loaded {
    /// The settings.
    pub config: DaemonConfig,
    /// Findings, in order.
    pub reports: Vec<Report>,
}

impl Loaded {
    /// True if one of the reports is an error.
    pub fn has_errors(&self) -> bool {
        self.reports.iter().any(|report| report.severity == Severity::Error)
    }
}

/// The file: `$STRONGSWAN_CONF`, or `/etc/strongswan.conf`.
pub fn default_path() -> PathBuf {
    std::env::var_os("STRONGSWAN_CONF").map_or_else(|| PathBuf::from("/etc/strongswan.conf"), PathBuf::from)
}

/// Reads a file; one that does not exist gives the defaults.
///
/// # Errors
/// When it cannot be read or does not follow the grammar.
pub fn load(path: &Path) -> Result<Loaded, SettingsError> {
    match settings::load(path) {
        Ok(read) => {
            let mut loaded = read_settings(&read.root);
            loaded.reports.splice(0..0, read.reports);
            Ok(loaded)
        }
        Err(SettingsError::Unreadable { from: None, source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            Ok(Loaded { config: DaemonConfig::default(), reports: Vec::new() })
        }
        Err(error) => Err(error),
    }
}

/// Reads settings from a tree.
pub fn read_settings(root: &Section) -> Loaded {
    let mut reader = Reader { root, asked: BTreeSet::new(), reports: Vec::new() };
    let mut config = DaemonConfig::default();
    let engine = &mut config.engine;
    reader.set("port", &mut engine.port, port);
    reader.set("port_nat_t", &mut engine.nat_port, port);
    reader.set("retransmit_timeout", &mut engine.retransmission.timeout, |text| {
        decimal(text, 0.01, 3600.0).map(Duration::from_secs_f64)
    });
    reader.set("retransmit_base", &mut engine.retransmission.base, |text| decimal(text, 1.0, 100.0));
    reader.set("retransmit_tries", &mut engine.retransmission.tries, |text| limited(text, 100));
    reader.set("retransmit_limit", &mut engine.retransmission.limit, seconds);
    reader.set("retransmit_jitter", &mut engine.retransmission.jitter, |text| limited(text, 100));
    reader.set("fragment_size", &mut engine.fragment_size, |text| {
        // 0 stands for a default by address family; ours serves both.
        let size = values::number(text)?;
        let size = if size == 0 { 1280 } else { size };
        usize::try_from(size).ok().filter(|size| (576..=65_535).contains(size))
    });
    reader.set("half_open_timeout", &mut engine.half_open_timeout, |text| seconds(text).filter(|time| !time.is_zero()));
    // As in charon, 0 turns cookies off.
    let threshold = |text: &str| count(text).map(|count| if count == 0 { usize::MAX } else { count });
    reader.set("cookie_threshold", &mut engine.cookie_threshold, threshold);
    reader.set("cookie_threshold_ip", &mut engine.cookie_threshold_ip, threshold);
    reader.set("block_threshold", &mut engine.block_threshold, count);
    reader.set("ikesa_limit", &mut engine.ikesa_limit, count);
    reader.set("init_limit_half_open", &mut engine.init_limit_half_open, count);
    reader.set("init_limit_job_load", &mut engine.init_limit_job_load, count);
    reader.set("address_budget", &mut engine.address_budget, |text| limited(text, 1_000_000));
    reader.set("puzzle_threshold", &mut engine.puzzles.threshold, count);
    reader.set("puzzle_difficulty", &mut engine.puzzles.difficulty, |text| {
        let difficulty = limited(text, MAX_DIFFICULTY.into()).and_then(|bits| u8::try_from(bits).ok());
        difficulty.filter(|bits| *bits >= MIN_DIFFICULTY)
    });
    reader.set("puzzle_limit", &mut engine.puzzles.limit, |text| {
        limited(text, MAX_DIFFICULTY.into()).and_then(|bits| u8::try_from(bits).ok())
    });
    let mut protection = true;
    reader.set("dos_protection", &mut protection, values::boolean);
    if !protection {
        engine.cookie_threshold = usize::MAX;
        engine.cookie_threshold_ip = usize::MAX;
        engine.block_threshold = 0;
        engine.address_budget = 0;
        engine.puzzles.threshold = 0;
    }
    reader.set("make_before_break", &mut engine.make_before_break, values::boolean);
    reader.set("delete_rekeyed_delay", &mut engine.delete_rekeyed_delay, seconds);
    reader.set("keep_alive", &mut engine.keep_alive, seconds);
    reader.set("prefer_configured_proposals", &mut engine.prefer_configured_proposals, values::boolean);
    reader.set("quick_crash_detection", &mut config.quick_crash_detection, values::boolean);
    reader.set("state_dir", &mut config.state_dir, |text| Some(PathBuf::from(text)).filter(|path| path.is_absolute()));
    let engine = &mut config.engine;
    reader.set("check_address_identities", &mut engine.check_address_identities, |text| {
        let check = |yes| if yes { CheckAddressIdentities::Always } else { CheckAddressIdentities::Never };
        values::boolean(text).map(check)
    });
    reader.set("invalid_selectors", &mut engine.invalid_selectors, values::boolean);
    reader.set("follow_redirects", &mut engine.follow_redirects, values::boolean);
    reader.set("signature_authentication", &mut engine.signature_authentication, values::boolean);
    reader.set("signature_authentication_constraints", &mut engine.signatures.constraints_for_auth, values::boolean);
    reader.set("rsa_pss", &mut engine.signatures.rsa_pss, values::boolean);
    reader.set("latch_socket", &mut config.latch_socket, |text| Some(PathBuf::from(text)));
    reader.set("latch_narrowing", &mut config.latch_narrowing, values::boolean);
    reader.set("latch_flows", &mut config.latch_flows, |text| match text {
        "wait" => Some(Some(OnBreak::Wait)),
        "unreachable" => Some(Some(OnBreak::Unreachable)),
        "no" => Some(None),
        _ => None,
    });
    reader.set("plane", &mut config.plane, |text| match text {
        "auto" => Some(PlaneChoice::Auto),
        "kernel" => Some(PlaneChoice::Kernel),
        "userspace" => Some(PlaneChoice::UserSpace),
        _ => None,
    });
    reader.set("drop_cleartext", &mut config.drop_cleartext, values::boolean);
    reader.set("tunnel_mark", &mut config.tunnel_mark, |text| limited(text, u32::MAX));
    reader.set("shards", &mut config.shards, |text| match text {
        "auto" => Some(None),
        _ => count(text).filter(|shards| (1..=MAX_SHARDS).contains(shards)).map(Some),
    });
    reader.set("esp_threads", &mut config.esp_threads, |text| match text {
        "auto" => Some(None),
        _ => count(text).filter(|threads| (1..=MAX_THREADS).contains(threads)).map(Some),
    });
    reader.set("install_routes", &mut config.install_routes, values::boolean);
    reader.set("routing_table", &mut config.routing_table, |text| limited(text, u32::MAX));
    reader.set("routing_table_prio", &mut config.routing_table_prio, |text| limited(text, u32::MAX));
    let names =
        |text: &str| Some(text.split(',').map(str::trim).filter(|name| !name.is_empty()).map(str::to_owned).collect());
    reader.set("interfaces_use", &mut config.interfaces.only, names);
    reader.set("interfaces_ignore", &mut config.interfaces.ignored, names);
    reader.set("install_virtual_ip", &mut config.install_virtual_ip, values::boolean);
    reader.set("install_virtual_ip_on", &mut config.install_virtual_ip_on, |text| {
        // IFNAMSIZ is 16 with the final NUL.
        let name = (1..16).contains(&text.len()) && text.bytes().all(|octet| octet.is_ascii_graphic() && octet != b'/');
        name.then(|| Some(text.to_owned()))
    });
    reader.set("plugins.resolve.file", &mut config.resolve_file, |text| {
        Path::new(text).is_absolute().then(|| Some(PathBuf::from(text)))
    });
    reader.set("application_version", &mut config.engine.application_version, |text| {
        // RFC 7296 §3.15.1: printable ASCII.
        let printable = text.len() <= 255 && text.bytes().all(|octet| (0x20..0x7f).contains(&octet));
        printable.then(|| Some(text.to_owned()).filter(|text| !text.is_empty()))
    });
    reader.set("tcp_ports", &mut config.tcp_ports, ports);
    reader.set("tls_ports", &mut config.tls_ports, ports);
    let path = |text: &str| Path::new(text).is_absolute().then(|| Some(PathBuf::from(text)));
    reader.set("tls_cert", &mut config.tls_cert, path);
    reader.set("tls_key", &mut config.tls_key, path);
    reader.set("tls_web", &mut config.tls_web, |text| text.trim().parse().ok().map(Some));
    reader.set("plugins.vici.socket", &mut config.vici_socket, |text| {
        text.parse::<Uri>().is_ok().then(|| text.to_owned())
    });
    // `!` before a mark inverts its match in charon; a mark that we set has no such meaning.
    reader.set("plugins.socket-default.fwmark", &mut config.fwmark, |text| limited(text, u32::MAX).map(Some));
    config.latch_access = reader.latch_access();
    config.file_logs = reader.file_logs();
    let reports = reader.finish();
    Loaded { config, reports }
}

/// `alice, 1000, @wheel, %any`: users by name or number, groups likewise behind `@`, everybody; or `%none`.
fn granted(text: &str) -> Result<Grant, String> {
    let mut grant = Grant::default();
    if text.trim() == "%none" {
        return Ok(grant);
    }
    for name in text.split(',').map(str::trim).filter(|name| !name.is_empty()) {
        if name == "%any" {
            grant.everybody = true;
        } else if let Some(group) = name.strip_prefix('@') {
            grant.groups.insert(numbered("group", group, kernel::users::group)?);
        } else {
            grant.users.insert(numbered("user", name, kernel::users::user)?);
        }
    }
    Ok(grant)
}

fn numbered(kind: &str, name: &str, find: fn(&str) -> io::Result<Option<u32>>) -> Result<u32, String> {
    if let Ok(number) = name.parse() {
        return Ok(number);
    }
    match find(name) {
        Ok(Some(number)) => Ok(number),
        Ok(None) => Err(format!("there is no {kind} {name:?}")),
        Err(error) => Err(format!("looking for the {kind} {name:?}: {error}")),
    }
}

fn ports(text: &str) -> Option<Vec<u16>> {
    match values::boolean(text) {
        Some(false) => Some(Vec::new()),
        _ => text.split(',').map(str::trim).filter(|port| !port.is_empty()).map(port).collect(),
    }
}

fn port(text: &str) -> Option<u16> {
    values::number(text).and_then(|port| u16::try_from(port).ok()).filter(|port| *port > 0)
}

fn seconds(text: &str) -> Option<Duration> {
    values::time(text)
}

fn count(text: &str) -> Option<usize> {
    values::number(text).and_then(|count| usize::try_from(count).ok())
}

fn limited(text: &str, largest: u32) -> Option<u32> {
    values::number(text).and_then(|number| u32::try_from(number).ok()).filter(|number| *number <= largest)
}

fn decimal(text: &str, smallest: f64, largest: f64) -> Option<f64> {
    text.trim().parse().ok().filter(|number| (smallest..=largest).contains(number))
}

fn level(text: &str) -> Option<i8> {
    text.trim().parse().ok().filter(|level| (-1..=4).contains(level))
}

struct Reader<'a> {
    root: &'a Section,
    /// Paths below one of the sections, with dots.
    asked: BTreeSet<String>,
    reports: Vec<Report>,
}

impl<'a> Reader<'a> {
    fn node(&self, path: &str) -> Option<(&'static str, &'a Node)> {
        SECTIONS.iter().find_map(|top| {
            let (folder, name) = path.rsplit_once('.').unwrap_or(("", path));
            let folder = folder.split('.').filter(|name| !name.is_empty());
            let section = folder.fold(self.root.section(top), |section, name| section?.section(name));
            section?.node(name).map(|node| (*top, node))
        })
    }

    fn set<T>(&mut self, path: &str, target: &mut T, parse: impl Fn(&str) -> Option<T>) {
        self.asked.insert(path.to_owned());
        let Some((top, node)) = self.node(path) else { return };
        let subject = format!("{top}.{path}");
        let text = match node {
            Node::Value(value) => value.text().unwrap_or_default(),
            Node::List(..) | Node::Section(_) => "",
        };
        match parse(text) {
            Some(value) => *target = value,
            None => self.report(Severity::Error, subject, node, format!("'{text}' is not a valid value")),
        }
    }

    fn report(&mut self, severity: Severity, subject: String, node: &Node, message: String) {
        self.reports.push(Report { severity, origin: Some(node.origin().clone()), subject, message });
    }

    /// An error anywhere leaves all rights to root and the daemon's user: which were meant for fewer nobody can tell.
    fn latch_access(&mut self) -> Access {
        let errors = |reports: &[Report]| reports.iter().filter(|report| report.severity == Severity::Error).count();
        let before = errors(&self.reports);
        let mut access = Access::default();
        for right in Right::ALL {
            let path = format!("{LATCH_ACCESS}.{right}");
            self.asked.insert(path.clone());
            let Some((top, node)) = self.node(&path) else { continue };
            let text = match node {
                Node::Value(value) => Ok(value.text().unwrap_or_default()),
                Node::List(..) | Node::Section(_) => Err("it is a list of users and groups".to_owned()),
            };
            match text.and_then(granted) {
                Ok(grant) => *access.grant_mut(right) = grant,
                Err(message) => self.report(Severity::Error, format!("{top}.{path}"), node, message),
            }
        }
        for top in SECTIONS {
            let Some(node) = self.root.section(top).and_then(|section| section.node(LATCH_ACCESS)) else { continue };
            let Node::Section(section) = node else {
                self.asked.insert(LATCH_ACCESS.to_owned());
                self.report(Severity::Error, format!("{top}.{LATCH_ACCESS}"), node, "it is a section".to_owned());
                continue;
            };
            for (name, node) in &section.entries {
                if Right::ALL.iter().all(|right| right.to_string() != *name) {
                    let rights = Right::ALL.map(|right| right.to_string()).join(", ");
                    let message = format!("there is no right of this name; the rights are {rights}");
                    self.asked.insert(format!("{LATCH_ACCESS}.{name}"));
                    self.report(Severity::Error, format!("{top}.{LATCH_ACCESS}.{name}"), node, message);
                }
            }
        }
        if errors(&self.reports) > before { Access::none() } else { access }
    }

    fn file_logs(&mut self) -> Vec<FileLog> {
        self.asked.insert("filelog".to_owned());
        let Some((top, node)) = self.node("filelog") else { return Vec::new() };
        let Node::Section(section) = node else {
            self.report(Severity::Error, format!("{top}.filelog"), node, "it is a section".to_owned());
            return Vec::new();
        };
        let mut logs = Vec::new();
        for (name, node) in &section.entries {
            let subject = format!("{top}.filelog.{name}");
            match node {
                Node::Section(section) => logs.push(self.file_log(name, &subject, section)),
                other => self.report(Severity::Error, subject, other, "it is a section".to_owned()),
            }
        }
        logs
    }

    fn file_log(&mut self, name: &str, subject: &str, section: &'a Section) -> FileLog {
        let mut log = FileLog {
            path: PathBuf::from(section.text("path").unwrap_or(name)),
            default: 1,
            groups: Vec::new(),
            append: true,
            flush_line: false,
            time_format: None,
            ike_name: false,
        };
        for (option, node) in &section.entries {
            let text = match node {
                Node::Value(value) => Value::text(value).unwrap_or_default(),
                Node::List(..) | Node::Section(_) => "",
            };
            let valid = if let Some(group) = LOG_GROUPS.iter().find(|group| **group == option) {
                level(text).map(|level| log.groups.push((group, level)))
            } else {
                match option.as_str() {
                    "path" => Some(()),
                    "default" => level(text).map(|level| log.default = level),
                    "append" => values::boolean(text).map(|append| log.append = append),
                    "flush_line" => values::boolean(text).map(|flush| log.flush_line = flush),
                    "ike_name" => values::boolean(text).map(|ike_name| log.ike_name = ike_name),
                    "time_format" => {
                        log.time_format = Some(text.to_owned());
                        Some(())
                    }
                    "time_add_ms" | "log_level" | "json" | "time_precision" => {
                        let message = "known but not served yet, ignored".to_owned();
                        self.report(Severity::Warning, format!("{subject}.{option}"), node, message);
                        Some(())
                    }
                    _ => {
                        let message = "unknown option, ignored".to_owned();
                        self.report(Severity::Warning, format!("{subject}.{option}"), node, message);
                        Some(())
                    }
                }
            };
            if valid.is_none() {
                let message = format!("'{text}' is not a valid value");
                self.report(Severity::Error, format!("{subject}.{option}"), node, message);
            }
        }
        log
    }

    /// Reports what nobody asked for: quietly what Debian ships, else as a warning.
    fn finish(mut self) -> Vec<Report> {
        for top in SECTIONS {
            if let Some(section) = self.root.section(top) {
                self.unasked(top, "", section);
            }
        }
        self.reports
    }

    fn unasked(&mut self, top: &str, path: &str, section: &'a Section) {
        for (name, node) in &section.entries {
            let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
            if self.asked.contains(&path) {
                continue;
            }
            if let Node::Section(inner) = node {
                self.unasked(top, &path, inner);
                continue;
            }
            let shipped = path == "load_modular" || (path.starts_with("plugins.") && path.ends_with(".load"));
            let severity = if shipped { Severity::Debug } else { Severity::Warning };
            self.report(severity, format!("{top}.{path}"), node, "known or not, it is not served; ignored".to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Loaded {
        read_settings(&settings::parse(Path::new("strongswan.conf"), text.as_bytes()).unwrap().root)
    }

    #[test]
    fn a_bad_value_is_an_error_with_its_place_and_leaves_the_default() {
        for (text, subject) in [
            ("charon { port = 0 }", "charon.port"),
            ("charon { port = 70000 }", "charon.port"),
            ("charon { retransmit_base = 0.5 }", "charon.retransmit_base"),
            ("charon { retransmit_timeout = nan }", "charon.retransmit_timeout"),
            ("charon { retransmit_timeout = -1 }", "charon.retransmit_timeout"),
            ("charon { fragment_size = 100 }", "charon.fragment_size"),
            ("charon { half_open_timeout = 0 }", "charon.half_open_timeout"),
            ("charon { plugins { vici { socket = /run/x } } }", "charon.plugins.vici.socket"),
            ("charon { tcp_ports = 4500, x }", "charon.tcp_ports"),
            ("charon { tls_ports = 443, x }", "charon.tls_ports"),
            ("charon { tls_key = key.pem }", "charon.tls_key"),
            ("charon { tls_web = 127.0.0.1 }", "charon.tls_web"),
            ("charon { filelog { a { ike = 9 } } }", "charon.filelog.a.ike"),
            ("charon { keep_alive { } }", "charon.keep_alive"),
            ("charon { install_virtual_ip_on = a/b }", "charon.install_virtual_ip_on"),
            ("charon { plugins { resolve { file = resolv.conf } } }", "charon.plugins.resolve.file"),
            ("charon { application_version = \"a\nb\" }", "charon.application_version"),
            ("latchkeyd { quick_crash_detection = perhaps }", "latchkeyd.quick_crash_detection"),
            ("latchkeyd { state_dir = here }", "latchkeyd.state_dir"),
            ("latchkeyd { shards = 0 }", "latchkeyd.shards"),
            ("latchkeyd { shards = 65 }", "latchkeyd.shards"),
            ("latchkeyd { shards = many }", "latchkeyd.shards"),
            ("latchkeyd { esp_threads = 0 }", "latchkeyd.esp_threads"),
            ("latchkeyd { esp_threads = 65 }", "latchkeyd.esp_threads"),
            ("latchkeyd { esp_threads = all }", "latchkeyd.esp_threads"),
            ("latchkeyd { plane = xfrm }", "latchkeyd.plane"),
            ("latchkeyd { latch_narrowing = perhaps }", "latchkeyd.latch_narrowing"),
            ("latchkeyd { latch_flows = reset }", "latchkeyd.latch_flows"),
        ] {
            let loaded = read(text);
            assert!(loaded.has_errors(), "{text}");
            let report = &loaded.reports[0];
            assert_eq!(report.subject, subject);
            assert!(report.to_string().starts_with("strongswan.conf:1:"), "{report}");
            assert_eq!(loaded.config.engine.port, 500);
        }
    }

    // RFC 5660 §2: "limited by system policy".
    #[test]
    fn rights_on_the_latch_socket_are_for_users_and_groups() {
        let everybody = Grant::everybody();
        assert_eq!(read("charon { }").config.latch_access, Access::default());
        let loaded = read(
            "charon { latch_access { manage = root } }
             latchkeyd { latch_access { latch = 7, @8\n see = %any\n initiate = %none\n manage = @root, root, 4294967295 } }",
        );
        assert_eq!(loaded.reports, []);
        let (users, groups) = ([0, u32::MAX].into(), [0].into());
        let access = Access {
            latch: Grant { everybody: false, users: [7].into(), groups: [8].into() },
            listen: everybody.clone(),
            initiate: Grant::default(),
            see: everybody,
            manage: Grant { everybody: false, users, groups },
            bypass: Grant::default(),
        };
        assert_eq!(loaded.config.latch_access, access);
        // A right that was misspelt may have been meant to take something away.
        for (bad, subject, why) in [
            ("latch_access { latch = nobody at all }", "charon.latch_access.latch", "no user \"nobody at all\""),
            ("latch_access { latch = @no-such-group }", "charon.latch_access.latch", "no group \"no-such-group\""),
            ("latch_access { latch = 4294967296 }", "charon.latch_access.latch", "no user"),
            ("latch_access { latch = root, %none }", "charon.latch_access.latch", "no user"),
            ("latch_access { latch = -1 }", "charon.latch_access.latch", "no user"),
            ("latch_access { latch { } }", "charon.latch_access.latch", "a list of users"),
            ("latch_access { lacth = 7 }", "charon.latch_access.lacth", "the rights are latch, listen"),
            ("latch_access = 7", "charon.latch_access", "a section"),
        ] {
            let loaded = read(&format!("charon {{ {bad} }}"));
            assert_eq!(loaded.config.latch_access, Access::none(), "{bad}");
            let [report] = &loaded.reports[..] else { panic!("{bad}: {:?}", loaded.reports) };
            assert_eq!((report.severity, report.subject.as_str()), (Severity::Error, subject));
            assert!(report.to_string().starts_with("strongswan.conf:1:") && report.message.contains(why), "{report}");
        }
    }

    #[test]
    fn our_own_section_wins_over_charon_systemd_and_charon() {
        let loaded = read(
            "charon { port = 1\n port_nat_t = 1\n keep_alive = 1 }
             charon-systemd { port_nat_t = 2\n keep_alive = 2 }
             latchkeyd { keep_alive = 3m }",
        );
        let engine = &loaded.config.engine;
        assert_eq!((engine.port, engine.nat_port, engine.keep_alive), (1, 2, Duration::from_secs(180)));
        assert_eq!(loaded.reports, []);
    }

    #[test]
    fn settings_are_typed() {
        let loaded = read(
            "charon { retransmit_timeout = 2.5\n retransmit_base = 1.5\n retransmit_tries = 7\n tcp_ports = 443, 4500
               plugins { vici { socket = unix:///run/x }\n socket-default { fwmark = 0x42 } }
               filelog { /var/log/x { default = 2\n net = 0\n append = no\n flush_line = yes }
                         console { path = stderr } } }",
        );
        let config = loaded.config;
        assert_eq!(config.engine.retransmission.timeout, Duration::from_millis(2500));
        assert_eq!(config.engine.retransmission.tries, 7);
        assert_eq!(config.tcp_ports, [443, 4500]);
        let shards = |text: &str| read(text).config.shards;
        assert_eq!(
            (shards(""), shards("charon { shards = 4 }"), shards("charon { shards = auto }")),
            (None, Some(4), None)
        );
        let threads = |text: &str| read(text).config.esp_threads;
        assert_eq!(
            (
                threads("charon { threads = 16 }"),
                threads("charon { esp_threads = 2 }"),
                threads("charon { esp_threads = auto }")
            ),
            (None, Some(2), None)
        );
        let tls = read("charon { tls_ports = 443\n tls_cert = /c.pem\n tls_key = /k.pem\n tls_web = [::1]:80 }").config;
        assert_eq!((tls.tls_ports, tls.tls_web), (vec![443], Some("[::1]:80".parse().unwrap())));
        assert_eq!(tls.tls_key, Some(PathBuf::from("/k.pem")));
        assert_eq!((config.vici_socket.as_str(), config.fwmark), ("unix:///run/x", Some(0x42)));
        let log = &config.file_logs[0];
        assert_eq!((log.path.to_str(), log.append, log.flush_line), (Some("/var/log/x"), false, true));
        assert_eq!((log.level("NET"), log.level("IKE")), (0, 2));
        assert_eq!(config.file_logs[1].path.to_str(), Some("stderr"));
        assert_eq!(read("charon { tcp_ports = no }").config.tcp_ports, [0u16; 0]);
    }

    #[test]
    fn debian_s_shipped_files_give_no_warning() {
        let loaded = load(Path::new("/etc/strongswan.conf")).expect("apt install charon-systemd strongswan-swanctl");
        let loud: Vec<&Report> = loaded.reports.iter().filter(|report| report.severity > Severity::Debug).collect();
        assert!(loud.is_empty(), "{loud:?}");
        assert!(!loaded.reports.is_empty());
    }

    #[test]
    fn what_is_not_served_is_reported_and_a_missing_file_gives_defaults() {
        let loaded = read("charon { threads = 32 }");
        assert_eq!(
            (loaded.reports[0].severity, loaded.reports[0].subject.as_str()),
            (Severity::Warning, "charon.threads")
        );
        assert_eq!(load(Path::new("/nonexistent/strongswan.conf")).unwrap().config.vici_socket, DEFAULT_URI);
    }
}
