//! What goes out of a device, as a witness.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;

use crate::host::{Host, Process, wait_for};

/// All packets of one direction on one device, mostly those that leave. What comes in is left out: the kernel shows there what it has decrypted, too.
pub struct Capture {
    process: Process,
    file: PathBuf,
    _directory: TempDir,
}

impl Capture {
    /// Starts to listen.
    pub fn start(host: &Host, device: &str) -> Self {
        Self::of(host, device, "out")
    }

    /// What comes out of a tunnel's device, to be delivered to a host.
    pub fn delivered(host: &Host, device: &str) -> Self {
        Self::of(host, device, "in")
    }

    fn of(host: &Host, device: &str, direction: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("packets");
        let path = file.to_str().unwrap();
        let args = ["-Z", "root", "-i", device, "-Q", direction, "--immediate-mode", "-U", "-w", path];
        let process = host.spawn("tcpdump", &args);
        wait_for("tcpdump", Duration::from_secs(20), || file.metadata().is_ok_and(|file| file.len() >= 24));
        Self { process, file, _directory: directory }
    }

    /// Where it has written them, as libpcap does.
    pub fn file(&self) -> &str {
        self.file.to_str().unwrap()
    }

    /// How many packets so far fit an expression of `tcpdump`'s.
    pub fn count(&self, expression: &str) -> usize {
        self.list(expression).lines().count()
    }

    /// The packets so far that fit, one a line.
    pub fn list(&self, expression: &str) -> String {
        let args = ["-n", "-r", self.file.to_str().unwrap(), expression];
        let output = Command::new("tcpdump").args(args).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() || errors.contains("truncated"), "tcpdump {expression}: {errors}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// True when this stands in a packet so far.
    pub fn contains(&self, text: &str) -> bool {
        let octets = std::fs::read(&self.file).unwrap();
        octets.windows(text.len()).any(|window| window == text.as_bytes())
    }

    /// Fails if anything went out that is neither IKE nor ESP nor the link's own.
    pub fn nothing_in_clear(&mut self) {
        assert!(self.process.0.try_wait().unwrap().is_none(), "tcpdump ended");
        assert_eq!(self.list(CLEAR), "", "in clear");
    }
}

/// Traffic that a tunnel should hide.
const CLEAR: &str = "icmp or (icmp6 and (ip6[40] == 128 or ip6[40] == 129)) or (tcp and not port 4500) \
                     or (udp and not port 500 and not port 4500)";
