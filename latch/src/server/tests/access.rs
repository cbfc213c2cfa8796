//! Who may ask for what.

use std::sync::Mutex;

use super::*;
use crate::access::{Grant, Right};
use crate::protocol::Wanted;

/// A house whose clients are who the test says they are.
pub(super) struct Guarded {
    pub(super) house: House,
    access: watch::Sender<Access>,
    next: Arc<Mutex<Credentials>>,
}

impl Guarded {
    pub(super) async fn new() -> Self {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("latch.sock");
        let (access, granted) = watch::channel(Access::default());
        let next = Arc::new(Mutex::new(Credentials::default()));
        let who = Arc::clone(&next);
        let config = ServerConfig {
            access: granted,
            identifier: Identifier::new(move |_| who.lock().unwrap().clone()),
            initiator: Some(Initiator::new(|_, _| Box::pin(async { Err("nobody is asked".to_owned()) }))),
            ..config(&path)
        };
        let database = Arc::new(Database::new());
        let server = serve(config, Arc::clone(&database)).await.unwrap();
        let house = House { server, database, path, directory };
        house.install(1, house.class("peer.example"));
        Self { house, access, next }
    }

    pub(super) async fn client(&self, user: u32, groups: &[u32]) -> Client {
        let groups = groups.iter().copied().collect();
        *self.next.lock().unwrap() = Credentials { user: Some(user), groups, privileged: false };
        Client::connect(&self.house.path).await.unwrap()
    }

    pub(super) fn grant(&self, right: Right, grant: Grant) {
        self.access.send_modify(|access| *access.grant_mut(right) = grant);
    }
}

fn to_group(group: u32) -> Grant {
    Grant { groups: [group].into(), ..Grant::default() }
}

/// The refusal names the setting that would have allowed it.
pub(super) fn denied<T>(result: Result<T, ClientError>, right: Right) {
    match result {
        Err(ClientError::Refused(refusal)) => {
            assert_eq!(refusal.code, Code::Permission, "{refusal}");
            assert!(refusal.message.contains(&format!("latch_access.{right} in strongswan.conf")), "{refusal}");
        }
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("{right} was not needed"),
    }
}

// RFC 5660 §2: what is latched is limited by system policy, and by the caller's privileges.
#[tokio::test]
async fn who_has_no_right_to_latch_to_listen_or_to_initiate_is_told_which_is_missing() {
    let guarded = Guarded::new().await;
    let client = guarded.client(7, &[70]).await;
    let (far, nowhere) = (Far::listen(), "127.0.0.1:0".parse().unwrap());
    let to = far.0.local_addr().unwrap();
    guarded.grant(Right::Latch, to_group(71));
    denied(client.latch_tcp(to, None, "peer.example").await, Right::Latch);
    denied(client.latch_udp(to, None, "peer.example").await, Right::Latch);
    guarded.grant(Right::Listen, Grant { users: [8].into(), ..Grant::default() });
    denied(client.listen_tcp(nowhere, "peer.example").await, Right::Listen);
    assert_eq!(guarded.house.database.list_after(LatchId(0), 1).len(), 0, "nothing is latched");
    // A change holds for connections that there are.
    guarded.grant(Right::Latch, to_group(70));
    guarded.grant(Right::Listen, Grant { users: [7].into(), ..Grant::default() });
    let (stream, _far) = far.latch(&client).await;
    let listener = client.listen_tcp(nowhere, "peer.example").await.unwrap();
    // To take a listener's latch is to listen.
    guarded.grant(Right::Listen, Grant::default());
    let socket = std::net::TcpStream::connect(listener.local_addr()).unwrap();
    denied(listener.accept().await, Right::Listen);
    drop((stream, listener, socket));

    guarded.grant(Right::Initiate, Grant::default());
    let narrow = Wanted { initiate: Initiate::Narrow, ..Wanted::from("peer.example") };
    let far = Far::listen();
    let to = far.0.local_addr().unwrap();
    denied(client.latch_tcp(to, None, narrow.clone()).await, Right::Initiate);
    // An SA that is there may be used.
    let (stream, _far) = far.latch(&client).await;
    drop(stream);
    guarded.house.database.removed(1);
    denied(client.latch_tcp(to, None, "peer.example").await, Right::Initiate);
    let never = Wanted { initiate: Initiate::No, ..Wanted::from("peer.example") };
    assert_eq!(refusal(client.latch_tcp(to, None, never).await), Code::NoSa);
    guarded.grant(Right::Initiate, to_group(70));
    let asked = client.latch_tcp(to, None, narrow).await.err().unwrap().to_string();
    assert!(asked.contains("nobody is asked"), "{asked}");
}

/// A five-tuple that is claimed by text proves nothing: who is at the other end of another user's connection is for whom may see.
#[tokio::test]
async fn nobody_sees_the_connections_of_others_without_the_right() {
    let guarded = Guarded::new().await;
    let (owner, stranger) = (guarded.client(7, &[70]).await, guarded.client(8, &[80]).await);
    let nobody = {
        *guarded.next.lock().unwrap() = Credentials::default();
        Client::connect(&guarded.house.path).await.unwrap()
    };
    let mut events = stranger.watch().await.unwrap();
    let mut own_events = owner.watch().await.unwrap();
    let (stream, far) = Far::listen().latch(&owner).await;
    let listener = owner.listen_tcp("127.0.0.1:0".parse().unwrap(), "peer.example").await.unwrap();
    let (local, remote, latch) = (stream.local_addr(), stream.peer_addr(), stream.latch());
    for other in [&stranger, &nobody] {
        assert_eq!(other.list().await.unwrap(), []);
        denied(other.show(latch).await, Right::See);
        denied(other.show(999).await, Right::See);
        denied(other.whois(local, remote).await, Right::See);
        // No latch, but an SA: whose it is is nobody's business either.
        denied(other.whois(local, "127.0.0.1:9".parse().unwrap()).await, Right::See);
        denied(other.break_latch(latch).await, Right::Manage);
        denied(other.close_latch(latch).await, Right::Manage);
    }
    // The holder of a socket may ask about it, whoever latched it, and another program of the same user sees what is its own.
    assert_eq!(stranger.whois_socket(far.as_fd()).await.unwrap().peer.unwrap().id.text, "peer.example");
    let again = guarded.client(7, &[]).await;
    assert_eq!(
        again.list().await.unwrap().iter().map(|latch| latch.latch).collect::<Vec<_>>(),
        [latch, listener.latch()]
    );
    assert_eq!(again.show(latch).await.unwrap().peer.unwrap().id.text, "peer.example");
    assert_eq!(again.whois(local, remote).await.unwrap().latch.unwrap().number, latch);
    denied(again.whois(local, "127.0.0.1:9".parse().unwrap()).await, Right::See);
    denied(again.break_latch(latch).await, Right::Manage);

    // What a listener latches is its user's.
    let far_of_listener = std::net::TcpStream::connect(listener.local_addr()).unwrap();
    let near = far_of_listener.local_addr().unwrap();
    let flow = flow(TCP, listener.local_addr(), near);
    let class = guarded.house.class("peer.example");
    assert_eq!(guarded.house.database.check(Direction::Inbound, &flow, Some(class)), Verdict::Pass);
    let spawned = again.list().await.unwrap().pop().unwrap();
    assert_eq!(spawned.remote, Some(near));
    assert_eq!(stranger.list().await.unwrap(), []);
    let mut told = Vec::new();
    while told.len() < 2 {
        told.push(timeout(PATIENCE, own_events.next()).await.unwrap().unwrap().latch);
    }
    assert_eq!(told, [latch, spawned.latch]);

    guarded.grant(Right::See, to_group(80));
    assert_eq!(stranger.list().await.unwrap().len(), 3);
    assert_eq!(stranger.show(latch).await.unwrap().peer.unwrap().id.text, "peer.example");
    assert_eq!(stranger.whois(local, remote).await.unwrap().peer.unwrap().id.text, "peer.example");
    denied(stranger.close_latch(latch).await, Right::Manage);
    guarded.grant(Right::Manage, to_group(80));
    stranger.close_latch(latch).await.unwrap();
    // Its watcher has heard of nothing but what came after.
    let first = timeout(PATIENCE, events.next()).await.unwrap().unwrap();
    assert_eq!((first.latch, first.state, first.missed), (latch, State::Closed, 0));
}

/// The system says who connects: this process, whose user is the daemon's.
#[tokio::test]
async fn the_system_tells_who_connects() {
    let (near, _far) = std::os::unix::net::UnixStream::pair().unwrap();
    let Identifier(identify) = Identifier::of_system(|_| Ok(vec![70, 71]));
    let who = identify(near.as_fd());
    assert_eq!(who.user, Some(rustix::process::getuid().as_raw()));
    let own = rustix::process::getgid().as_raw();
    assert_eq!((who.groups, who.privileged), ([70, 71, own].into(), true));
    let Identifier(identify) = Identifier::of_system(|_| Err(io::Error::other("too old")));
    assert_eq!(identify(near.as_fd()).groups, [own].into());
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    assert!(!identify(udp.as_fd()).privileged, "no client");
}
