//! Get at every owner of a chain at once, each block into its own place.
//!
//! ```text
//! blocks        b0  b1  b2  b3  b4  b5
//! owners        m   m   k   k   m   m        m: get b0 b1 b4 b5      k: get b2 b3         at once
//! destinations  d0  d1  d2  d3  d4  d5       what is missed where another view says that somebody else owns it, or owned
//!                                            it when the lease was taken elsewhere, is asked for there, once
//! ```
//!
//! Under a lease each block is asked of the node that leased it, whoever owns it by now, unless that one is known to be
//! silent and others have the block too. A node that turns out not to answer at all costs its blocks, and not the call's
//! time. Where runs lie with several, those who are asked have three quarters of the time that is left: one that is slow
//! leaves the others time to answer; and blocks of one that does not answer are asked of the next, until nobody is left.
//!
//! Units: blocks, bytes.
//! Errors: [`Error`] when nobody answers and nobody else is well, or when the call is at fault; an owner that does not
//! answer is [`GetOutcome::Node`] for its blocks.

use std::{collections::BTreeSet, pin::pin, sync::Arc};

use futures_util::future::join_all;
use kvproto::{Chain, FieldError, GetOutcome, LeaseId, Part, key::RunHash};

use super::{Fleet, Roster, attend::attended, choice::Choice};
use crate::{
    call::{Deadline, Inner},
    error::Error,
    get::{self, Fetched, GetOptions, Got, Wanted, sink::Destination},
    lease::Lease,
    local::{self, Held, Here},
    namespace::NamespaceHandle,
    open::{self, Reopening},
    route::Split,
    wire::Method,
};

/// A destination of the caller's, lent to the call of its owner.
struct Lent<'a, T>(&'a mut T);

impl<T: Destination> Destination for Lent<'_, T> {
    fn piece(&mut self, i: usize) -> Option<&mut [u8]> {
        self.0.piece(i)
    }

    fn room_bytes(&self) -> usize {
        self.0.room_bytes()
    }
}

/// A get in a cluster.
pub(crate) struct Getting<'a> {
    pub(crate) fleet: &'a Fleet,
    pub(crate) namespace: &'a NamespaceHandle,
    pub(crate) chain: &'a Chain,
    pub(crate) options: GetOptions<'a>,
    pub(crate) deadline: Deadline,
}

/// Whom a round asks for what.
struct Round {
    roster: Arc<Roster>,
    split: Split,
    /// Under which lease, by its id there, of each share.
    leases: Vec<Option<LeaseId>>,
    /// Runs asked of who has them for a while, and is no owner of theirs.
    guests: BTreeSet<RunHash>,
    deadline: Deadline,
}

/// What became of the shares of a round.
#[derive(Default)]
struct Verdict {
    answered: usize,
    failed: Option<Error>,
    lost: Vec<usize>,
}

impl Verdict {
    /// What to tell the caller when nothing came of a get.
    fn error(self, roster: &Roster) -> Option<Error> {
        let lost = self.lost;
        self.failed.filter(|_| {
            self.answered == 0 && !roster.is_anybody_well(|member| lost.contains(&member))
        })
    }
}

impl Getting<'_> {
    /// Into the caller's memory.
    pub(crate) async fn fill<T: Destination>(
        &self,
        roster: Arc<Roster>,
        destinations: &mut [T],
    ) -> Result<Vec<Got>, Error> {
        let parts = self.parts();
        let count = self.chain.len() * parts;
        if destinations.len() != count {
            let given = destinations.len();
            let problem = format!("{given} given for {count} blocks; give one each");
            return Err(FieldError::new("buffers", problem).into());
        }
        let mut got = vec![Got::not(GetOutcome::Node); count];
        let mut next = Some(self.first_round(roster));
        let (mut rounds, mut verdict) = (Vec::new(), Verdict::default());
        while let Some(round) = next {
            self.land(&round, destinations, &mut got, &mut verdict)
                .await?;
            rounds.push(round);
            let outcomes = |at: usize| got[at * parts..][..parts].iter().map(|got| got.outcome);
            let outcome = |at: usize| outcomes(at).find(|outcome| is_missed(*outcome));
            next = self.next_round(&rounds, outcome);
        }
        verdict.error(&rounds[0].roster).map_or(Ok(got), Err)
    }

    /// As bytes.
    pub(crate) async fn fetch(&self, roster: Arc<Roster>) -> Result<Vec<Fetched>, Error> {
        let parts = self.parts();
        let nothing = Fetched {
            outcome: GetOutcome::Node,
            tier: None,
            bytes: None,
        };
        let mut got = vec![nothing; self.chain.len() * parts];
        let mut next = Some(self.first_round(roster));
        let (mut rounds, mut verdict) = (Vec::new(), Verdict::default());
        while let Some(round) = next {
            self.take(&round, &mut got, &mut verdict).await?;
            rounds.push(round);
            let outcomes = |at: usize| got[at * parts..][..parts].iter().map(|got| got.outcome);
            let outcome = |at: usize| outcomes(at).find(|outcome| is_missed(*outcome));
            next = self.next_round(&rounds, outcome);
        }
        verdict.error(&rounds[0].roster).map_or(Ok(got), Err)
    }

    /// Where they lie at members on this host. `None`: at none of them.
    pub(crate) async fn hold(&self, roster: Arc<Roster>) -> Option<Held> {
        let parts = self.parts();
        let mut round = self.first_round(roster);
        if self.options.lease.is_none() {
            // Whoever is on this host comes before whoever has less to do.
            let (roster, replicas) = (&round.roster, self.namespace.replicas());
            let now = self.fleet.recipe.clock.now();
            let is_here = |member: &usize| {
                let inner = roster.in_use(*member);
                inner.is_some_and(|inner| inner.local.is_near(now))
            };
            let whom = |run: &RunHash| {
                let mut readers = roster.readers(run, replicas).into_iter();
                readers.find(is_here).unwrap_or_else(|| roster.owner(run))
            };
            round.split = Split::new(self.chain, self.namespace.run_blocks(), whom);
            round.leases = vec![None; round.split.shares.len()];
        }
        let calls = (0..round.split.shares.len()).map(|number| {
            let round = &round;
            async move {
                let (inner, chain) = self.of_share(round, number).ok()?;
                let call = pin!(async {
                    open::ensure(inner, self.namespace, round.deadline).await?;
                    let wanted = self.wanted(&chain, round.leases[number]);
                    Ok(local::hold(inner, round.deadline, &wanted).await)
                });
                let here = attended(inner, Method::GET, call).await;
                here.ok().flatten()
            }
        });
        let nodes: Vec<Option<Here>> = join_all(calls).await;
        if nodes.iter().all(Option::is_none) {
            return None;
        }
        let mut held = Held::nothing(self.chain.len() * parts);
        for (share, here) in round.split.shares.iter().zip(nodes) {
            let blocks = share.ranges.iter().cloned().flatten();
            let numbers = blocks.flat_map(|at| at * parts..(at + 1) * parts);
            let Some(here) = here else {
                continue;
            };
            // Who is asked because it is near, and neither owns a run nor leased it, does not say that nobody has it.
            let (roster, newest) = (&round.roster, self.fleet.roster());
            let is_its = |run: &RunHash| match self.options.lease {
                Some(lease) if lease.is_borrowed() => false,
                Some(lease) => holder(lease, roster, run) == share.member,
                None => roster.owner(run) == share.member,
            };
            let run = |number: usize| {
                let run_blocks = self.namespace.run_blocks();
                self.chain.place(number / parts, run_blocks).run
            };
            let knows = |number: usize| is_its(&run(number));
            for lacking in held.add(here, numbers, knows) {
                if let Some(newest) = &newest {
                    newest.shun(&run(lacking));
                }
            }
        }
        Some(held)
    }

    fn parts(&self) -> usize {
        self.options.parts.len().max(1)
    }

    /// Each block of whom leased it, or of its owner.
    fn first_round(&self, roster: Arc<Roster>) -> Round {
        let lease = self.options.lease;
        let roster = lease.and_then(Lease::roster).cloned().unwrap_or(roster);
        let (run_blocks, replicas) = (self.namespace.run_blocks(), self.namespace.replicas());
        let choice = Choice::new(&roster, replicas);
        let (split, guests) = match lease {
            // A lease holds its blocks where it was taken; without one, whoever has less to do is asked.
            Some(lease) => {
                let whom = |run: &RunHash| {
                    let holder = holder(lease, &roster, run);
                    let readers = || roster.readers(run, replicas).into_iter();
                    match roster.is_silent(holder) {
                        true => roster.likeliest(std::iter::once(holder).chain(readers())),
                        false => Some(holder),
                    }
                    .unwrap_or(holder)
                };
                (Split::new(self.chain, run_blocks, whom), BTreeSet::new())
            }
            None => {
                let chosen = choice.split(self.chain, run_blocks);
                (chosen.split, chosen.guests)
            }
        };
        let of_share = |member| {
            let inner = roster.node(member).ok()?;
            lease?.id_at(inner)
        };
        let leases = split
            .shares
            .iter()
            .map(|share| of_share(share.member))
            .collect();
        Round {
            deadline: self
                .fleet
                .part(self.deadline, replicas > 1 || roster.names_seconds()),
            roster,
            split,
            leases,
            guests,
        }
    }

    /// What was missed, of whom owns it by the newest view if that is somebody else, or holds it as well; of whom owned
    /// it before, if a lease of another process's was not known. After that only blocks of nodes that do not answer: who
    /// misses a block has asked the other owners itself.
    fn next_round(
        &self,
        rounds: &[Round],
        outcome: impl Fn(usize) -> Option<GetOutcome>,
    ) -> Option<Round> {
        let is_second = rounds.len() == 1;
        let missed = |at: usize| match outcome(at) {
            Some(outcome) => is_second || outcome == GetOutcome::Node,
            None => false,
        };
        // A call without time would speak against whoever is asked.
        let now = self.fleet.recipe.clock.now();
        if self.deadline.left(now).is_zero() || !(0..self.chain.len()).any(missed) {
            return None;
        }
        let newest = self.fleet.roster()?;
        let (run_blocks, replicas) = (self.namespace.run_blocks(), self.namespace.replicas());
        let run = |at: usize| self.chain.place(at, run_blocks).run;
        let by_position = rounds.iter().map(|round| round.split.shares_by_position());
        let by_position: Vec<_> = by_position.collect();
        let newest = &newest;
        let asked_of = |at: usize| {
            let pairs = rounds.iter().zip(&by_position);
            let asked = pairs.filter_map(|(round, by_position)| {
                let share = &round.split.shares[by_position[at]?];
                newest.number_of(&round.roster, share.member)
            });
            asked.collect::<Vec<usize>>()
        };
        let last = rounds.last()?;
        for at in (0..self.chain.len()).filter(|at| missed(*at)) {
            // Its owner is asked until that one says anew who else has it.
            if last.guests.contains(&run(at)) {
                newest.shun(&run(at));
            }
        }
        let lease = self.options.lease;
        let is_borrowed = lease.is_some_and(Lease::is_borrowed);
        let is_expired = |at: usize| is_borrowed && outcome(at) == Some(GetOutcome::Expired);
        let whom = |at: usize| {
            let (run, asked) = (run(at), asked_of(at));
            let readers = newest.readers(&run, replicas).into_iter();
            let other = newest.likeliest(readers.filter(|reader| !asked.contains(reader)));
            let before = || {
                newest
                    .owner_before(&run)
                    .filter(|_| is_borrowed && is_second)
            };
            // Where many read a run, who took the lease may have taken it of whoever had less to do.
            let next = || newest.next(&run, replicas);
            let next = || next().filter(|_| is_expired(at) && is_second);
            // Passed over because it was silent, and nobody else has it.
            let holder = || {
                let held = lease.filter(|_| !is_borrowed)?;
                let holder =
                    newest.number_of(&rounds[0].roster, holder(held, &rounds[0].roster, &run))?;
                (!asked.contains(&holder)).then_some(holder)
            };
            other.or_else(before).or_else(next).or_else(holder)
        };
        let wanted = |at: usize| missed(at).then(|| whom(at)).flatten();
        let split = Split::of((0..self.chain.len()).map(wanted));
        if split.shares.is_empty() {
            return None;
        }
        let leases = split.shares.iter().map(|share| {
            let lease = lease?;
            let mut blocks = share.ranges.iter().cloned().flatten();
            if is_borrowed {
                // What its owner knows nothing of may be held there.
                return blocks.all(is_expired).then(|| lease.id());
            }
            let first = &rounds[0].roster;
            let is_its =
                |at| newest.number_of(first, holder(lease, first, &run(at))) == Some(share.member);
            let is_held = blocks.all(is_its);
            newest
                .node(share.member)
                .ok()
                .filter(|_| is_held)
                .and_then(|inner| lease.id_at(inner))
        });
        let leases = leases.collect();
        Some(Round {
            deadline: self.fleet.part(self.deadline, replicas > rounds.len() + 1),
            split,
            leases,
            guests: BTreeSet::new(),
            roster: newest.clone(),
        })
    }

    /// One round into the caller's memory.
    async fn land<T: Destination>(
        &self,
        round: &Round,
        destinations: &mut [T],
        got: &mut [Got],
        verdict: &mut Verdict,
    ) -> Result<(), Error> {
        let parts = self.parts();
        let shares = round.split.shares_by_position();
        unsay(&shares, parts, got);
        let mut lent: Vec<Vec<Lent<'_, T>>> = round.split.shares.iter().map(|_| vec![]).collect();
        for (block, share) in destinations.chunks_mut(parts).zip(&shares) {
            if let Some(share) = share {
                lent[*share].extend(block.iter_mut().map(Lent));
            }
        }
        let calls = lent
            .into_iter()
            .enumerate()
            .map(|(number, mut lent)| async move {
                let (inner, chain) = self.of_share(round, number)?;
                let wanted = self.wanted(&chain, round.leases[number]);
                let deadline = round.deadline;
                let call = pin!(async {
                    open::ensure(inner, self.namespace, deadline).await?;
                    let mut reopening = Reopening::default();
                    loop {
                        match get::into_destinations(inner, deadline, &wanted, &mut lent).await {
                            Ok(got) => return Ok(got),
                            Err(error) => {
                                let again = reopening.after(inner, self.namespace, error, deadline);
                                again.await?;
                            }
                        }
                    }
                });
                attended(inner, Method::GET, call).await
            });
        let answers = join_all(calls).await;
        enter(round, parts, answers, got, verdict)
    }

    /// One round into memory of its own.
    async fn take(
        &self,
        round: &Round,
        got: &mut [Fetched],
        verdict: &mut Verdict,
    ) -> Result<(), Error> {
        let calls = (0..round.split.shares.len()).map(|number| async move {
            let (inner, chain) = self.of_share(round, number)?;
            let wanted = self.wanted(&chain, round.leases[number]);
            let deadline = round.deadline;
            let call = pin!(async {
                open::ensure(inner, self.namespace, deadline).await?;
                let mut reopening = Reopening::default();
                loop {
                    match get::fetch(inner, deadline, &wanted).await {
                        Ok(got) => return Ok(got),
                        Err(error) => {
                            let again = reopening.after(inner, self.namespace, error, deadline);
                            again.await?;
                        }
                    }
                }
            });
            attended(inner, Method::GET, call).await
        });
        let answers = join_all(calls).await;
        enter(round, self.parts(), answers, got, verdict)
    }

    fn of_share<'r>(
        &self,
        round: &'r Round,
        number: usize,
    ) -> Result<(&'r Arc<Inner>, Chain), Error> {
        let share = &round.split.shares[number];
        let inner = round.roster.node(share.member)?;
        Ok((inner, share.chain(self.chain, self.namespace.run_blocks())))
    }

    fn wanted<'c>(&'c self, chain: &'c Chain, lease: Option<LeaseId>) -> Wanted<'c> {
        let parts: &[Part] = self.options.parts;
        Wanted {
            namespace: self.namespace,
            chain,
            parts,
            lease,
        }
    }
}

/// Where a lease holds a run, by the view that it was taken by.
fn holder(lease: &Lease, roster: &Roster, run: &RunHash) -> usize {
    let alone = lease.only_holder(roster);
    let holder = alone.or_else(|| lease.stand_in(run));
    holder.unwrap_or_else(|| roster.owner(run))
}

/// Of a block that is asked for again because a part of it was missed, all parts are: what lay in their places does not
/// count any more, whatever becomes of the call.
fn unsay(shares: &[Option<usize>], parts: usize, got: &mut [Got]) {
    for (block, share) in got.chunks_mut(parts).zip(shares) {
        let hits = block.iter_mut().filter(|got| got.is_hit());
        if share.is_some() {
            hits.for_each(|got| *got = Got::not(GetOutcome::Node));
        }
    }
}

/// Whether somebody else may have it.
fn is_missed(outcome: GetOutcome) -> bool {
    matches!(
        outcome,
        GetOutcome::Miss | GetOutcome::Expired | GetOutcome::Node
    )
}

/// Puts each owner's answers where they belong.
fn enter<T>(
    round: &Round,
    parts: usize,
    answers: Vec<Result<Vec<T>, Error>>,
    got: &mut [T],
    verdict: &mut Verdict,
) -> Result<(), Error> {
    for (share, answer) in round.split.shares.iter().zip(answers) {
        match answer {
            Ok(answer) => {
                verdict.answered += 1;
                let mut answer = answer.into_iter();
                for at in share.ranges.iter().cloned().flatten() {
                    for (got, answer) in got[at * parts..][..parts].iter_mut().zip(&mut answer) {
                        *got = answer;
                    }
                }
            }
            Err(error) if error.is_final() => return Err(error),
            Err(error) => {
                tracing::debug!(%error, "an owner does not answer; its blocks are not had");
                round.roster.hurt(share.member, &error);
                verdict.lost.push(share.member);
                verdict.failed.get_or_insert(error);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_again_is_not_had_until_it_has_come_again() {
        let hit = Got {
            outcome: GetOutcome::Hit,
            tier: None,
            length_bytes: 7,
        };
        let miss = Got::not(GetOutcome::Miss);
        // Two parts a block: the second block misses one, and is asked for again with both.
        let mut got = [hit, hit, hit, miss, miss, hit];
        unsay(&[None, Some(0), Some(1)], 2, &mut got);
        let hits = got.iter().map(Got::is_hit);
        assert!(hits.eq([true, true, false, false, false, false]));
        assert_eq!(got[3], miss, "what was missed is told as it was");
    }
}
