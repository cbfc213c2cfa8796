//! Daemons that take their time, and daemons that say nothing any more.

use std::thread;

use super::*;
use crate::blocking;
use crate::client::Client;

/// A server that takes longer to make an SA than a silent daemon is waited for.
async fn slow() -> House {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("latch.sock");
    let database = Arc::new(Database::new());
    let initiator = Initiator::new({
        let database = Arc::clone(&database);
        move |_, _| {
            let database = Arc::clone(&database);
            Box::pin(async move {
                sleep(crate::session::SILENCE * 2).await;
                let class = database.intern(class("peer.example", Proof::PreSharedKey));
                database.installed(1, class, loopback(), loopback()).unwrap();
                Ok(())
            })
        }
    });
    let server =
        serve(ServerConfig { initiator: Some(initiator), ..config(&path) }, Arc::clone(&database)).await.unwrap();
    House { server, database, path, directory }
}

// RFC 5660 §2.3: the call waits for the SA, and the daemon says that it works on it.
#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_works_on_an_answer_is_waited_for() {
    let house = slow().await;
    let far = TcpListener::bind("127.0.0.1:0").unwrap();
    let remote = far.local_addr().unwrap();
    let client = Client::connect(&house.path).await.unwrap();
    let (path, holding) = (house.path.clone(), house.path.clone());
    let blocking = thread::spawn(move || {
        blocking::Client::connect(path).unwrap().latch_tcp(remote, None, "peer.example").map(drop)
    });
    let holding = thread::spawn(move || {
        let wanted = Wanted { remote: Some(remote), ..Wanted::from("peer.example") };
        blocking::hold::<Created>(&holding, &Call::Create(wanted), bound().as_fd()).map(drop)
    });
    // Another question on the same connection waits behind it, and its asker with it.
    let (latched, listed) = tokio::join!(client.latch_tcp(remote, None, "peer.example"), client.list());
    assert_eq!((latched.is_ok(), listed.unwrap().is_empty()), (true, false));
    assert!(blocking.join().unwrap().is_ok() && holding.join().unwrap().is_ok());
}

#[tokio::test]
async fn who_wants_no_progress_is_told_of_none_and_a_listener_asks_for_none() {
    let house = slow().await;
    let raw = house.raw().await;
    for (progress, words) in [(json!(true), "working"), (json!(false), "reply")] {
        let remote = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let wanted = json!({"peer": "peer.example", "remote": remote, "progress": progress});
        let create = json!({"id": 7, "request": "create", "arguments": wanted}).to_string();
        raw.send(create.as_bytes(), Some(bound().as_fd())).await.unwrap();
        let said = answer(&raw).await;
        assert_eq!((&said["type"], &said["id"]), (&json!(words), &json!(7)), "{said}");
        let mut last = said;
        while last["type"] != "reply" {
            last = answer(&raw).await;
        }
        house.database.removed(1);
    }
    let listen = json!({"id": 1, "request": "listen", "arguments": {"peer": "%any", "progress": true}}).to_string();
    raw.send(listen.as_bytes(), Some(bound().as_fd())).await.unwrap();
    assert_eq!(answer(&raw).await["code"], "malformed");
}

// An alert is not held up by an answer that is.
#[tokio::test]
async fn alerts_come_while_another_latch_is_made() {
    let house = slow().await;
    let same = house.database.intern(class("peer.example", Proof::PreSharedKey));
    house.database.installed(2, same, loopback(), loopback()).unwrap();
    let client = Client::connect(&house.path).await.unwrap();
    let far = TcpListener::bind("127.0.0.1:0").unwrap();
    let stream = client.latch_tcp(far.local_addr().unwrap(), None, "peer.example").await.unwrap();
    let narrow = Wanted { initiate: Initiate::Narrow, ..Wanted::from("peer.example") };
    let making = client.latch_tcp(far.local_addr().unwrap(), None, narrow);
    let breaking = async {
        sleep(PROGRESS).await;
        house.database.break_latch(LatchId(stream.latch()), "for a test");
        timeout(crate::session::SILENCE, stream.broken()).await.unwrap()
    };
    let (change, made) = tokio::join!(breaking, making);
    assert_eq!((change.state, made.is_ok()), (State::Broken, true));
}

/// Answers `hello`, if it says so much, and nothing else.
fn mute(path: &Path, revision: Option<u32>) -> thread::JoinHandle<()> {
    let listener = seqpacket::socket().unwrap();
    rustix::net::bind(&listener, &SocketAddrUnix::new(path).unwrap()).unwrap();
    rustix::net::listen(&listener, 64).unwrap();
    rustix::io::ioctl_fionbio(&listener, false).unwrap();
    thread::spawn(move || {
        let mut clients = Vec::new();
        while let Ok(client) = rustix::net::accept(&listener) {
            let mut octets = [0; 1000];
            let (length, _) = rustix::net::recv(&client, &mut octets, RecvFlags::empty()).unwrap();
            if &octets[..length] == b"stop" {
                return;
            }
            if let Some(revision) = revision {
                let (id, _) = Call::decode(&octets[..length]).unwrap();
                let welcome = Welcome { version: VERSION, revision, server: "mute".to_owned() };
                let result = serde_json::to_value(welcome).unwrap();
                let octets = encode(&ServerMessage::Reply { id, result }).unwrap();
                rustix::net::send(&client, &octets, rustix::net::SendFlags::empty()).unwrap();
            }
            clients.push(client);
        }
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_waits_for_a_daemon_that_says_nothing() {
    for revision in [None, Some(REVISION)] {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("latch.sock");
        let server = mute(&path, revision);
        let remote: SocketAddr = "127.0.0.1:9".parse().unwrap();
        let (of_blocking, of_hold) = (path.clone(), path.clone());
        let blocking = thread::spawn(move || {
            let client = blocking::Client::connect(of_blocking)?;
            client.latch_tcp(remote, None, "peer.example").map(drop)
        });
        let holding = thread::spawn(move || {
            let wanted = Wanted { remote: Some(remote), ..Wanted::from("peer.example") };
            blocking::hold::<Created>(&of_hold, &Call::Create(wanted), bound().as_fd()).map(drop)
        });
        let own = async {
            let client = Client::connect(&path).await?;
            client.latch_tcp(remote, None, "peer.example").await.map(drop)
        };
        let outcomes = [timeout(PATIENCE, own).await.unwrap(), blocking.join().unwrap(), holding.join().unwrap()];
        for outcome in outcomes {
            assert!(matches!(outcome, Err(ClientError::Silent(_))), "{outcome:?}");
        }
        let stopper = crate::session::connect(&path).unwrap();
        rustix::net::send(&stopper, b"stop", rustix::net::SendFlags::empty()).unwrap();
        server.join().unwrap();
    }
}
