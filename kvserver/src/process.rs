//! The node as a process: arguments in, signals heard, exit code out.
//!
//! ```text
//! arguments ─► settings ─► node ─► banner on standard output, "ready" last
//!                           │ SIGTERM or SIGINT: drain within `shutdown_deadline`
//!                           └ once more: stop at once
//! ```
//!
//! Apart from `main.rs`, so that tests can run the same process under a name of their own.
//! Errors: one line on standard error that says what to do next, exit code 1 (2 for the command line).

mod check;

use std::{ffi::OsString, fmt::Display, io::Write, process::ExitCode};

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::{
    Node,
    config::{Action, Config, LoadError, load},
    telemetry::logs,
};

/// Exit code of a process that was asked twice to stop: 128 + SIGINT.
const STOPPED_AT_ONCE: u8 = 130;

/// Runs the process until it is asked to stop; the first argument is the program's name.
#[must_use]
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let loaded = match load(args) {
        Ok(loaded) => loaded,
        // clap knows whether this is `--help` or a mistake, and where each goes.
        Err(LoadError::Usage(usage)) => {
            let _ = usage.print();
            return ExitCode::from(u8::try_from(usage.exit_code()).unwrap_or(2));
        }
        Err(LoadError::Config(error)) => return fail(&error),
    };
    if loaded.action == Action::PrintConfig {
        say(&loaded.config.to_string());
        return ExitCode::SUCCESS;
    }
    if let Err(error) = logs::start(&loaded.config) {
        return fail(&error);
    }
    // The node has threads of its own; this one only listens for signals.
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error),
    };
    for problem in &loaded.misspelt {
        tracing::warn!("{problem}");
    }
    let running = async {
        match loaded.action {
            Action::Check => until_checked(&loaded.config).await,
            _ => until_stopped(loaded.config).await,
        }
    };
    match runtime.block_on(running) {
        Ok(code) => code,
        Err(error) => fail(&*error),
    }
}

/// A check that is told to stop leaves nothing behind either.
async fn until_checked(config: &Config) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let mut stops = [
        signal(SignalKind::terminate())?,
        signal(SignalKind::interrupt())?,
    ];
    let lines = tokio::select! {
        lines = check::check(config) => lines?,
        () = asked_to_stop(&mut stops) => return Ok(ExitCode::from(STOPPED_AT_ONCE)),
    };
    lines.iter().for_each(|line| say(&format!("  {line}\n")));
    say("everything that a start needs is there\n");
    Ok(ExitCode::SUCCESS)
}

async fn until_stopped(config: Config) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let mut stops = [
        signal(SignalKind::terminate())?,
        signal(SignalKind::interrupt())?,
    ];
    let deadline = config.shutdown_deadline;
    let node = Node::start(config).await?;
    say(&banner(&node));
    asked_to_stop(&mut stops).await;
    tracing::info!(?deadline, "stopping; once more stops at once");
    tokio::select! {
        _ = node.shutdown(deadline) => Ok(ExitCode::SUCCESS),
        () = asked_to_stop(&mut stops) => Ok(ExitCode::from(STOPPED_AT_ONCE)),
    }
}

async fn asked_to_stop([terminate, interrupt]: &mut [Signal; 2]) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

fn banner(node: &Node) -> String {
    let mut lines = vec![
        format!("terrace {}", env!("CARGO_PKG_VERSION")),
        format!("  data     {}", node.config().data_dir.display()),
    ];
    let sizes = node.chosen().reasons.iter();
    lines.extend(sizes.map(|reason| format!("  size     {reason}")));
    lines.push(format!("  grpc     {}", node.endpoint()));
    lines.push(format!("  cluster  {}", cluster(node)));
    if let Some(path) = node.uds_path() {
        lines.push(format!("  grpc     unix:{}", path.display()));
    }
    if let Some(address) = node.http_addr() {
        lines.push(format!("  console  http://{address}"));
    }
    lines.push("ready\n".to_owned());
    lines.join("\n")
}

/// Which cluster, who this node is in it, and who else is there.
fn cluster(node: &Node) -> String {
    let (cluster, me) = (node.cluster(), node.cluster().declared());
    let zone = match me.zone.as_str() {
        "" => String::new(),
        zone => format!(" in zone {zone}"),
    };
    let this = format!("node {}{zone}, weight {}", me.id, me.weight);
    match cluster.alone() {
        Some(why) => format!("alone: {why}; {this}"),
        None => {
            let members = cluster.roster().present().count();
            let noun = if members == 1 { "member" } else { "members" };
            let id = node.blocks().cluster_id();
            format!("{id}, {members} {noun}; {this}")
        }
    }
}

/// Standard output is for answers; a reader that has gone away is no reason to fail.
fn say(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

fn fail(error: &(impl Display + ?Sized)) -> ExitCode {
    let _ = writeln!(std::io::stderr(), "kvserver: {error}");
    ExitCode::FAILURE
}
