//! Users and groups: who is at the other end of a Unix socket, and which number a name has.

#![allow(unsafe_code, reason = "SO_PEERGROUPS, which no crate has")]

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use nix::libc;
use nix::unistd::{Group, User};

/// The supplementary groups of whoever connected a Unix socket, as they were then. Fails where the socket has no other end, and
/// where the system is too old to say (Linux 4.13).
pub fn groups_of_peer(socket: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    let mut groups: Vec<u32> = vec![0; 32];
    loop {
        let size = size_of_val(groups.as_slice());
        let mut length = libc::socklen_t::try_from(size).unwrap_or(0);
        // SAFETY: the descriptor is open for as long as it is borrowed, and the system writes at most `length` octets.
        let outcome = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut length,
            )
        };
        let told = usize::try_from(length).unwrap_or(0) / size_of::<u32>();
        if outcome == 0 {
            groups.truncate(told);
            return Ok(groups);
        }
        let error = io::Error::last_os_error();
        // The room that it takes has been said: 65536 groups are the most (NGROUPS_MAX).
        if error.raw_os_error() != Some(libc::ERANGE) || told <= groups.len() || told > MOST_GROUPS {
            return Err(error);
        }
        groups.resize(told, 0);
    }
}

/// The number of a user; `None` where there is none of this name.
pub fn user(name: &str) -> io::Result<Option<u32>> {
    Ok(User::from_name(name).map_err(io::Error::from)?.map(|user| user.uid.as_raw()))
}

/// The number of a group; `None` where there is none of this name.
pub fn group(name: &str) -> io::Result<Option<u32>> {
    Ok(Group::from_name(name).map_err(io::Error::from)?.map(|group| group.gid.as_raw()))
}

const MOST_GROUPS: usize = 65_536;

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::os::fd::AsFd as _;
    use std::os::unix::net::UnixStream;
    use std::process::Command;

    use super::*;

    #[test]
    fn the_groups_of_the_other_end_are_those_of_its_process() {
        let (near, _far) = UnixStream::pair().unwrap();
        let mut told = groups_of_peer(near.as_fd()).unwrap();
        let own = String::from_utf8(Command::new("id").arg("-G").output().unwrap().stdout).unwrap();
        let mut own: Vec<u32> = own.split_whitespace().map(|group| group.parse().unwrap()).collect();
        // `id` adds the primary one, which may be no supplementary one.
        own.retain(|group| told.contains(group) || *group != nix::unistd::getgid().as_raw());
        told.sort_unstable();
        own.sort_unstable();
        assert_eq!(told, own);
        let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        assert!(groups_of_peer(udp.as_fd()).is_err());
    }

    #[test]
    fn names_have_numbers() {
        assert_eq!((user("root").unwrap(), group("root").unwrap()), (Some(0), Some(0)));
        assert_eq!((user("nobody here").unwrap(), group("nobody here").unwrap()), (None, None));
    }
}
