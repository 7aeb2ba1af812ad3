//! The client of a node, or of a cluster as one service.
//!
//! ```text
//! Client ─► Fleet ─┬─ one node ───────────────────────────► Inner ─► Tries ─► Pool ─► Link ─► one HTTP/2 stream
//!    │             └─ a cluster: split by owner, at once ─► Inner of each      (deadline, repeats, breaker)
//!    └─ NamespaceHandle: tokens ─► Chain
//! ```
//!
//! Which it is the nodes say with their answers. With one node there is nothing to split, and nothing is.
//!
//! Units: blocks, bytes; a deadline is the time of a whole call, repeats included.
//! Errors: [`Error::kind`] says what to do next. Every call returns within its deadline.
//! Its calls are beside this file, by subject; `watch`, `stats` and `namespaces` have
//! theirs.

mod get;
mod invalidate;
mod lookup;
mod put;

use std::{
    collections::HashSet,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use futures_util::future::join_all;
use kvproto::{BootId, Namespace};

pub use self::{
    get::split_buffers,
    invalidate::Target,
    lookup::{Lookup, LookupOptions},
};
use crate::{
    builder::ClientBuilder,
    call::{Deadline, Inner, Tries, Waits},
    error::Error,
    fleet::Fleet,
    namespace::NamespaceHandle,
    open::{self, Manner},
    path::PathReport,
    retry::BreakerState,
    wire::Method,
};

/// Times that those are asked who were not known before; a cluster that changes for longer is told by its members.
const MOST_ROUNDS: usize = 8;

/// The client of a node, or of the cluster that the node belongs to. Cheap to clone; clones share connections, leases'
/// owner and breakers.
#[derive(Clone)]
pub struct Client {
    pub(crate) fleet: Arc<Fleet>,
    pub(crate) deadline: Duration,
    pub(crate) waits: Waits,
}

impl Client {
    /// A connected client with default settings; see [`ClientBuilder`] for others. One endpoint, or several of one
    /// cluster with commas between them.
    ///
    /// # Errors
    /// As [`ClientBuilder::connect`].
    pub async fn connect(endpoint: &str) -> Result<Self, Error> {
        ClientBuilder::new(endpoint).connect().await
    }

    /// Settings for a client of the node at `endpoint`; several, with commas between them, are nodes of one cluster.
    pub fn builder(endpoint: &str) -> ClientBuilder {
        ClientBuilder::new(endpoint)
    }

    /// The same client with another deadline for its calls.
    #[must_use]
    pub fn with_deadline(&self, deadline: Duration) -> Self {
        Self {
            fleet: self.fleet.clone(),
            deadline,
            waits: self.waits,
        }
    }

    /// The life of the node that this client was told of, as it last answered; 0 before the first answer.
    #[must_use]
    pub fn boot_id(&self) -> BootId {
        BootId(self.fleet.home().boot.load(Ordering::Relaxed))
    }

    /// How often nodes were seen to have been restarted.
    #[must_use]
    pub fn reboots(&self) -> u64 {
        self.fleet.reboots()
    }

    /// Which way blocks go, why, and how many went each way; in a cluster also per member.
    #[must_use]
    pub fn path(&self) -> PathReport {
        self.fleet.path()
    }

    /// Whether calls pass; in a cluster, whether they do to anybody.
    #[must_use]
    pub fn breaker(&self) -> BreakerState {
        self.fleet.breaker()
    }

    /// Opens a namespace. With `strict` it is refused when its label is known with another fingerprint.
    ///
    /// # Errors
    /// [`Error::Request`] for a field out of range; [`Error::Refused`] with
    /// [`kvproto::Reason::NamespaceDiffers`].
    pub async fn open_namespace(
        &self,
        spec: &Namespace,
        strict: bool,
    ) -> Result<NamespaceHandle, Error> {
        self.open_replicated(spec, strict, 0).await
    }

    /// [`Client::open_namespace`], and from now on so many members of the cluster hold each of its runs, 1 to 8; 0: as it
    /// is, or as the nodes are set.
    ///
    /// # Errors
    /// As there.
    pub async fn open_replicated(
        &self,
        spec: &Namespace,
        strict: bool,
        replicas: u32,
    ) -> Result<NamespaceHandle, Error> {
        let manner = Manner {
            strict,
            replicas,
            aside: false,
        };
        self.open(spec, manner).await
    }

    /// As [`Client::open_replicated`], for tools: where another was opened last under its label that one stays so, and neither
    /// a strict caller nor a node's log is told of a difference.
    ///
    /// # Errors
    /// [`Error::Request`] for a field out of range.
    pub async fn open_aside(
        &self,
        spec: &Namespace,
        replicas: u32,
    ) -> Result<NamespaceHandle, Error> {
        let manner = Manner {
            strict: false,
            replicas,
            aside: true,
        };
        self.open(spec, manner).await
    }

    async fn open(&self, spec: &Namespace, manner: Manner) -> Result<NamespaceHandle, Error> {
        spec.validate()?;
        let deadline = self.until();
        let opened = self
            .of_anybody(deadline, |inner: Arc<Inner>, deadline| async move {
                open::open(&inner, spec, manner, deadline).await
            })
            .await?;
        Ok(NamespaceHandle::new(spec.clone(), opened, manner.aside))
    }

    /// Asks one node after the other until one answers, the one that did last first. No async closure, and the node by
    /// value: with either the compiler does not find the caller's future to be `Send`.
    pub(crate) async fn of_anybody<T, F: Future<Output = Result<T, Error>>>(
        &self,
        deadline: Deadline,
        call: impl Fn(Arc<Inner>, Deadline) -> F,
    ) -> Result<T, Error> {
        let nodes = self.fleet.anybody();
        let mut first = None;
        for (i, inner) in nodes.iter().enumerate() {
            let share = self.fleet.share(deadline, i + 1 == nodes.len());
            match call(Arc::clone(inner), share).await {
                Ok(answer) => {
                    self.fleet.answered(inner);
                    return Ok(answer);
                }
                Err(error) if error.is_unavailable() => {
                    first.get_or_insert(error);
                }
                Err(error) => return Err(error),
            }
        }
        Err(first.expect("a client has a node"))
    }

    /// Asks every node that may hold something, all at once, and then those whom the answers brought word of. Each call is
    /// told whether its node is the only one that is known. One that is known by two addresses may be asked twice.
    pub(crate) async fn of_everybody<T, F: Future<Output = T>>(
        &self,
        call: impl Fn(Arc<Inner>, bool) -> F,
    ) -> Vec<(Arc<Inner>, T)> {
        let mut asked: Vec<(Arc<Inner>, T)> = Vec::new();
        for _ in 0..MOST_ROUNDS {
            let is_new = |node: &Arc<Inner>| !asked.iter().any(|(told, _)| Arc::ptr_eq(told, node));
            let mut nodes = self.fleet.everybody();
            nodes.retain(is_new);
            if nodes.is_empty() {
                break;
            }
            let is_alone = asked.is_empty() && nodes.len() == 1;
            let calls = nodes.iter().map(|node| call(Arc::clone(node), is_alone));
            let answers = join_all(calls).await;
            asked.extend(nodes.into_iter().zip(answers));
        }
        asked
    }

    /// As [`Client::of_everybody`], where a node that is known by two addresses must count once.
    pub(crate) async fn of_each_once<T, F: Future<Output = Result<T, Error>>>(
        &self,
        call: impl Fn(Arc<Inner>) -> F,
    ) -> Vec<(Arc<Inner>, Result<T, Error>)> {
        let mut answers = self.of_everybody(|inner, _| call(inner)).await;
        let mut lives = HashSet::new();
        answers.retain(|(inner, answer)| {
            let boot = inner.boot.load(Ordering::Relaxed);
            answer.is_err() || boot == 0 || lives.insert(boot)
        });
        answers
    }

    pub(crate) fn until(&self) -> Deadline {
        let deadline = Deadline::after(&*self.fleet.recipe.clock, self.deadline);
        // In a cluster several owners are waited for at once, which a thread that sleeps cannot.
        match self.fleet.recipe.views.is_cluster() {
            true => deadline,
            false => deadline.waited_for(self.waits),
        }
    }

    /// Waits until a connection stands.
    pub(crate) async fn prove(&self, budget: Duration) -> Result<(), Error> {
        let deadline = Deadline::after(&*self.fleet.recipe.clock, budget);
        self.of_anybody(deadline, |inner: Arc<Inner>, deadline| async move {
            let mut tries = Tries::new(&inner, Method::STATS, deadline);
            loop {
                if tries.run(|_, _| async { Ok(()) }).await?.is_ok() {
                    return Ok(());
                }
            }
        })
        .await
    }
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client")
            .field("boot_id", &self.boot_id())
            .field("breaker", &self.breaker())
            .field("deadline", &self.deadline)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use kvproto::Chain;

    use super::*;
    use crate::put::PutOptions;

    /// Engines spawn calls on runtimes of many threads.
    #[test]
    fn every_call_may_move_between_threads() {
        fn sent<T: Send>(_: impl FnOnce() -> T) {}
        let client = || -> &'static Client { unreachable!() };
        let ns = || -> &'static NamespaceHandle { unreachable!() };
        let chain = || -> &'static Chain { unreachable!() };
        sent(|| client().get_into(ns(), chain(), None, &mut []));
        sent(|| client().get_scattered(ns(), chain(), None, &mut []));
        sent(|| client().get(ns(), chain(), None));
        sent(|| client().put(ns(), chain(), &[], PutOptions::default()));
        sent(|| client().open_namespace(ns().spec(), false));
        sent(|| client().invalidate(ns(), Target::All));
        sent(|| client().hold(ns(), chain(), None));
        sent(|| client().stats());
        sent(|| client().stats_of_all());
        sent(|| client().namespaces(None));
        sent(|| client().find_namespaces(None));
        sent(|| client().open_aside(ns().spec(), 0));
        sent(|| client().watch(None, Duration::ZERO));
        sent(|| async {
            client()
                .lookup(ns(), chain(), &LookupOptions::default())
                .await
        });
    }
}
