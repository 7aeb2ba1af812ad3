//! Server processes that die with us, the cores they run on, and where their programs come from.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Signal, getuid, set_parent_process_death_signal};
use rustix::thread::{CpuSet, sched_setaffinity};

use crate::clock::pause;

/// A child process, killed and reaped on drop.
#[derive(Debug)]
pub struct Server {
    child: Child,
    name: String,
}

impl Server {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until `ready` says yes, at most ten seconds; a child that ends before is an error with its last words.
    ///
    /// # Errors
    /// It ended, or the time ran out.
    pub async fn ready<F: Future<Output = bool>>(
        &mut self,
        mut ready: impl FnMut() -> F,
        log: &Path,
    ) -> Result<()> {
        let words = || {
            let text = std::fs::read_to_string(log).unwrap_or_default();
            text.lines()
                .rev()
                .take(5)
                .collect::<Vec<_>>()
                .into_iter()
                .rev()
                .collect::<Vec<_>>()
                .join(" | ")
        };
        for _ in 0..START_POLLS {
            if let Some(status) = self.child.try_wait()? {
                bail!("{} ended at its start ({status}): {}", self.name, words());
            }
            if ready().await {
                return Ok(());
            }
            pause(POLL).await;
        }
        bail!("{} does not answer: {}", self.name, words())
    }
}

const POLL: Duration = Duration::from_millis(20);
/// A minute: a node pre-faults its arena before it answers, at 0.4 GiB/s where the host is slow to back memory.
const START_POLLS: u32 = 3000;

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill(); // only fails when it has ended already
        let _ = self.child.wait();
    }
}

/// Where processes may run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cores {
    /// Wherever the scheduler likes.
    #[default]
    Any,
    /// Servers on the first core, the client on the second.
    Split,
}

impl Cores {
    /// Puts the calling thread, and what it starts from now on, where clients run.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn client(self) -> Result<()> {
        self.settle(1)
    }

    fn settle(self, core: usize) -> Result<()> {
        if self == Self::Split {
            let mut set = CpuSet::new();
            set.set(core);
            sched_setaffinity(None, &set).context("pinning to a core")?;
        }
        Ok(())
    }

    /// Starts `command` as a server, its output in `log`.
    ///
    /// # Errors
    /// The program cannot be started, or the log not be written.
    pub fn start(self, command: &mut Command, log: &Path) -> Result<Server> {
        let name = Path::new(command.get_program())
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let file =
            std::fs::File::create(log).with_context(|| format!("creating {}", log.display()))?;
        self.settle(0)?; // a child inherits its parent's cores
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn();
        self.client()?;
        Ok(Server {
            child: child.with_context(|| format!("starting {name}"))?,
            name,
        })
    }
}

/// For our own servers: end when the bench ends, however it ends.
pub fn end_with_parent() {
    let _ = set_parent_process_death_signal(Some(Signal::KILL)); // best effort: drop kills us in the ordinary case
}

/// Finds a program on the path.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(program))
        .find(|p| p.is_file())
}

/// Installs Debian packages for the `programs` that are missing. Answers a line for each that stays missing.
pub fn install(programs: &[(&'static str, &'static str)], allowed: bool) -> Vec<String> {
    let missing = || {
        programs
            .iter()
            .filter(|(program, _)| find(program).is_none())
    };
    let packages: Vec<_> = missing().map(|(_, package)| *package).collect();
    if allowed
        && !packages.is_empty()
        && getuid().is_root()
        && find("apt-get").is_some()
        && !apt_install(&packages)
    {
        let _ = apt(&["update", "-qq"]); // the lists may be absent or old
        apt_install(&packages);
    }
    missing()
        .map(|(program, package)| {
            format!("{program}: not found, and not installed (apt-get install {package})")
        })
        .collect()
}

/// Installs Debian packages for shared `libraries` that are missing.
///
/// # Errors
/// One stays missing.
pub fn libraries(libraries: &[(&str, &str)], allowed: bool) -> Result<()> {
    let missing = || -> Vec<&str> {
        let known = Command::new("ldconfig").arg("-p").output();
        let known = known.map_or_else(|_| Vec::new(), |output| output.stdout);
        let known = String::from_utf8_lossy(&known).into_owned();
        let absent = libraries
            .iter()
            .filter(|(library, _)| !known.contains(library));
        absent.map(|(_, package)| *package).collect()
    };
    let packages = missing();
    if allowed && !packages.is_empty() && getuid().is_root() && !apt_install(&packages) {
        let _ = apt(&["update", "-qq"]); // the lists may be absent or old
        apt_install(&packages);
    }
    match missing().as_slice() {
        [] => Ok(()),
        packages => bail!("not installed (apt-get install {})", packages.join(" ")),
    }
}

/// A virtual environment in `dir` with these packages, made or completed if that is `allowed`.
///
/// # Errors
/// There is no Python, or what is missing could not be, or may not be, installed.
pub fn python(dir: &Path, packages: &[&str], allowed: bool) -> Result<()> {
    let stamp = dir.join("installed.txt");
    let wanted = packages.join("\n");
    if std::fs::read_to_string(&stamp).is_ok_and(|installed| installed == wanted) {
        return Ok(());
    }
    if !allowed {
        bail!(
            "{} lacks {}, and nothing may be installed",
            dir.display(),
            packages.join(", ")
        );
    }
    eprintln!("installing {} to compare with", packages.join(", "));
    let run = |command: &mut Command| -> Result<()> {
        let output = command.stdin(Stdio::null()).output()?;
        if output.status.success() {
            return Ok(());
        }
        let words = String::from_utf8_lossy(&output.stderr);
        bail!(
            "{}",
            words.lines().last().unwrap_or("it ended without a word")
        )
    };
    run(Command::new("python3").args(["-m", "venv"]).arg(dir))
        .context("making a virtual environment")?;
    let pip = dir.join("bin").join("pip");
    run(Command::new(pip).args(["install", "-q"]).args(packages))
        .with_context(|| format!("pip install {}", packages.join(" ")))?;
    Ok(std::fs::write(stamp, wanted)?)
}

fn apt_install(packages: &[&str]) -> bool {
    eprintln!("installing {} to compare with", packages.join(", "));
    apt(&[
        &["install", "-y", "-qq", "--no-install-recommends"],
        packages,
    ]
    .concat())
}

/// `RUNLEVEL=1` keeps the packages' scripts from starting a service: we start our own.
fn apt(arguments: &[&str]) -> bool {
    let mut command = Command::new("apt-get");
    command
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("RUNLEVEL", "1");
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .is_ok_and(|s| s.success())
}

/// A loopback port that was free a moment ago.
///
/// # Errors
/// No port can be bound.
pub fn free_port() -> Result<u16> {
    Ok(std::net::TcpListener::bind(("127.0.0.1", 0))?
        .local_addr()?
        .port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_server_is_gone() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let server = Cores::Any
            .start(Command::new("sleep").arg("60"), &dir.path().join("log"))
            .expect("sleep starts");
        let proc = PathBuf::from(format!("/proc/{}", server.pid()));
        assert!(proc.exists());
        drop(server);
        assert!(!proc.exists());
    }

    #[tokio::test]
    async fn a_server_that_ends_says_why() {
        let dir = tempfile::tempdir().expect("temporary folder");
        let log = dir.path().join("log");
        let mut server = Cores::Any
            .start(
                Command::new("sh").args(["-c", "echo no such option; exit 3"]),
                &log,
            )
            .expect("sh starts");
        let error = server
            .ready(|| async { false }, &log)
            .await
            .expect_err("it ended");
        assert!(error.to_string().contains("no such option"), "{error}");
    }

    #[test]
    fn what_is_missing_is_named() {
        assert_eq!(install(&[("sh", "dash")], false), Vec::<String>::new());
        assert_eq!(install(&[("no-such-program", "package")], false).len(), 1);
    }
}
