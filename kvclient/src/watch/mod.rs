//! Blocks stored and removed, as they happen, at every member of a cluster.
//!
//! ```text
//! members ─┬─ n1 ─► Ear ─┐
//!          ├─ n2 ─► Ear ─┼─► Watch::next ─► Notice { member, heard }
//!          └─ n3 ─► Ear ─┘                    Listening │ Event(Stored, Removed, Lagged) │ Lost │ Joined │ Left
//! ```
//!
//! Events of one member come in its order; those of several in no order among each other. A stream that breaks is opened
//! again by itself, and what that means for the caller is told: after [`Heard::Lost`] events are missed until the next
//! [`Heard::Listening`], which says how many at most, or that nobody knows. Who must be sure of what a member holds looks it up
//! again then, and after [`WatchEvent::Lagged`].
//!
//! Members that come are listened to, those that leave are told of: each stream brings the news of the cluster too.
//!
//! Units: events; `sequence` grows by one per event of one boot of a node, events of other namespaces included.
//! Errors: when nobody can be listened to at all; later ones are told, not returned.
//! Bounds: [`MAX_HEARD`] notices wait to be read; beyond that the nodes wait, and say `Lagged` when their own room is full.

mod ear;
mod stream;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use futures_util::future::BoxFuture;
use kvproto::{BootId, convert::answer::WatchEvent};
use tokio::{
    sync::{mpsc, watch},
    task::{AbortHandle, JoinSet},
};

use self::ear::{Ear, Told};
use crate::{
    call::Inner, client::Client, clock::Tick, endpoint::Endpoint, error::Error, fleet::Fleet,
    namespace::NamespaceHandle,
};

/// Notices that wait to be read.
pub const MAX_HEARD: usize = 1024;

/// How long a watch waits for the other members once one is listened to, before it begins without them.
const PATIENCE: Duration = Duration::from_secs(1);

/// One thing heard, and of which member.
#[derive(Debug)]
pub struct Notice {
    /// Of which.
    pub member: Arc<Watched>,
    /// What.
    pub heard: Heard,
}

/// A member that is listened to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Watched {
    /// Its id; empty for a node whose cluster is not known.
    pub id: String,
    /// Where it is reached.
    pub address: String,
}

/// What a watch tells of a member.
#[derive(Debug)]
pub enum Heard {
    /// From now on none of its events is missed.
    Listening {
        /// Which life of the node.
        boot: BootId,
        /// Its events so far.
        sequence: u64,
        /// At most so many events were not heard since the last one that was, those of other namespaces included. `None`:
        /// nobody knows, as it is heard for the first time in this life; what it holds is to be looked up.
        missed: Option<u64>,
    },
    /// Something happened there.
    Event {
        /// Its number.
        sequence: u64,
        /// What; of [`WatchEvent::Lagged`] how many events were not told.
        event: WatchEvent,
    },
    /// It is not heard any more, and is tried again; events until it is [heard](Heard::Listening) again are missed.
    Lost(Error),
    /// It came after the watch had begun; it is listened to from its [`Heard::Listening`] on.
    Joined,
    /// It has left the cluster, with what it held.
    Left,
}

/// What is heard of all members. Dropping it ends it.
pub struct Watch {
    fleet: Arc<Fleet>,
    namespace: Option<NamespaceHandle>,
    budget: Duration,
    until: Tick,
    over: BoxFuture<'static, ()>,
    /// Another view of the cluster.
    news: watch::Receiver<u64>,
    ears: BTreeMap<u64, Listener>,
    begun: u64,
    /// Ends them with the watch.
    tasks: JoinSet<()>,
    told: mpsc::Sender<Told>,
    heard: mpsc::Receiver<Told>,
    ready: VecDeque<Notice>,
}

/// One member's ear, from outside.
struct Listener {
    member: Arc<Watched>,
    endpoint: Endpoint,
    task: AbortHandle,
}

impl Client {
    /// Events of one namespace (`None`: of all namespaces of the caller's tenant), for up to `lifetime`, of every member of
    /// the cluster, those that come later included. From when on each member is heard, it says itself.
    ///
    /// # Errors
    /// When no member answers.
    pub async fn watch(
        &self,
        namespace: Option<&NamespaceHandle>,
        lifetime: Duration,
    ) -> Result<Watch, Error> {
        if self.fleet.recipe.views.version() == 0 {
            // Whose members there are, any answer tells.
            self.stats().await?;
        }
        let mut watch = Watch::new(self, namespace, lifetime);
        watch.follow(true);
        watch.begin(self).await?;
        Ok(watch)
    }
}

impl Watch {
    fn new(client: &Client, namespace: Option<&NamespaceHandle>, lifetime: Duration) -> Self {
        let fleet = client.fleet.clone();
        let clock = &*fleet.recipe.clock;
        let (told, heard) = mpsc::channel(MAX_HEARD);
        Self {
            namespace: namespace.cloned(),
            budget: client.deadline,
            until: clock.now().after(lifetime),
            over: clock.sleep(lifetime),
            news: fleet.recipe.views.news(),
            ears: BTreeMap::new(),
            begun: 0,
            tasks: JoinSet::new(),
            told,
            heard,
            ready: VecDeque::new(),
            fleet,
        }
    }

    /// The next notice; `None` when the watch's time is over, or every node has ended its stream in good order. May be
    /// given up and called again: nothing is lost by that.
    pub async fn next(&mut self) -> Option<Notice> {
        loop {
            if let Some(notice) = self.ready.pop_front() {
                return Some(notice);
            }
            tokio::select! {
                biased;
                told = self.heard.recv() => self.take(told?),
                _ = self.news.changed() => self.follow(false),
                ended = self.tasks.join_next() => {
                    // None is left: what the last one said was read first, see above.
                    ended.as_ref()?;
                }
                () = &mut self.over => return None,
            }
        }
    }

    /// Waits until every member is heard, or is not to be.
    async fn begin(&mut self, client: &Client) -> Result<(), Error> {
        let clock = &*client.fleet.recipe.clock;
        let mut waiting: BTreeSet<u64> = self.ears.keys().copied().collect();
        let mut is_heard = false;
        let mut patience = clock.sleep(client.deadline);
        while !waiting.is_empty() {
            tokio::select! {
                biased;
                told = self.heard.recv(), if self.ready.len() < MAX_HEARD => {
                    let Some((number, heard)) = told else {
                        break;
                    };
                    waiting.remove(&number);
                    if !is_heard && matches!(heard, Heard::Listening { .. }) {
                        is_heard = true;
                        patience = clock.sleep(PATIENCE.min(client.deadline));
                    }
                    self.take((number, heard));
                }
                () = &mut patience => break,
            }
        }
        if is_heard {
            return Ok(());
        }
        let lost = self.ready.drain(..).find_map(|notice| match notice.heard {
            Heard::Lost(error) => Some(error),
            _ => None,
        });
        Err(lost.unwrap_or_else(|| Error::Deadline {
            method: stream::METHOD.name,
            deadline_ms: u64::try_from(client.deadline.as_millis()).unwrap_or(u64::MAX),
        }))
    }

    /// What an ear has heard, unless its member is gone.
    fn take(&mut self, (number, heard): Told) {
        if let Some(listener) = self.ears.get(&number) {
            let member = listener.member.clone();
            self.ready.push_back(Notice { member, heard });
        }
    }

    /// An ear for everybody who is here, and none for who is not.
    fn follow(&mut self, is_begin: bool) {
        self.news.mark_unchanged();
        let members = self.fleet.members();
        // Before a cluster was known its node had no name.
        for listener in self.ears.values_mut() {
            let mut same = members
                .iter()
                .filter(|(_, inner)| inner.endpoint == listener.endpoint);
            if let Some((member, _)) = same.next()
                && *member != *listener.member
            {
                listener.member = Arc::new(member.clone());
            }
        }
        let is_here = |listener: &Listener| {
            let mut members = members.iter();
            members.any(|(member, inner)| {
                inner.endpoint == listener.endpoint && *member == *listener.member
            })
        };
        let gone: Vec<u64> = self
            .ears
            .iter()
            .filter(|(_, ear)| !is_here(ear))
            .map(|(n, _)| *n)
            .collect();
        let mut moved = BTreeSet::new();
        for number in gone {
            let Some(Listener { member, task, .. }) = self.ears.remove(&number) else {
                continue;
            };
            task.abort();
            if member.id.is_empty() {
                continue; // it is one of them, by another address
            }
            match members.iter().any(|(other, _)| other.id == member.id) {
                true => _ = moved.insert(member.id.clone()),
                false => self.ready.push_back(Notice {
                    member,
                    heard: Heard::Left,
                }),
            }
        }
        let was_alone = self.ears.is_empty();
        for (member, inner) in members {
            let mut ears = self.ears.values();
            if ears.any(|ear| ear.endpoint == inner.endpoint) {
                continue;
            }
            let is_new = !is_begin && !was_alone && !moved.contains(&member.id);
            let listener = self.listen(member, inner);
            if is_new {
                self.ready.push_back(Notice {
                    member: listener,
                    heard: Heard::Joined,
                });
            }
        }
    }

    fn listen(&mut self, member: Watched, inner: Arc<Inner>) -> Arc<Watched> {
        self.begun += 1;
        let (number, member, endpoint) = (self.begun, Arc::new(member), inner.endpoint.clone());
        let ear = Ear {
            number,
            inner,
            namespace: self.namespace.clone(),
            budget: self.budget,
            until: self.until,
            told: self.told.clone(),
        };
        let task = self
            .tasks
            .spawn_on(ear.listen(), &self.fleet.recipe.runtime);
        let listener = Listener {
            member: member.clone(),
            endpoint,
            task,
        };
        self.ears.insert(number, listener);
        member
    }
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch")
            .field("members", &self.ears.len())
            .field("ready", &self.ready.len())
            .finish_non_exhaustive()
    }
}
