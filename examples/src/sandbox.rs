//! A node inside this process, for examples: a folder of its own, a free port, gone at the end.
//!
//! A program that has a node already connects to it instead; nothing else changes.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use kvserver::Node;
use kvserver::config::{Capacity, Config, UnixSocket};
use tempfile::TempDir;

const RAM_BYTES: u64 = 128 << 20;
const NVME_BYTES: u64 = 256 << 20;
const STOP_WITHIN: Duration = Duration::from_secs(5);

/// A small node and its folder.
pub struct Sandbox {
    config: Config,
    node: Option<Node>,
    folder: TempDir,
}

impl Sandbox {
    /// Starts it.
    ///
    /// # Errors
    /// What the node reports.
    pub async fn start() -> anyhow::Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("terrace-")
            .tempdir()
            .context("cannot make a folder")?;
        let config = Config {
            data_dir: folder.path().to_owned(),
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            http_listen: None,
            unix_socket: UnixSocket::Auto,
            ram_bytes: Capacity::Bytes(RAM_BYTES),
            nvme_bytes: Capacity::Bytes(NVME_BYTES),
            durable_bytes: Capacity::Bytes(0),
            ..Config::default()
        };
        let node = Node::start(config.clone()).await?;
        Ok(Self {
            config,
            node: Some(node),
            folder,
        })
    }

    /// Where clients reach it.
    pub fn endpoint(&self) -> String {
        format!("unix:{}", self.socket().display())
    }

    /// Stops the node and keeps its folder.
    ///
    /// # Errors
    /// What the node reports.
    pub async fn pause(&mut self) -> anyhow::Result<()> {
        if let Some(node) = self.node.take() {
            node.shutdown(STOP_WITHIN).await;
        }
        Ok(())
    }

    /// Starts it again on the same folder and the same socket.
    ///
    /// # Errors
    /// What the node reports.
    pub async fn resume(&mut self) -> anyhow::Result<()> {
        self.node = Some(Node::start(self.config.clone()).await?);
        Ok(())
    }

    /// Stops the node and removes its folder.
    ///
    /// # Errors
    /// What the node reports.
    pub async fn stop(mut self) -> anyhow::Result<()> {
        self.pause().await?;
        self.folder.close().context("cannot remove the folder")
    }

    fn socket(&self) -> PathBuf {
        self.config.unix_socket_path().expect("the socket is on")
    }
}
