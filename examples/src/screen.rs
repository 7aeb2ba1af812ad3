//! What a demonstration says: steps while it runs, tables, bars; or, for machines, one JSON object and nothing else.
//!
//! Standard output carries the story, or with `--json` the object alone; bars go to standard error, and only to a
//! terminal. Times in milliseconds, sizes in tokens and bytes. Errors: none; what cannot be coloured is plain.

use std::io::{IsTerminal, stdout};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Where words go.
#[derive(Debug, Clone, Copy)]
pub struct Screen {
    json: bool,
    colour: bool,
}

impl Screen {
    /// `json`: the story is left out, so that the object stands alone on standard output.
    pub fn new(json: bool) -> Self {
        let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self {
            json,
            colour: !plain && stdout().is_terminal(),
        }
    }

    /// Whether a machine reads.
    pub fn is_json(&self) -> bool {
        self.json
    }

    /// A line of the story.
    #[allow(clippy::print_stdout, reason = "a program for people prints")]
    pub fn say(&self, text: &str) {
        if !self.json {
            println!("{text}");
        }
    }

    /// A step that is done, with its duration.
    pub fn done(&self, what: &str, took: Duration) {
        let tick = self.paint("32", "✓");
        let took = self.paint("2", &time(took.as_secs_f64() * 1e3));
        self.say(&format!("  {tick} {what}  {took}"));
    }

    /// Something that was broken on purpose.
    pub fn broken(&self, what: &str) {
        let cross = self.paint("31", "✗");
        self.say(&format!("  {cross} {what}"));
    }

    /// A bar of so many tokens on standard error; hidden where nobody looks.
    pub fn bar(&self, what: &str, tokens: usize) -> ProgressBar {
        let bar = ProgressBar::with_draw_target(Some(tokens as u64), ProgressDrawTarget::stderr());
        let style = ProgressStyle::with_template("    {msg:<44} {bar:24} {pos:>5}/{len} tokens")
            .expect("a constant template that was tried");
        bar.set_style(style.progress_chars("━╸─"));
        bar.set_message(shorten(what, 44));
        bar
    }

    /// `text` in an ANSI colour, where colours are seen.
    pub fn paint(&self, code: &str, text: &str) -> String {
        if self.colour {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }
}

/// Lines of a table: its head, a rule, its rows, a rule. Columns marked `left` are flush left, others flush right.
pub fn table<const N: usize>(
    head: [&str; N],
    left: [bool; N],
    rows: &[[String; N]],
) -> Vec<String> {
    let head = head.map(str::to_owned);
    let width: [usize; N] = std::array::from_fn(|column| {
        let cells = rows.iter().chain([&head]);
        let widths = cells.map(|row| row[column].chars().count());
        widths.max().unwrap_or(0)
    });
    let line = |row: &[String; N]| {
        let padded = row
            .iter()
            .zip(width)
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
    let rule = "─".repeat(width.iter().sum::<usize>() + 2 * (N - 1));
    let mut lines = vec![line(&head), rule.clone()];
    lines.extend(rows.iter().map(line));
    lines.push(rule);
    lines
}

/// "312 ms" or "5.61 s": three figures, whatever the size.
pub fn time(ms: f64) -> String {
    match ms {
        ms if ms < 10.0 => format!("{ms:.1} ms"),
        ms if ms < 1000.0 => format!("{ms:.0} ms"),
        ms => format!("{:.2} s", ms / 1e3),
    }
}

/// "4 141".
pub fn thousands(number: usize) -> String {
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
pub fn size(bytes: usize) -> String {
    match bytes {
        bytes if bytes < 1 << 20 => format!("{} KiB", bytes >> 10),
        bytes => format!("{} MiB", bytes >> 20),
    }
}

/// The first `limit` characters, with an ellipsis for what is left out.
pub fn shorten(text: &str, limit: usize) -> String {
    if text.chars().count() <= limit {
        return text.to_owned();
    }
    let head: String = text.chars().take(limit - 1).collect();
    format!("{}…", head.trim_end())
}

#[cfg(test)]
mod tests {
    use super::{shorten, size, table, thousands, time};

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
        let rows = [
            ["Wörter mit Umlauten und — Strichen?", "0"],
            ["short", "4 096"],
        ];
        let rows = rows.map(|row| row.map(str::to_owned));
        let lines = table(["question", "reused"], [true, false], &rows);
        let end = |line: &String| line.chars().count();
        assert_eq!(end(&lines[2]), end(&lines[3]));
        assert_eq!(end(&lines[1]), end(&lines[4]));
    }
}
