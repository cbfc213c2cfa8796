//! IPsec's nouns, pure (RFC 4301, RFC 4303): what is protected, how, and by which SA.
//!
//! Nothing here opens a socket, reads a clock or knows IKE. The crates above hand in packets,
//! keys and time, and get packets, verdicts and exact errors back.

#![forbid(unsafe_code)]

pub mod crypto;
pub mod datapath;
pub mod esp;
pub mod exclusion;
pub mod guard;
pub mod ip;
mod natted;
mod networks;
pub mod plane;
pub mod replay;
pub mod sad;
pub mod secret;
pub mod selector;
pub mod spd;
pub mod transform;
