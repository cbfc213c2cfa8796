//! `latchkey`: control, tools and the demo.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use latchkey::commands::{self, CheckArguments, DaemonArguments};
use latchkey::exec::{self, ExecArguments};
use latchkey::latches::{self, LatchArguments, LatchesArguments, LiftArguments, NetcatArguments, WhoisArguments};

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
    /// Read swanctl.conf, the files beside it and strongswan.conf, say what is wrong with them and which latches the
    /// connections would break, and put nothing in force.
    Check(CheckArguments),
    /// List the latches of the running daemon, and watch them.
    Latches(LatchesArguments),
    /// Show, break or close one latch.
    Latch(LatchArguments),
    /// After the daemon's end: remove the kernel's policies of latched flows and ports that no socket is for any more.
    ///
    /// They outlive the daemon, so that nothing latched goes on in clear. The next daemon does the same by itself.
    Lift(LiftArguments),
    /// Move standard input and output over a TCP connection that is latched to an IPsec peer.
    Nc(NetcatArguments),
    /// Run a program with its connections latched as rules say, though it knows nothing of latches.
    ///
    /// A rule's connection is to that peer, or fails before a packet leaves; standard error says why. What this cannot
    /// do is in docs/exec.md.
    Exec(ExecArguments),
    /// Say who is at the other end of a flow through the tunnel, as IKE proved it.
    Whois(WhoisArguments),
    /// Run the daemon (as `latchkeyd` does).
    Daemon(DaemonArguments),
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Command::Demo => commands::demo(),
        Command::Check(arguments) => commands::check(&arguments),
        Command::Latches(arguments) => commands::talk(latches::latches(&arguments)),
        Command::Latch(arguments) => commands::talk(latches::latch(&arguments)),
        Command::Lift(arguments) => commands::talk(latches::lift(&arguments)),
        Command::Nc(arguments) => commands::talk(latches::netcat(&arguments)),
        Command::Exec(arguments) => exec::exec(&arguments),
        Command::Whois(arguments) => commands::talk(latches::whois(&arguments)),
        Command::Daemon(arguments) => commands::daemon(arguments),
    };
    commands::report("latchkey", outcome)
}
