//! The same-host path from threads that wait in the kernel: the same answers, and the same when nobody answers.

use std::{
    sync::{Arc, Barrier},
    time::Duration,
};

use kvclient::{
    Error, ErrorKind, GetOutcome, LocalPath, LookupOptions, NamespaceHandle, Path, PutBlock,
    PutOptions, Target, Traffic, blocking::Client,
};
use kvtests::{
    node::{TestNode, filled},
    patience::{HANG, eventually, private_loopback, until, within_awake},
};
use tempfile::TempDir;

use crate::{
    MIB, builder, chain,
    death::metric,
    liars::{LIES, liar},
    over_grpc,
    process::Process,
};

const DEADLINE: Duration = Duration::from_millis(400);

/// What a thread of its own says.
async fn on_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.expect("no panic")
}

async fn connect(builder: kvclient::ClientBuilder) -> (Client, NamespaceHandle) {
    on_thread(move || {
        let client = builder.connect_blocking().unwrap();
        let spec = kvclient::Namespace::opaque("local", 16, 4);
        let ns = client.open_namespace(&spec, false).unwrap();
        (client, ns)
    })
    .await
}

fn put(client: &Client, ns: &NamespaceHandle, seed: u32, lengths: &[usize]) -> Vec<Vec<u8>> {
    let bytes = |(i, &length): (usize, &usize)| filled(seed + i as u32, length).to_vec();
    let data: Vec<_> = lengths.iter().enumerate().map(bytes).collect();
    let blocks = data.iter().enumerate();
    let blocks: Vec<_> = blocks.map(|(i, bytes)| PutBlock::new(i, bytes)).collect();
    let chain = chain(ns, seed, lengths.len() as u32);
    let results = client.put(ns, &chain, &blocks, PutOptions::default());
    let results = results.expect("results");
    assert!(results.iter().all(|result| result.is_kept()), "{results:?}");
    data
}

fn get(client: &Client, ns: &NamespaceHandle, seed: u32, lengths: &[usize]) -> Vec<Vec<u8>> {
    let mut memory: Vec<Vec<u8>> = lengths.iter().map(|&length| vec![0xee; length]).collect();
    let mut buffers: Vec<&mut [u8]> = memory.iter_mut().map(|bytes| &mut bytes[..]).collect();
    let chain = chain(ns, seed, lengths.len() as u32);
    let got = client.get_into(ns, &chain, None, &mut buffers);
    let got = got.expect("an answer");
    assert!(got.iter().all(kvclient::Got::is_hit), "{got:?}");
    memory
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thread_that_waits_has_every_answer_through_shared_memory() {
    let node = TestNode::start(|_| {}).await;
    let (client, ns) = connect(builder(&node)).await;
    on_thread(move || {
        let lengths = [1, 4095, 65_537, MIB, 5 * MIB + 3];
        let data = put(&client, &ns, 1, &lengths);
        assert!(get(&client, &ns, 1, &lengths) == data);
        let chain = chain(&ns, 1, lengths.len() as u32);
        let mut memory: Vec<Vec<u8>> = lengths.iter().map(|&length| vec![0; length]).collect();
        let pieces = memory
            .iter_mut()
            .map(|bytes| bytes.chunks_mut(7_001).collect());
        let mut pieces: Vec<Vec<&mut [u8]>> = pieces.collect();
        let got = client.get_scattered(&ns, &chain, None, &mut pieces);
        assert!(got.unwrap().iter().all(kvclient::Got::is_hit));
        assert!(memory == data);

        let found = client.lookup(&ns, &chain, &LookupOptions::default());
        let mut lease = found.unwrap().lease.expect("a lease");
        assert_eq!(lease.blocks() as usize, lengths.len());
        let fetched = client.get(&ns, &chain, &lease).unwrap();
        for (fetched, data) in fetched.iter().zip(&data) {
            assert_eq!(fetched.bytes.as_deref(), Some(&data[..]));
        }
        assert!(client.renew(&mut lease, Duration::from_secs(20)).unwrap());
        let same = client.lease_of_owner(lease.id());
        assert!(client.release(lease).unwrap());
        assert!(!client.release(same).unwrap(), "it is gone");

        let held = client
            .hold(&ns, &chain, None)
            .unwrap()
            .expect("on this host");
        client.invalidate(&ns, Target::All).unwrap();
        for (i, bytes) in data.iter().enumerate() {
            let mut into = vec![0; bytes.len()];
            assert_eq!(held.read(i, &mut into).unwrap(), GetOutcome::Hit);
            assert!(into == *bytes, "block {i}");
        }
        let report = client.path();
        assert_eq!(
            (report.path, report.grpc),
            (Path::Local, Traffic::default())
        );
    })
    .await;
    // What was held is said to be done with, though no call came after it.
    eventually("what was let go is free", || node.arena_bytes() == 0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_put_of_many_blocks_is_written_while_the_node_copies() {
    let node = TestNode::start(|config| config.local_staging_bytes = 8 << 20).await;
    let (client, ns) = connect(builder(&node)).await;
    on_thread(move || {
        let data = put(&client, &ns, 1, &[MIB; 40]);
        assert!(get(&client, &ns, 1, &[MIB; 40]) == data);
        let report = client.path();
        let blocks = (report.local.put_blocks, report.local.got_blocks);
        assert_eq!((blocks, report.grpc.calls), ((40, 40), 0), "{report:?}");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_threads_and_tasks_share_a_client_and_its_connections() {
    const LINKS: usize = 3;
    let node = TestNode::start(|_| {}).await;
    let shared = builder(&node).lanes(LINKS).connect().await.unwrap();
    let ns = crate::open(&shared).await;
    // Attached: calls that come while the first one attaches go over gRPC.
    crate::put(&shared, &ns, &chain(&ns, 899, 1), &[MIB]).await;
    let client = Client::of(&shared).unwrap();
    let threads: Vec<_> = (0..8_u32)
        .map(|number| {
            let (client, ns) = (client.clone(), ns.clone());
            std::thread::spawn(move || {
                let lengths = [MIB / 2, 3000, MIB / 4];
                for round in 0..12 {
                    let seed = 100 * number + round;
                    let data = put(&client, &ns, seed, &lengths);
                    assert!(get(&client, &ns, seed, &lengths) == data);
                    let chain = chain(&ns, seed, 3);
                    if let Some(held) = client.hold(&ns, &chain, None).unwrap() {
                        let mut into = vec![0; lengths[1]];
                        assert_eq!(held.read(1, &mut into).unwrap(), GetOutcome::Hit);
                        assert!(into == data[1]);
                    }
                }
            })
        })
        .collect();
    for seed in 900..912 {
        let chain = chain(&ns, seed, 2);
        let data = crate::put(&shared, &ns, &chain, &[MIB / 2; 2]).await;
        assert!(crate::get(&shared, &ns, &chain, &[MIB / 2; 2]).await == data);
        let open = metric(&node, "terrace_local_connections");
        assert!(open <= (2 * LINKS) as f64, "{open} connections");
    }
    on_thread(move || {
        threads
            .into_iter()
            .for_each(|thread| thread.join().unwrap())
    })
    .await;
    let report = shared.path();
    assert_eq!(
        (report.failures, report.grpc.got_blocks),
        (0, 0),
        "{report:?}"
    );
    eventually("idle connections are within the bound", || {
        metric(&node, "terrace_local_connections") <= LINKS as f64
    })
    .await;
}

/// An attachment ends with its last link at the node: the first one may go when another has been taken there, not when it
/// is on its way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn threads_that_join_at_once_do_not_end_the_attachment_that_they_join() {
    const LINKS: usize = 2;
    let node = TestNode::start(|_| {}).await;
    for round in 0..30 {
        let shared = builder(&node).lanes(LINKS).connect().await.unwrap();
        let ns = crate::open(&shared).await;
        let data = crate::put(&shared, &ns, &chain(&ns, round, 1), &[3000]).await;
        let client = Client::of(&shared).unwrap();
        let start = Arc::new(Barrier::new(LINKS));
        let threads: Vec<_> = (0..LINKS)
            .map(|_| {
                let (client, ns, start) = (client.clone(), ns.clone(), start.clone());
                std::thread::spawn(move || {
                    start.wait();
                    get(&client, &ns, round, &[3000])
                })
            })
            .collect();
        for thread in threads {
            assert!(on_thread(move || thread.join().unwrap()).await == data);
        }
        let report = shared.path();
        assert_eq!((report.failures, report.grpc.calls), (0, 0), "{report:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_the_socket_answers_a_waiting_thread_has_the_bytes_in_time() {
    let node = TestNode::start(|_| {}).await;
    let grpc = over_grpc(&node).await;
    let ns = crate::open(&grpc).await;
    let lengths = [MIB, 4097, 3 * MIB];
    let chain = chain(&ns, 1, 3);
    let data = Arc::new(crate::put(&grpc, &ns, &chain, &lengths).await);
    for lie in LIES {
        let socket = liar(node.dir.path(), lie, grpc.boot_id().0);
        let builder = builder(&node).local(LocalPath::At(socket));
        let (client, ns) = connect(builder.deadline(Duration::from_secs(8))).await;
        for _ in 0..3 {
            let (client, ns, data) = (client.clone(), ns.clone(), data.clone());
            let got = on_thread(move || get(&client, &ns, 1, &lengths) == *data);
            let got = within_awake(HANG / 2, got).await;
            assert!(got.expect("in time"), "{lie:?}");
        }
        let report = client.path();
        let blocks = (report.local.got_blocks, report.grpc.got_blocks);
        assert_eq!(blocks, (0, 9), "{lie:?}: {report:?}");
        assert_eq!(report.path, Path::Grpc, "{lie:?}: {report:?}");
        assert!(report.why_grpc.is_some(), "{lie:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_socket_that_is_gone_is_reported_and_gone_around() {
    let node = TestNode::start(|_| {}).await;
    let missing = node.dir.path().join("nothing.sock");
    let (client, ns) = connect(builder(&node).local(LocalPath::At(missing))).await;
    on_thread(move || {
        let data = put(&client, &ns, 1, &[MIB; 2]);
        assert!(get(&client, &ns, 1, &[MIB; 2]) == data);
        let report = client.path();
        assert_eq!(
            (report.path, report.local.calls),
            (Path::Grpc, 0),
            "{report:?}"
        );
        assert!(report.why_grpc.is_some_and(|why| why.contains("connect")));
        let chain = chain(&ns, 1, 2);
        assert!(client.hold(&ns, &chain, None).unwrap().is_none());
    })
    .await;
}

/// Every kind of call, each of which must fail as unavailable, or answer that there is no such path.
fn assert_nobody_answers(client: &Client, ns: &NamespaceHandle) {
    let chain = chain(ns, 1, 1);
    let mut memory = vec![0; MIB];
    let block = PutBlock::new(0, vec![7; MIB]);
    let failures: [Result<(), Error>; 3] = [
        client
            .lookup(ns, &chain, &LookupOptions::default())
            .map(drop),
        client
            .get_into(ns, &chain, None, &mut [&mut memory])
            .map(drop),
        client
            .put(ns, &chain, &[block], PutOptions::default())
            .map(drop),
    ];
    for failure in failures {
        let error = failure.expect_err("nobody answers");
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    }
    assert!(client.hold(ns, &chain, None).unwrap().is_none());
}

async fn assert_local_again(client: &Client, ns: &NamespaceHandle, seed: u32) {
    until("the same-host path is taken again", async || {
        let (client, ns) = (client.clone(), ns.clone());
        on_thread(move || {
            let chain = chain(&ns, 1, 2);
            client.get(&ns, &chain, None).is_ok() && client.path().path == Path::Local
        })
        .await
    })
    .await;
    let (client, ns) = (client.clone(), ns.clone());
    on_thread(move || {
        let before = client.path().local;
        let data = put(&client, &ns, seed, &[MIB; 2]);
        assert!(get(&client, &ns, seed, &[MIB; 2]) == data);
        let after = client.path().local;
        assert!(after.put_blocks >= before.put_blocks + 2, "{after:?}");
        assert!(after.got_blocks >= before.got_blocks + 2, "{after:?}");
    })
    .await;
}

async fn attached(endpoint: &str) -> (Client, NamespaceHandle) {
    let (client, ns) = connect(kvclient::Client::builder(endpoint).deadline(HANG)).await;
    let (theirs, space) = (client.clone(), ns.clone());
    on_thread(move || put(&theirs, &space, 1, &[MIB; 2])).await;
    assert_eq!(client.path().path, Path::Local, "{:?}", client.path());
    (client, ns)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_node_costs_a_waiting_thread_its_deadline_and_not_more() {
    let dir = TempDir::new().unwrap();
    let (node, endpoint) = Process::node(dir.path(), &private_loopback());
    let (client, ns) = attached(&endpoint).await;
    node.freeze();
    let (hurried, space) = (client.with_deadline(DEADLINE), ns.clone());
    let calls = on_thread(move || assert_nobody_answers(&hurried, &space));
    // Four calls of one deadline each, and a little for whatever else the machine does.
    let in_time = within_awake(4 * DEADLINE + Duration::from_secs(2), calls).await;
    assert!(in_time.is_some(), "a call outlived its deadline");
    assert_eq!(client.path().path, Path::Grpc);
    assert_eq!(client.path().failures, 1, "it was asked once");
    node.thaw();
    assert_local_again(&client, &ns, 2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_node_wakes_who_waits_for_it_and_its_next_life_is_attached_to() {
    let dir = TempDir::new().unwrap();
    let (mut node, endpoint) = Process::node(dir.path(), &private_loopback());
    let (client, ns) = attached(&endpoint).await;
    // One that is asleep in the kernel with all its time ahead.
    node.freeze();
    let (theirs, space) = (client.clone(), ns.clone());
    let (tell, told) = std::sync::mpsc::channel();
    let asleep = tokio::task::spawn_blocking(move || {
        tell.send(rustix::thread::gettid()).unwrap();
        theirs.lookup(&space, &chain(&space, 1, 2), &LookupOptions::default())
    });
    let thread = on_thread(move || told.recv().unwrap()).await;
    let state = format!("/proc/self/task/{}/stat", thread.as_raw_nonzero());
    eventually("it is asleep", || {
        let said = std::fs::read_to_string(&state).expect("a thread of ours");
        said.rsplit(')')
            .next()
            .is_some_and(|rest| rest.starts_with(" S "))
    })
    .await;
    node.kill();
    let answer = within_awake(HANG / 4, asleep).await.expect("it is woken");
    let error = answer.unwrap().expect_err("nobody is there");
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
    let (hurried, space) = (client.with_deadline(DEADLINE), ns.clone());
    on_thread(move || assert_nobody_answers(&hurried, &space)).await;
    let node = Process::node(dir.path(), endpoint.trim_start_matches("http://"));
    assert_local_again(&client, &ns, 2).await;
    drop(node);
}
