//! Batches between an engine's pages and page-locked slots.

use std::sync::Arc;

use super::{Bench, Outcome, fill};
use crate::device::{DeviceError, DeviceMemory, PagedKv};
use crate::layout::KvLayout;
use crate::transfer::{KvPool, Moving, Staged, Transfer, TransferConfig, TransferError};

const PAGES: u32 = 24;

/// An engine's memory: two shapes, one of them padded.
struct Engine {
    pool: KvPool,
    shapes: [KvLayout; 2],
    memory: [DeviceMemory; 2],
}

impl Engine {
    fn new(bench: &Bench) -> Result<Self, Box<dyn std::error::Error>> {
        let shapes = [
            KvLayout::pieces(3, PAGES, 4096, 4096),
            KvLayout::pieces(1, PAGES, 1040, 1000),
        ];
        let (mut memory, mut groups) = (Vec::new(), Vec::new());
        for layout in shapes {
            let bytes = layout.layer_bytes() as usize * layout.layers as usize;
            let owned = bench.device.alloc(bytes)?;
            // SAFETY: `memory` keeps it as long as this engine, and batches end before that.
            let adopted = unsafe { bench.device.adopt(owned.address, owned.bytes) }?;
            groups.push(PagedKv::contiguous(layout, &adopted.whole())?);
            memory.push(owned);
        }
        let memory = memory.try_into().map_err(|_| "two shapes")?;
        Ok(Self {
            pool: KvPool::new(groups, 1)?,
            shapes,
            memory,
        })
    }

    fn write(&self, bench: &Bench, seed: u64) -> Result<[Vec<u8>; 2], Box<dyn std::error::Error>> {
        let [first, second] = &self.memory;
        let bytes = [
            bench.filled(first.len_bytes(), seed),
            bench.filled(second.len_bytes(), seed + 1),
        ];
        bench.write(&first.whole(), bytes[0].clone())?;
        bench.write(&second.whole(), bytes[1].clone())?;
        Ok(bytes.map(|bytes| bytes.to_vec()))
    }

    fn read(&self, bench: &Bench) -> Result<[Vec<u8>; 2], Box<dyn std::error::Error>> {
        let [first, second] = &self.memory;
        Ok([
            bench.read(&first.whole())?.to_vec(),
            bench.read(&second.whole())?.to_vec(),
        ])
    }

    /// Calls with where each piece of these pages lies: shape, offset there, offset in the blocks, length.
    fn pieces(&self, pages: &[u32], mut piece: impl FnMut(usize, usize, usize, usize)) {
        let mut block = 0;
        for page in pages {
            for (shape, layout) in self.shapes.iter().enumerate() {
                let (layer, stride) = (layout.layer_bytes(), layout.strides().page);
                for number in 0..u64::from(layout.layers) {
                    let at = number * layer + u64::from(*page) * stride;
                    let length = layout.page_bytes() as usize;
                    piece(shape, at as usize, block, length);
                    block += length;
                }
            }
        }
    }
}

fn transfer(bench: &Bench, slots: usize, lanes: usize) -> Result<Transfer, TransferError> {
    let config = TransferConfig {
        slot_bytes: 64 << 10,
        slots,
        lanes,
    };
    Transfer::new(Arc::clone(&bench.device), config)
}

/// Three pages each, in no order, all different.
fn batches() -> Vec<[u32; 3]> {
    (0..PAGES / 3)
        .map(|i| [i * 7 % PAGES, (i * 7 + 8) % PAGES, (i * 7 + 16) % PAGES])
        .collect()
}

pub(super) fn come_and_go(bench: &Bench) -> Outcome {
    for (slots, lanes) in [(1, 1), (4, 2), (3, 3)] {
        let (engine, transfer) = (Engine::new(bench)?, transfer(bench, slots, lanes)?);
        let before = engine.write(bench, 80)?;
        let bytes = engine.pool.batch_bytes(3) as usize;
        ensure!(
            transfer.locked_bytes() >= slots as u64 * (64 << 10),
            "not page-locked"
        );
        let mut saved = Vec::new();
        let mut end = |moving: Moving<Staged>| -> Outcome {
            saved.push(moving.wait()?.to_vec());
            Ok(())
        };
        let mut moving = std::collections::VecDeque::new();
        for pages in &batches() {
            let slot = loop {
                match transfer.slot(bytes)? {
                    Some(slot) => break slot,
                    None => end(moving.pop_front().ok_or("no slot and nothing under way")?)?,
                }
            };
            moving.push_back(transfer.save(&engine.pool, pages, slot, None, ())?);
        }
        for moving in moving {
            end(moving)?;
        }
        for (pages, blocks) in batches().iter().zip(&saved) {
            let mut expected = vec![0; bytes];
            engine.pieces(pages, |shape, at, block, length| {
                expected[block..block + length].copy_from_slice(&before[shape][at..at + length]);
            });
            ensure!(*blocks == expected, "{pages:?}: saved other bytes");
        }

        // Other bytes everywhere; then all but the last batch is loaded.
        let mut expected = engine.write(bench, 90)?;
        let mut loads = Vec::new();
        let (_, loaded) = saved.split_last().ok_or("no batches")?;
        for (pages, blocks) in batches().iter().zip(loaded) {
            let forever = std::time::Duration::from_secs(600);
            let slot = transfer.wait_slot(bytes, forever)?;
            let mut slot = slot.ok_or("no slot came back")?;
            slot.copy_from_slice(blocks);
            loads.push(transfer.load(&engine.pool, pages, slot, None, ())?);
            engine.pieces(pages, |shape, at, block, length| {
                expected[shape][at..at + length].copy_from_slice(&blocks[block..block + length]);
            });
        }
        for load in loads {
            load.wait()?;
        }
        ensure!(
            engine.read(bench)? == expected,
            "loaded other bytes, or elsewhere"
        );
        ensure!(transfer.slots_in_use() == 0, "a slot did not come back");
    }
    Ok(())
}

pub(super) fn keep_to_the_engines_turn(bench: &Bench) -> Outcome {
    let (engine, transfer) = (Engine::new(bench)?, transfer(bench, 4, 2)?);
    let theirs = bench.device.stream()?;
    // SAFETY: `theirs` lives to the end of this function.
    let stream = unsafe { bench.device.adopt_stream(theirs.handle()) }?;
    let pages: Vec<u32> = (0..3).collect();
    let bytes = engine.pool.batch_bytes(3) as usize;
    for seed in 100..104 {
        let memory = engine.memory[0].whole();
        let compute = bench.filled(memory.len_bytes(), seed);
        theirs.upload(compute.clone(), &memory)?;
        let slot = transfer.slot(bytes)?.ok_or("no slot")?;
        let saving = transfer.save(&engine.pool, &pages, slot, Some(&stream.record()?), ())?;
        // The engine goes on, but not before its pages were read.
        stream.wait_for(saving.event())?;
        let later = bench.filled(memory.len_bytes(), seed + 1000);
        theirs.upload(later, &memory)?;
        let saved = saving.wait()?;
        ensure!(
            saved[..4096] == compute[..4096],
            "round {seed}: saved before or after its turn"
        );
        // It computes on its pages, then they are loaded, then it copies what it finds.
        let mut slot = transfer.slot(bytes)?.ok_or("no slot")?;
        fill(&mut slot, seed + 2000);
        let blocks = slot.to_vec();
        let found = bench.device.alloc(4096)?;
        let loading = transfer.load(&engine.pool, &pages, slot, Some(&stream.record()?), ())?;
        stream.wait_for(loading.event())?;
        theirs
            .copy(&memory.span(0, 4096)?, &found.whole())?
            .wait()?;
        ensure!(
            bench.read(&found.whole())? == blocks[..4096],
            "round {seed}: the engine read before its turn"
        );
        loading.wait()?;
    }
    Ok(())
}

pub(super) fn are_checked(bench: &Bench) -> Outcome {
    let (engine, second) = (Engine::new(bench)?, transfer(bench, 1, 1)?);
    let transfer = transfer(bench, 2, 1)?;
    ensure!(
        second.locked_bytes() == 64 << 10 && transfer.locked_bytes() == 128 << 10,
        "two transfers do not lock their own"
    );
    let before = engine.write(bench, 110)?;
    let bytes = engine.pool.batch_bytes(2) as usize;
    let slot = |bytes| -> Result<Staged, Box<dyn std::error::Error>> {
        transfer.slot(bytes)?.ok_or_else(|| "no slot".into())
    };
    let refused = transfer.save(&engine.pool, &[0, PAGES], slot(bytes)?, None, ());
    ensure!(
        matches!(refused, Err(TransferError::Device(DeviceError::Plan(_)))),
        "a page that is not there: {refused:?}"
    );
    let refused = transfer.load(&engine.pool, &[1, 1], slot(bytes)?, None, ());
    ensure!(
        matches!(refused, Err(TransferError::Device(DeviceError::Plan(_)))),
        "a page twice: {refused:?}"
    );
    let refused = transfer.load(&engine.pool, &[0, 1], slot(bytes - 1)?, None, ());
    ensure!(
        matches!(refused, Err(TransferError::Length { .. })),
        "a slot too short: {refused:?}"
    );
    for length in [0, (64 << 10) + 1] {
        let refused = transfer.slot(length);
        ensure!(
            matches!(refused, Err(TransferError::Batch { .. })),
            "{length} bytes: {refused:?}"
        );
    }
    ensure!(transfer.slots_in_use() == 0, "a refusal kept its slot");
    let (_first, _second) = (slot(10)?, slot(64 << 10)?);
    ensure!(transfer.slot(10)?.is_none(), "a slot more than there are");
    ensure!(
        engine.read(bench)? == before,
        "a refusal wrote to the engine's pages"
    );
    for config in [(4095, 1, 1), (4096, 0, 1), (4096, 1, 9)] {
        let (slot_bytes, slots, lanes) = config;
        let config = TransferConfig {
            slot_bytes,
            slots,
            lanes,
        };
        let refused = Transfer::new(Arc::clone(&bench.device), config);
        ensure!(
            matches!(refused, Err(TransferError::Config { .. })),
            "{config:?}"
        );
    }
    Ok(())
}
