//! Handles: numbers that stand for clients and latches.

use std::collections::HashMap;
use std::process;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use latch::blocking::{Bypass, Client, Latch, ListenerLatch, UdpEndpoint, UdpPeer};
use latch::protocol::Inquired;

use crate::status::{Failure, Status};

/// What a handle stands for.
pub(crate) enum Entry {
    Client(Client),
    Latch(Box<Latch>),
    Listener(ListenerLatch),
    Endpoint(Arc<UdpEndpoint>),
    /// A peer of an endpoint.
    Peer(Arc<UdpEndpoint>, UdpPeer),
    Bypass(Box<Bypass>),
    /// What `latchkey_whois` found.
    Told(Box<Inquired>),
}

/// An entry in use: it stays until the call ends, also when another thread releases the handle.
#[derive(Clone)]
pub(crate) struct Found {
    entry: Arc<Entry>,
    process: u32,
}

impl Found {
    pub(crate) fn entry(&self) -> &Entry {
        &self.entry
    }
}

#[derive(Default)]
struct Table {
    last: u64,
    entries: HashMap<u64, Found>,
}

static TABLE: Mutex<Option<Table>> = Mutex::new(None);

fn table() -> MutexGuard<'static, Option<Table>> {
    TABLE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A new handle.
pub(crate) fn add(entry: Entry) -> u64 {
    let mut table = table();
    let table = table.get_or_insert_default();
    table.last += 1;
    table.entries.insert(table.last, Found { entry: Arc::new(entry), process: process::id() });
    table.last
}

/// What a handle stands for.
pub(crate) fn find(handle: u64) -> Result<Found, Failure> {
    let found = table().as_ref().and_then(|table| table.entries.get(&handle).cloned());
    match found {
        Some(found) if found.process == process::id() => Ok(found),
        Some(found) => {
            // Dropping the last one would end what the parent holds.
            std::mem::forget(found);
            Err(Failure::new(Status::Forked, format!("the handle {handle} is the parent process's")))
        }
        None => Err(Failure::new(Status::Handle, format!("there is no handle {handle}"))),
    }
}

/// A client.
pub(crate) fn client(handle: u64) -> Result<Client, Failure> {
    match find(handle)?.entry() {
        Entry::Client(client) => Ok(client.clone()),
        _ => Err(Failure::new(Status::Handle, format!("the handle {handle} is not a client's"))),
    }
}

/// Anything but a client.
pub(crate) fn latch(handle: u64) -> Result<Found, Failure> {
    let found = find(handle)?;
    match found.entry() {
        Entry::Client(_) => Err(not_a_latch()),
        _ => Ok(found),
    }
}

/// A socket for datagrams.
pub(crate) fn endpoint(handle: u64) -> Result<Arc<UdpEndpoint>, Failure> {
    match find(handle)?.entry() {
        Entry::Endpoint(endpoint) => Ok(Arc::clone(endpoint)),
        _ => Err(Failure::new(Status::Handle, format!("the handle {handle} is not one of latchkey_latch_datagrams"))),
    }
}

pub(crate) fn not_a_latch() -> Failure {
    Failure::new(Status::Handle, "the handle is not a latch's")
}

/// Forgets a handle.
pub(crate) fn remove(handle: u64) {
    // Dropped after the lock: it may talk to the daemon.
    let removed = table().as_mut().and_then(|table| table.entries.remove(&handle));
    drop(removed);
}
