//! On loopback with real sockets. The peer is a bare `TcpStream` that says what it likes.

use std::sync::atomic::AtomicUsize;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::codec::{Frame, PREFIX, frame_esp};

/// Longer than anything here takes on a busy machine.
const LONG: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(300);

// --- what strangers may not do

// RFC 9329 §4, §6.1
#[tokio::test]
async fn a_stream_without_the_prefix_is_closed_and_never_heard_of() {
    let mut host = Host::new(StreamLimits::default()).await;
    for wrong in [&b"GET / HTTP/1.1\r\n\r\n"[..], &ike(b"no prefix"), b"IKETCQ"] {
        let mut peer = host.connect().await;
        peer.write_all(wrong).await.unwrap();
        assert_closed(&mut peer).await;
    }
    host.settled().await;
    assert!(host.events.try_recv().is_err());
}

// RFC 9329 §3.1, §3.2
#[tokio::test]
async fn length_0_and_1_close_the_stream() {
    let mut host = Host::new(StreamLimits::default()).await;
    for length in [0u16, 1] {
        let (mut peer, stream) = host.opened().await;
        peer.write_all(&length.to_be_bytes()).await.unwrap();
        assert_eq!(host.closed(stream).await, format!("frame length {length} is impossible"));
        assert_closed(&mut peer).await;
    }
}

// RFC 9329 §6.1: corruption.
#[tokio::test]
async fn many_runts_close_the_stream_and_a_few_do_not() {
    let mut host = Host::new(StreamLimits::default()).await;
    let (mut peer, stream) = host.opened().await;
    peer.write_all(&[0, 3, 1, 0, 4, 1, 2, 0, 5, 1, 2, 3]).await.unwrap();
    peer.write_all(&ike(b"still here")).await.unwrap();
    assert_eq!(host.ike(stream).await, b"still here");
    peer.write_all(&[0, 3, 1, 0, 3, 1, 0, 3, 1, 0, 3, 1, 0, 3, 1]).await.unwrap();
    assert!(host.closed(stream).await.contains("too short"));
}

// RFC 9329 §10 (resources of a responder): no octet, half a prefix, the prefix alone, half a first message.
#[tokio::test]
async fn a_silent_stream_is_closed_after_the_first_message_timer() {
    let mut host = Host::new(StreamLimits { first_message: SHORT, ..StreamLimits::default() }).await;
    for said in [&b""[..], b"IKE", b"IKETCP", b"IKETCP\x00\x20\x00\x00\x00\x00half", b"IKETCP\x00\x02\x00\x03\xff"] {
        let mut peer = host.connect().await;
        peer.write_all(said).await.unwrap();
        assert_closed(&mut peer).await;
    }
    host.settled().await;
    let mut closed = 0;
    while let Ok(event) = host.events.try_recv() {
        match event {
            StreamEvent::Opened { accepted: true, .. } => {}
            StreamEvent::Closed { reason, .. } => {
                assert_eq!(reason, "no message in time");
                closed += 1;
            }
            other => panic!("unexpected: {other:?}"),
        }
    }
    assert_eq!(closed, 3, "those with a whole prefix");
    assert_eq!(host.streams.unvouched_streams(), 0);
}

// RFC 9329 §10
#[tokio::test]
async fn a_stream_that_nobody_vouches_for_is_closed_however_much_it_talks() {
    let mut host = Host::new(StreamLimits { unauthenticated: SHORT, ..StreamLimits::default() }).await;
    let (peer, stream) = host.opened().await;
    let (mut read, mut write) = peer.into_split();
    let talker = tokio::spawn(async move { while write.write_all(&esp(7, 100)).await.is_ok() {} });
    assert_eq!(host.closed(stream).await, "no authentic message in time");
    let _ = read.read_to_end(&mut Vec::new()).await;
    talker.await.unwrap();
}

#[tokio::test]
async fn a_stream_that_was_vouched_for_outlives_the_timers_of_strangers() {
    let limits = StreamLimits { unauthenticated: SHORT, first_message: SHORT, ..StreamLimits::default() };
    let mut host = Host::new(limits).await;
    let (mut peer, stream) = host.opened().await;
    assert_eq!(host.streams.unvouched_streams(), 1);
    host.streams.vouch(stream);
    assert_eq!(host.streams.unvouched_streams(), 0);
    sleep(3 * SHORT).await;
    peer.write_all(&ike(b"alive")).await.unwrap();
    assert_eq!(host.ike(stream).await, b"alive");
}

// RFC 9329 §10: one octet now and then must not hold a stream open, vouched for or not.
#[tokio::test]
async fn a_slow_loris_runs_into_the_partial_frame_timer() {
    let mut host = Host::new(StreamLimits { partial_frame: SHORT, ..StreamLimits::default() }).await;
    let (mut peer, stream) = host.opened().await;
    host.streams.vouch(stream);
    peer.set_nodelay(true).unwrap();
    let loris = tokio::spawn(async move {
        let _ = peer.write_all(&[0x7f, 0xff]).await;
        while peer.write_all(&[1]).await.is_ok() {
            sleep(Duration::from_millis(20)).await;
        }
    });
    assert_eq!(host.closed(stream).await, "half a message in time");
    loris.await.unwrap();
}

#[tokio::test]
async fn one_address_gets_only_so_many_unvouched_streams() {
    let limits = StreamLimits { max_unauthenticated_per_address: 2, ..StreamLimits::default() };
    let mut host = Host::new(limits).await;
    let (_first, number) = host.opened().await;
    let (_second, _) = host.opened().await;
    let mut third = host.connect().await;
    assert_closed(&mut third).await;

    host.streams.vouch(number);
    let (_fourth, _) = host.opened().await;
    assert_eq!((host.streams.open_streams(), host.streams.unvouched_streams()), (3, 2));
}

#[tokio::test]
async fn all_strangers_together_get_only_so_many_streams() {
    let mut host = Host::new(StreamLimits { max_unauthenticated: 1, ..StreamLimits::default() }).await;
    let (mut first, number) = host.opened().await;
    let (_second, second) = host.opened().await;
    assert_eq!(host.closed(number).await, EVICTED);
    assert_closed(&mut first).await;
    // One without a prefix too.
    let mut third = host.connect().await;
    assert_eq!(host.closed(second).await, EVICTED);
    let (_fourth, fourth) = host.opened().await;
    assert_closed(&mut third).await;
    // One that was vouched for is no stranger.
    host.streams.vouch(fourth);
    let (_fifth, _) = host.opened().await;
    assert_eq!((host.streams.open_streams(), host.streams.unvouched_streams()), (2, 1));
}

// RFC 9329 §6.1: "too many subsequent messages"; "only a few" unknown SPIs are no reason.
#[tokio::test]
async fn complaints_in_a_row_close_the_stream_and_a_good_message_forgives() {
    let mut host = Host::new(StreamLimits { max_complaints: 3, ..StreamLimits::default() }).await;
    let (mut peer, stream) = host.opened().await;
    for _ in 0..5 {
        host.streams.complain(stream, Complaint::UnknownSpi);
        host.streams.complain(stream, Complaint::Unparsable);
        host.streams.vouch(stream);
        peer.write_all(&ike(b"still open")).await.unwrap();
        assert_eq!(host.ike(stream).await, b"still open");
    }
    // On a stream that is known good they have to last.
    for _ in 0..30 {
        host.streams.complain(stream, Complaint::UnknownSpi);
    }
    peer.write_all(&ike(b"still open")).await.unwrap();
    assert_eq!(host.ike(stream).await, b"still open");
    sleep(StreamLimits::default().complaint_grace).await;
    host.streams.complain(stream, Complaint::UnknownSpi);
    assert_eq!(host.closed(stream).await, MEANINGLESS);

    let (_peer, stream) = host.opened().await;
    for _ in 0..3 {
        host.streams.complain(stream, Complaint::UnknownSpi);
    }
    assert_eq!(host.closed(stream).await, MEANINGLESS);
}

// RFC 9329 §6.1: the same for ESP, whose worth its handler says.
#[tokio::test]
async fn esp_of_unknown_sas_in_a_row_and_forged_esp_close_the_stream() {
    let mut host = Host::new(StreamLimits { max_complaints: 5, ..StreamLimits::default() }).await;
    let (mut peer, stream) = host.opened().await;
    for _ in 0..4 {
        peer.write_all(&[esp(UNKNOWN, 30), esp(UNKNOWN, 30), esp(0x1111_1111, 30), esp(UNKNOWN, 30)].concat())
            .await
            .unwrap();
        // Each a read of its own.
        peer.write_all(&ike(b"and on")).await.unwrap();
        assert_eq!(host.ike(stream).await, b"and on");
    }
    peer.write_all(&[esp(UNKNOWN, 30), esp(UNKNOWN, 30), esp(UNKNOWN, 30), esp(UNKNOWN, 30)].concat()).await.unwrap();
    assert_eq!(host.closed(stream).await, MEANINGLESS);
    assert_closed(&mut peer).await;

    let (mut peer, stream) = host.opened().await;
    host.streams.vouch(stream);
    peer.write_all(&[esp(FORGED, 30), esp(0x1111_1111, 30)].concat()).await.unwrap();
    assert_eq!(host.closed(stream).await, UNAUTHENTIC);
}

// RFC 9329 §6.1: the authentication check of a message with a known SPI fails.
#[tokio::test]
async fn one_message_that_is_not_authentic_closes_the_stream() {
    let mut host = Host::new(StreamLimits::default()).await;
    let (_peer, stream) = host.opened().await;
    host.streams.complain(stream, Complaint::Unauthentic);
    assert_eq!(host.closed(stream).await, "a message failed its integrity check");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_broken_streams_leave_nothing() {
    let limits = StreamLimits {
        first_message: Duration::from_secs(2),
        max_unauthenticated_per_address: 2000,
        max_unauthenticated: 2000,
        ..StreamLimits::default()
    };
    let mut host = Host::new(limits).await;
    let address = host.address;
    let mut peers = JoinSet::new();
    for worker in 0..10u32 {
        peers.spawn(async move {
            for turn in 0..100u32 {
                let broken: &[u8] = match (worker + turn) % 10 {
                    0 => b"",
                    1 => b"IKE",
                    2 => b"SSH-2.0-x\r\n",
                    3 => b"IKETCP\x00\x00",
                    4 => b"IKETCP\x00\x01",
                    5 => b"IKETCP\xff\xff\x01\x02\x03",
                    6 => b"IKETCP\x00\x03\x01\x00\x03\x01\x00\x03\x01\x00\x03\x01\x00\x03\x01",
                    7 => b"IKETCP\x00\x08\x00\x00\x00\x00\x2e",
                    8 => b"IKETCP\x00\x08\x00\x00\x00\x00ab\x00",
                    _ => b"IKETCP\x00\x07\x01\x02\x03\x04\x05\x00\x01",
                };
                let mut peer = TcpStream::connect(address).await.unwrap();
                let _ = peer.write_all(broken).await;
                if turn % 2 == 0 {
                    // Reset instead of FIN.
                    peer.set_zero_linger().unwrap();
                }
            }
        });
    }
    let drain = async {
        let (mut opened, mut closed) = (0, 0);
        while let Ok(Some(event)) = timeout(Duration::from_secs(4), host.events.recv()).await {
            match event {
                StreamEvent::Opened { .. } => opened += 1,
                StreamEvent::Closed { .. } => closed += 1,
                StreamEvent::Ike { bytes, .. } => assert_eq!(bytes, b"ab"),
            }
        }
        (opened, closed)
    };
    let (opened, closed) = drain.await;
    peers.join_all().await;
    assert!(opened > 300, "{opened} with a good prefix");
    assert_eq!(opened, closed);
    host.settled().await;
    assert_eq!(host.streams.unvouched_streams(), 0);
    assert!(host.streams.inner.table().streams.is_empty());
    host.opened().await;
}

// RFC 9329 §5: a responder listens, also after descriptors ran out. In a process of its own, for its limit.
#[test]
fn a_listener_survives_a_lack_of_descriptors() {
    let name = "streams::tests::a_listener_survives_a_lack_of_descriptors";
    if std::env::var_os("FEW_DESCRIPTORS").is_none() {
        let output = std::process::Command::new("sh")
            .args(["-c", "ulimit -n 40 && exec \"$0\" --exact --nocapture \"$1\""])
            .arg(std::env::current_exe().unwrap())
            .arg(name)
            .env("FEW_DESCRIPTORS", "1")
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && said.contains("1 passed"), "{said}");
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut host = Host::new(StreamLimits::default()).await;
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        let hog: Vec<_> = std::iter::from_fn(|| std::fs::File::open("/dev/null").ok()).collect();
        assert!(!hog.is_empty() && std::fs::File::open("/dev/null").is_err(), "descriptors ran out");

        let mut peer = socket.connect(host.address).await.unwrap();
        peer.write_all(&PREFIX).await.unwrap();
        sleep(SHORT).await;
        assert_eq!(host.streams.open_streams(), 0, "cannot be accepted yet");
        drop(hog);
        host.next_opened().await;
    });
}

// --- framing on real sockets

// RFC 9329 §6.1: "MUST wait for the entire stream prefix".
#[tokio::test]
async fn the_prefix_may_come_in_two_segments() {
    let mut host = Host::new(StreamLimits::default()).await;
    let mut peer = host.connect().await;
    peer.set_nodelay(true).unwrap();
    peer.write_all(b"IKE").await.unwrap();
    sleep(Duration::from_millis(50)).await;
    assert!(host.events.try_recv().is_err());
    peer.write_all(b"TCP").await.unwrap();
    let stream = host.next_opened().await;
    peer.write_all(&ike(b"hello")).await.unwrap();
    assert_eq!(host.ike(stream).await, b"hello");
}

// RFC 9329 §3
#[tokio::test]
async fn a_stream_octet_by_octet_gives_its_messages() {
    let mut host = Host::new(StreamLimits::default()).await;
    let mut peer = host.connect().await;
    peer.set_nodelay(true).unwrap();
    let all = [&PREFIX[..], &ike(b"one"), &esp(9, 12), &ike(b"two")].concat();
    for octet in all {
        peer.write_all(&[octet]).await.unwrap();
        tokio::task::yield_now().await;
    }
    let stream = host.next_opened().await;
    assert_eq!(host.ike(stream).await, b"one");
    assert_eq!(host.ike(stream).await, b"two");
    assert_eq!(host.esp_seen.load(Ordering::SeqCst), 1, "ESP in its place between them");
}

// RFC 9329 §3 (empty), §6.6 (keepalive)
#[tokio::test]
async fn empty_messages_and_keepalives_are_silently_dropped() {
    let mut host = Host::new(StreamLimits::default()).await;
    let (mut peer, stream) = host.opened().await;
    for _ in 0..200 {
        peer.write_all(&[0, 2, 0, 3, 0xff]).await.unwrap();
    }
    peer.write_all(&ike(b"after")).await.unwrap();
    assert_eq!(host.ike(stream).await, b"after");
    assert_eq!(host.esp_seen.load(Ordering::SeqCst), 0);
}

// RFC 9329 §3
#[tokio::test]
async fn the_largest_messages_pass_both_ways_and_larger_ones_are_refused() {
    let mut host = Host::new(StreamLimits::default()).await;
    let (mut peer, stream) = host.opened().await;
    let largest = vec![1; 65_529];
    assert!(!host.streams.send_ike(stream, &[1; 65_530]));
    assert!(host.streams.send_ike(stream, &largest));
    assert_eq!(read_frame(&mut peer, &mut Deframer::without_prefix()).await, Frame::Ike(BytesMut::from(&largest[..])));
    peer.write_all(&ike(&largest)).await.unwrap();
    assert_eq!(host.ike(stream).await, largest);
}

// RFC 9329 §6.1: "MUST discard a partially received message due to a broken connection".
#[tokio::test]
async fn half_a_message_at_the_end_of_a_stream_is_discarded() {
    let mut host = Host::new(StreamLimits::default()).await;
    let (mut peer, stream) = host.opened().await;
    let message = ike(b"a message cut in two");
    peer.write_all(&message[..15]).await.unwrap();
    drop(peer);
    assert_eq!(host.closed(stream).await, "the peer closed it in the middle of a message");

    // RFC 9329 §6.1: the rest of it on a new stream begins nothing either.
    let (mut peer, stream) = host.opened().await;
    peer.write_all(&ike(b"whole")).await.unwrap();
    assert_eq!(host.ike(stream).await, b"whole");
}

// --- as TCP Originator

// RFC 9329 §4, §6.1: prefix first, once, only by the originator.
#[tokio::test]
async fn an_originator_sends_the_prefix_together_with_the_first_message() {
    let (listener, mut host) = remote().await;
    host.streams.open(7, any_local(), listener.local_addr().unwrap());
    assert!(host.streams.send_ike(7, b"first"), "may be queued before the stream is up");
    let (mut peer, _) = listener.accept().await.unwrap();
    assert_eq!(host.next_opened().await, 7);

    let mut got = vec![0; 1024];
    let read = peer.read(&mut got).await.unwrap();
    assert_eq!(&got[..read], [&PREFIX[..], &ike(b"first")].concat(), "one segment");
    host.streams.send_ike(7, b"second");
    let read = peer.read(&mut got).await.unwrap();
    assert_eq!(&got[..read], ike(b"second"), "no prefix again");

    // The responder's side sends no prefix.
    peer.write_all(&ike(b"answer")).await.unwrap();
    assert_eq!(host.ike(7).await, b"answer");
}

// RFC 9329 §6.1
#[tokio::test]
async fn an_originator_with_nothing_to_say_sends_the_prefix_alone() {
    let (listener, mut host) = remote().await;
    host.streams.open(1, any_local(), listener.local_addr().unwrap());
    let (mut peer, _) = listener.accept().await.unwrap();
    host.next_opened().await;
    let mut got = vec![0; 64];
    let read = peer.read(&mut got).await.unwrap();
    assert_eq!(&got[..read], PREFIX);
}

// RFC 9329 §6.1: the originator re-opens, with the prefix again.
#[tokio::test]
async fn a_stream_can_be_opened_again_after_it_was_closed() {
    let (listener, mut host) = remote().await;
    for turn in 0..3 {
        host.streams.open(5, any_local(), listener.local_addr().unwrap());
        host.streams.send_ike(5, b"again");
        let (mut peer, _) = listener.accept().await.unwrap();
        assert_eq!(host.next_opened().await, 5);
        let mut deframer = Deframer::expecting_prefix();
        assert_eq!(read_frame(&mut peer, &mut deframer).await, Frame::Ike(BytesMut::from(&b"again"[..])));
        if turn == 0 {
            peer.set_zero_linger().unwrap();
        }
        drop(peer);
        host.closed(5).await;
    }
}

#[tokio::test]
async fn a_port_where_nobody_listens_closes_with_the_reason() {
    let (listener, mut host) = remote().await;
    let address = listener.local_addr().unwrap();
    drop(listener);
    host.streams.open(1, any_local(), address);
    assert!(host.closed(1).await.starts_with("connect: "));
    host.streams.open(2, "[::1]:0".parse().unwrap(), address);
    assert!(host.closed(2).await.contains("differ in family"));
    host.settled().await;
}

#[tokio::test]
async fn an_open_that_gets_no_answer_ends_by_timer_or_by_close() {
    // A full backlog makes Linux drop the SYN, as a filter on the path would.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let full = socket.listen(1).unwrap();
    let address = full.local_addr().unwrap();
    let fill: Vec<_> = (0..4).map(|_| tokio::spawn(TcpStream::connect(address))).collect();
    sleep(SHORT).await;

    let mut host = Host::new(StreamLimits { connect: SHORT, ..StreamLimits::default() }).await;
    host.streams.open(1, any_local(), address);
    assert_eq!(host.closed(1).await, "connect: timed out");
    host.streams.open(2, any_local(), address);
    host.streams.close(2);
    assert_eq!(host.closed(2).await, "closed while connecting");
    fill.iter().for_each(JoinHandle::abort);
}

#[tokio::test]
async fn a_number_in_use_or_reserved_is_refused() {
    let (listener, mut host) = remote().await;
    let address = listener.local_addr().unwrap();
    host.streams.open(FIRST_ACCEPTED, any_local(), address);
    host.streams.open(3, any_local(), address);
    host.streams.open(3, any_local(), address);
    assert_eq!(host.next_opened().await, 3);
    assert_eq!(host.streams.open_streams(), 1);
    assert!(!host.streams.send_ike(4, b"no such stream"));
}

#[tokio::test]
async fn numbers_of_accepted_streams_are_never_used_again() {
    let mut host = Host::new(StreamLimits::default()).await;
    for expected in FIRST_ACCEPTED..FIRST_ACCEPTED + 5 {
        let (peer, stream) = host.opened().await;
        assert_eq!(stream, expected);
        drop(peer);
        host.closed(stream).await;
    }
}

// --- queues

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ike_goes_before_queued_esp() {
    let mut host = Host::new(StreamLimits::default()).await;
    let mut peer = host.connect().await;
    peer.write_all(&PREFIX).await.unwrap();
    let (stream, queue) = host.next_stream().await;

    // The peer does not read: fill its window, our send buffer and the queue.
    let packet = [&7u32.to_be_bytes()[..], &[0; 1396]].concat();
    let mut sent = 0;
    loop {
        while queue.send(0, &packet) {
            sent += 1;
        }
        sleep(SHORT).await;
        if !queue.send(0, &packet) {
            break;
        }
        sent += 1;
    }
    assert!(host.streams.send_ike(stream, b"urgent"));

    let mut deframer = Deframer::without_prefix();
    let mut before = 0;
    while let Frame::Esp(_) = read_frame(&mut peer, &mut deframer).await {
        before += 1;
    }
    let after = sent - before;
    // RFC 8289: of what has waited for so long some may be dropped, but not before it was tried for a while.
    assert!(after >= 200, "{before} ESP packets before the IKE message, {after} behind it");
    for _ in 0..after / 2 {
        assert_eq!(read_frame(&mut peer, &mut deframer).await, Frame::Esp(BytesMut::from(&packet[..])));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_never_reads_is_closed_and_holds_nobody_up() {
    let mut host = Host::new(StreamLimits { write: Duration::from_secs(1), ..StreamLimits::default() }).await;
    let mut deaf = host.connect().await;
    deaf.write_all(&PREFIX).await.unwrap();
    let (stream, queue) = host.next_stream().await;
    let flood = tokio::spawn(async move {
        loop {
            queue.send(0, &[1; 60_000]);
            sleep(Duration::from_millis(1)).await;
        }
    });

    let (mut other, other_stream) = host.opened().await;
    let mut deframer = Deframer::without_prefix();
    for _ in 0..20 {
        other.write_all(&ike(b"ping")).await.unwrap();
        assert_eq!(host.ike(other_stream).await, b"ping");
        assert!(host.streams.send_ike(other_stream, b"pong"));
        assert_eq!(read_frame(&mut other, &mut deframer).await, Frame::Ike(BytesMut::from(&b"pong"[..])));
    }
    let reason = host.closed(stream).await;
    assert!(reason == "the peer does not read" || reason.contains("timed out"), "{reason}");
    flood.abort();
}

#[tokio::test]
async fn what_is_no_esp_packet_is_not_written() {
    let mut host = Host::new(StreamLimits::default()).await;
    let mut peer = host.connect().await;
    peer.write_all(&PREFIX).await.unwrap();
    let (_, queue) = host.next_stream().await;
    // RFC 9329 §3.2: SPI 0 would be read as an IKE message.
    for packet in [&[][..], &[1; 65_534]] {
        assert!(!queue.send(0, packet));
    }
    for packet in [&[0; 40][..], &[1; 3]] {
        queue.send(0, packet);
    }
    assert!(queue.send(0, &[2; 8]));
    let frame = read_frame(&mut peer, &mut Deframer::without_prefix()).await;
    assert_eq!(frame, Frame::Esp(BytesMut::from(&[2; 8][..])));
}

// RFC 4303 §3.3.3, RFC 8229 §13: packets of several flows change places, but get their sequence numbers as they leave. What
// comes of none of them, or is none for a stream, is not written.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn packets_are_sealed_as_they_leave() {
    let mut host = Host::new(StreamLimits::default()).await;
    let sealed = Arc::new(AtomicU64::new(0));
    let number = sealed.clone();
    host.streams.seal_by(Arc::new(move |stream, packet, take| {
        assert!(stream >= FIRST_ACCEPTED);
        match packet[0] {
            0 => take(&[0; 40]),
            1 => {}
            _ => take(&[&[7; 4], &number.fetch_add(1, Ordering::Relaxed).to_be_bytes()[..], packet].concat()),
        }
    }));
    let mut peer = host.connect().await;
    peer.write_all(&PREFIX).await.unwrap();
    let (_, queue) = host.next_stream().await;
    let mut flows = [0_u64; 3];
    // So many as the sockets take, so that nothing waits long enough to be dropped.
    for round in 0..50_u64 {
        for (flow, sent) in (2..).zip(&mut flows) {
            // The third one has something each tenth time.
            if flow < 4 || round % 10 == 0 {
                let packet = [&[flow as u8][..], &sent.to_be_bytes(), &[9; 1000]].concat();
                *sent += 1;
                assert!(queue.send(flow, &packet));
            }
        }
        queue.send(5, &[0]);
        queue.send(6, &[1]);
    }
    let (mut deframer, mut seen) = (Deframer::without_prefix(), [0_u64; 3]);
    for expected in 0..flows.iter().sum::<u64>() {
        let Frame::Esp(packet) = read_frame(&mut peer, &mut deframer).await else { panic!("an IKE message") };
        assert_eq!(packet[4..12], expected.to_be_bytes(), "the order of sequence numbers");
        let flow = usize::from(packet[12] - 2);
        assert_eq!(packet[13..21], seen[flow].to_be_bytes(), "the order of a flow");
        seen[flow] += 1;
    }
}

#[tokio::test]
async fn a_full_event_channel_holds_readers_back_and_loses_nothing() {
    let mut host = Host::new(StreamLimits::default()).await;
    let (mut peer, stream) = host.opened().await;
    let count = 3 * EVENTS;
    let sender = tokio::spawn(async move {
        for number in 0..count {
            peer.write_all(&ike(&number.to_be_bytes())).await.unwrap();
        }
        peer
    });
    sleep(SHORT).await;
    for number in 0..count {
        assert_eq!(host.ike(stream).await, number.to_be_bytes());
    }
    sender.await.unwrap();
}

// --- the end

// RFC 9329 §6.1: a Delete response that was queued still leaves.
#[tokio::test]
async fn close_writes_what_is_queued_and_then_ends_the_stream() {
    let mut host = Host::new(StreamLimits::default()).await;
    let (mut peer, stream) = host.opened().await;
    for number in 0..100u8 {
        assert!(host.streams.send_ike(stream, &[number; 50]));
    }
    host.streams.close(stream);
    // Octets that nobody reads must not turn our FIN into a reset.
    peer.write_all(&ike(b"too late")).await.unwrap();
    let mut got = Vec::new();
    peer.read_to_end(&mut got).await.unwrap();
    assert_eq!(got, (0..100u8).flat_map(|number| ike(&[number; 50])).collect::<Vec<_>>());
    drop(peer);
    assert_eq!(host.closed(stream).await, "closed by this side");
    assert!(!host.streams.send_ike(stream, b"gone"));
}

// Octets that come in after our last ones must not turn them into a reset.
#[tokio::test]
async fn close_waits_for_a_slow_peer_that_still_talks() {
    let mut host = Host::new(StreamLimits::default()).await;
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut peer = socket.connect(host.address).await.unwrap();
    peer.write_all(&PREFIX).await.unwrap();
    let stream = host.next_opened().await;
    let message = ike(&[7; 50_000]);
    for _ in 0..6 {
        assert!(host.streams.send_ike(stream, &[7; 50_000]));
    }
    host.streams.close(stream);

    let mut got = vec![0; 6 * message.len() - 20_000];
    peer.read_exact(&mut got).await.unwrap();
    sleep(SHORT).await;
    peer.write_all(&ike(b"too late")).await.unwrap();
    sleep(SHORT).await;
    peer.read_to_end(&mut got).await.unwrap();
    assert_eq!(got.len(), 6 * message.len());
}

#[tokio::test]
async fn shutdown_closes_streams_and_listeners() {
    let mut host = Host::new(StreamLimits::default()).await;
    let (mut peer, stream) = host.opened().await;
    let mut silent = host.connect().await;
    assert!(host.streams.send_ike(stream, b"goodbye"));
    timeout(LONG, host.streams.shutdown()).await.unwrap();

    let frame = read_frame(&mut peer, &mut Deframer::without_prefix()).await;
    assert_eq!(frame, Frame::Ike(BytesMut::from(&b"goodbye"[..])));
    assert_closed(&mut peer).await;
    assert_closed(&mut silent).await;
    assert_eq!(host.streams.open_streams(), 0);
    assert!(TcpStream::connect(host.address).await.is_err());
    assert!(host.streams.listen("127.0.0.1:0".parse().unwrap()).await.is_err());
    host.closed(stream).await;
}

#[tokio::test]
async fn shutdown_does_not_wait_for_a_daemon_that_takes_no_events() {
    let mut host = Host::new(StreamLimits::default()).await;
    let (mut peer, _) = host.opened().await;
    let flood = tokio::spawn(async move { while peer.write_all(&ike(b"more")).await.is_ok() {} });
    sleep(SHORT).await;
    timeout(LONG, host.streams.shutdown()).await.unwrap();
    flood.await.unwrap();
}

#[tokio::test]
async fn a_handler_that_panics_ends_only_its_stream() {
    let (streams, mut events) = Streams::new(
        StreamLimits::default(),
        None,
        Arc::new(|_, _, _, packets| {
            assert!(packets.iter().all(|packet| packet.first() != Some(&0xbb)), "bad packet");
            EspWorth::default()
        }),
    );
    let address = streams.listen("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let mut peer = TcpStream::connect(address).await.unwrap();
    peer.write_all(&PREFIX).await.unwrap();
    peer.write_all(&esp(0xbbbb_bbbb, 30)).await.unwrap();
    assert_closed(&mut peer).await;
    assert!(matches!(events.recv().await, Some(StreamEvent::Opened { .. })));
    assert!(matches!(events.recv().await, Some(StreamEvent::Closed { .. })));
}

// RFC 9329 §2: other ports, and IPv6.
#[tokio::test]
async fn two_hosts_talk_over_ipv6() {
    let mut server = Host::new(StreamLimits::default()).await;
    let address = server.streams.listen("[::1]:0".parse().unwrap()).await.unwrap();
    let mut client = Host::new(StreamLimits::default()).await;
    client.streams.open(1, "[::1]:0".parse().unwrap(), address);
    client.streams.send_ike(1, b"hello");
    assert_eq!(client.next_opened().await, 1);
    let stream = server.next_opened().await;
    assert_eq!(server.ike(stream).await, b"hello");
    server.streams.send_ike(stream, b"welcome");
    assert_eq!(client.ike(1).await, b"welcome");
    client.streams.close(1);
    assert_eq!(server.closed(stream).await, "the peer closed it");
    client.closed(1).await;
}

// --- helpers

struct Host {
    streams: Streams,
    events: mpsc::Receiver<StreamEvent>,
    address: SocketAddr,
    esp_seen: Arc<AtomicUsize>,
}

impl Host {
    async fn new(limits: StreamLimits) -> Self {
        let esp_seen = Arc::new(AtomicUsize::new(0));
        let seen = esp_seen.clone();
        let handler: EspHandler = Arc::new(move |_, _, _, packets: &mut [BytesMut]| {
            seen.fetch_add(packets.len(), Ordering::SeqCst);
            worth(packets)
        });
        let (streams, events) = Streams::new(limits, None, handler);
        let address = streams.listen("127.0.0.1:0".parse().unwrap()).await.unwrap();
        Self { streams, events, address, esp_seen }
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    async fn opened(&mut self) -> (TcpStream, u64) {
        let mut peer = self.connect().await;
        peer.write_all(&PREFIX).await.unwrap();
        (peer, self.next_opened().await)
    }

    async fn next(&mut self) -> StreamEvent {
        timeout(LONG, self.events.recv()).await.expect("an event in time").expect("an open channel")
    }

    async fn next_opened(&mut self) -> u64 {
        self.next_stream().await.0
    }

    async fn next_stream(&mut self) -> (u64, EspSender) {
        match self.next().await {
            StreamEvent::Opened { stream, esp, .. } => (stream, esp),
            other => panic!("not opened: {other:?}"),
        }
    }

    async fn ike(&mut self, expected: u64) -> Vec<u8> {
        match self.next().await {
            StreamEvent::Ike { stream, bytes, .. } if stream == expected => bytes,
            other => panic!("no IKE message of {expected}: {other:?}"),
        }
    }

    async fn closed(&mut self, expected: u64) -> String {
        match self.next().await {
            StreamEvent::Closed { stream, reason } if stream == expected => reason,
            other => panic!("{expected} not closed: {other:?}"),
        }
    }

    async fn settled(&self) {
        let mut live = self.streams.inner.live.subscribe();
        timeout(LONG, live.wait_for(|count| *count == 0)).await.expect("no stream left").unwrap();
    }
}

/// A bare listener, and a host to connect to it.
async fn remote() -> (TcpListener, Host) {
    (TcpListener::bind("127.0.0.1:0").await.unwrap(), Host::new(StreamLimits::default()).await)
}

fn any_local() -> SocketAddr {
    "0.0.0.0:0".parse().unwrap()
}

fn ike(message: &[u8]) -> Vec<u8> {
    frame_ike(message).unwrap().to_vec()
}

fn esp(spi: u32, length: usize) -> Vec<u8> {
    frame_esp(&[&spi.to_be_bytes()[..], &vec![0; length]].concat()).unwrap().to_vec()
}

/// SPIs that the handler of these tests does not know, and whose packets it finds forged.
const UNKNOWN: u32 = 0xcccc_cccc;
const FORGED: u32 = 0xdddd_dddd;

fn worth(packets: &[BytesMut]) -> EspWorth {
    let of = |spi: u32| move |packet: &&BytesMut| packet.starts_with(&spi.to_be_bytes());
    let unknown = packets.iter().rev().take_while(of(UNKNOWN)).count();
    EspWorth {
        authentic: unknown < packets.len(),
        unknown: u32::try_from(unknown).unwrap(),
        forged: packets.iter().any(|packet| of(FORGED)(&packet)),
    }
}

async fn read_frame(peer: &mut TcpStream, deframer: &mut Deframer) -> Frame {
    loop {
        if let Some(frame) = deframer.next_frame().unwrap() {
            return frame;
        }
        let read = timeout(LONG, peer.read_buf(deframer.buffer())).await.expect("octets in time").unwrap();
        assert_ne!(read, 0, "closed");
    }
}

async fn assert_closed(peer: &mut TcpStream) {
    let end = timeout(LONG, peer.read(&mut [0; 1])).await.expect("closed in time");
    assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
}
