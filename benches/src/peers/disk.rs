//! Direct positional reads: what the disk gives a reader that keeps no index and verifies nothing.
//!
//! One file, written once and synced, opened with `O_DIRECT`; every thread reads whole values at aligned offsets into a
//! reused aligned buffer. Depth is the number of threads. Summed, each value is then verified as a node verifies a block:
//! what a read costs that looks at its bytes, and nothing else.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use kvproto::checksum::page_sums;
use rustix::fs::OFlags;

use super::network::Job;
use super::wire::payload;
use crate::load::{BlockingWorker, Sample, Window, drive_blocking};
use crate::rounds::{Cell, Peer, Pending};

const ALIGN: usize = 4096;

/// The file, and how much of it there is.
#[derive(Clone)]
pub struct DirectReads {
    file: Arc<File>,
    bytes: u64,
    summed: bool,
}

impl DirectReads {
    /// Writes a file of `bytes` and opens it for direct reads.
    ///
    /// # Errors
    /// The disk is full, or the file system has no direct I/O.
    pub fn create(path: &Path, bytes: u64) -> Result<Self> {
        let mut file =
            File::create(path).with_context(|| format!("creating {}", path.display()))?;
        let piece = payload(4 << 20, 2);
        for _ in 0..bytes / piece.len() as u64 {
            file.write_all(&piece)?;
        }
        file.sync_all()?;
        let direct = i32::try_from(OFlags::DIRECT.bits())?;
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(direct)
            .open(path)
            .context("opening without the page cache")?;
        Ok(Self {
            file: Arc::new(file),
            bytes,
            summed: false,
        })
    }

    /// The same file, read by somebody who sums what is read.
    pub fn summed(&self) -> Self {
        Self {
            summed: true,
            ..self.clone()
        }
    }
}

struct Reader {
    file: Arc<File>,
    memory: Vec<u8>,
    start: usize,
    summed: bool,
    job: Job,
}

impl BlockingWorker for Reader {
    fn step(&mut self) -> Result<u64> {
        let length = self.job.bytes;
        let at = self.job.next_value() * length;
        let buffer = &mut self.memory[self.start..self.start + length as usize];
        let n = self.file.read_at(buffer, at)?;
        ensure!(n as u64 == length, "read {n} of {length} bytes at {at}");
        if self.summed {
            std::hint::black_box(page_sums(buffer));
        }
        Ok(length)
    }
}

impl Peer for DirectReads {
    fn run<'a>(&'a mut self, cell: &'a Cell, window: Window) -> Pending<'a, Result<Sample>> {
        Box::pin(async move {
            let mut readers: Vec<_> = (0..cell.concurrency)
                .map(|nth| {
                    let memory = vec![0; cell.bytes as usize + ALIGN];
                    let start = memory.as_ptr().align_offset(ALIGN);
                    Reader {
                        file: self.file.clone(),
                        memory,
                        start,
                        summed: self.summed,
                        job: Job::of(cell, nth, self.bytes),
                    }
                })
                .collect();
            drive_blocking(&mut readers, window, &[])
        })
    }
}
