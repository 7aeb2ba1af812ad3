//! What the kernel says about processes: CPU time, memory, and what everybody else is doing.
//!
//! CPU time is the scheduler's own nanosecond account of every thread (`/proc/PID/task/*/schedstat`). A thread that ended
//! during a cell takes its account with it; then, and where the kernel keeps no such account, the clock-tick figures of
//! `/proc/PID/stat` are used, which are good to 10 ms.

use std::collections::BTreeMap;
use std::fs;

use rustix::param::clock_ticks_per_second;

/// CPU time of some processes at one moment.
#[derive(Clone, Debug, Default)]
pub struct Cpu {
    threads: BTreeMap<(u32, u32), u64>,
    ticks: u64,
}

impl Cpu {
    /// Reads the account of all `pids`; one that is gone counts nothing.
    pub fn of(pids: &[u32]) -> Self {
        let mut cpu = Self::default();
        for &pid in pids {
            cpu.ticks += ticks(pid).unwrap_or(0);
            let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else {
                continue;
            };
            for task in tasks.flatten() {
                let Some(tid) = task.file_name().to_str().and_then(|t| t.parse().ok()) else {
                    continue;
                };
                let nanos = fs::read_to_string(task.path().join("schedstat")).ok();
                if let Some(nanos) = nanos.and_then(|s| s.split(' ').next()?.parse().ok()) {
                    cpu.threads.insert((pid, tid), nanos);
                }
            }
        }
        cpu
    }

    /// Of this process.
    pub fn own() -> Self {
        Self::of(&[std::process::id()])
    }

    /// Seconds used since `earlier`.
    pub fn seconds_since(&self, earlier: &Self) -> f64 {
        let by_tick =
            self.ticks.saturating_sub(earlier.ticks) as f64 / clock_ticks_per_second() as f64;
        if self.threads.is_empty()
            || earlier
                .threads
                .keys()
                .any(|t| !self.threads.contains_key(t))
        {
            return by_tick;
        }
        let nanos: u64 = self
            .threads
            .iter()
            .map(|(t, now)| now.saturating_sub(earlier.threads.get(t).copied().unwrap_or(0)))
            .sum();
        nanos as f64 / 1e9
    }
}

/// User and system clock ticks of a process.
fn ticks(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command name may hold spaces and parentheses; fields count from behind the last one. 14 and 15 are the times.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
}

/// Busy time of the whole machine, seconds over all cores, stolen time included. `None` where /proc is absent.
pub fn machine_busy() -> Option<f64> {
    busy_ticks(&fs::read_to_string("/proc/stat").ok()?)
        .map(|t| t as f64 / clock_ticks_per_second() as f64)
}

/// user nice system idle iowait irq softirq steal, guest times are inside user: everything but idle and iowait.
fn busy_ticks(stat: &str) -> Option<u64> {
    let fields: Vec<u64> = stat
        .lines()
        .next()?
        .strip_prefix("cpu ")?
        .split_whitespace()
        .filter_map(|f| f.parse().ok())
        .collect();
    let total: u64 = fields.iter().take(8).sum();
    Some(total - fields.get(3)? - fields.get(4)?)
}

/// Resident memory of a process, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Private pages: heap, stacks, tables.
    pub anonymous_bytes: u64,
    /// Shared memory, which is where an arena's memfd segments count.
    pub shared_bytes: u64,
    /// Huge pages from the reserved pool, which the two above do not see.
    pub huge_bytes: u64,
}

impl Memory {
    /// Reads it; `None` when the process is gone.
    pub fn of(pid: u32) -> Option<Self> {
        Some(Self::parse(
            &fs::read_to_string(format!("/proc/{pid}/status")).ok()?,
        ))
    }

    fn parse(status: &str) -> Self {
        let field = |name: &str| {
            let line = status
                .lines()
                .find_map(|l| l.strip_prefix(name)?.strip_prefix(':'));
            line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok())
                .unwrap_or(0)
                * 1024
        };
        Self {
            anonymous_bytes: field("RssAnon"),
            shared_bytes: field("RssShmem"),
            huge_bytes: field("HugetlbPages"),
        }
    }

    /// All of it.
    pub fn total_bytes(&self) -> u64 {
        self.anonymous_bytes + self.shared_bytes + self.huge_bytes
    }
}

/// One line about the machine: processor, cores, memory, kernel.
pub fn machine() -> String {
    let field = |path: &str, name: &str| {
        let text = fs::read_to_string(path).unwrap_or_default();
        let line = text
            .lines()
            .find(|l| l.starts_with(name))
            .and_then(|l| l.split_once(':'));
        line.map_or_else(|| "unknown".into(), |(_, v)| v.trim().to_owned())
    };
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let memory_kib: u64 = field("/proc/meminfo", "MemTotal")
        .split(' ')
        .next()
        .and_then(|m| m.parse().ok())
        .unwrap_or(0);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    format!(
        "{}, {cores} cores, {} GiB memory, kernel {}",
        field("/proc/cpuinfo", "model name"),
        memory_kib >> 20,
        kernel.trim()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busy_is_everything_but_idle_and_iowait() {
        assert_eq!(
            busy_ticks("cpu  10 1 5 1000 50 2 3 4 9 0\ncpu0 1 1 1 1"),
            Some(10 + 1 + 5 + 2 + 3 + 4)
        );
        assert_eq!(busy_ticks("intr 5"), None);
    }

    #[test]
    fn memory_is_read_in_bytes() {
        let memory = Memory::parse(
            "Name:\tx\nRssAnon:\t    112 kB\nRssFile:\t 9 kB\nRssShmem:\t  4 kB\nHugetlbPages:\t 2048 kB\n",
        );
        assert_eq!(
            memory,
            Memory {
                anonymous_bytes: 112 << 10,
                shared_bytes: 4 << 10,
                huge_bytes: 2 << 20
            }
        );
        assert_eq!(memory.total_bytes(), 2164 << 10);
    }

    #[test]
    fn work_shows_in_our_own_account() {
        let before = Cpu::own();
        let mut x = 1u64;
        for i in 0..20_000_000u64 {
            x = std::hint::black_box(x.wrapping_mul(31).wrapping_add(i));
        }
        // The ticks alone may still say nothing; the scheduler's account never does.
        assert!(Cpu::own().seconds_since(&before) > 0.0 || x == 0);
    }

    #[test]
    fn a_vanished_thread_falls_back_to_ticks() {
        let earlier = Cpu {
            threads: [((1, 1), 5), ((1, 2), 7)].into(),
            ticks: 10,
        };
        let later = Cpu {
            threads: [((1, 1), 9)].into(),
            ticks: 10 + clock_ticks_per_second(),
        };
        assert_eq!(later.seconds_since(&earlier), 1.0);
        let both = Cpu {
            threads: [((1, 1), 2_000_000_005), ((1, 2), 7), ((1, 3), 500_000_000)].into(),
            ticks: 10,
        };
        assert_eq!(both.seconds_since(&earlier), 2.5);
    }
}
