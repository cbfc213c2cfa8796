//! How fast a stream is split into frames, and how fast packets are framed: `cargo bench -p latchkey-espintcp`.

use std::hint::black_box;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use latchkey_espintcp::codec::{Deframer, append_esp, frame_esp};

/// As much as the stream reader asks for at once.
const READ: usize = 64 * 1024;

fn main() {
    for size in [64, 576, 1400, 9000] {
        let packet = vec![1; size];
        let frame = frame_esp(&packet).unwrap_or_default();
        let stream: Vec<u8> = frame.iter().copied().cycle().take(READ / frame.len() * frame.len() + READ).collect();

        let mut deframer = Deframer::without_prefix();
        let mut at = 0;
        report("deframe", size, || {
            // Reads go on where the last one ended, so that most end within a frame.
            let piece = stream.get(at..at + READ).unwrap_or_default();
            at = (at + READ) % frame.len();
            deframer.buffer().reserve(READ);
            deframer.buffer().extend_from_slice(piece);
            let mut frames = 0;
            while let Ok(Some(frame)) = deframer.next_frame() {
                black_box(&frame);
                frames += 1;
            }
            frames
        });

        let mut out = BytesMut::new();
        report("frame", size, || {
            out.clear();
            let mut frames = 0;
            while out.len() < READ && append_esp(&mut out, black_box(&packet)) {
                frames += 1;
            }
            black_box(&out);
            frames
        });
    }
}

/// Prints the best of some rounds: the least disturbed.
fn report(what: &str, size: usize, mut turn: impl FnMut() -> u32) {
    let mut best = f64::INFINITY;
    for _ in 0..10 {
        let (start, mut frames) = (Instant::now(), 0u32);
        while start.elapsed() < Duration::from_millis(50) {
            frames += turn();
        }
        best = best.min(start.elapsed().as_secs_f64() / f64::from(frames));
    }
    let gigabits = size as f64 * 8.0 / best / 1e9;
    println!("{what:8} {size:5} octets: {:7.1} ns a frame, {gigabits:7.1} Gbit/s", best * 1e9);
}
