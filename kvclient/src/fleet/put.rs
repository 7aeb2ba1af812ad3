//! Put at every owner of the blocks at once.
//!
//! ```text
//! blocks  b0 b1 b2 b3 b4 ─ owners of their runs ─► m: b0 b1 b4   k: b2 b3 ─► results, in the caller's order
//!                                    rejected by who leaves, or nobody there, and somebody else owns it too: once more
//! ```
//!
//! Units: blocks.
//! Errors: [`Error`] when nobody answers and nobody else is well, or when the call is at fault; an owner that does not
//! answer is a rejection for its blocks, reason [`Reason::Node`].

use std::sync::Arc;

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
        let mut last = None;
        let owner = |number: usize| {
            let run = self.run_of(number);
            let owner = match last {
                Some((of, owner)) if of == run => owner,
                _ => roster.owner(&run),
            };
            last = Some((run, owner));
            Some(owner)
        };
        let groups = self.groups(owner);
        let (mut answered, mut lost, mut failed) = (0, Vec::new(), None);
        for (group, answer) in self.offer(&roster, &groups).await? {
            match answer {
                Ok(answer) => {
                    answered += 1;
                    enter(group, answer, &mut results);
                }
                Err(error) => {
                    lost.push(group.member);
                    failed.get_or_insert(error);
                }
            }
        }
        let newest = self.fleet.roster();
        if let Some(newest) = newest.filter(|_| results.iter().any(is_elsewhere)) {
            let elsewhere = |number: usize| {
                let run = self.run_of(number);
                let asked = newest.number_of(&roster, roster.owner(&run));
                let mut owners = newest.owners(&run, self.namespace.replicas()).into_iter();
                let other = owners.find(|owner| Some(*owner) != asked);
                other.filter(|_| is_elsewhere(&results[number]))
            };
            let groups = self.groups(elsewhere);
            for (group, answer) in self.offer(&newest, &groups).await? {
                if let Ok(answer) = answer {
                    answered += 1;
                    enter(group, answer, &mut results);
                }
            }
        }
        match failed.filter(|_| answered == 0) {
            Some(error) if !roster.is_anybody_well(|member| lost.contains(&member)) => Err(error),
            _ => Ok(results),
        }
    }

    fn run_of(&self, number: usize) -> kvproto::key::RunHash {
        let index = self.blocks[number].index;
        self.chain.place(index, self.namespace.run_blocks()).run
    }

    /// The blocks by whom they go to, in the order of their first blocks; those that go nowhere are left out.
    fn groups(&self, mut whom: impl FnMut(usize) -> Option<usize>) -> Vec<Group<'a>> {
        let mut groups: Vec<Group<'a>> = Vec::new();
        for number in 0..self.blocks.len() {
            let Some(member) = whom(number) else {
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
    ) -> Result<Vec<(&'g Group<'a>, Result<Vec<PutResult>, Error>)>, Error> {
        let calls = groups.iter().map(|group| async move {
            let answer = self.offer_one(roster, group).await;
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

    async fn offer_one(&self, roster: &Roster, group: &Group<'a>) -> Result<Vec<PutResult>, Error> {
        let inner = roster.node(group.member)?;
        let (namespace, deadline) = (self.namespace, self.deadline);
        let call = async {
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
        };
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
