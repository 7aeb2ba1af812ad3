//! The demonstration when somebody interrupts it: it ends at once and leaves nothing behind.
//!
//! The node is a stand-in that says who it is and then does nothing, so the demonstration is caught while it
//! waits for it: a child runs, and both of its folders are there.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};

/// Far beyond what an unoptimised model needs on a busy machine.
const PATIENCE: u32 = 12_000;
const PAUSE: Duration = Duration::from_millis(10);

/// What the stand-in was started as: its process, its data folder and its socket.
struct StandIn {
    pid: Pid,
    data: PathBuf,
    socket: PathBuf,
}

/// A program that writes its process and arguments to `note` and sleeps.
fn stand_in(folder: &Path, note: &Path) -> PathBuf {
    let path = folder.join("kvserver");
    let note = note.display();
    let script = format!(
        "#!/bin/sh\nprintf '%s\\n' $$ \"$@\" > {note}.new\nmv {note}.new {note}\nexec sleep 600\n"
    );
    fs::write(&path, script).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// Waits until the stand-in runs; the demonstration must not end before.
#[expect(clippy::disallowed_methods, reason = "another process writes the file")]
fn started(demo: &mut Child, note: &Path) -> StandIn {
    for _ in 0..PATIENCE {
        assert!(demo.try_wait().unwrap().is_none(), "it ended by itself");
        if let Ok(text) = fs::read_to_string(note) {
            let words: Vec<&str> = text.lines().collect();
            let value = |flag| {
                let at = words.iter().position(|word| *word == flag).expect(flag);
                PathBuf::from(words[at + 1])
            };
            return StandIn {
                pid: Pid::from_raw(words[0].parse().unwrap()).unwrap(),
                data: value("--data-dir"),
                socket: value("--unix-socket"),
            };
        }
        std::thread::sleep(PAUSE);
    }
    panic!("no node was started");
}

/// Interrupts a demonstration with these arguments while its node starts.
fn interrupted(folder: &Path, signal: Signal, arguments: &[&str]) -> StandIn {
    let (note, document) = (folder.join("note"), folder.join("document"));
    fs::write(&document, "What is short is soon read. ".repeat(400)).unwrap();
    let mut demo = Command::new(env!("CARGO_BIN_EXE_demo"))
        .args([
            "--tokens",
            "512",
            "--question",
            "How long is it?",
            "--document",
        ])
        .arg(&document)
        .arg("--kvserver")
        .arg(stand_in(folder, &note))
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let node = started(&mut demo, &note);
    assert!(test_kill_process(node.pid).is_ok() && node.data.is_dir());
    kill_process(Pid::from_child(&demo), signal).unwrap();
    let ended = demo.wait_with_output().unwrap();
    assert_eq!(ended.status.code(), Some(130), "{ended:?}");
    assert!(String::from_utf8_lossy(&ended.stderr).contains("the node has been stopped too"));
    node
}

#[test]
fn ctrl_c_ends_the_node_and_removes_both_folders() {
    let folder = tempfile::tempdir().unwrap();
    for signal in [Signal::INT, Signal::TERM] {
        let node = interrupted(folder.path(), signal, &[]);
        assert!(test_kill_process(node.pid).is_err(), "the node is gone");
        assert!(!node.data.exists(), "{}", node.data.display());
        assert!(!node.socket.parent().unwrap().exists());
        fs::remove_file(folder.path().join("note")).unwrap();
    }
}

#[test]
fn a_data_folder_of_the_callers_is_used_and_kept() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    let given = ["--data-dir", data.to_str().unwrap()];
    let node = interrupted(folder.path(), Signal::INT, &given);
    assert_eq!(node.data, data);
    assert!(test_kill_process(node.pid).is_err(), "the node is gone");
    assert!(data.is_dir() && !node.socket.parent().unwrap().exists());
}
