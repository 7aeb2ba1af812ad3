//! Memory, copies, and what orders them.

use bytes::Bytes;

use super::{Bench, Outcome};
use crate::device::DeviceError;

pub(super) fn names_itself(bench: &Bench) -> Outcome {
    let info = bench.device.info();
    ensure!(!info.name.is_empty(), "no name");
    ensure!(info.total_bytes > 0, "no memory");
    ensure!(
        bench.device.free_bytes()? <= info.total_bytes,
        "more free than there is"
    );
    Ok(())
}

pub(super) fn memory_is_zero_and_counted(bench: &Bench) -> Outcome {
    let length = 8 << 20;
    for _ in 0..2 {
        let memory = bench.device.alloc(length)?;
        ensure!(memory.len_bytes() == length, "{} bytes", memory.len_bytes());
        ensure!(
            bench.read(&memory.whole())?.iter().all(|byte| *byte == 0),
            "not zero"
        );
        bench.write(&memory.whole(), bench.filled(length, 1))?;
    }
    Ok(())
}

pub(super) fn too_much_is_refused(bench: &Bench) -> Outcome {
    let asked = usize::try_from(bench.device.info().total_bytes)?.saturating_mul(2);
    match bench.device.alloc(asked) {
        Err(DeviceError::OutOfMemory { asked_bytes, .. }) => {
            ensure!(
                asked_bytes == asked as u64,
                "{asked_bytes} reported, {asked} asked for"
            );
        }
        other => return Err(format!("{other:?}").into()),
    }
    let memory = bench.device.alloc(4096)?;
    bench.write(&memory.whole(), bench.filled(4096, 2))
}

pub(super) fn bytes_come_back(bench: &Bench) -> Outcome {
    for length in [1, 3, 4095, 4096, 65_537, (1 << 20) + 7, 8 << 20] {
        let memory = bench.device.alloc(length + 64)?;
        for offset in [0, 1, 48] {
            let (span, bytes) = (
                memory.span(offset, length)?,
                bench.filled(length, length as u64),
            );
            bench.write(&span, bytes.clone())?;
            ensure!(
                bench.read(&span)? == bytes,
                "{length} bytes at {offset} changed on the way"
            );
        }
    }
    let heap = Bytes::from(vec![7; 10_000]);
    let memory = bench.device.alloc(10_000)?;
    bench.write(&memory.whole(), heap.clone())?;
    ensure!(
        bench.read(&memory.whole())? == heap,
        "bytes of ordinary memory changed"
    );
    Ok(())
}

pub(super) fn ranges_are_checked(bench: &Bench) -> Outcome {
    let memory = bench.device.alloc(100)?;
    for (offset, length) in [(0, 101), (101, 0), (50, 51), (usize::MAX, 2)] {
        let refused = memory.span(offset, length);
        ensure!(
            matches!(refused, Err(DeviceError::Bounds { field: "span", .. })),
            "{offset}+{length}: {refused:?}"
        );
    }
    let stream = bench.device.stream()?;
    let overlap = stream.copy(&memory.span(0, 60)?, &memory.span(40, 60)?);
    ensure!(
        matches!(overlap, Err(DeviceError::Bounds { .. })),
        "overlap: {overlap:?}"
    );
    Ok(())
}

pub(super) fn lengths_are_checked(bench: &Bench) -> Outcome {
    let memory = bench.device.alloc(100)?;
    let stream = bench.device.stream()?;
    let upload = stream.upload(Bytes::from(vec![0; 99]), &memory.whole());
    ensure!(
        matches!(
            upload,
            Err(DeviceError::Length {
                field: "target",
                ..
            })
        ),
        "upload: {upload:?}"
    );
    match stream.download(&memory.whole(), bench.slot(101)) {
        Err(refused) => {
            ensure!(refused.value.len() == 101, "another slot came back");
            ensure!(
                matches!(refused.error, DeviceError::Length { .. }),
                "{:?}",
                refused.error
            );
        }
        Ok(_) => return Err("a longer slot was accepted".into()),
    }
    Ok(())
}

pub(super) fn one_stream_is_ordered(bench: &Bench) -> Outcome {
    let length = 1 << 20;
    let memory = bench.device.alloc(length)?;
    let stream = bench.device.stream()?;
    let mut downloads = Vec::new();
    for seed in 0..8 {
        stream.upload(bench.filled(length, seed), &memory.whole())?;
        downloads.push(
            stream
                .download(&memory.whole(), bench.slot(length))
                .map_err(|r| r.error)?,
        );
    }
    for (seed, pending) in downloads.into_iter().enumerate() {
        let slot = pending.wait().map_err(|refused| refused.error)?;
        ensure!(
            slot[..] == bench.filled(length, seed as u64)[..],
            "step {seed} saw another's bytes"
        );
    }
    Ok(stream.synchronize()?)
}

pub(super) fn streams_are_ordered_by_events(bench: &Bench) -> Outcome {
    let length = 4 << 20;
    let (first, second) = (bench.device.stream()?, bench.device.stream()?);
    let (from, to) = (bench.device.alloc(length)?, bench.device.alloc(length)?);
    for seed in 10..14 {
        let written = first.upload(bench.filled(length, seed), &from.whole())?;
        second.wait_for(&written)?;
        let copied = second.copy(&from.whole(), &to.whole())?;
        // The next round must not overwrite what this one still reads.
        first.wait_for(&copied)?;
        let pending = second
            .download(&to.whole(), bench.slot(length))
            .map_err(|r| r.error)?;
        let slot = pending.wait().map_err(|refused| refused.error)?;
        ensure!(
            slot[..] == bench.filled(length, seed)[..],
            "round {seed} came out of order"
        );
        ensure!(
            written.is_done()? && copied.is_done()?,
            "what came before is not done"
        );
    }
    Ok(())
}

pub(super) fn copies_within(bench: &Bench) -> Outcome {
    let memory = bench.device.alloc(10_000)?;
    let bytes = bench.filled(10_000, 3);
    bench.write(&memory.whole(), bytes.clone())?;
    let stream = bench.device.stream()?;
    stream
        .copy(&memory.span(100, 3_000)?, &memory.span(5_001, 3_000)?)?
        .wait()?;
    let mut expected = bytes.to_vec();
    expected.copy_within(100..3_100, 5_001);
    ensure!(
        bench.read(&memory.whole())? == expected,
        "other bytes than those named"
    );
    Ok(())
}
