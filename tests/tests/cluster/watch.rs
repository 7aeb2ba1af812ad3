//! A watch over several members: what happens at each of them, and what becomes of them.

use std::{collections::BTreeMap, time::Duration};

use kvclient::{
    Chain, Client, Heard, LocalPath, Namespace, NamespaceHandle, Notice, PutBlock, PutOptions,
    SequenceHash, Target, Watch, WatchEvent,
};
use kvproto::{Member, MemberState};
use kvtests::{circle::Circle, node::filled, patience::HANG, wires::Gate};

const RUN_BLOCKS: u32 = 4;
/// So many runs that each of three has some.
const BLOCKS: usize = 192;
const LIFETIME: Duration = Duration::from_secs(600);

async fn connect(endpoint: &str) -> (Client, NamespaceHandle) {
    let client = Client::builder(endpoint).local(LocalPath::Off);
    let client = client.connect().await.expect("a client");
    let spec = Namespace::opaque("watch", 16, RUN_BLOCKS);
    let ns = client
        .open_namespace(&spec, false)
        .await
        .expect("a namespace");
    (client, ns)
}

fn chain(ns: &NamespaceHandle, seed: u32, blocks: u32) -> Chain {
    let tokens = (0..16 * blocks).map(|i| seed * 1_000_003 + i);
    ns.chain(&tokens.collect::<Vec<u32>>())
}

async fn put(client: &Client, ns: &NamespaceHandle, chain: &Chain) {
    let blocks: Vec<_> = (0..chain.len())
        .map(|i| PutBlock::new(i, filled(i as u32, 3000).to_vec()))
        .collect();
    let put = client.put(ns, chain, &blocks, PutOptions::default()).await;
    assert!(
        put.expect("results")
            .iter()
            .all(kvclient::PutResult::is_kept)
    );
}

async fn next(watch: &mut Watch) -> Notice {
    let notice = tokio::time::timeout(HANG, watch.next()).await;
    notice.expect("it comes").expect("the watch goes on")
}

/// So many events; by whom which block was stored or removed.
async fn events(watch: &mut Watch, count: usize) -> Vec<(String, WatchEvent)> {
    let mut events = Vec::new();
    while events.len() < count {
        let Notice { member, heard } = next(watch).await;
        match heard {
            Heard::Event { event, .. } => events.push((member.id.clone(), event)),
            heard => panic!("{}: {heard:?}", member.id),
        }
    }
    events
}

/// The members that are heard from now on.
async fn heard_of(watch: &mut Watch, count: usize) -> Vec<String> {
    let mut ids = Vec::new();
    while ids.len() < count {
        let Notice { member, heard } = next(watch).await;
        let Heard::Listening { missed: None, .. } = heard else {
            panic!("{}: {heard:?}", member.id);
        };
        ids.push(member.id.clone());
    }
    ids.sort();
    ids
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_hears_every_member_each_in_its_order() {
    let circle = Circle::start(3).await;
    let (client, ns) = connect(&circle.endpoint(1)).await;
    let mut watch = client.watch(Some(&ns), LIFETIME).await.unwrap();
    assert_eq!(heard_of(&mut watch, 3).await, ["n0", "n1", "n2"]);

    let chain = chain(&ns, 1, BLOCKS as u32);
    put(&client, &ns, &chain).await;
    let mut stored: BTreeMap<String, Vec<SequenceHash>> = BTreeMap::new();
    for (id, event) in events(&mut watch, BLOCKS).await {
        let WatchEvent::Stored(block) = event else {
            panic!("{event:?}")
        };
        stored.entry(id).or_default().push(block.key.hash);
    }
    let roster = circle.nodes[0].node.cluster().roster();
    for (id, hashes) in &stored {
        let owned = (0..BLOCKS).filter(|i| {
            let run = chain.place(*i, RUN_BLOCKS).run;
            roster.placement.first(&run).unwrap().0 == *id
        });
        let owned: Vec<SequenceHash> = owned.map(|i| chain.hashes[i]).collect();
        assert_eq!(*hashes, owned, "{id}");
    }
    assert_eq!(stored.len(), 3);
    client.invalidate(&ns, Target::All).await.unwrap();
    let removed = events(&mut watch, BLOCKS).await;
    assert!(
        removed
            .iter()
            .all(|(_, event)| matches!(event, WatchEvent::Removed(_)))
    );
    drop(watch);
    circle.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn members_that_come_and_go_are_told_of_to_a_client_that_does_nothing_else() {
    let circle = Circle::start_strangers(3, |_| {}).await;
    circle.acquaint(0..2);
    let (client, ns) = connect(&circle.endpoint(0)).await;
    let mut watch = client.watch(Some(&ns), LIFETIME).await.unwrap();
    assert_eq!(heard_of(&mut watch, 2).await, ["n0", "n1"]);

    circle.acquaint(0..3);
    let joined = next(&mut watch).await;
    assert!(matches!(joined.heard, Heard::Joined), "{joined:?}");
    assert_eq!(joined.member.id, "n2");
    assert_eq!(heard_of(&mut watch, 1).await, ["n2"]);

    let left = Member {
        state: MemberState::Gone,
        version: circle.member(2).version + 1,
        ..circle.member(2)
    };
    circle.tell(0, [left.clone()]);
    let left = next(&mut watch).await;
    assert!(matches!(left.heard, Heard::Left), "{left:?}");
    assert_eq!(left.member.id, "n2");
    drop(watch);
    circle.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_breaks_is_opened_again_and_says_how_much_was_missed() {
    let circle = Circle::start(2).await;
    let gate = Gate::before(circle.nodes[1].node.grpc_addr()).await;
    let elsewhere = Member {
        version: circle.member(1).version + 1,
        address: gate.url(),
        ..circle.member(1)
    };
    circle.tell(0, [elsewhere]);
    let (client, ns) = connect(&circle.endpoint(0)).await;
    let (writer, its) = connect(&circle.endpoint(1)).await;
    // Of blocks that n1 owns.
    let roster = circle.nodes[1].node.cluster().roster();
    let mut of_n1 = (1..)
        .map(|seed| chain(&its, seed, RUN_BLOCKS))
        .filter(|chain| {
            let run = chain.place(0, RUN_BLOCKS).run;
            roster.placement.first(&run).unwrap().0 == "n1"
        });
    let mut watch = client.watch(Some(&ns), LIFETIME).await.unwrap();
    assert_eq!(heard_of(&mut watch, 2).await, ["n0", "n1"]);
    put(&writer, &its, &of_n1.next().unwrap()).await;
    assert_eq!(events(&mut watch, 4).await.len(), 4);

    gate.close();
    gate.cut();
    let lost = next(&mut watch).await;
    assert!(matches!(lost.heard, Heard::Lost(_)), "{lost:?}");
    put(&writer, &its, &of_n1.next().unwrap()).await;
    put(&writer, &its, &of_n1.next().unwrap()).await;
    gate.open();
    let again = next(&mut watch).await;
    let Heard::Listening { missed, .. } = again.heard else {
        panic!("{again:?}");
    };
    assert_eq!((again.member.id.as_str(), missed), ("n1", Some(8)));
    put(&writer, &its, &of_n1.next().unwrap()).await;
    let after = events(&mut watch, 4).await;
    assert!(after.iter().all(|(id, _)| id == "n1"));

    // Again and again, with nothing heard in between.
    for _ in 0..2 {
        gate.close();
        gate.cut();
        let lost = next(&mut watch).await;
        assert!(matches!(lost.heard, Heard::Lost(_)), "{lost:?}");
        gate.open();
        let again = next(&mut watch).await;
        let is_whole = matches!(
            again.heard,
            Heard::Listening {
                missed: Some(0),
                ..
            }
        );
        assert!(is_whole, "{again:?}");
    }
    drop(watch);
    circle.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_ends_with_its_time_and_fails_when_nobody_is_there() {
    let circle = Circle::start(2).await;
    let (client, ns) = connect(&circle.endpoint(0)).await;
    let mut watch = client
        .watch(Some(&ns), Duration::from_millis(300))
        .await
        .unwrap();
    assert_eq!(heard_of(&mut watch, 2).await.len(), 2);
    let end = tokio::time::timeout(HANG, watch.next()).await;
    assert!(end.expect("it ends").is_none());
    circle.stop().await;
    let error = client.watch(None, LIFETIME).await.unwrap_err();
    assert!(error.is_unavailable(), "{error}");
}
