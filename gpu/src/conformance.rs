//! What every device must do, as one suite that runs over any of them.
//!
//! The host device passes it in every test run; `kvgpu-check` runs it on a GPU. Expected bytes are
//! computed here from the layouts' definition, independently of strides, plans and kernels.

macro_rules! ensure {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return Err(format!($($message)+).into());
        }
    };
}

mod batches;
mod engine;
mod paged;
mod transfer;

use std::sync::Arc;

use bytes::Bytes;

use crate::arena::{Arena, ArenaConfig, DomainId};
use crate::device::{Device, DeviceSpan};
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

/// What a check works with.
struct Bench {
    device: Arc<dyn Device>,
    arena: Arc<Arena>,
}

/// Runs the whole suite. Takes a few tens of megabytes of device and host memory.
pub fn run(device: &Arc<dyn Device>) -> Vec<Check> {
    let checks: [(&'static str, Test); 21] = [
        ("a device names and sizes itself", transfer::names_itself),
        (
            "new memory is zero and counted",
            transfer::memory_is_zero_and_counted,
        ),
        (
            "too much memory is refused and harms nothing",
            transfer::too_much_is_refused,
        ),
        (
            "bytes come back as they went, at any length",
            transfer::bytes_come_back,
        ),
        (
            "ranges outside their memory are refused",
            transfer::ranges_are_checked,
        ),
        (
            "lengths that differ are refused and the slot comes back",
            transfer::lengths_are_checked,
        ),
        (
            "operations of one stream happen in order",
            transfer::one_stream_is_ordered,
        ),
        (
            "streams are ordered by events",
            transfer::streams_are_ordered_by_events,
        ),
        (
            "copies within the device move the bytes named",
            transfer::copies_within,
        ),
        (
            "gather makes the block of every layout",
            paged::gather_makes_blocks,
        ),
        (
            "scatter undoes gather and touches no other page",
            paged::scatter_undoes_gather,
        ),
        (
            "plans that do not fit are refused",
            paged::plans_are_checked,
        ),
        (
            "page-locked slots save and load pages",
            paged::page_locked_round_trip,
        ),
        (
            "adopted memory is its owner's, and is neither freed nor counted",
            engine::adopted_memory_is_its_owners,
        ),
        (
            "what is not the device's is not adopted, and overlaps are found by address",
            engine::adoption_is_checked,
        ),
        (
            "our streams wait for an engine's, and it for ours",
            engine::streams_wait_for_each_other,
        ),
        (
            "gather and scatter keep to every vLLM order of one adopted tensor",
            engine::every_vllm_order,
        ),
        (
            "layers of several shapes share their blocks",
            engine::shapes_share_blocks,
        ),
        (
            "batches leave and enter an engine's pages as its blocks, several at once",
            batches::come_and_go,
        ),
        (
            "batches and the engine's stream wait for each other",
            batches::keep_to_the_engines_turn,
        ),
        (
            "batches that cannot be are refused, and no slot is lost",
            batches::are_checked,
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
