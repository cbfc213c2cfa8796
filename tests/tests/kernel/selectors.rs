//! Modes, address families and policies.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::time::Duration;

use latchkey_tests::capture::Capture;
use latchkey_tests::daemon::Daemon;
use latchkey_tests::daemon::Kind::{LatchkeyKernel, StrongswanKernel};
use latchkey_tests::host::{Host, link, wait_for};
use latchkey_tests::scene::{INNER_A, INNER_B, Suite, configurations};
use latchkey_tests::uml::in_guest;

use crate::{ROLES, is_clean, start, states, works};

/// Outer and inner addresses of both ends, by family.
const FOUR: [&str; 2] = ["192.0.2.1", "192.0.2.2"];
const SIX: [&str; 2] = ["2001:db8::1", "2001:db8::2"];
const INNER_FOUR: [&str; 2] = ["10.1.0.1", "10.2.0.1"];
const INNER_SIX: [&str; 2] = ["fd01::1", "fd02::1"];

/// For one end (0 or 1): a connection for each outer family, on plain IP and in UDP, with a child for each inner family
/// and one in transport mode.
fn configuration(end: usize) -> String {
    let other = 1 - end;
    let ids = ["a.example", "b.example"];
    let mut text = String::from("connections {\n");
    for (outer, addresses) in [("four", FOUR), ("six", SIX)] {
        for (carrier, encap) in [("ip", "no"), ("udp", "yes")] {
            let name = format!("{outer}-{carrier}");
            writeln!(
                text,
                "{name} {{\nversion = 2\nproposals = aes256gcm16-prfsha384-x25519\nencap = {encap}\n\
                 local_addrs = {}\nremote_addrs = {}\nlocal {{\nauth = psk\nid = {}\n}}\nremote {{\nauth = psk\nid = {}\n}}\n\
                 children {{\n\
                 {name}-4 {{\nlocal_ts = {}/24\nremote_ts = {}/24\nesp_proposals = aes128gcm16\n}}\n\
                 {name}-6 {{\nlocal_ts = {}/64\nremote_ts = {}/64\nesp_proposals = aes128gcm16\n}}\n\
                 {name}-transport {{\nmode = transport\nesp_proposals = aes128gcm16\n}}\n}}\n}}",
                addresses[end],
                addresses[other],
                ids[end],
                ids[other],
                INNER_FOUR[end].trim_end_matches('1').to_owned() + "0",
                INNER_FOUR[other].trim_end_matches('1').to_owned() + "0",
                INNER_SIX[end].trim_end_matches('1'),
                INNER_SIX[other].trim_end_matches('1'),
            )
            .unwrap();
        }
    }
    text + "}\nsecrets {\nike-1 {\nsecret = \"a shared key for tests\"\n}\n}\n"
}

/// Two hosts with both families, and the devices that join them.
fn hosts() -> ([Host; 2], [String; 2]) {
    let (a, b) = (Host::new(), Host::new());
    let (of_a, of_b) = link(&a, "192.0.2.1/24,2001:db8::1/64", &b, "192.0.2.2/24,2001:db8::2/64");
    // Without IPsec, their packets would pass in clear.
    a.ip_batch(
        "addr add 10.1.0.1/24 dev lo\naddr add fd01::1/64 dev lo nodad\n\
         route add 10.2.0.0/24 via 192.0.2.2\nroute add fd02::/64 via 2001:db8::2\n",
    );
    b.ip_batch(
        "addr add 10.2.0.1/24 dev lo\naddr add fd02::1/64 dev lo nodad\n\
         route add 10.1.0.0/24 via 192.0.2.1\nroute add fd01::/64 via 2001:db8::1\n",
    );
    ([a, b], [of_a, of_b])
}

// RFC 4301 §4.1, §5: tunnel and transport mode, every pair of families, on plain IP and in UDP (RFC 3948). The kernels'
// own dumps and what is seen on the link are the witnesses.
#[test]
fn modes_and_families() {
    in_guest(|| {
        for (initiator, responder) in ROLES {
            let ([host_a, host_b], devices) = hosts();
            let mut b = Daemon::start(responder, &host_b, &configuration(1), &vec![]);
            let mut a = Daemon::start(initiator, &host_a, &configuration(0), &vec![]);
            let mut captures = [Capture::start(&host_a, &devices[0]), Capture::start(&host_b, &devices[1])];
            for (outer, addresses) in [("four", FOUR), ("six", SIX)] {
                for carrier in ["ip", "udp"] {
                    for (inner, ends) in [("4", INNER_FOUR), ("6", INNER_SIX), ("transport", addresses)] {
                        let child = format!("{outer}-{carrier}-{inner}");
                        a.initiate(&child);
                        let context = || format!("{child} {initiator:?}\n{}{}", a.output(), b.output());
                        assert!(host_a.pings(ends[0], ends[1]), "{}", context());
                        assert!(host_b.pings(ends[1], ends[0]), "{}", context());
                        for host in [&host_a, &host_b] {
                            let dump = host.check("ip", &["xfrm", "state"]);
                            assert_eq!(states(host), 2, "{dump}");
                            let mode = if inner == "transport" { "mode transport" } else { "mode tunnel" };
                            assert_eq!(dump.matches(mode).count(), 2, "{dump}");
                            assert_eq!(dump.contains("encap type espinudp"), carrier == "udp", "{dump}");
                        }
                        assert_eq!(policies(&host_a, false), policies(&host_b, true), "{}", context());
                        a.control(&["--terminate", "--ike", &format!("{outer}-{carrier}")]);
                        wait_for("the SAs are gone", Duration::from_secs(20), || {
                            states(&host_a) + states(&host_b) == 0
                        });
                    }
                }
            }
            for capture in &mut captures {
                capture.nothing_in_clear();
                // Six pings at least for each of three children, both ways.
                for packets in ["ip and esp", "ip6 and esp", "ip and udp port 4500", "ip6 and udp port 4500"] {
                    assert!(capture.count(packets) >= 18, "{packets}: {}", capture.list(packets));
                }
            }
            assert!(a.stop() && b.stop());
            is_clean(&host_a);
            is_clean(&host_b);
        }
    });
}

/// Selectors and priorities of the policies with templates; those of the other end in this one's words if `mirrored`.
fn policies(host: &Host, mirrored: bool) -> BTreeSet<String> {
    let dump = host.check("ip", &["xfrm", "policy"]);
    let mut policies = BTreeSet::new();
    let lines: Vec<&str> = dump.lines().collect();
    for (at, line) in lines.iter().enumerate() {
        let Some(selector) = line.strip_prefix("src ") else { continue };
        let fields: Vec<&str> = lines[at + 1].split_whitespace().collect();
        let [_, direction, _, priority, ..] = fields.as_slice() else { continue };
        // Forwarding has no counterpart, and what sockets pass by has no template.
        let here = match (*direction, mirrored) {
            ("in" | "out", false) => *direction,
            ("in", true) => "out",
            ("out", true) => "in",
            _ => continue,
        };
        policies.insert(format!("{selector} {here} {priority}"));
    }
    assert!(policies.len() >= 2, "{dump}");
    policies
}

// RFC 4303 §1, §2.2.1: what both daemons can negotiate and the kernel can do, with 32-bit and 64-bit sequence numbers.
#[test]
fn suites() {
    const SUITES: [&str; 12] = [
        "aes128gcm16-esn",
        "aes256gcm8",
        "aes192gcm12-noesn",
        "aes128ccm16",
        "chacha20poly1305-esn",
        "aes128gmac",
        "aes128-sha1",
        "aes256-sha256-esn",
        "aes192-sha384",
        "aes256-sha512",
        "aes128ctr-sha256",
        "null-sha256",
    ];
    in_guest(|| {
        for (initiator, responder) in ROLES {
            let [of_a, of_b] = configurations(&Suite::default()).map(|(text, _)| text);
            let (start, rest) = of_a.split_once("net {\n").unwrap();
            let (child, end) = rest.split_once("}\n").unwrap();
            let children: String = SUITES
                .iter()
                .enumerate()
                .map(|(number, suite)| {
                    let child = child.replace("aes128gcm16", suite);
                    format!("suite{number} {{\nreplay_window = 256\n{child}}}\n")
                })
                .collect();
            let of_a = format!("{start}{children}{end}");
            let of_b = of_b.replace("esp_proposals = aes128gcm16", &format!("esp_proposals = {}", SUITES.join(",")));
            let ([host_a, host_b], _) = hosts();
            let b = Daemon::start(responder, &host_b, &of_b, &vec![]);
            let a = Daemon::start(initiator, &host_a, &of_a, &vec![]);
            for (number, suite) in SUITES.iter().enumerate() {
                let child = format!("suite{number}");
                a.initiate(&child);
                let context = || format!("{suite} {initiator:?}\n{}{}", a.output(), b.output());
                assert!(host_a.pings(INNER_FOUR[0], INNER_FOUR[1]), "{}", context());
                for host in [&host_a, &host_b] {
                    let dump = host.check("ip", &["xfrm", "state"]);
                    assert_eq!(dump.matches("proto esp").count(), 2, "{dump}");
                    let esn = if suite.ends_with("-esn") { 2 } else { 0 };
                    let flags = dump.lines().filter(|line| line.contains("replay-window") && line.contains("flag"));
                    assert_eq!(flags.filter(|flags| flags.ends_with(" esn")).count(), esn, "{dump}");
                }
                a.control(&["--terminate", "--child", &child]);
            }
        }
    });
}

// RFC 4301 §5.2.
#[test]
fn cleartext_from_the_peers_network_is_dropped() {
    in_guest(|| {
        let scene = works(LatchkeyKernel, StrongswanKernel, &Suite::default());
        let mismatches = || {
            let counters = scene.host_a.check("cat", &["/proc/net/xfrm_stat"]);
            let line = counters.lines().find(|line| line.starts_with("XfrmInTmplMismatch"));
            line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u32>().ok()).unwrap()
        };
        assert_eq!(mismatches(), 0);
        // The peer's host sends in clear from now on.
        scene.host_b.ip(&["xfrm", "policy", "flush"]);
        scene.host_b.ip(&["route", "flush", "table", "220"]);
        assert!(!scene.host_b.pings(INNER_B, INNER_A));
        assert_eq!(mismatches(), 3);
    });
}

/// The children that a trap waits for bring themselves up with the packet's own selector first (RFC 7296 §2.9).
#[test]
fn traps_bring_up_what_a_packet_wants() {
    in_guest(|| {
        for (initiator, responder) in ROLES {
            let ([host_a, host_b], devices) = hosts();
            let trapping = configuration(0).replace("four-ip-4 {\n", "four-ip-4 {\nstart_action = trap\n");
            let mut capture = Capture::start(&host_a, &devices[0]);
            let mut b = None;
            if initiator == StrongswanKernel {
                // Its kernel asks for the same packets again after minutes only: we are there from the beginning.
                b = Some(Daemon::start(responder, &host_b, &configuration(1), &vec![]));
            }
            let a = Daemon::start(initiator, &host_a, &trapping, &vec![]);
            if b.is_none() {
                // Nobody is there: nothing can come up, and nothing goes out in clear.
                assert!(!host_a.pings(INNER_FOUR[0], INNER_FOUR[1]));
                capture.nothing_in_clear();
            }
            let b = b.unwrap_or_else(|| Daemon::start(responder, &host_b, &configuration(1), &vec![]));
            wait_for("the tunnel comes up by itself", Duration::from_secs(40), || {
                host_a.pings(INNER_FOUR[0], INNER_FOUR[1])
            });
            assert_eq!((a.established(), b.established(), states(&host_a)), (1, 1, 2));
            // It goes, and comes again.
            a.control(&["--terminate", "--ike", "four-ip"]);
            wait_for("the tunnel comes up again", Duration::from_secs(40), || {
                host_a.pings(INNER_FOUR[0], INNER_FOUR[1])
            });
            capture.nothing_in_clear();
            assert!(capture.count("esp") > 0);
        }
    });
}

// `mark_in`, `mark_out`, `set_mark_in`: policies for packets with a mark; what has none is not theirs.
#[test]
fn marks_choose_what_is_protected() {
    in_guest(|| {
        let suite = Suite::default();
        let (scene, marks) =
            (start(LatchkeyKernel, StrongswanKernel, &suite), "mark_in = 42\nmark_out = 42\nset_mark_in = 42\n");
        let [(of_a, _), _] = configurations(&suite);
        scene.a.write(&of_a.replace("esp_proposals", &format!("{marks}esp_proposals")), &vec![]);
        scene.a.control(&["--load-all"]);
        scene.a.initiate("net");
        let ping = |mark: &str| {
            let args = ["-m", mark, "-c", "2", "-i", "0.2", "-W", "1", "-I", INNER_A, INNER_B];
            scene.host_a.run("ping", &args).status.success()
        };
        assert!(ping("42"), "{}{}", scene.host_a.check("ip", &["xfrm", "policy"]), scene.a.output());
        // In clear, and so dropped by the peer.
        assert!(!ping("41"));
        assert_eq!(scene.a.sas().matches("packets-out=2 ").count(), 1, "{}", scene.a.sas());
    });
}

/// What a daemon says of marks and interfaces, in its order.
fn tags(daemon: &Daemon) -> Vec<String> {
    let sas = daemon.sas();
    let words = sas.split([' ', '{', '}']).filter(|word| word.starts_with("mark-") || word.starts_with("if-id-"));
    words.map(str::to_owned).collect()
}

// `%unique`, `%unique-dir`, `%same`: each Child SA has numbers of its own, which its successors keep, and says them in
// strongSwan's words.
#[test]
fn each_child_sa_has_numbers_of_its_own() {
    in_guest(|| {
        for (initiator, responder) in ROLES {
            let suite = Suite::default();
            let scene = start(initiator, responder, &suite);
            let both = [(&scene.a, &scene.host_a), (&scene.b, &scene.host_b)];
            let load = |of_child: &str, of_connection: &str| {
                for ((daemon, _), (configuration, files)) in both.into_iter().zip(configurations(&suite)) {
                    let configuration = configuration
                        .replace("esp_proposals", &format!("{of_child}esp_proposals"))
                        .replace("children {", &format!("{of_connection}children {{"));
                    daemon.write(&configuration, &files);
                    daemon.control(&["--load-all"]);
                }
            };
            load("mark_in = %unique/0xff\nmark_out = %unique\nset_mark_in = %same\n", "");
            // Answers have the mark that the question had when it came out of the tunnel.
            scene.host_b.check("sysctl", &["-qw", "net.ipv4.fwmark_reflect=1"]);
            let ping = |mark: &str| {
                let args = ["-m", mark, "-c", "2", "-i", "0.2", "-W", "1", "-I", INNER_A, INNER_B];
                scene.host_a.run("ping", &args).status.success()
            };
            scene.a.initiate("net");
            let expected = ["mark-in=00000001", "mark-mask-in=000000ff", "mark-out=00000001"];
            for _ in 0..2 {
                assert_eq!(
                    (tags(&scene.a), tags(&scene.b)),
                    (expected.map(String::from).to_vec(), expected.map(String::from).to_vec())
                );
                assert!(ping("1"), "{}{}", scene.host_b.check("ip", &["xfrm", "policy"]), scene.a.output());
                // Of another mark: not theirs, at either end.
                ping("2");
                for daemon in [&scene.a, &scene.b] {
                    let sas = daemon.sas();
                    assert!(sas.contains("packets-in=2 ") && sas.contains("packets-out=2 "), "{sas}");
                }
                let before = scene.a.child_spis("INSTALLED");
                scene.a.control(&["--rekey", "--child", "net"]);
                wait_for("a successor", Duration::from_secs(40), || {
                    let now = scene.a.child_spis("INSTALLED");
                    now.len() == 1 && now != before && [&scene.a, &scene.b].iter().all(|daemon| tags(daemon).len() == 3)
                });
            }
            scene.a.control(&["--terminate", "--ike", "site"]);
            wait_for("the end of it", Duration::from_secs(20), || scene.b.established() == 0);

            load("if_id_out = %unique-dir\nif_id_in = %unique-dir\n", "if_id_in = 7\n");
            scene.a.initiate("net");
            let of_child = |daemon: &Daemon| tags(daemon).into_iter().rev().take(2).collect::<Vec<_>>();
            assert_eq!((of_child(&scene.a), of_child(&scene.b)), (of_child(&scene.b), of_child(&scene.a)));
            assert_eq!(of_child(&scene.a), ["if-id-out=00000002", "if-id-in=00000001"]);
            for (_, host) in both {
                let states = host.check("ip", &["xfrm", "state"]);
                assert!(states.contains("if_id 0x1") && states.contains("if_id 0x2"), "{states}");
            }
        }
    });
}
