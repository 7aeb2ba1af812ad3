//! facts

use super::{Found, Options};
/// run
pub async fn run(_options: &Options) -> Found {
    Found::default()
}
