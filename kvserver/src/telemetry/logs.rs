//! Structured logs: text for people or one JSON object per line, on standard error.
//!
//! Standard output stays free for answers (`--print-config`).

use tracing_subscriber::{EnvFilter, fmt, prelude::*};

use crate::config::{Config, ConfigError, LogFormat};

/// Sends the program's log lines to standard error in the configured form. The first call wins; a
/// process that set up its own logging before keeps it.
///
/// # Errors
/// When the `log` setting is not a list of directives.
pub fn start(config: &Config) -> Result<(), ConfigError> {
    let filter = EnvFilter::try_new(&config.log).map_err(|e| ConfigError::Value {
        field: "log",
        value: config.log.clone(),
        source_name: "configuration".to_owned(),
        expected: format!(
            "expected a level or directives such as \"info,kvserver::rpc=debug\" ({e})"
        ),
    })?;
    let registry = tracing_subscriber::registry().with(filter);
    // An error here means that a subscriber is there already.
    let _ = match config.log_format {
        LogFormat::Human => {
            let ansi = std::io::IsTerminal::is_terminal(&std::io::stderr());
            registry
                .with(fmt::layer().with_writer(std::io::stderr).with_ansi(ansi))
                .try_init()
        }
        LogFormat::Json => registry
            .with(fmt::layer().json().with_writer(std::io::stderr))
            .try_init(),
        LogFormat::Off => Ok(()),
    };
    Ok(())
}
