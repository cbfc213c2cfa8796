//! Hosts: network namespaces joined by veth pairs.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

static NUMBER: AtomicU32 = AtomicU32::new(0);

fn number() -> u32 {
    NUMBER.fetch_add(1, Ordering::Relaxed)
}

/// A network namespace with loopback up; deleted on drop, when whatever still runs in it ends.
pub struct Host {
    /// Name in `ip netns`.
    pub name: String,
}

impl Host {
    /// A new host without links.
    pub fn new() -> Self {
        let name = format!("lkt{}x{}", std::process::id(), number());
        ip(&["netns", "add", &name]);
        let host = Self { name };
        host.ip(&["link", "set", "lo", "up"]);
        host
    }

    /// Runs `ip` inside.
    pub fn ip(&self, args: &[&str]) {
        let mut all = vec!["-n", &self.name];
        all.extend_from_slice(args);
        ip(&all);
    }

    /// Runs several commands of `ip`, one a line, inside.
    pub fn ip_batch(&self, commands: &str) {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), commands).unwrap();
        self.ip(&["-batch", file.path().to_str().unwrap()]);
    }

    /// Adds an address to the loopback device, as that of the protected network behind this host.
    pub fn add_inner(&self, address: &str) {
        self.ip(&["addr", "add", address, "dev", "lo"]);
    }

    /// Runs a program inside and waits.
    pub fn run(&self, program: &str, args: &[&str]) -> Output {
        let output =
            self.command(program, args).output().unwrap_or_else(|error| panic!("{program}: {error}; {INSTALL}"));
        let missing = String::from_utf8_lossy(&output.stderr).contains(&format!("exec of \"{program}\" failed"));
        assert!(!missing, "{program} is missing; {INSTALL}");
        output
    }

    /// Waits until the system counts all links as running, which it does up to a second after both ends are up.
    pub fn wait_for_links(&self) {
        wait_for("carrier on all links", Duration::from_secs(20), || {
            let links = self.check("ip", &["-o", "link", "show", "type", "veth"]);
            links.lines().all(|line| line.contains("state UP"))
        });
    }

    /// Waits until a program inside listens on a TCP port.
    pub fn wait_for_listener(&self, port: u16) {
        wait_for(&format!("a listener on TCP port {port}"), Duration::from_secs(20), || {
            !self.check("ss", &["-Hltn", &format!("sport = :{port}")]).is_empty()
        });
    }

    /// Runs a program inside, which must succeed; gives its standard output.
    pub fn check(&self, program: &str, args: &[&str]) -> String {
        let output = self.run(program, args);
        assert!(
            output.status.success(),
            "{program} {args:?} in {}: {}\n{}{}",
            self.name,
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Starts a program inside.
    pub fn spawn(&self, program: &str, args: &[&str]) -> Process {
        let child = self
            .command(program, args)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{program}: {error}; {INSTALL}"));
        Process(child)
    }

    /// A command that will run inside.
    pub fn command(&self, program: &str, args: &[&str]) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name, program]).args(args);
        command
    }

    /// Loads nftables rules inside.
    pub fn nft(&self, rules: &str) {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("rules");
        fs::write(&file, rules).unwrap();
        self.check("nft", &["-f", file.to_str().unwrap()]);
    }

    /// Drops all UDP that this host sends, receives or forwards, silently.
    pub fn block_udp(&self) {
        if crate::uml::inside() {
            return self.udp("-I");
        }
        self.nft(
            "table inet blockudp {\n\
             chain o {\ntype filter hook output priority 0;\nmeta l4proto udp drop;\n}\n\
             chain i {\ntype filter hook input priority 0;\nmeta l4proto udp drop;\n}\n\
             chain f {\ntype filter hook forward priority 0;\nmeta l4proto udp drop;\n}\n}\n",
        );
    }

    /// Undoes [`Self::block_udp`].
    pub fn allow_udp(&self) {
        if crate::uml::inside() {
            return self.udp("-D");
        }
        self.check("nft", &["delete", "table", "inet", "blockudp"]);
    }

    /// The guest's kernel has no nftables for this.
    fn udp(&self, change: &str) {
        for chain in ["OUTPUT", "INPUT", "FORWARD"] {
            self.check("iptables-legacy", &[change, chain, "-p", "udp", "-j", "DROP"]);
        }
    }

    /// Masquerades what is forwarded to this device.
    pub fn masquerade(&self, device: &str) {
        self.check("sysctl", &["-qw", "net.ipv4.ip_forward=1"]);
        if crate::uml::inside() {
            // That kernel's nftables has no IP.
            self.check("iptables-legacy", &["-t", "nat", "-A", "POSTROUTING", "-o", device, "-j", "MASQUERADE"]);
            return;
        }
        self.nft(&format!(
            "table ip nat {{\nchain post {{\ntype nat hook postrouting priority 100;\noifname \"{device}\" masquerade;\n}}\n}}\n"
        ));
    }

    /// Processes that run inside, those that programs of the test have left among them.
    pub fn processes(&self) -> Vec<Pid> {
        let Ok(own) = fs::metadata(format!("/run/netns/{}", self.name)) else { return Vec::new() };
        let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
        let numbers = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
        numbers
            .filter(|number| {
                let namespace = fs::metadata(format!("/proc/{number}/ns/net"));
                namespace.is_ok_and(|theirs| (theirs.dev(), theirs.ino()) == (own.dev(), own.ino()))
            })
            .filter_map(Pid::from_raw)
            .collect()
    }

    fn end_processes(&self) {
        // One that forks while it is looked for is found the next time.
        for _ in 0..100 {
            let left = self.processes();
            if left.is_empty() {
                return;
            }
            for process in left {
                // A number that has become another process's by now is not in our namespace.
                let Ok(handle) = pidfd_open(process, PidfdFlags::empty()) else { continue };
                if self.processes().contains(&process) {
                    let _ = pidfd_send_signal(&handle, Signal::KILL);
                }
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Pings from an address; true when at least one answer came within three tries.
    pub fn pings(&self, from: &str, to: &str) -> bool {
        let output = self.run("ping", &["-c", "3", "-i", "0.2", "-W", "3", "-I", from, to]);
        output.status.success()
    }

    /// Moves octets over TCP to `to` and compares what arrives.
    pub fn transfers_whole(&self, from: &str, to: &Self, address: &str, octets: usize) {
        let directory = tempfile::tempdir().unwrap();
        let sent = directory.path().join("sent");
        let received = directory.path().join("received");
        let mut state = 0x1234_5678_9abc_def1_u64;
        let data: Vec<u8> = std::iter::repeat_with(|| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_be_bytes()[0]
        })
        .take(octets)
        .collect();
        fs::write(&sent, &data).unwrap();
        let family = if address.contains(':') { "TCP6" } else { "TCP4" };
        let mut listener = to.spawn(
            "socat",
            &["-u", &format!("{family}-LISTEN:5001,bind={address}"), &format!("CREATE:{}", received.display())],
        );
        to.wait_for_listener(5001);
        self.check(
            "socat",
            &[
                "-u",
                &format!("FILE:{}", sent.display()),
                &format!("{family}:{address}:5001,bind={from},connect-timeout=5"),
            ],
        );
        listener.wait_at_most(Duration::from_secs(60));
        assert!(fs::read(&received).unwrap() == data, "what arrived differs from what was sent");
    }
}

impl Default for Host {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // Forked children outlive what the test started, and would keep the namespace alive without a name.
        self.end_processes();
        let _ = Command::new("ip").args(["netns", "del", &self.name]).output();
    }
}

const INSTALL: &str = "`tests/run` installs what the tests need (as root, on Debian or Ubuntu)";

fn ip(args: &[&str]) {
    let output = Command::new("ip")
        .args(args)
        .output()
        .unwrap_or_else(|error| panic!("ip: {error}; apt-get install iproute2; {INSTALL}"));
    assert!(
        output.status.success(),
        "ip {args:?}: {} (the tests need root: they make network namespaces)",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Joins two hosts by a veth pair; addresses with prefix length, several separated by commas. Gives the two
/// devices' names.
pub fn link(a: &Host, a_addresses: &str, b: &Host, b_addresses: &str) -> (String, String) {
    let n = number();
    let (a_device, b_device) = (format!("va{n}"), format!("vb{n}"));
    ip(&["link", "add", &a_device, "netns", &a.name, "type", "veth", "peer", "name", &b_device, "netns", &b.name]);
    for (host, device, addresses) in [(a, &a_device, a_addresses), (b, &b_device, b_addresses)] {
        let mut batch = String::new();
        for address in addresses.split(',') {
            let nodad = if address.contains(':') { " nodad" } else { "" };
            batch += &format!("addr add {address} dev {device}{nodad}\n");
        }
        host.ip_batch(&format!("{batch}link set {device} up\n"));
    }
    (a_device, b_device)
}

/// A running program; killed on drop.
pub struct Process(pub Child);

impl Process {
    /// Waits for its end, or fails.
    pub fn wait_at_most(&mut self, limit: Duration) {
        let start = Instant::now();
        while self.0.try_wait().unwrap().is_none() {
            assert!(start.elapsed() < limit, "a program did not end within {limit:?}");
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits until a condition holds, or fails saying what was waited for.
pub fn wait_for(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    // In the guest there is one processor, and starting a program to look costs a good part of a second.
    let (pause, limit) = if crate::uml::inside() { (300, 3 * limit) } else { (50, limit) };
    while !condition() {
        assert!(start.elapsed() < limit, "{what}: not within {limit:?}");
        thread::sleep(Duration::from_millis(pause));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_runs_on_a_host_ends_with_it_and_nothing_else() {
        let (host, other) = (Host::new(), Host::new());
        // The shell is what the test knows of; its child has left it.
        let mut shell = host.spawn("sh", &["-c", "setsid sleep 600 & exit"]);
        shell.wait_at_most(Duration::from_secs(20));
        let mut of_other = other.spawn("sleep", &["600"]);
        wait_for("the programs inside", Duration::from_secs(20), || {
            host.processes().len() == 1 && other.processes().len() == 1
        });
        let [left] = host.processes()[..] else { panic!("one was there") };
        drop(host);
        let of_left = format!("/proc/{}/ns/net", left.as_raw_nonzero());
        wait_for("its end", Duration::from_secs(20), || fs::metadata(&of_left).is_err());
        assert!(of_other.0.try_wait().is_ok_and(|status| status.is_none()), "that of another host goes on");
    }
}
