//! Debian's unmodified `swanctl` against our VICI server, with a core that answers from a script.
//!
//! The expected texts were taken from charon-systemd 5.9.8 with the same SAs and configuration.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "helpers of tests")]

#[path = "swanctl/odd_requests.rs"]
mod odd_requests;

use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command as Process, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ike::counters::Counter;
use ike::crypto::{AdditionalKe, IkeSuite};
use ike::engine::{
    Assigned, ChildSaId, ChildSaStatus, ChildState, CloseReason, Engine, EngineConfig, Event, IkeSaId, IkeSaStatus,
    IkeState, Path as IkePath, Transport,
};
use ipsec::plane::{Encapsulation, EspSuite, Mode, Tags, Usage};
use ipsec::selector::TrafficSelector;
use ipsec::transform::{Encr, Integ, Ke, Prf};
use latch::database::AutomaticFlows;
use latchkey::config::ConnectionDefinition;
use latchkey::control::{
    Command, Control, Counted, CounterReport, Matched, Packets, PolicyKind, PolicyReport, SaPage, SaReport,
};
use latchkey::vici::client::{Client, ClientError};
use latchkey::vici::store::Configured;
use latchkey::vici::{ServerHandle, Store, serve};
use pad::Identity;
use tokio::sync::{broadcast, mpsc};

// ---- refusals first

#[tokio::test(flavor = "multi_thread")]
async fn unknown_commands_and_events_are_refused() {
    let daemon = Daemon::start(Vec::new()).await;
    let mut client = Client::connect(daemon.uri()).await.unwrap();
    let answer = client.request("no-such-command", Client::message()).await;
    assert!(matches!(answer, Err(ClientError::UnknownCommand(_))), "{answer:?}");
    assert!(matches!(client.register("no-such-event").await, Err(ClientError::UnknownEvent(_))));
    assert!(matches!(client.unregister("log").await, Err(ClientError::UnknownEvent(_))));
    client.request("version", Client::message()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_whose_owners_are_not_understood_is_not_everybody_s() {
    let daemon = Daemon::start(Vec::new()).await;
    let mut client = daemon.client().await;
    let secret = || {
        let mut message = Client::message();
        message.push_value("type", "IKE");
        message.push_value("data", "hunter2");
        message
    };
    let mut misspelt = secret();
    misspelt.push_list("owner", ["a.example"]);
    let mut nested = secret();
    nested.push_section("owners", Client::message());
    let mut malformed = secret();
    malformed.push_list("owners", ["C=,,="]);
    for message in [misspelt, nested, malformed] {
        let answer = client.request("load-shared", message).await;
        assert!(matches!(&answer, Ok(answer) if answer.text("success") == Some("no")), "{answer:?}");
    }
    let mut good = secret();
    good.push_list("owners", ["a.example"]);
    let answer = client.request("load-shared", good).await;
    assert!(matches!(&answer, Ok(answer) if answer.text("success") == Some("yes")), "{answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_sends_nonsense_is_closed_and_others_are_served() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let daemon = Daemon::start(Vec::new()).await;
    let path = daemon.uri().strip_prefix("unix://").unwrap().to_owned();
    for nonsense in [&[0xff; 8][..], &[0, 0, 0, 1, 99], &[0, 0, 0, 3, 0, 9, 1], &[0, 0, 0, 0]] {
        let mut stream = tokio::net::UnixStream::connect(&path).await.unwrap();
        stream.write_all(nonsense).await.unwrap();
        let closed = tokio::time::timeout(Duration::from_secs(5), stream.read_u8()).await.expect("closed in time");
        assert!(closed.is_err());
    }
    Client::connect(daemon.uri()).await.unwrap().request("version", Client::message()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn many_clients_that_go_away_leave_nothing_behind() {
    let daemon = Daemon::start(Vec::new()).await;
    for _ in 0..600 {
        let mut client = Client::connect(daemon.uri()).await.unwrap();
        client.register("log").await.unwrap();
    }
    Client::connect(daemon.uri()).await.unwrap().request("stats", Client::message()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_on_sas_that_are_not_there_fail_in_charon_s_words() {
    let daemon = Daemon::start(Vec::new()).await;
    for (arguments, words) in [
        (&["--initiate", "--child", "nosuch"][..], "initiate failed: CHILD_SA config 'nosuch' not found"),
        (&["--initiate", "--ike", "nosuch"], "initiate failed: IKE_SA config 'nosuch' not found"),
        (&["--terminate", "--ike", "nosuch"], "terminate failed: no matching SAs to terminate found"),
        (&["--rekey", "--ike", "nosuch"], "rekey failed: no matching SAs to rekey found"),
        (&["--install", "--child", "nosuch"], "install failed: configuration name not found"),
        (&["--uninstall", "--child", "nosuch"], "uninstall failed: policy 'nosuch' not found"),
        (&["--redirect", "--ike", "nosuch", "--gateway", "192.0.2.1"], "no matching SAs to redirect found"),
        (&["--redirect", "--ike", "gw"], "missing target gateway"),
        (&["--redirect", "--gateway", "192.0.2.1"], "missing redirect selector"),
        (&["--redirect", "--ike", "gw", "--gateway", "a gateway"], "gateway is neither an IP address nor a FQDN"),
        (&["--redirect", "--peer-ip", "10.0.0.300", "--gateway", "192.0.2.1"], "invalid value for: peer-ip"),
    ] {
        let output = daemon.swanctl(arguments).await;
        assert!(!output.status.success(), "{arguments:?}");
        assert!(text(&output).contains(words), "{arguments:?}: {}", text(&output));
    }
    assert_eq!(
        daemon.raw(&["--terminate", "--ike", "nosuch"]).await.lines().last().unwrap(),
        "terminate reply {success=no matches=0 terminated=0 errmsg=no matching SAs to terminate found}"
    );
    assert_eq!(
        daemon.raw(&["--rekey", "--ike", "nosuch"]).await.trim(),
        "rekey reply {success=no matches=0 errmsg=no matching SAs to rekey found}"
    );
}

// ---- status

#[tokio::test(flavor = "multi_thread")]
async fn policies_are_listed_installed_and_uninstalled_as_charon_does() {
    let daemon = Daemon::start(Vec::new()).await;
    let raw = "list-policy event {site/net {child=net ike=site mode=TUNNEL local-ts=[10.1.0.0/24] \
               remote-ts=[10.2.0.0/24]}}\nlist-policies reply {}\n";
    assert_eq!(daemon.raw(&["--list-pols"]).await, raw);
    assert_eq!(daemon.raw(&["--list-pols", "--trap"]).await, raw);
    assert_eq!(daemon.raw(&["--list-pols", "--child", "net"]).await, raw);
    let none = "list-policies reply {}\n";
    assert_eq!(daemon.raw(&["--list-pols", "--drop"]).await, none);
    assert_eq!(daemon.raw(&["--list-pols", "--child", "other"]).await, none);
    assert_eq!(daemon.out(&["--list-pols"]).await, "site/net, TUNNEL\n  local:  10.1.0.0/24\n  remote: 10.2.0.0/24\n");
    assert_eq!(daemon.out(&["--install", "--child", "net"]).await, "install completed successfully\n");
    assert_eq!(daemon.out(&["--uninstall", "--child", "net"]).await, "uninstall completed successfully\n");
}

// The texts of swanctl with charon-systemd 5.9.8.
#[tokio::test(flavor = "multi_thread")]
async fn pools_are_loaded_listed_and_unloaded() {
    let daemon = Daemon::start(Vec::new()).await;
    let folder = tempfile::tempdir().unwrap();
    let load = async |text: &str| {
        std::fs::write(folder.path().join("swanctl.conf"), text).unwrap();
        daemon.load_all(folder.path()).await
    };
    for (text, expected) in [
        ("dns = 10.0.0.1", "loading pool 'p' failed: missing addrs for pool 'p'"),
        ("addrs = 10.3.0.9-10.3.0.4", "loading pool 'p' failed: invalid addrs value: 10.3.0.9-10.3.0.4"),
        ("addrs = 10.3.0.0/24\ndns = x", "loading pool 'p' failed: invalid attribute value for dns"),
        ("addrs = 10.3.0.0/24\nfoo = 1.2.3.4", "loading pool 'p' failed: invalid attribute: foo"),
    ] {
        let printed = load(&format!("pools {{\np {{\n{text}\n}}\n}}\n")).await;
        assert!(printed.contains(expected), "{printed}");
    }
    assert_eq!(daemon.out(&["--list-pools"]).await, "");
    let printed =
        load("pools {\nfour {\naddrs = 10.3.0.0/24\ndns = 10.0.0.1, fd00::1\n}\nsix {\naddrs = fd00::/120\n}\n}\n")
            .await;
    assert!(printed.contains("loaded pool 'four'") && printed.contains("loaded pool 'six'"), "{printed}");
    let raw = "get-pools reply {four {base=10.3.0.0 size=254 online=0 offline=0 leases {}} \
               six {base=fd00:: size=254 online=0 offline=0 leases {}}}\n";
    assert_eq!(daemon.raw(&["--list-pools", "--leases"]).await, raw);
    let lines = "four                 10.3.0.0                            0 / 0 / 254\n\
                 six                  fd00::                              0 / 0 / 254\n";
    assert_eq!(daemon.out(&["--list-pools"]).await, lines);
    assert_eq!(daemon.out(&["--list-pools", "--name", "four"]).await.lines().count(), 1);
    let printed = load("pools {\nsix {\naddrs = fd00::/120\n}\n}\n").await;
    assert!(printed.contains("1 unloaded"), "{printed}");
    assert_eq!(daemon.out(&["--list-pools"]).await.lines().count(), 1);
    let mut client = daemon.client().await;
    let mut message = Client::message();
    message.push_value("name", "nosuch");
    let answer = client.request("unload-pool", message).await.unwrap();
    assert_eq!(answer.text("errmsg"), Some("failed to find pool, nothing unloaded"));
}

#[tokio::test(flavor = "multi_thread")]
async fn virtual_addresses_are_listed_where_charon_lists_them() {
    let mut with_addresses = sa();
    let assigned = Assigned {
        local: vec!["10.3.0.1".parse().unwrap(), "fd03::1".parse().unwrap()],
        remote: vec!["10.4.0.1".parse().unwrap()],
        ..Assigned::default()
    };
    with_addresses.status.assigned = Some(Arc::new(assigned));
    let daemon = Daemon::start(vec![with_addresses]).await;
    let raw = daemon.raw(&["--list-sas"]).await;
    let expected = "rekey-time=13041 local-vips=[10.3.0.1 fd03::1] remote-vips=[10.4.0.1] child-sas {";
    assert!(raw.contains(expected), "{raw}");
    let printed = daemon.out(&["--list-sas"]).await;
    assert!(printed.contains("local  'a.example' @ 10.99.0.1[4500] [10.3.0.1 fd03::1]"), "{printed}");
    assert!(printed.contains("remote 'b.example' @ 10.99.0.2[4500] [10.4.0.1]"), "{printed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn list_sas_prints_what_charon_prints() {
    let daemon = Daemon::start(vec![sa()]).await;
    assert_eq!(
        daemon.raw(&["--list-sas"]).await,
        "list-sa event {gw {uniqueid=3 version=2 state=ESTABLISHED local-host=10.99.0.1 local-port=4500 \
         local-id=a.example remote-host=10.99.0.2 remote-port=4500 remote-id=b.example initiator=yes \
         initiator-spi=8313deb95fabc676 responder-spi=3318681acca7400e nat-remote=yes nat-any=yes encr-alg=AES_CBC \
         encr-keysize=128 integ-alg=HMAC_SHA2_256_128 prf-alg=PRF_HMAC_SHA2_256 dh-group=CURVE_25519 established=34 \
         rekey-time=13041 child-sas {net-4 {name=net uniqueid=4 reqid=1 state=INSTALLED mode=TUNNEL protocol=ESP \
         encap=yes spi-in=8906bf9c spi-out=4ef02b7a encr-alg=AES_GCM_16 encr-keysize=256 dh-group=CURVE_25519 \
         bytes-in=84 packets-in=1 use-in=0 bytes-out=84 packets-out=1 use-out=0 rekey-time=3252 life-time=3960 \
         install-time=0 local-ts=[10.1.0.0/16] remote-ts=[10.2.0.0/16] plane=user-space plane-reason=configured}}}}\nlist-sas reply {}\n"
    );
    assert_eq!(
        daemon.out(&["--list-sas"]).await,
        "gw: #3, ESTABLISHED, IKEv2, 8313deb95fabc676_i* 3318681acca7400e_r\n\
        \x20 local  'a.example' @ 10.99.0.1[4500]\n\
        \x20 remote 'b.example' @ 10.99.0.2[4500]\n\
        \x20 AES_CBC-128/HMAC_SHA2_256_128/PRF_HMAC_SHA2_256/CURVE_25519\n\
        \x20 established 34s ago, rekeying in 13041s\n\
        \x20 net: #4, reqid 1, INSTALLED, TUNNEL-in-UDP, ESP:AES_GCM_16-256/CURVE_25519\n\
        \x20   installed 0s ago, rekeying in 3252s, expires in 3960s\n\
        \x20   in  8906bf9c,     84 bytes,     1 packets,     0s ago\n\
        \x20   out 4ef02b7a,     84 bytes,     1 packets,     0s ago\n\
        \x20   local  10.1.0.0/16\n\
        \x20   remote 10.2.0.0/16\n"
    );
    assert!(daemon.raw(&["--list-sas", "--ike-id", "3"]).await.contains("list-sa event"));
    assert_eq!(daemon.raw(&["--list-sas", "--ike-id", "4"]).await, "list-sas reply {}\n");
    assert_eq!(daemon.raw(&["--list-sas", "--child", "other"]).await, "list-sas reply {}\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn version_statistics_algorithms_pools_and_counters_are_answered() {
    let daemon = Daemon::start(vec![sa()]).await;
    let version = daemon.out(&["--version", "--daemon"]).await;
    assert!(version.contains("latchkeyd") && version.contains(env!("CARGO_PKG_VERSION")), "{version}");
    let stats = daemon.out(&["--stats"]).await;
    assert!(stats.contains("IKE_SAs: 1 total, 0 half-open") && stats.contains("job queues: 0/0/0/0"), "{stats}");
    let stats = daemon.out(&["--stats", "--raw"]).await;
    assert!(stats.contains("latch-flows {latches=3 without-room=4 in-conflict=5 dropped=6}"), "{stats}");
    let algorithms = daemon.out(&["--list-algs"]).await;
    assert!(algorithms.contains("AES_GCM_16[aws-lc]") && algorithms.contains("CURVE_25519"), "{algorithms}");
    assert_eq!(daemon.out(&["--list-pools"]).await, "");
    assert_eq!(daemon.raw(&["--flush-certs"]).await, "flush-certs reply {success=yes}\n");
    assert_eq!(daemon.raw(&["--reload-settings"]).await, "reload-settings reply {success=yes}\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn counters_are_those_of_charon() {
    const COUNTS: &str = "ike-rekey-init=1 ike-rekey-resp=2 child-rekey=3 invalid=4 invalid-spi=5 ike-init-in-req=6 \
                          ike-init-in-resp=7 ike-init-out-req=8 ike-init-out-resp=9 ike-auth-in-req=10 \
                          ike-auth-in-resp=11 ike-auth-out-req=12 ike-auth-out-resp=13 create-child-in-req=14 \
                          create-child-in-resp=15 create-child-out-req=16 create-child-out-resp=17 info-in-req=18 \
                          info-in-resp=19 info-out-req=20 info-out-resp=21";
    let daemon = Daemon::start(Vec::new()).await;
    for (arguments, name) in
        [(&["--counters"][..], ""), (&["--counters", "--name", "gw"], "gw"), (&["--counters", "--all"], "(unnamed)")]
    {
        let reply = format!("counters reply {{counters {{{name} {{{COUNTS}}}}} success=yes}}\n");
        assert_eq!(daemon.raw(arguments).await, reply);
    }
    let printed = daemon.out(&["--counters", "--name", "gw"]).await;
    assert!(printed.contains("create-child-out-req") && printed.contains("gw"), "{printed}");
    let unknown = daemon.swanctl(&["--counters", "--name", "other"]).await;
    assert!(!unknown.status.success() && text(&unknown).contains("no counters found for this connection"));
    for (arguments, told) in [
        (&["--counters", "--reset"][..], "reset Total"),
        (&["--counters", "--reset", "--name", "gw"], "reset Connection(\"gw\")"),
        (&["--counters", "--reset", "--all"], "reset Each"),
    ] {
        daemon.out(arguments).await;
        daemon.wait_for(&[told]).await;
        daemon.told.lock().unwrap().commands.clear();
    }
}

// ---- loading

#[tokio::test(flavor = "multi_thread")]
async fn load_all_loads_credentials_authorities_and_connections() {
    let daemon = Daemon::start(Vec::new()).await;
    let folder = configuration();
    let loaded = daemon.load_all(folder.path()).await;
    for line in [
        "loaded certificate from",
        "loaded private key from",
        "loaded ike secret 'ike-1'",
        "loaded authority 'au'",
        "successfully loaded 1 authorities, 0 unloaded",
        "loaded connection 'gw'",
        "successfully loaded 2 connections, 0 unloaded",
    ] {
        assert!(loaded.contains(line), "{line}: {loaded}");
    }
    // As charon 5.9.8 prints it, but IKEv2 only and with the class of authentication always named.
    let expected = "\
gw: IKEv2, no reauthentication, rekeying every 14400s
  local:  10.99.0.1
  remote: 10.99.0.2
  local pre-shared key authentication:
    id: a.example
  remote pre-shared key authentication:
    id: b.example
  net: TUNNEL, rekeying every 3600s
    local:  10.1.0.0/16
    remote: 10.2.0.0/16
  host: TRANSPORT, rekeying every 3600s
    local:  dynamic
    remote: dynamic
cert: IKEv2, no reauthentication, rekeying every 14400s, dpd delay 30s
  local:  %any
  remote: gw.example.com
  remote: 10.0.0.0/8
  local public key authentication:
    id: C=CH, O=x, CN=me
    certs: C=CH, O=x, CN=me
  remote public key authentication:
    id: C=CH, O=x, CN=*
    cacerts: C=CH, O=x, CN=ca
  c: TUNNEL, rekeying every 3600s or 1073741824 bytes, dpd action is start
    local:  dynamic
    remote: dynamic
";
    assert_eq!(daemon.out(&["--list-conns"]).await, expected);
    let raw = daemon.raw(&["--list-conns"]).await;
    assert!(
        raw.starts_with(
            "list-conn event {gw {local_addrs=[10.99.0.1] remote_addrs=[10.99.0.2] version=IKEv2 reauth_time=0 \
             rekey_time=14400 unique=UNIQUE_NO local-1 {id=a.example class=pre-shared key groups=[] cert_policy=[] \
             certs=[] cacerts=[]} remote-1 {id=b.example class=pre-shared key groups=[] cert_policy=[] certs=[] \
             cacerts=[]} children {net {mode=TUNNEL rekey_time=3600 rekey_bytes=0 rekey_packets=0 dpd_action=none \
             close_action=none local-ts=[10.1.0.0/16] remote-ts=[10.2.0.0/16]} host {"
        ),
        "{raw}"
    );
    assert_eq!(
        daemon.out(&["--list-authorities"]).await,
        "au:\n  cacert: C=CH, O=x, CN=ca\n  crl_uris:  http://x/y.crl\n"
    );
    let certificates = daemon.out(&["--list-certs"]).await;
    assert!(
        certificates.contains("\"C=CH, O=x, CN=me\"") && certificates.contains("has private key"),
        "{certificates}"
    );
    let authorities = daemon.raw(&["--list-certs", "--type", "x509", "--flag", "ca"]).await;
    assert_eq!(authorities.matches("list-cert event {type=X509 flag=CA data=0x30").count(), 1, "{authorities}");

    // What is no longer in the file goes away.
    let text = std::fs::read_to_string(folder.path().join("swanctl.conf")).unwrap();
    let (connections, secrets) = text.split_once("authorities {").unwrap();
    std::fs::write(folder.path().join("swanctl.conf"), connections.replacen("gw {", "gw2 {", 1)).unwrap();
    assert!(!secrets.is_empty());
    let reloaded = daemon.load_all(folder.path()).await;
    assert!(
        reloaded.contains("loaded connection 'gw2'") && reloaded.contains("2 connections, 1 unloaded"),
        "{reloaded}"
    );
    assert_eq!(daemon.out(&["--list-authorities"]).await, "");
    assert_eq!(daemon.names(), ["cert", "gw2"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_connection_is_refused_and_the_others_are_loaded() {
    let daemon = Daemon::start(Vec::new()).await;
    let folder = configuration();
    let text = "connections {
        good { remote { auth = psk } }
        typo { remote_adrs = 192.0.2.1 }
        weak { remote { groups = admins } }
        again { remote { auth = psk } } }";
    std::fs::write(folder.path().join("swanctl.conf"), text).unwrap();
    let loaded = daemon.load_all(folder.path()).await;
    assert!(
        loaded.contains("loading connection 'typo' failed: unknown option: remote_adrs, config discarded"),
        "{loaded}"
    );
    assert!(
        loaded.contains("loading connection 'weak' failed: invalid value for: groups, config discarded"),
        "{loaded}"
    );
    assert!(loaded.contains("loaded 2 of 4 connections, 2 failed to load"), "{loaded}");
    assert_eq!(daemon.names(), ["good", "again"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn start_action_initiates_once_and_again_after_a_change() {
    let daemon = Daemon::start(Vec::new()).await;
    let folder = configuration();
    let write = |text: &str| std::fs::write(folder.path().join("swanctl.conf"), text).unwrap();
    write(
        "connections { a { local { auth = psk }\n remote { auth = psk }\n children { n { start_action = start } } } }",
    );
    daemon.load_all(folder.path()).await;
    daemon.load_all(folder.path()).await;
    daemon.wait_for(&["initiate a n"]).await;
    write(
        "connections { a { local { auth = psk }\n remote { auth = psk }\n children { n { start_action = start\n rekey_time = 5h } } } }",
    );
    daemon.load_all(folder.path()).await;
    daemon.wait_for(&["initiate a n", "terminate a n", "initiate a n"]).await;
    write("connections { }");
    daemon.load_all(folder.path()).await;
    daemon.wait_for(&["initiate a n", "terminate a n", "initiate a n", "terminate a n"]).await;
}

// ---- commands and events

#[tokio::test(flavor = "multi_thread")]
async fn initiate_logs_and_answers() {
    let daemon = Daemon::start(vec![sa()]).await;
    daemon.load_all(configuration().path()).await;
    assert_eq!(
        daemon.out(&["--initiate", "--child", "net"]).await,
        "[IKE] initiating IKE_SA gw[3] to 10.99.0.2\ninitiate completed successfully\n"
    );
    assert_eq!(
        daemon.raw(&["--initiate", "--child", "net"]).await,
        "log {group=IKE level=0 ikesa-name=gw ikesa-uniqueid=3 msg=initiating IKE_SA gw[3] to 10.99.0.2}\n\
         initiate reply {success=yes}\n"
    );
    let refused = daemon.swanctl(&["--initiate", "--child", "host"]).await;
    assert!(text(&refused).contains("initiate failed: establishing CHILD_SA 'host' failed"), "{}", text(&refused));
    let begin = Instant::now();
    let late = daemon.swanctl(&["--initiate", "--child", "c", "--timeout", "1"]).await;
    assert!(text(&late).contains("initiate failed: CHILD_SA 'c' not established after 1000ms"), "{}", text(&late));
    assert!(begin.elapsed() < Duration::from_secs(30), "the daemon's own limit, not swanctl's patience");
}

#[tokio::test(flavor = "multi_thread")]
async fn terminate_and_rekey_count_what_matched() {
    let daemon = Daemon::start(vec![sa()]).await;
    let answer = daemon.raw(&["--terminate", "--ike", "gw"]).await;
    assert_eq!(answer.lines().last().unwrap(), "terminate reply {success=yes matches=1 terminated=1}");
    assert_eq!(daemon.raw(&["--rekey", "--child", "net"]).await, "rekey reply {success=yes matches=1}\n");
    let answer = daemon.raw(&["--rekey", "--ike", "gw", "--reauth"]).await;
    assert_eq!(answer, "rekey reply {success=yes matches=1}\n");
    assert_eq!(daemon.told.lock().unwrap().commands.last().map(String::as_str), Some("reauthenticate gw -"));
}

#[tokio::test(flavor = "multi_thread")]
async fn log_and_monitor_show_events_as_they_happen() {
    let daemon = Daemon::start(vec![sa()]).await;
    let mut monitor = daemon.client().await;
    monitor.register("ike-updown").await.unwrap();
    monitor.register("child-updown").await.unwrap();
    let swanctl = daemon.background(&["--log"]);
    daemon.wait_for_log(&swanctl).await;
    let mut log = daemon.client().await;
    log.register("log").await.unwrap();
    daemon.raise(Event::Log {
        group: "IKE",
        level: 1,
        ike_sa: Some((IkeSaId(3), "gw".to_owned())),
        message: "deleting IKE_SA".to_owned(),
    });
    daemon.raise(Event::Log { group: "ENC", level: 2, ike_sa: None, message: "too much".to_owned() });
    daemon.raise(Event::ChildUp(IkeSaId(3), ChildSaId(4)));
    let status = sa().status;
    daemon.raise(Event::IkeDown(Box::new(status.clone()), CloseReason::Peer));
    daemon.raise(Event::ChildDown {
        ike_sa: IkeSaId(3),
        child: Box::new(status.children[0].clone()),
        reason: CloseReason::Peer,
    });

    let (name, message) = loop {
        // The last of the raised questions may still be on its way.
        let (name, message) = log.next_event().await.unwrap();
        if message.text("msg") != Some("is anybody there?") {
            break (name, message);
        }
    };
    let names: Vec<&str> = message.entries.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!((name.as_str(), message.text("msg")), ("log", Some("deleting IKE_SA")));
    assert_eq!(names, ["group", "level", "thread", "ikesa-name", "ikesa-uniqueid", "msg"]);
    let (name, message) = monitor.next_event().await.unwrap();
    assert_eq!((name.as_str(), message.text("up")), ("child-updown", Some("yes")));
    let child = message.section("gw").unwrap().section("child-sas").unwrap().section("net-4").unwrap();
    assert_eq!(child.text("spi-in"), Some("8906bf9c"));
    let (name, message) = monitor.next_event().await.unwrap();
    assert_eq!((name.as_str(), message.text("up")), ("ike-updown", None));
    assert!(message.section("gw").unwrap().section("child-sas").is_none());
    let (name, message) = monitor.next_event().await.unwrap();
    assert_eq!((name.as_str(), message.text("up")), ("child-updown", None));

    swanctl.prints("00[IKE] deleting IKE_SA").await;
    let printed = swanctl.stop();
    assert!(!printed.contains("too much"), "{printed}");
}

// ---- the socket

#[tokio::test(flavor = "multi_thread")]
async fn the_socket_is_private_replaced_when_stale_and_removed_at_stop() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vici");
    let uri = format!("unix://{}", path.display());
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let (control, _core) = core(Vec::new());
    let store = Arc::new(Store::new(Configured::default()));
    let server = serve(&uri, control.clone(), Arc::clone(&store)).await.expect("a stale socket is replaced");
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
    assert!(serve(&uri, control.clone(), Arc::clone(&store)).await.is_err(), "a socket in use is not taken");
    let mut client = Client::connect(&uri).await.unwrap();
    client.request("version", Client::message()).await.unwrap();
    server.stop().await;
    assert!(!path.exists());
    assert!(client.request("version", Client::message()).await.is_err(), "clients are closed at stop");
    std::fs::write(&path, "a file").unwrap();
    assert!(serve(&uri, control.clone(), Arc::clone(&store)).await.is_err(), "a file is not removed");
    assert!(serve("tcp://0.0.0.0:0", control.clone(), Arc::clone(&store)).await.is_err());
    let server = serve("tcp://127.0.0.1:0", control, store).await.unwrap();
    let output = run(&["--version", "--daemon", "--uri", server.uri()]).await;
    assert!(text(&output).contains("latchkeyd"));
}

// ---- helpers

const SWANCTL: &str = "/usr/sbin/swanctl";

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

async fn run(arguments: &[&str]) -> Output {
    let mut process = Process::new(SWANCTL);
    process.args(arguments).stdin(Stdio::null());
    tokio::task::spawn_blocking(move || process.output().expect("swanctl is missing: apt install strongswan-swanctl"))
        .await
        .unwrap()
}

/// What the core was told.
#[derive(Default)]
struct Told {
    connections: Vec<ConnectionDefinition>,
    commands: Vec<String>,
}

struct Daemon {
    server: ServerHandle,
    control: Control,
    events: broadcast::Sender<Arc<Event>>,
    told: Arc<Mutex<Told>>,
    _folder: tempfile::TempDir,
}

struct Core {
    events: broadcast::Sender<Arc<Event>>,
    told: Arc<Mutex<Told>>,
}

/// For an engine that has pools only.
struct NoRandomness;

impl ike::Rng for NoRandomness {
    fn fill(&mut self, _: &mut [u8]) {}
}

/// A core with fixed SAs: `net` can be initiated, `host` fails, anything else never answers.
fn core(sas: Vec<SaReport>) -> (Control, Core) {
    let (commands, mut received) = mpsc::channel(16);
    let (events, _) = broadcast::channel(64);
    let told = Arc::new(Mutex::new(Told::default()));
    let core = Core { events: events.clone(), told: Arc::clone(&told) };
    let raised = events.clone();
    tokio::spawn(async move {
        let mut unanswered = Vec::new();
        let mut pools = Engine::new(EngineConfig::default(), Box::new(NoRandomness), Instant::now());
        while let Some(command) = received.recv().await {
            let matching = |ike: &Option<String>, child: &Option<String>| {
                let found = sas.iter().any(|report| {
                    ike.as_ref().is_none_or(|ike| *ike == report.status.connection)
                        && child
                            .as_ref()
                            .is_none_or(|name| report.status.children.iter().any(|child| child.name == *name))
                });
                Matched { matches: usize::from(found), done: usize::from(found) }
            };
            let note = |what: &str, ike: &Option<String>, child: &Option<String>| {
                let (ike, child) = (ike.as_deref().unwrap_or("-"), child.as_deref().unwrap_or("-"));
                told.lock().unwrap().commands.push(format!("{what} {ike} {child}"));
            };
            match command {
                Command::ListSas { filter, after, reply } => {
                    // One at a time.
                    let mut meant = sas.iter().filter(|report| report.status.id > after);
                    let first = meant.next();
                    let next = first.map(|report| report.status.id).filter(|_| meant.next().is_some());
                    let reports = first.filter(|report| filter.selects(&report.status)).cloned().into_iter().collect();
                    let _ = reply.send(SaPage { reports, next });
                }
                Command::CountPackets(reply) => {
                    let automatic = AutomaticFlows { latches: 3, without_room: 4, in_conflict: 5, dropped: 6 };
                    drop(reply.send(Packets { dropped: Vec::new(), automatic: Some(automatic) }));
                }
                Command::CountSas(reply) => {
                    let _ = reply.send((sas.len(), 0));
                }
                Command::Initiate { ike, child, reply } => {
                    note("initiate", &ike, &child);
                    match child.as_deref() {
                        Some("net") => {
                            let line = |connection: &str, level, message: &str| Event::Log {
                                group: "IKE",
                                level,
                                ike_sa: Some((IkeSaId(3), connection.to_owned())),
                                message: message.to_owned(),
                            };
                            let _ = raised.send(Arc::new(line("gw", 0, "initiating IKE_SA gw[3] to 10.99.0.2")));
                            let _ = raised.send(Arc::new(line("gw", 2, "too much detail")));
                            let _ = raised.send(Arc::new(line("other", 0, "of another connection")));
                            let _ = reply.send(Ok(()));
                        }
                        Some("host") => {
                            let _ = reply.send(Err("establishing CHILD_SA 'host' failed".to_owned()));
                        }
                        _ => unanswered.push(reply),
                    }
                }
                // VICI never asks for it.
                Command::Survey { reply, .. } => drop(reply.send(Vec::new())),
                Command::InitiateFlow { reply, .. } => unanswered.push(reply),
                Command::ReloadSettings(reply) => {
                    let _ = reply.send(Ok(()));
                }
                Command::Terminate { filter, reply, .. } => {
                    note("terminate", &filter.ike, &filter.child);
                    let _ = reply.send(matching(&filter.ike, &filter.child));
                }
                Command::Rekey { filter, reauth, reply } => {
                    note(if reauth { "reauthenticate" } else { "rekey" }, &filter.ike, &filter.child);
                    let _ = reply.send(matching(&filter.ike, &filter.child));
                }
                Command::Redirect { filter, gateway, reply } => {
                    note("redirect", &filter.ike, &Some(gateway.to_string()));
                    let _ = reply.send(matching(&filter.ike, &None));
                }
                Command::ListPolicies(reply) => {
                    let network = |text: &str| TrafficSelector::network(text.parse().unwrap(), 24).unwrap();
                    let _ = reply.send(vec![PolicyReport {
                        ike: "site".to_owned(),
                        child: "net".to_owned(),
                        kind: PolicyKind::Trap(Mode::Tunnel),
                        local_ts: vec![network("10.1.0.0")],
                        remote_ts: vec![network("10.2.0.0")],
                    }]);
                }
                Command::Install { child, reply, .. } => {
                    let known = child == "net";
                    let _ = reply.send(known.then_some(()).ok_or_else(|| "configuration name not found".to_owned()));
                }
                Command::Uninstall { child, reply, .. } => {
                    let known = child == "net";
                    let _ = reply.send(known.then_some(()).ok_or_else(|| format!("policy '{child}' not found")));
                }
                Command::Counters(of, reply) => {
                    let counts = Counter::ALL.into_iter().zip(1..).collect();
                    let connection = match of {
                        Counted::Total => None,
                        Counted::Connection(name) if name == "gw" => Some(name),
                        Counted::Connection(_) => {
                            let _ = reply.send(Vec::new());
                            continue;
                        }
                        Counted::Each => Some("(unnamed)".to_owned()),
                    };
                    let _ = reply.send(vec![CounterReport { connection, counts }]);
                }
                Command::ResetCounters(of, reply) => {
                    told.lock().unwrap().commands.push(format!("reset {of:?}"));
                    let _ = reply.send(());
                }
                Command::LoadPool(pool, reply) => {
                    let _ = reply.send(pools.load_pool(*pool));
                }
                Command::UnloadPool(name, reply) => {
                    let _ = reply.send(pools.unload_pool(&name));
                }
                Command::ListPools(reply) => {
                    let _ = reply.send(pools.pools());
                }
                Command::SetConnections(connections, reply) => {
                    told.lock().unwrap().connections = connections;
                    let _ = reply.send(());
                }
                Command::SetCredentials(_, reply) => {
                    let _ = reply.send(());
                }
                Command::Shutdown(reply) => {
                    let _ = reply.send(());
                }
            }
        }
    });
    (Control::new(commands, events), core)
}

impl Daemon {
    async fn start(sas: Vec<SaReport>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (control, core) = core(sas);
        let uri = format!("unix://{}", folder.path().join("vici").display());
        let store = Arc::new(Store::new(Configured::default()));
        let server = serve(&uri, control.clone(), store).await.unwrap();
        Self { server, control, events: core.events, told: core.told, _folder: folder }
    }

    fn uri(&self) -> &str {
        self.server.uri()
    }

    async fn client(&self) -> Client {
        Client::connect(self.uri()).await.unwrap()
    }

    async fn swanctl(&self, arguments: &[&str]) -> Output {
        run(&[arguments, &["--uri", self.uri()]].concat()).await
    }

    async fn out(&self, arguments: &[&str]) -> String {
        let output = self.swanctl(arguments).await;
        assert!(output.status.success(), "{arguments:?}: {}", text(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    async fn raw(&self, arguments: &[&str]) -> String {
        let output = self.swanctl(&[arguments, &["--raw"]].concat()).await;
        String::from_utf8(output.stdout).unwrap()
    }

    async fn load_all(&self, folder: &Path) -> String {
        let (folder, uri) = (folder.to_owned(), self.uri().to_owned());
        let output = tokio::task::spawn_blocking(move || {
            Process::new(SWANCTL)
                .args(["--load-all", "--noprompt", "--uri", &uri])
                .env("SWANCTL_DIR", folder)
                .stdin(Stdio::null())
                .output()
                .expect("swanctl is missing: apt install strongswan-swanctl")
        });
        text(&output.await.unwrap())
    }

    fn background(&self, arguments: &[&str]) -> Background {
        // Without a terminal swanctl keeps its lines until the end; stdbuf makes it print them.
        let mut child = Process::new("stdbuf")
            .args(["-oL", SWANCTL])
            .args(arguments)
            .args(["--uri", self.uri()])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("swanctl is missing: apt install strongswan-swanctl");
        let printed = Arc::new(Mutex::new(String::new()));
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let into = Arc::clone(&printed);
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                into.lock().unwrap().push_str(&(line + "\n"));
            }
        });
        Background { child, printed }
    }

    /// Waits until the background swanctl is registered for log lines: it prints what is raised.
    async fn wait_for_log(&self, swanctl: &Background) {
        let end = Instant::now() + Duration::from_secs(20);
        while swanctl.printed.lock().unwrap().is_empty() {
            assert!(Instant::now() < end, "swanctl prints no log");
            self.raise(Event::Log { group: "IKE", level: 0, ike_sa: None, message: "is anybody there?".to_owned() });
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    fn raise(&self, event: Event) {
        let _ = &self.control;
        self.events.send(Arc::new(event)).expect("the server listens");
    }

    fn names(&self) -> Vec<String> {
        let told = self.told.lock().unwrap();
        told.connections.iter().map(|definition| definition.connection.name.clone()).collect()
    }

    async fn wait_for(&self, expected: &[&str]) {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            let commands = self.told.lock().unwrap().commands.clone();
            if commands == expected {
                return;
            }
            assert!(Instant::now() < end, "{commands:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

struct Background {
    child: std::process::Child,
    printed: Arc<Mutex<String>>,
}

impl Background {
    /// Waits until it has printed something.
    async fn prints(&self, what: &str) {
        let end = Instant::now() + Duration::from_secs(20);
        while !self.printed.lock().unwrap().contains(what) {
            assert!(Instant::now() < end, "{what:?} is not in {:?}", self.printed.lock().unwrap());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Ends it and gives all that it printed.
    fn stop(mut self) -> String {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        self.printed.lock().unwrap().clone()
    }
}

/// The SA that charon showed when the expected texts were taken.
fn sa() -> SaReport {
    let local: SocketAddr = "10.99.0.1:4500".parse().unwrap();
    let remote: SocketAddr = "10.99.0.2:4500".parse().unwrap();
    let network = |text: &str| TrafficSelector::network(text.parse().unwrap(), 16).unwrap();
    let child = ChildSaStatus {
        id: ChildSaId(4),
        name: "net".to_owned(),
        reqid: 1,
        tags: Tags::default(),
        state: ChildState::Installed,
        mode: Mode::Tunnel,
        spi_in: 0x8906_bf9c,
        spi_out: 0x4ef0_2b7a,
        encapsulation: Some(Encapsulation::Udp { local, remote }),
        suite: Some(EspSuite { encr: Encr::AES_GCM_16, key_bits: 256, integ: Integ::NONE, esn: false }),
        ke: Ke::X25519,
        additional: AdditionalKe::NONE,
        installed: Some(Duration::ZERO),
        rekey_in: Some(Duration::from_secs(3252)),
        expires_in: Some(Duration::from_secs(3960)),
        local_ts: vec![network("10.1.0.0")],
        remote_ts: vec![network("10.2.0.0")],
    };
    let status = IkeSaStatus {
        id: IkeSaId(3),
        connection: "gw".to_owned(),
        state: IkeState::Established,
        path: IkePath { local, remote, transport: Transport::UdpEncap },
        local_id: Some(Identity::Fqdn("a.example".to_owned())),
        remote_id: Some(Identity::Fqdn("b.example".to_owned())),
        peer: None,
        initiator: true,
        initiator_spi: 0x8313_deb9_5fab_c676,
        responder_spi: 0x3318_681a_cca7_400e,
        nat_local: false,
        nat_remote: true,
        nat_fake: false,
        suite: Some(IkeSuite {
            encr: Encr::AES_CBC,
            key_bits: 128,
            integ: Integ::HMAC_SHA2_256_128,
            prf: Prf::HMAC_SHA2_256,
            ke: Ke::X25519,
            additional: AdditionalKe::NONE,
        }),
        established: Some(Duration::from_secs(34)),
        rekey_in: Some(Duration::from_secs(13_041)),
        reauth_in: None,
        assigned: None,
        resumed: false,
        tasks_active: Vec::new(),
        children: vec![child],
    };
    let usage = Usage {
        bytes_in: 84,
        packets_in: 1,
        idle_in: Some(Duration::ZERO),
        bytes_out: 84,
        packets_out: 1,
        idle_out: Some(Duration::ZERO),
    };
    SaReport {
        if_ids: (0, 0),
        status,
        usage: vec![Some((usage, ipsec::plane::Carrier { name: "user-space", reason: "configured" }))],
    }
}

/// A swanctl folder with a CA, a certificate and its key.
fn configuration() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| -> PathBuf { folder.path().join(name) };
    for sub in [
        "x509", "x509ca", "private", "x509ocsp", "x509aa", "x509ac", "x509crl", "pubkey", "rsa", "ecdsa", "bliss",
        "pkcs8", "pkcs12",
    ] {
        std::fs::create_dir(file(sub)).unwrap();
    }
    let parameters = |name: &str| {
        let mut parameters = rcgen::CertificateParams::default();
        let mut subject = rcgen::DistinguishedName::new();
        subject.push(rcgen::DnType::CountryName, "CH");
        subject.push(rcgen::DnType::OrganizationName, "x");
        subject.push(rcgen::DnType::CommonName, name);
        parameters.distinguished_name = subject;
        parameters
    };
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let mut ca = parameters("ca");
    ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca_certificate = ca.self_signed(&ca_key).unwrap();
    let issuer = rcgen::Issuer::new(ca, ca_key);
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = parameters("me").signed_by(&key, &issuer).unwrap();
    std::fs::write(file("x509ca/ca.pem"), ca_certificate.pem()).unwrap();
    std::fs::write(file("x509/me.pem"), certificate.pem()).unwrap();
    std::fs::write(file("private/me.pem"), key.serialize_pem()).unwrap();
    std::fs::write(
        file("swanctl.conf"),
        "connections {
            gw {
                local_addrs = 10.99.0.1
                remote_addrs = 10.99.0.2
                version = 2
                local { auth = psk
                    id = a.example }
                remote { auth = psk
                    id = b.example }
                children {
                    net { esp_proposals = aes256gcm16-x25519
                        local_ts = 10.1.0.0/16
                        remote_ts = 10.2.0.0/16 }
                    host { mode = transport
                        esp_proposals = aes128-sha256 } } }
            cert {
                remote_addrs = gw.example.com, 10.0.0.0/8
                local { certs = me.pem }
                remote { id = \"C=CH, O=x, CN=*\"
                    cacerts = ca.pem }
                dpd_delay = 30s
                unique = replace
                children { c { rekey_bytes = 1g
                    dpd_action = restart
                    close_action = trap } } } }
        authorities { au { cacert = ca.pem
            crl_uris = http://x/y.crl } }
        secrets { ike-1 { id = a.example
            id2 = b.example
            secret = hello } }\n",
    )
    .unwrap();
    folder
}
