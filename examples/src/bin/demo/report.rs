//! The outcome of the demonstration: one row per request, what it means, and what to try next.
//!
//! Times in milliseconds, sizes in tokens and bytes.

use kvexamples::screen::{Screen, shorten, table, thousands, time};
use serde::Serialize;

/// One request, as it was answered with Terrace and as it is without.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Row {
    /// What was asked.
    pub(crate) question: String,
    /// "cold", "warm_ram" or "warm_nvme": what this request is there to show.
    pub(crate) stage: &'static str,
    /// Tokens of the prompt.
    pub(crate) prompt_tokens: usize,
    /// Tokens that the model computed.
    pub(crate) prefilled_tokens: usize,
    /// Tokens whose keys and values came from Terrace.
    pub(crate) reused_tokens: usize,
    /// Where from: "computed", "RAM", "NVMe", or several with a plus between.
    pub(crate) source: String,
    /// Time to first token with Terrace: hash, lookup, get, import, prefill of the rest.
    pub(crate) ttft_ms: f64,
    /// Of it: lookup and get.
    pub(crate) fetch_ms: f64,
    /// Time to first token of the same prompt without Terrace.
    pub(crate) ttft_without_ms: f64,
    /// Steps whose logits were compared: the first token and those after it.
    pub(crate) compared_steps: usize,
    /// All of them equal bit for bit.
    pub(crate) logits_identical: bool,
    /// Why Terrace could not help with all it might have; absent when it could.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) trouble: Option<String>,
}

/// The outcome of the whole demonstration.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// First request: nothing to reuse.
    pub(crate) ttft_cold_ms: f64,
    /// Median of the requests that found their prefix in RAM.
    pub(crate) ttft_warm_ram_ms: f64,
    /// The request after SIGKILL and restart.
    pub(crate) ttft_warm_nvme_ms: f64,
    /// Warm over cold.
    pub(crate) ratio_ram: f64,
    /// Warm over cold.
    pub(crate) ratio_nvme: f64,
    /// Fewest tokens that a warm request reused.
    pub(crate) reused_tokens: usize,
    /// Every request's logits equal a run without Terrace, bit for bit.
    pub(crate) logits_identical: bool,
    /// Tokens of preamble and document, which all prompts share.
    pub(crate) document_tokens: usize,
    /// Parameters of the model.
    pub(crate) model_parameters: usize,
    /// Tokens of a block, and of a prefill step.
    pub(crate) block_tokens: usize,
    pub(crate) chunk_tokens: usize,
    /// Bytes of a block, and of all blocks put after the first request.
    pub(crate) block_bytes: usize,
    pub(crate) stored_bytes: usize,
    /// From the first put until all blocks were answered `stored`.
    pub(crate) store_ms: f64,
    /// From the start of the second node until it accepted connections.
    pub(crate) restart_ms: f64,
    /// Every request, in order.
    pub(crate) requests: Vec<Row>,
}

impl Report {
    /// True when the demonstration showed what it is there to show.
    pub(crate) fn succeeded(&self) -> bool {
        self.logits_identical && self.reused_tokens > 0
    }
}

/// The table, what it means, and what to try next; or the object.
pub(crate) fn show(screen: &Screen, report: &Report) -> anyhow::Result<()> {
    if screen.is_json() {
        println!("{}", serde_json::to_string(report)?);
        return Ok(());
    }
    screen.say("");
    for line in requests(&report.requests) {
        screen.say(&format!("  {}", highlight(screen, &line)));
    }
    screen.say("");
    screen.say(&conclusion(screen, report));
    for row in report.requests.iter().filter(|row| row.trouble.is_some()) {
        let trouble = row.trouble.as_deref().unwrap_or_default();
        screen.say(&format!(
            "  note, request {:?}: {trouble}",
            shorten(&row.question, 40)
        ));
    }
    if report.succeeded() {
        screen.say(NEXT);
    }
    Ok(())
}

fn conclusion(screen: &Screen, report: &Report) -> String {
    let verdict = if report.logits_identical {
        screen.paint(
            "32",
            "Every logit is bit-identical to a run without Terrace.",
        )
    } else {
        screen.paint(
            "31",
            "Logits DIFFER from a run without Terrace: a wrong byte. Please report this.",
        )
    };
    format!(
        "  First token: {} cold, {} warm from RAM ({:.1} x sooner), {} warm from NVMe ({:.1} x sooner)\n  \
         after the node was killed. {verdict}\n  \
         The weights are random, so the answers mean nothing. The tokens, the bytes and the times are real.",
        time(report.ttft_cold_ms),
        time(report.ttft_warm_ram_ms),
        1.0 / report.ratio_ram,
        time(report.ttft_warm_nvme_ms),
        1.0 / report.ratio_nvme,
    )
}

fn highlight(screen: &Screen, line: &str) -> String {
    let line = line.replace("identical", &screen.paint("32", "identical"));
    line.replace("DIFFERENT", &screen.paint("31", "DIFFERENT"))
}

const NEXT: &str = "
  Next:
    make demo ARGS='--document FILE'            the same with a text of yours
    make demo ARGS='--question \"...\"'           and your own questions
    make demo ARGS=--json                       for machines
    cargo run --release -p kvexamples --example quickstart
    less examples/src/reuse.rs                  how an engine does this
    less docs/handbook.md                       the document that was just read";

fn requests(rows: &[Row]) -> Vec<String> {
    let head = [
        "",
        "question",
        "prefilled",
        "reused",
        "from",
        "first token",
        "without",
        "logits",
    ];
    let left = [false, true, false, false, true, false, false, true];
    let cells = rows.iter().enumerate().map(|(index, row)| {
        let logits = if row.logits_identical {
            "identical"
        } else {
            "DIFFERENT"
        };
        [
            (index + 1).to_string(),
            shorten(&row.question, 40),
            thousands(row.prefilled_tokens),
            thousands(row.reused_tokens),
            row.source.clone(),
            time(row.ttft_ms),
            time(row.ttft_without_ms),
            logits.to_owned(),
        ]
    });
    table(head, left, &cells.collect::<Vec<_>>())
}
