//! Latches where the kernel does ESP (RFC 5660): its policies for the flow are all that there is.

use std::time::Duration;

use latchkey_tests::capture::Capture;
use latchkey_tests::daemon::Kind::LatchkeyKernel;
use latchkey_tests::host::wait_for;
use latchkey_tests::uml::in_guest;
use latchkey_tests::witness::{Echo, Talk, Talker, Three, Wires};

const PATIENCE: Duration = Duration::from_secs(30);

// RFC 5660 §2, §2.3: SAs come and go under a latch; another peer that claims the flow breaks it and gets nothing; whatever
// becomes of the daemon, and of the kernel's SAs after it, nothing leaves in clear.
#[test]
fn a_latched_connection_stays_with_its_peer_and_never_leaves_in_clear() {
    in_guest(|| {
        let mut three = Three::start(LatchkeyKernel, |text| text);
        three.open_a_way_in_clear();
        let wires = Wires::of(&[&three.host_a]);
        // What the kernel has decrypted it shows on the link.
        let link = three.host_c.check("ip", &["-o", "addr", "show", "to", "198.51.100.3"]);
        let loot = Capture::delivered(&three.host_c, link.split_whitespace().nth(1).unwrap());
        let got_nothing = || assert_eq!(loot.list("(tcp or udp) and port 7 and host 10.1.0.1"), "");
        let _echo = Echo::start(&three.host_b, "10.2.0.1");
        let tcp = Talk { on_break: "wait", ..Talk::default() };
        let tcp = Talker::start(&three.a, &three.host_a, &tcp);
        tcp.says("guard system");
        let udp = Talk { udp: true, on_break: "wait", local: "10.1.0.1:40008", ..Talk::default() };
        let udp = Talker::start(&three.a, &three.host_a, &udp);
        tcp.talks();
        udp.talks();
        three.a.control(&["--rekey", "--child", "net-b"]);
        tcp.talks();
        assert!(!tcp.report().contains("alert"), "{}", tcp.report());

        three.c.initiate("net-a");
        tcp.says("alert broken an SA of c.example claims");
        udp.says("alert broken an SA of c.example claims");
        let _ = three
            .host_c
            .run("sh", &["-c", "echo FORGED | socat -u - UDP4-DATAGRAM:10.1.0.1:40008,bind=10.2.0.1:7,reuseaddr"]);
        tcp.is_silenced();
        udp.is_silenced();
        three.c.control(&["--terminate", "--ike", "to-a"]);
        tcp.says("alert established");
        tcp.talks();
        assert!(!udp.report().contains("foreign"), "{}", udp.report());

        // The kernel goes on under the same SAs, and the flow stays in when they go.
        three.a.signal("KILL");
        wait_for("A's end", PATIENCE, || !three.a.is_running());
        tcp.talks();
        three.host_a.ip(&["xfrm", "state", "flush"]);
        tcp.is_silenced();
        three.a.restart(&three.host_a);
        three.a.initiate("net-b");
        tcp.is_silenced();
        got_nothing();
        wires.saw_nothing();
        // The witnesses are awake.
        three.a.control(&["--terminate", "--ike", "to-b"]);
        let _ = three.host_a.run("socat", &["-u", "/dev/null", "TCP4:10.2.0.1:7,bind=10.1.0.1,connect-timeout=1"]);
        wires.saw("tcp port 7");
    });
}
