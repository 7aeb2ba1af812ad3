//! What the arena promises: places, lifetimes, domains, and what other mappings may and may not do.

use std::sync::Arc;
use std::thread;

use kvgpu::{
    Arena, ArenaConfig, ArenaError, DomainId, HugePages, MAX_SLOT_BYTES, PAGE_BYTES, SlotMut,
};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

const MIB: usize = 1 << 20;

fn arena(capacity: usize, segment: usize) -> Arc<Arena> {
    let config = ArenaConfig {
        capacity_bytes: capacity as u64,
        segment_bytes: segment as u64,
        prefault: false,
        boot_id: 7,
        ..ArenaConfig::default()
    };
    let arena = Arena::new(config).unwrap();
    arena.wait_ready();
    arena
}

#[test]
fn slots_hold_what_was_written_and_lie_apart() {
    let arena = arena(8 * MIB, 8 * MIB);
    let sizes = [1, 4096, 4097, 100_000, MIB, 3 * MIB];
    let mut slots: Vec<SlotMut> = sizes
        .iter()
        .map(|&size| arena.alloc(DomainId::NODE, size).unwrap())
        .collect();
    for (i, slot) in slots.iter_mut().enumerate() {
        assert_eq!(slot.as_ptr() as usize % PAGE_BYTES, 0);
        slot.fill(i as u8 + 1);
    }
    for (i, (slot, size)) in slots.iter().zip(sizes).enumerate() {
        assert_eq!(slot.len(), size);
        assert!(slot.iter().all(|byte| *byte == i as u8 + 1));
    }
    let stats = arena.stats();
    assert_eq!(stats.slots, 6);
    assert_eq!(stats.requested_bytes, sizes.iter().sum::<usize>() as u64);
    assert_eq!(
        stats.used_bytes,
        sizes
            .iter()
            .map(|size| size.next_multiple_of(4096))
            .sum::<usize>() as u64
    );
}

#[test]
fn sizes_outside_the_range_are_refused() {
    let arena = arena(256 * MIB, 128 * MIB);
    assert!(arena.alloc(DomainId::NODE, 0).is_none());
    assert!(arena.alloc(DomainId::NODE, MAX_SLOT_BYTES + 1).is_none());
    let slots: Vec<_> = (0..4)
        .map(|_| arena.alloc(DomainId::NODE, MAX_SLOT_BYTES).unwrap())
        .collect();
    assert!(arena.alloc(DomainId::NODE, 1).is_none());
    drop(slots);
    assert!(arena.alloc(DomainId::NODE, MAX_SLOT_BYTES).is_some());
}

#[test]
fn dropping_a_slot_gives_it_back_whichever_way_it_is_held() {
    let arena = arena(4 * MIB, 4 * MIB);
    let mutable = arena.alloc(DomainId::NODE, MIB).unwrap();
    let frozen = arena.alloc(DomainId::NODE, MIB).unwrap().freeze();
    let mut filled = arena.alloc(DomainId::NODE, MIB).unwrap();
    filled.fill(9);
    let whole = bytes::Bytes::from_owner(filled.freeze());
    let part = whole.slice(10..20);
    assert_eq!(arena.stats().slots, 3);
    drop((mutable, frozen, whole));
    assert_eq!(arena.stats().slots, 1);
    assert_eq!(&part[..], &[9; 10]);
    drop(part);
    let stats = arena.stats();
    assert_eq!(
        (stats.slots, stats.used_bytes, stats.requested_bytes),
        (0, 0, 0)
    );
    assert_eq!(stats.largest_free_bytes, 4 * MIB as u64);
}

#[test]
fn slots_outlive_every_other_handle_of_their_arena() {
    let mut slot = arena(4 * MIB, 4 * MIB).alloc(DomainId::NODE, MIB).unwrap();
    slot.fill(3);
    let slot = thread::spawn(move || slot.freeze()).join().unwrap();
    assert!(slot.iter().all(|byte| *byte == 3));
}

#[test]
fn a_place_never_comes_back_under_the_same_generation() {
    let arena = arena(64 * 1024, 64 * 1024);
    let mut seen = std::collections::HashSet::new();
    for round in 0..200_usize {
        let first = arena
            .alloc(DomainId::NODE, 1 + round * 977 % 40_000)
            .unwrap();
        let second = arena.alloc(DomainId::NODE, 4096).unwrap();
        for location in [first.location().unwrap(), second.location().unwrap()] {
            assert_eq!(location.boot_id, 7);
            assert!(seen.insert((location.segment, location.offset, location.generation)));
        }
    }
}

#[test]
fn heap_slots_are_aligned_zeroed_and_nowhere() {
    let mut slot = SlotMut::heap(5000);
    assert_eq!(slot.as_ptr() as usize % PAGE_BYTES, 0);
    assert_eq!(
        (slot.len(), slot.capacity_bytes(), slot.location()),
        (5000, 8192, None)
    );
    assert!(slot.padded_mut().iter().all(|byte| *byte == 0));
    slot[4999] = 1;
    assert_eq!(slot.freeze()[4999], 1);
    assert!(SlotMut::heap(0).is_empty());
}

#[test]
fn another_mapping_sees_bytes_and_generations_and_may_not_write() {
    let arena = arena(4 * MIB, 4 * MIB);
    let mut slot = arena.alloc(DomainId::NODE, 10_000).unwrap();
    slot.fill(0x5a);
    let slot = slot.freeze();
    let location = slot.location().unwrap();
    let segments = arena.segments();
    let segment = segments
        .iter()
        .find(|segment| segment.segment == location.segment)
        .unwrap();
    let length = segment.length_bytes as usize;
    // SAFETY: new mappings at addresses of the kernel's choice, unmapped below.
    let (data, table) = unsafe {
        let map = |length, protection, fd| {
            mmap(
                std::ptr::null_mut(),
                length,
                protection,
                MapFlags::SHARED,
                fd,
                0,
            )
        };
        let data = map(length, ProtFlags::READ, segment.data_fd()).unwrap();
        let table = map(length / 512, ProtFlags::READ, segment.generations_fd()).unwrap();
        if segment.write_sealed {
            let both = ProtFlags::READ | ProtFlags::WRITE;
            assert!(map(length, both, segment.data_fd()).is_err());
            assert!(map(length / 512, both, segment.generations_fd()).is_err());
        }
        (data, table)
    };
    // SAFETY: both lie inside the mappings just made; nobody writes these bytes while they are read.
    let (bytes, generation) = unsafe {
        let bytes =
            std::slice::from_raw_parts(data.cast::<u8>().add(location.offset as usize), 10_000);
        (bytes, || {
            table
                .cast::<u64>()
                .add(location.offset as usize / PAGE_BYTES)
                .read_volatile()
        })
    };
    assert!(bytes.iter().all(|byte| *byte == 0x5a));
    assert_eq!(generation(), location.generation);
    drop(slot);
    assert_eq!(generation(), location.generation + 1);
    // SAFETY: mapped above, not used below.
    unsafe {
        munmap(data, length).unwrap();
        munmap(table, length / 512).unwrap();
    }
}

#[test]
fn segments_can_be_neither_cut_nor_grown_nor_written_nor_unsealed() {
    let arena = arena(4 * MIB, 4 * MIB);
    for segment in arena.segments() {
        for fd in [segment.data_fd(), segment.generations_fd()] {
            assert!(rustix::fs::ftruncate(fd, 0).is_err());
            assert!(rustix::fs::ftruncate(fd, 1 << 30).is_err());
            assert!(rustix::fs::fcntl_add_seals(fd, rustix::fs::SealFlags::WRITE).is_err());
            if segment.write_sealed {
                assert!(rustix::io::pwrite(fd, b"x", 0).is_err());
            }
        }
    }
}

#[test]
fn capacity_grows_in_the_background_until_all_is_ready() {
    let config = ArenaConfig {
        capacity_bytes: 10 * MIB as u64,
        segment_bytes: 4 * MIB as u64,
        huge_pages: HugePages::Off,
        ..ArenaConfig::default()
    };
    let arena = Arena::new(config).unwrap();
    assert!(arena.ready_bytes() >= 4 * MIB as u64);
    arena.wait_ready();
    assert_eq!(arena.ready_bytes(), 10 * MIB as u64);
    let lengths: Vec<u64> = arena
        .segments()
        .iter()
        .map(|segment| segment.length_bytes)
        .collect();
    assert_eq!(lengths, [4 * MIB as u64, 4 * MIB as u64, 2 * MIB as u64]);
    let slots: Vec<_> = std::iter::from_fn(|| arena.alloc(DomainId::NODE, MIB)).collect();
    assert_eq!(slots.len(), 10);
}

#[test]
fn domains_share_no_segment() {
    let arena = arena(12 * MIB, 4 * MIB);
    let ours: Vec<_> = (0..5)
        .map(|_| arena.alloc(DomainId(1), MIB).unwrap())
        .collect();
    let theirs: Vec<_> = std::iter::from_fn(|| arena.alloc(DomainId(2), MIB)).collect();
    assert_eq!(
        theirs.len(),
        4,
        "the third segment is theirs, the half-empty second is not"
    );
    let segment = |slot: &SlotMut| slot.location().unwrap().segment;
    assert!(
        ours.iter()
            .all(|slot| theirs.iter().all(|other| segment(slot) != segment(other)))
    );
}

#[test]
fn an_empty_segment_moves_to_another_domain_as_new_memory() {
    let arena = arena(4 * MIB, 4 * MIB);
    let mut slot = arena.alloc(DomainId(1), MIB).unwrap();
    slot.fill(0xee);
    let before = slot.location().unwrap();
    assert!(
        arena.alloc(DomainId(2), MIB).is_none(),
        "not while a slot lives there"
    );
    drop(slot);
    assert!(
        arena.alloc(DomainId(2), MIB).is_none(),
        "the replacement is made in the background"
    );
    arena.wait_ready();
    let slot = arena.alloc(DomainId(2), MIB).unwrap();
    let after = slot.location().unwrap();
    assert_ne!(before.segment, after.segment);
    assert!(
        slot.iter().all(|byte| *byte == 0),
        "nothing of the former tenant is left"
    );
    assert_eq!(arena.segments()[0].domain, Some(DomainId(2)));
}

#[test]
fn a_wrong_configuration_names_its_field() {
    let field = |config: ArenaConfig| match Arena::new(config) {
        Err(ArenaError::Config { field, .. }) => field,
        other => panic!("{other:?}"),
    };
    let config = ArenaConfig {
        prefault: false,
        ..ArenaConfig::default()
    };
    assert_eq!(
        field(ArenaConfig {
            capacity_bytes: 100,
            ..config.clone()
        }),
        "capacity_bytes"
    );
    assert_eq!(
        field(ArenaConfig {
            segment_bytes: 5000,
            ..config.clone()
        }),
        "segment_bytes"
    );
    let many = ArenaConfig {
        capacity_bytes: 1 << 40,
        segment_bytes: 1 << 20,
        ..config
    };
    assert_eq!(field(many), "segment_bytes");
}

#[test]
fn huge_pages_are_used_where_there_are_enough_and_keep_every_promise() {
    if kvgpu::segment::free_huge_pages() < 4 {
        eprintln!("skipped: fewer than 4 free huge pages (vm.nr_hugepages)");
        return;
    }
    let config = ArenaConfig {
        capacity_bytes: 4 * MIB as u64,
        segment_bytes: 4 * MIB as u64,
        ..ArenaConfig::default()
    };
    let arena = Arena::new(config).unwrap();
    let segment = &arena.segments()[0];
    // Somebody else may have taken the pages meanwhile; then the segment is of ordinary ones.
    eprintln!(
        "huge pages: {}, write-sealed: {}",
        segment.huge_pages, segment.write_sealed
    );
    assert_eq!(arena.stats().huge_pages, segment.huge_pages);
    assert!(rustix::fs::ftruncate(segment.data_fd(), 0).is_err());
    let mut slot = arena.alloc(DomainId::NODE, 3 * MIB).unwrap();
    slot.fill(0x77);
    assert!(slot.freeze().iter().all(|byte| *byte == 0x77));
}
