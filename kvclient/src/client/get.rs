//! Get blocks, into the caller's memory or as bytes, or hold them where they lie.
//!
//! Units: blocks, bytes. Errors: when a call has no whole answer; a block that is not there is an outcome.

use kvproto::{Chain, FieldError};

use super::Client;
use crate::{
    call::Deadline,
    error::Error,
    fleet::get::Getting,
    get::{self, Fetched, GetOptions, Got, Wanted, sink::Destination},
    lease::Lease,
    local::{self, Held},
    namespace::NamespaceHandle,
    open::Reopening,
};

impl Client {
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
    /// verified; [`Held::read`] does both. In a cluster those that lie with nodes of this host are held, and
    /// [`Held::is_elsewhere`] says which do not. `None`: no node of theirs is to be reached on the same host, or the only
    /// node there is has a block that cannot be shared; get them instead.
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
        let here = local::hold(self.fleet.home(), deadline, &wanted).await;
        Ok(here.and_then(|here| Held::of_one(here, wanted.count())))
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
