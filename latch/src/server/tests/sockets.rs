//! What the clients' sockets have of the standard ones, against the server.

use std::io::{IoSlice, IoSliceMut};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::thread;

use tokio::io::{AsyncWrite, Interest};

use super::*;
use crate::blocking;

fn conflict(house: &House) {
    house.database.before_install(house.class("mallory.example"), &loopback(), &loopback()).unwrap();
}

fn is_reset<T: fmt::Debug>(outcome: io::Result<T>) {
    let error = outcome.unwrap_err();
    assert!(error.kind() == io::ErrorKind::ConnectionReset && error.to_string().contains("mallory.example"), "{error}");
}

#[tokio::test]
async fn a_stream_has_what_tokio_s_has() {
    let house = House::with_sa().await;
    let (client, far) = (Client::connect(&house.path).await.unwrap(), Far::listen());
    let (mut stream, mut far) = far.latch(&client).await;
    stream.set_nodelay(true).unwrap();
    stream.set_ttl(7).unwrap();
    assert_eq!((stream.nodelay().unwrap(), stream.ttl().unwrap()), (true, 7));
    assert!(stream.take_error().unwrap().is_none() && stream.as_raw_fd() == stream.as_fd().as_raw_fd());
    let mut buffer = [0; 4];
    assert_eq!(stream.try_read(&mut buffer).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    assert!(stream.ready(Interest::WRITABLE).await.unwrap().is_writable());
    stream.writable().await.unwrap();
    assert_eq!(stream.try_write(b"ping").unwrap(), 4);
    far.read_exact(&mut buffer).unwrap();
    far.write_all(b"pong").unwrap();
    stream.readable().await.unwrap();
    for _ in 0..2 {
        assert_eq!((stream.peek(&mut buffer).await.unwrap(), &buffer), (4, b"pong"));
    }
    assert_eq!(stream.try_read(&mut buffer).unwrap(), 4);

    // Both halves in one task, with pieces gathered.
    assert!(AsyncWrite::is_write_vectored(&stream));
    let (mut reader, mut writer) = stream.split();
    let pieces = [IoSlice::new(b"pi"), IoSlice::new(b"ng")];
    let (written, ()) = tokio::join!(writer.write_vectored(&pieces), async {
        far.write_all(b"both").unwrap();
        reader.read_exact(&mut buffer).await.unwrap();
    });
    assert_eq!((written.unwrap(), &buffer), (4, b"both"));
    far.read_exact(&mut buffer).unwrap();

    // The peer's orderly end is one.
    drop(far);
    assert_eq!(stream.read(&mut buffer).await.unwrap(), 0);
    assert_eq!(stream.peek(&mut buffer).await.unwrap(), 0);
    drop(stream);
    house.no_latches().await;
}

#[tokio::test]
async fn owned_halves_share_the_latch_and_hear_of_its_end() {
    let house = House::with_sa().await;
    let client = Client::connect(&house.path).await.unwrap();
    let (first, mut far) = Far::listen().latch(&client).await;
    let (second, other) = Far::listen().latch(&client).await;
    let ((reader, writer), (foreign, foreign_writer)) = (first.into_split(), second.into_split());
    assert_eq!((reader.latch(), writer.peer_identity().id.text.as_str()), (writer.latch(), "peer.example"));
    let crate::client::ReuniteError(reader, foreign_writer) = reader.reunite(foreign_writer).unwrap_err();
    // One half that goes away ends its direction, and the latch stays with the other.
    drop(foreign_writer);
    assert!(house.database.list().len() == 2 && foreign.try_read(&mut [0; 1]).is_err());
    drop(foreign);
    let stream = reader.reunite(writer).unwrap();
    let (mut reader, mut writer) = stream.into_split();
    let echo = tokio::spawn(async move {
        let mut buffer = [0; 4];
        reader.readable().await.unwrap();
        assert_eq!(reader.peek(&mut buffer).await.unwrap(), 4);
        reader.read_exact(&mut buffer).await.unwrap();
        (reader, buffer)
    });
    far.write_all(b"ping").unwrap();
    let (mut reader, buffer) = echo.await.unwrap();
    assert_eq!(&buffer, b"ping");
    writer.writable().await.unwrap();
    assert_eq!(writer.try_write(b"pong").unwrap(), 4);
    let waiting = tokio::spawn(async move { (reader.read(&mut [0; 4]).await, reader) });
    tokio::task::yield_now().await;
    conflict(&house);
    let (read, reader) = timeout(PATIENCE, waiting).await.unwrap().unwrap();
    // The system's word may come before the daemon's, which has the reason.
    assert_eq!(read.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    timeout(PATIENCE, reader.broken()).await.unwrap();
    is_reset(writer.write(b"x").await);
    is_reset(writer.writable().await);
    is_reset(writer.try_write(b"x"));
    is_reset(reader.readable().await);
    is_reset(reader.peek(&mut [0; 4]).await);
    drop(writer);
    assert!(house.database.list().iter().any(|(latch, ..)| latch.0 == reader.latch()), "the other half has it");
    drop((reader, other));
    house.no_latches().await;
}

#[tokio::test]
async fn a_udp_socket_has_what_tokio_s_has() {
    let house = House::with_sa().await;
    let client = Client::connect(&house.path).await.unwrap();
    let far = UdpSocket::bind("127.0.0.1:0").unwrap();
    let wanted = Wanted { on_break: Some(Disposition::Reset), ..Wanted::from("peer.example") };
    let socket = client.latch_udp(far.local_addr().unwrap(), None, wanted).await.unwrap();
    socket.set_ttl(7).unwrap();
    assert!(socket.ttl().unwrap() == 7 && socket.take_error().unwrap().is_none());
    let mut buffer = [0; 8];
    assert_eq!(socket.try_recv(&mut buffer).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    let elsewhere = "127.0.0.1:9".parse().unwrap();
    assert_eq!(socket.send_to(b"x", elsewhere).await.unwrap_err().kind(), io::ErrorKind::InvalidInput);
    socket.writable().await.unwrap();
    assert_eq!(socket.try_send(b"one").unwrap(), 3);
    assert_eq!(socket.send_to(b"two", socket.peer_addr()).await.unwrap(), 3);
    assert_eq!(far.recv_from(&mut buffer).unwrap(), (3, socket.local_addr()));
    far.send_to(b"answer", socket.local_addr()).unwrap();
    socket.readable().await.unwrap();
    assert_eq!(socket.peek(&mut buffer).await.unwrap(), 6);
    assert_eq!(socket.recv_from(&mut buffer).await.unwrap(), (6, far.local_addr().unwrap()));
    conflict(&house);
    assert_eq!(timeout(PATIENCE, socket.broken()).await.unwrap().state, State::Broken);
    is_reset(socket.recv_from(&mut buffer).await);
    is_reset(socket.peek(&mut buffer).await);
    is_reset(socket.send(b"x").await);
    is_reset(socket.try_recv(&mut buffer));
    assert!(socket.as_raw_fd() >= 0 && socket.try_send(b"x").is_err());
}

#[tokio::test]
async fn a_listener_has_what_tokio_s_has_and_events_are_a_stream() {
    let house = House::with_sa().await;
    let client = Client::connect(&house.path).await.unwrap();
    let mut events = Client::connect(&house.path).await.unwrap().watch().await.unwrap();
    let listener = client.listen_tcp("127.0.0.1:0".parse().unwrap(), "peer.example").await.unwrap();
    listener.set_ttl(7).unwrap();
    assert!(listener.ttl().unwrap() == 7 && listener.as_raw_fd() == listener.as_fd().as_raw_fd());
    let (_stream, _far) = Far::listen().latch(&client).await;
    let event = timeout(PATIENCE, std::future::poll_fn(|cx| events.poll_next(cx))).await.unwrap().unwrap();
    assert_eq!(event.state, State::Established);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_blocks_has_what_the_standard_one_has() {
    let house = House::with_sa().await;
    let client = blocking::Client::connect(&house.path).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let stream = client.latch_tcp(listener.local_addr().unwrap(), None, "peer.example").unwrap();
    let (mut far, _) = listener.accept().unwrap();
    far.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_nodelay(true).unwrap();
    stream.set_ttl(7).unwrap();
    assert!(stream.nodelay().unwrap() && stream.ttl().unwrap() == 7 && stream.take_error().unwrap().is_none());
    assert_eq!(stream.set_read_timeout(Some(Duration::ZERO)).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    let short = Some(Duration::from_millis(20));
    stream.set_read_timeout(short).unwrap();
    stream.set_write_timeout(short).unwrap();
    assert_eq!((stream.read_timeout().unwrap(), stream.write_timeout().unwrap()), (short, short));
    let mut buffer = [0; 4];
    let mut clone = stream.try_clone().unwrap();
    assert_eq!(clone.read(&mut buffer).unwrap_err().kind(), io::ErrorKind::WouldBlock, "clones share times");
    // Nobody reads: the room ends, and so does the patience.
    let full = loop {
        if let Err(error) = clone.write(&[0; 65_536]) {
            break error;
        }
    };
    assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
    drop(stream);
    let drained = thread::spawn(move || {
        let mut all = Vec::new();
        far.read_to_end(&mut all).unwrap();
        far.write_all(b"pong").unwrap();
        far
    });
    clone.shutdown(Shutdown::Write).unwrap();
    clone.set_read_timeout(None).unwrap();
    assert_eq!((clone.peek(&mut buffer).unwrap(), &buffer), (4, b"pong"));
    let (mut one, mut two) = ([0; 2], [0; 2]);
    let length = clone.read_vectored(&mut [IoSliceMut::new(&mut one), IoSliceMut::new(&mut two)]).unwrap();
    assert_eq!((length, &one, &two), (4, b"po", b"ng"), "the clone has the latch");
    clone.set_nonblocking(true).unwrap();
    assert_eq!(clone.read(&mut buffer).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    clone.set_nonblocking(false).unwrap();
    drop(drained.join().unwrap());
    assert_eq!(clone.read(&mut buffer).unwrap(), 0);
    assert!(clone.as_raw_fd() >= 0);
    drop(clone);
    house.no_latches().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn listeners_and_udp_sockets_that_block_have_what_the_standard_ones_have() {
    let house = House::with_sa().await;
    let client = blocking::Client::connect(&house.path).unwrap();
    let events = blocking::Client::connect(&house.path).unwrap().watch().unwrap();
    let far = UdpSocket::bind("127.0.0.1:0").unwrap();
    let socket = client.latch_udp(far.local_addr().unwrap(), None, "peer.example").unwrap();
    let first = events.take(1).last().unwrap();
    assert_eq!((first.latch, first.state), (socket.latch().number(), State::Established));
    socket.set_ttl(7).unwrap();
    socket.set_write_timeout(Some(PATIENCE)).unwrap();
    assert_eq!((socket.ttl().unwrap(), socket.write_timeout().unwrap()), (7, Some(PATIENCE)));
    let elsewhere = "127.0.0.1:9".parse().unwrap();
    assert_eq!(socket.send_to(b"x", elsewhere).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    assert_eq!(socket.try_clone().unwrap().send_to(b"one", socket.peer_addr()).unwrap(), 3);
    let mut buffer = [0; 8];
    assert_eq!(far.recv_from(&mut buffer).unwrap(), (3, socket.local_addr()));
    far.send_to(b"answer", socket.local_addr()).unwrap();
    let from = far.local_addr().unwrap();
    assert_eq!(socket.peek_from(&mut buffer).unwrap(), (6, from));
    assert_eq!(socket.recv_from(&mut buffer).unwrap(), (6, from));
    socket.set_nonblocking(true).unwrap();
    assert_eq!(socket.peek(&mut buffer).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    assert!(socket.take_error().unwrap().is_none() && socket.as_raw_fd() >= 0);

    let listener = client.listen_tcp("127.0.0.1:0".parse().unwrap(), "peer.example").unwrap();
    listener.set_ttl(7).unwrap();
    assert!(listener.ttl().unwrap() == 7 && listener.take_error().unwrap().is_none() && listener.as_raw_fd() >= 0);
    let far = std::net::TcpStream::connect(listener.local_addr()).unwrap();
    let near = flow(TCP, far.peer_addr().unwrap(), far.local_addr().unwrap());
    assert_eq!(house.database.check(Direction::Inbound, &near, Some(house.class("peer.example"))), Verdict::Pass);
    let stream = listener.incoming().next().unwrap().unwrap();
    assert_eq!(stream.peer_addr(), far.local_addr().unwrap());
}
