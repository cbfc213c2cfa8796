//! The writing half of a stream: IKE before ESP, many messages a write, and no more at a time than leaves soon.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes, BytesMut};
use tokio::sync::watch;
use tokio::time::timeout;

use super::duplex::WriteHalf;
use super::pace::Pace;
use super::queue::Queue;
use super::{Phase, Seal, closing};
use crate::codec::{PREFIX, append_esp};

/// Pieces gathered for one write; a system call takes 1024.
const PIECES: usize = 256;
/// How long the prefix waits for company: some peers read prefix and first message best from one segment.
const PREFIX_WAIT: Duration = Duration::from_millis(10);

pub(super) struct Writer {
    pub(super) number: u64,
    pub(super) socket: WriteHalf,
    pub(super) prefix: bool,
    /// The code point that the socket has.
    pub(super) marked: u8,
    pub(super) queue: Arc<Queue>,
    /// Makes ESP packets of what is in the queue, unless they are that.
    pub(super) seal: Option<Seal>,
    pub(super) phase: watch::Receiver<Phase>,
    pub(super) patience: Duration,
}

impl Writer {
    /// Writes until the stream is to be closed, then what is queued, then FIN. An error is the reason to close.
    pub(super) async fn run(mut self) -> Result<(), String> {
        let (mut batch, mut pace, mut packets) = (Batch::default(), Pace::default(), Packets::default());
        if self.prefix {
            // RFC 9329 §4, §6.1: first of all, once, and only by the TCP Originator.
            batch.push(Bytes::from_static(&PREFIX));
            let _ = timeout(PREFIX_WAIT, self.wait()).await;
        }
        loop {
            self.gather(&mut batch, &pace, &mut packets);
            if !batch.is_empty() {
                if !self.write(&mut batch, &mut pace).await? {
                    // An idle stream holds nothing.
                    (batch, packets) = (Batch::default(), Packets::default());
                }
            } else if !self.queue.is_empty() {
                // What was taken was sealed for another way, or dropped.
                tokio::task::yield_now().await;
            } else if !self.wait().await {
                break;
            }
        }
        self.socket.shutdown().await.map_err(|error| format!("write: {error}"))
    }

    /// Waits until there may be something; false when the stream is to be closed and no more will come.
    async fn wait(&mut self) -> bool {
        tokio::select! {
            biased;
            () = closing(&mut self.phase) => {
                self.queue.close();
                !self.queue.is_empty()
            }
            () = self.queue.filled() => true,
        }
    }

    /// Takes what is queued, IKE first, up to a batch.
    fn gather(&mut self, batch: &mut Batch, pace: &Pace, packets: &mut Packets) {
        let most = pace.batch();
        while batch.octets < most
            && batch.pieces.len() < PIECES
            && let Some(message) = self.queue.take_ike()
        {
            batch.push(message);
        }
        let room = most.saturating_sub(batch.octets);
        if room == 0 || self.queue.take(Instant::now(), room, &mut packets.taken) == 0 {
            return;
        }
        let Packets { taken, framed } = packets;
        framed.reserve(room);
        for packet in taken.drain(..) {
            match &self.seal {
                Some(seal) => seal(self.number, &packet, &mut |packet| {
                    append_esp(framed, packet);
                }),
                None => {
                    append_esp(framed, &packet);
                }
            }
        }
        if !framed.is_empty() {
            batch.push(framed.split().freeze());
        }
    }

    /// Writes it all; gives whether there is more already.
    async fn write(&mut self, batch: &mut Batch, pace: &mut Pace) -> Result<bool, String> {
        let octets = batch.octets;
        let dscp = self.queue.marking();
        if dscp != self.marked {
            self.socket.mark(dscp).map_err(|error| format!("mark with DSCP {dscp}: {error}"))?;
            self.marked = dscp;
        }
        while !batch.is_empty() {
            let written = {
                let pieces: Vec<IoSlice> = batch.pieces.iter().take(PIECES).map(|piece| IoSlice::new(piece)).collect();
                timeout(self.patience, self.socket.write_vectored(&pieces)).await
            };
            match written {
                Ok(Ok(0)) => return Err("write: the stream takes nothing".into()),
                Ok(Ok(written)) => batch.advance(written),
                Ok(Err(error)) => return Err(format!("write: {error}")),
                Err(_) => return Err("the peer does not read".into()),
            }
        }
        match timeout(self.patience, self.socket.flush()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(format!("write: {error}")),
            Err(_) => return Err("the peer does not read".into()),
        }
        let more = !self.queue.is_empty();
        if pace.wrote(Instant::now(), octets, more) {
            self.queue.set_limit(pace.queue());
            self.socket.limit_unsent(pace.unsent()).map_err(|error| format!("limit what is unsent: {error}"))?;
        }
        Ok(more)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // Nobody takes anything out any more.
        self.queue.close();
    }
}

/// Room for packets on their way from the queue into a batch.
#[derive(Default)]
struct Packets {
    taken: Vec<BytesMut>,
    framed: BytesMut,
}

/// What is written together, framed: nothing is copied.
#[derive(Default)]
struct Batch {
    pieces: VecDeque<Bytes>,
    octets: usize,
}

impl Batch {
    fn push(&mut self, frames: Bytes) {
        self.octets += frames.len();
        self.pieces.push_back(frames);
    }

    fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// So many octets are written.
    fn advance(&mut self, mut written: usize) {
        self.octets = self.octets.saturating_sub(written);
        while let Some(piece) = self.pieces.front_mut() {
            if written < piece.len() {
                piece.advance(written);
                return;
            }
            written -= piece.len();
            self.pieces.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Whatever a write takes, the rest follows where it ended.
    #[test]
    fn partial_writes_go_on_where_they_ended() {
        let pieces = [&PREFIX[..], &[1; 8], &[2; 300], &[3; 4]];
        let expected = pieces.concat();
        for step in 1..=expected.len() {
            let mut batch = Batch::default();
            pieces.iter().for_each(|piece| batch.push(Bytes::copy_from_slice(piece)));
            assert_eq!(batch.octets, expected.len());
            let mut written = Vec::new();
            while !batch.is_empty() {
                let octets: Vec<u8> = batch.pieces.iter().flatten().copied().take(step).collect();
                batch.advance(octets.len());
                written.extend(octets);
            }
            assert_eq!(written, expected, "{step} octets at a time");
            assert_eq!(batch.octets, 0);
        }
    }
}
