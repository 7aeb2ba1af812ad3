//! What must hold for any chain, any owners and any answers.

use std::{sync::Arc, time::Duration};

use kvproto::{
    Chain, Member, MemberId, MemberState, NamespaceKey, SequenceHash, ViewDigest, hash,
    key::RunHash,
};
use proptest::{
    collection::vec,
    prelude::{Strategy, any, prop_assert, prop_assert_eq, proptest},
};

use super::{Assembly, GHOST_AFTER, Known, Split, Table};
use crate::clock::Tick;

const NOW: Tick = Tick(Duration::ZERO);
const KEY: NamespaceKey = NamespaceKey::from_bytes([5; 32]);

fn chain(blocks: usize) -> Chain {
    let tokens: Vec<u32> = (0..blocks as u32).collect();
    Chain::from_root(hash::chain(&KEY, 1, &tokens))
}

fn member(id: usize, version: u64, state: MemberState) -> Member {
    Member {
        id: MemberId(format!("m{id:02}")),
        generation: 1,
        version,
        weight: 1,
        zone: String::new(),
        state,
        address: format!("127.0.0.1:{}", 7000 + id),
    }
}

/// Any owner for any run: what splitting and assembling must work for.
fn owner(salt: u8, members: usize) -> impl Fn(&RunHash) -> usize {
    move |run| usize::from(run.0[0] ^ salt) % members
}

/// A chain, how it is cut and owned, and which of its blocks are there.
#[derive(Clone, Debug)]
struct World {
    chain: Chain,
    run_blocks: u32,
    salt: u8,
    members: usize,
    present: Vec<bool>,
}

fn world() -> impl Strategy<Value = World> {
    let sizes = (1usize..90, 1u32..9, any::<u8>(), 1usize..9);
    let present = vec(proptest::bool::weighted(0.97), 90);
    (sizes, present, 0usize..90, 1usize..90).prop_map(
        |((blocks, run_blocks, salt, members), present, first, len)| {
            let whole = chain(blocks);
            let first = first % blocks;
            let chain = whole.slice(first..(first + len).min(blocks), run_blocks);
            World {
                chain,
                run_blocks,
                salt,
                members,
                present,
            }
        },
    )
}

impl World {
    fn split(&self) -> Split {
        let owner = owner(self.salt, self.members);
        Split::new(&self.chain, self.run_blocks, owner)
    }

    /// What one node with everything would answer.
    fn oracle(&self) -> usize {
        let present = &self.present[..self.chain.len()];
        present.iter().take_while(|present| **present).count()
    }

    /// What the owner of a share answers for the chain that it is asked for.
    fn answer(&self, split: &Split, number: usize) -> usize {
        let positions = split.shares[number].ranges.iter().cloned().flatten();
        positions.take_while(|at| self.present[*at]).count()
    }
}

proptest! {
    #[test]
    fn every_block_is_in_exactly_one_share_and_that_is_its_owners(world in world()) {
        let split = world.split();
        let by_position = split.shares_by_position();
        prop_assert_eq!(split.blocks, world.chain.len());
        prop_assert_eq!(split.shares.iter().map(|s| s.blocks()).sum::<usize>(), split.blocks);
        let owner = owner(world.salt, world.members);
        for (at, share) in by_position.iter().enumerate() {
            let run = world.chain.place(at, world.run_blocks).run;
            let share = &split.shares[share.unwrap()];
            prop_assert_eq!(share.member, owner(&run));
        }
        for share in &split.shares {
            prop_assert!(share.ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
            let asked = share.chain(&world.chain, world.run_blocks);
            prop_assert_eq!(asked.validate(world.run_blocks), Ok(()));
            for (i, at) in share.ranges.iter().cloned().flatten().enumerate() {
                prop_assert_eq!(share.position(i), Some(at));
                prop_assert_eq!(share.before(at), i);
                prop_assert_eq!(asked.hashes[i], world.chain.hashes[at]);
                prop_assert_eq!(
                    asked.place(i, world.run_blocks), world.chain.place(at, world.run_blocks)
                );
            }
            prop_assert_eq!(share.position(share.blocks()), None);
        }
        let first: Vec<usize> = split.shares.iter().map(|share| share.first()).collect();
        prop_assert!(first.is_sorted());
        // The same, said block by block.
        let members = by_position.iter().map(|s| s.map(|s| split.shares[s].member));
        prop_assert_eq!(&Split::of(members), &split);
    }

    #[test]
    fn answers_in_any_order_give_the_prefix_of_one_node(
        world in world(), order in any::<proptest::sample::Index>(), turn in any::<bool>(),
    ) {
        let split = world.split();
        let mut assembly = Assembly::new(&split);
        let mut numbers: Vec<usize> = (0..split.shares.len()).collect();
        numbers.rotate_left(order.index(split.shares.len()));
        if turn {
            numbers.reverse();
        }
        let mut settled_at = None;
        for number in numbers {
            assembly.answered(number, world.answer(&split, number));
            prop_assert!(assembly.prefix() <= world.oracle() && world.oracle() <= assembly.most());
            if assembly.is_settled() && settled_at.is_none() {
                settled_at = Some(assembly.prefix());
            }
        }
        prop_assert_eq!(assembly.prefix(), world.oracle());
        // Nothing that came after it was settled has changed it.
        prop_assert_eq!(settled_at, Some(world.oracle()));
    }

    #[test]
    fn a_lost_owner_cuts_the_prefix_at_its_first_block_and_nothing_before_it(
        world in world(), lost in any::<proptest::sample::Index>(),
    ) {
        let split = world.split();
        let mut assembly = Assembly::new(&split);
        let lost = lost.index(split.shares.len());
        for number in (0..split.shares.len()).filter(|number| *number != lost) {
            assembly.answered(number, world.answer(&split, number));
        }
        let silent = assembly.prefix();
        assembly.lost(lost);
        prop_assert!(assembly.is_settled());
        prop_assert_eq!(assembly.prefix(), world.oracle().min(split.shares[lost].first()));
        // Being late is the same as being lost.
        prop_assert_eq!(silent, assembly.prefix());
    }

    #[test]
    fn stretches_of_the_shares_become_stretches_of_the_chain(
        world in world(), what in vec(0u8..3, 90), blocks in 0usize..90,
    ) {
        let split = world.split();
        let assembly = Assembly::new(&split);
        let of_share = |share: &super::Share| {
            let mut stretches: Vec<(u32, u8)> = Vec::new();
            for at in share.ranges.iter().cloned().flatten() {
                match stretches.last_mut() {
                    Some((length, last)) if *last == what[at] => *length += 1,
                    _ => stretches.push((1, what[at])),
                }
            }
            stretches
        };
        let of: Vec<_> = split.shares.iter().map(of_share).collect();
        let blocks = blocks.min(split.blocks);
        let whole = assembly.stretches(blocks, &of);
        let flat: Vec<u8> = whole.iter().flat_map(|(n, w)| vec![*w; *n as usize]).collect();
        prop_assert_eq!(&flat[..], &what[..blocks]);
        prop_assert!(whole.windows(2).all(|pair| pair[0].1 != pair[1].1));
    }

    #[test]
    fn a_table_names_the_owners_that_placement_names(members in 1usize..12, run in any::<[u8; 32]>()) {
        let mut known = Known::default();
        known.merge((0..members).map(|id| member(id, 1, MemberState::Active)), NOW);
        let run = RunHash(run);
        let table = known.table();
        let owners = kvproto::placement::owners(known.view(), &run, 3);
        let numbers = table.owners(&run, 3);
        prop_assert_eq!(table.owner(&run), numbers.first().copied());
        let named: Vec<_> = numbers.iter().map(|number| &table.members()[*number].id).collect();
        let expected: Vec<_> = owners.iter().map(|owner| &owner.id).collect();
        prop_assert_eq!(named, expected);
    }
}

#[test]
fn a_client_that_knows_nobody_says_so_and_asks_nobody() {
    let known = Known::default();
    assert_eq!(known.digest(), ViewDigest(0));
    assert_eq!(known.table().owner(&RunHash([1; 32])), None);
}

#[test]
fn news_make_a_new_table_and_old_news_none() {
    let mut known = Known::default();
    assert!(known.merge([member(1, 1, MemberState::Active)], NOW));
    assert!(known.before().is_none(), "nobody owned anything before");
    let of_one = Arc::clone(known.table());
    assert!(!known.merge([member(1, 1, MemberState::Active)], NOW));
    assert!(Arc::ptr_eq(&of_one, known.table()));
    assert!(known.merge([member(2, 1, MemberState::Active)], NOW));
    assert_eq!(known.before().unwrap().digest(), of_one.digest());
    assert_eq!(known.digest(), known.view().digest());
    let of_two = Arc::clone(known.table());
    // Another address moves no owner: the change before it stays the last one.
    let moved = Member {
        address: "10.0.0.1:7070".to_owned(),
        ..member(2, 2, MemberState::Active)
    };
    assert!(known.merge([moved], NOW));
    assert_eq!(known.table().members()[1].address, "10.0.0.1:7070");
    assert_eq!(known.before().unwrap().digest(), of_one.digest());
    // Who is gone has no number any more, and cannot come back with old news.
    assert!(known.merge([member(2, 3, MemberState::Gone)], NOW));
    assert_eq!(known.table().members().len(), 1);
    assert_eq!(known.before().unwrap().digest(), of_two.digest());
    assert!(!known.merge([member(2, 1, MemberState::Active)], NOW));
}

#[test]
fn who_leaves_is_known_but_owns_nothing() {
    let mut known = Known::default();
    known.merge(
        [
            member(1, 1, MemberState::Active),
            member(2, 1, MemberState::Draining),
        ],
        NOW,
    );
    let table = known.table();
    assert_eq!(table.members().len(), 2);
    assert!((0..50).all(|i| table.owner(&RunHash([i; 32])) == Some(0)));
}

#[test]
fn an_owner_behind_the_gap_need_not_be_waited_for() {
    let chain = Chain::from_root((0..8).map(|i| SequenceHash([i; 32])).collect());
    // Runs of two blocks: owners 0, 1, 0, 2.
    let owners = [0, 1, 0, 2];
    let split = Split::new(&chain, 2, |run| owners[usize::from(run.0[0]) / 2]);
    let mut assembly = Assembly::new(&split);
    assert!(!assembly.is_settled());
    assembly.answered(0, 3);
    assert_eq!((assembly.prefix(), assembly.most()), (2, 5));
    assert!(!assembly.is_settled(), "block 2 is still out");
    assembly.answered(1, 2);
    assert!(assembly.is_settled(), "the gap at 5 is before block 6");
    assert_eq!(assembly.prefix(), 5);
}

#[test]
fn tables_of_equal_views_agree() {
    let mut known = Known::default();
    known.merge((0..5).map(|id| member(id, 1, MemberState::Active)), NOW);
    let again = Table::new(known.view());
    for i in 0..100 {
        let run = RunHash([i; 32]);
        assert_eq!(again.owner(&run), known.table().owner(&run));
    }
}

#[test]
fn a_node_that_came_back_under_another_name_replaces_who_was_there() {
    let mut known = Known::default();
    let old = member(1, 1, MemberState::Active);
    known.merge([old.clone(), member(2, 1, MemberState::Active)], NOW);
    let new = Member {
        id: MemberId("other".to_owned()),
        generation: 2,
        ..old
    };
    assert!(known.merge([new.clone()], NOW));
    let ids: Vec<_> = known
        .table()
        .members()
        .iter()
        .map(|m| m.id.0.clone())
        .collect();
    assert_eq!(ids, ["m02", "other"]);
    let left = kvproto::View::new([member(2, 1, MemberState::Active), new]);
    assert_eq!(known.digest(), left.digest());
}

#[test]
fn whom_no_list_names_any_more_is_forgotten_in_time() {
    let mut known = Known::default();
    let both = [1, 2].map(|id| member(id, 1, MemberState::Active));
    known.merge(both.clone(), NOW);
    let later = |part: u32| Tick(GHOST_AFTER * part / 4);
    assert!(
        !known.merge([both[0].clone()], later(3)),
        "news may be on their way"
    );
    assert!(known.merge([both[0].clone()], later(4)));
    assert_eq!(known.table().members().len(), 1);
    assert!(known.merge(both, later(5)), "and may come back");
    assert_eq!(known.table().members().len(), 2);
}
