//! TLS for streams that we open (RFC 9329 Appendix A), by the connections' own authorities, and for ports that accept them.

use std::collections::BTreeMap;

use anyhow::Context as _;
use espintcp::tls::{TlsClient, TlsError, TlsServer};
use ike::engine::TlsPeer;
use pad::Credentials;

use crate::config::daemon::DaemonConfig;

/// Servers whose sessions are kept.
const MOST: usize = 64;

/// What was made for servers before, so that a later stream resumes their sessions.
#[derive(Default)]
pub(super) struct TlsClients {
    known: BTreeMap<TlsPeer, TlsClient>,
}

impl TlsClients {
    /// For this server, by its authorities or else by all that are loaded.
    pub(super) fn client(&mut self, peer: &TlsPeer, credentials: &Credentials) -> Result<TlsClient, TlsError> {
        if let Some(known) = self.known.get(peer) {
            return Ok(known.clone());
        }
        let stored = credentials.stored_certificates();
        let anchors: Vec<&[u8]> = if peer.cacerts.is_empty() {
            stored.iter().filter(|stored| stored.is_trust_anchor).map(|stored| stored.certificate.der()).collect()
        } else {
            peer.cacerts.iter().map(Vec::as_slice).collect()
        };
        let client = TlsClient::new(anchors, &peer.name)?;
        if self.known.len() >= MOST {
            self.known.clear();
        }
        self.known.insert(peer.clone(), client.clone());
        Ok(client)
    }

    /// Authorities have changed.
    pub(super) fn forget(&mut self) {
        self.known.clear();
    }
}

/// What `tls_ports` serve.
pub(super) fn server(config: &DaemonConfig) -> anyhow::Result<TlsServer> {
    let read = |name: &str, path: &Option<std::path::PathBuf>| {
        let path = path.as_ref().with_context(|| format!("tls_ports needs {name}"))?;
        std::fs::read(path).with_context(|| format!("reading {name} {}", path.display()))
    };
    let (chain, key) =
        (read("tls_cert", &config.tls_cert)?, zeroize::Zeroizing::new(read("tls_key", &config.tls_key)?));
    TlsServer::new(&chain, &key, config.tls_web).context("setting up TLS")
}
