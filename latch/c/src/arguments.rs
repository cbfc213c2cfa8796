//! Arguments from C, checked as far as they can be.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use latch::protocol::{Disposition, Initiate, Wanted, WantedMode, WantedSuite};
use socket2::{SockAddr, SockAddrStorage};

use crate::status::{Failure, Status};

/// `struct latchkey_suite`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct SuiteArgument {
    pub(crate) encr: u16,
    pub(crate) key_bits: u16,
    pub(crate) integ: u16,
}

/// `struct latchkey_wanted`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct WantedArgument {
    pub(crate) size: usize,
    pub(crate) peer: *const c_char,
    pub(crate) local_id: *const c_char,
    pub(crate) mode: *const c_char,
    pub(crate) suites: *const SuiteArgument,
    pub(crate) suite_count: usize,
    pub(crate) replay_protection: c_int,
    pub(crate) on_break: c_int,
    pub(crate) initiate: c_int,
    pub(crate) late: c_int,
}

/// More suites than there are algorithms are none that were meant.
const MAX_SUITES: usize = 256;

fn refused(message: impl Into<String>) -> Failure {
    Failure::new(Status::Argument, message)
}

/// Where a result goes.
///
/// # Safety
///
/// `pointer` is null or may be written to for `'a`, and nobody else does.
pub(crate) unsafe fn output<'a, T>(pointer: *mut T, name: &str) -> Result<&'a mut T, Failure> {
    if !pointer.is_aligned() {
        return Err(refused(format!("{name} is not aligned")));
    }
    // SAFETY: not null is checked here, alignment above; the rest is the caller's promise. All `T` here are plain
    // numbers, so that any octets are a value.
    unsafe { pointer.as_mut() }.ok_or_else(|| refused(format!("{name} is null")))
}

/// A text; `None` for null.
///
/// # Safety
///
/// `pointer` is null or points to a string that ends with a zero and stays for `'a`.
pub(crate) unsafe fn text<'a>(pointer: *const c_char, name: &str) -> Result<Option<&'a str>, Failure> {
    if pointer.is_null() {
        return Ok(None);
    }
    // SAFETY: not null; the rest is the caller's promise.
    let text = unsafe { CStr::from_ptr(pointer) };
    text.to_str().map(Some).map_err(|_| refused(format!("{name} is not UTF-8")))
}

/// An address of IPv4 or IPv6.
///
/// # Safety
///
/// `pointer` is null or points to `length` octets.
pub(crate) unsafe fn address(pointer: *const c_void, length: u32) -> Result<SocketAddr, Failure> {
    let mut storage = SockAddrStorage::zeroed();
    let size = usize::try_from(length).unwrap_or(usize::MAX);
    if pointer.is_null() || size > size_of::<SockAddrStorage>() {
        return Err(refused(format!("remote is null, or {length} is no length of an address")));
    }
    // SAFETY: the source has `length` octets (the caller's promise), the destination at least as many (checked above),
    // and they do not overlap, since the destination is ours.
    unsafe { std::ptr::copy_nonoverlapping(pointer.cast::<u8>(), (&raw mut storage).cast::<u8>(), size) };
    // SAFETY: zeroed octets and octets of the caller are values of this plain struct; `length` is within it.
    let address = unsafe { SockAddr::new(storage, length) };
    // The family says how much of it must be there.
    let needed = if address.is_ipv4() { 16 } else { 28 };
    let address = address.as_socket().filter(|_| size >= needed);
    address.ok_or_else(|| refused("remote is not an address of IPv4 or IPv6"))
}

/// A descriptor that is open.
pub(crate) fn socket<'a>(socket: c_int) -> Result<BorrowedFd<'a>, Failure> {
    let closed = || Failure::new(Status::Socket, format!("{socket} is not an open descriptor"));
    if socket < 0 {
        return Err(closed());
    }
    // SAFETY: not -1. The caller lends it for the call; whether it is open is asked next, and no call with one that is
    // not does more than fail.
    let borrowed = unsafe { BorrowedFd::borrow_raw(socket) };
    rustix::io::fcntl_getfd(borrowed).map_err(|_| closed())?;
    Ok(borrowed)
}

/// What is wanted of a latch.
///
/// # Safety
///
/// `pointer` is null or points to a `struct latchkey_wanted` as the header describes it.
pub(crate) unsafe fn wanted(pointer: *const WantedArgument) -> Result<Wanted, Failure> {
    if pointer.is_null() || !pointer.is_aligned() {
        return Err(refused("wanted is null, or not aligned"));
    }
    // SAFETY: not null and aligned; the first field is there in every version of the struct.
    let size = unsafe { (&raw const (*pointer).size).read() };
    if size != size_of::<WantedArgument>() {
        return Err(refused(format!("wanted.size is {size}, not sizeof(struct latchkey_wanted)")));
    }
    // SAFETY: it has that size, by the caller's word; any octets are a value of this struct of numbers and pointers.
    let given = unsafe { pointer.read() };
    // SAFETY: the caller's promise for each string.
    let (peer, local_id, mode) = unsafe {
        (text(given.peer, "wanted.peer")?, text(given.local_id, "wanted.local_id")?, text(given.mode, "wanted.mode")?)
    };
    let mode = match mode {
        None => None,
        Some("tunnel") => Some(WantedMode::Tunnel),
        Some("transport") => Some(WantedMode::Transport),
        Some(other) => return Err(refused(format!("wanted.mode is {other:?}, neither tunnel nor transport"))),
    };
    let suites = match given.suite_count {
        0 => &[][..],
        1..=MAX_SUITES if !given.suites.is_null() && given.suites.is_aligned() => {
            // SAFETY: not null, aligned, and by the caller's promise so many of them; any octets are values.
            unsafe { std::slice::from_raw_parts(given.suites, given.suite_count) }
        }
        count => return Err(refused(format!("wanted.suites is null, or {count} are too many"))),
    };
    let suites =
        suites.iter().map(|suite| WantedSuite { encr: suite.encr, key_bits: suite.key_bits, integ: suite.integ });
    let on_break = match given.on_break {
        0 => None,
        1 => Some(Disposition::Reset),
        2 => Some(Disposition::Wait),
        3 => Some(Disposition::Unreachable),
        other => return Err(refused(format!("wanted.on_break is {other}"))),
    };
    let initiate = match given.initiate {
        0 => Initiate::Needed,
        1 => Initiate::Narrow,
        2 => Initiate::No,
        other => return Err(refused(format!("wanted.initiate is {other}"))),
    };
    Ok(Wanted {
        larval: false,
        progress: false,
        late: given.late != 0,
        peer: peer.ok_or_else(|| refused("wanted.peer is null"))?.to_owned(),
        local_id: local_id.map(str::to_owned),
        mode,
        suites: suites.collect(),
        replay_protection: given.replay_protection != 0,
        on_break,
        initiate,
        quiet: false,
        listener: None,
        remote: None,
    })
}

/// Milliseconds to wait; negative is for ever.
pub(crate) fn timeout(milliseconds: c_int) -> Option<Duration> {
    u64::try_from(milliseconds).ok().map(Duration::from_millis)
}

/// Octets that the caller has.
///
/// # Safety
///
/// `pointer` is null or has `size` octets that stay for `'a`.
pub(crate) unsafe fn octets<'a>(pointer: *const c_void, size: usize, most: usize) -> Result<&'a [u8], Failure> {
    match size {
        0 => Ok(&[]),
        size if pointer.is_null() || size > most => {
            Err(refused(format!("datagram is null, or {size} octets are too many")))
        }
        // SAFETY: not null, and so many by the caller's promise; octets have no alignment, and any are values.
        size => Ok(unsafe { std::slice::from_raw_parts(pointer.cast::<u8>(), size) }),
    }
}

/// Copies a result into the caller's buffer, and stores its length.
///
/// # Safety
///
/// `buffer` is null or has room for `size` octets; `length` is null or may be written to.
pub(crate) unsafe fn copy(
    octets: &[u8],
    is_text: bool,
    buffer: *mut c_void,
    size: usize,
    length: *mut usize,
) -> Result<(), Failure> {
    if buffer.is_null() && size != 0 {
        return Err(refused("buffer is null, and size is not 0"));
    }
    // SAFETY: the caller's promise.
    *unsafe { output(length, "length") }? = octets.len();
    if size < octets.len() + usize::from(is_text) {
        return Err(Failure::new(Status::TooSmall, format!("it has {} octets, the buffer {size}", octets.len())));
    }
    let buffer = buffer.cast::<u8>();
    if !buffer.is_null() {
        // SAFETY: the buffer has room for so many octets, and one more for a text (checked above), and is not ours, so
        // that they do not overlap.
        unsafe {
            std::ptr::copy_nonoverlapping(octets.as_ptr(), buffer, octets.len());
            if is_text {
                buffer.add(octets.len()).write(0);
            }
        }
    }
    Ok(())
}
