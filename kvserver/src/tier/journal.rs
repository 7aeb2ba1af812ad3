//! Who lives on the cache disk: an append-only, checksummed log beside foyer's files.
//!
//! foyer cannot list its keys, and after a restart it brings back what was deleted. So what *we* call
//! resident is written here, and at open only that is believed, after foyer has confirmed it.
//!
//! ```text
//! file    │ head 32 │ record │ record │ …
//! head    "TKVJRNL1" 8 │ extent bytes u64 │ zero u64 │ XXH3-64 of the 24 bytes before
//! record  0xA5 │ kind u8 │ payload length u16 │ payload │ XXH3-64 of all before, seeded by its offset
//!
//! kind 1  Stored                  key 52 │ place 68 │ length u64 │ seal u64      it is there now
//! kind 2  Gone                    key 52                                        made room, or was lost
//! kind 3  Invalidated             key 52                                        stays gone: fdatasync
//! kind 4  InvalidatedNamespace    namespace 16                                  stays gone: fdatasync
//! kind 5  Wear                    unix day u32 │ bytes u64                      written that day so far
//! ```
//!
//! Order is all: the last record about a key is the truth, so a block stored again after an
//! invalidation is present.
//!
//! *Torn tail*: a last record that is not whole is what `kill -9` leaves, and is cut off. *Damage*: if a
//! whole record follows a broken one, something in the middle is lost, perhaps an invalidation; then
//! nothing here may be believed and the tier starts cold. The offset in the checksum keeps bytes of an
//! older file from posing as records.
//!
//! Bounded: at most [`MAX_PENDING`] records wait in memory; the file is rewritten (new file, fsync,
//! rename, fsync of the folder) when it holds more than twice the live records.
//!
//! Locks: file → (the tier's state) → pending. `note` takes only the last, so the tier may call it
//! while it holds its state, and the log has the order in which the state changed.
//!
//! Errors: after a failed append the file's end is unknown, so the journal refuses everything until
//! [`Journal::rewrite`] has written the truth anew.

mod format;
#[cfg(test)]
mod tests;

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

use parking_lot::Mutex;

pub use self::format::{Entry, HEAD_BYTES, Scan, Tail, encode, parse, scan};

/// Records that may wait in memory for the next flush; beyond that the oldest caller flushes.
pub const MAX_PENDING: usize = 4096;
/// A file with fewer records than this is never rewritten for its size.
const MIN_REWRITE_RECORDS: u64 = 4096;

/// The open log.
pub struct Journal {
    path: PathBuf,
    extent_bytes: u64,
    file: Mutex<Open>,
    pending: Mutex<Vec<Entry>>,
}

struct Open {
    file: File,
    /// Where the next record begins.
    end: u64,
    records: u64,
    /// An append failed; see the module docs.
    broken: bool,
}

impl Journal {
    /// Reads the log at `path`, if there is one, and opens it for appending. A torn tail is cut off;
    /// what is damaged, or was written for other extents, is answered as it is and must be
    /// [rewritten](Journal::rewrite) before anything can be appended.
    ///
    /// # Errors
    /// The file cannot be made, read or cut.
    pub fn open(
        path: &Path,
        extent_bytes: u64,
        visit: impl FnMut(Entry),
    ) -> io::Result<(Self, Scan)> {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        let found = scan(&bytes, visit);
        let usable = found.extent_bytes == extent_bytes && found.tail != Tail::Damaged;
        if usable && found.tail == Tail::Torn {
            file.set_len(found.good_bytes)?;
        }
        let open = Open {
            file,
            end: found.good_bytes,
            records: found.records,
            broken: !usable,
        };
        let journal = Self {
            path: path.to_owned(),
            extent_bytes,
            file: Mutex::new(open),
            pending: Mutex::new(Vec::new()),
        };
        Ok((journal, found))
    }

    /// Takes note of what happened; it reaches the file with the next [`Journal::flush`]. Answers
    /// whether so much is waiting that the caller should flush soon.
    pub fn note(&self, entry: Entry) -> bool {
        let mut pending = self.pending.lock();
        pending.push(entry);
        pending.len() >= MAX_PENDING
    }

    /// Writes what is pending; with `sync` it is on the medium when this returns.
    ///
    /// # Errors
    /// It could not be written. The journal stays broken until it is rewritten.
    pub fn flush(&self, sync: bool) -> io::Result<()> {
        let mut open = self.file.lock();
        let entries = std::mem::take(&mut *self.pending.lock());
        if open.broken {
            return Err(io::Error::other(
                "the journal is broken until it is rewritten",
            ));
        }
        let mut bytes = Vec::with_capacity(entries.len() * 152);
        for entry in &entries {
            entry.encode(open.end + bytes.len() as u64, &mut bytes);
        }
        let mut written = Ok(());
        if !bytes.is_empty() {
            written = write_at(&open.file, &bytes, open.end);
        }
        if written.is_ok() && sync {
            written = open.file.sync_data();
        }
        match written {
            Ok(()) => {
                open.end += bytes.len() as u64;
                open.records += entries.len() as u64;
                Ok(())
            }
            Err(error) => {
                open.broken = true;
                // Best effort: cut the half-written record off, so that a restart sees a clean end.
                let _ = open.file.set_len(open.end);
                Err(error)
            }
        }
    }

    /// Whether nothing can be appended until a [`Journal::rewrite`].
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.file.lock().broken
    }

    /// Whether the file holds so many dead records that it should be rewritten.
    #[must_use]
    pub fn wants_rewrite(&self, live: u64) -> bool {
        self.file.lock().records > MIN_REWRITE_RECORDS.max(2 * live)
    }

    /// Writes a new file that holds exactly what `truth` answers, and puts it in the old one's place.
    ///
    /// `truth` is called while appends stand still; it must answer a state that includes everything
    /// noted so far and nothing later, and is given a closure-free way to say so: it drops what is
    /// pending by calling [`Journal::forget_pending`] under the lock that orders its notes.
    ///
    /// # Errors
    /// The old file is still there, but the journal counts as broken.
    pub fn rewrite(&self, truth: impl FnOnce() -> Vec<Entry>) -> io::Result<()> {
        let mut open = self.file.lock();
        open.broken = true;
        let entries = truth();
        let bytes = encode(self.extent_bytes, &entries);
        let new_path = self.path.with_extension("new");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&new_path)?;
        (&file).write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&new_path, &self.path)?;
        sync_parent(&self.path)?;
        *open = Open {
            file,
            end: bytes.len() as u64,
            records: entries.len() as u64,
            broken: false,
        };
        Ok(())
    }

    /// Drops what is pending; only for use inside [`Journal::rewrite`]'s `truth`.
    pub fn forget_pending(&self) {
        self.pending.lock().clear();
    }

    /// Bytes of the file.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.file.lock().end
    }
}

impl std::fmt::Debug for Journal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Journal")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

fn write_at(file: &File, bytes: &[u8], at: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::write_all_at(file, bytes, at)
}

/// Makes a rename or a new file in `path`'s folder survive power loss.
pub(super) fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => File::open(parent)?.sync_all(),
        _ => File::open(".")?.sync_all(),
    }
}
