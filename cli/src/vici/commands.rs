//! What VICI's commands do. Answers and refusals have charon's names, order and words: scripts depend on them.

use std::collections::BTreeSet;
use std::time::Duration;

use ike::config::Connection;
use ike::engine::{ChildSaId, Event, Gateway, IkeSaId};
use ipsec::plane::ShuntAction;
use ipsec::secret::Secret;
use pad::{Certificate, CredentialError, Credentials, Crl, Identity, IdentityPattern, PublicKey};
use tokio::sync::broadcast;

use crate::config::Configured;
use crate::config::Severity;
use crate::config::certificate::is_authority;
use crate::config::connection::{InlineCertificates, connection};
use crate::config::credentials::Authority;
use crate::config::pool::pool;
use crate::config::values::{self, Address};
use crate::control::{Counted, Matched, PolicyKind, RedirectFilter, SaFilter};
use crate::tree::{Node, Section};
use crate::vici::events;
use crate::vici::report;
use crate::vici::server::{EventSink, Shared};

/// Longest reason for a refusal, in octets: longer ones (they may quote arguments) would not fit into the answer.
const MAX_REASON: usize = 1024;

/// What an argument has to be.
#[derive(Clone, Copy)]
enum Kind {
    Text,
    Octets,
    List,
}

/// The arguments that a command reads by name. Others are ignored, as in charon.
fn arguments(command: &str) -> &'static [(&'static str, Kind)] {
    use Kind::{List, Octets, Text};
    match command {
        "initiate" => &[("child", Text), ("ike", Text), ("timeout", Text), ("loglevel", Text)],
        "terminate" => &[
            ("child", Text),
            ("ike", Text),
            ("child-id", Text),
            ("ike-id", Text),
            ("force", Text),
            ("timeout", Text),
            ("loglevel", Text),
        ],
        "rekey" => &[("child", Text), ("ike", Text), ("child-id", Text), ("ike-id", Text), ("reauth", Text)],
        "redirect" => &[("ike", Text), ("ike-id", Text), ("peer-ip", Text), ("peer-id", Text), ("gateway", Text)],
        "install" | "uninstall" | "list-policies" => &[("child", Text), ("ike", Text)],
        "list-sas" => &[("child", Text), ("ike", Text), ("child-id", Text), ("ike-id", Text)],
        "list-conns" => &[("ike", Text)],
        "list-certs" => &[("type", Text), ("flag", Text), ("subject", Text)],
        "load-cert" => &[("type", Text), ("flag", Text), ("data", Octets)],
        "load-key" => &[("type", Text), ("data", Octets)],
        "load-shared" => &[("id", Text), ("type", Text), ("data", Octets), ("owners", List)],
        "unload-key" | "unload-shared" => &[("id", Text)],
        "unload-conn" | "unload-authority" | "unload-pool" | "list-authorities" => &[("name", Text)],
        "get-pools" => &[("leases", Text), ("name", Text)],
        "get-counters" | "reset-counters" => &[("all", Text), ("name", Text)],
        _ => &[],
    }
}

/// Refuses an argument of another kind. Were it taken as missing, a command would mean more than was asked for.
fn check_arguments(command: &str, message: &Section) -> Result<(), Section> {
    let known = arguments(command);
    for (name, node) in &message.entries {
        let Some((_, kind)) = known.iter().find(|(argument, _)| argument == name) else { continue };
        let fits = match (kind, node) {
            (Kind::Text, Node::Value(value)) => value.text().is_some(),
            (Kind::Octets, Node::Value(_)) | (Kind::List, Node::List(..) | Node::Value(_)) => true,
            (Kind::Text | Kind::Octets | Kind::List, _) => false,
        };
        if !fits {
            return Err(failure(format!("invalid value for: {name}")));
        }
    }
    Ok(())
}

/// Runs a command; `None` if there is none of this name.
pub(super) async fn run(shared: &Shared, sink: &EventSink, name: &str, message: &Section) -> Option<Section> {
    if let Err(answer) = check_arguments(name, message) {
        return Some(answer);
    }
    Some(match name {
        "version" => report::version(),
        "stats" => stats(shared).await,
        "reload-settings" => match shared.control.reload_settings().await {
            Ok(()) => success(),
            Err(reason) => failure(reason),
        },
        "initiate" => initiate(shared, sink, message).await,
        "terminate" => terminate(shared, sink, message).await,
        "rekey" => rekey(shared, message).await,
        "list-sas" => list_sas(shared, sink, message).await,
        "list-policies" => list_policies(shared, sink, message).await,
        "list-conns" => list_connections(shared, sink, message).await,
        "get-conns" => {
            let configured = shared.store.lock().await;
            let names = configured.connections.iter().map(|definition| definition.connection.name.clone());
            list_of("conns", names.collect())
        }
        "list-certs" => list_certificates(shared, sink, message).await,
        "list-authorities" => list_authorities(shared, sink, message).await,
        "get-authorities" => {
            let configured = shared.store.lock().await;
            list_of("authorities", configured.authorities.iter().map(|authority| authority.name.clone()).collect())
        }
        "load-conn" => load_connection(shared, message).await,
        "unload-conn" => unload_connection(shared, message).await,
        "load-cert" => load_certificate(shared, message).await,
        "load-key" => load_key(shared, message).await,
        "unload-key" => unload_key(shared, message).await,
        "get-keys" => {
            let configured = shared.store.lock().await;
            list_of("keys", configured.credentials.private_key_ids())
        }
        "load-shared" => load_shared(shared, message).await,
        "unload-shared" => unload_shared(shared, message).await,
        "get-shared" => {
            let configured = shared.store.lock().await;
            list_of("keys", configured.credentials.shared_secret_names())
        }
        // There is no cache of certificates that could be flushed.
        "flush-certs" => success(),
        "clear-creds" => {
            shared.store.change_credentials(&shared.control, |configured| configured.credentials.clear()).await;
            success()
        }
        "load-authority" => load_authority(shared, message).await,
        "unload-authority" => unload_authority(shared, message).await,
        "get-pools" => match is_set(message, "leases") {
            Ok(leases) => {
                let only = owned(message, "name");
                let mut pools = shared.control.list_pools().await;
                pools.retain(|pool| only.as_ref().is_none_or(|only| *only == pool.name));
                report::pools(&pools, leases)
            }
            Err(answer) => answer,
        },
        "load-pool" => load_pool(shared, message).await,
        "unload-pool" => match owned(message, "name") {
            Some(name) => {
                outcome(shared.store.unload_pool(&name, &shared.control).await.map_err(|error| error.to_string()))
            }
            None => failure("missing pool name to unload"),
        },
        "get-algorithms" => report::algorithms(),
        "get-counters" => match counted(message) {
            Ok(of) => report::counters(&shared.control.counters(of).await),
            Err(answer) => answer,
        },
        "reset-counters" => match counted(message) {
            Ok(of) => {
                shared.control.reset_counters(of).await;
                success()
            }
            Err(answer) => answer,
        },
        "redirect" => redirect(shared, message).await,
        "install" => match owned(message, "child") {
            Some(child) => outcome(shared.control.install(owned(message, "ike"), child).await),
            None => failure("missing configuration name"),
        },
        "uninstall" => match owned(message, "child") {
            Some(child) => outcome(shared.control.uninstall(owned(message, "ike"), child).await),
            None => failure("missing configuration name"),
        },
        "load-token" => failure("keys on tokens are not served yet"),
        _ => return None,
    })
}

fn success() -> Section {
    let mut answer = report::message();
    answer.push_value("success", "yes");
    answer
}

pub(super) fn failure(reason: impl Into<String>) -> Section {
    let mut reason = reason.into();
    if reason.len() > MAX_REASON {
        let mut end = MAX_REASON;
        while !reason.is_char_boundary(end) {
            end -= 1;
        }
        reason.truncate(end);
        reason.push('…');
    }
    let mut answer = report::message();
    answer.push_value("success", "no");
    answer.push_value("errmsg", reason);
    answer
}

fn outcome(result: Result<(), String>) -> Section {
    result.map_or_else(failure, |()| success())
}

fn list_of(name: &str, items: Vec<String>) -> Section {
    let mut answer = report::message();
    answer.push_list(name, items);
    answer
}

fn owned(message: &Section, name: &str) -> Option<String> {
    message.text(name).filter(|text| !text.is_empty()).map(str::to_owned)
}

/// Reads a number that may be missing.
fn numeric(message: &Section, name: &str) -> Result<Option<u64>, Section> {
    match message.text(name) {
        None | Some("") => Ok(None),
        Some(text) => match text.parse() {
            // 0 stands for "not given", as in charon.
            Ok(0) => Ok(None),
            Ok(number) => Ok(Some(number)),
            Err(_) => Err(failure(format!("invalid value for: {name}"))),
        },
    }
}

fn is_set(message: &Section, name: &str) -> Result<bool, Section> {
    match message.text(name) {
        None => Ok(false),
        Some(text) => values::boolean(text).ok_or_else(|| failure(format!("invalid value for: {name}"))),
    }
}

async fn stats(shared: &Shared) -> Section {
    let (all, half_open) = shared.control.count_sas().await;
    let (started, since) = shared.store.started();
    report::stats(started.elapsed(), since, (all, half_open), &shared.control.count_packets().await)
}

/// Whose counters are meant: `all`, one connection's by `name`, or those of all together.
fn counted(message: &Section) -> Result<Counted, Section> {
    Ok(match (is_set(message, "all")?, owned(message, "name")) {
        (true, _) => Counted::Each,
        (false, Some(name)) => Counted::Connection(name),
        (false, None) => Counted::Total,
    })
}

/// `control-log` for the SAs of some connections.
struct LogFilter {
    events: broadcast::Receiver<std::sync::Arc<Event>>,
    connections: BTreeSet<String>,
    level: i8,
}

impl LogFilter {
    async fn forward(&self, sink: &EventSink, event: &Event) {
        if let Event::Log { group, level, ike_sa: Some(ike_sa), message } = event
            && *level <= self.level
            && self.connections.contains(&ike_sa.1)
        {
            sink.send("control-log", events::log(group, *level, Some(ike_sa), message, false)).await;
        }
    }

    /// Forwards lines until `work` is done, and then those that it left.
    async fn until<T>(mut self, sink: &EventSink, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        loop {
            tokio::select! {
                biased;
                event = self.events.recv() => match event {
                    Ok(event) => self.forward(sink, &event).await,
                    Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => return work.await,
                },
                result = &mut work => {
                    while let Ok(event) = self.events.try_recv() {
                        self.forward(sink, &event).await;
                    }
                    return result;
                }
            }
        }
    }
}

/// How long a command waits.
enum Wait {
    Forever,
    For(Duration),
    /// Answered at once, without `control-log`.
    Not,
}

fn waiting(message: &Section) -> Result<Wait, Section> {
    match message.text("timeout").map(str::parse::<i64>) {
        None | Some(Ok(0)) => Ok(Wait::Forever),
        Some(Ok(milliseconds)) => match u64::try_from(milliseconds) {
            Ok(milliseconds) => Ok(Wait::For(Duration::from_millis(milliseconds))),
            Err(_) => Ok(Wait::Not),
        },
        Some(Err(_)) => Err(failure("invalid value for: timeout")),
    }
}

fn log_level(message: &Section) -> Result<i8, Section> {
    message.text("loglevel").map_or(Ok(1), |text| text.parse().map_err(|_| failure("invalid value for: loglevel")))
}

async fn initiate(shared: &Shared, sink: &EventSink, message: &Section) -> Section {
    match try_initiate(shared, sink, message).await {
        Ok(answer) | Err(answer) => answer,
    }
}

async fn try_initiate(shared: &Shared, sink: &EventSink, message: &Section) -> Result<Section, Section> {
    let (ike, child) = (owned(message, "ike"), owned(message, "child"));
    let (wait, level) = (waiting(message)?, log_level(message)?);
    let (kind, name) = match (&child, &ike) {
        (Some(child), _) => ("CHILD_SA", child.clone()),
        (None, Some(ike)) => ("IKE_SA", ike.clone()),
        (None, None) => return Err(failure("missing configuration name")),
    };
    let found = {
        let configured = shared.store.lock().await;
        match (&child, &ike) {
            (Some(child), ike) => configured.connection_of_child(ike.as_deref(), child),
            (None, ike) => ike.as_deref().and_then(|ike| configured.connection(ike)),
        }
        .map(|definition| definition.connection.name.clone())
    };
    let connection = found.ok_or_else(|| failure(format!("{kind} config '{name}' not found")))?;
    // A child's name need not be unique: charon takes the first, and so do we.
    let events = shared.control.events();
    let control = shared.control.clone();
    let target = Some(connection.clone());
    let work = async move { control.initiate(target, child).await };
    if matches!(wait, Wait::Not) {
        tokio::spawn(work);
        return Ok(success());
    }
    let filter = LogFilter { events, connections: BTreeSet::from([connection]), level };
    // The work goes on when this client goes away or its time is up.
    let work = tokio::spawn(work);
    let finished = async {
        match work.await {
            Ok(result) => result,
            Err(_) => Err(format!("establishing {kind} '{name}' failed")),
        }
    };
    let logged = filter.until(sink, finished);
    match wait {
        Wait::For(limit) => match tokio::time::timeout(limit, logged).await {
            Ok(result) => Ok(outcome(result)),
            Err(_) => Err(failure(format!("{kind} '{name}' not established after {}ms", limit.as_millis()))),
        },
        Wait::Forever | Wait::Not => Ok(outcome(logged.await)),
    }
}

/// Reads the selection of SAs; `None` if there is none.
fn filter(message: &Section) -> Result<Option<SaFilter>, Section> {
    let filter = SaFilter {
        ike: owned(message, "ike"),
        child: owned(message, "child"),
        ike_id: numeric(message, "ike-id")?.map(IkeSaId),
        child_id: numeric(message, "child-id")?.map(ChildSaId),
    };
    let empty = filter.ike.is_none() && filter.child.is_none() && filter.ike_id.is_none() && filter.child_id.is_none();
    Ok((!empty).then_some(filter))
}

async fn terminate(shared: &Shared, sink: &EventSink, message: &Section) -> Section {
    match try_terminate(shared, sink, message).await {
        Ok(answer) | Err(answer) => answer,
    }
}

async fn try_terminate(shared: &Shared, sink: &EventSink, message: &Section) -> Result<Section, Section> {
    let filter = filter(message)?.ok_or_else(|| failure("missing terminate selector"))?;
    let (force, wait, level) = (is_set(message, "force")?, waiting(message)?, log_level(message)?);
    let events = shared.control.events();
    let (mut connections, mut estimate) = (BTreeSet::new(), 0);
    let mut after = Some(IkeSaId(0));
    while let Some(start) = after {
        let page = shared.control.list_sas(filter.clone(), start).await;
        estimate += page.reports.len();
        connections.extend(page.reports.into_iter().map(|report| report.status.connection));
        after = page.next;
    }
    let control = shared.control.clone();
    let work = tokio::spawn(async move { control.terminate(filter, force).await });
    let finished = async { work.await.unwrap_or(Matched { matches: 0, done: 0 }) };
    let matched = match wait {
        // Not waited for: what will be done is what matches now.
        Wait::Not => Matched { matches: estimate, done: estimate },
        Wait::Forever => LogFilter { events, connections, level }.until(sink, finished).await,
        Wait::For(limit) => {
            let logged = LogFilter { events, connections, level }.until(sink, finished);
            let in_time = tokio::time::timeout(limit, logged).await;
            in_time.unwrap_or(Matched { matches: estimate, done: 0 })
        }
    };
    let problem = match matched {
        Matched { matches: 0, .. } => Some("no matching SAs to terminate found"),
        Matched { matches, done } if done >= matches => None,
        Matched { matches: 1, .. } => Some("terminating SA failed"),
        Matched { .. } => Some("not all matching SAs could be terminated"),
    };
    let mut answer = report::message();
    answer.push_value("success", if problem.is_none() { "yes" } else { "no" });
    answer.push_value("matches", matched.matches.to_string());
    answer.push_value("terminated", matched.done.to_string());
    if let Some(problem) = problem {
        answer.push_value("errmsg", problem);
    }
    Ok(answer)
}

async fn rekey(shared: &Shared, message: &Section) -> Section {
    let filter = match filter(message) {
        Ok(Some(filter)) => filter,
        Ok(None) => return failure("missing rekey selector"),
        Err(answer) => return answer,
    };
    let reauth = match is_set(message, "reauth") {
        Ok(reauth) => reauth,
        Err(answer) => return answer,
    };
    let matched = shared.control.rekey(filter, reauth).await;
    let found = matched.matches > 0;
    let mut answer = report::message();
    answer.push_value("success", if found { "yes" } else { "no" });
    answer.push_value("matches", matched.matches.to_string());
    if !found {
        answer.push_value("errmsg", "no matching SAs to rekey found");
    }
    answer
}

async fn redirect(shared: &Shared, message: &Section) -> Section {
    match redirect_selection(message) {
        Ok((filter, gateway)) => {
            let matched = shared.control.redirect(filter, gateway).await;
            let mut answer = report::message();
            answer.push_value("success", if matched.matches > 0 { "yes" } else { "no" });
            answer.push_value("matches", matched.matches.to_string());
            if matched.matches == 0 {
                answer.push_value("errmsg", "no matching SAs to redirect found");
            }
            answer
        }
        Err(answer) => answer,
    }
}

fn redirect_selection(message: &Section) -> Result<(RedirectFilter, Gateway), Section> {
    let gateway = owned(message, "gateway").ok_or_else(|| failure("missing target gateway"))?;
    let gateway = Gateway::parse(&gateway).ok_or_else(|| failure("gateway is neither an IP address nor a FQDN"))?;
    let invalid = |name: &str| failure(format!("invalid value for: {name}"));
    let peer_ip = match owned(message, "peer-ip").as_deref().map(values::address) {
        None | Some(Some(Address::Any)) => None,
        Some(Some(Address::Range(range))) => Some(range),
        Some(Some(Address::Name(_)) | None) => return Err(invalid("peer-ip")),
    };
    let peer_id = owned(message, "peer-id").map(|text| IdentityPattern::parse(&text));
    let peer_id = peer_id.transpose().map_err(|_| invalid("peer-id"))?;
    let ike_id = numeric(message, "ike-id")?.map(IkeSaId);
    let ike = owned(message, "ike");
    if ike.is_none() && ike_id.is_none() && peer_ip.is_none() && peer_id.is_none() {
        return Err(failure("missing redirect selector"));
    }
    Ok((RedirectFilter { ike, ike_id, peer_ip, peer_id }, gateway))
}

async fn list_sas(shared: &Shared, sink: &EventSink, message: &Section) -> Section {
    let filter = match filter(message) {
        Ok(filter) => filter.unwrap_or_default(),
        Err(answer) => return answer,
    };
    let mut after = Some(IkeSaId(0));
    while let Some(start) = after {
        let page = shared.control.list_sas(filter.clone(), start).await;
        for report in &page.reports {
            sink.send("list-sa", report::wrapped(&report.status.connection, report::ike_sa(report))).await;
        }
        after = page.next;
    }
    report::message()
}

/// Traps and shunts.
async fn list_policies(shared: &Shared, sink: &EventSink, message: &Section) -> Section {
    let (ike, child) = (owned(message, "ike"), owned(message, "child"));
    for policy in shared.control.list_policies().await {
        let kind = match policy.kind {
            PolicyKind::Trap(_) => "trap",
            PolicyKind::Shunt(ShuntAction::Pass) => "pass",
            PolicyKind::Shunt(ShuntAction::Drop) => "drop",
        };
        // As in charon, what counts is that the key is there.
        if message.node(kind).is_some()
            && ike.as_ref().is_none_or(|name| *name == policy.ike)
            && child.as_ref().is_none_or(|name| *name == policy.child)
        {
            let name = format!("{}/{}", policy.ike, policy.child);
            sink.send("list-policy", report::wrapped(&name, report::policy(&policy))).await;
        }
    }
    report::message()
}

async fn list_connections(shared: &Shared, sink: &EventSink, message: &Section) -> Section {
    let only = owned(message, "ike");
    // A slow client must not hold the store.
    let connections = shared.store.lock().await.connections.clone();
    for definition in &connections {
        let name = &definition.connection.name;
        if only.as_ref().is_none_or(|only| only == name) {
            sink.send("list-conn", report::wrapped(name, report::connection(definition))).await;
        }
    }
    report::message()
}

async fn list_certificates(shared: &Shared, sink: &EventSink, message: &Section) -> Section {
    let kind = owned(message, "type").unwrap_or_else(|| "any".to_owned()).to_ascii_lowercase();
    let flag = owned(message, "flag").unwrap_or_else(|| "any".to_owned()).to_ascii_lowercase();
    let (kind, flag) = match kind.as_str() {
        "x509" if flag == "any" && message.text("flag").is_none() => ("x509", "any".to_owned()),
        "x509ca" => ("x509", "ca".to_owned()),
        other => (other, flag),
    };
    if !matches!(kind, "any" | "x509" | "x509_crl" | "pubkey") {
        return report::message();
    }
    let subject = owned(message, "subject");
    let mut shown: Vec<Section> = Vec::new();
    {
        let configured = shared.store.lock().await;
        let credentials = configured.all_credentials();
        let issuer = |list: &Crl| list.issuer().map(ToString::to_string).unwrap_or_default();
        if matches!(kind, "any" | "x509_crl") && matches!(flag.as_str(), "any" | "none") {
            let lists = credentials.crls().iter();
            let named = lists.filter(|list| subject.as_ref().is_none_or(|subject| *subject == issuer(list)));
            shown.extend(named.map(|list| report::revocation_list(list.der())));
        }
        let mut all: Vec<(Vec<u8>, bool)> = Vec::new();
        for stored in credentials.stored_certificates() {
            let der = stored.certificate.der();
            if !all.iter().any(|(known, _)| known == der) {
                all.push((der.to_vec(), stored.has_private_key));
            }
        }
        let keys = credentials.private_key_ids();
        for definition in &configured.connections {
            let connection = &definition.connection;
            let named = connection.local_auth.certificates.iter();
            for der in named.chain(&connection.remote.certs).chain(&connection.remote.cacerts) {
                if !all.iter().any(|(known, _)| known == der) {
                    let id = Certificate::parse(der).map(|certificate| certificate.key_id());
                    all.push((der.clone(), id.is_ok_and(|id| keys.contains(&id))));
                }
            }
        }
        for (certificate, has_private_key) in &all {
            let wanted = match flag.as_str() {
                "any" => true,
                "ca" => is_authority(certificate),
                "none" => !is_authority(certificate),
                _ => false,
            };
            let named = subject.as_ref().is_none_or(|subject| *subject == report::subject_text(certificate));
            if wanted && named && matches!(kind, "any" | "x509") {
                shown.push(report::certificate(certificate, *has_private_key));
            }
        }
        if matches!(kind, "any" | "pubkey") && matches!(flag.as_str(), "any" | "none") {
            for (key, name) in public_keys(&configured, &credentials) {
                if subject.as_ref().is_none_or(|subject| *subject == name.to_string()) {
                    shown.push(report::public_key(key, &name, credentials.has_private_key_to(key)));
                }
            }
        }
    }
    for certificate in shown {
        sink.send("list-cert", certificate).await;
    }
    report::message()
}

/// Raw public keys with their subjects: those of connections with the identity there, as charon has it, and what else is
/// loaded under its own name.
fn public_keys<'a>(configured: &'a Configured, credentials: &'a Credentials) -> Vec<(&'a PublicKey, Identity)> {
    let of_connections = configured.connections.iter().flat_map(|definition| {
        let Connection { local_auth, local_id, remote, .. } = &*definition.connection;
        let local = local_auth.public_keys.iter().map(move |key| (key, local_id.as_ref()));
        local.chain(remote.public_keys.iter().map(move |key| (key, remote.remote_id.as_exact())))
    });
    let loaded = credentials.public_keys().iter().map(|key| (&**key, None));
    let mut keys: Vec<(&PublicKey, Identity)> = Vec::new();
    for (key, id) in of_connections.chain(loaded) {
        if !keys.iter().any(|(known, _)| *known == key) {
            keys.push((key, id.cloned().unwrap_or_else(|| key.identity())));
        }
    }
    keys
}

async fn list_authorities(shared: &Shared, sink: &EventSink, message: &Section) -> Section {
    let only = owned(message, "name");
    let authorities = shared.store.lock().await.authorities.clone();
    for authority in authorities.iter().filter(|authority| only.as_ref().is_none_or(|only| *only == authority.name)) {
        let mut section = report::message();
        section.push_value("cacert", report::subject_text(&authority.cacert));
        section.push_list("crl_uris", authority.crl_uris.iter().map(String::as_str));
        section.push_list("ocsp_uris", authority.ocsp_uris.iter().map(String::as_str));
        if let Some(base) = &authority.cert_uri_base {
            section.push_value("cert_uri_base", base.as_str());
        }
        sink.send("list-authority", report::wrapped(&authority.name, section)).await;
    }
    report::message()
}

async fn load_connection(shared: &Shared, message: &Section) -> Section {
    let mut definitions = Vec::new();
    for (name, node) in &message.entries {
        let Node::Section(section) = node else {
            return failure(format!("unknown option: {name}, config discarded"));
        };
        let outcome = connection(name, section, &InlineCertificates);
        for report in &outcome.reports {
            match report.severity {
                Severity::Error => tracing::warn!("{report}"),
                Severity::Warning => tracing::warn!("{report}"),
                Severity::Debug => tracing::debug!("{report}"),
            }
        }
        match outcome.definition {
            Some(definition) => definitions.push(definition),
            None => {
                let first = outcome.reports.iter().find(|report| report.severity == Severity::Error);
                let reason = first.map_or("config discarded", |report| report.message.as_str());
                return failure(reason);
            }
        }
    }
    for definition in definitions {
        shared.store.load_connection(definition, &shared.control).await;
    }
    success()
}

async fn unload_connection(shared: &Shared, message: &Section) -> Section {
    let Some(name) = owned(message, "name") else { return failure("unload: missing connection name") };
    if shared.store.unload_connection(&name, &shared.control).await {
        success()
    } else {
        failure(format!("unload: connection '{name}' not found"))
    }
}

async fn load_certificate(shared: &Shared, message: &Section) -> Section {
    let Some(data) = message.value("data") else { return failure("certificate data missing") };
    let kind = owned(message, "type").unwrap_or_default().to_ascii_lowercase();
    let flag = owned(message, "flag").unwrap_or_else(|| "none".to_owned()).to_ascii_lowercase();
    let add: fn(&mut Credentials, &[u8]) -> Result<(), CredentialError> = match (kind.as_str(), flag.as_str()) {
        ("x509", "none") => Credentials::add_certificate,
        ("x509", "ca") | ("x509ca", _) => Credentials::add_authority,
        ("x509_crl", _) => Credentials::add_crl,
        ("pubkey", _) => Credentials::add_public_key,
        ("", _) => return failure("invalid certificate type ''"),
        (kind, flag) => return failure(format!("certificates of type '{kind}' with flag '{flag}' are not served yet")),
    };
    let load = |configured: &mut Configured| add(&mut configured.credentials, &data.bytes);
    let loaded: Result<(), CredentialError> = shared.store.change_credentials(&shared.control, load).await;
    outcome(loaded.map_err(|error| error.to_string()))
}

async fn load_key(shared: &Shared, message: &Section) -> Section {
    if owned(message, "type").is_none() {
        return failure("invalid key type ''");
    }
    let Some(data) = message.value("data") else { return failure("key data missing") };
    let load = |configured: &mut Configured| configured.credentials.add_private_key(&data.bytes, None);
    let loaded = shared.store.change_credentials(&shared.control, load).await;
    match loaded {
        Ok(id) => {
            let mut answer = success();
            answer.push_value("id", id);
            answer
        }
        Err(reason) => failure(format!("parsing private key failed: {reason}")),
    }
}

async fn unload_key(shared: &Shared, message: &Section) -> Section {
    let Some(id) = owned(message, "id") else { return failure("key id missing") };
    let removed = shared
        .store
        .change_credentials(&shared.control, |configured| configured.credentials.remove_private_key(&id))
        .await;
    if removed { success() } else { failure("key not found") }
}

async fn load_shared(shared: &Shared, message: &Section) -> Section {
    let Some(kind) = owned(message, "type") else { return failure("shared key type missing") };
    let [is_ppk, is_eap, is_ike] = ["ppk", "eap", "ike"].map(|known| kind.eq_ignore_ascii_case(known));
    if !(is_ppk || is_eap || is_ike) {
        return failure(format!("shared keys of type '{kind}' are not served yet"));
    }
    let Some(data) = message.value("data") else { return failure("shared key data missing") };
    // An owner that is not read would make the secret everybody's.
    if let Some((name, _)) = message.entries.iter().find(|(name, node)| {
        !matches!(name.as_str(), "id" | "type" | "data" | "owners") || matches!(node, Node::Section(_))
    }) {
        return failure(format!("invalid value for: {name}"));
    }
    let mut owners = Vec::new();
    for owner in message.list("owners") {
        match owner.text().map(IdentityPattern::parse) {
            Some(Ok(pattern)) => owners.push(pattern),
            Some(Err(error)) => return failure(format!("invalid value for: owners: {error}")),
            None => return failure("invalid value for: owners"),
        }
    }
    let (name, secret) = (owned(message, "id"), Secret::new(data.bytes.clone()));
    let load = |configured: &mut Configured| {
        let credentials = &mut configured.credentials;
        if is_ppk {
            credentials.add_ppk(name, owners, secret)
        } else if is_eap {
            credentials.add_eap_secret(name, owners, secret)
        } else {
            credentials.add_shared_secret(name, owners, secret)
        }
    };
    let loaded = shared.store.change_credentials(&shared.control, load).await;
    outcome(loaded.map_err(|error| error.to_string()))
}

async fn unload_shared(shared: &Shared, message: &Section) -> Section {
    let Some(id) = owned(message, "id") else { return failure("unique identifier missing") };
    let removed = shared
        .store
        .change_credentials(&shared.control, |configured| configured.credentials.remove_shared_secret(&id))
        .await;
    if removed { success() } else { failure("shared key not found") }
}

async fn load_pool(shared: &Shared, message: &Section) -> Section {
    for (name, node) in &message.entries {
        let loaded = match node {
            Node::Section(section) => pool(name, section),
            Node::Value(_) | Node::List(..) => Err(format!("invalid attribute: {name}")),
        };
        let loaded = match loaded {
            Ok(pool) => shared.store.load_pool(pool, &shared.control).await.map_err(|error| error.to_string()),
            Err(reason) => Err(reason),
        };
        if let Err(reason) = loaded {
            return failure(reason);
        }
    }
    success()
}

async fn load_authority(shared: &Shared, message: &Section) -> Section {
    let mut loaded = Vec::new();
    for (name, node) in &message.entries {
        let Node::Section(section) = node else {
            return failure(format!("unknown option: {name}, config discarded"));
        };
        match Authority::read(name, section, &InlineCertificates) {
            Ok(authority) => loaded.push(authority),
            Err(reason) => return failure(reason),
        }
    }
    let load = |configured: &mut Configured| {
        for authority in loaded {
            match configured.authorities.iter_mut().find(|old| old.name == authority.name) {
                Some(old) => *old = authority,
                None => configured.authorities.push(authority),
            }
        }
    };
    shared.store.change_credentials(&shared.control, load).await;
    success()
}

async fn unload_authority(shared: &Shared, message: &Section) -> Section {
    let Some(name) = owned(message, "name") else { return failure("unload: missing authority name") };
    let removed = shared
        .store
        .change_credentials(&shared.control, |configured| {
            let before = configured.authorities.len();
            configured.authorities.retain(|authority| authority.name != name);
            configured.authorities.len() < before
        })
        .await;
    if removed { success() } else { failure(format!("unload: authority '{name}' not found")) }
}
