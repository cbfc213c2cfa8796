//! Programs that a test types to, and whose words it waits for.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::host::wait_for;

const PATIENCE: Duration = Duration::from_secs(30);

/// A running program; what it says goes to files. Killed on drop.
pub struct Talker {
    process: Child,
    output: PathBuf,
    errors: PathBuf,
}

impl Talker {
    /// Starts a program; its output goes to this path with `.out` and `.err` added.
    pub fn start(mut command: Command, path: PathBuf) -> Self {
        let (output, errors) = (path.with_extension("out"), path.with_extension("err"));
        let process = command
            .stdin(Stdio::piped())
            .stdout(fs::File::create(&output).unwrap())
            .stderr(fs::File::create(&errors).unwrap())
            .spawn()
            .unwrap();
        Self { process, output, errors }
    }

    /// Writes to its standard input.
    pub fn types(&mut self, text: &str) {
        let input = self.process.stdin.as_mut().unwrap();
        // One that has ended takes nothing more.
        let _ = input.write_all(text.as_bytes()).and_then(|()| input.flush());
    }

    /// Waits until it has written this to its standard output.
    pub fn prints(&self, what: &str) {
        self.waits(&self.output, what);
    }

    /// Waits until it has written this to its standard error.
    pub fn tells(&self, what: &str) {
        self.waits(&self.errors, what);
    }

    /// What it has written to its standard output.
    pub fn output(&self) -> String {
        fs::read_to_string(&self.output).unwrap()
    }

    /// What it has written to its standard error.
    pub fn errors(&self) -> String {
        fs::read_to_string(&self.errors).unwrap()
    }

    fn waits(&self, path: &Path, what: &str) {
        let started = Instant::now();
        while !fs::read_to_string(path).unwrap().contains(what) {
            let said = format!("{}{}", self.output(), self.errors());
            assert!(started.elapsed() < PATIENCE, "it does not say {what:?} but: {said}");
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits for its end.
    pub fn ends(&mut self) -> ExitStatus {
        let process = &mut self.process;
        let mut status = None;
        wait_for("the end of a program", PATIENCE, || {
            status = process.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }
}

impl Drop for Talker {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
