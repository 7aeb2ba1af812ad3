//! How an engine lays out its paged KV memory.
//!
//! ```text
//!  one layer, KvFirst:   [ K: page 0 │ page 1 │ … ] [ V: page 0 │ page 1 │ … ]     vLLM
//!  one layer, PageFirst: [ page 0: K │ V ] [ page 1: K │ V ] …                     FlashInfer
//!  one page, Nhd: [token][head][head_size]        Hnd: [head][token][head_size]
//! ```
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
    /// The order within a page.
    pub order: KvOrder,
    /// Where K and V lie within a layer.
    pub arrangement: Arrangement,
}

/// Distances in bytes between neighbours in one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
    /// Checks every field and that all sizes fit.
    ///
    /// # Errors
    /// Names the field: a zero, a `kv` other than 1 or 2, or sizes beyond what a device can address.
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
        Ok(())
    }

    /// Bytes of one row: one head at one token.
    pub fn row_bytes(&self) -> u64 {
        u64::from(self.head_size) * u64::from(self.dtype_bytes)
    }

    /// Bytes of one page of one layer, of one of K and V.
    pub fn page_bytes(&self) -> u64 {
        u64::from(self.page_tokens) * u64::from(self.heads) * self.row_bytes()
    }

    /// Bytes of one layer, all pages, K and V.
    pub fn layer_bytes(&self) -> u64 {
        u64::from(self.kv) * u64::from(self.pages) * self.page_bytes()
    }

    /// Bytes of one page of all layers, K and V: what one page adds to a block.
    pub fn page_bytes_all_layers(&self) -> u64 {
        u64::from(self.layers) * u64::from(self.kv) * self.page_bytes()
    }

    /// The distances that order and arrangement amount to.
    pub fn strides(&self) -> KvStrides {
        let (row, page) = (self.row_bytes(), self.page_bytes());
        let (token, head) = match self.order {
            KvOrder::Nhd => (u64::from(self.heads) * row, row),
            KvOrder::Hnd => (row, u64::from(self.page_tokens) * row),
        };
        let (kv, page) = match self.arrangement {
            Arrangement::KvFirst => (u64::from(self.pages) * page, page),
            Arrangement::PageFirst => (page, u64::from(self.kv) * page),
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
        self.order == KvOrder::Nhd || self.heads == 1 || self.page_tokens == 1
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
