//! A walk over the fields of a message, up to `data`, without decoding them.

use super::{DATA_FIELD, FrameError, FrameLimits};

/// How far a walk over the bytes at hand came.
pub(super) enum Walk {
    /// At least so many bytes from the message's start are needed to go on.
    Needs(usize),
    /// Fields end at `head_len`, then `data_len` bytes from `data_at` on end the message.
    Found {
        head_len: usize,
        data_at: usize,
        data_len: u64,
    },
}

/// Goes from field to field over `bytes`, the start of a message of `message_len`.
pub(super) fn walk(
    bytes: &[u8],
    message_len: usize,
    field_at: &mut usize,
    limits: &FrameLimits,
) -> Result<Walk, FrameError> {
    loop {
        let start = *field_at;
        if start > limits.max_head_bytes {
            return Err(FrameError::HeadTooLong {
                limit_bytes: limits.max_head_bytes as u64,
            });
        }
        if start > bytes.len() {
            return Ok(Walk::Needs(start));
        }
        if start == message_len {
            return Ok(Walk::Found {
                head_len: start,
                data_at: start,
                data_len: 0,
            });
        }
        let mut at = start;
        let Some(tag) = varint(bytes, message_len, &mut at)? else {
            return Ok(Walk::Needs(bytes.len() + 1));
        };
        let (number, wire_type) = (tag >> 3, (tag & 7) as u8);
        if number == 0 || number > (1 << 29) - 1 {
            return Err(FrameError::BadTag { tag });
        }
        if number == u64::from(DATA_FIELD) {
            if wire_type != 2 {
                return Err(FrameError::DataType { wire_type });
            }
            let Some(data_len) = varint(bytes, message_len, &mut at)? else {
                return Ok(Walk::Needs(bytes.len() + 1));
            };
            check_data(data_len, (message_len - at) as u64, limits)?;
            return Ok(Walk::Found {
                head_len: start,
                data_at: at,
                data_len,
            });
        }
        let len = match wire_type {
            0 => varint(bytes, message_len, &mut at)?.map(|_| 0),
            1 => Some(8),
            2 => varint(bytes, message_len, &mut at)?,
            5 => Some(4),
            _ => return Err(FrameError::BadTag { tag }),
        };
        let Some(len) = len else {
            return Ok(Walk::Needs(bytes.len() + 1));
        };
        let over_bytes = len.saturating_sub((message_len - at) as u64);
        if over_bytes > 0 {
            return Err(FrameError::Overrun { over_bytes });
        }
        *field_at = at + len as usize;
    }
}

/// `data` must fit its limit and end exactly where its message ends.
fn check_data(data_len: u64, left: u64, limits: &FrameLimits) -> Result<(), FrameError> {
    if data_len > left {
        return Err(FrameError::Overrun {
            over_bytes: data_len - left,
        });
    }
    if data_len < left {
        return Err(FrameError::DataNotLast {
            trailing_bytes: left - data_len,
        });
    }
    if data_len > limits.max_data_bytes {
        return Err(FrameError::DataTooLong {
            length_bytes: data_len,
            limit_bytes: limits.max_data_bytes,
        });
    }
    Ok(())
}

/// Reads a varint at `at` and moves `at` behind it; `None` when `bytes` end before it does.
fn varint(bytes: &[u8], message_len: usize, at: &mut usize) -> Result<Option<u64>, FrameError> {
    let mut value = 0;
    for (i, &byte) in bytes[*at..].iter().take(10).enumerate() {
        value |= u64::from(byte & 0x7f) << (7 * i);
        if byte < 0x80 {
            // The tenth byte holds the last of 64 bits.
            if i == 9 && byte > 1 {
                return Err(FrameError::BadVarint);
            }
            *at += i + 1;
            return Ok(Some(value));
        }
    }
    if bytes.len() - *at >= 10 {
        return Err(FrameError::BadVarint);
    }
    if bytes.len() == message_len {
        return Err(FrameError::Overrun { over_bytes: 1 });
    }
    Ok(None)
}
