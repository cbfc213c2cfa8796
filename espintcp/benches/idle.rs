//! Memory of idle streams: resident octets of this process for each of 9,000 that the daemon vouched for (a client of the
//! same process holds no buffers). Needs two file descriptors for each, and for 500 more; `-- NUMBER` is another number.

#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

use std::io::Write;
use std::net::TcpStream;
use std::sync::Arc;

use latchkey_espintcp::codec::{PREFIX, frame_ike};
use latchkey_espintcp::streams::{EspWorth, StreamEvent, StreamLimits, Streams};

const COUNT: u64 = 9000;
/// They warm the allocator.
const FIRST: u64 = 500;

fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

fn main() {
    let count = std::env::args().find_map(|argument| argument.parse().ok()).unwrap_or(COUNT);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let (streams, mut events) =
            Streams::new(StreamLimits::default(), None, Arc::new(|_, _, _, _| EspWorth::default()));
        let address = streams.listen("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let message = frame_ike(&[1; 300]).unwrap();
        let mut clients = Vec::new();
        let mut before = 0;
        for number in 0..count + FIRST {
            if number == FIRST {
                before = resident();
            }
            let mut client = TcpStream::connect(address).unwrap();
            client.write_all(&PREFIX).unwrap();
            client.write_all(&message).unwrap();
            loop {
                match events.recv().await.unwrap() {
                    StreamEvent::Opened { .. } => {}
                    StreamEvent::Ike { stream, .. } => {
                        streams.vouch(stream);
                        break;
                    }
                    StreamEvent::Closed { reason, .. } => panic!("{reason}"),
                }
            }
            clients.push(client);
        }
        assert_eq!(streams.open_streams() as u64, count + FIRST);
        println!("{count} idle streams: {} octets resident for each", resident().saturating_sub(before) / count);
    });
}
