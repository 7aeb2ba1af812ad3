//! Lookup at every owner of a chain at once, and one prefix out of their answers.
//!
//! ```text
//! split ─┬─ owner of runs 0, 3 ── answer: 2 of 2 runs ─┐
//!        ├─ owner of run 1 ────── answer: half of it ──┴─► settled: nobody behind it can lengthen the prefix
//!        └─ owner of run 2 ────── (still out) ──► waited for in the background, its lease given back
//! ```
//!
//! Owners have three quarters of the call's time, so that a call by an outdated view can be made again. From the moment
//! that the owner of the first runs has answered, the others have [`LATE_LEAST`] or [`LATE_TIMES`] times as long as it
//! took, whichever is more: who is later counts as having nothing, and is looked at.
//!
//! Where a namespace has replicas, an owner that has failed, or has said nothing for [`HEDGE_AFTER`], is asked for a second
//! time at those that hold its runs as well; whoever has the whole share first is taken.
//!
//! One lease id goes to all of them, made from the caller and the idempotency key, so that asking again names the same
//! lease everywhere. A node where somebody has that id chooses another, which the [`Lease`] keeps beside it.
//!
//! Units: blocks, durations.
//! Errors: [`Error`] when nobody answers and nobody else is well; who does not answer while others do has nothing.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{
    StreamExt,
    future::{BoxFuture, join_all},
    stream::FuturesUnordered,
};
use kvproto::{
    BootId, Chain, LeaseId, OwnerId, Part, TierKind,
    convert::{answer, chain_to_wire, parts_to_wire},
    key::RunHash,
    v1,
};

use super::{Fleet, Roster};
use crate::{
    call::{Deadline, Inner},
    client::Lookup,
    error::{Error, ErrorKind},
    lease::{Holder, Lease},
    local,
    namespace::NamespaceHandle,
    open::{self, Reopening},
    route::{Assembly, Split},
    wire::{self, Method},
};

/// Shortest time that later owners have once the owner of the first runs has answered: more than a node takes to fetch
/// what is on its way to it.
const LATE_LEAST: Duration = Duration::from_millis(250);

/// And as multiple of what that owner took.
const LATE_TIMES: u32 = 8;

/// When those are asked that hold an owner's runs as well.
const HEDGE_AFTER: Duration = Duration::from_millis(30);

/// What is asked, of whomever.
#[derive(Clone)]
pub(crate) struct Question {
    pub(crate) namespace: NamespaceHandle,
    pub(crate) parts: Vec<Part>,
    pub(crate) probe: bool,
    pub(crate) ttl_ms: u32,
    pub(crate) idempotency: Option<[u8; 16]>,
}

/// What one node says.
pub(crate) struct Answered {
    pub(crate) found: answer::Lookup,
    pub(crate) boot: BootId,
}

/// Asks one node.
pub(crate) async fn ask(
    inner: &Inner,
    question: &Question,
    chain: &Chain,
    lease_id: u64,
    deadline: Deadline,
) -> Result<Answered, Error> {
    let mut reopening = Reopening::default();
    let answer: v1::LookupResponse = loop {
        let answer = local::unary(inner, deadline, |context| v1::LookupRequest {
            context: Some(context),
            namespace_id: Bytes::copy_from_slice(&question.namespace.id().0),
            chain: Some(chain_to_wire(chain)),
            parts: parts_to_wire(&question.parts),
            probe: question.probe,
            lease_ttl_ms: question.ttl_ms,
            idempotency_key: question
                .idempotency
                .map_or_else(Bytes::new, |key| Bytes::copy_from_slice(&key)),
            lease_id,
        });
        match answer.await {
            Ok(answer) => break answer,
            Err(error) => {
                let namespace = &question.namespace;
                reopening.after(inner, namespace, error, deadline).await?;
            }
        }
    };
    let boot = inner.heard(answer.context.as_ref());
    let found = answer::Lookup::from_wire(&answer, chain.len())
        .map_err(|problem| wire::answer(Method::LOOKUP, problem))?;
    Ok(Answered { found, boot })
}

/// Asks all owners; once more where another view has come with the answers and moves what was missed.
pub(crate) async fn everywhere(
    fleet: &Fleet,
    roster: Arc<Roster>,
    question: Question,
    chain: &Chain,
    deadline: Deadline,
    budget: Duration,
) -> Result<Lookup, Error> {
    let first = attempt(&roster, &question, chain, deadline, budget).await;
    let gap = first
        .as_ref()
        .map_or(0, |found| found.present_blocks as usize);
    if gap == chain.len() || first.as_ref().is_err_and(is_final) {
        return first;
    }
    let Some(newest) = fleet.roster().filter(|newest| !newest.agrees(&roster)) else {
        return first;
    };
    let run = chain.place(gap, question.namespace.run_blocks()).run;
    if newest.number_of(&roster, roster.owner(&run)) == Some(newest.owner(&run)) {
        return first;
    }
    tracing::debug!(gap, "the view was out of date; asking the owners of now");
    let again = attempt(&newest, &question.again(), chain, deadline, budget).await;
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
) -> Result<Lookup, Error> {
    let recipe = &roster.recipe;
    let clock = &*recipe.clock;
    let run_blocks = question.namespace.run_blocks();
    let split = Split::new(chain, run_blocks, |run| roster.owner(run));
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

/// What is there of one owner's share.
struct OfShare {
    present: usize,
    leased: usize,
    tiers: Vec<(u32, TierKind)>,
    holders: Vec<(Holder, answer::Lease)>,
    boot: BootId,
    /// Runs that another than their owner answered for.
    stand_ins: Vec<(RunHash, usize)>,
}

impl OfShare {
    fn nothing() -> Self {
        Self {
            present: 0,
            leased: 0,
            tiers: Vec::new(),
            holders: Vec::new(),
            boot: BootId(0),
            stand_ins: Vec::new(),
        }
    }

    fn of_one(inner: &Arc<Inner>, answer: Answered) -> Self {
        let Answered { found, boot } = answer;
        let holder = |lease: answer::Lease| {
            let holder = Holder {
                inner: inner.clone(),
                id: lease.id,
                boot,
            };
            (holder, lease)
        };
        Self {
            present: found.present_blocks as usize,
            leased: found.lease.map_or(0, |lease| lease.blocks as usize),
            tiers: found.tiers,
            holders: found.lease.map(holder).into_iter().collect(),
            boot,
            stand_ins: Vec::new(),
        }
    }

    fn let_go(self) {
        for (holder, _) in self.holders {
            holder.inner.let_go(holder.id);
        }
    }
}

/// One owner's share of a lookup.
#[derive(Clone)]
struct Asking {
    roster: Arc<Roster>,
    question: Arc<Question>,
    member: usize,
    chain: Chain,
    lease_id: u64,
    deadline: Deadline,
}

impl Asking {
    async fn run(self) -> Result<OfShare, Error> {
        let replicas = self.question.namespace.replicas();
        if replicas < 2 {
            return self.of_owner().await;
        }
        let recipe = self.roster.recipe.clone();
        let mut owner = Box::pin(self.clone().of_owner());
        let early = tokio::select! {
            biased;
            answer = &mut owner => Some(answer),
            () = recipe.clock.sleep(HEDGE_AFTER) => None,
        };
        let mut others = Box::pin(self.clone().of_others(replicas));
        match early {
            Some(Err(error)) if !is_final(&error) => others.await.ok_or(error),
            Some(answer) => answer,
            None => {
                tokio::select! {
                    biased;
                    answer = &mut owner => {
                        match answer {
                            Ok(answer) => {
                                recipe.runtime.spawn(async move {
                                    if let Some(late) = others.await {
                                        late.let_go();
                                    }
                                });
                                Ok(answer)
                            }
                            Err(error) if is_final(&error) => Err(error),
                            Err(error) => others.await.ok_or(error),
                        }
                    }
                    answer = &mut others => match answer {
                        Some(answer) if answer.present == self.chain.len() => {
                            recipe.runtime.spawn(async move {
                                if let Ok(late) = owner.await {
                                    late.let_go();
                                }
                            });
                            Ok(answer)
                        }
                        // The owner may have more.
                        part => match owner.await {
                            Ok(answer) => {
                                part.into_iter().for_each(OfShare::let_go);
                                Ok(answer)
                            }
                            Err(error) => part.ok_or(error),
                        },
                    },
                }
            }
        }
    }

    async fn of_owner(self) -> Result<OfShare, Error> {
        let inner = self.roster.node(self.member)?;
        open::ensure(inner, &self.question.namespace, self.deadline).await?;
        let asked = ask(
            inner,
            &self.question,
            &self.chain,
            self.lease_id,
            self.deadline,
        );
        Ok(OfShare::of_one(inner, asked.await?))
    }

    /// The same of those that hold the owner's runs as well. `None`: nobody does, or nobody answers.
    async fn of_others(self, replicas: usize) -> Option<OfShare> {
        let run_blocks = self.question.namespace.run_blocks();
        let other = |run: &RunHash| {
            let mut owners = self.roster.owners(run, replicas).into_iter();
            owners.find(|owner| *owner != self.member)
        };
        // Up to the first run that nobody else holds.
        let mut runs = self.chain.runs(run_blocks);
        let end = runs.find(|(run, _)| other(run).is_none());
        let end = end.map_or(self.chain.len(), |(_, range)| range.start);
        if end == 0 {
            return None;
        }
        let held = self.chain.slice(0..end, run_blocks);
        let split = Split::new(&held, run_blocks, |run| other(run).unwrap_or(self.member));
        let calls = split.shares.iter().map(|share| {
            let asking = Self {
                member: share.member,
                chain: share.chain(&held, run_blocks),
                ..self.clone()
            };
            asking.of_owner()
        });
        let (mut present, mut leased) = (Assembly::new(&split), Assembly::new(&split));
        let mut whole = OfShare::nothing();
        let mut tiers = vec![Vec::new(); split.shares.len()];
        let mut answers = 0;
        for (number, answer) in join_all(calls).await.into_iter().enumerate() {
            let Ok(answer) = answer else {
                present.lost(number);
                leased.lost(number);
                continue;
            };
            answers += 1;
            present.answered(number, answer.present);
            leased.answered(number, answer.leased);
            tiers[number] = answer.tiers;
            whole.holders.extend(answer.holders);
            whole.boot = answer.boot;
        }
        whole.present = present.prefix();
        whole.leased = leased.prefix();
        whole.tiers = present.stretches(whole.present, &tiers);
        whole.stand_ins = held
            .runs(run_blocks)
            .filter_map(|(run, _)| Some((run, other(&run)?)))
            .collect();
        (answers > 0).then_some(whole)
    }
}

/// Whether the call itself is at fault, or the cluster: nobody else's answer helps.
fn is_final(error: &Error) -> bool {
    match error {
        Error::NamespaceChanged { .. } => true,
        error => !matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Refresh),
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
        if is_final(&error) {
            self.refused.get_or_insert(error);
        } else {
            tracing::debug!(%error, "an owner does not answer; the prefix ends before its runs");
            self.roster.recipe.views.hurt(&error);
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

impl Question {
    /// The same, under another key: the owners' first answers are not to be repeated.
    fn again(&self) -> Self {
        let other = |mut key: [u8; 16]| {
            key.iter_mut().for_each(|byte| *byte = !*byte);
            key
        };
        Self {
            idempotency: self.idempotency.map(other),
            ..self.clone()
        }
    }

    /// The id that all owners are asked to give the lease: the same for one caller and key. 0 without a lease.
    fn lease_id(&self, owner: &OwnerId) -> u64 {
        let Some(key) = self.idempotency else {
            return 0;
        };
        let words = owner
            .0
            .as_chunks::<8>()
            .0
            .iter()
            .chain(key.as_chunks::<8>().0);
        let id = words.fold(0_u64, |id, word| {
            // SplitMix64's finish: every bit of every word reaches every bit of the id.
            let mut z = (id ^ u64::from_le_bytes(*word)).wrapping_add(0x9e37_79b9_7f4a_7c15);
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        });
        id.max(1)
    }
}

impl Lookup {
    /// What it is good for: blocks that a get may rely on, or for a probe those that are there.
    fn worth(&self) -> (u32, u32) {
        (self.leased_blocks(), self.present_blocks)
    }
}
