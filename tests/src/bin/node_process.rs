//! A node as a process of its own, for tests that kill it or stop its clock.
//!
//! `node_process DATA_DIR LISTEN`: prints its endpoint on a line, serves until standard input ends.

use std::io::{Read, Write};

use kvtests::node::small;

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let (Some(data_dir), Some(listen)) = (args.next(), args.next()) else {
        anyhow::bail!("usage: node_process DATA_DIR LISTEN");
    };
    let mut config = small(data_dir.as_ref());
    config.listen = listen.parse()?;
    let runtime = tokio::runtime::Runtime::new()?;
    let node = runtime.block_on(kvserver::Node::start(config))?;
    let mut out = std::io::stdout();
    writeln!(out, "{}", node.endpoint())?;
    out.flush()?;
    // Ends when the test drops its side, however the test ends.
    std::io::stdin().read_to_end(&mut Vec::new())?;
    runtime.block_on(node.shutdown(std::time::Duration::from_secs(1)));
    Ok(())
}
