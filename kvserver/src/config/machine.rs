//! Sizes chosen from the machine, with the reason for each.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::{Capacity, Config, ConfigError, GIB, MIB, value::show_size};
use crate::data_dir::write_whole;

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
    pub fn keep(&self, config: &Config) -> io::Result<()> {
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
        let file = config.data_dir.join("sizes");
        match fs::read(&file) {
            Ok(kept) if kept == text.as_bytes() => Ok(()),
            _ => write_whole(&file, text.as_bytes(), 0o644),
        }
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

/// Refuses a size of RAM that the machine could never give: the kernel would only find out once it is used.
///
/// # Errors
/// `ram_bytes`, with the most there is.
pub(crate) fn fits_memory(config: &Config) -> Result<(), ConfigError> {
    let group = group_memory("memory.max");
    let most = [memory("MemTotal:"), group].into_iter().flatten().min();
    match (config.ram_bytes, most) {
        (Capacity::Bytes(bytes), Some(most)) if bytes > most => Err(refused(
            "ram_bytes",
            bytes,
            &format!("at most {}, all the memory there is", about(most)),
        )),
        _ => Ok(()),
    }
}

/// Refuses sizes on disk for which there is no room beside what the data folder holds already.
///
/// # Errors
/// The larger of `nvme_bytes` and `durable_bytes`, with the most that both may have.
pub(crate) fn fits_disk(config: &Config, chosen: &Chosen) -> Result<(), ConfigError> {
    let of_tiers = ["nvme", "durable"].map(|tier| used_space(&config.data_dir.join(tier)));
    let most = free_space(&config.data_dir).saturating_add(of_tiers.iter().sum());
    if chosen.nvme_bytes.saturating_add(chosen.durable_bytes) <= most {
        return Ok(());
    }
    let (field, bytes) = match chosen.nvme_bytes >= chosen.durable_bytes {
        true => ("nvme_bytes", chosen.nvme_bytes),
        false => ("durable_bytes", chosen.durable_bytes),
    };
    let most = about(most);
    let expected = format!(
        "nvme_bytes and durable_bytes together at most {most}, the room that {} has for them",
        config.data_dir.display()
    );
    Err(refused(field, bytes, &expected))
}

fn refused(field: &'static str, bytes: u64, expected: &str) -> ConfigError {
    ConfigError::Value {
        field,
        value: show_size(bytes),
        source_name: "agreement with the machine".to_owned(),
        expected: expected.to_owned(),
    }
}

/// What the kernel says can be had without swapping, within the control group's limit.
fn available_memory() -> u64 {
    let group = group_memory("memory.max").map(|most| {
        let used = group_memory("memory.current");
        most.saturating_sub(used.unwrap_or(0))
    });
    let both = [memory("MemAvailable:"), group].into_iter().flatten();
    both.min().unwrap_or(GIB)
}

/// Bytes of a line of the kernel's account of memory.
fn memory(line: &str) -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|found| found.starts_with(line))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}

/// Bytes of a file of the control group; a group without a limit has no number there.
fn group_memory(name: &str) -> Option<u64> {
    let text = fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok()?;
    text.trim().parse().ok()
}

/// Bytes that the files in a folder and in those below it take up on the disk.
fn used_space(folder: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    const SECTOR: u64 = 512;
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let sizes = entries.filter_map(|entry| {
        let found = entry.metadata().ok()?; // of a link itself
        Some(match found.is_dir() {
            true => used_space(&entry.path()),
            false => found.blocks() * SECTOR,
        })
    });
    sizes.sum()
}

/// Free bytes of the file system that holds `path`, or will hold it.
fn free_space(path: &Path) -> u64 {
    rustix::fs::statvfs(existing(path)).map_or(0, |fs| fs.f_bavail.saturating_mul(fs.f_frsize))
}

/// `path` if it is there, else the nearest folder above it that is.
pub(crate) fn existing(path: &Path) -> &Path {
    let there = path.ancestors().find(|p| p.exists());
    let there = there.filter(|p| !p.as_os_str().is_empty());
    there.unwrap_or(Path::new("."))
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
    fn what_the_machine_cannot_have_is_refused_with_field_and_most() {
        let dir = tempfile::tempdir().unwrap();
        let most = memory("MemTotal:").unwrap();
        let with = |ram_bytes, nvme_bytes| Config {
            ram_bytes: Capacity::Bytes(ram_bytes),
            nvme_bytes: Capacity::Bytes(nvme_bytes),
            durable_bytes: Capacity::Bytes(0),
            data_dir: dir.path().to_owned(),
            ..Config::default()
        };
        assert!(fits_memory(&with(MIB, 0)).is_ok());
        let message = fits_memory(&with(most + MIB, 0)).unwrap_err().to_string();
        assert!(
            message.starts_with("ram_bytes = ") && message.contains(&about(most)),
            "{message}"
        );

        let fits = |nvme_bytes| {
            let config = with(MIB, nvme_bytes);
            fits_disk(&config, &choose(&config))
        };
        assert!(fits(MIB).is_ok());
        let message = fits(1 << 60).unwrap_err().to_string();
        assert!(message.starts_with("nvme_bytes = "), "{message}");
    }

    #[test]
    fn room_that_a_tier_takes_already_is_its_own() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("nvme/ab")).unwrap();
        assert_eq!(used_space(&dir.path().join("nvme")), 0);
        fs::write(dir.path().join("nvme/ab/part"), vec![7; MIB as usize]).unwrap();
        assert!(used_space(&dir.path().join("nvme")) >= MIB);
        assert_eq!(used_space(&dir.path().join("none")), 0);
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
