//! The data folder: one node's, as long as that node lives.
//!
//! Errors: [`DataDirError`], each with what to do next.

use std::{
    fs,
    io::{self, Write},
    path::{Path, PathBuf},
};

/// Why a data folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    /// It cannot be made or written.
    #[error("cannot write in the data folder {}: {source}; make it writable for this user, or choose another with --data-dir", path.display())]
    Unwritable {
        /// The folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another node uses it.
    #[error("the data folder {} is in use by another node{holder}; stop that one, or choose another with --data-dir", path.display())]
    Locked {
        /// The folder.
        path: PathBuf,
        /// Who, as far as known.
        holder: String,
    },
}

/// The data folder, locked for as long as this lives.
pub(crate) struct DataDir {
    path: PathBuf,
    _lock: fs::File,
}

impl DataDir {
    pub(crate) fn open(path: &Path) -> Result<Self, DataDirError> {
        let refuse = |source| DataDirError::Unwritable {
            path: path.to_owned(),
            source,
        };
        fs::create_dir_all(path).map_err(refuse)?;
        let file = path.join("lock");
        let mut lock = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&file)
            .map_err(refuse)?;
        match rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let pid = fs::read_to_string(&file).unwrap_or_default();
                let holder = match pid.trim() {
                    "" => String::new(),
                    pid => format!(" (process {pid})"),
                };
                return Err(DataDirError::Locked {
                    path: path.to_owned(),
                    holder,
                });
            }
            Err(error) => return Err(refuse(error.into())),
        }
        let pid = std::process::id().to_string();
        let written = lock
            .set_len(0)
            .and_then(|()| lock.write_all(pid.as_bytes()));
        match written {
            Err(error) if !is_no_room(&error) => return Err(refuse(error)),
            _ => {} // it is locked; its number is for people
        }
        Ok(Self {
            path: path.to_owned(),
            _lock: lock,
        })
    }

    pub(crate) fn refuse(&self, source: io::Error) -> DataDirError {
        DataDirError::Unwritable {
            path: self.path.clone(),
            source,
        }
    }
}

/// Whether the disk is full, for this user at least: then a node goes on with what it has read.
pub(crate) fn is_no_room(error: &io::Error) -> bool {
    use io::ErrorKind::{QuotaExceeded, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded)
}

/// The old file or the new one, whatever happens: written beside it, synced, renamed.
pub(crate) fn write_whole(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    write_whole_by(&path.with_extension("new"), path, bytes, mode)
}

/// The same by way of `beside`, a file in the same folder.
pub(crate) fn write_whole_by(
    beside: &Path,
    path: &Path,
    bytes: &[u8],
    mode: u32,
) -> io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(mode)
        .open(beside)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(beside, path)?;
    let folder = path
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    fs::File::open(folder)?.sync_all()
}
