//! IKEv2 (RFC 7296) as a sans-IO engine: bytes, time, randomness and answers go in; datagrams, events,
//! jobs and the next deadline come out. No sockets, no clock, no threads.
//!
//! * [`wire`]: bytes ↔ messages, no state.
//! * [`crypto`]: PRF, key derivation, key exchange, proposals.
//! * [`config`]: what a connection is.
//! * [`pool`]: internal addresses for peers.
//! * `sa`: one IKE SA and its exchanges.
//! * [`engine`]: many IKE SAs: SPI routing, cookies, timers, the public API.

#![forbid(unsafe_code)]

pub mod config;
pub mod counters;
pub mod crypto;
pub mod engine;
#[doc(hidden)]
pub mod fuzzing;
pub mod pool;
mod sa;
pub mod wire;

/// Source of randomness, passed in so that a simulation can seed it.
pub trait Rng: Send {
    /// Fills the buffer with random octets.
    fn fill(&mut self, buffer: &mut [u8]);
}
