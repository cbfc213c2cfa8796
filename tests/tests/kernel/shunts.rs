//! Policies without SAs.

use std::collections::BTreeSet;
use std::time::Duration;

use latchkey_tests::capture::Capture;
use latchkey_tests::daemon::Daemon;
use latchkey_tests::daemon::Kind::{LatchkeyKernel, StrongswanKernel};
use latchkey_tests::host::{Host, link, wait_for};
use latchkey_tests::scene::{A, B, INNER_A, INNER_B, Suite, configurations};
use latchkey_tests::uml::in_guest;

use crate::is_clean;

/// What passes on the way to `INNER_B`, in clear.
const PORT: u16 = 5001;

/// A connection with a tunnel and shunts on either end: one port passes, the rest of 10.0.0.0/8 is dropped, and one is
/// there when it is asked for.
fn shunted(configuration: &str, local: &str, remote: &str) -> String {
    let shunts = format!(
        "children {{\nport {{\nmode = pass\nlocal_ts = {local}\nremote_ts = {remote}\nstart_action = trap\n}}\n\
         rest {{\nmode = drop\nlocal_ts = 10.0.0.0/8\nremote_ts = 10.0.0.0/8\nstart_action = trap\n}}\n\
         lan {{\nmode = pass\nlocal_ts = 10.1.0.0/24\nremote_ts = 10.9.0.0/24\n}}\n"
    );
    configuration.replace("children {\n", &shunts)
}

/// Selector, direction, priority and action of each policy with a priority.
fn policies(host: &Host) -> BTreeSet<String> {
    let dump = host.check("ip", &["xfrm", "policy"]);
    let mut policies = BTreeSet::new();
    let lines: Vec<&str> = dump.lines().collect();
    for pair in lines.windows(2) {
        if let (true, Some(what)) = (pair[0].starts_with("src "), pair[1].trim().strip_prefix("dir ")) {
            let what = what.replace(" ptype main", "");
            policies.insert(format!("{} {}", pair[0].trim(), what.trim()));
        }
    }
    policies.into_iter().filter(|policy| !policy.ends_with("priority 0")).collect()
}

/// The policy for what is forwarded from a network into the tunnel.
fn forward(host: &Host, from: &str) -> String {
    let dump = host.check("ip", &["xfrm", "policy"]).replace(" uid 1282689913", "").replace("\n\t", " ");
    let is_meant = |line: &&str| line.starts_with(&format!("src {from} ")) && line.contains(" dir fwd ");
    let line = dump.lines().find(is_meant).unwrap_or_else(|| panic!("{dump}"));
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn listed(daemon: &Daemon, what: &[&str]) -> BTreeSet<String> {
    let text = daemon.control(what);
    // Blocks of a line and those that are indented below it.
    text.replace("\n ", " ").lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
}

// RFC 4301 §4.4.1: BYPASS and DISCARD, beside strongSwan's reading of the same configuration.
#[test]
fn what_passes_goes_in_clear_and_what_drops_goes_nowhere() {
    in_guest(|| {
        let [(of_a, _), (of_b, _)] = configurations(&Suite::default());
        let (wide, port) = ("10.1.0.0/24", format!("10.2.0.0/24[tcp/{PORT}]"));
        let forwards = |text: String| text.replace("esp_proposals", "policies_fwd_out = yes\nesp_proposals");
        let (of_a, of_b) = (forwards(shunted(&of_a, wide, &port)), forwards(shunted(&of_b, &port, wide)));
        let (a, b, other) = (Host::new(), Host::new(), Host::new());
        let (device, _) = link(&a, &format!("{A}/24"), &b, &format!("{B}/24"));
        link(&other, &format!("{A}/24"), &Host::new(), &format!("{B}/24"));
        for (host, address) in [(&a, INNER_A), (&b, INNER_B), (&other, INNER_A)] {
            host.add_inner(&format!("{address}/24"));
        }
        a.ip(&["route", "add", "10.2.0.0/24", "via", B]);
        b.ip(&["route", "add", "10.1.0.0/24", "via", A]);

        let theirs = Daemon::start(StrongswanKernel, &other, &of_a, &vec![]);
        let mut ours = Daemon::start(LatchkeyKernel, &a, &of_a, &vec![]);
        assert_eq!(policies(&a), policies(&other), "{}{}", ours.output(), theirs.output());
        assert_eq!(policies(&a).len(), 6, "{:?}", policies(&a));
        for what in [&["--list-pols"][..], &["--list-pols", "--drop"], &["--list-pols", "--pass"]] {
            assert_eq!(listed(&ours, what), listed(&theirs, what), "{what:?}");
        }
        let children = |daemon: &Daemon| {
            let text = daemon.control(&["--list-conns"]);
            let of =
                |name: &str| text.lines().find(|line| line.trim().starts_with(&format!("{name}:"))).map(str::to_owned);
            [of("port"), of("rest"), of("lan")]
        };
        assert_eq!(children(&ours), children(&theirs));

        // Neither end has an SA yet.
        let mut capture = Capture::start(&a, &device);
        assert!(!a.pings(INNER_A, INNER_B));
        capture.nothing_in_clear();
        a.transfers_whole(INNER_A, &b, INNER_B, 1000);

        // With one, it goes before what drops, and what passes goes before it.
        let there = Daemon::start(StrongswanKernel, &b, &of_b, &vec![]);
        ours.initiate("net");
        assert!(a.pings(INNER_A, INNER_B), "{}{}", ours.output(), there.output());
        a.transfers_whole(INNER_A, &b, INNER_B, 1000);
        let passed = capture.count(&format!("tcp port {PORT}"));
        assert!(passed >= 8, "{passed}");
        assert_eq!(capture.count("icmp"), 0);
        // What is forwarded into the tunnel does so as well, on either end.
        let swapped = [("10.1.", "10.x."), ("10.2.", "10.1."), ("10.x.", "10.2."), (A, "x"), (B, A), ("x", B)];
        let mirrored = swapped.iter().fold(forward(&b, "10.2.0.0/24"), |text, (from, to)| text.replace(from, to));
        assert_eq!(forward(&a, "10.1.0.0/24"), mirrored);
        assert!(mirrored.contains("dir fwd priority 375424"), "{mirrored}");
        assert!(ours.swanctl(&["--initiate", "--child", "port", "--timeout", "1"]).status.code() != Some(0));

        // By hand, and by a configuration without them.
        for daemon in [&ours, &theirs] {
            daemon.control(&["--install", "--child", "lan"]);
            daemon.control(&["--uninstall", "--child", "rest"]);
        }
        ours.control(&["--terminate", "--ike", "site"]);
        assert_eq!(policies(&a), policies(&other));
        assert_eq!(policies(&a).len(), 6);
        assert_eq!(listed(&ours, &["--list-pols"]), listed(&theirs, &["--list-pols"]));
        let routes = a.run("ip", &["route", "show", "table", "220"]).stdout;
        assert_eq!(String::from_utf8_lossy(&routes).trim(), "throw 10.9.0.0/24 proto static scope link");
        ours.write(
            &of_a.replace(
                "mode = pass\nlocal_ts = 10.1.0.0/24\nremote_ts = 10.9",
                "mode = drop\nlocal_ts = 10.1.0.0/24\nremote_ts = 10.9",
            ),
            &vec![],
        );
        ours.control(&["--load-conns"]);
        let lan = |policy: &String| policy.contains("10.9.0.0/24");
        assert_eq!(policies(&a).iter().filter(|policy| lan(policy) && policy.contains("block")).count(), 3);
        assert_eq!(policies(&a).iter().filter(|policy| lan(policy)).count(), 3);
        // Somebody removes them: they come back.
        a.ip(&["xfrm", "policy", "flush"]);
        wait_for("the policies", Duration::from_secs(20), || policies(&a).len() == 6);
        ours.write(&configurations(&Suite::default())[0].0, &vec![]);
        ours.control(&["--load-conns"]);
        assert_eq!(policies(&a), BTreeSet::new());

        // What a daemon leaves that dies goes when the next one starts, and all goes with one that stops.
        ours.write(&of_a, &vec![]);
        ours.control(&["--load-conns"]);
        ours.signal("KILL");
        wait_for("its end", Duration::from_secs(20), || !ours.is_running());
        assert_eq!(policies(&a).len(), 6);
        let mut again = Daemon::start_empty(LatchkeyKernel, &a, "");
        assert_eq!(policies(&a), BTreeSet::new());
        again.write(&of_a, &vec![]);
        again.control(&["--load-all"]);
        assert_eq!(policies(&a).len(), 6);
        assert!(again.stop());
        assert_eq!(policies(&a), BTreeSet::new());
        is_clean(&a);
    });
}
