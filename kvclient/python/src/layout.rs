//! Where an engine's blocks lie.
//!
//! ```text
//! layer 0   address ─► │ block 0 │ … │ block 1 │ … │ block 2 │      each block_bytes, stride_bytes apart
//! layer 1   address ─► │ block 0 │ … │ block 1 │ … │ block 2 │
//!
//! block 1 in the store:  │ layer 0's block 1 │ layer 1's block 1 │
//! ```
//!
//! Units: bytes; addresses are this process's own.
//! Errors: [`LayoutError`] for layers that cannot be copied block by block.
//! Why overlaps are refused: two layers that share bytes would be two writers of one place. Layers whose blocks are
//! interleaved (one allocation, block by block) are fine: equal strides, and no byte in two layers.

use std::ops::Range;

/// Most layers of one layout: tensors of a model, of all its layer groups.
pub const MAX_LAYERS: usize = 4096;

/// One layer's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Of block 0.
    pub address: usize,
    /// How many blocks.
    pub blocks: usize,
    /// From one block to the next.
    pub stride_bytes: usize,
    /// Of one block in this layer.
    pub block_bytes: usize,
}

/// Why layers make no layout.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// Too many.
    #[error("{count} layers; at most {MAX_LAYERS} are allowed")]
    TooMany {
        /// Given.
        count: usize,
    },
    /// A layer without bytes, at address 0, with blocks that overlap each other or end beyond the address space.
    #[error("layer {layer}: {problem}")]
    Layer {
        /// Which.
        layer: usize,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// Layers of different length.
    #[error("layer {layer} has {blocks} blocks, layer 0 has {expected}")]
    Blocks {
        /// Which.
        layer: usize,
        /// Its blocks.
        blocks: usize,
        /// Those of layer 0.
        expected: usize,
    },
    /// Two layers share bytes.
    #[error("layers {one} and {other} overlap, or are interleaved with different strides")]
    Overlap {
        /// The one.
        one: usize,
        /// The other.
        other: usize,
    },
    /// A block id that is not there.
    #[error("block {block} is not one of the engine's {blocks}")]
    Block {
        /// Asked for.
        block: u32,
        /// There are.
        blocks: usize,
    },
}

/// Where an engine's blocks lie: all layers, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    layers: Vec<Layer>,
    blocks: usize,
    block_bytes: usize,
}

impl Layout {
    /// The layout of these layers, at least one.
    ///
    /// # Errors
    /// When they cannot be copied block by block.
    pub fn new(layers: Vec<Layer>) -> Result<Self, LayoutError> {
        if layers.len() > MAX_LAYERS {
            return Err(LayoutError::TooMany {
                count: layers.len(),
            });
        }
        let expected = layers.first().map_or(0, |layer| layer.blocks);
        let mut block_bytes = 0;
        for (i, layer) in layers.iter().enumerate() {
            layer
                .check()
                .map_err(|problem| LayoutError::Layer { layer: i, problem })?;
            if layer.blocks != expected {
                return Err(LayoutError::Blocks {
                    layer: i,
                    blocks: layer.blocks,
                    expected,
                });
            }
            block_bytes += layer.block_bytes;
        }
        if layers.is_empty() {
            return Err(LayoutError::Layer {
                layer: 0,
                problem: "is missing; name at least one",
            });
        }
        // By address, each needs comparing only with those that begin before its end.
        let mut order: Vec<usize> = (0..layers.len()).collect();
        order.sort_by_key(|&i| layers[i].address);
        for (at, &one) in order.iter().enumerate() {
            for &other in &order[at + 1..] {
                if layers[other].address >= layers[one].span().end {
                    break;
                }
                if !layers[one].interleaves(&layers[other]) {
                    return Err(LayoutError::Overlap { one, other });
                }
            }
        }
        Ok(Self {
            layers,
            blocks: expected,
            block_bytes,
        })
    }

    /// Its layers.
    #[must_use]
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// Blocks of the engine.
    #[must_use]
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Bytes of one block, all layers.
    #[must_use]
    pub fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    /// Whether there is such a block.
    ///
    /// # Errors
    /// When there is not.
    pub fn check(&self, block: u32) -> Result<(), LayoutError> {
        let blocks = self.blocks;
        ((block as usize) < blocks)
            .then_some(())
            .ok_or(LayoutError::Block { block, blocks })
    }

    /// Where the bytes of `block` lie, in the order of the layers; neighbours are one piece.
    ///
    /// # Errors
    /// When there is no such block.
    pub fn pieces(&self, block: u32) -> Result<Vec<Range<usize>>, LayoutError> {
        self.check(block)?;
        let index = block as usize;
        let mut pieces: Vec<Range<usize>> = Vec::with_capacity(self.layers.len());
        for layer in &self.layers {
            let start = layer.address + index * layer.stride_bytes;
            let end = start + layer.block_bytes;
            match pieces.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => pieces.push(start..end),
            }
        }
        Ok(pieces)
    }
}

impl Layer {
    fn check(&self) -> Result<(), &'static str> {
        if self.address == 0 {
            return Err("is at address 0");
        }
        if self.blocks == 0 || self.block_bytes == 0 {
            return Err("has no bytes");
        }
        if u32::try_from(self.blocks).is_err() {
            return Err("has more blocks than 32 bits count");
        }
        if self.stride_bytes < self.block_bytes && self.blocks > 1 {
            return Err("has blocks that overlap: its stride is shorter than a block");
        }
        // Slices may not be longer than isize::MAX, nor end beyond the address space.
        (self.blocks - 1)
            .checked_mul(self.stride_bytes)
            .and_then(|offset| offset.checked_add(self.block_bytes))
            .filter(|bytes| isize::try_from(*bytes).is_ok())
            .and_then(|bytes| self.address.checked_add(bytes))
            .map(drop)
            .ok_or("ends beyond the address space")
    }

    /// From its first byte to its last.
    fn span(&self) -> Range<usize> {
        self.address..self.address + (self.blocks - 1) * self.stride_bytes + self.block_bytes
    }

    /// Whether `later`, which begins inside this layer's span, lies wholly between this layer's blocks.
    fn interleaves(&self, later: &Self) -> bool {
        if self.blocks == 1 || self.stride_bytes != later.stride_bytes {
            return false;
        }
        let offset = (later.address - self.address) % self.stride_bytes;
        offset >= self.block_bytes && offset + later.block_bytes <= self.stride_bytes
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::{prop_assert_eq, proptest};

    use super::*;

    fn layer(address: usize, blocks: usize, stride_bytes: usize, block_bytes: usize) -> Layer {
        Layer {
            address,
            blocks,
            stride_bytes,
            block_bytes,
        }
    }

    #[test]
    fn layers_follow_each_other_in_their_order() {
        let layout = Layout::new(vec![layer(9000, 4, 100, 30), layer(1000, 4, 50, 50)]).unwrap();
        assert_eq!((layout.blocks(), layout.block_bytes()), (4, 80));
        assert_eq!(layout.pieces(2).unwrap(), [9200..9230, 1100..1150]);
        let missing = LayoutError::Block {
            block: 4,
            blocks: 4,
        };
        assert_eq!(layout.pieces(4), Err(missing));
    }

    #[test]
    fn neighbouring_layers_of_a_block_are_one_piece() {
        let interleaved = (0..3).map(|i| layer(1000 + i * 10, 5, 30, 10)).collect();
        let layout = Layout::new(interleaved).unwrap();
        assert_eq!(layout.pieces(1).unwrap().as_slice(), &[1030..1060; 1]);
    }

    #[test]
    fn what_cannot_be_copied_is_refused() {
        let refused = |layers| Layout::new(layers).unwrap_err().to_string();
        assert!(refused(vec![]).contains("is missing"));
        assert!(refused(vec![layer(0, 1, 8, 8)]).contains("address 0"));
        assert!(refused(vec![layer(8, 0, 8, 8)]).contains("no bytes"));
        assert!(refused(vec![layer(8, 2, 7, 8)]).contains("stride"));
        assert!(refused(vec![layer(usize::MAX - 8, 2, 8, 8)]).contains("address space"));
        assert!(refused(vec![layer(8, 3, usize::MAX / 2, 8)]).contains("address space"));
        assert!(
            refused(vec![layer(8, 2, 8, 8), layer(800, 3, 8, 8)]).contains("layer 1 has 3 blocks")
        );
        assert!(
            refused(vec![layer(100, 2, 8, 8), layer(107, 2, 8, 8)]).contains("0 and 1 overlap")
        );
        assert!(
            refused(vec![layer(107, 2, 8, 8), layer(100, 2, 8, 8)]).contains("1 and 0 overlap")
        );
    }

    proptest! {
        /// The truth by counting: a layout is accepted only when no byte is in it twice.
        #[test]
        fn no_accepted_layout_has_a_byte_twice(
            blocks in 1usize..5, a in 1usize..60, b in 1usize..60, stride in 1usize..30,
            other in 0usize..4, one_bytes in 1usize..12, two_bytes in 1usize..12,
        ) {
            let layers = vec![layer(a, blocks, stride, one_bytes), layer(b, blocks, stride + other / 3, two_bytes)];
            let Ok(layout) = Layout::new(layers.clone()) else { return Ok(()) };
            let mut seen = HashSet::new();
            for block in 0..blocks as u32 {
                for byte in layout.pieces(block).unwrap().into_iter().flatten() {
                    proptest::prop_assert!(seen.insert(byte), "{layers:?}");
                }
            }
            prop_assert_eq!(seen.len(), blocks * layout.block_bytes());
        }

        /// And none is refused that has no byte twice, where the strides are equal.
        #[test]
        fn a_layout_without_a_shared_byte_is_accepted(
            blocks in 1usize..5, a in 1usize..60, b in 1usize..60, stride in 1usize..30,
            one_bytes in 1usize..12, two_bytes in 1usize..12,
        ) {
            let layers = [layer(a, blocks, stride, one_bytes), layer(b, blocks, stride, two_bytes)];
            if Layout::new(layers.to_vec()).is_ok() { return Ok(()) }
            let mut seen = HashSet::new();
            let mut twice = false;
            for layer in layers {
                for block in 0..layer.blocks {
                    for byte in 0..layer.block_bytes {
                        twice |= !seen.insert(layer.address + block * layer.stride_bytes + byte);
                    }
                }
            }
            proptest::prop_assert!(twice, "{layers:?}");
        }
    }
}
