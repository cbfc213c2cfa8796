//! The library that applications use: a TCP connection that is pinned to an IPsec peer.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use tokio::io::AsyncWriteExt;
//!
//! let client = latchkey_latch::client::Client::connect("/run/latchkey/latch.sock").await?;
//! let mut stream = client.latch_tcp("192.0.2.7:5432".parse()?, None, "db.example.org").await?;
//! println!("talking to {}", stream.peer_identity().id.text);
//! stream.write_all(b"hello").await?;
//! # Ok(())
//! # }
//! ```

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use rustix::net::SocketAddrUnix;
use serde::de::DeserializeOwned;
use serde_json::Value;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;

use crate::protocol::{
    Call, Create, Created, Hello, Inquire, Inquired, List, Listed, ListedLatch, Peer, Protection, Refusal, Release,
    ServerMessage, State, VERSION, Welcome,
};
use crate::seqpacket::{self, SeqPacket};

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The daemon refused; nothing is latched.
    #[error("the daemon refused: {0}")]
    Refused(#[from] Refusal),
    /// The system refused.
    #[error("{action}: {source}")]
    System {
        /// What we tried to do.
        action: String,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The daemon says what it should not.
    #[error("the daemon does not keep to the protocol: {0}")]
    Protocol(String),
    /// The connection to the daemon has ended.
    #[error("the connection to the daemon has ended")]
    Closed,
}

/// A connection to the daemon; clones share it. It stays open until the last clone and the last [`LatchedStream`] are
/// dropped.
#[derive(Clone, Debug)]
pub struct Client {
    shared: Arc<Shared>,
}

/// How a latch ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Broken {
    /// State of the latch; `Closed` when the daemon went away.
    pub state: State,
    /// Why, for a human.
    pub reason: String,
}

/// A TCP connection under a latch. Dropping it closes the connection in an orderly way and releases the latch afterwards.
///
/// When the latch breaks, or the daemon goes away, reading and writing fail with `ConnectionReset`; it never looks like
/// an orderly end.
#[derive(Debug)]
pub struct LatchedStream {
    // Dropped in this order: the connection before the latch.
    stream: TcpStream,
    broken: watch::Receiver<Option<Broken>>,
    wake_reader: Waiting,
    wake_writer: Waiting,
    created: Created,
    _latch: Holding,
}

impl Client {
    /// Connects to the daemon's socket and agrees on the version. Must be called inside a tokio runtime.
    pub async fn connect(path: impl AsRef<Path>) -> Result<Self, ClientError> {
        let path = path.as_ref();
        let connect = || -> io::Result<SeqPacket> {
            let socket = seqpacket::socket()?;
            rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
            SeqPacket::new(socket)
        };
        let socket = connect().map_err(|source| system(format!("connecting to {}", path.display()), source))?;
        let (socket, state) = (Arc::new(socket), Arc::new(Mutex::new(Registry::default())));
        let reader = tokio::spawn(read(Arc::clone(&socket), Arc::clone(&state)));
        let client = Self { shared: Arc::new(Shared { socket, state, last_id: AtomicU64::new(0), reader }) };
        let welcome: Welcome = client.shared.call(Call::Hello(Hello { version: VERSION }), None).await?;
        if welcome.version != VERSION {
            return Err(ClientError::Protocol(format!("it answers in version {}", welcome.version)));
        }
        Ok(client)
    }

    /// Connects to `remote` by TCP, latched to an IPsec peer whose identity matches `peer` (notation of
    /// `swanctl.conf`: `db.example.org`, `*@example.org`, `C=CH, CN=*`, `%any`).
    ///
    /// Without `local` the kernel's choice of address for this destination is taken, and a free port; with port 0 a free
    /// port of that address. No packet leaves unless the latch stands.
    pub async fn latch_tcp(
        &self,
        remote: SocketAddr,
        local: Option<SocketAddr>,
        peer: &str,
    ) -> Result<LatchedStream, ClientError> {
        let local = match local {
            Some(local) => local,
            None => {
                source_for(remote).map_err(|error| system(format!("finding an address to reach {remote}"), error))?
            }
        };
        let socket = bound_socket(local).map_err(|error| system(format!("binding to {local}"), error))?;
        let create = Call::Create(Create { peer: peer.to_owned(), remote: Some(remote) });
        let created: Created = self.shared.call(create, Some(socket.as_fd())).await?;
        let latch = Holding { shared: Arc::clone(&self.shared), latch: created.latch };
        let broken = self.shared.registry().watch(created.latch);
        let stream = TcpSocket::from_std_stream(socket.into())
            .connect(remote)
            .await
            .map_err(|error| system(format!("connecting to {remote}"), error))?;
        Ok(LatchedStream {
            wake_reader: Waiting::on(&broken),
            wake_writer: Waiting::on(&broken),
            stream,
            broken,
            created,
            _latch: latch,
        })
    }

    /// Who is at the other end of a TCP flow at this moment, latched or not, and the flow's latch.
    pub async fn whois(&self, local: SocketAddr, remote: SocketAddr) -> Result<Inquired, ClientError> {
        let inquire = Inquire { local: Some(local), remote: Some(remote) };
        self.shared.call(Call::Inquire(inquire), None).await
    }

    /// As [`Client::whois`], for a connected TCP socket.
    pub async fn whois_socket(&self, socket: BorrowedFd<'_>) -> Result<Inquired, ClientError> {
        self.shared.call(Call::Inquire(Inquire { local: None, remote: None }), Some(socket)).await
    }

    /// All latches of the daemon, by number.
    pub async fn list(&self) -> Result<Vec<ListedLatch>, ClientError> {
        let mut latches: Vec<ListedLatch> = Vec::new();
        loop {
            let after = latches.last().map_or(0, |latch| latch.latch);
            let Listed { latches: page, more } = self.shared.call(Call::List(List { after }), None).await?;
            // A page must move on, or this would never end.
            if more && page.last().is_none_or(|latch| latch.latch <= after) {
                return Err(ClientError::Protocol("its list does not advance".to_owned()));
            }
            latches.extend(page);
            if !more {
                return Ok(latches);
            }
        }
    }
}

impl LatchedStream {
    /// Who is at the other end, and how it proved that.
    pub fn peer_identity(&self) -> &Peer {
        &self.created.peer
    }

    /// How the packets are protected, for as long as the latch stands.
    pub fn protection(&self) -> &Protection {
        &self.created.protection
    }

    /// Number of the latch in the daemon.
    pub fn latch(&self) -> u64 {
        self.created.latch
    }

    /// Our end of the connection.
    pub fn local_addr(&self) -> SocketAddr {
        self.created.local
    }

    /// The other end of the connection.
    pub fn peer_addr(&self) -> SocketAddr {
        self.created.remote
    }

    /// Waits until the latch breaks (ALERT, RFC 5660 §2.3). The future does not borrow the stream.
    pub fn broken(&self) -> impl Future<Output = Broken> + Send + use<> {
        wait(self.broken.clone())
    }

    fn failure(&self) -> Option<io::Error> {
        self.broken.borrow().as_ref().map(failure)
    }
}

impl AsyncRead for LatchedStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if let Poll::Ready(error) = self.wake_reader.poll(cx) {
            return Poll::Ready(Err(error));
        }
        let before = buf.filled().len();
        let result = Pin::new(&mut self.stream).poll_read(cx, buf);
        // An end that comes with the break is not the peer's end.
        match self.failure() {
            Some(error) if result.is_ready() && buf.filled().len() == before => Poll::Ready(Err(error)),
            _ => result,
        }
    }
}

impl AsyncWrite for LatchedStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if let Poll::Ready(error) = self.wake_writer.poll(cx) {
            return Poll::Ready(Err(error));
        }
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl Drop for LatchedStream {
    fn drop(&mut self) {
        // The daemon has a duplicate, so that closing ours does not end the connection.
        let _ = SockRef::from(&self.stream).shutdown(std::net::Shutdown::Write);
    }
}

/// A break, waited for by one task. Reading and writing may happen in different tasks, so each has its own.
struct Waiting {
    broken: Pin<Box<dyn Future<Output = Broken> + Send + Sync>>,
    seen: Option<Broken>,
}

impl Waiting {
    fn on(broken: &watch::Receiver<Option<Broken>>) -> Self {
        Self { broken: Box::pin(wait(broken.clone())), seen: None }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        if self.seen.is_none()
            && let Poll::Ready(broken) = self.broken.as_mut().poll(cx)
        {
            self.seen = Some(broken);
        }
        self.seen.as_ref().map_or(Poll::Pending, |broken| Poll::Ready(failure(broken)))
    }
}

impl std::fmt::Debug for Waiting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Waiting").field(&self.seen).finish()
    }
}

/// A latch that is released when this is dropped.
#[derive(Debug)]
struct Holding {
    shared: Arc<Shared>,
    latch: u64,
}

impl Drop for Holding {
    fn drop(&mut self) {
        self.shared.registry().latches.remove(&self.latch);
        let id = self.shared.next_id();
        release(&self.shared.socket, id, self.latch);
    }
}

#[derive(Debug)]
struct Shared {
    socket: Arc<SeqPacket>,
    state: Arc<Mutex<Registry>>,
    last_id: AtomicU64,
    reader: JoinHandle<()>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

#[derive(Debug, Default)]
struct Registry {
    closed: bool,
    pending: HashMap<u64, oneshot::Sender<Result<Value, ClientError>>>,
    latches: HashMap<u64, watch::Sender<Option<Broken>>>,
}

impl Registry {
    fn latch(&mut self, latch: u64) -> &watch::Sender<Option<Broken>> {
        let state = self.closed.then(gone);
        self.latches.entry(latch).or_insert_with(|| watch::Sender::new(state))
    }

    fn watch(&mut self, latch: u64) -> watch::Receiver<Option<Broken>> {
        self.latch(latch).subscribe()
    }
}

impl Shared {
    async fn call<T: DeserializeOwned>(&self, call: Call, socket: Option<BorrowedFd<'_>>) -> Result<T, ClientError> {
        let id = self.next_id();
        let octets = call.encode(id)?;
        let (sender, receiver) = oneshot::channel();
        {
            let mut registry = self.registry();
            if registry.closed {
                return Err(ClientError::Closed);
            }
            registry.pending.insert(id, sender);
        }
        if let Err(source) = self.socket.send(&octets, socket).await {
            self.registry().pending.remove(&id);
            return Err(system(format!("sending {} to the daemon", call.name()), source));
        }
        let value = receiver.await.unwrap_or(Err(ClientError::Closed))?;
        serde_json::from_value(value).map_err(|error| ClientError::Protocol(format!("{}: {error}", call.name())))
    }

    fn next_id(&self) -> u64 {
        self.last_id.fetch_add(1, Ordering::Relaxed) + 1
    }

    fn registry(&self) -> MutexGuard<'_, Registry> {
        lock(&self.state)
    }
}

/// Hands the daemon's messages out until the connection ends; then everything that waits hears so.
async fn read(socket: Arc<SeqPacket>, state: Arc<Mutex<Registry>>) {
    while let Ok(Some(datagram)) = socket.receive().await {
        let Ok(message) = serde_json::from_slice::<ServerMessage>(&datagram.octets) else {
            tracing::debug!("the daemon sent a message that is not one");
            break;
        };
        let mut registry = lock(&state);
        match message {
            ServerMessage::Reply { id, result } => {
                let unheard = match registry.pending.remove(&id) {
                    Some(caller) => caller.send(Ok(result)).err().and_then(Result::ok),
                    None => Some(result),
                };
                // The caller of `create` gave up: nobody will use or release this latch.
                if let Some(latch) = unheard.as_ref().and_then(|result| result.get("latch")?.as_u64()) {
                    release(&socket, 0, latch);
                }
            }
            ServerMessage::Refusal { id: Some(id), refusal } => {
                if let Some(caller) = registry.pending.remove(&id) {
                    let _ = caller.send(Err(refusal.into()));
                }
            }
            // Not an answer to one request: the daemon understood none of it, or has no room.
            ServerMessage::Refusal { id: None, refusal } => {
                for (_, caller) in registry.pending.drain() {
                    let _ = caller.send(Err(refusal.clone().into()));
                }
            }
            ServerMessage::Alert { latch, state, reason } => {
                registry.latch(latch).send_replace(Some(Broken { state, reason }));
            }
        }
    }
    let mut registry = lock(&state);
    registry.closed = true;
    for (_, caller) in registry.pending.drain() {
        let _ = caller.send(Err(ClientError::Closed));
    }
    for latch in registry.latches.values() {
        latch.send_if_modified(|broken| {
            let alive = broken.is_none();
            if alive {
                *broken = Some(gone());
            }
            alive
        });
    }
}

fn release(socket: &SeqPacket, id: u64, latch: u64) {
    let Ok(octets) = Call::Release(Release { latch }).encode(id) else { return };
    // If there is no room the latch lives as long as the connection to the daemon.
    if let Err(error) = socket.try_send(&octets) {
        tracing::debug!(latch, %error, "releasing a latch");
    }
}

async fn wait(mut broken: watch::Receiver<Option<Broken>>) -> Broken {
    let seen = broken.wait_for(Option::is_some).await.ok().and_then(|broken| broken.clone());
    seen.unwrap_or_else(gone)
}

fn gone() -> Broken {
    Broken { state: State::Closed, reason: "the connection to the daemon has ended".to_owned() }
}

fn failure(broken: &Broken) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, format!("the latch is broken: {}", broken.reason))
}

/// The address from which the kernel would reach `remote`, with port 0. Sends nothing.
fn source_for(remote: SocketAddr) -> io::Result<SocketAddr> {
    let unspecified = match remote.ip() {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let probe = UdpSocket::bind((unspecified, 0))?;
    probe.connect(remote)?;
    Ok(SocketAddr::new(probe.local_addr()?.ip(), 0))
}

fn bound_socket(local: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(local), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    socket.bind(&local.into())?;
    Ok(socket)
}

fn system(action: String, source: io::Error) -> ClientError {
    ClientError::System { action, source }
}

fn lock(state: &Mutex<Registry>) -> MutexGuard<'_, Registry> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}
