//! A TCP relay that tests put between two daemons: it splits, merges, delays, corrupts and holds back what passes.
//!
//! `relay LISTEN TARGET`; each line of standard input is what to do from then on: `pass`, `octets` (one segment for
//! each), `merge` (what comes in 50 ms together), `delay MS`, `corrupt` (one octet of the next piece to the target,
//! then pass), `hold` (nothing passes).

#![allow(clippy::unwrap_used, reason = "a tool of the tests")]

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

#[derive(Clone, Copy, PartialEq)]
enum Mode {
    Pass,
    Octets,
    Merge,
    Delay(Duration),
    Corrupt,
    Hold,
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, listen, target] = arguments.as_slice() else { panic!("relay LISTEN TARGET") };
    let mode = Arc::new(Mutex::new(Mode::Pass));
    let listener = TcpListener::bind(listen).unwrap();
    let (shared, target) = (Arc::clone(&mode), target.clone());
    thread::spawn(move || {
        for client in listener.incoming() {
            let Ok(client) = client else { continue };
            let Ok(server) = TcpStream::connect(&target) else { continue };
            for socket in [&client, &server] {
                socket.set_nodelay(true).unwrap();
            }
            let ends = (client.try_clone().unwrap(), server.try_clone().unwrap());
            let (up, down) = (Arc::clone(&shared), Arc::clone(&shared));
            thread::spawn(move || pump(client, server, &up, true));
            thread::spawn(move || pump(ends.1, ends.0, &down, false));
        }
    });
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        let mut words = line.split(' ');
        *mode.lock().unwrap() = match words.next().unwrap() {
            "pass" => Mode::Pass,
            "octets" => Mode::Octets,
            "merge" => Mode::Merge,
            "delay" => Mode::Delay(Duration::from_millis(words.next().unwrap().parse().unwrap())),
            "corrupt" => Mode::Corrupt,
            "hold" => Mode::Hold,
            other => panic!("{other}?"),
        };
        println!("{line}");
    }
}

/// One direction; the end of either ends both.
fn pump(mut from: TcpStream, to: TcpStream, mode: &Mutex<Mode>, towards_target: bool) {
    // A delay holds back what comes, not the reading of it.
    let (sender, receiver) = std::sync::mpsc::sync_channel::<(Instant, Vec<u8>)>(1024);
    let mut out = to.try_clone().unwrap();
    let writer = thread::spawn(move || {
        for (due, piece) in receiver {
            thread::sleep(due.saturating_duration_since(Instant::now()));
            if out.write_all(&piece).is_err() {
                return;
            }
        }
    });
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(read) = from.read(&mut buffer) {
        if read == 0 {
            break;
        }
        while *mode.lock().unwrap() == Mode::Hold {
            thread::sleep(Duration::from_millis(10));
        }
        let mut piece = buffer.get(..read).unwrap().to_vec();
        let now = *mode.lock().unwrap();
        let mut due = Instant::now();
        match now {
            Mode::Pass | Mode::Hold => {}
            Mode::Octets => {
                let sent = piece.iter().all(|octet| sender.send((due, vec![*octet])).is_ok());
                if sent { continue } else { break }
            }
            Mode::Merge => thread::sleep(Duration::from_millis(50)),
            Mode::Delay(by) => due += by,
            Mode::Corrupt if towards_target => {
                *mode.lock().unwrap() = Mode::Pass;
                let middle = piece.len() / 2;
                *piece.get_mut(middle).unwrap() ^= 0x55;
            }
            Mode::Corrupt => {}
        }
        if sender.send((due, piece)).is_err() {
            break;
        }
    }
    drop(sender);
    let _ = writer.join();
    let _ = to.shutdown(std::net::Shutdown::Both);
    let _ = from.shutdown(std::net::Shutdown::Both);
}
