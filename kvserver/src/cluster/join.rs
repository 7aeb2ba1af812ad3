//! Joining: how a node finds the cluster it was told to be of, before it serves anybody.
//!
//! ```text
//! every address of `join` ─► Join ─► secret, members            nobody answers:
//!      (DNS names: all theirs)          │                          was a member before   start from the kept view
//!                                       ▼                          lists only itself     begin a cluster
//!                          data_dir/secret, if it is new           is the smallest of    begin one after join_wait / 3
//!                                                                    those listed
//!                                                                  else                  try until join_wait, then fail
//! ```
//!
//! The same list can so be given to all nodes of a cluster that does not exist yet: the smallest address begins, the
//! others wait for it.
//!
//! Errors: [`JoinError`], each with what to do next.

use std::{
    collections::BTreeSet,
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use futures_util::{StreamExt, stream::FuturesUnordered};
use kvproto::{Member, MemberId, v1};
use tonic::{Code, Status};

use super::call::Caller;
use crate::{clock::Clock, config::HostPort, data_dir::write_whole};

/// Addresses asked at once, and at most, in one round.
const MOST_ASKED: usize = 16;

/// Between two rounds.
const PAUSE: Duration = Duration::from_millis(250);

/// Why a node could not join.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// Nobody answered.
    #[error(
        "join: nobody answered within {waited:?}: {tried}; is a node running there? `join` names its gRPC address"
    )]
    Unreachable {
        /// How long it was tried (join_wait).
        waited: Duration,
        /// Whom, and what came of it last.
        tried: String,
    },
    /// Somebody answered, and said no.
    #[error("join: {address} refused: {problem}")]
    Refused {
        /// Who.
        address: String,
        /// Why.
        problem: String,
    },
    /// This node's blocks are under another secret.
    #[error("secret_file: {} is not the secret of the cluster at {address}, and blocks were stored under it; start with an empty --data-dir, or give all nodes one --secret-file", path.display())]
    OtherSecret {
        /// Whose it is not.
        address: String,
        /// This node's.
        path: PathBuf,
    },
    /// The secret cannot be kept.
    #[error("cannot write {}: {source}", path.display())]
    Secret {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// What joining needs.
pub struct Joining<'a> {
    /// Whom to ask.
    pub addresses: &'a [HostPort],
    /// Where this node will be reached; empty while its port is not chosen.
    pub own: &'a [SocketAddr],
    /// This node.
    pub id: &'a MemberId,
    /// Whether it was of a cluster before.
    pub was_member: bool,
    /// How long to try.
    pub wait: Duration,
    /// How nodes are called.
    pub caller: &'a Caller,
    /// Time.
    pub clock: &'a dyn Clock,
}

/// What came of it.
#[derive(Debug)]
pub enum Joined {
    /// Somebody answered.
    Member(Welcome),
    /// This node is the first.
    First,
    /// Nobody answers now; the kept view has to do until somebody does.
    Later,
}

/// What a newcomer is told.
#[derive(Clone, Debug)]
pub struct Welcome {
    /// Who told it.
    pub address: String,
    /// Of the cluster.
    pub secret: Vec<u8>,
    /// Who is here.
    pub members: Vec<Member>,
}

impl Joining<'_> {
    /// Tries until something comes of it.
    ///
    /// # Errors
    /// When nobody answers in time, or somebody says no.
    pub async fn join(&self) -> Result<Joined, JoinError> {
        let started = self.clock.now();
        loop {
            let (found, mut tried) = resolve(self.addresses).await;
            let lists_me = found.iter().any(|address| self.own.contains(address));
            let others: Vec<SocketAddr> = found
                .iter()
                .copied()
                .filter(|address| !self.own.contains(address))
                .collect();
            if lists_me && others.is_empty() && tried.is_empty() {
                return Ok(Joined::First);
            }
            match self.ask(&others, &mut tried).await? {
                Some(welcome) => return Ok(Joined::Member(welcome)),
                None if self.was_member => return Ok(Joined::Later),
                None => {}
            }
            let waited = self.clock.now().since(started);
            let is_smallest = found.first().is_some_and(|first| self.own.contains(first));
            if is_smallest && waited >= self.wait / 3 {
                return Ok(Joined::First);
            }
            if waited >= self.wait {
                return Err(JoinError::Unreachable {
                    waited: self.wait,
                    tried: tried.join(", "),
                });
            }
            self.clock.sleep(PAUSE).await;
        }
    }

    /// The first welcome of all that are asked at once.
    async fn ask(
        &self,
        others: &[SocketAddr],
        tried: &mut Vec<String>,
    ) -> Result<Option<Welcome>, JoinError> {
        let address = self.own.first().map(|own| format!("http://{own}"));
        let mut asking: FuturesUnordered<_> = others
            .iter()
            .take(MOST_ASKED)
            .map(|other| {
                let asked = v1::JoinRequest {
                    node_id: self.id.0.clone(),
                    address: address.clone().unwrap_or_default(),
                    ..v1::JoinRequest::default()
                };
                async move {
                    let url = format!("http://{other}");
                    let answer = self.caller.join(&url, asked).await;
                    (url, answer)
                }
            })
            .collect();
        while let Some((address, answer)) = asking.next().await {
            match answer.and_then(|answer| welcome(&address, answer)) {
                Ok(welcome) => return Ok(Some(welcome)),
                Err(status) if is_final(&status) => {
                    return Err(JoinError::Refused {
                        address,
                        problem: status.message().to_owned(),
                    });
                }
                Err(status) => tried.push(format!("{address}: {}", status.message())),
            }
        }
        Ok(None)
    }
}

/// Whether asking again could not help.
fn is_final(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::Unauthenticated | Code::PermissionDenied | Code::Unimplemented
    )
}

fn welcome(address: &str, answer: v1::JoinResponse) -> Result<Welcome, Status> {
    let members = answer.members.into_iter().map(Member::try_from);
    Ok(Welcome {
        address: address.to_owned(),
        secret: answer.secret.to_vec(),
        members: members
            .collect::<Result<_, _>>()
            .map_err(|e| Status::internal(e.to_string()))?,
    })
}

/// All addresses behind these names, in their order, and the names behind which there are none.
pub(crate) async fn resolve(names: &[HostPort]) -> (BTreeSet<SocketAddr>, Vec<String>) {
    let (mut found, mut unknown) = (BTreeSet::new(), Vec::new());
    for name in names {
        match tokio::net::lookup_host((name.host.as_str(), name.port)).await {
            Ok(addresses) => found.extend(addresses),
            Err(error) => unknown.push(format!("{name}: {error}")),
        }
    }
    (found, unknown)
}

/// Makes the cluster's secret this node's. True when it was another before, or none.
///
/// # Errors
/// When blocks were stored under another one, or it cannot be written.
pub fn adopt(data_dir: &Path, secret_file: &Path, welcome: &Welcome) -> Result<bool, JoinError> {
    let is_given = !secret_file.as_os_str().is_empty();
    let path = match is_given {
        true => secret_file.to_owned(),
        false => data_dir.join("secret"),
    };
    let refuse = |source| JoinError::Secret {
        path: path.clone(),
        source,
    };
    let own = match fs::read(&path) {
        Ok(own) => Some(own),
        Err(error) if error.kind() == io::ErrorKind::NotFound && !is_given => None,
        Err(error) => return Err(refuse(error)),
    };
    match own {
        Some(own) if own == welcome.secret => Ok(false),
        Some(_) if is_given || was_used(data_dir) => Err(JoinError::OtherSecret {
            address: welcome.address.clone(),
            path,
        }),
        _ => {
            write_whole(&path, &welcome.secret, 0o600).map_err(refuse)?;
            Ok(true)
        }
    }
}

/// Whether a namespace was ever opened in this folder; what cannot be read may have been.
fn was_used(data_dir: &Path) -> bool {
    match fs::read(data_dir.join("namespaces.json")) {
        Ok(text) => !matches!(
            serde_json::from_slice::<Vec<serde_json::Value>>(&text).as_deref(),
            Ok([])
        ),
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;
    use crate::clock::{ManualClock, SystemClock};

    fn told(secret: &[u8]) -> Welcome {
        Welcome {
            address: "http://10.0.0.1:7070".to_owned(),
            secret: secret.to_vec(),
            members: Vec::new(),
        }
    }

    #[test]
    fn a_secret_is_adopted_while_nothing_is_stored_under_another() {
        let dir = TempDir::new().unwrap();
        let adopt = |secret: &[u8]| adopt(dir.path(), Path::new(""), &told(secret));
        assert!(adopt(&[1; 32]).unwrap() && !adopt(&[1; 32]).unwrap());
        assert!(
            adopt(&[2; 32]).unwrap(),
            "nothing was opened under the first"
        );
        fs::write(dir.path().join("namespaces.json"), "[]").unwrap();
        assert!(adopt(&[3; 32]).unwrap());
        fs::write(dir.path().join("namespaces.json"), "[{\"label\": 1}]").unwrap();
        assert!(!adopt(&[3; 32]).unwrap(), "its own");
        let error = adopt(&[4; 32]).unwrap_err().to_string();
        assert!(
            error.starts_with("secret_file:") && error.contains("empty --data-dir"),
            "{error}"
        );
        assert_eq!(fs::read(dir.path().join("secret")).unwrap(), [3; 32]);
    }

    #[test]
    fn a_secret_that_was_given_is_never_replaced() {
        let dir = TempDir::new().unwrap();
        let file = dir.path().join("given");
        fs::write(&file, [1; 32]).unwrap();
        assert!(!adopt(dir.path(), &file, &told(&[1; 32])).unwrap());
        assert!(adopt(dir.path(), &file, &told(&[2; 32])).is_err());
        assert_eq!(fs::read(&file).unwrap(), [1; 32]);
    }

    /// Ports on which nobody listens.
    fn deserted(count: usize) -> Vec<SocketAddr> {
        let sockets: Vec<std::net::TcpListener> = (0..count)
            .map(|_| std::net::TcpListener::bind("127.0.0.1:0").unwrap())
            .collect();
        let mut found: Vec<_> = sockets.iter().map(|s| s.local_addr().unwrap()).collect();
        found.sort_unstable();
        found
    }

    async fn outcome(
        listed: &[SocketAddr],
        own: &[SocketAddr],
        was_member: bool,
        wait: Duration,
    ) -> Result<Joined, JoinError> {
        let addresses: Vec<HostPort> = listed.iter().map(|one| (*one).into()).collect();
        let joining = Joining {
            addresses: &addresses,
            own,
            id: &MemberId::from("new"),
            was_member,
            wait,
            caller: &Caller::new(None),
            clock: &SystemClock::new(),
        };
        joining.join().await
    }

    #[tokio::test]
    async fn who_lists_only_itself_is_the_first_and_who_was_a_member_does_not_wait() {
        let own = deserted(1);
        let only = outcome(&own, &own, false, Duration::from_secs(60)).await;
        assert!(matches!(only, Ok(Joined::First)));
        let others = deserted(2);
        let again = outcome(&others, &[], true, Duration::from_secs(60)).await;
        assert!(matches!(again, Ok(Joined::Later)));
    }

    #[tokio::test]
    async fn of_those_listed_the_smallest_begins_and_the_others_wait_for_it() {
        let listed = deserted(3);
        let wait = Duration::from_millis(900);
        let smallest = outcome(&listed, &listed[..1], false, wait).await;
        assert!(matches!(smallest, Ok(Joined::First)), "{smallest:?}");
        let other = outcome(&listed, &listed[1..2], false, wait).await;
        let error = other.unwrap_err().to_string();
        assert!(
            error.starts_with("join: nobody answered") && error.contains(&listed[0].to_string()),
            "{error}"
        );
        assert!(
            !error.contains(&listed[1].to_string()),
            "it does not ask itself: {error}"
        );
    }

    #[tokio::test]
    async fn a_name_that_nobody_knows_is_named() {
        let clock = ManualClock::new(1);
        let addresses = ["no-such-host.invalid:7070".parse_setting()];
        let joining = Joining {
            addresses: &addresses,
            own: &[],
            id: &MemberId::from("new"),
            was_member: false,
            wait: Duration::ZERO,
            caller: &Caller::new(None),
            clock: &clock,
        };
        let error = joining.join().await.unwrap_err().to_string();
        assert!(error.contains("no-such-host.invalid"), "{error}");
    }

    trait ParseSetting {
        fn parse_setting(&self) -> HostPort;
    }

    impl ParseSetting for str {
        fn parse_setting(&self) -> HostPort {
            crate::config::Setting::parse(self).unwrap()
        }
    }
}
