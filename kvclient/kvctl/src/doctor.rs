//! `kvctl doctor`: is this machine fit for a node, and what to do where it is not.
//!
//! ```text
//! ok    all is well
//! warn  a node works, but slower or smaller than it could
//! fail  a node does not work
//! ```
//!
//! Nothing is changed: a test file in the data folder is removed again. Fails when a check fails.

use std::{
    fs::{self, OpenOptions},
    io::Write,
    net::TcpListener,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::ExitCode,
};

use anyhow::Result;
use kvgpu::{DeviceKind, DevicePreference};
use kvserver::config::Config;
use rustix::{
    fs::OFlags,
    process::{Resource, getrlimit},
};
use serde::Serialize;

use crate::context::{Context, size, style};

const GIB: u64 = 1 << 30;
/// Direct I/O works in units of this many bytes on every disk there is.
const ALIGN: usize = 4096;
/// A node keeps at most 1024 connections by default, and some files.
const FILES_WANTED: u64 = 4096;

/// Flags of `doctor`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// The node's data folder; the default node's, if left out
    #[arg(long, env = "TERRACE_DATA_DIR")]
    data_dir: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
enum Verdict {
    Ok,
    Warn,
    Fail,
}

#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    verdict: Verdict,
    found: String,
    /// What to do.
    next: Option<String>,
}

#[derive(Serialize)]
struct Report {
    verdict: Verdict,
    checks: Vec<Check>,
}

pub(crate) async fn run(context: &Context, args: Args) -> Result<ExitCode> {
    let config = Config::default();
    let data_dir = args.data_dir.unwrap_or_else(|| config.data_dir.clone());
    let is_running = context.builder(context.endpoint()).connect().await.is_ok();
    let mut checks = vec![
        node(context.endpoint(), is_running),
        folder(&data_dir),
        free_space(&data_dir),
        direct_io(&data_dir),
        memory(),
        memory_lock(),
        huge_pages(),
        files(),
    ];
    checks.extend(
        [
            ("gRPC port", Some(config.listen)),
            ("HTTP port", config.http_listen),
        ]
        .into_iter()
        .filter_map(|(name, address)| Some(port(name, address?, is_running))),
    );
    checks.push(gpu());
    let verdict = checks
        .iter()
        .map(|check| check.verdict)
        .max()
        .unwrap_or(Verdict::Ok);
    context.print(&Report { verdict, checks }, text)?;
    Ok(if verdict == Verdict::Fail {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

fn ok(name: &'static str, found: impl Into<String>) -> Check {
    Check {
        name,
        verdict: Verdict::Ok,
        found: found.into(),
        next: None,
    }
}

fn warn(name: &'static str, found: impl Into<String>, next: impl Into<String>) -> Check {
    Check {
        name,
        verdict: Verdict::Warn,
        found: found.into(),
        next: Some(next.into()),
    }
}

fn fail(name: &'static str, found: impl Into<String>, next: impl Into<String>) -> Check {
    Check {
        name,
        verdict: Verdict::Fail,
        found: found.into(),
        next: Some(next.into()),
    }
}

fn node(endpoint: &str, is_running: bool) -> Check {
    if is_running {
        ok("node", format!("answers at {endpoint}"))
    } else {
        ok("node", format!("none at {endpoint}; `kvserver` starts one"))
    }
}

/// The folder itself, or the nearest one above it that exists.
fn existing(path: &Path) -> &Path {
    path.ancestors()
        .find(|path| path.is_dir())
        .unwrap_or(Path::new("/"))
}

fn folder(data_dir: &Path) -> Check {
    let place = existing(data_dir);
    let probe = place.join(format!(".kvctl-doctor-{}", std::process::id()));
    let outcome = OpenOptions::new().write(true).create_new(true).open(&probe);
    match outcome {
        Ok(_) => {
            // It was made above; that it cannot be removed again would show in the next check.
            let _ = fs::remove_file(&probe);
            let note = if place == data_dir {
                ""
            } else {
                " (will be made)"
            };
            ok(
                "data folder",
                format!("{}{note}, writable", data_dir.display()),
            )
        }
        Err(error) => fail(
            "data folder",
            format!("{} cannot be written: {error}", place.display()),
            "choose another with `kvserver --data-dir`, or give its owner the right to write",
        ),
    }
}

fn free_space(data_dir: &Path) -> Check {
    match rustix::fs::statvfs(existing(data_dir)) {
        Err(error) => warn(
            "free space",
            format!("unknown: {error}"),
            "check the disk by hand",
        ),
        Ok(stat) => {
            let free = stat.f_bavail * stat.f_frsize;
            if free < GIB {
                warn(
                    "free space",
                    format!("{} in {}", size(free), data_dir.display()),
                    "without 1 GiB a node has RAM alone; free some, or choose another disk with --data-dir",
                )
            } else {
                ok(
                    "free space",
                    format!("{} in {}", size(free), data_dir.display()),
                )
            }
        }
    }
}

fn direct_io(data_dir: &Path) -> Check {
    let path = existing(data_dir).join(format!(".kvctl-doctor-direct-{}", std::process::id()));
    let outcome = write_directly(&path);
    let _ = fs::remove_file(&path);
    match outcome {
        Ok(()) => ok("direct I/O", "works: NVMe reads bypass the page cache"),
        Err(error) => warn(
            "direct I/O",
            format!("does not work here: {error}"),
            "put the data folder on ext4 or xfs on a local disk (tmpfs and some network disks lack it)",
        ),
    }
}

fn write_directly(path: &Path) -> std::io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .custom_flags(OFlags::DIRECT.bits() as i32)
        .open(path)?;
    // Direct I/O wants aligned memory: take the aligned part of twice as much.
    let memory = vec![0x5a_u8; 2 * ALIGN];
    let start = memory.as_ptr().align_offset(ALIGN);
    file.write_all(&memory[start..start + ALIGN])
}

fn meminfo(field: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find(|line| line.split(':').next() == Some(field))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

fn memory() -> Check {
    match meminfo("MemAvailable") {
        None => warn(
            "memory",
            "unknown: /proc/meminfo cannot be read",
            "give --ram-bytes to kvserver",
        ),
        Some(kib) if kib << 10 < GIB => warn(
            "memory",
            format!("{} available", size(kib << 10)),
            "a node takes a quarter of it; give --ram-bytes to kvserver if that is too much",
        ),
        Some(kib) => ok(
            "memory",
            format!("{} available; a node takes a quarter", size(kib << 10)),
        ),
    }
}

fn memory_lock() -> Check {
    let show = |limit: Option<u64>| limit.map_or("unlimited".to_owned(), size);
    let limit = getrlimit(Resource::Memlock).current;
    if limit.is_none_or(|limit| limit >= GIB) {
        ok("memory lock", show(limit))
    } else {
        warn(
            "memory lock",
            format!("limited to {}", show(limit)),
            "only with a GPU: raise it (`ulimit -l unlimited`, LimitMEMLOCK=infinity), so that the arena can be page-locked",
        )
    }
}

fn huge_pages() -> Check {
    let reserved = meminfo("HugePages_Free").unwrap_or(0);
    let page_kib = meminfo("Hugepagesize").unwrap_or(0);
    if reserved > 0 {
        return ok(
            "huge pages",
            format!("{reserved} free of {}", size(page_kib << 10)),
        );
    }
    // The chosen word stands in brackets.
    let shared = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
    match shared {
        Ok(text)
            if ["[always]", "[advise]", "[within_size]", "[force]"]
                .iter()
                .any(|word| text.contains(word)) =>
        {
            ok("huge pages", "transparent for shared memory")
        }
        _ => warn(
            "huge pages",
            "none reserved, and not transparent for shared memory",
            "for fewer page faults: echo advise | sudo tee /sys/kernel/mm/transparent_hugepage/shmem_enabled",
        ),
    }
}

fn files() -> Check {
    let limits = getrlimit(Resource::Nofile);
    match limits.current {
        Some(limit) if limit < FILES_WANTED => warn(
            "open files",
            format!("limited to {limit}"),
            format!(
                "raise it for many connections: `ulimit -n {FILES_WANTED}`, LimitNOFILE={FILES_WANTED}"
            ),
        ),
        limit => ok(
            "open files",
            limit.map_or("unlimited".to_owned(), |n| n.to_string()),
        ),
    }
}

fn port(name: &'static str, address: std::net::SocketAddr, is_running: bool) -> Check {
    match TcpListener::bind(address) {
        Ok(_) => ok(name, format!("{address} is free")),
        Err(_) if is_running => ok(
            name,
            format!("{address} is taken, by the node that answers"),
        ),
        Err(error) => fail(
            name,
            format!("{address}: {error}"),
            format!(
                "`ss -ltnp 'sport = :{}'` says who has it; or start kvserver with another --listen or --http-listen",
                address.port()
            ),
        ),
    }
}

fn gpu() -> Check {
    let (device, how) = kvgpu::open(DevicePreference::Auto);
    let info = device.info();
    if info.kind == DeviceKind::Host {
        ok("GPU", format!("{how}; not needed"))
    } else {
        ok("GPU", format!("{}, {}", info.name, size(info.total_bytes)))
    }
}

fn text(report: &Report) -> String {
    let mut text = String::new();
    for check in &report.checks {
        let mark = match check.verdict {
            Verdict::Ok => style("32", "ok  "),
            Verdict::Warn => style("33", "warn"),
            Verdict::Fail => style("31;1", "fail"),
        };
        text += &format!("{mark}  {:<12}  {}\n", check.name, check.found);
        if let Some(next) = &check.next {
            text += &format!("                    → {next}\n");
        }
    }
    text + match report.verdict {
        Verdict::Ok => "\nready: start a node with `kvserver`",
        Verdict::Warn => "\na node works here; the warnings say what would make it better",
        Verdict::Fail => "\na node does not work here yet; see the lines marked fail",
    }
}

#[cfg(test)]
mod tests {
    use super::{Verdict, direct_io, existing, folder, port};

    #[test]
    fn a_port_in_use_fails_unless_the_node_has_it() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = taken.local_addr().unwrap();
        assert_eq!(port("x", address, false).verdict, Verdict::Fail);
        assert_eq!(port("x", address, true).verdict, Verdict::Ok);
        drop(taken);
        assert_eq!(port("x", address, false).verdict, Verdict::Ok);
    }

    #[test]
    fn a_folder_that_is_not_there_yet_is_judged_by_the_one_above() {
        let above = std::env::temp_dir();
        assert_eq!(existing(&above.join("no/such/folder")), above);
        assert_eq!(folder(&above.join("no-such-folder")).verdict, Verdict::Ok);
    }

    #[test]
    fn checks_leave_nothing_behind() {
        let place = std::env::temp_dir().join(format!("kvctl-doctor-test-{}", std::process::id()));
        std::fs::create_dir(&place).unwrap();
        folder(&place);
        direct_io(&place);
        assert_eq!(std::fs::read_dir(&place).unwrap().count(), 0);
        std::fs::remove_dir(&place).unwrap();
    }
}
