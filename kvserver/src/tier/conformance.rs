//! What every [`Tier`] keeps, as one suite that runs over each of them, wrappers included.
//!
//! ```text
//! conformance(open)    open: make the tier over the same folder again and again
//!    write · read · twin · too small a slot · remove · re-put · in flight · many · reopen · closed
//! ```
//!
//! It panics with the fact that was broken. What differs between tiers is taken from what they promise
//! themselves: [`Tier::durability`] says whether a refused or evicted block is allowed, and so does the
//! outcome of each write.
//!
//! Why in the library and not beside the tests: who writes a new tier runs it from wherever that tier is.

use std::{future::Future, sync::Arc};

use kvgpu::SlotMut;
use kvproto::{BlockHeader, BlockKey, NamespaceId, Part, Place, Reason, RunHash, SequenceHash};

use super::{BlockRef, Durability, MutableBlock, Read, Resident, Tier, WriteOutcome};

/// A block of the test's own making: its bytes follow from the number and the version.
#[must_use]
pub fn block(number: u32, length_bytes: usize) -> BlockRef {
    block_in(namespace(1), number, 0, length_bytes)
}

/// As [`block`], in a namespace and with other bytes for every version.
#[must_use]
pub fn block_in(
    namespace: NamespaceId,
    number: u32,
    version: u32,
    length_bytes: usize,
) -> BlockRef {
    let (key, place) = (key_in(namespace, number), place(number));
    let mut block = MutableBlock::new(key, place, length_bytes as u64, SlotMut::heap(length_bytes));
    fill(number, version, block.bytes_mut());
    let header = BlockHeader::describe(key, place, block.bytes());
    block
        .seal(header)
        .expect("it was described as it is")
        .share()
}

/// A namespace of the tests.
#[must_use]
pub fn namespace(number: u8) -> NamespaceId {
    NamespaceId([number; 16])
}

/// The key of [`block`].
#[must_use]
pub fn key(number: u32) -> BlockKey {
    key_in(namespace(1), number)
}

fn key_in(namespace: NamespaceId, number: u32) -> BlockKey {
    BlockKey {
        namespace,
        hash: hash(number),
        part: Part::default(),
    }
}

fn place(number: u32) -> Place {
    let parent = (number > 0).then(|| hash(number - 1));
    Place {
        run: RunHash(hash(number / 16 * 16).0),
        index: number,
        parent,
    }
}

fn hash(number: u32) -> SequenceHash {
    let mut bytes = [0; 32];
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = (number.wrapping_mul(0x9e37_79b9).rotate_left(at as u32) >> 7) as u8 ^ at as u8;
    }
    bytes[..4].copy_from_slice(&number.to_le_bytes());
    SequenceHash(bytes)
}

/// Bytes that differ from block to block, from version to version and within a block.
pub fn fill(number: u32, version: u32, bytes: &mut [u8]) {
    let mut word = (u64::from(number) << 32 | u64::from(version)) ^ 0x9e37_79b9_7f4a_7c15;
    for piece in bytes.chunks_mut(8) {
        word = word
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        piece.copy_from_slice(&word.to_le_bytes()[..piece.len()]);
    }
}

/// Reads into a slot of exactly the resident's length.
pub async fn read(tier: &dyn Tier, resident: Resident) -> Read {
    tier.read(resident, SlotMut::heap(resident.length_bytes as usize))
        .await
}

/// Whether the tier has exactly these bytes; panics when it hands out others.
pub async fn has(tier: &dyn Tier, expected: &BlockRef) -> bool {
    match read(tier, Resident::of(expected)).await {
        Read::Hit(found) => {
            assert_eq!(
                found.header(),
                expected.header(),
                "a hit is the block that was asked for"
            );
            assert!(
                found.bytes() == expected.bytes(),
                "a hit has the bytes that were written"
            );
            true
        }
        Read::Gone(_) | Read::Busy => false,
    }
}

async fn must_hold(tier: &dyn Tier, blocks: &[BlockRef]) {
    for (block, outcome) in blocks.iter().zip(tier.write(blocks.to_vec()).await) {
        let expected = match tier.durability() {
            Durability::Droppable => WriteOutcome::Stored,
            Durability::Durable => WriteOutcome::Synced,
        };
        assert_eq!(
            outcome,
            expected,
            "an idle tier with room takes {:?}",
            block.key()
        );
    }
}

fn lists(tier: &dyn Tier, block: &BlockRef) -> bool {
    tier.residents().contains(&Resident::of(block))
}

/// Runs the suite; `open` opens the tier over the same folder, which is empty at first, and has room for
/// 8 MiB at least.
///
/// # Panics
/// When the tier breaks one of its promises; the message is the promise.
pub async fn conformance<O, F>(open: O)
where
    O: Fn() -> F,
    F: Future<Output = Arc<dyn Tier>>,
{
    let tier = open().await;
    what_was_written_is_read_back(&*tier).await;
    every_length_is_exact(&*tier).await;
    a_wrong_resident_is_a_miss(&*tier).await;
    the_same_block_again_is_held_and_not_written(&*tier).await;
    other_bytes_under_a_key_replace_it(&*tier).await;
    removed_is_gone_and_may_come_again(&*tier).await;
    a_namespace_goes_as_a_whole(&*tier).await;
    a_removal_overtakes_a_write(&*tier).await;
    many_at_once_are_all_answered(&*tier).await;
    an_empty_write_and_an_unknown_key_are_fine(&*tier).await;
    reopening_keeps_what_was_stored_and_nothing_else(tier, &open).await;
    a_closed_tier_answers(open().await).await;
}

async fn what_was_written_is_read_back(tier: &dyn Tier) {
    let written: Vec<BlockRef> = (0..8).map(|n| block(n, 100_000 + n as usize)).collect();
    must_hold(tier, &written).await;
    for block in &written {
        assert!(has(tier, block).await, "what was stored is read back");
        assert!(lists(tier, block), "what was stored is a resident");
        assert_eq!(block.strong_count(), 1, "a finished write holds no slot");
    }
    let status = tier.status();
    assert!(
        status.in_service && status.blocks >= 8 && status.used_bytes >= 800_000,
        "{status:?}"
    );
    assert_eq!(
        status.queued_bytes, 0,
        "nothing waits when nothing is written"
    );
}

async fn every_length_is_exact(tier: &dyn Tier) {
    let lengths = [
        1, 7, 4095, 4096, 4097, 65_535, 65_536, 65_537, 131_072, 200_001,
    ];
    let written: Vec<BlockRef> = lengths
        .iter()
        .enumerate()
        .map(|(n, &length)| block(100 + n as u32, length))
        .collect();
    must_hold(tier, &written).await;
    for block in &written {
        assert!(
            has(tier, block).await,
            "{} bytes come back as they were",
            block.len_bytes()
        );
    }
}

async fn a_wrong_resident_is_a_miss(tier: &dyn Tier) {
    let known = block(0, 100_000);
    for change in [
        |r: &mut Resident| r.seal ^= 1,
        |r: &mut Resident| r.key.part.rank = 9,
        |r: &mut Resident| r.key = key(999_999),
    ] {
        let mut resident = Resident::of(&known);
        change(&mut resident);
        let found = read(tier, resident).await;
        assert!(
            matches!(found, Read::Gone(_)),
            "another seal or key is not this block: {found:?}"
        );
    }
    assert!(has(tier, &known).await, "and asking for it harms nobody");
}

async fn the_same_block_again_is_held_and_not_written(tier: &dyn Tier) {
    let before = tier.status();
    must_hold(tier, &[block(0, 100_000)]).await;
    let after = tier.status();
    assert_eq!(before.blocks, after.blocks, "a twin is not counted twice");
    assert_eq!(
        before.written_bytes_today, after.written_bytes_today,
        "a twin is not written again"
    );
}

async fn other_bytes_under_a_key_replace_it(tier: &dyn Tier) {
    let (old, new) = (
        block_in(namespace(1), 200, 1, 50_000),
        block_in(namespace(1), 200, 2, 60_000),
    );
    must_hold(tier, std::slice::from_ref(&old)).await;
    must_hold(tier, std::slice::from_ref(&new)).await;
    assert!(has(tier, &new).await, "the later bytes are there");
    assert!(!has(tier, &old).await, "the earlier bytes are not");
    assert_eq!(
        tier.residents()
            .iter()
            .filter(|r| r.key == *new.key())
            .count(),
        1,
        "one entry per key"
    );
}

async fn removed_is_gone_and_may_come_again(tier: &dyn Tier) {
    let [gone, back] = [block(300, 70_000), block(301, 70_000)];
    must_hold(tier, &[gone.clone(), back.clone()]).await;
    tier.remove(&[*gone.key(), *back.key()])
        .await
        .expect("removal is durable");
    assert!(
        !has(tier, &gone).await && !has(tier, &back).await,
        "removed is gone"
    );
    assert!(!lists(tier, &gone), "removed is no resident");
    must_hold(tier, std::slice::from_ref(&back)).await;
    assert!(
        has(tier, &back).await,
        "put again after a removal is present again"
    );
}

async fn a_namespace_goes_as_a_whole(tier: &dyn Tier) {
    let others: Vec<BlockRef> = (0..5)
        .map(|n| block_in(namespace(7), n, 0, 30_000))
        .collect();
    must_hold(tier, &others).await;
    tier.remove_namespace(namespace(7))
        .await
        .expect("removal is durable");
    for block in &others {
        assert!(!has(tier, block).await, "all of the namespace is gone");
    }
    assert!(
        has(tier, &block(0, 100_000)).await,
        "the same numbers elsewhere stay"
    );
    must_hold(tier, &others[..1]).await;
    assert!(
        has(tier, &others[0]).await,
        "put again, it is present again"
    );
}

async fn a_removal_overtakes_a_write(tier: &dyn Tier) {
    for round in 0..20 {
        let racing = block(400 + round, 300_000);
        let writing = tier.write(vec![racing.clone()]);
        let removing = tier.remove(&[*racing.key()]);
        let (outcomes, removed) = futures_util::future::join(writing, removing).await;
        removed.expect("removal is durable");
        // Which came first is not ours to say; but both must tell the same story.
        assert_eq!(
            outcomes[0].is_held() && lists(tier, &racing),
            has(tier, &racing).await
        );
        tier.remove(&[*racing.key()])
            .await
            .expect("removal is durable");
        assert!(
            !has(tier, &racing).await && !lists(tier, &racing),
            "after a removal it is gone"
        );
    }
}

async fn many_at_once_are_all_answered(tier: &dyn Tier) {
    let batches: Vec<Vec<BlockRef>> = (0..4)
        .map(|b| (0..16).map(|n| block(1000 + b * 16 + n, 65_536)).collect())
        .collect();
    let writes = batches.iter().map(|batch| tier.write(batch.clone()));
    for (batch, outcomes) in batches
        .iter()
        .zip(futures_util::future::join_all(writes).await)
    {
        assert_eq!(batch.len(), outcomes.len(), "one outcome per block");
        for (block, outcome) in batch.iter().zip(outcomes) {
            assert_eq!(
                outcome.is_held(),
                has(tier, block).await,
                "{outcome:?} says what is so"
            );
        }
    }
}

async fn an_empty_write_and_an_unknown_key_are_fine(tier: &dyn Tier) {
    assert!(tier.write(Vec::new()).await.is_empty());
    tier.remove(&[]).await.expect("nothing to remove");
    tier.remove(&[key(123_456)])
        .await
        .expect("nobody of that name");
}

async fn reopening_keeps_what_was_stored_and_nothing_else<O, F>(tier: Arc<dyn Tier>, open: &O)
where
    O: Fn() -> F,
    F: Future<Output = Arc<dyn Tier>>,
{
    tier.close().await;
    // Listed now and not before: until it is closed, a tier may make room in the background.
    let mut before = tier.residents();
    drop(tier);
    let tier = open().await;
    let mut after = tier.residents();
    before.sort_by_key(|r| r.key);
    after.sort_by_key(|r| r.key);
    assert_eq!(before, after, "a clean restart changes nothing");
    for number in 0..8 {
        assert!(
            has(&*tier, &block(number, 100_000 + number as usize)).await,
            "and it is readable"
        );
    }
    assert!(
        has(&*tier, &block_in(namespace(1), 200, 2, 60_000)).await,
        "the later bytes survived"
    );
    assert!(
        !has(&*tier, &block(300, 70_000)).await,
        "removed stays gone"
    );
    assert!(
        has(&*tier, &block(301, 70_000)).await,
        "put again after a removal stays present"
    );
    assert!(
        !has(&*tier, &block_in(namespace(7), 1, 0, 30_000)).await,
        "a removed namespace stays gone"
    );
    assert!(
        has(&*tier, &block_in(namespace(7), 0, 0, 30_000)).await,
        "but for what came later"
    );
    tier.close().await;
}

async fn a_closed_tier_answers(tier: Arc<dyn Tier>) {
    tier.close().await;
    tier.close().await;
    let down = WriteOutcome::Rejected {
        reason: Reason::TierDown,
        retry_after_ms: 0,
    };
    assert_eq!(
        tier.write(vec![block(1, 1000)]).await,
        [down],
        "a closed tier takes nothing"
    );
    let found = read(&*tier, Resident::of(&block(0, 100_000))).await;
    assert!(
        matches!(found, Read::Gone(Reason::TierDown)),
        "a closed tier has nothing: {found:?}"
    );
    assert!(!tier.status().in_service);
}
