//! Map: descriptors of segments, for readers of their trust domain.

use std::{collections::HashSet, os::fd::OwnedFd};

use kvgpu::DomainId;
use kvproto::{FieldError, local::MAX_SEGMENTS_PER_MAP, v1};

use super::{Refused, Shared};

/// The segments asked for that are this domain's, and two descriptors each: bytes, generations. Others are left out:
/// whether they exist is nobody's business.
pub(super) fn map(
    shared: &Shared,
    domain: DomainId,
    asked: &v1::LocalMap,
) -> Result<(v1::LocalMapped, Vec<OwnedFd>), Refused> {
    if asked.segments.len() > MAX_SEGMENTS_PER_MAP {
        let count = asked.segments.len();
        let problem = format!("are {count}; at most {MAX_SEGMENTS_PER_MAP} are allowed");
        return Err(FieldError::new("map.segments", problem).into());
    }
    let wanted: HashSet<u32> = asked.segments.iter().copied().collect();
    let (mut segments, mut fds) = (Vec::new(), Vec::new());
    for info in shared.blocks.arena().segments() {
        if info.domain != Some(domain) || !wanted.contains(&info.segment) {
            continue;
        }
        match info.read_only_fds() {
            Ok(pair) => {
                fds.extend([pair.data, pair.generations]);
                segments.push(v1::LocalSegment {
                    segment: info.segment,
                    length_bytes: info.length_bytes,
                });
            }
            Err(error) => {
                tracing::warn!(segment = info.segment, %error, "a segment cannot be shared");
            }
        }
    }
    Ok((v1::LocalMapped { segments }, fds))
}
