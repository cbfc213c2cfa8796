//! SOCK_SEQPACKET Unix sockets on tokio: one datagram is one message, descriptors come along (SCM_RIGHTS).

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use tokio::io::Interest;
use tokio::net::UnixStream;

use crate::protocol::MAX_MESSAGE;

/// One end of a connection.
///
/// The type inside is tokio's handle of a Unix socket; its own reading and writing, which is that of streams, is not used.
#[derive(Debug)]
pub(crate) struct SeqPacket(UnixStream);

/// A message as received.
#[derive(Debug, Default)]
pub(crate) struct Datagram {
    /// Its octets, at most [`MAX_MESSAGE`] of them.
    pub(crate) octets: Vec<u8>,
    /// Descriptors that came along, close-on-exec.
    pub(crate) descriptors: Vec<OwnedFd>,
    /// The message was longer, or more descriptors came than fit.
    pub(crate) truncated: bool,
}

/// A socket of the right kind, neither bound nor connected.
pub(crate) fn socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    Ok(rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?)
}

impl SeqPacket {
    /// Takes a connected, non-blocking socket. Must be called inside a tokio runtime.
    pub(crate) fn new(socket: OwnedFd) -> io::Result<Self> {
        UnixStream::from_std(socket.into()).map(Self)
    }

    /// Waits for a message; `None` at the end of the connection. Cancelling it loses nothing.
    pub(crate) async fn receive(&self) -> io::Result<Option<Datagram>> {
        self.0.async_io(Interest::READABLE, || receive_now(self.as_fd())).await
    }

    /// Sends a message, with a descriptor or without, once there is room.
    pub(crate) async fn send(&self, octets: &[u8], descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
        self.0.async_io(Interest::WRITABLE, || send_now(self.as_fd(), octets, descriptor)).await
    }

    /// Sends a message if there is room now.
    pub(crate) fn try_send(&self, octets: &[u8]) -> io::Result<()> {
        send_now(self.as_fd(), octets, None)
    }
}

impl From<UnixStream> for SeqPacket {
    fn from(accepted: UnixStream) -> Self {
        Self(accepted)
    }
}

impl AsFd for SeqPacket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Descriptors that are taken from one message; one more than any request has, so that too many are noticed.
const MAX_DESCRIPTORS: usize = 2;

/// Takes a message if there is one now; `None` at the end of the connection.
pub(crate) fn receive_now(socket: BorrowedFd<'_>) -> io::Result<Option<Datagram>> {
    // One octet more than allowed tells a message of full length from a longer one even without MSG_TRUNC.
    let mut octets = vec![0; MAX_MESSAGE + 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::net::recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut octets)],
        &mut ancillary,
        RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC,
    )?;
    let descriptors: Vec<OwnedFd> = ancillary
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        })
        .flatten()
        .collect();
    // An empty message cannot be told from the end of the connection, and is none of ours.
    if received.bytes == 0 && descriptors.is_empty() {
        return Ok(None);
    }
    let truncated = received.bytes > MAX_MESSAGE
        || received.flags.contains(ReturnFlags::TRUNC)
        || received.flags.contains(ReturnFlags::CTRUNC);
    octets.truncate(received.bytes.min(MAX_MESSAGE));
    octets.shrink_to_fit();
    Ok(Some(Datagram { octets, descriptors, truncated }))
}

/// Sends a message if there is room now.
pub(crate) fn send_now(socket: BorrowedFd<'_>, octets: &[u8], descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors: Vec<BorrowedFd<'_>> = descriptor.into_iter().collect();
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(io::Error::other("there is no room for a descriptor"));
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    rustix::net::sendmsg(socket, &[IoSlice::new(octets)], &mut ancillary, flags)?;
    Ok(())
}
