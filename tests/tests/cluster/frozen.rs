//! A member that keeps its connections and answers nothing: calls learn of it long before their deadlines.

use std::{sync::Arc, time::Duration};

use kvclient::{
    Client, GetOutcome, LocalPath, LookupOptions, Namespace, PutBlock, PutOptions, PutOutcome,
};
use kvproto::Member;
use kvtests::{circle::Circle, node::filled, patience::within_awake};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
};

const RUN_BLOCKS: u32 = 4;
const BLOCK_BYTES: usize = 3000;

/// What a call may take at most while a member is silent: half a second until it is looked at, a quarter for its
/// answer, and room for a slow machine. A tenth of the deadline.
const SOON: Duration = Duration::from_secs(3);
const DEADLINE: Duration = Duration::from_secs(30);

/// A way to a node that can be frozen: connections stay, and nothing passes.
async fn freezable(to: std::net::SocketAddr) -> (String, watch::Sender<bool>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let (freeze, frozen) = watch::channel(false);
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            let far = TcpStream::connect(to).await.expect("the node listens");
            let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
            tokio::spawn(pass(near_in, far_out, frozen.clone()));
            tokio::spawn(pass(far_in, near_out, frozen.clone()));
        }
    });
    (address, freeze)
}

async fn pass(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut frozen: watch::Receiver<bool>,
) {
    let mut bytes = vec![0; 64 << 10];
    while let Ok(count) = from.read(&mut bytes).await
        && count > 0
        && frozen.wait_for(|frozen| !frozen).await.is_ok()
        && to.write_all(&bytes[..count]).await.is_ok()
    {}
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_owner_costs_its_blocks_and_not_the_deadline() {
    let circle = Circle::start(2).await;
    let (address, freeze) = freezable(circle.nodes[1].node.grpc_addr()).await;
    // Clients are told of the way that can be frozen. No digest covers an address.
    let told = Member {
        version: circle.member(1).version + 1,
        address,
        ..circle.member(1)
    };
    circle.tell(0, [told]);
    let client = Client::builder(&circle.endpoint(0))
        .local(LocalPath::Off)
        .connect()
        .await
        .unwrap()
        .with_deadline(DEADLINE);
    let spec = Namespace::opaque("frozen", 16, RUN_BLOCKS);
    let ns = Arc::new(client.open_namespace(&spec, false).await.unwrap());
    let roster = circle.nodes[0].node.cluster().roster();
    let is_frozens = |run| roster.placement.first(&run).unwrap().0 == "n1";
    // A prompt that begins at the node that stays well, and goes on at the other.
    let chain = (1..)
        .map(|seed| {
            ns.chain(
                &(0..16 * 64)
                    .map(|i| seed * 10_007 + i)
                    .collect::<Vec<u32>>(),
            )
        })
        .find(|chain| !is_frozens(chain.place(0, RUN_BLOCKS).run))
        .unwrap();
    let of_frozen: Vec<bool> = (0..chain.len())
        .map(|i| is_frozens(chain.place(i, RUN_BLOCKS).run))
        .collect();
    let cut = of_frozen.iter().position(|is| *is).expect("half of it");
    let blocks: Vec<_> = (0..chain.len())
        .map(|i| PutBlock::new(i, filled(i as u32, BLOCK_BYTES).to_vec()))
        .collect();
    let put = client
        .put(&ns, &chain, &blocks, PutOptions::default())
        .await
        .unwrap();
    assert!(put.iter().all(|put| put.outcome == PutOutcome::Cached));
    let whole = client.get(&ns, &chain, None).await.unwrap();
    assert!(whole.iter().all(|got| got.outcome == GetOutcome::Hit));

    freeze.send_replace(true);
    let got = within_awake(SOON, client.get(&ns, &chain, None)).await;
    let got = got.expect("long before its deadline").expect("an answer");
    for (got, of_frozen) in got.iter().zip(&of_frozen) {
        let expected = if *of_frozen {
            GetOutcome::Node
        } else {
            GetOutcome::Hit
        };
        assert_eq!(got.outcome, expected);
    }
    // From then on it is known, and nobody waits for it.
    let quick = Duration::from_millis(400);
    let found = within_awake(quick, client.lookup(&ns, &chain, &LookupOptions::default())).await;
    assert_eq!(found.expect("at once").unwrap().present_blocks, cut as u32);

    freeze.send_replace(false);
    kvtests::patience::until("it is asked again", async || {
        let got = client.get(&ns, &chain, None).await.unwrap();
        got.iter().all(|got| got.outcome == GetOutcome::Hit)
    })
    .await;
    circle.stop().await;
}
