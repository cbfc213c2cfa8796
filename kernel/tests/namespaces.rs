//! Network namespaces. Needs root (CAP_SYS_ADMIN and CAP_NET_ADMIN) and /dev/net/tun.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "helpers of tests fail by panic")]

use std::io;
use std::net::{IpAddr, UdpSocket};
use std::time::Duration;

use latchkey_kernel::netns::{Namespace, Sandbox, veth};

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// a (10.9.1.1) and b (10.9.2.1) with a router between them.
fn line() -> (Namespace, Namespace, Namespace) {
    let make = || Namespace::new().expect("these tests make network namespaces: run them as root");
    let (a, router, b) = (make(), make(), make());
    veth(&a, "eth0", &router, "to-a").unwrap();
    veth(&b, "eth0", &router, "to-b").unwrap();
    a.add_address("eth0", address("10.9.1.1"), 24).unwrap();
    router.add_address("to-a", address("10.9.1.2"), 24).unwrap();
    router.add_address("to-b", address("10.9.2.2"), 24).unwrap();
    b.add_address("eth0", address("10.9.2.1"), 24).unwrap();
    a.add_route(address("0.0.0.0"), 0, address("10.9.1.2")).unwrap();
    b.add_route(address("0.0.0.0"), 0, address("10.9.2.2")).unwrap();
    router.forward().unwrap();
    (a, router, b)
}

fn socket(namespace: &Namespace, local: &str) -> UdpSocket {
    let socket = namespace.run(|| UdpSocket::bind(local)).unwrap().unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    socket
}

/// Sends one datagram; the result says whether it arrived. Sending must not fail.
fn arrives(from: &UdpSocket, to: &UdpSocket) -> bool {
    from.send_to(b"probe", to.local_addr().unwrap()).expect("a sender must not notice");
    match to.recv_from(&mut [0; 16]) {
        Ok((length, _)) => length == 5,
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => false,
        Err(e) => panic!("{e}"),
    }
}

#[test]
fn bad_names_are_refused() {
    for name in ["", ".", "..", "a/b"] {
        assert!(Namespace::named(name).is_err(), "{name:?}");
    }
}

#[test]
fn udp_is_lost_silently_when_a_router_blocks_it() {
    let (a, router, b) = line();
    let (here, there) = (socket(&a, "10.9.1.1:0"), socket(&b, "10.9.2.1:0"));
    assert!(arrives(&here, &there));

    router.block_udp(true).unwrap();
    for _ in 0..2 {
        assert!(!arrives(&here, &there));
        assert!(!arrives(&there, &here));
    }
    assert!(here.take_error().unwrap().is_none());

    router.block_udp(false).unwrap();
    assert!(arrives(&here, &there));
    assert!(arrives(&there, &here));
    assert_eq!(router.routes(0x6c6b).unwrap(), []);
    assert!(!router.has_link("lk-sink").unwrap());
}

#[test]
fn udp_is_lost_silently_when_the_sender_itself_blocks_it() {
    let (a, _router, b) = line();
    let (here, there) = (socket(&a, "10.9.1.1:0"), socket(&b, "10.9.2.1:0"));
    a.block_udp(true).unwrap();
    for _ in 0..4 {
        assert!(!arrives(&here, &there));
    }
    a.block_udp(false).unwrap();
    assert!(arrives(&here, &there));
    assert_eq!(a.rule_priorities().unwrap().iter().filter(|priority| **priority == 1).count(), 0);
}

#[test]
fn tcp_passes_where_udp_is_blocked() {
    let (a, router, b) = line();
    router.block_udp(true).unwrap();
    let listener = b.run(|| std::net::TcpListener::bind("10.9.2.1:0")).unwrap().unwrap();
    let to = listener.local_addr().unwrap();
    a.run(|| std::net::TcpStream::connect_timeout(&to, Duration::from_secs(2))).unwrap().unwrap();
}

#[test]
fn commands_see_the_files_of_their_sandbox_only() {
    let namespace = Namespace::new().expect("run as root");
    let own = std::env::temp_dir().join(format!("kernel-sandbox-{}", std::process::id()));
    std::fs::create_dir_all(&own).unwrap();
    let sandbox = Sandbox::new(&namespace).empty("/mnt").bind(&own, "/run");

    let output = sandbox.command("/bin/sh").args(["-c", "echo mine > /run/file; ls /mnt | wc -l"]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "0");
    let output = sandbox.command("/bin/cat").arg("/run/file").output().unwrap();
    assert_eq!(output.stdout, b"mine\n", "a second command of the sandbox sees the same /run");
    assert!(!std::path::Path::new("/run/file").exists(), "the host does not");

    std::fs::remove_dir_all(&own).unwrap();
}

#[test]
fn commands_run_inside_the_namespace() {
    let namespace = Namespace::new().expect("run as root");
    let output = namespace.command("/bin/cat").arg("/proc/net/dev").output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let links: Vec<_> = text.lines().filter_map(|line| line.trim().split_once(':')).map(|(name, _)| name).collect();
    assert_eq!(links, ["lo"]);
}

#[test]
fn a_name_is_freed_with_the_namespace() {
    let name = format!("kernel-test-{}", std::process::id());
    let path = std::path::Path::new("/run/netns").join(&name);
    let namespace = Namespace::named(&name).expect("run as root");
    assert!(Namespace::named(&name).is_err(), "a name in use is refused");
    let inside = namespace.run(|| std::fs::read_link("/proc/thread-self/ns/net")).unwrap().unwrap();
    assert_ne!(inside, std::fs::read_link("/proc/thread-self/ns/net").unwrap());
    drop(namespace);
    assert!(!path.exists());
}
