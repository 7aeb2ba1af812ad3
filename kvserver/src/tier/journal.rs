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

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

use kvproto::{BlockKey, NamespaceId, Place};
use parking_lot::Mutex;
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use super::{Resident, record::cut};

/// Records that may wait in memory for the next flush; beyond that the oldest caller flushes.
pub const MAX_PENDING: usize = 4096;
/// A file with fewer records than this is never rewritten for its size.
const MIN_REWRITE_RECORDS: u64 = 4096;
const MAGIC: [u8; 8] = *b"TKVJRNL1";
/// Bytes of the file's head.
pub const HEAD_BYTES: usize = 32;
const MARK: u8 = 0xA5;
const FRAME_BYTES: usize = 4;
const SUM_BYTES: usize = 8;

/// One thing that happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// The block is on the medium.
    Stored(Resident),
    /// It made room for others, or was found lost.
    Gone(BlockKey),
    /// It was removed for good.
    Invalidated(BlockKey),
    /// All of a namespace was removed for good.
    InvalidatedNamespace(NamespaceId),
    /// Bytes written on a day so far.
    Wear {
        /// Days since 1970.
        day: u32,
        /// Bytes.
        bytes: u64,
    },
}

impl Entry {
    fn encode(&self, offset: u64, into: &mut Vec<u8>) {
        let start = into.len();
        into.extend_from_slice(&[MARK, self.kind(), 0, 0]);
        match self {
            Self::Stored(resident) => {
                into.extend_from_slice(&resident.key.to_bytes());
                into.extend_from_slice(&resident.place.to_bytes());
                into.extend_from_slice(&resident.length_bytes.to_le_bytes());
                into.extend_from_slice(&resident.seal.to_le_bytes());
            }
            Self::Gone(key) | Self::Invalidated(key) => into.extend_from_slice(&key.to_bytes()),
            Self::InvalidatedNamespace(namespace) => into.extend_from_slice(namespace.as_bytes()),
            Self::Wear { day, bytes } => {
                into.extend_from_slice(&day.to_le_bytes());
                into.extend_from_slice(&bytes.to_le_bytes());
            }
        }
        let length = (into.len() - start - FRAME_BYTES) as u16;
        into[start + 2..start + 4].copy_from_slice(&length.to_le_bytes());
        let sum = xxh3_64_with_seed(&into[start..], offset);
        into.extend_from_slice(&sum.to_le_bytes());
    }

    fn kind(&self) -> u8 {
        match self {
            Self::Stored(_) => 1,
            Self::Gone(_) => 2,
            Self::Invalidated(_) => 3,
            Self::InvalidatedNamespace(_) => 4,
            Self::Wear { .. } => 5,
        }
    }

    /// The record at `offset`, and where the next one begins.
    fn decode(bytes: &[u8], offset: usize) -> Option<(Self, usize)> {
        let frame = bytes.get(offset..offset + FRAME_BYTES)?;
        let length = usize::from(u16::from_le_bytes([frame[2], frame[3]]));
        if frame[0] != MARK || payload_bytes(frame[1]) != Some(length) {
            return None;
        }
        let end = offset + FRAME_BYTES + length;
        let sum = bytes.get(end..end + SUM_BYTES)?;
        if xxh3_64_with_seed(&bytes[offset..end], offset as u64) != u64::from_le_bytes(cut(sum, 0))
        {
            return None;
        }
        let payload = &bytes[offset + FRAME_BYTES..end];
        let entry = match frame[1] {
            1 => Self::Stored(Resident {
                key: BlockKey::from_bytes(&cut(payload, 0)),
                place: Place::from_bytes(&cut(payload, 52))?,
                length_bytes: u64::from_le_bytes(cut(payload, 120)),
                seal: u64::from_le_bytes(cut(payload, 128)),
            }),
            2 => Self::Gone(BlockKey::from_bytes(&cut(payload, 0))),
            3 => Self::Invalidated(BlockKey::from_bytes(&cut(payload, 0))),
            4 => Self::InvalidatedNamespace(NamespaceId(cut(payload, 0))),
            _ => Self::Wear {
                day: u32::from_le_bytes(cut(payload, 0)),
                bytes: u64::from_le_bytes(cut(payload, 4)),
            },
        };
        Some((entry, end + SUM_BYTES))
    }
}

/// Payload length of a kind; `None` for kinds that do not exist.
fn payload_bytes(kind: u8) -> Option<usize> {
    match kind {
        1 => Some(BlockKey::BYTES + Place::BYTES + 16),
        2 | 3 => Some(BlockKey::BYTES),
        4 => Some(NamespaceId::BYTES),
        5 => Some(12),
        _ => None,
    }
}

/// How a journal ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tail {
    /// With a whole record.
    Clean,
    /// In the middle of its last record: a process died while it wrote.
    Torn,
    /// Whole records follow a broken one, or the head is not ours: nothing here may be believed.
    Damaged,
}

/// What a journal's bytes say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scan {
    /// The extent size it was written for; 0 when the head is broken.
    pub extent_bytes: u64,
    /// Whole records before the end or the first broken one.
    pub records: u64,
    /// Bytes up to there, head included.
    pub good_bytes: u64,
    /// How it ended.
    pub tail: Tail,
}

/// Reads a journal's bytes, giving every whole record to `visit` in order. Never panics (fuzzed).
pub fn scan(bytes: &[u8], mut visit: impl FnMut(Entry)) -> Scan {
    let Some(extent_bytes) = read_head(bytes) else {
        // A head that is not there yet is a file that was being made; anything else is not ours.
        let tail = if bytes.len() < HEAD_BYTES {
            Tail::Torn
        } else {
            Tail::Damaged
        };
        return Scan {
            extent_bytes: 0,
            records: 0,
            good_bytes: 0,
            tail,
        };
    };
    let (mut at, mut records) = (HEAD_BYTES, 0);
    while let Some((entry, next)) = Entry::decode(bytes, at) {
        visit(entry);
        records += 1;
        at = next;
    }
    let tail = if at == bytes.len() {
        Tail::Clean
    } else if (at + 1..bytes.len()).any(|later| Entry::decode(bytes, later).is_some()) {
        Tail::Damaged
    } else {
        Tail::Torn
    };
    Scan {
        extent_bytes,
        records,
        good_bytes: at as u64,
        tail,
    }
}

/// As [`scan`], collecting the records: for tests and fuzzing.
#[must_use]
pub fn parse(bytes: &[u8]) -> (Vec<Entry>, Scan) {
    let mut entries = Vec::new();
    let summary = scan(bytes, |entry| entries.push(entry));
    (entries, summary)
}

/// The bytes of a journal that holds exactly these records.
#[must_use]
pub fn encode(extent_bytes: u64, entries: &[Entry]) -> Vec<u8> {
    let mut bytes = encode_head(extent_bytes);
    for entry in entries {
        entry.encode(bytes.len() as u64, &mut bytes);
    }
    bytes
}

fn encode_head(extent_bytes: u64) -> Vec<u8> {
    let mut head = Vec::with_capacity(HEAD_BYTES);
    head.extend_from_slice(&MAGIC);
    head.extend_from_slice(&extent_bytes.to_le_bytes());
    head.extend_from_slice(&[0; 8]);
    let sum = xxh3_64(&head);
    head.extend_from_slice(&sum.to_le_bytes());
    head
}

fn read_head(bytes: &[u8]) -> Option<u64> {
    let head = bytes.get(..HEAD_BYTES)?;
    let whole = head[..8] == MAGIC && xxh3_64(&head[..24]) == u64::from_le_bytes(cut(head, 24));
    whole.then(|| u64::from_le_bytes(cut(head, 8)))
}

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

#[cfg(test)]
mod tests {
    use kvproto::{Part, RunHash, SequenceHash};
    use proptest::prelude::*;

    use super::*;

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
        let (journal, found) =
            Journal::open(&path, 4096, |entry| seen.push(entry)).expect("opened");
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
        let (journal, _) =
            Journal::open(&dir.path().join("journal"), 4096, |_| ()).expect("opened");
        journal.rewrite(Vec::new).expect("head");
        for n in 0..=MIN_REWRITE_RECORDS {
            journal.note(stored(n as u8));
        }
        journal.flush(false).expect("flushed");
        assert!(journal.wants_rewrite(10));
        assert!(!journal.wants_rewrite(MIN_REWRITE_RECORDS));
    }
}
