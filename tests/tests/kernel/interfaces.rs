//! XFRM interfaces that the daemon makes. Debian's UML kernel is built without them, so these tests are ignored there. With
//! another one, built with `CONFIG_XFRM_INTERFACE=y` and all that the guest needs built in:
//! `LATCHKEY_UML=/path/to/linux cargo test -p latchkey-tests --test kernel interfaces:: -- --ignored`.

use std::time::Duration;

use latchkey_tests::daemon::Kind::{LatchkeyKernel, StrongswanKernel};
use latchkey_tests::host::{Host, wait_for};
use latchkey_tests::scene::{INNER_A, INNER_B, Suite, configurations};
use latchkey_tests::uml::in_guest;
use latchkey_tests::witness::{Echo, Server, Talk, Talker, Three};

use crate::{is_clean, start};

/// "LtKy".
const GROUP: &str = "1282689913";

#[test]
#[ignore = "needs a kernel with XFRM interfaces: tests/guest/build, then LATCHKEY_UML=$PWD/target/guest/linux"]
fn an_interface_leads_to_the_tunnel_and_goes_with_the_connection() {
    in_guest(|| {
        let suite = Suite::default();
        let mut scene = start(LatchkeyKernel, StrongswanKernel, &suite);
        let [(plain, files), _] = configurations(&suite);
        let with = |options: &str| plain.replace("children {", &format!("{options}children {{"));
        // Somebody else's interface of our group's number is not ours: it is no XFRM interface.
        scene.host_a.ip(&["link", "add", "other", "group", GROUP, "type", "dummy"]);
        scene.a.write(&with("if_id_in = 7\nif_id_out = 7\nxfrm_interface = ipsec0\n"), &files);
        scene.a.control(&["--load-all"]);
        let interfaces = |host: &latchkey_tests::host::Host| host.check("ip", &["-d", "link", "show", "type", "xfrm"]);
        let made = interfaces(&scene.host_a);
        assert!(made.contains("ipsec0") && made.contains("if_id 0x7") && made.contains("UP"), "{made}");
        scene.host_a.ip(&["route", "del", "10.2.0.0/24"]);
        scene.a.initiate("net");
        let context =
            || format!("{}{}", scene.host_a.check("ip", &["route", "show", "table", "220"]), scene.a.output());
        assert!(context().contains("10.2.0.0/24 dev ipsec0"), "{}", context());
        assert!(scene.host_a.pings(INNER_A, INNER_B), "{}", context());
        scene.host_a.transfers_whole(INNER_A, &scene.host_b, INNER_B, 1 << 20);
        // RFC 4301 §8.2.1: its MTU stays what it is, and the kernel says what fits the path.
        for host in [&scene.host_a, &scene.host_b] {
            let links = host.check("ip", &["-o", "link", "show", "type", "veth"]);
            let device = links.split_whitespace().nth(1).unwrap().split('@').next().unwrap();
            host.ip(&["link", "set", device, "mtu", "1280"]);
        }
        assert!(interfaces(&scene.host_a).contains("mtu 1500"));
        scene.host_a.transfers_whole(INNER_A, &scene.host_b, INNER_B, 1 << 20);
        let too_long = ["-c", "1", "-W", "2", "-M", "do", "-s", "1300", "-I", INNER_A, INNER_B];
        let told = String::from_utf8(scene.host_a.run("ping", &too_long).stderr).unwrap();
        assert!(told.contains("mtu"), "{told}");
        let sas = scene.a.sas();
        assert_eq!(sas.matches("if-id-in=00000007 if-id-out=00000007").count(), 2, "{sas}");

        // Killed, it leaves the interface, which its successor removes.
        scene.a.signal("KILL");
        wait_for("the end", Duration::from_secs(10), || !scene.a.is_running());
        assert!(interfaces(&scene.host_a).contains("ipsec0"));
        scene.a.write(&plain, &files);
        scene.a.restart(&scene.host_a);
        assert_eq!(interfaces(&scene.host_a), "");
        // Another number: another interface.
        for if_id in ["8", "9"] {
            scene
                .a
                .write(&with(&format!("if_id_in = {if_id}\nif_id_out = {if_id}\nxfrm_interface = ipsec0\n")), &files);
            scene.a.control(&["--load-all"]);
            assert!(interfaces(&scene.host_a).contains(&format!("if_id 0x{if_id}")));
        }
        assert!(scene.a.stop());
        assert_eq!(interfaces(&scene.host_a), "");
        assert!(scene.host_a.check("ip", &["link"]).contains("other"));
        is_clean(&scene.host_a);
    });
}

/// C sends a datagram as B's server to this port of A's.
fn forge(host_c: &Host, port: u16) {
    let to = format!("UDP4-DATAGRAM:10.1.0.1:{port},bind=10.2.0.1:7,reuseaddr");
    host_c.check("sh", &["-c", &format!("echo FORGED | socat -u - {to}")]);
}

// RFC 5660 §2.3: what comes by an XFRM interface meets policies of that interface's number only. The impostor's SA has one,
// and gets nothing to what is latched: neither to a connection that waits, nor to a listener.
#[test]
#[ignore = "needs a kernel with XFRM interfaces: tests/guest/build, then LATCHKEY_UML=$PWD/target/guest/linux"]
fn an_impostor_s_interface_leads_to_nothing_that_is_latched() {
    in_guest(|| {
        let options = "to-c {\nif_id_in = 7\nif_id_out = 7\nxfrm_interface = ipsec7\n";
        let mut three = Three::start(LatchkeyKernel, |text| text.replace("to-c {\n", options));
        let _echo = Echo::start(&three.host_b, "10.2.0.1");
        let talk = Talk { udp: true, on_break: "wait", local: "10.1.0.1:40008", ..Talk::default() };
        let talker = Talker::start(&three.a, &three.host_a, &talk);
        talker.talks();
        let _server = Server::start(&three.a, &three.host_a, "10.1.0.1:7", "b.example");
        let heard = three.a.path("heard");
        let to_file = format!("CREATE:{}", heard.display());
        let _ear = three.host_a.spawn("socat", &["-u", "UDP4-RECV:9,bind=10.1.0.1", &to_file]);
        let blocked = || {
            let counters = three.host_a.check("cat", &["/proc/net/xfrm_stat"]);
            let counter = counters.lines().find_map(|line| line.strip_prefix("XfrmInPolBlock")).unwrap();
            counter.trim().parse::<u32>().unwrap()
        };
        let before = blocked();
        three.c.initiate("net-a");
        talker.says("alert broken an SA of c.example claims");
        let forge = |port| forge(&three.host_c, port);
        // What nobody latches gets it.
        wait_for("what is not latched, at A", Duration::from_secs(30), || {
            forge(40_008);
            forge(9);
            heard.exists() && std::fs::read(&heard).is_ok_and(|heard| !heard.is_empty())
        });
        assert!(!talker.report().contains("foreign"), "{}", talker.report());
        let datagrams = blocked();
        assert!(datagrams > before, "{}", three.host_a.check("ip", &["xfrm", "policy"]));
        let _ = three.host_c.run("socat", &["-u", "/dev/null", "TCP4:10.1.0.1:7,bind=10.2.0.1:5009,connect-timeout=2"]);
        assert!(blocked() > datagrams, "the listener has seen the impostor's SYN");
        // Its policies are there for as long as the SA is, also where nobody looks after it.
        let barred = || three.host_a.check("ip", &["xfrm", "policy"]).matches("action block priority 1 ").count();
        // Both of a broken latch's own directions, and the interface.
        assert_eq!(barred(), 3);
        three.c.control(&["--terminate", "--ike", "to-a"]);
        talker.says("alert established");
        talker.talks();
        assert_eq!(barred(), 0);
        three.c.initiate("net-a");
        wait_for("the break", Duration::from_secs(30), || barred() == 3);
        three.a.signal("KILL");
        wait_for("A's end", Duration::from_secs(30), || !three.a.is_running());
        let before = blocked();
        forge(40_008);
        assert!(blocked() > before);
        three.a.restart(&three.host_a);
        // The SA has gone, and the flow stays closed.
        assert_eq!(barred(), 2);
        assert!(!talker.report().contains("foreign"), "{}", talker.report());
    });
}
