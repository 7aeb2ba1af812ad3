//! How a demonstration runs: until its end, or until somebody wants it to stop.
//!
//! Ctrl-C, SIGTERM and a closed terminal drop it where it stands, and its nodes with it.
//! Errors: the demonstration's own, on standard error, with exit code 1; 130 when it was stopped.

use std::process::ExitCode;

use tokio::signal::unix::{SignalKind, signal};

/// Runs `work`; true means that it showed what it is there to show.
#[allow(clippy::print_stderr, reason = "a program for people prints")]
pub fn run(name: &str, work: impl Future<Output = anyhow::Result<bool>>) -> ExitCode {
    let failed = |error: &anyhow::Error| {
        eprintln!("{name}: {error:#}");
        ExitCode::FAILURE
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => return failed(&error.into()),
    };
    let outcome = runtime.block_on(async {
        tokio::select! {
            outcome = work => Some(outcome),
            () = asked_to_stop() => None,
        }
    });
    // A prefill that still computes has nobody to answer to.
    runtime.shutdown_background();
    match outcome {
        Some(Ok(true)) => ExitCode::SUCCESS,
        Some(Ok(false)) => ExitCode::FAILURE,
        Some(Err(error)) => failed(&error),
        None => {
            eprintln!("\nstopped; the node has been stopped too");
            ExitCode::from(130)
        }
    }
}

/// Answers when a person or a supervisor wants this program to end.
async fn asked_to_stop() {
    let listen = |kind| signal(kind).expect("a runtime with signals is running");
    let (mut interrupt, mut terminate, mut hangup) = (
        listen(SignalKind::interrupt()),
        listen(SignalKind::terminate()),
        listen(SignalKind::hangup()),
    );
    tokio::select! {
        _ = interrupt.recv() => (),
        _ = terminate.recv() => (),
        _ = hangup.recv() => (),
    }
}
