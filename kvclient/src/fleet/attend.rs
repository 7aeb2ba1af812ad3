//! A call that is given up as soon as it is known that nobody is there to answer it.
//!
//! ```text
//! call ── an answer ────────────────────────────────────────► it
//!   └── PATIENCE without one: a ping ─┬─ pong ─► goes on: whoever has much to do may take the call's whole time
//!                                     └─ silence ─► Broken, within a CHECK
//! ```
//!
//! A frozen process keeps its connections, so that a call alone would learn of it by its deadline, and the blocks of the
//! other owners would wait as long.
//!
//! Units: durations.
//! Errors: the call's; [`Error::Broken`] when nobody is there.

use std::{io, pin::Pin, time::Duration};

use crate::{call::Inner, error::Error, wire::Method};

/// How long a call waits before it is asked whether anybody is there, and how often after that. Longer than a node takes
/// that only has something to do.
const PATIENCE: Duration = Duration::from_millis(500);

/// How often it is looked whether the answer to that has failed to come.
const CHECK: Duration = Duration::from_millis(100);

/// Makes a call at a node. It is pinned by whoever makes it: a call is kilobytes of state, and each hand it is given to
/// by value copies it once more.
pub(super) async fn attended<T>(
    inner: &Inner,
    method: Method,
    mut call: Pin<&mut impl Future<Output = Result<T, Error>>>,
) -> Result<T, Error> {
    let _queued = inner.queue.enter();
    let mut wait = PATIENCE;
    let mut asked = Duration::ZERO;
    loop {
        tokio::select! {
            biased;
            answer = call.as_mut() => return answer,
            () = inner.clock.sleep(wait) => {}
        }
        if inner.pool.breaker.is_silent() {
            inner.lanes.clear();
            let source = io::Error::new(io::ErrorKind::TimedOut, "nobody is there");
            let method = method.name;
            return Err(Error::Broken { method, source });
        }
        asked += wait;
        if asked >= PATIENCE {
            inner.pool.suspect();
            asked = Duration::ZERO;
        }
        wait = CHECK;
    }
}
