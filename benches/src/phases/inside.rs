//! inside

use super::{Found, Options};
use anyhow::Result;
/// run
pub fn run(_options: &Options) -> Result<Found> {
    Ok(Found::default())
}
