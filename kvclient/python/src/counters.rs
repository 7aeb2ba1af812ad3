//! What a cache has done, counted where it is known.
//!
//! Hits and bytes count what was verified here, after the last hop: an engine's own counters say what was promised.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)+) => {
        /// Counters since the start.
        #[derive(Debug, Default)]
        pub struct Counters {
            $($(#[$doc])* pub $name: Count,)+
        }

        impl Counters {
            /// Each with its name.
            #[must_use]
            pub fn list(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name.get()),)+]
            }
        }
    };
}

counters! {
    /// Lookups put to the node.
    lookups_asked,
    /// Of those, answered in time.
    lookups_answered,
    /// Blocks that lookups promised.
    lookup_blocks,
    /// Lookups answered 0 because the node was away or its answer an error.
    lookups_away,
    /// Lookups answered 0 because the table was full.
    lookups_full,
    /// Lookups cut short by the miss list, so that a block was not asked for.
    lookups_cut,
    /// Leases renewed.
    leases_renewed,
    /// Blocks that were loaded and verified.
    loaded_blocks,
    /// Bytes of those.
    loaded_bytes,
    /// Blocks whose load failed.
    load_failed_blocks,
    /// Of those, whose bytes did not match their sums; the node was told to forget them.
    corrupt_blocks,
    /// Blocks the node has taken.
    saved_blocks,
    /// Bytes of those.
    saved_bytes,
    /// Blocks not sent because the node had them.
    present_blocks,
    /// Blocks whose save was dropped.
    save_failed_blocks,
    /// Jobs that found the queue full.
    jobs_refused,
    /// Times the namespace was opened.
    opened,
    /// Times the node was lost.
    lost,
}

/// A counter.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    /// Counts `by` more.
    pub fn add(&self, by: u64) {
        self.0.fetch_add(by, Ordering::Relaxed);
    }

    /// So far.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
