//! Credentials: two tenants, and nodes that know each other by a token of their own.
//!
//! ```text
//! Keys ─ lock(config) ─► a node that lets in red, blue and other nodes, and nobody else
//! shown(message, token)      a call with a credential
//! as_node(call, tenant)      a call that says to be a node's, which acts for a tenant
//! ```

use kvproto::{Namespace, NamespaceId, NamespaceKey, v1};
use kvserver::{Node, config::Config};
use tempfile::TempDir;
use tonic::{Request, transport::Endpoint};

use crate::node::{BLOCK_TOKENS, RUN_BLOCKS, Stock};

/// Of the tenant `red`.
pub const RED: &str = "red-0123456789abcdef";
/// Of the tenant `blue`.
pub const BLUE: &str = "blue-0123456789abcdef";
/// By which nodes know each other.
pub const NODES: &str = "the-token-of-our-nodes";

/// The files in which the tokens are.
pub struct Keys(TempDir);

impl Keys {
    /// Files with all three.
    ///
    /// # Panics
    /// When they cannot be written.
    #[must_use]
    pub fn cut() -> Self {
        let dir = TempDir::new().expect("a temporary folder");
        let tenants = format!("red {RED}\nblue {BLUE}\n");
        std::fs::write(dir.path().join("tenants"), tenants).expect("a file");
        std::fs::write(dir.path().join("nodes"), NODES).expect("a file");
        Self(dir)
    }

    /// A node with these settings asks for them.
    pub fn lock(&self, config: &mut Config) {
        config.tokens_file = self.0.path().join("tenants");
        config.peer_token_file = self.0.path().join("nodes");
    }
}

/// A call with this credential.
///
/// # Panics
/// When the token is no word.
#[must_use]
pub fn shown<T>(message: T, token: Option<&str>) -> Request<T> {
    let mut call = Request::new(message);
    if let Some(token) = token {
        let value = format!("Bearer {token}").parse().expect("a word");
        call.metadata_mut().insert("authorization", value);
    }
    call
}

/// A call that says to be a node's, which acts for this tenant.
///
/// # Panics
/// When the tenant's name is no word.
#[must_use]
pub fn as_node<T>(mut call: Request<T>, tenant: &str) -> Request<T> {
    let headers = call.metadata_mut();
    headers.insert("terrace-peer", "other".parse().expect("a word"));
    headers.insert("terrace-tenant", tenant.parse().expect("a word"));
    call
}

/// The opening of the tests' namespace.
#[must_use]
pub fn opening() -> v1::OpenNamespaceRequest {
    v1::OpenNamespaceRequest {
        spec: Some((&Namespace::opaque("test", BLOCK_TOKENS, RUN_BLOCKS)).into()),
        ..v1::OpenNamespaceRequest::default()
    }
}

/// A tenant's own namespace; the client in it shows no credential by itself.
///
/// # Panics
/// When the node does not answer.
pub async fn open(node: &Node, token: &str) -> Stock {
    let endpoint = Endpoint::from_shared(node.endpoint()).expect("an endpoint");
    let channel = endpoint.connect().await.expect("it listens");
    let mut client = v1::blocks_client::BlocksClient::new(channel);
    let opened = client.open_namespace(shown(opening(), Some(token))).await;
    let opened = opened.expect("a namespace").into_inner();
    Stock {
        client,
        namespace: NamespaceId::from_slice(&opened.namespace_id).expect("16 bytes"),
        key: NamespaceKey::from_bytes(opened.namespace_key[..].try_into().expect("32 bytes")),
    }
}
