//! memcpy: what the memory of this machine gives one thread, or eight.

use std::sync::Arc;

use anyhow::Result;

use super::network::Job;
use super::wire::payload;
use crate::load::{BlockingWorker, Sample, Window, drive_blocking};
use crate::rounds::{Cell, Peer, Pending};

/// Copies values out of a working set as large as the servers', into one reused buffer per thread, like every get here.
pub struct Memcpy {
    source: Arc<Vec<u8>>,
}

impl Memcpy {
    /// With its working set in memory.
    pub fn new(working_set_bytes: u64) -> Result<Self> {
        Ok(Self {
            source: Arc::new(payload(usize::try_from(working_set_bytes)?, 1)),
        })
    }
}

struct Copier {
    source: Arc<Vec<u8>>,
    buffer: Vec<u8>,
    job: Job,
}

impl BlockingWorker for Copier {
    fn step(&mut self) -> Result<u64> {
        let length = self.buffer.len();
        let at = usize::try_from(self.job.next_value())? * length;
        self.buffer.copy_from_slice(&self.source[at..at + length]);
        std::hint::black_box(&self.buffer);
        Ok(length as u64)
    }
}

impl Peer for Memcpy {
    fn run<'a>(&'a mut self, cell: &'a Cell, window: Window) -> Pending<'a, Result<Sample>> {
        Box::pin(async move {
            let mut copiers: Vec<_> = (0..cell.concurrency)
                .map(|nth| Copier {
                    source: self.source.clone(),
                    buffer: vec![0; cell.bytes as usize],
                    job: Job::of(cell, nth, self.source.len() as u64),
                })
                .collect();
            drive_blocking(&mut copiers, window, &[])
        })
    }
}
