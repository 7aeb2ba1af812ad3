//! Who is here: membership without a server that must be there first.
//!
//! ```text
//! answers, requests ──merge──► Members ──► Roster ──► blocks, rpc, peers        one view, published by Arc
//! gossip  ──hear, suspect──►  (pure)  ──► data_dir/cluster.json                 a restart begins where it ended
//! ```
//!
//! [`Cluster`] is always there: a node that nobody told to join is a cluster of one that others may join. Views merge
//! member by member, so nobody votes and nobody publishes; owners are a pure function of a view and a run. This room
//! knows neither blocks nor engine.
//!
//! Shape: the digest is an atomic, the roster an `Arc` behind a lock that is held for the clone of it alone, so that the
//! data path never waits for a change. Units: [`Tick`], durations. Errors: none here; joining has its own.

mod call;
pub mod gossip;
mod join;
mod kept;
mod load;
mod members;
mod membership;
mod placements;
mod roster;
mod standing;
mod told;
pub mod wire;

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use kvproto::{BootId, Member, MemberId, MemberState, ViewDigest};
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};

pub(crate) use self::join::resolve;
use self::wire::Traffic;
pub use self::{
    call::Caller,
    join::{JoinError, Joined, Joining, Welcome, adopt},
    kept::{Before, Kept, KeptError},
    load::Load,
    members::{MOST_PAST, Members, News, RAMP_STEPS, TOMBSTONES_KEPT, Times},
    membership::{Membership, MembershipParts},
    placements::Placements,
    roster::{MOST_CANDIDATES, Roster},
    standing::Standing,
    told::{AGAIN, Told},
};
use crate::clock::{Clock, Tick};

/// The cluster as one node sees it.
pub struct Cluster {
    me: MemberId,
    clock: Arc<dyn Clock>,
    /// Locked for a change; readers take the roster.
    members: Mutex<Members>,
    roster: watch::Sender<Arc<Roster>>,
    digest: AtomicU64,
    loads: Mutex<BTreeMap<MemberId, Load>>,
    /// The life that each member was last heard to live.
    boots: Mutex<BTreeMap<MemberId, BootId>>,
    traffic: Arc<Traffic>,
    view_changes: AtomicU64,
    /// Why nobody can join this node, if nobody can.
    alone: Mutex<Option<String>>,
    /// Members that somebody's call failed at, on their way to whoever looks after them.
    hurt: mpsc::Sender<MemberId>,
    /// See [`Cluster::is_behind`].
    behind: watch::Sender<bool>,
    follows_news: AtomicBool,
    looked_after: Mutex<Option<mpsc::Receiver<MemberId>>>,
}

/// Failed calls that may wait for somebody to look after their member; more say nothing new.
const MOST_HURT: usize = 64;

impl Cluster {
    /// A cluster as `members` know it.
    #[must_use]
    pub fn new(members: Members, clock: Arc<dyn Clock>) -> Arc<Self> {
        let roster = Arc::new(members.roster());
        let (hurt, looked_after) = mpsc::channel(MOST_HURT);
        Arc::new(Self {
            me: members.me().id.clone(),
            clock,
            digest: AtomicU64::new(roster.digest.0),
            members: Mutex::new(members),
            roster: watch::Sender::new(roster),
            loads: Mutex::default(),
            boots: Mutex::default(),
            traffic: Arc::default(),
            view_changes: AtomicU64::new(0),
            alone: Mutex::default(),
            hurt,
            behind: watch::Sender::new(false),
            follows_news: AtomicBool::new(false),
            looked_after: Mutex::new(Some(looked_after)),
        })
    }

    /// This node.
    #[must_use]
    pub fn me(&self) -> &MemberId {
        &self.me
    }

    /// Who is here now.
    #[must_use]
    pub fn roster(&self) -> Arc<Roster> {
        Arc::clone(&self.roster.borrow())
    }

    /// Told of every change.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<Arc<Roster>> {
        self.roster.subscribe()
    }

    /// Digest of the view.
    #[must_use]
    pub fn digest(&self) -> ViewDigest {
        ViewDigest(self.digest.load(Ordering::Acquire))
    }

    /// Takes over news, wherever it came from.
    pub fn merge(&self, news: impl IntoIterator<Item = Member>) {
        let now = self.clock.now();
        self.change(|members| members.merge(news, now));
    }

    /// What an answer says to a caller with this digest: the members only when it has another view.
    #[must_use]
    pub fn answer(&self, callers: ViewDigest) -> (ViewDigest, Vec<Member>) {
        if callers == self.digest() {
            return (callers, Vec::new());
        }
        let roster = self.roster();
        match roster.digest == callers {
            true => (callers, Vec::new()),
            false => (roster.digest, roster.view.members().to_vec()),
        }
    }

    /// A member was silent for too long, or did not answer.
    pub fn suspect(&self, id: &MemberId) {
        let now = self.clock.now();
        if self.members.lock().suspect(id, now) {
            tracing::warn!(%id, "a member of the cluster is silent");
        }
    }

    /// A member gave a sign of life at `at`.
    pub fn hear(&self, id: &MemberId, at: Tick) {
        if self.members.lock().hear(id, at) {
            tracing::info!(%id, "a member of the cluster is heard again");
        }
    }

    /// Time has passed: graces and ramps end.
    pub fn tick(&self) {
        let now = self.clock.now();
        self.change(|members| members.tick(now));
    }

    /// What this node declares of itself.
    #[must_use]
    pub fn declared(&self) -> Member {
        self.members.lock().me().clone()
    }

    /// As [`Members::take_news`]. From the first call on this node is behind whenever somebody was away, until
    /// [`Cluster::has_caught_up`] is told otherwise.
    pub fn take_news(&self) -> News {
        self.follows_news.store(true, Ordering::Relaxed);
        self.members.lock().take_news()
    }

    /// This node may have what others were told to forget.
    pub fn fall_behind(&self) {
        self.behind.send_replace(true);
    }

    /// It has not, as far as the news that were taken go.
    pub fn has_caught_up(&self) {
        let members = self.members.lock();
        if *members.news() == News::default() {
            self.behind.send_replace(false);
        }
    }

    /// Whether this node may have what others were told to forget: then it hands nothing over.
    #[must_use]
    pub fn is_behind(&self) -> bool {
        *self.behind.borrow()
    }

    /// Waits until it is not.
    pub async fn caught_up(&self) {
        let mut behind = self.behind.subscribe();
        let _ = behind.wait_for(|behind| !behind).await; // the sender lives as long as this
    }

    /// How many members are suspect.
    #[must_use]
    pub fn suspects(&self) -> usize {
        self.members.lock().suspects()
    }

    /// How many members are in each state.
    #[must_use]
    pub fn counts(&self) -> [(&'static str, u64); 4] {
        let roster = self.roster();
        let count = |state: MemberState| {
            let members = roster.view.members().iter();
            members.filter(|member| member.state == state).count() as u64
        };
        [
            ("joining", count(MemberState::Joining)),
            ("active", count(MemberState::Active)),
            ("draining", count(MemberState::Draining)),
            ("gone", count(MemberState::Gone)),
        ]
    }

    /// Changes of the view that moved owners, since start.
    #[must_use]
    pub fn view_changes(&self) -> u64 {
        self.view_changes.load(Ordering::Relaxed)
    }

    /// What gossip has carried.
    #[must_use]
    pub fn traffic(&self) -> &Arc<Traffic> {
        &self.traffic
    }

    /// Another weight for this node.
    pub fn set_weight(&self, weight: u32) {
        let now = self.clock.now();
        self.change(|members| members.set_weight(weight, now));
    }

    /// This node hands over what it has, and takes nothing new.
    pub fn drain(&self) {
        let now = self.clock.now();
        self.change(|members| members.drain(now));
    }

    /// The life that a member was last heard to live.
    #[must_use]
    pub fn boot(&self, id: &MemberId) -> Option<BootId> {
        self.boots.lock().get(id).copied()
    }

    /// A member lives this life.
    pub fn set_boot(&self, id: MemberId, boot: BootId) {
        self.boots.lock().insert(id, boot);
    }

    /// Why nobody can join this node; `None`: anybody can who may.
    #[must_use]
    pub fn alone(&self) -> Option<String> {
        self.alone.lock().clone()
    }

    /// Nobody can join this node, for this reason.
    pub fn set_alone(&self, why: String) {
        *self.alone.lock() = Some(why);
    }

    /// This node takes runs again.
    pub fn resume(&self) {
        let now = self.clock.now();
        self.change(|members| members.resume(now));
    }

    /// This node goes for good.
    pub fn leave(&self) {
        let now = self.clock.now();
        self.change(|members| members.leave(now));
    }

    /// What a member last said it has to do; `None`: nothing was heard.
    #[must_use]
    pub fn load(&self, id: &MemberId) -> Option<Load> {
        self.loads.lock().get(id).copied()
    }

    /// What a member says that it has to do.
    pub fn hear_load(&self, id: &MemberId, load: Load) {
        self.loads.lock().insert(id.clone(), load);
    }

    /// What this node has to do, for the others.
    pub fn set_load(&self, load: Load) {
        self.hear_load(&self.me, load);
    }

    /// How a member stands with this node. Suspicion is local and moves no owner.
    #[must_use]
    pub fn standing(&self, id: &MemberId) -> Standing {
        self.members.lock().standing(id)
    }

    /// Somebody's call to this member failed, in this life of its if that is known: it is looked at now.
    pub fn hurt(&self, id: &MemberId, boot: BootId) {
        let lives = self.boot(id).filter(|_| boot != BootId(0));
        if lives.is_some_and(|known| known != boot) {
            return; // it has begun another life since, and is not what hurt
        }
        tracing::debug!(%id, boot = boot.0, "a call to a member failed");
        // A full queue is a member that is being looked at already.
        let _ = self.hurt.try_send(id.clone());
    }

    /// Where this node is reached, as a URL.
    pub fn set_address(&self, address: String) {
        self.change(|members| members.set_address(address));
    }

    /// Makes a change and publishes what came of it.
    fn change(&self, change: impl FnOnce(&mut Members) -> bool) -> bool {
        let mut members = self.members.lock();
        if !change(&mut members) {
            return false;
        }
        let news = members.news();
        if (news.is_back || news.was_gone) && self.follows_news.load(Ordering::Relaxed) {
            self.fall_behind(); // before anybody can see that they are here
        }
        let roster = Arc::new(members.roster());
        if self.digest() != roster.digest {
            self.view_changes.fetch_add(1, Ordering::Relaxed);
        }
        // Under the lock, so that an older roster never replaces a newer one.
        self.digest.store(roster.digest.0, Ordering::Release);
        self.roster.send_replace(roster);
        true
    }
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cluster")
            .field("me", &self.me)
            .field("digest", &self.digest())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
pub(crate) mod tests;
