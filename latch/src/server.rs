//! The daemon's side of the latch protocol: a Unix SOCK_SEQPACKET socket.
//!
//! # Who holds a latch
//!
//! The connection to this server does. The server keeps a duplicate of the latched TCP socket for as long as the latch
//! lives, and a latch is released only after its TCP connection has come to an end, so no byte of it passes unlatched:
//!
//! * when the latch breaks, the alert is queued and then the TCP connection is reset through the duplicate
//!   (RFC 5660 §5.5, disposition b), all before [`Database::before_install`] returns. The reset itself is dropped by the
//!   packet check like every packet of a BROKEN latch;
//! * when the holder releases the latch, or its connection ends while the process lives on, the TCP connection is shut
//!   down in both directions. What the application wrote before still goes out, under the latch; after [`LINGER`] at
//!   the latest the rest is thrown away with a reset. Then the latch is released;
//! * when the server is dropped, latches stay in the database and nobody can release them: fail closed.
//!
//! # Limits of the device binding
//!
//! A latched socket is bound to the tunnel's device (SO_BINDTODEVICE) before the latch is made, so that it cannot
//! leave in clear, not even after the daemon's death, which takes the device along. A process with CAP_NET_RAW can undo
//! the binding of its own socket. A refused `create` leaves the binding in place. A socket of another network
//! namespace is not recognised: its owner would deceive himself only.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ipsec::selector::Flow;
use pad::IdentityPattern;
use rustix::net::SocketAddrUnix;
use serde::Serialize;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::UnixListener;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep, timeout};

use crate::database::{Alert, Class, Database, LatchId};
use crate::protocol::{
    Call, Code, Create, Created, Hello, Inquire, Inquired, LatchInfo, List, Listed, ListedLatch, Peer, Protection,
    Refusal, Release, ServerMessage, VERSION, Welcome, encode,
};
use crate::seqpacket::{self, Datagram, SeqPacket};

/// How to serve.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Path of the socket; made with mode 0660, its directory exists. Who may write to it may ask for latches.
    pub path: PathBuf,
    /// Device that latched sockets are bound to, so that they cannot use another way (SO_BINDTODEVICE).
    pub device: Option<String>,
    /// Why no latch can be had, if so: nobody would enforce it.
    pub unenforced: Option<String>,
}

/// How long a released TCP connection may take to deliver what was written before and to close.
pub const LINGER: Duration = Duration::from_secs(60);

/// Serves until the returned guard is dropped, which removes the socket.
///
/// A socket file that nobody listens on is replaced; AddrInUse if somebody does, or if the path is something else.
pub async fn serve(config: ServerConfig, database: Arc<Database>) -> io::Result<Server> {
    serve_within(config, database, LIMITS).await
}

/// The running server.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    task: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::debug!(path = %self.path.display(), %error, "removing the latch socket");
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Limits {
    connections: usize,
    latches_per_connection: usize,
    latches: usize,
}

/// Each latch and each connection costs the daemon a descriptor.
const LIMITS: Limits = Limits { connections: 256, latches_per_connection: 1024, latches: 16_384 };

/// A client that does not read for so long is gone.
const SEND_TIMEOUT: Duration = Duration::from_secs(10);

/// Lines in one answer to `list`; each has less than 500 octets.
const LIST_LENGTH: usize = 100;

const TCP: u8 = 6;

struct Shared {
    database: Arc<Database>,
    device: Option<String>,
    unenforced: Option<String>,
    limits: Limits,
    latches: Arc<Semaphore>,
}

async fn serve_within(config: ServerConfig, database: Arc<Database>, limits: Limits) -> io::Result<Server> {
    let listener = listen(&config.path)?;
    let latches = Arc::new(Semaphore::new(limits.latches));
    let shared = Arc::new(Shared { database, device: config.device, unenforced: config.unenforced, limits, latches });
    let task = tokio::spawn(accept(listener, shared));
    Ok(Server { path: config.path, task })
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    let address = SocketAddrUnix::new(path)?;
    if let Ok(metadata) = fs::symlink_metadata(path) {
        let connected = rustix::net::connect(seqpacket::socket()?, &address);
        if !metadata.file_type().is_socket() || connected != Err(rustix::io::Errno::CONNREFUSED) {
            let message = format!("{} is in use", path.display());
            return Err(io::Error::new(io::ErrorKind::AddrInUse, message));
        }
        fs::remove_file(path)?;
    }
    let listener = seqpacket::socket()?;
    rustix::net::bind(&listener, &address)?;
    // Until `listen` nobody can connect, so the mode is right before the first client.
    fs::set_permissions(path, fs::Permissions::from_mode(0o660))?;
    rustix::net::listen(&listener, 64)?;
    UnixListener::from_std(listener.into())
}

async fn accept(listener: UnixListener, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            Some(_) = connections.join_next() => continue,
            accepted = listener.accept() => accepted,
        };
        match accepted.map(|(socket, _)| SeqPacket::from(socket)) {
            Ok(socket) if connections.len() >= shared.limits.connections => {
                let refusal = Refusal::new(Code::Limit, "there are too many connections");
                if let Ok(octets) = encode(&ServerMessage::Refusal { id: None, refusal }) {
                    // Best effort: the end of the connection says it too.
                    let _ = socket.try_send(&octets);
                }
            }
            Ok(socket) => {
                connections.spawn(serve_connection(socket, Arc::clone(&shared)));
            }
            Err(error) => {
                tracing::warn!(%error, "accepting a client of the latch socket");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn serve_connection(socket: SeqPacket, shared: Arc<Shared>) {
    match rustix::net::sockopt::socket_peercred(&socket) {
        Ok(peer) => tracing::debug!(
            pid = peer.pid.as_raw_nonzero().get(),
            uid = peer.uid.as_raw(),
            gid = peer.gid.as_raw(),
            "a client connected to the latch socket"
        ),
        Err(error) => tracing::debug!(%error, "a client of unknown credentials connected to the latch socket"),
    }
    let (sender, alerts) = mpsc::unbounded_channel();
    let mut connection = Connection { shared, alerts: sender, latches: HashMap::new(), welcomed: false };
    if let Err(error) = connection.run(&socket, alerts).await {
        tracing::debug!(%error, "a client of the latch socket is gone");
    }
    drop(socket);
    for (latch, held) in std::mem::take(&mut connection.latches) {
        connection.wind_down(latch, held);
    }
}

struct Connection {
    shared: Arc<Shared>,
    /// Never holds more than one alert for each latch of this connection.
    alerts: mpsc::UnboundedSender<Alert>,
    latches: HashMap<LatchId, Held>,
    welcomed: bool,
}

/// What stands for a latch here.
struct Held {
    socket: Arc<Socket>,
    permit: OwnedSemaphorePermit,
}

impl Connection {
    async fn run(&mut self, socket: &SeqPacket, mut alerts: mpsc::UnboundedReceiver<Alert>) -> io::Result<()> {
        loop {
            let octets = tokio::select! {
                biased;
                Some(alert) = alerts.recv() => {
                    let Alert { latch, state, reason } = alert;
                    encode(&ServerMessage::Alert { latch: latch.0, state: state.into(), reason })
                }
                received = socket.receive() => match received? {
                    Some(datagram) => self.answer(datagram),
                    None => return Ok(()),
                },
            };
            let octets = octets.map_err(io::Error::other)?;
            timeout(SEND_TIMEOUT, socket.send(&octets, None)).await??;
        }
    }

    fn answer(&mut self, datagram: Datagram) -> Result<Vec<u8>, Refusal> {
        let (id, outcome) = if datagram.truncated {
            let limit = crate::protocol::MAX_MESSAGE;
            let message = format!("the message is longer than {limit} octets, or has too many descriptors");
            (None, Err(Refusal::new(Code::TooLong, message)))
        } else {
            match Call::decode(&datagram.octets) {
                Ok((id, call)) => (Some(id), self.reply(id, call, datagram.descriptors)),
                Err((id, refusal)) => (id, Err(refusal)),
            }
        };
        outcome.or_else(|refusal| {
            tracing::debug!(code = %refusal.code, message = refusal.message, "refused a client of the latch socket");
            encode(&ServerMessage::Refusal { id, refusal })
        })
    }

    fn reply(&mut self, id: u64, call: Call, descriptors: Vec<OwnedFd>) -> Result<Vec<u8>, Refusal> {
        if self.welcomed == matches!(call, Call::Hello(_)) {
            let message = if self.welcomed { "hello has been said" } else { "say hello first" };
            return Err(Refusal::new(Code::Hello, message));
        }
        let mut descriptors = descriptors.into_iter();
        let (descriptor, more) = (descriptors.next(), descriptors.next());
        let takes_one = matches!(call, Call::Create(_) | Call::Inquire(_));
        if more.is_some() || (descriptor.is_some() && !takes_one) {
            let message = format!("{} takes {} descriptor", call.name(), if takes_one { "one" } else { "no" });
            return Err(Refusal::new(Code::Descriptor, message));
        }
        match call {
            Call::Hello(hello) => reply(id, &self.hello(&hello)?),
            Call::Create(create) => {
                let created = self.create(&create, descriptor)?;
                let latch = LatchId(created.latch);
                reply(id, &created).inspect_err(|_| self.let_go(latch))
            }
            Call::Inquire(inquire) => reply(id, &self.inquire(&inquire, descriptor)?),
            Call::Release(Release { latch }) => {
                if !self.latches.contains_key(&LatchId(latch)) {
                    return Err(Refusal::new(Code::NoSuchLatch, format!("this connection holds no latch {latch}")));
                }
                self.let_go(LatchId(latch));
                reply(id, &serde_json::Map::new())
            }
            Call::List(list) => reply(id, &self.list(&list)),
        }
    }

    fn hello(&mut self, hello: &Hello) -> Result<Welcome, Refusal> {
        if hello.version != VERSION {
            let message = format!("version {} is not spoken here, only {VERSION}", hello.version);
            return Err(Refusal::new(Code::Version, message));
        }
        self.welcomed = true;
        Ok(Welcome { version: VERSION, server: format!("latchkey {}", env!("CARGO_PKG_VERSION")) })
    }

    fn create(&mut self, create: &Create, descriptor: Option<OwnedFd>) -> Result<Created, Refusal> {
        if let Some(reason) = &self.shared.unenforced {
            return Err(Refusal::new(Code::Unenforced, reason.as_str()));
        }
        let wanted = IdentityPattern::parse(&create.peer)
            .map_err(|error| Refusal::new(Code::Identity, format!("peer: {error}")))?;
        let descriptor =
            descriptor.ok_or_else(|| Refusal::new(Code::Descriptor, "create needs the socket as a descriptor"))?;
        let (socket, local, remote) = tcp_socket(descriptor)?;
        let remote = match (remote, create.remote.map(canonical)) {
            (Some(remote), Some(given)) if remote != given => {
                return Err(Refusal::new(Code::Socket, format!("the socket is connected to {remote}, not {given}")));
            }
            (Some(remote), _) | (None, Some(remote)) => remote,
            (None, None) => return Err(Refusal::new(Code::Socket, "the socket is not connected: remote is needed")),
        };
        if self.latches.len() >= self.shared.limits.latches_per_connection {
            return Err(Refusal::new(Code::Limit, "this connection holds too many latches"));
        }
        let permit = Arc::clone(&self.shared.latches)
            .try_acquire_owned()
            .map_err(|_| Refusal::new(Code::Limit, "there are too many latches"))?;
        // Before the latch: from the moment the caller knows of it, the socket has no way around the tunnel.
        if let Some(device) = &self.shared.device {
            bind_to(&socket, device).map_err(|error| {
                Refusal::new(Code::System, format!("binding the socket to the device {device}: {error}"))
            })?;
        }
        let socket = Arc::new(socket);
        let holder = {
            let (alerts, socket, runtime) = (self.alerts.clone(), Arc::clone(&socket), Handle::current());
            Box::new(move |alert: Alert| {
                tracing::info!(latch = alert.latch.0, reason = alert.reason, "latch BROKEN");
                // Nobody listens when the holder is gone already; the reset is due all the same.
                let _ = alerts.send(alert);
                // The application can hold the socket's lock for as long as it likes, by writing from memory that it
                // does not let come: that must not hold up the key manager. The guard drops all packets meanwhile.
                let socket = Arc::clone(&socket);
                runtime.spawn_blocking(move || reset(&socket));
            })
        };
        let (latch, class) = self.shared.database.create(tcp_flow(local, remote), &wanted, holder)?;
        tracing::debug!(latch = latch.0, %local, %remote, "latch ESTABLISHED");
        self.latches.insert(latch, Held { socket, permit });
        let (peer, protection) = describe(&class);
        Ok(Created { latch: latch.0, local, remote, peer, protection })
    }

    fn inquire(&self, inquire: &Inquire, descriptor: Option<OwnedFd>) -> Result<Inquired, Refusal> {
        let given = (inquire.local.map(canonical), inquire.remote.map(canonical));
        let (local, remote) = match descriptor {
            Some(_) if given.0.is_some() => {
                return Err(Refusal::new(Code::Malformed, "local and a descriptor exclude each other"));
            }
            Some(descriptor) => {
                let (_, local, remote) = tcp_socket(descriptor)?;
                (Some(local), remote.or(given.1))
            }
            None => given,
        };
        let (Some(local), Some(remote)) = (local, remote) else {
            return Err(Refusal::new(Code::Malformed, "inquire needs local and remote, or a connected socket"));
        };
        let flow = tcp_flow(local, remote);
        let found = self.shared.database.find(&flow);
        let latch = found.as_ref().map(|(latch, state, _)| LatchInfo { number: latch.0, state: (*state).into() });
        let class = found.map(|(_, _, class)| class).or_else(|| self.shared.database.peer_of(&flow));
        let class = class.ok_or_else(|| {
            Refusal::new(Code::NoSa, format!("no SA protects {flow}, or SAs of more than one class do"))
        })?;
        let (peer, protection) = describe(&class);
        Ok(Inquired { local, remote, latch, peer, protection })
    }

    fn list(&self, list: &List) -> Listed {
        let mut latches = self.shared.database.list_after(LatchId(list.after), LIST_LENGTH + 1);
        let more = latches.len() > LIST_LENGTH;
        latches.truncate(LIST_LENGTH);
        let latches = latches.into_iter().map(|(latch, flow, state, class)| ListedLatch {
            latch: latch.0,
            state: state.into(),
            protocol: flow.protocol,
            local: SocketAddr::new(flow.local, flow.local_port),
            remote: SocketAddr::new(flow.remote, flow.remote_port),
            peer: class.peer.id.to_string().chars().take(200).collect(),
        });
        Listed { latches: latches.collect(), more }
    }

    fn let_go(&mut self, latch: LatchId) {
        if let Some(held) = self.latches.remove(&latch) {
            self.wind_down(latch, held);
        }
    }

    /// Ends the TCP connection and then the latch, in the background.
    fn wind_down(&self, latch: LatchId, held: Held) {
        let shared = Arc::clone(&self.shared);
        // A socket that is not connected says so; it is reset below.
        let _ = held.socket.shutdown(std::net::Shutdown::Both);
        tokio::spawn(async move {
            let Held { socket, permit } = held;
            let deadline = Instant::now() + LINGER;
            let mut pause = Duration::from_millis(5);
            // The kernel forgets the peer's address when the connection has come to its end.
            while socket.peer_addr().is_ok() && Instant::now() < deadline {
                sleep(pause).await;
                pause = (pause * 2).min(Duration::from_secs(1));
            }
            reset(&socket);
            // The application may still hold the socket and connect it anew, without a latch: lead it nowhere.
            if shared.device.is_some()
                && let Err(error) = socket.bind_device(Some(b"lo"))
            {
                tracing::debug!(latch = latch.0, %error, "binding a socket that lost its latch to the loopback device");
            }
            shared.database.release(latch);
            tracing::debug!(latch = latch.0, "latch released");
            drop(permit);
        });
    }
}

fn reply<T: Serialize>(id: u64, result: &T) -> Result<Vec<u8>, Refusal> {
    let result = serde_json::to_value(result).map_err(|error| Refusal::new(Code::System, error.to_string()))?;
    encode(&ServerMessage::Reply { id, result })
}

/// A reset as if the peer had sent it (RFC 5660 §5.5 b): throws away what is queued both ways. Unlike `shutdown`, which
/// readers take for an orderly end, it makes every call on the socket fail.
fn reset(socket: &Socket) {
    if let Err(error) = rustix::net::connect_unspec(socket.as_fd()) {
        tracing::debug!(%error, "resetting a latched socket; shutting it down instead");
        let _ = socket.shutdown(std::net::Shutdown::Both);
    }
}

/// Checks that a descriptor is a TCP socket with an address and port of its own; gives both ends.
fn tcp_socket(descriptor: OwnedFd) -> Result<(Socket, SocketAddr, Option<SocketAddr>), Refusal> {
    let refuse = |what: &str| Refusal::new(Code::Socket, format!("the descriptor is {what}"));
    let system = |error: io::Error| Refusal::new(Code::Socket, format!("the descriptor is not a TCP socket: {error}"));
    let socket = Socket::from(descriptor);
    let ip = matches!(socket.domain().map_err(system)?, Domain::IPV4 | Domain::IPV6);
    let stream = socket.r#type().map_err(system)? == Type::STREAM;
    if !ip || !stream || socket.protocol().map_err(system)? != Some(Protocol::TCP) {
        return Err(refuse("not a TCP socket"));
    }
    if socket.is_listener().map_err(system)? {
        return Err(refuse("a listening socket: only connections are latched"));
    }
    let local = socket.local_addr().map_err(system)?.as_socket().map(canonical);
    let Some(local) = local.filter(|local| !local.ip().is_unspecified() && local.port() != 0) else {
        return Err(refuse("not bound to an address and a port"));
    };
    let remote = match socket.peer_addr() {
        Ok(remote) => remote.as_socket().map(canonical),
        Err(error) if error.kind() == io::ErrorKind::NotConnected => None,
        Err(error) => return Err(system(error)),
    };
    Ok((socket, local, remote))
}

fn bind_to(socket: &Socket, device: &str) -> io::Result<()> {
    // To bind anew, even to the same device, takes a privilege.
    if socket.device()?.as_deref() == Some(device.as_bytes()) {
        return Ok(());
    }
    socket.bind_device(Some(device.as_bytes()))
}

/// An IPv6 socket that speaks IPv4 has mapped addresses; its packets have not.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn tcp_flow(local: SocketAddr, remote: SocketAddr) -> Flow {
    Flow { protocol: TCP, local: local.ip(), local_port: local.port(), remote: remote.ip(), remote_port: remote.port() }
}

fn describe(class: &Class) -> (Peer, Protection) {
    (class.into(), class.into())
}

#[cfg(test)]
mod tests;
