#![allow(clippy::unwrap_used, clippy::expect_used, clippy::indexing_slicing, reason = "tests")]

use std::io::{Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::os::fd::BorrowedFd;

use aws_lc_rs::digest::{SHA256, digest};
use ipsec::guard::{ClassId, Direction, FlowGuard, Verdict};
use ipsec::plane::{EspSuite, Mode};
use ipsec::selector::TrafficSelector;
use ipsec::transform::{Encr, Integ};
use pad::{AuthMethod, EapMethod, Identity, PeerIdentity, Proof};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::client::{Client, ClientError, TcpStream};
use crate::database::Bindings;
use crate::protocol::{Disposition, MAX_MESSAGE, ProofInfo, State};

mod access;
mod blocking;
mod bypass;
mod datagrams;
mod silence;
mod sockets;

#[tokio::test]
async fn every_malformed_message_gets_a_precise_refusal_and_the_connection_lives_on() {
    let house = House::new().await;
    let raw = house.raw().await;
    for (message, code) in [
        ("{", "malformed"),
        ("[]", "malformed"),
        ("\u{0}\u{1}", "malformed"),
        (r#"{"request":"list"}"#, "malformed"),
        (r#"{"id":-1,"request":"list"}"#, "malformed"),
        (r#"{"id":1,"request":"list","extra":1}"#, "malformed"),
        (r#"{"id":1,"request":"list","arguments":{"before":1}}"#, "malformed"),
        (r#"{"id":1,"request":"list","arguments":[[]]}"#, "malformed"),
        (r#"{"id":1,"request":"create","arguments":{}}"#, "malformed"),
        (r#"{"id":1,"request":"create","arguments":{"peer":"%any","remote":"nowhere"}}"#, "malformed"),
        (r#"{"id":1,"request":"destroy"}"#, "unknown-request"),
        (r#"{"id":1,"request":"hello","arguments":{"version":1}}"#, "hello"),
        (r#"{"id":1,"request":"release","arguments":{"latch":1}}"#, "no-such-latch"),
        (r#"{"id":1,"request":"inquire"}"#, "malformed"),
        (r#"{"id":1,"request":"inquire","arguments":{"local":"127.0.0.1:1","remote":"127.0.0.1:2"}}"#, "no-sa"),
    ] {
        raw.send(message.as_bytes(), None).await.unwrap();
        let answer = answer(&raw).await;
        assert_eq!((&answer["type"], &answer["code"]), (&json!("refusal"), &json!(code)), "{message}: {answer}");
        assert!(!answer["message"].as_str().unwrap().is_empty());
    }
    let deep = format!(r#"{{"id":1,"request":"list","arguments":{}{}}}"#, "[".repeat(5000), "]".repeat(5000));
    raw.send(deep.as_bytes(), None).await.unwrap();
    assert_eq!(answer(&raw).await["code"], "malformed");
    assert_eq!(
        ask(&raw, r#"{"id":7,"request":"list"}"#).await,
        json!({"type": "reply", "id": 7, "result": {"latches": [], "more": false}})
    );
}

#[tokio::test]
async fn messages_beyond_64_kib_are_refused() {
    let house = House::new().await;
    let raw = house.raw().await;
    let padded = |length: usize| {
        let request = r#"{"id":1,"request":"list"}"#;
        format!("{request}{}", " ".repeat(length - request.len()))
    };
    assert_eq!(ask(&raw, &padded(MAX_MESSAGE)).await["type"], "reply");
    for length in [MAX_MESSAGE + 1, MAX_MESSAGE + 2, 2 * MAX_MESSAGE] {
        assert_eq!(ask(&raw, &padded(length)).await["code"], "too-long");
    }
}

#[tokio::test]
async fn nothing_is_answered_before_hello_in_the_right_version() {
    let house = House::new().await;
    let raw = SeqPacket::new(connect(&house.path)).unwrap();
    assert_eq!(ask(&raw, r#"{"id":1,"request":"list"}"#).await["code"], "hello");
    let refusal = ask(&raw, r#"{"id":2,"request":"hello","arguments":{"version":2}}"#).await;
    assert_eq!((&refusal["code"], &refusal["id"]), (&json!("version"), &json!(2)));
    assert_eq!(ask(&raw, r#"{"id":3,"request":"list"}"#).await["code"], "hello");
    let welcome = ask(&raw, r#"{"id":4,"request":"hello","arguments":{"version":1}}"#).await;
    assert_eq!(welcome["result"]["version"], 1);
}

#[tokio::test]
async fn only_bound_tcp_and_udp_sockets_are_latched() {
    let house = House::with_sa().await;
    let raw = house.raw().await;
    let file = tempfile::tempfile().unwrap();
    let udp = UdpSocket::bind("0.0.0.0:0").unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let unbound = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).unwrap();
    let wildcard = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).unwrap();
    wildcard.bind(&"0.0.0.0:0".parse::<SocketAddr>().unwrap().into()).unwrap();
    let (unix, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    let refused: [(&str, BorrowedFd<'_>); 6] = [
        ("a file", file.as_fd()),
        ("UDP of any address", udp.as_fd()),
        ("a listener", listener.as_fd()),
        ("unbound", unbound.as_fd()),
        ("wildcard", wildcard.as_fd()),
        ("a Unix socket", unix.as_fd()),
    ];
    for (what, descriptor) in refused {
        raw.send(CREATE.as_bytes(), Some(descriptor)).await.unwrap();
        let answer = answer(&raw).await;
        assert_eq!(answer["code"], "socket", "{what}: {answer}");
    }
    assert_eq!(ask(&raw, CREATE).await["code"], "descriptor", "missing");
    raw.send(br#"{"id":1,"request":"list"}"#, Some(udp.as_fd())).await.unwrap();
    assert_eq!(answer(&raw).await["code"], "descriptor", "not wanted");
    let bound = bound();
    raw.send(br#"{"id":1,"request":"create","arguments":{"peer":"%any"}}"#, Some(bound.as_fd())).await.unwrap();
    assert_eq!(answer(&raw).await["code"], "socket", "where to?");
    raw.send(br#"{"id":1,"request":"create","arguments":{"peer":"","remote":"127.0.0.1:9"}}"#, Some(bound.as_fd()))
        .await
        .unwrap();
    assert_eq!(answer(&raw).await["code"], "identity");
    assert!(house.database.list().is_empty());
}

#[tokio::test]
async fn a_connected_socket_is_latched_to_where_it_is_connected() {
    let house = House::with_sa().await;
    let raw = house.raw().await;
    let far = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = std::net::TcpStream::connect(far.local_addr().unwrap()).unwrap();
    raw.send(CREATE.as_bytes(), Some(near.as_fd())).await.unwrap();
    assert_eq!(answer(&raw).await["code"], "socket", "it is connected elsewhere");
    let create = json!({"id": 1, "request": "create", "arguments": {"peer": "%any"}}).to_string();
    raw.send(create.as_bytes(), Some(near.as_fd())).await.unwrap();
    let created = answer(&raw).await;
    assert_eq!(created["result"]["remote"], far.local_addr().unwrap().to_string(), "{created}");
    assert_eq!(created["result"]["local"], near.local_addr().unwrap().to_string());
    raw.send(create.as_bytes(), Some(near.as_fd())).await.unwrap();
    assert_eq!(answer(&raw).await["code"], "exists");
}

#[tokio::test]
async fn no_connection_is_made_without_a_latch() {
    // RFC 5660 §2: packets MUST NOT be sent until the channel is established.
    let house = House::new().await;
    let client = Client::connect(&house.path).await.unwrap();
    let far = TcpListener::bind("127.0.0.1:0").unwrap();
    far.set_nonblocking(true).unwrap();
    let remote = far.local_addr().unwrap();
    assert_eq!(refusal(client.latch_tcp(remote, None, "%any").await), Code::NoSa);
    let (first, second) = (house.class("peer.example"), house.class("other.example"));
    house.install(1, first);
    assert_eq!(refusal(client.latch_tcp(remote, None, "other.example").await), Code::WrongPeer);
    house.install(2, second);
    assert_eq!(refusal(client.latch_tcp(remote, None, "%any").await), Code::Conflict);
    assert_eq!(far.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock, "nobody connected");
    assert!(house.database.list().is_empty());
}

// RFC 5660 §2, RFC 7296 §2.16: applications see the user, and how it proved itself.
#[tokio::test]
async fn the_user_of_eap_is_the_peer_and_its_method_is_pinned() {
    let house = House::new().await;
    let proof = Proof::Eap { method: EapMethod::MsChapV2, ike_id: Identity::Fqdn("root.example".into()) };
    house.install(1, house.database.intern(class("carol", proof)));
    let (client, far) = (Client::connect(&house.path).await.unwrap(), Far::listen());
    let remote = far.0.local_addr().unwrap();
    assert_eq!(refusal(client.latch_tcp(remote, None, "root.example").await), Code::WrongPeer);
    let stream = client.latch_tcp(remote, None, "carol").await.unwrap();
    let peer = stream.peer_identity();
    assert_eq!((peer.id.text.as_str(), &peer.proof), ("carol", &ProofInfo::Eap { method: "mschapv2".to_owned() }));
    let told = serde_json::to_value(peer).unwrap();
    assert_eq!(told["proof"], serde_json::json!({"by": "eap", "method": "mschapv2"}));
    assert!(!told.to_string().contains("root.example"));
}

#[tokio::test]
async fn a_latched_stream_tells_who_is_there_and_carries_data() {
    let house = House::with_sa().await;
    let (client, far) = (Client::connect(&house.path).await.unwrap(), Far::listen());
    let (mut stream, mut far) = far.latch(&client).await;
    // RFC 5660 §2: "the peer certificate, when one is used, and the trust anchor".
    let peer = stream.peer_identity().clone();
    assert_eq!(
        (peer.id.text.as_str(), peer.id.kind, peer.id.data.as_slice()),
        ("peer.example", 2, &b"peer.example"[..])
    );
    assert_eq!(peer.local_id.text, "us.example");
    assert_eq!(peer.proof, ProofInfo::Certificate { end_entity: b"leaf".to_vec(), trust_anchor: b"root".to_vec() });
    let protection = stream.protection();
    assert_eq!((protection.mode.as_str(), protection.encr, protection.key_bits), ("tunnel", 20, 256));
    assert!(protection.esn && protection.replay_protection);
    assert_eq!(protection.suite, "ENCR_AES_GCM_16 256 bits");

    stream.write_all(b"ping").await.unwrap();
    let mut buffer = [0; 4];
    far.read_exact(&mut buffer).unwrap();
    far.write_all(b"pong").unwrap();
    stream.read_exact(&mut buffer).await.unwrap();
    assert_eq!(&buffer, b"pong");

    let whois = client.whois(stream.local_addr(), stream.peer_addr()).await.unwrap();
    assert_eq!(whois.latch, Some(LatchInfo { number: stream.latch(), state: State::Established }));
    assert_eq!(whois.peer, Some(peer));
    let listed = client.list().await.unwrap();
    assert_eq!(listed.len(), 1);
    assert_eq!(
        (listed[0].latch, listed[0].local, listed[0].peer.as_str()),
        (stream.latch(), stream.local_addr(), "peer.example")
    );
    // The far end is another flow: who asks for it sees no latch.
    let unlatched = client.whois_socket(far.as_fd()).await.unwrap();
    assert_eq!((unlatched.latch, unlatched.local), (None, stream.peer_addr()));
}

#[tokio::test]
async fn a_break_resets_the_connection_at_once_and_alerts_the_holder() {
    // RFC 5660 §2.3: inform the holder prior to accepting the SA; §5.5: reset is the default for TCP.
    let house = House::with_sa().await;
    let (client, far) = (Client::connect(&house.path).await.unwrap(), Far::listen());
    let (mut stream, mut far) = far.latch(&client).await;
    far.write_all(b"queued before the break").unwrap();
    let flow = flow(TCP, stream.local_addr(), stream.peer_addr());
    let (good, foreign) = (house.class("peer.example"), house.class("mallory.example"));
    let alerts = house.database.before_install(foreign, &loopback(), &loopback()).unwrap();
    assert_eq!(alerts.len(), 1);
    // Without waiting for anything: neither class passes, and the far end has been reset.
    for class in [Some(good), Some(foreign), None] {
        assert_eq!(house.database.check(Direction::Inbound, &flow, class), Verdict::Drop);
    }
    assert_eq!(far.read(&mut [0; 8]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);

    let broken = stream.broken().await;
    assert_eq!(broken.state, State::Broken);
    assert!(broken.reason.contains("mallory.example"), "{}", broken.reason);
    let error = stream.read(&mut [0; 64]).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    assert!(error.to_string().contains("mallory.example"), "{error}");
    assert!(stream.write(b"x").await.is_err());
    assert_eq!(client.list().await.unwrap()[0].state, State::Broken);
    drop(stream);
    house.no_latches().await;
}

#[tokio::test]
async fn a_reader_that_waits_hears_of_the_break() {
    let house = House::with_sa().await;
    let (client, far) = (Client::connect(&house.path).await.unwrap(), Far::listen());
    let (stream, _far) = far.latch(&client).await;
    let (mut reader, _writer) = tokio::io::split(stream);
    let waiting = tokio::spawn(async move { reader.read(&mut [0; 8]).await });
    tokio::task::yield_now().await;
    house.database.before_install(house.class("mallory.example"), &loopback(), &loopback()).unwrap();
    let error = timeout(PATIENCE, waiting).await.unwrap().unwrap().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn losing_the_control_connection_ends_the_tcp_connection_before_the_latch() {
    let house = House::with_sa().await;
    let raw = house.raw().await;
    let far = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut near = std::net::TcpStream::connect(far.local_addr().unwrap()).unwrap();
    let (mut far, _) = far.accept().unwrap();
    let create = br#"{"id":1,"request":"create","arguments":{"peer":"%any"}}"#;
    raw.send(create, Some(near.as_fd())).await.unwrap();
    assert_eq!(answer(&raw).await["type"], "reply");
    near.write_all(b"written before").unwrap();
    drop(raw);
    let flow = flow(TCP, near.local_addr().unwrap(), near.peer_addr().unwrap());
    let foreign = Some(house.class("mallory.example"));
    // The far end gets what was written, then the end; until it closes too the flow stays latched.
    let mut buffer = Vec::new();
    let mut far = tokio::task::spawn_blocking(move || {
        far.read_to_end(&mut buffer).unwrap();
        assert_eq!(buffer, b"written before");
        far
    })
    .await
    .unwrap();
    assert_eq!(house.database.check(Direction::Outbound, &flow, foreign), Verdict::Drop);
    assert_eq!(near.write(b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    assert!(matches!(near.read(&mut [0; 8]), Ok(0)));
    far.flush().unwrap();
    drop(far);
    house.no_latches().await;
    assert!(near.peer_addr().is_err(), "the connection had ended when the latch went");
}

#[tokio::test]
async fn a_dropped_stream_delivers_what_was_written_and_then_releases() {
    let house = House::with_sa().await;
    let (client, far) = (Client::connect(&house.path).await.unwrap(), Far::listen());
    let (mut stream, mut far) = far.latch(&client).await;
    stream.write_all(b"last words").await.unwrap();
    drop(stream);
    let words = tokio::task::spawn_blocking(move || {
        let mut words = Vec::new();
        far.read_to_end(&mut words).map(|_| words)
    });
    assert_eq!(words.await.unwrap().unwrap(), b"last words");
    house.no_latches().await;
    assert!(client.list().await.unwrap().is_empty(), "the connection to the daemon lives on");
}

#[tokio::test]
async fn a_failed_connection_releases_its_latch() {
    let house = House::with_sa().await;
    let client = Client::connect(&house.path).await.unwrap();
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    assert!(matches!(client.latch_tcp(closed, None, "%any").await, Err(ClientError::System { .. })));
    house.no_latches().await;
}

#[tokio::test]
async fn latches_of_another_connection_cannot_be_released() {
    let house = House::with_sa().await;
    let (client, far) = (Client::connect(&house.path).await.unwrap(), Far::listen());
    let (stream, _far) = far.latch(&client).await;
    let raw = house.raw().await;
    let release = json!({"id": 1, "request": "release", "arguments": {"latch": stream.latch()}}).to_string();
    assert_eq!(ask(&raw, &release).await["code"], "no-such-latch");
    assert_eq!(house.database.list().len(), 1);
}

#[tokio::test]
async fn the_end_of_the_daemon_breaks_the_stream_and_keeps_the_latch() {
    let house = House::with_sa().await;
    let (client, far) = (Client::connect(&house.path).await.unwrap(), Far::listen());
    let (mut stream, _far) = far.latch(&client).await;
    let House { server, database, path, directory: _directory } = house;
    drop(server);
    assert!(!path.exists());
    assert_eq!(timeout(PATIENCE, stream.broken()).await.unwrap().state, State::Closed);
    assert_eq!(stream.read(&mut [0; 8]).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    assert!(matches!(client.list().await, Err(ClientError::Closed)));
    assert_eq!(database.list().len(), 1, "nobody may release it");
}

#[tokio::test]
async fn too_many_connections_and_latches_are_refused() {
    let limits = Limits { connections: 3, latches_per_connection: 1, latches: 2 };
    let house = House::within(limits).await;
    house.install(1, house.class("peer.example"));
    let far = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut held = Vec::new();
    for expected in ["reply", "reply", "refusal"] {
        let raw = house.raw().await;
        let near = std::net::TcpStream::connect(far.local_addr().unwrap()).unwrap();
        let create = br#"{"id":1,"request":"create","arguments":{"peer":"%any"}}"#;
        raw.send(create, Some(near.as_fd())).await.unwrap();
        let first = answer(&raw).await;
        assert_eq!(first["type"], expected, "{first}");
        if expected == "reply" {
            let second = std::net::TcpStream::connect(far.local_addr().unwrap()).unwrap();
            raw.send(create, Some(second.as_fd())).await.unwrap();
            assert_eq!(answer(&raw).await["code"], "limit", "the connection's");
        } else {
            assert_eq!(first["code"], "limit", "the daemon's");
        }
        held.push((raw, near));
    }
    let fourth = SeqPacket::new(connect(&house.path)).unwrap();
    let refusal = answer(&fourth).await;
    assert_eq!((&refusal["code"], &refusal["id"]), (&json!("limit"), &Value::Null));
    assert!(fourth.receive().await.unwrap().is_none());
    held.pop();
    let patient = async {
        while !matches!(Client::connect(&house.path).await, Ok(client) if client.list().await.is_ok()) {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, patient).await.expect("there is room again");
}

#[tokio::test]
async fn a_certificate_that_fits_no_message_latches_nothing() {
    let house = House::new().await;
    let huge = Proof::Certificate { end_entity: vec![0; MAX_MESSAGE], trust_anchor: vec![], method: AuthMethod::RSA };
    house.install(1, house.database.intern(class("peer.example", huge)));
    let client = Client::connect(&house.path).await.unwrap();
    let far = TcpListener::bind("127.0.0.1:0").unwrap();
    let refused = client.latch_tcp(far.local_addr().unwrap(), None, "%any").await;
    assert_eq!(refusal(refused), Code::TooLong);
    house.no_latches().await;
}

#[tokio::test]
async fn lists_of_any_length_come_in_pages() {
    let house = House::with_sa().await;
    for port in 1..=250_u16 {
        let flow = flow(TCP, "127.0.0.1:1".parse().unwrap(), SocketAddr::new("127.0.0.2".parse().unwrap(), port));
        house.database.create(flow, &Request::peer(IdentityPattern::any()), Box::new(|_| {})).unwrap();
    }
    let latches = Client::connect(&house.path).await.unwrap().list().await.unwrap();
    assert_eq!(latches.iter().map(|latch| latch.latch).collect::<Vec<_>>(), (1..=250).collect::<Vec<_>>());
}

#[tokio::test]
async fn the_socket_is_for_its_group_and_replaces_only_a_dead_one() {
    let house = House::new().await;
    assert_eq!(fs::metadata(&house.path).unwrap().permissions().mode() & 0o7777, 0o660);
    let taken = serve(config(&house.path), Arc::default()).await.unwrap_err();
    assert_eq!(taken.kind(), io::ErrorKind::AddrInUse);
    let file = house.directory.path().join("file");
    fs::write(&file, "precious").unwrap();
    let taken = serve(config(&file), Arc::default()).await.unwrap_err();
    assert_eq!(taken.kind(), io::ErrorKind::AddrInUse);
    assert_eq!(fs::read(&file).unwrap(), b"precious");
    let dead = house.directory.path().join("dead");
    drop(listen(&dead).unwrap());
    assert!(serve(config(&dead), Arc::default()).await.is_ok());
}

#[tokio::test]
async fn a_device_that_is_not_there_fails_the_latch() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("latch.sock");
    let database = Arc::new(Database::new());
    let config = ServerConfig { device: Some("nosuchdevice0".into()), ..config(&path) };
    let server = serve(config, Arc::clone(&database)).await.unwrap();
    let house = House { server, database, path, directory };
    house.install(1, house.class("peer.example"));
    let client = Client::connect(&house.path).await.unwrap();
    let far = TcpListener::bind("127.0.0.1:0").unwrap();
    assert_eq!(refusal(client.latch_tcp(far.local_addr().unwrap(), None, "%any").await), Code::System);
    assert!(house.database.list().is_empty());
}

/// RFC 5660 §2: a latch is a promise; where nobody keeps it, it is not given.
#[tokio::test]
async fn a_server_that_cannot_enforce_latches_gives_none() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("latch.sock");
    let database = Arc::new(Database::new());
    let config = ServerConfig { unenforced: Some("nobody looks".into()), ..config(&path) };
    let server = serve(config, Arc::clone(&database)).await.unwrap();
    let house = House { server, database, path, directory };
    house.install(1, house.class("peer.example"));
    let client = Client::connect(&house.path).await.unwrap();
    let far = TcpListener::bind("127.0.0.1:0").unwrap();
    assert_eq!(refusal(client.latch_tcp(far.local_addr().unwrap(), None, "%any").await), Code::Unenforced);
    assert!(house.database.list().is_empty());
}

#[tokio::test]
async fn a_latched_socket_is_bound_to_the_device() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("latch.sock");
    let database = Arc::new(Database::new());
    let config = ServerConfig { device: Some("lo".into()), ..config(&path) };
    let server = serve(config, Arc::clone(&database)).await.unwrap();
    let house = House { server, database, path, directory };
    house.install(1, house.class("peer.example"));
    let raw = house.raw().await;
    let socket = bound();
    raw.send(CREATE.as_bytes(), Some(socket.as_fd())).await.unwrap();
    assert_eq!(answer(&raw).await["type"], "reply");
    assert_eq!(socket.device().unwrap().as_deref(), Some(&b"lo"[..]));
}

#[tokio::test]
async fn a_listener_gives_each_connection_its_latch_before_the_first_packet() {
    // RFC 5660 §2.2, §5.1: the packets that a data plane would see are shown to the check here.
    let house = House::with_sa().await;
    let (client, class) = (Client::connect(&house.path).await.unwrap(), Some(house.class("peer.example")));
    let listener = client.listen_tcp("127.0.0.1:0".parse().unwrap(), "peer.example").await.unwrap();
    let listed = client.list().await.unwrap();
    assert_eq!((listed[0].state, listed[0].remote, listed[0].local), (State::Listener, None, listener.local_addr()));
    let taken = client.listen_tcp(listener.local_addr(), "peer.example").await;
    assert!(taken.is_err(), "one listener for a port");

    // Without a packet that came under an SA there is no latch, and no connection for the application.
    let stray = std::net::TcpStream::connect(listener.local_addr()).unwrap();
    let accepting = tokio::spawn(async move {
        let accepted = listener.accept().await.unwrap();
        (listener, accepted)
    });
    let mut far = std::net::TcpStream::connect(stray.peer_addr().unwrap()).unwrap();
    let near = flow(TCP, far.peer_addr().unwrap(), far.local_addr().unwrap());
    // Both wait to be accepted: the second is latched, as it would have been before its first packet.
    assert_eq!(house.database.check(Direction::Inbound, &near, class), Verdict::Pass);
    let (listener, (mut stream, remote)) = timeout(PATIENCE, accepting).await.unwrap().unwrap();
    assert_eq!((remote, stream.peer_identity().id.text.as_str()), (far.local_addr().unwrap(), "peer.example"));
    assert_eq!(house.database.find(&near).unwrap().0, LatchId(stream.latch()));
    far.write_all(b"ping").unwrap();
    let mut buffer = [0; 4];
    stream.read_exact(&mut buffer).await.unwrap();
    assert_eq!(&buffer, b"ping");

    // A conflict resets it; the listener goes on.
    let foreign = house.class("mallory.example");
    assert_eq!(house.database.before_install(foreign, &loopback(), &loopback()).unwrap().len(), 1);
    assert_eq!(timeout(PATIENCE, stream.broken()).await.unwrap().state, State::Broken);
    assert_eq!(stream.read(&mut buffer).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    drop(stream);
    drop(listener);
    house.no_latches().await;
    let gone = async {
        while !client.list().await.unwrap().is_empty() {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(PATIENCE, gone).await.expect("the listener is gone");
}

#[tokio::test]
async fn what_nobody_accepts_goes_when_its_connection_has_gone() {
    let house = House::with_sa().await;
    let (client, class) = (Client::connect(&house.path).await.unwrap(), Some(house.class("peer.example")));
    let listener = client.listen_tcp("127.0.0.1:0".parse().unwrap(), "peer.example").await.unwrap();
    let far = std::net::TcpStream::connect(listener.local_addr()).unwrap();
    let near = flow(TCP, far.peer_addr().unwrap(), far.local_addr().unwrap());
    assert_eq!(house.database.check(Direction::Inbound, &near, class), Verdict::Pass);
    sleep(2 * SWEEP + SWEEP / 2).await;
    assert!(house.database.find(&near).is_some(), "its connection lives");
    socket2::SockRef::from(&far).set_linger(Some(Duration::ZERO)).unwrap();
    drop(far);
    drop(listener);
    let patient = async {
        while house.database.find(&near).is_some() {
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(4 * SWEEP, patient).await.expect("it is released");
}

#[tokio::test]
async fn a_udp_socket_is_latched_and_silenced() {
    // RFC 5660 §5.2; a break without an end is loss (§5.5 a), the administrator's close ends it.
    let house = House::with_sa().await;
    let client = Client::connect(&house.path).await.unwrap();
    let far = UdpSocket::bind("127.0.0.1:0").unwrap();
    let socket = client.latch_udp(far.local_addr().unwrap(), None, "peer.example").await.unwrap();
    socket.send(b"ping").await.unwrap();
    let mut buffer = [0; 8];
    assert_eq!(far.recv_from(&mut buffer).unwrap().1, socket.local_addr());
    far.send_to(b"pong", socket.local_addr()).unwrap();
    assert_eq!(socket.recv(&mut buffer).await.unwrap(), 4);
    let whois = Inquire { local: Some(socket.local_addr()), remote: Some(socket.peer_addr()), protocol: Some(UDP) };
    assert_eq!(client.whois_flow(whois).await.unwrap().latch.unwrap().number, socket.latch());
    assert_eq!(refusal(client.latch_udp(socket.peer_addr(), None, "mallory.example").await), Code::WrongPeer);

    let mut changes = socket.changes();
    let mallory = house.class("mallory.example");
    house.install(2, mallory);
    assert_eq!(changes.next().await.state, State::Broken);
    house.database.removed(2);
    assert_eq!(changes.next().await.state, State::Established);
    client.close_latch(socket.latch()).await.unwrap();
    assert_eq!(
        timeout(PATIENCE, socket.recv(&mut buffer)).await.unwrap().unwrap_err().kind(),
        io::ErrorKind::ConnectionReset
    );
    assert_eq!(changes.next().await.state, State::Closed);
    drop(socket);
    house.no_latches().await;
}

// RFC 5660 §2: packets that came before the latch are not accepted: dropped, or there is no latch.
#[tokio::test]
async fn what_came_before_the_latch_is_not_read_under_it() {
    let house = House::with_sa().await;
    let raw = house.raw().await;
    let (far, stranger) = (UdpSocket::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
    let remote = far.local_addr().unwrap();
    for (domain, address) in [(Domain::IPV4, "127.0.0.1:0"), (Domain::IPV6, "[::ffff:127.0.0.1]:0")] {
        let near = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP)).unwrap();
        near.bind(&address.parse::<SocketAddr>().unwrap().into()).unwrap();
        let near = std::net::UdpSocket::from(near);
        let local = canonical(near.local_addr().unwrap());
        for sender in [&stranger, &far] {
            sender.send_to(b"before", local).unwrap();
        }
        let create = json!({"id": 1, "request": "create", "arguments": {"peer": "%any", "remote": remote}}).to_string();
        raw.send(create.as_bytes(), Some(near.as_fd())).await.unwrap();
        assert_eq!(answer(&raw).await["type"], "reply");
        // It is connected from then on, so that nobody else gets in either.
        assert_eq!(near.peer_addr().map(canonical).unwrap(), remote);
        stranger.send_to(b"from elsewhere", local).unwrap();
        far.send_to(b"under the latch", local).unwrap();
        near.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut buffer = [0; 64];
        let length = near.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"under the latch");
    }
}

#[tokio::test]
async fn a_connection_that_has_received_data_is_latched_only_if_its_holder_says_that_it_may() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("latch.sock");
    let database = Arc::new(Database::new());
    let config = ServerConfig { has_received: |_| Ok(true), ..config(&path) };
    let server = serve(config, Arc::clone(&database)).await.unwrap();
    let house = House { server, database, path, directory };
    house.install(1, house.class("peer.example"));
    let raw = house.raw().await;
    let far = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = std::net::TcpStream::connect(far.local_addr().unwrap()).unwrap();
    let flow = flow(TCP, near.local_addr().unwrap(), near.peer_addr().unwrap());
    raw.send(br#"{"id":1,"request":"create","arguments":{"peer":"%any"}}"#, Some(near.as_fd())).await.unwrap();
    let refusal = answer(&raw).await;
    assert!(refusal["code"] == "socket" && refusal["message"].as_str().unwrap().contains("late"), "{refusal}");
    assert!(house.database.find(&flow).is_none(), "nothing is left of it");
    let late = br#"{"id":1,"request":"create","arguments":{"peer":"%any","late":true}}"#;
    raw.send(late, Some(near.as_fd())).await.unwrap();
    assert_eq!(answer(&raw).await["type"], "reply");
    let listener = bound();
    let listen = br#"{"id":1,"request":"listen","arguments":{"peer":"%any","late":true}}"#;
    raw.send(listen, Some(listener.as_fd())).await.unwrap();
    assert_eq!(answer(&raw).await["code"], "malformed");
}

#[tokio::test]
async fn a_stream_that_waits_survives_a_break() {
    let house = House::with_sa().await;
    let (client, far) = (Client::connect(&house.path).await.unwrap(), Far::listen());
    let wanted = Wanted { on_break: Some(Disposition::Wait), ..Wanted::from("peer.example") };
    let mut stream = client.latch_tcp(far.0.local_addr().unwrap(), None, wanted).await.unwrap();
    let (mut far, _) = far.0.accept().unwrap();
    let mut changes = stream.changes();
    house.install(2, house.class("mallory.example"));
    assert_eq!(changes.next().await.state, State::Broken);
    house.database.removed(2);
    assert_eq!(changes.next().await.state, State::Established);
    stream.write_all(b"still here").await.unwrap();
    let mut buffer = [0; 10];
    far.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"still here");
    client.break_latch(stream.latch()).await.unwrap();
    assert_eq!(client.show(stream.latch()).await.unwrap().latch.unwrap().state, State::Broken);
    assert_eq!(refusal(client.break_latch(999).await), Code::NoSuchLatch);
}

#[tokio::test]
async fn a_watcher_sees_the_latches_of_others() {
    let house = House::with_sa().await;
    let (client, watcher) = (Client::connect(&house.path).await.unwrap(), Client::connect(&house.path).await.unwrap());
    let mut events = watcher.watch().await.unwrap();
    let (stream, _far) = Far::listen().latch(&client).await;
    let latch = stream.latch();
    client.close_latch(latch).await.unwrap();
    drop(stream);
    for expected in [State::Established, State::Closed, State::Closed] {
        let event = timeout(PATIENCE, events.next()).await.unwrap().unwrap();
        assert_eq!((event.latch, event.state, event.missed), (latch, expected, 0), "{event:?}");
    }
}

#[tokio::test]
async fn an_sa_is_made_when_there_is_none_and_a_narrow_one_when_asked_for() {
    // RFC 5660 §2.3, §2.1.
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("latch.sock");
    let database = Arc::new(Database::new());
    let asked: Arc<std::sync::Mutex<Vec<bool>>> = Arc::default();
    let initiator = Initiator::new({
        let (database, asked) = (Arc::clone(&database), Arc::clone(&asked));
        move |flow, narrow| {
            let (database, asked) = (Arc::clone(&database), Arc::clone(&asked));
            Box::pin(async move {
                if flow.remote_port == 9 {
                    return Err("nobody answers".to_owned());
                }
                asked.lock().unwrap().push(narrow);
                let class = database.intern(class("peer.example", Proof::PreSharedKey));
                database.installed(1, class, loopback(), loopback()).unwrap();
                Ok(())
            })
        }
    });
    let config = ServerConfig { initiator: Some(initiator), ..config(&path) };
    let server = serve(config, Arc::clone(&database)).await.unwrap();
    let house = House { server, database, path, directory };
    let (client, far) = (Client::connect(&house.path).await.unwrap(), TcpListener::bind("127.0.0.1:0").unwrap());
    let remote = far.local_addr().unwrap();
    let with = |initiate| Wanted { initiate, ..Wanted::from("peer.example") };
    assert_eq!(refusal(client.latch_tcp(remote, None, with(Initiate::No)).await), Code::NoSa);
    let ClientError::Refused(refused) =
        client.latch_tcp("127.0.0.1:9".parse().unwrap(), None, "peer.example").await.unwrap_err()
    else {
        panic!("another error")
    };
    assert!(refused.code == Code::NoSa && refused.message.contains("nobody answers"), "{refused}");
    let _first = client.latch_tcp(remote, None, "peer.example").await.unwrap();
    let _second = client.latch_tcp(remote, None, "peer.example").await.unwrap();
    let _third = client.latch_tcp(remote, None, with(Initiate::Narrow)).await.unwrap();
    assert_eq!(*asked.lock().unwrap(), [false, true]);
}

#[tokio::test]
async fn a_larval_latch_is_told_at_once_and_comes_to_its_end_later() {
    // RFC 5660 §2.3: the call may return before the SA is there; a failure must then be reported later.
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("latch.sock");
    let database = Arc::new(Database::new());
    let gate = Arc::new(Semaphore::new(0));
    let initiator = Initiator::new({
        let (database, gate) = (Arc::clone(&database), Arc::clone(&gate));
        move |flow, _| {
            let (database, gate) = (Arc::clone(&database), Arc::clone(&gate));
            Box::pin(async move {
                gate.acquire().await.unwrap().forget();
                if flow.remote_port == 9 {
                    return Err("nobody answers".to_owned());
                }
                let class = database.intern(class("peer.example", Proof::PreSharedKey));
                database.installed(1, class, loopback(), loopback()).unwrap();
                Ok(())
            })
        }
    });
    let (forwarded, sent) = std::sync::mpsc::channel();
    let forwarder = Some(Forwarder::new(move |packet| forwarded.send(packet.to_vec()).unwrap()));
    let config = ServerConfig { initiator: Some(initiator), forwarder, ..config(&path) };
    let server = serve(config, Arc::clone(&database)).await.unwrap();
    let house = House { server, database, path, directory };
    let raw = house.raw().await;
    let create = |peer: &str, remote: SocketAddr| {
        json!({"id": 1, "request": "create", "arguments": {"peer": peer, "remote": remote, "larval": true}}).to_string()
    };
    let far = TcpListener::bind("127.0.0.1:0").unwrap();
    let larval = async |peer: &str, remote: SocketAddr| {
        let socket = bound();
        raw.send(create(peer, remote).as_bytes(), Some(socket.as_fd())).await.unwrap();
        let answer = answer(&raw).await;
        assert!(answer["result"]["peer"].is_null() && answer["type"] == "reply", "{answer}");
        (socket, answer["result"]["latch"].as_u64().unwrap())
    };
    let drops = |socket: &Socket, remote| {
        let local = socket.local_addr().unwrap().as_socket().unwrap();
        let good = house.database.intern(class("peer.example", Proof::PreSharedKey));
        house.database.check(Direction::Outbound, &flow(TCP, local, remote), Some(good)) == Verdict::Drop
    };

    // Nobody answers: the alert says so with the code of a refusal, and the flow stays shut until then.
    let nobody = "127.0.0.1:9".parse().unwrap();
    let keep = |socket: &Socket, remote, packet: &[u8]| {
        let local = socket.local_addr().unwrap().as_socket().unwrap();
        house.database.keep(&flow(TCP, local, remote), packet);
    };
    let (socket, number) = larval("peer.example", nobody).await;
    assert!(drops(&socket, nobody));
    keep(&socket, nobody, b"to nobody");
    gate.add_permits(1);
    let alert = answer(&raw).await;
    assert_eq!((&alert["type"], &alert["latch"], &alert["state"]), (&json!("alert"), &json!(number), &json!("closed")));
    assert_eq!(alert["code"], "no-sa", "{alert}");
    assert!(alert["reason"].as_str().unwrap().contains("nobody answers"));

    // One that is let go meanwhile is not heard of again.
    let (_released, number) = larval("peer.example", far.local_addr().unwrap()).await;
    let release = json!({"id": 2, "request": "release", "arguments": {"latch": number}}).to_string();
    assert_eq!(ask(&raw, &release).await["type"], "reply");

    // Somebody else comes; then whom it is for.
    for (peer, state, code) in
        [("other.example", "closed", json!("wrong-peer")), ("peer.example", "established", json!(null))]
    {
        house.database.removed(1);
        let (socket, number) = larval(peer, far.local_addr().unwrap()).await;
        assert!(drops(&socket, far.local_addr().unwrap()));
        keep(&socket, far.local_addr().unwrap(), peer.as_bytes());
        gate.add_permits(2);
        let alert = answer(&raw).await;
        assert_eq!((&alert["latch"], &alert["state"], &alert["code"]), (&json!(number), &json!(state), &code));
        gate.forget_permits(gate.available_permits());
        if state == "established" {
            assert!(!drops(&socket, far.local_addr().unwrap()));
            let shown =
                ask(&raw, &json!({"id": 3, "request": "show", "arguments": {"latch": number}}).to_string()).await;
            assert_eq!(shown["result"]["latch"]["state"], "established", "{shown}");
        }
    }
    // What waited went out under the latch that stands, and nothing else did.
    assert_eq!(sent.recv_timeout(Duration::from_secs(20)).unwrap(), b"peer.example");
    assert!(sent.try_recv().is_err());
    // With an SA in place there is nothing to wait for.
    let socket = bound();
    raw.send(create("peer.example", far.local_addr().unwrap()).as_bytes(), Some(socket.as_fd())).await.unwrap();
    assert_eq!(answer(&raw).await["result"]["peer"]["id"]["text"], "peer.example");
    // Only connections can be LARVAL.
    let socket = bound();
    let listen = json!({"id": 1, "request": "listen", "arguments": {"peer": "%any", "larval": true}}).to_string();
    raw.send(listen.as_bytes(), Some(socket.as_fd())).await.unwrap();
    assert_eq!(answer(&raw).await["code"], "malformed");
    drop(raw);
    house.no_latches().await;
}

#[tokio::test]
async fn what_protects_a_flow_now_is_told_with_it_and_classes_can_be_compared() {
    // RFC 5660 §2, §6.3.
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("latch.sock");
    let sa = SaInfo {
        connection: "net".to_owned(),
        method: 14,
        outer_local: "192.0.2.1:4500".parse().unwrap(),
        outer_remote: "198.51.100.7:60000".parse().unwrap(),
        transport: "udp-encapsulated".to_owned(),
        nat_local: false,
        nat_remote: true,
        address: crate::protocol::AddressBinding::Assigned,
        resumed: false,
        ike_spis: ["1".to_owned(), "2".to_owned()],
        ike_suite: None,
        spis: ["3".to_owned(), "4".to_owned()],
        local_ts: vec!["127.0.0.0/8".to_owned()],
        remote_ts: vec!["127.0.0.0/8".to_owned()],
    };
    let surveyor = Surveyor::new({
        let sa = sa.clone();
        move |_, numbers| {
            let sas = numbers.iter().map(|number| SaInfo { connection: number.to_string(), ..sa.clone() }).collect();
            Box::pin(std::future::ready(sas))
        }
    });
    let config = ServerConfig { surveyor: Some(surveyor), ..config(&path) };
    let database = Arc::new(Database::new());
    let server = serve(config, Arc::clone(&database)).await.unwrap();
    let house = House { server, database, path, directory };
    house.install(7, house.class("peer.example"));
    house.install(5, house.class("peer.example"));
    let client = Client::connect(&house.path).await.unwrap();
    let ((one, _far), (other, _too)) = (Far::listen().latch(&client).await, Far::listen().latch(&client).await);
    let told = one.inquire().await.unwrap();
    let names: Vec<&str> = told.sas.iter().map(|sa| sa.connection.as_str()).collect();
    assert_eq!((names.as_slice(), told.sas[0].outer_remote), (&["5", "7"][..], sa.outer_remote));
    assert_eq!(client.whois(one.local_addr(), one.peer_addr()).await.unwrap(), told);
    assert!(one.class().is_some() && one.class() == other.class() && one.class() == told.class);
    house.database.removed(5);
    house.database.removed(7);
    assert!(one.inquire().await.unwrap().sas.is_empty());
    house.install(9, house.class("other.example"));
    let (third, _far) = {
        let far = TcpListener::bind("127.0.0.1:0").unwrap();
        (client.latch_tcp(far.local_addr().unwrap(), None, "other.example").await.unwrap(), far)
    };
    assert_ne!(third.class(), one.class());
}

// docs/latch-protocol.md's vector.
#[test]
fn the_end_point_binding_has_the_documented_value() {
    let hash = |key: &[u8]| <[u8; 32]>::try_from(digest(&SHA256, key).as_ref()).unwrap();
    let keys = [hash(b"public key of one end"), hash(b"public key of the other")];
    let expected = "01023585a5b159177a35fbba9c763d2631ce13c09f1ff112f09d8bc4b242118df0f942ea94afddc5256e091079f1411c198a2ff1936ebe2c3053bb5177f3469c21fe";
    assert_eq!(data_encoding::HEXLOWER.encode(&endpoint_data(keys)), expected);
    assert_eq!(endpoint_data([keys[1], keys[0]]), endpoint_data(keys));
}

#[tokio::test]
async fn a_latch_tells_its_channel_binding_to_its_holder() {
    let house = House::new().await;
    house.database.bound(1, Bindings { unique: Some([7; 32]), keys: Some([[2; 32], [1; 32]]) });
    house.install(1, house.class("peer.example"));
    let client = Client::connect(&house.path).await.unwrap();
    let (stream, _far) = Far::listen().latch(&client).await;
    let binding = stream.channel_binding().await.unwrap();
    assert_eq!((binding.kind.as_str(), binding.data.len()), ("ipsec-ikev2-unique", 33));
    assert_eq!((binding.data[0], &binding.data[1..]), (1, &[7; 32][..]));
    let endpoints = stream.channel_binding_of(ENDPOINT_BINDING).await.unwrap();
    assert_eq!(endpoints.data, [&[1, 2][..], &[1; 32], &[2; 32]].concat(), "the same at both ends");
    assert_eq!(refusal(stream.channel_binding_of("tls-exporter").await), Code::NoBinding);
    let other = house.raw().await;
    for (latch, kind, code) in
        [(stream.latch(), UNIQUE_BINDING, "no-such-latch"), (999, "tls-exporter", "no-such-latch")]
    {
        let ask_for = json!({"id": 1, "request": "channel-binding", "arguments": {"latch": latch, "type": kind}});
        assert_eq!(ask(&other, &ask_for.to_string()).await["code"], code);
    }
    drop(stream);
    house.database.bound(1, Bindings::default());
    let (stream, _far) = Far::listen().latch(&client).await;
    assert_eq!(refusal(stream.channel_binding().await), Code::NoBinding);
    let Err(ClientError::Refused(refused)) = stream.channel_binding_of(ENDPOINT_BINDING).await else {
        panic!("a binding")
    };
    assert!(refused.code == Code::NoBinding && refused.message.contains("without a key pair"), "{refused}");
}

#[tokio::test]
async fn a_requirement_that_is_misspelled_is_refused() {
    let house = House::with_sa().await;
    let raw = house.raw().await;
    for (wanted, code) in [
        (json!({"peer": "%any", "remote": "127.0.0.1:9", "suits": []}), "malformed"),
        (json!({"peer": "%any", "remote": "127.0.0.1:9", "mode": "both"}), "malformed"),
        (json!({"peer": "%any", "remote": "127.0.0.1:9", "suites": [{"encr": 20, "bits": 128}]}), "malformed"),
        (json!({"peer": "%any", "remote": "127.0.0.1:9", "on_break": "shout"}), "malformed"),
        (json!({"peer": "%any", "remote": "127.0.0.1:9", "mode": "transport"}), "wrong-protection"),
        (json!({"peer": "%any", "remote": "127.0.0.1:9", "local_id": "them.example"}), "wrong-peer"),
    ] {
        let request = json!({"id": 1, "request": "create", "arguments": wanted}).to_string();
        raw.send(request.as_bytes(), Some(bound().as_fd())).await.unwrap();
        let answer = answer(&raw).await;
        assert_eq!(answer["code"], code, "{request}: {answer}");
    }
    assert!(house.database.list().is_empty());
}

const PATIENCE: Duration = Duration::from_secs(10);

const CREATE: &str = r#"{"id":1,"request":"create","arguments":{"peer":"%any","remote":"127.0.0.1:9"}}"#;

struct House {
    server: Server,
    database: Arc<Database>,
    path: PathBuf,
    directory: TempDir,
}

impl House {
    async fn new() -> Self {
        Self::within(LIMITS).await
    }

    async fn with_sa() -> Self {
        let house = Self::new().await;
        house.install(1, house.class("peer.example"));
        house
    }

    async fn within(limits: Limits) -> Self {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("latch.sock");
        let database = Arc::new(Database::new());
        let config = config(&path);
        let server = serve_within(config, Arc::clone(&database), limits).await.unwrap();
        Self { server, database, path, directory }
    }

    fn class(&self, peer: &str) -> ClassId {
        let proof = Proof::Certificate {
            end_entity: b"leaf".to_vec(),
            trust_anchor: b"root".to_vec(),
            method: AuthMethod::DIGITAL_SIGNATURE,
        };
        self.database.intern(class(peer, proof))
    }

    fn install(&self, sa: u64, class: ClassId) {
        self.database.before_install(class, &loopback(), &loopback()).unwrap();
        self.database.installed(sa, class, loopback(), loopback()).unwrap();
    }

    /// A connection that has said hello.
    async fn raw(&self) -> SeqPacket {
        let raw = SeqPacket::new(connect(&self.path)).unwrap();
        let welcome = ask(&raw, r#"{"id":0,"request":"hello","arguments":{"version":1}}"#).await;
        assert_eq!(welcome["type"], "reply");
        raw
    }

    async fn no_latches(&self) {
        let patient = async {
            while !(self.database.list().is_empty() && self.database.bypasses().is_empty()) {
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(PATIENCE, patient).await.expect("all latches are released");
    }
}

/// A TCP server at the other end.
struct Far(TcpListener);

impl Far {
    fn listen() -> Self {
        Self(TcpListener::bind("127.0.0.1:0").unwrap())
    }

    async fn latch(self, client: &Client) -> (TcpStream, std::net::TcpStream) {
        let stream = client.latch_tcp(self.0.local_addr().unwrap(), None, "peer.example").await.unwrap();
        let (far, _) = self.0.accept().unwrap();
        far.set_read_timeout(Some(PATIENCE)).unwrap();
        (stream, far)
    }
}

/// Without anything that can be left out.
fn config(path: &Path) -> ServerConfig {
    ServerConfig {
        path: path.to_owned(),
        device: None,
        initiator: None,
        surveyor: None,
        forwarder: None,
        survivor: None,
        has_received: nothing,
        unenforced: None,
        access: watch::channel(Access::default()).1,
        identifier: Identifier::new(|_| Credentials { privileged: true, ..Credentials::default() }),
    }
}

/// Nothing has come in on any socket.
fn nothing(_: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(false)
}

fn class(peer: &str, proof: Proof) -> Class {
    Class {
        peer: Arc::new(PeerIdentity {
            id: Identity::Fqdn(peer.into()),
            local_id: Identity::Fqdn("us.example".into()),
            proof,
            entry: "net".into(),
        }),
        mode: Mode::Tunnel,
        suite: EspSuite { encr: Encr::AES_GCM_16, key_bits: 256, integ: Integ::NONE, esn: true },
        replay_protection: true,
    }
}

fn loopback() -> Vec<TrafficSelector> {
    vec![TrafficSelector::network("127.0.0.0".parse().unwrap(), 8).unwrap()]
}

fn bound() -> Socket {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).unwrap();
    socket.bind(&"127.0.0.1:0".parse::<SocketAddr>().unwrap().into()).unwrap();
    socket
}

fn connect(path: &Path) -> OwnedFd {
    let socket = seqpacket::socket().unwrap();
    rustix::net::connect(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    socket
}

async fn ask(raw: &SeqPacket, request: &str) -> Value {
    raw.send(request.as_bytes(), None).await.unwrap();
    answer(raw).await
}

async fn answer(raw: &SeqPacket) -> Value {
    let datagram = timeout(PATIENCE, raw.receive()).await.unwrap().unwrap().unwrap();
    assert!(datagram.descriptors.is_empty() && !datagram.truncated);
    serde_json::from_slice(&datagram.octets).unwrap()
}

fn refusal<T>(result: Result<T, ClientError>) -> Code {
    match result {
        Err(ClientError::Refused(refusal)) => refusal.code,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("it was not refused"),
    }
}

#[tokio::test]
async fn a_latch_whose_connection_has_ended_is_closed_though_its_holder_keeps_the_socket() {
    // RFC 5660 §2.3: latches are destroyed when their connections are torn down.
    let house = House::with_sa().await;
    let client = Client::connect(&house.path).await.unwrap();
    let far = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let stream = client.latch_tcp(far.local_addr().unwrap(), None, "peer.example").await.unwrap();
    let (accepted, near) = far.accept().unwrap();
    let mut changes = stream.changes();
    // Longer than it takes to see that the connection is there.
    sleep(SWEEP + SWEEP / 2).await;
    assert_eq!(house.database.list().len(), 1, "it stands");
    socket2::SockRef::from(&accepted).set_linger(Some(Duration::ZERO)).unwrap();
    drop(accepted);
    let ended = timeout(4 * SWEEP, changes.next()).await.unwrap();
    assert_eq!((ended.state, ended.reason.as_str()), (State::Closed, crate::database::ENDED));
    let flow = flow(TCP, near, far.local_addr().unwrap());
    while house.database.find(&flow).is_some() {
        sleep(Duration::from_millis(50)).await;
    }
}
