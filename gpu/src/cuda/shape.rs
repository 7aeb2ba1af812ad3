//! A plan as the kernels take it.

use crate::plan::CopyPlan;

/// Word widths of the kernels, widest first.
pub(super) const WORDS: [u64; 3] = [16, 4, 1];

/// As `Shape` in kernels/kv.cu, field by field.
#[repr(C)]
pub(super) struct Shape {
    pub(super) kv_stride: u64,
    pub(super) page_stride: u64,
    pub(super) token_stride: u64,
    pub(super) head_stride: u64,
    pub(super) page_bytes: u64,
    pub(super) block_stride: u64,
    pub(super) kv: u32,
    pub(super) pages_per_block: u32,
    pub(super) heads: u32,
    pub(super) row_words: u32,
    pub(super) page_words: u32,
    pub(super) flat: u32,
}

impl Shape {
    pub(super) fn new(plan: &CopyPlan, word: u64) -> Self {
        let (layout, strides) = (plan.layout(), plan.layout().strides());
        Self {
            kv_stride: strides.kv,
            page_stride: strides.page,
            token_stride: strides.token,
            head_stride: strides.head,
            page_bytes: layout.page_bytes(),
            block_stride: plan.block_stride(),
            kv: layout.kv,
            pages_per_block: plan.pages_per_block(),
            heads: layout.heads,
            row_words: (layout.row_bytes() / word).max(1) as u32,
            page_words: (layout.page_bytes() / word) as u32,
            flat: u32::from(layout.pages_are_flat()),
        }
    }
}

/// Which of [`WORDS`] divides everything the kernel will add up.
pub(super) fn word_width(plan: &CopyPlan, addresses: impl Iterator<Item = u64> + Clone) -> usize {
    let layout = plan.layout();
    let unit = if layout.pages_are_flat() {
        layout.page_bytes()
    } else {
        layout.row_bytes()
    };
    let steps = layout.stepped().chain([plan.block_stride()]);
    let fits = |word: &&u64| {
        unit.is_multiple_of(**word)
            && steps.clone().all(|step| step.is_multiple_of(**word))
            && addresses.clone().all(|at| at.is_multiple_of(**word))
    };
    let word = WORDS.iter().find(fits).expect("one divides everything");
    WORDS
        .iter()
        .position(|other| other == word)
        .expect("it is from there")
}
