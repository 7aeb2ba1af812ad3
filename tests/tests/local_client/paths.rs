//! Which path is taken, and that it makes no difference to the bytes.

use kvclient::{GetOutcome, LocalPath, LookupOptions, Path, PutBlock, PutOptions, PutOutcome};
use kvtests::node::TestNode;

use crate::{MIB, assert_is_local, builder, chain, get, open, over_grpc, put};

const LENGTHS: [usize; 7] = [1, 4095, 65_536, 65_537, 300_001, MIB, 5 * MIB + 3];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_of_every_size_are_the_same_by_either_path() {
    let node = TestNode::start(|_| {}).await;
    let local = builder(&node).connect().await.unwrap();
    let grpc = over_grpc(&node).await;
    let ns = open(&local).await;
    open(&grpc).await;
    let total: usize = LENGTHS.iter().sum();
    for (writer, seed) in [(&local, 1), (&grpc, 2)] {
        let chain = chain(&ns, seed, LENGTHS.len() as u32);
        let data = put(writer, &ns, &chain, &LENGTHS).await;
        for reader in [&local, &grpc] {
            assert!(get(reader, &ns, &chain, &LENGTHS).await == data);
        }
    }
    assert_is_local(&local);
    let report = local.path();
    assert_eq!(report.grpc, kvclient::Traffic::default(), "{report:?}");
    assert_eq!(report.local.put_blocks, LENGTHS.len() as u64);
    assert_eq!(report.local.put_bytes, total as u64);
    assert_eq!(report.local.got_blocks, 2 * LENGTHS.len() as u64);
    assert_eq!(report.local.got_bytes, 2 * total as u64);
    let report = grpc.path();
    assert_eq!(report.path, Path::Grpc);
    assert_eq!(report.why_grpc.as_deref(), Some("switched off"));
    assert_eq!(report.local, kvclient::Traffic::default());
    assert_eq!(report.grpc.got_blocks, 2 * LENGTHS.len() as u64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pieces_go_straight_out_of_and_into_shared_memory() {
    let node = TestNode::start(|_| {}).await;
    let client = builder(&node).connect().await.unwrap();
    let ns = open(&client).await;
    let chain = chain(&ns, 1, LENGTHS.len() as u32);
    let data: Vec<Vec<u8>> = LENGTHS
        .iter()
        .map(|&length| kvtests::node::filled(9, length).to_vec())
        .collect();
    let blocks: Vec<_> = data
        .iter()
        .enumerate()
        .map(|(i, bytes)| PutBlock::new(i, bytes.chunks(20_011).collect::<Vec<_>>()))
        .collect();
    let results = client
        .put(&ns, &chain, &blocks, PutOptions::default())
        .await
        .unwrap();
    assert!(
        results
            .iter()
            .all(|result| result.outcome == PutOutcome::Cached),
        "{results:?}"
    );
    let mut memory: Vec<Vec<u8>> = LENGTHS.iter().map(|&length| vec![0xee; length]).collect();
    let mut pieces: Vec<Vec<&mut [u8]>> = memory
        .iter_mut()
        .map(|bytes| bytes.chunks_mut(7_001).collect())
        .collect();
    let got = client
        .get_scattered(&ns, &chain, None, &mut pieces)
        .await
        .unwrap();
    assert!(got.iter().all(kvclient::Got::is_hit), "{got:?}");
    assert!(memory == data);
    let fetched = client.get(&ns, &chain, None).await.unwrap();
    for (fetched, data) in fetched.iter().zip(&data) {
        assert_eq!(fetched.bytes.as_deref(), Some(&data[..]));
    }
    assert_eq!(client.path().grpc.calls, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leases_are_the_owners_by_whichever_path() {
    let node = TestNode::start(|_| {}).await;
    let owner = kvclient::OwnerId([7; 16]);
    let local = builder(&node).owner(owner).connect().await.unwrap();
    let grpc = builder(&node)
        .owner(owner)
        .local(LocalPath::Off)
        .connect()
        .await
        .unwrap();
    let ns = open(&local).await;
    open(&grpc).await;
    let chain = chain(&ns, 1, 4);
    let data = put(&local, &ns, &chain, &[MIB; 4]).await;
    for (taker, user) in [(&local, &grpc), (&grpc, &local)] {
        let found = taker
            .lookup(&ns, &chain, &LookupOptions::default())
            .await
            .unwrap();
        assert_eq!((found.present_blocks, found.leased_blocks()), (4, 4));
        let mut lease = found.lease.unwrap();
        let same = user.lease_of_owner(lease.id());
        let fetched = user.get(&ns, &chain, &same).await.unwrap();
        for (fetched, data) in fetched.iter().zip(&data) {
            assert_eq!(fetched.bytes.as_deref(), Some(&data[..]));
        }
        assert!(
            lease
                .renew(std::time::Duration::from_secs(20))
                .await
                .unwrap()
        );
        let id = lease.id();
        assert!(lease.release().await.unwrap());
        let gone = user.lease_of_owner(id);
        let fetched = user.get(&ns, &chain, &gone).await.unwrap();
        assert!(
            fetched
                .iter()
                .all(|block| block.outcome == GetOutcome::Expired),
            "{fetched:?}"
        );
    }
    assert_is_local(&local);
    assert_eq!(local.stats().await.unwrap().leases, 0);
}
