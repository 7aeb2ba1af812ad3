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

use std::{
    collections::{BTreeMap, HashMap},
    fs, io,
    io::Write,
    path::{Path, PathBuf},
    sync::{
        Arc,
        mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    },
    thread::JoinHandle,
};

use kvproto::{
    NamespaceId,
    hash::NamespaceKey,
    namespace::{Layout, Namespace, World},
};
use parking_lot::RwLock;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::{BlocksError, tenants::Tenants};
use crate::{clock::Clock, engine::TenantId};

/// Asks that may wait for the registry's file; each is a caller that waits, and one write serves them all.
const MAX_OPENING: usize = 256;

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
    secret: Vec<u8>,
    shared: Arc<Shared>,
    /// `None` only while it is dropped.
    asks: Option<SyncSender<Ask>>,
    writer: Option<JoinHandle<()>>,
}

/// What is durable, for those who ask.
struct Shared {
    known: RwLock<HashMap<NamespaceId, Known>>,
    names: RwLock<Names>,
}

/// A namespace to be opened, and who waits for it.
struct Ask {
    tenant: TenantId,
    record: Record,
    strict: bool,
    answer: oneshot::Sender<Result<Option<String>, BlocksError>>,
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
        let mut names = Names::default();
        records.into_iter().for_each(|record| names.push(record));
        let shared = Arc::new(Shared {
            known: RwLock::new(known),
            names: RwLock::new(names),
        });
        let (asks, asked) = sync_channel(MAX_OPENING);
        let writer = Writer {
            file,
            bounds,
            shared: Arc::clone(&shared),
        };
        let writer = std::thread::Builder::new()
            .name("terrace-namespaces".to_owned())
            .spawn(move || writer.run(&asked))?;
        Ok(Self {
            secret,
            shared,
            asks: Some(asks),
            writer: Some(writer),
        })
    }

    /// Opens a namespace for a tenant; see the module's page. Once asked it is opened even if nobody waits for
    /// the answer any more.
    ///
    /// # Errors
    /// A wrong field, a strict caller's difference, too many namespaces, or a registry that cannot be
    /// written.
    pub async fn open_namespace(
        &self,
        tenant: TenantId,
        tenant_name: &str,
        namespace: &Namespace,
        strict: bool,
    ) -> Result<OpenedNamespace, BlocksError> {
        namespace.validate()?;
        let record = Record::of(tenant_name, namespace);
        let is_last = self.shared.names.read().last(&record) == Some(&record);
        let difference = match is_last {
            true => None,
            false => self.ask(tenant, record, strict).await?,
        };
        Ok(OpenedNamespace {
            id: namespace.id(tenant_name),
            key: namespace.key(tenant_name, &self.secret),
            difference,
        })
    }

    async fn ask(
        &self,
        tenant: TenantId,
        record: Record,
        strict: bool,
    ) -> Result<Option<String>, BlocksError> {
        let stopping = || BlocksError::Registry(io::Error::other("the node is stopping"));
        let (answer, answered) = oneshot::channel();
        let ask = Ask {
            tenant,
            record,
            strict,
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
    /// The writer ends with what it was given: no later node of the same folder meets its hand.
    fn drop(&mut self) {
        self.asks = None;
        if let Some(writer) = self.writer.take() {
            let _ = writer.join(); // a panic there was told when it happened
        }
    }
}

/// The one who writes the file.
struct Writer {
    file: PathBuf,
    bounds: Bounds,
    shared: Arc<Shared>,
}

impl Writer {
    fn run(&self, asked: &Receiver<Ask>) {
        while let Ok(first) = asked.recv() {
            let waiting = asked.try_iter().take(MAX_OPENING - 1);
            self.serve(std::iter::once(first).chain(waiting).collect());
        }
    }

    /// Judges asks in order, makes them durable together, and answers.
    fn serve(&self, asks: Vec<Ask>) {
        let mut next = self.shared.names.read().clone();
        let mut new: Vec<(NamespaceId, Known)> = Vec::new();
        let mut answers = Vec::new();
        for ask in &asks {
            let judged = next.open(&ask.record, ask.strict, self.bounds);
            if let Ok((_, true)) = &judged {
                let id = ask.record.namespace().id(&ask.record.tenant);
                new.push((id, ask.record.known(ask.tenant)));
            }
            answers.push(judged.map(|(difference, _)| difference));
        }
        let written = match new.is_empty() {
            true => Ok(()),
            false => self.write(&next),
        };
        match written {
            Ok(()) => {
                self.shared.known.write().extend(new);
                *self.shared.names.write() = next;
            }
            // Who asked twice in one batch leans on what was not written: nobody is told yes.
            Err(error) => {
                for answer in answers.iter_mut().filter(|answer| answer.is_ok()) {
                    let told = io::Error::new(error.kind(), error.to_string());
                    *answer = Err(BlocksError::Registry(told));
                }
            }
        }
        for (ask, answer) in asks.into_iter().zip(answers) {
            let _ = ask.answer.send(answer); // who has gone away asks again
        }
    }

    fn write(&self, names: &Names) -> io::Result<()> {
        let records: Vec<&Record> = names.iter().collect();
        let text = serde_json::to_vec_pretty(&records).expect("plain fields");
        write_whole(&self.file, &text, 0o644)
    }
}

/// All records, by tenant and label; those of one label in order of opening.
#[derive(Clone, Default)]
struct Names {
    tenants: BTreeMap<String, Labels>,
    len: usize,
}

#[derive(Clone, Default)]
struct Labels {
    records: BTreeMap<String, Vec<Record>>,
    len: usize,
}

impl Names {
    /// The record last opened under this one's label.
    fn last(&self, record: &Record) -> Option<&Record> {
        let labels = self.tenants.get(&record.tenant)?;
        labels.records.get(&record.label)?.last()
    }

    /// Opens a namespace: what differs from the last of its label, and whether anything changed.
    fn open(
        &mut self,
        record: &Record,
        strict: bool,
        bounds: Bounds,
    ) -> Result<(Option<String>, bool), BlocksError> {
        let last = self.last(record);
        let difference = last.and_then(|last| record.namespace().differences(&last.namespace()));
        if let (true, Some(difference)) = (strict, &difference) {
            return Err(BlocksError::NamespaceDiffers {
                label: record.label.clone(),
                difference: difference.clone(),
            });
        }
        if last == Some(record) {
            return Ok((None, false));
        }
        let labels = self.tenants.get(&record.tenant);
        let is_old = labels
            .and_then(|labels| labels.records.get(&record.label))
            .is_some_and(|records| records.contains(record));
        if !is_old {
            let of_tenant = labels.map_or(0, |labels| labels.len);
            let refuse = |what, field, limit| Err(BlocksError::Overloaded { what, field, limit });
            if of_tenant >= bounds.per_tenant {
                let what = "namespaces of this tenant";
                return refuse(what, "max_namespaces", bounds.per_tenant);
            }
            if self.len >= bounds.total {
                return refuse("namespaces", "max_namespaces_total", bounds.total);
            }
        }
        self.push(record.clone());
        Ok((difference, true))
    }

    /// The last record of a label is the one last opened: a reopened one moves to the end.
    fn push(&mut self, record: Record) {
        let labels = self.tenants.entry(record.tenant.clone()).or_default();
        let records = labels.records.entry(record.label.clone()).or_default();
        let before = records.len();
        records.retain(|held| *held != record);
        records.push(record);
        if records.len() > before {
            labels.len += 1;
            self.len += 1;
        }
    }

    fn iter(&self) -> impl Iterator<Item = &Record> {
        let labels = self.tenants.values();
        labels.flat_map(|labels| labels.records.values().flatten())
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
    use std::{
        task::{Context, Poll, Waker},
        time::Duration,
    };

    use super::*;
    use crate::{blocks::tenants::DEFAULT_TENANT, clock::SystemClock};

    const ME: TenantId = TenantId(0);

    fn registry(dir: &Path) -> Namespaces {
        let bounds = Bounds {
            per_tenant: 3,
            total: 5,
        };
        let tenants = Tenants::open();
        Namespaces::open(dir, Path::new(""), bounds, &tenants, &SystemClock::new()).unwrap()
    }

    async fn open_as(
        registry: &Namespaces,
        tenant: &str,
        label: &str,
    ) -> Result<OpenedNamespace, BlocksError> {
        let namespace = Namespace::opaque(label, 16, 8);
        registry.open_namespace(ME, tenant, &namespace, false).await
    }

    async fn open(registry: &Namespaces, namespace: &Namespace) -> OpenedNamespace {
        let opened = registry.open_namespace(ME, DEFAULT_TENANT, namespace, false);
        opened.await.unwrap()
    }

    #[tokio::test]
    async fn a_restart_keeps_ids_and_keys() {
        let dir = tempfile::tempdir().unwrap();
        let namespace = Namespace::opaque("a", 16, 8);
        let before = open(&registry(dir.path()), &namespace).await;
        let again = registry(dir.path());
        assert_eq!(again.get(ME, before.id).unwrap().run_blocks, 8);
        let after = open(&again, &namespace).await;
        assert_eq!(
            (after.id, after.key.as_bytes()),
            (before.id, before.key.as_bytes())
        );
        assert_eq!(after.difference, None);
    }

    #[tokio::test]
    async fn another_shape_under_a_known_label_is_another_namespace_and_says_why() {
        let dir = tempfile::tempdir().unwrap();
        let first = open(&registry(dir.path()), &Namespace::opaque("a", 16, 8)).await;
        let registry = registry(dir.path());
        let second = open(&registry, &Namespace::opaque("a", 32, 8)).await;
        assert_ne!(first.id, second.id);
        assert_eq!(second.difference.unwrap(), "block_tokens was 16, is 32");
        // Back again: the last one opened is what it is compared with.
        let third = open(&registry, &Namespace::opaque("a", 16, 8)).await;
        assert_eq!(third.difference.unwrap(), "block_tokens was 32, is 16");
        assert_eq!(third.id, first.id);
        assert_eq!(registry.len(), 2);
    }

    #[tokio::test]
    async fn a_strict_caller_is_refused_and_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let registry = registry(dir.path());
        open(&registry, &Namespace::opaque("a", 16, 8)).await;
        let other = Namespace::opaque("a", 32, 8);
        let refused = registry.open_namespace(ME, DEFAULT_TENANT, &other, true);
        assert!(matches!(
            refused.await,
            Err(BlocksError::NamespaceDiffers { .. })
        ));
        assert!(registry.get(ME, other.id(DEFAULT_TENANT)).is_err());
    }

    #[tokio::test]
    async fn a_tenant_that_has_all_it_may_have_takes_nothing_from_another() {
        let dir = tempfile::tempdir().unwrap();
        let registry = registry(dir.path());
        for label in ["a", "b", "c"] {
            open_as(&registry, "one", label).await.unwrap();
        }
        let refused = open_as(&registry, "one", "d").await.unwrap_err();
        assert!(refused.to_string().contains("max_namespaces:"), "{refused}");
        open_as(&registry, "one", "a").await.unwrap();
        open_as(&registry, "two", "a").await.unwrap();
        open_as(&registry, "two", "b").await.unwrap();
        let refused = open_as(&registry, "three", "a").await.unwrap_err();
        assert!(
            refused.to_string().contains("max_namespaces_total:"),
            "{refused}"
        );
    }

    #[tokio::test]
    async fn a_namespace_of_another_tenant_is_unknown() {
        let dir = tempfile::tempdir().unwrap();
        let registry = registry(dir.path());
        let mine = open(&registry, &Namespace::opaque("a", 16, 8)).await;
        assert!(registry.get(TenantId(1), mine.id).is_err());
    }

    /// Opening a pipe for writing waits for a reader: a disk that hangs.
    #[tokio::test]
    async fn a_disk_that_hangs_holds_up_nobody_who_needs_no_disk() {
        let dir = tempfile::tempdir().unwrap();
        let registry = registry(dir.path());
        let known = open(&registry, &Namespace::opaque("a", 16, 8)).await;
        let pipe = dir.path().join("namespaces.new");
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        // Should the calling thread wait after all, the test fails and does not hang.
        let reader = pipe.clone();
        let (done, is_done) = std::sync::mpsc::channel::<()>();
        let rescue = std::thread::spawn(move || {
            let timely = is_done.recv_timeout(Duration::from_secs(10)).is_ok();
            // Whoever opens it next finds an ordinary file.
            let opened = fs::File::open(&reader);
            fs::remove_file(&reader).unwrap();
            drop(opened);
            timely
        });
        let mut cx = Context::from_waker(Waker::noop());
        let mut stuck = Vec::new();
        // One batch in the writer's hand, at most, and one in the queue; more are told.
        let mut refused = 0;
        for i in 0..2 * MAX_OPENING + 1 {
            let label = format!("n{i}");
            let tenant = format!("t{i}");
            let registry = &registry;
            let mut opening = Box::pin(async move { open_as(registry, &tenant, &label).await });
            match opening.as_mut().poll(&mut cx) {
                Poll::Pending => stuck.push(opening),
                Poll::Ready(Err(BlocksError::Overloaded { limit, .. })) => {
                    assert_eq!(limit, MAX_OPENING);
                    refused += 1;
                }
                Poll::Ready(other) => panic!("answered before it was durable: {other:?}"),
            }
        }
        assert!(refused >= 1 && stuck.len() >= MAX_OPENING);
        assert!(registry.get(ME, known.id).is_ok());
        let again = open(&registry, &Namespace::opaque("a", 16, 8)).await;
        assert_eq!(again.id, known.id);
        done.send(()).unwrap();
        assert!(
            rescue.join().unwrap(),
            "the calling thread waited for the disk"
        );
        // A pipe cannot be synced: the first batch is told so, and is not known.
        let first = stuck.remove(0).await.unwrap_err();
        assert!(matches!(first, BlocksError::Registry(_)), "{first}");
        let unknown = Namespace::opaque("n0", 16, 8).id("t0");
        assert!(registry.get(ME, unknown).is_err());
    }
}
