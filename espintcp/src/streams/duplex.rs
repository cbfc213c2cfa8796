//! A connected socket, in TLS or not.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use socket2::{SockRef, Socket};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsStream;

use super::handed::{self, Gate, HandedReader, HandedWriter};
use super::{lock, socket};

/// What both are.
pub(super) trait Octets: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Octets for T {}

pub(super) enum Duplex {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

impl Duplex {
    pub(super) fn whole(&mut self) -> &mut dyn Octets {
        match self {
            Self::Plain(socket) => socket,
            Self::Tls(stream) => stream,
        }
    }

    /// Splits it, when these octets were read beyond the stream prefix; a plain one may be handed over later.
    pub(super) fn split(self, read: &[u8], writes_prefix: bool) -> (ReadHalf, WriteHalf, Option<Arc<Gate>>) {
        match self {
            Self::Plain(socket) => {
                let (read_half, write_half, gate) = handed::split(socket, read, writes_prefix);
                (ReadHalf::Plain(read_half), WriteHalf::Plain(write_half), Some(gate))
            }
            Self::Tls(stream) => {
                let shared = Arc::new(Mutex::new(*stream));
                (ReadHalf::Tls(shared.clone()), WriteHalf::Tls(shared), None)
            }
        }
    }
}

/// Both halves of a stream in TLS; held for one step of either.
type Shared = Arc<Mutex<TlsStream<TcpStream>>>;

pub(super) enum ReadHalf {
    Plain(HandedReader),
    Tls(Shared),
}

impl ReadHalf {
    /// Waits until there may be something to read, as far as that can be known without room to read it into.
    pub(super) async fn readable(&self) -> io::Result<()> {
        match self {
            Self::Plain(socket) => socket.readable().await,
            Self::Tls(_) => Ok(()),
        }
    }
}

impl AsyncRead for ReadHalf {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(socket) => Pin::new(socket).poll_read(cx, buffer),
            Self::Tls(shared) => Pin::new(&mut *lock(shared)).poll_read(cx, buffer),
        }
    }
}

pub(super) enum WriteHalf {
    Plain(HandedWriter),
    Tls(Shared),
}

impl WriteHalf {
    /// Octets that TCP holds unsent before a write waits.
    pub(super) fn limit_unsent(&self, octets: u32) -> io::Result<()> {
        self.set(|socket| socket.set_tcp_notsent_lowat(octets))
    }

    /// The code point of all packets from now on.
    pub(super) fn mark(&self, dscp: u8) -> io::Result<()> {
        self.set(|socket| socket::mark(socket, dscp))
    }

    fn set(&self, set: impl FnOnce(&Socket) -> io::Result<()>) -> io::Result<()> {
        match self {
            Self::Plain(socket) => set(&SockRef::from(socket.socket())),
            Self::Tls(shared) => set(&SockRef::from(lock(shared).get_ref().0)),
        }
    }

    pub(super) async fn write_vectored(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.write_vectored(pieces).await,
            Self::Tls(shared) => {
                std::future::poll_fn(|cx| Pin::new(&mut *lock(shared)).poll_write_vectored(cx, pieces)).await
            }
        }
    }

    /// TLS may still hold what it has sealed.
    pub(super) async fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(socket) => socket.flush().await,
            Self::Tls(shared) => std::future::poll_fn(|cx| Pin::new(&mut *lock(shared)).poll_flush(cx)).await,
        }
    }

    /// FIN; in TLS after close_notify.
    pub(super) async fn shutdown(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(socket) => socket.shutdown().await,
            Self::Tls(shared) => std::future::poll_fn(|cx| Pin::new(&mut *lock(shared)).poll_shutdown(cx)).await,
        }
    }
}
