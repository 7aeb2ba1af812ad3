//! Batches on a device that is told to misbehave: what overlaps, what is kept, what a failure costs.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};

use kvgpu::{
    Device, DeviceError, DeviceMemory, HostDevice, KvLayout, KvPool, PagedKv, Staged, Transfer,
    TransferConfig,
};

const PAGE_BYTES: usize = 8192;
const PAGES: [u32; 2] = [5, 3];

struct Rig {
    device: Arc<HostDevice>,
    memory: DeviceMemory,
    pool: KvPool,
    transfer: Transfer,
}

fn rig(slots: usize, lanes: usize) -> Rig {
    let device = Arc::new(HostDevice::new(16 << 20));
    let layout = KvLayout::pieces(2, 8, PAGE_BYTES as u64, PAGE_BYTES as u32);
    let memory = device.alloc(layout.layer_bytes() as usize * 2).unwrap();
    let paged = PagedKv::contiguous(layout, &memory.whole()).unwrap();
    let config = TransferConfig {
        slot_bytes: 64 << 10,
        slots,
        lanes,
    };
    Rig {
        memory,
        pool: KvPool::new(vec![paged], 1).unwrap(),
        transfer: Transfer::new(Arc::clone(&device) as Arc<dyn Device>, config).unwrap(),
        device,
    }
}

impl Rig {
    fn fill(&self, byte: u8) {
        let stream = self.device.stream().unwrap();
        let bytes = vec![byte; self.memory.len_bytes()].into();
        stream
            .upload(bytes, &self.memory.whole())
            .unwrap()
            .wait()
            .unwrap();
    }

    fn slot(&self) -> Staged {
        let bytes = self.pool.batch_bytes(PAGES.len()) as usize;
        self.transfer.slot(bytes).unwrap().expect("a free slot")
    }

    fn save(&self) -> kvgpu::Moving<Staged> {
        self.transfer
            .save(&self.pool, &PAGES, self.slot(), None, ())
            .unwrap()
    }
}

#[test]
fn the_next_batch_is_on_its_way_while_the_caller_reads_this_one() {
    let rig = rig(3, 2);
    rig.fill(7);
    let first = rig.save().wait().unwrap();
    rig.device.hold();
    let (second, third) = (rig.save(), rig.save());
    assert!(first.iter().all(|byte| *byte == 7));
    assert!(!second.is_done() && !third.is_done());
    assert_eq!(rig.transfer.slots_in_use(), 3);
    assert!(
        rig.transfer.slot(1).unwrap().is_none(),
        "the pool is bounded"
    );
    drop(first);
    assert!(rig.transfer.slot(1).unwrap().is_some());
    rig.device.release();
    for saving in [second, third] {
        assert!(saving.wait().unwrap().iter().all(|byte| *byte == 7));
    }
    assert_eq!(rig.transfer.slots_in_use(), 0);
}

#[test]
fn lanes_do_not_wait_for_each_other() {
    let rig = rig(2, 2);
    rig.fill(1);
    let engine = rig.device.stream().unwrap();
    // SAFETY: `engine` lives to the end of the test.
    let adopted = unsafe { rig.device.adopt_stream(engine.handle()) }.unwrap();
    rig.device.hold_stream(engine.handle());
    let computed = vec![2; rig.memory.len_bytes()].into();
    engine.upload(computed, &rig.memory.whole()).unwrap();
    let turn = adopted.record().unwrap();
    let after = rig
        .transfer
        .save(&rig.pool, &PAGES, rig.slot(), Some(&turn), ())
        .unwrap();
    let before = rig.save().wait().unwrap();
    assert!(before.iter().all(|byte| *byte == 1));
    assert!(!after.is_done() && !turn.is_done().unwrap());
    rig.device.release();
    assert!(after.wait().unwrap().iter().all(|byte| *byte == 2));
}

#[test]
fn what_a_batch_keeps_is_held_until_it_is_done_even_if_nobody_waits() {
    let rig = rig(2, 1);
    let claim = Arc::new(());
    rig.device.hold();
    let saving = rig
        .transfer
        .save(&rig.pool, &PAGES, rig.slot(), None, Arc::clone(&claim));
    let loading = rig
        .transfer
        .load(&rig.pool, &PAGES, rig.slot(), None, Arc::clone(&claim));
    drop((saving.unwrap(), loading.unwrap()));
    assert_eq!(Arc::strong_count(&claim), 3);
    assert_eq!(rig.transfer.slots_in_use(), 2);
    rig.device.release();
    let Rig { transfer, .. } = rig;
    drop(transfer);
    assert_eq!(Arc::strong_count(&claim), 1, "closing waits for batches");
}

#[test]
fn a_batch_may_keep_the_last_handle_of_its_transfer() {
    let Rig {
        device,
        pool,
        transfer,
        memory: _memory,
    } = rig(2, 2);
    let transfer = Arc::new(transfer);
    let slot = transfer
        .slot(pool.batch_bytes(2) as usize)
        .unwrap()
        .unwrap();
    device.hold();
    let kept = Arc::clone(&transfer);
    let saving = transfer.save(&pool, &PAGES, slot, None, kept).unwrap();
    drop(transfer);
    device.release();
    assert_eq!(saving.wait().unwrap().len(), 2 * 2 * PAGE_BYTES);
}

#[test]
fn a_failure_costs_its_batches_and_the_lane_goes_on() {
    let rig = rig(2, 1);
    rig.fill(9);
    for operation in 0..2 {
        rig.device.fail_after(operation);
        let failed = rig.save().wait().unwrap_err();
        assert!(matches!(failed, DeviceError::Failed { .. }), "{failed}");
        assert_eq!(rig.transfer.slots_in_use(), 0, "the slot comes back");
        assert!(rig.save().wait().unwrap().iter().all(|byte| *byte == 9));
    }
    rig.device.fail_after(1);
    let loading = rig
        .transfer
        .load(&rig.pool, &PAGES, rig.slot(), None, ())
        .unwrap();
    assert!(loading.wait().is_err());
    assert_eq!(rig.transfer.slots_in_use(), 0);
    rig.save().wait().unwrap();
}

#[test]
fn a_batch_wakes_who_awaits_it() {
    struct Unpark(std::thread::Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let rig = rig(1, 1);
    rig.fill(3);
    rig.device.hold();
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut context = Context::from_waker(&waker);
    let mut saving = pin!(rig.save());
    assert!(saving.as_mut().poll(&mut context).is_pending());
    rig.device.release();
    let slot = loop {
        match saving.as_mut().poll(&mut context) {
            Poll::Ready(slot) => break slot.unwrap(),
            Poll::Pending => std::thread::park(),
        }
    };
    assert!(slot.freeze().iter().all(|byte| *byte == 3));
    assert_eq!(rig.transfer.slots_in_use(), 0);
}

#[test]
fn pools_that_cannot_be_are_refused() {
    let device = HostDevice::new(1 << 20);
    let paged = |pages| {
        let layout = KvLayout::pieces(1, pages, 64, 64);
        let memory = device.alloc(layout.layer_bytes() as usize).unwrap();
        PagedKv::contiguous(layout, &memory.whole()).unwrap()
    };
    let field = |groups, per| match KvPool::new(groups, per).unwrap_err() {
        DeviceError::Plan(error) => error.field,
        other => panic!("{other}"),
    };
    assert_eq!(field(vec![], 1), "groups");
    assert_eq!(field(vec![paged(4)], 0), "pages_per_block");
    assert_eq!(field(vec![paged(4), paged(5)], 1), "pages");
    let pool = KvPool::new(vec![paged(4), paged(4)], 2).unwrap();
    assert_eq!((pool.block_bytes(), pool.pages()), (256, 4));
    assert_eq!(pool.batch_bytes(4), 512);
}
