//! A load that checks every byte, every deadline and every answer: several clients in a process of their own.
//!
//! ```text
//! scenario ─ lines ─► checking_load (in some namespace) ─ kvclient ─► the cluster
//!          ◄─ JSON lines ─ a tally every WINDOW; an offence as it happens; the answer to a line
//!
//!   fill [stored]   puts every block until each is kept         {"audit":…} of what it then read
//!   go [refill]     clients turn until `stop`: lookup, get, check; with refill they put what was missing, as an engine
//!                   does that has computed it anew
//!   stop            the turns end                               {"stopped":true}
//!   audit           reads every block once, without a lease     {"audit":…}
//! ```
//!
//! A block's bytes follow from its name, so whoever reads it knows each of them. A call is late when it comes back
//! after its deadline and [`MARGIN`], plus what a thread beside the calls was kept from running meanwhile: a machine that
//! stands still is not the client's doing. An error of a call is an offence, because here somebody always answers;
//! so is an answer that no loss explains. A lost node is an answer, and so is a rejection.
//!
//! Units: blocks, milliseconds. Errors: offences.

#![allow(
    clippy::print_stdout,
    reason = "what a scenario measures is shown with --nocapture"
)]

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Child, ChildStdin, Stdio},
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
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::{
    namespaces::Network,
    patience::{pause, until, within_awake},
};

/// What a thread may need to be woken when two cores serve a dozen processes.
pub const MARGIN: Duration = Duration::from_millis(150);

/// Time between two tallies.
const WINDOW: Duration = Duration::from_millis(250);

/// Over how long a share is taken when it is to be a level.
const SPELL: Duration = Duration::from_secs(2);

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

/// How a load works.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Plan {
    /// Endpoints, with commas.
    pub seeds: String,
    /// Clients, each with connections of its own.
    pub clients: u32,
    /// Of each call.
    pub deadline_ms: u64,
    /// Prompts of the working set.
    pub prompts: u32,
    /// Blocks of each.
    pub blocks: u32,
    /// Bytes of a block.
    pub block_bytes: usize,
    /// Owners of each run; 0: one.
    pub replicas: u32,
    /// Another one, other bytes under the same names: what a load must notice.
    pub salt: u64,
    /// Whether it may use shared memory: where it is, the node's files are, but a network in two does not divide them.
    pub local: bool,
    /// Of the lots it draws.
    pub seed: u64,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            seeds: String::new(),
            clients: 3,
            deadline_ms: 1000,
            prompts: 96,
            blocks: 12,
            block_bytes: 8 << 10,
            replicas: 0,
            salt: 0,
            local: false,
            seed: 1,
        }
    }
}

/// What has happened since the load began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// Since it began.
    pub at_ms: u64,
    /// Calls answered or failed.
    pub calls: u64,
    /// Blocks of prompts that were looked up.
    pub asked: u64,
    /// Blocks that were then read, every byte of them right.
    pub hits: u64,
    /// Blocks whose bytes were others.
    pub wrong: u64,
    /// Calls that ran past their deadline.
    pub late: u64,
    /// Calls that failed, and answers that no loss explains.
    pub dishonest: u64,
    /// Blocks under a lease that were lost with their node.
    pub lost: u64,
    /// Blocks put that were refused with a reason.
    pub rejected: u64,
    /// Blocks put and kept.
    pub put: u64,
    /// The longest call.
    pub slowest_ms: u64,
    /// What the machine kept the load from running, at most at once.
    pub stalled_ms: u64,
}

/// What reading everything gave.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Audit {
    /// Blocks of the working set.
    pub blocks: u64,
    /// Those that were read and right.
    pub readable: u64,
}

/// A line of the load's.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Said {
    Tally(Tally),
    Audit(Audit),
    Stopped(bool),
    Offence(String),
}

// ---- the process ----------------------------------------------------------------------------------------------------

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
fn now() -> Instant {
    Instant::now()
}

// ---- the scenario's side --------------------------------------------------------------------------------------------

/// A load that runs.
pub struct Load {
    child: Child,
    lines: ChildStdin,
    heard: Arc<Mutex<Heard>>,
}

#[derive(Default)]
struct Heard {
    tallies: Vec<Tally>,
    offences: Vec<String>,
    audits: Vec<Audit>,
    stops: usize,
    is_over: bool,
}

impl Load {
    /// Starts one at `place`.
    ///
    /// # Panics
    /// When it does not start.
    #[must_use]
    pub fn start(network: &Network, place: &str, program: &Path, plan: &Plan) -> Self {
        let plan = serde_json::to_string(plan).expect("plain values");
        let mut child = network
            .command(place, program)
            .arg(plan)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the load's program");
        let lines = child.stdin.take().expect("a pipe");
        let out = BufReader::new(child.stdout.take().expect("a pipe"));
        let heard: Arc<Mutex<Heard>> = Arc::default();
        let noting = Arc::clone(&heard);
        std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                noting.lock().note(&line);
            }
            noting.lock().is_over = true;
        });
        Self {
            child,
            lines,
            heard,
        }
    }

    /// Puts everything, `stored` or in memory, and reads it.
    ///
    /// # Panics
    /// When not all of it is there afterwards.
    pub async fn fill(&mut self, stored: bool) {
        let line = if stored { "fill stored" } else { "fill" };
        let filled = self.audit_by(line).await;
        assert_eq!(filled.readable, filled.blocks, "filled");
    }

    /// Reads everything once.
    pub async fn audit(&mut self) -> Audit {
        self.audit_by("audit").await
    }

    async fn audit_by(&mut self, line: &str) -> Audit {
        let before = self.heard.lock().audits.len();
        self.say(line);
        self.wait(line, |heard| heard.audits.len() > before).await;
        self.heard.lock().audits[before]
    }

    /// The clients turn from now on; with `refills` they put what they miss.
    pub fn go(&mut self, refills: bool) {
        self.say(if refills { "go refill" } else { "go" });
    }

    /// The turns end. Answers what has happened until then.
    pub async fn stop(&mut self) -> Tally {
        let before = self.heard.lock().stops;
        self.say("stop");
        self.wait("stop", |heard| heard.stops > before).await;
        self.tally()
    }

    fn say(&mut self, line: &str) {
        let said = writeln!(self.lines, "{line}").and_then(|()| self.lines.flush());
        said.unwrap_or_else(|error| panic!("the load has ended ({error}): {:?}", self.offences()));
    }

    async fn wait(&self, what: &str, is_so: impl Fn(&Heard) -> bool) {
        until(&format!("the load answers {what:?}"), async || {
            let heard = self.heard.lock();
            assert!(!heard.is_over, "the load has ended: {:?}", heard.offences);
            is_so(&heard)
        })
        .await;
    }

    /// Offences, in words.
    #[must_use]
    pub fn offences(&self) -> Vec<String> {
        self.heard.lock().offences.clone()
    }

    /// The latest tally.
    #[must_use]
    pub fn tally(&self) -> Tally {
        self.heard
            .lock()
            .tallies
            .last()
            .copied()
            .unwrap_or_default()
    }

    /// Waits until the share over two seconds, all of them after this call, is at least `level`. Answers how long it took
    /// to get there, those two seconds left out.
    ///
    /// # Panics
    /// When it is not in time.
    pub async fn returns_to(&self, what: &str, level: f64, limit: Duration) -> Duration {
        let (from, began) = (self.tally(), now());
        let is_there = until(what, async || {
            self.best_since(&from).is_some_and(|best| best >= level)
        });
        if within_awake(limit + SPELL, is_there).await.is_none() {
            let course = self.course(&from);
            panic!("not within {limit:?}: {what}: {level:.3}; second by second: {course}");
        }
        let took = began.elapsed().saturating_sub(SPELL);
        println!("  {what}: {:.2} s", took.as_secs_f64());
        took
    }

    /// The best share over a spell since `from`.
    fn best_since(&self, from: &Tally) -> Option<f64> {
        let heard = self.heard.lock();
        let since = heard
            .tallies
            .iter()
            .filter(|tally| tally.at_ms >= from.at_ms);
        let since: Vec<&Tally> = since.collect();
        let windows = usize::try_from(SPELL.as_millis() / WINDOW.as_millis()).ok()?;
        let spells = since.windows(windows + 1);
        let shares = spells.filter_map(|spell| share(spell[0], spell[windows]));
        shares.max_by(f64::total_cmp)
    }

    /// The share once it is steady: over the first two seconds from now on.
    pub async fn level(&self) -> f64 {
        let from = self.tally();
        until("the load turns", async || self.best_since(&from).is_some()).await;
        self.best_since(&from).unwrap_or_default()
    }

    /// The lowest share of a second since `from`, and when it began.
    #[must_use]
    pub fn lowest(&self, from: &Tally) -> Option<(f64, u64)> {
        let heard = self.heard.lock();
        let since: Vec<&Tally> = heard
            .tallies
            .iter()
            .filter(|t| t.at_ms >= from.at_ms)
            .collect();
        let of_second = since.windows(5).filter_map(|window| {
            let share = share(window[0], window[4])?;
            Some((share, window[0].at_ms - from.at_ms))
        });
        of_second.min_by(|a, b| a.0.total_cmp(&b.0))
    }

    /// Shares second by second since `from`, as people read them.
    #[must_use]
    pub fn course(&self, from: &Tally) -> String {
        let heard = self.heard.lock();
        let since: Vec<&Tally> = heard
            .tallies
            .iter()
            .filter(|t| t.at_ms >= from.at_ms)
            .collect();
        let seconds: BTreeMap<u64, &Tally> = since
            .iter()
            .map(|tally| ((tally.at_ms - from.at_ms) / 1000, *tally))
            .collect();
        let seconds: Vec<&Tally> = seconds.into_values().collect();
        let shares = seconds
            .windows(2)
            .map(|pair| match share(pair[0], pair[1]) {
                Some(share) => format!("{:.0}", share * 100.0),
                None => "-".to_owned(),
            });
        shares.collect::<Vec<_>>().join(" ")
    }

    /// That nothing happened that must never happen.
    ///
    /// # Panics
    /// When something did.
    pub fn assert_clean(&self) {
        let (tally, offences) = (self.tally(), self.offences());
        let faults = (tally.wrong, tally.late, tally.dishonest);
        assert_eq!(faults, (0, 0, 0), "wrong, late, dishonest: {offences:#?}");
        assert!(tally.calls > 0, "it has asked");
    }
}

fn share(first: &Tally, last: &Tally) -> Option<f64> {
    let asked = last.asked.checked_sub(first.asked).filter(|n| *n > 0)?;
    Some((last.hits - first.hits) as f64 / asked as f64)
}

impl Heard {
    fn note(&mut self, line: &str) {
        match serde_json::from_str(line) {
            Ok(Said::Tally(tally)) => self.tallies.push(tally),
            Ok(Said::Audit(audit)) => self.audits.push(audit),
            Ok(Said::Stopped(_)) => self.stops += 1,
            Ok(Said::Offence(what)) => self.offences.push(what),
            Err(_) => self.offences.push(format!("it said {line:?}")),
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
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

    #[test]
    fn shares_are_of_what_was_asked_in_between() {
        let tally = |at_ms, asked, hits| Tally {
            at_ms,
            asked,
            hits,
            ..Tally::default()
        };
        let (first, last) = (tally(0, 100, 50), tally(250, 200, 140));
        assert_eq!(share(&first, &last), Some(0.9));
        assert_eq!(share(&first, &first), None);
    }
}
