//! The harness of the whole-system tests: hosts are network namespaces, daemons are real processes, and both
//! strongSwan's and ours are driven by strongSwan's own `swanctl`.
//!
//! A missing tool or right is a failure that names the command that mends it; nothing is skipped.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    reason = "a harness fails by panicking, with the message as its report"
)]

pub mod actions;
pub mod capture;
pub mod daemon;
pub mod exec;
pub mod host;
pub mod latched;
pub mod middlebox;
pub mod optional;
pub mod peer;
pub mod pki;
pub mod scene;
pub mod talker;
pub mod uml;
pub mod wire;
pub mod witness;
