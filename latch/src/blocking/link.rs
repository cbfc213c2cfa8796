//! One connection to the daemon, read by whichever thread waits: no thread of its own, so that a program's forks and
//! signals meet nothing that they do not know.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, epoll};
use rustix::io::Errno;
use serde::de::DeserializeOwned;
use tokio::sync::oneshot::error::TryRecvError;

use crate::protocol::{Call, Hello, VERSION, Welcome};
use crate::seqpacket::{receive_now, send_now};
use crate::session::{self, Change, ClientError, Heard, Registry, system};

/// A connection to the daemon.
#[derive(Debug)]
pub(super) struct Link {
    socket: OwnedFd,
    state: Mutex<State>,
    /// The thread that was reading has read something, or has stopped.
    read: Condvar,
    /// Readable while `changed` is not empty: another thread may have read the message.
    unseen: OwnedFd,
    /// Readable when `socket` or `unseen` is.
    ready: OwnedFd,
    last_id: AtomicU64,
}

#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) registry: Registry,
    /// A thread is reading; the others wait for it.
    reading: bool,
    /// Latches that have changed since somebody asked.
    changed: BTreeSet<u64>,
}

impl Link {
    pub(super) fn open(path: &Path) -> Result<Self, ClientError> {
        let socket = dial(path)?;
        let failed = |error: Errno| system("making a descriptor to wait on".to_owned(), error.into());
        let unseen = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(failed)?;
        let ready = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(failed)?;
        for descriptor in [&socket, &unseen] {
            epoll::add(&ready, descriptor, epoll::EventData::new_u64(0), epoll::EventFlags::IN).map_err(failed)?;
        }
        let (state, read, last_id) = (Mutex::default(), Condvar::new(), AtomicU64::new(0));
        let link = Self { socket, state, read, unseen, ready, last_id };
        let welcome: Welcome = link.call(Call::Hello(Hello { version: VERSION }), None)?;
        session::welcomed(&welcome)?;
        link.state().registry.revision = welcome.revision;
        Ok(link)
    }

    /// Asks, and waits for the answer.
    pub(super) fn call<T: DeserializeOwned>(
        &self,
        call: Call,
        socket: Option<BorrowedFd<'_>>,
    ) -> Result<T, ClientError> {
        let id = self.next_id();
        let call = session::asking_for_progress(call, self.state().registry.revision);
        let octets = call.encode(id)?;
        let mut answer = self.state().registry.expect(id, &call)?;
        let asked = Instant::now();
        let silent_at = || self.state().registry.silent_at(asked);
        if let Err(source) = send(self.socket.as_fd(), &octets, socket, silent_at()) {
            self.state().registry.pending.remove(&id);
            return Err(system(format!("sending {} to the daemon", call.name()), source));
        }
        loop {
            let until = silent_at();
            let outcome = self.wait(Some(until), |_| match answer.try_recv() {
                Ok(outcome) => Some(outcome),
                Err(TryRecvError::Closed) => Some(Err(ClientError::Closed)),
                Err(TryRecvError::Empty) => None,
            });
            match outcome {
                Some(outcome) => return session::result(call.name(), outcome?),
                None if self.state().registry.closed => return Err(ClientError::Closed),
                None if silent_at() > until => {}
                None => return Err(ClientError::Silent(asked.elapsed())),
            }
        }
    }

    /// Waits until there is something to give, reading meanwhile; `None` when time is up or the connection has ended.
    /// Without time left it reads what is there already.
    pub(super) fn wait<T>(
        &self,
        deadline: Option<Instant>,
        mut done: impl FnMut(&mut State) -> Option<T>,
    ) -> Option<T> {
        let mut state = self.state();
        loop {
            let found = done(&mut state);
            if found.is_some() || state.registry.closed {
                return found;
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if state.reading {
                state = match left {
                    Some(Duration::ZERO) => return None,
                    Some(left) => self.read.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0,
                    None => self.read.wait(state).unwrap_or_else(PoisonError::into_inner),
                };
                continue;
            }
            state.reading = true;
            drop(state);
            let (messages, ended) = self.receive(left);
            state = self.state();
            state.reading = false;
            for message in &messages {
                self.hear(&mut state, message);
            }
            if ended {
                state.end();
                self.note(&state);
            }
            self.read.notify_all();
            if messages.is_empty() && left == Some(Duration::ZERO) {
                return done(&mut state);
            }
        }
    }

    /// Reads what is there.
    pub(super) fn drain(&self) {
        let _ = self.wait(Some(Instant::now()), |_| None::<()>);
    }

    /// The next latch that has changed, and how it stands now.
    pub(super) fn next_change(&self, deadline: Option<Instant>) -> Result<Option<(u64, Change)>, ClientError> {
        let next = self.wait(deadline, |state| {
            while let Some(latch) = state.changed.pop_first() {
                let change = state.registry.latches.get(&latch).and_then(|latch| latch.borrow().clone());
                if let Some(change) = change {
                    self.note(state);
                    return Some((latch, change));
                }
            }
            self.note(state);
            None
        });
        match next {
            None if self.state().registry.closed => Err(ClientError::Closed),
            next => Ok(next),
        }
    }

    /// Gives a latch back; the answer is for nobody.
    pub(super) fn release(&self, latch: u64) {
        self.forget(latch);
        let Some(octets) = session::release(self.next_id(), latch) else { return };
        // If there is no room the latch lives as long as the connection to the daemon.
        if let Err(error) = send_now(self.socket.as_fd(), &octets, None) {
            tracing::debug!(latch, %error, "releasing a latch");
        }
    }

    /// Gives back the latch of a peer whose end is known; false if that could not be told now.
    pub(super) fn acknowledge(&self, listener: u64, latch: u64) -> bool {
        let Some(octets) = session::release(self.next_id(), latch) else { return true };
        let told = send_now(self.socket.as_fd(), &octets, None);
        if told.is_ok() {
            let mut state = self.state();
            state.registry.forget_child(listener, latch);
            state.changed.remove(&latch);
            self.note(&state);
        }
        told.is_ok()
    }

    fn forget(&self, latch: u64) {
        let mut state = self.state();
        state.registry.forget(latch);
        state.changed.remove(&latch);
        self.note(&state);
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the daemon's messages come from.
    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Readable when there is a message or a change that nobody has asked for.
    pub(super) fn ready(&self) -> BorrowedFd<'_> {
        self.ready.as_fd()
    }

    fn next_id(&self) -> u64 {
        self.last_id.fetch_add(1, Ordering::Relaxed) + 1
    }

    fn receive(&self, left: Option<Duration>) -> (Vec<Vec<u8>>, bool) {
        let mut messages = Vec::new();
        match poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], left) {
            Ok(true) => {}
            Ok(false) => return (messages, false),
            Err(_) => return (messages, true),
        }
        // Some at a time, so that who waits for the first need not wait for a flood.
        while messages.len() < 64 {
            match receive_now(self.socket.as_fd()) {
                Ok(Some(datagram)) => messages.push(datagram.octets),
                Ok(None) => return (messages, true),
                Err(error) => return (messages, error.kind() != io::ErrorKind::WouldBlock),
            }
        }
        (messages, false)
    }

    fn hear(&self, state: &mut State, message: &[u8]) {
        match state.registry.hear(message) {
            Some(Heard::Handed) => {}
            Some(Heard::Changed(latch)) => {
                state.changed.insert(latch);
                self.note(state);
            }
            Some(Heard::Unwanted(latch)) => {
                if let Some(octets) = session::release(0, latch) {
                    let _ = send_now(self.socket.as_fd(), &octets, None);
                }
            }
            None => {
                state.end();
                self.note(state);
            }
        }
    }

    /// Makes `unseen` readable, or not, as it should be.
    fn note(&self, state: &State) {
        // Its counter does not overflow, and an empty one has nothing to take.
        if state.changed.is_empty() {
            let _ = rustix::io::read(&self.unseen, &mut [0; 8]);
        } else {
            let _ = rustix::io::write(&self.unseen, &1u64.to_ne_bytes());
        }
    }
}

impl State {
    fn end(&mut self) {
        self.registry.end();
        self.changed.extend(self.registry.latches.keys());
    }
}

/// A connection to the daemon's socket; waits while the daemon's queue of new clients is full.
pub(super) fn dial(path: &Path) -> Result<OwnedFd, ClientError> {
    let mut tries = 0;
    loop {
        match session::connect(path) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && tries < 100 => {
                tries += 1;
                thread::sleep(Duration::from_millis(10));
            }
            outcome => return outcome.map_err(|source| system(format!("connecting to {}", path.display()), source)),
        }
    }
}

/// Sends a message once there is room, which a daemon that does not read leaves none.
pub(super) fn send(
    socket: BorrowedFd<'_>,
    octets: &[u8],
    descriptor: Option<BorrowedFd<'_>>,
    until: Instant,
) -> io::Result<()> {
    loop {
        match send_now(socket, octets, descriptor) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let left = until.saturating_duration_since(Instant::now());
                if !poll(&mut [PollFd::new(&socket, PollFlags::OUT)], Some(left))? {
                    return Err(io::ErrorKind::TimedOut.into());
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            outcome => return outcome,
        }
    }
}

/// Waits for descriptors; false when time is up. Signals do not end it.
pub(super) fn poll(descriptors: &mut [PollFd<'_>], left: Option<Duration>) -> io::Result<bool> {
    let deadline = left.and_then(|left| Instant::now().checked_add(left));
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());
        match rustix::event::poll(descriptors, timeout.as_ref()) {
            Ok(ready) => return Ok(ready > 0),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
