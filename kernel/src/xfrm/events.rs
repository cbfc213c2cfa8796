//! The thread that hears what the kernel says by itself: acquires, expiries, changed mappings.

use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use netlink_sys::Socket;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use zeroize::Zeroize as _;

use super::{Xfrm, codec, socket};
use crate::netlink::context;
use crate::network::{Shared, lock};

/// Subscribes in the network namespace of the calling thread, and starts the thread. It ends when `shared.stop` becomes
/// readable.
pub(crate) fn start(shared: &Arc<Shared>, xfrm: &Arc<Xfrm>) -> io::Result<JoinHandle<()>> {
    let socket = socket::subscribe()?;
    let (shared, xfrm) = (Arc::clone(shared), Arc::clone(xfrm));
    thread::Builder::new()
        .name("latchkey-xfrm".into())
        .spawn(move || listen(&shared, &xfrm, &socket))
        .map_err(|e| context(e, "start a thread"))
}

fn listen(shared: &Shared, xfrm: &Xfrm, socket: &Socket) {
    // States come with their keys.
    let mut buffer = Vec::with_capacity(1 << 16);
    loop {
        let mut descriptors = [PollFd::new(&shared.stop, PollFlags::IN), PollFd::new(socket, PollFlags::IN)];
        let patience = if lock(&xfrm.tables).is_waiting() { &OFTEN } else { &SELDOM };
        match poll(&mut descriptors, Some(patience)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => {
                tracing::error!("poll: {e}; the kernel's IPsec events are no longer heard");
                return;
            }
        }
        if !descriptors[0].revents().is_empty() {
            return;
        }
        loop {
            match socket.recv_from(&mut buffer, 0) {
                Ok((_, from)) if from.port_number() == 0 => hear(shared, xfrm, &buffer),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => {
                    tracing::warn!("events of the kernel's IPsec were lost: {e}");
                    break;
                }
            }
            buffer.as_mut_slice().zeroize();
            buffer.clear();
        }
        lock(&xfrm.tables).look_after_waiting();
    }
}

fn hear(shared: &Shared, xfrm: &Xfrm, datagram: &[u8]) {
    for received in codec::messages(datagram).filter(|received| received.port != xfrm.port) {
        let event = codec::event(received.kind, received.payload);
        let event = event.and_then(|event| lock(&xfrm.tables).translate(&event));
        if let Some(event) = event {
            shared.events.plane(event);
        }
    }
}

/// While a peer's first packet is waited for.
const OFTEN: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
const SELDOM: Timespec = Timespec { tv_sec: 3600, tv_nsec: 0 };
