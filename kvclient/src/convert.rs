//! Stand-in until kvproto's own conversions land.

use bytes::{Bytes, BytesMut};
use kvproto::{
    BlockHeader, BlockKey, Chain, FieldError, Namespace, NamespaceId, Part, Place, RunHash,
    SequenceHash, v1,
};

pub(crate) fn spec(n: &Namespace) -> v1::NamespaceSpec {
    v1::NamespaceSpec {
        label: n.label.clone(),
        model: n.model.clone(),
        weights: n.weights.clone(),
        tokenizer: n.tokenizer.clone(),
        kv_dtype: n.kv_dtype.clone(),
        layers: n.layout.layers,
        kv_heads: n.layout.kv_heads,
        head_size: n.layout.head_size,
        packing: n.layout.packing.clone(),
        block_tokens: n.block_tokens,
        run_blocks: n.run_blocks,
        tensor_parallel: n.world.tensor,
        pipeline_parallel: n.world.pipeline,
        context_parallel: n.world.context,
        engine_class: n.engine_class.clone(),
    }
}

pub(crate) fn chain(c: &Chain) -> v1::Chain {
    let mut hashes = BytesMut::with_capacity(32 * c.hashes.len());
    for hash in &c.hashes {
        hashes.extend_from_slice(&hash.0);
    }
    v1::Chain {
        hashes: hashes.freeze(),
        first_index: c.first_index,
        run_hash: c
            .run
            .map_or_else(Bytes::new, |h| Bytes::copy_from_slice(&h.0)),
        parent_hash: c
            .parent
            .map_or_else(Bytes::new, |h| Bytes::copy_from_slice(&h.0)),
    }
}

pub(crate) fn part(p: Part) -> v1::Part {
    v1::Part {
        rank: p.rank.into(),
        layer_group: p.layer_group.into(),
    }
}

pub(crate) fn header(h: &BlockHeader) -> v1::BlockHeader {
    v1::BlockHeader {
        hash: Bytes::copy_from_slice(&h.key.hash.0),
        part: Some(part(h.key.part)),
        index: h.place.index,
        run_hash: Bytes::copy_from_slice(&h.place.run.0),
        parent_hash: h
            .place
            .parent
            .map_or_else(Bytes::new, |p| Bytes::copy_from_slice(&p.0)),
        length_bytes: h.length_bytes,
        page_sums: h.page_sums.to_vec(),
        seal: h.seal,
    }
}

pub(crate) fn block_header(
    namespace: NamespaceId,
    h: &v1::BlockHeader,
) -> Result<BlockHeader, FieldError> {
    let width = |field| FieldError::new(field, "has the wrong width");
    let p = h.part.unwrap_or_default();
    let coordinate = |n: u32| u16::try_from(n).map_err(|_| width("header.part"));
    Ok(BlockHeader {
        key: BlockKey {
            namespace,
            hash: SequenceHash::from_slice(&h.hash).ok_or_else(|| width("header.hash"))?,
            part: Part {
                rank: coordinate(p.rank)?,
                layer_group: coordinate(p.layer_group)?,
            },
        },
        place: Place {
            run: RunHash::from_slice(&h.run_hash).ok_or_else(|| width("header.run_hash"))?,
            index: h.index,
            parent: match &h.parent_hash[..] {
                [] => None,
                hash => Some(
                    SequenceHash::from_slice(hash).ok_or_else(|| width("header.parent_hash"))?,
                ),
            },
        },
        length_bytes: h.length_bytes,
        page_sums: h.page_sums.as_slice().into(),
        seal: h.seal,
    })
}
