//! Exchanges of ours that are going on in an established IKE SA, and which of them may go on together (RFC 7296 §2.3).
//!
//! To a peer with a window of one, one after the other. To another one, as many as its window has room for, as long as none
//! depends on another: what concerns the IKE SA as a whole goes on alone, and there is one rekey of a Child SA at a time. Tasks
//! begin in the order of the queue: none overtakes one that has to wait.

use std::time::Instant;

use super::Established;
use super::established::{Active, Closed, Task};
use super::followup::Keying;
use crate::engine::ChildSaId;
use crate::engine::context::Context;
use crate::wire::{ExchangeType, Payload};

/// One exchange, or the work before and after it.
pub(crate) struct Exchange {
    /// Of the request that is out.
    pub(super) message_id: Option<u32>,
    pub(super) active: Active,
    /// Its key exchanges, if it is a CREATE_CHILD_SA with any.
    pub(super) keying: Option<Box<Keying>>,
    /// A request that waits for room in the peer's window.
    unsent: Option<Box<(ExchangeType, Vec<Payload>)>>,
}

impl Active {
    /// The Child SA that it rekeys.
    pub(super) fn replaces(&self) -> Option<ChildSaId> {
        match self {
            Self::Create { offer, .. } => offer.replaces.map(|replaced| replaced.id),
            Self::Install { replaces, .. } => *replaces,
            _ => None,
        }
    }

    /// It goes on beside others.
    fn shares(&self) -> bool {
        match self {
            Self::RekeyIke(_) | Self::DeleteIke { .. } | Self::Redirect { .. } | Self::ProbeUdp => false,
            Self::Create { .. }
            | Self::Install { .. }
            | Self::DeleteChild { .. }
            | Self::DeleteSpi(_)
            | Self::Inform
            | Self::RequestTicket
            | Self::Liveness
            | Self::Mobility(_) => true,
        }
    }

    /// This task has to wait for it.
    fn holds_up(&self, task: &Task) -> bool {
        if !self.shares() {
            return true;
        }
        match task {
            Task::RekeyIke { .. } | Task::DeleteIke { .. } | Task::Redirect { .. } | Task::ProbeUdp => true,
            Task::RekeyChild { .. } => self.replaces().is_some(),
            Task::DeleteChild { id, .. } => self.replaces() == Some(*id),
            Task::Mobility(_) => matches!(self, Self::Mobility(_)),
            Task::CreateChild { .. } | Task::DeleteSpi(_) | Task::Inform(_) | Task::RequestTicket | Task::Liveness => {
                false
            }
        }
    }
}

impl Established {
    /// True when this task may begin now.
    pub(super) fn may_begin(&self, task: &Task) -> bool {
        // Where a request may go along UDP and a stream, each is followed by itself (RFC 9329 §7.1).
        let window = if self.chooses_transport() { 1 } else { self.channel.window() };
        let fits = self.exchanges.len() < window && self.channel.has_room();
        fits && !self.exchanges.iter().any(|exchange| exchange.active.holds_up(task))
    }

    /// Something of ours goes on, without a request for now.
    pub(super) fn go_on(&mut self, active: Active, keying: Option<Keying>) {
        let keying = keying.map(Box::new);
        self.exchanges.push(Exchange { message_id: None, active, keying, unsent: None });
    }

    /// Something of ours goes on whose request is out.
    pub(super) fn asked(&mut self, active: Active, message_id: u32) {
        self.exchanges.push(Exchange { message_id: Some(message_id), active, keying: None, unsent: None });
    }

    /// Something of ours goes on with a request.
    pub(super) fn go_on_with(
        &mut self,
        ctx: &mut Context,
        now: Instant,
        (active, keying): (Active, Option<Keying>),
        exchange: ExchangeType,
        payloads: Vec<Payload>,
    ) -> Result<(), Closed> {
        self.go_on(active, keying);
        if !self.channel.has_room() {
            // A later step of an exchange, while the answer to an older request is missing.
            if let Some(last) = self.exchanges.last_mut() {
                last.unsent = Some(Box::new((exchange, payloads)));
            }
            return Ok(());
        }
        let message_id = self.send_request(ctx, now, exchange, &payloads)?;
        if let Some(last) = self.exchanges.last_mut() {
            last.message_id = Some(message_id);
        }
        Ok(())
    }

    /// Sends what waited for room.
    pub(super) fn send_unsent(&mut self, ctx: &mut Context, now: Instant) -> Result<(), Closed> {
        for index in 0..self.exchanges.len() {
            if !self.channel.has_room() {
                return Ok(());
            }
            let unsent = self.exchanges.get_mut(index).and_then(|exchange| exchange.unsent.take());
            let Some(unsent) = unsent else { continue };
            let message_id = self.send_request(ctx, now, unsent.0, &unsent.1)?;
            if let Some(exchange) = self.exchanges.get_mut(index) {
                exchange.message_id = Some(message_id);
            }
        }
        Ok(())
    }

    /// Takes out an exchange that this is true of.
    pub(super) fn take_exchange(&mut self, is: impl Fn(&Exchange) -> bool) -> Option<Exchange> {
        let index = self.exchanges.iter().position(is)?;
        Some(self.exchanges.remove(index))
    }

    /// What of ours is going on.
    pub(super) fn going_on(&self) -> impl Iterator<Item = &Active> {
        self.exchanges.iter().map(|exchange| &exchange.active)
    }

    /// We rekey the IKE SA.
    pub(super) fn rekeys_ike(&self) -> bool {
        self.going_on().any(|active| matches!(active, Active::RekeyIke(_)))
    }
}
