//! The client of one node.
//!
//! ```text
//! Client ─► Tries (deadline, repeats, breaker) ─► Pool ─► Link ─► one HTTP/2 stream
//!    │                                                     kept up in the background
//!    └─ NamespaceHandle: tokens ─► Chain
//! ```
//!
//! Units: blocks, bytes; a deadline is the time of a whole call, repeats included.
//! Errors: [`Error::kind`] says what to do next. Every call returns within its deadline.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use kvproto::{
    BootId, Chain, FieldError, LeaseId, Namespace, Part, Reason, SequenceHash, TierKind,
    convert::{
        answer::{self, OpenedNamespace, PutResult},
        chain_to_wire, parts_to_wire,
    },
    v1,
};

use crate::{
    builder::ClientBuilder,
    call::{self, Deadline, Inner, Tries},
    error::Error,
    get::{self, Fetched, GetOptions, Got, Wanted, sink::Destination},
    lease::{Lease, millis},
    local,
    local::Held,
    namespace::NamespaceHandle,
    path::PathReport,
    put::{self, PutBlock, PutOptions},
    retry::BreakerState,
    watch::{self, Watch},
    wire::{self, Method},
};

/// The client of one node. Cheap to clone; clones share connections, leases' owner and breaker.
#[derive(Clone)]
pub struct Client {
    pub(crate) inner: Arc<Inner>,
    pub(crate) deadline: Duration,
}

/// How a lookup is made. The default asks for a lease on part {0, 0}.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LookupOptions {
    /// Parts that must all be present; empty means the part {0, 0}.
    pub parts: Vec<Part>,
    /// Only look: no lease, no promotion, no trace in the eviction policy.
    pub probe: bool,
    /// How long the lease shall hold; zero: the node's default (10 s).
    pub lease_ttl: Duration,
    /// Asking again with the same key answers the same lease. `None`: the client makes one per call.
    pub idempotency_key: Option<[u8; 16]>,
}

impl LookupOptions {
    /// Only look.
    #[must_use]
    pub fn probe() -> Self {
        Self {
            probe: true,
            ..Self::default()
        }
    }
}

/// The answer to a lookup.
#[derive(Debug)]
pub struct Lookup {
    /// Blocks of the chain present from its first on, in all parts asked for.
    pub present_blocks: u32,
    /// Consecutive blocks and the best tier they are all in; adds up to `present_blocks`.
    pub tiers: Vec<(u32, TierKind)>,
    /// Pins the leading [`Lease::blocks`] of them. `None` for a probe, or when nothing is present.
    pub lease: Option<Lease>,
    /// Which life of the node answered.
    pub boot_id: BootId,
}

impl Lookup {
    /// Blocks that a get may rely on: those under the lease.
    #[must_use]
    pub fn leased_blocks(&self) -> u32 {
        self.lease.as_ref().map_or(0, Lease::blocks)
    }
}

/// What an invalidation forgets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// This block, in all its parts.
    Block(SequenceHash),
    /// This block and every block after it in any chain.
    Prefix(SequenceHash),
    /// The whole namespace.
    All,
}

impl Client {
    /// A connected client with default settings; see [`ClientBuilder`] for others.
    ///
    /// # Errors
    /// As [`ClientBuilder::connect`].
    pub async fn connect(endpoint: &str) -> Result<Self, Error> {
        ClientBuilder::new(endpoint).connect().await
    }

    /// Settings for a client of the node at `endpoint`.
    pub fn builder(endpoint: &str) -> ClientBuilder {
        ClientBuilder::new(endpoint)
    }

    /// The same client with another deadline for its calls.
    #[must_use]
    pub fn with_deadline(&self, deadline: Duration) -> Self {
        Self {
            inner: self.inner.clone(),
            deadline,
        }
    }

    /// The life of the node that answered last; 0 before the first answer.
    #[must_use]
    pub fn boot_id(&self) -> BootId {
        BootId(self.inner.boot.load(Ordering::Relaxed))
    }

    /// How often the node was seen to have been restarted.
    #[must_use]
    pub fn reboots(&self) -> u64 {
        self.inner.reboots.load(Ordering::Relaxed)
    }

    /// Which way blocks go, why, and how many went each way.
    #[must_use]
    pub fn path(&self) -> PathReport {
        self.inner.local.report()
    }

    /// Whether calls pass.
    #[must_use]
    pub fn breaker(&self) -> BreakerState {
        self.inner.pool.breaker.state()
    }

    /// Opens a namespace. With `strict` it is refused when its label is known with another fingerprint.
    ///
    /// # Errors
    /// [`Error::Request`] for a field out of range; [`Error::Refused`] with
    /// [`Reason::NamespaceDiffers`].
    pub async fn open_namespace(
        &self,
        spec: &Namespace,
        strict: bool,
    ) -> Result<NamespaceHandle, Error> {
        spec.validate()?;
        self.open(spec, strict, self.until()).await
    }

    async fn open(
        &self,
        spec: &Namespace,
        strict: bool,
        deadline: Deadline,
    ) -> Result<NamespaceHandle, Error> {
        let method = Method::OPEN_NAMESPACE;
        let answer: v1::OpenNamespaceResponse =
            call::unary(&self.inner, method, deadline, |context| {
                v1::OpenNamespaceRequest {
                    context: Some(context),
                    spec: Some(spec.into()),
                    strict,
                    ..v1::OpenNamespaceRequest::default()
                }
            })
            .await?;
        self.inner.heard(answer.context.as_ref());
        let opened =
            OpenedNamespace::try_from(&answer).map_err(|problem| wire::answer(method, problem))?;
        self.inner.local.told(opened.local_socket.as_deref());
        Ok(NamespaceHandle::new(spec.clone(), opened))
    }

    /// The longest prefix of `chain` that is present, with a lease on it unless it is a probe.
    /// At most [`kvproto::hash::MAX_CHAIN_BLOCKS`] blocks; that page says what to do with more.
    ///
    /// # Errors
    /// [`Error::kind`] says what to do; when it is unavailable, go on as if nothing were present.
    pub async fn lookup(
        &self,
        namespace: &NamespaceHandle,
        chain: &Chain,
        options: &LookupOptions,
    ) -> Result<Lookup, Error> {
        namespace.check(chain)?;
        let deadline = self.until();
        let idempotency = (!options.probe).then(|| {
            options
                .idempotency_key
                .unwrap_or_else(|| self.inner.unique())
        });
        let mut reopened = false;
        let answer: v1::LookupResponse = loop {
            let answer = local::unary(&self.inner, deadline, |context| v1::LookupRequest {
                context: Some(context),
                namespace_id: Bytes::copy_from_slice(&namespace.id().0),
                chain: Some(chain_to_wire(chain)),
                parts: parts_to_wire(&options.parts),
                probe: options.probe,
                lease_ttl_ms: millis(options.lease_ttl),
                idempotency_key: idempotency
                    .map_or_else(Bytes::new, |key| Bytes::copy_from_slice(&key)),
                lease_id: 0,
            });
            match answer.await {
                Ok(answer) => break answer,
                Err(error) => {
                    self.reopen(namespace, error, &mut reopened, deadline)
                        .await?
                }
            }
        };
        let boot_id = self.inner.heard(answer.context.as_ref());
        let found = answer::Lookup::from_wire(&answer, chain.len())
            .map_err(|problem| wire::answer(Method::LOOKUP, problem))?;
        Ok(Lookup {
            present_blocks: found.present_blocks,
            tiers: found.tiers,
            lease: found
                .lease
                .map(|lease| Lease::new(&self.inner, self.deadline, boot_id, lease)),
            boot_id,
        })
    }

    /// Blocks of `chain` into `buffers`, one per block (blocks first, parts within a block), each at
    /// least as long as its block. A buffer holds a block exactly when its answer is a hit; any other
    /// buffer's bytes mean nothing.
    ///
    /// ```no_run
    /// # async fn f(client: kvclient::Client, ns: kvclient::NamespaceHandle, chain: kvclient::Chain) -> Result<(), kvclient::Error> {
    /// let found = client.lookup(&ns, &chain, &Default::default()).await?;
    /// let mut memory = vec![0; 2 * 1024 * 1024];
    /// let (a, b) = memory.split_at_mut(1024 * 1024);
    /// let two = chain.slice(0..2, ns.run_blocks());
    /// let got = client.get_into(&ns, &two, found.lease.as_ref(), &mut [a, b]).await?;
    /// println!("{} of 2 are hits", got.iter().filter(|got| got.is_hit()).count());
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// When the call has no whole answer; then no buffer's bytes mean anything.
    pub async fn get_into<'o>(
        &self,
        namespace: &NamespaceHandle,
        chain: &Chain,
        options: impl Into<GetOptions<'o>>,
        buffers: &mut [&mut [u8]],
    ) -> Result<Vec<Got>, Error> {
        self.get_destinations(namespace, chain, options.into(), buffers)
            .await
    }

    /// [`Client::get_into`] for blocks that shall lie in pieces: each block's bytes fill its pieces one
    /// after the other, which hold at least as much as the block.
    ///
    /// ```no_run
    /// # async fn f(client: kvclient::Client, ns: kvclient::NamespaceHandle, chain: kvclient::Chain) -> Result<(), kvclient::Error> {
    /// let (mut keys, mut values) = (vec![0; 512 * 1024], vec![0; 512 * 1024]);
    /// let first = chain.slice(0..1, ns.run_blocks());
    /// let mut blocks = [vec![&mut keys[..], &mut values[..]]];
    /// let got = client.get_scattered(&ns, &first, None, &mut blocks).await?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// When the call has no whole answer; then no piece's bytes mean anything.
    pub async fn get_scattered<'o>(
        &self,
        namespace: &NamespaceHandle,
        chain: &Chain,
        options: impl Into<GetOptions<'o>>,
        blocks: &mut [Vec<&mut [u8]>],
    ) -> Result<Vec<Got>, Error> {
        self.get_destinations(namespace, chain, options.into(), blocks)
            .await
    }

    async fn get_destinations<T: Destination>(
        &self,
        namespace: &NamespaceHandle,
        chain: &Chain,
        options: GetOptions<'_>,
        destinations: &mut [T],
    ) -> Result<Vec<Got>, Error> {
        namespace.check(chain)?;
        let wanted = Wanted {
            namespace,
            chain,
            options,
        };
        let deadline = self.until();
        let mut reopened = false;
        loop {
            match get::into_destinations(&self.inner, deadline, &wanted, destinations).await {
                Ok(got) => return Ok(got),
                Err(error) => {
                    self.reopen(namespace, error, &mut reopened, deadline)
                        .await?
                }
            }
        }
    }

    /// Blocks of `chain` as bytes: the very memory they were received into, where that was one piece.
    ///
    /// # Errors
    /// When the call has no whole answer.
    pub async fn get<'o>(
        &self,
        namespace: &NamespaceHandle,
        chain: &Chain,
        options: impl Into<GetOptions<'o>>,
    ) -> Result<Vec<Fetched>, Error> {
        namespace.check(chain)?;
        let options = options.into();
        let wanted = Wanted {
            namespace,
            chain,
            options,
        };
        let deadline = self.until();
        let mut reopened = false;
        loop {
            match get::fetch(&self.inner, deadline, &wanted).await {
                Ok(fetched) => return Ok(fetched),
                Err(error) => {
                    self.reopen(namespace, error, &mut reopened, deadline)
                        .await?
                }
            }
        }
    }

    /// Blocks of `chain` that stay where they lie, in the node's memory, without a byte being copied or
    /// verified; [`Held::read`] does both. `None`: the node is not to be reached on the same host, or has a
    /// block that cannot be shared; get them instead.
    ///
    /// # Errors
    /// [`Error::Request`] for a chain that is not the namespace's.
    pub async fn hold<'o>(
        &self,
        namespace: &NamespaceHandle,
        chain: &Chain,
        options: impl Into<GetOptions<'o>>,
    ) -> Result<Option<Held>, Error> {
        namespace.check(chain)?;
        let wanted = Wanted {
            namespace,
            chain,
            options: options.into(),
        };
        Ok(local::hold(&self.inner, self.until(), &wanted).await)
    }

    /// Puts blocks of `chain`, and answers what became of each. A rejection is an answer.
    ///
    /// # Errors
    /// When the call has no whole answer; putting the same blocks again is safe.
    pub async fn put(
        &self,
        namespace: &NamespaceHandle,
        chain: &Chain,
        blocks: &[PutBlock<'_>],
        options: PutOptions,
    ) -> Result<Vec<PutResult>, Error> {
        namespace.check(chain)?;
        let deadline = self.until();
        let mut reopened = false;
        loop {
            match put::put(&self.inner, deadline, namespace, chain, blocks, options).await {
                Ok(results) => return Ok(results),
                Err(error) => {
                    self.reopen(namespace, error, &mut reopened, deadline)
                        .await?
                }
            }
        }
    }

    /// A lease by its id, which another client of this owner ([`ClientBuilder::owner`]) holds and looks after: for
    /// gets in a process that did not look up. Dropping it gives nothing back.
    pub fn lease_of_owner(&self, id: LeaseId) -> Lease {
        Lease::of_owner(&self.inner, self.deadline, id)
    }

    /// Prolongs a lease; see [`Lease::renew`].
    ///
    /// # Errors
    /// When the node does not answer.
    pub async fn renew(&self, lease: &mut Lease, ttl: Duration) -> Result<bool, Error> {
        lease.renew(ttl).await
    }

    /// Gives a lease back; see [`Lease::release`].
    ///
    /// # Errors
    /// When the node does not answer.
    pub async fn release(&self, lease: Lease) -> Result<bool, Error> {
        lease.release().await
    }

    /// Forgets blocks, durably; answers how many.
    ///
    /// # Errors
    /// When the node does not answer; asking again is safe.
    pub async fn invalidate(
        &self,
        namespace: &NamespaceHandle,
        target: Target,
    ) -> Result<u64, Error> {
        use v1::invalidate_request::Target as Wire;
        let deadline = self.until();
        let mut reopened = false;
        loop {
            let answer = call::unary(&self.inner, Method::INVALIDATE, deadline, |context| {
                v1::InvalidateRequest {
                    context: Some(context),
                    namespace_id: Bytes::copy_from_slice(&namespace.id().0),
                    target: Some(match target {
                        Target::Block(hash) => Wire::Hash(Bytes::copy_from_slice(&hash.0)),
                        Target::Prefix(hash) => Wire::PrefixHash(Bytes::copy_from_slice(&hash.0)),
                        Target::All => Wire::All(true),
                    }),
                }
            });
            let answer: Result<v1::InvalidateResponse, Error> = answer.await;
            match answer {
                Ok(answer) => {
                    self.inner.heard(answer.context.as_ref());
                    return Ok(answer.blocks);
                }
                Err(error) => {
                    self.reopen(namespace, error, &mut reopened, deadline)
                        .await?
                }
            }
        }
    }

    /// Events of one namespace (`None`: of all namespaces of the caller's tenant), for up to `lifetime`.
    ///
    /// # Errors
    /// When the node does not answer.
    pub async fn watch(
        &self,
        namespace: Option<&NamespaceHandle>,
        lifetime: Duration,
    ) -> Result<Watch, Error> {
        let id = namespace.map(NamespaceHandle::id);
        watch::watch(&self.inner, self.until(), lifetime, id).await
    }

    /// What the node holds and has done, as the wire has it.
    ///
    /// # Errors
    /// When the node does not answer.
    pub async fn stats(&self) -> Result<v1::StatsResponse, Error> {
        let answer: v1::StatsResponse =
            call::unary(&self.inner, Method::STATS, self.until(), |context| {
                v1::StatsRequest {
                    context: Some(context),
                }
            })
            .await?;
        self.inner.heard(answer.context.as_ref());
        Ok(answer)
    }

    fn until(&self) -> Deadline {
        Deadline::after(&*self.inner.clock, self.deadline)
    }

    /// Waits until a connection stands.
    pub(crate) async fn prove(&self, deadline: Deadline) -> Result<(), Error> {
        let mut tries = Tries::new(&self.inner, Method::STATS, deadline);
        loop {
            if tries.run(|_, _| async { Ok(()) }).await?.is_ok() {
                return Ok(());
            }
        }
    }

    /// Opens the namespace again when the node has forgotten it (it was restarted without its list), at
    /// most once per call. `Ok`: the call may be made again.
    async fn reopen(
        &self,
        namespace: &NamespaceHandle,
        error: Error,
        reopened: &mut bool,
        deadline: Deadline,
    ) -> Result<(), Error> {
        let forgotten = matches!(
            &error,
            Error::Refused {
                reason: Some(Reason::UnknownNamespace),
                ..
            }
        );
        if !forgotten || std::mem::replace(reopened, true) {
            return Err(error);
        }
        let again = self.open(namespace.spec(), false, deadline).await?;
        if again.id() != namespace.id() || again.key() != namespace.key() {
            return Err(Error::NamespaceChanged {
                label: namespace.label().to_owned(),
            });
        }
        Ok(())
    }
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client")
            .field("boot_id", &self.boot_id())
            .field("breaker", &self.breaker())
            .field("deadline", &self.deadline)
            .finish_non_exhaustive()
    }
}

/// One buffer cut into equal pieces, as [`Client::get_into`] takes them: for blocks that land side by side.
///
/// # Errors
/// When `memory` is not a multiple of `block_bytes`.
pub fn split_buffers(memory: &mut [u8], block_bytes: usize) -> Result<Vec<&mut [u8]>, FieldError> {
    if block_bytes == 0 || !memory.len().is_multiple_of(block_bytes) {
        return Err(FieldError::new(
            "buffers",
            format!("{} bytes are no multiple of {block_bytes}", memory.len()),
        ));
    }
    Ok(memory.chunks_exact_mut(block_bytes).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Engines spawn calls on runtimes of many threads.
    #[test]
    fn every_call_may_move_between_threads() {
        fn sent<T: Send>(_: impl FnOnce() -> T) {}
        let client = || -> &'static Client { unreachable!() };
        let ns = || -> &'static NamespaceHandle { unreachable!() };
        let chain = || -> &'static Chain { unreachable!() };
        sent(|| client().get_into(ns(), chain(), None, &mut []));
        sent(|| client().get_scattered(ns(), chain(), None, &mut []));
        sent(|| client().get(ns(), chain(), None));
        sent(|| client().put(ns(), chain(), &[], PutOptions::default()));
        sent(|| async {
            client()
                .lookup(ns(), chain(), &LookupOptions::default())
                .await
        });
    }
}
