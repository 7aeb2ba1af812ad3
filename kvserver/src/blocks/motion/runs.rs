//! Chains and the runs in them: what of a question lies in which run, and how the blocks of a run are asked for.
//!
//! ```text
//! a question   b0 b1 b2 b3 │ b4 b5 b6 b7 │ b8            ─► stretches, one per run
//! a run        b4 ─ b5 ─ b6 ─ b7                          ─► chains, of which each block is in exactly one
//!                    └─ c6                                    (two prompts that part inside a run share it)
//! ```
//!
//! Pure. Units: blocks. Errors: none.

use std::collections::{BTreeMap, BTreeSet};

use kvproto::{BlockKey, Chain, Part, RunHash, SequenceHash};

use crate::engine::HeldBlock;

/// The consecutive blocks of a question that lie in one run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stretch {
    pub(super) run: RunHash,
    pub(super) chain: Chain,
}

/// Cuts the blocks of `chain` from number `from` on at the borders of runs, and where it jumps; at most `most` of them.
pub(super) fn stretches(chain: &Chain, run_blocks: u32, from: usize, most: usize) -> Vec<Stretch> {
    let mut found = Vec::new();
    let mut start = from;
    while start < chain.len() && found.len() < most {
        let first = chain.place(start, run_blocks);
        let mut end = start + 1;
        while end < chain.len() {
            let place = chain.place(end, run_blocks);
            let follows =
                place.run == first.run && place.index == first.index + (end - start) as u32;
            if !follows {
                break;
            }
            end += 1;
        }
        found.push(Stretch {
            run: first.run,
            chain: chain.slice(start..end, run_blocks),
        });
        start = end;
    }
    found
}

/// A chain of blocks that are held in the same parts.
#[derive(Clone, Debug)]
pub(super) struct HeldChain {
    pub(super) chain: Chain,
    pub(super) parts: Vec<Part>,
    /// In the order of an answer: block `i` in part `p` is number `i * parts + p`.
    pub(super) blocks: Vec<HeldBlock>,
}

/// The blocks of one run as chains, each block in exactly one.
pub(super) fn chains(blocks: &[HeldBlock], run_blocks: u32) -> Vec<HeldChain> {
    // What is held of each hash, by part.
    let mut held: BTreeMap<SequenceHash, BTreeMap<Part, HeldBlock>> = BTreeMap::new();
    for block in blocks {
        held.entry(block.key.hash)
            .or_default()
            .insert(block.key.part, *block);
    }
    let mut children: BTreeMap<SequenceHash, Vec<SequenceHash>> = BTreeMap::new();
    let mut starts: Vec<(u32, SequenceHash)> = Vec::new();
    for (hash, parts) in &held {
        let Some(block) = parts.values().next() else {
            continue;
        };
        starts.push((block.place.index, *hash));
        if let Some(parent) = block.place.parent {
            children.entry(parent).or_default().push(*hash);
        }
    }
    starts.sort_unstable();
    let parts_of = |hash: &SequenceHash| -> Vec<Part> {
        held.get(hash)
            .map(|parts| parts.keys().copied().collect())
            .unwrap_or_default()
    };
    let mut taken: BTreeSet<SequenceHash> = BTreeSet::new();
    let mut found = Vec::new();
    for (index, start) in starts {
        if !taken.insert(start) {
            continue;
        }
        let parts = parts_of(&start);
        let mut hashes = vec![start];
        let mut at = start;
        while let Some(next) = children.get(&at).and_then(|next| {
            let fits = |hash: &&SequenceHash| !taken.contains(*hash) && parts_of(hash) == parts;
            next.iter().find(fits)
        }) {
            at = *next;
            taken.insert(at);
            hashes.push(at);
        }
        let blocks: Vec<HeldBlock> = hashes
            .iter()
            .filter_map(|hash| held.get(hash))
            .flat_map(|parts| parts.values().copied())
            .collect();
        let Some(first) = blocks.first() else {
            continue;
        };
        found.push(HeldChain {
            chain: Chain {
                first_index: index,
                run: (!index.is_multiple_of(run_blocks)).then_some(first.place.run),
                parent: first.place.parent,
                hashes,
                jumps: Vec::new(),
            },
            parts,
            blocks,
        });
    }
    found
}

/// The keys of a question, block by block and part by part.
pub(super) fn keys<'a>(
    namespace: kvproto::NamespaceId,
    chain: &'a Chain,
    parts: &'a [Part],
) -> impl Iterator<Item = BlockKey> + 'a {
    chain.hashes.iter().flat_map(move |hash| {
        parts.iter().map(move |part| BlockKey {
            namespace,
            hash: *hash,
            part: *part,
        })
    })
}

#[cfg(test)]
mod tests {
    use kvproto::{Kind, NamespaceId};

    use super::*;

    fn hash(n: u8) -> SequenceHash {
        SequenceHash([n; 32])
    }

    fn chain(from: u8, blocks: u8) -> Chain {
        Chain::from_root((from..from + blocks).map(hash).collect())
    }

    #[test]
    fn a_question_is_cut_where_runs_begin() {
        let cut = stretches(&chain(1, 10), 4, 2, 9);
        let lengths: Vec<usize> = cut.iter().map(|stretch| stretch.chain.len()).collect();
        assert_eq!(lengths, [2, 4, 2]);
        assert_eq!(cut[0].run, hash(1).into());
        assert_eq!(
            cut[0].chain.run,
            Some(hash(1).into()),
            "it begins inside its run"
        );
        assert_eq!((cut[1].run, cut[1].chain.run), (hash(5).into(), None));
        assert_eq!(cut[1].chain.parent, Some(hash(4)));
        for stretch in &cut {
            stretch.chain.validate(4).unwrap();
        }
        assert_eq!(
            stretches(&chain(1, 10), 4, 0, 2).len(),
            2,
            "no more than asked"
        );
    }

    fn held(chain: &Chain, i: usize, part: u16) -> HeldBlock {
        HeldBlock {
            key: BlockKey {
                namespace: NamespaceId([1; 16]),
                hash: chain.hashes[i],
                part: Part {
                    rank: part,
                    layer_group: 0,
                },
            },
            place: chain.place(i, 4),
            length_bytes: 8,
            kind: Kind::Kv,
        }
    }

    #[test]
    fn every_block_of_a_run_is_in_exactly_one_chain() {
        let long = chain(1, 8);
        // Parts at its sixth block into another prompt.
        let mut other = long.clone();
        other.hashes[5] = hash(66);
        other.hashes[6] = hash(67);
        let mut blocks: Vec<HeldBlock> = (4..8).map(|i| held(&long, i, 0)).collect();
        blocks.extend([held(&other, 5, 0), held(&other, 6, 0)]);
        let found = chains(&blocks, 4);
        let hashes: Vec<&[SequenceHash]> = found.iter().map(|c| &c.chain.hashes[..]).collect();
        assert_eq!(hashes, [&long.hashes[4..8], &other.hashes[5..7]]);
        assert_eq!(found[1].chain.run, Some(long.hashes[4].into()));
        for chain in &found {
            chain.chain.validate(4).unwrap();
            for (i, block) in chain.blocks.iter().enumerate() {
                assert_eq!(chain.chain.place(i, 4), block.place);
            }
        }
    }

    #[test]
    fn a_gap_and_other_parts_begin_another_chain() {
        let long = chain(1, 4);
        let mut blocks: Vec<HeldBlock> = [0, 1, 3].map(|i| held(&long, i, 0)).to_vec();
        blocks.push(held(&long, 0, 1));
        let found = chains(&blocks, 4);
        let shape: Vec<(u32, usize, usize)> = found
            .iter()
            .map(|c| (c.chain.first_index, c.chain.len(), c.parts.len()))
            .collect();
        assert_eq!(shape, [(0, 1, 2), (1, 1, 1), (3, 1, 1)]);
        assert_eq!(found.iter().map(|c| c.blocks.len()).sum::<usize>(), 4);
    }
}
