//! Memory that a client writes and the node copies from.
//!
//! ```text
//!  client   StagingMap, writable ─write─► bytes ─copy─► a slot    node: Staging, mapped for reading only
//! ```
//!
//! Its size is sealed and nothing else can be, so that neither side can cut it under the other. The client
//! may write whenever it likes; the node sums what it has copied, so a writer that changes bytes meanwhile is a
//! writer whose sums are wrong.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::mm::ProtFlags;

use super::mapped::Mapped;
use super::{OutOfBounds, SharedError, Toward};

/// The node's end of a client's staging memory.
pub struct Staging {
    fd: OwnedFd,
    memory: Mapped,
}

impl Staging {
    /// New memory of `bytes`, zeroed; it takes room as it is written.
    ///
    /// # Errors
    /// [`SharedError`]: no length, or the kernel says no.
    pub fn create(bytes: u64) -> Result<Self, SharedError> {
        let failed = |step| {
            move |source: rustix::io::Errno| SharedError::System {
                step,
                source: source.into(),
            }
        };
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = memfd_create("terrace-staging", flags).map_err(failed("memfd_create"))?;
        ftruncate(&fd, bytes).map_err(failed("ftruncate"))?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        fcntl_add_seals(&fd, seals).map_err(failed("seal"))?;
        let memory = Mapped::new("staging memory", fd.as_fd(), ProtFlags::READ)?;
        Ok(Self { fd, memory })
    }

    /// To be handed to the client.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// How long it is.
    pub fn length_bytes(&self) -> u64 {
        self.memory.length() as u64
    }

    /// Copies what the client has written there by now.
    ///
    /// # Errors
    /// When the range is not inside; nothing was copied.
    pub fn read(&self, offset: u64, to: &mut [u8]) -> Result<(), OutOfBounds> {
        self.memory.copy_out(offset, to)
    }

    /// As [`Staging::read`], and answers the XXH3-64 of what lies at `to` afterwards, whatever the client writes
    /// meanwhile: one pass for a page.
    ///
    /// # Errors
    /// As [`Staging::read`].
    pub fn read_summed(
        &self,
        offset: u64,
        to: &mut [u8],
        toward: Toward,
    ) -> Result<u64, OutOfBounds> {
        self.memory.copy_out_summed(offset, to, toward)
    }
}

impl std::fmt::Debug for Staging {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Staging")
            .field("length_bytes", &self.length_bytes())
            .finish_non_exhaustive()
    }
}

/// The client's end of its staging memory.
pub struct StagingMap(Mapped);

impl StagingMap {
    /// Maps the staging memory that a node has handed out. The descriptor is closed; the mapping stays.
    ///
    /// # Errors
    /// [`SharedError`]: its size is not sealed, or the kernel says no.
    pub fn map(fd: OwnedFd) -> Result<Self, SharedError> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        Mapped::new("staging memory", fd.as_fd(), protection).map(Self)
    }

    /// How long it is.
    pub fn length_bytes(&self) -> u64 {
        self.0.length() as u64
    }

    /// Copies `from` in. Which part is whose is for the client's own allocator to say.
    ///
    /// # Errors
    /// When the range is not inside; nothing was copied.
    pub fn write(&self, offset: u64, from: &[u8]) -> Result<(), OutOfBounds> {
        self.0.copy_in(offset, from)
    }

    /// As [`StagingMap::write`], and answers the XXH3-64 of `from`: one pass for a page. The copy stays in the
    /// cache, where the node finds it.
    ///
    /// # Errors
    /// As [`StagingMap::write`].
    pub fn write_summed(&self, offset: u64, from: &[u8]) -> Result<u64, OutOfBounds> {
        self.0.copy_in_summed(offset, from, Toward::Cache)
    }
}

impl std::fmt::Debug for StagingMap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StagingMap")
            .field("length_bytes", &self.length_bytes())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::SealFlags;
    use rustix::io::Errno;

    use super::{Staging, StagingMap};
    use crate::shared::{SharedError, Toward};

    const BYTES: u64 = 1 << 20;

    fn pair() -> (Staging, StagingMap) {
        let staging = Staging::create(BYTES).expect("memory");
        let fd = staging.fd().try_clone_to_owned().expect("a descriptor");
        (staging, StagingMap::map(fd).expect("a mapping"))
    }

    #[test]
    fn what_the_client_writes_the_node_reads() {
        let (staging, map) = pair();
        let written: Vec<u8> = (0..70_000_usize).map(|i| ((i * 13) >> 2) as u8).collect();
        map.write(12_345, &written).expect("inside");
        let mut read = vec![0; written.len()];
        staging.read(12_345, &mut read).expect("inside");
        assert!(read == written);
        map.write(BYTES - 1, &[7]).expect("the last byte");
        let mut last = [0];
        staging.read(BYTES - 1, &mut last).expect("the last byte");
        assert_eq!(last, [7]);
    }

    #[test]
    fn both_ends_sum_what_they_copy() {
        let (staging, map) = pair();
        for length in [0, 5, 240, 4096, 65_500, 65_536, 100_001] {
            let written: Vec<u8> = (0..length).map(|i: usize| ((i * 13) >> 2) as u8).collect();
            let sum = twox_hash::XxHash3_64::oneshot(&written);
            assert_eq!(map.write_summed(64, &written), Ok(sum), "{length}");
            for toward in [Toward::Cache, Toward::Memory] {
                let mut read = vec![0; length];
                assert_eq!(
                    staging.read_summed(64, &mut read, toward),
                    Ok(sum),
                    "{length}"
                );
                assert!(read == written);
            }
        }
    }

    #[test]
    fn ranges_outside_are_refused_at_either_end() {
        let (staging, map) = pair();
        for offset in [BYTES - 1, BYTES, u64::MAX] {
            assert!(map.write(offset, &[1, 2]).is_err(), "{offset}");
            assert!(staging.read(offset, &mut [0; 2]).is_err(), "{offset}");
            assert!(map.write_summed(offset, &[1; 256]).is_err(), "{offset}");
            let read = staging.read_summed(offset, &mut [0; 256], Toward::Memory);
            assert!(read.is_err(), "{offset}");
        }
    }

    #[test]
    fn its_size_is_nobodys_to_change() {
        let (staging, _map) = pair();
        let fd = staging.fd();
        assert_eq!(rustix::fs::ftruncate(fd, 0), Err(Errno::PERM));
        assert_eq!(rustix::fs::ftruncate(fd, 2 * BYTES), Err(Errno::PERM));
        // Nor can a client take the node's sight away by sealing it further.
        assert_eq!(
            rustix::fs::fcntl_add_seals(fd, SealFlags::WRITE),
            Err(Errno::PERM)
        );
    }

    #[test]
    fn no_length_is_no_memory() {
        assert!(matches!(
            Staging::create(0),
            Err(SharedError::Length { .. })
        ));
    }
}
