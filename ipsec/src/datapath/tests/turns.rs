//! Several threads that send under the same SAs (RFC 4303 §3.3.3).

use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, channel, sync_channel};
use std::thread;

use super::*;

/// Has a packet sealed, tells of it, and waits to be let on; then the same with what is to be sent.
struct Held {
    name: &'static str,
    told: SyncSender<(&'static str, &'static str, u32)>,
    go: Receiver<()>,
    sealed: Vec<u32>,
}

impl Outlet for Held {
    fn take(&mut self, outbound: Outbound, out: &[u8]) {
        assert!(matches!(outbound, Outbound::Send { .. }), "{outbound:?}");
        let number = esp::Header::read(out).unwrap().sequence_low;
        self.sealed.push(number);
        self.told.send((self.name, "sealed", number)).unwrap();
        self.go.recv().unwrap();
    }

    fn send(&mut self) {
        for number in self.sealed.drain(..) {
            self.told.send((self.name, "sends", number)).unwrap();
            self.go.recv().unwrap();
        }
    }
}

#[test]
fn a_thread_that_stops_after_sealing_is_not_overtaken_and_holds_up_no_other_sa() {
    let plane = plane();
    plane.install(half(3000, 1, 1, &["10.2.0.0/16"])).unwrap();
    plane.install(half(3001, 2, 2, &["10.3.0.0/16"])).unwrap();
    let (told, tellings) = sync_channel(16);
    thread::scope(|scope| {
        let start = |name, destination| {
            let ((let_on, go), told, plane) = (channel(), told.clone(), &plane);
            scope.spawn(move || {
                let packet = udp("10.1.0.5", 9, destination, 53, b"x");
                let mut outlet = Held { name, told, go, sealed: Vec::new() };
                plane.outbound_batch(Instant::now(), [&*packet], &mut Vec::new(), &mut outlet);
            });
            let_on
        };
        let first = start("first", "10.2.0.6");
        assert_eq!(tellings.recv().unwrap(), ("first", "sealed", 1));
        // It has number 1 and lies still: its SA's next packet is not even sealed, another SA's goes.
        let second = start("second", "10.2.0.7");
        let other = start("other", "10.3.0.6");
        assert_eq!(tellings.recv().unwrap(), ("other", "sealed", 1));
        other.send(()).unwrap();
        assert_eq!(tellings.recv().unwrap(), ("other", "sends", 1));
        other.send(()).unwrap();
        assert_eq!(tellings.try_recv(), Err(TryRecvError::Empty));
        // While it sends, the next packet is sealed, but does not go before it.
        first.send(()).unwrap();
        let both = HashSet::from([tellings.recv().unwrap(), tellings.recv().unwrap()]);
        assert_eq!(both, HashSet::from([("first", "sends", 1), ("second", "sealed", 2)]));
        second.send(()).unwrap();
        assert_eq!(tellings.try_recv(), Err(TryRecvError::Empty));
        first.send(()).unwrap();
        assert_eq!(tellings.recv().unwrap(), ("second", "sends", 2));
        second.send(()).unwrap();
    });
}

/// What threads put on the wire, in its order: SPI, sequence number, sender and number of the inner packet.
struct Wire<'a> {
    wire: &'a Mutex<Vec<Vec<u8>>>,
    waiting: Vec<Vec<u8>>,
}

impl Outlet for Wire<'_> {
    fn take(&mut self, outbound: Outbound, out: &[u8]) {
        assert!(matches!(outbound, Outbound::Send { .. }), "{outbound:?}");
        self.waiting.push(out.to_vec());
    }

    fn send(&mut self) {
        for packet in self.waiting.drain(..) {
            // One by one, so that others could get between.
            lock(self.wire).push(packet);
        }
    }
}

const SENDERS: u8 = 4;
const BATCHES: u8 = 100;
const BATCH: u8 = 8;

// RFC 4303 §3.4.3: 32 is the window that each receiver must support.
#[test]
fn a_window_of_32_takes_all_packets_of_several_threads_through_rekeys() {
    let setup = |spi_offset| Setup { replay_window: 32, spi_offset, ..Setup::default() };
    let pair = Pair::new(&setup(0));
    let wire = Mutex::default();
    let mut installed = 0;
    thread::scope(|scope| {
        let senders: Vec<_> = (0..SENDERS)
            .map(|sender| {
                let (pair, wire) = (&pair, &wire);
                scope.spawn(move || {
                    let (mut out, mut outlet) = (Vec::new(), Wire { wire, waiting: Vec::new() });
                    for batch in 0..BATCHES {
                        let batch: Vec<_> = (0..BATCH).map(|number| request(&[sender, batch, number])).collect();
                        let packets = batch.iter().map(Vec::as_slice);
                        pair.left.outbound_batch(Instant::now(), packets, &mut out, &mut outlet);
                        assert!(outlet.waiting.is_empty(), "what was sealed has been sent");
                    }
                })
            })
            .collect();
        while senders.iter().any(|sender| !sender.is_finished()) {
            installed += 1;
            let (left, right) = sa_pairs(&setup(installed));
            pair.right.install(right).unwrap();
            pair.left.install(left).unwrap();
            pair.left.retire(LEFT_SPI + installed - 1).unwrap();
            thread::yield_now();
        }
    });
    assert!(installed > 0);
    let mut last_of_spi = HashMap::new();
    let mut last_of_sender = HashMap::new();
    let mut wire = wire.into_inner().unwrap();
    for sealed in &mut wire {
        let header = esp::Header::read(sealed).unwrap();
        let before = last_of_spi.insert(header.spi, header.sequence_low).unwrap_or(0);
        assert_eq!(header.sequence_low, before + 1, "in order, none twice and none left out");
        let inner = pair.open_right(sealed).unwrap();
        let [sender, place @ ..] = *inner.last_chunk::<3>().unwrap();
        assert!(last_of_sender.insert(sender, place).is_none_or(|before| before < place), "a flow keeps its order");
    }
    assert_eq!(wire.len(), usize::from(SENDERS) * usize::from(BATCHES) * usize::from(BATCH));
}

#[test]
fn a_batch_of_several_sas_and_of_what_does_not_go_keeps_its_order() {
    struct Outcomes(Vec<Result<u32, Outbound>>);
    impl Outlet for Outcomes {
        fn take(&mut self, outbound: Outbound, out: &[u8]) {
            self.0.push(match outbound {
                Outbound::Send { .. } => Ok(esp::Header::read(out).unwrap().spi),
                other => Err(other),
            });
        }
        fn send(&mut self) {
            self.0.push(Ok(0));
        }
    }
    let plane = plane();
    plane.install(half(3000, 1, 1, &["10.2.0.0/16"])).unwrap();
    plane.install(half(3001, 2, 2, &["10.3.0.0/16"])).unwrap();
    let to = |destination| udp("10.1.0.5", 9, destination, 53, b"x");
    let batch =
        [to("10.9.0.1"), to("10.2.0.1"), vec![1], to("10.2.0.2"), to("10.3.0.1"), to("10.9.0.1"), to("10.2.0.1")];
    let mut outcomes = Outcomes(Vec::new());
    plane.outbound_batch(Instant::now(), batch.iter().map(Vec::as_slice), &mut Vec::new(), &mut outcomes);
    let dropped = |reason| Err(Outbound::Drop(reason));
    let (nobodys, malformed) = (dropped(DropReason::NoPolicy), dropped(DropReason::Malformed));
    let nobodys_too = dropped(DropReason::NoPolicy);
    let expected = [nobodys, Ok(3000), malformed, Ok(3000), Ok(0), Ok(3001), nobodys_too, Ok(0), Ok(3000), Ok(0)];
    assert_eq!(outcomes.0, expected);
    assert_eq!((count(&plane, DropReason::NoPolicy), count(&plane, DropReason::Malformed)), (2, 1));
}
