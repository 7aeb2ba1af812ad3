//! The outcome: one row per pass over the documents, what it means, and what to try next.
//!
//! Times in milliseconds, sizes in tokens, blocks and runs.

use kvexamples::screen::{Screen, table, thousands, time};
use serde::Serialize;

/// One pass over all documents.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Pass {
    /// What had just happened.
    pub(crate) stage: &'static str,
    /// Nodes that ran.
    pub(crate) nodes: usize,
    /// Requests answered.
    pub(crate) requests: usize,
    /// Tokens of their prompts.
    pub(crate) prompt_tokens: usize,
    /// Tokens whose keys and values came from Terrace.
    pub(crate) reused_tokens: usize,
    /// Tokens of the documents that had to be computed: what was missed.
    pub(crate) missed_tokens: usize,
    /// Blocks that a new owner fetched from the one before.
    pub(crate) fetched_blocks: u64,
    /// Runs handed over to a new owner.
    pub(crate) moved_runs: u64,
    /// Median time to first token.
    pub(crate) ttft_ms: f64,
    /// Every request's logits equal those of a run without Terrace, bit for bit.
    pub(crate) logits_identical: bool,
}

/// The outcome of the whole demonstration.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// Every pass, in order.
    pub(crate) passes: Vec<Pass>,
    /// Every request's logits were right.
    pub(crate) logits_identical: bool,
    /// Tokens reused by the last pass over those reused before any node died.
    pub(crate) recovered: f64,
    /// Median time to first token: nothing to reuse.
    pub(crate) ttft_cold_ms: f64,
    /// Median time to first token of the last pass.
    pub(crate) ttft_warm_ms: f64,
    /// From SIGKILL until the others had taken over its place.
    pub(crate) takeover_ms: f64,
    /// From the start of the last node until it had its full share.
    pub(crate) join_ms: f64,
}

impl Report {
    /// True when the demonstration showed what it is there to show.
    pub(crate) fn succeeded(&self) -> bool {
        self.logits_identical && self.recovered >= 1.0
    }
}

/// The table, what it means, and what to try next; or the object.
pub(crate) fn show(screen: &Screen, report: &Report) -> anyhow::Result<()> {
    if screen.is_json() {
        println!("{}", serde_json::to_string(report)?);
        return Ok(());
    }
    screen.say("");
    for line in lines(&report.passes) {
        screen.say(&format!("  {line}"));
    }
    let verdict = match report.logits_identical {
        true => screen.paint(
            "32",
            "Every logit, those given while a node died included, is bit-identical to a run without Terrace.",
        ),
        false => screen.paint(
            "31",
            "Logits DIFFER from a run without Terrace: a wrong byte. Please report this.",
        ),
    };
    screen.say(&format!(
        "\n  First token: {} cold, {} warm. The killed node's place was taken over after {}; the new one had its share\n  \
         after {}. {verdict}",
        time(report.ttft_cold_ms),
        time(report.ttft_warm_ms),
        time(report.takeover_ms),
        time(report.join_ms),
    ));
    if report.succeeded() {
        screen.say(NEXT);
    }
    Ok(())
}

const NEXT: &str = "
  Next:
    kvserver --listen 127.0.0.1:7070                            a node
    kvserver --listen 127.0.0.1:7080 --http-listen 127.0.0.1:7081 \\
             --data-dir /tmp/second --join 127.0.0.1:7070       a second one, and so on
    kvctl cluster                                               who is here and what is on its way
    less docs/placement.md                                      why hashing, and what it costs";

fn lines(passes: &[Pass]) -> Vec<String> {
    let head = [
        "",
        "nodes",
        "asked",
        "reused",
        "missed",
        "re-fetched",
        "moved",
        "first token",
        "logits",
    ];
    let left = [true, false, false, false, false, false, false, false, true];
    let rows = stages(passes).into_iter().map(|pass| {
        let logits = match pass.logits_identical {
            true => "identical",
            false => "DIFFERENT",
        };
        [
            match pass.requests / passes[0].requests {
                1 => pass.stage.to_owned(),
                times => format!("{} ({times} passes)", pass.stage),
            },
            pass.nodes.to_string(),
            thousands(pass.prompt_tokens),
            thousands(pass.reused_tokens),
            thousands(pass.missed_tokens),
            format!("{} blocks", pass.fetched_blocks),
            format!("{} runs", pass.moved_runs),
            time(pass.ttft_ms),
            logits.to_owned(),
        ]
    });
    table(head, left, &rows.collect::<Vec<_>>())
}

/// Passes that follow each other in one stage as one row.
fn stages(passes: &[Pass]) -> Vec<Pass> {
    let mut rows: Vec<Pass> = Vec::new();
    let mut times = Vec::new();
    for pass in passes {
        match rows.last_mut().filter(|row| row.stage == pass.stage) {
            None => {
                times = vec![pass.ttft_ms];
                rows.push(pass.clone());
            }
            Some(row) => {
                row.requests += pass.requests;
                row.prompt_tokens += pass.prompt_tokens;
                row.reused_tokens += pass.reused_tokens;
                row.missed_tokens += pass.missed_tokens;
                row.fetched_blocks += pass.fetched_blocks;
                row.moved_runs += pass.moved_runs;
                row.logits_identical &= pass.logits_identical;
                times.push(pass.ttft_ms);
                times.sort_by(f64::total_cmp);
                row.ttft_ms = times[times.len() / 2];
            }
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::{Pass, lines};

    #[test]
    fn passes_of_one_stage_are_one_row_and_nothing_of_them_is_left_out() {
        let pass = |stage, missed, logits_identical| Pass {
            stage,
            nodes: 3,
            requests: 2,
            prompt_tokens: 100,
            reused_tokens: 96 - missed,
            missed_tokens: missed,
            fetched_blocks: 1,
            moved_runs: 2,
            ttft_ms: 5.0,
            logits_identical,
        };
        let passes = [
            pass("warm", 0, true),
            pass("joins", 10, true),
            pass("joins", 0, false),
            pass("joins", 1, true),
        ];
        let lines = lines(&passes);
        assert_eq!(lines.len(), 5, "{lines:#?}");
        let joins = &lines[3];
        for cell in [
            "joins (3 passes)",
            " 300 ",
            " 277 ",
            " 11 ",
            "3 blocks",
            "6 runs",
            "DIFFERENT",
        ] {
            assert!(joins.contains(cell), "{cell}: {joins}");
        }
    }
}
