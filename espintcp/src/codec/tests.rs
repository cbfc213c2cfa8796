use proptest::prelude::*;

use super::*;

// RFC 9329 §4
#[test]
fn wrong_prefix_is_fatal_and_stays_so() {
    for wrong in [&b"GET / "[..], b"IKETCQ", b"iketcp", &[0, 0xfe, 0, 0, 0, 0]] {
        let mut deframer = Deframer::expecting_prefix();
        deframer.buffer().extend_from_slice(wrong);
        assert_eq!(deframer.next_frame(), Err(FrameError::Prefix));

        deframer.buffer().extend_from_slice(b"IKETCP");
        deframer.buffer().extend_from_slice(&frame_ike(&[1; 28]).unwrap());
        assert_eq!(deframer.next_frame(), Err(FrameError::Prefix), "dead for good");
    }
}

// RFC 9329 §6.1: no message before the whole prefix.
#[test]
fn message_without_prefix_is_refused_by_a_responder() {
    let mut deframer = Deframer::expecting_prefix();
    deframer.buffer().extend_from_slice(&frame_ike(&[1; 28]).unwrap());
    assert_eq!(deframer.next_frame(), Err(FrameError::Prefix));
}

// RFC 9329 §6.1
#[test]
fn prefix_may_come_in_pieces() {
    let mut deframer = Deframer::expecting_prefix();
    deframer.buffer().extend_from_slice(b"IKE");
    assert_eq!(deframer.next_frame(), Ok(None));
    assert_eq!(deframer.accept_prefix(), Ok(false));
    deframer.buffer().extend_from_slice(b"TCP");
    assert_eq!(deframer.accept_prefix(), Ok(true));
    deframer.buffer().extend_from_slice(&frame_ike(b"hello").unwrap());
    assert_eq!(deframer.next_frame(), Ok(Some(Frame::Ike(BytesMut::from(&b"hello"[..])))));
}

// RFC 9329 §4: the prefix is sent once and only by the TCP Originator; here it reads as Length 0x494b.
#[test]
fn prefix_from_a_responder_is_not_swallowed() {
    let mut deframer = Deframer::without_prefix();
    deframer.buffer().extend_from_slice(&PREFIX);
    assert_eq!(deframer.next_frame(), Ok(None));
    assert!(deframer.is_partial());
}

// RFC 9329 §3.1, §3.2
#[test]
fn length_0_and_1_are_fatal() {
    for length in [0u16, 1] {
        let mut deframer = Deframer::without_prefix();
        deframer.buffer().extend_from_slice(&length.to_be_bytes());
        assert_eq!(deframer.next_frame(), Err(FrameError::Length(length)));
        deframer.buffer().extend_from_slice(&frame_ike(&[1; 28]).unwrap());
        assert_eq!(deframer.next_frame(), Err(FrameError::Length(length)));
    }
}

// RFC 9329 §3, §6.6
#[test]
fn empty_messages_and_keepalives_are_swallowed_in_any_number() {
    let mut deframer = Deframer::without_prefix();
    for _ in 0..1000 {
        deframer.buffer().extend_from_slice(&[0, 2, 0, 3, 0xff]);
    }
    deframer.buffer().extend_from_slice(&[0, 6, 1, 2, 3, 4]);
    assert_eq!(deframer.next_frame(), Ok(Some(Frame::Esp(BytesMut::from(&[1, 2, 3, 4][..])))));
    assert_eq!(deframer.next_frame(), Ok(None));
    assert_eq!(deframer.completed(), 2001);
}

// RFC 9329 §6.1: "too many subsequent messages that cannot be parsed".
#[test]
fn a_few_runts_are_tolerated_and_many_are_fatal() {
    let runts: [&[u8]; 4] = [&[0, 3, 0xfe], &[0, 4, 0, 0], &[0, 5, 1, 2, 3], &[0, 6, 0, 0, 0, 0]];
    let esp = Ok(Some(Frame::Esp(BytesMut::from(&[1, 2, 3, 4][..]))));
    let mut deframer = Deframer::without_prefix();
    for _ in 0..2 {
        for runt in runts {
            deframer.buffer().extend_from_slice(runt);
        }
        deframer.buffer().extend_from_slice(&[0, 6, 1, 2, 3, 4]);
        assert_eq!(deframer.next_frame(), esp, "a message between them starts the count anew");
    }
    for runt in runts.into_iter().chain([runts[0]]) {
        deframer.buffer().extend_from_slice(runt);
    }
    assert_eq!(deframer.next_frame(), Err(FrameError::Runts));
    assert_eq!(deframer.next_frame(), Err(FrameError::Runts));
}

// RFC 9329 §3: the Length field counts itself. §3.1: marker, then the message.
#[test]
fn frames_have_the_octets_of_the_standard() {
    assert_eq!(frame_ike(&[0xba, 0xea]).unwrap().as_ref(), [0, 8, 0, 0, 0, 0, 0xba, 0xea]);
    assert_eq!(frame_esp(&[0x34, 0x8d, 0x18, 0x15, 0]).unwrap().as_ref(), [0, 7, 0x34, 0x8d, 0x18, 0x15, 0]);
}

// RFC 9329 §3: nothing longer than 65,533 octets. §3.2: the SPI is not zero.
#[test]
fn what_does_not_fit_a_frame_is_refused() {
    assert!(frame_ike(&[]).is_none());
    assert!(frame_ike(&vec![1; MAX_MESSAGE - 3]).is_none());
    assert!(frame_esp(&vec![1; MAX_MESSAGE + 1]).is_none());
    assert!(frame_esp(&[1, 2, 3]).is_none());
    assert!(frame_esp(&[0, 0, 0, 0, 1, 2, 3, 4]).is_none());
}

// RFC 9329 §3
#[test]
fn the_largest_frames_pass() {
    let ike = frame_ike(&vec![1; MAX_MESSAGE - 4]).unwrap();
    let esp = frame_esp(&vec![1; MAX_MESSAGE]).unwrap();
    assert_eq!((ike.len(), esp.len()), (65_535, 65_535));

    let mut deframer = Deframer::without_prefix();
    deframer.buffer().extend_from_slice(&ike);
    deframer.buffer().extend_from_slice(&esp);
    assert_eq!(deframer.next_frame(), Ok(Some(Frame::Ike(BytesMut::from(&vec![1; MAX_MESSAGE - 4][..])))));
    assert_eq!(deframer.next_frame(), Ok(Some(Frame::Esp(BytesMut::from(&vec![1; MAX_MESSAGE][..])))));
    assert!(!deframer.is_partial());
}

fn frames_of(mut deframer: Deframer, pieces: &[&[u8]]) -> (Vec<Frame>, Option<FrameError>) {
    let mut frames = Vec::new();
    for piece in pieces {
        deframer.buffer().extend_from_slice(piece);
        loop {
            match deframer.next_frame() {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break,
                Err(error) => return (frames, Some(error)),
            }
        }
        assert!(deframer.buffer().len() < MAX_MESSAGE + 2, "less than one frame is kept");
    }
    (frames, None)
}

fn split<'a>(mut stream: &'a [u8], cuts: &[prop::sample::Index]) -> Vec<&'a [u8]> {
    let mut pieces = Vec::new();
    for cut in cuts {
        let (piece, rest) = stream.split_at(cut.index(stream.len() + 1));
        pieces.push(piece);
        stream = rest;
    }
    pieces.push(stream);
    pieces
}

fn message() -> impl Strategy<Value = (bool, Vec<u8>)> {
    (any::<bool>(), prop::collection::vec(any::<u8>(), 1..300))
        .prop_filter("an ESP packet has an SPI", |(ike, octets)| *ike || frame_esp(octets).is_some())
}

proptest! {
    #[test]
    fn any_split_of_a_stream_gives_the_same_frames(
        messages in prop::collection::vec(message(), 0..12),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..40),
    ) {
        let mut stream = PREFIX.to_vec();
        let mut expected = Vec::new();
        for (ike, octets) in &messages {
            let framed = if *ike { frame_ike(octets) } else { frame_esp(octets) };
            stream.extend_from_slice(&framed.unwrap());
            let octets = BytesMut::from(&octets[..]);
            expected.push(if *ike { Frame::Ike(octets) } else { Frame::Esp(octets) });
        }
        prop_assert_eq!(frames_of(Deframer::expecting_prefix(), &split(&stream, &cuts)), (expected, None));
    }

    #[test]
    fn arbitrary_octets_never_panic_and_splits_do_not_matter(
        stream in prop::collection::vec(prop_oneof![0u8..4, any::<u8>()], 0..600),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..20),
    ) {
        let whole = frames_of(Deframer::without_prefix(), &[&stream]);
        let pieces = frames_of(Deframer::without_prefix(), &split(&stream, &cuts));
        prop_assert_eq!(whole, pieces);
        frames_of(Deframer::expecting_prefix(), &[&stream]);
    }
}

// What is read is not copied on its way to whoever decrypts it in place, and its memory serves for the next read.
#[test]
fn messages_are_parts_of_what_was_read() {
    let frame = frame_esp(&[7; 1400]).unwrap();
    let stream = frame.repeat(50);
    let mut deframer = Deframer::without_prefix();
    let mut first = None;
    for _ in 0..20 {
        let buffer = deframer.buffer();
        buffer.reserve(stream.len());
        let (start, room) = (buffer.as_ptr().addr(), buffer.capacity());
        buffer.extend_from_slice(&stream);
        assert_eq!(buffer.as_ptr().addr(), start, "room was reserved");
        let mut messages = Vec::new();
        while let Some(Frame::Esp(message)) = deframer.next_frame().unwrap() {
            let at = message.as_ptr().addr();
            assert!((start..start + room).contains(&at), "a copy");
            messages.push(message);
        }
        assert_eq!(messages.len(), 50);
        assert_eq!(*first.get_or_insert(start), start, "other memory");
    }
}
