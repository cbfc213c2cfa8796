//! What can be asked of a latch.

use std::borrow::Cow;
use std::ffi::c_int;

use latch::protocol::{AddressBinding, Guard, Inquired, LatchInfo, ProofInfo, SaInfo};
use serde_json::json;

use crate::handles::Entry;
use crate::status::{Failure, Status};

/// The text or octets of an item, and whether it is a text.
pub(crate) fn octets(entry: &Entry, item: c_int) -> Result<(Vec<u8>, bool), Failure> {
    if let Entry::Listener(listener) = entry {
        return match item {
            6 => Ok((listener.local_addr().to_string().into_bytes(), true)),
            _ => Err(absent()),
        };
    }
    let told = told(entry)?;
    let (peer, protection) = (&told.peer, &told.protection);
    let text = match item {
        1 => peer.id.text.clone(),
        2 => peer.local_id.text.clone(),
        3 => match &peer.proof {
            ProofInfo::SharedKey => "shared-key".to_owned(),
            ProofInfo::Certificate { .. } => "certificate".to_owned(),
        },
        4 => protection.mode.clone(),
        5 => protection.suite.clone(),
        6 => told.local.to_string(),
        7 => told.remote.to_string(),
        8 => json!(told.as_ref()).to_string(),
        9 => guard(told.guard.ok_or_else(absent)?)?.to_owned(),
        10 => first(&told)?.connection.clone(),
        11 => first(&told)?.outer_local.to_string(),
        12 => first(&told)?.outer_remote.to_string(),
        13 => first(&told)?.transport.clone(),
        14 => address(first(&told)?.address)?.to_owned(),
        32 => return Ok((peer.id.data.clone(), false)),
        33 => return Ok((peer.local_id.data.clone(), false)),
        34 | 35 => {
            return match &peer.proof {
                ProofInfo::Certificate { end_entity, .. } if item == 34 => Ok((end_entity.clone(), false)),
                ProofInfo::Certificate { trust_anchor, .. } => Ok((trust_anchor.clone(), false)),
                ProofInfo::SharedKey => Err(absent()),
            };
        }
        _ => return Err(unknown(item)),
    };
    // A zero inside would end it early: a peer chooses its identity.
    Ok((text.replace('\0', "\u{fffd}").into_bytes(), true))
}

/// The number of an item.
pub(crate) fn number(entry: &Entry, item: c_int) -> Result<u64, Failure> {
    if let Entry::Listener(listener) = entry {
        return if item == 64 { Ok(listener.number()) } else { Err(absent()) };
    }
    let told = told(entry)?;
    let (peer, protection) = (&told.peer, &told.protection);
    match item {
        64 => told.latch.as_ref().map(|latch| latch.number).ok_or_else(absent),
        65 => Ok(peer.id.kind.into()),
        66 => Ok(peer.local_id.kind.into()),
        67 => Ok(protection.encr.into()),
        68 => Ok(protection.key_bits.into()),
        69 => Ok(protection.integ.into()),
        70 => Ok(protection.esn.into()),
        71 => Ok(protection.replay_protection.into()),
        72 => told.class.map(Into::into).ok_or_else(absent),
        73 => Ok(first(&told)?.method.into()),
        74 => Ok(first(&told)?.nat_local.into()),
        75 => Ok(first(&told)?.nat_remote.into()),
        _ => Err(unknown(item)),
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
            peer: latch.peer_identity().clone(),
            protection: latch.protection().clone(),
            // No item asks for it.
            guard: latch.guard(),
            class: latch.class(),
            sas: Vec::new(),
        })),
        Entry::Listener(_) | Entry::Client(_) => Err(absent()),
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
        Guard::Other => Err(absent()),
    }
}

fn address(address: AddressBinding) -> Result<&'static str, Failure> {
    match address {
        AddressBinding::Assigned => Ok("assigned"),
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
