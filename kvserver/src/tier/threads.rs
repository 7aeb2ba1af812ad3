//! Threads that may get stuck on a disk, kept apart from the node's own.
//!
//! A hung device holds as many threads as were given to it here and no more; the node's runtime, on
//! which everybody waits with a deadline, goes on.

use std::io;

use tokio::{
    runtime::{Builder, Handle, Runtime},
    task::JoinHandle,
};

/// A runtime for one disk. Dropping it abandons what is stuck and never blocks.
pub(super) struct DiskThreads(Option<Runtime>);

impl DiskThreads {
    /// `workers` for asynchronous work, at most `blocking` threads for system calls.
    pub(super) fn start(name: &str, workers: usize, blocking: usize) -> io::Result<Self> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(workers)
            .max_blocking_threads(blocking)
            .thread_name(name)
            .enable_all()
            .build()?;
        Ok(Self(Some(runtime)))
    }

    pub(super) fn handle(&self) -> &Handle {
        self.0.as_ref().expect("present until drop").handle()
    }

    /// Runs a piece of blocking work.
    pub(super) fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> JoinHandle<T> {
        self.handle().spawn_blocking(work)
    }
}

impl Drop for DiskThreads {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}
