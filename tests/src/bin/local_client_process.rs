//! A client of the same-host path as a process of its own, for tests that kill it or stop its clock.
//!
//! `local_client_process MODE ENDPOINT`, and lines on standard input and output:
//!
//! ```text
//! hold     takes a lease on a chain, reads it without one, says "held", waits
//! holder   holds a chain where it lies, says "held"; for every "go": reads it and says what became of each block
//! put      says "putting", then puts new blocks without end
//! staged   attaches with no more than the wire's own words, writes its staging memory, says "staged", waits
//! knock    attaches with no more than the wire's own words, to a socket; says "attached", or the refusal
//! paths    puts a chain and gets it; says how many blocks came by which path
//! read     for every "go": leases a chain for a moment and reads it, until a block is no hit; says what it saw
//! ```

use std::io::{BufRead, Write};
use std::time::Duration;

use kvclient::{
    Chain, Client, Fetched, GetOutcome, LookupOptions, Namespace, NamespaceHandle, Path,
    PathReport, PutBlock, PutOptions,
};
use kvproto::v1::local_request::Call;
use kvtests::{
    local::{Raw, attach},
    node::filled,
};

/// Blocks of the chain and their length; the test that starts this puts the same.
const BLOCKS: u32 = 12;
const LENGTH: usize = 1 << 20;

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let (Some(mode), Some(endpoint)) = (args.next(), args.next()) else {
        anyhow::bail!("usage: local_client_process MODE ENDPOINT");
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    runtime.block_on(run(&mode, &endpoint))
}

async fn run(mode: &str, endpoint: &str) -> anyhow::Result<()> {
    if mode == "knock" {
        let answer = Raw::connect(endpoint.as_ref())?.call(Call::Attach(attach(9)));
        return say(&match answer {
            Ok(_) => "attached".to_owned(),
            Err(refused) => format!("{:?}: {}", refused.reason(), refused.message),
        });
    }
    if mode == "staged" {
        let mut raw = Raw::connect(endpoint.as_ref())?;
        let asked = kvproto::v1::LocalAttach {
            staging_bytes: 8 << 20,
            ..attach(9)
        };
        raw.call(Call::Attach(asked))
            .map_err(|refused| anyhow::anyhow!("{refused:?}"))?;
        raw.staging().write(4096, &filled(1, LENGTH))?;
        say("staged")?;
        return wait();
    }
    let client = Client::builder(endpoint)
        .deadline(Duration::from_secs(60))
        .connect()
        .await?;
    let spec = Namespace::opaque("local", 16, 4);
    let ns = client.open_namespace(&spec, false).await?;
    let chain = chain(&ns, 1, BLOCKS);
    match mode {
        "hold" => {
            let found = client
                .lookup(&ns, &chain, &LookupOptions::default())
                .await?;
            let fetched = client.get(&ns, &chain, None).await?;
            let hits = fetched.iter().filter(|block| block.bytes.is_some()).count();
            anyhow::ensure!(hits == BLOCKS as usize, "{hits} hits");
            anyhow::ensure!(found.leased_blocks() == BLOCKS, "{found:?}");
            anyhow::ensure!(client.path().path == Path::Local, "{:?}", client.path());
            say("held")?;
            wait()
        }
        "holder" => {
            let held = client.hold(&ns, &chain, None).await?;
            let held = held.ok_or_else(|| anyhow::anyhow!("not on the same host"))?;
            say("held")?;
            for line in std::io::stdin().lock().lines() {
                line?;
                let mut memory = vec![0; LENGTH];
                let outcomes: Result<Vec<GetOutcome>, _> =
                    (0..held.len()).map(|i| held.read(i, &mut memory)).collect();
                say(&format!("{:?}", outcomes?))?;
            }
            Ok(())
        }
        "put" => {
            say("putting")?;
            let data = filled(1, LENGTH);
            for seed in 2.. {
                let chain = self::chain(&ns, seed, 4);
                let blocks: Vec<_> = (0..4).map(|i| PutBlock::new(i, data.clone())).collect();
                client
                    .put(&ns, &chain, &blocks, PutOptions::default())
                    .await?;
            }
            Ok(())
        }
        "paths" => {
            let data = filled(1, LENGTH);
            let block = |i| PutBlock::new(i, data.clone());
            let blocks: Vec<_> = (0..BLOCKS as usize).map(block).collect();
            client
                .put(&ns, &chain, &blocks, PutOptions::default())
                .await?;
            let fetched = client.get(&ns, &chain, None).await?;
            let is_right = |block: &Fetched| block.bytes.as_ref() == Some(&data);
            anyhow::ensure!(fetched.iter().all(is_right), "{fetched:?}");
            let PathReport { local, grpc, .. } = client.path();
            say(&format!(
                "local {} grpc {}",
                local.got_blocks, grpc.got_blocks
            ))
        }
        "read" => {
            for line in std::io::stdin().lock().lines() {
                line?;
                say(&read(&client, &ns, &chain).await?)?;
            }
            Ok(())
        }
        other => anyhow::bail!("no mode {other}"),
    }
}

fn chain(ns: &NamespaceHandle, seed: u32, blocks: u32) -> Chain {
    let tokens: Vec<u32> = (0..blocks * 16).map(|i| seed * 1_000_003 + i).collect();
    ns.chain(&tokens)
}

/// Reads until something is no hit: "gone" when nobody was there to be leased, "torn" when the first blocks were
/// read and later ones were not, "expired" when none was; "wrong" when a hit was not what was put.
async fn read(client: &Client, ns: &NamespaceHandle, chain: &Chain) -> anyhow::Result<String> {
    let mut memory = vec![0; BLOCKS as usize * LENGTH];
    loop {
        let options = LookupOptions {
            lease_ttl: Duration::from_millis(50),
            ..LookupOptions::default()
        };
        let found = client.lookup(ns, chain, &options).await?;
        let Some(lease) = found.lease.filter(|_| found.present_blocks == BLOCKS) else {
            return Ok("gone".into());
        };
        let mut buffers = kvclient::split_buffers(&mut memory, LENGTH)?;
        let got = client.get_into(ns, chain, &lease, &mut buffers).await?;
        for (i, got) in got.iter().enumerate() {
            if got.is_hit() && memory[i * LENGTH..][..LENGTH] != filled(i as u32, LENGTH)[..] {
                return Ok(format!("wrong block {i}"));
            }
        }
        let outcomes: Vec<GetOutcome> = got.iter().map(|got| got.outcome).collect();
        let hits = outcomes.iter().filter(|o| **o == GetOutcome::Hit).count();
        match hits {
            0 => return Ok(format!("expired {outcomes:?}")),
            hits if hits < outcomes.len() => return Ok(format!("torn {outcomes:?}")),
            _ => drop(lease),
        }
    }
}

fn say(line: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()?;
    Ok(())
}

/// Until the test is over, however it ends.
fn wait() -> anyhow::Result<()> {
    std::io::stdin().lock().read_line(&mut String::new())?;
    Ok(())
}
