//! A real `kvserver` as a child process, which a demonstration may kill.
//!
//! ```text
//! start ─► ready (its Unix socket accepts) ─► kill (SIGKILL) ─► start on the same folder
//! ```
//!
//! The node gets a folder of its own, a Unix socket and, unless ports are named, free ones, so it never meets a node
//! that runs on this machine already; its log goes to `kvserver.log` in the folder.
//! Errors: no binary, or a node that ends before it is ready; both say what to do and show the log.
//! Dropping the handle kills the child and waits for it: nothing is left behind.

use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::net::UnixStream;
use tokio::time::{interval, timeout};

/// How a node is started.
#[derive(Debug, Clone)]
pub struct NodeOptions {
    /// The program.
    pub binary: PathBuf,
    /// Its folder; it finds its blocks there again.
    pub data_dir: PathBuf,
    /// Its Unix socket. Apart from the folder, because a socket's path may have 107 bytes only.
    pub socket: PathBuf,
    /// RAM for blocks, bytes.
    pub ram_bytes: u64,
    /// NVMe for blocks, bytes.
    pub nvme_bytes: u64,
    /// Where it listens for gRPC and for HTTP; port 0 takes any that is free.
    pub listen: SocketAddr,
    /// Where its console is.
    pub http_listen: SocketAddr,
    /// Further settings, as flags.
    pub flags: Vec<String>,
}

/// Any free port of this machine.
pub const ANY_PORT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

impl NodeOptions {
    /// The `kvserver` that was built next to the running program.
    ///
    /// # Errors
    /// Says how to build it when it is not there.
    pub fn binary_beside_this_program() -> anyhow::Result<PathBuf> {
        let program = std::env::current_exe().context("cannot find the running program")?;
        let folder = program
            .parent()
            .context("the running program has no folder")?;
        // An example lies in target/<profile>/examples, a program one level above.
        let candidates =
            [folder.to_owned(), folder.join("..")].map(|folder| folder.join("kvserver"));
        match candidates.iter().find(|path| path.is_file()) {
            Some(found) => Ok(found.clone()),
            None => bail!(
                "no kvserver next to this program ({})\n\
                 build both:  cargo build --release -p kvserver -p kvexamples --bins\n\
                 or name one: --kvserver PATH",
                folder.display()
            ),
        }
    }
}

/// A running node.
#[derive(Debug)]
pub struct NodeProcess {
    child: Child,
    options: NodeOptions,
}

impl NodeProcess {
    /// Starts a node and waits until it accepts connections.
    ///
    /// # Errors
    /// The program cannot be started, ends early, or is not ready in time.
    pub async fn start(options: NodeOptions) -> anyhow::Result<Self> {
        fs::create_dir_all(&options.data_dir)
            .with_context(|| format!("cannot make {}", options.data_dir.display()))?;
        let log = File::options()
            .create(true)
            .append(true)
            .open(options.log())
            .with_context(|| format!("cannot write {}", options.log().display()))?;
        let mut command = Command::new(&options.binary);
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("TERRACE_") {
                command.env_remove(name);
            }
        }
        let child = command
            .arg("--data-dir")
            .arg(&options.data_dir)
            .arg("--unix-socket")
            .arg(&options.socket)
            .args(["--listen", &options.listen.to_string()])
            .args(["--http-listen", &options.http_listen.to_string()])
            .args(["--ram-bytes", &options.ram_bytes.to_string()])
            .args(["--nvme-bytes", &options.nvme_bytes.to_string()])
            .args(&options.flags)
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("cannot share the log")?)
            .stderr(log)
            // A group of its own: Ctrl-C reaches this program, and this program ends the node.
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {}", options.binary.display()))?;
        let mut node = Self { child, options };
        match timeout(READY_WITHIN, node.ready()).await {
            Ok(ready) => ready?,
            Err(_) => bail!(
                "the node is not ready after {READY_WITHIN:?}\n{}",
                node.options.log_tail()
            ),
        }
        Ok(node)
    }

    /// Where clients reach it.
    pub fn endpoint(&self) -> String {
        format!("unix:{}", self.options.socket.display())
    }

    /// How it was started.
    pub fn options(&self) -> &NodeOptions {
        &self.options
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Kills it with SIGKILL, waits until it is gone, and answers how it can be started again.
    ///
    /// # Errors
    /// What the system says when it cannot.
    pub fn kill(mut self) -> anyhow::Result<NodeOptions> {
        self.child.kill().context("cannot kill the node")?;
        self.child.wait().context("cannot wait for the node")?;
        Ok(self.options.clone())
    }

    async fn ready(&mut self) -> anyhow::Result<()> {
        let mut pause = interval(READY_PAUSE);
        loop {
            pause.tick().await;
            if let Some(status) = self.child.try_wait().context("cannot watch the node")? {
                bail!(
                    "the node ended at once ({status})\n{}",
                    self.options.log_tail()
                );
            }
            if UnixStream::connect(&self.options.socket).await.is_ok() {
                return Ok(());
            }
        }
    }
}

impl Drop for NodeProcess {
    fn drop(&mut self) {
        // Both fail only when the child is gone already, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A node with gigabytes to fault in and a journal to read is ready long before.
const READY_WITHIN: Duration = Duration::from_secs(30);
const READY_PAUSE: Duration = Duration::from_millis(10);
const LOG_TAIL_LINES: usize = 12;

impl NodeOptions {
    /// Where the node's log goes.
    pub fn log(&self) -> PathBuf {
        self.data_dir.join("kvserver.log")
    }

    fn log_tail(&self) -> String {
        format!(
            "its log, {}, ends:\n{}",
            self.log().display(),
            tail(&self.log())
        )
    }
}

fn tail(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let last = &lines[lines.len().saturating_sub(LOG_TAIL_LINES)..];
    last.iter()
        .map(|line| format!("  {line}"))
        .collect::<Vec<_>>()
        .join("\n")
}

#[cfg(test)]
mod tests {
    use super::{ANY_PORT, NodeOptions, NodeProcess};

    fn options(binary: &str, folder: &std::path::Path) -> NodeOptions {
        NodeOptions {
            binary: binary.into(),
            data_dir: folder.join("data"),
            socket: folder.join("s"),
            ram_bytes: 1 << 26,
            nvme_bytes: 0,
            listen: ANY_PORT,
            http_listen: ANY_PORT,
            flags: Vec::new(),
        }
    }

    #[tokio::test]
    async fn a_node_that_ends_at_once_shows_its_log() {
        let folder = tempfile::tempdir().unwrap();
        // `ls` does not know the flags and says so.
        let error = NodeProcess::start(options("ls", folder.path()))
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains("ended at once"), "{error}");
        assert!(
            error.contains("--data-dir") || error.contains("option"),
            "{error}"
        );
    }

    #[tokio::test]
    async fn a_missing_program_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let error = NodeProcess::start(options("/no/such/kvserver", folder.path()))
            .await
            .unwrap_err();
        assert!(error.to_string().contains("/no/such/kvserver"));
    }
}
