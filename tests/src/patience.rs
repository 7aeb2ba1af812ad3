//! Waiting without guessing how fast the machine is.
//!
//! ```text
//! eventually, until   what happens in its own time: asked again and again; HANG only ends a test that hangs
//! within_awake        what promises to be quick: measured in time that this process was given
//! ```
//!
//! Why not a wall clock: a loaded machine stops a process for a second and more, and charges it to whoever is
//! being timed. A ticker that runs beside the work is stopped with it, so what the machine takes counts once.

use std::{
    future::Future,
    net::{SocketAddr, TcpListener},
    sync::atomic::{AtomicU8, Ordering},
    time::{Duration, Instant},
};

/// How long a test waits for what must come. Far beyond what the slowest machine needs.
pub const HANG: Duration = Duration::from_secs(60);

/// Length of a tick of [`within_awake`].
const TICK: Duration = Duration::from_millis(10);

/// Waits until something is so; for what happens on another thread in its own time.
///
/// # Panics
/// When it is not so after [`HANG`].
pub async fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    until(what, async || is_so()).await;
}

/// The same for what only a call can tell.
///
/// # Panics
/// When it is not so after [`HANG`].
#[expect(clippy::disallowed_methods, reason = "a real node runs on real time")]
pub async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let began = Instant::now();
    while !is_so().await {
        assert!(began.elapsed() < HANG, "not within {HANG:?}: {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Runs `work` until it is done, or until this process has been awake for `limit` meanwhile: then `None`.
#[expect(clippy::disallowed_methods, reason = "a real node runs on real time")]
pub async fn within_awake<T>(limit: Duration, work: impl Future<Output = T>) -> Option<T> {
    let waiting = async {
        let mut awake = Duration::ZERO;
        while awake < limit {
            tokio::time::sleep(TICK).await;
            // However long it really took.
            awake += TICK;
        }
    };
    tokio::select! {
        biased;
        done = work => Some(done),
        () = waiting => None,
    }
}

/// Lets some time pass, to meet others at one moment or another; never for order.
#[expect(
    clippy::disallowed_methods,
    reason = "a real process runs on real time"
)]
pub async fn pause(time: Duration) {
    tokio::time::sleep(time).await;
}

/// A loopback address, with port 0, that no other test listens on or connects from: a port that was let go is
/// still free when a node comes back to it.
#[must_use]
pub fn private_loopback() -> String {
    static TAKEN: AtomicU8 = AtomicU8::new(0);
    let [.., high, low] = std::process::id().to_be_bytes();
    let count = TAKEN.fetch_add(1, Ordering::Relaxed) % 128;
    format!("127.{}.{high}.{low}:0", 100 + count)
}

/// An address at which nobody listens, and where no other test ever will.
///
/// # Panics
/// When the machine has no loopback.
#[must_use]
pub fn nowhere() -> SocketAddr {
    let left = TcpListener::bind(private_loopback()).expect("a free port");
    left.local_addr().expect("a bound socket has an address")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_never_ends_is_given_up_and_what_ends_is_not() {
        let never = std::future::pending::<()>();
        assert_eq!(within_awake(TICK * 3, never).await, None);
        assert_eq!(within_awake(TICK * 3, async { 7 }).await, Some(7));
    }

    #[tokio::test]
    #[expect(clippy::disallowed_methods, reason = "plays a machine that stalls")]
    async fn a_stall_counts_as_one_tick() {
        let stalled = async {
            std::thread::sleep(TICK * 20);
            tokio::time::sleep(TICK).await;
        };
        assert_eq!(within_awake(TICK * 10, stalled).await, Some(()));
    }
}
