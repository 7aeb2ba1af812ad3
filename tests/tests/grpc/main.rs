//! The gRPC service as a stranger meets it: a stock client, a hostile one, one that vanishes.

mod blocks;
mod lane;
mod leases;
mod life;
mod refusals;
mod wire;

use kvproto::v1::{self, PutOutcome};
use tonic::Status;

fn reason(status: &Status) -> &str {
    status
        .metadata()
        .get("terrace-reason")
        .map_or("", |value| value.to_str().unwrap_or(""))
}

fn outcomes(results: &[v1::PutResult]) -> Vec<PutOutcome> {
    results.iter().map(v1::PutResult::outcome).collect()
}
