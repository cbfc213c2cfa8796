//! What stands between two hosts: a router that filters and translates, and a relay that cuts a TCP stream to pieces.

use std::io::Write;
use std::process::{ChildStdin, Stdio};
use std::time::Duration;

use tempfile::TempDir;

use crate::daemon::Kind::{self, Latchkey};
use crate::daemon::{Daemon, Files, program};
use crate::host::{Host, Process, link, wait_for};
use crate::scene::{INNER_A, INNER_B, Suite, configurations};

/// The initiator's outer address.
pub const A: &str = "198.51.100.1";
/// The router's address on the initiator's side.
pub const ROUTER: &str = "198.51.100.254";
/// The responder's outer address.
pub const B: &str = "192.0.2.2";

/// Short waits, so that what is lost is noticed within seconds.
pub const HASTY: &str = "retransmit_timeout = 0.5\nretransmit_base = 1.3\nretransmit_tries = 20\n";

/// Two Latchkeys with a router between them.
pub struct Road {
    /// The initiator's daemon.
    pub a: Daemon,
    /// The responder's daemon.
    pub b: Daemon,
    /// The initiator.
    pub host_a: Host,
    /// The responder.
    pub host_b: Host,
    /// In between.
    pub router: Host,
    /// The router's device on the responder's side.
    pub outside: String,
    /// The initiator's device.
    pub device_a: String,
    /// The router's device on the initiator's side.
    inside: String,
    /// The responder's device.
    pub device_b: String,
}

impl Road {
    /// Starts both; the initiator's peer is at `remote`, which need not be the responder itself.
    pub fn start(suite: &Suite, remote: &str) -> Self {
        Self::with(suite, remote, "")
    }

    /// The same with additional settings in the responder's `charon` section.
    pub fn with(suite: &Suite, remote: &str, settings_b: &str) -> Self {
        Self::between(Latchkey, remote, settings_b, configurations(suite))
    }

    /// The same with a responder of this kind and these configurations, the initiator's first, in which the ends need not
    /// know each other's addresses.
    pub fn between(kind_b: Kind, remote: &str, settings_b: &str, configurations: [(String, Files); 2]) -> Self {
        let (host_a, router, host_b) = (Host::new(), Host::new(), Host::new());
        let (device_a, inside) = link(&host_a, &format!("{A}/24"), &router, &format!("{ROUTER}/24"));
        let (outside, device_b) = link(&router, "192.0.2.254/24", &host_b, &format!("{B}/24"));
        host_a.ip(&["route", "add", "default", "via", ROUTER]);
        host_b.ip(&["route", "add", "default", "via", "192.0.2.254"]);
        router.check("sysctl", &["-qw", "net.ipv4.ip_forward=1"]);
        host_a.add_inner(&format!("{INNER_A}/24"));
        host_b.add_inner(&format!("{INNER_B}/24"));
        let [(of_a, files_a), (of_b, files_b)] = configurations;
        let of_a = of_a
            .replace("local_addrs = 192.0.2.1\n", "")
            .replace("remote_addrs = 192.0.2.2", &format!("remote_addrs = {remote}"));
        let of_b = of_b.replace("remote_addrs = 192.0.2.1\n", "");
        let load = |kind: Kind, host: &Host, configuration: &str, files: &Files, settings: &str| {
            let daemon = Daemon::start_empty(kind, host, &format!("{HASTY}{settings}"));
            daemon.write(configuration, files);
            daemon.control(&["--load-all"]);
            daemon
        };
        let b = load(kind_b, &host_b, &of_b, &files_b, settings_b);
        let a = load(Latchkey, &host_a, &of_a, &files_a, "");
        Self { a, b, host_a, host_b, router, outside, device_a, inside, device_b }
    }

    /// At most so many kbit/s from the initiator on, so that a transfer takes its time.
    pub fn slow_down(&self, kbit: u32) {
        let rate = format!("{kbit}kbit");
        self.host_a.check(
            "tc",
            &["qdisc", "add", "dev", &self.device_a, "root", "tbf", "rate", &rate, "burst", "32k", "latency", "300ms"],
        );
    }

    /// Packets cross one by one, as on a wire. Otherwise Linux passes on dozens of one TCP connection as one, and a filter drops all
    /// of them or none.
    pub fn one_by_one(&self) {
        let ends = [
            (&self.host_a, &self.device_a),
            (&self.router, &self.inside),
            (&self.router, &self.outside),
            (&self.host_b, &self.device_b),
        ];
        for (host, device) in ends {
            host.ip(&["link", "set", "dev", device, "gso_max_segs", "1"]);
        }
    }

    /// Drops what is forwarded and matches, until [`Self::allow`].
    pub fn drop_forwarded(&self, matches: &str) {
        self.router.nft(&format!(
            "table inet filter {{\nchain f {{\ntype filter hook forward priority 0;\n{matches}\n}}\n}}\n"
        ));
    }

    /// Undoes [`Self::drop_forwarded`].
    pub fn allow(&self) {
        self.router.check("nft", &["delete", "table", "inet", "filter"]);
    }

    /// True when the initiator's IKE SA is over TCP.
    pub fn is_over_tcp(&self) -> bool {
        self.a.sas().contains("transport=TCP")
    }

    /// Waits until the initiator's IKE SA is over TCP, or is not.
    pub fn wait_for_transport(&self, tcp: bool) {
        let what = if tcp { "an IKE SA over TCP" } else { "an IKE SA over UDP" };
        wait_for(what, Duration::from_secs(40), || self.a.established() == 1 && self.is_over_tcp() == tcp);
    }

    /// Real packets pass both ways.
    pub fn passes(&self) {
        let passes = self.host_a.pings(INNER_A, INNER_B) && self.host_b.pings(INNER_B, INNER_A);
        assert!(passes, "{}{}", self.a.output(), self.b.output());
    }

    /// Begins to move a file from the initiator's network to the responder's, over one TCP connection.
    pub fn transfer(&self, octets: usize) -> Transfer {
        let directory = tempfile::tempdir().unwrap();
        let (sent, received) = (directory.path().join("sent"), directory.path().join("received"));
        let mut state = 0x1234_5678_9abc_def1_u64;
        let random = std::iter::repeat_with(|| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_be_bytes()[0]
        });
        let data: Vec<u8> = random.take(octets).collect();
        std::fs::write(&sent, &data).unwrap();
        let to = format!("CREATE:{}", received.display());
        let listener = self.host_b.spawn("socat", &["-u", &format!("TCP4-LISTEN:5001,bind={INNER_B}"), &to]);
        self.host_b.wait_for_listener(5001);
        let from = format!("FILE:{}", sent.display());
        let sender = self
            .host_a
            .spawn("socat", &["-u", &from, &format!("TCP4:{INNER_B}:5001,bind={INNER_A},connect-timeout=5")]);
        Transfer { directory, data, listener, sender }
    }
}

/// A file on its way.
pub struct Transfer {
    directory: TempDir,
    data: Vec<u8>,
    listener: Process,
    sender: Process,
}

impl Transfer {
    /// True while it has not ended.
    pub fn goes_on(&mut self) -> bool {
        self.sender.0.try_wait().unwrap().is_none()
    }

    /// Octets that have arrived.
    pub fn arrived(&self) -> u64 {
        std::fs::metadata(self.directory.path().join("received")).map_or(0, |file| file.len())
    }

    /// Waits for its end, which must come over the one connection that it began with, and compares.
    pub fn arrives_whole(mut self) {
        self.sender.wait_at_most(Duration::from_secs(90));
        self.listener.wait_at_most(Duration::from_secs(30));
        let received = std::fs::read(self.directory.path().join("received")).unwrap();
        assert_eq!(received.len(), self.data.len(), "octets that arrived");
        assert!(received == self.data, "what arrived differs from what was sent");
    }
}

/// The `relay` program on a host.
pub struct Relay {
    _process: Process,
    control: ChildStdin,
}

impl Relay {
    /// From an address and port of the host to another.
    pub fn start(host: &Host, listen: &str, target: &str) -> Self {
        let mut child = host
            .command(program("relay").to_str().unwrap(), &[listen, target])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let control = child.stdin.take().unwrap();
        host.wait_for_listener(listen.rsplit(':').next().unwrap().parse().unwrap());
        Self { _process: Process(child), control }
    }

    /// What to do from now on.
    pub fn tell(&mut self, what: &str) {
        writeln!(self.control, "{what}").unwrap();
    }
}
