//! What the two programs do, by subcommand.

use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::mpsc;

use anyhow::{Context as _, bail};
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use crate::config::daemon::{self as settings, DEFAULT_LATCH_SOCKET};
use crate::config::{Severity, load};
use crate::daemon::{self, DaemonOptions};
use crate::demo;
use crate::latches;

/// Arguments of the daemon.
#[derive(Args)]
pub struct DaemonArguments {
    /// Directory of swanctl.conf and its certificates and keys [default: $SWANCTL_DIR, then /etc/swanctl].
    #[arg(long)]
    swanctl_dir: Option<PathBuf>,
    /// strongswan.conf [default: $STRONGSWAN_CONF, then /etc/strongswan.conf].
    #[arg(long)]
    strongswan_conf: Option<PathBuf>,
    /// End when standard input does.
    #[arg(long, hide = true)]
    until_stdin_closes: bool,
    /// Only disconnect latched sockets, which come by standard input, when that ends.
    #[arg(long, hide = true)]
    survive: bool,
}

/// Arguments of `check`.
#[derive(Args)]
pub struct CheckArguments {
    /// Directory of swanctl.conf and its certificates and keys [default: $SWANCTL_DIR, then /etc/swanctl].
    #[arg(long)]
    swanctl_dir: Option<PathBuf>,
    /// strongswan.conf [default: $STRONGSWAN_CONF, then /etc/strongswan.conf].
    #[arg(long)]
    strongswan_conf: Option<PathBuf>,
    /// Say which latches of the running daemon would break if this were loaded; its latch socket.
    #[arg(long, value_name = "SOCKET", num_args = 0..=1, default_missing_value = DEFAULT_LATCH_SOCKET)]
    latches: Option<PathBuf>,
}

/// Says an error with all of its causes in one line, and gives the exit status.
pub fn report(program: &str, outcome: anyhow::Result<()>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let mut causes: Vec<String> = Vec::new();
            for cause in error.chain() {
                let text = cause.to_string();
                // Some errors repeat what caused them.
                if causes.last().is_none_or(|last| !last.ends_with(&text)) {
                    causes.push(text);
                }
            }
            eprintln!("{program}: {}", causes.join(": "));
            ExitCode::FAILURE
        }
    }
}

/// Runs the daemon. `RUST_LOG` sets what it logs.
pub fn daemon(arguments: DaemonArguments) -> anyhow::Result<()> {
    log_to_stderr("info");
    if arguments.survive {
        return daemon::survive();
    }
    runtime()?.block_on(daemon::run(DaemonOptions {
        swanctl_dir: arguments.swanctl_dir,
        strongswan_conf: arguments.strongswan_conf,
        until_stdin_closes: arguments.until_stdin_closes,
    }))
}

/// Checks a configuration; fails if anything in it is refused.
pub fn check(arguments: &CheckArguments) -> anyhow::Result<()> {
    let folder = arguments.swanctl_dir.clone().unwrap_or_else(load::default_folder);
    let loaded = load::load(&folder);
    let of_daemon = arguments.strongswan_conf.clone().unwrap_or_else(settings::default_path);
    let settings = settings::load(&of_daemon)?;
    let mut refused = 0;
    for report in settings.reports.iter().chain(&loaded.reports) {
        match report.severity {
            Severity::Debug => continue,
            Severity::Warning => println!("warning: {report}"),
            Severity::Error => {
                refused += 1;
                println!("error: {report}");
            }
        }
    }
    if refused > 0 {
        bail!("{} and {} have {refused} errors", of_daemon.display(), folder.display());
    }
    let names: Vec<_> = loaded.configured.connections.iter().map(|known| known.connection.name.as_str()).collect();
    println!("{} connections: {}", names.len(), names.join(", "));
    let Some(socket) = arguments.latches.clone() else { return Ok(()) };
    talk(async {
        let broken = latches::preview(socket, &loaded.configured.connections).await?;
        println!("{broken} latches would break");
        Ok(())
    })
}

/// Runs a command that talks to the daemon.
pub fn talk(talk: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    runtime()?.block_on(talk)
}

/// Runs the demo; an interrupt ends it, and its daemons with it.
pub fn demo() -> anyhow::Result<()> {
    log_to_stderr("error");
    if !rustix::process::geteuid().is_root() {
        // Before any other thread exists: a user namespace is the whole process's.
        kernel::netns::become_root_inside().context("the demo needs root, or user namespaces")?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // Before there is anything that an interrupt could leave behind.
    let (mut interrupt, mut terminate) = {
        let _inside = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    let directory = tempfile::Builder::new().prefix("latchkey-demo").tempdir()?;
    let path = directory.path().to_owned();
    let (finished, outcome) = mpsc::channel();
    std::thread::spawn(move || {
        // The receiver is gone only when the process is about to be.
        let _ = finished.send(demo::run(&path));
    });
    runtime.block_on(async move {
        let outcome = tokio::task::spawn_blocking(move || outcome.recv());
        tokio::select! {
            outcome = outcome => outcome?.context("the demo broke off")?,
            _ = interrupt.recv() => interrupted(directory),
            _ = terminate.recv() => interrupted(directory),
        }
    })
}

/// The daemons end with this process, whose end of their standard input closes; namespaces end with them.
fn interrupted(directory: tempfile::TempDir) -> ! {
    drop(directory);
    eprintln!("interrupted");
    std::process::exit(130)
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_multi_thread().enable_all().build()?)
}

fn log_to_stderr(default: &str) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
}
