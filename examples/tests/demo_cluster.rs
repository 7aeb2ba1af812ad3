//! `make demo-cluster` in small, from its first scene to its last: three nodes, one killed, one added, no wrong logit.

use std::{
    fs::File,
    process::{Command, ExitStatus, Stdio},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::retry_on_intr,
    process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open},
};
use serde_json::Value;

/// Far beyond what unoptimised nodes need on a busy machine; then the demonstration is stopped, and its nodes with it.
const PATIENCE: Timespec = Timespec {
    tv_sec: 240,
    tv_nsec: 0,
};

/// Runs it to its end; what it printed.
fn shown(arguments: &[&str]) -> (ExitStatus, Value, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = |name| folder.path().join(name);
    let file = |name| Stdio::from(File::create(path(name)).unwrap());
    let mut demo = Command::new(env!("CARGO_BIN_EXE_demo_cluster"))
        .args(["--kvserver", env!("CARGO_BIN_EXE_demo_node")])
        .args(arguments)
        .env("TMPDIR", folder.path())
        .stdin(Stdio::null())
        .stdout(file("said"))
        .stderr(file("wrong"))
        .spawn()
        .unwrap();
    let pid = Pid::from_child(&demo);
    let process = pidfd_open(pid, PidfdFlags::empty()).unwrap();
    let mut ended = [PollFd::new(&process, PollFlags::IN)];
    let waited = retry_on_intr(|| poll(&mut ended, Some(&PATIENCE)));
    if waited.unwrap() == 0 {
        kill_process(pid, Signal::TERM).unwrap();
    }
    let status = demo.wait().unwrap();
    let read = |name| std::fs::read_to_string(path(name)).unwrap();
    let (said, wrong) = (read("said"), read("wrong"));
    let report = serde_json::from_str(&said);
    (
        status,
        report.unwrap_or_else(|_| panic!("{status}\n{said}\n{wrong}")),
        wrong,
    )
}

#[test]
fn a_node_is_killed_and_another_added_and_every_logit_is_right() {
    let (status, report, wrong) = shown(&["--tiny", "--documents", "2", "--json"]);
    assert_eq!(status.code(), Some(0), "{report}\n{wrong}");
    assert_eq!(report["logits_identical"], true);
    assert!(report["recovered"].as_f64() >= Some(1.0), "{report}");
    let passes = report["passes"].as_array().unwrap();
    let mut stages: Vec<(&str, u64)> = Vec::new();
    for pass in passes {
        assert_eq!(pass["logits_identical"], true, "{pass}");
        assert_eq!(pass["requests"], 2);
        let stage = (
            pass["stage"].as_str().unwrap(),
            pass["nodes"].as_u64().unwrap(),
        );
        if stages.last() != Some(&stage) {
            stages.push(stage);
        }
    }
    let scenes = [
        ("cold", 3),
        ("warm", 3),
        ("one node died", 2),
        ("its place is taken", 2),
        ("one node joins", 3),
        ("all have moved", 3),
    ];
    assert_eq!(stages, scenes);
    let [cold, warm] = [&passes[0], &passes[1]].map(|pass| pass["reused_tokens"].as_u64());
    assert_eq!(cold, Some(0));
    assert!(warm > Some(0), "{report}");
    for time in ["takeover_ms", "join_ms"] {
        assert!(report[time].as_f64() > Some(0.0), "{time}: {report}");
    }
}
