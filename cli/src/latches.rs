//! The latch tools of `latchkey`: list, watch, break and close latches, ask who is there, and a netcat.

use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail};
use clap::{Args, Subcommand, ValueEnum};
use ike::crypto::parse_proposals;
use ipsec::plane::Mode;
use ipsec::selector::Flow;
use ipsec::transform::{Encr, Integ, Protocol, TransformType};
use latch::client::{Changes, Client};
use latch::protocol::{
    AddressBinding, Disposition, ENDPOINT_BINDING, Initiate, Inquire, Inquired, ListedLatch, Peer, ProofInfo,
    Protection, SaInfo, State, UNIQUE_BINDING, Wanted, WantedSuite,
};
use pad::Identity;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpSocket;

use crate::config::ConnectionDefinition;
use crate::config::daemon::DEFAULT_LATCH_SOCKET;
use crate::config::latches::{Pinned, conflict};
use crate::datagrams;

/// Where the daemon is.
#[derive(Args)]
pub struct LatchSocket {
    /// The daemon's latch socket.
    #[arg(long, default_value = DEFAULT_LATCH_SOCKET)]
    socket: PathBuf,
}

/// Arguments of `latches`.
#[derive(Args)]
pub struct LatchesArguments {
    #[command(flatten)]
    daemon: LatchSocket,
    /// Go on with each change of each latch.
    #[arg(long)]
    watch: bool,
    /// JSON, an object a line.
    #[arg(long)]
    json: bool,
}

/// Arguments of `lift`.
#[derive(Args)]
pub struct LiftArguments {
    #[command(flatten)]
    daemon: LatchSocket,
}

/// Arguments of `latch`.
#[derive(Args)]
pub struct LatchArguments {
    #[command(subcommand)]
    action: LatchAction,
}

#[derive(Subcommand)]
enum LatchAction {
    /// Show whom a connection is latched to, and how it is protected.
    Show {
        #[command(flatten)]
        daemon: LatchSocket,
        /// Number of the latch.
        latch: u64,
        /// JSON, with certificates.
        #[arg(long)]
        json: bool,
    },
    /// Break a latch for good: no packet passes, and its holder is told. For root, and whom latch_access names.
    Break {
        #[command(flatten)]
        daemon: LatchSocket,
        /// Number of the latch.
        latch: u64,
    },
    /// Close a latch: its connection ends as if the peer had reset it. For root, and whom latch_access names.
    Close {
        #[command(flatten)]
        daemon: LatchSocket,
        /// Number of the latch.
        latch: u64,
    },
}

/// Arguments of `whois`.
#[derive(Args)]
pub struct WhoisArguments {
    #[command(flatten)]
    daemon: LatchSocket,
    /// Our address and port.
    local: SocketAddr,
    /// The other end's address and port.
    remote: SocketAddr,
    /// The flow is UDP.
    #[arg(long)]
    udp: bool,
    /// JSON, with certificates.
    #[arg(long)]
    json: bool,
}

/// Arguments of `nc`.
#[derive(Args)]
pub struct NetcatArguments {
    #[command(flatten)]
    daemon: LatchSocket,
    /// Identity that the peer must prove, in the notation of swanctl.conf.
    #[arg(long, default_value = "%any")]
    peer: String,
    /// ESP algorithms that the SA must have, in the notation of esp_proposals (`aes256gcm16`).
    #[arg(long)]
    suite: Option<String>,
    /// Ask for an SA for this connection alone.
    #[arg(long, conflicts_with = "listen")]
    narrow: bool,
    /// Have the connection go in clear although the policy protects it, and none of it otherwise. For root, and whom
    /// latch_access names.
    #[arg(long, conflicts_with_all = ["listen", "peer", "suite", "narrow", "on_break"])]
    bypass: bool,
    /// What becomes of the connection when its latch breaks.
    #[arg(long, default_value = "reset")]
    on_break: OnBreak,
    /// Wait for one connection instead; with -u take datagrams of all who come.
    #[arg(short, long)]
    listen: bool,
    /// UDP: what is typed goes out as datagrams, with -l to who has spoken last.
    #[arg(short, long)]
    udp: bool,
    /// Our address, and port if it matters.
    #[arg(short, long, conflicts_with = "listen")]
    source: Option<String>,
    /// Address and port of the other end; with -l our own, the address may be left out.
    #[arg(num_args = 1..=2, required = true, value_names = ["HOST", "PORT"])]
    destination: Vec<String>,
}

#[derive(Clone, Copy, ValueEnum)]
enum OnBreak {
    Reset,
    Wait,
    Unreachable,
}

/// Opens what a daemon that has stopped left shut, as far as no socket is there that it could be about.
pub async fn lift(arguments: &LiftArguments) -> anyhow::Result<()> {
    if Client::connect(&arguments.daemon.socket).await.is_ok() {
        bail!("the daemon runs, and lifts by itself what nothing uses");
    }
    let barrier = kernel::network::left_barrier().context("reading the kernel's policies")?;
    let left = latch::left::lift(&*barrier).context("reading the system's sockets")?;
    println!("lifted: {}, in use: {}", left.lifted, left.in_use);
    Ok(())
}

/// Lists latches.
pub async fn latches(arguments: &LatchesArguments) -> anyhow::Result<()> {
    let client = connect(&arguments.daemon).await?;
    // Before the list, so that nothing falls in between.
    let mut events = if arguments.watch { Some(client.watch().await?) } else { None };
    for latch in client.list().await? {
        if arguments.json {
            println!("{}", serde_json::to_string(&latch)?);
        } else {
            println!("{}", line(&latch));
        }
    }
    let Some(events) = &mut events else { return Ok(()) };
    while let Some(event) = events.next().await {
        if arguments.json {
            println!("{}", serde_json::to_string(&event)?);
            continue;
        }
        if event.missed > 0 {
            println!("({} changes were missed)", event.missed);
        }
        println!("{:>6}  {:<11}  {}: {}", event.latch, event.state, event.flow, event.reason);
    }
    bail!("the daemon has ended")
}

/// Shows, breaks or closes one latch.
pub async fn latch(arguments: &LatchArguments) -> anyhow::Result<()> {
    match &arguments.action {
        LatchAction::Show { daemon, latch, json } => tell(&connect(daemon).await?.show(*latch).await?, *json),
        LatchAction::Break { daemon, latch } => Ok(connect(daemon).await?.break_latch(*latch).await?),
        LatchAction::Close { daemon, latch } => Ok(connect(daemon).await?.close_latch(*latch).await?),
    }
}

/// Says who is at the other end.
pub async fn whois(arguments: &WhoisArguments) -> anyhow::Result<()> {
    let client = connect(&arguments.daemon).await?;
    let protocol = arguments.udp.then_some(17);
    let inquire = Inquire { local: Some(arguments.local), remote: Some(arguments.remote), protocol };
    tell(&client.whois_flow(inquire).await?, arguments.json)
}

/// Says which latches of the running daemon connections would break; gives their number.
pub async fn preview(socket: PathBuf, connections: &[ConnectionDefinition]) -> anyhow::Result<usize> {
    let client = connect(&LatchSocket { socket }).await?;
    let mut broken = 0;
    for latch in client.list().await? {
        if latch.remote.is_none() {
            continue;
        }
        // It may be gone since.
        let Ok(shown) = client.show(latch.latch).await else { continue };
        if let Some(reason) = broken_by(connections, &shown)? {
            println!("would break: {}: {reason}", line(&latch));
            broken += 1;
        }
    }
    Ok(broken)
}

/// Moves standard input and output over a latched connection.
pub async fn netcat(arguments: &NetcatArguments) -> anyhow::Result<()> {
    let client = connect(&arguments.daemon).await?;
    if arguments.bypass {
        return netcat_in_clear(&client, arguments).await;
    }
    let wanted = Wanted {
        suites: arguments.suite.as_deref().map_or_else(|| Ok(Vec::new()), suites)?,
        on_break: Some(match arguments.on_break {
            OnBreak::Reset => Disposition::Reset,
            OnBreak::Wait => Disposition::Wait,
            OnBreak::Unreachable => Disposition::Unreachable,
        }),
        initiate: if arguments.narrow { Initiate::Narrow } else { Initiate::Needed },
        ..Wanted::from(arguments.peer.as_str())
    };
    let stream = if arguments.listen {
        let local = own(&arguments.destination)?;
        if arguments.udp {
            return datagrams::listen(&client, local, wanted).await;
        }
        let listener = client.listen_tcp(local, wanted).await?;
        eprintln!("listening on {} for {}", listener.local_addr(), arguments.peer);
        listener.accept().await?.0
    } else {
        let (local, remote) = ends(arguments).await?;
        if arguments.udp {
            return datagrams::talk(client.latch_udp(remote, local, wanted).await?).await;
        }
        client.latch_tcp(remote, local, wanted).await?
    };
    eprintln!(
        "latch {}: {} to {}, {}; {}",
        stream.latch(),
        stream.local_addr(),
        stream.peer_addr(),
        described(stream.peer_identity()),
        protected(stream.protection())
    );
    for kind in [UNIQUE_BINDING, ENDPOINT_BINDING] {
        match stream.channel_binding_of(kind).await {
            Ok(binding) => eprintln!("channel binding {}: {}", binding.kind, hex(&binding.data)),
            Err(error) => eprintln!("no channel binding {kind}: {error}"),
        }
    }
    let changes = stream.changes();
    move_and_tell(stream, changes).await
}

async fn netcat_in_clear(client: &Client, arguments: &NetcatArguments) -> anyhow::Result<()> {
    let (local, remote) = ends(arguments).await?;
    let socket = if remote.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    if let Some(local) = local {
        socket.bind(local).with_context(|| format!("binding to {local}"))?;
    }
    let bypass = client.bypass_socket(&socket, remote).await?;
    let stream = socket.connect(remote).await.with_context(|| format!("connecting to {remote}"))?;
    eprintln!("latch {}: {} to {}, IN CLEAR", bypass.latch(), bypass.local_addr(), bypass.peer_addr());
    move_and_tell(stream, bypass.changes()).await
}

/// Both ends of the connection to be made; ours as far as it matters.
async fn ends(arguments: &NetcatArguments) -> anyhow::Result<(Option<SocketAddr>, SocketAddr)> {
    let [host, port] = arguments.destination.as_slice() else { bail!("HOST and PORT are needed") };
    let port = port.parse().with_context(|| format!("{port} is not a port"))?;
    let mut found = tokio::net::lookup_host((host.as_str(), port)).await.with_context(|| host.clone())?;
    let remote = found.next().with_context(|| format!("{host} has no address"))?;
    Ok((arguments.source.as_deref().map(source).transpose()?, remote))
}

async fn move_and_tell(
    stream: impl AsyncRead + AsyncWrite + Send + 'static,
    mut changes: Changes,
) -> anyhow::Result<()> {
    let told = async {
        loop {
            let change = changes.next().await;
            eprintln!("the latch is {}: {}", change.state, change.reason);
            if change.state == State::Closed {
                break;
            }
        }
    };
    tokio::pin!(told);
    let moved = copy(stream);
    tokio::pin!(moved);
    let moved = tokio::select! {
        moved = &mut moved => moved,
        () = &mut told => return moved.await,
    };
    if moved.is_err() {
        // The system's reset may come before the daemon's word why.
        let _ = tokio::time::timeout(Duration::from_secs(1), told).await;
    }
    moved
}

async fn copy(stream: impl AsyncRead + AsyncWrite + Send + 'static) -> anyhow::Result<()> {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let mut lines = datagrams::typed();
    let sending = tokio::spawn(async move {
        while let Some(octets) = lines.recv().await {
            writer.write_all(&octets).await?;
        }
        writer.shutdown().await
    });
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let length = reader.read(&mut buffer).await?;
        if length == 0 {
            break;
        }
        let mut output = std::io::stdout();
        output.write_all(buffer.get(..length).unwrap_or_default())?;
        output.flush()?;
    }
    // The other end has had enough: what is still to be read from standard input is for nobody.
    sending.abort();
    Ok(())
}

async fn connect(daemon: &LatchSocket) -> anyhow::Result<Client> {
    let path = &daemon.socket;
    let connected = Client::connect(path).await;
    connected.with_context(|| format!("reaching the daemon on {}: is latchkeyd running?", path.display()))
}

fn broken_by(connections: &[ConnectionDefinition], shown: &Inquired) -> anyhow::Result<Option<String>> {
    let (local, remote) = (shown.local, shown.remote);
    let flow = Flow {
        protocol: shown.protocol,
        local: local.ip(),
        local_port: local.port(),
        remote: remote.ip(),
        remote_port: remote.port(),
    };
    // A bypass: no connection protects it, whatever is loaded.
    let (Some(peer), Some(protection)) = (&shown.peer, &shown.protection) else { return Ok(None) };
    let identity = |info: &latch::protocol::IdentityInfo| Identity::from_wire(info.kind, &info.data);
    let (peer, own) = (identity(&peer.id)?, identity(&peer.local_id)?);
    let Protection { encr, key_bits, integ, ref mode, .. } = *protection;
    let mode = if mode == "transport" { Mode::Transport } else { Mode::Tunnel };
    let suite = (Encr(encr), key_bits, Integ(integ));
    Ok(conflict(connections, &Pinned { flow: &flow, peer: &peer, local: &own, mode, suite }))
}

fn suites(text: &str) -> anyhow::Result<Vec<WantedSuite>> {
    let mut suites = Vec::new();
    for proposal in parse_proposals(text, Protocol::ESP)? {
        let of = |kind| proposal.transforms.iter().filter(move |transform| transform.kind == kind);
        for encr in of(TransformType::ENCR) {
            let key_bits = encr.key_bits.unwrap_or(0);
            let integs: Vec<u16> = of(TransformType::INTEG).map(|integ| integ.id).collect();
            let integs = if integs.is_empty() { vec![Integ::NONE.0] } else { integs };
            suites.extend(integs.into_iter().map(|integ| WantedSuite { encr: encr.id, key_bits, integ }));
        }
    }
    Ok(suites)
}

/// Where to listen: `PORT` or `ADDRESS PORT`.
fn own(destination: &[String]) -> anyhow::Result<SocketAddr> {
    let (address, port) = match destination {
        [address, port] => (address.parse::<IpAddr>().with_context(|| format!("{address} is not an address"))?, port),
        [port] => (Ipv4Addr::UNSPECIFIED.into(), port),
        _ => bail!("PORT is needed"),
    };
    Ok(SocketAddr::new(address, port.parse().with_context(|| format!("{port} is not a port"))?))
}

fn source(text: &str) -> anyhow::Result<SocketAddr> {
    let parsed = text.parse().or_else(|_| text.parse::<IpAddr>().map(|address| SocketAddr::new(address, 0)));
    parsed.with_context(|| format!("{text} is neither an address nor an address and a port"))
}

fn line(latch: &ListedLatch) -> String {
    let ListedLatch { latch, state, protocol, local, remote, peer, bypass, automatic, listener } = latch;
    let protocol = match protocol {
        6 => "tcp".to_owned(),
        17 => "udp".to_owned(),
        other => other.to_string(),
    };
    let remote = remote.map_or_else(|| "*".to_owned(), |remote| remote.to_string());
    let automatic = if *automatic { "  automatic" } else { "" };
    let listener = listener.map_or_else(String::new, |listener| format!("  of {listener}"));
    let peer = if *bypass { "bypass" } else { peer };
    format!("{latch:>6}  {state:<11}  {protocol}  {local} - {remote}  {peer}{automatic}{listener}")
}

fn tell(shown: &Inquired, json: bool) -> anyhow::Result<()> {
    if json {
        println!("{}", serde_json::to_string_pretty(shown)?);
        return Ok(());
    }
    let peer = shown.peer.as_ref().map_or_else(|| "nobody knows who".to_owned(), described);
    println!("{} to {}: {peer}", shown.local, shown.remote);
    let bypass = || "bypass: in clear, and not under any SA".to_owned();
    println!("protection: {}", shown.protection.as_ref().map_or_else(bypass, protected));
    for sa in &shown.sas {
        println!("{}", told(sa));
    }
    match &shown.latch {
        Some(latch) => println!("latch: {} {}", latch.number, latch.state),
        None => println!("latch: none, so all of this may change"),
    }
    Ok(())
}

/// An SA in a line: connection, outer addresses, NATs, and what the peer's inner address rests on.
fn told(sa: &SaInfo) -> String {
    let nat = |behind: bool| if behind { " (behind a NAT)" } else { "" };
    let address = match sa.address {
        AddressBinding::Proved => "is its proved identity",
        AddressBinding::Assigned => "was assigned by us",
        AddressBinding::Reserved => "is one that the configuration lets nobody else have",
        AddressBinding::Outer => "is its outer one",
        AddressBinding::Configured => "is one that the configuration lets it have",
        AddressBinding::Other => "is bound to it in a way that this program does not know",
    };
    format!(
        "SA: {} {}/{}, {}{} to {}{} over {}, AUTH method {}; the peer's address {address}",
        sa.connection,
        sa.spis[0],
        sa.spis[1],
        sa.outer_local,
        nat(sa.nat_local),
        sa.outer_remote,
        nat(sa.nat_remote),
        sa.transport,
        sa.method
    )
}

fn hex(octets: &[u8]) -> String {
    octets.iter().map(|octet| format!("{octet:02x}")).collect()
}

pub(crate) fn described(peer: &Peer) -> String {
    let proof = match &peer.proof {
        ProofInfo::Unauthenticated => {
            return format!("NOBODY IN PARTICULAR (unauthenticated), to us as {}", peer.local_id.text);
        }
        ProofInfo::SharedKey => "shared key",
        ProofInfo::Certificate { .. } => "certificate",
        ProofInfo::RawKey { .. } => "raw public key",
        ProofInfo::Eap { method } => {
            return format!("{} by EAP ({method}), to us as {}", peer.id.text, peer.local_id.text);
        }
    };
    format!("{} by {proof}, to us as {}", peer.id.text, peer.local_id.text)
}

pub(crate) fn protected(protection: &Protection) -> String {
    let esn = if protection.esn { ", 64-bit sequence numbers" } else { "" };
    let replay = if protection.replay_protection { "" } else { ", no replay protection" };
    format!("{} mode, {}{esn}{replay}", protection.mode, protection.suite)
}
