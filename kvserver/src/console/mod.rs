//! The HTTP side for people and machines that watch: metrics, health, one plain page.
//!
//! ```text
//! GET /          the figures that matter, with links     GET /healthz   200 while the process answers
//! GET /metrics   Prometheus text                         GET /readyz    200 while the node takes calls and has not left
//!                                                                the cluster, else 503; a line for every tier out of service
//! ```

use std::{
    fmt::Write as _,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{Html, IntoResponse},
    routing::get,
};
use kvproto::MemberState;
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_util::sync::CancellationToken;

use crate::{blocks::Blocks, telemetry::metrics::Snapshot};

/// Why the console could not start.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address}: {source}; choose another with --http-listen, or \"off\"")]
pub struct ConsoleError {
    address: SocketAddr,
    source: std::io::Error,
}

/// The running console.
pub(crate) struct Console {
    address: SocketAddr,
    ready: Arc<AtomicBool>,
    stopping: CancellationToken,
    task: JoinHandle<()>,
}

#[derive(Clone)]
struct Shown {
    blocks: Arc<Blocks>,
    ready: Arc<AtomicBool>,
    grpc: SocketAddr,
}

impl Console {
    /// Binds the address and serves on the current runtime.
    pub(crate) async fn start(
        address: SocketAddr,
        grpc: SocketAddr,
        blocks: Arc<Blocks>,
    ) -> Result<Self, ConsoleError> {
        let refuse = |source| ConsoleError { address, source };
        let listener = TcpListener::bind(address).await.map_err(refuse)?;
        let address = listener.local_addr().map_err(refuse)?;
        let ready = Arc::new(AtomicBool::new(true));
        let stopping = CancellationToken::new();
        let routes = Router::new()
            .route("/", get(page))
            .route("/metrics", get(metrics))
            .route("/healthz", get(async || "ok\n"))
            .route("/readyz", get(readyz))
            .with_state(Shown {
                blocks,
                ready: Arc::clone(&ready),
                grpc,
            });
        let stop = stopping.clone().cancelled_owned();
        let task = tokio::spawn(async move {
            if let Err(error) = axum::serve(listener, routes)
                .with_graceful_shutdown(stop)
                .await
            {
                tracing::error!(%error, "the console stopped");
            }
        });
        Ok(Self {
            address,
            ready,
            stopping,
            task,
        })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// From now on `/readyz` says no.
    pub(crate) fn draining(&self) {
        self.ready.store(false, Ordering::Relaxed);
    }

    /// Stops listening. Connections that a scraper keeps open are cut.
    pub(crate) async fn stop(self) {
        self.stopping.cancel();
        self.task.abort();
        let _ = self.task.await; // cancelled, as was asked
    }
}

async fn metrics(State(shown): State<Shown>) -> impl IntoResponse {
    let kind = [(
        header::CONTENT_TYPE,
        "text/plain; version=0.0.4; charset=utf-8",
    )];
    (kind, shown.blocks.metrics_text())
}

async fn readyz(State(shown): State<Shown>) -> impl IntoResponse {
    if !shown.ready.load(Ordering::Relaxed) {
        return (StatusCode::SERVICE_UNAVAILABLE, "draining\n".to_owned());
    }
    // What it had is with others, and nobody is sent to it.
    if shown.blocks.cluster().declared().state == MemberState::Gone {
        let text = "has left the cluster; `kvctl cluster resume` brings it back\n";
        return (StatusCode::SERVICE_UNAVAILABLE, text.to_owned());
    }
    (StatusCode::OK, readiness(&shown.blocks.snapshot()))
}

/// A node without one of its tiers takes calls and is ready; who asks is told what it lacks.
fn readiness(snapshot: &Snapshot) -> String {
    let mut text = "ready\n".to_owned();
    for tier in snapshot.tiers.iter().filter(|tier| !tier.in_service) {
        let _ = writeln!(text, "without {}: {}", tier.kind, tier.note);
    }
    text
}

async fn page(State(shown): State<Shown>) -> Html<String> {
    Html(render(&shown.blocks.snapshot(), shown.grpc))
}

fn render(snapshot: &Snapshot, grpc: SocketAddr) -> String {
    let size = |bytes: u64| bytesize::ByteSize(bytes).display().iec().to_string();
    let mut rows = String::new();
    for tier in &snapshot.tiers {
        let state = if tier.in_service {
            "in service"
        } else {
            "out of service"
        };
        let _ = writeln!(
            rows,
            "<tr><td>{}</td><td>{}</td><td>{} of {}</td><td>{state}</td><td>{}</td></tr>",
            tier.kind,
            tier.blocks,
            size(tier.used_bytes),
            size(tier.capacity_bytes),
            escape(&tier.note),
        );
    }
    format!(
        "<!doctype html><meta charset=utf-8><title>Terrace</title>\
         <style>body{{font:15px/1.5 system-ui;margin:3em auto;max-width:44em}}\
         td,th{{padding:.2em 1.2em .2em 0;text-align:left}}</style>\
         <h1>Terrace {}</h1><p>Up {} s. gRPC on {grpc}. Policy {}. {} leases over {}. {} namespaces.</p>\
         <table><tr><th>tier<th>blocks<th>bytes<th>state<th>note</tr>{rows}</table>\
         <p><a href=/metrics>metrics</a> · <a href=/healthz>health</a> · <a href=/readyz>readiness</a></p>",
        env!("CARGO_PKG_VERSION"),
        snapshot.uptime_ms / 1000,
        escape(&snapshot.policy),
        snapshot.leases,
        size(snapshot.leased_bytes),
        snapshot.namespaces,
    )
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_shows_figures_and_lets_no_text_become_markup() {
        let snapshot = Snapshot {
            policy: "<b>".to_owned(),
            leases: 7,
            ..Snapshot::default()
        };
        let page = render(&snapshot, SocketAddr::from(([127, 0, 0, 1], 7070)));
        assert!(page.contains("7 leases") && page.contains("127.0.0.1:7070"));
        assert!(page.contains("&lt;b>") && !page.contains("<b>"));
    }
}
