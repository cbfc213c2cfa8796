//! The writing half of a stream: IKE before ESP, many messages a write.

use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::AsyncWriteExt;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tracing::debug;

use super::duplex::WriteHalf;
use super::{Phase, closing};
use crate::codec::{PREFIX, append_esp};

/// Octets gathered for one write; also how much ESP an IKE message may find in front of it here.
const BATCH: usize = 64 * 1024;
/// Room kept while there is nothing to write.
const IDLE: usize = 8 * 1024;
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
        let mut out = BytesMut::new();
        if self.prefix {
            // RFC 9329 §4, §6.1: first of all, once, and only by the TCP Originator.
            out.extend_from_slice(&PREFIX);
            let _ = timeout(PREFIX_WAIT, self.wait(&mut out)).await;
        }
        loop {
            self.gather(&mut out);
            if !out.is_empty() {
                self.write(&mut out).await?;
            } else if !self.wait(&mut out).await {
                break;
            }
        }
        self.socket.shutdown().await.map_err(|error| format!("write: {error}"))
    }

    /// Waits for a message; false when the stream is to be closed and no more will come.
    async fn wait(&mut self, out: &mut BytesMut) -> bool {
        let esp_gone = self.esp.is_closed() && self.esp.is_empty();
        tokio::select! {
            biased;
            () = closing(&mut self.phase) => {
                self.ike.close();
                self.esp.close();
                self.gather(out);
                !out.is_empty()
            }
            message = self.ike.recv() => match message {
                Some(message) => {
                    out.extend_from_slice(&message);
                    true
                }
                None => false,
            },
            packet = self.esp.recv(), if !esp_gone => {
                packet.iter().for_each(|packet| append_packet(out, packet));
                true
            }
        }
    }

    /// Takes what is queued, IKE first, up to a batch.
    fn gather(&mut self, out: &mut BytesMut) {
        while out.len() < BATCH
            && let Ok(message) = self.ike.try_recv()
        {
            out.extend_from_slice(&message);
        }
        while out.len() < BATCH
            && let Ok(packet) = self.esp.try_recv()
        {
            append_packet(out, &packet);
        }
    }

    async fn write(&mut self, out: &mut BytesMut) -> Result<(), String> {
        let mut rest = out.as_ref();
        while rest.has_remaining() {
            match timeout(self.patience, self.socket.write_buf(&mut rest)).await {
                Ok(Ok(0)) => return Err("write: the stream takes nothing".into()),
                Ok(Ok(_)) => {}
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
        out.clear();
        if out.capacity() > IDLE && self.ike.is_empty() && self.esp.is_empty() {
            *out = BytesMut::new();
        }
        Ok(())
    }
}

fn append_packet(out: &mut BytesMut, packet: &[u8]) {
    if !append_esp(out, packet) {
        debug!(octets = packet.len(), "not an ESP packet that fits a frame: dropped");
    }
}
