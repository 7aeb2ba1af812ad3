//! Listeners and the threads that serve connections.
//!
//! ```text
//! accept (TCP, Unix) ──round robin──► bounded channel ──► thread: current-thread runtime
//! ```
//!
//! Bounds: `max_connections` over both transports (one more waits in the kernel's backlog),
//! `QUEUED_CONNECTIONS` per thread between accept and start.

use std::{
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::Duration,
};

use rustix::net::sockopt;
use tokio::{
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::JoinHandle,
};
use tokio_util::task::TaskTracker;

use super::{RpcError, Shared, connection};
use crate::config::Config;

/// Accepted connections that may wait for their thread.
const QUEUED_CONNECTIONS: usize = 64;

/// Pause after an accept that failed, usually for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A connection on its way to its thread, blocking until it is registered there.
enum Socket {
    Tcp(std::net::TcpStream),
    Unix(std::os::unix::net::UnixStream),
}

type Accepted = (Socket, OwnedSemaphorePermit);

pub(crate) struct Listeners {
    address: SocketAddr,
    unix_socket: Option<PathBuf>,
    accepting: Vec<JoinHandle<()>>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Listeners {
    pub(crate) async fn start(
        config: &Config,
        unix_socket: Option<PathBuf>,
        shared: Arc<Shared>,
    ) -> Result<Self, RpcError> {
        let refuse = |source| RpcError::Tcp {
            address: config.listen,
            source,
        };
        let tcp = TcpListener::bind(config.listen).await.map_err(refuse)?;
        let address = tcp.local_addr().map_err(refuse)?;
        let unix = unix_socket.as_deref().map(bind_unix).transpose()?;

        let count = match config.worker_threads {
            0 => thread::available_parallelism().map_or(1, usize::from),
            n => n,
        };
        let mut senders = Vec::with_capacity(count);
        let mut threads = Vec::with_capacity(count);
        for i in 0..count {
            let (sender, receiver) = mpsc::channel(QUEUED_CONNECTIONS);
            let shared = Arc::clone(&shared);
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(RpcError::Thread)?;
            let run = move || runtime.block_on(serve_connections(receiver, shared));
            let thread = thread::Builder::new()
                .name(format!("terrace-rpc-{i}"))
                .spawn(run)
                .map_err(RpcError::Thread)?;
            senders.push(sender);
            threads.push(thread);
        }

        let room = Arc::new(Semaphore::new(config.max_connections));
        let mut accepting = Vec::new();
        let to = Threads { senders, next: 0 };
        if let Some(unix) = unix {
            let (room, shared, to) = (Arc::clone(&room), Arc::clone(&shared), to.clone());
            accepting.push(tokio::spawn(async move {
                accept(shared, room, to, || async {
                    unix.accept().await?.0.into_std().map(Socket::Unix)
                })
                .await;
            }));
        }
        accepting.push(tokio::spawn(async move {
            accept(shared, room, to, || async {
                tcp.accept().await?.0.into_std().map(Socket::Tcp)
            })
            .await;
        }));
        Ok(Self {
            address,
            unix_socket,
            accepting,
            threads,
        })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn unix_socket(&self) -> Option<&Path> {
        self.unix_socket.as_deref()
    }

    /// Ends when no connection is left; somebody must have begun to drain.
    pub(crate) async fn stopped(self) {
        for task in self.accepting {
            let _ = task.await; // a panic there was logged there
        }
        if let Some(path) = &self.unix_socket {
            let _ = std::fs::remove_file(path);
        }
        let threads = self.threads;
        let joined =
            tokio::task::spawn_blocking(move || threads.into_iter().for_each(|t| drop(t.join())));
        let _ = joined.await;
    }
}

/// Hands connections to threads in turn.
#[derive(Clone)]
struct Threads {
    senders: Vec<mpsc::Sender<Accepted>>,
    next: usize,
}

async fn accept<F: Future<Output = io::Result<Socket>>>(
    shared: Arc<Shared>,
    room: Arc<Semaphore>,
    mut to: Threads,
    next: impl Fn() -> F,
) {
    let work = async {
        loop {
            let Ok(permit) = Arc::clone(&room).acquire_owned().await else {
                return;
            };
            match next().await {
                Ok(socket) => {
                    to.next = (to.next + 1) % to.senders.len();
                    if to.senders[to.next].send((socket, permit)).await.is_err() {
                        return;
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    shared.clock.sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    };
    tokio::select! {
        () = work => {}
        () = shared.draining.cancelled() => {}
    }
}

/// One thread's life: ends when all senders are gone and its connections are over.
async fn serve_connections(mut incoming: mpsc::Receiver<Accepted>, shared: Arc<Shared>) {
    let tracker = TaskTracker::new();
    while let Some((socket, permit)) = incoming.recv().await {
        let shared = Arc::clone(&shared);
        tracker.spawn(async move {
            if let Err(error) = serve(socket, &shared).await {
                tracing::debug!(%error, "a connection ended early");
            }
            drop(permit);
        });
    }
    tracker.close();
    tracker.wait().await;
}

async fn serve(socket: Socket, shared: &Arc<Shared>) -> io::Result<()> {
    match socket {
        Socket::Tcp(socket) => {
            socket.set_nodelay(true)?;
            keep_alive(&socket, shared)?;
            shared.metrics.tcp_connections.inc();
            let _count = Count(&shared.metrics.tcp_connections);
            connection::serve(TcpStream::from_std(socket)?, shared).await;
        }
        Socket::Unix(socket) => {
            shared.metrics.unix_connections.inc();
            let _count = Count(&shared.metrics.unix_connections);
            connection::serve(UnixStream::from_std(socket)?, shared).await;
        }
    }
    Ok(())
}

/// Has the kernel ask an idle peer's kernel whether it is still there: a lane's client reads only while it calls.
fn keep_alive(socket: &std::net::TcpStream, shared: &Shared) -> io::Result<()> {
    const PROBES: u32 = 3;
    let transport = &shared.transport;
    let second = Duration::from_secs(1);
    sockopt::set_socket_keepalive(socket, true)?;
    sockopt::set_tcp_keepidle(socket, transport.keepalive_interval.max(second))?;
    sockopt::set_tcp_keepintvl(socket, (transport.keepalive_timeout / PROBES).max(second))?;
    sockopt::set_tcp_keepcnt(socket, PROBES)?;
    Ok(())
}

/// Takes one off a gauge at the end of its scope.
struct Count<'a>(&'a prometheus::IntGauge);

impl Drop for Count<'_> {
    fn drop(&mut self) {
        self.0.dec();
    }
}

/// A socket file that nobody listens on any more is what a killed node leaves behind: it is replaced. The
/// lock on the data folder has already made sure that no other node runs there.
fn bind_unix(path: &Path) -> Result<UnixListener, RpcError> {
    let refuse = |source| RpcError::Unix {
        path: path.to_owned(),
        source,
    };
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(refuse(io::Error::new(
            io::ErrorKind::AddrInUse,
            "another process listens there",
        )));
    }
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(refuse(e)),
        _ => {}
    }
    UnixListener::bind(path).map_err(refuse)
}
