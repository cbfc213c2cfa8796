//! What can be asked of a latch.

use std::borrow::Cow;
use std::ffi::c_int;
use std::net::SocketAddr;

use latch::protocol::{AddressBinding, Guard, Inquired, LatchInfo, ProofInfo, SaInfo};
use serde_json::json;

use crate::handles::Entry;
use crate::status::{Failure, Status};

macro_rules! items {
    ($($variant:ident = $number:literal $name:literal;)*) => {
        /// `enum latchkey_item`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Item {
            $($variant = $number,)*
        }

        #[cfg(test)]
        impl Item {
            pub(crate) const ALL: &[(Self, &str)] = &[$((Self::$variant, $name),)*];
        }

        impl TryFrom<c_int> for Item {
            type Error = Failure;

            fn try_from(number: c_int) -> Result<Self, Failure> {
                match number {
                    $($number => Ok(Self::$variant),)*
                    _ => Err(unknown(number)),
                }
            }
        }
    };
}

items! {
    PeerId = 1 "PEER_ID";
    LocalId = 2 "LOCAL_ID";
    Proof = 3 "PROOF";
    Mode = 4 "MODE";
    Suite = 5 "SUITE";
    LocalAddress = 6 "LOCAL_ADDRESS";
    RemoteAddress = 7 "REMOTE_ADDRESS";
    Json = 8 "JSON";
    Guard = 9 "GUARD";
    Connection = 10 "CONNECTION";
    OuterLocalAddress = 11 "OUTER_LOCAL_ADDRESS";
    OuterRemoteAddress = 12 "OUTER_REMOTE_ADDRESS";
    Transport = 13 "TRANSPORT";
    AddressBinding = 14 "ADDRESS_BINDING";
    PeerIdData = 32 "PEER_ID_DATA";
    LocalIdData = 33 "LOCAL_ID_DATA";
    Certificate = 34 "CERTIFICATE";
    TrustAnchor = 35 "TRUST_ANCHOR";
    RawKey = 36 "RAW_KEY";
    Number = 64 "NUMBER";
    PeerIdKind = 65 "PEER_ID_KIND";
    LocalIdKind = 66 "LOCAL_ID_KIND";
    Encr = 67 "ENCR";
    KeyBits = 68 "KEY_BITS";
    Integ = 69 "INTEG";
    Esn = 70 "ESN";
    ReplayProtection = 71 "REPLAY_PROTECTION";
    Class = 72 "CLASS";
    AuthMethod = 73 "AUTH_METHOD";
    NatLocal = 74 "NAT_LOCAL";
    NatRemote = 75 "NAT_REMOTE";
    Bypass = 76 "BYPASS";
}

/// The text or octets of an item, and whether it is a text.
pub(crate) fn octets(entry: &Entry, number: c_int) -> Result<(Vec<u8>, bool), Failure> {
    let item = Item::try_from(number)?;
    if let Some((local, _)) = listening(entry) {
        return match item {
            Item::LocalAddress => Ok((local.to_string().into_bytes(), true)),
            _ => Err(absent()),
        };
    }
    let told = told(entry)?;
    let peer = || told.peer.as_ref().ok_or_else(absent);
    let protection = || told.protection.as_ref().ok_or_else(absent);
    let text = match item {
        Item::PeerId => peer()?.id.text.clone(),
        Item::LocalId => peer()?.local_id.text.clone(),
        Item::Proof => match &peer()?.proof {
            ProofInfo::Unauthenticated => "unauthenticated".to_owned(),
            ProofInfo::SharedKey => "shared-key".to_owned(),
            ProofInfo::Certificate { .. } => "certificate".to_owned(),
            ProofInfo::RawKey { .. } => "raw-key".to_owned(),
            ProofInfo::Eap { .. } => "eap".to_owned(),
        },
        Item::Mode => protection()?.mode.clone(),
        Item::Suite => protection()?.suite.clone(),
        Item::LocalAddress => told.local.to_string(),
        Item::RemoteAddress => told.remote.to_string(),
        Item::Json => json!(told.as_ref()).to_string(),
        Item::Guard => guard(told.guard.ok_or_else(absent)?)?.to_owned(),
        Item::Connection => first(&told)?.connection.clone(),
        Item::OuterLocalAddress => first(&told)?.outer_local.to_string(),
        Item::OuterRemoteAddress => first(&told)?.outer_remote.to_string(),
        Item::Transport => first(&told)?.transport.clone(),
        Item::AddressBinding => address(first(&told)?.address)?.to_owned(),
        Item::PeerIdData => return Ok((peer()?.id.data.clone(), false)),
        Item::LocalIdData => return Ok((peer()?.local_id.data.clone(), false)),
        Item::Certificate | Item::TrustAnchor => {
            return match &peer()?.proof {
                ProofInfo::Certificate { end_entity, .. } if item == Item::Certificate => {
                    Ok((end_entity.clone(), false))
                }
                ProofInfo::Certificate { trust_anchor, .. } => Ok((trust_anchor.clone(), false)),
                ProofInfo::SharedKey
                | ProofInfo::RawKey { .. }
                | ProofInfo::Eap { .. }
                | ProofInfo::Unauthenticated => Err(absent()),
            };
        }
        Item::RawKey => {
            return match &peer()?.proof {
                ProofInfo::RawKey { key } => Ok((key.clone(), false)),
                _ => Err(absent()),
            };
        }
        _ => return Err(unknown(number)),
    };
    // A zero inside would end it early: a peer chooses its identity.
    Ok((text.replace('\0', "\u{fffd}").into_bytes(), true))
}

/// The number of an item.
pub(crate) fn number(entry: &Entry, number: c_int) -> Result<u64, Failure> {
    let item = Item::try_from(number)?;
    if let Some((_, number)) = listening(entry) {
        return if item == Item::Number { Ok(number) } else { Err(absent()) };
    }
    let told = told(entry)?;
    let peer = || told.peer.as_ref().ok_or_else(absent);
    let protection = || told.protection.as_ref().ok_or_else(absent);
    match item {
        Item::Number => told.latch.as_ref().map(|latch| latch.number).ok_or_else(absent),
        Item::PeerIdKind => Ok(peer()?.id.kind.into()),
        Item::LocalIdKind => Ok(peer()?.local_id.kind.into()),
        Item::Encr => Ok(protection()?.encr.into()),
        Item::KeyBits => Ok(protection()?.key_bits.into()),
        Item::Integ => Ok(protection()?.integ.into()),
        Item::Esn => Ok(protection()?.esn.into()),
        Item::ReplayProtection => Ok(protection()?.replay_protection.into()),
        Item::Bypass => Ok(told.bypass.into()),
        Item::Class => told.class.map(Into::into).ok_or_else(absent),
        Item::AuthMethod => Ok(first(&told)?.method.into()),
        Item::NatLocal => Ok(first(&told)?.nat_local.into()),
        Item::NatRemote => Ok(first(&told)?.nat_remote.into()),
        _ => Err(unknown(number)),
    }
}

/// Where a listener of either kind is, and its latch's number.
fn listening(entry: &Entry) -> Option<(SocketAddr, u64)> {
    match entry {
        Entry::Listener(listener) => Some((listener.local_addr(), listener.number())),
        Entry::Endpoint(endpoint) => Some((endpoint.local_addr(), endpoint.listener())),
        Entry::Client(_) | Entry::Latch(_) | Entry::Bypass(_) | Entry::Peer(..) | Entry::Told(_) => None,
    }
}

fn told(entry: &Entry) -> Result<Cow<'_, Inquired>, Failure> {
    match entry {
        Entry::Told(told) => Ok(Cow::Borrowed(told)),
        Entry::Latch(latch) => Ok(Cow::Owned(Inquired {
            local: latch.local_addr(),
            remote: latch.peer_addr(),
            protocol: latch.protocol(),
            latch: Some(LatchInfo { number: latch.number(), state: latch.state() }),
            bypass: false,
            peer: Some(latch.peer_identity().clone()),
            protection: Some(latch.protection().clone()),
            // No item asks for it.
            guard: latch.guard(),
            class: latch.class(),
            sas: Vec::new(),
        })),
        Entry::Peer(endpoint, peer) => Ok(Cow::Owned(Inquired {
            local: endpoint.local_addr(),
            remote: peer.addr(),
            protocol: 17,
            latch: Some(LatchInfo { number: peer.latch(), state: peer.state() }),
            bypass: false,
            peer: Some(peer.identity().clone()),
            protection: Some(peer.protection().clone()),
            guard: peer.guard(),
            class: peer.class(),
            sas: Vec::new(),
        })),
        Entry::Bypass(bypass) => Ok(Cow::Owned(Inquired {
            local: bypass.local_addr(),
            remote: bypass.peer_addr(),
            protocol: bypass.protocol(),
            latch: Some(LatchInfo { number: bypass.number(), state: bypass.state() }),
            bypass: true,
            peer: None,
            protection: None,
            guard: bypass.guard(),
            class: None,
            sas: Vec::new(),
        })),
        Entry::Listener(_) | Entry::Endpoint(_) | Entry::Client(_) => Err(absent()),
    }
}

/// The first SA of an inquiry.
fn first(told: &Inquired) -> Result<&SaInfo, Failure> {
    told.sas.first().ok_or_else(absent)
}

fn guard(guard: Guard) -> Result<&'static str, Failure> {
    match guard {
        Guard::Engine => Ok("engine"),
        Guard::EngineAndSystem => Ok("engine-and-system"),
        Guard::System => Ok("system"),
        Guard::SystemAndFilter => Ok("system-and-filter"),
        Guard::Other => Err(absent()),
    }
}

fn address(address: AddressBinding) -> Result<&'static str, Failure> {
    match address {
        AddressBinding::Proved => Ok("proved"),
        AddressBinding::Assigned => Ok("assigned"),
        AddressBinding::Reserved => Ok("reserved"),
        AddressBinding::Outer => Ok("outer"),
        AddressBinding::Configured => Ok("configured"),
        AddressBinding::Other => Err(absent()),
    }
}

fn absent() -> Failure {
    Failure::new(Status::Absent, "the latch has no such item")
}

fn unknown(item: c_int) -> Failure {
    Failure::new(Status::Argument, format!("there is no item {item}"))
}
