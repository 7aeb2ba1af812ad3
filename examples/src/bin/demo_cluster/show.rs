//! The demonstration itself: one scene after the other.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use kvclient::{Ack, Client};
use kvexamples::model::{Decoder, ModelShape, same_bits};
use kvexamples::node::NodeOptions;
use kvexamples::prompt::{Document, HANDBOOK};
use kvexamples::reuse::Prefiller;
use kvexamples::screen::{Screen, thousands};
use kvexamples::stopwatch::Stopwatch;
use kvexamples::weights::WeightSource;
use tokio::time::{MissedTickBehavior, interval};

use crate::Arguments;
use crate::fleet::{Fleet, Tally};
use crate::report::{self, Pass, Report};

const WEIGHTS_SEED: u64 = 20_261_122;
/// Tokens of one document: whole chunks of the model, several runs.
const DOCUMENT_TOKENS: usize = 768;
/// What is asked about each, in tokens of the handbook: any will do, the weights are random.
const QUESTION_TOKENS: usize = 24;
/// A lookup or a get that waits longer than this for a dead node is given up, and the rest is computed.
const DEADLINE: Duration = Duration::from_secs(2);
/// How long the nodes may take to settle: what a death or a join costs in seconds, with much to spare for a busy machine.
const SETTLED_WITHIN: Duration = Duration::from_secs(90);
/// Passes that wait for it begin no closer together, so that a small model on a quick machine does not fill the screen.
const PASS_EVERY: Duration = Duration::from_millis(500);

/// Runs everything; true when what was to be shown was shown.
pub(crate) async fn run(arguments: &Arguments) -> anyhow::Result<bool> {
    let screen = Screen::new(arguments.json);
    let binary = match &arguments.kvserver {
        Some(path) => path.clone(),
        None => NodeOptions::binary_beside_this_program()?,
    };
    screen.say("\n  Terrace: several nodes are one service.\n");

    let watch = Stopwatch::start();
    let mut fleet = Fleet::new(binary)?;
    for name in ["a", "b", "c"] {
        fleet.add(name).await?;
    }
    fleet.settled().await?;
    screen.done(
        "three nodes started, two of them with --join, and agree on who is here",
        watch.elapsed(),
    );

    let shape = match arguments.tiny {
        true => ModelShape {
            max_tokens: ModelShape::DEMO.max_tokens,
            ..ModelShape::TINY
        },
        false => ModelShape::DEMO,
    };
    let mut theatre = Theatre::open(screen, &fleet, shape, arguments.documents as usize).await?;
    theatre.pass("cold", &fleet).await?;
    let before = theatre.pass("warm", &fleet).await?;

    let pid = fleet.kill("c")?;
    screen.broken(&format!(
        "node c killed (SIGKILL, process {pid}); requests go on"
    ));
    let watch = Stopwatch::start();
    theatre.until_settled("one node died", &fleet).await?;
    let takeover_ms = watch.ms();
    theatre.pass("its place is taken", &fleet).await?;

    let watch = Stopwatch::start();
    let pid = fleet.add("d").await?;
    screen.done(
        &format!("node d started with --join, process {pid}; requests go on"),
        watch.elapsed(),
    );
    theatre.until_settled("one node joins", &fleet).await?;
    let join_ms = watch.ms();
    let after = theatre.pass("all have moved", &fleet).await?;

    let report = Report {
        logits_identical: theatre.passes.iter().all(|pass| pass.logits_identical),
        recovered: after.reused_tokens as f64 / before.reused_tokens.max(1) as f64,
        ttft_cold_ms: theatre.passes[0].ttft_ms,
        ttft_warm_ms: after.ttft_ms,
        takeover_ms,
        join_ms,
        passes: theatre.passes,
    };
    report::show(&screen, &report)?;
    Ok(report.succeeded())
}

/// A prompt, and the logits of its first token without Terrace.
struct Prompt {
    tokens: Vec<u32>,
    /// Of them, those that lie in whole chunks and may be reused: never the last one.
    reusable: usize,
    expected: Vec<f32>,
}

struct Theatre {
    screen: Screen,
    model: Prefiller,
    prompts: Vec<Prompt>,
    passes: Vec<Pass>,
    counted: Tally,
}

impl Theatre {
    async fn open(
        screen: Screen,
        fleet: &Fleet,
        shape: ModelShape,
        documents: usize,
    ) -> anyhow::Result<Self> {
        let watch = Stopwatch::start();
        let (document, decoder) = tokio::task::spawn_blocking(move || {
            let document = Document::new(HANDBOOK, ModelShape::DEMO.vocab, usize::MAX)?;
            let decoder = Decoder::new(shape, WeightSource::new(WEIGHTS_SEED))?;
            anyhow::Ok((document, Arc::new(decoder)))
        })
        .await
        .context("a computation was cut off")??;
        let client = Client::builder(&fleet.endpoints())
            .deadline(DEADLINE)
            .connect()
            .await?;
        let run_blocks = u32::try_from(shape.chunk_blocks()).expect("a chunk has few blocks");
        let fingerprint = document.fingerprint();
        let model = Prefiller::open(decoder, client, fingerprint, WEIGHTS_SEED, run_blocks).await?;
        screen.done(
            &format!(
                "a model of {} parameters and {documents} documents of {DOCUMENT_TOKENS} tokens, {} runs of blocks each",
                thousands(shape.parameters()),
                DOCUMENT_TOKENS / shape.chunk_tokens,
            ),
            watch.elapsed(),
        );

        let watch = Stopwatch::start();
        let mut prompts = Vec::new();
        // A smaller model knows fewer tokens; any will do.
        let vocab = u32::try_from(shape.vocab).expect("a model's sizes fit in u32");
        let all: Vec<u32> = document.tokens().iter().map(|t| t % vocab).collect();
        let prompt_tokens = DOCUMENT_TOKENS + QUESTION_TOKENS;
        for tokens in all.chunks_exact(prompt_tokens).take(documents) {
            let bar = screen.bar("without Terrace", tokens.len());
            let counting = bar.clone();
            let answer = model
                .without_terrace(tokens.to_vec(), move |done| counting.inc(done as u64))
                .await?;
            bar.finish_and_clear();
            prompts.push(Prompt {
                tokens: tokens.to_vec(),
                reusable: (tokens.len() - 1) / shape.chunk_tokens * shape.chunk_tokens,
                expected: answer.logits,
            });
        }
        screen.done(
            "all prompts computed without Terrace, to compare with",
            watch.elapsed(),
        );
        Ok(Self {
            screen,
            model,
            prompts,
            passes: Vec::new(),
            counted: fleet.tally().await?,
        })
    }

    /// Asks about every document once and gives back what had to be computed.
    async fn pass(&mut self, stage: &'static str, fleet: &Fleet) -> anyhow::Result<Pass> {
        let watch = Stopwatch::start();
        let (mut reused, mut identical, mut times) = (0, true, Vec::new());
        for prompt in &self.prompts {
            let bar = self.screen.bar(stage, prompt.tokens.len());
            let counting = bar.clone();
            let progress = move |done: usize| counting.inc(done as u64);
            let answer = self
                .model
                .with_terrace(prompt.tokens.clone(), progress)
                .await?;
            bar.finish_and_clear();
            reused += answer.reused_tokens;
            identical &= same_bits(&answer.logits, &prompt.expected);
            times.push(answer.ttft.as_secs_f64() * 1e3);
            // A put that a dead node never answers costs what it would have saved, nothing else.
            let _ = self.model.save(&answer, Ack::Cached).await;
        }
        let tally = fleet.tally().await?;
        let counted = std::mem::replace(&mut self.counted, tally);
        times.sort_by(f64::total_cmp);
        let pass = Pass {
            stage,
            nodes: fleet.len(),
            requests: self.prompts.len(),
            prompt_tokens: self.prompts.iter().map(|prompt| prompt.tokens.len()).sum(),
            reused_tokens: reused,
            missed_tokens: self.prompts.iter().map(|p| p.reusable).sum::<usize>() - reused,
            fetched_blocks: tally.fetched_blocks.saturating_sub(counted.fetched_blocks),
            moved_runs: tally.moved_runs.saturating_sub(counted.moved_runs),
            ttft_ms: times[times.len() / 2],
            logits_identical: identical,
        };
        self.screen.done(
            &format!(
                "{stage}: {} tokens reused, {} computed again",
                thousands(pass.reused_tokens),
                thousands(pass.missed_tokens)
            ),
            watch.elapsed(),
        );
        self.passes.push(pass.clone());
        Ok(pass)
    }

    /// Asks again and again until the nodes agree on who is here and nothing is on its way.
    async fn until_settled(&mut self, stage: &'static str, fleet: &Fleet) -> anyhow::Result<()> {
        let watch = Stopwatch::start();
        let mut next = interval(PASS_EVERY);
        next.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while watch.elapsed() < SETTLED_WITHIN {
            next.tick().await;
            self.pass(stage, fleet).await?;
            if fleet.agrees().await? && self.counted.waiting_runs == 0 {
                return Ok(());
            }
        }
        anyhow::bail!("{stage}: the nodes have not settled within {SETTLED_WITHIN:?}")
    }
}
