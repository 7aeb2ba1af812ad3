//! Lookup at every owner of a chain at once, and one prefix out of their answers.
//!
//! ```text
//! split ─┬─ owner of runs 0, 3 ── answer: 2 of 2 runs ─┐
//!        ├─ owner of run 1 ────── answer: half of it ──┴─► settled: nobody behind it can lengthen the prefix
//!        └─ owner of run 2 ────── (still out) ──► waited for in the background, its lease given back
//! ```
//!
//! A run that lies with two is asked of the one that has less to do (see `choice`). Where the prefix ends in a run that
//! somebody was asked for who only has it for a while (a guest there), the call is made again, of owners.
//!
//! Owners have three quarters of the call's time, so that a call by an outdated view can be made again. From the moment
//! that the owner of the first runs has answered, the others have [`LATE_LEAST`] or [`LATE_TIMES`] times as long as it
//! took, whichever is more: who is later counts as having nothing, and is looked at.
//!
//! One lease id goes to all of them, made from the caller and the idempotency key, so that asking again names the same
//! lease everywhere. A node where somebody has that id chooses another, which the [`Lease`] keeps beside it.
//!
//! Units: blocks, durations.
//! Errors: [`Error`] when nobody answers and nobody else is well; who does not answer while others do has nothing.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use futures_util::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use kvproto::{BootId, Chain, LeaseId, TierKind, convert::answer, key::RunHash};

use super::{
    Fleet, Roster,
    choice::{Choice, Chosen},
    share::{Asking, OfShare, Question},
};
use crate::{
    call::Deadline,
    client::Lookup,
    error::Error,
    lease::{Holder, Lease},
    route::{Assembly, Split},
};

/// Shortest time that later owners have once the owner of the first runs has answered: more than a node takes to fetch
/// what is on its way to it.
const LATE_LEAST: Duration = Duration::from_millis(250);

/// And as multiple of what that owner took.
const LATE_TIMES: u32 = 8;

/// Asks all owners; once more where another view has come with the answers and moves what was missed, or where who was
/// asked in an owner's place lacks it.
pub(crate) async fn everywhere(
    fleet: &Fleet,
    roster: Arc<Roster>,
    question: Question,
    chain: &Chain,
    deadline: Deadline,
    budget: Duration,
) -> Result<Lookup, Error> {
    let mut guests = BTreeSet::new();
    let first = attempt(&roster, &question, chain, deadline, budget, &mut guests).await;
    let gap = first
        .as_ref()
        .map_or(0, |found| found.present_blocks as usize);
    if gap == chain.len() || first.as_ref().is_err_and(Error::is_final) {
        return first;
    }
    let run_blocks = question.namespace.run_blocks();
    let run = chain.place(gap, run_blocks).run;
    let newest = fleet.roster().filter(|newest| !newest.agrees(&roster));
    let has_moved = newest.as_ref().is_some_and(|newest| {
        newest.number_of(&roster, roster.owner(&run)) != Some(newest.owner(&run))
    });
    let was_guest = guests.contains(&run);
    if !has_moved && !was_guest {
        return first;
    }
    if was_guest {
        // Their owners are asked, now and until they say anew who else has them.
        let behind = chain
            .runs(run_blocks)
            .filter(|(_, blocks)| blocks.end > gap);
        let lacking = behind.filter(|(run, _)| guests.contains(run));
        lacking.for_each(|(run, _)| roster.shun(&run));
    }
    tracing::debug!(gap, has_moved, was_guest, "asking those who own it now");
    let newest = newest.unwrap_or(roster);
    let question = question.again();
    let again = attempt(&newest, &question, chain, deadline, budget, &mut guests).await;
    match (first, again) {
        (Err(_), again) => again,
        // What the other holds is given back as it is dropped.
        (Ok(first), Ok(again)) if again.worth() > first.worth() => Ok(again),
        (first, _) => first,
    }
}

async fn attempt(
    roster: &Arc<Roster>,
    question: &Question,
    chain: &Chain,
    deadline: Deadline,
    budget: Duration,
    guests: &mut BTreeSet<RunHash>,
) -> Result<Lookup, Error> {
    let recipe = &roster.recipe;
    let clock = &*recipe.clock;
    let run_blocks = question.namespace.run_blocks();
    let replicas = question.namespace.replicas();
    let chosen = Choice::new(roster, replicas).split(chain, run_blocks);
    let Chosen { split, strays, .. } = chosen;
    *guests = chosen.guests;
    let has_others = replicas > 1 || roster.names_seconds();
    let began = clock.now();
    let share = Deadline::after(clock, deadline.left(began) * 3 / 4);
    let lease_id = question.lease_id(&recipe.owner);
    let question = Arc::new(question.clone());
    let mut asked = Asked::new();
    let mut answers = Answers::new(roster, &split);
    for (number, of_owner) in split.shares.iter().enumerate() {
        let asking = Asking {
            roster: roster.clone(),
            question: question.clone(),
            member: of_owner.member,
            chain: of_owner.chain(chain, run_blocks),
            lease_id,
            deadline: share,
            strays,
            has_others,
            tried: Vec::new(),
        };
        asked.push(Box::pin(async move { (number, asking.run().await) }));
    }
    let mut late: Option<BoxFuture<'static, ()>> = None;
    while !answers.present.is_settled() {
        let next = match &mut late {
            None => asked.next().await,
            Some(late) => tokio::select! {
                biased;
                next = asked.next() => next,
                () = late => {
                    answers.suspect_late();
                    None
                }
            },
        };
        let Some((number, answer)) = next else {
            break;
        };
        match answer {
            Ok(answer) => answers.take(number, answer),
            Err(error) => answers.lost(number, error),
        }
        if late.is_none() && answers.present.prefix() > 0 {
            let took = clock.now().since(began);
            late = Some(clock.sleep((took * LATE_TIMES).max(LATE_LEAST)));
        }
    }
    if !asked.is_empty() {
        // Bounded by the owners' share of this call's time.
        recipe.runtime.spawn(give_back(asked));
    }
    answers.assemble(chain.len(), budget)
}

/// Owners that are asked; each with its number among the shares.
type Asked = FuturesUnordered<BoxFuture<'static, (usize, Result<OfShare, Error>)>>;

/// Waits for answers that come too late to matter, and gives their leases back.
async fn give_back(mut asked: Asked) {
    while let Some((_, answer)) = asked.next().await {
        if let Ok(answer) = answer {
            answer.let_go();
        }
    }
}

/// What the owners have said so far.
struct Answers<'a> {
    roster: &'a Arc<Roster>,
    split: &'a Split,
    present: Assembly<'a>,
    leased: Assembly<'a>,
    tiers: Vec<Vec<(u32, TierKind)>>,
    holders: Vec<Vec<(Holder, answer::Lease)>>,
    stand_ins: Vec<(RunHash, usize)>,
    boot: BootId,
    /// The first failure that speaks of an owner, and the first that speaks of the call.
    failed: Option<Error>,
    refused: Option<Error>,
    lost: Vec<usize>,
    answered: usize,
}

impl<'a> Answers<'a> {
    fn new(roster: &'a Arc<Roster>, split: &'a Split) -> Self {
        let shares = split.shares.len();
        Self {
            roster,
            split,
            present: Assembly::new(split),
            leased: Assembly::new(split),
            tiers: vec![Vec::new(); shares],
            holders: vec![Vec::new(); shares],
            stand_ins: Vec::new(),
            boot: BootId(0),
            failed: None,
            refused: None,
            lost: Vec::new(),
            answered: 0,
        }
    }

    fn take(&mut self, number: usize, answer: OfShare) {
        self.answered += 1;
        self.present.answered(number, answer.present);
        self.leased.answered(number, answer.leased);
        self.tiers[number] = answer.tiers;
        self.holders[number] = answer.holders;
        self.stand_ins.extend(answer.stand_ins);
        if number == 0 || self.boot.0 == 0 {
            self.boot = answer.boot;
        }
    }

    fn lost(&mut self, number: usize, error: Error) {
        self.present.lost(number);
        self.leased.lost(number);
        self.lost.push(self.split.shares[number].member);
        if error.is_final() {
            self.refused.get_or_insert(error);
        } else {
            tracing::debug!(%error, "an owner does not answer; the prefix ends before its runs");
            self.failed.get_or_insert(error);
        }
    }

    /// Who has not answered yet is looked at.
    fn suspect_late(&self) {
        for (number, share) in self.split.shares.iter().enumerate() {
            if self.present.is_asked(number)
                && let Ok(inner) = self.roster.node(share.member)
            {
                inner.pool.suspect();
                self.roster.report(share.member);
            }
        }
    }

    fn assemble(self, blocks: usize, budget: Duration) -> Result<Lookup, Error> {
        let present = self.present.prefix().min(blocks);
        let leased = self.leased.prefix().min(present);
        let shares = self.split.shares.iter().zip(self.holders);
        let (mut holders, mut ttl_ms, mut bytes) = (Vec::new(), u32::MAX, 0);
        for (share, of_share) in shares {
            let is_kept = share.first() < leased && self.refused.is_none();
            for (holder, lease) in of_share {
                if is_kept {
                    ttl_ms = ttl_ms.min(lease.ttl_ms);
                    bytes += lease.bytes;
                    holders.push(holder);
                } else {
                    holder.inner.let_go(holder.id);
                }
            }
        }
        if let Some(error) = self.refused {
            return Err(error);
        }
        if let Some(error) = self.failed.filter(|_| self.answered == 0) {
            let lost = self.lost;
            if !self.roster.is_anybody_well(|member| lost.contains(&member)) {
                return Err(error);
            }
        }
        let terms = answer::Lease {
            id: LeaseId(0),
            ttl_ms,
            blocks: leased as u32,
            bytes,
        };
        Ok(Lookup {
            present_blocks: present as u32,
            tiers: self.present.stretches(present, &self.tiers),
            lease: Lease::shared(self.roster, budget, holders, self.stand_ins, terms),
            boot_id: self.boot,
        })
    }
}

impl Lookup {
    /// What it is good for: blocks that a get may rely on, or for a probe those that are there.
    fn worth(&self) -> (u32, u32) {
        (self.leased_blocks(), self.present_blocks)
    }
}
