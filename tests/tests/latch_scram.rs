//! SCRAM-SHA-256-PLUS over latched connections (`latch/examples/scram.rs`), with a relay in the middle.

#![allow(clippy::unwrap_used, reason = "tests")]

use latchkey_tests::daemon::Kind::Latchkey;
use latchkey_tests::daemon::{Daemon, Files, program};
use latchkey_tests::host::{Host, link};
use latchkey_tests::talker::Talker;

/// A connection between two ends: outer address, identity, protected network; ours first.
fn connection(name: &str, ours: [&str; 3], theirs: [&str; 3]) -> String {
    format!(
        "{name} {{\nlocal_addrs = {}\nremote_addrs = {}\nversion = 2\nlocal {{\nauth = psk\nid = {}\n}}\n\
         remote {{\nauth = psk\nid = {}\n}}\nchildren {{\n{name} {{\nlocal_ts = {}\nremote_ts = {}\n}}\n}}\n}}\n",
        ours[0], theirs[0], ours[1], theirs[1], ours[2], theirs[2]
    )
}

fn daemon(host: &Host, connections: &[String]) -> Daemon {
    let secrets = "secrets {\nike-1 {\nsecret = \"a shared key for tests\"\n}\n}\n";
    Daemon::start(Latchkey, host, &format!("connections {{\n{}}}\n{secrets}", connections.concat()), &Files::new())
}

fn scram(daemon: &Daemon, host: &Host, name: &str, args: &[&str]) -> Talker {
    let socket = daemon.latch_socket();
    let mut all = args.to_vec();
    all.insert(1, socket.to_str().unwrap());
    Talker::start(host.command(program("examples/scram").to_str().unwrap(), &all), daemon.path(name))
}

// RFC 5056 §1, RFC 5802 §6: the man in the middle has an IPsec identity that each end admits, and relays what they say.
#[test]
fn a_relay_between_two_tunnels_gets_no_further_than_the_channel_binding() {
    let (host_a, host_m, host_b) = (Host::new(), Host::new(), Host::new());
    link(&host_a, "192.0.2.1/24", &host_m, "192.0.2.2/24");
    link(&host_m, "198.51.100.2/24", &host_b, "198.51.100.3/24");
    host_a.add_inner("10.1.0.1/24");
    host_m.add_inner("10.2.0.1/24");
    host_m.add_inner("10.3.0.1/24");
    host_b.add_inner("10.4.0.1/24");
    let (a, m1) = (["192.0.2.1", "a.example", "10.1.0.0/24"], ["192.0.2.2", "m.example", "10.2.0.0/24"]);
    let (m2, b) = (["198.51.100.2", "m.example", "10.3.0.0/24"], ["198.51.100.3", "b.example", "10.4.0.0/24"]);
    let of_b = daemon(&host_b, &[connection("am", b, m2)]);
    let of_m = daemon(&host_m, &[connection("ma", m1, a), connection("mb", m2, b)]);
    let of_a = daemon(&host_a, &[connection("am", a, m1)]);
    of_a.initiate("am");
    of_m.initiate("mb");
    let relay = |port: &str| {
        let (listen, target) =
            (format!("TCP4-LISTEN:{port},bind=10.2.0.1,reuseaddr,fork"), format!("TCP4:10.4.0.1:{port},bind=10.3.0.1"));
        let relay = host_m.spawn("socat", &[&listen, &target]);
        host_m.wait_for_listener(port.parse().unwrap());
        relay
    };

    // The other end of the tunnel is the server: bound, it succeeds; and a wrong password fails.
    let direct = scram(&of_m, &host_m, "direct", &["server", "10.2.0.1:4000", "user", "pencil"]);
    direct.prints("listening");
    let mut client = scram(&of_a, &host_a, "first", &["client", "10.2.0.1:4000", "user", "pencil"]);
    client.prints("authenticated");
    assert!(client.ends().success());
    direct.prints("user authenticated through a.example");
    let mut client = scram(&of_a, &host_a, "second", &["client", "10.2.0.1:4000", "user", "pen"]);
    assert!(!client.ends().success());
    direct.prints("refused through a.example: e=invalid-proof");

    // Relayed, without the binding: it succeeds, and neither end knows whom it trusts.
    let (_relay, _other) = (relay("4001"), relay("4002"));
    let unbound = scram(&of_b, &host_b, "unbound", &["server", "10.4.0.1:4001", "user", "pencil", "--unbound"]);
    unbound.prints("listening");
    let mut client = scram(&of_a, &host_a, "third", &["client", "10.2.0.1:4001", "user", "pencil", "--unbound"]);
    assert!(client.ends().success(), "{}", client.errors());
    unbound.prints("user authenticated through m.example");

    // Relayed, with it: the server has another channel than the client.
    let bound = scram(&of_b, &host_b, "bound", &["server", "10.4.0.1:4002", "user", "pencil"]);
    bound.prints("listening");
    let mut client = scram(&of_a, &host_a, "fourth", &["client", "10.2.0.1:4002", "user", "pencil"]);
    assert!(!client.ends().success());
    bound.prints("refused through m.example: e=channel-bindings-dont-match");
    assert!(!bound.output().contains("authenticated"));
    drop((of_a, of_m, of_b));
}
