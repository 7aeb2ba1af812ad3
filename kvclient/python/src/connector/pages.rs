//! SGLang's pages: their names, and where a host pool keeps their pieces.
//!
//! ```text
//! page p of a pool = its pieces, piece i at  address_i + p * stride_i
//!
//! page_first     K of all layers │ V of all layers                   2 pieces
//! layer_first    K of layer 0 │ V of layer 0 │ K of layer 1 …        2 pieces per layer
//! state pools    temporal │ convolution 0 │ …                        1 piece each
//! ```
//!
//! Units: bytes, pages.
//! Errors: [`FieldError`] for a pool whose pages do not lie at even distances.
//! Why a pool is asked instead of its tensors read: its layouts are SGLang's affair and change; what it says of three pages shows
//! whether all lie evenly.

use kvproto::FieldError;

use crate::layout::Layer;

/// Bytes of a page's name: SGLang's SHA-256.
pub const WIDTH: usize = 32;

/// What keys are hashed with that are no SHA-256 of SGLang's.
const OTHER_KEYS: &str = "terrace 2026-11 names of keys that are not SGLang's own";

/// A page's name: SGLang's own keys are SHA-256 in hexadecimal, others are hashed.
#[must_use]
pub fn name(key: &str) -> [u8; WIDTH] {
    let key = key.as_bytes();
    let digit = |byte: u8| (byte as char).to_digit(16);
    let mut name = [0; WIDTH];
    let hex = key.len() == 2 * WIDTH
        && key.chunks_exact(2).zip(&mut name).all(|(pair, byte)| {
            let value = digit(pair[0])
                .zip(digit(pair[1]))
                .map(|(high, low)| 16 * high + low);
            *byte = value.unwrap_or(0) as u8;
            value.is_some()
        });
    if hex {
        name
    } else {
        blake3::derive_key(OTHER_KEYS, key)
    }
}

/// Where a pool says that the pieces of one page are.
pub type Addresses = Vec<usize>;

/// Where the pieces of all `pages` lie, by those of the first, the middle (`pages / 2`) and the last; pieces that touch become one.
///
/// # Errors
/// When the pages do not lie at even distances.
pub fn layers(
    first: &Addresses,
    middle: &Addresses,
    last: &Addresses,
    sizes: &[usize],
    pages: usize,
) -> Result<Vec<Layer>, FieldError> {
    let uneven = || FieldError::new("pool", "pages do not lie at even distances");
    let pieces = first.len();
    if pages == 0 || [middle.len(), last.len(), sizes.len()] != [pieces; 3] {
        return Err(uneven());
    }
    let mut found: Vec<Layer> = Vec::new();
    for piece in 0..pieces {
        let (address, bytes) = (first[piece], sizes[piece]);
        let reach = last[piece].checked_sub(address).ok_or_else(uneven)?;
        let stride = reach.checked_div(pages - 1).unwrap_or(bytes);
        let at = |page: usize| {
            stride
                .checked_mul(page)
                .and_then(|far| address.checked_add(far))
        };
        if at(pages - 1) != Some(last[piece])
            || at(pages / 2) != Some(middle[piece])
            || stride < bytes
        {
            return Err(uneven());
        }
        match found.last_mut() {
            Some(before)
                if before.address + before.block_bytes == address
                    && before.stride_bytes == stride =>
            {
                before.block_bytes += bytes;
            }
            _ => found.push(Layer {
                address,
                blocks: pages,
                stride_bytes: stride,
                block_bytes: bytes,
            }),
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sglangs_keys_are_names_and_others_are_hashed() {
        let key = "00FF".repeat(16);
        assert_eq!(name(&key)[..3], [0, 255, 0]);
        assert_eq!(name(&key), name(&key.to_lowercase()));
        let odd = [&key[1..], &format!("{}g", &key[1..]), "", "a name"];
        let mut names: Vec<_> = odd.iter().map(|key| name(key)).collect();
        names.push(name(&key));
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), 5);
    }

    /// (address, stride, bytes) of each.
    fn told(layers: &[Layer]) -> Vec<(usize, usize, usize)> {
        layers
            .iter()
            .map(|layer| (layer.address, layer.stride_bytes, layer.block_bytes))
            .collect()
    }

    #[test]
    fn pieces_that_touch_are_one() {
        let at = |page: usize| vec![1000 + page * 30, 1010 + page * 30, 1025 + page * 30];
        let found = layers(&at(0), &at(2), &at(4), &[10, 10, 5], 5).unwrap();
        assert_eq!(told(&found), [(1000, 30, 20), (1025, 30, 5)]);
    }

    #[test]
    fn one_page_is_even() {
        let found = layers(&vec![64], &vec![64], &vec![64], &[10], 1).unwrap();
        assert_eq!(told(&found), [(64, 10, 10)]);
    }

    #[test]
    fn pages_at_uneven_distances_are_refused() {
        let at = |page: usize| vec![1000 + page * 10];
        let found = |middle: usize, last: usize, bytes: usize| {
            layers(&at(0), &vec![middle], &vec![last], &[bytes], 5)
        };
        assert!(found(1020, 1040, 10).is_ok());
        assert!(found(1021, 1040, 10).is_err(), "the middle is elsewhere");
        assert!(found(1020, 1041, 10).is_err(), "no whole stride");
        assert!(found(1020, 1040, 11).is_err(), "pages overlap");
        assert!(found(1020, 900, 10).is_err(), "backwards");
        assert!(
            layers(&at(0), &at(2), &at(4), &[], 5).is_err(),
            "a piece without a size"
        );
        assert!(
            layers(&at(0), &at(0), &at(0), &[10], 0).is_err(),
            "no pages"
        );
    }
}
