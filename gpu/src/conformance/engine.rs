//! An engine's own memory and stream, and its tensors in vLLM's orders.

use bytes::Bytes;

use super::{Bench, Outcome};
use crate::device::{DeviceError, DeviceMemory, PagedKv};
use crate::layout::{Arrangement, KvLayout, KvOrder, KvStrides};
use crate::plan::CopyPlan;

/// The same memory, as an engine would hand it over.
fn adopt(bench: &Bench, memory: &DeviceMemory) -> Result<DeviceMemory, DeviceError> {
    // SAFETY: every caller keeps `memory` until what is answered here is gone.
    unsafe { bench.device.adopt(memory.address, memory.bytes) }
}

pub(super) fn adopted_memory_is_its_owners(bench: &Bench) -> Outcome {
    let length = 100_003;
    let owner = bench.device.alloc(length)?;
    let free = bench.device.free_bytes()?;
    for seed in 0..2 {
        let adopted = adopt(bench, &owner)?;
        ensure!(adopted.len_bytes() == length, "{adopted:?}");
        ensure!(bench.device.free_bytes()? == free, "counted as ours");
        let bytes = bench.filled(length, 20 + seed);
        bench.write(&adopted.whole(), bytes.clone())?;
        ensure!(
            bench.read(&owner.whole())? == bytes,
            "the owner sees other bytes"
        );
        let part = bench.filled(1000, 30 + seed);
        bench.write(&owner.span(77, 1000)?, part.clone())?;
        ensure!(
            bench.read(&adopted.span(77, 1000)?)? == part,
            "the owner's bytes are not seen"
        );
    }
    // Both handles are gone, and the memory is the owner's as before.
    ensure!(bench.device.free_bytes()? == free, "freed with its handle");
    bench.write(&owner.whole(), bench.filled(length, 40))
}

pub(super) fn adoption_is_checked(bench: &Bench) -> Outcome {
    // SAFETY: refused, so nothing is adopted.
    let nowhere = unsafe { bench.device.adopt(0, 4096) };
    ensure!(
        matches!(nowhere, Err(DeviceError::Foreign { field: "address" })),
        "null: {nowhere:?}"
    );
    let owner = bench.device.alloc(8192)?;
    let adopted = adopt(bench, &owner)?;
    let stream = bench.device.stream()?;
    let overlap = stream.copy(&owner.span(0, 4096)?, &adopted.span(4095, 4096)?);
    ensure!(
        matches!(overlap, Err(DeviceError::Bounds { .. })),
        "one memory under two handles: {overlap:?}"
    );
    stream
        .copy(&owner.span(0, 4096)?, &adopted.span(4096, 4096)?)?
        .wait()?;
    Ok(())
}

pub(super) fn streams_wait_for_each_other(bench: &Bench) -> Outcome {
    let length = 4 << 20;
    let (theirs, ours) = (bench.device.stream()?, bench.device.stream()?);
    // SAFETY: `theirs` lives to the end of this function.
    let engine = unsafe { bench.device.adopt_stream(theirs.handle()) }?;
    let (pages, staging) = (bench.device.alloc(length)?, bench.device.alloc(length)?);
    for seed in 50..54 {
        // The engine writes, we read, and it must not write again before we have.
        theirs.upload(bench.filled(length, seed), &pages.whole())?;
        ours.wait_for(&engine.record()?)?;
        let copied = ours.copy(&pages.whole(), &staging.whole())?;
        engine.wait_for(&copied)?;
        let later = theirs.upload(Bytes::from(vec![0xee; length]), &pages.whole())?;
        let pending = ours
            .download(&staging.whole(), bench.slot(length))
            .map_err(|refused| refused.error)?;
        let slot = pending.wait().map_err(|refused| refused.error)?;
        ensure!(
            slot[..] == bench.filled(length, seed)[..],
            "round {seed} came out of order"
        );
        later.wait()?;
        ensure!(copied.is_done()?, "the engine did not wait");
    }
    // SAFETY: the default stream is always there.
    let default = unsafe { bench.device.adopt_stream(0) }?;
    default.record()?.wait()?;
    default.wait_for(&ours.copy(&pages.whole(), &staging.whole())?)?;
    Ok(ours.synchronize()?)
}

/// vLLM's orders of (layer, block, head, token), outermost first; the content is innermost in each.
const VLLM_ORDERS: [(&str, [usize; 4]); 6] = [
    ("LBHNC", [0, 1, 2, 3]),
    ("LBNHC", [0, 1, 3, 2]),
    ("LHBNC", [0, 2, 1, 3]),
    ("BLHNC", [1, 0, 2, 3]),
    ("BLNHC", [1, 0, 3, 2]),
    ("BHLNC", [1, 2, 0, 3]),
];
const PAGES: [u32; 6] = [3, 11, 0, 7, 8, 2];

pub(super) fn every_vllm_order(bench: &Bench) -> Outcome {
    // K and V of 8 heads side by side; latent attention; rows that only single bytes divide.
    for (heads, content, dtype_bytes) in [(8, 2 * 64, 2), (1, 576, 2), (1, 656, 1), (3, 5, 1)] {
        for (name, order) in VLLM_ORDERS {
            one_order(bench, order, heads, content, dtype_bytes)
                .map_err(|problem| format!("{name}, {heads} heads of {content}: {problem}"))?;
        }
    }
    Ok(())
}

fn one_order(
    bench: &Bench,
    order: [usize; 4],
    heads: u32,
    content: u32,
    dtype_bytes: u32,
) -> Outcome {
    let counts = [3, 12, heads as usize, 4];
    let row = (content * dtype_bytes) as usize;
    let (mut strides, mut all) = ([0; 4], row);
    for dimension in order.into_iter().rev() {
        strides[dimension] = all;
        all *= counts[dimension];
    }
    let at = |index: [usize; 4]| -> usize { index.iter().zip(strides).map(|(i, s)| i * s).sum() };
    let layout = KvLayout {
        layers: 3,
        kv: 1,
        pages: 12,
        page_tokens: 4,
        heads,
        head_size: content,
        dtype_bytes,
        order: KvOrder::Nhd,
        arrangement: Arrangement::Strided(KvStrides {
            kv: 0,
            page: strides[1] as u64,
            token: strides[3] as u64,
            head: strides[2] as u64,
        }),
    };
    let tensor = bench.device.alloc(all)?;
    let before = bench.filled(all, 60);
    bench.write(&tensor.whole(), before.clone())?;
    let adopted = adopt(bench, &tensor)?;
    let layers: Result<Vec<_>, _> = (0..3)
        .map(|layer| adopted.span(layer * strides[0], layout.layer_bytes() as usize))
        .collect();
    let paged = PagedKv::per_layer(layout, layers?)?;
    let plan = CopyPlan::new(layout, PAGES.to_vec(), 2)?;

    // Row by row from the definition of the order, and not from strides of ours.
    let (mut blocks, mut after) = (Vec::new(), before.to_vec());
    let loaded = bench.filled(plan.total_bytes() as usize, 61);
    for pair in PAGES.chunks(2) {
        for layer in 0..3 {
            for page in pair {
                for token in 0..4 {
                    for head in 0..heads as usize {
                        let from = at([layer, *page as usize, head, token]);
                        let to = blocks.len();
                        blocks.extend_from_slice(&before[from..from + row]);
                        after[from..from + row].copy_from_slice(&loaded[to..to + row]);
                    }
                }
            }
        }
    }
    let staging = bench.device.alloc(blocks.len())?.whole();
    let stream = bench.device.stream()?;
    stream.gather(&plan, &paged, &staging)?.wait()?;
    ensure!(bench.read(&staging)? == blocks, "gathered other bytes");
    stream.load(&plan, loaded, &staging, &paged)?.wait()?;
    ensure!(
        bench.read(&tensor.whole())? == after,
        "scattered elsewhere, or wrote between"
    );
    Ok(())
}

pub(super) fn shapes_share_blocks(bench: &Bench) -> Outcome {
    // As an indexer beside latent attention: 656 and 132 bytes per token, padded pages.
    let shapes = [
        KvLayout::pieces(2, 12, 656 * 4, 656 * 4),
        KvLayout::pieces(1, 12, 132 * 4 + 16, 132 * 4),
    ];
    let block_bytes: u64 = shapes.iter().map(KvLayout::page_bytes_all_layers).sum();
    let staging = bench.device.alloc(block_bytes as usize * PAGES.len())?;
    let (stream, mut offset) = (bench.device.stream()?, 0);
    let mut expected = vec![0; staging.len_bytes()];
    let (mut kept, mut keep) = (Vec::new(), Vec::new());
    for (seed, layout) in shapes.into_iter().enumerate() {
        let length = layout.layer_bytes() as usize;
        let memory = bench.device.alloc(length * layout.layers as usize)?;
        let bytes = bench.filled(memory.len_bytes(), 70 + seed as u64);
        bench.write(&memory.whole(), bytes.clone())?;
        let paged = PagedKv::contiguous(layout, &memory.whole())?;
        let plan = CopyPlan::new(layout, PAGES.to_vec(), 1)?.spaced(block_bytes)?;
        let span = staging.span(offset as usize, plan.total_bytes() as usize)?;
        stream.gather(&plan, &paged, &span)?;
        let piece = layout.page_bytes() as usize;
        let stride = layout.strides().page as usize;
        for (block, page) in PAGES.iter().enumerate() {
            for layer in 0..layout.layers as usize {
                let from = layer * length + *page as usize * stride;
                let to = block * block_bytes as usize + offset as usize + layer * piece;
                expected[to..to + piece].copy_from_slice(&bytes[from..from + piece]);
            }
        }
        offset += layout.page_bytes_all_layers();
        kept.push((plan, paged, span));
        keep.push((memory, bytes));
    }
    stream.synchronize()?;
    ensure!(
        bench.read(&staging.whole())? == expected,
        "blocks are not their layers' bytes in turn"
    );
    for ((plan, paged, span), (memory, bytes)) in kept.iter().zip(&keep) {
        stream.scatter(plan, span, paged)?.wait()?;
        ensure!(
            bench.read(&memory.whole())? == *bytes,
            "scatter did not undo gather"
        );
    }
    Ok(())
}
