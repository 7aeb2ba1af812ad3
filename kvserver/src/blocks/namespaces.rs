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

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, RecvTimeoutError, SyncSender, TrySendError, sync_channel},
    },
    time::Duration,
};

use kvproto::{NamespaceId, hash::NamespaceKey, namespace::Namespace};
use parking_lot::{Mutex, RwLock};
use tokio::sync::oneshot;

use self::{
    files::{check_secret, read_or_make_secret},
    names::{Names, Record},
};
use super::{BlocksError, tenants::Tenants};
use crate::{
    clock::Clock,
    data_dir::write_whole,
    engine::{Domains, TenantId},
    peers::Space,
};

/// Asks that may wait for the registry's file; each is a caller that waits, and one write serves them all.
const MAX_OPENING: usize = 256;

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

/// How many owners the runs of a namespace have.
#[derive(Clone, Copy, Debug)]
pub struct Replicas {
    /// As its caller wishes; 0: as it is, or as the node's settings say.
    pub asked: u32,
    /// What the node's settings say.
    pub default: u32,
}

impl Default for Replicas {
    fn default() -> Self {
        Self {
            asked: 0,
            default: 1,
        }
    }
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
        domains: Arc<Domains>,
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
        records.into_iter().for_each(|record| names.push(record));
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
        let replicas = Replicas::default();
        self.open_replicated(tenant, tenant_name, namespace, strict, replicas)
            .await
    }

    /// As [`Namespaces::open_namespace`], where it matters how many owners its runs have.
    ///
    /// # Errors
    /// As there.
    pub async fn open_replicated(
        &self,
        tenant: TenantId,
        tenant_name: &str,
        namespace: &Namespace,
        strict: bool,
        replicas: Replicas,
    ) -> Result<OpenedNamespace, BlocksError> {
        namespace.validate()?;
        let replicas = match replicas.asked {
            0 => {
                let known = self.shared.known.read();
                let known = known.get(&namespace.id(tenant_name));
                known.map_or(replicas.default, |known| known.replicas)
            }
            asked => asked,
        };
        let record = Record::of(tenant_name, namespace, replicas);
        let is_last = self.shared.names.read().last(&record) == Some(&record);
        let difference = match is_last {
            true => None,
            false => self.ask(tenant, record, strict).await?,
        };
        Ok(OpenedNamespace {
            id: namespace.id(tenant_name),
            key: namespace.key(tenant_name, &self.secret),
            difference,
            replicas,
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

/// The one who writes the file.
struct Writer {
    file: PathBuf,
    bounds: Bounds,
    shared: Arc<Shared>,
}

impl Writer {
    fn run(&self, asked: &mpsc::Receiver<Ask>) {
        while let Ok(first) = asked.recv() {
            let waiting = asked.try_iter().take(MAX_OPENING - 1);
            self.serve(std::iter::once(first).chain(waiting).collect());
        }
    }

    /// Judges asks in order, makes them durable together, and answers.
    fn serve(&self, asks: Vec<Ask>) {
        let mut next = self.shared.names.read().clone();
        let mut new: Vec<(NamespaceId, Known)> = Vec::new();
        let mut spaces = Vec::new();
        let mut answers = Vec::new();
        for ask in &asks {
            let judged = next.open(&ask.record, ask.strict, self.bounds);
            if let Ok((_, true)) = &judged {
                let id = ask.record.namespace().id(&ask.record.tenant);
                new.push((id, ask.record.known(ask.tenant)));
                spaces.push(ask.record.space());
            }
            answers.push(judged.map(|(difference, _)| difference));
        }
        let written = match new.is_empty() {
            true => Ok(()),
            false => self.write(&next),
        };
        match written {
            Ok(()) => {
                for (id, known) in &new {
                    self.shared.domains.set(*id, known.tenant.domain());
                }
                spaces
                    .into_iter()
                    .for_each(|space| self.shared.spaces.set(space));
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
        let domains = Arc::default();
        Namespaces::open(
            dir,
            Path::new(""),
            bounds,
            &tenants,
            domains,
            &SystemClock::new(),
        )
        .unwrap()
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

    #[tokio::test]
    async fn a_disk_that_hangs_does_not_hold_up_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let registry = registry(dir.path());
        let pipe = dir.path().join("namespaces.new");
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        let namespace = Namespace::opaque("a", 16, 8);
        let mut opening = Box::pin(registry.open_namespace(ME, DEFAULT_TENANT, &namespace, false));
        let mut cx = Context::from_waker(Waker::noop());
        assert!(opening.as_mut().poll(&mut cx).is_pending());
        drop(opening);
        let (done, is_done) = mpsc::channel();
        let ending = std::thread::spawn(move || {
            drop(registry);
            done.send(()).unwrap();
        });
        let ended = is_done.recv_timeout(Duration::from_secs(60));
        // Whoever waits for a reader is let go, so that a failure is no hang.
        let reader = fs::File::open(&pipe);
        assert!(ended.is_ok(), "the end waited for the disk");
        drop(reader);
        ending.join().unwrap();
    }
}
