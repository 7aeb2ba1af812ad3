//! Prices of the steps that every block goes through, one process, one thread.

use std::hint::black_box;
use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::{Bytes, BytesMut};
use clap::Parser;
use indicatif::ProgressBar;
use kvbenches::micro::{Price, Unit, run};
use kvbenches::peers::wire::payload;
use kvbenches::phases::inside::{engine, hash, put, query};
use kvclient::clock::Tick;
use kvclient::route::{Assembly, Known, Split};
use kvgpu::{Arena, ArenaConfig, DomainId, HugePages, Staging, StagingMap, Toward};
use kvproto::checksum::{Landing, PAGE_BYTES, copy_and_sum, page_sum, page_sums, seal};
use kvproto::frame::{Frame, FrameLimits, FrameReader, head};
use kvproto::{
    BlockKey, Chain, Member, MemberId, MemberState, NamespaceId, NamespaceKey, OwnerId, Part,
    hash as chain_hash, v1,
};
use kvserver::engine::policy::{self, BlockId, BlockMeta, EvictionPolicy};
use kvserver::engine::{LeaseAsk, Owner, TenantId};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const MIB: usize = 1 << 20;
/// Bytes walked through by everything that reads payload: past the last cache.
const SOURCE_BYTES: usize = 256 * MIB;

/// Prices of single steps: median over interleaved rounds, p10 to p90 beside it.
#[derive(Parser, Debug)]
#[command(name = "micro")]
struct Arguments {
    /// Interleaved rounds.
    #[arg(long, default_value_t = 15)]
    rounds: usize,
    /// Length of a sample, milliseconds.
    #[arg(long, default_value_t = 50)]
    sample_ms: u64,
    /// Only prices whose name contains this.
    #[arg(long)]
    only: Option<String>,
    /// One JSON object per price, as an array, to this file.
    #[arg(long)]
    json: Option<PathBuf>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let mut prices = prices()?;
    prices.retain(|p| {
        arguments
            .only
            .as_ref()
            .is_none_or(|only| p.name().contains(only))
    });
    let progress = ProgressBar::new((prices.len() * arguments.rounds) as u64);
    let lines = run(
        &mut prices,
        arguments.rounds,
        Duration::from_millis(arguments.sample_ms),
        |name| {
            progress.set_message(name);
            progress.inc(1);
        },
    );
    progress.finish_and_clear();
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "{}\n{:<52} {:>10}  {:<10} p10–p90",
        kvbenches::procfs::machine(),
        "",
        "median",
        ""
    )?;
    for line in &lines {
        if let Some(v) = line.value {
            writeln!(
                out,
                "{:<52} {:>10.2}  {:<10} {:.2}–{:.2}",
                line.name, v.median, line.unit, v.p10, v.p90
            )?;
        }
    }
    if let Some(path) = &arguments.json {
        std::fs::write(path, serde_json::to_string_pretty(&lines)? + "\n")
            .with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

fn prices() -> Result<Vec<Price>> {
    let mut prices = hashing();
    prices.extend(bytes());
    prices.extend(shared()?);
    prices.extend(frames());
    prices.extend(index()?);
    prices.extend(["lru", "s3fifo", "best"].into_iter().filter_map(eviction));
    prices.extend(allocator()?);
    prices.extend([
        routing(1, "route a lookup of 512 blocks, 1 member"),
        routing(8, "route a lookup of 512 blocks, 8 members"),
        routing(100, "route a lookup of 512 blocks, 100 members"),
    ]);
    Ok(prices)
}

fn hashing() -> Vec<Price> {
    let key = NamespaceKey::from_bytes([7; 32]);
    let tokens: Vec<u32> = (0..4096).collect();
    let chain = move || {
        black_box(chain_hash::chain(&key, 16, black_box(&tokens)));
        4096
    };
    let key = NamespaceKey::from_bytes([7; 32]);
    let opaque = move || {
        black_box(chain_hash::engine(&key, black_box(&[1; 32])));
        1
    };
    vec![
        Price::new("chain hash, 16 tokens a block", Unit::Nanos("token"), chain),
        Price::new("engine hash, 32 bytes", Unit::Nanos("hash"), opaque),
    ]
}

/// What a client of a cluster does on top, for a lookup of 512 blocks in runs of 16: owners, a chain for each, one prefix.
fn routing(members: u32, name: &'static str) -> Price {
    const BLOCKS: u32 = 512;
    const RUN_BLOCKS: u32 = 16;
    let member = |id: u32| Member {
        id: MemberId(format!("{id:016x}")),
        generation: 1,
        version: 1,
        weight: 1,
        zone: String::new(),
        state: MemberState::Active,
        address: format!("10.0.0.{id}:7070"),
    };
    let mut known = Known::default();
    known.merge((0..members).map(member), Tick::default());
    let tokens: Vec<u32> = (0..BLOCKS).collect();
    let key = NamespaceKey::from_bytes([7; 32]);
    let chain = Chain::from_root(chain_hash::chain(&key, 1, &tokens));
    let route = move || {
        let table = known.table();
        let split = Split::new(black_box(&chain), RUN_BLOCKS, |run| {
            table.owner(run).unwrap_or(0)
        });
        let mut assembly = Assembly::new(&split);
        let mut tiers = Vec::new();
        for (number, share) in split.shares.iter().enumerate() {
            let asked = share.chain(&chain, RUN_BLOCKS);
            assembly.answered(number, asked.len());
            tiers.push(vec![(asked.len() as u32, 1_u8)]);
            black_box(asked);
        }
        let blocks = assembly.prefix();
        black_box(assembly.stretches(blocks, &tiers));
        blocks as u64
    };
    Price::new(name, Unit::Nanos("block"), route)
}

/// Walks through the source, a block at a time, and hands each to `step`.
fn walk(
    source: &Arc<Vec<u8>>,
    block: usize,
    mut step: impl FnMut(&[u8]) + 'static,
) -> impl FnMut() -> u64 + 'static {
    let (source, mut at) = (source.clone(), 0);
    move || {
        step(black_box(&source[at..at + block]));
        at = (at + block) % SOURCE_BYTES;
        block as u64
    }
}

fn bytes() -> Vec<Price> {
    let source = Arc::new(payload(SOURCE_BYTES, 1));
    let buffer = || vec![0u8; MIB];
    let (mut a, mut b, mut c, mut d) = (buffer(), buffer(), buffer(), buffer());
    let mut sums = Vec::new();
    let copy = move |block: &[u8]| {
        a.copy_from_slice(block);
        black_box(&a);
    };
    let copy_sum = move |block: &[u8]| {
        sums.clear();
        copy_and_sum(block, &mut b, &mut sums);
        black_box((&b, &sums));
    };
    let streamed = move |block: &[u8]| {
        kvgpu::copy(&mut c, block);
        black_box(&c);
    };
    let landing = move |block: &[u8]| {
        let mut landing = Landing::new(block.len() as u64);
        for piece in block.chunks(40_000) {
            landing.land(piece, &mut d);
        }
        black_box(landing.finish(&d));
    };
    let sums = page_sums(&source[..MIB]);
    let (key, place) = (key(1), Chain::from_root(vec![hash(1, 1)]).place(0, 64));
    let sealing = move || {
        black_box(seal(black_box(&key), &place, MIB as u64, &sums));
        1
    };
    vec![
        Price::new("memcpy, 1 MiB blocks", Unit::GibS, walk(&source, MIB, copy)),
        Price::new(
            "kvgpu::copy, 1 MiB blocks",
            Unit::GibS,
            walk(&source, MIB, streamed),
        ),
        Price::new(
            "page sums, 1 MiB blocks",
            Unit::GibS,
            walk(&source, MIB, |b| drop(black_box(page_sums(b)))),
        ),
        Price::new(
            "copy and sum, 1 MiB blocks",
            Unit::GibS,
            walk(&source, MIB, copy_sum),
        ),
        Price::new(
            "landing: copy and sum in 40 kB pieces",
            Unit::GibS,
            walk(&source, MIB, landing),
        ),
        Price::new("seal of a 1 MiB block", Unit::Nanos("seal"), sealing),
    ]
}

/// A block out of shared memory, page by page: into a buffer that is used again, and into much memory.
fn shared() -> Result<Vec<Price>> {
    let staging = Arc::new(Staging::create(SOURCE_BYTES as u64)?);
    let map = StagingMap::map(staging.fd().try_clone_to_owned()?)?;
    map.write(0, &payload(SOURCE_BYTES, 1))?;
    let price = |name, into_bytes: usize, step: fn(&Staging, u64, &mut [u8]) -> u64| {
        let (staging, mut into, mut at) = (staging.clone(), vec![1_u8; into_bytes], 0);
        Price::new(name, Unit::GibS, move || {
            for page in (at..at + MIB).step_by(PAGE_BYTES) {
                let to = &mut into[page % into_bytes..][..PAGE_BYTES];
                black_box(step(&staging, page as u64, to));
            }
            at = (at + MIB) % SOURCE_BYTES;
            MIB as u64
        })
    };
    let two_passes = |staging: &Staging, at, to: &mut [u8]| {
        staging.read(at, to).expect("inside");
        page_sum(to)
    };
    let cache = |staging: &Staging, at, to: &mut [u8]| {
        let sum = staging.read_summed(at, to, Toward::Cache);
        sum.expect("inside")
    };
    let memory = |staging: &Staging, at, to: &mut [u8]| {
        let sum = staging.read_summed(at, to, Toward::Memory);
        sum.expect("inside")
    };
    Ok(vec![
        price(
            "shared, copied then summed, 1 MiB again and again",
            MIB,
            two_passes,
        ),
        price(
            "shared, one pass to the cache, 1 MiB again and again",
            MIB,
            cache,
        ),
        price(
            "shared, one pass to memory, 1 MiB again and again",
            MIB,
            memory,
        ),
        price(
            "shared, copied then summed, much memory",
            SOURCE_BYTES,
            two_passes,
        ),
        price(
            "shared, one pass to the cache, much memory",
            SOURCE_BYTES,
            cache,
        ),
        price(
            "shared, one pass to memory, much memory",
            SOURCE_BYTES,
            memory,
        ),
    ])
}

fn key(index: u64) -> BlockKey {
    BlockKey {
        namespace: NamespaceId([7; 16]),
        hash: hash(1, index),
        part: Part::default(),
    }
}

/// A get's message of 1 MiB, as one stream cut into HTTP/2 frames of the usual size.
fn frames() -> Vec<Price> {
    let message = v1::GetResponse {
        outcome: v1::GetOutcome::Hit.into(),
        header: Some(v1::BlockHeader {
            hash: Bytes::from(vec![1; 32]),
            page_sums: vec![7; 16],
            length_bytes: MIB as u64,
            ..Default::default()
        }),
        ..Default::default()
    };
    let encoded = message.clone();
    let encode = move || {
        black_box(head(black_box(&encoded), MIB));
        1
    };
    let mut stream = BytesMut::from(&head(&message, MIB)[..]);
    stream.extend_from_slice(&payload(MIB, 3));
    let stream = stream.freeze();
    let parse = move |chunk: usize| {
        let stream = stream.clone();
        move || {
            let mut reader = FrameReader::new(FrameLimits::default());
            let mut data = 0;
            for at in (0..stream.len()).step_by(chunk) {
                reader.push(stream.slice(at..(at + chunk).min(stream.len())));
                while let Ok(Some(frame)) = reader.next() {
                    data += if let Frame::Data(piece) = frame {
                        piece.len()
                    } else {
                        0
                    };
                }
            }
            assert_eq!(data, MIB, "the parser lost payload");
            1
        }
    };
    vec![
        Price::new(
            "frame head of a get's message",
            Unit::Nanos("message"),
            encode,
        ),
        Price::new(
            "frame parse, 1 MiB in 1 MiB chunks",
            Unit::Nanos("message"),
            parse(MIB),
        ),
        Price::new(
            "frame parse, 1 MiB in 16 KiB chunks",
            Unit::Nanos("message"),
            parse(16 << 10),
        ),
    ]
}

/// The one caller.
const OWNER: Owner = Owner {
    tenant: TenantId(0),
    id: OwnerId([1; 16]),
};

fn index() -> Result<Vec<Price>> {
    // 65,536 blocks: the index is larger than a core's second cache.
    const CHAINS: u64 = 128;
    const KEYS: u64 = 512;
    let engine = engine(CHAINS * KEYS * 4096 * 5 / 4)?;
    let value = payload(4096, 1);
    let chains: Vec<_> = (0..CHAINS)
        .map(|nth| Chain::from_root((0..KEYS).map(|i| hash(nth, i)).collect()))
        .collect();
    for chain in &chains {
        put(&engine, chain, &value)?;
    }
    let (chains, mut nth) = (Arc::new(chains), 0);
    let (of_probe, probed) = (chains.clone(), engine.clone());
    let probe = move || {
        nth += 1;
        let answer = probed.lookup(query(&of_probe[nth % CHAINS as usize], None));
        assert_eq!(
            u64::from(black_box(answer).present_blocks),
            KEYS,
            "a block is missing"
        );
        KEYS
    };
    let (of_lease, leased_of, mut leased_nth) = (chains.clone(), engine.clone(), 0);
    let leased = move || {
        leased_nth += 1;
        let ask = LeaseAsk {
            owner: OWNER,
            ttl_ms: 0,
            idempotency: None,
            id: None,
        };
        let chain = &of_lease[leased_nth % CHAINS as usize];
        let lease = leased_of.lookup(query(chain, Some(ask))).lease;
        let lease = lease.expect("a lease for all that is there");
        assert_eq!(u64::from(lease.blocks), KEYS, "a block is not leased");
        assert!(leased_of.release(lease.id, OWNER), "the lease was gone");
        KEYS
    };
    let miss = Chain::from_root(vec![hash(u64::MAX, 1)]);
    let missed = move || {
        black_box(engine.lookup(query(black_box(&miss), None)));
        1
    };
    Ok(vec![
        Price::new(
            "index lookup, chain of 512, probe",
            Unit::Nanos("key"),
            probe,
        ),
        Price::new(
            "index lookup, chain of 512, leased and released",
            Unit::Nanos("key"),
            leased,
        ),
        Price::new("index lookup, plain miss", Unit::Nanos("lookup"), missed),
    ])
}

/// A full policy: one block touched, one evicted, one inserted, over and over.
fn eviction(name: &'static str) -> Option<Price> {
    const HELD: u32 = 1 << 16;
    let mut policy: Box<dyn EvictionPolicy> = policy::by_name(name)?;
    let meta = |n: u64| BlockMeta {
        parent: None,
        index: (n % 16) as u32,
        bytes: 1 << 16,
        fingerprint: n.wrapping_mul(0x9e37_79b9_7f4a_7c15),
    };
    for n in 0..HELD {
        policy.inserted(BlockId(n), &meta(u64::from(n)));
    }
    let mut n = u64::from(HELD);
    let label = match name {
        "lru" => "policy lru: touch, evict, insert",
        "s3fifo" => "policy s3fifo: touch, evict, insert",
        _ => "policy best: touch, evict, insert",
    };
    Some(Price::new(label, Unit::Nanos("round"), move || {
        n += 1;
        let touched = (n.wrapping_mul(0xd6e8_feb8_6659_fd93) >> 48) as u32 % HELD;
        policy.touched(&[BlockId(touched)]);
        if let Some(victim) = policy.victim(&mut |_| true) {
            policy.removed(victim);
            policy.inserted(victim, &meta(n));
        }
        1
    }))
}

/// A half-full arena of mixed sizes: one slot freed, one taken.
fn allocator() -> Result<Vec<Price>> {
    // Not pre-faulted and not written to: the price of the bookkeeping alone.
    let config = ArenaConfig {
        capacity_bytes: 1 << 30,
        huge_pages: HugePages::Off,
        prefault: false,
        ..ArenaConfig::default()
    };
    let arena = Arena::new(config)?;
    let sizes = [4 << 10, 64 << 10, 192 << 10, 1 << 20, 3 << 20];
    let mut held = std::collections::VecDeque::new();
    for n in 0..600 {
        held.push_back(
            arena
                .alloc(DomainId::NODE, sizes[n % sizes.len()])
                .context("half of an arena is too much")?,
        );
    }
    let mut n = 0usize;
    let mixed = move || {
        n += 1;
        held.pop_front();
        let size = sizes[(n.wrapping_mul(0x9e37_79b9) >> 7) % sizes.len()];
        held.extend(arena.alloc(DomainId::NODE, size));
        1
    };
    Ok(vec![Price::new(
        "arena: free and take, mixed sizes",
        Unit::Nanos("pair"),
        mixed,
    )])
}
