//! What was said about the cluster over one connection, so that it is not said with every answer.
//!
//! A caller that differs gets the members with the next answer, and then once in [`AGAIN`] answers until it does not
//! differ any more: an answer may have been lost, and a caller that keeps no view (a stock client sends digest 0) need
//! not read a thousand members with each of its blocks.

use std::sync::atomic::{AtomicU64, Ordering};

use kvproto::ViewDigest;

/// After so many answers to a caller that still differs it is told once more.
pub const AGAIN: u64 = 64;

/// What one connection was told; see the module's page.
#[derive(Debug, Default)]
pub struct Told {
    /// Of the caller's view and this node's, as it was told last.
    difference: AtomicU64,
    answers: AtomicU64,
}

impl Told {
    /// Whether nothing needs to be said: the two agree, or the caller was told of this difference.
    pub fn again(&self, callers: ViewDigest, here: ViewDigest) -> bool {
        if callers == here {
            return true;
        }
        // Views with equal differences by chance cost one answer in AGAIN, not the news.
        let difference = callers.0.rotate_left(1) ^ here.0;
        if self.difference.swap(difference, Ordering::Relaxed) != difference {
            self.answers.store(0, Ordering::Relaxed);
            return false;
        }
        let answers = self.answers.fetch_add(1, Ordering::Relaxed) + 1;
        !answers.is_multiple_of(AGAIN)
    }
}

#[cfg(test)]
mod tests {
    use super::{AGAIN, Told, ViewDigest};

    #[test]
    fn a_caller_is_told_once_and_then_now_and_again() {
        let told = Told::default();
        let say = || !told.again(ViewDigest(0), ViewDigest(7));
        assert!(say());
        let repeats = (1..=2 * AGAIN).filter(|_| say()).count();
        assert_eq!(repeats, 2);
    }

    #[test]
    fn a_change_is_told_at_once_and_agreement_says_nothing() {
        let told = Told::default();
        assert!(told.again(ViewDigest(7), ViewDigest(7)));
        assert!(!told.again(ViewDigest(7), ViewDigest(8)));
        assert!(told.again(ViewDigest(7), ViewDigest(8)));
        assert!(!told.again(ViewDigest(7), ViewDigest(9)));
        assert!(told.again(ViewDigest(9), ViewDigest(9)));
    }
}
