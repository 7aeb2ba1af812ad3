//! What a killed process leaves behind: everything it was told, and nothing it was told is gone.

use std::{
    collections::HashMap,
    io::{BufRead, BufReader},
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
};

use kvproto::BlockKey;
use kvserver::{
    clock::SystemClock,
    tier::{
        DurableConfig, DurableTier, KeepNothing, NvmeConfig, NvmeTier, Tier,
        conformance::{block_in, has, namespace},
    },
};
use kvtests::writer::{CAPACITY_BYTES, LENGTH_BYTES};

/// What the writer said last about a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Said {
    Stored(u32),
    /// Under way when it died: may be there or not.
    Removing,
    Removed,
}

/// Runs the writer, kills it with SIGKILL in the middle of line `lines`, and notes what it said.
fn write_and_kill(
    kind: &str,
    capacity_bytes: u64,
    dir: &Path,
    first: u32,
    lines: usize,
    said: &mut HashMap<u32, Said>,
) -> (u64, u64) {
    let mut child = Command::new(env!("CARGO_BIN_EXE_tier_writer"))
        .args([
            kind,
            &dir.to_string_lossy(),
            &first.to_string(),
            &capacity_bytes.to_string(),
        ])
        .stdout(Stdio::piped())
        .spawn()
        .expect("the writer starts");
    let mut out = BufReader::new(child.stdout.take().expect("piped"));
    let mut line = String::new();
    let mut opened = (0, 0);
    for _ in 0..lines {
        line.clear();
        assert!(
            out.read_line(&mut line).expect("a line") > 0,
            "the writer ended by itself"
        );
        note(&line, said, &mut opened);
    }
    child.kill().expect("killed");
    child.wait().expect("reaped");
    // What it managed to say before it died was said.
    for line in out.lines().map_while(Result::ok) {
        note(&line, said, &mut opened);
    }
    opened
}

fn note(line: &str, said: &mut HashMap<u32, Said>, opened: &mut (u64, u64)) {
    let words: Vec<&str> = line.split_whitespace().collect();
    let number = |at: usize| words[at].parse::<u32>().expect("a number");
    match words[0] {
        "open" => *opened = (number(1).into(), number(2).into()),
        "stored" => drop(said.insert(number(1), Said::Stored(number(2)))),
        "removing" => drop(said.insert(number(1), Said::Removing)),
        "removed" => drop(said.insert(number(1), Said::Removed)),
        other => panic!("{other}"),
    }
}

/// Checks a tier against what was said; answers how many blocks are there. What the tier has evicted by
/// itself is excused if `may_evict`, but not if it still lists it.
async fn check(tier: &dyn Tier, said: &HashMap<u32, Said>, may_evict: bool) -> u64 {
    let listed = |key: &BlockKey| tier.residents().iter().any(|r| r.key == *key);
    let mut there = 0;
    for (&number, &said) in said {
        let [first, second] =
            [0, 1].map(|version| block_in(namespace(1), number, version, LENGTH_BYTES));
        let found = [has(tier, &first).await, has(tier, &second).await];
        there += u64::from(found[0] || found[1]);
        match said {
            Said::Stored(version) => {
                // Listed after the read: room may be made all the while.
                assert!(
                    found[version as usize] || may_evict && !listed(first.key()),
                    "{number} was stored and is gone"
                );
                assert!(
                    !found[1 - version as usize],
                    "{number}: the older bytes are back"
                );
            }
            Said::Removed => assert_eq!(found, [false, false], "{number} was removed and is back"),
            Said::Removing => {}
        }
    }
    there
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_again_and_again_the_nvme_tier_keeps_its_word() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut said = HashMap::new();
    for (life, lines) in [97, 240, 31, 350].into_iter().enumerate() {
        let (found, dropped) = write_and_kill(
            "nvme",
            CAPACITY_BYTES,
            dir.path(),
            life as u32 * 10_000,
            lines,
            &mut said,
        );
        assert!(life == 0 || found > 0, "warm after a kill");
        assert_eq!(
            dropped, 0,
            "every entry was proven: nothing was lost by a kill"
        );
        let config = NvmeConfig::new(dir.path(), CAPACITY_BYTES);
        let tier =
            NvmeTier::open(config, Arc::new(SystemClock::new()), Arc::new(KeepNothing)).await;
        let tier = tier.expect("it opens after a kill");
        let there = check(&tier, &said, false).await;
        assert!(
            there > lines as u64 / 4,
            "{there} blocks are there after {lines} lines"
        );
        assert_eq!(tier.recovered().dropped, 0);
        tier.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_while_it_makes_room_the_nvme_tier_gives_no_wrong_byte() {
    let dir = tempfile::tempdir().expect("a folder");
    let small = 16 << 20;
    let mut said = HashMap::new();
    for (life, lines) in [600, 450, 700].into_iter().enumerate() {
        write_and_kill(
            "nvme",
            small,
            dir.path(),
            life as u32 * 10_000,
            lines,
            &mut said,
        );
        let config = NvmeConfig::new(dir.path(), small);
        let tier =
            NvmeTier::open(config, Arc::new(SystemClock::new()), Arc::new(KeepNothing)).await;
        let tier = tier.expect("it opens after a kill");
        let there = check(&tier, &said, true).await;
        assert!(there > 50, "{there} blocks are there");
        tier.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_again_and_again_the_durable_tier_keeps_its_word() {
    let dir = tempfile::tempdir().expect("a folder");
    let mut said = HashMap::new();
    for (life, lines) in [40, 90].into_iter().enumerate() {
        write_and_kill(
            "durable",
            CAPACITY_BYTES,
            dir.path(),
            life as u32 * 10_000,
            lines,
            &mut said,
        );
        let config = DurableConfig::new(dir.path(), CAPACITY_BYTES);
        let tier = DurableTier::open(config, Arc::new(SystemClock::new())).await;
        let tier = tier.expect("it opens after a kill");
        check(&tier, &said, false).await;
        tier.close().await;
    }
}

#[test]
fn a_disk_that_takes_no_more_degrades_the_tiers_and_they_come_back() {
    let dir = tempfile::tempdir().expect("a folder");
    let output = Command::new(env!("CARGO_BIN_EXE_tier_writer"))
        .args(["full", &dir.path().to_string_lossy()])
        .output()
        .expect("the writer runs");
    let said = String::from_utf8_lossy(&output.stdout);
    let complained = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success() && said.ends_with("ok\n"),
        "{said}\n{complained}"
    );
}
