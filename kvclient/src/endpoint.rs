//! Where a node listens: a TCP address or a Unix socket.

use std::{fmt, io, path::PathBuf, str::FromStr, time::Duration};

use rustix::net::sockopt;
use tokio::net::TcpStream;

use crate::error::Error;

/// The port a node listens on by default.
pub const DEFAULT_PORT: u16 = 7070;

/// Where a node listens.
///
/// ```
/// use kvclient::Endpoint;
/// let tcp: Endpoint = "http://127.0.0.1:7070".parse()?;
/// assert_eq!(tcp.to_string(), "127.0.0.1:7070");
/// let unix: Endpoint = "unix:/run/terrace.sock".parse()?;
/// assert_eq!(unix.to_string(), "unix:/run/terrace.sock");
/// # Ok::<(), kvclient::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// Host name or address, and port.
    Tcp {
        /// Name, IPv4 address, or IPv6 address without its brackets.
        host: String,
        /// Port.
        port: u16,
    },
    /// Path of a Unix socket.
    Unix(PathBuf),
}

/// Silence after which the kernel asks the other host's kernel whether it is still there …
const KEEPALIVE_IDLE: Duration = Duration::from_secs(10);
/// … how long it waits for each answer …
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(3);
/// … and how many may stay out: a connection to a host that is gone ends after 19 s, whoever waits on it.
const KEEPALIVE_PROBES: u32 = 3;

/// Connects; small messages leave at once, and a lost host is found out although nobody sends to it.
pub(crate) async fn connect_tcp(host: &str, port: u16) -> io::Result<TcpStream> {
    let stream = TcpStream::connect((host, port)).await?;
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(&stream, true)?;
    sockopt::set_tcp_keepidle(&stream, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(&stream, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(&stream, KEEPALIVE_PROBES)?;
    Ok(stream)
}

impl FromStr for Endpoint {
    type Err = Error;

    /// Reads `host:port`, `http://host:port`, a bare host (port 7070), `unix:/path` or `unix:///path`.
    fn from_str(text: &str) -> Result<Self, Error> {
        let refuse = |problem| Error::Endpoint {
            endpoint: text.to_owned(),
            problem,
        };
        if let Some(path) = text.strip_prefix("unix:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            return match path {
                "" => Err(refuse("the path of the socket is missing")),
                path => Ok(Self::Unix(path.into())),
            };
        }
        if text.starts_with("https:") {
            return Err(refuse("TLS is not supported yet"));
        }
        let address = text.strip_prefix("http://").unwrap_or(text);
        let address = address.strip_suffix('/').unwrap_or(address);
        let (host, port) = match address.rsplit_once(':') {
            // More than one colon and no brackets: an IPv6 address without a port.
            Some((head, _)) if head.contains(':') && !address.contains(']') => (address, None),
            Some((head, _)) if head.starts_with('[') && !head.ends_with(']') => (address, None),
            Some((host, port)) => (host, Some(port)),
            None => (address, None),
        };
        let port = match port {
            None => DEFAULT_PORT,
            Some(port) => port
                .parse()
                .map_err(|_| refuse("the port is not a number up to 65535"))?,
        };
        let host = host.trim_start_matches('[').trim_end_matches(']');
        if host.is_empty() || host.contains('/') {
            return Err(refuse("the host is missing or holds a slash"));
        }
        Ok(Self::Tcp {
            host: host.to_owned(),
            port,
        })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_names_the_same_node() {
        for text in [
            "127.0.0.1:7070",
            "http://127.0.0.1:7070",
            "http://127.0.0.1:7070/",
            "127.0.0.1",
        ] {
            let endpoint: Endpoint = text.parse().unwrap();
            assert_eq!(endpoint.to_string(), "127.0.0.1:7070", "{text}");
        }
        for text in ["[::1]:7070", "::1", "[::1]"] {
            let endpoint: Endpoint = text.parse().unwrap();
            assert_eq!(endpoint.to_string(), "[::1]:7070", "{text}");
        }
    }

    #[test]
    fn a_wrong_one_says_what_would_be_right() {
        for text in [
            "",
            ":7070",
            "host:port",
            "host:99999",
            "unix:",
            "https://host:1",
            "http://a/b:1",
        ] {
            let error = text.parse::<Endpoint>().unwrap_err();
            assert!(
                error.to_string().contains("use host:port"),
                "{text}: {error}"
            );
        }
    }
}
