//! `kvctl lookup KEY…`: what is present, and in which tier.

use std::process::ExitCode;

use anyhow::Result;
use clap::builder::NonEmptyStringValueParser;
use kvclient::{Client, LookupOptions, NamespaceHandle, TierKind};
use serde::Serialize;

use crate::{
    context::{Context, InNamespace, size, table},
    key, namespaces,
};

/// Flags of `lookup`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Names to look for
    #[arg(required = true, value_parser = NonEmptyStringValueParser::new())]
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
    /// Why nobody can say; what is above says nothing then.
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

/// Success when all keys are whole; failure otherwise, so that a script can ask.
pub(crate) async fn run(context: &Context, args: Args) -> Result<ExitCode> {
    let client = context.connect().await?;
    let namespace = namespaces::of_keys(context, &client, &args.namespace.namespace).await?;
    let mut keys = Vec::with_capacity(args.keys.len());
    for key in &args.keys {
        match find(&client, &namespace, key).await {
            Ok(found) => keys.push(found),
            // One key is all that was asked for.
            Err(error) if args.keys.len() == 1 => return Err(error),
            Err(error) => keys.push(Found {
                key: key.clone(),
                present_blocks: 0,
                blocks: None,
                length_bytes: None,
                tiers: Vec::new(),
                problem: Some(format!("{error:#}")),
            }),
        }
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

async fn find(client: &Client, namespace: &NamespaceHandle, key: &str) -> Result<Found> {
    let label = key::label(client, namespace, key).await?;
    let chain = match &label {
        Some(label) => key::chain(namespace, key, label),
        None => key::first(namespace, key),
    };
    let probe = LookupOptions::probe();
    let found = client.lookup(namespace, &chain, &probe).await?;
    let tiers = found.tiers.iter();
    Ok(Found {
        key: key.to_owned(),
        present_blocks: found.present_blocks.into(),
        blocks: label.map(|label| label.blocks()),
        length_bytes: label.map(|label| label.length_bytes),
        tiers: tiers
            .map(|(n, tier)| (*n, TierKind::as_str(*tier)))
            .collect(),
        problem: None,
    })
}

fn row(found: &Found) -> Vec<String> {
    let present = match (found.blocks, &found.problem) {
        (_, Some(_)) => "unknown",
        (None, _) => "no",
        (Some(blocks), _) if blocks == found.present_blocks => "yes",
        (Some(_), _) => "in part",
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
        match &found.problem {
            Some(problem) => problem.clone(),
            None => tiers.join(", "),
        },
    ]
}
