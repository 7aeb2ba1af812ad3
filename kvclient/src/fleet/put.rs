//! Put at every owner of the blocks at once.
//!
//! ```text
//! blocks  b0 b1 b2 b3 b4 ─ owners of their runs ─► m: b0 b1 b4   k: b2 b3 ─► results, in the caller's order
//!                     rejected by who leaves, or nobody there: to the next who owns it too, until nobody is left
//! ```
//!
//! Of several owners the first that is not known to be silent is asked; it hands on to those behind it. As long as there are
//! others, who is asked has three quarters of the time that is left: one that is slow leaves the next one some.
//!
//! Units: blocks.
//! Errors: [`Error`] when nobody answers and nobody else is well, or when the call is at fault; an owner that does not
//! answer is a rejection for its blocks, reason [`Reason::Node`].

use std::{pin::pin, sync::Arc};

use futures_util::future::join_all;
use kvproto::{Chain, PutOutcome, Reason, convert::answer::PutResult};

use super::{Fleet, Roster, attend::attended};
use crate::{
    call::Deadline,
    error::Error,
    namespace::NamespaceHandle,
    open::{self, Reopening},
    put::{self, PutBlock, PutOptions},
    wire::Method,
};

/// A rejected block may be offered again after so long: by then another view may be here.
const RETRY_AFTER_MS: u32 = 1000;

/// A put in a cluster.
pub(crate) struct Spreading<'a> {
    pub(crate) fleet: &'a Fleet,
    pub(crate) namespace: &'a NamespaceHandle,
    pub(crate) chain: &'a Chain,
    pub(crate) blocks: &'a [PutBlock<'a>],
    pub(crate) options: PutOptions,
    pub(crate) deadline: Deadline,
}

/// The blocks of one owner.
struct Group<'a> {
    member: usize,
    /// Which of the caller's they are.
    numbers: Vec<usize>,
    blocks: Vec<PutBlock<'a>>,
}

/// Whom a round offers each block to, if to anybody.
struct Round {
    roster: Arc<Roster>,
    whom: Vec<Option<usize>>,
}

impl<'a> Spreading<'a> {
    pub(crate) async fn run(&self, roster: Arc<Roster>) -> Result<Vec<PutResult>, Error> {
        for (i, block) in self.blocks.iter().enumerate() {
            put::check(self.namespace, self.chain, i, block)?;
        }
        let nobody = PutResult {
            outcome: PutOutcome::Rejected,
            retry_after_ms: RETRY_AFTER_MS,
            reason: Some(Reason::Node),
        };
        let mut results = vec![nobody; self.blocks.len()];
        let (mut answered, mut lost, mut failed) = (0, Vec::new(), None);
        let mut rounds: Vec<Round> = Vec::new();
        loop {
            let newest = match rounds.len() {
                0 => Some(roster.clone()),
                _ => self.fleet.roster(),
            };
            let Some(round) = newest.and_then(|newest| self.round(newest, &rounds, &results))
            else {
                break;
            };
            let has_others = self.namespace.replicas() > rounds.len() + 1;
            let deadline = self.fleet.part(self.deadline, has_others);
            // A call without time would speak against whoever is asked.
            if !rounds.is_empty() && deadline.left(self.fleet.recipe.clock.now()).is_zero() {
                break;
            }
            let groups = self.groups(&round.whom);
            for (group, answer) in self.offer(&round.roster, &groups, deadline).await? {
                match answer {
                    Ok(answer) => {
                        answered += 1;
                        enter(group, answer, &mut results);
                    }
                    Err(error) => {
                        lost.extend(roster.number_of(&round.roster, group.member));
                        failed.get_or_insert(error);
                    }
                }
            }
            rounds.push(round);
        }
        match failed.filter(|_| answered == 0) {
            Some(error) if !roster.is_anybody_well(|member| lost.contains(&member)) => Err(error),
            _ => Ok(results),
        }
    }

    /// Who is offered what now: each block to its first owner that is not silent, and what those did not take, to the
    /// next. `None`: there is nothing left to offer, or nobody to offer it to.
    fn round(&self, roster: Arc<Roster>, rounds: &[Round], results: &[PutResult]) -> Option<Round> {
        let replicas = self.namespace.replicas();
        let is_first = rounds.is_empty();
        // Blocks of one run follow each other, as a rule.
        let mut last = None;
        let whom = |number: usize| {
            if !is_first && !is_elsewhere(&results[number]) {
                return None;
            }
            let run = self.run_of(number);
            if let Some((_, owner)) = last.filter(|(of, _)| is_first && *of == run) {
                return owner;
            }
            let asked = rounds.iter().filter_map(|round| {
                let member = round.whom[number]?;
                roster.number_of(&round.roster, member)
            });
            let asked: Vec<usize> = asked.collect();
            let owners = roster.owners(&run, replicas).into_iter();
            let owner = roster.likeliest(owners.filter(|owner| !asked.contains(owner)));
            last = Some((run, owner));
            owner
        };
        let whom: Vec<Option<usize>> = (0..self.blocks.len()).map(whom).collect();
        let is_any = whom.iter().any(Option::is_some);
        is_any.then_some(Round { roster, whom })
    }

    fn run_of(&self, number: usize) -> kvproto::key::RunHash {
        let index = self.blocks[number].index;
        self.chain.place(index, self.namespace.run_blocks()).run
    }

    /// The blocks by whom they go to, in the order of their first blocks; those that go nowhere are left out.
    fn groups(&self, whom: &[Option<usize>]) -> Vec<Group<'a>> {
        let mut groups: Vec<Group<'a>> = Vec::new();
        for (number, member) in whom.iter().enumerate() {
            let Some(member) = *member else {
                continue;
            };
            let at = groups.iter().position(|group| group.member == member);
            let at = at.unwrap_or_else(|| {
                groups.push(Group {
                    member,
                    numbers: Vec::new(),
                    blocks: Vec::new(),
                });
                groups.len() - 1
            });
            groups[at].numbers.push(number);
            groups[at].blocks.push(self.blocks[number].clone());
        }
        groups
    }

    /// Each group to its owner.
    ///
    /// # Errors
    /// The first that speaks against the call.
    async fn offer<'g>(
        &self,
        roster: &Roster,
        groups: &'g [Group<'a>],
        deadline: Deadline,
    ) -> Result<Vec<(&'g Group<'a>, Result<Vec<PutResult>, Error>)>, Error> {
        let calls = groups.iter().map(|group| async move {
            let answer = self.offer_one(roster, group, deadline).await;
            (group, answer)
        });
        let answers = join_all(calls).await;
        for (group, answer) in &answers {
            if let Err(error) = answer {
                tracing::debug!(%error, "an owner does not take its blocks");
                roster.hurt(group.member, error);
            }
        }
        let mut kept = Vec::with_capacity(answers.len());
        for (group, answer) in answers {
            match answer {
                Err(error) if error.is_final() => return Err(error),
                answer => kept.push((group, answer)),
            }
        }
        Ok(kept)
    }

    async fn offer_one(
        &self,
        roster: &Roster,
        group: &Group<'a>,
        deadline: Deadline,
    ) -> Result<Vec<PutResult>, Error> {
        let inner = roster.node(group.member)?;
        let namespace = self.namespace;
        let call = pin!(async {
            open::ensure(inner, namespace, deadline).await?;
            let mut reopening = Reopening::default();
            loop {
                let put = put::put(
                    inner,
                    deadline,
                    namespace,
                    self.chain,
                    &group.blocks,
                    self.options,
                );
                match put.await {
                    Ok(results) => return Ok(results),
                    Err(error) => reopening.after(inner, namespace, error, deadline).await?,
                }
            }
        });
        attended(inner, Method::PUT, call).await
    }
}

fn enter(group: &Group<'_>, answer: Vec<PutResult>, results: &mut [PutResult]) {
    for (number, result) in group.numbers.iter().zip(answer) {
        results[*number] = result;
    }
}

/// Whether somebody else should be offered the block.
fn is_elsewhere(result: &PutResult) -> bool {
    result.outcome == PutOutcome::Rejected
        && matches!(result.reason, Some(Reason::Draining | Reason::Node))
}
