//! `latchkeyd`: the rooms wired together on tokio.
//!
//! Each of the engine's shards has a task, which the sockets and streams reach by queues ([`shards`]). One task, the core, owns the
//! data plane, the latch database's control side and the rest ([`core`]); the shards, VICI and applications talk to it.

mod children;
mod core;
mod definitions;
mod filelog;
mod idle;
mod numbers;
mod redirect;
mod reqids;
mod reservations;
mod resolver;
mod run;
mod settings;
mod shards;
mod shunts;
mod state;
mod survey;
mod tls;
mod traps;
mod updown;
mod virtual_addresses;

pub use run::{DaemonOptions, run, survive};
