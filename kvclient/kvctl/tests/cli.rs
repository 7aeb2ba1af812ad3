//! `kvctl` as a person or a script runs it, against a node in this process.

use std::{
    io::Write,
    process::{Child, Command, Output, Stdio},
    time::Duration,
};

use kvclient::{Client, Namespace, PutBlock, PutOptions};
use kvserver::{
    Node,
    blocks::Blocks,
    config::{Capacity, Config, LogFormat, MIB},
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

struct Bench {
    node: Node,
    dir: TempDir,
}

impl Bench {
    async fn start() -> Self {
        let dir = TempDir::new().unwrap();
        let config = Config {
            data_dir: dir.path().join("data"),
            listen: "127.0.0.1:0".parse().unwrap(),
            http_listen: None,
            ram_bytes: Capacity::Bytes(64 * MIB),
            nvme_bytes: Capacity::Bytes(0),
            durable_bytes: Capacity::Bytes(0),
            log_format: LogFormat::Off,
            ..Config::default()
        };
        let node = Node::start(config).await.unwrap();
        Self { node, dir }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    /// Runs kvctl with these words; the node is served by the test's other threads meanwhile.
    fn run(&self, words: &[&str], input: &[u8]) -> Output {
        let mut child = self.spawn(words);
        child.stdin.take().unwrap().write_all(input).unwrap();
        child.wait_with_output().unwrap()
    }

    fn spawn(&self, words: &[&str]) -> Child {
        Command::new(env!("CARGO_BIN_EXE_kvctl"))
            .args(words)
            .env("TERRACE_ENDPOINT", self.node.endpoint())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// Waits for something that kvctl does to the node.
    async fn eventually(&self, what: &str, is_so: impl Fn(&Blocks) -> bool) {
        let is_so = async {
            while !is_so(self.node.blocks()) {
                tokio::task::yield_now().await;
            }
        };
        // Only ends a test that hangs.
        tokio::time::timeout(Duration::from_secs(60), is_so)
            .await
            .unwrap_or_else(|_| panic!("not within a minute: {what}"));
    }

    fn json(&self, words: &[&str], input: &[u8]) -> Value {
        let output = self.run(&[words, &["--json"]].concat(), input);
        serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{words:?} printed no JSON ({error}): {output:?}"))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_cluster_is_shown_changed_and_explained() {
    let bench = Bench::start().await;
    let me = bench.node.cluster().me().0.clone();
    let shown = bench.json(&["cluster"], &[]);
    assert_eq!(shown["members"][0]["id"].as_str(), Some(&*me));
    assert_eq!(shown["members"][0]["owned_share"].as_f64(), Some(1.0));
    assert_eq!(shown["members"][0]["standing"].as_str(), Some("well"));
    assert_eq!(shown["members"][0]["waiting_bytes"].as_u64(), Some(0));
    assert_eq!(shown["digest"].as_str().map(str::len), Some(16));
    let text = String::from_utf8(bench.run(&["cluster", "members"], &[]).stdout).unwrap();
    assert!(
        text.contains(&format!("{me} *")) && text.contains("100.00 %"),
        "{text}"
    );

    // A name need only be as long as it is its own.
    let weighed = bench.json(&["cluster", "weight", &me[..6], "7"], &[]);
    assert_eq!(weighed["weight"].as_u64(), Some(7));
    assert_eq!(bench.node.cluster().declared().weight, 7);

    bench.json(&["put", "doc", "-"], b"some bytes");
    let explained = bench.json(&["cluster", "explain", "doc"], &[]);
    assert_eq!(explained["claims"][0]["claim"].as_str(), Some("owner"));
    assert_eq!(explained["claims"][0]["has"].as_str(), Some("has it"));

    // There is nobody to take what it has: it says what would be lost, and goes on having it.
    let drained = bench.run(
        &["cluster", "drain", &me, "--within", "1500ms", "--json"],
        &[],
    );
    assert!(!drained.status.success(), "{drained:?}");
    let lines = String::from_utf8(drained.stdout).unwrap();
    let report: Value = serde_json::from_str(lines.lines().next().unwrap()).unwrap();
    assert_eq!(report["phase"].as_str(), Some("deadline"));
    assert!(
        report["at_stake_bytes"].as_u64() > Some(0) && report["left_blocks"].as_u64() > Some(0)
    );
    let resumed = bench.json(&["cluster", "resume", &me], &[]);
    assert_eq!(resumed["phase"].as_str(), Some("resumed"));
    assert!(bench.node.cluster().declared().state.takes_runs());

    let wrong = bench.run(&["cluster", "drain", "nobody"], &[]);
    let told = String::from_utf8(wrong.stderr).unwrap();
    assert!(
        !wrong.status.success() && told.contains("no member is named"),
        "{told}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_put_under_a_key_comes_back_and_is_forgotten_on_request() {
    let bench = Bench::start().await;
    let bytes: Vec<u8> = (0..3_000_001_u32).map(|i| (i >> 3) as u8).collect();
    let put = bench.json(&["put", "doc", "-"], &bytes);
    assert_eq!(
        (put["length_bytes"].as_u64(), put["blocks"].as_u64()),
        (Some(3_000_001), Some(4))
    );

    let file = bench.path("out");
    let got = bench.json(&["get", "doc", "-o", &file], b"");
    assert_eq!(got["tiers"]["ram"], 3);
    assert!(std::fs::read(&file).unwrap() == bytes);
    assert!(
        bench.run(&["get", "doc"], b"").stdout == bytes,
        "bytes alone on standard output"
    );

    // Other, shorter bytes under the same name replace all of the old ones.
    bench.json(&["put", "doc", "-", "--block-size", "1KiB"], b"short");
    assert_eq!(bench.run(&["get", "doc"], b"").stdout, b"short");

    assert_eq!(
        bench.json(&["lookup", "doc", "no"], b"")["all_present"],
        false
    );
    assert!(bench.run(&["lookup", "doc"], b"").status.success());
    assert_eq!(
        bench.json(&["invalidate", "--key", "doc"], b"")["blocks"],
        2
    );
    assert!(!bench.run(&["lookup", "doc"], b"").status.success());
    let missing = bench.run(&["get", "doc"], b"");
    assert!(String::from_utf8_lossy(&missing.stderr).contains("kvctl put doc FILE"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_namespace_keeps_as_many_copies_as_it_was_told_last() {
    let bench = Bench::start().await;
    let put = |words: &[&str]| bench.json(&[&["put", "doc", "-"], words].concat(), b"bytes");
    assert_eq!(put(&[])["replicas"], 1);
    assert_eq!(put(&["--replicas", "3"])["replicas"], 3);
    assert_eq!(put(&[])["replicas"], 3, "it stays so");
    let text = bench.run(&["cluster", "explain", "doc"], b"");
    let text = String::from_utf8(text.stdout).unwrap();
    assert!(
        text.contains("kept by 3 members") && text.contains("2 of 2 blocks"),
        "{text}"
    );
    assert_eq!(put(&["-n", "other"])["replicas"], 1);

    let words = "bench --sizes 4KiB -c 1 -t 20ms --working-set 64KiB --reads 100 --replicas 2";
    let report = bench.json(&words.split(' ').collect::<Vec<_>>(), b"");
    assert_eq!(report["rows"][0]["replicas"], 2, "{report}");

    for command in ["put", "bench"] {
        let help = String::from_utf8(bench.run(&[command, "--help"], b"").stdout).unwrap();
        assert!(help.contains("--replicas"), "{help}");
    }
    for wrong in ["0", "9"] {
        let refused = bench.run(&["put", "doc", "-", "--replicas", wrong], b"");
        let told = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(
            !refused.status.success() && told.contains("1..=8"),
            "{told}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_of_several_runs_is_explained_run_by_run() {
    let bench = Bench::start().await;
    // The label and 150 blocks: two runs of 64 and what is left.
    let bytes = vec![1; 150 << 10];
    bench.json(&["put", "long", "-", "--block-size", "1KiB"], &bytes);
    let explain = |run: &str| bench.json(&["cluster", "explain", "long", "--run", run], b"");
    let blocks = |report: &Value| {
        let claim = &report["claims"][0];
        (
            report["runs"].as_u64(),
            report["blocks"].as_u64(),
            claim["blocks"].as_u64(),
        )
    };
    assert_eq!(blocks(&explain("0")), (Some(3), Some(64), Some(64)));
    assert_eq!(blocks(&explain("2")), (Some(3), Some(23), Some(23)));
    assert_ne!(explain("0")["run"], explain("2")["run"]);
    let wrong = bench.run(&["cluster", "explain", "long", "--run", "3"], b"");
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("3 runs of 64 blocks"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_trace_replayed_against_a_node_agrees_with_the_policy_alone() {
    let bench = Bench::start().await;
    let trace = bench.path("trace.jsonl");
    let lines: String = (0..40)
        .map(|i| format!("{{\"hash_ids\": [0, 1, {}, {}]}}\n", 2 + i % 5, 100 + i))
        .collect();
    std::fs::write(&trace, lines).unwrap();
    let endpoint = bench.node.endpoint();
    // Room for all on both sides, so that no policy can differ.
    let alone = bench.json(&["replay", &trace, "--capacity", "1.0"], b"");
    let node = bench.json(&["replay", &trace, "--against", &endpoint], b"");
    assert_eq!(alone["unique_blocks"], 47);
    assert_eq!(alone["prefix_hits"], node["prefix_hits"]);
    assert_eq!(node["verified_blocks"], node["prefix_hits"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_short_bench_measures_both_sides() {
    let bench = Bench::start().await;
    let words = [
        "bench",
        "--sizes",
        "64KiB",
        "-c",
        "2",
        "--working-set",
        "4MiB",
    ];
    // A machine that is slow enough does nothing in 300 ms: then for longer.
    let measure = |time| bench.json(&[&words[..], &["-t", time]].concat(), b"");
    let is_measured = |rows: &Value| {
        let mut rows = rows["rows"].as_array().unwrap().iter();
        rows.all(|row| row["p50_us"].as_f64() > Some(0.0) && row["server_cpu_s_per_gib"] != 0.0)
    };
    let mut rows = measure("300ms");
    if !is_measured(&rows) {
        rows = measure("5s");
    }
    let rows = rows["rows"].as_array().unwrap();
    assert_eq!(
        rows.iter()
            .map(|row| row["op"].as_str().unwrap())
            .collect::<Vec<_>>(),
        ["get", "put"]
    );
    for row in rows {
        assert!(row["gib_s"].as_f64().unwrap() > 0.0, "{row}");
        assert_eq!(
            (row["misses"].as_u64(), row["errors"].as_u64()),
            (Some(0), Some(0)),
            "{row}"
        );
        assert!(row["p50_us"].as_f64() <= row["p999_us"].as_f64());
        assert!(row["server_cpu_s_per_gib"].as_f64().unwrap() > 0.0, "{row}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bench_that_is_interrupted_prints_what_it_has_and_leaves_nothing_behind() {
    let bench = Bench::start().await;
    // One cell of gets, and then puts for longer than any machine sleeps between the first and the signal.
    let reads = format!("100{}", ",0".repeat(60));
    let words = [
        "bench",
        "--json",
        "--sizes",
        "4KiB",
        "-c",
        "1",
        "--reads",
        &reads,
        "-t",
        "300ms",
        "--working-set",
        "64KiB",
    ];
    let child = bench.spawn(&words);
    bench
        .eventually("it puts more than it has filled with", |blocks| {
            blocks.engine().stats().blocks > 16
        })
        .await;
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{output:?}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["rows"][0]["op"], "get", "{report}");
    let left = bench.node.blocks().engine().stats().blocks;
    assert!(left <= 1, "{left} blocks, and only one put was under way");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn status_and_doctor_answer_people_and_machines() {
    let bench = Bench::start().await;
    let status = bench.json(&["status"], b"");
    assert_eq!(status["tiers"][0]["tier"], "ram");
    assert_eq!(status["policy"], "foresight");
    let text = bench.run(&["status"], b"");
    assert!(String::from_utf8_lossy(&text.stdout).contains("in service"));
    let doctor = bench.json(&["doctor", "--data-dir", &bench.path("data")], b"");
    let names: Vec<&str> = doctor["checks"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| c["name"].as_str().unwrap())
        .collect();
    for name in [
        "direct I/O",
        "free space",
        "memory lock",
        "huge pages",
        "open files",
        "GPU",
    ] {
        assert!(names.contains(&name), "{name}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failure_says_what_to_do_next() {
    let bench = Bench::start().await;
    let nobody = bench.run(&["status", "-e", "127.0.0.1:1", "--json"], b"");
    assert!(!nobody.status.success());
    let error: Value = serde_json::from_slice(&nobody.stdout).unwrap();
    assert!(
        error["next"].as_str().unwrap().contains("kvserver"),
        "{error}"
    );
    let wrong = bench.run(&["replay", "/dev/null", "--policy", "magic"], b"");
    assert!(
        String::from_utf8_lossy(&wrong.stderr).contains("foresight"),
        "{wrong:?}"
    );
}

#[test]
fn a_wrong_scenario_is_refused_with_those_there_are() {
    let simulate = |words: &str| {
        let kvctl = env!("CARGO_BIN_EXE_kvctl");
        let output = Command::new(kvctl).args(words.split(' ')).output();
        output.unwrap()
    };
    let wrong = simulate("simulate --scenario tornado");
    assert_eq!(wrong.status.code(), Some(2), "{wrong:?}");
    let (error, help) = (wrong.stderr, simulate("simulate --help").stdout);
    let scenarios = [
        "calm",
        "grow",
        "drain",
        "crash",
        "churn",
        "partition",
        "replicas",
        "evictions",
        "slow",
        "mixed",
    ];
    for text in [error, help] {
        let text = String::from_utf8(text).unwrap();
        for scenario in scenarios {
            assert!(text.contains(scenario), "{scenario}: {text}");
        }
    }
}

#[test]
fn a_simulation_says_what_moved_and_repeats_itself() {
    let run = || {
        let words = "simulate --nodes 12 --scenario grow --seconds 12 --clients 2 --share-runs 50 --seed 3 --json";
        let output = Command::new(env!("CARGO_BIN_EXE_kvctl"))
            .args(words.split(' '))
            .output();
        let output = output.unwrap();
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()
    };
    let report = run();
    for number in ["moved_over_ideal", "max_share", "unreadable_under_lease"] {
        assert!(report[number].is_number(), "{number}: {report}");
    }
    assert_eq!(report["unreadable_under_lease"], 0);
    assert_eq!(report["history_digest"], run()["history_digest"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bench_goes_the_way_that_its_rows_name() {
    for (transport, is_shared) in [("tcp", false), ("shm", true)] {
        let bench = Bench::start().await;
        let words =
            "bench --sizes 64KiB --concurrency 2 --time 50ms --working-set 1MiB --transports";
        let words: Vec<_> = words.split(' ').chain([transport]).collect();
        let report = bench.json(&words, &[]);
        for row in report["rows"].as_array().unwrap() {
            assert_eq!(row["transport"], transport, "{row}");
            assert!(row["calls"].as_u64().unwrap() > 0, "{row}");
            assert_eq!(row["errors"], 0, "{row}");
            assert!(row["server_cpu_s_per_gib"].is_number(), "{row}");
        }
        let metrics = bench.node.blocks().metrics_text();
        let bytes = |name: &str| {
            let value = |line: &str| line.strip_prefix(name)?.trim().parse::<f64>().ok();
            metrics.lines().find_map(value).unwrap_or_default()
        };
        for (all, shared) in [
            ("terrace_get_bytes_total ", "terrace_local_get_bytes_total "),
            ("terrace_put_bytes_total ", "terrace_local_put_bytes_total "),
        ] {
            assert!(bytes(all) > 0.0, "{all}");
            let expected = if is_shared { bytes(all) } else { 0.0 };
            assert_eq!(bytes(shared), expected, "{transport}: {shared}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_the_node_has_no_room_for_is_not_called_stored() {
    let bench = Bench::start().await;
    let path = bench.path("big.bin");
    std::fs::write(&path, vec![7; 100 << 20]).unwrap();
    let put = bench.run(&["put", "big", &path], &[]);
    assert_eq!(put.status.code(), Some(1), "{put:?}");
    let said = String::from_utf8(put.stderr).unwrap();
    assert!(
        said.contains("are still there") && said.contains("--ram-bytes"),
        "{said}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_has_a_name() {
    let bench = Bench::start().await;
    for words in [&["put", "", "-"][..], &["get", ""], &["lookup", "a", ""]] {
        let output = bench.run(words, &[]);
        assert_eq!(output.status.code(), Some(2), "{words:?}: {output:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_has_seen_enough_is_no_failure() {
    let bench = Bench::start().await;
    let mut child = bench.spawn(&["status"]);
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(output.stderr, b"");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_s_namespace_is_shown_and_forgotten_and_never_disturbed() {
    let bench = Bench::start().await;
    let client = Client::connect(&bench.node.endpoint()).await.unwrap();
    let engine = Namespace {
        engine_class: "vllm".to_owned(),
        model: "org/model@1".to_owned(),
        ..Namespace::opaque("chat", 16, 8)
    };
    let ns = client.open_namespace(&engine, true).await.unwrap();
    let chain = ns.chain(&(0..32).collect::<Vec<u32>>());
    let put = || async {
        let blocks = [
            PutBlock::new(0, vec![1; 3000]),
            PutBlock::new(1, vec![2; 3000]),
        ];
        let put = client
            .put(&ns, &chain, &blocks, PutOptions::default())
            .await;
        assert_eq!(put.unwrap().len(), 2);
    };
    put().await;
    let shown = bench.json(&["namespaces"], b"");
    let row = &shown["namespaces"][0];
    assert_eq!(shown["namespaces"].as_array().unwrap().len(), 1, "{shown}");
    assert_eq!(
        (&row["label"], &row["model"]),
        (&"chat".into(), &"org/model@1".into())
    );
    assert_eq!((&row["blocks"], &row["bytes"]), (&2.into(), &6000.into()));
    assert_eq!(row["id"], ns.id().to_string());
    let text = String::from_utf8(bench.run(&["namespaces", "chat"], b"").stdout).unwrap();
    assert!(text.contains("vllm") && text.contains("5.9 KiB"), "{text}");

    // What is misspelt is told of and opens nothing; keys are not looked for, nor put, among an engine's blocks.
    let file = bench.path("file");
    std::fs::write(&file, "bytes").unwrap();
    for (words, said) in [
        (&["invalidate", "-n", "chatt"][..], "there are: chat"),
        (&["get", "doc", "-n", "chatt"], "there are: chat"),
        (
            &["lookup", "doc", "-n", "chat"],
            "is not kvctl's alone (engine vllm",
        ),
        (
            &["invalidate", "--key", "doc", "-n", "chat"],
            "is not kvctl's alone (engine vllm",
        ),
        (
            &["put", "doc", &file, "-n", "chat"],
            "is not kvctl's alone (engine vllm",
        ),
    ] {
        let refused = bench.run(words, b"");
        let told = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(
            !refused.status.success() && told.contains(said),
            "{words:?}: {told}"
        );
    }
    assert_eq!(bench.node.blocks().snapshot().namespaces, 1);
    // Nobody was in between: a strict engine starts again.
    client.open_namespace(&engine, true).await.unwrap();

    let hash = chain.hashes[1].to_string();
    let one = bench.json(&["invalidate", "-n", "chat", "--key", &hash], b"");
    assert_eq!(
        (&one["blocks"], &one["namespace"]),
        (&1.into(), &"chat".into())
    );
    assert_eq!(bench.json(&["invalidate", "-n", "chat"], b"")["blocks"], 1);

    // Of two under one label, one is named by its id.
    let newer = Namespace {
        model: "org/model@2".to_owned(),
        ..engine.clone()
    };
    client.open_namespace(&newer, false).await.unwrap();
    put().await;
    let refused = bench.run(&["invalidate", "-n", "chat"], b"");
    let told = String::from_utf8_lossy(&refused.stderr).into_owned();
    let id = ns.id().to_string();
    assert!(
        told.contains("2 namespaces") && told.contains(&id),
        "{told}"
    );
    let shown = bench.json(&["namespaces", "chat"], b"");
    let latest: Vec<bool> = shown["namespaces"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row["is_latest"] == true && row["model"] == "org/model@2")
        .collect();
    assert_eq!(latest, [true, false], "{shown}");
    assert_eq!(bench.json(&["invalidate", "-n", &id], b"")["blocks"], 2);
    let hash = ["cluster", "explain", &hash, "-n", &id];
    assert!(bench.run(&hash, b"").status.success());
    for id in [&id, &"0".repeat(32)] {
        let put = bench.run(&["put", "doc", &file, "-n", id], b"");
        assert!(
            !put.status.success(),
            "an engine's, and one that nobody has: {put:?}"
        );
    }
    // Whoever looks and forgets by the old one's id leaves the newer the one that was opened last.
    client.open_namespace(&newer, true).await.unwrap();
    assert_eq!(bench.node.blocks().snapshot().namespaces, 2);

    // Of kvctl's own the id is as good as the label.
    bench.json(&["put", "doc", &file, "-n", "mine"], b"");
    let own = bench.json(&["namespaces", "mine"], b"");
    let id = own["namespaces"][0]["id"].as_str().unwrap();
    assert_eq!(bench.run(&["get", "doc", "-n", id], b"").stdout, b"bytes");
    bench.json(&["put", "other", &file, "-n", id], b"");
    assert!(
        bench
            .run(&["lookup", "doc", "other", "-n", "mine"], b"")
            .status
            .success()
    );
    assert_eq!(bench.node.blocks().snapshot().namespaces, 3);
}
