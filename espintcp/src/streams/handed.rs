//! A plain socket that may be handed over to the kernel, which then does ESP and framing itself (Linux `espintcp`).
//!
//! Octets are frames on either side of here before and after, so reader and writer need not know. The kernel begins with
//! the next octet in each direction, so that is where a message must begin: once the hand-over is wanted, no more is read
//! or written than ends the message that is on its way, and the reader hands the socket over when both are at an end.

use std::io::{self, IoSlice};
use std::os::fd::AsFd as _;
use std::pin::Pin;
use std::sync::{Arc, Mutex, OnceLock};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::{Buf as _, BufMut as _, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite as _, AsyncWriteExt as _, ReadBuf};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::sleep;

use super::{Prepare, lock};
use crate::codec::PREFIX;

/// Where among frames the next octet is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// At the beginning of one.
    Begin,
    /// Behind the first octet of the Length field.
    Length(u8),
    /// So many octets are missing.
    Within(usize),
    /// The Length field was impossible: there is no next frame.
    Lost,
}

impl Place {
    /// After these octets.
    fn after(mut self, mut octets: &[u8]) -> Self {
        while let Some((first, rest)) = octets.split_first() {
            (self, octets) = match self {
                Self::Begin => (Self::Length(*first), rest),
                Self::Length(high) => {
                    let missing = usize::from(u16::from_be_bytes([high, *first])).checked_sub(2);
                    (missing.map_or(Self::Lost, Self::within), rest)
                }
                Self::Within(missing) => {
                    let taken = missing.min(octets.len());
                    (Self::within(missing - taken), octets.get(taken..).unwrap_or_default())
                }
                Self::Lost => return Self::Lost,
            };
        }
        self
    }

    fn within(missing: usize) -> Self {
        if missing == 0 { Self::Begin } else { Self::Within(missing) }
    }

    /// How many octets may follow without more than one frame's end.
    fn room(self) -> usize {
        match self {
            Self::Begin | Self::Lost => 0,
            Self::Length(_) => 1,
            Self::Within(missing) => missing,
        }
    }
}

/// What both halves and the table share.
#[derive(Default)]
pub(super) struct Gate {
    /// How to hand the socket over, once that is wanted.
    wanted: OnceLock<Prepare>,
    /// The reader, while it waits for octets.
    reader: Mutex<Option<Waker>>,
    writing: Mutex<Writing>,
}

struct Writing {
    place: Place,
    /// The kernel has the socket.
    handed: bool,
    /// Who waits for the other: reader or writer.
    waiting: Option<Waker>,
}

impl Default for Writing {
    fn default() -> Self {
        Self { place: Place::Begin, handed: false, waiting: None }
    }
}

impl Gate {
    /// Has the socket handed over as soon as no message is half on its way.
    pub(super) fn hand_over(&self, how: Prepare) {
        let _ = self.wanted.set(how);
        if let Some(reader) = lock(&self.reader).take() {
            reader.wake();
        }
    }
}

/// Splits a socket of which these octets were read already, and where the stream prefix is still to be written.
pub(super) fn split(socket: TcpStream, read: &[u8], writes_prefix: bool) -> (HandedReader, HandedWriter, Arc<Gate>) {
    let (read_half, write_half) = socket.into_split();
    let gate = Arc::new(Gate::default());
    if writes_prefix {
        lock(&gate.writing).place = Place::Within(PREFIX.len());
    }
    let reader = HandedReader {
        socket: read_half,
        gate: gate.clone(),
        place: Place::Begin.after(read),
        handed: false,
        message: BytesMut::new(),
    };
    let writer = HandedWriter { socket: write_half, gate: gate.clone(), outgoing: BytesMut::new() };
    (reader, writer, gate)
}

pub(super) struct HandedReader {
    socket: OwnedReadHalf,
    gate: Arc<Gate>,
    place: Place,
    handed: bool,
    /// The rest of a message that the kernel gave, framed.
    message: BytesMut,
}

impl HandedReader {
    /// Waits until there may be something to read, or to hand over.
    pub(super) async fn readable(&self) -> io::Result<()> {
        std::future::poll_fn(|cx| {
            if !self.message.is_empty() {
                return Poll::Ready(Ok(()));
            }
            if !self.handed {
                // Before the look: who wants it later wakes us.
                *lock(&self.gate.reader) = Some(cx.waker().clone());
                if self.gate.wanted.get().is_some() {
                    return Poll::Ready(Ok(()));
                }
            }
            self.socket.as_ref().poll_read_ready(cx)
        })
        .await
    }

    /// Hands the socket over if that is wanted; not before the writer has ended its message.
    fn poll_hand_over(&mut self, cx: &Context<'_>, how: &Prepare) -> Poll<io::Result<()>> {
        if self.place != Place::Begin {
            return Poll::Ready(Ok(()));
        }
        let mut writing = lock(&self.gate.writing);
        if writing.place != Place::Begin {
            writing.waiting = Some(cx.waker().clone());
            return Poll::Pending;
        }
        how(self.socket.as_ref().as_fd())?;
        (self.handed, writing.handed) = (true, true);
        if let Some(writer) = writing.waiting.take() {
            writer.wake();
        }
        Poll::Ready(Ok(()))
    }

    /// Takes one message from the kernel, which gives them whole.
    fn poll_message(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.socket.as_ref().poll_read_ready(cx))?;
            // Each is copied: they are IKE's.
            let mut buffer = vec![0; usize::from(u16::MAX)];
            match self.socket.try_read(&mut buffer) {
                Ok(0) => return Poll::Ready(Ok(0)),
                Ok(octets) => {
                    let Some(length) = u16::try_from(octets + 2).ok().zip(buffer.get(..octets)) else {
                        return Poll::Ready(Err(io::ErrorKind::InvalidData.into()));
                    };
                    self.message.put_u16(length.0);
                    self.message.put_slice(length.1);
                    return Poll::Ready(Ok(octets));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncRead for HandedReader {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let gate = this.gate.clone();
        let wanted = if this.handed {
            None
        } else {
            // Before the look: who wants it later wakes us.
            *lock(&gate.reader) = Some(cx.waker().clone());
            gate.wanted.get()
        };
        if let Some(how) = wanted {
            ready!(this.poll_hand_over(cx, how))?;
        }
        if this.handed {
            if this.message.is_empty() && ready!(this.poll_message(cx))? == 0 {
                return Poll::Ready(Ok(()));
            }
            let taken = this.message.split_to(this.message.len().min(buffer.remaining()));
            buffer.put_slice(&taken);
            if this.message.is_empty() {
                this.message = BytesMut::new();
            }
            return Poll::Ready(Ok(()));
        }
        let before = buffer.filled().len();
        if wanted.is_none() {
            ready!(Pin::new(&mut this.socket).poll_read(cx, buffer))?;
        } else {
            // Not beyond the end of a message, where the kernel is to begin.
            let mut rest = vec![0; this.place.room().min(buffer.remaining())];
            let mut part = ReadBuf::new(&mut rest);
            ready!(Pin::new(&mut this.socket).poll_read(cx, &mut part))?;
            buffer.put_slice(part.filled());
        }
        this.place = this.place.after(buffer.filled().get(before..).unwrap_or_default());
        Poll::Ready(Ok(()))
    }
}

pub(super) struct HandedWriter {
    socket: OwnedWriteHalf,
    gate: Arc<Gate>,
    /// Frames that the kernel has not taken.
    outgoing: BytesMut,
}

impl HandedWriter {
    pub(super) fn socket(&self) -> &TcpStream {
        self.socket.as_ref()
    }

    /// Writes some of these octets; once the kernel has the socket all of them, message by message.
    pub(super) async fn write_vectored(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        if let Some(written) = std::future::poll_fn(|cx| self.poll_write(cx, pieces)).await? {
            return Ok(written);
        }
        for piece in pieces {
            self.outgoing.extend_from_slice(piece);
        }
        self.flush().await?;
        Ok(pieces.iter().map(|piece| piece.len()).sum())
    }

    /// `None` when the kernel has the socket.
    fn poll_write(&mut self, cx: &mut Context<'_>, pieces: &[IoSlice<'_>]) -> Poll<io::Result<Option<usize>>> {
        // Only the reader that hands over contends for it.
        let mut writing = lock(&self.gate.writing);
        if writing.handed {
            return Poll::Ready(Ok(None));
        }
        let socket = Pin::new(&mut self.socket);
        let written = if self.gate.wanted.get().is_none() {
            ready!(socket.poll_write_vectored(cx, pieces))?
        } else {
            let room = writing.place.room();
            if room == 0 {
                writing.waiting = Some(cx.waker().clone());
                return Poll::Pending;
            }
            let rest: Vec<u8> = pieces.iter().flat_map(|piece| piece.iter().copied()).take(room).collect();
            ready!(socket.poll_write(cx, &rest))?
        };
        let mut left = written;
        for piece in pieces {
            let part = piece.get(..left.min(piece.len())).unwrap_or_default();
            writing.place = writing.place.after(part);
            left -= part.len();
        }
        if writing.place == Place::Begin
            && let Some(reader) = writing.waiting.take()
        {
            reader.wake();
        }
        Poll::Ready(Ok(Some(written)))
    }

    /// Has the kernel take what it has not taken yet: each message whole, with its marker and without its length.
    pub(super) async fn flush(&mut self) -> io::Result<()> {
        while let Some(length) = self.outgoing.first_chunk().map(|length| usize::from(u16::from_be_bytes(*length))) {
            let Some(message) = self.outgoing.get(2..length) else { return Ok(()) };
            self.socket.writable().await?;
            // By `writev`: the kernel takes no flags.
            match self.socket.try_write_vectored(&[IoSlice::new(message)]) {
                Ok(written) if written == message.len() => self.outgoing.advance(length),
                Ok(_) => return Err(io::Error::new(io::ErrorKind::WriteZero, "the kernel took a part of a message")),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.raw_os_error() == Some(NO_BUFFERS) => sleep(AGAIN).await,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    pub(super) async fn shutdown(&mut self) -> io::Result<()> {
        self.socket.shutdown().await
    }
}

/// ENOBUFS: another message is stuck.
const NO_BUFFERS: i32 = 105;
const AGAIN: Duration = Duration::from_millis(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_known_however_octets_come() {
        let frames = [&[0, 5, 1, 2, 3][..], &[0, 2], &[1, 4], &[9; 258], &[0, 3, 0xff]].concat();
        for step in 1..frames.len() {
            let ended = frames.chunks(step).fold(Place::Begin, Place::after);
            assert_eq!(ended, Place::Begin, "{step}");
        }
        assert_eq!(Place::Begin.after(&frames[..3]), Place::Within(2));
        assert_eq!((Place::Begin.after(&[0]).room(), Place::Begin.after(&frames[..3]).room()), (1, 2));
        assert_eq!(Place::Begin.after(&[0, 1, 0, 2]), Place::Lost);
        assert_eq!(Place::Within(6).after(b"IKETCP"), Place::Begin);
    }

    /// No kernel, but the same rules: the hand-over comes between two messages of both directions, and never before.
    #[tokio::test]
    async fn a_socket_is_handed_over_between_messages() {
        use std::sync::atomic::{AtomicBool, Ordering};
        use tokio::io::AsyncReadExt as _;
        use tokio::net::TcpListener;

        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut peer = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (mut reader, mut writer, gate) = split(listener.accept().await.unwrap().0, &[0, 6, 1], true);
        let handed = Arc::new(AtomicBool::new(false));
        let told = handed.clone();
        gate.hand_over(Arc::new(move |_| {
            told.store(true, Ordering::SeqCst);
            Ok(())
        }));

        // The rest of what was begun, and no more.
        peer.write_all(&[2, 3, 4, 0, 4, 5, 6]).await.unwrap();
        let mut buffer = [0; 100];
        assert_eq!(reader.read(&mut buffer).await.unwrap(), 3);
        assert_eq!(buffer[..3], [2, 3, 4]);
        let waiting = tokio::spawn(async move {
            let read = reader.read(&mut buffer).await.unwrap();
            (buffer[..read].to_vec(), reader)
        });
        tokio::task::yield_now().await;
        assert!(!handed.load(Ordering::SeqCst), "the prefix is not written");
        assert_eq!(writer.write_vectored(&[IoSlice::new(b"IKE")]).await.unwrap(), 3);
        assert!(!handed.load(Ordering::SeqCst));
        assert_eq!(writer.write_vectored(&[IoSlice::new(b"TCP\x00\x04ab")]).await.unwrap(), 3);
        // A real kernel would have given the message without its length: what it gives gets one here.
        let (message, _reader) = waiting.await.unwrap();
        assert!(handed.load(Ordering::SeqCst));
        assert_eq!(message, [0, 6, 0, 4, 5, 6]);
        // And what goes out has none.
        assert_eq!(writer.write_vectored(&[IoSlice::new(&[0]), IoSlice::new(b"\x04ab")]).await.unwrap(), 4);
        let mut got = [0; 8];
        peer.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"IKETCPab");
    }

    #[tokio::test]
    async fn a_reader_that_waits_without_a_buffer_hears_that_the_socket_is_to_be_handed_over() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let _peer = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (reader, _writer, gate) = split(listener.accept().await.unwrap().0, &[], false);
        let waiting = tokio::spawn(async move { reader.readable().await });
        tokio::task::yield_now().await;
        gate.hand_over(Arc::new(|_| Ok(())));
        tokio::time::timeout(Duration::from_secs(20), waiting).await.unwrap().unwrap().unwrap();
    }
}
