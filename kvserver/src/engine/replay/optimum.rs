//! The offline optimum: what a policy that knows the future would have hit.
//!
//! Belady with refusal and prefix semantics: after each request, the blocks whose next use is furthest away are
//! given up, the request's own included; of equal next uses (one chain) the tail goes first. Not a proven optimum
//! under prefix semantics, and within a hair of one: no causal policy reaches it.

use std::collections::BTreeSet;

use super::Trace;

/// Prefix hits over the whole trace with room for `capacity` blocks.
pub(super) fn prefix_hits(trace: &Trace, capacity: u64) -> u64 {
    let next_uses = next_uses(trace);
    let mut present: BTreeSet<(u32, u32, u32)> = BTreeSet::new(); // (next use, depth, block): last goes first
    let mut entry: Vec<Option<(u32, u32, u32)>> = vec![None; trace.unique_blocks() as usize];
    let (mut hits, mut at) = (0, 0);
    for request in trace.requests() {
        hits += request
            .iter()
            .take_while(|block| entry[**block as usize].is_some())
            .count() as u64;
        for (depth, &block) in request.iter().enumerate() {
            if let Some(old) = entry[block as usize].take() {
                present.remove(&old);
            }
            let next_use = next_uses[at];
            at += 1;
            if next_use != u32::MAX {
                let new = (next_use, depth as u32, block);
                present.insert(new);
                entry[block as usize] = Some(new);
            }
        }
        while present.len() as u64 > capacity {
            if let Some((_, _, block)) = present.pop_last() {
                entry[block as usize] = None;
            }
        }
    }
    hits
}

/// For each reference, the number of the next request that names the same block; `u32::MAX` if none does.
fn next_uses(trace: &Trace) -> Vec<u32> {
    let mut upcoming = vec![u32::MAX; trace.unique_blocks() as usize];
    let mut next_uses = vec![u32::MAX; trace.block_refs() as usize];
    let requests: Vec<&[u32]> = trace.requests().collect();
    let mut at = next_uses.len();
    for (number, request) in requests.iter().enumerate().rev() {
        for &block in request.iter().rev() {
            at -= 1;
            next_uses[at] = upcoming[block as usize];
        }
        for &block in *request {
            upcoming[block as usize] = number as u32;
        }
    }
    next_uses
}
