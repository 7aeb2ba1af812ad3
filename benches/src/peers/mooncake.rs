//! Mooncake's store on one host: its master, its client daemon with shared memory, and the Python client its users have.
//!
//! ```text
//!   this program ──lines of JSON──► python mooncake_driver.py ──RPC──► mooncake_client ──► segment
//!                                        └────── shared pool ────────────┘      └─► mooncake_master
//! ```
//!
//! The driver runs whole windows by itself (`benches/python/mooncake_driver.py` says how), so a line of JSON costs nothing
//! that is measured. One operation in flight: several would measure Python's lock. Mooncake verifies nothing it reads.
//! Source: `mooncake-transfer-engine-non-cuda` from PyPI, into a virtual environment of the bench's own.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::json;

use super::values_of;
use crate::load::{Sample, Window};
use crate::rounds::{Cell, Op, Peer, Pending};
use crate::spawn::{Cores, Server, free_port};
use crate::stats::latency_us;

/// What is installed, with its version.
pub const PACKAGE: &str = "mooncake-transfer-engine-non-cuda==0.3.13.post1";
/// What its shared libraries need from Debian.
pub const LIBRARIES: [(&str, &str); 2] = [
    ("libibverbs.so.1", "libibverbs1"),
    ("librdmacm.so.1", "librdmacm1"),
];

const DRIVER: &str = include_str!("../../python/mooncake_driver.py");

/// The daemon, the master and the driver.
pub struct Mooncake {
    _servers: [Server; 2],
    driver: Child,
    ask: ChildStdin,
    answers: BufReader<ChildStdout>,
    working_set_bytes: u64,
}

#[derive(Deserialize)]
struct Answer {
    #[serde(default)]
    error: Option<String>,
    #[serde(default)]
    ops: u64,
    #[serde(default)]
    bytes: u64,
    #[serde(default)]
    wall_s: f64,
    #[serde(default)]
    client_cpu_s: f64,
    #[serde(default)]
    server_cpu_s: f64,
    #[serde(default)]
    nanos: Vec<u64>,
}

impl Mooncake {
    /// Starts everything in `dir` with the programs of the virtual environment `venv`.
    ///
    /// # Errors
    /// A program is missing or does not answer.
    pub async fn start(
        cores: Cores,
        venv: &Path,
        dir: &Path,
        working_set_bytes: u64,
        segment_bytes: u64,
    ) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let program = |name: &str| -> Result<PathBuf> {
            let path = venv.join("bin").join(name);
            ensure!(path.is_file(), "{} is missing", path.display());
            Ok(path)
        };
        let [rpc, http, metrics, daemon] = [free_port()?, free_port()?, free_port()?, free_port()?];
        let mut command = Command::new(program("mooncake_master")?);
        command.args([
            format!("--rpc_port={rpc}"),
            "--rpc_address=127.0.0.1".into(),
            "--enable_http_metadata_server=true".into(),
            "--http_metadata_server_host=127.0.0.1".into(),
            format!("--http_metadata_server_port={http}"),
            format!("--metrics_port={metrics}"),
        ]);
        let listens = async |port: u16| {
            tokio::net::TcpStream::connect(("127.0.0.1", port))
                .await
                .is_ok()
        };
        let log = dir.join("master.log");
        let mut master = cores.start(&mut command, &log)?;
        master
            .ready(async || listens(rpc).await && listens(http).await, &log)
            .await?;
        let mut command = Command::new(program("mooncake_client")?);
        command.args([
            "--host=127.0.0.1".into(),
            format!("--port={daemon}"),
            format!("--master_server_address=127.0.0.1:{rpc}"),
            format!("--metadata_server=http://127.0.0.1:{http}/metadata"),
            format!("--global_segment_size={segment_bytes}"),
            "--protocol=tcp".into(),
        ]);
        let log = dir.join("client.log");
        let mut client = cores.start(&mut command, &log)?;
        client.ready(async || listens(daemon).await, &log).await?;

        let script = dir.join("mooncake_driver.py");
        std::fs::write(&script, DRIVER)?;
        let log = std::fs::File::create(dir.join("driver.log"))?;
        let mut driver = Command::new(program("python")?)
            .arg(&script)
            .arg(format!("127.0.0.1:{daemon}"))
            .args([master.pid(), client.pid()].map(|pid| pid.to_string()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .context("starting the driver")?;
        let ask = driver.stdin.take().context("the driver's input")?;
        let answers = BufReader::new(driver.stdout.take().context("the driver's output")?);
        let mut mooncake = Self {
            _servers: [client, master],
            driver,
            ask,
            answers,
            working_set_bytes,
        };
        mooncake.answer().context("the driver does not start")?;
        Ok(mooncake)
    }

    /// Stores the working set of one size.
    ///
    /// # Errors
    /// A value is refused, or comes back wrong.
    pub fn fill(&mut self, bytes: u64) -> Result<()> {
        let values = values_of(self.working_set_bytes, bytes);
        self.call(&json!({"fill": bytes, "values": values}))?;
        Ok(())
    }

    fn call(&mut self, ask: &serde_json::Value) -> Result<Answer> {
        writeln!(self.ask, "{ask}")?;
        self.ask.flush()?;
        self.answer()
    }

    fn answer(&mut self) -> Result<Answer> {
        let mut line = String::new();
        ensure!(
            self.answers.read_line(&mut line)? > 0,
            "the driver has ended"
        );
        let answer: Answer = serde_json::from_str(&line)?;
        match answer.error {
            Some(error) => bail!("{error}"),
            None => Ok(answer),
        }
    }
}

impl Peer for Mooncake {
    fn run<'a>(&'a mut self, cell: &'a Cell, window: Window) -> Pending<'a, Result<Sample>> {
        Box::pin(async move {
            ensure!(cell.concurrency == 1, "one operation in flight");
            let op = match cell.op {
                Op::Get => "get",
                Op::Put => "put",
                other => bail!("no {} here", other.as_str()),
            };
            let answer = self.call(&json!({
                "op": op,
                "bytes": cell.bytes,
                "keys": cell.keys,
                "values": values_of(self.working_set_bytes, cell.bytes),
                "warm_s": window.warm.as_secs_f64(),
                "measure_s": window.measure.as_secs_f64(),
            }))?;
            let (p50_us, p99_us) = latency_us(answer.nanos).unzip();
            Ok(Sample {
                ops: answer.ops,
                bytes: answer.bytes,
                wall_s: answer.wall_s,
                p50_us,
                p99_us,
                client_cpu_s: answer.client_cpu_s,
                server_cpu_s: answer.server_cpu_s,
                foreign_cores: None,
            })
        })
    }
}

impl Drop for Mooncake {
    fn drop(&mut self) {
        let _ = self.driver.kill(); // only fails when it has ended already
        let _ = self.driver.wait();
    }
}
