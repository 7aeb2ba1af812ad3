//! What the demonstration says: steps while it runs, one table at the end, or one JSON object.
//!
//! Standard output carries the story, or with `--json` the object alone; bars go to standard error,
//! and only to a terminal. Times in milliseconds, sizes in tokens and bytes.

use std::io::{IsTerminal, stdout};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
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

/// Where words go.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Screen {
    json: bool,
    colour: bool,
}

impl Screen {
    /// `json`: only the object goes to standard output.
    pub(crate) fn new(json: bool) -> Self {
        let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self {
            json,
            colour: !plain && stdout().is_terminal(),
        }
    }

    /// A line of the story.
    pub(crate) fn say(&self, text: &str) {
        if !self.json {
            println!("{text}");
        }
    }

    /// A step that is done, with its duration.
    pub(crate) fn done(&self, what: &str, took: Duration) {
        let tick = self.paint("32", "✓");
        let took = self.paint("2", &time(took.as_secs_f64() * 1e3));
        self.say(&format!("  {tick} {what}  {took}"));
    }

    /// A bar of so many tokens on standard error; hidden where nobody looks.
    pub(crate) fn bar(&self, what: &str, tokens: usize) -> ProgressBar {
        let bar = ProgressBar::with_draw_target(Some(tokens as u64), ProgressDrawTarget::stderr());
        let style = ProgressStyle::with_template("    {msg:<44} {bar:24} {pos:>5}/{len} tokens")
            .expect("a constant template that was tried");
        bar.set_style(style.progress_chars("━╸─"));
        bar.set_message(shorten(what, 44));
        bar
    }

    /// The table, what it means, and what to try next; or the object.
    pub(crate) fn show(&self, report: &Report) -> anyhow::Result<()> {
        if self.json {
            println!("{}", serde_json::to_string(report)?);
            return Ok(());
        }
        self.say("");
        for line in table(&report.requests) {
            self.say(&format!("  {}", self.highlight(&line)));
        }
        self.say("");
        self.say(&self.conclusion(report));
        for row in report.requests.iter().filter(|row| row.trouble.is_some()) {
            let trouble = row.trouble.as_deref().unwrap_or_default();
            self.say(&format!(
                "  note, request {:?}: {trouble}",
                shorten(&row.question, 40)
            ));
        }
        if report.succeeded() {
            self.say(NEXT);
        }
        Ok(())
    }

    fn conclusion(&self, report: &Report) -> String {
        let verdict = if report.logits_identical {
            self.paint(
                "32",
                "Every logit is bit-identical to a run without Terrace.",
            )
        } else {
            self.paint(
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

    fn highlight(&self, line: &str) -> String {
        let line = line.replace("identical", &self.paint("32", "identical"));
        line.replace("DIFFERENT", &self.paint("31", "DIFFERENT"))
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }
}

const NEXT: &str = "
  Next:
    make demo ARGS='--document FILE'            the same with a text of yours
    make demo ARGS='--question \"...\"'           and your own questions
    make demo ARGS=--json                       for machines
    cargo run --release -p kvexamples --example quickstart
    less examples/src/reuse.rs                  how an engine does this
    less docs/handbook.md                       the document that was just read";

fn table(rows: &[Row]) -> Vec<String> {
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
    let mut cells = vec![head.map(str::to_owned)];
    cells.extend(rows.iter().enumerate().map(|(index, row)| {
        [
            (index + 1).to_string(),
            shorten(&row.question, 40),
            thousands(row.prefilled_tokens),
            thousands(row.reused_tokens),
            row.source.clone(),
            time(row.ttft_ms),
            time(row.ttft_without_ms),
            if row.logits_identical {
                "identical"
            } else {
                "DIFFERENT"
            }
            .to_owned(),
        ]
    }));
    let left = [false, true, false, false, true, false, false, true];
    let width: Vec<usize> = (0..head.len())
        .map(|column| {
            cells
                .iter()
                .map(|row| row[column].chars().count())
                .max()
                .unwrap_or(0)
        })
        .collect();
    let line = |row: &[String; 8]| {
        let padded = row
            .iter()
            .zip(&width)
            .zip(left)
            .map(|((cell, width), left)| {
                if left {
                    format!("{cell:<width$}")
                } else {
                    format!("{cell:>width$}")
                }
            });
        padded.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    let rule = "─".repeat(width.iter().sum::<usize>() + 2 * (width.len() - 1));
    let mut lines = vec![line(&cells[0]), rule.clone()];
    lines.extend(cells[1..].iter().map(line));
    lines.push(rule);
    lines
}

/// "312 ms" or "5.61 s": three figures, whatever the size.
pub(crate) fn time(ms: f64) -> String {
    match ms {
        ms if ms < 10.0 => format!("{ms:.1} ms"),
        ms if ms < 1000.0 => format!("{ms:.0} ms"),
        ms => format!("{:.2} s", ms / 1e3),
    }
}

/// "4 141".
pub(crate) fn thousands(number: usize) -> String {
    let digits = number.to_string();
    let groups: Vec<&str> = digits
        .as_bytes()
        .rchunks(3)
        .rev()
        .map(|group| std::str::from_utf8(group).expect("digits are ASCII"))
        .collect();
    groups.join(" ")
}

/// "512 KiB", "32 MiB": blocks are whole numbers of either.
pub(crate) fn size(bytes: usize) -> String {
    match bytes {
        bytes if bytes < 1 << 20 => format!("{} KiB", bytes >> 10),
        bytes => format!("{} MiB", bytes >> 20),
    }
}

fn shorten(text: &str, limit: usize) -> String {
    if text.chars().count() <= limit {
        return text.to_owned();
    }
    let head: String = text.chars().take(limit - 1).collect();
    format!("{}…", head.trim_end())
}

#[cfg(test)]
mod tests {
    use super::{Row, shorten, size, table, thousands, time};

    #[test]
    fn numbers_read_well() {
        assert_eq!(thousands(0), "0");
        assert_eq!(thousands(999), "999");
        assert_eq!(thousands(4096), "4 096");
        assert_eq!(thousands(1_234_567), "1 234 567");
        assert_eq!(time(3.21), "3.2 ms");
        assert_eq!(time(312.4), "312 ms");
        assert_eq!(time(5612.0), "5.61 s");
        assert_eq!(size(512 << 10), "512 KiB");
        assert_eq!(size(32 << 20), "32 MiB");
        assert_eq!(shorten("a question that goes on", 12), "a question…");
    }

    #[test]
    fn columns_line_up_whatever_they_hold() {
        let row = |question: &str, reused| Row {
            question: question.to_owned(),
            stage: "cold",
            prompt_tokens: 4141,
            prefilled_tokens: 4141 - reused,
            reused_tokens: reused,
            source: "RAM".to_owned(),
            ttft_ms: 5600.0,
            fetch_ms: 1.0,
            ttft_without_ms: 99.0,
            compared_steps: 8,
            logits_identical: true,
            trouble: None,
        };
        let lines = table(&[
            row("Wörter mit Umlauten und — Strichen?", 0),
            row("short", 4096),
        ]);
        let end = |line: &String| line.chars().count();
        assert_eq!(end(&lines[2]), end(&lines[3]));
        assert_eq!(end(&lines[1]), end(&lines[4]));
    }
}
