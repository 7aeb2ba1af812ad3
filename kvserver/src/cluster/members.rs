//! What this node knows of the cluster, and every rule by which that changes. No I/O, no clock: the moment is an argument.
//!
//! ```text
//! merge(news) ─┐
//! suspect, hear ┼─► view, suspects, past ─► Roster
//! tick ────────┤     joining ─4 steps of weight─► active ─► draining ─► gone
//! set_weight, drain, leave ─┘
//! ```
//!
//! Of itself a node alone speaks: news of this node that would win over what it declares is answered by a higher
//! version of the same declaration, which is also how a node that was declared lost lives again. Nobody else's
//! declaration is ever changed but into a tombstone.
//!
//! Bounds: [`MOST_PAST`] past views. Units: [`Tick`]. Errors: none.
//! Why apart from the gossip: the same code runs on a simulator's clock.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use kvproto::{Member, MemberId, MemberState, View, ViewDigest, placement::Placement};

use super::{
    placements::Placements,
    roster::Roster,
    standing::{Standing, Suspects},
};
use crate::clock::Tick;

/// Views before recent changes that are kept. When there are more, the oldest stays, for most blocks were put under it,
/// and the one goes that lasted shortest: when a network heals that was in two parts, a storm of changes comes that last
/// for milliseconds, and what was put while it was apart lies where the view before the storm says.
pub const MOST_PAST: usize = 8;

/// Steps in which a joining member's weight grows to its full size.
pub const RAMP_STEPS: u32 = 4;

/// How long a tombstone is kept. Longer than anybody's gossip remembers the dead; who comes back later with old news
/// brings a member that nobody hears, and it is suspected, and lost, once more.
pub const TOMBSTONES_KEPT: Duration = Duration::from_secs(24 * 3600);

/// Times by which members come and go.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// From the first suspicion to a tombstone.
    pub suspect_grace: Duration,
    /// How long a change is young.
    pub motion_window: Duration,
    /// In which a joining member's weight grows to its full size.
    pub join_ramp: Duration,
}

/// Who may have been told what others were not, or the other way round.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct News {
    /// Members that were not here, or gone, and are here.
    pub appeared: BTreeSet<MemberId>,
    /// One of them had been gone.
    pub is_back: bool,
    /// This node was gone for the others, because it had left or they had declared it so, and is not any more.
    pub was_gone: bool,
}

/// The state of the membership on one node.
#[derive(Clone, Debug)]
pub struct Members {
    times: Times,
    /// What this node declares; the view's own entry always equals it.
    me: Member,
    /// Its weight once it has joined.
    weight: u32,
    /// When it began to join; `None`: it does not.
    joining: Option<Tick>,
    view: View,
    /// Of the view.
    digest: ViewDigest,
    suspects: Suspects,
    /// Tombstones, and since when they are known here.
    departed: BTreeMap<MemberId, Tick>,
    placement: Arc<Placement>,
    placements: Arc<Placements>,
    past: Vec<(Tick, Arc<Placement>)>,
    changed: Tick,
    news: News,
}

impl Members {
    /// A node that declares `me`, with what it knows already. It ramps up if there are others that take runs and it
    /// does not have a place among them.
    #[must_use]
    pub fn new(times: Times, me: Member, known: &View, now: Tick) -> Self {
        Self::sharing(times, me, known, now, Arc::default())
    }

    /// The same; placements are those of all who share `placements`.
    #[must_use]
    pub fn sharing(
        times: Times,
        mut me: Member,
        known: &View,
        now: Tick,
        placements: Arc<Placements>,
    ) -> Self {
        let is_other = |member: &Member| member.id != me.id && member.state.takes_runs();
        let has_others = known.members().iter().any(is_other);
        let before = known.get(&me.id);
        if let Some(before) = before {
            (me.generation, me.version) = above(&me, before);
        }
        let had_place = before.is_some_and(|before| before.state.takes_runs());
        let weight = me.weight;
        let ramps = has_others && !had_place && !times.join_ramp.is_zero();
        me.state = match ramps {
            true => MemberState::Joining,
            false => MemberState::Active,
        };
        let mut members = Self {
            times,
            weight,
            joining: ramps.then_some(now),
            view: known.clone(),
            digest: ViewDigest::default(),
            suspects: Suspects::default(),
            departed: BTreeMap::new(),
            placement: Arc::default(),
            placements,
            past: Vec::new(),
            changed: now,
            news: News::default(),
            me,
        };
        if ramps {
            members.me.weight = step(weight, 1);
        }
        for member in known.members() {
            if member.state == MemberState::Gone {
                members.departed.insert(member.id.clone(), now);
            }
        }
        members.view.merge_one(members.me.clone());
        members.departed.remove(&members.me.id);
        members.digest = members.view.digest();
        members.placement = members.placements.of(&members.view, members.digest);
        let before = known.digest();
        if has_others && members.digest != before {
            let placement = members.placements.of(known, before);
            members.past.push((now, placement));
        }
        members
    }

    /// What lies here was put under `before`, in an earlier life of this node: where that has changed, the change is as
    /// young as this life.
    pub fn remember(&mut self, before: &View, now: Tick) {
        let digest = before.digest();
        self.owned_by(self.placements.of(before, digest), now);
    }

    /// The same, where it is known who owned what then.
    pub fn owned_by(&mut self, before: Arc<Placement>, now: Tick) {
        let oldest = self.past.last().map_or(&self.placement, |(_, past)| past);
        if !before.is_empty() && !Arc::ptr_eq(&before, oldest) {
            self.past.push((now, before));
        }
    }

    /// What this node declares of itself.
    #[must_use]
    pub fn me(&self) -> &Member {
        &self.me
    }

    /// Everybody this node knows of.
    #[must_use]
    pub fn view(&self) -> &View {
        &self.view
    }

    /// How many are suspect.
    #[must_use]
    pub fn suspects(&self) -> usize {
        self.suspects.len()
    }

    /// Who came, and came back, since [`Members::take_news`].
    #[must_use]
    pub fn news(&self) -> &News {
        &self.news
    }

    /// The same; from now on only what comes after it is news.
    pub fn take_news(&mut self) -> News {
        std::mem::take(&mut self.news)
    }

    /// How a member stands.
    #[must_use]
    pub fn standing(&self, id: &MemberId) -> Standing {
        match self.view.get(id) {
            None => Standing::Departed,
            Some(member) if member.state == MemberState::Gone => Standing::Departed,
            Some(member) => match self.suspects.since(member) {
                Some(since) => Standing::Suspect { since },
                None => Standing::Well,
            },
        }
    }

    /// Takes over what is news. True when the view changed.
    pub fn merge(&mut self, news: impl IntoIterator<Item = Member>, now: Tick) -> bool {
        self.change(now, |members| {
            news.into_iter()
                .map(|member| members.merge_one(member, now))
                .fold(false, |any, one| any | one)
        })
    }

    /// `id` is silent. True when it was not suspect before.
    pub fn suspect(&mut self, id: &MemberId, now: Tick) -> bool {
        match self.view.get(id) {
            Some(member) if member.state != MemberState::Gone && *id != self.me.id => {
                self.suspects.add(member, now)
            }
            _ => false,
        }
    }

    /// `id` gave a sign of life at `at`; what happened before that is no suspicion. True when it was suspect.
    pub fn hear(&mut self, id: &MemberId, at: Tick) -> bool {
        self.suspects.clear_before(id, at)
    }

    /// Time has passed: graces and ramps end, old tombstones and old views are forgotten. True when the view changed.
    pub fn tick(&mut self, now: Tick) -> bool {
        let window = self.times.motion_window;
        self.past
            .retain(|(changed, _)| now.since(*changed) < window);
        let forgotten: Vec<MemberId> = self
            .departed
            .iter()
            .filter(|(_, since)| now.since(**since) >= TOMBSTONES_KEPT)
            .map(|(id, _)| id.clone())
            .collect();
        let lost = self.suspects.lost(self.times.suspect_grace, now);
        if forgotten.is_empty() && lost.is_empty() && self.joining.is_none() {
            return false;
        }
        self.change(now, |members| {
            let mut changed = members.ramp(now);
            for id in lost {
                changed |= members.bury(&id, now);
            }
            if !forgotten.is_empty() {
                let kept = members.view.members().iter();
                members.view = View::new(kept.filter(|m| !forgotten.contains(&m.id)).cloned());
                for id in &forgotten {
                    members.departed.remove(id);
                }
                changed = true;
            }
            changed
        })
    }

    /// Declares another weight; a ramp that is under way goes on towards it. True when the view changed.
    pub fn set_weight(&mut self, weight: u32, now: Tick) -> bool {
        self.weight = weight;
        self.change(now, |members| match members.joining {
            Some(_) => members.ramp(now),
            None => members.declare(|me| me.weight = weight),
        })
    }

    /// Declares another address. True when it was another.
    pub fn set_address(&mut self, address: String) -> bool {
        self.declare(|me| me.address = address)
    }

    /// This node hands over what it has and takes nothing new. True when the view changed.
    pub fn drain(&mut self, now: Tick) -> bool {
        if !self.me.state.takes_runs() {
            return false;
        }
        self.joining = None;
        self.change(now, |members| {
            members.declare(|me| me.state = MemberState::Draining)
        })
    }

    /// This node goes for good. True when the view changed.
    pub fn leave(&mut self, now: Tick) -> bool {
        self.joining = None;
        self.change(now, |members| {
            members.declare(|me| me.state = MemberState::Gone)
        })
    }

    /// This node takes runs again after it was drained, or told to leave. True when the view changed.
    pub fn resume(&mut self, now: Tick) -> bool {
        if self.me.state.takes_runs() {
            return false;
        }
        self.joining = (!self.times.join_ramp.is_zero()).then_some(now);
        self.news.was_gone |= self.me.state == MemberState::Gone;
        self.change(now, |members| {
            let (weight, joins) = (members.weight, members.joining.is_some());
            members.declare(|me| {
                (me.state, me.weight) = match joins {
                    true => (MemberState::Joining, step(weight, 1)),
                    false => (MemberState::Active, weight),
                };
            })
        })
    }

    /// The present moment for readers.
    #[must_use]
    pub fn roster(&self) -> Roster {
        Roster {
            view: self.view.clone(),
            digest: self.digest,
            placement: Arc::clone(&self.placement),
            changed: self.changed,
            window: self.times.motion_window,
            past: self.past.clone(),
            me: self.me.id.clone(),
        }
    }

    /// Makes a change; if it moves owners, the view before it is kept.
    fn change(&mut self, now: Tick, change: impl FnOnce(&mut Self) -> bool) -> bool {
        if !change(self) {
            return false;
        }
        let digest = self.view.digest();
        if self.digest != digest {
            (self.digest, self.changed) = (digest, now);
            let next = self.placements.of(&self.view, digest);
            let before = std::mem::replace(&mut self.placement, next);
            self.past.insert(0, (now, before));
            if self.past.len() > MOST_PAST {
                let lasted = |at: &usize| self.past[*at].0.since(self.past[at + 1].0);
                // Of equals the oldest.
                if let Some(shortest) = (1..MOST_PAST).rev().min_by_key(lasted) {
                    self.past.remove(shortest);
                }
            }
        }
        true
    }

    fn merge_one(&mut self, news: Member, now: Tick) -> bool {
        if news.id == self.me.id {
            return self.answer_for_myself(news);
        }
        let id = news.id.clone();
        let is_gone = news.state == MemberState::Gone;
        let generation = self.view.get(&id).map(|known| known.generation);
        let is_reborn = generation.is_some_and(|known| known < news.generation);
        if !self.view.merge_one(news) {
            return false;
        }
        if is_gone {
            self.suspects.clear(&id);
            self.departed.entry(id).or_insert(now);
        } else {
            let is_back = self.departed.remove(&id).is_some();
            if is_reborn {
                self.suspects.clear(&id);
            }
            if is_back || generation.is_none() {
                self.news.is_back |= is_back;
                self.news.appeared.insert(id);
            }
        }
        true
    }

    /// News of this node that it did not declare: it declares the same as before, above the news.
    fn answer_for_myself(&mut self, news: Member) -> bool {
        if news == self.me {
            return false;
        }
        let mut trial = View::new([self.me.clone()]);
        if !trial.merge_one(news.clone()) {
            return false;
        }
        let (generation, version) = above(&self.me, &news);
        (self.me.generation, self.me.version) = (generation, version);
        self.news.was_gone |= news.state == MemberState::Gone;
        self.view.merge_one(self.me.clone());
        true
    }

    /// Changes what this node declares. True when anything is another.
    fn declare(&mut self, change: impl FnOnce(&mut Member)) -> bool {
        let before = self.me.clone();
        change(&mut self.me);
        if self.me == before {
            return false;
        }
        self.me.version = self.me.version.saturating_add(1);
        self.view.merge_one(self.me.clone());
        true
    }

    /// The step of the ramp that `now` is in.
    fn ramp(&mut self, now: Tick) -> bool {
        let Some(since) = self.joining else {
            return false;
        };
        let whole = self.times.join_ramp.as_millis().max(1);
        let done = now.since(since).as_millis() * u128::from(RAMP_STEPS) / whole;
        let weight = self.weight;
        if done >= u128::from(RAMP_STEPS) {
            self.joining = None;
            return self.declare(|me| (me.state, me.weight) = (MemberState::Active, weight));
        }
        let number = u32::try_from(done).unwrap_or(RAMP_STEPS) + 1;
        self.declare(|me| me.weight = step(weight, number))
    }

    fn bury(&mut self, id: &MemberId, now: Tick) -> bool {
        self.suspects.clear(id);
        let Some(member) = self.view.get(id) else {
            return false;
        };
        let tombstone = Member {
            version: member.version.saturating_add(1),
            state: MemberState::Gone,
            ..member.clone()
        };
        self.departed.insert(id.clone(), now);
        self.view.merge_one(tombstone)
    }
}

/// Weight at step `number` of the ramp; at least 1 of any weight, so that every step takes runs.
fn step(weight: u32, number: u32) -> u32 {
    let share = u64::from(weight) * u64::from(number) / u64::from(RAMP_STEPS);
    u32::try_from(share).unwrap_or(weight).max(1).min(weight)
}

/// Generation and version by which `mine` wins over `theirs`.
fn above(mine: &Member, theirs: &Member) -> (u64, u64) {
    match theirs.generation >= mine.generation {
        true => (
            theirs.generation,
            theirs.version.saturating_add(1).max(mine.version),
        ),
        false => (mine.generation, mine.version),
    }
}
