//! `latchkeyd`, the IKEv2 daemon.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use latchkey::commands::{DaemonArguments, daemon, report};

/// The Latchkey IKEv2 daemon: swanctl.conf, VICI, TCP encapsulation, connection latching.
///
/// Runs in the foreground; says when it is ready on standard output and to systemd. SIGHUP reads swanctl.conf again,
/// SIGTERM deletes all SAs and leaves nothing behind.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(flatten)]
    daemon: DaemonArguments,
}

fn main() -> ExitCode {
    report("latchkeyd", daemon(Arguments::parse().daemon))
}
