//! The socket to the kernel's IPsec databases (NETLINK_XFRM), blocking, of the network namespace in which it was opened.

use std::io;

use ipsec::plane::Mark;
use netlink_sys::protocols::NETLINK_XFRM;
use netlink_sys::{Socket, SocketAddr};
use rustix::io::Errno;
use socket2::{SockFilter, SockRef};
use zeroize::{Zeroize as _, Zeroizing};

use super::codec::{
    self, Algorithm, Direction, Ends, LATCH_OWNER, Message, OWNER, Policy, PolicyId, PolicyReport, State, StateId,
    StateReport, kind,
};
use super::others::OthersPolicies;
use crate::netlink::context;

/// The SAD and SPD of one network namespace.
pub(super) trait Databases {
    /// Installs a state that is not there.
    fn add_state(&mut self, state: &State, algorithms: &[(Algorithm, &[u8])]) -> io::Result<()>;
    /// Removes a state; false when it was gone already.
    fn delete_state(&mut self, id: StateId, mark: Mark) -> io::Result<bool>;
    /// Moves a state to other ends, with its keys, counters and window. Where it keeps its name it is away for a moment.
    fn move_state(&mut self, id: StateId, mark: Mark, to: &Ends) -> io::Result<()>;
    /// One state; `None` when there is none of that name.
    fn state(&mut self, id: StateId, mark: Mark) -> io::Result<Option<StateReport>>;
    /// All states.
    fn states(&mut self) -> io::Result<Vec<StateReport>>;
    /// Installs a policy that is not there.
    fn add_policy(&mut self, policy: &Policy) -> io::Result<()>;
    /// Puts a policy in the place of the one of its name, if there is one, at once.
    fn set_policy(&mut self, policy: &Policy) -> io::Result<()>;
    /// Removes a policy; false when it was gone already.
    fn delete_policy(&mut self, id: &PolicyId) -> io::Result<bool>;
    /// The policy that somebody else has for the same packets; `None` when there is none.
    fn foreign_policy(&mut self, id: &PolicyId) -> io::Result<Option<PolicyReport>>;
    /// All policies but those of sockets.
    fn policies(&mut self) -> io::Result<Vec<PolicyReport>>;
}

/// A connection to the SAD and SPD of one network namespace.
pub(super) struct XfrmSocket {
    socket: Socket,
    sequence: u32,
    /// Kept from answer to answer; wiped after each, since dumps of states hold keys.
    buffer: Vec<u8>,
    port: u32,
    /// Of the policies that it installs and removes.
    owner: u32,
    /// Where many policies are installed.
    others: Option<OthersPolicies>,
}

impl XfrmSocket {
    /// Connects to the databases of the calling thread's network namespace.
    pub(super) fn open() -> io::Result<Self> {
        Self::open_as(OWNER)
    }

    /// The same for policies of latches.
    pub(super) fn open_for_latches() -> io::Result<Self> {
        Self::open_as(LATCH_OWNER)
    }

    fn open_as(owner: u32) -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_XFRM).map_err(|e| context(e, "open an XFRM netlink socket"))?;
        let address = socket.bind_auto().map_err(|e| context(e, "bind an XFRM netlink socket"))?;
        // Errors come with the kernel's own words, and without a copy of our request, which may hold keys.
        socket.set_ext_ack(true)?;
        socket.set_cap_ack(true)?;
        let port = address.port_number();
        Ok(Self { socket, sequence: 0, buffer: Vec::with_capacity(BUFFER), port, owner, others: None })
    }

    /// Hears of others' policies from now on, rather than ask for each.
    pub(super) fn hearing_others(mut self) -> io::Result<Self> {
        self.others = Some(OthersPolicies::subscribe(self.port)?);
        Ok(self)
    }

    /// In which directions packets are dropped that no policy is for. None where the kernel cannot do that.
    pub(super) fn blocked_by_default(&mut self) -> io::Result<Vec<Direction>> {
        let mut blocked = Vec::new();
        let asked = self.request(codec::ask_default(), |kind, payload| {
            if kind == kind::GET_DEFAULT {
                blocked = codec::blocked_by_default(payload).unwrap_or_default();
            }
        });
        match asked {
            // Linux before 5.15 does not know the question.
            Err(e) if errno(&e) == Some(Errno::INVAL) => Ok(Vec::new()),
            outcome => outcome.map(|()| blocked),
        }
    }

    /// What the kernel's news name as asker when it was us.
    pub(super) fn port(&self) -> u32 {
        self.port
    }

    /// Sends a request and hands the answers to `each`, up to its acknowledgement or the end of its dump; of a request
    /// that wants neither the answer is one.
    fn request(&mut self, message: Message, mut each: impl FnMut(u16, &[u8])) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let to_be_ended = message.flags() & (ACK | DUMP) != 0;
        let octets = message.finish(self.sequence, self.port);
        self.socket.send_to(&octets, &SocketAddr::new(0, 0), 0)?;
        loop {
            let received = self.socket.recv_from(&mut self.buffer, 0);
            let outcome = match received {
                Ok((_, from)) if from.port_number() != 0 => None,
                Ok(_) => read(&self.buffer, self.sequence, to_be_ended, &mut each),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => None,
                Err(e) => Some(Err(e)),
            };
            self.buffer.as_mut_slice().zeroize();
            self.buffer.clear();
            if let Some(outcome) = outcome {
                return outcome;
            }
        }
    }
}

impl Databases for XfrmSocket {
    fn add_state(&mut self, state: &State, algorithms: &[(Algorithm, &[u8])]) -> io::Result<()> {
        let message = codec::put_state(REQUEST | ACK | CREATE | EXCLUSIVE, state, algorithms);
        self.request(message, |_, _| {})
    }

    fn delete_state(&mut self, id: StateId, mark: Mark) -> io::Result<bool> {
        found(self.request(codec::name_state(kind::DELETE_SA, REQUEST | ACK, id, mark), |_, _| {}))
    }

    fn move_state(&mut self, id: StateId, mark: Mark, to: &Ends) -> io::Result<()> {
        let mut description = Zeroizing::new(Vec::new());
        self.request(codec::name_state(kind::GET_SA, REQUEST, id, mark), |kind, payload| {
            if kind == kind::NEW_SA {
                *description = payload.to_vec();
            }
        })?;
        let unreadable = || io::Error::new(io::ErrorKind::InvalidData, "the kernel's description is cut off");
        let report = codec::state(&description).ok_or_else(unreadable)?;
        let moved = |kind, flags| codec::moved_state(kind, flags, &description, to).ok_or_else(unreadable);
        if (report.id.destination, report.source) == (to.destination, to.source)
            && report.encapsulation.map(|ports| ports.in_tcp) == to.ports.map(|ports| ports.in_tcp)
        {
            return self.request(moved(kind::UPDATE_SA, REQUEST | ACK)?, |_, _| {});
        }
        let add = REQUEST | ACK | CREATE | EXCLUSIVE;
        if report.id.destination != to.destination {
            self.request(moved(kind::NEW_SA, add)?, |_, _| {})?;
            self.delete_state(id, mark)?;
            return Ok(());
        }
        let message = moved(kind::NEW_SA, add)?;
        self.delete_state(id, mark)?;
        self.request(message, |_, _| {}).inspect_err(|_| {
            let from = Ends { source: report.source, destination: report.id.destination, ports: report.encapsulation };
            let back = codec::moved_state(kind::NEW_SA, add, &description, &from);
            if let Some(Err(e)) = back.map(|message| self.request(message, |_, _| {})) {
                tracing::error!("put back the state that could not be moved: {e}");
            }
        })
    }

    fn state(&mut self, id: StateId, mark: Mark) -> io::Result<Option<StateReport>> {
        let mut report = None;
        let message = codec::name_state(kind::GET_SA, REQUEST, id, mark);
        let asked = self.request(message, |kind, payload| {
            if kind == kind::NEW_SA {
                report = codec::state(payload);
            }
        });
        Ok(found(asked)?.then_some(report).flatten())
    }

    fn states(&mut self) -> io::Result<Vec<StateReport>> {
        let mut reports = Vec::new();
        self.request(Message::new(kind::GET_SA, REQUEST | DUMP), |kind, payload| {
            if kind == kind::NEW_SA {
                reports.extend(codec::state(payload));
            }
        })?;
        Ok(reports)
    }

    fn add_policy(&mut self, policy: &Policy) -> io::Result<()> {
        let flags = REQUEST | ACK | CREATE | EXCLUSIVE;
        self.request(codec::put_policy(kind::NEW_POLICY, flags, policy, self.owner), |_, _| {})
    }

    fn set_policy(&mut self, policy: &Policy) -> io::Result<()> {
        self.request(codec::put_policy(kind::UPDATE_POLICY, REQUEST | ACK, policy, self.owner), |_, _| {})
    }

    fn delete_policy(&mut self, id: &PolicyId) -> io::Result<bool> {
        found(self.request(codec::name_policy(kind::DELETE_POLICY, REQUEST | ACK, id, self.owner), |_, _| {}))
    }

    fn foreign_policy(&mut self, id: &PolicyId) -> io::Result<Option<PolicyReport>> {
        if self.others.as_mut().is_some_and(|others| !others.is_known()) {
            let all = self.policies()?;
            if let Some(others) = &mut self.others {
                others.learn(all);
            }
        }
        if self.others.as_ref().is_some_and(|others| !others.may_have(id)) {
            return Ok(None);
        }
        let mut report = None;
        let asked = self.request(codec::name_policy(kind::GET_POLICY, REQUEST, id, 0), |kind, payload| {
            if kind == kind::NEW_POLICY {
                report = codec::policy(payload);
            }
        });
        Ok(found(asked)?.then_some(report).flatten())
    }

    fn policies(&mut self) -> io::Result<Vec<PolicyReport>> {
        let mut reports = Vec::new();
        // Without a body: the kernel wants none, whatever the structure for a single policy.
        self.request(Message::new(kind::GET_POLICY, REQUEST | DUMP), |kind, payload| {
            if kind == kind::NEW_POLICY {
                reports.extend(codec::policy(payload));
            }
        })?;
        Ok(reports)
    }
}

/// Reads a datagram; `Some` when the request is answered.
fn read(
    datagram: &[u8],
    sequence: u32,
    to_be_ended: bool,
    each: &mut impl FnMut(u16, &[u8]),
) -> Option<io::Result<()>> {
    for received in codec::messages(datagram).filter(|received| received.sequence == sequence) {
        match received.kind {
            kind::DONE => return Some(Ok(())),
            kind::ERROR => {
                return Some(match codec::error(received.payload) {
                    Some((0, _)) => Ok(()),
                    Some((code, words)) => Err(refusal(code, words)),
                    None => Err(io::Error::new(io::ErrorKind::InvalidData, "a cut-off answer of the kernel")),
                });
            }
            other => {
                each(other, received.payload);
                if !to_be_ended {
                    return Some(Ok(()));
                }
            }
        }
    }
    None
}

/// The kernel's error, with its own words if it gave some. The number stays readable ([`errno`]).
fn refusal(code: i32, words: Option<String>) -> io::Error {
    let error = io::Error::from_raw_os_error(code.saturating_neg());
    match words {
        None => error,
        Some(words) => io::Error::new(error.kind(), Refusal { error, words }),
    }
}

#[derive(Debug, thiserror::Error)]
#[error("{error}: {words}")]
struct Refusal {
    #[source]
    error: io::Error,
    words: String,
}

/// The system's error number.
pub(super) fn errno(error: &io::Error) -> Option<Errno> {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<Refusal>());
    let code = inner.map_or_else(|| error.raw_os_error(), |refusal| refusal.error.raw_os_error());
    code.map(Errno::from_raw_os_error)
}

fn found(outcome: io::Result<()>) -> io::Result<bool> {
    match outcome {
        Ok(()) => Ok(true),
        // ESRCH for states, ENOENT for policies.
        Err(e) if matches!(errno(&e), Some(Errno::SRCH | Errno::NOENT)) => Ok(false),
        Err(e) => Err(e),
    }
}

/// The kernel's socket for news but those of changes that `own` ports asked for. It never waits for us: what does not fit is
/// lost, and the next read says so.
pub(super) fn subscribe(own: &[u32]) -> io::Result<Socket> {
    let socket = subscribe_to(GROUPS, own)?;
    // The forced variant passes by the system-wide limit and needs CAP_NET_ADMIN.
    if rustix::net::sockopt::set_socket_recv_buffer_size_force(&socket, EVENT_BUFFER).is_err() {
        socket.set_rx_buf_sz(EVENT_BUFFER)?;
    }
    Ok(socket)
}

pub(super) fn subscribe_to(groups: u32, own: &[u32]) -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_XFRM).map_err(|e| context(e, "open an XFRM netlink socket"))?;
    pass_over(&socket, own).map_err(|e| context(e, "have our own changes left out of the kernel's IPsec events"))?;
    socket.bind(&SocketAddr::new(0, groups)).map_err(|e| context(e, "subscribe to the kernel's IPsec events"))?;
    socket.set_non_blocking(true)?;
    Ok(socket)
}

/// Has the kernel leave out, on this socket, news of what these ports asked for: nobody wakes for them.
fn pass_over(socket: &Socket, ports: &[u32]) -> io::Result<()> {
    // Of the classic instructions: load a big-endian word from a place, compare it and skip so many, return.
    const LOAD: u16 = 0x20;
    const SKIP_IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    const PORT: u32 = 12;
    let mut program = vec![SockFilter::new(LOAD, 0, 0, PORT)];
    for (following, port) in (0..ports.len()).rev().zip(ports) {
        // Over the other comparisons and what takes the message.
        let to_the_end = u8::try_from(following + 1).map_err(io::Error::other)?;
        program.push(SockFilter::new(SKIP_IF_EQUAL, to_the_end, 0, u32::from_be_bytes(port.to_ne_bytes())));
    }
    program.push(SockFilter::new(RETURN, 0, 0, u32::MAX));
    program.push(SockFilter::new(RETURN, 0, 0, 0));
    SockRef::from(socket).attach_filter(&program)
}

const REQUEST: u16 = 1;
const ACK: u16 = 4;
const EXCLUSIVE: u16 = 0x200;
const CREATE: u16 = 0x400;
const DUMP: u16 = 0x300;
/// Bits of XFRMNLGRP_ACQUIRE, _EXPIRE, _SA, _POLICY and _MAPPING.
const GROUPS: u32 = 1 | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 7;
/// The kernel fills up to 32 KiB at once.
const BUFFER: usize = 1 << 16;
const EVENT_BUFFER: usize = 8 << 20;
