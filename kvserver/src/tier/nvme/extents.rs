//! Where entries lie: what foyer knows and does not tell, read from its own index pages.
//!
//! ```text
//!   extent   │ index 4 KiB │ entry │ entry │ … │ index │ entry │ …        an index lists up to 170 entries
//!   index    XXH64 of all behind it u64 │ count u32 │ count × line        big-endian
//!   line     hash u64 │ sequence u64 │ offset from the index u32 │ length u32
//! ```
//!
//! *Positions are hints, seals decide.* foyer may overwrite an extent at any time, and nothing here is told
//! of it; a reader who follows a position and does not find its block there, whole and sealed, asks
//! foyer. So nothing here needs to be right for an answer to be right, and whatever cannot be
//! understood (another version's format, a torn page) only costs the shorter way.
//!
//! foyer writes an index again with every batch, after the entries and before it says that they are
//! written. It fills one extent after the other, in the order in which they became clean, and that order
//! it tells through its public eviction pickers ([`Reclaimed`]). So a look costs two pages: the index
//! that is being filled, and the first of the next extent, to see whether foyer has gone on.
//!
//! Facts about foyer's format are in `tests/tests/foyer_facts.rs`.
//! Units: bytes. Errors: none; what cannot be read is not known.
//! Locks: the walk's, then the tier's state, for one index at a time.

use std::{
    collections::VecDeque,
    fs::{File, OpenOptions},
    hash::{BuildHasher, Hasher},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::AcqRel},
    },
};

use foyer::{DefaultHasher, EvictionInfo, EvictionPicker};
use kvgpu::SlotMut;
use parking_lot::Mutex;
use rustix::fs::OFlags;

use super::{
    config::{Geometry, INDEX_BYTES, PAGE},
    direct::Stages,
    files::path_of,
    residency::Residency,
};

const SUM_BYTES: usize = 8;
const LINES_AT: usize = 12;
const LINE_BYTES: usize = 24;
/// Lines of a full index; behind it another one begins.
const MAX_LINES: usize = (INDEX_BYTES as usize - LINES_AT) / LINE_BYTES;
/// Clean extents looked at for foyer's next one; it takes the first but for races in itself.
const LOOK_AHEAD: usize = 4;

/// Where an entry is believed to lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Position {
    pub(super) extent: u32,
    pub(super) offset: u32,
    /// foyer's count of writes: of two copies the higher is the later.
    pub(super) sequence: u64,
}

/// A line of an index, with the offset in its extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Line {
    pub(super) hash: u64,
    pub(super) position: Position,
    pub(super) entry_bytes: u64,
}

/// Extents that foyer has begun to reclaim, in order: in this order it will fill them again.
#[derive(Clone, Debug, Default)]
pub(super) struct Reclaimed(Arc<Mutex<VecDeque<u32>>>);

impl Reclaimed {
    fn drain(&self) -> Vec<u32> {
        self.0.lock().drain(..).collect()
    }
}

/// Picks nothing; foyer tells all its pickers what was picked.
impl EvictionPicker for Reclaimed {
    fn pick(&mut self, _: EvictionInfo<'_>) -> Option<u32> {
        None
    }

    fn on_block_evictable(&mut self, _: EvictionInfo<'_>, _: u32) {}

    fn on_block_evict(&mut self, info: EvictionInfo<'_>, extent: u32) {
        let mut reclaimed = self.0.lock();
        reclaimed.push_back(extent);
        // Nobody has looked for a whole round: the oldest are not clean any more.
        if reclaimed.len() > info.blocks.len() {
            reclaimed.pop_front();
        }
    }
}

/// foyer's files, opened once more for reading.
pub(super) struct Extents {
    files: Vec<File>,
    extent_bytes: u64,
    walk: Mutex<Walk>,
    wanted: AtomicBool,
    reclaimed: Reclaimed,
    /// What readers read into.
    pub(super) stages: Stages,
}

/// How far the indexes have been read.
#[derive(Default)]
struct Walk {
    /// All extents have been looked at once.
    begun: bool,
    /// The extent that is being filled, as far as is known.
    filling: Option<Filling>,
    /// Clean extents, in the order in which foyer takes them.
    clean: VecDeque<u32>,
    /// By extent: the first sequence of its first index when it was looked at last; `None` when clean.
    firsts: Vec<Option<u64>>,
}

#[derive(Clone, Copy)]
struct Filling {
    extent: u32,
    /// Where its last known index lies.
    index_at: u64,
    /// The first sequence in that index; lower ones behind it are of the extent's former life.
    sequence: u64,
}

impl Extents {
    /// Opens the files, which exist since foyer has opened them too.
    pub(super) fn open(
        dir: &Path,
        geometry: Geometry,
        direct: bool,
        reclaimed: Reclaimed,
    ) -> io::Result<Self> {
        let flags = match direct {
            true => OFlags::DIRECT | OFlags::NOATIME,
            false => OFlags::empty(),
        };
        let open = |number| {
            OpenOptions::new()
                .read(true)
                .custom_flags(flags.bits() as i32)
                .open(path_of(dir, number))
        };
        Ok(Self {
            files: (0..geometry.extents).map(open).collect::<Result<_, _>>()?,
            extent_bytes: geometry.extent_bytes,
            walk: Mutex::default(),
            wanted: AtomicBool::new(false),
            reclaimed,
            stages: Stages::default(),
        })
    }

    /// Reads whole pages at a position, into memory that begins on a page. Blocks.
    pub(super) fn read(&self, position: Position, pages: &mut [u8]) -> io::Result<()> {
        let Some(file) = self.files.get(position.extent as usize) else {
            return Err(io::ErrorKind::NotFound.into());
        };
        file.read_exact_at(pages, u64::from(position.offset))
    }

    /// Whether the caller shall [`look`](Self::look): somebody else is not about to.
    pub(super) fn wants_look(&self) -> bool {
        !self.wanted.swap(true, AcqRel)
    }

    /// Everything is looked at anew next time, because foyer was built anew.
    pub(super) fn forget(&self) {
        *self.walk.lock() = Walk::default();
        // The look that was wanted may have been left behind on a stuck disk.
        self.wanted.swap(false, AcqRel);
    }

    /// Reads what foyer has written since the last look and notes where entries lie. Blocks.
    pub(super) fn look(&self, residency: &Residency) {
        let mut walk = self.walk.lock();
        // Whoever asks from here on asks for another look.
        self.wanted.swap(false, AcqRel);
        let mut page = SlotMut::heap(INDEX_BYTES as usize);
        if !walk.begun {
            self.look_at_all(&mut walk, &mut page, residency);
        }
        let there = |extent: &u32| (*extent as usize) < self.files.len();
        for extent in self.reclaimed.drain().into_iter().filter(there) {
            walk.clean.retain(|&other| other != extent);
            walk.clean.push_back(extent);
        }
        loop {
            if let Some(filling) = walk.filling {
                walk.filling = Some(self.follow(filling, &mut page, residency));
            }
            let Some(next) = self.next_filled(&mut walk, &mut page) else {
                return;
            };
            // What was added behind the first look, just before foyer went on.
            if let Some(filled) = walk.filling.replace(next) {
                self.follow(filled, &mut page, residency);
            }
        }
    }

    fn look_at_all(&self, walk: &mut Walk, page: &mut SlotMut, residency: &Residency) {
        let mut newest = 0;
        for extent in 0..self.files.len() as u32 {
            let first = self
                .read_index(extent, 0, page)
                .and_then(|lines| first_sequence(&lines));
            walk.firsts.push(first);
            let Some(sequence) = first else {
                walk.clean.push_back(extent);
                continue;
            };
            let begin = Filling {
                extent,
                index_at: 0,
                sequence,
            };
            let last = self.follow(begin, page, residency);
            if walk.filling.is_none() || last.sequence > newest {
                newest = last.sequence;
                walk.filling = Some(last);
            }
        }
        walk.begun = true;
    }

    /// The clean extent that foyer has begun to fill since, if there is one.
    fn next_filled(&self, walk: &mut Walk, page: &mut SlotMut) -> Option<Filling> {
        for at in 0..walk.clean.len().min(LOOK_AHEAD) {
            let extent = walk.clean[at];
            let first = self
                .read_index(extent, 0, page)
                .and_then(|lines| first_sequence(&lines));
            // The same as before: reclaim has not come to clean it yet.
            if first == walk.firsts[extent as usize] {
                continue;
            }
            walk.firsts[extent as usize] = first;
            if let Some(sequence) = first {
                walk.clean.remove(at);
                return Some(Filling {
                    extent,
                    index_at: 0,
                    sequence,
                });
            }
        }
        None
    }

    /// Notes all that is listed from an index on; answers the last index.
    fn follow(&self, from: Filling, page: &mut SlotMut, residency: &Residency) -> Filling {
        let mut last = from;
        let mut index_at = from.index_at;
        while let Some(lines) = self.read_index(from.extent, index_at, page) {
            match first_sequence(&lines) {
                Some(sequence) if sequence >= last.sequence => {
                    last = Filling {
                        extent: from.extent,
                        index_at,
                        sequence,
                    };
                }
                _ => break,
            }
            residency.place(&lines);
            let Some(end) = lines
                .last()
                .map(|line| u64::from(line.position.offset) + line.entry_bytes)
            else {
                break;
            };
            if lines.len() < MAX_LINES {
                break;
            }
            index_at = end;
        }
        last
    }

    fn read_index(&self, extent: u32, index_at: u64, page: &mut SlotMut) -> Option<Vec<Line>> {
        if index_at + INDEX_BYTES > self.extent_bytes {
            return None;
        }
        let at = Position {
            extent,
            offset: u32::try_from(index_at).ok()?,
            sequence: 0,
        };
        self.read(at, page).ok()?;
        parse_index(page, at, self.extent_bytes)
    }
}

fn first_sequence(lines: &[Line]) -> Option<u64> {
    lines.first().map(|line| line.position.sequence)
}

/// The lines of an index that lies at `at`; `None` when it is none, or says what cannot be.
fn parse_index(page: &[u8], at: Position, extent_bytes: u64) -> Option<Vec<Line>> {
    let u32_at = |at: usize| Some(u32::from_be_bytes(page.get(at..at + 4)?.try_into().ok()?));
    let u64_at = |at: usize| Some(u64::from_be_bytes(page.get(at..at + 8)?.try_into().ok()?));
    let mut sum = DefaultHasher::default().build_hasher();
    sum.write(page.get(SUM_BYTES..)?);
    if sum.finish() != u64_at(0)? {
        return None;
    }
    let count = u32_at(SUM_BYTES)? as usize;
    if count > MAX_LINES {
        return None;
    }
    let line = |nth: usize| {
        let line_at = LINES_AT + nth * LINE_BYTES;
        let offset = u64::from(at.offset) + u64::from(u32_at(line_at + 16)?);
        let entry_bytes = u64::from(u32_at(line_at + 20)?).div_ceil(PAGE) * PAGE;
        if offset % PAGE != 0 || offset + entry_bytes > extent_bytes {
            return None;
        }
        Some(Line {
            hash: u64_at(line_at)?,
            position: Position {
                extent: at.extent,
                offset: u32::try_from(offset).ok()?,
                sequence: u64_at(line_at + 8)?,
            },
            entry_bytes,
        })
    };
    (0..count).map(line).collect()
}
