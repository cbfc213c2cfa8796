//! A latch that is held by a descriptor alone.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::RecvFlags;
use serde::de::DeserializeOwned;
use serde_json::Value;
use socket2::SockRef;

use super::link::{dial, poll, send};
use crate::protocol::{
    Call, Code, Hello, LARVAL_REVISION, MAX_MESSAGE, Refusal, ServerMessage, State, VERSION, Wanted, Welcome,
};
use crate::seqpacket::receive_now;
use crate::session::{self, ClientError, SILENCE, system};

/// Makes a latch (`create`, `listen` or `accept` of the socket) on a connection to the daemon of its own, and gives that
/// connection with the daemon's answer. A socket that is not bound is bound as [`super::Client::latch_socket`] does.
///
/// Whoever has a copy of the descriptor, a forked process for one, holds the latch; it is released when the last copy is
/// closed. If [`Wanted::larval`] is asked for, the answer is [`crate::protocol::Creating`], and [`settled`] says how it went
/// on. Nobody reads the daemon's alerts, so the disposition should be one under which the system tells what happens.
pub fn hold<T: DeserializeOwned>(
    path: &Path,
    call: &Call,
    socket: BorrowedFd<'_>,
) -> Result<(OwnedFd, T), ClientError> {
    if let Call::Create(Wanted { remote: Some(remote), .. }) = call {
        session::bind_for(&SockRef::from(&socket), *remote)?;
    }
    let daemon = dial(path)?;
    let hello = Call::Hello(Hello { version: VERSION });
    let welcome: Welcome = session::result(hello.name(), ask(daemon.as_fd(), 1, &hello, None, SILENCE)?)?;
    session::welcomed(&welcome)?;
    let call = match call.clone() {
        Call::Create(wanted) if wanted.larval && welcome.revision < LARVAL_REVISION => {
            Call::Create(Wanted { larval: false, ..wanted })
        }
        call => session::asking_for_progress(call, welcome.revision),
    };
    let answer = ask(daemon.as_fd(), 2, &call, Some(socket), session::silence(welcome.revision))?;
    Ok((daemon, session::result(call.name(), answer)?))
}

/// What has become of a LARVAL latch that [`hold`] gave; `None` while it is still to be made. Takes nothing from the
/// connection, so that every process that holds the latch can ask.
pub fn settled(daemon: BorrowedFd<'_>) -> Option<Result<(), ClientError>> {
    let mut octets = vec![0; MAX_MESSAGE];
    let length = match rustix::net::recv(daemon, &mut octets, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
        Ok((0, _)) => return Some(Err(ClientError::Closed)),
        Ok((length, _)) => length,
        Err(Errno::AGAIN | Errno::INTR) => return None,
        Err(error) => return Some(Err(system("hearing from the daemon".to_owned(), error.into()))),
    };
    Some(match serde_json::from_slice(octets.get(..length).unwrap_or_default()) {
        Ok(ServerMessage::Alert { state: State::Closed, reason: message, code, .. }) => {
            Err(Refusal { code: code.unwrap_or(Code::Other), message }.into())
        }
        Ok(ServerMessage::Alert { .. }) => Ok(()),
        Ok(_) => Err(ClientError::Protocol("no word of the latch".to_owned())),
        Err(error) => Err(ClientError::Protocol(error.to_string())),
    })
}

fn ask(
    daemon: BorrowedFd<'_>,
    id: u64,
    call: &Call,
    socket: Option<BorrowedFd<'_>>,
    silence: Duration,
) -> Result<Value, ClientError> {
    let failed = |error| system(format!("asking the daemon for {}", call.name()), error);
    send(daemon, &call.encode(id)?, socket, Instant::now() + silence).map_err(failed)?;
    loop {
        if !poll(&mut [PollFd::new(&daemon, PollFlags::IN)], Some(silence)).map_err(failed)? {
            return Err(ClientError::Silent(silence));
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
