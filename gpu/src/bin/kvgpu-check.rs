//! Runs the device suite and measures copies on the machine at hand: `kvgpu-check --write gpu/MEASURED.md`.
//!
//! Every rate stands beside what a user would pick instead, taken in the same rounds: the kernels beside a
//! plain copy within the device of the same bytes, saving and loading pages beside a plain page-locked
//! transfer. What was moved is compared byte for byte with what the plan says. On a machine without a GPU
//! it runs the suite over the host device, measures nothing, and says so.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use kvgpu::{
    Arena, ArenaConfig, Arrangement, CopyPlan, Device, DeviceKind, DevicePreference, DomainId,
    KvLayout, KvOrder, PagedKv, PinnedArena, Stream, conformance, open,
};

const USAGE: &str = "usage: kvgpu-check [--device auto|host|cuda:N] [--rounds N] [--batch-mib 1..64] [--write FILE]";
/// Copies within the device are short, so several are timed together.
const REPEATS: u32 = 16;

type Failure = Box<dyn std::error::Error>;

struct Options {
    preference: DevicePreference,
    rounds: usize,
    batch_mib: usize,
    write: Option<String>,
}

fn options() -> Result<Options, Failure> {
    let mut options = Options {
        preference: DevicePreference::Auto,
        rounds: 15,
        batch_mib: 64,
        write: None,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(flag) = arguments.next() {
        let value = arguments
            .next()
            .ok_or_else(|| format!("{flag} needs a value\n{USAGE}"))?;
        match flag.as_str() {
            "--device" => {
                options.preference = match value.as_str() {
                    "auto" => DevicePreference::Auto,
                    "host" => DevicePreference::Host,
                    other => match other.strip_prefix("cuda:").map(str::parse) {
                        Some(Ok(ordinal)) => DevicePreference::Cuda { ordinal },
                        _ => return Err(format!("--device {other}\n{USAGE}").into()),
                    },
                }
            }
            "--rounds" => options.rounds = value.parse::<usize>()?.max(1),
            "--batch-mib" => options.batch_mib = value.parse::<usize>()?.clamp(1, 64),
            "--write" => options.write = Some(value),
            _ => return Err(format!("{flag} is not known\n{USAGE}").into()),
        }
    }
    Ok(options)
}

fn main() -> ExitCode {
    match check() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "kvgpu-check: {error}");
            ExitCode::FAILURE
        }
    }
}

fn check() -> Result<bool, Failure> {
    let options = options()?;
    let (device, opened) = open(options.preference);
    let info = device.info().clone();
    let mut report = String::new();
    writeln!(report, "date (UTC): {}", today())?;
    writeln!(
        report,
        "device:     {} ({:?} {}), {} MiB",
        info.name,
        info.kind,
        info.ordinal,
        info.total_bytes >> 20
    )?;
    writeln!(report, "opened:     {opened}\n")?;

    let checks = conformance::run(&device);
    let passed = checks.iter().filter(|check| check.outcome.is_ok()).count();
    writeln!(report, "suite: {passed} of {} passed", checks.len())?;
    for check in &checks {
        match &check.outcome {
            Ok(()) => writeln!(report, "  ok      {}", check.name)?,
            Err(problem) => writeln!(report, "  FAILED  {}: {problem}", check.name)?,
        }
    }
    let measured = info.kind == DeviceKind::Cuda;
    if measured {
        writeln!(report, "\n{}", measure(&device, &options)?)?;
    } else {
        writeln!(report, "\nNo copy rates: there was no GPU to measure.")?;
    }
    write!(std::io::stdout(), "{report}")?;
    if let Some(path) = &options.write {
        let before = std::fs::read_to_string(path).unwrap_or_default();
        let page = page(&report, measured, &info.name) + with_tensors(&before);
        std::fs::write(path, page)?;
    }
    Ok(passed == checks.len())
}

fn page(report: &str, measured: bool, name: &str) -> String {
    let headline = if measured {
        format!("Run on {name}.")
    } else {
        "**Not run on a GPU.** No GPU was at hand when this was written: the suite below ran over the \
         host device, the CUDA device's kernels and transfers have not been executed on hardware, and \
         there are no copy rates."
            .to_owned()
    };
    format!(
        "# Measured\n\n{headline}\n\nRepeat with `cargo run --release -p kvgpu --bin kvgpu-check -- \
         --write gpu/MEASURED.md` on a machine with an NVIDIA GPU; the built binary needs only the \
         driver.\n\n```text\n{}\n```\n",
        report.trim_end()
    )
}

/// What `python/torch_check.py` wrote behind our own report: another run, with a headline of its own.
fn with_tensors(before: &str) -> &str {
    before
        .find("\n## With PyTorch tensors\n")
        .map_or("", |at| &before[at..])
}

/// One thing timed, and what it is held against.
struct Row {
    name: &'static str,
    against: Option<usize>,
    gib_s: Vec<f64>,
}

/// What the rounds work with.
struct Bench {
    arena: Arc<Arena>,
    stream: Box<dyn Stream>,
    plan: CopyPlan,
    paged: PagedKv,
    staging: kvgpu::DeviceSpan,
    spare: kvgpu::DeviceSpan,
    source: Bytes,
    bytes: usize,
}

impl Bench {
    /// Seconds per batch of row `row`.
    fn run(&self, row: usize) -> Result<f64, Failure> {
        let repeat = |operation: &dyn Fn() -> Result<kvgpu::Event, kvgpu::DeviceError>| {
            let start = now();
            for _ in 1..REPEATS {
                operation()?;
            }
            operation()?.wait()?;
            Ok(start.elapsed().as_secs_f64() / f64::from(REPEATS))
        };
        let slot = || {
            let slot = self.arena.alloc(DomainId::NODE, self.bytes);
            slot.ok_or("the arena of the benchmark is full")
        };
        match row {
            0 => repeat(&|| self.stream.copy(&self.staging, &self.spare)),
            1 => repeat(&|| self.stream.gather(&self.plan, &self.paged, &self.staging)),
            2 => repeat(&|| self.stream.scatter(&self.plan, &self.staging, &self.paged)),
            3 => {
                let slot = slot()?;
                let start = now();
                let pending = self
                    .stream
                    .download(&self.staging, slot)
                    .map_err(|r| r.error)?;
                pending.wait().map_err(|refused| refused.error)?;
                Ok(start.elapsed().as_secs_f64())
            }
            4 => {
                let slot = slot()?;
                let start = now();
                let saving = self
                    .stream
                    .save(&self.plan, &self.paged, &self.staging, slot);
                saving
                    .map_err(|r| r.error)?
                    .wait()
                    .map_err(|refused| refused.error)?;
                Ok(start.elapsed().as_secs_f64())
            }
            5 => {
                let start = now();
                self.stream
                    .upload(self.source.clone(), &self.staging)?
                    .wait()?;
                Ok(start.elapsed().as_secs_f64())
            }
            _ => {
                let (source, start) = (self.source.clone(), now());
                self.stream
                    .load(&self.plan, source, &self.staging, &self.paged)?
                    .wait()?;
                Ok(start.elapsed().as_secs_f64())
            }
        }
    }
}

fn measure(device: &Arc<dyn Device>, options: &Options) -> Result<String, Failure> {
    // A model of eight KV heads of 128, two bytes each, pages of 16 tokens: 64 KiB per page and layer.
    let layers = if options.batch_mib >= 16 { 32 } else { 4 };
    let mut layout = KvLayout {
        layers,
        kv: 2,
        pages: 0,
        page_tokens: 16,
        heads: 8,
        head_size: 128,
        dtype_bytes: 2,
        order: KvOrder::Nhd,
        arrangement: Arrangement::KvFirst,
    };
    let count = (((options.batch_mib << 20) as u64 / layout.page_bytes_all_layers()) as u32).max(1);
    layout.pages = 4 * count;
    // Pages as an engine would hand them out after a while: in no order.
    let mut pages: Vec<u32> = (0..layout.pages).collect();
    let mut chance = Chance(1);
    pages.sort_by_cached_key(|_| chance.next());
    pages.truncate(count as usize);
    let plan = CopyPlan::new(layout, pages, 1)?;
    let bytes = plan.total_bytes() as usize;

    let arena = Arena::new(ArenaConfig {
        capacity_bytes: (4 * bytes.next_multiple_of(4096)) as u64,
        ..ArenaConfig::default()
    })?;
    arena.wait_ready();
    let pinned = PinnedArena::new(Arc::clone(&arena), Arc::clone(device))?;
    let stream = device.stream()?;
    let pool = device
        .alloc((layout.layer_bytes() * u64::from(layers)) as usize)?
        .whole();
    let paged = PagedKv::contiguous(layout, &pool)?;
    let contents = pattern(pool.len_bytes());
    stream.upload(contents.clone(), &pool)?.wait()?;

    let mut slot = arena
        .alloc(DomainId::NODE, bytes)
        .ok_or("the arena of the benchmark is full")?;
    expected(&plan, &contents, &mut slot);
    let bench = Bench {
        arena: Arc::clone(&arena),
        stream,
        staging: device.alloc(bytes)?.whole(),
        spare: device.alloc(bytes)?.whole(),
        source: Bytes::from_owner(slot.freeze()),
        plan,
        paged,
        bytes,
    };
    let row = |name, against| Row {
        name,
        against,
        gib_s: Vec::new(),
    };
    let mut rows = [
        row("copy within the device (plain)", None),
        row("gather kernel", Some(0)),
        row("scatter kernel", Some(0)),
        row("device to page-locked slot (plain)", None),
        row("save: gather, then one DMA", Some(3)),
        row("page-locked slot to device (plain)", None),
        row("load: one DMA, then scatter", Some(5)),
    ];
    for i in 0..rows.len() {
        bench.run(i)?;
    }
    for round in 0..options.rounds {
        for step in 0..rows.len() {
            // Each round begins elsewhere, so that no row always follows the same one.
            let i = (round + step) % rows.len();
            rows[i]
                .gib_s
                .push(bytes as f64 / f64::from(1 << 30) / bench.run(i)?);
        }
    }
    verify(&bench, device, &pool, &contents)?;
    let mut table = String::new();
    writeln!(
        table,
        "copies: {} blocks of {} KiB, {} MiB together, {} rounds, {} MiB page-locked; bytes compared after the last round: equal",
        bench.plan.blocks(),
        bench.plan.block_bytes() >> 10,
        bytes >> 20,
        options.rounds,
        pinned.locked_bytes() >> 20
    )?;
    writeln!(
        table,
        "  {:<38} {:>9} {:>17}  against the plain copy",
        "", "GiB/s", "min to max"
    )?;
    for row in &rows {
        let mut sorted = row.gib_s.clone();
        sorted.sort_by(f64::total_cmp);
        let ratio = row.against.map_or(String::new(), |plain| {
            let ratios = row
                .gib_s
                .iter()
                .zip(&rows[plain].gib_s)
                .map(|(ours, plain)| ours / plain);
            interval(ratios.collect())
        });
        writeln!(
            table,
            "  {:<38} {:>9.1} {:>8.1} {:>8.1}  {ratio}",
            row.name,
            sorted[sorted.len() / 2],
            sorted[0],
            sorted[sorted.len() - 1]
        )?;
    }
    Ok(table.trim_end().to_owned())
}

/// The median of paired ratios and, from fifteen rounds on, its 95 % interval by order statistics.
fn interval(mut ratios: Vec<f64>) -> String {
    ratios.sort_by(f64::total_cmp);
    let count = ratios.len();
    let median = ratios[count / 2];
    if count < 15 {
        return format!("{median:.2} ({count} rounds, no interval)");
    }
    let reach = (1.96 * (count as f64).sqrt() / 2.0).ceil() as usize;
    let (low, high) = (
        ratios[(count / 2).saturating_sub(reach)],
        ratios[(count / 2 + reach).min(count - 1)],
    );
    format!("{median:.2} ({low:.2} to {high:.2})")
}

/// xorshift64: the same in every run.
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

fn pattern(length: usize) -> Bytes {
    let (mut bytes, mut chance) = (vec![0; length], Chance(0x9e37_79b9_7f4a_7c15));
    for chunk in bytes.chunks_mut(8) {
        chunk.copy_from_slice(&chance.next().to_le_bytes()[..chunk.len()]);
    }
    bytes.into()
}

/// What the plan says the blocks are.
fn expected(plan: &CopyPlan, contents: &[u8], blocks: &mut [u8]) {
    let layer_bytes = plan.layout().layer_bytes();
    for run in plan.runs() {
        let from = (u64::from(run.layer) * layer_bytes + run.paged) as usize;
        let (to, length) = (run.block as usize, run.length as usize);
        blocks[to..to + length].copy_from_slice(&contents[from..from + length]);
    }
}

/// Saves and loads once more and compares every byte.
fn verify(
    bench: &Bench,
    device: &Arc<dyn Device>,
    pool: &kvgpu::DeviceSpan,
    contents: &Bytes,
) -> Result<(), Failure> {
    let slot = bench
        .arena
        .alloc(DomainId::NODE, bench.bytes)
        .ok_or("the arena is full")?;
    let saving = bench
        .stream
        .save(&bench.plan, &bench.paged, &bench.staging, slot);
    let saved = saving
        .map_err(|r| r.error)?
        .wait()
        .map_err(|refused| refused.error)?;
    if saved[..] != bench.source[..] {
        return Err("the saved blocks are not what the plan says".into());
    }
    // Clear the pages, load them, and the pool must be what it was.
    let zeros = device.alloc(bench.bytes)?.whole();
    bench.stream.scatter(&bench.plan, &zeros, &bench.paged)?;
    let saved = Bytes::from_owner(saved.freeze());
    bench
        .stream
        .load(&bench.plan, saved, &bench.staging, &bench.paged)?
        .wait()?;
    for start in (0..pool.len_bytes()).step_by(bench.bytes) {
        let length = bench.bytes.min(pool.len_bytes() - start);
        let piece = device.alloc(length)?.whole();
        bench.stream.copy(&pool.span(start, length)?, &piece)?;
        let slot = bench
            .arena
            .alloc(DomainId::NODE, length)
            .ok_or("the arena is full")?;
        let read = bench.stream.download(&piece, slot).map_err(|r| r.error)?;
        let read = read.wait().map_err(|refused| refused.error)?;
        if read[..] != contents[start..start + length] {
            return Err("the pool is not what it was after save and load".into());
        }
    }
    Ok(())
}

#[expect(
    clippy::disallowed_methods,
    reason = "a benchmark: what it measures is real time"
)]
fn now() -> Instant {
    Instant::now()
}

/// The date, as year-month-day.
#[expect(
    clippy::disallowed_methods,
    reason = "the date of a measurement is the real one"
)]
fn today() -> String {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or(Duration::ZERO);
    // Days to a date of the Gregorian calendar, in eras of 400 years that begin on 1 March.
    let days = since.as_secs() / 86_400 + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, carry) = if month < 10 {
        (month + 3, 0)
    } else {
        (month - 9, 1)
    };
    format!("{:04}-{month:02}-{day:02}", era * 400 + year + carry)
}
