//! `latchkeyd`: the rooms wired together on tokio.
//!
//! One task owns the engine, the data plane and the latch database's control side ([`core`]); sockets,
//! streams, VICI and applications talk to it over bounded channels.

mod children;
mod core;
mod definitions;
mod filelog;
mod idle;
mod redirect;
mod reqids;
mod resolver;
mod run;
mod settings;
mod shunts;
mod state;
mod survey;
mod tls;
mod traps;
mod updown;
mod virtual_addresses;

pub use run::{DaemonOptions, run};
