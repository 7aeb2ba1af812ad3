//! The register between nodes, and over restarts.

use kvproto::SequenceHash;
use proptest::prelude::*;

use super::{
    file::{RECORD_BYTES, parse, whole},
    *,
};

fn entry(id: u64) -> Invalidation {
    let mut hash = [0; 32];
    hash[..8].copy_from_slice(&id.to_be_bytes());
    let target = match id % 3 {
        0 => Target::All,
        1 => Target::Prefix(SequenceHash(hash)),
        _ => Target::Block(SequenceHash(hash)),
    };
    Invalidation {
        id,
        what: Some((NamespaceId([(id % 3) as u8; 16]), target)),
    }
}

fn register() -> (tempfile::TempDir, Invalidations) {
    let dir = tempfile::tempdir().unwrap();
    let register = Invalidations::open(dir.path()).unwrap();
    (dir, register)
}

fn told(register: &Invalidations, ids: impl IntoIterator<Item = u64>) {
    ids.into_iter().for_each(|id| register.note(entry(id)));
}

/// What one remembers, as the other hears it.
fn asked(of: &Invalidations, by: &Invalidations) -> Vec<Invalidation> {
    let wire = of.answer(by.digest()).told.into_iter();
    wire.map(|entry| entry.try_into().unwrap()).collect()
}

/// One asks another and forgets; what it forgot.
fn meets(asking: &Invalidations, of: &Invalidations) -> Missed {
    let told = asked(of, asking);
    let missed = asking.missed(&told);
    asking.learn(told);
    missed
}

const NOTHING: Missed = Missed {
    what: Vec::new(),
    and_more: false,
};

#[test]
fn who_was_away_misses_what_the_others_were_told_and_learns_it() {
    let ((_a, stayed), (_b, away)) = (register(), register());
    told(&stayed, 1..=9);
    told(&away, [4, 1, 3, 2]); // in another order, as callers tell nodes
    let missed = meets(&away, &stayed);
    let expected: Vec<What> = (5..=9).filter_map(|id| entry(id).what).collect();
    assert_eq!((missed.what, missed.and_more), (expected, false));
    assert_eq!(away.digest(), stayed.digest());
    assert!(asked(&stayed, &away).is_empty(), "nothing is told twice");
    told(&away, [7]);
    assert_eq!(
        away.digest(),
        stayed.digest(),
        "told again says nothing new"
    );
}

#[test]
fn who_was_away_for_longer_than_is_remembered_knows_that_it_was() {
    const MANY: u64 = TOLD as u64 + 20;
    let ((_a, stayed), (_b, away), (_c, short)) = (register(), register(), register());
    told(&stayed, 1..=MANY);
    told(&away, 1..=10);
    told(&short, 1..=21);
    let missed = meets(&short, &stayed);
    assert_eq!((missed.what.len(), missed.and_more), (TOLD - 1, false));
    let missed = meets(&away, &stayed);
    assert_eq!((missed.what.len(), missed.and_more), (TOLD, true));
    // It knows what the others know: nothing is missed once more, and what it hands on has the same beginning.
    assert_eq!(meets(&away, &stayed), NOTHING);
    assert_eq!(meets(&short, &away), NOTHING);
    let (_d, third) = register();
    told(&third, 1..=5);
    assert!(meets(&third, &away).and_more);
}

#[test]
fn nodes_that_were_told_in_another_order_miss_nothing_of_each_other() {
    const MANY: u64 = KEPT as u64 + 500;
    let ((_a, one), (_b, other), (_c, new)) = (register(), register(), register());
    told(&one, 1..=MANY);
    // As far apart as callers that tell many at once.
    let mixed: Vec<u64> = (1..=MANY).collect();
    let mixed = mixed.chunks(64).flat_map(|some| some.iter().rev().copied());
    told(&other, mixed);
    assert_ne!(one.digest(), other.digest(), "they forgot others");
    assert_eq!(meets(&one, &other), NOTHING);
    assert_eq!(meets(&other, &one), NOTHING);
    // What either has heard of the other is nothing that a third has missed.
    let (_d, third) = register();
    told(&third, 1..=MANY);
    assert_eq!(meets(&third, &one), NOTHING);
    assert_eq!(meets(&third, &other), NOTHING);
    // A newcomer that asks both forgets once, and nothing of what it knows.
    assert!(meets(&new, &one).and_more);
    assert_eq!(meets(&new, &other), NOTHING);
    assert_eq!(new.state.lock().entries.len(), KEPT);
    assert_eq!(meets(&one, &new), NOTHING);
}

#[test]
fn it_is_bounded() {
    let (dir, register) = register();
    told(&register, 1..=KEPT as u64 + 7);
    assert_eq!(register.state.lock().entries.len(), KEPT);
    drop(register);
    let bytes = std::fs::metadata(dir.path().join("invalidations")).unwrap();
    assert!(bytes.len() <= (2 * KEPT * RECORD_BYTES) as u64);
    let again = Invalidations::open(dir.path()).unwrap();
    let state = again.state.lock();
    assert_eq!(state.entries.len(), KEPT);
    assert!(!state.ids.contains(&7) && state.ids.contains(&8));
}

#[test]
fn a_restart_knows_what_was_told_before_it() {
    let (dir, register) = register();
    told(&register, 1..=50);
    let digest = register.digest();
    drop(register);
    let again = Invalidations::open(dir.path()).unwrap();
    assert_eq!(again.digest(), digest);
    told(&again, [51]);
    drop(again);

    // What a crash tore off is left out, and what comes after it is kept all the same.
    let path = dir.path().join("invalidations");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes.truncate(bytes.len() - 3);
    std::fs::write(&path, &bytes).unwrap();
    let torn = Invalidations::open(dir.path()).unwrap();
    assert_eq!(torn.digest(), digest);
    told(&torn, [52]);
    drop(torn);
    let last = Invalidations::open(dir.path()).unwrap();
    assert_eq!(last.digest(), digest ^ 52);
}

#[test]
fn a_full_disk_is_survived_and_what_found_no_room_is_written_later() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("invalidations");
    let register = Invalidations::open(dir.path()).unwrap();
    std::os::unix::fs::symlink("/dev/full", &path).unwrap();
    told(&register, [1, 2]);
    assert_eq!(register.digest(), 1 ^ 2);
    // The whole of it goes by way of another file, which has room.
    drop(register);
    let register = Invalidations::open(dir.path()).unwrap();
    assert_eq!(register.digest(), 1 ^ 2);
}

proptest! {
    /// Any bytes behind a name of ours are read without harm, and nothing that is not whole is believed.
    #[test]
    fn any_file_is_read(
        count in 0_u64..20,
        junk in proptest::collection::vec(any::<u8>(), 0..200),
        at in any::<prop::sample::Index>(),
    ) {
        let mut state = State::default();
        state.push(Invalidation { id: 99, what: None });
        (1..=count).for_each(|id| state.push(entry(id)));
        let mut bytes = whole(&state);
        let (read, records) = parse(&bytes);
        prop_assert_eq!((&read.entries, records as u64), (&state.entries, count + 1));
        let cut = at.index(bytes.len() + 1);
        bytes.truncate(cut);
        bytes.extend(&junk);
        let (read, records) = parse(&bytes);
        prop_assert!(records <= bytes.len() / RECORD_BYTES);
        prop_assert!(records >= cut / RECORD_BYTES);
        prop_assert!(read.entries.iter().all(|entry| state.entries.contains(entry)));
    }
}
