//! What vLLM's connector counts, for vLLM's log and for Prometheus.
//!
//! vLLM's own external-hit counters count when blocks are allocated, before anything was loaded; these count after the last
//! copy, and only what was verified. Kept per process and handed over as differences.

use std::collections::BTreeMap;

/// The counters and what each counts.
pub const COUNTERS: [(&str, &str); 13] = [
    ("lookups", "Lookups answered"),
    ("lookup_blocks", "Blocks that lookups found and leased"),
    ("lookups_given_up", "Lookups given up after too many steps"),
    ("loads", "Loads ended"),
    (
        "loaded_blocks",
        "Blocks loaded and verified, counted after the last copy",
    ),
    ("loaded_bytes", "Bytes loaded and verified"),
    (
        "load_seconds",
        "Seconds from the start to the end of each load, summed",
    ),
    (
        "failed_blocks",
        "Blocks that a lookup promised and a load did not bring; computed instead",
    ),
    ("saves", "Saves ended"),
    ("saved_blocks", "Blocks that the node holds after a save"),
    ("saved_bytes", "Bytes of those blocks"),
    (
        "save_seconds",
        "Seconds from the start to the end of each save, summed",
    ),
    (
        "dropped_blocks",
        "Blocks that a save dropped: node away, slow or full",
    ),
];

/// Counts since they were last taken.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Counts(BTreeMap<&'static str, f64>);

impl Counts {
    /// Counts `by` more; exact up to 2^53.
    pub fn add(&mut self, name: &'static str, by: f64) {
        debug_assert!(COUNTERS.iter().any(|(known, _)| *known == name), "{name}");
        *self.0.entry(name).or_default() += by;
    }

    /// What was counted, once.
    #[must_use]
    pub fn take(&mut self) -> BTreeMap<&'static str, f64> {
        std::mem::take(&mut self.0)
    }
}
