//! The client of a node, or of a cluster as one service.
//!
//! ```text
//! Client ─► Fleet ─┬─ one node ───────────────────────────► Inner ─► Tries ─► Pool ─► Link ─► one HTTP/2 stream
//!    │             └─ a cluster: split by owner, at once ─► Inner of each      (deadline, repeats, breaker)
//!    └─ NamespaceHandle: tokens ─► Chain
//! ```
//!
//! Which it is the nodes say with their answers. With one node there is nothing to split, and nothing is.
//!
//! Units: blocks, bytes; a deadline is the time of a whole call, repeats included.
//! Errors: [`Error::kind`] says what to do next. Every call returns within its deadline.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::join_all;
use kvproto::{
    BootId, Chain, FieldError, LeaseId, Namespace, Part, SequenceHash, TierKind,
    convert::answer::PutResult, v1,
};

use crate::{
    builder::ClientBuilder,
    call::{self, Deadline, Inner, Tries},
    error::Error,
    fleet::{
        self, Fleet,
        get::Getting,
        put::Spreading,
        share::{Answered, Question},
    },
    get::{self, Fetched, GetOptions, Got, Wanted, sink::Destination},
    lease::{Lease, millis},
    local,
    local::Held,
    namespace::NamespaceHandle,
    open::{self, Reopening},
    path::PathReport,
    put::{self, PutBlock, PutOptions},
    retry::BreakerState,
    watch::{self, Watch},
    wire::Method,
};

/// The client of a node, or of the cluster that the node belongs to. Cheap to clone; clones share connections, leases'
/// owner and breakers.
#[derive(Clone)]
pub struct Client {
    pub(crate) fleet: Arc<Fleet>,
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
    /// A connected client with default settings; see [`ClientBuilder`] for others. One endpoint, or several of one
    /// cluster with commas between them.
    ///
    /// # Errors
    /// As [`ClientBuilder::connect`].
    pub async fn connect(endpoint: &str) -> Result<Self, Error> {
        ClientBuilder::new(endpoint).connect().await
    }

    /// Settings for a client of the node at `endpoint`; several, with commas between them, are nodes of one cluster.
    pub fn builder(endpoint: &str) -> ClientBuilder {
        ClientBuilder::new(endpoint)
    }

    /// The same client with another deadline for its calls.
    #[must_use]
    pub fn with_deadline(&self, deadline: Duration) -> Self {
        Self {
            fleet: self.fleet.clone(),
            deadline,
        }
    }

    /// The life of the node that this client was told of, as it last answered; 0 before the first answer.
    #[must_use]
    pub fn boot_id(&self) -> BootId {
        BootId(self.fleet.home().boot.load(Ordering::Relaxed))
    }

    /// How often nodes were seen to have been restarted.
    #[must_use]
    pub fn reboots(&self) -> u64 {
        self.fleet.reboots()
    }

    /// Which way blocks go, why, and how many went each way; in a cluster also per member.
    #[must_use]
    pub fn path(&self) -> PathReport {
        self.fleet.path()
    }

    /// Whether calls pass; in a cluster, whether they do to anybody.
    #[must_use]
    pub fn breaker(&self) -> BreakerState {
        self.fleet.breaker()
    }

    /// Opens a namespace. With `strict` it is refused when its label is known with another fingerprint.
    ///
    /// # Errors
    /// [`Error::Request`] for a field out of range; [`Error::Refused`] with
    /// [`kvproto::Reason::NamespaceDiffers`].
    pub async fn open_namespace(
        &self,
        spec: &Namespace,
        strict: bool,
    ) -> Result<NamespaceHandle, Error> {
        self.open_replicated(spec, strict, 0).await
    }

    /// [`Client::open_namespace`], and from now on so many members of the cluster hold each of its runs, 1 to 8; 0: as it
    /// is, or as the nodes are set.
    ///
    /// # Errors
    /// As there.
    pub async fn open_replicated(
        &self,
        spec: &Namespace,
        strict: bool,
        replicas: u32,
    ) -> Result<NamespaceHandle, Error> {
        spec.validate()?;
        let deadline = self.until();
        let opened = self
            .of_anybody(deadline, |inner: Arc<Inner>, deadline| async move {
                open::open(&inner, spec, strict, replicas, deadline).await
            })
            .await?;
        Ok(NamespaceHandle::new(spec.clone(), opened))
    }

    /// Asks one node after the other until one answers, the one that did last first. No async closure, and the node by
    /// value: with either the compiler does not find the caller's future to be `Send`.
    pub(crate) async fn of_anybody<T, F: Future<Output = Result<T, Error>>>(
        &self,
        deadline: Deadline,
        call: impl Fn(Arc<Inner>, Deadline) -> F,
    ) -> Result<T, Error> {
        let nodes = self.fleet.anybody();
        let mut first = None;
        for (i, inner) in nodes.iter().enumerate() {
            let share = self.fleet.share(deadline, i + 1 == nodes.len());
            match call(Arc::clone(inner), share).await {
                Ok(answer) => {
                    self.fleet.answered(inner);
                    return Ok(answer);
                }
                Err(error) if error.is_unavailable() => {
                    first.get_or_insert(error);
                }
                Err(error) => return Err(error),
            }
        }
        Err(first.expect("a client has a node"))
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
            let given = options.idempotency_key;
            given.unwrap_or_else(|| self.fleet.home().unique())
        });
        let question = Question {
            namespace: namespace.clone(),
            parts: options.parts.clone(),
            probe: options.probe,
            ttl_ms: millis(options.lease_ttl),
            idempotency,
        };
        if let Some(roster) = self.fleet.roster() {
            let (fleet, budget) = (&*self.fleet, self.deadline);
            let found = fleet::lookup::everywhere(fleet, roster, question, chain, deadline, budget);
            return found.await;
        }
        let inner = self.fleet.home();
        let Answered { found, boot } =
            fleet::share::ask(inner, &question, chain, 0, deadline).await?;
        Ok(Lookup {
            present_blocks: found.present_blocks,
            tiers: found.tiers,
            lease: found
                .lease
                .map(|lease| Lease::new(inner, self.deadline, boot, lease)),
            boot_id: boot,
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
        let deadline = self.until();
        if let Some(roster) = self.fleet.roster() {
            let getting = self.getting(namespace, chain, options, deadline);
            return getting.fill(roster, destinations).await;
        }
        let (inner, wanted) = (self.fleet.home(), wanted(namespace, chain, options));
        let mut reopening = Reopening::default();
        loop {
            match get::into_destinations(inner, deadline, &wanted, destinations).await {
                Ok(got) => return Ok(got),
                Err(error) => reopening.after(inner, namespace, error, deadline).await?,
            }
        }
    }

    fn getting<'a>(
        &'a self,
        namespace: &'a NamespaceHandle,
        chain: &'a Chain,
        options: GetOptions<'a>,
        deadline: Deadline,
    ) -> Getting<'a> {
        Getting {
            fleet: &self.fleet,
            namespace,
            chain,
            options,
            deadline,
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
        let (options, deadline) = (options.into(), self.until());
        if let Some(roster) = self.fleet.roster() {
            let getting = self.getting(namespace, chain, options, deadline);
            return getting.fetch(roster).await;
        }
        let (inner, wanted) = (self.fleet.home(), wanted(namespace, chain, options));
        let mut reopening = Reopening::default();
        loop {
            match get::fetch(inner, deadline, &wanted).await {
                Ok(fetched) => return Ok(fetched),
                Err(error) => reopening.after(inner, namespace, error, deadline).await?,
            }
        }
    }

    /// Blocks of `chain` that stay where they lie, in the node's memory, without a byte being copied or
    /// verified; [`Held::read`] does both. `None`: the node is not to be reached on the same host, or has a
    /// block that cannot be shared, or in a cluster they lie at several nodes; get them instead.
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
        let (options, deadline) = (options.into(), self.until());
        if let Some(roster) = self.fleet.roster() {
            let getting = self.getting(namespace, chain, options, deadline);
            return Ok(getting.hold(roster).await);
        }
        let wanted = wanted(namespace, chain, options);
        Ok(local::hold(self.fleet.home(), deadline, &wanted).await)
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
        if let Some(roster) = self.fleet.roster() {
            let spreading = Spreading {
                fleet: &self.fleet,
                namespace,
                chain,
                blocks,
                options,
                deadline,
            };
            return spreading.run(roster).await;
        }
        let inner = self.fleet.home();
        let mut reopening = Reopening::default();
        loop {
            match put::put(inner, deadline, namespace, chain, blocks, options).await {
                Ok(results) => return Ok(results),
                Err(error) => reopening.after(inner, namespace, error, deadline).await?,
            }
        }
    }

    /// A lease by its id, which another client of this owner ([`ClientBuilder::owner`]) holds and looks after: for
    /// gets in a process that did not look up. Dropping it gives nothing back.
    pub fn lease_of_owner(&self, id: LeaseId) -> Lease {
        Lease::of_owner(self.fleet.everybody(), self.deadline, id)
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

    /// Forgets blocks, durably; answers how many. In a cluster every member is asked, because any may hold copies.
    ///
    /// # Errors
    /// When a node does not answer; asking again is safe.
    pub async fn invalidate(
        &self,
        namespace: &NamespaceHandle,
        target: Target,
    ) -> Result<u64, Error> {
        let deadline = self.until();
        let nodes = self.fleet.everybody();
        // One for all: the nodes see that they were told of the same.
        let request = self.fleet.home().unique();
        if let [inner] = &nodes[..] {
            return invalidate(inner, namespace, target, request, deadline).await;
        }
        let calls = nodes.iter().map(|inner| async move {
            open::ensure(inner, namespace, deadline).await?;
            invalidate(inner, namespace, target, request, deadline).await
        });
        let answers = join_all(calls).await;
        answers.into_iter().sum()
    }

    /// Events of one namespace (`None`: of all namespaces of the caller's tenant), for up to `lifetime`. Of one node: in a
    /// cluster of the one that this client was told of, or of another while that one is away.
    ///
    /// # Errors
    /// When the node does not answer.
    pub async fn watch(
        &self,
        namespace: Option<&NamespaceHandle>,
        lifetime: Duration,
    ) -> Result<Watch, Error> {
        let id = namespace.map(NamespaceHandle::id);
        self.of_anybody(self.until(), |inner: Arc<Inner>, deadline| async move {
            watch::watch(&inner, deadline, lifetime, id).await
        })
        .await
    }

    pub(crate) fn until(&self) -> Deadline {
        Deadline::after(&*self.fleet.recipe.clock, self.deadline)
    }

    /// Waits until a connection stands.
    pub(crate) async fn prove(&self, budget: Duration) -> Result<(), Error> {
        let deadline = Deadline::after(&*self.fleet.recipe.clock, budget);
        self.of_anybody(deadline, |inner: Arc<Inner>, deadline| async move {
            let mut tries = Tries::new(&inner, Method::STATS, deadline);
            loop {
                if tries.run(|_, _| async { Ok(()) }).await?.is_ok() {
                    return Ok(());
                }
            }
        })
        .await
    }
}

/// What is asked of the one node that there is.
fn wanted<'a>(
    namespace: &'a NamespaceHandle,
    chain: &'a Chain,
    options: GetOptions<'a>,
) -> Wanted<'a> {
    Wanted {
        namespace,
        chain,
        parts: options.parts,
        lease: options.lease.map(Lease::id),
    }
}

async fn invalidate(
    inner: &Inner,
    namespace: &NamespaceHandle,
    target: Target,
    request: [u8; 16],
    deadline: Deadline,
) -> Result<u64, Error> {
    use v1::invalidate_request::Target as Wire;
    let mut reopening = Reopening::default();
    loop {
        let answer = call::unary(inner, Method::INVALIDATE, deadline, |context| {
            v1::InvalidateRequest {
                context: Some(v1::RequestContext {
                    request_id: Bytes::copy_from_slice(&request),
                    ..context
                }),
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
                inner.heard(answer.context.as_ref());
                return Ok(answer.blocks);
            }
            Err(error) => reopening.after(inner, namespace, error, deadline).await?,
        }
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
        sent(|| client().open_namespace(ns().spec(), false));
        sent(|| client().invalidate(ns(), Target::All));
        sent(|| client().hold(ns(), chain(), None));
        sent(|| client().stats());
        sent(|| async {
            client()
                .lookup(ns(), chain(), &LookupOptions::default())
                .await
        });
    }
}
