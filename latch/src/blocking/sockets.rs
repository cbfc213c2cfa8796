//! Sockets of the standard library under latches.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use socket2::{Protocol, SockRef, Socket, Type};

use super::link::{Link, poll};
use super::{Client, Latch, ListenerLatch, failed};
use crate::protocol::{ChannelBinding, Code, Peer, Protection, State, Wanted};
use crate::session::{BACKLOG, Change, ClientError, bound_socket, is_latched_to, listening_socket, system};

/// A TCP connection under a latch. Dropping it closes the connection in an orderly way and releases the latch afterwards.
///
/// When the latch breaks, or the daemon goes away, reading and writing fail with `ConnectionReset`; it never looks like
/// an orderly end. With another disposition than `reset` a break is loss of packets only, until the latch is ESTABLISHED
/// again. `&TcpStream` reads and writes, so that threads can share it.
///
/// It is used as [`std::net::TcpStream`]. The descriptor that it lends is in non-blocking mode, and for waiting only.
///
/// ```no_run
/// # fn example(client: latchkey_latch::blocking::Client) -> Result<(), Box<dyn std::error::Error>> {
/// use std::io::{Read, Write};
/// use std::time::Duration;
///
/// let mut stream = client.latch_tcp("192.0.2.7:5432".parse()?, None, "db.example.org")?;
/// stream.set_nodelay(true)?;
/// stream.set_read_timeout(Some(Duration::from_secs(5)))?;
/// let mut writer = stream.try_clone()?;
/// std::thread::spawn(move || writer.write_all(b"hello"));
/// let mut answer = String::new();
/// stream.read_to_string(&mut answer)?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct TcpStream(Arc<Connection>);

/// A TCP connection and its latch, which clones share.
#[derive(Debug)]
struct Connection {
    // Dropped in this order: the connection before the latch.
    stream: std::net::TcpStream,
    latch: Latch,
    timeouts: Timeouts,
}

/// How long reading and writing may wait.
#[derive(Debug, Default)]
struct Timeouts {
    read: Mutex<Option<Duration>>,
    write: Mutex<Option<Duration>>,
    /// They do not wait at all.
    nonblocking: AtomicBool,
}

/// A listening TCP socket under a listener latch: each connection that it accepts has a latch since before its first octet.
///
/// ```no_run
/// # fn example(client: latchkey_latch::blocking::Client) -> Result<(), Box<dyn std::error::Error>> {
/// let listener = client.listen_tcp("0.0.0.0:5432".parse()?, "*.example.org")?;
/// for stream in listener.incoming() {
///     println!("{} came", stream?.peer_identity().id.text);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct TcpListener {
    listener: std::net::TcpListener,
    latch: ListenerLatch,
}

/// A connected UDP socket under a latch. When the latch breaks for good, sending and receiving fail with
/// `ConnectionReset`; until then a break is loss of datagrams, unless the disposition is `reset`.
///
/// It is used as [`std::net::UdpSocket`].
///
/// ```no_run
/// # fn example(client: latchkey_latch::blocking::Client) -> Result<(), Box<dyn std::error::Error>> {
/// let socket = client.latch_udp("192.0.2.7:53".parse()?, None, "dns.example.org")?;
/// socket.send(b"question")?;
/// let mut answer = [0; 512];
/// let (length, from) = socket.recv_from(&mut answer)?;
/// assert_eq!(from, socket.peer_addr());
/// # let _ = length;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct UdpSocket(Arc<Association>);

/// A UDP socket and its latch, which clones share.
#[derive(Debug)]
struct Association {
    socket: std::net::UdpSocket,
    latch: Latch,
    timeouts: Timeouts,
}

/// Connections as they come: [`TcpListener::incoming`].
#[derive(Debug)]
pub struct Incoming<'a>(&'a TcpListener);

impl Client {
    /// As [`crate::client::Client::latch_tcp`].
    pub fn latch_tcp(
        &self,
        remote: SocketAddr,
        local: Option<SocketAddr>,
        wanted: impl Into<Wanted>,
    ) -> Result<TcpStream, ClientError> {
        let socket = bound_socket(remote, local, Type::STREAM, Protocol::TCP)?;
        let latch = self.latch_socket(&socket, remote, wanted)?;
        connect(&socket, remote, &latch).map_err(|error| system(format!("connecting to {remote}"), error))?;
        Ok(TcpStream::new(socket.into(), latch))
    }

    /// A UDP socket that is connected to `remote`, latched like [`Client::latch_tcp`].
    pub fn latch_udp(
        &self,
        remote: SocketAddr,
        local: Option<SocketAddr>,
        wanted: impl Into<Wanted>,
    ) -> Result<UdpSocket, ClientError> {
        let socket = bound_socket(remote, local, Type::DGRAM, Protocol::UDP)?;
        let latch = self.latch_socket(&socket, remote, wanted)?;
        socket.connect(&remote.into()).map_err(|error| system(format!("connecting to {remote}"), error))?;
        Ok(UdpSocket(Arc::new(Association { socket: socket.into(), latch, timeouts: Timeouts::default() })))
    }

    /// Listens on `local`, for IPsec peers as wanted only: others do not get as far as a connection.
    pub fn listen_tcp(&self, local: SocketAddr, wanted: impl Into<Wanted>) -> Result<TcpListener, ClientError> {
        let failed = |error| system(format!("listening on {local}"), error);
        let socket = listening_socket(local).map_err(failed)?;
        // The latch comes first: nobody gets in before.
        let latch = self.latch_listener(&socket, wanted)?;
        socket.listen(BACKLOG).map_err(failed)?;
        Ok(TcpListener { listener: socket.into(), latch })
    }
}

macro_rules! describe_latch {
    ($socket:ident) => {
        /// Its latch.
        pub fn latch(&self) -> &Latch {
            &self.0.latch
        }

        /// Who is at the other end, and how it proved that.
        pub fn peer_identity(&self) -> &Peer {
            self.latch().peer_identity()
        }

        /// How the packets are protected, for as long as the latch stands.
        pub fn protection(&self) -> &Protection {
            self.latch().protection()
        }

        /// What a protocol above can bind its authentication to (RFC 5056).
        pub fn channel_binding(&self) -> Result<ChannelBinding, ClientError> {
            self.latch().channel_binding()
        }

        /// Our end of the connection.
        pub fn local_addr(&self) -> SocketAddr {
            self.latch().local_addr()
        }

        /// The other end of the connection.
        pub fn peer_addr(&self) -> SocketAddr {
            self.latch().peer_addr()
        }

        /// Another handle of the same socket and latch: they end with the last. Times and mode are shared.
        pub fn try_clone(&self) -> io::Result<Self> {
            Ok(Self(Arc::clone(&self.0)))
        }

        /// How long a read may wait; then it fails with `WouldBlock`. None at first: for ever. Zero is refused.
        pub fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
            Timeouts::set(&self.0.timeouts.read, timeout)
        }

        /// What [`Self::set_read_timeout`] has set.
        pub fn read_timeout(&self) -> io::Result<Option<Duration>> {
            Ok(Timeouts::of(&self.0.timeouts.read))
        }

        /// How long a write may wait; then it fails with `WouldBlock`. None at first: for ever. Zero is refused.
        pub fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
            Timeouts::set(&self.0.timeouts.write, timeout)
        }

        /// What [`Self::set_write_timeout`] has set.
        pub fn write_timeout(&self) -> io::Result<Option<Duration>> {
            Ok(Timeouts::of(&self.0.timeouts.write))
        }

        /// Whether reads and writes that would wait fail with `WouldBlock` at once.
        pub fn set_nonblocking(&self, nonblocking: bool) -> io::Result<()> {
            self.0.timeouts.nonblocking.store(nonblocking, Ordering::Relaxed);
            Ok(())
        }

        /// The time to live of the packets inside the tunnel (IP_TTL).
        pub fn ttl(&self) -> io::Result<u32> {
            self.0.$socket.ttl()
        }

        /// Sets what [`Self::ttl`] gives.
        pub fn set_ttl(&self, ttl: u32) -> io::Result<()> {
            self.0.$socket.set_ttl(ttl)
        }

        /// The error that waits at the socket, if there is one; takes it away.
        pub fn take_error(&self) -> io::Result<Option<io::Error>> {
            self.0.$socket.take_error()
        }
    };
}

impl Timeouts {
    fn set(of: &Mutex<Option<Duration>>, timeout: Option<Duration>) -> io::Result<()> {
        if timeout == Some(Duration::ZERO) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "a timeout of zero"));
        }
        *of.lock().unwrap_or_else(PoisonError::into_inner) = timeout;
        Ok(())
    }

    fn of(of: &Mutex<Option<Duration>>) -> Option<Duration> {
        *of.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn to_read(&self) -> Option<Duration> {
        self.now().or_else(|| Self::of(&self.read))
    }

    fn to_write(&self) -> Option<Duration> {
        self.now().or_else(|| Self::of(&self.write))
    }

    fn now(&self) -> Option<Duration> {
        self.nonblocking.load(Ordering::Relaxed).then_some(Duration::ZERO)
    }
}

impl TcpStream {
    describe_latch!(stream);

    fn new(stream: std::net::TcpStream, latch: Latch) -> Self {
        Self(Arc::new(Connection { stream, latch, timeouts: Timeouts::default() }))
    }

    /// TCP_NODELAY.
    pub fn nodelay(&self) -> io::Result<bool> {
        self.0.stream.nodelay()
    }

    /// Sets TCP_NODELAY.
    pub fn set_nodelay(&self, nodelay: bool) -> io::Result<()> {
        self.0.stream.set_nodelay(nodelay)
    }

    /// Ends reading, writing or both.
    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        self.0.stream.shutdown(how)
    }

    /// Reads what comes next, and leaves it there.
    pub fn peek(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.receive(!buffer.is_empty(), |stream| stream.peek(buffer))
    }

    fn receive(
        &self,
        wants: bool,
        mut read: impl FnMut(&std::net::TcpStream) -> io::Result<usize>,
    ) -> io::Result<usize> {
        let Connection { stream, latch, timeouts } = &*self.0;
        loop {
            ready(stream, PollFlags::IN, latch, timeouts.to_read())?;
            match read(stream) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // An end that comes with the break is not the peer's end.
                Ok(0) if wants => return ended(latch).map_or(Ok(0), Err),
                Err(error) => return Err(ended(latch).unwrap_or(error)),
                read => return read,
            }
        }
    }

    fn send(&self, mut write: impl FnMut(&std::net::TcpStream) -> io::Result<usize>) -> io::Result<usize> {
        let Connection { stream, latch, timeouts } = &*self.0;
        loop {
            ready(stream, PollFlags::OUT, latch, timeouts.to_write())?;
            match write(stream) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(ended(latch).unwrap_or(error)),
                written => return written,
            }
        }
    }
}

impl Read for &TcpStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.receive(!buffer.is_empty(), |mut stream| stream.read(buffer))
    }

    fn read_vectored(&mut self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let wants = buffers.iter().any(|buffer| !buffer.is_empty());
        self.receive(wants, |mut stream| stream.read_vectored(buffers))
    }
}

impl Write for &TcpStream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.send(|mut stream| stream.write(buffer))
    }

    fn write_vectored(&mut self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        self.send(|mut stream| stream.write_vectored(buffers))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for TcpStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (&*self).read(buffer)
    }

    fn read_vectored(&mut self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        (&*self).read_vectored(buffers)
    }
}

impl Write for TcpStream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        (&*self).write(buffer)
    }

    fn write_vectored(&mut self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        (&*self).write_vectored(buffers)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsFd for TcpStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.stream.as_fd()
    }
}

impl AsRawFd for TcpStream {
    fn as_raw_fd(&self) -> RawFd {
        self.0.stream.as_raw_fd()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // The daemon has a duplicate, so that closing ours does not end the connection.
        let _ = self.stream.shutdown(Shutdown::Write);
    }
}

impl TcpListener {
    /// The next connection, with its latch. Those whose latch has broken since they came are left out.
    pub fn accept(&self) -> Result<(TcpStream, SocketAddr), ClientError> {
        let link = &self.latch.holding.link;
        loop {
            let mut descriptors =
                [PollFd::new(&self.listener, PollFlags::IN), PollFd::from_borrowed_fd(link.socket(), PollFlags::IN)];
            poll(&mut descriptors, None).map_err(|error| failed("waiting for a connection", error))?;
            let [_, daemon] = &descriptors;
            if !daemon.revents().is_empty() {
                link.drain();
                if link.state().registry.closed {
                    return Err(ClientError::Closed);
                }
            }
            let (stream, remote) = match self.listener.accept() {
                Ok(accepted) => accepted,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error) => return Err(failed("accepting a connection", error)),
            };
            stream.set_nonblocking(true).map_err(|error| failed("accepting a connection", error))?;
            match self.latch.accept(&stream) {
                Ok(latch) => return Ok((TcpStream::new(stream, latch), remote)),
                Err(ClientError::Refused(refusal)) if refusal.code == Code::NotAccepted => {
                    tracing::debug!(%remote, reason = refusal.message, "a connection was not accepted");
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Connections as they come, without end. After an error the next may be none.
    pub fn incoming(&self) -> Incoming<'_> {
        Incoming(self)
    }

    /// The time to live of the packets inside the tunnel (IP_TTL).
    pub fn ttl(&self) -> io::Result<u32> {
        self.listener.ttl()
    }

    /// Sets what [`Self::ttl`] gives.
    pub fn set_ttl(&self, ttl: u32) -> io::Result<()> {
        self.listener.set_ttl(ttl)
    }

    /// The error that waits at the socket, if there is one; takes it away.
    pub fn take_error(&self) -> io::Result<Option<io::Error>> {
        self.listener.take_error()
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.latch.local_addr()
    }

    /// Its latch.
    pub fn latch(&self) -> &ListenerLatch {
        &self.latch
    }
}

impl AsFd for TcpListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl AsRawFd for TcpListener {
    fn as_raw_fd(&self) -> RawFd {
        self.listener.as_raw_fd()
    }
}

impl Iterator for Incoming<'_> {
    type Item = Result<TcpStream, ClientError>;

    fn next(&mut self) -> Option<Self::Item> {
        Some(self.0.accept().map(|(stream, _)| stream))
    }
}

impl UdpSocket {
    describe_latch!(socket);

    /// Sends a datagram.
    pub fn send(&self, datagram: &[u8]) -> io::Result<usize> {
        let Association { socket, latch, timeouts } = &*self.0;
        loop {
            ready(socket, PollFlags::OUT, latch, timeouts.to_write())?;
            match socket.send(datagram) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(ended(latch).unwrap_or(error)),
                sent => return sent,
            }
        }
    }

    /// As [`Self::send`]; fails with `InvalidInput` if `to` is not where the socket is latched to.
    pub fn send_to(&self, datagram: &[u8], to: SocketAddr) -> io::Result<usize> {
        is_latched_to(to, self.peer_addr())?;
        self.send(datagram)
    }

    /// Receives a datagram, cut to the buffer's length.
    pub fn recv(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.receive(|socket| socket.recv(buffer))
    }

    /// As [`Self::recv`], with the sender's address, which is always [`Self::peer_addr`].
    pub fn recv_from(&self, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        Ok((self.recv(buffer)?, self.peer_addr()))
    }

    /// As [`Self::recv`], and leaves the datagram there.
    pub fn peek(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.receive(|socket| socket.peek(buffer))
    }

    /// As [`Self::recv_from`], and leaves the datagram there.
    pub fn peek_from(&self, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        Ok((self.peek(buffer)?, self.peer_addr()))
    }

    fn receive(&self, mut receive: impl FnMut(&std::net::UdpSocket) -> io::Result<usize>) -> io::Result<usize> {
        let Association { socket, latch, timeouts } = &*self.0;
        loop {
            let events = ready(socket, PollFlags::IN | PollFlags::RDHUP, latch, timeouts.to_read())?;
            match receive(socket) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // Only the daemon shuts a UDP socket down; its word why comes soon.
                Ok(0) if events.contains(PollFlags::RDHUP) => {
                    let _ = latch.wait(Some(Duration::from_secs(1)), |change| change.is_end(latch.on_break));
                    let unknown = || Change { state: State::Broken, reason: "the socket was shut down".to_owned() };
                    return Err(latch.end().unwrap_or_else(unknown).failure());
                }
                Err(error) => return Err(ended(latch).unwrap_or(error)),
                received => return received,
            }
        }
    }
}

impl AsFd for UdpSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.socket.as_fd()
    }
}

impl AsRawFd for UdpSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.0.socket.as_raw_fd()
    }
}

/// Waits until a socket is ready, or its latch has ended the connection.
///
/// Another thread may take the daemon's word out of the link between the look at the latch and the poll: no harm, since
/// whatever ends a connection shows at the socket as well, and the daemon's own end stays visible at the link.
fn ready(socket: &impl AsFd, flags: PollFlags, latch: &Latch, timeout: Option<Duration>) -> io::Result<PollFlags> {
    let link: &Link = &latch.holding.link;
    loop {
        if let Some(change) = latch.end() {
            return Err(change.failure());
        }
        let mut descriptors = [PollFd::new(socket, flags), PollFd::from_borrowed_fd(link.socket(), PollFlags::IN)];
        if !poll(&mut descriptors, timeout)? {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let [socket, daemon] = &descriptors;
        if !daemon.revents().is_empty() {
            link.drain();
        } else if !socket.revents().is_empty() {
            return Ok(socket.revents());
        }
    }
}

/// What ended the connection, as far as the daemon has said.
fn ended(latch: &Latch) -> Option<io::Error> {
    latch.holding.link.drain();
    latch.end().map(|change| change.failure())
}

/// Connects a socket that does not block, and waits for that.
fn connect(socket: &Socket, remote: SocketAddr, latch: &Latch) -> io::Result<()> {
    match socket.connect(&remote.into()) {
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::INPROGRESS.raw_os_error()) => {}
        outcome => return outcome,
    }
    ready(socket, PollFlags::OUT, latch, None)?;
    SockRef::from(socket).take_error()?.map_or(Ok(()), Err)
}
