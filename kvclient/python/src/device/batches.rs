//! Many batches one after the other, on the calling thread: what a measurement or a check asks for.

use std::collections::VecDeque;

use kvgpu::Moving;

use super::{Gathering, OnDevice, Use};

impl OnDevice {
    /// Saves one batch after the other, with as many on their way as there are slots, and shows each; blocks the thread.
    ///
    /// # Errors
    /// The first that failed.
    pub fn save_each(
        &self,
        batches: &[Vec<u32>],
        mut each: impl FnMut(&[u8]),
    ) -> Result<(), String> {
        let turn = self.turn().map_err(|error| error.to_string())?;
        let mut moving: VecDeque<Gathering> = VecDeque::new();
        for batch in batches {
            let slot = loop {
                match self.try_slot(Use::Save, batch.len()) {
                    Some(slot) => break slot,
                    None => each(moving.pop_front().ok_or(NO_SLOT)?.wait()?.bytes()),
                }
            };
            moving.push_back(self.gather(slot, batch, &turn, ())?);
        }
        for gathering in moving {
            each(gathering.wait()?.bytes());
        }
        Ok(())
    }

    /// Loads one batch after the other in the same way, each filled first; blocks the thread until all are written.
    ///
    /// # Errors
    /// The first that failed.
    pub fn load_each(
        &self,
        batches: &[Vec<u32>],
        mut fill: impl FnMut(usize, &mut [u8]),
    ) -> Result<(), String> {
        let turn = self.turn().map_err(|error| error.to_string())?;
        let mut moving: VecDeque<Moving<()>> = VecDeque::new();
        let wait = |moving: Moving<()>| moving.wait().map_err(|error| error.to_string());
        for (number, batch) in batches.iter().enumerate() {
            let mut slot = loop {
                match self.try_slot(Use::Load, batch.len()) {
                    Some(slot) => break slot,
                    None => wait(moving.pop_front().ok_or(NO_SLOT)?)?,
                }
            };
            fill(number, slot.bytes_mut());
            moving.push_back(self.scatter(slot, batch, &turn, ())?);
        }
        moving.into_iter().try_for_each(wait)
    }
}

const NO_SLOT: &str = "a batch is longer than a slot, or all slots are in other hands";
