//! Reading one file straight into the reader's slot; what is damaged is set aside.
//!
//! Units: bytes, milliseconds. Errors: reasons; a file that fails to be read counts against the device.

use std::{
    fs::File,
    io,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::Duration,
};

use kvgpu::SlotMut;
use kvproto::Reason;

use super::{
    Shared, TURN_BYTES,
    files::{path_of, set_aside},
};
use crate::tier::{
    Read, Resident,
    gate::within,
    land::{Landed, land},
};

impl Shared {
    pub(super) async fn read(self: &Arc<Self>, resident: Resident, into: SlotMut) -> Read {
        if self.closed.load(Relaxed) {
            return Read::Gone(Reason::TierDown);
        }
        if !self.holds(&resident) {
            return Read::Gone(Reason::Evicted);
        }
        let deadline = Duration::from_millis(self.config.read_deadline_ms);
        let landed = within(&*self.clock, deadline, async {
            let turn = self.turns.enter(TURN_BYTES).await?;
            let shared = Arc::clone(self);
            let task = self.threads.blocking(move || {
                let _turn = turn;
                shared.read_file(&resident, into)
            });
            task.await.ok()
        });
        match landed.await.flatten() {
            Some(Landed::Block(block)) if self.holds(&resident) => Read::Hit(block),
            Some(Landed::Block(_)) => Read::Gone(Reason::Invalidated),
            Some(Landed::Corrupt) => Read::Gone(self.lose(&resident)),
            Some(Landed::Other) => Read::Gone(Reason::Evicted),
            Some(Landed::Failed(error)) => {
                self.count(Reason::Device);
                self.failed(&format!("a read failed: {error}"));
                Read::Gone(Reason::Device)
            }
            None => {
                self.count(Reason::Device);
                self.failed("reads take longer than their deadline");
                Read::Gone(Reason::Device)
            }
        }
    }

    fn holds(&self, resident: &Resident) -> bool {
        let state = self.state.lock();
        state
            .residents
            .get(&resident.key)
            .is_some_and(|held| held.seal == resident.seal)
    }

    fn read_file(&self, resident: &Resident, slot: SlotMut) -> Landed {
        match File::open(path_of(&self.config.dir, &resident.key)) {
            Ok(mut file) => land(&mut file, resident, slot),
            // Removed between the look and the open, or by hand.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Landed::Other,
            Err(error) => Landed::Failed(error),
        }
    }

    /// Sets a damaged block aside; answers what to call it.
    fn lose(&self, resident: &Resident) -> Reason {
        let mut state = self.state.lock();
        if state
            .residents
            .get(&resident.key)
            .is_none_or(|held| held.seal != resident.seal)
        {
            return Reason::Evicted;
        }
        state.residents.remove(&resident.key);
        state.corrupt_files += 1;
        let path = path_of(&self.config.dir, &resident.key);
        if let Err(error) = set_aside(&path) {
            tracing::warn!(file = %path.display(), %error, "a damaged block cannot be set aside");
        }
        drop(state);
        self.count(Reason::Corrupt);
        Reason::Corrupt
    }
}
