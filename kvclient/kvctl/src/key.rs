//! A key that a person can type, as a chain of blocks.
//!
//! ```text
//! "mykey" ─► block 0  the label: {"length_bytes":…,"block_bytes":…,"put_id":…} as JSON
//!            block 1… the bytes, cut into block_bytes
//!            hash 0 = engine hash of (key, 0)      hash i = engine hash of (key, i, put_id)
//! ```
//!
//! Why a label: who asks for a key knows neither its length nor its number of blocks, and a lookup needs
//! both. Why the label's hash does not depend on the bytes: a person wants to find a key by its name alone. The rest is
//! named after the put that wrote it, so that a block which another put left behind is never taken for one of this one's;
//! the label alone has to be forgotten before another is put.
//! Why a key is forgotten block by block ([`forget`]) and not as a prefix: its runs lie with several members, and below a
//! prefix goes all that might hang there; of a run whose beginning lies elsewhere a member cannot say that it does not.

use anyhow::{Context as _, Result, bail, ensure};
use futures_util::{StreamExt as _, TryStreamExt as _, future::ready, stream};
use kvclient::{Chain, Client, GetOutcome, NamespaceHandle, SequenceHash, Target};
use serde::{Deserialize, Serialize};

/// Most blocks under one key, the label included.
pub(crate) const MAX_BLOCKS: u64 = kvproto::hash::MAX_CHAIN_BLOCKS as u64;

/// Blocks that are being forgotten at once.
const FORGOTTEN_AT_ONCE: usize = 64;

/// What block 0 of a key says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Label {
    pub(crate) length_bytes: u64,
    pub(crate) block_bytes: u64,
    /// Of the put that wrote it; 0 where puts had none yet.
    #[serde(default)]
    pub(crate) put_id: u64,
}

impl Label {
    /// Blocks of a key with this label, the label included.
    pub(crate) fn blocks(&self) -> u64 {
        1 + self.length_bytes.div_ceil(self.block_bytes)
    }

    /// Bytes of block `index`.
    pub(crate) fn block_len(&self, index: u64) -> usize {
        let start = (index - 1) * self.block_bytes;
        (self.length_bytes - start).min(self.block_bytes) as usize
    }
}

/// The blocks of a key with this label.
pub(crate) fn chain(namespace: &NamespaceHandle, key: &str, label: &Label) -> Chain {
    let put_id = label.put_id.to_le_bytes();
    let names: Vec<Vec<u8>> = (0..label.blocks())
        .map(|index| {
            let of_put: &[u8] = match (index, label.put_id) {
                (0, _) | (_, 0) => &[],
                _ => &put_id,
            };
            [key.as_bytes(), b"\0", &index.to_le_bytes(), of_put].concat()
        })
        .collect();
    namespace.engine_chain(&names)
}

/// What is known of a key without its label: where that is.
pub(crate) fn first(namespace: &NamespaceHandle, key: &str) -> Chain {
    namespace.engine_chain(&[[key.as_bytes(), b"\0", &0_u64.to_le_bytes()].concat()])
}

/// The block a person means: 64 hex digits name a hash, anything else a key's first block.
pub(crate) fn block(namespace: &NamespaceHandle, text: &str) -> SequenceHash {
    text.parse()
        .unwrap_or_else(|_| first(namespace, text).hashes[0])
}

/// Forgets these blocks, the first one first: without its label nobody looks for the rest of a key. Answers how many
/// there were.
pub(crate) async fn forget(
    client: &Client,
    namespace: &NamespaceHandle,
    chain: &Chain,
) -> Result<u64, kvclient::Error> {
    let forget = |hash: &SequenceHash| client.invalidate(namespace, Target::Block(*hash));
    let label = forget(&chain.hashes[0]).await?;
    stream::iter(&chain.hashes[1..])
        .map(forget)
        .buffer_unordered(FORGOTTEN_AT_ONCE)
        .try_fold(label, |blocks, more| ready(Ok(blocks + more)))
        .await
}

/// Whether the block after the first `present` is there all the same, or there is none: a lookup does not wait for a
/// member that takes longer than the others; a get does.
pub(crate) async fn is_next_there(
    client: &Client,
    namespace: &NamespaceHandle,
    chain: &Chain,
    present: usize,
) -> Result<bool, kvclient::Error> {
    if present == chain.len() {
        return Ok(true);
    }
    let next = chain.slice(present..present + 1, namespace.run_blocks());
    let got = client.get(namespace, &next, None).await?;
    Ok(got.iter().all(|block| block.bytes.is_some()))
}

/// The label of a key, if it is there.
pub(crate) async fn label(
    client: &Client,
    namespace: &NamespaceHandle,
    key: &str,
) -> Result<Option<Label>> {
    let first = first(namespace, key);
    let fetched = client.get(namespace, &first, None).await?.remove(0);
    match (fetched.outcome, fetched.bytes) {
        (GetOutcome::Hit, Some(bytes)) => {
            let label: Label = serde_json::from_slice(&bytes)
                .with_context(|| format!("key {key:?} was not put by kvctl"))?;
            ensure!(
                label.block_bytes > 0 && label.blocks() <= MAX_BLOCKS,
                "key {key:?} has a label that makes no sense: {label:?}"
            );
            Ok(Some(label))
        }
        (GetOutcome::Miss | GetOutcome::Invalidated, _) => Ok(None),
        (GetOutcome::Node, _) => bail!(
            "the member that has key {key:?} does not answer; see `kvctl cluster`, and try again when it is back, or gone from there"
        ),
        (outcome, _) => bail!("key {key:?} cannot be read: {outcome}"),
    }
}

#[cfg(test)]
mod tests {
    use super::Label;

    #[test]
    fn blocks_cover_the_bytes_and_no_more() {
        for (length_bytes, blocks, last) in [
            (0, 1, None),
            (1, 2, Some(1)),
            (8, 2, Some(8)),
            (9, 3, Some(1)),
        ] {
            let label = Label {
                length_bytes,
                block_bytes: 8,
                put_id: 1,
            };
            assert_eq!(label.blocks(), blocks);
            if let Some(last) = last {
                assert_eq!(label.block_len(blocks - 1), last);
            }
        }
    }
}
