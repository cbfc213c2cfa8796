//! IPsec connection latching (RFC 5660): a connection is pinned to the identity of the IPsec peer and to the
//! protection it had, and stops before one byte passes under anything else.
//!
//! * [`database`]: latches, congruence classes, conflicts; no IO.
//! * [`protocol`], [`server`]: how applications ask, over a Unix socket.
//! * [`access`]: who may ask for what.
//! * [`exec`]: the rules by which connections of unmodified programs are latched.
//! * [`left`]: what a daemon that is no more left of the system's barriers.
//! * [`client`]: the library that applications use, on tokio; [`blocking`]: the same for programs without a runtime.

#![forbid(unsafe_code)]

pub mod access;
pub mod blocking;
pub mod client;
mod connections;
pub mod database;
pub mod exec;
pub mod left;
pub mod protocol;
mod roster;
mod seqpacket;
pub mod server;
mod session;
pub mod survivor;
