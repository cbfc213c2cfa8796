//! A model of what the kernel's plane installs, compared with dumps of the kernel's databases (`ip xfrm`) after random
//! operations: some fail on their own account, some because somebody else's states and policies are in the way.

use std::collections::BTreeSet;
use std::fs::File;
use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::FileExt as _;
use std::process::Command;

use ipsec::guard::{ClassId, NoLatches};
use ipsec::plane::{
    DataPlane, Encapsulation, EspKeys, EspSuite, KernelOptions, Lifetime, Mark, Mode, SaPair, TfcPadding, Trap,
};
use ipsec::secret::Secret;
use ipsec::selector::TrafficSelector;
use ipsec::transform::{Encr, Integ};
use kernel::netns::{Namespace, veth};
use kernel::network::{Network, NetworkConfig, PlaneChoice};
use latchkey_tests::uml::in_guest;
use proptest::prelude::*;

const LOCAL: &str = "192.0.2.1";
const PEERS: [&str; 3] = ["192.0.2.2", "192.0.2.3", "2001:db8::2"];
const LOCALS: [&str; 3] = [LOCAL, LOCAL, "2001:db8::1"];
const REMOTE_NETS: [(&str, u8); 3] = [("10.2.0.0", 24), ("10.2.0.0", 16), ("10.3.0.0", 24)];
const LOCAL_NET: (&str, u8) = ("10.1.0.0", 24);
/// Inbound SPIs begin here, outbound ones further on.
const SPI: u32 = 0x1000;
const SPI_OUT: u32 = 0x2000;
/// Somebody else's state has the name of our inbound one.
const TAKEN_IN: u32 = 6;
/// Somebody else's state has the name of our outbound one: what was done before must be undone.
const TAKEN_OUT: u32 = 7;

#[derive(Clone, Debug)]
enum Operation {
    Install {
        spi: u32,
        reqid: u32,
        network: usize,
        peer: usize,
        tag: usize,
        await_peer: bool,
        unsupported: bool,
    },
    Retire(u32),
    Delete(u32),
    Migrate(u32, usize),
    Trap(u32, usize),
    RemoveTrap(u32),
    /// Somebody removes a policy of ours, if there is one for this network.
    Foreign(usize),
}

fn operation() -> impl Strategy<Value = Operation> {
    let spi = || 0_u32..8;
    prop_oneof![
        6 => (spi(), 1_u32..4, 0_usize..3, 0_usize..3, 0_usize..3, any::<bool>(), prop::bool::weighted(0.1)).prop_map(
            |(spi, reqid, network, peer, tag, await_peer, unsupported)| Operation::Install {
                spi, reqid, network, peer, tag, await_peer, unsupported
            }
        ),
        2 => spi().prop_map(Operation::Retire),
        3 => spi().prop_map(Operation::Delete),
        2 => (0..TAKEN_IN, 0_usize..3).prop_map(|(spi, peer)| Operation::Migrate(spi, peer)),
        2 => (100_u32..103, 0_usize..3).prop_map(|(reqid, network)| Operation::Trap(reqid, network)),
        1 => (100_u32..103).prop_map(Operation::RemoveTrap),
        1 => (0_usize..3).prop_map(Operation::Foreign),
    ]
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Sending {
    Yes,
    Waits,
    Retired,
}

#[derive(Clone, Debug)]
struct Pair {
    spi: u32,
    reqid: u32,
    network: usize,
    peer: usize,
    tag: usize,
    sending: Sending,
}

/// What should be installed, pairs and traps in the order in which they came.
#[derive(Default)]
struct Model {
    pairs: Vec<Pair>,
    traps: Vec<(u32, usize)>,
}

/// A line for each state: ends, SPI, `reqid`.
type Dump = BTreeSet<String>;

impl Model {
    fn find(&self, spi: u32) -> Option<usize> {
        self.pairs.iter().position(|pair| pair.spi == spi)
    }

    /// Says whether the operation should succeed.
    fn apply(&mut self, operation: &Operation) -> bool {
        match *operation {
            Operation::Install { spi, reqid, network, peer, tag, await_peer, unsupported } => {
                let live = self.pairs.iter().any(|pair| pair.reqid == reqid && pair.sending != Sending::Retired);
                let sending = if await_peer && live { Sending::Waits } else { Sending::Yes };
                // A foreign state is in the way at the first peer only; an outbound one that waits is not in its way yet.
                let in_the_way =
                    (spi == TAKEN_IN && peer < 2) || (spi == TAKEN_OUT && peer == 0 && sending == Sending::Yes);
                if self.find(spi).is_some() || unsupported || in_the_way {
                    return false;
                }
                self.pairs.push(Pair { spi, reqid, network, peer, tag, sending });
            }
            Operation::Retire(spi) | Operation::Delete(spi) => {
                let Some(at) = self.find(spi) else { return false };
                let reqid = self.pairs[at].reqid;
                for (other, pair) in self.pairs.iter_mut().enumerate() {
                    if other != at && pair.reqid == reqid && pair.sending == Sending::Waits {
                        let in_the_way = pair.spi == TAKEN_OUT && pair.peer == 0;
                        pair.sending = if in_the_way { Sending::Retired } else { Sending::Yes };
                    }
                }
                match operation {
                    Operation::Retire(_) => self.pairs[at].sending = Sending::Retired,
                    _ => drop(self.pairs.remove(at)),
                }
            }
            Operation::Migrate(spi, peer) => match self.find(spi) {
                Some(at) => self.pairs[at].peer = peer,
                None => return false,
            },
            Operation::Trap(reqid, network) => {
                if self.traps.iter().any(|(other, _)| *other == reqid) {
                    return false;
                }
                self.traps.push((reqid, network));
            }
            Operation::RemoveTrap(reqid) => {
                let before = self.traps.len();
                self.traps.retain(|(other, _)| *other != reqid);
                return self.traps.len() < before;
            }
            Operation::Foreign(_) => {}
        }
        true
    }

    fn states(&self) -> Dump {
        let mut states = Dump::new();
        for Pair { spi, reqid, peer, tag, sending, .. } in &self.pairs {
            let (local, remote, (mark, if_id)) = (LOCALS[*peer], PEERS[*peer], shown(*tag));
            // Marks are the policies' alone in this direction.
            states.insert(format!("{remote} {local} {:#010x} - {if_id} {reqid}", SPI + spi));
            if *sending == Sending::Yes {
                states.insert(format!("{local} {remote} {:#010x} {mark} {if_id} {reqid}", SPI_OUT + spi));
            }
        }
        states
    }

    fn policies(&self) -> Dump {
        let mut policies = Dump::new();
        for (network, (address, prefix)) in REMOTE_NETS.iter().enumerate() {
            let (ours, theirs) = (format!("{}/{}", LOCAL_NET.0, LOCAL_NET.1), format!("{address}/{prefix}"));
            let priority = 400_000 - 512 * (u32::from(*prefix) + u32::from(LOCAL_NET.1));
            for tag in 0..3 {
                let (mark, if_id) = shown(tag);
                // Of equally good ones the newest.
                let pair = self.pairs.iter().rev().find(|pair| (pair.network, pair.tag) == (network, tag));
                if let Some(Pair { reqid, peer, .. }) = pair {
                    let (local, remote, priority) = (LOCALS[*peer], PEERS[*peer], priority - 1);
                    policies.insert(format!("{ours} {theirs} out {priority} {local} {remote} {mark} {if_id} {reqid}"));
                    for direction in ["in", "fwd"] {
                        let selected = format!("{theirs} {ours} {direction}");
                        policies.insert(format!("{selected} {priority} {remote} {local} {mark} {if_id} {reqid}"));
                    }
                } else if let Some((reqid, _)) = self.traps.iter().rev().find(|(_, other)| *other == network)
                    && tag == 0
                {
                    policies.insert(format!("{ours} {theirs} out {priority} 0.0.0.0 0.0.0.0 {mark} {if_id} {reqid}"));
                }
            }
        }
        policies
    }
}

/// What sets a pair apart from others of its selectors: nothing, a mark, the number of an interface.
fn options(tag: usize) -> KernelOptions {
    let mark = Mark { value: 0x2a, mask: 0xff };
    match tag {
        0 => KernelOptions::default(),
        1 => KernelOptions { mark_in: mark, mark_out: mark, ..KernelOptions::default() },
        _ => KernelOptions { if_id_in: 7, if_id_out: 7, ..KernelOptions::default() },
    }
}

/// Mark and number as `ip` shows them.
fn shown(tag: usize) -> (&'static str, &'static str) {
    [("-", "-"), ("0x2a/0xff", "-"), ("-", "0x7")][tag]
}

fn ip(arguments: &str) -> String {
    let output = Command::new("ip").args(arguments.split(' ')).output();
    let output = output.unwrap_or_else(|error| panic!("ip: {error}: apt-get install iproute2"));
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The word behind another one.
fn after<'a>(words: &[&'a str], name: &str) -> &'a str {
    let at = words.iter().position(|word| *word == name).unwrap_or_else(|| panic!("no {name} in {words:?}"));
    words[at + 1]
}

/// The same, or `-` where there is none.
fn perhaps<'a>(words: &[&'a str], name: &str) -> &'a str {
    words.iter().position(|word| *word == name).map_or("-", |at| words[at + 1])
}

/// Blocks of a dump: each begins with a line that is not indented.
fn blocks(dump: &str) -> Vec<Vec<&str>> {
    let mut blocks: Vec<Vec<&str>> = Vec::new();
    for line in dump.lines() {
        if !line.starts_with(char::is_whitespace) {
            blocks.push(Vec::new());
        }
        if let Some(block) = blocks.last_mut() {
            block.extend(line.split_whitespace());
        }
    }
    blocks
}

fn states() -> Dump {
    let dump = ip("xfrm state");
    let states = blocks(&dump).into_iter().map(|words| {
        let value = |name| after(&words, name);
        let (mark, if_id) = (perhaps(&words, "mark"), perhaps(&words, "if_id"));
        format!("{} {} {} {mark} {if_id} {}", value("src"), value("dst"), value("spi"), value("reqid"))
    });
    // Not somebody else's, and not the kernel's own for a packet that waits.
    states.filter(|state| !state.ends_with(" 999") && !state.contains(" 0x00000000 ")).collect()
}

fn policies() -> Dump {
    let dump = ip("xfrm policy");
    let all = blocks(&dump).into_iter().filter(|words| words.contains(&"dir"));
    let policies = all.map(|words| {
        let template = words.iter().position(|word| *word == "tmpl").unwrap();
        let (selector, template) = words.split_at(template);
        let (selected, demanded) = (|name| after(selector, name), |name| after(template, name));
        format!(
            "{} {} {} {} {} {} {} {} {}",
            selected("src"),
            selected("dst"),
            selected("dir"),
            selected("priority"),
            demanded("src"),
            demanded("dst"),
            perhaps(&words, "mark"),
            perhaps(&words, "if_id"),
            demanded("reqid")
        )
    });
    policies.filter(|policy| !policy.ends_with(" 999")).collect()
}

fn network((address, prefix): (&str, u8)) -> Vec<TrafficSelector> {
    vec![TrafficSelector::network(address.parse().unwrap(), prefix).unwrap()]
}

fn encapsulation(peer: usize) -> Encapsulation {
    let socket = |address: &str| SocketAddr::new(address.parse::<IpAddr>().unwrap(), 4500);
    // Over UDP to one of them.
    match peer {
        1 => Encapsulation::Udp { local: socket(LOCALS[peer]), remote: socket(PEERS[peer]) },
        _ => Encapsulation::None { local: socket(LOCALS[peer]).ip(), remote: socket(PEERS[peer]).ip() },
    }
}

fn pair(spi: u32, reqid: u32, remote: usize, peer: usize, encr: Encr) -> SaPair {
    let keys = || EspKeys { encr: Secret::new(vec![7; 20]), integ: Secret::new(Vec::new()) };
    SaPair {
        spi_in: SPI + spi,
        spi_out: SPI_OUT + spi,
        reqid,
        class: ClassId(reqid),
        mode: Mode::Tunnel,
        suite: EspSuite { encr, key_bits: 128, integ: Integ::NONE, esn: spi.is_multiple_of(2) },
        keys_in: keys(),
        keys_out: keys(),
        encapsulation: encapsulation(peer),
        local_ts: network(LOCAL_NET),
        remote_ts: network(REMOTE_NETS[remote]),
        replay_window: 32 * (1 + spi),
        lifetime: Lifetime::default(),
        copy_df: true,
        copy_ecn: true,
        await_peer: false,
        tfc: TfcPadding::None,
        options: options(0),
    }
}

/// Carries the operation out; says whether it succeeded.
fn perform(plane: &mut dyn DataPlane, operation: &Operation) -> bool {
    match *operation {
        Operation::Install { spi, reqid, network: remote, peer, tag, await_peer, unsupported } => {
            let encr = if unsupported { Encr(99) } else { Encr::AES_GCM_16 };
            plane.install(SaPair { await_peer, options: options(tag), ..pair(spi, reqid, remote, peer, encr) }).is_ok()
        }
        Operation::Retire(spi) => plane.retire(SPI + spi).is_ok(),
        Operation::Delete(spi) => plane.delete(SPI + spi).is_ok(),
        Operation::Migrate(spi, peer) => plane.migrate(SPI + spi, encapsulation(peer)).is_ok(),
        Operation::Trap(reqid, remote) => plane
            .install_trap(Trap {
                reqid,
                local_ts: network(LOCAL_NET),
                remote_ts: network(REMOTE_NETS[remote]),
                options: KernelOptions::default(),
            })
            .is_ok(),
        Operation::RemoveTrap(reqid) => plane.remove_trap(reqid).is_ok(),
        Operation::Foreign(remote) => {
            let (address, prefix) = REMOTE_NETS[remote];
            let arguments = format!("xfrm policy deleteall src 10.1.0.0/24 dst {address}/{prefix} dir out");
            ip(&arguments);
            true
        }
    }
}

/// What others do is put right a moment later.
fn settles(what: impl Fn() -> Dump, wanted: &Dump) -> Dump {
    for _ in 0..100 {
        if what() == *wanted {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    what()
}

fn run(operations: &[Operation]) {
    let (host, far) = (Namespace::new().unwrap(), Namespace::new().unwrap());
    veth(&host, "eth0", &far, "eth0").unwrap();
    host.add_address("eth0", LOCAL.parse().unwrap(), 24).unwrap();
    host.add_address("eth0", LOCALS[2].parse().unwrap(), 64).unwrap();
    host.run(|| {
        let keyed = "proto esp reqid 999 mode tunnel aead rfc4106(gcm(aes)) 0x0102030405060708090a0b0c0d0e0f1011121314 128";
        ip(&format!("xfrm state add src 192.0.2.9 dst {LOCAL} spi {} {keyed}", SPI + TAKEN_IN));
        ip(&format!("xfrm state add src {LOCAL} dst {} spi {} {keyed}", PEERS[0], SPI_OUT + TAKEN_OUT));
        ip("xfrm policy add src 10.1.0.0/24 dst 10.2.0.0/16 dir out priority 500000 tmpl proto esp reqid 999 mode transport");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let config = NetworkConfig { plane: PlaneChoice::Kernel, ..NetworkConfig::default() };
            let (network, _events) = Network::start(config, std::sync::Arc::new(NoLatches)).await.unwrap();
            let mut plane = network.plane();
            let mut model = Model::default();
            for (at, operation) in operations.iter().enumerate() {
                assert_eq!(perform(&mut *plane, operation), model.apply(operation), "{at}: {operation:?}");
                let (wanted_states, wanted_policies) = (model.states(), model.policies());
                assert_eq!(settles(states, &wanted_states), wanted_states, "states after {at}: {operation:?}");
                assert_eq!(settles(policies, &wanted_policies), wanted_policies, "policies after {at}: {operation:?}");
            }
            plane.shutdown().unwrap();
            assert_eq!((states(), policies()), (Dump::new(), Dump::new()));
            assert_eq!(ip("xfrm state").matches("reqid 999").count(), 2, "what is somebody else's stays");
            network.shutdown().await.unwrap();
        });
    })
    .unwrap();
}

#[test]
fn the_kernel_has_what_the_model_has_after_any_operations() {
    in_guest(|| {
        // What is undone after a failure is not what somebody else had there before.
        let tagged = |spi, tag| {
            let (await_peer, unsupported) = (false, false);
            Operation::Install { spi, reqid: 1, network: 0, peer: 0, tag, await_peer, unsupported }
        };
        let taken = |spi| tagged(spi, 0);
        run(&[taken(TAKEN_OUT), taken(TAKEN_OUT), taken(TAKEN_IN), taken(TAKEN_IN), tagged(TAKEN_OUT, 1)]);
        // The same selectors side by side, removed by somebody and by us.
        let (one, other) = (Operation::Foreign(0), Operation::Delete(1));
        run(&[tagged(0, 0), tagged(1, 1), tagged(2, 2), one, Operation::Migrate(1, 1), other, Operation::Delete(2)]);

        let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
            cases: 4,
            failure_persistence: None,
            max_shrink_iters: 60,
            ..ProptestConfig::default()
        });
        let operations = prop::collection::vec(operation(), 1..20);
        runner
            .run(&operations, |operations| {
                run(&operations);
                Ok(())
            })
            .unwrap();
    });
}

/// Has the kernel refuse this thread memory, once: for the allocation of this number from now on (fault-injection(7) in the
/// kernel's documentation).
struct Refusal(File);

impl Refusal {
    fn new() -> Self {
        let debug = "/sys/kernel/debug";
        let mounted = Command::new("mount").args(["-t", "debugfs", "none", debug]).status();
        assert!(mounted.is_ok_and(|status| status.success()), "this kernel has no fault injection: tests/guest/build");
        // Allocations that may wait for memory are among those that fail.
        std::fs::write(format!("{debug}/failslab/ignore-gfp-wait"), "N").unwrap();
        Self(File::options().read(true).write(true).open("/proc/thread-self/fail-nth").unwrap())
    }

    fn at(&self, number: u32) {
        self.0.write_all_at(number.to_string().as_bytes(), 0).unwrap();
    }

    /// Whether it came; there is none from now on.
    fn came(&self) -> bool {
        let mut left = [0; 16];
        let length = self.0.read_at(&mut left, 0).unwrap();
        self.at(0);
        left[..length].trim_ascii() == b"0"
    }
}

// RFC 7296 §1.3.1: whichever allocation it is that fails, in sending, in the kernel or for its answer, a pair is there as a whole
// or not at all, and a failure has the kernel's reason.
#[test]
#[ignore = "needs a kernel with fault injection: tests/guest/build, then LATCHKEY_UML=$PWD/target/guest/linux"]
fn a_kernel_without_memory_keeps_nothing_half_installed() {
    in_guest(|| {
        let (host, far) = (Namespace::new().unwrap(), Namespace::new().unwrap());
        veth(&host, "eth0", &far, "eth0").unwrap();
        host.add_address("eth0", LOCAL.parse().unwrap(), 24).unwrap();
        let work = || async {
            let config = NetworkConfig { plane: PlaneChoice::Kernel, ..NetworkConfig::default() };
            let (network, _events) = Network::start(config, std::sync::Arc::new(NoLatches)).await.unwrap();
            let mut plane = network.plane();
            let refusal = Refusal::new();
            // Whatever is done with the first one only, in this program or in the kernel, is done.
            plane.install(pair(0, 1, 0, 0, Encr::AES_GCM_16)).unwrap();
            plane.delete(SPI).unwrap();
            let (mut refused, mut borne) = (0, 0);
            for number in 1.. {
                let pair = pair(0, 1, 0, 0, Encr::AES_GCM_16);
                refusal.at(number);
                let outcome = plane.install(pair);
                if !refusal.came() {
                    assert!(outcome.is_ok(), "{outcome:?}");
                    break;
                }
                match outcome {
                    Err(error) => {
                        refused += 1;
                        let reason = error.to_string();
                        let of_memory = ["Cannot allocate memory", "No buffer space available"];
                        assert!(of_memory.iter().any(|memory| reason.contains(memory)), "{number}: {reason}");
                        assert_eq!((states(), policies()), (Dump::new(), Dump::new()), "{number}: {reason}");
                        assert!(!ip("route show table all").contains("table 220"), "{number}: {reason}");
                    }
                    Ok(()) => {
                        borne += 1;
                        assert_eq!((states().len(), policies().len()), (2, 3), "{number}");
                        plane.delete(SPI).unwrap();
                    }
                }
            }
            eprintln!("{refused} refused, {borne} borne");
            assert!(refused > 10);
            plane.shutdown().unwrap();
            network.shutdown().await.unwrap();
        };
        let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        host.run(|| runtime().block_on(work())).unwrap();
    });
}
