//! The nodes of a client: those it was told at first, and the members it has learned of since.
//!
//! ```text
//! endpoints ─► seeds ──┬─ one node: home, and nothing else is looked at
//!                      └─ an answer brings members ─► View ─► Roster { Table, a Node per member }
//!                                                                        └─ Inner: pool, lanes, breaker, same-host path;
//!                                                                           made with its first call, closed when its
//!                                                                           member is gone and nobody uses it any more
//! ```
//!
//! All nodes of a client share owner, clock, credential and the budget for repeats; each has its own connections
//! and its own standing.
//!
//! Where a run lies with two members, the one with less to do is asked (`choice`).
//!
//! Units: members.
//! Errors: those of the calls.
//! Why the view is apart from the nodes: every node's answers are news for it, and a node must not keep its fellows
//! open.

mod attend;
pub(crate) mod choice;
pub(crate) mod get;
pub(crate) mod lookup;
pub(crate) mod put;
pub(crate) mod share;
#[cfg(test)]
mod tests;
mod views;

use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use http::HeaderValue;
use kvproto::{Member, MemberId, OwnerId, key::RunHash, v1};
use parking_lot::Mutex;
use tokio::sync::mpsc;

pub(crate) use self::views::Views;
use crate::{
    call::{self, Deadline, Inner},
    clock::{Clock, Tick},
    endpoint::Endpoint,
    error::Error,
    lane::Lanes,
    lease::{self, MAX_RELEASES},
    link::Tuning,
    local::Local,
    open::Opened,
    path::{LocalPath, MemberPath, PathReport},
    pool::Pool,
    queue::Queue,
    retry::{Breaker, BreakerPolicy, BreakerState, RetryBudget, RetryPolicy},
    route::Table,
    watch::Watched,
    wire::Method,
};

/// Members beside the endpoints given that are asked, one after the other, for what any node can answer.
const MAX_ASKED: usize = 8;

/// How often the cluster is told of one member that does not answer, and how long that may take.
const REPORT_PAUSE: Duration = Duration::from_secs(1);

/// What every node of a client is made from.
pub(crate) struct Recipe {
    pub(crate) connections: usize,
    pub(crate) lanes: usize,
    pub(crate) parallel: usize,
    pub(crate) local: LocalPath,
    pub(crate) tuning: Tuning,
    pub(crate) retry: RetryPolicy,
    pub(crate) breaker: BreakerPolicy,
    pub(crate) budget: Arc<RetryBudget>,
    pub(crate) token: Option<String>,
    pub(crate) authorization: Option<HeaderValue>,
    pub(crate) owner: OwnerId,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) views: Arc<Views>,
    /// Drives the connections.
    pub(crate) runtime: tokio::runtime::Handle,
}

impl Recipe {
    /// A node, nothing of which is open yet.
    pub(crate) fn make(&self, endpoint: Endpoint, local: LocalPath) -> Arc<Inner> {
        let _inside = self.runtime.enter();
        let (releases, dropped) = mpsc::channel(MAX_RELEASES);
        let breaker = Breaker::new(self.breaker);
        let inner = Arc::new(Inner {
            pool: Pool::new(
                &endpoint,
                self.connections,
                self.tuning,
                &self.clock,
                breaker,
            ),
            lanes: Lanes::new(endpoint.clone(), self.lanes),
            local: Local::new(local, self.token.clone(), self.owner, self.lanes),
            endpoint,
            clock: self.clock.clone(),
            retry: self.retry,
            budget: self.budget.clone(),
            owner: self.owner,
            authorization: self.authorization.clone(),
            boot: AtomicU64::new(0),
            reboots: AtomicU64::new(0),
            releases,
            parallel: self.parallel,
            views: self.views.clone(),
            opened: Opened::default(),
            queue: Queue::default(),
        });
        self.runtime
            .spawn(lease::release_dropped(Arc::downgrade(&inner), dropped));
        inner
    }
}

/// One member, and the way to it once somebody has used it.
pub(crate) struct Node {
    id: MemberId,
    address: String,
    inner: OnceLock<Result<Arc<Inner>, String>>,
    /// When the others were last told that it does not answer.
    reported: Mutex<Option<Tick>>,
}

/// Who owns what, and the nodes of the members by their numbers. Shared by the calls made by one view.
pub(crate) struct Roster {
    version: u64,
    table: Arc<Table>,
    before: Option<Arc<Table>>,
    nodes: Vec<Arc<Node>>,
    recipe: Arc<Recipe>,
}

impl Roster {
    /// The number of the member that owns `run`.
    pub(crate) fn owner(&self, run: &RunHash) -> usize {
        // When nobody takes runs (all of them leave), whoever is asked says what it still holds.
        self.table.owner(run).unwrap_or(0)
    }

    /// The numbers of the members that hold `run`, the first owner first.
    pub(crate) fn owners(&self, run: &RunHash, replicas: usize) -> Vec<usize> {
        if replicas < 2 {
            return vec![self.owner(run)];
        }
        self.table.owners(run, replicas)
    }

    /// The numbers of all that may have `run`: its owners, and who has it for a while because many read it.
    pub(crate) fn readers(&self, run: &RunHash, replicas: usize) -> Vec<usize> {
        let mut readers = self.owners(run, replicas);
        if let Some(second) = self.second(run, self.recipe.clock.now())
            && !readers.contains(&second)
        {
            readers.push(second);
        }
        readers
    }

    /// Who comes after the owners of `run`: its second owner, if it has one for a while.
    pub(crate) fn next(&self, run: &RunHash, replicas: usize) -> Option<usize> {
        let owners = replicas.max(1);
        self.table.owners(run, owners + 1).get(owners).copied()
    }

    /// Whether others are to be asked before a member: it gave no answer last time, and no sign of life since.
    pub(crate) fn is_silent(&self, member: usize) -> bool {
        let is_hurt = |inner: &Inner| inner.pool.breaker.is_hurt();
        self.in_use(member).is_some_and(is_hurt)
    }

    /// Of these, the first that is not silent; where all are, the first.
    pub(crate) fn likeliest(&self, members: impl Iterator<Item = usize>) -> Option<usize> {
        let mut members = members.peekable();
        let first = members.peek().copied();
        members.find(|member| !self.is_silent(*member)).or(first)
    }

    fn second(&self, run: &RunHash, now: Tick) -> Option<usize> {
        self.table.number(&self.recipe.views.second(run, now)?)
    }

    /// Whether some run may have a second owner.
    pub(crate) fn names_seconds(&self) -> bool {
        self.recipe.views.names_seconds()
    }

    /// `member` lacked what it was said to have beside its owner.
    pub(crate) fn shun(&self, run: &RunHash) {
        self.recipe.views.shun(run);
    }

    /// A member that this client has asked before.
    pub(crate) fn in_use(&self, member: usize) -> Option<&Inner> {
        let inner = self.nodes[member].inner.get()?;
        inner.as_ref().ok().map(|inner| &**inner)
    }

    /// The number of the member that owned `run` before the last change, if it is another and still here.
    pub(crate) fn owner_before(&self, run: &RunHash) -> Option<usize> {
        let before = self.before.as_ref()?;
        let id = &before.members()[before.owner(run)?].id;
        self.table
            .number(id)
            .filter(|member| *member != self.owner(run))
    }

    /// The number that a member of another roster has in this one.
    pub(crate) fn number_of(&self, other: &Self, member: usize) -> Option<usize> {
        self.table.number(&other.nodes[member].id)
    }

    /// Whether both have the same owners.
    pub(crate) fn agrees(&self, other: &Self) -> bool {
        self.table.digest() == other.table.digest()
    }

    /// The number of the member at an endpoint that is in use.
    pub(crate) fn at(&self, endpoint: &Endpoint) -> Option<usize> {
        let is_it = |node: &Arc<Node>| match node.inner.get() {
            Some(Ok(inner)) => inner.endpoint == *endpoint,
            _ => false,
        };
        self.nodes.iter().position(is_it)
    }

    /// The way to a member.
    ///
    /// # Errors
    /// [`Error::Endpoint`] when it declares an address that nobody can use.
    pub(crate) fn node(&self, member: usize) -> Result<&Arc<Inner>, Error> {
        let node = &self.nodes[member];
        let inner = node.inner.get_or_init(|| {
            let endpoint: Endpoint = node.address.parse().map_err(|_| node.address.clone())?;
            // A told path is one node's; the others say where theirs are.
            let local = match &self.recipe.local {
                LocalPath::Off => LocalPath::Off,
                LocalPath::Auto | LocalPath::At(_) => LocalPath::Auto,
            };
            Ok(self.recipe.make(endpoint, local))
        });
        inner.as_ref().map_err(|address| Error::Endpoint {
            endpoint: address.clone(),
            problem: "a member of the cluster declares this address, which cannot be used",
        })
    }

    /// A call to a member failed: the cluster is told, which looks at it at once, and the next request asks where
    /// everybody is, because a digest covers who owns what and not where they are reached.
    pub(crate) fn hurt(&self, member: usize, error: &Error) {
        if error.is_endpoint_failure() {
            self.recipe.views.doubt();
            self.report(member);
        }
    }

    /// Tells a member that is well of one that does not answer, now and then; nobody waits for it.
    pub(crate) fn report(&self, member: usize) {
        let (node, recipe) = (&self.nodes[member], &self.recipe);
        let now = recipe.clock.now();
        let is_told = |at: Option<Tick>| at.is_some_and(|at| now.since(at) < REPORT_PAUSE);
        let mut reported = node.reported.lock();
        if is_told(*reported) {
            return;
        }
        let others = self
            .nodes
            .iter()
            .enumerate()
            .filter(|(other, _)| *other != member);
        let mut made = others.filter_map(|(_, other)| other.inner.get()?.as_ref().ok());
        let Some(well) = made.find(|inner| inner.is_well()).cloned() else {
            return;
        };
        *reported = Some(now);
        let hurt = node.inner.get().and_then(|inner| inner.as_ref().ok());
        let boot_id = hurt.map_or(0, |inner| inner.boot.load(Ordering::Relaxed));
        let node_id = node.id.0.clone();
        let deadline = Deadline::after(&*recipe.clock, REPORT_PAUSE);
        recipe.runtime.spawn(async move {
            let answer: Result<v1::ReportResponse, Error> =
                call::unary(&well, Method::REPORT, deadline, |context| {
                    v1::ReportRequest {
                        context: Some(context),
                        node_id: node_id.clone(),
                        boot_id,
                    }
                })
                .await;
            match answer {
                Ok(answer) => {
                    well.heard(answer.context.as_ref());
                }
                Err(error) => tracing::debug!(%error, "a report was not heard"),
            }
        });
    }

    /// Whether a member other than those that have just `failed` is known to answer.
    pub(crate) fn is_anybody_well(&self, failed: impl Fn(usize) -> bool) -> bool {
        let mut nodes = self.nodes.iter().enumerate();
        nodes.any(|(member, node)| match node.inner.get() {
            Some(Ok(inner)) => !failed(member) && inner.is_well(),
            _ => false,
        })
    }

    /// The members in use.
    fn made(&self) -> impl Iterator<Item = &Arc<Inner>> {
        let inners = self.nodes.iter().filter_map(|node| node.inner.get());
        inners.filter_map(|inner| inner.as_ref().ok())
    }

    /// Members that can be reached at all, at most so many.
    fn some(&self, most: usize) -> Vec<Arc<Inner>> {
        let numbers = 0..self.nodes.len();
        let nodes = numbers.filter_map(|member| self.node(member).ok().cloned());
        nodes.take(most).collect()
    }
}

/// All nodes of a client.
pub(crate) struct Fleet {
    pub(crate) recipe: Arc<Recipe>,
    seeds: Vec<Arc<Inner>>,
    /// The seed that answered last.
    home: AtomicUsize,
    roster: Mutex<Option<Arc<Roster>>>,
}

impl Fleet {
    /// A client's nodes, at first those at `endpoints`, of which there is at least one.
    pub(crate) fn new(recipe: Recipe, endpoints: Vec<Endpoint>) -> Self {
        let local = |first: bool| match &recipe.local {
            LocalPath::At(_) if !first => LocalPath::Auto,
            local => local.clone(),
        };
        let endpoints = endpoints.into_iter().enumerate();
        Self {
            seeds: endpoints
                .map(|(i, endpoint)| recipe.make(endpoint, local(i == 0)))
                .collect(),
            recipe: Arc::new(recipe),
            home: AtomicUsize::new(0),
            roster: Mutex::default(),
        }
    }

    /// The node that this client was told of: all there is, until a cluster shows itself.
    pub(crate) fn home(&self) -> &Arc<Inner> {
        &self.seeds[self.home.load(Ordering::Relaxed)]
    }

    /// What of the time of a call a round of it may take, where others may be asked after it or not.
    pub(crate) fn part(&self, deadline: Deadline, has_others: bool) -> Deadline {
        let clock = &*self.recipe.clock;
        match has_others {
            false => deadline,
            true => Deadline::after(clock, deadline.left(clock.now()) * 3 / 4),
        }
    }

    /// Who owns what; `None` while one node is all there is.
    pub(crate) fn roster(&self) -> Option<Arc<Roster>> {
        let views = &self.recipe.views;
        if !views.is_cluster() {
            return None;
        }
        let version = views.version();
        let mut roster = self.roster.lock();
        if let Some(roster) = roster.as_ref().filter(|roster| roster.version >= version) {
            return Some(roster.clone());
        }
        let (table, before, version) = views.tables();
        let old = roster.take();
        let nodes = table.members().iter();
        let nodes = nodes
            .map(|member| self.node_of(member, old.as_deref()))
            .collect();
        let fresh = Arc::new(Roster {
            version,
            table,
            before,
            nodes,
            recipe: self.recipe.clone(),
        });
        *roster = Some(fresh.clone());
        Some(fresh)
    }

    /// The node that a member has had, or one to be made with its first use.
    fn node_of(&self, member: &Member, old: Option<&Roster>) -> Arc<Node> {
        let known = old.and_then(|old| Some(&old.nodes[old.table.number(&member.id)?]));
        if let Some(known) = known.filter(|known| known.address == member.address) {
            return known.clone();
        }
        let endpoint: Option<Endpoint> = member.address.parse().ok();
        let mut seeds = self.seeds.iter();
        let seed = seeds.find(|seed| endpoint.as_ref() == Some(&seed.endpoint));
        Arc::new(Node {
            id: member.id.clone(),
            address: member.address.clone(),
            inner: seed.map_or_else(OnceLock::new, |seed| OnceLock::from(Ok(seed.clone()))),
            reported: Mutex::default(),
        })
    }

    /// Whom to ask what any node can answer, likeliest first; only home while it is all there is.
    pub(crate) fn anybody(&self) -> Vec<Arc<Inner>> {
        let home = self.home();
        let roster = self.roster();
        if roster.is_none() && self.seeds.len() == 1 {
            return vec![home.clone()];
        }
        let members = roster.map_or_else(Vec::new, |roster| roster.some(MAX_ASKED));
        let mut all = vec![home.clone()];
        for inner in self.seeds.iter().cloned().chain(members) {
            if !all.iter().any(|known| known.endpoint == inner.endpoint) {
                all.push(inner);
            }
        }
        // Stable: home stays first among equals.
        all.sort_by_key(|inner| inner.pool.breaker.state() != BreakerState::Closed);
        all
    }

    /// Every node that may hold something: the members, or home.
    pub(crate) fn everybody(&self) -> Vec<Arc<Inner>> {
        match self.roster() {
            Some(roster) => roster.some(usize::MAX),
            None => vec![self.home().clone()],
        }
    }

    /// The members, with the way to each; home without a name while no cluster is known. Those that nobody can reach are
    /// left out.
    pub(crate) fn members(&self) -> Vec<(Watched, Arc<Inner>)> {
        let Some(roster) = self.roster() else {
            let home = self.home();
            let watched = Watched {
                id: String::new(),
                address: home.endpoint.to_string(),
            };
            return vec![(watched, home.clone())];
        };
        let member = |(number, node): (usize, &Arc<Node>)| {
            let watched = Watched {
                id: node.id.0.clone(),
                address: node.address.clone(),
            };
            Some((watched, roster.node(number).ok()?.clone()))
        };
        let nodes = roster.nodes.iter().enumerate();
        nodes.filter_map(member).collect()
    }

    /// `inner` answered: if it is one of those that the client was told of, it is the one to ask first.
    pub(crate) fn answered(&self, inner: &Arc<Inner>) {
        if let Some(at) = self.seeds.iter().position(|seed| Arc::ptr_eq(seed, inner)) {
            self.home.store(at, Ordering::Relaxed);
        }
    }

    /// What of `deadline` a node may use when others are to be asked after it: half of what is left.
    pub(crate) fn share(&self, deadline: Deadline, is_last: bool) -> Deadline {
        if is_last {
            return deadline;
        }
        let clock = &*self.recipe.clock;
        Deadline::after(clock, deadline.left(clock.now()) / 2)
    }

    /// How often a node was seen to have been restarted, all nodes together.
    pub(crate) fn reboots(&self) -> u64 {
        let nodes = self.in_use();
        let reboots = nodes
            .iter()
            .map(|inner| inner.reboots.load(Ordering::Relaxed));
        reboots.sum()
    }

    /// Whether calls pass: closed as long as they do to somebody.
    pub(crate) fn breaker(&self) -> BreakerState {
        let nodes = self.in_use();
        let states = nodes.iter().map(|inner| inner.pool.breaker.state());
        let rank = |state: &BreakerState| match state {
            BreakerState::Closed => 0,
            BreakerState::HalfOpen => 1,
            BreakerState::Open => 2,
        };
        states.min_by_key(rank).unwrap_or(BreakerState::Closed)
    }

    /// Which way blocks go, all members together, and each member's own report where there are several.
    pub(crate) fn path(&self) -> PathReport {
        let mut whole = self.home().local.report();
        let Some(roster) = self.roster.lock().clone() else {
            return whole;
        };
        let is_seed_home = |inner: &Arc<Inner>| Arc::ptr_eq(inner, self.home());
        for node in &roster.nodes {
            let Some(Ok(inner)) = node.inner.get() else {
                continue;
            };
            let report = inner.local.report();
            if !is_seed_home(inner) {
                whole.add(&report);
            }
            whole.members.push(MemberPath {
                member: node.id.0.clone(),
                address: node.address.clone(),
                path: report.path,
                why_grpc: report.why_grpc,
                failures: report.failures,
                local: report.local,
                grpc: report.grpc,
            });
        }
        whole
    }

    fn in_use(&self) -> Vec<Arc<Inner>> {
        let mut nodes = vec![self.home().clone()];
        if let Some(roster) = &*self.roster.lock() {
            let others = roster.made().filter(|inner| !Arc::ptr_eq(inner, &nodes[0]));
            let others: Vec<_> = others.cloned().collect();
            nodes.extend(others);
        }
        nodes
    }
}
