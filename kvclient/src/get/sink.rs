//! Where the bytes of an answer go: into the caller's memory, summed page by page on the way.
//!
//! ```text
//! block   │ page 0, 64 KiB │ page 1 │ … │
//! pieces  │ a │ b          │   c        │ …     bytes land right in their piece
//! sums      └ hashed fragment by fragment, each in the moment it is whole: its bytes are still in the cache
//! ```
//!
//! Both paths write through this: the lane reads from its socket right into [`Sink::room`], the same-host path
//! copies there from shared memory. A page that lies in one piece is hashed in one go; only a page that is
//! split between pieces goes through the slower streaming hasher.
//!
//! Units: bytes.
//! Errors: [`FieldError`] when a block is longer than its destination.

use bytes::Bytes;
use kvproto::{
    FieldError,
    checksum::{Landing, PAGE_BYTES, PageSummer, page_sum},
};

/// Where the bytes of an answer go. `slot` counts the objects asked for; one block at a time.
pub(crate) trait Sink {
    /// A block begins; refused when it does not fit.
    fn open(&mut self, slot: usize, length_bytes: usize) -> Result<(), FieldError>;
    /// Where its next bytes belong: at least one while the block is not whole, perhaps fewer than are left.
    fn room(&mut self, slot: usize) -> &mut [u8];
    /// So many bytes have been put there.
    fn landed(&mut self, slot: usize, bytes: usize);
    /// A whole page has been put there, its sum made on the way; all before it has landed.
    fn landed_page(&mut self, slot: usize, bytes: usize, sum: u64);
    /// It is whole: the sums of its pages.
    fn close(&mut self, slot: usize) -> Vec<u64>;
    /// What lies there is not the block: nobody shall take it for one.
    fn spoil(&mut self, slot: usize);
}

/// The caller's memory for one block.
pub(crate) trait Destination {
    /// Its piece `i`; `None` behind the last.
    fn piece(&mut self, i: usize) -> Option<&mut [u8]>;

    /// How much its pieces hold together.
    fn room_bytes(&self) -> usize;
}

impl Destination for &mut [u8] {
    fn piece(&mut self, i: usize) -> Option<&mut [u8]> {
        (i == 0).then_some(self)
    }

    fn room_bytes(&self) -> usize {
        self.len()
    }
}

impl Destination for Vec<&mut [u8]> {
    fn piece(&mut self, i: usize) -> Option<&mut [u8]> {
        self.get_mut(i).map(|piece| &mut **piece)
    }

    fn room_bytes(&self) -> usize {
        self.iter().map(|piece| piece.len()).sum()
    }
}

/// The caller's memory for the blocks of one call.
pub(crate) struct Destinations<'a, T> {
    destinations: &'a mut [T],
    at: Cursor,
}

/// How far the open block has come.
#[derive(Default)]
struct Cursor {
    length_bytes: usize,
    /// Bytes of the block that are hashed.
    block_at: usize,
    piece: usize,
    /// Bytes of the piece that have landed, and those of them that are hashed.
    landed_at: usize,
    hashed_at: usize,
    /// A page of which a part is hashed.
    split: PageSummer,
    sums: Vec<u64>,
}

impl<'a, T: Destination> Destinations<'a, T> {
    pub(crate) fn new(destinations: &'a mut [T]) -> Self {
        Self {
            destinations,
            at: Cursor::default(),
        }
    }
}

impl Cursor {
    /// Hashes what is whole of `piece`, in which bytes have landed up to `landed_at`.
    fn hash(&mut self, piece: &[u8]) {
        while self.block_at < self.length_bytes {
            let page_start = self.block_at - self.block_at % PAGE_BYTES;
            let page_end = (page_start + PAGE_BYTES).min(self.length_bytes);
            let end = piece.len().min(self.hashed_at + page_end - self.block_at);
            if self.landed_at < end || end == self.hashed_at {
                return;
            }
            let fragment = &piece[self.hashed_at..end];
            self.hashed_at = end;
            let (start, block_at) = (self.block_at, self.block_at + fragment.len());
            self.block_at = block_at;
            if start == page_start && block_at == page_end {
                self.sums.push(page_sum(fragment));
                continue;
            }
            self.split.update(fragment);
            if block_at == page_end {
                self.sums
                    .append(&mut std::mem::take(&mut self.split).finish());
            }
        }
    }
}

impl<T: Destination> Sink for Destinations<'_, T> {
    fn open(&mut self, slot: usize, length_bytes: usize) -> Result<(), FieldError> {
        let room = self.destinations[slot].room_bytes();
        if room < length_bytes {
            return Err(FieldError::new(
                "buffers",
                format!("buffer {slot} holds {room} bytes, the block has {length_bytes}"),
            ));
        }
        self.at = Cursor {
            length_bytes,
            sums: Vec::with_capacity(length_bytes.div_ceil(PAGE_BYTES)),
            ..Cursor::default()
        };
        Ok(())
    }

    fn room(&mut self, slot: usize) -> &mut [u8] {
        let (destination, at) = (&mut self.destinations[slot], &mut self.at);
        // A full piece is hashed as far as it belongs to the block: the next one begins.
        while destination
            .piece(at.piece)
            .is_some_and(|piece| piece.len() == at.landed_at)
        {
            (at.piece, at.landed_at, at.hashed_at) = (at.piece + 1, 0, 0);
        }
        match destination.piece(at.piece) {
            Some(piece) => &mut piece[at.landed_at..],
            None => &mut [],
        }
    }

    fn landed(&mut self, slot: usize, bytes: usize) {
        self.at.landed_at += bytes;
        if let Some(piece) = self.destinations[slot].piece(self.at.piece) {
            self.at.hash(piece);
        }
    }

    fn landed_page(&mut self, _: usize, bytes: usize, sum: u64) {
        let at = &mut self.at;
        at.landed_at += bytes;
        at.hashed_at = at.landed_at;
        at.block_at += bytes;
        at.sums.push(sum);
    }

    fn close(&mut self, _: usize) -> Vec<u64> {
        std::mem::take(&mut self.at).sums
    }

    fn spoil(&mut self, slot: usize) {
        let destination = &mut self.destinations[slot];
        let mut i = 0;
        while let Some(piece) = destination.piece(i) {
            piece.fill(0);
            i += 1;
        }
    }
}

/// The objects of a sink from `first` on, for a call that asks for those alone.
pub(crate) struct Behind<'a, S> {
    pub(crate) sink: &'a mut S,
    pub(crate) first: usize,
}

impl<S: Sink> Sink for Behind<'_, S> {
    fn open(&mut self, slot: usize, length_bytes: usize) -> Result<(), FieldError> {
        self.sink.open(self.first + slot, length_bytes)
    }

    fn room(&mut self, slot: usize) -> &mut [u8] {
        self.sink.room(self.first + slot)
    }

    fn landed(&mut self, slot: usize, bytes: usize) {
        self.sink.landed(self.first + slot, bytes);
    }

    fn landed_page(&mut self, slot: usize, bytes: usize, sum: u64) {
        self.sink.landed_page(self.first + slot, bytes, sum);
    }

    fn close(&mut self, slot: usize) -> Vec<u64> {
        self.sink.close(self.first + slot)
    }

    fn spoil(&mut self, slot: usize) {
        self.sink.spoil(self.first + slot);
    }
}

/// Buffers made for blocks whose length nobody knew.
#[derive(Default)]
pub(crate) struct Kept {
    pub(crate) blocks: Vec<Option<Bytes>>,
    block: Vec<u8>,
    landing: Landing,
}

impl Kept {
    /// Room for `count` blocks.
    pub(crate) fn new(count: usize) -> Self {
        Self {
            blocks: vec![None; count],
            ..Self::default()
        }
    }
}

impl Sink for Kept {
    fn open(&mut self, _: usize, length_bytes: usize) -> Result<(), FieldError> {
        self.block = vec![0; length_bytes];
        self.landing = Landing::new(length_bytes as u64);
        Ok(())
    }

    fn room(&mut self, _: usize) -> &mut [u8] {
        &mut self.block[self.landing.landed_bytes()..]
    }

    fn landed(&mut self, _: usize, bytes: usize) {
        self.landing.landed(bytes, &self.block);
    }

    fn landed_page(&mut self, _: usize, bytes: usize, sum: u64) {
        self.landing.landed_page(bytes, sum);
    }

    fn close(&mut self, slot: usize) -> Vec<u64> {
        let sums = std::mem::take(&mut self.landing).finish(&self.block);
        self.blocks[slot] = Some(std::mem::take(&mut self.block).into());
        sums
    }

    fn spoil(&mut self, slot: usize) {
        self.blocks[slot] = None;
    }
}

#[cfg(test)]
mod tests {
    use proptest::{
        collection::vec,
        prelude::{any, prop_assert, prop_assert_eq, proptest},
    };

    use super::*;
    use kvproto::checksum::page_sums;

    proptest! {
        #[test]
        fn any_pieces_and_any_landings_give_the_block_and_its_sums(
            length in 1_usize..4 * PAGE_BYTES,
            cuts in vec(0..4 * PAGE_BYTES, 0..6),
            steps in vec(1_usize..2 * PAGE_BYTES, 1..5),
            spare in 0_usize..3,
            are_summed in any::<bool>(),
        ) {
            let block: Vec<u8> = (0..length).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
            let mut memory = vec![0xee; length + spare];
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(length)).collect();
            cuts.sort_unstable();
            let (mut pieces, mut rest, mut before) = (Vec::new(), &mut memory[..], 0);
            for cut in cuts {
                let (piece, later) = rest.split_at_mut(cut - before);
                pieces.push(piece);
                (rest, before) = (later, cut);
            }
            pieces.push(rest);

            let mut destinations = [pieces];
            let mut sink = Destinations::new(&mut destinations);
            sink.open(0, length).unwrap();
            let (mut at, mut steps) = (0, steps.iter().cycle());
            while at < length {
                let room = sink.room(0);
                prop_assert!(!room.is_empty());
                let page = (length - at).min(PAGE_BYTES);
                let is_page = are_summed && at.is_multiple_of(PAGE_BYTES) && room.len() >= page;
                let take = match is_page {
                    true => page,
                    false => room.len().min(length - at).min(*steps.next().unwrap()),
                };
                let bytes = &block[at..at + take];
                room[..take].copy_from_slice(bytes);
                match is_page {
                    true => sink.landed_page(0, take, page_sum(bytes)),
                    false => sink.landed(0, take),
                }
                at += take;
            }
            prop_assert_eq!(sink.close(0), page_sums(&block));
            prop_assert!(memory[..length] == block[..]);
            prop_assert!(memory[length..].iter().all(|byte| *byte == 0xee));
        }
    }

    #[test]
    fn a_block_longer_than_its_pieces_is_refused() {
        let (mut a, mut b) = ([0; 10], [0; 20]);
        let mut destinations = [vec![&mut a[..], &mut b[..]]];
        let mut sink = Destinations::new(&mut destinations);
        assert!(sink.open(0, 30).is_ok());
        assert!(sink.open(0, 31).is_err());
    }
}
