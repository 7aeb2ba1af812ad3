//! What the tests of our own client share: bytes to put, a put that must succeed, and a look at what came back.

use std::time::Duration;

use kvclient::{
    BreakerPolicy, Chain, Client, ClientBuilder, GetOutcome, Got, LocalPath, LookupOptions,
    NamespaceHandle, PutBlock, PutOptions, PutOutcome,
};

use crate::patience::within_awake;

/// Longer than any test.
pub const HOUR: Duration = Duration::from_secs(3600);

/// Bytes that differ by seed, by place and from page to page.
#[must_use]
pub fn bytes(seed: u8, len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| (i as u8).wrapping_mul(31) ^ (i >> 8) as u8 ^ seed)
        .collect()
}

/// Puts blocks into RAM, each of which must end as `outcome`.
///
/// # Panics
/// When one does not, or the call fails.
pub async fn put_as(
    client: &Client,
    namespace: &NamespaceHandle,
    chain: &Chain,
    blocks: &[PutBlock<'_>],
    outcome: PutOutcome,
) {
    let put = client
        .put(namespace, chain, blocks, PutOptions::default())
        .await
        .expect("a put is answered");
    let all = put.iter().all(|result| result.outcome == outcome);
    assert!(put.len() == blocks.len() && all, "{put:?}");
}

/// [`put_as`] of blocks that nobody has put before.
///
/// # Panics
/// When one is not kept, or the call fails.
pub async fn put_new(
    client: &Client,
    namespace: &NamespaceHandle,
    chain: &Chain,
    blocks: &[PutBlock<'_>],
) {
    put_as(client, namespace, chain, blocks, PutOutcome::Cached).await;
}

/// Checks that each block of `data` is a hit and lies at the beginning of its buffer.
///
/// # Panics
/// When one is not, or does not.
pub fn assert_landed(got: &[Got], buffers: &[&mut [u8]], data: &[Vec<u8>]) {
    for (i, data) in data.iter().enumerate() {
        let hit = (GetOutcome::Hit, data.len());
        assert_eq!((got[i].outcome, got[i].length_bytes), hit, "block {i}");
        assert!(buffers[i][..data.len()] == data[..], "block {i}");
    }
}

/// Checks that a call with this deadline ends by it, and says that nobody is there.
///
/// # Panics
/// When it takes longer, succeeds, or fails otherwise.
pub async fn assert_unavailable<T>(
    deadline: Duration,
    call: impl Future<Output = Result<T, kvclient::Error>>,
) {
    let slack = deadline + Duration::from_millis(400);
    let outcome = within_awake(slack, call)
        .await
        .expect("the call ends at its deadline");
    let error = outcome.err().expect("nobody is there to answer");
    assert!(error.is_unavailable(), "{error}");
}

/// One of every call that moves blocks, each of which ends by this deadline and says that nobody is there.
///
/// # Panics
/// As [`assert_unavailable`].
pub async fn assert_no_blocks_move(
    deadline: Duration,
    client: &Client,
    namespace: &NamespaceHandle,
    chain: &Chain,
) {
    let (mut buffer, block) = ([0; 4096], [PutBlock::new(0, vec![1; 4096])]);
    let options = LookupOptions::default();
    assert_unavailable(deadline, client.lookup(namespace, chain, &options)).await;
    let into: &mut [&mut [u8]] = &mut [&mut buffer];
    assert_unavailable(deadline, client.get_into(namespace, chain, None, into)).await;
    let into = &mut [vec![&mut buffer[..]]];
    assert_unavailable(deadline, client.get_scattered(namespace, chain, None, into)).await;
    assert_unavailable(deadline, client.get(namespace, chain, None)).await;
    let options = PutOptions::default();
    assert_unavailable(deadline, client.put(namespace, chain, &block, options)).await;
}

/// A client with one connection whose breaker opens after so many failures, for an hour.
pub fn touchy(endpoint: &str, failures: u32) -> ClientBuilder {
    let breaker = BreakerPolicy {
        failures,
        open_for: HOUR,
        open_cap: HOUR,
    };
    Client::builder(endpoint).connections(1).breaker(breaker)
}

/// A client that takes no way but gRPC.
///
/// # Panics
/// When the endpoint is none.
pub async fn over_grpc(endpoint: &str) -> Client {
    let client = Client::builder(endpoint).local(LocalPath::Off);
    client.connect().await.expect("a client")
}
