//! A fleet of `kvserver` processes, each in a namespace of its own, and everything that can happen to one.
//!
//! ```text
//! Fleet ── seats[i]: namespace n<i>, 10.77.0.<i>:7070, its folder, its log, its process ── or nothing, while it is down
//!    │        kill · freeze, thaw · stop (SIGTERM) · start again over the same folder · wipe
//!    ├── Network: divide, heal, slow, quick
//!    └── views ── Cluster service over each node's Unix socket, which no network divides
//! ```
//!
//! Units: durations, members. Errors: what does not come within its time fails the test, and the logs' ends are shown.

#![allow(
    clippy::print_stdout,
    reason = "what a scenario measures is shown with --nocapture"
)]

use std::{
    collections::BTreeMap,
    fs::{self, File},
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{Child, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use kvproto::v1::{self, blocks_client::BlocksClient, cluster_client::ClusterClient};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tonic::{
    Request,
    transport::{Channel, Endpoint},
};

use crate::{
    load::{Load, Plan},
    namespaces::{Network, Side},
    patience::{HANG, until, within_awake},
};

/// Where all nodes listen.
const PORT: u16 = 7070;

/// How long a node has to say what it sees.
const ANSWER: Duration = Duration::from_secs(1);

/// Lines of each node's log that a failed test shows.
const LOG_LINES: usize = 40;

/// Programs of the tests' package, which knows where they are.
#[derive(Clone, Copy, Debug)]
pub struct Programs {
    /// `kvserver`.
    pub node: &'static str,
    /// `checking_load`.
    pub load: &'static str,
}

/// Nodes, their network, and their folders.
pub struct Fleet {
    /// What connects them.
    pub network: Network,
    programs: Programs,
    folder: TempDir,
    settings: Vec<String>,
    seats: Vec<Seat>,
    loads: usize,
}

struct Seat {
    data: PathBuf,
    log: PathBuf,
    node: Option<Node>,
}

struct Node {
    child: Child,
    /// Over its Unix socket, as soon as it listens.
    channel: Channel,
}

/// The cluster as one node sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sight {
    /// Of its view.
    pub digest: u64,
    /// Whether runs may still lie where they were.
    pub is_young: bool,
    /// State and standing of each member by its name, which is its number in the fleet.
    pub members: BTreeMap<String, (v1::MemberState, v1::Standing)>,
}

impl Sight {
    /// Members that are neither gone nor on their way in.
    #[must_use]
    pub fn settled(&self) -> usize {
        let here = |state| matches!(state, v1::MemberState::Active | v1::MemberState::Draining);
        self.members
            .values()
            .filter(|(state, _)| here(*state))
            .count()
    }

    /// Whether a member is silent, gone or unknown.
    #[must_use]
    pub fn misses(&self, node: usize) -> bool {
        let member = self.members.get(&name(node));
        member.is_none_or(|(_, standing)| *standing != v1::Standing::Well)
    }
}

fn name(node: usize) -> String {
    format!("n{}", node + 1)
}

fn address(node: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, 0, u8::try_from(node + 1).expect("few nodes"))
}

impl Fleet {
    /// `count` nodes that are one cluster, each with these settings (`--name=value`) beside its own.
    ///
    /// # Panics
    /// When they do not become one.
    pub async fn start(programs: Programs, count: usize, settings: &[&str]) -> Self {
        let mut fleet = Self {
            network: Network::new(),
            programs,
            folder: TempDir::new().expect("a temporary folder"),
            settings: settings.iter().map(ToString::to_string).collect(),
            seats: Vec::new(),
            loads: 0,
        };
        for _ in 0..count {
            fleet.seat();
        }
        for node in 0..count {
            fleet.start_node(node);
            if node == 0 {
                // Told of nobody but itself it begins; the others find it there.
                until("the first node answers", async || {
                    fleet.sight(0).await.is_some()
                })
                .await;
            }
        }
        fleet.is_one(count, HANG).await;
        fleet
    }

    /// A place for one more node. Answers its number.
    pub fn seat(&mut self) -> usize {
        let node = self.seats.len();
        self.network.place(&name(node), address(node));
        self.seats.push(Seat {
            data: self.folder.path().join(name(node)),
            log: self.folder.path().join(format!("{}.log", name(node))),
            node: None,
        });
        node
    }

    /// Starts a node over whatever is in its folder, and tells it of those that run.
    ///
    /// # Panics
    /// When the process cannot be made.
    pub fn start_node(&mut self, node: usize) {
        let others = self.running().into_iter().chain([node]);
        let join: Vec<String> = others
            .map(|other| format!("{}:{PORT}", address(other)))
            .collect();
        let seat = &self.seats[node];
        let log = File::options()
            .create(true)
            .append(true)
            .open(&seat.log)
            .expect("a log");
        let child = self
            .network
            .command(&name(node), self.programs.node)
            .arg("--data-dir")
            .arg(&seat.data)
            .args([
                format!("--node-id={}", name(node)),
                format!("--listen={}:{PORT}", address(node)),
                format!("--join={}", join.join(",")),
            ])
            .args([
                "--http-listen=off",
                // Large enough for a ramp to have its steps.
                "--weight=100",
                "--ram-bytes=64MiB",
                "--nvme-bytes=128MiB",
                "--durable-bytes=0",
                "--nvme-wear-bytes-per-day=0",
                "--nvme-admission=open",
                "--huge-pages=false",
                "--prefault=false",
                "--worker-threads=2",
                "--log=info",
            ])
            .args(&self.settings)
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a file"))
            .stderr(log)
            .spawn()
            .expect("a process");
        let socket = seat.data.join("terrace.sock");
        let endpoint = Endpoint::from_shared(format!("unix:{}", socket.display()));
        let channel = endpoint
            .expect("an endpoint")
            .connect_timeout(ANSWER)
            .connect_lazy();
        self.seats[node].node = Some(Node { child, channel });
    }

    /// Nodes that run.
    #[must_use]
    pub fn running(&self) -> Vec<usize> {
        (0..self.seats.len())
            .filter(|node| self.seats[*node].node.is_some())
            .collect()
    }

    fn signal(&self, node: usize, signal: Signal) {
        let child = &self.seats[node].node.as_ref().expect("it runs").child;
        let pid = Pid::from_raw(child.id() as i32).expect("a process id");
        kill_process(pid, signal).expect("the process is ours");
    }

    /// `kill -9`.
    ///
    /// # Panics
    /// When it does not run.
    pub fn kill(&mut self, node: usize) {
        let mut process = self.seats[node].node.take().expect("it runs");
        process.child.kill().expect("SIGKILL");
        process.child.wait().expect("it ends");
    }

    /// Stops a process in the middle of whatever it does.
    ///
    /// # Panics
    /// When it does not run.
    pub fn freeze(&self, node: usize) {
        self.signal(node, Signal::STOP);
    }

    /// Lets it go on.
    ///
    /// # Panics
    /// When it does not run.
    pub fn thaw(&self, node: usize) {
        self.signal(node, Signal::CONT);
    }

    /// Asks a node to end, and waits until it has.
    ///
    /// # Panics
    /// When it does not, or not well.
    pub async fn stop(&mut self, node: usize) {
        self.signal(node, Signal::TERM);
        let mut ended: Option<ExitStatus> = None;
        until(&format!("{} ends", name(node)), async || {
            let process = self.seats[node].node.as_mut().expect("it runs");
            ended = process.child.try_wait().expect("our own process");
            ended.is_some()
        })
        .await;
        self.seats[node].node = None;
        assert!(ended.is_some_and(|status| status.success()), "{ended:?}");
    }

    /// Forgets what a node that is down had on its disk.
    ///
    /// # Panics
    /// When it runs.
    pub fn wipe(&self, node: usize) {
        let seat = &self.seats[node];
        assert!(seat.node.is_none(), "it runs");
        fs::remove_dir_all(&seat.data).expect("its folder");
    }

    /// Puts these nodes, and these loads by their numbers, on the other side; nothing passes between the sides.
    ///
    /// # Panics
    /// When there are no such places.
    pub fn divide(&self, nodes: &[usize], loads: &[usize]) {
        self.put_on(Side::Right, nodes, loads);
    }

    /// And back.
    ///
    /// # Panics
    /// As there.
    pub fn heal(&self, nodes: &[usize], loads: &[usize]) {
        self.put_on(Side::Left, nodes, loads);
    }

    fn put_on(&self, side: Side, nodes: &[usize], loads: &[usize]) {
        let names = nodes.iter().map(|node| name(*node));
        let loads = loads.iter().map(|load| load_name(*load));
        names
            .chain(loads)
            .for_each(|name| self.network.set_side(&name, side));
    }

    /// The name of a node's place in the network.
    #[must_use]
    pub fn place(&self, node: usize) -> String {
        name(node)
    }

    /// A load in a place of its own, which knows the nodes that run. Loads are numbered from 0.
    ///
    /// # Panics
    /// When it does not start.
    pub fn load(&mut self, plan: &Plan) -> Load {
        let place = load_name(self.loads);
        let number = u8::try_from(self.loads + 1).expect("few loads");
        self.loads += 1;
        self.network.place(&place, Ipv4Addr::new(10, 77, 1, number));
        let seeds: Vec<String> = self
            .running()
            .into_iter()
            .map(|node| format!("{}:{PORT}", address(node)))
            .collect();
        let plan = Plan {
            seeds: seeds.join(","),
            seed: u64::from(number),
            ..plan.clone()
        };
        Load::start(&self.network, &place, Path::new(self.programs.load), &plan)
    }

    /// What a node sees; `None`: it does not say.
    pub async fn sight(&self, node: usize) -> Option<Sight> {
        let channel = self.seats[node].node.as_ref()?.channel.clone();
        let mut request = Request::new(v1::ViewRequest::default());
        request.set_timeout(ANSWER);
        let mut client = ClusterClient::new(channel);
        let view = within_awake(ANSWER, client.view(request))
            .await?
            .ok()?
            .into_inner();
        let members = view.members.iter().filter_map(|seen| {
            let member = seen.member.as_ref()?;
            Some((member.id.clone(), (member.state(), seen.standing())))
        });
        Some(Sight {
            digest: view
                .context
                .as_ref()
                .map_or(0, |context| context.view_digest),
            is_young: view.young,
            members: members.collect(),
        })
    }

    /// What each of these sees; `None` while one does not say.
    pub async fn sights(&self, nodes: &[usize]) -> Option<Vec<Sight>> {
        join_all(nodes.iter().map(|node| self.sight(*node)))
            .await
            .into_iter()
            .collect()
    }

    /// Blocks that a node has in memory; `None`: it does not say.
    pub async fn held(&self, node: usize) -> Option<u64> {
        let channel = self.seats[node].node.as_ref()?.channel.clone();
        let mut request = Request::new(v1::StatsRequest::default());
        request.set_timeout(ANSWER);
        let mut client = BlocksClient::new(channel);
        let stats = within_awake(ANSWER, client.stats(request)).await?;
        let tiers = stats.ok()?.into_inner().tiers;
        let ram = tiers.iter().find(|tier| tier.tier() == v1::Tier::Ram)?;
        Some(ram.blocks)
    }

    /// Waits until each of these has so many blocks in memory. Answers how long that took.
    ///
    /// # Panics
    /// When one does not within `limit`, less what the machine has kept this process from running.
    pub async fn hold(
        &self,
        what: &str,
        limit: Duration,
        nodes: &[usize],
        blocks: u64,
    ) -> Duration {
        let began = now();
        let counts = async || join_all(nodes.iter().map(|node| self.held(*node))).await;
        let all = until(what, async || {
            counts().await.iter().all(|held| *held == Some(blocks))
        });
        if within_awake(limit, all).await.is_none() {
            let counts = counts().await;
            panic!("not within {limit:?}: {what}: {counts:?} of {blocks}");
        }
        let took = began.elapsed();
        println!("  {what}: {:.2} s", took.as_secs_f64());
        took
    }

    /// Waits until these see something. Answers how long that took.
    ///
    /// # Panics
    /// When it is not so within `limit`, less what the machine has kept this process from running.
    pub async fn see(
        &self,
        what: &str,
        limit: Duration,
        nodes: &[usize],
        is_so: impl Fn(&[Sight]) -> bool,
    ) -> Duration {
        let began = now();
        let seen = until(what, async || {
            self.sights(nodes)
                .await
                .is_some_and(|sights| is_so(&sights))
        });
        let is_seen = within_awake(limit, seen).await.is_some();
        let took = began.elapsed();
        if !is_seen {
            let sights = self.sights(nodes).await;
            panic!("not within {limit:?}: {what}: {sights:#?}");
        }
        println!("  {what}: {:.2} s", took.as_secs_f64());
        took
    }

    /// Waits until all that run are one cluster of so many, by equal views in which nobody is missed.
    ///
    /// # Panics
    /// When they are not in time.
    pub async fn is_one(&self, members: usize, limit: Duration) -> Duration {
        let what = format!("{members} nodes agree");
        let running = self.running();
        self.see(&what, limit, &running, |sights| {
            agree(sights, members) && sights.iter().all(nobody_is_suspect)
        })
        .await
    }

    /// Has a node hand over what it has and leave. Answers its last word.
    ///
    /// # Panics
    /// When it says nothing.
    pub async fn drain(&self, node: usize, deadline: Duration) -> v1::DrainResponse {
        let channel = self.seats[node]
            .node
            .as_ref()
            .expect("it runs")
            .channel
            .clone();
        let mut request = Request::new(v1::DrainRequest {
            node_id: name(node),
            deadline_ms: u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX),
            ..v1::DrainRequest::default()
        });
        request.set_timeout(deadline + ANSWER);
        let draining = ClusterClient::new(channel).drain(request).await;
        let mut told = draining
            .expect("a node that runs can be drained")
            .into_inner();
        let mut last = None;
        while let Some(step) = told.message().await.expect("it says how far it is") {
            last = Some(step);
        }
        last.expect("it says something")
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        for (node, seat) in self.seats.iter_mut().enumerate() {
            if let Some(process) = &mut seat.node {
                let _ = process.child.kill();
                let _ = process.child.wait();
            }
            if std::thread::panicking()
                && let Ok(log) = fs::read_to_string(&seat.log)
            {
                let lines: Vec<&str> = log.lines().collect();
                println!("---- the end of {}'s log", name(node));
                let end = &lines[lines.len().saturating_sub(LOG_LINES)..];
                end.iter().for_each(|line| println!("{line}"));
            }
        }
    }
}

fn load_name(load: usize) -> String {
    format!("c{}", load + 1)
}

/// Whether views are equal, with so many members in them.
#[must_use]
pub fn agree(sights: &[Sight], members: usize) -> bool {
    let equal = sights
        .windows(2)
        .all(|pair| pair[0].digest == pair[1].digest);
    equal && sights.iter().all(|sight| sight.settled() == members)
}

/// Whether a node misses nobody who is here.
#[must_use]
pub fn nobody_is_suspect(sight: &Sight) -> bool {
    let mut members = sight.members.values();
    members.all(|(_, standing)| *standing != v1::Standing::Suspect)
}

#[expect(clippy::disallowed_methods, reason = "real processes run on real time")]
fn now() -> Instant {
    Instant::now()
}
