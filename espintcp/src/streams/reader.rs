//! The reading half of a stream: frames to the ESP handler and the event channel, and the timers on a peer.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use super::duplex::ReadHalf;
use super::standing::Standing;
use super::{Inner, MEANINGLESS, Phase, StreamEvent, UNAUTHENTIC, closing};
use crate::codec::{Deframer, Frame};

/// Least and most octets asked for in one read. The size follows the traffic, so that an idle stream holds little.
const READ: (usize, usize) = (4 * 1024, 64 * 1024);

/// ESP packets that are handed over together, at most.
const BATCH: usize = 64;

pub(super) struct Reader {
    pub(super) number: u64,
    pub(super) local: SocketAddr,
    pub(super) remote: SocketAddr,
    pub(super) socket: ReadHalf,
    pub(super) deframer: Deframer,
    pub(super) inner: Arc<Inner>,
    pub(super) phase: watch::Receiver<Phase>,
    pub(super) standing: Arc<Standing>,
    pub(super) accepted: Option<(Instant, Instant)>,
}

impl Reader {
    /// Reads until the stream ends; gives the reason.
    pub(super) async fn run(mut self) -> String {
        let mut timers = Timers { message_seen: false, partial_since: None, completed: 0 };
        let mut size = READ.0;
        let mut batch = Vec::new();
        loop {
            loop {
                let frame = self.deframer.next_frame();
                let last = !matches!(frame, Ok(Some(Frame::Esp(_))));
                if (last || batch.len() == BATCH)
                    && let Err(reason) = self.hand_over(&mut batch)
                {
                    return reason.into();
                }
                match frame {
                    Ok(Some(Frame::Esp(packet))) => {
                        timers.message_seen = true;
                        batch.push(packet);
                    }
                    Ok(Some(Frame::Ike(message))) => {
                        timers.message_seen = true;
                        let event = StreamEvent::Ike {
                            stream: self.number,
                            local: self.local,
                            remote: self.remote,
                            bytes: message.to_vec(),
                        };
                        if self.inner.events.send(event).await.is_err() {
                            return "nobody listens to events".into();
                        }
                    }
                    Ok(None) => break,
                    Err(error) => return error.to_string(),
                }
            }

            let now = Instant::now();
            timers.look(&self.deframer, now);
            let due = self.due(&timers);
            if let Some((deadline, reason)) = due
                && deadline <= now
            {
                return reason.into();
            }

            let buffer = self.deframer.buffer();
            // An idle stream holds nothing.
            if buffer.is_empty() && (size == READ.0 || buffer.capacity() > 2 * size) {
                *buffer = BytesMut::new();
            }
            if size == READ.0 {
                batch = Vec::new();
            }
            let read = async {
                self.socket.readable().await?;
                buffer.reserve(size);
                self.socket.read_buf(buffer).await
            };
            let read = tokio::select! {
                biased;
                () = closing(&mut self.phase) => None,
                read = read => Some(read),
                () = until(due.map(|(deadline, _)| deadline)) => continue,
            };
            let Some(read) = read else { return discard(&mut self.socket, self.deframer.buffer()).await };
            match read {
                // RFC 9329 §6.1: a message that is not whole is discarded, with the deframer.
                Ok(0) if self.deframer.is_partial() => return "the peer closed it in the middle of a message".into(),
                Ok(0) => return "the peer closed it".into(),
                Ok(read) if read >= size => size = (size * 2).min(READ.1),
                Ok(read) if read < size / 4 => size = (size / 2).max(READ.0),
                Ok(_) => {}
                Err(error) => return format!("read: {error}"),
            }
        }
    }

    /// An error is the reason to close.
    fn hand_over(&self, batch: &mut Vec<BytesMut>) -> Result<(), &'static str> {
        if batch.is_empty() {
            return Ok(());
        }
        let worth = (self.inner.esp)(self.number, self.local, self.remote, batch);
        batch.clear();
        if worth.authentic {
            self.standing.forgive();
        }
        if worth.forged {
            return Err(UNAUTHENTIC);
        }
        if worth.unknown > 0 && self.standing.complain(worth.unknown, &self.inner.limits) {
            return Err(MEANINGLESS);
        }
        Ok(())
    }

    /// The next deadline and what it means to miss it.
    fn due(&self, timers: &Timers) -> Option<(Instant, &'static str)> {
        let partial =
            timers.partial_since.map(|since| (since + self.inner.limits.partial_frame, "half a message in time"));
        let stranger = self.accepted.filter(|_| !self.standing.is_vouched()).map(|(accepted, first)| {
            if timers.message_seen {
                (accepted + self.inner.limits.unauthenticated, "no authentic message in time")
            } else {
                (first, "no message in time")
            }
        });
        partial.into_iter().chain(stranger).min_by_key(|(deadline, _)| *deadline)
    }
}

struct Timers {
    message_seen: bool,
    /// Since when one and the same frame is incomplete.
    partial_since: Option<Instant>,
    completed: u64,
}

impl Timers {
    fn look(&mut self, deframer: &Deframer, now: Instant) {
        if !deframer.is_partial() {
            self.partial_since = None;
        } else if self.partial_since.is_none() || self.completed != deframer.completed() {
            self.partial_since = Some(now);
        }
        self.completed = deframer.completed();
    }
}

/// Reads until the prefix is whole, and maybe more (RFC 9329 §6.1).
pub(super) async fn read_prefix<R: AsyncRead + Unpin + ?Sized>(
    socket: &mut R,
    deframer: &mut Deframer,
) -> io::Result<()> {
    while !deframer.accept_prefix().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))? {
        let buffer = deframer.buffer();
        buffer.reserve(READ.0);
        if socket.read_buf(buffer).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(())
}

/// Drops what comes until the peer closes too.
async fn discard<R: AsyncRead + Unpin>(socket: &mut R, buffer: &mut BytesMut) -> String {
    loop {
        buffer.clear();
        match socket.read_buf(buffer).await {
            Ok(0) => return "closed by this side".into(),
            Ok(_) => {}
            Err(error) => return format!("closed by this side; read: {error}"),
        }
    }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
