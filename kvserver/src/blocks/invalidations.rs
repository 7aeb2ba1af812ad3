//! What this node was told to forget, kept for members that were away and could not be told.
//!
//! ```text
//! told by a caller ─► note ─► entries, oldest first ─► answer: the newer ones, to a member that came back
//!                              │                 ▲
//!                              ▼ writer thread   └─ learn ◄─ missed: those of a member's answer that are unknown here
//! data_dir/invalidations       records of RECORD_BYTES, appended; replaced as a whole when it has grown
//!
//! record: id 8 · namespace 16 · kind 1 (0 id alone, 1 block, 2 prefix, 3 all) · hash 32 · XXH3 of these 8, little-endian
//! ```
//!
//! Every member is told of every invalidation under one id, but those that are gone, or cut off with other callers. When
//! such a one is back it asks the others (`catch_up`), and what it does not know it forgets, and knows from then on. Each
//! node that was there can answer, so that one of them is enough.
//!
//! Bounds: [`KEPT`] entries. Of the newest [`TOLD`] others are told what they were, of those before them the ids alone: who
//! does not know one of these was away for longer than is remembered, and forgets everything. Callers tell nodes in any
//! order, so that the oldest [`SKEW`] of a full register say nothing. Units: none. Errors: a file that cannot be written is
//! reported once, and tried again with the next entry.
//! Why the file is not synced: it is for other nodes, each of which has one.

mod file;
#[cfg(test)]
mod tests;

use std::{
    collections::{HashSet, VecDeque},
    io,
    path::Path,
    sync::{
        Arc,
        mpsc::{self, RecvTimeoutError, SyncSender, sync_channel},
    },
    time::Duration,
};

use kvproto::{
    FieldError, NamespaceId,
    convert::request::{Context, Invalidate, Target as WireTarget},
    v1,
};
use parking_lot::Mutex;

use self::file::Writer;
use crate::engine::{InvalidationId, Target};

/// Entries that are known.
const KEPT: usize = 65_536;

/// Of them, those that another node is told whole; with the ids of the others they fill two thirds of a message.
const TOLD: usize = 32_768;

/// The most by which two nodes that were told the same were told it in another order.
const SKEW: usize = 1024;

/// How long a register that is dropped waits for its writer: a disk that hangs must not hold up a node that stops.
const LAST_WRITE: Duration = Duration::from_secs(2);

/// One invalidation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Invalidation {
    /// The same at every node that was told of it; never 0.
    pub(crate) id: InvalidationId,
    /// `None`: it is too old to be told.
    pub(crate) what: Option<What>,
}

/// What an invalidation forgets, and in which namespace.
pub(crate) type What = (NamespaceId, Target);

/// The register.
pub(crate) struct Invalidations {
    state: Arc<Mutex<State>>,
    /// `None` only while it is dropped.
    wake: Option<SyncSender<()>>,
    /// Closed when the writer has ended.
    ended: Mutex<mpsc::Receiver<()>>,
}

#[derive(Default)]
struct State {
    /// Oldest first.
    entries: VecDeque<Invalidation>,
    ids: HashSet<InvalidationId>,
    /// The ids of all entries, by exclusive or.
    digest: u64,
    /// Of the entries, the last ones that are not in the file yet.
    unwritten: usize,
    /// The file has to be replaced.
    is_stale: bool,
}

impl State {
    fn push(&mut self, entry: Invalidation) {
        if entry.id == 0 || !self.ids.insert(entry.id) {
            return;
        }
        self.digest ^= entry.id;
        self.entries.push_back(entry);
        self.unwritten += 1;
        if self.entries.len() > KEPT {
            let oldest = self.entries.pop_front().expect("there are some");
            self.ids.remove(&oldest.id);
            self.digest ^= oldest.id;
            self.unwritten = self.unwritten.min(self.entries.len());
        }
    }

    /// Whether all that is missing here is told of in these.
    fn is_reached_by(&self, told: &[Invalidation]) -> bool {
        let skew = if told.len() < KEPT { 0 } else { SKEW };
        let mut told = told.iter().skip(skew);
        told.all(|entry| entry.what.is_some() || self.ids.contains(&entry.id))
    }
}

/// What a node has to forget because others were told.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Missed {
    pub(crate) what: Vec<What>,
    /// Some more was told that nobody remembers.
    pub(crate) and_more: bool,
}

impl Invalidations {
    /// Reads the register of `data_dir`, or begins one. What of it cannot be read is reported and left out.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub(crate) fn open(data_dir: &Path) -> io::Result<Self> {
        let path = data_dir.join("invalidations");
        let (state, records) = file::read(&path);
        let state = Arc::new(Mutex::new(state));
        let (wake, woken) = sync_channel(1);
        let (ending, ended) = mpsc::channel();
        let writer = Writer::new(path, Arc::clone(&state), records);
        std::thread::Builder::new()
            .name("terrace-invalidations".to_owned())
            .spawn(move || {
                let _ending: mpsc::Sender<()> = ending; // dropped last, however the writer ends
                writer.run(&woken);
            })?;
        Ok(Self {
            state,
            wake: Some(wake),
            ended: Mutex::new(ended),
        })
    }

    /// This node was told. One that it knows already says nothing new.
    pub(crate) fn note(&self, entry: Invalidation) {
        self.state.lock().push(entry);
        self.wake();
    }

    /// What a member answers whose asker knows ids of this digest.
    pub(crate) fn answer(&self, known: u64) -> v1::InvalidationsResponse {
        let state = self.state.lock();
        if known == state.digest {
            return v1::InvalidationsResponse::default();
        }
        let older = state.entries.len().saturating_sub(TOLD);
        let entries = state.entries.iter().enumerate();
        let told = entries.map(|(at, entry)| Invalidation {
            what: entry.what.filter(|_| at >= older),
            ..*entry
        });
        v1::InvalidationsResponse {
            context: None,
            told: told.map(Into::into).collect(),
        }
    }

    /// The digest of what is known here.
    pub(crate) fn digest(&self) -> u64 {
        self.state.lock().digest
    }

    /// What of a member's answer is unknown here.
    pub(crate) fn missed(&self, told: &[Invalidation]) -> Missed {
        let state = self.state.lock();
        let unknown = told.iter().filter(|entry| !state.ids.contains(&entry.id));
        Missed {
            what: unknown.filter_map(|entry| entry.what).collect(),
            and_more: !state.is_reached_by(told),
        }
    }

    /// What was missed has been forgotten.
    pub(crate) fn learn(&self, told: Vec<Invalidation>) {
        let mut state = self.state.lock();
        // An id alone is old: behind newer ones it would be taken for something that others have missed.
        let is_whole = |entry: &Invalidation| entry.what.is_some();
        if state.is_reached_by(&told) {
            let whole = told.into_iter().filter(is_whole);
            whole.for_each(|entry| state.push(entry));
        } else {
            // Before what is known here there is more that is older than all that was told.
            let known = std::mem::take(&mut *state).entries.into_iter();
            told.into_iter()
                .chain(known.filter(is_whole))
                .for_each(|entry| state.push(entry));
            state.is_stale = true;
        }
        drop(state);
        self.wake();
    }

    fn wake(&self) {
        if let Some(wake) = &self.wake {
            let _ = wake.try_send(()); // a full one has been woken already
        }
    }
}

impl Drop for Invalidations {
    fn drop(&mut self) {
        self.wake = None;
        if self.ended.lock().recv_timeout(LAST_WRITE) == Err(RecvTimeoutError::Timeout) {
            tracing::warn!(
                "the register of invalidations was not written to its end: the disk hangs"
            );
        }
    }
}

impl From<Invalidation> for v1::Invalidation {
    fn from(entry: Invalidation) -> Self {
        let what = entry.what.map(|(namespace, target)| {
            let target = match target {
                Target::Block(hash) => WireTarget::Block(hash),
                Target::Prefix(hash) => WireTarget::Prefix(hash),
                Target::All => WireTarget::All,
            };
            let what = Invalidate {
                context: Context::default(),
                namespace,
                target,
            };
            v1::InvalidateRequest {
                context: None,
                ..what.into()
            }
        });
        Self { id: entry.id, what }
    }
}

impl TryFrom<v1::Invalidation> for Invalidation {
    type Error = FieldError;

    fn try_from(wire: v1::Invalidation) -> Result<Self, FieldError> {
        let what = wire.what.map(Invalidate::try_from).transpose()?;
        Ok(Self {
            id: wire.id,
            what: what.map(|what| (what.namespace, what.target.into())),
        })
    }
}

impl From<WireTarget> for Target {
    fn from(target: WireTarget) -> Self {
        match target {
            WireTarget::Block(hash) => Self::Block(hash),
            WireTarget::Prefix(hash) => Self::Prefix(hash),
            WireTarget::All => Self::All,
        }
    }
}
