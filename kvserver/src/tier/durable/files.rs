//! The durable tier's folder: names, whole writes, and what is found at open.

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
};

use kvproto::{BlockKey, NamespaceId, Part, SequenceHash};

use super::{
    super::{BlockRef, Resident, journal::sync_parent, record},
    DurableConfig, DurableError,
};

/// What the folder holds.
pub(super) struct Found {
    pub(super) lock: File,
    pub(super) residents: HashMap<BlockKey, Resident>,
    /// Bytes of all records, damaged ones included.
    pub(super) used_bytes: u64,
    pub(super) corrupt_files: u64,
}

pub(super) fn fault(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DurableError {
    let path = path.to_owned();
    move |source| DurableError::Io { what, path, source }
}

/// Takes the folder, clears away what was never finished, and reads every block's header. Blocks.
pub(super) fn scan(config: &DurableConfig) -> Result<Found, DurableError> {
    let (tmp, blocks) = (config.dir.join("tmp"), config.dir.join("blocks"));
    for dir in [&config.dir, &tmp, &blocks] {
        fs::create_dir_all(dir).map_err(fault("make", dir))?;
    }
    let lock_path = config.dir.join("lock");
    let lock = File::create(&lock_path).map_err(fault("make", &lock_path))?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).map_err(
        |_| DurableError::InUse {
            dir: config.dir.clone(),
        },
    )?;
    for unfinished in list(&tmp)? {
        fs::remove_file(&unfinished).map_err(fault("remove", &unfinished))?;
    }
    let mut found = Found {
        lock,
        residents: HashMap::new(),
        used_bytes: 0,
        corrupt_files: 0,
    };
    for number in 0..=u8::MAX {
        let folder = blocks.join(format!("{number:02x}"));
        fs::create_dir_all(&folder).map_err(fault("make", &folder))?;
        for path in list(&folder)? {
            found.take(&path)?;
            if found.residents.len() as u64 > config.max_blocks {
                return Err(DurableError::TooManyBlocks {
                    dir: config.dir.clone(),
                    max_blocks: config.max_blocks,
                });
            }
        }
    }
    // The folders themselves must survive power loss before anything in them is called synced.
    for dir in [&blocks, &config.dir] {
        File::open(dir)
            .and_then(|dir| dir.sync_all())
            .map_err(fault("sync", dir))?;
    }
    Ok(found)
}

impl Found {
    fn take(&mut self, path: &Path) -> Result<(), DurableError> {
        let mut file = File::open(path).map_err(fault("open", path))?;
        let length = file.metadata().map_err(fault("measure", path))?.len();
        self.used_bytes += length;
        let Some(key) = key_of(path) else {
            // Set aside earlier, or somebody else's file; it takes room all the same.
            self.corrupt_files += 1;
            return Ok(());
        };
        match record::read_head(&mut file) {
            Ok(header)
                if header.key == key && record::record_bytes(header.length_bytes) == length =>
            {
                let resident = Resident {
                    key,
                    place: header.place,
                    length_bytes: header.length_bytes,
                    seal: header.seal,
                };
                self.residents.insert(key, resident);
            }
            Ok(_) | Err(_) => {
                tracing::warn!(file = %path.display(), "a durable block is damaged; set aside");
                set_aside(path).map_err(fault("set aside", path))?;
                self.corrupt_files += 1;
            }
        }
        Ok(())
    }
}

fn list(dir: &Path) -> Result<Vec<PathBuf>, DurableError> {
    let entries = fs::read_dir(dir).map_err(fault("list", dir))?;
    entries
        .map(|entry| entry.map(|entry| entry.path()).map_err(fault("list", dir)))
        .collect()
}

/// `blocks/3f/<namespace>-<hash>-<rank>-<group>.blk`: the first byte of the hash spreads the files.
pub(super) fn path_of(dir: &Path, key: &BlockKey) -> PathBuf {
    let BlockKey {
        namespace,
        hash,
        part,
    } = key;
    let name = format!("{namespace}-{hash}-{}-{}.blk", part.rank, part.layer_group);
    dir.join("blocks")
        .join(format!("{:02x}", hash.0[0]))
        .join(name)
}

fn key_of(path: &Path) -> Option<BlockKey> {
    let mut fields = path.file_name()?.to_str()?.strip_suffix(".blk")?.split('-');
    let namespace: NamespaceId = fields.next()?.parse().ok()?;
    let hash: SequenceHash = fields.next()?.parse().ok()?;
    let part = Part {
        rank: fields.next()?.parse().ok()?,
        layer_group: fields.next()?.parse().ok()?,
    };
    fields.next().is_none().then_some(BlockKey {
        namespace,
        hash,
        part,
    })
}

/// Writes a whole record and syncs it.
pub(super) fn write_record(path: &Path, block: &BlockRef) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)?;
    file.write_all(&record::encode_head(block.header()))?;
    file.write_all(block.bytes())?;
    file.sync_all()
}

/// Gives a damaged file a name under which it is never read again.
pub(super) fn set_aside(path: &Path) -> io::Result<()> {
    fs::rename(path, path.with_extension("corrupt"))?;
    sync_parent(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_name_says_its_key() {
        let key = BlockKey {
            namespace: NamespaceId([0xab; 16]),
            hash: SequenceHash([0x3f; 32]),
            part: Part {
                rank: 65_535,
                layer_group: 7,
            },
        };
        let path = path_of(Path::new("/x"), &key);
        assert!(path.starts_with("/x/blocks/3f"));
        assert_eq!(key_of(&path), Some(key));
        for stranger in ["a.blk", "a-b-1-2.blk", "README", "x.corrupt"] {
            assert_eq!(key_of(Path::new(stranger)), None);
        }
    }
}
