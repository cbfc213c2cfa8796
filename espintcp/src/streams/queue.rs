//! ESP packets that wait for a stream's writer: framed, in few pieces of memory, and not for long. A stream takes what it is
//! given only as fast as its path allows, so whoever sends more fills this queue, and every other packet waits behind it:
//! CoDel (RFC 8289) drops packets where they have been waiting too long for a while, and senders inside the tunnel slow down.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes, BytesMut};
use tokio::sync::Notify;

use super::lock;
use super::pace::Pace;
use crate::codec::append_esp;

/// A wait that is no fault (RFC 8289 §4.3).
const TARGET: Duration = Duration::from_millis(5);
/// For so long the shortest wait must be longer than that.
const INTERVAL: Duration = Duration::from_millis(100);
/// Octets that may wait as long as they like (RFC 8289 §4.4): what a slow stream is given at a time.
const FEW: usize = 4096;
/// Octets of packets that are kept together.
const CHUNK: usize = 16 * 1024;
/// Packets that came within this time are of the same age.
const SAME_AGE: Duration = Duration::from_millis(1);

/// Where ESP packets for a stream go in.
#[derive(Clone)]
pub struct EspSender {
    queue: Arc<EspQueue>,
}

impl fmt::Debug for EspSender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EspSender").finish_non_exhaustive()
    }
}

impl EspSender {
    /// Queues an ESP packet, SPI first. False when it is none that fits a frame, when the queue is full or the stream is
    /// closing; one that is queued may be dropped still, as a network would.
    pub fn send(&self, packet: &[u8]) -> bool {
        self.queue.push(Instant::now(), packet)
    }
}

/// The writer's end; see [`EspQueue::sender`] for the other one.
#[derive(Default)]
pub(super) struct EspQueue {
    waiting: Mutex<Waiting>,
    filled: Notify,
}

#[derive(Default)]
struct Waiting {
    chunks: VecDeque<Chunk>,
    octets: usize,
    /// Most octets.
    limit: Limit,
    closed: bool,
    codel: Codel,
}

struct Limit(usize);

impl Default for Limit {
    fn default() -> Self {
        Self(Pace::default().queue())
    }
}

struct Chunk {
    since: Instant,
    frames: BytesMut,
}

impl EspQueue {
    pub(super) fn sender(self: &Arc<Self>) -> EspSender {
        EspSender { queue: self.clone() }
    }

    /// Resolves when there may be packets.
    pub(super) async fn filled(&self) {
        self.filled.notified().await;
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting().octets == 0
    }

    /// No more packets are taken in.
    pub(super) fn close(&self) {
        self.waiting().closed = true;
    }

    /// Most octets that may wait from now on.
    pub(super) fn set_limit(&self, limit: usize) {
        self.waiting().limit = Limit(limit);
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        lock(&self.waiting)
    }

    fn push(&self, now: Instant, packet: &[u8]) -> bool {
        let mut waiting = self.waiting();
        let pushed = waiting.push(now, packet);
        let first = waiting.octets == packet.len() + 2;
        drop(waiting);
        if pushed && first {
            self.filled.notify_one();
        }
        pushed
    }

    /// Takes about `room` octets of frames, whole ones, and gives how many.
    pub(super) fn take(&self, now: Instant, room: usize, out: &mut VecDeque<Bytes>) -> usize {
        self.waiting().take(now, room, out)
    }
}

impl Waiting {
    fn push(&mut self, now: Instant, packet: &[u8]) -> bool {
        let length = packet.len() + 2;
        if self.closed || self.octets + length > self.limit.0 {
            return false;
        }
        let fits = |chunk: &&mut Chunk| {
            chunk.frames.capacity() - chunk.frames.len() >= length
                && now.saturating_duration_since(chunk.since) < SAME_AGE
        };
        let pushed = match self.chunks.back_mut().filter(fits) {
            Some(chunk) => append_esp(&mut chunk.frames, packet),
            None => {
                // A single packet is more likely to be alone.
                let room = if self.chunks.is_empty() { length } else { length.max(CHUNK) };
                let mut frames = BytesMut::with_capacity(room);
                let pushed = append_esp(&mut frames, packet);
                if pushed {
                    self.chunks.push_back(Chunk { since: now, frames });
                }
                pushed
            }
        };
        self.octets += if pushed { length } else { 0 };
        pushed
    }

    fn take(&mut self, now: Instant, room: usize, out: &mut VecDeque<Bytes>) -> usize {
        let mut taken = 0;
        while taken < room
            && let Some(chunk) = self.chunks.front_mut()
        {
            let age = now.saturating_duration_since(chunk.since);
            // Frames at the chunk's beginning that stay together.
            let mut kept = 0;
            while taken + kept < room
                && let Some(length) = chunk.frames.get(kept..).and_then(|frames| frames.first_chunk::<2>())
            {
                let length = usize::from(u16::from_be_bytes(*length));
                let backlog = self.octets.saturating_sub(kept);
                if !self.codel.drops(now, age, backlog) {
                    kept += length;
                    continue;
                }
                taken += chunk.take(kept, out);
                chunk.frames.advance(length.min(chunk.frames.len()));
                self.octets = backlog.saturating_sub(length);
                kept = 0;
            }
            taken += chunk.take(kept, out);
            self.octets = self.octets.saturating_sub(kept);
            if chunk.frames.is_empty() || taken < room {
                self.chunks.pop_front();
            }
        }
        if self.chunks.is_empty() {
            // An idle stream holds nothing.
            self.chunks = VecDeque::new();
        }
        taken
    }
}

impl Chunk {
    fn take(&mut self, octets: usize, out: &mut VecDeque<Bytes>) -> usize {
        let octets = octets.min(self.frames.len());
        if octets > 0 {
            out.push_back(self.frames.split_to(octets).freeze());
        }
        octets
    }
}

/// CoDel's state (RFC 8289 §5.3).
#[derive(Default)]
struct Codel {
    /// Since when all packets have waited too long.
    above: Option<Instant>,
    /// When the next one is dropped, while some are.
    next: Option<Instant>,
    /// Dropped in this spell, and when and with how many the last one ended.
    count: u32,
    last: Option<(Instant, u32)>,
}

impl Codel {
    /// Says whether a packet is dropped that has waited for so long, with so many octets from it on.
    fn drops(&mut self, now: Instant, age: Duration, backlog: usize) -> bool {
        if age < TARGET || backlog <= FEW {
            self.above = None;
            if let Some(next) = self.next.take() {
                self.last = Some((next, self.count));
            }
            return false;
        }
        let above = *self.above.get_or_insert(now);
        match self.next {
            Some(next) if now < next => return false,
            Some(next) => {
                self.count = self.count.saturating_add(1);
                self.next = Some(self.after(next));
            }
            None if now.saturating_duration_since(above) < INTERVAL => return false,
            None => {
                // Where the last spell is not long ago, it goes on at about its rate.
                let lately = |at: Instant| now.saturating_duration_since(at) < 16 * INTERVAL;
                self.count = match self.last {
                    Some((at, count)) if lately(at) && count > 2 => count - 2,
                    _ => 1,
                };
                self.next = Some(self.after(now));
            }
        }
        true
    }

    fn after(&self, at: Instant) -> Instant {
        at + INTERVAL.div_f64(f64::from(self.count.max(1)).sqrt())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::{Deframer, Frame, frame_esp};

    fn packet(number: u32) -> Vec<u8> {
        [&7_u32.to_be_bytes()[..], &number.to_be_bytes(), &[0; 992]].concat()
    }

    fn numbers(pieces: &VecDeque<Bytes>) -> Vec<u32> {
        let mut deframer = Deframer::without_prefix();
        pieces.iter().for_each(|piece| deframer.buffer().extend_from_slice(piece));
        let frames = std::iter::from_fn(|| deframer.next_frame().unwrap());
        let number = |frame| match frame {
            Frame::Esp(packet) => u32::from_be_bytes(*packet[4..].first_chunk().unwrap()),
            Frame::Ike(_) => panic!("an IKE message"),
        };
        frames.map(number).collect()
    }

    /// Packets that come at `arrivals` and leave at `departures` in each millisecond for so long: those that leave.
    fn passes(queue: &EspQueue, start: Instant, milliseconds: u32, arrivals: u32, departures: usize) -> Vec<u32> {
        let (mut next, mut left) = (0, Vec::new());
        for millisecond in 0..milliseconds {
            let now = start + Duration::from_millis(u64::from(millisecond));
            for _ in 0..arrivals {
                queue.push(now, &packet(next));
                next += 1;
            }
            let mut out = VecDeque::new();
            queue.take(now, departures * 1002, &mut out);
            left.extend(numbers(&out));
        }
        left
    }

    #[test]
    fn packets_leave_framed_and_in_order_in_few_pieces() {
        let (queue, now) = (EspQueue::default(), Instant::now());
        for number in 0..40 {
            assert!(queue.push(now, &packet(number)));
        }
        let mut out = VecDeque::new();
        assert_eq!(queue.take(now, 10 * 1002, &mut out), 10 * 1002);
        assert_eq!(queue.take(now, usize::MAX, &mut out), 30 * 1002);
        assert_eq!(numbers(&out), (0..40).collect::<Vec<_>>());
        assert!(out.len() <= 6, "{}", out.len());
        let waiting = queue.waiting();
        assert_eq!((waiting.octets, waiting.chunks.capacity()), (0, 0), "an idle queue holds nothing");
    }

    #[test]
    fn what_is_no_packet_or_too_much_is_not_queued() {
        let (queue, now) = (EspQueue::default(), Instant::now());
        for packet in [&[0; 40][..], &[1; 3], &[1; 65_534]] {
            assert!(!queue.push(now, packet));
        }
        assert!(queue.is_empty());
        queue.set_limit(10 * 1002);
        assert_eq!((0..100).filter(|number| queue.push(now, &packet(*number))).count(), 10);
        let mut out = VecDeque::new();
        queue.take(now, usize::MAX, &mut out);
        assert_eq!(numbers(&out), (0..10).collect::<Vec<_>>(), "the newest do not come in");
        assert!(queue.push(now, &packet(0)));
        queue.close();
        assert!(!queue.push(now, &packet(1)));
    }

    #[test]
    fn nothing_is_dropped_of_a_burst_or_where_the_stream_keeps_up() {
        let (queue, now) = (EspQueue::default(), Instant::now());
        assert_eq!(passes(&queue, now, 1000, 3, 3).len(), 3000);
        for number in 0..80 {
            queue.push(now, &packet(number));
        }
        let mut out = VecDeque::new();
        for millisecond in 0..80 {
            queue.take(now + Duration::from_millis(millisecond), 1002, &mut out);
        }
        assert_eq!(numbers(&out).len(), 80);
    }

    // RFC 8289 §3.2: a stall is no standing queue.
    #[test]
    fn what_waited_for_a_stalled_stream_is_sent() {
        let (queue, now) = (EspQueue::default(), Instant::now());
        for number in 0..500 {
            queue.push(now, &packet(number));
        }
        let mut out = VecDeque::new();
        queue.take(now + Duration::from_secs(5), usize::MAX, &mut out);
        assert_eq!(numbers(&out).len(), 500);
    }

    // RFC 8289 §5.3: whoever sends a quarter more than the stream takes is told so more and more often.
    #[test]
    fn a_standing_queue_gets_shorter() {
        let (queue, now) = (EspQueue::default(), Instant::now());
        let left = passes(&queue, now, 20_000, 5, 4);
        let late = now + Duration::from_secs(20);
        let dropped = left.windows(2).map(|two| (two[0], two[1] - two[0] - 1)).filter(|(_, gap)| *gap > 0);
        let (early, later): (Vec<_>, Vec<_>) = dropped.partition(|(number, _)| *number < 50_000);
        assert!(!early.is_empty() && early.len() < later.len(), "{} and {}", early.len(), later.len());
        assert!(left.is_sorted(), "in order");
        // Who slows down a little finds an empty queue soon, and nothing is dropped any more.
        let all = passes(&queue, late, 3000, 3, 4);
        assert!(queue.is_empty() && all.len() > 8000);
        assert_eq!(passes(&queue, late + Duration::from_secs(3), 1000, 3, 4).len(), 3000);
    }

    #[test]
    fn frames_are_those_of_the_codec() {
        let (queue, now) = (EspQueue::default(), Instant::now());
        queue.push(now, &packet(1));
        let mut out = VecDeque::new();
        queue.take(now, 1, &mut out);
        assert_eq!(out, [frame_esp(&packet(1)).unwrap()]);
    }
}
