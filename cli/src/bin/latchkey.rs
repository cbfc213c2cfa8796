//! `latchkey`: control, tools and the demo.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use latchkey::commands::{self, CheckArguments, DaemonArguments, LatchArguments, WhoisArguments};

/// Latchkey: IKEv2 over UDP and TCP, and connections that are pinned to the IPsec peer.
///
/// The daemon is `latchkeyd`; strongSwan's `swanctl` controls it. This program has what swanctl has not.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Show the main job on this machine: a tunnel over UDP, over TCP, and a latched connection that an impostor
    /// cannot take over. Needs root, or a system that allows user namespaces. Changes nothing outside namespaces of
    /// its own.
    Demo,
    /// Read swanctl.conf and the files beside it, say what is wrong with them, and put nothing in force.
    Check(CheckArguments),
    /// List the latches of the running daemon.
    Latches(LatchArguments),
    /// Say who is at the other end of a flow through the tunnel, as IKE proved it.
    Whois(WhoisArguments),
    /// Run the daemon (as `latchkeyd` does).
    Daemon(DaemonArguments),
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Command::Demo => commands::demo(),
        Command::Check(arguments) => commands::check(&arguments),
        Command::Latches(arguments) => commands::latches(&arguments),
        Command::Whois(arguments) => commands::whois(&arguments),
        Command::Daemon(arguments) => commands::daemon(arguments),
    };
    commands::report("latchkey", outcome)
}
