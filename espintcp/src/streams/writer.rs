//! The writing half of a stream: IKE before ESP, many messages a write.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::time::Duration;

use bytes::{Buf, Bytes};
use tokio::io::AsyncWriteExt;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tracing::debug;

use super::duplex::WriteHalf;
use super::{Phase, closing};
use crate::codec::{PREFIX, esp_length};

/// Octets gathered for one write; also how much ESP an IKE message may find in front of it here.
const BATCH: usize = 64 * 1024;
/// Messages gathered for one write; a system call takes 1024 pieces, and an ESP packet is two.
const MESSAGES: usize = 256;
/// How long the prefix waits for company: some peers read prefix and first message best from one segment.
const PREFIX_WAIT: Duration = Duration::from_millis(10);

pub(super) struct Writer {
    pub(super) socket: WriteHalf,
    pub(super) prefix: bool,
    pub(super) ike: mpsc::Receiver<Bytes>,
    pub(super) esp: mpsc::Receiver<Bytes>,
    pub(super) phase: watch::Receiver<Phase>,
    pub(super) patience: Duration,
}

impl Writer {
    /// Writes until the stream is to be closed, then what is queued, then FIN. An error is the reason to close.
    pub(super) async fn run(mut self) -> Result<(), String> {
        let mut batch = Batch::default();
        if self.prefix {
            // RFC 9329 §4, §6.1: first of all, once, and only by the TCP Originator.
            batch.ike(Bytes::from_static(&PREFIX));
            let _ = timeout(PREFIX_WAIT, self.wait(&mut batch)).await;
        }
        loop {
            self.gather(&mut batch);
            if !batch.is_empty() {
                self.write(&mut batch).await?;
            } else if !self.wait(&mut batch).await {
                break;
            }
        }
        self.socket.shutdown().await.map_err(|error| format!("write: {error}"))
    }

    /// Waits for a message; false when the stream is to be closed and no more will come.
    async fn wait(&mut self, batch: &mut Batch) -> bool {
        let esp_gone = self.esp.is_closed() && self.esp.is_empty();
        tokio::select! {
            biased;
            () = closing(&mut self.phase) => {
                self.ike.close();
                self.esp.close();
                self.gather(batch);
                !batch.is_empty()
            }
            message = self.ike.recv() => match message {
                Some(message) => {
                    batch.ike(message);
                    true
                }
                None => false,
            },
            packet = self.esp.recv(), if !esp_gone => {
                packet.into_iter().for_each(|packet| batch.esp(packet));
                true
            }
        }
    }

    /// Takes what is queued, IKE first, up to a batch.
    fn gather(&mut self, batch: &mut Batch) {
        while !batch.is_full()
            && let Ok(message) = self.ike.try_recv()
        {
            batch.ike(message);
        }
        while !batch.is_full()
            && let Ok(packet) = self.esp.try_recv()
        {
            batch.esp(packet);
        }
    }

    async fn write(&mut self, batch: &mut Batch) -> Result<(), String> {
        while !batch.is_empty() {
            let written = {
                let mut pieces = Vec::with_capacity(2 * batch.messages.len());
                batch.pieces(&mut pieces);
                timeout(self.patience, self.socket.write_vectored(&pieces)).await
            };
            match written {
                Ok(Ok(0)) => return Err("write: the stream takes nothing".into()),
                Ok(Ok(written)) => batch.advance(written),
                Ok(Err(error)) => return Err(format!("write: {error}")),
                Err(_) => return Err("the peer does not read".into()),
            }
        }
        // TLS may still hold what it has sealed.
        match timeout(self.patience, self.socket.flush()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(format!("write: {error}")),
            Err(_) => return Err("the peer does not read".into()),
        }
        if self.ike.is_empty() && self.esp.is_empty() {
            // An idle stream holds nothing.
            *batch = Batch::default();
        }
        Ok(())
    }
}

/// What is written together, each message where it came in: nothing is copied.
#[derive(Default)]
struct Batch {
    /// The Length field of an ESP packet, and the packet; an IKE message has its own.
    messages: VecDeque<(Option<[u8; 2]>, Bytes)>,
    octets: usize,
}

impl Batch {
    /// Octets that are framed already.
    fn ike(&mut self, message: Bytes) {
        self.octets += message.len();
        self.messages.push_back((None, message));
    }

    fn esp(&mut self, packet: Bytes) {
        match esp_length(&packet) {
            Some(length) => {
                self.octets += packet.len() + 2;
                self.messages.push_back((Some(length.to_be_bytes()), packet));
            }
            None => debug!(octets = packet.len(), "not an ESP packet that fits a frame: dropped"),
        }
    }

    fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    fn is_full(&self) -> bool {
        self.octets >= BATCH || self.messages.len() >= MESSAGES
    }

    fn pieces<'a>(&'a self, pieces: &mut Vec<IoSlice<'a>>) {
        for (length, message) in &self.messages {
            pieces.extend(length.as_ref().map(|length| IoSlice::new(length)));
            pieces.push(IoSlice::new(message));
        }
    }

    /// So many octets are written.
    fn advance(&mut self, mut written: usize) {
        self.octets = self.octets.saturating_sub(written);
        while let Some((length, message)) = self.messages.front_mut() {
            let header = length.map_or(0, |length| length.len());
            if written >= header + message.len() {
                written -= header + message.len();
                self.messages.pop_front();
                continue;
            }
            if written >= header {
                *length = None;
                message.advance(written - header);
            } else if written > 0
                && let Some(length) = length.take()
            {
                // Half of the Length field is gone: rare enough to be copied.
                let rest = [length.get(written..).unwrap_or_default(), message].concat();
                *message = Bytes::from(rest);
            }
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Whatever a write takes, the rest follows where it ended.
    #[test]
    fn partial_writes_go_on_where_they_ended() {
        let mut expected = b"IKETCP".to_vec();
        for packet in [vec![1; 8], vec![2; 300], vec![0; 20], vec![3; 4]] {
            expected.extend(crate::codec::frame_esp(&packet).unwrap_or_default());
        }
        for step in 1..=expected.len() {
            let mut batch = Batch::default();
            batch.ike(Bytes::from_static(&PREFIX));
            for packet in [vec![1; 8], vec![2; 300], vec![0; 20], vec![3; 4]] {
                batch.esp(packet.into());
            }
            assert_eq!(batch.octets, expected.len());
            let mut written = Vec::new();
            while !batch.is_empty() {
                let mut pieces = Vec::new();
                batch.pieces(&mut pieces);
                let octets: Vec<u8> = pieces.iter().flat_map(|piece| piece.iter().copied()).take(step).collect();
                batch.advance(octets.len());
                written.extend(octets);
            }
            assert_eq!(written, expected, "{step} octets at a time");
            assert_eq!(batch.octets, 0);
        }
    }
}
