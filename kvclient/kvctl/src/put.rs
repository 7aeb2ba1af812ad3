//! `kvctl put KEY FILE`: stores a file under a key.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use bytesize::ByteSize;
use clap::builder::NonEmptyStringValueParser;
use kvclient::{
    Ack, Chain, Client, LookupOptions, NamespaceHandle, PutBlock, PutOptions, PutResult, Reason,
};
use serde::Serialize;

use crate::{
    context::{Context, Copies, InNamespace, Unit, size},
    key::{self, Label},
    namespaces,
};

/// Bytes held in memory at a time.
const WINDOW_BYTES: u64 = 32 << 20;
/// How often a rejected block is offered again before kvctl gives up.
const MAX_OFFERS: u32 = 50;

/// Flags of `put`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Name to store it under
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    key: String,
    /// File to store; - for standard input
    file: PathBuf,
    #[command(flatten)]
    namespace: InNamespace,
    #[command(flatten)]
    copies: Copies,
    /// How safe it must be: cached (RAM), stored (NVMe), synced (durable)
    #[arg(long, default_value = "cached")]
    ack: Ack,
    /// Size of a block
    #[arg(long, default_value = "1MiB")]
    block_size: ByteSize,
}

#[derive(Serialize)]
struct Report {
    key: String,
    length_bytes: u64,
    blocks: u64,
    /// Members that the namespace's runs are kept by.
    replicas: usize,
    /// Number of blocks by what became of them.
    outcomes: BTreeMap<&'static str, u64>,
    seconds: f64,
}

pub(crate) async fn run(context: &Context, args: Args) -> Result<()> {
    let client = context.connect().await?;
    let label = &args.namespace.namespace;
    let namespace = namespaces::to_put(context, &client, label, args.copies).await?;
    let mut source = open(&args.file)?;
    let label = Label {
        length_bytes: source.length_bytes,
        block_bytes: args.block_size.as_u64(),
        put_id: context.clock.random_u64().max(1),
    };
    ensure!(
        (1..=namespace.max_block_bytes()).contains(&label.block_bytes),
        "--block-size {} is not possible; 1 B to {} are",
        args.block_size,
        size(namespace.max_block_bytes())
    );
    ensure!(
        label.blocks() <= key::MAX_BLOCKS,
        "{} blocks are too many for one key; give a larger --block-size",
        label.blocks()
    );
    let chain = key::chain(&namespace, &args.key, &label);
    // The label's name says nothing of its bytes: one that another put left must go first. What cannot be read of that
    // put nobody will read, as its blocks have other names.
    let old = key::label(&client, &namespace, &args.key).await;
    // Its one owner has none: then nobody would look for one at a member that does not answer.
    let is_new = matches!(old, Ok(None)) && namespace.replicas() <= 1;
    let old = match old.ok().flatten() {
        Some(old) => key::chain(&namespace, &args.key, &old),
        None => key::first(&namespace, &args.key),
    };
    let forgotten = key::forget(&client, &namespace, &old).await;
    if !is_new {
        forgotten.with_context(|| {
            format!(
                "what may be stored under {:?} has to be forgotten by every member first, and one does not answer; see \
                 `kvctl cluster`, and try again when it is back, or gone from there",
                args.key
            )
        })?;
    }

    let start = context.clock.now();
    let options = PutOptions {
        ack: args.ack,
        ..PutOptions::default()
    };
    let putting = Putting {
        context,
        client: &client,
        namespace: &namespace,
        chain: &chain,
        options,
    };
    let mut outcomes = BTreeMap::new();
    let first = vec![Bytes::from(serde_json::to_vec(&label)?)];
    putting.put(0, first, &mut outcomes).await?;
    let bar = context.progress(label.length_bytes, &args.key, Unit::Bytes);
    let window = (WINDOW_BYTES / label.block_bytes).max(1);
    let mut next = 1;
    while next < label.blocks() {
        let until = (next + window).min(label.blocks());
        let mut blocks = Vec::with_capacity((until - next) as usize);
        for index in next..until {
            blocks.push(source.block(label.block_len(index))?);
        }
        let bytes: u64 = blocks.iter().map(|block| block.len() as u64).sum();
        putting.put(next as usize, blocks, &mut outcomes).await?;
        bar.inc(bytes);
        next = until;
    }
    bar.finish_and_clear();
    // Each block was taken, which says nothing of all of them together. Who cannot say now has kept them a moment ago.
    let probe = LookupOptions::probe();
    if let Ok(found) = client.lookup(&namespace, &chain, &probe).await {
        let present = found.present_blocks as usize;
        ensure!(
            key::is_next_there(&client, &namespace, &chain, present)
                .await
                .unwrap_or(true),
            "all {} blocks were taken, and only the first {present} are still there: there is less room than that; give \
             nodes more (--ram-bytes, --nvme-bytes), or keep it at --ack stored",
            label.blocks(),
        );
    }
    let report = Report {
        key: args.key,
        length_bytes: label.length_bytes,
        blocks: label.blocks(),
        replicas: namespace.replicas(),
        outcomes,
        seconds: context.clock.now().since(start).as_secs_f64(),
    };
    context.print(&report, |report| {
        let outcomes: Vec<String> = report
            .outcomes
            .iter()
            .map(|(outcome, n)| format!("{n} {outcome}"))
            .collect();
        format!(
            "{} under {:?} in {} blocks ({}){}, {:.2} s\nread it back: kvctl get {} -o FILE",
            size(report.length_bytes),
            report.key,
            report.blocks,
            outcomes.join(", "),
            match report.replicas {
                0 | 1 => String::new(),
                many => format!(", at {many} members each"),
            },
            report.seconds,
            report.key,
        )
    })
}

struct Putting<'a> {
    context: &'a Context,
    client: &'a Client,
    namespace: &'a NamespaceHandle,
    chain: &'a Chain,
    options: PutOptions,
}

impl Putting<'_> {
    /// Puts blocks from `first` on, offering rejected ones again as the node asks.
    async fn put(
        &self,
        first: usize,
        blocks: Vec<Bytes>,
        outcomes: &mut BTreeMap<&'static str, u64>,
    ) -> Result<()> {
        let mut left: Vec<PutBlock<'_>> = blocks
            .into_iter()
            .enumerate()
            .map(|(i, bytes)| PutBlock::new(first + i, bytes))
            .collect();
        for offer in 1.. {
            let results = self
                .client
                .put(self.namespace, self.chain, &left, self.options)
                .await?;
            let mut rejected = Vec::new();
            let mut refusal: Option<PutResult> = None;
            for (block, result) in left.into_iter().zip(results) {
                if result.is_kept() {
                    *outcomes.entry(result.outcome.as_str()).or_default() += 1;
                } else {
                    refusal = Some(result);
                    rejected.push(block);
                }
            }
            let Some(refusal) = refusal else {
                return Ok(());
            };
            if refusal.retry_after_ms == 0 || offer == MAX_OFFERS {
                bail!(
                    "{} blocks were refused: {}{}",
                    rejected.len(),
                    refusal.reason.map_or("no reason given", Reason::as_str),
                    advice(refusal.reason),
                );
            }
            left = rejected;
            self.context
                .sleep(Duration::from_millis(refusal.retry_after_ms.into()))
                .await;
        }
        Ok(())
    }
}

fn advice(reason: Option<Reason>) -> &'static str {
    match reason {
        Some(Reason::NoSlot | Reason::Budget) => {
            "; RAM is full of leased blocks, see `kvctl status`"
        }
        Some(Reason::TierDown) => {
            "; the tier that --ack asks for is absent or out of service, see `kvctl status`"
        }
        Some(Reason::Admission | Reason::Wear) => {
            "; the NVMe tier does not take it now, try --ack cached"
        }
        Some(Reason::TooLarge) => "; give a smaller --block-size",
        _ => "",
    }
}

/// Where the bytes come from.
struct Source {
    reader: Box<dyn Read>,
    length_bytes: u64,
}

impl Source {
    fn block(&mut self, len: usize) -> Result<Bytes> {
        let mut block = vec![0; len];
        self.reader
            .read_exact(&mut block)
            .context("the file became shorter while it was read")?;
        Ok(block.into())
    }
}

fn open(path: &PathBuf) -> Result<Source> {
    if path.as_os_str() == "-" {
        // The label comes first and holds the length, so that standard input must be read whole.
        let mut bytes = Vec::new();
        std::io::stdin()
            .read_to_end(&mut bytes)
            .context("cannot read standard input")?;
        let length_bytes = bytes.len() as u64;
        return Ok(Source {
            reader: Box::new(std::io::Cursor::new(bytes)),
            length_bytes,
        });
    }
    let mut file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let is_dir = file.metadata().is_ok_and(|found| found.is_dir());
    ensure!(
        !is_dir,
        "{} is a folder; give a file, or \"-\"",
        path.display()
    );
    let length_bytes = file
        .seek(SeekFrom::End(0))
        .context("cannot measure the file")?;
    file.rewind()?;
    Ok(Source {
        reader: Box::new(file),
        length_bytes,
    })
}
