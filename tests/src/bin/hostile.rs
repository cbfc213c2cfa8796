//! Hostile TCP clients, many at a time, for a responder that must not mind (RFC 9329 §10).
//!
//! `hostile TARGET COUNT SECONDS SOURCES`: holds up to COUNT connections to TARGET, each with another misbehaviour, and
//! opens another for each that is closed. SOURCES is how many addresses from 198.18.0.1 on they come from; 0 leaves the
//! source to the system. Prints how many were opened, refused and closed by the target.

#![allow(clippy::unwrap_used, reason = "a tool of the tests")]

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

#[derive(Default)]
struct Counts {
    opened: AtomicUsize,
    refused: AtomicUsize,
    closed: AtomicUsize,
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, target, count, seconds, sources] = arguments.as_slice() else {
        panic!("hostile TARGET COUNT SECONDS SOURCES")
    };
    let target: SocketAddr = target.parse().unwrap();
    let (count, sources): (usize, u32) = (count.parse().unwrap(), sources.parse().unwrap());
    let length = Duration::from_secs(seconds.parse().unwrap());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let counts = Arc::new(Counts::default());
    runtime.block_on(async {
        let end = Instant::now() + length;
        for number in 0..count {
            let counts = Arc::clone(&counts);
            tokio::spawn(async move {
                // Not all in one moment.
                sleep(Duration::from_micros(500) * u32::try_from(number).unwrap()).await;
                while Instant::now() < end {
                    client(target, number, sources, end, &counts).await;
                }
            });
        }
        sleep_until(end).await;
    });
    let of = |count: &AtomicUsize| count.load(Ordering::Relaxed);
    println!("opened {} refused {} closed {}", of(&counts.opened), of(&counts.refused), of(&counts.closed));
    // Thousands of open sockets end with the process.
    std::process::exit(0);
}

/// One connection, until the target closes it.
async fn client(target: SocketAddr, number: usize, sources: u32, end: Instant, counts: &Counts) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_reuseaddr(true).unwrap();
    if sources > 0 {
        let source = Ipv4Addr::from_bits(0xc612_0001 + u32::try_from(number).unwrap() % sources);
        socket.bind(SocketAddr::new(source.into(), 0)).unwrap();
    }
    let Ok(Ok(mut stream)) = timeout_at(end, socket.connect(target)).await else {
        counts.refused.fetch_add(1, Ordering::Relaxed);
        return sleep(Duration::from_millis(100)).await;
    };
    counts.opened.fetch_add(1, Ordering::Relaxed);
    let said = misbehaviour(number);
    let mut trickle = number % KINDS == 9;
    let mut answer = [0; 4096];
    let _ = stream.write_all(&said).await;
    loop {
        // Half of them read, the others let what they are sent pile up.
        if number.is_multiple_of(2) {
            tokio::select! {
                read = stream.read(&mut answer) => if matches!(read, Ok(0) | Err(_)) { break },
                () = sleep(Duration::from_millis(500)) => {}
            }
        } else {
            sleep(Duration::from_millis(500)).await;
        }
        // What shows whether it is closed, to those who do not read.
        let more: &[u8] = if trickle { &[0x41] } else { &said };
        if stream.write_all(more).await.is_err() {
            break;
        }
        trickle = trickle && Instant::now() < end;
        if Instant::now() >= end {
            return;
        }
    }
    counts.closed.fetch_add(1, Ordering::Relaxed);
}

const KINDS: usize = 12;

fn misbehaviour(number: usize) -> Vec<u8> {
    let prefix = |rest: &[u8]| [b"IKETCP", rest].concat();
    let ike = |message: &[u8]| {
        let length = u16::try_from(message.len() + 6).unwrap().to_be_bytes();
        [&length[..], &[0; 4], message].concat()
    };
    match number % KINDS {
        0 => Vec::new(),
        1 => b"IKE".to_vec(),
        2 => b"GET / HTTP/1.1\r\nHost: example\r\n\r\n".to_vec(),
        3 => prefix(&[]),
        4 => prefix(&[0, 0]),
        5 => prefix(&[0, 1]),
        // The longest message, of which the beginning comes.
        6 => prefix(&[&[0xff, 0xff][..], &[0x55; 2000]].concat()),
        // Empty ones and keep-alives without end.
        7 => prefix(&[0, 2, 0, 3, 0xff].repeat(400)),
        // No IKE messages.
        8 => prefix(&ike(&[0x99; 100]).repeat(50)),
        // Octet by octet.
        9 => prefix(&[0x20, 0x00, 0, 0, 0, 0]),
        // ESP of nobody.
        10 => prefix(&[&[0, 102][..], &[0x77; 100]].concat().repeat(50)),
        // An IKE_SA_INIT without what belongs into it.
        _ => prefix(&ike(&[&number.to_be_bytes()[..], &[0; 8], &[0, 0x20, 34, 8, 0, 0, 0, 0, 0, 0, 0, 28]].concat())),
    }
}
