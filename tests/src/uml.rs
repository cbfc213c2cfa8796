//! A real kernel with ESP for tests: User-Mode Linux, which runs as an ordinary process with the host's file system as
//! its root.
//!
//! A test whose body stands in [`in_guest`] runs there: the first such test of a process boots the kernel, twice, side by side, in
//! each of which this same program runs once more with half of the tests that it was to run. Each test on the outside then
//! takes the result of its other self. Hosts are namespaces of the guest, so everything else is as in any other test.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

/// Set in the guest.
const INSIDE: &str = "LATCHKEY_TEST_IN_GUEST";
/// The package's kernel.
const KERNEL: &str = "/usr/bin/linux.uml";
/// Names another one, for tests of what the package's lacks.
const OTHER_KERNEL: &str = "LATCHKEY_UML";
/// Seconds after which a guest is killed, whatever it does.
const LIMIT: u32 = 1800;
/// How many boot side by side.
const GUESTS: usize = 2;
/// About one boot in a hundred ends at once with a fault of the kernel itself.
const BOOTS: usize = 4;

/// True in the guest.
pub fn inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// Runs a test's body in the guest; fails if it failed there. To be called by the test function itself, with a closure
/// written there.
pub fn in_guest<F: FnOnce()>(body: F) {
    if inside() {
        return body();
    }
    static LOG: OnceLock<Result<String, String>> = OnceLock::new();
    let log = match LOG.get_or_init(boot) {
        Ok(log) => log,
        Err(error) => panic!("{error}"),
    };
    // `kernel::module::test::{{closure}}` stands in the test `module::test`.
    let name = std::any::type_name::<F>();
    let name = name.split_once("::").map_or(name, |(_, rest)| rest).trim_end_matches("::{{closure}}");
    if log.contains(&format!("test {name} ... ok\n")) {
        return;
    }
    let start = format!("---- {name} stdout ----\n");
    match log.split_once(&start) {
        Some((_, rest)) => {
            let end = rest.find("\n---- ").or_else(|| rest.find("\nfailures:\n")).unwrap_or(rest.len());
            panic!("failed in the guest:\n{}", &rest[..end]);
        }
        None => panic!("{name} did not end in the guest, whose output is:\n{log}"),
    }
}

/// Boots guests, which have one processor each, and runs this program's chosen tests there; gives what they printed.
fn boot() -> Result<String, String> {
    let chosen = chosen_tests();
    let shares: Vec<Vec<&str>> =
        (0..GUESTS).map(|guest| chosen.iter().skip(guest).step_by(GUESTS).map(String::as_str).collect()).collect();
    std::thread::scope(|scope| {
        let guests: Vec<_> = shares
            .iter()
            .filter(|share| !share.is_empty())
            .map(|share| scope.spawn(|| run(&job(share), LIMIT)))
            .collect();
        guests.into_iter().map(|guest| guest.join().unwrap()).collect()
    })
}

/// Names of the tests that this program was asked to run.
fn chosen_tests() -> Vec<String> {
    let list = Command::new(std::env::current_exe().unwrap()).args(choice()).arg("--list").output().unwrap();
    let list = String::from_utf8(list.stdout).unwrap();
    list.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect()
}

/// Boots the guest and runs a shell script there, with [`inside`] true; gives what it printed. The guest is killed after so
/// many seconds.
pub fn run(script: &str, limit: u32) -> Result<String, String> {
    let kernel = std::env::var(OTHER_KERNEL).unwrap_or_else(|_| KERNEL.to_owned());
    for program in [&kernel, "/sbin/modprobe"] {
        if !Path::new(program).exists() {
            return Err(format!("{program} is missing: apt-get install user-mode-linux kmod"));
        }
    }
    let directory = tempfile::Builder::new().prefix("lkt").tempdir().unwrap();
    let out = directory.path().join("out");
    fs::create_dir(&out).unwrap();
    fs::write(directory.path().join("init"), include_str!("uml/init")).unwrap();
    fs::write(out.join("job"), format!("export {INSIDE}=1 RUST_BACKTRACE=1\n{script}\n")).unwrap();
    let chmod = Command::new("chmod").arg("+x").arg(directory.path().join("init")).status().unwrap();
    assert!(chmod.success());

    let registers = match has_tiles() {
        true => Some(keep_registers(directory.path())?),
        false => None,
    };
    let mut console = String::new();
    for _ in 0..BOOTS {
        let output = fs::File::create(directory.path().join("console")).unwrap();
        // It has a process for each of the guest's, all in one group that `timeout` makes and ends.
        let status = Command::new("timeout")
            .args(["-s", "KILL", &limit.to_string(), &kernel])
            .args(["mem=1G", "root=/dev/root", "rootfstype=hostfs", "ro", "con=null", "con0=fd:0,fd:1", "quiet"])
            .arg(format!("init={}", directory.path().join("init").display()))
            .arg(format!("OUT={}", out.display()))
            .arg(format!("uml_dir={}/", directory.path().display()))
            .envs(registers.iter().map(|library| ("LD_PRELOAD", library)))
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            .status()
            .map_err(|error| format!("timeout: {error}; apt-get install coreutils"))?;
        console = String::from_utf8_lossy(&fs::read(directory.path().join("console")).unwrap()).into_owned();
        if let Ok(log) = fs::read(out.join("log")) {
            let log = String::from_utf8_lossy(&log).into_owned();
            return Ok(match out.join("status").exists() {
                true => log,
                false => format!("{log}\n{console}\nthe guest ended before its tests ({status}; limit {limit} s)\n"),
            });
        }
    }
    Err(format!("the guest did not boot in {BOOTS} attempts: {console}"))
}

/// True where a process has more registers than Linux before 6.13 keeps for those of a guest.
fn has_tiles() -> bool {
    fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| text.split_ascii_whitespace().any(|flag| flag == "amx_tile"))
}

/// Makes the library that lets such a guest boot there; gives its path.
fn keep_registers(directory: &Path) -> Result<PathBuf, String> {
    let (source, library) = (directory.join("registers.c"), directory.join("registers.so"));
    fs::write(&source, include_str!("uml/registers.c")).unwrap();
    let output = Command::new("cc").args(["-O2", "-shared", "-fPIC", "-o"]).arg(&library).arg(&source).output();
    let output = output.map_err(|error| format!("cc: {error}; apt-get install gcc libc6-dev"))?;
    match output.status.success() {
        true => Ok(library),
        false => Err(format!("cc: {}", String::from_utf8_lossy(&output.stderr))),
    }
}

/// A script that runs this program's tests of these names in the guest.
fn job(tests: &[&str]) -> String {
    let quote = |text: &str| format!("'{}'", text.replace('\'', r"'\''"));
    let mut job = format!("cd {}\n", quote(env!("CARGO_MANIFEST_DIR")));
    if let Ok(level) = std::env::var("LATCHKEY_TEST_LOG") {
        job += &format!("export LATCHKEY_TEST_LOG={}\n", quote(&level));
    }
    job += &quote(std::env::current_exe().unwrap().to_str().unwrap());
    tests.iter().for_each(|name| job += &format!(" {}", quote(name)));
    choice()
        .iter()
        .filter(|argument| ["--ignored", "--include-ignored"].contains(&argument.as_str()))
        .for_each(|flag| job += &format!(" {flag}"));
    job + " --exact --test-threads=4"
}

/// The arguments by which this program was told what to run.
fn choice() -> Vec<String> {
    let mut choice = Vec::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--exact" | "--ignored" | "--include-ignored" => choice.push(argument),
            "--skip" => choice.extend([argument, arguments.next().unwrap_or_default()]),
            // What these say is about the outside.
            "--test-threads" | "--format" | "--color" | "--logfile" | "--report-time" | "-Z" => {
                arguments.next();
            }
            option if option.starts_with('-') => {}
            _ => choice.push(argument),
        }
    }
    choice
}
