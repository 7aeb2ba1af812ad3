//! Sizes chosen from the machine, with the reason for each.

use std::{
    fs,
    path::{Path, PathBuf},
};

use super::{Capacity, Config, GIB, MIB, value::show_size};

const RAM_MOST: u64 = 64 * GIB;
const RAM_LEAST: u64 = 64 * MIB;
const NVME_MOST: u64 = 64 * GIB;
/// Below this an NVMe tier is all overhead.
const NVME_LEAST: u64 = 256 * MIB;
const DURABLE_MOST: u64 = 16 * GIB;

/// The sizes a node runs with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// Bytes of RAM for blocks.
    pub ram_bytes: u64,
    /// Bytes on NVMe; 0: no NVMe tier.
    pub nvme_bytes: u64,
    /// Bytes of the durable store; 0: none.
    pub durable_bytes: u64,
    /// Bytes that may be written to NVMe in a day; 0: no limit.
    pub nvme_wear_bytes_per_day: u64,
    /// One line per size: what and why.
    pub reasons: Vec<String>,
}

/// Turns every "auto" into bytes.
///
/// An NVMe size that was chosen before is kept (`sizes` in the data folder): the blocks already
/// there take up the free space that it was chosen from, so that choosing again would shrink the
/// tier at each start.
#[must_use]
pub fn choose(config: &Config) -> Chosen {
    let mut reasons = Vec::new();
    let ram_bytes = match config.ram_bytes {
        Capacity::Bytes(bytes) => given(&mut reasons, "ram", bytes),
        Capacity::Auto => {
            let available = available_memory();
            let bytes = round(available / 4).clamp(RAM_LEAST, RAM_MOST);
            reasons.push(format!(
                "ram {}: a quarter of {} available",
                show_size(bytes),
                about(available)
            ));
            bytes
        }
    };
    let free = free_space(&config.data_dir);
    let kept = kept_sizes(&config.data_dir);
    let mut disk =
        |name: &str, setting: Capacity, share: u64, most: u64, before: Option<u64>| match (
            setting, before,
        ) {
            (Capacity::Bytes(bytes), _) => given(&mut reasons, name, bytes),
            (Capacity::Auto, Some(bytes)) => {
                reasons.push(format!(
                    "{name} {}: as chosen at the first start",
                    show_size(bytes)
                ));
                bytes
            }
            (Capacity::Auto, None) => {
                let bytes = round(free / share).min(most);
                if bytes < NVME_LEAST {
                    reasons.push(format!(
                        "{name} off: only {} free in {}",
                        about(free),
                        config.data_dir.display()
                    ));
                    return 0;
                }
                reasons.push(format!(
                    "{name} {}: 1/{share} of {} free, at most {}",
                    show_size(bytes),
                    about(free),
                    show_size(most)
                ));
                bytes
            }
        };
    let nvme_bytes = disk("nvme", config.nvme_bytes, 2, NVME_MOST, kept[0]);
    let durable_bytes = disk("durable", config.durable_bytes, 10, DURABLE_MOST, kept[1]);
    let nvme_wear_bytes_per_day = match config.nvme_wear_bytes_per_day {
        Capacity::Bytes(bytes) => bytes,
        Capacity::Auto => nvme_bytes.saturating_mul(3),
    };
    if nvme_bytes > 0 {
        reasons.push(match nvme_wear_bytes_per_day {
            0 => "nvme wear: no limit".to_owned(),
            n => format!("nvme wear: at most {} written per day", show_size(n)),
        });
    }
    Chosen {
        ram_bytes,
        nvme_bytes,
        durable_bytes,
        nvme_wear_bytes_per_day,
        reasons,
    }
}

impl Chosen {
    /// Remembers the sizes that were chosen, and not those that were set, for the next start.
    ///
    /// # Errors
    /// When the data folder cannot be written.
    pub fn keep(&self, config: &Config) -> std::io::Result<()> {
        let sizes = [
            ("nvme_bytes", config.nvme_bytes, self.nvme_bytes),
            ("durable_bytes", config.durable_bytes, self.durable_bytes),
        ];
        let chosen = sizes
            .iter()
            .filter(|(_, set, bytes)| *set == Capacity::Auto && *bytes > 0);
        let text: String = chosen
            .map(|(name, _, bytes)| format!("{name} = {bytes}\n"))
            .collect();
        fs::write(config.data_dir.join("sizes"), text)
    }
}

/// The NVMe and durable sizes that an earlier start chose.
fn kept_sizes(data_dir: &Path) -> [Option<u64>; 2] {
    let read = || {
        fs::read_to_string(data_dir.join("sizes"))
            .ok()?
            .parse::<toml::Table>()
            .ok()
    };
    let table = read().unwrap_or_default();
    ["nvme_bytes", "durable_bytes"].map(|name| {
        table
            .get(name)?
            .as_integer()
            .and_then(|n| u64::try_from(n).ok())
    })
}

fn given(reasons: &mut Vec<String>, name: &str, bytes: u64) -> u64 {
    reasons.push(match bytes {
        0 => format!("{name} off: as set"),
        n => format!("{name} {}: as set", show_size(n)),
    });
    bytes
}

/// Down to whole 64 MiB, so that the printed size is readable.
fn round(bytes: u64) -> u64 {
    bytes / (64 * MIB) * (64 * MIB)
}

fn about(bytes: u64) -> String {
    bytesize::ByteSize(bytes).display().iec().to_string()
}

/// `$XDG_DATA_HOME/terrace`, else `~/.local/share/terrace`, else `./terrace-data`.
pub(super) fn default_data_dir() -> PathBuf {
    let home = |name: &str| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    home("XDG_DATA_HOME")
        .or_else(|| home("HOME").map(|home| home.join(".local/share")))
        .map_or_else(
            || PathBuf::from("terrace-data"),
            |base| base.join("terrace"),
        )
}

/// What the kernel says can be had without swapping, within the control group's limit.
fn available_memory() -> u64 {
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text
            .lines()
            .find(|line| line.starts_with("MemAvailable:"))?;
        line.split_whitespace()
            .nth(1)?
            .parse::<u64>()
            .ok()
            .map(|kib| kib * 1024)
    });
    let read = |name: &str| {
        fs::read_to_string(format!("/sys/fs/cgroup/{name}"))
            .ok()?
            .trim()
            .parse::<u64>()
            .ok()
    };
    let group =
        read("memory.max").map(|most| most.saturating_sub(read("memory.current").unwrap_or(0)));
    match (machine, group) {
        (Some(a), Some(b)) => a.min(b),
        (Some(a), None) | (None, Some(a)) => a,
        (None, None) => GIB,
    }
}

/// Free bytes of the file system that holds `path`, or will hold it.
fn free_space(path: &Path) -> u64 {
    let there = path
        .ancestors()
        .find(|p| p.exists())
        .unwrap_or(Path::new("."));
    let there = if there.as_os_str().is_empty() {
        Path::new(".")
    } else {
        there
    };
    rustix::fs::statvfs(there).map_or(0, |fs| fs.f_bavail.saturating_mul(fs.f_frsize))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn given_sizes_are_taken_as_they_are() {
        let config = Config {
            ram_bytes: Capacity::Bytes(8 * MIB),
            nvme_bytes: Capacity::Bytes(0),
            ..Config::default()
        };
        let chosen = choose(&config);
        assert_eq!((chosen.ram_bytes, chosen.nvme_bytes), (8 * MIB, 0));
    }

    #[test]
    fn a_size_chosen_once_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let config = Config {
            data_dir: dir.path().to_owned(),
            ..Config::default()
        };
        let first = Chosen {
            nvme_bytes: 777 * MIB,
            durable_bytes: 333 * MIB,
            ..choose(&config)
        };
        first.keep(&config).unwrap();
        let second = choose(&config);
        assert_eq!(
            (second.nvme_bytes, second.durable_bytes),
            (777 * MIB, 333 * MIB)
        );
    }
}
