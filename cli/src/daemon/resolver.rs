//! `charon.plugins.resolve.file`: name servers that peers give, as lines of their own at the top of a resolver's file.
//!
//! Each line bears a mark. Nothing else in the file is touched, and lines that a daemon which died left are removed.

use std::fs;
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use ike::engine::IkeSaId;

const MARK: &str = "   # by Latchkey, from ";

/// The file, and whose servers are in it.
pub(super) struct Resolver {
    file: PathBuf,
    /// In the order in which they came; the newest are asked first.
    servers: Vec<(IkeSaId, IpAddr, String)>,
}

impl Resolver {
    /// Takes a file over: what a predecessor left in it goes.
    pub(super) fn new(file: PathBuf) -> Self {
        let resolver = Self { file, servers: Vec::new() };
        resolver.write();
        resolver
    }

    /// Adds the servers of an IKE SA in place of those that it had.
    pub(super) fn add(&mut self, ike_sa: IkeSaId, servers: &[IpAddr], peer: &str) {
        self.servers.retain(|(owner, ..)| *owner != ike_sa);
        // A peer's identity may have anything in it.
        let peer: String = peer.chars().filter(|character| character.is_ascii_graphic() || *character == ' ').collect();
        self.servers.extend(servers.iter().map(|server| (ike_sa, *server, peer.clone())));
        self.write();
    }

    pub(super) fn rename(&mut self, old: IkeSaId, new: IkeSaId) {
        for (owner, ..) in self.servers.iter_mut().filter(|(owner, ..)| *owner == old) {
            *owner = new;
        }
    }

    /// Removes the servers of an IKE SA.
    pub(super) fn remove(&mut self, ike_sa: IkeSaId) {
        let before = self.servers.len();
        self.servers.retain(|(owner, ..)| *owner != ike_sa);
        if self.servers.len() != before {
            self.write();
        }
    }

    fn write(&self) {
        if let Err(error) = self.rewrite() {
            let file = self.file.display();
            tracing::error!(%file, %error, "name servers could not be written");
        }
    }

    fn rewrite(&self) -> io::Result<()> {
        let there = match fs::read(&self.file) {
            Ok(there) => there,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if self.servers.is_empty() {
                    return Ok(());
                }
                Vec::new()
            }
            Err(error) => return Err(error),
        };
        let mut wanted = Vec::new();
        let mut named = Vec::new();
        for (_, server, peer) in self.servers.iter().rev() {
            if !named.contains(server) {
                named.push(*server);
                writeln!(wanted, "nameserver {server}{MARK}{peer}")?;
            }
        }
        for line in there.split_inclusive(|octet| *octet == b'\n') {
            if !is_marked(line) {
                wanted.extend_from_slice(line);
            }
        }
        if wanted == there { Ok(()) } else { replace(&self.file, &wanted) }
    }
}

fn is_marked(line: &[u8]) -> bool {
    line.starts_with(b"nameserver ") && line.windows(MARK.len()).any(|window| window == MARK.as_bytes())
}

/// Whole or not at all, where the folder lets us; behind a symbolic link, with the file's own mode.
fn replace(file: &Path, contents: &[u8]) -> io::Result<()> {
    let target = fs::canonicalize(file).unwrap_or_else(|_| file.to_owned());
    let renamed = (|| {
        let folder = target.parent().ok_or(io::ErrorKind::InvalidInput)?;
        let mut fresh = tempfile::NamedTempFile::new_in(folder)?;
        fresh.write_all(contents)?;
        let permissions = match fs::metadata(&target) {
            Ok(metadata) => metadata.permissions(),
            Err(_) => std::os::unix::fs::PermissionsExt::from_mode(0o644),
        };
        fresh.as_file().set_permissions(permissions)?;
        fresh.persist(&target).map_err(|error| error.error)?;
        Ok::<(), io::Error>(())
    })();
    // A file that is mounted, as in containers, cannot be renamed over.
    renamed.or_else(|_| fs::write(&target, contents))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    const BEFORE: &str = "# mine\nnameserver 192.0.2.53\nsearch example.com\noptions trust-ad";

    fn fixture(contents: &str) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("resolv.conf");
        fs::write(&file, contents).unwrap();
        (folder, file)
    }

    fn text(file: &Path) -> String {
        fs::read_to_string(file).unwrap()
    }

    #[test]
    fn lines_come_and_go_and_the_rest_stays_octet_for_octet() {
        let (_folder, file) = fixture(BEFORE);
        fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
        let mut resolver = Resolver::new(file.clone());
        assert_eq!(text(&file), BEFORE);
        resolver.add(IkeSaId(1), &[ip("10.2.0.53"), ip("fd02::53")], "gw\nnameserver 6.6.6.6");
        let one = "nameserver fd02::53   # by Latchkey, from gwnameserver 6.6.6.6\n\
                   nameserver 10.2.0.53   # by Latchkey, from gwnameserver 6.6.6.6\n";
        assert_eq!(text(&file), format!("{one}{BEFORE}"));
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o640);
        resolver.add(IkeSaId(2), &[ip("10.2.0.53"), ip("10.4.0.53")], "b");
        assert_eq!(text(&file).matches("10.2.0.53").count(), 1);
        resolver.rename(IkeSaId(1), IkeSaId(3));
        resolver.remove(IkeSaId(1));
        resolver.remove(IkeSaId(2));
        assert_eq!(text(&file), format!("{one}{BEFORE}"));
        // What somebody else writes meanwhile is kept.
        fs::write(&file, format!("{}\nnameserver 198.51.100.1\n", text(&file))).unwrap();
        resolver.remove(IkeSaId(3));
        assert_eq!(text(&file), format!("{BEFORE}\nnameserver 198.51.100.1\n"));
    }

    #[test]
    fn what_a_daemon_that_died_left_is_removed() {
        let (_folder, file) = fixture(BEFORE);
        Resolver::new(file.clone()).add(IkeSaId(1), &[ip("10.2.0.53")], "gw");
        assert_ne!(text(&file), BEFORE);
        Resolver::new(file.clone());
        assert_eq!(text(&file), BEFORE);
    }

    #[test]
    fn a_symbolic_link_stays_one_and_a_missing_file_is_made() {
        let (folder, file) = fixture(BEFORE);
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        Resolver::new(link.clone()).add(IkeSaId(1), &[ip("10.2.0.53")], "gw");
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink() && text(&file).starts_with("nameserver 10.2.0.53"));
        let missing = folder.path().join("missing");
        let mut resolver = Resolver::new(missing.clone());
        assert!(!missing.exists());
        resolver.add(IkeSaId(1), &[ip("10.2.0.53")], "gw");
        assert!(text(&missing).starts_with("nameserver 10.2.0.53"));
    }
}
