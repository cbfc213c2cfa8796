//! A client of VICI: one command at a time, with the events that it registered for.

use std::collections::VecDeque;
use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

use crate::tree::{Origin, Section};
use crate::vici::codec::{CodecError, MAX_PACKET, Packet};
use crate::vici::{Uri, UriError};

/// Events that arrive while nobody reads them, at most.
const MAX_EVENTS: usize = 4096;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The socket's address is not one.
    #[error(transparent)]
    Uri(#[from] UriError),
    /// The connection broke.
    #[error("VICI connection: {0}")]
    Io(#[from] io::Error),
    /// The daemon sent nonsense.
    #[error("VICI answer: {0}")]
    Codec(#[from] CodecError),
    /// The daemon does not know the command.
    #[error("the daemon does not know the command '{0}'")]
    UnknownCommand(String),
    /// The daemon does not know the event.
    #[error("the daemon does not know the event '{0}'")]
    UnknownEvent(String),
    /// An answer to no question.
    #[error("the daemon sent an answer out of order")]
    OutOfOrder,
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// A connection to a daemon.
pub struct Client {
    stream: Box<dyn Stream>,
    events: VecDeque<(String, Section)>,
}

impl Client {
    /// Connects to `unix://path` or `tcp://host:port`.
    ///
    /// # Errors
    /// Those of the address and of connecting.
    pub async fn connect(uri: &str) -> Result<Self, ClientError> {
        let stream: Box<dyn Stream> = match uri.parse::<Uri>()? {
            Uri::Unix(path) => Box::new(UnixStream::connect(path).await?),
            Uri::Tcp(address) => Box::new(TcpStream::connect(address).await?),
        };
        Ok(Self { stream, events: VecDeque::new() })
    }

    /// An empty message to fill with a command's arguments.
    pub fn message() -> Section {
        Section::new(Origin::Vici("request".into()))
    }

    /// Sends a command and waits for its answer; events that come before are kept for [`Self::next_event`].
    ///
    /// # Errors
    /// When the connection breaks or the daemon does not know the command. A refusal is an answer.
    pub async fn request(&mut self, command: &str, message: Section) -> Result<Section, ClientError> {
        let mut events = Vec::new();
        let keep = |name: &str, message: &Section| {
            if events.len() < MAX_EVENTS {
                events.push((name.to_owned(), message.clone()));
            }
        };
        let answer = self.request_with_events(command, message, keep).await;
        for (name, message) in events {
            self.keep(name, message);
        }
        answer
    }

    /// As [`Self::request`], handing each event to `on_event` while waiting.
    ///
    /// # Errors
    /// As [`Self::request`].
    pub async fn request_with_events(
        &mut self,
        command: &str,
        message: Section,
        mut on_event: impl FnMut(&str, &Section),
    ) -> Result<Section, ClientError> {
        self.send(&Packet::Request { name: command.to_owned(), message }).await?;
        loop {
            match self.receive().await? {
                Packet::Response(message) => return Ok(message),
                Packet::CommandUnknown => return Err(ClientError::UnknownCommand(command.to_owned())),
                Packet::Event { name, message } => on_event(&name, &message),
                _ => return Err(ClientError::OutOfOrder),
            }
        }
    }

    /// Registers for an event.
    ///
    /// # Errors
    /// When the connection breaks or the daemon does not know the event.
    pub async fn register(&mut self, event: &str) -> Result<(), ClientError> {
        self.send(&Packet::Register(event.to_owned())).await?;
        self.confirmation(event).await
    }

    /// Takes a registration back.
    ///
    /// # Errors
    /// As [`Self::register`].
    pub async fn unregister(&mut self, event: &str) -> Result<(), ClientError> {
        self.send(&Packet::Unregister(event.to_owned())).await?;
        self.confirmation(event).await
    }

    /// The next event. Not safe to cancel in the middle of a packet: after a timeout, drop the client.
    ///
    /// # Errors
    /// When the connection breaks.
    pub async fn next_event(&mut self) -> Result<(String, Section), ClientError> {
        if let Some(event) = self.events.pop_front() {
            return Ok(event);
        }
        match self.receive().await? {
            Packet::Event { name, message } => Ok((name, message)),
            _ => Err(ClientError::OutOfOrder),
        }
    }

    async fn confirmation(&mut self, event: &str) -> Result<(), ClientError> {
        loop {
            match self.receive().await? {
                Packet::EventConfirm => return Ok(()),
                Packet::EventUnknown => return Err(ClientError::UnknownEvent(event.to_owned())),
                Packet::Event { name, message } => self.keep(name, message),
                _ => return Err(ClientError::OutOfOrder),
            }
        }
    }

    fn keep(&mut self, name: String, message: Section) {
        if self.events.len() < MAX_EVENTS {
            self.events.push_back((name, message));
        }
    }

    async fn send(&mut self, packet: &Packet) -> Result<(), ClientError> {
        let bytes = packet.encode();
        let too_long = || io::Error::new(io::ErrorKind::InvalidInput, "the request is longer than 512 KiB");
        if bytes.len() > MAX_PACKET {
            return Err(too_long().into());
        }
        let length = u32::try_from(bytes.len()).map_err(|_| too_long())?;
        self.stream.write_all(&length.to_be_bytes()).await?;
        self.stream.write_all(&bytes).await?;
        Ok(self.stream.flush().await?)
    }

    async fn receive(&mut self) -> Result<Packet, ClientError> {
        let length = self.stream.read_u32().await?;
        let length = usize::try_from(length).ok().filter(|length| *length <= MAX_PACKET);
        let length =
            length.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "a packet longer than 512 KiB"))?;
        let mut bytes = vec![0; length];
        self.stream.read_exact(&mut bytes).await?;
        Ok(Packet::decode(&bytes)?)
    }
}
