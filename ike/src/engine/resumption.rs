//! IKE_SESSION_RESUME as responder (RFC 5723 §4.3.2): stateless until the ticket is good. A good ticket proves nothing
//! about who presents it; that is for IKE_AUTH, under keys that only its owner can make.

use std::time::Instant;

use super::context::UNMARKED;
use super::responder::answer_header;
use super::tickets::Presented;
use super::{Engine, Path};
use crate::config::Fragmentation;
use crate::crypto::{self, KeySeed};
use crate::sa::auth::{InitMaterial, IntAuth};
use crate::sa::basis::readmits;
use crate::sa::channel::{Channel, Spis};
use crate::sa::fault::{Fault, notify};
use crate::sa::first_request::NONCE_LENGTH;
use crate::sa::nat::{self, Nat};
use crate::sa::parts::Parts;
use crate::sa::redirect::{Redirects, init_redirect};
use crate::sa::retry::after;
use crate::sa::{Core, IkeSa, ResponderAuth, childless};
use crate::wire::{self, Header, Message, NotifyType, Payload};

impl Engine {
    pub(super) fn handle_resume(&mut self, now: Instant, path: Path, message: Message, bytes: &[u8]) {
        let header = message.header;
        if header.response {
            let Some(id) = self.ctx.shared.spis.get(header.initiator_spi) else { return };
            return self.with(id, |sa, ctx| match sa {
                IkeSa::Resuming(sa) if sa.spi() == header.initiator_spi => {
                    sa.handle_response(ctx, now, path, message, bytes)
                }
                other => Some(other),
            });
        }
        let Some(key) = self.first_request(now, path, &header, bytes) else { return };
        let parts = match Parts::collect(message.payloads) {
            Ok(parts) => parts,
            Err(fault) => return self.refuse_init(now, path, &header, &fault),
        };
        if !self.deserves_state(now, path, &header, &parts) {
            return;
        }
        let (Some(ni), Some(ticket)) = (parts.nonce.clone(), parts.notify(NotifyType::TICKET_OPAQUE)) else {
            let fault = Fault::InvalidSyntax("nonce or ticket is missing".to_owned());
            return self.refuse_init(now, path, &header, &fault);
        };
        if !self.begin_serving(now, path.remote.ip()) {
            return;
        }
        let presented = self.ctx.shared.tickets.lock().open(now, &ticket.data);
        let accepted =
            presented.and_then(|presented| self.accept_ticket(now, path, &header, &parts, ni, bytes, presented));
        let served = accepted.is_ok();
        match accepted {
            Ok(sa) => self.insert(sa.core.id, IkeSa::ResponderAuth(Box::new(sa)), Some(key)),
            Err(reason) => self.refuse_ticket(now, path, &header, reason),
        }
        self.end_serving(path.remote.ip(), served);
    }

    #[allow(clippy::too_many_arguments, reason = "a request and its ticket")]
    fn accept_ticket(
        &mut self,
        now: Instant,
        path: Path,
        header: &Header,
        parts: &Parts,
        ni: Vec<u8>,
        bytes: &[u8],
        presented: Presented,
    ) -> Result<ResponderAuth, &'static str> {
        let ctx = &mut self.ctx;
        let Presented { suite, d, grant, .. } = &presented;
        let connection = readmits(ctx, now, &path, &grant.connection, &grant.peer, &grant.basis)?;
        if init_redirect(&connection, parts).is_some() {
            return Err("the peer is to be redirected");
        }
        let nr = ctx.random(NONCE_LENGTH);
        let id = ctx.next_ike();
        let spis = Spis { initiator: header.initiator_spi, responder: ctx.reserve_ike_spi(id) };
        let seed = KeySeed { ni: &ni, nr: &nr, spi_i: spis.initiator, spi_r: spis.responder };
        let keys = crypto::resumed_ike_keys(suite, d, seed).ok();
        let Some(mut channel) = keys.and_then(|keys| Channel::new(*suite, keys, spis, false, false).ok()) else {
            ctx.release_ike_spi(spis.responder);
            return Err("the PRF is not supported");
        };
        channel.fragmentation =
            connection.fragmentation != Fragmentation::No && parts.has(NotifyType::IKEV2_FRAGMENTATION_SUPPORTED);
        // The request was sent before we had an SPI (RFC 7296 §2.23).
        let nat = Nat::detect(parts, spis.initiator, 0, &path, connection.force_encapsulation);
        let (name, redirects) = (ctx.connections.name(&connection.name), Redirects::of_responder(parts));
        let core = Core {
            id,
            name,
            path,
            nat,
            stream_originator: false,
            redirects,
            sequence: 0,
            assigned: None,
            falls_back: false,
            dscp: connection.dscp,
        };
        ctx.log("IKE", 0, core.tag(), format!("{} is resuming an IKE_SA", path.remote.ip()));
        let mut payloads = vec![Payload::Nonce(nr.clone())];
        payloads.extend(nat::payloads(spis.initiator, spis.responder, &path, nat.fake));
        if channel.fragmentation {
            payloads.push(notify(NotifyType::IKEV2_FRAGMENTATION_SUPPORTED, Vec::new()));
        }
        payloads.extend(childless::announcement(std::iter::once(&*connection)));
        let answer = wire::encode(&Message { header: answer_header(header, spis.responder), payloads });
        core.send(ctx, [answer.clone()]);
        let material = InitMaterial {
            ours: answer,
            theirs: bytes.to_vec(),
            ni,
            nr,
            peer_hashes: None,
            announced: None,
            settings: ctx.config.signatures,
            cert_requests: Vec::new(),
            cert_requested: false,
            raw_key_requested: false,
            intermediate: IntAuth::default(),
            use_ppk: false,
            own_key: None,
        };
        let deadline = after(now, ctx.config.half_open_timeout);
        Ok(ResponderAuth::resumed(core, channel, presented, material, deadline))
    }

    /// TICKET_NACK, unprotected: the peer authenticates from the start (§4.3.2).
    fn refuse_ticket(&mut self, now: Instant, path: Path, header: &Header, reason: &str) {
        let line = format!("IKE_SESSION_RESUME from {} refused: {reason}", path.remote.ip());
        self.log_stranger(now, "IKE", line);
        let payloads = vec![notify(NotifyType::TICKET_NACK, Vec::new())];
        self.ctx.transmit(path, UNMARKED, [wire::encode(&Message { header: answer_header(header, 0), payloads })]);
    }
}
