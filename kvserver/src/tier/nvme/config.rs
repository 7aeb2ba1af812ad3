//! What an NVMe tier is told, and the shape that follows from it.
//!
//! ```text
//! capacity ──► extents of equal size, one preallocated file each ──► foyer's "blocks"
//!              a block of KV never crosses an extent; space is reclaimed extent by extent
//! ```
//!
//! Units: bytes, milliseconds. Errors: [`NvmeError::Config`] names the field, the value and what would
//! be right.
//!
//! An extent is 80 MiB as soon as eight of them fit, so that the largest block (64 MiB) finds a place;
//! a smaller capacity is cut into sixteen and takes only blocks that fit one of those, and a larger one
//! into at most 512, because each costs an open file.

use std::path::PathBuf;

use super::super::record;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Direct I/O works in pages; so does foyer.
pub(super) const PAGE: u64 = 4 * KIB;
/// The index page that foyer keeps at the start of a run of entries.
pub(super) const INDEX_BYTES: u64 = PAGE;
/// What foyer puts before a value …
pub(super) const ENTRY_HEADER_BYTES: usize = 36;
/// … and behind it: our key.
const ENTRY_KEY_BYTES: u64 = kvproto::BlockKey::BYTES as u64;
/// Smallest capacity that makes sense: sixteen extents of 256 KiB.
pub const MIN_CAPACITY_BYTES: u64 = 4 * MIB;
const MIN_EXTENT_BYTES: u64 = 256 * KIB;
const MAX_EXTENT_BYTES: u64 = 2 * GIB;
const MIN_EXTENTS: u64 = 8;
const MAX_EXTENTS: u64 = 16 * 1024;
const LARGE_EXTENT_BYTES: u64 = 80 * MIB;

/// Settings of an [`NvmeTier`](super::NvmeTier).
#[derive(Clone, Debug)]
pub struct NvmeConfig {
    /// Folder that belongs to this tier alone; made if missing.
    pub dir: PathBuf,
    /// Bytes on disk for blocks, reserved at open. At least 4 MiB.
    pub capacity_bytes: u64,
    /// Bytes reclaimed at once, and an upper bound of what one block may need. `None`: chosen from the
    /// capacity. 256 KiB to 2 GiB, a multiple of 4 KiB, at least eight of them.
    pub extent_bytes: Option<u64>,
    /// Bypass the page cache where the file system allows it. Default on.
    pub direct_io: bool,
    /// Reserve the capacity on disk at open, so that a full disk shows then and not in a write years
    /// later. Default on; off only checks that there is room.
    pub preallocate: bool,
    /// Bytes of blocks that may wait to be written; more is answered `queue_full`. Default 256 MiB.
    pub queue_bytes: u64,
    /// Bytes of those that are being encoded and written at once; this much memory is used twice over.
    /// Default 32 MiB; one larger block may exceed it.
    pub flight_bytes: u64,
    /// Reads in flight at once. Default 32.
    pub reads: usize,
    /// Bytes of reads in flight at once. Default 256 MiB; one larger block may exceed it.
    pub read_bytes: u64,
    /// Reads that may wait for their turn; more is answered `Busy`. Default 1024.
    pub read_queue: usize,
    /// A read that takes longer is given up as a device failure. Default 5 000.
    pub read_deadline_ms: u64,
    /// A write that takes longer is given up as a device failure. Default 30 000.
    pub write_deadline_ms: u64,
    /// Bytes that may be written per day (UTC), 0 for no limit. Default 0.
    pub wear_bytes_per_day: u64,
    /// How long a failed tier stays out of service before it tries itself, doubling up to sixty times
    /// as long. Default 1 000.
    pub cooldown_ms: u64,
}

impl NvmeConfig {
    /// Defaults for a tier of `capacity_bytes` in `dir`.
    #[must_use]
    pub fn new(dir: impl Into<PathBuf>, capacity_bytes: u64) -> Self {
        Self {
            dir: dir.into(),
            capacity_bytes,
            extent_bytes: None,
            direct_io: true,
            preallocate: true,
            queue_bytes: 256 * MIB,
            flight_bytes: 32 * MIB,
            reads: 32,
            read_bytes: 256 * MIB,
            read_queue: 1024,
            read_deadline_ms: 5_000,
            write_deadline_ms: 30_000,
            wear_bytes_per_day: 0,
            cooldown_ms: 1_000,
        }
    }

    /// The shape of the store, or what is wrong with the settings.
    ///
    /// # Errors
    /// [`NvmeError::Config`].
    pub fn geometry(&self) -> Result<Geometry, NvmeError> {
        let refuse = |field, value: u64, problem: &str| {
            Err(NvmeError::Config {
                field,
                value,
                problem: problem.to_owned(),
            })
        };
        if self.capacity_bytes < MIN_CAPACITY_BYTES {
            return refuse(
                "capacity_bytes",
                self.capacity_bytes,
                "at least 4 MiB, or no NVMe tier at all",
            );
        }
        let extent_bytes = match self.extent_bytes {
            Some(bytes) if !(MIN_EXTENT_BYTES..=MAX_EXTENT_BYTES).contains(&bytes) => {
                return refuse("extent_bytes", bytes, "between 256 KiB and 2 GiB");
            }
            Some(bytes) if bytes % PAGE != 0 => {
                return refuse("extent_bytes", bytes, "a multiple of 4 KiB");
            }
            Some(bytes) => bytes,
            None => chosen_extent_bytes(self.capacity_bytes),
        };
        let extents = self.capacity_bytes / extent_bytes;
        if extents < MIN_EXTENTS {
            return refuse(
                "capacity_bytes",
                self.capacity_bytes,
                "at least eight times extent_bytes",
            );
        }
        if extents > MAX_EXTENTS {
            return refuse(
                "extent_bytes",
                extent_bytes,
                "at least capacity_bytes / 16384",
            );
        }
        for (field, value, least) in [
            ("queue_bytes", self.queue_bytes, PAGE),
            ("flight_bytes", self.flight_bytes, PAGE),
            ("read_bytes", self.read_bytes, PAGE),
            ("reads", self.reads as u64, 1),
            ("read_deadline_ms", self.read_deadline_ms, 1),
            ("write_deadline_ms", self.write_deadline_ms, 1),
            ("cooldown_ms", self.cooldown_ms, 1),
        ] {
            if value < least {
                return refuse(field, value, &format!("at least {least}"));
            }
        }
        Ok(Geometry {
            extent_bytes,
            extents: extents as u32,
        })
    }
}

fn chosen_extent_bytes(capacity_bytes: u64) -> u64 {
    if capacity_bytes < MIN_EXTENTS * LARGE_EXTENT_BYTES {
        return (capacity_bytes / 16 / PAGE * PAGE).max(MIN_EXTENT_BYTES);
    }
    let for_512 = (capacity_bytes / 512).div_ceil(16 * MIB) * 16 * MIB;
    for_512.clamp(LARGE_EXTENT_BYTES, MAX_EXTENT_BYTES)
}

/// How the capacity is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes of one extent.
    pub extent_bytes: u64,
    /// How many there are.
    pub extents: u32,
}

/// Open files left for connections and all else, without which extents are not opened a second time.
const LEAST_SPARE_FILES: u64 = 1024;

impl Geometry {
    /// Bytes on disk.
    #[must_use]
    pub fn capacity_bytes(&self) -> u64 {
        self.extent_bytes * u64::from(self.extents)
    }

    /// Bytes that a block of `length_bytes` takes on disk, without its share of index pages.
    #[must_use]
    pub fn entry_bytes(&self, length_bytes: u64) -> u64 {
        let record_bytes = record::record_bytes(length_bytes);
        (ENTRY_HEADER_BYTES as u64 + record_bytes + ENTRY_KEY_BYTES).div_ceil(PAGE) * PAGE
    }

    /// Files that the process must be allowed to open for reads that go around foyer: each extent a second
    /// time, and what the rest of a node needs.
    #[must_use]
    pub fn files_for_direct_reads(&self) -> u64 {
        2 * u64::from(self.extents) + LEAST_SPARE_FILES
    }

    /// Whether such a block can be stored at all. foyer drops larger ones without a word.
    #[must_use]
    pub fn fits(&self, length_bytes: u64) -> bool {
        length_bytes <= record::MAX_LENGTH_BYTES
            && self.entry_bytes(length_bytes) <= self.extent_bytes - INDEX_BYTES
    }
}

/// Why a tier could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum NvmeError {
    /// A setting is out of range or does not fit another.
    #[error("{field} = {value}: must be {problem}")]
    Config {
        /// Which setting.
        field: &'static str,
        /// What it was.
        value: u64,
        /// What would be right.
        problem: String,
    },
    /// Another process (or another tier of this one) has the folder.
    #[error("{} is in use by another process", dir.display())]
    InUse {
        /// The folder.
        dir: PathBuf,
    },
    /// The disk cannot hold the capacity.
    #[error("capacity_bytes = {capacity_bytes}: {} has room for {free_bytes} bytes more, {needed_bytes} are needed", dir.display())]
    NoSpace {
        /// The folder.
        dir: PathBuf,
        /// What was asked for.
        capacity_bytes: u64,
        /// Bytes still to be reserved.
        needed_bytes: u64,
        /// Bytes free.
        free_bytes: u64,
    },
    /// The disk answered with an error.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The answer.
        source: std::io::Error,
    },
    /// foyer could not be built.
    #[error("the store cannot be opened: {problem}")]
    Store {
        /// In its words.
        problem: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_block_fits_as_soon_as_eight_extents_do() {
        for capacity in [640 * MIB, GIB, 64 * GIB, 1024 * GIB, 30 * 1024 * GIB] {
            let geometry = NvmeConfig::new("x", capacity).geometry().expect("valid");
            assert!(geometry.fits(64 * MIB), "{capacity}: {geometry:?}");
            assert!(
                geometry.capacity_bytes() > capacity / 10 * 8
                    && geometry.capacity_bytes() <= capacity
            );
        }
        let small = NvmeConfig::new("x", 64 * MIB).geometry().expect("valid");
        assert!(small.fits(MIB) && !small.fits(64 * MIB));
    }

    #[test]
    fn a_wrong_setting_is_named() {
        let problem = |change: fn(&mut NvmeConfig)| {
            let mut config = NvmeConfig::new("x", GIB);
            change(&mut config);
            config.geometry().expect_err("refused").to_string()
        };
        assert_eq!(
            problem(|c| c.capacity_bytes = 1000),
            "capacity_bytes = 1000: must be at least 4 MiB, or no NVMe tier at all"
        );
        assert!(problem(|c| c.extent_bytes = Some(5000)).starts_with("extent_bytes = 5000"));
        assert!(problem(|c| c.extent_bytes = Some(GIB)).starts_with("capacity_bytes = "));
        assert!(problem(|c| c.queue_bytes = 0).starts_with("queue_bytes = 0"));
    }
}
