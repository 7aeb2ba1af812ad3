//! Who is believed to be a node: whoever shows the nodes' token, and nobody by saying so.

use bytes::Bytes;
use kvproto::{Chain, convert, v1};
use kvtests::{
    keys::{BLUE, Keys, NODES, RED, as_node, open, opening, shown},
    node::{RUN_BLOCKS, Stock, TestNode, figure, filled},
    patience::eventually,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Status};

/// A node that asks for credentials, and serves so many calls of nodes at once.
async fn locked(peer_calls: usize) -> (TestNode, Keys) {
    let keys = Keys::cut();
    let node = TestNode::start(|config| {
        keys.lock(config);
        config.peer_calls = peer_calls;
    })
    .await;
    (node, keys)
}

fn blocks() -> Vec<Bytes> {
    (0..RUN_BLOCKS).map(|i| filled(i, 5000)).collect()
}

/// The messages that put a run.
fn putting(stock: &Stock, chain: &Chain) -> Vec<v1::PutRequest> {
    let blocks = blocks();
    let pieces = (0..).zip(&blocks);
    let pieces = pieces.flat_map(|(i, block)| stock.pieces(chain, i, block, 1 << 20));
    std::iter::once(stock.start(v1::Ack::Cached))
        .chain(pieces)
        .collect()
}

fn looking(stock: &Stock, chain: &Chain) -> v1::LookupRequest {
    v1::LookupRequest {
        namespace_id: Bytes::copy_from_slice(&stock.namespace.0),
        chain: Some(convert::chain_to_wire(chain)),
        probe: true,
        ..v1::LookupRequest::default()
    }
}

/// A call as somebody makes it.
struct As<'a> {
    token: Option<&'a str>,
    /// Says to be a node that acts for this tenant.
    tenant: Option<&'a str>,
}

impl As<'_> {
    fn call<T>(&self, message: T) -> Request<T> {
        let call = shown(message, self.token);
        match self.tenant {
            Some(tenant) => as_node(call, tenant),
            None => call,
        }
    }

    async fn put(&self, stock: &Stock, chain: &Chain) -> Result<Vec<v1::PutResult>, Status> {
        let call = self.call(tokio_stream::iter(putting(stock, chain)));
        let put = stock.client.clone().put(call).await?;
        Ok(put.into_inner().results)
    }

    async fn present(&self, stock: &Stock, chain: &Chain) -> Result<u32, Status> {
        let call = self.call(looking(stock, chain));
        let found = stock.client.clone().lookup(call).await?;
        Ok(found.into_inner().present_blocks)
    }

    /// Blocks that a get answers.
    async fn hits(&self, stock: &Stock, chain: &Chain) -> Result<u32, Status> {
        let call = self.call(v1::GetRequest {
            namespace_id: Bytes::copy_from_slice(&stock.namespace.0),
            chain: Some(convert::chain_to_wire(chain)),
            ..v1::GetRequest::default()
        });
        let mut answer = stock.client.clone().get(call).await?.into_inner();
        let mut hits = 0;
        while let Some(piece) = answer.message().await? {
            hits += u32::from(piece.offset == 0 && piece.outcome() == v1::GetOutcome::Hit);
        }
        Ok(hits)
    }

    async fn forget(&self, stock: &Stock) -> Result<u64, Status> {
        let call = self.call(v1::InvalidateRequest {
            namespace_id: Bytes::copy_from_slice(&stock.namespace.0),
            target: Some(v1::invalidate_request::Target::All(true)),
            ..v1::InvalidateRequest::default()
        });
        let forgotten = stock.client.clone().invalidate(call).await?;
        Ok(forgotten.into_inner().blocks)
    }

    async fn opens(&self, stock: &Stock) -> Result<Bytes, Status> {
        let call = self.call(opening());
        let opened = stock.client.clone().open_namespace(call).await?;
        Ok(opened.into_inner().namespace_id)
    }
}

const RED_ITSELF: As<'_> = As {
    token: Some(RED),
    tenant: None,
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_only_says_to_be_a_node_gets_at_nothing_of_another_tenants() {
    let (node, _keys) = locked(64).await;
    let red = open(&node.node, RED).await;
    let chain = red.chain(1, RUN_BLOCKS);
    RED_ITSELF.put(&red, &chain).await.unwrap();
    for (token, code) in [
        (Some(BLUE), Code::NotFound),
        (Some("the-token-of-no-node"), Code::Unauthenticated),
        (None, Code::Unauthenticated),
    ] {
        let liar = As {
            token,
            tenant: Some("red"),
        };
        let other = red.chain(2, RUN_BLOCKS);
        let codes = [
            liar.present(&red, &chain).await.unwrap_err().code(),
            liar.hits(&red, &chain).await.unwrap_err().code(),
            liar.put(&red, &other).await.unwrap_err().code(),
            liar.forget(&red).await.unwrap_err().code(),
        ];
        assert_eq!(codes, [code; 4], "{token:?}");
    }
    let blue = As {
        token: Some(BLUE),
        tenant: Some("red"),
    };
    let opened = blue.opens(&red).await.unwrap();
    assert_ne!(opened[..], red.namespace.0, "blue is blue");
    assert_eq!(RED_ITSELF.hits(&red, &chain).await.unwrap(), RUN_BLOCKS);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_shows_the_nodes_token_acts_for_the_tenant_that_it_names() {
    let (node, _keys) = locked(64).await;
    let red = open(&node.node, RED).await;
    let chain = red.chain(1, RUN_BLOCKS);
    RED_ITSELF.put(&red, &chain).await.unwrap();
    let acts_for = |tenant| As {
        token: Some(NODES),
        tenant,
    };
    let peer = acts_for(Some("red"));
    assert_eq!(peer.present(&red, &chain).await.unwrap(), RUN_BLOCKS);
    assert_eq!(peer.hits(&red, &chain).await.unwrap(), RUN_BLOCKS);
    assert_eq!(peer.opens(&red).await.unwrap()[..], red.namespace.0);
    for (tenant, code) in [
        (Some("blue"), Code::NotFound),
        (Some("green"), Code::Unauthenticated),
        (None, Code::Unauthenticated),
    ] {
        let error = acts_for(tenant).hits(&red, &chain).await.unwrap_err();
        assert_eq!(error.code(), code, "{tenant:?}");
    }
    node.stop().await;
}

/// A put that goes on until what it answers is dropped.
fn unending(who: &As<'_>, stock: &Stock) -> mpsc::Sender<v1::PutRequest> {
    let (send, receive) = mpsc::channel(1);
    send.try_send(stock.start(v1::Ack::Cached)).expect("room");
    let call = who.call(ReceiverStream::new(receive));
    let mut client = stock.client.clone();
    tokio::spawn(async move { client.put(call).await.map(drop) });
    send
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nodes_may_use_is_used_by_nodes_alone() {
    let (node, _keys) = locked(1).await;
    let (red, blue) = (open(&node.node, RED).await, open(&node.node, BLUE).await);
    let chain = red.chain(1, RUN_BLOCKS);
    let peer = As {
        token: Some(NODES),
        tenant: Some("red"),
    };
    let liar = As {
        token: Some(BLUE),
        tenant: Some("blue"),
    };
    let figures = || {
        let figure = |name| figure(&node.node, name);
        (
            figure("terrace_calls_in_flight"),
            figure("terrace_peer_calls"),
        )
    };
    // However long a tenant sits here as a node, nodes are served …
    let held = unending(&liar, &blue);
    eventually("it is served", || figures().0 == 1.0).await;
    assert_eq!(figures(), (1.0, 0.0));
    assert_eq!(peer.present(&red, &chain).await.unwrap(), 0);
    drop(held);
    eventually("both are over", || figures() == (0.0, 0.0)).await;

    // … and a tenant is, while nodes have to wait for each other.
    let held = unending(&peer, &red);
    eventually("a node is served", || figures().1 == 1.0).await;
    let refused = peer.present(&red, &chain).await.unwrap_err();
    assert!(refused.message().contains("peer_calls"), "{refused}");
    assert_eq!(liar.opens(&blue).await.unwrap()[..], blue.namespace.0);
    drop(held);
    eventually("the seat is free again", || figures().1 == 0.0).await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_tenant_puts_is_new_whatever_it_says_and_what_a_node_hands_over_is_not() {
    let (node, _keys) = locked(64).await;
    let red = open(&node.node, RED).await;
    let chain = red.chain(1, RUN_BLOCKS);
    RED_ITSELF.put(&red, &chain).await.unwrap();
    RED_ITSELF.forget(&red).await.unwrap();
    let as_told = |token| As {
        token: Some(token),
        tenant: Some("red"),
    };
    let outcomes = |results: Vec<v1::PutResult>| {
        let outcomes = results.iter().map(v1::PutResult::outcome);
        outcomes.collect::<Vec<_>>()
    };
    // A node that was not told of the invalidation must not undo it.
    let put = as_told(NODES).put(&red, &chain).await.unwrap();
    assert!(
        put.iter()
            .all(|put| put.reason() == v1::Reason::Invalidated)
    );
    assert_eq!(
        outcomes(put),
        [v1::PutOutcome::Rejected; RUN_BLOCKS as usize]
    );
    let put = as_told(RED).put(&red, &chain).await.unwrap();
    assert_eq!(outcomes(put), [v1::PutOutcome::Cached; RUN_BLOCKS as usize]);
    node.stop().await;
}
