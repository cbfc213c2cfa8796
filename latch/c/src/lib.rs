//! Connection latching for C: `include/latchkey.h` says what each function does.
//!
//! Handles are numbers in a table, so that no handle that a program makes up or uses too late leads to memory. Each function
//! catches panics; nothing unwinds into C.

#![allow(unsafe_code, reason = "the C edge: each `unsafe` says why it is sound")]

mod arguments;
mod handles;
mod items;
mod status;

use std::ffi::{c_char, c_int, c_void};
use std::io::ErrorKind;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::sync::Arc;

use latch::blocking::{Change, Client};
use latch::protocol::State;

use arguments::WantedArgument;
use handles::Entry;
use status::{Failure, Status, guarded};

/// Where the daemon's latch socket is, unless it is said otherwise.
const DEFAULT_PATH: &str = "/run/latchkey/latch.sock";

/// `struct latchkey_change`.
#[repr(C)]
#[derive(Debug)]
pub struct ChangeResult {
    number: u64,
    state: c_int,
    reason: [c_char; 256],
}

/// See `latchkey.h`.
#[unsafe(no_mangle)]
pub extern "C" fn latchkey_error() -> *const c_char {
    status::last_message()
}

/// See `latchkey.h`.
#[unsafe(no_mangle)]
pub extern "C" fn latchkey_status_name(status: c_int) -> *const c_char {
    status::name(status).as_ptr()
}

/// See `latchkey.h`.
///
/// # Safety
///
/// `path` is null or a string that ends with a zero; `client` is null or may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn latchkey_open(path: *const c_char, client: *mut u64) -> c_int {
    guarded(|| {
        // SAFETY: the caller's promise.
        let client = unsafe { arguments::output(client, "client") }?;
        // SAFETY: the caller's promise.
        let path = unsafe { arguments::text(path, "path") }?.unwrap_or(DEFAULT_PATH);
        *client = handles::add(Entry::Client(Client::connect(path)?));
        Ok(())
    })
}

/// See `latchkey.h`.
#[unsafe(no_mangle)]
pub extern "C" fn latchkey_close(client: u64) -> c_int {
    guarded(|| {
        handles::client(client)?;
        handles::remove(client);
        Ok(())
    })
}

/// See `latchkey.h`.
///
/// # Safety
///
/// `descriptor` is null or may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn latchkey_descriptor(client: u64, descriptor: *mut c_int) -> c_int {
    guarded(|| {
        // SAFETY: the caller's promise.
        let descriptor = unsafe { arguments::output(descriptor, "descriptor") }?;
        *descriptor = handles::client(client)?.as_fd().as_raw_fd();
        Ok(())
    })
}

/// See `latchkey.h`.
///
/// # Safety
///
/// `remote` is null or has `length` octets; `wanted` is null or a `struct latchkey_wanted` as the header describes it;
/// `latch` is null or may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn latchkey_latch_socket(
    client: u64,
    socket: c_int,
    remote: *const c_void,
    length: u32,
    wanted: *const WantedArgument,
    latch: *mut u64,
) -> c_int {
    guarded(|| {
        // SAFETY: the caller's promise.
        let latch = unsafe { arguments::output(latch, "latch") }?;
        // SAFETY: the caller's promise.
        let (remote, wanted) = unsafe { (arguments::address(remote, length)?, arguments::wanted(wanted)?) };
        let (client, socket) = (handles::client(client)?, arguments::socket(socket)?);
        *latch = handles::add(Entry::Latch(Box::new(client.latch_socket(socket, remote, wanted)?)));
        Ok(())
    })
}

/// See `latchkey.h`.
///
/// # Safety
///
/// `remote` is null or has `length` octets; `latch` is null or may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn latchkey_bypass_socket(
    client: u64,
    socket: c_int,
    remote: *const c_void,
    length: u32,
    latch: *mut u64,
) -> c_int {
    guarded(|| {
        // SAFETY: the caller's promise.
        let latch = unsafe { arguments::output(latch, "latch") }?;
        // SAFETY: the caller's promise.
        let remote = unsafe { arguments::address(remote, length) }?;
        let (client, socket) = (handles::client(client)?, arguments::socket(socket)?);
        *latch = handles::add(Entry::Bypass(Box::new(client.bypass_socket(socket, remote)?)));
        Ok(())
    })
}

/// See `latchkey.h`.
///
/// # Safety
///
/// `wanted` is null or a `struct latchkey_wanted` as the header describes it; `listener` is null or may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn latchkey_latch_listener(
    client: u64,
    socket: c_int,
    wanted: *const WantedArgument,
    listener: *mut u64,
) -> c_int {
    guarded(|| {
        // SAFETY: the caller's promise.
        let listener = unsafe { arguments::output(listener, "listener") }?;
        // SAFETY: the caller's promise.
        let wanted = unsafe { arguments::wanted(wanted) }?;
        let (client, socket) = (handles::client(client)?, arguments::socket(socket)?);
        *listener = handles::add(Entry::Listener(client.latch_listener(socket, wanted)?));
        Ok(())
    })
}

/// See `latchkey.h`.
///
/// # Safety
///
/// `latch` is null or may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn latchkey_accept(listener: u64, socket: c_int, latch: *mut u64) -> c_int {
    guarded(|| {
        // SAFETY: the caller's promise.
        let latch = unsafe { arguments::output(latch, "latch") }?;
        let found = handles::find(listener)?;
        let Entry::Listener(listener) = found.entry() else {
            return Err(Failure::new(Status::Handle, "the handle is not a listener's"));
        };
        *latch = handles::add(Entry::Latch(Box::new(listener.accept(arguments::socket(socket)?)?)));
        Ok(())
    })
}

/// See `latchkey.h`.
///
/// # Safety
///
/// `wanted` is null or a `struct latchkey_wanted` as the header describes it; `endpoint` is null or may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn latchkey_latch_datagrams(
    client: u64,
    socket: c_int,
    wanted: *const WantedArgument,
    endpoint: *mut u64,
) -> c_int {
    guarded(|| {
        // SAFETY: the caller's promise.
        let endpoint = unsafe { arguments::output(endpoint, "endpoint") }?;
        // SAFETY: the caller's promise.
        let wanted = unsafe { arguments::wanted(wanted) }?;
        let (client, socket) = (handles::client(client)?, arguments::socket(socket)?);
        *endpoint = handles::add(Entry::Endpoint(Arc::new(client.latch_datagrams(socket, wanted)?)));
        Ok(())
    })
}

/// See `latchkey.h`.
///
/// # Safety
///
/// `buffer` is null or has room for `size` octets; `length` and `peer` are null or may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn latchkey_receive(
    endpoint: u64,
    milliseconds: c_int,
    buffer: *mut c_void,
    size: usize,
    length: *mut usize,
    peer: *mut u64,
) -> c_int {
    guarded(|| {
        // SAFETY: the caller's promise.
        let (length, peer) = unsafe { (arguments::output(length, "length")?, arguments::output(peer, "peer")?) };
        let endpoint = handles::endpoint(endpoint)?;
        if buffer.is_null() && size != 0 {
            return Err(Failure::new(Status::Argument, "buffer is null, and size is not 0"));
        }
        // Into memory of ours: the caller's need not be initialised.
        let mut datagram = vec![0; size.min(MAX_DATAGRAM)];
        let received = endpoint.recv_from_within(arguments::timeout(milliseconds), &mut datagram);
        let (received, from) = received.map_err(|error| match error.kind() {
            ErrorKind::WouldBlock => Failure::new(Status::Timeout, "time is up"),
            ErrorKind::ConnectionReset => Failure::new(Status::Gone, error.to_string()),
            _ => Failure::new(Status::System, format!("receiving: {error}")),
        })?;
        datagram.truncate(received);
        // SAFETY: the caller's promise.
        unsafe { arguments::copy(&datagram, false, buffer, size, length) }?;
        *peer = from.latch();
        Ok(())
    })
}

/// See `latchkey.h`.
///
/// # Safety
///
/// `datagram` is null or has `size` octets.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn latchkey_send(endpoint: u64, peer: u64, datagram: *const c_void, size: usize) -> c_int {
    guarded(|| {
        // SAFETY: the caller's promise.
        let datagram = unsafe { arguments::octets(datagram, size, MAX_DATAGRAM) }?;
        let endpoint = handles::endpoint(endpoint)?;
        let ended = || Failure::new(Status::Ended, format!("there is no peer with the latch {peer}, or no longer"));
        let to = endpoint.peer_of_latch(peer).ok_or_else(ended)?;
        endpoint.send_to(datagram, &to).map(drop).map_err(|error| match error.kind() {
            ErrorKind::ConnectionReset if to.ended().is_some() => Failure::new(Status::Ended, error.to_string()),
            ErrorKind::ConnectionReset => Failure::new(Status::Gone, error.to_string()),
            _ => Failure::new(Status::System, format!("sending: {error}")),
        })
    })
}

/// See `latchkey.h`.
///
/// # Safety
///
/// `remote` is null or has `length` octets; `wanted` is null or a `struct latchkey_wanted` as the header describes it; `peer` is
/// null or may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn latchkey_latch_peer(
    endpoint: u64,
    remote: *const c_void,
    length: u32,
    wanted: *const WantedArgument,
    peer: *mut u64,
) -> c_int {
    guarded(|| {
        // SAFETY: the caller's promise.
        let peer = unsafe { arguments::output(peer, "peer") }?;
        // SAFETY: the caller's promise.
        let (remote, wanted) = unsafe { (arguments::address(remote, length)?, arguments::wanted(wanted)?) };
        *peer = handles::endpoint(endpoint)?.latch(remote, wanted)?.latch();
        Ok(())
    })
}

/// See `latchkey.h`.
///
/// # Safety
///
/// `told` is null or may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn latchkey_peer(endpoint: u64, peer: u64, told: *mut u64) -> c_int {
    guarded(|| {
        // SAFETY: the caller's promise.
        let told = unsafe { arguments::output(told, "told") }?;
        let endpoint = handles::endpoint(endpoint)?;
        let ended = || Failure::new(Status::Ended, format!("there is no peer with the latch {peer}, or no longer"));
        let peer = endpoint.peer_of_latch(peer).ok_or_else(ended)?;
        *told = handles::add(Entry::Peer(endpoint, peer));
        Ok(())
    })
}

/// See `latchkey.h`.
#[unsafe(no_mangle)]
pub extern "C" fn latchkey_end_peer(endpoint: u64, peer: u64) -> c_int {
    guarded(|| {
        let endpoint = handles::endpoint(endpoint)?;
        if let Some(peer) = endpoint.peer_of_latch(peer) {
            endpoint.end(&peer)?;
        }
        Ok(())
    })
}

/// See `latchkey.h`.
///
/// # Safety
///
/// `found` is null or may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn latchkey_whois(client: u64, socket: c_int, found: *mut u64) -> c_int {
    guarded(|| {
        // SAFETY: the caller's promise.
        let found = unsafe { arguments::output(found, "found") }?;
        let (client, socket) = (handles::client(client)?, arguments::socket(socket)?);
        *found = handles::add(Entry::Told(Box::new(client.whois_socket(socket)?)));
        Ok(())
    })
}

/// See `latchkey.h`.
///
/// # Safety
///
/// `told` is null or may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn latchkey_inquire(latch: u64, told: *mut u64) -> c_int {
    guarded(|| {
        // SAFETY: the caller's promise.
        let told = unsafe { arguments::output(told, "told") }?;
        let inquired = match handles::latch(latch)?.entry() {
            Entry::Latch(latch) => latch.inquire()?,
            Entry::Peer(endpoint, peer) => endpoint.inquire(peer)?,
            Entry::Bypass(bypass) => bypass.inquire()?,
            _ => return Err(not_a_connection()),
        };
        *told = handles::add(Entry::Told(Box::new(inquired)));
        Ok(())
    })
}

/// See `latchkey.h`.
#[unsafe(no_mangle)]
pub extern "C" fn latchkey_release(latch: u64) -> c_int {
    guarded(|| {
        handles::latch(latch)?;
        handles::remove(latch);
        Ok(())
    })
}

/// See `latchkey.h`.
///
/// # Safety
///
/// `state` is null or may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn latchkey_state(latch: u64, state: *mut c_int) -> c_int {
    guarded(|| {
        // SAFETY: the caller's promise.
        let state = unsafe { arguments::output(state, "state") }?;
        *state = match handles::latch(latch)?.entry() {
            Entry::Latch(latch) => number(latch.state()),
            Entry::Listener(_) | Entry::Endpoint(_) => number(State::Listener),
            Entry::Peer(_, peer) => number(peer.state()),
            Entry::Bypass(bypass) => number(bypass.state()),
            Entry::Told(told) => match &told.latch {
                Some(latch) => number(latch.state),
                None => return Err(Failure::new(Status::Absent, "the connection has no latch")),
            },
            Entry::Client(_) => return Err(handles::not_a_latch()),
        };
        Ok(())
    })
}

/// See `latchkey.h`.
///
/// # Safety
///
/// `change` is null or may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn latchkey_next(client: u64, milliseconds: c_int, change: *mut ChangeResult) -> c_int {
    guarded(|| {
        // SAFETY: the caller's promise.
        let result = unsafe { arguments::output(change, "change") }?;
        let next = handles::client(client)?.next_change(arguments::timeout(milliseconds))?;
        let Some((number, change)) = next else { return Err(Failure::new(Status::Timeout, "time is up")) };
        *result = told(number, &change);
        Ok(())
    })
}

/// See `latchkey.h`.
///
/// # Safety
///
/// `change` is null or may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn latchkey_wait(latch: u64, milliseconds: c_int, change: *mut ChangeResult) -> c_int {
    guarded(|| {
        // SAFETY: the caller's promise.
        let result = unsafe { arguments::output(change, "change") }?;
        let timeout = arguments::timeout(milliseconds);
        let (number, broken) = match handles::latch(latch)?.entry() {
            Entry::Latch(latch) => (latch.number(), latch.broken(timeout)),
            Entry::Bypass(bypass) => (bypass.number(), bypass.broken(timeout)),
            _ => return Err(not_a_connection()),
        };
        let Some(change) = broken else { return Err(Failure::new(Status::Timeout, "time is up")) };
        *result = told(number, &change);
        Ok(())
    })
}

/// See `latchkey.h`.
///
/// # Safety
///
/// `buffer` is null or has room for `size` octets; `length` is null or may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn latchkey_get(
    latch: u64,
    item: c_int,
    buffer: *mut c_void,
    size: usize,
    length: *mut usize,
) -> c_int {
    guarded(|| {
        let found = handles::latch(latch)?;
        let (octets, is_text) = items::octets(found.entry(), item)?;
        // SAFETY: the caller's promise.
        unsafe { arguments::copy(&octets, is_text, buffer, size, length) }
    })
}

/// See `latchkey.h`.
///
/// # Safety
///
/// `number` is null or may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn latchkey_get_number(latch: u64, item: c_int, number: *mut u64) -> c_int {
    guarded(|| {
        // SAFETY: the caller's promise.
        let number = unsafe { arguments::output(number, "number") }?;
        *number = items::number(handles::latch(latch)?.entry(), item)?;
        Ok(())
    })
}

/// See `latchkey.h`.
///
/// # Safety
///
/// `kind` is null or a string that ends with a zero; `buffer` is null or has room for `size` octets; `length` is null or
/// may be written to.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn latchkey_channel_binding(
    latch: u64,
    kind: *const c_char,
    buffer: *mut c_void,
    size: usize,
    length: *mut usize,
) -> c_int {
    guarded(|| {
        // SAFETY: the caller's promise.
        let kind = unsafe { arguments::text(kind, "type") }?;
        let kind = kind.unwrap_or(latch::protocol::UNIQUE_BINDING);
        let binding = match handles::latch(latch)?.entry() {
            Entry::Latch(latch) => latch.channel_binding_of(kind)?,
            Entry::Peer(endpoint, peer) => endpoint.channel_binding_of(peer, kind)?,
            _ => return Err(not_a_connection()),
        };
        // SAFETY: the caller's promise.
        unsafe { arguments::copy(&binding.data, false, buffer, size, length) }
    })
}

/// The handle is not that of a connection's latch which we hold.
fn not_a_connection() -> Failure {
    Failure::new(Status::Handle, "the handle is not a connection's latch")
}

/// No datagram is longer.
const MAX_DATAGRAM: usize = 65_535;

fn number(state: State) -> c_int {
    match state {
        State::Listener => 1,
        State::Established => 2,
        State::Broken => 3,
        State::Closed => 4,
    }
}

fn told(number: u64, change: &Change) -> ChangeResult {
    let mut reason = [0; 256];
    // The last one stays zero.
    for (to, from) in reason.iter_mut().zip(change.reason.bytes().filter(|octet| *octet != 0).take(255)) {
        *to = c_char::from_ne_bytes([from]);
    }
    ChangeResult { number, state: self::number(change.state), reason }
}

#[cfg(test)]
mod tests;
