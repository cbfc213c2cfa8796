//! RFC 9329 Appendix A: streams in TLS, and what comes there that is none.

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::HandshakeKind;
use tokio_rustls::rustls::pki_types::ServerName;

use super::*;
use crate::tls::TlsError;

const LONG: Duration = Duration::from_secs(20);

/// An authority (DER), and a certificate and key of it for this name (PEM).
fn certified(name: &str) -> (Vec<u8>, String, String) {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca_key = KeyPair::generate().unwrap();
    let ca = params.self_signed(&ca_key).unwrap();
    let key = KeyPair::generate().unwrap();
    let issuer = Issuer::new(params, ca_key);
    let certificate = CertificateParams::new(vec![name.to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
    (ca.der().to_vec(), certificate.pem(), key.serialize_pem())
}

struct Host {
    streams: Streams,
    events: mpsc::Receiver<StreamEvent>,
}

impl Host {
    fn new(limits: StreamLimits) -> Self {
        let (streams, events) = Streams::new(limits, None, Arc::new(|_, _, _, _| EspWorth::default()));
        Self { streams, events }
    }

    async fn server(limits: StreamLimits, chain: &str, key: &str, web: Option<SocketAddr>) -> (Self, SocketAddr) {
        let host = Self::new(limits);
        let tls = TlsServer::new(chain.as_bytes(), key.as_bytes(), web).unwrap();
        let address = host.streams.listen_tls("127.0.0.1:0".parse().unwrap(), tls).await.unwrap();
        (host, address)
    }

    async fn next(&mut self) -> StreamEvent {
        timeout(LONG, self.events.recv()).await.expect("an event in time").expect("an open channel")
    }

    async fn opened(&mut self) -> (u64, EspSender) {
        match self.next().await {
            StreamEvent::Opened { stream, esp, .. } => (stream, esp),
            other => panic!("not opened: {other:?}"),
        }
    }

    async fn ike(&mut self) -> Vec<u8> {
        match self.next().await {
            StreamEvent::Ike { bytes, .. } => bytes,
            other => panic!("no IKE message: {other:?}"),
        }
    }

    async fn closed(&mut self) -> String {
        match self.next().await {
            StreamEvent::Closed { reason, .. } => reason,
            other => panic!("not closed: {other:?}"),
        }
    }
}

fn client(authority: &[u8], name: &str) -> TlsClient {
    TlsClient::new([authority], name).unwrap()
}

fn any_local() -> SocketAddr {
    "0.0.0.0:0".parse().unwrap()
}

// RFC 9329 §4, A: the prefix is inside, and all else as without; B.2: closing.
#[tokio::test]
async fn two_hosts_talk_in_tls() {
    let (authority, chain, key) = certified("vpn.example");
    let (mut server, address) = Host::server(StreamLimits::default(), &chain, &key, None).await;
    let mut host = Host::new(StreamLimits::default());
    let tls = client(&authority, "vpn.example");
    for number in 1..=2 {
        host.streams.open_tls(number, any_local(), address, tls.clone());
        assert!(host.streams.send_ike(number, b"hello"));
        host.opened().await;
        let (stream, esp) = server.opened().await;
        assert_eq!(server.ike().await, b"hello");
        let long = vec![7; 60_000];
        for _ in 0..20 {
            assert!(esp.send(0, &[1; 1400]));
            assert!(server.streams.send_ike(stream, &long));
            assert_eq!(host.ike().await, long);
        }
        host.streams.close(number);
        assert_eq!(server.closed().await, "the peer closed it");
        assert_eq!(host.closed().await, "closed by this side");
    }
}

// RFC 9329 Appendix A, B.3: a stream that takes the place of another resumes its session, however many others came
// meanwhile; who does not know it begins anew.
#[tokio::test]
async fn a_later_stream_resumes_the_session() {
    let (authority, chain, key) = certified("vpn.example");
    let (mut server, address) = Host::server(StreamLimits::default(), &chain, &key, None).await;
    let mut host = Host::new(StreamLimits::default());
    let tls = client(&authority, "vpn.example");
    host.streams.open_tls(1, any_local(), address, tls.clone());
    assert!(host.streams.send_ike(1, b"hello"));
    host.opened().await;
    let (stream, _) = server.opened().await;
    server.ike().await;
    // What the server says after the handshake has come when this has.
    assert!(server.streams.send_ike(stream, b"welcome"));
    assert_eq!(host.ike().await, b"welcome");
    let kind = async |tls: &TlsClient| visit(&tls.connector, address).await.get_ref().1.handshake_kind();
    for _ in 0..300 {
        assert_eq!(kind(&client(&authority, "vpn.example")).await, Some(HandshakeKind::Full));
    }
    assert_eq!(kind(&tls).await, Some(HandshakeKind::Resumed));
}

// By the peer's own PKI: another authority's certificate, or one for another name, is none.
#[tokio::test]
async fn a_server_that_proves_nothing_gets_nothing() {
    let (authority, chain, key) = certified("vpn.example");
    let (_server, address) = Host::server(StreamLimits::default(), &chain, &key, None).await;
    let (other, ..) = certified("vpn.example");
    let mut host = Host::new(StreamLimits::default());
    for (number, tls) in [(1, client(&other, "vpn.example")), (2, client(&authority, "other.example"))] {
        host.streams.open_tls(number, any_local(), address, tls);
        let reason = host.closed().await;
        assert!(reason.contains("certificate"), "{reason}");
    }
    // A server without TLS.
    let plain = Host::new(StreamLimits::default());
    let address = plain.streams.listen("127.0.0.1:0".parse().unwrap()).await.unwrap();
    host.streams.open_tls(3, any_local(), address, client(&authority, "vpn.example"));
    assert!(host.closed().await.starts_with("connect: "));
}

#[test]
fn names_and_authorities_are_checked_before() {
    let (authority, chain, key) = certified("vpn.example");
    assert!(matches!(TlsClient::new([], "vpn.example"), Err(TlsError::NoAuthority)));
    assert!(matches!(TlsClient::new([&authority[..]], "a b"), Err(TlsError::Name(_))));
    assert!(TlsClient::new([&authority[..20]], "vpn.example").is_err());
    assert!(TlsClient::new([&authority[..]], "192.0.2.1").is_ok());
    assert!(TlsServer::new(b"", key.as_bytes(), None).is_err());
    assert!(TlsServer::new(chain.as_bytes(), chain.as_bytes(), None).is_err());
    let (_, _, other) = certified("vpn.example");
    assert!(TlsServer::new(chain.as_bytes(), other.as_bytes(), None).is_err());
}

// A probe finds a web site: with another protocol, with half a prefix, and with nothing to say.
#[tokio::test]
async fn whoever_is_none_of_ours_gets_the_web_server() {
    let web = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let web_address = web.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut visitor, _) = web.accept().await.unwrap();
            tokio::spawn(async move {
                let mut asked = [0; 4];
                visitor.read_exact(&mut asked).await.unwrap();
                visitor.write_all(b"HTTP/1.1 200 OK\r\n\r\nsaid ").await.unwrap();
                visitor.write_all(&asked).await.unwrap();
                visitor.shutdown().await.unwrap();
                let _ = visitor.read_to_end(&mut Vec::new()).await;
            });
        }
    });
    let (authority, chain, key) = certified("vpn.example");
    let limits = StreamLimits { first_message: Duration::from_millis(700), ..StreamLimits::default() };
    let (mut server, address) = Host::server(limits, &chain, &key, Some(web_address)).await;
    let TlsClient { connector, .. } = client(&authority, "vpn.example");
    for (first, later) in [(&b"GET / HTTP/1.1\r\n\r\n"[..], &b""[..]), (b"IKEv", b""), (b"IKE", b"!"), (b"", b"HEAD")] {
        let mut visitor = visit(&connector, address).await;
        visitor.write_all(first).await.unwrap();
        visitor.flush().await.unwrap();
        if !later.is_empty() {
            sleep(Duration::from_secs(1)).await;
            visitor.write_all(later).await.unwrap();
            visitor.flush().await.unwrap();
        }
        let mut answer = Vec::new();
        timeout(LONG, visitor.read_to_end(&mut answer)).await.unwrap().unwrap();
        let said: Vec<u8> = first.iter().chain(later).take(4).copied().collect();
        assert_eq!(answer, [b"HTTP/1.1 200 OK\r\n\r\nsaid ", &said[..]].concat());
    }
    assert!(server.events.try_recv().is_err(), "the daemon hears of none of them");
    // Without TLS there is nothing at all.
    let mut plain = TcpStream::connect(address).await.unwrap();
    plain.write_all(b"IKETCP").await.unwrap();
    let mut answer = Vec::new();
    let _ = timeout(LONG, plain.read_to_end(&mut answer)).await.unwrap();
    assert_eq!(server.streams.unvouched_streams(), 0);

    // Ours are served beside.
    let host = Host::new(StreamLimits::default());
    host.streams.open_tls(1, any_local(), address, client(&authority, "vpn.example"));
    host.streams.send_ike(1, b"hello");
    server.opened().await;
    assert_eq!(server.ike().await, b"hello");
}

async fn visit(connector: &TlsConnector, address: SocketAddr) -> tokio_rustls::client::TlsStream<TcpStream> {
    let socket = TcpStream::connect(address).await.unwrap();
    connector.connect(ServerName::try_from("vpn.example").unwrap(), socket).await.unwrap()
}

// RFC 9329 §10: no TLS, half a TLS, or TLS and no word: all of them end with the first message's timer.
#[tokio::test]
async fn silence_before_and_in_tls_is_bounded() {
    let (authority, chain, key) = certified("vpn.example");
    let limits = StreamLimits { first_message: Duration::from_millis(300), ..StreamLimits::default() };
    let (server, address) = Host::server(limits, &chain, &key, None).await;
    let mut silent = TcpStream::connect(address).await.unwrap();
    let mut half = TcpStream::connect(address).await.unwrap();
    half.write_all(&[0x16, 3, 1, 1, 0, 1, 0]).await.unwrap();
    let TlsClient { connector, .. } = client(&authority, "vpn.example");
    let mut wordless = visit(&connector, address).await;
    let mut octets = Vec::new();
    let _ = timeout(LONG, silent.read_to_end(&mut octets)).await.unwrap();
    let _ = timeout(LONG, half.read_to_end(&mut octets)).await.unwrap();
    let _ = timeout(LONG, wordless.read_to_end(&mut octets)).await.unwrap();
    let mut live = server.streams.inner.live.subscribe();
    timeout(LONG, live.wait_for(|count| *count == 0)).await.expect("no stream left").unwrap();
    assert_eq!(server.streams.unvouched_streams(), 0);
}
