//! How an engine uses Terrace: ask before prefill, give back after the first token.
//!
//! ```text
//! prompt ─chain─► lookup ─► lease on n blocks ─► get into one buffer ─► KvCache::import
//!                                                                          │
//!        put ◄─ KvCache::export ◄─ (first token is out) ◄─ prefill the rest ┘
//! ```
//!
//! Shapes: reuse ends at a multiple of `chunk_tokens` and leaves at least one token to compute, since
//! logits come from computing a token and not from its keys and values. Only blocks of full chunks
//! are put, so every stored block was computed in the shape in which any other run computes it.
//! Errors: the model's. Terrace has none here: whatever goes wrong with it is a miss with a note,
//! because the model can always compute.
//! Why one buffer: the client writes each block where it belongs and verifies it there; import then
//! reads it once.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use kvclient::{
    Ack, Client, LookupOptions, Namespace, NamespaceHandle, PutBlock, PutOptions, TierKind,
    split_buffers,
};
use kvproto::namespace::{Layout, World};

use crate::kv::KvCache;
use crate::model::{Decoder, ModelShape, greedy};
use crate::stopwatch::Stopwatch;

/// Blocks per run on one node: 8 MiB of the demonstration's blocks are placed together.
pub const RUN_BLOCKS: u32 = 16;
/// A slow disk may take its time over a whole document; nobody waits for this but the next question.
const SAVE_WITHIN: Duration = Duration::from_secs(60);

/// A model whose prefills go through Terrace.
#[derive(Debug, Clone)]
pub struct Prefiller {
    decoder: Arc<Decoder>,
    client: Client,
    namespace: NamespaceHandle,
}

/// A prompt answered up to its first token.
#[derive(Debug)]
pub struct Answer {
    /// Logits after the prompt, `[vocab]`.
    pub logits: Vec<f32>,
    /// Tokens whose keys and values came from Terrace.
    pub reused_tokens: usize,
    /// Time to first token: from the token ids to the logits.
    pub ttft: Duration,
    /// Of it: hash, lookup and get.
    pub fetch: Duration,
    /// Why Terrace gave less than it might have, if so.
    pub trouble: Option<String>,
    prompt: Vec<u32>,
    tiers: Vec<TierKind>,
    cache: KvCache,
}

impl Answer {
    /// Where the reused tokens came from, for people: "RAM", "NVMe", "RAM + NVMe", "computed".
    pub fn source(&self) -> String {
        if self.tiers.is_empty() {
            return "computed".to_owned();
        }
        self.tiers
            .iter()
            .map(|tier| tier_name(*tier))
            .collect::<Vec<_>>()
            .join(" + ")
    }
}

/// What a save did.
#[derive(Debug, Clone, Copy)]
pub struct Saved {
    /// Blocks that are now as safe as asked for.
    pub stored: usize,
    /// Blocks that were refused.
    pub rejected: usize,
    /// Bytes of the blocks that were offered.
    pub bytes: usize,
    /// From the first byte exported to the answer.
    pub took: Duration,
}

/// The leading blocks of a prompt, whole chunks of them.
#[derive(Default)]
struct Fetched {
    bytes: Vec<u8>,
    tiers: Vec<TierKind>,
    trouble: Option<String>,
}

impl Prefiller {
    /// Opens the namespace of this model and this tokenizer, both named by their fingerprints; blocks lie together in
    /// runs of `run_blocks`.
    ///
    /// # Errors
    /// When the node cannot be reached or refuses the namespace.
    pub async fn open(
        decoder: Arc<Decoder>,
        client: Client,
        tokenizer: &str,
        seed: u64,
        run_blocks: u32,
    ) -> anyhow::Result<Self> {
        let spec = namespace(decoder.shape(), tokenizer, seed, run_blocks);
        let namespace = client
            .open_namespace(&spec, false)
            .await
            .context("cannot open the namespace")?;
        Ok(Self {
            decoder,
            client,
            namespace,
        })
    }

    /// Answers a prompt, reusing what Terrace has of it. `progress` is told tokens as they are done.
    ///
    /// # Errors
    /// The model's; Terrace's troubles end up in [`Answer::trouble`].
    pub async fn with_terrace(
        &self,
        prompt: Vec<u32>,
        progress: impl FnMut(usize) + Send + 'static,
    ) -> anyhow::Result<Answer> {
        let watch = Stopwatch::start();
        let found = self.fetch(&prompt).await.unwrap_or_else(|error| Fetched {
            trouble: Some(error.to_string()),
            ..Fetched::default()
        });
        let fetch = watch.elapsed();
        self.prefill(prompt, found, watch, fetch, progress).await
    }

    /// Answers a prompt as if there were no Terrace.
    ///
    /// # Errors
    /// The model's.
    pub async fn without_terrace(
        &self,
        prompt: Vec<u32>,
        progress: impl FnMut(usize) + Send + 'static,
    ) -> anyhow::Result<Answer> {
        self.prefill(
            prompt,
            Fetched::default(),
            Stopwatch::start(),
            Duration::ZERO,
            progress,
        )
        .await
    }

    /// Waits until the node answers: after a restart, before a measurement.
    ///
    /// # Errors
    /// When it does not within the client's deadline.
    pub async fn reach(&self) -> anyhow::Result<()> {
        self.client
            .stats()
            .await
            .context("the node does not answer")?;
        Ok(())
    }

    /// Decodes `more` tokens greedily and answers the logits of every step, the first token's first.
    ///
    /// # Errors
    /// The model's.
    pub async fn go_on(
        &self,
        mut answer: Answer,
        more: usize,
    ) -> anyhow::Result<(Answer, Vec<Vec<f32>>)> {
        let decoder = self.decoder.clone();
        tokio::task::spawn_blocking(move || {
            let mut steps = vec![answer.logits.clone()];
            for step in 0..more {
                let token = greedy(&steps[step]);
                steps.push(decoder.decode(token, &mut answer.cache)?);
            }
            Ok((answer, steps))
        })
        .await
        .context("a computation was cut off")?
    }

    /// Puts the blocks that this answer had to compute.
    ///
    /// # Errors
    /// When the node does not answer, or the cache cannot be read. Refused blocks are no error.
    pub async fn save(&self, answer: &Answer, ack: Ack) -> anyhow::Result<Saved> {
        let watch = Stopwatch::start();
        let shape = *self.decoder.shape();
        let first = answer.reused_tokens / shape.block_tokens;
        let end = answer.prompt.len() / shape.chunk_tokens * shape.chunk_blocks();
        let blocks = answer.cache.export(first..end)?;
        let chain = self.namespace.chain(&answer.prompt);
        let offered: Vec<PutBlock<'_>> = blocks
            .into_iter()
            .enumerate()
            .map(|(at, bytes)| PutBlock::new(first + at, bytes))
            .collect();
        let options = PutOptions {
            ack,
            ..PutOptions::default()
        };
        let client = self.client.with_deadline(SAVE_WITHIN);
        let results = client
            .put(&self.namespace, &chain, &offered, options)
            .await
            .context("put failed")?;
        let rejected = results.iter().filter(|result| !result.is_kept()).count();
        Ok(Saved {
            stored: results.len() - rejected,
            rejected,
            bytes: offered.len() * shape.block_bytes(),
            took: watch.elapsed(),
        })
    }

    /// The longest usable prefix: leased, in whole chunks, and at least one token short of the prompt.
    async fn fetch(&self, prompt: &[u32]) -> Result<Fetched, kvclient::Error> {
        let shape = *self.decoder.shape();
        let whole_chunks = |blocks: usize| blocks / shape.chunk_blocks() * shape.chunk_blocks();
        let wanted = prompt.len().saturating_sub(1) / shape.chunk_tokens * shape.chunk_blocks();
        let chain = self.namespace.chain(&prompt[..wanted * shape.block_tokens]);
        if wanted == 0 {
            return Ok(Fetched::default());
        }
        let lookup = self
            .client
            .lookup(&self.namespace, &chain, &LookupOptions::default())
            .await?;
        let Some(lease) = &lookup.lease else {
            return Ok(Fetched::default());
        };
        let usable = whole_chunks(lease.blocks() as usize);
        if usable == 0 {
            let few = format!("{} blocks leased, less than one chunk", lease.blocks());
            return Ok(Fetched {
                trouble: Some(few),
                ..Fetched::default()
            });
        }
        let chain = chain.slice(0..usable, self.namespace.run_blocks());

        let mut bytes = vec![0; usable * shape.block_bytes()];
        let mut buffers = split_buffers(&mut bytes, shape.block_bytes())?;
        let got = self
            .client
            .get_into(&self.namespace, &chain, lease, &mut buffers)
            .await?;
        let hits = got.iter().take_while(|got| got.is_hit()).count();
        let lost = got
            .get(hits)
            .map(|got| format!("block {hits} was leased and is lost: {}", got.outcome));
        let kept = whole_chunks(hits);
        bytes.truncate(kept * shape.block_bytes());
        Ok(Fetched {
            bytes,
            tiers: found_in(&lookup.tiers, kept),
            trouble: lost,
        })
    }

    async fn prefill(
        &self,
        prompt: Vec<u32>,
        found: Fetched,
        watch: Stopwatch,
        fetch: Duration,
        mut progress: impl FnMut(usize) + Send + 'static,
    ) -> anyhow::Result<Answer> {
        let decoder = self.decoder.clone();
        tokio::task::spawn_blocking(move || {
            let shape = *decoder.shape();
            let blocks: Vec<&[u8]> = found.bytes.chunks(shape.block_bytes()).collect();
            let mut cache = KvCache::import(shape, &blocks)?;
            let reused_tokens = cache.len();
            progress(reused_tokens);
            let logits = decoder.prefill(&prompt[reused_tokens..], &mut cache, progress)?;
            let ttft = watch.elapsed();
            Ok(Answer {
                logits,
                reused_tokens,
                ttft,
                fetch,
                trouble: found.trouble,
                prompt,
                tiers: found.tiers,
                cache,
            })
        })
        .await
        .context("a computation was cut off")?
    }
}

/// Everything that the bytes of a block depend on. The chunk is part of the engine class, because
/// another chunk may add the same numbers in another order.
fn namespace(shape: &ModelShape, tokenizer: &str, seed: u64, run_blocks: u32) -> Namespace {
    let count = |number: usize| u32::try_from(number).expect("a model's sizes fit in u32");
    Namespace {
        label: "demo".to_owned(),
        model: format!("terrace-demo-{}m", shape.parameters() / 1_000_000),
        weights: format!("splitmix64-{seed}"),
        tokenizer: tokenizer.to_owned(),
        kv_dtype: "f32".to_owned(),
        layout: Layout {
            layers: count(shape.layers),
            kv_heads: count(shape.kv_heads),
            head_size: count(shape.head_size),
            packing: "layer,kv,head,token,lane".to_owned(),
        },
        block_tokens: count(shape.block_tokens),
        run_blocks,
        world: World::SINGLE,
        engine_class: format!("candle-cpu-chunk{}", shape.chunk_tokens),
    }
}

/// The tiers that the first `blocks` were in when they were looked up. Not those that the get names:
/// a lease starts to read ahead, so what lay on NVMe may be in RAM by then.
fn found_in(runs: &[(u32, TierKind)], blocks: usize) -> Vec<TierKind> {
    let mut start = 0;
    let mut tiers = Vec::new();
    for (count, tier) in runs {
        if start < blocks && !tiers.contains(tier) {
            tiers.push(*tier);
        }
        start += *count as usize;
    }
    tiers
}

fn tier_name(tier: TierKind) -> &'static str {
    match tier {
        TierKind::Gpu => "GPU",
        TierKind::Ram => "RAM",
        TierKind::Nvme => "NVMe",
        TierKind::Durable => "durable store",
        TierKind::Peer => "peer",
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use kvclient::{Ack, Client};

    use super::{Prefiller, RUN_BLOCKS};
    use crate::model::{Decoder, ModelShape, same_bits};
    use crate::sandbox::Sandbox;
    use crate::weights::WeightSource;

    const TINY: ModelShape = ModelShape::TINY;
    const SEED: u64 = 5;

    async fn prefiller(node: &Sandbox, tokenizer: &str) -> Prefiller {
        let decoder = Arc::new(Decoder::new(TINY, WeightSource::new(SEED)).unwrap());
        let client = Client::connect(&node.endpoint()).await.unwrap();
        Prefiller::open(decoder, client, tokenizer, SEED, RUN_BLOCKS)
            .await
            .unwrap()
    }

    fn prompt(len: u32, last: u32) -> Vec<u32> {
        (0..len - 1)
            .map(|i| (i * 29 + 3) % TINY.vocab as u32)
            .chain([last])
            .collect()
    }

    #[tokio::test]
    async fn second_prompt_reuses_whole_chunks_and_gives_the_same_bits() {
        let node = Sandbox::start().await.unwrap();
        let model = prefiller(&node, "t").await;
        let cold = model.with_terrace(prompt(56, 1), |_| {}).await.unwrap();
        assert_eq!(cold.reused_tokens, 0);
        let saved = model.save(&cold, Ack::Cached).await.unwrap();
        assert_eq!((saved.stored, saved.rejected), (6, 0));

        let warm = model.with_terrace(prompt(56, 2), |_| {}).await.unwrap();
        assert_eq!((warm.reused_tokens, warm.source().as_str()), (48, "RAM"));
        let reference = model.without_terrace(prompt(56, 2), |_| {}).await.unwrap();
        assert!(same_bits(&warm.logits, &reference.logits));
        let (_, warm) = model.go_on(warm, 3).await.unwrap();
        let (_, reference) = model.go_on(reference, 3).await.unwrap();
        assert!(
            warm.iter()
                .zip(&reference)
                .all(|(left, right)| same_bits(left, right))
        );
        node.stop().await.unwrap();
    }

    #[tokio::test]
    async fn a_prompt_of_whole_chunks_still_computes_its_last_one() {
        let node = Sandbox::start().await.unwrap();
        let model = prefiller(&node, "t").await;
        let cold = model.with_terrace(prompt(32, 1), |_| {}).await.unwrap();
        model.save(&cold, Ack::Cached).await.unwrap();
        let warm = model.with_terrace(prompt(32, 1), |_| {}).await.unwrap();
        assert_eq!(warm.reused_tokens, 16);
        node.stop().await.unwrap();
    }

    #[tokio::test]
    async fn another_tokenizer_finds_nothing() {
        let node = Sandbox::start().await.unwrap();
        let model = prefiller(&node, "one").await;
        let cold = model.with_terrace(prompt(48, 1), |_| {}).await.unwrap();
        model.save(&cold, Ack::Cached).await.unwrap();
        let other = prefiller(&node, "two").await;
        let answer = other.with_terrace(prompt(48, 1), |_| {}).await.unwrap();
        assert_eq!(answer.reused_tokens, 0);
        node.stop().await.unwrap();
    }

    #[tokio::test]
    async fn a_node_that_is_gone_is_a_miss_with_a_note() {
        let mut node = Sandbox::start().await.unwrap();
        let model = prefiller(&node, "t").await;
        let cold = model.with_terrace(prompt(40, 1), |_| {}).await.unwrap();
        model.save(&cold, Ack::Stored).await.unwrap();
        node.pause().await.unwrap();
        let alone = model.with_terrace(prompt(40, 1), |_| {}).await.unwrap();
        assert_eq!(alone.reused_tokens, 0);
        assert!(alone.trouble.is_some());
        assert!(same_bits(&cold.logits, &alone.logits));

        node.resume().await.unwrap();
        model.reach().await.unwrap();
        let again = model.with_terrace(prompt(40, 1), |_| {}).await.unwrap();
        assert_eq!((again.reused_tokens, again.source().as_str()), (32, "NVMe"));
        assert!(same_bits(&cold.logits, &again.logits));
        node.stop().await.unwrap();
    }
}
