//! How an engine lays out its paged KV memory.
//!
//! ```text
//!  one layer, KvFirst:   [ K: page 0 │ page 1 │ … ] [ V: page 0 │ page 1 │ … ]     vLLM until 0.25
//!  one layer, PageFirst: [ page 0: K │ V ] [ page 1: K │ V ] …                     FlashInfer
//!  one page, Nhd: [token][head][head_size]        Hnd: [head][token][head_size]
//!  Strided: any distances, so that padded pages, heads outside of pages and the pages of several layers
//!           side by side are layouts too
//! ```
//!
//! vLLM 0.26 and later pack K and V of a head and token side by side: `kv` is 1 and `head_size` counts both.
//! Its six orders (layer, block, head, token: LBHNC, LBNHC, LHBNC, BLHNC, BLNHC, BHLNC) are all `Strided`;
//! latent attention is one head of 576 elements (or 656 bytes). [`KvLayout::pieces`] takes pages as bytes
//! that nobody looks into.
//!
//! Layers are separate tensors or lie one behind the other; either way each is a span of its own for
//! [`crate::device::PagedKv`]. The contiguous block that pages are gathered into has one order, whatever
//! the engine's: `[layer][K, V][token][head][head_size]`, where the tokens are those of the block's pages
//! in turn. So engines of either order can share blocks.
//!
//! Units: bytes for strides and sizes; pages, tokens and heads are counted.
//! Errors: [`LayoutError`] names the field.

/// A field that cannot be, of a layout or a plan.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct LayoutError {
    /// Which field.
    pub field: &'static str,
    /// What is wrong with it.
    pub problem: String,
}

impl LayoutError {
    pub(crate) fn new(field: &'static str, problem: impl Into<String>) -> Self {
        Self {
            field,
            problem: problem.into(),
        }
    }
}

/// The order within a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvOrder {
    /// `[token][head][head_size]`, vLLM's usual one.
    Nhd,
    /// `[head][token][head_size]`.
    Hnd,
}

/// Where K and V lie within a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Arrangement {
    /// `[K, V][page]`: all keys, then all values.
    KvFirst,
    /// `[page][K, V]`: keys and values side by side in each page.
    PageFirst,
    /// At these distances, whatever [`KvLayout::order`] says.
    Strided(KvStrides),
}

/// The shape of an engine's paged KV memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct KvLayout {
    /// Layers that hold KV.
    pub layers: u32,
    /// 2 for keys and values, 1 where one tensor stands for both (multi-head latent attention).
    pub kv: u32,
    /// Pages per layer.
    pub pages: u32,
    /// Tokens per page.
    pub page_tokens: u32,
    /// KV heads of this rank.
    pub heads: u32,
    /// Elements per head.
    pub head_size: u32,
    /// Bytes per element.
    pub dtype_bytes: u32,
    /// The order within a page; of no meaning where strides are given.
    pub order: KvOrder,
    /// Where K and V lie within a layer.
    pub arrangement: Arrangement,
}

/// Distances in bytes between neighbours in one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct KvStrides {
    /// From K to V of the same page.
    pub kv: u64,
    /// From a page to the next, of the same of K and V.
    pub page: u64,
    /// From a token to the next in its page.
    pub token: u64,
    /// From a head to the next at one token.
    pub head: u64,
}

impl KvLayout {
    /// Pages of bytes that nobody looks into: `piece_bytes` of each page in each layer, `stride_bytes` from page
    /// to page. A block is then its pages' pieces, layer by layer, as they are.
    pub fn pieces(layers: u32, pages: u32, stride_bytes: u64, piece_bytes: u32) -> Self {
        Self {
            layers,
            kv: 1,
            pages,
            page_tokens: 1,
            heads: 1,
            head_size: piece_bytes,
            dtype_bytes: 1,
            order: KvOrder::Nhd,
            arrangement: Arrangement::Strided(KvStrides {
                kv: 0,
                page: stride_bytes,
                token: u64::from(piece_bytes),
                head: u64::from(piece_bytes),
            }),
        }
    }

    /// Checks every field and that all sizes fit.
    ///
    /// # Errors
    /// Names the field: a zero, a `kv` other than 1 or 2, strides by which bytes would be those of two rows,
    /// or sizes beyond what a device can address.
    pub fn validate(&self) -> Result<(), LayoutError> {
        let counts = [
            ("layers", self.layers),
            ("pages", self.pages),
            ("page_tokens", self.page_tokens),
            ("heads", self.heads),
            ("head_size", self.head_size),
            ("dtype_bytes", self.dtype_bytes),
        ];
        for (field, count) in counts {
            if count == 0 {
                return Err(LayoutError::new(field, "must not be zero"));
            }
        }
        if !(1..=2).contains(&self.kv) {
            return Err(LayoutError::new(
                "kv",
                format!("is {}, must be 1 or 2", self.kv),
            ));
        }
        let planes = u64::from(self.layers) * u64::from(self.kv);
        if planes > MAX_GRID {
            let problem = format!("{planes} planes of K and V, at most {MAX_GRID}");
            return Err(LayoutError::new("layers", problem));
        }
        let product = |factors: &[u32]| {
            factors.iter().try_fold(1_u64, |product, factor| {
                product.checked_mul((*factor).into())
            })
        };
        let page = product(&[
            self.page_tokens,
            self.heads,
            self.head_size,
            self.dtype_bytes,
        ]);
        if page.is_none_or(|bytes| bytes > i32::MAX as u64) {
            return Err(LayoutError::new(
                "page_tokens",
                "a page of one layer is longer than 2 GiB",
            ));
        }
        let all =
            page.and_then(|bytes| bytes.checked_mul(product(&[self.pages, self.layers, self.kv])?));
        if all.is_none_or(|bytes| bytes > i64::MAX as u64) {
            return Err(LayoutError::new(
                "pages",
                "all layers together exceed the address space",
            ));
        }
        if let Arrangement::Strided(strides) = self.arrangement {
            self.validate_strides(&strides)?;
        }
        Ok(())
    }

    /// Each dimension must step over all that lies within it, as dimensions of a tensor do; then no byte is
    /// two rows'.
    fn validate_strides(&self, strides: &KvStrides) -> Result<(), LayoutError> {
        let mut steps: Vec<(u64, u64)> = self
            .steps(strides)
            .into_iter()
            .filter(|(count, _)| *count > 1)
            .map(|(count, stride)| (stride, count))
            .collect();
        steps.sort_unstable();
        let mut extent = self.row_bytes();
        for (stride, count) in steps {
            if stride < extent {
                let problem = format!("{count} steps of {stride} bytes over {extent} bytes each");
                return Err(LayoutError::new("strides", problem));
            }
            let reach = stride.checked_mul(count - 1);
            match reach.and_then(|reach| reach.checked_add(extent)) {
                Some(longer) if longer <= i64::MAX as u64 => extent = longer,
                _ => {
                    let problem = "a layer exceeds the address space";
                    return Err(LayoutError::new("strides", problem));
                }
            }
        }
        Ok(())
    }

    /// How often each distance is stepped, and the distance.
    fn steps(&self, strides: &KvStrides) -> [(u64, u64); 4] {
        [
            (self.kv.into(), strides.kv),
            (self.pages.into(), strides.page),
            (self.page_tokens.into(), strides.token),
            (self.heads.into(), strides.head),
        ]
    }

    /// The distances that a device adds up: flat pages are moved as a whole.
    pub(crate) fn stepped(&self) -> impl Iterator<Item = u64> + Clone {
        let within = if self.pages_are_flat() { 2 } else { 4 };
        let steps = self.steps(&self.strides());
        steps
            .into_iter()
            .take(within)
            .filter(|(count, _)| *count > 1)
            .map(|(_, stride)| stride)
    }

    /// Bytes of one row: one head at one token.
    pub fn row_bytes(&self) -> u64 {
        u64::from(self.head_size) * u64::from(self.dtype_bytes)
    }

    /// Bytes of one page of one layer, of one of K and V.
    pub fn page_bytes(&self) -> u64 {
        u64::from(self.page_tokens) * u64::from(self.heads) * self.row_bytes()
    }

    /// Bytes from the first of a layer to its last, K and V of all pages, what lies between them included.
    pub fn layer_bytes(&self) -> u64 {
        let reach = |(count, stride): (u64, u64)| (count - 1) * stride;
        let steps = self.steps(&self.strides());
        steps.into_iter().map(reach).sum::<u64>() + self.row_bytes()
    }

    /// Bytes of one page of all layers, K and V: what one page adds to a block.
    pub fn page_bytes_all_layers(&self) -> u64 {
        u64::from(self.layers) * u64::from(self.kv) * self.page_bytes()
    }

    /// The distances that order and arrangement amount to.
    pub fn strides(&self) -> KvStrides {
        let (row, page) = (self.row_bytes(), self.page_bytes());
        if let Arrangement::Strided(strides) = self.arrangement {
            return strides;
        }
        let (token, head) = match self.order {
            KvOrder::Nhd => (u64::from(self.heads) * row, row),
            KvOrder::Hnd => (row, u64::from(self.page_tokens) * row),
        };
        let (kv, page) = match self.arrangement {
            Arrangement::KvFirst => (u64::from(self.pages) * page, page),
            Arrangement::PageFirst => (page, u64::from(self.kv) * page),
            Arrangement::Strided(strides) => (strides.kv, strides.page),
        };
        KvStrides {
            kv,
            page,
            token,
            head,
        }
    }

    /// Whether a page's bytes are in the block's order already.
    pub fn pages_are_flat(&self) -> bool {
        let strides = self.strides();
        (self.heads == 1 || strides.head == self.row_bytes())
            && (self.page_tokens == 1 || strides.token == u64::from(self.heads) * self.row_bytes())
    }
}

/// Bound of a kernel grid's second and third dimension, set by CUDA.
pub(crate) const MAX_GRID: u64 = 65_535;

#[cfg(test)]
mod tests {
    use super::{Arrangement, KvLayout, KvOrder, KvStrides};

    fn layout() -> KvLayout {
        KvLayout {
            layers: 4,
            kv: 2,
            pages: 10,
            page_tokens: 16,
            heads: 8,
            head_size: 128,
            dtype_bytes: 2,
            order: KvOrder::Nhd,
            arrangement: Arrangement::KvFirst,
        }
    }

    #[test]
    fn strides_follow_order_and_arrangement() {
        let (row, page) = (256, 16 * 8 * 256);
        assert_eq!(
            layout().strides(),
            KvStrides {
                kv: 10 * page,
                page,
                token: 8 * row,
                head: row
            }
        );
        let other = KvLayout {
            order: KvOrder::Hnd,
            arrangement: Arrangement::PageFirst,
            ..layout()
        };
        assert_eq!(
            other.strides(),
            KvStrides {
                kv: page,
                page: 2 * page,
                token: row,
                head: 16 * row
            }
        );
    }

    /// The six physical orders of vLLM's logical [layer, block, head, token, content], as strides in bytes.
    #[test]
    fn strides_of_every_vllm_order_stay_apart_and_reach_as_far_as_the_tensor() {
        let (layers, blocks, heads, tokens, content) = (3_u32, 10_u32, 4_u32, 8_u32, 128_u32);
        let counts = [layers, blocks, heads, tokens].map(u64::from);
        for order in [
            [0, 1, 2, 3],
            [0, 1, 3, 2],
            [0, 2, 1, 3],
            [1, 0, 2, 3],
            [1, 0, 3, 2],
            [1, 2, 0, 3],
        ] {
            let (mut strides, mut step) = ([0; 4], u64::from(content) * 2);
            for dimension in order.into_iter().rev() {
                strides[dimension] = step;
                step *= counts[dimension];
            }
            let strided = KvLayout {
                layers,
                kv: 1,
                pages: blocks,
                page_tokens: tokens,
                heads,
                head_size: content,
                dtype_bytes: 2,
                order: KvOrder::Nhd,
                arrangement: Arrangement::Strided(KvStrides {
                    kv: 0,
                    page: strides[1],
                    token: strides[3],
                    head: strides[2],
                }),
            };
            assert_eq!(strided.validate(), Ok(()), "{order:?}");
            let all = (u64::from(layers) - 1) * strides[0] + strided.layer_bytes();
            assert_eq!(all, step, "{order:?}: the last layer ends with the tensor");
            let tokens_before_heads = [[0, 1, 3, 2], [1, 0, 3, 2]].contains(&order);
            assert_eq!(strided.pages_are_flat(), tokens_before_heads, "{order:?}");
        }
    }

    #[test]
    fn strides_that_fold_rows_onto_each_other_are_refused() {
        let strides = layout().strides();
        let with = |strides| KvLayout {
            arrangement: Arrangement::Strided(strides),
            ..layout()
        };
        assert_eq!(with(strides).validate(), Ok(()));
        assert_eq!(with(strides).layer_bytes(), layout().layer_bytes());
        let half = KvStrides {
            page: strides.page / 2,
            ..strides
        };
        let field = |strides| with(strides).validate().unwrap_err().field;
        assert_eq!(field(half), "strides");
        assert_eq!(field(KvStrides { head: 0, ..strides }), "strides");
        let vast = KvStrides {
            kv: u64::MAX,
            ..strides
        };
        assert_eq!(field(vast), "strides");
        let padded = KvLayout::pieces(2, 10, 4096, 4000);
        assert_eq!(padded.validate(), Ok(()));
        assert_eq!(padded.layer_bytes(), 9 * 4096 + 4000);
        assert!(padded.pages_are_flat());
        assert!(KvLayout::pieces(2, 10, 3999, 4000).validate().is_err());
    }

    #[test]
    fn what_cannot_be_names_its_field() {
        let field = |layout: KvLayout| layout.validate().unwrap_err().field;
        assert_eq!(layout().validate(), Ok(()));
        assert_eq!(
            field(KvLayout {
                heads: 0,
                ..layout()
            }),
            "heads"
        );
        assert_eq!(field(KvLayout { kv: 3, ..layout() }), "kv");
        assert_eq!(
            field(KvLayout {
                layers: 40_000,
                ..layout()
            }),
            "layers"
        );
        assert_eq!(
            field(KvLayout {
                page_tokens: u32::MAX,
                ..layout()
            }),
            "page_tokens"
        );
        let vast = KvLayout {
            pages: u32::MAX,
            layers: 32_000,
            head_size: 1 << 16,
            ..layout()
        };
        assert_eq!(field(vast), "pages");
    }
}
