//! `updown`: the script that a Child SA's configuration names, told what comes up and goes down as charon tells it.

use std::net::IpAddr;
use std::process::Stdio;
use std::time::Duration;

use ike::engine::{Assigned, ChildReady, IkeSaId};
use ipsec::plane::{Encapsulation, Tags};
use ipsec::selector::TrafficSelector;
use tokio::process::Command;
use tokio::sync::mpsc;

/// How long a script may take; the next one waits for it.
const PATIENCE: Duration = Duration::from_secs(30);

/// Scripts that may wait for their turn.
const QUEUE: usize = 1024;

/// What a Child SA's script is told, except whether it comes or goes.
#[derive(Clone)]
pub(super) struct Updown {
    script: String,
    /// One environment for each pair of selectors, and the verb's ending that goes with it.
    pairs: Vec<(&'static str, Vec<(String, String)>)>,
}

impl Updown {
    /// For a Child SA that is about to be installed; `None` without a script.
    pub(super) fn new(ready: &ChildReady, reqid: u32, device: &str, assigned: Option<&Assigned>) -> Option<Self> {
        let script = ready.config.updown.clone()?;
        let pair = &ready.pair;
        let mut common = common(ready, reqid, device);
        if let Some(assigned) = assigned {
            common.extend(configuration(assigned));
        }
        let mut pairs = Vec::new();
        for local in &pair.local_ts {
            for remote in pair.remote_ts.iter().filter(|remote| remote.start.is_ipv4() == local.start.is_ipv4()) {
                let mut environment = common.clone();
                environment.extend(side(local, ["PLUTO_MY_CLIENT", "PLUTO_MY_PORT", "PLUTO_MY_PROTOCOL"]));
                environment.extend(side(remote, ["PLUTO_PEER_CLIENT", "PLUTO_PEER_PORT", "PLUTO_PEER_PROTOCOL"]));
                pairs.push((ending(local, pair.encapsulation.local()), environment));
            }
        }
        Some(Self { script, pairs })
    }
}

fn common(ready: &ChildReady, reqid: u32, device: &str) -> Vec<(String, String)> {
    let IkeSaId(unique) = ready.ike_sa;
    let encapsulation = &ready.pair.encapsulation;
    let mut common = vec![
        ("PLUTO_VERSION", "1.1".to_owned()),
        ("PLUTO_CONNECTION", ready.config.name.clone()),
        ("PLUTO_INTERFACE", device.to_owned()),
        ("PLUTO_REQID", reqid.to_string()),
        ("PLUTO_PROTO", "esp".to_owned()),
        ("PLUTO_UNIQUEID", unique.to_string()),
        ("PLUTO_ME", encapsulation.local().to_string()),
        ("PLUTO_MY_ID", ready.peer.local_id.to_string()),
        ("PLUTO_PEER", encapsulation.remote().to_string()),
        ("PLUTO_PEER_ID", ready.peer.id.to_string()),
    ];
    if ready.peer.id != *ready.peer.ike_id() {
        common.push(("PLUTO_XAUTH_ID", ready.peer.id.to_string()));
    }
    let Tags { mark_in, mark_out, if_id_in, if_id_out } = ready.pair.options.tags();
    for (name, mark) in [("PLUTO_MARK_IN", mark_in), ("PLUTO_MARK_OUT", mark_out)] {
        if mark.value != 0 {
            common.push((name, format!("{}/{:#010x}", mark.value, mark.mask)));
        }
    }
    for (name, if_id) in [("PLUTO_IF_ID_IN", if_id_in), ("PLUTO_IF_ID_OUT", if_id_out)] {
        if if_id != 0 {
            common.push((name, if_id.to_string()));
        }
    }
    if let Encapsulation::Udp { remote, .. } = encapsulation {
        common.push(("PLUTO_UDP_ENC", remote.port().to_string()));
    }
    common.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

/// What Configuration payloads gave: charon's variables, and ours for domains and networks.
fn configuration(assigned: &Assigned) -> Vec<(String, String)> {
    let mut variables = Vec::new();
    for (side, addresses) in [("MY", &assigned.local), ("PEER", &assigned.remote)] {
        if let Some(first) = addresses.first() {
            variables.push((format!("PLUTO_{side}_SOURCEIP"), first.to_string()));
        }
        by_family(&mut variables, &format!("PLUTO_{side}_SOURCEIP"), addresses);
    }
    by_family(&mut variables, "PLUTO_DNS", &assigned.dns);
    let domains = assigned.domains.iter().map(|domain| domain.name.clone());
    let subnets = assigned.subnets.iter().map(|(address, prefix)| format!("{address}/{prefix}"));
    let numbered = |name: &'static str| move |(at, value)| (format!("{name}_{}", at + 1), value);
    variables.extend(domains.enumerate().map(numbered("PLUTO_DNS_DOMAIN")));
    variables.extend(subnets.enumerate().map(numbered("PLUTO_PEER_SUBNET")));
    for (at, domain) in assigned.domains.iter().enumerate() {
        let anchors = domain.anchors.iter().map(|anchor| {
            let digest = data_encoding::HEXUPPER.encode(&anchor.digest);
            format!("{} {} {} {digest}", anchor.key_tag, anchor.algorithm, anchor.digest_type)
        });
        let name = format!("PLUTO_DNSSEC_TA_{}", at + 1);
        variables.extend(anchors.enumerate().map(|(at, anchor)| (format!("{name}_{}", at + 1), anchor)));
    }
    variables
}

/// `NAME4_1`, `NAME6_1` and so on.
fn by_family(variables: &mut Vec<(String, String)>, name: &str, addresses: &[IpAddr]) {
    for (family, ipv4) in [(4, true), (6, false)] {
        let of_family = addresses.iter().filter(|address| address.is_ipv4() == ipv4);
        let numbered = |(at, address): (usize, &IpAddr)| (format!("{name}{family}_{}", at + 1), address.to_string());
        variables.extend(of_family.enumerate().map(numbered));
    }
}

fn side(selector: &TrafficSelector, names: [&str; 3]) -> Vec<(String, String)> {
    let [client, port, protocol] = names;
    // A range that is no network is told by its first network, as charon does.
    let network = selector.networks().into_iter().next();
    let network = network.map_or_else(|| selector.start.to_string(), |(start, bits)| format!("{start}/{bits}"));
    vec![
        (client.to_owned(), network),
        (port.to_owned(), if selector.is_any_port() { 0 } else { selector.start_port }.to_string()),
        (protocol.to_owned(), selector.protocol.to_string()),
    ]
}

fn ending(local: &TrafficSelector, address: IpAddr) -> &'static str {
    match (local.start == local.end && local.start == address, local.start.is_ipv4()) {
        (true, true) => "host",
        (true, false) => "host-v6",
        (false, true) => "client",
        (false, false) => "client-v6",
    }
}

/// Runs scripts one after the other, so that "down" never overtakes "up".
pub(super) struct Scripts {
    queue: mpsc::Sender<(&'static str, Updown)>,
}

impl Scripts {
    pub(super) fn new() -> Self {
        let (queue, mut waiting) = mpsc::channel::<(&'static str, Updown)>(QUEUE);
        tokio::spawn(async move {
            while let Some((verb, updown)) = waiting.recv().await {
                for (ending, environment) in &updown.pairs {
                    run(&updown.script, &format!("{verb}-{ending}"), environment).await;
                }
            }
        });
        Self { queue }
    }

    /// Tells that a Child SA comes (`up`) or goes (`down`).
    pub(super) fn tell(&self, verb: &'static str, updown: Updown) {
        if self.queue.try_send((verb, updown)).is_err() {
            tracing::error!(verb, "too many updown scripts wait: one is left out");
        }
    }
}

async fn run(script: &str, verb: &str, environment: &[(String, String)]) {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", script]).env("PLUTO_VERB", verb).stdin(Stdio::null()).kill_on_drop(true);
    command.envs(environment.iter().map(|(name, value)| (name, value)));
    match tokio::time::timeout(PATIENCE, command.output()).await {
        Ok(Ok(output)) => {
            for line in
                String::from_utf8_lossy(&output.stdout).lines().chain(String::from_utf8_lossy(&output.stderr).lines())
            {
                tracing::info!(script, verb, "updown: {line}");
            }
            if !output.status.success() {
                tracing::warn!(script, verb, status = %output.status, "the updown script failed");
            }
        }
        Ok(Err(error)) => tracing::warn!(script, verb, %error, "the updown script cannot be run"),
        Err(_) => tracing::warn!(script, verb, limit = ?PATIENCE, "the updown script takes too long and was ended"),
    }
}
