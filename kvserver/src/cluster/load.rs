//! What a member has to do, as it tells the others: for whoever may choose between two of them.
//!
//! Tiny, and never a list of blocks: it travels with the gossip, and is as old as that.
//!
//! Units: calls, thousandths, bytes. Text: numbers in the order of the fields, spaces between; a later version may tell more.

/// What a member has to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Calls it serves now.
    pub calls: u32,
    /// How full its RAM tier is, in thousandths.
    pub full: u32,
    /// Bytes that it still has to hand over to other members.
    pub waiting_bytes: u64,
    /// Bytes that it has handed over since its start.
    pub moved_bytes: u64,
}

impl Load {
    pub(super) fn to_text(self) -> String {
        let Self {
            calls,
            full,
            waiting_bytes,
            moved_bytes,
        } = self;
        format!("{calls} {full} {waiting_bytes} {moved_bytes}")
    }

    pub(super) fn from_text(text: &str) -> Option<Self> {
        let mut numbers = text.split(' ').map(|number| number.parse::<u64>().ok());
        let mut next = || numbers.next()?;
        Some(Self {
            calls: u32::try_from(next()?).ok()?,
            full: u32::try_from(next()?).ok()?,
            waiting_bytes: next()?,
            moved_bytes: next()?,
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
            waiting_bytes: 1 << 40,
            moved_bytes: 3,
        };
        let text = load.to_text();
        assert_eq!(Load::from_text(&text), Some(load));
        assert_eq!(Load::from_text(&format!("{text} more")), Some(load));
        assert!(
            ["", "1", "1 2 3", "1 x 3 4", "-1 2 3 4"]
                .iter()
                .all(|text| Load::from_text(text).is_none())
        );
    }
}
