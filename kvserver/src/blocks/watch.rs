//! Watch: what comes and goes, for one listener.
//!
//! A listener that falls behind its ring (`watch_queue_events`) is told how many events it missed and
//! goes on; it never holds anybody up.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures_util::Stream;
use kvproto::{
    NamespaceId,
    convert::answer::{BlockEvent, WatchEvent},
};
use tokio_stream::wrappers::{BroadcastStream, errors::BroadcastStreamRecvError};

use super::{Blocks, BlocksError};
use crate::engine::{self, Change, TenantId};

/// One listener.
pub struct Watcher {
    blocks: Arc<Blocks>,
    tenant: TenantId,
    namespace: Option<NamespaceId>,
    events: BroadcastStream<engine::BlockEvent>,
    sequence: u64,
}

impl Blocks {
    /// Listens from now on, to one namespace or to all of the tenant's.
    ///
    /// # Errors
    /// An unknown namespace.
    pub fn watch(
        self: &Arc<Self>,
        tenant: TenantId,
        namespace: Option<NamespaceId>,
    ) -> Result<Watcher, BlocksError> {
        if let Some(namespace) = namespace {
            self.namespaces.get(tenant, namespace)?;
        }
        let events = BroadcastStream::new(self.engine.events());
        let sequence = self.engine.stats().events;
        Ok(Watcher {
            blocks: Arc::clone(self),
            tenant,
            namespace,
            events,
            sequence,
        })
    }
}

impl Watcher {
    /// Number of the last event heard, or that had happened when the watch began.
    #[must_use]
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// The next event with its number.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<(u64, WatchEvent)> {
        loop {
            let Poll::Ready(event) = Pin::new(&mut self.events).poll_next(cx) else {
                return Poll::Pending;
            };
            match event {
                // The engine lives as long as `blocks`, so its ring does not close.
                None => return Poll::Pending,
                Some(Err(BroadcastStreamRecvError::Lagged(missed))) => {
                    self.sequence += missed;
                    return Poll::Ready((self.sequence, WatchEvent::Lagged(missed)));
                }
                Some(Ok(event)) => {
                    self.sequence = event.sequence;
                    if self.wants(event.key.namespace) {
                        return Poll::Ready((event.sequence, told(&event)));
                    }
                }
            }
        }
    }

    fn wants(&self, namespace: NamespaceId) -> bool {
        match self.namespace {
            Some(only) => only == namespace,
            None => self.blocks.namespaces.get(self.tenant, namespace).is_ok(),
        }
    }
}

fn told(event: &engine::BlockEvent) -> WatchEvent {
    let reason = match event.change {
        Change::Stored => None,
        Change::Removed(reason) => Some(reason),
    };
    let told = BlockEvent {
        key: event.key,
        index: event.place.index,
        parent: event.place.parent,
        tier: event.tier,
        reason,
        length_bytes: event.length_bytes,
    };
    if reason.is_none() {
        WatchEvent::Stored(told)
    } else {
        WatchEvent::Removed(told)
    }
}
