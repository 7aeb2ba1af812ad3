//! Runs that are on their way: so that none goes two ways at once.
//!
//! ```text
//! a probe (may I send it?) finds a flight of that run ─────► answered when it has landed: nothing is left to send
//! a lookup (I will fetch it) finds that it is being sent ──► answered when that is over: the asker looks again, and has it
//! ```
//!
//! A run that changed its owner is both pushed by the old one and fetched by the first reader at the new one, whichever
//! comes first; without this they would meet now and then, and every byte would cross the network twice.
//! Neither waits in a circle: what is being probed is not being sent yet, and a flight waits for nothing but sends.
//! Units: durations. Errors: none; who has waited long enough is answered from what is here.
//! Bounds: as many sends as there are destinations, and the time of whoever asks.

use std::{sync::Arc, time::Duration};

use futures_util::{
    FutureExt,
    future::{BoxFuture, Shared},
};
use kvproto::Chain;
use tokio::sync::oneshot;

use super::Motion;
use crate::{engine::RunKey, peers::Space};

/// Ends when a run has been sent.
pub(super) type Sent = Shared<BoxFuture<'static, ()>>;

/// A run is being sent, until dropped.
pub(super) struct Sending<'a> {
    motion: &'a Motion,
    run: RunKey,
    sent: Sent,
    _end: oneshot::Sender<()>,
}

impl Motion {
    /// What a peer's question about a run should wait for, at most `time`; nearly always nothing. `is_probe`: the peer
    /// would send what is lacking here, and does not ask for what is here.
    #[must_use]
    pub fn under_way(
        &self,
        space: &Arc<Space>,
        chain: &Chain,
        is_probe: bool,
        time: Duration,
    ) -> Option<BoxFuture<'static, ()>> {
        if chain.hashes.is_empty() {
            return None;
        }
        let key = RunKey {
            namespace: space.id,
            run: chain.place(0, space.run_blocks()).run,
        };
        let ends = match is_probe {
            true => self.landing(&key)?,
            false => self.sending.lock().get(&key)?.clone().boxed(),
        };
        let late = self.clock.sleep(time);
        let waited = self.on_runtime(async move {
            tokio::select! {
                biased;
                () = ends => {}
                () = late => {}
            }
        });
        Some(waited.map(drop).boxed())
    }

    /// A run is being sent from now on.
    pub(super) fn send_off(&self, run: RunKey) -> Sending<'_> {
        let (end, ended) = oneshot::channel::<()>();
        let sent = ended.map(drop).boxed().shared();
        self.sending.lock().insert(run, sent.clone());
        Sending {
            motion: self,
            run,
            sent,
            _end: end,
        }
    }
}

impl Drop for Sending<'_> {
    fn drop(&mut self) {
        let mut sending = self.motion.sending.lock();
        // The same run may be on its way to somebody else by now.
        let is_this = |sent: &Sent| sent.ptr_eq(&self.sent);
        if sending.get(&self.run).is_some_and(is_this) {
            sending.remove(&self.run);
        }
    }
}
