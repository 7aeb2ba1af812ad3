//! A model of gossip: when a node hears what was told, whom it takes for silent, and what it tells itself.
//!
//! ```text
//! told ── 0.2 to 1.4 s, a time of its own for each who hears it ──► heard          never across a cut: after it has healed
//! silent since ── 1 to 2.5 s ──► suspect           heard again: no suspect any more
//! ```
//!
//! A node tells what it declares of itself, and tombstones that it holds to be true, as the real gossip does; who is
//! declared gone hears of it so, and answers. Rounds are twice a second, each node's at its own moment.
//! Units: [`Tick`]. Errors: none.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use kvproto::{Member, MemberId, MemberState, ViewDigest};
use kvserver::{
    clock::{Clock, Tick},
    cluster::Load,
};
use parking_lot::Mutex;

use super::{
    links::{Cut, Place},
    node::{Health, Life, Node},
    town::{Town, id, index_of, spread},
};

/// From one round of a node to its next.
pub(super) const ROUND: Duration = Duration::from_millis(500);
/// The longest that news are on their way to a node.
pub(super) const LONGEST_WAY: Duration = Duration::from_millis(2000);
/// The longest until silence is noticed.
pub(super) const LONGEST_SILENCE: Duration = Duration::from_millis(2500);

/// What has been told so far.
#[derive(Default)]
pub(super) struct Talk {
    news: Mutex<Vec<News>>,
    /// Who answers nobody, and since when; who answers again, and since when.
    pub(super) silent: Mutex<BTreeMap<usize, Tick>>,
    pub(super) back: Mutex<BTreeMap<usize, Tick>>,
    /// Tombstones that were told.
    buried: Mutex<BTreeSet<(MemberId, u64, u64)>>,
    seen: Mutex<BTreeSet<ViewDigest>>,
}

struct News {
    member: Member,
    born: Tick,
    from: usize,
}

impl Talk {
    /// News that whoever begins at `now` need not wait for: they were heard by whoever told it of the cluster.
    pub(super) fn old(&self, now: Tick) -> usize {
        let news = self.news.lock();
        news.partition_point(|news| news.born.after(LONGEST_WAY) < now)
    }
}

impl Town {
    /// What a node does twice a second.
    pub(super) fn round(&self, index: usize) {
        let node = self.node(index);
        let mut life = node.life.lock();
        if life.health != Health::Up {
            return;
        }
        let now = self.clock.now();
        life.cluster.tick();
        self.hear(index, &mut life, now);
        self.listen(index, &life, now);
        if let Some(cut) = self.links.last_cut() {
            self.listen_across(index, &life, cut, now);
        }
        life.looked = now;
        if self.setting.hot.is_some() {
            self.hear_loads(index, &life);
        }
        self.tell(&node, &mut life, now);
    }

    fn hear(&self, index: usize, life: &mut Life, now: Tick) {
        let news = self.talk.news.lock();
        life.coming.extend(life.sent_off..news.len());
        life.sent_off = news.len();
        if life.coming.is_empty() {
            return;
        }
        let cut = self.links.last_cut();
        let mut heard = Vec::new();
        life.coming.retain(|&at| {
            let one = &news[at];
            let parts = |cut: &Cut| cut.parts(Place::Node(one.from), Place::Node(index));
            let started = match cut.filter(parts) {
                None => one.born,
                Some(Cut { healed: None, .. }) => return true,
                Some(cut) => one.born.max(cut.healed.unwrap_or_default()),
            };
            let way = Duration::from_millis(200 + spread(index, at) % 1200);
            let is_here = now >= started.after(way);
            if is_here {
                heard.push(one.member.clone());
            }
            !is_here
        });
        if !heard.is_empty() {
            life.cluster.merge(heard);
        }
    }

    /// Who is silent, and who is heard again.
    fn listen(&self, index: usize, life: &Life, now: Tick) {
        for (&other, &since) in &*self.talk.silent.lock() {
            if other != index && now >= since.after(noticed(index, other)) {
                life.cluster.suspect(&id(other));
            }
        }
        if life.cluster.suspects() == 0 {
            return;
        }
        for (&other, &since) in &*self.talk.back.lock() {
            if !self.links.is_cut(Place::Node(other), Place::Node(index)) {
                life.cluster.hear(&id(other), since);
            }
        }
    }

    /// The same for those on the other side of a cut: once for each, when its moment has come.
    fn listen_across(&self, index: usize, life: &Life, cut: Cut, now: Tick) {
        let since = cut.healed.unwrap_or(cut.since).max(life.born);
        if now >= since.after(LONGEST_SILENCE + 2 * ROUND) {
            return;
        }
        let silent = self.talk.silent.lock();
        let count = self.nodes.read().len();
        for other in (0..count).filter(|other| *other != index) {
            if !cut.parts(Place::Node(other), Place::Node(index)) {
                continue;
            }
            let at = since.after(noticed(index, other));
            if at > now || at <= life.looked {
                continue;
            }
            if cut.is_on() {
                life.cluster.suspect(&id(other));
            } else if !silent.contains_key(&other) {
                life.cluster.hear(&id(other), since);
            }
        }
    }

    /// What each node said at its last round that it has to do.
    fn hear_loads(&self, index: usize, life: &Life) {
        for node in &*self.nodes.read() {
            if node.index == index {
                node.desk.told.store(node.desk.calls(), Relaxed);
                continue;
            }
            let load = Load {
                calls: node.desk.told.load(Relaxed),
                ..Load::default()
            };
            life.cluster.hear_load(&node.id, load);
        }
    }

    /// What a node declares goes on its way, and what it sees is written down.
    fn tell(&self, node: &Node, life: &mut Life, now: Tick) {
        let me = life.cluster.declared();
        if (me.generation, me.version) != life.told {
            life.told = (me.generation, me.version);
            self.history.note(format_args!(
                "declares {} {} {} {} {}",
                node.id, me.generation, me.version, me.weight, me.state as u8
            ));
            self.learn([me.clone()], now);
            self.say(node.index, me, now);
        }
        let digest = life.cluster.digest();
        if digest == life.digest {
            return;
        }
        life.digest = digest;
        self.history.note(format_args!("sees {} {digest}", node.id));
        self.talk.seen.lock().insert(digest);
        let roster = life.cluster.roster();
        let is_gone = |member: &&Member| member.state == MemberState::Gone;
        for gone in roster.view.members().iter().filter(is_gone) {
            let name = (gone.id.clone(), gone.generation, gone.version);
            if !self.talk.buried.lock().insert(name) {
                continue;
            }
            self.history
                .note(format_args!("buries {} {}", node.id, gone.id));
            // Who only does not answer here and now is there all the same.
            let buried = index_of(&gone.id).map(|index| self.node(index));
            let is_dead = |other: Arc<Node>| other.index != node.index && other.is_dead();
            if buried.is_some_and(is_dead) {
                self.learn([gone.clone()], now);
            }
            self.say(node.index, gone.clone(), now);
        }
    }

    fn say(&self, from: usize, member: Member, now: Tick) {
        let mut news = self.talk.news.lock();
        news.push(News {
            member,
            born: now,
            from,
        });
    }

    /// Who was killed does not contradict a tombstone of its that somebody across a cut wrote before: it is true now, unless
    /// the contradiction was told already. One that nobody has heard of is none.
    pub(super) fn answers_no_more(&self, index: usize, now: Tick) {
        let me = self.node(index).life.lock().cluster.declared();
        let buried = self.talk.buried.lock().clone();
        let tombstones = buried
            .into_iter()
            .filter(|(id, generation, _)| *id == me.id && *generation == me.generation)
            .map(|(_, _, version)| Member {
                version,
                state: MemberState::Gone,
                ..me.clone()
            });
        // What was told later outweighs them.
        self.learn(tombstones, now);
    }

    /// How many different views anybody had.
    pub(super) fn views(&self) -> usize {
        self.talk.seen.lock().len()
    }
}

impl Node {
    /// Whether it is gone for good.
    fn is_dead(&self) -> bool {
        // A round holds its own life alone, and nobody waits for another's meanwhile.
        self.life.lock().health == Health::Down
    }
}

/// How long until one notices that another is silent.
fn noticed(index: usize, other: usize) -> Duration {
    Duration::from_millis(1000 + spread(index, other) % 1500)
}
