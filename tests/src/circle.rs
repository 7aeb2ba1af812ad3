//! Nodes in this process that know each other because a test says so.
//!
//! ```text
//! one secret ─► node n0, node n1, … (each a [`TestNode`]) ─ acquaint ─► each knows all
//! ```
//!
//! Why they are introduced by hand: what a test asks about is what nodes and clients do by the views they have, and
//! then it says when who learns what.

use std::{net::UdpSocket, path::PathBuf};

use kvproto::{Member, MemberId, MemberState};
use kvserver::config::Config;
use parking_lot::Mutex;
use tempfile::TempDir;

use crate::{node::TestNode, patience::private_loopback};

/// Nodes that have one secret, and know whom the test tells them of.
pub struct Circle {
    /// The nodes, by their numbers.
    pub nodes: Vec<TestNode>,
    secret: TempDir,
    /// Held so that no node's gossip can have them.
    taken: Vec<UdpSocket>,
}

impl Circle {
    /// So many small nodes, `n0` and on, that know each other.
    ///
    /// # Panics
    /// When one cannot be started.
    pub async fn start(count: usize) -> Self {
        let cluster = Self::start_strangers(count, |_| {}).await;
        cluster.acquaint(0..count);
        cluster
    }

    /// So many small nodes with some settings changed, each of which knows itself alone.
    ///
    /// # Panics
    /// When one cannot be started.
    pub async fn start_strangers(count: usize, change: impl Fn(&mut Config)) -> Self {
        let secret = TempDir::new().expect("a temporary folder");
        std::fs::write(secret.path().join("secret"), [7; 32]).expect("a file");
        let mut cluster = Self {
            nodes: Vec::new(),
            secret,
            taken: Vec::new(),
        };
        for number in 0..count {
            let node = cluster.another(&format!("n{number}"), &change).await;
            cluster.nodes.push(node);
        }
        cluster
    }

    /// So many strangers without gossip, because somebody else has their UDP ports: what one of them learns it learns
    /// from calls, and whom it misses a call has missed.
    ///
    /// # Panics
    /// When one cannot be started.
    pub async fn start_deaf(count: usize) -> Self {
        let taken = Mutex::new(Vec::new());
        let mut circle = Self::start_strangers(count, |config| {
            let udp = UdpSocket::bind(private_loopback()).expect("a free port");
            config.listen = udp.local_addr().expect("a bound socket has an address");
            taken.lock().push(udp);
        })
        .await;
        circle.taken = taken.into_inner();
        for node in &circle.nodes {
            assert!(node.node.cluster().alone().is_some(), "it cannot gossip");
        }
        circle
    }

    /// A node with the cluster's secret that is none of its members.
    ///
    /// # Panics
    /// When it cannot be started.
    pub async fn another(&self, id: &str, change: impl Fn(&mut Config)) -> TestNode {
        let secret_file = self.secret_file();
        TestNode::start(|config| {
            config.node_id = id.to_owned();
            config.secret_file = secret_file;
            config.weight = 1;
            change(config);
        })
        .await
    }

    /// Where the secret is.
    #[must_use]
    pub fn secret_file(&self) -> PathBuf {
        self.secret.path().join("secret")
    }

    /// What node `number` declares of itself.
    #[must_use]
    pub fn member(&self, number: usize) -> Member {
        member(&self.nodes[number])
    }

    /// Each of these nodes learns of all of these.
    pub fn acquaint(&self, numbers: impl Iterator<Item = usize> + Clone) {
        for number in numbers.clone() {
            self.tell(number, numbers.clone().map(|other| self.member(other)));
        }
    }

    /// Node `number` learns of these.
    pub fn tell(&self, number: usize, members: impl IntoIterator<Item = Member>) {
        self.nodes[number].node.blocks().cluster().merge(members);
    }

    /// Where node `number` listens.
    #[must_use]
    pub fn endpoint(&self, number: usize) -> String {
        self.nodes[number].node.endpoint()
    }

    /// Leases that node `number` holds.
    #[must_use]
    pub fn leases(&self, number: usize) -> u64 {
        self.nodes[number].node.blocks().stats().leases
    }

    /// Stops all nodes.
    pub async fn stop(self) {
        for node in self.nodes {
            node.stop().await;
        }
    }
}

/// What a node declares of itself.
///
/// # Panics
/// Never: a node knows itself.
#[must_use]
pub fn member(node: &TestNode) -> Member {
    let cluster = node.node.blocks().cluster();
    let roster = cluster.roster();
    roster.view.get(cluster.me()).expect("itself").clone()
}

/// A member that nobody has started: `address` answers as the test lets it.
#[must_use]
pub fn pretended(id: &str, address: &str) -> Member {
    Member {
        id: MemberId(id.to_owned()),
        generation: 1,
        version: 1,
        weight: 1,
        zone: String::new(),
        state: MemberState::Active,
        address: address.to_owned(),
    }
}
