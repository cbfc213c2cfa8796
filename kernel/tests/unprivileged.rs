//! An ordinary user can build networks where the system allows user namespaces. Has a `main` of its own, because
//! only a process with one thread can enter a user namespace. Started by root, it becomes nobody first.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panic")]

use std::net::UdpSocket;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use latchkey_kernel::netns::{Namespace, become_root_inside, veth};

const NOBODY: u32 = 65534;

fn main() {
    if rustix::process::geteuid().is_root() {
        // The folder of the build may be closed to others; the copy is open.
        let folder = std::env::temp_dir().join(format!("kernel-unprivileged-{}", std::process::id()));
        std::fs::create_dir(&folder).unwrap();
        let copy = folder.join("test");
        std::fs::copy(std::env::current_exe().unwrap(), &copy).unwrap();
        let status = Command::new(&copy).uid(NOBODY).gid(NOBODY).current_dir("/").status();
        std::fs::remove_dir_all(&folder).unwrap();
        assert!(status.unwrap().success(), "failed as nobody");
        return;
    }
    become_root_inside().expect("this test needs user namespaces for ordinary users");
    let (a, b) = (Namespace::new().unwrap(), Namespace::new().unwrap());
    veth(&a, "eth0", &b, "eth0").unwrap();
    a.add_address("eth0", [10, 7, 0, 1].into(), 24).unwrap();
    b.add_address("eth0", [10, 7, 0, 2].into(), 24).unwrap();
    let server = b.run(|| UdpSocket::bind("10.7.0.2:0")).unwrap().unwrap();
    server.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    let client = a.run(|| UdpSocket::bind("10.7.0.1:0")).unwrap().unwrap();
    client.send_to(b"x", server.local_addr().unwrap()).unwrap();
    assert_eq!(server.recv(&mut [0; 8]).expect("a datagram"), 1);
    println!("an ordinary user can build networks ... ok");
}
