//! What is read back of a journal that was cut, flipped, written for others or overgrown.

use kvproto::{BlockKey, NamespaceId, Part, Place, RunHash, SequenceHash};
use proptest::prelude::*;

use super::{format::encode_head, *};
use crate::tier::Resident;

fn key(n: u8) -> BlockKey {
    BlockKey {
        namespace: NamespaceId([n; 16]),
        hash: SequenceHash([n; 32]),
        part: Part::default(),
    }
}

fn stored(n: u8) -> Entry {
    Entry::Stored(Resident {
        key: key(n),
        place: Place {
            run: RunHash([n; 32]),
            index: 0,
            parent: None,
        },
        length_bytes: u64::from(n) * 1000,
        seal: u64::from(n) << 40,
    })
}

fn any_entry() -> impl Strategy<Value = Entry> {
    (0u8..5, any::<u8>(), any::<u64>()).prop_map(|(kind, n, bytes)| match kind {
        0 => stored(n),
        1 => Entry::Gone(key(n)),
        2 => Entry::Invalidated(key(n)),
        3 => Entry::InvalidatedNamespace(NamespaceId([n; 16])),
        _ => Entry::Wear {
            day: u32::from(n),
            bytes,
        },
    })
}

proptest! {
    #[test]
    fn a_prefix_of_the_file_is_a_prefix_of_the_records(
        entries in prop::collection::vec(any_entry(), 0..40), keep: prop::sample::Index,
    ) {
        let bytes = encode(4096, &entries);
        let (all, whole) = parse(&bytes);
        prop_assert_eq!(&all, &entries);
        prop_assert_eq!(whole.tail, Tail::Clean);
        let kept = keep.index(bytes.len() + 1);
        let (some, cut) = parse(&bytes[..kept]);
        prop_assert_eq!(&some[..], &entries[..some.len()]);
        prop_assert!(cut.tail != Tail::Damaged);
        prop_assert_eq!(cut.tail == Tail::Clean, kept > 0 && cut.good_bytes as usize == kept);
    }

    #[test]
    fn a_flip_before_the_last_record_is_damage_and_in_it_a_torn_tail(
        entries in prop::collection::vec(any_entry(), 2..20), at: prop::sample::Index, bit in 0u8..8,
    ) {
        let mut bytes = encode(4096, &entries);
        let last = encode(4096, &entries[..entries.len() - 1]).len();
        let at = HEAD_BYTES + at.index(bytes.len() - HEAD_BYTES);
        bytes[at] ^= 1 << bit;
        let (found, summary) = parse(&bytes);
        prop_assert_eq!(&found[..], &entries[..found.len()]);
        prop_assert_eq!(summary.tail, if at < last { Tail::Damaged } else { Tail::Torn });
    }

    #[test]
    fn any_bytes_are_answered(bytes: Vec<u8>) {
        let _ = parse(&bytes);
        let mut behind_a_head = encode_head(7);
        behind_a_head.extend_from_slice(&bytes);
        let _ = parse(&behind_a_head);
    }
}

#[test]
fn what_was_flushed_is_read_back_and_a_torn_tail_is_cut() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("journal");
    let (journal, found) = Journal::open(&path, 4096, |_| ()).expect("opened");
    assert_eq!(found.tail, Tail::Torn);
    journal.rewrite(Vec::new).expect("first head");
    for n in 0..10 {
        journal.note(stored(n));
    }
    journal.flush(true).expect("flushed");
    journal.note(stored(99));
    drop(journal);

    let whole = fs::read(&path).expect("file");
    fs::write(&path, &whole[..whole.len() - 3]).expect("torn");
    let mut seen = Vec::new();
    let (journal, found) = Journal::open(&path, 4096, |entry| seen.push(entry)).expect("opened");
    assert_eq!((seen.len(), found.tail), (9, Tail::Torn));
    journal.note(Entry::Invalidated(key(1)));
    journal
        .flush(true)
        .expect("appends where the good part ended");
    let (entries, found) = parse(&fs::read(&path).expect("file"));
    assert_eq!((entries.len(), found.tail), (10, Tail::Clean));
    assert_eq!(entries[9], Entry::Invalidated(key(1)));
}

#[test]
fn a_journal_of_other_extents_is_refused_until_rewritten() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("journal");
    fs::write(&path, encode(4096, &[stored(1)])).expect("file");
    let (journal, found) = Journal::open(&path, 8192, |_| ()).expect("opened");
    assert_eq!(found.extent_bytes, 4096);
    journal.note(stored(2));
    journal.flush(false).expect_err("broken");
    journal.rewrite(|| vec![stored(3)]).expect("rewritten");
    assert_eq!(parse(&fs::read(&path).expect("file")).0, [stored(3)]);
    journal.note(stored(4));
    journal.flush(false).expect("usable again");
}

#[test]
fn many_dead_records_want_a_rewrite() {
    let dir = tempfile::tempdir().expect("a folder");
    let (journal, _) = Journal::open(&dir.path().join("journal"), 4096, |_| ()).expect("opened");
    journal.rewrite(Vec::new).expect("head");
    for n in 0..=MIN_REWRITE_RECORDS {
        journal.note(stored(n as u8));
    }
    journal.flush(false).expect("flushed");
    assert!(journal.wants_rewrite(10));
    assert!(!journal.wants_rewrite(MIN_REWRITE_RECORDS));
}
