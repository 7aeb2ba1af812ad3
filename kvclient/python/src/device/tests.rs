//! Blocks through slots of the host device, in batches, in any number.

use super::*;
use crate::layout::Layer;

const BLOCKS: usize = 6;

fn layer(memory: &mut [u8], at: usize, stride_bytes: usize, block_bytes: usize) -> Layer {
    Layer {
        address: memory.as_mut_ptr().expose_provenance() + at,
        blocks: BLOCKS,
        stride_bytes,
        block_bytes,
    }
}

fn pattern(length: usize, seed: usize) -> Vec<u8> {
    (0..length)
        .map(|i| ((i + seed).wrapping_mul(0x9e37_79b1) >> 11) as u8)
        .collect()
}

/// Two interleaved layers, and one of another shape in an allocation of its own.
fn layers(one: &mut [u8], two: &mut [u8]) -> Vec<Layer> {
    vec![
        layer(one, 0, 200, 96),
        layer(one, 100, 200, 96),
        layer(two, 3, 50, 33),
    ]
}

#[tokio::test]
async fn blocks_go_to_slots_and_back_on_the_host_device() {
    let (mut one, mut two) = (pattern(BLOCKS * 200, 1), pattern(BLOCKS * 50 + 3, 2));
    let before = (one.clone(), two.clone());
    let layout = Layout::new(layers(&mut one, &mut two)).unwrap();
    // SAFETY: both vectors outlive `device`, and nobody else uses them before it is dropped.
    let device = unsafe { OnDevice::new(&layout, "host", 0) }.unwrap();
    let (turn, ids) = (device.turn().unwrap(), [4, 0, 5]);
    let slot = device.slot(Use::Save, 3).await.unwrap();
    let saved = device.gather(slot, &ids, &turn, ()).unwrap();
    let saved = saved.done().await.unwrap();
    let mut expected = Vec::new();
    for id in ids.map(|id| id as usize) {
        expected.extend_from_slice(&before.0[id * 200..][..96]);
        expected.extend_from_slice(&before.0[id * 200 + 100..][..96]);
        expected.extend_from_slice(&before.1[id * 50 + 3..][..33]);
    }
    assert_eq!(saved.bytes(), expected);
    // Block 4 becomes block 1; nothing else changes.
    let mut slot = device.slot(Use::Load, 1).await.unwrap();
    slot.bytes_mut()
        .copy_from_slice(&saved.bytes()[..device.block_bytes()]);
    let loading = device.scatter(slot, &[1], &turn, ()).unwrap();
    loading.await.unwrap();
    drop((saved, device));
    let mut after = before.clone();
    after.0.copy_within(800..896, 200);
    after.0.copy_within(900..996, 300);
    after.1.copy_within(203..236, 53);
    assert!((one, two) == after);
}

#[tokio::test]
async fn slots_are_bounded_and_come_back() {
    let (mut one, mut two) = (pattern(BLOCKS * 200, 1), pattern(BLOCKS * 50 + 3, 2));
    let layout = Layout::new(layers(&mut one, &mut two)).unwrap();
    // SAFETY: as above.
    let device = unsafe { OnDevice::new(&layout, "host", 0) }.unwrap();
    let load = |_| device.try_slot(Use::Load, 2);
    let mut slots: Vec<Slot> = (0..SLOTS[1]).filter_map(load).collect();
    assert_eq!(slots.len(), SLOTS[1]);
    assert!(load(0).is_none() && device.try_slot(Use::Save, 1).is_some());
    let turn = device.turn().unwrap();
    let refused = device.scatter(slots.pop().unwrap(), &[2, 2], &turn, ());
    assert!(refused.unwrap_err().contains("written twice"));
    let refused = device.gather(slots.pop().unwrap(), &[0, 99], &turn, ());
    assert!(refused.unwrap_err().contains("page 99"));
    slots.push(device.slot(Use::Load, 2).await.unwrap());
    let loading = device.scatter(slots.pop().unwrap(), &[0, 1], &turn, ());
    loading.unwrap().await.unwrap();
    drop(slots);
    let all: Vec<Slot> = (0..SLOTS[1]).filter_map(load).collect();
    assert_eq!(all.len(), SLOTS[1]);
    let too_many = device.blocks_per_batch() + 1;
    assert!(device.slot(Use::Save, too_many).await.is_err());
}

#[tokio::test]
async fn a_save_that_nobody_waits_for_keeps_its_permit_until_the_device_is_done() {
    struct Held(std::sync::mpsc::Receiver<()>);
    impl Drop for Held {
        fn drop(&mut self) {
            // Until the test lets the lane's thread go on.
            let _ = self.0.recv();
        }
    }
    let (mut one, mut two) = (pattern(BLOCKS * 200, 1), pattern(BLOCKS * 50 + 3, 2));
    let layout = Layout::new(layers(&mut one, &mut two)).unwrap();
    // SAFETY: as above.
    let device = unsafe { OnDevice::new(&layout, "host", 0) }.unwrap();
    let turn = device.turn().unwrap();
    let (go_on, held) = std::sync::mpsc::channel();
    let slot = device.slot(Use::Save, 1).await.unwrap();
    drop(device.gather(slot, &[0], &turn, Held(held)).unwrap());
    let take = || device.try_slot(Use::Save, 1);
    let slots: Vec<Slot> = std::iter::from_fn(take).collect();
    assert_eq!(slots.len(), SLOTS[0] - 1);
    go_on.send(()).unwrap();
    let _last = device.slot(Use::Save, 1).await.unwrap();
}

#[test]
fn more_batches_than_slots_go_one_after_the_other() {
    let (mut one, mut two) = (pattern(BLOCKS * 200, 1), pattern(BLOCKS * 50 + 3, 2));
    let before = (one.clone(), two.clone());
    let layout = Layout::new(layers(&mut one, &mut two)).unwrap();
    // SAFETY: as above.
    let device = unsafe { OnDevice::new(&layout, "host", 0) }.unwrap();
    let batches: Vec<Vec<u32>> = (0..3 * SLOTS[0])
        .map(|i| vec![(i % BLOCKS) as u32])
        .collect();
    let mut saved = Vec::new();
    device
        .save_each(&batches, |bytes| saved.push(bytes.to_vec()))
        .unwrap();
    assert_eq!(saved.len(), batches.len());
    // Each block's bytes go to the block after it.
    let next: Vec<Vec<u32>> = batches
        .iter()
        .map(|batch| vec![(batch[0] + 1) % BLOCKS as u32])
        .collect();
    device
        .load_each(&next, |number, bytes| bytes.copy_from_slice(&saved[number]))
        .unwrap();
    drop(device);
    for id in 0..BLOCKS {
        let next = (id + 1) % BLOCKS;
        assert_eq!(one[next * 200..][..96], before.0[id * 200..][..96]);
        assert_eq!(
            one[next * 200 + 100..][..96],
            before.0[id * 200 + 100..][..96]
        );
        assert_eq!(two[next * 50 + 3..][..33], before.1[id * 50 + 3..][..33]);
    }
}

#[test]
fn a_device_that_is_not_there_is_an_error_and_never_the_host() {
    let name = |name| open(name).unwrap_err();
    assert!(matches!(name("cuda:4000"), DeviceProblem::Absent { .. }));
    for none in ["", "gpu", "cuda:", "cuda:x", "Host"] {
        assert!(matches!(name(none), DeviceProblem::Name { .. }), "{none}");
    }
    assert!(open("host").is_ok());
}
