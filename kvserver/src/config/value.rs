//! Kinds of settings: how each is written, read and bounded.

use std::{
    fmt::{self, Debug},
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use super::{ConfigError, GIB, KIB, MIB};

/// A kind of value with one text form for file, environment and flag.
pub trait Setting: Sized {
    /// Reads the text form.
    ///
    /// # Errors
    /// What would have been right.
    fn parse(text: &str) -> Result<Self, String>;

    /// The text form; `parse` reads it back unchanged.
    fn show(&self) -> String;
}

/// A size that is given, or chosen from the machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Capacity {
    /// Chosen from the machine at start.
    #[default]
    Auto,
    /// So many bytes.
    Bytes(u64),
}

impl From<u64> for Capacity {
    fn from(bytes: u64) -> Self {
        Self::Bytes(bytes)
    }
}

/// What is written to NVMe without having been asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NvmeAdmission {
    /// Blocks that were used again after they were stored.
    #[default]
    Reuse,
    /// Every block.
    Open,
}

/// Form of the log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    /// Text for people.
    #[default]
    Human,
    /// One JSON object per line.
    Json,
    /// None.
    Off,
}

/// Where the Unix socket goes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum UnixSocket {
    /// `terrace.sock` in the data folder.
    #[default]
    Auto,
    /// No Unix socket.
    Off,
    /// Here.
    Path(PathBuf),
}

impl UnixSocket {
    /// Where it is, with its automatic name in `data_dir`.
    pub(super) fn path(&self, data_dir: &Path, name: &str) -> Option<PathBuf> {
        match self {
            Self::Auto => Some(data_dir.join(name)),
            Self::Off => None,
            Self::Path(path) => Some(path.clone()),
        }
    }
}

/// Who may connect to a socket, as the file system says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketMode(pub u32);

impl SocketMode {
    /// Whether somebody else than the file's user and root may connect.
    #[must_use]
    pub fn opens_to_others(self) -> bool {
        self.0 & 0o022 != 0
    }
}

/// Where something listens: an address or a DNS name, and a port.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HostPort {
    /// A DNS name, or an address; IPv6 without brackets.
    pub host: String,
    /// Never 0.
    pub port: u16,
}

impl From<SocketAddr> for HostPort {
    fn from(address: SocketAddr) -> Self {
        Self {
            host: address.ip().to_string(),
            port: address.port(),
        }
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

impl Setting for HostPort {
    fn parse(text: &str) -> Result<Self, String> {
        let wrong =
            || "expected HOST:PORT such as \"10.0.0.7:7070\" or \"node-0.terrace:7070\"".to_owned();
        let (host, port) = text.trim().rsplit_once(':').ok_or_else(wrong)?;
        let port = port
            .parse()
            .ok()
            .filter(|port| *port != 0)
            .ok_or_else(wrong)?;
        let host = match host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'))
        {
            Some(inner) => inner
                .parse::<std::net::Ipv6Addr>()
                .map_err(|_| wrong())?
                .to_string(),
            None => host.to_owned(),
        };
        let is_name = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
        let is_v6 = host.parse::<std::net::Ipv6Addr>().is_ok();
        if host.is_empty() || host.len() > 253 || !(is_v6 || host.chars().all(is_name)) {
            return Err(wrong());
        }
        Ok(Self { host, port })
    }
    fn show(&self) -> String {
        self.to_string()
    }
}

impl Setting for Option<HostPort> {
    fn parse(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(None),
            text => HostPort::parse(text)
                .map(Some)
                .map_err(|expected| format!("{expected}, or \"auto\"")),
        }
    }
    fn show(&self) -> String {
        self.as_ref()
            .map_or_else(|| "auto".to_owned(), Setting::show)
    }
}

impl Setting for Vec<HostPort> {
    fn parse(text: &str) -> Result<Self, String> {
        match text.trim() {
            "" => Ok(Vec::new()),
            text => text
                .split(',')
                .map(HostPort::parse)
                .collect::<Result<_, _>>()
                .map_err(|expected| format!("{expected}, several with commas")),
        }
    }
    fn show(&self) -> String {
        let shown: Vec<String> = self.iter().map(Setting::show).collect();
        shown.join(",")
    }
}

macro_rules! count {
    ($($kind:ty),+) => { $(
        impl Setting for $kind {
            fn parse(text: &str) -> Result<Self, String> {
                text.trim().parse().map_err(|_| "expected a whole number".to_owned())
            }
            fn show(&self) -> String {
                self.to_string()
            }
        }
    )+ };
}
count!(u32, usize);

/// Sizes are `u64`, counts are not: that is how `4MiB` is right for the one and wrong for the other.
impl Setting for u64 {
    fn parse(text: &str) -> Result<Self, String> {
        size(text).ok_or_else(|| "expected a size such as \"4MiB\"".to_owned())
    }
    fn show(&self) -> String {
        show_size(*self)
    }
}

impl Setting for bool {
    fn parse(text: &str) -> Result<Self, String> {
        text.parse()
            .map_err(|_| "expected \"true\" or \"false\"".to_owned())
    }
    fn show(&self) -> String {
        self.to_string()
    }
}

impl Setting for String {
    fn parse(text: &str) -> Result<Self, String> {
        Ok(text.to_owned())
    }
    fn show(&self) -> String {
        self.clone()
    }
}

impl Setting for PathBuf {
    fn parse(text: &str) -> Result<Self, String> {
        Ok(Self::from(text))
    }
    fn show(&self) -> String {
        self.display().to_string()
    }
}

impl Setting for Duration {
    fn parse(text: &str) -> Result<Self, String> {
        humantime::parse_duration(text)
            .map_err(|_| "expected a duration such as \"500ms\", \"10s\" or \"5min\"".to_owned())
    }
    fn show(&self) -> String {
        humantime::format_duration(*self).to_string()
    }
}

impl Setting for SocketAddr {
    fn parse(text: &str) -> Result<Self, String> {
        text.parse().map_err(|_| {
            "expected an address and port such as \"127.0.0.1:7070\" or \"[::1]:7070\"".to_owned()
        })
    }
    fn show(&self) -> String {
        self.to_string()
    }
}

impl Setting for Option<SocketAddr> {
    fn parse(text: &str) -> Result<Self, String> {
        if text == "off" {
            return Ok(None);
        }
        SocketAddr::parse(text)
            .map(Some)
            .map_err(|expected| format!("{expected}, or \"off\""))
    }
    fn show(&self) -> String {
        self.map_or_else(|| "off".to_owned(), |address| address.to_string())
    }
}

impl Setting for Capacity {
    fn parse(text: &str) -> Result<Self, String> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        size(text)
            .map(Self::Bytes)
            .ok_or_else(|| "expected a size such as \"4GiB\", or \"auto\"".to_owned())
    }
    fn show(&self) -> String {
        match self {
            Self::Auto => "auto".to_owned(),
            Self::Bytes(bytes) => show_size(*bytes),
        }
    }
}

impl Setting for NvmeAdmission {
    fn parse(text: &str) -> Result<Self, String> {
        match text {
            "reuse" => Ok(Self::Reuse),
            "open" => Ok(Self::Open),
            _ => Err("expected \"reuse\" or \"open\"".to_owned()),
        }
    }
    fn show(&self) -> String {
        match self {
            Self::Reuse => "reuse",
            Self::Open => "open",
        }
        .to_owned()
    }
}

impl Setting for LogFormat {
    fn parse(text: &str) -> Result<Self, String> {
        match text {
            "human" => Ok(Self::Human),
            "json" => Ok(Self::Json),
            "off" => Ok(Self::Off),
            _ => Err("expected \"human\", \"json\" or \"off\"".to_owned()),
        }
    }
    fn show(&self) -> String {
        match self {
            Self::Human => "human",
            Self::Json => "json",
            Self::Off => "off",
        }
        .to_owned()
    }
}

impl Setting for UnixSocket {
    fn parse(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "off" => Ok(Self::Off),
            "" => Err("expected \"auto\", \"off\" or a path".to_owned()),
            path => Ok(Self::Path(PathBuf::from(path))),
        }
    }
    fn show(&self) -> String {
        match self {
            Self::Auto => "auto".to_owned(),
            Self::Off => "off".to_owned(),
            Self::Path(path) => path.display().to_string(),
        }
    }
}

impl Setting for SocketMode {
    fn parse(text: &str) -> Result<Self, String> {
        let digits = text.strip_prefix("0o").unwrap_or(text);
        match u32::from_str_radix(digits, 8) {
            Ok(mode) if mode <= 0o777 && mode & 0o600 == 0o600 => Ok(Self(mode)),
            _ => Err("expected an octal file mode such as \"0600\" or \"0660\"".to_owned()),
        }
    }
    fn show(&self) -> String {
        format!("{:04o}", self.0)
    }
}

fn size(text: &str) -> Option<u64> {
    let text = text.trim();
    text.parse::<u64>().ok().or_else(|| {
        text.parse::<bytesize::ByteSize>()
            .ok()
            .map(|size| size.as_u64())
    })
}

/// Exact: the largest unit that divides the size.
pub(super) fn show_size(bytes: u64) -> String {
    match bytes {
        0 => "0".to_owned(),
        n if n.is_multiple_of(GIB) => format!("{}GiB", n / GIB),
        n if n.is_multiple_of(MIB) => format!("{}MiB", n / MIB),
        n if n.is_multiple_of(KIB) => format!("{}KiB", n / KIB),
        n => n.to_string(),
    }
}

/// No bounds beyond the kind's own.
pub(super) fn any<T>() -> impl Fn(&T) -> Result<(), String> {
    |_| Ok(())
}

/// From `least` to `most`, both included.
pub(super) fn within<T: Setting + PartialOrd>(
    least: T,
    most: T,
) -> impl Fn(&T) -> Result<(), String> {
    move |value| {
        if *value >= least && *value <= most {
            return Ok(());
        }
        Err(format!("expected {} to {}", least.show(), most.show()))
    }
}

/// "auto", or from `least` to `most` bytes.
pub(super) fn capacity(least: u64, most: u64) -> impl Fn(&Capacity) -> Result<(), String> {
    move |value| match value {
        Capacity::Auto => Ok(()),
        Capacity::Bytes(bytes) if (least..=most).contains(bytes) => Ok(()),
        Capacity::Bytes(_) => Err(format!(
            "expected {} to {}, or \"auto\"",
            show_size(least),
            show_size(most)
        )),
    }
}

/// Not empty.
pub(super) fn non_empty<T: Setting>() -> impl Fn(&T) -> Result<(), String> {
    |value| {
        if value.show().is_empty() {
            Err("must not be empty".to_owned())
        } else {
            Ok(())
        }
    }
}

/// From `least` to `most` bytes of text without control characters.
pub(super) fn text(least: usize, most: usize) -> impl Fn(&String) -> Result<(), String> {
    move |value| match (least..=most).contains(&value.len()) && !value.chars().any(char::is_control)
    {
        true => Ok(()),
        false => Err(format!(
            "expected {least} to {most} bytes of text, without control characters"
        )),
    }
}

/// Field `field` must not be below field `other`.
pub(super) fn at_least<T: Setting + PartialOrd + Debug>(
    field: &'static str,
    value: &T,
    other: &'static str,
    floor: &T,
) -> Result<(), ConfigError> {
    if value >= floor {
        return Ok(());
    }
    Err(ConfigError::Value {
        field,
        value: value.show(),
        source_name: "agreement of fields".to_owned(),
        expected: format!("expected at least {other} ({})", floor.show()),
    })
}
