//! What all commands share: the node, the output, the words for an error.

use std::{
    io::{self, IsTerminal, Write},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use kvclient::{
    Client, ClientBuilder, Error, ErrorKind, Namespace, NamespaceHandle, Reason,
    clock::{Clock, SystemClock},
};
use serde::Serialize;

/// Flags of every command.
#[derive(Args, Clone, Debug)]
pub(crate) struct Global {
    /// The node: host:port or unix:/path
    #[arg(
        long,
        short = 'e',
        global = true,
        env = "TERRACE_ENDPOINT",
        default_value = "127.0.0.1:7070"
    )]
    pub(crate) endpoint: String,
    /// Credential, where the node asks for one
    #[arg(long, global = true, env = "TERRACE_TOKEN", hide_env_values = true)]
    token: Option<String>,
    /// How long one call may take
    #[arg(long, global = true, default_value = "5s")]
    deadline: humantime::Duration,
    /// Print one JSON object instead of text
    #[arg(long, global = true)]
    json: bool,
}

/// Where keys are kept unless another namespace is named.
pub(crate) const DEFAULT_NAMESPACE: &str = "kvctl";

/// Flags of the commands that work in a namespace.
#[derive(Args, Clone, Debug)]
pub(crate) struct InNamespace {
    /// Label of the namespace, or its id
    #[arg(long, short = 'n', default_value = DEFAULT_NAMESPACE)]
    pub(crate) namespace: String,
}

/// Flags of the commands that make a namespace.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct Copies {
    /// Members of the cluster that keep each run of the namespace, from now on and for whoever uses it; as it is, if
    /// left out
    #[arg(long, value_name = "1-8", value_parser = clap::value_parser!(u32).range(1..=8))]
    replicas: Option<u32>,
}

/// Tokens per block and blocks per run of the namespaces that kvctl makes; keys are no tokens, so the
/// numbers only have to be the same every time.
const BLOCK_TOKENS: u32 = 16;
const RUN_BLOCKS: u32 = 64;

/// The shape of the namespaces that kvctl makes.
pub(crate) fn own_shape(label: &str) -> Namespace {
    Namespace::opaque(label, BLOCK_TOKENS, RUN_BLOCKS)
}

/// What a command runs with.
pub(crate) struct Context {
    global: Global,
    pub(crate) clock: Arc<dyn Clock>,
}

impl Context {
    pub(crate) fn new(global: Global) -> Self {
        Self {
            global,
            clock: Arc::new(SystemClock::new()),
        }
    }

    pub(crate) fn endpoint(&self) -> &str {
        &self.global.endpoint
    }

    /// How long one call may take.
    pub(crate) fn deadline(&self) -> Duration {
        self.global.deadline.into()
    }

    /// The credential, where there is one.
    pub(crate) fn token(&self) -> Option<&str> {
        self.global.token.as_deref()
    }

    pub(crate) fn is_json(&self) -> bool {
        self.global.json
    }

    /// Settings for a client of `endpoint`.
    pub(crate) fn builder(&self, endpoint: &str) -> ClientBuilder {
        let builder = Client::builder(endpoint)
            .deadline(self.global.deadline.into())
            .clock(self.clock.clone());
        match &self.global.token {
            Some(token) => builder.token(token),
            None => builder,
        }
    }

    /// A client of the node.
    pub(crate) async fn connect(&self) -> Result<Client> {
        self.connect_to(&self.global.endpoint).await
    }

    pub(crate) async fn connect_to(&self, endpoint: &str) -> Result<Client> {
        Ok(self.builder(endpoint).connect().await?)
    }

    /// A namespace in which kvctl keeps keys; it is made if there is none.
    pub(crate) async fn open(&self, client: &Client, label: &str) -> Result<NamespaceHandle> {
        self.open_with(client, label, Copies { replicas: None })
            .await
    }

    /// The same, kept by so many members.
    pub(crate) async fn open_with(
        &self,
        client: &Client,
        label: &str,
        copies: Copies,
    ) -> Result<NamespaceHandle> {
        let spec = own_shape(label);
        let replicas = copies.replicas.unwrap_or(0);
        let namespace = client.open_replicated(&spec, false, replicas).await;
        namespace.with_context(|| format!("cannot open namespace {label:?}"))
    }

    /// Prints the result: as JSON, or as `text` makes it.
    pub(crate) fn print<R: Serialize>(
        &self,
        report: &R,
        text: impl FnOnce(&R) -> String,
    ) -> Result<()> {
        let text = if self.global.json {
            serde_json::to_string(report)?
        } else {
            text(report)
        };
        match writeln!(std::io::stdout(), "{}", text.trim_end()) {
            // Whoever reads has seen enough (`| head`).
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            written => written.context("cannot write the result"),
        }
    }

    /// A bar for long work, `total` of `unit`; silent where nobody looks.
    pub(crate) fn progress(&self, total: u64, message: &str, unit: Unit) -> ProgressBar {
        let template = match unit {
            Unit::Bytes => {
                "{msg:<22} {bar:32.cyan/blue} {binary_bytes:>11}/{binary_total_bytes:<11} {binary_bytes_per_sec:>13} {eta}"
            }
            Unit::Count => "{msg:<22} {bar:32.cyan/blue} {human_pos:>11}/{human_len:<11} {eta}",
        };
        let style = ProgressStyle::with_template(template).expect("the templates above are valid");
        let bar = ProgressBar::new(total).with_style(style);
        bar.set_message(message.to_owned());
        bar
    }

    /// Tells of a failure and what to do about it.
    pub(crate) fn fail(&self, error: &anyhow::Error) {
        let next = next_step(error);
        if self.global.json {
            let report = serde_json::json!({ "error": format!("{error:#}"), "next": next });
            // Nobody is left to tell when standard output is closed.
            let _ = writeln!(std::io::stdout(), "{report}");
        } else {
            let mut text = format!("{} {error:#}", style("31;1", "error:"));
            if let Some(next) = next {
                text += &format!("\n{} {next}", style("36;1", "next: "));
            }
            let _ = writeln!(std::io::stderr(), "{text}");
        }
    }

    /// Waits, by the context's clock.
    pub(crate) async fn sleep(&self, wait: Duration) {
        self.clock.sleep(wait).await;
    }
}

/// What a bar counts.
#[derive(Clone, Copy)]
pub(crate) enum Unit {
    Bytes,
    Count,
}

fn next_step(error: &anyhow::Error) -> Option<String> {
    let error = error
        .chain()
        .find_map(|cause| cause.downcast_ref::<Error>())?;
    Some(match (error, error.kind()) {
        (Error::Endpoint { .. }, _) => {
            "give --endpoint or TERRACE_ENDPOINT as host:port or unix:/path".into()
        }
        // Of several nodes it may be another than the one that was named.
        (Error::Connect { endpoint, .. } | Error::BreakerOpen { endpoint, .. }, _) => format!(
            "is a node running at {endpoint}? start one with `kvserver`, or name another with --endpoint"
        ),
        (Error::Deadline { .. }, _) => {
            "the node is slow or frozen: see its log, or allow more time with --deadline 30s".into()
        }
        (
            Error::Refused {
                reason: Some(Reason::Unauthenticated),
                ..
            },
            _,
        ) => "give the token that the node's tokens_file has for you with --token or TERRACE_TOKEN".into(),
        (_, ErrorKind::Unavailable) => "try again; `kvctl status` says how the node is".into(),
        (_, ErrorKind::Refresh) => "run the command again".into(),
        (_, ErrorKind::FixRequest) => "the request is at fault, see the field it names".into(),
        (_, ErrorKind::GiveUp) => {
            "is this a Terrace node of the same version? compare `kvctl --version` and `kvctl status`"
                .into()
        }
    })
}

/// `text` in an ANSI style, where a person looks.
pub(crate) fn style(code: &str, text: &str) -> String {
    if std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none() {
        format!("\x1b[{code}m{text}\x1b[0m")
    } else {
        text.to_owned()
    }
}

/// A size for people.
pub(crate) fn size(bytes: u64) -> String {
    bytesize::ByteSize(bytes).display().iec().to_string()
}

/// A table whose columns are as wide as they need to be; numbers to the right.
pub(crate) fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows
            .iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count());
        cells
            .chain([head[column].chars().count()])
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let line = |cells: Vec<&str>| {
        let mut text = String::new();
        for (cell, width) in cells.iter().zip(&widths) {
            let is_number = cell.starts_with(|c: char| c.is_ascii_digit());
            if is_number {
                text += &format!("{cell:>width$}  ");
            } else {
                text += &format!("{cell:<width$}  ");
            }
        }
        text.trim_end().to_owned() + "\n"
    };
    let mut text = style("1", line(head.to_vec()).trim_end()) + "\n";
    for row in rows {
        text += &line(row.iter().map(String::as_str).collect());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::table;

    #[test]
    fn columns_line_up() {
        let rows = [
            vec!["ram".into(), "5".into()],
            vec!["durable".into(), "12345".into()],
        ];
        assert_eq!(
            table(&["tier", "blocks"], &rows),
            "tier     blocks\nram           5\ndurable   12345\n"
        );
    }
}
