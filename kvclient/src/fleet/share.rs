//! One owner's share of a lookup: asked of it, and of those that hold its runs as well where it is silent.
//!
//! ```text
//! owner ──────── answer ───────────────► OfShare        one copy of each run: nobody else is asked
//!   └─ failed, or HEDGE_AFTER has passed ─► those that hold its runs as well ─► whoever has all of it first
//!                                             └─ failed, or as long again ─► the next of them, until nobody is left
//! ```
//!
//! Of those that hold a run as well, who is known to be silent is asked last.
//!
//! Units: blocks, durations.
//! Errors: the owner's, when nobody else has anything.

use std::{pin::pin, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{FutureExt, future::BoxFuture, future::join_all};
use kvproto::{
    BootId, Chain, OwnerId, Part, TierKind,
    convert::{answer, chain_to_wire, parts_to_wire},
    key::RunHash,
    v1,
};

use super::{Roster, attend::attended};
use crate::{
    call::{Deadline, Inner},
    error::Error,
    lease::Holder,
    local,
    namespace::NamespaceHandle,
    open::{self, Reopening},
    route::{Assembly, Split},
    wire::{self, Method},
};

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
    let mut found = answer::Lookup::from_wire(&answer, chain.len())
        .map_err(|problem| wire::answer(Method::LOOKUP, problem))?;
    let seconds = std::mem::take(&mut found.seconds);
    inner.views.heard_of(seconds, inner.clock.now());
    Ok(Answered { found, boot })
}

/// What is there of one owner's share.
pub(super) struct OfShare {
    pub(super) present: usize,
    pub(super) leased: usize,
    pub(super) tiers: Vec<(u32, TierKind)>,
    pub(super) holders: Vec<(Holder, answer::Lease)>,
    pub(super) boot: BootId,
    /// Runs that another than their owner answered for.
    pub(super) stand_ins: Vec<(RunHash, usize)>,
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

    pub(super) fn let_go(self) {
        for (holder, _) in self.holders {
            holder.inner.let_go(holder.id);
        }
    }
}

/// One owner's share of a lookup.
#[derive(Clone)]
pub(super) struct Asking {
    pub(super) roster: Arc<Roster>,
    pub(super) question: Arc<Question>,
    pub(super) member: usize,
    pub(super) chain: Chain,
    pub(super) lease_id: u64,
    pub(super) deadline: Deadline,
    /// The member may have been chosen before the first owner of some of the runs.
    pub(super) strays: bool,
    /// Somebody else may have some of the runs.
    pub(super) has_others: bool,
    /// Members that were asked for these runs before this one.
    pub(super) tried: Vec<usize>,
}

impl Asking {
    pub(super) async fn run(self) -> Result<OfShare, Error> {
        if !self.has_others {
            return self.of_owner().await;
        }
        let recipe = self.roster.recipe.clone();
        let mut owner = Box::pin(self.clone().of_owner());
        let early = tokio::select! {
            biased;
            answer = &mut owner => Some(answer),
            () = recipe.clock.sleep(HEDGE_AFTER) => None,
        };
        let mut others = self.clone().of_others();
        match early {
            Some(Err(error)) if !error.is_final() => others.await.ok_or(error),
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
                            Err(error) if error.is_final() => Err(error),
                            Err(error) => others.await.ok_or(error),
                        }
                    }
                    answer = &mut others => match answer {
                        Some(answer) if answer.present == self.chain.len() => {
                            self.overtaken(true);
                            recipe.runtime.spawn(async move {
                                if let Ok(late) = owner.await {
                                    self.overtaken(false);
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

    /// Others were quicker with the same answer: they are asked first until the member's comes too, or does not.
    fn overtaken(&self, is_late: bool) {
        if let Some(inner) = self.roster.in_use(self.member) {
            match is_late {
                true => inner.pool.breaker.late(),
                false => inner.pool.breaker.alive(),
            }
        }
    }

    async fn of_owner(self) -> Result<OfShare, Error> {
        let inner = self.roster.node(self.member)?;
        let call = pin!(async {
            open::ensure(inner, &self.question.namespace, self.deadline).await?;
            let asked = ask(
                inner,
                &self.question,
                &self.chain,
                self.lease_id,
                self.deadline,
            );
            asked.await
        });
        let found = attended(inner, Method::LOOKUP, call).await;
        let found = found.inspect_err(|error| self.roster.hurt(self.member, error))?;
        let mut found = OfShare::of_one(inner, found);
        if self.strays {
            found.stand_ins = self.strayed().collect();
        }
        Ok(found)
    }

    /// The runs that somebody else is the first owner of.
    fn strayed(&self) -> impl Iterator<Item = (RunHash, usize)> {
        let runs = self.chain.runs(self.question.namespace.run_blocks());
        let strays = runs.filter(|(run, _)| self.roster.owner(run) != self.member);
        strays.map(|(run, _)| (run, self.member))
    }

    /// The same of those that hold the member's runs as well. `None`: nobody does, or nobody answers. Boxed, as each of
    /// them is asked as this one was.
    fn of_others(self) -> BoxFuture<'static, Option<OfShare>> {
        self.ask_others().boxed()
    }

    async fn ask_others(mut self) -> Option<OfShare> {
        let run_blocks = self.question.namespace.run_blocks();
        let replicas = self.question.namespace.replicas();
        self.tried.push(self.member);
        let other = |run: &RunHash| {
            let readers = self.roster.readers(run, replicas).into_iter();
            let left = readers.filter(|reader| !self.tried.contains(reader));
            self.roster.likeliest(left)
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
                strays: true,
                ..self.clone()
            };
            asking.run()
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
            whole.stand_ins.extend(answer.stand_ins);
            whole.boot = answer.boot;
        }
        whole.present = present.prefix();
        whole.leased = leased.prefix();
        whole.tiers = present.stretches(whole.present, &tiers);
        (answers > 0).then_some(whole)
    }
}

impl Question {
    /// The same, under another key: the owners' first answers are not to be repeated.
    pub(super) fn again(&self) -> Self {
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
    pub(super) fn lease_id(&self, owner: &OwnerId) -> u64 {
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
