//! What is ready before foyer is built: the folder, the journal, the space, the open files.

use std::{
    collections::HashMap,
    fs::{self, File},
};

use super::{
    config::{Geometry, NvmeConfig, NvmeError},
    files::{direct_io_works, prepare_files},
    residency::Wear,
    store::hash_of,
};
use crate::tier::{
    Resident,
    journal::{Entry, Journal, Tail},
};

/// Open files left for everything else when the limit has to be raised for the extents.
const SPARE_FILES: u64 = 4096;

/// What is ready before foyer is built.
pub(super) struct Prepared {
    pub(super) lock: File,
    pub(super) journal: Journal,
    pub(super) residents: HashMap<u64, Resident>,
    pub(super) wear: Wear,
    pub(super) direct: bool,
    pub(super) started_cold: bool,
    pub(super) note: String,
}

/// Takes the folder, reads the journal and reserves the space. Blocks.
pub(super) fn prepare(
    config: &NvmeConfig,
    geometry: Geometry,
    today: u32,
) -> Result<Prepared, NvmeError> {
    let dir = &config.dir;
    let fault = |what, path: &std::path::Path| {
        let path = path.to_owned();
        move |source| NvmeError::Io { what, path, source }
    };
    fs::create_dir_all(dir).map_err(fault("make", dir))?;
    let lock_path = dir.join("lock");
    let lock = File::create(&lock_path).map_err(fault("make", &lock_path))?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive)
        .map_err(|_| NvmeError::InUse { dir: dir.clone() })?;

    let mut residents = HashMap::new();
    let mut wear = Wear::default();
    let path = dir.join("journal");
    let (journal, found) = Journal::open(&path, geometry.extent_bytes, |entry| match entry {
        Entry::Stored(resident) => {
            residents.insert(hash_of(&resident.key), resident);
        }
        Entry::Gone(key) | Entry::Invalidated(key) => {
            let hash = hash_of(&key);
            if residents
                .get(&hash)
                .is_some_and(|held: &Resident| held.key == key)
            {
                residents.remove(&hash);
            }
        }
        Entry::InvalidatedNamespace(namespace) => {
            residents.retain(|_, held: &mut Resident| held.key.namespace != namespace);
        }
        Entry::Wear { day, bytes } => wear = Wear { day, bytes },
    })
    .map_err(fault("open", &path))?;
    let other_extents = found.extent_bytes != 0 && found.extent_bytes != geometry.extent_bytes;
    let damaged = found.tail == Tail::Damaged;
    if other_extents || damaged {
        residents.clear();
    }
    if wear.day != today {
        wear = Wear {
            day: today,
            bytes: 0,
        };
    }
    // Without a journal nothing in the files is known; with other extents nothing is where it was.
    let no_journal = found.extent_bytes == 0;
    let space_note = prepare_files(config, geometry, other_extents || no_journal)?;
    let direct = config.direct_io && direct_io_works(dir);
    let mut notes = vec![match (direct, config.direct_io) {
        (true, _) => "direct I/O",
        (false, true) => "buffered I/O: the file system does not take direct I/O",
        (false, false) => "buffered I/O as configured",
    }];
    notes.extend(space_note);
    if damaged {
        notes.push("the journal was damaged: started empty");
    } else if other_extents {
        notes.push("the extent size has changed: started empty");
    }
    let started_cold = other_extents || damaged;
    Ok(Prepared {
        lock,
        journal,
        residents,
        wear,
        direct,
        started_cold,
        note: notes.join("; "),
    })
}

/// Raises the soft limit of open files towards what the extents need: foyer keeps each of them open, and
/// so do we, for reading. Answers whether there is room for ours; without room for foyer's its own open
/// fails.
pub(super) fn allow_open_files(geometry: Geometry) -> bool {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let wanted = 2 * u64::from(geometry.extents) + SPARE_FILES;
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current.is_some_and(|current| current < wanted) {
        limit.current = Some(limit.maximum.map_or(wanted, |most| most.min(wanted)));
        let _ = setrlimit(Resource::Nofile, limit);
    }
    let limit = getrlimit(Resource::Nofile).current;
    limit.is_none_or(|most| most >= geometry.files_for_direct_reads())
}
