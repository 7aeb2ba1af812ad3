//! A client for threads that may wait: connectors, tools, whoever is not a task of a runtime.
//!
//! ```text
//! your thread ─► blocking::Client ─► the very calls of crate::Client, run to their end on this thread
//!                                      ├─ same host   send, and sleep in the kernel until the answer is there
//!                                      └─ gRPC, and a cluster's many owners: the runtime's threads; this one sleeps
//! ```
//!
//! On the same host a call is two system calls of this thread, as a bare request and reply over the same socket would be:
//! no runtime's thread has part in it. All else (parsing, checks, deadlines, fallback to gRPC, what [`Client::path`]
//! reports) is the asynchronous client's own code, not a second one.
//!
//! ```no_run
//! # fn example() -> Result<(), kvclient::Error> {
//! use kvclient::{Namespace, PutBlock, PutOptions, blocking::Client};
//!
//! let client = Client::connect("127.0.0.1:7070")?;
//! let ns = client.open_namespace(&Namespace::opaque("example", 16, 64), false)?;
//! let chain = ns.chain(&(0..16).collect::<Vec<u32>>());
//! client.put(&ns, &chain, &[PutBlock::new(0, vec![7; 4096])], PutOptions::default())?;
//! let mut memory = vec![0; 4096];
//! let got = client.get_into(&ns, &chain, None, &mut [&mut memory])?;
//! println!("{}", got[0].outcome);
//! # Ok(())
//! # }
//! ```
//!
//! Units, errors: as [`crate::Client`]'s. Every call returns within its deadline; a signal does not end it.
//! Panics: every call does within a task of a tokio runtime, whose thread must not sleep.
//! A process that was forked makes a client of its own: two that call over one connection take each other's answers.
//! Why the runtime needs a thread of its own: while the caller sleeps, somebody must drive the connections.

use std::{future::Future, sync::Arc, time::Duration};

use kvproto::{Chain, FieldError, LeaseId, Namespace, convert::answer::PutResult, v1};
use tokio::runtime::{Builder, Handle, Runtime, RuntimeFlavor};

use crate::{
    builder::ClientBuilder,
    call::Waits,
    client::{Lookup, LookupOptions, Target},
    error::Error,
    get::{Fetched, GetOptions, Got},
    lease::Lease,
    local::Held,
    namespace::NamespaceHandle,
    path::PathReport,
    put::{PutBlock, PutOptions},
};

/// How long the last client's end waits for its runtime's.
const FAREWELL: Duration = Duration::from_secs(1);

/// [`crate::Client`] for threads that may wait. Cheap to clone; clones share all that clones of that one share, and may
/// call from many threads at once.
#[derive(Clone, Debug)]
pub struct Client {
    client: crate::Client,
    handle: Handle,
    /// The runtime, where it is this client's own. Behind the client, which is gone before it.
    _own: Option<Arc<Own>>,
}

/// A runtime that ends with the last client, and its connections with it.
#[derive(Debug)]
struct Own(Option<Runtime>);

impl Drop for Own {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            match Handle::try_current() {
                Err(_) => runtime.shutdown_timeout(FAREWELL),
                // A task must not wait for it.
                Ok(_) => runtime.shutdown_background(),
            }
        }
    }
}

impl Client {
    /// A connected client with default settings and a thread for its connections;
    /// [`ClientBuilder::connect_blocking`] takes others.
    ///
    /// # Errors
    /// As [`ClientBuilder::connect`].
    pub fn connect(endpoint: &str) -> Result<Self, Error> {
        ClientBuilder::new(endpoint).connect_blocking()
    }

    pub(crate) fn make(builder: ClientBuilder, is_lazy: bool) -> Result<Self, Error> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .max_blocking_threads(4)
            .thread_name("terrace-client")
            .enable_all()
            .build()
            .map_err(|source| Error::Connect {
                endpoint: builder.told(),
                source: Arc::new(source),
            })?;
        let connected = runtime.block_on(async {
            match is_lazy {
                true => builder.connect_lazily(),
                false => builder.connect().await,
            }
        });
        let client = match connected {
            Ok(client) => client,
            Err(error) => {
                // A name that is still being looked up is not waited for.
                runtime.shutdown_background();
                return Err(error);
            }
        };
        let handle = runtime.handle().clone();
        let own = Arc::new(Own(Some(runtime)));
        Ok(Self::with(client, handle, Some(own)))
    }

    /// The client that waits and shares everything with one that does not.
    ///
    /// # Errors
    /// [`Error::Request`] when the runtime that `client` was made on has no threads of its own: nobody would drive the
    /// connections while the caller sleeps.
    pub fn of(client: &crate::Client) -> Result<Self, Error> {
        let handle = client.fleet.recipe.runtime.clone();
        if handle.runtime_flavor() == RuntimeFlavor::CurrentThread {
            let problem = "has no threads of its own; make the client on one of many threads";
            return Err(FieldError::new("runtime", problem).into());
        }
        Ok(Self::with(client.clone(), handle, None))
    }

    fn with(client: crate::Client, handle: Handle, own: Option<Arc<Own>>) -> Self {
        let client = crate::Client {
            waits: Waits::Thread,
            ..client
        };
        Self {
            client,
            handle,
            _own: own,
        }
    }

    /// Runs a call to its end on this thread.
    fn wait<T>(&self, call: impl Future<Output = T>) -> T {
        self.handle.block_on(call)
    }

    /// The same client with another deadline for its calls.
    #[must_use]
    pub fn with_deadline(&self, deadline: Duration) -> Self {
        Self {
            client: self.client.with_deadline(deadline),
            ..self.clone()
        }
    }

    /// As [`crate::Client::path`].
    #[must_use]
    pub fn path(&self) -> PathReport {
        self.client.path()
    }

    /// As [`crate::Client::open_namespace`].
    ///
    /// # Errors
    /// As there.
    pub fn open_namespace(&self, spec: &Namespace, strict: bool) -> Result<NamespaceHandle, Error> {
        self.wait(self.client.open_namespace(spec, strict))
    }

    /// As [`crate::Client::lookup`].
    ///
    /// # Errors
    /// As there.
    pub fn lookup(
        &self,
        namespace: &NamespaceHandle,
        chain: &Chain,
        options: &LookupOptions,
    ) -> Result<Lookup, Error> {
        self.wait(self.client.lookup(namespace, chain, options))
    }

    /// As [`crate::Client::get_into`].
    ///
    /// # Errors
    /// As there.
    pub fn get_into<'o>(
        &self,
        namespace: &NamespaceHandle,
        chain: &Chain,
        options: impl Into<GetOptions<'o>>,
        buffers: &mut [&mut [u8]],
    ) -> Result<Vec<Got>, Error> {
        self.wait(self.client.get_into(namespace, chain, options, buffers))
    }

    /// As [`crate::Client::get_scattered`].
    ///
    /// # Errors
    /// As there.
    pub fn get_scattered<'o>(
        &self,
        namespace: &NamespaceHandle,
        chain: &Chain,
        options: impl Into<GetOptions<'o>>,
        blocks: &mut [Vec<&mut [u8]>],
    ) -> Result<Vec<Got>, Error> {
        self.wait(self.client.get_scattered(namespace, chain, options, blocks))
    }

    /// As [`crate::Client::get`].
    ///
    /// # Errors
    /// As there.
    pub fn get<'o>(
        &self,
        namespace: &NamespaceHandle,
        chain: &Chain,
        options: impl Into<GetOptions<'o>>,
    ) -> Result<Vec<Fetched>, Error> {
        self.wait(self.client.get(namespace, chain, options))
    }

    /// As [`crate::Client::hold`].
    ///
    /// # Errors
    /// As there.
    pub fn hold<'o>(
        &self,
        namespace: &NamespaceHandle,
        chain: &Chain,
        options: impl Into<GetOptions<'o>>,
    ) -> Result<Option<Held>, Error> {
        self.wait(self.client.hold(namespace, chain, options))
    }

    /// As [`crate::Client::put`].
    ///
    /// # Errors
    /// As there.
    pub fn put(
        &self,
        namespace: &NamespaceHandle,
        chain: &Chain,
        blocks: &[PutBlock<'_>],
        options: PutOptions,
    ) -> Result<Vec<PutResult>, Error> {
        self.wait(self.client.put(namespace, chain, blocks, options))
    }

    /// As [`crate::Client::lease_of_owner`].
    pub fn lease_of_owner(&self, id: LeaseId) -> Lease {
        self.client.lease_of_owner(id)
    }

    /// As [`Lease::renew`].
    ///
    /// # Errors
    /// As there.
    pub fn renew(&self, lease: &mut Lease, ttl: Duration) -> Result<bool, Error> {
        self.wait(lease.renew_by(ttl, self.client.until()))
    }

    /// As [`Lease::release`]. One that is dropped instead is given back in the background.
    ///
    /// # Errors
    /// As there.
    pub fn release(&self, lease: Lease) -> Result<bool, Error> {
        self.wait(lease.release_by(self.client.until()))
    }

    /// As [`crate::Client::invalidate`].
    ///
    /// # Errors
    /// As there.
    pub fn invalidate(&self, namespace: &NamespaceHandle, target: Target) -> Result<u64, Error> {
        self.wait(self.client.invalidate(namespace, target))
    }

    /// As [`crate::Client::stats`].
    ///
    /// # Errors
    /// As there.
    pub fn stats(&self) -> Result<v1::StatsResponse, Error> {
        self.wait(self.client.stats())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_runtime_without_threads_drives_nobodys_connections() {
        let client = crate::Client::builder("127.0.0.1:1").connect_lazily();
        let refused = Client::of(&client.expect("a client"));
        assert!(matches!(refused, Err(Error::Request(_))), "{refused:?}");
    }

    #[test]
    fn nobody_there_is_an_error_and_no_thread_stays() {
        let refused = Client::connect("127.0.0.1:1");
        assert!(matches!(refused, Err(Error::Connect { .. })), "{refused:?}");
    }
}
