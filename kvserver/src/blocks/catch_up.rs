//! A node that was away learns what the others were told to forget meanwhile.
//!
//! ```text
//! start    before anybody is served: some of the members that were known last ─► Invalidations ─► forgotten
//! follow   a member that was not here is here, for the first time or again, or
//!          this node was gone for the others and is not                        ─► the same
//! ```
//!
//! Whoever was gone asks those who were there; whoever was cut off from half of the others asks that half, and is asked by
//! it. Before it serves, a node asks a few, for one answer is enough of those who were there all the time; afterwards it
//! asks them all. Where somebody was away this node hands nothing over until it has asked (`Cluster::is_behind`), or a
//! stale block could come to one that has forgotten it long ago.
//!
//! Bounds: [`MOST_ASKED`] calls at once; nothing is handed over for [`MOST_BEHIND`] at most. Units: durations. Errors: a
//! member that does not answer is asked again, after [`PAUSE`] where nobody does, as long as it is here.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Arc, Weak},
    time::Duration,
};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use kvproto::{Member, MemberId, MemberState, View};

use super::{Blocks, invalidations::Invalidation};
use crate::{
    clock::{Clock, Tick},
    cluster::{Caller, News},
};

/// Members that are asked at once.
const MOST_ASKED: usize = 8;

/// Times that members are asked before this node serves without an answer: all of them may be down.
const TRIES_AT_START: usize = 3;

/// Between two of these.
const PAUSE_AT_START: Duration = Duration::from_millis(250);

/// How long members are waited for once one of those that were asked has answered; the others are asked again.
const AFTER_FIRST: Duration = Duration::from_millis(250);

/// Before the next try where nobody answered.
const PAUSE: Duration = Duration::from_secs(1);

/// How long a member that is here and does not answer keeps this node from handing anything over.
const MOST_BEHIND: Duration = Duration::from_secs(5);

/// Before this node serves anybody: `view` is what is known of the cluster by then.
pub(crate) async fn at_start(blocks: &Blocks, caller: &Caller, view: &View) {
    let me = blocks.cluster().me();
    let others = view.members().iter();
    let mut others: Vec<&Member> = others
        .filter(|member| member.id != *me && !member.address.is_empty())
        .collect();
    // Who was gone when this node stopped may be here by now.
    others.sort_by_key(|member| member.state == MemberState::Gone);
    others.truncate(MOST_ASKED);
    if others.is_empty() {
        return;
    }
    for number in 0..TRIES_AT_START {
        if number > 0 {
            blocks.clock.sleep(PAUSE_AT_START).await;
        }
        let remembers = |answer: &Answer| answer.remembers;
        if ask(blocks, caller, &others).await.iter().any(remembers) {
            return;
        }
    }
    tracing::warn!(
        "no member says what was invalidated meanwhile; it will be asked again when one is here"
    );
    blocks.cluster().fall_behind();
}

/// Goes on as long as the node lives.
pub(crate) async fn follow(blocks: Weak<Blocks>, caller: Caller, clock: Arc<dyn Clock>) {
    let Some(cluster) = blocks.upgrade().map(|blocks| Arc::clone(blocks.cluster())) else {
        return;
    };
    let mut changes = cluster.changes();
    let mut following = Following::default();
    loop {
        changes.mark_unchanged();
        // In this order: who appears after it is news of the next change.
        let news = cluster.take_news();
        let roster = cluster.roster();
        let here = roster.present().filter(|m| m.id != *cluster.me());
        let here: BTreeMap<&MemberId, &Member> = here.map(|m| (&m.id, m)).collect();
        following.look(here.keys().copied(), news, clock.now());
        if following.is_late(clock.now()) {
            cluster.has_caught_up();
        }
        let next: Vec<&Member> = following.next().map(|id| here[id]).collect();
        if next.is_empty() {
            cluster.has_caught_up();
            match changes.changed().await {
                Ok(()) => continue,
                Err(_) => return,
            }
        }
        let Some(blocks) = blocks.upgrade() else {
            return;
        };
        let answered = ask(&blocks, &caller, &next).await;
        drop(blocks);
        let answered: Vec<MemberId> = answered.into_iter().map(|answer| answer.of).collect();
        if !following.answered(&answered) {
            clock.sleep(PAUSE).await;
        }
    }
}

/// Whom this node has to ask.
#[derive(Debug, Default)]
struct Following {
    /// In this order.
    waiting: VecDeque<MemberId>,
    /// When the last of them came; `None`: there are none.
    since: Option<Tick>,
    has_looked: bool,
}

impl Following {
    /// These are here now.
    fn look<'a>(&mut self, here: impl Iterator<Item = &'a MemberId>, news: News, now: Tick) {
        let here: BTreeSet<&MemberId> = here.collect();
        let asks_all = news.was_gone || !std::mem::replace(&mut self.has_looked, true);
        for id in &here {
            let is_new = asks_all || news.appeared.contains(*id);
            if is_new && !self.waiting.contains(id) {
                self.waiting.push_back((*id).clone());
                self.since = Some(now);
            }
        }
        self.waiting.retain(|id| here.contains(id));
        if self.waiting.is_empty() {
            self.since = None;
        }
    }

    /// Whether somebody has not answered for long.
    fn is_late(&self, now: Tick) -> bool {
        self.since
            .is_some_and(|since| now.since(since) >= MOST_BEHIND)
    }

    /// Those that are asked next.
    fn next(&self) -> impl Iterator<Item = &MemberId> {
        self.waiting.iter().take(MOST_ASKED)
    }

    /// These of them answered; the others come after all that wait. Whether anybody did.
    fn answered(&mut self, answered: &[MemberId]) -> bool {
        let asked = self.waiting.len().min(MOST_ASKED);
        let asked: Vec<MemberId> = self.waiting.drain(..asked).collect();
        let silent = asked.into_iter().filter(|id| !answered.contains(id));
        self.waiting.extend(silent);
        !answered.is_empty()
    }
}

/// A member's answer, which was taken to heart.
struct Answer {
    of: MemberId,
    /// One of an earlier version does not.
    remembers: bool,
}

/// Asks all of these at once, and forgets what they were told; answers who answered, those that did soon after the first.
async fn ask(blocks: &Blocks, caller: &Caller, members: &[&Member]) -> Vec<Answer> {
    let known = blocks.invalidations().digest();
    let asking = members.iter().map(|member| async move {
        let told = caller.invalidations(&member.address, known).await;
        (*member, told)
    });
    let mut asking: FuturesUnordered<_> = asking.collect();
    let mut answered = Vec::new();
    let mut late = blocks.clock.sleep(Duration::MAX);
    loop {
        let (member, told) = tokio::select! {
            next = asking.next() => match next {
                Some(next) => next,
                None => return answered,
            },
            () = &mut late => return answered,
        };
        let remembers = matches!(told, Ok(Some(_)));
        let told = told.and_then(|told| {
            let told = told.unwrap_or_default().told.into_iter();
            let told: Result<Vec<_>, _> = told.map(Invalidation::try_from).collect();
            told.map_err(|error| error.to_string())
        });
        let forgotten = match told {
            Ok(told) => blocks.forget_missed(told).await,
            Err(problem) => {
                tracing::debug!(member = %member.id, problem, "a member does not say what was invalidated");
                continue;
            }
        };
        match forgotten {
            Ok(0) => {}
            Ok(count) => {
                tracing::info!(blocks = count, member = %member.id, "forgotten: invalidated while this node was away");
            }
            Err(error) => {
                tracing::warn!(%error, "invalidated while this node was away, and to be asked for again");
                continue;
            }
        }
        if answered.is_empty() {
            late = blocks.clock.sleep(AFTER_FIRST);
        }
        answered.push(Answer {
            of: member.id.clone(),
            remembers,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(names: &[&str]) -> Vec<MemberId> {
        names.iter().map(|name| MemberId::from(*name)).collect()
    }

    fn at(seconds: u64) -> Tick {
        Tick(Duration::from_secs(seconds))
    }

    fn look(following: &mut Following, here: &[&str], news: News) -> Vec<MemberId> {
        following.look(ids(here).iter(), news, at(0));
        following.next().cloned().collect()
    }

    fn appeared(names: &[&str]) -> News {
        News {
            appeared: ids(names).into_iter().collect(),
            ..News::default()
        }
    }

    #[test]
    fn at_first_all_are_asked_and_then_who_appears() {
        let mut following = Following::default();
        let none = News::default;
        assert_eq!(look(&mut following, &["a", "b"], none()), ids(&["a", "b"]));
        assert!(following.answered(&ids(&["a", "b"])));
        assert!(look(&mut following, &["a", "b"], none()).is_empty());
        let news = appeared(&["c", "gone again"]);
        assert_eq!(look(&mut following, &["a", "b", "c"], news), ids(&["c"]));
        assert!(
            look(&mut following, &["a", "b"], none()).is_empty(),
            "it went"
        );
    }

    #[test]
    fn who_was_gone_asks_all() {
        let mut following = Following::default();
        look(&mut following, &["a", "b"], News::default());
        following.answered(&ids(&["a", "b"]));
        let news = News {
            was_gone: true,
            ..News::default()
        };
        assert_eq!(look(&mut following, &["a", "b"], news), ids(&["a", "b"]));
    }

    #[test]
    fn who_does_not_answer_is_asked_after_the_others_and_holds_nothing_up_for_long() {
        let mut following = Following::default();
        let all: Vec<String> = (0..=MOST_ASKED).map(|n| format!("n{n}")).collect();
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        let first = look(&mut following, &all, News::default());
        assert_eq!(first.len(), MOST_ASKED);
        assert!(!following.answered(&[]));
        let next = look(&mut following, &all, News::default());
        assert_eq!(next[0], MemberId::from(all[MOST_ASKED]));
        assert!(!following.is_late(at(4)) && following.is_late(at(5)));
        // Who comes while others are silent has his own time.
        let mut other = Following::default();
        look(&mut other, &["silent"], News::default());
        other.look(ids(&["silent", "late"]).iter(), appeared(&["late"]), at(20));
        assert!(!other.is_late(at(24)) && other.is_late(at(25)));
        following.answered(&next);
        following.answered(&ids(&all));
        look(&mut following, &all, News::default());
        assert!(!following.is_late(at(9)), "nobody is waited for");
    }
}
