//! Who may ask for what on the latch socket, with users and groups of the system and a daemon's own configuration.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use latchkey_tests::daemon::Kind::Latchkey;
use latchkey_tests::daemon::{Daemon, program};
use latchkey_tests::host::Host;
use latchkey_tests::scene::{Suite, configurations, hosts};
use latchkey_tests::witness::{Echo, Talk, Talker};

/// Becomes a user with groups, sends requests to the daemon, and prints of each answer the code of its refusal, or its result.
const ASKER: &str = r#"
import json, os, socket, sys
os.setgroups([int(group) for group in sys.argv[3].split(",")])
os.setresgid(4700, 4700, 4700)
os.setresuid(*3 * [int(sys.argv[2])])
service = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
service.connect(sys.argv[1])
for number, request in enumerate(["hello {\"version\": 1}"] + sys.argv[4:]):
    name, arguments = request.split(" ", 1)
    message = {"id": number, "request": name, "arguments": json.loads(arguments)}
    descriptors = []
    if name in ("create", "listen"):
        held = socket.socket()
        held.bind(("10.1.0.1", 0))
        descriptors = [held.fileno()]
    socket.send_fds(service, [json.dumps(message).encode()], descriptors)
    answer = json.loads(service.recv(65536))
    if number:
        print(answer.get("code") or json.dumps(answer["result"]), answer.get("message", ""))
"#;

/// What a user with these supplementary groups is answered.
fn ask(daemon: &Daemon, host: &Host, user: u32, groups: &str, requests: &[&str]) -> Vec<String> {
    let (user, socket) = (user.to_string(), daemon.latch_socket());
    let mut args = vec!["-c", ASKER, socket.to_str().unwrap(), &user, groups];
    args.extend_from_slice(requests);
    host.check("python3", &args).lines().map(str::to_owned).collect()
}

// RFC 5660 §2: what applications may ask for is limited by system policy, and by the privileges of the caller.
#[test]
fn users_and_groups_have_the_rights_that_the_settings_give_them() {
    let (host_a, host_b) = hosts();
    let [(of_a, files_a), (of_b, files_b)] = configurations(&Suite::default());
    let _b = Daemon::start(Latchkey, &host_b, &of_b, &files_b);
    let settings = "latch_access {\nlatch = @4710\nlisten = 4711\nsee = @4712\nmanage = 4713\n}\n";
    let a = Daemon::start_with(Latchkey, &host_a, settings, &of_a, &files_a);
    a.initiate("net");
    let _echo = Echo::start(&host_b, "10.2.0.1");
    let talker = Talker::start(&a, &host_a, &Talk::default());
    talker.says("guard");
    // The administrator lets others write to the socket.
    fs::set_permissions(a.latch_socket().parent().unwrap(), fs::Permissions::from_mode(0o711)).unwrap();
    fs::set_permissions(a.latch_socket(), fs::Permissions::from_mode(0o666)).unwrap();

    let flow = r#"{"local": "10.1.0.1:40007", "remote": "10.2.0.1:7"}"#;
    let (show, close) = (r#"show {"latch": 1}"#, r#"close {"latch": 1}"#);
    let (inquire, list) = (format!("inquire {flow}"), "list {}");
    let (create, listen) = (r#"create {"peer": "%any", "remote": "10.2.0.1:7"}"#, r#"listen {"peer": "%any"}"#);
    let all = [list, show, &inquire, create, listen, close];
    let empty = r#"{"latches": [], "more": false} "#;
    let refused = |answers: &[String], rights: &[&str]| {
        assert_eq!(answers.len(), rights.len(), "{answers:?}");
        for (answer, right) in answers.iter().zip(rights) {
            let names = format!("latch_access.{right} in strongswan.conf");
            assert!(answer.starts_with("permission ") && answer.contains(&names), "{right}: {answer}");
        }
    };
    // A user's number is no group's.
    let answers = ask(&a, &host_a, 4712, "4711,4713", &all);
    assert_eq!(answers[0], empty);
    refused(&answers[1..], &["see", "see", "latch", "listen", "manage"]);
    // By a supplementary group, and by the user's own.
    let answers = ask(&a, &host_a, 4711, "4799,4712", &all);
    assert!(answers[0].contains("\"peer\": \"b.example\""), "{answers:?}");
    assert!(answers[1].contains("10.2.0.1:7") && answers[2].contains("b.example"), "{answers:?}");
    assert!(answers[4].contains("\"local\": \"10.1.0.1:"), "{answers:?}");
    refused(&[answers[3].clone(), answers[5].clone()], &["latch", "manage"]);
    let answers = ask(&a, &host_a, 4710, "4710", &[create, show]);
    assert!(answers[0].contains("\"peer\""), "{answers:?}");
    refused(&answers[1..], &["see"]);

    // Read again while the daemon runs: all that is not named has its default, and one error changes nothing.
    let path = a.path("strongswan.conf");
    let text = fs::read_to_string(&path).unwrap();
    let bad = text.replace("see = @4712", "seee = @4712");
    fs::write(&path, &bad).unwrap();
    assert!(!a.swanctl(&["--reload-settings"]).status.success());
    refused(&ask(&a, &host_a, 4712, "4799", &[show]), &["see"]);
    let check = |expected: bool| {
        let (settings, folder) = (path.to_str().unwrap(), a.path("swanctl"));
        let args = ["check", "--strongswan-conf", settings, "--swanctl-dir", folder.to_str().unwrap()];
        let output = Command::new(program("latchkey")).args(args).output().unwrap();
        assert_eq!(output.status.success(), expected);
        String::from_utf8(output.stdout).unwrap()
    };
    let line = bad.lines().position(|line| line.contains("seee")).unwrap() + 1;
    let said = check(false);
    assert!(said.contains(&format!("error: {}:{line}:", path.display())) && said.contains("seee"), "{said}");
    fs::write(&path, text.replace("see = @4712", "see = root, 4714")).unwrap();
    check(true);
    a.control(&["--reload-settings"]);
    refused(&ask(&a, &host_a, 4711, "4712", &[show]), &["see"]);
    assert!(ask(&a, &host_a, 4714, "4799", &[show])[0].contains("b.example"));
    let answers = ask(&a, &host_a, 4713, "4799", &[close, show]);
    assert_eq!(answers[0].trim(), "{}");
    refused(&answers[1..], &["see"]);
    talker.says("alert closed closed by the administrator");
}
