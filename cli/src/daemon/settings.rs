//! `strongswan.conf` read again while the daemon runs: what can change then, and what only a restart changes.

use std::path::PathBuf;

use ike::engine::EngineConfig;

use super::run::log_reports;
use crate::config::daemon::{self, DaemonConfig, Loaded};

/// The settings in force and where they come from.
#[derive(Debug)]
pub(super) struct Settings {
    path: PathBuf,
    in_force: DaemonConfig,
}

impl Settings {
    /// What was read at start.
    pub(super) fn new(path: PathBuf, in_force: DaemonConfig) -> Self {
        Self { path, in_force }
    }

    /// Reads the file again. With an error anywhere all stays as it is; the error is the text for the caller.
    pub(super) fn reload(&mut self) -> Result<&DaemonConfig, String> {
        let Loaded { config, reports } = daemon::load(&self.path).map_err(|error| error.to_string())?;
        log_reports(&reports);
        if let Some(report) = reports.iter().find(|report| report.severity == crate::config::Severity::Error) {
            return Err(report.to_string());
        }
        let waiting = for_a_restart(&self.in_force, &config);
        if !waiting.is_empty() {
            tracing::warn!("these settings have changed and need a restart: {}", waiting.join(", "));
        }
        self.in_force = merged(&self.in_force, config);
        Ok(&self.in_force)
    }
}

/// Names of the settings that differ and that only a restart changes.
fn for_a_restart(old: &DaemonConfig, new: &DaemonConfig) -> Vec<&'static str> {
    let all = [
        ("port", old.engine.port != new.engine.port),
        ("port_nat_t", old.engine.nat_port != new.engine.nat_port),
        ("address_budget", old.engine.address_budget != new.engine.address_budget),
        ("plugins.vici.socket", old.vici_socket != new.vici_socket),
        ("plugins.socket-default.fwmark", old.fwmark != new.fwmark),
        ("tcp_ports", old.tcp_ports != new.tcp_ports),
        ("tls_ports", old.tls_ports != new.tls_ports),
        ("tls_cert", old.tls_cert != new.tls_cert),
        ("tls_key", old.tls_key != new.tls_key),
        ("tls_web", old.tls_web != new.tls_web),
        ("quick_crash_detection", old.quick_crash_detection != new.quick_crash_detection),
        ("state_dir", old.state_dir != new.state_dir),
        ("shards", old.shards != new.shards),
        ("esp_threads", old.esp_threads != new.esp_threads),
        ("plane", old.plane != new.plane),
        ("drop_cleartext", old.drop_cleartext != new.drop_cleartext),
        ("tunnel_mark", old.tunnel_mark != new.tunnel_mark),
        ("latch_socket", old.latch_socket != new.latch_socket),
        ("latch_flows", old.latch_flows != new.latch_flows),
        ("latch_narrowing", old.latch_narrowing != new.latch_narrowing),
        ("install_routes", old.install_routes != new.install_routes),
        ("routing_table", old.routing_table != new.routing_table),
        ("routing_table_prio", old.routing_table_prio != new.routing_table_prio),
        ("interfaces_use", old.interfaces.only != new.interfaces.only),
        ("interfaces_ignore", old.interfaces.ignored != new.interfaces.ignored),
    ];
    all.into_iter().filter(|(_, differs)| *differs).map(|(name, _)| name).collect()
}

/// What is in force after a reload: the new settings but for those that need a restart.
fn merged(old: &DaemonConfig, new: DaemonConfig) -> DaemonConfig {
    let engine = EngineConfig {
        port: old.engine.port,
        nat_port: old.engine.nat_port,
        address_budget: old.engine.address_budget,
        ..new.engine
    };
    DaemonConfig { engine, file_logs: new.file_logs, latch_access: new.latch_access, ..old.clone() }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn settings(text: &str) -> (tempfile::NamedTempFile, Settings) {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        let loaded = daemon::load(file.path()).unwrap();
        let path = file.path().to_owned();
        (file, Settings::new(path, loaded.config))
    }

    #[test]
    fn a_file_with_an_error_changes_nothing() {
        let (file, mut settings) = settings("charon { retransmit_tries = 3 }");
        for bad in ["charon { retransmit_tries = 4\nkeep_alive = often }", "charon { retransmit_tries = 4"] {
            std::fs::write(file.path(), bad).unwrap();
            settings.reload().unwrap_err();
            assert_eq!(settings.in_force.engine.retransmission.tries, 3);
        }
    }

    #[test]
    fn what_needs_a_restart_stays_and_is_named() {
        let (file, mut settings) = settings("charon { port = 500 }");
        let text = "charon {\nport = 501\nport_nat_t = 4501\ntcp_ports = 443\nlatch_socket = /x\nlatch_narrowing = no\nlatch_flows = wait\ninstall_routes = no\n\
                    routing_table = 1\nrouting_table_prio = 2\ninterfaces_use = a\ninterfaces_ignore = b\n\
                    address_budget = 7\nshards = 3\nesp_threads = 3\nkeep_alive = 5s\ncookie_threshold = 1\nlatch_access {\nsee = 7\n}\n\
                    plugins {\nvici {\nsocket = unix:///x\n}\nsocket-default {\nfwmark = 3\n}\n}\nplane = auto\n\
                    filelog {\nlog {\npath = /tmp/x\n}\n}\n}\n";
        std::fs::write(file.path(), text).unwrap();
        let before = settings.in_force.clone();
        let new = daemon::load(file.path()).unwrap();
        assert!(!new.has_errors(), "{:?}", new.reports);
        assert_eq!(for_a_restart(&before, &new.config).len(), 17);
        let after = settings.reload().unwrap();
        assert_eq!(after.engine.keep_alive, Duration::from_secs(5));
        assert_eq!(after.engine.cookie_threshold, 1);
        assert_eq!(after.file_logs.len(), 1);
        assert_eq!(after.latch_access.see.users, [7].into());
        assert!(for_a_restart(&before, after).is_empty());
    }
}
