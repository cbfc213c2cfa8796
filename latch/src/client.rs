//! The library that applications use: TCP connections, listeners and UDP sockets that are pinned to an IPsec peer.
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

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Instant;

use serde::de::DeserializeOwned;
use serde_json::Value;
use socket2::{Protocol, SockRef, Socket, Type};
use tokio::net::TcpSocket;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::timeout_at;

use crate::protocol::{
    Bypassed, Bypassing, Call, Created, Disposition, Guard, Hello, Inquire, Inquired, LatchEvent, List, ListedLatch,
    Listening, Named, VERSION, Wanted, Watch, Welcome,
};
pub use crate::roster::UdpPeer;
use crate::seqpacket::SeqPacket;
use crate::session::{self, BACKLOG, EVENT_QUEUE, Heard, Registry, bound_socket, system};
pub use crate::session::{Change, ClientError};

mod endpoint;
mod sockets;

pub use endpoint::UdpEndpoint;

pub use sockets::{
    OwnedReadHalf, OwnedWriteHalf, ReadHalf, ReuniteError, TcpListener, TcpStream, UdpSocket, WriteHalf,
};

/// A connection to the daemon; clones share it. It stays open until the last clone and the last socket under a latch are
/// dropped.
#[derive(Clone, Debug)]
pub struct Client {
    shared: Arc<Shared>,
}

/// Changes of all latches of the daemon.
#[derive(Debug)]
pub struct Events {
    events: mpsc::Receiver<LatchEvent>,
    _shared: Arc<Shared>,
}

impl Client {
    /// Connects to the daemon's socket and agrees on the version. Must be called inside a tokio runtime.
    pub async fn connect(path: impl AsRef<Path>) -> Result<Self, ClientError> {
        let path = path.as_ref();
        let socket = session::connect(path).and_then(SeqPacket::new);
        let socket = socket.map_err(|source| system(format!("connecting to {}", path.display()), source))?;
        let (socket, state) = (Arc::new(socket), Arc::new(Mutex::new(Registry::default())));
        let reader = tokio::spawn(read(Arc::clone(&socket), Arc::clone(&state)));
        let client = Self { shared: Arc::new(Shared { socket, state, last_id: AtomicU64::new(0), reader }) };
        let welcome: Welcome = client.shared.call(Call::Hello(Hello { version: VERSION }), None).await?;
        session::welcomed(&welcome)?;
        client.shared.registry().revision = welcome.revision;
        Ok(client)
    }

    /// Connects to `remote` by TCP, latched to an IPsec peer whose identity matches (notation of `swanctl.conf`:
    /// `db.example.org`, `*@example.org`, `C=CH, CN=*`, `%any`), and under what protection, if that is [`Wanted`].
    ///
    /// Without `local` the kernel's choice of address for this destination is taken, and a free port; with port 0 a free
    /// port of that address. No packet leaves unless the latch stands.
    pub async fn latch_tcp(
        &self,
        remote: SocketAddr,
        local: Option<SocketAddr>,
        wanted: impl Into<Wanted>,
    ) -> Result<TcpStream, ClientError> {
        let socket = bound_socket(remote, local, Type::STREAM, Protocol::TCP)?;
        let latch = self.create(&socket, remote, wanted.into(), Disposition::Reset).await?;
        let stream = TcpSocket::from_std_stream(socket.into())
            .connect(remote)
            .await
            .map_err(|error| system(format!("connecting to {remote}"), error))?;
        Ok(TcpStream::new(stream, latch))
    }

    /// A UDP socket that is connected to `remote`, latched like [`Client::latch_tcp`].
    pub async fn latch_udp(
        &self,
        remote: SocketAddr,
        local: Option<SocketAddr>,
        wanted: impl Into<Wanted>,
    ) -> Result<UdpSocket, ClientError> {
        let socket = bound_socket(remote, local, Type::DGRAM, Protocol::UDP)?;
        let latch = self.create(&socket, remote, wanted.into(), Disposition::Wait).await?;
        let connect = || {
            socket.connect(&remote.into())?;
            tokio::net::UdpSocket::from_std(socket.into())
        };
        let socket = connect().map_err(|error| system(format!("connecting to {remote}"), error))?;
        Ok(UdpSocket::new(socket, latch))
    }

    /// Listens on `local`, for IPsec peers as wanted only: others do not get as far as a connection.
    pub async fn listen_tcp(&self, local: SocketAddr, wanted: impl Into<Wanted>) -> Result<TcpListener, ClientError> {
        let failed = |error| system(format!("listening on {local}"), error);
        let socket = session::listening_socket(local).map_err(failed)?;
        let wanted = wanted.into();
        let on_break = wanted.on_break.unwrap_or(Disposition::Reset);
        // The latch comes first: nobody gets in before.
        let listening: Listening = self.shared.call(Call::Listen(wanted), Some(socket.as_fd())).await?;
        self.shared.registry().ignore_children(listening.latch);
        let latch = Holding { shared: Arc::clone(&self.shared), latch: listening.latch };
        socket.listen(BACKLOG).map_err(failed)?;
        let listener = tokio::net::TcpListener::from_std(socket.into()).map_err(failed)?;
        Ok(TcpListener::new(listener, listening, on_break, latch))
    }

    /// A UDP socket at `local`, an address and a port, that talks with many without being connected: IPsec peers as wanted can
    /// send to it, others do not get through, and each datagram comes with who sent it.
    pub async fn bind_udp(&self, local: SocketAddr, wanted: impl Into<Wanted>) -> Result<UdpEndpoint, ClientError> {
        let socket = session::datagram_socket(local);
        let socket = socket.map_err(|error| system(format!("binding to {local}"), error))?;
        self.latch_datagrams(socket.into(), wanted).await
    }

    /// As [`Client::bind_udp`], with a socket that is bound to an address and not connected. What waits in its queue is dropped.
    pub async fn latch_datagrams(
        &self,
        socket: std::net::UdpSocket,
        wanted: impl Into<Wanted>,
    ) -> Result<UdpEndpoint, ClientError> {
        let failed = |error| system("making a socket asynchronous".to_owned(), error);
        socket.set_nonblocking(true).map_err(failed)?;
        let wanted = Wanted { quiet: false, ..wanted.into() };
        let on_break = wanted.on_break.unwrap_or(Disposition::Reset);
        let listening: Listening = self.shared.call(Call::Listen(wanted), Some(socket.as_fd())).await?;
        let latch = Holding { shared: Arc::clone(&self.shared), latch: listening.latch };
        let socket = tokio::net::UdpSocket::from_std(socket).map_err(failed)?;
        Ok(UdpEndpoint::new(socket, &listening, on_break, latch))
    }

    /// Changes of all latches from now on; one call for each connection to the daemon.
    pub async fn watch(&self) -> Result<Events, ClientError> {
        let (sender, events) = mpsc::channel(EVENT_QUEUE);
        self.shared.registry().watcher = Some(sender);
        let _: Value = self.shared.call(Call::Watch(Watch {}), None).await?;
        Ok(Events { events, _shared: Arc::clone(&self.shared) })
    }

    /// A connection latch by its number.
    pub async fn show(&self, latch: u64) -> Result<Inquired, ClientError> {
        self.shared.call(Call::Show(Named { latch }), None).await
    }

    /// Breaks a latch of anybody for good; for root, and who runs the daemon.
    pub async fn break_latch(&self, latch: u64) -> Result<(), ClientError> {
        self.shared.call::<Value>(Call::Break(Named { latch }), None).await.map(drop)
    }

    /// Closes a latch of anybody, as if the peer had reset the connection; for root, and who runs the daemon.
    pub async fn close_latch(&self, latch: u64) -> Result<(), ClientError> {
        self.shared.call::<Value>(Call::Close(Named { latch }), None).await.map(drop)
    }

    /// Has the connection of a TCP or UDP socket to `remote` go in clear although the policy protects it (RFC 5660 §3.1), and none of
    /// it otherwise; for whom may. Connect the socket afterwards. One that is not bound is bound to the kernel's choice of
    /// address for `remote`; what waits in the queue of a UDP socket is dropped.
    pub async fn bypass_socket(&self, socket: impl AsFd, remote: SocketAddr) -> Result<Bypass, ClientError> {
        session::bind_for(&SockRef::from(&socket), remote)?;
        let call = Call::Bypass(Bypassing { remote: Some(remote) });
        let bypassed: Bypassed = self.shared.call(call, Some(socket.as_fd())).await?;
        let changes = self.shared.registry().watch(bypassed.latch);
        let holding = Holding { shared: Arc::clone(&self.shared), latch: bypassed.latch };
        Ok(Bypass { changes, bypassed, _holding: holding })
    }

    async fn create(
        &self,
        socket: &Socket,
        remote: SocketAddr,
        mut wanted: Wanted,
        default: Disposition,
    ) -> Result<Latched, ClientError> {
        wanted.remote = Some(remote);
        let on_break = *wanted.on_break.get_or_insert(default);
        let created: Created = self.shared.call(Call::Create(wanted), Some(socket.as_fd())).await?;
        Ok(Latched::new(&self.shared, created, on_break))
    }

    /// Who is at the other end of a TCP flow at this moment, latched or not, and the flow's latch.
    pub async fn whois(&self, local: SocketAddr, remote: SocketAddr) -> Result<Inquired, ClientError> {
        self.whois_flow(Inquire { local: Some(local), remote: Some(remote), protocol: None }).await
    }

    /// As [`Client::whois`], for a flow of TCP or UDP.
    pub async fn whois_flow(&self, inquire: Inquire) -> Result<Inquired, ClientError> {
        self.shared.call(Call::Inquire(inquire), None).await
    }

    /// As [`Client::whois`], for a connected TCP or UDP socket.
    pub async fn whois_socket(&self, socket: BorrowedFd<'_>) -> Result<Inquired, ClientError> {
        let inquire = Inquire { local: None, remote: None, protocol: None };
        self.shared.call(Call::Inquire(inquire), Some(socket)).await
    }

    /// All latches of the daemon, by number.
    pub async fn list(&self) -> Result<Vec<ListedLatch>, ClientError> {
        let mut latches: Vec<ListedLatch> = Vec::new();
        loop {
            let after = latches.last().map_or(0, |latch| latch.latch);
            if !session::add_page(&mut latches, self.shared.call(Call::List(List { after }), None).await?)? {
                return Ok(latches);
            }
        }
    }
}

/// A connection that is to be clear; released when it is dropped, which ends the connection.
#[derive(Debug)]
pub struct Bypass {
    changes: watch::Receiver<Option<Change>>,
    bypassed: Bypassed,
    _holding: Holding,
}

impl Bypass {
    /// Number of the latch in the daemon.
    pub fn latch(&self) -> u64 {
        self.bypassed.latch
    }

    /// Our end of the connection.
    pub fn local_addr(&self) -> SocketAddr {
        self.bypassed.local
    }

    /// The other end of the connection.
    pub fn peer_addr(&self) -> SocketAddr {
        self.bypassed.remote
    }

    /// What keeps its packets from being protected.
    pub fn guard(&self) -> Option<Guard> {
        self.bypassed.guard
    }

    /// Changes of its state from now on. One that is not ESTABLISHED any more has ended the connection.
    pub fn changes(&self) -> Changes {
        let mut changes = self.changes.clone();
        changes.mark_unchanged();
        Changes { changes }
    }
}

/// The changes of one latch's state.
#[derive(Debug)]
pub struct Changes {
    changes: watch::Receiver<Option<Change>>,
}

impl Changes {
    /// The next one; `Closed` for ever once the socket or the daemon has gone.
    pub async fn next(&mut self) -> Change {
        loop {
            if self.changes.changed().await.is_err() {
                return Change::gone();
            }
            if let Some(change) = self.changes.borrow_and_update().clone() {
                return change;
            }
        }
    }
}

impl Events {
    /// The next one; `None` when the connection to the daemon has ended.
    pub async fn next(&mut self) -> Option<LatchEvent> {
        self.events.recv().await
    }

    /// As [`Self::next`], for streams.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<LatchEvent>> {
        self.events.poll_recv(cx)
    }
}

/// A latch that we hold for a connection.
#[derive(Debug)]
struct Latched {
    changes: watch::Receiver<Option<Change>>,
    created: Created,
    on_break: Disposition,
    holding: Holding,
}

impl Latched {
    fn new(shared: &Arc<Shared>, created: Created, on_break: Disposition) -> Self {
        let changes = shared.registry().watch(created.latch);
        let holding = Holding { shared: Arc::clone(shared), latch: created.latch };
        Self { changes, created, on_break, holding }
    }

    /// What ends the connection.
    fn end(&self) -> impl Future<Output = Change> + Send + Sync + use<> {
        let on_break = self.on_break;
        wait(self.changes.clone(), move |change| change.is_end(on_break))
    }

    fn waiting(&self) -> Waiting {
        Waiting { end: Box::pin(self.end()), seen: None }
    }

    fn failure(&self) -> Option<io::Error> {
        self.changes.borrow().as_ref().filter(|change| change.is_end(self.on_break)).map(Change::failure)
    }
}

/// The end, waited for by one task. Reading and writing may happen in different tasks, so each has its own.
struct Waiting {
    end: Pin<Box<dyn Future<Output = Change> + Send + Sync>>,
    seen: Option<Change>,
}

impl Waiting {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        if self.seen.is_none()
            && let Poll::Ready(change) = self.end.as_mut().poll(cx)
        {
            self.seen = Some(change);
        }
        self.seen.as_ref().map_or(Poll::Pending, |change| Poll::Ready(change.failure()))
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
        self.shared.registry().forget(self.latch);
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

impl Shared {
    async fn call<T: DeserializeOwned>(&self, call: Call, socket: Option<BorrowedFd<'_>>) -> Result<T, ClientError> {
        let id = self.next_id();
        let call = session::asking_for_progress(call, self.registry().revision);
        let octets = call.encode(id)?;
        let mut receiver = self.registry().expect(id, &call)?;
        let asked = Instant::now();
        let until = self.silent_at(asked);
        let sent = timeout_at(until.into(), self.socket.send(&octets, socket)).await;
        if let Err(source) = sent.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
            self.registry().pending.remove(&id);
            return Err(system(format!("sending {} to the daemon", call.name()), source));
        }
        loop {
            let until = self.silent_at(asked);
            match timeout_at(until.into(), &mut receiver).await {
                Ok(outcome) => return session::result(call.name(), outcome.unwrap_or(Err(ClientError::Closed))?),
                Err(_) if self.silent_at(asked) > until => {}
                Err(_) => return Err(ClientError::Silent(asked.elapsed())),
            }
        }
    }

    fn silent_at(&self, asked: Instant) -> Instant {
        self.registry().silent_at(asked)
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
        let heard = lock(&state).hear(&datagram.octets);
        match heard {
            Some(Heard::Unwanted(latch)) => release(&socket, 0, latch),
            Some(Heard::Handed | Heard::Changed(_)) => {}
            None => break,
        }
    }
    lock(&state).end();
}

fn release(socket: &SeqPacket, id: u64, latch: u64) {
    let Some(octets) = session::release(id, latch) else { return };
    // If there is no room the latch lives as long as the connection to the daemon.
    if let Err(error) = socket.try_send(&octets) {
        tracing::debug!(latch, %error, "releasing a latch");
    }
}

async fn wait(mut changes: watch::Receiver<Option<Change>>, what: impl Fn(&Change) -> bool + Send + Sync) -> Change {
    let seen =
        changes.wait_for(|change| change.as_ref().is_some_and(&what)).await.ok().and_then(|change| change.clone());
    seen.unwrap_or_else(Change::gone)
}

fn lock(state: &Mutex<Registry>) -> MutexGuard<'_, Registry> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}
