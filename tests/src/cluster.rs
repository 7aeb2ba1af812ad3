//! Several nodes in this process that are one cluster, as far as a network on this machine makes them one.
//!
//! ```text
//! TestCluster ── nodes[i]: a small node that joined the first ── or nothing, while it is down
//!             ── dirs[i]: its folder, which outlives it
//! ```
//!
//! Each node has its own port, its own runtime threads and its own folder; gossip, joins and calls go over loopback
//! sockets.

use std::time::Duration;

use kvproto::{MemberId, MemberState};
use kvserver::{
    Node, NodeError,
    cluster::Standing,
    config::{Config, HostPort},
};
use tempfile::TempDir;

use crate::{
    node::small,
    patience::{HANG, eventually, until},
};

/// How the nodes of a test differ from a small node.
pub type Change = Box<dyn Fn(usize, &mut Config)>;

/// Nodes that are one cluster.
pub struct TestCluster {
    /// Running nodes; `None` while one is down.
    pub nodes: Vec<Option<Node>>,
    dirs: Vec<TempDir>,
    change: Change,
}

impl TestCluster {
    /// `count` nodes that have joined each other and see the same view: no ramp, no grace worth waiting for.
    pub async fn start(count: usize) -> Self {
        Self::start_with(count, |_, _| ()).await
    }

    /// The same, with some settings of each changed.
    ///
    /// # Panics
    /// When a node does not start, or they do not agree.
    pub async fn start_with(count: usize, change: impl Fn(usize, &mut Config) + 'static) -> Self {
        let mut cluster = Self {
            nodes: Vec::new(),
            dirs: Vec::new(),
            change: Box::new(change),
        };
        for _ in 0..count {
            cluster.add().await;
        }
        cluster.agreed(count).await;
        cluster
    }

    /// One more node, which joins those that run. Answers its number.
    ///
    /// # Panics
    /// When it does not start.
    pub async fn add(&mut self) -> usize {
        let number = self.seat();
        self.restart(number).await;
        number
    }

    /// A folder for one more node, which is not started yet. Answers its number.
    ///
    /// # Panics
    /// When there is none.
    pub fn seat(&mut self) -> usize {
        self.dirs.push(TempDir::new().expect("a temporary folder"));
        self.nodes.push(None);
        self.nodes.len() - 1
    }

    /// Starts node `number` over its folder, as it would be started again: told to join those that run.
    ///
    /// # Panics
    /// When it does not start.
    pub async fn restart(&mut self, number: usize) {
        self.start_as(number, self.config(number)).await;
    }

    /// Starts node `number` with these settings.
    ///
    /// # Panics
    /// When it does not start.
    pub async fn start_as(&mut self, number: usize, config: Config) {
        let mut started = None;
        until(
            "the folder of a node that was killed is let go",
            async || match Node::start(config.clone()).await {
                Err(NodeError::DataDir(_)) => false,
                node => started
                    .insert(node.expect("a small node starts"))
                    .cluster()
                    .alone()
                    .is_none(),
            },
        )
        .await;
        self.nodes[number] = started;
    }

    /// The settings node `number` would be started with now.
    #[must_use]
    pub fn config(&self, number: usize) -> Config {
        let mut config = small(self.dirs[number].path());
        config.join_ramp = Duration::ZERO;
        config.join = self
            .running()
            .map(|node| HostPort::from(node.grpc_addr()))
            .collect();
        (self.change)(number, &mut config);
        config
    }

    /// Node `number`.
    ///
    /// # Panics
    /// When it is down.
    #[must_use]
    pub fn node(&self, number: usize) -> &Node {
        self.nodes[number].as_ref().expect("it runs")
    }

    /// Name of node `number`.
    ///
    /// # Panics
    /// When it is down.
    #[must_use]
    pub fn id(&self, number: usize) -> MemberId {
        self.node(number).cluster().me().clone()
    }

    /// Those that run.
    pub fn running(&self) -> impl Iterator<Item = &Node> {
        self.nodes.iter().flatten()
    }

    /// Cuts node `number` off in the middle of whatever it does, as a crash would: nothing is said, nothing is saved.
    pub fn kill(&mut self, number: usize) {
        drop(self.nodes[number].take());
    }

    /// Stops node `number` in an orderly way; it does not leave the cluster.
    pub async fn stop(&mut self, number: usize) {
        if let Some(node) = self.nodes[number].take() {
            node.shutdown(HANG).await;
        }
    }

    /// Waits until all that run see the same view, with so many members in it.
    pub async fn agreed(&self, members: usize) {
        let what = format!("{members} members in every view");
        eventually(&what, || self.agrees(members)).await;
    }

    /// Whether all that run see the same view, with so many members in it that are active or draining.
    #[must_use]
    pub fn agrees(&self, members: usize) -> bool {
        let digests: Vec<_> = self.running().map(|node| node.cluster().digest()).collect();
        let counts = |node: &Node| {
            let roster = node.cluster().roster();
            let settled = |m: &&kvproto::Member| m.state != MemberState::Joining;
            roster.present().filter(settled).count() == members
        };
        digests.windows(2).all(|pair| pair[0] == pair[1]) && self.running().all(counts)
    }

    /// Waits until all that run but itself suspect the member, or know it gone.
    pub async fn noticed(&self, id: &MemberId) {
        let what = format!("{id} is missed by all");
        eventually(&what, || self.misses(id)).await;
    }

    /// Whether all that run but itself suspect the member, or know it gone.
    #[must_use]
    pub fn misses(&self, id: &MemberId) -> bool {
        let mut others = self.running().filter(|node| node.cluster().me() != id);
        others.all(|node| node.cluster().standing(id) != Standing::Well)
    }
}
