//! The demonstration itself: one scene after the other.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context;
use indicatif::ProgressBar;
use kvclient::{Ack, Client};
use kvexamples::model::{Decoder, ModelShape, same_bits};
use kvexamples::node::{ANY_PORT, NodeOptions, NodeProcess};
use kvexamples::prompt::{Document, HANDBOOK};
use kvexamples::reuse::{Answer, Prefiller, RUN_BLOCKS};
use kvexamples::screen::{Screen, size, thousands};
use kvexamples::stopwatch::Stopwatch;
use kvexamples::weights::WeightSource;
use tempfile::TempDir;

use crate::Arguments;
use crate::report::{self, Report, Row};

/// Tokens written after the first; their logits are compared too, because they read all of the
/// cache again, the imported part included.
const MORE_TOKENS: usize = 7;
const WEIGHTS_SEED: u64 = 20_261_122;
/// Plenty for one document and small enough for any machine.
const RAM_BYTES: u64 = 512 << 20;
const NVME_BYTES: u64 = 1 << 30;

const ABOUT_THE_HANDBOOK: [&str; 4] = [
    "What is a lease, and for how long does it live?",
    "Which blocks leave first when RAM is full?",
    "How many bytes does one token need?",
    "What is lost when the node is killed?",
];
const ABOUT_ANYTHING: [&str; 4] = [
    "What is this text about?",
    "Who should read it first?",
    "Which number in it matters most?",
    "What would you ask its author?",
];

/// Runs everything; true when what was to be shown was shown.
pub(crate) async fn run(arguments: &Arguments) -> anyhow::Result<bool> {
    let screen = Screen::new(arguments.json);
    let binary = match &arguments.kvserver {
        Some(path) => path.clone(),
        None => NodeOptions::binary_beside_this_program()?,
    };
    let (document, questions) = read(arguments)?;
    let folders = Folders::new(arguments.data_dir.as_deref())?;

    screen.say("\n  Terrace: what was computed once is not computed again.\n");
    let watch = Stopwatch::start();
    let tokens = arguments.tokens as usize;
    let document =
        blocking(move || Document::new(&document, ModelShape::DEMO.vocab, tokens)).await?;
    screen.done(
        &format!(
            "tokenizer trained on the document: {} tokens in its vocabulary, {} in the shared prompt",
            thousands(document.vocab()),
            thousands(document.tokens().len())
        ),
        watch.elapsed(),
    );

    let watch = Stopwatch::start();
    let shape = ModelShape::DEMO;
    let decoder =
        blocking(move || Ok(Decoder::new(shape, WeightSource::new(WEIGHTS_SEED))?)).await?;
    let decoder = Arc::new(decoder);
    screen.done(
        &format!(
            "model made: {} M parameters, {} layers, {} query and {} KV heads, {} per block of {} tokens",
            shape.parameters() / 1_000_000,
            shape.layers,
            shape.heads,
            shape.kv_heads,
            size(shape.block_bytes()),
            shape.block_tokens
        ),
        watch.elapsed(),
    );

    let options = NodeOptions {
        binary,
        data_dir: folders.data.clone(),
        socket: folders.socket.clone(),
        ram_bytes: RAM_BYTES,
        nvme_bytes: NVME_BYTES,
        listen: ANY_PORT,
        http_listen: ANY_PORT,
        flags: Vec::new(),
    };
    let watch = Stopwatch::start();
    let node = NodeProcess::start(options).await?;
    screen.done(
        &format!(
            "node started, process {}, blocks in {}",
            node.pid(),
            folders.data.display()
        ),
        watch.elapsed(),
    );

    let client = Client::connect(&node.endpoint()).await?;
    let model = Prefiller::open(
        decoder,
        client,
        document.fingerprint(),
        WEIGHTS_SEED,
        RUN_BLOCKS,
    )
    .await?;
    let mut theatre = Theatre {
        screen,
        document,
        model,
        rows: Vec::new(),
    };
    theatre.warm_up().await?;
    let (last, warm) = questions[1..]
        .split_last()
        .expect("three questions at least");

    let cold = theatre.ask(&questions[0], "cold").await?;
    let saved = theatre.model.save(&cold, Ack::Stored).await?;
    theatre.screen.done(
        &format!(
            "{} blocks, {}, answered stored: they would survive a kill",
            saved.stored,
            size(saved.bytes)
        ),
        saved.took,
    );
    for question in warm {
        theatre.ask(question, "warm_ram").await?;
    }

    let pid = node.pid();
    let options = node.kill()?;
    theatre.screen.broken(&format!(
        "node killed (SIGKILL, process {pid}): its RAM is gone"
    ));
    let watch = Stopwatch::start();
    let node = NodeProcess::start(options).await?;
    theatre.model.reach().await?;
    let restart_ms = watch.ms();
    theatre.screen.done(
        &format!(
            "node started again on the same folder, process {}",
            node.pid()
        ),
        watch.elapsed(),
    );
    theatre.ask(last, "warm_nvme").await?;

    let report = theatre.report(saved.bytes, saved.took.as_secs_f64() * 1e3, restart_ms);
    report::show(&screen, &report)?;
    Ok(report.succeeded())
}

/// The document's text, and at least three questions about it.
fn read(arguments: &Arguments) -> anyhow::Result<(String, Vec<String>)> {
    let (text, stock) = match &arguments.document {
        None => (HANDBOOK.to_owned(), ABOUT_THE_HANDBOOK),
        Some(path) => {
            let text = fs::read_to_string(path)
                .with_context(|| format!("cannot read {}", path.display()))?;
            (text, ABOUT_ANYTHING)
        }
    };
    let mut questions = arguments.questions.clone();
    let wanted = if questions.is_empty() { stock.len() } else { 3 };
    for question in stock {
        if questions.len() < wanted {
            questions.push(question.to_owned());
        }
    }
    Ok((text, questions))
}

/// Where the node lives while the demonstration runs.
struct Folders {
    data: PathBuf,
    socket: PathBuf,
    /// Removed with everything in them when dropped.
    _temporary: Vec<TempDir>,
}

impl Folders {
    fn new(data_dir: Option<&Path>) -> anyhow::Result<Self> {
        let socket = tempfile::Builder::new()
            .prefix("terrace-")
            .tempdir()
            .context("cannot make a folder for the socket")?;
        let path = socket.path().join("node.sock");
        if let Some(data) = data_dir {
            let data = std::path::absolute(data).context("cannot use the data folder")?;
            return Ok(Self {
                data,
                socket: path,
                _temporary: vec![socket],
            });
        }
        // Beside the binary and not in /tmp, which is memory on many machines: NVMe should be a disk.
        let program = std::env::current_exe().ok();
        let data = program
            .as_deref()
            .and_then(Path::parent)
            .and_then(|folder| {
                tempfile::Builder::new()
                    .prefix("terrace-demo-")
                    .tempdir_in(folder)
                    .ok()
            })
            .map_or_else(tempfile::tempdir, Ok)
            .context("cannot make a folder for the node")?;
        Ok(Self {
            data: data.path().to_owned(),
            socket: path,
            _temporary: vec![socket, data],
        })
    }
}

struct Theatre {
    screen: Screen,
    document: Document,
    model: Prefiller,
    rows: Vec<Row>,
}

impl Theatre {
    /// One chunk, unmeasured: threads, caches and the allocator are in use before the first figure.
    async fn warm_up(&self) -> anyhow::Result<()> {
        let tokens = self.document.tokens()[..ModelShape::DEMO.chunk_tokens].to_vec();
        self.model.without_terrace(tokens, |_| {}).await?;
        Ok(())
    }

    /// Asks with Terrace and without, compares, and keeps the row.
    async fn ask(&mut self, question: &str, stage: &'static str) -> anyhow::Result<Answer> {
        let prompt = self.document.ask(question)?;
        let bar = self.screen.bar(question, prompt.len());
        let answer = self
            .model
            .with_terrace(prompt.clone(), ticking(&bar))
            .await?;
        bar.finish_and_clear();
        let bar = self.screen.bar("the same without Terrace", prompt.len());
        let reference = self
            .model
            .without_terrace(prompt.clone(), ticking(&bar))
            .await?;
        bar.finish_and_clear();

        let (answer, logits) = self.model.go_on(answer, MORE_TOKENS).await?;
        let (reference, expected) = self.model.go_on(reference, MORE_TOKENS).await?;
        let identical = logits.len() == expected.len()
            && logits
                .iter()
                .zip(&expected)
                .all(|(left, right)| same_bits(left, right));
        self.rows.push(Row {
            question: question.to_owned(),
            stage,
            prompt_tokens: prompt.len(),
            prefilled_tokens: prompt.len() - answer.reused_tokens,
            reused_tokens: answer.reused_tokens,
            source: answer.source(),
            ttft_ms: answer.ttft.as_secs_f64() * 1e3,
            fetch_ms: answer.fetch.as_secs_f64() * 1e3,
            ttft_without_ms: reference.ttft.as_secs_f64() * 1e3,
            compared_steps: logits.len(),
            logits_identical: identical,
            trouble: answer.trouble.clone(),
        });
        self.screen.done(
            &format!(
                "asked {:?}: {} tokens prefilled, {} reused ({})",
                question,
                thousands(prompt.len() - answer.reused_tokens),
                thousands(answer.reused_tokens),
                answer.source()
            ),
            answer.ttft,
        );
        Ok(answer)
    }

    fn report(self, stored_bytes: usize, store_ms: f64, restart_ms: f64) -> Report {
        let shape = ModelShape::DEMO;
        let times = |stage| {
            let rows = self.rows.iter().filter(move |row| row.stage == stage);
            median(rows.map(|row| row.ttft_ms).collect())
        };
        let (cold, ram, nvme) = (times("cold"), times("warm_ram"), times("warm_nvme"));
        let warm = self.rows.iter().filter(|row| row.stage != "cold");
        Report {
            ttft_cold_ms: cold,
            ttft_warm_ram_ms: ram,
            ttft_warm_nvme_ms: nvme,
            ratio_ram: ram / cold,
            ratio_nvme: nvme / cold,
            reused_tokens: warm.map(|row| row.reused_tokens).min().unwrap_or(0),
            logits_identical: self.rows.iter().all(|row| row.logits_identical),
            document_tokens: self.document.tokens().len(),
            model_parameters: shape.parameters(),
            block_tokens: shape.block_tokens,
            chunk_tokens: shape.chunk_tokens,
            block_bytes: shape.block_bytes(),
            stored_bytes,
            store_ms,
            restart_ms,
            requests: self.rows,
        }
    }
}

fn ticking(bar: &ProgressBar) -> impl FnMut(usize) + Send + 'static {
    let bar = bar.clone();
    move |tokens| bar.inc(tokens as u64)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        count if count % 2 == 1 => values[count / 2],
        count => (values[count / 2 - 1] + values[count / 2]) / 2.0,
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .context("a computation was cut off")?
}
