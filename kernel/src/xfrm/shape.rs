//! What a state asks of the kernel. A kernel passes over attributes that it does not know, so the first state of each kind
//! is read back; it understands the next one as it understood that.

use ipsec::plane::{Lifetime, Mark, Mode};

use super::codec::State;

/// A kind of states: which parts of a description it takes, not what they say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    ipv6: bool,
    tunnel: bool,
    with_selector: bool,
    esn: bool,
    /// The window is `None`, or longer than the older form of it can say.
    window: Option<bool>,
    /// In which packets.
    in_tcp: Option<bool>,
    /// Bytes, packets.
    limits: [bool; 2],
    flags: u8,
    extra_flags: u32,
    offload: Option<u8>,
    padded: bool,
    mark: Masked,
    set_mark: Masked,
    with_if_id: bool,
}

/// How much of a mark counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Masked {
    Nothing,
    Part,
    Whole,
}

impl Masked {
    fn of(mark: Mark) -> Self {
        match mark.mask {
            0 if mark.value == 0 => Self::Nothing,
            u32::MAX => Self::Whole,
            _ => Self::Part,
        }
    }
}

impl Shape {
    pub(super) fn of(state: &State) -> Self {
        let Lifetime { soft_bytes: _, hard_bytes, soft_packets: _, hard_packets } = state.lifetime;
        Self {
            ipv6: state.id.destination.is_ipv6(),
            tunnel: state.mode == Mode::Tunnel,
            with_selector: state.selector.is_some(),
            esn: state.esn,
            window: Some(state.replay_window).filter(|window| *window > 0).map(|window| window > 32),
            in_tcp: state.encapsulation.map(|ports| ports.in_tcp),
            limits: [hard_bytes.is_some(), hard_packets.is_some()],
            flags: state.flags,
            extra_flags: state.extra_flags,
            offload: state.offload.map(|(_, what)| what),
            padded: state.tfc_padding != 0,
            mark: Masked::of(state.mark),
            set_mark: Masked::of(state.set_mark),
            with_if_id: state.if_id != 0,
        }
    }
}
