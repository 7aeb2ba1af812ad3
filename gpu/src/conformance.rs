//! What every device must do, as one suite that runs over any of them.
//!
//! The host device passes it in every test run; `kvgpu-check` runs it on a GPU. Expected bytes are
//! computed here from the layouts' definition, independently of strides, plans and kernels.

use std::sync::Arc;

use bytes::Bytes;

use crate::arena::{Arena, ArenaConfig, DomainId};
use crate::device::{Device, DeviceError, DeviceSpan, PagedKv};
use crate::layout::{Arrangement, KvLayout, KvOrder};
use crate::pinned::PinnedArena;
use crate::plan::CopyPlan;
use crate::slot::SlotMut;

/// One promise, and whether it was kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// The promise, as a fact.
    pub name: &'static str,
    /// How it was broken.
    pub outcome: Result<(), String>,
}

type Outcome = Result<(), Box<dyn std::error::Error>>;

type Test = fn(&Bench) -> Outcome;

macro_rules! ensure {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return Err(format!($($message)+).into());
        }
    };
}

/// What a check works with.
struct Bench {
    device: Arc<dyn Device>,
    arena: Arc<Arena>,
}

/// Runs the whole suite. Takes a few tens of megabytes of device and host memory.
pub fn run(device: &Arc<dyn Device>) -> Vec<Check> {
    let checks: [(&'static str, Test); 13] = [
        ("a device names and sizes itself", names_itself),
        ("new memory is zero and counted", memory_is_zero_and_counted),
        (
            "too much memory is refused and harms nothing",
            too_much_is_refused,
        ),
        (
            "bytes come back as they went, at any length",
            bytes_come_back,
        ),
        (
            "ranges outside their memory are refused",
            ranges_are_checked,
        ),
        (
            "lengths that differ are refused and the slot comes back",
            lengths_are_checked,
        ),
        (
            "operations of one stream happen in order",
            one_stream_is_ordered,
        ),
        (
            "streams are ordered by events",
            streams_are_ordered_by_events,
        ),
        (
            "copies within the device move the bytes named",
            copies_within,
        ),
        (
            "gather makes the block of every layout",
            gather_makes_blocks,
        ),
        (
            "scatter undoes gather and touches no other page",
            scatter_undoes_gather,
        ),
        ("plans that do not fit are refused", plans_are_checked),
        (
            "page-locked slots save and load pages",
            page_locked_round_trip,
        ),
    ];
    let config = ArenaConfig {
        capacity_bytes: 32 << 20,
        segment_bytes: 16 << 20,
        ..ArenaConfig::default()
    };
    let arena = match Arena::new(config) {
        Ok(arena) => arena,
        Err(error) => {
            let outcome = Err(error.to_string());
            return vec![Check {
                name: "an arena for the suite",
                outcome,
            }];
        }
    };
    arena.wait_ready();
    let bench = Bench {
        device: Arc::clone(device),
        arena,
    };
    let mut results: Vec<Check> = checks
        .into_iter()
        .map(|(name, check)| Check {
            name,
            outcome: check(&bench).map_err(|e| e.to_string()),
        })
        .collect();
    let slots = bench.arena.stats().slots;
    let outcome = if slots == 0 {
        Ok(())
    } else {
        Err(format!("{slots} slots were not given back"))
    };
    results.push(Check {
        name: "every slot came back",
        outcome,
    });
    results
}

impl Bench {
    fn slot(&self, length: usize) -> SlotMut {
        self.arena
            .alloc(DomainId::NODE, length)
            .unwrap_or_else(|| SlotMut::heap(length))
    }

    fn filled(&self, length: usize, seed: u64) -> Bytes {
        let mut slot = self.slot(length);
        fill(&mut slot, seed);
        Bytes::from_owner(slot.freeze())
    }

    /// What a span holds, through a stream of its own.
    fn read(&self, span: &DeviceSpan) -> Result<Bytes, Box<dyn std::error::Error>> {
        let stream = self.device.stream()?;
        let pending = stream
            .download(span, self.slot(span.len_bytes()))
            .map_err(|r| r.error)?;
        let slot = pending.wait().map_err(|refused| refused.error)?;
        Ok(Bytes::from_owner(slot.freeze()))
    }

    fn write(&self, span: &DeviceSpan, bytes: Bytes) -> Outcome {
        Ok(self.device.stream()?.upload(bytes, span)?.wait()?)
    }
}

fn fill(bytes: &mut [u8], seed: u64) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for chunk in bytes.chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        chunk.copy_from_slice(&state.to_le_bytes()[..chunk.len()]);
    }
}

fn names_itself(bench: &Bench) -> Outcome {
    let info = bench.device.info();
    ensure!(!info.name.is_empty(), "no name");
    ensure!(info.total_bytes > 0, "no memory");
    ensure!(
        bench.device.free_bytes()? <= info.total_bytes,
        "more free than there is"
    );
    Ok(())
}

fn memory_is_zero_and_counted(bench: &Bench) -> Outcome {
    let length = 8 << 20;
    for _ in 0..2 {
        let memory = bench.device.alloc(length)?;
        ensure!(memory.len_bytes() == length, "{} bytes", memory.len_bytes());
        ensure!(
            bench.read(&memory.whole())?.iter().all(|byte| *byte == 0),
            "not zero"
        );
        bench.write(&memory.whole(), bench.filled(length, 1))?;
    }
    Ok(())
}

fn too_much_is_refused(bench: &Bench) -> Outcome {
    let asked = usize::try_from(bench.device.info().total_bytes)?.saturating_mul(2);
    match bench.device.alloc(asked) {
        Err(DeviceError::OutOfMemory { asked_bytes, .. }) => {
            ensure!(
                asked_bytes == asked as u64,
                "{asked_bytes} reported, {asked} asked for"
            );
        }
        other => return Err(format!("{other:?}").into()),
    }
    let memory = bench.device.alloc(4096)?;
    bench.write(&memory.whole(), bench.filled(4096, 2))
}

fn bytes_come_back(bench: &Bench) -> Outcome {
    for length in [1, 3, 4095, 4096, 65_537, (1 << 20) + 7, 8 << 20] {
        let memory = bench.device.alloc(length + 64)?;
        for offset in [0, 1, 48] {
            let (span, bytes) = (
                memory.span(offset, length)?,
                bench.filled(length, length as u64),
            );
            bench.write(&span, bytes.clone())?;
            ensure!(
                bench.read(&span)? == bytes,
                "{length} bytes at {offset} changed on the way"
            );
        }
    }
    let heap = Bytes::from(vec![7; 10_000]);
    let memory = bench.device.alloc(10_000)?;
    bench.write(&memory.whole(), heap.clone())?;
    ensure!(
        bench.read(&memory.whole())? == heap,
        "bytes of ordinary memory changed"
    );
    Ok(())
}

fn ranges_are_checked(bench: &Bench) -> Outcome {
    let memory = bench.device.alloc(100)?;
    for (offset, length) in [(0, 101), (101, 0), (50, 51), (usize::MAX, 2)] {
        let refused = memory.span(offset, length);
        ensure!(
            matches!(refused, Err(DeviceError::Bounds { field: "span", .. })),
            "{offset}+{length}: {refused:?}"
        );
    }
    let stream = bench.device.stream()?;
    let overlap = stream.copy(&memory.span(0, 60)?, &memory.span(40, 60)?);
    ensure!(
        matches!(overlap, Err(DeviceError::Bounds { .. })),
        "overlap: {overlap:?}"
    );
    Ok(())
}

fn lengths_are_checked(bench: &Bench) -> Outcome {
    let memory = bench.device.alloc(100)?;
    let stream = bench.device.stream()?;
    let upload = stream.upload(Bytes::from(vec![0; 99]), &memory.whole());
    ensure!(
        matches!(
            upload,
            Err(DeviceError::Length {
                field: "target",
                ..
            })
        ),
        "upload: {upload:?}"
    );
    match stream.download(&memory.whole(), bench.slot(101)) {
        Err(refused) => {
            ensure!(refused.value.len() == 101, "another slot came back");
            ensure!(
                matches!(refused.error, DeviceError::Length { .. }),
                "{:?}",
                refused.error
            );
        }
        Ok(_) => return Err("a longer slot was accepted".into()),
    }
    Ok(())
}

fn one_stream_is_ordered(bench: &Bench) -> Outcome {
    let length = 1 << 20;
    let memory = bench.device.alloc(length)?;
    let stream = bench.device.stream()?;
    let mut downloads = Vec::new();
    for seed in 0..8 {
        stream.upload(bench.filled(length, seed), &memory.whole())?;
        downloads.push(
            stream
                .download(&memory.whole(), bench.slot(length))
                .map_err(|r| r.error)?,
        );
    }
    for (seed, pending) in downloads.into_iter().enumerate() {
        let slot = pending.wait().map_err(|refused| refused.error)?;
        ensure!(
            slot[..] == bench.filled(length, seed as u64)[..],
            "step {seed} saw another's bytes"
        );
    }
    Ok(stream.synchronize()?)
}

fn streams_are_ordered_by_events(bench: &Bench) -> Outcome {
    let length = 4 << 20;
    let (first, second) = (bench.device.stream()?, bench.device.stream()?);
    let (from, to) = (bench.device.alloc(length)?, bench.device.alloc(length)?);
    for seed in 10..14 {
        let written = first.upload(bench.filled(length, seed), &from.whole())?;
        second.wait_for(&written)?;
        let copied = second.copy(&from.whole(), &to.whole())?;
        // The next round must not overwrite what this one still reads.
        first.wait_for(&copied)?;
        let pending = second
            .download(&to.whole(), bench.slot(length))
            .map_err(|r| r.error)?;
        let slot = pending.wait().map_err(|refused| refused.error)?;
        ensure!(
            slot[..] == bench.filled(length, seed)[..],
            "round {seed} came out of order"
        );
        ensure!(
            written.is_done()? && copied.is_done()?,
            "what came before is not done"
        );
    }
    Ok(())
}

fn copies_within(bench: &Bench) -> Outcome {
    let memory = bench.device.alloc(10_000)?;
    let bytes = bench.filled(10_000, 3);
    bench.write(&memory.whole(), bytes.clone())?;
    let stream = bench.device.stream()?;
    stream
        .copy(&memory.span(100, 3_000)?, &memory.span(5_001, 3_000)?)?
        .wait()?;
    let mut expected = bytes.to_vec();
    expected.copy_within(100..3_100, 5_001);
    ensure!(
        bench.read(&memory.whole())? == expected,
        "other bytes than those named"
    );
    Ok(())
}

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
    layouts
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
                            let page = match layout.arrangement {
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

fn gather_makes_blocks(bench: &Bench) -> Outcome {
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

fn scatter_undoes_gather(bench: &Bench) -> Outcome {
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

fn plans_are_checked(bench: &Bench) -> Outcome {
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

fn page_locked_round_trip(bench: &Bench) -> Outcome {
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
