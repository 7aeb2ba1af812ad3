//! The node's segments as mapped here: each for as long as it is read from.
//!
//! ```text
//! named by an answer ─► mapped ─ read ─ read ─┬─ 30 s without ─► unmapped; mapped anew when it is named again
//!                                             └─ too many, the longest unread ─┘
//! ```
//!
//! Units: segments, durations.
//! Errors: none.
//! Why they are let go: a mapping keeps the memory of a segment alive that the node has long replaced. Whoever
//! reads from one has a share in it, so it goes with its last reader.

use std::{collections::HashMap, sync::Arc, time::Duration};

use crate::clock::Tick;

/// A mapping that was not asked for as long goes.
pub(super) const UNREAD: Duration = Duration::from_secs(30);

/// Most mappings between calls; the kernel lets a process have some 65,000, and a segment takes two.
const MOST: usize = 4096;

/// Calls look for mappings to let go of so often.
const SWEEP: Duration = Duration::from_secs(1);

/// Mappings by the name of their segment; `T` is one.
pub(super) struct Segments<T> {
    known: HashMap<u32, Mapping<T>>,
    swept: Tick,
}

/// What one call reads from: a share in each mapping, in the order of their names.
pub(super) struct Mapped<T>(Vec<(u32, Arc<T>)>);

impl<T> Mapped<T> {
    pub(super) fn new(mut mappings: Vec<(u32, Arc<T>)>) -> Self {
        mappings.sort_unstable_by_key(|(name, _)| *name);
        Self(mappings)
    }

    pub(super) fn get(&self, name: u32) -> Option<&T> {
        let at = self.0.binary_search_by_key(&name, |(name, _)| *name).ok()?;
        Some(&self.0[at].1)
    }
}

struct Mapping<T> {
    memory: Arc<T>,
    used: Tick,
}

impl<T> Default for Segments<T> {
    fn default() -> Self {
        Self {
            known: HashMap::new(),
            swept: Tick::default(),
        }
    }
}

impl<T> Segments<T> {
    pub(super) fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// A mapping that is about to be read from.
    pub(super) fn find(&mut self, name: u32, now: Tick) -> Option<Arc<T>> {
        let mapping = self.known.get_mut(&name)?;
        mapping.used = now;
        Some(mapping.memory.clone())
    }

    pub(super) fn insert(&mut self, name: u32, memory: Arc<T>, now: Tick) {
        if self.known.len() >= MOST && !self.known.contains_key(&name) {
            let oldest = self.known.iter().min_by_key(|(_, mapping)| mapping.used);
            if let Some(name) = oldest.map(|(name, _)| *name) {
                self.known.remove(&name);
            }
        }
        self.known.insert(name, Mapping { memory, used: now });
    }

    /// Lets go of those that nobody asked for lately, if that was not done just now.
    pub(super) fn sweep(&mut self, now: Tick) {
        if now.since(self.swept) < SWEEP {
            return;
        }
        self.swept = now;
        self.known
            .retain(|_, mapping| now.since(mapping.used) < UNREAD);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Tick {
        Tick(Duration::from_secs(seconds))
    }

    #[test]
    fn a_mapping_unread_for_long_goes_with_its_last_reader() {
        let mut segments = Segments::default();
        let memory = Arc::new(());
        segments.insert(1, memory.clone(), at(0));
        segments.insert(2, Arc::new(()), at(0));
        let reader = segments.find(1, at(1)).expect("mapped");
        assert!(segments.find(2, at(20)).is_some());
        segments.sweep(at(40));
        assert!(segments.find(1, at(40)).is_none());
        assert!(segments.find(2, at(40)).is_some());
        assert_eq!(Arc::strong_count(&memory), 2, "the reader has it still");
        drop(reader);
        assert_eq!(Arc::strong_count(&memory), 1);
        segments.sweep(at(90));
        assert!(segments.is_empty());
    }

    #[test]
    fn what_a_call_reads_from_is_found_by_name() {
        let mapped = Mapped::new([9, 2, 5].map(|name| (name, Arc::new(name))).into());
        for name in 0..12 {
            let is_there = [2, 5, 9].contains(&name);
            assert_eq!(mapped.get(name), is_there.then_some(&name));
        }
    }

    #[test]
    fn there_are_never_more_than_fit_and_the_longest_unread_goes_first() {
        let mut segments = Segments::default();
        for name in 0..MOST as u32 {
            segments.insert(name, Arc::new(()), at(1));
        }
        assert!(segments.find(0, at(2)).is_some());
        segments.insert(7, Arc::new(()), at(2));
        for name in 0..MOST as u32 {
            if ![0, 7, 9].contains(&name) {
                segments.find(name, at(2));
            }
        }
        segments.insert(u32::MAX, Arc::new(()), at(3));
        assert!(segments.find(9, at(3)).is_none());
        assert_eq!(segments.known.len(), MOST);
    }
}
