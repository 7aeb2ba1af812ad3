//! `kvctl namespaces`: which there are; and which one a command means.
//!
//! ```text
//! -n LABEL ─► those that members know under it ─┬─ of kvctl's own shape ─► keys by their names
//! -n ID    ─► the one with this id              └─ an engine's ──────────► blocks by their hashes, or all of it
//! ```
//!
//! What is there is opened aside, and what is not is not made, but for kvctl's own label, and by those who put: opened
//! under an engine's label it would be the one opened last there, which a strict engine is refused for. A node that is too
//! old to say what is there has a label of keys opened as any.

use std::{collections::BTreeSet, process::ExitCode};

use anyhow::{Result, anyhow, bail, ensure};
use kvclient::{
    Client, Error, Namespace, NamespaceHandle, NamespaceId, NamespaceStats, SequenceHash,
};
use serde::Serialize;

use crate::context::{Context, Copies, DEFAULT_NAMESPACE, own_shape, size, table};

/// Namespaces that an error names.
const NAMED: usize = 12;

/// Flags of `namespaces`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Label; all of them if left out
    label: Option<String>,
}

#[derive(Serialize)]
struct Report {
    namespaces: Vec<Row>,
    /// Members that do not answer: what they alone know is missing.
    silent: Vec<Silent>,
}

#[derive(Serialize)]
struct Silent {
    endpoint: String,
    problem: String,
}

#[derive(Serialize)]
struct Row {
    label: String,
    id: String,
    /// The one that was opened last under its label.
    is_latest: bool,
    engine_class: String,
    model: String,
    weights: String,
    tokenizer: String,
    kv_dtype: String,
    layers: u32,
    kv_heads: u32,
    head_size: u32,
    packing: String,
    block_tokens: u32,
    run_blocks: u32,
    tensor_parallel: u32,
    pipeline_parallel: u32,
    context_parallel: u32,
    replicas: u32,
    /// Of all members together.
    blocks: u64,
    bytes: u64,
}

/// Success when all members answered; failure otherwise, as what they alone know is missing.
pub(crate) async fn run(context: &Context, args: Args) -> Result<ExitCode> {
    let client = context.connect().await?;
    let found = client.namespaces(args.label.as_deref()).await?;
    let mut rows: Vec<Row> = found.known.into_iter().map(row).collect();
    rows.sort_by(|a, b| (&a.label, !a.is_latest, &a.id).cmp(&(&b.label, !b.is_latest, &b.id)));
    let silent = found.silent.into_iter().map(|(endpoint, error)| Silent {
        endpoint: endpoint.to_string(),
        problem: error.to_string(),
    });
    let report = Report {
        namespaces: rows,
        silent: silent.collect(),
    };
    context.print(&report, |report| text(report, args.label.as_deref()))?;
    Ok(match report.silent.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}

fn row(stats: NamespaceStats) -> Row {
    let namespace = stats.namespace;
    Row {
        label: namespace.label,
        id: stats.id.to_string(),
        is_latest: stats.is_latest,
        engine_class: namespace.engine_class,
        model: namespace.model,
        weights: namespace.weights,
        tokenizer: namespace.tokenizer,
        kv_dtype: namespace.kv_dtype,
        layers: namespace.layout.layers,
        kv_heads: namespace.layout.kv_heads,
        head_size: namespace.layout.head_size,
        packing: namespace.layout.packing,
        block_tokens: namespace.block_tokens,
        run_blocks: namespace.run_blocks,
        tensor_parallel: namespace.world.tensor,
        pipeline_parallel: namespace.world.pipeline,
        context_parallel: namespace.world.context,
        replicas: stats.replicas,
        blocks: stats.blocks,
        bytes: stats.bytes,
    }
}

fn text(report: &Report, label: Option<&str>) -> String {
    let latest = report.namespaces.iter().filter(|row| row.is_latest);
    let latest: BTreeSet<&str> = latest.map(|row| &*row.label).collect();
    let cells = |row: &Row| {
        vec![
            match !row.is_latest && latest.contains(&*row.label) {
                true => format!("{} (before)", row.label),
                false => row.label.clone(),
            },
            row.engine_class.clone(),
            row.model.clone(),
            row.kv_dtype.clone(),
            row.block_tokens.to_string(),
            row.replicas.to_string(),
            row.blocks.to_string(),
            size(row.bytes),
            row.id.clone(),
        ]
    };
    let rows: Vec<Vec<String>> = report.namespaces.iter().map(cells).collect();
    let head = [
        "label", "engine", "model", "dtype", "tokens", "copies", "blocks", "size", "id",
    ];
    let mut text = match (rows.is_empty(), label) {
        (true, Some(label)) => format!("no namespace is called {label:?}\n"),
        (true, None) => "there is no namespace\n".to_owned(),
        (false, _) => table(&head, &rows),
    };
    for silent in &report.silent {
        text += &format!("does not answer: {}: {}\n", silent.endpoint, silent.problem);
    }
    text
}

/// The namespace of the keys under a label, or the one with an id, for reading.
///
/// # Errors
/// There is none; it is not of kvctl's own shape, or its label is not kvctl's alone.
pub(crate) async fn of_keys(
    context: &Context,
    client: &Client,
    name: &str,
) -> Result<NamespaceHandle> {
    // Nobody else's, so that it may be opened: what was never put is missing, and no error.
    if name == DEFAULT_NAMESPACE {
        return context.open(client, name).await;
    }
    let found = match with_id(client, name).await? {
        Some(stats) => vec![stats],
        None => match client.find_namespaces(Some(name)).await {
            Err(error) if is_unknown_call(&error) => return context.open(client, name).await,
            found => found?,
        },
    };
    refuse_others(name, &found)?;
    match found.first() {
        Some(stats) => open(client, stats).await,
        None => Err(none_is_called(client, name).await),
    }
}

/// The namespace for keys that are put: one of these labels may be opened that nobody knows yet.
///
/// # Errors
/// The label is not kvctl's alone, or looks like an id.
pub(crate) async fn to_put(
    context: &Context,
    client: &Client,
    name: &str,
    copies: Copies,
) -> Result<NamespaceHandle> {
    if name != DEFAULT_NAMESPACE {
        if let Some(stats) = with_id(client, name).await? {
            refuse_others(name, std::slice::from_ref(&stats))?;
            let label = &stats.namespace.label;
            return context.open_with(client, label, copies).await;
        }
        ensure!(
            name.parse::<NamespaceId>().is_err(),
            "no namespace has the id {name}; see `kvctl namespaces`, or give another label"
        );
        // Where nobody can say, the put goes on: it says itself who does not answer.
        if let Ok(found) = client.find_namespaces(Some(name)).await {
            refuse_others(name, &found)?;
        }
    }
    context.open_with(client, name, copies).await
}

/// The namespace in which a person means this block or key; and with neither, the one that is meant as a whole.
///
/// # Errors
/// There is none, or there are several.
pub(crate) async fn of(
    context: &Context,
    client: &Client,
    name: &str,
    text: Option<&str>,
) -> Result<NamespaceHandle> {
    let is_hash = |text: &str| text.parse::<SequenceHash>().is_ok();
    if text.is_some_and(|text| !is_hash(text)) || name == DEFAULT_NAMESPACE {
        return of_keys(context, client, name).await;
    }
    let found = match with_id(client, name).await? {
        Some(stats) => vec![stats],
        None => client.namespaces(Some(name)).await?.known,
    };
    ensure!(
        found.len() <= 1,
        "{} namespaces are called {name:?}; name one by its id: {}",
        found.len(),
        listed(found.iter().map(|stats| {
            let (model, blocks) = (&stats.namespace.model, stats.blocks);
            format!("{} (model {model}, {blocks} blocks)", stats.id)
        }))
    );
    match found.first() {
        Some(stats) => open(client, stats).await,
        None => Err(none_is_called(client, name).await),
    }
}

/// Whether nodes are older than what they were asked.
fn is_unknown_call(error: &Error) -> bool {
    matches!(
        error,
        Error::Refused {
            code: tonic::Code::Unimplemented,
            ..
        }
    )
}

/// The one with this id, where the text is one and somebody knows it.
async fn with_id(client: &Client, name: &str) -> Result<Option<NamespaceStats>> {
    let Ok(id) = name.parse::<NamespaceId>() else {
        return Ok(None);
    };
    let all = client.find_namespaces(None).await?;
    Ok(all.into_iter().find(|stats| stats.id == id))
}

/// Opens what is there already.
async fn open(client: &Client, stats: &NamespaceStats) -> Result<NamespaceHandle> {
    let handle = client.open_aside(&stats.namespace, 0).await?;
    ensure!(
        handle.id() == stats.id,
        "namespace {} has something that this kvctl does not know; use one of the nodes' version",
        stats.id
    );
    Ok(handle)
}

/// # Errors
/// Some of them are not of kvctl's own shape.
fn refuse_others(name: &str, found: &[NamespaceStats]) -> Result<()> {
    let is_own = |stats: &&NamespaceStats| stats.namespace == own_shape(&stats.namespace.label);
    let Some(other) = found.iter().find(|stats| !is_own(stats)) else {
        return Ok(());
    };
    let own = match found.iter().find(is_own) {
        Some(own) => format!("; kvctl's own there is {}", own.id),
        None => String::new(),
    };
    let Namespace {
        engine_class,
        model,
        ..
    } = &other.namespace;
    bail!(
        "namespace {name:?} is not kvctl's alone (engine {engine_class}, model {model}); keys have names elsewhere, blocks there the 64 hex digits of their hash{own}"
    )
}

async fn none_is_called(client: &Client, name: &str) -> anyhow::Error {
    let problem = format!("no namespace is called {name:?}");
    match client.find_namespaces(None).await {
        Ok(all) if all.is_empty() => anyhow!("{problem}; there is none"),
        Ok(all) => {
            let labels: BTreeSet<String> = all.into_iter().map(|s| s.namespace.label).collect();
            anyhow!("{problem}; there are: {}", listed(labels.into_iter()))
        }
        Err(_) => anyhow!(problem),
    }
}

/// The first few.
fn listed(mut names: impl Iterator<Item = String>) -> String {
    let first: Vec<String> = names.by_ref().take(NAMED).collect();
    match names.count() {
        0 => first.join(", "),
        more => format!("{} and {more} more (kvctl namespaces)", first.join(", ")),
    }
}
