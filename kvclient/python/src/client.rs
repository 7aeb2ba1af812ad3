//! A plain client that waits: for people and tools, over tokens and bytes.
//!
//! ```text
//! tokens ─cut, hash─► chain ─► put · get · lookup · invalidate      each on the caller's thread, by deadline
//! ```
//!
//! On the node's host the thread sleeps in the kernel until its answer is there (`kvclient::blocking`); the caller
//! has let go of Python's lock by then.
//!
//! Units: blocks, bytes.
//! Errors: [`Error`]: nobody answered, or the call can never work. A miss is a shorter answer.

use std::time::Duration;

use bytes::Bytes;
use kvclient::{
    Chain, ErrorKind, LookupOptions, Namespace, NamespaceHandle, PutBlock, PutOptions, Target,
    blocking::Client,
};
use kvproto::FieldError;

use crate::node::NodeSettings;

/// Why a call has no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A field is wrong.
    #[error(transparent)]
    Field(#[from] FieldError),
    /// The node did not answer, or refused.
    #[error(transparent)]
    Client(#[from] kvclient::Error),
    /// It was closed.
    #[error("the client was closed")]
    Closed,
    /// Its thread and connections are another process's.
    #[error("the client was made before a fork; make a new one after it")]
    Forked,
}

impl Error {
    /// Whether nobody answered, and a later call may.
    #[must_use]
    pub fn is_unavailable(&self) -> bool {
        match self {
            Self::Client(error) => {
                matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Refresh)
            }
            Self::Closed | Self::Forked => true,
            Self::Field(_) => false,
        }
    }
}

/// A client of one namespace. Its calls wait, up to its deadline each.
#[derive(Debug)]
pub struct PlainClient {
    /// Gone once it was closed.
    open: Option<Client>,
    namespace: NamespaceHandle,
    process: u32,
}

impl PlainClient {
    /// Connects and opens the namespace.
    ///
    /// # Errors
    /// When nobody answers in time, or the namespace is refused.
    pub fn connect(
        node: &NodeSettings,
        spec: &Namespace,
        deadline: Duration,
    ) -> Result<Self, Error> {
        // Its first call connects, within the same deadline.
        let client = node
            .builder()
            .deadline(deadline)
            .connect_lazily_blocking()?;
        let namespace = client.open_namespace(spec, node.strict)?;
        Ok(Self {
            open: Some(client),
            namespace,
            process: std::process::id(),
        })
    }

    /// Tokens per block.
    #[must_use]
    pub fn block_tokens(&self) -> u32 {
        self.namespace.block_tokens()
    }

    /// What differs from the namespace last opened under this label.
    #[must_use]
    pub fn difference(&self) -> Option<&str> {
        self.namespace.difference()
    }

    /// Stores blocks `first`, `first + 1`, … of the prompt; what became of each, by name.
    ///
    /// # Errors
    /// When the node does not answer, or the prompt has fewer full blocks.
    pub fn put(
        &self,
        tokens: &[u32],
        first: usize,
        blocks: Vec<Bytes>,
    ) -> Result<Vec<String>, Error> {
        if blocks.is_empty() {
            return Ok(Vec::new());
        }
        let chain = self.chain(tokens, first)?;
        if chain.len() < blocks.len() {
            let problem = format!(
                "has {} full blocks from {first} on, {} were given",
                chain.len(),
                blocks.len()
            );
            return Err(FieldError::new("tokens", problem).into());
        }
        let blocks: Vec<PutBlock<'_>> = blocks
            .into_iter()
            .enumerate()
            .map(|(i, bytes)| PutBlock::new(i, bytes))
            .collect();
        let options = PutOptions::default();
        let results = self
            .open()?
            .put(&self.namespace, &chain, &blocks, options)?;
        Ok(results.iter().map(|r| r.outcome.to_string()).collect())
    }

    /// The bytes of the prompt's blocks from `first` on, up to the first that is missing.
    ///
    /// # Errors
    /// When the node does not answer.
    pub fn get(&self, tokens: &[u32], first: usize) -> Result<Vec<Bytes>, Error> {
        let Ok(chain) = self.chain(tokens, first) else {
            return Ok(Vec::new());
        };
        let (client, namespace) = (self.open()?, &self.namespace);
        let found = client.lookup(namespace, &chain, &LookupOptions::default())?;
        let Some(lease) = found.lease else {
            return Ok(Vec::new());
        };
        let leased = chain.slice(0..lease.blocks() as usize, namespace.run_blocks());
        let fetched = client.get(namespace, &leased, &lease)?;
        Ok(fetched.into_iter().map_while(|block| block.bytes).collect())
    }

    /// How many of the prompt's leading blocks are there.
    ///
    /// # Errors
    /// When the node does not answer.
    pub fn lookup(&self, tokens: &[u32]) -> Result<usize, Error> {
        let Ok(chain) = self.chain(tokens, 0) else {
            return Ok(0);
        };
        let probe = LookupOptions::probe();
        let found = self.open()?.lookup(&self.namespace, &chain, &probe)?;
        Ok(found.present_blocks as usize)
    }

    /// Forgets the prompt's first block and all that ever followed it; `None`: everything. How many blocks.
    ///
    /// # Errors
    /// When the node does not answer.
    pub fn invalidate(&self, tokens: Option<&[u32]>) -> Result<u64, Error> {
        let target = match tokens.map(|tokens| self.chain(tokens, 0)) {
            None => Target::All,
            Some(Ok(chain)) => Target::Prefix(chain.hashes[0]),
            Some(Err(_)) => return Ok(0),
        };
        Ok(self.open()?.invalidate(&self.namespace, target)?)
    }

    /// What the node holds and has done, by name.
    ///
    /// # Errors
    /// When the node does not answer.
    pub fn stats(&self) -> Result<Vec<(String, u64)>, Error> {
        let stats = self.open()?.stats()?;
        let mut list = vec![
            ("uptime_ms".to_owned(), stats.uptime_ms),
            ("leases".to_owned(), stats.leases),
            ("leased_bytes".to_owned(), stats.leased_bytes),
            ("connections".to_owned(), stats.connections),
            ("namespaces".to_owned(), stats.namespaces),
        ];
        for tier in &stats.tiers {
            let name = kvclient::TierKind::from_wire(tier.tier)
                .map_or_else(|| tier.tier.to_string(), |tier| tier.to_string());
            list.push((format!("{name}_capacity_bytes"), tier.capacity_bytes));
            list.push((format!("{name}_used_bytes"), tier.used_bytes));
            list.push((format!("{name}_blocks"), tier.blocks));
        }
        // Counters are whole numbers that travel as doubles; histograms are for Prometheus.
        let counters = stats.counters.into_iter();
        let counters = counters.filter(|counter| !counter.name.contains("_bucket{"));
        list.extend(counters.map(|counter| (counter.name, counter.value as u64)));
        Ok(list)
    }

    /// Closes the connections. Calls after it fail.
    pub fn close(&mut self) {
        let open = self.open.take();
        if self.is_forked() {
            // The thread to wait for is not here, and to unregister a connection would be to do so for the parent.
            std::mem::forget(open);
        }
    }

    /// Whether this is a forked child of the process that made it. Takes no lock: its holder may be in the parent.
    fn is_forked(&self) -> bool {
        std::process::id() != self.process
    }

    /// The prompt's full blocks from `first` on, at least one.
    fn chain(&self, tokens: &[u32], first: usize) -> Result<Chain, Error> {
        let namespace = &self.namespace;
        let whole = namespace.chain(tokens);
        if first >= whole.len() {
            let problem = format!("has {} full blocks, none from {first} on", whole.len());
            return Err(FieldError::new("tokens", problem).into());
        }
        Ok(whole.slice(first..whole.len(), namespace.run_blocks()))
    }

    fn open(&self) -> Result<&Client, Error> {
        if self.is_forked() {
            return Err(Error::Forked);
        }
        self.open.as_ref().ok_or(Error::Closed)
    }
}

impl Drop for PlainClient {
    fn drop(&mut self) {
        self.close();
    }
}
