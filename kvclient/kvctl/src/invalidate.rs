//! `kvctl invalidate`: forgets, durably.

use anyhow::Result;
use kvclient::{NamespaceHandle, Target};
use serde::Serialize;

use crate::{
    context::{Context, DEFAULT_NAMESPACE},
    key, namespaces,
};

/// Flags of `invalidate`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Forget this key with all its blocks; or, given 64 hex digits, this one block
    #[arg(long, value_name = "KEY|HASH", conflicts_with = "prefix")]
    key: Option<String>,
    /// Forget this block and every block after it in any chain
    #[arg(long, value_name = "KEY|HASH")]
    prefix: Option<String>,
    /// Label of the namespace, or its id; without --key and --prefix, all of it is forgotten
    #[arg(long, short = 'n', required_unless_present_any = ["key", "prefix"])]
    namespace: Option<String>,
}

#[derive(Serialize)]
struct Report {
    namespace: String,
    namespace_id: String,
    blocks: u64,
}

pub(crate) async fn run(context: &Context, args: Args) -> Result<()> {
    let client = context.connect().await?;
    let label = args
        .namespace
        .unwrap_or_else(|| DEFAULT_NAMESPACE.to_owned());
    let text = args.key.as_deref().or(args.prefix.as_deref());
    let namespace = namespaces::of(context, &client, &label, text).await?;
    let target = match (&args.key, &args.prefix) {
        (Some(text), _) => match text.parse() {
            Ok(hash) => Target::Block(hash),
            // A key's own blocks and no others; where nobody can say which they are, all that may be.
            Err(_) => match key::label(&client, &namespace, text).await {
                Ok(Some(of)) => {
                    let chain = key::chain(&namespace, text, &of);
                    let blocks = key::forget(&client, &namespace, &chain).await?;
                    return report(context, &namespace, blocks);
                }
                _ => Target::Prefix(key::block(&namespace, text)),
            },
        },
        (_, Some(text)) => Target::Prefix(key::block(&namespace, text)),
        _ => Target::All,
    };
    let blocks = client.invalidate(&namespace, target).await?;
    report(context, &namespace, blocks)
}

fn report(context: &Context, namespace: &NamespaceHandle, blocks: u64) -> Result<()> {
    let report = Report {
        namespace: namespace.label().to_owned(),
        namespace_id: namespace.id().to_string(),
        blocks,
    };
    context.print(&report, |report| match report.blocks {
        0 => "nothing was there to forget".to_owned(),
        n => format!("{n} blocks forgotten; they stay gone after a restart"),
    })
}
