//! Which namespaces exist: label and shape to id and key, remembered across restarts.
//!
//! ```text
//! data_dir/namespaces.json   one object: every namespace ever opened, those of a label in order of opening
//! data_dir/secret            32 random bytes, mode 0600: from it all hashing keys are derived
//!
//! open ──opened last under its label──────────────────────────────► answered at once
//!      └─ anything else ─► queue ─► writer thread: judge all that wait, one file, one fsync ─► answered
//! ```
//!
//! A label that comes with another fingerprint gets its own namespace and one line that says what
//! differs; a strict caller is refused. Block requests name the id alone; it is looked up here on
//! every call, so that a tenant can never reach another tenant's blocks and the run length is known.
//! No thread that serves calls ever waits for the disk: one writer does, in order of asking, and nobody is
//! answered before what he was told is durable.
//! Bounds: [`Bounds`] namespaces of one tenant and of all, `MAX_OPENING` asks in the queue.
//! Errors: [`BlocksError`]. Units: none.
//! Why a file of our own and not the tiers: a namespace must be known before its first block is.

mod files;
mod names;
#[cfg(test)]
mod tests;
mod writer;

pub(crate) use self::files::read_secret;

use std::{
    collections::HashMap,
    fs, io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, RecvTimeoutError, SyncSender, TrySendError, sync_channel},
    },
    time::Duration,
};

use kvproto::{NamespaceId, convert::request::OpenNamespace, hash::NamespaceKey};
use parking_lot::{Mutex, RwLock};
use tokio::sync::oneshot;

use self::{
    files::read_or_make_secret,
    names::{Manner, Names, Record},
    writer::{Ask, MAX_OPENING, Writer},
};
use super::{BlocksError, tenants::Tenants};
use crate::{
    clock::Clock,
    engine::{Domains, TenantId},
    peers::Space,
};

/// How long a registry that is dropped waits for its writer: a disk that hangs must not hold up a node that stops.
const LAST_WRITE: Duration = Duration::from_secs(2);

/// How many namespaces are remembered.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Of one tenant, so that none uses up what is everybody's.
    pub per_tenant: usize,
    /// Of all tenants together: what the file and its rewriting may cost.
    pub total: usize,
}

/// What a call needs to know of its namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known {
    /// Whose it is.
    pub tenant: TenantId,
    /// Blocks per run.
    pub run_blocks: u32,
    /// Tokens per block.
    pub block_tokens: u32,
    /// Owners of each run, at least 1.
    pub replicas: u32,
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
    /// Members that hold each of its runs.
    pub replicas: u32,
}

/// A namespace that is known here.
#[derive(Clone)]
pub(crate) struct Listed {
    pub(crate) space: Arc<Space>,
    /// It was opened last under its label.
    pub(crate) is_latest: bool,
}

/// Every namespace as peers are told of it.
#[derive(Clone, Default)]
pub(crate) struct Spaces(
    Arc<RwLock<HashMap<NamespaceId, Arc<Space>>>>,
    Arc<AtomicBool>,
);

impl Spaces {
    /// The namespace of this id.
    pub(crate) fn get(&self, id: &NamespaceId) -> Option<Arc<Space>> {
        self.0.read().get(id).cloned()
    }

    fn of(&self, is_wanted: impl Fn(&Space) -> bool) -> Vec<Arc<Space>> {
        let spaces = self.0.read();
        let wanted = spaces.values().filter(|space| is_wanted(space));
        wanted.cloned().collect()
    }

    fn set(&self, space: Space) {
        if space.replicas > 1 {
            self.1.store(true, Ordering::Release);
        }
        self.0.write().insert(space.id, Arc::new(space));
    }
}

/// The registry.
pub struct Namespaces {
    secret: Vec<u8>,
    shared: Arc<Shared>,
    /// `None` only while it is dropped.
    asks: Option<SyncSender<Ask>>,
    /// Closed when the writer has ended.
    ended: Mutex<mpsc::Receiver<()>>,
}

/// What is durable, for those who ask.
struct Shared {
    known: RwLock<HashMap<NamespaceId, Known>>,
    spaces: Spaces,
    names: RwLock<Names>,
    /// Told of a namespace before anybody can use it.
    domains: Arc<Domains>,
}

impl Namespaces {
    /// Reads the registry of `data_dir`, or begins one. `secret_file` empty: `data_dir/secret`.
    ///
    /// # Errors
    /// When a file cannot be read or written, or holds something else.
    pub fn open(
        data_dir: &Path,
        secret_file: &Path,
        bounds: Bounds,
        tenants: &Tenants,
        domains: Arc<Domains>,
        clock: &dyn Clock,
    ) -> io::Result<Self> {
        let secret = match secret_file.as_os_str().is_empty() {
            true => read_or_make_secret(&data_dir.join("secret"), clock)?,
            false => read_secret(secret_file)?,
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
            Err(e) => {
                let problem = format!("cannot read {}: {e}", file.display());
                return Err(io::Error::new(e.kind(), problem));
            }
        };
        let known: HashMap<NamespaceId, Known> = records
            .iter()
            .filter_map(|record| {
                // A tenant that is no longer in the token file cannot call; its blocks wait for it.
                let tenant = tenants.find(&record.tenant)?;
                Some((record.namespace().id(&record.tenant), record.known(tenant)))
            })
            .collect();
        for (id, known) in &known {
            domains.set(*id, known.tenant.domain());
        }
        let spaces = Spaces::default();
        for record in &records {
            spaces.set(record.space());
        }
        let mut names = Names::default();
        records.into_iter().for_each(|record| names.take(record));
        let shared = Arc::new(Shared {
            known: RwLock::new(known),
            spaces,
            names: RwLock::new(names),
            domains,
        });
        let (asks, asked) = sync_channel(MAX_OPENING);
        let writer = Writer {
            file,
            bounds,
            shared: Arc::clone(&shared),
        };
        let (ending, ended) = mpsc::channel();
        std::thread::Builder::new()
            .name("terrace-namespaces".to_owned())
            .spawn(move || {
                let _ending: mpsc::Sender<()> = ending; // dropped last, however the writer ends
                writer.run(&asked);
            })?;
        Ok(Self {
            secret,
            shared,
            asks: Some(asks),
            ended: Mutex::new(ended),
        })
    }

    /// Opens a namespace for a tenant; see the module's page. Once asked it is opened even if nobody waits for
    /// the answer any more. `default_replicas`: owners of its runs where nobody has said how many.
    ///
    /// # Errors
    /// A wrong field, a strict caller's difference, too many namespaces, or a registry that cannot be
    /// written.
    pub async fn open_namespace(
        &self,
        tenant: TenantId,
        tenant_name: &str,
        asked: &OpenNamespace,
        default_replicas: u32,
    ) -> Result<OpenedNamespace, BlocksError> {
        let namespace = &asked.namespace;
        namespace.validate()?;
        let id = namespace.id(tenant_name);
        let replicas = match asked.replicas {
            0 => {
                let known = self.shared.known.read();
                known
                    .get(&id)
                    .map_or(default_replicas, |known| known.replicas)
            }
            asked => asked,
        };
        let record = Record::of(tenant_name, namespace, replicas);
        let is_last = self.shared.names.read().last(&record) == Some(&record);
        let manner = Manner {
            strict: asked.strict,
            aside: asked.aside,
        };
        let difference = match is_last {
            true => None,
            false => self.ask(tenant, record, manner).await?,
        };
        Ok(OpenedNamespace {
            id,
            key: namespace.key(tenant_name, &self.secret),
            difference,
            replicas,
        })
    }

    async fn ask(
        &self,
        tenant: TenantId,
        record: Record,
        manner: Manner,
    ) -> Result<Option<String>, BlocksError> {
        let stopping = || BlocksError::Registry(io::Error::other("the node is stopping"));
        let (answer, answered) = oneshot::channel();
        let ask = Ask {
            tenant,
            record,
            manner,
            answer,
        };
        let asks = self.asks.as_ref().ok_or_else(stopping)?;
        asks.try_send(ask).map_err(|refused| match refused {
            TrySendError::Full(_) => BlocksError::Overloaded {
                what: "namespaces being opened",
                field: "spec",
                limit: MAX_OPENING,
            },
            TrySendError::Disconnected(_) => stopping(),
        })?;
        answered.await.unwrap_or_else(|_| Err(stopping()))
    }

    /// What is known of a namespace of this tenant.
    ///
    /// # Errors
    /// When it was never opened here, or is another tenant's: the two are told apart by nobody.
    pub fn get(&self, tenant: TenantId, id: NamespaceId) -> Result<Known, BlocksError> {
        match self.shared.known.read().get(&id) {
            Some(known) if known.tenant == tenant => Ok(*known),
            _ => Err(BlocksError::UnknownNamespace(id)),
        }
    }

    /// Those of a tenant, by id, at most `most`: of one label or of all, from the first on or after one. And whether
    /// there are more.
    pub(crate) fn list(
        &self,
        tenant_name: &str,
        label: Option<&str>,
        after: Option<NamespaceId>,
        most: usize,
    ) -> (Vec<Listed>, bool) {
        let mut spaces = self.shared.spaces.of(|space| {
            &*space.tenant == tenant_name
                && label.is_none_or(|label| space.shape.label == label)
                && after.is_none_or(|after| space.id > after)
        });
        spaces.sort_unstable_by_key(|space| space.id);
        let and_more = spaces.len() > most;
        spaces.truncate(most);
        let names = self.shared.names.read();
        let listed = spaces.into_iter().map(|space| Listed {
            is_latest: names
                .last_of(tenant_name, &space.shape.label)
                .is_some_and(|last| last.namespace() == *space.shape),
            space,
        });
        (listed.collect(), and_more)
    }

    /// Whether the runs of any namespace ever had several owners.
    pub(crate) fn any_replicated(&self) -> bool {
        self.shared.spaces.1.load(Ordering::Acquire)
    }

    /// All of them, for peers.
    pub(crate) fn spaces(&self) -> Spaces {
        self.shared.spaces.clone()
    }

    /// What all hashing keys are derived from.
    pub(crate) fn secret(&self) -> &[u8] {
        &self.secret
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.shared.known.read().len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Drop for Namespaces {
    /// The writer ends with what it was given, so that no later node of the same folder meets its hand, unless the
    /// disk hangs.
    fn drop(&mut self) {
        self.asks = None;
        if let Err(RecvTimeoutError::Timeout) = self.ended.get_mut().recv_timeout(LAST_WRITE) {
            tracing::warn!("the registry of namespaces is still being written; its disk hangs");
        }
    }
}
