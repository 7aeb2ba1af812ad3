//! `kvserver --check`: tries what a start needs, and leaves nothing behind.
//!
//! ```text
//! data folder free? ─► secret, sizes ─► a node of the same settings in a folder that goes: small tiers, a cluster of its own
//!                                     └► does anybody of --join answer? (no error: this node may be the first)
//! ```
//!
//! Why not the node itself: it would reserve its tiers on the disk, and tell the cluster of a member that is about to stop.
//! Errors: those of a start, and a tier that would be out of service.

use std::{
    error::Error,
    path::{Path, PathBuf},
    time::Duration,
};

use tempfile::TempDir;
use tokio::{net::TcpStream, time::timeout};

use crate::{
    Node,
    blocks::namespaces,
    config::{Capacity, Chosen, Config, HostPort, MIB, choose, existing, fits_disk},
    data_dir::{DataDir, DataDirError},
};

/// How long each of those to join has to answer.
const ANSWER_TIME: Duration = Duration::from_secs(2);

/// A tier of the node that is tried has so many bytes at most: enough to be opened.
const TIER_BYTES: u64 = 256 * MIB;

/// Tries it; what there is to say of the sizes and of the cluster, a line each.
pub(super) async fn check(config: &Config) -> Result<Vec<String>, Box<dyn Error>> {
    config.validate()?;
    if config.data_dir.join("lock").exists() {
        drop(DataDir::open(&config.data_dir)?);
    }
    let kept = config.data_dir.join("secret");
    match config.secret_file.as_os_str().is_empty() {
        false => _ = namespaces::read_secret(&config.secret_file)?,
        true if kept.exists() => _ = namespaces::read_secret(&kept)?,
        true => {}
    }
    let chosen = choose(config);
    fits_disk(config, &chosen)?;
    let folder = folder_beside(&config.data_dir)?;
    let names = config.data_dir.join("namespaces.json");
    if names.exists() {
        std::fs::copy(&names, folder.path().join("namespaces.json"))?;
    }
    let node = Node::start(small(config, &chosen, folder.path())).await?;
    let tiers = node.blocks().snapshot().tiers;
    node.shutdown(config.shutdown_deadline).await;
    if let Some(tier) = tiers.iter().find(|tier| !tier.in_service) {
        return Err(format!(
            "the node would be without its {} tier: {}",
            tier.kind, tier.note
        )
        .into());
    }
    let mut lines: Vec<String> = chosen
        .reasons
        .iter()
        .map(|r| format!("size     {r}"))
        .collect();
    lines.extend(cluster(&config.join).await);
    Ok(lines)
}

/// Where the data folder is or would be, on the same file system; gone when the check is over.
fn folder_beside(data_dir: &Path) -> Result<TempDir, DataDirError> {
    let made = tempfile::Builder::new()
        .prefix(".check-")
        .tempdir_in(existing(data_dir));
    made.map_err(|source| DataDirError::Unwritable {
        path: data_dir.to_owned(),
        source,
    })
}

/// The same node in another folder, with tiers that are soon made, and with a name and a secret of its own: nobody of the
/// cluster could take it for a member.
fn small(config: &Config, chosen: &Chosen, folder: &Path) -> Config {
    let at_most = |bytes: u64| Capacity::Bytes(bytes.min(TIER_BYTES));
    Config {
        data_dir: folder.to_owned(),
        nvme_bytes: at_most(chosen.nvme_bytes),
        durable_bytes: at_most(chosen.durable_bytes),
        join: Vec::new(),
        node_id: String::new(),
        secret_file: PathBuf::new(),
        prefault: false,
        ..config.clone()
    }
}

/// Whether anybody of the cluster can be reached.
async fn cluster(join: &[HostPort]) -> Option<String> {
    let mut problems = Vec::new();
    for address in join {
        let connecting = TcpStream::connect((&*address.host, address.port));
        match timeout(ANSWER_TIME, connecting).await {
            Ok(Ok(_)) => return Some(format!("join     {address} can be reached")),
            Ok(Err(error)) => problems.push(format!("{address}: {error}")),
            Err(_) => problems.push(format!("{address}: no answer within {ANSWER_TIME:?}")),
        }
    }
    let problems = problems.join(", ");
    (!join.is_empty()).then(|| format!("join     nobody can be reached now ({problems})"))
}
