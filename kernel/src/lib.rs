//! Everything of Latchkey that is Linux: sockets of IKE and ESP, the TUN device, routes, and the threads of
//! the user-space ESP plane. The only crate with `unsafe`, each with its reason.

pub mod interfaces;
mod netlink;
pub mod netns;
pub mod network;
mod plane;
mod routes;
mod socket;
mod threads;
mod tun;
mod watch;
