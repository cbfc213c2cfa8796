//! Everything of Latchkey that is Linux: sockets of IKE and ESP, the TUN device, routes, the kernel's IPsec by XFRM
//! netlink, and the threads of the user-space ESP plane. All `unsafe` is here, and at the C
//! edge of `latch`, each with its reason.

mod addresses;
mod audit;
pub mod interfaces;
mod netlink;
pub mod netns;
pub mod network;
mod plane;
mod planes;
mod routes;
mod shunt_rules;
mod socket;
pub mod tcp;
mod threads;
mod tun;
pub mod users;
mod watch;
mod xfrm;
mod xfrm_interfaces;
