//! `latchkey demo` does what it says, and cleans up after itself also when it is interrupted.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};
use std::time::Duration;

use latchkey_tests::daemon::program;

/// A directory of its own for temporary files, so that what is left behind shows.
fn demo(directory: &std::path::Path) -> Command {
    let mut command = Command::new(program("latchkey"));
    command.arg("demo").env("TMPDIR", directory).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn daemons_in(directory: &std::path::Path) -> usize {
    let marker = format!("SWANCTL_DIR={}", directory.display());
    std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| std::fs::read(entry.path().join("environ")).ok())
        .filter(|environment| String::from_utf8_lossy(environment).contains(&marker))
        .count()
}

#[test]
fn the_demo_passes_and_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let output = demo(directory.path()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    for step in [
        "over UDP",
        "over TCP",
        "The latched connection stays with bob",
        "hijacked",
        "The latched connection stops",
        "steps passed",
    ] {
        assert!(text.contains(step), "{text}");
    }
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "files are left");
    assert_eq!(daemons_in(directory.path()), 0, "daemons are left");
}

#[test]
fn an_interrupted_demo_leaves_nothing() {
    for line in ["", "over UDP"] {
        let directory = tempfile::tempdir().unwrap();
        let mut running = demo(directory.path()).spawn().unwrap();
        let mut lines = BufReader::new(running.stdout.take().unwrap()).lines();
        assert!(lines.any(|said| said.unwrap().contains(line)), "the demo ended without {line:?}");
        let status = Command::new("kill").args(["-s", "INT", &running.id().to_string()]).status().unwrap();
        assert!(status.success());
        let status = running.wait().unwrap();
        assert_eq!(status.code(), Some(130));
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "files are left");
        latchkey_tests::host::wait_for("the daemons end", Duration::from_secs(30), || {
            daemons_in(directory.path()) == 0
        });
    }
}
