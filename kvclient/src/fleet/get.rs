//! Get at every owner of a chain at once, each block into its own place.
//!
//! ```text
//! blocks        b0  b1  b2  b3  b4  b5
//! owners        m   m   k   k   m   m        m: get b0 b1 b4 b5      k: get b2 b3         at once
//! destinations  d0  d1  d2  d3  d4  d5       what is missed where another view says that somebody else owns it, or owned
//!                                            it when the lease was taken elsewhere, is asked for there, once
//! ```
//!
//! Under a lease each block is asked of the node that leased it, whoever owns it by now. A node that turns out not to
//! answer at all costs its blocks, and not the call's time. Where runs lie with several, the first who are asked have
//! three quarters of the call's time: one that is slow leaves the others time to answer.
//!
//! Units: blocks, bytes.
//! Errors: [`Error`] when nobody answers and nobody else is well, or when the call is at fault; an owner that does not
//! answer is [`GetOutcome::Node`] for its blocks.

use std::sync::Arc;

use futures_util::future::join_all;
use kvproto::{Chain, FieldError, GetOutcome, LeaseId, Part};

use super::{Fleet, Roster, attend::attended, choice::Choice};
use crate::{
    call::{Deadline, Inner},
    error::Error,
    get::{self, Fetched, GetOptions, Got, Wanted, sink::Destination},
    lease::Lease,
    local::{self, Held},
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
        let first = self.first_round(roster);
        let mut verdict = Verdict::default();
        self.land(&first, destinations, &mut got, &mut verdict)
            .await?;
        let outcomes = |at: usize| got[at * parts..][..parts].iter().map(|got| got.outcome);
        let outcome = |at: usize| outcomes(at).find(|outcome| is_missed(*outcome));
        if let Some(second) = self.second_round(&first, outcome) {
            self.land(&second, destinations, &mut got, &mut verdict)
                .await?;
        }
        verdict.error(&first.roster).map_or(Ok(got), Err)
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
        let first = self.first_round(roster);
        let mut verdict = Verdict::default();
        self.take(&first, &mut got, &mut verdict).await?;
        let outcomes = |at: usize| got[at * parts..][..parts].iter().map(|got| got.outcome);
        let outcome = |at: usize| outcomes(at).find(|outcome| is_missed(*outcome));
        if let Some(second) = self.second_round(&first, outcome) {
            self.take(&second, &mut got, &mut verdict).await?;
        }
        verdict.error(&first.roster).map_or(Ok(got), Err)
    }

    /// Where they lie, if one member has them all and is on this host.
    pub(crate) async fn hold(&self, roster: Arc<Roster>) -> Option<Held> {
        let round = self.first_round(roster);
        if round.split.shares.len() > 1 {
            return None;
        }
        let (inner, chain) = self.of_share(&round, 0).ok()?;
        open::ensure(inner, self.namespace, self.deadline)
            .await
            .ok()?;
        local::hold(inner, self.deadline, &self.wanted(&chain, round.leases[0])).await
    }

    fn parts(&self) -> usize {
        self.options.parts.len().max(1)
    }

    /// Each block of whom leased it, or of its owner.
    fn first_round(&self, roster: Arc<Roster>) -> Round {
        let lease = self.options.lease;
        let roster = lease.and_then(Lease::roster).cloned().unwrap_or(roster);
        let holder = lease.and_then(|lease| lease.only_holder(&roster));
        let run_blocks = self.namespace.run_blocks();
        // A lease holds its blocks where it was taken; without one, whoever has less to do is asked.
        let mut choice = Choice::new(&roster, self.namespace.replicas());
        let split = Split::new(self.chain, run_blocks, |run| match lease {
            Some(lease) => {
                let holder = holder.or_else(|| lease.stand_in(run));
                holder.unwrap_or_else(|| roster.owner(run))
            }
            None => choice.reader(run),
        });
        let of_share = |member| {
            let inner = roster.node(member).ok()?;
            lease?.id_at(inner)
        };
        let leases = split
            .shares
            .iter()
            .map(|share| of_share(share.member))
            .collect();
        let has_others = self.namespace.replicas() > 1 || roster.names_seconds();
        let deadline = match has_others {
            false => self.deadline,
            true => {
                let clock = &*self.fleet.recipe.clock;
                Deadline::after(clock, self.deadline.left(clock.now()) * 3 / 4)
            }
        };
        Round {
            roster,
            split,
            leases,
            deadline,
        }
    }

    /// What was missed, of whom owns it by the newest view if that is somebody else, or holds it as well; of whom owned
    /// it before, if a lease of another process's was not known.
    fn second_round(
        &self,
        first: &Round,
        outcome: impl Fn(usize) -> Option<GetOutcome>,
    ) -> Option<Round> {
        let missed = |at: usize| outcome(at).is_some();
        // A call without time would speak against whoever is asked.
        let now = self.fleet.recipe.clock.now();
        if self.deadline.left(now).is_zero() || !(0..self.chain.len()).any(missed) {
            return None;
        }
        let newest = self.fleet.roster()?;
        let asked = first.split.shares_by_position();
        let asked_of = |at: usize| {
            let share = &first.split.shares[asked[at]?];
            newest.number_of(&first.roster, share.member)
        };
        let is_borrowed = self.options.lease.is_some_and(Lease::is_borrowed);
        let is_expired = |at: usize| is_borrowed && outcome(at) == Some(GetOutcome::Expired);
        let run_blocks = self.namespace.run_blocks();
        let whom = |at: usize| {
            let run = self.chain.place(at, run_blocks).run;
            let asked = asked_of(at);
            let mut readers = newest.readers(&run, self.namespace.replicas()).into_iter();
            let other = readers.find(|reader| asked != Some(*reader));
            let before = || newest.owner_before(&run).filter(|_| is_borrowed);
            // Where many read a run, who took the lease may have taken it of whoever had less to do.
            let next = || newest.next(&run, self.namespace.replicas());
            let next = || next().filter(|_| is_expired(at));
            other.or_else(before).or_else(next)
        };
        let wanted = |at: usize| missed(at).then(|| whom(at)).flatten();
        let split = Split::of((0..self.chain.len()).map(wanted));
        if split.shares.is_empty() {
            return None;
        }
        // What its owner knows nothing of may be held there.
        let lease = self.options.lease.map(Lease::id);
        let leases = split.shares.iter().map(|share| {
            let mut blocks = share.ranges.iter().cloned().flatten();
            lease.filter(|_| blocks.all(is_expired))
        });
        let leases = leases.collect();
        Some(Round {
            roster: newest,
            split,
            leases,
            deadline: self.deadline,
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
                let call = async {
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
                };
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
            let call = async {
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
            };
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
