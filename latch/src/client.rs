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

use serde::de::DeserializeOwned;
use serde_json::Value;
use socket2::{Protocol, SockRef, Socket, Type};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpSocket;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::protocol::{
    Accept, Bind, Call, ChannelBinding, Code, Created, Disposition, Hello, Inquire, Inquired, LatchEvent, List,
    ListedLatch, Listening, Named, Peer, Protection, State, UNIQUE_BINDING, VERSION, Wanted, Watch, Welcome,
};
use crate::seqpacket::SeqPacket;
use crate::session::{self, BACKLOG, EVENT_QUEUE, Heard, Registry, bound_socket, system};
pub use crate::session::{Change, ClientError};

/// A connection to the daemon; clones share it. It stays open until the last clone and the last socket under a latch are
/// dropped.
#[derive(Clone, Debug)]
pub struct Client {
    shared: Arc<Shared>,
}

/// A TCP connection under a latch. Dropping it closes the connection in an orderly way and releases the latch afterwards.
///
/// When the latch breaks, or the daemon goes away, reading and writing fail with `ConnectionReset`; it never looks like
/// an orderly end. With another disposition than `reset` a break is loss of packets only, until the latch is ESTABLISHED
/// again.
#[derive(Debug)]
pub struct TcpStream {
    // Dropped in this order: the connection before the latch.
    stream: tokio::net::TcpStream,
    wake_reader: Waiting,
    wake_writer: Waiting,
    latch: Latched,
}

/// A listening TCP socket under a listener latch: each connection that it accepts has a latch since before its first octet.
#[derive(Debug)]
pub struct TcpListener {
    listener: tokio::net::TcpListener,
    listening: Listening,
    on_break: Disposition,
    latch: Holding,
}

/// A connected UDP socket under a latch. When the latch breaks for good, sending and receiving fail with
/// `ConnectionReset`; until then a break is loss of datagrams, unless the disposition is `reset`.
#[derive(Debug)]
pub struct UdpSocket {
    socket: tokio::net::UdpSocket,
    latch: Latched,
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
        Ok(UdpSocket { socket, latch })
    }

    /// Listens on `local`, for IPsec peers as wanted only: others do not get as far as a connection.
    pub async fn listen_tcp(&self, local: SocketAddr, wanted: impl Into<Wanted>) -> Result<TcpListener, ClientError> {
        let failed = |error| system(format!("listening on {local}"), error);
        let socket = session::listening_socket(local).map_err(failed)?;
        let wanted = wanted.into();
        let on_break = wanted.on_break.unwrap_or(Disposition::Reset);
        // The latch comes first: nobody gets in before.
        let listening: Listening = self.shared.call(Call::Listen(wanted), Some(socket.as_fd())).await?;
        let latch = Holding { shared: Arc::clone(&self.shared), latch: listening.latch };
        socket.listen(BACKLOG).map_err(failed)?;
        let listener = tokio::net::TcpListener::from_std(socket.into()).map_err(failed)?;
        Ok(TcpListener { listener, listening, on_break, latch })
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

macro_rules! describe_latch {
    () => {
        /// Who is at the other end, and how it proved that.
        pub fn peer_identity(&self) -> &Peer {
            &self.latch.created.peer
        }

        /// How the packets are protected, for as long as the latch stands.
        pub fn protection(&self) -> &Protection {
            &self.latch.created.protection
        }

        /// Number of the latch in the daemon.
        pub fn latch(&self) -> u64 {
            self.latch.created.latch
        }

        /// What a protocol above can bind its authentication to (RFC 5056): a relay between two channels has another at
        /// each end. The same for as long as the latch stands.
        pub async fn channel_binding(&self) -> Result<ChannelBinding, ClientError> {
            self.channel_binding_of(UNIQUE_BINDING).await
        }

        /// A channel binding of a type that `docs/latch-protocol.md` has.
        pub async fn channel_binding_of(&self, kind: &str) -> Result<ChannelBinding, ClientError> {
            let bind = Bind { latch: self.latch(), kind: kind.to_owned() };
            self.latch.holding.shared.call(Call::ChannelBinding(bind), None).await
        }

        /// The same for connections to the same peer with the same credential under the same protection (RFC 5660 §6.3), if
        /// the daemon tells.
        pub fn class(&self) -> Option<u32> {
            self.latch.created.class
        }

        /// Asks the daemon for all that it knows of the latch at this moment (INQUIRE_LATCH): outer addresses too.
        pub async fn inquire(&self) -> Result<Inquired, ClientError> {
            self.latch.holding.shared.call(Call::Show(Named { latch: self.latch() }), None).await
        }

        /// Our end of the connection.
        pub fn local_addr(&self) -> SocketAddr {
            self.latch.created.local
        }

        /// The other end of the connection.
        pub fn peer_addr(&self) -> SocketAddr {
            self.latch.created.remote
        }

        /// Waits until the latch is not ESTABLISHED. The future does not borrow the socket.
        pub fn broken(&self) -> impl Future<Output = Change> + Send + use<> {
            wait(self.latch.changes.clone(), |change| change.state != State::Established)
        }

        /// Changes of the latch's state from now on; of several at once the last.
        pub fn changes(&self) -> Changes {
            let mut changes = self.latch.changes.clone();
            changes.mark_unchanged();
            Changes { changes }
        }
    };
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
}

impl TcpStream {
    describe_latch!();

    fn new(stream: tokio::net::TcpStream, latch: Latched) -> Self {
        Self { stream, wake_reader: latch.waiting(), wake_writer: latch.waiting(), latch }
    }
}

impl UdpSocket {
    describe_latch!();

    /// Sends a datagram.
    pub async fn send(&self, datagram: &[u8]) -> io::Result<usize> {
        tokio::select! {
            biased;
            change = self.latch.end() => Err(change.failure()),
            sent = self.socket.send(datagram) => sent,
        }
    }

    /// Receives a datagram, cut to the buffer's length.
    pub async fn recv(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let received = tokio::select! {
            biased;
            change = self.latch.end() => return Err(change.failure()),
            received = self.socket.recv(buffer) => received,
        };
        // An end that comes with the break is no empty datagram.
        match self.latch.failure() {
            Some(error) => Err(error),
            None => received,
        }
    }
}

impl TcpListener {
    /// The next connection, with its latch. Those whose latch has broken since they came are left out.
    pub async fn accept(&self) -> Result<(TcpStream, SocketAddr), ClientError> {
        loop {
            let accepted = self.listener.accept().await;
            let (stream, remote) = accepted.map_err(|error| system("accepting a connection".to_owned(), error))?;
            let accept = Call::Accept(Accept { listener: self.latch.latch });
            match self.latch.shared.call::<Created>(accept, Some(stream.as_fd())).await {
                Ok(created) => {
                    let latch = Latched::new(&self.latch.shared, created, self.on_break);
                    return Ok((TcpStream::new(stream, latch), remote));
                }
                Err(ClientError::Refused(refusal)) if refusal.code == Code::NotAccepted => {
                    tracing::debug!(%remote, reason = refusal.message, "a connection was not accepted");
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.listening.local
    }

    /// Number of the listener latch in the daemon.
    pub fn latch(&self) -> u64 {
        self.listening.latch
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

impl AsyncRead for TcpStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if let Poll::Ready(error) = self.wake_reader.poll(cx) {
            return Poll::Ready(Err(error));
        }
        let before = buf.filled().len();
        let result = Pin::new(&mut self.stream).poll_read(cx, buf);
        // An end that comes with the break is not the peer's end.
        match self.latch.failure() {
            Some(error) if result.is_ready() && buf.filled().len() == before => Poll::Ready(Err(error)),
            _ => result,
        }
    }
}

impl AsyncWrite for TcpStream {
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

impl Drop for TcpStream {
    fn drop(&mut self) {
        // The daemon has a duplicate, so that closing ours does not end the connection.
        let _ = SockRef::from(&self.stream).shutdown(std::net::Shutdown::Write);
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

impl Shared {
    async fn call<T: DeserializeOwned>(&self, call: Call, socket: Option<BorrowedFd<'_>>) -> Result<T, ClientError> {
        let id = self.next_id();
        let octets = call.encode(id)?;
        let receiver = self.registry().expect(id)?;
        if let Err(source) = self.socket.send(&octets, socket).await {
            self.registry().pending.remove(&id);
            return Err(system(format!("sending {} to the daemon", call.name()), source));
        }
        let value = receiver.await.unwrap_or(Err(ClientError::Closed))?;
        session::result(call.name(), value)
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
