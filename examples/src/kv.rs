//! A sequence's KV cache, and how it becomes blocks and comes back.
//!
//! ```text
//! in the model:   per layer  K, V  [kv_heads, tokens, head_size]
//! one block:      [layers, 2, kv_heads, block_tokens, head_size]  f32 little-endian, contiguous
//! ```
//!
//! A block holds *all* layers of `block_tokens` consecutive tokens, K before V in each layer, so a
//! prefix of n blocks is everything a decoder needs in order to go on at token n · block_tokens.
//! Errors: a block of the wrong length; candle's own.
//! Why copy and not alias: a block groups by token range, the model by layer, so one transposition
//! lies between them. On a GPU that is the gather or scatter kernel of an engine's connector.

use std::ops::Range;

use bytes::Bytes;
use candle_core::{Device, Result, Tensor};

use crate::model::ModelShape;

/// Keys and values of one sequence, in all layers.
#[derive(Debug, Clone)]
pub struct KvCache {
    shape: ModelShape,
    len: usize,
    layers: Vec<Option<(Tensor, Tensor)>>,
}

impl KvCache {
    /// An empty cache.
    pub fn new(shape: ModelShape) -> Self {
        Self {
            shape,
            len: 0,
            layers: vec![None; shape.layers],
        }
    }

    /// Tokens in it.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True before the first token.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Full blocks in it.
    pub fn blocks(&self) -> usize {
        self.len / self.shape.block_tokens
    }

    /// Adds `[kv_heads, t, head_size]` to one layer and answers all of that layer, contiguous.
    ///
    /// # Errors
    /// What candle reports when the shapes do not fit.
    pub(crate) fn append(
        &mut self,
        layer: usize,
        key: &Tensor,
        value: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let grown = match &self.layers[layer] {
            None => (key.contiguous()?, value.contiguous()?),
            Some((keys, values)) => (join(keys, key)?, join(values, value)?),
        };
        Ok(self.layers[layer].insert(grown).clone())
    }

    /// Counts tokens in, once all layers have them.
    pub(crate) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }

    /// The bytes of some full blocks, in order.
    ///
    /// # Errors
    /// A range beyond the full blocks; what candle reports.
    pub fn export(&self, blocks: Range<usize>) -> Result<Vec<Bytes>> {
        if blocks.end > self.blocks() {
            candle_core::bail!(
                "blocks up to {} asked for, {} are full",
                blocks.end,
                self.blocks()
            );
        }
        let mut out = vec![Vec::with_capacity(self.shape.block_bytes()); blocks.len()];
        for (keys, values) in self.layers.iter().flatten() {
            for side in [keys, values] {
                let floats = side.flatten_all()?.to_vec1::<f32>()?;
                for (block, bytes) in blocks.clone().zip(&mut out) {
                    self.for_each_head(self.len, block, |span| {
                        bytes.extend(floats[span].iter().flat_map(|value| value.to_le_bytes()));
                    });
                }
            }
        }
        Ok(out.into_iter().map(Bytes::from).collect())
    }

    /// A cache that holds exactly these blocks, the first of the sequence first.
    ///
    /// # Errors
    /// A block that is not `block_bytes` long; what candle reports.
    pub fn import(shape: ModelShape, blocks: &[impl AsRef<[u8]>]) -> Result<Self> {
        if let Some(wrong) = blocks
            .iter()
            .find(|block| block.as_ref().len() != shape.block_bytes())
        {
            candle_core::bail!(
                "a block of {} bytes, {} expected",
                wrong.as_ref().len(),
                shape.block_bytes()
            );
        }
        let mut cache = Self::new(shape);
        if blocks.is_empty() {
            return Ok(cache);
        }
        cache.len = blocks.len() * shape.block_tokens;
        let side_bytes = shape.block_bytes() / (shape.layers * 2);
        let span_bytes = side_bytes / shape.kv_heads;
        for layer in 0..shape.layers {
            let side = |which: usize| {
                let mut floats = vec![0.0_f32; cache.len * shape.kv_heads * shape.head_size];
                for (index, block) in blocks.iter().enumerate() {
                    let start = (layer * 2 + which) * side_bytes;
                    let mut spans =
                        block.as_ref()[start..start + side_bytes].chunks_exact(span_bytes);
                    cache.for_each_head(cache.len, index, |to| {
                        let from = spans.next().expect("one span per head");
                        for (value, bytes) in floats[to].iter_mut().zip(from.as_chunks::<4>().0) {
                            *value = f32::from_le_bytes(*bytes);
                        }
                    });
                }
                Tensor::from_vec(
                    floats,
                    (shape.kv_heads, cache.len, shape.head_size),
                    &Device::Cpu,
                )
            };
            let pair = (side(0)?, side(1)?);
            cache.layers[layer] = Some(pair);
        }
        Ok(cache)
    }

    /// Calls `visit` with the span of floats that `block` covers in each head of a flat
    /// `[kv_heads, tokens, head_size]`.
    fn for_each_head(&self, tokens: usize, block: usize, mut visit: impl FnMut(Range<usize>)) {
        let floats = self.shape.block_tokens * self.shape.head_size;
        for head in 0..self.shape.kv_heads {
            let start = head * tokens * self.shape.head_size + block * floats;
            visit(start..start + floats);
        }
    }
}

fn join(old: &Tensor, new: &Tensor) -> Result<Tensor> {
    Tensor::cat(&[old, new], 1)?.contiguous()
}

#[cfg(test)]
mod tests {
    use super::KvCache;
    use crate::model::{Decoder, ModelShape};
    use crate::weights::WeightSource;

    const TINY: ModelShape = ModelShape::TINY;

    fn filled(tokens: u32) -> KvCache {
        let model = Decoder::new(TINY, WeightSource::new(9)).unwrap();
        let mut cache = KvCache::new(TINY);
        let tokens: Vec<u32> = (0..tokens).map(|i| (i * 13) % TINY.vocab as u32).collect();
        model.prefill(&tokens, &mut cache, |_| {}).unwrap();
        cache
    }

    #[test]
    fn import_of_an_export_is_the_same_cache() {
        let cache = filled(48);
        let back = KvCache::import(TINY, &cache.export(0..6).unwrap()).unwrap();
        assert_eq!(back.len(), cache.len());
        for (left, right) in cache
            .layers
            .iter()
            .flatten()
            .zip(back.layers.iter().flatten())
        {
            for (left, right) in [(&left.0, &right.0), (&left.1, &right.1)] {
                assert_eq!(left.dims(), right.dims());
                assert_eq!(left.stride(), right.stride());
                assert_eq!(
                    left.to_vec3::<f32>().unwrap(),
                    right.to_vec3::<f32>().unwrap()
                );
            }
        }
    }

    #[test]
    fn export_of_an_import_is_the_same_bytes() {
        let blocks = filled(48).export(0..6).unwrap();
        assert!(blocks.iter().all(|block| block.len() == TINY.block_bytes()));
        assert_eq!(
            KvCache::import(TINY, &blocks)
                .unwrap()
                .export(0..6)
                .unwrap(),
            blocks
        );
    }

    #[test]
    fn layout_is_layer_side_head_token() {
        let cache = filled(24);
        let block = cache.export(1..2).unwrap().remove(0);
        let (layer, head, token, lane) = (1, 1, 3, 5);
        let value = cache.layers[layer]
            .as_ref()
            .unwrap()
            .1
            .to_vec3::<f32>()
            .unwrap()[head][TINY.block_tokens + token][lane];
        let side = 1;
        let at = (((layer * 2 + side) * TINY.kv_heads + head) * TINY.block_tokens + token)
            * TINY.head_size
            + lane;
        assert_eq!(
            f32::from_le_bytes(block[at * 4..at * 4 + 4].try_into().unwrap()),
            value
        );
    }

    #[test]
    fn only_full_blocks_leave() {
        let cache = filled(20);
        assert_eq!(cache.blocks(), 2);
        assert!(cache.export(0..3).is_err());
    }

    #[test]
    fn a_block_of_another_length_is_refused() {
        assert!(KvCache::import(TINY, &[vec![0; TINY.block_bytes() - 4]]).is_err());
    }
}
