//! IKE_SA_INIT as responder (RFC 7296 §1.2, §2.5, §2.6, §2.7): stateless until the request deserves state.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use ipsec::transform::{Ke, Proposal};

use super::connections::Admitting;
use super::context::{Context, UNMARKED};
use super::{Engine, Path, Transport};
use crate::config::{Connection, Fragmentation};
use crate::crypto::{self, IkeChoice, names};
use crate::sa::auth::{InitMaterial, IntAuth, auth_announcement, cert_requests};
use crate::sa::channel::Spis;
use crate::sa::childless;
use crate::sa::fault::{Fault, notify};
use crate::sa::first_request::NONCE_LENGTH;
use crate::sa::init::{capabilities, proposals};
use crate::sa::intermediate_responder::Request;
use crate::sa::nat::{self, Nat};
use crate::sa::parts::Parts;
use crate::sa::ppk;
use crate::sa::redirect::{Redirects, init_redirect};
use crate::sa::{Core, IkeSa, ResponderIntermediate};
use crate::wire::{self, ExchangeType, Header, Message, NotifyType, Payload};

impl Engine {
    pub(super) fn handle_init_request(&mut self, now: Instant, path: Path, message: Message, bytes: &[u8]) {
        let header = message.header;
        let Some(key) = self.first_request(now, path, &header, bytes) else { return };
        let parts = match Parts::collect(message.payloads) {
            Ok(parts) => parts,
            Err(fault) => return self.refuse_init(now, path, &header, &fault),
        };
        if !self.deserves_state(now, path, &header, &parts) {
            return;
        }
        self.ctx.shared.counters.unnamed().message(ExchangeType::IKE_SA_INIT, true, false);
        let fitting = self.ctx.connections.admitting(&path);
        if let Some(Admitting { connection, .. }) = fitting.first()
            && let Some(redirect) = init_redirect(connection, &parts)
        {
            // RFC 5685 §3: without state, and so without keys.
            self.ctx.log("IKE", 1, None, format!("redirecting {} in IKE_SA_INIT", path.remote.ip()));
            let header = answer_header(&header, 0);
            self.ctx.transmit(path, connection.dscp, [wire::encode(&Message { header, payloads: vec![redirect] })]);
            return;
        }
        if !self.begin_serving(now, path.remote.ip()) {
            return;
        }
        let accepted = self.accept_init(now, path, &header, parts, fitting, bytes);
        let served = accepted.is_ok();
        match accepted {
            Ok(sa) => self.insert(sa.core.id, IkeSa::ResponderIntermediate(Box::new(sa)), Some(key)),
            Err(fault) => self.refuse_init(now, path, &header, &fault),
        }
        self.end_serving(path.remote.ip(), served);
    }

    /// What IKE_SA_INIT and IKE_SESSION_RESUME have in common as long as nothing inside is looked at: the key of a request
    /// that may make an IKE SA. A repetition gets its answer, and others get nothing.
    pub(super) fn first_request(
        &mut self,
        now: Instant,
        path: Path,
        header: &Header,
        bytes: &[u8],
    ) -> Option<(u64, SocketAddr)> {
        let first = header.from_initiator && header.message_id == 0 && header.responder_spi == 0;
        if !first || header.initiator_spi == 0 {
            return None;
        }
        let key = (header.initiator_spi, path.remote);
        if let Some(id) = self.inits.get(&key) {
            // §2.1: a repetition gets the same answer, as long as IKE_AUTH has not come.
            let (dscp, exchange) = match self.sas.get(id).map(|slot| &slot.sa) {
                Some(IkeSa::ResponderIntermediate(sa)) => (sa.core.dscp, sa.init_exchange()),
                Some(IkeSa::ResponderAuth(sa)) => (sa.core.dscp, Some(sa.init_exchange())),
                _ => (UNMARKED, None),
            };
            // With many CERTREQs the answer is the longer one; who repeats in another's name gets few of them.
            if let Some((_, answer)) = exchange.filter(|(request, _)| *request == bytes)
                && self.ctx.shared.defence.lock().may_answer(now, path.remote.ip())
            {
                let answer = answer.to_vec();
                self.ctx.transmit(path, dscp, [answer]);
            }
            return None;
        }
        if let Transport::Stream(stream) = path.transport
            && self.ctx.shared.streams.is_used(stream)
        {
            // RFC 9329 §6.1: IKE SAs do not share a stream, but for one that is rekeyed and its successor.
            let line = format!("ignoring IKE_SA setup from {}, its TCP connection has an IKE_SA", path.remote.ip());
            self.log_stranger(now, "NET", line);
            return None;
        }
        // Our own request, sent back to us: both ends would be us, and each would believe the other.
        if self.ctx.shared.spis.contains(header.initiator_spi) {
            return None;
        }
        if let Some(reason) = self.refusal(now, path.remote.ip()) {
            let line = format!("ignoring IKE_SA setup from {}, {reason}", path.remote.ip());
            self.log_stranger(now, "NET", line);
            return None;
        }
        Some(key)
    }

    /// §2.5: who speaks a later major version learns ours.
    pub(super) fn answer_version(&mut self, now: Instant, path: Path, bytes: &[u8], version: u8) {
        let Some(header) = foreign_header(bytes) else { return };
        if header.response || !self.ctx.shared.defence.lock().may_answer(now, path.remote.ip()) {
            return;
        }
        let line = format!(
            "received unsupported IKE version {version} from {}, sending INVALID_MAJOR_VERSION",
            path.remote.ip()
        );
        self.ctx.log("ENC", 1, None, line);
        let header = Header { response: true, from_initiator: !header.from_initiator, ..header };
        let payloads = vec![notify(NotifyType::INVALID_MAJOR_VERSION, Vec::new())];
        self.ctx.transmit(path, UNMARKED, [wire::encode(&Message { header, payloads })]);
    }

    fn accept_init(
        &mut self,
        now: Instant,
        path: Path,
        header: &Header,
        parts: Parts,
        fitting: Vec<Admitting>,
        bytes: &[u8],
    ) -> Result<ResponderIntermediate, Fault> {
        let ctx = &mut self.ctx;
        let missing = || Fault::InvalidSyntax("SA, KE or nonce is missing".to_owned());
        let offered = parts.sa.as_ref().ok_or_else(missing)?;
        let (group, public) = parts.ke.as_ref().ok_or_else(missing)?;
        let ni = parts.nonce.as_ref().ok_or_else(missing)?;
        if fitting.is_empty() {
            let line = format!(
                "no IKE config found for {}...{}, sending NO_PROPOSAL_CHOSEN",
                path.local.ip(),
                path.remote.ip()
            );
            let line = ctx.shared.defence.lock().line(now, line);
            if let Some(line) = line {
                ctx.log("IKE", 1, None, line);
            }
        }
        let ours_first = ctx.config.prefer_configured_proposals;
        // RFC 9370 §2.2.1: additional key exchanges only with a peer that has the exchange for them.
        let intermediate = parts.has(NotifyType::INTERMEDIATE_EXCHANGE_SUPPORTED);
        let ours = |connection: &Connection| {
            let ours = proposals(connection);
            if intermediate { ours } else { crypto::without_additional_ke(&ours) }
        };
        let select = |connection: &Connection, preferred: Option<Ke>| {
            crypto::select_ike(offered, &ours(connection), ours_first, preferred)
        };
        let choice = each_once(&fitting).find_map(|connection| select(connection, Some(*group)));
        if choice.is_none() && !fitting.is_empty() {
            let configured: Vec<Proposal> = each_once(&fitting).flat_map(proposals).collect();
            let (received, configured) = (names::proposals(offered), names::proposals(&configured));
            let line = format!("received proposals: {received}; configured proposals: {configured}");
            let line = ctx.shared.defence.lock().line(now, line);
            if let Some(line) = line {
                ctx.log("CFG", 1, None, line);
            }
        }
        let IkeChoice { suite, proposal } = choice.ok_or(Fault::NoProposalChosen)?;
        if suite.ke != *group {
            return Err(Fault::InvalidKe(suite.ke));
        }
        parts.nonce_for(suite.prf)?;
        // Those that could have made the same choice; identities decide among them in IKE_AUTH.
        let chosen = [proposal.clone()];
        let mut same: BTreeMap<usize, bool> = BTreeMap::new();
        let candidates: Vec<Arc<Connection>> = fitting
            .into_iter()
            .filter(|Admitting { connection, proposals }| {
                *same.entry(*proposals).or_insert_with(|| {
                    let again = crypto::select_ike(&chosen, &ours(connection), ours_first, Some(*group));
                    again.is_some_and(|choice| choice.suite == suite)
                })
            })
            .map(|admitting| admitting.connection)
            .collect();
        let first = candidates.first().ok_or(Fault::NoProposalChosen)?;
        ctx.log("CFG", 1, None, format!("selected proposal: {}", names::proposals(&chosen)));

        let id = ctx.next_ike();
        let spis = Spis { initiator: header.initiator_spi, responder: ctx.reserve_ike_spi(id) };
        let nr = ctx.random(NONCE_LENGTH);
        let fragmentation =
            first.fragmentation != Fragmentation::No && parts.has(NotifyType::IKEV2_FRAGMENTATION_SUPPORTED);
        let fake = first.force_encapsulation;
        // The request was sent before we had an SPI (§2.23).
        let nat = Nat::detect(&parts, spis.initiator, 0, &path, fake);
        let redirects = Redirects::of_responder(&parts);
        let (name, stream_originator) = (ctx.connections.name(&first.name), false);
        let (sequence, assigned, falls_back, dscp) = (0, None, false, first.dscp);
        let core = Core { id, name, path, nat, stream_originator, redirects, sequence, assigned, falls_back, dscp };
        ctx.log("IKE", 0, core.tag(), format!("{} is initiating an IKE_SA", path.remote.ip()));
        let with_intermediate = !suite.additional.is_none();
        let answer = answer(ctx, header, &core, spis, proposal, &nr, fragmentation, with_intermediate, &candidates);
        let use_ppk = parts.has(NotifyType::USE_PPK) && !ctx.ppks.is_empty();
        let mut answer = answer;
        if use_ppk {
            answer.payloads.push(ppk::offer());
        }
        let material = InitMaterial {
            ours: Vec::new(),
            theirs: bytes.to_vec(),
            ni: ni.clone(),
            nr,
            peer_hashes: parts.signature_hashes().filter(|_| ctx.config.signature_authentication),
            announced: None,
            settings: ctx.config.signatures,
            cert_requests: parts.cert_requests,
            cert_requested: parts.cert_requested,
            raw_key_requested: parts.raw_key_requested,
            intermediate: IntAuth::default(),
            use_ppk,
            own_key: None,
        };
        let request = Request { suite, spis, fragmentation, answer, material, candidates };
        Ok(ResponderIntermediate::begin(ctx, now, core, request, *group, public.clone()))
    }

    pub(super) fn refuse_init(&mut self, now: Instant, path: Path, header: &Header, fault: &Fault) {
        let resumes = header.exchange == ExchangeType::IKE_SESSION_RESUME;
        let name = if resumes { "IKE_SESSION_RESUME" } else { "IKE_SA_INIT" };
        self.log_stranger(now, "IKE", format!("{name} from {} refused: {fault}", path.remote.ip()));
        let header = answer_header(header, 0);
        self.ctx.shared.counters.unnamed().message(ExchangeType::IKE_SA_INIT, false, true);
        self.ctx.transmit(path, UNMARKED, [wire::encode(&Message { header, payloads: vec![fault.payload()] })]);
    }
}

/// Of connections that have the same proposals the first.
fn each_once(fitting: &[Admitting]) -> impl Iterator<Item = &Connection> {
    let mut seen = BTreeSet::new();
    fitting.iter().filter(move |one| seen.insert(one.proposals)).map(|one| &*one.connection)
}

/// Our answer but for the KE payload.
#[allow(clippy::too_many_arguments, reason = "the parts of one message")]
fn answer(
    ctx: &mut Context,
    request: &Header,
    core: &Core,
    spis: Spis,
    proposal: ipsec::transform::Proposal,
    nr: &[u8],
    fragmentation: bool,
    intermediate: bool,
    candidates: &[Arc<Connection>],
) -> Message {
    let mut payloads = vec![Payload::Sa(vec![proposal]), Payload::Nonce(nr.to_vec())];
    payloads.extend(nat::payloads(spis.initiator, spis.responder, &core.path, core.nat.fake));
    payloads.extend(cert_requests(candidates, &ctx.authorities));
    payloads.push(auth_announcement(candidates, ctx.config.signatures));
    payloads.extend(capabilities(ctx, fragmentation));
    payloads.extend(childless::announcement(candidates.iter().map(|connection| &**connection)));
    if intermediate {
        payloads.push(notify(NotifyType::INTERMEDIATE_EXCHANGE_SUPPORTED, Vec::new()));
    }
    Message { header: answer_header(request, spis.responder), payloads }
}

pub(super) fn answer_header(request: &Header, responder_spi: u64) -> Header {
    Header {
        initiator_spi: request.initiator_spi,
        responder_spi,
        major: 2,
        minor: 0,
        exchange: request.exchange,
        from_initiator: false,
        response: true,
        message_id: 0,
    }
}

/// The fields of a header whose version we do not speak (§2.5: SPIs and flags keep their places).
fn foreign_header(bytes: &[u8]) -> Option<Header> {
    const RESPONSE: u8 = 0x20;
    const INITIATOR: u8 = 0x08;
    let (initiator_spi, rest) = bytes.split_first_chunk::<8>()?;
    let (responder_spi, rest) = rest.split_first_chunk::<8>()?;
    let ([_next, _version, exchange, flags], rest) = rest.split_first_chunk::<4>()?;
    let (message_id, _) = rest.split_first_chunk::<4>()?;
    Some(Header {
        initiator_spi: u64::from_be_bytes(*initiator_spi),
        responder_spi: u64::from_be_bytes(*responder_spi),
        major: 2,
        minor: 0,
        exchange: ExchangeType(*exchange),
        from_initiator: flags & INITIATOR != 0,
        response: flags & RESPONSE != 0,
        message_id: u32::from_be_bytes(*message_id),
    })
}
