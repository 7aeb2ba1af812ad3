//! Removing blocks: forgotten at once, unlinked, and the folder synced before it is said.
//!
//! Errors: the disk's; the blocks are gone from this moment on even then, and may be back after a restart.

use std::{fs, io, sync::Arc, time::Duration};

use kvproto::BlockKey;

use super::{Shared, files::path_of};
use crate::tier::{gate::within, record};

impl Shared {
    /// Forgets keys; answers those that have a file to unlink.
    pub(super) fn forget(&self, keys: &[BlockKey]) -> Vec<BlockKey> {
        let mut state = self.state.lock();
        let mut doomed = Vec::new();
        for key in keys {
            let resident = state.residents.remove(key);
            if let Some(resident) = &resident {
                state.used_bytes -= record::record_bytes(resident.length_bytes);
            }
            let in_place = state.writing.get_mut(key).is_some_and(|writing| {
                writing.cancelled = true;
                writing.in_place
            });
            let is_left = state.unremoved.contains(key);
            if resident.is_some() || in_place || is_left || state.removing.contains_key(key) {
                *state.removing.entry(*key).or_default() += 1;
                doomed.push(*key);
            }
        }
        doomed
    }

    pub(super) async fn unlink(self: &Arc<Self>, doomed: Vec<BlockKey>) -> io::Result<()> {
        if doomed.is_empty() {
            return Ok(());
        }
        let shared = Arc::clone(self);
        let deadline = Duration::from_millis(self.config.write_deadline_ms);
        let work = async {
            let keys = doomed.clone();
            let unlinked = self.threads.blocking(move || {
                for key in &keys {
                    match fs::remove_file(path_of(&shared.config.dir, key)) {
                        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                        _ => {}
                    }
                }
                Ok(())
            });
            unlinked.await.map_err(io::Error::other)??;
            self.sync_folders(&doomed).await
        };
        let removed = within(&*self.clock, deadline, work).await;
        let removed = removed.unwrap_or_else(|| Err(io::ErrorKind::TimedOut.into()));
        let mut state = self.state.lock();
        for key in &doomed {
            match removed.is_ok() {
                true => state.unremoved.remove(key),
                false => state.unremoved.insert(*key),
            };
            if let Some(count) = state.removing.get_mut(key) {
                *count -= 1;
                if *count == 0 {
                    state.removing.remove(key);
                }
            }
        }
        drop(state);
        if let Err(error) = &removed {
            self.failed(&format!("a removal failed: {error}"));
        }
        removed
    }
}
