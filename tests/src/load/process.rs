//! The load's own process: clients that turn, check and count.
//!
//! Units: blocks, milliseconds. Errors: offences; what keeps it from starting ends it.

use std::{
    io::Write,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context as _;
use kvclient::{
    Ack, Chain, Client, GetOutcome, LocalPath, LookupOptions, Namespace, NamespaceHandle, PutBlock,
    PutOptions, PutOutcome,
};
use parking_lot::Mutex;
use tokio::sync::mpsc;

use super::{Audit, Plan, Said, Tally};
use crate::patience::pause;

/// What a thread may need to be woken when two cores serve a dozen processes.
pub const MARGIN: Duration = Duration::from_millis(150);

/// Time between two tallies.
pub(super) const WINDOW: Duration = Duration::from_millis(250);

/// Between two turns of one client.
const BETWEEN_TURNS: Duration = Duration::from_millis(8);

/// Tokens per block and blocks per run.
const BLOCK_TOKENS: u32 = 16;
const RUN_BLOCKS: u32 = 4;

/// How often the thread beside the calls wakes.
const BEAT: Duration = Duration::from_millis(5);

/// How long a fill may take.
const FILL: Duration = Duration::from_secs(30);

/// Offences told in full.
const MOST_TOLD: u64 = 40;
/// The load's process: `plan` as JSON is its argument, lines come on standard input.
///
/// # Errors
/// When the cluster cannot be reached at first.
pub fn run(plan: &str) -> anyhow::Result<()> {
    let plan: Plan = serde_json::from_str(plan)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(serve(plan))
}

async fn serve(plan: Plan) -> anyhow::Result<()> {
    let (heard, mut lines) = mpsc::channel(16);
    std::thread::spawn(move || {
        for line in std::io::stdin().lines().map_while(Result::ok) {
            if heard.blocking_send(line).is_err() {
                return;
            }
        }
    });
    let mut clients = Vec::new();
    for number in 0..plan.clients {
        clients.push(Worker::new(&plan, number).await?);
    }
    let notes = clients[0].notes.clone();
    for worker in &mut clients {
        worker.notes = notes.clone();
    }
    notes.watch_the_machine();
    let clients: Vec<Arc<Worker>> = clients.into_iter().map(Arc::new).collect();
    let mut turning = Vec::new();
    let goes_on = Arc::new(AtomicBool::new(false));
    tokio::spawn(tally(Arc::clone(&notes)));
    while let Some(line) = lines.recv().await {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["fill"] => say(&Said::Audit(clients[0].fill(Ack::Cached).await?))?,
            ["fill", "stored"] => say(&Said::Audit(clients[0].fill(Ack::Stored).await?))?,
            ["audit"] => say(&Said::Audit(clients[0].audit().await))?,
            ["go"] | ["go", "refill"] => {
                goes_on.store(true, Ordering::Relaxed);
                let refills = words.len() > 1;
                for worker in &clients {
                    let (worker, goes_on) = (Arc::clone(worker), Arc::clone(&goes_on));
                    turning.push(tokio::spawn(async move {
                        while goes_on.load(Ordering::Relaxed) {
                            worker.turn(refills).await;
                            pause(BETWEEN_TURNS).await;
                        }
                    }));
                }
            }
            ["stop"] => {
                goes_on.store(false, Ordering::Relaxed);
                for worker in turning.drain(..) {
                    worker.await?;
                }
                say(&Said::Tally(notes.tally()))?;
                say(&Said::Stopped(true))?;
            }
            _ => anyhow::bail!("{line:?} is no line for a load"),
        }
    }
    Ok(())
}

async fn tally(notes: Arc<Notes>) {
    while say(&Said::Tally(notes.tally())).is_ok() {
        pause(WINDOW).await;
    }
}

fn say(line: &Said) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", serde_json::to_string(line)?)?;
    out.flush()
}

/// What was seen so far.
struct Notes {
    began: Instant,
    so_far: Mutex<Tally>,
    told: AtomicU64,
    /// Microseconds that the thread beside the calls came too late by, in all.
    stalled_us: AtomicU64,
}

impl Notes {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            began: now(),
            so_far: Mutex::default(),
            told: AtomicU64::new(0),
            stalled_us: AtomicU64::new(0),
        })
    }

    fn watch_the_machine(self: &Arc<Self>) {
        let notes = Arc::clone(self);
        std::thread::spawn(move || {
            loop {
                let before = now();
                #[expect(clippy::disallowed_methods, reason = "a beat of real time")]
                std::thread::sleep(BEAT);
                let stalled = before.elapsed().saturating_sub(BEAT);
                let stalled_us = u64::try_from(stalled.as_micros()).unwrap_or(u64::MAX);
                notes.stalled_us.fetch_add(stalled_us, Ordering::Relaxed);
                let mut so_far = notes.so_far.lock();
                so_far.stalled_ms = so_far.stalled_ms.max(stalled_us / 1000);
            }
        });
    }

    fn stalled(&self) -> Duration {
        Duration::from_micros(self.stalled_us.load(Ordering::Relaxed))
    }

    fn tally(&self) -> Tally {
        let at_ms = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        Tally {
            at_ms,
            ..*self.so_far.lock()
        }
    }

    fn note(&self, change: impl FnOnce(&mut Tally)) {
        change(&mut self.so_far.lock());
    }

    fn offence(&self, count: impl FnOnce(&mut Tally), what: &str) {
        self.note(count);
        if self.told.fetch_add(1, Ordering::Relaxed) < MOST_TOLD {
            let at = self.began.elapsed().as_millis();
            let _ = say(&Said::Offence(format!("at {at} ms: {what}")));
        }
    }
}

/// One client.
struct Worker {
    client: Client,
    namespace: NamespaceHandle,
    plan: Plan,
    notes: Arc<Notes>,
    drawn: AtomicU64,
}

impl Worker {
    async fn new(plan: &Plan, number: u32) -> anyhow::Result<Self> {
        let deadline = Duration::from_millis(plan.deadline_ms);
        let local = match plan.local {
            true => LocalPath::Auto,
            false => LocalPath::Off,
        };
        let builder = Client::builder(&plan.seeds).local(local);
        let client = builder.deadline(deadline).connect().await;
        let client = client.with_context(|| format!("no node at {}", plan.seeds))?;
        let shape = Namespace::opaque("load", BLOCK_TOKENS, RUN_BLOCKS);
        let namespace = client.open_replicated(&shape, false, plan.replicas).await?;
        Ok(Self {
            client,
            namespace,
            plan: plan.clone(),
            notes: Notes::new(),
            drawn: AtomicU64::new(plan.seed * 1000 + u64::from(number)),
        })
    }

    fn chain(&self, prompt: u32) -> Chain {
        let tokens = 0..self.plan.blocks * BLOCK_TOKENS;
        let tokens: Vec<u32> = tokens.map(|i| prompt * 1_000_003 + i).collect();
        self.namespace.chain(&tokens)
    }

    /// The next lot: SplitMix64.
    fn draw(&self) -> u64 {
        let mut z = self
            .drawn
            .fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One call, timed, its error an offence.
    async fn call<T>(
        &self,
        name: &str,
        call: impl Future<Output = Result<T, kvclient::Error>>,
    ) -> Option<T> {
        let (began, stalled) = (now(), self.notes.stalled());
        let answer = call.await;
        let took = began.elapsed();
        let stalled = self.notes.stalled().saturating_sub(stalled);
        let took_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
        self.notes.note(|tally| {
            tally.calls += 1;
            tally.slowest_ms = tally.slowest_ms.max(took_ms);
        });
        if is_late(took, Duration::from_millis(self.plan.deadline_ms), stalled) {
            let what =
                format!("{name} took {took:?}; the machine stood still for {stalled:?} of it");
            self.notes.offence(|tally| tally.late += 1, &what);
        }
        answer
            .inspect_err(|error| {
                let mut what = format!("{name} failed after {took:?}: {error}");
                let mut cause = std::error::Error::source(error);
                while let Some(error) = cause {
                    what += &format!(": {error}");
                    cause = error.source();
                }
                self.notes.offence(|tally| tally.dishonest += 1, &what);
            })
            .ok()
    }

    /// What an engine does with one prompt.
    async fn turn(&self, refills: bool) {
        let prompt = self.draw() % u64::from(self.plan.prompts);
        let chain = self.chain(prompt as u32);
        let options = LookupOptions::default();
        let found = self.client.lookup(&self.namespace, &chain, &options);
        let Some(found) = self.call("lookup", found).await else {
            self.notes.note(|tally| tally.asked += chain.len() as u64);
            return;
        };
        let leased = found.leased_blocks() as usize;
        let mut hits = 0;
        if leased > 0 {
            let part = chain.slice(0..leased, RUN_BLOCKS);
            let lease = found.lease.as_ref();
            (hits, _) = self.read(&part, lease).await;
        }
        self.notes.note(|tally| {
            tally.asked += chain.len() as u64;
            tally.hits += hits;
        });
        if refills && (hits as usize) < chain.len() {
            let _ = self.put(&chain, hits as usize, Ack::Cached).await;
        }
    }

    /// Reads and checks; answers how many blocks were right up to the first that was not, and how many in all.
    async fn read(&self, chain: &Chain, lease: Option<&kvclient::Lease>) -> (u64, u64) {
        let mut memory = vec![0; chain.len() * self.plan.block_bytes];
        let mut buffers: Vec<&mut [u8]> = memory.chunks_mut(self.plan.block_bytes).collect();
        let got = self
            .client
            .get_into(&self.namespace, chain, lease, &mut buffers);
        let Some(got) = self.call("get", got).await else {
            return (0, 0);
        };
        let is_right: Vec<bool> = (0..chain.len())
            .map(|i| match got[i].outcome {
                GetOutcome::Hit => {
                    let bytes = &memory[i * self.plan.block_bytes..][..got[i].length_bytes];
                    let is_right = bytes == self.bytes(chain, i);
                    if !is_right {
                        let what = format!("block {i} of {} has other bytes", chain.len());
                        self.notes.offence(|tally| tally.wrong += 1, &what);
                    }
                    is_right
                }
                // A node that went away, or came back without what it had promised.
                GetOutcome::Node | GetOutcome::Expired if lease.is_some() => {
                    self.notes.note(|tally| tally.lost += 1);
                    false
                }
                GetOutcome::Node | GetOutcome::Miss | GetOutcome::Overloaded if lease.is_none() => {
                    false
                }
                other => {
                    let under = lease.map_or("without", |_| "under");
                    let what = format!("block {i} of {} {under} a lease: {other:?}", chain.len());
                    self.notes.offence(|tally| tally.dishonest += 1, &what);
                    false
                }
            })
            .collect();
        let prefix = is_right.iter().take_while(|is_right| **is_right).count();
        let all = is_right.iter().filter(|is_right| **is_right).count();
        (prefix as u64, all as u64)
    }

    /// Puts blocks from `first` on; whether all were kept.
    async fn put(&self, chain: &Chain, first: usize, ack: Ack) -> bool {
        let blocks = first..chain.len();
        let blocks: Vec<PutBlock<'_>> = blocks
            .map(|i| PutBlock::new(i, self.bytes(chain, i)))
            .collect();
        let options = PutOptions {
            ack,
            ..PutOptions::default()
        };
        let put = self.client.put(&self.namespace, chain, &blocks, options);
        let Some(results) = self.call("put", put).await else {
            return false;
        };
        let mut kept = 0;
        for result in &results {
            match result.outcome {
                PutOutcome::Rejected => self.notes.note(|tally| tally.rejected += 1),
                PutOutcome::Corrupt => {
                    self.notes
                        .offence(|tally| tally.wrong += 1, "a put was corrupt");
                }
                _ => {
                    kept += 1;
                    self.notes.note(|tally| tally.put += 1);
                }
            }
        }
        kept == blocks.len()
    }

    /// The bytes that a block must have: they follow from its name.
    fn bytes(&self, chain: &Chain, i: usize) -> Vec<u8> {
        let words = chain.hashes[i].0.as_chunks::<8>().0;
        let name = words.iter().map(|word| u64::from_le_bytes(*word));
        let mut state = name.fold(1 + self.plan.salt, |state, word| state ^ word);
        let mut bytes = Vec::with_capacity(self.plan.block_bytes + 8);
        while bytes.len() < self.plan.block_bytes {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bytes.extend_from_slice(&state.to_le_bytes());
        }
        bytes.truncate(self.plan.block_bytes);
        bytes
    }

    /// Puts everything, as often as it takes.
    async fn fill(&self, ack: Ack) -> anyhow::Result<Audit> {
        let until = now() + FILL;
        for prompt in 0..self.plan.prompts {
            let chain = self.chain(prompt);
            while !self.put(&chain, 0, ack).await {
                anyhow::ensure!(now() < until, "prompt {prompt} is not kept");
                pause(Duration::from_millis(50)).await;
            }
        }
        Ok(self.audit().await)
    }

    /// Reads everything.
    async fn audit(&self) -> Audit {
        let mut audit = Audit::default();
        for prompt in 0..self.plan.prompts {
            let chain = self.chain(prompt);
            audit.blocks += chain.len() as u64;
            audit.readable += self.read(&chain, None).await.1;
        }
        audit
    }
}

/// Whether a call ran past its deadline, on a machine that kept this process from running for `stalled` meanwhile.
fn is_late(took: Duration, deadline: Duration, stalled: Duration) -> bool {
    took > deadline + MARGIN + stalled
}

#[expect(
    clippy::disallowed_methods,
    reason = "a real process runs on real time"
)]
pub(super) fn now() -> Instant {
    Instant::now()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_late_by_its_own_doing_alone() {
        let ms = Duration::from_millis;
        assert!(!is_late(ms(1100), ms(1000), ms(0)));
        assert!(is_late(ms(1200), ms(1000), ms(0)));
        assert!(
            !is_late(ms(1200), ms(1000), ms(60)),
            "the machine stood still"
        );
        assert!(is_late(ms(1300), ms(1000), ms(60)));
    }
}
