//! The demo's hosts and daemons.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use kernel::netns::{Namespace, veth};

use super::PATIENCE;
use super::inner;
use super::pki::Authority;
use crate::tree::{Node, Section, Value};
use crate::vici::client::Client;

pub(super) const ALICE_INNER: IpAddr = inner(1);
pub(super) const BOB_INNER: IpAddr = inner(2);
pub(super) const BOB: IpAddr = IpAddr::V4(Ipv4Addr::new(198, 51, 100, 2));
const ALICE: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
const MALLORY: IpAddr = IpAddr::V4(Ipv4Addr::new(203, 0, 113, 66));

/// What alice's daemon is configured to allow. The second connection is the mistake that the demo is about: any
/// certificate of the CA may claim bob's network.
const ALICE_CONF: &str = "\
connections {
  bob {
    remote_addrs = 198.51.100.2
    tcp = fallback
    local { auth = pubkey
      certs = host.pem
      id = alice.example }
    remote { auth = pubkey
      id = bob.example }
    children { net { local_ts = 10.1.0.0/24
        remote_ts = 10.2.0.0/24 } }
  }
  partners {
    local { auth = pubkey
      certs = host.pem
      id = alice.example }
    remote { auth = pubkey
      id = *.example }
    children { partner { local_ts = 10.1.0.0/24
        remote_ts = 10.2.0.0/24 } }
  }
}
";

const BOB_CONF: &str = "\
connections {
  alice {
    local { auth = pubkey
      certs = host.pem
      id = bob.example }
    remote { auth = pubkey
      id = alice.example }
    children { net { local_ts = 10.2.0.0/24
        remote_ts = 10.1.0.0/24 } }
  }
}
";

/// With a child for one connection of alice's, whose address and port come in.
const MALLORY_CONF: &str = "\
connections {
  alice {
    remote_addrs = 192.0.2.1
    local { auth = pubkey
      certs = host.pem
      id = mallory.example }
    remote { auth = pubkey
      id = alice.example }
    children {
      theft { local_ts = 10.2.0.1/32
        remote_ts = 10.1.0.0/24 }
      grab { local_ts = 10.2.0.1/32[tcp/7]
        remote_ts = LATCHED }
    }
  }
}
";

/// Alice and bob, each behind a link of its own to the network between them.
pub(super) struct World {
    pub(super) alice: Machine,
    pub(super) bob: Machine,
    /// Forwards between the hosts, and drops UDP when told to.
    pub(super) network: Namespace,
    authority: Authority,
    directory: PathBuf,
}

impl World {
    pub(super) fn build(directory: &Path) -> anyhow::Result<Self> {
        let authority = Authority::new()?;
        let network = Namespace::new()?;
        network.forward()?;
        let alice = host(&network, "alice", ALICE)?;
        let bob = host(&network, "bob", BOB)?;
        alice.add_address("lo", ALICE_INNER, 24)?;
        bob.add_address("lo", BOB_INNER, 24)?;
        Ok(Self {
            alice: Machine::start("alice", alice, directory, &authority, ALICE_CONF)?,
            bob: Machine::start("bob", bob, directory, &authority, BOB_CONF)?,
            network,
            authority,
            directory: directory.to_owned(),
        })
    }

    /// A third host, with a certificate of the same CA and an eye on a latched connection of alice's.
    pub(super) fn add_mallory(&self, latched: SocketAddr) -> anyhow::Result<Machine> {
        let mallory = host(&self.network, "mallory", MALLORY)?;
        let selector = format!("{}/32[tcp/{}]", latched.ip(), latched.port());
        let configuration = MALLORY_CONF.replace("LATCHED", &selector);
        Machine::start("mallory", mallory, &self.directory, &self.authority, &configuration)
    }
}

/// A host with a link to the network, which is its way to everywhere.
fn host(network: &Namespace, name: &str, address: IpAddr) -> anyhow::Result<Namespace> {
    let IpAddr::V4(v4) = address else { bail!("the demo's hosts have IPv4 addresses") };
    let [a, b, c, _] = v4.octets();
    let gateway = IpAddr::V4(Ipv4Addr::new(a, b, c, 254));
    let namespace = Namespace::new()?;
    veth(network, name, &namespace, "eth0")?;
    network.add_address(name, gateway, 24)?;
    namespace.add_address("eth0", address, 24)?;
    namespace.add_route(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0, gateway)?;
    Ok(namespace)
}

/// A host with a daemon.
pub(super) struct Machine {
    pub(super) namespace: Namespace,
    directory: PathBuf,
    daemon: Child,
    runtime: tokio::runtime::Runtime,
}

/// What the demo wants to know of an IKE SA.
pub(super) struct IkeSa {
    pub(super) remote_id: String,
    pub(super) esp: String,
}

impl Machine {
    fn start(
        name: &str,
        namespace: Namespace,
        parent: &Path,
        authority: &Authority,
        configuration: &str,
    ) -> anyhow::Result<Self> {
        let directory = parent.join(name);
        let swanctl = directory.join("swanctl");
        for folder in ["x509", "x509ca", "private"] {
            fs::create_dir_all(swanctl.join(folder))?;
        }
        let (certificate, key) = authority.issue(&format!("{name}.example"))?;
        fs::write(swanctl.join("x509/host.pem"), certificate)?;
        fs::write(swanctl.join("private/host.pem"), key)?;
        fs::write(swanctl.join("x509ca/ca.pem"), &authority.certificate)?;
        fs::write(swanctl.join("swanctl.conf"), configuration)?;
        fs::write(
            directory.join("strongswan.conf"),
            format!(
                "charon {{\n  plugins {{ vici {{ socket = unix://{}\n }} }}\n}}\nlatchkeyd {{\n  latch_socket = {}\n}}\n",
                directory.join("vici").display(),
                directory.join("latch").display()
            ),
        )?;
        let log = fs::File::create(directory.join("log"))?;
        let mut daemon = namespace
            .command(std::env::current_exe()?)
            .args(["daemon", "--until-stdin-closes"])
            .env("STRONGSWAN_CONF", directory.join("strongswan.conf"))
            .env("SWANCTL_DIR", &swanctl)
            .stdin(Stdio::piped())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("starting {name}'s daemon"))?;
        let start = Instant::now();
        while !fs::read_to_string(directory.join("log")).unwrap_or_default().contains(" is ready") {
            if daemon.try_wait()?.is_some() || start.elapsed() > PATIENCE {
                bail!("{name}'s daemon did not start:\n{}", fs::read_to_string(directory.join("log"))?);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(Self { namespace, directory, daemon, runtime })
    }

    pub(super) fn latch_socket(&self) -> PathBuf {
        self.directory.join("latch")
    }

    /// Brings a child up; gives how long it took.
    pub(super) fn initiate(&self, connection: &str, child: &str) -> anyhow::Result<Duration> {
        let start = Instant::now();
        self.request("initiate", &[("ike", connection), ("child", child), ("timeout", "15000")])
            .with_context(|| self.log_tail())?;
        Ok(start.elapsed())
    }

    /// Takes a connection down without waiting for the peer.
    pub(super) fn terminate(&self, connection: &str) -> anyhow::Result<()> {
        self.request("terminate", &[("ike", connection)])?;
        Ok(())
    }

    pub(super) fn ike_sa(&self, connection: &str) -> anyhow::Result<IkeSa> {
        let sas = self.list_sas()?;
        let text = |of_child: bool, name: &str| {
            sas.iter()
                .find(|(path, _)| {
                    path.starts_with(connection) && path.contains(".child-sas.") == of_child && path.ends_with(name)
                })
                .map(|(_, text)| text.clone())
        };
        let remote_id = text(false, ".remote-id").context("there is no such IKE SA")?;
        let cipher = text(true, ".encr-alg").context("there is no Child SA")?;
        Ok(IkeSa { remote_id, esp: format!("{cipher}-{}", text(true, ".encr-keysize").unwrap_or_default()) })
    }

    /// Protected packets received and sent so far.
    pub(super) fn packets(&self) -> anyhow::Result<u64> {
        Ok(self
            .list_sas()?
            .iter()
            .filter(|(path, _)| path.ends_with(".packets-in") || path.ends_with(".packets-out"))
            .filter_map(|(_, text)| text.parse::<u64>().ok())
            .sum())
    }

    /// A TCP connection from inside.
    pub(super) fn connect(&self, to: SocketAddr) -> anyhow::Result<TcpStream> {
        let stream = self.namespace.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(5)))?;
        let stream = stream.with_context(|| format!("connecting to {to}"))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(stream)
    }

    /// Sends a VICI command; a refusal is an error with the daemon's words.
    fn request(&self, command: &str, arguments: &[(&str, &str)]) -> anyhow::Result<Section> {
        let mut message = Client::message();
        for (name, value) in arguments {
            let value = Value { bytes: value.as_bytes().to_vec(), origin: message.origin.clone() };
            message.entries.push(((*name).to_owned(), Node::Value(value)));
        }
        let answer = self.runtime.block_on(async {
            let mut client = Client::connect(&self.vici()).await?;
            client.request(command, message).await
        })?;
        let said = flatten(&answer);
        let field = |name: &str| said.iter().find(|(path, _)| path == name).map(|(_, text)| text.as_str());
        ensure!(field("success") == Some("yes"), "{command}: {}", field("errmsg").unwrap_or("refused"));
        Ok(answer)
    }

    /// All IKE SAs as paths and values: `bob.remote-id` = `bob.example`.
    fn list_sas(&self) -> anyhow::Result<Vec<(String, String)>> {
        let mut sas = Vec::new();
        self.runtime.block_on(async {
            let mut client = Client::connect(&self.vici()).await?;
            client.register("list-sa").await?;
            client.request_with_events("list-sas", Client::message(), |_, event| sas.extend(flatten(event))).await
        })?;
        Ok(sas)
    }

    fn vici(&self) -> String {
        format!("unix://{}", self.directory.join("vici").display())
    }

    fn log_tail(&self) -> String {
        let log = fs::read_to_string(self.directory.join("log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        let tail = lines.get(lines.len().saturating_sub(20)..).unwrap_or_default();
        format!("the daemon's last words:\n{}", tail.join("\n"))
    }
}

/// Values by their path.
fn flatten(section: &Section) -> Vec<(String, String)> {
    let mut flat = Vec::new();
    for (name, node) in &section.entries {
        match node {
            Node::Value(value) => flat.push((name.clone(), String::from_utf8_lossy(&value.bytes).into_owned())),
            Node::List(..) => {}
            Node::Section(inner) => {
                flat.extend(flatten(inner).into_iter().map(|(path, text)| (format!("{name}.{path}"), text)));
            }
        }
    }
    flat
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Its standard input ends, and so does it.
        drop(self.daemon.stdin.take());
        let start = Instant::now();
        while let Ok(None) = self.daemon.try_wait() {
            if start.elapsed() > Duration::from_secs(5) {
                let _ = self.daemon.kill();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
