//! ESP in TCP streams by the kernel (RFC 9329, Linux `espintcp`). Debian's UML kernel is built without it, so these tests are
//! ignored there. `tests/guest/build` makes one that has it, from Debian's source:
//! `LATCHKEY_UML=$PWD/target/guest/linux cargo test -p latchkey-tests --test kernel streams:: -- --ignored`.

use std::time::Duration;

use latchkey_tests::capture::Capture;
use latchkey_tests::daemon::Kind::{Latchkey, LatchkeyKernel};
use latchkey_tests::host::{Host, wait_for};
use latchkey_tests::scene::{INNER_A, INNER_B, Scene, Suite};
use latchkey_tests::uml::in_guest;

use crate::start;

fn in_streams(host: &Host) -> usize {
    host.check("ip", &["xfrm", "state"]).matches("encap type espintcp").count()
}

fn rekeyed(scene: &Scene) {
    for daemon in [&scene.a, &scene.b] {
        daemon.control(&["--rekey", "--ike", "site"]);
        wait_for("a new IKE SA", Duration::from_secs(20), || daemon.established() == 1);
        let before = daemon.child_spis("INSTALLED");
        daemon.control(&["--rekey", "--child", "net"]);
        wait_for("a new SPI", Duration::from_secs(20), || {
            let now = daemon.child_spis("INSTALLED");
            now.len() == 1 && now != before
        });
    }
}

// RFC 9329 §3, §6.1: each of the ends in the kernel, and against our own user space; SAs are rekeyed, the stream is lost and
// opened again.
#[test]
#[ignore = "needs a kernel with espintcp: tests/guest/build, then LATCHKEY_UML=$PWD/target/guest/linux"]
fn the_kernel_takes_esp_from_streams() {
    in_guest(|| {
        for (initiator, responder) in
            [(LatchkeyKernel, LatchkeyKernel), (LatchkeyKernel, Latchkey), (Latchkey, LatchkeyKernel)]
        {
            let scene = start(initiator, responder, &Suite { connection: "tcp = yes\n", ..Suite::default() });
            let device = scene.host_a.check("ip", &["-o", "link", "show", "type", "veth"]);
            let device = device.split_whitespace().nth(1).unwrap().split('@').next().unwrap().to_owned();
            let mut capture = Capture::start(&scene.host_a, &device);
            let ends = [(initiator, &scene.a, &scene.host_a), (responder, &scene.b, &scene.host_b)];
            let in_place = || {
                for (kind, daemon, host) in ends {
                    let (plane, states) = match kind {
                        LatchkeyKernel => ("plane=kernel plane-reason=the kernel takes ESP from TCP streams", 2),
                        _ => ("plane=user-space", 0),
                    };
                    let context = || format!("{}{}{}", daemon.sas(), scene.a.output(), scene.b.output());
                    assert!(daemon.sas().contains(plane), "{}", context());
                    wait_for(&context(), Duration::from_secs(20), || in_streams(host) == states);
                }
            };
            scene.a.initiate("net");
            scene.passes();
            in_place();
            scene.host_a.transfers_whole(INNER_A, &scene.host_b, INNER_B, 1 << 20);
            scene.host_b.transfers_whole(INNER_B, &scene.host_a, INNER_A, 1 << 20);
            rekeyed(&scene);
            scene.passes();
            in_place();
            for _ in 0..2 {
                scene.host_a.check("ss", &["-K", "dport", "=", ":4500"]);
                wait_for("the tunnel works again", Duration::from_secs(40), || scene.host_a.pings(INNER_A, INNER_B));
            }
            scene.passes();
            in_place();
            assert_eq!(scene.a.established(), 1);
            capture.nothing_in_clear();
            assert!(capture.count("tcp port 4500") > 100 && capture.count("udp or esp") == 0);
        }
    });
}
