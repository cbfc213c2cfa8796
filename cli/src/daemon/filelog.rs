//! `charon.filelog`: log files as charon writes them, so that today's log watchers keep working.

use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Write as _};
use std::time::{SystemTime, UNIX_EPOCH};

use ike::engine::IkeSaId;

use crate::config::daemon::FileLog;

/// The open log files.
#[derive(Default)]
pub(super) struct FileLogs {
    files: Vec<(FileLog, Sink)>,
}

enum Sink {
    File(BufWriter<File>),
    Stdout,
    Stderr,
}

impl FileLogs {
    /// Opens all files; one that cannot be opened is reported and left out, as a log must not stop the daemon.
    pub(super) fn open(configs: Vec<FileLog>) -> Self {
        let mut files = Vec::new();
        for config in configs {
            let sink = match config.path.to_str() {
                Some("stdout") => Sink::Stdout,
                Some("stderr") => Sink::Stderr,
                _ => {
                    let opened = OpenOptions::new()
                        .create(true)
                        .write(true)
                        .append(config.append)
                        .truncate(!config.append)
                        .open(&config.path);
                    match opened {
                        Ok(file) => Sink::File(BufWriter::new(file)),
                        Err(error) => {
                            tracing::error!(path = %config.path.display(), %error, "the log file cannot be opened");
                            continue;
                        }
                    }
                }
            };
            files.push((config, sink));
        }
        Self { files }
    }

    /// Writes a line to each file whose level admits it.
    pub(super) fn write(&mut self, group: &str, level: i8, ike_sa: Option<&(IkeSaId, String)>, message: &str) {
        for (config, sink) in &mut self.files {
            if level > config.level(group) {
                continue;
            }
            let mut line = String::new();
            if config.time_format.is_some() {
                let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs());
                line.push_str(&format!("{now} "));
            }
            line.push_str(&format!("00[{group}] "));
            if config.ike_name
                && let Some((id, connection)) = ike_sa
            {
                line.push_str(&format!("<{connection}|{}> ", id.0));
            }
            line.push_str(message);
            line.push('\n');
            let written = match sink {
                Sink::File(file) => {
                    let flush = config.flush_line;
                    file.write_all(line.as_bytes()).and_then(|()| if flush { file.flush() } else { Ok(()) })
                }
                Sink::Stdout => std::io::stdout().write_all(line.as_bytes()),
                Sink::Stderr => std::io::stderr().write_all(line.as_bytes()),
            };
            if let Err(error) = written {
                // The journal still has the line.
                tracing::debug!(path = %config.path.display(), %error, "writing to the log file failed");
            }
        }
    }
}
