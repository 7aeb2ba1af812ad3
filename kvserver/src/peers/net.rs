//! Nodes of one process, called without sockets: the transport of tests and of the simulator.
//!
//! ```text
//! Net.attach(id, service)      lookup, get, put … ─► latency by the clock ─► the service, on the caller's task
//! Net.fault(id, Fault)         dead: at once · frozen: at the deadline · lies: another byte in every block
//! ```
//!
//! Shape: everything is ordered, so that the same calls give the same history. Errors: those of the faults.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{
    FutureExt, StreamExt,
    future::{BoxFuture, ready},
    stream,
};
use kvproto::{BlockKey, LeaseId, convert::answer::PutResult, view::MemberId};
use parking_lot::Mutex;

use super::{Asked, Carried, Fetched, Fetching, Given, Peer, PeerError, Seen, Space, Transport};
use crate::clock::Clock;

/// What a node answers its peers, from what it holds.
pub trait Service: Send + Sync + 'static {
    /// As [`Transport::lookup`].
    ///
    /// # Errors
    /// [`PeerError::UnknownNamespace`], and refusals.
    fn lookup(&self, asked: &Asked, lease: Option<Duration>) -> Result<Seen, PeerError>;

    /// What a lookup waits for before it is answered, at most `time`: blocks that are on their way here, or from here.
    fn under_way(
        &self,
        asked: &Asked,
        lease: Option<Duration>,
        time: Duration,
    ) -> Option<BoxFuture<'static, ()>> {
        let _ = (asked, lease, time);
        None
    }

    /// One block of a [`Transport::get`].
    fn get(&self, key: &BlockKey, lease: Option<LeaseId>) -> Fetched;

    /// As [`Transport::put`].
    ///
    /// # Errors
    /// [`PeerError::UnknownNamespace`], and refusals.
    fn put(&self, given: Given) -> Result<Vec<PutResult>, PeerError>;

    /// As [`Transport::open`].
    fn open(&self, space: &Arc<Space>);

    /// As [`Transport::release`].
    fn release(&self, lease: LeaseId);
}

/// What is wrong with a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    #[default]
    None,
    /// Its port is closed.
    Dead,
    /// It takes calls and answers none.
    Frozen,
    /// It answers bytes that are not what their header says.
    Lies,
}

/// A call that was made, for those who count.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Called {
    /// Whom.
    pub peer: MemberId,
    /// Which method.
    pub method: &'static str,
}

/// Calls that are remembered.
const MAX_CALLED: usize = 1 << 16;

/// All nodes of a process, as one of them calls them.
pub struct Net {
    clock: Arc<dyn Clock>,
    latency: Duration,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    nodes: BTreeMap<MemberId, (Arc<dyn Service>, Fault)>,
    called: Vec<Called>,
}

impl Net {
    /// Nobody yet; every call takes `latency`.
    #[must_use]
    pub fn new(clock: Arc<dyn Clock>, latency: Duration) -> Arc<Self> {
        Arc::new(Self {
            clock,
            latency,
            state: Mutex::default(),
        })
    }

    /// A node is there from now on.
    pub fn attach(&self, id: MemberId, service: Arc<dyn Service>) {
        self.state
            .lock()
            .nodes
            .insert(id, (service, Fault::default()));
    }

    /// A node is there no longer.
    pub fn detach(&self, id: &MemberId) {
        self.state.lock().nodes.remove(id);
    }

    /// Something goes wrong with a node from now on.
    pub fn fault(&self, id: &MemberId, fault: Fault) {
        if let Some((_, known)) = self.state.lock().nodes.get_mut(id) {
            *known = fault;
        }
    }

    /// The calls made so far, in order.
    #[must_use]
    pub fn called(&self) -> Vec<Called> {
        self.state.lock().called.clone()
    }

    fn call(&self, peer: &Peer, method: &'static str) -> (Option<Arc<dyn Service>>, Fault) {
        let mut state = self.state.lock();
        if state.called.len() < MAX_CALLED {
            state.called.push(Called {
                peer: peer.id.clone(),
                method,
            });
        }
        match state.nodes.get(&peer.id) {
            Some((_, Fault::Dead)) | None => (None, Fault::Dead),
            Some((service, fault)) => (Some(Arc::clone(service)), *fault),
        }
    }

    fn service(&self, id: &MemberId) -> Option<Arc<dyn Service>> {
        let state = self.state.lock();
        state.nodes.get(id).map(|(service, _)| Arc::clone(service))
    }

    /// Has a service answer when a call has had its way; a frozen one never does.
    fn answer<T: Send + 'static>(
        &self,
        peer: &Peer,
        method: &'static str,
        deadline: Duration,
        answer: impl FnOnce(&dyn Service, Fault) -> Result<T, PeerError> + Send + 'static,
    ) -> BoxFuture<'static, Result<T, PeerError>> {
        let (service, fault) = self.call(peer, method);
        let wait = match fault {
            Fault::Frozen => deadline,
            _ => self.latency.min(deadline),
        };
        let late = fault == Fault::Frozen || self.latency > deadline;
        let sleep = (!wait.is_zero()).then(|| self.clock.sleep(wait));
        async move {
            let service = service.ok_or_else(|| PeerError::Dead("nobody listens".to_owned()))?;
            if let Some(sleep) = sleep {
                sleep.await;
            }
            match late {
                true => Err(PeerError::Late),
                false => answer(&*service, fault),
            }
        }
        .boxed()
    }
}

impl Transport for Net {
    fn lookup(
        &self,
        peer: &Peer,
        asked: &Asked,
        lease: Option<Duration>,
        deadline: Duration,
    ) -> BoxFuture<'static, Result<Seen, PeerError>> {
        let service = self.service(&peer.id);
        let (asked, waits) = (asked.clone(), asked.clone());
        let arrived = self.answer(peer, "lookup", deadline, move |service, _| {
            Ok(service.under_way(&waits, lease, deadline / 2))
        });
        async move {
            if let Some(ended) = arrived.await? {
                ended.await;
            }
            match service {
                Some(service) => service.lookup(&asked, lease),
                None => Err(PeerError::Dead("nobody listens".to_owned())),
            }
        }
        .boxed()
    }

    fn get(
        &self,
        peer: &Peer,
        asked: &Asked,
        lease: Option<LeaseId>,
        deadline: Duration,
    ) -> Fetching {
        let asked = asked.clone();
        let answer = self.answer(peer, "get", deadline, move |service, fault| {
            let keys = asked.chain.hashes.iter().flat_map(|hash| {
                asked.parts.iter().map(|part| BlockKey {
                    namespace: asked.space.id,
                    hash: *hash,
                    part: *part,
                })
            });
            let found = keys.map(|key| match service.get(&key, lease) {
                Fetched::Hit(block) if fault == Fault::Lies => Fetched::Hit(spoilt(block)),
                found => found,
            });
            Ok(found.collect::<Vec<_>>())
        });
        stream::once(answer)
            .flat_map(|answer| match answer {
                Ok(found) => {
                    let numbered = (0..).zip(found).map(Ok).collect::<Vec<_>>();
                    stream::iter(numbered).left_stream()
                }
                Err(error) => stream::once(ready(Err(error))).right_stream(),
            })
            .boxed()
    }

    fn put(
        &self,
        peer: &Peer,
        given: Given,
        deadline: Duration,
    ) -> BoxFuture<'static, Result<Vec<PutResult>, PeerError>> {
        self.answer(peer, "put", deadline, move |service, _| service.put(given))
    }

    fn open(
        &self,
        peer: &Peer,
        space: &Arc<Space>,
        deadline: Duration,
    ) -> BoxFuture<'static, Result<(), PeerError>> {
        let space = Arc::clone(space);
        self.answer(peer, "open", deadline, move |service, _| {
            service.open(&space);
            Ok(())
        })
    }

    fn release(
        &self,
        peer: &Peer,
        _: &Arc<Space>,
        lease: LeaseId,
        deadline: Duration,
    ) -> BoxFuture<'static, Result<(), PeerError>> {
        self.answer(peer, "release", deadline, move |service, _| {
            service.release(lease);
            Ok(())
        })
    }
}

/// The same header over other bytes.
fn spoilt(mut block: Carried) -> Carried {
    if let Some(first) = block.pieces.first_mut() {
        let mut bytes = first.to_vec();
        if let Some(byte) = bytes.first_mut() {
            *byte ^= 1;
        }
        *first = Bytes::from(bytes);
    }
    block
}
