//! `kvctl lookup KEY…`: what is present, and in which tier.

use std::process::ExitCode;

use anyhow::Result;
use kvclient::{LookupOptions, TierKind};
use serde::Serialize;

use crate::{
    context::{Context, InNamespace, size, table},
    key,
};

/// Flags of `lookup`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Names to look for
    #[arg(required = true)]
    keys: Vec<String>,
    #[command(flatten)]
    namespace: InNamespace,
}

#[derive(Serialize)]
struct Report {
    keys: Vec<Found>,
    /// All of them are whole.
    all_present: bool,
}

#[derive(Serialize)]
struct Found {
    key: String,
    /// Blocks present from the first on, the label included.
    present_blocks: u64,
    /// Blocks there should be; unknown when the label itself is gone.
    blocks: Option<u64>,
    length_bytes: Option<u64>,
    tiers: Vec<(u32, &'static str)>,
}

/// Success when all keys are whole; failure otherwise, so that a script can ask.
pub(crate) async fn run(context: &Context, args: Args) -> Result<ExitCode> {
    let client = context.connect().await?;
    let namespace = context.open(&client, &args.namespace.namespace).await?;
    let mut keys = Vec::with_capacity(args.keys.len());
    for key in args.keys {
        let label = key::label(&client, &namespace, &key).await?;
        let blocks = label.map_or(1, |label| label.blocks());
        let chain = key::chain(&namespace, &key, blocks);
        let found = client
            .lookup(&namespace, &chain, &LookupOptions::probe())
            .await?;
        keys.push(Found {
            key,
            present_blocks: found.present_blocks.into(),
            blocks: label.map(|label| label.blocks()),
            length_bytes: label.map(|label| label.length_bytes),
            tiers: found
                .tiers
                .iter()
                .map(|(n, tier)| (*n, TierKind::as_str(*tier)))
                .collect(),
        });
    }
    let all_present = keys
        .iter()
        .all(|found| found.blocks == Some(found.present_blocks));
    let report = Report { keys, all_present };
    context.print(&report, |report| {
        let rows: Vec<Vec<String>> = report.keys.iter().map(row).collect();
        table(&["key", "present", "blocks", "size", "where"], &rows)
    })?;
    Ok(if all_present {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn row(found: &Found) -> Vec<String> {
    let present = match found.blocks {
        None => "no",
        Some(blocks) if blocks == found.present_blocks => "yes",
        Some(_) => "in part",
    };
    let tiers: Vec<String> = found
        .tiers
        .iter()
        .map(|(n, tier)| format!("{n} {tier}"))
        .collect();
    vec![
        found.key.clone(),
        present.to_owned(),
        found
            .blocks
            .map_or("-".to_owned(), |n| format!("{}/{n}", found.present_blocks)),
        found.length_bytes.map_or("-".to_owned(), size),
        tiers.join(", "),
    ]
}
