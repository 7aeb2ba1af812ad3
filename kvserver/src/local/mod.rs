//! The same-host path: clients of this machine read blocks where they lie and hand blocks in through memory.
//!
//! ```text
//! local.sock ─accept (one thread)─► peer's user judged ─► one thread per connection
//!                                                           │ frame ─► Session ─► frame (+ descriptors)
//!   Attach  token ─► tenant, owner; staging memory            ├─ attach.rs
//!   Map     read-only descriptors of the tenant's segments    ├─ map.rs
//!   Get     places; a lease pins them, else a hold does       ├─ get.rs   holds.rs
//!   Put     staging ─► slot, summed on the way, published     ├─ put.rs
//!   Lookup, Renew, Release: as over gRPC                      └─ session.rs
//!   the connection closes: holds, staging and, with the owner's last connection, leases go at once
//! ```
//!
//! Beside `rpc` and over the same [`Blocks`]: the same tenants, owners, limits and tallies. The engine is synchronous
//! and most calls are a few microseconds, so a thread that blocks in the kernel for its next frame is the shortest way
//! to an answer; where a block must come from a disk, the thread waits, and looks whether its peer is still there.
//!
//! What a reader sees is always old bytes of the slot it was told, or bytes that its sums and the slot's generation
//! betray (`kvgpu::shared`). Nothing that a client can write ever becomes a block: the node copies, sums the copy
//! and publishes that.
//!
//! Trust: who may open the socket and has a token may read every block of its tenant, names or no names, because whole
//! segments are mapped; and a process of the node's own user that may trace the node (ptrace) was never kept out by
//! memory's seals.
//!
//! Units: bytes, milliseconds. Errors: [`LocalError`] at start; afterwards refusals from the closed set of reasons.
//! Bounds: `local_max_connections` threads with small stacks, one call each at a time; `local_staging_*`;
//! holds by the lease budgets and [`holds::MAX_HOLDS`]; frames of 8 MiB; deadlines as over gRPC.

mod attach;
mod get;
mod holds;
mod listen;
mod map;
mod put;
mod reply;
mod session;
mod socket;

use std::{
    collections::HashMap,
    io,
    os::unix::{
        fs::MetadataExt,
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use kvproto::{FieldError, Reason};
use parking_lot::{Condvar, Mutex};

use self::attach::Attachments;
use crate::{
    blocks::{Blocks, BlocksError, owners::Owners},
    clock::Clock,
    config::{Config, SocketMode},
    telemetry::Metrics,
};

/// Why the same-host path could not start.
#[derive(Debug, thiserror::Error)]
pub enum LocalError {
    /// The socket cannot be had.
    #[error("cannot listen on {}: {source}; choose another path with --local-socket, or \"off\"", path.display())]
    Socket {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A thread could not be started.
    #[error("cannot start a thread: {0}")]
    Thread(io::Error),
}

/// Why a call failed as a whole.
#[derive(Debug)]
struct Refused {
    reason: Reason,
    message: String,
    /// The connection means nothing any more.
    closes: bool,
}

impl Refused {
    fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self {
            reason,
            message: message.into(),
            closes: false,
        }
    }

    fn closing(self) -> Self {
        Self {
            closes: true,
            ..self
        }
    }
}

impl From<FieldError> for Refused {
    fn from(error: FieldError) -> Self {
        Self::new(Reason::InvalidField, error.to_string())
    }
}

impl From<BlocksError> for Refused {
    fn from(error: BlocksError) -> Self {
        Self::new(error.reason(), error.to_string())
    }
}

/// What the configuration says.
#[derive(Clone, Copy, Debug)]
struct Limits {
    mode: SocketMode,
    max_connections: usize,
    staging_bytes: u64,
    staging_total_bytes: u64,
    hold: Duration,
    call_deadline: Duration,
    call_max_deadline: Duration,
}

/// What every connection can reach.
struct Shared {
    blocks: Arc<Blocks>,
    owners: Arc<Owners>,
    metrics: Arc<Metrics>,
    clock: Arc<dyn Clock>,
    limits: Limits,
    attachments: Attachments,
    /// Set first: new calls are refused.
    draining: AtomicBool,
    /// Set last: calls that wait are given up.
    cut: AtomicBool,
    connections: Mutex<Connections>,
    /// Told when the last connection is gone.
    idle: Condvar,
}

#[derive(Default)]
struct Connections {
    open: HashMap<u64, Arc<UnixStream>>,
    next: u64,
    /// Those of them whose put is still being told of.
    following: Vec<Arc<UnixStream>>,
}

/// The put of a connection is told of while it is written: its connection is read from until it ends, also while the node
/// stops.
struct Following {
    shared: Arc<Shared>,
    stream: Arc<UnixStream>,
}

impl Drop for Following {
    fn drop(&mut self) {
        let following = &mut self.shared.connections.lock().following;
        following.retain(|stream| !Arc::ptr_eq(stream, &self.stream));
        if self.shared.draining.load(Ordering::Relaxed) {
            let _ = self.stream.shutdown(std::net::Shutdown::Read);
        }
    }
}

impl Shared {
    /// A connection is being served; `None` when there are too many.
    fn enter(&self, stream: &Arc<UnixStream>) -> Option<u64> {
        let mut connections = self.connections.lock();
        if connections.open.len() >= self.limits.max_connections {
            return None;
        }
        connections.next += 1;
        let number = connections.next;
        connections.open.insert(number, Arc::clone(stream));
        self.metrics.local.connections.inc();
        Some(number)
    }

    fn leave(&self, number: u64) {
        let mut connections = self.connections.lock();
        connections.open.remove(&number);
        self.metrics.local.connections.dec();
        if connections.open.is_empty() {
            self.idle.notify_all();
        }
    }

    /// Ends what the connections wait for: their next call, or all.
    fn shut(&self, how: std::net::Shutdown) {
        for stream in self.connections.lock().open.values() {
            let _ = stream.shutdown(how); // its peer may be gone already
        }
    }

    /// Ends the reading of connections, but for those whose put is still being told of.
    fn stop_reading(&self) {
        let connections = self.connections.lock();
        for stream in connections.open.values() {
            let is_it = |other: &Arc<UnixStream>| Arc::ptr_eq(other, stream);
            if !connections.following.iter().any(is_it) {
                let _ = stream.shutdown(std::net::Shutdown::Read);
            }
        }
    }

    /// A connection's put is told of while it is written, until this is dropped.
    fn follow(self: &Arc<Self>, stream: &Arc<UnixStream>) -> Following {
        let mut connections = self.connections.lock();
        connections.following.push(Arc::clone(stream));
        Following {
            shared: Arc::clone(self),
            stream: Arc::clone(stream),
        }
    }

    /// Waits until no connection is left; false when time was up first.
    fn wait_idle(&self, time: Duration) -> bool {
        let mut connections = self.connections.lock();
        let is_busy = |connections: &mut Connections| !connections.open.is_empty();
        !self
            .idle
            .wait_while_for(&mut connections, is_busy, time)
            .timed_out()
    }
}

/// The running same-host path.
pub(crate) struct Local {
    shared: Arc<Shared>,
    path: PathBuf,
    /// Which file there is this node's; `None` once it was removed.
    file: Mutex<Option<FileId>>,
    listener: Arc<UnixListener>,
    accepting: Option<thread::JoinHandle<()>>,
}

/// A file's device and inode: what tells it from another one of the same name. The inode is not given to another file
/// while the listener that is bound to it is open.
type FileId = (u64, u64);

fn file_id(path: &Path) -> Option<FileId> {
    let file = std::fs::symlink_metadata(path).ok()?;
    Some((file.dev(), file.ino()))
}

impl Local {
    /// Listens at `path` and serves.
    pub(crate) fn start(
        config: &Config,
        path: PathBuf,
        blocks: Arc<Blocks>,
        owners: Arc<Owners>,
        metrics: Arc<Metrics>,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, LocalError> {
        let limits = Limits {
            mode: config.local_socket_mode,
            max_connections: config.local_max_connections,
            staging_bytes: config.local_staging_bytes,
            staging_total_bytes: config.local_staging_total_bytes,
            hold: config.local_hold,
            call_deadline: config.call_deadline,
            call_max_deadline: config.call_max_deadline,
        };
        let listener = listen::bind(&path, limits.mode).map_err(|source| LocalError::Socket {
            path: path.clone(),
            source,
        })?;
        let file = Mutex::new(file_id(&path));
        let listener = Arc::new(listener);
        let shared = Arc::new(Shared {
            attachments: Attachments::new(limits.staging_total_bytes, Arc::clone(&metrics)),
            blocks,
            owners,
            metrics,
            clock,
            limits,
            draining: AtomicBool::new(false),
            cut: AtomicBool::new(false),
            connections: Mutex::default(),
            idle: Condvar::new(),
        });
        let accepting = {
            let (listener, shared) = (Arc::clone(&listener), Arc::clone(&shared));
            thread::Builder::new()
                .name("terrace-local".to_owned())
                .spawn(move || listen::accept(&listener, &shared))
                .map_err(LocalError::Thread)?
        };
        Ok(Self {
            shared,
            path,
            file,
            listener,
            accepting: Some(accepting),
        })
    }

    /// Where it listens.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Ends everything at once, without waiting for it.
    pub(crate) fn cut(&self) {
        self.drain();
        self.shared.cut.store(true, Ordering::Relaxed);
        self.shared.shut(std::net::Shutdown::Both);
        // A successor may listen at the same path already, and its file is not ours to remove.
        let own = self.file.lock().take();
        if own.is_some() && own == file_id(&self.path) {
            let _ = std::fs::remove_file(&self.path);
        }
    }

    /// Takes no new connection and no new call.
    fn drain(&self) {
        self.shared.draining.store(true, Ordering::Relaxed);
        // Ends the accept that waits; a connection accepted in this moment sees the flag.
        let _ = rustix::net::shutdown(&*self.listener, rustix::net::Shutdown::Both);
        self.shared.stop_reading();
    }

    /// Lets the running calls end until `deadline` has passed, then cuts them. Blocks.
    pub(crate) fn shutdown(mut self, deadline: Duration) {
        self.drain();
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join(); // a panic there was logged there
        }
        // What was accepted in the last moment.
        self.shared.stop_reading();
        if !self.shared.wait_idle(deadline) {
            tracing::warn!("same-host calls are still running at the deadline; cutting them");
        }
        self.cut();
        self.shared.wait_idle(LAST_MOMENT);
    }
}

/// Threads that were cut get this long to end: they look up from what they wait for well within it.
const LAST_MOMENT: Duration = Duration::from_secs(1);
