//! A Llama-style decoder: RMSNorm, grouped-query attention with rotary positions, SwiGLU.
//!
//! ```text
//! tokens [t] ─embed─► x [t, hidden] ─┬─ norm ─ q, k, v ─ rope ─ attend over the cache ─ out ─┐
//!                                    ├◄──────────────────────────── add ─────────────────────┘
//!                                    ├─ norm ─ silu(gate) · up ─ down ─┐     × layers
//!                                    └◄───────────── add ──────────────┘
//! last row ─ norm ─ head ─► logits [vocab]
//! ```
//!
//! Units: lengths in tokens; everything is f32 on the CPU.
//! Errors: candle's own; a token id beyond the vocabulary is one.
//! Why chunks: floating-point sums depend on their order, and a matrix product may pick another
//! order for another shape. Prefill therefore always cuts a prompt at multiples of `chunk_tokens`
//! from its start. A run that reuses the first m chunks then feeds the model exactly the shapes that
//! a run without reuse feeds it from chunk m on, and equal logits *bit for bit* are a fair demand:
//! a difference is a wrong byte, not noise.

use candle_core::{D, DType, Device, Result, Tensor};
use candle_nn::{Embedding, Linear, Module, RmsNorm, ops, rotary_emb};

use crate::kv::KvCache;
use crate::weights::WeightSource;

/// Every size of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModelShape {
    /// Token ids the model knows.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads; a multiple of `kv_heads`.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head; even, for the rotary halves.
    pub head_size: usize,
    /// Width between gate and down.
    pub mlp: usize,
    /// Longest sequence, tokens.
    pub max_tokens: usize,
    /// Prefill step, tokens; a multiple of `block_tokens`.
    pub chunk_tokens: usize,
    /// Tokens of one KV block.
    pub block_tokens: usize,
}

impl ModelShape {
    /// 28 million parameters; 8 KiB of KV per token, so a block of 64 tokens is 512 KiB.
    pub const DEMO: Self = Self {
        vocab: 4096,
        hidden: 512,
        layers: 8,
        heads: 8,
        kv_heads: 2,
        head_size: 64,
        mlp: 1536,
        max_tokens: 16 * 1024,
        chunk_tokens: 256,
        block_tokens: 64,
    };

    /// Small enough for a test in an unoptimized build.
    pub const TINY: Self = Self {
        vocab: 97,
        hidden: 32,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_size: 8,
        mlp: 48,
        max_tokens: 128,
        chunk_tokens: 16,
        block_tokens: 8,
    };

    /// Trainable numbers in the model.
    pub fn parameters(&self) -> usize {
        let attention = self.hidden * self.head_size * (2 * self.heads + 2 * self.kv_heads);
        let layer = attention + 3 * self.hidden * self.mlp + 2 * self.hidden;
        2 * self.vocab * self.hidden + self.layers * layer + self.hidden
    }

    /// Floats in one block: `[layers, 2, kv_heads, block_tokens, head_size]`.
    pub fn block_floats(&self) -> usize {
        self.layers * 2 * self.kv_heads * self.block_tokens * self.head_size
    }

    /// Bytes of one block.
    pub fn block_bytes(&self) -> usize {
        self.block_floats() * size_of::<f32>()
    }

    /// Blocks that one full prefill chunk makes.
    pub fn chunk_blocks(&self) -> usize {
        self.chunk_tokens / self.block_tokens
    }
}

/// The decoder. Immutable once made; all state of a sequence is in its [`KvCache`].
#[derive(Debug)]
pub struct Decoder {
    shape: ModelShape,
    embedding: Embedding,
    layers: Vec<Layer>,
    norm: RmsNorm,
    head: Linear,
    rotary: Rotary,
}

impl Decoder {
    /// Makes the model with weights from `source`.
    ///
    /// # Errors
    /// What candle reports when a tensor cannot be made.
    ///
    /// # Panics
    /// When the shape contradicts itself: heads that do not divide, an odd head, a chunk that is no
    /// multiple of a block.
    pub fn new(shape: ModelShape, source: WeightSource) -> Result<Self> {
        assert!(
            shape.heads.is_multiple_of(shape.kv_heads),
            "heads must be a multiple of kv_heads"
        );
        assert!(shape.head_size.is_multiple_of(2), "head_size must be even");
        assert!(
            shape.chunk_tokens.is_multiple_of(shape.block_tokens),
            "chunk_tokens must be a multiple of block_tokens"
        );
        let layers = (0..shape.layers)
            .map(|layer| Layer::new(&shape, source, layer))
            .collect::<Result<_>>()?;
        Ok(Self {
            shape,
            embedding: source.embedding("embedding", shape.vocab, shape.hidden)?,
            layers,
            norm: source.norm(shape.hidden, NORM_EPS)?,
            head: source.linear("head", shape.hidden, shape.vocab)?,
            rotary: Rotary::new(&shape)?,
        })
    }

    /// The sizes it was made with.
    pub fn shape(&self) -> &ModelShape {
        &self.shape
    }

    /// Runs `tokens`, which follow what `cache` holds, through the model in the fixed chunks, and
    /// answers the logits `[vocab]` after the last of them. `progress` is told the tokens of each
    /// chunk as it is done.
    ///
    /// # Errors
    /// An empty prompt, a cache that does not end at a chunk boundary, and what candle reports.
    pub fn prefill(
        &self,
        tokens: &[u32],
        cache: &mut KvCache,
        mut progress: impl FnMut(usize),
    ) -> Result<Vec<f32>> {
        if !cache.len().is_multiple_of(self.shape.chunk_tokens) {
            candle_core::bail!(
                "prefill starts at token {}, not at a chunk boundary",
                cache.len()
            );
        }
        let mut last = None;
        for chunk in tokens.chunks(self.shape.chunk_tokens) {
            last = Some(self.forward(chunk, cache)?);
            progress(chunk.len());
        }
        let Some(hidden) = last else {
            candle_core::bail!("an empty prompt has no logits")
        };
        self.logits(&hidden)
    }

    /// Feeds one token and answers the logits `[vocab]` after it.
    ///
    /// # Errors
    /// What candle reports.
    pub fn decode(&self, token: u32, cache: &mut KvCache) -> Result<Vec<f32>> {
        let hidden = self.forward(&[token], cache)?;
        self.logits(&hidden)
    }

    /// One pass: `[t]` tokens to `[t, hidden]`, with the cache longer by t.
    fn forward(&self, tokens: &[u32], cache: &mut KvCache) -> Result<Tensor> {
        let (past, count) = (cache.len(), tokens.len());
        if past + count > self.shape.max_tokens {
            candle_core::bail!(
                "sequence of {} tokens is longer than {}",
                past + count,
                self.shape.max_tokens
            );
        }
        let mask = causal_mask(past, count)?;
        let rotary = self.rotary.at(past, count)?;
        let mut x = self
            .embedding
            .forward(&Tensor::new(tokens, &Device::Cpu)?)?;
        for (index, layer) in self.layers.iter().enumerate() {
            x = layer.forward(&x, &rotary, mask.as_ref(), &self.shape, cache, index)?;
        }
        cache.advance(count);
        Ok(x)
    }

    /// Only the last row: an engine samples from nothing else.
    fn logits(&self, hidden: &Tensor) -> Result<Vec<f32>> {
        let last = hidden.narrow(0, hidden.dim(0)? - 1, 1)?.contiguous()?;
        self.head
            .forward(&self.norm.forward(&last)?)?
            .flatten_all()?
            .to_vec1()
    }
}

/// The id with the highest logit; the first of equals.
pub fn greedy(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (id, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = id;
        }
    }
    u32::try_from(best).expect("a vocabulary fits in u32")
}

/// True when both are the same bits; `==` would call 0.0 and -0.0 equal and NaN unequal to itself.
pub fn same_bits(left: &[f32], right: &[f32]) -> bool {
    left.len() == right.len()
        && left
            .iter()
            .zip(right)
            .all(|(l, r)| l.to_bits() == r.to_bits())
}

const NORM_EPS: f64 = 1e-5;
const ROPE_BASE: f64 = 10_000.0;

#[derive(Debug)]
struct Layer {
    attention_norm: RmsNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
    mlp_norm: RmsNorm,
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl Layer {
    fn new(shape: &ModelShape, source: WeightSource, index: usize) -> Result<Self> {
        let linear = |name: &str, inputs, outputs| {
            source.linear(&format!("layers.{index}.{name}"), inputs, outputs)
        };
        let (query, kv) = (
            shape.heads * shape.head_size,
            shape.kv_heads * shape.head_size,
        );
        Ok(Self {
            attention_norm: source.norm(shape.hidden, NORM_EPS)?,
            query: linear("query", shape.hidden, query)?,
            key: linear("key", shape.hidden, kv)?,
            value: linear("value", shape.hidden, kv)?,
            out: linear("out", query, shape.hidden)?,
            mlp_norm: source.norm(shape.hidden, NORM_EPS)?,
            gate: linear("gate", shape.hidden, shape.mlp)?,
            up: linear("up", shape.hidden, shape.mlp)?,
            down: linear("down", shape.mlp, shape.hidden)?,
        })
    }

    fn forward(
        &self,
        x: &Tensor,
        rotary: &(Tensor, Tensor),
        mask: Option<&Tensor>,
        shape: &ModelShape,
        cache: &mut KvCache,
        index: usize,
    ) -> Result<Tensor> {
        let x = (x + self.attend(
            &self.attention_norm.forward(x)?,
            rotary,
            mask,
            shape,
            cache,
            index,
        )?)?;
        let normed = self.mlp_norm.forward(&x)?;
        let gated = (ops::silu(&self.gate.forward(&normed)?)? * self.up.forward(&normed)?)?;
        x + self.down.forward(&gated)?
    }

    /// Query heads of one group are stacked along the rows of one product, so a key is never copied
    /// for each of the heads that share it: `[kv_heads, group · t, head] × [kv_heads, head, l]`.
    fn attend(
        &self,
        x: &Tensor,
        (cos, sin): &(Tensor, Tensor),
        mask: Option<&Tensor>,
        shape: &ModelShape,
        cache: &mut KvCache,
        index: usize,
    ) -> Result<Tensor> {
        let (count, size) = (x.dim(0)?, shape.head_size);
        let group_rows = shape.heads / shape.kv_heads * count;
        let by_head = |projected: Tensor, heads: usize| {
            projected
                .reshape((1, count, heads, size))?
                .transpose(1, 2)?
                .contiguous()
        };
        let query = rotary_emb::rope(&by_head(self.query.forward(x)?, shape.heads)?, cos, sin)?;
        let key = rotary_emb::rope(&by_head(self.key.forward(x)?, shape.kv_heads)?, cos, sin)?
            .squeeze(0)?;
        let value = by_head(self.value.forward(x)?, shape.kv_heads)?.squeeze(0)?;
        let (keys, values) = cache.append(index, &key, &value)?;

        let scale = 1.0 / (size as f64).sqrt();
        let query = (query * scale)?.reshape((shape.kv_heads, group_rows, size))?;
        let mut scores = query.matmul(&keys.transpose(1, 2)?)?;
        if let Some(mask) = mask {
            let rows = scores.reshape((shape.heads, count, keys.dim(1)?))?;
            scores =
                rows.broadcast_add(mask)?
                    .reshape((shape.kv_heads, group_rows, keys.dim(1)?))?;
        }
        let mixed = ops::softmax_last_dim(&scores)?.matmul(&values)?;
        let rows = mixed
            .reshape((shape.heads, count, size))?
            .transpose(0, 1)?
            .contiguous()?;
        self.out
            .forward(&rows.reshape((count, shape.heads * size))?)
    }
}

/// `[t, past + t]`: zero where a row may look, minus infinity ahead of it. A single row sees all.
fn causal_mask(past: usize, count: usize) -> Result<Option<Tensor>> {
    if count == 1 {
        return Ok(None);
    }
    let width = past + count;
    let mut mask = vec![0.0_f32; count * width];
    for row in 0..count {
        mask[row * width + past + row + 1..(row + 1) * width].fill(f32::NEG_INFINITY);
    }
    Tensor::from_vec(mask, (count, width), &Device::Cpu).map(Some)
}

/// Cosines and sines of every position, `[max_tokens, head_size / 2]` each.
#[derive(Debug)]
struct Rotary {
    cos: Tensor,
    sin: Tensor,
}

impl Rotary {
    fn new(shape: &ModelShape) -> Result<Self> {
        let half = shape.head_size / 2;
        let angles: Vec<f64> = (0..shape.max_tokens)
            .flat_map(|position| {
                (0..half)
                    .map(move |pair| position as f64 * ROPE_BASE.powf(-(pair as f64) / half as f64))
            })
            .collect();
        let angles = Tensor::from_vec(angles, (shape.max_tokens, half), &Device::Cpu)?;
        Ok(Self {
            cos: angles.cos()?.to_dtype(DType::F32)?,
            sin: angles.sin()?.to_dtype(DType::F32)?,
        })
    }

    fn at(&self, past: usize, count: usize) -> Result<(Tensor, Tensor)> {
        let rows = |table: &Tensor| table.narrow(D::Minus2, past, count)?.contiguous();
        Ok((rows(&self.cos)?, rows(&self.sin)?))
    }
}

#[cfg(test)]
mod tests {
    use super::{Decoder, ModelShape, greedy, same_bits};
    use crate::kv::KvCache;
    use crate::weights::WeightSource;

    const TINY: ModelShape = ModelShape::TINY;

    fn tiny() -> Decoder {
        Decoder::new(TINY, WeightSource::new(1)).unwrap()
    }

    fn prompt(len: u32) -> Vec<u32> {
        (0..len)
            .map(|i| (i * 37 + 11) % TINY.vocab as u32)
            .collect()
    }

    #[test]
    fn reuse_at_a_chunk_boundary_gives_the_same_bits() {
        let (model, tokens) = (tiny(), prompt(59));
        let mut cold = KvCache::new(TINY);
        let want = model.prefill(&tokens, &mut cold, |_| {}).unwrap();
        for chunks in 1..=3 {
            let reused = chunks * TINY.chunk_tokens;
            let blocks = cold.export(0..reused / TINY.block_tokens).unwrap();
            let mut warm = KvCache::import(TINY, &blocks).unwrap();
            let got = model.prefill(&tokens[reused..], &mut warm, |_| {}).unwrap();
            assert!(same_bits(&want, &got), "{chunks} chunks reused");
            let next = greedy(&want);
            let (from_cold, from_warm) = (
                model.decode(next, &mut cold.clone()).unwrap(),
                model.decode(next, &mut warm).unwrap(),
            );
            assert!(same_bits(&from_cold, &from_warm));
        }
    }

    /// The check above is only worth something if the logits notice a wrong byte.
    #[test]
    fn one_flipped_bit_in_a_block_changes_the_logits() {
        let (model, tokens) = (tiny(), prompt(40));
        let mut cold = KvCache::new(TINY);
        let want = model.prefill(&tokens, &mut cold, |_| {}).unwrap();
        let mut blocks: Vec<Vec<u8>> = cold
            .export(0..4)
            .unwrap()
            .iter()
            .map(|block| block.to_vec())
            .collect();
        blocks[1][100 * 4 + 2] ^= 0x40;
        let mut warm = KvCache::import(TINY, &blocks).unwrap();
        let got = model.prefill(&tokens[32..], &mut warm, |_| {}).unwrap();
        assert!(!same_bits(&want, &got));
    }

    #[test]
    fn order_of_blocks_matters() {
        let (model, tokens) = (tiny(), prompt(40));
        let mut cold = KvCache::new(TINY);
        let want = model.prefill(&tokens, &mut cold, |_| {}).unwrap();
        let mut blocks = cold.export(0..4).unwrap();
        blocks.swap(0, 1);
        let mut warm = KvCache::import(TINY, &blocks).unwrap();
        assert!(!same_bits(
            &want,
            &model.prefill(&tokens[32..], &mut warm, |_| {}).unwrap()
        ));
    }

    /// Causality: what comes later cannot change the blocks of what came before.
    #[test]
    fn equal_prefixes_make_equal_blocks() {
        let model = tiny();
        let (one, mut two) = (prompt(48), prompt(48));
        two[40] = (two[40] + 1) % TINY.vocab as u32;
        let blocks = |tokens: &[u32]| {
            let mut cache = KvCache::new(TINY);
            model.prefill(tokens, &mut cache, |_| {}).unwrap();
            cache.export(0..6).unwrap()
        };
        let (left, right) = (blocks(&one), blocks(&two));
        assert_eq!(left[..4], right[..4]);
        assert_ne!(left[5], right[5]);
    }

    #[test]
    fn prefill_refuses_to_start_inside_a_chunk() {
        let model = tiny();
        let mut cache = KvCache::new(TINY);
        model.prefill(&prompt(5), &mut cache, |_| {}).unwrap();
        assert!(model.prefill(&prompt(5), &mut cache, |_| {}).is_err());
    }

    #[test]
    fn demo_shape_is_of_the_stated_size() {
        let shape = ModelShape::DEMO;
        assert!(
            (25_000_000..35_000_000).contains(&shape.parameters()),
            "{}",
            shape.parameters()
        );
        assert_eq!(shape.block_bytes(), 512 * 1024);
        assert_eq!(shape.chunk_blocks(), 4);
    }
}
