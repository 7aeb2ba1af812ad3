//! What a scheduler loads, saves and keeps: the half of vLLM's connector that touches no KV.
//!
//! ```text
//! ask ─► chain to look up ─► answered ──► None: asked again in the next step
//!                                     └─► tokens ─► allocated ─► a load, one lease until it has ended
//! fills ─► save ─► a save of the blocks that a step fills       take ─► the step's work, once per step
//! finished ─► keep the blocks while saves read them
//! loaded, failed, replied ◄── what the workers say
//! ```
//!
//! Units: tokens where an engine speaks, blocks where Terrace does.
//! Errors: none; a request that is not tracked is left alone.
//! Why marks and not lists: `saved` says below which block nothing has to be saved. vLLM takes blocks back after a failed load
//! and does not say so; that `computed` became less is how it shows, and the mark goes back with it.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    ops::Range,
    sync::Arc,
};

use kvproto::FieldError;

use super::{chain::GrowingChain, counts::Counts, order::Order};

/// Steps that may pass before an answer counts as "nothing there"; the lookup's own deadline comes first.
pub const MAX_ASKS: u32 = 10_000;

/// What an engine does with its blocks.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Tokens of a block.
    pub block_tokens: usize,
    /// It loads what a node has.
    pub loads: bool,
    /// It saves what it has computed.
    pub saves: bool,
    /// It saves prompts only: a draft may be taken back after its KV was written.
    pub prompts_only: bool,
    /// Workers, each of which stores its part of a block.
    pub workers: usize,
}

/// What is known of one request.
#[derive(Debug, Default)]
struct Tracked {
    chain: GrowingChain,
    asks: u32,
    /// First block that the lookup's answer offers.
    first: usize,
    /// Blocks of the chain that the node holds, until they are allocated.
    found: Option<usize>,
    loading: Option<Arc<Order>>,
    /// Blocks below this need no save.
    saved: usize,
    /// Tokens after the last step.
    computed: usize,
    preemptions: u64,
    /// Saves that read this request's blocks.
    saves: HashSet<u64>,
    /// Blocks that this step fills and that nobody is saving.
    filling: Range<usize>,
}

/// A save that not all workers have answered.
#[derive(Debug)]
struct Saving {
    order: Arc<Order>,
    replies: usize,
    failed: BTreeSet<u32>,
}

/// What the workers do in one engine step.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// To be loaded.
    pub loads: Vec<Arc<Order>>,
    /// To be saved.
    pub saves: Vec<Arc<Order>>,
    /// Finished requests whose blocks wait for their saves.
    pub held: Vec<String>,
    /// This step may reuse blocks that a save still reads.
    pub preempted: bool,
}

/// What a finished request leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leaves {
    /// Saves read its blocks: they must stay until the workers say so.
    pub blocks: bool,
    /// Its lookup may be forgotten; else a load runs under its lease.
    pub lookup: bool,
}

/// A save that all workers have answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Its blocks in the chain.
    pub blocks: Range<usize>,
    /// Of those, which some worker did not store.
    pub missing: Vec<usize>,
}

/// Hashes of one width, joined.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hashes {
    /// All of them.
    pub bytes: Vec<u8>,
    /// Bytes of each.
    pub width: usize,
}

/// A scheduler's loads and saves.
#[derive(Debug)]
pub struct Planner {
    rules: Rules,
    requests: HashMap<String, Tracked>,
    /// Loads in hand whose request was aborted.
    aborted: HashMap<String, Arc<Order>>,
    saving: HashMap<u64, Saving>,
    /// Hashes of blocks that a save is at.
    in_hand: HashSet<Box<[u8]>>,
    plan: Plan,
    counts: Counts,
    last_job: u64,
}

impl Planner {
    /// Nothing is tracked yet.
    ///
    /// # Errors
    /// When a block has no tokens.
    pub fn new(rules: Rules) -> Result<Self, FieldError> {
        if rules.block_tokens == 0 {
            return Err(FieldError::new("block_tokens", "is 0"));
        }
        Ok(Self {
            rules,
            requests: HashMap::new(),
            aborted: HashMap::new(),
            saving: HashMap::new(),
            in_hand: HashSet::new(),
            plan: Plan::default(),
            counts: Counts::default(),
            last_job: 0,
        })
    }

    /// Tracks a request from now on; `preemptions`: how often it was already preempted.
    pub fn track(&mut self, request: &str, preemptions: u64) {
        if !self.requests.contains_key(request) {
            let tracked = Tracked {
                preemptions,
                ..Tracked::default()
            };
            self.requests.insert(request.to_owned(), tracked);
        }
    }

    /// Hashes known of a request: the next to be learned.
    #[must_use]
    pub fn known(&self, request: &str) -> usize {
        self.requests
            .get(request)
            .map_or(0, |tracked| tracked.chain.len())
    }

    /// The next hash of a request.
    ///
    /// # Errors
    /// When it is none, or of another width.
    pub fn learn(&mut self, request: &str, hash: &[u8]) -> Result<(), FieldError> {
        match self.requests.get_mut(request) {
            Some(tracked) => tracked.chain.push(hash),
            None => Ok(()),
        }
    }

    /// The chain to look up for a request of `tokens` of which the engine has `computed`; `None`: nothing to ask.
    ///
    /// All of the chain is asked for, also what the engine has: what the node lacks of it is then saved again. The last token is
    /// always left to compute, so that no block that others may share is written twice.
    pub fn ask(&mut self, request: &str, tokens: usize, computed: usize) -> Option<&[u8]> {
        let tracked = self.requests.get_mut(request)?;
        let blocks = (tokens.saturating_sub(1) / self.rules.block_tokens).min(tracked.chain.len());
        let first = computed / self.rules.block_tokens;
        if blocks <= first {
            tracked.found = Some(first);
            return None;
        }
        tracked.first = first;
        Some(tracked.chain.head(blocks))
    }

    /// The lookup's answer: tokens to load beyond those computed; `None`: ask again in the next step.
    pub fn answered(&mut self, request: &str, found: Option<usize>) -> Option<usize> {
        let Some(tracked) = self.requests.get_mut(request) else {
            return Some(0);
        };
        if found.is_none() {
            tracked.asks += 1;
            if tracked.asks < MAX_ASKS {
                return None;
            }
            self.counts.add("lookups_given_up", 1.0);
        }
        let found = found.unwrap_or(0);
        tracked.found = Some(found);
        let offered = found.saturating_sub(tracked.first) * self.rules.block_tokens;
        Some(if self.rules.loads { offered } else { 0 })
    }

    /// The answer was taken, `tokens` of it, into these blocks of the engine, or not. True: the lookup is of no more use.
    pub fn allocated(
        &mut self,
        request: &str,
        tokens: usize,
        block_ids: &[u32],
        lease: u64,
    ) -> bool {
        let Some(tracked) = self
            .requests
            .get_mut(request)
            .filter(|tracked| tracked.loading.is_none())
        else {
            return false;
        };
        let asked = tracked.found.is_some() || tracked.asks > 0;
        if let Some(found) = tracked.found.take() {
            self.counts.add("lookups", 1.0);
            self.counts.add("lookup_blocks", found as f64);
            tracked.saved = found;
        }
        tracked.asks = 0;
        let first = tracked.first;
        let blocks = first..first + tokens / self.rules.block_tokens;
        if blocks.is_empty() {
            return asked;
        }
        self.last_job += 1;
        let order = Arc::new(order(
            self.last_job,
            request,
            &tracked.chain,
            blocks,
            block_ids,
            lease,
        ));
        tracked.loading = Some(Arc::clone(&order));
        self.plan.loads.push(order);
        false
    }

    /// Requests whose blocks saves read: of these must be told how often they were preempted, before each step.
    #[must_use]
    pub fn saving(&self) -> Vec<String> {
        let requests = self.requests.iter();
        let saving = requests.filter(|(_, tracked)| !tracked.saves.is_empty());
        saving.map(|(request, _)| request.clone()).collect()
    }

    /// How often a request was preempted. Its saves end before anyone else writes to its blocks; see `Plan::preempted`.
    pub fn preempted(&mut self, request: &str, preemptions: u64) {
        if let Some(tracked) = self.requests.get_mut(request) {
            notice(&mut self.plan, tracked, preemptions);
        }
    }

    /// A step computes `scheduled` tokens of a request that had `computed`. True: it fills blocks that are to be saved.
    pub fn fills(
        &mut self,
        request: &str,
        computed: usize,
        scheduled: usize,
        prompt_tokens: usize,
    ) -> bool {
        let tokens = self.rules.block_tokens;
        let Some(tracked) = self.requests.get_mut(request).filter(|_| self.rules.saves) else {
            return false;
        };
        if computed < tracked.computed {
            tracked.saved = tracked.saved.min(computed / tokens);
        }
        tracked.computed = computed + scheduled;
        let mut full = (tracked.computed / tokens).min(tracked.chain.len());
        if self.rules.prompts_only {
            full = full.min(prompt_tokens / tokens);
        }
        let mut first = tracked.saved;
        // Another request is at it.
        while first < full
            && tracked
                .chain
                .get(first)
                .is_some_and(|hash| self.in_hand.contains(hash))
        {
            first += 1;
        }
        tracked.saved = tracked.saved.max(full);
        tracked.filling = first..full;
        first < full
    }

    /// Saves what a step fills, from these blocks of the engine; the job's number. `None`: it fills nothing.
    pub fn save(&mut self, request: &str, block_ids: &[u32]) -> Option<u64> {
        let tracked = self.requests.get_mut(request)?;
        let blocks = std::mem::take(&mut tracked.filling);
        if blocks.is_empty() {
            return None;
        }
        self.last_job += 1;
        let job = self.last_job;
        let order = Arc::new(order(job, request, &tracked.chain, blocks, block_ids, 0));
        tracked.saves.insert(job);
        self.in_hand
            .extend((order.first..order.end()).map(|i| order.hash(i).into()));
        self.plan.saves.push(Arc::clone(&order));
        let saving = Saving {
            order,
            replies: 0,
            failed: BTreeSet::new(),
        };
        self.saving.insert(job, saving);
        Some(job)
    }

    /// The step's work, once per step.
    pub fn take(&mut self) -> Plan {
        std::mem::take(&mut self.plan)
    }

    /// A request is over.
    pub fn finished(&mut self, request: &str, preemptions: u64) -> Leaves {
        let nothing = Leaves {
            blocks: false,
            lookup: false,
        };
        let Some(mut tracked) = self.requests.remove(request) else {
            return nothing;
        };
        // Aborted meanwhile; the engine keeps the blocks until the load is reported.
        if let Some(load) = tracked.loading {
            self.aborted.insert(request.to_owned(), load);
            return nothing;
        }
        notice(&mut self.plan, &mut tracked, preemptions);
        let blocks = !tracked.saves.is_empty();
        if blocks {
            self.plan.held.push(request.to_owned());
        }
        Leaves {
            blocks,
            lookup: true,
        }
    }

    /// A request's load has ended.
    pub fn loaded(&mut self, request: &str) {
        if self.aborted.remove(request).is_none()
            && let Some(tracked) = self.requests.get_mut(request)
        {
            tracked.loading = None;
        }
    }

    /// These blocks of the engine were not loaded. Their hashes: lookups must stop before them, or their request would ask for
    /// them, and fail, again and again.
    pub fn failed(&mut self, block_ids: &HashSet<u32>) -> Option<Hashes> {
        let mut hashes = Hashes {
            bytes: Vec::new(),
            width: 0,
        };
        for tracked in self.requests.values_mut() {
            if let Some(load) = &tracked.loading
                && let Some(first) = hashes.add_failed(load, block_ids)
            {
                tracked.saved = tracked.saved.min(first);
            }
        }
        for load in self.aborted.values() {
            hashes.add_failed(load, block_ids);
        }
        (!hashes.bytes.is_empty()).then_some(hashes)
    }

    /// `workers` more have answered a save, and did not store `failed`. When all have: what is stored now.
    pub fn replied(&mut self, job: u64, workers: usize, failed: &[u32]) -> Option<Stored> {
        let saving = self.saving.get_mut(&job)?;
        saving.replies += workers;
        saving.failed.extend(failed);
        if saving.replies < self.rules.workers {
            return None;
        }
        let Saving { order, failed, .. } = self.saving.remove(&job)?;
        for i in order.first..order.end() {
            self.in_hand.remove(order.hash(i));
        }
        if let Some(tracked) = self.requests.get_mut(&order.request) {
            tracked.saves.remove(&job);
        }
        let blocks = order.first..order.end();
        let missing = blocks.clone().zip(&order.block_ids);
        let missing = missing
            .filter(|(_, id)| failed.contains(id))
            .map(|(i, _)| i);
        Some(Stored {
            missing: missing.collect(),
            blocks,
        })
    }

    /// The weights may be others from now on: whoever runs on must not save what the old ones computed.
    pub fn reset(&mut self) {
        self.requests.clear();
    }

    /// Requests that are tracked, and aborted ones whose load has not ended.
    #[must_use]
    pub fn tracked(&self) -> usize {
        self.requests.len() + self.aborted.len()
    }

    /// Saves that not all workers have answered.
    #[must_use]
    pub fn unanswered(&self) -> usize {
        self.saving.len()
    }

    /// What was counted since the last call.
    pub fn counts(&mut self) -> &mut Counts {
        &mut self.counts
    }
}

impl Hashes {
    /// Adds what of `load` is among `block_ids`; the first such block of the chain.
    fn add_failed(&mut self, load: &Order, block_ids: &HashSet<u32>) -> Option<usize> {
        let bad = (load.first..load.end()).zip(&load.block_ids);
        let mut bad = bad
            .filter(|(_, id)| block_ids.contains(id))
            .map(|(i, _)| i)
            .peekable();
        let first = *bad.peek()?;
        self.width = load.width;
        bad.for_each(|i| self.bytes.extend_from_slice(load.hash(i)));
        Some(first)
    }
}

fn notice(plan: &mut Plan, tracked: &mut Tracked, preemptions: u64) {
    if preemptions > tracked.preemptions {
        tracked.preemptions = preemptions;
        plan.preempted |= !tracked.saves.is_empty();
        tracked.saves.clear();
    }
}

/// Blocks of a chain, from or into their places in the engine's table of the request.
fn order(
    job: u64,
    request: &str,
    chain: &GrowingChain,
    blocks: Range<usize>,
    table: &[u32],
    lease: u64,
) -> Order {
    let last = blocks.end.min(table.len()).min(chain.len());
    let first = blocks.start.min(last);
    Order {
        job,
        request: request.to_owned(),
        hashes: chain.head(last).to_vec(),
        width: chain.width(),
        first,
        block_ids: table[first..last].to_vec(),
        lease,
    }
}

#[cfg(test)]
mod tests;
