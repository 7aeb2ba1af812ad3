//! The register's file, and the one thread that writes it.

use std::{
    fs,
    io::{self, Read, Write},
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
};

use kvproto::{NamespaceId, SequenceHash};
use parking_lot::Mutex;
use xxhash_rust::xxh3::xxh3_64;

use super::{Invalidation, KEPT, State};
use crate::{data_dir::write_whole, engine::Target};

const SUM_AT: usize = 8 + 16 + 1 + 32;
/// Length of a record.
pub(super) const RECORD_BYTES: usize = SUM_AT + 8;
/// The file is replaced when it has so many records, most of which say nothing any more.
const MOST_RECORDS: usize = 2 * KEPT;

/// What the file holds, and in how many records. After one that is not whole nothing is believed.
pub(super) fn read(path: &Path) -> (State, usize) {
    let mut bytes = Vec::new();
    let most = (MOST_RECORDS * RECORD_BYTES) as u64;
    let reading = fs::File::open(path).and_then(|file| file.take(most).read_to_end(&mut bytes));
    match reading {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => {
            tracing::warn!(file = %path.display(), %error, "the register of invalidations cannot be read; starting without it");
        }
    }
    let (state, records) = parse(&bytes);
    if records * RECORD_BYTES < bytes.len() {
        tracing::warn!(file = %path.display(), records, "the end of the register of invalidations is not whole, and left out");
    }
    (state, records)
}

pub(super) fn parse(bytes: &[u8]) -> (State, usize) {
    let mut state = State::default();
    let mut count = 0;
    for entry in bytes.chunks(RECORD_BYTES).map_while(record) {
        count += 1;
        state.push(entry);
    }
    state.unwritten = 0;
    // What is appended must not lie behind something that is not whole.
    state.is_stale = count * RECORD_BYTES < bytes.len();
    (state, count)
}

fn record(bytes: &[u8]) -> Option<Invalidation> {
    let bytes: &[u8; RECORD_BYTES] = bytes.try_into().ok()?;
    let (told, sum) = bytes.split_at(SUM_AT);
    if xxh3_64(told).to_le_bytes() != *sum {
        return None;
    }
    let namespace = NamespaceId(told[8..24].try_into().ok()?);
    let hash = SequenceHash(told[25..].try_into().ok()?);
    Some(Invalidation {
        id: u64::from_le_bytes(told[..8].try_into().ok()?),
        what: match told[24] {
            0 => None,
            1 => Some((namespace, Target::Block(hash))),
            2 => Some((namespace, Target::Prefix(hash))),
            3 => Some((namespace, Target::All)),
            _ => return None,
        },
    })
}

fn write_record(into: &mut Vec<u8>, entry: &Invalidation) {
    let start = into.len();
    let (namespace, kind, hash) = match entry.what {
        None => ([0; 16], 0, [0; 32]),
        Some((namespace, Target::Block(hash))) => (namespace.0, 1, hash.0),
        Some((namespace, Target::Prefix(hash))) => (namespace.0, 2, hash.0),
        Some((namespace, Target::All)) => (namespace.0, 3, [0; 32]),
    };
    into.extend(entry.id.to_le_bytes());
    into.extend(namespace);
    into.push(kind);
    into.extend(hash);
    let sum = xxh3_64(&into[start..]);
    into.extend(sum.to_le_bytes());
}

/// All of it.
pub(super) fn whole(state: &State) -> Vec<u8> {
    last(state, state.entries.len())
}

/// The last so many entries.
fn last(state: &State, count: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(count * RECORD_BYTES);
    for entry in state.entries.range(state.entries.len() - count..) {
        write_record(&mut bytes, entry);
    }
    bytes
}

/// The one who writes the file.
pub(super) struct Writer {
    path: PathBuf,
    state: Arc<Mutex<State>>,
    /// In the file.
    records: usize,
    has_failed: bool,
}

impl Writer {
    pub(super) fn new(path: PathBuf, state: Arc<Mutex<State>>, records: usize) -> Self {
        Self {
            path,
            state,
            records,
            has_failed: false,
        }
    }

    /// Until nobody can wake it any more.
    pub(super) fn run(mut self, woken: &mpsc::Receiver<()>) {
        while woken.recv().is_ok() {
            self.write();
        }
        self.write();
    }

    fn write(&mut self) {
        let (bytes, is_whole) = {
            let mut state = self.state.lock();
            let new = std::mem::take(&mut state.unwritten);
            if new == 0 && !state.is_stale {
                return;
            }
            let is_whole = state.is_stale || self.records + new > MOST_RECORDS;
            state.is_stale = false;
            let bytes = match is_whole {
                true => whole(&state),
                false => last(&state, new),
            };
            (bytes, is_whole)
        };
        let count = bytes.len() / RECORD_BYTES;
        let written = match is_whole {
            true => write_whole(&self.path, &bytes, 0o600),
            false => append(&self.path, &bytes),
        };
        match written {
            Ok(()) => {
                self.has_failed = false;
                self.records = count + if is_whole { 0 } else { self.records };
            }
            Err(error) => {
                // Part of it may be there: the next one replaces it all.
                self.state.lock().is_stale = true;
                if !self.has_failed {
                    tracing::warn!(file = %self.path.display(), %error, "the register of invalidations is not kept");
                }
                self.has_failed = true;
            }
        }
    }
}

fn append(path: &Path, bytes: &[u8]) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let file = fs::OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path);
    file?.write_all(bytes)
}
