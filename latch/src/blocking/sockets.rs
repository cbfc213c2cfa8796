//! Sockets of the standard library under latches.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use socket2::{Protocol, SockRef, Socket, Type};

use super::link::{Link, poll};
use super::{Client, Latch, ListenerLatch, failed};
use crate::protocol::{ChannelBinding, Code, Peer, Protection, State, Wanted};
use crate::session::{BACKLOG, Change, ClientError, bound_socket, listening_socket, system};

/// A TCP connection under a latch. Dropping it closes the connection in an orderly way and releases the latch afterwards.
///
/// When the latch breaks, or the daemon goes away, reading and writing fail with `ConnectionReset`; it never looks like
/// an orderly end. With another disposition than `reset` a break is loss of packets only, until the latch is ESTABLISHED
/// again. `&TcpStream` reads and writes, so that threads can share it.
///
/// The descriptor that it lends is in non-blocking mode, and for waiting only.
#[derive(Debug)]
pub struct TcpStream {
    // Dropped in this order: the connection before the latch.
    stream: std::net::TcpStream,
    latch: Latch,
    read_timeout: Option<Duration>,
    write_timeout: Option<Duration>,
}

/// A listening TCP socket under a listener latch: each connection that it accepts has a latch since before its first octet.
#[derive(Debug)]
pub struct TcpListener {
    listener: std::net::TcpListener,
    latch: ListenerLatch,
}

/// A connected UDP socket under a latch. When the latch breaks for good, sending and receiving fail with
/// `ConnectionReset`; until then a break is loss of datagrams, unless the disposition is `reset`.
#[derive(Debug)]
pub struct UdpSocket {
    socket: std::net::UdpSocket,
    latch: Latch,
    read_timeout: Option<Duration>,
}

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
        Ok(TcpStream { stream: socket.into(), latch, read_timeout: None, write_timeout: None })
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
        Ok(UdpSocket { socket: socket.into(), latch, read_timeout: None })
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
    () => {
        /// Its latch.
        pub fn latch(&self) -> &Latch {
            &self.latch
        }

        /// Who is at the other end, and how it proved that.
        pub fn peer_identity(&self) -> &Peer {
            self.latch.peer_identity()
        }

        /// How the packets are protected, for as long as the latch stands.
        pub fn protection(&self) -> &Protection {
            self.latch.protection()
        }

        /// What a protocol above can bind its authentication to (RFC 5056).
        pub fn channel_binding(&self) -> Result<ChannelBinding, ClientError> {
            self.latch.channel_binding()
        }

        /// Our end of the connection.
        pub fn local_addr(&self) -> SocketAddr {
            self.latch.local_addr()
        }

        /// The other end of the connection.
        pub fn peer_addr(&self) -> SocketAddr {
            self.latch.peer_addr()
        }

        /// How long a read may wait; then it fails with `WouldBlock`. None at first: for ever.
        pub fn set_read_timeout(&mut self, timeout: Option<Duration>) {
            self.read_timeout = timeout;
        }
    };
}

impl TcpStream {
    describe_latch!();

    /// How long a write may wait; then it fails with `WouldBlock`. None at first: for ever.
    pub fn set_write_timeout(&mut self, timeout: Option<Duration>) {
        self.write_timeout = timeout;
    }

    /// TCP_NODELAY.
    pub fn set_nodelay(&self, nodelay: bool) -> io::Result<()> {
        self.stream.set_nodelay(nodelay)
    }

    /// Ends reading, writing or both.
    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        self.stream.shutdown(how)
    }
}

impl Read for &TcpStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            ready(&self.stream, PollFlags::IN, &self.latch, self.read_timeout)?;
            match (&self.stream).read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // An end that comes with the break is not the peer's end.
                Ok(0) if !buffer.is_empty() => return ended(&self.latch).map_or(Ok(0), Err),
                Err(error) => return Err(ended(&self.latch).unwrap_or(error)),
                read => return read,
            }
        }
    }
}

impl Write for &TcpStream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        loop {
            ready(&self.stream, PollFlags::OUT, &self.latch, self.write_timeout)?;
            match (&self.stream).write(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(ended(&self.latch).unwrap_or(error)),
                written => return written,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Read for TcpStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        (&*self).read(buffer)
    }
}

impl Write for TcpStream {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        (&*self).write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsFd for TcpStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl Drop for TcpStream {
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
                Ok(latch) => return Ok((TcpStream { stream, latch, read_timeout: None, write_timeout: None }, remote)),
                Err(ClientError::Refused(refusal)) if refusal.code == Code::NotAccepted => {
                    tracing::debug!(%remote, reason = refusal.message, "a connection was not accepted");
                }
                Err(error) => return Err(error),
            }
        }
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

impl UdpSocket {
    describe_latch!();

    /// Sends a datagram.
    pub fn send(&self, datagram: &[u8]) -> io::Result<usize> {
        loop {
            ready(&self.socket, PollFlags::OUT, &self.latch, None)?;
            match self.socket.send(datagram) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(ended(&self.latch).unwrap_or(error)),
                sent => return sent,
            }
        }
    }

    /// Receives a datagram, cut to the buffer's length.
    pub fn recv(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let events = ready(&self.socket, PollFlags::IN | PollFlags::RDHUP, &self.latch, self.read_timeout)?;
            match self.socket.recv(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // Only the daemon shuts a UDP socket down; its word why comes soon.
                Ok(0) if events.contains(PollFlags::RDHUP) => {
                    let _ = self.latch.wait(Some(Duration::from_secs(1)), |change| change.is_end(self.latch.on_break));
                    let unknown = || Change { state: State::Broken, reason: "the socket was shut down".to_owned() };
                    return Err(self.latch.end().unwrap_or_else(unknown).failure());
                }
                Err(error) => return Err(ended(&self.latch).unwrap_or(error)),
                received => return received,
            }
        }
    }
}

impl AsFd for UdpSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
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
