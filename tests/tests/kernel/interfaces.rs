//! XFRM interfaces that the daemon makes. Debian's UML kernel is built without them, so these tests are ignored there. With
//! another one, built with `CONFIG_XFRM_INTERFACE=y` and all that the guest needs built in:
//! `LATCHKEY_UML=/path/to/linux cargo test -p latchkey-tests --test kernel interfaces:: -- --ignored`.

use std::time::Duration;

use latchkey_tests::daemon::Kind::{LatchkeyKernel, StrongswanKernel};
use latchkey_tests::host::wait_for;
use latchkey_tests::scene::{INNER_A, INNER_B, Suite, configurations};
use latchkey_tests::uml::in_guest;

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
