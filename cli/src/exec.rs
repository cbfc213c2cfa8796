//! `latchkey exec`: latches the connections of an unmodified program, by a library that the loader puts before the C
//! library (`latch/preload`, `docs/exec.md`).

use std::env;
use std::ffi::OsString;
use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};
use clap::{Args, ValueEnum};
use latch::exec::{ENVIRONMENT_DEAD_AFTER, ENVIRONMENT_RULES, ENVIRONMENT_SOCKET, ENVIRONMENT_UNCONFINED, Rules};

use crate::config::daemon::DEFAULT_LATCH_SOCKET;

mod program;

/// What the library is called.
const LIBRARY: &str = "liblatchkey_preload.so";

/// Where it may be, seen from the directory of this program.
const PLACES: [&str; 3] = [".", "../lib/latchkey", "../lib"];

/// Arguments of `exec`.
#[derive(Args)]
pub struct ExecArguments {
    /// The daemon's latch socket.
    #[arg(long, default_value = DEFAULT_LATCH_SOCKET)]
    socket: PathBuf,
    /// A rule, the first that matches counts: `tcp:5432=db.example`, `tcp:10.2.0.0/24:*=*.example`,
    /// `udp:[2001:db8::1]:53=%any`, `listen:4000-4009=a.example`, `tcp:22 pass`, `udp:* refuse`.
    #[arg(long = "rule", value_name = "RULE")]
    rules: Vec<String>,
    /// A file of rules, one a line, after those of --rule; lines that begin with # are comments.
    #[arg(long, value_name = "FILE")]
    rules_file: Option<PathBuf>,
    /// What becomes of connections that no rule is for.
    #[arg(long, default_value = "pass")]
    default: Default,
    /// The library to preload [default: beside this program, ../lib/latchkey or ../lib].
    #[arg(long, value_name = "FILE")]
    library: Option<PathBuf>,
    /// Leave io_uring and privileged programs to the program: ways around the rules that are shut otherwise.
    #[arg(long)]
    unconfined: bool,
    /// Seconds without a sign of life from the other end after which a latched TCP connection fails, unless the program
    /// sets times of its own (SO_KEEPALIVE); 0 leaves it to the system. For when the daemon has died and its second process, which would reset the connection, with it.
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    dead_after: u64,
    /// The program and its arguments.
    #[arg(last = true, required = true, value_name = "PROGRAM")]
    command: Vec<OsString>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Default {
    /// They are as without us.
    Pass,
    /// They fail with EACCES.
    Refuse,
}

/// Becomes the program; comes back only if that fails.
pub fn exec(arguments: &ExecArguments) -> anyhow::Result<()> {
    let rules = rules(arguments)?;
    let [name, rest @ ..] = arguments.command.as_slice() else { bail!("PROGRAM is needed") };
    let path = program::find(name).with_context(|| format!("{} is not there", name.display()))?;
    // Before anything is started: what cannot be hooked would run with connections that nobody latches.
    program::check(&path).with_context(|| format!("{} cannot be latched", path.display()))?;
    let library = library(arguments.library.as_deref())?;
    if !arguments.unconfined {
        // Programs that the system gives privileges drop what is preloaded; now it gives none, and they keep it.
        rustix::thread::set_no_new_privs(true).context("giving up new privileges")?;
    }
    let mut command = Command::new(&path);
    command
        .arg0(name)
        .args(rest)
        .env("LD_PRELOAD", preloaded(&library, env::var_os("LD_PRELOAD"))?)
        .env(ENVIRONMENT_RULES, rules)
        .env(ENVIRONMENT_SOCKET, std::path::absolute(&arguments.socket)?)
        .env_remove(ENVIRONMENT_DEAD_AFTER)
        .env_remove(ENVIRONMENT_UNCONFINED);
    if arguments.dead_after != 0 {
        command.env(ENVIRONMENT_DEAD_AFTER, arguments.dead_after.to_string());
    }
    if arguments.unconfined {
        command.env(ENVIRONMENT_UNCONFINED, "1");
    }
    Err(command.exec()).with_context(|| format!("starting {}", path.display()))
}

fn rules(arguments: &ExecArguments) -> anyhow::Result<String> {
    let mut text = String::new();
    for rule in &arguments.rules {
        Rules::parse(rule)?;
        text += rule;
        text.push('\n');
    }
    if let Some(path) = &arguments.rules_file {
        let file = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        Rules::parse(&file).with_context(|| path.display().to_string())?;
        text += &file;
        text.push('\n');
    }
    if text.trim().is_empty() {
        bail!("there is no rule: --rule or --rules-file is needed");
    }
    text += match arguments.default {
        Default::Pass => "* pass\n",
        Default::Refuse => "* refuse\n",
    };
    Ok(text)
}

fn library(given: Option<&Path>) -> anyhow::Result<PathBuf> {
    let found = match given {
        Some(path) => path.is_file().then(|| path.to_owned()),
        None => {
            let own = env::current_exe().context("finding this program")?;
            let folder = own.parent().unwrap_or(Path::new("/"));
            PLACES.iter().map(|place| folder.join(place).join(LIBRARY)).find(|path| path.is_file())
        }
    };
    let wanted =
        || format!("{LIBRARY} is not there: build it with `cargo build -p latchkey-preload`, or say --library");
    Ok(fs::canonicalize(found.with_context(wanted)?)?)
}

/// Ours first; the loader takes spaces and colons for the end of a name, and does without what it cannot load.
fn preloaded(library: &Path, before: Option<OsString>) -> anyhow::Result<OsString> {
    let text = library.to_string_lossy();
    if text.contains([' ', ':']) {
        bail!("{text}: the loader cannot preload from a path with a space or a colon");
    }
    let mut all = library.as_os_str().to_owned();
    if let Some(before) = before.filter(|before| !before.is_empty()) {
        all.push(":");
        all.push(before);
    }
    Ok(all)
}
