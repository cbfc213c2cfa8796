//! VICI, strongSwan's control interface: its wire format, a server that answers Debian's unmodified `swanctl`,
//! and a small client.

pub mod client;
pub mod codec;
mod commands;
mod events;
pub mod report;
pub mod server;
pub mod store;

use std::path::PathBuf;
use std::str::FromStr;

pub use self::server::{ServerHandle, serve};
pub use self::store::Store;

/// Where charon's socket is by default.
pub const DEFAULT_URI: &str = "unix:///var/run/charon.vici";

/// A VICI socket's address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Uri {
    /// `unix:///path`.
    Unix(PathBuf),
    /// `tcp://host:port`, as `host:port`.
    Tcp(String),
}

/// A text is not a VICI socket's address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is not a VICI address; write unix:///path or tcp://host:port")]
pub struct UriError(pub String);

impl FromStr for Uri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Self, UriError> {
        if let Some(path) = text.strip_prefix("unix://").filter(|path| path.starts_with('/')) {
            return Ok(Self::Unix(PathBuf::from(path)));
        }
        match text.strip_prefix("tcp://") {
            Some(address) if address.contains(':') => Ok(Self::Tcp(address.to_owned())),
            _ => Err(UriError(text.to_owned())),
        }
    }
}
