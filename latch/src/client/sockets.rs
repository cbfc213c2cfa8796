//! Sockets of tokio under latches: as tokio's own, with what the latch adds.

use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf, Ready};

use super::{Changes, Holding, Latched, Waiting, wait};
use crate::protocol::{
    Accept, Bind, Call, ChannelBinding, Code, Created, Disposition, Inquired, Listening, Named, Peer, Protection,
    State, UNIQUE_BINDING,
};
use crate::session::{self, Change, ClientError, system};

/// A TCP connection under a latch, used as [`tokio::net::TcpStream`]. Dropping it closes the connection in an orderly way
/// and releases the latch afterwards.
///
/// When the latch breaks, or the daemon goes away, reading and writing fail with `ConnectionReset`; it never looks like
/// an orderly end. With another disposition than `reset` a break is loss of packets only, until the latch is ESTABLISHED
/// again.
///
/// ```no_run
/// # async fn example(client: latchkey_latch::client::Client) -> Result<(), Box<dyn std::error::Error>> {
/// use tokio::io::{AsyncReadExt, AsyncWriteExt};
///
/// let stream = client.latch_tcp("192.0.2.7:5432".parse()?, None, "db.example.org").await?;
/// stream.set_nodelay(true)?;
/// let (mut reader, mut writer) = stream.into_split();
/// let echo = tokio::spawn(async move {
///     let mut octets = Vec::new();
///     reader.read_to_end(&mut octets).await.map(|_| octets)
/// });
/// writer.write_all(b"hello").await?;
/// writer.shutdown().await?;
/// echo.await??;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct TcpStream {
    connection: Arc<Connection>,
    wake_reader: Waiting,
    wake_writer: Waiting,
}

/// A TCP connection and its latch.
#[derive(Debug)]
struct Connection {
    // Dropped in this order: the connection before the latch.
    stream: tokio::net::TcpStream,
    latch: Latched,
}

/// The half of a [`TcpStream`] that reads, borrowed by [`TcpStream::split`].
#[derive(Debug)]
pub struct ReadHalf<'a> {
    connection: &'a Connection,
    wake: &'a mut Waiting,
}

/// The half of a [`TcpStream`] that writes, borrowed by [`TcpStream::split`].
#[derive(Debug)]
pub struct WriteHalf<'a> {
    connection: &'a Connection,
    wake: &'a mut Waiting,
}

/// The half of a [`TcpStream`] that reads, of [`TcpStream::into_split`].
#[derive(Debug)]
pub struct OwnedReadHalf {
    connection: Arc<Connection>,
    wake: Waiting,
}

/// The half of a [`TcpStream`] that writes, of [`TcpStream::into_split`]. Dropping it ends what the other end reads.
#[derive(Debug)]
pub struct OwnedWriteHalf {
    connection: Arc<Connection>,
    wake: Waiting,
    ends: bool,
}

/// The halves are not of one stream.
#[derive(Debug)]
pub struct ReuniteError(pub OwnedReadHalf, pub OwnedWriteHalf);

/// A listening TCP socket under a listener latch: each connection that it accepts has a latch since before its first octet.
///
/// ```no_run
/// # async fn example(client: latchkey_latch::client::Client) -> Result<(), Box<dyn std::error::Error>> {
/// let listener = client.listen_tcp("0.0.0.0:5432".parse()?, "*.example.org").await?;
/// loop {
///     let (stream, remote) = listener.accept().await?;
///     println!("{remote} is {}", stream.peer_identity().id.text);
/// }
/// # }
/// ```
#[derive(Debug)]
pub struct TcpListener {
    listener: tokio::net::TcpListener,
    listening: Listening,
    on_break: Disposition,
    latch: Holding,
}

/// A connected UDP socket under a latch, used as [`tokio::net::UdpSocket`]. When the latch breaks for good, sending and
/// receiving fail with `ConnectionReset`; until then a break is loss of datagrams, unless the disposition is `reset`.
///
/// ```no_run
/// # async fn example(client: latchkey_latch::client::Client) -> Result<(), Box<dyn std::error::Error>> {
/// let socket = client.latch_udp("192.0.2.7:53".parse()?, None, "dns.example.org").await?;
/// socket.send(b"question").await?;
/// let mut answer = [0; 512];
/// let (length, from) = socket.recv_from(&mut answer).await?;
/// assert_eq!(from, socket.peer_addr());
/// # let _ = length;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct UdpSocket {
    socket: tokio::net::UdpSocket,
    latch: Latched,
}

macro_rules! describe_latch {
    () => {
        /// Who is at the other end, and how it proved that.
        pub fn peer_identity(&self) -> &Peer {
            &self.latched().created.peer
        }

        /// How the packets are protected, for as long as the latch stands.
        pub fn protection(&self) -> &Protection {
            &self.latched().created.protection
        }

        /// Number of the latch in the daemon.
        pub fn latch(&self) -> u64 {
            self.latched().created.latch
        }

        /// What a protocol above can bind its authentication to (RFC 5056): a relay between two channels has another at
        /// each end. The same for as long as the latch stands.
        pub async fn channel_binding(&self) -> Result<ChannelBinding, ClientError> {
            self.channel_binding_of(UNIQUE_BINDING).await
        }

        /// A channel binding of a type that `docs/latch-protocol.md` has.
        pub async fn channel_binding_of(&self, kind: &str) -> Result<ChannelBinding, ClientError> {
            let bind = Bind { latch: self.latch(), kind: kind.to_owned() };
            self.latched().holding.shared.call(Call::ChannelBinding(bind), None).await
        }

        /// The same for connections to the same peer with the same credential under the same protection (RFC 5660 §6.3), if
        /// the daemon tells.
        pub fn class(&self) -> Option<u32> {
            self.latched().created.class
        }

        /// Asks the daemon for all that it knows of the latch at this moment (INQUIRE_LATCH): outer addresses too.
        pub async fn inquire(&self) -> Result<Inquired, ClientError> {
            self.latched().holding.shared.call(Call::Show(Named { latch: self.latch() }), None).await
        }

        /// Our end of the connection.
        pub fn local_addr(&self) -> SocketAddr {
            self.latched().created.local
        }

        /// The other end of the connection.
        pub fn peer_addr(&self) -> SocketAddr {
            self.latched().created.remote
        }

        /// Waits until the latch is not ESTABLISHED. The future does not borrow the socket.
        pub fn broken(&self) -> impl Future<Output = Change> + Send + use<> {
            wait(self.latched().changes.clone(), |change| change.state != State::Established)
        }

        /// Changes of the latch's state from now on; of several at once the last.
        pub fn changes(&self) -> Changes {
            let mut changes = self.latched().changes.clone();
            changes.mark_unchanged();
            Changes { changes }
        }
    };
}

/// Options that are those of the socket inside.
macro_rules! socket_options {
    ($field:ident) => {
        /// The time to live of the packets inside the tunnel (IP_TTL).
        pub fn ttl(&self) -> io::Result<u32> {
            self.$field().ttl()
        }

        /// Sets what [`Self::ttl`] gives.
        pub fn set_ttl(&self, ttl: u32) -> io::Result<()> {
            self.$field().set_ttl(ttl)
        }
    };
}

impl Connection {
    fn poll_read(&self, wake: &mut Waiting, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if let Poll::Ready(error) = wake.poll(cx) {
            return Poll::Ready(Err(error));
        }
        loop {
            ready!(self.stream.poll_read_ready(cx))?;
            match self.try_read(buf.initialize_unfilled()) {
                Ok(length) => {
                    buf.advance(length);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    fn poll_write(&self, wake: &mut Waiting, cx: &mut Context<'_>, octets: &[u8]) -> Poll<io::Result<usize>> {
        if let Poll::Ready(error) = wake.poll(cx) {
            return Poll::Ready(Err(error));
        }
        loop {
            ready!(self.stream.poll_write_ready(cx))?;
            match self.try_write(octets) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                written => return Poll::Ready(written),
            }
        }
    }

    fn poll_write_vectored(
        &self,
        wake: &mut Waiting,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if let Poll::Ready(error) = wake.poll(cx) {
            return Poll::Ready(Err(error));
        }
        loop {
            ready!(self.stream.poll_write_ready(cx))?;
            match self.stream.try_write_vectored(pieces) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                written => return Poll::Ready(written.map_err(|error| self.latch.failure().unwrap_or(error))),
            }
        }
    }

    fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.stream.try_read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(self.latch.failure().unwrap_or(error)),
            // An end that comes with the break is not the peer's end.
            Ok(0) if !buffer.is_empty() => self.latch.failure().map_or(Ok(0), Err),
            Err(error) => Err(self.latch.failure().unwrap_or(error)),
            read => read,
        }
    }

    fn try_write(&self, octets: &[u8]) -> io::Result<usize> {
        // The daemon tells of the end first, and resets the socket then.
        self.latch.failure().map_or(Ok(()), Err)?;
        self.stream.try_write(octets).map_err(|error| self.latch.failure().unwrap_or(error))
    }

    async fn ready(&self, interest: Interest) -> io::Result<Ready> {
        tokio::select! {
            biased;
            change = self.latch.end() => Err(change.failure()),
            ready = self.stream.ready(interest) => ready,
        }
    }

    async fn peek(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let peeked = tokio::select! {
            biased;
            change = self.latch.end() => return Err(change.failure()),
            peeked = self.stream.peek(buffer) => peeked,
        };
        match (peeked, self.latch.failure()) {
            (Ok(0) | Err(_), Some(error)) => Err(error),
            (peeked, _) => peeked,
        }
    }

    fn end_writing(&self) -> io::Result<()> {
        SockRef::from(&self.stream).shutdown(std::net::Shutdown::Write)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // The daemon has a duplicate, so that closing ours does not end the connection.
        let _ = self.end_writing();
    }
}

impl TcpStream {
    describe_latch!();
    socket_options!(socket);

    pub(super) fn new(stream: tokio::net::TcpStream, latch: Latched) -> Self {
        let (wake_reader, wake_writer) = (latch.waiting(), latch.waiting());
        Self { connection: Arc::new(Connection { stream, latch }), wake_reader, wake_writer }
    }

    fn latched(&self) -> &Latched {
        &self.connection.latch
    }

    fn socket(&self) -> &tokio::net::TcpStream {
        &self.connection.stream
    }

    /// TCP_NODELAY.
    pub fn nodelay(&self) -> io::Result<bool> {
        self.socket().nodelay()
    }

    /// Sets TCP_NODELAY.
    pub fn set_nodelay(&self, nodelay: bool) -> io::Result<()> {
        self.socket().set_nodelay(nodelay)
    }

    /// The error that waits at the socket, if there is one; takes it away.
    pub fn take_error(&self) -> io::Result<Option<io::Error>> {
        self.socket().take_error()
    }

    /// Reads what is there, or the next that comes, and leaves it there.
    pub async fn peek(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.connection.peek(buffer).await
    }

    /// Waits until the socket is ready for something of this, or the latch has ended.
    pub async fn ready(&self, interest: Interest) -> io::Result<Ready> {
        self.connection.ready(interest).await
    }

    /// Waits until there is something to read.
    pub async fn readable(&self) -> io::Result<()> {
        self.ready(Interest::READABLE).await.map(drop)
    }

    /// Waits until there is room to write.
    pub async fn writable(&self) -> io::Result<()> {
        self.ready(Interest::WRITABLE).await.map(drop)
    }

    /// Reads what is there now; fails with `WouldBlock` if nothing is.
    pub fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.connection.try_read(buffer)
    }

    /// Writes what there is room for now; fails with `WouldBlock` if there is none.
    pub fn try_write(&self, octets: &[u8]) -> io::Result<usize> {
        self.connection.try_write(octets)
    }

    /// Its two halves for one task.
    pub fn split(&mut self) -> (ReadHalf<'_>, WriteHalf<'_>) {
        let connection = &*self.connection;
        (ReadHalf { connection, wake: &mut self.wake_reader }, WriteHalf { connection, wake: &mut self.wake_writer })
    }

    /// Its two halves for tasks of their own. The latch lives as long as one of them.
    pub fn into_split(self) -> (OwnedReadHalf, OwnedWriteHalf) {
        let Self { connection, wake_reader, wake_writer } = self;
        (
            OwnedReadHalf { connection: Arc::clone(&connection), wake: wake_reader },
            OwnedWriteHalf { connection, wake: wake_writer, ends: true },
        )
    }
}

impl OwnedReadHalf {
    describe_latch!();

    fn latched(&self) -> &Latched {
        &self.connection.latch
    }

    /// The stream of both halves; gives them back if they are not of one.
    pub fn reunite(self, other: OwnedWriteHalf) -> Result<TcpStream, ReuniteError> {
        if !Arc::ptr_eq(&self.connection, &other.connection) {
            return Err(ReuniteError(self, other));
        }
        // What wakes tasks is made anew, as the other half's drop keeps its own.
        let (wake_reader, wake_writer) = (self.connection.latch.waiting(), self.connection.latch.waiting());
        other.forget();
        Ok(TcpStream { connection: self.connection, wake_reader, wake_writer })
    }

    /// As [`TcpStream::peek`].
    pub async fn peek(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.connection.peek(buffer).await
    }

    /// As [`TcpStream::readable`].
    pub async fn readable(&self) -> io::Result<()> {
        self.connection.ready(Interest::READABLE).await.map(drop)
    }

    /// As [`TcpStream::try_read`].
    pub fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.connection.try_read(buffer)
    }
}

impl OwnedWriteHalf {
    describe_latch!();

    fn latched(&self) -> &Latched {
        &self.connection.latch
    }

    /// Drops it without an end for the other end.
    pub fn forget(mut self) {
        self.ends = false;
    }

    /// As [`TcpStream::writable`].
    pub async fn writable(&self) -> io::Result<()> {
        self.connection.ready(Interest::WRITABLE).await.map(drop)
    }

    /// As [`TcpStream::try_write`].
    pub fn try_write(&self, octets: &[u8]) -> io::Result<usize> {
        self.connection.try_write(octets)
    }
}

impl Drop for OwnedWriteHalf {
    fn drop(&mut self) {
        if self.ends {
            let _ = self.connection.end_writing();
        }
    }
}

impl fmt::Display for ReuniteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the halves are not of one stream")
    }
}

impl std::error::Error for ReuniteError {}

/// Reading by a half or the whole.
macro_rules! reads {
    ($type:ty, $wake:ident) => {
        impl AsyncRead for $type {
            fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
                let this = self.get_mut();
                this.connection.poll_read(&mut this.$wake, cx, buf)
            }
        }
    };
}

/// Writing by a half or the whole.
macro_rules! writes {
    ($type:ty, $wake:ident) => {
        impl AsyncWrite for $type {
            fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, octets: &[u8]) -> Poll<io::Result<usize>> {
                let this = self.get_mut();
                this.connection.poll_write(&mut this.$wake, cx, octets)
            }

            fn poll_write_vectored(
                self: Pin<&mut Self>,
                cx: &mut Context<'_>,
                pieces: &[io::IoSlice<'_>],
            ) -> Poll<io::Result<usize>> {
                let this = self.get_mut();
                this.connection.poll_write_vectored(&mut this.$wake, cx, pieces)
            }

            fn is_write_vectored(&self) -> bool {
                true
            }

            /// Nothing is held back.
            fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
                Poll::Ready(Ok(()))
            }

            fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
                Poll::Ready(self.connection.end_writing())
            }
        }
    };
}

reads!(TcpStream, wake_reader);
reads!(ReadHalf<'_>, wake);
reads!(OwnedReadHalf, wake);
writes!(TcpStream, wake_writer);
writes!(WriteHalf<'_>, wake);
writes!(OwnedWriteHalf, wake);

impl UdpSocket {
    describe_latch!();
    socket_options!(socket);

    pub(super) fn new(socket: tokio::net::UdpSocket, latch: Latched) -> Self {
        Self { socket, latch }
    }

    fn latched(&self) -> &Latched {
        &self.latch
    }

    fn socket(&self) -> &tokio::net::UdpSocket {
        &self.socket
    }

    /// The error that waits at the socket, if there is one; takes it away.
    pub fn take_error(&self) -> io::Result<Option<io::Error>> {
        self.socket.take_error()
    }

    /// Sends a datagram.
    pub async fn send(&self, datagram: &[u8]) -> io::Result<usize> {
        self.until_the_end(self.socket.send(datagram)).await
    }

    /// As [`Self::send`]; fails with `InvalidInput` if `to` is not where the socket is latched to.
    pub async fn send_to(&self, datagram: &[u8], to: SocketAddr) -> io::Result<usize> {
        session::is_latched_to(to, self.peer_addr())?;
        self.send(datagram).await
    }

    /// Receives a datagram, cut to the buffer's length.
    pub async fn recv(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.until_the_end(self.socket.recv(buffer)).await
    }

    /// As [`Self::recv`], with the sender's address, which is always [`Self::peer_addr`].
    pub async fn recv_from(&self, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        Ok((self.recv(buffer).await?, self.peer_addr()))
    }

    /// As [`Self::recv`], and leaves the datagram there.
    pub async fn peek(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.until_the_end(self.socket.peek(buffer)).await
    }

    /// Sends a datagram if there is room now; fails with `WouldBlock` if there is none.
    pub fn try_send(&self, datagram: &[u8]) -> io::Result<usize> {
        self.latch.failure().map_or(Ok(()), Err)?;
        self.socket.try_send(datagram).map_err(|error| self.latch.failure().unwrap_or(error))
    }

    /// Receives a datagram that is there now; fails with `WouldBlock` if there is none.
    pub fn try_recv(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let received = self.socket.try_recv(buffer);
        self.latch.failure().map_or(received, Err)
    }

    /// Waits until there is something to receive, or the latch has ended.
    pub async fn readable(&self) -> io::Result<()> {
        self.until_the_end(self.socket.readable()).await
    }

    /// Waits until there is room to send, or the latch has ended.
    pub async fn writable(&self) -> io::Result<()> {
        self.until_the_end(self.socket.writable()).await
    }

    async fn until_the_end<T>(&self, what: impl Future<Output = io::Result<T>>) -> io::Result<T> {
        let done = tokio::select! {
            biased;
            change = self.latch.end() => return Err(change.failure()),
            done = what => done,
        };
        // An end that comes with the break is no empty datagram.
        match self.latch.failure() {
            Some(error) => Err(error),
            None => done,
        }
    }
}

impl TcpListener {
    socket_options!(socket);

    pub(super) fn new(
        listener: tokio::net::TcpListener,
        listening: Listening,
        on_break: Disposition,
        latch: Holding,
    ) -> Self {
        Self { listener, listening, on_break, latch }
    }

    fn socket(&self) -> &tokio::net::TcpListener {
        &self.listener
    }

    /// The next connection, with its latch. Those whose latch has broken since they came are left out.
    pub async fn accept(&self) -> Result<(TcpStream, SocketAddr), ClientError> {
        loop {
            let accepted = self.listener.accept().await;
            let (stream, remote) = accepted.map_err(|error| system("accepting a connection".to_owned(), error))?;
            let accept = Call::Accept(Accept { listener: self.latch.latch, remote: None });
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

/// The descriptor is for waiting and options: what is read or written by it goes past the latch's own errors, though not
/// past the latch.
macro_rules! lends_its_descriptor {
    ($($type:ty),*) => {
        $(
            impl AsFd for $type {
                fn as_fd(&self) -> BorrowedFd<'_> {
                    self.socket().as_fd()
                }
            }

            impl AsRawFd for $type {
                fn as_raw_fd(&self) -> RawFd {
                    self.socket().as_raw_fd()
                }
            }
        )*
    };
}

lends_its_descriptor!(TcpStream, TcpListener, UdpSocket);
