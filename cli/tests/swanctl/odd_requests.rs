//! Clients that send what `swanctl` never would, over raw sockets: each is told what is wrong, and nobody else notices.

use latchkey::tree::Section;
use latchkey::vici::codec::{MAX_PACKET, Packet, encode_message};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::*;

const WITHIN: Duration = Duration::from_secs(20);

struct Raw(UnixStream);

fn framed(packet: &[u8]) -> Vec<u8> {
    [&u32::try_from(packet.len()).unwrap().to_be_bytes(), packet].concat()
}

/// CMD_REQUEST with arguments in octets.
fn request(command: &str, arguments: &[u8]) -> Vec<u8> {
    framed(&[&[0, u8::try_from(command.len()).unwrap()], command.as_bytes(), arguments].concat())
}

fn key_value(name: &str, value: &[u8]) -> Vec<u8> {
    let length = u16::try_from(value.len()).unwrap().to_be_bytes();
    [&[3, u8::try_from(name.len()).unwrap()], name.as_bytes(), &length, value].concat()
}

impl Raw {
    async fn connect(daemon: &Daemon) -> Self {
        Self(UnixStream::connect(daemon.uri().strip_prefix("unix://").unwrap()).await.unwrap())
    }

    async fn send(&mut self, octets: &[u8]) {
        self.0.write_all(octets).await.unwrap();
    }

    /// The next packet; `None` when the connection is closed.
    async fn packet(&mut self) -> Option<Packet> {
        let read = async {
            let length = self.0.read_u32().await.ok()?;
            let mut octets = vec![0; usize::try_from(length).unwrap()];
            self.0.read_exact(&mut octets).await.ok()?;
            Some(Packet::decode(&octets).unwrap())
        };
        tokio::time::timeout(WITHIN, read).await.expect("an answer in time")
    }

    async fn answer(&mut self) -> Section {
        match self.packet().await {
            Some(Packet::Response(answer)) => answer,
            other => panic!("{other:?}"),
        }
    }

    /// The reason of a refusal.
    async fn refusal(&mut self) -> String {
        let answer = self.answer().await;
        assert_eq!(answer.text("success"), Some("no"), "{answer:?}");
        answer.text("errmsg").expect("a reason").to_owned()
    }

    async fn ask(&mut self, command: &str, arguments: &Section) -> Section {
        self.send(&request(command, &encode_message(arguments))).await;
        self.answer().await
    }
}

/// Arguments that are read by name: as text, as octets, as a list.
const TEXTS: [(&str, &[&str]); 24] = [
    ("initiate", &["child", "ike", "timeout", "loglevel"]),
    ("terminate", &["child", "ike", "child-id", "ike-id", "force", "timeout", "loglevel"]),
    ("rekey", &["child", "ike", "child-id", "ike-id", "reauth"]),
    ("redirect", &["ike", "ike-id", "peer-ip", "peer-id", "gateway"]),
    ("install", &["child", "ike"]),
    ("uninstall", &["child", "ike"]),
    ("list-sas", &["child", "ike", "child-id", "ike-id"]),
    ("list-policies", &["child", "ike"]),
    ("list-conns", &["ike"]),
    ("list-certs", &["type", "flag", "subject"]),
    ("list-authorities", &["name"]),
    ("load-cert", &["type", "flag"]),
    ("load-key", &["type"]),
    ("load-shared", &["id", "type"]),
    ("unload-key", &["id"]),
    ("unload-shared", &["id"]),
    ("unload-conn", &["name"]),
    ("unload-authority", &["name"]),
    ("unload-pool", &["name"]),
    ("get-pools", &["leases", "name"]),
    ("get-counters", &["all", "name"]),
    ("reset-counters", &["all", "name"]),
    ("load-cert", &["data"]),
    ("load-key", &["data"]),
];

#[tokio::test(flavor = "multi_thread")]
async fn arguments_of_another_kind_are_refused_by_name() {
    let daemon = Daemon::start(vec![sa()]).await;
    let mut raw = Raw::connect(&daemon).await;
    for (command, names) in TEXTS {
        for name in names {
            let (mut section, mut list) = (Client::message(), Client::message());
            section.push_section(*name, Client::message());
            list.push_list(*name, ["gw"]);
            let mut wrong = vec![encode_message(&section), encode_message(&list)];
            if *name != "data" {
                wrong.extend([key_value(name, &[0xff, 0xfe]), key_value(name, b"gw\0")]);
            }
            for arguments in wrong {
                // What would be missing without it is there: the whole command would otherwise do more than was asked.
                let others = ["child", "ike", "gateway", "type", "data"].iter().filter(|other| *other != name);
                let others = others.flat_map(|other| key_value(other, b"gw"));
                let all: Vec<u8> = arguments.iter().copied().chain(others).collect();
                raw.send(&request(command, &all)).await;
                assert_eq!(raw.refusal().await, format!("invalid value for: {name}"), "{command}");
            }
        }
    }
    let mut owners = Client::message();
    owners.push_value("type", "ike");
    owners.push_value("data", "secret");
    owners.push_section("owners", Client::message());
    assert_eq!(raw.ask("load-shared", &owners).await.text("errmsg"), Some("invalid value for: owners"));
    // Numbers and booleans that are none.
    for (command, name, value) in [
        ("terminate", "ike-id", "-1"),
        ("terminate", "ike-id", "0x10"),
        ("terminate", "child-id", "99999999999999999999999"),
        ("terminate", "force", "perhaps"),
        ("terminate", "timeout", "soon"),
        ("initiate", "timeout", "9223372036854775808"),
        ("initiate", "loglevel", "1000"),
        ("rekey", "reauth", "2"),
        ("rekey", "ike-id", "1 2"),
        ("list-sas", "child-id", "1.5"),
        ("get-pools", "leases", "many"),
        ("get-counters", "all", ""),
    ] {
        let mut arguments = Client::message();
        arguments.push_value(name, value);
        if name != "ike" {
            arguments.push_value("ike", "gw");
        }
        let answer = raw.ask(command, &arguments).await;
        assert_eq!(answer.text("success"), Some("no"), "{command} {name} {value}");
        assert_eq!(answer.text("errmsg"), Some(format!("invalid value for: {name}").as_str()), "{command}");
    }
    // Nothing of all this reached the core, and swanctl is served.
    assert!(daemon.told.lock().unwrap().commands.is_empty(), "{:?}", daemon.told.lock().unwrap().commands);
    assert!(daemon.out(&["--list-sas"]).await.contains("gw"));
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_arguments_are_named() {
    let daemon = Daemon::start(vec![sa()]).await;
    let mut raw = Raw::connect(&daemon).await;
    for (command, reason) in [
        ("initiate", "missing configuration name"),
        ("terminate", "missing terminate selector"),
        ("rekey", "missing rekey selector"),
        ("redirect", "missing target gateway"),
        ("install", "missing configuration name"),
        ("uninstall", "missing configuration name"),
        ("load-cert", "certificate data missing"),
        ("load-key", "invalid key type ''"),
        ("load-shared", "shared key type missing"),
        ("unload-key", "key id missing"),
        ("unload-shared", "unique identifier missing"),
        ("unload-conn", "unload: missing connection name"),
        ("unload-authority", "unload: missing authority name"),
        ("unload-pool", "missing pool name to unload"),
    ] {
        raw.send(&request(command, &[])).await;
        assert_eq!(raw.refusal().await, reason, "{command}");
        // An empty one is none.
        let empty = ["child", "ike", "ike-id", "child-id", "id", "name", "type", "gateway"];
        let empty: Vec<u8> = empty.iter().flat_map(|name| key_value(name, b"")).collect();
        raw.send(&request(command, &empty)).await;
        assert_eq!(raw.answer().await.text("success"), Some("no"), "{command}");
    }
    // What is loaded comes in sections.
    for command in ["load-conn", "load-pool", "load-authority"] {
        raw.send(&request(command, &key_value("gw", b"1"))).await;
        assert!(raw.refusal().await.contains("gw"), "{command}");
        raw.send(&request(command, &[])).await;
        assert_eq!(raw.answer().await.text("success"), Some("yes"), "{command}");
    }
    assert!(daemon.told.lock().unwrap().commands.is_empty());
}

// The answer says what is wrong with a request whose command can be read, and the connection goes on.
#[tokio::test(flavor = "multi_thread")]
async fn malformed_arguments_are_refused_and_the_connection_goes_on() {
    let daemon = Daemon::start(vec![sa()]).await;
    let mut raw = Raw::connect(&daemon).await;
    let twice = [key_value("ike", b"gw"), key_value("ike", b"other")].concat();
    let deep: Vec<u8> = [[1, 1, b'a']; 40].concat().into_iter().chain([2; 40]).collect();
    for (arguments, reason) in [
        (twice, "a name appears twice in a VICI section"),
        (deep, "VICI sections nest too deep"),
        (vec![1, 1, b'a'], "unbalanced VICI message"),
        (vec![2], "unbalanced VICI message"),
        (vec![6], "misplaced VICI element 6"),
        (vec![99], "misplaced VICI element 99"),
        (vec![3, 3, b'i', b'k', b'e', 0xff, 0xff, b'g'], "truncated VICI packet"),
        (vec![4, 1, b'a', 5, 0, 1, b'x'], "truncated VICI packet"),
        (vec![4, 1, b'a', 4, 1, b'b', 6, 6], "misplaced VICI element 4"),
        (vec![3, 2, 0xc3, 0x28, 0, 0], "malformed name in a VICI message"),
    ] {
        for command in ["terminate", "load-conn", "version"] {
            raw.send(&request(command, &arguments)).await;
            assert_eq!(raw.refusal().await, reason, "{command} {arguments:?}");
        }
    }
    // Every truncation of a good request is refused or is another good one.
    let whole = request("terminate", &[key_value("ike", b"gw"), key_value("timeout", b"-1")].concat());
    for length in 14..whole.len() - 1 {
        raw.send(&framed(&whole[4..=length])).await;
        raw.answer().await;
    }
    raw.send(&request("version", &[])).await;
    assert!(raw.answer().await.text("daemon").is_some());
}

// What cannot be answered ends the connection, of that client alone.
#[tokio::test(flavor = "multi_thread")]
async fn packets_that_are_none_end_the_connection() {
    let daemon = Daemon::start(Vec::new()).await;
    let mut other = Raw::connect(&daemon).await;
    let too_large = u32::try_from(MAX_PACKET + 1).unwrap().to_be_bytes();
    for packet in [
        framed(&[]),
        framed(&[0]),
        framed(&[0, 9, b'v']),
        framed(&[8]),
        framed(&[0xff; 20]),
        framed(&[3, 4, b'l', b'o', b'g']),
        framed(&[3, 3, b'l', b'o', b'g', 0]),
        too_large.to_vec(),
        vec![0xff; 4],
    ] {
        let mut raw = Raw::connect(&daemon).await;
        raw.send(&packet).await;
        assert_eq!(raw.packet().await, None, "{packet:?}");
        other.send(&request("version", &[])).await;
        other.answer().await;
    }
    // The largest packet is read whole.
    let filler = key_value("x", &[b'y'; 60_000]);
    let mut arguments: Vec<u8> = (b'a'..=b'h').flat_map(|name| [&[3, 1, name], &filler[3..]].concat()).collect();
    let rest = MAX_PACKET - 2 - "version".len() - arguments.len();
    arguments.extend(key_value("z", &vec![b'z'; rest - 5]));
    let largest = request("version", &arguments);
    assert_eq!(largest.len(), 4 + MAX_PACKET);
    other.send(&largest).await;
    assert!(other.answer().await.text("daemon").is_some());
    // A name that does not fit into an answer is cut, and the reason arrives.
    let mut long = Client::message();
    long.push_value("child", "ü".repeat(32_000));
    let answer = other.ask("initiate", &long).await;
    assert!(answer.text("errmsg").is_some_and(|reason| reason.starts_with("CHILD_SA config 'üü")), "{answer:?}");
}

// Requests that are sent ahead wait for their turn: all are answered, in order, unknown ones too.
#[tokio::test(flavor = "multi_thread")]
async fn requests_sent_ahead_are_answered_in_order() {
    let daemon = Daemon::start(vec![sa()]).await;
    let Raw(stream) = Raw::connect(&daemon).await;
    let (mut reader, mut writer) = stream.into_split();
    let all: Vec<u8> = (0..1000)
        .flat_map(|n| match n % 4 {
            0 => request("version", &[]),
            1 => request("no-such-command", &key_value("n", b"1")),
            2 => request("unload-conn", &key_value("name", n.to_string().as_bytes())),
            _ => request("get-conns", &[3, 9]),
        })
        .collect();
    let writing = tokio::spawn(async move {
        writer.write_all(&all).await.unwrap();
        writer
    });
    for n in 0..1000 {
        let read = async {
            let mut octets = vec![0; usize::try_from(reader.read_u32().await.unwrap()).unwrap()];
            reader.read_exact(&mut octets).await.unwrap();
            Packet::decode(&octets).unwrap()
        };
        let packet = tokio::time::timeout(WITHIN, read).await.expect("an answer in time");
        match (n % 4, packet) {
            (0, Packet::Response(answer)) => assert!(answer.text("daemon").is_some()),
            (1, Packet::CommandUnknown) => {}
            (2, Packet::Response(answer)) => {
                let reason = format!("unload: connection '{n}' not found");
                assert_eq!(answer.text("errmsg"), Some(reason.as_str()));
            }
            (3, Packet::Response(answer)) => assert_eq!(answer.text("errmsg"), Some("truncated VICI packet")),
            (_, other) => panic!("{n}: {other:?}"),
        }
    }
    drop(writing.await.unwrap());
}

// More clients than are served at a time: the others wait, and get their turn.
#[tokio::test(flavor = "multi_thread")]
async fn more_clients_than_places_wait_for_their_turn() {
    let daemon = Daemon::start(Vec::new()).await;
    let mut clients = Vec::new();
    for _ in 0..300 {
        let mut raw = Raw::connect(&daemon).await;
        raw.send(&request("version", &[])).await;
        clients.push(raw);
    }
    for raw in &mut clients {
        // Those beyond 256 are answered when others have gone.
        let answered = tokio::time::timeout(Duration::from_secs(2), raw.0.readable()).await.is_ok();
        if !answered {
            break;
        }
        raw.answer().await;
        raw.0.shutdown().await.unwrap();
    }
    let mut late = Raw::connect(&daemon).await;
    late.send(&request("version", &[])).await;
    late.answer().await;
    assert!(daemon.out(&["--stats"]).await.contains("uptime"));
}

// A client that asks and listens, and never reads: others get their answers and events meanwhile, and when it reads at last,
// its answers are all there.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_read_holds_up_nobody() {
    let daemon = Daemon::start(vec![sa()]).await;
    let mut deaf = Raw::connect(&daemon).await;
    deaf.send(&framed(&[&[3, 7][..], b"list-sa"].concat())).await;
    let mut asked = 0;
    // As much as fits into the socket.
    while let Ok(written) = tokio::time::timeout(Duration::from_millis(500), deaf.0.writable()).await {
        written.unwrap();
        match deaf.0.try_write(&request("list-sas", &[])) {
            Ok(14) => asked += 1,
            Ok(other) => panic!("a part of a request: {other}"),
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
        }
        if asked == 20_000 {
            break;
        }
    }
    assert!(asked > 200, "{asked}");
    let mut other = daemon.client().await;
    other.register("log").await.unwrap();
    for n in 0..50 {
        let line = format!("line {n}");
        daemon.raise(Event::Log { group: "IKE", level: 0, ike_sa: None, message: line.clone() });
        let (name, message) = tokio::time::timeout(WITHIN, other.next_event()).await.expect("in time").unwrap();
        assert_eq!((name.as_str(), message.text("msg")), ("log", Some(line.as_str())));
        other.request("version", Client::message()).await.unwrap();
    }
    assert!(matches!(deaf.packet().await, Some(Packet::EventConfirm)));
    for n in 0..asked {
        assert!(matches!(deaf.packet().await, Some(Packet::Event { .. })), "{n}");
        deaf.answer().await;
    }
}

// Registrations without end: each is confirmed, and none counts twice.
#[tokio::test(flavor = "multi_thread")]
async fn registrations_without_end_are_confirmed_and_count_once() {
    let daemon = Daemon::start(Vec::new()).await;
    let Raw(stream) = Raw::connect(&daemon).await;
    let (mut reader, mut writer) = stream.into_split();
    let named =
        |kind: u8, event: &str| framed(&[&[kind, u8::try_from(event.len()).unwrap()], event.as_bytes()].concat());
    let round = [named(3, "log"), named(3, "no-such-event"), named(4, "ike-updown"), named(3, "log")].concat();
    let all = round.repeat(5000);
    let writing = tokio::spawn(async move {
        writer.write_all(&all).await.unwrap();
        writer
    });
    for n in 0..20_000 {
        let read = async {
            let mut octets = vec![0; usize::try_from(reader.read_u32().await.unwrap()).unwrap()];
            reader.read_exact(&mut octets).await.unwrap();
            Packet::decode(&octets).unwrap()
        };
        let packet = tokio::time::timeout(WITHIN, read).await.expect("a confirmation in time");
        let expected = if matches!(n % 4, 0 | 3) { Packet::EventConfirm } else { Packet::EventUnknown };
        assert_eq!(packet, expected, "{n}");
    }
    let writer = writing.await.unwrap();
    let mut raw = Raw(reader.reunite(writer).unwrap());
    for line in ["one", "two"] {
        daemon.raise(Event::Log { group: "IKE", level: 0, ike_sa: None, message: line.to_owned() });
        match raw.packet().await {
            Some(Packet::Event { name, message }) => {
                assert_eq!((name.as_str(), message.text("msg")), ("log", Some(line)));
            }
            other => panic!("{other:?}"),
        }
    }
}
