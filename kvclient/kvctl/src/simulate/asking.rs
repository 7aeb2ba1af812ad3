//! One share of a simulated lookup: asked of whoever was chosen for it, and of those that have its runs as well.
//!
//! ```text
//! chosen ──── answer ──────────────────► OfShare        nobody else has the runs: nobody else is asked
//!   └─ failed, or HEDGE_AFTER has passed ─► further owners, or the other one of two while many read ─► whoever has it
//! ```
//!
//! Units: blocks. Errors: `None`, when nobody answers in time.

use std::{
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use futures_util::{FutureExt, future::BoxFuture, future::join_all};
use kvclient::route::{Assembly, Split, Table};
use kvproto::{Chain, LeaseId, Member, RunHash, convert::answer::Second};
use kvserver::{
    blocks::motion::MotionConfig,
    clock::{Clock, Tick as SimTick},
    peers::{Asked, Seen, net::Service},
};

use super::{
    client::{Tally, moment},
    gossip::{LONGEST_SILENCE, LONGEST_WAY},
    hot::Readers,
    links::Place,
    node::{Health, Node},
    town::{LATENCY, PARTS, RUN_BLOCKS, TIMES, Town},
};

/// Of every lease.
const LEASE: Duration = Duration::from_secs(10);
/// When those are asked that hold an owner's runs as well.
const HEDGE_AFTER: Duration = Duration::from_millis(30);
/// Who has been silent for so long is asked by nobody any more: noticed, given up after its grace, told to all nodes,
/// and told to callers with the next answer.
const FORGOTTEN: Duration = Duration::from_secs(8);

/// A lease at one owner, and the positions that it covers.
pub(super) struct Leased {
    pub(super) node: Arc<Node>,
    /// The life in which it was given.
    pub(super) life: u64,
    pub(super) id: LeaseId,
    pub(super) positions: Vec<usize>,
    /// What was asked for: these positions first.
    pub(super) chain: Chain,
}

/// What came of one share of a lookup.
#[derive(Default)]
pub(super) struct OfShare {
    pub(super) present: usize,
    pub(super) leases: Vec<Leased>,
    /// Views of those who see another one.
    pub(super) views: Vec<Vec<Member>>,
}

/// Who asks what, until when.
#[derive(Clone)]
pub(super) struct Asking {
    pub(super) town: Arc<Town>,
    pub(super) tally: Arc<Tally>,
    pub(super) table: Arc<Table>,
    pub(super) readers: Arc<Readers>,
    pub(super) number: usize,
    pub(super) until: SimTick,
}

/// What a node answers to a lookup.
struct Served {
    seen: Seen,
    /// Who else has some of the runs.
    seconds: Vec<Second>,
    /// How many gets it serves.
    calls: u32,
    views: Vec<Vec<Member>>,
    life: u64,
}

impl Asking {
    /// One share: of its owner, and of those that hold its runs as well where it fails or takes long. `None`: nobody
    /// answers in time.
    pub(super) async fn share(
        self,
        member: usize,
        chain: Chain,
        positions: Vec<usize>,
    ) -> Option<OfShare> {
        let town = Arc::clone(&self.town);
        let owner = self.clone().one(member, chain.clone(), positions.clone());
        let has_others = || town.setting.hot.is_some() && self.readers.names_seconds();
        if town.setting.replicas < 2 && !has_others() {
            return owner.await;
        }
        // It goes on by itself while others are asked.
        let mut owner = tokio::spawn(owner).map(|ended| ended.ok().flatten());
        let early = tokio::select! {
            biased;
            answer = &mut owner => Some(answer),
            () = town.clock.sleep(HEDGE_AFTER) => None,
        };
        match early {
            Some(Some(answer)) => Some(answer),
            Some(None) => self.others(member, &chain, &positions).await,
            None => {
                let others = self.others(member, &chain, &positions).await;
                if others.as_ref().is_some_and(|o| o.present == chain.len()) {
                    tokio::spawn(owner.map(|late| late.into_iter().for_each(OfShare::let_go)));
                    return others;
                }
                // The owner may have more.
                match owner.await {
                    Some(answer) => {
                        others.into_iter().for_each(OfShare::let_go);
                        Some(answer)
                    }
                    None => others,
                }
            }
        }
    }

    /// The same of those that hold the owner's runs as well.
    async fn others(&self, member: usize, chain: &Chain, positions: &[usize]) -> Option<OfShare> {
        let (replicas, now) = (self.town.setting.replicas, moment(&self.town));
        let other = |run: &RunHash| {
            let mut readers = self.table.owners(run, replicas);
            readers.extend(self.readers.second(&self.table, run, now));
            readers.into_iter().find(|reader| *reader != member)
        };
        let mut runs = chain.runs(RUN_BLOCKS);
        let end = runs.find(|(run, _)| other(run).is_none());
        let end = end.map_or(chain.len(), |(_, range)| range.start);
        if end == 0 {
            return None;
        }
        let held = chain.slice(0..end, RUN_BLOCKS);
        let split = Split::new(&held, RUN_BLOCKS, |run| other(run).unwrap_or(member));
        let calls = split.shares.iter().map(|share| {
            let of_whole = share.ranges.iter().cloned().flatten();
            let of_whole = of_whole.filter_map(|at| positions.get(at).copied());
            let part = share.chain(&held, RUN_BLOCKS);
            self.clone().one(share.member, part, of_whole.collect())
        });
        let answers = join_all(calls.collect::<Vec<_>>()).await;
        let (mut assembly, mut whole, mut any) = (Assembly::new(&split), OfShare::default(), false);
        for (number, answer) in answers.into_iter().enumerate() {
            let Some(answer) = answer else {
                assembly.lost(number);
                continue;
            };
            any = true;
            assembly.answered(number, answer.present);
            whole.leases.extend(answer.leases);
            whole.views.extend(answer.views);
        }
        whole.present = assembly.prefix();
        any.then_some(whole)
    }

    /// One node's answer; `None` when there is none in time.
    fn one(
        self,
        member: usize,
        chain: Chain,
        positions: Vec<usize>,
    ) -> BoxFuture<'static, Option<OfShare>> {
        async move {
            let member = self.table.members().get(member)?;
            let node = self.town.named(&member.id)?;
            let (from, to) = (Place::Caller(self.number), Place::Node(node.index));
            let (town, until) = (Arc::clone(&self.town), self.until);
            self.judge(&node);
            let asked = Asked {
                space: Arc::clone(&town.space),
                chain,
                parts: PARTS.to_vec(),
            };
            let queue = self.readers.queue(&node.id);
            let under_way = queue.enter();
            let called = self.served(&node, &asked);
            let answered = town.links.carry(from, to, until, called).await;
            drop(under_way);
            let Served {
                seen,
                seconds,
                calls,
                views,
                life,
            } = answered??;
            self.readers.heard(&node.id, calls, seconds, moment(&town));
            let leases = seen.lease.map(|(id, blocks)| Leased {
                node,
                life,
                id,
                positions: positions.into_iter().take(blocks as usize).collect(),
                chain: asked.chain.slice(0..blocks as usize, RUN_BLOCKS),
            });
            Some(OfShare {
                present: seen.blocks as usize,
                leases: leases.into_iter().collect(),
                views,
            })
        }
        .boxed()
    }

    /// Whether this one should have been forgotten by now.
    fn judge(&self, node: &Node) {
        let now = self.town.clock.now();
        let known_by = TIMES.suspect_grace + LONGEST_SILENCE + LONGEST_WAY + FORGOTTEN;
        let silent = self.town.talk.silent.lock().get(&node.index).copied();
        if silent.is_some_and(|since| now.since(since) > known_by) {
            self.tally.stale_calls.fetch_add(1, Relaxed);
            self.town
                .history
                .note(format_args!("stale {} {}", self.number, node.id));
        }
    }

    /// As the node's own lookup does: what is missing and may lie elsewhere is brought first.
    async fn served(&self, node: &Node, asked: &Asked) -> Option<Served> {
        let town = &self.town;
        town.clock.sleep(LATENCY).await;
        let (health, cluster, motion, number) = {
            let life = node.life.lock();
            (
                life.health,
                Arc::clone(&life.cluster),
                Arc::clone(&life.motion),
                life.number,
            )
        };
        match health {
            Health::Up => {}
            Health::Down | Health::Away => return None,
            Health::Frozen => {
                town.clock.sleep(self.until.since(town.clock.now())).await;
                return None;
            }
        }
        if motion.may_ask(asked.space.replicas) {
            let began = town.clock.now();
            let left = self.until.since(began);
            motion
                .bring_prefix(&asked.space, &asked.chain, &asked.parts, left)
                .await;
            let most = MotionConfig::default().wait.min(left / 2);
            if town.clock.now().since(began) > most {
                self.tally.late_calls.fetch_add(1, Relaxed);
                town.history.note(format_args!("late {}", node.id));
            }
        }
        let seen = node.shelf.lease(asked, LEASE);
        let seconds = motion.seconds_of(asked.space.id, &asked.chain, RUN_BLOCKS);
        town.clock.sleep(LATENCY).await;
        let (_, members) = cluster.answer(self.table.digest());
        let views = match members.is_empty() {
            true => Vec::new(),
            false => vec![members],
        };
        let is_up = {
            let life = node.life.lock();
            life.health == Health::Up && life.number == number
        };
        is_up.then_some(Served {
            seen,
            seconds,
            calls: node.desk.calls(),
            views,
            life: number,
        })
    }
}

impl Leased {
    pub(super) fn let_go(self) {
        self.node.shelf.release(self.id);
    }
}

impl OfShare {
    pub(super) fn let_go(self) {
        self.leases.into_iter().for_each(Leased::let_go);
    }
}
