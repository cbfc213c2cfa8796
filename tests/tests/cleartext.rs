//! What comes in clear although an SA is for it (RFC 4301 §5.2), where user space does ESP and the kernel has policies.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::path::PathBuf;
use std::time::Duration;

use latchkey_tests::daemon::Daemon;
use latchkey_tests::daemon::Kind::Latchkey;
use latchkey_tests::host::{Host, Process, link, wait_for};
use latchkey_tests::scene::{Suite, configurations};

const PORT: u16 = 5002;
/// Addresses of A and of the host behind it, of B, and those that the attacker takes, by family.
const GATEWAY: [&str; 2] = ["10.1.0.1", "[fd01::1]"];
const BEHIND: [&str; 2] = ["10.1.0.9", "[fd01::9]"];
const PEER: [&str; 2] = ["10.2.0.1", "[fd02::1]"];
const TAKEN: [&str; 2] = ["10.2.0.66", "[fd02::66]"];

/// A host that writes down what it hears on a UDP port of either family.
struct Ear {
    heard: PathBuf,
    _directory: tempfile::TempDir,
    _listener: Process,
}

impl Ear {
    fn of(host: &Host) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let heard = directory.path().join("heard");
        let file = format!("CREATE:{}", heard.display());
        let listener = host.spawn("socat", &["-u", &format!("UDP6-RECV:{PORT},ipv6only=0"), &file]);
        wait_for("the listener", Duration::from_secs(20), || {
            host.check("ss", &["-Hlun", "sport", "=", &format!(":{PORT}")]).contains(&format!(":{PORT}"))
        });
        Self { heard, _directory: directory, _listener: listener }
    }

    fn heard(&self, what: &str) -> bool {
        std::fs::read_to_string(&self.heard).unwrap_or_default().lines().any(|line| line == what)
    }
}

/// Sends a line; `options` are of the socket.
fn say(host: &Host, from: &str, to: &str, what: &str, options: &str) {
    let family = if to.contains(':') { "UDP6" } else { "UDP4" };
    let command = format!("echo {what} | socat -u - {family}:{to}:{PORT},bind={from}{options}");
    host.check("sh", &["-c", &command]);
}

/// Past our own routes into the tunnel, as an application with that right could.
const IN_CLEAR: &str = ",setsockopt-int=1:36:7243";

/// A gateway with a network behind it, its peer, and somebody on another link who claims to be in the peer's network.
struct Place {
    a: Daemon,
    b: Daemon,
    gateway: Host,
    peer: Host,
    behind: Host,
    attacker: Host,
}

impl Place {
    fn new(settings: &str, suite: &Suite) -> Self {
        let (gateway, peer, behind, attacker) = (Host::new(), Host::new(), Host::new(), Host::new());
        link(&gateway, "192.0.2.1/24", &peer, "192.0.2.2/24");
        link(&gateway, "10.1.0.1/24,fd01::1/64", &behind, "10.1.0.9/24,fd01::9/64");
        link(&gateway, "203.0.113.1/24,2001:db8:1::1/64", &attacker, "203.0.113.2/24,2001:db8:1::2/64");
        for (host, address) in
            [(&peer, "10.2.0.1/24"), (&peer, "fd02::1/64"), (&attacker, "10.2.0.66/24"), (&attacker, "fd02::66/64")]
        {
            host.add_inner(address);
        }
        behind.ip_batch("route add default via 10.1.0.1\nroute add default via fd01::1\n");
        attacker.ip_batch("route add 10.1.0.0/24 via 203.0.113.1\nroute add fd01::/64 via 2001:db8:1::1\n");
        gateway.check("sysctl", &["-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"]);
        // Neighbours are looked up: forged packets do not wait while others pass.
        for (host, address) in [(&attacker, "203.0.113.1"), (&attacker, "2001:db8:1::1"), (&gateway, "10.1.0.9")] {
            host.check("ping", &["-c", "1", "-W", "5", address]);
        }
        gateway.check("ping", &["-c", "1", "-W", "5", "fd01::9"]);
        let wide = |text: String| {
            text.replace("10.1.0.0/24", "10.1.0.0/24,fd01::/64").replace("10.2.0.0/24", "10.2.0.0/24,fd02::/64")
        };
        let [(of_a, files_a), (of_b, files_b)] = configurations(suite);
        let b = Daemon::start(Latchkey, &peer, &wide(of_b), &files_b);
        let a = Daemon::start_empty(Latchkey, &gateway, settings);
        a.write(&wide(of_a), &files_a);
        a.control(&["--load-all"]);
        Self { a, b, gateway, peer, behind, attacker }
    }

    /// Forged cleartext arrives at the gateway and behind it, by family. What the peer sends through the tunnel afterwards
    /// does, if there is one.
    fn forged_arrives(&self, tunnel: bool) -> [bool; 4] {
        let ears = [Ear::of(&self.gateway), Ear::of(&self.behind)];
        let places = [(&ears[0], GATEWAY), (&ears[1], BEHIND)];
        let mut arrived = Vec::new();
        for (ear, at) in places {
            for family in 0..2 {
                let (forged, right) = (format!("forged-{family}"), format!("right-{family}"));
                for _ in 0..3 {
                    say(&self.attacker, TAKEN[family], at[family], &forged, "");
                }
                wait_for(&format!("what the peer sends to {}", at[family]), Duration::from_secs(30), || {
                    let (host, from) =
                        if tunnel { (&self.peer, PEER[family]) } else { (&self.attacker, TAKEN[family]) };
                    say(host, from, at[family], &right, "");
                    ear.heard(&right)
                });
                arrived.push(ear.heard(&forged));
            }
        }
        arrived.try_into().unwrap()
    }
}

/// Policies but those of sockets.
fn named(host: &Host) -> usize {
    host.check("ip", &["xfrm", "policy"]).lines().filter(|line| line.trim().starts_with("dir ")).count()
}

/// Those of them that drop.
fn policies(host: &Host) -> usize {
    host.check("ip", &["xfrm", "policy"]).matches("action block").count()
}

// RFC 4301 §5.2: for the gateway itself and for its network, of both families.
#[test]
fn cleartext_from_the_peers_network_does_not_arrive_beside_a_tunnel() {
    let place = Place::new("", &Suite::default());
    assert_eq!(place.forged_arrives(false), [true; 4], "what the SA shall prevent");
    place.a.initiate("net");
    assert_eq!(place.forged_arrives(true), [false; 4], "{}", place.a.output());
    let both = policies(&place.gateway);
    assert_eq!(both, 4, "in and forwarded, of each family");

    // Its successor is for the same packets.
    let before = place.a.child_spis("INSTALLED");
    place.b.control(&["--rekey", "--child", "net"]);
    wait_for("a new SPI", Duration::from_secs(30), || {
        let now = place.a.child_spis("INSTALLED");
        now.len() == 1 && now != before
    });
    assert_eq!(place.forged_arrives(true), [false; 4]);
    assert_eq!(policies(&place.gateway), both);

    // As in the kernel's own plane, what no SA is for any more is the system's.
    place.a.control(&["--terminate", "--ike", "site"]);
    assert_eq!(named(&place.gateway), 0);
    assert_eq!(place.forged_arrives(false), [true; 4]);
}

// Somebody else removes what keeps cleartext out: it comes back by itself.
#[test]
fn what_others_flush_is_put_right() {
    let place = Place::new("", &Suite::default());
    place.a.initiate("net");
    place.gateway.check("nft", &["flush", "ruleset"]);
    assert_eq!(place.forged_arrives(true), [false; 4]);
    place.gateway.ip(&["xfrm", "policy", "flush"]);
    wait_for("the policies", Duration::from_secs(20), || policies(&place.gateway) == 4);
    assert_eq!(place.forged_arrives(true), [false; 4]);
}

#[test]
fn it_can_be_switched_off() {
    let place = Place::new("drop_cleartext = no\n", &Suite::default());
    place.a.initiate("net");
    assert_eq!(policies(&place.gateway), 0);
    assert_eq!(place.forged_arrives(true), [true; 4]);
}

// RFC 4301 §5.2 where the SA is for the hosts' own addresses: IKE, ESP in each carrier, and what finds the peer on the link
// go on (RFC 4861), nothing else comes in clear.
#[test]
fn between_the_hosts_themselves_ike_and_esp_go_on() {
    const FOUR: [&str; 2] = ["192.0.2.1", "192.0.2.2"];
    const SIX: [&str; 2] = ["2001:db8::1", "2001:db8::2"];
    for (ends, connection, child) in [
        (FOUR, "", "mode = transport\n"),
        (SIX, "", "mode = transport\n"),
        (SIX, "encap = yes\n", ""),
        (FOUR, "tcp = yes\n", ""),
        (SIX, "tcp = yes\n", "mode = transport\n"),
    ] {
        let (host_a, host_b) = (Host::new(), Host::new());
        link(&host_a, "192.0.2.1/24,2001:db8::1/64", &host_b, "192.0.2.2/24,2001:db8::2/64");
        let own = |text: String| {
            let text = text.replace("10.1.0.0/24", "dynamic").replace("10.2.0.0/24", "dynamic");
            text.replace(FOUR[0], ends[0]).replace(FOUR[1], ends[1])
        };
        let [(of_a, files_a), (of_b, files_b)] = configurations(&Suite { connection, child, ..Suite::default() });
        let b = Daemon::start(Latchkey, &host_b, &own(of_b), &files_b);
        let a = Daemon::start(Latchkey, &host_a, &own(of_a), &files_a);
        let ear = Ear::of(&host_a);
        let bracketed = ends.map(|end| if end.contains(':') { format!("[{end}]") } else { end.to_owned() });
        let (to, from) = (&bracketed[0], &bracketed[1]);
        let arrives = |what: &str, options: &str, times: usize| {
            for _ in 0..times {
                say(&host_b, from, to, what, options);
            }
            ear.heard(what)
        };
        wait_for("cleartext without an SA", Duration::from_secs(20), || arrives("before", IN_CLEAR, 1));
        a.initiate("net");
        arrives("forged", IN_CLEAR, 3);
        wait_for("what is protected", Duration::from_secs(20), || arrives("right", "", 1));
        assert!(!ear.heard("forged"), "{connection}{child}{}", a.output());

        // The neighbours are forgotten; then everything anew, in the same IKE SA.
        for host in [&host_a, &host_b] {
            host.ip(&["neigh", "flush", "all"]);
        }
        let before = a.child_spis("INSTALLED");
        a.control(&["--rekey", "--child", "net"]);
        wait_for("a new SPI", Duration::from_secs(30), || {
            let now = a.child_spis("INSTALLED");
            now.len() == 1 && now != before
        });
        let ike = |sas: &str| sas.split("initiator-spi=").nth(1).map(|rest| rest[..16].to_owned());
        let before = ike(&b.sas());
        b.control(&["--rekey", "--ike", "site"]);
        wait_for("a new IKE SA", Duration::from_secs(30), || ike(&b.sas()) != before && b.established() == 1);
        assert!(host_a.pings(ends[0], ends[1]) && host_b.pings(ends[1], ends[0]), "{}{}", a.output(), b.output());
        arrives("again", IN_CLEAR, 3);
        wait_for("what is protected", Duration::from_secs(20), || arrives("still right", "", 1));
        assert!(!ear.heard("again"));
    }
}

/// A connection of this name to a peer.
fn connection(name: &str, [local, remote]: [&str; 2], more: &str, [local_ts, remote_ts]: [&str; 2]) -> String {
    format!(
        "{name} {{\nversion = 2\nproposals = aes256gcm16-prfsha384-x25519\nlocal_addrs = {local}\nremote_addrs = {remote}\n\
         {more}\nlocal {{\nauth = psk\nid = {local}\n}}\nremote {{\nauth = psk\nid = {remote}\n}}\n\
         children {{\n{name} {{\n{local_ts}\n{remote_ts}\nesp_proposals = aes128gcm16\n}}\n}}\n}}\n"
    )
}

fn start(host: &Host, connections: &str, pools: &str) -> Daemon {
    let secret = "secrets {\nike-1 {\nsecret = \"a shared key for tests\"\n}\n}\n";
    Daemon::start(Latchkey, host, &format!("connections {{\n{connections}}}\n{pools}{secret}"), &vec![])
}

// A road warrior sends everything into the tunnel: its own link and itself stay in reach, its virtual address is only for
// what comes through the tunnel.
#[test]
fn a_road_warrior_keeps_its_link_and_itself() {
    let (carol, moon, neighbour) = (Host::new(), Host::new(), Host::new());
    link(&carol, "192.0.2.1/24,2001:db8::1/64", &moon, "192.0.2.2/24,2001:db8::2/64");
    link(&carol, "203.0.113.1/24,2001:db8:1::1/64", &neighbour, "203.0.113.2/24,2001:db8:1::2/64");
    moon.add_inner("10.2.0.1/24");
    moon.add_inner("fd02::1/64");
    let pools = "pools {\nfour {\naddrs = 10.3.0.0/24\n}\nsix {\naddrs = fd03::/64\n}\n}\n";
    let all = "0.0.0.0/0,::/0";
    let gateway = connection("rw", ["192.0.2.2", "192.0.2.1"], "pools = four, six", [&format!("local_ts = {all}"), ""]);
    let gateway = start(&moon, &gateway, pools);
    let client =
        connection("home", ["192.0.2.1", "192.0.2.2"], "vips = 0.0.0.0, ::", ["", &format!("remote_ts = {all}")]);
    let client = start(&carol, &client, "");
    client.initiate("home");
    assert_eq!(policies(&carol), 4);
    let ear = Ear::of(&carol);
    for (vip, own, inner, link, via) in [
        ("10.3.0.1", "203.0.113.1", "10.2.0.1", "203.0.113.2", "203.0.113.1"),
        ("[fd03::1]", "[2001:db8:1::1]", "[fd02::1]", "[2001:db8:1::2]", "2001:db8:1::1"),
    ] {
        let plain = |address: &str| address.trim_matches(['[', ']']).to_owned();
        neighbour.ip(&["route", "add", &plain(vip), "via", via]);
        assert!(carol.pings(&plain(vip), &plain(inner)), "{}{}", client.output(), gateway.output());
        assert!(moon.pings(&plain(inner), &plain(vip)));
        // From the link to the link's address it passes, to the virtual one it does not.
        wait_for("a neighbour's packet", Duration::from_secs(20), || {
            say(&neighbour, link, own, &format!("neighbour-{vip}"), "");
            ear.heard(&format!("neighbour-{vip}"))
        });
        for _ in 0..3 {
            say(&neighbour, link, vip, &format!("forged-{vip}"), "");
        }
        wait_for("a packet through the tunnel", Duration::from_secs(20), || {
            say(&moon, inner, vip, &format!("right-{vip}"), "");
            ear.heard(&format!("right-{vip}"))
        });
        assert!(!ear.heard(&format!("forged-{vip}")), "{}", client.output());
        // What carol sends to herself.
        assert!(carol.pings(&plain(vip), &plain(vip)));
        assert!(carol.pings(&plain(own), &plain(own)));
    }
}

// What goes from one tunnel into another is forwarded, and comes from no other device than the tunnels'.
#[test]
fn a_hub_forwards_from_tunnel_to_tunnel() {
    let hub = Host::new();
    hub.check("sysctl", &["-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"]);
    let mut connections = String::new();
    let spokes = [1, 2].map(|number| {
        let spoke = Host::new();
        let (ours, theirs) = (format!("192.0.{number}.254"), format!("192.0.{number}.1"));
        link(&spoke, &format!("{theirs}/24"), &hub, &format!("{ours}/24"));
        for inner in [format!("10.{number}.0.1/16"), format!("fd0{number}::1/64")] {
            spoke.add_inner(&inner);
        }
        let (net, all) = (format!("10.{number}.0.0/16,fd0{number}::/64"), "10.0.0.0/8,fd00::/8");
        connections += &connection(
            &format!("spoke{number}"),
            [&ours, &theirs],
            "",
            [&format!("local_ts = {all}"), &format!("remote_ts = {net}")],
        );
        let of_spoke =
            connection("hub", [&theirs, &ours], "", [&format!("local_ts = {net}"), &format!("remote_ts = {all}")]);
        (spoke, of_spoke)
    });
    let middle = start(&hub, &connections, "");
    let daemons = spokes.each_ref().map(|(spoke, of_spoke)| {
        let daemon = start(spoke, of_spoke, "");
        daemon.initiate("hub");
        daemon
    });
    let [(one, _), (other, _)] = &spokes;
    for (from, to) in [("10.1.0.1", "10.2.0.1"), ("fd01::1", "fd02::1")] {
        assert!(one.pings(from, to), "{from}: {}{}{}", middle.output(), daemons[0].output(), daemons[1].output());
        assert!(other.pings(to, from), "{to}");
    }
    // Between networks of the hub's selectors themselves there is no more in clear.
    assert_eq!(policies(&hub), 8);
}

// RFC 4303 §3.4.2, §4: ESP that belongs to no SA is counted and in the log, with what names it, and not with each packet.
#[test]
fn esp_that_is_dropped_is_counted_and_logged_now_and_then() {
    let place = Place::new("", &Suite::default());
    place.a.initiate("net");
    let counted = || {
        let stats = place.a.control(&["--stats", "--raw"]);
        let count = stats.split("unknown-spi=").nth(1).and_then(|rest| rest.split([' ', '}']).next());
        count.and_then(|count| count.parse::<u32>().ok()).unwrap_or_else(|| panic!("{stats}"))
    };
    assert_eq!(counted(), 0);
    for _ in 0..5 {
        let packet = r"printf '\300\001\002\003\000\000\000\007and something else'";
        place.attacker.check("sh", &["-c", &format!("{packet} | socat -u - UDP4:203.0.113.1:4500")]);
    }
    wait_for("the count", Duration::from_secs(20), || counted() == 5);
    let line = "ESP packet dropped: no SA spi=c0010203 sequence=7 remote=203.0.113.2 local=203.0.113.1 others=0";
    assert_eq!(place.a.output().matches("ESP packet dropped").count(), 1, "{}", place.a.output());
    assert!(place.a.output().contains(line), "{}", place.a.output());
}

/// An ICMP error: UDP port 9 of the peer cannot be reached from port 5005 of the gateway.
fn port_unreachable() -> Vec<u8> {
    let sum = |octets: &[u8]| {
        let sum: u32 = octets.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
        (!u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap()).to_be_bytes()
    };
    let mut quoted = vec![0x45, 0, 0, 29, 0, 0, 0x40, 0, 64, 17, 0, 0, 10, 1, 0, 1, 10, 2, 0, 1];
    let header = sum(&quoted);
    quoted[10..12].copy_from_slice(&header);
    quoted.extend([0x13, 0x8d, 0, 9, 0, 9, 0, 0]);
    let mut error = [vec![3, 3, 0, 0, 0, 0, 0, 0], quoted].concat();
    let checksum = sum(&error);
    error[2..4].copy_from_slice(&checksum);
    error
}

/// A program of the gateway that ends when such an error arrives.
fn waits_for_errors(gateway: &Host) -> Process {
    let program = gateway.spawn("socat", &["-u", "UDP4:10.2.0.1:9,bind=10.1.0.1:5005", "-"]);
    wait_for("the program", Duration::from_secs(20), || {
        gateway.check("ss", &["-Hun", "sport", "=", ":5005"]).contains("5005")
    });
    program
}

fn tells_of_an_error(host: &Host, from: &str) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), port_unreachable()).unwrap();
    let to = format!("IP4-SENDTO:10.1.0.1:1,bind={from}");
    host.check("socat", &["-u", &format!("FILE:{}", file.path().display()), &to]);
}

// RFC 4301 §6.1.1, §6.2: errors about what an SA protects are believed when they come under it, also from a router that its
// selectors leave out; in clear they are not from where it is for, and from elsewhere as the operator decides.
#[test]
fn icmp_errors_about_what_is_protected_have_to_be_protected() {
    let place = Place::new("", &Suite::default());
    // Before there is a tunnel.
    place.gateway.ip(&["route", "add", "10.2.0.0/24", "via", "192.0.2.2"]);
    let ear = Ear::of(&place.gateway);
    let mut count = 0;
    let mut an_error = |host: &Host, from: &str, believed: bool| {
        let mut program = waits_for_errors(&place.gateway);
        tells_of_an_error(host, from);
        let mut ended = || program.0.try_wait().unwrap().is_some();
        if believed {
            return wait_for("the error", Duration::from_secs(20), ended);
        }
        // What is sent behind it is there.
        count += 1;
        wait_for("another packet", Duration::from_secs(20), || {
            say(host, "203.0.113.2", "203.0.113.1", &format!("behind-{count}"), "");
            ear.heard(&format!("behind-{count}"))
        });
        assert!(!ended(), "from {from}");
    };
    // What the SA shall prevent.
    an_error(&place.attacker, "10.2.0.66", true);
    place.a.initiate("net");
    place.peer.add_inner("172.16.0.1/32");
    an_error(&place.attacker, "10.2.0.66", false);
    an_error(&place.peer, "10.2.0.1", true);
    // A router on the way.
    an_error(&place.peer, "172.16.0.1", true);

    // Left to the system.
    an_error(&place.attacker, "203.0.113.2", true);
    let shunt = "children {\nno-errors {\nlocal_ts = 10.1.0.0/24\nremote_ts = 0.0.0.0/0[icmp]\nmode = drop\nstart_action = trap\n}\n";
    let configured = std::fs::read_to_string(place.a.path("swanctl/swanctl.conf")).unwrap();
    place.a.write(&configured.replace("children {\n", shunt), &vec![]);
    place.a.control(&["--load-conns"]);
    an_error(&place.attacker, "203.0.113.2", false);
    an_error(&place.peer, "10.2.0.1", true);
    an_error(&place.peer, "172.16.0.1", true);
}
