//! C programs that use liblatchkey, as it is installed, over real tunnels.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use latchkey_tests::daemon::Kind::Latchkey;
use latchkey_tests::daemon::program;
use latchkey_tests::scene::{Scene, Suite};
use latchkey_tests::talker::Talker;
use tempfile::TempDir;

/// The library, installed in a folder of its own.
struct Installed {
    root: TempDir,
}

impl Installed {
    fn new() -> Self {
        let root = TempDir::new().unwrap();
        let status = Command::new(source("install"))
            .env("PREFIX", root.path())
            .env("LIBDIR", root.path().join("lib"))
            .env("BUILD", program("liblatchkey_c.so").parent().unwrap())
            .status();
        assert!(status.unwrap().success());
        Self { root }
    }

    /// Compiles a program as its users do.
    fn compile(&self, file: &str, flags: &[String]) -> PathBuf {
        let output = self.root.path().join(Path::new(file).file_stem().unwrap());
        let status = Command::new("cc")
            .args(["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-g"])
            .args(self.pkg_config(&["--cflags"]))
            .arg(source(file))
            .args(["-o", output.to_str().unwrap()])
            .args(flags)
            .status();
        assert!(status.expect("apt-get install gcc").success(), "{file}");
        output
    }

    /// What pkg-config says of it, word by word.
    fn pkg_config(&self, args: &[&str]) -> Vec<String> {
        let output = Command::new("pkg-config")
            .args(args)
            .arg("latchkey")
            .env("PKG_CONFIG_PATH", self.root.path().join("lib/pkgconfig"))
            // Else it leaves out folders that the compiler looks through anyway.
            .env("PKG_CONFIG_ALLOW_SYSTEM_LIBS", "1")
            .output()
            .expect("apt-get install pkg-config");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().split_whitespace().map(str::to_owned).collect()
    }

    fn library_path(&self) -> String {
        self.root.path().join("lib").to_str().unwrap().to_owned()
    }
}

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("latch/c").join(name)
}

#[test]
fn two_c_programs_talk_over_latched_connections_until_the_latch_breaks() {
    let installed = Installed::new();
    let dynamic = installed.compile("examples/talk.c", &installed.pkg_config(&["--libs"]));
    let scene = Scene::works(Latchkey, Latchkey, &Suite::default());
    let start = |daemon: &latchkey_tests::daemon::Daemon, host: &latchkey_tests::host::Host, name, args: &[&str]| {
        let mut command = host.command(dynamic.to_str().unwrap(), args);
        command.env("LD_LIBRARY_PATH", installed.library_path()).env("LATCH_SOCKET", daemon.latch_socket());
        Talker::start(command, daemon.path(name))
    };
    let mut refused = start(&scene.a, &scene.host_a, "refused", &["c.example", "10.2.0.1", "4000"]);
    refused.tells("latch: wrong-peer: the daemon refused: the peer of");
    refused.ends();
    let mut server = start(&scene.b, &scene.host_b, "server", &["-l", "a.example", "10.2.0.1", "4000"]);
    server.tells("listening");
    let mut client = start(&scene.a, &scene.host_a, "client", &["b.example", "10.2.0.1", "4000"]);
    client.tells("latched to b.example, ENCR_AES_GCM_16 128 bits");
    server.tells("latched to a.example");
    client.types("from here\n");
    server.prints("from here\n");
    server.types("from there\n");
    client.prints("from there\n");
    // RFC 5056: the same at both ends.
    let binding = |talker: &Talker| {
        let said = talker.errors();
        said.lines().find_map(|line| Some(line.strip_prefix("channel binding 01")?.to_owned())).unwrap()
    };
    assert_eq!((binding(&client), binding(&client).len()), (binding(&server), 64));

    // RFC 5660 §6.2: the administrator breaks it; its holder hears why.
    let listed = scene.host_a.check(
        program("latchkey").to_str().unwrap(),
        &["latches", "--socket", scene.a.latch_socket().to_str().unwrap()],
    );
    let number = listed.split_whitespace().next().unwrap().to_owned();
    scene.host_a.check(
        program("latchkey").to_str().unwrap(),
        &["latch", "break", &number, "--socket", scene.a.latch_socket().to_str().unwrap()],
    );
    client.tells("state 3: broken by the administrator");
    client.ends();

    scene.a.signal("STOP");
    let mut client = start(&scene.a, &scene.host_a, "stopped", &["b.example", "10.2.0.1", "4000"]);
    client.tells("the daemon has not answered for 10 s");
    client.ends();
    scene.a.signal("CONT");
}

#[test]
fn a_c_program_with_wrong_input_gets_errors_and_no_harm() {
    let installed = Installed::new();
    // The static library, with what pkg-config gives for it.
    let mut flags = installed.pkg_config(&["--libs", "--static"]);
    flags.iter_mut().filter(|flag| *flag == "-llatchkey").for_each(|flag| *flag = "-l:liblatchkey.a".to_owned());
    let program = installed.compile("tests/wrong_input.c", &flags);
    let scene = Scene::works(Latchkey, Latchkey, &Suite::default());
    let _server = scene.host_b.spawn("socat", &["TCP4-LISTEN:4000,bind=10.2.0.1,reuseaddr,fork", "EXEC:cat"]);
    let _datagrams = scene.host_b.spawn("socat", &["UDP4-RECVFROM:4000,bind=10.2.0.1,reuseaddr,fork", "EXEC:cat"]);
    scene.host_b.wait_for_listener(4000);
    let output = scene
        .host_a
        .command(program.to_str().unwrap(), &["b.example", "10.2.0.1", "4000"])
        .env("LATCH_SOCKET", scene.a.latch_socket())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && !text.contains("WRONG"), "{}: {text}", output.status);
}

#[test]
fn pkg_config_tells_where_the_library_is() {
    let installed = Installed::new();
    let root = installed.root.path().to_str().unwrap();
    assert_eq!(installed.pkg_config(&["--cflags"]), [format!("-I{root}/include")]);
    assert_eq!(installed.pkg_config(&["--libs"]), [format!("-L{root}/lib"), "-llatchkey".to_owned()]);
    assert_eq!(installed.pkg_config(&["--modversion"]), [env!("CARGO_PKG_VERSION")]);
    // What the Rust compiler says that the static library needs.
    let needed = installed.pkg_config(&["--libs", "--static"]);
    for library in ["-lgcc_s", "-lpthread", "-lm", "-ldl", "-lc"] {
        assert!(needed.iter().any(|flag| flag == library), "{needed:?}");
    }
    assert!(fs::exists(format!("{root}/lib/liblatchkey.so.0")).unwrap());
}
