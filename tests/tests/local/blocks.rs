//! Blocks in and out: what was put is what is read, and what is wrong never becomes a block.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use kvproto::{
    BlockKey, LeaseId, Part, ViewDigest,
    local::fixed::Asking,
    v1::{self, GetOutcome, PutOutcome, Reason, local_reply::Answer, local_request::Call},
};
use kvserver::tier::{Fault, Faults};
use kvtests::{
    local::{Raw, Space, pattern},
    node::{RUN_BLOCKS, TestNode, filled},
};
use tempfile::TempDir;

use super::{Client, MIB, got, metric, outcomes, put_one, with_a_disk};

#[tokio::test]
async fn a_chain_is_read_where_it_lies_with_and_without_a_lease() {
    let node = TestNode::start(|_| {}).await;
    let space = Space::open(&node.node, "default").await;
    let (mut writer, mut reader) = (Client::new(&node, "", 1), Client::new(&node, "", 2));
    let chain = space.chain(1, 6);
    let blocks = writer.put_chain(&space, &chain, MIB + 12_345);

    let lease = reader
        .raw
        .lookup(space.lookup(&chain, 60_000))
        .lease
        .expect("a lease");
    assert_eq!(lease.blocks, 6);
    let leased = reader.raw.get(space.get(&chain, lease.id));
    assert_eq!(leased.hold, 0, "the lease keeps them");
    let held = reader.raw.get(space.get(&chain, 0));
    assert_ne!(held.hold, 0, "nothing else keeps them");
    for answer in [&leased, &held] {
        assert_eq!(answer.blocks.len(), 6);
        for (block, bytes) in answer.blocks.iter().zip(&blocks) {
            assert!(reader.read(&space, block).as_ref() == Ok(bytes));
            assert_eq!(block.tier(), v1::Tier::Ram);
        }
    }
    assert_eq!(metric(&node, "terrace_get_blocks_asked_total"), 12.0);
    assert_eq!(
        metric(&node, "terrace_get_blocks_total{source=\"ram\"}"),
        12.0
    );

    let renew = v1::RenewRequest {
        lease_id: lease.id,
        ..v1::RenewRequest::default()
    };
    let Ok(Answer::Renew(renewed)) = reader.raw.call(Call::Renew(renew)) else {
        panic!("renewed");
    };
    assert!(renewed.renewed);
    let release = || v1::ReleaseRequest {
        lease_id: lease.id,
        ..v1::ReleaseRequest::default()
    };
    for released in [true, false] {
        let answer = reader.raw.call(Call::Release(release()));
        assert!(matches!(answer, Ok(Answer::Release(r)) if r.released == released));
    }
    let gone = reader.raw.get(space.get(&chain, lease.id));
    assert_eq!(got(&gone.blocks), [GetOutcome::Expired; 6]);
}

#[tokio::test]
async fn a_get_in_the_fixed_layout_is_answered_as_its_message_is() {
    let node = TestNode::start(|_| {}).await;
    let space = Space::open(&node.node, "default").await;
    let mut client = Client::new(&node, "", 1);
    let chain = space.chain(1, 6);
    client.put_chain(&space, &chain.slice(0..4, RUN_BLOCKS), MIB + 12_345);
    let lookup = space.lookup(&chain, 60_000);
    let lease = client.raw.lookup(lookup).lease.expect("a lease");
    for lease in [None, Some(LeaseId(lease.id))] {
        let asking = Asking {
            sequence: 0,
            timeout_ms: 0,
            done: &[],
            view_digest: ViewDigest(0),
            namespace: space.id,
            lease,
            chain: &chain,
            parts: &[],
        };
        // The first answers tell of the cluster, and are messages.
        let message = client
            .raw
            .get(space.get(&chain, lease.map_or(0, |lease| lease.0)));
        let got = client.raw.get_fixed(asking);
        let context = message.context.expect("who answers");
        assert_eq!(got.head.boot_id.0, context.boot_id);
        assert_eq!(got.head.view_digest.0, context.view_digest);
        assert_eq!(
            (got.head.hold == 0, message.hold == 0),
            (lease.is_some(), lease.is_some())
        );
        assert_eq!(got.blocks.len(), message.blocks.len());
        for (i, (block, told)) in got.blocks.into_iter().zip(&message.blocks).enumerate() {
            assert_eq!(block.outcome.map(|o| o.to_wire()), Some(told.outcome()));
            let Some(hit) = block.hit else {
                assert!(told.header.is_none() && i >= 4);
                continue;
            };
            let (spot, place) = (hit.spot.expect("mapped"), told.place.expect("mapped"));
            assert_eq!(
                (spot.segment, spot.offset, spot.generation),
                (place.segment, place.offset, place.generation)
            );
            let key = BlockKey {
                namespace: space.id,
                hash: chain.hashes[i],
                part: Part::default(),
            };
            let header = space.judge(told.header.as_ref().expect("of a hit"));
            assert_eq!(hit.header(key), header);
        }
    }
}

#[tokio::test]
async fn what_is_not_there_is_a_miss_and_what_is_there_is_present() {
    let node = TestNode::start(|_| {}).await;
    let space = Space::open(&node.node, "default").await;
    let mut client = Client::new(&node, "", 1);
    let chain = space.chain(1, 3);
    client.put_chain(&space, &space.chain(1, 2), 10_000);
    let answer = client.raw.get(space.get(&chain, 0));
    assert_eq!(
        got(&answer.blocks),
        [GetOutcome::Hit, GetOutcome::Hit, GetOutcome::Miss]
    );

    let copied = metric(&node, "terrace_local_put_bytes_total");
    let bytes = pattern(0, 10_000);
    client.staging.write(0, &bytes).expect("inside");
    let again = client
        .raw
        .put(space.put(&[(space.header(&chain, 0, &bytes), 0)]))
        .expect("an answer");
    assert_eq!(outcomes(&again), [PutOutcome::Present]);
    assert_eq!(
        metric(&node, "terrace_local_put_bytes_total"),
        copied,
        "not copied for nobody"
    );
}

#[tokio::test]
async fn a_batch_is_answered_block_by_block() {
    let node = TestNode::start(|_| {}).await;
    let space = Space::open(&node.node, "default").await;
    let mut client = Client::new(&node, "", 1);
    let chain = space.chain(1, 4);
    let mut blocks = Vec::new();
    for i in 0..4 {
        let bytes = pattern(i, 70_000);
        client
            .staging
            .write(u64::from(i) * 70_000, &bytes)
            .expect("inside");
        blocks.push((
            space.header(&chain, i as usize, &bytes),
            u64::from(i) * 70_000,
        ));
    }
    client
        .staging
        .write(2 * 70_000 + 66_000, &[1, 2, 3])
        .expect("inside");
    let results = client.raw.put(space.put(&blocks)).expect("an answer");
    let cached = PutOutcome::Cached;
    assert_eq!(
        outcomes(&results),
        [cached, cached, PutOutcome::Corrupt, cached]
    );
    assert_eq!(results[2].reason(), Reason::Corrupt);
    let answer = client.raw.get(space.get(&chain, 0));
    let hit = GetOutcome::Hit;
    assert_eq!(got(&answer.blocks), [hit, hit, GetOutcome::Miss, hit]);
}

#[tokio::test]
async fn blocks_that_do_not_fit_in_the_staging_memory_side_by_side_are_refused() {
    let node = TestNode::start(|_| {}).await;
    let space = Space::open(&node.node, "default").await;
    let mut client = Client::new(&node, "", 1);
    let (chain, bytes) = (space.chain(1, 9), pattern(0, MIB));
    client.staging.write(0, &bytes).expect("inside");
    let blocks: Vec<_> = (0..9)
        .map(|i| (space.header(&chain, i, &bytes), 0))
        .collect();
    let refused = client.raw.put(space.put(&blocks)).expect_err("9 of 8 MiB");
    assert_eq!(refused.reason(), Reason::InvalidField);
    assert!(
        refused.message.starts_with("put.blocks") && refused.message.contains("bytes together"),
        "{}",
        refused.message
    );
    assert!(client.raw.put(space.put(&blocks[..8])).is_ok());
}

#[tokio::test]
async fn an_offset_outside_of_the_staging_memory_is_refused_by_name_and_nothing_is_put() {
    let node = TestNode::start(|_| {}).await;
    let space = Space::open(&node.node, "default").await;
    let mut client = Client::new(&node, "", 1);
    let chain = space.chain(1, 2);
    let bytes = vec![0; 5000];
    let length = client.staging.length_bytes();
    let header = |i| space.header(&chain, i, &bytes);
    for offset in [length - 4999, length, u64::MAX - 4999, u64::MAX] {
        let refused = client
            .raw
            .put(space.put(&[(header(0), 0), (header(1), offset)]));
        let refused = refused.expect_err("outside");
        assert_eq!(refused.reason(), Reason::InvalidField);
        assert!(
            refused.message.starts_with("put.blocks.offset"),
            "{}",
            refused.message
        );
    }
    assert_eq!(node.arena_bytes(), 0, "judged before the first is copied");
    let last = client
        .raw
        .put(space.put(&[(header(0), length - 5000)]))
        .expect("inside");
    assert_eq!(outcomes(&last), [PutOutcome::Cached]);
}

#[tokio::test]
async fn a_put_that_says_too_little_is_refused_by_the_name_of_what_is_missing() {
    let node = TestNode::start(|_| {}).await;
    let space = Space::open(&node.node, "default").await;
    let mut client = Client::new(&node, "", 1);
    let chain = space.chain(1, 1);
    let whole = space.put(&[(space.header(&chain, 0, b"bytes"), 0)]);
    let mut cases = Vec::new();
    let mut case = |field: &'static str, change: &dyn Fn(&mut v1::LocalPut)| {
        let mut put = whole.clone();
        change(&mut put);
        cases.push((field, put));
    };
    case("put.start", &|put| put.start = None);
    case("put.blocks", &|put| put.blocks.clear());
    case("put.blocks.header", &|put| put.blocks[0].header = None);
    case("header.page_sums", &|put| {
        put.blocks[0].header.as_mut().unwrap().page_sums.clear();
    });
    case("header.length_bytes", &|put| {
        put.blocks[0].header.as_mut().unwrap().length_bytes = u64::MAX;
    });
    for (field, put) in cases {
        let refused = client.raw.put(put).expect_err(field);
        assert_eq!(refused.reason(), Reason::InvalidField);
        assert!(
            refused.message.starts_with(field),
            "{field}: {}",
            refused.message
        );
    }
    assert!(client.raw.put(whole).is_ok(), "the connection lives on");
}

#[tokio::test]
async fn a_place_that_has_a_new_tenant_is_found_out() {
    let node = TestNode::start(|_| {}).await;
    let space = Space::open(&node.node, "default").await;
    let mut client = Client::new(&node, "", 1);
    let (chain, _) = put_one(&mut client, &space, 1, MIB);
    let answer = client.raw.get(space.get(&chain, 0));
    let stale = answer.blocks[0].clone();
    let nothing = Call::Nothing(v1::LocalNothing {});
    client
        .raw
        .call_with(&[answer.hold], 0, nothing)
        .expect("done");
    let target = kvproto::convert::request::Target::All;
    let tenant = kvserver::engine::TenantId(0);
    node.node
        .blocks()
        .invalidate(tenant, space.id, target)
        .await
        .expect("forgotten");
    assert_eq!(
        client.read(&space, &stale),
        Err("its slot has another tenant")
    );
    // The next block comes to lie in the same slot.
    let (other, _) = put_one(&mut client, &space, 2, MIB);
    let fresh = client.raw.get(space.get(&other, 0)).blocks[0].clone();
    let (old, new) = (stale.place.unwrap(), fresh.place.unwrap());
    assert_eq!((old.segment, old.offset), (new.segment, new.offset));
    assert_ne!(old.generation, new.generation);
    assert!(client.read(&space, &fresh).is_ok());
    assert_eq!(
        client.read(&space, &stale),
        Err("its slot has another tenant")
    );
}

#[tokio::test]
async fn a_writer_that_changes_bytes_while_they_are_copied_harms_only_itself() {
    let node = TestNode::start(|_| {}).await;
    let space = Space::open(&node.node, "default").await;
    let mut client = Client::new(&node, "", 1);
    let staging = Arc::new(client.raw_staging());
    let bytes = pattern(1, MIB);
    let stop = Arc::new(AtomicBool::new(false));
    let scribbler = {
        let (staging, stop) = (Arc::clone(&staging), Arc::clone(&stop));
        thread::spawn(move || {
            for i in 0_u64.. {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                let at = i * 40_961 % (MIB as u64 - 8);
                staging.write(at, &i.to_le_bytes()).expect("inside");
                thread::yield_now();
            }
        })
    };
    let mut seen = [0, 0];
    for seed in 0_u32.. {
        if seed >= 20 && seen[1] > 0 {
            break;
        }
        assert!(seed < 50_000, "the scribbler was never caught: {seen:?}");
        let chain = space.chain(seed, 1);
        staging.write(0, &bytes).expect("inside");
        let results = client
            .raw
            .put(space.put(&[(space.header(&chain, 0, &bytes), 0)]))
            .expect("an answer");
        let answer = client.raw.get(space.get(&chain, 0));
        match results[0].outcome() {
            // Scribbled over before or behind the copy: the block is what its writer said.
            PutOutcome::Cached => {
                seen[0] += 1;
                assert!(client.read(&space, &answer.blocks[0]).as_ref() == Ok(&bytes));
            }
            PutOutcome::Corrupt => {
                seen[1] += 1;
                assert_eq!(got(&answer.blocks), [GetOutcome::Miss]);
            }
            other => panic!("{other:?}"),
        }
        let nothing = Call::Nothing(v1::LocalNothing {});
        client
            .raw
            .call_with(&[answer.hold], 0, nothing)
            .expect("done");
    }
    stop.store(true, Ordering::Relaxed);
    scribbler.join().expect("scribbled");
}

impl Client {
    /// A second connection's worth of staging memory, in this one's place.
    fn raw_staging(&mut self) -> kvgpu::StagingMap {
        std::mem::replace(&mut self.staging, spare())
    }
}

fn spare() -> kvgpu::StagingMap {
    let memory = kvgpu::Staging::create(4096).expect("memory");
    kvgpu::StagingMap::map(memory.fd().try_clone_to_owned().expect("a descriptor")).expect("mapped")
}

#[tokio::test]
async fn a_call_without_time_is_answered_late_and_the_next_is_served() {
    let node = TestNode::start(|_| {}).await;
    let space = Space::open(&node.node, "default").await;
    let mut client = Client::new(&node, "", 1);
    put_one(&mut client, &space, 1, 4096);
    let (mut raw, _) = Raw::attached(&node.node, "", 2, 0);
    let nothing = || Call::Nothing(v1::LocalNothing {});
    for _ in 0..3 {
        assert!(raw.call_with(&[], 1, nothing()).is_ok());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_get_that_is_refused_as_a_whole_no_block_counts_as_handed_out() {
    let dir = TempDir::new().expect("a folder");
    let (node, _) = with_a_disk(dir).await;
    let mut stock = node.client().await;
    let blocks: Vec<_> = (0..3).map(|i| filled(i, MIB)).collect();
    let chain = stock.chain(1, 3);
    stock
        .put_as(&chain, &blocks, v1::Ack::Stored, PutOutcome::Stored)
        .await;
    drop(stock);
    // Another life finds them on the disk alone.
    let (node, nvme) = with_a_disk(node.stop().await).await;
    let space = Space::open(&node.node, "default").await;
    let mut client = Client::new(&node, "", 1);
    let first = chain.slice(0..1, RUN_BLOCKS);
    let answer = client.raw.get(space.get(&first, 0));
    assert_eq!(got(&answer.blocks), [GetOutcome::Hit]);
    let count = |source: &str| {
        metric(
            &node,
            &format!("terrace_get_blocks_total{{source=\"{source}\"}}"),
        )
    };
    let bytes = metric(&node, "terrace_get_bytes_total");
    assert_eq!(
        [count("nvme"), count("ram"), count("failed")],
        [1.0, 0.0, 0.0]
    );

    nvme.set(Faults {
        reads: Fault::Hang,
        ..Faults::default()
    });
    let refused = client
        .raw
        .call_with(&[], 100, Call::Get(space.get(&chain, 0)));
    assert_eq!(
        refused.expect_err("the disk hangs").reason(),
        Reason::Deadline
    );
    assert_eq!(
        [count("nvme"), count("ram"), count("failed")],
        [1.0, 0.0, 3.0]
    );
    assert_eq!(metric(&node, "terrace_get_bytes_total"), bytes);
    assert_eq!(metric(&node, "terrace_get_blocks_asked_total"), 4.0);
    nvme.set(Faults::default());
}
