//! A process that lives a moment longer than the daemon, however that ends, and then disconnects what was latched (RFC 5660 §2:
//! a key manager that restarts breaks and disconnects the channels that it does not restore).
//!
//! It has a duplicate of each latched socket, and does nothing while the daemon lives. When the daemon's end of the socket between
//! them closes, TCP connections are reset, and listeners and UDP sockets shut down, so that calls on them fail at once. What
//! keeps packets in meanwhile, and if this process is killed too, are the tunnel's device and the system's policies.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::net::{AddressFamily, SocketFlags, SocketType};
use socket2::{Socket, Type};

use crate::database::LatchId;
use crate::seqpacket::{SeqPacket, send_now};

/// The daemon's side of it.
#[derive(Debug)]
pub struct Survivor(Mutex<State>);

#[derive(Debug)]
struct State {
    socket: OwnedFd,
    process: Child,
    /// Latches that are gone, and of which it could not be told yet.
    gone: Vec<u64>,
    /// It does not take what it is told, and that has been said.
    failed: bool,
}

/// A socket that it has, until this is dropped.
#[derive(Debug)]
pub(crate) struct Watched {
    survivor: Arc<Survivor>,
    latch: LatchId,
}

impl Survivor {
    /// Starts a program that calls [`run`] with its standard input.
    pub fn start(mut command: Command) -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (socket, its) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        // What a terminal tells the daemon is not for it.
        let process = command.stdin(its).stdout(Stdio::null()).process_group(0).spawn()?;
        Ok(Self(Mutex::new(State { socket, process, gone: Vec::new(), failed: false })))
    }

    /// Gives it a duplicate of a latched socket.
    pub(crate) fn watch(self: &Arc<Self>, latch: LatchId, socket: BorrowedFd<'_>) -> Option<Watched> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.catch_up();
        match send_now(state.socket.as_fd(), &latch.0.to_be_bytes(), Some(socket)) {
            Ok(()) => {
                state.failed = false;
                Some(Watched { survivor: Arc::clone(self), latch })
            }
            Err(error) => {
                state.fail(&error);
                None
            }
        }
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let mut state = self.survivor.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.gone.push(self.latch.0);
        state.catch_up();
    }
}

impl State {
    fn catch_up(&mut self) {
        while let Some(latch) = self.gone.last() {
            match send_now(self.socket.as_fd(), &latch.to_be_bytes(), None) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => self.fail(&error),
            }
            self.gone.pop();
        }
    }

    /// Latches are kept all the same: what it does is to tell programs sooner.
    fn fail(&mut self, error: &io::Error) {
        if !std::mem::replace(&mut self.failed, true) {
            let ended = self.process.try_wait().ok().flatten().is_some();
            tracing::warn!(%error, ended, "should the daemon die, nobody will disconnect some of what is latched");
        }
    }
}

impl Drop for State {
    fn drop(&mut self) {
        // It ends by itself, and the system's first process waits for it.
        let _ = self.process.try_wait();
    }
}

/// The process: takes sockets until the daemon is gone, and ends what they do. Gives how many there were. Must be called
/// inside a tokio runtime.
pub async fn run(daemon: OwnedFd) -> io::Result<usize> {
    let daemon = SeqPacket::new(daemon)?;
    let mut sockets = std::collections::HashMap::new();
    while let Some(message) = daemon.receive().await? {
        let Ok(latch) = message.octets.try_into().map(u64::from_be_bytes) else { continue };
        match message.descriptors.into_iter().next() {
            Some(socket) => sockets.insert(latch, Socket::from(socket)),
            None => sockets.remove(&latch),
        };
    }
    sockets.values().for_each(disconnect);
    Ok(sockets.len())
}

/// As if the peer had reset it (RFC 5660 §5.5 b).
pub(crate) fn disconnect(socket: &Socket) {
    let connected = socket.r#type().is_ok_and(|kind| kind == Type::STREAM) && !socket.is_listener().unwrap_or(false);
    // A UDP socket stays connected, so that it takes nothing from others.
    if !connected || rustix::net::connect_unspec(socket.as_fd()).is_err() {
        // Of one that is not connected it fails, and does its work.
        let _ = socket.shutdown(std::net::Shutdown::Both);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::io::Read as _;
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::thread;
    use std::time::Duration;

    use super::*;

    /// The daemon's side, with a thread in the process's place.
    fn pair() -> (Arc<Survivor>, thread::JoinHandle<usize>) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (socket, its) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        let process = Command::new("true").spawn().unwrap();
        let survivor = Survivor(Mutex::new(State { socket, process, gone: Vec::new(), failed: false }));
        let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        (Arc::new(survivor), thread::spawn(move || runtime().block_on(run(its)).unwrap()))
    }

    // RFC 5660 §2 (13)
    #[test]
    fn what_is_latched_is_disconnected_when_the_daemon_is_gone_and_nothing_else() {
        let (survivor, process) = pair();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let connect = || {
            let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            (near, listener.accept().unwrap().0)
        };
        let (mut near, _far) = connect();
        let (released, mut far_of_released) = connect();
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        udp.connect("127.0.0.1:9").unwrap();
        let latched = TcpListener::bind("127.0.0.1:0").unwrap();
        let watch = |number, socket: BorrowedFd<'_>| survivor.watch(LatchId(number), socket).unwrap();
        let watched = [watch(1, near.as_fd()), watch(2, udp.as_fd()), watch(3, latched.as_fd())];
        drop(watch(4, released.as_fd()));
        let reader = thread::spawn(move || near.read(&mut [0; 1]).unwrap_err().kind());
        let receiver = thread::spawn(move || (udp.recv(&mut [0; 1]).unwrap(), udp.send(b"x").is_err()));
        let acceptor = thread::spawn(move || latched.accept().is_err());
        thread::sleep(Duration::from_millis(50));
        assert!(!reader.is_finished() && !receiver.is_finished() && !acceptor.is_finished());
        // Its descriptors go with it, in whatever way it ends.
        let socket = survivor.0.lock().unwrap().socket.try_clone().unwrap();
        std::mem::forget(watched);
        rustix::net::shutdown(&socket, rustix::net::Shutdown::Both).unwrap();
        assert_eq!(process.join().unwrap(), 3);
        // The second is what Linux gives who waits in the call, from 6.7 on.
        let failed = reader.join().unwrap();
        assert!(matches!(failed, io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe), "{failed}");
        assert_eq!(receiver.join().unwrap(), (0, true));
        assert!(acceptor.join().unwrap());
        drop(released);
        assert_eq!(far_of_released.read(&mut [0; 1]).unwrap(), 0, "it was its owner's to end");
    }

    #[test]
    fn one_that_does_not_work_holds_nobody_up() {
        let (survivor, process) = pair();
        rustix::net::shutdown(&survivor.0.lock().unwrap().socket, rustix::net::Shutdown::Both).unwrap();
        process.join().unwrap();
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        assert!(survivor.watch(LatchId(1), socket.as_fd()).is_none());
        // One that is stopped takes what its queue holds.
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (ours, _its) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        survivor.0.lock().unwrap().socket = ours;
        let mut watched: Vec<Watched> = Vec::new();
        while let Some(one) = survivor.watch(LatchId(1), socket.as_fd()) {
            watched.push(one);
        }
        let count = watched.len();
        drop(watched);
        assert_eq!(survivor.0.lock().unwrap().gone.len(), count, "to be told later");
    }
}
