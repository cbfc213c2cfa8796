//! The latch commands of `latchkey` one by one: what they print, and what they say to wrong input.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::process::{Command, Output};
use std::time::Duration;

use latchkey_tests::daemon::Kind::Latchkey;
use latchkey_tests::daemon::{Daemon, program};
use latchkey_tests::host::{Host, wait_for};
use latchkey_tests::scene::{Scene, Suite};
use latchkey_tests::talker::Talker;
use latchkey_tests::witness::{self, Talk};

fn command(daemon: &Daemon, host: &Host, args: &[&str]) -> Command {
    let socket = daemon.latch_socket();
    let mut all = args.to_vec();
    all.extend_from_slice(&["--socket", socket.to_str().unwrap()]);
    host.command(program("latchkey").to_str().unwrap(), &all)
}

fn talker(daemon: &Daemon, host: &Host, name: &str, args: &[&str]) -> Talker {
    Talker::start(command(daemon, host, args), daemon.path(name))
}

fn run(daemon: &Daemon, host: &Host, args: &[&str]) -> Result<String, String> {
    let Output { status, stdout, stderr } = command(daemon, host, args).output().unwrap();
    let text = |octets: &[u8]| String::from_utf8_lossy(octets).into_owned();
    if status.success() { Ok(text(&stdout)) } else { Err(text(&stdout) + &text(&stderr)) }
}

#[test]
fn the_latch_commands_tell_and_break_and_refuse() {
    let scene = Scene::works(Latchkey, Latchkey, &Suite::default());
    let (a, b, host_a, host_b) = (&scene.a, &scene.b, &scene.host_a, &scene.host_b);
    let watch = talker(a, host_a, "watch", &["latches", "--watch"]);
    let json = talker(a, host_a, "json", &["latches", "--watch", "--json"]);
    let server = talker(b, host_b, "server", &["nc", "-l", "10.2.0.1", "4000"]);
    server.tells("listening");
    // RFC 5660 §5.5 a: it waits; the administrator's break is for good all the same.
    let connect = ["nc", "--on-break", "wait", "--peer", "b.example", "-s", "10.1.0.1:40000", "10.2.0.1", "4000"];
    let mut client = talker(a, host_a, "client", &connect);
    client.types("word\n");
    server.prints("word\n");
    watch.prints("  established  10.1.0.1 port 40000 to 10.2.0.1 port 4000");
    watch.prints(": the peer is b.example");
    json.prints("\"state\":\"established\"");
    let listed = run(a, host_a, &["latches"]).unwrap();
    let number = listed.split_whitespace().next().unwrap();

    // RFC 5660 §6.2.
    assert_eq!(run(a, host_a, &["latch", "break", number]).unwrap(), "");
    client.tells("the latch is broken: broken by the administrator");
    watch.prints(": broken by the administrator");
    json.prints("\"reason\":\"broken by the administrator\"");
    assert!(run(a, host_a, &["latch", "show", number]).unwrap().contains(&format!("latch: {number} broken")));
    assert!(run(a, host_a, &["latches"]).unwrap().contains("  broken       tcp  10.1.0.1:40000 - 10.2.0.1:4000"));
    for wrong in [["latch", "break", "4711"], ["latch", "close", "4711"], ["latch", "show", "4711"]] {
        let said = run(a, host_a, &wrong).unwrap_err();
        assert!(said.contains("there is no connection latch 4711 (no-such-latch)"), "{said}");
    }
    run(a, host_a, &["latch", "close", number]).unwrap();
    client.tells("the latch is closed: closed by the administrator");
    watch.prints("  closed       10.1.0.1 port 40000");
    client.ends();

    // A flow of UDP, which no latch is for; and one that no SA protects.
    let said = run(a, host_a, &["whois", "--udp", "10.1.0.1:53", "10.2.0.1:53"]).unwrap();
    assert!(said.contains("b.example by shared key, to us as a.example"), "{said}");
    assert!(said.contains("tunnel mode") && said.contains("latch: none"), "{said}");
    // RFC 5660 §2: outer addresses, and what the peer's inner one rests on.
    assert!(
        said.contains("SA: site ")
            && said.contains(", 192.0.2.1:4500 to 192.0.2.2:4500 over udp-encapsulated, AUTH method 2;"),
        "{said}"
    );
    assert!(said.contains("the peer's address is one that the configuration lets nobody else have"), "{said}");
    let said = run(a, host_a, &["whois", "--udp", "--json", "10.1.0.1:53", "10.2.0.1:53"]).unwrap();
    assert!(said.contains("\"nat_remote\": false") && said.contains("\"remote_ts\": [\n"), "{said}");
    assert!(said.contains("\"protocol\": 17") && said.contains("\"latch\": null"), "{said}");
    let said = run(a, host_a, &["whois", "--udp", "10.1.0.1:53", "10.9.0.1:53"]).unwrap_err();
    assert!(said.contains("no SA protects") && said.contains("(no-sa)"), "{said}");

    for (args, reason) in [
        (&["nc", "10.2.0.1"][..], "HOST and PORT are needed"),
        (&["nc", "10.2.0.1", "port"], "port is not a port"),
        (&["nc", "10.2.0.1", "65536"], "65536 is not a port"),
        (&["nc", "-s", "nowhere", "10.2.0.1", "4000"], "nowhere is neither an address nor an address and a port"),
        (&["nc", "-s", "10.9.9.9", "10.2.0.1", "4000"], "binding to 10.9.9.9:0"),
        (&["nc", "--peer", "", "-s", "10.1.0.1", "10.2.0.1", "4000"], "(identity)"),
        (&["nc", "--suite", "rot13", "10.2.0.1", "4000"], "rot13"),
        (&["nc", "--on-break", "shout", "10.2.0.1", "4000"], "invalid value 'shout'"),
        (&["nc", "-l", "--narrow", "4000"], "cannot be used with"),
        (&["nc", "--bypass", "--peer", "b.example", "10.2.0.1", "4000"], "cannot be used with"),
        (&["nc", "-l", "--bypass", "4000"], "cannot be used with"),
        (&["nc", "-l", "nowhere", "4000"], "nowhere is not an address"),
        (&["nc", "-l", "192.0.2.77", "4000"], "listening on 192.0.2.77:4000"),
        (&["nc", "no-such-host.invalid", "4000"], "no-such-host.invalid"),
        (&["nc", "-s", "192.0.2.1", "192.0.2.2", "4000"], "(no-sa)"),
    ] {
        let said = run(a, host_a, args).unwrap_err();
        assert!(said.contains(reason) && !said.contains("panicked"), "{args:?}: {said}");
    }
    drop(scene);
    let said = Command::new(program("latchkey")).args(["latches", "--socket", "/nonexistent"]).output().unwrap();
    let said = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(said.contains("reaching the daemon on /nonexistent: is latchkeyd running?"), "{said}");
}

#[test]
fn each_command_explains_itself() {
    let help = |args: &[&str]| {
        let output = Command::new(program("latchkey")).args(args).arg("--help").output().unwrap();
        assert!(output.status.success(), "{args:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let overview = help(&[]);
    for name in ["demo", "check", "latches", "latch", "nc", "exec", "whois", "daemon"] {
        assert!(overview.lines().any(|line| line.trim_start().starts_with(&format!("{name} "))), "{name}: {overview}");
    }
    for (args, words) in [
        (&["latches"][..], &["--watch", "--json", "--socket", "/run/latchkey/latch.sock"][..]),
        (&["latch"], &["show", "break", "close", "For root"]),
        (&["latch", "break"], &["<LATCH>", "no packet passes"]),
        (&["whois"], &["--udp", "<LOCAL>", "<REMOTE>"]),
        (&["nc"], &["--peer", "--suite", "--narrow", "--bypass", "--on-break", "--listen", "--source", "HOST"]),
        (&["exec"], &["--rule", "--rules-file", "--default", "--library", "--unconfined", "PROGRAM", "docs/exec.md"]),
    ] {
        let text = help(args);
        for word in words {
            assert!(text.contains(word), "{args:?}: {word}: {text}");
        }
        // Every option and argument is described: a line of the help that names one goes on, or the next does.
        let lines: Vec<&str> = text.lines().collect();
        for pair in lines.windows(2) {
            if let [line, next] = pair
                && ["-", "<"].iter().any(|start| line.trim_start().starts_with(start))
                // Not those of the values that an option takes.
                && !line.trim_start().starts_with("- ")
            {
                let described = line.trim().split_once("  ").is_some() || next.trim().len() > 3;
                assert!(described, "{args:?}: {line}");
            }
        }
    }
}

// RFC 5660 §2: a policy that was made for a latch goes with the connection, without a daemon too, when somebody says so; not
// while a socket is there that would go on in clear.
#[test]
fn what_a_stopped_daemon_left_shut_is_lifted_when_nothing_uses_it() {
    let mut scene = Scene::works(Latchkey, Latchkey, &Suite::default());
    let lift = |scene: &Scene| run(&scene.a, &scene.host_a, &["lift"]);
    // A program whose socket outlives the daemon. It is gone with the program, as a TCP connection may not be for minutes.
    let talk = Talk { udp: true, ..Talk::default() };
    let program = witness::Talker::start(&scene.a, &scene.host_a, &talk);
    program.says("connected");
    assert!(lift(&scene).unwrap_err().contains("the daemon runs"));
    assert!(scene.a.stop());
    let policies = |scene: &Scene| scene.host_a.check("ip", &["xfrm", "policy"]);
    assert!(policies(&scene).contains("sport 40007"), "{}", policies(&scene));
    assert_eq!(lift(&scene).unwrap(), "lifted: 0, in use: 1\n");
    assert!(policies(&scene).contains("sport 40007"));
    drop(program);
    wait_for("the socket's end", Duration::from_secs(20), || lift(&scene).unwrap() == "lifted: 1, in use: 0\n");
    assert_eq!(policies(&scene), "");
    assert_eq!(lift(&scene).unwrap(), "lifted: 0, in use: 0\n");
}
