//! Which namespaces exist: label and shape to id and key, remembered across restarts.
//!
//! ```text
//! data_dir/namespaces.json   one object: every namespace ever opened, in order of opening
//! data_dir/secret            32 random bytes, mode 0600: from it all hashing keys are derived
//! ```
//!
//! A label that comes with another fingerprint gets its own namespace and one line that says what
//! differs; a strict caller is refused. Block requests name the id alone; it is looked up here on
//! every call, so that a tenant can never reach another tenant's blocks and the run length is known.
//! Errors: [`BlocksError`]. Units: none.
//! Why a file of our own and not the tiers: a namespace must be known before its first block is.

use std::{
    collections::HashMap,
    fs, io,
    io::Write,
    path::{Path, PathBuf},
};

use kvproto::{
    NamespaceId,
    hash::NamespaceKey,
    namespace::{Layout, Namespace, World},
};
use parking_lot::{Mutex, RwLock};
use serde::{Deserialize, Serialize};

use super::{BlocksError, tenants::Tenants};
use crate::{clock::Clock, engine::TenantId};

/// What a call needs to know of its namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known {
    /// Whose it is.
    pub tenant: TenantId,
    /// Blocks per run.
    pub run_blocks: u32,
    /// Tokens per block.
    pub block_tokens: u32,
}

/// The answer of a handshake.
#[derive(Clone, Debug)]
pub struct OpenedNamespace {
    /// First part of every block key.
    pub id: NamespaceId,
    /// Key of every hash.
    pub key: NamespaceKey,
    /// What differs from the namespace last opened under this label.
    pub difference: Option<String>,
}

/// The registry.
pub struct Namespaces {
    file: PathBuf,
    secret: Vec<u8>,
    most: usize,
    known: RwLock<HashMap<NamespaceId, Known>>,
    /// Taken before `known`; held while the file is written, so that it never goes back in time.
    records: Mutex<Vec<Record>>,
}

impl Namespaces {
    /// Reads the registry of `data_dir`, or begins one. `secret_file` empty: `data_dir/secret`.
    ///
    /// # Errors
    /// When a file cannot be read or written, or holds something else.
    pub fn open(
        data_dir: &Path,
        secret_file: &Path,
        most: usize,
        tenants: &Tenants,
        clock: &dyn Clock,
    ) -> io::Result<Self> {
        let secret = match secret_file.as_os_str().is_empty() {
            true => read_or_make_secret(&data_dir.join("secret"), clock)?,
            false => check_secret(fs::read(secret_file)?, secret_file)?,
        };
        let file = data_dir.join("namespaces.json");
        let records: Vec<Record> = match fs::read(&file) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| {
                io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("{}: {e}", file.display()),
                )
            })?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(e) => return Err(e),
        };
        let known = records
            .iter()
            .filter_map(|record| {
                // A tenant that is no longer in the token file cannot call; its blocks wait for it.
                let tenant = tenants.find(&record.tenant)?;
                Some((record.namespace().id(&record.tenant), record.known(tenant)))
            })
            .collect();
        Ok(Self {
            file,
            secret,
            most,
            known: RwLock::new(known),
            records: Mutex::new(records),
        })
    }

    /// Opens a namespace for a tenant; see the module's page.
    ///
    /// # Errors
    /// A wrong field, a strict caller's difference, too many namespaces, or a registry that cannot be
    /// written.
    pub fn open_namespace(
        &self,
        tenant: TenantId,
        tenant_name: &str,
        namespace: &Namespace,
        strict: bool,
    ) -> Result<OpenedNamespace, BlocksError> {
        namespace.validate()?;
        let id = namespace.id(tenant_name);
        let mut records = self.records.lock();
        let of_label =
            |record: &&Record| record.tenant == tenant_name && record.label == namespace.label;
        let difference = records
            .iter()
            .rfind(of_label)
            .and_then(|last| namespace.differences(&last.namespace()));
        if let (true, Some(difference)) = (strict, &difference) {
            return Err(BlocksError::NamespaceDiffers {
                label: namespace.label.clone(),
                difference: difference.clone(),
            });
        }
        let record = Record::of(tenant_name, namespace);
        // The last record of a label is the one last opened: a reopened one moves to the end.
        if records.iter().rfind(of_label) != Some(&record) {
            let mut next: Vec<Record> = records.iter().filter(|r| **r != record).cloned().collect();
            if next.len() >= self.most {
                return Err(BlocksError::Overloaded {
                    what: "namespaces",
                    limit: self.most,
                });
            }
            next.push(record.clone());
            write_whole(
                &self.file,
                &serde_json::to_vec_pretty(&next).expect("plain fields"),
                0o644,
            )
            .map_err(BlocksError::Registry)?;
            self.known.write().insert(id, record.known(tenant));
            *records = next;
        }
        Ok(OpenedNamespace {
            id,
            key: namespace.key(tenant_name, &self.secret),
            difference,
        })
    }

    /// What is known of a namespace of this tenant.
    ///
    /// # Errors
    /// When it was never opened here, or is another tenant's: the two are told apart by nobody.
    pub fn get(&self, tenant: TenantId, id: NamespaceId) -> Result<Known, BlocksError> {
        match self.known.read().get(&id) {
            Some(known) if known.tenant == tenant => Ok(*known),
            _ => Err(BlocksError::UnknownNamespace(id)),
        }
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.known.read().len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A namespace as the file holds it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    tenant: String,
    label: String,
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
    engine_class: String,
}

impl Record {
    fn of(tenant: &str, n: &Namespace) -> Self {
        Self {
            tenant: tenant.to_owned(),
            label: n.label.clone(),
            model: n.model.clone(),
            weights: n.weights.clone(),
            tokenizer: n.tokenizer.clone(),
            kv_dtype: n.kv_dtype.clone(),
            layers: n.layout.layers,
            kv_heads: n.layout.kv_heads,
            head_size: n.layout.head_size,
            packing: n.layout.packing.clone(),
            block_tokens: n.block_tokens,
            run_blocks: n.run_blocks,
            tensor_parallel: n.world.tensor,
            pipeline_parallel: n.world.pipeline,
            context_parallel: n.world.context,
            engine_class: n.engine_class.clone(),
        }
    }

    fn namespace(&self) -> Namespace {
        Namespace {
            label: self.label.clone(),
            model: self.model.clone(),
            weights: self.weights.clone(),
            tokenizer: self.tokenizer.clone(),
            kv_dtype: self.kv_dtype.clone(),
            layout: Layout {
                layers: self.layers,
                kv_heads: self.kv_heads,
                head_size: self.head_size,
                packing: self.packing.clone(),
            },
            block_tokens: self.block_tokens,
            run_blocks: self.run_blocks,
            world: World {
                tensor: self.tensor_parallel,
                pipeline: self.pipeline_parallel,
                context: self.context_parallel,
            },
            engine_class: self.engine_class.clone(),
        }
    }

    fn known(&self, tenant: TenantId) -> Known {
        Known {
            tenant,
            run_blocks: self.run_blocks,
            block_tokens: self.block_tokens,
        }
    }
}

const SECRET_BYTES: usize = 32;

fn read_or_make_secret(path: &Path, clock: &dyn Clock) -> io::Result<Vec<u8>> {
    match fs::read(path) {
        Ok(secret) => check_secret(secret, path),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let words = (0..SECRET_BYTES / 8).flat_map(|_| clock.random_u64().to_le_bytes());
            let secret: Vec<u8> = words.collect();
            write_whole(path, &secret, 0o600)?;
            Ok(secret)
        }
        Err(e) => Err(e),
    }
}

fn check_secret(secret: Vec<u8>, path: &Path) -> io::Result<Vec<u8>> {
    if secret.len() >= SECRET_BYTES {
        return Ok(secret);
    }
    let problem = format!(
        "{}: {} bytes, a secret has at least {SECRET_BYTES}",
        path.display(),
        secret.len()
    );
    Err(io::Error::new(io::ErrorKind::InvalidData, problem))
}

/// The old file or the new one, whatever happens: written beside it, synced, renamed.
fn write_whole(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let beside = path.with_extension("new");
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(&beside)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&beside, path)?;
    let folder = path
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    fs::File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{blocks::tenants::DEFAULT_TENANT, clock::SystemClock};

    const ME: TenantId = TenantId(0);

    fn registry(dir: &Path) -> Namespaces {
        Namespaces::open(dir, Path::new(""), 3, &Tenants::open(), &SystemClock::new()).unwrap()
    }

    fn open(registry: &Namespaces, namespace: &Namespace) -> OpenedNamespace {
        registry
            .open_namespace(ME, DEFAULT_TENANT, namespace, false)
            .unwrap()
    }

    #[test]
    fn a_restart_keeps_ids_and_keys() {
        let dir = tempfile::tempdir().unwrap();
        let namespace = Namespace::opaque("a", 16, 8);
        let before = open(&registry(dir.path()), &namespace);
        let again = registry(dir.path());
        assert_eq!(again.get(ME, before.id).unwrap().run_blocks, 8);
        let after = open(&again, &namespace);
        assert_eq!(
            (after.id, after.key.as_bytes()),
            (before.id, before.key.as_bytes())
        );
        assert_eq!(after.difference, None);
    }

    #[test]
    fn another_shape_under_a_known_label_is_another_namespace_and_says_why() {
        let dir = tempfile::tempdir().unwrap();
        let registry = registry(dir.path());
        let first = open(&registry, &Namespace::opaque("a", 16, 8));
        let second = open(&registry, &Namespace::opaque("a", 32, 8));
        assert_ne!(first.id, second.id);
        assert_eq!(second.difference.unwrap(), "block_tokens was 16, is 32");
        // Back again: the last one opened is what it is compared with.
        let third = open(&registry, &Namespace::opaque("a", 16, 8));
        assert_eq!(third.difference.unwrap(), "block_tokens was 32, is 16");
        assert_eq!(third.id, first.id);
    }

    #[test]
    fn a_strict_caller_is_refused_and_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let registry = registry(dir.path());
        open(&registry, &Namespace::opaque("a", 16, 8));
        let other = Namespace::opaque("a", 32, 8);
        let refused = registry
            .open_namespace(ME, DEFAULT_TENANT, &other, true)
            .unwrap_err();
        assert!(matches!(refused, BlocksError::NamespaceDiffers { .. }));
        assert!(registry.get(ME, other.id(DEFAULT_TENANT)).is_err());
    }

    #[test]
    fn the_registry_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let registry = registry(dir.path());
        for label in ["a", "b", "c"] {
            open(&registry, &Namespace::opaque(label, 16, 8));
        }
        let one_more =
            registry.open_namespace(ME, DEFAULT_TENANT, &Namespace::opaque("d", 16, 8), false);
        assert!(matches!(
            one_more,
            Err(BlocksError::Overloaded { limit: 3, .. })
        ));
    }

    #[test]
    fn a_namespace_of_another_tenant_is_unknown() {
        let dir = tempfile::tempdir().unwrap();
        let registry = registry(dir.path());
        let mine = open(&registry, &Namespace::opaque("a", 16, 8));
        assert!(registry.get(TenantId(1), mine.id).is_err());
    }
}
