//! The asking half of a cache: lookups that never wait, and the leases that they bring.

use std::{sync::Arc, time::Duration};

use kvclient::{LookupOptions, clock::Clock};

use super::{Cache, Error, Shared};
use crate::{
    hashes::{self, EngineHashes},
    lookups::{Ask, Ticket},
    node::Way,
};

/// Leases are given up this many lives after their lookup, whatever the engine does.
const LEASE_LIVES: u32 = 12;

/// Shortest pause between two looks at which leases are due.
const RENEW_PAUSE: Duration = Duration::from_millis(20);

impl Cache {
    /// How many blocks from `first` on may be loaded; `None`: on its way.
    ///
    /// # Errors
    /// When the hashes are no hashes.
    pub fn lookup(
        &self,
        request: &str,
        hashes: &[u8],
        width: usize,
        first: usize,
        probe: bool,
    ) -> Result<Option<usize>, Error> {
        let count = hashes::count(hashes, width)?;
        let shared = &self.shared;
        let Some(way) = shared.node.asking() else {
            shared.node.counters.lookups_away.add(1);
            return Ok(Some(0));
        };
        if first >= count {
            return Ok(Some(0));
        }
        let whole = EngineHashes::new;
        let now = shared.node.clock.now();
        let mut lookups = shared.lookups.lock();
        let mut misses = shared.misses.lock();
        let mut asked = None;
        let ticket = match lookups.ask(request, first, now, &mut misses, || {
            let hashes = whole(hashes, width).expect("counted above");
            asked = Some(hashes.clone());
            hashes
        }) {
            Ask::Known(blocks) => return Ok(Some(blocks)),
            Ask::Pending => return Ok(None),
            Ask::Full => {
                shared.node.counters.lookups_full.add(1);
                return Ok(Some(0));
            }
            Ask::New(ticket) => ticket,
        };
        let hashes = asked.expect("a new lookup has taken its hashes");
        let wanted = misses.before(hashes.iter(first..count), now);
        if wanted < count - first {
            shared.node.counters.lookups_cut.add(1);
        }
        if wanted == 0 {
            let none = lookups.answer(request, ticket, 0, None, now, now);
            debug_assert!(none.is_ok());
            return Ok(Some(0));
        }
        drop((misses, lookups));
        shared.node.counters.lookups_asked.add(1);
        let asking = Asking {
            request: request.to_owned(),
            ticket,
            hashes,
            first,
            wanted,
            probe,
        };
        self.asking.spawn(ask(Arc::clone(shared), way, asking));
        Ok(None)
    }

    /// The lease of an answered lookup; 0: none.
    #[must_use]
    pub fn lease(&self, request: &str) -> u64 {
        self.shared.lookups.lock().lease(request)
    }

    /// Gives the lease back and forgets the answer.
    pub fn forget(&self, request: &str) {
        let lease = self.shared.lookups.lock().forget(request);
        // Dropping it queues its release, without waiting.
        drop(lease);
    }

    /// Lookups stop before these blocks for a while.
    ///
    /// # Errors
    /// When the hashes are no hashes.
    pub fn miss(&self, hashes: &[u8], width: usize) -> Result<(), Error> {
        hashes::count(hashes, width)?;
        let now = self.shared.node.clock.now();
        let mut misses = self.shared.misses.lock();
        for hash in hashes.chunks_exact(width) {
            misses.add(hash, now);
        }
        Ok(())
    }

    /// These blocks were saved through another cache: lookups do not stop before them any more.
    ///
    /// # Errors
    /// When the hashes are no hashes.
    pub fn saved(&self, hashes: &[u8], width: usize) -> Result<(), Error> {
        hashes::count(hashes, width)?;
        let mut misses = self.shared.misses.lock();
        for hash in hashes.chunks_exact(width) {
            misses.remove(hash);
        }
        Ok(())
    }

    /// Waits for a lookup: how many blocks from `first` on are there. With a `request` it is leased and remembered.
    ///
    /// # Errors
    /// When the hashes are no hashes.
    pub fn exists(
        &self,
        hashes: &[u8],
        width: usize,
        timeout: Duration,
        first: usize,
        request: Option<&str>,
    ) -> Result<usize, Error> {
        let clock = &self.shared.node.clock;
        let until = clock.now().after(timeout);
        let unnamed;
        let (request, probe) = match request {
            Some(request) => (request, false),
            None => {
                // Longer than any engine's id, and of this call alone.
                unnamed = format!(
                    "terrace/exists/{:016x}{:016x}",
                    clock.random_u64(),
                    clock.random_u64()
                );
                (unnamed.as_str(), true)
            }
        };
        let found = loop {
            if let Some(found) = self.lookup(request, hashes, width, first, probe)? {
                break found;
            }
            let mut lookups = self.shared.lookups.lock();
            // An answer that came since is seen by the next turn; one that comes from now on wakes this one.
            if lookups.is_pending(request) {
                let left = until.since(clock.now());
                if left.is_zero() {
                    break 0;
                }
                self.shared
                    .answered
                    .wait_for(&mut lookups, left.min(self.shared.lookup_timeout));
            }
        };
        if probe {
            self.forget(request);
        }
        Ok(found)
    }
}

/// One lookup on its way.
struct Asking {
    request: String,
    ticket: Ticket,
    hashes: EngineHashes,
    first: usize,
    wanted: usize,
    probe: bool,
}

async fn ask(shared: Arc<Shared>, way: Way, asking: Asking) {
    let range = asking.first..asking.first + asking.wanted;
    let chain = asking
        .hashes
        .chain(way.namespace.key(), way.namespace.run_blocks(), range);
    let options = LookupOptions {
        parts: shared.parts.clone(),
        probe: asking.probe,
        lease_ttl: shared.lease,
        idempotency_key: None,
    };
    let client = way.client.with_deadline(shared.lookup_timeout);
    let (blocks, lease) = match client.lookup(&way.namespace, &chain, &options).await {
        Ok(found) if asking.probe => (found.present_blocks as usize, None),
        Ok(found) => (found.leased_blocks() as usize, found.lease),
        Err(error) => {
            shared.node.failed(&error);
            shared.node.counters.lookups_away.add(1);
            (0, None)
        }
    };
    let now = shared.node.clock.now();
    let lease = lease.map(|lease| (lease.id().0, lease));
    let renew_at = now.after(shared.lease / 2);
    let answered =
        shared
            .lookups
            .lock()
            .answer(&asking.request, asking.ticket, blocks, lease, now, renew_at);
    if answered.is_ok() {
        shared.node.counters.lookups_answered.add(1);
        shared.node.counters.lookup_blocks.add(blocks as u64);
    }
    // A late answer's lease is released by being dropped here.
    drop(answered);
    shared.answered.notify_all();
}

/// Keeps the leases of answered lookups alive.
pub(super) async fn renew(shared: Arc<Shared>) {
    loop {
        let pause = (shared.lease / 4).max(RENEW_PAUSE);
        shared.node.clock.sleep(pause).await;
        let now = shared.node.clock.now();
        let (due, given_up) = shared.lookups.lock().due(now, shared.lease * LEASE_LIVES);
        drop(given_up);
        let mut answering = true;
        for (request, ticket, mut lease) in due {
            let renewed = match answering.then_some(()) {
                Some(()) => lease.renew(shared.lease).await,
                None => Ok(false),
            };
            let lease = match renewed {
                Ok(true) => {
                    shared.node.counters.leases_renewed.add(1);
                    Some(lease)
                }
                Ok(false) => None,
                Err(error) => {
                    shared.node.failed(&error);
                    answering = false;
                    None
                }
            };
            let renew_at = shared.node.clock.now().after(shared.lease / 2);
            let unwanted = shared
                .lookups
                .lock()
                .renewed(&request, ticket, lease, renew_at);
            drop(unwanted);
        }
    }
}
