//! `kvctl namespaces`: which there are; and which one a command means.
//!
//! ```text
//! -n LABEL ─► those that members know under it ─┬─ of kvctl's own shape ─► keys by their names
//! -n ID    ─► the one with this id              └─ an engine's ──────────► blocks by their hashes, or all of it
//! ```
//!
//! Why nothing but `put` and `bench` opens a namespace: opened under an engine's label it would be the one last opened
//! there, which the engine's node warns of, and a strict engine is refused for.

use anyhow::{Result, anyhow, bail, ensure};
use kvclient::{
    Client, Error, Namespace, NamespaceHandle, NamespaceId, NamespaceStats, Namespaces,
    SequenceHash,
};
use serde::Serialize;

use crate::context::{Context, DEFAULT_NAMESPACE, own_shape, size, table};

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

pub(crate) async fn run(context: &Context, args: Args) -> Result<()> {
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
    context.print(&report, text)
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

fn text(report: &Report) -> String {
    let cells = |row: &Row| {
        vec![
            match row.is_latest {
                true => row.label.clone(),
                false => format!("{} (before)", row.label),
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
    let mut text = match rows.is_empty() {
        true => "no namespace was opened here\n".to_owned(),
        false => table(&head, &rows),
    };
    for silent in &report.silent {
        text += &format!("not asked: {}: {}\n", silent.endpoint, silent.problem);
    }
    text
}

/// The namespace of the keys under a label, or of one that a person names by its id.
///
/// # Errors
/// There is none; it is an engine's, which has no keys.
pub(crate) async fn of_keys(
    context: &Context,
    client: &Client,
    name: &str,
) -> Result<NamespaceHandle> {
    // Nobody else's, so that it may be opened: what was never put is missing, and no error.
    if name == DEFAULT_NAMESPACE {
        return context.open(client, name).await;
    }
    let Some(found) = known(client, name).await? else {
        return context.open(client, name).await;
    };
    match found.iter().find(|stats| is_own(&stats.namespace)) {
        Some(own) => Ok(client.open_namespace(&own.namespace, false).await?),
        None => Err(no_keys(name, &found[0])),
    }
}

/// Keeps keys out of the labels of engines.
///
/// # Errors
/// An engine has a namespace under this label, and kvctl has none.
pub(crate) async fn refuse_engines(client: &Client, label: &str) -> Result<()> {
    if label == DEFAULT_NAMESPACE {
        return Ok(());
    }
    let Some(found) = labelled(client, Some(label)).await? else {
        return Ok(());
    };
    match &found.known[..] {
        [first, ..] if !found.known.iter().any(|s| is_own(&s.namespace)) => {
            Err(no_keys(label, first))
        }
        _ => Ok(()),
    }
}

fn no_keys(name: &str, stats: &NamespaceStats) -> anyhow::Error {
    let engine = &stats.namespace.engine_class;
    anyhow!(
        "namespace {name:?} is an engine's ({engine}), where kvctl keeps no keys; name another with -n, or a block there by the 64 hex digits of its hash"
    )
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
    let Some(found) = known(client, name).await? else {
        return context.open(client, name).await;
    };
    ensure!(
        found.len() == 1,
        "{} namespaces are called {name:?}; name one by its id: {}",
        found.len(),
        listed(found.iter().map(|stats| {
            let engine = &stats.namespace.engine_class;
            format!("{} ({engine}, {} blocks)", stats.id, stats.blocks)
        }))
    );
    Ok(client.open_namespace(&found[0].namespace, false).await?)
}

fn is_own(namespace: &Namespace) -> bool {
    *namespace == own_shape(&namespace.label)
}

/// Those that members know under this label, or by this id: at least one. `None`: nobody can say, as the nodes are older
/// than the question.
async fn known(client: &Client, name: &str) -> Result<Option<Vec<NamespaceStats>>> {
    let Some(labelled) = labelled(client, Some(name)).await? else {
        return Ok(None);
    };
    if !labelled.known.is_empty() {
        return Ok(Some(labelled.known));
    }
    let all = client.namespaces(None).await?;
    if let Ok(id) = name.parse::<NamespaceId>()
        && let Some(stats) = all.known.iter().find(|stats| stats.id == id)
    {
        return Ok(Some(vec![stats.clone()]));
    }
    let mut problem = format!("no namespace is called {name:?}");
    let mut labels: Vec<String> = all.known.into_iter().map(|s| s.namespace.label).collect();
    labels.sort_unstable();
    labels.dedup();
    match labels.is_empty() {
        true => problem += "; there is none",
        false => problem += &format!("; there are: {}", listed(labels.into_iter())),
    }
    for (endpoint, error) in &all.silent {
        problem += &format!("; {endpoint} was not asked: {error}");
    }
    bail!(problem)
}

/// Those of a label, or all. `None`: the nodes are older than the question.
async fn labelled(client: &Client, label: Option<&str>) -> Result<Option<Namespaces>> {
    match client.namespaces(label).await {
        Err(Error::Refused {
            code: tonic::Code::Unimplemented,
            ..
        }) => Ok(None),
        asked => Ok(Some(asked?)),
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
