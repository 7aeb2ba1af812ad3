//! Placements of views that somebody still uses, each prepared once.
//!
//! ```text
//! view A ─► view B ─► view A        the placement of A is still among the past ones: it is used again
//! a thousand nodes of a simulator   see the same dozens of views: each is prepared once for all of them
//! ```
//!
//! Shape: found by digest, which is equal exactly when placement is. Holds nothing alive itself.
//! Units: placements. Errors: none. Bounds: as many as are in use, and as many again before the others are forgotten.

use std::{
    collections::BTreeMap,
    sync::{Arc, Weak},
};

use kvproto::{View, ViewDigest, placement::Placement};
use parking_lot::Mutex;

/// Entries below which nothing is forgotten.
const LEAST_KEPT: usize = 16;

/// The placements that are in use; see the module's page.
#[derive(Debug, Default)]
pub struct Placements(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    prepared: BTreeMap<ViewDigest, Weak<Placement>>,
    /// When there are more, those that nobody uses are forgotten.
    most: usize,
}

impl Placements {
    /// The placement of `view`, whose digest this is.
    #[must_use]
    pub fn of(&self, view: &View, digest: ViewDigest) -> Arc<Placement> {
        let mut known = self.0.lock();
        if let Some(placement) = known.prepared.get(&digest).and_then(Weak::upgrade) {
            return placement;
        }
        let placement = Arc::new(Placement::new(view));
        if known.prepared.len() >= known.most {
            known
                .prepared
                .retain(|_, placement| placement.strong_count() > 0);
            known.most = (2 * known.prepared.len()).max(LEAST_KEPT);
        }
        known.prepared.insert(digest, Arc::downgrade(&placement));
        placement
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::tests::member;

    fn view(weight: u32) -> View {
        View::new([member("a", weight), member("b", 1)])
    }

    fn of(placements: &Placements, view: &View) -> Arc<Placement> {
        placements.of(view, view.digest())
    }

    #[test]
    fn a_view_is_prepared_once_while_somebody_uses_it() {
        let placements = Placements::default();
        let one = of(&placements, &view(1));
        assert!(Arc::ptr_eq(&one, &of(&placements, &view(1))));
        assert!(!Arc::ptr_eq(&one, &of(&placements, &view(2))));
        drop(one);
        assert_eq!(of(&placements, &view(1)).len(), 2);
    }

    #[test]
    fn what_nobody_uses_is_forgotten() {
        let placements = Placements::default();
        let used = of(&placements, &view(1));
        for weight in 2..1000 {
            drop(of(&placements, &view(weight)));
        }
        let kept = placements.0.lock().prepared.len();
        assert!(kept <= 2 * LEAST_KEPT, "{kept}");
        assert!(Arc::ptr_eq(&used, &of(&placements, &view(1))));
    }
}
