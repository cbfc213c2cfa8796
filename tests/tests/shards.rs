//! The daemon with several shards: who comes to which of them makes no difference to anybody (`docs/architecture.md`, *Shards*).

#![allow(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;
use std::time::Duration;

use latchkey_tests::daemon::Daemon;
use latchkey_tests::daemon::Kind::Latchkey;
use latchkey_tests::host::{Host, wait_for};
use latchkey_tests::scene::{A, B, hosts};

const PEERS: usize = 64;
const SHARDS: u64 = 4;
const SECRETS: &str = "secrets {\nike-1 {\nsecret = \"a shared key for tests\"\n}\n}\n";
const LIMIT: Duration = Duration::from_secs(120);

/// A gateway for everybody with the key, of whom each may have one IKE SA.
fn gateway(host: &Host) -> Daemon {
    // Cookies are asked for, but nobody is kept out: all come from one address.
    let settings = format!("shards = {SHARDS}\ncookie_threshold_ip = 0\nblock_threshold = 0\naddress_budget = 0\n");
    let daemon = Daemon::start_empty(Latchkey, host, &settings);
    let configuration = format!(
        "connections {{\npeers {{\nlocal_addrs = {B}\nproposals = aes256gcm16-prfsha384-x25519\nversion = 2\n\
         unique = replace\nlocal {{\nauth = psk\nid = b.example\n}}\nremote {{\nauth = psk\n}}\n\
         children {{\nnet {{\nlocal_ts = 10.2.0.0/24\nremote_ts = 10.1.0.0/16\nesp_proposals = aes128gcm16\n}}\n}}\n}}\n}}\n\
         {SECRETS}"
    );
    daemon.write(&configuration, &Vec::new());
    daemon.control(&["--load-all"]);
    daemon
}

/// All the peers, in one daemon: each a connection that is begun at once, and says nothing of INITIAL_CONTACT.
fn peers(host: &Host) -> Daemon {
    let daemon = Daemon::start_empty(Latchkey, host, "shards = 1\n");
    let one = |n: usize| {
        format!(
            "c{n} {{\nlocal_addrs = {A}\nremote_addrs = {B}\nproposals = aes256gcm16-prfsha384-x25519\nversion = 2\n\
             unique = never\nlocal {{\nauth = psk\nid = a{n}.example\n}}\nremote {{\nauth = psk\nid = b.example\n}}\n\
             children {{\nn{n} {{\nlocal_ts = 10.1.{n}.0/24\nremote_ts = 10.2.0.0/24\nesp_proposals = aes128gcm16\n\
             start_action = start\n}}\n}}\n}}\n"
        )
    };
    let all: String = (0..PEERS).map(one).collect();
    daemon.write(&format!("connections {{\n{all}}}\n{SECRETS}"), &Vec::new());
    daemon.control(&["--load-all"]);
    daemon
}

/// The number of each peer's IKE SA at the gateway.
fn numbers(gateway: &Daemon) -> BTreeMap<String, u64> {
    let sas = gateway.sas();
    let after = |text: &str, key: &str| {
        let rest = &text[text.find(key).unwrap() + key.len()..];
        rest[..rest.find([' ', '}']).unwrap()].to_owned()
    };
    let one = |sa: &str| (after(sa, "remote-id="), after(sa, "uniqueid=").parse().unwrap());
    sas.split("list-sa event").skip(1).map(one).collect()
}

#[test]
fn peers_are_spread_over_shards_and_are_one_gateways() {
    let (host_a, host_b) = hosts();
    let gateway = gateway(&host_b);
    let mut first = peers(&host_a);
    let all_up = |peers: &Daemon| gateway.established() == PEERS && peers.established() == PEERS;
    wait_for("all peers", LIMIT, || all_up(&first));
    let before = numbers(&gateway);
    let shard = |number: &u64| (number - 1) % SHARDS;
    let mut of_shards = [0; SHARDS as usize];
    before.values().for_each(|number| of_shards[shard(number) as usize] += 1);
    assert!(before.len() == PEERS && of_shards.iter().all(|count| *count > 0), "{of_shards:?}");
    assert_eq!(gateway.child_spis("INSTALLED").len(), PEERS);

    // They crash and come again, to other shards: each has one IKE SA, the newer one.
    first.signal("KILL");
    wait_for("the end of the peers", LIMIT, || !first.is_running());
    let second = peers(&host_a);
    let newer = || {
        let now = numbers(&gateway);
        now.len() == PEERS && now.iter().all(|(peer, number)| before.get(peer) != Some(number))
    };
    wait_for("all peers again", LIMIT, || all_up(&second) && newer());
    let after = numbers(&gateway);
    let moved = after.iter().filter(|(peer, number)| shard(number) != shard(&before[*peer])).count();
    assert!(moved > 0, "nobody came to another shard");
    assert_eq!(gateway.child_spis("INSTALLED").len(), PEERS);

    // A command by number finds the shard, one by name means all of them.
    let number = after.values().next().unwrap().to_string();
    gateway.control(&["--terminate", "--ike-id", &number]);
    assert_eq!(gateway.established(), PEERS - 1);
    gateway.control(&["--terminate", "--ike", "peers", "--timeout", "60"]);
    assert!(numbers(&gateway).is_empty() && gateway.child_spis("INSTALLED").is_empty());
    wait_for("the peers to hear of it", LIMIT, || second.established() == 0);
}
