//! A latch that is held by a descriptor alone.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use serde::de::DeserializeOwned;
use serde_json::Value;
use socket2::SockRef;

use super::link::{dial, poll, send};
use crate::protocol::{Call, Hello, ServerMessage, VERSION, Wanted, Welcome};
use crate::seqpacket::receive_now;
use crate::session::{self, ClientError, system};

/// Makes a latch (`create`, `listen` or `accept` of the socket) on a connection to the daemon of its own, and gives that
/// connection with the daemon's answer. A socket that is not bound is bound as [`super::Client::latch_socket`] does.
///
/// Whoever has a copy of the descriptor, a forked process for one, holds the latch; it is released when the last copy is
/// closed. Nobody reads the daemon's alerts, so the disposition should be one under which the system tells what happens.
pub fn hold<T: DeserializeOwned>(
    path: &Path,
    call: &Call,
    socket: BorrowedFd<'_>,
    patience: Duration,
) -> Result<(OwnedFd, T), ClientError> {
    let deadline = Instant::now().checked_add(patience);
    if let Call::Create(Wanted { remote: Some(remote), .. }) = call {
        session::bind_for(&SockRef::from(&socket), *remote)?;
    }
    let daemon = dial(path)?;
    let hello = Call::Hello(Hello { version: VERSION });
    let welcome: Welcome = session::result(hello.name(), ask(daemon.as_fd(), 1, &hello, None, deadline)?)?;
    session::welcomed(&welcome)?;
    let answer = ask(daemon.as_fd(), 2, call, Some(socket), deadline)?;
    Ok((daemon, session::result(call.name(), answer)?))
}

fn ask(
    daemon: BorrowedFd<'_>,
    id: u64,
    call: &Call,
    socket: Option<BorrowedFd<'_>>,
    deadline: Option<Instant>,
) -> Result<Value, ClientError> {
    let failed = |error| system(format!("asking the daemon for {}", call.name()), error);
    send(daemon, &call.encode(id)?, socket).map_err(failed)?;
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if !poll(&mut [PollFd::new(&daemon, PollFlags::IN)], left).map_err(failed)? {
            return Err(failed(io::ErrorKind::TimedOut.into()));
        }
        let Some(datagram) = receive_now(daemon).map_err(failed)? else { return Err(ClientError::Closed) };
        match serde_json::from_slice(&datagram.octets) {
            Ok(ServerMessage::Reply { id: of, result }) if of == id => return Ok(result),
            Ok(ServerMessage::Refusal { id: of, refusal }) if of.is_none_or(|of| of == id) => {
                return Err(refusal.into());
            }
            Ok(_) => {}
            Err(error) => return Err(ClientError::Protocol(error.to_string())),
        }
    }
}
