//! `kvctl get KEY -o FILE`: fetches what is stored under a key.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufWriter, Write},
    path::PathBuf,
};

use anyhow::{Context as _, Result, bail};
use kvclient::{LookupOptions, TierKind};
use serde::Serialize;

use crate::{
    context::{Context, InNamespace, Unit, size},
    key,
};

/// Bytes held in memory at a time.
const WINDOW_BYTES: u64 = 32 << 20;

/// Flags of `get`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Name it is stored under
    key: String,
    /// Where to write it; standard output if left out, or "-"
    #[arg(long, short = 'o')]
    output: Option<PathBuf>,
    #[command(flatten)]
    namespace: InNamespace,
}

#[derive(Serialize)]
struct Report {
    key: String,
    length_bytes: u64,
    blocks: u64,
    /// Number of blocks by the tier they came from.
    tiers: BTreeMap<&'static str, u64>,
    seconds: f64,
    output: Option<PathBuf>,
}

pub(crate) async fn run(context: &Context, mut args: Args) -> Result<()> {
    args.output = args.output.filter(|path| path.as_os_str() != "-");
    if args.output.is_none() && context.is_json() {
        bail!("--json and the bytes would both go to standard output; give -o FILE");
    }
    let client = context.connect().await?;
    let namespace = context.open(&client, &args.namespace.namespace).await?;
    let Some(label) = key::label(&client, &namespace, &args.key).await? else {
        bail!(
            "nothing is stored under {:?} in namespace {:?}; store it with `kvctl put {} FILE`",
            args.key,
            args.namespace.namespace,
            args.key
        );
    };
    let start = context.clock.now();
    let chain = key::chain(&namespace, &args.key, label.blocks());
    let found = client
        .lookup(&namespace, &chain, &LookupOptions::default())
        .await?;
    if u64::from(found.present_blocks) < label.blocks() {
        bail!(
            "{:?} is only there in part: {} of {} blocks; the rest was evicted, put it again",
            args.key,
            found.present_blocks,
            label.blocks()
        );
    }
    let mut out: Box<dyn Write> = match &args.output {
        Some(path) => Box::new(BufWriter::new(
            File::create(path).with_context(|| format!("cannot write {}", path.display()))?,
        )),
        None => Box::new(std::io::stdout().lock()),
    };
    let bar = context.progress(label.length_bytes, &args.key, Unit::Bytes);
    let window = (WINDOW_BYTES / label.block_bytes).max(1);
    let leased = u64::from(found.leased_blocks());
    let mut tiers = BTreeMap::new();
    let mut next = 1;
    while next < label.blocks() {
        let until = (next + window).min(label.blocks());
        let part = chain.slice(next as usize..until as usize, namespace.run_blocks());
        // A lease may cover less than is present; what is beyond it is taken as it is found.
        let lease = found.lease.as_ref().filter(|_| until <= leased);
        for (i, block) in client
            .get(&namespace, &part, lease)
            .await?
            .into_iter()
            .enumerate()
        {
            let Some(bytes) = block.bytes else {
                bail!(
                    "block {} of {:?} is gone: {}; put it again",
                    next + i as u64,
                    args.key,
                    block.outcome
                );
            };
            *tiers
                .entry(block.tier.map_or("unsaid", TierKind::as_str))
                .or_default() += 1;
            out.write_all(&bytes).context("cannot write the bytes")?;
            bar.inc(bytes.len() as u64);
        }
        next = until;
    }
    out.flush().context("cannot write the bytes")?;
    bar.finish_and_clear();
    let report = Report {
        key: args.key,
        length_bytes: label.length_bytes,
        blocks: label.blocks(),
        tiers,
        seconds: context.clock.now().since(start).as_secs_f64(),
        output: args.output,
    };
    let Some(path) = report
        .output
        .as_ref()
        .map(|path| path.display().to_string())
    else {
        return Ok(());
    };
    context.print(&report, |report| {
        let tiers: Vec<String> = report
            .tiers
            .iter()
            .map(|(tier, n)| format!("{n} from {tier}"))
            .collect();
        format!(
            "{} to {path}: {}, checksums right, {:.2} s",
            size(report.length_bytes),
            tiers.join(", "),
            report.seconds
        )
    })
}
