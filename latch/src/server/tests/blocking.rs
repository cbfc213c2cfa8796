//! The client that blocks, against the server.

use std::thread;

use rustix::event::{PollFd, PollFlags, Timespec};

use super::*;
use crate::blocking::{self, Client, ClientError, hold};

fn latch(client: &Client) -> (blocking::TcpStream, std::net::TcpStream) {
    let far = Far::listen();
    let stream = client.latch_tcp(far.0.local_addr().unwrap(), None, "peer.example").unwrap();
    let (far, _) = far.0.accept().unwrap();
    far.set_read_timeout(Some(PATIENCE)).unwrap();
    (stream, far)
}

fn conflict(house: &House) {
    house.database.before_install(house.class("mallory.example"), &loopback(), &loopback()).unwrap();
}

fn readable(descriptor: impl AsFd, wait: Duration) -> bool {
    let mut descriptors = [PollFd::new(&descriptor, PollFlags::IN)];
    rustix::event::poll(&mut descriptors, Some(&Timespec::try_from(wait).unwrap())).unwrap() > 0
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_blocks_is_refused_carries_data_and_ends_with_its_latch() {
    let house = House::new().await;
    let client = Client::connect(&house.path).unwrap();
    let far = TcpListener::bind("127.0.0.1:0").unwrap();
    far.set_nonblocking(true).unwrap();
    assert_eq!(refusal(client.latch_tcp(far.local_addr().unwrap(), None, "peer.example")), Code::NoSa);
    assert_eq!(far.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock, "nobody connected");
    house.install(1, house.class("peer.example"));

    let (mut stream, mut far) = latch(&client);
    assert_eq!(stream.peer_identity().id.text, "peer.example");
    assert_eq!(stream.protection().suite, "ENCR_AES_GCM_16 256 bits");
    assert_eq!(client.list().unwrap()[0].latch, stream.latch().number());
    let whois = client.whois_socket(&stream).unwrap();
    assert_eq!(whois.latch.unwrap().number, stream.latch().number());
    stream.write_all(b"ping").unwrap();
    let mut buffer = [0; 4];
    far.read_exact(&mut buffer).unwrap();
    far.write_all(b"pong").unwrap();
    stream.read_exact(&mut buffer).unwrap();
    assert_eq!(&buffer, b"pong");
    stream.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    assert_eq!(stream.read(&mut buffer).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    stream.set_read_timeout(None).unwrap();
    assert_eq!(stream.latch().state(), State::Established);
    assert_eq!(stream.latch().broken(Some(Duration::ZERO)), None);
    let mut changes = stream.latch().changes();

    // RFC 5660 §5.5 b: whoever reads hears of it at once, and it is no orderly end.
    let reader = thread::spawn(move || {
        let error = stream.read(&mut buffer).unwrap_err();
        (stream, error)
    });
    thread::sleep(Duration::from_millis(50));
    conflict(&house);
    let (mut stream, error) = reader.join().unwrap();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    let change = stream.latch().broken(Some(PATIENCE)).unwrap();
    assert!(change.state == State::Broken && change.reason.contains("mallory.example"), "{change:?}");
    assert_eq!(changes.next(Some(PATIENCE)), Some(change));
    assert_eq!(changes.next(Some(Duration::ZERO)), None);
    let error = stream.write(b"more").unwrap_err();
    assert!(error.to_string().contains("mallory.example"), "{error}");
    drop(stream);
    house.no_latches().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn threads_share_a_client_and_each_hears_what_is_for_it() {
    let house = House::with_sa().await;
    let client = Client::connect(&house.path).unwrap();
    let ((first, _far), (second, _too)) = (latch(&client), latch(&client));
    let (number, other) = (first.latch().number(), second.latch().number());
    let mut events = client.watch().unwrap();
    let waiter = thread::spawn(move || (first.latch().broken(Some(PATIENCE)), first));
    let askers: Vec<_> = (0..4)
        .map(|_| {
            let client = client.clone();
            thread::spawn(move || (0..50).all(|_| client.show(other).unwrap().latch.unwrap().number == other))
        })
        .collect();
    client.close_latch(number).unwrap();
    assert!(askers.into_iter().all(|asker| asker.join().unwrap()));
    let (change, _first) = waiter.join().unwrap();
    assert_eq!(change.unwrap().state, State::Closed);
    // The client's descriptor says that there is news, whichever thread has read it.
    assert!(readable(&client, PATIENCE));
    let (latch, change) = client.next_change(Some(PATIENCE)).unwrap().unwrap();
    assert_eq!((latch, change.state), (number, State::Closed));
    assert!(client.next_change(Some(Duration::ZERO)).unwrap().is_none());
    let event = events.next(Some(PATIENCE)).unwrap().unwrap();
    assert_eq!((event.latch, event.state), (number, State::Closed));
    assert!(events.next(Some(Duration::ZERO)).unwrap().is_none());
    assert!(!readable(&client, Duration::ZERO));
    assert_eq!(second.latch().state(), State::Established);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_end_of_the_daemon_ends_every_call() {
    let house = House::with_sa().await;
    let client = Client::connect(&house.path).unwrap();
    let ((mut stream, _far), mut events) = (latch(&client), client.watch().unwrap());
    let waiter = thread::spawn(move || (stream.read(&mut [0; 4]).unwrap_err().kind(), stream));
    drop(house.server);
    let (kind, stream) = waiter.join().unwrap();
    assert_eq!(kind, io::ErrorKind::ConnectionReset);
    assert_eq!(stream.latch().broken(None).unwrap().state, State::Closed);
    assert_eq!(client.next_change(None).unwrap().unwrap().0, stream.latch().number());
    assert!(matches!(client.next_change(None), Err(ClientError::Closed)));
    assert!(matches!(events.next(None), Err(ClientError::Closed)));
    assert!(matches!(client.list(), Err(ClientError::Closed)));
    assert!(matches!(stream.channel_binding(), Err(ClientError::Closed)));
    assert!(Client::connect(&house.path).is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_udp_socket_that_blocks_hears_of_its_end() {
    let house = House::with_sa().await;
    let client = Client::connect(&house.path).unwrap();
    let far = UdpSocket::bind("127.0.0.1:0").unwrap();
    let wanted = Wanted { on_break: Some(Disposition::Reset), ..Wanted::from("peer.example") };
    let socket = client.latch_udp(far.local_addr().unwrap(), None, wanted).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.send(b"ping").unwrap();
    let mut buffer = [0; 16];
    let (length, from) = far.recv_from(&mut buffer).unwrap();
    assert_eq!((&buffer[..length], from), (&b"ping"[..], socket.local_addr()));
    // An empty datagram is no end.
    far.send_to(b"", from).unwrap();
    assert_eq!(socket.recv(&mut buffer).unwrap(), 0);
    conflict(&house);
    let error = socket.recv(&mut buffer).unwrap_err();
    assert!(error.kind() == io::ErrorKind::ConnectionReset && error.to_string().contains("mallory.example"), "{error}");
    assert_eq!(socket.send(b"more").unwrap_err().kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_listener_that_blocks_gives_connections_with_their_latches() {
    let house = House::with_sa().await;
    let (client, class) = (Client::connect(&house.path).unwrap(), Some(house.class("peer.example")));
    let listener = client.listen_tcp("127.0.0.1:0".parse().unwrap(), "peer.example").unwrap();
    assert!(client.listen_tcp(listener.local_addr(), "peer.example").is_err(), "one listener for a port");
    let stray = std::net::TcpStream::connect(listener.local_addr()).unwrap();
    let far = std::net::TcpStream::connect(stray.peer_addr().unwrap()).unwrap();
    let near = flow(TCP, far.peer_addr().unwrap(), far.local_addr().unwrap());
    assert_eq!(house.database.check(Direction::Inbound, &near, class), Verdict::Pass);
    // The first has no latch, and is left out.
    let (stream, remote) = listener.accept().unwrap();
    assert_eq!((remote, stream.peer_identity().id.text.as_str()), (far.local_addr().unwrap(), "peer.example"));
    let waiter = thread::spawn(move || listener.accept().map(drop));
    drop(house.server);
    assert!(matches!(waiter.join().unwrap(), Err(ClientError::Closed)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_latch_that_a_descriptor_holds_goes_with_its_last_copy() {
    let house = House::with_sa().await;
    let far = TcpListener::bind("127.0.0.1:0").unwrap();
    let socket = bound();
    let wanted = Wanted { remote: Some(far.local_addr().unwrap()), ..Wanted::from("peer.example") };
    let call = Call::Create(wanted);
    let (held, created): (OwnedFd, Created) = hold(&house.path, &call, socket.as_fd()).unwrap();
    assert_eq!(created.remote, far.local_addr().unwrap());
    let again = hold::<Created>(&house.path, &call, socket.as_fd());
    assert_eq!(refusal(again), Code::Exists);
    let copy = held.try_clone().unwrap();
    drop(held);
    sleep(Duration::from_millis(100)).await;
    assert_eq!(house.database.list().len(), 1);
    drop(copy);
    house.no_latches().await;
}

// `latchkey exec`: processes that share a listener need not share a connection to the daemon.
#[tokio::test(flavor = "multi_thread")]
async fn whoever_has_the_accepted_socket_takes_the_latch_that_a_quiet_listener_made() {
    let house = House::with_sa().await;
    let class = Some(house.class("peer.example"));
    let socket = bound();
    let wanted = Wanted { quiet: true, ..Wanted::from("peer.example") };
    let (listener, listening): (OwnedFd, crate::protocol::Listening) =
        hold(&house.path, &Call::Listen(wanted.clone()), socket.as_fd()).unwrap();
    socket.listen(16).unwrap();
    let far = std::net::TcpStream::connect(listening.local).unwrap();
    let near = flow(TCP, far.peer_addr().unwrap(), far.local_addr().unwrap());
    let (accepted, _) = socket.accept().unwrap();
    let accept =
        |listener| hold::<Created>(&house.path, &Call::Accept(Accept { listener, remote: None }), accepted.as_fd());
    assert_eq!(refusal(accept(listening.latch)), Code::NotAccepted, "it came under no SA");
    assert_eq!(house.database.check(Direction::Inbound, &near, class), Verdict::Pass);
    assert_eq!(refusal(accept(listening.latch + 1)), Code::NoSuchLatch);
    let (held, created) = accept(listening.latch).unwrap();
    assert_eq!(created.peer.id.text, "peer.example");
    assert_eq!(refusal(accept(listening.latch)), Code::NotAccepted, "it is taken");
    // The default of a listener is kept: a break resets.
    conflict(&house);
    assert!((&accepted).read(&mut [0; 4]).is_err(), "and is no orderly end");
    // The listener's holder has heard nothing of all this, as it wanted.
    assert!(!readable(&listener, Duration::from_millis(50)));
    drop((held, listener));
    house.no_latches().await;
    let create = hold::<Created>(&house.path, &Call::Create(wanted), bound().as_fd());
    assert_eq!(refusal(create), Code::Malformed, "only a listener is quiet");
}
