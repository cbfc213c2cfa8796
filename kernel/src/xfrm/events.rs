//! The thread that hears what the kernel says by itself: acquires, expiries, changed mappings.

use std::io;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use netlink_sys::Socket;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use zeroize::Zeroize as _;

use super::codec::Event;
use super::latches::Latches;
use super::{Xfrm, codec, socket};
use crate::netlink::context;
use crate::network::{Shared, lock};

/// Subscribes in the network namespace of the calling thread, and starts the thread. It ends when `shared.stop` becomes
/// readable.
pub(crate) fn start(
    shared: &Arc<Shared>,
    xfrm: &Arc<Xfrm>,
    latches: Option<&Arc<Latches>>,
) -> io::Result<JoinHandle<()>> {
    // What we ask for ourselves is no news.
    let own: Vec<u32> = [Some(xfrm.port), latches.map(|latches| latches.port)].into_iter().flatten().collect();
    let socket = socket::subscribe(&own)?;
    let (shared, xfrm, latches) = (Arc::clone(shared), Arc::clone(xfrm), latches.map(Arc::clone));
    thread::Builder::new()
        .name("latchkey-xfrm".into())
        .spawn(move || listen(&shared, &xfrm, latches.as_deref(), &socket))
        .map_err(|e| context(e, "start a thread"))
}

fn listen(shared: &Shared, xfrm: &Xfrm, latches: Option<&Latches>, socket: &Socket) {
    // States come with their keys.
    let mut buffer = Vec::with_capacity(1 << 16);
    loop {
        let [stop, news, alarm] = [shared.stop.as_fd(), socket.as_fd(), xfrm.alarm.as_fd()]
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        let mut descriptors = [stop, news, alarm];
        let patience = match lock(&xfrm.tables) {
            tables if tables.is_waiting() => &OFTEN,
            tables if tables.is_suspect() => &SOON,
            _ => &SELDOM,
        };
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
        xfrm.hear_alarm();
        let mut latches_changed = false;
        loop {
            match socket.recv_from(&mut buffer, 0) {
                Ok((_, from)) if from.port_number() == 0 => {
                    latches_changed |= hear(shared, xfrm, &buffer);
                }
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.raw_os_error() == Some(NO_BUFFERS) => {
                    tracing::warn!("events of the kernel's IPsec were lost: {e}; its databases are looked through");
                    lock(&xfrm.tables).suspect();
                    latches_changed = true;
                }
                Err(e) => {
                    tracing::error!("{e}; the kernel's IPsec events are no longer heard");
                    return;
                }
            }
            buffer.as_mut_slice().zeroize();
            buffer.clear();
        }
        if let Some(latches) = latches.filter(|_| latches_changed) {
            latches.put_right();
        }
        let mut tables = lock(&xfrm.tables);
        tables.look_after_waiting();
        let events = tables.put_right().unwrap_or_else(|e| {
            tracing::error!("compare the kernel's databases with what should be in them: {e}");
            Vec::new()
        });
        drop(tables);
        for event in events {
            shared.events.plane(event);
        }
    }
}

/// True when policies of latches may be gone.
fn hear(shared: &Shared, xfrm: &Xfrm, datagram: &[u8]) -> bool {
    let mut latches_changed = false;
    for received in codec::messages(datagram) {
        let Some(event) = codec::event(received.kind, received.payload) else { continue };
        latches_changed |= matches!(event, Event::LatchesChanged | Event::PoliciesChanged | Event::PoliciesFlushed);
        if let Some(event) = lock(&xfrm.tables).translate(&event) {
            shared.events.plane(event);
        }
    }
    latches_changed
}

const NO_BUFFERS: i32 = rustix::io::Errno::NOBUFS.raw_os_error();
/// While a peer's first packet is waited for.
const OFTEN: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
/// While something is amiss that may go by itself.
const SOON: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };
const SELDOM: Timespec = Timespec { tv_sec: 3600, tv_nsec: 0 };
