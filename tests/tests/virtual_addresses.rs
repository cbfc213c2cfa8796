//! Road warriors and their gateway: virtual addresses, name servers, pools. With strongSwan in both roles, and two
//! Latchkeys through NAT and over TCP.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::time::Duration;

use latchkey_tests::daemon::Daemon;
use latchkey_tests::daemon::Kind::{self, Latchkey, Strongswan};
use latchkey_tests::host::{Host, link, wait_for};

const GATEWAY: &str = "192.0.2.2";
const SUITE: &str = "version = 2\nproposals = aes256gcm16-prfsha384-x25519\n";
const SECRET: &str = "secrets {\nike-1 {\nsecret = \"a shared key for tests\"\n}\n}\n";
const POOLS: &str = "pools {\n\
    four {\naddrs = 10.3.0.0/24\ndns = 10.2.0.53\nsubnet = 10.2.0.0/24\n}\n\
    six {\naddrs = fd03::/64\ndns = fd02::53\n}\n}\n";

/// A gateway's configuration; `connection` and `child` are additional settings.
fn gateway(pools: &str, connection: &str, child: &str) -> String {
    format!(
        "connections {{\nrw {{\nlocal_addrs = {GATEWAY}\n{SUITE}{connection}\n\
         local {{\nauth = psk\nid = gateway.example\n}}\nremote {{\nauth = psk\n}}\n\
         children {{\nnet {{\nlocal_ts = 10.2.0.0/24,fd02::/64\nesp_proposals = aes128gcm16\n{child}\n}}\n}}\n}}\n}}\n\
         {pools}{SECRET}"
    )
}

/// A client's configuration.
fn client(name: &str, connection: &str, child: &str) -> String {
    format!(
        "connections {{\nhome {{\nremote_addrs = {GATEWAY}\n{SUITE}{connection}\n\
         local {{\nauth = psk\nid = {name}\n}}\nremote {{\nauth = psk\nid = gateway.example\n}}\n\
         children {{\nnet {{\nremote_ts = 10.2.0.0/24,fd02::/64\nesp_proposals = aes128gcm16\n{child}\n}}\n}}\n}}\n}}\n\
         {SECRET}"
    )
}

/// A daemon with settings of `strongswan.conf` and a configuration.
fn start(kind: Kind, host: &Host, settings: &str, configuration: &str) -> Daemon {
    let daemon = Daemon::start_empty(kind, host, settings);
    daemon.write(configuration, &Vec::new());
    daemon.control(&["--load-all"]);
    daemon
}

/// A client's host and a gateway's with its inner network, on one link.
fn hosts() -> (Host, Host) {
    let (carol, moon) = (Host::new(), Host::new());
    link(&carol, "192.0.2.1/24", &moon, "192.0.2.2/24");
    inside(&moon);
    (carol, moon)
}

fn inside(moon: &Host) {
    moon.add_inner("10.2.0.1/24");
    moon.add_inner("fd02::1/64");
}

const BOTH: &str = "vips = 0.0.0.0, ::\n";

/// Real packets pass between the client's virtual addresses and the gateway's network, both ways.
fn passes(carol: &Host, moon: &Host, vips: [&str; 2]) {
    for (vip, inner) in vips.into_iter().zip(["10.2.0.1", "fd02::1"]) {
        assert!(carol.pings(vip, inner), "no ping from {vip}");
        assert!(moon.pings(inner, vip), "no ping to {vip}");
    }
    carol.transfers_whole(vips[0], moon, "10.2.0.1", 1 << 20);
}

// RFC 7296 §2.19, both roles with strongSwan.
#[test]
fn strongswan_s_gateway_assigns_addresses_and_name_servers_to_us() {
    let (carol, moon) = hosts();
    let told = tempfile::NamedTempFile::new().unwrap();
    let resolv = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(resolv.path(), "nameserver 192.0.2.53\n").unwrap();
    let script = format!(
        "updown = \"echo $PLUTO_VERB $PLUTO_MY_SOURCEIP $PLUTO_MY_SOURCEIP4_1 $PLUTO_MY_SOURCEIP6_1 $PLUTO_DNS4_1 \
         $PLUTO_DNS6_1 $PLUTO_PEER_SUBNET_1 >> {}\"\n",
        told.path().display()
    );
    let gateway = start(Strongswan, &moon, "", &gateway(POOLS, "pools = four, six\n", ""));
    let settings = format!("plugins {{\nresolve {{\nfile = {}\n}}\n}}\n", resolv.path().display());
    let mut ours = start(Latchkey, &carol, &settings, &client("carol.example", BOTH, &script));
    ours.initiate("net");
    let sas = ours.sas();
    assert!(sas.contains("local-vips=[10.3.0.1 fd03::1] "), "{sas}");
    assert!(sas.contains("local-ts=[10.3.0.1/32 fd03::1/128]"), "{sas}");
    passes(&carol, &moon, ["10.3.0.1", "fd03::1"]);
    // The application need not name the address: the route does.
    assert!(carol.check("ip", &["route", "get", "10.2.0.1"]).contains("src 10.3.0.1"));
    assert!(carol.check("ip", &["-6", "route", "get", "fd02::1"]).contains("src fd03::1"));
    let text = std::fs::read_to_string(resolv.path()).unwrap();
    let expected = "nameserver fd02::53   # by Latchkey, from gateway.example\n\
                    nameserver 10.2.0.53   # by Latchkey, from gateway.example\nnameserver 192.0.2.53\n";
    assert_eq!(text, expected);
    wait_for("the script's report", Duration::from_secs(10), || {
        let told = std::fs::read_to_string(told.path()).unwrap();
        let line = "up-client 10.3.0.1 10.3.0.1 fd03::1 10.2.0.53 fd02::53 10.2.0.0/24\n";
        told.contains(line)
    });
    assert!(gateway.control(&["--list-pools", "--leases"]).contains("10.3.0.1"), "the lease is known there");

    // The address stays when the IKE SA is rekeyed.
    let spi = |sas: &str| sas.split("initiator-spi=").nth(1).map(|rest| rest[..16].to_owned());
    let before = spi(&ours.sas());
    ours.control(&["--rekey", "--ike", "home"]);
    wait_for("a new IKE SA", Duration::from_secs(20), || {
        let sas = ours.sas();
        sas.matches("initiator-spi=").count() == 1
            && spi(&sas) != before
            && sas.contains("local-vips=[10.3.0.1 fd03::1]")
    });
    passes(&carol, &moon, ["10.3.0.1", "fd03::1"]);

    // And goes when the daemon stops, with all else.
    assert!(ours.stop(), "{}", ours.output());
    assert!(!carol.check("ip", &["addr"]).contains("10.3.0.1"));
    assert_eq!(std::fs::read_to_string(resolv.path()).unwrap(), "nameserver 192.0.2.53\n");
}

#[test]
fn our_gateway_assigns_addresses_and_name_servers_to_strongswan() {
    let (carol, moon) = hosts();
    let told = tempfile::NamedTempFile::new().unwrap();
    let script = format!(
        "updown = \"echo $PLUTO_VERB $PLUTO_PEER_SOURCEIP $PLUTO_PEER_SOURCEIP4_1 $PLUTO_PEER_SOURCEIP6_1 >> {}\"\n",
        told.path().display()
    );
    let ours = start(Latchkey, &moon, "", &gateway(POOLS, "pools = four, six\n", &script));
    let dns = "plugins {\nupdown {\ndns_handler = yes\n}\n}\n";
    let theirs = start(Strongswan, &carol, dns, &client("carol.example", BOTH, ""));
    theirs.initiate("net");
    assert!(theirs.sas().contains("local-vips=[10.3.0.1 fd03::1] "), "{}", theirs.sas());
    let sas = ours.sas();
    assert!(sas.contains("remote-vips=[10.3.0.1 fd03::1] "), "{sas}");
    assert!(sas.contains("remote-ts=[10.3.0.1/32 fd03::1/128]"), "{sas}");
    assert!(
        theirs.log().contains("DNS server 10.2.0.53") || theirs.log().contains("INTERNAL_IP4_DNS"),
        "{}",
        theirs.log()
    );
    passes(&carol, &moon, ["10.3.0.1", "fd03::1"]);
    wait_for("the script's report", Duration::from_secs(10), || {
        std::fs::read_to_string(told.path()).unwrap().contains("up-client 10.3.0.1 10.3.0.1 fd03::1\n")
    });
    let leases = ours.control(&["--list-pools", "--leases"]);
    let expected = "four                 10.3.0.0                            1 / 0 / 254\n  \
                    10.3.0.1                       online   'carol.example'\n";
    assert!(leases.contains(expected), "{leases}");

    // In use: neither replaced by another range, nor unloaded; other attributes are fine.
    ours.write(&gateway(&POOLS.replace("10.3.0.0/24", "10.4.0.0/24"), "pools = four, six\n", ""), &Vec::new());
    let refused = ours.swanctl(&["--load-pools"]);
    assert!(!refused.status.success(), "{refused:?}");
    ours.write(&gateway(&POOLS.replace("10.2.0.53", "10.2.0.54"), "pools = four, six\n", ""), &Vec::new());
    ours.control(&["--load-pools"]);

    // A rekey by either side keeps the address, a new IKE SA gets it again.
    theirs.control(&["--rekey", "--ike", "home"]);
    wait_for("the IKE SA is rekeyed", Duration::from_secs(20), || {
        ours.established() == 1 && ours.sas().matches("initiator-spi=").count() == 1
    });
    passes(&carol, &moon, ["10.3.0.1", "fd03::1"]);
    theirs.control(&["--terminate", "--ike", "home"]);
    wait_for("the lease is offline", Duration::from_secs(20), || {
        ours.control(&["--list-pools", "--leases"]).contains("10.3.0.1                       offline  'carol.example'")
    });
    theirs.initiate("net");
    assert!(theirs.sas().contains("local-vips=[10.3.0.1 fd03::1]"), "{}", theirs.sas());
}

// strongSwan too makes a new IKE SA before it ends the old one, or after; the address is the same.
#[test]
fn strongswan_reauthenticates_and_keeps_its_address() {
    for settings in ["make_before_break = yes\n", "make_before_break = no\n"] {
        let (carol, moon) = hosts();
        let ours = start(Latchkey, &moon, "", &gateway(POOLS, "pools = four, six\n", ""));
        let theirs = start(Strongswan, &carol, settings, &client("carol.example", BOTH, ""));
        theirs.initiate("net");
        let id = |sas: &str| sas.split("uniqueid=").nth(1).map(|rest| rest.split(' ').next().unwrap().to_owned());
        let before = id(&ours.sas());
        theirs.control(&["--rekey", "--ike", "home", "--reauth"]);
        wait_for("a new IKE SA with the old address", Duration::from_secs(20), || {
            let sas = ours.sas();
            ours.established() == 1
                && sas.matches("uniqueid=").count() == 2
                && id(&sas) != before
                && sas.contains("remote-vips=[10.3.0.1 fd03::1]")
        });
        wait_for("packets pass", Duration::from_secs(20), || carol.pings("10.3.0.1", "10.2.0.1"));
    }
}

// RFC 7296 §3.15.4, and §2.19 for who does not ask.
#[test]
fn who_gets_no_address_gets_no_child_sa() {
    let small = "pools {\none {\naddrs = 10.3.0.9/32\n}\n}\n";
    for (of_client, of_gateway) in [(Latchkey, Latchkey), (Latchkey, Strongswan), (Strongswan, Latchkey)] {
        let (carol, moon) = hosts();
        let dave = Host::new();
        link(&dave, "198.51.100.1/24", &moon, "198.51.100.2/24");
        dave.ip(&["route", "add", "192.0.2.0/24", "via", "198.51.100.2"]);
        let gateway = start(of_gateway, &moon, "", &gateway(small, "pools = one\n", ""));
        let one = start(of_client, &carol, "", &client("carol.example", "vips = 0.0.0.0\n", ""));
        one.initiate("net");
        assert!(one.sas().contains("local-vips=[10.3.0.9]"), "{}", one.sas());
        let two = start(of_client, &dave, "", &client("dave.example", "vips = 0.0.0.0\n", ""));
        assert!(!two.swanctl(&["--initiate", "--child", "net", "--timeout", "10"]).status.success());
        assert!(two.log().contains("INTERNAL_ADDRESS_FAILURE"), "{}{}", two.output(), gateway.output());
        assert!(two.child_spis("INSTALLED").is_empty());
        assert!(one.child_spis("INSTALLED").len() == 1 && carol.pings("10.3.0.9", "10.2.0.1"));

        // It does not ask at all.
        drop(two);
        let three = start(of_client, &dave, "", &client("erin.example", "", ""));
        assert!(!three.swanctl(&["--initiate", "--child", "net", "--timeout", "10"]).status.success());
        assert!(three.log().contains("FAILED_CP_REQUIRED"), "{}{}", three.output(), gateway.output());
        assert!(three.child_spis("INSTALLED").is_empty());
    }
}

/// Two clients behind one masquerading router, the gateway on the other side.
struct Natted {
    clients: [Host; 2],
    router: Host,
    moon: Host,
}

fn behind_nat() -> Natted {
    let (clients, router, moon) = ([Host::new(), Host::new()], Host::new(), Host::new());
    link(&clients[0], "198.51.100.1/30", &router, "198.51.100.2/30");
    link(&clients[1], "198.51.100.5/30", &router, "198.51.100.6/30");
    let (outside, _) = link(&router, "192.0.2.254/24", &moon, "192.0.2.2/24");
    clients[0].ip(&["route", "add", "default", "via", "198.51.100.2"]);
    clients[1].ip(&["route", "add", "default", "via", "198.51.100.6"]);
    router.masquerade(&outside);
    inside(&moon);
    Natted { clients, router, moon }
}

// The selectors are those of the virtual addresses, so the clients do not collide whatever addresses they have.
#[test]
fn two_clients_behind_one_nat_have_an_address_each() {
    for tcp in [false, true] {
        let Natted { clients, router, moon } = behind_nat();
        if tcp {
            router.block_udp();
        }
        let gateway = start(Latchkey, &moon, "", &gateway(POOLS, "pools = four, six\n", ""));
        let settings = format!("{BOTH}tcp = fallback\n");
        let daemons: Vec<Daemon> = clients
            .iter()
            .zip(["carol.example", "dave.example"])
            .map(|(host, name)| start(Latchkey, host, "", &client(name, &settings, "")))
            .collect();
        for daemon in &daemons {
            daemon.initiate("net");
        }
        assert_eq!(gateway.established(), 2, "{}", gateway.sas());
        let vips = [["10.3.0.1", "fd03::1"], ["10.3.0.2", "fd03::2"]];
        for (at, host) in clients.iter().enumerate() {
            assert!(daemons[at].sas().contains(&format!("local-vips=[{} {}]", vips[at][0], vips[at][1])));
            assert_eq!(daemons[at].sas().contains("transport=TCP"), tcp);
            passes(host, &moon, vips[at]);
        }
        for (host, vips) in clients.iter().zip(vips) {
            passes(host, &moon, vips);
        }
    }
}

// A packet with another source address than the assigned one does not come out of the tunnel (RFC 4301 §5.2).
#[test]
fn a_client_cannot_take_another_one_s_address() {
    let (carol, moon) = hosts();
    let ours = start(Latchkey, &moon, "", &gateway(POOLS, "pools = four, six\n", "remote_ts = 0.0.0.0/0\n"));
    let theirs = start(Latchkey, &carol, "", &client("carol.example", "vips = 0.0.0.0\n", "local_ts = 0.0.0.0/0\n"));
    theirs.initiate("net");
    assert!(ours.sas().contains("remote-ts=[10.3.0.1/32]"), "{}", ours.sas());
    carol.add_inner("10.3.0.7/32");
    assert!(!carol.pings("10.3.0.7", "10.2.0.1"));
    assert!(carol.pings("10.3.0.1", "10.2.0.1"));
}

// RFC 8598 between two Latchkeys: domains, and name servers that are for them only.
#[test]
fn split_dns_reaches_the_script_and_not_the_resolver_s_file() {
    let (carol, moon) = hosts();
    let told = tempfile::NamedTempFile::new().unwrap();
    let resolv = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(resolv.path(), "nameserver 192.0.2.53\n").unwrap();
    let pools = POOLS.replace(
        "dns = 10.2.0.53\n",
        "dns = 10.2.0.53\ninternal_dns_domain = example.com, evil.test\n\
         internal_dnssec_ta = \"example.com 43547 8 2 B6225AB2\"\n",
    );
    let script = format!(
        "updown = \"echo $PLUTO_VERB $PLUTO_DNS4_1 $PLUTO_DNS_DOMAIN_1 $PLUTO_DNS_DOMAIN_2 $PLUTO_DNSSEC_TA_1_1 >> {}\"\n",
        told.path().display()
    );
    let settings = format!("plugins {{\nresolve {{\nfile = {}\n}}\n}}\n", resolv.path().display());
    let _ours = start(Latchkey, &moon, "", &gateway(&pools, "pools = four\n", ""));
    let connection = "vips = 0.0.0.0\nsplit_dns = example.com\ndnssec_domains = example.com\n";
    let theirs = start(Latchkey, &carol, &settings, &client("carol.example", connection, &script));
    theirs.initiate("net");
    assert!(theirs.sas().contains("dns-domains=[example.com]"), "{}", theirs.sas());
    wait_for("the script's report", Duration::from_secs(10), || {
        let told = std::fs::read_to_string(told.path()).unwrap();
        told.contains("up-host 10.2.0.53 example.com 43547 8 2 B6225AB2\n")
            || told.contains("up-client 10.2.0.53 example.com 43547 8 2 B6225AB2\n")
    });
    assert_eq!(std::fs::read_to_string(resolv.path()).unwrap(), "nameserver 192.0.2.53\n");
}

// A daemon that is killed takes the tunnel's device with it, and the address goes with the device.
#[test]
fn a_killed_client_leaves_no_address() {
    let (carol, moon) = hosts();
    let gateway = start(Latchkey, &moon, "", &gateway(POOLS, "pools = four, six\n", ""));
    let mut theirs = start(Latchkey, &carol, "", &client("carol.example", BOTH, ""));
    theirs.initiate("net");
    assert!(carol.check("ip", &["addr"]).contains("10.3.0.1/32"));
    theirs.signal("KILL");
    wait_for("the daemon ends", Duration::from_secs(10), || !theirs.is_running());
    wait_for("the address is gone", Duration::from_secs(10), || !carol.check("ip", &["addr"]).contains("10.3.0.1"));
    // It comes back, with the address that its old IKE SA still has at the gateway: INITIAL_CONTACT.
    let again = start(Latchkey, &carol, "", &client("carol.example", BOTH, ""));
    again.initiate("net");
    assert!(again.sas().contains("local-vips=[10.3.0.1 fd03::1]"), "{}", again.sas());
    wait_for("the old IKE SA is gone", Duration::from_secs(10), || gateway.established() == 1);
    passes(&carol, &moon, ["10.3.0.1", "fd03::1"]);
}
