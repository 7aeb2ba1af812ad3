//! A policy that writes down every call, and decides as another one or by itself.
//!
//! ```text
//! engine ─► Recorder ─► inner policy
//!              └─► log: inserted, touched, removed, asked, victim
//! ```
//!
//! One recorder serves as fake (around plain LRU), as oracle (the log is checked against the rules of the seam,
//! see [`Log::check`]) and as probe. Bounds: the log keeps the last `limit` calls; the rules are checked as they go.

use std::{
    collections::{HashSet, VecDeque},
    sync::Arc,
};

use parking_lot::Mutex;

use super::policy::{BlockId, BlockMeta, EvictionPolicy};

/// One call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    /// A block entered.
    Inserted(BlockId, BlockMeta),
    /// Blocks were used.
    Touched(Vec<BlockId>),
    /// A block left.
    Removed(BlockId),
    /// A victim was sought: how many candidates were refused, and who it became.
    Victim {
        /// Candidates that were in use.
        refused: usize,
        /// The choice.
        chosen: Option<BlockId>,
    },
}

/// What was recorded.
#[derive(Debug, Default)]
pub struct Log {
    calls: VecDeque<Call>,
    limit: usize,
    present: HashSet<BlockId>,
    broken: Option<String>,
}

impl Log {
    /// The calls still remembered, oldest first.
    pub fn calls(&self) -> impl Iterator<Item = &Call> {
        self.calls.iter()
    }

    /// Handles that are in RAM now, by the calls.
    #[must_use]
    pub fn present(&self) -> &HashSet<BlockId> {
        &self.present
    }

    /// Whether both sides have kept the rules of the seam.
    ///
    /// # Errors
    /// The first breach, in words.
    pub fn check(&self) -> Result<(), String> {
        self.broken.clone().map_or(Ok(()), Err)
    }

    fn add(&mut self, call: Call) {
        if self.calls.len() == self.limit {
            self.calls.pop_front();
        }
        self.calls.push_back(call);
    }

    fn rule(&mut self, kept: bool, breach: impl FnOnce() -> String) {
        if !kept && self.broken.is_none() {
            self.broken = Some(breach());
        }
    }
}

/// The recorder. See the module page.
pub struct Recorder {
    inner: Box<dyn EvictionPolicy>,
    log: Arc<Mutex<Log>>,
}

impl Recorder {
    /// Around a policy, remembering up to `limit` calls; the log is shared with the caller.
    #[must_use]
    pub fn new(inner: Box<dyn EvictionPolicy>, limit: usize) -> (Self, Arc<Mutex<Log>>) {
        let log = Arc::new(Mutex::new(Log {
            limit: limit.max(1),
            ..Log::default()
        }));
        (
            Self {
                inner,
                log: Arc::clone(&log),
            },
            log,
        )
    }
}

impl EvictionPolicy for Recorder {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    /// Another kind's policy has handles of its own ordering; it is not recorded.
    fn fresh(&self) -> Box<dyn EvictionPolicy> {
        self.inner.fresh()
    }

    fn inserted(&mut self, id: BlockId, meta: &BlockMeta) {
        let mut log = self.log.lock();
        let new = log.present.insert(id);
        log.rule(new, || format!("{id:?} was inserted twice"));
        if let Some(parent) = meta.parent {
            let known = log.present.contains(&parent);
            log.rule(known, || {
                format!("the parent {parent:?} of {id:?} is not in RAM")
            });
        }
        log.add(Call::Inserted(id, *meta));
        drop(log);
        self.inner.inserted(id, meta);
    }

    fn touched(&mut self, ids: &[BlockId]) {
        self.log.lock().add(Call::Touched(ids.to_vec()));
        self.inner.touched(ids);
    }

    fn removed(&mut self, id: BlockId) {
        let mut log = self.log.lock();
        let known = log.present.remove(&id);
        log.rule(known, || format!("{id:?} was removed and is not in RAM"));
        log.add(Call::Removed(id));
        drop(log);
        self.inner.removed(id);
    }

    fn victim(&mut self, evictable: &mut dyn FnMut(BlockId) -> bool) -> Option<BlockId> {
        let mut asked = HashSet::new();
        let mut accepted = None;
        let log = Arc::clone(&self.log);
        let chosen = self.inner.victim(&mut |id| {
            let mut log = log.lock();
            let (known, first) = (log.present.contains(&id), asked.insert(id));
            log.rule(known, || {
                format!("{id:?} was offered as victim and is not in RAM")
            });
            log.rule(first, || format!("{id:?} was offered twice in one search"));
            log.rule(accepted.is_none(), || {
                format!("{id:?} was offered after a yes")
            });
            drop(log);
            let yes = evictable(id);
            if yes {
                accepted = Some(id);
            }
            yes
        });
        let mut log = self.log.lock();
        log.rule(chosen == accepted, || {
            format!("{accepted:?} was accepted, {chosen:?} returned")
        });
        let all = log.present.len();
        log.rule(chosen.is_some() || asked.len() == all, || {
            format!("no victim after {} of {all} blocks", asked.len())
        });
        log.add(Call::Victim {
            refused: asked.len() - usize::from(chosen.is_some()),
            chosen,
        });
        chosen
    }

    fn coldest(&self, limit: usize, out: &mut Vec<BlockId>) {
        self.inner.coldest(limit, out);
    }

    fn len(&self) -> usize {
        self.inner.len()
    }
}
