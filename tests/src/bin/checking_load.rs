//! A load that checks every byte, every deadline and every answer, as a process that runs in some namespace.
//!
//! `checking_load PLAN`: the plan is JSON, what to do comes as lines on standard input, what was seen goes as JSON lines
//! to standard output; `kvtests::load` is both ends.

fn main() -> anyhow::Result<()> {
    let Some(plan) = std::env::args().nth(1) else {
        anyhow::bail!("usage: checking_load PLAN");
    };
    kvtests::load::run(&plan)
}
