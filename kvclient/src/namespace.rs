//! An open namespace: its id, its hashing key, and chains made with them.
//!
//! ```text
//! Namespace ─open─► NamespaceHandle { id, key } ── chain(tokens) ───────► Chain
//!                                               ── engine_chain(hashes) ─► Chain
//! ```
//!
//! Shape: n tokens give floor(n / block_tokens) blocks.
//! Units: tokens, blocks, bytes.
//! Errors: none; opening is [`crate::Client::open_namespace`].
//! Why a handle: id and key depend on the tenant, which only the node knows from the credential. A handle
//! outlives the node's restarts: the client opens the namespace again when the node has forgotten it.

use std::sync::Arc;

use kvproto::{
    Chain, FieldError, Namespace, NamespaceId, NamespaceKey, SequenceHash,
    convert::{HeaderRules, answer::OpenedNamespace},
    hash,
};

/// An open namespace. Cheap to clone.
#[derive(Clone, Debug)]
pub struct NamespaceHandle {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    spec: Namespace,
    opened: OpenedNamespace,
    aside: bool,
}

impl NamespaceHandle {
    pub(crate) fn new(spec: Namespace, opened: OpenedNamespace, aside: bool) -> Self {
        let shared = Shared {
            spec,
            opened,
            aside,
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// What was opened.
    #[must_use]
    pub fn spec(&self) -> &Namespace {
        &self.shared.spec
    }

    /// Its human name.
    #[must_use]
    pub fn label(&self) -> &str {
        &self.shared.spec.label
    }

    /// Its id, which every key starts with.
    #[must_use]
    pub fn id(&self) -> NamespaceId {
        self.shared.opened.id
    }

    /// The key of its hashes.
    #[must_use]
    pub fn key(&self) -> &NamespaceKey {
        &self.shared.opened.key
    }

    /// Tokens per block.
    #[must_use]
    pub fn block_tokens(&self) -> u32 {
        self.shared.spec.block_tokens
    }

    /// Blocks per run.
    #[must_use]
    pub fn run_blocks(&self) -> u32 {
        self.shared.spec.run_blocks
    }

    /// Largest block the node takes.
    #[must_use]
    pub fn max_block_bytes(&self) -> u64 {
        self.shared.opened.max_block_bytes
    }

    /// One line that names what differs from the namespace last opened under this label.
    #[must_use]
    pub fn difference(&self) -> Option<&str> {
        self.shared.opened.difference.as_deref()
    }

    /// The chain of a prompt's full blocks.
    #[must_use]
    pub fn chain(&self, tokens: &[u32]) -> Chain {
        Chain::from_root(hash::chain(self.key(), self.block_tokens(), tokens))
    }

    /// The chain of a prompt whose block `i` also depends on `extra(i)`: LoRA digest, image hash, salt.
    #[must_use]
    pub fn chain_with<'e>(
        &self,
        tokens: &[u32],
        extra: impl FnMut(usize) -> &'e [&'e [u8]],
    ) -> Chain {
        Chain::from_root(hash::chain_with(
            self.key(),
            self.block_tokens(),
            tokens,
            extra,
        ))
    }

    /// The chain of an engine's own block hashes, opaque bytes, root first.
    #[must_use]
    pub fn engine_chain<H: AsRef<[u8]>>(&self, opaque: &[H]) -> Chain {
        let hashes = opaque
            .iter()
            .map(|hash| self.engine_hash(hash.as_ref()))
            .collect();
        Chain::from_root(hashes)
    }

    /// One engine hash under this namespace's key.
    #[must_use]
    pub fn engine_hash(&self, opaque: &[u8]) -> SequenceHash {
        hash::engine(self.key(), opaque)
    }

    /// Members of a cluster that hold each of its runs.
    #[must_use]
    pub fn replicas(&self) -> usize {
        self.shared.opened.replicas as usize
    }

    /// Whether another of its label stays the one that was opened last.
    pub(crate) fn is_aside(&self) -> bool {
        self.shared.aside
    }

    /// Whether a node has answered the same id and key.
    pub(crate) fn is(&self, opened: &OpenedNamespace) -> bool {
        self.shared.opened.id == opened.id && self.shared.opened.key == opened.key
    }

    /// What its blocks' headers must keep.
    pub(crate) fn header_rules(&self) -> HeaderRules {
        HeaderRules {
            namespace: self.id(),
            run_blocks: self.run_blocks(),
            max_block_bytes: self.max_block_bytes(),
        }
    }

    /// Refuses a chain that is no chain of this namespace.
    pub(crate) fn check(&self, chain: &Chain) -> Result<(), FieldError> {
        chain.validate(self.run_blocks())
    }
}
