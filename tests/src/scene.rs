//! The scene that most tests share: two hosts on one link, each with a protected network behind it.

use crate::daemon::{Daemon, Files, Kind};
use crate::host::{Host, link};
use crate::pki::{Authority, Credential};

/// Outer and inner addresses of the two hosts.
pub const A: &str = "192.0.2.1";
/// The responder's outer address.
pub const B: &str = "192.0.2.2";
/// The initiator's inner address.
pub const INNER_A: &str = "10.1.0.1";
/// The responder's inner address.
pub const INNER_B: &str = "10.2.0.1";

/// How both ends authenticate.
#[derive(Clone, Copy)]
pub enum Auth {
    /// One shared key.
    Psk,
    /// Certificates of one CA with keys of this algorithm.
    Certificates(&'static rcgen::SignatureAlgorithm),
    /// Raw public keys of this algorithm (RFC 7670).
    RawKeys(&'static rcgen::SignatureAlgorithm),
}

/// What is negotiated.
#[derive(Clone, Copy)]
pub struct Suite {
    /// `proposals`.
    pub ike: &'static str,
    /// `esp_proposals`.
    pub esp: &'static str,
    /// How.
    pub auth: Auth,
    /// Additional settings of the connection.
    pub connection: &'static str,
    /// Additional settings of the child.
    pub child: &'static str,
}

impl Suite {
    /// What most tests take.
    pub const DEFAULT: Self =
        Self { ike: "aes256gcm16-prfsha384-x25519", esp: "aes128gcm16", auth: Auth::Psk, connection: "", child: "" };
}

impl Default for Suite {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// Two hosts on one link.
pub fn hosts() -> (Host, Host) {
    let (a, b) = (Host::new(), Host::new());
    link(&a, &format!("{A}/24"), &b, &format!("{B}/24"));
    a.add_inner("10.1.0.1/24");
    b.add_inner("10.2.0.1/24");
    (a, b)
}

/// What one end authenticates with, and knows its peer by.
struct Credentials {
    /// `auth`.
    auth: &'static str,
    /// More settings of `local`.
    local: &'static str,
    /// More settings of `remote`.
    remote: &'static str,
    files: Files,
}

/// Both ends' credentials, and the `secrets` of both.
fn credentials(auth: Auth) -> ([Credentials; 2], &'static str) {
    match auth {
        Auth::Psk => {
            let psk = || Credentials { auth: "psk", local: "", remote: "", files: Files::new() };
            ([psk(), psk()], "secrets {\nike-1 {\nsecret = \"a shared key for tests\"\n}\n}\n")
        }
        Auth::Certificates(algorithm) => {
            let authority = Authority::new("test CA", algorithm);
            let of = |name| {
                let Credential { certificate, key } = authority.issue(name, algorithm);
                let files = vec![
                    ("x509/cert.pem".into(), certificate),
                    ("x509ca/ca.pem".into(), authority.certificate()),
                    ("private/key.pem".into(), key),
                ];
                Credentials { auth: "pubkey", local: "certs = cert.pem\n", remote: "", files }
            };
            (["a.example", "b.example"].map(of), "")
        }
        Auth::RawKeys(algorithm) => {
            let [a, b] = [(); 2].map(|()| rcgen::KeyPair::generate_for(algorithm).unwrap());
            let of = |own: &rcgen::KeyPair, peer: &rcgen::KeyPair| {
                let files = vec![
                    ("pubkey/own.pem".into(), own.public_key_pem().into_bytes()),
                    ("pubkey/peer.pem".into(), peer.public_key_pem().into_bytes()),
                    ("private/key.pem".into(), own.serialize_pem().into_bytes()),
                ];
                Credentials { auth: "pubkey", local: "pubkeys = own.pem\n", remote: "pubkeys = peer.pem\n", files }
            };
            ([of(&a, &b), of(&b, &a)], "")
        }
    }
}

/// Both ends' configurations and files, initiator first.
pub fn configurations(suite: &Suite) -> [(String, Files); 2] {
    let (credentials, secrets) = credentials(suite.auth);
    let end = |local: (&str, &str, &str), remote: (&str, &str, &str), credentials: Credentials| {
        let Credentials { auth, local: more_local, remote: more_remote, files } = credentials;
        let configuration = format!(
            "connections {{\nsite {{\nlocal_addrs = {}\nremote_addrs = {}\nproposals = {}\nversion = 2\n{}\n\
             local {{\nauth = {auth}\nid = {}\n{more_local}}}\nremote {{\nauth = {auth}\nid = {}\n{more_remote}}}\n\
             children {{\nnet {{\nlocal_ts = {}\nremote_ts = {}\nesp_proposals = {}\n{}\n}}\n}}\n}}\n}}\n{secrets}",
            local.0,
            remote.0,
            suite.ike,
            suite.connection,
            local.1,
            remote.1,
            local.2,
            remote.2,
            suite.esp,
            suite.child
        );
        (configuration, files)
    };
    let a = (A, "a.example", "10.1.0.0/24");
    let b = (B, "b.example", "10.2.0.0/24");
    let [of_a, of_b] = credentials;
    [end(a, b, of_a), end(b, a, of_b)]
}

/// Two hosts with daemons and loaded configurations.
pub struct Scene {
    // Daemons stop before their hosts go: fields drop in order.
    /// The initiator's daemon.
    pub a: Daemon,
    /// The responder's daemon.
    pub b: Daemon,
    /// The initiator.
    pub host_a: Host,
    /// The responder.
    pub host_b: Host,
}

impl Scene {
    /// Starts both.
    pub fn start(initiator: Kind, responder: Kind, suite: &Suite) -> Self {
        let (host_a, host_b) = hosts();
        let [(of_a, files_a), (of_b, files_b)] = configurations(suite);
        let b = Daemon::start(responder, &host_b, &of_b, &files_b);
        let a = Daemon::start(initiator, &host_a, &of_a, &files_a);
        Self { a, b, host_a, host_b }
    }

    /// Brings the tunnel up and sends packets through it, both ways.
    pub fn works(initiator: Kind, responder: Kind, suite: &Suite) -> Self {
        let scene = Self::start(initiator, responder, suite);
        scene.a.initiate("net");
        scene.passes();
        scene
    }

    /// Real packets pass both ways.
    pub fn passes(&self) {
        assert!(self.host_a.pings(INNER_A, INNER_B), "no ping from A to B\n{}{}", self.a.output(), self.b.output());
        assert!(self.host_b.pings(INNER_B, INNER_A), "no ping from B to A\n{}{}", self.a.output(), self.b.output());
    }
}
