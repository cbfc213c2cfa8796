//! The VICI server: sockets, packets, events. What the commands do is in [`super::commands`].
//!
//! Each connection has a task that reads packets, one that writes them, and one that waits for the command in
//! flight and for events. A client that does not read loses events, then its connection; it never holds up others.

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, broadcast, mpsc, watch};
use tokio::task::JoinHandle;

use crate::control::Control;
use crate::tree::Section;
use crate::vici::codec::{CodecError, MAX_PACKET, Packet};
use crate::vici::events::{self, Announcement};
use crate::vici::{Store, Uri, commands};

/// Clients at a time; more wait in the listener's queue.
const MAX_CLIENTS: usize = 256;
/// Packets queued for one client.
const MAX_QUEUED: usize = 1024;
/// Requests of a client that are read ahead; the others wait in its socket.
const MAX_PENDING: usize = 16;
/// How long a client may take to read a packet.
const WRITE_TIMEOUT: Duration = Duration::from_secs(30);

/// What all connections share.
pub(super) struct Shared {
    pub(super) control: Control,
    pub(super) store: Arc<Store>,
    pub(super) announcements: broadcast::Sender<Arc<Announcement>>,
    /// Clients that are registered for announcements: without any, none are made.
    pub(super) listeners: AtomicUsize,
}

/// A running server. Dropping it stops the server and removes its socket.
pub struct ServerHandle {
    stop: watch::Sender<bool>,
    tasks: Vec<JoinHandle<()>>,
    socket: Option<PathBuf>,
    local: String,
}

impl ServerHandle {
    /// The address that the server listens at, as a URI: with the port that the system chose for `tcp://…:0`.
    pub fn uri(&self) -> &str {
        &self.local
    }

    /// Stops: no more commands, all connections closed, the socket removed.
    pub async fn stop(mut self) {
        let _ = self.stop.send(true);
        for task in std::mem::take(&mut self.tasks) {
            let _ = task.await;
        }
    }
}

impl Drop for ServerHandle {
    fn drop(&mut self) {
        let _ = self.stop.send(true);
        for task in &self.tasks {
            task.abort();
        }
        if let Some(path) = self.socket.take() {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Serves VICI at `unix://path` (mode 0660; a socket that nobody listens at is replaced) or `tcp://host:port`.
/// A TCP socket has no access control at all: loopback is for tests only, and others are refused.
///
/// # Errors
/// Those of making the socket; `InvalidInput` for what is not an address.
pub async fn serve(uri: &str, control: Control, store: Arc<Store>) -> io::Result<ServerHandle> {
    let invalid = |reason: String| io::Error::new(io::ErrorKind::InvalidInput, reason);
    let (announcements, _) = broadcast::channel(1024);
    let shared = Arc::new(Shared { control, store, announcements, listeners: AtomicUsize::new(0) });
    let (stop, stopping) = watch::channel(false);
    let mut handle = ServerHandle { stop, tasks: Vec::new(), socket: None, local: uri.to_owned() };
    let translator = tokio::spawn(until_stopped(stopping.clone(), events::translate(Arc::clone(&shared))));
    handle.tasks.push(translator);
    match uri.parse::<Uri>().map_err(|error| invalid(error.to_string()))? {
        Uri::Unix(path) => {
            let listener = bind_unix(&path).await?;
            handle.socket = Some(path);
            let accept = accept_unix(listener, shared, stopping.clone());
            handle.tasks.push(tokio::spawn(until_stopped(stopping, accept)));
        }
        Uri::Tcp(address) => {
            let listener = TcpListener::bind(address).await?;
            let local = listener.local_addr()?;
            if !local.ip().is_loopback() {
                return Err(invalid(format!("VICI on {local} would be open to the network; use unix:// or loopback")));
            }
            handle.local = format!("tcp://{local}");
            let accept = accept_tcp(listener, shared, stopping.clone());
            handle.tasks.push(tokio::spawn(until_stopped(stopping, accept)));
        }
    }
    Ok(handle)
}

/// Runs a future that has no end of its own.
async fn until_stopped(mut stopping: watch::Receiver<bool>, future: impl Future<Output = ()>) {
    tokio::select! {
        () = future => {}
        _ = stopping.wait_for(|stop| *stop) => {}
    }
}

async fn bind_unix(path: &Path) -> io::Result<UnixListener> {
    if let Ok(metadata) = std::fs::symlink_metadata(path) {
        let in_use = || io::Error::new(io::ErrorKind::AddrInUse, format!("{} is in use", path.display()));
        // Never remove a file that is not a socket, nor the socket of a daemon that lives.
        if !metadata.file_type().is_socket() || UnixStream::connect(path).await.is_ok() {
            return Err(in_use());
        }
        std::fs::remove_file(path)?;
    }
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    // Bound under a private name first: at no moment can others connect to it.
    let private = path.with_extension(format!("{}.new", std::process::id()));
    let _ = std::fs::remove_file(&private);
    let listener = UnixListener::bind(&private)?;
    let ready = std::fs::set_permissions(&private, std::fs::Permissions::from_mode(0o660))
        .and_then(|()| std::fs::rename(&private, path));
    if let Err(error) = ready {
        let _ = std::fs::remove_file(&private);
        return Err(error);
    }
    Ok(listener)
}

async fn accept_unix(listener: UnixListener, shared: Arc<Shared>, stopping: watch::Receiver<bool>) {
    let clients = Arc::new(Semaphore::new(MAX_CLIENTS));
    loop {
        let Ok(permit) = Arc::clone(&clients).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => spawn_client(stream, &shared, &stopping, permit),
            Err(error) => pause(&error).await,
        }
    }
}

async fn accept_tcp(listener: TcpListener, shared: Arc<Shared>, stopping: watch::Receiver<bool>) {
    let clients = Arc::new(Semaphore::new(MAX_CLIENTS));
    loop {
        let Ok(permit) = Arc::clone(&clients).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => spawn_client(stream, &shared, &stopping, permit),
            Err(error) => pause(&error).await,
        }
    }
}

fn spawn_client(
    stream: impl AsyncRead + AsyncWrite + Send + 'static,
    shared: &Arc<Shared>,
    stopping: &watch::Receiver<bool>,
    permit: OwnedSemaphorePermit,
) {
    let client = until_stopped(stopping.clone(), client(stream, Arc::clone(shared)));
    tokio::spawn(async move {
        client.await;
        drop(permit);
    });
}

/// After a failed accept: out of descriptors, most likely, which time may cure.
async fn pause(error: &io::Error) {
    tracing::warn!(%error, "VICI cannot accept a client");
    tokio::time::sleep(Duration::from_millis(100)).await;
}

/// Sends events to one client.
#[derive(Clone)]
pub(super) struct EventSink {
    packets: mpsc::Sender<Packet>,
    registered: BTreeSet<String>,
}

impl EventSink {
    /// True if the client is registered for `event`.
    pub(super) fn wants(&self, event: &str) -> bool {
        self.registered.contains(event)
    }

    /// Sends an event if the client wants it; waits while its queue is full.
    pub(super) async fn send(&self, event: &str, message: Section) {
        if self.wants(event) {
            let _ = self.packets.send(Packet::Event { name: event.to_owned(), message }).await;
        }
    }
}

/// Serves one client until it goes away.
async fn client(stream: impl AsyncRead + AsyncWrite + Send + 'static, shared: Arc<Shared>) {
    let (reader, writer) = tokio::io::split(stream);
    let (packets, to_write) = mpsc::channel(MAX_QUEUED);
    let (read, from_client) = mpsc::channel(1);
    let session = session(shared, packets, from_client);
    // Reading ends with the client; then the session drops its queue and writing ends too.
    tokio::select! {
        () = async { tokio::join!(session, read_packets(reader, read)); } => {}
        () = write_packets(writer, to_write) => {}
    }
}

/// A packet; or why a request is none, whose sender can be told.
type Read = Result<Packet, CodecError>;

async fn read_packets(mut reader: impl AsyncRead + Unpin, packets: mpsc::Sender<Read>) {
    loop {
        let Ok(length) = reader.read_u32().await else { return };
        let Some(length) = usize::try_from(length).ok().filter(|length| *length <= MAX_PACKET) else {
            tracing::warn!(length, "VICI client sends more than 512 KiB; closing");
            return;
        };
        // Secrets pass through here.
        let mut bytes = zeroize::Zeroizing::new(Vec::new());
        let mut limited = (&mut reader).take(u64::try_from(length).unwrap_or(0));
        if limited.read_to_end(&mut bytes).await.is_err() || bytes.len() != length {
            return;
        }
        let packet = match Packet::decode(&bytes) {
            Err(error) if Packet::is_named_request(&bytes) => Err(error),
            Ok(packet) => Ok(packet),
            Err(error) => {
                tracing::warn!(%error, "VICI client sends nonsense; closing");
                return;
            }
        };
        if packets.send(packet).await.is_err() {
            return;
        }
    }
}

async fn write_packets(mut writer: impl AsyncWrite + Unpin, mut packets: mpsc::Receiver<Packet>) {
    while let Some(packet) = packets.recv().await {
        let bytes = packet.encode();
        let Ok(length) = u32::try_from(bytes.len()) else { return };
        let write = async {
            writer.write_all(&length.to_be_bytes()).await?;
            writer.write_all(&bytes).await?;
            writer.flush().await
        };
        match tokio::time::timeout(WRITE_TIMEOUT, write).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) | Err(_) => return,
        }
    }
}

/// Counts a client among the listeners as long as it lives.
struct Listening<'a>(&'a Shared);

impl<'a> Listening<'a> {
    fn new(shared: &'a Shared) -> Self {
        shared.listeners.fetch_add(1, Ordering::Relaxed);
        Self(shared)
    }
}

impl Drop for Listening<'_> {
    fn drop(&mut self) {
        self.0.listeners.fetch_sub(1, Ordering::Relaxed);
    }
}

type Command = std::pin::Pin<Box<dyn Future<Output = Packet> + Send>>;

async fn session(shared: Arc<Shared>, packets: mpsc::Sender<Packet>, mut from_client: mpsc::Receiver<Read>) {
    let mut announcements = shared.announcements.subscribe();
    let mut sink = EventSink { packets, registered: BTreeSet::new() };
    let mut listening = None;
    let mut pending: VecDeque<Result<(String, Section), CodecError>> = VecDeque::new();
    let mut running: Option<Command> = None;
    loop {
        if running.is_none()
            && let Some(request) = pending.pop_front()
        {
            running = Some(start(&shared, &sink, request));
        }
        tokio::select! {
            packet = from_client.recv(), if pending.len() < MAX_PENDING => match packet {
                None => return,
                Some(Ok(Packet::Request { name, message })) => pending.push_back(Ok((name, message))),
                Some(Err(error)) => pending.push_back(Err(error)),
                Some(Ok(Packet::Register(event))) => {
                    let known = events::is_event(&event);
                    if known {
                        sink.registered.insert(event);
                    }
                    let listens = sink.registered.iter().any(|event| events::is_announced(event));
                    if listens && listening.is_none() {
                        listening = Some(Listening::new(&shared));
                    }
                    confirm(&sink, known).await;
                }
                Some(Ok(Packet::Unregister(event))) => {
                    let known = sink.registered.remove(&event);
                    if !sink.registered.iter().any(|event| events::is_announced(event)) {
                        listening = None;
                    }
                    confirm(&sink, known).await;
                }
                // charon ignores what a client must not send.
                Some(Ok(_)) => {}
            },
            answer = async {
                match running.as_mut() {
                    Some(command) => command.await,
                    None => std::future::pending().await,
                }
            } => {
                running = None;
                if sink.packets.send(answer).await.is_err() {
                    return;
                }
            }
            announcement = announcements.recv() => match announcement {
                Ok(announcement) => announce(&sink, &announcement),
                Err(broadcast::error::RecvError::Lagged(missed)) => {
                    tracing::debug!(missed, "VICI client is too slow for events");
                }
                Err(broadcast::error::RecvError::Closed) => return,
            },
        }
    }
}

fn start(shared: &Arc<Shared>, sink: &EventSink, request: Result<(String, Section), CodecError>) -> Command {
    let (shared, sink) = (Arc::clone(shared), sink.clone());
    Box::pin(async move {
        let (name, message) = match request {
            Ok(request) => request,
            Err(error) => return Packet::Response(commands::failure(error.to_string())),
        };
        match commands::run(&shared, &sink, &name, &message).await {
            Some(answer) => Packet::Response(answer),
            None => Packet::CommandUnknown,
        }
    })
}

async fn confirm(sink: &EventSink, known: bool) {
    let _ = sink.packets.send(if known { Packet::EventConfirm } else { Packet::EventUnknown }).await;
}

/// Queues an announcement; a client that does not read misses it.
fn announce(sink: &EventSink, announcement: &Announcement) {
    if sink.wants(announcement.event) {
        let packet = Packet::Event { name: announcement.event.to_owned(), message: announcement.message.clone() };
        if sink.packets.try_send(packet).is_err() {
            tracing::debug!(event = announcement.event, "VICI client does not read its events");
        }
    }
}
