//! Terrace's own: `kvproto::placement`, as nodes and clients call it.

use kvproto::RunHash;
use kvproto::placement::Placement;

use super::{Members, Owners};

/// A prepared placement. Its members are in the order of their ids, which is that of their numbers.
#[derive(Clone)]
pub struct Rendezvous {
    /// What is asked.
    pub placement: Placement,
    members: usize,
}

impl Rendezvous {
    /// Prepares the view of these members.
    pub fn new(members: &Members) -> Self {
        Self {
            placement: Placement::new(&members.view()),
            members: members.0.len(),
        }
    }
}

impl Owners for Rendezvous {
    fn owner(&self, run: &RunHash) -> u32 {
        // The answer is an id; its digits are the number.
        let id = self.placement.first(run).map_or("", |id| &id.0);
        id.bytes()
            .filter(u8::is_ascii_digit)
            .fold(0, |number, digit| number * 10 + u32::from(digit - b'0'))
    }

    fn bytes(&self) -> usize {
        // A seed, a weight and a zone each, and a seed and a number once more by weight.
        self.members * 36
    }
}
