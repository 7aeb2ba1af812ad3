//! foyer's files, before foyer opens them and beside it.
//!
//! ```text
//! <dir>/extents/foyer-storage-direct-fs-00000000 …   one per extent, its space reserved
//! <dir>/probe, <dir>/probe-direct                    written, read and removed: does the disk work, does direct I/O?
//! ```
//!
//! Units: bytes. Errors: [`NvmeError`] where a file or the space for it cannot be had; `io::Error` of a probe.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _},
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use kvgpu::SlotMut;
use rustix::fs::{FallocateFlags, OFlags};

use super::config::{Geometry, NvmeConfig, NvmeError, PAGE};

/// foyer's own file names; one file per extent.
const FILE_PREFIX: &str = "foyer-storage-direct-fs-";

/// The file of an extent.
pub(super) fn path_of(dir: &Path, extent: u32) -> PathBuf {
    files_dir(dir).join(format!("{FILE_PREFIX}{extent:08}"))
}

/// Where foyer's files lie.
pub(super) fn files_dir(dir: &Path) -> PathBuf {
    dir.join("extents")
}

/// Makes the files and reserves their space before foyer opens them (it would leave them sparse).
/// Answers a note when the file system cannot reserve.
pub(super) fn prepare_files(
    config: &NvmeConfig,
    geometry: Geometry,
    start_cold: bool,
) -> Result<Option<&'static str>, NvmeError> {
    let dir = files_dir(&config.dir);
    let fault = |what, path: &Path| {
        let path = path.to_owned();
        move |source| NvmeError::Io { what, path, source }
    };
    fs::create_dir_all(&dir).map_err(fault("make", &dir))?;
    for entry in fs::read_dir(&dir).map_err(fault("list", &dir))? {
        let path = entry.map_err(fault("list", &dir))?.path();
        let number = path
            .file_name()
            .and_then(|name| name.to_str())
            .and_then(|name| name.strip_prefix(FILE_PREFIX)?.parse::<u32>().ok());
        if number.is_some_and(|number| start_cold || number >= geometry.extents) {
            fs::remove_file(&path).map_err(fault("remove", &path))?;
        }
    }
    let path_of = |number| path_of(&config.dir, number);
    let reserved = |number| fs::metadata(path_of(number)).map_or(0, |file| file.blocks() * 512);
    let needed_bytes: u64 = (0..geometry.extents)
        .map(|number| geometry.extent_bytes.saturating_sub(reserved(number)))
        .sum();
    let space = rustix::fs::statvfs(&dir).map_err(|errno| fault("measure", &dir)(errno.into()))?;
    let free_bytes = space.f_bavail.saturating_mul(space.f_frsize);
    let no_space = || NvmeError::NoSpace {
        dir: config.dir.clone(),
        capacity_bytes: config.capacity_bytes,
        needed_bytes,
        free_bytes,
    };
    if needed_bytes > free_bytes {
        return Err(no_space());
    }
    if !config.preallocate {
        return Ok(Some("space checked, not reserved"));
    }
    for number in 0..geometry.extents {
        let path = path_of(number);
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(fault("open", &path))?;
        match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, geometry.extent_bytes) {
            Ok(()) => {}
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {
                return Ok(Some("space checked; the file system cannot reserve it"));
            }
            Err(rustix::io::Errno::NOSPC) => return Err(no_space()),
            Err(errno) => return Err(fault("reserve", &path)(errno.into())),
        }
    }
    Ok(None)
}

/// Whether direct I/O really works here: opens, writes and reads a page.
pub(super) fn direct_io_works(dir: &Path) -> bool {
    let path = dir.join("probe-direct");
    let flags = OFlags::DIRECT | OFlags::NOATIME;
    let try_it = || -> io::Result<()> {
        let file = OpenOptions::new()
            .create(true)
            .truncate(true)
            .read(true)
            .write(true)
            .custom_flags(flags.bits() as i32)
            .open(&path)?;
        // A heap slot is page-aligned ordinary memory.
        let mut page = SlotMut::heap(PAGE as usize);
        file.write_all_at(&page, 0)?;
        file.read_exact_at(&mut page, 0)
    };
    let works = try_it().is_ok();
    let _ = fs::remove_file(&path);
    works
}

/// Writes, syncs, reads back and removes a small file: is the disk a disk again?
pub(super) fn probe_disk(dir: &Path) -> io::Result<()> {
    let path = dir.join("probe");
    let written = [0x5a_u8; 16 * 1024];
    let mut read = Vec::new();
    let file = File::create(&path)?;
    file.write_all_at(&written, 0)?;
    file.sync_all()?;
    File::open(&path)?.read_to_end(&mut read)?;
    fs::remove_file(&path)?;
    if read != written {
        return Err(io::Error::other("what was written did not come back"));
    }
    Ok(())
}
