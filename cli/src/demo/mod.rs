//! `latchkey demo`: the main job on one machine, with real daemons, a real PKI and an impostor.
//!
//! Three hosts are network namespaces: alice, bob (whom alice wants to talk to) and mallory, who holds a valid
//! certificate of the same CA and claims bob's address.

mod impostor;
mod pki;
mod world;

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use kernel::netns::Namespace;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use impostor::Impostor;
use world::{BOB, BOB_INNER, World};

/// How long one step may take before the demo gives up.
const PATIENCE: Duration = Duration::from_secs(15);

/// What is moved through each tunnel.
const BULK: usize = 8 << 20;

const ECHO_PORT: u16 = 7;
const SINK_PORT: u16 = 9;

/// Runs the demo in a directory that the caller removes. Prints each step; the first that fails ends it.
pub fn run(directory: &Path) -> anyhow::Result<()> {
    let start = Instant::now();
    println!("Latchkey demo: three hosts (network namespaces), real daemons, nothing outside this machine.\n");
    let mut steps = Steps { number: 0 };

    let world = steps.run("Two hosts, a small PKI, two daemons", || {
        let world = World::build(directory)?;
        Ok((
            world,
            "alice (192.0.2.1) and bob (198.51.100.2) are up, each with an ECDSA certificate of \"Demo CA\"".into(),
        ))
    })?;
    let _services = Services::start(&world.bob.namespace)?;

    steps.run("The tunnel over UDP", || {
        let took = world.alice.initiate("bob", "net")?;
        let proved = proof(&world)?;
        Ok(((), format!("up in {} ms; {proved}", took.as_millis())))
    })?;
    steps.run("Real traffic through it", || Ok(((), traffic(&world)?)))?;

    steps.run("UDP blocked: the tunnel over TCP (RFC 9329)", || {
        world.alice.terminate("bob")?;
        world.network.block_udp(true)?;
        let took = world.alice.initiate("bob", "net")?;
        ensure!(
            world.alice.namespace.run(|| has_stream(BOB, 4500))??,
            "the tunnel is up, but there is no TCP connection to {BOB}:4500"
        );
        Ok(((), format!("UDP stayed silent, so alice started anew over TCP; up in {:.1} s", took.as_secs_f64())))
    })?;
    steps.run("Real traffic through it", || Ok(((), traffic(&world)?)))?;

    let (latched, unlatched) = steps.run("A latched connection, and one beside it that is not", || {
        world.network.block_udp(false)?;
        let latched = Latched::open(&world)?;
        let identity = latched.identity.clone();
        let mut unlatched = world.alice.connect(SocketAddr::new(BOB_INNER, ECHO_PORT))?;
        ensure!(latched.ask("balance?")? == "bob: balance?", "bob does not answer on the latched connection");
        ensure!(ask(&mut unlatched, "balance?")? == "bob: balance?", "bob does not answer on the other connection");
        Ok(((latched, unlatched), format!("both talk to bob; one is pinned to {identity}")))
    })?;

    let (mallory, impostor) = steps.run("An impostor with a valid certificate claims bob's address", || {
        let mallory = world.add_mallory(latched.local)?;
        let impostor = Impostor::start(&mallory.namespace)?;
        let took = mallory.initiate("alice", "theft")?;
        Ok((
            (mallory, impostor),
            format!(
                "alice's daemon accepted mallory.example for {BOB_INNER} in {} ms, as its policy allows",
                took.as_millis()
            ),
        ))
    })?;

    steps.run("The latched connection stays with bob", || {
        let answer = latched.ask("transfer 1000")?;
        ensure!(answer == "bob: transfer 1000", "somebody else answers on the latched connection: {answer}");
        let port = latched.local.port();
        ensure!(!impostor.saw(port), "a packet of the latched connection reached mallory");
        Ok(((), format!("mallory's SA was narrowed around it: alice read \"{answer}\", mallory saw nothing of it")))
    })?;

    steps.run("The unlatched connection is hijacked", || {
        let mut unlatched = unlatched;
        let answer = ask(&mut unlatched, "transfer 1000").context("the impostor did not take the connection over")?;
        ensure!(answer.starts_with("mallory: "), "bob still answers: {answer}");
        let port = unlatched.local_addr()?.port();
        ensure!(impostor.saw(port), "mallory answered what she did not see");
        Ok(((), format!("alice sent \"transfer 1000\" and read \"{answer}\"")))
    })?;

    steps.run("She asks for the latched one by its ports. The latched connection stops", || {
        mallory.initiate("alice", "grab")?;
        let alert = latched.alert()?;
        ensure!(latched.ask("transfer 1000").is_err(), "the latched connection still talks");
        ensure!(!impostor.saw(latched.local.port()), "a packet of the latched connection reached mallory");
        Ok(((), format!("its holder was told first: {alert}; mallory saw nothing of it")))
    })?;

    println!("\nAll {} steps passed in {:.1} s.", steps.number, start.elapsed().as_secs_f64());
    Ok(())
}

/// Numbers, times and prints the steps.
struct Steps {
    number: usize,
}

impl Steps {
    fn run<T>(&mut self, title: &str, step: impl FnOnce() -> anyhow::Result<(T, String)>) -> anyhow::Result<T> {
        self.number += 1;
        let start = Instant::now();
        match step() {
            Ok((value, proved)) => {
                println!("{}. {title}  [{:.2} s]\n   {proved}", self.number, start.elapsed().as_secs_f64());
                Ok(value)
            }
            Err(error) => {
                println!("{}. {title}  FAILED", self.number);
                Err(error.context(format!("step {}: {title}", self.number)))
            }
        }
    }
}

/// Bob's servers: one that echoes lines, one that counts and digests what it gets.
struct Services;

impl Services {
    fn start(namespace: &Namespace) -> anyhow::Result<Self> {
        let listen = |port| namespace.run(|| TcpListener::bind(SocketAddr::new(BOB_INNER, port)));
        let echo = listen(ECHO_PORT)?.context("bob's echo service")?;
        std::thread::spawn(move || {
            for stream in echo.incoming().flatten() {
                std::thread::spawn(move || serve_lines(stream, "bob"));
            }
        });
        let sink = listen(SINK_PORT)?.context("bob's bulk service")?;
        std::thread::spawn(move || {
            for stream in sink.incoming().flatten() {
                std::thread::spawn(move || digest_all(stream));
            }
        });
        Ok(Self)
    }
}

/// Answers each line with the speaker's name before it.
fn serve_lines(mut stream: TcpStream, speaker: &str) {
    let mut buffer = [0; 1024];
    while let Ok(length @ 1..) = stream.read(&mut buffer) {
        let Some(text) = buffer.get(..length) else { break };
        let answer = [speaker.as_bytes(), b": ", text].concat();
        if stream.write_all(&answer).is_err() {
            break;
        }
    }
}

/// Reads to the end, then answers with the SHA-256 of what came.
fn digest_all(mut stream: TcpStream) {
    let mut digest = aws_lc_rs::digest::Context::new(&aws_lc_rs::digest::SHA256);
    let mut buffer = vec![0; 1 << 16];
    while let Ok(length @ 1..) = stream.read(&mut buffer) {
        digest.update(buffer.get(..length).unwrap_or_default());
    }
    // A sender that is gone misses the answer and says so itself.
    let _ = stream.write_all(digest.finish().as_ref());
}

/// Moves octets from alice to bob and compares their digests.
fn traffic(world: &World) -> anyhow::Result<String> {
    let before = world.alice.packets()?;
    let mut data = vec![0; BULK];
    aws_lc_rs::rand::fill(&mut data).map_err(|_| anyhow::anyhow!("the system gives no random numbers"))?;
    let mut stream = world.alice.connect(SocketAddr::new(BOB_INNER, SINK_PORT))?;
    let start = Instant::now();
    stream.write_all(&data)?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut digest = Vec::new();
    stream.read_to_end(&mut digest)?;
    let took = start.elapsed();
    ensure!(
        digest == aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &data).as_ref(),
        "what arrived differs from what was sent"
    );
    let packets = world.alice.packets()? - before;
    ensure!(packets > 0, "the traffic did not go through the tunnel");
    Ok(format!(
        "{} MiB arrived whole in {} ms, as {packets} protected packets (SHA-256 compared)",
        BULK >> 20,
        took.as_millis()
    ))
}

/// What alice's daemon says of bob.
fn proof(world: &World) -> anyhow::Result<String> {
    let sa = world.alice.ike_sa("bob")?;
    Ok(format!("{} proved itself with its certificate, {} for ESP", sa.remote_id, sa.esp))
}

/// True when this namespace has an established TCP connection to an address and port.
fn has_stream(address: IpAddr, port: u16) -> anyhow::Result<bool> {
    let IpAddr::V4(address) = address else { bail!("IPv4 only") };
    let wanted = format!("{:08X}:{port:04X}", u32::from_ne_bytes(address.octets()));
    let table = fs::read_to_string("/proc/thread-self/net/tcp")?;
    Ok(table.lines().any(|line| {
        let mut fields = line.split_whitespace().skip(2);
        fields.next() == Some(wanted.as_str()) && fields.next() == Some("01")
    }))
}

/// Says a line and reads the answer.
fn ask(stream: &mut TcpStream, line: &str) -> anyhow::Result<String> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(line.as_bytes())?;
    let mut buffer = [0; 1024];
    let length = stream.read(&mut buffer)?;
    ensure!(length > 0, "the connection was closed");
    Ok(String::from_utf8_lossy(buffer.get(..length).unwrap_or_default()).into_owned())
}

/// Alice's latched connection, on a runtime of its own inside her namespace.
struct Latched {
    questions: tokio::sync::mpsc::UnboundedSender<(String, std::sync::mpsc::Sender<anyhow::Result<String>>)>,
    alerts: std::sync::mpsc::Receiver<String>,
    local: SocketAddr,
    identity: String,
}

impl Latched {
    fn open(world: &World) -> anyhow::Result<Self> {
        let socket: PathBuf = world.alice.latch_socket();
        let (questions, mut asked) =
            tokio::sync::mpsc::unbounded_channel::<(String, std::sync::mpsc::Sender<anyhow::Result<String>>)>();
        let (alert_sender, alerts) = std::sync::mpsc::channel();
        let (opened, ready) = std::sync::mpsc::channel::<anyhow::Result<(SocketAddr, String)>>();
        world.alice.namespace.spawn(move || {
            let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime,
                Err(error) => return drop(opened.send(Err(error.into()))),
            };
            runtime.block_on(async move {
                let connected = async {
                    let client = latch::client::Client::connect(&socket).await?;
                    client.latch_tcp(SocketAddr::new(BOB_INNER, ECHO_PORT), None, "bob.example").await
                };
                let mut stream = match connected.await {
                    Ok(stream) => stream,
                    Err(error) => return drop(opened.send(Err(error.into()))),
                };
                let identity = stream.peer_identity().id.text.clone();
                let local = stream.local_addr();
                let broken = stream.broken();
                tokio::spawn(async move {
                    // The demo may be over before the latch breaks.
                    let _ = alert_sender.send(broken.await.reason);
                });
                let _ = opened.send(Ok((local, identity)));
                while let Some((line, answer)) = asked.recv().await {
                    let outcome = tokio::time::timeout(Duration::from_secs(2), async {
                        stream.write_all(line.as_bytes()).await?;
                        let mut buffer = [0; 1024];
                        let length = stream.read(&mut buffer).await?;
                        ensure!(length > 0, "the connection was closed");
                        Ok(String::from_utf8_lossy(buffer.get(..length).unwrap_or_default()).into_owned())
                    });
                    let outcome = outcome.await.unwrap_or_else(|_| Err(anyhow::anyhow!("no answer")));
                    let _ = answer.send(outcome);
                }
            });
        });
        let (local, identity) = ready.recv_timeout(PATIENCE).context("opening the latched connection")??;
        Ok(Self { questions, alerts, local, identity })
    }

    fn ask(&self, line: &str) -> anyhow::Result<String> {
        let (answer, answers) = std::sync::mpsc::channel();
        self.questions.send((line.to_owned(), answer)).map_err(|_| anyhow::anyhow!("the connection is gone"))?;
        answers.recv_timeout(PATIENCE)?
    }

    fn alert(&self) -> anyhow::Result<String> {
        self.alerts.recv_timeout(PATIENCE).context("the holder of the latch was not told")
    }
}

/// The address of a host's protected side, for messages.
const fn inner(third: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(10, third, 0, 1))
}
