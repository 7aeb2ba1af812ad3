//! The client against a peer made of stock tonic parts that lies, forgets, refuses and falls silent.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use kvclient::{
    BreakerState, Client, ErrorKind, GetOptions, GetOutcome, Heard, LookupOptions, Namespace,
    NamespaceHandle, Part, PutBlock, PutOptions, Reason, SequenceHash, Target, TierKind,
    WatchEvent, clock::ManualClock, split_buffers,
};
use kvtests::{
    client::{HOUR, assert_landed, bytes, put_new, touchy},
    patience::{eventually, until, within_awake},
    peer::{Fault, Peer},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};
use tonic::Code;

const UNAVAILABLE: Fault = Fault::Refuse(Code::Unavailable, "");

async fn open(peer: &Peer) -> (Client, NamespaceHandle) {
    let client = Client::builder(&peer.endpoint())
        .connections(1)
        .connect()
        .await
        .unwrap();
    let spec = Namespace::opaque("faults", 16, 4);
    let ns = client.open_namespace(&spec, false).await.unwrap();
    (client, ns)
}

fn tokens(blocks: u32) -> Vec<u32> {
    (0..blocks * 16).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stock_node_and_this_client_understand_each_other() {
    let peer = Peer::start().await;
    let (client, ns) = open(&peer).await;
    let chain = ns.chain(&tokens(4));
    let data = [bytes(0, 1), bytes(1, 65_537), bytes(2, 3 * 1024 * 1024 + 5)];
    let blocks = [
        PutBlock::new(0, data[0].clone()),
        PutBlock::new(1, &data[1]),
        PutBlock::new(2, bytes::Bytes::from(data[2].clone())),
    ];

    put_new(&client, &ns, &chain, &blocks).await;

    let found = client
        .lookup(&ns, &chain, &LookupOptions::default())
        .await
        .unwrap();
    assert_eq!((found.present_blocks, found.leased_blocks()), (3, 3));
    assert_eq!(found.tiers, [(3, TierKind::Ram)]);

    let mut memory = vec![0xee; 4 << 22];
    let mut buffers = split_buffers(&mut memory, 1 << 22).unwrap();
    let got = client
        .get_into(&ns, &chain, found.lease.as_ref(), &mut buffers)
        .await
        .unwrap();
    let fetched = client.get(&ns, &chain, found.lease.as_ref()).await.unwrap();
    assert_landed(&got, &buffers, &data);
    for (i, data) in data.iter().enumerate() {
        assert!(
            fetched[i].bytes.as_ref().unwrap() == data,
            "block {i} as bytes"
        );
    }
    assert_eq!(got[3].outcome, GetOutcome::Miss);
    assert!(fetched[3].bytes.is_none());
}

#[tokio::test]
async fn parts_of_a_block_are_kept_apart_and_come_in_order() {
    let peer = Peer::start().await;
    let (client, ns) = open(&peer).await;
    let chain = ns.chain(&tokens(2));
    let parts = [
        Part {
            rank: 0,
            layer_group: 0,
        },
        Part {
            rank: 1,
            layer_group: 0,
        },
    ];
    let blocks: Vec<_> = (0..2)
        .flat_map(|i| parts.map(|part| (i, part)))
        .map(|(i, part)| PutBlock {
            part,
            ..PutBlock::new(i, vec![(i * 2) as u8 + part.rank as u8; 100])
        })
        .collect();
    put_new(&client, &ns, &chain, &blocks).await;

    let options = GetOptions {
        parts: &parts,
        lease: None,
    };
    let fetched = client.get(&ns, &chain, options).await.unwrap();
    let first: Vec<u8> = fetched
        .iter()
        .map(|f| f.bytes.as_ref().unwrap()[0])
        .collect();
    assert_eq!(first, [0, 1, 2, 3]);
    // Only part {0, 0}: two blocks.
    assert_eq!(client.get(&ns, &chain, None).await.unwrap().len(), 2);
}

async fn with_one_block(len: usize) -> (Peer, Client, NamespaceHandle, kvclient::Chain, Vec<u8>) {
    let peer = Peer::start().await;
    let (client, ns) = open(&peer).await;
    let chain = ns.chain(&tokens(1));
    let data = bytes(7, len);
    let block = [PutBlock::new(0, &data)];
    put_new(&client, &ns, &chain, &block).await;
    (peer, client, ns, chain, data)
}

#[tokio::test]
async fn a_byte_changed_on_its_way_is_corrupt_and_never_seen() {
    for at in [0, 65_535, 65_536, 999_999] {
        let (peer, client, ns, chain, data) = with_one_block(1_000_000).await;
        peer.script([Fault::FlipByte(at), Fault::FlipByte(at)]);
        let mut buffer = vec![0xee; data.len()];
        let got = client
            .get_into(&ns, &chain, None, &mut [&mut buffer])
            .await
            .unwrap();
        assert_eq!(got[0].outcome, GetOutcome::Corrupt);
        assert!(
            buffer.iter().all(|b| *b == 0),
            "a corrupt block's buffer is zeroed"
        );
        let fetched = client.get(&ns, &chain, None).await.unwrap();
        assert_eq!(fetched[0].outcome, GetOutcome::Corrupt);
        assert!(fetched[0].bytes.is_none());
        // It was the way and not the block: the next get has it.
        assert!(
            client.get(&ns, &chain, None).await.unwrap()[0]
                .bytes
                .as_ref()
                .unwrap()
                == &data
        );
    }
}

#[tokio::test]
async fn another_block_than_asked_for_is_corrupt() {
    let (peer, client, ns, chain, data) = with_one_block(5000).await;
    peer.script([Fault::WrongBlock]);
    let mut buffer = vec![0xee; data.len()];
    let got = client
        .get_into(&ns, &chain, None, &mut [&mut buffer])
        .await
        .unwrap();
    assert_eq!(got[0].outcome, GetOutcome::Corrupt);
}

#[tokio::test]
async fn an_answer_that_ends_early_is_repeated_and_never_a_short_block() {
    let (peer, client, ns, chain, data) = with_one_block(1_000_000).await;
    peer.script([Fault::EndEarly]);
    let fetched = client.get(&ns, &chain, None).await.unwrap();
    assert!(fetched[0].bytes.as_ref().unwrap() == &data);
    peer.script([Fault::EndEarly; 4]);
    let error = client.get(&ns, &chain, None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
}

#[tokio::test]
async fn a_buffer_that_is_too_small_is_the_callers_to_fix() {
    let (_peer, client, ns, chain, _) = with_one_block(5000).await;
    let mut buffer = vec![0; 4999];
    let error = client
        .get_into(&ns, &chain, None, &mut [&mut buffer])
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FixRequest);
    assert!(
        error
            .to_string()
            .contains("buffer 0 holds 4999 bytes, the block has 5000"),
        "{error}"
    );
    let error = client
        .get_into(&ns, &chain, None, &mut [])
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FixRequest);
}

#[tokio::test]
async fn a_repeat_carries_the_same_request_id_and_idempotency_key() {
    let peer = Peer::start().await;
    let (client, ns) = open(&peer).await;
    let chain = ns.chain(&tokens(1));
    peer.script([UNAVAILABLE, UNAVAILABLE]);
    client
        .lookup(&ns, &chain, &LookupOptions::default())
        .await
        .unwrap();
    client
        .lookup(&ns, &chain, &LookupOptions::default())
        .await
        .unwrap();
    let seen = peer.seen();
    assert_eq!(
        seen.len(),
        4,
        "two tries failed, the third and the second call did not"
    );
    assert!(
        seen[..3]
            .iter()
            .all(|s| s.context.request_id == seen[0].context.request_id)
    );
    assert!(
        seen[..3]
            .iter()
            .all(|s| s.detail == seen[0].detail && s.detail.len() == 16)
    );
    assert_ne!(seen[3].context.request_id, seen[0].context.request_id);
    assert_ne!(seen[3].detail, seen[0].detail);
    assert!(
        seen.iter()
            .all(|s| s.context.owner_id == seen[0].context.owner_id)
    );
}

#[tokio::test]
async fn a_put_refused_half_way_is_repeated_with_the_same_bytes() {
    let peer = Peer::start().await;
    let (client, ns) = open(&peer).await;
    let chain = ns.chain(&tokens(1));
    let data = bytes(3, 9 << 20);
    peer.script([UNAVAILABLE, UNAVAILABLE]);
    let block = [PutBlock::new(0, &data)];
    put_new(&client, &ns, &chain, &block).await;
    assert_eq!(peer.count("Put"), 3);
}

#[tokio::test]
async fn a_request_at_fault_is_not_repeated() {
    let peer = Peer::start().await;
    let (client, ns) = open(&peer).await;
    let chain = ns.chain(&tokens(1));
    peer.script([Fault::Refuse(Code::InvalidArgument, "invalid_field")]);
    let error = client
        .lookup(&ns, &chain, &LookupOptions::default())
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FixRequest);
    let kvclient::Error::Refused {
        reason, message, ..
    } = &error
    else {
        panic!("{error}")
    };
    assert_eq!(*reason, Some(Reason::InvalidField));
    assert_eq!(message, "as the script says: 100%");
    assert_eq!(peer.count("Lookup"), 1);
    assert_eq!(
        client.breaker(),
        BreakerState::Closed,
        "an answer is no failure of the node"
    );
}

#[tokio::test]
async fn silence_ends_at_the_deadline_and_every_call_says_its_own() {
    let peer = Peer::start().await;
    let (client, ns) = open(&peer).await;
    let client = client.with_deadline(Duration::from_millis(150));
    let chain = ns.chain(&tokens(1));
    let data = bytes(0, 100);
    let block = [PutBlock::new(0, &data)];
    peer.script([Fault::Silence; 6]);
    // Between the deadline of these calls and the client's own of five seconds.
    let slack = Duration::from_millis(1500);
    macro_rules! check {
        ($call:expr) => {
            let outcome = within_awake(slack, $call)
                .await
                .expect("each call ends at its deadline");
            let error = outcome.map(|_| ()).expect_err("nobody answers");
            assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
        };
    }
    check!(client.lookup(&ns, &chain, &LookupOptions::default()));
    check!(client.get(&ns, &chain, None));
    check!(client.put(&ns, &chain, &block, PutOptions::default()));
    check!(client.stats());
    check!(client.invalidate(&ns, Target::All));
    for seen in peer.seen() {
        // What was left of the 150 ms when the request was written.
        let timeout = seen.timeout.as_deref().and_then(|t| t.strip_suffix('m'));
        let left_ms: u64 = timeout.expect("in milliseconds").parse().unwrap();
        assert!((1..=150).contains(&left_ms), "{seen:?}");
    }
}

#[tokio::test]
async fn failures_in_a_row_open_the_breaker_in_the_middle_of_a_call() {
    let peer = Peer::start().await;
    let client = touchy(&peer.endpoint(), 3).connect().await.unwrap();
    peer.script([UNAVAILABLE; 3]);
    assert!(client.stats().await.unwrap_err().is_unavailable());
    assert_eq!(client.breaker(), BreakerState::Open);
    let calls = peer.count("Stats");
    let refused = client.stats().await.unwrap_err();
    assert!(
        matches!(refused, kvclient::Error::BreakerOpen { .. }),
        "{refused}"
    );
    assert_eq!(peer.count("Stats"), calls, "an open breaker sends nothing");
}

/// A way to a peer that closes, when told to, the next connection on which a client says anything.
async fn hurdle(peer: &Peer) -> (String, Arc<AtomicBool>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (here, there) = (listener.local_addr().unwrap(), peer.address);
    let is_armed = Arc::new(AtomicBool::new(false));
    let closes = Arc::clone(&is_armed);
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let closes = Arc::clone(&closes);
            tokio::spawn(async move {
                let node = TcpStream::connect(there).await.unwrap();
                let (mut up, mut down) = (client.into_split(), node.into_split());
                let asks = async {
                    let mut bytes = vec![0; 1 << 16];
                    while let Ok(read @ 1..) = up.0.read(&mut bytes).await {
                        if closes.swap(false, Ordering::Relaxed) {
                            return;
                        }
                        down.1.write_all(&bytes[..read]).await.unwrap();
                    }
                };
                tokio::select! {
                    () = asks => {}
                    _ = tokio::io::copy(&mut down.0, &mut up.1) => {}
                }
            });
        }
    });
    (here.to_string(), is_armed)
}

#[tokio::test]
async fn a_kept_connection_that_the_node_closes_says_nothing_against_the_node() {
    let peer = Peer::start().await;
    let (endpoint, closes) = hurdle(&peer).await;
    let client = touchy(&endpoint, 1).connect().await.unwrap();
    client.stats().await.unwrap();
    closes.store(true, Ordering::Relaxed);
    client.stats().await.unwrap();
    assert!(!closes.load(Ordering::Relaxed), "the first try met it");
    assert_eq!(client.breaker(), BreakerState::Closed);
    assert_eq!(peer.count("Stats"), 2);
}

#[tokio::test]
async fn an_open_breaker_lets_a_probe_through_when_its_time_is_over() {
    let peer = Peer::start().await;
    let clock = Arc::new(ManualClock::new(1));
    let client = Client::builder(&peer.endpoint())
        .connections(1)
        .clock(clock.clone())
        .breaker(kvclient::BreakerPolicy {
            failures: 1,
            open_for: Duration::from_millis(100),
            open_cap: HOUR,
        })
        .connect()
        .await
        .unwrap();
    peer.script([UNAVAILABLE; 2]);
    assert!(client.stats().await.unwrap_err().is_unavailable());
    clock.advance(Duration::from_millis(99));
    let refused = client.stats().await.unwrap_err();
    assert!(
        matches!(refused, kvclient::Error::BreakerOpen { .. }),
        "{refused}"
    );
    assert_eq!(peer.count("Stats"), 1);
    // The probe fails and doubles the time.
    clock.advance(Duration::from_millis(1));
    assert!(client.stats().await.unwrap_err().is_unavailable());
    clock.advance(Duration::from_millis(199));
    assert!(client.stats().await.is_err());
    assert_eq!(peer.count("Stats"), 2);
    clock.advance(Duration::from_millis(1));
    client.stats().await.unwrap();
    assert_eq!(client.breaker(), BreakerState::Closed);
}

#[tokio::test]
async fn a_node_that_answers_pings_is_probed_at_once_after_a_deadline() {
    let peer = Peer::start().await;
    let client = touchy(&peer.endpoint(), 1).connect().await.unwrap();
    peer.script([Fault::Silence]);
    let hasty = client.with_deadline(Duration::from_millis(50));
    assert!(hasty.stats().await.unwrap_err().is_unavailable());
    // Only the PONG can have let a call through: the breaker's own time is an hour.
    until("a call passes", async || client.stats().await.is_ok()).await;
}

#[tokio::test]
async fn a_forgotten_namespace_is_opened_again_within_the_call() {
    let peer = Peer::start().await;
    let (client, ns) = open(&peer).await;
    let chain = ns.chain(&tokens(1));
    let forgotten = Fault::Refuse(Code::NotFound, "unknown_namespace");
    peer.script([forgotten]);
    client
        .lookup(&ns, &chain, &LookupOptions::default())
        .await
        .unwrap();
    peer.script([forgotten]);
    client.get(&ns, &chain, None).await.unwrap();
    peer.change_secret();
    peer.script([forgotten]);
    let error = client.get(&ns, &chain, None).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refresh, "{error}");
}

#[tokio::test]
async fn a_dropped_lease_is_given_back_and_a_void_one_is_not() {
    let (peer, client, ns, chain, _) = with_one_block(100).await;
    let found = client
        .lookup(&ns, &chain, &LookupOptions::default())
        .await
        .unwrap();
    drop(found);
    eventually("it is given back", || peer.count("Release") == 1).await;
    let released = peer
        .seen()
        .into_iter()
        .find(|s| s.method == "Release")
        .unwrap();
    assert_eq!(released.detail[..], 77_u64.to_le_bytes());

    let found = client
        .lookup(&ns, &chain, &LookupOptions::default())
        .await
        .unwrap();
    let lease = found.lease.unwrap();
    assert!(lease.is_current());
    peer.reboot();
    client.stats().await.unwrap();
    assert!(!lease.is_current());
    assert_eq!(client.reboots(), 1);
    drop(lease);
    client.stats().await.unwrap();
    assert_eq!(peer.count("Release"), 1, "another life's lease is nobody's");
}

#[tokio::test]
async fn a_lease_is_renewed_and_released_by_hand() {
    let (_peer, client, ns, chain, _) = with_one_block(100).await;
    let found = client
        .lookup(&ns, &chain, &LookupOptions::default())
        .await
        .unwrap();
    let mut lease = found.lease.unwrap();
    assert!(
        client
            .renew(&mut lease, Duration::from_secs(30))
            .await
            .unwrap()
    );
    assert_eq!(lease.ttl(), Duration::from_secs(30));
    assert!(client.release(lease).await.unwrap());
}

#[tokio::test]
async fn a_large_request_is_cut_into_bounded_calls_and_joined_in_order() {
    let peer = Peer::start().await;
    let (client, ns) = open(&peer).await;
    let chain = ns.chain(&tokens(1100));
    let data: Vec<Vec<u8>> = (0..1100_u32).map(|i| i.to_le_bytes().to_vec()).collect();
    let blocks: Vec<_> = data
        .iter()
        .enumerate()
        .map(|(i, d)| PutBlock::new(i, d))
        .collect();
    let put = client
        .put(&ns, &chain, &blocks, PutOptions::default())
        .await
        .unwrap();
    assert_eq!(put.len(), 1100);
    assert_eq!(peer.count("Put"), 3);
    let fetched = client.get(&ns, &chain, None).await.unwrap();
    assert!(
        fetched
            .iter()
            .zip(&data)
            .all(|(f, d)| f.bytes.as_ref().unwrap() == d)
    );
    let mut memory = vec![0; 4400];
    let mut buffers = split_buffers(&mut memory, 4).unwrap();
    let got = client
        .get_into(&ns, &chain, None, &mut buffers)
        .await
        .unwrap();
    assert!(got.iter().all(kvclient::Got::is_hit));
    assert_eq!(memory, data.concat());
    assert_eq!(peer.count("Get"), 6);
}

#[tokio::test]
async fn a_chain_of_another_namespace_is_refused_before_it_is_sent() {
    let peer = Peer::start().await;
    let (client, ns) = open(&peer).await;
    let mut chain = ns.chain(&tokens(2));
    chain.first_index = 1;
    let error = client
        .lookup(&ns, &chain, &LookupOptions::default())
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FixRequest, "{error}");
    assert_eq!(peer.seen().len(), 0);
}

#[tokio::test]
async fn events_come_in_order_and_say_what_was_missed() {
    let peer = Peer::start().await;
    let (client, _) = open(&peer).await;
    let mut watch = client.watch(None, Duration::from_secs(60)).await.unwrap();
    let mut next = async || watch.next().await.map(|notice| notice.heard);
    let Some(Heard::Listening { boot, missed, .. }) = next().await else {
        panic!("it says from when on it hears")
    };
    assert_eq!((boot.0, missed), (1, None));
    let Some(Heard::Event { sequence, event }) = next().await else {
        panic!("an event")
    };
    let WatchEvent::Stored(block) = event else {
        panic!("{event:?}")
    };
    assert_eq!((sequence, block.key.hash), (1, SequenceHash([2; 32])));
    let Some(Heard::Event { sequence, event }) = next().await else {
        panic!("an event")
    };
    assert_eq!((sequence, event), (5, WatchEvent::Lagged(3)));
    assert!(next().await.is_none());
}
