//! Which descriptors are latched sockets, and the descriptors that hold their latches. Atomics only: see the module above.
//!
//! A socket's descriptor may be closed behind our back (the C library's own functions do) and its number given to another
//! socket: what is noted is therefore compared with the socket's cookie wherever it is trusted.

use std::ffi::{c_int, c_uint};
use std::os::fd::{BorrowedFd, IntoRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering};

use rustix::io::FdFlags;

use crate::real;

/// Descriptors above are not latched.
const SIZE: usize = 65_536;

/// What is noted of a descriptor.
struct Slot {
    /// The descriptor that holds its latch, plus one.
    holder: AtomicI32,
    /// The socket whose latch it holds, plus one.
    held: AtomicI32,
    /// Cookie of the socket.
    cookie: AtomicU64,
    /// A number that stands for where it is connected; or of the listener latch.
    detail: AtomicU64,
    /// Its latch was LARVAL when somebody looked last.
    larval: AtomicBool,
}

static SLOTS: [Slot; SIZE] = [const {
    Slot {
        holder: AtomicI32::new(0),
        held: AtomicI32::new(0),
        cookie: AtomicU64::new(0),
        detail: AtomicU64::new(0),
        larval: AtomicBool::new(false),
    }
}; SIZE];

/// Slots from here on have never been used.
static USED: AtomicUsize = AtomicUsize::new(0);

/// The process whose table this is. Between `vfork` and `exec` another process sees the same memory.
static OWNER: AtomicI32 = AtomicI32::new(0);

pub(crate) fn own() {
    OWNER.store(pid(), Ordering::Relaxed);
}

fn is_ours() -> bool {
    OWNER.load(Ordering::Relaxed) == pid()
}

fn pid() -> c_int {
    // SAFETY: takes nothing and cannot fail.
    unsafe { libc::getpid() }
}

fn slot(descriptor: c_int) -> Option<&'static Slot> {
    SLOTS.get(usize::try_from(descriptor).ok()?)
}

/// The cookie of a socket; 0 if it is none, or closed.
pub(crate) fn cookie(socket: c_int) -> u64 {
    let mut cookie = 0u64;
    let mut length: libc::socklen_t = 8;
    // SAFETY: any number may be asked for; there is room for the eight octets of the answer.
    let outcome = unsafe {
        real::getsockopt()(socket, libc::SOL_SOCKET, libc::SO_COOKIE, (&raw mut cookie).cast(), &raw mut length)
    };
    if outcome == 0 { cookie } else { 0 }
}

/// What was noted with a latched socket, if this is still that one.
pub(crate) fn detail(socket: c_int) -> Option<u64> {
    let slot = slot(socket)?;
    if slot.holder.load(Ordering::Acquire) == 0 {
        return None;
    }
    if slot.cookie.load(Ordering::Relaxed) != cookie(socket) {
        closed(socket);
        return None;
    }
    Some(slot.detail.load(Ordering::Relaxed))
}

/// What holds the latch of a socket, if it is LARVAL or nobody has looked since.
pub(crate) fn larval<'a>(socket: c_int) -> Option<BorrowedFd<'a>> {
    detail(socket)?;
    let slot = slot(socket)?;
    let holder = slot.holder.load(Ordering::Acquire);
    if holder == 0 || !slot.larval.load(Ordering::Relaxed) {
        return None;
    }
    // SAFETY: the table's own descriptor, open while it is noted.
    Some(unsafe { BorrowedFd::borrow_raw(holder - 1) })
}

/// The latch of a socket is LARVAL, or no more.
pub(crate) fn set_larval(socket: c_int, larval: bool) {
    if let Some(slot) = slot(socket) {
        slot.larval.store(larval, Ordering::Relaxed);
    }
}

/// There is room to note this descriptor.
pub(crate) fn fits(socket: c_int) -> bool {
    slot(socket).is_some()
}

/// Notes a latched socket; its latch goes when the last of its descriptors does.
pub(crate) fn note(socket: c_int, holder: OwnedFd, detail: u64) {
    let holder = out_of_the_way(holder);
    let (Some(of_socket), Some(of_holder)) = (slot(socket), slot(holder)) else {
        // Closing it ends the latch and the connection.
        // SAFETY: it is ours, and nothing else knows of it.
        unsafe { real::close()(holder) };
        return;
    };
    let highest = usize::try_from(socket.max(holder)).unwrap_or(SIZE);
    USED.fetch_max(highest + 1, Ordering::AcqRel);
    of_socket.cookie.store(cookie(socket), Ordering::Relaxed);
    of_socket.detail.store(detail, Ordering::Relaxed);
    of_socket.larval.store(false, Ordering::Relaxed);
    of_holder.held.store(socket + 1, Ordering::Relaxed);
    of_socket.holder.store(holder + 1, Ordering::Release);
    mirror(socket, holder);
}

/// Low numbers are for the program: some count on them, and `select` needs them.
fn out_of_the_way(holder: OwnedFd) -> c_int {
    for lowest in [512, 128] {
        if let Ok(high) = rustix::io::fcntl_dupfd_cloexec(&holder, lowest) {
            let raw = holder.into_raw_fd();
            // SAFETY: it is ours, and has a duplicate.
            unsafe { real::close()(raw) };
            return high.into_raw_fd();
        }
    }
    holder.into_raw_fd()
}

/// The holder is inherited by another program exactly if the socket is.
fn mirror(socket: c_int, holder: c_int) {
    // SAFETY: the socket is open: it has just been noted or changed.
    let socket = unsafe { BorrowedFd::borrow_raw(socket) };
    let flags = rustix::io::fcntl_getfd(socket).unwrap_or(FdFlags::CLOEXEC);
    // SAFETY: the table's own descriptor, open while it is noted.
    let holder = unsafe { BorrowedFd::borrow_raw(holder) };
    let _ = rustix::io::fcntl_setfd(holder, flags);
}

/// What held the latch of a descriptor that is noted no more.
pub(crate) struct Holder(c_int);

impl Holder {
    /// Lets the latch go.
    pub(crate) fn end(self) {
        // SAFETY: the table's own descriptor, which the table has forgotten.
        unsafe { real::close()(self.0) };
    }
}

/// Forgets a descriptor that is about to be closed: once it is, another thread may get its number.
pub(crate) fn closing(descriptor: c_int) -> Option<Holder> {
    let slot = slot(descriptor)?;
    let noted = slot.holder.load(Ordering::Acquire) != 0 || slot.held.load(Ordering::Relaxed) != 0;
    if !noted || !is_ours() {
        return None;
    }
    // The program closes what it does not know: the latch, and with it the connection, ends.
    let held = slot.held.swap(0, Ordering::AcqRel);
    if let Some(of_socket) = (held != 0).then(|| self::slot(held - 1)).flatten() {
        of_socket.holder.store(0, Ordering::Release);
    }
    let holder = slot.holder.swap(0, Ordering::AcqRel);
    let of_holder = (holder != 0).then(|| self::slot(holder - 1)).flatten()?;
    of_holder.held.store(0, Ordering::Relaxed);
    Some(Holder(holder - 1))
}

/// A descriptor has been closed, or is another one now.
pub(crate) fn closed(descriptor: c_int) {
    if let Some(holder) = closing(descriptor) {
        holder.end();
    }
}

/// Closes a socket that the program has not seen yet.
pub(crate) fn close(descriptor: c_int) {
    // SAFETY: the caller has just received it, and nobody else knows of it.
    unsafe { real::close()(descriptor) };
    closed(descriptor);
}

/// All descriptors of a range have been closed, or will be with the next program.
pub(crate) fn range(first: c_uint, last: c_uint, on_exec: bool) {
    let used = c_uint::try_from(USED.load(Ordering::Acquire)).unwrap_or(c_uint::MAX);
    for descriptor in first..used.min(last.saturating_add(1)) {
        let Ok(descriptor) = c_int::try_from(descriptor) else { return };
        if on_exec {
            close_on_exec(descriptor, true);
        } else {
            closed(descriptor);
        }
    }
}

/// A descriptor has got a duplicate, which holds the latch too; gives the duplicate, or -1.
pub(crate) fn duplicated(descriptor: c_int, duplicate: c_int) -> c_int {
    let Some(slot) = slot(descriptor) else { return duplicate };
    let holder = slot.holder.load(Ordering::Acquire);
    if duplicate < 0 || holder == 0 || !is_ours() {
        return duplicate;
    }
    // SAFETY: the table's own descriptor, open while it is noted.
    let holder = unsafe { BorrowedFd::borrow_raw(holder - 1) };
    match rustix::io::fcntl_dupfd_cloexec(holder, 0) {
        Ok(second) => {
            note(duplicate, second, slot.detail.load(Ordering::Relaxed));
            set_larval(duplicate, slot.larval.load(Ordering::Relaxed));
            duplicate
        }
        Err(error) => {
            // SAFETY: the program has not seen it yet.
            unsafe { real::close()(duplicate) };
            crate::set_errno(error.raw_os_error());
            -1
        }
    }
}

/// Whether a descriptor stays open in another program has changed.
pub(crate) fn close_on_exec(descriptor: c_int, close: bool) {
    let Some(slot) = slot(descriptor) else { return };
    let holder = slot.holder.load(Ordering::Acquire);
    if holder == 0 {
        return;
    }
    // SAFETY: the table's own descriptor, open while it is noted.
    let holder = unsafe { BorrowedFd::borrow_raw(holder - 1) };
    let _ = rustix::io::fcntl_setfd(holder, if close { FdFlags::CLOEXEC } else { FdFlags::empty() });
}
