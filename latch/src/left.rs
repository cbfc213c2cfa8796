//! What a daemon that has stopped, or was killed, left of the system's barriers. The next one looks after it; without one
//! somebody has to say when.

use std::io;

use ipsec::guard::{FlowBarrier, Port};
use ipsec::selector::Flow;

use crate::connections;

/// How many barriers, of flows and of ports, are gone and are still there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Left {
    /// No socket was left that they could be about.
    pub lifted: usize,
    /// A socket has the flow's local port, or the port: what it says and hears may be what was latched.
    pub in_use: usize,
}

/// Takes away those of the calling thread's network namespace that no socket is for any more.
pub fn lift(barrier: &dyn FlowBarrier) -> io::Result<Left> {
    let sockets = connections::all()?;
    let is_used = |port: &Port| sockets.keys().any(|socket| port.meets(socket));
    let mut left = Left::default();
    let mut count = |used: bool| {
        if used {
            left.in_use += 1;
        } else {
            left.lifted += 1;
        }
        !used
    };
    for flow in barrier.abandoned() {
        let Flow { protocol, local, local_port: number, .. } = flow;
        if count(is_used(&Port { protocol, local, number })) {
            barrier.lift(&flow);
        }
    }
    for port in barrier.abandoned_ports() {
        if count(is_used(&port)) {
            barrier.lift_port(&port);
        }
    }
    Ok(left)
}
