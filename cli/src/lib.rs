//! What `latchkeyd` and `latchkey` are made of: configuration, VICI, and the wiring of the rooms on tokio.

#![forbid(unsafe_code)]

pub mod commands;
pub mod config;
pub mod control;
pub mod daemon;
mod datagrams;
pub mod demo;
pub mod exec;
pub mod latches;
pub mod tree;
pub mod vici;
