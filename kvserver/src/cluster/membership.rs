//! The tasks of a member: gossip, a view that is kept, a look after whoever failed somebody.
//!
//! ```text
//! gossip    ◄── UDP on the number of the gRPC port
//! keeper    a change of the view ─► data_dir/cluster.json
//! probe     a member that a call failed at ─► View ─► heard, or suspect at once
//! announcer what this node declares ─► Join, at one of those it knows, once and whenever it is alone
//! load      every LOAD_INTERVAL ─► gossip
//! ```
//!
//! Dropping [`Membership`] ends them all. Errors: logged where they happen; a node that cannot gossip is alone, and serves.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use kvproto::{BootId, MemberId, View, ViewDigest, v1};
use tokio::task::JoinHandle;

use super::{
    Before, Cluster, Kept, Load, Roster, Standing,
    call::{ANSWER_TIME, Caller},
    gossip::{Gossip, GossipSettings},
    members::MOST_PAST,
    wire::Datagrams,
};
use crate::clock::{Clock, Tick};

/// How often a node says what it has to do.
const LOAD_INTERVAL: Duration = Duration::from_secs(2);

/// How often a node that knows nobody tries the addresses it was given.
const LONELY_INTERVAL: Duration = Duration::from_secs(2);

/// A member that was looked at is not looked at again for so long.
const PROBE_PAUSE: Duration = Duration::from_millis(500);

/// What a member's tasks need.
pub struct MembershipParts {
    /// What they keep up to date.
    pub cluster: Arc<Cluster>,
    /// Where the view is kept.
    pub kept: Kept,
    /// How other nodes are called.
    pub caller: Caller,
    /// URLs of those to announce itself to.
    pub known: Vec<String>,
    /// This life.
    pub boot_id: BootId,
    /// What this node has to do.
    pub load: Box<dyn Fn() -> Load + Send + Sync>,
    /// Time.
    pub clock: Arc<dyn Clock>,
}

/// A member's running tasks.
pub struct Membership {
    _gossip: Option<Gossip>,
    kept: Arc<Kept>,
    tasks: Vec<JoinHandle<()>>,
}

impl Membership {
    /// Starts them; gossip only where there is a network for it.
    pub async fn start(
        parts: MembershipParts,
        gossip: Option<(GossipSettings, Arc<dyn Datagrams>)>,
    ) -> Self {
        let MembershipParts {
            cluster,
            kept,
            caller,
            known,
            boot_id,
            load,
            clock,
        } = parts;
        cluster.set_boot(cluster.me().clone(), boot_id);
        let gossip = match gossip {
            Some((settings, datagrams)) => {
                let starting = Gossip::start(
                    Arc::clone(&cluster),
                    settings,
                    datagrams,
                    Arc::clone(&clock),
                );
                match starting.await {
                    Ok(gossip) => Some(gossip),
                    Err(error) => {
                        cluster.set_alone(error.to_string());
                        None
                    }
                }
            }
            None => None,
        };
        if let Some(why) = cluster.alone() {
            tracing::warn!(why, "this node is alone; nobody can join it");
        }
        let kept = Arc::new(kept);
        let mut tasks = vec![tokio::spawn(keep(
            Arc::clone(&cluster),
            Arc::clone(&kept),
            Arc::clone(&clock),
        ))];
        if let Some(hurt) = cluster.looked_after.lock().take() {
            let probing = probe(
                Arc::clone(&cluster),
                hurt,
                caller.clone(),
                Arc::clone(&clock),
            );
            tasks.push(tokio::spawn(probing));
        }
        if gossip.is_some() {
            let announcing = announce(Arc::clone(&cluster), caller, known, Arc::clone(&clock));
            tasks.push(tokio::spawn(announcing));
            tasks.push(tokio::spawn(async move {
                loop {
                    cluster.set_load(load());
                    clock.sleep(LOAD_INTERVAL).await;
                }
            }));
        }
        Self {
            _gossip: gossip,
            kept,
            tasks,
        }
    }

    /// Ends them, and what is being written; nothing is written to the data folder afterwards.
    pub async fn stop(self) {
        let kept = Arc::clone(&self.kept);
        drop(self);
        let _ = tokio::task::spawn_blocking(move || kept.close()).await; // the runtime ends
    }

    /// One more task of a member, of another room.
    pub fn also(&mut self, task: impl Future<Output = ()> + Send + 'static) {
        self.tasks.push(tokio::spawn(task));
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// Keeps each view that comes; one that comes while another is written is written next.
async fn keep(cluster: Arc<Cluster>, kept: Arc<Kept>, clock: Arc<dyn Clock>) {
    let mut last = cluster.roster();
    let mut settled = Settled::new(&last, kept.before.clone());
    let mut changes = cluster.changes();
    let mut has_failed = false;
    changes.mark_changed();
    while changes.changed().await.is_ok() {
        let roster = Arc::clone(&changes.borrow_and_update());
        let before = settled.changed(&last, &roster, clock.unix_ms());
        last = Arc::clone(&roster);
        let file = Arc::clone(&kept);
        let writing = tokio::task::spawn_blocking(move || file.write(&roster.view, &before));
        match writing.await {
            Ok(Ok(())) => has_failed = false,
            // Once, until it works again: a full disk would fill the log too.
            Ok(Err(error)) => {
                if !has_failed {
                    tracing::warn!(%error, "the view of the cluster is not kept");
                }
                has_failed = true;
            }
            Err(_) => return, // the runtime ends
        }
    }
}

/// The views before the changes that are young, oldest first.
struct Settled(Vec<(Tick, Before)>);

impl Settled {
    /// `before`: what an earlier life left to this one.
    fn new(roster: &Roster, before: Before) -> Self {
        let oldest = roster.past.last();
        Self(oldest.map(|(at, _)| (*at, before)).into_iter().collect())
    }

    /// The members before the oldest change that is young; those that there are where none is.
    fn changed(&mut self, last: &Roster, roster: &Roster, unix_ms: u64) -> Before {
        let before = |view: &View| Before {
            unix_ms,
            view: view.clone(),
        };
        if last.digest != roster.digest {
            self.0.push((roster.changed, before(&last.view)));
        }
        let oldest = roster.past.last().map(|(at, _)| *at);
        self.0
            .retain(|(at, _)| oldest.is_some_and(|oldest| *at >= oldest));
        if self.0.len() > MOST_PAST {
            self.0.remove(1);
        }
        let first = self.0.first().map(|(_, before)| before.clone());
        first.unwrap_or_else(|| before(&roster.view))
    }
}

/// Looks after those who failed somebody, one after the other.
async fn probe(
    cluster: Arc<Cluster>,
    mut hurt: tokio::sync::mpsc::Receiver<MemberId>,
    caller: Caller,
    clock: Arc<dyn Clock>,
) {
    let mut looked: BTreeMap<MemberId, Tick> = BTreeMap::new();
    while let Some(id) = hurt.recv().await {
        let now = clock.now();
        looked.retain(|_, at| now.since(*at) < PROBE_PAUSE);
        let roster = cluster.roster();
        let Some(member) = roster.view.get(&id) else {
            continue;
        };
        if looked.contains_key(&id) || cluster.standing(&id) != Standing::Well {
            continue;
        }
        looked.insert(id.clone(), now);
        let answer = tokio::select! {
            answer = caller.view(&member.address) => answer.is_ok_and(|view| view.node_id == id.0),
            () = clock.sleep(ANSWER_TIME) => false,
        };
        match answer {
            true => cluster.hear(&id, now),
            false => cluster.suspect(&id),
        }
    }
}

/// Tells one of those it was told of that this node is here, so that nobody waits for gossip to say it. Goes on trying
/// for as long as this node knows nobody else.
async fn announce(
    cluster: Arc<Cluster>,
    caller: Caller,
    known: Vec<String>,
    clock: Arc<dyn Clock>,
) {
    if known.is_empty() {
        return;
    }
    loop {
        for address in &known {
            let declared = cluster.declared();
            if *address == declared.address {
                continue;
            }
            let asked = v1::JoinRequest {
                node_id: declared.id.0.clone(),
                address: declared.address.clone(),
                member: Some((&declared).into()),
                ..v1::JoinRequest::default()
            };
            match caller.join(address, asked).await {
                Ok(answer) => {
                    let members = answer.members.into_iter();
                    cluster.merge(members.filter_map(|member| member.try_into().ok()));
                    break;
                }
                Err(error) => tracing::debug!(address, %error, "a node did not answer"),
            }
        }
        let is_lonely = || cluster.roster().present().count() < 2;
        if !is_lonely() {
            return;
        }
        clock.sleep(LONELY_INTERVAL).await;
        if cluster.digest() == ViewDigest::default() {
            return; // it has left
        }
    }
}
