//! `updown`: the script that a Child SA's configuration names, told what comes up and goes down as charon tells it.

use std::net::IpAddr;
use std::process::Stdio;
use std::time::Duration;

use ike::engine::{ChildReady, IkeSaId};
use ipsec::plane::Encapsulation;
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
    pairs: Vec<(&'static str, Vec<(&'static str, String)>)>,
}

impl Updown {
    /// For a Child SA that is about to be installed; `None` without a script.
    pub(super) fn new(ready: &ChildReady, reqid: u32, device: &str) -> Option<Self> {
        let script = ready.config.updown.clone()?;
        let pair = &ready.pair;
        let common = common(ready, reqid, device);
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

fn common(ready: &ChildReady, reqid: u32, device: &str) -> Vec<(&'static str, String)> {
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
    if let Encapsulation::Udp { remote, .. } = encapsulation {
        common.push(("PLUTO_UDP_ENC", remote.port().to_string()));
    }
    common
}

fn side(selector: &TrafficSelector, names: [&'static str; 3]) -> Vec<(&'static str, String)> {
    let [client, port, protocol] = names;
    // A range that is no network is told by its first network, as charon does.
    let network = selector.networks().into_iter().next();
    let network = network.map_or_else(|| selector.start.to_string(), |(start, bits)| format!("{start}/{bits}"));
    vec![
        (client, network),
        (port, if selector.is_any_port() { 0 } else { selector.start_port }.to_string()),
        (protocol, selector.protocol.to_string()),
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

async fn run(script: &str, verb: &str, environment: &[(&'static str, String)]) {
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
