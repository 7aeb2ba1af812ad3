//! The three sources of settings, lowest first: file, environment, flag.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

use clap::{Arg, ArgAction, Command, parser::ValueSource};

use super::{Config, ConfigError, SETTINGS};

/// What the command line asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Run the node.
    Run,
    /// Print all settings as a configuration file and stop.
    PrintConfig,
    /// Try everything that a start needs and stop.
    Check,
}

/// Settings from all sources.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The settings, valid.
    pub config: Config,
    /// What to do with them.
    pub action: Action,
    /// The file that was read, if one was.
    pub file: Option<PathBuf>,
    /// Variables of the environment that look like a setting and are none.
    pub misspelt: Vec<String>,
}

/// Why loading stopped.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The command line itself, or `--help` and `--version`.
    #[error(transparent)]
    Usage(#[from] clap::Error),
    /// A setting.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// Reads flags from `args` (the first is the program's name), the environment and the file that
/// `--config` or `TERRACE_CONFIG` names (else `terrace.toml` in the data folder, if it is there).
///
/// # Errors
/// The first value that is wrong, with its field and what would be right.
pub fn load(args: impl IntoIterator<Item = OsString>) -> Result<Loaded, LoadError> {
    let matches = command().try_get_matches_from(args.into_iter().map(dashed))?;
    let given = |name: &str| matches.get_one::<String>(name).map(String::as_str);

    let mut config = Config::default();
    let named = given("config").map(PathBuf::from);
    let file = named.clone().or_else(|| {
        let dir = given("data_dir").map_or_else(|| config.data_dir.clone(), PathBuf::from);
        Some(dir.join("terrace.toml")).filter(|path| path.is_file())
    });
    if let Some(file) = &file {
        apply_file(&mut config, file)?;
    }
    for (name, _) in SETTINGS {
        if let Some(text) = given(name) {
            let source = match matches.value_source(name) {
                Some(ValueSource::EnvVariable) => format!("environment, {}", variable(name)),
                _ => format!("flag --{}", name.replace('_', "-")),
            };
            config.set(name, text, &source)?;
        }
    }
    config.validate()?;
    let action = if matches.get_flag("print-config") {
        Action::PrintConfig
    } else if matches.get_flag("check") {
        Action::Check
    } else {
        Action::Run
    };
    let variables = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
    Ok(Loaded {
        config,
        action,
        file,
        misspelt: variables.filter_map(|name| misspelt(&name)).collect(),
    })
}

/// What is to be said of a variable that is one or two letters from a setting's. Others with our prefix are a client's.
fn misspelt(variable: &str) -> Option<String> {
    const MOST_EDITS: usize = 2;
    let name = variable.strip_prefix("TERRACE_")?.to_lowercase();
    let (nearest, edits) = nearest(&name);
    let is_meant = (1..=MOST_EDITS).contains(&edits) && edits * 2 < name.len();
    is_meant.then(|| {
        format!(
            "{variable} is no setting; did you mean {}?",
            self::variable(nearest)
        )
    })
}

fn apply_file(config: &mut Config, file: &Path) -> Result<(), ConfigError> {
    let text = fs::read_to_string(file).map_err(|source| ConfigError::Unreadable {
        file: file.to_owned(),
        source,
    })?;
    let table: toml::Table = text
        .parse()
        .map_err(|e: toml::de::Error| ConfigError::NotToml {
            file: file.to_owned(),
            problem: e.to_string(),
        })?;
    let source = file.display().to_string();
    for (name, value) in &table {
        let text = match value {
            toml::Value::String(text) => text.clone(),
            toml::Value::Integer(number) => number.to_string(),
            toml::Value::Boolean(yes) => yes.to_string(),
            // No setting is of another kind; its own parser says what it wants instead.
            other => format!("a {}", other.type_str()),
        };
        config.set(name, &text, &source)?;
    }
    Ok(())
}

/// One flag per setting, made from the table; values stay text, so that every source fails alike.
fn command() -> Command {
    let defaults = Config::default().entries();
    let settings = SETTINGS
        .iter()
        .zip(defaults)
        .map(|(&(name, description), (_, default))| {
            Arg::new(name)
                // clap keeps names for the life of the program, and a program loads once.
                .long(&*name.replace('_', "-").leak())
                .env(&*variable(name).leak())
                .help(format!("{} [default: {default}]", description.trim()))
                .value_name("VALUE")
                .hide_env_values(true)
                .action(ArgAction::Set)
        });
    Command::new("kvserver")
        // Of a flag given twice the last counts, so that a script can be overruled.
        .args_override_self(true)
        .version(env!("CARGO_PKG_VERSION"))
        .about("One Terrace node. Without arguments it works: sizes come from the machine.")
        .arg(Arg::new("config").long("config").env("TERRACE_CONFIG").value_name("FILE").help(
            "Settings as TOML; every flag below is a key of it, with underscores. Else terrace.toml in data_dir, if there",
        ))
        .arg(Arg::new("print-config").long("print-config").action(ArgAction::SetTrue).help("Print all settings as a file and stop"))
        .arg(Arg::new("check").long("check").action(ArgAction::SetTrue).help("Try what a start needs and stop: sizes, files, ports, small tiers; nothing is left behind and nobody is joined"))
        .args(settings)
}

fn variable(name: &str) -> String {
    format!("TERRACE_{}", name.to_uppercase())
}

/// `--ram_bytes=1` means `--ram-bytes=1`: the file's spelling is right everywhere.
fn dashed(arg: OsString) -> OsString {
    let Some(text) = arg.to_str().filter(|text| text.starts_with("--")) else {
        return arg;
    };
    match text.split_once('=') {
        Some((name, value)) => format!("{}={value}", name.replace('_', "-")).into(),
        None => text.replace('_', "-").into(),
    }
}

/// The setting whose name differs least from `name`, if by less than half of it.
pub(super) fn nearest_name(name: &str) -> Option<&'static str> {
    let (candidate, distance) = nearest(name);
    (distance * 2 < name.len().max(2)).then_some(candidate)
}

/// The setting whose name differs least from `name`, and by how many edits.
fn nearest(name: &str) -> (&'static str, usize) {
    let settings = SETTINGS.iter();
    let distances = settings.map(|(known, _)| (*known, edits(name, known)));
    let nearest = distances.min_by_key(|(_, distance)| *distance);
    nearest.expect("there are settings")
}

/// Levenshtein distance, one row at a time.
fn edits(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, &y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::{Capacity, GIB, MIB};

    fn from(args: &[&str]) -> Result<Config, String> {
        let args = std::iter::once("kvserver")
            .chain(args.iter().copied())
            .map(OsString::from);
        load(args)
            .map(|loaded| loaded.config)
            .map_err(|e| e.to_string())
    }

    fn file(text: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), text).unwrap();
        file
    }

    #[test]
    fn a_flag_wins_over_the_file() {
        let file = file("ram_bytes = \"1GiB\"\nshards = 8\nlease_ttl = \"3s\"\n");
        let config = from(&[
            "--config",
            file.path().to_str().unwrap(),
            "--ram-bytes",
            "2GiB",
        ])
        .unwrap();
        assert_eq!(config.ram_bytes, Capacity::Bytes(2 * GIB));
        assert_eq!(config.shards, 8);
        assert_eq!(config.lease_ttl, Duration::from_secs(3));
    }

    #[test]
    fn the_spelling_of_the_file_is_right_as_a_flag() {
        assert_eq!(
            from(&["--ram_bytes=64MiB"]).unwrap().ram_bytes,
            Capacity::Bytes(64 * MIB)
        );
    }

    #[test]
    fn a_wrong_value_is_refused_with_field_value_and_what_would_be_right() {
        let message = from(&["--ram-bytes", "lots"]).unwrap_err();
        assert_eq!(
            message,
            "ram_bytes = \"lots\" (from flag --ram-bytes): expected a size such as \"4GiB\", or \"auto\""
        );
        let message = from(&["--shards", "0"]).unwrap_err();
        assert_eq!(
            message,
            "shards = \"0\" (from flag --shards): expected 1 to 1024"
        );
    }

    #[test]
    fn fields_must_agree() {
        let message = from(&["--lease-ttl", "10s", "--lease-max-ttl", "1s"]).unwrap_err();
        assert!(message.starts_with("lease_max_ttl = \"1s\""), "{message}");
        assert!(message.contains("at least lease_ttl (10s)"), "{message}");
    }

    #[test]
    fn an_unknown_key_names_the_nearest_one() {
        let file = file("ram_byte = \"1GiB\"\n");
        let message = from(&["--config", file.path().to_str().unwrap()]).unwrap_err();
        assert!(
            message.contains("unknown key \"ram_byte\"")
                && message.contains("did you mean \"ram_bytes\"?"),
            "{message}"
        );
    }

    #[test]
    fn a_variable_that_is_nearly_a_setting_is_told_of() {
        let told = misspelt("TERRACE_RAM_BYTE").unwrap();
        assert!(told.contains("TERRACE_RAM_BYTES?"), "{told}");
        let others = [
            "TERRACE_RAM_BYTES",
            "TERRACE_TOKEN",
            "TERRACE_ENDPOINT",
            "TERRACE_CONFIG",
            "TERRACE_",
            "RAM_BYTE",
        ];
        for other in others {
            assert_eq!(misspelt(other), None, "{other}");
        }
    }

    #[test]
    fn what_is_printed_is_read_back_unchanged() {
        let config = Config {
            shards: 3,
            ram_bytes: Capacity::Bytes(77 * MIB),
            http_listen: None,
            ..Config::default()
        };
        let file = file(&config.to_string());
        assert_eq!(
            from(&["--config", file.path().to_str().unwrap()]).unwrap(),
            config
        );
    }

    #[test]
    fn the_default_is_valid() {
        Config::default().validate().unwrap();
    }
}
