//! A network of a test's own: namespaces, bridges and cables that nothing outside sees, and that go with the test.
//!
//! ```text
//! test ─ unshare ─► the same test again, as first process of its own process, mount and network namespace
//!                     │   (and user namespace, where it is not root)
//!                     ├─ bridge left ──┬─ cable ── namespace n1: eth0 10.77.0.1 ── a node
//!                     │                ├─ cable ── namespace n2: eth0 10.77.0.2 ── a node
//!                     │                └─ cable ── namespace c1: eth0 10.77.1.1 ── a load
//!                     └─ bridge right ─── cables of the other side, while the network is in two
//! ```
//!
//! Teardown is the kernel's: when the first process of a process namespace ends, however it ends, all others are
//! killed, and namespaces, bridges and cables go with the last of them. It ends when its standard input does, so
//! it cannot outlive the test that started it.
//!
//! Units: kbit/s, milliseconds. Errors: where namespaces cannot be made the test says so and is over, unless
//! [`REQUIRED`] is set.
//! Why the programs `ip`, `tc`, `unshare` and `nsenter`: they are wherever a Linux is, and a netlink library is not.

#![allow(
    clippy::print_stdout,
    reason = "what a scenario measures is shown with --nocapture"
)]

use std::{
    ffi::OsStr,
    io::{BufRead, BufReader, Read, Write},
    net::Ipv4Addr,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::mpsc,
    time::Duration,
};

use parking_lot::Mutex;
use tempfile::TempDir;

/// While this is set, a machine on which namespaces cannot be made fails the test.
pub const REQUIRED: &str = "TERRACE_REQUIRE_NAMESPACES";

/// The test that runs inside.
const INSIDE: &str = "TERRACE_TEST_IN_NAMESPACES";

/// Said when a scenario is over: what a filter leaves out must not look like a success.
const OVER: &str = "scenario is over: ";

/// Where `ip netns` keeps its names; on a file system of the test's own.
const NAMES: &str = "/run/netns";

/// What a scenario needs of the machine, tried before it begins.
const PROBE: &str = "mount -t tmpfs tmpfs /run && ip link set lo up && ip link add probe type bridge \
    && ip netns add probe && ip link add p0 type veth peer name eth0 netns probe \
    && ip link set p0 master probe && nsenter --net=/run/netns/probe true \
    && tc qdisc add dev p0 root tbf rate 1mbit burst 32kbit latency 50ms";

/// Scenarios measure time, and share the machine with nobody of this process.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Runs `scenario` in a network of its own, for at most `limit`. `test` is the whole name of the test that calls this.
///
/// # Panics
/// When the scenario does, or is not over in time, or namespaces cannot be made and [`REQUIRED`] is set.
pub fn inside(test: &str, limit: Duration, scenario: impl FnOnce()) {
    if std::env::var_os(INSIDE).is_some_and(|inside| inside == test) {
        end_with_standard_input();
        scenario();
        println!("{OVER}{test}");
        return;
    }
    let _alone = ONE_AT_A_TIME.lock();
    let means = match means() {
        Ok(means) => means,
        Err(why) => {
            assert!(std::env::var_os(REQUIRED).is_none(), "{REQUIRED}: {why}");
            // Past the harness, which keeps the words of tests that pass to itself.
            let _ = writeln!(std::io::stderr(), "\nSKIPPED {test}: {why}\n");
            return;
        }
    };
    // Whatever the scenario leaves in files, however it ends, goes with this folder.
    let folder = TempDir::new().expect("a temporary folder");
    let program = std::env::current_exe().expect("a test knows its program");
    let mut outer = unshare(means)
        .arg("mount -t tmpfs tmpfs /run && exec \"$0\" \"$@\" 2>&1")
        .arg(program)
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(INSIDE, test)
        .env("TMPDIR", folder.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("it was started a moment ago");
    let (over, status) = follow(&mut outer, limit, &format!("{OVER}{test}"));
    assert!(over && status, "{test}: see above");
}

/// Prints what the process says until it ends. Answers whether it said `last`, and how it ended.
fn follow(outer: &mut Child, limit: Duration, last: &str) -> (bool, bool) {
    let out = outer.stdout.take().expect("a pipe");
    let (say, said) = mpsc::sync_channel(1024);
    std::thread::spawn(move || {
        for line in BufReader::new(out).lines().map_while(Result::ok) {
            if say.send(line).is_err() {
                return;
            }
        }
    });
    let until = now() + limit;
    let mut is_over = false;
    loop {
        match said.recv_timeout(until.saturating_duration_since(now())) {
            Ok(line) => {
                is_over |= line.ends_with(last);
                println!("{line}");
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                println!("not over within {limit:?}; it is ended");
                outer.kill().expect("the process is ours");
                break;
            }
        }
    }
    let status = outer.wait().expect("it ends");
    (is_over, status.success())
}

#[expect(clippy::disallowed_methods, reason = "real processes run on real time")]
fn now() -> std::time::Instant {
    std::time::Instant::now()
}

/// As whom namespaces are made.
#[derive(Clone, Copy)]
enum Means {
    Root,
    User,
}

fn unshare(means: Means) -> Command {
    let mut command = Command::new("unshare");
    if matches!(means, Means::User) {
        command.args(["--user", "--map-root-user"]);
    }
    command.args([
        "--net",
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        "--mount-proc",
    ]);
    command.args(["sh", "-c"]);
    command
}

/// How namespaces can be made here, or why they cannot.
fn means() -> Result<Means, String> {
    let mut problems = Vec::new();
    let is_root = rustix::process::geteuid().is_root();
    for (means, name) in [
        (Means::Root, "as root"),
        (Means::User, "as a user of its own"),
    ] {
        if matches!(means, Means::Root) && !is_root {
            continue;
        }
        let probe = unshare(means).arg(PROBE).stdin(Stdio::null()).output();
        match probe {
            Ok(output) if output.status.success() => return Ok(means),
            Ok(output) => {
                let said = String::from_utf8_lossy(&output.stderr);
                problems.push(format!("{name}: {}", said.trim()));
            }
            Err(error) => problems.push(format!("unshare: {error}")),
        }
    }
    Err(format!(
        "network namespaces cannot be made ({}). They need Linux with bridge, veth and tbf, the programs ip and tc \
         (Debian: iproute2) and unshare and nsenter (util-linux), and root or unprivileged user namespaces",
        problems.join("; ")
    ))
}

/// The first process of a process namespace takes all others with it.
fn end_with_standard_input() {
    std::thread::spawn(|| {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        #[expect(clippy::disallowed_methods, reason = "nobody is left to return to")]
        std::process::exit(1);
    });
}

/// Which bridge a cable is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The one on which all begin.
    Left,
    /// The other.
    Right,
}

impl Side {
    fn bridge(self) -> &'static str {
        match self {
            Self::Left => "left",
            Self::Right => "right",
        }
    }
}

/// A cable that carries little, late.
#[derive(Clone, Copy, Debug)]
pub struct SlowLink {
    /// Each way.
    pub kbit: u32,
    /// Each way; only where the machine can delay packets, otherwise it is what waits for its turn on the cable that
    /// comes late.
    pub delay_ms: u32,
}

/// Bridges and who is on them.
pub struct Network;

impl Network {
    /// Two bridges.
    ///
    /// # Panics
    /// When they cannot be made; [`inside`] has tried.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "it makes something")]
    pub fn new() -> Self {
        must("ip", ["link", "set", "lo", "up"]);
        for side in [Side::Left, Side::Right] {
            must("ip", ["link", "add", side.bridge(), "type", "bridge"]);
            must("ip", ["link", "set", side.bridge(), "up"]);
        }
        Self
    }

    /// A namespace with a cable to the left bridge.
    ///
    /// # Panics
    /// When it cannot be made.
    pub fn place(&self, name: &str, address: Ipv4Addr) {
        must("ip", ["netns", "add", name]);
        let cable = cable(name);
        must(
            "ip",
            [
                "link", "add", &cable, "type", "veth", "peer", "name", "eth0", "netns", name,
            ],
        );
        must(
            "ip",
            ["link", "set", &cable, "master", Side::Left.bridge(), "up"],
        );
        must(
            "ip",
            [
                "-n",
                name,
                "address",
                "add",
                &format!("{address}/16"),
                "dev",
                "eth0",
            ],
        );
        must("ip", ["-n", name, "link", "set", "eth0", "up"]);
        must("ip", ["-n", name, "link", "set", "lo", "up"]);
    }

    /// Puts a cable into one of the bridges. Between them nothing passes, and nobody is told.
    ///
    /// # Panics
    /// When there is no such place.
    pub fn set_side(&self, name: &str, side: Side) {
        must("ip", ["link", "set", &cable(name), "master", side.bridge()]);
    }

    /// Makes a cable slow both ways; says by what means.
    ///
    /// # Panics
    /// When there is no such place.
    pub fn slow(&self, name: &str, link: SlowLink) -> &'static str {
        let (rate, delay) = (format!("{}kbit", link.kbit), format!("{}ms", link.delay_ms));
        let netem = ["netem", "rate", &rate, "delay", &delay];
        // Bursts of one large packet; what waits for longer than a second is dropped, as on a line with a short queue.
        let tbf = ["tbf", "rate", &rate, "burst", "16kb", "latency", "1s"];
        let shape = |shape: &[&str]| {
            let there = tc(None, &cable(name), shape);
            there.and_then(|()| tc(Some(name), "eth0", shape))
        };
        if shape(&netem).is_ok() {
            return "netem: rate and delay";
        }
        shape(&tbf).expect("tbf was tried before");
        "tbf: rate alone, this kernel has no netem"
    }

    /// A cable as it was at first.
    ///
    /// # Panics
    /// When it was not slow.
    pub fn quick(&self, name: &str) {
        must("tc", ["qdisc", "del", "dev", &cable(name), "root"]);
        must("tc", ["-n", name, "qdisc", "del", "dev", "eth0", "root"]);
    }

    /// A program that will run there. The process started is the program's own.
    #[must_use]
    pub fn command(&self, name: &str, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        let mut namespace = std::ffi::OsString::from("--net=");
        namespace.push(PathBuf::from(NAMES).join(name));
        command.arg(namespace).arg("--").arg(program);
        command
    }
}

/// The bridge's end of a cable.
fn cable(name: &str) -> String {
    format!("to-{name}")
}

fn tc(place: Option<&str>, device: &str, shape: &[&str]) -> Result<(), String> {
    let place = place.map_or_else(Vec::new, |name| vec!["-n", name]);
    let what = ["qdisc", "replace", "dev", device, "root"];
    run("tc", place.iter().chain(&what).chain(shape))
}

fn must<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(program: &str, args: I) {
    if let Err(problem) = run(program, args) {
        panic!("{problem}");
    }
}

fn run<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(program: &str, args: I) -> Result<(), String> {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null());
    let output = command.output().map_err(|e| format!("{program}: {e}"))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!(
            "{command:?}: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        )),
    }
}
