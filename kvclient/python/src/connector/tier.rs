//! vLLM's secondary tier: where a request's keys stand in their chains, what of them a node has, and the jobs that move them.
//!
//! ```text
//! key ends at token t ──place──► hashes of its chain, index in it
//! keys asked one by one ──lookup──► one question from the first to the chain's end, then hit, miss or retry
//! a job's keys and rows ──begin──► runs of consecutive blocks: one job of the cache each ──ended──► Ending, once
//! ```
//!
//! Units: chunks (vLLM's word for what a row of its pool holds, a block of Terrace), tokens, bytes.
//! Errors: whatever cannot be told is a miss; only what the caller's question itself says goes through.
//! Why one question: vLLM asks key by key and step by step, a node best answers a chain at once, under one lease. A key behind
//! what a question found may still be there, when vLLM's own tier has what lies between: then it starts a question of its own,
//! [`MAX_QUESTIONS`] of them per request and group.
//! A key of no known place is a chain of its own: found again, evicted alone.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use super::batches::{Batches, Ended, Whole};

/// Questions of one request and group that are kept at a time.
pub const MAX_QUESTIONS: usize = 8;

/// Bytes of a key's end that say its group.
const GROUP_BYTES: usize = 4;

/// What a tier says of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The node has it, and it is leased.
    Hit,
    /// It has not, or nobody can tell.
    Miss,
    /// The question is on its way.
    Retry,
}

/// The group of a key: vLLM's keys are a block's hash and, in four bytes, their group.
#[must_use]
pub fn group_of(key: &[u8]) -> Option<u32> {
    key.last_chunk::<GROUP_BYTES>()
        .map(|group| u32::from_be_bytes(*group))
}

/// One lookup: blocks `first` and on of a chain, of which `count` are there.
#[derive(Clone, Debug)]
pub struct Question {
    /// Its name at the cache.
    pub name: String,
    /// The chain.
    pub hashes: Arc<[u8]>,
    /// Bytes of each.
    pub width: usize,
    /// The first block that is asked for.
    pub first: usize,
    count: Option<usize>,
    step: Option<u64>,
}

impl Question {
    fn covers(&self, index: usize) -> bool {
        (self.first..self.first + self.count.unwrap_or(0)).contains(&index)
    }

    fn asks_for(&self, index: usize, key: &[u8]) -> bool {
        index >= self.first && hash_at(&self.hashes, self.width, index) == Some(key)
    }

    /// Asks, at most once per step: an answer shrinks when one of its blocks has failed since.
    fn poll<E>(
        &mut self,
        step: u64,
        look: &mut impl FnMut(&Self) -> Result<Option<usize>, E>,
    ) -> Result<Option<usize>, E> {
        if self.step != Some(step) {
            self.count = look(self)?;
            self.step = Some(step);
        }
        Ok(self.count)
    }
}

fn hash_at(hashes: &[u8], width: usize, index: usize) -> Option<&[u8]> {
    hashes.get(index * width..(index + 1) * width)
}

/// One request's chain of one group, and what was asked of it.
#[derive(Debug, Default)]
struct Group {
    hashes: Arc<[u8]>,
    questions: Vec<Question>,
    last: Option<usize>,
}

/// Where a key stands: a chain up to it at least, and its index.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    hashes: Arc<[u8]>,
    index: usize,
}

/// What is kept of a request.
#[derive(Debug, Default)]
struct Request {
    groups: HashMap<u32, Group>,
    asked: u64,
    loads: usize,
    scheduled: bool,
    over: bool,
}

/// A request's keys, with the token at which each ends: vLLM's own note.
pub trait Ends {
    /// Where `key` ends.
    fn end_of(&self, key: &[u8]) -> Option<usize>;
    /// Shows every key and its end.
    fn each(&self, show: &mut dyn FnMut(&[u8], usize));
}

/// One of vLLM's jobs.
#[derive(Debug)]
struct Job {
    number: u64,
    request: String,
    promotion: bool,
    rows: Vec<u32>,
}

/// Consecutive blocks of one chain and the rows they lie in: a job of the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// Its number.
    pub job: u64,
    /// The lookup under whose lease it is loaded.
    pub question: Option<String>,
    /// The chain.
    pub hashes: Arc<[u8]>,
    /// Its first block.
    pub first: usize,
    /// The rows of its blocks.
    pub rows: Vec<u32>,
}

impl Run {
    /// True when block `index` of this chain comes right after its last.
    fn goes_on(&self, hashes: &Arc<[u8]>, index: usize) -> bool {
        index == self.first + self.rows.len()
            && (Arc::ptr_eq(hashes, &self.hashes) || *hashes == self.hashes)
    }
}

/// What became of one of vLLM's jobs.
#[derive(Clone, Debug, PartialEq)]
pub struct Ending {
    /// vLLM's number.
    pub job: u64,
    /// Blocks that were moved.
    pub blocks: usize,
    /// Bytes of those.
    pub bytes: u64,
    /// Places in the job of the keys that were not.
    pub failed: Vec<usize>,
    /// Of those, how many the cache never began with.
    pub dropped: usize,
    /// Why the first of them was not.
    pub reason: Option<String>,
    /// Lookups to be forgotten.
    pub forget: Vec<String>,
}

/// A tier's questions and jobs.
#[derive(Debug)]
pub struct Tier {
    /// Tokens of a chunk, by group.
    chunk_tokens: HashMap<u32, usize>,
    requests: HashMap<String, Request>,
    jobs: Batches<Job>,
    step: u64,
}

impl Tier {
    /// A tier of chunks of so many tokens, by group.
    #[must_use]
    pub fn new(chunk_tokens: HashMap<u32, usize>) -> Self {
        Self {
            chunk_tokens,
            requests: HashMap::new(),
            jobs: Batches::default(),
            step: 0,
        }
    }

    /// A request begins.
    pub fn begin_request(&mut self, request: &str) {
        self.request(request).over = false;
    }

    /// Whether a node has `key`; `look` asks the cache, which never waits.
    ///
    /// # Errors
    /// `look`'s.
    pub fn lookup<E>(
        &mut self,
        request: &str,
        key: &[u8],
        ends: &(impl Ends + ?Sized),
        mut look: impl FnMut(&Question) -> Result<Option<usize>, E>,
    ) -> Result<Answer, E> {
        let (step, place) = (self.step, self.place(request, key, ends));
        let Place { hashes, index } = place;
        let state = self.request(request);
        let group = state.groups.entry(group_of(key).unwrap_or(0)).or_default();
        // vLLM scans windowed groups from the end: then one question from the start covers what follows.
        let backwards = group.last == Some(index + 1);
        group.last = Some(index);
        let mut pending = false;
        for question in group
            .questions
            .iter_mut()
            .filter(|question| question.asks_for(index, key))
        {
            match question.poll(step, &mut look)? {
                None => pending = true,
                Some(_) if question.covers(index) => return Ok(Answer::Hit),
                Some(count) if index == question.first + count => return Ok(Answer::Miss),
                Some(_) => {}
            }
        }
        if pending {
            return Ok(Answer::Retry);
        }
        if group.questions.len() >= MAX_QUESTIONS {
            return Ok(Answer::Miss);
        }
        let from_the_start = backwards && group.questions.iter().all(|question| question.first > 0);
        state.asked += 1;
        group.questions.push(Question {
            name: format!("{request}/{}", state.asked),
            hashes,
            width: key.len(),
            first: if from_the_start { 0 } else { index },
            count: None,
            step: None,
        });
        let question = group.questions.last_mut().expect("just pushed");
        Ok(match question.poll(step, &mut look)? {
            None => Answer::Retry,
            Some(_) if question.covers(index) => Answer::Hit,
            Some(_) => Answer::Miss,
        })
    }

    /// The runs of one of vLLM's jobs, which moves `keys` from or to `rows`. None at all: it ends at once, and nothing is told.
    pub fn begin(
        &mut self,
        number: u64,
        request: &str,
        keys: &[&[u8]],
        rows: &[u32],
        ends: &(impl Ends + ?Sized),
        promotion: bool,
    ) -> Vec<Run> {
        // One that nobody has announced, or that is over: gone with the job.
        let known = self.requests.contains_key(request);
        self.request(request).over |= !known;
        let mut runs: Vec<Run> = Vec::new();
        for (key, row) in keys.iter().zip(rows) {
            let Place { hashes, index } = self.place(request, key, ends);
            let question = if promotion {
                self.lease_of(request, key, index)
            } else {
                None
            };
            match runs.last_mut() {
                Some(run) if run.goes_on(&hashes, index) && question == run.question => {
                    run.rows.push(*row);
                }
                _ => runs.push(Run {
                    job: 0,
                    question,
                    hashes,
                    first: index,
                    rows: vec![*row],
                }),
            }
        }
        if runs.is_empty() {
            return runs;
        }
        self.request(request).loads += usize::from(promotion);
        let job = Job {
            number,
            request: request.to_owned(),
            promotion,
            rows: rows.to_vec(),
        };
        let jobs = self
            .jobs
            .begin(job, runs.iter().map(|run| run.rows.clone()).collect());
        for (run, job) in runs.iter_mut().zip(jobs) {
            run.job = job;
        }
        runs
    }

    /// The lookup under whose lease a block is loaded.
    fn lease_of(&self, request: &str, key: &[u8], index: usize) -> Option<String> {
        let group = self.requests.get(request)?.groups.get(&group_of(key)?)?;
        let question = group
            .questions
            .iter()
            .find(|question| question.covers(index))?;
        Some(question.name.clone())
    }

    /// A run has ended; what became of vLLM's job, if that was its last.
    pub fn ended(&mut self, ended: Ended) -> Option<Ending> {
        let whole = self.jobs.end(ended)?;
        Some(self.settle(whole))
    }

    /// The cache did not begin a run.
    pub fn refuse(&mut self, job: u64, reason: &str) -> Option<Ending> {
        let whole = self.jobs.refuse(job, reason)?;
        Some(self.settle(whole))
    }

    /// Nobody will say how a run ended.
    pub fn give_up(&mut self, job: u64, reason: &str) -> Option<Ending> {
        let whole = self.jobs.give_up(job, reason)?;
        Some(self.settle(whole))
    }

    fn settle(&mut self, whole: Whole<Job>) -> Ending {
        let job = whole.what;
        let lost: HashSet<u32> = whole.failed.into_iter().collect();
        let failed: Vec<usize> = (0..job.rows.len())
            .filter(|at| lost.contains(&job.rows[*at]))
            .collect();
        if job.promotion {
            self.request(&job.request).loads -= 1;
            // Every answer that promised one of them is asked for again.
            self.step += u64::from(!failed.is_empty());
        }
        Ending {
            job: job.number,
            blocks: whole.blocks,
            bytes: whole.bytes,
            failed,
            dropped: whole.dropped,
            reason: whole.reason,
            forget: self.release(&job.request),
        }
    }

    /// A step is over, and these requests were scheduled: what they had asked for is in vLLM's own tier now, or never will be.
    /// Lookups to be forgotten.
    pub fn end_step<'r>(&mut self, scheduled: impl IntoIterator<Item = &'r str>) -> Vec<String> {
        self.step += 1;
        let mut forget = Vec::new();
        for request in scheduled {
            if let Some(state) = self.requests.get_mut(request) {
                state.scheduled = true;
                forget.extend(self.release(request));
            }
        }
        forget
    }

    /// A request is over. Lookups to be forgotten.
    pub fn end_request(&mut self, request: &str) -> Vec<String> {
        match self.requests.get_mut(request) {
            Some(state) => state.over = true,
            None => return Vec::new(),
        }
        self.release(request)
    }

    /// The cache is another one from now on: nothing that was asked of the old one counts.
    pub fn reset(&mut self) {
        self.requests
            .values_mut()
            .for_each(|request| request.groups.clear());
    }

    /// Runs that have not ended, oldest first.
    #[must_use]
    pub fn runs(&self) -> Vec<u64> {
        self.jobs.jobs().map(|(job, _)| job).collect()
    }

    /// Requests that are known.
    #[must_use]
    pub fn requests(&self) -> usize {
        self.requests.len()
    }

    fn request(&mut self, request: &str) -> &mut Request {
        self.requests.entry(request.to_owned()).or_default()
    }

    /// Where `key` stands.
    ///
    /// A key that ends inside a chunk (the tail of a prompt) stands where the full chunk would.
    fn place(&mut self, request: &str, key: &[u8], ends: &(impl Ends + ?Sized)) -> Place {
        let width = key.len();
        let alone = || Place {
            hashes: key.into(),
            index: 0,
        };
        let Some(group) = group_of(key) else {
            return alone();
        };
        let (Some(&tokens), Some(end)) = (self.chunk_tokens.get(&group), ends.end_of(key)) else {
            return alone();
        };
        let (Some(before), true) = (end.checked_sub(1), tokens > 0) else {
            return alone();
        };
        let (index, tail) = (before / tokens, !end.is_multiple_of(tokens));
        let chain = &mut self
            .request(request)
            .groups
            .entry(group)
            .or_default()
            .hashes;
        if chain.len() < (index + usize::from(!tail)) * width {
            *chain = joined(ends, group, tokens).into();
        }
        if tail && chain.len() >= index * width {
            let hashes = [&chain[..index * width], key].concat().into();
            return Place { hashes, index };
        }
        if hash_at(chain, width, index) == Some(key) {
            let hashes = Arc::clone(chain);
            return Place { hashes, index };
        }
        alone()
    }

    /// Lookups to be forgotten once a request was scheduled or is over, but none that a load still reads under.
    fn release(&mut self, request: &str) -> Vec<String> {
        let Some(state) = self.requests.get_mut(request) else {
            return Vec::new();
        };
        if state.loads > 0 || !(state.over || state.scheduled) {
            return Vec::new();
        }
        let mut forget = Vec::new();
        for group in state.groups.values_mut() {
            forget.extend(group.questions.drain(..).map(|question| question.name));
            group.last = None;
        }
        if state.over {
            self.requests.remove(request);
        }
        forget
    }
}

/// The hashes of a group's full chunks, from the first on, up to the first that is not known.
fn joined(ends: &(impl Ends + ?Sized), group: u32, tokens: usize) -> Vec<u8> {
    let mut by_index = HashMap::new();
    ends.each(&mut |key, end| {
        if end.is_multiple_of(tokens) && group_of(key) == Some(group) {
            by_index.insert(end / tokens, key.to_vec());
        }
    });
    (1..)
        .map_while(|index| by_index.remove(&index))
        .flatten()
        .collect()
}

#[cfg(test)]
mod tests;
