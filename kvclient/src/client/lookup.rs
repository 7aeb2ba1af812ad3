//! Look up a chain, and what becomes of the lease.
//!
//! Units: blocks, durations. Errors: as [`Error::kind`] says.

use std::time::Duration;

use kvproto::{BootId, Chain, LeaseId, Part, TierKind};

use super::Client;
use crate::{
    error::Error,
    fleet::{
        self,
        share::{Answered, Question},
    },
    lease::{Lease, millis},
    namespace::NamespaceHandle,
};

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

impl Client {
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

    /// A lease by its id, which another client of this owner ([`crate::ClientBuilder::owner`]) holds and looks after: for
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
}
