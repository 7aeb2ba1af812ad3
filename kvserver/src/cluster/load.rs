//! What a member has to do, as it tells the others: for whoever may choose between two of them.
//!
//! Tiny, and never a list of blocks: it travels with the gossip, and is as old as that.

/// What a member has to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Calls it serves now.
    pub calls: u32,
    /// How full its RAM tier is, in thousandths.
    pub full: u32,
}

impl Load {
    pub(super) fn to_text(self) -> String {
        format!("{} {}", self.calls, self.full)
    }

    pub(super) fn from_text(text: &str) -> Option<Self> {
        let (calls, full) = text.split_once(' ')?;
        Some(Self {
            calls: calls.parse().ok()?,
            full: full.parse().ok()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::Load;

    #[test]
    fn a_load_is_read_as_it_was_written_and_nonsense_is_none() {
        let load = Load {
            calls: 17,
            full: 999,
        };
        assert_eq!(Load::from_text(&load.to_text()), Some(load));
        assert!(
            ["", "1", "1 x", "-1 2"]
                .iter()
                .all(|text| Load::from_text(text).is_none())
        );
    }
}
