//! The shape of the house: what each room may not know (docs/architecture.md).

#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::Path;
use std::process::Command;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// Names of all packages that a package is built from.
fn built_from(package: &str) -> Vec<String> {
    let output = Command::new(env!("CARGO"))
        .args(["tree", "--offline", "--locked", "-p", package, "-e", "normal", "--prefix", "none", "--format", "{p}"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().filter_map(|line| Some(line.split(' ').next()?.to_owned())).collect()
}

#[test]
fn protocol_rooms_know_no_io() {
    for package in ["latchkey-ipsec", "latchkey-pad", "latchkey-ike"] {
        let packages = built_from(package);
        for banned in ["tokio", "mio", "socket2", "rustix", "nix", "quinn-udp", "tun-rs", "latchkey-kernel"] {
            assert!(!packages.iter().any(|name| name == banned), "{package} is built from {banned}");
        }
    }
}

#[test]
fn arrows_point_one_way() {
    let banned = [
        ("latchkey-ipsec", &["latchkey-pad", "latchkey-ike", "latchkey-latch", "latchkey-espintcp"][..]),
        ("latchkey-pad", &["latchkey-ike", "latchkey-latch", "latchkey-espintcp"]),
        ("latchkey-ike", &["latchkey-latch", "latchkey-espintcp", "latchkey-kernel"]),
        ("latchkey-latch", &["latchkey-ike", "latchkey-espintcp", "latchkey-kernel"]),
        ("latchkey-kernel", &["latchkey-pad", "latchkey-ike", "latchkey-latch", "latchkey-espintcp"]),
        ("latchkey-espintcp", &["latchkey-ipsec", "latchkey-pad", "latchkey-ike", "latchkey-latch"]),
    ];
    for (package, others) in banned {
        let packages = built_from(package);
        for other in others {
            assert!(!packages.iter().any(|name| name == other), "{package} is built from {other}");
        }
    }
}

#[test]
fn unsafe_lives_in_kernel_and_at_the_c_edge() {
    for room in ["ipsec", "pad", "ike", "espintcp", "latch", "cli"] {
        let library = std::fs::read_to_string(root().join(room).join("src/lib.rs")).unwrap();
        assert!(library.contains("#![forbid(unsafe_code)]"), "{room} does not forbid unsafe code");
    }
}
