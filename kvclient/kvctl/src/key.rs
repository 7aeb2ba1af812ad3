//! A key that a person can type, as a chain of blocks.
//!
//! ```text
//! "mykey" ─► block 0  the label: {"length_bytes":…,"block_bytes":…} as JSON
//!            block 1… the bytes, cut into block_bytes
//!            hash i = engine hash of (key, i)
//! ```
//!
//! Why a label: who asks for a key knows neither its length nor its number of blocks, and a lookup needs
//! both. Why its hashes do not depend on the bytes: a person wants to find a key by its name alone; so
//! putting other bytes under a known key first forgets the old ones.

use anyhow::{Context as _, Result, bail, ensure};
use kvclient::{Chain, Client, GetOutcome, NamespaceHandle, SequenceHash};
use serde::{Deserialize, Serialize};

/// Most blocks under one key, the label included.
pub(crate) const MAX_BLOCKS: u64 = kvproto::hash::MAX_CHAIN_BLOCKS as u64;

/// What block 0 of a key says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Label {
    pub(crate) length_bytes: u64,
    pub(crate) block_bytes: u64,
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

/// The first `blocks` blocks of a key.
pub(crate) fn chain(namespace: &NamespaceHandle, key: &str, blocks: u64) -> Chain {
    let names: Vec<Vec<u8>> = (0..blocks)
        .map(|index| [key.as_bytes(), b"\0", &index.to_le_bytes()].concat())
        .collect();
    namespace.engine_chain(&names)
}

/// The block a person means: 64 hex digits name a hash, anything else a key's first block.
pub(crate) fn block(namespace: &NamespaceHandle, text: &str) -> SequenceHash {
    text.parse()
        .unwrap_or_else(|_| chain(namespace, text, 1).hashes[0])
}

/// The label of a key, if it is there.
pub(crate) async fn label(
    client: &Client,
    namespace: &NamespaceHandle,
    key: &str,
) -> Result<Option<Label>> {
    let first = chain(namespace, key, 1);
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
            };
            assert_eq!(label.blocks(), blocks);
            if let Some(last) = last {
                assert_eq!(label.block_len(blocks - 1), last);
            }
        }
    }
}
