//! Daemons under test: ours and strongSwan's, with one configuration language and one control program.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::host::Host;

/// Whose daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `latchkeyd`, ESP in user space.
    Latchkey,
    /// `latchkeyd` with `plane = kernel` (in the guest only: see [`crate::uml`]).
    LatchkeyKernel,
    /// `charon-systemd` with kernel-libipsec, ESP in user space.
    Strongswan,
    /// `charon-systemd` with kernel-netlink alone, ESP in the kernel (in the guest only).
    StrongswanKernel,
}

/// A running daemon with a directory of its own; stopped on drop.
pub struct Daemon {
    /// Whose.
    pub kind: Kind,
    process: Child,
    directory: TempDir,
}

/// Files for the daemon's `swanctl` directory: relative path and contents.
pub type Files = Vec<(String, Vec<u8>)>;

impl Daemon {
    /// Starts a daemon on a host and loads a configuration with `swanctl --load-all`.
    pub fn start(kind: Kind, host: &Host, configuration: &str, files: &Files) -> Self {
        Self::start_with(kind, host, "", configuration, files)
    }

    /// The same with settings in the `charon` section of `strongswan.conf`.
    pub fn start_with(kind: Kind, host: &Host, settings: &str, configuration: &str, files: &Files) -> Self {
        let daemon = Self::start_empty(kind, host, settings);
        daemon.write(configuration, files);
        let loaded = daemon.swanctl(&["--load-all"]);
        assert!(
            loaded.status.success(),
            "swanctl --load-all ({kind:?}): {}{}",
            text(&loaded.stdout),
            text(&loaded.stderr)
        );
        daemon
    }

    /// Starts a daemon without configuration. `settings` go into the `charon` section of `strongswan.conf`.
    pub fn start_empty(kind: Kind, host: &Host, settings: &str) -> Self {
        let directory = tempfile::Builder::new().prefix("lkt").tempdir().unwrap();
        let root = directory.path();
        for folder in
            ["x509", "x509ca", "x509ocsp", "x509aa", "x509ac", "x509crl", "pubkey", "private", "rsa", "ecdsa", "pkcs8"]
        {
            fs::create_dir_all(root.join("swanctl").join(folder)).unwrap();
        }
        fs::write(root.join("swanctl/swanctl.conf"), "").unwrap();
        let section = match kind {
            Kind::Latchkey | Kind::LatchkeyKernel => "charon",
            Kind::Strongswan | Kind::StrongswanKernel => "charon-systemd",
        };
        let plugins = match kind {
            Kind::Latchkey | Kind::LatchkeyKernel => "",
            Kind::Strongswan => {
                "random nonce openssl pem pkcs1 pkcs8 x509 pubkey constraints revocation curve25519 aes sha1 sha2 hmac \
                 gcm chapoly kdf mgf1 gmp ccm ctr cmac eap-identity eap-mschapv2 \
                 kernel-libipsec kernel-netlink socket-default vici updown"
            }
            // Shared keys only: in the guest each page of a library costs time.
            Kind::StrongswanKernel => {
                "random nonce curve25519 aes sha1 sha2 hmac gcm chapoly kdf kernel-netlink socket-default vici updown"
            }
        };
        let load = match kind {
            Kind::Latchkey | Kind::LatchkeyKernel => String::new(),
            Kind::Strongswan | Kind::StrongswanKernel => format!("load = {plugins}\njournal {{\ndefault = -1\n}}\n"),
        };
        let plane = if kind == Kind::LatchkeyKernel { "kernel" } else { "userspace" };
        let swanctl = if crate::uml::inside() { "swanctl {\nload = pem\n}\n" } else { "" };
        let socket = root.join("vici");
        fs::write(
            root.join("strongswan.conf"),
            format!(
                "{section} {{\n{load}plugins {{\nvici {{\nsocket = unix://{}\n}}\n}}\n\
                 filelog {{\nlog {{\npath = {}\ndefault = 1\nike = 2\nflush_line = yes\n}}\n}}\n{settings}\n}}\n{swanctl}\
                 latchkeyd {{\nlatch_socket = {}\nplane = {plane}\n}}\n",
                socket.display(),
                root.join("log").display(),
                root.join("latch").display(),
            ),
        )
        .unwrap();
        let mut daemon = Self { kind, process: spawn(kind, host, root), directory };
        daemon.wait_for_start();
        daemon
    }

    fn wait_for_start(&mut self) {
        let start = Instant::now();
        while !self.path("vici").exists() {
            assert!(
                self.process.try_wait().unwrap().is_none() && start.elapsed() < Duration::from_secs(60),
                "{:?} did not start: {}",
                self.kind,
                self.output()
            );
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Writes `swanctl.conf` and the files beside it.
    pub fn write(&self, configuration: &str, files: &Files) {
        fs::write(self.path("swanctl/swanctl.conf"), configuration).unwrap();
        for (name, contents) in files {
            fs::write(self.path("swanctl").join(name), contents).unwrap();
        }
    }

    /// Runs strongSwan's own `swanctl` against it.
    pub fn swanctl(&self, args: &[&str]) -> Output {
        Command::new("swanctl")
            .args(args)
            .arg("--uri")
            .arg(format!("unix://{}", self.path("vici").display()))
            .env("SWANCTL_DIR", self.path("swanctl"))
            .env("STRONGSWAN_CONF", self.path("strongswan.conf"))
            .output()
            .unwrap_or_else(|error| panic!("swanctl: {error}; apt-get install strongswan-swanctl"))
    }

    /// Runs `swanctl`, which must succeed; gives its standard output.
    pub fn control(&self, args: &[&str]) -> String {
        let output = self.swanctl(args);
        assert!(
            output.status.success(),
            "swanctl {args:?} ({:?}): {}{}\n{}",
            self.kind,
            text(&output.stdout),
            text(&output.stderr),
            self.output()
        );
        text(&output.stdout)
    }

    /// Initiates a child, which must come up.
    pub fn initiate(&self, child: &str) -> String {
        self.control(&["--initiate", "--child", child, "--timeout", "20"])
    }

    /// `swanctl --list-sas --raw`.
    pub fn sas(&self) -> String {
        self.control(&["--list-sas", "--raw"])
    }

    /// Inbound SPIs of Child SAs in a state.
    pub fn child_spis(&self, state: &str) -> Vec<String> {
        let sas = self.sas();
        sas.match_indices(&format!("state={state} "))
            .filter_map(|(at, _)| {
                let rest = &sas[at..];
                let spi = rest.find("spi-in=")?;
                Some(rest[spi + 7..spi + 15].to_owned())
            })
            .collect()
    }

    /// How many IKE SAs are established.
    pub fn established(&self) -> usize {
        self.sas().matches("state=ESTABLISHED").count()
    }

    /// The latch socket (ours only).
    pub fn latch_socket(&self) -> PathBuf {
        self.path("latch")
    }

    /// A path in the daemon's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// What it printed and logged.
    pub fn output(&self) -> String {
        let read = |name| fs::read_to_string(self.path(name)).unwrap_or_default();
        format!("--- output of {:?}\n{}--- log\n{}", self.kind, read("output"), read("log"))
    }

    /// What it logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Resident memory in kB.
    pub fn resident(&self) -> usize {
        // `ip netns exec` replaces itself, so the process is the daemon.
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    /// Processor seconds that it has used, user and system.
    pub fn cpu_seconds(&self) -> f64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.process.id())).unwrap();
        let fields: Vec<&str> = stat[stat.rfind(')').unwrap() + 2..].split(' ').collect();
        let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        // USER_HZ is 100 on every Linux that we run on.
        ticks as f64 / 100.0
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        // `ip netns exec` replaces itself, so the process is the daemon.
        self.process.id()
    }

    /// Starts it again with the same files, after its end.
    pub fn restart(&mut self, host: &Host) {
        self.process.wait().unwrap();
        let _ = fs::remove_file(self.path("vici"));
        self.process = spawn(self.kind, host, self.directory.path());
        self.wait_for_start();
        self.control(&["--load-all"]);
    }

    /// True while it runs.
    pub fn is_running(&mut self) -> bool {
        self.process.try_wait().unwrap().is_none()
    }

    /// Sends a signal by name.
    pub fn signal(&self, signal: &str) {
        let status = Command::new("kill").args(["-s", signal, &self.process.id().to_string()]).status().unwrap();
        assert!(status.success());
    }

    /// Stops it as an operator would, and says whether it ended well.
    pub fn stop(&mut self) -> bool {
        self.signal("TERM");
        let start = Instant::now();
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status.success();
            }
            if start.elapsed() > Duration::from_secs(30) {
                return false;
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

fn spawn(kind: Kind, host: &Host, root: &Path) -> Child {
    let program = match kind {
        Kind::Latchkey | Kind::LatchkeyKernel => program("latchkeyd"),
        Kind::Strongswan | Kind::StrongswanKernel => PathBuf::from("/usr/sbin/charon-systemd"),
    };
    assert!(
        program.exists(),
        "{} is missing: apt-get install strongswan-swanctl charon-systemd libcharon-extra-plugins \
         libstrongswan-extra-plugins",
        program.display()
    );
    let output = fs::File::options().create(true).append(true).open(root.join("output")).unwrap();
    host.command(program.to_str().unwrap(), &[])
        .env("STRONGSWAN_CONF", root.join("strongswan.conf"))
        .env("SWANCTL_DIR", root.join("swanctl"))
        .env("RUST_LOG", std::env::var("LATCHKEY_TEST_LOG").unwrap_or_else(|_| "debug".to_owned()))
        .env("RUST_BACKTRACE", "1")
        .stdin(Stdio::null())
        .stdout(output.try_clone().unwrap())
        .stderr(output)
        .spawn()
        .unwrap()
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("{}", self.output());
        }
        if self.process.try_wait().is_ok_and(|status| status.is_none()) && !self.stop() {
            let _ = self.process.kill();
            let _ = self.process.wait();
        }
    }
}

/// Where cargo put our programs: beside this one, or beside the directory of tests.
pub fn program(name: &str) -> PathBuf {
    let this = std::env::current_exe().unwrap();
    let directory = this.parent().unwrap();
    let directory = if directory.ends_with("deps") { directory.parent().unwrap() } else { directory };
    let program = directory.join(name);
    assert!(program.exists(), "{} is missing: cargo build --workspace --lib --bins --examples", program.display());
    program
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
