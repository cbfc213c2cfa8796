//! What a Child SA covers and when it comes, against strongSwan in both roles: childless IKE SAs (RFC 6023), selectors with
//! protocols and ports (RFC 7296 §2.9), packets that want an SA.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::time::Duration;

use latchkey_tests::daemon::Daemon;
use latchkey_tests::daemon::Kind::{self, Latchkey, Strongswan};
use latchkey_tests::host::{Host, link, wait_for};
use latchkey_tests::scene::{INNER_A, INNER_B, Scene, Suite, configurations, hosts};

const ROLES: [(Kind, Kind); 2] = [(Latchkey, Strongswan), (Strongswan, Latchkey)];

/// The two daemons, each with a setting of its connection.
fn with(initiator: Kind, responder: Kind, of_a: &str, of_b: &str) -> Scene {
    let (host_a, host_b) = hosts();
    let [(conf_a, files_a), (conf_b, files_b)] = configurations(&Suite::default());
    let set = |configuration: String, setting: &str| {
        let changed = configuration.replace("version = 2\n", &format!("version = 2\n{setting}\n"));
        assert_ne!(changed, configuration);
        changed
    };
    let b = Daemon::start(responder, &host_b, &set(conf_b, of_b), &files_b);
    let a = Daemon::start(initiator, &host_a, &set(conf_a, of_a), &files_a);
    Scene { a, b, host_a, host_b }
}

// RFC 6023 §3.
#[test]
fn the_child_comes_in_its_own_exchange_where_both_agree() {
    for (initiator, responder) in ROLES {
        // `prefer` came with strongSwan 6.0.
        let wish = if initiator == Latchkey { "prefer" } else { "force" };
        for (of_a, of_b) in [(wish, "allow"), ("force", "force")] {
            let scene = with(initiator, responder, &format!("childless = {of_a}"), &format!("childless = {of_b}"));
            scene.a.initiate("net");
            scene.passes();
            let strongswan = if initiator == Strongswan { &scene.a } else { &scene.b };
            assert!(strongswan.log().contains("CREATE_CHILD_SA request"), "{}", strongswan.log());
        }
    }
}

// RFC 6023 §3.
#[test]
fn who_must_be_childless_and_who_must_not_refuse_each_other() {
    for (initiator, responder) in ROLES {
        for (of_a, of_b) in [("force", "never"), ("never", "force")] {
            let scene = with(initiator, responder, &format!("childless = {of_a}"), &format!("childless = {of_b}"));
            let refused = scene.a.swanctl(&["--initiate", "--child", "net", "--timeout", "10"]);
            assert!(!refused.status.success(), "{of_a} {of_b}");
            wait_for("both have given up", Duration::from_secs(30), || {
                (scene.a.established(), scene.b.established()) == (0, 0)
            });
            if of_a == "never" {
                assert!(scene.a.log().contains("INVALID_SYNTAX"), "{}{}", scene.a.output(), scene.b.output());
            }
        }
    }
}

// RFC 7296 §2.9: lists with protocols and ports, narrowed on both sides.
#[test]
fn lists_with_protocols_and_ports_are_narrowed() {
    for (initiator, responder) in ROLES {
        let (host_a, host_b) = hosts();
        let [(of_a, files_a), (of_b, files_b)] = configurations(&Suite::default());
        let of_a = of_a
            .replace("local_ts = 10.1.0.0/24", "local_ts = 10.1.0.0/24[icmp], 10.1.0.0/24[tcp/1024-65535], fd00:1::/64")
            .replace("remote_ts = 10.2.0.0/24", "remote_ts = 10.0.0.0/8[icmp], 10.2.0.0/16[tcp/80-90]");
        let of_b = of_b.replace("local_ts = 10.2.0.0/24", "local_ts = 10.2.0.0/24[icmp], 10.2.0.0/25[tcp/85-443]");
        let b = Daemon::start(responder, &host_b, &of_b, &files_b);
        let a = Daemon::start(initiator, &host_a, &of_a, &files_a);
        a.initiate("net");
        for daemon in [&a, &b] {
            let sas = daemon.sas();
            for expected in
                ["10.2.0.0/24[icmp]", "10.2.0.0/25[tcp/85-90]", "10.1.0.0/24[icmp]", "10.1.0.0/24[tcp/1024-65535]"]
            {
                assert!(sas.contains(expected), "{expected}: {sas}");
            }
            assert!(!sas.contains("fd00"), "{sas}");
        }
        let scene = Scene { a, b, host_a, host_b };
        scene.passes();
    }
}

// RFC 7296 §2.9: the packet's own selectors come first, and the responder's policy that has them answers.
#[test]
fn a_packet_gets_the_policy_that_covers_it() {
    for responder in [Latchkey, Strongswan] {
        let (host_a, host_b) = hosts();
        let [(of_a, files_a), (of_b, files_b)] = configurations(&Suite::default());
        let of_a = of_a.replace("remote_ts = 10.2.0.0/24", "remote_ts = 10.0.0.0/8\nstart_action = trap");
        let of_b = of_b.replace(
            "children {\n",
            "children {\nother {\nlocal_ts = 10.3.0.0/24\nremote_ts = 10.1.0.0/24\nesp_proposals = aes128gcm16\n}\n",
        );
        let b = Daemon::start(responder, &host_b, &of_b, &files_b);
        let a = Daemon::start(Latchkey, &host_a, &of_a, &files_a);
        wait_for("the tunnel comes up", Duration::from_secs(30), || host_a.pings(INNER_A, INNER_B));
        assert!(a.sas().contains("remote-ts=[10.2.0.0/24]"), "{}", a.sas());
        assert!(b.sas().contains("local-ts=[10.2.0.0/24]"), "{}", b.sas());
        if responder == Latchkey {
            // What the SA does not cover gets another one: the peer said that there are more.
            host_b.add_inner("10.3.0.1/24");
            wait_for("the other SA comes up", Duration::from_secs(30), || host_a.pings(INNER_A, "10.3.0.1"));
            assert!(host_a.pings(INNER_A, INNER_B), "{}", a.output());
            assert_eq!(a.child_spis("INSTALLED").len(), 2, "{}", a.sas());
        }
    }
}

// RFC 7296 §2.23.1, RFC 3948 §5.2: to the server both clients have the address of the NAT, and one policy.
#[test]
fn two_clients_behind_one_nat_keep_apart_in_transport_mode() {
    const CLIENTS: [&str; 2] = ["198.51.100.1", "198.51.101.1"];
    let (router, host_b) = (Host::new(), Host::new());
    let (outside, _) = link(&router, "192.0.2.254/24", &host_b, "192.0.2.2/24");
    router.masquerade(&outside);
    let [(of_a, files_a), (of_b, files_b)] = configurations(&Suite { child: "mode = transport\n", ..Suite::default() });
    let dynamic = |text: String| text.replace("10.1.0.0/24", "dynamic").replace("10.2.0.0/24", "dynamic");
    let of_b = dynamic(of_b).replace("remote_addrs = 192.0.2.1\n", "").replace("id = a.example", "id = *.example");
    let of_a = dynamic(of_a).replace("local_addrs = 192.0.2.1\n", "");
    let b = Daemon::start(Latchkey, &host_b, &of_b, &files_b);
    let clients = [("a.example", CLIENTS[0]), ("c.example", CLIENTS[1])].map(|(name, address)| {
        let host = Host::new();
        let gateway = format!("{}.254", address.rsplit_once('.').unwrap().0);
        link(&host, &format!("{address}/24"), &router, &format!("{gateway}/24"));
        host.ip(&["route", "add", "default", "via", &gateway]);
        let daemon = Daemon::start(Latchkey, &host, &of_a.replace("id = a.example", &format!("id = {name}")), &files_a);
        (daemon, host)
    });
    for (daemon, _) in &clients {
        daemon.initiate("net");
    }
    assert_eq!(b.established(), 2, "{}", b.sas());
    std::thread::scope(|scope| {
        for ((daemon, host), address) in clients.iter().zip(CLIENTS) {
            let b = &b;
            scope.spawn(move || {
                assert!(host.pings(address, "192.0.2.2"), "{address}: {}{}", daemon.output(), b.output());
            });
        }
    });
    // Each alone and after the other: who came last does not get the answers of who came first.
    for ((_, host), address) in clients.iter().zip(CLIENTS) {
        host.transfers_whole(address, &host_b, "192.0.2.2", 1 << 20);
    }
    assert_eq!(b.sas().matches("mode=TRANSPORT").count(), 2, "{}", b.sas());
}

// `inactivity`, in both of whom the peer may be; and padding (RFC 4303 §2.7) with a peer that takes it.
#[test]
fn an_unused_child_is_closed_and_its_trap_brings_it_back() {
    let (host_a, host_b) = hosts();
    let [(of_a, files_a), (of_b, files_b)] = configurations(&Suite {
        child: "inactivity = 2s\nstart_action = trap\ntfc_padding = mtu\n",
        ..Suite::default()
    });
    let of_b = of_b.replace("inactivity = 2s\nstart_action = trap\ntfc_padding = mtu\n", "");
    let b = Daemon::start(Strongswan, &host_b, &of_b, &files_b);
    let a = Daemon::start(Latchkey, &host_a, &of_a, &files_a);
    a.initiate("net");
    for _ in 0..2 {
        wait_for("the Child SA is closed", Duration::from_secs(60), || {
            a.child_spis("INSTALLED").is_empty() && b.child_spis("INSTALLED").is_empty()
        });
        assert_eq!(a.established(), 1, "the IKE SA stays");
        wait_for("a packet brings it back", Duration::from_secs(60), || host_a.pings(INNER_A, INNER_B));
    }
    assert!(a.output().contains("closing a Child SA for inactivity"), "{}", a.output());
}
