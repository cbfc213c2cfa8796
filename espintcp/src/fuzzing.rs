//! Entries for fuzzers: properties of the codec that hold for all octets. They panic where one does not.

use crate::codec::{Deframer, Frame, FrameError, MAX_MESSAGE, frame_esp, frame_ike};

/// Takes the first octet for a choice (prefix or not, size of pieces) and the rest for a stream. Pieces must
/// give what the whole gives, no more than one frame may be kept, and what was read must frame to itself.
pub fn deframer(octets: &[u8]) {
    let Some((&choice, stream)) = octets.split_first() else { return };
    let fresh = || if choice & 1 == 0 { Deframer::without_prefix() } else { Deframer::expecting_prefix() };
    let piece = usize::from(choice >> 1).saturating_add(1);

    let (whole, whole_error) = frames(fresh(), std::iter::once(stream));
    let (pieces, pieces_error) = frames(fresh(), stream.chunks(piece));
    assert_eq!(whole, pieces, "pieces of {piece}");
    assert_eq!(whole_error, pieces_error, "pieces of {piece}");

    for frame in whole {
        let (framed, message_at, message) = match &frame {
            Frame::Ike(message) => (frame_ike(message), 6, message),
            Frame::Esp(packet) => (frame_esp(packet), 2, packet),
        };
        assert_eq!(framed.as_deref().and_then(|framed| framed.get(message_at..)), Some(message.as_ref()));
    }
}

fn frames<'a>(mut deframer: Deframer, pieces: impl Iterator<Item = &'a [u8]>) -> (Vec<Frame>, Option<FrameError>) {
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
        assert!(deframer.buffer().len() < MAX_MESSAGE + 2, "more than one frame is kept");
    }
    (frames, None)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    #[test]
    fn seeds_of_the_fuzzer_hold_the_properties() {
        let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds/deframer");
        let mut count = 0;
        for seed in std::fs::read_dir(seeds).unwrap() {
            super::deframer(&std::fs::read(seed.unwrap().path()).unwrap());
            count += 1;
        }
        assert!(count >= 10, "{count} seeds");
    }
}
