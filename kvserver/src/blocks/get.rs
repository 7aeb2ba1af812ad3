//! Get: blocks in the order asked for, each asked of the engine when its turn comes.
//!
//! ```text
//! asked   b0    b1    b2    b3    b4 …
//! window  RAM                               in RAM: handed out at once, nothing is looked at ahead
//!               NVMe  NVMe  RAM             first one below RAM: the next few are asked for ahead,
//!               └─────┴── read together     so that the disk works at depth
//! ```
//!
//! Shape: block `i` of the chain, part `p` is number `i * parts + p`. A block is held only from its turn
//! until it is handed out, or while it waits behind a read.
//! A block that is missing here and may still lie with another node ([`GetPlan::asks_peers`]) is waited for; the rest of
//! its run comes with it.
//! Errors: what is not here is an outcome. Under a lease nothing is answered `overloaded`: a promotion that
//! found no slot is tried again as a leased one, which cannot be refused.

use std::{
    collections::VecDeque,
    future::poll_fn,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{FutureExt, future::BoxFuture};
use kvproto::{
    BlockKey, Chain, FieldError, GetOutcome, LeaseId, NamespaceId, Part, Reason, TierKind,
    convert::answer::Second,
};

use super::{
    Blocks, BlocksError,
    motion::Brought,
    mover::{Reading, Urgency},
};
use crate::{
    clock::Tick,
    engine::{Below, Cover, Owner, Whereabouts},
    telemetry::metrics::GetTally,
    tier::BlockRef,
};

/// Blocks that may be under way from below RAM for one get.
const READ_AHEAD_BLOCKS: usize = 16;

/// Bytes of them. With 1 MiB blocks this is the depth at which a disk gives its full rate.
const READ_AHEAD_BYTES: u64 = 16 << 20;

/// What is left of a get's time when it stops waiting for other nodes, so that its answer is still in time.
const LEAST_MARGIN: Duration = Duration::from_millis(5);
const MOST_MARGIN: Duration = Duration::from_millis(100);

/// What became of one block.
#[derive(Debug)]
pub enum Found {
    /// Here it is.
    Hit {
        /// Its bytes, checked when they came in.
        bytes: BlockRef,
        /// Where it was.
        tier: TierKind,
    },
    /// It cannot be had.
    Gone(GetOutcome),
}

/// The answer to one get, produced block by block.
pub struct GetPlan {
    blocks: Arc<Blocks>,
    namespace: NamespaceId,
    chain: Chain,
    parts: Vec<Part>,
    replicas: usize,
    run_blocks: u32,
    lease: Option<(LeaseId, Owner)>,
    /// What the lease holds, once a block below RAM made it matter.
    cover: Option<Cover>,
    /// The next block to ask the engine about.
    ask: usize,
    /// The next block to hand out.
    answer: u32,
    window: VecDeque<Waiting>,
    reading_bytes: u64,
    /// When it must be over; `None`: other nodes are not asked.
    asks_until: Option<Tick>,
    /// What came from them for this get.
    brought: Vec<Arc<Brought>>,
    tally: GetTally,
}

enum Waiting {
    Ready(Found),
    Reading {
        below: Below,
        reading: Reading,
        is_leased: bool,
    },
    /// Its run is being fetched from another node.
    Fetching {
        key: BlockKey,
        fetching: BoxFuture<'static, Arc<Brought>>,
    },
}

impl Blocks {
    /// Plans a get of every part of every block of `chain`.
    ///
    /// # Errors
    /// An unknown namespace, a chain that is not valid in it, or too many blocks.
    pub fn get(
        self: &Arc<Self>,
        owner: Owner,
        namespace: NamespaceId,
        chain: Chain,
        parts: Vec<Part>,
        lease: Option<LeaseId>,
    ) -> Result<GetPlan, BlocksError> {
        let known = self.namespaces.get(owner.tenant, namespace)?;
        chain.validate(known.run_blocks)?;
        let (asked, most) = (chain.len() * parts.len(), self.limits.max_blocks_per_call);
        if asked > most {
            let problem =
                format!("{asked} blocks are asked for, {most} are allowed (max_blocks_per_call)");
            return Err(FieldError::new("chain.hashes", problem).into());
        }
        Ok(GetPlan {
            tally: self.metrics.get(asked as u64),
            replicas: known.replicas as usize,
            run_blocks: known.run_blocks,
            blocks: Arc::clone(self),
            namespace,
            chain,
            parts,
            lease: lease.map(|id| (id, owner)),
            cover: None,
            ask: 0,
            answer: 0,
            window: VecDeque::new(),
            reading_bytes: 0,
            asks_until: None,
            brought: Vec::new(),
        })
    }
}

impl GetPlan {
    /// For an answer that is given as a whole or not at all: nothing is counted before [`GetPlan::into_tally`]'s word, and
    /// without that everything has failed.
    #[must_use]
    pub fn as_a_whole(mut self) -> Self {
        self.tally.hold_back();
        self
    }

    /// The account of what was handed out.
    pub fn into_tally(self) -> GetTally {
        self.tally
    }

    /// A caller who is no node: what is missing here may come from other nodes, while there is a reason to ask them and
    /// until shortly before `deadline`; and its reads count for what is hot.
    pub fn asks_peers(&mut self, deadline: Tick) {
        self.asks_until = Some(deadline);
        if let Some(motion) = self.blocks.motion() {
            let calls = self.blocks.queue();
            motion.note_get(self.namespace, &self.chain, self.run_blocks, calls);
        }
    }

    /// Who else has runs that are asked for, for a caller who is no node.
    #[must_use]
    pub fn seconds(&self) -> Vec<Second> {
        let motion = self.blocks.motion();
        motion.map_or_else(Vec::new, |motion| {
            motion.seconds_of(self.namespace, &self.chain, self.run_blocks)
        })
    }

    /// The next block and what became of it; `None` after the last.
    pub async fn next(&mut self) -> Option<(u32, Found)> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    /// As [`GetPlan::next`], for a caller that may be unable to keep a block that is here: what `keeps` (asked with the
    /// block's number) turns down is answered `overloaded`, and counted as that.
    pub async fn next_kept(
        &mut self,
        keeps: impl FnOnce(u32, &BlockRef) -> bool,
    ) -> Option<(u32, Found)> {
        let found = poll_fn(|cx| self.poll_found(cx)).await?;
        let found = match found {
            Found::Hit { bytes, .. } if !keeps(self.answer, &bytes) => {
                Found::Gone(GetOutcome::Overloaded)
            }
            found => found,
        };
        Some(self.hand_out(found))
    }

    /// As [`GetPlan::next`]; waits only for blocks below RAM.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<(u32, Found)>> {
        let found = self.poll_found(cx);
        found.map(|found| found.map(|found| self.hand_out(found)))
    }

    /// What became of the next block, not counted yet.
    fn poll_found(&mut self, cx: &mut Context<'_>) -> Poll<Option<Found>> {
        loop {
            if self.window.is_empty() && !self.ask_next() {
                return Poll::Ready(None);
            }
            if matches!(self.window.front(), Some(Waiting::Reading { .. })) {
                self.ask_ahead();
            }
            let Some(first) = self.window.front_mut() else {
                continue;
            };
            if let Waiting::Fetching { key, fetching } = first {
                let Poll::Ready(brought) = fetching.poll_unpin(cx) else {
                    return Poll::Pending;
                };
                let key = *key;
                self.brought.push(brought);
                let waiting = self.look(&key, None);
                if let (Some(first), Some(waiting)) = (self.window.front_mut(), waiting) {
                    *first = waiting;
                }
                continue;
            }
            if let Waiting::Reading {
                below,
                reading,
                is_leased,
            } = first
            {
                let Poll::Ready(landed) = reading.poll_unpin(cx) else {
                    return Poll::Pending;
                };
                let (below, is_leased) = (*below, *is_leased);
                self.reading_bytes = self
                    .reading_bytes
                    .saturating_sub(below.resident.length_bytes);
                *first = match landed {
                    Ok(bytes) => Waiting::Ready(Found::Hit {
                        bytes,
                        tier: below.tier,
                    }),
                    // Joined a read that was not leased, and that found no slot: read again under the lease.
                    Err(Reason::NoSlot | Reason::Overloaded) if is_leased => {
                        self.reading_bytes += below.resident.length_bytes;
                        Waiting::Reading {
                            below,
                            reading: self.blocks.mover.read(below, Urgency::Leased),
                            is_leased,
                        }
                    }
                    Err(reason) => Waiting::Ready(Found::Gone(GetOutcome::from_reason(reason))),
                };
            }
            if let Some(Waiting::Ready(_)) = self.window.front()
                && let Some(Waiting::Ready(found)) = self.window.pop_front()
            {
                return Poll::Ready(Some(found));
            }
        }
    }

    fn hand_out(&mut self, found: Found) -> (u32, Found) {
        match &found {
            Found::Hit { bytes, tier } => self.tally.hit(*tier, bytes.len_bytes()),
            Found::Gone(outcome) => self.tally.gone(*outcome),
        }
        let block = self.answer;
        self.answer += 1;
        (block, found)
    }

    /// While the first block waits for the disk, lets the next ones wait together with it.
    fn ask_ahead(&mut self) {
        while self.window.len() < READ_AHEAD_BLOCKS && self.reading_bytes < READ_AHEAD_BYTES {
            if !self.ask_next() {
                return;
            }
        }
    }

    /// Asks the engine about the next block; `false` when there is none.
    fn ask_next(&mut self) -> bool {
        let (i, p) = (self.ask / self.parts.len(), self.ask % self.parts.len());
        let Some(&hash) = self.chain.hashes.get(i) else {
            return false;
        };
        self.ask += 1;
        let key = BlockKey {
            namespace: self.namespace,
            hash,
            part: self.parts[p],
        };
        if let Some(waiting) = self.look(&key, Some(i)) {
            self.window.push_back(waiting);
        }
        true
    }

    /// Where a block is; on a miss, with its number `i` in the chain, other nodes may be asked for it.
    fn look(&mut self, key: &BlockKey, i: Option<usize>) -> Option<Waiting> {
        Some(match self.blocks.engine.locate(key, self.lease) {
            Whereabouts::Ram(bytes) => {
                let came = |brought: &Arc<Brought>| brought.blocks.contains(key);
                let tier = match self.brought.iter().any(came) {
                    true => TierKind::Peer,
                    false => TierKind::Ram,
                };
                Waiting::Ready(Found::Hit { bytes, tier })
            }
            Whereabouts::Gone(reason) => {
                let fetching = i.filter(|_| reason == Reason::Evicted);
                match fetching.and_then(|i| self.fetch(i)) {
                    Some(fetching) => Waiting::Fetching {
                        key: *key,
                        fetching,
                    },
                    None => Waiting::Ready(Found::Gone(GetOutcome::from_reason(reason))),
                }
            }
            Whereabouts::Below(below) => {
                let is_leased = self.is_leased(key);
                let urgency = match is_leased {
                    true => Urgency::Leased,
                    false => Urgency::Asked,
                };
                self.reading_bytes += below.resident.length_bytes;
                Waiting::Reading {
                    below,
                    reading: self.blocks.mover.read(below, urgency),
                    is_leased,
                }
            }
        })
    }

    /// The run of block `i` from there on, if another node may have it.
    fn fetch(&self, i: usize) -> Option<BoxFuture<'static, Arc<Brought>>> {
        let deadline = self.asks_until?;
        let motion = self.blocks.motion()?;
        if !motion.may_ask(self.replicas) {
            return None;
        }
        let now = self.blocks.clock.now();
        let left = deadline.since(now);
        let until = now.after(left.saturating_sub((left / 10).clamp(LEAST_MARGIN, MOST_MARGIN)));
        let space = self.blocks.spaces().get(&self.namespace)?;
        motion.bring_run(&space, &self.chain, i, &self.parts, until)
    }

    /// A lease speaks for the blocks it holds, not for all that its owner asks for, nor for what others hold.
    fn is_leased(&mut self, key: &BlockKey) -> bool {
        let Some((id, owner)) = self.lease else {
            return false;
        };
        if self.cover.is_none() {
            self.cover = self.blocks.engine.cover(id, owner);
        }
        self.cover.as_ref().is_some_and(|cover| cover.contains(key))
    }
}
