//! Paged KV to blocks and back, and the way through the arena.

use std::sync::Arc;

use bytes::Bytes;

use super::{Bench, Outcome};
use crate::device::{DeviceError, PagedKv};
use crate::layout::{Arrangement, KvLayout, KvOrder, KvStrides};
use crate::pinned::PinnedArena;
use crate::plan::CopyPlan;

/// Layouts whose rows are divisible by 16, by 4 and by nothing.
fn layouts() -> Vec<KvLayout> {
    let mut layouts = Vec::new();
    for order in [KvOrder::Nhd, KvOrder::Hnd] {
        for arrangement in [Arrangement::KvFirst, Arrangement::PageFirst] {
            for (kv, heads, head_size, dtype_bytes) in [
                (2, 4, 64, 2),
                (2, 3, 2, 2),
                (1, 5, 3, 1),
                (2, 1, 576, 1),
                (1, 1, 7, 4),
            ] {
                layouts.push(KvLayout {
                    layers: 3,
                    kv,
                    pages: 20,
                    page_tokens: 6,
                    heads,
                    head_size,
                    dtype_bytes,
                    order,
                    arrangement,
                });
            }
        }
    }
    layouts.extend(strided());
    layouts
}

/// Padded pages, heads outside of pages, K and V outermost with a gap: of no named arrangement.
fn strided() -> [KvLayout; 3] {
    let strided = |kv, heads, head_size, [to_v, page, token, head]: [u64; 4]| KvLayout {
        layers: 3,
        kv,
        pages: 20,
        page_tokens: 6,
        heads,
        head_size,
        dtype_bytes: 2,
        order: KvOrder::Nhd,
        arrangement: Arrangement::Strided(KvStrides {
            kv: to_v,
            page,
            token,
            head,
        }),
    };
    [
        strided(1, 4, 64, [0, 6 * 4 * 128 + 256, 4 * 128, 128]),
        strided(1, 4, 8, [0, 6 * 16, 16, 20 * 6 * 16]),
        strided(2, 3, 3, [20 * 110 + 7, 110, 6, 36]),
    ]
}

const PAGES: [u32; 12] = [7, 3, 4, 5, 19, 0, 1, 2, 11, 10, 9, 16];

/// Calls with the paged offset (over all layers, one behind the other) and the block offset of each row.
fn rows(layout: &KvLayout, pages: &[u32], per_block: usize, mut row: impl FnMut(usize, usize)) {
    let [kv, all, tokens, heads] =
        [layout.kv, layout.pages, layout.page_tokens, layout.heads].map(|count| count as usize);
    let bytes = (layout.head_size * layout.dtype_bytes) as usize;
    let mut block = 0;
    for pages in pages.chunks(per_block) {
        for layer in 0..layout.layers as usize {
            for half in 0..kv {
                for page in pages.iter().map(|page| *page as usize) {
                    for token in 0..tokens {
                        for head in 0..heads {
                            if let Arrangement::Strided(strides) = layout.arrangement {
                                let steps = [half as u64, page as u64, token as u64, head as u64];
                                let strides =
                                    [strides.kv, strides.page, strides.token, strides.head];
                                let within: u64 =
                                    steps.iter().zip(strides).map(|(i, step)| i * step).sum();
                                let layer = layer as u64 * layout.layer_bytes();
                                row((layer + within) as usize, block);
                                block += bytes;
                                continue;
                            }
                            let page = match layout.arrangement {
                                Arrangement::Strided(_) => continue,
                                Arrangement::KvFirst => (layer * kv + half) * all + page,
                                Arrangement::PageFirst => (layer * all + page) * kv + half,
                            };
                            let within = match layout.order {
                                KvOrder::Nhd => token * heads + head,
                                KvOrder::Hnd => head * tokens + token,
                            };
                            row((page * tokens * heads + within) * bytes, block);
                            block += bytes;
                        }
                    }
                }
            }
        }
    }
}

/// The layout's memory: at an odd address of one allocation, or one allocation per layer.
fn paged(
    bench: &Bench,
    layout: KvLayout,
    apart: bool,
    bytes: &Bytes,
) -> Result<PagedKv, Box<dyn std::error::Error>> {
    let layer = layout.layer_bytes() as usize;
    let kv = if apart {
        let mut layers = Vec::new();
        for _ in 0..layout.layers {
            layers.push(bench.device.alloc(layer)?.whole());
        }
        PagedKv::per_layer(layout, layers)?
    } else {
        let memory = bench.device.alloc(bytes.len() + 1)?;
        PagedKv::contiguous(layout, &memory.span(1, bytes.len())?)?
    };
    for (i, span) in kv.layers.iter().enumerate() {
        bench.write(span, bytes.slice(i * layer..(i + 1) * layer))?;
    }
    Ok(kv)
}

pub(super) fn gather_makes_blocks(bench: &Bench) -> Outcome {
    for layout in layouts() {
        for (apart, per_block) in [(true, 1), (true, 4), (false, 12)] {
            let all = layout.layer_bytes() as usize * layout.layers as usize;
            let bytes = bench.filled(all, 5);
            let kv = paged(bench, layout, apart, &bytes)?;
            let plan = CopyPlan::new(layout, PAGES.to_vec(), per_block as u32)?;
            let blocks = bench.device.alloc(plan.total_bytes() as usize)?;
            bench
                .device
                .stream()?
                .gather(&plan, &kv, &blocks.whole())?
                .wait()?;
            let mut expected = vec![0; plan.total_bytes() as usize];
            let row = (layout.head_size * layout.dtype_bytes) as usize;
            rows(&layout, &PAGES, per_block, |page, block| {
                expected[block..block + row].copy_from_slice(&bytes[page..page + row]);
            });
            ensure!(
                bench.read(&blocks.whole())? == expected,
                "{layout:?}, {per_block} to a block"
            );
        }
    }
    Ok(())
}

pub(super) fn scatter_undoes_gather(bench: &Bench) -> Outcome {
    for layout in layouts() {
        for (apart, per_block) in [(true, 3), (false, 1)] {
            let all = layout.layer_bytes() as usize * layout.layers as usize;
            let before = bench.filled(all, 6);
            let kv = paged(bench, layout, apart, &before)?;
            let plan = CopyPlan::new(layout, PAGES.to_vec(), per_block as u32)?;
            let bytes = bench.filled(plan.total_bytes() as usize, 7);
            let blocks = bench.device.alloc(bytes.len())?;
            let stream = bench.device.stream()?;
            stream.upload(bytes.clone(), &blocks.whole())?;
            stream.scatter(&plan, &blocks.whole(), &kv)?;
            let again = bench.device.alloc(bytes.len())?;
            stream.gather(&plan, &kv, &again.whole())?.wait()?;
            ensure!(
                bench.read(&again.whole())? == bytes,
                "{layout:?}: gathered other bytes"
            );
            let mut expected = before.to_vec();
            let row = (layout.head_size * layout.dtype_bytes) as usize;
            rows(&layout, &PAGES, per_block, |page, block| {
                expected[page..page + row].copy_from_slice(&bytes[block..block + row]);
            });
            let layer = layout.layer_bytes() as usize;
            for (i, span) in kv.layers.iter().enumerate() {
                let same = bench.read(span)? == expected[i * layer..(i + 1) * layer];
                ensure!(same, "{layout:?}: layer {i} holds other bytes");
            }
        }
    }
    Ok(())
}

pub(super) fn plans_are_checked(bench: &Bench) -> Outcome {
    let layout = layouts()[0];
    let bytes = bench.filled(layout.layer_bytes() as usize * layout.layers as usize, 8);
    let kv = paged(bench, layout, true, &bytes)?;
    let stream = bench.device.stream()?;
    let refused = |outcome: Result<crate::device::Event, DeviceError>, field: &str| -> Outcome {
        match outcome {
            Err(DeviceError::Plan(error)) if error.field == field => Ok(()),
            Err(DeviceError::Length { field: named, .. }) if named == field => Ok(()),
            other => Err(format!("{field}: {other:?}").into()),
        }
    };
    let plan = CopyPlan::new(layout, vec![1, 2], 1)?;
    let blocks = bench.device.alloc(plan.total_bytes() as usize + 1)?;
    refused(stream.gather(&plan, &kv, &blocks.whole()), "blocks")?;
    let fitting = blocks.span(0, plan.total_bytes() as usize)?;
    let twice = CopyPlan::new(layout, vec![1, 1], 1)?;
    refused(stream.scatter(&twice, &fitting, &kv), "pages")?;
    stream.gather(&twice, &kv, &fitting)?.wait()?;
    let other = CopyPlan::new(
        KvLayout {
            pages: 30,
            ..layout
        },
        vec![1, 2],
        1,
    )?;
    refused(stream.gather(&other, &kv, &fitting), "layout")?;
    let few = PagedKv::per_layer(layout, kv.layers[1..].to_vec());
    ensure!(
        matches!(few, Err(DeviceError::Plan(_))),
        "too few layers: {few:?}"
    );
    Ok(())
}

pub(super) fn page_locked_round_trip(bench: &Bench) -> Outcome {
    let pinned = PinnedArena::new(Arc::clone(&bench.arena), Arc::clone(&bench.device))?;
    let ready = bench.arena.ready_bytes();
    ensure!(
        pinned.locked_bytes() == ready,
        "{} of {ready} locked",
        pinned.locked_bytes()
    );
    let segment = &bench.arena.segments()[0];
    let twice = bench.device.page_lock(segment);
    ensure!(
        matches!(twice, Err(DeviceError::AlreadyLocked { .. })),
        "twice: {twice:?}"
    );

    let layout = KvLayout {
        pages: 64,
        ..layouts()[0]
    };
    let bytes = bench.filled(layout.layer_bytes() as usize * layout.layers as usize, 9);
    let kv = paged(bench, layout, false, &bytes)?;
    let plan = CopyPlan::new(layout, (0..64).rev().collect(), 4)?;
    let staging = bench.device.alloc(plan.total_bytes() as usize)?.whole();
    let stream = bench.device.stream()?;
    let slot = bench.slot(staging.len_bytes());
    ensure!(slot.location().is_some(), "the arena of the suite is full");
    let pending = stream
        .save(&plan, &kv, &staging, slot)
        .map_err(|refused| refused.error)?;
    let saved = Bytes::from_owner(pending.wait().map_err(|refused| refused.error)?.freeze());
    let empty = paged(bench, layout, true, &Bytes::from(vec![0; bytes.len()]))?;
    stream.load(&plan, saved, &staging, &empty)?.wait()?;
    let layer = layout.layer_bytes() as usize;
    for (i, span) in empty.layers.iter().enumerate() {
        let same = bench.read(span)? == bytes[i * layer..(i + 1) * layer];
        ensure!(same, "layer {i} changed on the way through the arena");
    }
    drop(pinned);
    // Unlocked by the drop, so it can be locked anew.
    bench.device.page_lock(segment)?;
    Ok(())
}
