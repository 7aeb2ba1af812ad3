//! Large requests, cut into calls of bounded size.
//!
//! ```text
//! blocks 0..n ──cut──► [0..a) [a..b) [b..n)      each at most MAX_CALL_BLOCKS and MAX_CALL_BYTES
//!                         └──────┴── at most `parallel` at once, answers in order
//! ```
//!
//! Units: blocks, bytes.
//! Errors: the first call that fails fails the request; the others are dropped, which resets their streams.
//! Why bounded: a call is repeated as a whole, and holds one connection's attention as long as it lasts.

use std::{future::Future, ops::Range};

use futures_util::future::try_join_all;
use tokio::sync::Semaphore;

/// Most stored objects (blocks times parts) in one get or put.
pub(crate) const MAX_CALL_BLOCKS: usize = 512;
/// Most payload bytes in one get or put, where they are known beforehand; a larger block goes alone.
pub(crate) const MAX_CALL_BYTES: u64 = 64 << 20;

/// Cuts items of `sizes` bytes into pieces of at most so many items and bytes; a single item always fits.
pub(crate) fn cut(
    sizes: impl Iterator<Item = u64>,
    max_items: usize,
    max_bytes: u64,
) -> Vec<Range<usize>> {
    let mut ranges = Vec::with_capacity(1);
    let (mut start, mut end, mut bytes) = (0, 0, 0_u64);
    for size in sizes {
        if end > start && (end - start >= max_items || bytes.saturating_add(size) > max_bytes) {
            ranges.push(start..end);
            (start, bytes) = (end, 0);
        }
        end += 1;
        bytes = bytes.saturating_add(size);
    }
    if end > start {
        ranges.push(start..end);
    }
    ranges
}

/// Runs `calls`, at most `parallel` of them at once, and joins their answers in order.
pub(crate) async fn join<T, E>(
    calls: Vec<impl Future<Output = Result<Vec<T>, E>>>,
    parallel: usize,
) -> Result<Vec<T>, E> {
    let lanes = Semaphore::new(parallel.max(1));
    let waiting = calls.into_iter().map(|call| async {
        let _lane = lanes.acquire().await;
        call.await
    });
    let answers = try_join_all(waiting).await?;
    Ok(answers.into_iter().flatten().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_in_exactly_one_piece_and_pieces_keep_the_limits() {
        let sizes = [1 << 20, 70 << 20, 3 << 20, 63 << 20, 1, 1, 1, 1];
        let ranges = cut(sizes.iter().copied(), 3, MAX_CALL_BYTES);
        assert_eq!(ranges, [0..1, 1..2, 2..3, 3..6, 6..8]);
        assert_eq!(cut(std::iter::empty(), 3, MAX_CALL_BYTES), []);
    }

    #[tokio::test]
    async fn answers_come_in_order_and_lanes_are_kept() {
        let now = std::cell::Cell::new(0);
        let call = |i: usize| {
            let now = &now;
            async move {
                now.set(now.get() + 1);
                assert!(now.get() <= 2);
                for _ in 0..(10 - i) {
                    tokio::task::yield_now().await;
                }
                now.set(now.get() - 1);
                Ok::<_, ()>(vec![i])
            }
        };
        let answer = join((0..6).map(call).collect(), 2).await;
        assert_eq!(answer, Ok(vec![0, 1, 2, 3, 4, 5]));
    }
}
