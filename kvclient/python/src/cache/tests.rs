//! What a cache promises while it is closed or laid out anew.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use super::{Cache, CacheSettings};
use crate::{jobs::JobKind, layout::Layer, node::NodeSettings};
use kvclient::{Namespace, clock::Clock};

/// A cache of a node that is not there, and one layer of two blocks for it.
fn cache(buffer: &mut [u8; 16]) -> Cache {
    let node = NodeSettings {
        endpoint: "127.0.0.1:9".to_owned(),
        owner: None,
        token: None,
        local: "off".to_owned(),
        strict: false,
    };
    let spec = Namespace::opaque("tests", 16, 1);
    let cache = Cache::new(CacheSettings::new(node, spec)).unwrap();
    let layer = Layer {
        address: buffer.as_mut_ptr().expose_provenance(),
        blocks: 2,
        stride_bytes: 8,
        block_bytes: 8,
    };
    // SAFETY: the tests keep the buffer until the cache is closed, and do not look at it.
    #[allow(unsafe_code)]
    unsafe {
        cache.layout(vec![layer]).unwrap();
    }
    cache
}

#[test]
fn no_close_or_layout_returns_and_no_job_is_reported_while_a_copy_runs() {
    let mut buffer = [0; 16];
    let cache = cache(&mut buffer);
    let memory = cache.memory().unwrap();
    // As a device has it, whose copy outlasts the task that started it.
    let copy = memory.write(&[1]).unwrap();
    let now = cache.shared.node.clock.now();
    cache
        .shared
        .jobs
        .submit_taken(7, JobKind::Load, vec![1], now);
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let close = || {
            cache.close();
            assert!(over.load(Ordering::SeqCst), "closed while a copy ran");
        };
        scope.spawn(close);
        while memory.read(&[0]).is_ok() {
            thread::yield_now();
        }
        scope.spawn(close);
        scope.spawn(|| {
            // SAFETY: an empty layout promises nothing.
            #[allow(unsafe_code)]
            unsafe {
                cache.layout(Vec::new()).unwrap();
            }
            assert!(over.load(Ordering::SeqCst), "laid out while a copy ran");
        });
        for _ in 0..1000 {
            thread::yield_now();
        }
        assert!(cache.finished().is_empty());
        over.store(true, Ordering::SeqCst);
        drop(copy);
    });
    assert_eq!(cache.finished()[0].failed_block_ids, [1]);
}
