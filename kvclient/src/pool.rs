//! The connections to one node, and which of them takes the next call.
//!
//! ```text
//! call ──► breaker ──► the link with most room ──► permit ──► Checkout
//!             │             links beyond the first are opened when all open ones are busy
//!             └─ open: refused at once, unless trying to connect is cheap (a dead node on a living
//!                host says no in microseconds, so the first call after its return finds it)
//! ```
//!
//! Units: calls.
//! Errors: [`Error::BreakerOpen`], [`Error::Connect`].
//! Why more than one connection: an HTTP/2 connection is one task and so at most one core.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use parking_lot::Mutex;
use tokio::{sync::OwnedSemaphorePermit, task::JoinHandle};

use crate::{
    clock::Clock,
    endpoint::Endpoint,
    error::Error,
    link::{Link, Live, Tuning},
    retry::{Admission, Breaker},
};

/// The connections to one node.
pub(crate) struct Pool {
    links: Vec<Arc<Link>>,
    /// Links whose keeper runs: always the first ones.
    kept: AtomicUsize,
    keepers: Mutex<Vec<JoinHandle<()>>>,
    runtime: tokio::runtime::Handle,
    pub(crate) breaker: Arc<Breaker>,
}

/// Leave to make one call on one connection.
pub(crate) struct Checkout {
    pub(crate) link: Arc<Link>,
    pub(crate) live: Live,
    _permit: OwnedSemaphorePermit,
}

/// Leave of the breaker; a probe that ends without a verdict is handed back.
pub(crate) struct Admitted {
    breaker: Arc<Breaker>,
    probe: bool,
}

impl Admitted {
    /// Somebody answered.
    pub(crate) fn success(mut self) {
        self.probe = false;
        self.breaker.success();
    }

    /// Nobody did.
    pub(crate) fn failure(mut self, clock: &dyn Clock) {
        self.probe = false;
        self.breaker.failure(clock.now());
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        if self.probe {
            self.breaker.abandon();
        }
    }
}

impl Pool {
    /// A pool of up to `connections`, none of them open yet. Must be called within a tokio runtime.
    pub(crate) fn new(
        endpoint: &Endpoint,
        connections: usize,
        tuning: Tuning,
        clock: &Arc<dyn Clock>,
        breaker: Breaker,
    ) -> Self {
        let breaker = Arc::new(breaker);
        let links = (0..connections.max(1))
            .map(|_| Link::new(endpoint.clone(), tuning, clock.clone(), breaker.clone()))
            .collect();
        Self {
            links,
            kept: AtomicUsize::new(0),
            keepers: Mutex::default(),
            runtime: tokio::runtime::Handle::current(),
            breaker,
        }
    }

    /// The runtime that drives the connections.
    pub(crate) fn runtime(&self) -> &tokio::runtime::Handle {
        &self.runtime
    }

    /// Asks the breaker.
    ///
    /// # Errors
    /// [`Error::BreakerOpen`].
    pub(crate) fn admit(&self) -> Result<Admitted, Error> {
        let first = &self.links[0];
        let probe = match self.breaker.admit(first.clock.now()) {
            Admission::Pass => false,
            Admission::Probe => true,
            Admission::Refused { .. } if first.is_cheap_to_try() => false,
            Admission::Refused { retry_after } => {
                return Err(Error::BreakerOpen {
                    endpoint: first.endpoint.to_string(),
                    retry_after,
                });
            }
        };
        Ok(Admitted {
            breaker: self.breaker.clone(),
            probe,
        })
    }

    /// A connection with room, connecting and waiting for room as needed; the caller bounds the wait.
    ///
    /// # Errors
    /// [`Error::Connect`].
    pub(crate) async fn checkout(&self) -> Result<Checkout, Error> {
        let link = self.pick();
        loop {
            let live = match link.now() {
                Some(live) => live,
                None => link.live().await?,
            };
            // Closed never happens: nobody closes it; a retired connection's permits stay valid.
            if let Ok(permit) = live.permits.clone().acquire_owned().await {
                return Ok(Checkout {
                    link: link.clone(),
                    live,
                    _permit: permit,
                });
            }
        }
    }

    /// Somebody waits too long for this node: find out whether anybody is there.
    pub(crate) fn suspect(&self) {
        for link in &self.links {
            if let Some(live) = link.now() {
                link.suspect(&live);
            }
        }
    }

    fn pick(&self) -> &Arc<Link> {
        let kept = self.kept.load(Ordering::Acquire);
        let best = self.links[..kept]
            .iter()
            .filter_map(|link| link.room().map(|room| (room, link)))
            // The first of equals: a lone caller stays on one warm connection.
            .rev()
            .max_by_key(|(room, _)| *room);
        match best {
            Some((room, link)) => {
                if room < link.capacity() && kept < self.links.len() {
                    self.keep(kept);
                }
                link
            }
            None => {
                if kept == 0 {
                    self.keep(0);
                }
                &self.links[0]
            }
        }
    }

    /// Starts the keeper of link `index`, unless somebody else just did.
    fn keep(&self, index: usize) {
        let mut keepers = self.keepers.lock();
        if keepers.len() == index {
            keepers.push(self.runtime.spawn(self.links[index].clone().keep()));
            self.kept.store(keepers.len(), Ordering::Release);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        for keeper in self.keepers.get_mut() {
            keeper.abort();
        }
    }
}
