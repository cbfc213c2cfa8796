//! What survives a restart: files in the daemon's state directory, for root alone.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use ipsec::secret::Secret;

/// Octets of the secret for quick crash detection (RFC 6290 §5.1).
const SECRET_LENGTH: usize = 32;

/// The secret for quick crash detection; made at the first start.
///
/// # Errors
/// Those of the file system; `InvalidData` for a file that is not ours to use: of another length, or readable for
/// others.
pub(super) fn crash_secret(directory: &Path, fill: impl FnOnce(&mut [u8])) -> io::Result<Secret> {
    DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let path = directory.join("qcd.secret");
    let mut octets = vec![0; SECRET_LENGTH];
    match OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path) {
        Ok(mut file) => {
            fill(&mut octets);
            file.write_all(&octets).and_then(|()| file.sync_all()).inspect_err(|_| {
                // Half a secret would be refused at each start from now on.
                let _ = fs::remove_file(&path);
            })?;
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let mut file = OpenOptions::new().read(true).open(&path)?;
            let metadata = file.metadata()?;
            let invalid = |reason: &str| io::Error::new(io::ErrorKind::InvalidData, reason.to_owned());
            if metadata.mode() & 0o077 != 0 {
                return Err(invalid("others may read or write it; remove it, or chmod 600"));
            }
            if metadata.len() != SECRET_LENGTH as u64 {
                return Err(invalid("it does not have 32 octets; remove it"));
            }
            file.read_exact(&mut octets)?;
        }
        Err(error) => return Err(error),
    }
    Ok(Secret::new(octets))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    // RFC 6290 §5.1, §9.1: the secret stays the same, and is nobody else's.
    #[test]
    fn the_secret_survives_and_is_private() {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("state");
        let first = crash_secret(&state, |octets| octets.fill(7)).unwrap();
        assert_eq!(first.expose(), [7; 32]);
        let path = state.join("qcd.secret");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(&state).unwrap().mode() & 0o777, 0o700);
        let again = crash_secret(&state, |octets| octets.fill(9)).unwrap();
        assert!(again.matches(first.expose()));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        assert_eq!(crash_secret(&state, |_| ()).unwrap_err().kind(), io::ErrorKind::InvalidData);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&path, [1; 31]).unwrap();
        assert_eq!(crash_secret(&state, |_| ()).unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
