//! UDP sockets that are not connected (RFC 5660 §5.3). The packets that a data plane would see are shown to the check here.

use std::thread;

use super::*;
use crate::blocking;
use crate::client::{UdpEndpoint, UdpPeer};

/// The flow of a far socket as it is seen at the endpoint.
fn near(endpoint: SocketAddr, far: &UdpSocket) -> Flow {
    flow(UDP, endpoint, far.local_addr().unwrap())
}

fn far() -> UdpSocket {
    let far = UdpSocket::bind("127.0.0.1:0").unwrap();
    far.set_read_timeout(Some(PATIENCE)).unwrap();
    far
}

impl House {
    /// A datagram that comes under an SA of this peer; false if it is dropped.
    fn comes(&self, endpoint: SocketAddr, far: &UdpSocket, peer: &str, what: &[u8]) -> bool {
        let class = Some(self.class(peer));
        let passes = self.database.check(Direction::Inbound, &near(endpoint, far), class) == Verdict::Pass;
        if passes {
            far.send_to(what, endpoint).unwrap();
        }
        passes
    }
}

async fn receives(endpoint: &UdpEndpoint) -> (Vec<u8>, UdpPeer) {
    let mut buffer = [0; 64];
    let (length, peer) = timeout(PATIENCE, endpoint.recv_from(&mut buffer)).await.unwrap().unwrap();
    (buffer[..length].to_vec(), peer)
}

async fn bind(client: &Client, peer: &str) -> UdpEndpoint {
    client.bind_udp("127.0.0.1:0".parse().unwrap(), peer).await.unwrap()
}

#[tokio::test]
async fn a_datagram_comes_with_who_sent_it() {
    let house = House::with_sa().await;
    let client = Client::connect(&house.path).await.unwrap();
    let endpoint = bind(&client, "peer.example").await;
    let local = endpoint.local_addr();
    let listed = client.list().await.unwrap();
    assert_eq!((listed[0].state, listed[0].protocol, listed[0].local), (State::Listener, UDP, local));
    assert_eq!(refusal(client.bind_udp("127.0.0.1:0".parse().unwrap(), "").await), Code::Identity);
    let mut buffer = [0; 64];
    assert_eq!(endpoint.try_recv_from(&mut buffer).unwrap_err().kind(), io::ErrorKind::WouldBlock);

    let (one, other) = (far(), far());
    assert!(!house.comes(local, &one, "mallory.example", b"forged"));
    // What got past the check all the same has no latch, and is nobody's.
    one.send_to(b"stray", local).unwrap();
    assert!(house.comes(local, &other, "peer.example", b"first"));
    let (octets, first) = receives(&endpoint).await;
    assert_eq!((octets.as_slice(), first.addr()), (&b"first"[..], other.local_addr().unwrap()));
    assert_eq!((first.identity().id.text.as_str(), first.protection().encr), ("peer.example", 20));
    assert_eq!(house.database.find(&near(local, &other)).unwrap().0, LatchId(first.latch()));
    assert!(
        house.comes(local, &one, "peer.example", b"second") && house.comes(local, &other, "peer.example", b"third")
    );
    let (second, third) = (receives(&endpoint).await, receives(&endpoint).await);
    assert_eq!((second.0.as_slice(), third.0.as_slice()), (&b"second"[..], &b"third"[..]));
    assert!(third.1 == first && second.1 != first && second.1.class() == first.class());
    assert_eq!((endpoint.peers().len(), endpoint.peer(first.addr())), (2, Some(first.clone())));

    endpoint.send_to(b"answer", &second.1).await.unwrap();
    assert_eq!(endpoint.try_send_to(b"more", &second.1).unwrap(), 4);
    assert_eq!((one.recv(&mut buffer).unwrap(), &buffer[..6]), (6, &b"answer"[..]));
    let listed = client.list().await.unwrap();
    assert_eq!((listed[1].listener, listed[1].remote), (Some(endpoint.listener()), Some(first.addr())));
    assert_eq!(endpoint.inquire(&first).await.unwrap().latch.unwrap().number, first.latch());
    assert_eq!(refusal(endpoint.channel_binding(&first).await), Code::NoBinding, "there is no IKE SA here");
    drop(endpoint);
    house.no_latches().await;
}

#[tokio::test]
async fn another_peer_of_the_same_address_is_another_one() {
    let house = House::with_sa().await;
    let client = Client::connect(&house.path).await.unwrap();
    let endpoint = bind(&client, "%any").await;
    let (local, far) = (endpoint.local_addr(), far());
    assert!(house.comes(local, &far, "peer.example", b"first"));
    let (_, first) = receives(&endpoint).await;
    let mut ended = Box::pin(endpoint.ended(&first));
    assert!(timeout(SETTLING, &mut ended).await.is_err());
    // This waits when the latch breaks.
    assert!(house.comes(local, &far, "peer.example", b"late"));
    house.install(2, house.class("mallory.example"));
    house.database.removed(1);
    let change = timeout(PATIENCE, ended).await.unwrap();
    assert!(change.state == State::Broken && change.reason.contains("mallory.example"), "{change:?}");
    let error = endpoint.send_to(b"for the first", &first).await.unwrap_err();
    assert!(error.kind() == io::ErrorKind::ConnectionReset && error.to_string().contains("mallory.example"), "{error}");
    assert!(endpoint.peers().is_empty() && first.ended().is_some());
    assert!(!house.comes(local, &far, "mallory.example", b"too soon"));

    // Whoever receives acknowledges.
    let receiving = tokio::spawn(async move {
        let received = receives(&endpoint).await;
        (endpoint, received)
    });
    timeout(PATIENCE, async {
        while !house.comes(local, &far, "mallory.example", b"second") {
            sleep(SETTLING / 5).await;
        }
    })
    .await
    .expect("the address is free");
    let (endpoint, (octets, second)) = receiving.await.unwrap();
    assert_eq!((octets.as_slice(), second.identity().id.text.as_str()), (&b"second"[..], "mallory.example"));
    assert!(second.addr() == first.addr() && second != first && second.class() != first.class());
    assert!(endpoint.send_to(b"x", &first).await.is_err() && endpoint.send_to(b"x", &second).await.is_ok());

    // The holder ends one, and the administrator.
    for end in ["holder", "administrator"] {
        let peer = endpoint.peers().pop().unwrap();
        match end {
            "holder" => endpoint.end(&peer).await.unwrap(),
            _ => client.close_latch(peer.latch()).await.unwrap(),
        }
        assert_eq!(timeout(PATIENCE, endpoint.ended(&peer)).await.unwrap().state, State::Closed);
        let again = async {
            while !house.comes(local, &far, "mallory.example", b"again") {
                let _ = timeout(SETTLING / 5, endpoint.recv_from(&mut [0; 8])).await;
            }
        };
        timeout(PATIENCE, again).await.expect("the address is free");
        assert_ne!(receives(&endpoint).await.1, peer);
    }
}

// RFC 5660 §5.3: the application speaks first, with a socket that is not connected.
#[tokio::test]
async fn an_endpoint_latches_whom_it_speaks_to() {
    let house = House::new().await;
    let client = Client::connect(&house.path).await.unwrap();
    let endpoint = bind(&client, "nobody.example").await;
    let (local, far) = (endpoint.local_addr(), far());
    let remote = far.local_addr().unwrap();
    assert_eq!(refusal(endpoint.latch(remote, "peer.example").await), Code::NoSa);
    house.install(1, house.class("peer.example"));
    assert_eq!(refusal(endpoint.latch(remote, "mallory.example").await), Code::WrongPeer);
    assert!(!house.comes(local, &far, "peer.example", b"unasked"));
    let peer = endpoint.latch(remote, "peer.example").await.unwrap();
    assert_eq!((endpoint.latch(remote, "%any").await.unwrap(), peer.addr()), (peer.clone(), remote));
    endpoint.send_to(b"question", &peer).await.unwrap();
    let mut buffer = [0; 64];
    assert_eq!(far.recv_from(&mut buffer).unwrap(), (8, local), "it is not connected");
    assert!(house.comes(local, &far, "peer.example", b"answer"));
    assert_eq!(receives(&endpoint).await, (b"answer".to_vec(), peer));
}

#[tokio::test]
async fn what_waits_when_the_endpoint_is_made_is_not_received() {
    let house = House::with_sa().await;
    let client = Client::connect(&house.path).await.unwrap();
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let (local, far) = (socket.local_addr().unwrap(), far());
    far.send_to(b"before", local).unwrap();
    let endpoint = client.latch_datagrams(socket, "peer.example").await.unwrap();
    assert!(house.comes(local, &far, "peer.example", b"after"));
    assert_eq!(receives(&endpoint).await.0, b"after");
}

// What survives the daemon shuts the socket down, which can be seen before its connection's end.
#[tokio::test(flavor = "multi_thread")]
async fn a_socket_that_is_shut_down_has_ended() {
    let house = House::with_sa().await;
    let (client, one) = (Client::connect(&house.path).await.unwrap(), blocking::Client::connect(&house.path).unwrap());
    let (endpoint, blocking) =
        (bind(&client, "%any").await, one.bind_udp("127.0.0.1:0".parse().unwrap(), "%any").unwrap());
    let (far, mut buffer) = (far(), [0; 8]);
    let remote = far.local_addr().unwrap();
    let peers = (endpoint.latch(remote, "%any").await.unwrap(), blocking.latch(remote, "%any").unwrap());
    let shut =
        |socket: BorrowedFd<'_>| crate::survivor::disconnect(&Socket::from(socket.try_clone_to_owned().unwrap()));
    shut(endpoint.as_fd());
    shut(blocking.as_fd());
    let received = timeout(PATIENCE, endpoint.recv_from(&mut buffer)).await.unwrap();
    assert_eq!(received.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(endpoint.send_to(b"x", &peers.0).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(blocking.recv_from(&mut buffer).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(blocking.send_to(b"x", &peers.1).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn the_end_of_the_daemon_ends_an_endpoint() {
    let house = House::with_sa().await;
    let client = Client::connect(&house.path).await.unwrap();
    let endpoint = bind(&client, "peer.example").await;
    let far = far();
    assert!(house.comes(endpoint.local_addr(), &far, "peer.example", b"hello"));
    let (_, peer) = receives(&endpoint).await;
    let waiting = tokio::spawn(async move {
        let error = endpoint.recv_from(&mut [0; 8]).await.unwrap_err();
        (endpoint, error)
    });
    tokio::task::yield_now().await;
    let House { server, database, directory: _directory, .. } = house;
    drop(server);
    let (endpoint, error) = timeout(PATIENCE, waiting).await.unwrap().unwrap();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(endpoint.send_to(b"x", &peer).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(database.list().len(), 1, "nobody may release it");
}

#[tokio::test]
async fn requests_about_datagrams_that_make_no_sense_are_refused() {
    let house = House::with_sa().await;
    let raw = house.raw().await;
    let (any, connected) = (UdpSocket::bind("0.0.0.0:0").unwrap(), far());
    connected.connect("127.0.0.1:9").unwrap();
    let listen = json!({"id": 1, "request": "listen", "arguments": {"peer": "%any"}}).to_string();
    for (socket, why) in [(&any, "to no address"), (&connected, "connected")] {
        raw.send(listen.as_bytes(), Some(socket.as_fd())).await.unwrap();
        let answer = answer(&raw).await;
        assert!(answer["code"] == "socket" && answer["message"].as_str().unwrap().contains(why), "{answer}");
    }
    let (socket, other) = (far(), far());
    raw.send(listen.as_bytes(), Some(socket.as_fd())).await.unwrap();
    let listener = answer(&raw).await["result"]["latch"].as_u64().unwrap();
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    raw.send(listen.as_bytes(), Some(tcp.as_fd())).await.unwrap();
    let of_tcp = answer(&raw).await["result"]["latch"].as_u64().unwrap();
    let remote = other.local_addr().unwrap();
    for (request, arguments, code) in [
        ("create", json!({"peer": "%any", "listener": listener}), "malformed"),
        ("create", json!({"peer": "%any", "listener": listener, "remote": remote, "larval": true}), "malformed"),
        ("create", json!({"peer": "%any", "listener": listener, "remote": remote, "on_break": "wait"}), "malformed"),
        ("create", json!({"peer": "%any", "listener": 99, "remote": remote}), "no-such-latch"),
        ("create", json!({"peer": "%any", "listener": of_tcp, "remote": remote}), "no-such-latch"),
        ("create", json!({"peer": "%any", "listener": listener, "remote": "[::1]:9"}), "socket"),
        ("create", json!({"peer": "%any", "listener": listener, "remote": "127.0.0.1:0"}), "socket"),
        ("accept", json!({"listener": listener, "remote": remote}), "not-accepted"),
        ("accept", json!({"listener": of_tcp, "remote": remote}), "no-such-latch"),
        ("accept", json!({"listener": listener}), "descriptor"),
    ] {
        let request = json!({"id": 1, "request": request, "arguments": arguments}).to_string();
        let answer = ask(&raw, &request).await;
        assert_eq!(answer["code"], code, "{request}: {answer}");
    }
    // Those of another connection to the daemon are not ours.
    assert!(house.comes(socket.local_addr().unwrap(), &other, "peer.example", b"x"));
    let alert = answer(&raw).await;
    assert_eq!((&alert["state"], &alert["listener"]), (&json!("established"), &json!(listener)));
    let stranger = house.raw().await;
    for (request, arguments) in [
        ("accept", json!({"listener": listener, "remote": remote})),
        ("create", json!({"peer": "%any", "listener": listener, "remote": remote})),
        ("release", json!({"latch": alert["latch"]})),
        ("channel-binding", json!({"latch": alert["latch"], "type": UNIQUE_BINDING})),
    ] {
        let request = json!({"id": 1, "request": request, "arguments": arguments}).to_string();
        assert_eq!(ask(&stranger, &request).await["code"], "no-such-latch", "{request}");
    }
    let accept =
        json!({"id": 1, "request": "accept", "arguments": {"listener": listener, "remote": remote}}).to_string();
    raw.send(accept.as_bytes(), Some(socket.as_fd())).await.unwrap();
    assert_eq!(answer(&raw).await["code"], "descriptor");
    let accepted = ask(&raw, &accept).await;
    assert_eq!((&accepted["result"]["latch"], &accepted["result"]["remote"]), (&alert["latch"], &json!(remote)));
    // Its socket is not what a connection's would be.
    let accept = json!({"id": 1, "request": "accept", "arguments": {"listener": listener}}).to_string();
    let connected = far();
    connected.connect(remote).unwrap();
    raw.send(accept.as_bytes(), Some(connected.as_fd())).await.unwrap();
    assert_eq!(answer(&raw).await["code"], "not-accepted");
}

// A holder that hears nothing acknowledges nothing.
#[tokio::test]
async fn who_is_quiet_need_not_acknowledge() {
    let house = House::with_sa().await;
    let raw = house.raw().await;
    let (socket, other) = (far(), far());
    let listen = json!({"id": 1, "request": "listen", "arguments": {"peer": "%any", "quiet": true}}).to_string();
    raw.send(listen.as_bytes(), Some(socket.as_fd())).await.unwrap();
    assert_eq!(answer(&raw).await["type"], "reply");
    let local = socket.local_addr().unwrap();
    assert!(house.comes(local, &other, "peer.example", b"x"));
    let (first, ..) = house.database.find(&near(local, &other)).unwrap();
    house.install(2, house.class("mallory.example"));
    house.database.removed(1);
    assert!(!house.comes(local, &other, "mallory.example", b"x"));
    let free = async {
        while !house.comes(local, &other, "mallory.example", b"x") {
            sleep(SETTLING / 5).await;
        }
    };
    timeout(PATIENCE, free).await.expect("it is forgotten");
    assert_ne!(house.database.find(&near(local, &other)).unwrap().0, first);
    assert_eq!(ask(&raw, r#"{"id":9,"request":"list"}"#).await["id"], 9, "and no alert");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_blocks_does_the_same() {
    let house = House::with_sa().await;
    let client = blocking::Client::connect(&house.path).unwrap();
    let endpoint = client.bind_udp("127.0.0.1:0".parse().unwrap(), "%any").unwrap();
    let (local, far) = (endpoint.local_addr(), far());
    let mut buffer = [0; 64];
    endpoint.set_read_timeout(Some(Duration::ZERO));
    assert_eq!(endpoint.recv_from(&mut buffer).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    endpoint.set_read_timeout(Some(PATIENCE));
    assert!(house.comes(local, &far, "peer.example", b"first"));
    let (length, first) = endpoint.recv_from(&mut buffer).unwrap();
    assert_eq!((&buffer[..length], first.identity().id.text.as_str()), (&b"first"[..], "peer.example"));
    assert_eq!(endpoint.send_to(b"answer", &first).unwrap(), 6);
    assert_eq!(far.recv(&mut buffer).unwrap(), 6);
    assert_eq!(endpoint.peers(), std::slice::from_ref(&first));
    let mut changes = endpoint.changes(&first);
    house.install(2, house.class("mallory.example"));
    house.database.removed(1);
    assert_eq!(changes.next(Some(PATIENCE)).unwrap().state, State::Broken);
    assert_eq!(endpoint.send_to(b"x", &first).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    let reader = thread::spawn(move || {
        let (_, peer) = endpoint.recv_from(&mut buffer).unwrap();
        (endpoint, peer)
    });
    while !house.comes(local, &far, "mallory.example", b"second") {
        sleep(SETTLING / 5).await;
    }
    let (endpoint, second) = reader.join().unwrap();
    assert!(second != first && second.identity().id.text == "mallory.example");
    assert_eq!(endpoint.peer(second.addr()), Some(second.clone()));
    let other = self::far();
    let third = endpoint.latch(other.local_addr().unwrap(), "mallory.example").unwrap();
    endpoint.send_to(b"hello", &third).unwrap();
    assert_eq!(other.recv(&mut buffer).unwrap(), 5);
    assert_eq!(refusal(endpoint.channel_binding(&third)), Code::NoBinding);
    assert_eq!(endpoint.inquire(&third).unwrap().remote, third.addr());
    // TCP has another call.
    assert!(client.latch_listener(&other, "%any").is_err() && client.latch_datagrams(bound(), "%any").is_err());
    drop(endpoint);
    house.no_latches().await;
}

// An SA that is being made for one of many does not keep the others from being told apart.
#[tokio::test]
async fn who_waits_for_an_sa_keeps_nobody_waiting() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("latch.sock");
    let database = Arc::new(Database::new());
    let (begin, mut begun) = mpsc::unbounded_channel();
    let (finish, finished) = watch::channel(false);
    let initiator = Initiator::new(move |flow, narrow| {
        let (begin, mut finished) = (begin.clone(), finished.clone());
        Box::pin(async move {
            begin.send((flow, narrow)).unwrap();
            finished.wait_for(|finished| *finished).await.map(drop).map_err(|error| error.to_string())
        })
    });
    let config = ServerConfig { initiator: Some(initiator), ..config(&path) };
    let limits = Limits { latches_per_connection: 2, ..LIMITS };
    let server = serve_within(config, Arc::clone(&database), limits).await.unwrap();
    let house = House { server, database, path, directory };
    house.install(1, house.class("peer.example"));
    let client = Client::connect(&house.path).await.unwrap();
    let endpoint = Arc::new(bind(&client, "%any").await);
    let (local, far, waited_for) = (endpoint.local_addr(), far(), self::far());
    let narrow = Wanted { initiate: Initiate::Narrow, ..Wanted::from("peer.example") };
    let latching = [9, waited_for.local_addr().unwrap().port()].map(|port| {
        let (endpoint, narrow) = (Arc::clone(&endpoint), narrow.clone());
        tokio::spawn(async move { endpoint.latch(SocketAddr::new(local.ip(), port), narrow).await })
    });
    for _ in 0..2 {
        assert!(timeout(PATIENCE, begun.recv()).await.unwrap().unwrap().1);
    }
    assert_eq!(refusal(endpoint.latch("127.0.0.1:8".parse().unwrap(), narrow).await), Code::Limit);
    assert!(house.comes(local, &far, "peer.example", b"meanwhile"));
    assert_eq!(receives(&endpoint).await.0, b"meanwhile");
    // One of them comes by itself before its SA is there, and stays who it is.
    assert!(house.comes(local, &waited_for, "peer.example", b"by itself"));
    let (_, came) = receives(&endpoint).await;
    // The daemon goes on saying that it works on it.
    sleep(crate::session::SILENCE + PROGRESS).await;
    finish.send(true).unwrap();
    let [first, second] = latching;
    assert_eq!(timeout(PATIENCE, first).await.unwrap().unwrap().unwrap().addr().port(), 9);
    assert_eq!(timeout(PATIENCE, second).await.unwrap().unwrap().unwrap(), came);
    // Those who still wait when the endpoint goes get nothing.
    drop(endpoint);
    house.no_latches().await;
}

#[tokio::test]
async fn an_endpoint_of_ipv6_speaks_ipv4_and_is_waited_for_as_others_are() {
    let house = House::with_sa().await;
    let client = Client::connect(&house.path).await.unwrap();
    let endpoint = client.bind_udp("[::ffff:127.0.0.1]:0".parse().unwrap(), "%any").await.unwrap();
    let (local, far) = (endpoint.local_addr(), far());
    assert!(local.is_ipv4() && timeout(SETTLING, endpoint.readable()).await.is_err());
    assert!(house.comes(local, &far, "peer.example", b"first"));
    let mut buffer = [0; 64];
    let received = async {
        loop {
            endpoint.readable().await.unwrap();
            match endpoint.try_recv_from(&mut buffer) {
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
                Ok(received) => break received,
            }
        }
    };
    let (length, peer) = timeout(PATIENCE, received).await.unwrap();
    assert_eq!((length, peer.addr()), (5, far.local_addr().unwrap()));
    endpoint.writable().await.unwrap();
    endpoint.send_to(b"answer", &peer).await.unwrap();
    assert_eq!(far.recv(&mut buffer).unwrap(), 6);
    let other = self::far();
    let other_peer = endpoint.latch(other.local_addr().unwrap(), "%any").await.unwrap();
    endpoint.send_to(b"hello", &other_peer).await.unwrap();
    assert_eq!(other.recv(&mut buffer).unwrap(), 5);
    endpoint.set_ttl(7).unwrap();
    assert!(endpoint.take_error().unwrap().is_none() && endpoint.ttl().unwrap() == 7);
    // What ended is acknowledged by who waits in this way, too.
    endpoint.end(&peer).await.unwrap();
    let free = async {
        while !house.comes(local, &far, "peer.example", b"again") {
            let _ = timeout(SETTLING / 5, endpoint.readable()).await;
            let _ = endpoint.try_recv_from(&mut buffer);
        }
    };
    timeout(PATIENCE, free).await.expect("the address is free");
    endpoint.end(&peer).await.unwrap();
}
