//! Connections that are to be clear (RFC 5660 §3.1).

use super::access::{Guarded, denied};
use super::*;
use crate::access::{Grant, Right};

#[tokio::test]
async fn without_the_right_nothing_goes_in_clear() {
    // RFC 5660 §3.1: "locally privileged applications".
    let guarded = Guarded::new().await;
    let client = guarded.client(7, &[70]).await;
    let far = Far::listen();
    let to = far.0.local_addr().unwrap();
    let socket = bound();
    denied(client.bypass_socket(&socket, to).await, Right::Bypass);
    guarded.grant(Right::Latch, Grant::default());
    guarded.grant(Right::Bypass, Grant { users: [7].into(), ..Grant::default() });
    // The right to go around the policy is not that to latch, nor the other way round.
    let bypass = client.bypass_socket(&socket, to).await.unwrap();
    denied(client.latch_tcp(to, None, "peer.example").await, Right::Latch);
    let list = client.list().await.unwrap();
    assert_eq!((list.len(), list[0].bypass, list[0].peer.as_str()), (1, true, ""));
    let stranger = guarded.client(8, &[]).await;
    assert!(stranger.list().await.unwrap().is_empty());
    denied(stranger.show(bypass.latch()).await, Right::See);
    denied(stranger.whois(bypass.local_addr(), to).await, Right::See);
    assert!(stranger.whois_socket(socket.as_fd()).await.is_err(), "it is not connected");
    socket.connect(&to.into()).unwrap();
    assert!(stranger.whois_socket(socket.as_fd()).await.unwrap().bypass);
}

#[tokio::test]
async fn only_sockets_that_could_be_latched_can_go_in_clear() {
    let house = House::with_sa().await;
    let raw = house.raw().await;
    let ask_for = async |arguments: &str, socket: Option<BorrowedFd<'_>>| {
        let request = format!(r#"{{"id":1,"request":"bypass","arguments":{arguments}}}"#);
        raw.send(request.as_bytes(), socket).await.unwrap();
        answer(&raw).await["code"].as_str().unwrap().to_owned()
    };
    let (to, socket) = (r#"{"remote":"127.0.0.1:9"}"#, bound());
    let file = tempfile::tempfile().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let unbound = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).unwrap();
    assert_eq!(ask_for(to, None).await, "descriptor");
    for (arguments, descriptor, code) in [
        (to, file.as_fd(), "socket"),
        (to, listener.as_fd(), "socket"),
        (to, unbound.as_fd(), "socket"),
        ("{}", socket.as_fd(), "socket"),
        (r#"{"remote":"[::1]:9"}"#, socket.as_fd(), "socket"),
        (r#"{"remote":"127.0.0.1:9","peer":"%any"}"#, socket.as_fd(), "malformed"),
        (r#"{"remote":"127.0.0.1:9","late":true}"#, socket.as_fd(), "malformed"),
    ] {
        assert_eq!(ask_for(arguments, Some(descriptor)).await, code, "{arguments}");
    }
    assert!(house.database.bypasses().is_empty());
}

#[tokio::test]
async fn a_socket_that_is_bound_to_the_tunnel_does_not_go_in_clear() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("latch.sock");
    let database = Arc::new(Database::new());
    let config = ServerConfig { device: Some("lo".into()), ..config(&path) };
    let server = serve(config, Arc::clone(&database)).await.unwrap();
    let house = House { server, database, path, directory };
    let client = Client::connect(&house.path).await.unwrap();
    let (far, socket) = (Far::listen(), bound());
    socket.bind_device(Some(b"lo")).unwrap();
    let refused = client.bypass_socket(&socket, far.0.local_addr().unwrap()).await;
    assert!(refused.as_ref().is_err_and(|error| error.to_string().contains("bound to lo")), "{refused:?}");
    let free = bound();
    let _bypass = client.bypass_socket(&free, far.0.local_addr().unwrap()).await.unwrap();
    assert_eq!(free.device().unwrap(), None);
}

#[tokio::test]
async fn a_bypass_is_told_as_what_it_is_and_ends_its_connection() {
    let house = House::with_sa().await;
    let client = Client::connect(&house.path).await.unwrap();
    let (far, socket) = (Far::listen(), bound());
    let to = far.0.local_addr().unwrap();
    let bypass = client.bypass_socket(&socket, to).await.unwrap();
    let (local, number) = (bypass.local_addr(), bypass.latch());
    let flow = flow(TCP, local, to);
    let good = house.class("peer.example");
    assert_eq!(house.database.check(Direction::Inbound, &flow, Some(good)), Verdict::Drop);
    assert_eq!(refusal(client.bypass_socket(&socket, to).await), Code::Exists);
    socket.connect(&to.into()).unwrap();
    let (mut far_end, _) = far.0.accept().unwrap();
    far_end.set_read_timeout(Some(PATIENCE)).unwrap();

    let expected = Inquired {
        local,
        remote: to,
        protocol: TCP,
        latch: Some(LatchInfo { number, state: State::Established }),
        bypass: true,
        peer: None,
        protection: None,
        guard: Some(Guard::Engine),
        class: None,
        sas: Vec::new(),
    };
    for told in [
        client.show(number).await.unwrap(),
        client.whois(local, to).await.unwrap(),
        client.whois_socket(socket.as_fd()).await.unwrap(),
    ] {
        assert_eq!(told, expected);
    }
    let raw = house.raw().await;
    let shown = ask(&raw, &format!(r#"{{"id":1,"request":"show","arguments":{{"latch":{number}}}}}"#)).await;
    assert_eq!((&shown["result"]["bypass"], &shown["result"]["peer"]), (&json!(true), &json!(null)));
    // An SA of anybody changes nothing; the administrator ends it.
    house.install(2, house.class("mallory.example"));
    let mut changes = bypass.changes();
    client.break_latch(number).await.unwrap();
    let change = timeout(PATIENCE, changes.next()).await.unwrap();
    assert_eq!((change.state, change.reason.as_str()), (State::Broken, "broken by the administrator"));
    assert_eq!(far_end.read(&mut [0; 8]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    drop(bypass);
    house.no_latches().await;
}

#[tokio::test]
async fn a_bypass_ends_with_its_holder_and_with_the_daemon() {
    let house = House::with_sa().await;
    let (far, socket) = (Far::listen(), bound());
    let to = far.0.local_addr().unwrap();
    let client = Client::connect(&house.path).await.unwrap();
    let bypass = client.bypass_socket(&socket, to).await.unwrap();
    let flow = flow(TCP, bypass.local_addr(), to);
    socket.connect(&to.into()).unwrap();
    let (mut far_end, _) = far.0.accept().unwrap();
    far_end.set_read_timeout(Some(PATIENCE)).unwrap();
    drop((client, bypass));
    // Its connection ends before it does.
    let ended = tokio::task::spawn_blocking(move || far_end.read(&mut [0; 8])).await.unwrap();
    assert_eq!(ended.unwrap(), 0);
    house.no_latches().await;
    assert_eq!(house.database.check(Direction::Outbound, &flow, Some(house.class("peer.example"))), Verdict::Pass);

    // What waited in a UDP socket's queue is not read as if it had come afterwards.
    let (udp, peer) = (UdpSocket::bind("127.0.0.1:0").unwrap(), UdpSocket::bind("127.0.0.1:0").unwrap());
    peer.send_to(b"before", udp.local_addr().unwrap()).unwrap();
    let client = Client::connect(&house.path).await.unwrap();
    let bypass = client.bypass_socket(&udp, peer.local_addr().unwrap()).await.unwrap();
    udp.set_nonblocking(true).unwrap();
    assert_eq!(udp.recv(&mut [0; 8]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    let (number, database) = (LatchId(bypass.latch()), Arc::clone(&house.database));
    drop(house);
    assert_eq!(database.inquire(number).unwrap().state, LatchState::Closed);
    assert_eq!(database.check(Direction::Outbound, &flow_of(&udp), None), Verdict::Drop);
}

fn flow_of(udp: &UdpSocket) -> Flow {
    flow(UDP, udp.local_addr().unwrap(), udp.peer_addr().unwrap())
}
