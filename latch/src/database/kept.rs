//! The packets that LARVAL flows would have sent: of each the latest, as of packets whose destination is being looked for
//! (RFC 1122 §2.3.2.2). It is sent when the latch is ESTABLISHED, so that nobody need wait for TCP to send its SYN again.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use ipsec::selector::Flow;

/// Packets of flows that are waited for. With too many of them the oldest go.
#[derive(Default)]
pub(super) struct Kept {
    /// Flows in `state`, so that packets that are dropped cost one load where no latch is LARVAL.
    flows: AtomicUsize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// LARVAL flows, and the number of the packet that is kept.
    flows: HashMap<Flow, Option<u64>>,
    packets: BTreeMap<u64, (Flow, Box<[u8]>)>,
    octets: usize,
    last: u64,
}

/// Packets that are kept at most.
const MOST: usize = 1024;

/// Their octets at most; more than one packet has.
const MOST_OCTETS: usize = 1 << 20;

impl Kept {
    /// From now on the packets of a flow are kept.
    pub(super) fn expect(&self, flow: Flow) {
        let mut state = self.state();
        state.flows.insert(flow, None);
        self.flows.store(state.flows.len(), Ordering::Release);
    }

    /// Keeps a packet if its flow's are.
    pub(super) fn keep(&self, flow: &Flow, packet: &[u8]) {
        if self.flows.load(Ordering::Acquire) == 0 {
            return;
        }
        let mut state = self.state();
        let Some(before) = state.flows.get(flow).copied() else { return };
        state.forget(before);
        state.last += 1;
        let number = state.last;
        state.flows.insert(*flow, Some(number));
        state.octets += packet.len();
        state.packets.insert(number, (*flow, packet.into()));
        while state.packets.len() > MOST || state.octets > MOST_OCTETS {
            let Some(oldest) = state.packets.keys().next().copied() else { break };
            if let Some(flow) = state.forget(Some(oldest)) {
                state.flows.insert(flow, None);
            }
        }
    }

    /// Gives the packet of a flow, whose packets are kept no more.
    pub(super) fn take(&self, flow: &Flow) -> Option<Box<[u8]>> {
        let mut state = self.state();
        let number = state.flows.remove(flow);
        self.flows.store(state.flows.len(), Ordering::Release);
        let (_, packet) = state.packets.remove(&number??)?;
        state.octets -= packet.len();
        Some(packet)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn forget(&mut self, number: Option<u64>) -> Option<Flow> {
        let (flow, packet) = self.packets.remove(&number?)?;
        self.octets -= packet.len();
        Some(flow)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(port: u16) -> Flow {
        let address = std::net::Ipv4Addr::LOCALHOST.into();
        Flow { protocol: 6, local: address, local_port: port, remote: address, remote_port: 1 }
    }

    #[test]
    fn the_latest_packet_of_each_flow_that_is_expected_is_kept() {
        let kept = Kept::default();
        kept.keep(&flow(1), b"early");
        kept.expect(flow(1));
        kept.expect(flow(2));
        kept.keep(&flow(1), b"first");
        kept.keep(&flow(1), b"second");
        kept.keep(&flow(3), b"somebody else's");
        assert_eq!(kept.take(&flow(1)).as_deref(), Some(&b"second"[..]));
        kept.keep(&flow(1), b"late");
        assert_eq!([flow(1), flow(2), flow(3)].map(|flow| kept.take(&flow)), [None, None, None]);
        let state = kept.state();
        assert_eq!((state.flows.len(), state.packets.len(), state.octets), (0, 0, 0));
    }

    #[test]
    fn the_oldest_packets_go_when_there_are_too_many_or_too_large_ones() {
        let kept = Kept::default();
        let flows = u16::try_from(MOST).unwrap_or_default() + 2;
        (0..flows).for_each(|port| kept.expect(flow(port)));
        (0..flows).for_each(|port| kept.keep(&flow(port), b"packet"));
        assert_eq!((kept.take(&flow(0)), kept.take(&flow(1))), (None, None));
        assert!(kept.take(&flow(2)).is_some());
        // The flow whose packet went is still expected.
        let large = vec![0; 60_000];
        (3..flows).for_each(|port| kept.keep(&flow(port), &large));
        let state = kept.state();
        assert!(state.octets <= MOST_OCTETS && state.packets.len() == MOST_OCTETS / large.len(), "{}", state.octets);
        drop(state);
        assert!(kept.take(&flow(flows - 1)).is_some());
        (3..flows).for_each(|port| drop(kept.take(&flow(port))));
        assert_eq!(kept.state().octets, 0);
    }
}
