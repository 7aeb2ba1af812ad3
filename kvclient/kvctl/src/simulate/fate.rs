//! What befalls the members, carried out.
//!
//! ```text
//! join     a life with the view of somebody who is there        kill     no more life, no more blocks
//! restart  away for a moment, then another life, same blocks    freeze   calls end at their deadlines for a moment
//! drain    hands over, says what it could not, leaves           lie      answers peers other bytes for a moment
//! cut      two sides, for a moment                              slow     slow and lossy links, for a moment
//! ```
//!
//! Units: [`Tick`](kvserver::clock::Tick). Errors: none; what would leave too few members does not happen.

use std::{sync::Arc, time::Duration};

use kvproto::{Member, MemberState};
use kvserver::{
    blocks::motion::{Holdings, Shelf},
    clock::Clock,
    peers::net::Fault,
};

use super::{
    feed::Event,
    gossip::LONGEST_WAY,
    hot::HOT_PROMPT,
    links::Place,
    node::Health,
    town::{RUN_BLOCKS, Town, UNIT, declared, id, index_of, spread},
};

/// How long a drain has to hand over.
const DRAIN_TIME: Duration = Duration::from_secs(12);

impl Town {
    /// Something happens.
    pub(super) async fn befall(self: &Arc<Self>, event: Event) {
        let index = match event {
            Event::Join { .. } | Event::Cut { .. } | Event::Slow { .. } => self.count(),
            Event::Kill { nth }
            | Event::Restart { nth, .. }
            | Event::Freeze { nth, .. }
            | Event::Lie { nth, .. }
            | Event::Drain { nth } => match self.living(nth) {
                Some(index) => index,
                None => return,
            },
            Event::KillOwner { run, place } => match self.owner_at(run, place) {
                Some(index) => index,
                None => return,
            },
        };
        self.history
            .note(format_args!("befalls {} {event:?}", id(index)));
        match event {
            Event::Join { weight } => {
                let asked = self.neighbour(index).unwrap_or(0);
                let view = self.node(asked).life.lock().cluster.roster().view.clone();
                self.build(index, declared(index, UNIT * weight, 1), &view, None);
                self.round(index);
            }
            Event::Kill { .. } | Event::KillOwner { .. } => {
                self.stop(index, Health::Down).await;
                let now = self.clock.now();
                self.ledger
                    .lost(&self.node(index).shelf, &self.shelves(), now);
                self.node(index).shelf.clear();
                self.answers_no_more(index, now);
            }
            Event::Restart { down, .. } => self.restart(index, down).await,
            Event::Freeze { down, .. } => {
                self.fault(index, Health::Frozen, Fault::Frozen);
                self.clock.sleep(down).await;
                self.fault(index, Health::Up, Fault::None);
            }
            Event::Lie { down, .. } => {
                let id = self.node(index).id.clone();
                self.net.fault(&id, Fault::Lies);
                self.clock.sleep(down).await;
                self.net.fault(&id, Fault::None);
            }
            Event::Drain { .. } => self.drain(index).await,
            Event::Cut { salt, down } => {
                self.links.cut(salt);
                self.clock.sleep(down).await;
                self.links.heal();
                self.ledger.healed(self.clock.now());
                self.history.note(format_args!("healed"));
            }
            Event::Slow { salt, down } => {
                self.links.slow(salt);
                self.clock.sleep(down).await;
                self.links.even();
            }
        }
    }

    async fn restart(self: &Arc<Self>, index: usize, down: Duration) {
        // As on disk: the members, and who owned what before the changes that were young.
        let (roster, before, me) = {
            let node = self.node(index);
            let life = node.life.lock();
            let roster = life.cluster.roster();
            let before = roster.before(self.clock.now());
            (roster, before, life.cluster.declared())
        };
        self.stop(index, Health::Away).await;
        self.clock.sleep(down).await;
        let me = Member {
            generation: me.generation + 1,
            version: 1,
            weight: self.node(index).weight,
            ..me
        };
        self.talk.silent.lock().remove(&index);
        self.talk.back.lock().insert(index, self.clock.now());
        self.build(index, me, &roster.view, before);
        // Its first call to another brings what it has missed.
        if let Some(asked) = self.neighbour(index) {
            let told = self.node(asked).life.lock().cluster.roster();
            let cluster = Arc::clone(&self.node(index).life.lock().cluster);
            cluster.merge(told.view.members().to_vec());
        }
        self.round(index);
    }

    fn fault(&self, index: usize, health: Health, fault: Fault) {
        let now = self.clock.now();
        let node = self.node(index);
        {
            let mut life = node.life.lock();
            // Something worse may have befallen it meanwhile.
            if !matches!(life.health, Health::Up | Health::Frozen) {
                return;
            }
            life.health = health;
        }
        self.net.fault(&node.id, fault);
        let (mut silent, mut back) = (self.talk.silent.lock(), self.talk.back.lock());
        if health == Health::Up {
            silent.remove(&index);
            back.insert(index, now);
        } else {
            back.remove(&index);
            silent.insert(index, now);
        }
    }

    async fn drain(self: &Arc<Self>, index: usize) {
        let node = self.node(index);
        let (cluster, motion) = {
            let life = node.life.lock();
            (Arc::clone(&life.cluster), Arc::clone(&life.motion))
        };
        cluster.drain();
        self.round(index);
        let until = self.clock.now().after(DRAIN_TIME);
        let progress = motion.drained(until).await;
        let said_at = self.clock.now();
        // What is put here from now on comes from callers that have not heard yet, and is lost with the node.
        let runs = node.shelf.held().iter().map(|run| run.key).collect();
        let spoken_of = node.shelf.blocks_of(&runs);
        self.history.note(format_args!(
            "drained {} {} {}",
            node.id,
            progress.moved_runs,
            progress.at_stake_bytes()
        ));
        cluster.leave();
        self.round(index);
        // Its last word is out; what it still holds may be fetched until it has been heard by all.
        self.clock.sleep(LONGEST_WAY).await;
        self.stop(index, Health::Down).await;
        let (said, left) = (progress.at_stake_bytes(), self.shelves());
        self.ledger
            .drained(&node.shelf, &spoken_of, &left, said, said_at);
        node.shelf.clear();
    }

    async fn stop(&self, index: usize, health: Health) {
        let node = self.node(index);
        let (motion, has_left) = {
            let mut life = node.life.lock();
            life.health = health;
            let state = life.cluster.declared().state;
            (Arc::clone(&life.motion), state == MemberState::Gone)
        };
        self.net.detach(&node.id);
        if !has_left {
            self.talk.back.lock().remove(&index);
            self.talk.silent.lock().insert(index, self.clock.now());
        }
        motion.stop().await;
    }

    /// The nth of those who are up and take runs.
    fn living(&self, nth: u64) -> Option<usize> {
        let nodes = self.nodes.read();
        let is_living = |index: &usize| {
            let life = nodes[*index].life.lock();
            life.health == Health::Up && life.cluster.declared().state.takes_runs()
        };
        let living: Vec<usize> = (0..nodes.len()).filter(is_living).collect();
        // Never the last few: somebody has to be there.
        (living.len() > 3).then(|| living[(nth % living.len() as u64) as usize])
    }

    /// The owner of a run of the prompt that a crowd reads, or who comes so many places after it.
    fn owner_at(&self, run: u32, place: usize) -> Option<usize> {
        let first = (run * RUN_BLOCKS) as usize;
        let run = self.prompt(HOT_PROMPT).place(first, RUN_BLOCKS).run;
        let ranked = self.ledger.ranked(&run, place + 1);
        let index = index_of(ranked.get(place)?)?;
        self.node(index).is_up().then_some(index)
    }

    /// Somebody else who answers `index`.
    fn neighbour(&self, index: usize) -> Option<usize> {
        let start = spread(index, 1);
        (0..self.count() as u64)
            .filter_map(|step| self.living(start.wrapping_add(step)))
            .filter(|&other| other != index)
            .find(|&other| !self.links.is_cut(Place::Node(index), Place::Node(other)))
    }

    /// What is on nodes that are there, or will be again.
    pub(super) fn shelves(&self) -> Vec<Arc<Shelf>> {
        let nodes = self.nodes.read();
        let is_here = |node: &&Arc<super::node::Node>| node.life.lock().health != Health::Down;
        nodes
            .iter()
            .filter(is_here)
            .map(|node| Arc::clone(&node.shelf))
            .collect()
    }
}
