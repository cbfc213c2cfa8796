//! What waits for a stream's writer: IKE messages, which go first, and packets, in few pieces of memory and not for long. A
//! stream takes what it is given only as fast as its path allows, so whoever sends more fills this queue. FQ-CoDel (RFC 8290):
//! each flow has a queue of its own and they take turns, those with little to send first, so nobody waits behind somebody
//! else's transfer; and where packets of one have been waiting too long for a while, some are dropped (RFC 8289), and its
//! sender slows down.
//!
//! Packets change places here, so they become ESP packets only when they leave: sequence numbers go out in order, and a peer
//! may have a replay window of 1 (RFC 8229 §13).

use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::sync::Notify;

use super::lock;
use super::pace::Pace;
use crate::codec::MAX_MESSAGE;

/// A wait that is no fault (RFC 8289 §4.3).
const TARGET: Duration = Duration::from_millis(5);
/// For so long the shortest wait must be longer than that.
const INTERVAL: Duration = Duration::from_millis(100);
/// Octets of a flow that may wait as long as they like (RFC 8289 §4.4): what a slow stream is given at a time.
const FEW: usize = 4096;
/// Octets that a flow may send in one turn (RFC 8290 §5.2.4): about a packet.
const QUANTUM: i64 = 1514;
/// Flows are told apart up to so many; more share queues.
const FLOWS: u64 = 32;
/// Octets of packets that are kept together.
const CHUNK: usize = 16 * 1024;
/// Packets that came within this time are of the same age.
const SAME_AGE: Duration = Duration::from_millis(1);
/// Before each packet in a chunk: its length.
const LENGTH: usize = 2;

/// Where packets for a stream go in.
#[derive(Clone)]
pub struct EspSender {
    queue: Arc<Queue>,
}

impl fmt::Debug for EspSender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EspSender").finish_non_exhaustive()
    }
}

impl EspSender {
    /// Queues a packet of a flow, whatever number that has; packets of one keep their order. The packet is what the
    /// [`Seal`](super::Seal) of the streams makes an ESP packet of, and without one it is an ESP packet. False when it is
    /// empty or too long for a frame, when the queue is full or the stream is closing; one that is queued may be dropped still,
    /// as a network would.
    pub fn send(&self, flow: u64, packet: &[u8]) -> bool {
        self.queue.push(Instant::now(), flow, packet)
    }
}

/// The writer's end; see [`Queue::sender`] for the other one.
#[derive(Default)]
pub(super) struct Queue {
    waiting: Mutex<Waiting>,
    filled: Notify,
    /// The code point for the stream's packets.
    dscp: AtomicU8,
}

#[derive(Default)]
struct Waiting {
    /// IKE messages, framed.
    ike: VecDeque<Bytes>,
    /// Those that have packets, and those of which something is remembered; at most [`FLOWS`].
    flows: Vec<FlowQueue>,
    /// Whose turn it is, by number (RFC 8290 §4.1): first those that had nothing to send before, then the others.
    new: VecDeque<u64>,
    old: VecDeque<u64>,
    /// Of all packets, their lengths included.
    octets: usize,
    /// Most octets.
    limit: Limit,
    closed: bool,
}

struct Limit(usize);

impl Default for Limit {
    fn default() -> Self {
        Self(Pace::default().queue())
    }
}

#[derive(Default)]
struct FlowQueue {
    number: u64,
    chunks: VecDeque<Chunk>,
    octets: usize,
    /// What it may send before the next one's turn.
    credit: i64,
    /// It has its turn.
    listed: bool,
    codel: Codel,
}

struct Chunk {
    since: Instant,
    packets: BytesMut,
}

impl Queue {
    pub(super) fn sender(self: &Arc<Self>) -> EspSender {
        EspSender { queue: self.clone() }
    }

    /// Resolves when there may be something.
    pub(super) async fn filled(&self) {
        self.filled.notified().await;
    }

    /// There is nothing.
    pub(super) fn is_empty(&self) -> bool {
        let waiting = self.waiting();
        waiting.octets == 0 && waiting.ike.is_empty()
    }

    /// No more is taken in.
    pub(super) fn close(&self) {
        self.waiting().closed = true;
    }

    /// Queues a framed IKE message; false when so many wait already, or the stream is closing.
    pub(super) fn push_ike(&self, message: Bytes, most: usize) -> bool {
        let mut waiting = self.waiting();
        let fits = !waiting.closed && waiting.ike.len() < most;
        if fits {
            waiting.ike.push_back(message);
        }
        drop(waiting);
        if fits {
            self.filled.notify_one();
        }
        fits
    }

    /// Wants this code point for all packets from now on.
    pub(super) fn mark(&self, dscp: u8) {
        self.dscp.store(dscp, Ordering::Relaxed);
    }

    /// The code point that is wanted.
    pub(super) fn marking(&self) -> u8 {
        self.dscp.load(Ordering::Relaxed)
    }

    /// The next IKE message.
    pub(super) fn take_ike(&self) -> Option<Bytes> {
        let mut waiting = self.waiting();
        let message = waiting.ike.pop_front();
        if waiting.ike.is_empty() {
            // An idle stream holds nothing.
            waiting.ike = VecDeque::new();
        }
        message
    }

    /// Most octets that may wait from now on.
    pub(super) fn set_limit(&self, limit: usize) {
        self.waiting().limit = Limit(limit);
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        lock(&self.waiting)
    }

    fn push(&self, now: Instant, flow: u64, packet: &[u8]) -> bool {
        let mut waiting = self.waiting();
        let first = waiting.octets == 0;
        let pushed = waiting.push(now, flow, packet);
        drop(waiting);
        if pushed && first {
            self.filled.notify_one();
        }
        pushed
    }

    /// Takes packets of about `room` octets, and gives how many octets.
    pub(super) fn take(&self, now: Instant, room: usize, out: &mut Vec<BytesMut>) -> usize {
        self.waiting().take(now, room, out)
    }
}

impl Waiting {
    fn push(&mut self, now: Instant, flow: u64, packet: &[u8]) -> bool {
        let number = flow % FLOWS;
        let Some(length) = u16::try_from(packet.len()).ok().filter(|_| (1..=MAX_MESSAGE).contains(&packet.len()))
        else {
            return false;
        };
        if self.closed || !self.make_room(LENGTH + packet.len(), number) {
            return false;
        }
        let at = match self.flows.iter().position(|flow| flow.number == number) {
            Some(at) => at,
            None => {
                self.flows.push(FlowQueue { number, ..FlowQueue::default() });
                self.flows.len() - 1
            }
        };
        let Some(flow) = self.flows.get_mut(at) else { return false };
        flow.push(now, length, packet);
        self.octets += LENGTH + packet.len();
        if !flow.listed {
            (flow.listed, flow.credit) = (true, QUANTUM);
            self.new.push_back(number);
        }
        true
    }

    /// Makes room for a packet of a flow: whoever has the most waiting loses its oldest (RFC 8290 §4.1). False when that is this
    /// flow itself.
    fn make_room(&mut self, octets: usize, number: u64) -> bool {
        while self.octets + octets > self.limit.0 {
            let most = self.flows.iter_mut().max_by_key(|flow| flow.octets);
            let Some(most) = most.filter(|most| most.number != number) else { return false };
            let Some((_, packet)) = most.next() else { return false };
            self.octets = self.octets.saturating_sub(LENGTH + packet.len());
        }
        true
    }

    /// RFC 8290 §4.2.
    fn take(&mut self, now: Instant, room: usize, out: &mut Vec<BytesMut>) -> usize {
        let mut taken = 0;
        while taken < room {
            let is_new = !self.new.is_empty();
            let list = if is_new { &mut self.new } else { &mut self.old };
            let Some(number) = list.front().copied() else { break };
            let Some(flow) = self.flows.iter_mut().find(|flow| flow.number == number) else {
                list.pop_front();
                continue;
            };
            if flow.credit <= 0 {
                flow.credit += QUANTUM;
                list.pop_front();
                self.old.push_back(number);
                continue;
            }
            let before = flow.octets;
            match flow.take(now) {
                Some(packet) => {
                    let octets = LENGTH + packet.len();
                    flow.credit = flow.credit.saturating_sub_unsigned(u64::try_from(octets).unwrap_or(u64::MAX));
                    taken += octets;
                    out.push(packet);
                }
                None => {
                    list.pop_front();
                    // One that comes and goes does not get before the others each time.
                    if is_new && !self.old.is_empty() {
                        self.old.push_back(number);
                    } else {
                        flow.listed = false;
                    }
                }
            }
            self.octets = self.octets.saturating_sub(before - flow.octets);
        }
        if self.octets == 0 {
            self.forget(now);
        }
        taken
    }

    /// An idle stream holds nothing, but who sent too much lately.
    fn forget(&mut self, now: Instant) {
        (self.new, self.old) = (VecDeque::new(), VecDeque::new());
        self.flows.retain_mut(|flow| {
            flow.listed = false;
            flow.chunks = VecDeque::new();
            flow.codel.remembers(now)
        });
        if self.flows.is_empty() {
            self.flows = Vec::new();
        }
    }
}

impl FlowQueue {
    fn push(&mut self, now: Instant, length: u16, packet: &[u8]) {
        let octets = LENGTH + packet.len();
        let fits = |chunk: &&mut Chunk| {
            chunk.packets.capacity() - chunk.packets.len() >= octets
                && now.saturating_duration_since(chunk.since) < SAME_AGE
        };
        let append = |packets: &mut BytesMut| {
            packets.put_u16(length);
            packets.put_slice(packet);
        };
        match self.chunks.back_mut().filter(fits) {
            Some(chunk) => append(&mut chunk.packets),
            None => {
                // A single packet is more likely to be alone.
                let room = if self.chunks.is_empty() { octets } else { octets.max(CHUNK) };
                let mut packets = BytesMut::with_capacity(room);
                append(&mut packets);
                self.chunks.push_back(Chunk { since: now, packets });
            }
        }
        self.octets += octets;
    }

    /// The oldest packet, and since when it has been waiting.
    fn next(&mut self) -> Option<(Instant, BytesMut)> {
        let chunk = self.chunks.front_mut()?;
        let since = chunk.since;
        let length = usize::from(u16::from_be_bytes(*chunk.packets.first_chunk()?));
        chunk.packets.advance(LENGTH);
        let packet = chunk.packets.split_to(length.min(chunk.packets.len()));
        if chunk.packets.is_empty() {
            self.chunks.pop_front();
        }
        self.octets = self.octets.saturating_sub(LENGTH + packet.len());
        Some((since, packet))
    }

    /// The next packet that is not dropped.
    fn take(&mut self, now: Instant) -> Option<BytesMut> {
        loop {
            let backlog = self.octets;
            let (since, packet) = self.next()?;
            if !self.codel.drops(now, now.saturating_duration_since(since), backlog) {
                return Some(packet);
            }
        }
    }
}

/// So many intervals after a spell another one is the same still (RFC 8289 §5.3).
const MEMORY: u32 = 16;

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
                let lately = |at: Instant| now.saturating_duration_since(at) < MEMORY * INTERVAL;
                self.count = match self.last {
                    Some((at, count)) if lately(at) && count > 2 => count - 2,
                    _ => 1,
                };
                self.next = Some(self.after(now));
            }
        }
        true
    }

    /// True while what it has done would matter to a spell that begins now.
    fn remembers(&self, now: Instant) -> bool {
        let lately = |at: Instant| now.saturating_duration_since(at) < MEMORY * INTERVAL;
        self.next.is_some() || self.last.is_some_and(|(at, _)| lately(at))
    }

    fn after(&self, at: Instant) -> Instant {
        at + INTERVAL.div_f64(f64::from(self.count.max(1)).sqrt())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packet(number: u32) -> Vec<u8> {
        [&7_u32.to_be_bytes()[..], &number.to_be_bytes(), &[0; 992]].concat()
    }

    fn number(packet: &[u8]) -> u32 {
        u32::from_be_bytes(packet[4..8].try_into().unwrap())
    }

    fn numbers(packets: &[BytesMut]) -> Vec<u32> {
        packets.iter().map(|packet| number(packet)).collect()
    }

    fn take(queue: &Queue, now: Instant, room: usize) -> Vec<BytesMut> {
        let mut out = Vec::new();
        queue.take(now, room, &mut out);
        out
    }

    /// So many packets of one flow come in each millisecond, and so many leave; gives the numbers of those that left.
    fn passes(queue: &Queue, start: Instant, milliseconds: u64, arrivals: usize, departures: usize) -> Vec<u32> {
        let (mut left, mut next) = (Vec::new(), 0);
        for millisecond in 0..milliseconds {
            let now = start + Duration::from_millis(millisecond);
            for _ in 0..arrivals {
                queue.push(now, 1, &packet(next));
                next += 1;
            }
            left.extend(numbers(&take(queue, now, departures * 1002)));
        }
        left
    }

    #[test]
    fn packets_of_a_flow_leave_in_order() {
        let (queue, now) = (Queue::default(), Instant::now());
        for number in 0..40 {
            assert!(queue.push(now, 9, &packet(number)));
        }
        let first = take(&queue, now, 10 * 1002);
        assert_eq!(first[0], packet(0));
        let rest = take(&queue, now, usize::MAX);
        assert_eq!((first.len(), rest.len()), (10, 30));
        assert_eq!(numbers(&[first, rest].concat()), (0..40).collect::<Vec<_>>());
        let waiting = queue.waiting();
        let held = waiting.flows.capacity() + waiting.new.capacity() + waiting.old.capacity();
        assert_eq!((waiting.octets, held), (0, 0), "an idle queue holds nothing");
    }

    #[test]
    fn what_is_no_packet_or_too_much_is_not_queued() {
        let (queue, now) = (Queue::default(), Instant::now());
        for packet in [&[][..], &[1; 65_534]] {
            assert!(!queue.push(now, 0, packet));
        }
        assert!(queue.is_empty());
        queue.set_limit(10 * 1002);
        assert_eq!((0..100).filter(|number| queue.push(now, 0, &packet(*number))).count(), 10);
        assert_eq!(numbers(&take(&queue, now, usize::MAX)), (0..10).collect::<Vec<_>>(), "the newest do not come in");
        assert!(queue.push(now, 0, &packet(0)));
        queue.close();
        assert!(!queue.push(now, 0, &packet(1)));
    }

    #[test]
    fn ike_messages_are_bounded_apart() {
        let (queue, message) = (Queue::default(), Bytes::from_static(b"x"));
        assert_eq!((0..100).filter(|_| queue.push_ike(message.clone(), 3)).count(), 3);
        assert!(!queue.is_empty() && queue.push(Instant::now(), 0, &packet(0)));
        assert_eq!(std::iter::from_fn(|| queue.take_ike()).count(), 3);
        assert_eq!(queue.waiting().ike.capacity(), 0, "an idle queue holds nothing");
        queue.close();
        assert!(!queue.push_ike(message, 3));
    }

    // RFC 8290 §4.1: who fills the queue makes room for the others, from its oldest on.
    #[test]
    fn who_has_the_most_waiting_makes_room() {
        let (queue, now) = (Queue::default(), Instant::now());
        queue.set_limit(10 * 1002);
        assert_eq!((0..20).filter(|number| queue.push(now, 1, &packet(*number))).count(), 10);
        for number in 100..103 {
            assert!(queue.push(now, 2, &packet(number)));
        }
        assert_eq!(queue.waiting().octets, 10 * 1002);
        let mut left = numbers(&take(&queue, now, usize::MAX));
        left.sort_unstable();
        assert_eq!(left, (3..10).chain(100..103).collect::<Vec<_>>());
    }

    // RFC 8290 §1.3, §4.2: a packet now and then does not wait behind a transfer, and two transfers share the stream.
    #[test]
    fn flows_take_turns_and_a_sparse_one_goes_first() {
        let (queue, now) = (Queue::default(), Instant::now());
        for number in 0..200 {
            queue.push(now, 1, &packet(number));
        }
        let mut left = take(&queue, now, 20 * 1002);
        for number in 1000..1100 {
            queue.push(now, 2, &packet(number));
        }
        queue.push(now, 3, &packet(5000));
        left = [left, take(&queue, now, 40 * 1002)].concat();
        let left = numbers(&left);
        let sparse = left.iter().position(|number| *number == 5000).unwrap();
        assert!(sparse < 20 + 4, "after two packets of the other new one at most: {sparse}");
        let of_second = left[20..].iter().filter(|number| (1000..1100).contains(*number)).count();
        assert!((17..=23).contains(&of_second), "{of_second} of 40");
        let of_one = |range: std::ops::Range<u32>| left.iter().filter(move |number| range.contains(*number));
        assert!(of_one(0..200).is_sorted() && of_one(1000..1100).is_sorted());
        // One that always comes back with a packet has no more than its turn.
        let mut others = 0;
        for _ in 0..50 {
            queue.push(now, 4, &packet(6000));
            let left = take(&queue, now, 2 * 1002);
            others += left.iter().filter(|packet| number(packet) != 6000).count();
        }
        assert!(others >= 50, "{others}");
    }

    // However many flows there are, they share so many queues, and nothing is lost or left.
    #[test]
    fn flows_are_bounded() {
        let (queue, now) = (Queue::default(), Instant::now());
        for number in 0..500 {
            assert!(queue.push(now, u64::from(number).wrapping_mul(0x9e37_79b9_7f4a_7c15), &packet(number)));
        }
        assert!(queue.waiting().flows.len() <= 32);
        let mut left = numbers(&take(&queue, now, usize::MAX));
        left.sort_unstable();
        assert_eq!(left, (0..500).collect::<Vec<_>>());
        assert_eq!(queue.waiting().flows.len(), 0);
    }

    #[test]
    fn nothing_is_dropped_of_a_burst_or_where_the_stream_keeps_up() {
        let (queue, now) = (Queue::default(), Instant::now());
        assert_eq!(passes(&queue, now, 1000, 3, 3).len(), 3000);
        for number in 0..80 {
            queue.push(now, 1, &packet(number));
        }
        let left: Vec<BytesMut> =
            (0..80).flat_map(|millisecond| take(&queue, now + Duration::from_millis(millisecond), 1002)).collect();
        assert_eq!(left.len(), 80);
    }

    // RFC 8289 §3.2: a stall is no standing queue.
    #[test]
    fn what_waited_for_a_stalled_stream_is_sent() {
        let (queue, now) = (Queue::default(), Instant::now());
        for number in 0..500 {
            queue.push(now, 1, &packet(number));
        }
        assert_eq!(take(&queue, now + Duration::from_secs(5), usize::MAX).len(), 500);
    }

    // RFC 8289 §5.3: whoever sends a quarter more than the stream takes is told so more and more often.
    #[test]
    fn a_standing_queue_gets_shorter() {
        let (queue, now) = (Queue::default(), Instant::now());
        let left = passes(&queue, now, 20_000, 5, 4);
        let late = now + Duration::from_secs(20);
        let dropped = left.windows(2).map(|two| (two[0], two[1] - two[0] - 1)).filter(|(_, gap)| *gap > 0);
        let (early, later): (Vec<_>, Vec<_>) = dropped.partition(|(number, _)| *number < 50_000);
        assert!(!early.is_empty() && early.len() < later.len(), "{} and {}", early.len(), later.len());
        assert!(left.is_sorted(), "in order");
        // Another flow loses nothing meanwhile.
        for millisecond in 0..500 {
            let now = late + Duration::from_millis(millisecond);
            (0..5).for_each(|_| assert!(queue.push(now, 1, &packet(0))));
            assert!(queue.push(now, 2, &packet(1)));
            let left = numbers(&take(&queue, now, 4 * 1002));
            assert!(left.contains(&1), "{left:?}");
        }
        // Who slows down a little finds an empty queue soon, and nothing is dropped any more.
        let late = late + Duration::from_secs(1);
        let all = passes(&queue, late, 3000, 3, 4);
        assert!(queue.is_empty() && all.len() > 8000);
        assert_eq!(passes(&queue, late + Duration::from_secs(3), 1000, 3, 4).len(), 3000);
    }
}
