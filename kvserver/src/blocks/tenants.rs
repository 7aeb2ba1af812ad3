//! Who is calling: bearer tokens and the tenants they stand for.
//!
//! The tenant comes from the credential, never from the caller's word. Without a token file there are
//! no credentials, and everybody is the tenant `default`.
//! File: one `tenant token` per line; `#` starts a comment; a tenant may have several tokens.
//! Nodes have a token of their own (`peer_token_file`): who shows it names the tenant it acts for, because it carries
//! every tenant's blocks.

use std::{
    collections::HashMap,
    fs, io,
    path::{Path, PathBuf},
};

use crate::engine::TenantId;

/// The tenant of a node without credentials.
pub const DEFAULT_TENANT: &str = "default";

/// Shorter tokens can be guessed.
const TOKEN_BYTES_LEAST: usize = 16;

/// Why a token file was refused.
#[derive(Debug, thiserror::Error)]
pub enum TenantsError {
    /// It cannot be read.
    #[error("{field} = {path:?}: cannot be read: {source}")]
    Unreadable {
        /// The setting that names it.
        field: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It holds something else.
    #[error("peer_token_file = {path:?}: expected one token of at least 16 characters")]
    PeerToken {
        /// The file.
        path: PathBuf,
    },
    /// A line that is not a tenant and a token.
    #[error("tokens_file = {path:?}, line {line}: {problem}")]
    Line {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What is wrong; never the token itself.
        problem: &'static str,
    },
}

fn unreadable(field: &'static str, path: &Path) -> impl FnOnce(io::Error) -> TenantsError {
    let path = path.to_owned();
    move |source| TenantsError::Unreadable {
        field,
        path,
        source,
    }
}

/// Tenants by token.
pub struct Tenants {
    names: Vec<String>,
    /// std's SipHash under a random key, so that how long a wrong token takes says nothing about a
    /// right one. `None`: no credentials are asked for.
    by_token: Option<HashMap<String, TenantId>>,
    /// What other nodes show, and this one shows them.
    peer_token: Option<String>,
}

impl Tenants {
    /// Everybody is [`DEFAULT_TENANT`].
    #[must_use]
    pub fn open() -> Self {
        Self {
            names: vec![DEFAULT_TENANT.to_owned()],
            by_token: None,
            peer_token: None,
        }
    }

    /// Reads a token file; the empty path means none.
    ///
    /// # Errors
    /// When the file cannot be read or a line is wrong.
    pub fn load(path: &Path) -> Result<Self, TenantsError> {
        if path.as_os_str().is_empty() {
            Ok(Self::open())
        } else {
            let text = fs::read_to_string(path).map_err(unreadable("tokens_file", path))?;
            Self::parse(&text, path)
        }
    }

    /// With the token of nodes; the empty path means none.
    ///
    /// # Errors
    /// When the file cannot be read, or holds no token, or one that could be guessed.
    pub fn with_peer_token(mut self, path: &Path) -> Result<Self, TenantsError> {
        if path.as_os_str().is_empty() {
            return Ok(self);
        }
        let text = fs::read_to_string(path).map_err(unreadable("peer_token_file", path))?;
        let mut words = text.split_whitespace();
        let token = match (words.next(), words.next()) {
            (Some(token), None) if token.len() >= TOKEN_BYTES_LEAST => token,
            _ => {
                let path = path.to_owned();
                return Err(TenantsError::PeerToken { path });
            }
        };
        self.peer_token = Some(token.to_owned());
        Ok(self)
    }

    /// The token of nodes.
    #[must_use]
    pub fn peer_token(&self) -> Option<&str> {
        self.peer_token.as_deref()
    }

    /// Whether the `authorization` header is that of a node. Without credentials everybody may be one.
    #[must_use]
    pub fn is_peer(&self, authorization: Option<&[u8]>) -> bool {
        match &self.peer_token {
            Some(token) => bearer(authorization).is_some_and(|shown| is_same(shown, token)),
            None => self.by_token.is_none(),
        }
    }

    /// As [`Tenants::authenticate`]; a node may name the tenant that it acts for.
    #[must_use]
    pub fn authenticate_for(
        &self,
        authorization: Option<&[u8]>,
        tenant: Option<&[u8]>,
    ) -> Option<TenantId> {
        match tenant {
            Some(tenant) if self.peer_token.is_some() && self.is_peer(authorization) => {
                self.find(std::str::from_utf8(tenant).ok()?)
            }
            _ => self.authenticate(authorization),
        }
    }

    /// `path`: where the text is from.
    fn parse(text: &str, path: &Path) -> Result<Self, TenantsError> {
        let mut names: Vec<String> = Vec::new();
        let mut by_token = HashMap::new();
        for (i, line) in text.lines().enumerate() {
            let refuse = |problem| TenantsError::Line {
                path: path.to_owned(),
                line: i + 1,
                problem,
            };
            let mut words = line.split('#').next().unwrap_or("").split_whitespace();
            let Some(tenant) = words.next() else { continue };
            let token = words
                .next()
                .ok_or_else(|| refuse("expected \"tenant token\", got one word"))?;
            if words.next().is_some() {
                return Err(refuse("expected \"tenant token\", got more words"));
            }
            if token.len() < TOKEN_BYTES_LEAST {
                return Err(refuse("a token has at least 16 characters"));
            }
            let id = names
                .iter()
                .position(|name| name == tenant)
                .unwrap_or_else(|| {
                    names.push(tenant.to_owned());
                    names.len() - 1
                });
            let id = TenantId(u32::try_from(id).map_err(|_| refuse("too many tenants"))?);
            if by_token
                .insert(token.to_owned(), id)
                .is_some_and(|other| other != id)
            {
                return Err(refuse("this token stands for another tenant already"));
            }
        }
        Ok(Self {
            names,
            by_token: Some(by_token),
            peer_token: None,
        })
    }

    /// The tenant of an `authorization` header; `None` when the credential is missing or wrong.
    #[must_use]
    pub fn authenticate(&self, authorization: Option<&[u8]>) -> Option<TenantId> {
        if self.by_token.is_none() {
            return Some(TenantId(0));
        }
        self.tenant_of(bearer(authorization)?)
    }

    /// The tenant of a bare token; `None` when it is none of them.
    #[must_use]
    pub fn tenant_of(&self, token: &str) -> Option<TenantId> {
        match &self.by_token {
            Some(by_token) => by_token.get(token).copied(),
            None => Some(TenantId(0)),
        }
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.names.len()
    }

    /// The tenant of this name.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<TenantId> {
        let at = self.names.iter().position(|known| known == name)?;
        u32::try_from(at).ok().map(TenantId)
    }

    /// The tenant's name, as it enters namespace ids and keys.
    #[must_use]
    pub fn name(&self, tenant: TenantId) -> &str {
        self.names
            .get(tenant.0 as usize)
            .map_or(DEFAULT_TENANT, String::as_str)
    }
}

/// The token of an `authorization` header.
fn bearer(authorization: Option<&[u8]>) -> Option<&str> {
    let text = std::str::from_utf8(authorization?).ok()?;
    let (scheme, token) = text.split_once(' ')?;
    scheme
        .eq_ignore_ascii_case("bearer")
        .then_some(token.trim())
}

/// Takes as long for a wrong token as for the right one of its length.
fn is_same(shown: &str, token: &str) -> bool {
    let (shown, token) = (shown.as_bytes(), token.as_bytes());
    let differing = shown.iter().zip(token).fold(0, |all, (a, b)| all | (a ^ b));
    shown.len() == token.len() && differing == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_credentials_everybody_is_the_default_tenant() {
        let tenants = Tenants::open();
        let id = tenants.authenticate(None).unwrap();
        assert_eq!(tenants.name(id), DEFAULT_TENANT);
    }

    #[test]
    fn the_tenant_comes_from_the_token() {
        let tenants = Tenants::parse(
            "# who\nred 0123456789abcdef\nblue fedcba9876543210 # second\n",
            Path::new("t"),
        )
        .unwrap();
        let id = tenants
            .authenticate(Some(b"Bearer fedcba9876543210"))
            .unwrap();
        assert_eq!(tenants.name(id), "blue");
        for wrong in [
            None,
            Some(&b"Bearer fedcba987654321"[..]),
            Some(b"fedcba9876543210"),
            Some(b"Basic fedcba9876543210"),
        ] {
            assert_eq!(tenants.authenticate(wrong), None);
        }
    }

    #[test]
    fn a_node_names_the_tenant_it_acts_for_and_nobody_else_may() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("peers");
        fs::write(&file, "nodes-among-themselves\n").unwrap();
        let tenants = Tenants::parse(
            "red 0123456789abcdef\nblue fedcba9876543210",
            Path::new("t"),
        )
        .unwrap();
        let tenants = tenants.with_peer_token(&file).unwrap();
        let node = Some(&b"Bearer nodes-among-themselves"[..]);
        let red = Some(&b"Bearer 0123456789abcdef"[..]);
        let name = |id: Option<TenantId>| id.map(|id| tenants.name(id));
        assert_eq!(
            name(tenants.authenticate_for(node, Some(b"blue"))),
            Some("blue")
        );
        assert_eq!(name(tenants.authenticate_for(node, Some(b"green"))), None);
        assert_eq!(name(tenants.authenticate_for(node, None)), None);
        assert_eq!(
            name(tenants.authenticate_for(red, Some(b"blue"))),
            Some("red")
        );
        assert!(tenants.is_peer(node) && !tenants.is_peer(red) && !tenants.is_peer(None));
        fs::write(&file, "short").unwrap();
        assert!(Tenants::open().with_peer_token(&file).is_err());
    }

    #[test]
    fn a_wrong_line_is_named_without_its_token() {
        let message = |text| {
            Tenants::parse(text, Path::new("t"))
                .err()
                .unwrap()
                .to_string()
        };
        assert_eq!(
            message("\nred"),
            "tokens_file = \"t\", line 2: expected \"tenant token\", got one word"
        );
        assert_eq!(
            message("red short"),
            "tokens_file = \"t\", line 1: a token has at least 16 characters"
        );
        let twice = "red 0123456789abcdef\nblue 0123456789abcdef";
        assert!(!message(twice).contains("0123456789abcdef"));
    }
}
