//! `kvctl get KEY -o FILE`: fetches what is stored under a key.

use std::{
    collections::BTreeMap,
    fs::{File, Permissions},
    io::{BufWriter, ErrorKind, Write},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};
use clap::builder::NonEmptyStringValueParser;
use kvclient::{LookupOptions, TierKind};
use serde::Serialize;
use tempfile::{Builder, NamedTempFile};

use crate::{
    context::{Context, InNamespace, Unit, size},
    key, namespaces,
};

/// Bytes held in memory at a time.
const WINDOW_BYTES: u64 = 32 << 20;

/// Flags of `get`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Name it is stored under
    #[arg(value_parser = NonEmptyStringValueParser::new())]
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
    let namespace = namespaces::of_keys(context, &client, &args.namespace.namespace).await?;
    let Some(label) = key::label(&client, &namespace, &args.key).await? else {
        bail!(
            "nothing is stored under {:?} in namespace {:?}; store it with `kvctl put {} FILE`",
            args.key,
            args.namespace.namespace,
            args.key
        );
    };
    let start = context.clock.now();
    let chain = key::chain(&namespace, &args.key, &label);
    let found = client
        .lookup(&namespace, &chain, &LookupOptions::default())
        .await?;
    let present = found.present_blocks as usize;
    if !key::is_next_there(&client, &namespace, &chain, present).await? {
        bail!(
            "{:?} is only there in part: {} of {} blocks; the rest was evicted, or never put; put it again",
            args.key,
            present,
            label.blocks()
        );
    }
    let beside = match &args.output {
        Some(path) => beside(path)?,
        None => None,
    };
    let mut out: Box<dyn Write + '_> = match (&beside, &args.output) {
        (Some(file), _) => Box::new(BufWriter::new(file)),
        (None, Some(path)) => Box::new(BufWriter::new(
            File::create(path).with_context(|| format!("cannot write {}", path.display()))?,
        )),
        (None, None) => Box::new(std::io::stdout().lock()),
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
            match out.write_all(&bytes) {
                // Whoever reads has seen enough (`| head`).
                Err(error) if error.kind() == ErrorKind::BrokenPipe && args.output.is_none() => {
                    return Ok(());
                }
                written => written.context("cannot write the bytes")?,
            }
            bar.inc(bytes.len() as u64);
        }
        next = until;
    }
    out.flush().context("cannot write the bytes")?;
    drop(out);
    if let (Some(file), Some(path)) = (beside, &args.output) {
        let named = file.persist(path).map_err(|error| error.error);
        named.with_context(|| format!("cannot write {}", path.display()))?;
    }
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

/// A new file beside `path`, to be renamed to it once it is whole, so that what was there stays until then; it goes by itself
/// when that never happens. `None`: to be written in its place, which is no file (a pipe, a link, a device).
fn beside(path: &Path) -> Result<Option<NamedTempFile>> {
    let mode = match std::fs::symlink_metadata(path) {
        Ok(found) if !found.is_file() => return Ok(None),
        Ok(found) => found.permissions(),
        Err(_) => Permissions::from_mode(0o666), // less what the umask takes
    };
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let file = Builder::new().permissions(mode).tempfile_in(folder);
    let file = file.with_context(|| format!("cannot write {}", path.display()))?;
    Ok(Some(file))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_its_name_once_it_is_whole_and_what_is_none_is_left_in_its_place() {
        let dir = tempfile::TempDir::new().unwrap();
        let path = dir.path().join("out.bin");
        std::fs::write(&path, "old").unwrap();
        let count = || std::fs::read_dir(dir.path()).unwrap().count();
        let mut given_up = beside(&path).unwrap().unwrap();
        given_up.write_all(b"ha").unwrap();
        assert_eq!(count(), 2);
        drop(given_up);
        assert_eq!(
            (count(), std::fs::read(&path).unwrap()),
            (1, b"old".to_vec())
        );
        let mut whole = beside(&path).unwrap().unwrap();
        whole.write_all(b"new").unwrap();
        whole.persist(&path).unwrap();
        assert_eq!(
            (count(), std::fs::read(&path).unwrap()),
            (1, b"new".to_vec())
        );
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        for place in [&link, Path::new("/dev/null"), dir.path()] {
            assert!(beside(place).unwrap().is_none(), "{}", place.display());
        }
    }
}
