//! What `latchkey exec` preloads into a program (`docs/exec.md`): functions of the C library that come before its own,
//! and latch what the rules name before a packet leaves.
//!
//! # How a latch is held
//!
//! Each latched socket has a connection to the daemon of its own ([`latch::blocking::hold`]), a descriptor that shares
//! the socket's fate: it is inherited by forks, duplicated with the socket, closed with it, and close-on-exec when it is. So
//! the latch lives exactly as long as any process has the socket, without a word between them.
//!
//! # What may be called here
//!
//! `close` and `dup` may run in signal handlers and between `vfork` and `exec`: they touch atomics only. The rest
//! allocates, as the C library's `connect` does not: a program that connects in a signal handler is beyond this library.
//! Our own system calls go past the C library (`rustix`), so none of these functions meets itself.

#![allow(unsafe_code, reason = "the C edge: each `unsafe` says why it is sound")]

mod confine;
mod policy;
mod real;
mod table;

use std::ffi::{c_int, c_uint, c_ulong, c_void};

use libc::{FILE, mmsghdr, msghdr, size_t, sockaddr, socklen_t, ssize_t};

use policy::Refusal;

// Runs when the program is loaded, before its own code.
#[used]
// SAFETY: the loader calls what this section points to, with arguments that we do not take.
#[unsafe(link_section = ".init_array")]
static START: extern "C" fn() = start;

extern "C" fn start() {
    table::own();
    // SAFETY: the handler is a static function that only stores a number.
    unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
    if let Err(Refusal { message, .. }) = confine::confine() {
        policy::say(&message);
        // SAFETY: ends the process at once; nothing of it has run yet.
        unsafe { libc::_exit(126) };
    }
}

extern "C" fn in_child() {
    table::own();
}

fn fail(refusal: &Refusal) -> c_int {
    policy::say(&refusal.message);
    set_errno(refusal.errno);
    -1
}

fn errno() -> c_int {
    // SAFETY: the C library's errno of this thread, always there.
    unsafe { *libc::__errno_location() }
}

fn set_errno(errno: c_int) {
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
}

/// connect(2).
///
/// # Safety
///
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn connect(socket: c_int, address: *const sockaddr, length: socklen_t) -> c_int {
    // SAFETY: the caller's promise.
    let checked = unsafe { policy::address(address, length) }.map_or(Ok(()), |to| policy::connecting(socket, to));
    match checked {
        // SAFETY: the caller's promise; the function is the C library's.
        Ok(()) => unsafe { real::connect()(socket, address, length) },
        Err(refusal) => fail(&refusal),
    }
}

/// listen(2).
///
/// # Safety
///
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn listen(socket: c_int, backlog: c_int) -> c_int {
    match policy::listening(socket) {
        // SAFETY: the caller's promise; the function is the C library's.
        Ok(()) => unsafe { real::listen()(socket, backlog) },
        Err(refusal) => fail(&refusal),
    }
}

/// accept(2).
///
/// # Safety
///
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn accept(socket: c_int, address: *mut sockaddr, length: *mut socklen_t) -> c_int {
    // SAFETY: the caller's promise.
    unsafe { accept4(socket, address, length, 0) }
}

/// accept4(2).
///
/// # Safety
///
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn accept4(socket: c_int, address: *mut sockaddr, length: *mut socklen_t, flags: c_int) -> c_int {
    // SAFETY: null or the caller's length.
    let room = unsafe { length.as_ref() }.copied();
    loop {
        // SAFETY: the caller's promise; the function is the C library's.
        let accepted = unsafe { real::accept4()(socket, address, length, flags) };
        if accepted < 0 {
            return accepted;
        }
        match policy::accepted(socket, accepted) {
            Ok(true) => return accepted,
            // It has no latch any more: the next.
            Ok(false) => table::close(accepted),
            Err(refusal) => {
                table::close(accepted);
                return fail(&refusal);
            }
        }
        if let Some(room) = room {
            // SAFETY: not null: it gave `room`.
            unsafe { length.write(room) };
        }
    }
}

/// sendto(2).
///
/// # Safety
///
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sendto(
    socket: c_int,
    octets: *const c_void,
    count: size_t,
    flags: c_int,
    address: *const sockaddr,
    length: socklen_t,
) -> ssize_t {
    // SAFETY: the caller's promise.
    let checked = unsafe { policy::address(address, length) }.map_or(Ok(()), |to| policy::sending(socket, to, flags));
    match checked {
        // SAFETY: the caller's promise; the function is the C library's.
        Ok(()) => unsafe { real::sendto()(socket, octets, count, flags, address, length) },
        Err(refusal) => fail(&refusal) as ssize_t,
    }
}

/// Checks the address of a message.
///
/// # Safety
///
/// `message` is null or a message as sendmsg(2) takes it.
unsafe fn message(socket: c_int, message: *const msghdr, flags: c_int) -> Result<(), Refusal> {
    // SAFETY: the caller's promise.
    let Some(message) = (unsafe { message.as_ref() }) else { return Ok(()) };
    // SAFETY: the caller's promise.
    let address = unsafe { policy::address(message.msg_name.cast(), message.msg_namelen) };
    address.map_or(Ok(()), |to| policy::sending(socket, to, flags))
}

/// sendmsg(2).
///
/// # Safety
///
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sendmsg(socket: c_int, header: *const msghdr, flags: c_int) -> ssize_t {
    // SAFETY: the caller's promise.
    match unsafe { message(socket, header, flags) } {
        // SAFETY: the caller's promise; the function is the C library's.
        Ok(()) => unsafe { real::sendmsg()(socket, header, flags) },
        Err(refusal) => fail(&refusal) as ssize_t,
    }
}

/// sendmmsg(2).
///
/// # Safety
///
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sendmmsg(socket: c_int, headers: *mut mmsghdr, count: c_uint, flags: c_int) -> c_int {
    for index in 0..count {
        let Ok(index) = usize::try_from(index) else { break };
        // SAFETY: there are `count` of them, by the caller's promise.
        let header = unsafe { &raw const (*headers.add(index)).msg_hdr };
        // SAFETY: the caller's promise.
        if let Err(refusal) = unsafe { message(socket, header, flags) } {
            return fail(&refusal);
        }
    }
    // SAFETY: the caller's promise; the function is the C library's.
    unsafe { real::sendmmsg()(socket, headers, count, flags) }
}

/// What receiving gives: an empty datagram is an error when the socket's latch has ended, so that nobody reads them for ever.
fn received(socket: c_int, outcome: ssize_t) -> ssize_t {
    if outcome != 0 || !policy::is_shut(socket) {
        return outcome;
    }
    set_errno(libc::ECONNRESET);
    -1
}

/// read(2).
///
/// # Safety
///
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn read(descriptor: c_int, octets: *mut c_void, count: size_t) -> ssize_t {
    // SAFETY: the caller's promise; the function is the C library's.
    received(descriptor, unsafe { real::read()(descriptor, octets, count) })
}

/// recv(2).
///
/// # Safety
///
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn recv(socket: c_int, octets: *mut c_void, count: size_t, flags: c_int) -> ssize_t {
    // SAFETY: the caller's promise; the function is the C library's.
    received(socket, unsafe { real::recv()(socket, octets, count, flags) })
}

/// recvfrom(2).
///
/// # Safety
///
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn recvfrom(
    socket: c_int,
    octets: *mut c_void,
    count: size_t,
    flags: c_int,
    address: *mut sockaddr,
    length: *mut socklen_t,
) -> ssize_t {
    // SAFETY: the caller's promise; the function is the C library's.
    received(socket, unsafe { real::recvfrom()(socket, octets, count, flags, address, length) })
}

/// recvmsg(2).
///
/// # Safety
///
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn recvmsg(socket: c_int, header: *mut msghdr, flags: c_int) -> ssize_t {
    // SAFETY: the caller's promise; the function is the C library's.
    received(socket, unsafe { real::recvmsg()(socket, header, flags) })
}

/// getsockopt(2): a program that does not block asks by SO_ERROR what has become of its connection.
///
/// # Safety
///
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn getsockopt(
    socket: c_int,
    level: c_int,
    name: c_int,
    value: *mut c_void,
    length: *mut socklen_t,
) -> c_int {
    // SAFETY: the caller's promise; the function is the C library's.
    let outcome = unsafe { real::getsockopt()(socket, level, name, value, length) };
    if outcome != 0 || level != libc::SOL_SOCKET || name != libc::SO_ERROR {
        return outcome;
    }
    let error = value.cast::<c_int>();
    // SAFETY: the system has written so many octets, by the caller's promise.
    let failed = unsafe { *length >= 4 && error.read_unaligned() != 0 };
    if failed && let Err(refusal) = policy::settled(socket) {
        policy::say(&refusal.message);
        // SAFETY: as above.
        unsafe { error.write_unaligned(refusal.errno) };
    }
    outcome
}

/// close(2).
#[unsafe(no_mangle)]
pub extern "C" fn close(descriptor: c_int) -> c_int {
    let holder = table::closing(descriptor);
    // SAFETY: any number may be closed; the function is the C library's.
    let outcome = unsafe { real::close()(descriptor) };
    let errno = errno();
    if let Some(holder) = holder {
        holder.end();
    }
    set_errno(errno);
    outcome
}

/// fclose(3): the C library closes the descriptor without `close`.
///
/// # Safety
///
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fclose(stream: *mut FILE) -> c_int {
    // SAFETY: the caller's promise.
    let descriptor = if stream.is_null() { -1 } else { unsafe { libc::fileno(stream) } };
    let holder = table::closing(descriptor);
    // SAFETY: the caller's promise; the function is the C library's.
    let outcome = unsafe { real::fclose()(stream) };
    let errno = errno();
    if let Some(holder) = holder {
        holder.end();
    }
    set_errno(errno);
    outcome
}

/// close_range(2).
#[unsafe(no_mangle)]
pub extern "C" fn close_range(first: c_uint, last: c_uint, flags: c_int) -> c_int {
    // SAFETY: takes numbers only; the function is the C library's.
    let outcome = unsafe { real::close_range()(first, last, flags) };
    let errno = errno();
    if outcome == 0 {
        table::range(first, last, c_uint::try_from(flags).is_ok_and(|flags| flags & libc::CLOSE_RANGE_CLOEXEC != 0));
    }
    set_errno(errno);
    outcome
}

/// closefrom(3).
#[unsafe(no_mangle)]
pub extern "C" fn closefrom(first: c_int) {
    // SAFETY: takes a number only; the function is the C library's.
    unsafe { real::closefrom()(first) };
    table::range(c_uint::try_from(first).unwrap_or(0), c_uint::MAX, false);
}

/// dup(2).
#[unsafe(no_mangle)]
pub extern "C" fn dup(descriptor: c_int) -> c_int {
    // SAFETY: takes a number only; the function is the C library's.
    table::duplicated(descriptor, unsafe { real::dup()(descriptor) })
}

/// dup2(2).
#[unsafe(no_mangle)]
pub extern "C" fn dup2(descriptor: c_int, new: c_int) -> c_int {
    // SAFETY: takes numbers only; the function is the C library's.
    let outcome = unsafe { real::dup2()(descriptor, new) };
    replaced(descriptor, new, outcome)
}

/// dup3(2).
#[unsafe(no_mangle)]
pub extern "C" fn dup3(descriptor: c_int, new: c_int, flags: c_int) -> c_int {
    // SAFETY: takes numbers only; the function is the C library's.
    let outcome = unsafe { real::dup3()(descriptor, new, flags) };
    replaced(descriptor, new, outcome)
}

fn replaced(descriptor: c_int, new: c_int, outcome: c_int) -> c_int {
    if outcome < 0 || descriptor == new {
        return outcome;
    }
    table::closed(new);
    table::duplicated(descriptor, outcome)
}

/// fcntl(2). Declared with its one optional argument: where it is left out, a register's old contents come, which the
/// system does not look at.
///
/// # Safety
///
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fcntl(descriptor: c_int, command: c_int, argument: c_ulong) -> c_int {
    // SAFETY: the caller's promise; the function is the C library's.
    controlled(descriptor, command, argument, unsafe { real::fcntl()(descriptor, command, argument) })
}

/// fcntl(2) of programs with 64-bit offsets.
///
/// # Safety
///
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fcntl64(descriptor: c_int, command: c_int, argument: c_ulong) -> c_int {
    // SAFETY: the caller's promise; the function is the C library's.
    controlled(descriptor, command, argument, unsafe { real::fcntl64()(descriptor, command, argument) })
}

fn controlled(descriptor: c_int, command: c_int, argument: c_ulong, outcome: c_int) -> c_int {
    match command {
        _ if outcome < 0 => outcome,
        libc::F_DUPFD | libc::F_DUPFD_CLOEXEC => table::duplicated(descriptor, outcome),
        libc::F_SETFD => {
            table::close_on_exec(descriptor, argument & 1 != 0);
            outcome
        }
        _ => outcome,
    }
}

/// ioctl(2), declared as [`fcntl`] is.
///
/// # Safety
///
/// As the C library's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ioctl(descriptor: c_int, request: c_ulong, argument: c_ulong) -> c_int {
    // SAFETY: the caller's promise; the function is the C library's.
    let outcome = unsafe { real::ioctl()(descriptor, request, argument) };
    if outcome == 0 && (request == libc::FIOCLEX || request == libc::FIONCLEX) {
        table::close_on_exec(descriptor, request == libc::FIOCLEX);
    }
    outcome
}
